"""TaskMultiSteps: the update of the mean gradient, with the norms of that mean."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import TaskMultiSteps, balance, gaba, task_value_and_grad, weighting


def rule(debias=True):
    return gaba(warmup_steps=0, beta=0.5, debias=debias)


def test_mini_steps_are_the_full_batch(toy):
    losses_fn, params, (x, y) = toy
    full = optax.chain(rule(), optax.adam(1e-2))
    parts = TaskMultiSteps(optax.chain(rule(), optax.adam(1e-2)), every_k_schedule=4)
    grad, update = jax.jit(task_value_and_grad(losses_fn)), jax.jit(parts.update)
    expected_params, state, expected = params, parts.init(params), full.init(params)
    for _ in range(5):
        updates, expected = full.update(grad(expected_params, x, y)[1], expected, expected_params)
        expected_params = optax.apply_updates(expected_params, updates)
        for i in range(4):
            assert not parts.has_updated(state) or i == 0
            rows = slice(4 * i, 4 * i + 4)
            updates, state = update(grad(params, x[rows], y[rows])[1], state, params)
            params = optax.apply_updates(params, updates)
    assert parts.has_updated(state)
    chex.assert_trees_all_close(params, expected_params, rtol=1e-5, atol=1e-6)
    for name in ("task_weights", "task_norms"):
        actual = optax.tree.get(state.inner_opt_state, name)
        np.testing.assert_allclose(actual, optax.tree.get(expected, name), rtol=1e-5)


def test_three_tasks_sums_and_skips():
    tx = TaskMultiSteps(
        balance(weighting.uniform(3)),
        2,
        num_tasks=3,
        use_grad_mean=False,
        should_skip_update_fn=optax.skip_not_finite,
    )
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)
    assert state.acc_grads["w"].shape == (3, 2)
    good = {"w": jnp.ones((3, 2))}
    updates = None
    for grads in (good, {"w": good["w"].at[0].set(jnp.nan)}, good):
        updates, state = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["w"], [2, 2])
    assert state.gradient_step == 1


def test_as_a_transform_it_passes_losses_and_masks_on():
    tx = optax.chain(
        TaskMultiSteps(balance(weighting.gradnorm(2)), 1).gradient_transformation(),
        optax.sgd(0.1),
    )
    params, grads = jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 1.0]])
    losses, mask = jnp.array([2.0, 1.0]), jnp.array([True, False])
    updates, state = tx.update(grads, tx.init(params), params, task_losses=losses, task_mask=mask)
    np.testing.assert_allclose(updates, -0.1 * 2 * grads[0], rtol=1e-6)  # its weights sum to 2
    np.testing.assert_allclose(optax.tree.get(state, "task_weights"), [2, 0])
    with pytest.raises(ValueError, match="needs the task losses"):
        tx.update(grads, tx.init(params), params)
