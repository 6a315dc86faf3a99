"""Fixed weights, chosen by hand; uniform ones among them."""

import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Weighting, as_float32, check_num_tasks


def constant(num_tasks: int, weights: ArrayLike) -> Weighting:
    r"""Fixed task weights, the usual hand-tuned baseline.

    .. math:: \lambda_i = w_i

    Reads nothing, so nothing is measured (``task_norms`` stay 0).

    Args:
      num_tasks: number of tasks K.
      weights: [K] finite weights, taken as they are: their sum need not be 1.

    Returns:
      A :class:`Weighting` whose weights sum to ``sum(weights)``; while tasks are absent, the others
      keep theirs, and one alone gets the whole sum.

    Raises:
      ValueError: ``weights`` has another shape or is not finite.

    Example:
      >>> from gaba_jax import weighting
      >>> weighting.constant(2, [1.0, 100.0]).initial_weights
      array([  1., 100.], dtype=float32)
    """
    check_num_tasks(num_tasks)
    fixed = as_float32(weights)
    if fixed.shape != (num_tasks,):
        raise ValueError(f"weights must have shape ({num_tasks},), got shape {fixed.shape}.")
    if not isinstance(fixed, Tracer) and not np.all(np.isfinite(fixed)):
        raise ValueError(f"weights must be finite, got {fixed}.")

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        del stats
        return jnp.asarray(fixed), state

    return Weighting(num_tasks, frozenset(), optax.EmptyState, update, fixed, absent="each")
