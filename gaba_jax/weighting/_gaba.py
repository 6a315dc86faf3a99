"""GABA: the closed form with its three stabilisers."""

from jax.typing import ArrayLike
from jaxtyping import Array

from gaba_jax.weighting._base import Number, Weighting
from gaba_jax.weighting._inverse_share import inverse_share
from gaba_jax.weighting._stabilize import Floor, stabilize


def gaba(
    num_tasks: int,
    *,
    beta: Number = 0.99,
    warmup_steps: int | Array = 100,
    min_weight: Number = 0.05,
    floor: Floor = "renormalize",
    debias: bool = False,
    task_priorities: ArrayLike | None = None,
) -> Weighting:
    r"""Gradient-Aware Balanced Adaptation: the closed form with its three stabilisers.

    .. math:: \lambda_i = \frac{\sum_{j \ne i} g_j}{(K - 1) \sum_j g_j}

    with :math:`g_i` the L2 norm of task i's gradient on the shared parameters. The weights are
    1/K for ``warmup_steps`` updates, then averaged with decay ``beta`` and kept above a floor. The
    defaults are the published constants. It is :func:`gaba_jax.weighting.inverse_share`, wrapped
    in :func:`gaba_jax.weighting.stabilize`.

    It makes the contributions :math:`\lambda_i g_i` equal for K = 2 alone, and there up to its
    floor: gradients 500x apart stay 25x apart. For K > 2 it lowers the loudest task and no weight
    rises above 1/(K-1): norms (1, 1, 0.001) give contributions (0.25, 0.25, 0.0005).
    :func:`equalize` makes them equal for any K.

    When not to use it: where uniform weights, at a learning rate tuned for them, do as well.

    Args:
      num_tasks: number of tasks K >= 2.
      beta: decay of the average in [0, 1), default 0.99 (about 100 updates); 0 is no smoothing.
        It counts updates: a measurement n updates after the last one keeps ``beta**n``.
      warmup_steps: updates with weights 1/K before averaging starts, default 100.
      min_weight: floor under each weight, in [0, 1/K], default 0.05.
      floor: "renormalize" (default, published: clamp, then divide by the sum, which can end below
        the floor) or "project" (holds it exactly).
      debias: start the average at the first measurement instead of at 1/K, default False.
      task_priorities: [K] positive; with K = 2 the contributions are in this ratio. Default equal.

    Returns:
      A :class:`Weighting`; the weights are >= 0 and sum to 1.

    Raises:
      ValueError: ``num_tasks`` < 2, ``beta`` outside [0, 1), ``warmup_steps`` negative,
        ``min_weight`` outside [0, 1/K], an unknown ``floor``, or ``task_priorities`` no positive
        [K].

    Example:
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.gaba(3, beta=0.9))  # the same as gaba(3, beta=0.9)

    References:
      "Gradient-Aware Multi-Task Learning for Predictive Maintenance: AMNL, GABA, and GRACE for RUL
      Prediction Under Multi-Condition Degradation", chapters 17 to 20,
      https://www.book-ai.org/books/predictive-maintenance
    """
    return stabilize(
        inverse_share(num_tasks, task_priorities=task_priorities),
        beta=beta,
        warmup_steps=warmup_steps,
        min_weight=min_weight,
        floor=floor,
        debias=debias,
    )
