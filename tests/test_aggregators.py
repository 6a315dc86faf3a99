"""grad_drop and trimmed_mean: by hand, masks, NaNs, types, and what every transform here holds."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from gaba_jax import balance, grad_drop, trimmed_mean, weighting
from gaba_jax._selection import OVERWRITTEN
from gaba_jax.weighting._random import next_key
from tests.debugging import MODES
from tests.slow import rest_slow

K = 5
MAKE = {"grad_drop": lambda: grad_drop(K, seed=3), "trimmed_mean": lambda: trimmed_mean(K, 1)}
both = pytest.mark.parametrize("name", MAKE)
PARAMS = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3), "frozen": None}
VALUES = np.array(
    [[1.0, -4, 0.5], [2, 7, 0.25], [30, -1, -8], [-5, 0, 2], [0.5, 1, 1e6]], np.float32
)


def gradients(steps=3):
    """Leaves [steps, K, ...]."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: jnp.asarray(random.normal(size=(steps, K, *p.shape)), jnp.float32), PARAMS
    )


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def aggregated(tx, grads, **extra):
    """The update of one leaf."""
    grads = jnp.asarray(grads)
    return np.asarray(tx.update(grads, tx.init(grads[0]), **extra)[0])


@pytest.mark.parametrize(
    ("trim", "expected"),
    [
        (0, [5.7, 0.6, 199998.95]),
        (1, [1.1666666666666667, 0.0, 0.9166666666666666]),
        (2, [1.0, 0.0, 0.5]),
    ],
)
def test_the_trimmed_mean_is_that_of_torchjd(trim, expected):
    """Of version 0.18."""
    np.testing.assert_allclose(aggregated(trimmed_mean(K, trim), VALUES), expected, rtol=1e-6)


def test_the_trimmed_mean_of_those_present():
    """Of four the extremes are dropped, of two none, and the others are never read."""
    tx = trimmed_mean(K, 1)
    poisoned = np.where(np.arange(K)[:, None] == 2, np.nan, VALUES).astype(np.float32)
    four = np.sort(np.delete(VALUES, 2, axis=0), axis=0)[1:-1].mean(axis=0)
    mask = jnp.arange(K) != 2
    np.testing.assert_allclose(aggregated(tx, poisoned, task_mask=mask), four, rtol=1e-6)
    few = jnp.arange(K) < 2
    np.testing.assert_allclose(
        aggregated(tx, poisoned, task_mask=few), VALUES[:2].mean(axis=0), rtol=1e-6
    )
    np.testing.assert_array_equal(aggregated(tx, poisoned, task_mask=few & ~few), 0)


def test_the_trimmed_mean_drops_what_is_not_finite():
    """As many as are trimmed; one more and it shows."""
    bad = VALUES.copy()
    bad[1, 0], bad[1, 1] = np.nan, -np.inf
    expected = [np.sort(np.delete(VALUES[:, 0], 1))[1:].mean(), np.mean([-4, -1, 0])]
    np.testing.assert_allclose(aggregated(trimmed_mean(K, 1), bad)[:2], expected, rtol=1e-6)
    bad[2, 0] = np.nan
    assert np.isnan(aggregated(trimmed_mean(K, 1), bad)[0])


def test_grad_drop_by_hand():
    """As the paper writes it, task by task, with the same draws."""
    tx, grads = grad_drop(K, seed=3), at(gradients(), 0)
    updates, _ = tx.update(grads, tx.init(PARAMS))
    _, draw = next_key(tx.init(PARAMS).key_data)
    for number, name in enumerate(["bias", "kernel"]):
        each = np.asarray(grads[name], float)
        uniform = np.asarray(jax.random.uniform(jax.random.fold_in(draw, number), each.shape[1:]))
        purity = (1 + each.sum(axis=0) / np.abs(each).sum(axis=0)) / 2
        kept = (purity > uniform) * (each > 0) + (purity < uniform) * (each < 0)
        np.testing.assert_allclose(updates[name], (kept * each).sum(axis=0), rtol=1e-5)
    assert np.any(purity > uniform)
    assert np.any(purity < uniform)


def test_grad_drop_draws_each_sign_as_often_as_it_has_weight():
    """And is right on average: the mean of the draws is between the sums of either sign."""
    grads = jnp.broadcast_to(jnp.array([3.0, -1.0, 0.0, 0.0, 0.0])[:, None], (K, 20_000))
    first = aggregated(grad_drop(K, seed=1), grads)
    assert set(first) == {3.0, -1.0}
    np.testing.assert_allclose(np.mean(first == 3), 0.75, atol=0.015)
    tx = grad_drop(K, seed=1)
    _, state = tx.update(grads, tx.init(grads[0]))
    second, _ = tx.update(grads, state)
    np.testing.assert_allclose(np.mean(np.asarray(second) == first), 0.625, atol=0.02)


def test_grad_drop_where_signs_agree():
    """A head of one task, and a coordinate that nobody moves."""
    grads = np.zeros((K, 3), np.float32)
    grads[2, 0], grads[:, 1] = -7, 0.25
    np.testing.assert_array_equal(aggregated(grad_drop(K), grads), [-7, 1.25, 0])


def test_grad_drop_masks_and_nans():
    grads = VALUES.copy()
    grads[1, 0] = np.nan
    assert np.isnan(aggregated(grad_drop(K), grads)[0])
    present = jnp.arange(K) != 1
    actual = aggregated(grad_drop(K), grads, task_mask=present)
    kept = np.delete(VALUES, 1, axis=0)
    for one, column in zip(actual, kept.T, strict=True):
        assert min(abs(one - column[column > 0].sum()), abs(one - column[column < 0].sum())) < 1e-4
    np.testing.assert_array_equal(aggregated(grad_drop(K), grads, task_mask=jnp.zeros(K, bool)), 0)


@both
def test_jitted_scanned_donated_and_traced_once(name):
    tx, grads = optax.chain(MAKE[name](), optax.sgd(0.1, momentum=0.9)), gradients()
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.jit(tx.init)(PARAMS))
    update = jax.jit(functools.partial(tx.update, task_losses=None, anything="else"))
    donating = jax.jit(tx.update, donate_argnums=1, keep_unused=True)
    eager, jitted, donated = state, state, jax.tree.map(jnp.copy, state)
    for t in range(3):
        expected, eager = tx.update(at(grads, t), eager, PARAMS)
        actual, jitted = update(at(grads, t), jitted, PARAMS)
        _, donated = donating(at(grads, t), donated, PARAMS)
        chex.assert_trees_all_close((actual, jitted), (expected, eager), rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal_shapes_and_dtypes(actual, PARAMS)
    assert update._cache_size() == donating._cache_size() == 1
    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(jitted))
    scanned, updates = jax.lax.scan(lambda s, g: tx.update(g, s, PARAMS)[::-1], state, grads)
    chex.assert_trees_all_close(scanned, eager, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(at(updates, -1), expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(donated, eager, rtol=1e-5, atol=1e-6)


@both
def test_leaves_of_all_kinds(name):
    params = {
        "bfloat16": jnp.ones((2, 3), jnp.bfloat16),
        "float16": jnp.float16(1),
        "empty": jnp.zeros((0, 2)),
        "masked": optax.MaskedNode(),
        OVERWRITTEN: {"scale": jnp.ones(2)},
    }
    scale = jnp.arange(1.0, K + 1)
    grads = jax.tree.map(
        lambda p: (scale.reshape(-1, *[1] * p.ndim) * jnp.ones(p.shape)).astype(p.dtype), params
    )
    tx = MAKE[name]()
    with MODES["strict_promotion"]():
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    expected = 15 if name == "grad_drop" else 3
    np.testing.assert_allclose(np.float32(updates["bfloat16"]), expected)
    np.testing.assert_allclose(np.float32(updates["float16"]), expected)
    np.testing.assert_array_equal(updates[OVERWRITTEN]["scale"], K)  # the largest, as in balance


@both
def test_float64(name):
    with jax.enable_x64(True):
        grads = jnp.asarray(VALUES, jnp.float64) + 1e-12
        tx = MAKE[name]()
        state = tx.init(grads[0])
        update, after = tx.update(grads, state)
        assert update.dtype == jnp.float64
    chex.assert_trees_all_equal_shapes_and_dtypes(after, MAKE[name]().init(PARAMS))


@both
def test_parameters_in_the_state_are_told_from_the_rest(name):
    tx = optax.chain(MAKE[name](), optax.trace(0.9))
    state = tx.init(PARAMS)
    mapped = optax.tree_map_params(tx, lambda p: p.shape, state, transform_non_params=lambda _: 0)
    assert mapped[1].trace["kernel"] == (4, 3)
    assert jax.tree.leaves(mapped[0]) == [0] * (name == "grad_drop")


@both
def test_lowers_for_tpu_and_cuda(name):
    tx = MAKE[name]()
    step = jax.jit(lambda grads, state: tx.update(grads, state, PARAMS))
    exported = export.export(step, platforms=["tpu", "cuda"])(at(gradients(), 0), tx.init(PARAMS))
    assert exported.platforms == ("tpu", "cuda")


@pytest.mark.parametrize("name", rest_slow(MAKE, fast=["grad_drop"]))
def test_vmap_over_runs(name):
    tx, grads = MAKE[name](), gradients(4)
    states = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(4))
    updates, _ = jax.vmap(tx.update)(grads, states)
    each = [tx.update(at(grads, i), tx.init(PARAMS))[0] for i in range(4)]
    chex.assert_trees_all_close(updates, jax.tree.map(lambda *u: jnp.stack(u), *each), rtol=1e-5)


def test_seeds_under_inject_hyperparams():
    made = optax.inject_hyperparams(grad_drop, static_args=("num_tasks",))
    tx, plain = made(num_tasks=K, seed=3), grad_drop(K, seed=3)
    grads = at(gradients(), 0)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates, plain.update(grads, plain.init(PARAMS))[0])


def test_heads_beside_a_trimmed_mean():
    """As its documentation says: a head that one task moves is outvoted, and goes elsewhere."""
    params = {"trunk": jnp.zeros(3), "head": jnp.zeros(1)}
    grads = {"trunk": jnp.asarray(VALUES), "head": jnp.zeros((K, 1)).at[1].set(5.0)}
    alone = trimmed_mean(K, 1)
    updates, _ = alone.update(grads, alone.init(params), params)
    np.testing.assert_array_equal(updates["head"], [0])
    tx = optax.partition(
        {"trunk": trimmed_mean(K, 1), "head": balance(weighting.uniform(K))},
        {"trunk": "trunk", "head": "head"},
    )
    both_, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_array_equal(both_["trunk"], updates["trunk"])
    np.testing.assert_allclose(both_["head"], [1], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grad_drop(2.0), r"num_tasks must be an integer, got 2.0"),
        (lambda: grad_drop(2, seed=-1), "seed=-1 must be a whole number"),
        (lambda: trimmed_mean(0, 0), "num_tasks=0 must be at least 1"),
        (lambda: trimmed_mean(4, 2), r"trim=2 must be at least 0 and leave one.*at most 1"),
        (lambda: trimmed_mean(4, -1), "trim=-1 must be at least 0"),
        (lambda: trimmed_mean(4, 0.2), "trim=0.2 must be an integer"),
    ],
)
def test_errors_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@both
@pytest.mark.parametrize(
    ("grads", "extra", "message"),
    [
        (jnp.ones((4, 2)), {}, r"shape \(4, 2\).*leading axis must be the 5 tasks"),
        (jnp.ones((K, 3)), {}, r"shape \(5, 3\).*must have shape \(5, 2\)"),
        (jnp.ones((K, 2), jnp.int32), {}, "has dtype int32"),
        (jnp.ones((K, 2), jnp.complex64), {}, "is complex.*no order"),
        (jnp.ones((K, 2)), {"task_mask": jnp.ones(K)}, "task_mask must be a bool array"),
    ],
)
def test_errors_at_update(name, grads, extra, message):
    tx, params = MAKE[name](), {"w": jnp.ones(2)}
    update = functools.partial(tx.update, **extra)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(update, {"w": grads}, tx.init(params), params)
