"""Aligned-MTL: the principal components of the gradients, all made the same length."""

from typing import Literal

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Weighting, check_num_tasks, equal_weights
from gaba_jax.weighting._gramian import (
    NEEDS,
    among_present,
    relative_norms,
    shares,
    unit_gramian,
    usable,
)
from gaba_jax.weighting._solvers import eigen, significant

Scale = Literal["min", "median", "rmse"]


def aligned_mtl(
    num_tasks: int, *, scale: Scale = "min", task_priorities: ArrayLike | None = None
) -> Weighting:
    r"""Aligned-MTL (Senushkin et al., "Independent component alignment", CVPR 2023).

    .. math:: w = \sigma\, V \Lambda^{-1/2} V^\top p, \qquad
        G = V \Lambda V^\top, \quad G_{ij} = \langle g_i, g_j \rangle

    The gradients are replaced by orthogonal ones of the same length :math:`\sigma`, nearest to
    them, and averaged with the ``task_priorities`` p. Eigenvalues come from Jacobi's rotations on
    the graded Gramian, so that of a task 500 times weaker (250 000 times in G) keeps its digits.

    When not to use it: with ``scale="min"`` the update is as short as the smallest singular value.
    It goes to nothing as gradients become dependent, and below an angle of 0.03 degrees, which
    float32 cosines do not tell from 0, it is about nothing. With the other scales a direction that
    the cosines show to be dependent is left out, as a whole, and its length counts as 0. At large
    K the eigenvectors cost most of all rules.

    Args:
      num_tasks: number of tasks K.
      scale: the common length: "min", the smallest singular value (default, as published), or
        their "median" or "rmse" (root mean square).
      task_priorities: [K] positive, default equal; divided by their sum.

    Returns:
      A :class:`Weighting`; the weights can be negative, and their sum follows from the length. A
      task of norm zero gets p.

    Raises:
      ValueError: an unknown ``scale``, or ``task_priorities`` is not a positive [K].

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.aligned_mtl(2))
      >>> grads = {"shared": jnp.array([[500.0, 0.0], [0.0, 1.0]])}
      >>> updates, _ = tx.update(grads, tx.init({"shared": jnp.zeros(2)}))
      >>> print(np.asarray(updates["shared"]).round(3))
      [0.5 0.5]
    """
    check_num_tasks(num_tasks)
    if scale not in ("min", "median", "rmse"):
        raise ValueError(f'{scale=} must be "min", "median" or "rmse".')
    priorities = shares(task_priorities, num_tasks)

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        norms, counted = relative_norms(stats), usable(stats)
        values, vectors = eigen(norms[:, None] * unit_gramian(stats) * norms)
        squares = jnp.sort(values)
        squares = jnp.where(jnp.arange(num_tasks) < num_tasks - jnp.sum(counted), jnp.nan, squares)
        if scale == "min":
            kept, squared = values > 0, jnp.nanmin(squares)
        else:
            kept = significant(values, vectors, norms**2)
            squared = jnp.nanmedian(squares) if scale == "median" else jnp.nanmean(squares)
        factors = jnp.where(kept, jnp.sqrt(squared / jnp.where(kept, values, 1)), 0)
        present = among_present(priorities, stats)
        weights = vectors @ (factors * (jnp.where(counted, present, 0) @ vectors))
        return jnp.where(counted, weights, present), state

    return Weighting(num_tasks, NEEDS, optax.EmptyState, update, equal_weights(num_tasks))
