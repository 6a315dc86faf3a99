"""Any rule of norms, on the average of each task's norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import (
    Number,
    Weighting,
    check_num_tasks,
    check_weighting,
    names_of_needs,
)
from gaba_jax.weighting._moving_average import averaged_norms, check_decay


class NormAverageState(NamedTuple):
    """State of :func:`average_norms`. Names and order are an on-disk promise.

    Attributes:
      ema_mass: [K] float32, the weight that a task's measurements have in its average; 0 before
        the first.
      ema_norms: [K] float32, the average of each task's gradient norm.
      inner_state: the state of the wrapped rule.
    """

    ema_mass: Float[Array, " tasks"]
    ema_norms: Float[Array, " tasks"]
    inner_state: Any


def average_norms(weighting: Weighting, *, beta: Number = 0.99) -> Weighting:
    r"""Lets a rule see the average of each task's gradient norm, as if all tasks were present.

    .. math::
        m_{i,t} &= b\, m_{i,t-1} + p_{i,t} (1 - b), \qquad b = \beta^{e_t} \\
        \bar g_{i,t} &= \bar g_{i,t-1} + p_{i,t} \frac{1 - b}{m_{i,t}} (g_{i,t} - \bar g_{i,t-1})

    from :math:`m_{i,0} = 0`, so that a task's first norm is taken whole. :math:`p_{i,t}` is 1 where
    task i is present and else 0, and :math:`e_t` the number of updates since the previous
    measurement. The rule weights the averages :math:`\bar g_t`. Until each task has been measured
    the weights are the rule's initial ones (1/K for most), and its state is not touched.

    One present task is enough to learn from, so loaders that serve one task a batch are balanced.
    Each weight holds by itself: it is applied as it is, never rescaled to the tasks present, and K
    batches of one task each add up to one batch of all. Under ``every=n`` the n-th batches must
    reach all tasks. For a warm-up and a floor put :func:`stabilize` around this;
    ``stabilize(rule, beta=b, average="norms")`` is short for
    ``stabilize(average_norms(rule, beta=b), beta=0)``.

    When not to use it: where the ratio of the norms jumps from batch to batch. An average of the
    weights, as in :func:`stabilize`, is bounded then, and one of norms is ruled by the largest. In
    :func:`equalize` such an average is built in.

    Args:
      weighting: a :class:`Weighting` that reads norms alone, such as :func:`inverse_norm`.
      beta: decay of the averages in [0, 1), default 0.99 (about 100 updates); 0 is no smoothing.
        May be traced. It counts updates, as that of :func:`stabilize`.

    Returns:
      A :class:`Weighting` with a :class:`NormAverageState`; the sum of its weights is the rule's.

    Raises:
      ValueError: ``weighting`` is no :class:`Weighting`, has fewer than two tasks, or needs
        losses, cosines, a :class:`Statistic` or nothing; ``beta`` is outside [0, 1), or traced with
        less than 32 bits.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.average_norms(weighting.inverse_norm(2), beta=0.9))
      >>> grads, state = jnp.array([[3.0, 0.0], [0.0, 1.0]]), tx.init(jnp.zeros(2))
      >>> for mask in [True, True], [True, False], [False, True]:  # both tasks, then one at a time
      ...     _, state = tx.update(grads, state, task_mask=jnp.array(mask))
      ...     print(np.asarray(state.task_weights).round(3))
      [0.25 0.75]
      [0.25 0.  ]
      [0.   0.75]
    """
    check_weighting(weighting)
    num_tasks = check_num_tasks(weighting.num_tasks, least=2)
    check_decay("beta", beta)
    if weighting.needs != frozenset({"norms"}):
        raise ValueError(
            "an average of norms is for a rule that reads norms alone, such as inverse_share; this "
            f"one needs {names_of_needs(weighting)}, and for an absent task that has no average. "
            'Average the weights: stabilize(rule, beta=...), with average="weights".'
        )

    def init() -> NormAverageState:
        # Buffers of their own, so that the state can be donated.
        mass, norms = (jnp.zeros([num_tasks], jnp.float32) for _ in range(2))
        return NormAverageState(mass, norms, weighting.init())

    def update(stats: TaskStats, state: NormAverageState) -> tuple[Array, NormAverageState]:
        mass, norms = averaged_norms(stats, beta, state.ema_mass, state.ema_norms)
        everyone = stats._replace(norms=norms, present=jnp.ones_like(stats.present))
        weights, inner_state = weighting.update(everyone, state.inner_state)
        complete = jnp.all(mass > 0)
        inner_state = jax.tree.map(
            lambda new, old: jnp.where(complete, new, old), inner_state, state.inner_state
        )
        weights = jnp.where(complete, weights, jnp.asarray(weighting.initial_weights))
        return weights, NormAverageState(mass, norms, inner_state)

    return weighting._replace(init=init, update=update, least_present=1, absent="each")
