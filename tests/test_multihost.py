"""docs/multihost.py as two processes with gloo: one run, also after one of them was killed."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "docs" / "multihost.py"
PAGE = SCRIPT.with_name("meshes.md").read_text()
HEARTBEAT = int(re.search(r"heartbeat timeout, (\d+) s", PAGE)[1])  # seconds
BUSY, TIMEOUT = 20, 240  # seconds more, and to finish: a busy machine is no failure
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "XLA_FLAGS": "",  # one device each
}


def start(directory, processes, steps, log):
    """The processes, their output in ``log``-0 and so on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for i in range(processes):
        command = [sys.executable, SCRIPT, directory, "--coordinator", address]
        command += ["--processes", str(processes), "--process", str(i), "--steps", str(steps)]
        with open(f"{log}-{i}", "w") as out:
            started.append(
                subprocess.Popen(
                    command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT, text=True
                )
            )
    return started


def finish(directory, processes, steps, log):
    """What each process printed at its end."""
    started = start(directory, processes, steps, log)
    printed = []
    for i, process in enumerate(started):
        process.wait(TIMEOUT)
        text = pathlib.Path(f"{log}-{i}").read_text()
        assert process.returncode == 0, text
        printed.append(json.loads(text.splitlines()[-1]))
    return printed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return finish(folder / "run", 2, 100, folder / "log")


@pytest.mark.slow
def test_two_processes_hold_the_same_weights_and_those_of_one(undisturbed, tmp_path):
    first, second = undisturbed
    assert first == second
    (alone,) = finish(tmp_path / "run", 1, 100, tmp_path / "log")
    assert alone["task_weights"] == pytest.approx(first["task_weights"], rel=1e-5)
    assert alone["checksum"] == pytest.approx(first["checksum"], rel=1e-5)
    assert first["task_weights"][1] > 0.9  # they did balance


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_both_resume(undisturbed, tmp_path, killed):
    run = tmp_path / "run"
    processes = start(run, 2, 10_000, tmp_path / "first")
    deadline = time.monotonic() + TIMEOUT
    while not (run / "40").is_dir():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[killed].send_signal(signal.SIGKILL)
    assert processes[1 - killed].wait(HEARTBEAT + BUSY) != 0
    assert processes[killed].wait(TIMEOUT) == -signal.SIGKILL
    last = max(int(path.name) for path in run.iterdir() if path.name.isdigit())
    steps = max(100, last + 21)
    first, second = finish(run, 2, steps, tmp_path / "second")
    assert first == second
    assert first["resumed_at"] == last + 1
    if steps == 100:
        assert first["task_weights"] == undisturbed[0]["task_weights"]
        assert first["checksum"] == undisturbed[0]["checksum"]


def test_a_batch_that_the_devices_cannot_share(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "JAX_NUM_CPU_DEVICES", "3")
    (process,) = start(tmp_path / "run", 1, 10, tmp_path / "log")
    assert process.wait(TIMEOUT) == 1
    last = pathlib.Path(f"{tmp_path / 'log'}-0").read_text().splitlines()[-1]
    assert last.startswith("ValueError: BATCH=32 must be a multiple")
    assert last.endswith("there are 3, on 1 processes.")
