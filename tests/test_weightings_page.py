"""What docs/weightings.md says of the rules is so."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import weightings_page
from gaba_jax import weighting
from gaba_jax.turbofan.config import rules
from gaba_jax.weighting import TaskStats
from tests.slow import rest_slow

PAGE = weightings_page.PAGE.read_text()
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
        weights, state = rule.update(TaskStats(*stats, jnp.ones(K, bool), jnp.int32(1)), state)
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
    assert make(name).needs == (set() if needs == "-" else set(needs.split(", ")))
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
        direction = weights @ jacobians[-1]
        cosines = jacobians[-1] @ direction / np.linalg.norm(jacobians[-1], axis=1)
        opposed_none = np.all(cosines > -1e-5 * np.linalg.norm(direction))
        if "conflict-free" in claims:
            assert opposed_none
        if "scale-invariant" in claims:
            scales = np.array([1.0, 1e3, 1.0])
            scaled = jacobians * scales[:, None]
            other = weigh(name, scaled, losses * scales) @ scaled[-1]
            lengths = np.linalg.norm(direction) * np.linalg.norm(other)
            np.testing.assert_allclose(direction @ other / lengths, 1, rtol=1e-4)
    assert claims <= {
        "-",
        "non-negative",
        "conflict-free",
        "conflict-free for K = 2",
        "scale-invariant",
    }


def test_the_runs_are_hard_enough_to_tell():
    """Uniform weights oppose a task in them, so that being conflict-free means something."""
    found = []
    for jacobians, losses in runs():
        direction = weigh("uniform", jacobians, losses) @ jacobians[-1]
        found.append(np.min(jacobians[-1] @ direction) < 0)
    assert any(found)


def test_measured_tables():
    for start, table in weightings_page.tables().items():
        assert start + table + weightings_page.END in PAGE
    losses = json.loads(weightings_page.RESULT.read_text())["losses"]
    assert list(losses) == list(rules())


# Of the rules on norms, on cosines and on losses.
@pytest.mark.parametrize("name", rest_slow(rules(), fast=["gaba", "upgrad", "famo"]))
def test_a_real_training_run(name):
    """The golden two-layer problem, 200 steps, as in the table."""
    expected = json.loads(weightings_page.RESULT.read_text())["losses"][name]
    np.testing.assert_allclose(weightings_page.final_losses(name), expected, rtol=2e-2)
