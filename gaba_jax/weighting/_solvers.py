"""The small dense equations behind the Gramian rules, solved in the metric of the cosines.

The matrix is that of the cosines (diagonal 1): rows that differ by any factor then lose no digits.

Jitted here, or every call outside of jit would compile its loops anew.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

_DEPENDENT = 3e-6  # a pivot below it is rounding: the cosines are float32
_OPTIMAL = 1e-6
_RIDGE = 1e-6  # keeps what opposed tasks send to infinity finite
_NEWTON_STEPS = 40
_JACOBI_SWEEPS = 12


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
