"""Inverse-Dirichlet weights by themselves; what they share is in the tests of lr_annealing."""

import jax.numpy as jnp
import numpy as np
import pytest

from gaba_jax import balance, weighting


def weights_of(grads, **options):
    """The weights after one update on gradients [K, n]."""
    tx = balance(weighting.inverse_dirichlet(len(grads), **options), shared=True)
    grads = jnp.asarray(grads, jnp.float32)
    return tx.update(grads, tx.init(grads[0]))[1].task_weights


def test_the_default_keeps_half():
    grads = np.array([[6.0, -2.0], [0.1, 0.5], [1.0, 3.0]])
    ratios = grads.std(axis=1).max() / grads.std(axis=1)
    np.testing.assert_allclose(weights_of(grads), (1 + ratios) / 2, rtol=1e-5)
    np.testing.assert_allclose(weights_of(grads, beta=0.0), ratios, rtol=1e-5)


def test_equal_contributions_where_the_mean_is_small():
    """As the docstring says, and not where the mean is large."""
    grads = np.random.default_rng(3).normal(size=(3, 12))
    grads -= grads.mean(axis=1, keepdims=True)
    grads *= np.array([100, 1, 0.01])[:, None]
    contributions = weights_of(grads, beta=0.0) * np.linalg.norm(grads, axis=1)
    np.testing.assert_allclose(contributions, contributions[0], rtol=1e-4)
    grads[1] += 5
    contributions = weights_of(grads, beta=0.0) * np.linalg.norm(grads, axis=1)
    assert contributions[1] > 3 * contributions[0]


def test_permuted_tasks_and_a_common_factor():
    grads = np.random.default_rng(4).normal(size=(4, 9)) * np.array([[1e3], [1.0], [1e-3], [7.0]])
    order = [2, 0, 3, 1]
    weights = weights_of(grads)
    np.testing.assert_allclose(weights_of(grads[order]), weights[np.array(order)], rtol=1e-5)
    np.testing.assert_allclose(weights_of(grads * 1e6), weights, rtol=1e-4)


def test_a_gradient_without_spread_keeps_its_weight():
    np.testing.assert_array_equal(weights_of([[2.0, 2.0], [0.0, 0.0]]), [1, 1])


def test_complex_gradients_raise():
    tx = balance(weighting.inverse_dirichlet(2), shared=True)
    grads = jnp.ones((2, 3), jnp.complex64)
    with pytest.raises(ValueError, match="statistic 'std' must return real scalars"):
        tx.update(grads, tx.init(grads[0]))
