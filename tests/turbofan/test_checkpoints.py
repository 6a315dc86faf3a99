"""Checkpoints of a run: whole, exact, refused where they belong to another run."""

import dataclasses
import gc
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gaba_jax import balanced_value_and_grad, cli
from gaba_jax.turbofan import checkpoints, losses
from gaba_jax.turbofan import train as training
from gaba_jax.turbofan._loop import make_optimizer
from gaba_jax.turbofan.checkpoints import Checkpoints, Stopped, latest_step, restore
from gaba_jax.turbofan.data import Normalization, Split, TurbofanData
from gaba_jax.turbofan.model import CompactModel
from gaba_jax.turbofan.train import GabaOptions, TrainConfig, load_data, make_weighting, train
from tests.runs import after, assert_same_run
from tests.slow import rest_slow
from tests.soak import SOAK

pytestmark = pytest.mark.usefixtures("compiled_once")
FIXTURE = pathlib.Path(__file__).parents[1] / "golden" / "checkpoint_0_1_0"
TINY = TrainConfig(epochs=2, batch_size=4, gaba=GabaOptions(warmup_steps=1, beta=0.5))
KILLS = 20 if SOAK else 5
EVERY = 7
EPOCHS = 3 * KILLS
CONFIG = TrainConfig(epochs=EPOCHS, stride=20, batch_size=32, gaba=GabaOptions(warmup_steps=0))
COMMAND = ["train", "--epochs", f"{EPOCHS}", "--stride", "20", "--batch-size", "32"]
COMMAND += ["--warmup-steps", "0"]  # as in CONFIG


def tiny_data():
    """12 windows of 4 cycles and 2 channels; whole numbers and one division, so exact anywhere."""

    def split(start, count):
        number = np.arange(start, start + count)
        windows = (number[:, None] * 8 + np.arange(8)) * 7919 % 1000
        rul = (number * 37 % 125).astype(np.float32)
        return Split(
            windows=(windows.reshape(-1, 4, 2).astype(np.float32) - 500) / 500,
            rul=rul,
            health=((rul <= 80).astype(np.int32) + (rul <= 30)).astype(np.int32),
            engine=number.astype(np.int32),
            rul_uncapped=rul,
        )

    unused = Normalization(*(np.zeros(1) for _ in Normalization._fields))
    return TurbofanData(split(0, 12), split(12, 6), split(18, 6), ("a", "b"), unused)


def state_of(config, window, channels, num_tasks=2):
    """What a run of this configuration saves: shapes and names, the values are those of a start."""
    params = nnx.state(CompactModel(window, channels, rngs=nnx.Rngs(1)), nnx.Param)
    rule = make_weighting(config) if num_tasks == 2 else training.weighting.gaba(num_tasks)
    balance = balanced_value_and_grad(lambda params: (0.0,) * num_tasks, rule).init(params)
    optimizer = make_optimizer(config, 5).init(params)
    return {"params": params, "balance": balance, "optimizer": optimizer}


def read_params(out):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((out / "params").absolute())


def assert_same_folders(out, other):
    """Bitwise the same parameters, the same metrics, the same summary but for the timing."""
    jax.tree.map(np.testing.assert_array_equal, read_params(out), read_params(other))
    assert (out / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (out, other))
    assert {**one, "timing": 0} == {**two, "timing": 0}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the run that nobody disturbs, without checkpoints."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert cli.main([*COMMAND, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder of the same run, stopped after 3 chunks: updates 7 and 14, with an epoch's end."""
    out = tmp_path_factory.mktemp("stopped")
    folder = Checkpoints(out / "checkpoints", EVERY, stop=after(3))
    with pytest.raises(Stopped, match="stopped after update 14 of"):
        train(load_data(CONFIG), CONFIG, checkpoints=folder)
    return out


@pytest.fixture
def started(alone, tmp_path):
    """Starts the command in a process of its own, with a copy of the compiled programs.

    A process that is killed may leave half a file there, which must not meet other tests.
    """
    del alone  # has compiled them
    cache = jax.config.jax_compilation_cache_dir
    shutil.copytree(cache, tmp_path / "xla")
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    processes = []

    def start(*arguments, before="pass"):
        program = f"import sys\n{before}\nfrom gaba_jax.cli import main\nsys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def complete(folder):
    """The checkpoints that are there, by name."""
    return {int(path.name) for path in folder.glob("*") if path.name.isdigit()}


def finish(out):
    """Goes on to the end in this process, with another number of updates between checkpoints."""
    more = ["--out", str(out), "--checkpoint-every", "1000000", "--resume"]
    assert cli.main([*COMMAND, *more]) == 0


def updates_of(out):
    return json.loads((out / "summary.json").read_text())["updates"]


def wait_for(condition, process):
    deadline = time.monotonic() + 240
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"weighting": "random", "gaba": GabaOptions()},
        pytest.param(
            {"optimizer": "sgd", "learning_rate": 1e-4, "measure": "lagged", "nonfinite": "drop"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_chunks_and_a_resume_leave_the_numbers(changes, tmp_path):
    config = dataclasses.replace(TINY, **changes)
    data = tiny_data()
    whole = train(data, config)
    seen = []
    with pytest.raises(Stopped):
        train(data, config, checkpoints=Checkpoints(tmp_path, 2, stop=after(3)))  # 2, 3, 4
    folder = Checkpoints(tmp_path, 1, resume=True, on_resume=seen.append)
    epochs = []
    resumed = train(data, config, lambda record: epochs.append(record.epoch), folder)
    assert_same_run(whole, resumed)
    assert (seen, epochs) == ([4], [1, 2])  # the epoch before is told again
    assert complete(tmp_path) == {5, 6}


@pytest.mark.slow
def test_the_end_is_saved_and_a_finished_run_only_evaluated(tmp_path):
    with pytest.raises(Stopped, match="after update 6 of 6"):
        train(tiny_data(), TINY, checkpoints=Checkpoints(tmp_path, 100, stop=after(2)))
    assert complete(tmp_path) == {6}
    finished = train(tiny_data(), TINY, checkpoints=Checkpoints(tmp_path, 100, resume=True))
    assert_same_run(train(tiny_data(), TINY), finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer was 'adamw' and is 'sgd'"),
        ({"epochs": 3}, "epochs was 2 and is 3"),
        ({"gaba": GabaOptions()}, "gaba.beta was 0.5 and is 0.99; gaba.warmup_steps was 1 and is"),
        ({"seed": 1, "stride": 2}, "seed was 0 and is 1; stride was 1 and is 2"),
    ],
)
def test_another_configuration_is_refused(changes, message, tmp_path):
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "c")
    config = dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match=f"is of another run: {message}"):
        train(tiny_data(), config, checkpoints=Checkpoints(tmp_path / "c", 2, resume=True))


@pytest.mark.parametrize("tasks", [("rul", "faults"), ("rul", "health", "wear")])
def test_another_task_or_number_of_tasks_is_refused(tasks, monkeypatch, tmp_path):
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "c")
    monkeypatch.setattr(training, "TASKS", tasks)
    with pytest.raises(ValueError, match=r"tasks was \['rul', 'health'\] and is \['rul', '.*'\]"):
        train(tiny_data(), TINY, checkpoints=Checkpoints(tmp_path / "c", 2, resume=True))


def test_other_data_is_refused_and_another_folder_of_it_is_not(tmp_path):
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "c")
    folder = Checkpoints(tmp_path / "c", 2, resume=True)
    data = tiny_data()
    moved = dataclasses.replace(TINY, data=pathlib.Path("elsewhere"))
    data.train.windows[3, 2, 1] += 1
    with pytest.raises(ValueError, match="data was '12 training windows, sha256"):
        train(data, moved, checkpoints=folder)
    assert len(train(tiny_data(), moved, checkpoints=folder).records) == 2


def test_a_run_is_not_replaced_unasked(tmp_path):
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "c")
    with pytest.raises(FileExistsError, match=r"saved after update 4\. Resume it"):
        train(tiny_data(), TINY, checkpoints=Checkpoints(tmp_path / "c", 2))


def test_every_is_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every=0 must be at least 1"):
        Checkpoints(tmp_path, 0)


def test_version_0_1_0_loads():
    state = restore(FIXTURE / "checkpoints", state_of(TINY, 4, 2))
    with np.load(FIXTURE / "expected.npz") as arrays:
        expected = {n: arrays[n] for n in arrays if n.partition(".")[0] in state}
    found = checkpoints._by_name(state)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert int(state["balance"].weighting_state.stabilize_step) == 4


def test_version_0_1_0_goes_on(tmp_path):
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "c")
    steps = []
    folder = Checkpoints(tmp_path / "c", 2, resume=True, on_resume=steps.append)
    run = train(tiny_data(), TINY, checkpoints=folder)
    assert steps == [4]
    assert [record.epoch for record in run.records] == [1, 2]
    assert complete(tmp_path / "c") == {4, 6}
    with np.load(FIXTURE / "expected.npz") as expected:
        for name in ("losses", "task_norms", "task_weights"):
            history = np.concatenate([getattr(record, name) for record in run.records])
            np.testing.assert_array_equal(history[:4], expected[f"history.{name}"])
            assert np.isfinite(history).all()
        order = expected["order"]
    assert sorted(order) == list(range(12))


def test_a_field_that_an_old_checkpoint_does_not_know_had_its_default(tmp_path):
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "c")
    file = tmp_path / "c" / "4" / "run" / "metadata"
    kept = json.loads(file.read_text())
    del kept["run"]["every"]
    file.write_text(json.dumps(kept))
    folder = Checkpoints(tmp_path / "c", 2, resume=True)
    with pytest.raises(ValueError, match=r"another run: every was 1 and is 2\. Go on"):
        train(tiny_data(), dataclasses.replace(TINY, every=2), checkpoints=folder)
    assert len(train(tiny_data(), TINY, checkpoints=folder).records) == 2


def test_a_later_format_says_to_upgrade(tmp_path):
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "c")
    file = tmp_path / "c" / "4" / "run" / "metadata"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"format": checkpoints.FORMAT + 1, "version": "9.0"}))
    with pytest.raises(ValueError, match=r"format 2, written by gaba_jax 9\.0.*git pull"):
        restore(tmp_path / "c", state_of(TINY, 4, 2))


@pytest.mark.parametrize("lost", ["arrays/_METADATA", "run/metadata"])
def test_a_damaged_checkpoint_names_its_folder(lost, tmp_path):
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "c")
    (tmp_path / "c" / "4" / lost).unlink()
    with pytest.raises(ValueError, match=r"c/4 cannot be read \(.*\)\. If it is dam") as said:
        restore(tmp_path / "c", state_of(TINY, 4, 2))
    assert "\n" not in str(said.value)


ABOUT = json.loads((FIXTURE / "checkpoints" / "4" / "run" / "metadata").read_text())
FILES = sorted(
    str(path.relative_to(FIXTURE / "checkpoints" / "4"))
    for path in (FIXTURE / "checkpoints" / "4").rglob("*")
    if path.is_file()
)


def refusal_of(folder, capfd):
    """The message of a resume that fails, None of one that does not; nothing else is printed."""
    try:
        Checkpoints(folder, 100, resume=True).start(state_of(TINY, 4, 2), ABOUT["run"], {})
    except (ValueError, OSError) as error:
        said = str(error)
    else:
        said = None
    gc.collect()  # what orbax left of reads that it gave up, or that would fail a later test
    assert capfd.readouterr() == ("", "")
    assert "\n" not in (said or "")
    return said


WRONG = [
    {"run": []},
    {"scalars": []},
    {"scalars": [1]},
    {"format": "x"},
    {"rng_impl": 5},
    {"seconds": None},
    {"elapsed": "long"},
    {},
]


@pytest.mark.parametrize("wrong", rest_slow(WRONG, fast=WRONG[:2]), ids=str)
def test_a_checkpoint_whose_json_is_wrong_is_refused_in_one_line(wrong, tmp_path, capfd):
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "c")
    about = ABOUT | wrong if wrong else {}
    (tmp_path / "c" / "4" / "run" / "metadata").write_text(json.dumps(about))
    assert "c/4 cannot be read (" in refusal_of(tmp_path / "c", capfd)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's own
@pytest.mark.parametrize("damage", ["lost", "empty", "half", "noise"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_in_one_line_or_not_needed(name, damage, tmp_path, capfd):
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "c")
    path = tmp_path / "c" / "4" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "lost":
        changed = {"empty": b"", "half": content[: len(content) // 2], "noise": b"\x93\x00?" * 20}
        path.write_bytes(changed[damage])
    said = refusal_of(tmp_path / "c", capfd)
    if name in ("arrays/_METADATA", "run/metadata", "arrays/manifest.ocdbt"):
        assert "c/4 cannot be read (" in said


def test_a_file_in_place_of_the_folder_is_named(tmp_path, capfd):
    (tmp_path / "c").write_text("")
    assert "c is a file, and no folder of checkpoints" in refusal_of(tmp_path / "c", capfd)


def test_a_sharding_that_does_not_fit_is_no_damage():
    mesh = jax.sharding.AbstractMesh((3,), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    target = jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread) if leaf.ndim else leaf
        ),
        state_of(TINY, 4, 2)["params"],
    )
    with pytest.raises(ValueError, match="partitioned 3 times, but the dimension size is"):
        restore(FIXTURE / "checkpoints", {"params": target})


@pytest.mark.parametrize(
    ("changes", "num_tasks", "message"),
    [
        ({}, 3, r"balance.task_weights is float32\[2\] and should be float32\[3\]"),
        ({"optimizer": "sgd"}, 2, r"optimizer.0.count is int32\[\] and should be absent"),
    ],
)
def test_another_state_is_refused_by_name(changes, num_tasks, message):
    target = state_of(dataclasses.replace(TINY, **changes), 4, 2, num_tasks)
    with pytest.raises(ValueError, match=message):
        restore(FIXTURE / "checkpoints", target)
    params = {"params": target["params"]}
    assert jax.tree.structure(restore(FIXTURE / "checkpoints", params)) == jax.tree.structure(
        params
    )


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint; the last is None"):
        restore(tmp_path / "nowhere", {})
    with pytest.raises(FileNotFoundError, match="no checkpoint after update 3; the last is 4"):
        restore(FIXTURE / "checkpoints", {}, step=3)


def one_more_update(file, sharded):
    """Goes on from the fixture by one update; writes all leaves of the state."""
    target = state_of(TINY, 4, 2)
    data = tiny_data().train
    batch = (data.windows[:8], data.rul[:8], data.health[:8])
    if sharded:
        assert jax.device_count() == 8
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

        def over_devices(leaf):
            split = leaf.ndim > 0 and leaf.shape[0] % 8 == 0
            spec = PartitionSpec("fsdp") if split else PartitionSpec()
            sharding = NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        target = jax.tree.map(over_devices, target)
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("fsdp")))
    state = restore(FIXTURE / "checkpoints", target)
    if sharded:
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
            assert leaf.sharding == wanted.sharding
        kernel = state["params"]["backbone"]["dense_0"]["kernel"][...]
        assert kernel.addressable_shards[0].data.shape == (8, 64)
    graph, _ = nnx.split(CompactModel(4, 2, rngs=nnx.Rngs(1)), nnx.Param)

    def losses_fn(params, windows, rul, health):
        predicted, logits = nnx.merge(graph, params)(windows)
        return losses.mean_squared_error(predicted, rul), losses.cross_entropy(logits, health)

    balanced = balanced_value_and_grad(losses_fn, make_weighting(TINY))
    tx = make_optimizer(TINY, 3)

    @jax.jit
    def update(state, batch):
        params = state["params"]
        (_, grads), balance = balanced.value_and_grad(params, state["balance"], *batch)
        updates, optimizer = tx.update(grads, state["optimizer"], params)
        params = optax.apply_updates(params, updates)
        return {"params": params, "balance": balance, "optimizer": optimizer}

    np.savez(file, **checkpoints._by_name(update(state, jax.tree.map(jnp.asarray, batch))))


@pytest.mark.slow
def test_restored_onto_eight_devices_it_trains_on_within_1e_6(tmp_path):
    one_more_update(tmp_path / "one.npz", sharded=False)
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_checkpoints as test\n"
    program += "test.one_more_update(sys.argv[2], sharded=True)"
    here, file = pathlib.Path(__file__).parent, tmp_path / "eight.npz"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment = os.environ | flags
    subprocess.run([sys.executable, "-c", program, here, file], env=environment, check=True)
    with np.load(tmp_path / "one.npz") as one, np.load(file) as eight:
        assert set(one) == set(eight)
        for name in one:
            np.testing.assert_allclose(one[name], eight[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_killed_at_any_moment_it_loses_at_most_n_updates(alone, started, tmp_path):
    out = tmp_path / "run"
    folder = out / "checkpoints"
    random = np.random.default_rng(None if KILLS > 5 else 0)
    arguments = [*COMMAND, "--out", out, "--checkpoint-every", EVERY, "--resume"]
    target = state_of(CONFIG, 30, 17)
    steps = updates_of(alone) // EPOCHS
    for kill in range(KILLS):
        last = max(complete(folder), default=0)
        process = started(*arguments)
        if kill > 0:  # the first time at any moment of the start
            awaited = last + EVERY * random.integers(0, 3)
            wait_for(lambda awaited=awaited: max(complete(folder), default=0) > awaited, process)
        time.sleep(random.uniform(0, 0.3 if kill else 3))
        process.kill()
        told, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert (f"Going on after update {last}\n" in told) == (kill > 0 and last > 0)
        assert max(complete(folder), default=0) >= last
        if complete(folder):
            assert latest_step(folder) == max(complete(folder))
            restore(folder, target)
        metrics = out / "metrics.jsonl"
        epochs = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        assert max(complete(folder), default=0) >= epochs * steps - EVERY
    finish(out)
    assert_same_folders(alone, out)


@pytest.mark.slow
def test_a_signal_is_served_at_the_end_of_a_chunk(alone, started, tmp_path):
    out = tmp_path / "run"
    folder = out / "checkpoints"
    arguments = [*COMMAND, "--out", out, "--checkpoint-every", EVERY]
    for number, more in [(signal.SIGINT, []), (signal.SIGTERM, ["--resume"])]:
        before = max(complete(folder), default=0)
        process = started(*arguments, *more)
        wait_for(lambda before=before: max(complete(folder), default=0) > before, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert errors.splitlines() == [
            f"gaba-jax: {number.name}: stopping at the next checkpoint",
            f"gaba-jax: stopped after update {latest_step(folder)} of {updates_of(alone)}, saved "
            f"in {out}. To go on, pass the same and --resume.",
        ]
        assert not (out / "summary.json").exists()
    finish(out)
    assert_same_folders(alone, out)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(started, tmp_path):
    arguments = ["--stride", 1, "--batch-size", 2, "--checkpoint-every", 10**6]
    process = started("train", *arguments, "--out", tmp_path / "run")
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopping at the next checkpoint" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (143, "")


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_checkpoint_before_is_intact(alone, stopped, started, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    arguments = [*COMMAND, "--out", out, "--checkpoint-every", EVERY, "--resume"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))"
    process = started(*arguments, before=limit)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1
    (line,) = (line for line in errors.splitlines() if line.startswith("gaba-jax"))
    assert line.startswith(
        f"gaba-jax: {out / 'checkpoints'}: no checkpoint could be written after update 21 ("
    )
    assert "File too large" in line
    assert line.endswith("Those before it are intact: make room there, and resume.")
    assert complete(out / "checkpoints") == {7, 14}
    finish(out)
    assert_same_folders(alone, out)
