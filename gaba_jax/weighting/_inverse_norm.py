"""Weights in inverse ratio to the gradient norms."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    Number,
    Weighting,
    check_not_negative,
    check_num_tasks,
    equal_weights,
    over_present,
    task_vector,
)


def inverse_norm(
    num_tasks: int, *, power: Number = 1.0, task_priorities: ArrayLike | None = None
) -> Weighting:
    r"""Weights proportional to a negative power of the norm: exact equalisation at power 1.

    .. math:: \lambda_i = \frac{p_i g_i^{-a}}{\sum_j p_j g_j^{-a}}

    with :math:`g_i` the norm of task i's gradient, :math:`a` the ``power`` and :math:`p` the
    ``task_priorities``. At power 1 the contributions :math:`\lambda_i g_i` are in the ratio of the
    priorities for any K; 0.5 is the square-root rule, 0 gives uniform weights.

    When not to use it: a task that is finished (:math:`g_i \to 0`) takes nearly all the weight, as
    the rule is unbounded. :func:`inverse_share` never gives a task more than 1/(K-1).

    Args:
      num_tasks: number of tasks K.
      power: the exponent a >= 0, default 1.
      task_priorities: [K] positive, default equal.

    Returns:
      A :class:`Weighting`; the weights are >= 0 and sum to 1. Tasks of norm zero, if there are
      any, share the whole weight (their limit).

    Raises:
      ValueError: ``power`` is negative or not finite; ``task_priorities`` is not a positive [K].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.inverse_norm(2))
      >>> grads = {"shared": jnp.array([[3.0, 4.0], [0.0, 0.5]])}
      >>> state = tx.init({"shared": jnp.zeros(2)})
      >>> _, state = tx.update(grads, state)
      >>> jnp.round(state.task_weights, 4)
      Array([0.0909, 0.9091], dtype=float32)
    """
    check_num_tasks(num_tasks)
    check_not_negative("power", power)
    priorities = task_vector("task_priorities", task_priorities, num_tasks)

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        smallest = jnp.min(jnp.where(stats.present, stats.norms, jnp.inf))
        # Relative to the smallest norm nothing overflows; a task of norm zero is its own smallest.
        ratio = jnp.where(stats.norms > 0, smallest / jnp.where(stats.norms > 0, stats.norms, 1), 1)
        raw = ratio ** jnp.asarray(power, jnp.float32)
        return over_present(raw, stats.present, priorities), state

    return Weighting(
        num_tasks, frozenset({"norms"}), optax.EmptyState, update, equal_weights(num_tasks)
    )
