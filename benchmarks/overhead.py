"""What balancing costs over a step with fixed weights: ``python -m benchmarks.overhead``.

The same model, batch and optimizer on every path, interleaved, medians of ratios within a round;
prints tables and writes benchmarks/overhead.json. ``--model mlp`` for one model.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import _measure
from benchmarks._models import Model, build
from benchmarks._paths import BALANCED, PATHS, make_step
from gaba_jax import gaba, task_value_and_grad

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


def measure(
    model: Model, num_tasks: int, rounds: int, steps: int, paths: tuple[str, ...] = PATHS
) -> dict[str, dict[str, float]]:
    """Time and temporary memory of a step per path; a path that skips updates runs whole cycles."""
    runs, temp, calls = {}, {}, {}
    for path in paths:
        step, carry = make_step(path, model, num_tasks)
        compiled = _measure.compile_step(step, carry, model.batch)
        cycle = BALANCED.get(path, {}).get("every", 1)
        calls[path] = cycle * math.ceil(steps / cycle)
        temp[path] = _measure.temp_bytes(compiled)
        runs[path] = _measure.runner(compiled, carry, model.batch, calls[path])
    seconds = {
        path: [value / calls[path] for value in values]
        for path, values in _measure.interleaved(runs, rounds, warmup=2).items()
    }
    ratios = _measure.ratios(seconds, "plain")
    return {
        path: {
            "milliseconds": 1e3 * float(np.median(seconds[path])),
            "time": ratios[path],
            "flop": flop_ratio(path, num_tasks),
            "temp_bytes": temp[path],
            "memory": temp[path] / temp["plain"],
        }
        for path in paths
    }


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
    model: tuple[str, ...] = ("mlp", "turbofan", "lstm", "transformer"),
    num_tasks: tuple[int, ...] = (2, 8),
    rounds: int = 21,
    out: Path = RESULT,
) -> None:
    """Measures and writes, beside what is there of other models and K.

    Args:
      model: names from benchmarks._models.
      num_tasks: numbers of tasks K.
      rounds: interleaved rounds of 10 steps.
      out: the JSON to write.
    """
    results: dict[str, Any] = json.loads(out.read_text())["results"] if out.exists() else {}
    for name in model:
        results.setdefault(name, {})
        for k in num_tasks:
            built = build(name, k)
            results[name][str(k)] = measure(built, k, rounds, STEPS)
            parameters = sum(leaf.size for leaf in jax.tree.leaves(built.params))
            table(f"{name}, {parameters / 1e6:.2f} M parameters, K = {k}", results[name][str(k)])
    added = transform(rounds)
    _measure.write(out, {"rounds": rounds, "steps": STEPS, "results": results, "transform": added})


if __name__ == "__main__":
    tyro.cli(main)
