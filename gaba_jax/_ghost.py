"""Norms of matrix gradients from the two factors of each, without the matrix."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import Array, Float

from gaba_jax import _stats

# What a backward pass may do to a finished matrix without changing its norm.
_KEEPS_NORM = frozenset({"copy", "neg", "reshape", "squeeze", "transpose"})


class _Factors(NamedTuple):
    """A leaf ``left^T right``, contracted over n rows: positions of both, and of their rows."""

    left: int
    right: int
    left_rows: tuple[int, ...]
    right_rows: tuple[int, ...]


def sums_of_squares(
    pull_back: Callable[[Array], Any], cotangent: Array, wanted: tuple[bool, ...]
) -> Callable[[Array, Float[Array, " leaves"]], Float[Array, " leaves"]]:
    r"""The sums of squares of ``pull_back(cotangent)`` per leaf, of some without the leaf itself.

    .. math:: \|A^T D\|_F^2 = \langle A A^T, D D^T \rangle

    where the backward pass of a leaf ends in a ``dot_general`` of activations A, [n, rows], and
    cotangents D, [n, columns], over n (the batch, with time where there is one). Taken where
    ``n (rows + columns) < rows columns``; other leaves are summed as they are.

    The n^2 products may cancel where the per-example gradients do: a norm c times smaller than
    theirs together has a relative error of about ``1e-9 c**2`` (``benchmarks.ghost``).

    Args:
      pull_back: ``[K] -> gradients``, the transpose of the linearized losses.
      cotangent: [K], its shape and dtype only.
      wanted: the leaves to measure, in tree order; the others are 0.

    Returns:
      ``(cotangent [K], scale [leaves]) -> sums [leaves]``, see :func:`gaba_jax._stats.safe_norms`.
    """
    closed = jax.make_jaxpr(pull_back)(cotangent)
    made_by = {var: eqn for eqn in closed.jaxpr.eqns for var in eqn.outvars if isinstance(var, Var)}
    outputs: list[Any] = []
    plans: list[_Factors | int | None] = []

    def emit(var: Any) -> int:
        outputs.append(var)
        return len(outputs) - 1

    for leaf, want in zip(closed.jaxpr.outvars, wanted, strict=True):
        product = _final_product(leaf, made_by) if want else None
        if product is None:
            plans.append(emit(leaf) if want else None)
        else:
            (left_rows, right_rows), _ = product.params["dimension_numbers"]
            left, right = map(emit, product.invars)
            plans.append(_Factors(left, right, tuple(left_rows), tuple(right_rows)))
    factored = ClosedJaxpr(closed.jaxpr.replace(outvars=outputs), closed.consts)
    # What does not depend on the cotangent, usually the activations, is squared once for all tasks.
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    known = {
        index: _squared(constants[var], rows)
        for plan in plans
        if isinstance(plan, _Factors)
        for index, rows in ((plan.left, plan.left_rows), (plan.right, plan.right_rows))
        for var in (outputs[index],)
        if isinstance(var, Var) and var in constants
    }

    def sums(cotangent: Array, scale: Array) -> Array:
        values = jaxpr_as_fun(factored)(cotangent)

        def total(plan: _Factors | int | None, scale: Array) -> Array:
            if plan is None:
                return jnp.zeros([], jnp.float32)
            if isinstance(plan, int):
                return _stats.sum_of_squares(values[plan], scale).astype(jnp.float32)
            sides = [(plan.left, plan.left_rows), (plan.right, plan.right_rows)]
            # The scale goes to the side that this pass computes.
            sides.sort(key=lambda side: side[0] not in known)
            (first, first_rows), (second, second_rows) = sides
            unit, size = known.get(first) or _squared(values[first], first_rows)
            wide = values[second].astype(unit.dtype) * (size * scale.astype(unit.dtype))
            products = unit * _outer(wide, second_rows)
            return jnp.maximum(jnp.sum(products), 0).astype(jnp.float32)  # rounding may go below

        return jnp.stack([total(plan, scale[i]) for i, plan in enumerate(plans)])

    return sums


def _final_product(leaf: Any, made_by: dict[Var, JaxprEqn]) -> JaxprEqn | None:
    """The matrix product that a leaf is, where its factors are the cheaper way to its norm."""
    eqn = None if isinstance(leaf, Literal) else made_by.get(leaf)
    while eqn is not None and eqn.primitive.name in _KEEPS_NORM:
        source = eqn.invars[0]
        eqn = None if isinstance(source, Literal) else made_by.get(source)
    if eqn is None or eqn.primitive.name != "dot_general":
        return None
    (contracted, _), (batch, _) = eqn.params["dimension_numbers"]
    factors: list[Any] = [var.aval for var in eqn.invars]
    left, right = factors
    if batch or not all(jnp.issubdtype(side.dtype, jnp.floating) for side in (left, right)):
        return None
    n = math.prod(left.shape[axis] for axis in contracted)
    rows, columns = left.size // max(n, 1), right.size // max(n, 1)
    return eqn if n * (rows + columns) < rows * columns else None


def _squared(factor: Array, rows: tuple[int, ...]) -> tuple[Array, Array]:
    """(``U U^T`` of the factor divided by its largest element, that element)."""
    accurate = _stats.accumulator(factor)
    wide = factor.astype(accurate)
    largest = jnp.max(jnp.abs(wide), initial=0)
    size = jnp.where(largest == 0, 1, largest)
    return _outer(wide / size, rows), size


def _outer(factor: Array, rows: tuple[int, ...]) -> Array:
    """``F F^T``, twice the row axes, with the rows in the order given."""
    factor = jnp.transpose(
        factor, (*rows, *(axis for axis in range(factor.ndim) if axis not in rows))
    )
    columns = tuple(range(len(rows), factor.ndim))
    other = factor
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.explicit_axes:  # rows sharded over an axis cannot meet themselves
        other = jax.sharding.reshard(factor, jax.sharding.PartitionSpec())
    return lax.dot_general(
        factor, other, ((columns, columns), ((), ())), precision=lax.Precision.HIGHEST
    )
