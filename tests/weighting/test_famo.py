"""FAMO against the gradients of its definition, and what it does over a run."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import balance, weighting
from gaba_jax.weighting import TaskStats


def stats_of(losses, present=None, elapsed=1):
    losses = jnp.asarray(losses, jnp.float32)
    present = jnp.ones(losses.shape, bool) if present is None else jnp.asarray(present)
    return TaskStats(jnp.zeros_like(losses), None, losses, present, jnp.int32(elapsed))


def run(rule, losses, present=None, elapsed=None):
    """The weights of all updates with losses [T, K], and the states after them."""
    losses = jnp.asarray(losses, jnp.float32)
    present = jnp.ones(losses.shape, bool) if present is None else jnp.asarray(present)
    elapsed = jnp.ones(len(losses), jnp.int32) if elapsed is None else jnp.asarray(elapsed)

    def step(state, each):
        losses, present, elapsed = each
        weights, state = rule.update(stats_of(losses, present, elapsed), state)
        return state, (weights, state)

    return jax.lax.scan(step, rule.init(), (losses, present, elapsed))[1]


def test_weights_are_the_gradient_of_the_weighted_log_losses():
    logits, minimum = jnp.array([0.3, -1.2, 0.8]), jnp.array([0.5, 0.0, -2.0])
    losses = jnp.array([5.0, 0.02, 1.0])
    rule = weighting.famo(3, minimum_losses=minimum)
    weights, _ = rule.update(stats_of(losses), rule.init()._replace(logits=logits))

    def weighted_logs(losses):
        return jnp.sum(jax.nn.softmax(logits) * jnp.log(losses - minimum))

    gradient = jax.grad(weighted_logs)(losses)
    np.testing.assert_allclose(weights, gradient / gradient.sum(), rtol=1e-5)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


def test_logits_follow_the_gradient_of_the_falls():
    """J^T v + gamma xi: the gradient of sum_i z_i v_i and of the square."""
    logits, gamma = jnp.array([0.3, -1.2, 0.8]), 0.05
    before, after = jnp.array([5.0, 0.02, 1.0]), jnp.array([4.0, 0.021, 0.5])
    rule = weighting.famo(3, weight_optimizer=optax.sgd(0.4), gamma=gamma)
    _, state = rule.update(stats_of(before), rule.init()._replace(logits=logits))
    np.testing.assert_array_equal(state.logits, logits)  # nothing to compare yet
    _, state = rule.update(stats_of(after), state)

    def objective(logits):
        falls = jnp.log(before) - jnp.log(after)
        return jnp.sum(jax.nn.softmax(logits) * falls) + gamma / 2 * jnp.sum(logits**2)

    np.testing.assert_allclose(
        state.logits, logits - 0.4 * jax.grad(objective)(logits), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_against_the_paper_on_the_whole_data():
    """Where the loss after a step is that before the next, the paper's loop to the letter."""
    scales, centres = jnp.array([30.0, 0.5]), jnp.array([[1.0, 0.0], [0.0, 2.0]])

    def losses_fn(x):
        return scales * jnp.sum((x - centres) ** 2, axis=1) + 0.1

    optimizer, gamma, rate = optax.adam(0.025), 0.01, 0.05
    x = xi = jnp.zeros(2)
    moments, expected = optimizer.init(xi), []
    for _ in range(30):
        z, losses = jax.nn.softmax(xi), losses_fn(x)
        expected.append(z / losses / jnp.sum(z / losses))
        x = x - rate * expected[-1] @ jax.jacobian(losses_fn)(x)
        v = jnp.log(losses) - jnp.log(losses_fn(x))
        _, transpose = jax.vjp(jax.nn.softmax, xi)
        step, moments = optimizer.update(transpose(v)[0] + gamma * xi, moments, xi)
        xi = xi + step

    tx = balance(weighting.famo(2, gamma=gamma))

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(jax.jacobian(losses_fn)(x), state, x, task_losses=losses_fn(x))
        return (x - rate * updates, state), state.task_weights

    x = jnp.zeros(2)
    _, weights = jax.lax.scan(step, (x, tx.init(x)), length=30)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)


def test_the_task_whose_log_loss_falls_slowest_gains():
    steps = np.arange(200)[:, None]
    losses = np.array([1.0, 1000.0, 0.01]) * np.exp(-steps * np.array([0.001, 0.02, 0.02]))
    _, states = run(weighting.famo(3), losses)
    logits = states.logits
    assert np.all(np.diff(logits[1:, 0]) > 0)
    assert np.all(logits[-1, 0] > logits[-1, 1:] + 1)
    np.testing.assert_allclose(logits[-1, 1], logits[-1, 2], atol=1e-3)  # alike, 1e5 apart


def test_steady_losses_let_the_logits_decay():
    rule = weighting.famo(2, gamma=0.5, weight_optimizer=optax.sgd(0.1))
    state = rule.init()._replace(logits=jnp.array([2.0, -2.0]))
    for _ in range(11):
        _, state = rule.update(stats_of([3.0, 7.0]), state)
    np.testing.assert_allclose(state.logits, np.array([2.0, -2.0]) * 0.95**10, rtol=1e-5)


def test_an_absent_task_keeps_its_logit_and_its_weight():
    rule = weighting.famo(3, weight_optimizer=optax.sgd(1.0), gamma=0.0)
    losses = np.array([[4, 2, 1], [3, 2, 1], [2, 9, 1], [2, 1, 0.5]], np.float32)
    present = np.ones((4, 3), bool)
    present[2, 1] = False
    weights, states = run(rule, losses, present)
    np.testing.assert_array_equal(states.logits[2, 1], states.logits[1, 1])
    np.testing.assert_array_equal(states.log_losses[2, 1], states.log_losses[1, 1])
    np.testing.assert_array_equal(states.loss_ages[:, 1], [0, 0, 1, 0])
    as_if = np.exp(states.logits[2]) / np.array([2, 2, 1])
    np.testing.assert_allclose(weights[2], as_if / as_if.sum(), rtol=1e-5)
    # Back again: log 2 in two updates, (log 2) / 2 in one.
    z = jax.nn.softmax(states.logits[2])
    falls = np.log(2) * np.array([0, 0.5, 1])
    np.testing.assert_allclose(
        states.logits[3] - states.logits[2], -z * (falls - z @ falls), rtol=1e-4, atol=1e-6
    )


def test_a_task_without_a_loss_yet_has_its_equal_share():
    rule = weighting.famo(3, weight_optimizer=optax.sgd(1.0), gamma=0.0)
    present = [[True, True, False], [True, True, True]]
    weights, states = run(rule, [[1000, 500, 3], [1000, 250, 3]], present)
    np.testing.assert_allclose(weights[0], np.array([1 / 3, 2 / 3, 1]) * [2 / 3, 2 / 3, 1 / 3])
    assert states.logits[1, 2] == 0  # the others are compared without it
    assert states.logits[1, 0] > 0 > states.logits[1, 1]


def test_measured_every_few_updates_the_fall_is_the_whole_one():
    rule = weighting.famo(2, weight_optimizer=optax.sgd(1.0))
    losses = [[4.0, 2.0], [2.0, 2.0]]
    _, each = run(rule, losses)
    _, every_third = run(rule, losses, elapsed=[1, 3])
    np.testing.assert_allclose(every_third.logits, each.logits, rtol=1e-6)


@pytest.mark.parametrize("optimizer", [optax.adam(1.0), optax.sgd(1e3)], ids=["adam", "sgd"])
def test_everything_stays_finite(optimizer):
    hard = [[0, 1e38], [1e38, 1e-38], [1e-38, 1e38], [-1, 0], [3, 0], [1e-40, 1], [-3e38, 3e38]]
    for minimum in (None, [3e38, -3e38]):
        rule = weighting.famo(2, weight_optimizer=optimizer, gamma=1.0, minimum_losses=minimum)
        weights, states = run(rule, hard * 10)
        chex.assert_tree_all_finite((weights, states))
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
        assert np.all(weights >= 0)


def test_the_age_of_a_loss_does_not_overflow():
    rule = weighting.famo(2)
    _, state = rule.update(stats_of([1.0, 1.0]), rule.init())
    state = state._replace(loss_ages=jnp.array([0, 2**31 - 2], jnp.int32))
    _, after = rule.update(stats_of([1.0, 1.0], [True, False], 5), state)
    np.testing.assert_array_equal(after.loss_ages, [0, 2**31 - 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_optimizer": 0.1}, r"must be an optax optimizer.*got 0.1"),
        ({"gamma": -1.0}, "gamma=-1.0 must be finite and at least 0"),
        ({"minimum_losses": [0.0]}, r"minimum_losses must have shape \(2,\).*got shape \(1,\)"),
        ({"minimum_losses": [0.0, np.nan]}, "minimum_losses must be finite"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        weighting.famo(2, **options)


def test_one_task_is_too_few():
    with pytest.raises(ValueError, match="num_tasks=1 must be at least 2"):
        weighting.famo(1)
