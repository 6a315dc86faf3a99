"""Learning-rate annealing: the largest gradient element of the first task over the others' mean."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import LARGEST, Number, Weighting, check_num_tasks
from gaba_jax.weighting._element_statistics import max_abs, mean_abs
from gaba_jax.weighting._moving_average import check_decay, decay_over


class AnnealedState(NamedTuple):
    """State of :func:`lr_annealing` and :func:`inverse_dirichlet`. An on-disk promise.

    Attributes:
      annealed_weights: [K] float32, the average of each task's ratio, from 1.
    """

    annealed_weights: Float[Array, " tasks"]


def lr_annealing(num_tasks: int, *, beta: Number = 0.9) -> Weighting:
    r"""Learning-rate annealing (Wang, Teng and Perdikaris 2021), for losses beside a main one.

    .. math::
        \hat\lambda_i &= \frac{\max |\nabla L_1|}{\mathrm{mean}\, |\nabla L_i|} \\
        \lambda_i &= \beta\, \lambda_i + (1 - \beta)\, \hat\lambda_i, \qquad \lambda_1 = 1

    Maximum and mean are over the elements of a gradient, on all measured parameters together. The
    first task is the reference: the residual of the equation in the paper. Its weight stays 1, so
    the learning rate keeps its meaning, and the others (boundary and initial conditions) are raised
    to it. All averages start at 1.

    **The meaning of** ``beta``. It is the part of the average that is kept, 0 is none, as in all
    averages of this library. The paper's formula has :math:`\alpha` for the part that is *new* and
    recommends 0.9; its code keeps 0.9 of the old, as the default does here. For the formula to the
    letter pass ``beta=0.1``.

    **Where it differs from the paper.** A task whose gradient is zero, and every task while that of
    the first one is, keeps its weight: there is no ratio. A ratio is at most 1e18.

    When not to use it: a maximum over a mean grows with the number of parameters and with one large
    element, so the others are lifted far above equal contributions. On a network of two hidden
    layers for :math:`u'' = f` the boundary's contribution was 11 to 29 times that of the residual.
    :func:`equalize` holds the contributions in ratios that you choose. A task that finishes is
    lifted without end.

    Args:
      num_tasks: number of tasks K >= 2; the first one is the reference.
      beta: decay of the average per update in [0, 1), default 0.9; 0 is no average. It counts
        updates: a measurement n updates after the last one keeps ``beta**n``. For a decay of b per
        measurement, every n updates, pass ``b ** (1 / n)``.

    Returns:
      A :class:`Weighting` with an :class:`AnnealedState`; it needs the statistics ``max_abs`` and
      ``mean_abs``. The weights are positive and each holds by itself. An absent task keeps its
      own; without the first task nothing is learned.

    Raises:
      ValueError: ``num_tasks`` < 2, or ``beta`` outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.lr_annealing(2, beta=0.0))
      >>> grads = jnp.array([[6.0, -2.0], [0.1, 0.5]])  # the largest is 6, the other mean is 0.3
      >>> _, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(state.task_weights.round(3))
      [ 1. 20.]

    References:
      S. Wang, Y. Teng, P. Perdikaris, "Understanding and mitigating gradient flow pathologies in
      physics-informed neural networks", 2021, arXiv:2001.04536.
    """
    check_num_tasks(num_tasks, least=2)
    check_decay("beta", beta)
    others = np.arange(num_tasks) > 0

    def update(stats: TaskStats, state: AnnealedState) -> tuple[Array, AnnealedState]:
        largest, means = stats.extra[max_abs.name][0], stats.extra[mean_abs.name]
        return anneal(stats, state, largest, means, jnp.asarray(others), beta)

    ones = np.ones(num_tasks, np.float32)
    needs = frozenset({max_abs, mean_abs})
    return Weighting(num_tasks, needs, init_of(num_tasks), update, ones, absent="each")


def anneal(
    stats: TaskStats,
    state: AnnealedState,
    reference: Float[Array, ""],
    sizes: Float[Array, " tasks"],
    moved: Bool[Array, " tasks"],
    beta: Number,
) -> tuple[Array, AnnealedState]:
    """The averages of ``reference / sizes`` of the tasks to move, where that is a ratio."""
    known = stats.present & moved & (sizes > 0) & (reference > 0)
    ratios = jnp.minimum(reference / jnp.where(known, sizes, 1), LARGEST)
    decay = decay_over(beta, stats.elapsed)
    averages = decay * state.annealed_weights + (1 - decay) * ratios
    weights = jnp.where(known, averages, state.annealed_weights)
    return weights, AnnealedState(weights)


def init_of(num_tasks: int) -> Callable[[], AnnealedState]:
    """What makes the state before any update."""
    return lambda: AnnealedState(jnp.ones([num_tasks], jnp.float32))
