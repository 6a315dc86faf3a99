"""The sum of the logarithms of the losses."""

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    LARGEST,
    Weighting,
    check_num_tasks,
    task_losses,
)


def scale_invariant(num_tasks: int) -> Weighting:
    r"""The sum of log losses as the one loss (the scale-invariant baseline of Nash-MTL, ICML 2022).

    .. math:: \lambda_i = \frac{\partial}{\partial L_i} \sum_j \log L_j = \frac{1}{L_i}

    A factor on a loss changes nothing at all. It is where :func:`uncertainty` comes to rest for
    steady losses, without the learning; :func:`geometric_mean` has the same direction.

    When not to use it: as the losses fall the updates grow (unless the optimizer normalises, as
    Adam does; or take ``rescaled(scale_invariant(K), 1.0)``), and a loss near 0 takes the whole
    update. With noisy minibatches a loss that is small by chance has a large weight. Unequal
    gradients of equal losses are left unequal: see :func:`inverse_share`.

    Args:
      num_tasks: number of tasks K.

    Returns:
      A :class:`Weighting` without state; it needs ``task_losses`` at update and measures no
      gradients. The weights are at least 0, at most 1e18, 1 each before the first update; their sum
      is free, K over the harmonic mean of the losses. A task whose loss is not positive has weight
      0. An absent task does not count.

    Raises:
      ValueError: ``num_tasks`` < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax import weighting
      >>> rule = weighting.scale_invariant(2)
      >>> stats = weighting.TaskStats(
      ...     norms=jnp.zeros(2), cosines=None, losses=jnp.array([4.0, 0.5]),
      ...     present=jnp.ones(2, bool), elapsed=jnp.int32(1))
      >>> weights, _ = rule.update(stats, rule.init())
      >>> weights
      Array([0.25, 2.  ], dtype=float32)
    """
    check_num_tasks(num_tasks)

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        losses = task_losses(stats)
        counted = stats.present & (losses > 0)
        weights = jnp.where(counted, 1 / jnp.maximum(losses, 1 / LARGEST), 0)
        return weights, state

    ones = np.ones(num_tasks, np.float32)
    return Weighting(
        num_tasks, frozenset({"losses"}), optax.EmptyState, update, ones, absent="each"
    )
