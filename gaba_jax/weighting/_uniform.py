"""Equal weights."""

from gaba_jax.weighting._base import Weighting, check_num_tasks, equal_weights
from gaba_jax.weighting._constant import constant


def uniform(num_tasks: int) -> Weighting:
    r"""Equal weights: the mean of the losses, the baseline of every comparison.

    .. math:: \lambda_i = 1 / K

    Reads nothing, so nothing is measured (``task_norms`` stay 0). To watch the norms under equal
    weights, let it need them: ``uniform(K)._replace(needs=frozenset({"norms"}))``.

    When not to use it: where the losses differ in units. Then it weights them by their units.

    Args:
      num_tasks: number of tasks K.

    Returns:
      A :class:`Weighting`; the weights sum to 1.

    Example:
      >>> from gaba_jax import weighting
      >>> weighting.uniform(4).initial_weights
      array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """
    equal = constant(check_num_tasks(num_tasks), equal_weights(num_tasks))
    return equal._replace(absent="rescale")
