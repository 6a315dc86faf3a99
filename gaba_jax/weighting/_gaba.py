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
    """Gradient-Aware Balanced Adaptation: :func:`inverse_share`, wrapped in :func:`stabilize`.

    Contributions become equal for K = 2 alone, up to the floor; for K > 2 no weight rises above
    1/(K-1), and a task far quieter than the others stays quiet (:func:`equalize` is for any K). The
    defaults are the published constants.

    Args:
      num_tasks: number of tasks K >= 2.
      beta: decay of the average in [0, 1), default 0.99 (about 100 updates); 0 is no smoothing.
        It counts updates, as that of :func:`stabilize`.
      warmup_steps: updates with weights 1/K before averaging starts, default 100.
      min_weight: floor under each weight, in [0, 1/K], default 0.05.
      floor: "renormalize" (published) or "project" (holds the bound exactly).
      debias: start the average at the first measurement instead of at 1/K, default False.
      task_priorities: [K] positive, default equal.

    Returns:
      A :class:`Weighting`; the weights are >= 0 and sum to 1.

    Raises:
      ValueError: as :func:`inverse_share` and :func:`stabilize`.

    Example:
      >>> from gaba_jax import balance, weighting
      >>> tx = balance(weighting.gaba(3, beta=0.9))  # the same as gaba(3, beta=0.9)
    """
    return stabilize(
        inverse_share(num_tasks, task_priorities=task_priorities),
        beta=beta,
        warmup_steps=warmup_steps,
        min_weight=min_weight,
        floor=floor,
        debias=debias,
    )
