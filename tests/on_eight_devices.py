"""What 8 CPU devices do with the steps, the states and the page docs/meshes.md: prints JSON.

Run by tests/test_meshes.py in a process of its own, since the number of devices is fixed at start.

"steps": twenty steps of one small model, placed in every way; per layout and path how far
parameters and state (the weights are in it) end from those of one device, and the collectives of
the compiled step as [operation, bytes, executions]. The same collectives of the page's own step.
"states": per mesh and optimizer where the page's ``place_state`` puts the state and two steps
leave it.
"""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard
from jax.sharding import PartitionSpec as P

from benchmarks.lowering import collectives, deviation
from gaba_jax import TaskMultiSteps, balanced_value_and_grad, gaba, task_value_and_grad, weighting
from tests import pages
from tests.elements import of_elements

ROOT = pathlib.Path(__file__).parent.parent
PAGE = "docs/meshes.md"
K, STEPS, BATCH, WIDTH = 2, 20, 16, 64  # wide enough beside the batch for norms from factors
RULE = functools.partial(weighting.gaba, K, warmup_steps=2, beta=0.9)
PATHS = ("plain", "stacked", "exact", "exact, cosines", "exact, statistics", "lagged")
SLICES = ("slices", "slices, cosines", "slices, lagged")  # split over the devices
SLICED = ("data parallel", "data parallel, explicit", "fsdp", "fsdp, explicit")
WIDE = 128  # of the page's kernels: XLA moves activations if it may
KERNELS = {"w1": True, "w2": True, "a": False, "b": False}
MOMENTUM = optax.sgd(1e-3, momentum=0.9)
OPTIMIZERS = {
    "adamw": optax.chain(gaba(K), optax.adamw(1e-3)),
    "muon": optax.chain(gaba(K), optax.contrib.muon(1e-3)),
    "masked": optax.chain(gaba(K), optax.masked(MOMENTUM, KERNELS)),
    "partition": optax.chain(
        gaba(K), optax.partition({True: MOMENTUM, False: optax.sgd(1e-3)}, KERNELS)
    ),
    "TaskMultiSteps": TaskMultiSteps(optax.chain(gaba(K), MOMENTUM), 2),
    "lookahead": optax.lookahead(optax.chain(gaba(K), MOMENTUM), 5, 0.5),
}


class Layout(NamedTuple):
    axes: dict[str, int]
    params: PartitionSpec  # of matrices; vectors are replicated
    batch: PartitionSpec
    axis_type: AxisType = AxisType.Auto
    gathered: bool = False  # parameters are gathered where they are used
    hidden: PartitionSpec | None = None  # of activations


LAYOUTS = {
    "data parallel": Layout({"data": 8}, P(), P("data")),
    "data parallel, explicit": Layout({"data": 8}, P(), P("data"), AxisType.Explicit),
    "fsdp": Layout({"data": 8}, P("data"), P("data"), gathered=True),
    "fsdp, explicit": Layout({"data": 8}, P("data"), P("data"), AxisType.Explicit, gathered=True),
    "tensor parallel": Layout({"model": 8}, P(None, "model"), P(), hidden=P()),
    "tensor parallel, explicit": Layout(
        {"model": 8}, P(None, "model"), P(), AxisType.Explicit, hidden=P()
    ),
    "2 x 4": Layout({"data": 2, "model": 4}, P(None, "model"), P("data"), hidden=P("data")),
    "2 x 4, explicit": Layout(
        {"data": 2, "model": 4}, P(None, "model"), P("data"), AxisType.Explicit, hidden=P("data")
    ),
}


def of_process(tmp_path_factory, name, *arguments):
    """What Python, called with these arguments in a process of its own, prints as JSON.

    The first worker of a run that asks for this name waits for the process, others for the first.
    """
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if os.environ.get("PYTEST_XDIST_WORKER") else root
    printed = shared / f"{name}.json"
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            printed.write_text(done.stdout)
    return json.loads(printed.read_text())


@functools.cache
def page():
    """The names that the page defines: its code has run on these devices."""
    return pages.run(ROOT / PAGE)


def init():
    """Parameters, and the batch (x, y) of every step."""
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "w1": jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5,
        "w2": jax.random.normal(keys[1], (WIDTH, WIDTH)) / WIDTH**0.5,
        "a": jax.random.normal(keys[2], (WIDTH,)),
        "b": jax.random.normal(keys[3], (WIDTH,)),
    }
    x = np.asarray(jax.random.normal(keys[4], (STEPS, BATCH, WIDTH)))
    return params, list(zip(x, np.sin(x.sum(axis=2)), strict=True))


def place(layout, spec, value):
    if layout is None or spec is None:
        return value
    if layout.axis_type is AxisType.Explicit:
        return reshard(value, spec)
    return lax.with_sharding_constraint(value, spec)


def make_losses(layout=None, mean=lambda loss: loss):
    def losses_fn(params, x, y):
        gathered = P() if layout is not None and layout.gathered else None
        hidden = None if layout is None else layout.hidden
        h = place(layout, hidden, jnp.tanh(x @ place(layout, gathered, params["w1"])))
        h = place(layout, hidden, jnp.tanh(h @ place(layout, gathered, params["w2"])))
        loud, quiet = jnp.mean((h @ params["a"] - y) ** 2), jnp.mean((h @ params["b"]) ** 2)
        return mean(100 * loud), mean(quiet)

    return losses_fn


def make_step(path, losses_fn, average=lambda grads: grads):
    """(carry, x, y) -> carry, and what has an init(params) for each part of the carry."""
    adamw = optax.adamw(1e-3)
    if path == "plain":

        def step(carry, x, y):
            params, opt_state = carry
            grads = average(jax.grad(lambda p: sum(losses_fn(p, x, y)))(params))
            updates, opt_state = adamw.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return step, (adamw,)
    if path == "stacked":
        tx = optax.chain(gaba(K, warmup_steps=2, beta=0.9), adamw)

        def step(carry, x, y):
            params, opt_state = carry
            _, grads = task_value_and_grad(losses_fn)(params, x, y)
            updates, opt_state = tx.update(average(grads), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return step, (tx,)
    measure, _, reads = path.partition(", ")
    rules = {"": RULE, "cosines": lambda: weighting.upgrad(K), "statistics": lambda: of_elements(K)}
    rule = rules[reads]()
    balanced = balanced_value_and_grad(losses_fn, rule, measure=measure)

    def step(carry, x, y):
        params, state, opt_state = carry
        (_, grads), state = balanced.value_and_grad(params, state, x, y)
        updates, opt_state = adamw.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state

    return step, (balanced, adamw)


def make_sliced_step(path, layout=None):
    """Likewise, every row of the batch a slice of one of the two tasks in turn."""
    gathered = layout is not None and layout.gathered

    def loss_fn(params, task, x, y):
        head = jnp.where(task == 0, params["a"], params["b"])
        h = jnp.tanh(jnp.tanh(x @ params["w1"]) @ params["w2"])
        return jnp.where(task == 0, 100.0, 1.0) * (h @ head - y) ** 2

    rule = weighting.upgrad(K) if "cosines" in path else RULE()
    options = {"measure": "lagged"} if "lagged" in path else {}
    balanced, adamw = (
        balanced_value_and_grad(loss_fn, rule, in_axes=0, **options),
        optax.adamw(1e-3),
    )

    def step(carry, x, y):
        params, state, opt_state = carry
        whole = jax.tree.map(lambda p: place(layout, P(), p), params) if gathered else params
        tasks = place(layout, P("data"), jnp.arange(BATCH) % K)
        (_, grads), state = balanced.value_and_grad(whole, state, tasks, x, y, task_ids=tasks)
        if gathered:
            specs = {name: layout.params if p.ndim > 1 else P() for name, p in params.items()}
            grads = {name: place(layout, specs[name], g) for name, g in grads.items()}
        updates, opt_state = adamw.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state)

    return step, (balanced, adamw)


def train(step, carry, batches, **options):
    """The last carry, and the compiled step. It takes its own output again: all stays in place."""
    program = jax.jit(step, **options).lower(carry, *batches[0]).compile()
    for batch in batches:
        carry = program(carry, *batch)
    return carry, program


@contextlib.contextmanager
def placed(layout, params, batches):
    """Parameters and batches on the mesh of a layout, which is the mesh within."""
    axes = layout.axes
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(layout.axis_type,) * len(axes)
    )
    with jax.set_mesh(mesh):
        specs = jax.tree.map(lambda p: layout.params if p.ndim > 1 else P(), params)
        params = jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
        yield params, jax.device_put(batches, NamedSharding(mesh, layout.batch))


def places_of(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def make_step_of(path, layout=None):
    if path in SLICES:
        return make_sliced_step(path, layout)
    return make_step(path, make_losses(layout))


def on_a_mesh(layout, path, params, batches):
    step, parts = make_step_of(path, layout)
    with placed(layout, params, batches) as (params, batches):
        carry = (params, *(page()["place_state"](part, params) for part in parts))
        return train(step, carry, batches, out_shardings=places_of(carry))


def under_shard_map(check_vma, path, params, batches):
    """Checked, the losses are averaged; unchecked, the stacked gradients."""

    def mean(values):
        return jax.lax.pmean(values, "data")

    if check_vma:
        step, parts = make_step(path, make_losses(mean=mean))
    else:
        step, parts = make_step(path, make_losses(), average=mean)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    return train(step, (params, *(part.init(params) for part in parts)), batches)


def moved(program):
    found = collectives(program.as_text()).items()
    return [[operation, size, n] for (operation, size), n in found if n]


def of_the_page():
    """Per path the collectives of a step on the page's gathered losses; "stacked" is its own."""
    names = page()
    params = jax.tree.map(lambda leaf: jnp.ones([WIDE] * leaf.ndim), names["params"])
    params = jax.device_put(params, names["shardings"])
    x, y = jnp.ones((WIDE // 4, WIDE)), jnp.ones(WIDE // 4)
    x, y = jax.device_put((x, y), NamedSharding(names["mesh"], P("data")))
    opt_state = names["place_state"](names["tx"], params)
    lowered = {"stacked": names["train_step"].lower(params, opt_state, x, y)}
    for path in (path for path in PATHS if path != "stacked"):
        step, parts = make_step(path, names["gathered_losses_fn"])
        carry = (params, *(names["place_state"](part, params) for part in parts))
        lowered[path] = jax.jit(step, out_shardings=places_of(carry)).lower(carry, x, y)
    return {path: {"collectives": moved(step.compile())} for path, step in lowered.items()}


def misplaced(layout, mesh, tree):
    """Leaves that are not where they belong: like a kernel, stacked or not, or else everywhere."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        like_a_kernel = leaf.shape[-2:] == (WIDTH, WIDTH)
        spec = P(*[None] * (leaf.ndim - 2), *layout.params) if like_a_kernel else P()
        if not leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim):
            found.append(f"{jax.tree_util.keystr(path)}: {leaf.sharding}")
    return found


def keeps_its_place(layout, name, params, batches):
    """Leaves like a kernel, what is misplaced before and after two steps, and traces or error."""
    tx, losses_fn, traces = OPTIMIZERS[name], make_losses(layout), 0

    def step(params, opt_state, x, y):
        nonlocal traces
        traces += 1
        _, grads = task_value_and_grad(losses_fn)(getattr(params, "fast", params), x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jax.tree.map(jnp.copy, params)  # the first is donated
    with placed(layout, params, batches) as (params, batches):
        mesh = params["w1"].sharding.mesh
        if name == "lookahead":
            params = optax.LookaheadParams(params, jax.tree.map(jnp.copy, params))
        carry = (params, page()["place_state"](tx, params))
        kernels = sum(leaf.shape[-2:] == (WIDTH, WIDTH) for leaf in jax.tree.leaves(carry[1]))
        found = {"kernels": kernels, "at first": misplaced(layout, mesh, carry)}
        named = layout.axis_type is AxisType.Auto  # else the step says it by itself
        options = {"out_shardings": places_of(carry)} if named else {}
        compiled = jax.jit(step, donate_argnums=(0, 1), **options)
        try:
            for batch in batches[:2]:
                carry = compiled(*carry, *batch)
        except Exception as error:  # jax's ShardingTypeError is not public
            return found | {"error": type(error).__name__}
        return found | {"after": misplaced(layout, mesh, carry), "traces": traces}


def main():
    params, batches = init()
    steps = {name: {} for name in LAYOUTS} | {"shard_map": {}, "shard_map, unchecked": {}}
    for path in (*PATHS, *SLICES):
        step, parts = make_step_of(path)
        expected, _ = train(step, (params, *(part.init(params) for part in parts)), batches)
        names = SLICED if path in SLICES else LAYOUTS
        runs = {name: functools.partial(on_a_mesh, LAYOUTS[name]) for name in names}
        if path in PATHS:
            runs["shard_map"] = functools.partial(under_shard_map, True)
        if path in ("plain", "stacked"):
            runs["shard_map, unchecked"] = functools.partial(under_shard_map, False)
        for name, run in runs.items():
            try:
                carry, program = run(path, params, batches)
            except Exception as error:  # jax's ShardingTypeError is not public
                steps[name][path] = {"error": f"{type(error).__name__}: {error}"}
                continue
            steps[name][path] = {
                "deviation": deviation(carry, expected),
                "collectives": moved(program),
            }
    steps[PAGE] = of_the_page()
    states = {
        f"{name}, {optimizer}": keeps_its_place(LAYOUTS[name], optimizer, params, batches)
        for name in ("fsdp", "fsdp, explicit")
        for optimizer in OPTIMIZERS
    }
    print(json.dumps({"steps": steps, "states": states}))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
