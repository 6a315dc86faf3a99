"""Checkpoints of a training run: saved whole or not at all, restored bitwise or not at all.

A folder holds the last two checkpoints, each in a folder named after the updates done so far. Orbax
writes one beside them and renames it when it is complete: what a killed process leaves behind is
never taken for a checkpoint, and is removed at the next save.

**Layout, format 1.** ``<step>/arrays`` is a flat dictionary of arrays, ``<step>/run`` is JSON.

* ``params.<name>``, ``balance.<name>``, ``optimizer.<name>``: the state. Names are dotted key
  paths, such as ``params.rul_head.bias`` and ``optimizer.0.mu.rul_head.bias``. Where the run has
  them, also ``stats`` (running moments of BatchNorm), ``plateau``, ``average`` and ``best``.
* ``rng``: [words] uint32, the key that the order of each epoch is drawn with.
* ``order``: [rows] int32, the windows of the epoch in progress, batch by batch.
* ``history.losses``, ``history.task_norms``, ``history.task_weights``: [step, K] float32, one row
  per update.

The JSON has ``format``, ``version`` (of the library), ``step`` (updates done), ``rng_impl``,
``scalars`` (of each finished epoch), ``seconds`` (of each epoch begun), ``elapsed`` (seconds) and
``run``: what the run depends on, compared when it goes on. A layout that differs gets another
number, and every later version of the library reads the layouts before it.
"""

import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Generator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray

from gaba_jax._checks import leaf_names

FORMAT = 1
"""Number of the layout that this version writes."""

_KEPT = 2
_HISTORY = ("losses", "task_norms", "task_weights")
_HEARD = 0.5  # seconds in which reads that are still under way fail too


class Stopped(Exception):
    """A run was asked to stop, and did so after a checkpoint."""


class Snapshot(NamedTuple):
    """A run after some update: all that it needs to go on.

    Attributes:
      step: updates done.
      state: ``{"params": ..., "balance": ..., "optimizer": ...}``, and what else the run has.
      rng: the key that the order of each epoch is drawn with.
      order: [rows] int32, the windows of the epoch in progress, batch by batch.
      history: ``losses``, ``task_norms`` and ``task_weights``, each [step, K] float32.
      scalars: of each finished epoch.
      seconds: that each epoch has taken so far, without evaluation and checkpoints.
      elapsed: seconds since the run began, without those when no process was at work.
    """

    step: int
    state: dict[str, Any]
    rng: jax.Array
    order: jax.Array | NDArray[np.int32]
    history: dict[str, NDArray[np.float32]]
    scalars: list[dict[str, float]]
    seconds: list[float]
    elapsed: float


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where and how often a run is saved, and whether it goes on from what is there.

    Args:
      directory: folder for the checkpoints, of this run alone.
      every: updates from one checkpoint to the next, at least 1; the end of the run is saved too.
      resume: go on from the last checkpoint, or begin where there is none. Defaults to False.
      stop: asked after each chunk of updates, which ends after ``every`` updates and with an
        epoch; True saves there and raises :class:`Stopped`. Defaults to never.
      on_resume: called with the number of updates that are already done.

    Raises:
      ValueError: ``every`` is less than 1.
    """

    directory: Path
    every: int
    resume: bool = False
    stop: Callable[[], bool] = lambda: False
    on_resume: Callable[[int], None] = lambda step: None

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"checkpoint_every={self.every} must be at least 1 update.")

    def start(
        self, target: Mapping[str, Any], run: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> Snapshot | None:
        """What to go on from; None to begin.

        Args:
          target: a state as in :class:`Snapshot`, with the shapes and shardings that are wanted.
          run: what the run depends on, in JSON's types.
          defaults: values of those entries of ``run`` that older checkpoints do not have.

        Returns:
          The last checkpoint.

        Raises:
          FileExistsError: there are checkpoints, and ``resume`` is False.
          ValueError: they are of another run (the message says what differs), of a later format,
            or damaged.
        """
        step = latest_step(self.directory)
        if step is None:
            return None
        if not self.resume:
            raise FileExistsError(
                f"{self.directory} holds a run that was saved after update {step}. Resume it, name "
                "another folder, or remove that one."
            )
        with _manager(self.directory) as manager:
            kept = _read_json(manager, step)
            _check_same(self.directory, defaults | kept["run"], run)
            arrays = _read_arrays(manager, step, target)
            state = _fill(target, arrays)
            with _damage_reported(manager, step):
                snapshot = Snapshot(
                    step=step,
                    state=state,
                    rng=jax.random.wrap_key_data(arrays["rng"], impl=kept["rng_impl"]),
                    order=arrays["order"],
                    history={name: arrays[f"history.{name}"] for name in _HISTORY},
                    **{name: kept[name] for name in ("scalars", "seconds", "elapsed")},
                )
                _check_whole(snapshot)
        self.on_resume(step)
        return snapshot

    def save(self, snapshot: Snapshot, run: Mapping[str, Any]) -> None:
        """Writes a checkpoint; when this returns it is complete.

        Args:
          snapshot: what to save.
          run: as in :meth:`start`.

        Raises:
          OSError: it could not be written; those before it are intact.
        """
        tree = {
            **snapshot.state,
            "rng": jax.random.key_data(snapshot.rng),
            "order": snapshot.order,
            "history": snapshot.history,
        }
        about = {
            "format": FORMAT,
            "version": version("gaba-jax"),
            "step": snapshot.step,
            "rng_impl": str(jax.random.key_impl(snapshot.rng)),
            "scalars": snapshot.scalars,
            "seconds": snapshot.seconds,
            "elapsed": snapshot.elapsed,
            "run": dict(run),
        }
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(_by_name(tree)), run=ocp.args.JsonSave(about)
        )
        with _manager(self.directory, create=True) as manager:
            try:
                manager.save(snapshot.step, args=items, force=True)
            except Exception as error:  # tensorstore reports a full disk as a ValueError
                time.sleep(1)  # the other writes fail too, unheard while the manager is open
                raise OSError(
                    f"{self.directory}: no checkpoint could be written after update "
                    f"{snapshot.step} ({_cause(error)}). Those before it are intact: make room "
                    "there, and resume."
                ) from error


def latest_step(directory: Path) -> int | None:
    """Updates done at the last complete checkpoint of a folder; None where there is none.

    Args:
      directory: folder of the checkpoints.

    Raises:
      NotADirectoryError: it is a file.
    """
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file, and no folder of checkpoints. Remove it.")
    with _manager(directory) as manager:
        return manager.latest_step()


def restore(directory: Path, target: Any, step: int | None = None) -> Any:
    """Reads a state from a checkpoint onto the devices that the target is on.

    Args:
      directory: folder of the checkpoints.
      target: ``{"params": ..., "balance": ..., "optimizer": ...}`` or some of these: trees of
        arrays, or of ``jax.ShapeDtypeStruct``, whose shardings need not be those of the run that
        wrote the checkpoint. Their values are not read. A numpy array gives a numpy array.
      step: which checkpoint, the last by default.

    Returns:
      The same tree, with the values of the checkpoint.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: its arrays have other names, shapes or dtypes (another number of tasks, another
        optimizer), it is of a later format, or it is damaged.

    Example:
      >>> import tempfile
      >>> from gaba_jax.turbofan import checkpoints, train
      >>> config = train.TrainConfig(epochs=1, stride=20)
      >>> folder = checkpoints.Checkpoints(Path(tempfile.mkdtemp()) / "checkpoints", every=100)
      >>> run = train.train(train.load_data(config), config, checkpoints=folder)
      >>> state = checkpoints.restore(folder.directory, {"params": run.params})
      >>> bool((state["params"]["rul_head"]["bias"][...] == run.params["rul_head"]["bias"]).all())
      True
    """
    last = latest_step(directory)
    step = last if step is None else step
    if step is None or not (directory / str(step)).is_dir():
        wanted = "no checkpoint" if step is None else f"no checkpoint after update {step}"
        raise FileNotFoundError(f"{directory} holds {wanted}; the last is {last}.")
    with _manager(directory) as manager:
        _read_json(manager, step)
        arrays = _read_arrays(manager, step, target)
    return _fill(target, arrays)


@contextlib.contextmanager
def _manager(directory: Path, *, create: bool = False) -> Generator[ocp.CheckpointManager]:
    """Orbax's manager, without its log: what it has to say comes as an exception.

    When one write fails, tensorstore hands those that are still under way to ``sys.excepthook``.
    """
    hook, sys.excepthook = sys.excepthook, lambda *_: None
    unraisable, sys.unraisablehook = sys.unraisablehook, lambda _: None
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        options = ocp.CheckpointManagerOptions(
            create=create,
            cleanup_tmp_directories=create,
            preservation_policy=ocp.checkpoint_managers.LatestN(_KEPT),
            enable_async_checkpointing=False,
        )
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()}
        with ocp.CheckpointManager(
            directory.absolute(), options=options, item_handlers=handlers
        ) as manager:
            yield manager
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.excepthook, sys.unraisablehook = hook, unraisable


def _by_name(tree: Any) -> dict[str, Any]:
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _read_json(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    with _damage_reported(manager, step):
        kept = manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        written, _ = int(kept["format"]), {**kept["run"]}
    if written > FORMAT:
        raise ValueError(
            f"{manager.directory} is of format {written}, written by gaba_jax {kept['version']}; "
            f"this is gaba_jax {version('gaba-jax')}, which reads up to format {FORMAT}. Upgrade "
            'the library: git pull, and pip install -e ".[turbofan]", in its checkout.'
        )
    return kept


def _read_arrays(manager: ocp.CheckpointManager, step: int, target: Any) -> dict[str, Any]:
    """All arrays by name: as the target has them where it does, as numpy arrays elsewhere."""
    wanted = _by_name(target)
    with _damage_reported(manager, step):
        stored: dict[str, Any] = manager.item_metadata(step)["arrays"].tree
    _check_arrays(manager.directory / str(step), stored, wanted)
    like = {
        name: ocp.utils.to_shape_dtype_struct(wanted[name])
        if isinstance(wanted.get(name), jax.Array | jax.ShapeDtypeStruct)
        else np.empty(array.shape, array.dtype)
        for name, array in stored.items()
    }
    for array in like.values():
        if isinstance(array, jax.ShapeDtypeStruct) and array.sharding is not None:
            array.sharding.shard_shape(array.shape)  # raises on one that does not divide
    with _damage_reported(manager, step):
        return manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(like))
        )["arrays"]


def _check_whole(snapshot: Snapshot) -> None:
    """Raises where the parts of a checkpoint do not belong together."""
    rows = [len(values) for values in snapshot.history.values()]
    begun, finished = len(snapshot.seconds), len(snapshot.scalars)
    if rows != [snapshot.step] * len(rows):
        raise ValueError(f"its history has {rows} rows for {snapshot.step} updates")
    if begun - finished not in (0, 1) or not begun:
        raise ValueError(f"it has {begun} epochs begun and {finished} finished")
    for number in (snapshot.elapsed, *snapshot.seconds, *_values(snapshot.scalars)):
        float(number)


def _values(scalars: list[dict[str, float]]) -> list[float]:
    return [value for each in scalars for value in each.values()]


def _fill(target: Any, arrays: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(
        jax.tree.structure(target), [arrays[name] for name in leaf_names(target)]
    )


def _check_arrays(where: Any, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """That the checkpoint has what is wanted, and no more of the same kind."""

    def kind(array: Any) -> str:
        return "absent" if array is None else f"{np.dtype(array.dtype)}{list(array.shape)}"

    parts = {name.partition(".")[0] for name in wanted}
    names = [name for name in stored if name.partition(".")[0] in parts] + [
        name for name in wanted if name not in stored
    ]
    differing = [
        f"{name} is {kind(stored.get(name))} and should be {kind(wanted.get(name))}"
        for name in names
        if kind(stored.get(name)) != kind(wanted.get(name))
    ]
    if differing:
        listed = "; ".join(differing[:5]) + ("; ..." if len(differing) > 5 else "")
        raise ValueError(
            f"{where} is of another model, optimizer or number of tasks: {listed}. Restore it into "
            "what it was saved from."
        )


def _check_same(directory: Path, kept: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    run = json.loads(json.dumps(run))
    differing = [
        f"{name} was {kept.get(name)!r} and is {run.get(name)!r}"
        for name in sorted({*kept, *run})
        if kept.get(name) != run.get(name)
    ]
    if differing:
        raise ValueError(
            f"{directory} is of another run: {'; '.join(differing)}. Go on with what it was made "
            "with, or name another folder."
        )


@contextlib.contextmanager
def _damage_reported(manager: ocp.CheckpointManager, step: int) -> Generator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of many types, from orbax and tensorstore
        time.sleep(_HEARD)  # unheard while the manager is open
        raise ValueError(
            f"{manager.directory / str(step)} cannot be read ({_cause(error)}). If it is damaged, "
            "remove that folder to go on from the checkpoint before it."
        ) from error


def _cause(error: Exception) -> str:
    """The first line, without the specification that tensorstore appends."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text.partition(" [tensorstore_spec")[0].partition(" [os_error_code")[0]
