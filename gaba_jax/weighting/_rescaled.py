"""The same rule with another sum of weights."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gaba_jax._stats import TaskStats
from gaba_jax.weighting._base import Number, Weighting, check_positive, check_weighting


def rescaled(weighting: Weighting, total: Number) -> Weighting:
    r"""Scales a rule's weights so that they sum to ``total``.

    .. math:: \lambda_i' = \text{total} \cdot \lambda_i / \textstyle\sum_j \lambda_j

    ``total=K`` gives the gradient scale of an unweighted sum of losses, so that a learning rate or
    a clipping threshold tuned on ``loss_1 + loss_2`` carries over.

    Args:
      weighting: any :class:`Weighting` whose weights have a positive sum (weights with a sum of
        zero or less are left as they are).
      total: the sum, positive.

    Returns:
      A :class:`Weighting` with the same state.

    Raises:
      ValueError: ``total`` is not positive and finite.

    Example:
      >>> from gaba_jax import weighting
      >>> weighting.rescaled(weighting.uniform(2), 2.0).initial_weights
      Array([1., 1.], dtype=float32)
    """
    check_weighting(weighting)
    check_positive("total", total)

    def rescale(weights: ArrayLike) -> Float[Array, " tasks"]:
        weights = jnp.asarray(weights, jnp.float32)
        sum_ = jnp.sum(weights)
        return jnp.where(sum_ > 0, weights * (total / jnp.where(sum_ > 0, sum_, 1)), weights)

    def update(stats: TaskStats, state: Any) -> tuple[Array, Any]:
        weights, state = weighting.update(stats, state)
        return rescale(weights), state

    return weighting._replace(update=update, initial_weights=rescale(weighting.initial_weights))
