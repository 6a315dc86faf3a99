"""The mean gradient, projected so that it opposes no task."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Weighting, check_num_tasks, equal_weights
from gaba_jax.weighting._gramian import (
    NEEDS,
    SolverState,
    among_present,
    no_residual,
    of_gradients,
    relative_norms,
    shares,
    unit_gramian,
)
from gaba_jax.weighting._quadratic import bounded_qp


def dual_projection(num_tasks: int, *, task_priorities: ArrayLike | None = None) -> Weighting:
    r"""The mean gradient projected onto the dual cone (Lopez-Paz and Ranzato, GEM, NeurIPS 2017).

    .. math:: d = \arg\min_{y} \Big\|y - \sum_i p_i g_i\Big\| \ \text{ so that } \
        \langle y, g_j \rangle \ge 0 \ \text{for all } j

    with the ``task_priorities`` p. One projection where :func:`upgrad` takes K. In the metric of
    the unit gradients' Gramian C, with :math:`v_i = w_i \|g_i\|`, it is
    :math:`\min v^\top C v` over :math:`v_i \ge p_i \|g_i\|`.

    When not to use it: the mean is that of the task that pulls hardest, so with norms far apart the
    others are not opposed, and not much more. :func:`upgrad` lets each task keep a part of its own.

    Args:
      num_tasks: number of tasks K.
      task_priorities: [K] positive, default equal; divided by their sum.

    Returns:
      A :class:`Weighting` with a :class:`SolverState`; its residual is the largest violation of
      the optimality conditions in v, over the largest :math:`p_i \|g_i\|`: no unit gradient is
      opposed by more than that product. Where no direction improves all tasks v stays short, as in
      :func:`upgrad`. The weights are at least p, so
      their sum is 1 without conflict and more with it. A task of norm zero gets p.

    Raises:
      ValueError: ``task_priorities`` is not a positive [K].

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.dual_projection(2))
      >>> grads = {"shared": jnp.array([[100.0, 0.0], [-1.0, 1.0]])}
      >>> updates, _ = tx.update(grads, tx.init({"shared": jnp.zeros(2)}))
      >>> print(np.asarray(updates["shared"]).round(3))  # the mean (49.5, 0.5), turned
      [25. 25.]
    """
    check_num_tasks(num_tasks)
    priorities = shares(task_priorities, num_tasks)

    def update(stats: TaskStats, state: SolverState) -> tuple[Array, SolverState]:
        del state
        gramian = unit_gramian(stats)
        present = among_present(priorities, stats)
        sizes = present * relative_norms(stats)
        largest = jnp.max(sizes)
        sizes = sizes / jnp.where(largest > 0, largest, 1)
        added, residual = bounded_qp(gramian, -gramian @ sizes)
        weights = of_gradients((sizes + added) * largest, stats, present)
        return weights, SolverState(residual)

    return Weighting(num_tasks, NEEDS, no_residual, update, equal_weights(num_tasks))
