"""Time of every weighting rule, beside TorchJD's: ``python -m benchmarks.weightings``.

From the Gramian of K gradients (here norms and cosines) to K task weights, on the same cores, in
one process, interleaved; JAX compiled, TorchJD as it is used. Half of the Jacobians have rows that
differ by 500x. Prints a table and writes benchmarks/weightings.json. Needs gaba_jax[peers].
"""

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks import _measure
from gaba_jax.turbofan.config import rules

try:
    import clarabel  # noqa: F401
    import cvxpy  # noqa: F401
    import ecos  # noqa: F401
    import quadprog  # noqa: F401  # the solvers of TorchJD
    import torch
    from torchjd import aggregation
except ImportError as error:
    raise SystemExit(
        f'The peers need {error.name}: pip install "gaba_jax[turbofan,peers]"'
    ) from None

SIZES = (2, 4, 8, 16, 32)
COLUMNS = 256
# What TorchJD makes of K tasks, and whether it wants the Gramian or the Jacobian.
PEERS: dict[str, tuple[Callable[[int], Any], str]] = {
    "aligned_mtl": (lambda k: aggregation.AlignedMTLWeighting(), "gramian"),
    "cagrad": (lambda k: aggregation.CAGradWeighting(0.5), "gramian"),
    "config": (lambda k: aggregation.ConFIG(), "jacobian"),
    "dual_projection": (lambda k: aggregation.DualProjWeighting(), "gramian"),
    "fairgrad": (lambda k: aggregation.FairGradWeighting(2.0), "gramian"),
    "gradvac": (lambda k: aggregation.GradVacWeighting(), "gramian"),
    "imtl_g": (lambda k: aggregation.IMTLGWeighting(), "gramian"),
    "krum": (lambda k: aggregation.KrumWeighting(1), "gramian"),
    "mgda": (lambda k: aggregation.MGDAWeighting(), "gramian"),
    "nash_mtl": (lambda k: aggregation.NashMTL(k), "jacobian"),
    "pcd": (lambda k: aggregation.PCDWeighting(), "gramian"),
    "pcgrad": (lambda k: aggregation.PCGradWeighting(), "gramian"),
    "random": (lambda k: aggregation.RandomWeighting(), "gramian"),
    "upgrad": (lambda k: aggregation.UPGradWeighting(), "gramian"),
}
LEAST_TASKS = {"krum": 4}  # that TorchJD takes, where it is more than two
HOST_SOLVERS = ("cagrad", "fairgrad", "gradvac", "mgda", "nash_mtl")
HOST_SPEEDUP, HOST_SIZE = 10.0, 8
UPGRAD_SECONDS, COMPILE_SECONDS = 2e-3, 3.0  # at K = 32
BATCH = 8  # Jacobians a call
RESULT = Path(__file__).with_suffix(".json")


def jacobians(num_tasks: int) -> np.ndarray:
    """[BATCH, K, COLUMNS]; in every second one the row norms go from 500 to 1."""
    random = np.random.default_rng(num_tasks)
    common = random.normal(size=(BATCH, 1, COLUMNS))
    rows = random.normal(size=(BATCH, num_tasks, COLUMNS)) + 0.3 * common
    rows[1::2] *= np.geomspace(500, 1, num_tasks)[:, None]
    return rows


def ours(name: str, num_tasks: int) -> tuple[Callable[[], None], float]:
    """(a call on every Jacobian, seconds of tracing and compilation)."""
    rule = rules()[name](num_tasks)
    each = [_measure.task_stats(rows) for rows in jacobians(num_tasks)]
    state = rule.init()
    start = time.perf_counter()
    update = jax.jit(rule.update).lower(each[0], state).compile()
    seconds = time.perf_counter() - start

    def run() -> None:
        nonlocal state
        for stats in each:
            weights, state = update(stats, state)
            weights.block_until_ready()

    return run, seconds


def theirs(name: str, num_tasks: int) -> Callable[[], None]:
    """The same in TorchJD."""
    make, wants = PEERS[name]
    method = make(num_tasks)
    rows = torch.tensor(jacobians(num_tasks), dtype=torch.float32)
    inputs = list(rows if wants == "jacobian" else rows @ rows.mT)

    def run() -> None:
        for given in inputs:
            method(given)

    return run


def has_peer(name: str, num_tasks: int) -> bool:
    """Whether TorchJD has the rule for so many tasks."""
    return name in PEERS and num_tasks >= LEAST_TASKS.get(name, 2)


def measure(num_tasks: int, rounds: int) -> dict[str, dict[str, float]]:
    """Per rule: seconds, seconds of compilation, seconds and ratio of the peer."""
    result: dict[str, dict[str, float]] = {}
    runs: dict[str, Callable[[], None]] = {}
    for name in rules():
        try:
            runs[name], compiled = ours(name, num_tasks)
        except ValueError:
            continue  # gaba's floor of 0.05 holds for up to 20 tasks
        result[name] = {"compile_seconds": compiled}
        if has_peer(name, num_tasks):
            runs[f"TorchJD {name}"] = theirs(name, num_tasks)
    seconds = _measure.interleaved(runs, rounds)
    for name, row in result.items():
        row["seconds"] = statistics.median(seconds[name]) / BATCH
        if has_peer(name, num_tasks):
            peer = f"TorchJD {name}"
            row["peer_seconds"] = statistics.median(seconds[peer]) / BATCH
            row["peer_ratio"] = _measure.ratios({peer: seconds[peer], name: seconds[name]}, name)[
                peer
            ]
    return result


def goals(result: dict[str, dict[str, dict[str, float]]]) -> dict[str, bool]:
    """Each goal, in words, and whether it was met."""
    most = result[str(max(map(int, result)))]
    met = {
        f"faster than TorchJD, {name}": all(
            rows[name]["peer_ratio"] > 1
            for num_tasks, rows in result.items()
            if name in rows and has_peer(name, int(num_tasks))
        )
        for name in PEERS
    }
    if str(HOST_SIZE) in result:
        for name in HOST_SOLVERS:
            ratio = result[str(HOST_SIZE)][name]["peer_ratio"]
            met[f"{name} {HOST_SPEEDUP:.0f}x at K = {HOST_SIZE}"] = ratio >= HOST_SPEEDUP
    if max(SIZES) == max(map(int, result)):
        met["upgrad under 2 ms at K = 32"] = most["upgrad"]["seconds"] < UPGRAD_SECONDS
        met["every compilation under 3 s at K = 32"] = all(
            row["compile_seconds"] < COMPILE_SECONDS for row in most.values()
        )
    return met


def main(sizes: tuple[int, ...] = SIZES, rounds: int = 15, out: Path = RESULT) -> None:
    """Measures and reports.

    Args:
      sizes: numbers of tasks K.
      rounds: of all rules, one after another; medians are over the rounds.
      out: the JSON file.
    """
    warnings.filterwarnings("ignore", module="cvxpy")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for num_tasks in sizes:
        result[str(num_tasks)] = measure(num_tasks, rounds)
    met = goals(result)
    packages = ("torch", "torchjd", "cvxpy", "clarabel", "ecos", "quadprog")
    _measure.write(out, {"rounds": rounds, "results": result, "goals": met}, packages)
    rows = []
    for name in rules():
        cells = []
        for of_size in result.values():
            row = of_size.get(name)
            if row is None:
                cells.append("-")
                continue
            peer = f", {row['peer_ratio']:.1f}x" if "peer_ratio" in row else ""
            cells.append(f"{row['seconds'] * 1e6:.0f} µs{peer}")
        compiled = [
            of_size[name]["compile_seconds"] for of_size in result.values() if name in of_size
        ]
        rows.append([name, *cells, f"{compiled[-1]:.1f} s"])
    _measure.show(
        "time per call, and how many times as long TorchJD takes",
        ["rule", *(f"K = {size}" for size in sizes), "compilation"],
        rows,
    )
    _measure.show_goals(met)


if __name__ == "__main__":
    tyro.cli(main)
