"""Uncertainty weighting, learned log-variances of the losses; IMTL-L is the same formula."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    Weighting,
    check_num_tasks,
    check_optimizer,
    descend,
    task_losses,
)

_LARGEST_LOG_VARIANCE = 40.0  # weights from 4e-18 to 2e17


class UncertaintyState(NamedTuple):
    """State of :func:`uncertainty`. Names and order are an on-disk promise.

    Attributes:
      log_variances: [K] float32.
      optimizer_state: the state of ``weight_optimizer``.
    """

    log_variances: Float[Array, " tasks"]
    optimizer_state: Any


def uncertainty(
    num_tasks: int, *, weight_optimizer: optax.GradientTransformation | None = None
) -> Weighting:
    r"""Weights learned as the precisions of the tasks (Kendall et al., CVPR 2018).

    Parameters and log-variances s together minimise

    .. math:: \sum_i \left(e^{-s_i} L_i + s_i\right), \qquad s_i = \log \sigma_i^2

    so the weights are :math:`\lambda_i = e^{-s_i}` and the gradient of the log-variances is
    :math:`1 - e^{-s_i} L_i`. This is the paper's :math:`\frac{1}{2 \sigma_i^2} L_i + \log \sigma_i`
    without the common factor 1/2, for all tasks alike: what the paper has for a regression. (For a
    classification it has twice the weight.)

    For a steady loss the weight goes to :math:`1 / L_i`: scales are evened out, whatever the
    gradients do. An update applies the weights from before its own step, 1 each at first.

    When not to use it: the log-variance of a loss of 1000 is 7, which takes the default optimizer
    280 updates, and a loss that goes to 0 takes an ever larger weight (log-variances are kept
    within ±40). Losses must be positive. Unequal gradients of equal losses are left unequal: see
    :func:`inverse_share`.

    Args:
      num_tasks: number of tasks K >= 2.
      weight_optimizer: any optax optimizer for s, default ``optax.adam(0.025)``.

    Returns:
      A :class:`Weighting` with an :class:`UncertaintyState`; it needs ``task_losses`` at update and
      measures no gradients. The weights are positive; their sum is K at first, then free. An absent
      task keeps its own.

    Raises:
      ValueError: ``num_tasks`` < 2, or a ``weight_optimizer`` that is none.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import weighting
      >>> rule = weighting.uncertainty(2, weight_optimizer=optax.sgd(0.1))
      >>> stats = weighting.TaskStats(
      ...     norms=jnp.zeros(2), cosines=None, losses=jnp.array([4.0, 0.5]),
      ...     present=jnp.ones(2, bool), elapsed=jnp.int32(1))
      >>> _, state = rule.update(stats, rule.init())
      >>> state.log_variances
      Array([ 0.3 , -0.05], dtype=float32)
    """
    check_num_tasks(num_tasks, least=2)
    optimizer = check_optimizer(optax.adam(0.025) if weight_optimizer is None else weight_optimizer)

    def init() -> UncertaintyState:
        # Buffers of their own, so that the state can be donated.
        zeros = jnp.zeros([num_tasks], jnp.float32)
        return UncertaintyState(zeros, optimizer.init(jnp.array(zeros)))

    def update(stats: TaskStats, state: UncertaintyState) -> tuple[Array, UncertaintyState]:
        log_variances = state.log_variances
        weights = jnp.exp(-log_variances)
        gradient = 1 - weights * task_losses(stats)
        learned, optimizer_state = descend(
            optimizer, gradient, state.optimizer_state, log_variances, stats.present
        )
        learned = jnp.clip(learned, -_LARGEST_LOG_VARIANCE, _LARGEST_LOG_VARIANCE)
        kept = jnp.where(stats.present, learned, log_variances)
        return weights, UncertaintyState(kept, optimizer_state)

    ones = np.ones(num_tasks, np.float32)
    return Weighting(num_tasks, frozenset({"losses"}), init, update, ones, absent="each")


def imtl_l(
    num_tasks: int, *, weight_optimizer: optax.GradientTransformation | None = None
) -> Weighting:
    r"""The loss balance of impartial multi-task learning (IMTL-L, Liu et al., ICLR 2021).

    Parameters and scales s together minimise

    .. math:: \sum_i \left(e^{s_i} L_i - s_i\right)

    so the weights are :math:`\lambda_i = e^{s_i}`, the gradient of the scales is
    :math:`e^{s_i} L_i - 1`, and for steady losses all :math:`e^{s_i} L_i` come to 1.

    With s = -log-variance this is the objective of :func:`uncertainty`, to the letter, and so this
    *is* :func:`uncertainty` under the name of its other derivation: there a noise model, here that
    no loss should be favoured. (The uncertainty paper's own objective, with its factor 1/2 on every
    loss, differs from it by that common factor.) A comparison of the two tells nothing. The paper
    learns s with the optimizer of the network; here it has one of its own.

    When not to use it: as for :func:`uncertainty`: the scale of a loss far from 1 takes hundreds of
    updates to learn, and losses must be positive.

    Args:
      num_tasks: number of tasks K >= 2.
      weight_optimizer: any optax optimizer for s, default ``optax.adam(0.025)``.

    Returns:
      A :class:`Weighting` with an :class:`UncertaintyState`, whose ``log_variances`` are -s; it
      needs ``task_losses`` at update and measures no gradients. The weights are positive; their sum
      is K at first, then free. An absent task keeps its own.

    Raises:
      ValueError: ``num_tasks`` < 2, or a ``weight_optimizer`` that is none.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import weighting
      >>> rule = weighting.imtl_l(2, weight_optimizer=optax.sgd(0.1))
      >>> stats = weighting.TaskStats(
      ...     norms=jnp.zeros(2), cosines=None, losses=jnp.array([4.0, 0.5]),
      ...     present=jnp.ones(2, bool), elapsed=jnp.int32(1))
      >>> _, state = rule.update(stats, rule.init())
      >>> -state.log_variances
      Array([-0.3 ,  0.05], dtype=float32)
    """
    return uncertainty(num_tasks, weight_optimizer=weight_optimizer)
