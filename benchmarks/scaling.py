"""How the step grows with tasks and parameters: ``python -m benchmarks.scaling``.

The MLP with 2.5 M parameters at K = 2 to 32, and with 0.3 to 30 M at K = 4; every path interleaved,
medians of ratios within a round, fewer rounds where a step takes long. Prints tables and the
exponents of a power law fitted to the step time, writes benchmarks/scaling.json and
docs/images/scaling.png.
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks import _measure
from benchmarks._models import build
from benchmarks._paths import PATHS
from benchmarks.overhead import measure, table
from gaba_jax.plot import COLORS

RESULT = Path(__file__).with_suffix(".json")
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "scaling.png"
TASKS, PARAMETERS = 4, 2_500_000  # where the other one varies
INPUTS = 256
WORK = 10_000_000  # tasks times parameters that all rounds are for
MOST_BYTES = 6 * 2**30  # for stacked gradients, of which XLA holds two copies
MARKERS = "so^vDPX"


def widths(parameters: int) -> tuple[int, ...]:
    """Of the input and four equal layers, in multiples of 8: 3 w^2 + (256 + 4) w parameters."""
    inputs = INPUTS + 4
    width = (math.sqrt(inputs**2 + 12 * parameters) - inputs) / 6
    return (INPUTS, *[8 * max(1, round(width / 8))] * 4)


def measure_at(num_tasks: int, parameters: int, rounds: int) -> dict[str, Any]:
    """One combination, its rounds and steps by the work in it."""
    model = build("mlp", num_tasks, widths=widths(parameters))
    exact = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    share = WORK / (num_tasks * exact)
    fits = 2 * 4 * num_tasks * exact <= MOST_BYTES
    paths = tuple(path for path in PATHS if fits or path != "stacked")
    rounds = max(3, min(rounds, round(rounds * share)))
    steps = max(1, min(10, round(10 * share)))
    result = measure(model, num_tasks, rounds, steps, paths)
    title = f"K = {num_tasks}, {exact / 1e6:.2f} M parameters, {rounds} rounds of {steps} steps"
    table(title, result)
    return {"parameters": exact, "num_tasks": num_tasks, "rounds": rounds, "paths": result}


def series(results: list[dict[str, Any]], by: str, path: str, what: str) -> np.ndarray:
    """[2, n]: ``by`` and ``what`` wherever the path was measured."""
    pairs = [(r[by], r["paths"][path][what]) for r in results if path in r["paths"]]
    return np.array(pairs, float).T


def exponents(results: list[dict[str, Any]], by: str) -> dict[str, float]:
    """Slopes of log time over log ``by``, by least squares."""
    fitted = {}
    for path in PATHS:
        points = series(results, by, path, "milliseconds")
        if points.size and len(np.unique(points[0])) > 1:
            fitted[path] = float(np.polyfit(*np.log(points), 1)[0])
    return fitted


def picture(results: dict[str, list[dict[str, Any]]]) -> Figure:
    """Time and temporary memory relative to a plain step, against tasks and parameters."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    columns = [
        ("num_tasks", "tasks K", f"{PARAMETERS / 1e6:g} M parameters"),
        ("parameters", "parameters D", f"K = {TASKS}"),
    ]
    rows = [("time", "step time / plain"), ("memory", "temporary memory / plain")]
    for j, (by, label, fixed) in enumerate(columns):
        panels[0, j].set_title(fixed)
        panels[1, j].set_xlabel(label)
        for i, (what, _) in enumerate(rows):
            axes = panels[i, j]
            for path, color, marker in zip(PATHS, COLORS[::-1], MARKERS, strict=True):
                points = series(results[by], by, path, what)
                if points.size:
                    axes.plot(*points, color=color, marker=marker, markersize=5, label=path)
            axes.set(xscale="log", yscale="log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
            axes.grid(alpha=0.25)
    for i, (_, label) in enumerate(rows):
        panels[i, 0].set_ylabel(label)
    ticks = sorted({result["num_tasks"] for result in results["num_tasks"]})
    panels[1, 0].set_xticks(ticks, labels=[str(tick) for tick in ticks])
    panels[1, 0].set_xticks([], minor=True)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


def main(
    num_tasks: tuple[int, ...] = (2, 4, 8, 16, 32),
    parameters: tuple[int, ...] = (300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000),
    rounds: int = 15,
    out: Path = RESULT,
    plot: Path = PICTURE,
) -> None:
    """Measures, fits, draws and writes.

    Args:
      num_tasks: numbers of tasks K, at 2.5 M parameters.
      parameters: numbers of parameters D, at K = 4.
      rounds: interleaved rounds at K = 4 and 2.5 M parameters; fewer where there is more to do.
      out: the JSON to write.
      plot: the picture to write.
    """
    results = {
        "num_tasks": [measure_at(k, PARAMETERS, rounds) for k in num_tasks],
        "parameters": [measure_at(TASKS, d, rounds) for d in parameters],
    }
    fitted = {by: exponents(results[by], by) for by in results}
    rows = [
        [path, *(f"{fitted[by][path]:.2f}" if path in fitted[by] else "-" for by in fitted)]
        for path in PATHS
    ]
    _measure.show("Step time as a power of", ["path", "tasks K", "parameters D"], rows)
    _measure.write(out, {"exponents": fitted, "results": results})
    plot.parent.mkdir(parents=True, exist_ok=True)
    picture(results).savefig(plot, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
