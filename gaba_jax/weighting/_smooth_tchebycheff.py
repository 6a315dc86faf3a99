"""Smooth Tchebycheff scalarisation: a smooth maximum of the losses."""

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    Number,
    Weighting,
    check_num_tasks,
    check_positive,
    equal_shares,
    equal_weights,
    over_present,
    task_losses,
    task_vector,
)

_LARGEST_EXCESS = 1e37  # differences of what is cut here are finite


def smooth_tchebycheff(
    num_tasks: int,
    *,
    mu: Number = 1.0,
    preferences: ArrayLike | None = None,
    ideal: ArrayLike | None = None,
) -> Weighting:
    r"""A smooth maximum of the losses as the one loss (STCH, Lin et al., ICML 2024).

    .. math:: \lambda_i = \frac{\partial}{\partial L_i}\,
        \mu \log \sum_j e^{p_j (L_j - z_j) / \mu} = p_i\, \mathrm{softmax}(p (L - z) / \mu)_i

    with :math:`p` the ``preferences`` and :math:`z` the ``ideal``. The worst task, that of the
    largest :math:`p_i (L_i - z_i)`, has the most weight; as :math:`\mu \to 0` it has all of it, and
    the one loss is the Tchebycheff scalarisation, their maximum.

    When not to use it: for losses of different scale, where the largest is not the worst: divide
    each by what is usual for it, in ``preferences`` or before. (The authors' multi-task code takes
    logarithms of the losses relative to those of a warm-up, and K times the result.) A ``mu`` far
    below the differences of the :math:`p_i (L_i - z_i)` trains one task at a time; one far above
    leaves the weights at :math:`p_i / K`.

    Args:
      num_tasks: number of tasks K.
      mu: the smoothing > 0, in units of :math:`p_i (L_i - z_i)`, default 1.
      preferences: [K] positive, default 1/K each, the paper's uniform preference (1/n each while n
        tasks are present). Taken as they are: the paper's sum to 1.
      ideal: [K] finite, the lowest loss within reach of each task, default 0.

    Returns:
      A :class:`Weighting` without state; it needs ``task_losses`` at update and measures no
      gradients. The weights are >= 0, p/K before the first update. Their sum is the softmax's mean
      of the preferences, 1/K by default; ``rescaled(rule, 1.0)`` makes it 1. Losses can have any
      sign. An absent task does not count.

    Raises:
      ValueError: ``mu`` is not positive and finite; ``preferences`` is not a positive [K], or
        ``ideal`` not a finite one.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import weighting
      >>> rule = weighting.smooth_tchebycheff(2, mu=0.5)
      >>> stats = weighting.TaskStats(
      ...     norms=jnp.zeros(2), cosines=None, losses=jnp.array([3.0, 2.0]),
      ...     present=jnp.ones(2, bool), elapsed=jnp.int32(1))
      >>> weights, _ = rule.update(stats, rule.init())
      >>> print(np.asarray(weights).round(3))
      [0.366 0.134]
    """
    check_num_tasks(num_tasks)
    check_positive("mu", mu)
    given = task_vector("preferences", preferences, num_tasks)
    floor = task_vector("ideal", ideal, num_tasks, positive=False)
    lowest = np.zeros(num_tasks, np.float32) if floor is None else floor

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        preferred = equal_shares(stats.present) if given is None else jnp.asarray(given)
        excess = preferred * (task_losses(stats) - lowest)
        excess = jnp.clip(excess, -_LARGEST_EXCESS, _LARGEST_EXCESS)
        # Below the worst task, before the division: a small mu then costs no accuracy.
        below = excess - jnp.max(jnp.where(stats.present, excess, -_LARGEST_EXCESS))
        tiny = jnp.finfo(jnp.float32).tiny
        powers = jnp.minimum(below, 0) / jnp.maximum(jnp.asarray(mu, jnp.float32), tiny)
        return preferred * over_present(jnp.exp(powers), stats.present), state

    start = equal_weights(num_tasks) if given is None else given
    return Weighting(num_tasks, frozenset({"losses"}), optax.EmptyState, update, start / num_tasks)
