"""Geometric mean of the losses."""

import jax.numpy as jnp
import optax
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    LARGEST,
    Weighting,
    check_num_tasks,
    equal_weights,
    task_losses,
)


def geometric_mean(num_tasks: int) -> Weighting:
    r"""The geometric mean of the losses as the one loss (MultiNet++, Chennupati et al., 2019).

    .. math:: \lambda_i = \frac{\partial}{\partial L_i} \Big(\prod_j L_j\Big)^{1/K}
        = \frac{1}{K L_i} \Big(\prod_j L_j\Big)^{1/K}

    The weighted losses :math:`\lambda_i L_i` are all equal: each task counts with the relative
    change of its loss, so a factor on one loss changes no ratio of updates, only their common
    size. The direction is that of :func:`scale_invariant`, without the blow-up as all losses fall
    together.

    When not to use it: for losses that can reach 0 or change sign. The nearer one comes to 0, the
    more of the update is its own. Between measurements (``every`` > 1) and under
    ``measure="lagged"`` the others take over the last weight of an absent task, however large.
    Unequal gradients of equal losses are left unequal: see :func:`inverse_share`.

    Args:
      num_tasks: number of tasks K.

    Returns:
      A :class:`Weighting` without state; it needs ``task_losses`` at update and measures no
      gradients. The weights are at least 0, at most 1e18, 1/K before the first update. Their sum
      is free: the ratio of the geometric to the harmonic mean of the losses, at least 1. A task
      whose loss is not positive, or below 1e-38, has weight 0 and is left out of the mean. An
      absent task does not count: the mean is over the others.

    Raises:
      ValueError: ``num_tasks`` < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax import weighting
      >>> rule = weighting.geometric_mean(2)
      >>> stats = weighting.TaskStats(
      ...     norms=jnp.zeros(2), cosines=None, losses=jnp.array([8.0, 2.0]),
      ...     present=jnp.ones(2, bool), elapsed=jnp.int32(1))
      >>> weights, _ = rule.update(stats, rule.init())
      >>> weights  # the mean is 4
      Array([0.25, 1.  ], dtype=float32)
    """
    check_num_tasks(num_tasks)

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        losses = task_losses(stats)
        # Below the least normal number a processor may take a loss for 0.
        counted = stats.present & (losses >= jnp.finfo(jnp.float32).tiny)
        count = jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
        # In logarithms: the product of the losses leaves float32's range long before a loss does.
        logs = jnp.log(jnp.where(counted, losses, 1))
        relative = jnp.minimum(jnp.sum(logs) / count - logs, jnp.log(LARGEST))
        weights = jnp.where(counted, jnp.exp(relative) / count, 0)
        return weights, state

    return Weighting(
        num_tasks, frozenset({"losses"}), optax.EmptyState, update, equal_weights(num_tasks)
    )
