"""The command ``gaba-jax``: simulate engines, diagnose, train on them, compare weightings."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import tempfile
import typing
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

try:
    import orbax.checkpoint as ocp
    import tyro
    from flax import nnx
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as error:
    raise SystemExit(
        f'gaba-jax needs the package {error.name}. In a checkout: pip install -e ".[turbofan]"'
    ) from error

import numpy as np

from gaba_jax import plot
from gaba_jax.turbofan import compare, plots, report, simulator
from gaba_jax.turbofan._cmapss_reader import find_fleet
from gaba_jax.turbofan._stop_signals import noting_signals
from gaba_jax.turbofan._time_budget import Budget
from gaba_jax.turbofan.checkpoints import Checkpoints, Stopped
from gaba_jax.turbofan.config import (
    TASKS,
    Subset,
    TrainConfig,
    check_config,
    check_options,
    did_you_mean,
    make_weighting,
    warmup_steps,
)
from gaba_jax.turbofan.data import TurbofanData
from gaba_jax.turbofan.diagnosis import diagnose_run
from gaba_jax.turbofan.events import event_writer
from gaba_jax.turbofan.train import EpochRecord, Run, load_data, train

_ALL = 1e9  # seconds: an epoch may take longer than those 30 that rich looks back on
_NARROW = 72  # columns below which there is no bar
_WIDE = 96  # columns from which on there are weights beside the losses


@dataclasses.dataclass(frozen=True)
class Simulate:
    """Write a simulated fleet of engines as C-MAPSS files."""

    directory: tyro.conf.Positional[Path]
    """folder to write to"""
    subset: Subset = "FD001"
    """name in the files"""
    num_train: int = 50
    """engines that run to failure"""
    num_test: int = 50
    """engines whose records stop before it"""
    conditions: int = 1
    """operating conditions, 1 or 6"""
    fault_modes: int = 1
    """1 or 2"""
    noise: float = 1.0
    """sensor noise, as a factor"""
    seed: int = 0
    """of the fleet"""
    overwrite: bool = False
    """replace files of other content"""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model of two tasks, engine life and health state."""

    config: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    out: Path | None = None
    """folder for metrics.jsonl, summary.json, history.npz, pictures and parameters; None writes
    nothing"""
    overwrite: bool = False
    """replace an earlier run in --out"""
    checkpoint_every: int | None = None
    """updates from one checkpoint in --out to the next; None keeps none"""
    resume: bool = False
    """go on from the last checkpoint in --out, or begin where there is none"""
    tensorboard: bool = False
    """write every update to event files in --out"""
    budget: float | None = None
    """minutes after which the run ends, also within an epoch; with the best so far where there is
    --early-stopping"""


@dataclasses.dataclass(frozen=True)
class Diagnose:
    """Measure gradients before training: is balancing worth it?"""

    data: Path | None = None
    """folder or .zip of C-MAPSS text, plain or .gz; None simulates a small fleet"""
    subset: Subset = "FD001"
    """which of the four subsets"""
    sensors_only: bool = False
    """leave the three operating settings out of the features"""
    stride: int = 1
    """cycles between training windows"""
    model: Literal["compact", "full"] = "compact"
    """a network of 39 thousand parameters, or the published one of 3.5 million"""
    loss: Literal["mse", "amnl"] = "mse"
    """of the RUL: mean squared error, or that weighted up towards failure"""
    shared: tuple[str, ...] = ()
    """names of the shared parameters; none given: found from the gradients"""
    measure_on: tuple[str, ...] = ()
    """names of the shared parameters to take norms on; none given: all"""
    batches: int = 8
    """how many to measure, the first that a run would train on"""
    batch_size: int = 128
    """windows in a batch"""
    seed: int = 0
    """of the simulated fleet, the parameters and the batches"""
    leaves: bool = False
    """add each parameter's shape, whether it is shared, and the norms on it"""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare weightings on the same engines and batches."""

    out: Path
    """folder for the runs, results.csv, report.md and pictures; finished runs there are kept"""
    data: Path | None = None
    """folder or .zip of C-MAPSS text, plain or .gz; None simulates a small fleet"""
    subset: tuple[Subset, ...] = ("FD001",)
    """which of the four subsets"""
    methods: tuple[str, ...] = ("uniform", "gaba", "gaba:debias=true,warmup_steps=0")
    """names of weightings, each with its options after a colon"""
    loss: tuple[Literal["mse", "amnl"], ...] = ("mse",)
    """of the RUL; gaba with amnl is called GRACE"""
    seeds: int = 5
    """runs per method, with parameters and batches of their own"""
    epochs: int = 15
    """passes over the training windows"""
    stride: int = 1
    """cycles between training windows"""
    learning_rate: float = 2e-3
    """peak of the cosine decay"""
    adam_b2: float = 0.99
    """decay of AdamW's second moment"""


Command = Annotated[
    Annotated[Simulate, tyro.conf.subcommand("simulate")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Compare, tyro.conf.subcommand("compare")],
    tyro.conf.OmitArgPrefixes,
]


_COMMANDS = {"simulate": Simulate, "train": Train, "diagnose": Diagnose, "compare": Compare}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (130 after Ctrl-C, 143 after SIGTERM)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _check_words(given)
    with _colors_if_wanted():
        command = tyro.cli(
            cast(Any, Command),
            prog="gaba-jax",
            description="Balanced training of several losses on one model.",
            args=given,
        )
    console = Console()
    try:
        if isinstance(command, Simulate):
            _simulate(command, console)
        elif isinstance(command, Train):
            return _train(command, console)
        elif isinstance(command, Diagnose):
            _diagnose(command, console)
        else:
            _compare(command, console)
    except KeyboardInterrupt:
        print(f"gaba-jax: interrupted{_how_to_go_on(command)}", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"gaba-jax: {_with_flags(str(error), type(command))}", file=sys.stderr)
        return 1
    return 0


def _how_to_go_on(command: Any) -> str:
    if isinstance(command, Train) and command.checkpoint_every is None:
        out = "DIR" if command.out is None else command.out
        return (
            ". Nothing of the run can be gone on with. A run that can: --out "
            f"{out} --checkpoint-every 500 --resume"
        )
    if isinstance(command, Compare):
        return f". Finished runs are kept in {command.out}: the same again goes on with the others"
    return ""


@contextlib.contextmanager
def _colors_if_wanted() -> Generator[None]:
    """Help and its errors are without colours too where NO_COLOR is set."""
    before = os.environ.get("TERM")
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TERM", None)
        else:
            os.environ["TERM"] = before


def _options(command: type) -> Iterator[tuple[str, Any]]:
    """Names and types of the options of a command, those in its parts too."""
    for name, hint in typing.get_type_hints(command).items():
        if dataclasses.is_dataclass(hint):
            yield from _options(cast(type, hint))
        else:
            yield name, hint


def _check_words(given: Sequence[str]) -> None:
    """Ends with what was meant, where a command or a choice is nearly one that there is."""
    if not given or given[0].startswith("-"):
        return
    name, words = given[0], given[1:]
    if name not in _COMMANDS:
        if meant := did_you_mean(name, _COMMANDS):
            _end(f"no command {name!r}.{meant} There are: {', '.join(_COMMANDS)}.")
        return
    choices = {
        f"--{option.replace('_', '-')}": typing.get_args(one)
        for option, hint in _options(_COMMANDS[name])
        for one in (hint, *typing.get_args(hint))
        if typing.get_origin(one) is Literal
    }
    option = ""
    for word in words:
        value = word
        if word.startswith("--"):
            option, _, value = word.replace("_", "-").partition("=")
            value = word.partition("=")[2]
        known = choices.get(option, ())
        if value and known and value not in known and (meant := did_you_mean(value, known)):
            _end(f"{option} {value}: no such choice.{meant} There are: {', '.join(known)}.")


def _end(message: str) -> None:
    print(f"gaba-jax: {message}", file=sys.stderr)
    raise SystemExit(2)


def _with_flags(message: str, command: type) -> str:
    """A message of the library, with the options as they are typed: ``--epochs 0``."""
    names = {name for name, _ in _options(command)}

    def flag(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    def assigned(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"].strip("\"'")
        if name not in names:
            return found[0]
        return flag(name) if value == "True" else f"{flag(name)} {value}"

    def named(found: re.Match[str]) -> str:
        return flag(found["name"]) if found["name"] in names else found[0]

    leading = re.match(r"(\w+(?:, \w+)*): ", message)
    if leading and set(leading[1].split(", ")) <= names:
        listed = ", ".join(map(flag, leading[1].split(", ")))
        message = f"{listed}: {message[leading.end() :]}"
    # Not within a path or the options of a rule, such as gaba:beta=0.9.
    value = r"""(?P<value>"[^"]*"|'[^']*'|[^\s,;:)]*[^\s,;:.)])"""
    message = re.sub(rf"(?<![\w:,./'\"-])(?P<name>[a-z_]\w*)={value}", assigned, message)
    return re.sub(r"(?<=[:;] )(?:gaba\.)?(?P<name>[a-z_]\w*)(?= was )", named, message)


def _check_writable(folder: Path) -> None:
    """Raises before any work where a folder cannot be made, or nothing be written to it."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(
            f"{folder} cannot be a folder: {there} is a file. Name another folder."
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PermissionError(
            f"{folder} cannot be written: {there}: {error.strerror}. Name another folder."
        ) from error


class _TimeLeft(ProgressColumn):
    """The time that is left, and nothing of it at the end."""

    def __init__(self):
        self._remaining = TimeRemainingColumn()
        super().__init__()

    def render(self, task: Any) -> Text:
        if task.finished:
            return Text("done")
        return Text.assemble("left ", self._remaining.render(task))


def _simulate(command: Simulate, console: Console) -> None:
    _check_writable(command.directory)
    fleet = simulator.simulate(
        command.num_train,
        command.num_test,
        conditions=command.conditions,
        fault_modes=command.fault_modes,
        noise=command.noise,
        seed=command.seed,
    )
    simulator.write(fleet, command.directory, command.subset, overwrite=command.overwrite)
    console.print(
        f"{command.num_train} + {command.num_test} engines in {command.directory}; train on them "
        f"with: gaba-jax train --data {command.directory} --subset {command.subset}",
        soft_wrap=True,
    )


def _train(command: Train, console: Console) -> int:
    config, out = command.config, command.out
    # What is wrong shows before the data is read, and before anything is written.
    make_weighting(config)
    check_options(config)
    Budget(command.budget)
    noted: list[int] = []
    replayed = [0]
    checkpoints = _checkpoints(command, noted, replayed, console)
    if command.tensorboard and out is None:
        raise ValueError("--tensorboard needs a folder: pass --out.")
    going_on = _check_out(command)
    if out is not None:
        _check_writable(out)
    data = load_data(config)
    check_config(config, len(data.train.rul))
    if command.budget is not None:
        console.print(
            f"Ends after about {command.budget:g} minutes, also within an epoch (--budget)."
        )
    if out is not None and not going_on:
        out.mkdir(parents=True, exist_ok=True)
        # An interrupted run must not keep what belongs to an old one.
        (out / "summary.json").unlink(missing_ok=True)
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(out / name, ignore_errors=True)
        if checkpoints is not None:
            checkpoints.directory.mkdir()
        (out / "metrics.jsonl").write_text("")
    with (
        contextlib.nullcontext() if checkpoints is None else noting_signals(noted),
        event_writer(out / "tensorboard")
        if out is not None and command.tensorboard
        else contextlib.nullcontext() as write_events,
        Progress(
            TextColumn("epoch {task.completed}/{task.total}"),
            *([BarColumn(bar_width=10)] if console.width >= _NARROW else []),
            _TimeLeft(),
            TextColumn("{task.fields[status]}"),
            console=console,
            speed_estimate_period=_ALL,
        ) as progress,
    ):
        bar = progress.add_task("train", total=config.epochs, status="compiling")

        def on_epoch(record: EpochRecord) -> None:
            scalars = record.scalars
            losses = [f"{task} {scalars[f'loss/{task}']:.3g}" for task in TASKS]
            status = f"loss: {', '.join(losses)}"
            if console.width >= _WIDE:
                weights = [f"{scalars[f'weight/{task}']:.3f}" for task in TASKS]
                both = (" x ".join(each) for each in zip(losses, weights, strict=True))
                status = f"loss x weight: {', '.join(both)}"
            if record.epoch * len(record.losses) <= replayed[0]:  # it took no time now
                progress.reset(bar, completed=record.epoch, status=status)
            else:
                progress.update(bar, completed=record.epoch, status=status)
            if out is not None:
                # A resumed run begins with the epochs that were finished before.
                with (out / "metrics.jsonl").open("w" if record.epoch == 1 else "a") as file:
                    line = {"epoch": record.epoch, **compare.finite(scalars)}
                    file.write(json.dumps(line, allow_nan=False) + "\n")
            if write_events is not None:
                write_events(record)

        try:
            run = train(data, config, on_epoch, checkpoints, command.budget)
            progress.update(bar, total=len(run.records), completed=len(run.records))
            said = "stopped after the last update"
        except Stopped as stopped:
            run, said = None, str(stopped)
    if run is None or noted:
        print(
            f"gaba-jax: {said}, saved in {out}. To go on, pass the same and --resume.",
            file=sys.stderr,
        )
        return 128 + noted[0]
    if out is not None:
        try:
            _write(run, data, out)
        except (OSError, ValueError) as error:  # tensorstore reports a full disk as a ValueError
            again = "resume" if command.checkpoint_every else "train again"
            raise OSError(
                f"{out}: the run is finished, but could not be written: {error}. Mend that, and "
                f"{again}."
            ) from error
    _report(run, config, out, console)
    return 0


def _checkpoints(
    command: Train, noted: Sequence[int], replayed: list[int], console: Console
) -> Checkpoints | None:
    if command.checkpoint_every is None:
        if command.resume:
            raise ValueError(
                "--resume goes on from checkpoints: pass --checkpoint-every, whose number may be "
                "another than before."
            )
        return None
    if command.out is None:
        raise ValueError(
            f"--checkpoint-every {command.checkpoint_every} needs a folder: pass --out."
        )

    def on_resume(step: int) -> None:
        replayed[0] = step
        console.print(f"Going on after update {step}")

    return Checkpoints(
        command.out / "checkpoints",
        command.checkpoint_every,
        resume=command.resume,
        stop=lambda: bool(noted),
        on_resume=on_resume,
    )


def _check_out(command: Train) -> bool:
    """Whether --out holds a run to go on with; raises if it holds one that must be kept."""
    out = command.out
    if out is None:
        return False
    if command.resume and command.overwrite:
        raise ValueError("--resume goes on with a run that --overwrite removes: pass one of them.")
    with_checkpoints = (out / "checkpoints").exists()
    if command.resume and with_checkpoints:
        return True
    if not command.overwrite and (with_checkpoints or (out / "metrics.jsonl").exists()):
        what, other = "an earlier run", ", or pass --overwrite"
        if with_checkpoints:
            other = f", --resume to go on with it{other}"
        elif command.resume:
            what, other = "an earlier run without checkpoints", other + " in place of --resume"
        raise FileExistsError(f"{out} holds {what}. Name another --out{other}.")
    return False


def _diagnose(command: Diagnose, console: Console) -> None:
    options = dataclasses.asdict(command)
    leaves, num_batches = options.pop("leaves"), options.pop("batches")
    config = TrainConfig(**options)
    check_options(config)
    if num_batches < 1:
        raise ValueError(f"batches={num_batches} must be at least 1.")
    found = diagnose_run(load_data(config), config, num_batches)
    print(found.table(leaves=leaves, width=min(console.width, _WIDE)))


def _compare(command: Compare, console: Console) -> None:
    if command.seeds < 1:
        raise ValueError(f"seeds={command.seeds} must be at least 1.")
    config = TrainConfig(
        data=command.data,
        epochs=command.epochs,
        stride=command.stride,
        learning_rate=command.learning_rate,
        adam_b2=command.adam_b2,
    )
    cells = compare.cells(command.methods, command.subset, command.loss, config)
    check_options(config)
    _check_writable(command.out)
    if command.data is not None:
        for subset in command.subset:
            find_fleet(command.data, subset)
    seeds = range(command.seeds)
    total = sum(compare.missing_epochs(cells, seeds, command.out))
    with Progress(
        TextColumn("{task.fields[cell]}"),
        *([BarColumn(bar_width=20)] if console.width >= _NARROW else []),
        TextColumn("{task.percentage:.0f} %"),
        _TimeLeft(),
        console=console,
        disable=total == 0,  # all runs are kept
        speed_estimate_period=_ALL,
    ) as progress:
        bar = progress.add_task("compare", total=total, cell="")

        def on_epoch(cell: compare.Cell, epoch: int, count: int) -> None:
            name = f"{cell.config.subset} {cell.label}, epoch {epoch}/{cell.config.epochs}"
            progress.update(bar, advance=count, cell=name)

        results = compare.run(cells, seeds, command.out, on_epoch)
    report.write(results, command.out)
    table = Table(title="Test engines, means over the seeds", title_justify="left")
    table.add_column("")
    for title in ("RMSE", "NASA score", "health accuracy", "diverged"):
        table.add_column(title, justify="right")
    for name, label, row in report.means(results):
        scores = (f"{row[key]:.4g}" for key in ("rmse", "nasa_score", "health_accuracy"))
        table.add_row(f"{name}, {label}", *scores, f"{row['diverged']:.0f}")
    console.print(table)
    diverged = sum(result["diverged"] for result in results)
    console.print(f"{len(results)} runs, {diverged} diverged. Written to {command.out}")


def _write(run: Run, data: TurbofanData, out: Path) -> None:
    norms = np.concatenate([record.task_norms for record in run.records])
    weights = np.concatenate([record.task_weights for record in run.records])
    losses = np.concatenate([record.losses for record in run.records])
    np.savez(out / "history.npz", losses=losses, task_norms=norms, task_weights=weights)
    for name, figure in [
        ("balance", plot.balance_history(norms, weights, TASKS)),
        ("losses", plots.learning_curves(losses, TASKS)),
        ("rul", plots.predicted_against_true(run.predicted_rul, data.test.rul)),
        ("health", plots.confusion_matrix(run.predicted_health, data.test.health)),
    ]:
        figure.savefig(out / f"{name}.png", dpi=150)
    with ocp.StandardCheckpointer() as checkpointer:
        state = nnx.to_pure_dict(nnx.merge_state(run.params, run.stats))
        checkpointer.save((out / "params").absolute(), state, force=True)
    compare.write_json(out / "summary.json", run.summary)  # last: a run that has one is complete


def _report(run: Run, config: TrainConfig, out: Path | None, console: Console) -> None:
    summary = run.summary
    of_file = config.data is not None and config.data.suffix in (".h5", ".hdf5")  # no subsets
    engines = config.data or "a simulated fleet"
    source = engines if of_file else f"{config.subset}, {engines}"
    table = Table(title=f"{config.weighting} on {source}", title_justify="left")
    table.add_column("")
    for name in ("validation", "test"):
        table.add_column(name, justify="right")
    for key, title in [
        ("rmse", "RUL, RMSE (cycles)"),
        ("nasa_score", "RUL, NASA score"),
        ("late_prediction_rate", "RUL, predicted late"),
        ("health_accuracy", "health, accuracy"),
        ("macro_f1", "health, macro F1"),
    ]:
        table.add_row(title, *(f"{summary[s][key]:.4g}" for s in ("validation", "test")))
    console.print(table)
    weights = ", ".join(f"{name} {value:.4f}" for name, value in summary["task_weights"].items())
    console.print(f"Task weights at the end: {weights}")
    titles = {"gradient_ratio": "Gradient norms, largest / smallest"}
    updates, warmup = summary["updates"], warmup_steps(config)
    if updates > warmup:
        titles["contribution_ratio"] = "The same, weighted"
    for key, title in titles.items():
        median = summary[key]["median"]
        console.print(f"{title}: {'infinite' if median is None else f'{median:.4g}'} (median)")
    if updates <= warmup:
        console.print(
            f"Nothing was balanced yet: the weights are equal in the {warmup} updates of the "
            f"warm-up, and the run had {updates}. Train longer, pass --warmup-steps 0, or "
            "--weighting equalize."
        )
    epoch = f"epoch {summary['evaluated_epoch']}"
    if summary["evaluated_epoch"] > summary["epochs"]:
        epoch += ", which was not finished"
    console.print(
        f"{updates} updates in {summary['timing']['seconds']:.1f} s, ended by "
        f"{summary['ended']}; evaluated after {epoch}"
    )
    if out is not None:
        console.print(f"Written to {out}")


if __name__ == "__main__":
    sys.exit(main())
