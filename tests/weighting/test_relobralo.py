"""ReLoBRaLo against NumPy, with the draws of its key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaba_jax import balance, weighting
from tests.losses import run_over


def balanced(losses, before, temperature):
    raw = np.exp(losses / before / temperature)
    return len(losses) * raw / raw.sum()


def reference(losses, temperature, alpha, goes_on):
    """In float64, for given draws."""
    losses = np.asarray(losses, np.float64)
    weights, expected = np.ones(losses.shape[1]), []
    for t in range(len(losses)):
        by_first = balanced(losses[t], losses[0], temperature)
        by_last = balanced(losses[t], losses[max(t - 1, 0)], temperature)
        kept = weights if goes_on[t] else by_first
        weights = alpha * kept + (1 - alpha) * by_last
        expected.append(weights)
    return np.array(expected)


LOSSES = np.random.default_rng(0).uniform(1, 3, size=(20, 3))


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize(("lookback", "goes_on"), [(1.0, True), (0.0, False)])
def test_against_numpy(temperature, lookback, goes_on):
    rule = weighting.relobralo(3, temperature=temperature, alpha=0.7, lookback=lookback)
    weights, _ = run_over(rule, LOSSES)
    expected = reference(LOSSES, temperature, 0.7, [goes_on] * 20)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)
    np.testing.assert_allclose(weights.sum(axis=1), 3, rtol=1e-5)
    np.testing.assert_allclose(weights[0], 1, rtol=1e-6)


def test_every_update_is_one_of_the_two():
    """The draws are read off the run itself, and come as often as they should."""
    losses = np.random.default_rng(1).uniform(1, 3, size=(600, 2))
    rule = weighting.relobralo(2, temperature=1.0, alpha=0.8, lookback=0.75, seed=3)
    weights, _ = run_over(rule, losses)
    before, draws = np.ones(2), []
    for t, found in enumerate(weights):
        by_last = balanced(losses[t], losses[max(t - 1, 0)], 1.0)
        ways = (0.8 * balanced(losses[t], losses[0], 1.0) + 0.2 * by_last, 0.8 * before)
        ways = (ways[0], ways[1] + 0.2 * by_last)
        far = [np.abs(found - way).max() for way in ways]
        assert min(far) < 1e-5
        draws.append(int(np.argmin(far)))
        before = found
    np.testing.assert_allclose(np.mean(draws), 0.75, atol=0.06)
    again, _ = run_over(rule, losses)
    np.testing.assert_array_equal(again, weights)
    other, _ = run_over(weighting.relobralo(2, temperature=1.0, alpha=0.8, lookback=0.75), losses)
    assert np.abs(other - weights).max() > 0.01


def test_a_resumed_run_is_the_same_run():
    rule = weighting.relobralo(3, lookback=0.5)
    whole, _ = run_over(rule, LOSSES)
    _, state = run_over(rule, LOSSES[:9])
    assert state.key_data.dtype == jnp.uint32
    restored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), state)
    rest, _ = run_over(rule, LOSSES[9:], state=restored)
    np.testing.assert_array_equal(rest, whole[9:])


def test_what_is_kept_counts_updates():
    """Under every=n alpha is taken to the power n, and so is the probability of going on."""
    rule = weighting.relobralo(2, temperature=1.0, alpha=0.9, lookback=1.0)
    weights, _ = run_over(rule, [[2.0, 2.0], [2.0, 1.0]], elapsed=5)
    expected = 0.9**5 + (1 - 0.9**5) * balanced(np.array([2.0, 1.0]), np.array([2.0, 2.0]), 1.0)
    np.testing.assert_allclose(weights[1], expected, rtol=1e-5)
    rule = weighting.relobralo(2, temperature=1.0, alpha=0.9, lookback=0.99)
    losses = np.ones((50, 2)) * [[1.0, 1.0]]
    losses[1:, 1] = 0.5
    weights, _ = run_over(rule, losses, elapsed=2000)  # 0.99 ** 2000 is 2e-9: it always looks back
    np.testing.assert_allclose(weights[5:], np.tile(weights[5], (45, 1)), rtol=1e-5)


def test_an_absent_task_keeps_weight_and_losses():
    rule = weighting.relobralo(3, temperature=1.0, alpha=0.5, lookback=1.0)
    losses = [[2.0, 2.0, 2.0], [2.0, 1.0, 2.0], [1.0, 9.0, 2.0]]
    present = np.ones((3, 3), bool)
    present[2, 1] = False
    weights, state = run_over(rule, losses, present)
    assert weights[2, 1] == weights[1, 1]
    assert state.last_losses[1] == 1
    raw = np.exp([0.5, 1.0])
    expected = 0.5 * weights[1, ::2] + 0.5 * 2 * raw / raw.sum()
    np.testing.assert_allclose(weights[2, ::2], expected, rtol=1e-5)
    state = balance(rule).init(jnp.zeros(2))
    grads, mask = jnp.ones((3, 2)), jnp.array([True, False, True])
    _, state = balance(rule).update(grads, state, task_losses=jnp.ones(3), task_mask=mask)
    np.testing.assert_array_equal(state.task_weights, [1, 0, 1])


def test_everything_stays_finite():
    losses = [[1e-38, 1e38], [1e38, 1e-38], [0, 3e38], [-1, 0], [3e38, 1], [1, 1]]
    weights, state = run_over(weighting.relobralo(2, temperature=1e-6, lookback=0.5), losses)
    assert np.all(np.isfinite(weights) & (weights >= 0))
    np.testing.assert_allclose(weights.sum(axis=1), 2, rtol=1e-5)
    np.testing.assert_array_equal(state.last_losses, [1, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"alpha": 1.0}, r"alpha=1.0 must be in \[0, 1\)"),
        ({"lookback": 1.5}, r"lookback=1.5 must be in \[0, 1\]"),
        ({"seed": -1}, "seed=-1 must be a whole number"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        weighting.relobralo(2, **options)
