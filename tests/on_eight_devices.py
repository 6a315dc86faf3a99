"""Twenty steps of one small model on 8 CPU devices, placed in every way: prints JSON.

Run by tests/test_meshes.py in a process of its own, since the number of devices is fixed at start.
Per layout and path: how far parameters and state (the weights are in it) end from those of one
device, and the collectives of the compiled step as [operation, bytes, executions].
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard
from jax.sharding import PartitionSpec as P

from benchmarks.lowering import collectives, deviation
from gaba_jax import balanced_value_and_grad, gaba, task_value_and_grad, weighting

ROOT = pathlib.Path(__file__).parent.parent
K, STEPS, BATCH, WIDTH = 2, 20, 16, 16
RULE = functools.partial(weighting.gaba, K, warmup_steps=2, beta=0.9)
PATHS = ("plain", "stacked", "exact", "lagged")


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


def of_process(*arguments):
    """What Python, called with these arguments in a process of its own, prints as JSON."""
    # LLVM's optimisation comes after the partitioning and takes most of the time.
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | flags,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def init():
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "w1": jax.random.normal(keys[0], (WIDTH, WIDTH)) / 4,
        "w2": jax.random.normal(keys[1], (WIDTH, WIDTH)) / 4,
        "a": jax.random.normal(keys[2], (WIDTH,)),
        "b": jax.random.normal(keys[3], (WIDTH,)),
    }
    x = jax.random.normal(keys[4], (STEPS, BATCH, WIDTH))
    return params, (x, jnp.sin(x.sum(axis=2)))


def make_losses(layout=None, mean=lambda loss: loss):
    def place(spec, value):
        if layout is None or spec is None:
            return value
        if layout.axis_type is AxisType.Explicit:
            return reshard(value, spec)
        return lax.with_sharding_constraint(value, spec)

    def losses_fn(params, x, y):
        gathered = P() if layout is not None and layout.gathered else None
        hidden = None if layout is None else layout.hidden
        h = place(hidden, jnp.tanh(x @ place(gathered, params["w1"])))
        h = place(hidden, jnp.tanh(h @ place(gathered, params["w2"])))
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
    balanced = balanced_value_and_grad(losses_fn, RULE(), measure=path)

    def step(carry, x, y):
        params, state, opt_state = carry
        (_, grads), state = balanced.value_and_grad(params, state, x, y)
        updates, opt_state = adamw.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state

    return step, (balanced, adamw)


def place_state(tx, params):
    """``tx.init(params)``: what mirrors a parameter lies where it does, the rest everywhere."""
    everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, P())
    shardings = optax.tree_map_params(
        tx,
        lambda _, param: param.sharding,
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return jax.jit(tx.init, out_shardings=shardings)(params)


def train(step, carry, batches, **options):
    """The last carry, and the compiled step. It takes its own output again: all stays in place."""
    first = [of_all[0] for of_all in batches]
    program = jax.jit(step, **options).lower(carry, *first).compile()
    for i in range(STEPS):
        carry = program(carry, *(of_all[i] for of_all in batches))
    return carry, program


def on_a_mesh(layout, path, params, batches):
    step, parts = make_step(path, make_losses(layout))
    mesh = jax.make_mesh(
        tuple(layout.axes.values()),
        tuple(layout.axes),
        axis_types=(layout.axis_type,) * len(layout.axes),
    )
    with jax.set_mesh(mesh):
        specs = jax.tree.map(lambda p: layout.params if p.ndim > 1 else P(), params)
        params = jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))
        batches = jax.device_put(batches, NamedSharding(mesh, P(None, *layout.batch)))
        carry = (params, *(place_state(part, params) for part in parts))
        places = jax.tree.map(lambda leaf: leaf.sharding, carry)
        return train(step, carry, batches, out_shardings=places)


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


def main():
    params, batches = init()
    found = {name: {} for name in LAYOUTS}
    found |= {"shard_map": {}, "shard_map, unchecked": {}}
    for path in PATHS:
        step, parts = make_step(path, make_losses())
        expected, _ = train(step, (params, *(part.init(params) for part in parts)), batches)
        runs = {name: functools.partial(on_a_mesh, layout) for name, layout in LAYOUTS.items()}
        runs["shard_map"] = functools.partial(under_shard_map, True)
        if path in ("plain", "stacked"):
            runs["shard_map, unchecked"] = functools.partial(under_shard_map, False)
        for name, run in runs.items():
            carry, program = run(path, params, batches)
            moved = collectives(program.as_text()).items()
            found[name][path] = {
                "deviation": deviation(carry, expected),
                "collectives": [[operation, size, n] for (operation, size), n in moved],
            }
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
