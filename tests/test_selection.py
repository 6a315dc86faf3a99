"""Selectors over the trees that users have."""

import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gaba_jax import balance, exclude, gaba, only, task_value_and_grad, weighting
from gaba_jax._selection import select
from tests.slow import rest_slow_of_several

PARAMS = {
    "backbone": {
        "dense_0": {"kernel": jnp.zeros((2, 2))},
        "dense_1": {"kernel": jnp.zeros((2, 2))},
    },
    "rul_head": {"kernel": jnp.zeros(2)},
    "health_head": {"kernel": jnp.zeros(2)},
}
NAMES = (
    "backbone.dense_0.kernel",
    "backbone.dense_1.kernel",
    "health_head.kernel",
    "rul_head.kernel",
)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (exclude("rul_head", "health_head"), [True, True, False, False]),
        (exclude("*_head"), [True, True, False, False]),
        (only("backbone"), [True, True, False, False]),
        (only("dense_1"), [False, True, False, False]),
        (only("backbone.dense_1"), [False, True, False, False]),
        (only("backbone.*.kernel"), [True, True, False, False]),
        (only("dense_0", "rul_head"), [True, False, False, True]),
        ({"backbone": True, "rul_head": False, "health_head": False}, [True, True, False, False]),
        (lambda p: jax.tree.map(lambda x: x.ndim == 2, p), [True, True, False, False]),
    ],
)
def test_selection(selector, expected):
    assert list(select(selector, None, PARAMS).shared) == expected
    assert list(select(None, selector, PARAMS).measure_on) == expected


def test_a_name_matches_whole_segments():
    with pytest.raises(ValueError, match=r"'head' matches no parameter.*health_head.kernel"):
        only("head")(PARAMS)


@pytest.mark.parametrize(
    ("shared", "measure_on", "message"),
    [
        (only("nothing"), None, "matches no parameter.*" + NAMES[0]),
        (None, only("backbone", "typo"), "'typo' matches no parameter"),
        (exclude("backbone", "*_head"), None, "shared selects no parameter.*" + NAMES[3]),
        (only("dense_0"), only("dense_1"), "no leaf in common.*" + NAMES[0]),
        (jax.tree.map(lambda x: 1.5, PARAMS), None, "concrete bools; at 'backbone.dense_0.kernel'"),
        ({"backbone": True}, None, "pytree of bools with the structure"),
    ],
)
def test_errors_come_at_init_and_list_the_paths(shared, measure_on, message):
    tx = gaba(shared=shared, measure_on=measure_on)
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)


def test_a_selector_taken_for_a_schedule():
    tx = optax.inject_hyperparams(gaba, static_args=("num_tasks",))(shared=exclude("a"))
    with pytest.raises(ValueError, match=r"inject_hyperparams.* name the argument in static_args"):
        tx.init(PARAMS)


@pytest.mark.parametrize("names", [(), ("",), (3,)])
def test_names_are_checked(names):
    with pytest.raises(ValueError, match="non-empty names"):
        only(*names)


def test_no_error_on_trees_without_leaves():
    assert gaba(shared=only("backbone")).init({}).seen_by_task.shape == (0, 2)


def linen_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(3, name="backbone")(x))
            return nn.Dense(1, name="rul_head")(h).mean(), nn.Dense(3, name="health_head")(h).mean()

    x = jnp.ones((2, 4))
    variables = Model().init(jax.random.key(0), x)
    return variables["params"], lambda params: Model().apply({"params": params}, x)


def nnx_model():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.backbone = nnx.Linear(4, 3, rngs=rngs)
            self.rul_head = nnx.Linear(3, 1, rngs=rngs)
            self.health_head = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            h = nnx.tanh(self.backbone(x))
            return self.rul_head(h).mean(), self.health_head(h).mean()

    graph, params = nnx.split(Model(), nnx.Param)
    return params, lambda params: nnx.merge(graph, params)(jnp.ones((2, 4)))


def equinox_model():
    class Model(eqx.Module):
        backbone: eqx.nn.Linear
        rul_head: eqx.nn.Linear
        health_head: eqx.nn.Linear

        def __init__(self):
            keys = jax.random.split(jax.random.key(0), 3)
            self.backbone = eqx.nn.Linear(4, 3, key=keys[0])
            self.rul_head = eqx.nn.Linear(3, 1, key=keys[1])
            self.health_head = eqx.nn.Linear(3, 3, key=keys[2])

        def __call__(self, x):
            h = jnp.tanh(self.backbone(x))
            return self.rul_head(h).mean(), self.health_head(h).mean()

    params, static = eqx.partition(Model(), eqx.is_inexact_array)
    return params, lambda params: eqx.combine(params, static)(jnp.ones(4))


ON_MODELS = list(
    itertools.product(
        [linen_model, nnx_model, equinox_model], [exclude("*_head"), only("backbone")]
    )
)


@pytest.mark.parametrize(("model", "shared"), rest_slow_of_several(ON_MODELS, fast=ON_MODELS[1:2]))
def test_frameworks(model, shared):
    params, losses_fn = model()
    selection = select(shared, None, params)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)]
    assert [("backbone" in path) for path in paths] == list(selection.shared)
    # Found from the gradients, sharing is the same.
    _, grads = jax.jit(task_value_and_grad(losses_fn))(params)
    named, automatic = (
        balance(weighting.inverse_share(2), shared=shared),
        balance(weighting.inverse_share(2)),
    )
    _, by_name = jax.jit(named.update)(grads, named.init(params), params)
    _, by_gradient = jax.jit(automatic.update)(grads, automatic.init(params), params)
    assert np.all(by_name.task_norms > 0)
    np.testing.assert_array_equal(by_name.task_norms, by_gradient.task_norms)
    np.testing.assert_array_equal(by_gradient.seen_by_task.all(axis=1), selection.shared)


def test_an_equinox_module_of_bools_is_a_mask():
    params = {"mlp": eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))}
    params = eqx.filter(params, eqx.is_inexact_array)
    mask = jax.tree.map(lambda x: x.ndim == 2, params)
    assert list(select(mask["mlp"], None, params["mlp"]).shared) == [True, False, True, False]
