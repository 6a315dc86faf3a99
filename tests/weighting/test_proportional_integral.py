"""The proportional-integral rule: its formula, where it rests, its bound, its floor."""

import functools

import chex
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.controller import without_anti_windup
from gaba_jax import controller, weighting
from gaba_jax.weighting import TaskStats

ratio_of_500 = st.integers(2, 10).flatmap(
    lambda k: hypothesis.extra.numpy.arrays(np.float32, k, elements=st.floats(1, 500, width=32))
)


from_equal = functools.partial(weighting.proportional_integral, debias=False)


def imbalance(contributions):
    return np.abs(controller.error(contributions)).max(axis=-1) * contributions.shape[-1]


@functools.cache
def compiled_loop(num_tasks):
    """[T, K] weights under constant norms, with gains and a floor that may vary."""

    @functools.partial(jax.jit, static_argnums=4)
    def run(norms, kp, ki, min_weight, steps):
        rule = from_equal(num_tasks, kp=kp, ki=ki, min_weight=min_weight)
        return controller.simulate(norms, rule, steps=steps).weights

    return lambda norms, kp=0.5, ki=0.3, min_weight=1e-4, steps=1000: np.asarray(
        run(*(jnp.asarray(x, jnp.float32) for x in (norms, kp, ki, min_weight)), steps)
    )


@pytest.mark.parametrize("ratios", [None, [2.0, 1.0, 1.0]])
def test_the_formula(ratios):
    """Two updates by hand, in NumPy."""
    kp, ki, norms = 0.7, 0.2, np.array([[5.0, 1.0, 0.2], [1.0, 2.0, 3.0]])
    loop = controller.simulate(norms, from_equal(3, kp=kp, ki=ki, ratios=ratios))
    set_points = np.full(3, 1 / 3) if ratios is None else np.array([0.5, 0.25, 0.25])
    weights, integral = np.full(3, 1 / 3), np.zeros(3)
    for t, g in enumerate(norms):
        error = set_points - weights * g / np.sum(weights * g)
        integral = integral + ki * error
        weights = np.exp(integral + kp * error)
        weights = weights / weights.sum()
        np.testing.assert_allclose(loop.weights[t], weights, rtol=1e-5)


def test_no_error_is_left_where_the_closed_form_leaves_one():
    norms = np.array([1, 1, 1e-3])
    closed = controller.simulate(norms, weighting.gaba(3, min_weight=0.0), steps=2000)
    np.testing.assert_allclose(closed.contributions[-1], [0.25, 0.25, 0.0005], rtol=2e-3)
    controlled = controller.simulate(norms, from_equal(3), steps=2000)
    np.testing.assert_allclose(controlled.contributions[-1], 0.000998, rtol=1e-3)


def test_ratios_of_the_contributions():
    """From the first measurement, and where it comes to rest from equal weights; absent too."""
    norms, ratios = np.array([50.0, 1.0, 0.2]), np.array([1.0, 0.5, 0.1])
    for rule, at in (
        (weighting.proportional_integral(3, ratios=ratios), 0),
        (from_equal(3, ratios=ratios), -1),
    ):
        loop = controller.simulate(norms, rule, steps=1000)
        found = loop.contributions[at] / loop.contributions[at][0]
        np.testing.assert_allclose(found, ratios, rtol=1e-3)
    rule = from_equal(3, ratios=ratios)
    state = rule.init()
    for _ in range(500):
        weights, state = rule.update(stats_of([50, 0, 0.2], [True, False, True]), state)
    np.testing.assert_allclose(weights[2] * 0.2 / (weights[0] * 50), 0.1, rtol=1e-3)
    np.testing.assert_allclose(weights[1], 1 / 3, rtol=1e-6)
    with pytest.raises(ValueError, match="ratios must be positive"):
        weighting.proportional_integral(2, ratios=[1.0, 0.0])


def test_without_the_integral_an_error_is_left():
    weights = compiled_loop(3)([1, 1, 1e-3], kp=1.0, ki=0.0)
    error = controller.error(weights[-1] * np.array([1, 1, 1e-3]))
    assert np.abs(error).max() > 0.3
    log_weights = np.log(weights[-1])
    np.testing.assert_allclose(log_weights - log_weights[0], error - error[0], atol=1e-5)


@pytest.mark.slow
@settings(max_examples=40)
@given(norms=ratio_of_500)
def test_at_rest_it_is_the_exact_rule(norms):
    weights = compiled_loop(len(norms))(norms)
    np.testing.assert_allclose(weights[-1], (1 / norms) / np.sum(1 / norms), rtol=1e-3)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


def test_how_long_it_takes():
    """As the docstring says: the start by log(R), then the time constant (K + kp)/ki."""
    weights = compiled_loop(2)([500.0, 1.0])
    imbalanced = imbalance(weights * np.array([500, 1])) > 0.1
    assert np.log(500) / 0.3 < imbalanced.sum() < np.log(500) / 0.3 + 3 * 2.5 / 0.3
    weights = compiled_loop(3)([1.0, 1.0, 1e-3])
    imbalanced = imbalance(weights * np.array([1, 1, 1e-3])) > 0.1
    assert 2 * np.log(1000) / 0.3 < imbalanced.sum() < 2 * np.log(1000) / 0.3 + 3 * 3.5 / 0.3
    weights = compiled_loop(4)([1.0, 1.0, 1.0, 1.05])
    left = np.abs(np.log(weights[:, 3] / weights[:, 0]) + np.log(1.05))
    np.testing.assert_allclose(1 / np.log(left[40] / left[41]), 4.5 / 0.3, rtol=0.05)


@pytest.mark.parametrize("kp", [0.0, 0.5, 1.5, 1.9])
@pytest.mark.parametrize(
    "norms", [[500, 1], [1, 1, 2e-3], [500, *[1] * 9], np.geomspace(500, 1, 10)]
)
def test_stable_up_to_its_bound(norms, kp):
    norms = np.array(norms)
    weights = compiled_loop(len(norms))(norms, kp=kp, ki=3.9 - 2 * kp, steps=3000)
    assert imbalance(weights[-1] * norms) < 1e-3


@pytest.mark.parametrize("kp", [0.0, 0.5, 1.5, 1.9])
def test_past_the_bound_two_tasks_oscillate(kp):
    """The rule refuses such gains; traced ones it cannot see."""
    weights = compiled_loop(2)([500.0, 1.0], kp=kp, ki=4.2 - 2 * kp)
    assert np.ptp(weights[-10:, 0] * 500 / weights[-10:, 1]) > 0.1


@pytest.mark.slow
@settings(max_examples=40)
@given(norms=ratio_of_500, part=st.floats(0.01, 1), kp=st.floats(0, 1.5))
def test_the_floor_holds_exactly_and_the_others_are_equal(norms, part, kp):
    least = np.float32(part / len(norms))
    # Where a task at the floor has nearly the whole share, the others come to rest slowly.
    weights = compiled_loop(len(norms))(norms, kp=kp, min_weight=least, steps=20_000)
    assert np.all(weights >= least)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    contributions = weights[-1] * norms
    free = weights[-1] > least * (1 + 1e-3)
    if free.any():
        mean = contributions[free].mean()
        np.testing.assert_allclose(contributions[free], mean, rtol=2e-3)
        assert np.all(contributions[~free] >= mean * (1 - 2e-3))


def recovery(rule, held):
    """Updates until two tasks are balanced, after the first was held at the floor for a while."""
    norms = np.concatenate([np.tile([500.0, 1.0], (held, 1)), np.tile([1.0, 3.0], (600, 1))])
    loop = controller.simulate(norms, rule)
    assert loop.weights[held - 1, 0] == np.float32(0.05)
    return int(np.sum(imbalance(loop.contributions[held:]) > 0.1))


@pytest.mark.slow
def test_anti_windup():
    """It recovers as fast however long the floor was active; left to run on, it does not."""
    rule = weighting.proportional_integral(2, kp=0.5, ki=0.1, min_weight=0.05)
    assert recovery(rule, 200) == recovery(rule, 2000) < 80
    wound_up = without_anti_windup(rule, ki=0.1)
    times = [recovery(wound_up, held) for held in (200, 400)]
    assert times[0] > 2 * recovery(rule, 200)
    assert times[1] > 1.5 * times[0]


def test_it_leaves_the_floor_in_the_update_in_which_the_error_turns():
    rule = weighting.proportional_integral(2, min_weight=0.05)
    norms = np.concatenate([np.tile([500.0, 1.0], (100, 1)), np.tile([0.1, 1.0], (1, 1))])
    loop = controller.simulate(norms, rule)
    assert loop.weights[99, 0] == np.float32(0.05) < loop.weights[100, 0]


def stats_of(norms, present=None):
    norms = jnp.asarray(norms, jnp.float32)
    present = jnp.ones(norms.shape, bool) if present is None else jnp.asarray(present)
    return TaskStats(norms, None, None, present, jnp.int32(1))


def test_an_absent_task_keeps_weight_and_integral():
    rule = from_equal(3)
    _, state = rule.update(stats_of([9, 3, 1]), rule.init())
    present = [True, False, True]
    weights, after = rule.update(stats_of([9, 0, 1], present), state)
    assert weights[1] == state.controlled_weights[1]
    assert after.integral[1] == state.integral[1]
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-6)
    assert weights[0] < state.controlled_weights[0]
    for _ in range(300):  # the other two are balanced without it
        weights, after = rule.update(stats_of([9, 0, 1], present), after)
    np.testing.assert_allclose(weights[2] / weights[0], 9, rtol=1e-4)
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-6)


def test_it_starts_balanced():
    """At the first measurement in which every present task has a gradient, and only there."""
    norms = np.array([[0, 3, 1], [100, 3, 1], [100, 3, 3]], np.float32)
    loop = controller.simulate(norms, weighting.proportional_integral(3))
    np.testing.assert_allclose(imbalance(loop.contributions[1]), 0, atol=1e-5)
    error = 1 / 3 - np.array([1, 1, 3]) / 5  # the last norm has risen: 0.5 + 0.3 of the error
    after = loop.weights[1] * np.exp(0.8 * error)
    np.testing.assert_allclose(loop.weights[2], after / after.sum(), rtol=1e-5)
    without = controller.simulate(norms, from_equal(3))
    np.testing.assert_allclose(loop.weights[0], without.weights[0], rtol=1e-6)
    assert imbalance(without.contributions[1]) > 1


def test_it_starts_without_those_who_are_absent():
    rule = weighting.proportional_integral(3)
    weights, state = rule.update(stats_of([9, 0, 1], [True, False, True]), rule.init())
    np.testing.assert_allclose(weights, [1 / 15, 1 / 3, 9 / 15], rtol=1e-5)
    assert state.started
    after, _ = rule.update(stats_of([9, 9, 1]), state)  # the task that comes later is controlled
    assert after[1] < weights[1]
    held, _ = rule.update(stats_of([9, 9, 1]), state._replace(started=jnp.array(False)))
    np.testing.assert_allclose(held, np.array([1, 1, 9]) / 11, rtol=1e-5)


def test_without_any_gradient_there_is_no_error():
    """What the last error had added is taken back once; then the weights stay."""
    rule = from_equal(3)
    _, state = rule.update(stats_of([9, 3, 1]), rule.init())
    for _ in range(2):
        weights, state = rule.update(stats_of([0, 0, 0]), state)
        shares = np.array([9, 3, 1]) / 13  # of the only error there was, with equal weights
        expected = jax.nn.softmax(0.3 * (1 / 3 - shares))
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.mark.parametrize("min_weight", [0.0, 1e-4, 0.25])
def test_hard_norms(min_weight):
    hard = [[0, 1, 1e15, 1e-15], [1e30, 0, 0, 0], [1e-30] * 4, [0] * 4, [1e30, 1e-30, 1, 0]]
    norms = np.array(hard * 200, np.float32)
    rule = weighting.proportional_integral(4, kp=1.0, ki=1.9, min_weight=min_weight)

    def step(state, norms):
        weights, state = rule.update(stats_of(norms), state)
        return state, (weights, state)

    weights, states = jax.lax.scan(step, rule.init(), jnp.asarray(norms))[1]
    chex.assert_tree_all_finite((weights, states))
    assert np.all(weights >= np.float32(min_weight))
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)


def test_a_weight_that_fell_to_nothing_comes_back():
    """With no floor a task idle for 2000 updates has 1e-12, and is balanced again in time."""
    rule = from_equal(2, min_weight=0.0)
    norms = np.concatenate([np.tile([1.0, 0.0], (2000, 1)), np.tile([1.0, 1.0], (400, 1))])
    loop = controller.simulate(norms, rule)
    assert loop.weights[1999, 0] < 1e-11
    np.testing.assert_allclose(loop.weights[-1], 0.5, rtol=1e-3)


def test_permuted_tasks_and_scaled_norms():
    norms = np.exp(np.random.default_rng(0).normal(size=(50, 4)) * 2).astype(np.float32)
    order = np.array([2, 0, 3, 1])
    rule = weighting.proportional_integral(4, min_weight=0.1)
    weights = controller.simulate(norms, rule).weights
    permuted = controller.simulate(norms[:, order], rule).weights
    np.testing.assert_allclose(permuted, weights[:, order], rtol=1e-4)
    np.testing.assert_allclose(controller.simulate(norms / 16, rule).weights, weights, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kp": -0.1}, "kp=-0.1 must be finite and at least 0"),
        ({"ki": np.inf}, "ki=inf must be finite"),
        ({"kp": 1.0, "ki": 2.0}, r"kp=1.0 and ki=2.0: ki \+ 2 kp must be below 4"),
        ({"min_weight": -0.1}, "min_weight=-0.1 must be finite and at least 0"),
        ({"min_weight": 0.6}, r"must be in \[0, 1/num_tasks\].*the most is 0.5"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        weighting.proportional_integral(2, **options)


def test_one_task_is_too_few():
    with pytest.raises(ValueError, match="num_tasks=1 must be at least 2"):
        weighting.proportional_integral(1)
