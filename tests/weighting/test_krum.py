"""Krum: figures of TorchJD, distances in float64, outliers, hard inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from gaba_jax import balance, weighting
from tests.weighting.test_gramian import jacobians, measured

JACOBIAN = np.array(
    [[1.0, 2, 0], [1.1, 2, 0.2], [0.9, 2.2, 0], [-30, 40, 5], [1.3, 1.8, -0.4], [2, 2, 2]]
)


@functools.cache
def compiled(num_tasks, num_byzantine=1, num_selected=1):
    rule = weighting.krum(num_tasks, num_byzantine=num_byzantine, num_selected=num_selected)
    return jax.jit(lambda stats: rule.update(stats, rule.init())[0])


def solve(jacobian, present=None, **options):
    return np.asarray(compiled(len(jacobian), **options)(measured(jacobian, present)))


def by_hand(jacobian, num_byzantine=1, num_selected=1):
    """In float64, from the gradients themselves."""
    distances = np.linalg.norm(jacobian[:, None] - jacobian, axis=2)
    near = max(len(jacobian) - num_byzantine - 2, 1)
    scores = np.sort(distances, axis=1)[:, 1 : near + 1].sum(axis=1)
    weights = np.zeros(len(jacobian))
    weights[np.argsort(scores, kind="stable")[:num_selected]] = 1 / num_selected
    return weights


@pytest.mark.parametrize(
    ("num_byzantine", "num_selected", "expected"),
    [
        (0, 1, [1, 0, 0, 0, 0, 0]),
        (1, 2, [1 / 2, 1 / 2, 0, 0, 0, 0]),
        (2, 3, [1 / 3, 1 / 3, 1 / 3, 0, 0, 0]),
        (2, 1, [1, 0, 0, 0, 0, 0]),
    ],
)
def test_it_selects_what_torchjd_selects(num_byzantine, num_selected, expected):
    """Of version 0.18."""
    options = {"num_byzantine": num_byzantine, "num_selected": num_selected}
    np.testing.assert_allclose(solve(JACOBIAN, **options), expected, rtol=1e-6)
    np.testing.assert_allclose(by_hand(JACOBIAN, **options), expected, rtol=1e-6)


@pytest.mark.parametrize(("num_byzantine", "num_selected"), [(1, 1), (2, 4)])
def test_it_is_that_of_the_distances(num_byzantine, num_selected):
    for seed in range(20):
        jacobian = np.random.default_rng(seed).normal(size=(8, 5))
        options = {"num_byzantine": num_byzantine, "num_selected": num_selected}
        np.testing.assert_allclose(
            solve(jacobian, **options), by_hand(jacobian, **options), rtol=1e-6
        )


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_outliers_have_no_weight(scale):
    """However far away they are, and where they agree with one another."""
    random = np.random.default_rng(0)
    jacobian = 1 + 0.1 * random.normal(size=(8, 5))
    jacobian[[2, 5]] = 1e3
    weights = solve(scale * jacobian, num_byzantine=2, num_selected=4)
    assert weights[2] == weights[5] == 0
    np.testing.assert_allclose(weights, by_hand(jacobian, 2, 4), rtol=1e-6)


def test_absent_tasks_are_no_neighbours():
    present = np.array([True, False, True, True, True, True])
    weights = solve(JACOBIAN, present, num_selected=2)
    expected = np.insert(by_hand(JACOBIAN[present], num_selected=2), 1, 0)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    two = np.arange(6) >= 4  # fewer than are to be selected: all of them
    np.testing.assert_allclose(solve(JACOBIAN, two, num_selected=3), two / 2, rtol=1e-6)


@pytest.mark.parametrize("num_tasks", [1, 2, 3])
def test_few_tasks(num_tasks):
    """Each has its nearest one alone."""
    np.testing.assert_allclose(solve(JACOBIAN[:num_tasks]), by_hand(JACOBIAN[:num_tasks]))
    np.testing.assert_allclose(solve(np.zeros((num_tasks, 2))), 1 / num_tasks)


def test_a_zero_gradient_is_a_point_like_any_other():
    jacobian = np.array([[0.0, 0], [1, 0], [0, 1], [-1, 0], [50, 50]])
    np.testing.assert_array_equal(solve(jacobian), [1, 0, 0, 0, 0])


def test_the_update_in_balance():
    tx = balance(weighting.krum(6, num_selected=2))
    grads = jnp.asarray(JACOBIAN, jnp.float32)
    updates, _ = jax.jit(tx.update)(grads, tx.init(jnp.zeros(3)))
    np.testing.assert_allclose(updates, JACOBIAN[:2].mean(axis=0), rtol=1e-6)


@pytest.mark.slow
@given(jacobian=jacobians())
def test_gradients_of_any_rank_and_scale(jacobian):
    weights = solve(jacobian, num_selected=2)
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
    assert set(weights) <= ({0.0, 0.5} if np.any(jacobian) else {np.float32(1 / len(jacobian))})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_byzantine": -1}, "num_byzantine=-1 must be at least 0"),
        ({"num_byzantine": 0.5}, r"num_byzantine=0.5 must be an integer"),
        ({"num_selected": 0}, "num_selected=0 must be from 1 to num_tasks=4"),
        ({"num_selected": 5}, "num_selected=5 must be from 1 to num_tasks=4"),
        ({"num_selected": True}, "num_selected=True must be an integer"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        weighting.krum(4, **options)
