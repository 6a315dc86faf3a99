"""Contributions in given ratios, for any number of tasks, without one that freezes the others."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    LARGEST,
    Number,
    Weighting,
    as_float32,
    check_num_tasks,
    equal_weights,
    number,
    task_vector,
)
from gaba_jax.weighting._moving_average import averaged_norms, check_decay


class EqualizeState(NamedTuple):
    """State of :func:`equalize`. Names and order are an on-disk promise.

    Attributes:
      ema_mass: [K] float32, the weight that a task's measurements have in its average; 0 before
        the first.
      ema_norms: [K] float32, the average of each task's gradient norm.
      largest_norms: [K] float32, the largest that each of these averages has been.
    """

    ema_mass: Float[Array, " tasks"]
    ema_norms: Float[Array, " tasks"]
    largest_norms: Float[Array, " tasks"]


def equalize(
    num_tasks: int,
    *,
    ratios: ArrayLike | None = None,
    anchor: int | None = None,
    beta: Number = 0.9,
    rho: Number = 0.1,
) -> Weighting:
    r"""Weights whose contributions :math:`\lambda_i g_i` are in the ratios that you give.

    .. math::
        \lambda_i = \frac{1}{K}\, \frac{r_i}{s_i} \prod_j \Big(\frac{s_j}{r_j}\Big)^{1/K}, \qquad
        s_i = \max(\bar g_i,\ \rho\, q\, \hat g_i), \qquad
        q = \max_j \frac{\bar g_j}{\hat g_j}

    :math:`\bar g_i` is the average of task i's gradient norm, :math:`\hat g_i` the largest that it
    has been, and r the ``ratios``. The average starts at the first measurement, so the loud task
    never leaves a mark in Adam's second moment. A factor on one loss changes no ratio of
    contributions; a factor on all losses changes no weight.

    **A finished task** (:math:`g_i \to 0`) is not amplified without end: once its average is below
    ``rho`` of its own largest, while another task's is not, its weight stays where it is. If it
    wakes, its average rises and it is heard. A task that has had no gradient yet counts as one of
    the usual size.

    **The learning rate.** The weights have the geometric mean 1/K: what some rise by, the others
    fall by. With weights that sum to 1, equal contributions have the size of the smallest norm, and
    plain SGD crawls while one task is quiet. With contributions of the size of the mean norm, the
    heads of a quiet task take steps hundreds of times too large. This is half-way between. Adam
    does not see the difference.

    **A main loss.** With ``anchor`` i the weight of task i is 1, and the others contribute at most
    their ratio of its contribution, and never more than they would with weight 1:

    .. math:: \lambda_j = \min\Big(1,\ \frac{r_j\, s_i}{r_i\, s_j}\Big)

    Absent tasks keep their averages, and each weight holds by itself: loaders that serve one task a
    batch are balanced.

    When not to use it: where uniform weights, at a learning rate tuned for them, do as well: equal
    contributions are no aim in themselves. Conflict stays: see
    :func:`gaba_jax.weighting.upgrad`.

    Args:
      num_tasks: number of tasks K >= 2.
      ratios: [K] positive, of the contributions, default equal. May be traced.
      anchor: the task of the main loss, whose weight stays 1; default None.
      beta: decay of the average of the norms in [0, 1), default 0.9 (about 10 updates). It counts
        updates: a measurement n updates after the last one keeps ``beta**n``. For a decay of b per
        measurement, every n updates, pass ``b ** (1 / n)``.
      rho: in [0, 1], the part of its own largest average below which a task counts as finished,
        default 0.1; 0 equalises without end.

    Returns:
      A :class:`Weighting` with an :class:`EqualizeState`. The weights are positive, 1/K each before
      the first measurement (with ``anchor`` 1 each).

    Raises:
      ValueError: ``num_tasks`` < 2, ``ratios`` no positive [K], ``anchor`` no task, ``beta``
        outside [0, 1) or ``rho`` outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.equalize(3, ratios=[1.0, 1.0, 0.1]))
      >>> grads = jnp.array([[500.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
      >>> _, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> contributions = state.task_weights * state.task_norms
      >>> bool(jnp.allclose(contributions / contributions[0], jnp.array([1, 1, 0.1]), rtol=1e-5))
      True
    """
    check_num_tasks(num_tasks, least=2)
    check_decay("beta", beta)
    part = number("rho", rho)
    if part is not None and not 0 <= part <= 1:
        raise ValueError(f"{rho=} must be in [0, 1].")
    if anchor is not None and not (
        isinstance(anchor, int) and not isinstance(anchor, bool) and 0 <= anchor < num_tasks
    ):
        raise ValueError(f"{anchor=} must be the number of a task, from 0 to {num_tasks - 1}.")
    given = task_vector("ratios", ratios, num_tasks)
    wanted = as_float32([1.0] * num_tasks) if given is None else given

    def init() -> EqualizeState:
        # Buffers of their own, so that the state can be donated.
        return EqualizeState(*(jnp.zeros([num_tasks], jnp.float32) for _ in range(3)))

    def update(stats: TaskStats, state: EqualizeState) -> tuple[Array, EqualizeState]:
        mass, norms = averaged_norms(stats, beta, state.ema_mass, state.ema_norms)
        largest = jnp.maximum(state.largest_norms, norms)
        logs = jnp.log(_sizes(norms, largest, jnp.asarray(rho, jnp.float32)) / jnp.asarray(wanted))
        if anchor is None:
            raised = jnp.mean(logs) - logs - jnp.log(jnp.float32(num_tasks))
        else:
            raised = jnp.minimum(logs[anchor] - logs, 0)
        weights = jnp.exp(jnp.minimum(raised, jnp.log(jnp.float32(LARGEST))))
        return weights, EqualizeState(mass, norms, largest)

    start = equal_weights(num_tasks) * (1 if anchor is None else num_tasks)
    return Weighting(
        num_tasks, frozenset({"norms"}), init, update, start, least_present=1, absent="each"
    )


def _sizes(
    norms: Float[Array, " tasks"], largest: Float[Array, " tasks"], rho: Float[Array, ""]
) -> Float[Array, " tasks"]:
    """What the weights are inverse to, positive."""
    known = largest > 0
    left = jnp.where(known, norms / jnp.where(known, largest, 1), 0)
    sizes = jnp.maximum(norms, rho * jnp.max(left) * largest)
    # Without a gradient ever, of the usual size; a rho of 0 divides by the smallest number at most.
    sizes = jnp.maximum(sizes, jnp.finfo(jnp.float32).tiny)
    count = jnp.maximum(jnp.sum(known), 1).astype(jnp.float32)
    usual = jnp.exp(jnp.sum(jnp.where(known, jnp.log(sizes), 0)) / count)
    return jnp.where(known, sizes, usual)
