"""Training steps of the published network beside PyTorch's: ``python -m benchmarks.full_model``.

FullModel of gaba_jax.turbofan.model and the same network in PyTorch, with the same weights, batch
and AdamW on the same cores, interleaved in one process. What both compute is compared before it is
timed. Prints a table and writes benchmarks/full_model.json. Needs gaba_jax[turbofan,peers].
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

from benchmarks import _measure
from benchmarks._published import (
    BATCH,
    BETA,
    CHANNELS,
    DROPOUT,
    LEARNING_RATE,
    MIN_WEIGHT,
    configure,
    make_batch,
    make_jax_step,
)
from gaba_jax.turbofan.data import Split

try:
    import torch
    from torch import nn
except ImportError as error:
    raise SystemExit(
        f'The peers need {error.name}: pip install "gaba_jax[turbofan,peers]"'
    ) from None

STEPS = 2  # a call
PATHS = ("plain", "exact", "stacked", "lagged", "encoder")
PEER = "torch published"
GOALS = {"exact": 1.7}  # by which factor a path should beat the published step
RESULT = Path(__file__).with_suffix(".json")


class Twin(nn.Module):
    """The published network in PyTorch."""

    def __init__(self, dropout: float):
        super().__init__()
        blocks = []
        for a, b in [(CHANNELS, 64), (64, 128), (128, 64)]:
            convolution = nn.Conv1d(a, b, 3, padding=1)
            blocks += [convolution, nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(dropout)]
        self.frontend = nn.Sequential(*blocks)
        self.lstm = nn.LSTM(64, 256, 2, batch_first=True, bidirectional=True)
        # PyTorch has a second bias where one does: it stays 0 and is not trained.
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("bias_hh"):
                nn.init.zeros_(parameter).requires_grad_(False)
        self.attention = nn.MultiheadAttention(512, 8, batch_first=True)
        self.norm = nn.LayerNorm(512, eps=1e-6)  # Flax's default
        self.dense = layers(512, 256, 64, 32)
        self.rul_head = layers(32, 64, 32, 16, 1)
        self.health_head = layers(32, 32, 16, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps, _ = self.lstm(self.frontend(x.transpose(1, 2)).transpose(1, 2))
        attended, _ = self.attention(steps, steps, steps, need_weights=False)
        features = torch.relu(self.dense(self.norm(steps + attended)[:, -1]))
        return torch.relu(self.rul_head(features)[:, 0]), self.health_head(features)

    def shared(self) -> list[nn.Parameter]:
        return [p for n, p in self.named_parameters() if p.requires_grad and "_head" not in n]


def layers(*widths: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        modules += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def copy_weights(params: Any, twin: Twin) -> None:
    """Ours into PyTorch's layout."""
    tree = nnx.to_pure_dict(params)
    backbone = tree["backbone"]
    found: dict[str, Any] = {}

    def dense(name: str, leaves: Any) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = leaves["kernel"].T, leaves["bias"]

    for i in range(3):
        kernel = backbone["frontend"]["convolutions"][i]["kernel"]
        found[f"frontend.{4 * i}.weight"] = kernel.reshape(3, -1, kernel.shape[1]).T
        found[f"frontend.{4 * i}.bias"] = backbone["frontend"]["convolutions"][i]["bias"]
        norm = backbone["frontend"]["norms"][i]
        found[f"frontend.{4 * i + 1}.weight"] = norm["scale"]
        found[f"frontend.{4 * i + 1}.bias"] = norm["bias"]
    for i in range(2):
        for name, suffix in [("forward", ""), ("backward", "_reverse")]:
            direction = backbone[f"lstm_{i}"][name]
            found[f"lstm.weight_ih_l{i}{suffix}"] = direction["inputs"]["kernel"].T
            found[f"lstm.weight_hh_l{i}{suffix}"] = direction["recurrent"].T
            found[f"lstm.bias_ih_l{i}{suffix}"] = direction["inputs"]["bias"]
    attention = backbone["attention"]
    projections = [attention[name] for name in ("query", "key", "value")]
    found["attention.in_proj_weight"] = np.concatenate([p["kernel"].T for p in projections])
    found["attention.in_proj_bias"] = np.concatenate([p["bias"] for p in projections])
    dense("attention.out_proj", attention["out"])
    found["norm.weight"], found["norm.bias"] = attention["norm"]["scale"], attention["norm"]["bias"]
    for name, stack in [
        ("dense", backbone["dense"]),
        ("rul_head", tree["rul_head"]),
        ("health_head", tree["health_head"]),
    ]:
        for i, leaves in stack["layers"].items():
            dense(f"{name}.{2 * i}", leaves)
    named = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    assert set(found) == set(named), set(found) ^ set(named)
    with torch.no_grad():
        for name, array in found.items():
            named[name].copy_(torch.tensor(np.array(array)))


def make_torch_step(twin: Twin, batch: Split, path: str) -> Callable[[], tuple[Any, Any]]:
    """A training step that returns losses and norms, the latter of the published step."""
    x, rul = torch.tensor(batch.windows), torch.tensor(batch.rul)
    health = torch.tensor(batch.health, dtype=torch.int64)
    adamw = torch.optim.AdamW(twin.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    state = {"average": torch.full((2,), 0.5)}
    shared = twin.shared()

    def step() -> tuple[Any, Any]:
        predicted, logits = twin(x)
        losses = torch.stack(
            [((predicted - rul) ** 2).mean(), nn.functional.cross_entropy(logits, health)]
        )
        norms, weights = torch.zeros(2), torch.full((2,), 0.5)
        if path == PEER:
            grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
            norms = torch.stack(
                [torch.stack([torch.linalg.vector_norm(g) for g in of]).norm() for of in grads]
            )
            state["average"] = BETA * state["average"] + (1 - BETA) * norms.flip(0) / norms.sum()
            weights = state["average"].clamp(min=MIN_WEIGHT)
            weights = weights / weights.sum()
        adamw.zero_grad()
        (weights @ losses).backward()
        adamw.step()
        return losses.detach(), norms

    return step


def check(batch: Split) -> None:
    """Raises unless both sides have the same losses, norms and losses after an update."""
    step, carry = make_jax_step(configure("stacked", 0.0), "stacked")
    twin = Twin(0.0)
    copy_weights(carry[0], twin)
    theirs = make_torch_step(twin, batch, PEER)
    compiled = jax.jit(step)
    for rtol in (1e-3, 2e-2):  # the second after an update, which AdamW's division makes coarser
        carry, (losses, norms) = compiled(carry, batch)
        expected = theirs()
        np.testing.assert_allclose(losses, expected[0], rtol=rtol)
        np.testing.assert_allclose(norms, expected[1], rtol=rtol)


def repeat(step: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(STEPS):
            step()

    return run


def main(rounds: int = 15, threads: int = os.cpu_count() or 1, out: Path = RESULT) -> None:
    """Measures and writes.

    Args:
      rounds: interleaved rounds of 2 steps.
      threads: of PyTorch; JAX takes all cores that the process may use.
      out: the JSON to write.
    """
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    batch = make_batch()
    check(batch)
    runs: dict[str, Callable[[], None]] = {}
    for path in PATHS:
        step, carry = make_jax_step(configure(path, DROPOUT), path)
        compiled = _measure.compile_step(step, carry, batch)
        runs[path] = _measure.runner(compiled, carry, batch, STEPS)
    for path in ("torch plain", PEER):
        runs[path] = repeat(make_torch_step(Twin(DROPOUT), batch, path))
    seconds = _measure.interleaved(runs, rounds)
    to_plain = _measure.ratios(seconds, "plain")
    results = {
        name: {
            "milliseconds": 1e3 * sorted(seconds[name])[rounds // 2] / STEPS,
            "times_plain": to_plain[name],
        }
        for name in runs
    }
    over_peer = {name: _measure.ratios(seconds, name)[PEER] for name in runs}
    goals = {
        path: {"goal": goal, "measured": over_peer[path], "met": over_peer[path] >= goal}
        for path, goal in GOALS.items()
    }
    _measure.show(
        f"the published network, batch {BATCH}",
        ["step", "ms", "time / plain"],
        [[k, f"{v['milliseconds']:.0f}", f"{v['times_plain']:.2f}"] for k, v in results.items()],
    )
    _measure.show(
        f"times faster than {PEER}",
        ["step", "goal", "measured", "met"],
        [
            [k, f"{g['goal']:.1f}", f"{g['measured']:.2f}", "yes" if g["met"] else "no"]
            for k, g in goals.items()
        ],
    )
    document = {
        "rounds": rounds,
        "steps": STEPS,
        "batch": BATCH,
        "torch": {"mode": "eager", "threads": threads},
        "load_before": load,
        "goals": goals,
        "over_peer": over_peer,
        "results": results,
    }
    _measure.write(out, document, packages=("torch",))


if __name__ == "__main__":
    tyro.cli(main)
