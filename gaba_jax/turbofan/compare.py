"""Several weightings on the same engines, parameters and batches: runs that can be resumed."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gaba_jax import weighting
from gaba_jax.monitor import task_metrics
from gaba_jax.turbofan.config import Subset, TrainConfig, parse_method
from gaba_jax.turbofan.data import TurbofanData
from gaba_jax.turbofan.train import Run, load_data, train_seeds

BASELINE = "uniform"
_HISTORY_POINTS = 200


class Cell(NamedTuple):
    """One row of a comparison: a method on a subset with a loss, to be run with several seeds."""

    method: str
    rule: weighting.Weighting
    config: TrainConfig

    @property
    def label(self) -> str:
        """The method, with its loss where that is not the usual one."""
        return self.method + ("" if self.config.loss == "mse" else f" + {self.config.loss}")


def cells(
    methods: Sequence[str], subsets: Sequence[Subset], losses: Sequence[Any], config: TrainConfig
) -> list[Cell]:
    """Every method with every loss on every subset, subset by subset."""
    return [
        Cell(method, parse_method(method), dataclasses.replace(config, subset=subset, loss=loss))
        for subset in subsets
        for loss in losses
        for method in methods
    ]


def run_file(out: Path, cell: Cell, seed: int) -> Path:
    """Where the run of a seed is kept."""
    name = cell.method.replace(":", "-").replace("/", "_")
    return out / "runs" / cell.config.subset / cell.config.loss / name / f"seed{seed}.json"


def run(
    todo: Sequence[Cell],
    seeds: Sequence[int],
    out: Path,
    on_epoch: Callable[[Cell, int, int], None] = lambda cell, epoch, seeds: None,
) -> list[dict[str, Any]]:
    """Runs what is not there yet, and returns all results.

    A run is written when it has finished, in one step, so that stopping loses only the cell at
    work. Every cell of a subset sees the same engines, parameters and batches.

    Args:
      todo: the cells, from :func:`cells`.
      seeds: of parameters and batches; ``config.seed`` chooses the validation engines for all.
      out: folder for the runs.
      on_epoch: called with (cell, epoch, number of seeds at work) after each epoch.

    Returns:
      A result per cell and seed, in order.

    Raises:
      ValueError: a kept run is of another configuration.
    """
    data: tuple[Subset, TurbofanData] | None = None
    results: list[dict[str, Any]] = []
    for cell in todo:
        files = {seed: run_file(out, cell, seed) for seed in seeds}
        missing = [seed for seed, file in files.items() if not _is_kept(file, cell)]
        if missing:
            if data is None or data[0] != cell.config.subset:
                data = cell.config.subset, load_data(cell.config)
            count = len(missing)

            def report(records: Sequence[Any], cell: Cell = cell, count: int = count) -> None:
                on_epoch(cell, records[0].epoch, count)

            for seed, made in zip(
                missing,
                train_seeds(data[1], cell.config, cell.rule, missing, report),
                strict=True,
            ):
                write_json(files[seed], _result(cell, seed, made))
        results += [json.loads(file.read_text()) for file in files.values()]
    return results


def missing_epochs(todo: Sequence[Cell], seeds: Sequence[int], out: Path) -> Iterator[int]:
    """Epochs times seeds that are still to be run, per cell."""
    for cell in todo:
        yield sum(
            cell.config.epochs for seed in seeds if not _is_kept(run_file(out, cell, seed), cell)
        )


def _identity(cell: Cell) -> dict[str, Any]:
    """What a run depends on, beside the seed."""
    config = dataclasses.asdict(cell.config)
    for unread in ("weighting", "gaba", "data"):
        del config[unread]
    config["shared"], config["measure_on"] = list(config["shared"]), list(config["measure_on"])
    return {"method": cell.method, "simulated": cell.config.data is None, **config}


def _is_kept(file: Path, cell: Cell) -> bool:
    if not file.exists():
        return False
    # What an older version did not have yet was as its default is.
    kept = dataclasses.asdict(TrainConfig()) | json.loads(file.read_text())["configuration"]
    changed = [key for key, value in _identity(cell).items() if kept[key] != value]
    if changed:
        raise ValueError(
            f"{file} holds a run with another {', '.join(changed)}. Name another --out, or remove "
            "that file."
        )
    return True


def _result(cell: Cell, seed: int, made: Run) -> dict[str, Any]:
    norms, weights = (
        np.concatenate([getattr(record, name) for record in made.records])
        for name in ("task_norms", "task_weights")
    )
    picked = np.unique(np.linspace(0, len(norms) - 1, _HISTORY_POINTS).astype(int))
    ratio = task_metrics(weights, norms)["gradient_ratio"]
    summary = made.summary
    return {
        "label": cell.label,
        "subset": cell.config.subset,
        "loss": cell.config.loss,
        "method": cell.method,
        "seed": seed,
        "diverged": summary["diverged"],
        "test": summary["test"],
        "validation": summary["validation"],
        "task_weights": summary["task_weights"],
        "gradient_ratio": summary["gradient_ratio"]["median"],
        "contribution_ratio": summary["contribution_ratio"]["median"],
        "updates": summary["updates"],
        "seconds": summary["timing"]["seconds"],
        "step_seconds": summary["timing"]["step_seconds"],
        "history": {
            "update": (picked + 1).tolist(),
            "weights": weights[picked].tolist(),
            "gradient_ratio": ratio[picked].tolist(),
        },
        "configuration": _identity(cell),
        "versions": summary["versions"],
    }


def write_json(file: Path, value: dict[str, Any]) -> None:
    """In one step: a file that is there is whole. What is not finite becomes null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")
    os.replace(partial, file)


def finite(value: Any) -> Any:
    """For JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
