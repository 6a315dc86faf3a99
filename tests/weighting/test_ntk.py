"""Tangent-kernel weights: the estimate against the kernel itself, in NumPy and on a network."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import balance, balanced_value_and_grad, example_norms, weighting
from gaba_jax.weighting import TaskStats


def stats_of(norms, losses, present=None, elapsed=1):
    norms = jnp.asarray(norms, jnp.float32)
    present = jnp.ones(norms.shape, bool) if present is None else jnp.asarray(present)
    losses = jnp.where(present, jnp.asarray(losses, jnp.float32), 1)
    return TaskStats(jnp.where(present, norms, 0), None, losses, present, jnp.int32(elapsed))


def weights_of(rule, *args, **kwargs):
    return rule.update(stats_of(*args, **kwargs), rule.init())[0]


def test_against_the_kernel():
    """Residuals r = J p - y, the mean of their squares; g and L from autodiff in the driver."""
    random = np.random.default_rng(0)
    jacobians = [random.normal(size=(n, 5)) * size for n, size in [(7, 3.0), (7, 0.2), (4, 1.0)]]
    targets = [random.normal(size=len(j)) for j in jacobians]
    params = random.normal(size=5)

    def losses_fn(p):
        pairs = zip(jacobians, targets, strict=True)
        return tuple(
            jnp.mean((jnp.asarray(j, jnp.float32) @ p - jnp.asarray(y, jnp.float32)) ** 2)
            for j, y in pairs
        )

    expected = []
    for j, y in zip(jacobians, targets, strict=True):
        r, kernel = j @ params - y, j @ j.T
        expected.append(4 / len(r) * (r @ kernel @ r) / (r @ r))
    expected = np.sum(expected) / np.array(expected)
    balanced = balanced_value_and_grad(losses_fn, weighting.ntk(3), shared=True)
    params = jnp.asarray(params, jnp.float32)
    _, state = balanced.value_and_grad(params, balanced.init(params))
    np.testing.assert_allclose(state.task_weights, expected, rtol=1e-4)


def test_the_mean_over_directions_is_the_trace():
    random = np.random.default_rng(1)
    jacobian = random.normal(size=(6, 9))
    kernel, r = jacobian @ jacobian.T, random.normal(size=(200_000, 6))
    norms = np.linalg.norm(2 / 6 * r @ jacobian, axis=1)
    estimates = norms**2 / np.mean(r**2, axis=1)
    np.testing.assert_allclose(estimates.mean(), 4 * np.trace(kernel) / 6**2, rtol=5e-3)


def test_the_exact_trace_from_example_norms():
    """As the docstring has it, against the kernel of a network's residuals."""
    params = {"w": jax.random.normal(jax.random.key(0), (3, 4)), "v": jnp.arange(4.0) - 1}

    def residual(params, x, y):
        return jnp.tanh(x @ params["w"]) @ params["v"] - y

    x = jax.random.normal(jax.random.key(1), (10, 3))
    y = jnp.ones(10)
    rows = jax.vmap(jax.grad(residual), (None, 0, 0))(params, x, y)
    jacobian = np.concatenate([np.reshape(leaf, (10, -1)) for leaf in jax.tree.leaves(rows)], 1)
    trace = np.trace(jacobian.astype(np.float64) @ jacobian.T.astype(np.float64))
    np.testing.assert_allclose(np.sum(example_norms(residual, params, x, y) ** 2), trace, rtol=1e-5)


def test_a_factor_on_a_loss_changes_no_direction():
    """The weighted gradient of the scaled task is the same, but for a common factor."""
    norms, losses = np.array([6.0, 1.0, 3.0]), np.array([4.0, 1.0, 0.1])
    factors = np.array([1.0, 1e6, 1e-6])
    pulls = np.asarray(weights_of(weighting.ntk(3), norms, losses)) * norms
    scaled = np.asarray(weights_of(weighting.ntk(3), norms * factors, losses * factors))
    scaled = scaled * norms * factors
    np.testing.assert_allclose(scaled / scaled[0], pulls / pulls[0], rtol=1e-3)


def test_the_average_is_geometric_and_counts_updates():
    rule, state = weighting.ntk(2, beta=0.5), weighting.ntk(2, beta=0.5).init()
    _, state = rule.update(stats_of([2.0, 1.0], [1.0, 1.0]), state)
    np.testing.assert_allclose(state.ema_log_traces, np.log([4.0, 1.0]), atol=1e-6)
    weights, state = rule.update(stats_of([1.0, 1.0], [1.0, 1.0], elapsed=3), state)
    mass = 0.5**3 * 0.5 + 1 - 0.5**3
    logs = np.log(4) * (1 - (1 - 0.5**3) / mass)
    np.testing.assert_allclose(state.ema_log_traces, [logs, 0], atol=1e-5)
    np.testing.assert_allclose(weights, (np.exp(logs) + 1) / np.exp([logs, 0]), rtol=1e-5)


def test_equal_traces_have_weight_k_and_weights_are_at_least_one():
    np.testing.assert_allclose(weights_of(weighting.ntk(4), [2.0] * 4, [3.0] * 4), 4, rtol=1e-5)
    np.testing.assert_array_equal(weighting.ntk(4).initial_weights, 4)
    weights = weights_of(weighting.ntk(3), [1e3, 1.0, 1e-3], [1.0, 1.0, 1.0])
    assert weights.min() >= 1


def test_absent_and_zero_tasks():
    rule = weighting.ntk(3)
    weights = weights_of(rule, [4.0, 1.0, 9.0], [1.0, 1.0, 1.0], [True, True, False])
    usual = np.array([16.0, 1.0, 4.0])  # the third counts with the geometric mean
    np.testing.assert_allclose(weights, usual.sum() / usual, rtol=1e-5)
    _, state = rule.update(stats_of([4.0, 1.0, 3.0], [1.0] * 3), rule.init())
    for row in ([0.0, 1.0, 3.0], [1.0] * 3), ([4.0, 1.0, 3.0], [0.0, 1.0, 1.0]):
        _, after = rule.update(stats_of(*row), state)
        assert after.ema_log_traces[0] == state.ema_log_traces[0]
    tx, grads, mask = balance(rule), jnp.ones((3, 2)), jnp.array([False, True, False])
    _, state = tx.update(grads, tx.init(grads[0]), task_losses=jnp.ones(3), task_mask=mask)
    np.testing.assert_allclose(state.task_weights, [0, 3, 0], rtol=1e-5)


def test_hard_inputs_stay_finite():
    rule = weighting.ntk(3, beta=0.0)
    state = rule.init()
    hard = [
        ([1e30, 1e-30, 1], [1e-30, 1e30, 1]),
        ([0, 0, 0], [1, 1, 1]),
        ([1e15, 1, 0], [-1, 0, 3e38]),
        ([1e-30] * 3, [3e38] * 3),
    ]
    for norms, losses in hard:
        weights, state = rule.update(stats_of(norms, losses), state)
        assert np.all(np.isfinite(weights) & (weights > 0))
        assert all(np.isfinite(leaf).all() for leaf in state)


def test_errors():
    with pytest.raises(ValueError, match=r"beta=1.0 must be in \[0, 1\)"):
        weighting.ntk(2, beta=1.0)
    with pytest.raises(ValueError, match="num_tasks=1 must be at least 2"):
        weighting.ntk(1)


class Poisson:
    """u'' = f on a line, with zeros at both ends, by a network of two hidden layers."""

    inside, ends = jnp.linspace(0, 1, 102)[1:-1], jnp.array([0.0, 1.0])

    @staticmethod
    def init(key, width=32):
        keys, sizes = jax.random.split(key, 3), [(1, width), (width, width), (width, 1)]
        kernel = jax.nn.initializers.glorot_normal()
        return [(kernel(k, size), jnp.zeros(size[1])) for k, size in zip(keys, sizes, strict=True)]

    @staticmethod
    def u(params, x):
        h = jnp.atleast_1d(x)
        for kernel, bias in params[:-1]:
            h = jnp.tanh(h @ kernel + bias)
        return (h @ params[-1][0] + params[-1][1])[0]

    @classmethod
    def residual(cls, params, x):
        force = (4 * jnp.pi) ** 2 * jnp.sin(4 * jnp.pi * x)
        return jax.grad(jax.grad(cls.u, 1), 1)(params, x) + force

    @classmethod
    def losses(cls, params):
        inside = jax.vmap(cls.residual, (None, 0))(params, cls.inside)
        return jnp.mean(inside**2), jnp.mean(jax.vmap(cls.u, (None, 0))(params, cls.ends) ** 2)

    @classmethod
    def means(cls, params):
        """4 tr(K) / N^2 of both."""
        each = ((cls.residual, cls.inside), (cls.u, cls.ends))
        return jnp.stack(
            [4 * jnp.sum(example_norms(f, params, x) ** 2) / len(x) ** 2 for f, x in each]
        )


@pytest.mark.slow
def test_what_the_docstrings_say_of_a_network():
    """How far the estimate is from the trace, and how far annealing lifts the boundary."""
    rules = {"ntk": weighting.ntk(2, beta=0.0), "annealing": weighting.lr_annealing(2, beta=0.0)}
    balanced = balanced_value_and_grad(Poisson.losses, weighting.equalize(2))
    adam = optax.adam(1e-3)

    @jax.jit
    def look(params):
        found = {}
        for name, rule in rules.items():
            way = balanced_value_and_grad(Poisson.losses, rule)
            found[name] = way.value_and_grad(params, way.init(params))[1]
        norms = found["ntk"].task_norms
        lifted = found["annealing"].task_weights * norms
        estimate = norms**2 / jnp.stack(Poisson.losses(params))
        return estimate / Poisson.means(params), lifted[1] / lifted[0]

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state, opt_state = carry
            (_, grads), state = balanced.value_and_grad(params, state)
            updates, opt_state = adam.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), state, opt_state), None

        carry = params, balanced.init(params), adam.init(params)
        return jax.lax.scan(step, carry, length=1000)[0][0]

    for seed in range(3):
        params = Poisson.init(jax.random.key(seed))
        of_start, lifted = look(params)
        assert np.all((of_start > 1.1) & (of_start < 2.6))
        assert 10 < lifted < 30
        later, lifted = look(train(params))
        assert later[0] < 0.3
        assert 10 < lifted < 30
