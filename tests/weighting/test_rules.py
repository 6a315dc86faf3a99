"""Uniform, constant, inverse_norm, inverse_share, rescaled: numbers, limits and errors."""

import functools

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

RULES = {
    "uniform": weighting.uniform,
    "inverse_norm": weighting.inverse_norm,
    "square_root": lambda k: weighting.inverse_norm(k, power=0.5),
    "inverse_share": weighting.inverse_share,
}


def contribution_ratio(weights, norms):
    contributions = np.asarray(weights) * norms
    return contributions.max() / contributions.min()


def test_constant_knows_its_number_of_tasks(weigh):
    """And takes it, as before, in every way in which it can be given."""
    wanted = np.float32([3.0, -1.0, 0.5])
    for rule in (
        weighting.constant(wanted),
        weighting.constant(weights=wanted),
        weighting.constant(3, wanted),
        weighting.constant(3, weights=wanted),
        weighting.constant(num_tasks=3, weights=wanted),
        weighting.constant(jnp.asarray(wanted)),
    ):
        assert rule.num_tasks == 3
        np.testing.assert_array_equal(rule.initial_weights, wanted)
        np.testing.assert_array_equal(weigh(rule, [1, 1, 1])[0], wanted)


def test_published_numbers(weigh):
    norms = np.array([5, 0.01])
    (closed,) = weigh(weighting.inverse_share(2), norms)
    np.testing.assert_allclose(closed, [0.001996, 0.998004], atol=5e-7)
    (root,) = weigh(weighting.inverse_norm(2, power=0.5), norms)
    np.testing.assert_allclose(root, [0.0428, 0.9572], atol=5e-5)
    (uniform,) = weigh(weighting.uniform(2), norms)
    np.testing.assert_allclose(contribution_ratio(uniform, norms), 500, rtol=1e-4)
    np.testing.assert_allclose(contribution_ratio(root, norms), 22.36, rtol=1e-3)
    np.testing.assert_allclose(contribution_ratio(closed, norms), 1, rtol=1e-5)


def test_closed_form_for_three(weigh):
    np.testing.assert_allclose(
        weigh(weighting.inverse_share(3), [1, 2, 7])[0], [0.45, 0.40, 0.15], rtol=1e-6
    )


def test_closed_form_is_a_proportional_controller(weigh):
    norms = np.array([250, 0.5])
    share = norms / norms.sum()
    np.testing.assert_allclose(share, [0.998004, 0.001996], atol=5e-7)
    error = 1 / 2 - share
    np.testing.assert_allclose(error, [-0.498004, 0.498004], atol=5e-7)
    (weights,) = weigh(weighting.inverse_share(2), norms)
    np.testing.assert_allclose(weights, [0.001996, 0.998004], atol=5e-7)
    np.testing.assert_allclose(weights, 1 / 2 + error, atol=1e-6)


def test_closed_form_is_bounded_where_the_exact_rule_is_not(weigh):
    (bounded,) = weigh(weighting.inverse_share(3), [1, 1, 1e-3])
    np.testing.assert_allclose(bounded * np.array([1, 1, 1e-3]), [0.25, 0.25, 0.0005], rtol=2e-3)
    (exact,) = weigh(weighting.inverse_norm(3), [1, 1, 1e-3])
    np.testing.assert_allclose(exact * np.array([1, 1, 1e-3]), np.full(3, 0.000998), rtol=1e-3)


def test_powers(weigh):
    np.testing.assert_allclose(weigh(weighting.inverse_norm(3, power=0), [1, 5, 0])[0], 1 / 3)
    (weights,) = weigh(weighting.inverse_norm(3), [1, 2, 4])
    np.testing.assert_allclose(weights, np.array([4, 2, 1]) / 7, rtol=1e-6)


def test_a_zero_norm_takes_the_whole_weight_of_inverse_norm(weigh):
    np.testing.assert_array_equal(weigh(weighting.inverse_norm(3), [3, 0, 2])[0], [0, 1, 0])
    np.testing.assert_array_equal(weigh(weighting.inverse_norm(3), [3, 0, 0])[0], [0, 0.5, 0.5])


@pytest.mark.parametrize("rule", [weighting.inverse_share, weighting.inverse_norm])
def test_priorities_are_the_ratio_of_contributions(weigh, rule):
    norms = np.array([300, 0.7])
    (weights,) = weigh(rule(2, task_priorities=[3.0, 1.0]), norms)
    contributions = weights * norms
    np.testing.assert_allclose(contributions[0] / contributions[1], 3, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_inverse_norm_to_the_mean(weigh, power):
    """Each contribution is the mean norm at power 1; the sum is free, and equal norms weigh 1."""
    norms, priorities = np.array([300.0, 0.7, 9.0]), np.array([3.0, 1.0, 2.0])
    rule = weighting.inverse_norm(3, power=power, scale="mean")
    np.testing.assert_allclose(weigh(rule, norms)[0], (norms.mean() / norms) ** power, rtol=1e-5)
    np.testing.assert_array_equal(weigh(rule, [2.0] * 3)[0], rule.initial_weights)
    wanted = weighting.inverse_norm(3, power=power, scale="mean", task_priorities=priorities)
    expected = (norms.mean() / norms) ** power * priorities / 2
    np.testing.assert_allclose(weigh(wanted, norms)[0], expected, rtol=1e-5)
    present = jnp.array([True, True, False])
    two = [300.0, 0.7, 0.0]
    expected = [*(np.mean(two[:2]) / np.array(two[:2])) ** power, 0]
    np.testing.assert_allclose(weigh(rule, two, present=present)[0], expected, rtol=1e-5)


def test_inverse_norm_to_the_mean_at_the_edges(weigh):
    rule = weighting.inverse_norm(3, scale="mean")
    np.testing.assert_allclose(weigh(rule, [3.0, 0.0, 3.0])[0], [2 / 3, 1, 2 / 3], rtol=1e-6)
    np.testing.assert_array_equal(weigh(rule, [0.0] * 3)[0], 1)
    weights = weigh(rule, [3e38, 3e38, 1e-38])[0]
    assert np.all(np.isfinite(weights) & (weights > 0))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_absent_tasks_do_not_count(weigh, rule):
    present = jnp.array([True, False, True])
    (weights,) = weigh(rule(3), [4.0, 0.0, 1.0], present=present)
    (alone,) = weigh(rule(2), [4.0, 1.0])
    applied = np.where(present, weights, 0)  # uniform's are rescaled, the others' as they are
    np.testing.assert_allclose(applied / applied.sum(), [alone[0], 0, alone[1]], rtol=1e-6)


norms_of_tasks = st.sampled_from([2, 3, 8, 20]).flatmap(
    lambda k: hypothesis.extra.numpy.arrays(
        np.float32, k, elements=st.just(0.0) | st.floats(2.0**-100, 2.0**100, width=32)
    )
)


@functools.cache
def compiled_rule(name, num_tasks):
    rule = RULES[name](num_tasks)

    @jax.jit
    def weights_of(norms):
        stats = TaskStats(norms, None, None, jnp.ones(num_tasks, bool), jnp.int32(1))
        return rule.update(stats, rule.init())[0]

    return weights_of


@pytest.mark.parametrize("name", rest_slow(RULES, fast=list(RULES)[:2]))
@settings(max_examples=60)
@given(norms=norms_of_tasks, data=st.data())
def test_properties(name, norms, data):
    order = np.array(data.draw(st.permutations(range(len(norms)))))
    weights_of = compiled_rule(name, len(norms))
    weights = weights_of(norms)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-6)
    np.testing.assert_allclose(weights_of(norms[order]), weights[order], atol=1e-6)
    np.testing.assert_allclose(weights_of(norms / 16), weights, atol=1e-6)
    if name == "inverse_share":
        assert np.all(weights <= 1 / (len(norms) - 1) + 1e-6)


@pytest.mark.parametrize("rule", ["uniform", "inverse_norm"])
def test_one_task_gets_everything(weigh, rule):
    np.testing.assert_array_equal(weigh(RULES[rule](1), [3.0])[0], [1])


def test_rescaled(weigh):
    rule = weighting.rescaled(weighting.inverse_share(2), 2.0)
    np.testing.assert_array_equal(rule.initial_weights, [1, 1])
    (weights,) = weigh(rule, [1.0, 3.0])
    np.testing.assert_allclose(weights, [1.5, 0.5], rtol=1e-6)
    constant = weighting.rescaled(weighting.constant(2, [1.0, 3.0]), 1.0)
    np.testing.assert_allclose(constant.initial_weights, [0.25, 0.75], rtol=1e-6)


def test_rescaled_leaves_a_sum_of_zero_alone(weigh):
    (weights,) = weigh(weighting.rescaled(weighting.constant(2, [1.0, -1.0]), 1.0), [1.0, 1.0])
    np.testing.assert_array_equal(weights, [1, -1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weighting.inverse_norm(2, scale="sum"), "scale='sum' must be"),
        (lambda: weighting.uniform(0), "num_tasks=0 must be at least 1"),
        (lambda: weighting.uniform(2.0), "integer, got 2.0"),
        (lambda: weighting.uniform(jnp.int32(2)), "static_args"),
        (lambda: weighting.inverse_share(1), "num_tasks=1 must be at least 2"),
        (lambda: weighting.inverse_norm(2, power=-1), "power=-1"),
        (
            lambda: weighting.inverse_norm(2, task_priorities=[1.0]),
            r"shape \(2,\).*got shape \(1,\)",
        ),
        (lambda: weighting.inverse_share(2, task_priorities=[1.0, 0.0]), "positive and finite"),
        (lambda: weighting.constant(2, [1.0]), r"weights must have shape \(2,\)"),
        (lambda: weighting.constant(2, [1.0, np.nan]), "finite"),
        (lambda: weighting.constant(3), r"weights must be a vector.*got shape \(\)"),
        (lambda: weighting.constant([]), r"weights must be a vector.*got shape \(0,\)"),
        (lambda: weighting.constant([1.0], num_tasks=2), r"weights must have shape \(2,\)"),
        (lambda: weighting.constant(), "constant takes the weights"),
        (lambda: weighting.constant(2, [1.0, 2.0], num_tasks=2), "constant takes the weights"),
        (lambda: weighting.constant(2.0, [1.0, 2.0]), r"num_tasks must be an integer, got 2.0"),
        (lambda: weighting.rescaled(weighting.uniform(2), 0.0), "total=0.0"),
        (lambda: weighting.rescaled(weighting.uniform, 1.0), "Call the rule first"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rules_trace_once_under_jit():
    @jax.jit
    def weights_of(power, norms):
        rule = weighting.inverse_norm(2, power=power)
        stats = TaskStats(norms, None, None, jnp.ones(2, bool), jnp.int32(1))
        return rule.update(stats, rule.init())[0]

    np.testing.assert_allclose(weights_of(1.0, jnp.array([1.0, 3.0])), [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(weights_of(0.0, jnp.array([1.0, 3.0])), [0.5, 0.5], rtol=1e-6)
    assert weights_of._cache_size() == 1
