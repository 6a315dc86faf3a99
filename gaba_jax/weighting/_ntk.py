"""Weights from the tangent kernel: every loss falls at the same rate by itself."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import LARGEST, Number, Weighting, check_num_tasks, task_losses
from gaba_jax.weighting._moving_average import averaged_norms, check_decay


class NtkState(NamedTuple):
    """State of :func:`ntk`. Names and order are an on-disk promise.

    Attributes:
      ema_mass: [K] float32, the weight that a task's measurements have in its average; 0 before
        the first.
      ema_log_traces: [K] float32, the average of the logarithm of each task's T.
    """

    ema_mass: Float[Array, " tasks"]
    ema_log_traces: Float[Array, " tasks"]


def ntk(num_tasks: int, *, beta: Number = 0.9) -> Weighting:
    r"""Weights in inverse ratio to the trace of each task's tangent kernel (Wang et al. 2022).

    .. math:: \lambda_i = \frac{\sum_j \bar T_j}{\bar T_i}, \qquad T_i = \frac{g_i^2}{L_i}

    with :math:`\bar T` the geometric average of T. The paper has the trace of the kernel
    :math:`K_i = J_i J_i^\top` of task i's residuals in the place of T. T is an estimate of it that
    costs no more than the norm. For a mean of N squared residuals :math:`L = r^\top r / N`:

    .. math:: g^2 = \Big\| \frac{2}{N} J^\top r \Big\|^2 = \frac{4}{N^2}\, r^\top K r, \qquad
        T = \frac{4}{N}\, \frac{r^\top K r}{r^\top r}

    Over all directions that the residuals may have, the mean of T is
    :math:`4\, \mathrm{tr}(K) / N^2`. A factor on the loss is a factor on T. Under gradient flow on
    the loss of task i alone, T is exactly the rate at which :math:`\log L_i` falls: making these
    rates equal is what the paper's weights are for.

    **Where it differs from the paper.** The kernel is seen in the direction of the residuals alone.
    Early in training residuals lie along its largest eigenvectors, and T is above the mean. Later,
    when those have been learned, T falls below it, and the weight of a task that is left with slow
    directions rises, where the trace would hardly move. On a network of two hidden layers for
    :math:`u'' = f` T was 1.2 to 2.5 times the mean at the start; that of the residual of the
    equation was 0.02 to 0.2 times after 1,000 updates. The paper's traces are of sums of squares:
    for tasks of unlike N they differ from those of means by the factor :math:`N_i^2`. T is averaged
    over about ten updates, where the paper takes single measurements; the average starts at the
    first one.

    **The exact trace** takes the norm of every residual's gradient, in one backward pass, and
    :func:`constant` weights, made anew as often as you like:

    >>> import jax, jax.numpy as jnp
    >>> from gaba_jax import example_norms, weighting
    >>> def residual(params, x, y):
    ...     return jnp.tanh(x * params["w"]) - y
    >>> params = {"w": jnp.array(0.5)}
    >>> batches = [(jnp.ones(4), jnp.zeros(4)), (3 * jnp.ones(4), jnp.zeros(4))]
    >>> traces = jnp.stack([jnp.sum(example_norms(residual, params, *b) ** 2) for b in batches])
    >>> rule = weighting.constant(2, traces.sum() / traces)

    When not to use it: for losses that are no mean or sum of squares, T is the rate at which the
    logarithm of the loss falls and no trace. Losses must be positive. With small batches both
    norm and loss are noisy.

    Args:
      num_tasks: number of tasks K >= 2.
      beta: decay of the average per update in [0, 1), default 0.9; 0 is no average. It counts
        updates: a measurement n updates after the last one keeps ``beta**n``. For a decay of b per
        measurement, every n updates, pass ``b ** (1 / n)``.

    Returns:
      A :class:`Weighting` with an :class:`NtkState`; it needs ``task_losses`` at update. The
      weights are at least 1, and K each where all T are equal, as before the first measurement.
      Each holds by itself, and an absent task keeps its average. A task whose norm or loss is not
      positive keeps its own too; before there is one it counts as a task of the usual size (the
      geometric mean).

    Raises:
      ValueError: ``num_tasks`` < 2, or ``beta`` outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import weighting
      >>> rule = weighting.ntk(2)
      >>> stats = weighting.TaskStats(
      ...     norms=jnp.array([6.0, 1.0]), cosines=None, losses=jnp.array([4.0, 1.0]),
      ...     present=jnp.ones(2, bool), elapsed=jnp.int32(1))
      >>> print(np.asarray(rule.update(stats, rule.init())[0]).round(3))  # T is 9 and 1
      [ 1.111 10.   ]

    References:
      S. Wang, X. Yu, P. Perdikaris, "When and why PINNs fail to train: a neural tangent kernel
      perspective", 2022, arXiv:2007.14527.
    """
    check_num_tasks(num_tasks, least=2)
    check_decay("beta", beta)

    def init() -> NtkState:
        # Buffers of their own, so that the state can be donated.
        return NtkState(*(jnp.zeros([num_tasks], jnp.float32) for _ in range(2)))

    def update(stats: TaskStats, state: NtkState) -> tuple[Array, NtkState]:
        losses = task_losses(stats)
        read = stats.present & (stats.norms > 0) & (losses > 0)
        # In logarithms no square leaves float32's range.
        logs = 2 * jnp.log(jnp.where(read, stats.norms, 1)) - jnp.log(jnp.where(read, losses, 1))
        measured = stats._replace(norms=logs, present=read)
        mass, logs = averaged_norms(measured, beta, state.ema_mass, state.ema_log_traces)
        known = mass > 0
        count = jnp.maximum(jnp.sum(known), 1).astype(jnp.float32)
        usual = jnp.where(known, logs, jnp.sum(jnp.where(known, logs, 0)) / count)
        weights = jnp.exp(jnp.minimum(logsumexp(usual) - usual, np.log(np.float32(LARGEST))))
        return weights, NtkState(mass, logs)

    return Weighting(
        num_tasks,
        frozenset({"norms", "losses"}),
        init,
        update,
        np.full(num_tasks, num_tasks, np.float32),
        least_present=1,
        absent="each",
    )
