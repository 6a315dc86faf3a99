"""The README's table of results: ``python -m benchmarks.turbofan DIR``, DIR with C-MAPSS FD001.

Trains with the command's defaults under several weightings, three seeds each; prints a table and
writes benchmarks/turbofan.json.
"""

import dataclasses
import json
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

from gaba_jax.turbofan.train import GabaOptions, TrainConfig, load_data, train

SEEDS = (0, 1, 2)
METHODS = {
    "uniform": {"weighting": "uniform"},
    "gaba": {"weighting": "gaba"},
    "gaba, debias, no warm-up": {
        "weighting": "gaba",
        "gaba": GabaOptions(debias=True, warmup_steps=0),
    },
}
COLUMNS = {
    "test RMSE": lambda run: run["test"]["rmse"],
    "NASA score": lambda run: run["test"]["nasa_score"],
    "health accuracy": lambda run: run["test"]["health_accuracy"],
    "gradient ratio": lambda run: run["gradient_ratio"]["median"],
    "contribution ratio": lambda run: run["contribution_ratio"]["median"],
}
RESULT = Path(__file__).with_suffix(".json")


def table(result: dict) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for method, runs in result["runs"].items():
        cells = []
        for column in COLUMNS:
            values = [run[column] for run in runs]
            digits = 3 if column == "health accuracy" else 1
            spread = statistics.stdev(values)
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(directory: str) -> None:
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for seed in SEEDS:
        for method, options in METHODS.items():
            config = dataclasses.replace(TrainConfig(data=Path(directory), seed=seed), **options)
            summary = train(load_data(config), config).summary
            runs[method].append({name: column(summary) for name, column in COLUMNS.items()})
            print(f"seed {seed}, {method}: {runs[method][-1]}", flush=True)
    result = {
        "runs": runs,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("jax", "optax", "flax", "gaba-jax")},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main(sys.argv[1])
