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


def test_failure_biased_squared_error_and_its_gradient() -> None:
    predicted, true = jnp.array([3.0, 50.0, 120.0, 200.0]), jnp.array([0.0, 62.5, 125.0, 190.0])
    loss = losses.failure_biased_squared_error
    value, gradient = jax.jit(jax.value_and_grad(loss))(predicted, true)
    weights = np.array([2.0, 1.5, 1.0, 1.0])
    errors = np.asarray(predicted - true)
    assert float(value) == pytest.approx((weights * errors**2).sum() / 4)
    np.testing.assert_allclose(gradient, weights * errors / 2, rtol=1e-6)
    assert value.shape == ()
    assert value.dtype == jnp.float32
    other = loss(predicted, true, max_weight=5.0, min_weight=3.0, max_rul=62.5)
    assert float(other) == pytest.approx((np.array([5.0, 3, 3, 3]) * errors**2).sum() / 4)
    plain = loss(predicted, true, max_weight=1.0)
    assert float(plain) == pytest.approx(float(losses.mean_squared_error(predicted, true)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_weight": 0.5}, "min_weight=1.0 and max_weight=0.5"),
        ({"min_weight": 0.0}, "min_weight=0.0"),
        ({"max_rul": 0.0}, "max_rul=0.0 must be a positive number of cycles"),
    ],
)
def test_failure_biased_squared_error_refuses_numbers_out_of_range(
    options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        losses.failure_biased_squared_error(jnp.zeros(2), jnp.zeros(2), **options)


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
        (losses.failure_biased_squared_error, jnp.asarray(rul[0]), jnp.asarray(rul[1])),
        (losses.cross_entropy, jnp.asarray(logits), jnp.asarray(labels)),
    ):
        single = [loss(inputs[b : b + 1], targets[b : b + 1]) for b in range(8)]
        np.testing.assert_allclose(loss(inputs, targets), np.mean(single), rtol=1e-6)


@pytest.mark.parametrize(
    ("predicted", "true"), [((4, 1), (4,)), ((4,), (4, 1)), ((4,), (3,)), ((0,), (0,)), ((), ())]
)
def test_squared_errors_refuse_shapes_that_would_broadcast(
    predicted: tuple[int, ...], true: tuple[int, ...]
) -> None:
    for loss in (losses.mean_squared_error, losses.failure_biased_squared_error):
        with pytest.raises(ValueError, match=r"predicted and true must both be \[B\] .*got \("):
            loss(jnp.zeros(predicted), jnp.zeros(true))


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
