"""MGDA: the shortest convex combination of the gradients."""

import jax.numpy as jnp
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Weighting, check_num_tasks, equal_weights, over_present
from gaba_jax.weighting._gramian import NEEDS, SolverState, no_residual, unit_gramian
from gaba_jax.weighting._quadratic import nonnegative_qp


def mgda(num_tasks: int) -> Weighting:
    r"""Multiple gradient descent (Désidéri 2012; Sener and Koltun, NeurIPS 2018).

    .. math:: \min_w \Big\|\sum_i w_i g_i\Big\| \ \text{ over } \ w \ge 0,\ \sum_i w_i = 1

    The result improves every task by the same amount to first order, or is zero where no direction
    improves all. It is found as the problem :math:`\min_{a \ge 0} a^\top C a + (h^\top a - 1)^2` in
    the unit gradients' Gramian C, with :math:`h_i = \min_j \|g_j\| / \|g_i\|` and
    :math:`w_i \propto h_i a_i`, whose minimiser is the same and which is never unbounded.

    When not to use it: the shortest combination belongs to the task with the smallest gradient. A
    finished task (norm zero) takes the whole weight, and the training of the others stops.

    Args:
      num_tasks: number of tasks K.

    Returns:
      A :class:`Weighting` with a :class:`SolverState`; its residual is the largest violation of the
      optimality conditions of the problem in a, over the largest :math:`a_i` where that is above
      1. The weights are >= 0 and sum to 1.

    Raises:
      ValueError: ``num_tasks`` < 1.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.mgda(2))
      >>> grads = {"shared": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
      >>> updates, state = tx.update(grads, tx.init({"shared": jnp.zeros(2)}))
      >>> print(np.asarray(state.task_weights).round(2), np.asarray(updates["shared"]).round(2))
      [0.64 0.36] [1.92 1.44]
    """
    check_num_tasks(num_tasks)

    def update(stats: TaskStats, state: SolverState) -> tuple[Array, SolverState]:
        del state
        norms = jnp.where(stats.present, stats.norms, jnp.inf)
        inverse = jnp.where(norms > 0, jnp.min(norms) / jnp.where(norms > 0, norms, 1), 1)
        matrix = unit_gramian(stats) + jnp.outer(inverse, inverse)
        point, residual = nonnegative_qp(matrix, inverse)
        residual = residual / jnp.maximum(1, jnp.max(point))
        return over_present(point * inverse, stats.present), SolverState(residual)

    return Weighting(num_tasks, NEEDS, no_residual, update, equal_weights(num_tasks))
