"""From one measurement to the next state: what every driver of a Weighting shares."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from gaba_jax._checks import path_name
from gaba_jax._selection import Selection
from gaba_jax._statistics import (
    Measurement,
    Reads,
    TaskStats,
    combine_cosines,
    combine_extra,
    combine_norms,
)
from gaba_jax.weighting._base import (
    Weighting,
    name_of,
    names_of_needs,
    share_out,
    statistics_of,
)


class BalanceState(NamedTuple):
    """State of a balanced optimizer. Names and order are an on-disk promise.

    With groups of parameters (:func:`gaba_jax.by_group`) every field but ``seen_by_task`` has a
    leading axis of groups, in the order of :func:`gaba_jax.group_names`.

    Attributes:
      task_weights: [K] float32, the weights that this update applied.
      next_task_weights: [K] float32, what the weighting returned last, absent tasks included.
      task_norms: [K] float32, the last accepted gradient norms; an absent task keeps its last.
      task_cosines: [K, K] float32, likewise; None unless the weighting needs cosines.
      seen_by_task: [leaves, K] bool, the leaves on which a task has had a nonzero gradient;
        written only where sharing is found automatically.
      since_measured: [] int32, updates since the last accepted measurement, 0 before the first.
      nonfinite_count: [] int32, measurements rejected as not finite.
      weighting_state: the weighting's own state.
    """

    task_weights: Float[Array, "*groups tasks"]
    next_task_weights: Float[Array, "*groups tasks"]
    task_norms: Float[Array, "*groups tasks"]
    task_cosines: Float[Array, "*groups tasks tasks"] | None
    seen_by_task: Bool[Array, "leaves tasks"]
    since_measured: Int[Array, "*groups"]
    nonfinite_count: Int[Array, "*groups"]
    weighting_state: Any


def init_state(
    weighting: Weighting, num_leaves: int, num_groups: int | None = None
) -> BalanceState:
    """The state before any update; nothing is measured yet."""
    num_tasks = weighting.num_tasks
    # Buffers of their own, so that the state can be donated.
    task_weights, next_task_weights = (
        jnp.array(weighting.initial_weights, jnp.float32) for _ in range(2)
    )
    state = BalanceState(
        task_weights=task_weights,
        next_task_weights=next_task_weights,
        task_norms=jnp.zeros([num_tasks], jnp.float32),
        task_cosines=jnp.eye(num_tasks, dtype=jnp.float32)
        if "cosines" in weighting.needs
        else None,
        seen_by_task=jnp.zeros([num_leaves, num_tasks], bool),
        since_measured=jnp.zeros([], jnp.int32),
        nonfinite_count=jnp.zeros([], jnp.int32),
        weighting_state=weighting.init(),
    )
    if num_groups is None:
        return state
    of_groups = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], num_groups, axis=0), state)
    return of_groups._replace(seen_by_task=state.seen_by_task)


def leaves_of(state: Any) -> int:
    """The number of parameter leaves that a state is of; ValueError where it is no state."""
    if not isinstance(state, BalanceState):
        raise ValueError(
            f"the state must be a BalanceState, got a {type(state).__name__}. A checkpoint that is "
            "restored without a target comes back as plain dicts and lists: restore it into the "
            "structure that init(params) makes, or rebuild it with BalanceState(**restored) and "
            "its weighting_state likewise."
        )
    return jnp.shape(state.seen_by_task)[0]


def check_state(
    state: Any, num_leaves: int, weighting: Weighting, num_groups: int | None = None
) -> None:
    """Raises ValueError on a state of other parameters, tasks or groups, or of another rule."""
    leaves_of(state)
    shape, num_tasks = jnp.shape(state.seen_by_task), weighting.num_tasks
    if shape != (num_leaves, num_tasks):
        raise ValueError(
            f"the state is of {shape[0]} parameter leaves and {shape[1]} tasks, but there are "
            f"{num_leaves} leaves and num_tasks={num_tasks}. Pass the state that init(params) made "
            "for these parameters and this weighting."
        )
    groups = () if num_groups is None else (num_groups,)
    if jnp.shape(state.task_weights) != (*groups, num_tasks):
        raise ValueError(
            f"the state has weights of shape {jnp.shape(state.task_weights)}, but there are "
            f"{'no' if num_groups is None else num_groups} groups of parameters. Pass the state "
            "that init(params) made with the same groups."
        )
    if (state.task_cosines is not None) != ("cosines" in weighting.needs):
        kept = "no cosines" if state.task_cosines is None else "cosines"
        raise ValueError(
            f"the state is of another weighting: it keeps {kept}, and this one needs "
            f"{names_of_needs(weighting)}. Pass the state that init(params) made for it."
        )


def reads_of(weighting: Weighting) -> Reads | None:
    """What the weighting reads of the gradients; None where it reads nothing."""
    statistics, cosines = statistics_of(weighting), "cosines" in weighting.needs
    if not (statistics or cosines or "norms" in weighting.needs):
        return None
    return Reads(cosines, statistics)


def advance(
    weighting: Weighting,
    selection: Selection,
    state: BalanceState,
    measurement: Measurement | None,
    *,
    task_losses: Float[Array, " tasks"] | None,
    present: Bool[Array, " tasks"],
    usable: Bool[Array, " tasks"],
    lagged: bool = False,
) -> BalanceState:
    """One measuring update of the state, group by group where there are groups.

    A measurement is rejected, and weights, averages and counters are held, when anything measured
    or a needed loss of a present task is not finite, when the rule answers with a weight that is
    not, when no leaf is shared, or when fewer than ``weighting.least_present`` tasks are present.

    Args:
      weighting: the rule.
      selection: which leaves are shared (None: found from the gradients) and may be measured.
      state: the state before this update.
      measurement: what was measured; None where the weighting reads no gradients.
      task_losses: [K], where the weighting needs them.
      present: [K] the tasks of this update.
      usable: [K] the present tasks whose gradient enters the update.
      lagged: whether the update applies the weights from before this measurement.

    Returns:
      The state after it; ``task_weights`` are those to apply, 0 for tasks that are not usable.
    """

    def of_group(state: BalanceState, measure_on: Any) -> BalanceState:
        return _advance(
            weighting,
            selection._replace(measure_on=measure_on),
            state,
            measurement,
            task_losses=task_losses,
            present=present,
            usable=usable,
            lagged=lagged,
        )

    if selection.groups is None:
        return of_group(state, selection.measure_on)
    if not selection.groups:
        return state
    # A group is measured as the model would be with measure_on its leaves.
    group, allowed = np.array(selection.groups), np.array(selection.measure_on)
    measure_on = (group == np.arange(group.max() + 1)[:, None]) & allowed
    axes: Any = jax.tree.map(lambda _: 0, state)._replace(seen_by_task=None)
    after = jax.vmap(of_group, in_axes=(axes, 0))(state, jnp.asarray(measure_on))
    seen = after.seen_by_task[group, np.arange(len(group))]  # of a leaf its own group's
    return after._replace(seen_by_task=seen)


def _advance(
    weighting: Weighting,
    selection: Selection,
    state: BalanceState,
    measurement: Measurement | None,
    *,
    task_losses: Float[Array, " tasks"] | None,
    present: Bool[Array, " tasks"],
    usable: Bool[Array, " tasks"],
    lagged: bool = False,
) -> BalanceState:
    """The same of one set of weights."""
    measured, seen = _measured(selection, state, measurement, present)
    norms, measurable, extra = jnp.zeros_like(state.task_norms), jnp.array(True), {}
    if measurement is not None and measured is not None:
        norms = combine_norms(jnp.where(present, measurement.norms, 0), measured)
        measurable = jnp.any(measured)
        extra = combine_extra(statistics_of(weighting), measurement, measured)
        extra = jax.tree.map(lambda each: jnp.where(present, each, 0), extra)
    losses = None if task_losses is None else jnp.where(present, task_losses, 1)
    finite = jnp.array(True)
    for each in jax.tree.leaves((norms, losses, extra)):
        finite &= jnp.all(jnp.isfinite(each))
    accepted = finite & measurable & (jnp.sum(present) >= weighting.least_present)

    # Where the measurement is rejected the rule runs on harmless numbers and its answer is dropped.
    norms = jnp.where(accepted, norms, 0)
    cosines, pairs = None, present[:, None] & present[None, :]
    if measurement is not None and measured is not None and state.task_cosines is not None:
        identity = jnp.eye(weighting.num_tasks, dtype=jnp.float32)
        cosines = jnp.where(
            pairs & accepted, combine_cosines(measurement, measured, norms), identity
        )
    answer, weighting_state = _ask(
        weighting,
        TaskStats(
            norms=norms,
            cosines=cosines,
            losses=None if losses is None else jnp.where(accepted, losses, 1),
            present=present | ~accepted,
            elapsed=jnp.maximum(state.since_measured, 1),
            extra=jax.tree.map(lambda each: jnp.where(accepted, each, 0), extra),
        ),
        state.weighting_state,
    )
    sound = finite & (~accepted | jnp.all(jnp.isfinite(answer)))
    accepted &= sound
    new = BalanceState(
        task_weights=state.task_weights,
        next_task_weights=_keep_absent(weighting, answer, state.next_task_weights, present),
        task_norms=jnp.where(present, norms, state.task_norms),
        task_cosines=None
        if cosines is None or state.task_cosines is None
        else jnp.where(pairs, cosines, state.task_cosines),
        seen_by_task=seen,
        since_measured=jnp.ones([], jnp.int32),
        nonfinite_count=state.nonfinite_count,
        weighting_state=weighting_state,
    )
    held = state._replace(
        # For want of leaves or tasks, what was seen is kept; not after a non-finite gradient.
        seen_by_task=jnp.where(finite, seen, state.seen_by_task),
        nonfinite_count=jnp.where(
            sound, state.nonfinite_count, optax.safe_increment(state.nonfinite_count)
        ),
    )
    advanced = jax.tree.map(lambda yes, no: jnp.where(accepted, yes, no), new, held)
    # The rule's own answer for those present, whatever is kept for the others.
    applied = jnp.where(accepted & (not lagged), answer, state.next_task_weights)
    return advanced._replace(task_weights=restrict(weighting, applied, usable))


def _measured(
    selection: Selection,
    state: BalanceState,
    measurement: Measurement | None,
    present: Bool[Array, " tasks"],
) -> tuple[Bool[Array, " measured"] | None, Shaped[Array, "leaves tasks"]]:
    """Which leaves are measured (an encoder has its own), and on which a task has been seen.

    The latter is of integers after an optimizer that blends states with 0 and 1, such as SAM.
    """
    seen = state.seen_by_task
    if measurement is None:
        return None, seen
    allowed = jnp.asarray(selection.measure_on, bool)
    if selection.shared is not None:
        return allowed & jnp.asarray(selection.shared, bool), seen
    # A NaN counts as a gradient here: the leaf is measured, the measurement rejected. It is not
    # remembered as one, since it may have come from another task.
    norms = jnp.where(present, measurement.norms, 0)
    pulls = norms != 0
    return allowed & seen_by_two(seen | pulls), seen | (pulls & jnp.isfinite(norms))


def seen_by_two(seen: Any) -> Any:
    """[leaves] bool from [leaves, K] bool: on which two tasks or more have had a gradient."""
    return seen.sum(axis=1) >= 2


def is_due(state: BalanceState, every: int) -> Bool[Array, ""]:
    """Whether this update measures: the first, then every n-th since the last accepted one.

    Groups are measured together; one of which no measurement was accepted waits for the others.
    """
    return jnp.all(state.since_measured == 0) | jnp.any(state.since_measured >= every)


def hold(weighting: Weighting, state: BalanceState, usable: Bool[Array, " tasks"]) -> BalanceState:
    """An update that does not measure."""
    since = state.since_measured
    return state._replace(
        task_weights=restrict(weighting, state.next_task_weights, usable),
        since_measured=jnp.where(since > 0, optax.safe_increment(since), 0),
    )


def _ask(weighting: Weighting, stats: TaskStats, state: Any) -> tuple[Array, Any]:
    """The rule's weights and next state; ValueError where it breaks its contract."""
    rule = f"the weighting {name_of(weighting)}"
    fields = {"norms": "norms" in weighting.needs or "cosines" in weighting.needs}
    fields |= {name: name in weighting.needs for name in ("cosines", "losses")}
    missing = [name for name, declared in fields.items() if not declared]
    try:
        # Rules broadcast [K] over [K, K], whatever the user has JAX refuse elsewhere.
        with jax.numpy_rank_promotion("allow"):
            answer = weighting.update(stats._replace(**dict.fromkeys(missing)), state)
    except (AttributeError, KeyError, TypeError) as error:
        if not missing or isinstance(error, jax.errors.JAXTypeError):
            raise
        raise ValueError(
            f"{rule} raised {type(error).__name__}: {error}. {_undeclared(weighting, missing)}"
        ) from error
    if not (isinstance(answer, tuple) and len(answer) == 2):
        raise ValueError(
            f"{rule} must return a pair (task_weights, state) from its update; it returned a "
            f"{type(answer).__name__}."
        )
    returned: Any = answer[0]
    if returned is None:
        raise ValueError(f"{rule} returned None for its weights. {_undeclared(weighting, missing)}")
    weights, expected = jnp.asarray(returned, jnp.float32), jax.tree.structure(state)
    if weights.shape != (weighting.num_tasks,):
        raise ValueError(
            f"{rule} must return weights of shape ({weighting.num_tasks},), one per task, from its "
            f"update; it returned shape {weights.shape}."
        )
    if jax.tree.structure(answer[1]) != expected:
        raise ValueError(
            f"{rule} must return a state like that of its init, {expected}; its update returned "
            f"{jax.tree.structure(answer[1])}."
        )
    for (path, old), new in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(answer[1]), strict=True
    ):
        was, now = ((str(t.dtype), t.shape) for t in (jax.typeof(old), jax.typeof(new)))
        if was != now:
            raise ValueError(
                f"{rule} must return a state like that of its init; leaf {path_name(path)!r} is "
                f"{was[0]} of shape {was[1]} there, and its update returned {now[0]} of shape "
                f"{now[1]}. Give it its dtype in init, and keep it in update."
            )
    return weights, answer[1]


def _undeclared(weighting: Weighting, missing: list[str]) -> str:
    """What a rule gets that does not say what it needs, for a message."""
    return (
        f"It needs {names_of_needs(weighting)}; what a rule does not name in its needs is not "
        f"measured: {', '.join(missing)} are None, and only statistics that it names are in extra."
    )


def _keep_absent(
    weighting: Weighting,
    weights: Float[Array, " tasks"],
    last: Float[Array, " tasks"],
    present: Bool[Array, " tasks"],
) -> Float[Array, " tasks"]:
    """The last weights of absent tasks that a rule does not remember; the others share the rest.

    Where that would leave nothing, they have the part of the sum that they had of the last one.
    """
    forgotten = ~present & (weights == 0)
    alone = jnp.where(forgotten, last, weights)
    if weighting.absent == "each":
        return alone
    total, of_last = jnp.sum(weights), jnp.sum(last)
    held = jnp.sum(jnp.where(present, 0, alone))
    part = jnp.clip(1 - held / jnp.where(of_last > 0, of_last, 1), 0, 1)
    rest = jnp.where(total > held, total - held, total * part)
    kept = jnp.where(present, share_out(weights, present, rest), alone)
    return jnp.where(jnp.any(forgotten) & (total > 0), kept, alone)


def restrict(
    weighting: Weighting, weights: Float[Array, "*groups tasks"], usable: Bool[Array, " tasks"]
) -> Float[Array, "*groups tasks"]:
    """Weights of the usable tasks, rescaled to the sum of all; equal shares if they hold none.

    Left as they are: weights that hold for each task by itself while there are two, and those whose
    sum is not positive, from rules where they can be negative.
    """
    if weights.ndim > 1:
        return jax.vmap(lambda each: restrict(weighting, each, usable))(weights)
    total, kept = jnp.sum(weights), jnp.where(usable, weights, 0)
    rescaled = jnp.where(total > 0, share_out(weights, usable, total), kept)
    if weighting.absent == "each":
        few = jnp.sum(usable) < weighting.least_present
        return jnp.where(few, rescaled, kept)
    return jnp.where(jnp.all(usable), weights, rescaled)


def task_presence(task_mask: Any, num_tasks: int) -> Bool[Array, " tasks"]:
    """The mask as [K] bool; all True for None."""
    if task_mask is None:
        return jnp.ones([num_tasks], bool)
    if isinstance(task_mask, dict | str):
        got = f"a {type(task_mask).__name__}; list its values in the order of the losses"
    else:
        mask = jnp.asarray(task_mask)
        if mask.shape == (num_tasks,) and mask.dtype == jnp.bool_:
            return mask
        got = f"{mask.dtype} of shape {mask.shape}"
    raise ValueError(
        f"task_mask must be a bool array of shape ({num_tasks},), True for the tasks that take "
        f"part in this update; got {got}."
    )


def needed_losses(weighting: Weighting, task_losses: Any) -> Float[Array, " tasks"] | None:
    """The losses as [K] float32 where the weighting needs them, else None."""
    if "losses" not in weighting.needs:
        return None
    remedy = "tx.update(grads, opt_state, params, task_losses=losses)"
    if task_losses is None:
        raise ValueError(
            f"the weighting {name_of(weighting)} needs the task losses: call {remedy}. A train "
            "state whose apply_gradients takes no extra arguments does not pass them on; "
            "gaba_jax.linen.TrainState does."
        )
    if isinstance(task_losses, dict | list | tuple):
        raise ValueError(
            f"task_losses must be an array of shape ({weighting.num_tasks},), got a "
            f"{type(task_losses).__name__}: call {remedy} with what task_value_and_grad returned."
        )
    losses = jnp.asarray(task_losses)
    if losses.shape != (weighting.num_tasks,):
        raise ValueError(
            f"task_losses must have shape ({weighting.num_tasks},), one loss per task, got shape "
            f"{losses.shape}: call {remedy} with the losses that task_value_and_grad returned."
        )
    return losses.astype(jnp.float32)
