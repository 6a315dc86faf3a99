"""Warm-up, average, debiasing and floors."""

import functools

import chex
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaba_jax import weighting
from gaba_jax.weighting import TaskStats
from tests.slow import rest_slow


def test_published_first_steps(weigh):
    rule = weighting.gaba(2, warmup_steps=2)
    expected = [[0.5, 0.5], [0.5, 0.5], [0.4950, 0.5050], [0.4901, 0.5099], [0.4853, 0.5147]]
    np.testing.assert_allclose(weigh(rule, [76.5335, 0.3665], 5), expected, atol=5e-5)


@pytest.mark.parametrize(
    ("floor", "limit"), [("renormalize", [0.0477, 0.9523]), ("project", [0.05, 0.95])]
)
def test_steady_state(weigh, floor, limit):
    weights = weigh(weighting.gaba(2, floor=floor), [5, 0.01], 3000)
    np.testing.assert_allclose(weights[-1], limit, atol=5e-5)


def test_average_is_a_first_order_filter(weigh):
    rule = weighting.gaba(2, warmup_steps=0, min_weight=0.0, beta=0.9)
    weights = weigh(rule, [1.0, 3.0], 30)[:, 0]
    expected = 0.75 + (0.5 - 0.75) * 0.9 ** np.arange(1, 31)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_debias_takes_the_first_measurement_whole(weigh):
    rule = weighting.gaba(2, warmup_steps=3, min_weight=0.0, debias=True)
    weights = weigh(rule, [1.0, 3.0], 6)[:, 0]
    np.testing.assert_allclose(weights, [0.5] * 3 + [0.75] * 3, rtol=1e-6)


def test_debiased_average_is_the_weighted_mean_of_what_was_measured():
    rule = weighting.stabilize(
        weighting.inverse_share(2), beta=0.8, warmup_steps=0, min_weight=0.0, debias=True
    )
    norms = np.random.default_rng(0).uniform(1, 5, size=(6, 2)).astype(np.float32)
    state = rule.init()
    for row in norms:
        stats = TaskStats(jnp.asarray(row), None, None, jnp.ones(2, bool), jnp.int32(1))
        weights, state = rule.update(stats, state)
    raw = norms[:, 1] / norms.sum(axis=1)
    decay = 0.8 ** np.arange(5, -1, -1)
    np.testing.assert_allclose(weights[0], (decay * raw).sum() / decay.sum(), rtol=1e-5)
    np.testing.assert_allclose(state.ema_mass, 1 - 0.8**6, rtol=1e-6)


def test_no_smoothing_at_beta_zero(weigh):
    rule = weighting.gaba(2, beta=0.0, warmup_steps=0, min_weight=0.0)
    np.testing.assert_allclose(weigh(rule, [1.0, 3.0])[0], [0.75, 0.25], rtol=1e-6)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("warmup_steps", [0, 3, 4, 7])
def test_elapsed_counts_updates(weigh, warmup_steps, debias):
    """Every second update measured: the average is as far as that of every update."""
    rule = weighting.gaba(2, beta=0.9, warmup_steps=warmup_steps, min_weight=0, debias=debias)
    every = weigh(rule, [1.0, 3.0], 41)
    state, second = rule.init(), []
    for step in range(21):
        present = jnp.ones(2, bool)
        stats = TaskStats(jnp.array([1.0, 3.0]), None, None, present, jnp.int32(min(step + 1, 2)))
        weights, state = rule.update(stats, state)
        second.append(weights)
    assert state.stabilize_step == 41
    np.testing.assert_allclose(second, every[::2], rtol=1e-5)


def test_warm_up_leaves_average_and_rule_untouched():
    counter = weighting.Weighting(
        2,
        frozenset({"norms"}),
        lambda: jnp.zeros([], jnp.int32),
        lambda stats, state: (stats.norms, state + 1),
        np.full(2, 0.5, np.float32),
    )
    rule = weighting.stabilize(counter, warmup_steps=2, beta=0.5, min_weight=0.0)
    state, stats = rule.init(), TaskStats(jnp.array([1.0, 3.0]), None, None, jnp.ones(2, bool), 1)
    stats = stats._replace(elapsed=jnp.int32(1))
    for step in range(1, 5):
        weights, state = rule.update(stats, state)
        assert state.stabilize_step == step
        assert state.inner_state == max(step - 2, 0)
    np.testing.assert_allclose(weights, 0.25 * np.array([0.25, 0.75]) * 3 + 0.25 * 0.5, rtol=1e-6)


def test_negative_weights_of_the_rule_are_clipped(weigh):
    rule = weighting.stabilize(
        weighting.constant(2, [-3.0, 2.0]), beta=0.0, warmup_steps=0, min_weight=0.0
    )
    np.testing.assert_array_equal(weigh(rule, [1.0, 1.0])[0], [0, 1])


def test_an_absent_task_keeps_its_average_and_the_others_their_mass():
    rule = weighting.gaba(3, beta=0.5, warmup_steps=0, min_weight=0.0)
    stats = TaskStats(jnp.array([1.0, 2.0, 7.0]), None, None, jnp.ones(3, bool), jnp.int32(1))
    _, state = rule.update(stats, rule.init())
    absent = stats._replace(
        norms=jnp.array([1.0, 9.0, 0.0]), present=jnp.array([True, True, False])
    )
    weights, after = rule.update(absent, state)
    assert after.ema_weights[2] == state.ema_weights[2]
    held = 1 - state.ema_weights[2]
    expected = (state.ema_weights[:2] + jnp.array([0.9, 0.1]) * held) / 2
    np.testing.assert_allclose(after.ema_weights[:2], expected, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


STEPS = 8


@functools.cache
def compiled_run(num_tasks, floor, debias):
    """Weights of a whole run, compiled once for all numbers that can be traced."""

    @jax.jit
    def weights_of(norms, present, elapsed, beta, warmup_steps, min_weight):
        rule = weighting.gaba(
            num_tasks,
            beta=beta,
            warmup_steps=warmup_steps,
            min_weight=min_weight,
            floor=floor,
            debias=debias,
        )

        def step(state, row):
            norms, present, elapsed = row
            stats = TaskStats(jnp.where(present, norms, 0), None, None, present, elapsed)
            weights, state = rule.update(stats, state)
            return state, weights

        return jax.lax.scan(step, rule.init(), (norms, present, elapsed))[1]

    return weights_of


@st.composite
def runs(draw):
    num_tasks = draw(st.sampled_from([2, 3, 8, 20]))
    norm = st.one_of(st.just(0.0), st.floats(2.0**-100, 2.0**100, width=32))
    floor = st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.just(1.0))

    def table(elements, dtype):
        return draw(hypothesis.extra.numpy.arrays(dtype, (STEPS, num_tasks), elements=elements))

    return dict(
        norms=table(norm, np.float32),
        present=table(st.booleans(), bool),
        elapsed=draw(hypothesis.extra.numpy.arrays(np.int32, STEPS, elements=st.integers(1, 9))),
        numbers=(
            np.float32(draw(st.one_of(st.just(0.0), st.floats(0.0, 0.9999)))),
            np.int32(draw(st.integers(0, 6))),
            np.float32(draw(floor) / num_tasks),
        ),
        debias=draw(st.booleans()),
        order=np.array(draw(st.permutations(range(num_tasks)))),
    )


@pytest.mark.slow
@pytest.mark.parametrize("masked", rest_slow([False, True], fast=[True]))
@pytest.mark.parametrize("floor", rest_slow(["renormalize", "project"], fast=["project"]))
@settings(max_examples=80)
@given(run=runs())
def test_properties(run, floor, masked):
    norms, order = run["norms"], run["order"]
    num_tasks = norms.shape[1]
    present = run["present"] if masked else np.ones_like(run["present"])
    weights_of = compiled_run(num_tasks, floor, run["debias"])
    weights = weights_of(norms, present, run["elapsed"], *run["numbers"])
    f = run["numbers"][2]
    bound = f if floor == "project" else f / (1 + (num_tasks - 1) * f)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert np.all(weights >= bound * (1 - 1e-6))
    permuted = weights_of(norms[:, order], present[:, order], run["elapsed"], *run["numbers"])
    np.testing.assert_allclose(permuted, weights[:, order], atol=2e-6)
    scaled = weights_of(norms / 4, present, run["elapsed"], *run["numbers"])
    np.testing.assert_allclose(scaled, weights, atol=2e-6)


def test_project_is_the_euclidean_projection(weigh):
    """No other point of {w >= f, sum w = 1} is nearer to the average."""
    average = np.array([0.001, 0.01, 0.3, 0.689])
    rule = weighting.stabilize(
        weighting.constant(4, average), beta=0.0, warmup_steps=0, min_weight=0.05, floor="project"
    )
    (weights,) = np.asarray(weigh(rule, np.ones(4)))
    np.testing.assert_allclose(weights, [0.05, 0.05, 0.2555, 0.6445], atol=1e-6)
    others = np.random.default_rng(0).dirichlet(np.ones(4), size=2000) * 0.8 + 0.05
    nearest = np.linalg.norm(others - average, axis=1).min()
    assert np.linalg.norm(weights - average) <= nearest


def test_the_average_does_not_drift_off_the_simplex():
    rule = weighting.gaba(7, beta=0.99, warmup_steps=0)
    norms = jnp.abs(jax.random.normal(jax.random.key(0), (20000, 7)))

    def step(state, row):
        stats = TaskStats(row, None, None, jnp.ones(7, bool), jnp.int32(1))
        return rule.update(stats, state)[1], None

    state, _ = jax.jit(lambda: jax.lax.scan(step, rule.init(), norms))()
    np.testing.assert_allclose(state.ema_weights.sum(), 1, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 1}, "num_tasks=1 must be at least 2"),
        ({"beta": 1.0}, r"beta=1.0 must be in \[0, 1\)"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"beta": [0.9, 0.9]}, r"beta must be a scalar, got shape \(2,\)"),
        ({"beta": jnp.bfloat16(0.99)}, "beta came as bfloat16.*hyperparam_dtype"),
        ({"beta": "0.9"}, "beta must be a number, got '0.9'"),
        ({"beta": None}, "beta must be a number, got None"),
        ({"beta": 1 - 1e-9}, r"must be in \[0, 1\)"),
        ({"warmup_steps": 2.5}, "warmup_steps=2.5 must be at least 0, and whole"),
        ({"warmup_steps": float("nan")}, "warmup_steps=nan"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"min_weight": 0.51}, "min_weight=0.51.*the most is 0.5"),
        ({"num_tasks": 21}, "the most is 0.04762"),
        ({"min_weight": -0.1}, "min_weight=-0.1"),
        ({"floor": "clip"}, 'floor=\'clip\' must be "renormalize" or "project"'),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        weighting.gaba(**{"num_tasks": 2, **arguments})


def test_average_norms_is_a_combinator_of_its_own():
    """The option is short for it, whatever else is passed."""
    options = {"warmup_steps": 2, "min_weight": 0.02, "floor": "project"}
    inner = weighting.inverse_norm(3)
    of_option = weighting.stabilize(inner, beta=0.9, average="norms", debias=True, **options)
    of_combinator = weighting.stabilize(
        weighting.average_norms(inner, beta=0.9), beta=0.0, debias=True, **options
    )
    states = [rule.init() for rule in (of_option, of_combinator)]
    random = np.random.default_rng(0)
    for _ in range(8):
        present = jnp.asarray(random.random(3) < 0.6).at[0].set(True)
        norms = jnp.where(present, random.uniform(0.1, 10, 3), 0)
        stats = TaskStats(jnp.float32(norms), None, None, present, jnp.int32(2))
        (left, states[0]), (right, states[1]) = (
            rule.update(stats, state)
            for rule, state in zip((of_option, of_combinator), states, strict=True)
        )
        np.testing.assert_array_equal(left, right)
    chex.assert_trees_all_equal(*states)
    with pytest.raises(ValueError, match='must be "weights" or "norms"'):
        weighting.stabilize(inner, average="norm")


def test_the_rule_inside_counts_updates_after_the_warm_up():
    """Its first measurement comes 3 updates after another, of which 2 were of the warm-up."""
    seen = []

    def update(stats, state):
        seen.append(int(stats.elapsed))
        return jnp.ones(2) / 2, state

    rule = weighting.stabilize(
        weighting.uniform(2)._replace(update=update), warmup_steps=5, min_weight=0.0
    )
    state = rule.init()
    for _ in range(3):
        stats = TaskStats(jnp.ones(2), None, None, jnp.ones(2, bool), jnp.int32(3))
        _, state = rule.update(stats, state)
    assert seen[1:] == [1, 3]
