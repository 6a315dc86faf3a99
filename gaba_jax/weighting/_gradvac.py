"""GradVac: gradients turned until their cosines reach what is usual."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Number, Weighting, check_num_tasks, number
from gaba_jax.weighting._gramian import NEEDS, of_gradients, relative_norms, unit_gramian, usable
from gaba_jax.weighting._random import initial_key, next_key

_LARGEST_COSINE = 1 - 1e-6
_VANISHED = 1e-6  # what rounding leaves of a unit gradient that was turned to nothing


class GradVacState(NamedTuple):
    """State of :func:`gradvac`. Names and order are an on-disk promise.

    Attributes:
      key_data: [2] uint32, the words of a threefry key, as plain data that checkpoints can hold.
      usual_cosines: [K, K] float32, the average of the cosines met, from 0.
    """

    key_data: UInt32[Array, "2"]
    usual_cosines: Float[Array, "tasks tasks"]


def gradvac(num_tasks: int, *, beta: Number = 0.01, seed: int | Array = 0) -> Weighting:
    r"""Gradient vaccine (Wang et al., ICLR 2021).

    For each task i, and for the others j in random order: where the cosine
    :math:`\phi = \cos(g_i', g_j)` is below its usual value :math:`\hat\phi_{ij}`, as much of
    :math:`g_j` is added as brings it there,

    .. math:: g_i' \leftarrow g_i' + \frac{\|g_i'\| \left(\hat\phi \sqrt{1 - \phi^2}
        - \phi \sqrt{1 - \hat\phi^2}\right)}{\|g_j\| \sqrt{1 - \hat\phi^2}}\, g_j, \qquad
        \hat\phi \leftarrow (1 - \beta)\, \hat\phi + \beta\, \phi

    from :math:`\hat\phi = 0` and :math:`g_i' = g_i`; the update is :math:`\sum_i g_i'`. With
    beta = 0 it is :func:`pcgrad`.

    The update is a sum over the tasks, not a mean: without conflict it is K times the mean
    gradient. Behind a clip that was tuned for a mean, ``optax.clip_by_global_norm(1.0)`` say, take
    ``rescaled(gradvac(K), 1.0)``, whose weights sum to 1, or nearly every update is clipped.

    When not to use it: norms are not evened out, and the answer depends on the random order.

    Args:
      num_tasks: number of tasks K.
      beta: how fast the usual cosines follow, in [0, 1], default 0.01 as in the paper.
      seed: of the orders, from 0 to 2^32 - 1, default 0.

    Returns:
      A :class:`Weighting` with a :class:`GradVacState`. The weights are at least 1; they sum to K
      without conflict, the scale of a plain sum of losses. While tasks are absent, so it is for
      those present, in orders that are drawn for all K; usual cosines of absent tasks stand.

    Raises:
      ValueError: ``beta`` outside [0, 1], or ``seed`` no whole number from 0 to 2^32 - 1.

    Example:
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.gradvac(3, seed=1))
    """
    check_num_tasks(num_tasks)
    rate = number("beta", beta)
    if rate is not None and not 0 <= rate <= 1:
        raise ValueError(f"{beta=} must be in [0, 1].")
    key = initial_key(seed)

    def init() -> GradVacState:
        return GradVacState(key(), jnp.zeros([num_tasks, num_tasks], jnp.float32))

    def update(stats: TaskStats, state: GradVacState) -> tuple[Array, GradVacState]:
        key_data, draw = next_key(state.key_data)
        changed, usual = turn(stats, draw, state.usual_cosines, jnp.asarray(beta, jnp.float32))
        return of_sum(changed, stats), GradVacState(key_data, usual)

    ones = np.ones(num_tasks, np.float32)
    return Weighting(num_tasks, NEEDS, init, update, ones, absent="each")


@jax.jit
def turn(
    stats: TaskStats, key: Array, usual: Float[Array, "tasks tasks"], beta: Float[Array, ""]
) -> tuple[Float[Array, "tasks tasks"], Float[Array, "tasks tasks"]]:
    """Turns every gradient against each other one, in random order.

    Returns:
      ([i, j] the coefficient of unit gradient j in the turned unit gradient i, the usual cosines).
    """
    gramian, counted = unit_gramian(stats), usable(stats)
    size = gramian.shape[0]
    tasks = jnp.arange(size)
    orders = jnp.argsort(jax.random.uniform(key, (size, size), jnp.float32), axis=1)

    def against(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        turned, usual = state
        others = orders[:, step]
        pairs = counted & counted[others] & (others != tasks)
        products = turned @ gramian
        length = jnp.sqrt(jnp.maximum(jnp.sum(turned * products, axis=1), 0))
        pairs &= length > _VANISHED
        cosine = products[tasks, others] / jnp.where(pairs, length, 1)
        cosine = jnp.clip(cosine, -_LARGEST_COSINE, _LARGEST_COSINE)
        wanted = jnp.clip(usual[tasks, others], -_LARGEST_COSINE, _LARGEST_COSINE)
        ratio = jnp.sqrt((1 - cosine**2) / (1 - wanted**2))
        change = jnp.where(pairs & (cosine < wanted), length * (wanted * ratio - cosine), 0)
        followed = jnp.where(pairs, (1 - beta) * wanted + beta * cosine, usual[tasks, others])
        return turned.at[tasks, others].add(change), usual.at[tasks, others].set(followed)

    return lax.fori_loop(0, size, against, (jnp.eye(size, dtype=jnp.float32), usual))


def of_sum(turned: Float[Array, "tasks tasks"], stats: TaskStats) -> Float[Array, " tasks"]:
    """The weights of the sum of the turned gradients; 1 for present tasks without a gradient."""
    otherwise = stats.present.astype(jnp.float32)
    return of_gradients(relative_norms(stats) @ turned, stats, otherwise)
