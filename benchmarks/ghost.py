"""How exact ghost norms are: ``python -m benchmarks.ghost``.

Relative errors of the task norms, ghost and direct, both in float32, against float64 (where the
losses are nearly zero, the forward pass in float32 is most of either). First on one
dense layer whose per-example gradients cancel more and more; then on models, at the start and
after training on one fixed batch, which is where gradients cancel most. Cancellation is
``sum_e ||g_e|| / ||sum_e g_e||`` over the examples e. Prints tables, writes benchmarks/ghost.json.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import _measure
from benchmarks._models import build
from gaba_jax import balanced_value_and_grad, exclude, weighting

RESULT = Path(__file__).with_suffix(".json")
WIDTHS = (256, 320, 320, 320)  # of the MLP
# Few enough rows (examples times steps) for the factors to be the cheaper way on some leaves; those
# of the LSTM are sums over its scan, where there are no two factors.
BATCHES = {"mlp": 64, "convolution": 3, "lstm": 64, "transformer": 3}


def task_norms(losses_fn: Any, params: Any, batch: Any, norms: str, dtype: Any) -> np.ndarray:
    """[2] norms on all parameters but the heads, computed in ``dtype``."""
    with jax.enable_x64(dtype == np.float64):
        params, batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, batch))
        balanced = balanced_value_and_grad(
            losses_fn,
            weighting.inverse_norm(2),
            norms=norms,
            shared=exclude("heads") if "heads" in params else None,
        )
        step = jax.jit(balanced.value_and_grad)
        return np.asarray(step(params, balanced.init(params), *batch)[1].task_norms, np.float64)


def errors(losses_fn: Any, params: Any, batch: Any) -> dict[str, float]:
    """Largest relative errors of the two tasks, and of one kind of norm against the other."""
    params, batch = jax.tree.map(np.asarray, (params, batch))
    exact = task_norms(losses_fn, params, batch, "direct", np.float64)
    direct = task_norms(losses_fn, params, batch, "direct", np.float32)
    ghost = task_norms(losses_fn, params, batch, "ghost", np.float32)
    pairs = {"direct": (direct, exact), "ghost": (ghost, exact), "ghost to direct": (ghost, direct)}
    return {name: float(np.max(np.abs(a / b - 1))) for name, (a, b) in pairs.items()}


def dense_layer(cancellation: float) -> dict[str, float]:
    """Pairs of equal examples whose cotangents are opposite but for a small part."""
    random = np.random.default_rng(0)
    x = np.repeat(random.normal(size=(32, 256)), 2, axis=0)
    opposite = np.repeat(random.normal(size=(2, 32, 256)), 2, axis=1)
    opposite[:, 1::2] *= -1
    rest = random.normal(size=(2, 64, 256))
    cotangents = np.moveaxis(opposite + rest * 8 / cancellation, 1, 0)  # [64, 2, 256]

    def losses_fn(params: Any, x: Any, cotangents: Any) -> tuple[Any, Any]:
        h = x @ params["kernel"]
        return jnp.sum(h * cotangents[:, 0]), 0.01 * jnp.sum(h * cotangents[:, 1])

    each = np.linalg.norm(x, axis=1) * np.linalg.norm(cotangents[:, 0], axis=1)
    actual = each.sum() / np.linalg.norm(x.T @ cotangents[:, 0])
    return {"cancellation": float(actual)} | errors(
        losses_fn, {"kernel": np.zeros((256, 256))}, (x, cotangents)
    )


def model(name: str, steps: int) -> dict[str, float]:
    """A model after ``steps`` of Adam on its one batch."""
    made = build(name, 2, BATCHES[name], WIDTHS)
    adam = optax.adam(optax.cosine_decay_schedule(1e-3, max(steps, 1)))

    def total(params: Any, *batch: Any) -> Any:
        first, second = made.whole(params, *batch)
        return first / 500 + second

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, opt_state = carry
        updates, opt_state = adam.update(jax.grad(total)(params, *made.batch), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    carry = made.params, adam.init(made.params)
    params, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(carry)[0]

    def norms_of(*batch: Any) -> Any:
        return jnp.stack(
            [
                optax.tree.norm(
                    jax.grad(lambda p, i=i: made.whole(p, *batch)[i])(params)["backbone"]
                )
                for i in range(2)
            ]
        )

    one_by_one = jax.lax.map(lambda e: norms_of(*(leaf[None] for leaf in e)), made.batch)
    cancellation = jnp.max(one_by_one.mean(axis=0) / norms_of(*made.batch))
    return {"cancellation": float(cancellation)} | errors(made.whole, params, made.batch)


def main(steps: int = 300, out: Path = RESULT) -> None:
    """Measures and writes.

    Args:
      steps: of training on one batch.
      out: the JSON to write.
    """
    results = {f"dense, {c:g}": dense_layer(c) for c in (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)}
    for name in BATCHES:
        results[f"{name}, start"] = model(name, 0)
        results[f"{name}, {steps} steps"] = model(name, steps)
    rows = [[case, *(f"{value:.1e}" for value in row.values())] for case, row in results.items()]
    _measure.show(
        "Relative error of task norms",
        ["", "cancellation", "direct", "ghost", "ghost to direct"],
        rows,
    )
    _measure.write(out, {"steps": steps, "results": results})


if __name__ == "__main__":
    tyro.cli(main)
