"""Learning-rate annealing, and what inverse-Dirichlet weights share with it, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaba_jax import balance, balanced_value_and_grad, weighting
from gaba_jax.weighting import TaskStats

RULES = {"lr_annealing": weighting.lr_annealing, "inverse_dirichlet": weighting.inverse_dirichlet}
K = 3


def ratios(name, grads):
    """Of all elements of each task [K, n], in float64."""
    grads = np.asarray(grads, np.float64)
    if name == "inverse_dirichlet":
        return grads.std(axis=1).max() / grads.std(axis=1)
    found = np.abs(grads[0]).max() / np.abs(grads).mean(axis=1)
    found[0] = 1
    return found


def gradients(steps, seed=0):
    random = np.random.default_rng(seed)
    grads = random.normal(size=(steps, K, 12)) + random.normal(size=(steps, K, 1))
    return (grads * np.array([5, 1, 0.1])[:, None]).astype(np.float32)


def weights_over(rule, grads):
    """The applied weights of a run, on gradients in two leaves."""
    tx = balance(rule, shared=True)
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(6)}

    def step(state, grads):
        leaves = {"a": grads[:, :6].reshape(K, 2, 3), "b": grads[:, 6:]}
        _, state = tx.update(leaves, state, params)
        return state, state.task_weights

    return np.asarray(jax.lax.scan(step, tx.init(params), jnp.asarray(grads))[1])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_against_numpy(name, beta):
    grads, weights, expected = gradients(6), np.ones(K), []
    for each in grads:
        weights = beta * weights + (1 - beta) * ratios(name, each)
        expected.append(weights)
    found = weights_over(RULES[name](K, beta=beta), grads)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    if name == "lr_annealing":
        np.testing.assert_array_equal(found[:, 0], 1)
    else:
        assert found.min() >= 1 - 1e-6


def losses_fn(params, x):
    h = jnp.tanh(x @ params)
    return jnp.mean(h[:, 0] ** 2) * 50, jnp.mean((h[:, 1] - 1) ** 2), jnp.mean(h[:, 0] * h[:, 1])


@pytest.mark.parametrize("name", RULES)
def test_from_one_balanced_gradient(name):
    params = jax.random.normal(jax.random.key(0), (4, 2))
    x = jax.random.normal(jax.random.key(1), (8, 4))
    balanced = balanced_value_and_grad(losses_fn, RULES[name](K, beta=0.0), shared=True)
    _, state = balanced.value_and_grad(params, balanced.init(params), x)
    grads = np.stack(
        [jax.grad(lambda p, i=i: losses_fn(p, x)[i])(params).ravel() for i in range(K)]
    )
    np.testing.assert_allclose(state.task_weights, ratios(name, grads), rtol=1e-4)


def stats_of(values, present=None, elapsed=1):
    """TaskStats whose statistics are all these values."""
    values = jnp.asarray(values, jnp.float32)
    present = jnp.ones(values.shape, bool) if present is None else jnp.asarray(present)
    extra = dict.fromkeys(("max_abs", "mean_abs", "std"), jnp.where(present, values, 0))
    return TaskStats(values, None, None, present, jnp.int32(elapsed), extra)


@pytest.mark.parametrize("name", RULES)
def test_a_zero_and_hard_values(name):
    rule = RULES[name](3)
    hard = [[0, 1, 1e15], [1e30, 0, 1e-30], [0, 0, 0], [1e-30, 1e30, 1], [1, 1, 0]]
    state = rule.init()
    for row in hard:
        weights, after = rule.update(stats_of(row), state)
        assert np.all(np.isfinite(weights) & (weights > 0))
        np.testing.assert_array_equal(weights[np.array(row) == 0], state[0][np.array(row) == 0])
        state = after


@pytest.mark.parametrize("name", RULES)
def test_an_absent_task_keeps_its_weight(name):
    rule = RULES[name](3, beta=0.5)
    _, state = rule.update(stats_of([8, 2, 1]), rule.init())
    np.testing.assert_allclose(state.annealed_weights, [1, 2.5, 4.5], rtol=1e-6)
    weights, _ = rule.update(stats_of([8, 2, 2], [True, True, False]), state)
    np.testing.assert_allclose(weights, [1, 3.25, 4.5], rtol=1e-6)
    weights, _ = rule.update(stats_of([8, 2, 1], [False, True, True]), state)
    expected = {"lr_annealing": [1, 2.5, 4.5], "inverse_dirichlet": [1, 1.75, 3.25]}[name]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_beta_counts_updates(name):
    rule = RULES[name](2, beta=0.9)
    weights, _ = rule.update(stats_of([8, 2], elapsed=7), rule.init())
    np.testing.assert_allclose(weights[1], 0.9**7 + (1 - 0.9**7) * 4, rtol=1e-5)
    per_measurement = RULES[name](2, beta=0.9 ** (1 / 7))
    weights, _ = per_measurement.update(stats_of([8, 2], elapsed=7), rule.init())
    np.testing.assert_allclose(weights[1], 0.9 + 0.1 * 4, rtol=1e-4)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("beta", [-0.1, 1.0, 1 - 1e-12])
def test_errors(name, beta):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        RULES[name](2, beta=beta)
    with pytest.raises(ValueError, match="num_tasks=1 must be at least 2"):
        RULES[name](1)


def test_beta_can_be_traced():
    @jax.jit
    def weights(beta):
        rule = weighting.lr_annealing(2, beta=beta)
        return rule.update(stats_of([8, 2]), rule.init())[0]

    np.testing.assert_allclose(weights(0.5), [1, 2.5], rtol=1e-6)
