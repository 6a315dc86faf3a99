"""IMTL-G: a direction with the same projection onto every task gradient."""

import jax.numpy as jnp
import optax
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    Weighting,
    check_num_tasks,
    equal_shares,
    equal_weights,
)
from gaba_jax.weighting._gramian import NEEDS, of_gradients, unit_gramian, usable
from gaba_jax.weighting._solvers import ridge_solution

_VANISHED = 1e-6


def imtl_g(num_tasks: int) -> Weighting:
    r"""Impartial multi-task learning by gradients (Liu et al., ICLR 2021).

    The affine combination :math:`d = \sum_i w_i g_i`, :math:`\sum_i w_i = 1`, that projects
    equally onto all task gradients:

    .. math:: \langle d, g_i / \|g_i\| \rangle = \text{the same for all } i, \qquad
        w_i \propto \frac{(C^{-1} 1)_i}{\|g_i\|}

    with C the cosines, plus a ridge of 1e-6. So where gradients depend on each other the weights
    are their limit: those of two opposed gradients are in inverse ratio to the norms, and d is 0.

    When not to use it: weights can be negative, and they grow without bound where their sum before
    normalisation nears zero; then no task gains. :func:`config` has the same direction of d, and a
    length that stays bounded.

    Args:
      num_tasks: number of tasks K.

    Returns:
      A :class:`Weighting`; the weights sum to 1 and can be negative. Where they would sum to
      zero they are 1/K. A task of norm zero gets 0 while there are others.

    Raises:
      ValueError: ``num_tasks`` < 1.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.imtl_g(2))
      >>> grads = {"shared": jnp.array([[4.0, 0.0], [0.0, 1.0]])}
      >>> updates, _ = tx.update(grads, tx.init({"shared": jnp.zeros(2)}))
      >>> print(np.asarray(updates["shared"]).round(3))
      [0.8 0.8]
    """
    check_num_tasks(num_tasks)

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        counted = usable(stats)
        solution = ridge_solution(unit_gramian(stats), counted.astype(jnp.float32))
        raw = of_gradients(solution, stats, 0)
        sum_, size = jnp.sum(raw), jnp.sum(jnp.abs(raw))
        known = jnp.abs(sum_) > _VANISHED * size
        weights = raw / jnp.where(known, sum_, 1)
        return jnp.where(known, weights, equal_shares(stats.present)), state

    return Weighting(num_tasks, NEEDS, optax.EmptyState, update, equal_weights(num_tasks))
