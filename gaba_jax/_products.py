"""A leaf of many slices, kept as the two factors of each slice's gradient."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from gaba_jax._checks import each_task
from gaba_jax._cut import (
    Dense,
    Lookup,
    Term,
    find_terms,
    in_doubt,
    measured_again,
)
from gaba_jax._meshes import is_explicit, replicated
from gaba_jax._program import Program
from gaba_jax._statistics import Look, as_cosines, norms_of, sum_over_parts, wide

_HIGHEST = lax.Precision.HIGHEST
# Squares of smaller norms lose digits at the end of float32's range: they are taken once more.
_SMALLEST = 1e-15


class Form(NamedTuple):
    """How the gradient of one slice on one leaf is ``sum over rows of known x cut``.

    Attributes:
      terms: the products whose rows are put one after the other; none of them is a lookup, or all.
      num_rows: the number of axes that are rows.
      table: of a lookup, the number of rows that the leaf has.
      after: from the product to the leaf.
    """

    terms: tuple[Term, ...]
    num_rows: int
    table: int | None
    after: Callable[[Array], Array]

    def sides(self, values: Mapping[Any, Array]) -> tuple[Array, Array]:
        """[*rows, *depth] of what is known, or indices [*rows]; and [*rows, *columns]."""
        known, cut = [], []
        for term in self.terms:
            other = values[term.known]
            other = other[..., 0] if self.table else _rows_first(other, term.known_rows)
            known.append(other)
            cut.append(_rows_first(values[term.cut], term.cut_rows))
        if len(self.terms) == 1:
            return known[0], cut[0]
        n = len(self.terms[0].cut_rows)
        joined = [
            jnp.concatenate([jnp.reshape(part, (-1, *part.shape[n:])) for part in parts])
            for parts in (known, cut)
        ]
        return joined[0], joined[1]

    def product(self, known: Array, cut: Array) -> Array:
        """The sum of the gradients of slices, [*param.shape] from [slices, ...]."""
        eqn = self.terms[0].eqns[0]
        if self.table is not None:
            zeros = jnp.zeros((self.table, *cut.shape[known.ndim :]), cut.dtype)
            # An index past the end is dropped; a negative one would count from there.
            known = jnp.where(known < 0, self.table, known)
            return self.after(zeros.at[known].add(cut, mode="drop"))
        n = 1 + self.num_rows
        if not is_explicit():
            # XLA transposes what is contracted along several axes.
            known, cut = (jnp.reshape(side, (-1, *side.shape[n:])) for side in (known, cut))
            n = 1
        rows = tuple(range(n))
        sides = (cut, known) if eqn.invars[0] is self.terms[0].cut else (known, cut)
        numbers = {"dimension_numbers": ((rows, rows), ((), ()))}
        return self.after(eqn.primitive.bind(*sides, **(eqn.params | numbers)))


def form_of(program: Program, leaf: Any, with_cosines: bool) -> Form | None:
    """How a leaf of one slice is made of factors, where they are the cheaper thing to keep.

    Without cosines that is the smaller one. With them the gradients are needed twice, in blocks and
    in the sum, if they are not kept: then they may have up to twice the size.
    """
    terms = find_terms(program, leaf, lambda add: True)
    if not terms:
        return None
    first = terms[0]
    table = first.eqns[0].outvars[0].aval.shape[0] if first.is_lookup else None  # pyright: ignore
    depth = 1 if table else leaf.aval.size // max(first.columns(), 1)
    factors = sum(term.rows() for term in terms) * (depth + first.columns())
    if factors * (2 if with_cosines else 1) >= leaf.aval.size:
        return None
    num_rows = len(first.cut_rows) if len(terms) == 1 else 1
    return Form(terms, num_rows, table, program.path(first.eqns[1:]))


def _rows_first(array: Array, rows: Sequence[int]) -> Array:
    return jnp.transpose(array, (*rows, *(a for a in range(array.ndim) if a not in rows)))


class Products(NamedTuple):
    r"""The gradients of tasks on a leaf, :math:`A_i^\top D_i` of each slice i, kept as factors.

    .. math:: \langle A_i^\top D_i, A_j^\top D_j \rangle
        = \sum_{pq} (A_i A_j^\top)_{pq} (D_i D_j^\top)_{pq}

    Attributes:
      known: [N, *rows, *depth], :math:`A`; of a lookup the indices [N, *rows].
      cut: [N, *rows, *columns], :math:`D`.
      form: what the two are.
      slices: the tasks of the slices.
    """

    known: Array
    cut: Array
    form: Form
    slices: Any

    @property
    def tasks(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(range(self.slices.num_tasks))

    @property
    def of_one(self) -> jax.ShapeDtypeStruct:
        """The gradient of one task."""
        return jax.eval_shape(self.form.product, self.known, self.cut)

    def look(self, with_cosines: bool) -> Look:
        """Norms (and cosines) from the factors, or from the gradients where those are cheaper."""
        alone, pair = self.slices.ids is None, self._pair()
        if alone and not with_cosines:
            gram, (squares, most) = None, jax.vmap(_Pair.square_and_most)(pair)
        else:
            if not alone and not with_cosines and self._cost_of_each() < self._cost_of_rows():
                norms = self.each(lambda one: norms_of([one])[0])
                return Look(norms, None, jnp.zeros(norms.shape, bool))
            others = jax.tree.map(replicated, pair)
            in_blocks = self.form.table is None and not is_explicit()
            if in_blocks and self._cost_of_blocks() < self._cost_of_rows():
                gram = self._from_blocks(others)
            else:
                gram = jax.vmap(lambda one: jax.vmap(one.times)(others))(pair)
            most = jax.vmap(_Pair.square_and_most)(pair)[1]
            gram, most = self.slices.of_pairs(replicated(gram), replicated(most))
            squares = jnp.diagonal(gram)
        root = jnp.sqrt(jnp.maximum(squares, 0))  # rounding may go below
        cosines = None
        if with_cosines and gram is not None:
            divisor = jnp.where(root > 0, root, 1)
            cosines = as_cosines(gram / divisor[:, None] / divisor[None])
        doubt = in_doubt(root, most) | ((root < _SMALLEST) & (most > 0))
        return Look(root.astype(jnp.float32), cosines, doubt)

    def look_again(self, look: Look) -> Look:
        """Norms (and cosines) from the gradients themselves, one at a time."""
        return measured_again(self, look)

    def each(self, measured: Callable[[Array], Any]) -> Any:
        """From one gradient at a time, formed and dropped."""
        known, cut = lax.stop_gradient((self.known, self.cut))
        if self.slices.ids is None:
            return lax.map(
                lambda pair: measured(self.form.product(pair[0][None], pair[1][None])), (known, cut)
            )
        alone = self._replace(known=known, cut=cut)
        one_hot = jnp.eye(self.slices.num_tasks, dtype=bool)
        return lax.map(lambda one: measured(alone.combine(one.astype(jnp.float32), one)), one_hot)

    def cosines(self, norms: Array) -> Array:
        """They come with the look."""
        raise AssertionError("look(with_cosines=True) brings them")

    def combine(self, factors: Array, usable: Array | None) -> Array:
        """One product, of factors whose rows are weighted."""
        known, cut = self.known, self.cut
        factors, usable = self.slices.factors(factors), self.slices.usable(usable)
        is_dense = self.form.table is None
        if usable is not None:
            # Zero times what is no number would be none either.
            cut = jnp.where(each_task(usable, cut), cut, 0)
            known = jnp.where(each_task(usable, known), known, 0) if is_dense else known
        if is_dense and known.size < cut.size:
            known = _weighted(known, factors)
        else:
            cut = _weighted(cut, factors)
        return self.form.product(known, cut)

    def _pair(self) -> "_Pair":
        """Both factors as constants, in float32 at least."""
        known, cut = lax.stop_gradient((self.known, self.cut))
        n, cut = self.form.num_rows, cut.astype(wide(cut))
        if (table := self.form.table) is not None:
            rows = Lookup(known, (known >= 0) & (known < table), cut.dtype, n)
            return _Pair(rows, Dense(cut, n))
        dtype = jnp.promote_types(known.dtype, cut.dtype)
        return _Pair(Dense(known.astype(dtype), n), Dense(cut.astype(dtype), n))

    def _sizes(self) -> tuple[int, int, int]:
        """All rows, the depth and the columns."""
        rows = math.prod(self.cut.shape[: 1 + self.form.num_rows])
        columns = self.cut.size // max(rows, 1)
        depth = 1 if self.form.table else self.known.size // max(rows, 1)
        return rows, depth, columns

    def _cost_of_rows(self) -> int:
        """Multiplications of inner products between all rows."""
        rows, depth, columns = self._sizes()
        return rows**2 * (depth + columns)

    def _cost_of_each(self) -> int:
        """The same of the gradient of one task after the other."""
        return math.prod(self._sizes()) * self.slices.num_tasks

    def _cost_of_blocks(self) -> int:
        """The same of the gradients of all slices, and of their inner products."""
        # Twice: many small products take about twice the time of a few large ones.
        return 2 * (math.prod(self._sizes()) + self.slices.number**2 * self.of_one.size)

    def _from_blocks(self, pair: "_Pair") -> Array:
        """The inner products of all slices, [N, N], from their gradients, some of it at a time."""
        known, cut, n = pair.known.array, pair.cut.array, self.form.num_rows
        rows, axis = tuple(range(1, 1 + n)), 1 + n

        def of_block(known: Array) -> Array:
            part = lax.dot_general(known, cut, ((rows, rows), ((0,), (0,))), precision=_HIGHEST)
            axes = tuple(range(1, part.ndim))
            return lax.dot_general(part, part, ((axes, axes), ((), ())), precision=_HIGHEST)

        # As large as both factors together.
        most = known.size * (known.size + cut.size) // (len(cut) * self.of_one.size)
        return sum_over_parts(of_block, known, axis, most)


class _Pair(NamedTuple):
    """The factors of one slice, or of each with an axis in front."""

    known: Any  # Dense or Lookup
    cut: Dense

    def products(self, other: "_Pair") -> Array:
        """Those of the gradients of single rows, [*rows, *rows of the other]."""
        return self.known.overlap(other.known) * self.cut.overlap(other.cut)

    def times(self, other: "_Pair") -> Array:
        """The inner product of two slices' gradients."""
        return jnp.sum(self.products(other))

    def square_and_most(self) -> tuple[Array, Array]:
        """The squared norm of the gradient, and the sum of the norms of its rows' gradients."""
        products = self.products(self)
        n = products.ndim // 2
        places = [lax.broadcasted_iota(jnp.int32, products.shape, i) for i in range(products.ndim)]
        own = jnp.ones(products.shape, bool)
        for one, other in zip(places[:n], places[n:], strict=True):
            own &= one == other
        return jnp.sum(products), jnp.sum(jnp.where(own, jnp.sqrt(jnp.maximum(products, 0)), 0))


def _weighted(factor: Array, weights: Array) -> Array:
    accurate = factor.astype(wide(factor))
    return (accurate * each_task(weights, factor).astype(accurate.dtype)).astype(factor.dtype)
