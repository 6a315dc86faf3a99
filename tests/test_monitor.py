"""balance_metrics: what it says and where it finds it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gaba_jax import balance, balance_metrics, gaba, weighting

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


def test_errors():
    with pytest.raises(ValueError, match="no BalanceState"):
        balance_metrics(optax.adam(1e-3).init(PARAMS))
    with pytest.raises(ValueError, match="must be 2 different names"):
        balance_metrics(gaba().init(PARAMS), ["a", "b", "c"])
