"""ReLoBRaLo: losses relative to the last ones and, at random, to the first ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    LARGEST,
    Number,
    Weighting,
    check_num_tasks,
    check_positive,
    number,
    task_losses,
)
from gaba_jax.weighting._moving_average import check_decay, decay_over
from gaba_jax.weighting._random import initial_key, next_key


class RelobraloState(NamedTuple):
    """State of :func:`relobralo`. Names and order are an on-disk promise.

    Attributes:
      relative_weights: [K] float32, the weights that were returned last.
      first_losses: [K] float32, each task's first loss; 0 until there is one.
      last_losses: [K] float32, each task's last loss; 0 until there is one.
      key_data: [2] uint32, the words of a threefry key, as plain data that checkpoints can hold.
    """

    relative_weights: Float[Array, " tasks"]
    first_losses: Float[Array, " tasks"]
    last_losses: Float[Array, " tasks"]
    key_data: UInt32[Array, "2"]


def relobralo(
    num_tasks: int,
    *,
    temperature: Number = 0.1,
    alpha: Number = 0.999,
    lookback: Number = 0.99,
    seed: int | Array = 0,
) -> Weighting:
    r"""Relative loss balancing with random lookback (ReLoBRaLo, Bischof and Kraus 2021).

    .. math::
        b_i(t, t') &= K \frac{e^{L_i(t) / (T L_i(t'))}}{\sum_j e^{L_j(t) / (T L_j(t'))}} \\
        h_i &= \rho\, \lambda_i(t - 1) + (1 - \rho)\, b_i(t, 0) \\
        \lambda_i(t) &= \alpha\, h_i + (1 - \alpha)\, b_i(t, t - 1)

    A loss that has fallen less than the others, relative to where it was, gains weight. T is the
    ``temperature``. :math:`\rho` is drawn anew at every measured update, one for all tasks: 1 with
    the probability ``lookback``, and the average goes on; else 0, and what it kept is replaced by
    the balance relative to the first losses. A run that is resumed from its state draws the same.

    The weights of the first measurement are 1, since every loss is relative to itself.

    **Where it differs.** The authors' code leaves the average out at the second update
    (:math:`\alpha = 0`); here the paper's formula holds from the start. Where losses are measured
    every n updates, ``alpha`` and ``lookback`` count updates as ``beta`` does elsewhere: both are
    taken to the power n, and t - 1 is the measurement before.

    When not to use it: it knows nothing of how strongly the tasks pull. The ratio of two losses
    that follow each other is near 1 and full of the noise between batches, which a low
    ``temperature`` multiplies: it was made for full batches. Losses must be positive.

    Args:
      num_tasks: number of tasks K.
      temperature: T > 0, default 0.1; larger is nearer to equal weights. The paper chooses
        ``temperature``, ``alpha`` and ``lookback`` for each problem.
      alpha: the part of the weights that is kept per update, in [0, 1), default 0.999; 0 keeps
        nothing. It is to this rule what ``beta`` is to others: for a part a per measurement, every
        n updates, pass ``a ** (1 / n)``, and likewise for ``lookback``.
      lookback: the probability per update that what is kept are the weights before, in [0, 1],
        default 0.99 (the paper's expectation of :math:`\rho`); with 1 the rule never looks back at
        the first losses.
      seed: from 0 to 2^32 - 1, default 0. The same seed gives the same draws.

    Returns:
      A :class:`Weighting` with a :class:`RelobraloState`; it needs ``task_losses`` at update and
      measures no gradients. The weights are >= 0 and sum to K. An absent task keeps its weight and
      its losses, and the sum of the others tends to their number. A loss that is not positive, or
      has no earlier one, counts as one that did not change.

    Raises:
      ValueError: ``temperature`` is not positive and finite, ``alpha`` outside [0, 1), ``lookback``
        outside [0, 1], or ``seed`` no whole number from 0 to 2^32 - 1.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from gaba_jax import weighting
      >>> rule = weighting.relobralo(2, temperature=1.0, alpha=0.5, lookback=1.0)
      >>> def step(state, losses):
      ...     stats = weighting.TaskStats(
      ...         jnp.zeros(2), None, losses, jnp.ones(2, bool), jnp.int32(1))
      ...     weights, state = rule.update(stats, state)
      ...     return state, weights
      >>> losses = jnp.array([[4.0, 2.0], [4.0, 1.0]])  # the second one halved
      >>> print(np.asarray(jax.lax.scan(step, rule.init(), losses)[1]).round(3))
      [[1.    1.   ]
       [1.122 0.878]]

    References:
      R. Bischof, M. Kraus, "Multi-objective loss balancing for physics-informed deep learning",
      2021, arXiv:2110.09813.
    """
    check_num_tasks(num_tasks)
    check_positive("temperature", temperature)
    check_decay("alpha", alpha)
    probability = number("lookback", lookback)
    if probability is not None and not 0 <= probability <= 1:
        raise ValueError(f"{lookback=} must be in [0, 1]: it is a probability.")
    key = initial_key(seed)

    def init() -> RelobraloState:
        # Buffers of their own, so that the state can be donated.
        first, last = (jnp.zeros([num_tasks], jnp.float32) for _ in range(2))
        return RelobraloState(jnp.ones([num_tasks], jnp.float32), first, last, key())

    def update(stats: TaskStats, state: RelobraloState) -> tuple[Array, RelobraloState]:
        losses = task_losses(stats)
        read = stats.present & (losses > 0)
        heat = jnp.asarray(temperature, jnp.float32)
        key_data, draw = next_key(state.key_data)
        goes_on = jax.random.bernoulli(draw, decay_over(lookback, stats.elapsed))
        by_first = _balanced(losses, state.first_losses, read, stats.present, heat)
        by_last = _balanced(losses, state.last_losses, read, stats.present, heat)
        decay = decay_over(alpha, stats.elapsed)
        weights = decay * jnp.where(goes_on, state.relative_weights, by_first)
        weights = jnp.where(stats.present, weights + (1 - decay) * by_last, state.relative_weights)
        return weights, RelobraloState(
            relative_weights=weights,
            first_losses=jnp.where(read & (state.first_losses == 0), losses, state.first_losses),
            last_losses=jnp.where(read, losses, state.last_losses),
            key_data=key_data,
        )

    ones = np.ones(num_tasks, np.float32)
    return Weighting(num_tasks, frozenset({"losses"}), init, update, ones, absent="each")


def _balanced(
    losses: Float[Array, " tasks"],
    before: Float[Array, " tasks"],
    read: Bool[Array, " tasks"],
    present: Bool[Array, " tasks"],
    temperature: Float[Array, ""],
) -> Float[Array, " tasks"]:
    """B of the present tasks, with their number as its sum; 0 for others."""
    known = read & (before > 0)
    ratios = jnp.where(known, losses / jnp.where(known, before, 1), 1)
    logits = jnp.clip(ratios / temperature, 0, LARGEST)
    count = jnp.sum(present).astype(jnp.float32)
    return count * jax.nn.softmax(jnp.where(present, logits, -jnp.inf))
