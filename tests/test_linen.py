"""The Linen train state that passes losses and masks on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training import train_state

from gaba_jax import (
    BalanceState,
    balance,
    balanced_value_and_grad,
    gaba,
    gradnorm,
    task_value_and_grad,
    weighting,
)
from gaba_jax.linen import TrainState
from tests.slow import rest_slow

PARAMS = {"trunk": jnp.ones((4, 3)), "a": jnp.ones(3), "b": jnp.ones(3)}


def losses_and_grads(params):
    def losses_fn(params):
        h = jnp.tanh(jnp.eye(4) @ params["trunk"])
        return 50.0 * jnp.mean((h @ params["a"] - 1) ** 2), jnp.mean((h @ params["b"]) ** 2)

    return task_value_and_grad(losses_fn)(params)


def make_tx():
    return optax.chain(gradnorm(), optax.adamw(1e-2))


def test_equals_the_loop_by_hand():
    tx = make_tx()
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)

    @jax.jit
    def train_step(state):
        losses, grads = losses_and_grads(state.params)
        return state.apply_gradients(grads=grads, task_losses=losses)

    @jax.jit
    def by_hand(params, opt_state):
        losses, grads = losses_and_grads(params)
        updates, opt_state = tx.update(grads, opt_state, params, task_losses=losses)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        state, (params, opt_state) = train_step(state), by_hand(params, opt_state)
    assert isinstance(state, TrainState)
    assert state.tx is tx
    assert state.step == 5
    chex.assert_trees_all_close((state.params, state.opt_state), (params, opt_state), rtol=1e-6)


@pytest.mark.slow
def test_the_value_of_a_plateau_is_handed_on():
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    tx = optax.chain(gaba(), optax.sgd(1e-3), plateau)
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    for _ in range(4):
        losses, grads = losses_and_grads(state.params)
        state = state.apply_gradients(grads=grads, value=1.0 + losses.sum() * 0)
    assert optax.tree.get(state.opt_state, "scale") < 1


class Fp8(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.Dense(16, name="trunk", dot_general_cls=nn.Fp8DirectDotGeneralOp)(x))
        return nn.Dense(1, name="a")(h)[:, 0], nn.Dense(1, name="b")(h)[:, 0]


FP8 = [{}, {"measure": "lagged"}, {"every": 2}, {"nonfinite": "drop"}]


@pytest.mark.slow
@pytest.mark.parametrize("options", FP8, ids=str)
def test_scales_of_fp8_layers_are_neither_measured_nor_weighted(options):
    x = jax.random.normal(jax.random.key(5), (16, 4))
    net = Fp8()
    variables = net.init(jax.random.key(0), x)
    scales = variables["_overwrite_with_gradient"]

    def losses_fn(variables):
        a, b = net.apply(variables, x)
        return jnp.mean((a - 10 * x[:, 0]) ** 2), 1e-3 * jnp.mean((b - x[:, 1]) ** 2)

    def of_params(params):
        return losses_fn({"params": params, "_overwrite_with_gradient": scales})

    rule = weighting.inverse_norm(2)
    balanced = balanced_value_and_grad(losses_fn, rule, **options)
    alone = balanced_value_and_grad(of_params, rule, **options)
    step = jax.jit(balanced.value_and_grad)
    (_, grads), state = step(variables, balanced.init(variables))
    params = variables["params"]
    (_, expected), of_alone = jax.jit(alone.value_and_grad)(params, alone.init(params))
    np.testing.assert_allclose(state.task_norms, of_alone.task_norms, rtol=1e-5)
    np.testing.assert_allclose(state.task_weights, of_alone.task_weights, rtol=1e-5)
    chex.assert_trees_all_close(grads["params"], expected, rtol=1e-4, atol=1e-6)
    _, stacked = jax.jit(task_value_and_grad(losses_fn))(variables)
    new = jax.tree.map(lambda each: each.max(axis=0), stacked["_overwrite_with_gradient"])
    chex.assert_trees_all_close(grads["_overwrite_with_gradient"], new, rtol=1e-5)
    train = TrainState.create(
        apply_fn=net.apply, params=variables, tx=optax.chain(balance(rule), optax.sgd(1e-3))
    )
    train = train.apply_gradients(grads=stacked)
    np.testing.assert_allclose(
        train.opt_state[0].task_weights, balance_state(rule, params, of_params), rtol=1e-5
    )
    chex.assert_trees_all_close(train.params["_overwrite_with_gradient"], new, rtol=1e-5)


@pytest.mark.parametrize(
    "options", rest_slow([{"measure": "lagged"}, {}], fast=[{"measure": "lagged"}]), ids=str
)
def test_a_nan_of_an_absent_task_stays_out_of_the_scales(options):
    net, x = Fp8(), jax.random.normal(jax.random.key(5), (16, 4))
    variables = net.init(jax.random.key(0), x)

    def losses_fn(variables, scale):
        a, b = net.apply(variables, x)
        return jnp.mean((a - x[:, 0]) ** 2), jnp.mean((b - x[:, 1]) ** 2) * scale

    balanced = balanced_value_and_grad(losses_fn, weighting.inverse_norm(2), **options)
    step = jax.jit(balanced.value_and_grad)
    mask = jnp.array([True, False])
    (_, grads), _ = step(variables, balanced.init(variables), jnp.nan, task_mask=mask)
    chex.assert_tree_all_finite(grads)


def test_micro_batches_have_no_mean_of_scales():
    net, x = Fp8(), jnp.ones((4, 4))
    variables = net.init(jax.random.key(0), x)
    balanced = balanced_value_and_grad(
        lambda variables, x: tuple(jnp.mean(out) for out in net.apply(variables, x)),
        weighting.inverse_norm(2),
        microbatch_size=2,
    )
    with pytest.raises(ValueError, match=r"'_overwrite_with_gradient' hold scales"):
        jax.eval_shape(balanced.value_and_grad, variables, balanced.init(variables), x)


def balance_state(rule, params, losses_fn):
    tx = balance(rule)
    return tx.update(task_value_and_grad(losses_fn)(params)[1], tx.init(params))[1].task_weights


@pytest.mark.parametrize("kind", [TrainState, train_state.TrainState])
def test_forgotten_losses_raise_when_the_step_is_traced(kind):
    state = kind.create(apply_fn=None, params=PARAMS, tx=make_tx())

    def train_step(state):
        return state.apply_gradients(grads=losses_and_grads(state.params)[1])

    with pytest.raises(ValueError, match=r"task_losses=losses.*train state whose apply_gradients"):
        jax.jit(train_step).trace(state)


def test_flax_own_train_state_does_not_pass_losses_on():
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=make_tx())
    losses, grads = losses_and_grads(PARAMS)
    with pytest.raises(ValueError, match="train state whose apply_gradients"):
        state.apply_gradients(grads=grads, task_losses=losses)


def test_masks_are_passed_on_and_fields_replaced():
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=optax.chain(gaba(), optax.sgd(0.1)))
    _, grads = losses_and_grads(PARAMS)
    state = state.apply_gradients(grads=grads, task_mask=jnp.array([True, False]), apply_fn=abs)
    assert isinstance(state.opt_state[0], BalanceState)
    np.testing.assert_array_equal(state.opt_state[0].task_weights, [1, 0])
    assert state.apply_fn is abs


def test_any_optimizer_works():
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))
    state = state.apply_gradients(grads=PARAMS, task_losses=jnp.ones(2))
    chex.assert_trees_all_close(state.params, jax.tree.map(lambda p: 0.9 * p, PARAMS), rtol=1e-6)


def test_a_forgotten_balancer():
    """Parameters of one axis less would take on the tasks', by broadcasting."""
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))
    losses, grads = losses_and_grads(PARAMS)
    with pytest.raises(ValueError, match=r"put gaba\(\) or .*first in the chain"):
        jax.jit(lambda state: state.apply_gradients(grads=grads, task_losses=losses)).trace(state)
