"""Tasks with examples of their own, over a step on their mean: ``python -m benchmarks.slices``.

K tasks of n rows, or every example a task. The plain step takes the mean loss of all rows in one
backward pass; model, rows and AdamW are the same. Interleaved, medians of ratios within a round.
Prints tables and the goals beside what was measured, writes benchmarks/slices.json. TorchJD's
engine stands beside it where gaba_jax[peers] is installed.
"""

import json
import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from benchmarks import _measure, overhead
from benchmarks._models import CHANNELS, WINDOW, Layers, Transformer
from benchmarks._paths import balanced_step
from gaba_jax import balanced_value_and_grad, weighting

RESULT = Path(__file__).with_suffix(".json")
STEPS = 10  # a call
CALL_SECONDS = 0.15
TASKS, EXAMPLES, SERIES = "MLP, K tasks", "MLP, examples", "transformer, examples"
RULES = {"norms": weighting.inverse_norm, "upgrad": weighting.upgrad}
# (model, K, rows of a task): path -> (time, memory) over the plain step, at most.
GOALS: dict[tuple[str, int, int], dict[str, tuple[float, float]]] = {
    (TASKS, 10, 32): {"norms": (1.3, 1.6), "upgrad": (1.7, 1.6)},
    (TASKS, 10, 128): {"norms": (1.4, 1.6)},
    (TASKS, 50, 32): {"norms": (1.3, 1.5), "upgrad": (4, 3.1), "lagged": (1.4, 0.2)},
    (EXAMPLES, 32, 1): {"upgrad": (1.6, 4)},
    (EXAMPLES, 64, 1): {"norms": (1.1, 1.8), "upgrad": (2.6, 4)},
    (EXAMPLES, 256, 1): {"norms": (1.15, 1.8), "upgrad": (20, 60)},
    (SERIES, 64, 1): {"norms": (1.4, 1.2), "upgrad": (2.5, 1.6)},
}
LOADERS = {3: (1.2, 1.3), 10: (1.2, 1.3)}  # of separate loaders, whose losses are apart
FASTER = {32: 20, 64: 20, 256: 12}  # than TorchJD's engine with UPGrad, at least
ENGINE = "TorchJD"


class Case(NamedTuple):
    """A loss of one task, its parameters, and what holds the tasks along the first axis."""

    loss_fn: Callable[..., jax.Array]
    params: Any
    batch: tuple[jax.Array, jax.Array]


def make_case(name: str, num_tasks: int, rows: int) -> Case:
    """Losses that are up to 500 times apart."""
    rngs, keys = nnx.Rngs(0), jax.random.split(jax.random.key(0), 3)
    if name == SERIES:
        model: nnx.Module = nnx.Sequential(Transformer(rngs), nnx.Linear(128, 1, rngs=rngs))
        shape, outputs = (num_tasks, 1, WINDOW, CHANNELS), 1
    else:
        widths = [39, 400, 400, 400, 8] if name == TASKS else [784, 500, 500, 10]
        last = nnx.Linear(*widths[-2:], rngs=rngs)
        model = nnx.Sequential(Layers(widths[:-1], rngs), last)
        shape, outputs = (num_tasks, rows, widths[0]), widths[-1]
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = jax.random.normal(keys[0], shape)
    y = jax.random.normal(keys[1], (num_tasks, rows, outputs))
    y = y * jnp.geomspace(1.0, 500.0**0.5, num_tasks)[:, None, None]
    if rows == 1:
        x, y = x[:, 0], y[:, 0]

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        model: Any = nnx.merge(graph, params, rest, copy=True)
        inputs = x[None] if name == SERIES else x
        return jnp.mean((jnp.reshape(model(inputs), y.shape) - y) ** 2)

    return Case(loss_fn, params, (x, y))


def make_step(path: str, case: Case, name: str) -> tuple[Callable[..., Any], Any]:
    """``(carry, batch) -> (carry, losses)`` and the first carry, to be donated."""
    adamw = optax.adamw(1e-4)
    params = jax.tree.map(jnp.copy, case.params)
    num_tasks = len(case.batch[0])
    if path == "plain":

        def mean(params: Any, batch: Any) -> jax.Array:
            if name == SERIES:  # its loss takes one series
                return jnp.mean(jax.vmap(lambda *one: case.loss_fn(params, *one))(*batch))
            rows = [jnp.reshape(each, (-1, each.shape[-1])) for each in batch]
            return case.loss_fn(params, *rows)

        def plain(carry: Any, batch: Any) -> Any:
            params, opt_state = carry
            loss, grads = jax.value_and_grad(mean)(params, batch)
            updates, opt_state = adamw.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        return plain, (params, adamw.init(params))
    lagged = path == "lagged"
    balanced = balanced_value_and_grad(
        case.loss_fn,
        RULES["norms" if lagged else path](num_tasks),
        in_axes=0,
        measure="lagged" if lagged else "exact",
    )

    return balanced_step(balanced, adamw, params)


class Engine:
    """A step of UPGrad with TorchJD's engine, on the MLP with the same weights."""

    def __init__(self, arrays: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray, y: np.ndarray):
        import torch
        from torchjd.aggregation import UPGradWeighting
        from torchjd.autogram import Engine as Autogram

        layers: list[Any] = []
        for kernel, bias in arrays:
            linear = torch.nn.Linear(*kernel.shape)
            with torch.no_grad():
                linear.weight.copy_(torch.tensor(kernel.T))
                linear.bias.copy_(torch.tensor(bias))
            layers += [linear, torch.nn.ReLU()]
        self.model = torch.nn.Sequential(*layers[:-1])
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, eps=1e-8, weight_decay=1e-4, fused=True
        )
        self.engine = Autogram(self.model, batch_dim=0)
        self.weighting, self.x, self.y = UPGradWeighting(), torch.tensor(x), torch.tensor(y)

    def losses(self) -> Any:
        return ((self.model(self.x) - self.y) ** 2).mean(dim=1)

    def step(self) -> None:
        losses = self.losses()
        self.optimizer.zero_grad()
        gramian = self.engine.compute_gramian(losses)
        losses.backward(self.weighting(gramian))
        self.optimizer.step()

    def run(self, steps: int) -> Callable[[], None]:
        def call() -> None:
            for _ in range(steps):
                self.step()

        return call


def engine_inputs(case: Case) -> tuple[Any, ...]:
    params = nnx.to_pure_dict(case.params)["layers"]
    hidden = params[0]["layers"]
    layers = [*(hidden[i] for i in sorted(hidden)), params[1]]
    arrays = [(np.asarray(each["kernel"]), np.asarray(each["bias"])) for each in layers]
    return (arrays, *map(np.asarray, case.batch))


def peak_of_engine(inputs: tuple[Any, ...], start: int) -> int:
    """Bytes that the engine's steps take beside model, batch and optimizer; in a new process."""
    engine = Engine(*inputs)
    small = Engine(inputs[0], inputs[1][:start], inputs[2][:start])
    for _ in range(3):  # what libraries take once
        small.step()
    del small
    Path("/proc/self/clear_refs").write_text("5")  # the largest use is counted from here
    before = resident("VmRSS")
    for _ in range(3):
        engine.step()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process by their name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def check_engine(case: Case, engine: Engine) -> None:
    """Raises unless both sides have the same Gramian before their first step."""

    def gradients(params: Any) -> Any:
        return jax.vmap(jax.grad(case.loss_fn), (None, 0, 0))(params, *case.batch)

    leaves = jax.tree.leaves(jax.jit(gradients)(case.params))
    rows = np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in leaves], axis=1)
    expected = rows @ rows.T
    gramian = engine.engine.compute_gramian(engine.losses()).detach().numpy()
    error = np.abs(gramian - expected).max() / np.abs(expected).max()
    assert error < 1e-4, f"the Gramians differ by {error:.2g}"


def measure(name: str, num_tasks: int, rows: int, rounds: int, limit: float) -> dict[str, Any]:
    """Per path milliseconds and memory, alone and over the plain step."""
    case = make_case(name, num_tasks, rows)
    made = {path: make_step(path, case, name) for path in ("plain", *GOALS[name, num_tasks, rows])}
    compiled = {
        path: _measure.compile_step(step, carry, case.batch) for path, (step, carry) in made.items()
    }
    temp = {path: _measure.temp_bytes(each) for path, each in compiled.items()}
    carry, seconds = overhead.seconds_a_step(compiled["plain"], made["plain"][1], case.batch)
    steps = max(1, min(STEPS, round(CALL_SECONDS / seconds)))
    carries = {path: carry for path, (_, carry) in made.items()} | {"plain": carry}
    runs = {
        path: _measure.runner(each, carries[path], case.batch, steps)
        for path, each in compiled.items()
    }
    if name == EXAMPLES and has_engine():
        inputs = engine_inputs(case)
        engine = Engine(*inputs)
        check_engine(case, engine)
        runs[ENGINE] = engine.run(steps)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            temp[ENGINE] = pool.apply(peak_of_engine, (inputs, 4))
    times = _measure.interleaved(runs, rounds, 1, limit)
    ratios = _measure.ratios(times, "plain")
    return {
        path: {
            "milliseconds": 1e3 * float(np.median(times[path])) / steps,
            "time": ratios[path],
            "temp_bytes": temp[path],
            "memory": temp[path] / temp["plain"],
        }
        for path in runs
    }


def has_engine() -> bool:
    try:
        import torchjd.autogram  # noqa: F401
    except ImportError:
        return False
    return True


def goals(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each goal, what was measured, and whether it is met."""
    found: dict[str, dict[str, Any]] = {}

    def add(what: str, measured: float, goal: float, met: bool) -> None:
        found[what] = {"goal": goal, "measured": measured, "met": met}

    for (name, k, rows), paths in GOALS.items():
        result = results.get(title_of(name, k, rows), {})
        for path, (time, memory) in paths.items():
            for what, goal in (("time", time), ("memory", memory)):
                if path in result:
                    ratio = result[path][what]
                    add(f"{title_of(name, k, rows)}: {path}, {what}", ratio, goal, ratio <= goal)
        if ENGINE in result:
            engine, own = result[ENGINE], result["upgrad"]
            faster = engine["time"] / own["time"]
            add(f"{k} examples: {ENGINE} / upgrad, time", faster, FASTER[k], faster >= FASTER[k])
            larger = engine["memory"] / own["memory"]
            add(f"{k} examples: {ENGINE} / upgrad, memory", larger, 1, larger > 1)
    for k, (time, memory) in LOADERS.items():
        row = results.get(f"separate loaders, K = {k}", {}).get("exact")
        for what, goal in (("time", time), ("memory", memory)):
            if row:
                add(f"separate loaders, K = {k}: {what}", row[what], goal, row[what] <= goal)
    return found


def title_of(name: str, num_tasks: int, rows: int) -> str:
    of_rows = f" of {rows} rows" if name == TASKS else ""
    return f"{name}, K = {num_tasks}{of_rows}"


def show(title: str, result: Mapping[str, Any]) -> None:
    rows = [
        [
            path,
            f"{row['milliseconds']:.2f}",
            f"{row['time']:.2f}",
            f"{row['temp_bytes'] / 2**20:.1f}",
            f"{row['memory']:.2f}",
        ]
        for path, row in result.items()
    ]
    columns = ["path", "ms", "time / plain", "temp MiB", "temp / plain"]
    _measure.show(title, columns, rows)


def main(only: str = "", rounds: int = 21, seconds: float = 20.0, out: Path = RESULT) -> None:
    """Measures and writes, beside what is there of other cases.

    Args:
      only: measure the cases whose title has this in it.
      rounds: interleaved rounds, at most.
      seconds: no round of a case begins later, but for the first five.
      out: the JSON to write.
    """
    results = json.loads(out.read_text())["results"] if out.exists() else {}
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        title_of(*key): lambda key=key: measure(*key, rounds, seconds) for key in GOALS
    }
    for k in LOADERS:
        cases[f"separate loaders, K = {k}"] = lambda k=k: overhead.measure_case(
            overhead.make_case("separate loaders", k), k, rounds, STEPS, seconds
        )
    for title, run in cases.items():
        if only in title:
            results[title] = run()
            show(title, results[title])
            document = {"rounds": rounds, "goals": goals(results), "results": results}
            _measure.write(out, document, ("torch", "torchjd"))  # a run that is stopped keeps it
            jax.clear_caches()
    _measure.show_compared("Goals", goals(results))


if __name__ == "__main__":
    tyro.cli(main)
