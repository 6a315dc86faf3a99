"""Weights in inverse ratio to the gradient norms."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    LARGEST,
    Number,
    Weighting,
    check_not_negative,
    check_num_tasks,
    equal_weights,
    over_present,
    task_vector,
)


def inverse_norm(
    num_tasks: int,
    *,
    power: Number = 1.0,
    task_priorities: ArrayLike | None = None,
    scale: Literal["share", "mean"] = "share",
) -> Weighting:
    r"""Weights proportional to a negative power of the norm: exact equalisation at power 1.

    .. math:: \lambda_i = \frac{p_i g_i^{-a}}{\sum_j p_j g_j^{-a}}

    with :math:`g_i` the norm of task i's gradient, :math:`a` the ``power`` and :math:`p` the
    ``task_priorities``. At power 1 the contributions :math:`\lambda_i g_i` are in the ratio of the
    priorities for any K; 0.5 is the square-root rule, 0 gives uniform weights.

    **The sum.** With ``scale="mean"`` the weights do not sum to 1:

    .. math:: \lambda_i = \frac{p_i}{\bar p} \Big(\frac{\bar g}{g_i}\Big)^{a}, \qquad
        \bar g = \frac{1}{K} \sum_j g_j

    with :math:`\bar p` the mean priority. At power 1 each contribution is the mean norm (times its
    priority), so that the sum of the losses keeps its learning rate. These are the gradient-norm
    weights of jaxpi, which averages them over measurements and stops a weight at 1e5; here each is
    that of its own measurement and stops at 1e18.

    When not to use it: a task that is finished (:math:`g_i \to 0`) takes nearly all the weight, as
    the rule is unbounded. :func:`inverse_share` never gives a task more than 1/(K-1).

    Args:
      num_tasks: number of tasks K.
      power: the exponent a >= 0, default 1.
      task_priorities: [K] positive, default equal.
      scale: "share" (default), where the weights sum to 1, or "mean", where equal norms have
        weights 1.

    Returns:
      A :class:`Weighting`; the weights are >= 0 and sum to 1. Tasks of norm zero, if there are
      any, share the whole weight (their limit). With ``scale="mean"`` each weight is positive and
      holds by itself, and a task of norm zero has weight 1: there is nothing to weight.

    Raises:
      ValueError: ``power`` is negative or not finite; ``task_priorities`` is not a positive [K];
        an unknown ``scale``.

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
    if scale not in ("share", "mean"):
        raise ValueError(f'{scale=} must be "share" or "mean".')

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        smallest = jnp.min(jnp.where(stats.present, stats.norms, jnp.inf))
        # Relative to the smallest norm nothing overflows; a task of norm zero is its own smallest.
        ratio = jnp.where(stats.norms > 0, smallest / jnp.where(stats.norms > 0, stats.norms, 1), 1)
        raw = ratio ** jnp.asarray(power, jnp.float32)
        return over_present(raw, stats.present, priorities), state

    def update_to_mean(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        present, norms = stats.present, stats.norms
        count = jnp.maximum(jnp.sum(present), 1).astype(jnp.float32)
        mean = jnp.sum(norms / count)
        ratio = jnp.where(norms > 0, mean / jnp.where(norms > 0, norms, 1), 1)
        weights = ratio ** jnp.asarray(power, jnp.float32)
        if priorities is not None:
            wanted = jnp.where(present, priorities, 0)
            weights = weights * wanted / (jnp.sum(wanted) / count)
        return jnp.where(present, jnp.minimum(weights, LARGEST), 0), state

    if scale == "mean":
        ones = np.ones(num_tasks, np.float32)
        return Weighting(
            num_tasks, frozenset({"norms"}), optax.EmptyState, update_to_mean, ones, absent="each"
        )
    return Weighting(
        num_tasks, frozenset({"norms"}), optax.EmptyState, update, equal_weights(num_tasks)
    )
