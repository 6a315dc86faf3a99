"""The command gaba-jax, as a user types it."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gaba_jax import cli
from gaba_jax.turbofan import metrics
from gaba_jax.turbofan.train import EpochRecord, TrainConfig, load_data, train

pytestmark = pytest.mark.usefixtures("compiled_once")
SMALL = ["--epochs", "2", "--stride", "10"]


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished small run."""
    out = tmp_path_factory.mktemp("runs") / "first"
    assert run("train", *SMALL, "--warmup-steps", 0, "--out", out) == 0
    return out


def test_train_writes_metrics_summary_pictures_and_parameters(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"loss/rul", "loss/health", "weight/rul", "norm/health", "validation/rmse"} <= set(
        lines[0]
    )
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["tasks"] == ["rul", "health"]
    assert summary["updates"] == 2 * (summary["windows"]["train"] // 128)
    assert lines[-1]["validation/rmse"] == summary["validation"]["rmse"]
    for name in ("balance", "losses", "rul", "health"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore((finished / "params").absolute())
    assert {"backbone", "rul_head", "health_head"} == set(params)
    assert all(np.isfinite(leaf).all() for leaf in params["rul_head"].values())


@pytest.mark.slow
def test_the_same_seed_gives_bitwise_the_same_summary(finished, tmp_path):
    assert run("train", *SMALL, "--warmup-steps", 0, "--out", tmp_path / "second") == 0
    first, second = (
        json.loads((folder / "summary.json").read_text())
        for folder in (finished, tmp_path / "second")
    )
    assert first.pop("timing")["seconds"] > 0
    second.pop("timing")
    assert first == second
    assert (finished / "metrics.jsonl").read_text() == (
        tmp_path / "second" / "metrics.jsonl"
    ).read_text()


@pytest.mark.slow
def test_another_seed_or_rule_gives_another_run(finished, tmp_path):
    first = json.loads((finished / "summary.json").read_text())
    for name, arguments in [("seed", ["--seed", "1"]), ("rule", ["--weighting", "uniform"])]:
        assert run("train", *SMALL, *arguments, "--out", tmp_path / name) == 0
        other = json.loads((tmp_path / name / "summary.json").read_text())
        assert other["test"] != first["test"]
    assert other["task_weights"] == {"rul": 0.5, "health": 0.5}
    assert other["gradient_ratio"]["median"] > 10  # watched, though the rule needs no norms


def test_an_earlier_run_is_not_replaced_unasked(finished, capsys):
    before = (finished / "summary.json").read_bytes()
    assert run("train", *SMALL, "--out", finished) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (finished / "summary.json").read_bytes() == before


@pytest.mark.slow
def test_checkpoints_are_not_replaced_unasked_and_overwrite_removes_them(tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", *SMALL, "--out", out, "--checkpoint-every", 100) == 0
    (kept,) = (path.name for path in (out / "checkpoints").iterdir())
    assert run("train", *SMALL, "--out", out, "--checkpoint-every", 100) == 1
    assert "--resume to go on with it, or pass --overwrite" in capsys.readouterr().err
    assert (out / "checkpoints" / kept).is_dir()
    assert run("train", *SMALL, "--out", out, "--overwrite") == 0
    assert not (out / "checkpoints").exists()
    assert run("train", *SMALL, "--out", out, "--checkpoint-every", 100, "--resume") == 1
    said = capsys.readouterr().err
    assert "without checkpoints. Name another --out, or pass --overwrite in place of --res" in said


@pytest.mark.slow
def test_a_finished_run_that_cannot_be_written_is_not_called_complete(tmp_path, capsys):
    (tmp_path / "balance.png").mkdir()
    assert run("train", *SMALL, "--out", tmp_path) == 1
    said = capsys.readouterr().err
    assert "the run is finished, but could not be written" in said
    assert "balance.png" in said
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_a_signal_after_the_last_update_stops_before_the_report(tmp_path, capsys, monkeypatch):
    @contextlib.contextmanager
    def late(noted):
        yield
        noted.append(signal.SIGTERM)

    monkeypatch.setattr(cli, "noting_signals", late)
    arguments = ["train", *SMALL, "--out", tmp_path, "--checkpoint-every", 100]
    assert run(*arguments) == 143
    assert "stopped after the last update, saved in" in capsys.readouterr().err
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    assert run(*arguments, "--resume") == 0
    assert (tmp_path / "summary.json").exists()


def test_the_time_left_is_told_of_long_epochs_and_after_a_resume(tmp_path, monkeypatch):
    now, left = [0.0], []

    class Clocked(cli.Progress):
        def __init__(self, *columns, **options):
            super().__init__(*columns, get_time=lambda: now[0], auto_refresh=False, **options)
            left.append(lambda: self.tasks[0].time_remaining)

    def slow(data, config, on_epoch, checkpoints, budget):
        def finish(epoch, seconds):
            now[0] += seconds
            values = np.ones((3, 2), np.float32)
            scalars = dict.fromkeys(("loss/rul", "loss/health", "weight/rul", "weight/health"), 1.0)
            on_epoch(EpochRecord(epoch, scalars, values, values, values))

        now[0] += 60  # compiling
        checkpoints.on_resume(3 * 100 + 1)
        for epoch in range(1, 101):
            finish(epoch, 0.001)
        for epoch in range(101, 104):
            finish(epoch, 150)
            told.append(left[0]())
        raise ValueError("enough")

    told = []
    monkeypatch.setattr(cli, "Progress", Clocked)
    monkeypatch.setattr(cli, "train", slow)
    options = ["--epochs", 500, "--stride", 60, "--checkpoint-every", 9]
    assert run("train", *options, "--out", tmp_path / "run") == 1
    assert told[1:] == pytest.approx([150 * 398, 150 * 397], abs=2)  # two epochs make an estimate


def read_events(folder):
    """{tag: [(step, value), ...]}, by TensorBoard's own reader."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.slow
def test_tensorboard_reads_every_update_and_every_epoch(tmp_path):
    out = tmp_path / "run"
    arguments = ["train", *SMALL, "--warmup-steps", 0, "--out", out, "--tensorboard"]
    assert run(*arguments) == 0
    events = read_events(out / "tensorboard")
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    updates = summary["updates"]
    per_task = ("loss", "weight", "norm", "share", "contribution")
    every_update = {f"{key}/{task}" for key in per_task for task in ("rul", "health")}
    every_update |= {"gradient_ratio", "imbalance"}
    finite = {key for key, value in lines[0].items() if value is not None and key != "epoch"}
    assert set(events) == every_update | {f"epoch/{key}" for key in finite}
    for tag in every_update:
        assert [step for step, _ in events[tag]] == list(range(1, updates + 1))
    for epoch, line in enumerate(lines, 1):
        last = epoch * updates // 2
        for key in finite:
            step, value = events[f"epoch/{key}"][epoch - 1]
            assert step == last
            np.testing.assert_allclose(value, line[key], rtol=1e-6)
        for key in every_update - {"loss/rul", "loss/health"}:  # of the epoch's last update
            np.testing.assert_allclose(events[key][last - 1][1], line[key], rtol=1e-5)
        for task in ("rul", "health"):
            losses = [value for _, value in events[f"loss/{task}"][last - updates // 2 : last]]
            np.testing.assert_allclose(np.mean(losses), line[f"loss/{task}"], rtol=1e-5)
    assert run("train", *SMALL, "--out", out, "--overwrite") == 0
    assert not (out / "tensorboard").exists()


@pytest.mark.slow
def test_a_resumed_run_has_each_event_once(tmp_path):
    out = tmp_path / "run"
    arguments = ["train", *SMALL, "--out", out, "--tensorboard", "--checkpoint-every", 1000]
    assert run(*arguments) == 0
    before = read_events(out / "tensorboard")
    assert run(*arguments, "--resume") == 0
    assert read_events(out / "tensorboard") == before


@pytest.mark.slow
def test_diagnose_prints_a_table_and_a_recommendation(capsys):
    small = ["--stride", 20, "--batches", 2, "--batch-size", 64]
    assert run("diagnose", *small, "--leaves") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for part in (
        "2 tasks, medians over 2 batches; shared: 8 of 12 leaves",
        "gradient ratio, largest / smallest norm: median",
        "conflict: not enough batches to tell",
        "Recommendation: balance with optax.chain(equalize(2), optax.adamw(1e-3))",
        "Why: 'rul' pulls",
    ):
        assert part in out
    (kernel,) = (line for line in out.splitlines() if line.startswith("rul_head.kernel"))
    _, shape, shared, rul, health = kernel.split()
    assert (shape, shared, health) == ("32x1", "no", "0")
    assert float(rul) > 0


@pytest.mark.slow
def test_an_infinite_score_is_null_and_loses_nothing(tmp_path):
    config = TrainConfig(epochs=1, stride=10)
    data = load_data(config)
    run = train(data, config)
    run.summary["test"]["nasa_score"] = metrics.nasa_score([90000.0], [1.0])
    cli._write(run, data, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test"]["nasa_score"] is None
    assert summary["test"]["rmse"] == run.summary["test"]["rmse"]


@pytest.mark.slow
def test_a_stopped_rerun_keeps_no_summary_of_the_run_before(tmp_path, monkeypatch):
    assert run("train", *SMALL, "--out", tmp_path) == 0

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupted)
    assert run("train", *SMALL, "--out", tmp_path, "--overwrite") == 130
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_simulate_then_train_on_it(tmp_path, capsys):
    fleet = tmp_path / "fleet"
    assert run("simulate", fleet, "--num-train", 12, "--num-test", 5, "--subset", "FD003") == 0
    assert sorted(path.name for path in fleet.iterdir()) == [
        "RUL_FD003.txt",
        "test_FD003.txt",
        "train_FD003.txt",
    ]
    assert (
        run("train", "--data", fleet, "--subset", "FD003", *SMALL, "--debias", "--beta", 0.9) == 0
    )
    assert "gaba on FD003" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "fleet.zip", "w") as archive:
        for path in fleet.iterdir():
            archive.write(path, path.name)
    of_zip = ["--data", tmp_path / "fleet.zip", "--subset", "FD003"]
    assert run("train", *of_zip, *SMALL, "--debias", "--beta", 0.9) == 0
    assert "gaba on FD003" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--epochs", "0"], "--epochs 0 must be at least 1"),
        (["train", "--batch-size", "1000000"], "--batch-size 1000000 is more than"),
        (["train", "--beta", "1.5"], "--beta 1.5 must be in [0, 1)"),
        (["train", "--min-weight", "0.6"], "the most is 0.5"),
        (["train", "--weighting", "best"], "'best': no weighting 'best'. There are: "),
        (
            ["train", "--weighting", "uniform", "--beta", "0.9"],
            "--beta: options of the weighting gaba",
        ),
        (["train", "--learning-rate", "-1"], "--learning-rate -1.0 must be positive"),
        (["train", "--shared", "trunk"], "'trunk' matches no parameter"),
        (["train", "--learning-rate", "1e30", *SMALL], "no longer finite in epoch 1"),
        (  # of one update, after which there are no more losses
            [
                *("train", "--learning-rate", "1e30", "--schedule", "constant", "--epochs", "1"),
                *("--stride", "60", "--batch-size", "96", "--out", "o"),
            ],
            "the predicted RUL is no longer finite after epoch 1. Lower the learning rate",
        ),
        (["simulate", "somewhere", "--conditions", "3"], "conditions"),
        (["train", "--budget", "0"], "--budget 0.0 must be positive, in minutes"),
        (["train", "--measure", "stacked", "--every", "2"], "take --measure exact"),
        (["train", "--weighting", "equalise"], "Did you mean 'equalize'?"),
        (["train", "--shared", "backbon"], "Did you mean 'backbone'?"),
        (["train", "--checkpoint-every", "5"], "--checkpoint-every 5 needs a folder: pass --out"),
        (
            ["train", "--out", "o", "--checkpoint-every", "0"],
            "--checkpoint-every 0 must be at least",
        ),
        (["train", "--tensorboard"], "--tensorboard needs a folder: pass --out"),
        (["diagnose", "--batches", "0"], "--batches 0 must be at least 1"),
        (["diagnose", "--shared", "trunk", "--batch-size", "8"], "'trunk' matches no parameter"),
        (["train", "--out", "o", "--resume"], "--resume goes on from checkpoints: pass"),
        (
            ["train", "--out", "o", "--checkpoint-every", "5", "--resume", "--overwrite"],
            "pass one of them",
        ),
    ],
)
def test_a_wrong_value_says_what_is_allowed(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--subset", "FD005"], "--subset FD005: no such choice. Did you mean 'FD00"),
        (["train", "--subset=FD005"], "--subset FD005: no such choice. Did you mean 'FD00"),
        (["train", "--loss", "amln"], "Did you mean 'amnl'? There are: mse, amnl."),
        (["compare", "--out", "o", "--loss", "mse", "amln"], "Did you mean 'amnl'?"),
        (["trian"], "no command 'trian'. Did you mean 'train'? There are: simulate, train"),
        (["train", "--epochs", "many"], "epochs"),
        (["fly"], "train"),
    ],
)
def test_an_unknown_word_lists_the_choices(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "--help"] for name in cli._COMMANDS)],
)
def test_help(arguments, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "gaba-jax" in out
    assert max(map(len, out.splitlines())) <= columns


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
def test_no_color_holds_for_help_too(no_color, colored, monkeypatch):
    """In a terminal, which a pipe is not."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        run("--help")
    assert ("\x1b[" in terminal.getvalue()) == colored
    assert os.environ["TERM"] == "xterm"


def never(*arguments, **options):
    raise AssertionError("work was done")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--epochs", 0, "--out", "{}/new"], "--epochs 0 must be at least 1"),
        (["train", "--epochs", 0, "--out", "{}/earlier", "--overwrite"], "--epochs 0 must be"),
        (["train", "--budget", -1, "--out", "{}/new"], "--budget -1.0 must be positive"),
        (["train", "--out", "{}/earlier"], "earlier holds an earlier run. Name another --out, or"),
        (["train", "--out", "{}/file"], "cannot be a folder"),
        (["train", "--out", "{}/file/new"], "cannot be a folder"),
        (["train", "--out", "/proc/new"], "/proc/new cannot be written: /proc: "),
        (["compare", "--epochs", 0, "--out", "{}/new"], "--epochs 0 must be at least 1"),
        (["compare", "--out", "{}/file/new"], "cannot be a folder"),
        (["compare", "--out", "{}/new", "--data", "{}/file"], "neither one of the C-MAPSS text"),
        (["diagnose", "--batch-size", 0], "--batch-size 0 must be at least 1"),
        (["simulate", "{}/file"], "cannot be a folder"),
        (["simulate", "/proc/new"], "/proc/new cannot be written: /proc: "),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    arguments, message, tmp_path, capsys, monkeypatch
):
    (tmp_path / "earlier").mkdir()
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / "earlier" / name).write_text("{}")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for module, name in ((cli, "load_data"), (cli.simulator, "simulate"), (cli.compare, "run")):
        monkeypatch.setattr(module, name, never)
    assert run(*(str(argument).format(tmp_path) for argument in arguments)) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_are_there_are_kept_by_their_flag(tmp_path, capsys):
    small = ["simulate", tmp_path, "--num-train", 2, "--num-test", 1]
    assert run(*small) == 0
    assert run(*small, "--seed", 1) == 1
    assert capsys.readouterr().err.endswith("or pass --overwrite.\n")


def test_another_subset_is_named_by_its_flag(tmp_path, capsys):
    assert run("simulate", tmp_path, "--num-train", 2, "--num-test", 1) == 0
    assert run("train", "--data", tmp_path / "RUL_FD001.txt", "--subset", "FD002") == 1
    assert "pass --subset FD001, or the folder" in capsys.readouterr().err


def finished_run(updates, epochs=1):
    """What train returns, as far as the report of it goes."""
    scores = dict.fromkeys(
        ("rmse", "nasa_score", "late_prediction_rate", "health_accuracy", "macro_f1"), 0.5
    )
    summary = {
        "validation": scores,
        "test": scores,
        "task_weights": {"rul": 0.5, "health": 0.5},
        "gradient_ratio": {"median": 80.0},
        "contribution_ratio": {"median": 81.02},
        "updates": updates,
        "timing": {"seconds": 1.0},
        "ended": "budget",
        "epochs": epochs,
        "evaluated_epoch": 2,
    }
    return types.SimpleNamespace(summary=summary, records=[None] * 2)


@pytest.mark.parametrize(
    ("arguments", "updates", "balanced"),
    [
        ([], 100, False),
        ([], 101, True),
        (["--warmup-steps", 7], 7, False),
        (["--weighting", "gaba:warmup_steps=7"], 8, True),
        (["--weighting", "equalize"], 1, True),
    ],
)
def test_a_run_shorter_than_the_warmup_says_so(arguments, updates, balanced, capsys, monkeypatch):
    monkeypatch.setattr(cli, "train", lambda *_: finished_run(updates))
    monkeypatch.setenv("COLUMNS", "60")
    assert run("train", *arguments, "--stride", 60) == 0
    out = capsys.readouterr().out
    assert ("The same, weighted: 81.02" in out) == balanced
    assert ("Nothing was balanced yet" in out) != balanced
    assert max(map(len, out.splitlines())) <= 60


def test_a_budget_is_told_before_and_an_unfinished_epoch_after(capsys, monkeypatch):
    monkeypatch.setattr(cli, "train", lambda *_: finished_run(500))
    assert run("train", "--budget", 2.5, "--stride", 60) == 0
    out = capsys.readouterr().out
    assert out.startswith("Ends after about 2.5 minutes, also within an epoch (--budget).")
    assert "ended by budget; evaluated after epoch 2, which was not finished" in " ".join(
        out.split()
    )
    assert "epoch 2/2" in out
    assert "done" in out


@pytest.mark.parametrize(
    ("command", "how"),
    [
        (["train", "--stride", 60], "A run that can: --out DIR --checkpoint-every 500 --resume"),
        (["compare", "--out", "o", "--methods", "uniform"], "the same again goes on with the oth"),
    ],
)
def test_ctrl_c_says_how_to_go_on(command, how, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "train", interrupted)
    monkeypatch.setattr(cli.compare, "run", interrupted)
    assert run(*command) == 130
    assert how in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("epochs=0 must be at least 1.", "--epochs 0 must be at least 1."),
        ("or pass overwrite=True.", "or pass --overwrite."),
        ('measure="exact", every=2', "--measure exact, --every 2"),
        ("'gaba:beta=2': beta=2 is out", "'gaba:beta=2': --beta 2 is out"),
        ("runs/epochs=3/seed0.json and unknown=1", "runs/epochs=3/seed0.json and unknown=1"),
        (
            "c is of another run: gaba.beta was 1 and is 2",
            "c is of another run: --beta was 1 and is 2",
        ),
        ("sensors_only: data is", "--sensors-only: data is"),
        ("learning_rate=-1.5 must", "--learning-rate -1.5 must"),
    ],
)
def test_messages_name_flags(message, said):
    assert cli._with_flags(message, cli.Train) == said


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_keeps_what_was_written(tmp_path):
    out = tmp_path / "run"
    # As in a terminal: what a shell starts in the background ignores SIGINT, and so would this.
    program = """if True:
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from gaba_jax import cli
        raise SystemExit(cli.main())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program, "train", "--epochs", "100000", "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    try:
        metrics = out / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.strip() == (
        "gaba-jax: interrupted. Nothing of the run can be gone on with. A run that can: --out "
        f"{out} --checkpoint-every 500 --resume"
    )
    assert all(json.loads(line) for line in metrics.read_text().splitlines())


@pytest.mark.slow
def test_compare_writes_and_goes_on(tmp_path, capsys):
    arguments = ["compare", "--out", tmp_path, "--epochs", 1, "--stride", 20, "--seeds", 1]
    assert run(*arguments, "--methods", "uniform") == 0
    kept = tmp_path / "runs" / "FD001" / "mse" / "uniform" / "seed0.json"
    before = kept.stat().st_mtime_ns
    assert "100 % done" in " ".join(capsys.readouterr().out.split())
    assert run(*arguments, "--methods", "uniform", "gaba:warmup_steps=0") == 0
    assert kept.stat().st_mtime_ns == before
    assert "2 runs, 0 diverged" in capsys.readouterr().out
    assert run(*arguments, "--methods", "uniform", "gaba:warmup_steps=0") == 0
    assert "%" not in capsys.readouterr().out  # there was nothing to do
    for name in ("results.csv", "report.md", "pareto_FD001.png", "history_FD001.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "needs at least 2 seeds" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gabba"], "no weighting 'gabba'. Did you mean 'gaba'? There are: "),
        (["--methods", "gaba:betta=1"], "'betta=1' is no option of gaba. Did you mean 'beta'?"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
    ],
)
def test_compare_says_what_is_wrong(arguments, message, capsys, tmp_path):
    assert run("compare", "--out", tmp_path, *arguments) == 1
    assert message in capsys.readouterr().err
