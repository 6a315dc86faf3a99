"""ConFIG, conflict-free inverse gradients: a direction at the same angle to every gradient."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    Weighting,
    check_num_tasks,
    equal_shares,
    equal_weights,
)
from gaba_jax.weighting._gramian import (
    NEEDS,
    of_gradients,
    relative_norms,
    shares,
    unit_gramian,
    usable,
)
from gaba_jax.weighting._solvers import minimum_norm_solution

_VANISHED = 1e-6


def config(num_tasks: int, *, task_priorities: ArrayLike | None = None) -> Weighting:
    r"""Conflict-free inverse gradients (Liu, Chu and Thuerey, "ConFIG", ICLR 2025).

    .. math:: d = \Big(\sum_i \langle g_i, u \rangle\Big)\, u, \qquad
        u = \frac{U^+ p}{\|U^+ p\|}, \quad U = \text{the unit gradients as rows}

    so the cosines of d with the task gradients are in the ratio of the ``task_priorities`` p, equal
    by default and positive, and its length is what all tasks together have along it. With C the
    cosines, :math:`U^+ p = U^\top C^+ p`.

    No task is opposed where the gradients are linearly independent.

    When not to use it: where they depend on each other. Then the pseudo-inverse gives the nearest
    direction, or nothing, and a task can be opposed although some direction improves all of them:
    gradients (-.9, .7), (.4, .8), (-.9, -1.1) and (.5, 1) give a cosine of -.11.

    Args:
      num_tasks: number of tasks K.
      task_priorities: [K] positive, default equal; only their ratio matters.

    Returns:
      A :class:`Weighting`; the weights can be negative, and their sum follows from the length of d.
      Where there is no such direction they are 0, and 1/K where all gradients are zero. A task of
      norm zero gets 0 while there are others.

    Raises:
      ValueError: ``task_priorities`` is not a positive [K].

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.config(2))
      >>> grads = {"shared": jnp.array([[4.0, 0.0], [0.0, 1.0]])}
      >>> updates, _ = tx.update(grads, tx.init({"shared": jnp.zeros(2)}))
      >>> print(np.asarray(updates["shared"]).round(3))
      [2.5 2.5]
    """
    check_num_tasks(num_tasks)
    wanted = num_tasks * shares(task_priorities, num_tasks)

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        counted, gramian = usable(stats), unit_gramian(stats)
        solution = minimum_norm_solution(gramian, jnp.where(counted, wanted, 0))
        products = gramian @ solution
        squared = solution @ products
        exists = squared > _VANISHED
        length = relative_norms(stats) @ products / jnp.where(exists, squared, 1)
        weights = of_gradients(jnp.where(exists, solution * length, 0), stats, 0)
        return jnp.where(jnp.any(counted), weights, equal_shares(stats.present)), state

    return Weighting(num_tasks, NEEDS, optax.EmptyState, update, equal_weights(num_tasks))
