"""What balancing costs over a step with fixed weights: ``python -m benchmarks.overhead``.

The same model, batch and optimizer on every path, interleaved, medians of ratios within a round;
prints tables and writes benchmarks/overhead.json. ``--model mlp`` for one model.
"""

from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import _measure
from benchmarks._models import MODELS, build
from benchmarks._paths import PATHS, make_step

STEPS = 10  # a call: one cycle of every=10
RESULT = Path(__file__).with_suffix(".json")


def flop_ratio(path: str, num_tasks: int) -> float:
    """The step's model FLOP over those of a plain one, without the optimizer."""
    exact = (1 + 2 * (num_tasks + 1)) / 3
    return {
        "plain": 1.0,
        "stacked": (1 + 2 * num_tasks) / 3,
        "exact": exact,
        "exact, ghost norms": (1 + num_tasks + 2) / 3,
        "lagged": (1 + 2 * num_tasks) / 3,
        "encoder": 1.0,
        "exact, every=10": (9 + exact) / 10,
    }[path]


def measure(name: str, num_tasks: int, rounds: int) -> dict[str, dict[str, float]]:
    model = build(name, num_tasks)
    runs, temp = {}, {}
    for path in PATHS:
        step, carry = make_step(path, model, num_tasks)
        compiled = _measure.compile_step(step, carry, model.batch)
        temp[path] = _measure.temp_bytes(compiled)
        runs[path] = _measure.runner(compiled, carry, model.batch, STEPS)
    seconds = _measure.interleaved(runs, rounds)
    ratios = _measure.ratios(seconds, "plain")
    return {
        path: {
            "milliseconds": 1e3 * sorted(seconds[path])[rounds // 2] / STEPS,
            "time": ratios[path],
            "flop": flop_ratio(path, num_tasks),
            "temp_bytes": temp[path],
            "memory": temp[path] / temp["plain"],
        }
        for path in PATHS
    }


def table(title: str, result: dict[str, dict[str, float]]) -> None:
    rows = [
        [
            path,
            f"{row['milliseconds']:.2f}",
            f"{row['time']:.2f}",
            f"{row['flop']:.2f}",
            f"{row['temp_bytes'] / 2**20:.1f}",
            f"{row['memory']:.2f}",
        ]
        for path, row in result.items()
    ]
    columns = ["path", "ms", "time / plain", "FLOP / plain", "temp MiB", "temp / plain"]
    _measure.show(title, columns, rows)


def main(
    model: tuple[str, ...] = tuple(MODELS),
    num_tasks: tuple[int, ...] = (2, 8),
    rounds: int = 21,
    out: Path = RESULT,
) -> None:
    """Measures and writes.

    Args:
      model: mlp, turbofan, lstm, transformer.
      num_tasks: numbers of tasks K.
      rounds: interleaved rounds of 10 steps.
      out: the JSON to write.
    """
    results: dict[str, Any] = {}
    for name in model:
        results[name] = {}
        for k in num_tasks:
            results[name][str(k)] = measure(name, k, rounds)
            parameters = sum(leaf.size for leaf in jax.tree.leaves(build(name, k).params))
            table(f"{name}, {parameters / 1e6:.2f} M parameters, K = {k}", results[name][str(k)])
    _measure.write(out, {"rounds": rounds, "steps": STEPS, "results": results})


if __name__ == "__main__":
    tyro.cli(main)
