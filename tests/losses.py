"""Rules that read losses, over a run."""

import jax
import jax.numpy as jnp
import numpy as np

from gaba_jax.weighting import TaskStats


def weights_over(rule, losses, present=None, elapsed=1):
    """The weights of every update with these losses [T, K]."""
    return run_over(rule, losses, present, elapsed)[0]


def run_over(rule, losses, present=None, elapsed=1, state=None):
    """The weights of every update with these losses [T, K], and the last state."""
    losses = jnp.asarray(losses, jnp.float32)
    present = jnp.ones(losses.shape, bool) if present is None else jnp.asarray(present)

    def step(state, row):
        losses, present = row
        losses = jnp.where(present, losses, 1)
        stats = TaskStats(jnp.zeros_like(losses), None, losses, present, jnp.int32(elapsed))
        weights, state = rule.update(stats, state)
        return state, weights

    state = rule.init() if state is None else state
    state, weights = jax.lax.scan(step, state, (losses, present))
    return np.asarray(weights), state
