"""Dynamic weight average against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaba_jax import weighting
from gaba_jax.weighting import TaskStats


def weights_over(rule, losses, present=None):
    """The weights of every update of a run with these losses [T, K]."""
    losses = jnp.asarray(losses, jnp.float32)
    present = jnp.ones(losses.shape, bool) if present is None else jnp.asarray(present)

    def step(state, row):
        losses, present = row
        stats = TaskStats(jnp.zeros_like(losses), None, losses, present, jnp.int32(1))
        weights, state = rule.update(stats, state)
        return state, weights

    return jax.lax.scan(step, rule.init(), (losses, present))[1]


def reference(losses, temperature, window):
    num_tasks, expected = losses.shape[1], []
    for update in range(len(losses)):
        n = update // window
        ratios = np.ones(num_tasks)
        if n >= 2:
            means = losses[: n * window].reshape(n, window, num_tasks).mean(axis=1)
            ratios = means[-1] / means[-2]
        exponentials = np.exp(ratios / temperature)
        expected.append(num_tasks * exponentials / exponentials.sum())
    return np.array(expected)


@pytest.mark.parametrize("temperature", [2.0, 0.5])
@pytest.mark.parametrize("window", [1, 4])
def test_against_numpy(window, temperature):
    losses = np.random.default_rng(0).uniform(0.5, 20, size=(18, 3))
    rule = weighting.dynamic_weight_average(3, temperature=temperature, window=window)
    weights = weights_over(rule, losses)
    np.testing.assert_allclose(weights, reference(losses, temperature, window), rtol=1e-5)
    np.testing.assert_allclose(weights[: 2 * window], 1, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=1), 3, rtol=1e-6)


def test_absent_tasks_are_left_out_of_the_means():
    losses = np.array([[4, 9], [4, 1], [2, 3], [2, 9], [9, 9], [9, 9], [9, 9]], np.float32)
    present = np.ones((7, 2), bool)
    present[[0, 3, 4, 5], 1] = False  # the last two: a whole window
    rule = weighting.dynamic_weight_average(2, window=2)
    weights = weights_over(rule, losses, present)
    ratios = np.array([9 / 2, 3 / 1])  # the second keeps its ratio
    expected = 2 * np.exp(ratios / 2) / np.exp(ratios / 2).sum()
    np.testing.assert_allclose(weights[4:6], [[1, 0], [1, 0]], rtol=1e-6)
    np.testing.assert_allclose(weights[6], expected, rtol=1e-6)


def test_everything_stays_finite():
    losses = [[0, 1e38], [1e38, 1e-38], [1e-38, 1e38], [-1, 0], [3, 0], [0, 0], [1e38, 1e38]]
    weights = weights_over(weighting.dynamic_weight_average(2), losses)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(axis=1), 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"window": 0}, "window=0 must be at least 1, and whole"),
        ({"window": 1.5}, "window=1.5"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        weighting.dynamic_weight_average(2, **options)
