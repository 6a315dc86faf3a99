"""`gaba` where its users put it: nnx, linen, Equinox, before other optax transforms, injected."""

import functools
import subprocess
import sys

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState

from gaba_jax import balance, exclude, gaba, only, task_value_and_grad, weighting

STEPS = 5
X = jax.random.normal(jax.random.key(0), (8, 4))
Y = 100 * X[:, 0]


def losses_of(rul, health):
    return {"rul": jnp.mean((rul.reshape(-1) - Y) ** 2), "health": jnp.mean(health**2)}


def make_tx():
    return optax.chain(gaba(warmup_steps=1, beta=0.5), optax.adamw(1e-2))


def train_by_hand(losses_fn, params, tx, steps=STEPS):
    """What every framework has to arrive at."""

    @jax.jit
    def step(params, opt_state):
        _, grads = task_value_and_grad(losses_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for _ in range(steps):
        params, opt_state = step(params, opt_state)
    return params, opt_state


def assert_balanced(opt_state):
    """The weights have left 1/K, towards the quiet task (health, the first)."""
    weights = jnp.asarray(optax.tree.get(opt_state, "task_weights"))
    np.testing.assert_allclose(weights.sum(), 1, atol=1e-6)
    assert weights[0] > 0.8


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.backbone = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.rul_head = nnx.Linear(3, 1, rngs=rngs)
        self.health_head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        h = nnx.tanh(self.norm(self.backbone(x)))
        return self.rul_head(h), self.health_head(h)


def test_nnx_optimizer():
    """Gradients on the split state go to Optimizer.update as they are; statistics come as aux."""
    model = NnxModel()
    optimizer = nnx.Optimizer(model, make_tx(), wrt=nnx.Param)
    graph, *state = nnx.split(model, nnx.Param, ...)
    initial, rest = jax.tree.map(jnp.copy, state)

    def losses_fn(params, rest):
        model = nnx.merge(graph, params, rest, copy=True)
        losses = losses_of(*model(X))
        return losses, nnx.state(model, nnx.BatchStat)

    @nnx.jit
    def train_step(model, optimizer):
        _, params, rest = nnx.split(model, nnx.Param, ...)
        (losses, statistics), grads = task_value_and_grad(losses_fn, has_aux=True)(params, rest)
        optimizer.update(model, grads)
        nnx.update(model, statistics)
        return losses

    losses = [train_step(model, optimizer) for _ in range(STEPS)]
    expected, _ = train_by_hand(lambda params: losses_fn(params, rest)[0], initial, make_tx())
    chex.assert_trees_all_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx.to_pure_dict(expected), rtol=1e-4
    )
    assert_balanced(optimizer.opt_state)
    assert losses[-1].shape == (2,)
    assert optimizer.step[...] == STEPS
    assert (model.norm.mean[...] != 0).any()


def test_nnx_optimizer_passes_extra_arguments_on():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    needs_losses = weighting.uniform(2)._replace(needs=frozenset({"losses"}))
    optimizer = nnx.Optimizer(
        model, optax.chain(balance(needs_losses), optax.sgd(1)), wrt=nnx.Param
    )
    kernel = model.kernel[...].copy()
    grads = jax.tree.map(lambda p: jnp.ones((2, *p.shape)), nnx.state(model, nnx.Param))
    mask = jnp.array([True, False])
    optimizer.update(model, grads, task_losses=jnp.array([1.0, jnp.nan]), task_mask=mask)
    np.testing.assert_allclose(model.kernel[...], kernel - 1, rtol=1e-6)
    np.testing.assert_array_equal(optax.tree.get(optimizer.opt_state, "task_weights")[...], [1, 0])


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(3, name="backbone")(x))
        return nn.Dense(1, name="rul_head")(h), nn.Dense(2, name="health_head")(h)


@pytest.mark.parametrize("container", [dict, FrozenDict])
def test_linen_train_state(container):
    model = LinenModel()
    params = model.init(jax.random.key(0), X)["params"]
    params = freeze(params) if container is FrozenDict else params
    state = TrainState.create(apply_fn=model.apply, params=params, tx=make_tx())

    def losses_fn(params):
        return losses_of(*model.apply({"params": params}, X))

    @jax.jit
    def train_step(state):
        _, grads = task_value_and_grad(losses_fn)(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(STEPS):
        state = train_step(state)
    chex.assert_trees_all_close(
        state.params, train_by_hand(losses_fn, params, make_tx())[0], rtol=1e-5
    )
    assert isinstance(state.params, container)
    assert_balanced(state.opt_state)


class EquinoxModel(eqx.Module):
    backbone: eqx.nn.Linear
    rul_head: eqx.nn.Linear
    health_head: eqx.nn.Linear
    activation: callable  # a leaf that is no array

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.backbone = eqx.nn.Linear(4, 3, key=keys[0])
        self.rul_head = eqx.nn.Linear(3, 1, key=keys[1])
        self.health_head = eqx.nn.Linear(3, 2, key=keys[2])
        self.activation = jnp.tanh

    def __call__(self, x):
        h = self.activation(self.backbone(x))
        return self.rul_head(h), self.health_head(h)


def test_equinox_filtered():
    model, tx = EquinoxModel(), make_tx()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    opt_state = tx.init(params)

    def losses_fn(params):
        return losses_of(*jax.vmap(eqx.combine(params, static))(X))

    @eqx.filter_jit
    def train_step(model, opt_state):
        params = eqx.filter(model, eqx.is_inexact_array)
        _, grads = task_value_and_grad(losses_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state

    for _ in range(STEPS):
        model, opt_state = train_step(model, opt_state)
    expected, _ = train_by_hand(losses_fn, params, tx)
    chex.assert_trees_all_close(eqx.filter(model, eqx.is_inexact_array), expected, rtol=1e-5)
    assert_balanced(opt_state)


@jax.tree_util.register_pytree_node_class
class Pair:
    """A node without key paths."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def tree_flatten(self):
        return (self.first, self.second), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize(
    "make",
    [
        lambda w, v: Pair(w, v),
        lambda w, v: (w, [v, None]),
        lambda w, v: {"a.b": w, "a": {"b": v}},
        lambda w, v: {"heads": {"value": v, "other": w}},
    ],
    ids=["custom", "tuple", "dotted", "value"],
)
def test_trees_of_other_kinds(make):
    params = make(jnp.ones(3), jnp.ones((2, 2)))
    tx = gaba(beta=0.0, warmup_steps=0, min_weight=0.0)
    grads = jax.tree.map(
        lambda p: jnp.stack([jnp.full(p.shape, 3.0), jnp.full(p.shape, 1.0)]), params
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda p: jnp.full(p.shape, 1.5), params), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["value", "heads.value"])
def test_a_key_called_value_is_a_name_like_others(name):
    """Only the value inside an nnx variable is no name."""
    params = {"heads": {"value": 1.0, "policy": 1.0}, "trunk": 1.0}
    assert exclude(name)(params) == {"heads": {"value": False, "policy": True}, "trunk": True}
    variables = nnx.state(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Param)
    chosen = nnx.to_pure_dict(only("kernel")(variables))
    assert chosen == {"kernel": True, "bias": False}


def test_a_python_float_as_parameters():
    """The numbers of a first tutorial: f(w) with w = 1.0, weakly typed."""
    tx, params = optax.chain(gaba(warmup_steps=0), optax.sgd(0.1)), 1.0
    _, grads = task_value_and_grad(lambda w: (3 * w, w**2))(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates), 0.75, atol=2e-3)


PARAMS = {"backbone": jnp.ones((3, 2)), "head": jnp.ones(2)}


def stacked(seed=0):
    """Gradients of a run, leaves [2 * STEPS, 2, ...]; the first task is 100 times louder."""
    keys = jax.random.split(jax.random.key(seed), 2)
    loudness = jnp.array([100.0, 1.0])
    return {
        name: jax.random.normal(key, (2 * STEPS, 2, *p.shape))
        * loudness.reshape(1, 2, *[1] * p.ndim)
        for key, (name, p) in zip(keys, PARAMS.items(), strict=True)
    }


def scan(tx, grads, params=PARAMS, **extra):
    """Parameters after each update, and the last state."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, optax.tree.get(state, "task_weights"))

    (_, state), (trajectory, weights) = jax.lax.scan(step, (params, tx.init(params)), grads)
    return trajectory, weights, state


AFTER = {
    "adamw": lambda: optax.adamw(1e-2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(1e-2), 3),
    "partition": lambda: optax.partition(
        {"train": optax.sgd(1e-2), "freeze": optax.set_to_zero()},
        {"backbone": "train", "head": "freeze"},
    ),
    "masked": lambda: optax.masked(optax.sgd(1e-2), {"backbone": True, "head": False}),
    "multi_steps": lambda: optax.MultiSteps(optax.sgd(1e-2), 2).gradient_transformation(),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2),
}


@pytest.mark.parametrize("name", AFTER)
def test_before_another_transform(name):
    """In a chain the next transform sees one balanced gradient of the parameters' shapes."""
    first, grads = gaba(warmup_steps=2, beta=0.5), stacked()
    tx = optax.named_chain(("balance", first), ("after", AFTER[name]()))
    trajectory, weights, state = jax.jit(functools.partial(scan, tx))(grads)
    balanced = {
        key: jnp.einsum("tk,tk...->t...", weights, g, precision="highest")
        for key, g in grads.items()
    }

    @jax.jit
    def alone(params, state, updates):
        updates, state = AFTER[name]().update(updates, state, params)
        return optax.apply_updates(params, updates), state

    params, after = PARAMS, AFTER[name]().init(PARAMS)
    for t in range(2 * STEPS):
        params, after = alone(params, after, jax.tree.map(lambda g, t=t: g[t], balanced))
        chex.assert_trees_all_close(
            jax.tree.map(lambda p, t=t: p[t], trajectory), params, rtol=1e-4, atol=1e-5
        )
    chex.assert_trees_all_equal_structs(state["after"], after)
    assert weights[-1, 1] > 0.9
    assert (params["backbone"] != PARAMS["backbone"]).any()


def test_apply_if_finite_skips_what_gaba_lets_through():
    tx = optax.chain(gaba(warmup_steps=0), optax.apply_if_finite(optax.sgd(1e-2), 3))
    grads = stacked()
    grads["backbone"] = grads["backbone"].at[3, 1, 0, 0].set(jnp.nan)
    trajectory, weights, state = jax.jit(functools.partial(scan, tx))(grads)
    chex.assert_tree_all_finite(trajectory)
    np.testing.assert_array_equal(trajectory["backbone"][3], trajectory["backbone"][2])
    np.testing.assert_array_equal(weights[3], weights[2])
    assert (trajectory["backbone"][4] != trajectory["backbone"][3]).any()
    assert state[0].nonfinite_count == optax.tree.get(state, "total_notfinite") == 1


STATIC = (
    "num_tasks",
    "warmup_steps",
    "floor",
    "debias",
    "task_priorities",
    "shared",
    "measure_on",
    "weight_task_specific",
    "nonfinite",
)


def injected(hyperparam_dtype=jnp.float32, **kwargs):
    make = optax.inject_hyperparams(gaba, static_args=STATIC, hyperparam_dtype=hyperparam_dtype)
    return make(warmup_steps=1, **kwargs)


def test_injected_constants_are_the_plain_transform():
    schedules = {"beta": lambda _: 0.9, "min_weight": lambda _: 0.02}
    tx = optax.chain(injected(**schedules), optax.sgd(1e-2))
    plain = gaba(warmup_steps=1, beta=0.9, min_weight=0.02)
    actual = jax.jit(functools.partial(scan, tx))(stacked())
    expected = jax.jit(functools.partial(scan, optax.chain(plain, optax.sgd(1e-2))))(stacked())
    chex.assert_trees_all_close(actual[:2], expected[:2], rtol=1e-6)
    chex.assert_trees_all_close(actual[2][0].inner_state, expected[2][0], rtol=1e-6)
    np.testing.assert_allclose(actual[2][0].hyperparams["beta"], 0.9)


def test_injected_schedules_take_effect():
    """Beta falls to 0 after 5 updates and the floor rises after 7."""
    tx = injected(
        beta=lambda count: jnp.where(count < 5, 0.99, 0.0),
        min_weight=lambda count: jnp.where(count < 7, 0.0, 0.3),
        floor="project",
    )
    quiet = jax.tree.map(lambda g: jnp.abs(g).at[:].set(jnp.abs(g[:1])), stacked())
    _, weights, _ = jax.jit(functools.partial(scan, tx))(quiet)
    assert np.all(weights[:5, 0] > 0.45)  # an average of 100 updates has hardly moved
    assert np.all(weights[5:7, 0] < 0.05)
    np.testing.assert_allclose(weights[7:], [[0.3, 0.7]] * 3, rtol=1e-6)


def test_injected_into_low_precision_asks_for_a_hyperparam_dtype():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match=r"beta came as bfloat16.*hyperparam_dtype=jnp.float32"):
        injected(hyperparam_dtype=None, beta=0.999).init(params)
    state = injected(beta=0.999).init(params)
    np.testing.assert_allclose(state.hyperparams["beta"], 0.999)


def test_importing_the_core_imports_no_extra():
    code = (
        "import sys, jax, optax, jaxtyping; before = set(sys.modules); import gaba_jax;"
        "new = {m for m in set(sys.modules) - before if not m.startswith('gaba_jax')};"
        "extras = set(sys.modules) & {'flax', 'matplotlib', 'scipy', 'orbax', 'gaba_jax.turbofan'};"
        "print(sorted(extras), sorted(m for m in new if '.' not in m and '_' not in m))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] []"
