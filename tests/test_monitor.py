"""balance_metrics: what it says and where it finds it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorboardX
from flax import nnx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gaba_jax import (
    balance,
    balance_metrics,
    balanced_value_and_grad,
    gaba,
    monitor,
    weighting,
)

GRADS = {"w": jnp.array([[3.0, 4.0], [0.0, 0.01]])}
PARAMS = {"w": jnp.zeros(2)}


def test_numbers():
    tx = optax.chain(gaba(beta=0.0, warmup_steps=0, min_weight=0.0), optax.adam(1e-3))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    metrics = jax.jit(lambda s: balance_metrics(s, ["rul", "health"]))(state)
    per_task = ("weight", "norm", "share", "contribution")
    assert set(metrics) == {
        *(f"{key}/{task}" for key in per_task for task in ("rul", "health")),
        "gradient_ratio",
        "imbalance",
        "nonfinite_count",
        "since_measured",
        "at_bound",
    }
    assert all(np.shape(value) == () for value in metrics.values())
    expected = {
        "weight/rul": 0.01 / 5.01,
        "norm/rul": 5.0,
        "share/health": 0.01 / 5.01,
        "contribution/health": 0.01 * 5 / 5.01,
        "gradient_ratio": 500.0,
        "imbalance": 1.0,
        "nonfinite_count": 0,
    }
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5)


@pytest.mark.parametrize(("second", "ratio"), [([0.0, 0.0], np.inf), ([3.0, 4.0], 1.0)])
def test_ratio_at_the_edges(second, ratio):
    tx = balance(weighting.inverse_share(2), shared=lambda p: jax.tree.map(lambda _: True, p))
    grads = {"w": jnp.array([[3.0, 4.0], second])}
    _, state = tx.update(grads, tx.init(PARAMS))
    assert balance_metrics(state)["gradient_ratio"] == ratio
    assert balance_metrics(tx.init(PARAMS))["gradient_ratio"] == 1  # nothing measured yet


def test_several_states_get_their_paths():
    states = {"a": balance(weighting.inverse_share(2)).init(PARAMS), "b": gaba(3).init(PARAMS)}
    metrics = balance_metrics(states)
    assert metrics["a/weight/1"] == 0.5
    np.testing.assert_allclose(metrics["b/weight/2"], 1 / 3)


def test_inside_nnx_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(gaba(), optax.sgd(1.0)), wrt=nnx.Param)
    assert balance_metrics(optimizer.opt_state)["weight/0"] == 0.5


@pytest.fixture
def of_three():
    """The state of a rule on the Gramian: the first two tasks agree, the third opposes both."""
    tx = balance(weighting.upgrad(3))
    grads = {"w": jnp.array([[3.0, 4.0], [4.0, 3.0], [-0.6, -0.8]])}
    return tx.update(grads, tx.init(PARAMS), PARAMS)[1]


NAMES = ["rul", "health", "wear"]


def test_cosines_and_conflicts_of_a_rule_on_the_gramian(of_three):
    metrics = balance_metrics(of_three, NAMES)
    found = {key: value for key, value in metrics.items() if key.startswith("cosine/")}
    expected = {"rul/health": 0.96, "rul/wear": -1.0, "health/wear": -0.96}
    assert set(found) == {f"cosine/{pair}" for pair in expected}
    for pair, value in expected.items():
        np.testing.assert_allclose(found[f"cosine/{pair}"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["conflict_rate"], 2 / 3, rtol=1e-6)
    tx = balance(weighting.upgrad(2))
    assert balance_metrics(tx.init(PARAMS))["conflict_rate"] == 0  # nothing measured yet


def random_tasks(seed, silent=()):
    """Gradients [K, n] in float64, and weights."""
    random = np.random.default_rng(seed)
    grads = random.normal(size=(4, 7)) * np.array([[30.0], [1.0], [0.2], [5.0]])
    grads[list(silent)] = 0
    return grads, random.uniform(-0.5, 1, size=4)


@pytest.mark.parametrize("silent", [(), (1,), (0, 1, 2), (0, 1, 2, 3)])
def test_alignment_and_promised_decreases(silent):
    """Against the gradients themselves; the loss of a quadratic falls by as much."""
    grads, weights = random_tasks(0, silent)
    norms = np.linalg.norm(grads, axis=1)
    known = norms > 0
    unit = grads / np.where(known, norms, 1)[:, None]
    cosines = np.where(np.eye(4) > 0, 1, unit @ unit.T)
    found = monitor.task_metrics(weights, norms, task_cosines=cosines)
    update = weights @ grads
    for i, gradient in enumerate(grads):
        np.testing.assert_allclose(found[f"decrease/{i}"], gradient @ update, rtol=1e-4, atol=1e-3)
    mean = unit[known].mean(axis=0) if known.any() else np.zeros(7)
    expected = 2 * mean @ mean - 1 if known.sum() > 1 else 1
    np.testing.assert_allclose(found["alignment"], expected, rtol=1e-4, atol=1e-6)


def test_a_small_step_keeps_the_promise():
    """To first order: a step of SGD against what the state said before it."""
    matrix = jnp.asarray(random_tasks(1)[0], jnp.float32)

    def losses_fn(p):
        return jnp.square(matrix @ p - 1)

    balanced = balanced_value_and_grad(losses_fn, weighting.upgrad(4), shared=True)
    params, rate = jnp.ones(7) / 3, 1e-5
    (losses, grads), state = balanced.value_and_grad(params, balanced.init(params))
    metrics = balance_metrics(state)
    fallen = (losses - losses_fn(params - rate * grads)) / rate
    promised = np.array([metrics[f"decrease/{i}"] for i in range(4)])
    np.testing.assert_allclose(fallen, promised, rtol=0.05, atol=0.02 * promised.max())
    assert (promised > 0).all()


@pytest.mark.parametrize(
    ("cosine", "expected"), [(1.0, 1.0), (0.0, 0.0), (-1.0, -1.0), (-0.3, -0.3)]
)
def test_alignment_of_two_is_their_cosine(cosine, expected):
    cosines = np.array([[1.0, cosine], [cosine, 1.0]])
    found = monitor.task_metrics(np.ones(2), np.array([3.0, 1e-3]), task_cosines=cosines)
    np.testing.assert_allclose(found["alignment"], expected, atol=1e-6)
    orthogonal = monitor.task_metrics(np.ones(5), np.ones(5), task_cosines=np.eye(5))
    np.testing.assert_allclose(orthogonal["alignment"], 2 / 5 - 1, rtol=1e-6)


@pytest.mark.parametrize("floor", ["renormalize", "project"])
def test_a_weight_at_its_floor(floor):
    options = {"beta": 0.0, "warmup_steps": 0, "min_weight": 0.05, "floor": floor}
    tx = gaba(**options)
    for second, expected in [([0.0, 0.01], 1), ([0.0, 4.0], 0)]:
        grads = {"w": jnp.array([[3.0, 4.0], second])}
        _, state = tx.update(grads, tx.init(PARAMS))
        assert balance_metrics(state, min_weight=0.05)["at_bound"] == expected
        assert balance_metrics(state)["at_bound"] == 0


def test_a_task_that_is_shut_off_and_one_that_is_absent():
    grads = {"w": jnp.array([[1.0, 0.0], [3.0, 0.1], [0.0, 1.0]])}
    tx = balance(weighting.mgda(3))
    _, state = tx.update(grads, tx.init(PARAMS))
    assert state.task_weights[1] == 0
    assert balance_metrics(state)["at_bound"] == 1
    tx = balance(weighting.inverse_norm(3))
    mask = jnp.array([True, False, True])
    _, state = tx.update(grads, tx.init(PARAMS), task_mask=mask)
    assert state.task_weights[1] == 0  # in this update, for want of the task
    assert balance_metrics(state)["at_bound"] == 0


def test_a_history_at_once(of_three):
    """task_metrics on [T, K] says of each update what balance_metrics says."""
    other = of_three._replace(
        task_weights=of_three.task_weights[::-1], task_norms=2 * of_three.task_norms
    )
    weights, norms, cosines = (
        jnp.stack([getattr(state, name) for state in (of_three, other)])
        for name in ("task_weights", "task_norms", "task_cosines")
    )
    curves = monitor.task_metrics(weights, norms, NAMES, task_cosines=cosines)
    for update, state in enumerate((of_three, other)):
        metrics = balance_metrics(state, NAMES)
        assert set(metrics) - set(curves) == {"nonfinite_count", "since_measured", "at_bound"}
        for key, curve in curves.items():
            assert curve.shape == (2,)
            np.testing.assert_allclose(curve[update], metrics[key], rtol=1e-6)


def test_tensorboardx_takes_them_and_tensorboard_reads_them(of_three, tmp_path):
    metrics = balance_metrics(of_three, NAMES)
    with tensorboardX.SummaryWriter(str(tmp_path)) as writer:
        for key, value in metrics.items():
            writer.add_scalar(key, value, 7)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(metrics)
    for key, value in metrics.items():
        (event,) = events.Scalars(key)
        assert event.step == 7
        np.testing.assert_allclose(event.value, value, rtol=1e-6)


def test_a_run_that_logs_flat_numbers_takes_them(of_three):
    logged = {}

    class Run:
        """As strict as a logger can be."""

        def log(self, data):
            for key, value in data.items():
                assert type(key) is str
                assert type(value) in (int, float), key
            logged.update(data)

    Run().log(balance_metrics(of_three, NAMES))
    assert logged["since_measured"] == 1


def test_a_line_of_json(of_three):
    metrics = balance_metrics(of_three, NAMES)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    traced = jax.jit(lambda state: balance_metrics(state, NAMES))(of_three)
    assert all(isinstance(value, jax.Array) for value in traced.values())
    for key, value in metrics.items():
        np.testing.assert_allclose(traced[key], value, rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"min_weight=-1\.0 must be at least 0"):
        balance_metrics(gaba().init(PARAMS), min_weight=-1.0)
    with pytest.raises(ValueError, match="no BalanceState"):
        balance_metrics(optax.adam(1e-3).init(PARAMS))
    with pytest.raises(ValueError, match="must be 2 different names"):
        balance_metrics(gaba().init(PARAMS), ["a", "b", "c"])
    with pytest.raises(ValueError, match="must be 2 different names"):
        balance_metrics(gaba().init(PARAMS), ["a", "b", "b"])
