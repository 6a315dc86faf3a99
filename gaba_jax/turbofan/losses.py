"""The losses of the two tasks, for a training step in JAX."""

import jax
import jax.numpy as jnp
import optax


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
    if predicted.ndim != 1 or predicted.shape != true.shape or not predicted.shape[0]:
        raise ValueError(
            "predicted and true must both be [B] with B >= 1, "
            f"got {predicted.shape} and {true.shape}; squeeze a trailing axis of the RUL head."
        )
    return jnp.mean(optax.losses.squared_error(predicted, true))


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
