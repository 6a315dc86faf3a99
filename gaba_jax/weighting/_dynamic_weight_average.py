"""Dynamic weight average: more weight to the tasks whose loss falls slowly."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    LARGEST,
    Number,
    Weighting,
    check_num_tasks,
    check_positive,
    number,
    task_losses,
)


class DynamicWeightAverageState(NamedTuple):
    """State of :func:`dynamic_weight_average`. Names and order are an on-disk promise.

    Attributes:
      window_step: [] int32, updates in the window that is filling.
      window_counts: [K] int32, of these, those with the task.
      window_means: [K] float32, the mean losses in it.
      last_means: [K] float32, the mean losses of the window before; 0 until there is one.
      loss_ratios: [K] float32, r of the last two full windows; 1 until there are two.
    """

    window_step: Int[Array, ""]
    window_counts: Int[Array, " tasks"]
    window_means: Float[Array, " tasks"]
    last_means: Float[Array, " tasks"]
    loss_ratios: Float[Array, " tasks"]


def dynamic_weight_average(
    num_tasks: int, *, temperature: Number = 2.0, window: int | Array = 1
) -> Weighting:
    r"""Weights from how fast each loss fell of late (Liu et al., CVPR 2019).

    .. math:: \lambda_i = K \frac{e^{r_i / T}}{\sum_j e^{r_j / T}}, \qquad
        r_i = \frac{\bar L_i(n - 1)}{\bar L_i(n - 2)}

    with :math:`\bar L_i(n)` the mean loss in window n. Equal weights in the first two windows.

    When not to use it: it knows nothing of how strongly the tasks pull, so losses of different
    scale stay so; with losses that fall alike, or a noisy ``window`` of 1, it stays near equal
    weights or follows the noise. Losses must be positive.

    Args:
      num_tasks: number of tasks K.
      temperature: T > 0, default 2 as in the paper; larger is nearer to equal weights.
      window: measured updates in a window, default 1. The paper's window is an epoch: pass the
        updates per epoch.

    Returns:
      A :class:`Weighting` with a :class:`DynamicWeightAverageState`; it needs ``task_losses`` at
      update and measures no gradients. The weights are positive and sum to K, or to the number of
      present tasks. A task absent for a whole window keeps its mean and its ratio.

    Raises:
      ValueError: ``temperature`` is not positive and finite, or ``window`` no whole number >= 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gaba_jax import weighting
      >>> rule = weighting.dynamic_weight_average(2)
      >>> def step(state, losses):
      ...     stats = weighting.TaskStats(
      ...         jnp.zeros(2), None, losses, jnp.ones(2, bool), jnp.int32(1))
      ...     weights, state = rule.update(stats, state)
      ...     return state, weights
      >>> losses = jnp.array([[4.0, 2.0], [4.0, 1.0], [4.0, 1.0]])  # the second one halved
      >>> print(jax.lax.scan(step, rule.init(), losses)[1].round(2))
      [[1.   1.  ]
       [1.   1.  ]
       [1.12 0.88]]
    """
    check_num_tasks(num_tasks)
    check_positive("temperature", temperature)
    length = number("window", window)
    if length is not None and not (length >= 1 and length.is_integer()):
        raise ValueError(f"{window=} must be at least 1, and whole.")

    def init() -> DynamicWeightAverageState:
        return DynamicWeightAverageState(
            window_step=jnp.zeros([], jnp.int32),
            window_counts=jnp.zeros([num_tasks], jnp.int32),
            window_means=jnp.zeros([num_tasks], jnp.float32),
            last_means=jnp.zeros([num_tasks], jnp.float32),
            loss_ratios=jnp.ones([num_tasks], jnp.float32),
        )

    def update(
        stats: TaskStats, state: DynamicWeightAverageState
    ) -> tuple[Array, DynamicWeightAverageState]:
        logits = state.loss_ratios / jnp.asarray(temperature, jnp.float32)
        count = jnp.sum(stats.present).astype(jnp.float32)
        weights = count * jax.nn.softmax(jnp.where(stats.present, logits, -jnp.inf))
        counts = state.window_counts + stats.present.astype(jnp.int32)
        part = 1 / jnp.maximum(counts, 1).astype(jnp.float32)
        means = (1 - part) * state.window_means + part * task_losses(stats)
        filling = state._replace(
            window_step=state.window_step + 1,
            window_counts=counts,
            window_means=jnp.where(stats.present, means, state.window_means),
        )
        means = jnp.where(counts > 0, filling.window_means, state.last_means)
        known = (counts > 0) & (state.last_means > 0)
        ratios = jnp.clip(means / jnp.where(known, state.last_means, 1), 0, LARGEST)
        full = init()._replace(
            last_means=means, loss_ratios=jnp.where(known, ratios, state.loss_ratios)
        )
        at_end = filling.window_step >= window
        return weights, jax.tree.map(lambda new, old: jnp.where(at_end, new, old), full, filling)

    ones = np.ones(num_tasks, np.float32)
    return Weighting(num_tasks, frozenset({"losses"}), init, update, ones, absent="each")
