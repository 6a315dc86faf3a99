"""Fixed weights, chosen by hand; uniform ones among them."""

from typing import Any, overload

import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Vector, Weighting, as_float32, check_num_tasks


@overload
def constant(weights: ArrayLike) -> Weighting: ...
@overload
def constant(num_tasks: int, weights: ArrayLike) -> Weighting: ...
def constant(*args: Any, **kwargs: Any) -> Weighting:
    r"""Fixed task weights, the usual hand-tuned baseline.

    .. math:: \lambda_i = w_i

    Reads nothing, so nothing is measured (``task_norms`` stay 0).

    When not to use it: where nobody can tune the weights, or the gradients change against each
    other by much in training.

    Args:
      *args: ``weights``, [K] finite numbers, taken as they are: their sum need not be 1. Ahead of
        them may stand ``num_tasks``, the number of tasks K; it is checked.
      **kwargs: either by its name.

    Returns:
      A :class:`Weighting` whose weights sum to ``sum(weights)``; while tasks are absent, the others
      keep theirs, and one alone gets the whole sum.

    Raises:
      ValueError: ``weights`` is no vector, has another shape than [num_tasks], or is not finite.

    Example:
      >>> from gaba_jax import weighting
      >>> weighting.constant([1.0, 100.0]).initial_weights
      array([  1., 100.], dtype=float32)
    """
    tasks, fixed = _checked(*args, **kwargs)

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        del stats
        return jnp.asarray(fixed), state

    return Weighting(tasks, frozenset(), optax.EmptyState, update, fixed, absent="each")


def _checked(
    *given: Any, num_tasks: int | None = None, weights: ArrayLike | None = None
) -> tuple[int, Vector]:
    """K and the weights, from the one or both, by position or by name."""
    values = [*given, *([] if weights is None else [weights])]
    if len(values) not in (1, 2) or (len(values) == 2 and num_tasks is not None):
        raise ValueError(
            "constant takes the weights, or num_tasks and the weights: constant([1.0, 2.0]) or "
            f"constant(2, [1.0, 2.0]); got {len(values)} values and {num_tasks=}."
        )
    *size, chosen = values
    fixed, expected = as_float32(chosen), size[0] if size else num_tasks
    if expected is None and (fixed.ndim != 1 or not fixed.size):
        raise ValueError(
            "weights must be a vector, one weight per task, such as constant([1.0, 2.0]); got "
            f"shape {fixed.shape}."
        )
    tasks = check_num_tasks(fixed.shape[0] if expected is None else expected)
    if fixed.shape != (tasks,):
        raise ValueError(f"weights must have shape ({tasks},), got shape {fixed.shape}.")
    if not isinstance(fixed, Tracer) and not np.all(np.isfinite(fixed)):
        raise ValueError(f"weights must be finite, got {fixed}.")
    return tasks, fixed
