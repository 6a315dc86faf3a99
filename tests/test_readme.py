"""What the README says is so."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gaba_jax
from benchmarks import performance
from benchmarks._paths import PATHS
from benchmarks.turbofan_study import _page
from gaba_jax import gaba, weighting
from gaba_jax.weighting import TaskStats

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def settled(rule, norms, steps=3000):
    """The weights after many equal updates."""
    stats = TaskStats(
        jnp.asarray(norms, jnp.float32), None, None, jnp.ones(len(norms), bool), jnp.int32(1)
    )

    def step(state, _):
        weights, state = rule.update(stats, state)
        return state, weights

    return np.asarray(jax.lax.scan(step, rule.init(), length=steps)[1][-1])


@pytest.mark.parametrize("number", [0, 1])
def test_blocks_run_as_they_stand(number):
    code = [code for language, code in BLOCKS if language == "python"][number]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert len(code.splitlines()) <= (40, 10)[number]
    if number == 0:
        errors = [line.split(" error ")[1].split(",")[0] for line in ran.stdout.splitlines()]
        summed, balanced = np.array([each.split(" -> ") for each in errors], float).T
        assert len(summed) == 3
        assert (balanced[1:] < 0.6 * summed[1:]).all()  # those that the sum leaves
        assert balanced[0] < 1.2 * summed[0]


def test_it_is_short():
    assert len(README.splitlines()) <= 100
    assert len(README.split()) <= 1000
    table = README.split("## What there is\n")[1].split("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) == 10
    for row in rows:
        (link,) = re.findall(r"\]\(([^)#]+)", row)
        assert (ROOT / link).is_file()


def test_ci_runs_the_commands():
    script = (ROOT / ".ci" / "run").read_text()
    commands = [
        command.split("#")[0].strip()
        for language, block in BLOCKS
        if language == "bash"
        for line in block.splitlines()
        for command in line.split("#")[0].split("&&")
    ]
    assert {" ".join(command.split()[:2]) for command in commands} >= {
        "pip install",
        "gaba-jax train",
        "gaba-jax simulate",
        "pytest",
    }
    for command in commands:
        assert " ".join(command.split()[:2]) in script, command
    for extra in ('".[turbofan]"', '".[test]"'):
        assert f"pip install -e {extra}" in script


def test_every_name_in_the_table_exists():
    table = README.split("## What there is\n")[1].split("\n\n")[0]
    names = [
        name
        for row in table.splitlines()[2:]
        for name in re.findall(r"`([\w.]+)`", row.split("|")[1])
    ]
    assert len(names) > 10
    for name in names:
        value = gaba_jax
        if name.startswith("plot."):
            from gaba_jax import plot  # an extra, so not an attribute of the package

            assert hasattr(plot, name.removeprefix("plot."))
            continue
        for part in name.split("."):
            value = getattr(value, part)


def test_the_study_is_that_of_its_runs():
    tables, page = _page.tables(), _page.PAGE.read_text()
    for name, table in tables.items():
        assert _page.start(name) + table + _page.END in page, name


def test_what_the_study_recommends():
    """Chosen on validation engines, on every subset; and what is claimed of the test engines."""
    runs = _page.rows()

    def mean(subset, label, column):
        of_cell = [r for r in runs if (r["subset"], r["label"]) == (subset, label)]
        assert len(of_cell) == 5
        return np.mean([float(run[column]) for run in of_cell])

    labels = {run["label"] for run in runs}
    # The same loss and optimizer: the only thing that varies is the setting.
    settings = [n for n in labels if re.match("gaba(:|$)", n) and not re.search(", [bS]", n)]
    assert len(settings) > 8
    gains = []
    for subset in ("FD001", "FD002", "FD003", "FD004"):
        validation = {name: mean(subset, name, "validation_rmse") for name in settings}
        assert min(validation, key=validation.get) == _page.DEBIASED
        uniform, gaba_, debiased = (
            mean(subset, name, "rmse") for name in ("uniform", "gaba", _page.DEBIASED)
        )
        gains.append(uniform - debiased)
        assert 9 < 0.5 + mean(subset, "gaba", "contribution_ratio") < 12
        assert debiased < gaba_ + 0.1
    assert 0.05 < min(gains) < max(gains) < 0.5
    costs = [
        mean(subset, "gaba, b2=0.999", "rmse") - mean(subset, "uniform, b2=0.999", "rmse")
        for subset in ("FD003", "FD004")
    ]
    np.testing.assert_allclose(costs, [0.92, 1.40], atol=0.02)


def test_performance_is_that_of_the_script():
    for text, paths in ((README, performance.SHORT), (performance.PAGE.read_text(), PATHS)):
        assert performance.START + performance.section(paths) + performance.END in text


def test_limits():
    limits = (ROOT / "docs" / "explanation.md").read_text().partition("## Limits")[2]
    assert "(1, 1, 0.001) give contributions (0.25, 0.25, 0.0005)" in limits
    norms = np.array([1, 1, 0.001])
    closed = settled(weighting.inverse_share(3), norms, 1) * norms
    np.testing.assert_allclose(closed, [0.25, 0.25, 0.0005], rtol=2e-3)
    assert "(0.002, 0.998)\n  becomes (0.0477, 0.9523)" in limits
    published = settled(weighting.gaba(2), [0.998, 0.002])
    np.testing.assert_allclose(published, [0.0477, 0.9523], atol=5e-5)
    projected = settled(weighting.gaba(2, floor="project"), [0.998, 0.002])
    np.testing.assert_allclose(projected, [0.05, 0.95], atol=1e-6)
    assert "more than 19x" in limits
    assert "500x becomes 25x" in limits
    for ratio, left in [(18.9, 1), (500, 25)]:
        weights = settled(weighting.gaba(2), [ratio, 1])
        np.testing.assert_allclose(weights[0] * ratio / weights[1], left, rtol=5e-3)
    free = settled(weighting.gaba(2, min_weight=0.0), [500, 1])
    np.testing.assert_allclose(free[0] * 500 / free[1], 1, rtol=1e-3)


def test_clipping_before_gaba_works_on_the_stacked_gradients():
    """Half of the stated limit: the result differs from clipping after."""
    grads, params = {"w": jnp.array([[300.0, 0.0], [0.0, 1.0]])}, {"w": jnp.zeros(2)}
    before, after = (
        optax.chain(*parts)
        for parts in [
            (optax.clip_by_global_norm(1.0), gaba()),
            (gaba(), optax.clip_by_global_norm(1.0)),
        ]
    )
    wrong, _ = before.update(grads, before.init(params), params)
    right, _ = after.update(grads, after.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(right), 1, rtol=1e-5)
    assert optax.tree.norm(wrong) < 0.51
