"""Quadratic programs over z >= 0 in the metric of the cosines: the projections of the rules.

Every rule scales its problem so that the matrix is that of the cosines (diagonal 1): rows that
differ by any factor then lose no digits. A ridge bounds the projections where float32 does not tell
whether the rows depend on each other; it is taken off again, so no small task is opposed for it.
``optax.nnls``, a projected gradient as ``optax.projections`` would make one, needs thousands of
steps where rows nearly oppose each other; the interior points of ``qpax`` are as exact as what is
here, but for such rows, where float32 cannot hold the matrix that they factorise: 2e-2 from the
solution with eight rows within 1e-2 of a line, 2e-4 here. The active-set method below ends after
about as many pivots as there are tasks, and copes with singular matrices.

Jitted here, or every call outside of jit would compile its loops anew.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_RIDGE = 3e-6  # of the projections, so that no pivot of theirs is rounding
_DEPENDENT = 3e-6  # without a ridge a pivot below it is rounding: the cosines are float32
_ROUNDED = 2e-7  # an error of the optimality conditions, relative to the largest variable
_PROXIMAL_STEPS = 4
_POLISH_SWEEPS = 2
_FEW = 32  # variables, for which pivots are as fast as products of matrices
_LOOKS, _STEPS_A_LOOK = 25, 5
_CACHED = 2**20  # numbers of the tableaus that are worked on together


class _Pivoting(NamedTuple):
    """``w = matrix z - linear`` with some of ``w_i`` and ``z_i`` exchanged.

    ``values`` are the solved-for variables where the others are 0: ``z_i`` where ``free``, the
    gradient ``w_i`` elsewhere. ``point`` is feasible, and no iteration raises its objective.
    """

    tableau: Float[Array, "K K"]
    values: Float[Array, " K"]
    free: Bool[Array, " K"]
    point: Float[Array, " K"]
    entering: Int[Array, ""]  # to be freed once its pivot is more than rounding; -1 for none
    steps: Int[Array, ""]
    done: Bool[Array, ""]


@jax.jit
def nonnegative_qp(
    matrix: Float[Array, "K K"], linear: Float[Array, " K"]
) -> tuple[Float[Array, " K"], Float[Array, ""]]:
    r"""Minimises :math:`\frac12 z^\top A z - b^\top z` over :math:`z \ge 0`.

    Lawson and Hanson's active-set method on a tableau of principal pivots, one an iteration, and
    then a few sweeps of coordinate descent on the matrix as given, which take off the rounding of
    the pivots.

    Args:
      matrix: A, positive semidefinite with a diagonal of at least 1; it may be singular.
      linear: b, in the range of A or such that the problem is bounded.

    Returns:
      (z, residual): the residual is :math:`\max_i |\min(z_i, (A z - b)_i)|`.
    """
    point = _pivoted(_start(matrix, linear), singular=True).point
    point = _polished(matrix, linear, point)
    return point, _kkt_error(matrix, linear, point)


@jax.jit
def bounded_qp(
    matrix: Float[Array, "K K"],
    linear: Float[Array, " K"],
    tried: Float[Array, " K"] | None = None,
) -> tuple[Float[Array, " K"], Float[Array, ""]]:
    r"""The same with a z that stays short where float32 does not tell whether A is singular.

    A few proximal steps (Rockafellar 1976), each solved with the pivots of :math:`A + \epsilon`,

    .. math:: z' = \arg\min_{y \ge 0} \frac12 y^\top A y - b^\top y
        + \frac\epsilon2 \|y - z\|^2, \qquad \epsilon = 3 \cdot 10^{-6}

    from z = 0, so :math:`\|z'\| \le \|b\| / \epsilon^{1/2}` for b in the range of A. A step begins
    with the tableau of the last one and the error against A as given, which also takes off the
    rounding of the pivots. What A does determine is found in two or three steps.

    Args:
      matrix: A.
      linear: b.
      tried: is returned if it is solved already.

    Returns:
      (z, residual), as above.
    """

    def inexact(point: Array) -> Bool[Array, ""]:
        tolerance = _ROUNDED * jnp.maximum(1, jnp.max(point))
        return _kkt_error(matrix, linear, point) > tolerance

    def unsolved(carry: tuple[_Pivoting, Array]) -> Bool[Array, ""]:
        return inexact(carry[0].point) & (carry[1] < _PROXIMAL_STEPS)

    def proximal(carry: tuple[_Pivoting, Array]) -> tuple[_Pivoting, Array]:
        state, steps = carry
        error = linear - _product(matrix, state.point)
        change = _product(state.tableau, jnp.where(state.free, error, 0))
        values = jnp.where(state.free, state.point, -error) + change
        state = state._replace(values=values, done=jnp.array(False))
        return _pivoted(state, singular=False), steps + 1

    state = _start(matrix + _RIDGE * jnp.eye(len(linear), dtype=matrix.dtype), linear)
    if tried is not None:
        state = state._replace(point=jnp.where(inexact(tried), 0, tried))
    point = lax.while_loop(unsolved, proximal, (state, jnp.array(0)))[0].point
    return point, _kkt_error(matrix, linear, point)


@jax.jit
def bounded_qps(
    matrix: Float[Array, "K K"], linear: Float[Array, "n K"]
) -> tuple[Float[Array, "n K"], Float[Array, " n"]]:
    """:func:`bounded_qp` for n linear terms.

    Large ones are first tried all at once, by products of matrices. The pivots of those that this
    left unsolved are then made for as many at a time as have tableaus that fit the cache.
    """
    number, size = linear.shape
    tried = _by_products(matrix, linear) if size > _FEW else jnp.zeros_like(linear)
    solve = jax.vmap(lambda b, z: bounded_qp(matrix, b, z))
    group = min(number, max(1, _CACHED // size**2))
    if group == number:
        return solve(linear, tried)
    groups = (
        jnp.pad(x, ((0, -number % group), (0, 0))).reshape(-1, group, size) for x in (linear, tried)
    )
    points, residuals = lax.map(lambda each: solve(*each), tuple(groups))
    return points.reshape(-1, size)[:number], residuals.reshape(-1)[:number]


def _by_products(matrix: Float[Array, "K K"], linear: Float[Array, "n K"]) -> Float[Array, "n K"]:
    """A primal-dual active set method (Hintermüller, Ito and Kunisch 2002), n problems at once.

    The variables with :math:`z_i > (A z - b)_i` are the free ones, for which a few steps of
    conjugate gradients are taken before the next look. It ends where all problems are solved, as
    they are after five looks if A is well conditioned, or after ``_LOOKS``, solved or not.
    """

    def descend(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        points, error, step, free = state
        size = jnp.sum(error * error, axis=1, keepdims=True)
        image = _product(step, matrix)
        curvature = jnp.sum(step * image, axis=1, keepdims=True)
        length = size / jnp.where(curvature > 0, curvature, jnp.inf)
        points, error = points + length * step, error - jnp.where(free, length * image, 0)
        grown = jnp.sum(error * error, axis=1, keepdims=True) / jnp.where(size > 0, size, jnp.inf)
        return points, error, error + grown * step, free

    def look(state: tuple[Array, ...]) -> tuple[Array, ...]:
        points, gradients, looks = state
        free = points > gradients
        points = jnp.where(free, points, 0)
        error = jnp.where(free, linear - _product(points, matrix), 0)
        points, *_ = lax.fori_loop(0, _STEPS_A_LOOK, descend, (points, error, error, free))
        return points, _product(points, matrix) - linear, looks + 1

    def unfinished(state: tuple[Array, ...]) -> Bool[Array, ""]:
        points, gradients, looks = state
        error = jnp.max(jnp.abs(jnp.minimum(points, gradients)), axis=1)
        tolerance = _ROUNDED * jnp.maximum(1, jnp.max(points, axis=1))
        return jnp.any(error > tolerance) & (looks < _LOOKS)

    start = (jnp.zeros_like(linear), -linear, jnp.array(0))
    return jnp.maximum(lax.while_loop(unfinished, look, start)[0], 0)


def _polished(matrix: Array, linear: Array, point: Array) -> Array:
    """Sweeps of coordinate descent, which take off the rounding of the pivots."""
    size, diagonal = len(point), jnp.diagonal(matrix)

    def descend(i: Array, point: Array) -> Array:
        at = i % size
        change = (linear[at] - matrix[at] @ point) / diagonal[at]
        return point.at[at].set(jnp.maximum(point[at] + change, 0))

    return lax.fori_loop(0, _POLISH_SWEEPS * size, descend, point)


def _start(matrix: Array, linear: Array) -> _Pivoting:
    return _Pivoting(
        tableau=matrix,
        values=-linear,
        free=jnp.zeros(linear.shape, bool),
        point=jnp.zeros_like(linear),
        entering=jnp.array(-1),
        steps=jnp.array(0),
        done=jnp.array(False),
    )


def _kkt_error(matrix: Array, linear: Array, point: Array) -> Float[Array, ""]:
    return jnp.max(jnp.abs(jnp.minimum(point, _product(matrix, point) - linear)))


def _product(matrix: Array, vector: Array) -> Array:
    return jnp.matmul(matrix, vector, precision="highest")


def _pivoted(state: _Pivoting, *, singular: bool) -> _Pivoting:
    most = 4 * len(state.point) + 8
    exchange = functools.partial(_exchange, singular=singular)
    return lax.while_loop(lambda state: ~state.done & (state.steps < most), exchange, state)


def _exchange(state: _Pivoting, *, singular: bool) -> _Pivoting:
    """Goes to where the free variables want to be, or to where the first of them becomes 0.

    Then that one is fixed, or the steepest of the fixed ones freed. Where the matrix may be
    ``singular``, one whose pivot is rounding is moved instead, and with it the free ones, without
    end along the direction of no curvature, until one of them is 0.
    """
    free, point, index = state.free, state.point, jnp.arange(len(state.point))
    forced = singular & (state.entering >= 0)
    target = jnp.where(free, state.values, 0)
    feasible = jnp.all(target >= 0) & ~forced
    point = jnp.where(feasible, target, point)
    tolerance = _ROUNDED * jnp.maximum(1, jnp.max(point))
    steepest = jnp.argmin(jnp.where(free, jnp.inf, state.values))
    steepest = jnp.where(forced, state.entering, steepest)
    optimal = feasible & (state.values[steepest] >= -tolerance)
    direction, enters, dependent = target - point, feasible | forced, jnp.array(False)
    if singular:
        dependent = enters & (state.tableau[steepest, steepest] <= _DEPENDENT)
        without_end = jnp.where(free, state.tableau[:, steepest], 0)
        direction = jnp.where(dependent, without_end, direction)
    falling = free & (direction < 0)
    room = jnp.where(falling, point / jnp.where(falling, -direction, 1), jnp.inf)
    blocking, length = jnp.argmin(room), jnp.min(room)
    done = optimal | (dependent & ~jnp.isfinite(length))
    moves = (dependent | ~enters) & ~done
    moved = jnp.maximum(point + jnp.where(moves, length, 0) * direction, 0)
    moved = jnp.where(moves & (index == blocking), 0, moved)
    moved = jnp.where(moves & dependent & (index == steepest), point + length, moved)
    state = _pivot(state, jnp.where(moves, blocking, steepest), ~done)
    return state._replace(
        point=moved,
        entering=jnp.where(moves & dependent, steepest, -1),
        steps=state.steps + 1,
        done=done,
    )


def _pivot(state: _Pivoting, at: Int[Array, ""], wanted: Bool[Array, ""]) -> _Pivoting:
    """Exchanges w and z at one index, if that is ``wanted``."""
    row, here = state.tableau[at], (jnp.arange(len(state.point)) == at) & wanted
    column = jnp.where(state.free == state.free[at], row, -row)
    divisor = jnp.where(wanted, row[at], 1)
    left = jnp.where(here, 1, jnp.where(wanted, column, 0))
    right = jnp.where(here, 1, -row) / divisor
    others = jnp.where(here, 0, 1.0)
    tableau = others[:, None] * others * state.tableau + left[:, None] * right
    value = -state.values[at] / divisor
    values = others * state.values + left * value
    return state._replace(tableau=tableau, values=values, free=state.free ^ here)
