"""Loaders that serve one task a batch: `stabilize(average="norms")` in both drivers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import balance, balanced_value_and_grad, task_value_and_grad, weighting

STEPS = 12
OPTIONS = {"stacked": None, "exact": {}, "lagged": {"measure": "lagged"}, "every": {"every": 3}}


def make_rule(**changes):
    options = {"beta": 0.5, "warmup_steps": 0, "min_weight": 0.0, "average": "norms"}
    return weighting.stabilize(weighting.inverse_share(2), **options | changes)


def losses_fn(params, task, x):
    """A batch of one task; what the other's loss would be is not known."""
    h = jnp.tanh(x @ params["backbone"])
    loss = 500.0 * jnp.mean(h @ params["loud"]), jnp.mean(h @ params["quiet"])
    return [jnp.where(task == i, loss[i], 0.0) for i in range(2)]


PARAMS = {"backbone": jnp.full((3, 2), 0.1), "loud": jnp.ones(2), "quiet": jnp.ones(2)}
X = jax.random.normal(jax.random.key(0), (STEPS, 4, 3))


def run(rule, path):
    """Of every update: the gradient, the state; the parameters stand still."""
    if path == "stacked":
        tx = balance(rule)

        def gradient(params, state, *args, task_mask):
            losses, grads = task_value_and_grad(losses_fn)(params, *args)
            grads, state = tx.update(grads, state, params, task_mask=task_mask)
            return (losses, grads), state

        init = tx.init
    else:
        init, gradient = balanced_value_and_grad(losses_fn, rule, **OPTIONS[path])

    def step(state, batch):
        task, x = batch
        (_, grads), state = gradient(PARAMS, state, task, x, task_mask=jnp.arange(2) == task)
        return state, (grads, state)

    batches = (jnp.arange(STEPS) % 2, X)
    return jax.jit(lambda: jax.lax.scan(step, init(PARAMS), batches))()[1]


def of_one(task, x):
    return jax.grad(lambda params: losses_fn(params, task, x)[task])(PARAMS)


@pytest.mark.parametrize("path", OPTIONS)
def test_each_task_has_its_own_weight(path):
    """Two updates of one task each are together one of both, in balance."""
    grads, states = run(make_rule(), path)
    weights = states.next_task_weights
    np.testing.assert_allclose(weights[0], [0.5, 0.5], rtol=1e-6)  # only one task seen
    assert weights[-1, 1] > 0.99
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    applied = weights if path != "lagged" else jnp.roll(weights, 1, axis=0)
    for t in range(2, STEPS):
        task = t % 2
        np.testing.assert_allclose(states.task_weights[t, task], applied[t, task], rtol=1e-6)
        assert states.task_weights[t, 1 - task] == 0
        wanted = optax.tree.scale(applied[t, task], of_one(task, X[t]))
        np.testing.assert_allclose(grads["backbone"][t], wanted["backbone"], rtol=1e-5)
    if path != "every":
        contributions = states.weighting_state.inner_state.ema_norms[-1] * weights[-1]
        np.testing.assert_allclose(contributions[0], contributions[1], rtol=1e-5)


def test_averaged_weights_learn_nothing_from_such_batches():
    _, states = run(make_rule(average="weights"), "stacked")
    np.testing.assert_array_equal(states.next_task_weights, np.full((STEPS, 2), 0.5))


def test_an_average_around_it_learns_from_one_task_too():
    """Constant norms: the outer average of weights, debiased, is what the inner one says."""
    alone, around = (
        make_rule(),
        weighting.stabilize(make_rule(), warmup_steps=0, min_weight=0.0, debias=True, beta=0.5),
    )
    assert around.least_present == 1
    states = []
    for rule in (alone, around):
        tx = balance(rule, shared=lambda params: jax.tree.map(lambda _: True, params))
        state = tx.init(PARAMS)
        for step in range(12):
            grads = jax.tree.map(
                lambda p, t=step % 2: jnp.zeros((2, *p.shape)).at[t].set(100.0**-t), PARAMS
            )
            _, state = tx.update(grads, state, PARAMS, task_mask=jnp.arange(2) == step % 2)
        states.append(state)
    np.testing.assert_allclose(
        states[1].next_task_weights, states[0].next_task_weights, rtol=0, atol=1e-3
    )
    assert states[1].next_task_weights[1] > 0.9


def test_normalized_shows_it_no_norms():
    with pytest.raises(ValueError, match=r"Put stabilize around: stabilize\(normalized\(...\)\)"):
        weighting.normalized(make_rule())


def test_a_nan_in_such_a_batch_is_not_averaged():
    tx = balance(make_rule())
    state = tx.init(PARAMS)
    for task in (0, 1):
        grads = jax.tree.map(
            lambda p, t=task: jnp.zeros((2, *p.shape)).at[t].set(100.0**-t), PARAMS
        )
        _, state = tx.update(grads, state, PARAMS, task_mask=jnp.arange(2) == task)
    before = state
    grads = jax.tree.map(lambda p: jnp.zeros((2, *p.shape)).at[1].set(jnp.nan), PARAMS)
    _, state = tx.update(grads, state, PARAMS, task_mask=jnp.array([False, True]))
    assert state.nonfinite_count == 1
    np.testing.assert_array_equal(state.task_weights, [0, before.next_task_weights[1]])
    for kept, now in zip(
        jax.tree.leaves(before.weighting_state), jax.tree.leaves(state.weighting_state), strict=True
    ):
        np.testing.assert_array_equal(kept, now)
