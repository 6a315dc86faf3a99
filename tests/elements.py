"""A rule on every statistic of a gradient's elements."""

import jax.numpy as jnp
import numpy as np
import optax

from gaba_jax import weighting

NEEDS = (weighting.max_abs, weighting.mean_abs, weighting.std)


def of_elements(num_tasks):
    """Weights in inverse ratio to what the statistics add up to."""

    def update(stats, state):
        sizes = 1e-6 + sum(stats.extra[each.name] for each in NEEDS)
        inverse = jnp.where(stats.present, 1 / sizes, 0)
        return inverse / inverse.sum(), state

    equal = np.full(num_tasks, 1 / num_tasks, np.float32)
    return weighting.Weighting(num_tasks, frozenset(NEEDS), optax.EmptyState, update, equal)
