"""What the engines say of a trained model, and the summary of a run."""

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gaba_jax.monitor import task_metrics
from gaba_jax.turbofan import metrics
from gaba_jax.turbofan.config import TASKS, TrainConfig
from gaba_jax.turbofan.data import Split, TurbofanData


def scores(
    split: Split, rul: NDArray[np.float32], health: NDArray[np.int32], *, capped: bool = True
) -> dict[str, float]:
    """All measures of one split; none where a predicted RUL is not finite.

    Args:
      split: the true values.
      rul: predicted RUL, in cycles, [N].
      health: predicted classes, [N].
      capped: compare with the capped RUL (default), which the model is trained on, or with the
        uncapped.

    Returns:
      As :func:`gaba_jax.turbofan.metrics.evaluate`, or an empty dictionary.
    """
    if not np.isfinite(rul).all():
        return {}
    true = split.rul if capped else split.rul_uncapped
    return metrics.evaluate(rul, true, health, split.health)


def summarize(
    config: TrainConfig,
    data: TurbofanData,
    norms: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> dict[str, Any]:
    """What a run was and what its gradients were like, for JSON; the scores come beside it.

    Args:
      config: of the run.
      data: the engines.
      norms: gradient norms at every update, [steps, K].
      weights: task weights at every update, [steps, K].
    """
    balanced = slice(min(config.gaba.warmup_steps, len(norms) - 1), None)
    curves = task_metrics(weights[balanced], norms[balanced])
    return {
        "config": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(config).items()
        },
        "tasks": list(TASKS),
        "features": list(data.feature_names),
        "windows": {name: len(getattr(data, name).rul) for name in ("train", "validation", "test")},
        "updates": len(norms),
        "task_weights": dict(zip(TASKS, weights[-1].tolist(), strict=True)),
        # Over the updates after the warm-up: median, and the 5 % and 95 % quantiles.
        "gradient_ratio": _quantiles(curves["gradient_ratio"]),
        "contribution_ratio": _quantiles(curves["imbalance"]),
        "versions": {name: version(name) for name in ("gaba-jax", "jax", "optax", "flax")},
    }


def epoch_scalars(
    losses: NDArray[np.float32], validation: Mapping[str, float], balance: Mapping[str, Any]
) -> dict[str, float]:
    """One line of a log: mean losses of an epoch [steps, K], scores, and balance metrics."""
    found = {f"loss/{task}": float(losses[:, j].mean()) for j, task in enumerate(TASKS)}
    found |= {f"validation/{name}": value for name, value in validation.items()}
    return found | {name: float(value) for name, value in balance.items()}


def _quantiles(ratios: ArrayLike) -> dict[str, float | None]:
    """Of a ratio per update; None where it is infinite."""
    at = np.quantile(np.asarray(ratios), [0.5, 0.05, 0.95], method="nearest")
    return {
        name: float(value) if np.isfinite(value) else None
        for name, value in zip(("median", "low", "high"), at, strict=True)
    }
