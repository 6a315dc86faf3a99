"""What is measured on the task gradients: norms and cosines, safe from 1e-30 to 1e30."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gaba_jax._contract import each_task

# Slices run faster; past this many the program takes too long to compile.
_MOST_SLICES = 256

# One factor per regime keeps the squares inside float32's range, underflow included.
_USUAL_SCALE = 2.0**37  # norms from 1e-22 to 1e8; a sum of zero is a true zero down to 1e-30
_TINY_SCALE = 2.0**100
_HUGE_SCALE = 2.0**-70
_USUAL_RANGE = (1e-22, 1e8)


class TaskStats(NamedTuple):
    """What a :class:`gaba_jax.weighting.Weighting` sees of K tasks at one update.

    A task that is absent (``present`` is False) has norm 0, cosines 0 and loss 1.

    Attributes:
      norms: [K] float32, L2 norms of the task gradients on the measured parameters.
      cosines: [K, K], cosines between them (diagonal 1; a gradient of norm zero has cosine 0 to
        the others); None unless the weighting needs them.
      losses: [K], the task losses; None unless the weighting needs them.
      present: [K] bool, the tasks that take part in this update.
      elapsed: [] int32, updates since the measurement before this one; 1 at the first.
    """

    norms: Float[Array, " tasks"]
    cosines: Float[Array, "tasks tasks"] | None
    losses: Float[Array, " tasks"] | None
    present: Bool[Array, " tasks"]
    elapsed: Int[Array, ""]


def safe_norms(
    sum_squares: Callable[[Float[Array, "leaves tasks"], Any], tuple[Array, Any]],
    shape: tuple[int, int],
    carry: Any = None,
) -> tuple[Float[Array, "leaves tasks"], Any]:
    """Norm per leaf and task from sums of squares taken at a scale.

    Args:
      sum_squares: ``(scale, carry) -> (sums, carry)`` with
        ``sums[l, i] = sum((scale[l, i] * leaf_l[i])**2)``. It runs once, and once more if a norm is
        not finite or left the range of the first scale.
      shape: (leaves, tasks).
      carry: what the first run is given; the second is given what the first returned.

    Returns:
      ([leaves, tasks] float32 norms, the carry of the last run).
    """

    # One compiled copy, run once or twice. The scale is loop-carried, so XLA cannot pull it out of
    # the square.
    def unfinished(loop: tuple[Array, Array, Array, Any]) -> Array:
        scale, _, runs, _ = loop
        return (runs == 0) | ((runs == 1) & jnp.any(scale != _USUAL_SCALE))

    def measure(loop: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        scale, _, runs, carry = loop
        sums, carry = sum_squares(scale, carry)
        norms = jnp.sqrt(sums) / scale
        return jnp.where(runs == 0, _scale_for(norms), scale), norms, runs + 1, carry

    start = (
        jnp.full(shape, _USUAL_SCALE, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros([], jnp.int32),
        carry,
    )
    _, norms, _, carry = lax.while_loop(unfinished, measure, start)
    return norms, carry


def _scale_for(norms: Float[Array, "leaves tasks"]) -> Float[Array, "leaves tasks"]:
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


# Jitted, or every eager call would compile anew; inlined, or XLA would build the stack for it.
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def leaf_norms(
    leaves: Sequence[Array], wanted: tuple[bool, ...], num_tasks: int
) -> Float[Array, "leaves tasks"]:
    """Norms of stacked gradients per leaf and task; 0 where a leaf is not wanted.

    Slice by slice: XLA folds a slice of a stack, so that the stack is never built where the
    gradients come from the same program. Where that would make too many reductions, one a leaf.
    """
    sliced = num_tasks * len(leaves) <= _MOST_SLICES

    def row(leaf: Array, want: bool, scale: Array) -> Array:
        if not want:
            return jnp.zeros([num_tasks], jnp.float32)
        if sliced:
            sums = jnp.stack([sum_of_squares(leaf[i], scale[i]) for i in range(num_tasks)])
        else:
            sums = jax.vmap(sum_of_squares)(leaf, scale)
        # float64 sums come back to float32 before the root: their scaled square fits there too.
        return sums.astype(jnp.float32)

    if not leaves:
        return jnp.zeros([0, num_tasks], jnp.float32)

    def sums(scale: Array, carry: None) -> tuple[Array, None]:
        rows = [row(*each) for each in zip(leaves, wanted, scale, strict=True)]
        return jnp.stack(rows), carry

    return safe_norms(sums, (len(leaves), num_tasks))[0]


def combine_norms(
    norms: Float[Array, "leaves tasks"], measured: Bool[Array, " leaves"]
) -> Float[Array, " tasks"]:
    """The norm over all measured leaves, ``sqrt(sum_l norms[l]**2)``, without overflow."""
    chosen = jnp.where(measured[:, None], norms, 0)
    largest = jnp.max(chosen, axis=0, initial=0)
    divisor = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return divisor * jnp.sqrt(jnp.sum(jnp.square(chosen / divisor), axis=0))


def largest_to_smallest(values: Float[Array, "*batch tasks"]) -> Float[Array, "*batch"]:
    """Infinite where only the smallest is zero, 1 where all are."""
    largest, smallest = jnp.max(values, axis=-1), jnp.min(values, axis=-1)
    ratio = largest / jnp.where(smallest > 0, smallest, 1)
    return jnp.where(smallest > 0, ratio, jnp.where(largest > 0, jnp.inf, 1))


def cosines(
    leaves: Sequence[Array],
    measured: Bool[Array, " leaves"],
    norms: Float[Array, " tasks"],
) -> Float[Array, "tasks tasks"]:
    """Cosines between the task gradients, accumulated from unit gradients.

    Dividing by the norm first keeps every product below 1, whatever the scale of a task.
    """
    num_tasks = norms.shape[0]
    usable = (norms > 0) & jnp.isfinite(norms)
    unit = jnp.where(usable, 1 / jnp.where(usable, norms, 1), 0)
    pairs = list(itertools.combinations(range(num_tasks), 2))

    def sliced(leaf: Array, factor: Array) -> Array:
        scaled = [leaf[i] * factor[i] for i in range(num_tasks)]
        dots = jnp.zeros([num_tasks, num_tasks], factor.dtype)
        for i, j in pairs:
            dots = dots.at[i, j].set(jnp.sum((scaled[i].conj() * scaled[j]).real))
        return dots + dots.T

    def whole(leaf: Array, factor: Array) -> Array:
        axes = tuple(range(1, leaf.ndim))
        scaled = leaf * each_task(factor, leaf)
        return lax.dot_general(
            scaled.conj(), scaled, ((axes, axes), ((), ())), precision=lax.Precision.HIGHEST
        ).real

    dots = sliced if len(pairs) * len(leaves) <= _MOST_SLICES else whole
    gram = jnp.zeros([num_tasks, num_tasks], jnp.float32)
    for index, leaf in enumerate(leaves):
        of_leaf = dots(leaf.astype(wide(leaf)), unit.astype(accumulator(leaf)))
        of_leaf = of_leaf.astype(jnp.float32)
        # Chosen afterwards: zero times the NaN of a leaf that is not measured would be NaN.
        gram = gram + jnp.where(measured[index], of_leaf, 0)
    diagonal = jnp.eye(num_tasks, dtype=bool)
    return jnp.where(diagonal, 1, jnp.clip(gram, -1, 1)).astype(jnp.float32)


def accumulator(array: Array) -> jnp.dtype:
    """Float32, or float64 for leaves of that width."""
    return jnp.finfo(wide(array)).dtype


def wide(array: Array) -> jnp.dtype:
    """The dtype itself where it has 32 bits or more (complex: twice 32), else float32."""
    return np.promote_types(array.dtype, np.float32)  # JAX's own refuses bfloat16 when strict
