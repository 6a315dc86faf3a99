"""What the gradients of the two turbofan tasks look like before training."""

import jax
import numpy as np

from gaba_jax import Diagnosis, diagnose, only
from gaba_jax.turbofan._loop import Params, make_losses_fn, make_model, split_model
from gaba_jax.turbofan.config import TASKS, TrainConfig
from gaba_jax.turbofan.data import Split, TurbofanData


def diagnose_run(data: TurbofanData, config: TrainConfig, num_batches: int = 8) -> Diagnosis:
    """Diagnoses the model of ``config`` on the first batches that a run would train on.

    Args:
      data: the engines, from :func:`gaba_jax.turbofan.train.load_data`.
      config: of the run; its ``model``, ``batch_size``, ``loss``, ``seed``, ``shared`` and
        ``measure_on`` are read.
      num_batches: how many, default 8.

    Returns:
      A :class:`gaba_jax.Diagnosis` of the parameters that the run would start from.

    Raises:
      ValueError: there are not as many batches in an epoch, or as :func:`gaba_jax.diagnose`.

    Example:
      >>> from gaba_jax.turbofan.diagnosis import diagnose_run
      >>> from gaba_jax.turbofan.train import TrainConfig, load_data
      >>> config = TrainConfig(stride=20)
      >>> diagnose_run(load_data(config), config, num_batches=2).recommendation
      'balance with optax.chain(equalize(2), optax.adamw(1e-3))'
    """
    num_windows, window, channels = data.train.windows.shape
    if config.batch_size < 1 or not 1 <= num_batches <= num_windows // config.batch_size:
        raise ValueError(
            f"batches={num_batches} of batch_size={config.batch_size} must be at least one each, "
            f"and together no more than the {num_windows} training windows."
        )
    graph, params, stats = split_model(make_model(config, window, channels, config.seed))
    key = jax.random.fold_in(jax.random.key(config.seed), 1)  # of the first epoch
    with_stats = make_losses_fn(graph, config)

    def losses_fn(params: Params, batch: Split) -> tuple[jax.Array, jax.Array]:
        return with_stats(params, stats, batch, key)[0]

    order = np.asarray(jax.random.permutation(key, num_windows))
    rows = order[: num_batches * config.batch_size].reshape(num_batches, config.batch_size)
    return diagnose(
        losses_fn,
        params,
        [(jax.tree.map(lambda column, of=of: column[of], data.train),) for of in rows],
        shared=only(*config.shared) if config.shared else None,
        measure_on=only(*config.measure_on) if config.measure_on else None,
        task_names=TASKS,
    )
