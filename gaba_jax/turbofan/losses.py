"""The losses of the two tasks, for a training step in JAX."""

import jax
import jax.numpy as jnp
import optax

from gaba_jax.turbofan.data import MAX_RUL


def mean_squared_error(predicted: jax.Array, true: jax.Array) -> jax.Array:
    r"""Mean squared error of the predicted RUL.

    .. math::
        \frac{1}{B} \sum_b (\hat y_b - y_b)^2

    Args:
        predicted: Predicted RUL :math:`\hat y`, in cycles, [B].
        true: True RUL :math:`y`, in cycles, [B].

    Returns:
        The loss, in cycles squared, [].

    Raises:
        ValueError: The shapes are not the same [B] with B >= 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> float(mean_squared_error(jnp.array([10.0, 20.0]), jnp.array([12.0, 20.0])))
        2.0
    """
    _check_ruls(predicted, true)
    return jnp.mean(optax.losses.squared_error(predicted, true))


def failure_biased_squared_error(
    predicted: jax.Array,
    true: jax.Array,
    *,
    max_weight: float = 2.0,
    min_weight: float = 1.0,
    max_rul: float = MAX_RUL,
) -> jax.Array:
    r"""AMNL: mean squared error of the predicted RUL, weighted up towards failure.

    .. math::
        \frac{1}{B} \sum_b w_b (\hat y_b - y_b)^2, \qquad
        w_b = w_{\max} - (w_{\max} - w_{\min}) \frac{\min(y_b, R)}{R}

    It is the mean of the weighted errors, not divided by the sum of the weights, so a batch near
    failure has the larger loss. Balanced by :func:`gaba_jax.gaba` it is called GRACE.

    Args:
        predicted: Predicted RUL :math:`\hat y`, in cycles, [B].
        true: True RUL :math:`y`, in cycles, not negative, [B].
        max_weight: Weight :math:`w_{\max}` at failure. Defaults to 2.
        min_weight: Weight :math:`w_{\min}` from ``max_rul`` on, positive and at most
            ``max_weight``. Defaults to 1.
        max_rul: :math:`R`, in cycles, positive. Defaults to 125.

    Returns:
        The loss, in cycles squared, [].

    Raises:
        ValueError: The shapes are not the same [B] with B >= 1, or a number is out of its range.

    Examples:
        >>> import jax.numpy as jnp
        >>> float(failure_biased_squared_error(jnp.array([2.0, 125.0]), jnp.array([0.0, 123.0])))
        6.032...
    """
    _check_ruls(predicted, true)
    if not 0 < min_weight <= max_weight < float("inf"):
        raise ValueError(f"{min_weight=} and {max_weight=} must be 0 < min_weight <= max_weight.")
    if not 0 < max_rul < float("inf"):
        raise ValueError(f"{max_rul=} must be a positive number of cycles.")
    weights = max_weight - (max_weight - min_weight) * jnp.minimum(true, max_rul) / max_rul
    return jnp.mean(weights * optax.losses.squared_error(predicted, true))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Mean cross entropy of the predicted health.

    .. math::
        -\frac{1}{B} \sum_b \log \operatorname{softmax}(z_b)_{c_b}

    Args:
        logits: Unnormalised log probabilities :math:`z` of the three classes, [B, 3].
        labels: True classes :math:`c`, integers from 0 to 2, [B]. Their range is not checked,
            since inside ``jax.jit`` it cannot be.

    Returns:
        The loss, in nats, [].

    Raises:
        ValueError: The shapes are not [B, 3] and [B] with B >= 1, or the labels no integers.

    Examples:
        >>> import jax.numpy as jnp
        >>> float(cross_entropy(jnp.zeros((4, 3)), jnp.array([0, 1, 2, 0]))).__round__(4)
        1.0986
    """
    batch = labels.shape[0] if labels.ndim == 1 else 0
    if logits.shape != (batch, 3) or not batch:
        raise ValueError(
            "logits and labels must be [B, 3] and [B] with B >= 1, "
            f"got {logits.shape} and {labels.shape}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}; pass class numbers.")
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def _check_ruls(predicted: jax.Array, true: jax.Array) -> None:
    if predicted.ndim != 1 or predicted.shape != true.shape or not predicted.shape[0]:
        raise ValueError(
            "predicted and true must both be [B] with B >= 1, "
            f"got {predicted.shape} and {true.shape}; squeeze a trailing axis of the RUL head."
        )
