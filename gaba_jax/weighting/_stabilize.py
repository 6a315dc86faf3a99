"""Warm-up, average and floor around any rule."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._average_norms import average_norms
from gaba_jax.weighting._base import (
    Number,
    Weighting,
    check_num_tasks,
    check_weighting,
    equal_weights,
    number,
    share_out,
)
from gaba_jax.weighting._moving_average import check_decay, decay_over, rate_of

Floor = Literal["renormalize", "project"]
Average = Literal["weights", "norms"]


class StabilizeState(NamedTuple):
    """State of :func:`stabilize`. Names and order are an on-disk promise.

    Attributes:
      stabilize_step: [] int32, updates so far, those between measurements included.
      ema_mass: [] float32, the weight that measurements have in the average: 1 as published,
        0 before the first one under ``debias=True``.
      ema_weights: [K] float32, the average of the raw weights.
      inner_state: the state of the wrapped rule.
    """

    stabilize_step: Int[Array, ""]
    ema_mass: Float[Array, ""]
    ema_weights: Float[Array, " tasks"]
    inner_state: Any


def stabilize(
    weighting: Weighting,
    *,
    beta: Number = 0.99,
    warmup_steps: int | Array = 100,
    min_weight: Number = 0.05,
    floor: Floor = "renormalize",
    debias: bool = False,
    average: Average = "weights",
) -> Weighting:
    r"""Wraps a rule in a warm-up, an exponential average and a floor.

    The rule's weights, clipped at 0 and normalised, are averaged:

    .. math::
        m_t &= b\, m_{t-1} + 1 - b, \qquad b = \beta^{e_t} \\
        \bar\lambda_t &= \bar\lambda_{t-1} + \frac{1 - b}{m_t} (\lambda_t - \bar\lambda_{t-1})

    from :math:`\bar\lambda_0 = 1/K` and :math:`m_0 = 1` (as published), or :math:`m_0 = 0` with
    ``debias=True``: the first measurement is taken whole. :math:`e_t` is the number of updates
    since the previous measurement. For the first ``warmup_steps`` updates the weights are 1/K and
    average and rule stay untouched. Then the floor f = ``min_weight`` is applied:

    * "renormalize": :math:`\max(\bar\lambda_i, f) / \sum_j \max(\bar\lambda_j, f)`, the published
      arithmetic. It can end below f; the true bound is :math:`f / (1 + (K - 1) f)`.
    * "project": the Euclidean projection onto :math:`\{w \ge f, \sum w = 1\}`.

    An absent task keeps its average; the present ones share the mass they held together.

    ``average="norms"`` averages each task's gradient norm instead, with the decay ``beta``, for
    loaders that serve one task a batch: it is ``stabilize(average_norms(weighting, beta=beta),
    beta=0)`` with the other arguments. See :func:`average_norms`.

    When not to use it: around a rule whose promise needs this very update's weights, such as no
    conflict, or whose weights may be negative or sum to something else: they are averaged, clipped
    and normalised. Around a rule that averages by itself, such as :func:`equalize`, the weights
    lag twice.

    Args:
      weighting: any :class:`Weighting`.
      beta: decay of the average in [0, 1), default 0.99; 0 is no smoothing. May be traced. It
        counts updates: a measurement n updates after the last one keeps ``beta**n``. For a decay of
        b per measurement, every n updates, pass ``b ** (1 / n)``.
      warmup_steps: updates with weights 1/K, default 100.
      min_weight: floor f in [0, 1/K], default 0.05. May be traced.
      floor: "renormalize" or "project".
      debias: start the average at the first measurement, default False. Averages of norms always
        do: there is nothing else to start from.
      average: "weights" (default) or "norms", for rules that need norms alone.

    Returns:
      A :class:`Weighting` with a :class:`StabilizeState`; its weights are >= 0 and sum to 1.

    Raises:
      ValueError: ``num_tasks`` < 2, ``beta`` outside [0, 1), ``warmup_steps`` negative,
        ``min_weight`` negative or above 1/K, an unknown ``floor`` or ``average``, a traced
        ``beta`` or ``min_weight`` of less than 32 bits, or ``average="norms"`` around a rule that
        needs losses, cosines or nothing.

    Example:
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.stabilize(weighting.inverse_norm(3), beta=0.9, debias=True))
    """
    check_weighting(weighting)
    num_tasks = check_num_tasks(weighting.num_tasks, least=2)
    check_decay("beta", beta)
    least, warmup = number("min_weight", min_weight), number("warmup_steps", warmup_steps)
    if warmup is not None and not (warmup >= 0 and warmup.is_integer()):
        raise ValueError(f"{warmup_steps=} must be at least 0, and whole.")
    if least is not None and not 0 <= num_tasks * least <= 1 + 1e-6:
        raise ValueError(
            f"{min_weight=} must be in [0, 1/num_tasks]: {num_tasks} weights that sum to 1 cannot "
            f"all be at least {min_weight}; the most is {1 / num_tasks:.4g}."
        )
    if floor not in ("renormalize", "project"):
        raise ValueError(f'{floor=} must be "renormalize" or "project".')
    if average not in ("weights", "norms"):
        raise ValueError(f'{average=} must be "weights" or "norms".')
    if average == "norms":
        weighting, beta = average_norms(weighting, beta=beta), 0.0
    # Where each weight holds by itself, the average needs nobody else to be present.
    alone = weighting.least_present == 1

    def init() -> StabilizeState:
        return StabilizeState(
            stabilize_step=jnp.zeros([], jnp.int32),
            ema_mass=jnp.asarray(0.0 if debias else 1.0, jnp.float32),
            ema_weights=jnp.asarray(equal_weights(num_tasks)),
            inner_state=weighting.init(),
        )

    def update(stats: TaskStats, state: StabilizeState) -> tuple[Array, StabilizeState]:
        step = state.stabilize_step + jnp.minimum(
            stats.elapsed, jnp.iinfo(jnp.int32).max - state.stabilize_step
        )
        warm = step > warmup_steps
        # An average forgets by the updates that passed, of them only those after the warm-up.
        passed = jnp.clip(step - warmup_steps, 1, stats.elapsed)
        inner_weights, inner_state = weighting.update(
            stats._replace(elapsed=passed), state.inner_state
        )
        decay = decay_over(beta, passed)
        present = jnp.ones_like(stats.present) if alone else stats.present
        raw = _scaled_to_average(inner_weights, present, state.ema_weights)
        mass = decay * state.ema_mass + (1 - decay)
        rate = rate_of(decay, mass)
        averaged = StabilizeState(
            stabilize_step=step,
            ema_mass=mass,
            # Not ema + rate (raw - ema): at rate 1 that costs a small weight its digits.
            ema_weights=(1 - rate) * state.ema_weights + rate * raw,
            inner_state=inner_state,
        )
        held = state._replace(stabilize_step=step)
        new_state = jax.tree.map(lambda new, old: jnp.where(warm, new, old), averaged, held)
        floored = _FLOORS[floor](new_state.ema_weights, min_weight)
        return jnp.where(warm, floored, equal_weights(num_tasks)), new_state

    return Weighting(
        num_tasks,
        weighting.needs,
        init,
        update,
        equal_weights(num_tasks),
        least_present=1 if alone else 2,
        absent="each" if alone else "rescale",
    )


def _scaled_to_average(
    weights: Float[Array, " tasks"],
    present: Bool[Array, " tasks"],
    average: Float[Array, " tasks"],
) -> Float[Array, " tasks"]:
    """The rule's weights on the average's scale; an absent task's average stands."""
    # 1 - absent, not the sum of the present: with all present that is 1 without rounding, and the
    # average cannot drift away from the simplex.
    mass = 1 - jnp.sum(jnp.where(present, 0, average))
    raw = jnp.maximum(weights.astype(jnp.float32), 0)
    return jnp.where(present, share_out(raw, present, mass), average)


def _renormalize(average: Float[Array, " tasks"], min_weight: Number) -> Float[Array, " tasks"]:
    raised = jnp.maximum(average, jnp.asarray(min_weight, jnp.float32))
    return raised / jnp.sum(raised)


def _project(average: Float[Array, " tasks"], min_weight: Number) -> Float[Array, " tasks"]:
    num_tasks = average.shape[0]
    least = jnp.clip(jnp.asarray(min_weight, jnp.float32), 0, 1 / num_tasks)
    free = jnp.maximum(1 - num_tasks * least, 0)
    # Onto the simplex of sum `free` above the floor: the threshold is the largest over all j of
    # what would take the j largest entries down to that sum.
    above = average - least
    counts = jnp.arange(1, num_tasks + 1, dtype=jnp.float32)
    cumulative = jnp.cumsum(jnp.sort(above, descending=True))
    kept = jnp.maximum(above - jnp.max((cumulative - free) / counts), 0)
    return least + kept * (free / jnp.maximum(jnp.sum(kept), 1e-12))


_FLOORS = {"renormalize": _renormalize, "project": _project}
