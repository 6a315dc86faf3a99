"""What is measured on the gradients of K tasks: norms and cosines, safe from 1e-30 to 1e30."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gaba_jax._checks import each_task
from gaba_jax._meshes import is_explicit

# Slices run faster; past this many the program takes too long to compile.
_MOST_SLICES = 256

# A weighted sum of more gradients is one reduction.
_MOST_TERMS = 32

# Elements of gradients whose products are taken at a time: what is in a cache.
_MOST_AT_ONCE = 2**18

# One factor per regime keeps the squares inside float32's range, underflow included.
_USUAL_SCALE = 2.0**37  # norms from 1e-22 to 1e8; a sum of zero is a true zero down to 1e-30
_TINY_SCALE = 2.0**100
_HUGE_SCALE = 2.0**-70
_USUAL_RANGE = (1e-22, 1e8)


class Statistic(NamedTuple):
    """A number that a rule reads of each task's gradient, beside norms and cosines.

    Name it in the ``needs`` of a :class:`gaba_jax.weighting.Weighting`; the rule then reads
    ``stats.extra[statistic.name]``. A gradient is measured leaf by leaf, one task and one leaf at a
    time, where norms are measured.

    Attributes:
      name: under which the rule reads it; no two of a rule's have the same.
      of_leaf: from the gradient of one task on one leaf, an array of the parameter's shape in
        float32 at least, to a pytree of scalars: sums, counts or maxima, for which 0 is neutral.
      combine: from that pytree, each scalar now an array [leaves], to one scalar. A leaf that is
        not measured enters as zeros. None gives the rule the pytree itself, [leaves, K] each.

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax.weighting import Statistic
      >>> l1_norm = Statistic("l1_norm", lambda g: jnp.sum(jnp.abs(g)), jnp.sum)
    """

    name: str
    of_leaf: Callable[[Array], Any]
    combine: Callable[[Any], Array] | None


class Reads(NamedTuple):
    """What is measured of gradients: their norms always, and what a rule reads beside them."""

    cosines: bool = False
    statistics: tuple[Statistic, ...] = ()


_NORMS = Reads()


class TaskStats(NamedTuple):
    """What a :class:`gaba_jax.weighting.Weighting` sees of K tasks at one update.

    A task that is absent (``present`` is False) has norm 0, cosines 0, loss 1 and statistics 0. A
    rule can read what it names in its ``needs``, and the last three fields.

    Attributes:
      norms: [K] float32, L2 norms of the task gradients on the measured parameters; None unless the
        weighting needs them or cosines.
      cosines: [K, K], cosines between them (diagonal 1; a gradient of norm zero has cosine 0 to
        the others); None unless the weighting needs them.
      losses: [K], the task losses; None unless the weighting needs them.
      present: [K] bool, the tasks that take part in this update.
      elapsed: [] int32, updates since the measurement before this one; 1 at the first.
      extra: by its name, what each :class:`Statistic` of the rule is, [K] float32.
    """

    norms: Float[Array, " tasks"]
    cosines: Float[Array, "tasks tasks"] | None
    losses: Float[Array, " tasks"] | None
    present: Bool[Array, " tasks"]
    elapsed: Int[Array, ""]
    extra: dict[str, Any] = {}  # noqa: RUF012 (a pytree, and nobody writes to it)


class Measurement(NamedTuple):
    """What was measured in one update, leaf by leaf.

    Attributes:
      norms: [leaves, K] float32, 0 on leaves nobody asked for.
      cosines: [leaves, K, K] float32 between the tasks' gradients on each leaf; None where the
        weighting needs none.
      extra: by their names, the statistics of each leaf: pytrees of [leaves, K] float32, 0 on
        leaves nobody asked for.
    """

    norms: Float[Array, "leaves tasks"]
    cosines: Float[Array, "leaves tasks tasks"] | None
    extra: dict[str, Any] = {}  # noqa: RUF012 (likewise)


class Look(NamedTuple):
    """A leaf as it was measured, and for which of its tasks that has to be done again."""

    norms: Float[Array, " tasks"]
    cosines: Float[Array, "tasks tasks"] | None
    doubt: Bool[Array, " tasks"]


@runtime_checkable
class Leaf(Protocol):
    """The gradients of the tasks that have a leaf, in whatever form they are kept."""

    @property
    def tasks(self) -> tuple[int, ...]:
        """The tasks, in the order of the leading axis of all else."""
        ...

    @property
    def of_one(self) -> jax.ShapeDtypeStruct:
        """The gradient of one task."""
        ...

    def cosines(self, norms: Array) -> Array:
        """[tasks, tasks], from their norms."""
        ...

    def each(self, measured: Callable[[Array], Any]) -> Any:
        """What is measured of every task's gradient, [tasks, ...]."""
        ...

    def combine(self, factors: Array, usable: Array | None) -> Array:
        """``sum_i factors[i] * g_i``, never reading a task that is not usable (None: all are)."""
        ...


class Whole(NamedTuple):
    """A leaf whose gradients are there, [tasks, ...].

    It is measured slice by slice where few enough are measured together: XLA folds a slice of a
    stack, which is then never built where the gradients come from the same program. Where they are
    ``of_slices`` the axes of the parameter lie on every device, and products of parts are cheaper.
    """

    array: Array
    tasks: tuple[int, ...]
    sliced: bool = False
    pairwise: bool = False
    of_slices: bool = False

    def slices(self) -> list[Array]:
        """The gradients, as constants."""
        # Taken where they are used, in the loop too: else XLA may add up one after the other there.
        constant = lax.stop_gradient(self.array)
        return [constant[i] for i in range(len(self.array))]

    def sums(self, scale: Array) -> Array:
        """The sums of squares of the gradients, each times its scale."""
        if self.sliced:
            each = [sum_of_squares(one, s) for one, s in zip(self.slices(), scale, strict=True)]
            return jnp.stack(each).astype(jnp.float32)
        # float64 sums come back to float32 before the root: their scaled square fits there too.
        sums = jax.vmap(sum_of_squares)(lax.stop_gradient(self.array), scale)
        return sums.astype(jnp.float32)

    def cosines(self, norms: Array) -> Array:
        """From unit gradients, so that every product is below 1, whatever the scale of a task."""
        leaf, k = lax.stop_gradient(self.array), len(self.array)
        leaf = leaf.astype(wide(leaf))
        usable = (norms > 0) & jnp.isfinite(norms)
        unit = jnp.where(usable, 1 / jnp.where(usable, norms, 1), 0).astype(accumulator(leaf))
        pairs = list(itertools.combinations(range(k), 2))
        if pairs and self.pairwise:
            scaled = [leaf[i] * unit[i] for i in range(k)]
            dots = [jnp.sum((scaled[i].conj() * scaled[j]).real) for i, j in pairs]
            above = jnp.zeros([k, k], unit.dtype)
            above = above.at[tuple(np.array(pairs).T)].set(jnp.stack(dots))
            gram = above + above.T
        else:
            gram = _gramian(leaf, unit, self.of_slices)
        return as_cosines(gram)

    @property
    def of_one(self) -> jax.ShapeDtypeStruct:
        """The gradient of one task."""
        return jax.ShapeDtypeStruct(self.array.shape[1:], self.array.dtype)

    def each(self, measured: Callable[[Array], Any]) -> Any:
        """Slice by slice where they are few."""
        if not self.sliced:
            return lax.map(measured, lax.stop_gradient(self.array))
        return jax.tree.map(lambda *each: jnp.stack(each), *map(measured, self.slices()))

    def combine(self, factors: Array, usable: Array | None) -> Array:
        """Slice by slice where they are few, which XLA folds."""
        accurate = wide(self.array)
        if len(self.array) > _MOST_TERMS:
            return self._reduced(factors.astype(accurate), usable)
        total = jnp.zeros(self.array.shape[1:], accurate)
        for i in range(len(self.array)):
            term = self.array[i].astype(accurate) * factors[i].astype(accurate)
            total = total + (term if usable is None else jnp.where(usable[i], term, 0))
        return total.astype(self.array.dtype)

    def _reduced(self, factors: Array, usable: Array | None) -> Array:
        """The same as one product."""
        rows = self.array.astype(factors.dtype)
        if usable is not None:
            rows = jnp.where(each_task(usable, rows), rows, 0)
        if is_explicit():  # as in a Gramian
            total = jnp.sum(rows * each_task(factors, rows), axis=0)
        else:
            axes = ((0,), (0,)), ((), ())
            total = lax.dot_general(factors, rows, axes, precision=lax.Precision.HIGHEST)
        return total.astype(self.array.dtype)


def _gramian(rows: Array, scales: Array, in_parts: bool) -> Array:
    """The inner products of arrays [K, ...], each times its scale."""
    axes = tuple(range(1, rows.ndim))
    if not in_parts or is_explicit() or rows.ndim == 1 or not rows.size:
        # Parts of a sharded axis would be gathered, and a product on a mesh of Explicit axes be
        # told where it ends; a sum over sharded axes stays where it is.
        rows = rows * each_task(scales, rows)
        return lax.map(lambda one: jnp.sum((rows * one.conj()[None]).real, axis=axes), rows)

    def of_part(part: Array) -> Array:
        part = part * each_task(scales, part)
        dots = lax.dot_general(
            part, part.conj(), ((axes, axes), ((), ())), precision=lax.Precision.HIGHEST
        )
        return dots.real

    return sum_over_parts(of_part, rows, 1, _MOST_AT_ONCE)


def sum_over_parts(of_part: Callable[[Array], Array], array: Array, axis: int, most: int) -> Array:
    """The sum of what parts along an axis are, of which none has more than ``most`` elements."""
    length = array.shape[axis]
    part = max(1, min(length, length * most // max(array.size, 1)))
    number, rest = divmod(length, part)

    def add(i: Array, total: Array) -> Array:
        return total + of_part(lax.dynamic_slice_in_dim(array, i * part, part, axis))

    # What is left over comes first; without it, the last of the parts.
    first = rest or part
    total = of_part(lax.slice_in_dim(array, length - first, length, axis=axis))
    number = number if rest else number - 1
    return lax.fori_loop(0, number, add, total) if number else total


def measure(
    leaves: Sequence[Leaf], wanted: Sequence[bool], num_tasks: int, reads: Reads
) -> Measurement:
    """What a rule reads of the leaves that are wanted."""
    chosen = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want and leaf.tasks]
    whole = [leaf for leaf in chosen if isinstance(leaf, Whole)]
    kept = [leaf for leaf in chosen if not isinstance(leaf, Whole)]
    looked_at = iter(_looks(kept, reads.cosines))
    norms_of_whole = iter(_safe_norms(whole))
    looks = [
        Look(next(norms_of_whole), None, jnp.array(False))
        if isinstance(leaf, Whole)
        else next(looked_at)
        for leaf in chosen
    ]
    norms = [jnp.zeros([num_tasks], jnp.float32)] * len(leaves)
    cosines = [jnp.eye(num_tasks, dtype=jnp.float32)] * len(leaves)
    places = [i for i, want in enumerate(wanted) if want and leaves[i].tasks]
    for place, leaf, look in zip(places, chosen, looks, strict=True):
        norms[place] = _spread(look.norms, leaf.tasks, norms[place])
        if reads.cosines:
            found = leaf.cosines(look.norms) if look.cosines is None else look.cosines
            cosines[place] = _spread(found, leaf.tasks, cosines[place])
    if not leaves:
        norms, cosines = jnp.zeros([0, num_tasks]), jnp.zeros([0, num_tasks, num_tasks])
    extra = {each.name: _of_leaves(each, leaves, wanted, num_tasks) for each in reads.statistics}
    return Measurement(jnp.array(norms), jnp.array(cosines) if reads.cosines else None, extra)


def _of_leaves(
    statistic: Statistic, leaves: Sequence[Leaf], wanted: Sequence[bool], num_tasks: int
) -> Any:
    """A pytree of [leaves, K], 0 where a leaf is not wanted."""

    def measured(gradient: Array) -> Any:
        return as_statistic(statistic.name, "of_leaf", statistic.of_leaf(_wider(gradient)))

    def of_leaf(leaf: Leaf, want: bool) -> Any:
        # A task that has no gradient on a leaf has zeros there, and counts them.
        zeros = jnp.zeros(leaf.of_one.shape, leaf.of_one.dtype)
        of_none = (
            measured(zeros)
            if want
            else jax.tree.map(jnp.zeros_like, jax.eval_shape(measured, zeros))
        )
        of_all = jax.tree.map(lambda each: jnp.full([num_tasks], each), of_none)
        if not want or not leaf.tasks:
            return of_all
        return jax.tree.map(
            lambda of_some, others: _spread(of_some, leaf.tasks, others),
            leaf.each(measured),
            of_all,
        )

    each = map(of_leaf, leaves, wanted)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def as_statistic(name: str, function: str, values: Any) -> Any:
    """As float32; ValueError unless they are scalars."""
    for leaf in jax.tree.leaves(values):
        if jnp.shape(leaf) != () or jnp.iscomplexobj(leaf):
            raise ValueError(
                f"{function} of the statistic {name!r} must return real scalars, got "
                f"{jnp.result_type(leaf)} of shape {jnp.shape(leaf)}."
            )
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.float32), values)


def _wider(gradient: Array) -> Array:
    return lax.stop_gradient(gradient.astype(wide(gradient)))


def _looks(leaves: Sequence[Any], with_cosines: bool) -> list[Look]:
    """What the factors tell, and where that may not suffice the gradients themselves."""
    # As constants: weights are not differentiated.
    looks = [lax.stop_gradient(leaf.look(with_cosines)) for leaf in leaves]
    if not looks:
        return looks

    def again(loop: tuple[Array, list[Look]]) -> tuple[Array, list[Look]]:
        pairs = zip(leaves, loop[1], strict=True)
        return jnp.array(False), [lax.stop_gradient(leaf.look_again(look)) for leaf, look in pairs]

    # A while loop, which runs not at all or once: under vmap a cond would run always.
    doubt = jnp.any(jnp.concatenate([look.doubt for look in looks]))
    return lax.while_loop(lambda loop: loop[0], again, (doubt, looks))[1]


def _safe_norms(leaves: Sequence[Whole]) -> list[Array]:
    """Norms from sums of squares, taken once more where one left the range of the first scale."""

    # One compiled copy, run once or twice. The scale is loop-carried, so XLA cannot pull it out of
    # the square.
    def unfinished(loop: tuple[list[Array], list[Array], Array]) -> Array:
        scales, _, runs = loop
        again = jnp.any(jnp.concatenate(scales) != _USUAL_SCALE)
        return (runs == 0) | ((runs == 1) & again)

    def measured(loop: tuple[list[Array], list[Array], Array]) -> Any:
        scales, _, runs = loop
        norms = [jnp.sqrt(leaf.sums(s)) / s for leaf, s in zip(leaves, scales, strict=True)]
        scales = [
            jnp.where(runs == 0, _scale_for(n), s) for n, s in zip(norms, scales, strict=True)
        ]
        return scales, norms, runs + 1

    if not leaves:
        return []
    scales = [jnp.full(len(leaf.tasks), _USUAL_SCALE, jnp.float32) for leaf in leaves]
    norms = [jnp.zeros_like(scale) for scale in scales]
    return lax.while_loop(unfinished, measured, (scales, norms, jnp.zeros([], jnp.int32)))[1]


def _spread(of_some: Array, tasks: tuple[int, ...], others: Array) -> Array:
    """What is known of some tasks, among the others."""
    if tasks == tuple(range(len(others))):
        return of_some
    return others.at[np.ix_(*[np.array(tasks)] * others.ndim)].set(of_some)


def weighted(leaf: Leaf, factors: Array | None, usable: Array | None) -> Array:
    """``sum_i factors[i] g_i``; of a leaf that is overwritten the largest value of any task."""
    if factors is not None:
        return leaf.combine(factors, usable)
    # Of scales and histories of largest elements the largest is safe for every task.
    each = leaf.each(lambda gradient: gradient)
    if usable is not None:
        left_out = each_task(~usable & jnp.any(usable), each)
        each = jnp.where(left_out, jnp.zeros_like(each), each)
    return jnp.max(each, axis=0)


def whole_leaves(leaves: Sequence[Array]) -> list[Whole]:
    """Gradients [K, ...] that are there."""

    def made(leaf: Array) -> Whole:
        k = len(leaf)
        few = k * len(leaves) <= _MOST_SLICES
        pairwise = k * (k - 1) // 2 * len(leaves) <= _MOST_SLICES
        return Whole(leaf, tuple(range(k)), few, pairwise)

    return list(map(made, leaves))


# Jitted, or every eager call would compile anew; inlined, or XLA would build the stack for it.
@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def measure_stacked(
    leaves: Sequence[Array], wanted: tuple[bool, ...], num_tasks: int, reads: Reads = _NORMS
) -> Measurement:
    """The measurement of gradients [K, ...]."""
    return measure(whole_leaves(leaves), wanted, num_tasks, reads)


def measure_one(
    leaves: Sequence[Array], wanted: tuple[bool, ...], reads: Reads = _NORMS
) -> Measurement:
    """That of one task's gradient, without the axis of the tasks; it has no cosines."""
    alone = [leaf[None] for leaf in lax.stop_gradient(leaves)]
    return jax.tree.map(lambda each: each[:, 0], measure_stacked(alone, wanted, 1, reads))


def norms_of(arrays: Sequence[Array]) -> Float[Array, " arrays"]:
    """The norm of each array."""
    return measure_one(arrays, (True,) * len(arrays)).norms


def _scale_for(norms: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The scale for another look at norms that were taken at the usual one."""
    low, high = _USUAL_RANGE
    huge = ~(norms <= high)  # an overflow to inf, or a NaN
    tiny = (norms > 0) & (norms < low)
    scale = jnp.where(huge, _HUGE_SCALE, jnp.where(tiny, _TINY_SCALE, _USUAL_SCALE))
    return scale.astype(jnp.float32)


def sum_of_squares(slice_: Array, scale: Float[Array, ""]) -> Float[Array, ""]:
    """``sum(|scale * x|**2)`` of one task's gradient on one leaf, in float32 at least."""
    accurate = accumulator(slice_)
    if jnp.issubdtype(slice_.dtype, jnp.complexfloating):
        parts: tuple[Array, ...] = (slice_.real, slice_.imag)
    else:
        parts = (slice_,)
    return sum(
        (jnp.sum(jnp.square(part.astype(accurate) * scale.astype(accurate))) for part in parts),
        start=jnp.zeros([], accurate),
    )


def combine_norms(
    norms: Float[Array, "leaves tasks"], measured: Bool[Array, " leaves"]
) -> Float[Array, " tasks"]:
    """The norm over all measured leaves, ``sqrt(sum_l norms[l]**2)``, without overflow."""
    chosen = jnp.where(measured[:, None], norms, 0)
    largest = jnp.max(chosen, axis=0, initial=0)
    divisor = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return divisor * jnp.sqrt(jnp.sum(jnp.square(chosen / divisor[None]), axis=0))


def combine_cosines(
    measurement: Measurement, measured: Bool[Array, " leaves"], norms: Float[Array, " tasks"]
) -> Float[Array, "tasks tasks"]:
    """The cosines over all measured leaves, whose norms together are ``norms``."""
    assert measurement.cosines is not None
    divisor = jnp.where(norms > 0, norms, 1)[None]
    part = jnp.where(measured[:, None], measurement.norms, 0) / divisor
    pairs = part[:, :, None] * part[:, None, :]
    # Chosen afterwards: zero times the NaN of a leaf that is not measured would be NaN.
    gram = jnp.sum(jnp.where(measured[:, None, None], pairs * measurement.cosines, 0), axis=0)
    return as_cosines(gram)


def combine_extra(
    statistics: Sequence[Statistic], measurement: Measurement, measured: Bool[Array, " leaves"]
) -> dict[str, Any]:
    """Each statistic [K] over all measured leaves."""

    def combined(statistic: Statistic) -> Any:
        of_leaves = jax.tree.map(
            lambda each: jnp.where(measured[:, None], each, 0), measurement.extra[statistic.name]
        )
        if statistic.combine is None:
            return of_leaves
        combine = statistic.combine
        return jax.vmap(
            lambda of_task: as_statistic(statistic.name, "combine", combine(of_task)), in_axes=1
        )(of_leaves)

    return {statistic.name: combined(statistic) for statistic in statistics}


def as_cosines(gram: Array) -> Float[Array, "tasks tasks"]:
    """A Gramian of unit gradients without its rounding: at most 1, and a diagonal of 1."""
    diagonal = jnp.eye(gram.shape[0], dtype=bool)
    return jnp.where(diagonal, 1, jnp.clip(gram, -1, 1)).astype(jnp.float32)


def largest_to_smallest(values: Float[Array, "*batch tasks"]) -> Float[Array, "*batch"]:
    """Infinite where only the smallest is zero, 1 where all are."""
    largest, smallest = jnp.max(values, axis=-1), jnp.min(values, axis=-1)
    ratio = largest / jnp.where(smallest > 0, smallest, 1)
    return jnp.where(smallest > 0, ratio, jnp.where(largest > 0, jnp.inf, 1))


def accumulator(array: Array) -> jnp.dtype:
    """Float32, or float64 for leaves of that width."""
    return jnp.finfo(wide(array)).dtype


def wide(array: Any) -> jnp.dtype:
    """The dtype itself where it has 32 bits or more (complex: twice 32), else float32."""
    return np.promote_types(array.dtype, np.float32)  # JAX's own refuses bfloat16 when strict
