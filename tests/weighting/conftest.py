"""What the tests of the rules share."""

import jax
import jax.numpy as jnp
import pytest

from gaba_jax.weighting import TaskStats


def stats_of(norms, *, losses=None, cosines=None, present=None, elapsed=1):
    norms = jnp.asarray(norms, jnp.float32)
    present = jnp.ones(norms.shape, bool) if present is None else jnp.asarray(present)
    return TaskStats(norms, cosines, losses, present, jnp.int32(elapsed))


@pytest.fixture
def weigh():
    """``weigh(rule, norms, steps=1, **stats)``: the weights after that many equal updates."""

    def run(rule, norms, steps=1, **stats):
        def step(state, _):
            weights, state = rule.update(stats_of(norms, **stats), state)
            return state, weights

        return jax.lax.scan(step, rule.init(), length=steps)[1]

    return run
