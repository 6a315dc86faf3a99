"""Nash-MTL: the Nash bargaining solution."""

from gaba_jax.weighting._base import Number, Weighting
from gaba_jax.weighting._fairgrad import fairgrad


def nash_mtl(num_tasks: int, *, max_amplification: Number | None = None) -> Weighting:
    r"""Nash-MTL (Navon et al., "Multi-task learning as a bargaining game", ICML 2022).

    The direction d of bounded length that maximises :math:`\sum_i \log \langle g_i, d \rangle` is
    :math:`d = \sum_i w_i g_i` with

    .. math:: (G w)_i = 1 / w_i, \qquad G_{ij} = \langle g_i, g_j \rangle, \quad w > 0

    which is :func:`fairgrad` with alpha = 1, and is solved as that, to the optimum at every update
    (the published code takes a few steps of a sequence of convex programs, and can solve only every
    so many updates). The direction does not change when a gradient is scaled, and its norm is
    always :math:`\sqrt K`: the published code bounds it by 1 instead, which leaves the same
    direction.

    **Heads.** A step of constant norm needs large weights where gradients nearly oppose each other:
    two gradients of cosine c have :math:`1 / \sqrt{1 + c}` times the weights of orthogonal ones. On
    the shared parameters that cancels. A head has one task alone, where nothing cancels: its update
    is that many times too large, 377 times at an angle of 0.2 degrees from opposite.
    ``max_amplification`` bounds the factor. Where it is exceeded all weights are scaled down
    together, so the direction stays and the step is shorter. ``weight_task_specific=False`` in
    :func:`gaba_jax.balance` leaves heads out of it altogether.

    When not to use it: a step of constant norm does not shrink towards an optimum, so it needs a
    decaying learning rate; where no direction improves all tasks there is no solution, as in
    :func:`fairgrad`.

    Args:
      num_tasks: number of tasks K.
      max_amplification: at least 1, how many times as large as for orthogonal gradients of the same
        norms a weight may be, default None: as published, without a bound. 10 is safe for heads.

    Returns:
      A :class:`Weighting` with a :class:`SolverState`; its residual is the largest relative error
      of an equation. The weights are positive; their sum is not 1 but goes with
      :math:`1 / \|g\|`. A task of norm zero gets 1/K.

    Raises:
      ValueError: ``num_tasks`` < 1, or ``max_amplification`` below 1.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.nash_mtl(2))
      >>> grads = {"shared": jnp.array([[500.0, 0.0], [0.0, 1.0]])}
      >>> updates, _ = tx.update(grads, tx.init({"shared": jnp.zeros(2)}))
      >>> print(np.asarray(updates["shared"]).round(3))
      [1. 1.]
    """
    return fairgrad(num_tasks, alpha=1.0, max_amplification=max_amplification)
