"""SoftAdapt against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaba_jax import weighting
from gaba_jax.weighting import TaskStats
from tests.losses import weights_over

VARIANTS = ["plain", "loss_weighted", "normalized"]


def reference(losses, beta, variant):
    """In float64; the first row is equal weights."""
    rates = np.diff(np.asarray(losses, np.float64), axis=0)
    if variant == "normalized":
        rates = rates / np.abs(rates).sum(axis=1, keepdims=True)
    raw = np.exp(beta * rates)
    if variant == "loss_weighted":
        raw = raw * losses[1:]
    equal = np.full((1, losses.shape[1]), 1 / losses.shape[1])
    return np.concatenate([equal, raw / raw.sum(axis=1, keepdims=True)])


@pytest.mark.parametrize("beta", [0.1, 2.0, -1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_numpy(variant, beta):
    losses = np.random.default_rng(0).uniform(0.5, 5, size=(12, 3))
    weights = weights_over(weighting.soft_adapt(3, beta=beta, variant=variant), losses)
    np.testing.assert_allclose(weights, reference(losses, beta, variant), rtol=2e-5)


def test_the_slowest_loss_has_the_largest_weight():
    losses = [[4.0, 4.0, 4.0], [2.0, 3.9, 4.1]]
    weights = weights_over(weighting.soft_adapt(3, beta=5.0), losses)[-1]
    assert weights[2] > weights[1] > weights[0]
    np.testing.assert_allclose(weights_over(weighting.soft_adapt(3, beta=0.0), losses), 1 / 3)


def test_a_common_factor_changes_nothing_when_normalized():
    losses = np.random.default_rng(1).uniform(0.5, 5, size=(6, 3))
    rule = weighting.soft_adapt(3, beta=2.0, variant="normalized")
    np.testing.assert_allclose(
        weights_over(rule, 1e6 * losses), weights_over(rule, losses), rtol=1e-4
    )


def test_rates_are_per_update():
    """Of a task that was absent, and under every=n."""
    losses, rule = [[4.0, 4.0], [0.0, 3.0], [2.0, 3.0]], weighting.soft_adapt(2, beta=1.0)
    weights = weights_over(rule, losses, [[True, True], [False, True], [True, True]])
    raw = np.exp([-2 / 2, 0.0])
    np.testing.assert_allclose(weights[1], [0, 1], rtol=1e-6)
    np.testing.assert_allclose(weights[2], raw / raw.sum(), rtol=1e-5)
    raw = np.exp([-2 / 10, -1 / 10])
    weights = weights_over(rule, [[4.0, 4.0], [2.0, 3.0]], elapsed=10)
    np.testing.assert_allclose(weights[1], raw / raw.sum(), rtol=1e-5)


def test_a_task_that_comes_later_counts_with_the_mean_rate():
    losses = [[4.0, 4.0, 1.0], [3.0, 2.0, 1.0]]
    rule = weighting.soft_adapt(3, beta=1.0)
    weights = weights_over(rule, losses, [[True, True, False], [True, True, True]])
    raw = np.exp([-1.0, -2.0, -1.5])
    np.testing.assert_allclose(weights[1], raw / raw.sum(), rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_stays_finite(variant):
    losses = [[0, 3e38], [3e38, 1e-38], [-3e38, 3e38], [3e38, -3e38], [-1, 0], [0, 0], [0, 0]]
    weights = weights_over(weighting.soft_adapt(2, beta=1e3, variant=variant), losses)
    assert np.all(np.isfinite(weights) & (weights >= 0))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights[-1], 0.5, rtol=1e-6)


def test_beta_can_be_traced():
    losses = [[4.0, 2.0], [4.0, 1.0]]
    weights = jax.jit(lambda beta: jnp.asarray(traced(beta, losses)))(2.0)
    expected = weights_over(weighting.soft_adapt(2, beta=2.0), losses)[-1]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def traced(beta, losses):
    rule = weighting.soft_adapt(2, beta=beta)
    state = rule.init()
    weights = jnp.zeros(2)
    for row in losses:
        stats = TaskStats(jnp.zeros(2), None, jnp.array(row), jnp.ones(2, bool), jnp.int32(1))
        weights, state = rule.update(stats, state)
    return weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": np.inf}, "beta=inf must be finite"),
        ({"beta": np.nan}, "beta=nan must be finite"),
        ({"variant": "softer"}, "variant='softer' must be"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        weighting.soft_adapt(2, **options)
