"""The backward pass cut where it is narrowest: the numbers of stacked gradients, in any model."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

from gaba_jax import (
    _cut,
    _gradients,
    _passes,
    balance,
    balanced_value_and_grad,
    exclude,
    only,
    task_value_and_grad,
    weighting,
)
from tests.debugging import MODES
from tests.slow import rest_slow, rest_slow_of_several

# Rules that read norms, and cosines too.
RULES = {"norms": weighting.inverse_norm}
NORMAL = np.random.default_rng(0).normal


def cosine_rule(num_tasks):
    """Weights that depend on every cosine, and smoothly."""

    def update(stats, state):
        numbers = stats.cosines @ jnp.arange(1.0, 1 + num_tasks) + jnp.tanh(stats.norms)
        return jax.nn.softmax(jnp.where(stats.present, numbers, -jnp.inf)), state

    return weighting.uniform(num_tasks)._replace(
        needs=frozenset({"norms", "cosines"}), update=update
    )


RULES["cosines"] = cosine_rule


def normal(*shape, scale=1.0):
    return jnp.asarray(NORMAL(size=shape) * scale, jnp.float32)


def assert_close(actual, expected, rtol=1e-5):
    """Equal to ``rtol`` of the largest element of each leaf, or to rounding of the whole tree's."""
    actual, expected = (
        [np.asarray(leaf, np.result_type(leaf.dtype, np.float32)) for leaf in jax.tree.leaves(tree)]
        for tree in (actual, expected)
    )
    largest = [float(np.abs(e).max(initial=0)) for e in expected]
    for a, e, size in zip(actual, expected, largest, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=max(rtol * size, 1e-7 * max(largest)))


def stacked_step(fn, rule, params, *args, mask=None, **options):
    """Losses, gradient and state of one update on stacked gradients."""
    losses, grads = task_value_and_grad(fn)(params, *args)
    tx = balance(rule, **options)
    needed = {"task_losses": losses} if "losses" in rule.needs else {}
    grads, state = tx.update(grads, tx.init(params), params, task_mask=mask, **needed)
    return losses, grads, state


def exact_step(fn, rule, params, *args, mask=None, **options):
    balanced = balanced_value_and_grad(fn, rule, **options)
    (losses, grads), state = balanced.value_and_grad(
        params, balanced.init(params), *args, task_mask=mask
    )
    return losses, grads, state


def check(fn, rule, params, *args, num_tasks, rtol=1e-5, **options):
    """Both paths, in one program."""

    @jax.jit
    def both(params, *args):
        made = RULES[rule](num_tasks)
        return [step(fn, made, params, *args, **options) for step in (stacked_step, exact_step)]

    (losses, grads, state), (found_losses, found_grads, found) = both(params, *args)
    np.testing.assert_allclose(found_losses, losses, rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(found_grads, params)
    assert_states_close(found, state, rtol)
    assert_close(found_grads, grads, rtol)


def assert_states_close(found, state, rtol=1e-5):
    for name in ("task_norms", "task_weights", "next_task_weights"):
        numbers = getattr(found, name), getattr(state, name)
        np.testing.assert_allclose(*numbers, rtol=rtol, err_msg=name)
    np.testing.assert_array_equal(found.seen_by_task, state.seen_by_task)
    assert found.nonfinite_count == state.nonfinite_count
    if state.task_cosines is not None:
        np.testing.assert_allclose(found.task_cosines, state.task_cosines, atol=rtol)


def factored_leaves(fn, params, *args):
    """The names of the leaves that are kept as factors."""
    found = []

    def look(params, *args):
        run = _passes.whole(lambda p: fn(p, *args), params, False)
        program = _gradients.understood(run)
        terms = [_cut.leaf_terms(program, leaf) for leaf in program.leaves]
        paths = [path for path, _ in jax.tree.leaves_with_path(params)]
        found.extend(
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, of_leaf in zip(paths, terms, strict=True)
            if of_leaf
        )
        return run.losses

    jax.eval_shape(look, params, *args)
    return found


def mean_squares(outs, scales=None):
    """One loss for each of K outputs, 30x apart."""
    scales = [30.0**-i for i in range(len(outs))] if scales is None else scales
    return tuple(scales[i] * jnp.mean(jnp.square(out - i)) for i, out in enumerate(outs))


# Models: (losses_fn, params, arguments, number of tasks, leaves kept as factors).


def mlp(num_tasks=3, batch=6, width=32, container=tuple):
    params = {
        "w1": normal(8, width, scale=0.4),
        "b1": jnp.zeros(width),
        "w2": normal(width, width, scale=0.2),
        "heads": [normal(width) for _ in range(num_tasks)],
    }

    def fn(params, x, scales=None):
        h = jnp.tanh(x @ params["w1"] + params["b1"])
        h = jnp.tanh(h @ params["w2"])
        return container(mean_squares([h @ head for head in params["heads"]], scales))

    return fn, params, (normal(batch, 8),), num_tasks, ["w1", "w2"]


def transformer():
    width, length = 32, 5
    names = ("query", "key", "value", "out")
    params = {"embedding": normal(40, width), "scale": jnp.ones(width), "shift": jnp.zeros(width)}
    params |= {name: normal(width, width, scale=width**-0.5) for name in names}

    def fn(params, tokens):
        h = params["embedding"][tokens]
        query, key, value = (h @ params[name] for name in ("query", "key", "value"))
        attention = jax.nn.softmax(query @ jnp.swapaxes(key, 1, 2) / width**0.5)
        h = h + attention @ value @ params["out"]
        h = (h - h.mean(-1, keepdims=True)) / (h.std(-1, keepdims=True) + 1e-3)
        logits = (h * params["scale"] + params["shift"]) @ params["embedding"].T
        likely = jax.nn.log_softmax(logits)[:, :-1]
        picked = jnp.take_along_axis(likely, tokens[:, 1:, None], axis=2)
        return -50 * jnp.mean(picked), jnp.mean(logits[:, -1] ** 2)

    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, length)))
    return fn, params, (tokens,), 2, sorted(names)


def embedding(read):
    def fn(params, tokens):
        h = read(params["table"], tokens)
        return mean_squares([h.mean(1) @ head for head in params["heads"]])

    params = {"table": normal(300, 24), "heads": [normal(24) for _ in range(3)]}
    # Repeated, from the end, and in no row at all.
    tokens = jnp.array([[3, 3, -1, 299], [700, 3, -900, 12]])
    return fn, params, (tokens,), 3


def lookup():
    def read(table, tokens):
        return table.at[tokens].get(mode="fill", fill_value=0)

    return *embedding(read), ["table"]


def lookup_clipped():
    return *embedding(lambda table, tokens: jnp.take(table, tokens, axis=0, mode="clip")), []


def lookup_of_one_index():
    """A table [V] of scalars, and one index alone."""

    def fn(params, tokens):
        h = params["bias"][tokens] + params["table"][tokens[0, 0]].sum()
        return mean_squares([jnp.sin(h), jnp.cos(h)])

    params = {"bias": normal(50), "table": normal(50, 6)}
    return fn, params, (jnp.array([[3, 3], [3, 7]]),), 2, None


def lstm():
    width = 8
    params = {"x": normal(4, 4 * width), "h": normal(width, 4 * width), "b": jnp.zeros(4 * width)}

    def fn(params, x):
        def step(carry, x):
            h, c = carry
            gates = x @ params["x"] + h @ params["h"] + params["b"]
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = (jnp.zeros((x.shape[0], width)),) * 2
        (last, _), every = lax.scan(step, start, jnp.swapaxes(x, 0, 1))
        return mean_squares([last, every])

    return fn, params, (normal(3, 5, 4),), 2, []


def convolution():
    params = {"kernel": normal(3, 3, 2, 6), "dense": normal(6, 40), "out": normal(40, 2)}

    def fn(params, x):
        dims = ("NHWC", "HWIO", "NHWC")
        h = lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=dims)
        h = jax.nn.relu(h).mean(axis=(1, 2))
        out = jnp.tanh(h @ params["dense"]) @ params["out"]
        return mean_squares([out[:, 0], out[:, 1]])

    return fn, params, (normal(2, 5, 5, 2),), 2, ["dense", "out"]


def remat(wrap=jax.checkpoint):
    def fn(params, x):
        @wrap
        def layer(kernel, h):
            return jnp.tanh(h @ kernel)

        h = layer(params["w2"], layer(params["w1"], x))
        return mean_squares([h[:, :20], h[:, 10:] ** 2])

    params = {"w1": normal(24, 32, scale=0.3), "w2": normal(32, 32, scale=0.2)}
    return fn, params, (normal(5, 24),), 2, None


def remat_of_losses():
    fn, params, args, k, _ = mlp()
    return jax.checkpoint(fn), params, args, k, None


def scan_over_layers():
    def fn(params, x):
        def layer(h, kernel):
            return jnp.tanh(h @ kernel), jnp.mean(h)

        h, means = lax.scan(layer, x, params["layers"])
        h = jnp.tanh(h @ params["last"])
        return mean_squares([h, means])

    params = {"layers": normal(3, 24, 24, scale=0.3), "last": normal(24, 40)}
    return fn, params, (normal(4, 24),), 2, None


def complex_parameters():
    def fn(params, x):
        h = (x + 1j * x[::-1]) @ params["w"]
        h = jnp.abs(h * params["phase"]) + params["real"]
        return mean_squares([h, jnp.sin(h)])

    w = normal(20, 24) + 1j * normal(20, 24)
    params = {"w": w, "phase": jnp.exp(1j * normal(24)), "real": normal(24)}
    return fn, params, (normal(4, 20),), 2, []


def used_twice():
    def fn(params, x):
        h = jnp.tanh(jnp.tanh(x @ params["w"]) @ params["w"].T)
        return mean_squares([h, jnp.cos(h @ params["w"])])

    return fn, {"w": normal(20, 24, scale=0.3)}, (normal(4, 20),), 2, []


def used_by_one_or_none():
    def fn(params, x):
        h = jnp.tanh(x @ params["shared"])
        mine = jnp.tanh(h @ params["of one"])
        dead = jax.nn.relu(h @ params["dead"] - 1000.0)
        return mean_squares([mine, h + dead.sum(), dead + h.mean()])

    params = {name: normal(24, 24) for name in ("shared", "of one", "dead", "unused")}
    return fn, params, (normal(4, 24),), 3, None


def towers(num_tasks=3, share=(), width=24):
    """Losses that share nothing, or what is named: each its own examples."""

    def fn(params, xs):
        outs = []
        for i, x in enumerate(xs):
            h = x
            for name in (f"tower {i}", *(name for name in share if str(i) in name)):
                h = jnp.tanh(h @ params[name])
            outs.append(h)
        return mean_squares(outs)

    names = [*(f"tower {i}" for i in range(num_tasks)), *share]
    params = {name: normal(width, width, scale=width**-0.5) for name in names}
    return fn, params, ([normal(4, width) for _ in range(num_tasks)],), num_tasks, list(share)


def pairs():
    return towers(3, ("01", "02", "12"))


def shared_by_all_loaders():
    return towers(3, ("012",))


def stacked_losses():
    return mlp(container=jnp.stack)


def many_stacked_losses():
    return *mlp(9, container=jnp.stack)[:4], None


def one_task():
    return *mlp(1)[:4], []


def other_operations():
    """What stands between a product and its loss, or a leaf and its product."""

    def fn(params, x):
        h = jnp.cumsum(x @ params["w"], axis=1)
        h = jnp.sort(h[:, ::2]) * jnp.where(h[:, ::2] > 0, 1.0, 0.5)
        h = lax.cond(h.mean() > 0, jnp.sin, jnp.cos, h)
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 3), (1, 2), "SAME")
        waves = jnp.abs(jnp.fft.rfft(h @ params["v"]))
        return mean_squares([h, waves, jnp.concatenate([h, waves], axis=1).max(axis=0)])

    return fn, {"w": normal(20, 40), "v": normal(10, 30)}, (normal(4, 20),), 3, None


# Beside each model the rules that take part in a quick run; both do in a slow one.
MODELS = {
    "mlp": (mlp, "cosines"),
    "of one task": (one_task, None),
    "of 2 tasks": (functools.partial(mlp, 2), None),
    "of 5 tasks": (functools.partial(mlp, 5), None),
    "of 9 tasks": (functools.partial(mlp, 9), None),
    "losses in one array": (stacked_losses, None),
    "9 losses in one array": (many_stacked_losses, None),
    "losses in a list": (functools.partial(mlp, container=list), None),
    "transformer": (transformer, "norms"),
    "lookup": (lookup, "cosines"),
    "lookup, clipped": (lookup_clipped, None),
    "lookup of one index": (lookup_of_one_index, None),
    "lstm": (lstm, "norms"),
    "convolution": (convolution, "norms"),
    "checkpoint": (remat, None),
    "checkpoint that saves products": (
        functools.partial(
            remat, functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
        ),
        None,
    ),
    "jitted layers": (functools.partial(remat, jax.jit), None),
    "checkpoint of the losses": (remat_of_losses, None),
    "scan over layers": (scan_over_layers, None),
    "complex": (complex_parameters, "norms"),
    "used twice": (used_twice, "norms"),
    "used by one or none": (used_by_one_or_none, "norms"),
    "towers": (towers, None),
    "pairs": (pairs, "cosines"),
    "loaders of one model": (shared_by_all_loaders, "norms"),
    "other operations": (other_operations, "norms"),
}


def quick_or_slow(table):
    """Names with each rule; those that a quick run leaves out are marked."""
    return [
        pytest.param(
            *(name, rule),
            marks=() if quick in (rule, "both") else pytest.mark.slow,
            id=f"{name}, {rule}",
        )
        for name, (_, quick) in table.items()
        for rule in RULES
    ]


@pytest.mark.parametrize(("name", "rule"), quick_or_slow(MODELS))
def test_every_model_takes_the_update_of_stacked_gradients(name, rule):
    fn, params, args, num_tasks, factored = MODELS[name][0]()
    check(fn, rule, params, *args, num_tasks=num_tasks)
    if factored is not None:
        assert factored_leaves(fn, params, *args) == factored


QUICK_COSINES = [pytest.param("norms", marks=pytest.mark.slow), "cosines"]
DTYPES = [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)]
HEADS = {"shared": exclude("heads")}
PLAIN_HEADS = HEADS | {"weight_task_specific": False}
DROP = {"nonfinite": "drop"}
MASK = {"mask": jnp.array([True, False, True])}
LAST = {"measure_on": only("w2")}
OPTIONS = {
    "mask": (MASK, "norms"),
    "one present": ({"mask": jnp.array([False, True, False])}, None),
    "none present": ({"mask": jnp.zeros(3, bool)}, None),
    "drop": (DROP, None),
    "drop, mask": (DROP | MASK, None),
    "shared": (HEADS, None),
    "plain heads": (PLAIN_HEADS, None),
    "plain heads, mask": (PLAIN_HEADS | MASK, "cosines"),
    "plain heads, drop": (PLAIN_HEADS | DROP, None),
    "last layer": (LAST, None),
    "last layer, drop": (LAST | DROP, None),
    "a vector": ({"measure_on": only("b1")}, None),
}


@pytest.mark.parametrize(("name", "rule"), quick_or_slow(OPTIONS))
def test_every_option(name, rule):
    fn, params, args, num_tasks, _ = mlp()
    check(fn, rule, params, *args, num_tasks=num_tasks, **OPTIONS[name][0])


@pytest.mark.parametrize("name", ["mask", pytest.param("last layer", marks=pytest.mark.slow)])
def test_options_on_losses_in_one_array(name):
    fn, params, args, num_tasks, _ = stacked_losses()
    check(fn, "cosines", params, *args, num_tasks=num_tasks, **OPTIONS[name][0])


NAN = {
    "trunk": mlp,
    "checkpoint of the losses": remat_of_losses,
    "pairs": pairs,
    "loaders": shared_by_all_loaders,
    "towers": towers,
}
EACH_NAN = list(itertools.product(NAN, ["drop", "mask"]))
OFTEN = [("checkpoint of the losses", "drop"), ("towers", "drop"), ("trunk", "mask")]


@pytest.mark.parametrize(("name", "how"), rest_slow_of_several(EACH_NAN, fast=OFTEN))
def test_a_nan_in_one_task_does_not_reach_the_others(name, how):
    fn, params, args, num_tasks, _ = NAN[name]()
    if name in ("trunk", "checkpoint of the losses"):
        args = (*args, jnp.array([30.0, jnp.nan, 1.0]))
    else:
        xs = list(args[0])
        xs[1] = xs[1].at[2, 3].set(jnp.nan)
        args = (xs,)

    @jax.jit
    def both(params, *args):
        rule, options = cosine_rule(num_tasks), DROP if how == "drop" else MASK
        return [step(fn, rule, params, *args, **options) for step in (stacked_step, exact_step)]

    (_, grads, state), (losses, found_grads, found) = both(params, *args)
    assert jnp.isnan(losses[1])
    chex.assert_tree_all_finite((found_grads, found))
    assert found.task_weights[1] == 0
    # Towers have no parameter that two tasks share, so that nothing is measured.
    assert found.nonfinite_count == (how == "drop" and name != "towers")
    assert_states_close(found, state)
    assert_close(found_grads, grads)


def test_drop_of_losses_in_one_array():
    fn, params, args, num_tasks, _ = stacked_losses()
    balanced = balanced_value_and_grad(fn, weighting.gaba(num_tasks), nonfinite="drop")
    with pytest.raises(ValueError, match="needs the losses apart: return a tuple, a list"):
        balanced.value_and_grad(params, balanced.init(params), *args)


@pytest.mark.parametrize(
    ("rule", "options"),
    [(weighting.uniform(3), MASK), (weighting.imtl_l(3), {}), (weighting.uniform(3), DROP)],
    ids=["masked", "of losses", "drop"],
)
def test_rules_that_read_no_gradient(rule, options):
    fn, params, args, *_ = mlp()

    @jax.jit
    def both(params, *args):
        return [step(fn, rule, params, *args, **options) for step in (stacked_step, exact_step)]

    (_, grads, state), (_, found_grads, found) = both(params, *args)
    assert_states_close(found, state)
    assert_close(found_grads, grads)


def test_held_updates_with_cosines():
    fn, params, (x,), num_tasks, _ = mlp(2)
    rule = cosine_rule(num_tasks)
    balanced = balanced_value_and_grad(fn, rule, every=2)
    step, state = jax.jit(balanced.value_and_grad), balanced.init(params)

    @jax.jit
    def stacked(*args):
        return stacked_step(fn, rule, *args)[2], task_value_and_grad(fn)(*args)[1]

    measured = None
    for t in range(3):
        args = params, x, jnp.array([30.0, 1.0 + t])
        (_, grads), state = step(args[0], state, *args[1:])
        now, each = stacked(*args)
        measured = now if t % 2 == 0 else measured
        weights = measured.task_weights
        assert_close(grads, jax.tree.map(lambda g, w=weights: jnp.tensordot(w, g, 1), each))
        np.testing.assert_allclose(state.task_weights, weights, rtol=1e-5)
        np.testing.assert_allclose(state.task_cosines, measured.task_cosines, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [DROP, *(pytest.param(each, marks=pytest.mark.slow) for each in ({}, MASK, LAST))],
    ids=["drop", "all", "mask", "last"],
)
def test_a_program_that_is_not_understood(options, monkeypatch):
    """Slower, never wrong."""
    monkeypatch.setattr(_gradients, "understood", lambda *_: None)
    fn, params, args, num_tasks, _ = mlp()
    check(fn, "cosines", params, *args, num_tasks=num_tasks, **options)


@jax.custom_vjp
def clipped(x):
    """Its gradient is clipped: not linear in the cotangent."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -2e-3, 2e-3),))


@pytest.mark.parametrize("container", [tuple, pytest.param(jnp.stack, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [weighting.inverse_norm, weighting.uniform])
def test_a_gradient_that_is_clipped_inside_the_model(make, container):
    """Clipped for every task by itself, in held updates and where no gradient is measured too."""

    def fn(params, x):
        h = clipped(jnp.tanh(x @ params["w"]))
        return container(mean_squares([h @ head for head in params["heads"]]))

    params = {"w": normal(16, 24), "heads": [normal(24), normal(24)]}
    x, rule = normal(4, 16), make(2)
    _, expected, measured = jax.jit(functools.partial(stacked_step, fn, rule))(params, x)
    balanced = balanced_value_and_grad(fn, rule, every=2)
    step, state = jax.jit(balanced.value_and_grad), balanced.init(params)
    for _ in range(2):
        (_, grads), state = step(params, state, x)
        np.testing.assert_allclose(state.task_weights, measured.task_weights, rtol=1e-5)
        assert_close(grads, expected)


@pytest.mark.parametrize("mode", rest_slow(MODES, fast=["rank_promotion"]))
@pytest.mark.parametrize("options", [{}, {"groups": "leaf"}], ids=["whole", "groups"])
def test_debugging_modes_where_leaves_are_factors(mode, options):
    def fn(params, x):
        h = jnp.tanh(x @ params["w"] + params["table"][jnp.arange(4)])
        return tuple(mean_squares([h @ head for head in params["heads"]]))

    params = {"w": normal(16, 24), "table": normal(50, 24), "heads": [normal(24), normal(24)]}
    assert sorted(factored_leaves(fn, params, normal(4, 16))) == ["table", "w"]
    with MODES[mode]():
        for make in (weighting.inverse_norm, weighting.upgrad):
            exact_step(fn, make(2), params, normal(4, 16), **options)


@pytest.mark.slow
def test_vmap_over_seeds():
    fn, params, args, num_tasks, _ = mlp(2)
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)

    @jax.jit
    def both(params, *args):
        rule = cosine_rule(num_tasks)
        return [
            jax.vmap(lambda p: step(fn, rule, p, *args))(params)  # noqa: B023
            for step in (stacked_step, exact_step)
        ]

    (_, grads, state), (_, found_grads, found) = both(params, *args)
    np.testing.assert_allclose(found.task_norms, state.task_norms, rtol=1e-5)
    np.testing.assert_allclose(found.task_cosines, state.task_cosines, atol=1e-5)
    assert_close(found_grads, grads)


@pytest.mark.slow
@pytest.mark.parametrize("rule", QUICK_COSINES)
def test_float64(rule):
    with jax.enable_x64(True):
        fn, *arrays, num_tasks, _ = mlp()
        params, args = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), arrays)
        check(fn, rule, params, *args, num_tasks=num_tasks, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision(dtype):
    """Gradients within the precision of their leaves, norms closer: their rounding averages out."""
    fn, *arrays, num_tasks, _ = mlp()
    params, args = jax.tree.map(lambda a: a.astype(dtype), arrays)

    @jax.jit
    def both(params, *args):
        rule = cosine_rule(num_tasks)
        return [step(fn, rule, params, *args) for step in (stacked_step, exact_step)]

    (_, grads, state), (_, found_grads, found) = both(params, *args)
    eps = float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_equal_shapes_and_dtypes(found_grads, params)
    assert_close(found_grads, grads, rtol=eps)
    np.testing.assert_allclose(found.task_norms, state.task_norms, rtol=eps / 4)
    np.testing.assert_allclose(found.task_cosines, state.task_cosines, atol=eps / 4)


@pytest.mark.slow
@pytest.mark.parametrize("rule", QUICK_COSINES)
def test_jax_grad_through_a_step_takes_the_weights_as_constants(rule):
    fn, params, args, num_tasks, _ = mlp(2)
    direction = jax.tree.map(lambda p: normal(*p.shape), params)

    @jax.jit
    def both(params, *args):
        def along(step, params):
            grads = step(fn, RULES[rule](num_tasks), params, *args)[1]
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, direction)))

        steps = (stacked_step, exact_step)
        return [jax.value_and_grad(functools.partial(along, step))(params) for step in steps]

    expected, found = both(params, *args)
    assert_close(found, expected)


class TestArguments:
    @property
    def params(self):
        return {"w": jnp.cos(jnp.arange(16.0 * 24)).reshape(16, 24)}

    x, y = jnp.sin(jnp.arange(2.0 * 6 * 16)).reshape(2, 6, 16)

    @pytest.mark.parametrize("options", [{"microbatch_size": 3}, {"every": 2}])
    def test_keywords_and_strings(self, options):
        def fn(params, x, mode, *, y, power="odd"):
            h = jnp.tanh(x @ params["w"]) if mode == "train" else x
            loss = jnp.mean((h - (y @ params["w"])) ** 2)
            return loss, jnp.mean(h**2) if power == "even" else jnp.mean(h)

        _, grads, state = stacked_step(
            lambda p, x, y: fn(p, x, "train", y=y, power="even"),
            *(weighting.inverse_norm(2), self.params, self.x, self.y),
        )
        balanced = balanced_value_and_grad(fn, weighting.inverse_norm(2), **options)

        @jax.jit
        def step(params, state, x, y):
            return balanced.value_and_grad(params, state, x, "train", y=y, power="even")

        (_, found_grads), found = step(self.params, balanced.init(self.params), self.x, self.y)
        assert_states_close(found, state)
        assert_close(found_grads, grads)

    def test_an_encoder_is_given_them_too(self):
        def encoder(params, x, mode, *, y):
            return jnp.tanh(x @ params["w"]) if mode == "train" else x

        def fn(params, h, x, mode, *, y):
            return jnp.mean((h - (y @ params["w"])) ** 2), jnp.mean(h)

        balanced = balanced_value_and_grad(fn, weighting.inverse_norm(2), encoder=encoder)
        (losses, _), _ = balanced.value_and_grad(
            self.params, balanced.init(self.params), self.x, "train", y=self.y
        )
        h = encoder(self.params, self.x, "train", y=self.y)
        np.testing.assert_allclose(losses, fn(self.params, h, None, None, y=self.y), rtol=1e-6)

    def test_aux_that_holds_a_string(self):
        def fn(params, x):
            h = jnp.tanh(x @ params["w"])
            return (jnp.mean(h), jnp.mean(h**2)), {"name": "tanh", "h": h, "number": 3}

        balanced = balanced_value_and_grad(fn, weighting.inverse_norm(2), every=2, has_aux=True)
        state = balanced.init(self.params)
        for _ in range(2):
            ((_, aux), _), state = balanced.value_and_grad(self.params, state, self.x)
            assert aux["name"] == "tanh"
            assert aux["number"] == 3
            np.testing.assert_allclose(aux["h"], jnp.tanh(self.x @ self.params["w"]), rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=6)
@given(
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    batch=st.integers(1, 20),
    present=st.lists(st.booleans(), min_size=1, max_size=5),
    rule=st.sampled_from(list(RULES)),
    scale=st.sampled_from([1e-15, 1.0, 1e15]),
)
def test_random_shapes(sizes, batch, present, rule, scale):
    rows, width, columns = sizes
    num_tasks = len(present)
    params = {"w": normal(rows, width), "v": normal(width, columns)}
    params |= {"heads": [normal(columns) for _ in range(num_tasks)]}

    def fn(params, x):
        h = jnp.tanh(jnp.sin(x @ params["w"]) @ params["v"])
        return tuple(scale * loss for loss in mean_squares([h @ head for head in params["heads"]]))

    check(fn, rule, params, normal(batch, rows), num_tasks=num_tasks, mask=jnp.array(present))


# The accuracy of factors.


def fixed(num_tasks, cancellation, seed=0, n=16, rows=64, columns=96):
    """A linear layer whose gradients are x^T delta_i, and x, delta in float32.

    The rows' gradients cancel in pairs to one part in ``cancellation``.
    """
    rng = np.random.default_rng(seed)
    half, delta = rng.normal(size=(n // 2, rows)), rng.normal(size=(num_tasks, n // 2, columns))
    left = rng.normal(size=(num_tasks, n // 2, columns)) / cancellation
    x = np.concatenate([half, half]).astype(np.float32)
    delta = np.concatenate([delta, left - delta], axis=1).astype(np.float32)
    return x, delta


def linear_losses(params, x, delta):
    return tuple(jnp.sum((x @ params["w"]) * each) for each in delta)


@jax.jit
def measured(x, delta):
    """Norms from both rules, and cosines, of the linear layer."""
    params = {"w": jnp.zeros((x.shape[1], delta.shape[2]), x.dtype)}
    by_norms, by_cosines = (
        exact_step(linear_losses, rule(len(delta)), params, x, delta, shared={"w": True})
        for rule in RULES.values()
    )
    return by_norms[2].task_norms, by_cosines[2].task_norms, by_cosines[2].task_cosines


@jax.jit
def direct(x, delta):
    gradients = jnp.einsum("nr,knc->krc", x, delta, precision="highest")
    return jnp.sqrt(jnp.sum(jnp.square(gradients), axis=(1, 2)))


def in_float64(x, delta):
    gradients = np.einsum("nr,knc->krc", *(np.asarray(a, np.float64) for a in (x, delta)))
    flat = gradients.reshape(len(delta), -1)
    norms = np.linalg.norm(flat, axis=1)
    unit = flat / np.where(norms > 0, norms, 1)[:, None]
    return norms, unit @ unit.T


def test_the_linear_layer_is_kept_as_factors():
    x, delta = fixed(3, 10.0)
    assert factored_leaves(linear_losses, {"w": jnp.zeros((64, 96))}, x, delta) == ["w"]


@pytest.mark.parametrize("seed", range(3))
def test_gradients_that_cancel_to_one_part_in_ten_thousand(seed):
    x, delta = fixed(3, 1e4, seed)
    norms, cosines = in_float64(x, delta)
    *found, found_cosines = measured(x, delta)
    for each in found:
        np.testing.assert_allclose(each, norms, rtol=3e-4)
    np.testing.assert_allclose(found_cosines, cosines, atol=3e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cancellation", [1.0, 10.0, 30.0, 100.0, 140.0, 160.0, 300.0, 1000.0])
def test_gradients_that_cancel_less(cancellation, seed):
    """No less right than 1e-4, or three times what the product itself is off by."""
    x, delta = fixed(3, cancellation, seed)
    norms, cosines = in_float64(x, delta)
    bound = np.maximum(1e-4, 3 * np.abs(direct(x, delta) / norms - 1))
    *found, found_cosines = measured(x, delta)
    for each in found:
        np.testing.assert_array_less(np.abs(each / norms - 1), bound)
    assert np.abs(found_cosines - cosines).max() < bound.max()


@pytest.mark.parametrize("of_x", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e12, 1e25])
def test_norms_at_any_scale(scale, of_x):
    """The scale of the gradients, whichever factor has it; tasks 1000 apart."""
    x, delta = fixed(3, 2.0)
    apart = np.array([1.0, 1e-3, 1.0])[:, None, None]
    x, delta = np.float32(x * of_x), np.float32(delta * apart * (scale / of_x))
    norms, cosines = in_float64(x, delta)
    *found, found_cosines = measured(x, delta)
    for each in found:
        np.testing.assert_allclose(each, norms, rtol=1e-5)
    np.testing.assert_allclose(found_cosines, cosines, atol=1e-5)


def test_a_gradient_of_zero():
    x, delta = fixed(3, 2.0)
    delta[1] = 0
    norms, cosines = in_float64(x, delta)
    *found, found_cosines = measured(x, delta)
    for each in found:
        np.testing.assert_allclose(each, norms, rtol=1e-5)
    np.testing.assert_allclose(found_cosines, cosines + np.diag([0, 1, 0]), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_low_precision_are_multiplied_in_float32(dtype):
    x, delta = (jnp.asarray(each, dtype) for each in fixed(3, 2.0))
    norms, cosines = in_float64(x, delta)
    *found, found_cosines = measured(x, delta)
    for each in found:
        np.testing.assert_allclose(each, norms, rtol=1e-5)
    np.testing.assert_allclose(found_cosines, cosines, atol=1e-5)


# Operations.


def products(jaxpr, size=1):
    """``(operations of all matrix products, how many make at least ``size`` elements)``.

    A loop of unknown length is one that runs where a norm is measured again: not counted.
    """
    operations = large = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "while":
            continue
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            made = math.prod(eqn.outvars[0].aval.shape)
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            operations += 2 * made * depth
            large += made // size
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, ClosedJaxpr | Jaxpr):
                    inside = products(getattr(part, "jaxpr", part), size)
                    times = eqn.params.get("length", 1)
                    operations, large = operations + times * inside[0], large + times * inside[1]
    return operations, large


def plain_gradient(fn):
    return jax.grad(lambda params, *args: sum(fn(params, *args)))


def balanced_gradient(fn, rule, **options):
    return lambda params, *args: exact_step(fn, rule, params, *args, **options)[:2]


def count(gradient, size, params, *args):
    return products(jax.make_jaxpr(gradient)(params, *args).jaxpr, size)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_tasks", [3, 9])
def test_one_product_of_parameter_size_a_leaf(rule, num_tasks):
    fn, params, args, *_ = mlp(num_tasks, width=64)
    size = params["w2"].size
    _, plain = count(plain_gradient(fn), size, params, *args)
    _, large = count(balanced_gradient(fn, RULES[rule](num_tasks)), size, params, *args)
    _, stacked = count(task_value_and_grad(fn), size, params, *args)
    assert (plain, large, stacked) == (1, 1, num_tasks)


@pytest.mark.parametrize("share", [(), ("0123456789",)], ids=["towers", "loaders"])
@pytest.mark.parametrize("rule", RULES)
def test_losses_of_examples_of_their_own_cost_the_operations_of_one(share, rule):
    fn, params, args, num_tasks, _ = towers(10, share, width=64)
    plain, _ = count(plain_gradient(fn), 1, params, *args)
    operations, _ = count(balanced_gradient(fn, RULES[rule](num_tasks)), 1, params, *args)
    assert operations <= 1.3 * plain


def test_measured_on_the_last_of_many_layers():
    """First parts for that layer alone, and one backward pass for all."""
    num_tasks, depth = 8, 7
    params = {f"w{i}": normal(32, 32) for i in range(depth)}
    params |= {"heads": [normal(32) for _ in range(num_tasks)]}

    def fn(params, x):
        for i in range(depth):
            x = jnp.tanh(x @ params[f"w{i}"])
        return mean_squares([x @ head for head in params["heads"]])

    x = normal(6, 32)
    last = balanced_gradient(fn, RULES["norms"](num_tasks), measure_on=only("w6"))
    plain, _ = count(plain_gradient(fn), 1, params, x)
    operations, _ = count(last, 1, params, x)
    assert operations <= 1.3 * plain
