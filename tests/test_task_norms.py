"""Gradient norms of the tasks, as balance measures them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import balance, exclude, only, task_norms, weighting

PARAMS = {
    "backbone": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)},
    "a": jnp.zeros(3),
    "b": jnp.zeros(()),
}


def gradients(scale=(500.0, 1.0), seed=0):
    rng = np.random.default_rng(seed)

    def of(path, param):
        grad = rng.normal(size=(2, *param.shape))
        if path[0].key in "ab":  # a head has a gradient of its own task only
            grad["ba".index(path[0].key)] = 0
        return jnp.asarray(grad * np.reshape(scale, (2,) + (1,) * param.ndim), jnp.float32)

    return jax.tree.map_with_path(of, PARAMS)


def expected(grads, *leaves):
    flat = [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in leaves]
    return np.linalg.norm(np.concatenate(flat, axis=1), axis=1)


@pytest.mark.parametrize("scale", [(500.0, 1.0), (1e-30, 1e30)])
@pytest.mark.parametrize("jitted", [False, True])
def test_they_are_of_the_shared_parameters(scale, jitted):
    grads = gradients(scale)
    norms = (jax.jit(task_norms) if jitted else task_norms)(grads)
    assert norms.dtype == jnp.float32
    backbone = jax.tree.leaves(grads["backbone"])
    np.testing.assert_allclose(norms, expected(grads, *backbone), rtol=1e-6)
    tx = balance(weighting.inverse_norm(2))
    np.testing.assert_array_equal(norms, tx.update(grads, tx.init(PARAMS))[1].task_norms)


def test_of_parameters_that_are_named():
    grads = gradients()
    everything = expected(grads, *jax.tree.leaves(grads))
    np.testing.assert_allclose(task_norms(grads, shared=True), everything, rtol=1e-6)
    bias = expected(grads, grads["backbone"]["bias"])
    np.testing.assert_allclose(task_norms(grads, shared=only("backbone.bias")), bias, rtol=1e-6)
    np.testing.assert_array_equal(task_norms(grads, shared=exclude("a", "b")), task_norms(grads))


def test_a_task_that_is_not_finite_keeps_it_to_itself():
    grads = gradients()
    sound = task_norms(grads)
    grads["backbone"]["bias"] = grads["backbone"]["bias"].at[1, 0].set(jnp.nan)
    norms = task_norms(grads)
    assert jnp.isnan(norms[1])
    assert norms[0] == sound[0]


def test_edges():
    np.testing.assert_array_equal(task_norms(jnp.array([[3.0, 4.0]])), [5])
    apart = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_array_equal(task_norms(apart), [0, 0])
    np.testing.assert_array_equal(task_norms(apart, shared=True), [5, 0])
    masked = {"x": apart, "y": None, "z": optax.MaskedNode()}
    np.testing.assert_array_equal(task_norms(masked, shared=True), [5, 0])
    half = jnp.full((2, 1000), 300.0, jnp.float16)  # whose squares float16 does not hold
    np.testing.assert_allclose(task_norms(half), 300 * 1000**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("grads", "shared", "message"),
    [
        ({}, None, "grads has no leaves. Pass the gradients that task_value_and_grad returns"),
        (jnp.ones(()), None, r"grads leaf '.*' has shape \(\), but its leading axis must be the"),
        (
            {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))},
            None,
            r"grads leaf 'b' has shape \(3, 3\)",
        ),
        ({"a": jnp.ones((2, 3), jnp.int32)}, None, "grads leaf 'a' has dtype int32"),
        ({"a": jnp.ones((2, 3))}, only("b"), "'b' matches no parameter"),
        ({"a": jnp.ones((2, 3))}, False, "shared selects no parameter"),
    ],
)
def test_what_does_not_fit(grads, shared, message):
    with pytest.raises(ValueError, match=message):
        task_norms(grads, shared=shared)
