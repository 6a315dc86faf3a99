"""Norms and cosines: accuracy over dtypes and scales."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import _statistics, balance, task_value_and_grad
from gaba_jax import weighting as weightings
from gaba_jax._checks import check_stacked

SCALES = [1e-30, 1e-25, 1e-19, 1e-8, 1.0, 1e6, 1e18, 1e30]


def measurement_of(leaves, with_cosines=False):
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    wanted = (True,) * len(leaves)
    return _statistics.measure_stacked(
        leaves, wanted, leaves[0].shape[0], _statistics.Reads(with_cosines)
    )


def norms_of(leaves):
    norms = measurement_of(leaves).norms
    return _statistics.combine_norms(norms, jnp.ones(len(norms), bool))


def cosines_of(leaves, measured):
    measurement = measurement_of(leaves, with_cosines=True)
    norms = _statistics.combine_norms(measurement.norms, measured)
    return _statistics.combine_cosines(measurement, measured, norms)


def exact(leaves):
    return [
        np.sqrt(sum(np.sum(np.asarray(leaf[i], np.float64) ** 2) for leaf in leaves))
        for i in range(leaves[0].shape[0])
    ]


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_norms_over_scales(scale, jitted):
    rng = np.random.default_rng(0)
    leaves = [
        (rng.normal(size=(3, 20, 7)) * scale).astype(np.float32),
        (rng.normal(size=(3, 5)) * scale).astype(np.float32),
        np.full((3,), scale, np.float32),  # a scalar parameter
        np.zeros((3, 0), np.float32),  # an empty one
    ]
    actual = (jax.jit(norms_of) if jitted else norms_of)(leaves)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, exact(leaves), rtol=1e-6)


def test_norms_of_tasks_on_very_different_scales():
    rng = np.random.default_rng(1)
    leaf = (rng.normal(size=(4, 300)) * np.array([[1e-30], [1e-4], [1e5], [1e30]])).astype("f4")
    np.testing.assert_allclose(jax.jit(norms_of)([leaf]), exact([leaf]), rtol=1e-6)


def test_norm_where_leaves_of_one_task_are_on_different_scales():
    leaves = [np.full((2, 9), 1e-28, np.float32), np.full((2, 4), [[3e-28], [1e20]], np.float32)]
    np.testing.assert_allclose(jax.jit(norms_of)(leaves), exact(leaves), rtol=1e-6)


@pytest.mark.parametrize("value", [0.1, 300.0, 1000.0])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_leaves_accumulate_in_float32(dtype, value):
    leaf = jnp.full((2, 1000), value, dtype)
    np.testing.assert_allclose(norms_of([leaf]), exact([leaf]), rtol=1e-6)


def test_many_tasks_and_leaves_take_one_reduction_a_leaf():
    rng = np.random.default_rng(3)
    leaves = [rng.normal(size=(64, 3)).astype(np.float32) * 10.0**power for power in range(-4, 5)]
    assert 64 * len(leaves) > _statistics._MOST_SLICES
    np.testing.assert_allclose(jax.jit(norms_of)(leaves), exact(leaves), rtol=1e-6)


def test_a_million_equal_elements():
    leaf = jnp.full((2, 1000, 1000), 0.1, jnp.float32)
    np.testing.assert_allclose(jax.jit(norms_of)([leaf]), exact([leaf]), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_nonfinite_element_shows_in_its_task_alone(value):
    leaf = jnp.ones((3, 4)).at[1, 2].set(value)
    finite = np.isfinite(norms_of([leaf]))
    np.testing.assert_array_equal(finite, [True, False, True])


def test_complex_leaves_count_by_modulus():
    np.testing.assert_allclose(norms_of([jnp.array([[3 + 4j, 0], [0, 1j]])]), [5, 1], rtol=1e-6)


def test_float64_leaves_under_x64():
    with jax.enable_x64(True):
        leaf = jnp.array([[1e-30, 2e-30], [1e30, 0]], jnp.float64)
        actual = norms_of([leaf])
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, exact([leaf]), rtol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_cosines(scale):
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(4, 60))
    rows[3] = 0
    gram = rows @ rows.T
    norms = np.sqrt(np.diag(gram))
    expected = gram / np.where(norms, norms, 1)[:, None] / np.where(norms, norms, 1)
    np.fill_diagonal(expected, 1)
    rows = rows * np.array([[scale], [1.0], [500.0], [1.0]])
    leaves = [jnp.asarray(part, jnp.float32) for part in np.split(rows, [10, 35], axis=1)]
    cosines = jax.jit(cosines_of)(leaves, jnp.ones(3, bool))
    np.testing.assert_allclose(cosines, expected, atol=1e-6)


def test_none_and_masked_node_leaves_pass_through():
    tx = balance(weightings.inverse_share(2))
    params = {"a": jnp.zeros(2), "frozen": None, "masked": optax.MaskedNode()}
    grads = {"a": jnp.array([[3.0, 4.0], [1.0, 0.0]]), "frozen": None, "masked": optax.MaskedNode()}
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(state.task_norms, [5, 1], rtol=1e-6)
    assert updates["frozen"] is None
    assert updates["masked"] == optax.MaskedNode()
    assert updates["a"].shape == (2,)


PARAMS = {"layer": {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}}


class TestContract:
    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((3, 2), (2, 2)), r"layer.w.*shape \(3, 2\).*must be the 2 tasks"),
            (((2, 3, 2), ()), r"layer.b.*shape \(\)"),
            (((2, 2), (2, 2)), r"layer.w.*must have shape \(2, 3, 2\)"),
            (((3, 3, 2), (3, 2)), r"layer.b.*num_tasks=2.*task_value_and_grad.*first in the chain"),
        ],
    )
    def test_message_names_leaf_shapes_and_remedy(self, shapes, message):
        updates = {"layer": {"w": jnp.zeros(shapes[0]), "b": jnp.zeros(shapes[1])}}
        with pytest.raises(ValueError, match=message):
            check_stacked(updates, PARAMS, 2, 2)

    def test_another_tree(self):
        with pytest.raises(ValueError, match="1 leaves, but init saw parameters with 2"):
            check_stacked({"w": jnp.zeros((2, 3))}, PARAMS, 2, 2)
        with pytest.raises(
            ValueError,
            match=r"updates has the leaves layer.b, layer.v, but params has layer.b, layer.w",
        ):
            check_stacked({"layer": {"v": jnp.zeros((2, 3)), "b": jnp.zeros((2, 2))}}, PARAMS, 2, 2)

    def test_plain_gradients_raise_at_trace_time(self):
        tx = balance(weightings.uniform(2))
        state = tx.init(PARAMS)
        with pytest.raises(ValueError, match="Pass the output of task_value_and_grad"):
            jax.jit(tx.update)(PARAMS, state, PARAMS)


def test_cosines_by_slices_are_those_by_leaf(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(3, 5, 4), (3, 7), (3,)]
    leaves = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    measured = jnp.array([True, True, False])
    by_slices = cosines_of(leaves, measured)
    monkeypatch.setattr(_statistics, "_MOST_SLICES", 0)
    _statistics.measure_stacked.clear_cache()  # it was traced with another number
    np.testing.assert_allclose(by_slices, cosines_of(leaves, measured), atol=1e-6)
    flat = np.concatenate([np.reshape(leaf, (3, -1)) for leaf in leaves[:2]], axis=1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(by_slices, flat @ flat.T, atol=1e-6)


def test_norms_do_not_build_the_stack():
    """In one program with the backward passes, the task gradients stay apart."""
    params = [jnp.ones((256, 256)) for _ in range(4)]

    def losses_fn(params, x):
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x), jnp.mean(x**2)

    tx = balance(weightings.inverse_norm(2))

    def step(params, state, x):
        return tx.update(task_value_and_grad(losses_fn)(params, x)[1], state, params)

    compiled = jax.jit(step).lower(params, tx.init(params), jnp.ones((8, 256))).compile()
    stack = 2 * sum(leaf.nbytes for leaf in params)
    assert compiled.memory_analysis().temp_size_in_bytes < 1.25 * stack
