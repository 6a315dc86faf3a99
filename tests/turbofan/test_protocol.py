"""The protocol of a run: schedule, clipping, averaging, where it ends, what is measured."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gaba_jax.turbofan import simulator
from gaba_jax.turbofan import train as training
from gaba_jax.turbofan._loop import make_model, make_optimizer, split_model
from gaba_jax.turbofan.checkpoints import Checkpoints, Stopped, restore
from gaba_jax.turbofan.data import prepare
from gaba_jax.turbofan.train import GabaOptions, TrainConfig, make_weighting, train
from tests.runs import after, assert_same_run
from tests.slow import rest_slow

pytestmark = pytest.mark.usefixtures("compiled_quickly", "compiled_once")
PLAIN = TrainConfig(
    epochs=4, batch_size=16, learning_rate=5e-3, gaba=GabaOptions(warmup_steps=2, beta=0.9)
)
EVERYTHING = dataclasses.replace(
    PLAIN,
    epochs=60,
    schedule="plateau",
    plateau_patience=1,
    warmup_epochs=1.4,  # 7 updates
    clip_norm=1.0,
    average_decay=0.8,
    early_stopping=3,
)
STEPS = 5


@pytest.fixture(scope="module")
def data():
    """80 training windows of 5 engines, one engine for validation, 12 to test."""
    found = prepare(simulator.simulate(num_train=6, num_test=12, seed=0), stride=12)
    assert len(found.train.rul) // PLAIN.batch_size == STEPS
    return found


def first(tree):
    """Of the first seed."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def program_of(config, data):
    shape = data.train.windows.shape
    return training.make_program(config, training.make_weighting(config), shape, STEPS)


def orders_of(config, data, epoch):
    key = jax.random.fold_in(jax.random.key(config.seed), epoch)
    return jax.random.permutation(key, len(data.train.rul))[None, : STEPS * config.batch_size]


def one_update(config, data, carries, epoch=1, i=0):
    keys = jax.random.key(config.seed)[None]
    orders = orders_of(config, data, epoch)
    run = program_of(config, data).train_chunk
    return run(carries, keys, orders, epoch, i, i + 1, data.train)


def rmse(predicted, true):
    return float(np.sqrt(np.mean((np.asarray(predicted, np.float64) - true) ** 2)))


@pytest.fixture(scope="module")
def whole(data):
    """The run with everything on that nobody disturbs."""
    return train(data, EVERYTHING)


@pytest.fixture(scope="module")
def replayed(data, whole):
    """That run again, by its program and without its loop.

    The parameters after each update, what is evaluated after each epoch, its validation RMSE, and
    the scale of the plateau in each epoch.
    """
    program = program_of(EVERYTHING, data)
    carries = program.init((EVERYTHING.seed,))
    params, evaluated, errors, scales = [], [], [], []
    for epoch in range(1, len(whole.records) + 1):
        scales.append(float(carries.plateau.scale[0]))
        for i in range(STEPS):
            carries, _ = one_update(EVERYTHING, data, carries, epoch, i)
            params.append(first(carries.params))
        evaluated.append(program.evaluated(carries))
        rul, _ = program.predict(evaluated[-1], data.validation.windows)
        errors.append(rmse(rul[0], data.validation.rul))
        carries = program.end_epoch(carries, jnp.array(errors[-1:], jnp.float32))
    return params, evaluated, errors, scales


# The learning rate.


@pytest.mark.parametrize("schedule", ["cosine", "constant", "plateau"])
@pytest.mark.parametrize("warmup_epochs", [0.0, 0.5, 2.0])
def test_schedule(schedule, warmup_epochs):
    """From the updates of SGD with momentum for a gradient of ones."""
    config = dataclasses.replace(
        PLAIN, optimizer="sgd", learning_rate=0.3, schedule=schedule, warmup_epochs=warmup_epochs
    )
    total, warmup = config.epochs * 10, int(10 * warmup_epochs)
    tx = make_optimizer(config, 10)

    def step(state, _):
        update, state = tx.update(jnp.ones([]), state)
        return state, update

    _, updates = jax.lax.scan(step, tx.init(jnp.ones([])), length=total)
    count = np.arange(total)
    momentum = (1 - 0.9 ** (count + 1)) / (1 - 0.9)
    expected = np.full(total, 0.3)
    if schedule == "cosine":
        expected *= 0.5 * (1 + np.cos(np.pi * (count - warmup) / (total - warmup)))
    expected[:warmup] = 0.3 * count[:warmup] / max(warmup, 1)
    np.testing.assert_allclose(-updates / momentum, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("patience", "errors", "scales"),
    [
        (1, [5.0, 5.0, 5.0, 5.0], [1.0, 0.5, 0.25, 0.125]),
        (1, [5.0, 6.0, 4.0, 4.5, 3.0], [1.0, 0.5, 0.5, 0.25, 0.25]),
        (2, [5.0, 6.0, 7.0, 4.0, 5.0, np.inf, 5.0], [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]),
    ],
)
def test_plateau_halves_the_scale(patience, errors, scales, data):
    config = dataclasses.replace(EVERYTHING, plateau_patience=patience)
    program = program_of(config, data)
    carries, found = program.init((0,)), []
    for error in errors:
        carries = program.end_epoch(carries, jnp.array([error], jnp.float32))
        found.append(float(carries.plateau.scale[0]))
    assert found == scales


@pytest.mark.slow
def test_a_learning_rate_that_changes_nothing_is_halved_each_epoch(data, tmp_path):
    config = dataclasses.replace(
        PLAIN, schedule="plateau", plateau_patience=1, learning_rate=1e-12, weight_decay=0.0
    )
    run = train(data, config, checkpoints=Checkpoints(tmp_path, 1000))
    assert len({record.scalars["validation/rmse"] for record in run.records}) == 1
    target = {"plateau": first(program_of(config, data).init((0,)).plateau)}
    assert restore(tmp_path, target)["plateau"].scale == 0.125


@pytest.mark.slow
def test_updates_scale_with_the_plateau(data):
    """An update from the same state, with the scale at 1 and after a stall at 0.5."""
    program = program_of(EVERYTHING, data)
    carries = program.init((0,))
    for i in range(3):  # past the start of the warm-up, where the learning rate is 0
        carries, _ = one_update(EVERYTHING, data, carries, 1, i)
    stalled = carries
    for error in (5.0, 5.0):
        stalled = program.end_epoch(stalled, jnp.array([error], jnp.float32))
    moved = [
        jax.tree.map(
            lambda after, before: np.asarray(after - before, np.float64),
            one_update(EVERYTHING, data, start, 1, 3)[0].params,
            carries.params,
        )
        for start in (carries, stalled)
    ]
    full, half = (np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in moved)
    assert np.abs(full).max() > 1e-3
    np.testing.assert_allclose(half, 0.5 * full, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_warm_up_and_plateau_in_a_run(whole, replayed):
    params, _, errors, scales = replayed
    start = split_model(make_model(EVERYTHING, 30, 17, EVERYTHING.seed))[1]
    jax.tree.map(np.testing.assert_array_equal, params[0], start)  # the first rate is 0
    best, expected, scale = np.inf, [], 1.0
    for error in errors:
        expected.append(scale)
        if not error < (1 - 1e-4) * best:
            scale /= 2
        best = min(best, error)
    assert scales == expected
    assert scales[-1] < 1


# Clipping.


@pytest.mark.slow
def test_the_balanced_gradient_is_clipped_and_not_what_is_measured(data):
    """The first update of SGD is the learning rate times the gradient."""
    free = dataclasses.replace(PLAIN, optimizer="sgd", learning_rate=1e-2)
    clipped = dataclasses.replace(free, clip_norm=3.0)
    moves, records = [], []
    for config in (free, clipped):
        start = program_of(config, data).init((0,))
        carries, record = one_update(config, data, start)
        moved = jax.tree.map(lambda a, b: np.asarray(a - b), carries.params, start.params)
        moves.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(moved)]))
        records.append(record)
    jax.tree.map(np.testing.assert_array_equal, *records)
    norm = np.linalg.norm(moves[0]) / free.learning_rate
    assert norm > 30
    assert np.linalg.norm(moves[1]) == pytest.approx(1e-2 * 3.0, rel=1e-4)
    np.testing.assert_allclose(moves[1], moves[0] * 3.0 / norm, rtol=1e-3, atol=1e-7)


# The average of the model.


@pytest.mark.slow
def test_the_average_is_evaluated(data, whole, replayed):
    """The debiased exponential average of the parameters after each update."""
    params, evaluated, errors, _ = replayed
    decay = EVERYTHING.average_decay
    for epoch in (1, len(errors)):
        count = epoch * STEPS
        weights = (1 - decay) * decay ** np.arange(count)[::-1] / (1 - decay**count)
        each = zip(*map(jax.tree.leaves, params[:count]), strict=True)
        found = jax.tree.leaves(first(evaluated[epoch - 1][0]))
        for leaf, updates in zip(found, each, strict=True):
            expected = np.tensordot(weights, np.stack(updates), 1)
            np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6)
    scores = [record.scalars["validation/rmse"] for record in whole.records]
    np.testing.assert_allclose(scores, errors, rtol=1e-5)
    graph = split_model(make_model(EVERYTHING, 30, 17, 0))[0]
    last, _ = nnx.merge(graph, params[-1])(jnp.asarray(data.validation.windows))
    assert abs(rmse(last, data.validation.rul) - scores[-1]) > 1e-3


# Where a run ends.


@pytest.mark.slow
def test_early_stopping_ends_with_the_best(whole, replayed):
    scores = [record.scalars["validation/rmse"] for record in whole.records]
    best = int(np.argmin(scores)) + 1
    assert whole.summary["ended"] == "early stopping"
    assert whole.summary["epochs"] == len(scores) == best + 3 < EVERYTHING.epochs
    assert whole.summary["evaluated_epoch"] == best
    assert whole.summary["validation"]["rmse"] == scores[best - 1]
    running = np.minimum.accumulate(scores)
    since = [epoch - int(np.argmax(scores == running[epoch])) for epoch in range(len(scores))]
    assert max(since[:-1]) < 3  # no earlier end was due
    params, stats = first(replayed[1][best - 1])
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.stats), (params, stats))


def test_runs_side_by_side_do_not_stop_early(data):
    with pytest.raises(ValueError, match="early_stopping=3: runs side by side end together"):
        training.train_seeds(data, EVERYTHING, make_weighting(EVERYTHING), [0, 1])


@pytest.fixture
def a_minute_each(monkeypatch):
    """A clock by which every epoch takes a minute, and nothing else takes any time."""
    clock, make_program = [0.0], training.make_program

    def make_timed(*arguments):
        program = make_program(*arguments)

        def train_chunk(carries, keys, orders, epoch, start, stop, split):
            clock[0] += 60.0 * (stop - start) / STEPS
            return program.train_chunk(carries, keys, orders, epoch, start, stop, split)

        return program._replace(train_chunk=train_chunk)

    monkeypatch.setattr(training, "make_program", make_timed)
    monkeypatch.setattr(training, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))


@pytest.mark.slow
@pytest.mark.usefixtures("a_minute_each")
@pytest.mark.parametrize(
    ("minutes", "epochs", "ended"),
    [(1e-9, 0, "budget"), (2.9, 2, "budget"), (3.1, 3, "budget"), (4.1, 4, "all epochs")],
)
def test_a_budget_ends_a_run_in_time_also_within_an_epoch(minutes, epochs, ended, data):
    run = train(data, PLAIN, budget=minutes)
    updates = run.summary["updates"]
    assert run.summary["ended"] == ended
    assert run.summary["epochs"] == epochs == updates // STEPS
    assert updates == sum(len(record.losses) for record in run.records)
    assert len(run.records) == run.summary["evaluated_epoch"] == -(-updates // STEPS)
    if ended == "budget":
        assert updates == max(1, int(minutes * STEPS))
    assert run.summary["validation"]["rmse"] == run.records[-1].scalars["validation/rmse"]


@pytest.mark.usefixtures("a_minute_each")
def test_a_budget_leaves_the_best_so_far(data, whole):
    best = whole.summary["evaluated_epoch"]
    run = train(data, EVERYTHING, budget=best + 1.5)
    assert run.summary["ended"] == "budget"
    assert (run.summary["epochs"], run.summary["evaluated_epoch"]) == (best + 1, best)
    assert run.summary["updates"] == int((best + 1.5) * STEPS)
    jax.tree.map(np.testing.assert_array_equal, run.params, whole.params)


ONE_OF_THEM = rest_slow([PLAIN, EVERYTHING], fast=[EVERYTHING])


@pytest.mark.parametrize("config", ONE_OF_THEM, ids=["plain", "everything"])
def test_after_a_budget_it_can_go_on(config, data, tmp_path):
    short = train(data, config, checkpoints=Checkpoints(tmp_path, 1000), budget=1e-9)
    assert (short.summary["ended"], short.summary["updates"]) == ("budget", 1)
    seen = []
    folder = Checkpoints(tmp_path, 1000, resume=True, on_resume=seen.append)
    assert_same_run(train(data, config, checkpoints=folder), train(data, config))
    assert seen == [1]


@pytest.mark.parametrize("budget", [0, -1.0, float("nan")])
def test_a_budget_is_positive(budget, data):
    with pytest.raises(ValueError, match=f"budget={budget} must be positive, in minutes"):
        train(data, PLAIN, budget=budget)


@pytest.mark.slow
@pytest.mark.parametrize("epoch", ["the first", "after the best"])
def test_resumed_within_an_epoch_it_is_the_same_run(epoch, data, whole, tmp_path):
    """Stopped after two updates of that epoch."""
    finished = 0 if epoch == "the first" else whole.summary["evaluated_epoch"]
    every = finished * STEPS + 2
    with pytest.raises(Stopped, match=f"stopped after update {every} of"):
        train(data, EVERYTHING, checkpoints=Checkpoints(tmp_path, every, stop=after(finished + 1)))
    resumed = train(data, EVERYTHING, checkpoints=Checkpoints(tmp_path, 3, resume=True))
    assert_same_run(resumed, whole)
    again = train(data, EVERYTHING, checkpoints=Checkpoints(tmp_path, 3, resume=True))
    assert_same_run(again, whole)  # it is only evaluated


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_epochs": -0.5}, "warmup_epochs=-0.5 must be at least 0 and less than the 4"),
        ({"warmup_epochs": 4.0}, "warmup_epochs=4.0 must be at least 0 and less than the 4"),
        ({"plateau_patience": 0}, "plateau_patience=0 must be at least 1"),
        ({"early_stopping": 0}, "early_stopping=0 must be at least 1"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be positive"),
        ({"clip_norm": float("nan")}, "clip_norm=nan must be positive"),
        ({"average_decay": 1.0}, r"average_decay=1.0 must be in \[0, 1\)"),
        ({"average_decay": -0.1}, r"average_decay=-0.1 must be in \[0, 1\)"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"measure": "stacked", "every": 2}, 'every=2 saves nothing with measure="stacked"'),
        ({"schedule": "cosin"}, r"schedule='cosin' must be one of \('cosine', 'plateau'"),
        ({"model": "compct"}, r"model='compct' must be one of \('compact', 'full'\)"),
        ({"weighting": "gabba"}, r"no weighting 'gabba'. Did you mean 'gaba'\?"),
    ],
)
def test_wrong_values(changes, message, data):
    with pytest.raises(ValueError, match=message):
        train(data, dataclasses.replace(PLAIN, **changes))


# What is measured.


@pytest.fixture(scope="module")
def plain(data):
    return train(data, PLAIN)


def history(run, name):
    return np.concatenate([getattr(record, name) for record in run.records])


@pytest.mark.slow
def test_stacked_is_exact_within_rounding_and_encoder_another_run(data, plain):
    stacked, encoder = (
        train(data, dataclasses.replace(PLAIN, measure=measure))
        for measure in ("stacked", "encoder")
    )
    for name in ("losses", "task_norms", "task_weights"):
        np.testing.assert_allclose(history(stacked, name), history(plain, name), rtol=1e-3)
    np.testing.assert_allclose(stacked.predicted_rul, plain.predicted_rul, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(
        history(encoder, "losses")[0], history(plain, "losses")[0], rtol=1e-5
    )
    norms = history(encoder, "task_norms") / history(plain, "task_norms")
    assert (np.abs(norms - 1) > 0.01).all()
    assert (history(encoder, "task_weights")[-1] != history(plain, "task_weights")[-1]).all()
    assert np.isfinite(history(encoder, "losses")).all()


@pytest.mark.slow
def test_scores_of_all_test_windows_and_of_the_uncapped_rul(data, plain):
    graph = split_model(make_model(PLAIN, 30, 17, 0))[0]
    model = nnx.merge(graph, plain.params)
    on_all, logits = model(jnp.asarray(data.test_all.windows))
    expected = {
        "test": rmse(plain.predicted_rul, data.test.rul),
        "test_uncapped": rmse(plain.predicted_rul, data.test.rul_uncapped),
        "test_all_windows": rmse(on_all, data.test_all.rul),
        "test_all_windows_uncapped": rmse(on_all, data.test_all.rul_uncapped),
    }
    found = {name: plain.summary[name]["rmse"] for name in expected}
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(found.values())) == 4
    right = (np.argmax(logits, axis=1) == data.test_all.health).mean()
    for name in ("test_all_windows", "test_all_windows_uncapped"):
        assert plain.summary[name]["health_accuracy"] == pytest.approx(right)
    without = train(dataclasses.replace(data, test_all=None), PLAIN).summary
    assert {**without, "timing": 0} == {
        name: value if name != "timing" else 0
        for name, value in plain.summary.items()
        if not name.startswith("test_all")
    }


@pytest.mark.parametrize("stride", [1, 7])
def test_all_test_windows_count_down_to_the_last(stride):
    fleet = simulator.simulate(num_train=3, num_test=4, seed=1)
    found = prepare(fleet, stride=stride)
    ends = np.flatnonzero(np.diff(found.test_all.engine, append=-1))
    for name, last in zip(found.test._fields, found.test, strict=True):
        np.testing.assert_array_equal(getattr(found.test_all, name)[ends], last)
    np.testing.assert_array_equal(found.test_all.rul_uncapped[ends], fleet.test_rul)
    for engine, at_end in zip(found.test.engine, fleet.test_rul, strict=True):
        left = found.test_all.rul_uncapped[found.test_all.engine == engine]
        life = (fleet.test[:, 0] == engine).sum()
        assert len(left) == -(-life // stride)
        np.testing.assert_array_equal(left, at_end + stride * np.arange(len(left))[::-1])
    np.testing.assert_array_equal(found.test_all.rul, np.minimum(found.test_all.rul_uncapped, 125))
