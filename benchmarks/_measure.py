"""Timing side by side, memory, and the JSON that every benchmark writes."""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from gaba_jax import weighting
from gaba_jax.weighting import TaskStats

LEAST_ROUNDS = 5


def compile_step(step: Callable[..., Any], carry: Any, batch: Any) -> Any:
    """The step compiled, its carry donated."""
    return jax.jit(step, donate_argnums=0).lower(carry, batch).compile()


def temp_bytes(compiled: Any) -> int:
    """What XLA allocates beside arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def runner(compiled: Any, carry: Any, batch: Any, steps: int) -> Callable[[], None]:
    """A call that runs ``steps`` steps on from where the last one ended, and waits for them."""

    def run() -> None:
        nonlocal carry
        for _ in range(steps):
            carry, losses = compiled(carry, batch)
        jax.block_until_ready((carry, losses))

    return run


def interleaved(
    runs: Mapping[str, Callable[[], None]],
    rounds: int,
    warmup: int = 2,
    limit: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds per call, all of them once in every round, in an order that changes.

    After ``limit`` seconds no round begins, but for the first ``LEAST_ROUNDS``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = np.random.default_rng(0)
    begin = time.perf_counter()
    for round_ in range(warmup + rounds):
        if time.perf_counter() - begin > limit and round_ >= warmup + LEAST_ROUNDS:
            break
        for name in order.permutation(list(runs)):
            start = time.perf_counter()
            runs[name]()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], to: str) -> dict[str, float]:
    """Medians of the ratio to ``to`` within a round."""
    return {
        name: statistics.median(a / b for a, b in zip(values, seconds[to], strict=True))
        for name, values in seconds.items()
    }


def machine() -> str:
    """The processor and the devices, in words."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{name}, {os.cpu_count()} cores; {devices}"


def write(path: Path, result: dict[str, Any], packages: tuple[str, ...] = ()) -> None:
    """Writes the result with machine and versions as JSON."""
    versions = {"python": platform.python_version()}
    for name in ("jax", "optax", "flax", "gaba-jax", *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    document = {"machine": machine(), "versions": versions, **result}
    path.write_text(json.dumps(document, indent=2) + "\n")


def task_stats(rows: np.ndarray) -> TaskStats:
    """What a rule sees of one Jacobian."""
    norms = np.linalg.norm(rows, axis=1)
    cosines = rows @ rows.T / np.outer(norms, norms)
    num_tasks = len(rows)
    return TaskStats(
        norms=jnp.asarray(norms, jnp.float32),
        cosines=jnp.asarray(cosines, jnp.float32),
        losses=jnp.ones([num_tasks], jnp.float32),
        present=jnp.ones([num_tasks], bool),
        elapsed=jnp.int32(1),
        extra=of_elements(rows),
    )


def of_elements(rows: np.ndarray) -> dict[str, jax.Array]:
    """What the ready statistics are of the gradients [K, n]."""
    found = {
        weighting.max_abs: np.abs(rows).max(axis=1),
        weighting.mean_abs: np.abs(rows).mean(axis=1),
        weighting.std: rows.std(axis=1),
    }
    return {statistic.name: jnp.asarray(x, jnp.float32) for statistic, x in found.items()}


def show_goals(met: Mapping[str, bool]) -> None:
    """Prints each goal and whether it was met."""
    for goal, is_met in met.items():
        print(f"{'met' if is_met else 'MISSED'}: {goal}")


def show_compared(title: str, goals: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints each goal beside what was measured."""
    rows = [
        [what, f"{each['goal']:g}", f"{each['measured']:.2f}", "yes" if each["met"] else "no"]
        for what, each in goals.items()
    ]
    show(title, ["", "goal", "measured", "met"], rows)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if os.isatty(1) else 140).print(table)
