"""What the README says is so."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gaba_jax
from benchmarks import performance, turbofan
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


def test_quickstart_runs():
    quickstart, balanced = (code for language, code in BLOCKS if language == "python")
    names = {
        "params": {"backbone": jnp.ones((3, 2)), "a": jnp.ones(2), "b": jnp.ones(2)},
        "batch": (jnp.ones((4, 3)),),
        "losses_fn": lambda p, x: (
            500 * jnp.mean(jnp.tanh(x @ p["backbone"]) @ p["a"]),
            jnp.mean(jnp.tanh(x @ p["backbone"]) @ p["b"]),
        ),
    }
    before = names["params"]
    exec(quickstart, names)
    np.testing.assert_array_equal(optax.tree.get(names["opt_state"], "task_weights"), [0.5, 0.5])
    assert all((names["params"][key] != before[key]).any() for key in before)
    expected, names["params"], names["tx"] = names["updates"], before, optax.adamw(1e-3)
    names |= {"balanced_value_and_grad": gaba_jax.balanced_value_and_grad, "weighting": weighting}
    exec(balanced, names)
    np.testing.assert_array_equal(names["state"].task_weights, [0.5, 0.5])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), names["updates"], expected
    )


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
    table = README.split("## What there is")[1].split("\n\n")[1]
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


def test_results_are_those_of_the_script():
    result = json.loads(turbofan.RESULT.read_text())
    assert turbofan.table(result) in README


def test_performance_is_that_of_the_script():
    assert performance.START + performance.section() + performance.END in README


def test_limits():
    assert "(1, 1, 0.001) give contributions (0.25, 0.25, 0.0005)" in README
    norms = np.array([1, 1, 0.001])
    closed = settled(weighting.inverse_share(3), norms, 1) * norms
    np.testing.assert_allclose(closed, [0.25, 0.25, 0.0005], rtol=2e-3)
    assert "(0.002, 0.998)\n  becomes (0.0477, 0.9523)" in README
    published = settled(weighting.gaba(2), [0.998, 0.002])
    np.testing.assert_allclose(published, [0.0477, 0.9523], atol=5e-5)
    projected = settled(weighting.gaba(2, floor="project"), [0.998, 0.002])
    np.testing.assert_allclose(projected, [0.05, 0.95], atol=1e-6)
    assert "more than 19x" in README
    assert "500x becomes 25x" in README
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
