"""Ten robot arms, one network: ``python -m benchmarks.control``.

Two-link arms of ten lengths and masses, whose dynamics (accelerations from angles, velocities and
torques) one network learns. Every arm has transitions of its own. The losses, squared errors in
rad^2/s^4, are 1,000 times apart. Each method at the learning rate that is best on validation data,
three seeds. Prints a table and writes benchmarks/control.json; one method takes some seconds.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def main(seeds: int = 3, out: Path = RESULT) -> None:
    """Measures and writes.

    Args:
      seeds: runs of each method and rate.
      out: the JSON to write.
    """
    variances = np.asarray(spreads()) ** 2
    results = {method: measure(method, seeds) for method in (*RULES, SINGLE)}
    rows = [[method, *cells(row)] for method, row in results.items()]
    _measure.show("Ten arms", ["", *COLUMNS], rows)
    apart = float(variances.max() / variances.min())
    print(f"losses {apart:.0f}x apart at the start")
    _measure.write(out, {"seeds": seeds, "steps": STEPS, "apart": apart, "results": results})


if __name__ == "__main__":
    tyro.cli(main)
