"""What the Gramian rules share: unit gradients, and the way back to the gradients."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Vector, task_vector

NEEDS = frozenset({"norms", "cosines"})
_SMALLEST = 1e-30  # relative norms below it count as this one


class SolverState(NamedTuple):
    """State of the rules that solve a problem. Names and order are an on-disk promise.

    Attributes:
      residual: [] float32, by how much the last answer misses its optimality condition, as the
        rule says; 0 before the first. About 1e-6 is float32's rounding.
    """

    residual: Float[Array, ""]


def no_residual() -> SolverState:
    """Before the first answer."""
    return SolverState(jnp.zeros([], jnp.float32))


def shares(task_priorities: ArrayLike | None, num_tasks: int) -> Vector:
    """[K] the priorities with sum 1; 1/K by default."""
    given = task_vector("task_priorities", task_priorities, num_tasks)
    given = np.ones(num_tasks, np.float32) if given is None else given
    return given / given.sum()


def among_present(shares: Vector, stats: TaskStats) -> Float[Array, " tasks"]:
    """The shares of the present tasks, with sum 1; 0 for absent ones."""
    held = jnp.where(stats.present, shares, 0)
    return held / jnp.sum(held)


def unit_gramian(stats: TaskStats) -> Float[Array, "tasks tasks"]:
    """The Gramian of the unit gradients, 1 on its diagonal; ValueError where there is none."""
    if stats.cosines is None:
        raise ValueError("this weighting needs stats.cosines, got None.")
    return jnp.fill_diagonal(stats.cosines.astype(jnp.float32), 1, inplace=False)


def relative_norms(stats: TaskStats) -> Float[Array, " tasks"]:
    """The norms over the largest; 0 for absent tasks."""
    norms = jnp.where(stats.present, stats.norms, 0)
    largest = jnp.max(norms)
    return norms / jnp.where(largest > 0, largest, 1)


def usable(stats: TaskStats) -> Array:
    """The tasks that have a gradient."""
    return stats.present & (stats.norms > 0)


def of_gradients(
    coefficients: Float[Array, " tasks"], stats: TaskStats, otherwise: ArrayLike
) -> Float[Array, " tasks"]:
    """Weights of the gradients, in units of 1 / largest norm, from coefficients of unit gradients.

    Tasks without a gradient get ``otherwise``.
    """
    norms = jnp.maximum(relative_norms(stats), _SMALLEST)
    return jnp.where(usable(stats), coefficients / norms, otherwise)
