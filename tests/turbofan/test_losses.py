"""The losses against numbers computed by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaba_jax.turbofan import losses


def test_mean_squared_error_and_its_gradient() -> None:
    predicted, true = jnp.array([10.0, 20.0, 30.0]), jnp.array([13.0, 20.0, 26.0])
    value, gradient = jax.jit(jax.value_and_grad(losses.mean_squared_error))(predicted, true)
    assert float(value) == pytest.approx((9 + 0 + 16) / 3)
    np.testing.assert_allclose(gradient, [-2.0, 0.0, 8 / 3], rtol=1e-6)
    assert value.shape == ()
    assert value.dtype == jnp.float32


def test_cross_entropy_and_its_gradient() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    labels = jnp.array([0, 1])
    value, gradient = jax.jit(jax.value_and_grad(losses.cross_entropy))(logits, labels)
    assert float(value) == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2)
    # (softmax - one hot) / B
    np.testing.assert_allclose(
        gradient, [[-0.25, 0.125, 0.125], [0.05, -0.4, 0.35]], rtol=1e-5, atol=1e-7
    )
    assert value.shape == ()


def test_cross_entropy_is_finite_for_large_logits() -> None:
    logits = jnp.array([[1e4, -1e4, 0.0]])
    assert float(losses.cross_entropy(logits, jnp.array([0]))) == 0.0
    assert float(losses.cross_entropy(logits, jnp.array([1]))) == 2e4


def test_a_batch_is_a_mean() -> None:
    generator = np.random.default_rng(0)
    rul, logits = generator.normal(size=(2, 8)), generator.normal(size=(8, 3))
    labels = generator.integers(0, 3, 8)
    for loss, inputs, targets in (
        (losses.mean_squared_error, jnp.asarray(rul[0]), jnp.asarray(rul[1])),
        (losses.cross_entropy, jnp.asarray(logits), jnp.asarray(labels)),
    ):
        single = [loss(inputs[b : b + 1], targets[b : b + 1]) for b in range(8)]
        np.testing.assert_allclose(loss(inputs, targets), np.mean(single), rtol=1e-6)


@pytest.mark.parametrize(
    ("predicted", "true"), [((4, 1), (4,)), ((4,), (4, 1)), ((4,), (3,)), ((0,), (0,)), ((), ())]
)
def test_mean_squared_error_refuses_shapes_that_would_broadcast(
    predicted: tuple[int, ...], true: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"predicted and true must both be \[B\] .*got \("):
        losses.mean_squared_error(jnp.zeros(predicted), jnp.zeros(true))


@pytest.mark.parametrize(
    ("logits", "labels"), [((4, 3), (3,)), ((4, 2), (4,)), ((4, 3), (4, 1)), ((0, 3), (0,))]
)
def test_cross_entropy_refuses_other_shapes(
    logits: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"logits and labels must be \[B, 3\] and \[B\]"):
        losses.cross_entropy(jnp.zeros(logits), jnp.zeros(labels, jnp.int32))


def test_cross_entropy_refuses_labels_that_are_no_integers() -> None:
    with pytest.raises(ValueError, match=r"labels must be integers, got float32"):
        losses.cross_entropy(jnp.zeros((4, 3)), jnp.zeros(4))
