"""Finds the weights, then holds them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Weighting, as_float32, check_weighting, number


class HoldAfterState(NamedTuple):
    """State of :func:`hold_after`. Names and order are an on-disk promise.

    Attributes:
      hold_step: [] int32, updates so far, those between measurements included; it stops one past
        ``steps``.
      held_weights: [K] float32, the last weights that the rule returned.
      inner_state: the state of the wrapped rule.
    """

    hold_step: Int[Array, ""]
    held_weights: Float[Array, " tasks"]
    inner_state: Any


def hold_after(weighting: Weighting, steps: int | Array) -> Weighting:
    r"""Runs a rule for some updates, and holds the weights that it has then (as in AutoScale).

    .. math:: \lambda(t) = \lambda(\min(t, \text{steps}))

    From then on a run is one with constant weights. ``balance_metrics`` shows them as
    ``weight/0``, ..., for a run with :func:`constant`.

    When not to use it: where the tasks' gradients go on changing against each other.

    Args:
      weighting: any :class:`Weighting`.
      steps: updates in which the rule runs, >= 1.

    Returns:
      A :class:`Weighting` with a :class:`HoldAfterState`. It goes on measuring, so that norms can
      be watched; ``every=n`` saves that.

    Raises:
      ValueError: ``steps`` is no whole number >= 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.hold_after(weighting.inverse_norm(2), steps=1))
      >>> state = tx.init(jnp.zeros(2))
      >>> for scale in (1.0, 100.0):
      ...     _, state = tx.update(jnp.array([[3.0, 0.0], [0.0, scale]]), state)
      ...     print(state.task_weights)
      [0.25 0.75]
      [0.25 0.75]
    """
    check_weighting(weighting)
    last = number("steps", steps)
    if last is not None and not (last >= 1 and last.is_integer()):
        raise ValueError(f"{steps=} must be at least 1, and whole.")

    def init() -> HoldAfterState:
        return HoldAfterState(
            hold_step=jnp.zeros([], jnp.int32),
            held_weights=jnp.array(as_float32(weighting.initial_weights)),
            inner_state=weighting.init(),
        )

    def update(stats: TaskStats, state: HoldAfterState) -> tuple[Array, HoldAfterState]:
        limit = jnp.asarray(steps, jnp.int32)
        # A measurement that comes later than the last update of the rule, under every=n, is late.
        step = state.hold_step + jnp.minimum(stats.elapsed, limit + 1 - state.hold_step)
        weights, inner = weighting.update(stats, state.inner_state)
        weights = jnp.asarray(weights, jnp.float32)
        # A rule without memory returns 0 for an absent task, whose last weight stands.
        weights = jnp.where(stats.present | (weights != 0), weights, state.held_weights)
        running = HoldAfterState(step, weights, inner)
        held = state._replace(hold_step=step)
        new = jax.tree.map(lambda a, b: jnp.where(step <= limit, a, b), running, held)
        return new.held_weights, new

    return weighting._replace(init=init, update=update)
