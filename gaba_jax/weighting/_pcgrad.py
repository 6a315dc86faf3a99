"""PCGrad: what opposes another task's gradient is projected away."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Weighting, check_num_tasks
from gaba_jax.weighting._gradvac import of_sum, turn
from gaba_jax.weighting._gramian import NEEDS
from gaba_jax.weighting._random import RandomState, initial_key, next_key


def pcgrad(num_tasks: int, *, seed: int | Array = 0) -> Weighting:
    r"""Gradient surgery by projecting conflicting gradients (Yu et al., NeurIPS 2020).

    For each task i, and for the others j in random order: where :math:`\langle g_i', g_j \rangle`
    is negative,

    .. math:: g_i' \leftarrow g_i' - \frac{\langle g_i', g_j \rangle}{\|g_j\|^2}\, g_j

    from :math:`g_i' = g_i`; the update is the sum of the :math:`g_i'`. For K = 2 the order does not
    matter and no task is opposed.

    The update is a sum over the tasks, not a mean: without conflict it is K times the mean
    gradient. Behind a clip that was tuned for a mean, ``optax.clip_by_global_norm(1.0)`` say, take
    ``rescaled(pcgrad(K), 1.0)``, whose weights sum to 1, or nearly every update is clipped.

    When not to use it: norms are not evened out; for K > 2 a later projection can undo an earlier
    one, so a task can be opposed after all, and the answer depends on the order.
    :func:`upgrad` projects onto all tasks at once.

    Args:
      num_tasks: number of tasks K.
      seed: of the orders, from 0 to 2^32 - 1, default 0.

    Returns:
      A :class:`Weighting` with a :class:`RandomState`. The weights are at least 1; they sum to K
      without conflict, the scale of a plain sum of losses. While tasks are absent, so it is for
      those present, in orders that are drawn for all K.

    Raises:
      ValueError: ``seed`` is no whole number from 0 to 2^32 - 1.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.pcgrad(2))
      >>> grads = {"shared": jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
      >>> updates, _ = tx.update(grads, tx.init({"shared": jnp.zeros(2)}))
      >>> print(np.asarray(updates["shared"]).round(3))  # (.5, .5) and (0, 1)
      [0.5 1.5]
    """
    check_num_tasks(num_tasks)
    key = initial_key(seed)

    def init() -> RandomState:
        return RandomState(key())

    def update(stats: TaskStats, state: RandomState) -> tuple[Array, RandomState]:
        key_data, draw = next_key(state.key_data)
        still = jnp.zeros([num_tasks, num_tasks], jnp.float32)
        turned, _ = turn(stats, draw, still, jnp.zeros([], jnp.float32))
        return of_sum(turned, stats), RandomState(key_data)

    ones = np.ones(num_tasks, np.float32)
    return Weighting(num_tasks, NEEDS, init, update, ones, absent="each")
