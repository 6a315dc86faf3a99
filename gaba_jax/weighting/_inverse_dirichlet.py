"""Inverse-Dirichlet weights: gradients whose elements have the same standard deviation."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Number, Weighting, check_num_tasks
from gaba_jax.weighting._element_statistics import std
from gaba_jax.weighting._lr_annealing import AnnealedState, anneal, init_of
from gaba_jax.weighting._moving_average import check_decay


def inverse_dirichlet(num_tasks: int, *, beta: Number = 0.5) -> Weighting:
    r"""Inverse-Dirichlet weighting (Maddu et al. 2022).

    .. math::
        \hat\lambda_i &= \frac{\max_j \mathrm{std}(\nabla L_j)}{\mathrm{std}(\nabla L_i)} \\
        \lambda_i &= \beta\, \lambda_i + (1 - \beta)\, \hat\lambda_i

    The standard deviation is that of a gradient's elements about their mean, on all measured
    parameters together. All tasks are lifted to the one that spreads most, whose own ratio is 1.
    All averages start at 1.

    Where the mean of the elements is small beside their spread, as in most networks, the standard
    deviation is the norm over the square root of the number of parameters. Then the ratios are
    those of ``inverse_norm`` with another sum, and the contributions are equal.

    **The meaning of** ``beta``. It is the part of the average that is kept, 0 is none. That is the
    paper's :math:`\alpha`, and the default is the paper's 0.5: an average of about two updates.

    **Where it differs from the paper.** A task whose elements have no spread keeps its weight:
    there is no ratio. A ratio is at most 1e18.

    When not to use it: a task that finishes is lifted without end; :func:`equalize` stops there.
    The sum of the weights grows with how far the tasks are apart, and with it the step of plain
    SGD; Adam does not see it.

    Args:
      num_tasks: number of tasks K >= 2.
      beta: decay of the average per update in [0, 1), default 0.5; 0 is no average. It counts
        updates: a measurement n updates after the last one keeps ``beta**n``. For a decay of b per
        measurement, every n updates, pass ``b ** (1 / n)``.

    Returns:
      A :class:`Weighting` with an :class:`AnnealedState`; it needs the statistic ``std``, of real
      gradients. The weights are at least 1 and each holds by itself. An absent task keeps its own,
      and the largest is taken over those present.

    Raises:
      ValueError: ``num_tasks`` < 2, or ``beta`` outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.inverse_dirichlet(2, beta=0.0))
      >>> grads = jnp.array([[6.0, -2.0], [0.1, 0.5]])  # standard deviations 4 and 0.2
      >>> _, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(state.task_weights.round(3))
      [ 1. 20.]

    References:
      S. Maddu, D. Sturm, C. Müller, I. Sbalzarini, "Inverse Dirichlet weighting enables reliable
      training of physics informed neural networks", 2022, arXiv:2107.00940.
    """
    check_num_tasks(num_tasks, least=2)
    check_decay("beta", beta)

    def update(stats: TaskStats, state: AnnealedState) -> tuple[Array, AnnealedState]:
        spreads = stats.extra[std.name]
        largest = jnp.max(jnp.where(stats.present, spreads, 0))
        return anneal(stats, state, largest, spreads, jnp.ones([num_tasks], bool), beta)

    ones = np.ones(num_tasks, np.float32)
    return Weighting(num_tasks, frozenset({std}), init_of(num_tasks), update, ones, absent="each")
