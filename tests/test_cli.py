"""The command gaba-jax, as a user types it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

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
    for name in ("balance", "rul", "health"):
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--epochs", "0"], "epochs=0 must be at least 1"),
        (["train", "--batch-size", "1000000"], "batch_size=1000000 is more than"),
        (["train", "--beta", "1.5"], "beta=1.5 must be in [0, 1)"),
        (["train", "--min-weight", "0.6"], "the most is 0.5"),
        (["train", "--weighting", "best"], "'best': no weighting 'best'. There are: "),
        (
            ["train", "--weighting", "uniform", "--beta", "0.9"],
            "beta: options of the weighting gaba",
        ),
        (["train", "--learning-rate", "-1"], "learning_rate=-1.0 must be positive"),
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
        (["train", "--checkpoint-every", "5"], "--checkpoint-every 5 needs a folder: pass --out"),
        (["train", "--out", "o", "--checkpoint-every", "0"], "checkpoint_every=0 must be at least"),
        (["train", "--tensorboard"], "--tensorboard needs a folder: pass --out"),
        (["diagnose", "--batches", "0"], "batches=0 of batch_size=128 must be at least one each"),
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
        (["train", "--subset", "FD005"], "FD004"),
        (["train", "--epochs", "many"], "epochs"),
        (["fly"], "train"),
    ],
)
def test_an_unknown_word_lists_the_choices(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["simulate", "--help"], ["diagnose", "--help"]],
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "gaba-jax" in out
    assert max(map(len, out.splitlines())) <= 80


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
    assert errors.strip() == "gaba-jax: interrupted"
    assert all(json.loads(line) for line in metrics.read_text().splitlines())


@pytest.mark.slow
def test_compare_writes_and_goes_on(tmp_path, capsys):
    arguments = ["compare", "--out", tmp_path, "--epochs", 1, "--stride", 20, "--seeds", 1]
    assert run(*arguments, "--methods", "uniform") == 0
    kept = tmp_path / "runs" / "FD001" / "mse" / "uniform" / "seed0.json"
    before = kept.stat().st_mtime_ns
    assert run(*arguments, "--methods", "uniform", "gaba:warmup_steps=0") == 0
    assert kept.stat().st_mtime_ns == before
    assert "2 runs, 0 diverged" in capsys.readouterr().out
    for name in ("results.csv", "report.md", "pareto_FD001.png", "history_FD001.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "needs at least 2 seeds" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gabba"], "no weighting 'gabba'. Did you mean 'gaba'? There are: "),
        (["--methods", "gaba:betta=1"], "'betta=1' is no option of gaba"),
        (["--seeds", "0"], "seeds=0 must be at least 1"),
    ],
)
def test_compare_says_what_is_wrong(arguments, message, capsys, tmp_path):
    assert run("compare", "--out", tmp_path, *arguments) == 1
    assert message in capsys.readouterr().err
