"""An absent task is as if there were no such task: what is applied to the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaba_jax import balance, balanced_value_and_grad, weighting
from gaba_jax.turbofan.config import rules
from tests.slow import rest_slow

# The last three have a negative sum of weights under `config`.
JACOBIAN = jnp.array([[9.0, -4.0, 2.0], [0.3, 0.8, 0.3], [-1.3, 0.9, 0.4], [-0.5, 0.6, 0.4]])
LOSSES = jnp.array([7.0, 3.0, 0.5, 1.0])
PRESENT = np.array([False, True, True, True])
NAMES = sorted(set(rules()) | {"constant"})
# These draw one number or order a task, so that what they draw for four says nothing of three.
DRAW = {"gradvac", "pcgrad", "random"}
# These average each task by itself, so that loaders of one task a batch add up: what K they are
# for shows.
AVERAGES = {"equalize", "ntk"}
# The first task is the reference here: without it nothing is learned.
REFERENCE = {"lr_annealing"}
# The others' weights follow from their past, and equal those of the smaller rule in the first
# update alone.
REMEMBER = {
    *("dynamic_weight_average", "famo", "gaba", "gradnorm", "imtl_l", "inverse_dirichlet"),
    *("proportional_integral", "uncertainty"),
}


def make(name, tasks):
    if name == "constant":
        return weighting.constant(len(tasks), np.array([5.0, 1.0, 2.0, 3.0])[tasks])
    if name == "pcd":  # the third of the four is the primary task, whoever else is there
        return weighting.pcd(len(tasks), primary=int(np.flatnonzero(tasks == 2)[0]))
    return rules()[name](len(tasks))


def updated(rule, tasks, present, updates=1):
    tx, params = balance(rule), jnp.zeros(3)
    update = jax.jit(functools.partial(tx.update, task_losses=LOSSES[tasks]))
    state = tx.init(params)
    for _ in range(updates):
        _, state = update(JACOBIAN[tasks], state, params, task_mask=jnp.array(present))
    return state


@pytest.mark.parametrize(
    "name",
    rest_slow(sorted(set(NAMES) - DRAW - AVERAGES - REFERENCE), fast=["config", "constant"]),
)
def test_the_present_have_the_weights_of_the_rule_of_that_many(name):
    tasks, alone = np.arange(4), np.flatnonzero(PRESENT)
    updates = 1 if name in REMEMBER else 2
    smaller = updated(make(name, alone), alone, [True] * 3, updates).task_weights
    state = updated(make(name, tasks), tasks, PRESENT, updates)
    np.testing.assert_allclose(state.task_weights, [0, *smaller], rtol=2e-4, atol=1e-6)
    if name == "config":
        assert state.task_weights.sum() < -0.5
    if make(name, tasks).least_present == 2:  # one alone gets the whole sum, and nothing is learned
        state, one = updated(make(name, tasks), tasks, np.arange(4) == 2), np.arange(4) == 2
        total = np.sum(make(name, tasks).initial_weights)
        np.testing.assert_allclose(state.task_weights, np.where(one, total, 0), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(DRAW - {"random"}))
def test_the_surgery_of_two_is_that_of_a_rule_of_two(name):
    """Of two the order does not matter; the weights are those of a sum of two, not of four."""
    two = np.array([1, 2])
    smaller = updated(make(name, two), two, [True] * 2).task_weights
    state = updated(make(name, np.arange(4)), np.arange(4), np.isin(np.arange(4), two))
    np.testing.assert_allclose(state.task_weights, [0, *smaller, 0], rtol=1e-5)


def test_one_present_task_gets_the_whole_sum():
    state = updated(weighting.inverse_norm(4), np.arange(4), np.arange(4) == 2)
    np.testing.assert_allclose(state.task_weights, [0, 0, 1, 0], rtol=1e-6)
    assert state.since_measured == 0


@pytest.mark.parametrize("how", rest_slow(["held", "lagged"], fast=["held"]))
def test_held_and_lagged_updates_restrict_the_last_weights(how):
    """Of a free sum as well: the third task's last weight is not lost, and not handed on."""

    def losses_fn(params):
        return (*tuple(JACOBIAN[1:3] @ params), 300 * JACOBIAN[3] @ params)

    rule = weighting.nash_mtl(3)
    options = {"every": 2} if how == "held" else {"measure": "lagged"}
    balanced = balanced_value_and_grad(losses_fn, rule, **options)
    params, mask = jnp.ones(3), jnp.array([True, True, False])
    _, first = balanced.value_and_grad(params, balanced.init(params))
    _, second = balanced.value_and_grad(params, first, task_mask=mask)
    last = np.asarray(first.next_task_weights)
    np.testing.assert_allclose(
        second.task_weights, [*last[:2] * last.sum() / last[:2].sum(), 0], rtol=1e-5
    )


def test_what_a_rule_without_memory_returns_next_keeps_the_sum():
    """The absent task keeps its last weight; the others have the rest, however little that is."""
    tx, params = balance(weighting.nash_mtl(3)), jnp.zeros(2)
    quiet = jnp.array([[300.0, 400.0], [20.0, -10.0], [0.0, 1e-3]])
    _, first = tx.update(quiet, tx.init(params), params)
    mask = jnp.array([True, True, False])
    _, state = tx.update(quiet, first, params, task_mask=mask)
    assert state.next_task_weights[2] == first.next_task_weights[2]
    assert (state.next_task_weights[:2] > 0).all()
    ratio = state.next_task_weights[0] / state.next_task_weights[1]
    np.testing.assert_allclose(ratio, state.task_weights[0] / state.task_weights[1], rtol=1e-5)
