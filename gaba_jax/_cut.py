"""The backward pass of K losses, cut where it is narrowest."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Bool

from gaba_jax._checks import each_task
from gaba_jax._linearity import keeps_digits
from gaba_jax._meshes import placed
from gaba_jax._program import Program, Rows
from gaba_jax._statistics import Leaf, Look, Whole, as_cosines, norms_of, wide

# What may stand between a product and the leaf that it is.
_MOVES = {"copy", "reshape", "reshard", "sharding_constraint", "squeeze", "transpose"}
_KEEPS_NORM = _MOVES | {"convert_element_type", "neg"}
# A norm is measured anew, from the gradient itself, where the gradients of the rows cancel to less
# than this part of their sizes: factors lose the square of the digits that the gradient loses.
_LEAST_LEFT = 1 / 150


class Term(NamedTuple):
    """A leaf, or a part of it, as a product of what depends on the task and what does not.

    ``cut`` has the axes ``cut_rows`` in common with ``known`` (``known_rows``), and ``eqns`` lead
    from it to the leaf.
    """

    cut: Any
    known: Any
    cut_rows: tuple[int, ...]
    known_rows: tuple[int, ...]
    eqns: tuple[JaxprEqn, ...]
    is_lookup: bool

    def columns(self) -> int:
        return self.cut.aval.size // max(self.rows(), 1)

    def rows(self) -> int:
        return math.prod(self.cut.aval.shape[axis] for axis in self.cut_rows)


def leaf_terms(program: Program, leaf: Any) -> tuple[Term, ...]:
    """The products whose sum a leaf is, where they are the cheaper thing to keep; else none."""
    tasks = program.tasks(leaf)
    terms = find_terms(program, leaf, program.is_merge) if len(tasks) > 1 else ()
    each = [task for term in terms for task in program.tasks(term.cut)]
    if sorted(each) != list(tasks):
        return ()
    size, factors, product = leaf.aval.size, 0, 0
    for term in terms:
        k, n, columns = len(program.tasks(term.cut)), term.rows(), term.columns()
        depth = 1 if term.is_lookup else size // max(columns, 1)
        factors += n * n * (k * columns + depth)
        product += k * (size if term.is_lookup else n * size)
    return terms if factors < product else ()


def find_terms(program: Program, leaf: Any, is_sum: Callable[[JaxprEqn], bool]) -> tuple[Term, ...]:
    """The products whose sum a leaf is, all of one form; () where it is something else."""
    terms = _find_terms(program, leaf, is_sum, ())
    return terms if terms and all(_alike(terms[0], term) for term in terms) else ()


def _find_terms(
    program: Program,
    var: Any,
    is_sum: Callable[[JaxprEqn], bool],
    after: tuple[JaxprEqn, ...],
) -> tuple[Term, ...] | None:
    eqn = program.made_by.get(var)
    if eqn is None:
        return None
    name, path = eqn.primitive.name, (eqn, *after)
    if name in _KEEPS_NORM and _is_real(eqn.invars[0]) and _keep_digits(eqn.invars[0], var):
        return _find_terms(program, eqn.invars[0], is_sum, path)
    if name == "add_any" and is_sum(eqn):
        # What stands after a sum stands after each of its parts.
        parts = [_find_terms(program, part, is_sum, after) for part in eqn.invars]
        return None if None in parts else tuple(itertools.chain(*parts))  # pyright: ignore
    moving = [bool(program.tasks(operand)) for operand in eqn.invars]
    if name == "dot_general" and sum(moving) == 1 and all(map(_is_real, eqn.invars)):
        contracted, batch = eqn.params["dimension_numbers"]
        if not batch[0]:
            cut = moving.index(True)
            return (
                Term(
                    *(eqn.invars[cut], eqn.invars[1 - cut]),
                    *(tuple(contracted[cut]), tuple(contracted[1 - cut])),
                    path,
                    is_lookup=False,
                ),
            )
    if name == "scatter-add" and moving == [False, False, True] and _is_lookup(program, eqn):
        indices: Any = eqn.invars[1].aval
        rows = tuple(range(indices.ndim - 1))
        return (Term(eqn.invars[2], eqn.invars[1], rows, rows, path, is_lookup=True),)
    return None


def _is_lookup(program: Program, eqn: JaxprEqn) -> bool:
    """Whether the operation adds rows to a table of zeros, each at one index."""
    numbers = eqn.params["dimension_numbers"]
    shapes: list[Any] = [var.aval for var in eqn.invars]
    table, indices, updates = shapes
    n = indices.ndim - 1
    return (
        program.is_zero(eqn.invars[0])
        and indices.shape[-1:] == (1,)
        and tuple(numbers.scatter_dims_to_operand_dims) == (0,)
        and tuple(numbers.inserted_window_dims) == (0,)
        and not numbers.operand_batching_dims
        and eqn.params["mode"] != lax.GatherScatterMode.CLIP
        and tuple(numbers.update_window_dims) == tuple(range(n, n + table.ndim - 1))
        and updates.shape[n:] == table.shape[1:]
        and _is_real(eqn.invars[2])
    )


def _keep_digits(*variables: Any) -> bool:
    return all(keeps_digits(var.aval.dtype) for var in variables)


def _is_real(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.floating)


def _alike(one: Term, other: Term) -> bool:
    """Whether two terms place their factors' axes in the leaf in the same way."""

    def form(term: Term) -> Any:
        first, *rest = term.eqns
        numbers = None if term.is_lookup else first.params["dimension_numbers"]
        order = [bool(term.cut is var) for var in first.invars]
        return order, numbers, [(e.primitive.name, e.params) for e in rest], term.columns()

    return one is other or form(one) == form(other)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["num_rows"]
)
@dataclasses.dataclass(frozen=True)
class Dense:
    """A known factor [*rows, *depth]."""

    array: Array
    num_rows: int

    def overlap(self, other: "Dense") -> Array:
        """``A B^T``, [*rows of A, *rows of B]."""
        depth = [tuple(range(each.num_rows, each.array.ndim)) for each in (self, other)]
        return _dot(
            _sharded_by_rows(self.array, self.num_rows),
            _sharded_by_rows(other.array, 0),
            (depth[0], depth[1]),
        )

    def sizes(self) -> Array:
        """The norm of each row."""
        return _norms_of_rows(self.array[None], self.num_rows)[0]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "valid"],
    meta_fields=["dtype", "num_rows"],
)
@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows of a table by their indices, [*rows]; one that is not valid is no row."""

    rows: Array
    valid: Array
    dtype: Any
    num_rows: int

    def overlap(self, other: "Lookup") -> Array:
        """1 where the indices agree, [*rows, *rows of the other]."""
        mine, others = (..., *[None] * other.rows.ndim), (*[None] * self.rows.ndim, ...)
        same = self.rows[mine] == other.rows[others]
        return (same & self.valid[mine] & other.valid[others]).astype(self.dtype)

    def sizes(self) -> Array:
        """1 for each row."""
        return self.valid.astype(self.dtype)


class Factor(NamedTuple):
    """One of the products that a leaf is.

    Attributes:
      kept: [tasks, ...], what the program was cut at.
      cuts: [tasks, *rows, *columns], the same with its axes in order.
      known: the other factor.
      finish: makes the leaf of ``kept[i]``.
    """

    kept: Array
    cuts: Array
    known: Any  # Dense or Lookup
    finish: Callable[[Array], Array]

    def through(self, other: "Factor") -> Callable[[Array], Array]:
        """From a cut of the other to ``A B^T`` times it, laid out as a cut of this."""
        overlap, n = self.known.overlap(other.known), self.known.num_rows
        rows = tuple(range(n, overlap.ndim)), tuple(range(overlap.ndim - n))
        return lambda cut: _placed_like(self.cuts[0], _dot(overlap, _rows_together(cut, n), rows))

    def squares(self) -> Array:
        """[tasks], the squared norms of their gradients."""
        through = self.through(self)
        return lax.map(lambda cut: jnp.sum(cut * through(cut)), self.cuts)

    def products(self, other: "Factor") -> Array:
        """[tasks of this, tasks of the other], the inner products of their gradients."""
        through, axes = self.through(other), _rest(self.cuts)
        return lax.map(lambda cut: jnp.sum(self.cuts * through(cut)[None], axis=axes), other.cuts).T

    def sizes_together(self) -> Array:
        """[tasks], the sum of the norms of all rows' gradients."""
        rows = _norms_of_rows(self.cuts, self.known.num_rows) * self.known.sizes()[None]
        return jnp.sum(rows, axis=_rest(rows))


class Factored(NamedTuple):
    r"""A leaf ``A^T D_i`` of each task, kept as its two factors.

    .. math:: \langle A^T D_i, A^T D_j \rangle = \langle A A^T D_j, D_i \rangle

    Where there are several, each is the whole leaf of tasks of its own, and the order of tasks is
    theirs.
    """

    factors: tuple[Factor, ...]
    tasks: tuple[int, ...]

    def look(self, with_cosines: bool) -> Look:
        """Norms (and cosines) from the factors; in doubt where their digits may not suffice."""
        gram: Any = [[None] * len(self.factors) for _ in self.factors]
        if with_cosines:
            pairs = itertools.combinations_with_replacement(enumerate(self.factors), 2)
            for (i, one), (j, other) in pairs:
                gram[i][j] = one.products(other)
                gram[j][i] = gram[i][j].T
            squares = [jnp.diagonal(gram[i][i]) for i in range(len(gram))]
        else:
            squares = [factor.squares() for factor in self.factors]
        root = jnp.sqrt(jnp.maximum(jnp.concatenate(squares), 0))  # rounding may go below
        most = jnp.concatenate([factor.sizes_together() for factor in self.factors])
        cosines = None
        if with_cosines:
            divisor = jnp.where(root > 0, root, 1)
            cosines = as_cosines(jnp.block(gram) / divisor[:, None] / divisor[None])
        return Look(root.astype(jnp.float32), cosines, in_doubt(root, most))

    def look_again(self, look: Look) -> Look:
        """Norms (and cosines) from the gradients themselves, one at a time."""
        return measured_again(self, look)

    @property
    def of_one(self) -> jax.ShapeDtypeStruct:
        """The gradient of one task."""
        factor = self.factors[0]
        return jax.eval_shape(factor.finish, factor.kept[0])

    def each(self, measured: Callable[[Array], Any]) -> Any:
        """From one gradient at a time, formed and dropped."""

        def of_factor(factor: Factor) -> Any:
            kept = lax.stop_gradient(factor.kept)
            return lax.map(lambda cut: measured(factor.finish(cut)), kept)

        return jax.tree.map(lambda *each: jnp.concatenate(each), *map(of_factor, self.factors))

    def cosines(self, norms: Array) -> Array:
        """They come with the look."""
        raise AssertionError("look(with_cosines=True) brings them")

    def combine(self, factors: Array, usable: Array | None) -> Array:
        """One product, of the weighted sum of the cuts."""
        leaf, start = None, 0
        for factor in self.factors:
            tasks = slice(start, start + len(factor.kept))
            start = tasks.stop
            used = None if usable is None else usable[tasks]
            cuts = Whole(factor.kept, self.tasks[tasks])
            part = factor.finish(cuts.combine(factors[tasks], used))
            if used is not None:
                # What is known of absent tasks alone may be no number.
                part = jnp.where(jnp.any(used), part, 0)
            leaf = part if leaf is None else leaf + part
        assert leaf is not None
        return leaf


def in_doubt(norms: Array, most: Array) -> Bool[Array, " tasks"]:
    """Where the digits of norms from factors may not suffice; rows alone would have ``most``."""
    return ~((norms >= _LEAST_LEFT * most) & jnp.isfinite(norms))


def measured_again(leaf: Leaf, look: Look) -> Look:
    """Norms (and cosines) from the gradients themselves, one at a time, where there is doubt."""
    return lax.cond(jnp.any(look.doubt), lambda: _one_by_one(leaf, look), lambda: look)


def _one_by_one(leaf: Leaf, look: Look) -> Look:
    norms = leaf.each(lambda gradient: norms_of([gradient])[0])
    if look.cosines is None:
        return look._replace(norms=norms)

    def unit(gradient: Array) -> Array:
        norm = norms_of([gradient])[0]
        wider = gradient.astype(wide(gradient))
        return wider / jnp.where(norm > 0, norm, 1).astype(wider.dtype)

    def with_others(one: Array) -> Array:
        one = unit(one)
        return leaf.each(lambda other: jnp.sum(one * unit(other)).astype(jnp.float32))

    return look._replace(norms=norms, cosines=as_cosines(leaf.each(with_others)))


class Plan:
    """Where a backward pass is cut, for the gradients of the leaves that are wanted."""

    def __init__(self, program: Program, wanted: Sequence[bool]):
        self._program = program
        chosen = [
            leaf if want and program.tasks(leaf) else None
            for leaf, want in zip(program.leaves, wanted, strict=True)
        ]
        self._terms = [() if leaf is None else leaf_terms(program, leaf) for leaf in chosen]
        of_leaves = zip(chosen, self._terms, strict=True)
        self._whole = [leaf for leaf, terms in of_leaves if leaf is not None and not terms]
        cuts = [term.cut for terms in self._terms for term in terms]
        self._cuts = list(dict.fromkeys(cuts + self._whole))

    def operations(self) -> int:
        """Of all first parts, and of the second part."""
        program, cut = (
            self._program,
            [leaf for leaf, t in zip(self._program.leaves, self._terms, strict=True) if t],
        )
        second = program.operations(cut + self._cuts, False) - program.operations(self._cuts, False)
        return program.operations(self._cuts, True) + second

    def run(self) -> list[Leaf]:
        """All leaves, after the first part of the backward pass; those not wanted are zero."""
        rows = self._program.rows(self._cuts)
        known = self._program.known({term.known for terms in self._terms for term in terms})
        return [
            self._leaf(leaf, terms, rows, known)
            for leaf, terms in zip(self._program.leaves, self._terms, strict=True)
        ]

    def _leaf(self, leaf: Any, terms: Sequence[Term], rows: dict[Any, Rows], known: Any) -> Leaf:
        if terms:
            factors = (_factor(self._program, t, leaf, rows[t.cut], known) for t in terms)
            return Factored(tuple(factors), sum((rows[t.cut].tasks for t in terms), ()))
        if any(leaf is kept for kept in self._whole):
            return Whole(rows[leaf].array, rows[leaf].tasks)
        return Whole(jnp.zeros((0, *leaf.aval.shape), leaf.aval.dtype), ())


def _factor(program: Program, term: Term, leaf: Any, rows: Rows, known: dict[Any, Array]) -> Factor:
    axes = [1 + axis for axis in term.cut_rows]
    axes = (0, *axes, *(axis for axis in range(1, rows.array.ndim) if axis not in axes))
    cuts = jnp.transpose(lax.stop_gradient(rows.array), axes)
    other = lax.stop_gradient(known[term.known])
    dtype = np.promote_types(wide(cuts), wide(other) if not term.is_lookup else np.float32)
    if term.is_lookup:
        index = other[..., 0]
        valid = (index >= 0) & (index < leaf.aval.shape[0])
        factor = Lookup(index, valid, dtype, index.ndim)
    else:
        order = (*term.known_rows, *(a for a in range(other.ndim) if a not in term.known_rows))
        factor = Dense(jnp.transpose(other, order).astype(dtype), len(term.known_rows))
    return Factor(rows.array, cuts.astype(dtype), factor, program.path(term.eqns))


def _rest(array: Array) -> tuple[int, ...]:
    return tuple(range(1, array.ndim))


def _norms_of_rows(arrays: Array, num_rows: int) -> Array:
    """[*, *rows] of arrays [*, *rows, *columns], each scaled by its largest element to be safe."""
    largest = jnp.max(jnp.abs(arrays), axis=_rest(arrays), initial=0)
    largest = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    squares = jnp.square(arrays * each_task(1 / largest, arrays))
    norms = jnp.sqrt(jnp.sum(squares, axis=tuple(range(1 + num_rows, arrays.ndim))))
    return norms * each_task(largest, norms)


def _dot(one: Array, other: Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return lax.dot_general(one, other, (axes, ((), ())), precision=lax.Precision.HIGHEST)


def _sharded_by_rows(array: Array, num_rows: int) -> Array:
    """On a mesh of Explicit axes, sharded along its first axes alone."""
    return placed(array, lambda spec: spec[:num_rows])


def _rows_together(array: Array, num_rows: int) -> Array:
    """On a mesh of Explicit axes, sharded along all but its first axes."""
    return placed(array, lambda spec: (*[None] * num_rows, *spec[num_rows:]))


def _placed_like(other: Array, array: Array) -> Array:
    return placed(array, lambda _: tuple(jax.typeof(other).sharding.spec))
