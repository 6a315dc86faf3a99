"""UPGrad: the mean of the gradients, each projected so that it opposes no task."""

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
from gaba_jax.weighting._quadratic import bounded_qps


def upgrad(num_tasks: int, *, task_priorities: ArrayLike | None = None) -> Weighting:
    r"""UPGrad (Quinton and Rey, "Jacobian descent for multi-objective optimization", 2024).

    .. math:: d = \sum_i p_i\, \pi(g_i), \qquad
        \pi(g) = \arg\min_{y} \|y - g\| \ \text{ so that } \ \langle y, g_j \rangle \ge 0
        \ \text{for all } j

    Every task gradient is projected onto the cone of directions that oppose no task, then they are
    averaged with the ``task_priorities`` p. In terms of the unit gradients' Gramian C the
    projection of task i has coefficients :math:`z^{(i)} = \arg\min z^\top C z` over
    :math:`z \ge e_i`, whatever the norms are, so tasks that differ by 500 times or by a million
    lose no digits. Without conflict the weights are p.

    When not to use it: norms are not evened out, so a task that pulls 500 times harder still does,
    within the cone; see ``normalized(upgrad(K))``. At K = 32 it solves 32 quadratic programs.

    Where some combination of gradients with weights >= 0 vanishes, no direction improves all tasks,
    and float32 may not tell what long weights would still gain. So the coefficients are kept below
    about 600: no task is opposed by more than the residual says. Two gradients
    count the more as opposite the nearer they are to it, from an angle of about 0.1 degrees on.

    Args:
      num_tasks: number of tasks K.
      task_priorities: [K] positive, default equal; divided by their sum.

    Returns:
      A :class:`Weighting` with a :class:`SolverState`; its residual is the largest violation of
      the optimality conditions among the K projections of unit gradients: no task is opposed by
      more than that times its unit gradient and the mean norm. The weights are at least p, so their
      sum is 1 without conflict and more with it: up to about 600 times the ratio of the norms
      where gradients nearly oppose each other. A task of norm zero gets p.

    Raises:
      ValueError: ``task_priorities`` is not a positive [K].

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.upgrad(2))
      >>> grads = {"shared": jnp.array([[100.0, 0.0], [-1.0, 1.0]])}
      >>> updates, _ = tx.update(grads, tx.init({"shared": jnp.zeros(2)}))
      >>> print(np.asarray(updates["shared"]).round(3))  # (100, 0) became (50, 50)
      [25.  25.5]
    """
    check_num_tasks(num_tasks)
    priorities = shares(task_priorities, num_tasks)

    def update(stats: TaskStats, state: SolverState) -> tuple[Array, SolverState]:
        del state
        gramian = unit_gramian(stats)
        added, residuals = bounded_qps(gramian, -gramian)
        present = among_present(priorities, stats)
        sizes = present * relative_norms(stats)
        weights = of_gradients(sizes + sizes @ added, stats, present)
        return weights, SolverState(jnp.max(residuals))

    return Weighting(num_tasks, NEEDS, no_residual, update, equal_weights(num_tasks))
