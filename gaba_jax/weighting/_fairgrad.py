"""FairGrad: alpha-fair gains for all tasks."""

import jax.numpy as jnp
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    Number,
    Weighting,
    check_num_tasks,
    check_positive,
    equal_shares,
    equal_weights,
)
from gaba_jax.weighting._gramian import (
    NEEDS,
    SolverState,
    no_residual,
    of_gradients,
    relative_norms,
    unit_gramian,
    usable,
)
from gaba_jax.weighting._solvers import power_equation

_LARGEST_SCALE = 1e30


def fairgrad(
    num_tasks: int, *, alpha: Number = 2.0, max_amplification: Number | None = None
) -> Weighting:
    r"""FairGrad (Ban and Ji, "Fair resource allocation in multi-task learning", ICML 2024).

    The direction d of bounded length with the largest alpha-fair utility of the gains
    :math:`\langle g_i, d \rangle`, :math:`\sum_i u(\langle g_i, d \rangle)` with
    :math:`u(x) = x^{1 - \alpha} / (1 - \alpha)`. It is :math:`d = \sum_i w_i g_i` with

    .. math:: (G w)_i = w_i^{-1/\alpha}, \qquad G_{ij} = \langle g_i, g_j \rangle, \quad w > 0

    so every task gains. alpha = 1 is :func:`nash_mtl`; a large alpha leads to the same gain for
    all. Solved as :math:`C v = s\, v^{-1/\alpha}` with the unit gradients' Gramian C,
    :math:`v_i = w_i \|g_i\|` and :math:`s_i = \|g_i\|^{(1 - \alpha)/\alpha}`.

    **Heads.** Where gradients nearly oppose each other the weights grow, so that little is left of
    their sum is still long enough: two gradients of cosine c have :math:`(1 + c)^{-\alpha/(1 +
    \alpha)}` times the weights of orthogonal ones. On the shared parameters that cancels. A head
    has one task alone, where nothing cancels: its update is that many times too large, 2,715 times
    at an angle of 0.2 degrees from opposite. ``max_amplification`` bounds the factor. Where it is
    exceeded all weights are scaled down together, so the direction stays and the step is shorter.
    ``weight_task_specific=False`` in :func:`gaba_jax.balance` leaves heads out of it altogether.

    When not to use it: where no direction improves all tasks the weights have no bound, and only a
    ridge of 1e-6 on C keeps them finite; the residual shows it.

    Args:
      num_tasks: number of tasks K.
      alpha: fairness, > 0, default 2 as in the paper's experiments.
      max_amplification: at least 1, how many times as large as for orthogonal gradients of the same
        norms a weight may be, default None: as published, without a bound. 10 is safe for heads.

    Returns:
      A :class:`Weighting` with a :class:`SolverState`; its residual is the largest relative error
      of an equation. The weights are positive; their sum is not 1 but goes with
      :math:`\|g\|^{-2\alpha/(1 + \alpha)}`, so combine it with an optimizer that does not mind the
      scale, or wrap it in :func:`rescaled`. A task of norm zero gets 1/K, and so does a single one.

    Raises:
      ValueError: ``alpha`` is not positive and finite, or ``max_amplification`` below 1.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.fairgrad(2, alpha=1.0))
      >>> grads = {"shared": jnp.array([[4.0, 0.0], [0.0, 0.5]])}
      >>> _, state = tx.update(grads, tx.init({"shared": jnp.zeros(2)}))
      >>> print(np.asarray(state.task_weights).round(3))
      [0.25 2.  ]
    """
    check_num_tasks(num_tasks)
    check_positive("alpha", alpha)
    if max_amplification is not None:
        bound = check_positive("max_amplification", max_amplification)
        if bound is not None and bound < 1:
            raise ValueError(f"{max_amplification=} must be at least 1: 1 is without any conflict.")

    def update(stats: TaskStats, state: SolverState) -> tuple[Array, SolverState]:
        del state
        fairness = jnp.asarray(alpha, jnp.float32)
        largest = jnp.max(jnp.where(stats.present, stats.norms, 0))
        norms = jnp.where(usable(stats), relative_norms(stats), 1)
        factors = norms ** ((1 - fairness) / fairness)
        point, residual = power_equation(unit_gramian(stats), factors, fairness)
        if max_amplification is not None:
            without_conflict = factors ** (fairness / (1 + fairness))
            amplified = jnp.where(usable(stats), point / without_conflict, 0)
            most = jnp.asarray(max_amplification, jnp.float32)
            point = point * (most / jnp.maximum(jnp.max(amplified), most))
        scale = jnp.where(largest > 0, largest, 1) ** (-2 * fairness / (1 + fairness))
        scale = jnp.minimum(scale, _LARGEST_SCALE)
        weights = of_gradients(point, stats, 0) * scale
        fair = usable(stats) & (num_tasks > 1)  # a single task has nothing to share
        weights = jnp.where(fair, weights, equal_shares(stats.present))
        return weights, SolverState(residual)

    return Weighting(num_tasks, NEEDS, no_residual, update, equal_weights(num_tasks))
