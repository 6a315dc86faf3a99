"""Every example a task, on digits: ``python -m benchmarks.instance_wise``.

Scikit-learn's 8 x 8 digits, 1,000 of them for training, in three conditions: as they are, with a
fifth of the training labels wrong, and with one digit in twenty of the others' number. Batches of
32, where every example is a task; and the same batches with the ten digits as groups. Each method
with the learning rate that is best on validation data, five seeds. Prints a table and writes
benchmarks/instance_wise.json. Needs scikit-learn, of the extra ``test``.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import _measure
from benchmarks.evidence.problems import apply, dense
from gaba_jax import balanced_value_and_grad, weighting
from gaba_jax.weighting import Weighting

RESULT = Path(__file__).with_suffix(".json")
BATCH, DIGITS, STEPS = 32, 10, 1500
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # of Adam
RARE = 8  # the digit of which there are few
CONDITIONS = ("as they are", "a fifth of the labels wrong", "one digit rare")


class Split(NamedTuple):
    images: np.ndarray  # [N, 64]
    labels: np.ndarray  # [N]


def clipped(num_tasks: int) -> Weighting:
    """The mean of gradients, of which each is clipped to the median of their norms."""

    def update(stats: Any, state: Any) -> Any:
        norms = jnp.where(stats.present, stats.norms, jnp.nan)
        bound = jnp.nanmedian(norms)
        weights = jnp.minimum(1.0, bound / jnp.maximum(stats.norms, 1e-12))
        number = jnp.maximum(jnp.sum(stats.present), 1)
        return jnp.where(stats.present, weights / number, 0), state

    return weighting.uniform(num_tasks)._replace(needs=frozenset({"norms"}), update=update)


EXAMPLES: dict[str, Callable[[int], Weighting]] = {
    "mean": weighting.uniform,
    "clipped": clipped,
    "inverse_norm": weighting.inverse_norm,
    "equalize": weighting.equalize,
    "upgrad": weighting.upgrad,
}
GROUPS: dict[str, Callable[[int], Weighting]] = {
    "groups, uniform": weighting.uniform,
    "groups, equalize": weighting.equalize,
    "groups, upgrad": weighting.upgrad,
    "groups, smooth_tchebycheff": weighting.smooth_tchebycheff,
}
METHODS = [*EXAMPLES, *GROUPS]


def load(condition: str) -> tuple[Split, Split, Split]:
    """Training, validation and test; validation and test are as they are."""
    from sklearn.datasets import load_digits

    random = np.random.default_rng(0)
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    order = random.permutation(len(labels))
    images, labels = images[order] / 16, labels[order]
    parts = [
        Split(np.asarray(images[part], np.float32), np.asarray(labels[part]))
        for part in (slice(1000), slice(1000, 1300), slice(1300, None))
    ]
    train, validation, test = parts
    if condition == CONDITIONS[1]:
        wrong = random.random(len(train.labels)) < 0.2
        shift = random.integers(1, DIGITS, len(train.labels))
        train = Split(train.images, np.where(wrong, (train.labels + shift) % DIGITS, train.labels))
    elif condition == CONDITIONS[2]:
        few = np.flatnonzero(train.labels == RARE)[5:]
        kept = np.setdiff1d(np.arange(len(train.labels)), few)
        train = Split(train.images[kept], train.labels[kept])
    return train, validation, test


def loss_fn(params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
    """Of one example, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, image), label)


def logits(params: Any, images: jax.Array) -> jax.Array:
    return apply(params, images, jax.nn.relu)


@functools.partial(jax.jit, static_argnums=(0,))
def train_seeds(method: str, rate: jax.Array, keys: jax.Array, train: Split) -> Any:
    """The last parameters of every seed."""
    is_grouped = method in GROUPS
    rule = GROUPS[method](DIGITS) if is_grouped else EXAMPLES[method](BATCH)
    balanced = balanced_value_and_grad(loss_fn, rule, in_axes=0)
    adam = optax.adam(rate)

    def run(key: jax.Array) -> Any:
        begin, batches = jax.random.split(key)
        params = dense(begin, (64, 64, DIGITS))

        def step(carry: Any, key: jax.Array) -> Any:
            params, state, opt_state = carry
            rows = jax.random.randint(key, [BATCH], 0, len(train.labels))
            images, labels = jnp.asarray(train.images)[rows], jnp.asarray(train.labels)[rows]
            ids = labels if is_grouped else None
            (_, grads), state = balanced.value_and_grad(params, state, images, labels, task_ids=ids)
            updates, opt_state = adam.update(grads, opt_state)
            return (optax.apply_updates(params, updates), state, opt_state), None

        carry = params, balanced.init(params), adam.init(params)
        return jax.lax.scan(step, carry, jax.random.split(batches, STEPS))[0][0]

    return jax.lax.map(run, keys)


def scores(params: Any, split: Split) -> dict[str, np.ndarray]:
    """Per seed the accuracy in %, that of the worst digit, and the mean loss in nats."""
    found = jax.vmap(logits, (0, None))(params, jnp.asarray(split.images))
    right = np.asarray(jnp.argmax(found, -1) == split.labels)
    of_digits = [right[:, split.labels == digit].mean(axis=1) for digit in range(DIGITS)]
    loss = optax.softmax_cross_entropy_with_integer_labels(
        found, jnp.broadcast_to(jnp.asarray(split.labels), right.shape)
    )
    return {
        "accuracy": 100 * right.mean(axis=1),
        "worst digit": 100 * np.min(of_digits, axis=0),
        "loss": np.asarray(loss.mean(axis=1)),
    }


def measure(condition: str, method: str, seeds: int) -> dict[str, Any]:
    """At the rate with the best accuracy on validation data, seed means."""
    train, validation, test = load(condition)
    keys = jax.random.split(jax.random.key(0), seeds)
    runs = {rate: train_seeds(method, jnp.float32(rate), keys, train) for rate in RATES}
    best = max(RATES, key=lambda rate: scores(runs[rate], validation)["accuracy"].mean())
    found = scores(runs[best], test)
    return {"rate": best, "training loss": float(scores(runs[best], train)["loss"].mean())} | {
        name: {"mean": float(of_seeds.mean()), "deviation": float(of_seeds.std(ddof=1))}
        for name, of_seeds in found.items()
    }


def cells(row: Mapping[str, Any]) -> list[str]:
    """What the tables show of a method."""
    accuracy, worst = row["accuracy"], row["worst digit"]
    return [
        f"{accuracy['mean']:.1f} ± {accuracy['deviation']:.1f}",
        f"{worst['mean']:.0f} ± {worst['deviation']:.0f}",
        f"{row['loss']['mean']:.2f}",
        f"{row['training loss']:.3f}",
        f"{row['rate']:g}",
    ]


COLUMNS = ("accuracy, %", "worst digit, %", "test loss", "training loss", "rate")


def main(seeds: int = 5, out: Path = RESULT) -> None:
    """Measures and writes.

    Args:
      seeds: runs of each method and rate.
      out: the JSON to write.
    """
    results: dict[str, Any] = {}
    for condition in CONDITIONS:
        results[condition] = {method: measure(condition, method, seeds) for method in METHODS}
        rows = [[method, *cells(row)] for method, row in results[condition].items()]
        _measure.show(f"Digits, {condition}", ["", *COLUMNS], rows)
        _measure.write(out, {"seeds": seeds, "steps": STEPS, "results": results}, ("scikit-learn",))


if __name__ == "__main__":
    tyro.cli(main)
