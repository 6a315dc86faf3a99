"""What docs/weightings.md says of the rules is so, and the tables of the page beside it."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from benchmarks import weightings_page
from benchmarks._measure import of_elements
from gaba_jax import weighting
from gaba_jax.turbofan.config import rules
from gaba_jax.weighting import TaskStats
from tests.slow import rest_slow

PAGE = weightings_page.PAGE.with_name("weightings.md").read_text()
MEASURED = weightings_page.PAGE.read_text()
ROWS = {
    cells[0].strip("`"): cells[2:]
    for line in PAGE.splitlines()
    if (cells := [cell.strip() for cell in line.strip("|").split("|")]) and len(cells) == 5
}
NAMES = [name for name in ROWS if hasattr(weighting, name)]
K = 3


def make(name):
    if name == "constant":
        return weighting.constant(K, [1.0, 2.0, 3.0])
    options = {"gaba": {"warmup_steps": 0}}.get(name, {})
    return getattr(weighting, name)(K, **options)


def weigh(name, jacobians, losses):
    """The weights after a few updates of the rule."""
    rule = make(name)
    state = rule.init()
    for jacobian, loss in zip(jacobians, losses, strict=True):
        norms = np.linalg.norm(jacobian, axis=1)
        cosines = jacobian @ jacobian.T / np.outer(norms, norms)
        stats = (jnp.asarray(x, jnp.float32) for x in (norms, cosines, loss))
        extra = of_elements(jacobian)
        stats = TaskStats(*stats, jnp.ones(K, bool), jnp.int32(1), extra)
        weights, state = rule.update(stats, state)
    return np.asarray(weights, float)


def runs(count=4):
    """Jacobians in conflict, with norms apart, and losses."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        jacobians = random.normal(size=(3, K, 6)) * np.array([100, 1, 10])[:, None]
        jacobians[:, 1] -= 0.02 * jacobians[:, 0]
        yield jacobians, random.uniform(0.1, 10, size=(3, K))


def test_every_rule_has_a_row():
    assert set(NAMES) == {*rules(), "constant"}


@pytest.mark.parametrize(
    "name", rest_slow(NAMES, fast=["gaba", "gradnorm", "upgrad", "pcgrad", "famo", "random"])
)
def test_needs_sum_and_guarantees(name):
    needs, total, guarantees = ROWS[name]
    found = {need if isinstance(need, str) else need.name for need in make(name).needs}
    assert found == (set() if needs == "-" else set(needs.split(", ")))
    claims = set(re.split("[,;] ", guarantees))
    for jacobians, losses in runs():
        weights = weigh(name, jacobians, losses)
        sum_ = np.sum(weights)
        if total in ("1", "K", "1/K"):
            np.testing.assert_allclose(sum_, {"1": 1, "K": K, "1/K": 1 / K}[total], rtol=1e-5)
        elif total.startswith("≥"):
            assert sum_ >= {"1": 1, "K": K}[total.removeprefix("≥ ")] - 1e-5
        if "non-negative" in claims:
            assert np.all(weights >= 0)
    assert claims <= {
        "-",
        "non-negative",
        "conflict-free",
        "conflict-free for K = 2",
        "scale-invariant",
        "conflict-free if independent",
        "scale-invariant if independent",
        "scale-invariant if solvable",
    }


def kinds(seed):
    """Gradients [K, n] by what they are to each other."""
    random = np.random.default_rng(seed)

    def normal(n):
        return random.normal(size=(K, n))

    opposed, stationary = normal(6), normal(6)
    opposed[1] = -opposed[0] + 1e-2 * random.normal(size=6)
    stationary[-1] = -random.uniform(0.5, 2, size=K - 1) @ stationary[:-1]
    return {
        "independent": normal(6),
        "dependent": normal(K - 1),
        "parallel": normal(6)[0] + 1e-3 * normal(6),
        "opposed": opposed,
        "stationary": stationary,
        "apart": normal(6) * np.array([1e6, 1, 1e3])[:, None],
    }


INDEPENDENT = {"independent", "parallel", "apart"}


def is_solvable(jacobian):
    """Whether some direction improves all tasks: the best of a box does, by a linear program."""
    unit = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    columns = unit.shape[1]
    best = scipy.optimize.linprog(
        [*np.zeros(columns), -1],
        A_ub=np.c_[-unit, np.ones(K)],
        b_ub=np.zeros(K),
        bounds=[(-1, 1)] * columns + [(None, None)],
    )
    return -best.fun > 1e-6


@pytest.mark.parametrize(
    "name", rest_slow(NAMES, fast=["config", "inverse_norm", "famo", "upgrad"])
)
def test_guarantees_on_gradients_of_every_kind(name):
    """What fails here is no guarantee, and goes from the table."""
    claims = set(re.split("[,;] ", ROWS[name][2]))
    for seed in range(8):
        losses = np.random.default_rng(100 + seed).uniform(0.1, 10, size=(1, K))
        for kind, jacobian in kinds(seed).items():
            weights = weigh(name, [jacobian], losses)
            direction, norms = weights @ jacobian, np.linalg.norm(jacobian, axis=1)
            if "non-negative" in claims:
                assert np.all(weights >= 0)
            gains = jacobian @ direction / norms
            if "conflict-free" in claims or (
                "conflict-free if independent" in claims and kind in INDEPENDENT
            ):
                assert np.all(gains >= -1e-6 * np.sum(np.abs(weights) * norms)), kind
            if (
                "scale-invariant" in claims
                or ("scale-invariant if independent" in claims and kind in INDEPENDENT)
                or ("scale-invariant if solvable" in claims and is_solvable(jacobian))
            ):
                scales = np.array([1.0, 1e3, 1.0])
                scaled = jacobian * scales[:, None]
                other = weigh(name, [scaled], losses * scales) @ scaled
                lengths = np.linalg.norm(direction) * np.linalg.norm(other)
                np.testing.assert_allclose(direction @ other / lengths, 1, rtol=1e-4)


def test_config_opposes_a_task_of_dependent_gradients():
    """The example of its documentation, in which (-.83, .56) improves all four by .12 or more."""
    jacobian = np.array([[-0.9, 0.7], [0.4, 0.8], [-0.9, -1.1], [0.5, 1.0]])
    norms = np.linalg.norm(jacobian, axis=1)
    cosines = jacobian @ jacobian.T / np.outer(norms, norms)
    rule, stats = weighting.config(4), (jnp.asarray(x, jnp.float32) for x in (norms, cosines))
    weights, _ = rule.update(TaskStats(*stats, None, jnp.ones(4, bool), jnp.int32(1)), rule.init())
    direction = np.asarray(weights) @ jacobian
    gains = jacobian @ direction / norms / np.linalg.norm(direction)
    np.testing.assert_allclose(gains.min(), -0.11, atol=0.005)


def test_the_runs_are_hard_enough_to_tell():
    """Uniform weights oppose a task in them, so that being conflict-free means something."""
    found = []
    for jacobians, losses in runs():
        direction = weigh("uniform", jacobians, losses) @ jacobians[-1]
        found.append(np.min(jacobians[-1] @ direction) < 0)
    assert any(found)


def test_measured_tables():
    for start, table in weightings_page.tables().items():
        assert start + table + weightings_page.END in MEASURED
    losses = json.loads(weightings_page.RESULT.read_text())["losses"]
    assert list(losses) == list(rules())


# Of the rules on norms, on cosines and on losses.
@pytest.mark.parametrize("name", rest_slow(rules(), fast=["upgrad"]))
def test_a_real_training_run(name):
    """The golden two-layer problem, 200 steps, as in the table."""
    expected = json.loads(weightings_page.RESULT.read_text())["losses"][name]
    np.testing.assert_allclose(weightings_page.final_losses(rules()[name](2)), expected, rtol=2e-2)
