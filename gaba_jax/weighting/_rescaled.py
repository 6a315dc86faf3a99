"""The same rule with another sum of weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    Number,
    Weighting,
    as_float32,
    check_positive,
    check_weighting,
)


def rescaled(weighting: Weighting, total: Number) -> Weighting:
    r"""Scales a rule's weights so that they sum to ``total``.

    .. math:: \lambda_i' = \text{total} \cdot \lambda_i / \textstyle\sum_j \lambda_j

    ``total=K`` gives the gradient scale of an unweighted sum of losses, so that a learning rate or
    a clipping threshold tuned on ``loss_1 + loss_2`` carries over.

    When not to use it: around a rule whose sum says something, such as :func:`aligned_mtl` or
    :func:`config`, where it is short when no direction serves all tasks. Adam does not see a
    constant factor.

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
      array([1., 1.], dtype=float32)
    """
    check_weighting(weighting)
    check_positive("total", total)

    wanted = as_float32(total)

    def rescale(weights: Array | np.ndarray) -> Any:
        xp = jnp if isinstance(weights, jax.Array) or isinstance(wanted, jax.Array) else np
        sum_ = xp.sum(weights)
        return xp.where(sum_ > 0, weights * (wanted / xp.where(sum_ > 0, sum_, 1)), weights)

    def update(stats: TaskStats, state: Any) -> tuple[Array, Any]:
        weights, state = weighting.update(stats, state)
        return rescale(jnp.asarray(weights, jnp.float32)), state

    initial_weights = rescale(as_float32(weighting.initial_weights))
    return weighting._replace(update=update, initial_weights=initial_weights, absent="rescale")
