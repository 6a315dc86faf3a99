"""The command ``gaba-jax``: simulate engines, diagnose, train on them, compare weightings."""

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

try:
    import orbax.checkpoint as ocp
    import tyro
    from flax import nnx
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    raise SystemExit(
        f'gaba-jax needs the package {error.name}: pip install "gaba-jax[turbofan]"'
    ) from error

import numpy as np

from gaba_jax import plot
from gaba_jax.turbofan import compare, plots, report, simulator
from gaba_jax.turbofan._signals import noting_signals
from gaba_jax.turbofan.checkpoints import Checkpoints, Stopped
from gaba_jax.turbofan.config import TASKS, Subset, TrainConfig, make_weighting
from gaba_jax.turbofan.data import TurbofanData
from gaba_jax.turbofan.diagnosis import diagnose_run
from gaba_jax.turbofan.events import event_writer
from gaba_jax.turbofan.train import EpochRecord, Run, load_data, train

_ALL = 1e9  # seconds: an epoch may take longer than those 30 that rich looks back on


@dataclasses.dataclass(frozen=True)
class Simulate:
    """Write a simulated fleet of engines in the C-MAPSS file format."""

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
    """Train the two-headed model: remaining useful life and health state."""

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
    """minutes after which no further epoch is begun; the best so far with --early-stopping"""


@dataclasses.dataclass(frozen=True)
class Diagnose:
    """Measure the gradients before training: is balancing worth it?"""

    data: Path | None = None
    """folder of C-MAPSS text, plain or .gz; None simulates a small fleet"""
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
    """Train with several weightings on the same engines, parameters and batches, and report."""

    out: Path
    """folder for the runs, results.csv, report.md and pictures; finished runs there are kept"""
    data: Path | None = None
    """folder of C-MAPSS text, plain or .gz; None simulates a small fleet"""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (130 after Ctrl-C, 143 after SIGTERM)."""
    command = tyro.cli(
        cast(Any, Command),
        prog="gaba-jax",
        description="Balanced training of several losses on one model.",
        args=arguments,
    )
    console = Console()
    try:
        if isinstance(command, Simulate):
            _simulate(command, console)
        elif isinstance(command, Train):
            return _train(command, console)
        elif isinstance(command, Diagnose):
            _diagnose(command)
        else:
            _compare(command, console)
    except KeyboardInterrupt:
        print("gaba-jax: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"gaba-jax: {error}", file=sys.stderr)
        return 1
    return 0


def _simulate(command: Simulate, console: Console) -> None:
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
    make_weighting(config)  # a wrong option shows before the data is read
    noted: list[int] = []
    replayed = [0]
    checkpoints = _checkpoints(command, noted, replayed, console)
    if command.tensorboard and out is None:
        raise ValueError("--tensorboard needs a folder: pass --out.")
    going_on = _check_out(command)
    data = load_data(config)
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
            BarColumn(bar_width=10),
            TimeRemainingColumn(),
            TextColumn("loss x weight: {task.fields[status]}"),
            console=console,
            speed_estimate_period=_ALL,
        ) as progress,
    ):
        bar = progress.add_task("train", total=config.epochs, status="compiling")

        def on_epoch(record: EpochRecord) -> None:
            scalars = record.scalars
            status = ", ".join(
                f"{task} {scalars[f'loss/{task}']:.3g} x {scalars[f'weight/{task}']:.3f}"
                for task in TASKS
            )
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


def _diagnose(command: Diagnose) -> None:
    options = dataclasses.asdict(command)
    leaves, num_batches = options.pop("leaves"), options.pop("batches")
    config = TrainConfig(**options)
    print(diagnose_run(load_data(config), config, num_batches).table(leaves=leaves))


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
    seeds = range(command.seeds)
    total = sum(compare.missing_epochs(cells, seeds, command.out))
    with Progress(
        TextColumn("{task.fields[cell]}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:.0f} %, left:"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
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
    of_file = config.data is not None and not config.data.is_dir()  # N-CMAPSS has no subsets
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
    for key, title in [
        ("gradient_ratio", "Gradient norms, largest / smallest"),
        ("contribution_ratio", "The same, weighted"),
    ]:
        median = summary[key]["median"]
        console.print(f"{title}: {'infinite' if median is None else f'{median:.4g}'} (median)")
    console.print(
        f"{summary['updates']} updates in {summary['timing']['seconds']:.1f} s, ended by "
        f"{summary['ended']}; evaluated after epoch {summary['evaluated_epoch']}"
    )
    if out is not None:
        console.print(f"Written to {out}")


if __name__ == "__main__":
    sys.exit(main())
