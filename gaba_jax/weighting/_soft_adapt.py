"""SoftAdapt: more weight to the losses that fall slowest, by a softmax of their rates of change."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    LARGEST,
    Number,
    Weighting,
    check_num_tasks,
    equal_weights,
    number,
    over_present,
    task_losses,
)

Variant = Literal["plain", "loss_weighted", "normalized"]


class SoftAdaptState(NamedTuple):
    """State of :func:`soft_adapt`. Names and order are an on-disk promise.

    Attributes:
      last_losses: [K] float32, each task's last loss; 0 until there is one.
      loss_ages: [K] int32, updates from then to the last measurement; -1 until there is one.
    """

    last_losses: Float[Array, " tasks"]
    loss_ages: Int[Array, " tasks"]


def soft_adapt(num_tasks: int, *, beta: Number = 0.1, variant: Variant = "plain") -> Weighting:
    r"""Weights from the rates at which the losses change (SoftAdapt, Heydari et al. 2019).

    .. math:: \lambda_i = \frac{c_i\, e^{\beta s_i}}{\sum_j c_j\, e^{\beta s_j}}, \qquad
        s_i = \frac{L_i(t) - L_i(t - e)}{e}

    with e the number of updates since task i's loss before this one, so that s is a rate per
    update. The loss that falls slowest, or rises fastest, has the largest s and the largest weight.

    * "plain": c = 1.
    * "loss_weighted": :math:`c_i = L_i`, so that among losses that change alike the largest has the
      most weight.
    * "normalized": c = 1, and each s is divided by :math:`\sum_j |s_j|`. A common factor on all
      losses then changes nothing, and ``beta`` needs no knowledge of their size.

    **The meaning of** ``beta``. It is the paper's: the sharpness of the softmax. Larger prefers the
    slowest loss more, 0 gives equal weights, and a negative one prefers the fastest. It is no part
    of an average that is kept, as ``beta`` is in other rules.

    **Where it differs from the paper**, which takes s from several past losses by finite
    differences of higher order, and the losses of "loss_weighted" as means over them. Here s is the
    difference of two losses; ``stabilize(soft_adapt(K), beta=...)`` averages the weights. At the
    first measurement, where there is no rate, the weights are equal. A task without an earlier loss
    counts with the mean rate of the others.

    When not to use it: it knows nothing of how strongly the tasks pull. Rates have the units of the
    losses: with "plain" and a ``beta`` that is too small for them the weights stay equal, and with
    one that is too large they follow the noise between batches.

    Args:
      num_tasks: number of tasks K.
      beta: the sharpness, finite, default 0.1 as in the paper. May be traced.
      variant: "plain" (default), "loss_weighted" or "normalized".

    Returns:
      A :class:`Weighting` with a :class:`SoftAdaptState`; it needs ``task_losses`` at update and
      measures no gradients. The weights are >= 0 and sum to 1. An absent task keeps its last loss.

    Raises:
      ValueError: ``beta`` is not finite, or an unknown ``variant``.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from gaba_jax import weighting
      >>> rule = weighting.soft_adapt(2, beta=2.0)
      >>> def step(state, losses):
      ...     stats = weighting.TaskStats(
      ...         jnp.zeros(2), None, losses, jnp.ones(2, bool), jnp.int32(1))
      ...     weights, state = rule.update(stats, state)
      ...     return state, weights
      >>> losses = jnp.array([[4.0, 2.0], [4.0, 1.5]])  # the second one fell by 0.5
      >>> print(np.asarray(jax.lax.scan(step, rule.init(), losses)[1]).round(3))
      [[0.5   0.5  ]
       [0.731 0.269]]

    References:
      A. Heydari, C. Thompson, A. Mehmood, "SoftAdapt: Techniques for adaptive loss weighting of
      neural networks with multi-part loss functions", 2019, arXiv:1912.12355.
    """
    check_num_tasks(num_tasks)
    sharpness = number("beta", beta)
    if sharpness is not None and not abs(sharpness) < float("inf"):
        raise ValueError(f"{beta=} must be finite.")
    if variant not in ("plain", "loss_weighted", "normalized"):
        raise ValueError(f'{variant=} must be "plain", "loss_weighted" or "normalized".')

    def init() -> SoftAdaptState:
        return SoftAdaptState(
            last_losses=jnp.zeros([num_tasks], jnp.float32),
            loss_ages=jnp.full([num_tasks], -1, jnp.int32),
        )

    def update(stats: TaskStats, state: SoftAdaptState) -> tuple[Array, SoftAdaptState]:
        losses, present = task_losses(stats), stats.present
        seen = state.loss_ages >= 0
        room = jnp.iinfo(jnp.int32).max - state.loss_ages
        ages = jnp.where(seen, state.loss_ages + jnp.minimum(stats.elapsed, room), -1)
        compared = present & seen
        rates = _rates(losses, state.last_losses, ages, compared)
        if variant == "normalized":
            total = jnp.sum(jnp.where(present, jnp.abs(rates), 0))
            rates = rates / jnp.where(total > 0, total, 1)
        logits = jnp.clip(jnp.asarray(beta, jnp.float32) * rates, -LARGEST, LARGEST)
        weights = jax.nn.softmax(jnp.where(present, logits, -jnp.inf))
        if variant == "loss_weighted":
            largest = jnp.max(jnp.where(present, losses, 0))
            parts = jnp.maximum(losses, 0) / jnp.where(largest > 0, largest, 1)
            weights = weights * jnp.where(jnp.any(compared), parts, 1)
        return over_present(weights, present), SoftAdaptState(
            last_losses=jnp.where(present, losses, state.last_losses),
            loss_ages=jnp.where(present, 0, ages),
        )

    return Weighting(num_tasks, frozenset({"losses"}), init, update, equal_weights(num_tasks))


def _rates(
    losses: Float[Array, " tasks"],
    last: Float[Array, " tasks"],
    ages: Int[Array, " tasks"],
    compared: Bool[Array, " tasks"],
) -> Float[Array, " tasks"]:
    """The change per update, that of the others for a task without an earlier loss."""
    # Halves and a limit, so that no difference or sum leaves float32's range.
    halves = jnp.clip(losses / 2 - last / 2, -LARGEST, LARGEST)
    rates = jnp.where(compared, 2 * halves / jnp.maximum(ages, 1).astype(jnp.float32), 0)
    count = jnp.maximum(jnp.sum(compared), 1).astype(jnp.float32)
    return jnp.where(compared, rates, jnp.sum(rates) / count)
