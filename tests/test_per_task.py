"""per_task: the same as the transform on each task's gradient by hand, in a chain, and errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from gaba_jax import balance, gaba, per_task, task_value_and_grad, weighting
from tests.slow import rest_slow

K = 3
PARAMS = {"w": jnp.ones((4, 2)), "b": -jnp.ones(2), "frozen": None}
TRANSFORMS = {
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "clip": optax.clip(0.5),
    "ema": optax.ema(0.9),
    "trace": optax.trace(0.9),
    "scale_by_adam": optax.scale_by_adam(),
    "adamw": optax.adamw(1e-2),
    "identity": optax.identity(),
    "schedule": optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 3)),
    "apply_if_finite": optax.apply_if_finite(optax.ema(0.9), 5),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.ema(0.5), True)),
}
every_transform = pytest.mark.parametrize("name", rest_slow(TRANSFORMS, fast=["adamw", "chain"]))


def gradients(steps=4):
    """Leaves [steps, K, ...], tasks of different scale."""
    random, scale = np.random.default_rng(0), np.array([100, 1, 0.01])
    return jax.tree.map(
        lambda p: jnp.asarray(
            random.normal(size=(steps, K, *p.shape)) * scale.reshape(1, K, *[1] * p.ndim),
            jnp.float32,
        ),
        PARAMS,
    )


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def run(tx, grads):
    """The updates of all steps, and the last state."""

    def step(state, grads):
        updates, state = tx.update(grads, state, PARAMS)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(PARAMS), grads)
    return updates, state


@every_transform
def test_as_each_task_by_hand(name):
    tx, grads = TRANSFORMS[name], gradients()
    updates, state = run(per_task(tx, K), grads)
    for task in range(K):
        of_task = jax.tree.map(lambda leaf, i=task: leaf[:, i], grads)
        expected_updates, expected = run(tx, of_task)
        actual = jax.tree.map(lambda leaf, i=task: leaf[:, i], updates)
        chex.assert_trees_all_close(actual, expected_updates, rtol=1e-5, atol=1e-7)
        chex.assert_trees_all_close(at(state, task), expected, rtol=1e-5, atol=1e-7)


@every_transform
def test_jitted_or_not_the_state_keeps_its_types_and_can_be_donated(name):
    tx, grads = per_task(TRANSFORMS[name], K), gradients()
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.jit(tx.init)(PARAMS))
    eager_updates, eager = tx.update(at(grads, 0), state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(eager, state)
    donating = jax.jit(tx.update, donate_argnums=1, keep_unused=True)
    updates, after = donating(at(grads, 0), state, PARAMS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    chex.assert_trees_all_close((updates, after), (eager_updates, eager), rtol=1e-5, atol=1e-7)
    donating(at(grads, 1), after, PARAMS)
    assert donating._cache_size() == 1


@pytest.mark.slow
def test_in_a_chain_with_gaba():
    """The norms that gaba measures are those of the clipped gradients; the rest is as by hand."""

    def losses_fn(params, x):
        h = jnp.tanh(x @ params["trunk"])
        return 500.0 * jnp.mean((h @ params["a"] - 1) ** 2), jnp.mean((h @ params["b"]) ** 2)

    params = {"trunk": jnp.ones((3, 2)), "a": jnp.ones(2), "b": jnp.ones(2)}
    clip, rule = optax.clip_by_global_norm(0.5), gaba(warmup_steps=0, debias=True)
    tx = optax.chain(per_task(clip), rule, optax.adamw(1e-2))
    by_hand = optax.chain(rule, optax.adamw(1e-2))
    update = jax.jit(tx.update)
    mine, theirs, state, expected = params, params, tx.init(params), by_hand.init(params)
    for seed in range(5):
        x = jax.random.normal(jax.random.key(seed), (8, 3))
        losses, grads = task_value_and_grad(losses_fn)(mine, x)
        updates, state = update(grads, state, mine, task_losses=losses)
        mine = optax.apply_updates(mine, updates)
        _, grads = task_value_and_grad(losses_fn)(theirs, x)
        clipped = [clip.update(at(grads, i), clip.init(theirs))[0] for i in range(2)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *clipped)
        updates, expected = by_hand.update(stacked, expected, theirs)
        theirs = optax.apply_updates(theirs, updates)
    chex.assert_trees_all_close(mine, theirs, rtol=1e-5)
    assert np.all(optax.tree.get(state, "task_norms") <= 0.5 + 1e-6)


def test_losses_and_masks_reach_what_follows():
    tx = optax.chain(per_task(optax.clip(1.0)), balance(weighting.uncertainty(2)))
    params, grads = jnp.zeros(2), jnp.array([[3.0, 4.0], [jnp.nan, 1.0]])
    losses, mask = jnp.array([2.0, 1.0]), jnp.array([True, False])
    updates, state = tx.update(grads, tx.init(params), params, task_losses=losses, task_mask=mask)
    np.testing.assert_allclose(updates, [2, 2])
    np.testing.assert_array_equal(state[1].task_weights, [2, 0])


def test_a_nan_stays_with_its_task():
    tx = per_task(optax.chain(optax.clip_by_global_norm(1.0), optax.ema(0.9)), K)
    grads, kept = gradients(), np.array([0, 2])
    poisoned = grads | {"b": grads["b"].at[0, 1, 0].set(jnp.nan)}
    (expected_updates, expected), (updates, state) = run(tx, grads), run(tx, poisoned)
    of_the_others = jax.tree.map(lambda leaf: leaf[:, kept], (updates, expected_updates))
    chex.assert_trees_all_equal(*of_the_others)
    chex.assert_trees_all_equal(at(state, kept), at(expected, kept))
    assert np.isnan(updates["w"][-1, 1]).all()  # its average, from then on


def test_parameters_in_the_state_are_told_from_the_rest():
    tx = optax.chain(per_task(optax.scale_by_adam(), K), gaba(K), optax.scale_by_adam())
    params = {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}
    state = tx.init(params)
    specs = {"w": PartitionSpec("data"), "b": PartitionSpec()}
    mapped = optax.tree_map_params(
        tx,
        lambda leaf, spec: (leaf.shape, spec),
        state,
        specs,
        transform_non_params=lambda _: "no",
    )
    assert mapped[0].mu["w"] == ((K, 4, 2), PartitionSpec("data"))
    assert mapped[2].mu["w"] == ((4, 2), PartitionSpec("data"))
    assert mapped[0].count == mapped[2].count == "no"


def test_all_dtypes_and_one_task():
    params = {
        "half": jnp.ones(2, jnp.bfloat16),
        "masked": optax.MaskedNode(),
        "scalar": jnp.ones([]),
    }
    grads = {"half": jnp.ones((1, 2), jnp.bfloat16), "masked": optax.MaskedNode()}
    grads |= {"scalar": jnp.array([3.0])}
    tx = per_task(optax.ema(0.5, debias=False), 1)
    updates, state = jax.jit(functools.partial(tx.update, anything=None))(grads, tx.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    np.testing.assert_array_equal(state.ema["scalar"], [1.5])
    np.testing.assert_array_equal(state.count, [1])


def test_no_parameters():
    tx = per_task(optax.ema(0.5), 2)
    updates, _ = tx.update({}, tx.init({}), {})
    assert updates == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: per_task(0.1), r"tx must be an optax transform.*got 0.1"),
        (lambda: per_task(optax.clip, 2), "tx must be an optax transform"),
        (lambda: per_task(optax.clip(1.0), 0), "num_tasks=0 must be at least 1"),
        (lambda: per_task(optax.clip(1.0), 2.0), "integer, got 2.0"),
    ],
)
def test_errors_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"w": jnp.ones((4, 2))}, r"'w' has shape \(4, 2\).*leading axis must be the 2 tasks"),
        ({"w": jnp.ones((2, 4, 3))}, r"'w' has shape \(2, 4, 3\).*must have shape \(2, 4, 2\)"),
        ({"w": jnp.ones((2, 4, 2), jnp.int32)}, "has dtype int32"),
        ({"v": jnp.ones((2, 4, 2))}, "updates has the leaves v, but params has w"),
    ],
)
def test_errors_at_update(grads, message):
    tx, params = per_task(optax.clip(1.0), 2), {"w": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.update, grads, tx.init(params), params)
