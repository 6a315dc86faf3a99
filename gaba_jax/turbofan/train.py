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
from gaba_jax.turbofan._loop import Carry, Params, Stats, make_program
from gaba_jax.turbofan._time_budget import Budget
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
    runs = _Runs(data, config, rule, seeds, on_epoch, checkpoints, budget)
    if checkpoints is not None:
        runs.resume(checkpoints)
    ended = runs.ended_before()
    while ended is None:
        runs.train_chunk()
        ended = runs.ended()
        if checkpoints is not None:
            runs.save(checkpoints, ended is not None)
    runs.evaluate_unfinished_epoch()
    return runs.results(ended)


class _Runs:
    """Runs under way, one for each seed: what they hold by now, and what takes them further.

    Attributes:
      carries: what one update hands to the next, over a leading axis of seeds.
      best: the parameters and statistics of the lowest validation RMSE; () unless one stops early.
      keys: a random key for each seed; orders, the rows of the epoch at work.
      done: the updates done, of ``total``; ``steps`` are in an epoch.
      history: by name, [seeds, total, tasks]; rows from ``done`` on are zero.
      scalars: for each seed those of its evaluated epochs; ``records``, of its finished ones.
      seconds: of training, for each epoch; ``elapsed``, before the checkpoint gone on from.
    """

    def __init__(
        self,
        data: TurbofanData,
        config: TrainConfig,
        rule: weighting.Weighting,
        seeds: Sequence[int],
        on_epoch: Callable[[Sequence[EpochRecord]], None],
        checkpoints: Checkpoints | None,
        budget: float | None,
    ):
        self.data, self.config, self.seeds, self.on_epoch = data, config, seeds, on_epoch
        self.pace = Budget(budget)
        self.started = time.perf_counter()
        self.steps = len(data.train.rul) // config.batch_size
        self.total = config.epochs * self.steps
        self.checkpoint_every = None if checkpoints is None else checkpoints.every
        self.program = make_program(config, rule, data.train.windows.shape, self.steps)
        self.carries = self.program.init(list(seeds))
        self.best: Any = (self.carries.params, self.carries.stats) if self._stops_early() else ()
        self.on_device = jax.device_put(data.train)
        self.keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        self.orders = self._shuffled(1)
        shape = len(seeds), self.total, len(TASKS)
        self.history = {name: np.zeros(shape, np.float32) for name in _HISTORY}
        self.scalars: list[list[dict[str, float]]] = [[] for _ in seeds]
        self.records: list[list[EpochRecord]] = [[] for _ in seeds]
        self.seconds: list[float] = []
        self.done, self.resumed_at, self.elapsed = 0, 0, 0.0
        self.saved_as: dict[str, Any] = {}

    def resume(self, checkpoints: Checkpoints) -> None:
        """Goes on from the newest checkpoint, where there is one and it is to be."""
        self.saved_as = identity(self.config) | {
            "tasks": list(TASKS),
            "data": _fingerprint(self.data),
        }
        snapshot = checkpoints.start(self._first_state(), self.saved_as, identity(TrainConfig()))
        if snapshot is None:
            return
        if len(snapshot.scalars) != snapshot.step // self.steps or snapshot.step > self.total:
            raise ValueError(
                f"{checkpoints.directory / str(snapshot.step)} is damaged: it has the scores "
                f"of {len(snapshot.scalars)} epochs of {self.steps} updates. Remove that folder to "
                "go on from the checkpoint before it."
            )
        state = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], snapshot.state)
        self.best = state.pop("best")
        self.carries = Carry(**state)
        self.done = self.resumed_at = snapshot.step
        self.seconds, self.elapsed = snapshot.seconds, snapshot.elapsed
        self.keys, self.scalars = snapshot.rng[None], [snapshot.scalars]
        self.orders = jnp.asarray(snapshot.order)[None]
        for name in _HISTORY:
            self.history[name][0, : self.done] = snapshot.history[name]
        for epoch in range(1, self.done // self.steps + 1):
            self._finish(epoch)

    def ended_before(self) -> str | None:
        """Why no update is done at all; an epoch that was begun is gone on with."""
        return None if self.done % self.steps else self.ended()

    def ended(self) -> str | None:
        """Why no further update is done."""
        if self.done == self.total:
            return "all epochs"
        patience = self.config.early_stopping
        whole = self.done % self.steps == 0
        if patience is not None and whole and _stalled(self.scalars[0]) >= patience:
            return "early stopping"
        if self.done > self.resumed_at and self.pace.over(time.perf_counter() - self.started):
            return "budget"
        return None

    def train_chunk(self) -> None:
        """Updates up to the end of the epoch, or a checkpoint or the budget within it."""
        epoch, start = divmod(self.done, self.steps)
        if start == 0:
            self.orders = self._shuffled(epoch + 1)
            self.seconds.append(0.0)
        stop = self.steps
        if self.checkpoint_every is not None:
            to_the_next = self.checkpoint_every - self.done % self.checkpoint_every
            stop = min(stop, start + to_the_next)
        before = time.perf_counter()
        stop = start + self.pace.at_once(before - self.started, stop - start)
        self.carries, record = jax.block_until_ready(
            self.program.train_chunk(
                self.carries, self.keys, self.orders, epoch + 1, start, stop, self.on_device
            )
        )
        took = time.perf_counter() - before
        self.seconds[-1] += took
        self.pace.note(stop - start, took)
        now = self.done + stop - start
        for name, values in zip(_HISTORY, record, strict=True):
            self.history[name][:, self.done : now] = np.asarray(values)[:, start:stop]
        self.done = now
        if stop == self.steps:
            self._end_epoch(epoch + 1)

    def save(self, checkpoints: Checkpoints, ended: bool) -> None:
        """Where a checkpoint is due, or the run is stopped or at its end.

        Raises:
          Stopped: ``checkpoints.stop`` asked for it.
        """
        stopped = checkpoints.stop()
        if stopped or self.done % checkpoints.every == 0 or ended:
            snapshot = Snapshot(
                step=self.done,
                state=self._first_state(),
                rng=self.keys[0],
                order=self.orders[0],
                history={name: values[0, : self.done] for name, values in self.history.items()},
                scalars=self.scalars[0],
                seconds=self.seconds,
                elapsed=self._elapsed(),
            )
            checkpoints.save(snapshot, self.saved_as)
        if stopped:
            raise Stopped(f"stopped after update {self.done} of {self.total}")

    def evaluate_unfinished_epoch(self) -> None:
        """After the last checkpoint, since what is saved ends with whole epochs."""
        unfinished = self.done % self.steps
        if unfinished:
            variables, _ = self._evaluate(self.done - unfinished)
            self._keep_best(variables)
            self._finish(self.done // self.steps + 1)

    def results(self, ended: str | None) -> list[Run]:
        """A run for each seed, with the scores of all splits."""
        variables = self.best if self._stops_early() else self.program.evaluated(self.carries)
        splits = {"validation": self.data.validation, "test": self.data.test}
        if self.data.test_all is not None:
            splits["test_all_windows"] = self.data.test_all
        predictions = {name: self._predict(variables, split) for name, split in splits.items()}
        runs: list[Run] = []
        for i in range(len(self.seeds)):
            summary = self._summary(i, variables, ended)
            for name, split in splits.items():
                summary[name] = scores(split, *predictions[name][i])
                if name != "validation":
                    summary[f"{name}_uncapped"] = scores(split, *predictions[name][i], capped=False)
            summary["diverged"] = not (summary["validation"] and summary["test"])
            summary["timing"] = {
                "seconds": self._elapsed() / len(self.seeds),
                "step_seconds": _step_seconds(self.seconds, self.steps, self.done)
                / len(self.seeds),
            }
            params, stats = (jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in variables)
            runs.append(Run(params, stats, self.records[i], *predictions["test"][i], summary))
        return runs

    def _summary(self, i: int, variables: Any, ended: str | None) -> dict[str, Any]:
        """Of one seed, without its scores."""
        summary = summarize(
            dataclasses.replace(self.config, seed=self.seeds[i]),
            self.data,
            self.history["task_norms"][i, : self.done],
            self.history["task_weights"][i, : self.done],
        )
        summary["parameters"] = sum(leaf[i].size for leaf in jax.tree.leaves(variables[0]))
        summary["ended"] = ended
        summary["epochs"] = self.done // self.steps
        summary["evaluated_epoch"] = len(self.records[i])
        if self._stops_early():
            summary["evaluated_epoch"] -= _stalled(self.scalars[i])
        return summary

    def _end_epoch(self, epoch: int) -> None:
        variables, validation = self._evaluate(self.done - self.steps)
        rmse = jnp.array([found.get("rmse", jnp.inf) for found in validation])
        self.carries = self.program.end_epoch(self.carries, rmse)
        self._keep_best(variables)
        self._finish(epoch)

    def _evaluate(self, since: int) -> tuple[Any, list[dict[str, Any]]]:
        """Adds the scalars of the updates since the given one; what was evaluated, and how well."""
        began = time.perf_counter()
        variables = self.program.evaluated(self.carries)
        predicted = self._predict(variables, self.data.validation)
        validation = [scores(self.data.validation, *each) for each in predicted]
        for i, found in enumerate(validation):
            state = jax.tree.map(lambda leaf, i=i: leaf[i], self.carries.balance)
            losses = self.history["losses"][i, since : self.done]
            self.scalars[i].append(epoch_scalars(losses, found, balance_metrics(state, TASKS)))
        took = time.perf_counter() - began
        splits = (self.data.validation, self.data.test, self.data.test_all)
        windows = sum(len(split.rul) for split in splits if split)
        self.pace.note_evaluation(took * windows / len(self.data.validation.rul))
        return variables, validation

    def _keep_best(self, variables: Any) -> None:
        if self._stops_early() and not _stalled(self.scalars[0]):
            self.best = variables

    def _finish(self, epoch: int) -> None:
        """Records an epoch that was evaluated."""
        rows = slice((epoch - 1) * self.steps, min(epoch * self.steps, self.done))
        for i, records in enumerate(self.records):
            measured = (self.history[name][i, rows] for name in _HISTORY)
            records.append(EpochRecord(epoch, self.scalars[i][epoch - 1], *measured))
        self.on_epoch([records[-1] for records in self.records])

    def _shuffled(self, epoch: int) -> jax.Array:
        """The rows of an epoch's batches, [seeds, steps x batch size]."""
        number = len(self.data.train.rul)
        drawn = [jax.random.permutation(jax.random.fold_in(k, epoch), number) for k in self.keys]
        return jnp.stack(drawn)[:, : self.steps * self.config.batch_size]

    def _predict(self, variables: Any, split: Split) -> list[tuple[Any, Any]]:
        """RUL [N] and health [N] of each seed."""
        predicted = self.program.predict(variables, split.windows)
        ruls, healths = jax.tree.map(np.asarray, predicted)
        return list(zip(ruls, healths, strict=True))

    def _first_state(self) -> dict[str, Any]:
        """Of the first seed. In numpy, since arrays bound to a device would compile once more."""
        state = self.carries._asdict() | {"best": self.best}
        return jax.tree.map(lambda leaf: np.asarray(leaf[0]), state)

    def _stops_early(self) -> bool:
        return self.config.early_stopping is not None

    def _elapsed(self) -> float:
        return self.elapsed + time.perf_counter() - self.started


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
