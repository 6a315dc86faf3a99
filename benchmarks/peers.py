"""Training steps of this library and of its PyTorch peers: ``python -m benchmarks.peers``.

The same model, weights, batch and AdamW on the same cores, in one process, interleaved, two tasks;
JAX compiled, PyTorch eager, as the peers are used. What both sides compute is compared before it
is timed. Prints a table per model and writes benchmarks/peers.json. Needs gaba_jax[peers].
"""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import _measure
from benchmarks._models import Model, build
from benchmarks._paths import make_step

try:
    import quadprog  # noqa: F401  # the solver of UPGrad
    import torch
    from torchjd.aggregation import Aggregator, Mean, UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward
except ImportError as error:
    raise SystemExit(
        f'The peers need {error.name}: pip install "gaba_jax[turbofan,peers]"'
    ) from None

NUM_TASKS = 2
STEPS = 10  # a call
CORES = os.cpu_count() or 1
BETA, MIN_WEIGHT = 0.99, 0.05  # the published constants
JAX_PATHS = ("plain", "exact", "exact, UPGrad", "lagged", "encoder")
TORCHJD = {"TorchJD UPGrad": UPGrad, "TorchJD Mean": Mean}
PEERS = ("torch published", *TORCHJD)
# By which factor a path should beat a peer.
GOALS: dict[str, dict[tuple[str, str], float]] = {
    "mlp": {("exact", "torch published"): 1.5, ("exact, UPGrad", "TorchJD UPGrad"): 2.0},
    "lstm": {("exact", "torch published"): 1.1, ("exact, UPGrad", "TorchJD UPGrad"): 1.0},
}
RESULT = Path(__file__).with_suffix(".json")


class Twin(torch.nn.Module):
    """A model of ``benchmarks._models`` in PyTorch, with the same weights."""

    def __init__(self, name: str, model: Model):
        super().__init__()
        arrays = in_torch_order(name, model.params)
        self.recurrent = name == "lstm"
        if self.recurrent:
            channels, width = arrays[0].shape[1], arrays[1].shape[1]
            self.trunk: torch.nn.Module = torch.nn.LSTM(channels, width, 2, batch_first=True)
            # PyTorch has a second bias where one does: it stays 0 and is not trained.
            for key, parameter in self.trunk.named_parameters():
                if key.startswith("bias_ih"):
                    torch.nn.init.zeros_(parameter).requires_grad_(False)
        else:
            widths = [arrays[0].shape[1], *(bias.size for bias in arrays[1:-NUM_TASKS:2])]
            layers = [
                (torch.nn.Linear(*pair), torch.nn.ReLU()) for pair in itertools.pairwise(widths)
            ]
            self.trunk = torch.nn.Sequential(*itertools.chain.from_iterable(layers))
        self.shared = [p for p in self.trunk.parameters() if p.requires_grad]
        self.heads = torch.nn.ParameterList(torch.zeros(a.shape) for a in arrays[-NUM_TASKS:])
        self.scales = np.geomspace(500.0, 1.0, NUM_TASKS).tolist()
        self.trained = [*self.shared, *self.heads]
        with torch.no_grad():
            for parameter, array in zip(self.trained, arrays, strict=True):
                parameter.copy_(torch.tensor(array))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk(x)[0][:, -1] if self.recurrent else self.trunk(x)

    def losses(self, h: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        return [
            self.scales[i] * torch.mean((h @ head - y[:, i]) ** 2)
            for i, head in enumerate(self.heads)
        ]


def in_torch_order(name: str, tree: Any) -> list[np.ndarray]:
    """Parameters or gradients as PyTorch lays them out: the trunk's leaves, then the heads."""
    backbone = nnx.to_pure_dict(tree["backbone"])
    if name == "lstm":  # the gates are in the same order: i, f, g, o
        cells = [backbone[key]["cell"] for key in ("first", "second")]
        leaves = [
            leaf
            for cell in cells
            for leaf in (cell["dense_i"]["kernel"], *map(cell["dense_h"].get, ("kernel", "bias")))
        ]
    else:
        layers = backbone["layers"]
        leaves = [layers[i][key] for i in sorted(layers) for key in ("kernel", "bias")]
    heads = [tree["heads"][f"head_{i}"] for i in range(NUM_TASKS)]
    return [np.asarray(leaf).T for leaf in (*leaves, *heads)]


def make_torch_step(
    path: str, name: str, model: Model, fused: bool
) -> tuple[Callable[[], list[torch.Tensor]], Twin, dict[str, torch.Tensor]]:
    """A train step that returns its losses, the model, and the step's state."""
    twin = Twin(name, model)
    x, y = (torch.tensor(np.asarray(array)) for array in model.batch)
    adamw = torch.optim.AdamW(  # optax.adamw's defaults
        twin.trained, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4, fused=fused
    )
    equal = torch.full((NUM_TASKS,), 1 / NUM_TASKS)
    state = {"norms": torch.zeros(NUM_TASKS), "average": equal}

    def weighted_backward(losses: list[torch.Tensor], weights: torch.Tensor) -> None:
        adamw.zero_grad()
        (weights @ torch.stack(losses)).backward()

    def plain() -> list[torch.Tensor]:
        losses = twin.losses(twin.features(x), y)
        weighted_backward(losses, equal)
        adamw.step()
        return losses

    def published() -> list[torch.Tensor]:
        losses = twin.losses(twin.features(x), y)
        norms = [norm(torch.autograd.grad(loss, twin.shared, retain_graph=True)) for loss in losses]
        state["norms"] = torch.stack(norms)
        raw = state["norms"].flip(0) / state["norms"].sum()
        state["average"] = BETA * state["average"] + (1 - BETA) * raw
        weights = state["average"].clamp(min=MIN_WEIGHT)
        weighted_backward(losses, weights / weights.sum())
        adamw.step()
        return losses

    # vmap, TorchJD's default, has no rule for an LSTM: its advice is then one row at a time.
    chunk = 1 if twin.recurrent else None

    def torchjd(aggregator: Aggregator) -> Callable[[], list[torch.Tensor]]:
        def step() -> list[torch.Tensor]:
            features = twin.features(x)
            losses = twin.losses(features, y)
            adamw.zero_grad()
            mtl_backward(losses, features=features, parallel_chunk_size=chunk)
            jac_to_grad(twin.shared, aggregator)
            adamw.step()
            return losses

        return step

    if path in TORCHJD:
        return torchjd(TORCHJD[path]()), twin, state
    return {"torch plain": plain, "torch published": published}[path], twin, state


def norm(leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.linalg.vector_norm(leaf) for leaf in leaves]).norm()


def check(name: str, model: Model, fused: bool) -> None:
    """Raises unless both sides compute the same losses, gradients, norms and update."""
    before = in_torch_order(name, model.params)
    expected, after = {}, []
    for path in ("plain", "exact"):
        step, carry = make_step(path, model, NUM_TASKS)
        carry, expected[path] = jax.jit(step)(carry, model.batch)
        if path == "plain":
            after = in_torch_order(name, carry[0])
        else:
            norms = carry[1].task_norms
    grads = jax.grad(lambda params: jnp.mean(jnp.stack(model.whole(params, *model.batch))))
    grads = in_torch_order(name, jax.jit(grads)(model.params))

    for path in ("torch plain", *PEERS):
        step, twin, state = make_torch_step(path, name, model, fused)
        losses = [loss.item() for loss in step()]
        np.testing.assert_allclose(losses, expected["exact"], rtol=1e-4, err_msg=path)
        if path == "torch published":
            np.testing.assert_allclose(state["norms"], norms, rtol=1e-3, err_msg=path)
        if path in ("torch plain", "TorchJD Mean"):
            # TorchJD gives a head the gradient of its own loss, not of the mean.
            head_scale = 1 / NUM_TASKS if path == "TorchJD Mean" else 1
            scales = [1.0] * len(twin.shared) + [head_scale] * NUM_TASKS
            ours = [scale * p.grad.numpy() for scale, p in zip(scales, twin.trained, strict=True)]
            assert_close(ours, grads, 1e-3, f"gradients of {path}")
        if path == "torch plain":
            moved = [p.detach().numpy() - b for p, b in zip(twin.trained, before, strict=True)]
            expected_move = [a - b for a, b in zip(after, before, strict=True)]
            assert_close(moved, expected_move, 1e-2, f"update of {path}")


def assert_close(
    actual: Sequence[np.ndarray], desired: Sequence[np.ndarray], rtol: float, what: str
) -> None:
    """Each leaf within ``rtol`` of its norm."""
    for i, (a, b) in enumerate(zip(actual, desired, strict=True)):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= rtol, f"{what}: leaf {i} differs by {error:.2g} from JAX's"


def measure(name: str, rounds: int, fused: bool) -> dict[str, dict[str, float]]:
    model = build(name, NUM_TASKS)
    check(name, model, fused)
    runs: dict[str, Callable[[], None]] = {}
    for path in JAX_PATHS:
        named = "exact, cosines" if path == "exact, UPGrad" else path  # the rule that reads them
        step, carry = make_step(named, model, NUM_TASKS)
        compiled = _measure.compile_step(step, carry, model.batch)
        runs[path] = _measure.runner(compiled, carry, model.batch, STEPS)
    for path in ("torch plain", *PEERS):
        runs[path] = repeat(make_torch_step(path, name, model, fused)[0])
    seconds = _measure.interleaved(runs, rounds)
    to_exact, to_upgrad = (_measure.ratios(seconds, to) for to in ("exact", "exact, UPGrad"))
    return {
        path: {
            "milliseconds": 1e3 * sorted(seconds[path])[rounds // 2] / STEPS,
            "times_exact": to_exact[path],
            "times_exact, UPGrad": to_upgrad[path],
        }
        for path in runs
    }


def repeat(step: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def compare_with_goals(name: str, result: dict[str, dict[str, float]]) -> dict[str, Any]:
    """``"exact over torch published" -> {goal, measured, met}``."""
    goals = {}
    for (path, peer), goal in GOALS[name].items():
        measured = result[peer][f"times_{path}"]
        goals[f"{path} over {peer}"] = {
            "goal": goal,
            "measured": measured,
            "met": measured >= goal,
        }
    return goals


def table(title: str, result: dict[str, dict[str, float]]) -> None:
    rows = [
        [
            path,
            f"{row['milliseconds']:.2f}",
            f"{row['times_exact']:.2f}",
            f"{row['times_exact, UPGrad']:.2f}",
        ]
        for path, row in result.items()
    ]
    _measure.show(title, ["path", "ms", "time / exact", "time / UPGrad"], rows)


def main(
    model: tuple[Literal["mlp", "lstm"], ...] = ("mlp", "lstm"),
    rounds: int = 15,
    fused: bool = False,
    threads: int = CORES,
    out: Path = RESULT,
) -> None:
    """Measures and writes.

    Args:
      model: mlp, lstm.
      rounds: interleaved rounds of 10 steps.
      fused: PyTorch's fused AdamW instead of its default.
      threads: of PyTorch; JAX takes all cores that the process may use.
      out: the JSON to write.
    """
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    if load > CORES / 4:
        print(f"Other programs are running (load {load:.1f}): PyTorch's threads suffer most.")
    results: dict[str, Any] = {}
    goals: dict[str, Any] = {}
    for name in model:
        results[name] = measure(name, rounds, fused)
        goals[name] = compare_with_goals(name, results[name])
        table(f"{name}, K = {NUM_TASKS}", results[name])
        rows = [
            [key, f"{g['goal']:.1f}", f"{g['measured']:.2f}", "yes" if g["met"] else "no"]
            for key, g in goals[name].items()
        ]
        _measure.show(f"{name}: times faster", ["path", "goal", "measured", "met"], rows)
    document = {
        "rounds": rounds,
        "steps": STEPS,
        "num_tasks": NUM_TASKS,
        "torch": {"mode": "eager", "threads": threads, "fused_adamw": fused},
        "load_before": load,
        "goals": goals,
        "results": results,
    }
    _measure.write(out, document, packages=("torch", "torchjd"))


if __name__ == "__main__":
    tyro.cli(main)
