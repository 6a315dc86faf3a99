"""Random weights, drawn anew at every update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Weighting, check_num_tasks, equal_weights, number

_IMPL = "threefry2x32"  # named, so that a checkpoint does not depend on jax's default


class RandomState(NamedTuple):
    """State of :func:`random` and :func:`pcgrad`. Names and order are an on-disk promise.

    Attributes:
      key_data: [2] uint32, the words of a threefry key, as plain data that checkpoints can hold.
    """

    key_data: UInt32[Array, "2"]


def random(num_tasks: int, *, seed: int | Array = 0) -> Weighting:
    r"""Random loss weighting (Lin et al., "A closer look at loss weighting", 2021).

    .. math:: \lambda = \mathrm{softmax}(z), \qquad z_i \sim \mathcal N(0, 1)

    drawn anew at every measured update. On average the weights are 1/K. A cheap baseline that any
    learned weighting should beat.

    When not to use it: to balance tasks; a task that pulls 500 times harder still does.

    Args:
      num_tasks: number of tasks K.
      seed: from 0 to 2^32 - 1, default 0. The same seed gives the same weights.

    Returns:
      A :class:`Weighting` with a :class:`RandomState`; it reads nothing, so nothing is measured.
      The weights are positive and sum to 1, 1/K each before the first update. While tasks are
      absent, those present share what was drawn for all K, with sum 1.

    Raises:
      ValueError: ``seed`` is no whole number from 0 to 2^32 - 1.

    Example:
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.random(3, seed=1))
    """
    check_num_tasks(num_tasks)
    key = initial_key(seed)

    def init() -> RandomState:
        return RandomState(key())

    def update(stats: TaskStats, state: RandomState) -> tuple[Array, RandomState]:
        del stats
        key_data, draw = next_key(state.key_data)
        weights = jax.nn.softmax(jax.random.normal(draw, [num_tasks], jnp.float32))
        return weights, RandomState(key_data)

    return Weighting(num_tasks, frozenset(), init, update, equal_weights(num_tasks))


def initial_key(seed: int | Array) -> Callable[[], UInt32[Array, "2"]]:
    """What makes the key data of a seed; ValueError unless the seed is whole and in range."""
    concrete = number("seed", seed)
    if concrete is not None and not (0 <= concrete < 2**32 and concrete.is_integer()):
        raise ValueError(f"{seed=} must be a whole number from 0 to 2**32 - 1.")
    return lambda: jax.random.key_data(
        jax.random.key(jnp.asarray(seed).astype(jnp.uint32), impl=_IMPL)
    )


def next_key(key_data: UInt32[Array, "2"]) -> tuple[UInt32[Array, "2"], Array]:
    """(key data to go on with, key to draw from)."""
    key, draw = jax.random.split(jax.random.wrap_key_data(key_data, impl=_IMPL))
    return jax.random.key_data(key), draw
