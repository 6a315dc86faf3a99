"""Losses and one balanced gradient, at the least cost known."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from gaba_jax import _passes
from gaba_jax._checks import check_driver_arguments, check_params
from gaba_jax._gradients import TaskGradients, of_tasks, separates, task_gradients
from gaba_jax._passes import Pass
from gaba_jax._selection import OVERWRITTEN, Groups, Selection, Selector, check_groups, select
from gaba_jax._slices import Sliced, slices_of
from gaba_jax._state import (
    BalanceState,
    advance,
    check_state,
    hold,
    init_state,
    is_due,
    needed_losses,
    reads_of,
    restrict,
    task_presence,
)
from gaba_jax._statistics import Measurement, Reads, measure_one
from gaba_jax.weighting._base import Weighting, check_weighting, name_of

Measure = Literal["exact", "lagged"]
Nonfinite = Literal["propagate", "drop"]


class BalancedGradient(NamedTuple):
    """What :func:`balanced_value_and_grad` returns.

    Attributes:
      init: ``params -> BalanceState``.
      value_and_grad: ``(params, state, *args, task_mask=None, task_ids=None, **kwargs) -> ((losses,
        grads), state)``; with ``has_aux``, ``(((losses, aux), grads), state)``.
    """

    init: Callable[[Any], BalanceState]
    value_and_grad: Callable[..., tuple[tuple[Any, Any], BalanceState]]


def balanced_value_and_grad(
    losses_fn: Callable[..., Any],
    weighting: Weighting,
    *,
    in_axes: Any = None,
    measure: Measure = "exact",
    encoder: Callable[..., Any] | None = None,
    every: int = 1,
    microbatch_size: int | None = None,
    has_aux: bool = False,
    shared: Selector | None = None,
    measure_on: Selector | None = None,
    weight_task_specific: bool = True,
    nonfinite: Nonfinite = "propagate",
    groups: Groups | None = None,
    per_device: bool = False,
) -> BalancedGradient:
    r"""Evaluates K losses and their one balanced gradient, from one forward pass.

    .. math:: u = \sum_i \lambda_i \nabla L_i

    The weights, the state and the gradient are those of :func:`gaba_jax.balance` on stacked
    gradients. The backward pass is cut just before its parameter-sized products. Its first part
    runs once per task, to the cotangents :math:`\delta_i` of each layer's outputs. Its last
    products :math:`a^T \sum_i \lambda_i \delta_i` run once. Norms and cosines follow from what
    lies at the cut:

    .. math:: \langle g_i, g_j \rangle = \langle (a a^T) \delta_j, \delta_i \rangle

    A leaf is kept whole, one gradient per task, where its gradient is the smaller of the two, or
    does not end in such a product (a convolution, a leaf of a scan). Up to four tasks are passed
    backward at a time; past that, a loop over such groups bounds what the first part holds.

    Args:
      losses_fn: as for :func:`gaba_jax.task_value_and_grad`, returning K losses; with ``encoder``,
        ``losses_fn(params, features, *args)``. With ``in_axes``, the ONE loss of one slice.
      weighting: a rule from :mod:`gaba_jax.weighting`.
      in_axes: for tasks that have examples of their own: the axes of the arguments after ``params``
        that hold the slices, as in :func:`jax.vmap`. It is an integer for all arguments, or one
        entry for each, None for an argument that every slice gets whole. ``losses_fn(params,
        *slice)`` then returns the scalar loss of one slice: a task's own batch, or one example.
        Slice i is task i, or ``task_ids`` gives each slice its task. One backward pass holds the
        gradients of all slices: a step costs little more than an ordinary one, for any K. ``aux``
        has the slices as its leading axis. Keyword arguments are not mapped. A random key is
        split, one a slice: ``jax.random.split(key, N)``, mapped. Batch statistics are those of a
        slice. With "lagged", one slice is run after the other. With ``encoder``, which gets one
        slice too, norms are those on the slice's own features. Default None: all K losses are of
        one batch.
      measure: "exact" (default): measured and applied in the same update. "lagged": K backward
        passes one after the other, summed with the weights of the update before (the rule's initial
        weights at first) while they are measured for the next: the memory of one gradient. A rule
        that needs cosines is measured as by "exact" either way. A rule that reads no gradients
        takes one backward pass.
      encoder: ``encoder(params, *args) -> features``, a pytree. Norms are then those of the
        gradients with respect to the features, and the encoder is passed backward once: the cost
        of a plain step. A proxy: it sees how hard each task pulls on the features, not what the
        encoder's Jacobian makes of it. On the turbofan model the contributions that its weights
        leave are within 2x of each other in the median (``benchmarks.encoder``). ``shared`` and
        ``measure_on`` do not matter to it.
      every: measure at the first and then every n-th update, default 1. In between the weights
        are held, at the cost of a plain step. Averages keep their time constant in updates: the
        ``beta`` of a rule is a decay per update, and a measurement n updates after the last one
        keeps ``beta**n`` of the average. With ``every=1000`` a ``beta`` of 0.9 keeps nothing. A
        code that keeps 0.9 at every measurement has ``beta=0.9 ** (1 / 1000)`` here. Where tasks
        are kept apart (a ``task_mask``, ``nonfinite="drop"``), or the backward pass is not
        linear (a gradient clipped or rounded inside the model, or one that is added there, such as
        that of an auxiliary loss of experts), a held update passes backward per task too.
      microbatch_size: run the batch in parts of this size, with the activations of one part in
        memory; the losses must be means over the batch. Norms are those of the mean gradient. All
        arrays in the arguments, keyword arguments too, have the batch as leading axis. (It is split
        with a stride, which leaves a batch that is sharded over devices where it is.) Scalars and
        what is no array go to every part, typed random keys folded with its number. ``aux`` has the
        parts as its leading axis. No cut is made across parts: each runs forward again for every
        task and for the weighted sum, and is reduced by itself across devices. For cosines, with
        a ``task_mask`` and with "drop" the K gradients are stacked. Otherwise the update is one
        backward pass with the weights: what the model clips of a gradient is clipped of the sum.
        Default None, the batch as a whole.
      has_aux: whether ``losses_fn`` returns ``(losses, aux)``.
      shared: the shared parameters, default found from the gradients; see :func:`balance`.
      measure_on: where norms are taken, default all shared parameters; see :func:`balance`.
      weight_task_specific: see :func:`balance`.
      nonfinite: "propagate" (default), or "drop"; see :func:`balance`. "drop" needs losses that are
        returned apart (tuple, list, dict) and no ``encoder``.
      groups: None (default), one set of weights. "top", "leaf" or a function: one for each group of
        parameters, see :func:`by_group`. All groups are measured at once. A held update, and one of
        a rule that reads no gradients, passes backward per task too; with ``microbatch_size`` the
        sum takes a backward pass per group. It excludes ``encoder``, whose norms belong to none.
      per_device: True says that every device has a model of its own, inside ``jax.pmap`` or
        ``jax.shard_map(check_vma=False)``. By default both raise, since each device would measure
        its own part of the batch and JAX does not tell.

    Returns:
      A :class:`BalancedGradient`. ``value_and_grad(params, state, *args, task_mask=None,
      task_ids=None, **kwargs)`` gives losses [K], the gradient with the shapes and dtypes of
      ``params``, for any optax optimizer, and the next :class:`BalanceState`. ``args`` and
      ``kwargs`` are those of ``losses_fn``. ``task_mask`` [K] bool marks the tasks in this batch.
      The gradient of an absent task is never read where losses are returned apart (tuple, list,
      dict) or are those of slices. Losses that come as one [K] array, and those behind an
      ``encoder``, meet in one backward pass: there an absent task must be finite, since zero times
      NaN is NaN.

      ``task_ids`` [N] integers, for ``in_axes``: the task of each slice. A task's loss is the mean
      over its slices. A task without one is absent, and its loss is 0. A slice whose id is not in
      [0, K) is left out: pad a short batch with -1. With ``task_mask`` both count.

      The weights are constants: ``jax.grad`` through a step differentiates the gradients alone.

    Raises:
      ValueError: a wrong argument, or two that exclude each other, at construction; on a selection
        that holds no parameter, at ``init``; on a wrong number of losses, losses that "drop" cannot
        tell apart, or a batch that does not split, when traced.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gaba_jax import balanced_value_and_grad, weighting
      >>> def losses_fn(params, x):
      ...     h = jnp.tanh(x @ params["backbone"])
      ...     return 500.0 * jnp.mean(h @ params["a"]), jnp.mean((h @ params["b"]) ** 2)
      >>> params = {"backbone": jnp.ones((3, 2)), "a": jnp.ones(2), "b": jnp.ones(2)}
      >>> balanced = balanced_value_and_grad(losses_fn, weighting.inverse_norm(2))
      >>> tx = optax.adamw(1e-3)
      >>> state, opt_state = balanced.init(params), tx.init(params)
      >>> @jax.jit
      ... def train_step(params, state, opt_state, x):
      ...     (losses, grads), state = balanced.value_and_grad(params, state, x)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     return optax.apply_updates(params, updates), state, opt_state, losses
      >>> params, state, opt_state, losses = train_step(params, state, opt_state, jnp.ones((4, 3)))
      >>> contributions = state.task_weights * state.task_norms  # equal, 500x apart before
      >>> bool(jnp.allclose(contributions[0], contributions[1]))
      True
    """
    if isinstance(losses_fn, Weighting):
        raise ValueError(
            "losses_fn came as a Weighting. The function comes first, and the rule after it: "
            "balanced_value_and_grad(losses_fn, weighting)."
        )
    check_weighting(weighting)
    check_driver_arguments(shared, weight_task_specific, nonfinite)
    _check_arguments(measure, encoder, every, microbatch_size, nonfinite)
    _check_slices(weighting, in_axes, encoder, microbatch_size)
    if groups is not None:
        check_groups(groups)
        if encoder is not None:
            raise ValueError(
                "groups=... needs the gradients of each group of parameters, and with encoder=... "
                "norms are those on the features, which belong to no group. Leave one of them out."
            )
    driver = _Driver(
        losses_fn,
        weighting,
        in_axes,
        measure,
        encoder,
        every,
        microbatch_size,
        has_aux,
        shared,
        measure_on,
        weight_task_specific,
        nonfinite,
        groups,
        per_device,
    )
    return BalancedGradient(driver.init, driver.value_and_grad)


class _Driver(NamedTuple):
    """The arguments of :func:`balanced_value_and_grad`, and the steps of an update."""

    losses_fn: Callable[..., Any]
    weighting: Weighting
    in_axes: Any
    measure: Measure
    encoder: Callable[..., Any] | None
    every: int
    microbatch_size: int | None
    has_aux: bool
    shared: Selector | None
    measure_on: Selector | None
    weight_task_specific: bool
    nonfinite: Nonfinite
    groups: Groups | None
    per_device: bool

    def init(self, params: Any) -> BalanceState:
        num_groups = self.selection(params).num_groups()
        return init_state(self.weighting, len(jax.tree.leaves(params)), num_groups)

    def selection(self, params: Any) -> Selection:
        """Which leaves are shared and measured, and their groups."""
        return select(self.shared, self.measure_on, params, self.weight_task_specific, self.groups)

    def value_and_grad(
        self,
        params: Any,
        state: BalanceState,
        *args: Any,
        task_mask: ArrayLike | None = None,
        task_ids: ArrayLike | None = None,
        **kwargs: Any,
    ) -> tuple[tuple[Any, Any], BalanceState]:
        if isinstance(params, BalanceState):
            raise ValueError(
                "params came as a BalanceState. The parameters come first, and the state after "
                "them: value_and_grad(params, state, *args)."
            )
        check_params(params)
        selection, num_leaves = self.selection(params), len(jax.tree.leaves(params))
        check_state(state, num_leaves, self.weighting, selection.num_groups())
        present, sliced = task_presence(task_mask, self.weighting.num_tasks), None
        if self.in_axes is not None:
            slices = slices_of(self.in_axes, args, task_ids, self.weighting.num_tasks)
            present &= slices.counts() > 0
            sliced = Sliced(self.losses_fn, self.encoder, self.has_aux, slices, args, kwargs)
        elif task_ids is not None:
            raise ValueError(
                "task_ids are the tasks of slices, and nothing is sliced: give "
                "balanced_value_and_grad in_axes, such as in_axes=0."
            )
        update = _Update(
            self,
            selection,
            params,
            state,
            present,
            task_mask is not None or self.nonfinite == "drop",
            sliced,
        )
        if self.every == 1:
            losses, aux, grads, state = update.measuring(*args, **kwargs)
        else:
            traced: list[Any] = []  # aux of a branch, which can return no more than its arrays

            def arrays(step: Callable[..., Any]) -> Any:
                losses, aux, grads, state = step(*args, **kwargs)
                traced[:] = jax.tree.flatten(aux)
                return losses, [x if _is_array(x) else None for x in traced[0]], grads, state

            # Each branch has a forward pass of its own, so that a held update is an ordinary step.
            losses, kept, grads, state = lax.cond(
                is_due(state, self.every),
                lambda: arrays(update.measuring),
                lambda: arrays(update.holding),
            )
            leaves, structure = traced
            pairs = zip(leaves, kept, strict=True)
            aux = structure.unflatten([old if new is None else new for old, new in pairs])
        return ((losses, aux) if self.has_aux else losses, grads), state

    def forward(self, params: Any, *args: Any, **kwargs: Any) -> Pass:
        """The forward pass, checked."""
        if self.encoder is None:
            run = _passes.whole(lambda p: self.losses_fn(p, *args, **kwargs), params, self.has_aux)
        else:
            run = _passes.with_encoder(
                self.losses_fn, self.encoder, self.has_aux, params, *args, **kwargs
            )
        num_tasks = self.weighting.num_tasks
        if run.losses.shape[0] != num_tasks:
            raise ValueError(
                f"losses_fn returned {run.losses.shape[0]} losses, but the weighting has "
                f"num_tasks={num_tasks}: give the weighting the number of losses."
            )
        _check_manual_axes(run.losses, self.per_device)
        if self.nonfinite == "drop" and not run.apart:
            raise ValueError(
                'nonfinite="drop" needs the losses apart: return a tuple, a list or a dict instead '
                "of an array. In an array a task cannot be left out, since zero times NaN is NaN."
            )
        return run


class _Update(NamedTuple):
    """One update: what it starts from, and whether tasks must be kept apart in it."""

    driver: _Driver
    selection: Selection
    params: Any
    state: BalanceState
    present: Bool[Array, " tasks"]
    apart: bool
    sliced: Sliced | None

    def measuring(self, *args: Any, **kwargs: Any) -> tuple[Array, Any, Any, BalanceState]:
        """Losses, aux, gradient and state of an update that measures."""
        reads = reads_of(self.driver.weighting)
        # What "drop" has to see in any case.
        least = Reads() if reads is None and self._drop() else reads
        if self.driver.measure == "lagged" and least is not None and not least.cosines:
            return self._lagged(least, *args, **kwargs)
        losses, aux, gradients = self._run(reads, *args, **kwargs)
        measurement, usable = None, self.present
        if least is not None:
            measurement = gradients.measure(self.selection.wanted(self._drop()), least)
            usable = self._usable(measurement)
        state = self._advanced(losses, gradients.selection, measurement, usable)
        return losses, aux, self._combined(gradients, state, usable), state

    def holding(self, *args: Any, **kwargs: Any) -> tuple[Array, Any, Any, BalanceState]:
        """The same of an update that does not measure."""
        losses, aux, gradients = self._run(None, *args, **kwargs)
        usable = self.present
        if self._drop():
            usable = self._usable(gradients.measure(self.selection.wanted(every=True), Reads()))
        state = hold(self.driver.weighting, self.state, usable)
        return losses, aux, self._combined(gradients, state, usable), state

    def _run(
        self, reads: Reads | None, *args: Any, **kwargs: Any
    ) -> tuple[Array, Any, TaskGradients]:
        """Losses, aux and gradients, of which ``reads`` will be read."""
        if self.sliced is not None:
            losses, aux, gradients = self.sliced.run(self.params, self.selection, self.apart, reads)
            _check_manual_axes(losses, self.driver.per_device, _SLICES_REMEDY)
            return losses, aux, gradients
        run = self._forward(*args, **kwargs)
        return run.losses, run.aux, task_gradients(run, self.selection, self.apart, reads)

    def _drop(self) -> bool:
        return self.driver.nonfinite == "drop"

    def _usable(self, measurement: Measurement) -> Array:
        """[K], the present tasks whose gradient enters the update."""
        if not self._drop():
            return self.present
        return self.present & jnp.all(jnp.isfinite(measurement.norms), axis=0)

    def _forward(self, *args: Any, **kwargs: Any) -> Pass:
        driver = self.driver
        if driver.microbatch_size is None:
            return driver.forward(self.params, *args, **kwargs)
        if any(self.selection.overwritten):
            raise ValueError(
                f"microbatch_size takes means over parts, and the leaves of {OVERWRITTEN!r} hold "
                "scales, of which no mean is safe. Leave microbatch_size out."
            )
        return _passes.in_microbatches(
            driver.forward,
            driver.microbatch_size,
            driver.encoder is not None,
            self.params,
            *args,
            **kwargs,
        )

    def _advanced(
        self, losses: Array, selection: Selection, measurement: Measurement | None, usable: Array
    ) -> BalanceState:
        reads = reads_of(self.driver.weighting)
        return advance(
            self.driver.weighting,
            selection,
            self.state,
            None if reads is None else measurement,
            task_losses=needed_losses(self.driver.weighting, losses),
            present=self.present,
            usable=usable,
            lagged=self.driver.measure == "lagged",
        )

    def _combined(self, gradients: TaskGradients, state: BalanceState, usable: Array) -> Any:
        factors = self.selection.coefficients(state.task_weights, usable)
        leaves = gradients.combine(factors, usable if self.apart else None)
        return jax.tree.unflatten(jax.tree.structure(self.params), leaves)

    def _lagged(
        self, reads: Reads, *args: Any, **kwargs: Any
    ) -> tuple[Array, Any, Any, BalanceState]:
        """K backward passes, summed with the weights from before while they are measured."""
        if self.sliced is None:
            run = self._forward(*args, **kwargs)
            summed = functools.partial(self._summed, run, reads)
        else:
            summed = functools.partial(self._summed_slices, self.sliced, reads)
        losses, aux, measurement, total = summed(self.present)
        usable = self._usable(measurement)
        if self._drop():
            complete = jnp.all(usable == self.present)
            total = lax.cond(complete, lambda: total, lambda: summed(usable)[3])
        leaves = zip(total, jax.tree.leaves(self.params), strict=True)
        grads = [t.astype(p.dtype) for t, p in leaves]
        state = self._advanced(losses, self.selection, measurement, usable)
        return losses, aux, jax.tree.unflatten(jax.tree.structure(self.params), grads), state

    def _factors_before(self, usable: Array) -> tuple[list[Array], list[bool]]:
        """Per leaf the [K] factors by the weights from before, and whether it is overwritten."""
        weights = restrict(self.driver.weighting, self.state.next_task_weights, usable)
        factors = self.selection.coefficients(weights, usable)
        unread = jnp.zeros(usable.shape, weights.dtype)
        return [unread if each is None else each for each in factors], [
            each is None for each in factors
        ]

    def _summed_slices(
        self, sliced: Sliced, reads: Reads, usable: Array
    ) -> tuple[Array, Any, Measurement, list[Array]]:
        """Of one slice after the other."""
        factors, _ = self._factors_before(usable)
        wanted = self.selection.wanted(self._drop())
        measured = functools.partial(measure_one, wanted=wanted, reads=reads)
        return sliced.one_by_one(self.params, self.selection, factors, usable, measured)

    def _summed(
        self, run: Pass, reads: Reads, usable: Array
    ) -> tuple[Array, Any, Measurement, list[Array]]:
        """What is measured, and the sum over the usable tasks, one gradient at a time."""
        num_tasks = self.driver.weighting.num_tasks
        each, over = self._factors_before(usable)
        apart = self.apart or not separates(run, self.selection)
        factors = jnp.array(each).reshape(-1, num_tasks)
        one_at_a_time = [functools.partial(run.pull_back_one, i) for i in range(num_tasks)]
        wanted = self.selection.wanted(self._drop())

        def add(total: list[Array], task: Any) -> tuple[list[Array], Measurement]:
            index, one_hot, factors, used = task
            # Transposing each loss by itself makes the program K times larger.
            pull = lax.switch(index, one_at_a_time) if apart else run.pull_back(one_hot)
            grads = jax.tree.leaves(pull)
            terms = [
                factor.astype(t.dtype) * g.astype(t.dtype)
                for factor, t, g in zip(factors, total, grads, strict=True)
            ]
            terms = [
                g.astype(t.dtype) if o else t for o, g, t in zip(over, grads, terms, strict=True)
            ]
            if self.apart:
                terms = [jnp.where(used, term, 0) for term in terms]
            total = [
                jnp.maximum(t, term) if o else t + term
                for o, t, term in zip(over, total, terms, strict=True)
            ]
            return total, measure_one(grads, wanted, reads)

        one_hot = jnp.eye(num_tasks, dtype=run.losses.dtype)
        tasks = jnp.arange(num_tasks), one_hot, factors.T, usable
        zeros = _passes.zeros_to_sum(jax.tree.leaves(self.params))
        total, each = lax.scan(add, zeros, tasks)
        return run.losses, run.aux, of_tasks(each), total


_LOSSES_REMEDY = "Average each loss in losses_fn, with jax.lax.pmean(loss, {axes})"
_SLICES_REMEDY = "Take jax.jit with the slices sharded over the devices instead of shard_map"


def _check_manual_axes(losses: Array, per_device: bool, remedy: str = _LOSSES_REMEDY) -> None:
    if axes := _varying(losses):
        raise ValueError(
            f"the losses differ along {sorted(axes)}, mesh axes of jax.shard_map: norms must "
            f"be those of the mean gradient. {remedy.format(axes=tuple(sorted(axes)))}; for a "
            "model on each device pass check_vma=False to shard_map, and per_device=True here."
        )
    manual = jax.sharding.get_abstract_mesh().manual_axes
    unknown = [axis for axis in manual if axis not in _varying(lax.axis_index(axis))]
    if unknown and not per_device:
        raise ValueError(
            f"inside jax.pmap or jax.shard_map(check_vma=False), along {unknown}, each device "
            "would measure the gradients of its own part of the batch, and have weights of its "
            "own. Take task_value_and_grad, average the stacked gradients with jax.lax.pmean, and "
            "pass them to balance(...).update, which is exact; or jax.jit with a sharded batch. "
            "per_device=True says that each device has a model of its own."
        )


def _varying(array: Array) -> frozenset[str]:
    # Where jax does not tell by this name, the backward pass fails with an error of its own.
    manual = getattr(jax.typeof(array), "manual_axis_type", None)
    return getattr(manual, "varying", frozenset())


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.number | float | int)


def _check_slices(
    weighting: Weighting,
    in_axes: Any,
    encoder: Callable[..., Any] | None,
    microbatch_size: int | None,
) -> None:
    if in_axes is None:
        return
    if microbatch_size is not None:
        raise ValueError(
            "microbatch_size splits a batch that several losses share, and with in_axes every "
            'slice has its own. Leave microbatch_size out; measure="lagged" runs one slice after '
            "the other."
        )
    if encoder is not None and "cosines" in weighting.needs:
        raise ValueError(
            f"the weighting {name_of(weighting)} needs cosines, and with in_axes and encoder=... "
            "every slice has features of its own, so that all cosines on features are 0. Leave "
            "encoder out, or take a rule that reads norms."
        )


def _check_arguments(
    measure: Measure,
    encoder: Callable[..., Any] | None,
    every: int,
    microbatch_size: int | None,
    nonfinite: str,
) -> None:
    if measure not in ("exact", "lagged"):
        raise ValueError(f'{measure=} must be "exact" or "lagged".')
    for name, value in (("every", every), ("microbatch_size", microbatch_size)):
        wrong_type = isinstance(value, bool) or not isinstance(value, int)
        if value is not None and (wrong_type or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
    if encoder is not None and not callable(encoder):
        raise ValueError(f"{encoder=} must be a function (params, *args) -> features.")
    if nonfinite == "drop" and encoder is not None:
        raise ValueError(
            'nonfinite="drop" needs the gradients of the tasks apart, and with encoder=... one '
            "backward pass meets them all, where zero times NaN is NaN. Leave encoder out."
        )
