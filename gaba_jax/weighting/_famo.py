"""FAMO: weights learned so that all log losses fall alike."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    Number,
    Weighting,
    check_not_negative,
    check_num_tasks,
    check_optimizer,
    descend,
    equal_weights,
    share_out,
    task_losses,
    task_vector,
)

_LARGEST_LOGIT = 100.0  # past a difference of 100 the smaller share is 0 in float32


class FamoState(NamedTuple):
    """State of :func:`famo`. Names and order are an on-disk promise.

    Attributes:
      logits: [K] float32, xi.
      optimizer_state: the state of ``weight_optimizer``.
      log_losses: [K] float32, the logarithm of each task's last loss above its minimum; 0 until
        there is one.
      loss_ages: [K] int32, updates from then to the last measurement; -1 until there is one.
    """

    logits: Float[Array, " tasks"]
    optimizer_state: Any
    log_losses: Float[Array, " tasks"]
    loss_ages: Int[Array, " tasks"]


def famo(
    num_tasks: int,
    *,
    weight_optimizer: optax.GradientTransformation | None = None,
    gamma: Number = 0.001,
    minimum_losses: ArrayLike | None = None,
) -> Weighting:
    r"""Fast adaptive multitask optimization (FAMO, Liu et al., NeurIPS 2023).

    .. math:: \lambda_i = c \frac{z_i}{L_i - b_i}, \qquad z = \mathrm{softmax}(\xi), \qquad
        c = \Big(\sum_j \frac{z_j}{L_j - b_j}\Big)^{-1}

    with b the ``minimum_losses``: a step along the gradient of
    :math:`\sum_i z_i \log (L_i - b_i)`. The logits :math:`\xi` are learned so that all logarithms
    fall at the same rate: the task whose loss falls slowest gains weight. With :math:`v_i` the fall
    of task i's logarithm over the last step, ``weight_optimizer`` takes a step on

    .. math:: z_i \Big(v_i - \sum_j z_j v_j\Big) + \gamma\, \xi_i

    The first factor is the softmax's Jacobian times v. The term in ``gamma`` is the paper's weight
    decay, added to the gradient and not to the step.

    **Where it differs from the paper**, which evaluates the losses of a batch again after the step
    on it. Here the ``task_losses`` of the next update are what came after the step. On the whole
    data these are the same numbers at the same time, a forward pass cheaper. On minibatches they
    are those of another batch, so v holds the noise between two batches too: a lower
    ``weight_optimizer`` rate averages it. Where losses are measured every n updates, v is the fall
    over n; a task that was absent counts with its mean fall over as many updates as the others, and
    one with no earlier loss falls as the others do.

    When not to use it: with batches so small that the noise of a loss is far above its fall in one
    step. Losses near their minimum take all the weight.

    Args:
      num_tasks: number of tasks K >= 2.
      weight_optimizer: any optax optimizer for the logits, default ``optax.adam(0.025)``, the
        paper's.
      gamma: pull of the logits towards 0, i.e. equal z, >= 0, default 0.001. (The class in the
        authors' code has 0.01.)
      minimum_losses: [K] finite, what each loss cannot fall below, default 0.

    Returns:
      A :class:`Weighting` with a :class:`FamoState`; it needs ``task_losses`` at update and
      measures no gradients. The weights are >= 0 and sum to 1. An absent task keeps its logit and
      its last loss, and has the weight they give it (1/K before there is a loss); so does a task
      whose loss is at its minimum or below, where it has no logarithm.

    Raises:
      ValueError: ``num_tasks`` < 2; a ``weight_optimizer`` that is none; ``gamma`` negative or not
        finite; ``minimum_losses`` not a finite [K].

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from gaba_jax import weighting
      >>> rule = weighting.famo(2)
      >>> def step(state, losses):
      ...     stats = weighting.TaskStats(
      ...         jnp.zeros(2), None, losses, jnp.ones(2, bool), jnp.int32(1))
      ...     weights, state = rule.update(stats, state)
      ...     return state, weights
      >>> losses = jnp.array([[4.0, 1.0], [4.0, 0.5]])  # the first one did not fall
      >>> state, weights = jax.lax.scan(step, rule.init(), losses)
      >>> print(np.asarray(weights[0]).round(3), np.asarray(state.logits).round(3))
      [0.2 0.8] [ 0.025 -0.025]
    """
    check_num_tasks(num_tasks, least=2)
    optimizer = check_optimizer(optax.adam(0.025) if weight_optimizer is None else weight_optimizer)
    check_not_negative("gamma", gamma)
    given = task_vector("minimum_losses", minimum_losses, num_tasks, positive=False)
    lowest = np.zeros(num_tasks, np.float32) if given is None else given

    def init() -> FamoState:
        # Buffers of their own, so that the state can be donated.
        return FamoState(
            logits=jnp.zeros([num_tasks], jnp.float32),
            optimizer_state=optimizer.init(jnp.zeros([num_tasks], jnp.float32)),
            log_losses=jnp.zeros([num_tasks], jnp.float32),
            loss_ages=jnp.full([num_tasks], -1, jnp.int32),
        )

    def update(stats: TaskStats, state: FamoState) -> tuple[Array, FamoState]:
        limits = jnp.finfo(jnp.float32)
        above = jnp.minimum(task_losses(stats) - lowest, limits.max)
        read = stats.present & (above >= limits.tiny)
        log_losses = jnp.where(read, jnp.log(jnp.where(read, above, 1)), state.log_losses)
        seen = state.loss_ages >= 0
        compared = read & seen
        room = jnp.iinfo(jnp.int32).max - state.loss_ages
        ages = jnp.where(seen, state.loss_ages + jnp.minimum(stats.elapsed, room), -1)
        # The fall over as many updates as lie between two measurements, however old the last loss.
        part = stats.elapsed.astype(jnp.float32) / jnp.maximum(ages, 1).astype(jnp.float32)
        gradient = _gradient(state.logits, part * (state.log_losses - log_losses), compared)
        learned, optimizer_state = descend(
            optimizer,
            gradient + jnp.asarray(gamma, jnp.float32) * state.logits,
            state.optimizer_state,
            state.logits,
            compared,
        )
        learned = jnp.clip(learned, -_LARGEST_LOGIT, _LARGEST_LOGIT)
        # With nothing to compare no step is taken: optimizers count their steps.
        logits, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(jnp.any(compared), new, old),
            (jnp.where(compared, learned, state.logits), optimizer_state),
            (state.logits, state.optimizer_state),
        )
        # c z_i / (L_i - b_i) as one softmax: nothing overflows.
        known = seen | read
        weights = jax.nn.softmax(jnp.where(known, logits - log_losses, -1e30))
        part = jnp.sum(known).astype(jnp.float32) / num_tasks
        weights = jnp.where(known, share_out(weights, known, part), 1 / num_tasks)
        return weights, FamoState(
            logits=logits,
            optimizer_state=optimizer_state,
            log_losses=log_losses,
            loss_ages=jnp.where(read, 0, ages),
        )

    return Weighting(num_tasks, frozenset({"losses"}), init, update, equal_weights(num_tasks))


def _gradient(
    logits: Float[Array, " tasks"],
    falls: Float[Array, " tasks"],
    compared: Bool[Array, " tasks"],
) -> Float[Array, " tasks"]:
    """The softmax's Jacobian times the falls; a task that is not compared falls as the mean."""
    shares = jax.nn.softmax(logits)
    mean = jnp.sum(share_out(shares, compared, 1.0) * jnp.where(compared, falls, 0))
    return shares * jnp.where(compared, falls - mean, 0)
