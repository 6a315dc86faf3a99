"""The small dense equations behind the Gramian rules, solved in the metric of the cosines.

The matrix is that of the cosines (diagonal 1): rows that differ by any factor then lose no digits.

Jitted here, or every call outside of jit would compile its loops anew.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

_DEPENDENT = 3e-6  # a pivot below it is rounding: the cosines are float32
_OPTIMAL = 1e-6
_RIDGE = 1e-6  # keeps what opposed tasks send to infinity finite
_NEWTON_STEPS = 40
_JACOBI_SWEEPS = 12
_ORTHOGONAL = 3e-4  # before the last sweep, after which it is the square of it
_ROUNDING = 3e-7  # a pivot of Cholesky, relative to what it was


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
    """Eigenvalues, in no order, and eigenvectors (columns; 0 where the eigenvalue is 0).

    Jacobi's rotations turn the rows of a pivoted Cholesky factor L' until they are orthogonal
    (Veselić and Hari 1989): their lengths are the roots of the eigenvalues of L L'. For matrices
    D C D with D diagonal and C well conditioned the smallest eigenvalue has as many digits as the
    largest, however graded D is; a tridiagonalising solver knows it to the rounding of the largest.

    The K/2 disjoint pairs of a step are neighbours that then change places, at even places and at
    odd ones in turn, so that all pairs have met after K steps.

    Args:
      matrix: symmetric, positive semidefinite.
    """
    size = matrix.shape[0]
    half = (size + 1) // 2
    rows = jnp.pad(_cholesky(matrix), ((0, 2 * half - size), (0, 0)))
    last = jnp.arange(half) == half - 1  # has no neighbour at the odd places

    def step(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        even, odd, worst = state
        even, odd, cosine = _orthogonal(even, odd, False)
        worst = jnp.maximum(worst, cosine)
        odd, even, cosine = _orthogonal(odd, jnp.roll(even, -1, axis=0), last)
        return jnp.roll(even, 1, axis=0), odd, jnp.maximum(worst, cosine)

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Bool[Array, ""]:
        return (state[2] > _ORTHOGONAL) & (state[3] < _JACOBI_SWEEPS)

    def sweep(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        even, odd, _, sweeps = state
        return *lax.fori_loop(0, half, step, (even, odd, jnp.float32(0))), sweeps + 1

    start = (rows[0::2], rows[1::2], jnp.float32(1), jnp.array(0))
    even, odd, *_ = lax.while_loop(unfinished, sweep, start)
    rows = jnp.concatenate([even, odd])
    values = jnp.sum(rows * rows, axis=1)
    values, places = lax.top_k(values, size)  # what was added for an odd size has 0
    lengths = jnp.sqrt(jnp.where(values > 0, values, 1))
    return values, (rows[places] / lengths[:, None]).T


def _cholesky(matrix: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """L' with L L' the matrix, the largest pivots first; rows of 0 where a pivot is rounding."""
    least = _ROUNDING * jnp.diagonal(matrix)

    def step(k: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rest, rows, left = state
        pivots = jnp.where(left & (jnp.diagonal(rest) > least), jnp.diagonal(rest), 0)
        at = jnp.argmax(pivots)
        row = rest[at] / jnp.sqrt(jnp.where(pivots[at] > 0, pivots[at], jnp.inf))
        row = jnp.where(left, row, 0)
        return rest - row[:, None] * row, rows.at[k].set(row), left.at[at].set(False)

    start = (matrix, jnp.zeros_like(matrix), jnp.ones(len(matrix), bool))
    return lax.fori_loop(0, len(matrix), step, start)[1]


def _orthogonal(
    first: Float[Array, "n K"], second: Float[Array, "n K"], kept: Array | bool
) -> tuple[Float[Array, "n K"], Float[Array, "n K"], Float[Array, ""]]:
    """Pairs of rows turned in their plane to be orthogonal, and exchanged unless ``kept`` as is.

    Also the largest cosine in a pair that there was.
    """
    squares, others = jnp.sum(first * first, axis=1), jnp.sum(second * second, axis=1)
    between = jnp.sum(first * second, axis=1)
    turns = (between != 0) & ~jnp.asarray(kept)
    ratio = (others - squares) / jnp.where(turns, 2 * between, 1)
    tangent = jnp.where(ratio < 0, -1, 1) / (jnp.abs(ratio) + jnp.sqrt(1 + ratio * ratio))
    tangent = jnp.where(turns, tangent, 0)
    cosine = 1 / jnp.sqrt(1 + tangent * tangent)
    sine = tangent * cosine
    stay, cross = jnp.where(kept, 1, sine)[:, None], jnp.where(kept, 0, cosine)[:, None]
    lengths = jnp.sqrt(squares) * jnp.sqrt(others)
    worst = jnp.abs(between) / jnp.where(turns & (lengths > 0), lengths, jnp.inf)
    turned = first * stay + second * cross
    other = first * cross + second * jnp.where(jnp.asarray(kept)[..., None], stay, -stay)
    return turned, other, jnp.max(worst)


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
