"""Statistics as values: what a rule may read of each gradient beside norms and cosines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import balance, balanced_value_and_grad, exclude, only, weighting
from gaba_jax.weighting import Statistic, Weighting
from tests.slow import rest_slow

K = 3
READY = {each.name: each for each in (weighting.max_abs, weighting.mean_abs, weighting.std)}
PARAMS = {
    "trunk": jnp.array(np.random.default_rng(0).normal(size=(5, 16)), jnp.float32),
    "bias": jnp.zeros(16),
    "head": jnp.ones((K, 16)) / 7,
    "empty": jnp.zeros((0, 2)),
}
X = jnp.array(np.random.default_rng(1).normal(size=(8, 5)), jnp.float32)


def losses_fn(params, x):
    h = jnp.tanh(x @ params["trunk"] + params["bias"])
    return tuple(10.0 ** (2 * i) * jnp.mean((h @ params["head"][i] - i) ** 2) for i in range(K))


def reader(*statistics, needs=()):
    """A rule that keeps in its state what it is given."""

    def update(stats, state):
        del state
        return jnp.full(K, 1 / K, jnp.float32), dict(stats.extra)

    def init():
        return {each.name: jnp.zeros(K, jnp.float32) for each in statistics}

    return Weighting(
        K, frozenset({*statistics, *needs}), init, update, np.full(K, 1 / K, np.float32)
    )


def in_float64(names, x=X):
    """By hand, over all elements of the named leaves together."""
    grads = [jax.grad(lambda p, i=i: losses_fn(p, x)[i])(PARAMS) for i in range(K)]
    elements = [np.concatenate([np.ravel(g[n]) for n in names]).astype(np.float64) for g in grads]
    return {
        "max_abs": [np.abs(e).max() for e in elements],
        "mean_abs": [np.abs(e).mean() for e in elements],
        "std": [e.std() for e in elements],
    }


SHARED = ["bias", "trunk", "head", "empty"]
WAYS = {
    "stacked": None,
    "exact": {},
    "lagged": {"measure": "lagged"},
    "microbatches": {"microbatch_size": 4},
    "every": {"every": 3},
    "drop": {"nonfinite": "drop"},
}


def measured(way, rule, mask=None, **selection):
    """The state after one update."""
    if way == "stacked":
        tx = balance(rule, **selection)
        grads = jax.jacrev(lambda p: jnp.stack(losses_fn(p, X)))(PARAMS)
        update = jax.jit(tx.update)
        return update(grads, tx.init(PARAMS), PARAMS, task_mask=mask)[1]
    balanced = balanced_value_and_grad(losses_fn, rule, **WAYS[way], **selection)
    step = jax.jit(balanced.value_and_grad)
    return step(PARAMS, balanced.init(PARAMS), X, task_mask=mask)[1]


@pytest.mark.parametrize("way", rest_slow(WAYS, fast=["stacked", "exact"]))
@pytest.mark.parametrize("needs", rest_slow([(), ("cosines",)], fast=[()]), ids=["alone", "both"])
def test_ready_ones_over_all_measured_elements(way, needs):
    rule = reader(*READY.values(), needs=needs)
    for selection, names in [
        ({}, SHARED),
        ({"measure_on": only("trunk", "bias")}, ["trunk", "bias"]),
    ]:
        state = measured(way, rule, **selection)
        for name, expected in in_float64(names).items():
            np.testing.assert_allclose(state.weighting_state[name], expected, rtol=2e-5)


@pytest.mark.parametrize("way", rest_slow(WAYS, fast=["exact"]))
def test_an_absent_task_has_none(way):
    mask = jnp.array([True, False, True])
    state = measured(way, reader(*READY.values()), mask)
    for name, expected in in_float64(SHARED).items():
        found = state.weighting_state[name]
        np.testing.assert_allclose(found, np.where(mask, expected, 0), rtol=2e-5)


@pytest.mark.slow
def test_heads_that_other_tasks_do_not_have_are_left_out():
    """Automatic sharing decides in the traced program; a leaf that is left out counts nothing."""

    def apart(params, x):
        h = jnp.tanh(x @ params["trunk"])
        return tuple(jnp.mean((h @ params[f"head{i}"] - i) ** 2) for i in range(K))

    params = {"trunk": PARAMS["trunk"]} | {f"head{i}": jnp.ones(16) for i in range(K)}
    expected = [
        np.abs(jax.grad(lambda p, i=i: apart(p, X)[i])(params)["trunk"]).mean() for i in range(K)
    ]
    for selection in ({}, {"shared": exclude("head*")}):
        balanced = balanced_value_and_grad(apart, reader(weighting.mean_abs), **selection)
        _, state = balanced.value_and_grad(params, balanced.init(params), X)
        np.testing.assert_allclose(state.weighting_state["mean_abs"], expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e30])
@pytest.mark.parametrize("dtype", rest_slow([jnp.float32, jnp.bfloat16], fast=[jnp.float32]))
def test_ready_ones_at_any_scale_and_in_low_precision(scale, dtype):
    rng = np.random.default_rng(2)
    leaves = [
        jnp.array(rng.normal(size=(K, *shape)) * scale + scale / 2, dtype)
        for shape in [(40, 30), (7,)]
    ]
    tx = balance(reader(*READY.values()))
    params = [leaf[0] for leaf in leaves]
    state = tx.update(leaves, tx.init(params), params)[1].weighting_state
    wide = [np.asarray(leaf, np.float64).reshape(K, -1) for leaf in leaves]
    elements = np.concatenate(wide, axis=1)
    expected = {
        "max_abs": np.abs(elements).max(axis=1),
        "mean_abs": np.abs(elements).mean(axis=1),
        "std": elements.std(axis=1),
    }
    for name, numbers in expected.items():
        np.testing.assert_allclose(state[name], numbers, rtol=1e-5)


def test_values_leaf_by_leaf():
    """Without ``combine`` the rule has the leaves themselves, those not measured as zeros."""
    of_leaf = Statistic("sum", jnp.sum, None)

    def update(stats, state):
        return jnp.full(K, 1 / K, jnp.float32), stats.extra["sum"]

    rule = Weighting(K, frozenset({of_leaf}), lambda: jnp.zeros((4, K)), update, np.ones(K) / K)
    state = measured("exact", rule, measure_on=exclude("head"))
    grads = [jax.grad(lambda p, i=i: losses_fn(p, X)[i])(PARAMS) for i in range(K)]
    expected = [[g[name].sum() * (name != "head") for g in grads] for name in sorted(PARAMS)]
    np.testing.assert_allclose(state.weighting_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["stacked", "exact"])
def test_one_that_is_not_finite_rejects_the_measurement(way):
    inf = Statistic("inverse", lambda g: jnp.sum(g * 0), lambda sums: 1 / jnp.sum(sums))
    state = measured(way, reader(inf))
    assert state.nonfinite_count == 1
    assert state.since_measured == 0
    np.testing.assert_array_equal(state.weighting_state["inverse"], np.zeros(K))


def test_a_rule_on_the_largest_element():
    """Learning-rate annealing in eight lines: the largest element of the first over the means."""

    def update(stats, state):
        largest, means = stats.extra["max_abs"][0], stats.extra["mean_abs"]
        weights = largest / jnp.where(means > 0, means, 1)
        return jnp.where(jnp.arange(K) == 0, 1, weights), state

    needs = frozenset({weighting.max_abs, weighting.mean_abs})
    rule = Weighting(K, needs, optax.EmptyState, update, np.ones(K), absent="each")
    state = measured("exact", rule)
    expected = in_float64(SHARED)
    weights = expected["max_abs"][0] / np.array(expected["mean_abs"][1:])
    np.testing.assert_allclose(state.task_weights, [1, *weights], rtol=1e-5)


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (Statistic("vector", jnp.abs, jnp.sum), r"of_leaf of the statistic 'vector' must return"),
        (Statistic("leaves", jnp.sum, lambda x: x), r"combine of the statistic 'leaves' must"),
        (Statistic("complex", lambda g: jnp.sum(g) * 1j, jnp.sum), r"real scalars, got complex64"),
    ],
)
@pytest.mark.parametrize("way", ["stacked", "exact"])
def test_what_is_no_scalar_raises(way, statistic, message):
    with pytest.raises(ValueError, match=message):
        measured(way, reader(statistic))


def test_two_of_one_name():
    twice = [Statistic("same", jnp.sum, jnp.sum), Statistic("same", jnp.max, jnp.max)]
    with pytest.raises(ValueError, match="have one name"):
        balance(reader(*twice))


def test_reading_what_was_not_declared_names_the_weighting():
    def forgetful(num_tasks, needs, read):
        def update(stats, state):
            return jnp.ones(num_tasks) * read(stats), state

        equal = np.full(num_tasks, 1 / num_tasks)
        return Weighting(num_tasks, frozenset(needs), optax.EmptyState, update, equal)

    reads = {
        "norms": lambda stats: stats.norms * 2,
        "cosines": lambda stats: stats.cosines[0],
        "losses": lambda stats: stats.losses + 1,
        "max_abs": lambda stats: stats.extra["max_abs"],
    }
    for name, read in reads.items():
        rule = forgetful(K, {"norms"} if name != "norms" else {weighting.std}, read)
        needs = "norms" if name != "norms" else "std"
        with pytest.raises(ValueError, match=rf"weighting forgetful raised .* It needs {needs};"):
            measured("exact", rule)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda stats, state: stats.norms, r"lambda> must return a pair \(task_weights, state\)"),
        (lambda stats, state: (stats.norms, {"a": 1}), r"lambda> must return a state like that"),
        (lambda stats, state: (stats.norms[:2], state), r"lambda> must return weights of shape"),
        (lambda stats, state: (stats.losses, state), r"returned None .* needs norms;.*losses are"),
    ],
)
def test_a_rule_that_returns_something_else(update, message):
    rule = Weighting(K, frozenset({"norms"}), optax.EmptyState, update, np.ones(K))
    with pytest.raises(ValueError, match=message):
        measured("stacked", rule)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda count: count * 0.9,
            r"leaf 'count' is int32 of shape \(\) .* float32 of shape \(\)",
        ),
        (lambda count: count + jnp.zeros(2, jnp.int32), r"returned int32 of shape \(2,\)"),
    ],
)
def test_a_rule_whose_state_changes_its_type(change, message):
    rule = Weighting(
        K,
        frozenset({"norms"}),
        lambda: {"count": jnp.zeros([], jnp.int32)},
        lambda stats, state: (stats.norms, {"count": change(state["count"])}),
        np.ones(K),
    )
    with pytest.raises(ValueError, match=message):
        measured("stacked", rule)


def test_a_python_if_in_a_rule_is_what_jax_says_it_is():
    def update(stats, state):
        return (stats.norms if stats.norms[0] > 1 else 2 * stats.norms), state

    rule = Weighting(K, frozenset({"norms"}), optax.EmptyState, update, np.ones(K))
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jax.jit(lambda: measured("stacked", rule))()


@pytest.mark.parametrize("way", ["stacked", "exact", "lagged"])
def test_a_weight_that_is_no_number_rejects_the_measurement(way):
    """Nothing is poisoned, and it is counted."""

    def update(stats, state):
        return jnp.where(stats.norms > 0, jnp.nan, 1), state + 1

    init = functools.partial(jnp.zeros, [], jnp.int32)
    rule = Weighting(K, frozenset({"norms"}), init, update, np.full(K, 1 / K, np.float32))
    state = measured(way, rule)
    assert state.nonfinite_count == 1
    assert state.weighting_state == 0
    assert state.since_measured == 0
    np.testing.assert_allclose(state.task_weights, np.full(K, 1 / K), rtol=1e-6)
    np.testing.assert_array_equal(state.task_norms, np.zeros(K))
