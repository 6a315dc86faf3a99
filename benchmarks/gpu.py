"""What balancing costs on an accelerator: ``python -m benchmarks.gpu``.

The table of ``benchmarks.overhead`` at batch sizes 64 and 1024; prints it and writes
benchmarks/gpu.json. Without an accelerator it says so and ends.
"""

from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import _measure
from benchmarks._models import build
from benchmarks.overhead import STEPS, measure, table

RESULT = Path(__file__).with_suffix(".json")


def main(
    model: tuple[str, ...] = ("mlp", "turbofan", "lstm", "transformer"),
    num_tasks: tuple[int, ...] = (2, 8),
    batch_size: tuple[int, ...] = (64, 1024),
    rounds: int = 21,
    out: Path = RESULT,
) -> None:
    """Measures and writes.

    Args:
      model: names from benchmarks._models.
      num_tasks: numbers of tasks K.
      batch_size: examples a step.
      rounds: interleaved rounds of 10 steps.
      out: the JSON to write.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        print("No accelerator: jax.devices() are CPUs. Nothing measured.")
        return
    results: dict[str, Any] = {}
    for name in model:
        results[name] = {}
        for size in batch_size:
            results[name][str(size)] = {}
            for k in num_tasks:
                built = build(name, k, size)
                rows = measure(built, k, rounds, STEPS)
                results[name][str(size)][str(k)] = rows
                parameters = sum(leaf.size for leaf in jax.tree.leaves(built.params))
                table(
                    f"{device.device_kind}: {name}, {parameters / 1e6:.2f} M parameters, "
                    f"batch {size}, K = {k}",
                    rows,
                )
    _measure.write(out, {"rounds": rounds, "steps": STEPS, "results": results})


if __name__ == "__main__":
    tyro.cli(main)
