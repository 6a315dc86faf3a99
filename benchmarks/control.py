"""Ten robot arms, one network: ``python -m benchmarks.control``.

Two-link arms of ten lengths and masses, whose dynamics (accelerations from angles, velocities and
torques) one network learns. Every arm has transitions of its own. The losses, squared errors in
rad^2/s^4, are 1,000 times apart. Each method at the learning rate that is best on validation data,
three seeds; one method takes some seconds. Then the time and memory of an actor-critic update of
K tasks on random batches, by this library and by the usual code, which splits the batch and takes
``jax.vmap`` of ``jax.grad``. Prints tables and writes benchmarks/control.json.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import _measure
from benchmarks.evidence.problems import apply, dense
from gaba_jax import balanced_value_and_grad, weighting
from gaba_jax.weighting import Weighting

RESULT = Path(__file__).with_suffix(".json")
ARMS, ROWS, STEPS, WIDTHS = 10, 64, 3000, (16, 64, 64, 2)
RATES = (1e-3, 3e-3, 1e-2)  # of Adam
LENGTHS = np.geomspace(1.0, 0.2, ARMS)  # of a link, m
MASSES = np.geomspace(2.0, 0.5, ARMS)  # at the end of a link, kg
TORQUE, GRAVITY = 5.0, 9.81  # N m, m/s^2
SINGLE = "single-task"
RULES: dict[str, Callable[[int], Weighting]] = {
    "uniform": weighting.uniform,
    "pcgrad": weighting.pcgrad,
    "gradnorm": weighting.gradnorm,
    "equalize": weighting.equalize,
}


def accelerations(arm: jax.Array, state: jax.Array) -> jax.Array:
    """[2] rad/s^2, of a two-link arm with point masses at the links' ends.

    ``state`` is angles [2] from the horizontal and from the first link, velocities [2], torques [2]
    in units of TORQUE.
    """
    length, mass = jnp.asarray(LENGTHS)[arm], jnp.asarray(MASSES)[arm]
    (first, second), (v, w), torques = jnp.split(state, 3)
    inertia = mass * length**2
    coupling = 1 + jnp.cos(second)
    matrix = inertia * jnp.array([[1 + 2 * coupling, coupling], [coupling, 1.0]])
    swing = inertia * jnp.sin(second) * jnp.array([-w * (2 * v + w), v**2])
    weight = mass * GRAVITY * length
    last = weight * jnp.cos(first + second)
    gravity = jnp.stack([2 * weight * jnp.cos(first) + last, last])
    return jnp.linalg.solve(matrix, TORQUE * torques - swing - gravity)


def transitions(key: jax.Array, arm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """States [ROWS, 6] of one arm, and their accelerations [ROWS, 2]."""
    low = jnp.array([-jnp.pi, -jnp.pi, -1.0, -1.0, -1.0, -1.0])
    states = jax.random.uniform(key, (ROWS, 6), minval=low, maxval=-low)
    return states, jax.vmap(accelerations, (None, 0))(arm, states)


def spreads() -> jax.Array:
    """[ARMS], the standard deviation of each arm's accelerations."""
    keys = jax.random.split(jax.random.key(100), 32)
    _, y = jax.vmap(jax.vmap(transitions, (None, 0)), (0, None))(keys, jnp.arange(ARMS))
    return jnp.std(y, axis=(0, 2, 3))


def predict(params: Any, arm: jax.Array, states: jax.Array) -> jax.Array:
    """Which arm it is comes as one of ten inputs."""
    which = jnp.broadcast_to(jax.nn.one_hot(arm, ARMS), (*states.shape[:-1], ARMS))
    return 100 * apply(params, jnp.concatenate([states, which], -1), jnp.tanh)


def loss_fn(params: Any, arm: jax.Array, states: jax.Array, y: jax.Array) -> jax.Array:
    """Of one arm, rad^2/s^4."""
    return jnp.mean((predict(params, arm, states) - y) ** 2)


@functools.partial(jax.jit, static_argnums=(0,))
def train(method: str, rate: jax.Array, key: jax.Array) -> Any:
    """The last parameters; of single tasks [ARMS, ...]."""
    begin, batches = jax.random.split(key)
    params, adam, arms = dense(begin, WIDTHS), optax.adam(rate), jnp.arange(ARMS)
    if method == SINGLE:
        params = jax.tree.map(lambda p: jnp.broadcast_to(p, (ARMS, *p.shape)), params)
    balanced = balanced_value_and_grad(
        loss_fn, RULES.get(method, weighting.uniform)(ARMS), in_axes=0
    )
    state = balanced.init(params)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state, opt_state = carry
        batch = jax.vmap(transitions)(jax.random.split(key, ARMS), arms)
        if method == SINGLE:
            grads = jax.vmap(jax.grad(loss_fn))(params, arms, *batch)
        else:
            (_, grads), state = balanced.value_and_grad(params, state, arms, *batch)
        updates, opt_state = adam.update(grads, opt_state)
        return (optax.apply_updates(params, updates), state, opt_state), None

    carry = params, state, adam.init(params)
    return jax.lax.scan(step, carry, jax.random.split(batches, STEPS))[0][0]


def errors(method: str, params: Any, key: jax.Array) -> np.ndarray:
    """[ARMS], the root mean squared error over the standard deviation, in %."""
    arms, keys = jnp.arange(ARMS), jax.random.split(key, 16 * ARMS)
    states, y = jax.vmap(transitions)(keys, jnp.tile(arms, 16))
    of_arm = 0 if method == SINGLE else None
    states, y = (jnp.moveaxis(jnp.reshape(a, (16, ARMS, *a.shape[1:])), 1, 0) for a in (states, y))
    losses = jax.vmap(loss_fn, (of_arm, 0, 0, 0))(params, arms, states, y)
    return 100 * np.asarray(jnp.sqrt(losses) / spreads())


def measure(method: str, seeds: int) -> dict[str, Any]:
    keys = [jax.random.key(seed) for seed in range(seeds)]
    runs = {rate: [train(method, jnp.float32(rate), key) for key in keys] for rate in RATES}

    def of_seeds(rate: float, split: int) -> np.ndarray:
        return np.stack([errors(method, p, jax.random.key(split)) for p in runs[rate]])

    best = min(RATES, key=lambda rate: of_seeds(rate, 1).mean())
    found = of_seeds(best, 2)
    return {
        "rate": best,
        "errors": found.mean(axis=0).tolist(),
        "mean": float(found.mean()),
        "deviation": float(found.mean(axis=1).std(ddof=1)),
        "worst": float(found.max(axis=1).mean()),
    }


# An actor-critic update: networks as in multi-task robot benchmarks, random transitions.

OBSERVED, ACTED, HIDDEN, BATCH = 39, 4, (400, 400, 400), 128  # a batch of every task
UPDATES = ("mean loss", "split and vmap", "equalize", "split and vmap, pcgrad", "pcgrad")


def actor_critic(num_tasks: int) -> tuple[Any, Any, tuple[Any, Any]]:
    """Parameters, transitions of every task, and the losses of the critic and the actor."""
    keys = jax.random.split(jax.random.key(0), 8)
    params = {
        "actor": dense(keys[0], (OBSERVED + num_tasks, *HIDDEN, 2 * ACTED)),
        "critic": dense(keys[1], (OBSERVED + num_tasks + ACTED, *HIDDEN, 1)),
    }
    shape = (num_tasks, BATCH)
    which = jnp.broadcast_to(jnp.eye(num_tasks)[:, None], (*shape, num_tasks))
    seen = jnp.concatenate([jax.random.normal(keys[2], (*shape, OBSERVED)), which], -1)
    acted, noise = jax.random.normal(keys[3], (2, *shape, ACTED))
    targets = jax.random.normal(keys[4], shape) * jnp.geomspace(1, 30, num_tasks)[:, None]

    def value(critic: Any, seen: jax.Array, acted: jax.Array) -> jax.Array:
        return apply(critic, jnp.concatenate([seen, acted], -1), jax.nn.relu)[..., 0]

    def critic_loss(critic: Any, seen: Any, acted: Any, noise: Any, targets: Any) -> jax.Array:
        return jnp.mean((value(critic, seen, acted) - targets) ** 2)

    def actor_loss(actor: Any, critic: Any, seen: Any, noise: Any) -> jax.Array:
        mean, log_deviation = jnp.split(apply(actor, seen, jax.nn.relu), 2, -1)
        log_deviation = jnp.clip(log_deviation, -5, 2)
        chosen = jnp.tanh(mean + jnp.exp(log_deviation) * noise)
        entropy = jnp.sum(log_deviation + jnp.log(1 - chosen**2 + 1e-6), -1)
        return jnp.mean(-value(critic, seen, chosen) - 0.1 * entropy)

    return params, (seen, acted, noise, targets), (critic_loss, actor_loss)


def by_hand(loss_fn: Any, rule: Weighting, axes: Any) -> Any:
    """Gradients of all tasks as one matrix [K, parameters], its Gramian, weights, the sum."""

    def gradient(params: Any, state: Any, *args: Any) -> tuple[Any, Any]:
        grads = jax.vmap(jax.grad(loss_fn), (None, *axes))(params, *args)
        matrix = jax.vmap(lambda g: jax.flatten_util.ravel_pytree(g)[0])(grads)
        gramian = matrix @ matrix.T
        norms = jnp.sqrt(jnp.diagonal(gramian))
        stats = weighting.TaskStats(
            norms=norms,
            cosines=gramian / norms[:, None] / norms,
            losses=None,
            present=jnp.ones(len(norms), bool),
            elapsed=jnp.ones([], jnp.int32),
        )
        weights, state = rule.update(stats, state)
        return jax.flatten_util.ravel_pytree(params)[1](weights @ matrix), state

    return lambda params: rule.init(), gradient


def by_library(loss_fn: Any, rule: Weighting, axes: Any) -> Any:
    balanced = balanced_value_and_grad(loss_fn, rule, in_axes=axes)

    def gradient(params: Any, state: Any, *args: Any) -> tuple[Any, Any]:
        (_, grads), state = balanced.value_and_grad(params, state, *args)
        return grads, state

    return balanced.init, gradient


def of_mean(loss_fn: Any, rule: Weighting, axes: Any) -> Any:
    def gradient(params: Any, state: Any, *args: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(jax.vmap(loss_fn, (None, *axes))(params, *args))

        return jax.grad(loss)(params), state

    return lambda params: (), gradient


def make_update(path: str, num_tasks: int) -> tuple[Any, Any, Any]:
    """``(carry, batch) -> (carry, zeros)``, the first carry, and the batch."""
    params, batch, (critic_loss, actor_loss) = actor_critic(num_tasks)
    rule = (weighting.pcgrad if "pcgrad" in path else weighting.inverse_norm)(num_tasks)
    if path == "equalize":
        rule = weighting.equalize(num_tasks)
    make = of_mean if path == "mean loss" else by_hand if "vmap" in path else by_library
    parts = {
        "critic": make(critic_loss, rule, (0, 0, 0, 0)),
        "actor": make(actor_loss, rule, (None, 0, 0)),
    }
    adam = optax.adam(3e-4)

    def step(carry: Any, batch: Any) -> Any:
        params, states, opt_state = carry
        seen, _, noise, _ = batch
        grads, states = {}, dict(states)
        grads["critic"], states["critic"] = parts["critic"][1](
            params["critic"], states["critic"], *batch
        )
        grads["actor"], states["actor"] = parts["actor"][1](
            params["actor"], states["actor"], params["critic"], seen, noise
        )
        updates, opt_state = adam.update(grads, opt_state)
        return (optax.apply_updates(params, updates), states, opt_state), jnp.zeros([])

    states = {name: init(params[name]) for name, (init, _) in parts.items()}
    return step, (params, states, adam.init(params)), batch


def measure_updates(num_tasks: int, rounds: int, limit: float) -> dict[str, Any]:
    """Per path milliseconds, and time and temporary memory over the update of the mean loss."""
    runs, temp, steps = {}, {}, max(1, 40 // num_tasks)
    for path in UPDATES:
        step, carry, batch = make_update(path, num_tasks)
        compiled = _measure.compile_step(step, carry, batch)
        temp[path] = _measure.temp_bytes(compiled)
        runs[path] = _measure.runner(compiled, carry, batch, steps)
    seconds = _measure.interleaved(runs, rounds, 1, limit)
    ratios = _measure.ratios(seconds, UPDATES[0])
    return {
        path: {
            "milliseconds": 1e3 * float(np.median(seconds[path])) / steps,
            "time": ratios[path],
            "temp_bytes": temp[path],
            "memory": temp[path] / temp[UPDATES[0]],
        }
        for path in UPDATES
    }


def update_cells(row: dict[str, float]) -> list[str]:
    """What the tables show of an update."""
    memory = f"{row['temp_bytes'] / 2**20:.0f} MiB, {row['memory']:.2f}x"
    return [f"{row['milliseconds']:.1f}", f"{row['time']:.2f}x", memory]


def cells(row: dict[str, Any]) -> list[str]:
    """What the tables show of a method."""
    return [
        f"{row['mean']:.1f} ± {row['deviation']:.1f}",
        f"{row['worst']:.1f}",
        f"{row['errors'][0]:.1f}",
        f"{row['errors'][-1]:.1f}",
        f"{row['rate']:g}",
    ]


COLUMNS = ("mean error, %", "worst arm, %", "heaviest, %", "lightest, %", "rate")


def main(
    seeds: int = 3, rounds: int = 11, seconds: float = 30.0, arms: bool = True, out: Path = RESULT
) -> None:
    """Measures and writes.

    Args:
      seeds: runs of each method and rate.
      rounds: interleaved rounds of the updates, at most.
      seconds: no round begins later, but for the first five.
      arms: whether to train on the arms; else what is there of them is kept.
      out: the JSON to write.
    """
    if arms:
        variances = np.asarray(spreads()) ** 2
        document: dict[str, Any] = {"seeds": seeds, "steps": STEPS}
        document["apart"] = float(variances.max() / variances.min())
        document["results"] = {method: measure(method, seeds) for method in (*RULES, SINGLE)}
    else:
        document = json.loads(out.read_text())
    rows = [[method, *cells(row)] for method, row in document["results"].items()]
    _measure.show("Ten arms", ["", *COLUMNS], rows)
    print(f"losses {document['apart']:.0f}x apart at the start")
    document["updates"] = {}
    for k in (10, 50):
        document["updates"][str(k)] = updates = measure_updates(k, rounds, seconds)
        rows = [[path, *update_cells(row)] for path, row in updates.items()]
        title = f"An actor-critic update of {k} tasks, {BATCH} transitions each"
        _measure.show(title, ["", "ms", "time", "memory"], rows)
    _measure.write(out, document)


if __name__ == "__main__":
    tyro.cli(main)
