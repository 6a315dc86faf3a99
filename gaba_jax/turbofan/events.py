"""A run as TensorBoard event files."""

import contextlib
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from gaba_jax.monitor import task_metrics
from gaba_jax.turbofan.config import TASKS
from gaba_jax.turbofan.train import EpochRecord


@contextlib.contextmanager
def event_writer(directory: Path) -> Generator[Callable[[EpochRecord], None]]:
    """Writes the epochs of one run; what the folder held before is removed.

    Every update has its losses, ``loss/rul``, and under their own names the metrics of
    :func:`gaba_jax.monitor.task_metrics`; the step is the number of the update, from 1. An epoch's
    scalars stand under ``epoch/``, at its last update. What is not finite is left out.

    Args:
      directory: the folder for the event files.

    Yields:
      A function to call with each :class:`gaba_jax.turbofan.train.EpochRecord`, in order.

    Raises:
      OSError: the folder cannot be written.
    """
    if directory.exists():
        shutil.rmtree(directory)
    done = 0
    with SummaryWriter(str(directory)) as writer:

        def scalar(key: str, value: float, step: int) -> None:
            if np.isfinite(value):
                writer.add_scalar(key, float(value), step)

        def write(record: EpochRecord) -> None:
            nonlocal done
            curves = task_metrics(record.task_weights, record.task_norms, TASKS)
            columns = {f"loss/{task}": record.losses[:, i] for i, task in enumerate(TASKS)}
            columns |= {key: np.asarray(values) for key, values in curves.items()}
            for key, values in columns.items():
                for update, value in enumerate(values, done + 1):
                    scalar(key, value, update)
            done += len(record.losses)
            for key, value in record.scalars.items():
                scalar(f"epoch/{key}", value, done)
            writer.flush()

        yield write
