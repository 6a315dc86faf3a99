"""Tasks with examples of their own: one backward pass holds the gradients of all slices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Shaped

from gaba_jax import _passes
from gaba_jax._checks import each_task
from gaba_jax._gradients import TaskGradients, kept, nothing, of_tasks, pulled, understood
from gaba_jax._meshes import is_explicit, replicated
from gaba_jax._selection import OVERWRITTEN, Selection
from gaba_jax._statistics import (
    Leaf,
    Measurement,
    Reads,
    Whole,
    measure_one,
    measure_stacked,
    wide,
)


class Slices(NamedTuple):
    """How the arguments of a loss are sliced, and which task each slice belongs to.

    Attributes:
      axes: the mapped axis of every leaf of the arguments, None where it is not mapped.
      number: of slices, N.
      num_tasks: K.
      ids: [N], the task of each slice, K where it has none; None where slice i is task i.
    """

    axes: tuple[Any, ...]
    number: int
    num_tasks: int
    ids: Array | None

    def map(self, fn: Callable[..., Any], *args: Any) -> Any:
        """``fn`` of each slice of the arguments, [N, ...]."""
        return jax.vmap(fn, in_axes=self.axes)(*args)

    def take(self, args: Any, index: Array) -> Any:
        """One slice of the arguments."""
        return jax.tree.map(
            lambda axis, leaf: (
                leaf
                if axis is None
                else lax.dynamic_index_in_dim(leaf, index, axis, keepdims=False)
            ),
            self.axes,
            args,
            is_leaf=lambda axis: axis is None,
        )

    def members(self) -> Bool[Array, "tasks slices"]:
        """Which slices a task has."""
        assert self.ids is not None
        return jnp.arange(self.num_tasks)[:, None] == self.ids[None]

    def counts(self) -> Array:
        """[K], the number of slices of each task."""
        if self.ids is None:
            return jnp.ones([self.num_tasks], jnp.int32)
        return jnp.sum(self.members(), axis=1, dtype=jnp.int32)

    def shares(self) -> Array:
        """[K], the part of a task's mean that each of its slices is."""
        return 1 / jnp.maximum(self.counts(), 1)

    def means(self, values: Array) -> Array:
        """[K, ...] from [N, ...]: the mean over a task's slices, 0 where it has none."""
        if self.ids is None:
            return values
        accurate = values.astype(wide(values))
        if is_explicit():
            members = jnp.expand_dims(self.members(), tuple(range(2, 1 + values.ndim)))
            sums = jnp.sum(jnp.where(members, accurate, 0), axis=1)
        else:  # a slice of no task has no row to be added to
            sums = jax.ops.segment_sum(accurate, self.ids, self.num_tasks)
        return (sums * each_task(self.shares().astype(sums.dtype), sums)).astype(values.dtype)

    def factors(self, of_tasks: Shaped[Array, " tasks"]) -> Shaped[Array, " slices"]:
        """What each slice's gradient is multiplied by where its task's mean is by ``of_tasks``."""
        if self.ids is None:
            return of_tasks
        shares = of_tasks * self.shares().astype(of_tasks.dtype)
        return jnp.sum(jnp.where(self.members(), shares[:, None], 0), axis=0)

    def of_pairs(self, gram: Array, most: Array) -> tuple[Array, Array]:
        """The same of tasks, from inner products [N, N] and bounds of norms [N] of slices."""
        if self.ids is None:
            return gram, most
        members = self.members()
        shares = jnp.where(members, self.shares().astype(gram.dtype)[:, None], 0)
        # A slice that is not finite reaches its own task alone.
        failed = ~jnp.isfinite(most)
        gram = jnp.where(failed[:, None] | failed[None], 0, gram)
        gram = jnp.linalg.multi_dot([shares, gram, shares.T], precision=lax.Precision.HIGHEST)
        bad = jnp.any(members & failed[None], axis=1)
        most = jnp.sum(jnp.where(members & ~failed[None], shares * most[None], 0), axis=1)
        return jnp.where(bad[:, None] | bad[None], jnp.nan, gram), most

    def usable(self, of_tasks: Bool[Array, " tasks"] | None) -> Bool[Array, " slices"] | None:
        """The slices that may be read."""
        if self.ids is None:
            return of_tasks
        of_tasks = jnp.ones([self.num_tasks], bool) if of_tasks is None else of_tasks
        return jnp.any(self.members() & of_tasks[:, None], axis=0)


def slices_of(
    in_axes: Any, args: tuple[Any, ...], task_ids: Any = None, num_tasks: int | None = None
) -> Slices:
    """The slices of the arguments; ``num_tasks`` None makes every slice a task.

    Raises:
      ValueError: axes that do not fit the arguments, task_ids of another shape or dtype, or as many
        slices as tasks without task_ids.
    """
    axes = tuple(in_axes) if isinstance(in_axes, tuple | list) else (in_axes,) * len(args)
    if len(axes) != len(args):
        raise ValueError(
            f"in_axes={in_axes!r} has {len(axes)} entries, but losses_fn is called with "
            f"{len(args)} arguments after params. Give one entry for each of them, None for one "
            "that is the same for every slice; keyword arguments are not mapped."
        )
    axes = jax.tree.broadcast(axes, args, is_leaf=lambda axis: axis is None)
    if all(axis is None for axis in jax.tree.leaves(axes, is_leaf=lambda axis: axis is None)):
        raise ValueError(f"in_axes={in_axes!r} maps no array: there is nothing to slice.")
    number = jax.eval_shape(jax.vmap(lambda *_: jnp.zeros([]), in_axes=axes), *args).shape[0]
    if num_tasks is None:
        return Slices(axes, number, number, None)
    if task_ids is None:
        if number != num_tasks:
            raise ValueError(
                f"the arguments hold {number} slices along in_axes={in_axes!r}, but the weighting "
                f"has num_tasks={num_tasks}: without task_ids slice i is task i. Pass task_ids, "
                f"the task of each slice, or give the weighting {number} tasks."
            )
        return Slices(axes, number, num_tasks, None)
    ids = jnp.asarray(task_ids)
    if ids.shape != (number,) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"task_ids must be integers of shape ({number},), the task of each slice; got "
            f"{ids.dtype} of shape {ids.shape}."
        )
    ids = replicated(ids.astype(jnp.int32))
    return Slices(
        axes, number, num_tasks, jnp.where((ids >= 0) & (ids < num_tasks), ids, num_tasks)
    )


class Sliced(NamedTuple):
    """A loss of one slice, and the arguments that are sliced.

    Attributes:
      loss_fn: ``loss_fn(params, *slice, **kwargs)``, one scalar loss; with an encoder
        ``loss_fn(params, features, *slice, **kwargs)``.
    """

    loss_fn: Callable[..., Any]
    encoder: Callable[..., Any] | None
    has_aux: bool
    slices: Slices
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(
        self, params: Any, selection: Selection, apart: bool, reads: Reads | None
    ) -> tuple[Array, Any, TaskGradients]:
        """Losses [K], aux [N, ...] and gradients, from one forward pass.

        Args:
          params: the parameters.
          selection: which leaves are shared, and measured.
          apart: whether a task must not reach the gradients of another, be it with a NaN.
          reads: what will be read of the gradients; None where nothing will.
        """
        _check_not_overwritten(selection)
        if self.encoder is not None:
            return self._behind_encoder(params, selection)
        # A slice of no task is kept out like a task that is absent.
        plain = reads is None and not apart and selection.groups is None
        if plain and self.slices.ids is None and self._is_linear(params):
            run = _passes.whole(self._losses, params, self.has_aux)
            return run.losses, run.aux, pulled(run, nothing, selection)
        losses, aux, leaves = self.backward(params, reads is not None and reads.cosines)
        return (
            self.slices.means(losses),
            aux,
            kept(leaves, self.slices.num_tasks, selection),
        )

    def stacked(self, params: Any, one_by_one: bool = False) -> tuple[Array, Any, Any]:
        """Losses [N], aux [N, ...], and gradients with leaves [N, *param.shape]."""

        def one(*slice_: Any) -> tuple[Array, Any, Any]:
            run = self._forward(params, *slice_)
            return run.losses[0], run.aux, run.pull_back_one(0)

        if not one_by_one:
            return self.slices.map(one, *self.args)
        number = jnp.arange(self.slices.number)
        return lax.map(lambda i: one(*self.slices.take(self.args, i)), number)

    def backward(self, params: Any, with_cosines: bool) -> tuple[Array, Any, list[Leaf]]:
        """Losses [N], aux [N, ...] and the gradients of the tasks, from one backward pass."""
        forms: list[Any] = []

        def one(*slice_: Any) -> tuple[Array, Any, list[Any]]:
            run = self._forward(params, *slice_)
            forms[:], values = _factors(run, with_cosines)
            return run.losses[0], run.aux, values

        losses, aux, values = self.slices.map(one, *self.args)
        leaves = jax.tree.leaves(params)
        return losses, aux, list(map(self._leaf, forms, values, leaves))

    def _leaf(self, form: Any, value: Any, param: Array) -> Leaf:
        if value is None:
            return Whole(jnp.zeros((0, *param.shape), param.dtype), ())
        if form is None:
            tasks = tuple(range(self.slices.num_tasks))
            return Whole(self.slices.means(value), tasks, of_slices=True)
        from gaba_jax._products import Products

        known, cut = value
        return Products(known, cut, form, self.slices)

    def _forward(self, params: Any, *slice_: Any) -> _passes.Pass:
        """The forward pass of one slice."""

        def one_loss(params: Any) -> Any:
            loss, aux = self._split(self.loss_fn(params, *slice_, **self.kwargs))
            return ([loss], aux) if self.has_aux else [loss]

        return _passes.whole(one_loss, params, self.has_aux)

    def _split(self, out: Any) -> tuple[Any, Any]:
        loss, aux = _passes.split_aux(out) if self.has_aux else (out, None)
        if not hasattr(loss, "shape") or loss.shape != ():
            got = f"shape {loss.shape}" if hasattr(loss, "shape") else f"a {type(loss).__name__}"
            raise ValueError(
                "with in_axes, losses_fn must return ONE scalar loss, that of the slice it is "
                f"given; it returned {got}. Return its mean; with an auxiliary output pass "
                "has_aux=True; leave in_axes out where one batch has several losses."
            )
        return loss, aux

    def _losses(self, params: Any, *features: Any) -> Any:
        """[K], and aux where there is one; ``features`` are [N, ...]."""
        mapped = self.slices._replace(axes=(*(0 for _ in features), *self.slices.axes))
        losses, aux = mapped.map(
            lambda *given: self._split(self.loss_fn(params, *given, **self.kwargs)),
            *features,
            *self.args,
        )
        losses = self.slices.means(losses.astype(wide(losses)))
        return (losses, aux) if self.has_aux else losses

    def _is_linear(self, params: Any) -> bool:
        """Whether the backward pass of a slice is linear, as far as is known."""
        found = []

        def one(*slice_: Any) -> Array:
            program = understood(self._forward(params, *slice_))
            found.append(program is not None and program.is_linear())
            return jnp.zeros([])

        jax.eval_shape(lambda: self.slices.map(one, *self.args))
        return found[0]

    def _behind_encoder(
        self, params: Any, selection: Selection
    ) -> tuple[Array, Any, TaskGradients]:
        """Norms of the gradients on the features, of which every slice has its own."""

        def encoder(params: Any) -> Any:
            assert self.encoder is not None
            encoder = self.encoder
            return self.slices.map(lambda *s: encoder(params, *s, **self.kwargs), *self.args)

        run = _passes.with_encoder(self._losses, encoder, self.has_aux, params, of_sum=True)

        def measured(wanted: Any, reads: Reads) -> Measurement:
            del wanted
            assert run.feature_gradients is not None
            leaves = lax.stop_gradient(run.feature_gradients())
            every = (True,) * len(leaves)
            if self.slices.ids is None:
                return measure_stacked(leaves, every, self.slices.num_tasks, reads)

            def of_task(member: Array) -> Measurement:
                own = [jnp.where(each_task(member, leaf), leaf, 0) for leaf in leaves]
                return measure_one(own, every, reads)

            return of_tasks(lax.map(of_task, self.slices.members()))

        assert run.feature_gradients is not None
        number = len(jax.eval_shape(run.feature_gradients))
        on_features = Selection((True,) * number, (True,) * number)
        gradients = pulled(run, measured, selection)._replace(selection=on_features)
        return run.losses, run.aux, gradients

    def one_by_one(
        self,
        params: Any,
        selection: Selection,
        factors: Sequence[Array],
        usable: Bool[Array, " tasks"],
        measured: Callable[[Sequence[Array]], Measurement],
    ) -> tuple[Array, Any, Measurement, list[Array]]:
        """One slice after the other: losses [K], aux [N, ...], measurement, and the weighted sum.

        Args:
          params: the parameters.
          selection: which leaves are shared, and measured.
          factors: per leaf the [K] factors of the task gradients.
          usable: [K] the tasks whose gradient enters the sum.
          measured: of one task's gradient.
        """
        _check_not_overwritten(selection)
        slices, k = self.slices, self.slices.num_tasks
        zeros = _passes.zeros_to_sum(jax.tree.leaves(params))
        shares = slices.shares()
        args = jax.tree.map(replicated, self.args)

        def backward(index: Array) -> tuple[_passes.Pass, list[Array]]:
            run = self._forward(params, *slices.take(args, index))
            return run, jax.tree.leaves(run.pull_back_one(0))

        def flush(total: list[Array], own: list[Array], task: Array) -> Any:
            total = [
                t + jnp.where(usable[task], factor[task].astype(t.dtype) * g.astype(t.dtype), 0)
                for t, factor, g in zip(total, factors, own, strict=True)
            ]
            return total, measured(own)

        def add(total: list[Array], task: Array) -> Any:
            run, grads = backward(task)
            total, measurement = flush(total, grads, task)
            return total, (run.losses[0], run.aux, measurement)

        def add_sorted(carry: Any, place: Any) -> Any:
            (total, own), (index, task, first, last) = carry, place
            run, grads = backward(index)
            own = [
                jnp.where(first, 0, o) + g.astype(o.dtype) * shares[task].astype(o.dtype)
                for o, g in zip(own, grads, strict=True)
            ]
            none = jax.eval_shape(flush, total, own, task)[1]
            total, measurement = lax.cond(
                last,
                lambda: flush(total, own, task),
                lambda: (total, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), none)),
            )
            return (total, own), (run.losses[0], run.aux, measurement)

        if slices.ids is None:
            total, (losses, aux, each) = lax.scan(add, zeros, jnp.arange(k))
            return losses, aux, of_tasks(each), total
        order = jnp.argsort(slices.ids)
        ids = slices.ids[order]
        first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])
        # Slices of no task come last, and none of them ends one.
        last = jnp.concatenate([first[1:], jnp.ones(1, bool)]) & (ids < k)
        places = order, jnp.minimum(ids, k - 1), first, last
        (total, _), (*found, each) = lax.scan(add_sorted, (zeros, zeros), places)
        losses, aux = jax.tree.map(lambda x: x[jnp.argsort(order)], tuple(found))
        ends = jnp.maximum(jnp.cumsum(slices.counts()) - 1, 0)
        each = jax.tree.map(
            lambda x: jnp.where(each_task(slices.counts() > 0, x[ends]), x[ends], 0), each
        )
        return slices.means(losses), aux, of_tasks(each), total


def _check_not_overwritten(selection: Selection) -> None:
    if any(selection.overwritten):
        raise ValueError(
            f"in_axes cannot serve the leaves of {OVERWRITTEN!r}: they hold scales, of which a "
            "batch of slices would make a sum. Leave in_axes out."
        )


def _factors(run: _passes.Pass, with_cosines: bool) -> tuple[list[Any], list[Any]]:
    """Per leaf of one slice's gradient its form, and its factors; None and the leaf, if whole.

    A leaf that has no gradient is None.
    """
    program = understood(run)
    if program is None or not program.separates():
        leaves = jax.tree.leaves(run.pull_back_one(0))
        return [None] * len(leaves), leaves
    from gaba_jax import _products

    reached = [leaf if program.tasks(leaf) else None for leaf in program.leaves]
    forms = [
        None if leaf is None else _products.form_of(program, leaf, with_cosines) for leaf in reached
    ]
    terms = [term for form in forms if form is not None for term in form.terms]
    whole = [
        leaf for leaf, form in zip(reached, forms, strict=True) if leaf is not None and not form
    ]
    rows = program.rows(list(dict.fromkeys([term.cut for term in terms] + whole)))
    values = {var: each.array[0] for var, each in rows.items()}
    values |= program.known({term.known for term in terms})
    return forms, [
        form.sides(values) if form is not None else None if leaf is None else values[leaf]
        for form, leaf in zip(forms, reached, strict=True)
    ]
