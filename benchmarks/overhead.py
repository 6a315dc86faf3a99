"""What balancing costs over a step with fixed weights: ``python -m benchmarks.overhead``.

The same model, batch and optimizer on every path, interleaved, medians of ratios within a round.
Prints tables and the goals beside what was measured, writes benchmarks/overhead.json.
``--model mlp --num-tasks 2`` measures a part anew and keeps the rest of the JSON.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import _measure, _published
from benchmarks._models import Model, build, build_loaders
from benchmarks._paths import PATHS, make_step
from gaba_jax import gaba, only, task_value_and_grad

STEPS = 10  # a call: one cycle of every=10
CALL_SECONDS = 0.15  # of plain steps, where a step is slow
RESULT = Path(__file__).with_suffix(".json")

# Numbers of tasks, and paths, of each case.
NUM_TASKS: dict[str, tuple[int, ...]] = {
    "mlp": (2, 8, 32),
    "turbofan": (2, 8),
    "lstm": (2, 8),
    "transformer": (2, 8),
    "full network": (2,),
    "last of 7 layers": (8,),
    "separate loaders": (3, 10),
}
FEW = ("plain", "stacked", "exact")
GOALS: dict[tuple[str, int], dict[tuple[str, str], float]] = {
    ("mlp", 2): {
        ("exact", "time"): 1.35,
        ("exact", "memory"): 1.5,
        ("exact, every=10", "time"): 1.05,
        ("exact, held", "time"): 1.05,
        ("encoder", "time"): 1.05,
    },
    ("mlp", 8): {
        ("exact", "time"): 2.8,
        ("exact", "memory"): 2.1,
        ("exact, cosines", "time"): 3.0,
        ("exact, cosines", "memory"): 2.2,
        ("exact, every=10", "time"): 1.2,
        ("encoder", "time"): 1.1,
    },
    ("mlp", 32): {("exact", "time"): 13, ("exact", "memory"): 8},
    ("turbofan", 2): {("exact", "time"): 1.35},
    ("turbofan", 8): {("exact, cosines", "time"): 2.6},
    ("lstm", 2): {("exact", "time"): 1.7},
    ("lstm", 8): {("exact, cosines", "time"): 5},
    ("transformer", 2): {("exact", "time"): 1.6, ("exact", "memory"): 1.1},
    ("transformer", 8): {("exact, cosines", "time"): 3.8, ("exact, cosines", "memory"): 2.2},
    ("full network", 2): {("exact", "time"): 1.55},
    ("last of 7 layers", 8): {("exact", "time"): 1.15},
    ("separate loaders", 3): {("exact", "time"): 1.2},
    ("separate loaders", 10): {("exact", "time"): 1.2},
}


class Case(NamedTuple):
    """Steps with their first carries, and what their model is."""

    steps: dict[str, tuple[Callable[..., Any], Any]]
    batch: Any
    parameters: int
    exact_flop: float  # of an exact step over a plain one


def paths_of(name: str, num_tasks: int) -> tuple[str, ...]:
    if name in ("full network", "last of 7 layers", "separate loaders"):
        return FEW
    extra = ("stacked, cosines",) if num_tasks == 2 else ()
    return (*PATHS, *extra, "exact, held") if name == "mlp" else (*PATHS, *extra)


def make_case(name: str, num_tasks: int) -> Case:
    if name == "full network":
        paths = paths_of(name, num_tasks)
        made = {
            path: _published.make_jax_step(_published.configure(path, _published.DROPOUT), path)
            for path in paths
        }
        size = count(made["plain"][1][0])
        return Case(made, _published.make_batch(), size, (1 + 2 * num_tasks) / 3)
    measure_on = None
    if name == "last of 7 layers":
        model = build("mlp", num_tasks, widths=(256, *[880] * 7))
        measure_on, exact = only("layers.6"), 1.0
    elif name == "separate loaders":
        model, exact = build_loaders(num_tasks), 1.0
    else:
        model = build(name, num_tasks)
        exact = exact_flop(model, num_tasks)
    made = {
        path: make_step(path, model, num_tasks, measure_on) for path in paths_of(name, num_tasks)
    }
    return Case(made, model.batch, count(model.params), exact)


def count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def exact_flop(model: Model, num_tasks: int) -> float:
    """(K + 2) / 3 where the largest leaf is cheaper kept as its factors, else (1 + 2 K) / 3."""
    rows = math.prod(model.batch[0].shape[:-1])
    kernels = [leaf.shape for leaf in jax.tree.leaves(model.params) if leaf.ndim == 2]
    depth, columns = max(kernels, key=math.prod)
    is_cut = rows * (num_tasks * columns + depth) < num_tasks * depth * columns
    return (num_tasks + 2) / 3 if is_cut else (1 + 2 * num_tasks) / 3


def flop_ratio(path: str, num_tasks: int, exact: float) -> float:
    """The step's model FLOP over those of a plain one, without the optimizer: an estimate."""
    if path in ("plain", "encoder", "exact, held"):
        return 1.0
    if path == "exact, every=10":
        return (9 + exact) / 10
    return exact if path.startswith("exact") else (1 + 2 * num_tasks) / 3


def measure(
    model: Model, num_tasks: int, rounds: int, steps: int, paths: tuple[str, ...] = PATHS
) -> dict[str, dict[str, float]]:
    """Time and temporary memory of a step per path; a path that skips updates runs whole cycles."""
    made = {path: make_step(path, model, num_tasks) for path in paths}
    case = Case(made, model.batch, count(model.params), exact_flop(model, num_tasks))
    return measure_case(case, num_tasks, rounds, steps)


def measure_case(
    case: Case, num_tasks: int, rounds: int, steps: int, limit: float = math.inf
) -> dict[str, dict[str, float]]:
    """Fewer steps a call where a plain one is slow and time is limited."""
    compiled, temp, runs, calls = {}, {}, {}, {}
    for path, (step, carry) in case.steps.items():
        compiled[path] = _measure.compile_step(step, carry, case.batch)
        temp[path] = _measure.temp_bytes(compiled[path])
    for path, (_, carry) in case.steps.items():
        cycle = 10 if path == "exact, every=10" else 1
        if path == "plain" and limit < math.inf:
            carry, seconds = seconds_a_step(compiled[path], carry, case.batch)
            steps = max(1, min(steps, round(CALL_SECONDS / seconds), round(80 / num_tasks)))
        calls[path] = cycle * math.ceil(steps / cycle)
        runs[path] = _measure.runner(compiled[path], carry, case.batch, calls[path])
    seconds = {
        path: [value / calls[path] for value in values]
        for path, values in _measure.interleaved(
            runs, rounds, 2 if limit == math.inf else 1, limit
        ).items()
    }
    ratios = _measure.ratios(seconds, "plain")
    return {
        path: {
            "milliseconds": 1e3 * float(np.median(seconds[path])),
            "time": ratios[path],
            "flop": flop_ratio(path, num_tasks, case.exact_flop),
            "temp_bytes": temp[path],
            "memory": temp[path] / temp["plain"],
        }
        for path in case.steps
    }


def seconds_a_step(compiled: Any, carry: Any, batch: Any) -> tuple[Any, float]:
    """Of the second step; the carry is given away and comes back."""
    for _ in range(2):
        begin = time.perf_counter()
        carry, losses = jax.block_until_ready(compiled(carry, batch))
        del losses
    return carry, time.perf_counter() - begin


def compare_with_goals(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``"mlp, K = 2: exact, time" -> {goal, measured, met}`` of all that was measured."""
    compared = {}
    for (name, k), goals in GOALS.items():
        for (path, what), goal in goals.items():
            row = results.get(name, {}).get(str(k), {}).get(path)
            if row is not None:
                entry = {"goal": goal, "measured": row[what], "met": row[what] <= goal}
                compared[f"{name}, K = {k}: {path}, {what}"] = entry
    return compared


def transform(rounds: int) -> dict[str, float]:
    """Milliseconds on ready-made gradients of the MLP, K = 2, donated: what gaba() adds to AdamW.

    Beside it the time of reading the gradients twice: two sums of squares, one after the other.
    """
    model = build("mlp", 2)
    _, made = jax.jit(lambda p, *batch: task_value_and_grad(model.whole)(p, *batch))(
        model.params, *model.batch
    )
    adamw = optax.adamw(1e-4)

    def step(tx: Any) -> Any:
        def update(carry: Any, grads: Any) -> Any:
            params, opt_state = carry
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), jnp.zeros([])

        return update

    def read(total: Any, grads: Any) -> Any:
        sums = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)]
        grads, first = jax.lax.optimization_barrier((grads, sum(sums)))
        again = [jnp.sum(jnp.square(leaf - first)) for leaf in jax.tree.leaves(grads)]
        return total + sum(again), first

    runs = {}
    for name, tx, grads in (
        ("adamw", adamw, jax.tree.map(lambda leaf: leaf[0], made)),
        ("gaba and adamw", optax.chain(gaba(), adamw), made),
        ("reading twice", None, made),
    ):
        params = jax.tree.map(jnp.copy, model.params)
        carry = jnp.zeros([]) if tx is None else (params, tx.init(params))
        compiled = _measure.compile_step(read if tx is None else step(tx), carry, grads)
        runs[name] = _measure.runner(compiled, carry, grads, STEPS)
    seconds = _measure.interleaved(runs, rounds)
    result = {name: 1e3 * float(np.median(values)) / STEPS for name, values in seconds.items()}
    result["gaba() adds"] = result["gaba and adamw"] - result["adamw"]
    rows = [[name, f"{value:.2f}"] for name, value in result.items()]
    _measure.show("Ready-made gradients, MLP, K = 2", ["", "ms"], rows)
    return result


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
    model: tuple[str, ...] = tuple(NUM_TASKS),
    num_tasks: tuple[int, ...] = (),
    rounds: int = 21,
    seconds: float = 25.0,
    out: Path = RESULT,
) -> None:
    """Measures and writes, beside what is there of other models and K.

    Args:
      model: mlp, turbofan, lstm, transformer, convolution, "full network", "last of 7 layers",
        "separate loaders".
      num_tasks: numbers of tasks K; those of each model by default.
      rounds: interleaved rounds, at most.
      seconds: no round of a case begins later, but for the first five.
      out: the JSON to write.
    """
    document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    results = document.get("results", {})
    added = document.get("transform")
    if "mlp" in model:
        added = transform(rounds)
    for name in model:
        for k in num_tasks or NUM_TASKS.get(name, (2, 8)):
            case = make_case(name, k)
            rows = measure_case(case, k, rounds, STEPS, seconds)
            table(f"{name}, {case.parameters / 1e6:.2f} M parameters, K = {k}", rows)
            results.setdefault(name, {})[str(k)] = rows
            document = {"rounds": rounds, "seconds": seconds, "steps": STEPS}
            document |= {"goals": compare_with_goals(results), "results": results}
            _measure.write(out, document | {"transform": added})  # a run that is stopped keeps it
            jax.clear_caches()
    _measure.show_compared("Over a plain step, at most", compare_with_goals(results))


if __name__ == "__main__":
    tyro.cli(main)
