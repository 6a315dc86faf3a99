"""docs/momentum.md against the updates of the papers, written out in float64."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import balance, exclude, per_task, weighting
from tests import pages

PAGE = (Path(__file__).parent.parent / "docs" / "momentum.md").read_text()
K, STEPS, SIZE = 3, 8, 5


@pytest.fixture(scope="module")
def page():
    """What the page defines: functions alone, nothing of its runs."""
    names = {"jax": jax, "jnp": jnp, "np": np, "optax": optax}
    names |= {"per_task": per_task, "weighting": weighting}
    for statement in ast.parse("\n".join(pages.blocks(PAGE))).body:
        if isinstance(statement, ast.FunctionDef) and not statement.decorator_list:
            exec(ast.unparse(statement), names)
    return names


def gradients(seed=0):
    """[STEPS, K, SIZE], of tasks that oppose each other somewhat and differ in norm."""
    random = np.random.default_rng(seed)
    grads = random.normal(size=(STEPS, K, SIZE)) + random.normal(size=(1, K, SIZE))
    grads[:, 1] -= 0.5 * grads[:, 0]
    return grads * np.array([3.0, 1.0, 0.5])[:, None]


def run(tx, grads, **extra):
    """The updates [STEPS, SIZE] of one shared leaf."""
    state, found, update = tx.init(jnp.zeros(SIZE)), [], jax.jit(tx.update)
    for t, each in enumerate(grads):
        of_step = {name: values[t] for name, values in extra.items()}
        updates, state = update(jnp.asarray(each, jnp.float32), state, jnp.zeros(SIZE), **of_step)
        found.append(np.asarray(updates))
    return np.array(found)


def onto_the_simplex(point):
    """The nearest weights, by bisection on what is taken off each."""
    low, high = point.min() - 1, point.max()
    for _ in range(100):
        middle = (low + high) / 2
        total = np.maximum(point - middle, 0).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    return np.maximum(point - low, 0)


def test_moco(page):
    beta, gamma, rho, grads = 0.4, 0.05, 0.1, gradients()
    tx = optax.chain(
        per_task(optax.ema(1 - beta, debias=False), K), balance(page["moco"](K, gamma, rho))
    )
    tracked, weights, expected = np.zeros((K, SIZE)), np.full(K, 1 / K), []
    for each in grads:
        tracked -= beta * (tracked - each)
        gramian = tracked @ tracked.T + rho * np.eye(K)
        weights = onto_the_simplex(weights - gamma * gramian @ weights)
        expected.append(weights @ tracked)
    assert weights.min() < 0.2
    np.testing.assert_allclose(run(tx, grads), expected, rtol=1e-4, atol=1e-5)


def test_moco_comes_to_rest_at_mgda(page):
    """Where the gradients do not change."""
    rule = page["moco"](K, gamma=0.02)
    tx, still = balance(rule), jnp.asarray(gradients()[0], jnp.float32)
    state = jax.lax.fori_loop(
        0, 5000, lambda _, state: tx.update(still, state)[1], tx.init(jnp.zeros(SIZE))
    )
    exact = balance(weighting.mgda(K))
    _, expected = exact.update(still, exact.init(jnp.zeros(SIZE)))
    np.testing.assert_allclose(state.task_weights, expected.task_weights, atol=1e-3)


def conflict_free(rows):
    """ConFIG of gradients as rows."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    direction = np.linalg.pinv(unit) @ np.ones(K)
    direction /= np.linalg.norm(direction)
    return (rows @ direction).sum() * direction


def test_m_config(page):
    """Its algorithm with the pseudo second moment; one fresh task an update after the first."""
    first, second, rate, grads = 0.9, 0.99, 0.01, gradients()
    tx = optax.chain(
        page["track"](first, K),
        balance(weighting.config(K)),
        page["unaverage"](first),
        optax.adam(rate, b1=first, b2=second, eps=1e-8),
    )
    fresh = [np.ones(K, bool), *(np.arange(K) == t % K for t in range(1, STEPS))]
    poisoned = np.where(np.array(fresh)[:, :, None], grads, 1e6)  # stale ones are not read
    momenta, counts = np.zeros((K, SIZE)), np.zeros(K)
    combined_momentum, squares, expected = np.zeros(SIZE), np.zeros(SIZE), []
    for t, (each, now) in enumerate(zip(grads, fresh, strict=True), start=1):
        momenta[now] = first * momenta[now] + (1 - first) * each[now]
        counts[now] += 1
        combined = conflict_free(momenta / (1 - first**counts)[:, None])
        biased = combined * (1 - first**t)
        pseudo = (biased - first * combined_momentum) / (1 - first)
        combined_momentum = biased
        squares = second * squares + (1 - second) * pseudo**2
        expected.append(-rate * combined / (np.sqrt(squares / (1 - second**t)) + 1e-8))
    actual = run(tx, poisoned, fresh=jnp.array(fresh))
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-6)


def test_db_mtl(page):
    """Averages with a decay of beta / sqrt(k) on the trunk alone, heads as they are."""
    beta, grads = 0.6, gradients()
    heads = np.random.default_rng(1).normal(size=(STEPS, K, 2))
    heads[:, 1:] = 0  # of the first task
    shared, params = exclude("head"), {"trunk": jnp.zeros(SIZE), "head": jnp.zeros(2)}
    ema = optax.inject_hyperparams(optax.ema, static_args=("debias", "accumulator_dtype"))
    decay = ema(decay=lambda count: beta / jnp.sqrt(count + 1), debias=False)
    tx = optax.chain(
        per_task(optax.masked(decay, shared), K),
        balance(page["as_large_as_the_largest"](K), shared=shared, weight_task_specific=False),
    )
    state, update, average = tx.init(params), jax.jit(tx.update), np.zeros((K, SIZE))
    for k in range(STEPS):
        stacked = {"trunk": grads[k], "head": heads[k]}
        stacked = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), stacked)
        updates, state = update(stacked, state, params)
        rate = beta / np.sqrt(k + 1)
        average = rate * average + (1 - rate) * grads[k]
        norms = np.linalg.norm(average, axis=1)
        expected = norms.max() * (average / norms[:, None]).sum(axis=0)
        np.testing.assert_allclose(updates["trunk"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(updates["head"], heads[k, 0], rtol=1e-5)
