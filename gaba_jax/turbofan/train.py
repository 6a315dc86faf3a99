"""Training the two-headed turbofan model with balanced gradients."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from gaba_jax import balance_metrics, weighting
from gaba_jax.turbofan import ncmapss, simulator
from gaba_jax.turbofan._budget import Budget
from gaba_jax.turbofan._loop import Carry, Params, Stats, make_program
from gaba_jax.turbofan.checkpoints import Checkpoints, Snapshot, Stopped
from gaba_jax.turbofan.config import TASKS as TASKS
from gaba_jax.turbofan.config import GabaOptions as GabaOptions
from gaba_jax.turbofan.config import Subset as Subset
from gaba_jax.turbofan.config import TrainConfig as TrainConfig
from gaba_jax.turbofan.config import check_config, identity
from gaba_jax.turbofan.config import make_weighting as make_weighting
from gaba_jax.turbofan.data import Split, TurbofanData, load, prepare
from gaba_jax.turbofan.evaluation import epoch_scalars, scores, summarize

_HISTORY: tuple[str, ...] = ("losses", "task_norms", "task_weights")  # recorded at every update


class EpochRecord(NamedTuple):
    """One epoch: its number from 1, scalars for a log, and every update's measurements."""

    epoch: int
    scalars: dict[str, float]
    losses: NDArray[np.float32]  # [steps, 2]
    task_norms: NDArray[np.float32]  # [steps, 2]
    task_weights: NDArray[np.float32]  # [steps, 2]


class Run(NamedTuple):
    """A finished run: parameters and running statistics, records, what the test engines say."""

    params: Params
    stats: Stats
    records: list[EpochRecord]
    predicted_rul: NDArray[np.float32]  # [test engines]
    predicted_health: NDArray[np.int32]
    summary: dict[str, Any]


def load_data(config: TrainConfig) -> TurbofanData:
    """The engines that a run trains on: the data at ``config.data``, or a simulated fleet."""
    options: dict[str, Any] = {
        "stride": config.stride,
        "sensors_only": config.sensors_only,
        "seed": config.seed,
    }
    if config.data is not None and config.data.suffix in (".h5", ".hdf5"):
        if options.pop("sensors_only"):
            raise ValueError(
                f"sensors_only: {config.data} is an N-CMAPSS file, whose flights are described by "
                "W and X_s together; leave the option out."
            )
        return ncmapss.load(config.data, **options)
    if config.data is not None:
        return load(config.data, config.subset, **options)
    conditions = 6 if config.subset in ("FD002", "FD004") else 1
    fault_modes = 2 if config.subset in ("FD003", "FD004") else 1
    fleet = simulator.simulate(conditions=conditions, fault_modes=fault_modes, seed=config.seed)
    return prepare(fleet, **options)


def train(
    data: TurbofanData,
    config: TrainConfig,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    checkpoints: Checkpoints | None = None,
    budget: float | None = None,
) -> Run:
    """Trains the model of ``config``; the same data, configuration and machine give the same run.

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
      budget: minutes from this call, after which the run ends, also within an epoch, but not before
        one update. An epoch that was not finished is evaluated and recorded like the others, with
        fewer updates. The parameters are then the best so far with ``early_stopping``, the last
        without; with checkpoints the run can be resumed. Defaults to None, all epochs.

    Returns:
      A :class:`Run`; its ``summary`` can be written as JSON.

    Raises:
      ValueError: a value of ``config``, or ``budget``, is out of range, or the checkpoints to go
        on from are of another run, or cannot be read.
      FileExistsError: there are checkpoints, but they are not to be resumed.
      FloatingPointError: the losses, or what the model predicts, are no longer finite.
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

    check_config(config, len(data.train.rul))
    rule = make_weighting(config)
    (run,) = _train_seeds(data, config, rule, (config.seed,), checked, checkpoints, budget)
    if run.summary["diverged"]:
        raise FloatingPointError(
            f"the predicted RUL is no longer finite after epoch {run.summary['epochs']}. "
            f"Lower the learning rate (it is {config.learning_rate})."
        )
    return run


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
      ValueError: a value of ``config`` is out of range, or it stops early, which several runs in
        one program cannot.
    """
    if config.early_stopping is not None:
        raise ValueError(
            f"early_stopping={config.early_stopping}: runs side by side end together. Leave it "
            "out, or call train once per seed."
        )
    return _train_seeds(data, config, rule, seeds, on_epoch, None)


def _train_seeds(
    data: TurbofanData,
    config: TrainConfig,
    rule: weighting.Weighting,
    seeds: Sequence[int],
    on_epoch: Callable[[Sequence[EpochRecord]], None],
    checkpoints: Checkpoints | None,  # of a single seed
    budget: float | None = None,
) -> list[Run]:
    check_config(config, len(data.train.rul))
    pace = Budget(budget)
    started = time.perf_counter()
    num_windows = len(data.train.rul)
    steps = num_windows // config.batch_size
    program = make_program(config, rule, data.train.windows.shape, steps)

    def shuffle(keys: jax.Array, epoch: int) -> jax.Array:
        drawn = [jax.random.permutation(jax.random.fold_in(k, epoch), num_windows) for k in keys]
        return jnp.stack(drawn)[:, : steps * config.batch_size]

    def predict(variables: Any, split: Split) -> list[tuple[Any, Any]]:
        """RUL [N] and health [N] of each seed."""
        ruls, healths = jax.tree.map(np.asarray, program.predict(variables, split.windows))
        return list(zip(ruls, healths, strict=True))

    carries = program.init(seeds)
    best: Any = (carries.params, carries.stats) if config.early_stopping is not None else ()
    on_device = jax.device_put(data.train)
    evaluated = sum(len(s.rul) for s in (data.validation, data.test, data.test_all) if s)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    total = config.epochs * steps
    history = {name: np.zeros([len(seeds), total, len(TASKS)], np.float32) for name in _HISTORY}
    scalars: list[list[dict[str, float]]] = [[] for _ in seeds]
    records: list[list[EpochRecord]] = [[] for _ in seeds]
    seconds: list[float] = []
    done, elapsed, orders, saved_as = 0, 0.0, shuffle(keys, 1), {}

    def first_state() -> dict[str, Any]:
        """Of the first seed. In numpy, since arrays bound to a device would compile once more."""
        return jax.tree.map(lambda leaf: np.asarray(leaf[0]), carries._asdict() | {"best": best})

    def evaluate(since: int) -> Any:
        """Adds the scalars of the updates since the given one; returns what was evaluated."""
        began = time.perf_counter()
        variables = program.evaluated(carries)
        predicted = predict(variables, data.validation)
        validation = [scores(data.validation, *each) for each in predicted]
        for i, found in enumerate(validation):
            state = jax.tree.map(lambda leaf, i=i: leaf[i], carries.balance)
            losses = history["losses"][i, since:done]
            scalars[i].append(epoch_scalars(losses, found, balance_metrics(state, TASKS)))
        took = time.perf_counter() - began
        pace.note_evaluation(took * evaluated / len(data.validation.rul))
        return variables, validation

    def finish(epoch: int) -> None:
        rows = slice((epoch - 1) * steps, min(epoch * steps, done))
        for i in range(len(seeds)):
            record = EpochRecord(
                epoch, scalars[i][epoch - 1], *(history[name][i, rows] for name in _HISTORY)
            )
            records[i].append(record)
        on_epoch([each[-1] for each in records])

    def end() -> str | None:
        """Why no further update is done."""
        if done == total:
            return "all epochs"
        patience = config.early_stopping
        if patience is not None and done % steps == 0 and _stalled(scalars[0]) >= patience:
            return "early stopping"
        if done > resumed_at and pace.over(time.perf_counter() - started):
            return "budget"
        return None

    if checkpoints is not None:
        saved_as = identity(config) | {"tasks": list(TASKS), "data": _fingerprint(data)}
        snapshot = checkpoints.start(first_state(), saved_as, identity(TrainConfig()))
        if snapshot is not None:
            if len(snapshot.scalars) != snapshot.step // steps or snapshot.step > total:
                raise ValueError(
                    f"{checkpoints.directory / str(snapshot.step)} is damaged: it has the scores "
                    f"of {len(snapshot.scalars)} epochs of {steps} updates. Remove that folder to "
                    "go on from the checkpoint before it."
                )
            state = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], snapshot.state)
            best = state.pop("best")
            carries = Carry(**state)
            done, seconds, elapsed = snapshot.step, snapshot.seconds, snapshot.elapsed
            keys, scalars = snapshot.rng[None], [snapshot.scalars]
            orders = jnp.asarray(snapshot.order)[None]
            for name in _HISTORY:
                history[name][0, :done] = snapshot.history[name]
            for epoch in range(1, done // steps + 1):
                finish(epoch)
    resumed_at = done
    ended = None if done % steps else end()
    while ended is None:
        epoch, start = divmod(done, steps)
        if start == 0:
            orders = shuffle(keys, epoch + 1)
            seconds.append(0.0)
        stop = steps
        if checkpoints is not None:
            stop = min(stop, start + checkpoints.every - done % checkpoints.every)
        before = time.perf_counter()
        stop = start + pace.at_once(before - started, stop - start)
        carries, record = jax.block_until_ready(
            program.train_chunk(carries, keys, orders, epoch + 1, start, stop, on_device)
        )
        seconds[-1] += time.perf_counter() - before
        pace.note(stop - start, time.perf_counter() - before)
        for name, values in zip(_HISTORY, record, strict=True):
            history[name][:, done : done + stop - start] = np.asarray(values)[:, start:stop]
        done += stop - start
        if stop == steps:
            variables, validation = evaluate(done - steps)
            carries = program.end_epoch(
                carries, jnp.array([found.get("rmse", jnp.inf) for found in validation])
            )
            if config.early_stopping is not None and not _stalled(scalars[0]):
                best = variables
            finish(epoch + 1)
        ended = end()
        if checkpoints is not None:
            stopped = checkpoints.stop()
            if stopped or done % checkpoints.every == 0 or ended is not None:
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
                checkpoints.save(snapshot, saved_as)
            if stopped:
                raise Stopped(f"stopped after update {done} of {total}")
    if done % steps:  # what is saved ends with whole epochs
        variables, _ = evaluate(done - done % steps)
        if config.early_stopping is not None and not _stalled(scalars[0]):
            best = variables
        finish(done // steps + 1)
    variables = program.evaluated(carries) if config.early_stopping is None else best
    splits = {"validation": data.validation, "test": data.test}
    if data.test_all is not None:
        splits["test_all_windows"] = data.test_all
    predictions = {name: predict(variables, split) for name, split in splits.items()}
    runs: list[Run] = []
    for i, seed in enumerate(seeds):
        of_seed = {name: values[i, :done] for name, values in history.items()}
        summary = summarize(
            dataclasses.replace(config, seed=seed),
            data,
            of_seed["task_norms"],
            of_seed["task_weights"],
        )
        summary["parameters"] = sum(leaf[i].size for leaf in jax.tree.leaves(variables[0]))
        summary["ended"] = ended
        summary["epochs"] = done // steps
        summary["evaluated_epoch"] = len(records[i])
        if config.early_stopping is not None:
            summary["evaluated_epoch"] -= _stalled(scalars[i])
        for name, split in splits.items():
            summary[name] = scores(split, *predictions[name][i])
            if name != "validation":
                summary[f"{name}_uncapped"] = scores(split, *predictions[name][i], capped=False)
        summary["diverged"] = not (summary["validation"] and summary["test"])
        summary["timing"] = {
            "seconds": (elapsed + time.perf_counter() - started) / len(seeds),
            "step_seconds": _step_seconds(seconds, steps, done) / len(seeds),
        }
        of_run = [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in variables]
        runs.append(Run(of_run[0], of_run[1], records[i], *predictions["test"][i], summary))
    return runs


def _step_seconds(seconds: Sequence[float], steps: int, done: int) -> float:
    """The median over whole epochs without the first, which compiles, where there are others."""
    whole = seconds[: done // steps]
    return float(np.median(whole[1:] or whole)) / steps if whole else seconds[0] / done


def _stalled(scalars: Sequence[dict[str, float]]) -> int:
    """Epochs since the one with the lowest validation RMSE."""
    found = [each.get("validation/rmse", np.inf) for each in scalars]
    return len(found) - 1 - int(np.argmin(found)) if found else 0


def _fingerprint(data: TurbofanData) -> str:
    digest = hashlib.sha256()
    for array in (*data.train, *data.validation, *data.test):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return f"{len(data.train.rul)} training windows, sha256 {digest.hexdigest()[:16]}"
