"""Time of the rules that solve a problem, up to 256 tasks: ``python -m benchmarks.solvers``.

From norms and cosines to weights, run and compilation. "independent" are random gradients with four
times as many elements as tasks; "square" have as many, and a smallest singular value near 0. Prints
a table and writes benchmarks/solvers.json.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tyro

from benchmarks import _measure
from gaba_jax import weighting

RULES = ("upgrad", "dual_projection", "aligned_mtl", "config", "mgda", "nash_mtl")
SIZES = (8, 64, 256)
KINDS = {"independent": 4, "square": 1}  # elements a task
SECONDS = {"upgrad": 0.15, "aligned_mtl": 0.06, "config": 0.06}  # at K = 256
COMPILE_SECONDS = {64: 1.5, 256: 3.0}
RESULT = Path(__file__).with_suffix(".json")


def measure(num_tasks: int, rounds: int) -> dict[str, dict[str, float]]:
    """Per rule: seconds of compilation, and of a call on each kind of gradients."""
    each = {}
    for kind, factor in KINDS.items():
        shape = num_tasks, factor * num_tasks
        each[kind] = _measure.task_stats(np.random.default_rng(num_tasks).normal(size=shape))
    result: dict[str, dict[str, float]] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name in RULES:
        rule = getattr(weighting, name)(num_tasks)
        state = rule.init()
        start = time.perf_counter()
        update = jax.jit(rule.update).lower(each["square"], state).compile()
        result[name] = {"compile_seconds": time.perf_counter() - start}
        for kind, stats in each.items():
            runs[f"{name} {kind}"] = lambda update=update, stats=stats, state=state: (
                jax.block_until_ready(update(stats, state))
            )
    seconds = _measure.interleaved(runs, rounds, warmup=1)
    for name, row in result.items():
        row |= {kind: statistics.median(seconds[f"{name} {kind}"]) for kind in KINDS}
    return result


def goals(result: dict[str, dict[str, dict[str, float]]]) -> dict[str, bool]:
    """Each goal, in words, and whether it was met."""
    met = {
        f"every compilation under {most} s at K = {size}": all(
            row["compile_seconds"] < most for row in result[str(size)].values()
        )
        for size, most in COMPILE_SECONDS.items()
        if str(size) in result
    }
    for name, most in SECONDS.items():
        if "256" in result:
            row = result["256"][name]
            met[f"{name} under {most * 1e3:.0f} ms at K = 256"] = row["independent"] < most
    return met


def main(sizes: tuple[int, ...] = SIZES, rounds: int = 5, out: Path = RESULT) -> None:
    """Measures and reports.

    Args:
      sizes: numbers of tasks K.
      rounds: of all rules, one after another; medians are over the rounds.
      out: the JSON file.
    """
    result = {str(size): measure(size, rounds) for size in sizes}
    met = goals(result)
    _measure.write(out, {"rounds": rounds, "results": result, "goals": met})
    rows = [
        [
            name,
            size,
            *(f"{row[kind] * 1e3:.2f} ms" for kind in KINDS),
            f"{row['compile_seconds']:.1f} s",
        ]
        for name in RULES
        for size, of_size in result.items()
        for row in [of_size[name]]
    ]
    columns = ["rule", "K", *KINDS, "compilation"]
    _measure.show("from norms and cosines to weights", columns, rows)
    _measure.show_goals(met)


if __name__ == "__main__":
    tyro.cli(main)
