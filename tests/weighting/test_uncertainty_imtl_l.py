"""Uncertainty weighting: its gradient, its fixed point, absent tasks, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import weighting
from gaba_jax.weighting import TaskStats


def stats_of(losses, present=(True, True)):
    losses = jnp.asarray(losses, jnp.float32)
    return TaskStats(jnp.zeros(2), None, losses, jnp.array(present), jnp.int32(1))


def test_closed_form_is_the_gradient_of_the_objective():
    log_variances, losses = jnp.array([1.3, -0.4]), jnp.array([7.0, 0.2])
    rule = weighting.uncertainty(2, weight_optimizer=optax.sgd(1.0))
    state = rule.init()._replace(log_variances=log_variances)
    weights, state = rule.update(stats_of(losses), state)

    def objective(losses, s):
        return jnp.sum(jnp.exp(-s) * losses + s)

    of_losses, of_s = jax.grad(objective, argnums=(0, 1))(losses, log_variances)
    np.testing.assert_allclose(log_variances - state.log_variances, of_s, rtol=1e-6)
    np.testing.assert_allclose(weights, of_losses, rtol=1e-6)  # those from before the step


def test_weights_go_from_one_to_the_inverse_of_the_loss(weigh):
    rule = weighting.uncertainty(2)
    np.testing.assert_array_equal(rule.initial_weights, [1, 1])
    weights = weigh(rule, [9.0, 9.0], 1500, losses=jnp.array([50.0, 0.2]))
    np.testing.assert_array_equal(weights[0], [1, 1])
    np.testing.assert_allclose(weights[-1], [1 / 50, 5], rtol=1e-2)


def test_an_absent_task_keeps_its_log_variance():
    rule = weighting.uncertainty(2)
    _, state = rule.update(stats_of([5, 0.5]), rule.init())
    _, after = rule.update(stats_of([5, 1], present=[True, False]), state)
    assert after.log_variances[1] == state.log_variances[1]
    assert after.log_variances[0] > state.log_variances[0]


@pytest.mark.parametrize("optimizer", [optax.adam(1.0), optax.sgd(1.0)], ids=["adam", "sgd"])
def test_everything_stays_finite(weigh, optimizer):
    rule = weighting.uncertainty(2, weight_optimizer=optimizer)
    for losses in ([0.0, 1e38], [-1e38, 1e-38]):
        weights = weigh(rule, [1.0, 1.0], 200, losses=jnp.array(losses))
        assert np.isfinite(weights).all()


def test_errors():
    with pytest.raises(ValueError, match="num_tasks=1 must be at least 2"):
        weighting.uncertainty(1)
    with pytest.raises(ValueError, match=r"must be an optax optimizer.*got 0.1"):
        weighting.uncertainty(2, weight_optimizer=0.1)
