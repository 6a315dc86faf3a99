"""How exact the norms of ``measure="exact"`` are: ``python -m benchmarks.cancellation``.

Norms come from the two factors of a gradient where that is cheaper. Factors lose digits where the
gradients of the examples cancel; there the gradient itself is measured. Relative errors of the task
norms in float32, against float64: exact, and the norm of the stacked gradient ("direct"). First on
one dense layer whose examples cancel more and more; then on models, at the start and after training
on one fixed batch. Cancellation is ``sum_e ||g_e|| / ||sum_e g_e||`` over the examples e. Where the
losses are nearly zero, the forward pass in float32 is most of either error.

Prints a table, writes benchmarks/cancellation.json, and exits with 1 where an error is above the
larger of 1e-4 and three times that of the direct product.
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
from gaba_jax import balance, balanced_value_and_grad, exclude, task_value_and_grad, weighting

RESULT = Path(__file__).with_suffix(".json")
LEAST, TIMES = 1e-4, 3.0  # what an error may always be, and how often the direct one
WIDTHS = (256, 320, 320, 320)  # of the MLP
# Few enough rows (examples times steps) for the factors to be the cheaper way on some leaves; those
# of the LSTM are sums over its scan, where there are no two factors.
BATCHES = {"mlp": 64, "convolution": 3, "lstm": 64, "transformer": 3}


def task_norms(losses_fn: Any, params: Any, batch: Any, stacked: bool, dtype: Any) -> np.ndarray:
    """[2] norms on all parameters but the heads, computed in ``dtype``."""
    with jax.enable_x64(dtype == np.float64):
        params, batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, batch))
        rule, shared = weighting.inverse_norm(2), exclude("heads") if "heads" in params else None
        if stacked:
            tx = balance(rule, shared=shared)

            def state_of(params: Any, *batch: Any) -> Any:
                _, grads = task_value_and_grad(losses_fn)(params, *batch)
                return tx.update(grads, tx.init(params), params)[1]

        else:
            balanced = balanced_value_and_grad(losses_fn, rule, shared=shared)

            def state_of(params: Any, *batch: Any) -> Any:
                return balanced.value_and_grad(params, balanced.init(params), *batch)[1]

        return np.asarray(jax.jit(state_of)(params, *batch).task_norms, np.float64)


def errors(losses_fn: Any, params: Any, batch: Any) -> dict[str, Any]:
    """Largest relative errors of the two tasks, and the largest that is allowed."""
    params, batch = jax.tree.map(np.asarray, (params, batch))
    expected = task_norms(losses_fn, params, batch, True, np.float64)

    def error(stacked: bool) -> float:
        found = task_norms(losses_fn, params, batch, stacked, np.float32)
        return float(np.max(np.abs(found / expected - 1)))

    exact, direct = error(stacked=False), error(stacked=True)
    allowed = max(LEAST, TIMES * direct)
    return {"direct": direct, "exact": exact, "allowed": allowed, "met": exact <= allowed}


def dense_layer(cancellation: float) -> dict[str, Any]:
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


def model(name: str, steps: int) -> dict[str, Any]:
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
    numbers = ("cancellation", "direct", "exact", "allowed")
    rows = [
        [case, *(f"{row[key]:.1e}" for key in numbers), "yes" if row["met"] else "no"]
        for case, row in results.items()
    ]
    _measure.show("Relative error of task norms", ["", *numbers, "met"], rows)
    _measure.write(out, {"steps": steps, "results": results})
    if wrong := [case for case, row in results.items() if not row["met"]]:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    tyro.cli(main)
