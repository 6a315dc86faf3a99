"""Contributions in given ratios, and nothing that a finished task can do to the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import balance, balanced_value_and_grad, equalize, task_value_and_grad, weighting
from gaba_jax.weighting import TaskStats


def stats_of(norms, present=None, elapsed=1):
    norms = jnp.asarray(norms, jnp.float32)
    present = jnp.ones(norms.shape, bool) if present is None else jnp.asarray(present)
    return TaskStats(jnp.where(present, norms, 0), None, None, present, jnp.int32(elapsed))


def run(rule, rows, present=None):
    """The weights of every update [T, K] and the last state."""
    rows = jnp.asarray(rows, jnp.float32)
    present = jnp.ones(rows.shape, bool) if present is None else jnp.asarray(present)

    def step(state, row):
        weights, state = rule.update(stats_of(*row), state)
        return state, weights

    state, weights = jax.jit(functools.partial(jax.lax.scan, step))(rule.init(), (rows, present))
    return np.asarray(weights), state


def test_the_first_measurement_counts_whole():
    (weights,), _ = run(weighting.equalize(3), [[500.0, 1.0, 20.0]])
    contributions = weights * [500, 1, 20]
    np.testing.assert_allclose(contributions, contributions[0], rtol=1e-5)
    np.testing.assert_allclose(np.prod(3 * weights), 1, rtol=1e-5)


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_ratios_in_steady_state_under_noise(num_tasks):
    """The mean contributions are within 2 % of what was asked for, norms 1e4 apart."""
    random = np.random.default_rng(num_tasks)
    ratios = random.uniform(0.1, 1, num_tasks)
    norms = np.logspace(-2, 2, num_tasks) * np.exp(0.3 * random.normal(size=(4000, num_tasks)))
    weights, _ = run(weighting.equalize(num_tasks, ratios=ratios), norms)
    contributions = (weights * norms)[100:].mean(axis=0)
    np.testing.assert_allclose(contributions / contributions[0], ratios / ratios[0], rtol=0.02)


def test_traced_ratios_move_the_weights():
    def first(ratios):
        rule = weighting.equalize(2, ratios=ratios)
        return rule.update(stats_of([3.0, 1.0]), rule.init())[0]

    for ratios in ([1.0, 1.0], [1.0, 0.1]):
        weights = jax.jit(first)(jnp.array(ratios))
        np.testing.assert_allclose(weights * jnp.array([3.0, 1.0]) / weights[0] / 3, ratios, 1e-5)


def test_a_factor_on_a_loss_changes_no_ratio_and_on_all_no_weight():
    random = np.random.default_rng(0)
    norms = np.exp(random.normal(size=(50, 3)))
    weights, _ = run(weighting.equalize(3), norms)
    one, _ = run(weighting.equalize(3), norms * [1e6, 1, 1])
    shares, others = weights * norms, one * norms * [1e6, 1, 1]
    np.testing.assert_allclose(
        shares / shares.sum(axis=1)[:, None], others / others.sum(axis=1)[:, None], rtol=1e-5
    )
    np.testing.assert_allclose(run(weighting.equalize(3), norms * 1e6)[0], weights, rtol=1e-5)


def test_a_finished_task_takes_no_more_and_is_heard_when_it_wakes():
    norms = np.ones((400, 2))
    norms[100:300, 1] = 10.0 ** -np.linspace(0, 6, 200)  # it goes to zero, and comes back
    weights, _ = run(weighting.equalize(2), norms)
    ratio = weights[:, 1] / weights[:, 0]
    np.testing.assert_allclose(ratio[:100], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[299], 10, rtol=0.01)  # 1 / rho, at a norm of 1e-6
    np.testing.assert_allclose(ratio[-1], 1, rtol=0.01)


def test_gradients_that_all_fall_together_stay_equal():
    """The end of a run is no finished task."""
    norms = np.geomspace(1, 1e-6, 500)[:, None] * np.array([100.0, 1.0])
    weights, _ = run(weighting.equalize(2), norms)
    np.testing.assert_allclose(weights[:, 1] / weights[:, 0], 100, rtol=1e-4)


@pytest.mark.parametrize("rho", [0.0, 0.1, 1.0])
def test_hard_norms_give_finite_positive_weights(rho):
    hard = [[0, 1, 1e15, 1e-15], [1e30, 0, 0, 0], [1e-30] * 4, [0] * 4, [1e30, 1e-30, 1, 0]]
    weights, state = run(weighting.equalize(4, rho=rho), hard)
    assert np.all(np.isfinite(weights) & (weights > 0))
    assert all(np.isfinite(leaf).all() for leaf in state)


class TestAnchor:
    def test_the_others_contribute_at_most_their_ratio(self):
        rule = weighting.equalize(3, ratios=[1.0, 0.1, 0.1], anchor=0)
        (weights,), _ = run(rule, [[2.0, 500.0, 0.05]])
        assert weights[0] == 1
        np.testing.assert_allclose(weights[1] * 500, 0.1 * 2, rtol=1e-5)
        assert weights[2] == 1  # satisfied: it contributes less than its ratio, and is left alone

    def test_any_task_can_be_it(self):
        (weights,), _ = run(weighting.equalize(2, anchor=1), [[4.0, 1.0]])
        np.testing.assert_allclose(weights, [0.25, 1], rtol=1e-6)
        np.testing.assert_array_equal(weighting.equalize(2, anchor=1).initial_weights, [1, 1])


class TestAbsent:
    def test_one_task_a_batch_adds_up_to_all(self):
        norms = np.tile([[50.0, 1.0, 4.0]], (300, 1))
        present = np.arange(300)[:, None] % 3 == np.arange(3)
        weights, state = run(weighting.equalize(3), norms, present)
        contributions = weights[-1] * norms[-1]
        np.testing.assert_allclose(contributions, contributions[0], rtol=1e-4)
        np.testing.assert_allclose(state.ema_norms, norms[0], rtol=1e-5)

    def test_a_task_that_was_never_there_is_of_the_usual_size(self):
        (weights,), _ = run(weighting.equalize(3), [[9.0, 1.0, 7.0]], [[True, True, False]])
        np.testing.assert_allclose(weights, np.array([1 / 3, 3, 1]) / 3, rtol=1e-5)

    def test_both_drivers_apply_it_as_it_is(self):
        def losses_fn(params):
            return 30 * params[0] + params[1], params[0] - params[1], 0.1 * params[1]

        mask, params = jnp.array([False, True, True]), jnp.ones(2)
        rule = weighting.equalize(3)
        tx, balanced = balance(rule), balanced_value_and_grad(losses_fn, rule)
        grads = task_value_and_grad(losses_fn)(params)[1]
        _, stacked = tx.update(grads, tx.init(params), params, task_mask=mask)
        _, exact = balanced.value_and_grad(params, balanced.init(params), task_mask=mask)
        for state in (stacked, exact):
            assert state.task_weights[0] == 0
            contributions = state.task_weights[1:] * state.task_norms[1:]
            np.testing.assert_allclose(contributions[0], contributions[1], rtol=1e-5)


def test_every_n_keeps_the_time_constant_in_updates():
    norms = np.concatenate([np.ones((10, 2)), np.tile([[1.0, 8.0]], (40, 1))])
    rule = weighting.equalize(2)
    _, each = run(rule, norms)
    state = rule.init()
    for t in range(0, 50, 10):
        elapsed = 1 if t == 0 else 10
        _, state = rule.update(stats_of(norms[t + 9] if t else norms[0], elapsed=elapsed), state)
    np.testing.assert_allclose(state.ema_norms, each.ema_norms, rtol=0.06)


def conflict(p):
    """The second is solved at the start, and equal contributions stop the first for ever."""
    return (p[0] - 1.0) ** 2 + (p[1] - 2.0) ** 2, (p[0] - p[1]) ** 2


def trained(optimizer, steps=4000):
    tx, params = optax.chain(equalize(2), optimizer), jnp.zeros(2)

    def step(carry, _):
        params, state = carry
        _, grads = task_value_and_grad(conflict)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(
        lambda: jax.lax.scan(step, (params, tx.init(params)), None, length=steps)
    )()
    return np.asarray(params)


def test_a_task_that_is_solved_at_the_start_does_not_freeze_adam():
    p = trained(optax.adam(1e-2))
    first, second = np.asarray(jax.jacobian(lambda p: jnp.stack(conflict(p)))(p))
    parts = np.linspace(0, 1, 10001)[:, None]
    assert np.linalg.norm(parts * first + (1 - parts) * second, axis=1).min() < 1e-2
    np.testing.assert_allclose(p, [1.5, 1.5], atol=0.05)


def test_nor_sgd_which_is_most_of_the_way_there():
    p = trained(optax.sgd(1e-2))
    assert np.all(p > 0.75)  # the way is from 0 to 1.5


def test_adam_does_not_remember_the_loud_task():
    """Its second moment is that of the balanced gradient from the first update on."""
    tx = optax.chain(equalize(2), optax.scale_by_adam())
    params, state = jnp.zeros(2), optax.EmptyState()
    state = tx.init(params)
    random, grads = np.random.default_rng(0), None
    for _ in range(3):
        grads = jnp.array(random.normal(size=(2, 2)) * np.array([[500.0], [1.0]]), jnp.float32)
        _, state = tx.update(grads, state, params)
    balanced = state[0].task_weights @ grads
    nu = np.asarray(state[1].nu) / (1 - 0.999**3)
    assert np.all(np.sqrt(nu) < 10 * float(jnp.linalg.norm(balanced)))


class TestHoldAfter:
    def test_the_weights_stand_still_afterwards(self):
        rule = weighting.hold_after(weighting.equalize(2), steps=5)
        norms = np.exp(np.random.default_rng(0).normal(size=(20, 2)))
        weights, state = run(rule, norms)
        free, _ = run(weighting.equalize(2), norms)
        np.testing.assert_allclose(weights[:5], free[:5], rtol=1e-6)
        np.testing.assert_array_equal(weights[5:], np.tile(weights[4], (15, 1)))
        np.testing.assert_array_equal(state.held_weights, weights[4])

    def test_updates_count_and_not_measurements(self):
        rule = weighting.hold_after(weighting.inverse_norm(2), steps=10)
        weights, state = rule.update(stats_of([1.0, 3.0]), rule.init())
        later, _ = rule.update(stats_of([3.0, 1.0], elapsed=9), state)
        np.testing.assert_allclose(later, [0.25, 0.75], rtol=1e-6)
        late, _ = rule.update(stats_of([3.0, 1.0], elapsed=10), state)
        np.testing.assert_array_equal(late, weights)

    def test_errors(self):
        for steps in (0, 1.5, -3):
            with pytest.raises(ValueError, match="must be at least 1, and whole"):
                weighting.hold_after(weighting.uniform(2), steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": [1.0, 0.0]}, "ratios must be positive"),
        ({"ratios": [1.0]}, r"ratios must have shape \(2,\)"),
        ({"anchor": 2}, "anchor=2 must be the number of a task, from 0 to 1"),
        ({"anchor": True}, "anchor=True must be"),
        ({"beta": 1.0}, r"beta=1.0 must be in \[0, 1\)"),
        ({"rho": 1.5}, r"rho=1.5 must be in \[0, 1\]"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        weighting.equalize(2, **options)


TIMES = jnp.linspace(0, 2, 64)


def solution(params, t):
    h = t[None]
    for kernel, bias in params[:-1]:
        h = jnp.tanh(h @ kernel + bias)
    return (h @ params[-1][0] + params[-1][1])[0]


def residual_and_start(params):
    """u' = -3 u with u(0) = 1: the second loss can be solved exactly."""
    values, slopes = jax.vmap(jax.value_and_grad(functools.partial(solution, params)))(TIMES)
    return jnp.mean((slopes + 3 * values) ** 2), (solution(params, TIMES[0]) - 1) ** 2


@pytest.mark.slow
def test_an_equation_whose_start_is_one_point():
    """Two or three times the error of uniform weights; inverse norms, which freeze, have tens."""

    def errors(rule):
        # At a constant rate Adam's last updates still jump, and a mean of seeds with them.
        tx = optax.adam(optax.cosine_decay_schedule(3e-3, 3000))
        balanced = balanced_value_and_grad(residual_and_start, rule)

        def run(key):
            sizes = [(1, 32), (32, 32), (32, 1)]
            params = [
                (jax.random.normal(k, size) / np.sqrt(size[0]), jnp.zeros(size[1]))
                for k, size in zip(jax.random.split(key, 3), sizes, strict=True)
            ]

            def step(carry, _):
                params, state, opt_state = carry
                (_, grads), state = balanced.value_and_grad(params, state)
                updates, opt_state = tx.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), state, opt_state), None

            carry = params, balanced.init(params), tx.init(params)
            (params, *_), _ = jax.lax.scan(step, carry, None, length=3000)
            exact = jnp.exp(-3 * TIMES)
            found = jax.vmap(functools.partial(solution, params))(TIMES)
            return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)

        return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 5)))

    uniform, equal, inverse = (
        errors(rule(2)).mean()
        for rule in (weighting.uniform, weighting.equalize, weighting.inverse_norm)
    )
    assert equal < 4 * uniform
    assert inverse > max(5 * equal, 15 * uniform)
