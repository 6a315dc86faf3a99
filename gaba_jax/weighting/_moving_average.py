"""Averages that forget: what the rules with a decay per update share."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Number, number


def check_decay(argument: str, value: Any) -> None:
    """Raises ValueError unless the decay is in [0, 1), in float32 too, where it is concrete."""
    decay = number(argument, value)
    if decay is not None and not 0 <= np.float32(decay) < 1:
        raise ValueError(
            f"{argument}={value} must be in [0, 1), in float32 too: 0 is no smoothing, 1 would "
            "never move."
        )


def decay_over(beta: Number, updates: Int[Array, ""]) -> Float[Array, ""]:
    """The part of an average that is kept over that many updates."""
    return jnp.clip(jnp.asarray(beta, jnp.float32), 0, 1) ** updates.astype(jnp.float32)


def rate_of(decay: Float[Array, ""], mass: Float[Array, "..."]) -> Float[Array, "..."]:
    """The weight of a new measurement in an average of that mass, the measurement's included."""
    return jnp.where(mass > 0, (1 - decay) / jnp.where(mass > 0, mass, 1), 0)


def averaged_norms(
    stats: TaskStats, beta: Number, mass: Float[Array, " tasks"], norms: Float[Array, " tasks"]
) -> tuple[Float[Array, " tasks"], Float[Array, " tasks"]]:
    """The next mass and average of each task's norm, over the updates that it takes part in."""
    decay = decay_over(beta, stats.elapsed)
    # A mass that was once there never falls to 0 again, however long the task is absent.
    faded = jnp.maximum(decay * mass, jnp.finfo(jnp.float32).tiny)
    mass = jnp.where(mass > 0, faded, 0) + jnp.where(stats.present, 1 - decay, 0)
    rate = jnp.where(stats.present, rate_of(decay, mass), 0)
    return mass, (1 - rate) * norms + rate * stats.norms
