"""Any rule on unit gradients: contributions, zero norms, absent tasks, scales."""

import jax.numpy as jnp
import numpy as np
import pytest

from gaba_jax import balance, weighting
from gaba_jax.weighting import Weighting


def recorder(weights, needs=("norms",)):
    """A rule with fixed weights, and the stats that it was shown."""
    shown = []

    def update(stats, state):
        shown.append(stats)
        return jnp.asarray(weights, jnp.float32), state

    return Weighting(
        len(weights), frozenset(needs), lambda: jnp.zeros(2), update, np.float32(weights)
    ), shown


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e30])
@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_around_uniform_it_is_the_inverse_norm(weigh, num_tasks, scale):
    norms = scale * np.random.default_rng(0).uniform(0.01, 5, size=num_tasks)
    actual = weigh(weighting.normalized(weighting.uniform(num_tasks)), norms)
    expected = weigh(weighting.inverse_norm(num_tasks), norms)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_contributions_are_the_weights_times_the_harmonic_mean(weigh):
    norms, weights = np.array([8.0, 2.0, 0.5]), [0.5, -0.2, 0.7]
    (actual,) = weigh(weighting.normalized(weighting.constant(3, weights)), norms)
    harmonic = 3 / np.sum(1 / norms)
    np.testing.assert_allclose(actual * norms, harmonic * np.array(weights), rtol=1e-6)


def test_the_update_is_that_of_the_unit_gradients():
    grads = jnp.array([[30.0, 40.0], [0.0, 0.5]])
    tx = balance(weighting.normalized(weighting.constant(2, [0.3, 0.7])))
    updates, _ = tx.update(grads, tx.init(jnp.zeros(2)))
    unit = np.array([[0.6, 0.8], [0.0, 1.0]])
    harmonic = 2 / (1 / 50 + 1 / 0.5)
    np.testing.assert_allclose(updates, harmonic * np.array([0.3, 0.7]) @ unit, rtol=1e-6)


def test_the_rule_sees_unit_norms_and_everything_else_as_it_was():
    rule, shown = recorder([0.5, 0.25, 0.25], needs=("cosines", "losses"))
    outer = weighting.normalized(rule)
    assert outer.needs == {"norms", "cosines", "losses"}
    np.testing.assert_array_equal(outer.initial_weights, rule.initial_weights)
    stats = weighting.TaskStats(
        jnp.array([7.0, 0.0, 0.0]),
        jnp.eye(3),
        jnp.arange(3.0),
        jnp.array([True, True, False]),
        jnp.int32(4),
    )
    weights, state = outer.update(stats, outer.init())
    np.testing.assert_array_equal(shown[0].norms, [1, 0, 0])
    assert shown[0][1:] == stats[1:]
    np.testing.assert_array_equal(weights, [0.5, 0.25, 0.25])  # one norm is its own mean
    np.testing.assert_array_equal(state, outer.init())


def test_tasks_of_norm_zero_and_absent_ones_keep_their_weight(weigh):
    rule = weighting.normalized(weighting.constant(4, [0.1, 0.2, 0.3, 0.4]))
    present = jnp.array([True, True, True, False])
    (weights,) = weigh(rule, [4.0, 0.0, 1.0, 0.0], present=present)
    harmonic = 2 / (1 / 4 + 1 / 1)
    np.testing.assert_allclose(weights, [0.1 * harmonic / 4, 0.2, 0.3 * harmonic, 0.4], rtol=1e-6)
    (weights,) = weigh(rule, [0.0] * 4)
    np.testing.assert_allclose(weights, [0.1, 0.2, 0.3, 0.4], rtol=1e-6)


@pytest.mark.parametrize("present", [[True] * 3, [True, False, True]])
def test_absent_tasks_as_in_the_inverse_norm(weigh, present):
    norms = np.where(present, [3.0, 0.2, 0.7], 0)
    actual = weigh(weighting.normalized(weighting.uniform(3)), norms, present=jnp.array(present))
    expected = weigh(weighting.inverse_norm(3), norms, present=jnp.array(present))
    actual = np.where(present, actual, 0)  # what is applied is rescaled to those present
    np.testing.assert_allclose(actual / actual.sum(), expected, rtol=1e-6)


def test_norms_sixty_orders_apart(weigh):
    norms = [1e-30, 1e30, 1e-28]
    (weights,) = weigh(weighting.normalized(weighting.constant(3, [1.0, 1.0, 1.0])), norms)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights, [3 / 1.01, 0, 0.03 / 1.01], rtol=1e-5)


def test_inside_other_combinators(weigh):
    rule = weighting.rescaled(weighting.normalized(weighting.constant(2, [3.0, 1.0])), 1.0)
    (weights,) = weigh(rule, [2.0, 10.0])
    np.testing.assert_allclose(weights, [15 / 16, 1 / 16], rtol=1e-6)
    stable = weighting.stabilize(
        weighting.normalized(weighting.uniform(2)), beta=0.0, warmup_steps=0, min_weight=0.0
    )
    np.testing.assert_allclose(weigh(stable, [1.0, 3.0])[0], [0.75, 0.25], rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="Call the rule first"):
        weighting.normalized(weighting.uniform)
