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
    grad = jax.jit(task_value_and_grad(losses_fn))
    update, update_of_full = jax.jit(parts.update), jax.jit(full.update)
    expected_params, state, expected = params, parts.init(params), full.init(params)
    for _ in range(5):
        of_full = grad(expected_params, x, y)[1]
        updates, expected = update_of_full(of_full, expected, expected_params)
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


@pytest.mark.slow
def test_a_task_is_averaged_over_the_mini_steps_that_have_it():
    masks = np.array([[1, 0], [1, 1], [1, 1], [0, 1]], bool)
    grads = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    params = jnp.zeros(3)
    means = np.stack([grads[masks[:, i], i].mean(axis=0) for i in range(2)])
    full = optax.chain(rule(), optax.sgd(0.1))
    expected, expected_state = full.update(jnp.asarray(means), full.init(params), params)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        tx = TaskMultiSteps(optax.chain(rule(), optax.sgd(0.1)), 4)
        state, update = tx.init(params), jax.jit(tx.update)
        for i in order:
            unread = np.where(masks[i][:, None], grads[i], np.nan)
            updates, state = update(jnp.asarray(unread), state, params, task_mask=masks[i])
        np.testing.assert_allclose(updates, expected, rtol=1e-5)
        weights = optax.tree.get(state.inner_opt_state, "task_weights")
        np.testing.assert_allclose(weights, expected_state[0].task_weights, rtol=1e-5)
        np.testing.assert_array_equal(state.task_counts, [0, 0])


def test_a_task_absent_from_all_mini_steps_is_absent_from_the_update():
    tx = TaskMultiSteps(balance(weighting.inverse_norm(2)), 2)
    params, grads = jnp.zeros(2), jnp.array([[3.0, 4.0], [jnp.nan, 1.0]])
    updates, state = None, tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params, task_mask=jnp.array([True, False]))
    np.testing.assert_allclose(updates, [3, 4], rtol=1e-6)
    np.testing.assert_allclose(state.inner_opt_state.task_weights, [1, 0])


def test_a_skipped_mini_step_counts_for_no_task():
    tx = TaskMultiSteps(
        balance(weighting.uniform(2)), 2, should_skip_update_fn=optax.skip_not_finite
    )
    params, grads = jnp.zeros(1), jnp.array([[1.0], [3.0]])
    updates, state = None, tx.init(params)
    for factor, mask in ((1, [True, True]), (jnp.nan, [True, False]), (3, [True, False])):
        updates, state = tx.update(factor * grads, state, params, task_mask=jnp.array(mask))
    assert state.gradient_step == 1
    np.testing.assert_allclose(updates, [0.5 * 2 + 0.5 * 3])  # means of (1, 3) and of (3,)


def test_low_precision_stays():
    tx = TaskMultiSteps(balance(weighting.uniform(2)), 2)
    params, grads = jnp.zeros(2, jnp.bfloat16), jnp.ones((2, 2), jnp.bfloat16)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates.dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3)])
def test_gradients_of_another_number_of_tasks(shape):
    params = jnp.zeros(3)
    tx = TaskMultiSteps(gaba(3), 2, num_tasks=3)
    with pytest.raises(ValueError, match=r"TaskMultiSteps\(..., num_tasks=K\)"):
        tx.update(jnp.ones(shape), tx.init(params), params)


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
