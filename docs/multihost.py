"""Balanced training on several hosts that is resumed after one of them dies.

The same command on every host; where a cluster does not tell JAX who is who, name it:

    python multihost.py runs/first --coordinator 10.0.0.1:1234 --processes 2 --process 0

Every process draws the same batches and keeps its own rows of each, so that the step is all there
is to say where a run stood. Prints the last weights and the sum of all |parameters| as JSON.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gaba_jax import balanced_value_and_grad, weighting

BATCH, WIDTH = 32, 16


def losses_fn(params, x, y):
    h = jnp.tanh(x @ params["backbone"])
    return 500 * jnp.mean((h @ params["rul"] - y) ** 2), jnp.mean((h @ params["health"] - y) ** 2)


balanced = balanced_value_and_grad(
    losses_fn, weighting.gaba(2, warmup_steps=0, min_weight=0, debias=True)
)
optimizer = optax.adamw(1e-3)


def init():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "backbone": jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5,
        "rul": jax.random.normal(keys[1], (WIDTH,)) / WIDTH**0.5,
        "health": jax.random.normal(keys[2], (WIDTH,)) / WIDTH**0.5,
    }
    return params, balanced.init(params), optimizer.init(params)


def rows_of_this_process(step):
    random = np.random.default_rng(step)
    x = random.normal(size=(BATCH, WIDTH)).astype(np.float32)
    rows = np.split(np.arange(BATCH), jax.process_count())[jax.process_index()]
    return x[rows], np.sin(x.sum(axis=1))[rows]


@jax.jit
def train_step(carry, x, y):
    params, state, opt_state = carry
    (_, grads), state = balanced.value_and_grad(params, state, x, y)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), state, opt_state


def main(
    directory: tyro.conf.Positional[Path],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    steps: int = 200,
    every: int = 20,
) -> None:
    """Trains, and goes on from the last checkpoint where there is one.

    Args:
      directory: where the checkpoints are, reached by every host.
      coordinator: host:port of process 0.
      processes: how many there are.
      process: which this is, from 0.
      steps: updates in all.
      every: updates from one checkpoint to the next.
    """
    # A process that dies takes the others with it, after this many seconds at the latest.
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=20)
    if BATCH % jax.device_count():
        raise ValueError(
            f"{BATCH=} must be a multiple of the number of devices: there are "
            f"{jax.device_count()}, on {jax.process_count()} processes."
        )
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    on_all, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    carry, start = jax.device_put(init(), on_all), 0
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=2)
    with ocp.CheckpointManager(directory.absolute(), options=options) as checkpoints:
        if (last := checkpoints.latest_step()) is not None:
            carry = checkpoints.restore(last, args=ocp.args.StandardRestore(carry))
            start = last + 1
        for step in range(start, steps):
            rows = rows_of_this_process(step)
            batch = [jax.make_array_from_process_local_data(split, row) for row in rows]
            carry = train_step(carry, *batch)
            checkpoints.save(step, args=ocp.args.StandardSave(carry))
    params, state, _ = jax.tree.map(np.asarray, carry)
    checksum = sum(float(np.abs(leaf, dtype=np.float64).sum()) for leaf in jax.tree.leaves(params))
    weights = state.task_weights.tolist()
    print(json.dumps({"resumed_at": start, "task_weights": weights, "checksum": checksum}))


if __name__ == "__main__":
    tyro.cli(main)
