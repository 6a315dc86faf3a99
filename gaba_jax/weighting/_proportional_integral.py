"""A proportional-integral controller on the shares of the contributions."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    Number,
    Weighting,
    as_float32,
    check_not_negative,
    check_num_tasks,
    equal_weights,
    share_out,
    task_vector,
)
from gaba_jax.weighting._inverse_norm import inverse_norm

_LEAST = 1e-12  # a weight of zero would have no logarithm, and could never rise again


class ProportionalIntegralState(NamedTuple):
    """State of :func:`proportional_integral`. Names and order are an on-disk promise.

    Attributes:
      controlled_weights: [K] float32, what the rule returned last.
      integral: [K] float32, the integral part of the weights' logarithms.
      started: [] bool, whether the starting point is behind; from the start with ``debias=False``.
    """

    controlled_weights: Float[Array, " tasks"]
    integral: Float[Array, " tasks"]
    started: Bool[Array, ""]


def proportional_integral(
    num_tasks: int,
    *,
    ratios: ArrayLike | None = None,
    kp: Number = 0.5,
    ki: Number = 0.3,
    min_weight: Number = 1e-4,
    debias: bool = True,
) -> Weighting:
    r"""A proportional-integral controller that drives the contributions to the ratios you give.

    The controlled quantity is each task's share of the contributions with the weights of the last
    measured update, the set point is its part of the ``ratios`` r (1/K each by default), and the
    logarithms of the weights are what is set:

    .. math::
        e_i &= \frac{r_i}{\sum_j r_j} - \frac{w_i g_i}{\sum_j w_j g_j} \\
        u_i &= I_i + (k_p + k_i)\, e_i \\
        w_i' &= \max(f, \sigma e^{u_i}), \qquad \sum_i w_i' = 1 \\
        I_i' &= \log w_i' - k_p\, e_i

    with :math:`g_i` the norm of task i's gradient and f ``min_weight``; :math:`\sigma` is what
    makes the sum 1. The last line is the anti-windup (back-calculation): the integral is what
    explains the weights that were set, so that at the floor it stands still, and moves off as soon
    as the error turns. Away from the floor it is :math:`I_i + k_i e_i`, up to a constant.

    **What it is for.** GABA's closed form is proportional control. It leaves contributions unequal
    for K > 2; here the integral goes on until they are equal, or in the given ratios. Under
    constant norms the weights tend to those of :func:`inverse_norm` with the ratios as its
    priorities, as a low-pass filter. For equal ratios, near rest its time constant is about
    :math:`(K + k_p) / k_i` measured updates. Far from rest it moves by at most :math:`k_i` in the
    logarithm per update, so that one task that is R times louder than the others is held down after
    about :math:`\log(R) / k_i`, and one that is R times quieter than the others is lifted after
    :math:`(K - 1) \log(R) / k_i`.

    **Stability.** For constant norms the loop is stable from any start, for any K and any norms,
    where :math:`k_i + 2 k_p < 4`: the shares are the gradient of a convex function of the
    logarithms with curvature at most 1/2 (the circle criterion). For K = 2 the bound is sharp.

    **The start.** With ``debias=True`` the loop starts balanced, at those weights of
    :func:`inverse_norm` for the first measurement in which every present task has a gradient.
    Otherwise it starts from 1/K, and until the integral has moved, the loud task dominates; Adam's
    second moment remembers that for 1/(1 - b2) updates.

    When not to use it: where losses have the same scale, equal contributions did not beat uniform
    weights (``python -m benchmarks.controller``). A finished task (:math:`g_i \to 0`) is handed the
    weight of the others, as :func:`inverse_norm` does, only later; the floor is what stops it. With
    noise from batch to batch the contributions are equal on average, and not in every update as
    there.

    A task that is at the floor and still has nearly the whole share leaves small errors to the
    others, and they are evened out the more slowly.

    An absent task keeps its weight and its integral; the others share what they held together,
    and the set points are their parts of the ratios of those present. Where all norms are zero
    there is no error.

    Args:
      num_tasks: number of tasks K >= 2.
      ratios: [K] positive, of the contributions, default equal. May be traced.
      kp: proportional gain, >= 0, default 0.5: how much of an error is answered at once.
      ki: integral gain per measured update, >= 0, default 0.3. With 0 an error remains.
      min_weight: floor f in [0, 1/K], held exactly, default 1e-4. 0 stands for 1e-12: without any
        floor the weight of an idle task could not come back.
      debias: start balanced, default True; False starts from 1/K.

    Returns:
      A :class:`Weighting` with a :class:`ProportionalIntegralState`; its weights are at least
      ``min_weight`` and sum to 1.

    Raises:
      ValueError: ``num_tasks`` < 2; ``ratios`` no positive [K]; ``kp`` or ``ki`` negative or
        ``ki + 2 kp`` not below 4; ``min_weight`` negative or above 1/K.

    Example:
      >>> from gaba_jax import controller, weighting
      >>> norms = [1.0, 1.0, 0.001]  # one task that is far quieter than two others
      >>> for rule in (weighting.inverse_share(3), weighting.proportional_integral(3)):
      ...     loop = controller.simulate(norms, rule, steps=10)
      ...     print(loop.contributions[-1].round(4))
      [0.2501 0.2501 0.0005]
      [0.001 0.001 0.001]

    References:
      K. J. Åström, T. Hägglund, *Advanced PID Control*, 2006, chapter 3 (anti-windup).
    """
    check_num_tasks(num_tasks, least=2)
    proportional, integral = check_not_negative("kp", kp), check_not_negative("ki", ki)
    if proportional is not None and integral is not None and integral + 2 * proportional >= 4:
        raise ValueError(f"{kp=} and {ki=}: ki + 2 kp must be below 4, or the loop can oscillate.")
    floor = check_not_negative("min_weight", min_weight)
    if floor is not None and num_tasks * floor > 1 + 1e-6:
        raise ValueError(
            f"{min_weight=} must be in [0, 1/num_tasks]: {num_tasks} weights that sum to 1 cannot "
            f"all be at least {min_weight}; the most is {1 / num_tasks:.4g}."
        )

    given = task_vector("ratios", ratios, num_tasks)
    wanted = as_float32([1.0] * num_tasks) if given is None else given

    def init() -> ProportionalIntegralState:
        # Buffers of their own, so that the state can be donated.
        equal = jnp.asarray(equal_weights(num_tasks))
        return ProportionalIntegralState(jnp.array(equal), jnp.log(equal), jnp.array(not debias))

    def update(
        stats: TaskStats, state: ProportionalIntegralState
    ) -> tuple[Array, ProportionalIntegralState]:
        present = stats.present
        count = jnp.maximum(jnp.sum(present), 1).astype(jnp.float32)
        rule = inverse_norm(num_tasks, task_priorities=wanted)
        balanced, _ = rule.update(stats, optax.EmptyState())
        balanced = jnp.where(present, balanced * count, 1) / num_tasks
        # Of a task without a gradient nothing is known yet: inverse_norm would give it everything.
        starts = ~state.started & jnp.all((stats.norms > 0) | ~present)
        weights = jnp.where(starts, balanced, state.controlled_weights)
        before = jnp.where(starts, jnp.log(jnp.maximum(balanced, _LEAST)), state.integral)
        largest = jnp.max(stats.norms)
        contributions = weights * (stats.norms / jnp.where(largest > 0, largest, 1))
        shares = share_out(contributions, present, 1.0)
        error = jnp.where(present, share_out(jnp.asarray(wanted), present, 1.0) - shares, 0)
        gain_p, gain_i = jnp.asarray(kp, jnp.float32), jnp.asarray(ki, jnp.float32)
        logs = before + (gain_p + gain_i) * error
        raw = jnp.exp(logs - jnp.max(jnp.where(present, logs, -jnp.inf)))
        # 1 - absent, not the sum of the present: rounding does not add up.
        mass = 1 - jnp.sum(jnp.where(present, 0, weights))
        least = jnp.clip(jnp.asarray(min_weight, jnp.float32), _LEAST, 1 / num_tasks)
        new = jnp.where(present, _scale_above(raw, present, mass, least), weights)
        integral = jnp.where(present, jnp.log(new) - gain_p * error, before)
        return new, ProportionalIntegralState(new, integral, state.started | starts)

    return Weighting(num_tasks, frozenset({"norms"}), init, update, equal_weights(num_tasks))


def _scale_above(
    raw: Float[Array, " tasks"],
    present: Bool[Array, " tasks"],
    total: Float[Array, ""],
    least: Float[Array, ""],
) -> Float[Array, " tasks"]:
    """max(least, scale * raw) with the scale that makes the sum over the present tasks ``total``.

    Not the Euclidean projection: those above the floor keep their ratios, so that their
    contributions can be equal.
    """
    raw = jnp.where(present, raw, 0)
    counts = jnp.arange(1, raw.shape[0] + 1, dtype=jnp.float32)
    floored = jnp.sum(present).astype(jnp.float32) - counts
    # The sum is the largest, over all j, of what it is with the j largest scaled and the rest at
    # the floor; so the scale is the smallest of those that make each of these `total`.
    scales = (total - floored * least) / jnp.cumsum(jnp.sort(raw, descending=True))
    scale = jnp.min(jnp.where(floored >= 0, scales, jnp.inf))
    return jnp.maximum(scale * raw, least)
