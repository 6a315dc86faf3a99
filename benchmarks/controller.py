"""Does the integral part help? ``python -m benchmarks.controller [--quick]``.

The proportional-integral rule beside GABA and ``inverse_norm``: in simulated loops (a step, noise,
a task that is finished, a floor that is reached and left), and on four losses of one network, which
tell two overlaid digits apart. Needs scikit-learn, of the extra ``test``, for its digits. Prints
tables and writes benchmarks/controller.json.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import _measure, toy
from gaba_jax import balanced_value_and_grad, controller, weighting

RESULT = Path(__file__).with_suffix(".json")

NORMS = (1.0, 1.0, 0.001)
STEPS = 2000
NOISE = 0.3  # standard deviation of the logarithm of a norm, from batch to batch
NEAR = 0.1  # balanced: every contribution within 10 % of their mean

TASKS = {"left": 10, "right": 10, "sum": 19, "left is larger": 2}  # and their classes
SCALES = {"equal": (1.0, 1.0, 1.0, 1.0), "apart": (1.0, 0.01, 10.0, 0.001)}
SEEDS, EPOCHS = (0, 1, 2, 3, 4), 20


def methods(num_tasks: int) -> dict[str, weighting.Weighting]:
    """What is compared. The averages of weights have the time constant of 100 updates."""
    debiased: dict[str, Any] = {"debias": True, "warmup_steps": 0, "min_weight": 0.0}
    pi = weighting.proportional_integral
    return {
        "uniform": weighting.uniform(num_tasks),
        "gaba, debiased": weighting.gaba(num_tasks, **debiased),
        "inverse_norm": weighting.inverse_norm(num_tasks),
        "inverse_norm, averaged": weighting.stabilize(
            weighting.inverse_norm(num_tasks), **debiased
        ),
        "proportional_integral": pi(num_tasks),
        "the same from 1/K": pi(num_tasks, debias=False),
        "ki = 0 from 1/K": pi(num_tasks, ki=0.0, debias=False),
        "floor 0.05": pi(num_tasks, min_weight=0.05),
    }


TRAINED = (  # on the digits
    "uniform",
    "gaba, debiased",
    "inverse_norm",
    "inverse_norm, averaged",
    "proportional_integral",
    "the same from 1/K",
)


def first_of_the_rest(good: np.ndarray) -> int | None:
    """The first update [T] from which on all are good; None if the last is not."""
    bad = np.flatnonzero(~good)
    first = int(bad[-1]) + 1 if len(bad) else 0
    return first if first < len(good) else None


def imbalance(contributions: np.ndarray) -> np.ndarray:
    """[T] the largest departure of a contribution from the mean of all, relative to it."""
    shares = controller.share(contributions)
    return np.abs(shares * shares.shape[-1] - 1).max(axis=-1)


def step_and_noise(rule: weighting.Weighting) -> dict[str, Any]:
    """Under constant norms; and the same norms with noise, once it has settled."""
    still = controller.simulate(np.array(NORMS), rule, steps=STEPS)
    random = np.random.default_rng(0)
    noise = np.exp(NOISE * random.normal(size=(STEPS, len(NORMS))))
    noisy = controller.simulate(np.array(NORMS) * noise, rule)
    half = STEPS // 2
    shares = controller.share(noisy.contributions[half:])
    return {
        "contributions": still.contributions[-1].tolist(),
        "updates_until_balanced": first_of_the_rest(imbalance(still.contributions) <= NEAR),
        "noise_of_contributions": float((shares.std(axis=0) * len(NORMS)).mean()),
        "noise_of_log_weights": float(np.log(noisy.weights[half:]).std(axis=0).mean()),
    }


def finished_task(rule: weighting.Weighting) -> dict[str, Any]:
    """Three tasks of equal scale, of which the last is soon done.

    A task's gradient falls with the weight it is given, 50 times faster for the last one.
    """
    rates = jnp.array([0.01, 0.01, 0.5])

    def plant(weights: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
        left = left * (1 - rates * weights)
        return left, left

    loop = controller.simulate(plant, rule, steps=STEPS, plant_state=jnp.ones(3))
    return {
        "weight_of_the_finished": float(loop.weights[-1, 2]),
        "left_of_the_others": float(loop.norms[-1, :2].mean()),
    }


def without_anti_windup(rule: weighting.Weighting, ki: float) -> weighting.Weighting:
    """The rule, its integral left to run on at the floor."""

    def update(stats: weighting.TaskStats, state: Any) -> tuple[Any, Any]:
        weights, new = rule.update(stats, state)
        error = controller.error(state.controlled_weights * stats.norms)
        return weights, new._replace(integral=state.integral + ki * error)

    return rule._replace(update=update)


def windup(held: int = 200, ki: float = 0.3, min_weight: float = 0.05) -> dict[str, int | None]:
    """Updates until the loop is balanced again after the ratio turned round.

    For ``held`` updates one task pulls 500 times harder, so that its weight is at the floor; then
    the other one pulls 3 times harder than it.
    """
    norms = np.concatenate([np.tile([500.0, 1.0], (held, 1)), np.tile([1.0, 3.0], (STEPS, 1))])
    rule = weighting.proportional_integral(2, ki=ki, min_weight=min_weight)
    found: dict[str, int | None] = {}
    for name, each in {"with": rule, "without": without_anti_windup(rule, ki)}.items():
        loop = controller.simulate(norms, each)
        assert loop.weights[held - 1, 0] == np.float32(min_weight)
        found[name] = first_of_the_rest(imbalance(loop.contributions[held:]) <= NEAR)
    return found


def labels_of(split: toy.Overlays) -> np.ndarray:
    """[N, tasks] of overlays."""
    left, right = split.labels.T
    return np.stack([left, right, left + right, left > right], 1).astype(np.int32)


def init_params(key: jax.Array) -> dict[str, Any]:
    """Two shared layers and a linear head per task."""
    heads = {name: (toy.WIDTH, classes) for name, classes in TASKS.items()}
    sizes = {"first": (toy.SIDE**2, toy.WIDTH), "second": (toy.WIDTH, toy.WIDTH)} | heads
    return {
        name: {"kernel": jax.nn.initializers.he_normal()(k, size), "bias": jnp.zeros(size[1])}
        for k, (name, size) in zip(jax.random.split(key, len(sizes)), sizes.items(), strict=True)
    }


def logits(params: dict[str, Any], images: jax.Array) -> list[jax.Array]:
    """[N, classes] of each task."""

    def layer(name: str, x: jax.Array) -> jax.Array:
        return x @ params[name]["kernel"] + params[name]["bias"]

    features = images.reshape(len(images), -1)
    for name in ("first", "second"):
        features = jax.nn.relu(layer(name, features))
    return [layer(name, features) for name in TASKS]


def classify(
    rule: weighting.Weighting,
    data: tuple[toy.Overlays, toy.Overlays],
    seeds: tuple[int, ...],
    epochs: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(test accuracies [scales, seeds, tasks], mean imbalance over the updates [scales, seeds])."""
    adam = optax.adam(toy.LEARNING_RATES["digits"])
    train, test = ((jnp.asarray(split.images), jnp.asarray(labels_of(split))) for split in data)
    size, batch_size = len(train[0]), toy.BATCH_SIZE
    per_epoch = size // batch_size

    def losses_fn(params: Any, scale: Any, images: Any, labels: Any) -> tuple[jax.Array, ...]:
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return tuple(
            scale[i] * cross_entropy(each, labels[:, i]).mean()
            for i, each in enumerate(logits(params, images))
        )

    # What is applied has to be compared, so all rules have the norms measured.
    balanced = balanced_value_and_grad(losses_fn, rule._replace(needs=frozenset({"norms"})))

    def run(seed: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        def update(carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            params, state, opt_state = carry
            batch = train[0][rows], train[1][rows]
            (_, grads), state = balanced.value_and_grad(params, state, scale, *batch)
            updates, opt_state = adam.update(grads, opt_state, params)
            errors = controller.error(state.task_weights * state.task_norms)
            departure = jnp.abs(errors).max() * len(TASKS)
            return (optax.apply_updates(params, updates), state, opt_state), departure

        def epoch(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            rows = jax.random.permutation(key, size)[: per_epoch * batch_size]
            return jax.lax.scan(update, carry, rows.reshape(per_epoch, batch_size))

        params_key, batches_key = jax.random.split(jax.random.key(seed))
        params = init_params(params_key)
        carry = params, balanced.init(params), adam.init(params)
        (params, *_), departures = jax.lax.scan(epoch, carry, jax.random.split(batches_key, epochs))
        right = [
            (each.argmax(axis=-1) == test[1][:, i]).mean()
            for i, each in enumerate(logits(params, test[0]))
        ]
        return jnp.stack(right), departures.mean()

    def runs(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(lambda seed: run(seed, scale), jnp.array(seeds))

    scales = jnp.array(list(SCALES.values()))
    accuracies, departures = jax.jit(lambda: jax.lax.map(runs, scales))()
    return np.asarray(accuracies, float), np.asarray(departures, float)


def spread(values: Any, factor: float = 100) -> str:
    """Mean ± standard deviation over the seeds."""
    values = factor * np.asarray(values)
    return f"{values.mean():.1f} ± {values.std(ddof=min(1, len(values) - 1)):.1f}"


def show(result: dict[str, Any]) -> None:
    """Prints the tables from what is written."""
    rows = []
    for name, loop in result["loops"].items():
        until = loop["updates_until_balanced"]
        rows.append(
            [
                name,
                ", ".join(f"{c:.2g}" for c in loop["contributions"]),
                "never" if until is None else str(until),
                f"{loop['noise_of_contributions']:.2f}",
                f"{loop['noise_of_log_weights']:.2f}",
                f"{loop['weight_of_the_finished']:.3f}",
                f"{loop['left_of_the_others']:.3f}",
            ]
        )
    columns = ["contributions", "balanced after", "noise, contributions", "noise, log weights"]
    columns += ["weight, finished task", "left of the others"]
    _measure.show(f"simulated loops, norms {NORMS}", ["rule", *columns], rows)
    recovery = result["windup"]
    print(f"updates to recover from the floor, with anti-windup and without: {recovery}")
    for scale in SCALES:
        rows = []
        for name, each in result["digits"].items():
            accuracies = np.array(each["accuracies"][scale])
            ahead = accuracies - np.array(result["digits"]["inverse_norm"]["accuracies"][scale])
            cells = [spread(column) for column in accuracies.T]
            cells += [spread(accuracies.mean(axis=1)), spread(ahead.mean(axis=1))]
            rows.append([name, *cells, f"{np.mean(each['departures'][scale]):.2f}"])
        columns = [*TASKS, "mean", "mean - inverse_norm", "imbalance"]
        _measure.show(f"digits, test accuracy in %, scales {scale}", ["rule", *columns], rows)


def main(quick: bool = False, out: Path = RESULT) -> None:
    """Simulates, trains and writes.

    Args:
      quick: two methods, two seeds, one epoch: to see that it runs. Name another out then.
      out: the JSON to write.
    """
    seeds, epochs = (SEEDS[:2], 1) if quick else (SEEDS, EPOCHS)
    chosen = methods(3)
    if quick:
        chosen = {name: chosen[name] for name in ("inverse_norm", "proportional_integral")}
    loops = {name: step_and_noise(rule) | finished_task(rule) for name, rule in chosen.items()}
    data = toy.overlay_digits()
    digits = {}
    for name in (name for name in TRAINED if name in chosen):
        accuracies, departures = classify(methods(len(TASKS))[name], data, seeds, epochs)
        digits[name] = {
            "accuracies": dict(zip(SCALES, accuracies.tolist(), strict=True)),
            "departures": dict(zip(SCALES, departures.tolist(), strict=True)),
        }
    result = {
        "settings": {"scales": SCALES, "seeds": seeds, "epochs": epochs, "steps": STEPS},
        "loops": loops,
        "windup": windup(),
        "digits": digits,
    }
    _measure.write(out, result, packages=("scikit-learn",))
    show(result)


if __name__ == "__main__":
    tyro.cli(main)
