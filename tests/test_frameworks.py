"""`gaba` where its users put it: nnx, linen, Equinox, trees of any kind."""

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
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.rul_head = nnx.Linear(3, 1, rngs=rngs)
        self.health_head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        h = self.dropout(nnx.tanh(self.norm(self.backbone(x))))
        return self.rul_head(h), self.health_head(h)


@pytest.mark.slow
def test_nnx_optimizer():
    """Gradients on the split state go to Optimizer.update as they are; the statistics and the
    dropout's counter come back as aux. Both tasks see one forward pass, so one dropout mask."""
    model, tx = NnxModel(), make_tx()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, *state = nnx.split(model, nnx.Param, ...)
    params, rest = jax.tree.map(jnp.copy, state)

    def losses_fn(params, rest):
        model = nnx.merge(graph, params, rest, copy=True)
        losses = losses_of(*model(X))
        return losses, nnx.state(model, nnx.Not(nnx.Param))

    @nnx.jit
    def train_step(model, optimizer):
        _, params, rest = nnx.split(model, nnx.Param, ...)
        (losses, rest), grads = task_value_and_grad(losses_fn, has_aux=True)(params, rest)
        optimizer.update(model, grads)
        nnx.update(model, rest)
        return losses

    @jax.jit
    def by_hand(params, rest, opt_state):
        each = [
            jax.grad(lambda p, name=name: losses_fn(p, rest)[0][name])(params)
            for name in ("health", "rul")
        ]
        grads = jax.tree.map(lambda *g: jnp.stack(g), *each)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), losses_fn(params, rest)[1], opt_state

    opt_state = tx.init(params)
    for _ in range(STEPS):
        losses = train_step(model, optimizer)
        params, rest, opt_state = by_hand(params, rest, opt_state)
    for kind in (nnx.Param, nnx.BatchStat):
        actual, expected = (
            nnx.to_pure_dict(nnx.state(m, kind)) for m in (model, nnx.merge(graph, params, rest))
        )
        chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert_balanced(optimizer.opt_state)
    assert losses.shape == (2,)
    assert optimizer.step[...] == model.dropout.rngs.count[...] == STEPS
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


@pytest.mark.slow
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


def test_importing_the_core_imports_no_extra():
    code = (
        "import sys, jax, optax, jaxtyping; before = set(sys.modules); import gaba_jax;"
        "new = {m for m in set(sys.modules) - before if not m.startswith('gaba_jax')};"
        "extras = set(sys.modules) & {'flax', 'matplotlib', 'scipy', 'orbax', 'gaba_jax.turbofan'};"
        "print(sorted(extras), sorted(m for m in new if '.' not in m and '_' not in m))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] []"
