"""`gaba` among optax's transforms: before, inside and around them, and the mistakes nobody sees."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

from gaba_jax import (
    balance,
    balanced_value_and_grad,
    gaba,
    per_task,
    task_value_and_grad,
    weighting,
)
from tests.slow import rest_slow

STEPS = 5
PARAMS = {"backbone": jnp.ones((3, 2)), "head": jnp.ones(2)}


def stacked(seed=0):
    """Gradients of a run, leaves [2 * STEPS, 2, ...]; the first task is 100 times louder."""
    keys = jax.random.split(jax.random.key(seed), 2)
    loudness = jnp.array([100.0, 1.0])
    return {
        name: jax.random.normal(key, (2 * STEPS, 2, *p.shape))
        * loudness.reshape(1, 2, *[1] * p.ndim)
        for key, (name, p) in zip(keys, PARAMS.items(), strict=True)
    }


def scan(tx, grads, params=PARAMS, **extra):
    """Parameters after each update, and the last state."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, optax.tree.get(state, "task_weights"))

    (_, state), (trajectory, weights) = jax.lax.scan(step, (params, tx.init(params)), grads)
    return trajectory, weights, state


ADVERSARY = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
AFTER = {
    "adamw": lambda: optax.adamw(1e-2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(1e-2), 3),
    "partition": lambda: optax.partition(
        {"train": optax.sgd(1e-2), "freeze": optax.set_to_zero()},
        {"backbone": "train", "head": "freeze"},
    ),
    "masked": lambda: optax.masked(optax.sgd(1e-2), {"backbone": True, "head": False}),
    "multi_steps": lambda: optax.MultiSteps(optax.sgd(1e-2), 2).gradient_transformation(),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "sam": lambda: optax.contrib.sam(optax.sgd(1e-2), ADVERSARY),
}


@pytest.mark.parametrize(
    "name", rest_slow(AFTER, fast=["adamw", "partition", "multi_steps", "sam"])
)
def test_before_another_transform(name):
    """In a chain the next transform sees one balanced gradient of the parameters' shapes."""
    first, grads = gaba(warmup_steps=2, beta=0.5), stacked()
    tx = optax.named_chain(("balance", first), ("after", AFTER[name]()))
    trajectory, weights, state = jax.jit(functools.partial(scan, tx))(grads)
    balanced = {
        key: jnp.einsum("tk,tk...->t...", weights, g, precision="highest")
        for key, g in grads.items()
    }

    @jax.jit
    def alone(params, state, updates):
        updates, state = AFTER[name]().update(updates, state, params)
        return optax.apply_updates(params, updates), state

    params, after = PARAMS, AFTER[name]().init(PARAMS)
    for t in range(2 * STEPS):
        params, after = alone(params, after, jax.tree.map(lambda g, t=t: g[t], balanced))
        chex.assert_trees_all_close(
            jax.tree.map(lambda p, t=t: p[t], trajectory), params, rtol=1e-4, atol=1e-5
        )
    chex.assert_trees_all_equal_structs(state["after"], after)
    assert weights[-1, 1] > 0.9
    assert (params["backbone"] != PARAMS["backbone"]).any()


def test_apply_if_finite_skips_what_gaba_lets_through():
    tx = optax.chain(gaba(warmup_steps=0), optax.apply_if_finite(optax.sgd(1e-2), 3))
    grads = stacked()
    grads["backbone"] = grads["backbone"].at[3, 1, 0, 0].set(jnp.nan)
    trajectory, weights, state = jax.jit(functools.partial(scan, tx))(grads)
    chex.assert_tree_all_finite(trajectory)
    np.testing.assert_array_equal(trajectory["backbone"][3], trajectory["backbone"][2])
    np.testing.assert_array_equal(weights[3], weights[2])
    assert (trajectory["backbone"][4] != trajectory["backbone"][3]).any()
    assert state[0].nonfinite_count == optax.tree.get(state, "total_notfinite") == 1


STATIC = (
    "num_tasks",
    "warmup_steps",
    "floor",
    "debias",
    "task_priorities",
    "shared",
    "measure_on",
    "weight_task_specific",
    "nonfinite",
)


def injected(hyperparam_dtype=jnp.float32, **kwargs):
    make = optax.inject_hyperparams(gaba, static_args=STATIC, hyperparam_dtype=hyperparam_dtype)
    return make(warmup_steps=1, **kwargs)


def injected_function(**schedules):
    """A function of the scheduled arguments alone needs no list of the others."""

    def make(beta, min_weight):
        return gaba(warmup_steps=1, beta=beta, min_weight=min_weight)

    return optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(**schedules)


@pytest.mark.parametrize("inject", [injected, injected_function])
def test_injected_constants_are_the_plain_transform(inject):
    schedules = {"beta": lambda _: 0.9, "min_weight": lambda _: 0.02}
    tx = optax.chain(inject(**schedules), optax.sgd(1e-2))
    plain = gaba(warmup_steps=1, beta=0.9, min_weight=0.02)
    actual = jax.jit(functools.partial(scan, tx))(stacked())
    expected = jax.jit(functools.partial(scan, optax.chain(plain, optax.sgd(1e-2))))(stacked())
    chex.assert_trees_all_close(actual[:2], expected[:2], rtol=1e-6)
    chex.assert_trees_all_close(actual[2][0].inner_state, expected[2][0], rtol=1e-6)
    np.testing.assert_allclose(actual[2][0].hyperparams["beta"], 0.9)


def test_injected_schedules_take_effect():
    """Beta falls to 0 after 5 updates and the floor rises after 7."""
    tx = injected(
        beta=lambda count: jnp.where(count < 5, 0.99, 0.0),
        min_weight=lambda count: jnp.where(count < 7, 0.0, 0.3),
        floor="project",
    )
    quiet = jax.tree.map(lambda g: jnp.abs(g).at[:].set(jnp.abs(g[:1])), stacked())
    _, weights, _ = jax.jit(functools.partial(scan, tx))(quiet)
    assert np.all(weights[:5, 0] > 0.45)  # an average of 100 updates has hardly moved
    assert np.all(weights[5:7, 0] < 0.05)
    np.testing.assert_allclose(weights[7:], [[0.3, 0.7]] * 3, rtol=1e-6)


def test_injected_into_low_precision_asks_for_a_hyperparam_dtype():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match=r"beta came as bfloat16.*hyperparam_dtype=jnp.float32"):
        injected(hyperparam_dtype=None, beta=0.999).init(params)
    state = injected(beta=0.999).init(params)
    np.testing.assert_allclose(state.hyperparams["beta"], 0.999)


RULE = weighting.inverse_norm(2)


def run(tx, losses_fn, params, batch, *, of_params=lambda params: params, extra=None):
    """A few jitted steps. ``of_params`` gives those that the gradients belong to, and
    ``extra(losses, grad_fn)`` the extra arguments."""

    @jax.jit
    def step(params, state):
        def grad_fn(params, _=None):
            return task_value_and_grad(losses_fn)(params, *batch)

        losses, grads = grad_fn(of_params(params))
        given = extra(losses, lambda *args: grad_fn(*args)[1]) if extra else {}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


def for_sam(losses, grad_fn):
    return {"grad_fn": grad_fn}


def with_losses(losses, grad_fn):
    return {"task_losses": losses}


def test_inside_lookahead(toy, by_hand):
    losses_fn, params, batch = toy
    tx = optax.lookahead(optax.chain(balance(RULE), optax.sgd(0.05)), 3, 0.5)
    both = optax.LookaheadParams.init_synced(params)
    actual, _ = run(tx, losses_fn, both, batch, of_params=lambda both: both.fast)
    fast = slow = params
    for i in range(STEPS):
        update = by_hand(losses_fn, fast, *batch)[1]
        fast = jax.tree.map(lambda p, u: p - 0.05 * u, fast, update)
        if i % 3 == 2:
            fast = slow = jax.tree.map(lambda s, f: (s + f) / 2, slow, fast)
    chex.assert_trees_all_close((actual.fast, actual.slow), (fast, slow), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("reset_state", [True, False])
def test_a_reset_of_lookahead_starts_the_average_anew(toy, reset_state):
    losses_fn, params, batch = toy
    inner = optax.chain(gaba(warmup_steps=0, beta=0.5), optax.sgd(1e-3))
    tx = optax.lookahead(inner, STEPS, 0.5, reset_state=reset_state)
    both = optax.LookaheadParams.init_synced(params)
    _, state = run(tx, losses_fn, both, batch, of_params=lambda both: both.fast)
    weights = optax.tree.get(state, "task_weights")
    assert (weights[0] == 0.5) if reset_state else (weights[0] > 0.9)


def test_beside_lookahead_with_a_mask(toy):
    """Lookahead hands no extra arguments on: the balancer that needs them is called by itself."""
    losses_fn, params, batch = toy
    balancer, slow = balance(RULE), optax.lookahead(optax.sgd(0.05), 3, 0.5)
    inside = optax.lookahead(optax.chain(balancer, optax.sgd(0.05)), 3, 0.5)
    both, mask = optax.LookaheadParams.init_synced(params), jnp.array([True, False])

    @jax.jit
    def beside(both):
        _, grads = task_value_and_grad(losses_fn)(both.fast, *batch)
        balanced, _ = balancer.update(grads, balancer.init(params), both.fast, task_mask=mask)
        return grads, slow.update(balanced, slow.init(both), both)[0]

    grads, updates = beside(both)
    chex.assert_trees_all_close(updates.fast, jax.tree.map(lambda g: -0.05 * g[0], grads))
    with pytest.raises(TypeError, match="unexpected keyword argument 'task_mask'"):
        inside.update(grads, inside.init(both), both, task_mask=mask)


def test_inside_opaque_sam(toy, by_hand):
    """Both halves balance K gradients: those at the parameters and those where SAM ascends to."""
    losses_fn, params, batch = toy
    balancer = balance(RULE)
    tx = optax.contrib.sam(
        optax.chain(balancer, optax.sgd(0.05)),
        optax.chain(balancer, ADVERSARY),
        opaque_mode=True,
        reset_state=False,
    )
    actual, state = run(tx, losses_fn, params, batch, extra=for_sam)
    expected = params
    for _ in range(STEPS):
        ascent = by_hand(losses_fn, expected, *batch)[1]
        length = optax.tree.norm(ascent)
        above = jax.tree.map(lambda p, a, n=length: p + 0.1 * a / n, expected, ascent)
        update = by_hand(losses_fn, above, *batch)[1]
        expected = jax.tree.map(lambda p, u: p - 0.05 * u, expected, update)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.adv_state[0].since_measured, 1)  # it was kept


@pytest.mark.slow
def test_in_the_alternating_mode_of_sam_states_lose_their_dtype(toy):
    """It blends states by multiplying them with 0 and 1, so gaba goes before it."""
    losses_fn, params, batch = toy
    half = gaba(warmup_steps=0)
    tx = optax.contrib.sam(optax.chain(half, optax.sgd(1e-3)), optax.chain(half, ADVERSARY))
    _, state = run(tx, losses_fn, params, batch)
    assert state.opt_state[0].seen_by_task.dtype == jnp.int32
    assert tx.init(params).opt_state[0].seen_by_task.dtype == bool


@pytest.mark.slow
@pytest.mark.parametrize("reset_state", [True, False])
def test_the_average_in_an_adversary_needs_its_state(toy, reset_state):
    losses_fn, params, batch = toy
    half = gaba(warmup_steps=0, beta=0.5)
    tx = optax.contrib.sam(
        optax.chain(half, optax.sgd(1e-3)),
        optax.chain(half, ADVERSARY),
        opaque_mode=True,
        reset_state=reset_state,
    )
    _, state = run(tx, losses_fn, params, batch, extra=for_sam)
    assert state.opt_state[0].task_weights[0] > 0.9
    assert (state.adv_state[0].task_weights[0] > 0.9) == (not reset_state)


@pytest.mark.slow
def test_of_microbatches(toy):
    losses_fn, params, batch = toy
    grad_fn = task_value_and_grad(losses_fn)
    in_parts = optax.microbatching.microbatch(
        grad_fn,
        argnums=(1, 2),
        microbatch_size=4,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    losses, grads = jax.jit(in_parts)(params, *batch)
    chex.assert_trees_all_close((losses, grads), grad_fn(params, *batch), rtol=1e-4, atol=1e-4)
    tx = balance(RULE)
    updates, state = tx.update(grads, tx.init(params), params)
    own = balanced_value_and_grad(losses_fn, RULE, microbatch_size=4)
    (_, expected), own_state = own.value_and_grad(params, own.init(params), *batch)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.task_weights, own_state.task_weights, rtol=1e-5)


def test_as_an_aggregator(toy, by_hand):
    losses_fn, params, batch = toy
    tx = aggregating.process(
        per_task(optax.clip_by_global_norm(1.0)), balance(RULE), optax.sgd(0.05)
    )
    actual, _ = run(tx, losses_fn, params, batch)

    def clipped(grads):
        norms = jnp.maximum(1, jax.vmap(optax.tree.norm)(grads))
        return jax.vmap(lambda norm, g: jax.tree.map(lambda x: x / norm, g))(norms, grads)

    expected = params
    for _ in range(STEPS):
        _, update = by_hand(losses_fn, expected, *batch, first=clipped)
        expected = jax.tree.map(lambda p, u: p - 0.05 * u, expected, update)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_an_aggregator_that_needs_losses(toy):
    """Every part of `process` is given the extra arguments, so every part has to take them."""
    losses_fn, params, batch = toy
    balancer, optimizer = balance(weighting.scale_invariant(2)), optax.adam(1e-2)
    parts = [optax.identity(), balancer, optimizer]
    with pytest.raises(TypeError, match="unexpected keyword argument 'task_losses'"):
        run(aggregating.process(*parts), losses_fn, params, batch, extra=with_losses)
    tx = aggregating.process(*map(optax.with_extra_args_support, parts))
    actual, _ = run(tx, losses_fn, params, batch, extra=with_losses)
    chain = optax.chain(balancer, optimizer)
    expected, _ = run(chain, losses_fn, params, batch, extra=with_losses)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def accumulated(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (accumulated, ValueError, "TaskMultiSteps accumulates gradients"),
        (lambda tx: optax.apply_if_finite(tx, 3), TypeError, "cond branches must have equal"),
    ],
)
def test_wrappers_that_cannot_be_around_gaba(toy, wrap, error, message):
    losses_fn, params, batch = toy
    with pytest.raises(error, match=message):
        run(wrap(gaba()), losses_fn, params, batch)


def test_lookahead_after_gaba_names_where_it_goes(toy):
    losses_fn, params, batch = toy
    tx = optax.chain(gaba(), optax.lookahead(optax.sgd(0.1), 3, 0.5))
    both = optax.LookaheadParams.init_synced(params)
    with pytest.raises(ValueError, match=r"inside, as in optax\.lookahead\(optax\.chain\(gaba"):
        run(tx, losses_fn, both, batch, of_params=lambda both: both.fast)
