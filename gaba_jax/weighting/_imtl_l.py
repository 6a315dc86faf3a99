"""IMTL-L: learned scales that make the scaled losses equal."""

import optax

from gaba_jax.weighting._base import Weighting
from gaba_jax.weighting._uncertainty import uncertainty


def imtl_l(
    num_tasks: int, *, weight_optimizer: optax.GradientTransformation | None = None
) -> Weighting:
    r"""The loss balance of impartial multi-task learning (IMTL-L, Liu et al., ICLR 2021).

    Parameters and scales s together minimise

    .. math:: \sum_i \left(e^{s_i} L_i - s_i\right)

    so the weights are :math:`\lambda_i = e^{s_i}`, the gradient of the scales is
    :math:`e^{s_i} L_i - 1`, and for steady losses all :math:`e^{s_i} L_i` come to 1.

    With s = -log-variance this is the objective of :func:`uncertainty`, to the letter, and so this
    *is* :func:`uncertainty` under the name of its other derivation: there a noise model, here that
    no loss should be favoured. (The uncertainty paper's own objective, with its factor 1/2 on every
    loss, differs from it by that common factor.) A comparison of the two tells nothing. The paper
    learns s with the optimizer of the network; here it has one of its own.

    When not to use it: as for :func:`uncertainty`: the scale of a loss far from 1 takes hundreds of
    updates to learn, and losses must be positive.

    Args:
      num_tasks: number of tasks K >= 2.
      weight_optimizer: any optax optimizer for s, default ``optax.adam(0.025)``.

    Returns:
      A :class:`Weighting` with an :class:`UncertaintyState`, whose ``log_variances`` are -s; it
      needs ``task_losses`` at update and measures no gradients. The weights are positive; their sum
      is K at first, then free. An absent task keeps its own.

    Raises:
      ValueError: ``num_tasks`` < 2, or a ``weight_optimizer`` that is none.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from gaba_jax import weighting
      >>> rule = weighting.imtl_l(2, weight_optimizer=optax.sgd(0.1))
      >>> stats = weighting.TaskStats(
      ...     norms=jnp.zeros(2), cosines=None, losses=jnp.array([4.0, 0.5]),
      ...     present=jnp.ones(2, bool), elapsed=jnp.int32(1))
      >>> _, state = rule.update(stats, rule.init())
      >>> -state.log_variances
      Array([-0.3 ,  0.05], dtype=float32)
    """
    return uncertainty(num_tasks, weight_optimizer=weight_optimizer)
