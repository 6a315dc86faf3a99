"""The gradients of K tasks after a forward pass, in the cheapest form that serves: where to cut."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from gaba_jax._passes import Pass
from gaba_jax._selection import Selection
from gaba_jax._statistics import (
    Leaf,
    Measurement,
    Reads,
    measure,
    measure_one,
    measure_stacked,
    weighted,
    whole_leaves,
)


class TaskGradients(NamedTuple):
    """What a driver needs of K gradients, and nothing of how they are kept.

    Attributes:
      measure: ``(wanted leaves, what is read of them) -> Measurement``.
      combine: ``(per leaf the [K] factors or None where it is overwritten, [K] the tasks that may
        be read or None for all) ->`` the leaves of the update.
      selection: of the leaves that are measured.
    """

    measure: Callable[[tuple[bool, ...], Reads], Measurement]
    combine: Callable[[Sequence[Array | None], Array | None], list[Array]]
    selection: Selection


def task_gradients(
    run: Pass, selection: Selection, apart: bool, reads: Reads | None
) -> TaskGradients:
    """The gradients of one pass.

    Args:
      run: the pass.
      selection: which leaves are shared, and measured.
      apart: whether a task must not reach the gradients of another, be it with a NaN.
      reads: what will be read of them; None where nothing will.
    """
    num_tasks = run.losses.shape[0]
    if run.feature_gradients is not None:
        return _on_features(run, selection)
    if run.pull_back_apart is None:
        if apart or (reads is not None and reads.cosines):
            return kept(whole_leaves(run.each_gradient()), num_tasks, selection)
        return pulled(run, functools.partial(_one_by_one, run), selection)
    # What is overwritten does not follow from the cotangents, which a cut goes by.
    program = None if any(selection.overwritten) else understood(run)
    if program is None and reads is None and not apart:
        return pulled(run, nothing, selection)
    if program is None or not program.separates() or (apart and run.apart and program.mixes()):
        return kept(whole_leaves(run.each_gradient()), num_tasks, selection)
    # One backward pass has one set of weights.
    once = not apart and selection.groups is None and program.is_linear()
    if once and reads is None:
        return pulled(run, nothing, selection)
    from gaba_jax import _cut

    every = (True,) * len(selection.measure_on)
    plan = _cut.Plan(program, every)
    if once and selection.weight_task_specific:
        measured = _cut.Plan(program, selection.wanted())
        if measured.operations() + program.operations(program.leaves, False) < plan.operations():
            leaves = measured.run()
            return pulled(
                run, lambda wanted, reads: measure(leaves, wanted, num_tasks, reads), selection
            )
    return kept(plan.run(), num_tasks, selection)


def kept(leaves: Sequence[Leaf], num_tasks: int, selection: Selection) -> TaskGradients:
    """Gradients that are there, leaf by leaf."""

    def combine(factors: Sequence[Array | None], usable: Array | None) -> list[Array]:
        return [
            weighted(leaf, *_of(leaf.tasks, each, usable))
            for leaf, each in zip(leaves, factors, strict=True)
        ]

    return TaskGradients(
        lambda wanted, reads: measure(leaves, wanted, num_tasks, reads),
        combine,
        selection,
    )


def _of(tasks: tuple[int, ...], *values: Array | None) -> list[Array | None]:
    at = np.array(tasks, int)
    return [None if each is None else each[at] for each in values]


def pulled(run: Pass, measured: Callable[..., Measurement], selection: Selection) -> TaskGradients:
    """Gradients that are not there: their sum is one backward pass with the weights."""

    def combine(factors: Sequence[Array | None], usable: Array | None) -> list[Array]:
        del usable
        # What is overwritten has its value from the very pass that the others are from.
        given = next(each for each in factors if each is not None)
        factors = [given if each is None else each for each in factors]
        different = {id(each): each for each in factors}
        of_each = {key: jax.tree.leaves(run.pull_back(each)) for key, each in different.items()}
        return [of_each[id(each)][i] for i, each in enumerate(factors)]

    return TaskGradients(measured, combine, selection)


def _on_features(run: Pass, selection: Selection) -> TaskGradients:
    assert run.feature_gradients is not None
    features, num_tasks = run.feature_gradients, run.losses.shape[0]

    def measured(wanted: Any, reads: Reads) -> Measurement:
        del wanted
        leaves = features()
        return measure_stacked(leaves, (True,) * len(leaves), num_tasks, reads)

    number = len(jax.eval_shape(features))
    return pulled(run, measured, selection)._replace(
        selection=Selection((True,) * number, (True,) * number)
    )


def nothing(wanted: Any, reads: Reads) -> Measurement:
    """For a rule that reads no gradients."""
    raise AssertionError("the weighting reads no gradients")


def _one_by_one(run: Pass, wanted: tuple[bool, ...], reads: Reads) -> Measurement:
    """That of one task's gradient after the other, of which none is kept."""
    one_hot = jnp.eye(run.losses.shape[0], dtype=run.losses.dtype)

    def of_task(cotangent: Array) -> Measurement:
        return measure_one(jax.tree.leaves(run.pull_back(cotangent)), wanted, reads)

    return of_tasks(lax.map(of_task, one_hot))


def of_tasks(each: Measurement) -> Measurement:
    """[leaves, K] of what was measured task by task, [K, leaves]."""
    return jax.tree.map(jnp.transpose, each)


def understood(run: Pass) -> Any:
    """The backward pass as a program; None where this JAX's is not understood."""
    try:
        from gaba_jax._program import Program
    except ImportError:  # jax.extend may change
        return None
    num_tasks, one = run.losses.shape[0], jnp.ones_like(run.losses[0])
    cotangents = [one] * num_tasks if run.apart else [jnp.ones_like(run.losses)]
    assert run.pull_back_apart is not None
    return Program(run.pull_back_apart, cotangents, num_tasks)


def separates(run: Pass, selection: Selection) -> bool:
    """Whether a cotangent of 0 leaves a task out of the backward pass, as far as is known."""
    unknown = run.pull_back_apart is None or any(selection.overwritten)
    program = None if unknown else understood(run)
    return program is None or program.separates()
