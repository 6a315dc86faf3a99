"""Any rule on gradients of unit norm."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from gaba_jax._statistics import TaskStats
from gaba_jax.weighting._base import Weighting, check_weighting


def normalized(weighting: Weighting) -> Weighting:
    r"""Lets a rule see gradients of norm 1, and applies its weights to those.

    .. math:: \lambda_i = w_i \frac{h}{g_i}, \qquad
        h = \Big(\frac{1}{n} \sum_j \frac{1}{g_j}\Big)^{-1}

    with :math:`w` the rule's weights for norms of 1 (cosines are what they were), :math:`g_i` the
    norm of task i's gradient and :math:`h` the harmonic mean of the norms of the n present tasks
    that have one. The update is :math:`h \sum_i w_i \nabla L_i / g_i`: the directions are weighed,
    their common size is h. A task of norm 0 keeps :math:`w_i`.

    Around :func:`uniform` it is :func:`inverse_norm`, for norms that are all positive. Around a
    rule that solves for a direction, the loudest task no longer rules the answer.

    When not to use it: around rules that balance norms themselves (:func:`inverse_norm`,
    :func:`inverse_share`, :func:`gradnorm`), which then have nothing left to see. A task that is
    finished (:math:`g_i \to 0`) takes nearly all the weight, noise and all.

    Args:
      weighting: any :class:`Weighting`. :func:`stabilize` goes around this, not into it.

    Returns:
      A :class:`Weighting` with the same state and initial weights; it measures norms, and what the
      rule needs. The sum of the weights is 1 around :func:`uniform`, else free: that of the
      contributions :math:`\lambda_i g_i` is h times the sum of w. What it says of absent
      tasks is the rule's own.

    Raises:
      ValueError: ``weighting`` is no :class:`Weighting`, or one that averages norms.

    Example:
      >>> import jax.numpy as jnp
      >>> from gaba_jax import weighting
      >>> rule = weighting.normalized(weighting.constant([0.75, 0.25]))
      >>> stats = weighting.TaskStats(
      ...     norms=jnp.array([3.0, 1.0]), cosines=None, losses=None,
      ...     present=jnp.ones(2, bool), elapsed=jnp.int32(1))
      >>> weights, _ = rule.update(stats, rule.init())
      >>> weights  # contributions 3:1, as the weights say
      Array([0.375, 0.375], dtype=float32)
    """
    check_weighting(weighting)
    if weighting.least_present == 1:
        raise ValueError(
            "the weighting averages norms, as average_norms and equalize do, and normalized shows "
            "it none but 1. Put stabilize around: stabilize(normalized(...))."
        )

    def update(stats: TaskStats, state: Any) -> tuple[Array, Any]:
        pulls = stats.present & (stats.norms > 0)
        of_unit_norm = stats._replace(norms=pulls.astype(jnp.float32))
        weights, state = weighting.update(of_unit_norm, state)
        # Relative to the smallest norm nothing overflows, and h / g_i is at most n.
        smallest = jnp.min(jnp.where(pulls, stats.norms, jnp.inf))
        inverse = jnp.where(pulls, smallest / jnp.where(pulls, stats.norms, 1), 0)
        total = jnp.sum(inverse)
        count = jnp.sum(pulls).astype(jnp.float32)
        factors = inverse * (count / jnp.where(total > 0, total, 1))
        return jnp.asarray(weights, jnp.float32) * jnp.where(pulls, factors, 1), state

    # The factors depend on who is present, so no weight holds by itself.
    return weighting._replace(
        needs=frozenset(weighting.needs | {"norms"}), update=update, least_present=2
    )
