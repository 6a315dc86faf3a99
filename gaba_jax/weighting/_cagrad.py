"""CAGrad: the best gain of the worst task near the mean gradient."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Number, Weighting, check_num_tasks, equal_weights, number
from gaba_jax.weighting._gramian import (
    NEEDS,
    SolverState,
    among_present,
    no_residual,
    of_gradients,
    relative_norms,
    shares,
    unit_gramian,
    usable,
)
from gaba_jax.weighting._quadratic import nonnegative_qp

_STEPS = 24
_CLOSE = 1e-6
_INFEASIBLE = 1e-3  # a residual above it: no direction gains that much


def cagrad(
    num_tasks: int, *, c: Number = 0.5, task_priorities: ArrayLike | None = None
) -> Weighting:
    r"""Conflict-averse gradient descent (Liu et al., NeurIPS 2021).

    .. math:: d = \arg\max_{y} \min_i \langle g_i, y \rangle \ \text{ so that } \
        \|y - g_0\| \le c\, \|g_0\|, \qquad g_0 = \sum_i p_i g_i

    The largest m for which the projection of :math:`g_0` onto
    :math:`\{y : \langle g_i, y \rangle \ge m\}` is within :math:`c \|g_0\|` is found by a
    safeguarded Newton iteration: that distance is convex in m. Each projection is a quadratic
    program in the cosines, so nothing is lost where tasks differ by 500 times.

    When not to use it: c trades the mean against the worst task, and the gain of the worst task is
    in units of its own gradient: a task with a tiny gradient is always the worst.

    Args:
      num_tasks: number of tasks K.
      c: radius in [0, 1), default 0.5 as in most of the paper's experiments; 0 is the mean.
      task_priorities: [K] positive, default equal: p, divided by their sum.

    Returns:
      A :class:`Weighting` with a :class:`SolverState`; its residual is
      :math:`|\,\|d - g_0\| - c \|g_0\|\,| / \|g_0\|`, which is 0 at the optimum unless no direction
      gains for all tasks (there the projection onto m = 0 is as good as any). The weights are at
      least p, so their sum is at least 1; it is not divided by :math:`1 + c^2`, as some code does.
      A task of norm zero gets p, and so does a single one.

    Raises:
      ValueError: ``c`` outside [0, 1), or ``task_priorities`` is not a positive [K].

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.cagrad(2, c=0.5))
      >>> grads = {"shared": jnp.array([[4.0, 0.0], [0.0, 2.0]])}
      >>> updates, state = tx.update(grads, tx.init({"shared": jnp.zeros(2)}))
      >>> print(np.asarray(updates["shared"]).round(3), np.asarray(state.task_weights).round(3))
      [2.    2.118] [0.5   1.059]
    """
    check_num_tasks(num_tasks)
    radius = number("c", c)
    if radius is not None and not 0 <= radius < 1:
        raise ValueError(
            f"{c=} must be in [0, 1): 0 is the mean gradient, and from 1 on the update may vanish "
            "or leave the mean behind."
        )
    priorities = shares(task_priorities, num_tasks)

    def update(stats: TaskStats, state: SolverState) -> tuple[Array, SolverState]:
        del state
        gramian, counted = unit_gramian(stats), usable(stats)
        present = among_present(priorities, stats)
        sizes = present * relative_norms(stats)
        length = jnp.sqrt(jnp.maximum(sizes @ gramian @ sizes, 0))
        sizes = sizes / jnp.where(length > 0, length, 1)
        gains = jnp.where(counted, gramian @ sizes, 1)
        least = jnp.min(jnp.where(counted, stats.norms, jnp.inf))
        heights = jnp.where(counted, least / jnp.where(counted, stats.norms, 1), 0)
        added, distance = _farthest(gramian, gains, heights, jnp.asarray(c, jnp.float32))
        weights = present + of_gradients(added * length, stats, 0)
        # Where the mean gradient vanishes, or there is one task, there is nothing to search for.
        usual = jnp.where((length > _CLOSE) & (num_tasks > 1), weights, present)
        return usual, SolverState(jnp.abs(distance - jnp.asarray(c, jnp.float32)))

    return Weighting(num_tasks, NEEDS, no_residual, update, equal_weights(num_tasks))


@jax.jit
def _farthest(
    gramian: Float[Array, "K K"],
    gains: Float[Array, " K"],
    heights: Float[Array, " K"],
    radius: Float[Array, ""],
) -> tuple[Float[Array, " K"], Float[Array, ""]]:
    """What is added to the unit mean gradient to gain the most within the radius.

    Args:
      gramian: of the unit gradients.
      gains: of the unit gradients along the mean direction.
      heights: the share of the common gain that each unit gradient must reach.
      radius: how far from the mean.

    Returns:
      ([K] coefficients >= 0 of the unit gradients, how far from the mean that is).
    """

    def project(gain: Array) -> tuple[Array, Array]:
        added, residual = nonnegative_qp(gramian, gain * heights - gains)
        residual = residual / jnp.maximum(1, jnp.max(added))
        distance = jnp.sqrt(jnp.maximum(added @ gramian @ added, 0))
        return added, jnp.where(residual < _INFEASIBLE, distance, jnp.inf)

    def unfinished(state: tuple[Array, ...]) -> Bool[Array, ""]:
        _, low, high, steps, _, found = state
        wide = high - low > 1e-7 * jnp.maximum(jnp.abs(low), jnp.abs(high))
        return (jnp.abs(found - radius) > _CLOSE) & wide & (steps < _STEPS)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        gain, low, high, steps, best, found = state
        added, distance = project(gain)
        inside = distance <= radius + _CLOSE
        # The last point inside is kept; a point outside only steers.
        best = jnp.where(inside, added, best)
        found = jnp.where(inside, distance, found)
        low, high = jnp.where(inside, gain, low), jnp.where(inside, high, gain)
        slope = heights @ added
        newton = gain - (distance - radius) * distance / jnp.where(slope > 0, slope, 1)
        usable = (slope > 0) & jnp.isfinite(distance) & (newton > low) & (newton < high)
        return jnp.where(usable, newton, (low + high) / 2), low, high, steps + 1, best, found

    bounded = heights > 0
    over = jnp.where(bounded, heights, 1)
    low = jnp.min(jnp.where(bounded, gains / over, jnp.inf))
    high = jnp.min(jnp.where(bounded, (gains + radius) / over, jnp.inf))
    first = jnp.where((low < 0) & (high > 0), 0, high)
    zeros = jnp.zeros_like(gains)
    start = (first, low, high, jnp.array(0), zeros, jnp.zeros([], jnp.float32))
    *_, best, found = lax.while_loop(unfinished, step, start)
    return best, found
