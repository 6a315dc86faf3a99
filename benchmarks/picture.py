"""Makes the README's picture: ``python -m benchmarks.picture DIR``, DIR with the C-MAPSS files.

Trains on FD001 with the defaults and draws gradient norms, their ratio and the weights.
"""

import sys
from pathlib import Path

import numpy as np

from gaba_jax import plot
from gaba_jax.turbofan.train import TASKS, TrainConfig, load_data, train

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "balance.png"


def main(directory: str) -> None:
    config = TrainConfig(data=Path(directory))
    run = train(load_data(config), config)
    norms = np.concatenate([record.task_norms for record in run.records])
    weights = np.concatenate([record.task_weights for record in run.records])
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    plot.balance_history(norms, weights, TASKS).savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
