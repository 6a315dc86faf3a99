"""Statistics of the elements of a gradient, ready for a rule's ``needs``."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from gaba_jax._statistics import Statistic

#: ``max |g|`` over all measured elements of a task's gradient.
max_abs = Statistic("max_abs", lambda g: jnp.max(jnp.abs(g), initial=0), jnp.max)


def _sizes(g: Array) -> dict[str, Array]:
    return {"sum": jnp.sum(jnp.abs(g)), "count": jnp.float32(g.size)}


def _mean(of_leaves: dict[str, Array]) -> Array:
    return jnp.sum(of_leaves["sum"]) / jnp.maximum(jnp.sum(of_leaves["count"]), 1)


#: ``mean |g|`` over all measured elements of a task's gradient, zeros included.
mean_abs = Statistic("mean_abs", _sizes, _mean)


def _moments(g: Array) -> dict[str, Array]:
    # Relative to the largest element, so that no square leaves float32's range.
    scale = jnp.max(jnp.abs(g), initial=0)
    unit = g / jnp.where(scale > 0, scale, 1)
    count = jnp.float32(g.size)
    mean = jnp.sum(unit) / jnp.maximum(count, 1)
    # The second difference is zero but for the rounding of the mean.
    deviation = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(unit - mean))) / jnp.maximum(count, 1))
    return {"count": count, "mean": scale * mean, "deviation": scale * deviation}


def _deviation(of_leaves: dict[str, Any]) -> Array:
    count, mean, deviation = (of_leaves[name] for name in ("count", "mean", "deviation"))
    part = count / jnp.maximum(jnp.sum(count), 1)
    away = jnp.abs(mean - jnp.sum(part * mean))
    scale = jnp.maximum(jnp.max(away, initial=0), jnp.max(deviation, initial=0))
    unit = jnp.where(scale > 0, scale, 1)
    squares = jnp.square(away / unit) + jnp.square(deviation / unit)
    return scale * jnp.sqrt(jnp.sum(part * squares))


#: The standard deviation of all measured elements of a task's gradient about their common mean
#: (divided by their number, not by one less). Real gradients; complex ones raise.
std = Statistic("std", _moments, _deviation)
