"""Training the two-headed turbofan model with balanced gradients."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from numpy.typing import NDArray

from gaba_jax import BalanceState, balance_metrics, balanced_value_and_grad, only, weighting
from gaba_jax.turbofan import metrics, simulator
from gaba_jax.turbofan.checkpoints import Checkpoints, Snapshot, Stopped
from gaba_jax.turbofan.data import Split, TurbofanData, load, prepare
from gaba_jax.turbofan.losses import (
    cross_entropy,
    failure_biased_squared_error,
    mean_squared_error,
)
from gaba_jax.turbofan.model import CompactModel

TASKS = ("rul", "health")
Params = Any  # an nnx.State of nnx.Param
Carry = tuple[Params, BalanceState, Any]  # with the optimizer's state
_STATE: tuple[str, ...] = ("params", "balance", "optimizer")  # a Carry in a checkpoint
_HISTORY: tuple[str, ...] = ("losses", "task_norms", "task_weights")  # recorded at every update
Subset = Literal["FD001", "FD002", "FD003", "FD004"]
Rule = Literal[
    "aligned_mtl",
    "cagrad",
    "config",
    "dual_projection",
    "dynamic_weight_average",
    "fairgrad",
    "famo",
    "gaba",
    "geometric_mean",
    "gradnorm",
    "gradvac",
    "imtl_g",
    "imtl_l",
    "inverse_norm",
    "inverse_share",
    "mgda",
    "nash_mtl",
    "pcgrad",
    "proportional_integral",
    "random",
    "scale_invariant",
    "smooth_tchebycheff",
    "uncertainty",
    "uniform",
    "upgrad",
]


@dataclasses.dataclass(frozen=True)
class GabaOptions:
    """The options of gaba_jax.gaba, with its defaults."""

    beta: float = 0.99
    """decay of the average in [0, 1); 0 is no smoothing"""
    warmup_steps: int = 100
    """updates with equal weights before averaging starts"""
    min_weight: float = 0.05
    """floor under each weight"""
    floor: Literal["renormalize", "project"] = "renormalize"
    """clamp and renormalise (published), or the exact projection"""
    debias: bool = False
    """start the average at the first measurement instead of at equal weights"""
    task_priorities: tuple[float, float] | None = None
    """wanted ratio of contributions, RUL then health"""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Data, rule and optimizer of one run. Defaults were chosen on validation engines."""

    data: Path | None = None
    """folder of C-MAPSS text, plain or .gz; None simulates a small fleet"""
    subset: Subset = "FD001"
    """which of the four subsets"""
    sensors_only: bool = False
    """leave the three operating settings out of the features"""
    stride: int = 1
    """cycles between training windows"""
    weighting: Rule = "gaba"
    """how the two losses are weighted"""
    gaba: GabaOptions = GabaOptions()
    shared: tuple[str, ...] = ()
    """names of the shared parameters; none given: found from the gradients"""
    measure_on: tuple[str, ...] = ()
    """names of the shared parameters to take norms on; none given: all"""
    weight_task_specific: bool = True
    """weight the gradients of the heads too (off needs --shared)"""
    nonfinite: Literal["propagate", "drop"] = "propagate"
    """what becomes of a NaN or Inf in one task's gradient ("drop" needs --measure lagged)"""
    measure: Literal["exact", "lagged"] = "exact"
    """apply the weights of this update, or of the one before, one backward pass cheaper"""
    every: int = 1
    """updates from one measurement to the next"""
    epochs: int = 15
    """passes over the training windows"""
    batch_size: int = 128
    """windows in a batch"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum 0.9"""
    learning_rate: float = 2e-3
    """peak of the cosine decay"""
    weight_decay: float = 1e-4
    """of AdamW"""
    adam_b2: float = 0.99
    """decay of AdamW's second moment"""
    loss: Literal["mse", "amnl"] = "mse"
    """of the RUL: mean squared error, or that weighted up towards failure"""
    seed: int = 0
    """of the simulated fleet, the validation engines, the parameters and the batches"""


class EpochRecord(NamedTuple):
    """One epoch: its number from 1, scalars for a log, and every update's measurements."""

    epoch: int
    scalars: dict[str, float]
    losses: NDArray[np.float32]  # [steps, 2]
    task_norms: NDArray[np.float32]  # [steps, 2]
    task_weights: NDArray[np.float32]  # [steps, 2]


class Run(NamedTuple):
    """A finished run: the parameters, what was recorded, what the test engines say."""

    params: Params
    records: list[EpochRecord]
    predicted_rul: NDArray[np.float32]  # [test engines]
    predicted_health: NDArray[np.int32]
    summary: dict[str, Any]


def load_data(config: TrainConfig) -> TurbofanData:
    """The engines that a run trains on: the files in ``config.data``, or a simulated fleet."""
    options: dict[str, Any] = {
        "stride": config.stride,
        "sensors_only": config.sensors_only,
        "seed": config.seed,
    }
    if config.data is not None:
        return load(config.data, config.subset, **options)
    conditions = 6 if config.subset in ("FD002", "FD004") else 1
    fault_modes = 2 if config.subset in ("FD003", "FD004") else 1
    fleet = simulator.simulate(conditions=conditions, fault_modes=fault_modes, seed=config.seed)
    return prepare(fleet, **options)


def make_weighting(config: TrainConfig) -> weighting.Weighting:
    """The rule of a run. Norms are always measured, so that any rule can be watched."""
    if config.weighting == "gaba":
        rule = weighting.gaba(len(TASKS), **dataclasses.asdict(config.gaba))
    elif config.gaba != GabaOptions():
        changed = [
            field.name
            for field in dataclasses.fields(GabaOptions)
            if getattr(config.gaba, field.name) != field.default
        ]
        raise ValueError(
            f"{', '.join(changed)}: options of the weighting gaba, without effect on "
            f"{config.weighting}. Leave them out, or take the weighting gaba."
        )
    else:
        rule = getattr(weighting, config.weighting)(len(TASKS))
    return rule._replace(needs=rule.needs | {"norms"})


def make_losses_fn(graph: Any, config: TrainConfig) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """``(params, batch) -> (RUL loss, health loss)`` of the model with this nnx graph."""
    rul_loss = mean_squared_error if config.loss == "mse" else failure_biased_squared_error

    def losses_fn(params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
        rul, logits = nnx.merge(graph, params)(batch.windows)
        return rul_loss(rul, batch.rul), cross_entropy(logits, batch.health)

    return losses_fn


def train(
    data: TurbofanData,
    config: TrainConfig,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    checkpoints: Checkpoints | None = None,
) -> Run:
    """Trains the compact model; the same data, configuration and machine give the same run.

    Every epoch is one jitted loop over data that stays on the device, or several calls of it where
    there are checkpoints within. Saved, stopped and resumed or not, a run has bitwise the same
    parameters and records; only its timing differs.

    Args:
      data: the engines, from :func:`load_data`.
      config: everything else.
      on_epoch: called after each epoch with its :class:`EpochRecord`; of a resumed run first with
        those of the epochs that were finished before.
      checkpoints: where and how often to save the run, and whether to resume it. Defaults to
        None, no checkpoints.

    Returns:
      A :class:`Run`; its ``summary`` can be written as JSON.

    Raises:
      ValueError: a value of ``config`` is out of range, or the checkpoints to go on from are of
        another run, or cannot be read.
      FileExistsError: there are checkpoints, but they are not to be resumed.
      FloatingPointError: the losses are no longer finite.
      OSError: a checkpoint could not be written.
      Stopped: ``checkpoints.stop`` asked for it.

    Example:
      >>> from gaba_jax.turbofan.train import TrainConfig, load_data, train
      >>> config = TrainConfig(epochs=1, stride=20)
      >>> run = train(load_data(config), config)
      >>> sorted(run.summary["test"])[:3]
      ['health_accuracy', 'late_prediction_rate', 'macro_f1']
    """

    def checked(records: Sequence[EpochRecord]) -> None:
        (record,) = records
        on_epoch(record)
        if not np.isfinite(record.losses[-1]).all():
            raise FloatingPointError(
                f"the losses are no longer finite in epoch {record.epoch}: {record.losses[-1]}. "
                f"Lower the learning rate (it is {config.learning_rate})."
            )

    rule = make_weighting(config)
    return _train_seeds(data, config, rule, (config.seed,), checked, checkpoints)[0]


def train_seeds(
    data: TurbofanData,
    config: TrainConfig,
    rule: weighting.Weighting,
    seeds: Sequence[int],
    on_epoch: Callable[[Sequence[EpochRecord]], None] = lambda records: None,
) -> list[Run]:
    """Trains once per seed, side by side in one compiled program.

    On an accelerator the seeds are one batch (``jax.vmap``), on a CPU one after the other
    (``lax.map``), which is as fast there and needs less memory.

    Args:
      data: the engines, from :func:`load_data`; the same for all seeds.
      config: everything else; its ``weighting``, ``gaba`` and ``seed`` are not read.
      rule: the weighting.
      seeds: of the parameters and the batches; the same for every rule.
      on_epoch: called after each epoch with the :class:`EpochRecord` of each seed.

    Returns:
      A :class:`Run` per seed. A run whose losses or predictions are no longer finite is marked
      ``diverged`` in its summary and has no scores.

    Raises:
      ValueError: a value of ``config`` is out of range.
    """
    return _train_seeds(data, config, rule, seeds, on_epoch, None)


def _train_seeds(
    data: TurbofanData,
    config: TrainConfig,
    rule: weighting.Weighting,
    seeds: Sequence[int],
    on_epoch: Callable[[Sequence[EpochRecord]], None],
    checkpoints: Checkpoints | None,  # of a single seed
) -> list[Run]:
    _check(config, len(data.train.rul))
    started = time.perf_counter()
    num_windows, window, channels = data.train.windows.shape
    steps = num_windows // config.batch_size
    models = [CompactModel(window, channels, rngs=nnx.Rngs(seed)) for seed in seeds]
    graph, _ = nnx.split(models[0], nnx.Param)
    params = jax.tree.map(
        lambda *each: jnp.stack(each), *(nnx.state(model, nnx.Param) for model in models)
    )
    over_seeds = lax.map if jax.default_backend() == "cpu" else _vmap
    balanced = balanced_value_and_grad(
        make_losses_fn(graph, config),
        rule,
        measure=config.measure,
        every=config.every,
        shared=only(*config.shared) if config.shared else None,
        measure_on=only(*config.measure_on) if config.measure_on else None,
        weight_task_specific=config.weight_task_specific,
        nonfinite=config.nonfinite,
    )
    tx = _optimizer(config, config.epochs * steps)

    # The bounds are dynamic: one program whatever the chunks, and so the same numbers.
    @jax.jit
    def train_chunk(
        carries: Carry, orders: jax.Array, start: int, stop: int, split: Split
    ) -> tuple[Carry, Any]:
        def chunk(seed: tuple[Carry, jax.Array]) -> tuple[Carry, Any]:
            carry, order = seed
            rows = order.reshape(steps, config.batch_size)

            def step(i: jax.Array, loop: tuple[Carry, Any]) -> tuple[Carry, Any]:
                (params, state, opt_state), record = loop
                batch = jax.tree.map(lambda column: column[rows[i]], split)
                (losses, grads), state = balanced.value_and_grad(params, state, batch)
                updates, opt_state = tx.update(grads, opt_state, params)
                params = optax.apply_updates(params, updates)
                measured = losses, state.task_norms, state.task_weights
                record = [kept.at[i].set(now) for kept, now in zip(record, measured, strict=True)]
                return (params, state, opt_state), record

            record = [jnp.zeros([steps, len(TASKS)], jnp.float32) for _ in _HISTORY]
            return lax.fori_loop(start, stop, step, (carry, record))

        return over_seeds(chunk, (carries, orders))

    def shuffle(keys: Sequence[jax.Array], epoch: int) -> jax.Array:
        drawn = [jax.random.permutation(jax.random.fold_in(k, epoch), num_windows) for k in keys]
        return jnp.stack(drawn)[:, : steps * config.batch_size]

    @jax.jit
    def predict(params: Params, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(params: Params) -> tuple[jax.Array, jax.Array]:
            rul, logits = nnx.merge(graph, params)(windows)
            return rul, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return over_seeds(one, params)

    def evaluate(params: Params, split: Split) -> list[tuple[Any, Any, dict[str, float]]]:
        ruls, healths = jax.tree.map(np.asarray, predict(params, split.windows))
        return [
            (rul, health, metrics.evaluate(rul, split.rul, health, split.health))
            if np.isfinite(rul).all()
            else (rul, health, {})
            for rul, health in zip(ruls, healths, strict=True)
        ]

    carries: Carry = lax.map(lambda p: (p, balanced.init(p), tx.init(p)), params)
    on_device = jax.device_put(data.train)
    keys = [jax.random.key(seed) for seed in seeds]
    total = config.epochs * steps
    history = {name: np.zeros([len(seeds), total, len(TASKS)], np.float32) for name in _HISTORY}
    scalars: list[list[dict[str, float]]] = [[] for _ in seeds]
    records: list[list[EpochRecord]] = [[] for _ in seeds]
    seconds: list[float] = []
    done, elapsed, orders, identity = 0, 0.0, shuffle(keys, 1), {}

    def first_state() -> dict[str, Any]:
        """Of the first seed. In numpy, since arrays bound to a device would compile once more."""
        of_seed = jax.tree.map(lambda leaf: np.asarray(leaf[0]), carries)
        return dict(zip(_STATE, of_seed, strict=True))

    def finish(epoch: int) -> None:
        rows = slice((epoch - 1) * steps, epoch * steps)
        for i in range(len(seeds)):
            record = EpochRecord(
                epoch, scalars[i][epoch - 1], *(history[name][i, rows] for name in _HISTORY)
            )
            records[i].append(record)
        on_epoch([each[-1] for each in records])

    if checkpoints is not None:
        identity = _identity(config) | {"tasks": list(TASKS), "data": _fingerprint(data)}
        snapshot = checkpoints.start(first_state(), identity, _identity(TrainConfig()))
        if snapshot is not None:
            saved = tuple(snapshot.state[name] for name in _STATE)
            carries = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], saved)
            done, seconds, elapsed = snapshot.step, snapshot.seconds, snapshot.elapsed
            keys, orders, scalars = [snapshot.rng], snapshot.order[None], [snapshot.scalars]
            for name in _HISTORY:
                history[name][0, :done] = snapshot.history[name]
            for epoch in range(1, done // steps + 1):
                finish(epoch)
    while done < total:
        epoch, start = divmod(done, steps)
        if start == 0:
            orders = shuffle(keys, epoch + 1)
            seconds.append(0.0)
        stop = steps
        if checkpoints is not None:
            stop = min(stop, start + checkpoints.every - done % checkpoints.every)
        before = time.perf_counter()
        carries, record = jax.block_until_ready(
            train_chunk(carries, orders, start, stop, on_device)
        )
        seconds[-1] += time.perf_counter() - before
        for name, values in zip(_HISTORY, record, strict=True):
            history[name][:, done : done + stop - start] = np.asarray(values)[:, start:stop]
        done += stop - start
        if stop == steps:
            params, states, _ = carries
            validation = evaluate(params, data.validation)
            rows = slice(done - steps, done)
            for i in range(len(seeds)):
                losses = history["losses"][i, rows]
                found = {f"loss/{task}": float(losses[:, j].mean()) for j, task in enumerate(TASKS)}
                found |= {f"validation/{name}": value for name, value in validation[i][2].items()}
                state = jax.tree.map(lambda leaf, i=i: leaf[i], states)
                found |= {k: float(v) for k, v in balance_metrics(state, TASKS).items()}
                scalars[i].append(found)
            finish(epoch + 1)
        if checkpoints is not None:
            stopped = checkpoints.stop()
            if stopped or done % checkpoints.every == 0 or done == total:
                snapshot = Snapshot(
                    step=done,
                    state=first_state(),
                    rng=keys[0],
                    order=orders[0],
                    history={name: values[0, :done] for name, values in history.items()},
                    scalars=scalars[0],
                    seconds=seconds,
                    elapsed=elapsed + time.perf_counter() - started,
                )
                checkpoints.save(snapshot, identity)
            if stopped:
                raise Stopped(f"stopped after update {done} of {total}")
    params = carries[0]
    validation, test = (evaluate(params, split) for split in (data.validation, data.test))
    runs: list[Run] = []
    for i, seed in enumerate(seeds):
        summary = _summary(dataclasses.replace(config, seed=seed), data, records[i])
        summary["parameters"] = sum(leaf[i].size for leaf in jax.tree.leaves(params))
        summary["diverged"] = not (validation[i][2] and test[i][2])
        summary["validation"], summary["test"] = validation[i][2], test[i][2]
        summary["timing"] = {
            "seconds": (elapsed + time.perf_counter() - started) / len(seeds),
            # The first epoch compiles.
            "step_seconds": float(np.median(seconds[1:] or seconds)) / (steps * len(seeds)),
        }
        rul, health, _ = test[i]
        of_seed = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        runs.append(Run(of_seed, records[i], rul, health, summary))
    return runs


def _vmap(function: Callable[[Any], Any], arguments: Any) -> Any:
    return jax.vmap(function)(arguments)


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What the numbers of a run depend on, beside the data, which may lie in another folder."""
    named = dataclasses.asdict(config)
    del named["data"]
    return named | {f"gaba.{name}": value for name, value in named.pop("gaba").items()}


def _fingerprint(data: TurbofanData) -> str:
    digest = hashlib.sha256()
    for array in (*data.train, *data.validation, *data.test):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return f"{len(data.train.rul)} training windows, sha256 {digest.hexdigest()[:16]}"


def _optimizer(config: TrainConfig, updates: int) -> optax.GradientTransformation:
    learning_rate = optax.cosine_decay_schedule(config.learning_rate, updates)
    if config.optimizer == "sgd":
        return optax.sgd(learning_rate, momentum=0.9)
    return optax.adamw(learning_rate, b2=config.adam_b2, weight_decay=config.weight_decay)


def _check(config: TrainConfig, num_windows: int) -> None:
    for name in ("epochs", "batch_size", "stride", "every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    if config.batch_size > num_windows:
        raise ValueError(
            f"batch_size={config.batch_size} is more than the {num_windows} training windows."
        )
    if not 0 < config.learning_rate < float("inf"):
        raise ValueError(f"learning_rate={config.learning_rate} must be positive.")
    if not 0 <= config.weight_decay < float("inf"):
        raise ValueError(f"weight_decay={config.weight_decay} must be at least 0.")
    if not 0 <= config.adam_b2 < 1:
        raise ValueError(f"adam_b2={config.adam_b2} must be in [0, 1).")
    if config.seed < 0:
        raise ValueError(f"seed={config.seed} must be at least 0.")


def _summary(config: TrainConfig, data: TurbofanData, records: list[EpochRecord]) -> dict[str, Any]:
    norms = np.concatenate([record.task_norms for record in records])
    weights = np.concatenate([record.task_weights for record in records])
    balanced = slice(min(config.gaba.warmup_steps, len(norms) - 1), None)
    return {
        "config": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(config).items()
        },
        "tasks": list(TASKS),
        "features": list(data.feature_names),
        "windows": {name: len(getattr(data, name).rul) for name in ("train", "validation", "test")},
        "updates": len(norms),
        "task_weights": dict(zip(TASKS, weights[-1].tolist(), strict=True)),
        # Over the updates after the warm-up: median, and the 5 % and 95 % quantiles.
        "gradient_ratio": _quantiles(norms[balanced]),
        "contribution_ratio": _quantiles((norms * weights)[balanced]),
        "versions": {name: version(name) for name in ("gaba-jax", "jax", "optax", "flax")},
    }


def _quantiles(values: NDArray[np.float32]) -> dict[str, float | None]:
    """Of the ratio of the largest to the smallest value per update; None where it is infinite."""
    smallest = values.min(axis=1)
    ratio = np.where(smallest > 0, values.max(axis=1) / np.where(smallest > 0, smallest, 1), np.inf)
    at = np.quantile(ratio, [0.5, 0.05, 0.95], method="nearest")
    return {
        name: float(value) if np.isfinite(value) else None
        for name, value in zip(("median", "low", "high"), at, strict=True)
    }
