"""The Weighting interface, and what several rules need."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from gaba_jax._statistics import Statistic, TaskStats

Number = float | Array  # a Python number, or a scalar array that may be traced
Vector = Array | np.ndarray
LARGEST = 1e18  # what an optimizer is given is cut here: its square is finite, in Adam too


class Weighting(NamedTuple):
    """A pure rule from what was measured on K task gradients to K task weights.

    Any Weighting runs in :func:`gaba_jax.balance`. It never sees a parameter or a gradient.

    Attributes:
      num_tasks: K.
      needs: which of "norms", "cosines" and "losses" the rule reads, and any
        :class:`Statistic`. What a rule does not need is not measured, and reading it is an error.
      init: ``() -> state``, a pytree of arrays with explicit dtypes.
      update: ``(stats, state) -> (task_weights [K], state)``, with ``stats`` a
        :class:`TaskStats`. It is called for accepted measurements only, so the norms are finite.
        A rule without memory returns 0 for absent tasks, and for the present ones what the same
        rule of that many tasks returns. A weight that is no number rejects the measurement.
      initial_weights: [K], the weights before any measurement.
      least_present: the fewest present tasks that a measurement is accepted of, default 2.
      absent: what the present tasks get where some are absent. "rescale" (default): their weights,
        scaled to the sum of all K where that is positive. "each": their weights as they are, since
        each weight holds by itself. Fewer tasks than ``least_present`` get the whole sum either
        way.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from gaba_jax.weighting import Weighting
      >>> def quietest_takes_all(num_tasks):
      ...     def update(stats, state):
      ...         norms = jnp.where(stats.present, stats.norms, jnp.inf)
      ...         return jnp.float32(norms == norms.min()), state
      ...     equal = np.full(num_tasks, 1 / num_tasks, np.float32)
      ...     return Weighting(num_tasks, frozenset({"norms"}), optax.EmptyState, update, equal)
    """

    num_tasks: int
    needs: frozenset[str | Statistic]
    init: Callable[[], Any]
    update: Callable[[TaskStats, Any], tuple[Array, Any]]
    initial_weights: ArrayLike
    least_present: int = 2
    absent: Literal["rescale", "each"] = "rescale"


def check_num_tasks(num_tasks: Any, least: int = 1) -> int:
    """Raises ValueError unless ``num_tasks`` is a Python integer >= least."""
    if isinstance(num_tasks, Tracer | jax.Array):
        raise ValueError(
            f"num_tasks must be a Python int, got {num_tasks!r}. Under optax.inject_hyperparams "
            'name it in static_args=("num_tasks",).'
        )
    if not isinstance(num_tasks, int | np.integer) or isinstance(num_tasks, bool):
        raise ValueError(f"num_tasks must be an integer, got {num_tasks!r}.")
    if num_tasks < least:
        raise ValueError(f"{num_tasks=} must be at least {least}.")
    return int(num_tasks)


def number(argument: str, value: Any) -> float | None:
    """The checked scalar where it is concrete, None where it is traced.

    Raises:
      ValueError: ``value`` is no scalar number, or of fewer than 32 bits.
    """
    if np.shape(value) != ():
        raise ValueError(f"{argument} must be a scalar, got shape {np.shape(value)}.")
    if not isinstance(value, float | int | np.number | np.ndarray | jax.Array):
        raise ValueError(f"{argument} must be a number, got {value!r}.")
    dtype = np.result_type(value) if isinstance(value, float | int) else value.dtype
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{argument} came as {dtype}, which rounds values near 1 to 1. Under "
            "optax.inject_hyperparams pass hyperparam_dtype=jnp.float32."
        )
    return None if isinstance(value, Tracer) else float(value)


def check_positive(argument: str, value: Any) -> float | None:
    """The concrete number, None where traced; ValueError unless it is finite and > 0."""
    concrete = number(argument, value)
    if concrete is not None and not 0 < concrete < float("inf"):
        raise ValueError(f"{argument}={value} must be positive and finite.")
    return concrete


def check_not_negative(argument: str, value: Any) -> float | None:
    """Likewise, for numbers >= 0."""
    concrete = number(argument, value)
    if concrete is not None and not 0 <= concrete < float("inf"):
        raise ValueError(f"{argument}={value} must be finite and at least 0.")
    return concrete


def check_weighting(weighting: Any) -> None:
    """Raises ValueError unless ``weighting`` is a Weighting with known needs."""
    if not isinstance(weighting, Weighting):
        got, remedy = repr(weighting), "Make one with a rule, such as weighting.inverse_norm(3)."
        if isinstance(weighting, optax.GradientTransformation):
            got = "an optax transform"
            remedy = "Pass the rule itself, such as weighting.equalize(3) for gaba_jax.equalize(3)."
        elif callable(weighting):
            remedy = "Call the rule first: balance(weighting.inverse_norm(3))."
        raise ValueError(f"weighting must be a gaba_jax.weighting.Weighting, got {got}. {remedy}")
    if not isinstance(weighting.needs, frozenset | set):
        raise ValueError(f'{weighting.needs=} must be a frozenset, such as frozenset({{"norms"}}).')
    statistics = statistics_of(weighting)
    unknown = weighting.needs - {"norms", "cosines", "losses", *statistics}
    if unknown:
        raise ValueError(
            f'{weighting.needs=} names {sorted(map(str, unknown))}; a rule can need "norms", '
            '"cosines", "losses" and any gaba_jax.weighting.Statistic.'
        )
    names = [statistic.name for statistic in statistics]
    if len(set(names)) < len(names):
        raise ValueError(f"two statistics of a weighting have one name: {names}.")
    if weighting.absent not in ("rescale", "each"):
        raise ValueError(f'{weighting.absent=} must be "rescale" or "each".')
    if np.shape(weighting.initial_weights) != (weighting.num_tasks,):
        raise ValueError(
            f"initial_weights must have shape ({weighting.num_tasks},), one per task, got shape "
            f"{np.shape(weighting.initial_weights)}."
        )


def statistics_of(weighting: Weighting) -> tuple[Statistic, ...]:
    """The statistics that a rule needs, by name."""
    found = (need for need in weighting.needs if isinstance(need, Statistic))
    return tuple(sorted(found, key=lambda statistic: statistic.name))


def names_of_needs(weighting: Weighting) -> str:
    """What a rule needs, for a message."""
    names = (need.name if isinstance(need, Statistic) else need for need in weighting.needs)
    return ", ".join(sorted(names)) or "nothing"


def name_of(weighting: Weighting) -> str:
    """What the function is called that made the rule."""
    function = getattr(weighting.update, "func", weighting.update)
    names = getattr(function, "__qualname__", repr(function)).split(".<locals>.")
    return names[-2] if len(names) > 1 else names[0]


def equal_weights(num_tasks: int) -> np.ndarray:
    """[K] weights 1/K."""
    return np.full(num_tasks, 1 / num_tasks, np.float32)


def as_float32(value: Any) -> Vector:
    """A float32 array, of numpy unless JAX arrays are in it.

    Making a rule then starts no backend, after which ``jax.distributed.initialize`` would refuse.
    """
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
        return jnp.asarray(value, jnp.float32)
    with np.errstate(over="ignore"):
        return np.asarray(value, np.float32)


def task_vector(
    argument: str, value: ArrayLike | None, num_tasks: int, *, positive: bool = True
) -> Vector | None:
    """A [K] vector as float32, finite and positive where it is concrete; None stays None."""
    if value is None:
        return None
    if isinstance(value, dict | str | set):
        raise ValueError(
            f"{argument} must be {num_tasks} numbers, one per task in the order of the losses; got "
            f"{value!r}. Of losses in a dict that is the order of its sorted keys "
            "(gaba_jax.task_names)."
        )
    vector = as_float32(value)
    if vector.shape != (num_tasks,):
        raise ValueError(
            f"{argument} must have shape ({num_tasks},), one value per task; "
            f"got shape {vector.shape}."
        )
    if not isinstance(vector, Tracer) and not np.all(
        np.isfinite(vector) & ((np.asarray(vector) > 0) | (not positive))
    ):
        wanted = "positive and finite" if positive else "finite"
        raise ValueError(f"{argument} must be {wanted}, got {vector}.")
    return vector


def share_out(
    raw: Float[Array, " tasks"], among: Bool[Array, " tasks"], total: ArrayLike
) -> Float[Array, " tasks"]:
    """Scales raw weights to the sum ``total`` over some tasks; 0 for the others.

    Equal shares where those tasks hold no weight.
    """
    raw = jnp.where(among, raw, 0)
    raw = jnp.where(jnp.sum(raw) > 0, raw, among.astype(jnp.float32))
    held = jnp.sum(raw)
    return raw / jnp.where(held > 0, held, 1) * total


def over_present(
    raw: Float[Array, " tasks"],
    present: Bool[Array, " tasks"],
    priorities: Vector | None = None,
) -> Float[Array, " tasks"]:
    """Raw weights >= 0, times the priorities, with sum 1 over the present tasks; 0 for others."""
    return share_out(raw if priorities is None else raw * priorities, present, 1.0)


def equal_shares(present: Bool[Array, " tasks"]) -> Float[Array, " tasks"]:
    """1/n for the n present tasks, 0 for others."""
    return over_present(present.astype(jnp.float32), present)


def task_losses(stats: TaskStats) -> Float[Array, " tasks"]:
    """The losses as float32; ValueError where there are none."""
    if stats.losses is None:
        raise ValueError("this weighting needs stats.losses, got None.")
    return stats.losses.astype(jnp.float32)


def check_optimizer(weight_optimizer: Any) -> optax.GradientTransformation:
    """Raises ValueError unless it is an optax optimizer."""
    if not isinstance(weight_optimizer, optax.GradientTransformation):
        raise ValueError(
            f"weight_optimizer must be an optax optimizer, such as optax.adam(0.025); got "
            f"{weight_optimizer!r}."
        )
    return weight_optimizer


def descend(
    optimizer: optax.GradientTransformation,
    gradient: Float[Array, " tasks"],
    optimizer_state: Any,
    learned: Float[Array, " tasks"],
    present: Bool[Array, " tasks"],
) -> tuple[Float[Array, " tasks"], Any]:
    """One step of the optimizer on what is learned per task; an absent task has gradient 0."""
    gradient = jnp.where(present, jnp.clip(gradient, -LARGEST, LARGEST), 0)
    with jax.numpy_dtype_promotion("standard"):  # optimizers count on it
        step, optimizer_state = optimizer.update(gradient, optimizer_state, learned)
        return jnp.asarray(optax.apply_updates(learned, step)), optimizer_state
