"""Whole training runs in which something goes wrong, and the page that says what then happens."""

import ast
import functools
import gc
import pathlib
import resource
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaba_jax import (
    BalancedGradient,
    balance,
    balanced_value_and_grad,
    task_value_and_grad,
    weighting,
)
from tests.debugging import MODES
from tests.slow import rest_slow
from tests.soak import SOAK

K = 2
STEPS = 1_000
ROUNDS = 10 if SOAK else 1  # of the soak
RANDOM = np.random.default_rng(0)
XS = RANDOM.normal(size=(STEPS, 8, 4)).astype(np.float32)
ONES = np.ones((STEPS, K), np.float32)
PARAMS = {
    "trunk": RANDOM.normal(size=(4, 6)).astype(np.float32),
    "loud": RANDOM.normal(size=6).astype(np.float32),
    "quiet": RANDOM.normal(size=6).astype(np.float32),
}
BETA = 0.9
GABA = weighting.gaba(K, beta=BETA, warmup_steps=20)
FLOORED = 0.05 / 1.05  # what the published floor leaves the smaller of two weights


def losses_fn(params, x, scales):
    """Two regressions 300x apart; ``scales`` is what goes wrong with their losses."""
    h = jnp.tanh(x @ params["trunk"])
    loud = 300 * jnp.mean((h @ params["loud"] - x[:, 0]) ** 2)
    quiet = jnp.mean((h @ params["quiet"] - jnp.sin(x[:, 1])) ** 2)
    return scales[0] * loud, scales[1] * quiet


def make_driver(name, losses_fn=losses_fn, rule=GABA, **options):
    """Each driver as a ``BalancedGradient``; under the usual rule made once, as is its run."""
    if rule is GABA:
        return make_usual_driver(name, losses_fn, **options)
    return make_driver_afresh(name, losses_fn, rule, **options)


@functools.cache
def make_usual_driver(name, losses_fn, **options):
    return make_driver_afresh(name, losses_fn, GABA, **options)


def make_driver_afresh(name, losses_fn, rule, **options):
    if name != "balance":
        return balanced_value_and_grad(losses_fn, rule, measure=name, **options)
    tx = balance(rule, **options)

    def value_and_grad(params, state, *batch, task_mask=None):
        losses, grads = task_value_and_grad(losses_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, task_mask=task_mask)
        return (losses, updates), state

    return BalancedGradient(tx.init, value_and_grad)


every_driver = pytest.mark.parametrize(
    "name", rest_slow(["balance", "exact", "lagged"], fast=["exact"])
)

SKIP = optax.apply_if_finite(optax.adam(1e-2), STEPS)
ADAM = optax.adam(1e-2)
CLIP = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def make_step(driver, tx):
    def step(carry, x, scales, mask=None):
        params, state, opt_state = carry
        (losses, grads), state = driver.value_and_grad(params, state, x, scales, task_mask=mask)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), losses

    return step


def start(driver, tx, params=PARAMS):
    params = jax.tree.map(jnp.array, params)
    return params, driver.init(params), tx.init(params)


@functools.cache
def make_run(driver, tx=ADAM):
    """``(scales, xs, mask, params)`` -> parameters and state; losses, next weights [STEPS, K]."""
    step = make_step(driver, tx)

    def record(carry, now):
        carry, losses = step(carry, *now)
        return carry, (losses, carry[1].next_task_weights)

    @jax.jit
    def run(first, series):
        (params, state, _), seen = jax.lax.scan(record, first, series)
        return params, state, *seen

    def train(scales=ONES, xs=XS, mask=None, params=PARAMS):
        return run(start(driver, tx, params), (xs, scales, mask))

    return train


def choose_steps(number, seed=1):
    """[STEPS] bool with that many at random."""
    return np.random.default_rng(seed).permutation(STEPS) < number


def with_faults(steps, tasks, value):
    """Scales of 1, but ``value`` at these steps for these tasks."""
    return np.where(steps[:, None] & np.isin(np.arange(K), tasks), np.float32(value), ONES)


FAULTY = [[0], [1], [0, 1]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@every_driver
def test_propagated_nonfinite_updates_are_as_if_they_had_not_been(name, value):
    bad, train = choose_steps(STEPS // 10), make_run(make_driver(name), SKIP)
    *expected, _, expected_weights = train(ONES[~bad], XS[~bad])
    for tasks in FAULTY:
        params, state, _, weights = train(with_faults(bad, tasks, value))
        assert state.nonfinite_count == STEPS // 10
        state = state._replace(nonfinite_count=jnp.int32(0))
        chex.assert_trees_all_close([params, state], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(weights[~bad], expected_weights, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", rest_slow(["balance", "lagged"], fast=["balance"]))
def test_dropped_nonfinite_tasks_are_as_if_they_were_absent(name, value):
    bad, train = choose_steps(STEPS // 10), make_run(make_driver(name))
    train_with_drop = make_run(make_driver(name, nonfinite="drop"))
    for tasks in FAULTY:
        params, state, _, weights = train_with_drop(with_faults(bad, tasks, value))
        mask = with_faults(bad, tasks, 0).astype(bool)
        *expected, _, expected_weights = train(mask=mask)
        assert state.nonfinite_count == STEPS // 10
        state = state._replace(nonfinite_count=jnp.int32(0))
        chex.assert_tree_all_finite(expected)
        chex.assert_trees_all_close([params, state], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


@every_driver
def test_a_loss_spike_moves_the_weights_by_one_step_of_the_average(name):
    spiked, last = choose_steps(STEPS // 100), slice(-STEPS // 5, None)
    train, unclipped = (make_run(make_driver(name), tx) for tx in (CLIP, ADAM))
    raw = make_run(make_driver(name, rule=weighting.inverse_share(K)), CLIP)
    calm = np.mean(train()[2][last], axis=0)
    for task in range(K):
        scales = with_faults(spiked, [task], 1e6)
        *_, losses, weights = train(scales)
        assert np.max(np.abs(np.diff(weights, axis=0))) <= 1 - BETA + 1e-6
        np.testing.assert_allclose(np.mean((losses / scales)[last], axis=0), calm, rtol=0.1)
        damage = np.mean((unclipped(scales)[2] / scales)[last], axis=0) / calm
        assert np.all(damage > 3)  # what clipping spares the model
    assert np.max(np.abs(np.diff(raw(scales)[-1], axis=0))) > 0.8  # and the average the weights


@every_driver
def test_a_task_that_ends_leaves_the_floor_to_the_other(name):
    over, train = np.arange(STEPS) >= STEPS // 2, make_run(make_driver(name))
    first, second = [1 - FLOORED, FLOORED], [FLOORED, 1 - FLOORED]
    for ended, expected in zip(FAULTY, [first, second, [0.5, 0.5]], strict=True):
        params, state, _, weights = train(with_faults(over, ended, 0))
        chex.assert_tree_all_finite((params, state, weights))
        np.testing.assert_allclose(state.task_weights, expected, rtol=1e-5)
        assert state.nonfinite_count == 0


@every_driver
def test_a_task_that_ends_and_is_masked_leaves_all_to_the_other(name):
    over, train = np.arange(STEPS) >= STEPS // 2, make_run(make_driver(name))
    for ended in FAULTY:
        scales = with_faults(over, ended, 0)
        params, state, _, weights = train(scales, mask=scales > 0)
        chex.assert_tree_all_finite((params, state))
        np.testing.assert_allclose(state.task_weights, scales[-1], rtol=1e-6)
        held = weights[STEPS // 2 - 1 :]
        np.testing.assert_array_equal(held, np.broadcast_to(held[0], held.shape))


def narrow(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float16), tree)


def losses_in_float16(params, x, scales):
    h = jnp.tanh(x @ params["trunk"])
    targets = {"loud": x[:, 0], "quiet": jnp.sin(x[:, 1])}
    errors = [(h @ params[key]).astype(jnp.float32) - y for key, y in targets.items()]
    return tuple(scales[i] * jnp.mean(error**2) for i, error in enumerate(errors))


@pytest.mark.slow
@every_driver
def test_float16_with_dynamic_loss_scaling_has_the_weights_of_the_unscaled_run(name):
    """Losses so small that float16 loses their gradients unless they are scaled."""
    rule = weighting.gaba(K, beta=BETA, warmup_steps=20, min_weight=0.0)
    small, tx = np.float32([3e-6, 1e-6]), optax.adam(1e-2, eps=1e-15)
    driver = make_driver(name, losses_in_float16, rule)

    def step(carry, x, dynamic):
        params, before, opt_state, scale, good = carry
        (_, grads), state = driver.value_and_grad(narrow(params), before, narrow(x), scale * small)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)
        # A task may overflow by itself where the weighted sum does not.
        finite = state.nonfinite_count == before.nonfinite_count
        for grad in jax.tree.leaves(grads):
            finite &= jnp.all(jnp.isfinite(grad))
        updates, new_opt_state = tx.update(grads, opt_state, params)
        new = optax.apply_updates(params, updates), state, new_opt_state
        held = params, before._replace(nonfinite_count=state.nonfinite_count), opt_state
        new = jax.tree.map(lambda yes, no: jnp.where(finite, yes, no), new, held)
        good = jnp.where(finite, good + 1, 0)
        if dynamic:
            scale = jnp.where(finite, jnp.where(good % 100 == 0, 2 * scale, scale), scale / 2)
        return (*new, scale, good), (finite, new[1].next_task_weights)

    def run(scale, dynamic):
        first = *start(driver, tx), jnp.float32(scale), jnp.int32(0)
        steps = functools.partial(jax.lax.scan, functools.partial(step, dynamic=dynamic))
        (params, state, *_), seen = jax.jit(steps)(first, XS)
        return params, state, *seen

    params, state, finite, weights = run(2.0**40, dynamic=True)
    assert np.sum(~finite) < STEPS / 20
    assert state.nonfinite_count > 5  # the first scales were too large
    expected, _, _, expected_weights = make_run(driver, tx)(ONES[finite] * small, XS[finite])
    np.testing.assert_allclose(weights[finite], expected_weights, atol=2e-3)
    chex.assert_trees_all_close(params, expected, atol=2e-3)
    *_, unscaled = run(1.0, dynamic=False)
    assert np.max(np.abs(unscaled - weights)) > 0.1


COMPARABLE = ONES * np.float32([0.01, 1])  # weights far from the floor


@pytest.mark.slow
@every_driver
def test_mixed_leaves_have_the_weights_of_float32_leaves(name):
    dtypes = {"trunk": jnp.bfloat16, "loud": jnp.float16, "quiet": jnp.float32}
    mixed = {key: jnp.asarray(leaf, dtypes[key]) for key, leaf in PARAMS.items()}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), mixed)
    measure = make_run(make_driver(name), optax.set_to_zero())  # the same parameters all along
    *_, weights = measure(COMPARABLE, params=mixed)
    *_, expected = measure(COMPARABLE, params=wide)
    np.testing.assert_allclose(weights, expected, rtol=float(jnp.finfo(jnp.bfloat16).eps))
    assert 0.05 < np.min(weights) < np.max(weights) < 0.95
    params, _, losses, _ = make_run(make_driver(name))(COMPARABLE, params=mixed)
    assert {key: leaf.dtype for key, leaf in params.items()} == dtypes
    assert np.all(np.mean(losses[-100:], axis=0) < 0.5 * np.mean(losses[:100], axis=0))


@pytest.mark.parametrize("power", [-108, 90])
@every_driver
def test_gradients_of_1e_30_and_1e30_have_the_weights_of_those_of_1(name, power):
    """The scale of both losses jumps; the updates are those of any scale, made comparable."""
    normalize = optax.stateless(
        lambda updates, _: jax.tree.map(lambda u: u / jnp.max(jnp.abs(u)), updates)
    )
    train = make_run(make_driver(name), optax.chain(normalize, optax.scale(-1e-3)))
    large = COMPARABLE * np.float32(2**14)
    params, _, _, weights = train(large)
    jumps = choose_steps(STEPS // 2) | (np.arange(STEPS) == STEPS - 1)
    extreme = large * np.where(jumps, np.float32(2.0**power), 1)[:, None]
    extreme_params, state, _, extreme_weights = train(extreme)
    assert state.task_norms[1] < 1e-29 if power < 0 else state.task_norms[0] > 1e30
    assert state.nonfinite_count == 0
    np.testing.assert_allclose(extreme_weights, weights, rtol=1e-5)
    chex.assert_trees_all_close(extreme_params, params, rtol=1e-5)


@every_driver
def test_a_tree_without_parameters(name):
    driver = make_driver(name, lambda params, x, scales: (scales[0], jnp.mean(x)))
    params, state, losses, weights = make_run(driver)(params={})
    assert params == {}
    np.testing.assert_array_equal(losses[:, 0], 1)
    np.testing.assert_array_equal(weights, 0.5)
    assert state.since_measured == state.nonfinite_count == 0


@every_driver
def test_frozen_and_none_leaves_change_nothing(name):
    def with_frozen(params, x, scales):
        frozen = jax.lax.stop_gradient(params["frozen"])
        return losses_fn(params | {"trunk": params["trunk"] * frozen}, x, scales)

    expected = make_run(make_driver(name))()
    params = PARAMS | {"frozen": np.float32(1), "none": None, "masked": optax.MaskedNode()}
    params, state, *rest = make_run(make_driver(name, with_frozen))(params=params)
    assert params.pop("frozen") == 1
    assert params.pop("none") is None
    assert params.pop("masked") == optax.MaskedNode()
    np.testing.assert_array_equal(state.seen_by_task[0], False)
    state = state._replace(seen_by_task=state.seen_by_task[1:])
    chex.assert_trees_all_close((params, state, *rest), expected, rtol=1e-5)


@every_driver
def test_complex_parameters_are_two_real_ones(name):
    def of_complex(params, x, scales):
        z = x @ params["trunk"]
        h = z / jnp.sqrt(1 + jnp.abs(z) ** 2)
        errors = [h @ params[key] - (1 + 1j) * x[:, i] for i, key in enumerate(("loud", "quiet"))]
        return tuple(scales[i] * jnp.mean(jnp.abs(error) ** 2) for i, error in enumerate(errors))

    def of_parts(parts, *args):
        return of_complex({key: jax.lax.complex(*pair) for key, pair in parts.items()}, *args)

    parts = {key: (leaf, leaf[::-1]) for key, leaf in PARAMS.items()}
    joined = {key: np.complex64(re + 1j * im) for key, (re, im) in parts.items()}
    conjugate = optax.stateless(lambda updates, _: jax.tree.map(jnp.conj, updates))
    sgd, scales = optax.chain(conjugate, optax.sgd(1e-3)), ONES * np.float32([10, 1])
    params, state, *seen = make_run(make_driver(name, of_complex), sgd)(scales, params=joined)
    expected, _, *expected_seen = make_run(make_driver(name, of_parts), sgd)(scales, params=parts)
    expected = {key: jax.lax.complex(*pair) for key, pair in expected.items()}
    chex.assert_trees_all_close((params, *seen), (expected, *expected_seen), rtol=1e-4, atol=1e-5)
    assert 0.05 < state.task_weights[0] < 0.45


@pytest.mark.parametrize("mode", rest_slow(MODES, fast=["leaks"]))
@every_driver
def test_debugging_modes(name, mode):
    driver = make_driver_afresh(name, losses_fn, GABA)
    with MODES[mode]():
        if mode == "runtime_checks":  # operation by operation, so that an inner NaN shows
            first = start(driver, ADAM)
            jax.block_until_ready(make_step(driver, ADAM)(first, XS[0], ONES[0]))
        tx = optax.sgd(1e-3) if mode == "strict_promotion" else ADAM  # which adds an int to a float
        make_run(driver, tx)(ONES[:50], XS[:50])


@pytest.mark.slow
def test_warnings_as_errors():
    """From the first import on, in a process of its own."""
    program = """
import jax, jax.numpy as jnp, optax
import gaba_jax
from gaba_jax import balanced_value_and_grad, gaba, task_value_and_grad, weighting

def losses_fn(params, x):
    return jnp.mean((x @ params) ** 2), jnp.mean((x @ params - 1) ** 2)

params, x = jnp.ones(3), jnp.ones((4, 3))
tx = optax.chain(gaba(), optax.adamw(1e-3))
losses, grads = task_value_and_grad(losses_fn)(params, x)
updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
balanced = balanced_value_and_grad(losses_fn, weighting.gaba(2))
jax.jit(balanced.value_and_grad)(params, balanced.init(params), x)
print(*state[0].task_weights)
"""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.5 0.5\n", "")


@every_driver
def test_the_same_run_is_the_same_to_the_bit(name):
    compile_run = make_run.__wrapped__  # anew each time
    first, second = (compile_run(make_driver(name))() for _ in range(2))
    chex.assert_trees_all_equal(first, second)


@pytest.mark.slow
@every_driver
def test_compiled_steps_are_the_eager_ones(name):
    driver = make_driver(name, rule=weighting.gaba(K, beta=BETA, warmup_steps=2))
    step, results = make_step(driver, ADAM), []
    for function in (step, jax.jit(step)):
        carry = start(driver, ADAM)
        for x in XS[:5]:
            carry, _ = function(carry, x, ONES[0])
        results.append(carry)
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


STATUS = pathlib.Path("/proc/self/statm")


def resident_mebibytes():
    gc.collect()
    pages = int(STATUS.read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the resident set is read where Linux has it")
@pytest.mark.parametrize("name", ["balance", "exact", "lagged"])
def test_soak(name):
    """Everything at once, on donated buffers: one program, and no memory but its own."""
    options = {} if name == "exact" else {"nonfinite": "drop"}
    driver, tx = make_driver(name, **options), optax.apply_if_finite(CLIP, STEPS)
    step = jax.jit(make_step(driver, tx), donate_argnums=0, keep_unused=True)
    scales = with_faults(choose_steps(STEPS // 50), [0], np.nan)
    scales *= with_faults(choose_steps(STEPS // 50, seed=2), [1], 1e6)
    scales *= with_faults(choose_steps(STEPS // 50, seed=3), [0], 0)
    absent = choose_steps(STEPS // 20, seed=4)
    mask = ~np.stack([absent, np.zeros_like(absent)], axis=1)
    carry = start(driver, tx)
    for count in range(ROUNDS * STEPS):
        if count == ROUNDS * STEPS // 3:
            resident, arrays = resident_mebibytes(), len(jax.live_arrays())
        given, t = carry, count % STEPS
        carry, _ = step(given, XS[t], scales[t], mask[t])
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert step._cache_size() == 1
    assert len(jax.live_arrays()) == arrays
    assert resident_mebibytes() - resident < 2
    chex.assert_tree_all_finite(carry[:2])
    assert carry[1].nonfinite_count > 0


@every_driver
def test_integer_leaves_are_refused(name):
    params = PARAMS | {"count": np.int32(3)}
    with pytest.raises(ValueError, match=r"'count' has dtype int32. Split the trainable"):
        make_run(make_driver(name))(params=params)


ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "faults.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|")
][2:]


@functools.cache
def defined_in(file):
    """The tests that a file defines, as pytest names them."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{file}::{node.name}" if isinstance(node, ast.ClassDef) else file
        names |= {f"{prefix}::{test.name}" for test in inner if isinstance(test, ast.FunctionDef)}
    return {name for name in names if name.split("::")[-1].startswith("test_")}


def test_every_row_of_the_page_names_tests_that_exist():
    assert len(ROWS) > 15
    for happens, does, tests in ROWS:
        assert happens
        assert does
        for name in tests.split(", "):
            assert name.strip("`") in defined_in(name.strip("`").split("::")[0])


def test_every_run_of_this_file_is_on_the_page():
    runs = {name for name in defined_in("tests/test_faults.py") if "_page" not in name}
    assert len(runs) > 15
    for name in runs:
        assert f"`{name}`" in PAGE
