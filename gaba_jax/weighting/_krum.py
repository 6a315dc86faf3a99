"""Krum: the gradient that lies nearest to the others."""

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Weighting, check_num_tasks, equal_shares, equal_weights
from gaba_jax.weighting._gramian import NEEDS, relative_norms, unit_gramian


def krum(num_tasks: int, *, num_byzantine: int = 1, num_selected: int = 1) -> Weighting:
    r"""Krum and Multi-Krum (Blanchard et al., NeurIPS 2017): gradients that agree are selected.

    .. math:: s_i = \sum_{j \in N_i} \|g_i - g_j\|, \qquad \lambda_i = \frac1m \
        \text{ for the } m \text{ tasks of lowest } s_i, \text{ else } 0

    with :math:`N_i` the :math:`K - f - 2` tasks whose gradients are nearest to that of task i, f
    = ``num_byzantine`` and m = ``num_selected``. So f gradients that are anything at all, such as
    those of an adversary or of a broken worker, do not move the update far. Distances follow from
    norms and cosines.

    When not to use it: to balance tasks that differ on purpose, since it follows those that agree.
    A task that is not selected has weight 0, and so has its head, unless
    :func:`gaba_jax.balance` has ``weight_task_specific=False``. For outliers in single
    coordinates there is :func:`gaba_jax.trimmed_mean`.

    Args:
      num_tasks: number of gradients K. The paper's guarantee needs K >= 2 f + 3.
      num_byzantine: f, how many of them may be anything, >= 0, default 1. With fewer than f + 3
        present gradients each has its nearest one alone in :math:`N_i`.
      num_selected: m, from 1 to K, default 1. Of fewer present gradients all are selected.

    Returns:
      A :class:`Weighting`. The weights are 1/m or 0 and sum to 1; 1/K before the first measurement
      and where all gradients are zero. Of equal scores the first task is selected. A gradient of
      norm zero is a point like any other.

    Raises:
      ValueError: ``num_byzantine`` is no integer >= 0, or ``num_selected`` none from 1 to K.

    References:
      "Machine learning with adversaries: Byzantine tolerant gradient descent", NeurIPS 2017. The
      paper adds up squared distances; the sum of distances is what TorchJD selects by, and is
      taken here so that both select the same.

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.krum(4, num_selected=2))
      >>> grads = jnp.array([[1.0, 2.0], [1.0, 2.1], [-900.0, 5.0], [1.2, 2.0]])
      >>> updates, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(state.task_weights)
      [0.5 0.5 0.  0. ]
    """
    check_num_tasks(num_tasks)
    for name, value in (("num_byzantine", num_byzantine), ("num_selected", num_selected)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be an integer.")
    if num_byzantine < 0:
        raise ValueError(f"{num_byzantine=} must be at least 0.")
    if not 1 <= num_selected <= num_tasks:
        raise ValueError(f"{num_selected=} must be from 1 to num_tasks={num_tasks}.")

    def update(stats: TaskStats, state: optax.EmptyState) -> tuple[Array, optax.EmptyState]:
        present, norms = stats.present, relative_norms(stats)
        # From what differs: the squares of large norms would leave rounding.
        apart = norms[:, None] * norms * (1 - unit_gramian(stats))
        square = (norms[:, None] - norms) ** 2 + 2 * apart
        others = present & ~jnp.eye(num_tasks, dtype=bool)
        distances = jnp.sqrt(jnp.maximum(jnp.where(others, square, jnp.inf), 0))
        number = jnp.sum(present)
        near = jnp.maximum(number - num_byzantine - 2, 1)
        nearest = jnp.arange(num_tasks) < jnp.minimum(near, number - 1)
        scores = jnp.sum(jnp.where(nearest, jnp.sort(distances, axis=1), 0), axis=1)
        order = jnp.argsort(jnp.where(present, scores, jnp.inf))
        selected = jnp.minimum(num_selected, number)
        chosen = jnp.zeros([num_tasks], bool).at[order].set(jnp.arange(num_tasks) < selected)
        weights = jnp.where(chosen, 1 / selected.astype(jnp.float32), 0)
        return jnp.where(jnp.any(norms > 0), weights, equal_shares(present)), state

    return Weighting(num_tasks, NEEDS, optax.EmptyState, update, equal_weights(num_tasks))
