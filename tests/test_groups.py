"""Weights per group of parameters: each group is as a model of its own, by both drivers."""

import functools

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
    balance_metrics,
    balanced_value_and_grad,
    by_group,
    exclude,
    group_names,
    only,
    task_value_and_grad,
    weighting,
)
from tests.slow import rest_slow, rest_slow_of_several

K, STEPS = 3, 4
PARAMS = {"first": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "last": jnp.ones((3, 3))}
RULES = {
    "norms": lambda: weighting.stabilize(weighting.inverse_norm(K), beta=0.5, warmup_steps=1),
    "cosines": lambda: weighting.upgrad(K),
    "losses": lambda: weighting.gradnorm(K),
    "random": lambda: weighting.pcgrad(K),
    "statistics": lambda: weighting.inverse_norm(K)._replace(
        needs=frozenset({"norms", weighting.std})
    ),
    "none": lambda: weighting.uniform(K),
}
LOSSES = jnp.array([3.0, 2.0, 1.0])


def gradients(seed=0):
    """Leaves [STEPS, K, ...]; the loudest task is another one in each part."""
    random = np.random.default_rng(seed)
    grads = jax.tree.map(lambda p: random.normal(size=(STEPS, K, *p.shape)), PARAMS)
    loud = np.array([100.0, 1.0, 0.1])
    for name, scale in (("first", loud), ("last", loud[::-1])):
        grads[name] = jax.tree.map(
            lambda g, scale=scale: g * scale.reshape(1, K, *[1] * (g.ndim - 2)), grads[name]
        )
    return jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads)


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def run(tx, params, grads):
    """The updates of all steps, and the states."""

    def step(state, grads):
        updates, state = tx.update(grads, state, params, task_losses=LOSSES)
        return state, (updates, state)

    return jax.jit(lambda: jax.lax.scan(step, tx.init(params), grads)[1])()


@pytest.mark.parametrize("rule", rest_slow(RULES, fast=["cosines", "losses"]))
def test_each_group_is_a_model_of_its_own(rule):
    grads, names = gradients(), group_names(PARAMS)
    updates, states = run(by_group(RULES[rule]()), PARAMS, grads)
    assert names == ["first", "last"]
    for number, name in enumerate(names):
        part = {name: PARAMS[name]}
        expected, alone = run(balance(RULES[rule]()), part, {name: grads[name]})
        chex.assert_trees_all_close(updates[name], expected[name], rtol=1e-4, atol=1e-4)
        of_group = jax.tree.map(lambda leaf, i=number: leaf[:, i], states)
        chex.assert_trees_all_close(
            of_group._replace(seen_by_task=None), alone._replace(seen_by_task=None), rtol=1e-4
        )
    leaves = {"first": slice(0, 2), "last": slice(2, 3)}
    for name in names if rule != "none" else []:
        assert states.seen_by_task[-1, leaves[name]].all()


def test_names():
    assert group_names(PARAMS, "leaf") == ["first.bias", "first.kernel", "last"]
    assert group_names(jnp.zeros(2)) == ["(the whole tree)"]
    assert group_names({}) == []

    def by_kind(params):
        return {"first": {"kernel": "kernels", "bias": "others"}, "last": "kernels"}

    assert group_names(PARAMS, by_kind) == ["others", "kernels"]  # in the order of the leaves
    grads = at(gradients(), 0)
    tx = by_group(weighting.inverse_norm(K), by_kind)
    _, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    norms = [
        np.linalg.norm(grads["first"]["bias"], axis=1),
        np.hypot(
            np.linalg.norm(grads["first"]["kernel"], axis=(1, 2)),
            np.linalg.norm(grads["last"], axis=(1, 2)),
        ),
    ]
    np.testing.assert_allclose(state.task_norms, norms, rtol=1e-5)
    prefix = by_group(weighting.inverse_norm(K), lambda params: "all")
    one = balance(weighting.inverse_norm(K))
    actual, expected = (jax.jit(t.update)(grads, t.init(PARAMS))[0] for t in (prefix, one))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


def test_metrics_per_group():
    tx = optax.chain(by_group(weighting.upgrad(K)), optax.adam(1e-3))
    _, state = jax.jit(tx.update)(at(gradients(), 0), tx.init(PARAMS), PARAMS)
    metrics = balance_metrics(state, ["a", "b", "c"], group_names(PARAMS))
    weights, norms = state[0].task_weights, state[0].task_norms
    assert metrics["first/weight/b"] == weights[0, 1]
    assert metrics["last/norm/c"] == norms[1, 2]
    assert metrics["last/cosine/a/c"] == state[0].task_cosines[1, 0, 2]
    assert metrics["first/since_measured"] == 1
    by_position = balance_metrics(state)
    assert by_position["1/norm/2"] == metrics["last/norm/c"]
    assert len(by_position) == len(metrics)
    leaves = by_group(weighting.inverse_norm(K), "leaf")
    metrics = balance_metrics(leaves.init(PARAMS), group_names=group_names(PARAMS, "leaf"))
    assert metrics["first/bias/weight/0"] == pytest.approx(1 / K)
    with pytest.raises(ValueError, match="group_names must be 2 different names"):
        balance_metrics(state, group_names=["first"])


def test_a_nan_holds_the_average_of_its_own_group():
    tx = by_group(weighting.stabilize(weighting.inverse_norm(K), beta=0.5, warmup_steps=0))
    grads = at(gradients(), 0)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    poisoned = grads | {"last": grads["last"].at[0, 0, 0].set(jnp.nan)}
    _, after = tx.update(poisoned, state, PARAMS)
    np.testing.assert_array_equal(after.nonfinite_count, [0, 1])
    np.testing.assert_array_equal(after.task_weights[1], state.task_weights[1])
    assert not np.array_equal(after.task_weights[0], state.task_weights[0])


def test_masks():
    """An absent task is never read, in any group."""
    tx, grads = by_group(weighting.inverse_norm(K)), at(gradients(), 0)
    poisoned = jax.tree.map(lambda g: g.at[1].set(jnp.nan), grads)
    mask = jnp.array([True, False, True])
    updates, state = tx.update(poisoned, tx.init(PARAMS), PARAMS, task_mask=mask)
    chex.assert_tree_all_finite((updates, state))
    np.testing.assert_array_equal(state.task_weights[:, 1], 0)
    np.testing.assert_allclose(state.task_weights.sum(axis=1), 1, rtol=1e-6)
    drop = by_group(weighting.inverse_norm(K), nonfinite="drop")
    dropped, _ = drop.update(poisoned, drop.init(PARAMS), PARAMS)
    chex.assert_tree_all_finite(dropped)


def test_a_group_that_one_task_alone_moves_keeps_the_initial_weights():
    params = {"head": jnp.zeros(2), "trunk": jnp.zeros(2)}
    grads = {"head": jnp.array([[6.0, 6.0], [0, 0]]), "trunk": jnp.array([[3.0, 0], [0, 1.0]])}
    tx = by_group(weighting.inverse_norm(2))
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(state.task_weights, [[0.5, 0.5], [0.25, 0.75]])
    np.testing.assert_array_equal(state.since_measured, [0, 1])
    np.testing.assert_array_equal(updates["head"], [3, 3])
    plain = by_group(weighting.inverse_norm(2), shared=exclude("head"), weight_task_specific=False)
    updates, _ = plain.update(grads, plain.init(params), params)
    np.testing.assert_array_equal(updates["head"], [6, 6])
    np.testing.assert_allclose(updates["trunk"], [0.75, 0.75], rtol=1e-6)
    last = by_group(weighting.inverse_norm(2), measure_on=only("trunk"))
    _, narrowed = last.update(grads, last.init(params), params)
    np.testing.assert_array_equal(narrowed.task_norms, state.task_norms)


TRUNK = {
    "first": {"kernel": jnp.linspace(-1, 1, 32).reshape(4, 8)},
    "second": {"kernel": jnp.linspace(-0.5, 1, 64).reshape(8, 8), "bias": jnp.zeros(8)},
    **{f"head_{i}": jnp.linspace(-1, i, 8) for i in range(K)},
}


def losses_fn(params, x):
    h = jnp.tanh(x @ params["first"]["kernel"])
    h = jnp.tanh(h @ params["second"]["kernel"] + params["second"]["bias"])
    return tuple(10.0 ** (2 - i) * jnp.mean((h @ params[f"head_{i}"] - i) ** 2) for i in range(K))


def one_loss(params, x, i):
    """That of one slice: the same losses, each on examples of its own."""
    h = jnp.tanh(x @ params["first"]["kernel"])
    h = jnp.tanh(h @ params["second"]["kernel"] + params["second"]["bias"])
    heads = jnp.stack([params[f"head_{j}"] for j in range(K)])
    return 10.0 ** (2 - i) * jnp.mean((h @ heads[i] - i) ** 2)


def by_both(rule, xs, masks=None, **options):
    """(updates, states) of by_group on stacked gradients and of the other driver."""
    sliced = "in_axes" in options
    args = (jnp.arange(K),) if sliced else ()
    loss = one_loss if sliced else losses_fn
    stacked = task_value_and_grad(loss, in_axes=options.get("in_axes"))
    tx = by_group(rule, nonfinite=options.get("nonfinite", "propagate"))
    balanced = balanced_value_and_grad(loss, rule, groups="top", **options)

    def step(states, given):
        x, mask = given
        losses, grads = stacked(TRUNK, x, *args)
        of_stacked = tx.update(grads, states[0], TRUNK, task_losses=losses, task_mask=mask)
        (_, grads), state = balanced.value_and_grad(TRUNK, states[1], x, *args, task_mask=mask)
        return (of_stacked[1], state), (of_stacked, (grads, state))

    states = tx.init(TRUNK), balanced.init(TRUNK)
    return jax.jit(lambda: jax.lax.scan(step, states, (xs, masks))[1])()


WAYS = {
    "exact": {},
    "slices": {"in_axes": 0},
    "microbatches": {"microbatch_size": 3},
    "drop": {"nonfinite": "drop"},
}
EACH = [(rule, way) for rule in RULES for way in WAYS]
OFTEN = [("norms", "exact"), ("cosines", "slices"), ("none", "exact")]


@pytest.mark.parametrize(("rule", "way"), rest_slow_of_several(EACH, fast=OFTEN))
def test_balanced_gradients_are_those_of_by_group(rule, way):
    shape = (STEPS, K, 6, 4) if way == "slices" else (STEPS, 6, 4)
    xs = jax.random.normal(jax.random.key(0), shape)
    (expected, expected_states), (grads, states) = by_both(RULES[rule](), xs, **WAYS[way])
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(states, expected_states, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", rest_slow(["exact", "lagged", "slices"], fast=["lagged"]))
def test_with_masks(way):
    options = {"exact": {}, "lagged": {"measure": "lagged"}, "slices": {"in_axes": 0}}[way]
    shape = (STEPS, K, 6, 4) if way == "slices" else (STEPS, 6, 4)
    xs = jax.random.normal(jax.random.key(1), shape)
    masks = jnp.array([[True, True, True], [True, False, True], [False, True, True], [True] * 3])
    expected, (grads, states) = by_both(RULES["norms"](), xs, masks, **options)
    if way == "lagged":
        assert_lagged(expected, states, RULES["norms"]())
        return
    chex.assert_trees_all_close((grads, states), expected, rtol=1e-4, atol=1e-5)


def assert_lagged(expected, states, rule):
    """The same measurements; the weights are those from before."""
    _, exact = expected
    for name in ("task_norms", "next_task_weights", "since_measured", "seen_by_task"):
        np.testing.assert_allclose(getattr(states, name), getattr(exact, name), rtol=1e-4)
    np.testing.assert_allclose(
        states.task_weights[0], np.broadcast_to(rule.initial_weights, (5, K)), rtol=1e-6
    )


@pytest.mark.parametrize("way", rest_slow(["batch", "slices"], fast=["batch"]))
def test_lagged_sums_with_the_weights_from_before(way):
    options = {"measure": "lagged"} | ({"in_axes": 0} if way == "slices" else {})
    shape = (STEPS, K, 6, 4) if way == "slices" else (STEPS, 6, 4)
    xs, rule = jax.random.normal(jax.random.key(2), shape), RULES["norms"]()
    expected, (grads, states) = by_both(rule, xs, **options)
    assert_lagged(expected, states, rule)
    np.testing.assert_allclose(
        states.task_weights[1:], expected[1].next_task_weights[:-1], rtol=1e-4
    )
    loss = one_loss if way == "slices" else losses_fn
    args = (xs[-1], *((jnp.arange(K),) if way == "slices" else ()))
    _, stacked = task_value_and_grad(loss, in_axes=options.get("in_axes"))(TRUNK, *args)
    for number, name in enumerate(group_names(TRUNK)):
        weights = states.task_weights[-1, number]
        by_hand = jax.tree.map(lambda g, w=weights: jnp.tensordot(w, g, 1), stacked[name])
        chex.assert_trees_all_close(at(grads[name], -1), by_hand, rtol=1e-4, atol=1e-4)


def test_every_measures_the_groups_together():
    """Heads, of which no measurement is accepted, do not make it measure all the time."""
    balanced = balanced_value_and_grad(losses_fn, RULES["norms"](), groups="top", every=3)
    state, since = balanced.init(TRUNK), []
    step = jax.jit(balanced.value_and_grad)
    for seed in range(5):
        x = jax.random.normal(jax.random.key(seed), (6, 4))
        (_, grads), state = step(TRUNK, state, x)
        since.append(state.since_measured.tolist())
    heads = [0] * K
    assert since == [[n, *heads, n] for n in (1, 2, 3, 1, 2)]
    _, stacked = task_value_and_grad(losses_fn)(TRUNK, x)
    by_hand = jnp.tensordot(state.task_weights[0], stacked["first"]["kernel"], 1)
    np.testing.assert_allclose(grads["first"]["kernel"], by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", rest_slow(RULES, fast=["losses"]))
def test_one_trace_donated_and_from_disk(rule, tmp_path):
    tx = optax.chain(by_group(RULES[rule](), "leaf"), optax.sgd(1e-3, momentum=0.9))
    state, grads = tx.init(PARAMS), gradients()
    types = jax.eval_shape(lambda: state)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.jit(tx.init)(PARAMS), state)
    assert not any(jax.typeof(leaf).weak_type for leaf in jax.tree.leaves(state))
    assert state[0].task_weights.shape == (3, K)
    update = jax.jit(functools.partial(tx.update, task_losses=LOSSES), donate_argnums=1)
    for t in range(2):
        _, state = update(at(grads, t), state, PARAMS)
    assert update._cache_size() == 1
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", types)
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, types)
    both = [update(at(grads, 2), each, PARAMS) for each in (restored, state)]
    chex.assert_trees_all_equal(*both)


def test_parameters_in_the_state_are_told_from_the_rest():
    tx = optax.chain(by_group(weighting.gradnorm(K)), optax.adam(1e-3))
    state = tx.init(PARAMS)
    mapped = optax.tree_map_params(tx, lambda p: p + 1, state, transform_non_params=lambda x: "no")
    chex.assert_trees_all_equal(mapped[1][0].mu, jax.tree.map(jnp.ones_like, PARAMS))
    assert set(jax.tree.leaves(mapped[0])) == {"no"}


@pytest.mark.slow
def test_lowers_for_tpu_and_cuda():
    tx = by_group(weighting.upgrad(K), "leaf")
    step = jax.jit(lambda grads, state: tx.update(grads, state, PARAMS))
    exported = export.export(step, platforms=["tpu", "cuda"])(at(gradients(), 0), tx.init(PARAMS))
    assert exported.platforms == ("tpu", "cuda")


def test_the_program_does_not_grow_with_the_groups():
    """The rule is compiled once, whatever their number."""
    params = {f"layer_{i}": jnp.zeros(2) for i in range(12)}
    grads = {name: jnp.ones((K, 2)) for name in params}

    def size(groups):
        tx = by_group(weighting.upgrad(K), groups)
        return len(str(jax.make_jaxpr(tx.update)(grads, tx.init(params))))

    assert size("leaf") < 1.2 * size(lambda params: "all")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: by_group(weighting.uniform(2), "layer"), 'groups=.layer. must be "top"'),
        (lambda: by_group(weighting.uniform), "Call the rule first"),
        (
            lambda: balanced_value_and_grad(losses_fn, weighting.uniform(K), groups=3),
            'groups=3 must be "top"',
        ),
        (
            lambda: balanced_value_and_grad(
                losses_fn, weighting.uniform(K), groups="top", encoder=lambda p, x: x
            ),
            r"groups=\.\.\. needs the gradients of each group.*belong to no group",
        ),
        (
            lambda: by_group(weighting.uniform(K), lambda p: {"first": "a"}).init(PARAMS),
            "groups must be a pytree of names.*does not fit",
        ),
        (
            lambda: by_group(weighting.uniform(K), lambda p: {"first": "a", "last": 1}).init(
                PARAMS
            ),
            r"groups must give every parameter the name of its group; at 'last' it is 1",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("swapped", [True, False])
def test_a_state_of_other_groups(swapped):
    one, groups = balance(weighting.uniform(K)), by_group(weighting.uniform(K))
    tx, other = (one, groups) if swapped else (groups, one)
    with pytest.raises(ValueError, match=r"groups of parameters. Pass the state that init"):
        tx.update(at(gradients(), 0), other.init(PARAMS), PARAMS)
