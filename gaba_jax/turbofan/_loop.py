"""The compiled parts of a run: one stretch of updates, and predictions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from gaba_jax import BalanceState, balance, balanced_value_and_grad, only, task_value_and_grad
from gaba_jax.turbofan.config import TASKS, TrainConfig
from gaba_jax.turbofan.data import Split
from gaba_jax.turbofan.losses import (
    cross_entropy,
    failure_biased_squared_error,
    mean_squared_error,
)
from gaba_jax.turbofan.model import CompactModel, FullModel
from gaba_jax.weighting import Weighting

Params = Any  # an nnx.State of nnx.Param
Stats = Any  # an nnx.State of nnx.BatchStat, empty without BatchNorm

_PREDICTED_AT_ONCE = 512
_PLATEAU_FACTOR = 0.5
_DROPOUT = 0  # folded into a run's key; its epochs count from 1


class Carry(NamedTuple):
    """All that one update hands to the next, and a checkpoint keeps."""

    params: Params
    stats: Stats
    balance: BalanceState
    optimizer: Any
    plateau: Any  # its state, () with another schedule
    average: Any  # of params and stats, () without one


class Program(NamedTuple):
    """The functions of a run, over a leading axis of seeds.

    Attributes:
      init: ``seeds -> carries``.
      train_chunk: ``(carries, keys, orders, epoch, start, stop, split) -> (carries, record)``, the
        updates ``start`` to ``stop`` of an epoch; record is [losses, norms, weights].
      evaluated: ``carries -> (params, stats)``, the average where there is one.
      predict: ``((params, stats), windows) -> (RUL, health)``, each [seeds, N].
      end_epoch: ``(carries, validation RMSE [seeds]) -> carries``.
    """

    init: Callable[..., Carry]
    train_chunk: Callable[..., tuple[Carry, Any]]
    evaluated: Callable[[Carry], tuple[Params, Stats]]
    predict: Callable[..., tuple[jax.Array, jax.Array]]
    end_epoch: Callable[[Carry, jax.Array], Carry]


def make_model(
    config: TrainConfig, window: int, channels: int, seed: int
) -> CompactModel | FullModel:
    """The model of a run, with the parameters that a seed gives."""
    if config.model == "compact":
        return CompactModel(window, channels, rngs=nnx.Rngs(seed))
    return FullModel(window, channels, dropout=config.dropout, rngs=nnx.Rngs(seed))


def split_model(model: nnx.Module) -> tuple[Any, Params, Stats]:
    """Its graph, parameters and running statistics."""
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graph, params, stats


def make_losses_fn(
    graph: Any, config: TrainConfig
) -> Callable[..., tuple[tuple[jax.Array, jax.Array], Stats]]:
    """``(params, stats, batch, key) -> ((RUL loss, health loss), stats)`` of a model's graph."""
    of_features = _make_losses_of_features(graph, config)
    features = _make_encoder(graph)

    def losses_fn(params: Params, *args: Any) -> tuple[tuple[jax.Array, jax.Array], Stats]:
        return of_features(params, features(params, *args), *args)

    return losses_fn


def _make_encoder(graph: Any) -> Callable[..., tuple[jax.Array, Stats]]:
    def encoder(params: Params, stats: Stats, batch: Any, key: jax.Array) -> Any:
        model = nnx.merge(graph, params, stats, copy=True)
        features = model.backbone(batch.windows, key=key)
        return features, nnx.state(model, nnx.BatchStat)

    return encoder


def _make_losses_of_features(graph: Any, config: TrainConfig) -> Callable[..., Any]:
    rul_loss = mean_squared_error if config.loss == "mse" else failure_biased_squared_error

    def losses_fn(params: Params, encoded: Any, stats: Stats, batch: Any, key: jax.Array) -> Any:
        del key  # no dropout in the heads
        features, new_stats = encoded
        rul, logits = nnx.merge(graph, params, stats, copy=True).heads(features)
        return (rul_loss(rul, batch.rul), cross_entropy(logits, batch.health)), new_stats

    return losses_fn


def make_driver(
    graph: Any, config: TrainConfig, rule: Weighting
) -> tuple[Callable[[Params], Any], Callable[..., Any]]:
    """``init`` and ``value_and_grad`` as those of :func:`gaba_jax.balanced_value_and_grad`."""
    options: dict[str, Any] = {
        "shared": only(*config.shared) if config.shared else None,
        "measure_on": only(*config.measure_on) if config.measure_on else None,
        "weight_task_specific": config.weight_task_specific,
        "nonfinite": config.nonfinite,
    }
    if config.measure == "stacked":
        balancer = balance(rule, **options)
        of_tasks = task_value_and_grad(make_losses_fn(graph, config), has_aux=True)

        def value_and_grad(params: Params, state: Any, *args: Any) -> Any:
            (losses, stats), stacked = of_tasks(params, *args)
            grads, state = balancer.update(stacked, state, params, task_losses=losses)
            return ((losses, stats), grads), state

        return balancer.init, value_and_grad
    options |= {"every": config.every, "has_aux": True}
    if config.measure == "encoder":
        losses_fn = _make_losses_of_features(graph, config)
        return balanced_value_and_grad(losses_fn, rule, encoder=_make_encoder(graph), **options)
    return balanced_value_and_grad(
        make_losses_fn(graph, config), rule, measure=config.measure, **options
    )


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW or SGD on the schedule; ``steps`` is the number in an epoch."""
    warmup = round(config.warmup_epochs * steps)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, config.epochs * steps - warmup)
    else:
        after = optax.constant_schedule(config.learning_rate)
    learning_rate = after
    if warmup:
        rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
        learning_rate = optax.join_schedules([rise, after], [warmup])
    if config.optimizer == "sgd":
        tx = optax.sgd(learning_rate, momentum=0.9)
    else:
        tx = optax.adamw(learning_rate, b2=config.adam_b2, weight_decay=config.weight_decay)
    if config.clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
    return tx


def make_program(
    config: TrainConfig, rule: Weighting, shape: tuple[int, int, int], steps: int
) -> Program:
    """Builds the functions of a run.

    Args:
      config: of the run.
      rule: the weighting.
      shape: (training windows, window, channels).
      steps: updates in an epoch.
    """
    _, window, channels = shape
    graph, _, _ = split_model(make_model(config, window, channels, 0))
    init_balance, value_and_grad = make_driver(graph, config, rule)
    plateau = optax.contrib.reduce_on_plateau(
        factor=_PLATEAU_FACTOR, patience=config.plateau_patience
    )
    one = _OneSeed(
        config,
        steps,
        graph,
        init_balance,
        value_and_grad,
        make_optimizer(config, steps),
        plateau,
        optax.ema(config.average_decay),
    )
    over_seeds = lax.map if jax.default_backend() == "cpu" else _vmap

    def init(seeds: list[int]) -> Carry:
        models = [split_model(make_model(config, window, channels, seed))[1:] for seed in seeds]
        return lax.map(one.init, jax.tree.map(lambda *each: jnp.stack(each), *models))

    # The bounds are dynamic: one program whatever the chunks, and so the same numbers.
    @jax.jit
    def train_chunk(
        carries: Carry,
        keys: jax.Array,
        orders: jax.Array,
        epoch: int,
        start: int,
        stop: int,
        split: Split,
    ) -> tuple[Carry, Any]:
        def chunk(seed: tuple[Carry, jax.Array, jax.Array]) -> tuple[Carry, Any]:
            return one.train_chunk(*seed, epoch, start, stop, split)

        return over_seeds(chunk, (carries, keys, orders))

    @jax.jit
    def evaluated(carries: Carry) -> tuple[Params, Stats]:
        if not config.average_decay:
            return carries.params, carries.stats
        return jax.vmap(one.debiased)(carries.average)

    @jax.jit
    def predict_part(variables: tuple[Params, Stats], windows: jax.Array) -> Any:
        return over_seeds(lambda each: one.predict(each, windows), variables)

    def predict(variables: tuple[Params, Stats], windows: Any) -> tuple[jax.Array, jax.Array]:
        return _in_parts(lambda part: predict_part(variables, part), windows)

    @jax.jit
    def end_epoch(carries: Carry, validation_rmse: jax.Array) -> Carry:
        if config.schedule != "plateau":
            return carries
        after = jax.vmap(one.plateau_after)(carries.plateau, validation_rmse)
        return carries._replace(plateau=after)

    return Program(init, train_chunk, evaluated, predict, end_epoch)


class _OneSeed(NamedTuple):
    """What a run is made of, and its functions without the axis of seeds."""

    config: TrainConfig
    steps: int
    graph: Any
    init_balance: Callable[[Params], Any]
    value_and_grad: Callable[..., Any]
    optimizer: optax.GradientTransformation
    plateau: optax.GradientTransformationExtraArgs
    average: optax.GradientTransformation

    def init(self, variables: tuple[Params, Stats]) -> Carry:
        params, stats = variables
        return Carry(
            params,
            stats,
            self.init_balance(params),
            self.optimizer.init(params),
            self.plateau.init(params) if self.config.schedule == "plateau" else (),
            self.average.init(variables) if self.config.average_decay else (),
        )

    def train_chunk(
        self,
        carry: Carry,
        key: jax.Array,
        order: jax.Array,
        epoch: int,
        start: int,
        stop: int,
        split: Split,
    ) -> tuple[Carry, Any]:
        """The updates ``start`` to ``stop`` of an epoch, and what was measured in each."""
        rows = order.reshape(self.steps, self.config.batch_size)
        of_epoch = jax.random.fold_in(jax.random.fold_in(key, _DROPOUT), epoch)

        def step(i: jax.Array, loop: tuple[Carry, Any]) -> tuple[Carry, Any]:
            carry, record = loop
            batch = jax.tree.map(lambda column: column[rows[i]], split)
            carry, measured = self.update(carry, batch, jax.random.fold_in(of_epoch, i))
            return carry, [kept.at[i].set(now) for kept, now in zip(record, measured, strict=True)]

        record = [jnp.zeros([self.steps, len(TASKS)], jnp.float32) for _ in range(3)]
        return lax.fori_loop(start, stop, step, (carry, record))

    def update(self, carry: Carry, batch: Split, key: jax.Array) -> tuple[Carry, tuple[Any, ...]]:
        """One update; its losses, norms and weights."""
        ((losses, stats), grads), state = self.value_and_grad(
            carry.params, carry.balance, carry.stats, batch, key
        )
        updates, opt_state = self.optimizer.update(grads, carry.optimizer, carry.params)
        if self.config.schedule == "plateau":
            updates = optax.tree.scale(carry.plateau.scale, updates)
        params = optax.apply_updates(carry.params, updates)
        averaged = carry.average
        if self.config.average_decay:
            _, averaged = self.average.update((params, stats), averaged)
        measured = losses, state.task_norms, state.task_weights
        return Carry(params, stats, state, opt_state, carry.plateau, averaged), measured

    def debiased(self, state: optax.EmaState) -> Any:
        """The average, without what it started from."""
        return optax.tree.bias_correction(state.ema, self.config.average_decay, state.count)

    def predict(
        self, variables: tuple[Params, Stats], windows: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """RUL and health of windows."""
        rul, logits = nnx.merge(self.graph, *variables)(windows)
        return rul, jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def plateau_after(self, state: Any, validation_rmse: jax.Array) -> Any:
        """The state of the plateau schedule after an epoch."""
        return self.plateau.update({}, state, value=validation_rmse)[1]


def _in_parts(
    predict: Callable[[Any], tuple[jax.Array, jax.Array]], windows: Any
) -> tuple[jax.Array, jax.Array]:
    """What is predicted of all windows, [seeds, N] each, a part of them at a time."""
    size = min(len(windows), _PREDICTED_AT_ONCE)
    parts = []
    for start in range(0, len(windows), size):
        # The last part overlaps the one before: every part has the same shape.
        start = min(start, len(windows) - size)
        parts.append((start, predict(windows[start : start + size])))
    kept = [
        jax.tree.map(lambda each, n=n: each[:, n:], part)
        for n, part in _without_overlap(parts, size)
    ]
    rul, health = jax.tree.map(lambda *each: jnp.concatenate(each, axis=1), *kept)
    return rul, health


def _without_overlap(parts: list[tuple[int, Any]], size: int) -> list[tuple[int, Any]]:
    """How many rows of each part the parts before it hold already."""
    stops = [0, *(start + size for start, _ in parts)]
    return [(stop - start, part) for stop, (start, part) in zip(stops, parts, strict=False)]


def _vmap(function: Callable[[Any], Any], arguments: Any) -> Any:
    return jax.vmap(function)(arguments)
