"""Analysis, which no training needs: GABA as a feedback controller, and its loop in motion.

The closed form of :func:`gaba_jax.weighting.inverse_share` is proportional control of the shares of
the gradient norms, for any K; the average is a first-order low-pass filter; the floor is a
saturation. Pure functions: NumPy arrays (and lists) give NumPy arrays, JAX arrays give JAX arrays
and may be traced, in the precision that came.

>>> import numpy as np
>>> from gaba_jax import controller
>>> norms = np.array([1.0, 2.0, 7.0])
>>> print(controller.gain(3), controller.error(norms).round(3), controller.control(norms).round(3))
0.5 [ 0.233  0.133 -0.367] [0.45 0.4  0.15]
>>> print(controller.time_constant(0.99).round(1), controller.settling_steps(0.99))
99.5 390
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from gaba_jax._selection import Selection
from gaba_jax._state import BalanceState, advance, init_state
from gaba_jax._statistics import Measurement, TaskStats
from gaba_jax.weighting._base import Number, Weighting, check_num_tasks, check_weighting
from gaba_jax.weighting._constant import constant
from gaba_jax.weighting._gaba import gaba
from gaba_jax.weighting._stabilize import Floor, stabilize

Array = np.ndarray | jax.Array


def share(norms: ArrayLike) -> Array:
    r"""The measured quantity: each task's part of the sum, :math:`s_i = g_i / \sum_j g_j`.

    Of norms, or of contributions :math:`\lambda_i g_i`: then all shares are 1/K at balance.

    Args:
      norms: [..., K] norms >= 0, K >= 2.

    Returns:
      [..., K] shares that sum to 1; 1/K each where all norms are zero, NaN where one is NaN.

    Raises:
      ValueError: the last axis holds fewer than two values, or one is negative.

    Example:
      >>> from gaba_jax import controller
      >>> print(controller.share([250.0, 0.5]).round(6))
      [0.998004 0.001996]
    """
    xp, values = _per_task("norms", norms)
    largest = xp.max(values, axis=-1, keepdims=True)
    # Relative to the largest norm nothing overflows.
    relative = xp.where(largest == 0, 1, values / xp.where(largest == 0, 1, largest))
    return relative / xp.sum(relative, axis=-1, keepdims=True)


def error(norms: ArrayLike) -> Array:
    r"""The control error, from the set point of equal shares: :math:`e_i = 1/K - s_i`.

    [..., K] like the ``norms``, with sum 0; positive for a task quieter than the mean. Otherwise as
    :func:`share`.
    """
    shares = share(norms)
    return 1 / shares.shape[-1] - shares


def gain(num_tasks: int) -> float:
    r"""The closed form's proportional gain, :math:`k_p = 1/(K - 1)`, for K = ``num_tasks`` >= 2.

    The largest with which no weight is ever negative: a task that has the whole share gets 0.

    Raises:
      ValueError: ``num_tasks`` < 2.
    """
    return 1 / (check_num_tasks(num_tasks, least=2) - 1)


def control(norms: ArrayLike) -> Array:
    r"""The weights of the proportional controller: :math:`\lambda_i = 1/K + k_p e_i`.

    For any K that is the closed form of :func:`gaba_jax.weighting.inverse_share`. The rule sums the
    norms of the others, so a weight far below 1/K keeps its digits there; here it is a difference,
    >= 0 to rounding. [..., K] like the ``norms``, with sum 1; otherwise as :func:`share`.

    Example:
      >>> from gaba_jax import controller
      >>> print(controller.control([250.0, 0.5]).round(6))
      [0.001996 0.998004]
    """
    errors = error(norms)
    num_tasks = errors.shape[-1]
    return 1 / num_tasks + gain(num_tasks) * errors


def step_response(
    steps: ArrayLike, *, start: ArrayLike, target: ArrayLike, beta: ArrayLike = 0.99
) -> Array:
    r"""The average t updates after its input jumped: :math:`c + (a - c)\, \beta^t`.

    As published; with ``debias=True`` so too once the average has settled on a.

    Args:
      steps: t >= 0, updates since the jump; of any shape.
      start: the average before it, a.
      target: the new input, c. For [K] weights over [T] steps pass ``steps[:, None]``.
      beta: decay of the average in [0, 1), default 0.99.

    Returns:
      The average, of the shape that the arguments broadcast to.

    Raises:
      ValueError: ``beta`` is outside [0, 1).

    Example:
      >>> import numpy as np
      >>> from gaba_jax import controller
      >>> print(controller.step_response(np.array([0, 100, 500]), start=0.5, target=0.0).round(3))
      [0.5   0.183 0.003]
    """
    xp = _namespace(steps, start, target, beta)
    t, a, c = (xp.asarray(value) for value in (steps, start, target))
    _, decay = _decay(beta)
    return c + (a - c) * decay**t


def time_constant(beta: ArrayLike = 0.99) -> Array:
    r"""Updates until the average has made :math:`1 - 1/e` (63 %) of a jump: :math:`-1/\ln \beta`.

    For ``beta`` = 0.99 that is 99.5 updates; 0 for beta = 0. Of the shape of ``beta``.

    Raises:
      ValueError: ``beta`` is outside [0, 1).
    """
    xp, decay = _decay(beta)
    smooths = decay > 0
    return xp.where(smooths, -1 / xp.log(xp.where(smooths, decay, 0.5)), 0)


def half_life(beta: ArrayLike = 0.99) -> Array:
    r"""Updates until half a jump is made: :math:`-\ln 2 / \ln \beta`; as :func:`time_constant`."""
    return float(np.log(2)) * time_constant(beta)


def settling_steps(beta: ArrayLike = 0.99, *, tolerance: float = 0.02) -> Array:
    r"""The first t with :math:`\beta^t \le` ``tolerance``: from then on the average is that near.

    Args:
      beta: decay of the average in [0, 1), default 0.99.
      tolerance: the part of the jump that may be left, in (0, 1), default 0.02.

    Returns:
      Whole updates, as integers of the shape of ``beta``: 390 for 0.99, 1 for 0.

    Raises:
      ValueError: ``beta`` is outside [0, 1), or ``tolerance`` outside (0, 1).
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"{tolerance=} must be between 0 and 1: the part of a jump that is left.")
    xp, decay = _decay(beta)
    steps = xp.maximum(xp.ceil(-float(np.log(tolerance)) * time_constant(decay)), 1)
    # Where rounding went past a whole number, the step before will do.
    early = (decay ** (steps - 1) <= tolerance) & (steps > 1)
    return xp.where(early, steps - 1, steps).astype(int)


def saturation(
    weights: ArrayLike, *, min_weight: Number = 0.05, floor: Floor = "renormalize"
) -> Array:
    r"""What the floor makes of weights: the actuator's limit.

    The floor of :func:`gaba_jax.weighting.stabilize` itself, in its float32.

    Args:
      weights: [..., K] weights >= 0; their sum is made 1 first.
      min_weight: floor f in [0, 1/K], default 0.05.
      floor: "renormalize" (published; the true bound is :math:`f / (1 + (K - 1) f)`) or "project".

    Returns:
      [..., K] weights that sum to 1.

    Raises:
      ValueError: as :func:`share` and :func:`gaba_jax.weighting.stabilize`.

    Example:
      >>> from gaba_jax import controller
      >>> print(controller.saturation([0.002, 0.998]).round(4))
      [0.0477 0.9523]
    """
    _, weights = _per_task("weights", weights)

    def answer(each: jax.Array) -> jax.Array:
        rule = constant(each.shape[0], each)
        limited = stabilize(rule, beta=0.0, warmup_steps=0, min_weight=min_weight, floor=floor)
        return _first_answer(limited, jnp.ones_like(each))

    return _each(answer, weights)


def steady_state(
    norms: ArrayLike, *, min_weight: Number = 0.05, floor: Floor = "renormalize"
) -> Array:
    """The weights that :func:`gaba_jax.gaba` tends to under constant norms.

    Warm-up, ``beta`` and ``debias`` say only how long that takes (:func:`settling_steps`). Computed
    by the rule itself, in its float32.

    Args:
      norms: [..., K] norms >= 0, K >= 2.
      min_weight: floor in [0, 1/K], default 0.05.
      floor: "renormalize" (published) or "project".

    Returns:
      [..., K] weights that sum to 1.

    Raises:
      ValueError: as :func:`share` and :func:`gaba_jax.weighting.stabilize`.

    Example:
      >>> from gaba_jax import controller
      >>> print(controller.steady_state([1.0, 1.0, 0.001], min_weight=0.0).round(3))
      [0.25 0.25 0.5 ]
    """
    _, norms = _per_task("norms", norms)

    def answer(each: jax.Array) -> jax.Array:
        rule = gaba(each.shape[0], beta=0.0, warmup_steps=0, min_weight=min_weight, floor=floor)
        return _first_answer(rule, each)

    return _each(answer, norms)


class Simulation(NamedTuple):
    """What a loop did, update by update.

    Attributes:
      weights: [T, K], as applied.
      norms: [T, K], the gradient norms that were measured.
      shares: [T, K], of the norms.
      contributions: [T, K], weights times norms.
    """

    weights: Array
    norms: Array
    shares: Array
    contributions: Array


def simulate(
    norms: ArrayLike | Callable[..., Any],
    weighting: Weighting | None = None,
    *,
    steps: int | None = None,
    plant_state: Any = None,
) -> Simulation:
    """Runs a weighting without a model: over given norms, or against a plant that answers.

    The rule is run by what runs it in training, so that skipped measurements (a NaN among the
    norms) are skipped here too. All updates are one ``lax.scan``, in float32.

    Args:
      norms: [T, K] norms over the updates; [K] constant ones, with ``steps``; or a plant, a
        function that JAX can trace, with ``steps``. The plant is given the [K] weights that the
        update before applied (at first the rule's initial ones) and returns [K] norms.
      weighting: any rule on norms, default :func:`gaba_jax.weighting.gaba` with its published
        constants, of two tasks for a plant.
      steps: number of updates, for constant norms or a plant.
      plant_state: where it is given, a pytree of arrays, the plant has a memory: it is called with
        ``(weights, plant_state)`` and returns ``(norms, plant_state)``.

    Returns:
      A :class:`Simulation`: NumPy for NumPy norms, else JAX.

    Raises:
      ValueError: the shape of the norms is none of these or not K wide, one is negative, ``steps``
        is missing, superfluous or not positive, or the rule needs losses or cosines.

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax import controller, weighting
      >>> def plant(weights):  # the more weight, the smaller the gradient
      ...     return jnp.array([500.0, 1.0]) / (1 + 9 * weights)
      >>> loop = controller.simulate(plant, weighting.inverse_share(2), steps=50)
      >>> print(loop.contributions[-1].round(3))
      [0.1 0.1]
    """
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"{steps=} must be a positive integer.")
    plant = norms if callable(norms) else None
    if callable(norms):
        rows, rule = None, gaba(2) if weighting is None else weighting
        if steps is None:
            raise ValueError("steps is missing: a plant says the norms, not for how many updates.")
    else:
        _, rows = _per_task("norms", norms)
        if rows.ndim > 2 or (rows.ndim == 1) != (steps is not None):
            wanted = "[T, K] without steps, or constant [K] with steps"
            raise ValueError(f"norms must be {wanted}; got shape {rows.shape} and {steps=}.")
        rule = gaba(rows.shape[-1]) if weighting is None else weighting
    check_weighting(rule)
    if rule.needs - {"norms"}:
        raise ValueError(
            f"the weighting needs {sorted(rule.needs - {'norms'})}, and a simulation has norms "
            "alone: take a rule whose needs are norms."
        )
    if rows is not None and rows.shape[-1] != rule.num_tasks:
        wanted = f"{rule.num_tasks} wide, one per task of the weighting"
        raise ValueError(f"norms must be {wanted}; got shape {rows.shape}.")
    everyone = jnp.ones([rule.num_tasks], bool)

    def update(carry: tuple[BalanceState, Any], given: Any) -> tuple[Any, Any]:
        state, memory = carry
        if plant is None:
            now = given
        elif plant_state is None:
            now = plant(state.task_weights)
        else:
            now, memory = plant(state.task_weights, memory)
        now = jnp.asarray(now, jnp.float32)
        if now.shape != (rule.num_tasks,):
            raise ValueError(
                f"the plant must return norms of shape ({rule.num_tasks},), one per task of the "
                f"weighting; it returned shape {now.shape}."
            )
        state = advance(
            rule,
            Selection(shared=(True,), measure_on=(True,)),
            state,
            Measurement(now[None], cosines=None),
            task_losses=None,
            present=everyone,
            usable=everyone,
        )
        return (state, memory), (state.task_weights, now)

    inputs = None if rows is None else jnp.asarray(rows, jnp.float32)
    if inputs is not None and steps is not None:
        inputs = jnp.tile(inputs, (steps, 1))
    start = init_state(rule, 1), jax.tree.map(jnp.asarray, plant_state)
    _, (weights, measured) = jax.lax.scan(update, start, inputs, length=steps)
    loop = Simulation(weights, measured, share(measured), weights * measured)
    return loop if rows is None else Simulation(*(_like(values, rows) for values in loop))


def _namespace(*values: Any) -> Any:
    """jax.numpy where any of them is a JAX array, else NumPy."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def _floats(value: Any) -> tuple[Any, Any]:
    """(the namespace, the value as an array of floats)."""
    xp = _namespace(value)
    array = xp.asarray(value)
    return xp, array if xp.issubdtype(array.dtype, xp.floating) else array.astype(float)


def _per_task(argument: str, value: Any) -> tuple[Any, Any]:
    """Likewise; ValueError unless the last axis holds two tasks or more, and none is negative."""
    xp, array = _floats(value)
    if array.ndim == 0 or array.shape[-1] < 2:
        raise ValueError(
            f"{argument} must have one value per task on its last axis, for at least two tasks; "
            f"got shape {array.shape}."
        )
    if not isinstance(array, Tracer) and bool(xp.any(array < 0)):
        raise ValueError(f"{argument} must be at least 0, got {array}.")
    return xp, array


def _decay(beta: Any) -> tuple[Any, Any]:
    """Likewise; ValueError unless a concrete beta is in [0, 1)."""
    xp, decay = _floats(beta)
    if not isinstance(decay, Tracer) and not bool(xp.all((decay >= 0) & (decay < 1))):
        raise ValueError(f"{beta=} must be in [0, 1): 0 is no smoothing, 1 would never move.")
    return xp, decay


def _first_answer(rule: Weighting, norms: jax.Array) -> jax.Array:
    """The rule's weights after one measurement of all tasks."""
    stats = TaskStats(norms, None, None, jnp.ones(norms.shape, bool), jnp.int32(1))
    return rule.update(stats, rule.init())[0]


def _each(answer: Callable[[jax.Array], jax.Array], values: Any) -> Array:
    """``answer`` on each [K] of [..., K] in float32, as the kind of array that came."""
    narrow = jnp.asarray(values, jnp.float32)
    return _like(jnp.vectorize(answer, signature="(k)->(k)")(narrow), values)


def _like(result: Array, given: Any) -> Array:
    """The result as NumPy or JAX, and in the precision, of what was given."""
    return _namespace(given).asarray(result, given.dtype)
