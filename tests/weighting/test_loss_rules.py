"""The rules that are gradients of a function of the losses: each against jax.grad of it."""

import functools

import chex
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.scipy.special import logsumexp

from gaba_jax import balance, weighting
from gaba_jax.weighting import TaskStats
from tests.slow import rest_slow

PREFERENCES, IDEAL = jnp.array([0.5, 0.2, 0.3]), jnp.array([1.0, -2.0, 0.0])
SCALARISATIONS = {
    "geometric_mean": (
        weighting.geometric_mean(3),
        lambda losses: jnp.prod(losses) ** (1 / len(losses)),
    ),
    "scale_invariant": (weighting.scale_invariant(3), lambda losses: jnp.sum(jnp.log(losses))),
    "smooth_tchebycheff": (
        weighting.smooth_tchebycheff(3),
        lambda losses: logsumexp(losses / 3),
    ),
    "smooth_tchebycheff_with_options": (
        weighting.smooth_tchebycheff(3, mu=0.7, preferences=PREFERENCES, ideal=IDEAL),
        lambda losses: 0.7 * logsumexp(PREFERENCES * (losses - IDEAL) / 0.7),
    ),
}
every_scalarisation = pytest.mark.parametrize("name", SCALARISATIONS)
LOSSES = np.array([4.0, 0.3, 1.7], np.float32)


def stats_of(losses, present=None):
    losses = jnp.asarray(losses, jnp.float32)
    present = jnp.ones(losses.shape, bool) if present is None else jnp.asarray(present)
    return TaskStats(jnp.zeros_like(losses), None, losses, present, jnp.int32(1))


def weights_of(rule, losses, present=None):
    return rule.update(stats_of(losses, present), rule.init())[0]


@every_scalarisation
def test_weights_are_the_gradient_of_the_scalarisation(name):
    rule, scalarisation = SCALARISATIONS[name]
    for losses in (LOSSES, LOSSES[::-1], 10 * LOSSES):
        expected = jax.grad(scalarisation)(jnp.asarray(losses))
        np.testing.assert_allclose(weights_of(rule, losses), expected, rtol=1e-5)


@every_scalarisation
def test_the_first_weights_are_those_of_losses_on_which_the_rule_has_no_opinion(name):
    rule, _ = SCALARISATIONS[name]
    losses = IDEAL if name.endswith("options") else np.ones(3)
    np.testing.assert_allclose(rule.initial_weights, weights_of(rule, losses), rtol=1e-6)


def test_imtl_l_is_the_gradient_of_its_objective():
    s, losses = jnp.array([-1.3, 0.4]), jnp.array([7.0, 0.2])
    rule = weighting.imtl_l(2, weight_optimizer=optax.sgd(1.0))
    state = rule.init()._replace(log_variances=-s)
    weights, after = rule.update(stats_of(losses), state)

    def objective(losses, s):
        return jnp.sum(jnp.exp(s) * losses - s)

    of_losses, of_s = jax.grad(objective, argnums=(0, 1))(losses, s)
    np.testing.assert_allclose(weights, of_losses, rtol=1e-6)  # those from before the step
    np.testing.assert_allclose(s + after.log_variances, of_s, rtol=1e-6)


def test_imtl_l_makes_the_scaled_losses_equal(weigh):
    losses = jnp.array([50.0, 0.2])
    weights = weigh(weighting.imtl_l(2), [0.0, 0.0], 1500, losses=losses)
    np.testing.assert_array_equal(weights[0], [1, 1])
    np.testing.assert_allclose(weights[-1] * losses, [1, 1], rtol=1e-2)


@every_scalarisation
def test_an_absent_task_is_as_if_it_were_not_there(name):
    """What is applied is the gradient of the scalarisation of those present."""
    rule, _ = SCALARISATIONS[name]
    options = {"mu": 0.7, "preferences": PREFERENCES[:2], "ideal": IDEAL[:2]}
    two = {
        "geometric_mean": weighting.geometric_mean(2),
        "scale_invariant": weighting.scale_invariant(2),
        "smooth_tchebycheff": weighting.smooth_tchebycheff(2),
        "smooth_tchebycheff_with_options": weighting.smooth_tchebycheff(2, **options),
    }[name]
    tx, params, grads = balance(rule), jnp.zeros(2), jnp.ones((3, 2))
    state, losses = tx.init(params), jnp.array([4.0, 1.3, 17.0])
    mask = jnp.array([True, True, False])
    _, state = tx.update(grads, state, params, task_losses=losses, task_mask=mask)
    expected = weights_of(two, losses[:2])
    np.testing.assert_allclose(state.task_weights, [*expected, 0], rtol=1e-5)
    np.testing.assert_allclose(weights_of(rule, losses, present=mask), [*expected, 0], rtol=1e-5)


def test_a_loss_that_is_not_positive_has_weight_zero():
    losses = [4.0, 0.0, 1.0]
    np.testing.assert_allclose(
        weights_of(weighting.geometric_mean(3), losses), [2 / 8, 0, 2 / 2], rtol=1e-6
    )
    np.testing.assert_allclose(
        weights_of(weighting.scale_invariant(3), [4.0, -3.0, 1.0]), [1 / 4, 0, 1], rtol=1e-6
    )
    for rule in (weighting.geometric_mean(2), weighting.scale_invariant(2)):
        np.testing.assert_array_equal(weights_of(rule, [0.0, -1.0]), [0, 0])


def test_factors_on_the_losses_leave_the_weighted_losses_equal():
    for scale in (1e-18, 1e-3, 1e20):
        losses = LOSSES * np.array([scale, 1, 1], np.float32)
        product = weights_of(weighting.scale_invariant(3), losses) * losses
        np.testing.assert_allclose(product, np.ones(3), rtol=1e-6)
    losses = LOSSES * np.array([1e-9, 1, 1e20], np.float32)
    product = weights_of(weighting.geometric_mean(3), losses) * losses
    mean = np.prod(losses.astype(np.float64)) ** (1 / 3)
    np.testing.assert_allclose(product, np.full(3, mean / 3), rtol=1e-4)


def test_smooth_tchebycheff_between_the_maximum_and_the_mean():
    worst = weights_of(weighting.smooth_tchebycheff(3, mu=1e-30), LOSSES)
    np.testing.assert_allclose(worst, [1 / 3, 0, 0], rtol=1e-6)
    even = weights_of(weighting.smooth_tchebycheff(3, mu=1e30), LOSSES)
    np.testing.assert_allclose(even, np.full(3, 1 / 9), rtol=1e-6)
    level = weights_of(weighting.smooth_tchebycheff(3, mu=0.01), 1000 + 0.01 * LOSSES)
    np.testing.assert_allclose(
        level, jax.nn.softmax(LOSSES / 3) / 3, rtol=1e-2
    )  # losses of 1000 have steps of 6e-5
    below_zero = weights_of(weighting.smooth_tchebycheff(3, ideal=[-7.0] * 3), LOSSES - 7)
    np.testing.assert_allclose(
        below_zero, weights_of(weighting.smooth_tchebycheff(3), LOSSES), rtol=1e-5
    )


def test_mu_can_be_traced():
    @jax.jit
    def weights(mu):
        return weights_of(weighting.smooth_tchebycheff(3, mu=mu), LOSSES)

    expected = weights_of(weighting.smooth_tchebycheff(3, mu=0.3), LOSSES)
    np.testing.assert_allclose(weights(0.3), expected, rtol=1e-6)
    assert weights(2.0)[0] < expected[0]
    assert weights._cache_size() == 1


RULES = {
    "geometric_mean": weighting.geometric_mean,
    "scale_invariant": weighting.scale_invariant,
    "imtl_l": weighting.imtl_l,
    "smooth_tchebycheff": weighting.smooth_tchebycheff,
    "steep": functools.partial(weighting.smooth_tchebycheff, mu=1e-38),
    "offset": lambda k: weighting.smooth_tchebycheff(k, ideal=np.full(k, -3e38)),
}
losses_of_tasks = st.sampled_from([2, 3, 8]).flatmap(
    lambda k: hypothesis.extra.numpy.arrays(
        np.float32,
        k,
        elements=st.sampled_from([0.0, 1e-40, -1e-40, 1e-30, 1e30, -1e30, 3e38, -3e38])
        | st.floats(2.0**-100, 2.0**100, width=32)
        | st.floats(-(2.0**100), 2.0**-100, width=32),
    )
)


@functools.cache
def compiled_rule(name, num_tasks):
    rule = RULES[name](num_tasks)

    @jax.jit
    def two_updates(losses, present):
        stats = stats_of(losses, present)
        _, state = rule.update(stats, rule.init())
        return rule.update(stats, state)

    return two_updates


@pytest.mark.parametrize("name", rest_slow(RULES, fast=list(RULES)[:2]))
@settings(max_examples=60)
@given(losses=losses_of_tasks, data=st.data())
def test_properties(name, losses, data):
    """Finite for any losses, not negative, and no task is favoured for its place."""
    order = np.array(data.draw(st.permutations(range(len(losses)))))
    present = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(losses), max_size=len(losses)))
    )
    run = compiled_rule(name, len(losses))
    weights, state = run(losses, present)
    chex.assert_tree_all_finite((weights, state))
    assert np.all(weights >= 0)
    permuted, _ = run(losses[order], present[order])
    np.testing.assert_allclose(permuted, weights[order], rtol=1e-4, atol=1e-6 * weights.max())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weighting.geometric_mean(0), "num_tasks=0 must be at least 1"),
        (lambda: weighting.scale_invariant(2.0), "integer, got 2.0"),
        (lambda: weighting.imtl_l(1), "num_tasks=1 must be at least 2"),
        (lambda: weighting.imtl_l(2, weight_optimizer=0.1), r"optax optimizer.*got 0.1"),
        (lambda: weighting.smooth_tchebycheff(2, mu=0.0), "mu=0.0 must be positive and finite"),
        (
            lambda: weighting.smooth_tchebycheff(2, preferences=[1.0, 0.0]),
            "preferences must be positive and finite",
        ),
        (
            lambda: weighting.smooth_tchebycheff(2, ideal=[1.0]),
            r"ideal must have shape \(2,\).*got shape \(1,\)",
        ),
        (lambda: weighting.smooth_tchebycheff(2, ideal=[1.0, np.inf]), "ideal must be finite"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
