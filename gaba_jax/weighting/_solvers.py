"""The small dense problems behind the Gramian rules, solved in the metric of the cosines.

Every rule scales its problem so that the matrix is that of the cosines (diagonal 1): rows that
differ by any factor then lose no digits, and no regularisation is needed that would let the small
task be opposed. ``optax.nnls``, a projected gradient as ``optax.projections`` would make one, needs
thousands of steps where rows nearly oppose each other; the interior points of ``qpax`` are as exact
as what is here, but for such rows, where float32 cannot hold the matrix that they factorise: 2e-2
from the solution with eight rows within 1e-2 of a line, 2e-4 here. The active-set method below
ends after about as many pivots as there are tasks, and copes with singular matrices.

Jitted here, or every call outside of jit would compile its loops anew.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_DEPENDENT = 3e-6  # a pivot below it is rounding: the cosines are float32
_OPTIMAL = 1e-6
_POLISH_SWEEPS = 2
_RIDGE = 1e-6  # keeps what opposed tasks send to infinity finite
_NEWTON_STEPS = 40
_JACOBI_SWEEPS = 12


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
    the pivots. A must be positive semidefinite with a diagonal of at least 1; it may be singular.

    Args:
      matrix: A.
      linear: b, in the range of A or such that the problem is bounded.

    Returns:
      (z, residual): the residual is :math:`\max_i |\min(z_i, (A z - b)_i)|` over the larger of 1
      and :math:`\max_i z_i`.
    """
    size = matrix.shape[0]
    index = jnp.arange(size)

    def pivot(state: _Pivoting, at: Int[Array, ""]) -> _Pivoting:
        """Exchanges w and z at one index."""
        here = index == at
        row, column = state.tableau[at], state.tableau[:, at]
        divisor = row[at]
        row, value = -row / divisor, -state.values[at] / divisor
        tableau = state.tableau + jnp.where(here, 0, column)[:, None] * row
        tableau = jnp.where(here[:, None], row, tableau)
        tableau = jnp.where(here, jnp.where(here, 1, column)[:, None] / divisor, tableau)
        values = jnp.where(here, value, state.values + column * value)
        return state._replace(tableau=tableau, values=values, free=state.free ^ here)

    def step(state: _Pivoting) -> _Pivoting:
        target = jnp.where(state.free, state.values, 0)
        forced = state.entering >= 0
        feasible = jnp.all(target >= 0) & ~forced
        point = jnp.where(feasible, target, state.point)
        tolerance = _OPTIMAL * jnp.maximum(1, jnp.max(point))
        # What would enter: the steepest descent among the variables at 0.
        steepest = jnp.argmin(jnp.where(state.free, jnp.inf, state.values))
        steepest = jnp.where(forced, state.entering, steepest)
        optimal = feasible & (state.values[steepest] >= -tolerance)
        enters = feasible | forced
        dependent = enters & (state.tableau[steepest, steepest] <= _DEPENDENT)
        # Towards the target, or without end along a direction of no curvature, until one is at 0.
        direction = jnp.where(
            dependent, jnp.where(state.free, state.tableau[:, steepest], 0), target - point
        )
        falling = state.free & (direction < 0)
        room = jnp.where(falling, point / jnp.where(falling, -direction, 1), jnp.inf)
        blocking = jnp.argmin(room)
        length = jnp.min(room)
        unbounded = dependent & ~jnp.isfinite(length)
        moves = (dependent | ~enters) & ~optimal & ~unbounded
        moved = jnp.maximum(point + jnp.where(moves, length, 0) * direction, 0)
        moved = jnp.where(moves & (index == blocking), 0, moved)
        moved = jnp.where(moves & dependent & (index == steepest), point + length, moved)
        at = jnp.where(moves, blocking, steepest)
        # After the last iteration only the point is read.
        return pivot(state, at)._replace(
            point=moved,
            entering=jnp.where(moves & dependent, steepest, -1),
            steps=state.steps + 1,
            done=optimal | unbounded,
        )

    def unfinished(state: _Pivoting) -> Bool[Array, ""]:
        return ~state.done & (state.steps < 4 * size + 8)

    zeros = jnp.zeros_like(linear)
    start = _Pivoting(
        tableau=matrix,
        values=-linear,
        free=jnp.zeros([size], bool),
        point=zeros,
        entering=jnp.array(-1),
        steps=jnp.array(0),
        done=jnp.array(False),
    )
    point = lax.while_loop(unfinished, step, start).point
    diagonal = jnp.diagonal(matrix)

    def descend(i: Array, point: Array) -> Array:
        at = i % size
        change = (linear[at] - matrix[at] @ point) / diagonal[at]
        return point.at[at].set(jnp.maximum(point[at] + change, 0))

    point = lax.fori_loop(0, _POLISH_SWEEPS * size, descend, point)
    residual = jnp.max(jnp.abs(jnp.minimum(point, matrix @ point - linear)))
    return point, residual / jnp.maximum(1, jnp.max(point))


@jax.jit
def power_equation(
    matrix: Float[Array, "K K"], factors: Float[Array, " K"], alpha: float | Array
) -> tuple[Float[Array, " K"], Float[Array, ""]]:
    r"""Solves :math:`C v = s \, v^{-1/\alpha}` for :math:`v > 0`.

    Damped Newton steps in relative changes of v, each at least half of what a full step promises:
    the equation is the stationarity of a convex function. Where 0 is a convex combination of the
    rows there is no solution; a ridge of 1e-6 then keeps v finite.

    Args:
      matrix: C, positive semidefinite, diagonal 1.
      factors: s > 0.
      alpha: the exponent, > 0.

    Returns:
      (v, residual): the residual is the largest relative error of an equation, without the ridge.
    """
    inverse = 1 / jnp.asarray(alpha, jnp.float32)
    ridged = matrix + _RIDGE * jnp.eye(matrix.shape[0], dtype=matrix.dtype)

    def errors(matrix: Array, v: Array) -> tuple[Array, Array]:
        wanted = factors * v ** (1 - inverse)
        return v * (matrix @ v) - wanted, wanted

    def unfinished(state: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        _, error, steps = state
        return (error > _OPTIMAL) & (steps < _NEWTON_STEPS)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        v, _, steps = state
        error, wanted = errors(ridged, v)
        curvature = v[:, None] * ridged * v + jnp.diag(wanted * inverse)
        change = -_solve(curvature, error)
        length = 1 / (1 + jnp.maximum(1, inverse) * jnp.max(jnp.abs(change)))
        v = v * (1 + length * change)
        return v, jnp.max(jnp.abs(change)), steps + 1

    start = factors ** (1 / (1 + inverse))
    v, _, _ = lax.while_loop(unfinished, step, (start, jnp.float32(jnp.inf), jnp.array(0)))
    error, wanted = errors(matrix, v)
    return v, jnp.max(jnp.abs(error) / wanted)


@jax.jit
def ridge_solution(matrix: Float[Array, "K K"], right: Float[Array, " K"]) -> Float[Array, " K"]:
    """Solves (C + 1e-6) v = b for a positive semidefinite C of diagonal 1."""
    return _solve(matrix + _RIDGE * jnp.eye(matrix.shape[0], dtype=matrix.dtype), right)


def _solve(matrix: Float[Array, "K K"], right: Float[Array, " K"]) -> Float[Array, " K"]:
    """Gauss-Jordan elimination without exchanges, for positive definite matrices."""
    size = matrix.shape[0]

    def eliminate(at: Array, table: Array) -> Array:
        row = table[at] / table[at, at]
        table = table - jnp.where(jnp.arange(size) == at, 0, table[:, at])[:, None] * row
        return table.at[at].set(row)

    return lax.fori_loop(0, size, eliminate, jnp.column_stack([matrix, right]))[:, -1]


@jax.jit
def eigen(matrix: Float[Array, "K K"]) -> tuple[Float[Array, " K"], Float[Array, "K K"]]:
    """Eigenvalues, in no order, and eigenvectors (columns) by Jacobi's rotations.

    A step rotates K/2 disjoint pairs. For matrices D C D with D diagonal and C well conditioned
    the smallest eigenvalue has as many digits as the largest, however graded D is; a
    tridiagonalising solver knows it to the rounding of the largest only.

    Args:
      matrix: symmetric, positive semidefinite.
    """
    size = matrix.shape[0]
    half = (size + 1) // 2
    padded = jnp.zeros([2 * half, 2 * half], jnp.float32).at[:size, :size].set(matrix)
    # Round robin: i meets i + half, then all but the first move on by one seat.
    seats = np.arange(2 * half)
    ring = np.concatenate([seats[1:half], seats[half:][::-1]])
    turn = np.concatenate([seats[:1], np.empty(2 * half - 1, int)])
    turn[ring] = np.roll(ring, 1)
    top, bottom = np.arange(half), np.arange(half, 2 * half)

    def rotate(columns: Array, cosine: Array, sine: Array) -> Array:
        first, second = columns[:, :half], columns[:, half:]
        return jnp.concatenate(
            [first * cosine - second * sine, first * sine + second * cosine], axis=1
        )

    def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        table, vectors = state
        first, second, between = table[top, top], table[bottom, bottom], table[top, bottom]
        turns = between != 0
        ratio = (second - first) / jnp.where(turns, 2 * between, 1)
        tangent = jnp.where(ratio < 0, -1, 1) / (jnp.abs(ratio) + jnp.sqrt(1 + ratio * ratio))
        tangent = jnp.where(turns, tangent, 0)
        cosine = 1 / jnp.sqrt(1 + tangent * tangent)
        sine = tangent * cosine
        table = rotate(rotate(table, cosine, sine).T, cosine, sine)
        table = table.at[top, top].set(first - tangent * between)
        table = table.at[bottom, bottom].set(second + tangent * between)
        table = table.at[top, bottom].set(0).at[bottom, top].set(0)
        return table[turn][:, turn], rotate(vectors, cosine, sine)[:, turn]

    def unfinished(state: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        table, _, sweeps = state
        diagonal = jnp.sqrt(jnp.diagonal(table))
        off = jnp.abs(jnp.where(jnp.eye(2 * half, dtype=bool), 0, table))
        return jnp.any(off > 1e-7 * diagonal[:, None] * diagonal) & (sweeps < _JACOBI_SWEEPS)

    def sweep(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        table, vectors, sweeps = state
        table, vectors = lax.fori_loop(0, 2 * half - 1, step, (table, vectors))
        return table, vectors, sweeps + 1

    start = (padded, jnp.eye(2 * half, dtype=jnp.float32), jnp.array(0))
    table, vectors, _ = lax.while_loop(unfinished, sweep, start)
    # The seat of the padding, if there is one, is the column that is zero above it.
    values, vectors = jnp.diagonal(table), vectors[:size]
    order = jnp.argsort(~jnp.any(vectors != 0, axis=0))
    return jnp.maximum(values[order][:size], 0), vectors[:, order][:, :size]


def significant(
    values: Float[Array, " K"], vectors: Float[Array, "K K"], diagonal: Float[Array, " K"]
) -> Bool[Array, " K"]:
    """The eigenvalues that are more than rounding, beside the diagonal where their vector lies."""
    expected = diagonal @ (vectors * vectors)
    return values > _DEPENDENT * vectors.shape[0] * expected


def minimum_norm_solution(
    matrix: Float[Array, "K K"], right: Float[Array, " K"]
) -> Float[Array, " K"]:
    """The pseudo-inverse of a positive semidefinite matrix of diagonal 1, times a vector."""
    values, vectors = eigen(matrix)
    kept = significant(values, vectors, jnp.ones_like(values))
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return vectors @ (inverse * (right @ vectors))
