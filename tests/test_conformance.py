"""What every rule must hold in both drivers: one table, the same tests for all.

A rule is known by its first parameter, so a new one in `weighting.__all__` is tested with the rest.
"""

import functools
import inspect
import itertools
import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import export

from gaba_jax import (
    balance,
    balanced_value_and_grad,
    exclude,
    task_value_and_grad,
    weighting,
)
from tests.debugging import MODES
from tests.elements import of_elements
from tests.slow import rest_slow, rest_slow_of_several

K = 3
STEPS = 4  # of which a warm-up takes one or two


def make_rules():
    """Name -> a function that makes the rule afresh."""
    w = weighting
    rules = {
        "stabilize": lambda: w.stabilize(
            w.rescaled(w.inverse_norm(K), 2.0), warmup_steps=1, floor="project", debias=True
        ),
        "average_norms": lambda: w.stabilize(
            w.average_norms(w.inverse_norm(K)), beta=0.0, warmup_steps=1, min_weight=0.01
        ),
        "rescaled": lambda: w.rescaled(w.gaba(K, warmup_steps=2), float(K)),
        "constant": lambda: w.constant([1.0, 2.0, 3.0]),
        "statistics": lambda: of_elements(K),
        # What balance measures for the rules that need cosines and losses.
        "all_needs": lambda: w.inverse_norm(K)._replace(
            needs=frozenset({"norms", "cosines", "losses"})
        ),
    }
    for name in w.__all__:
        rule = getattr(w, name)
        parameters = inspect.signature(rule).parameters if inspect.isfunction(rule) else {}
        if next(iter(parameters), None) == "num_tasks":  # else a type or a combinator
            extra = {"warmup_steps": 2} if "warmup_steps" in parameters else {}
            rules[name] = functools.partial(rule, K, **extra)
    return rules


RULES = make_rules()
# Rule by rule, so that the two processes do not compile the same.
every_rule = pytest.mark.parametrize("name", RULES, scope="module")
# By norms, averaged or not, by cosines and by losses, with states of their own and at random.
KINDS = ["all_needs", "gaba", "gradnorm", "upgrad", "pcgrad", "famo", "random"]
FEW = ["all_needs", "gradnorm", "pcgrad"]
a_few_rules = pytest.mark.parametrize("name", rest_slow(RULES, FEW), scope="module")
a_rule_of_each_kind = pytest.mark.parametrize("name", rest_slow(RULES, KINDS), scope="module")
PARAMS = {"trunk": jnp.ones((4, 3)), "head": jnp.ones(3)}
EXTRA = {"task_losses": jnp.array([3.0, 2.0, 1.0]), "anything": None}


def gradients(seed=0, scale=1.0):
    """Stacked gradients over a run, leaves [STEPS, K, ...]; the head is the first task's."""
    random = np.random.default_rng(seed)
    grads = {
        name: random.normal(size=(STEPS, K, *p.shape)).astype(np.float32)
        for name, p in PARAMS.items()
    }
    grads["trunk"] *= np.float32(scale) * np.array([100, 1, 0.1], np.float32)[:, None, None]
    grads["head"] *= np.float32(scale) * np.array([1, 0, 0], np.float32)[:, None]
    return jax.tree.map(jnp.asarray, grads)


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def run(rule, grads):
    """All updates under scan: the updates, the applied weights, the last state."""
    tx = balance(rule)

    def step(state, grads):
        updates, state = tx.update(grads, state, PARAMS, **EXTRA)
        return state, (updates, state.task_weights)

    state, (updates, weights) = jax.lax.scan(step, tx.init(PARAMS), grads)
    return updates, weights, state


@functools.cache
def compiled_run(name):
    return jax.jit(functools.partial(run, RULES[name]()))


def rounding(rule):
    """By how much two ways to compile a rule may differ: those that iterate round more often."""
    return {"rtol": 1e-4, "atol": 1e-6} if "cosines" in rule.needs else {"rtol": 1e-6}


def assert_close(actual, expected, **tolerance):
    """Within a tolerance relative to the largest element of each leaf."""
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        largest = float(jnp.max(jnp.abs(wanted)))
        np.testing.assert_allclose(got, wanted, **tolerance, atol=tolerance["rtol"] * largest)


def assert_same_types(actual, expected):
    """The structure, shapes and dtypes of ``expected``, and no weak types."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(actual))


def test_the_table_holds_all_rules():
    assert {"uniform", "constant", "inverse_norm", "inverse_share", "gaba"} <= set(RULES)
    assert all(isinstance(make(), weighting.Weighting) for make in RULES.values())


@every_rule
def test_weights_are_applied_and_recorded(name):
    rule, grads = RULES[name](), gradients()
    updates, weights, state = compiled_run(name)(grads)
    expected = jax.tree.map(lambda g: np.einsum("tk,tk...->t...", weights, g), grads)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(state.task_weights, weights[-1])
    np.testing.assert_array_equal(state.task_norms > 0, bool(rule.needs - {"losses"}))
    assert (state.task_cosines is not None) == ("cosines" in rule.needs)
    assert state.nonfinite_count == 0
    assert state.since_measured == 1


@every_rule
def test_a_nan_is_kept_out_of_the_state(name):
    """In the shared leaf it holds the state for one update; in a head it is not even noticed."""
    rule, grads = RULES[name](), gradients()
    for leaf, rejected in [("trunk", 1 if rule.needs - {"losses"} else 0), ("head", 0)]:
        poisoned = grads | {leaf: grads[leaf].at[-1, 0].set(jnp.nan)}
        updates, weights, state = compiled_run(name)(poisoned)
        assert state.nonfinite_count == rejected
        chex.assert_tree_all_finite((weights, state))
        assert not np.isfinite(updates[leaf][-1]).any()
        if rejected:
            np.testing.assert_array_equal(weights[-1], weights[-2])


def test_a_nan_does_not_make_a_head_shared():
    """Of one task alone, before the other has been seen: no shared leaf yet, nothing rejected."""
    tx, grads = balance(weighting.inverse_share(K)), at(gradients(), 0)
    poisoned = jax.tree.map(lambda g: jnp.zeros_like(g).at[1].set(jnp.nan), grads)
    update = jax.jit(tx.update)
    _, expected = update(grads, tx.init(PARAMS))
    _, state = update(poisoned, tx.init(PARAMS))
    _, state = update(grads, state)
    np.testing.assert_array_equal(state.task_norms, expected.task_norms)


TRUNK = {"trunk": jnp.ones((4, 3)), **{f"head_{i}": jnp.arange(3.0) - i for i in range(K)}}


def make_losses(params, x):
    h = jnp.tanh(x @ params["trunk"])
    return tuple(10.0 ** (2 - i) * jnp.mean((h @ params[f"head_{i}"] - 1) ** 2) for i in range(K))


def by_both_drivers(name, measure):
    """(gradients, states) of each, in one program: what they share is compiled once."""
    rule, xs = RULES[name](), jax.random.normal(jax.random.key(0), (STEPS, 5, 4))
    tx, balanced = balance(rule), balanced_value_and_grad(make_losses, rule, measure=measure)

    def step(states, x):
        losses, grads = task_value_and_grad(make_losses)(TRUNK, x)
        stacked = tx.update(grads, states[0], TRUNK, task_losses=losses)
        (_, grads), state = balanced.value_and_grad(TRUNK, states[1], x)
        return (stacked[1], state), (stacked, (grads, state))

    @jax.jit
    def run(xs):
        return jax.lax.scan(step, (tx.init(TRUNK), balanced.init(TRUNK)), xs)[1]

    return run(xs)


BOTH = [(name, measure) for name in RULES for measure in ("exact", "lagged")]
OFTEN = [("gaba", "exact"), ("upgrad", "exact"), ("famo", "exact"), ("gradnorm", "lagged")]


@pytest.mark.parametrize(
    ("name", "measure"),
    rest_slow_of_several(BOTH, fast=OFTEN),
)
def test_balanced_gradients_are_those_of_balance(name, measure):
    """The other driver: the same states; under "lagged" the weights come one update later."""
    rule = RULES[name]()
    (expected_grads, expected), (grads, states) = by_both_drivers(name, measure)
    applied = expected.task_weights
    if measure == "lagged":
        applied = np.concatenate([[rule.initial_weights], expected.next_task_weights[:-1]])
    else:
        largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(expected_grads))
        chex.assert_trees_all_close(grads, expected_grads, rtol=1e-5, atol=1e-6 * largest)
    chex.assert_trees_all_close(
        states,
        expected._replace(task_weights=applied),
        rtol=max(rounding(rule)["rtol"], 1e-5),
        atol=1e-6,
    )


@functools.cache
def compiled_update(name):
    return jax.jit(functools.partial(balance(RULES[name]()).update, **EXTRA))


EACH = list(itertools.product(RULES, [True, False]))


@pytest.mark.parametrize(
    ("name", "jitted"),
    rest_slow_of_several(EACH, fast=[pair for pair in EACH if pair[0] in FEW]),
)
def test_agree_and_are_deterministic(name, jitted):
    """Update by update, jitted or not, the numbers are those of the scan; twice, to the bit."""
    tx, grads = balance(RULES[name]()), gradients()
    update = compiled_update(name) if jitted else functools.partial(tx.update, **EXTRA)

    def repeat():
        state, seen = tx.init(PARAMS), []
        for t in range(STEPS):
            updates, state = update(at(grads, t), state, PARAMS)
            seen.append((updates, state.task_weights))
        return *jax.tree.map(lambda *each: np.stack(each), *seen), state

    first = repeat()
    chex.assert_trees_all_equal(first, repeat())
    updates, *rest = compiled_run(name)(grads)
    tolerance = rounding(RULES[name]())
    assert_close(first[0], updates, rtol=tolerance["rtol"])
    chex.assert_trees_all_close(list(first[1:]), rest, **tolerance)


@a_rule_of_each_kind
def test_one_trace_over_a_thousand_donated_steps(name):
    """And what is donated takes nothing else with it: not the rule's buffers, nor another state."""
    tx = optax.chain(balance(RULES[name]()), optax.sgd(1e-3, momentum=0.9))
    traces = 0

    # Unused arguments are kept so that every buffer is donated.
    @functools.partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
    def step(params, opt_state, grads):
        nonlocal traces
        traces += 1
        updates, opt_state = tx.update(grads, opt_state, params, **EXTRA)
        return optax.apply_updates(params, updates), opt_state

    first, second = tx.init(PARAMS), tx.init(PARAMS)
    types = jax.eval_shape(lambda: first)
    assert_same_types(first, types)
    grads, results = at(gradients(), 0), []
    for opt_state, steps in [(first, 994), (second, 3), (None, 3)]:
        opt_state = tx.init(PARAMS) if opt_state is None else opt_state
        given = opt_state
        params = jax.tree.map(jnp.copy, PARAMS)
        for _ in range(steps):
            params, opt_state = step(params, opt_state, grads)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        results.append((params, opt_state))
    assert traces == 1
    assert step._cache_size() == 1
    for params, opt_state in results:
        assert_same_types(opt_state, types)
        assert_same_types(params, PARAMS)
        chex.assert_tree_all_finite((params, opt_state))
    chex.assert_trees_all_equal(*results[1:])


@a_few_rules
def test_vmap_over_seeds_is_one_run_each(name):
    scales = [1.0, 1e-25, 1e25, 1e-3]
    tolerance = rounding(RULES[name]())
    tolerance["rtol"] = max(tolerance["rtol"], 1e-5)
    each = [gradients(seed, scale) for seed, scale in enumerate(scales)]
    batched = jax.jit(jax.vmap(functools.partial(run, RULES[name]())))(
        jax.tree.map(lambda *g: jnp.stack(g), *each)
    )
    for i, grads in enumerate(each):
        updates, *expected = compiled_run(name)(grads)
        actual, *rest = at(batched, i)
        assert_close(actual, updates, rtol=tolerance["rtol"])
        chex.assert_trees_all_close(rest, expected, **tolerance)
        assert expected[-1].nonfinite_count == 0


@a_rule_of_each_kind
def test_checkpoint_round_trip(name, tmp_path):
    """The state comes back from disk to the bit, and goes on as if it had never left."""
    tx, grads, update = balance(RULES[name]()), gradients(), compiled_update(name)
    _, state = update(at(grads, 0), tx.init(PARAMS), PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    chex.assert_trees_all_equal(restored, state)
    # By way of the host, so that both are laid out as the compiled program has it.
    states = jax.tree.map(np.asarray, (restored, state))
    chex.assert_trees_all_equal(*(update(at(grads, 1), s, PARAMS) for s in states))


DROP = {"shared": exclude("head"), "nonfinite": "drop"}


ON_LEAVES = [*((name, {}) for name in RULES), ("gaba", DROP)]


@pytest.mark.parametrize(
    ("name", "options"),
    rest_slow_of_several(ON_LEAVES, fast=[each for each in ON_LEAVES if each[0] in FEW]),
)
def test_leaves_of_all_kinds(name, options):
    params = {
        "bfloat16": jnp.ones((2, 3), jnp.bfloat16),
        "float16": jnp.float16(1),
        "float32": jnp.float32(1),
        "head": jnp.ones(2),
        "empty": jnp.zeros((0, 2)),
        "frozen": None,
    }
    grads = jax.tree.map(lambda p: jnp.ones((K, *p.shape), p.dtype).at[0].multiply(100), params)
    tx = balance(RULES[name](), **options)
    state = tx.init(params)
    with MODES["strict_promotion"]():
        updates, after = jax.jit(functools.partial(tx.update, **EXTRA))(grads, state, params)
    assert_same_types(updates, params)
    assert_same_types(after, state)
    expected = jnp.dot(after.task_weights, jnp.array([100.0, 1.0, 1.0]), precision="highest")
    for dtype in ("bfloat16", "float16", "float32"):
        precision = 2 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(updates[dtype].astype(jnp.float32), expected, rtol=precision)


IN_MODES = list(itertools.product(RULES, MODES))


@pytest.mark.parametrize(
    ("name", "mode"),
    rest_slow_of_several(IN_MODES, fast=[each for each in IN_MODES if each[0] in FEW]),
)
def test_debugging_modes(name, mode):
    tx, grads = balance(RULES[name]()), at(gradients(), 0)
    with MODES[mode]():
        if mode == "runtime_checks":  # operation by operation, so that an inner NaN shows
            jax.block_until_ready(tx.update(grads, tx.init(PARAMS), PARAMS, **EXTRA))
        else:  # shows when the program is traced
            jax.jit(functools.partial(run, RULES[name]())).trace(gradients())


@a_few_rules
def test_float64_leaves(name):
    expected, _, narrow_state = compiled_run(name)(gradients())
    with jax.enable_x64(True):
        params, grads = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), (PARAMS, gradients())
        )
        tx = balance(RULES[name]())
        state, update = tx.init(params), jax.jit(functools.partial(tx.update, **EXTRA))
        for t in range(STEPS):
            updates, state = update(at(grads, t), state, params)
        assert_same_types(updates, params)
    assert_same_types(state, narrow_state)  # what is on disk does not depend on the flag
    updates = jax.tree.map(np.float32, updates)
    chex.assert_trees_all_close(updates, at(expected, -1), rtol=1e-5, atol=1e-4)


def test_a_rule_that_returns_float64_does_not_widen_the_average():
    with jax.enable_x64(True):
        rule = weighting.rescaled(weighting.inverse_share(2), np.float64(2))
        tx = balance(weighting.stabilize(rule, warmup_steps=0))
        state = tx.init(jnp.zeros(2))
        _, after = jax.eval_shape(tx.update, jnp.ones((2, 2)), state)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@every_rule
def test_parameters_in_the_state_are_told_from_the_rest(name):
    rule = RULES[name]()
    tx = optax.chain(balance(rule, shared=exclude("head")), optax.adam(1e-3))
    state = tx.init(PARAMS)
    mapped = optax.tree_map_params(tx, lambda p: p + 1, state, transform_non_params=lambda x: "no")
    first_moment = optax.tree.get(mapped[1:], "mu")
    chex.assert_trees_all_equal(first_moment, jax.tree.map(jnp.ones_like, PARAMS))
    assert set(jax.tree.leaves(mapped[0])) == {"no"}
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    weights = optax.tree.get(state, "task_weights")
    np.testing.assert_array_equal(weights, np.float32(rule.initial_weights))


def export_for_accelerators(rule):
    tx = optax.chain(balance(rule), optax.adamw(1e-3))
    step = jax.jit(lambda grads, state: tx.update(grads, state, PARAMS, **EXTRA))
    return export.export(step, platforms=["tpu", "cuda"])(at(gradients(), 0), tx.init(PARAMS))


@every_rule
def test_lowers_for_tpu_and_cuda_with_no_call_to_the_host(name):
    exported = export_for_accelerators(RULES[name]())
    assert exported.platforms == ("tpu", "cuda")
    targets = re.findall(r"custom_call @(\w+)", exported.mlir_module())
    assert not [target for target in targets if "callback" in target]


def test_a_call_to_the_host_would_show():
    def update(stats, state):
        shape = jax.ShapeDtypeStruct((K,), jnp.float32)
        return jax.pure_callback(lambda norms: norms, shape, stats.norms), state

    with pytest.raises(NotImplementedError, match="callback"):
        export_for_accelerators(RULES["inverse_norm"]()._replace(update=update))


def test_making_rules_starts_no_backend():
    """Else jax.distributed.initialize would refuse after a rule at the top of a script."""
    code = """
import inspect, jax
import gaba_jax
from gaba_jax import weighting as w
for name in w.__all__:
    rule = getattr(w, name)
    parameters = inspect.signature(rule).parameters if inspect.isfunction(rule) else {}
    if next(iter(parameters), None) == "num_tasks":
        w.rescaled(rule(3), 2.0)
w.constant([1.0, 2.0, 3.0])
w.average_norms(w.inverse_norm(3))
w.inverse_norm(3, task_priorities=[1.0, 2.0, 3.0])
gaba_jax.balanced_value_and_grad(lambda p: (p, p), w.gaba(2))
gaba_jax.balance(w.upgrad(2), shared=gaba_jax.exclude("head"))
jax.config.update("jax_num_cpu_devices", 3)  # refused once there is a backend
assert jax.device_count() == 3
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_every_rule_says_when_not_to_use_it():
    functions = [f for f in map(vars(weighting).get, weighting.__all__) if inspect.isfunction(f)]
    rules = [f for f in functions if f is not weighting.gradnorm_balance_point]
    assert len(rules) > 30
    silent = [f.__name__ for f in rules if "When not to use it:" not in inspect.getdoc(f)]
    assert silent == []
