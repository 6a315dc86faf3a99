"""Priority-constrained descent: figures of TorchJD, the program in float64, limits, hard inputs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from gaba_jax import balance, weighting
from tests.slow import rest_slow
from tests.weighting.test_gramian import jacobians, measured, relative_error

FIRST = np.array([[3.0, 4, 0, 1], [-100, 0, 50, 10], [0.2, -0.5, 0.1, 0.3]])
SECOND = np.array([[1.0, -1, 2, 0], [30, 40, 0, -5], [-0.3, 0.1, -0.6, 0.2]])


@functools.cache
def compiled(num_tasks, primary=0, tau=0.02, beta=0.999):
    rule = weighting.pcd(num_tasks, primary=primary, tau=tau, beta=beta)
    return jax.jit(rule.update), rule.init


def solve(jacobian, present=None, **options):
    """The weights of a first update, as float64."""
    update, init = compiled(len(jacobian), **options)
    return np.asarray(update(measured(jacobian, present), init())[0], float)


def by_enumeration(jacobian, tau=0.02, primary=0):
    """The direction after a first update, in float64: the nearest of all sets of equations."""
    unit = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    goal, others = unit[primary], np.delete(unit, primary, axis=0)
    found = None
    for size in range(len(others) + 1):
        for held in itertools.combinations(range(len(others)), size):
            active = others[list(held)]
            multipliers = np.linalg.lstsq(active @ active.T, tau - active @ goal, rcond=None)[0]
            point = goal + multipliers @ active
            nearer = found is None or np.linalg.norm(point - goal) < np.linalg.norm(found - goal)
            if np.all(others @ point >= tau - 1e-9) and nearer:
                found = point
    found = goal if found is None else found
    return found * np.linalg.norm(jacobian[primary]) / np.linalg.norm(found)


def test_two_updates_have_the_weights_of_torchjd():
    """Of version 0.18, tau=0.1 and beta=0.9: the second update goes by the averages of both."""
    update, init = compiled(3, tau=0.1, beta=0.9)
    state = init()
    for jacobian, expected in [
        (FIRST, [1.3187591, 0.0421459, 6.093137]),
        (SECOND, [2.7407331, 0.0495565, 10.9759498]),
    ]:
        weights, state = update(measured(jacobian), state)
        np.testing.assert_allclose(weights, expected, rtol=2e-5)


@pytest.mark.parametrize("tau", rest_slow([0.0, 0.02, 0.5], fast=[0.02]))
def test_it_is_the_solution_of_the_program(tau):
    for seed in range(20):
        random = np.random.default_rng(seed)
        jacobian = random.normal(size=(4, 6))
        jacobian[1] -= 0.6 * jacobian[0]
        jacobian *= 10 ** random.uniform(-3, 3, size=(4, 1))
        for primary in (0, 2):
            actual = solve(jacobian, tau=tau, primary=primary) @ jacobian
            expected = by_enumeration(jacobian, tau, primary)
            assert relative_error(actual, expected) < 1e-4


def test_the_primary_gradient_alone_while_nothing_binds():
    jacobian = np.array([[3.0, 4.0, 0.0], [1.0, 1.0, 9.0], [1e3, 0.0, 0.0]])
    np.testing.assert_allclose(solve(jacobian), [1, 0, 0], atol=1e-6)


def test_secondary_tasks_make_the_progress_that_they_are_promised():
    """Whatever the scale of their losses, which changes nothing."""
    weights = solve(FIRST)
    direction, unit = weights @ FIRST, FIRST / np.linalg.norm(FIRST, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(direction), np.linalg.norm(FIRST[0]), rtol=1e-5)
    assert np.all(unit[1:] @ direction > 0)
    for scales in ([1, 1e6, 1e-9], [1e-12, 1, 1e12]):
        scaled = FIRST * np.c_[np.array(scales)]
        assert relative_error(solve(scaled) @ scaled, direction * scales[0]) < 1e-4


@pytest.mark.parametrize("tau", rest_slow([0.0, 0.02], fast=[0.02]))
def test_constraints_that_exclude_each_other_are_dropped(tau):
    """Two secondary gradients are opposed: no progress for both, but a way that hurts neither."""
    jacobian = np.array([[3.0, 4.0, 1.0], [1.0, 2.0, 0.0], [-10.0, -20.0, 0.0]])
    expected = jacobian[0]
    if tau == 0:
        across = np.array([2.0, -1.0, 0.0]) / np.sqrt(5)
        expected = expected @ across * across + [0, 0, 1]
        expected *= np.linalg.norm(jacobian[0]) / np.linalg.norm(expected)
    assert relative_error(solve(jacobian, tau=tau) @ jacobian, expected) < 1e-4


def test_an_opposed_primary_gradient():
    """With tau = 0 nothing is left; else what the secondary task is promised."""
    jacobian = np.array([[1.0, 0.0], [-2.0, 0.0]])
    np.testing.assert_array_equal(solve(jacobian, tau=0.0), [0, 0])
    np.testing.assert_allclose(solve(jacobian) @ jacobian, [-1, 0], atol=1e-4)


def test_one_task_zero_gradients_and_absent_tasks():
    np.testing.assert_allclose(solve(np.array([[3.0, 4.0]])), [1], rtol=1e-6)
    np.testing.assert_array_equal(solve(np.zeros((3, 2)), primary=1), [0, 1, 0])
    still = FIRST * np.array([[0], [1], [1]])
    np.testing.assert_array_equal(solve(still), [1, 0, 0])  # the update is zero
    without = FIRST * np.array([[1], [0], [1]])
    pair = FIRST[[0, 2]]
    np.testing.assert_allclose(solve(without)[[0, 2]], solve(pair), rtol=1e-5)
    absent = solve(FIRST, present=[True, False, True])
    np.testing.assert_allclose(absent, np.insert(solve(pair), 1, 0), rtol=1e-5)
    np.testing.assert_array_equal(solve(FIRST, present=[False, True, True]), [0, 0.5, 0.5])


def test_an_absent_task_keeps_its_average():
    update, init = compiled(3, beta=0.5)
    _, state = update(measured(FIRST), init())
    np.testing.assert_allclose(state.usual_norms, np.linalg.norm(FIRST, axis=1), rtol=1e-6)
    _, after = update(measured(SECOND, [True, False, True]), state)
    assert after.usual_norms[1] == state.usual_norms[1]
    assert after.mass[1] == state.mass[1] == 0.5
    squares = (FIRST[0] @ FIRST[0] + 2 * SECOND[0] @ SECOND[0]) / 3
    np.testing.assert_allclose(after.usual_norms[0], np.sqrt(squares), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_any_scale(scale):
    weights = solve(scale * FIRST)
    np.testing.assert_allclose(weights, solve(FIRST), rtol=1e-4)


def test_it_runs_in_balance_with_heads_of_their_own():
    tx = balance(weighting.pcd(2, primary=1), shared={"trunk": True, "head": False})
    plain = balance(
        weighting.pcd(2, primary=1),
        shared={"trunk": True, "head": False},
        weight_task_specific=False,
    )
    grads = {"trunk": jnp.array([[1.0, 1.0], [0.0, 2.0]]), "head": jnp.array([[5.0], [0.0]])}
    params = {"trunk": jnp.zeros(2), "head": jnp.zeros(1)}
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(state.task_weights, [0, 1], atol=1e-6)
    np.testing.assert_allclose(updates["head"], [0], atol=1e-6)
    updates, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    np.testing.assert_array_equal(updates["head"], [5])


@pytest.mark.slow
@given(jacobian=jacobians())
def test_gradients_of_any_rank_and_scale(jacobian):
    """Finite, not negative, and of the primary gradient's length or nothing."""
    weights = solve(jacobian)
    assert np.all(np.isfinite(weights))
    assert np.all(weights >= 0)
    length, primary = np.linalg.norm(weights @ jacobian), np.linalg.norm(jacobian[0])
    sizes = weights @ np.linalg.norm(jacobian, axis=1)
    assert length == pytest.approx(primary, abs=1e-3 * sizes) or np.all(weights == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"primary": 3}, r"primary=3 must be the number of a task, from 0 to 2"),
        ({"primary": True}, "primary=True must be an integer"),
        ({"primary": 1.0}, r"primary=1.0 must be an integer"),
        ({"tau": 1.5}, r"tau=1.5 must be in \[0, 1\]"),
        ({"beta": 1.0}, r"beta=1.0 must be in \[0, 1\)"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        weighting.pcd(3, **options)
