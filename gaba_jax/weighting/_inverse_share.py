"""GABA's closed form, without its stabilisers."""

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    Weighting,
    check_num_tasks,
    equal_weights,
    over_present,
    task_vector,
)


def inverse_share(num_tasks: int, *, task_priorities: ArrayLike | None = None) -> Weighting:
    r"""Each task weighted by the share of the *other* tasks in the sum of the gradient norms.

    .. math:: \lambda_i = \frac{\sum_{j \ne i} g_j}{(K - 1) \sum_j g_j}

    with :math:`g_i` the norm of task i's gradient. With ``task_priorities`` :math:`p` each weight
    is multiplied by :math:`p_i` and the weights are normalised again.

    For K = 2 the contributions :math:`\lambda_i g_i` are exactly equal (with priorities: exactly in
    the ratio p). For K > 2 a weight is at most :math:`1/(K-1)`, so the rule cannot lift a task
    that is far quieter than two others; in return a finished task cannot take over. The exact
    rule for any K is :func:`inverse_norm`.

    When not to use it: in training as it stands, since the norms of single batches are noisy.
    :func:`gaba` is this rule with an average, a warm-up and a floor. For contributions in given
    ratios and any K take :func:`equalize`.

    Args:
      num_tasks: number of tasks K >= 2.
      task_priorities: [K] positive, default equal.

    Returns:
      A :class:`Weighting`; the weights are >= 0 and sum to 1, 1/K each where all norms are zero.

    Raises:
      ValueError: ``num_tasks`` < 2; ``task_priorities`` is not a positive [K].

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax import weighting
      >>> rule = weighting.inverse_share(3)
      >>> stats = weighting.TaskStats(
      ...     norms=jnp.array([1.0, 2.0, 7.0]), cosines=None, losses=None,
      ...     present=jnp.ones(3, bool), elapsed=jnp.int32(1))
      >>> rule.update(stats, rule.init())[0]
      Array([0.45, 0.4 , 0.15], dtype=float32)
    """
    check_num_tasks(num_tasks, least=2)
    priorities = task_vector("task_priorities", task_priorities, num_tasks)
    itself = np.eye(num_tasks, dtype=bool)

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        largest = jnp.max(stats.norms)
        norms = stats.norms / jnp.where(largest > 0, largest, 1)
        # Summed, not subtracted from the total: that would cost the small task its digits.
        others = jnp.sum(jnp.where(itself, 0, norms), axis=1)
        return over_present(others, stats.present, priorities), state

    return Weighting(
        num_tasks, frozenset({"norms"}), optax.EmptyState, update, equal_weights(num_tasks)
    )
