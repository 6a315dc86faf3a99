"""Training steps of the network that the method was published with, without PyTorch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gaba_jax.turbofan._loop import make_driver, make_losses_fn, make_model, split_model
from gaba_jax.turbofan.config import GabaOptions, TrainConfig, make_weighting
from gaba_jax.turbofan.data import Split

BATCH, WINDOW, CHANNELS = 64, 30, 17
DROPOUT, LEARNING_RATE = 0.1, 1e-4
BETA, MIN_WEIGHT, WARMUP_STEPS = 0.99, 0.05, 0


def make_jax_step(config: TrainConfig, path: str) -> tuple[Callable[..., Any], Any]:
    """``(carry, batch) -> (carry, (losses, norms))`` and the first carry, to be donated."""
    graph, params, stats = split_model(make_model(config, WINDOW, CHANNELS, 0))
    tx = optax.adamw(LEARNING_RATE)
    key = jax.random.key(0)

    if path == "plain":
        losses_fn = make_losses_fn(graph, config)

        def mean(params: Any, stats: Any, batch: Any, key: Any) -> Any:
            losses, stats = losses_fn(params, stats, batch, key)
            return jnp.mean(jnp.stack(losses)), (jnp.stack(losses), stats)

        def step(carry: Any, batch: Any) -> Any:
            params, stats, _, opt_state, key = carry
            key, now = jax.random.split(key)
            (_, (losses, stats)), grads = jax.value_and_grad(mean, has_aux=True)(
                params, stats, batch, now
            )
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, stats, (), opt_state, key), (losses, jnp.zeros(2))

        return step, (params, stats, (), tx.init(params), key)
    init, value_and_grad = make_driver(graph, config, make_weighting(config))

    def step(carry: Any, batch: Any) -> Any:
        params, stats, state, opt_state, key = carry
        key, now = jax.random.split(key)
        ((losses, stats), grads), state = value_and_grad(params, state, stats, batch, now)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, stats, state, opt_state, key), (jnp.stack(losses), state.task_norms)

    return step, (params, stats, init(params), tx.init(params), key)


def configure(path: str, dropout: float) -> TrainConfig:
    measure: Any = "exact" if path == "plain" else path
    gaba = GabaOptions(beta=BETA, warmup_steps=WARMUP_STEPS, min_weight=MIN_WEIGHT)
    return TrainConfig(model="full", dropout=dropout, measure=measure, gaba=gaba)


def make_batch() -> Split:
    draw = np.random.default_rng(0)
    rul = draw.uniform(0, 125, BATCH).astype(np.float32)
    return Split(
        windows=draw.normal(size=(BATCH, WINDOW, CHANNELS)).astype(np.float32),
        rul=rul,
        health=draw.integers(0, 3, BATCH).astype(np.int32),
        engine=np.zeros(BATCH, np.int32),
        rul_uncapped=rul,
    )
