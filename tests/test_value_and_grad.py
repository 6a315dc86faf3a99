"""Losses and stacked gradients: equal to one gradient at a time, from one forward pass."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from gaba_jax import task_names, task_value_and_grad
from tests.slow import rest_slow_of_several

METHODS = ["unroll", "vmap", "scan"]


CONTAINERS = ["dict", "tuple", "list", "array"]
WAYS = list(itertools.product(METHODS, CONTAINERS, [False, True]))
OFTEN = [way for way in WAYS if way[2] or way[:2] == ("unroll", "dict")]


@pytest.mark.parametrize(("method", "container", "jitted"), rest_slow_of_several(WAYS, fast=OFTEN))
def test_equal_to_one_gradient_at_a_time(toy, method, container, jitted):
    losses_fn, params, batch = toy
    make = {
        "dict": lambda d: d,
        "tuple": lambda d: (d["health"], d["rul"]),
        "list": lambda d: [d["health"], d["rul"]],
        "array": lambda d: jnp.stack([d["health"], d["rul"]]),
    }[container]
    function = task_value_and_grad(lambda *args: make(losses_fn(*args)), method=method)
    losses, grads = (jax.jit(function) if jitted else function)(params, *batch)
    for i, name in enumerate(["health", "rul"]):
        loss, grad = jax.value_and_grad(lambda p, n=name: losses_fn(p, *batch)[n])(params)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-6)
        largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(grad))
        chex.assert_trees_all_close(
            jax.tree.map(lambda g, i=i: g[i], grads), grad, rtol=1e-6, atol=1e-6 * largest
        )
    assert losses.shape == (2,)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        grads, jax.tree.map(lambda p: jnp.zeros((2, *p.shape), p.dtype), params)
    )


@pytest.mark.parametrize("method", METHODS)
def test_aux_and_keyword_arguments(toy, method):
    losses_fn, params, (x, y) = toy

    def with_aux(params, x, *, y):
        losses = losses_fn(params, x, y)
        return losses, {"total": sum(losses.values()), "rows": x.shape[0]}

    (losses, aux), _ = task_value_and_grad(with_aux, has_aux=True, method=method)(params, x, y=y)
    np.testing.assert_allclose(aux["total"], losses.sum(), rtol=1e-6)
    assert aux["rows"] == 16


def count(jaxpr, name):
    """How often a primitive stands in a jaxpr, inner ones included."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for inner in jaxprs_in_params(equation.params):
            total += count(inner, name)
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_tasks", [2, 5])
def test_one_forward_pass(method, num_tasks):
    def losses_fn(w, heads, x):
        h = jnp.exp(x @ w)  # exp stands in the forward pass alone: its derivative is its value
        return tuple(h.mean(axis=0) @ head for head in heads)

    args = jnp.ones((4, 3)), jnp.ones((num_tasks, 3)), jnp.ones((2, 4))
    closed = jax.make_jaxpr(task_value_and_grad(losses_fn, method=method))(*args)
    assert count(closed.jaxpr, "exp") == 1
    separate = jax.make_jaxpr(
        lambda *a: [
            jax.grad(lambda w, i=i: losses_fn(w, *a[1:])[i])(a[0]) for i in range(num_tasks)
        ]
    )(*args)
    assert count(separate.jaxpr, "exp") == num_tasks  # what is counted would show


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("make", [tuple, list, lambda x: {"a": x[0], "b": x[1]}])
def test_a_nan_in_one_task_does_not_reach_the_others(make, jitted):
    def losses_fn(w, x):
        h = jnp.tanh(x @ w)
        return make([jnp.mean(h**2), jnp.nan * h.sum()])

    function = task_value_and_grad(losses_fn)
    _, grads = (jax.jit(function) if jitted else function)(jnp.ones((3, 2)), jnp.ones((4, 3)))
    assert np.all(np.isfinite(grads[0]))
    assert np.all(np.isnan(grads[1]))


def test_custom_vjp_checkpoint_and_scan_models():
    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

    def losses_fn(w, x):
        def body(h, row):
            return jnp.tanh(h @ w + row), None

        h, _ = jax.lax.scan(jax.checkpoint(body), jnp.zeros(3), x)
        return clipped(h).sum(), (h**2).mean()

    w, x = jax.random.normal(jax.random.key(0), (3, 3)), jnp.ones((5, 3))
    for method in METHODS:
        _, grads = jax.jit(task_value_and_grad(losses_fn, method=method))(w, x)
        for i in range(2):
            expected = jax.grad(lambda w, i=i: losses_fn(w, x)[i])(w)
            np.testing.assert_allclose(grads[i], expected, rtol=1e-6, atol=1e-7)


def test_dtypes_follow_the_parameters():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}

    def losses_fn(p):
        return (p["a"] ** 2).sum(), (p["b"] ** 2).sum()

    losses, grads = task_value_and_grad(losses_fn)(params)
    assert losses.dtype == jnp.float32
    assert grads["a"].dtype == jnp.bfloat16
    assert grads["b"].dtype == jnp.float32


def test_a_loss_that_ignores_the_parameters_has_zero_gradient():
    _, grads = task_value_and_grad(lambda w: (w.sum(), jnp.float32(3.0)))(jnp.ones(2))
    np.testing.assert_array_equal(grads, [[1, 1], [0, 0]])


@pytest.mark.parametrize(
    ("losses", "has_aux", "message"),
    [
        (lambda w: [w, w.sum()], False, r"loss '0' has shape \(2,\).*\.mean\(\)"),
        (lambda w: w.sum(), False, "one scalar"),
        (lambda w: (), False, "no losses"),
        (lambda w: ((w.sum(), w.mean()), {"accuracy": w.mean()}), False, "pass has_aux=True"),
        (lambda w: (w, None), False, "pass has_aux=True"),
        (lambda w: ({"a": w.sum(), "b": w.mean()}, w), False, "pass has_aux=True"),
        (lambda w: {"a": w.sum(), "b": None}, False, r"loss 'b' is None.*task_mask="),
        (lambda w: (w.sum(), None), False, r"loss '1' is None.*task_mask="),
        (lambda w: w.astype(jnp.int32), False, "dtype int32"),
        (lambda w: {"a": w.sum() * 1j}, False, "loss 'a' has dtype complex64"),
        (lambda w: w, True, "must return a pair .* or leave has_aux out"),
        (lambda w: (w.sum(), w.mean(), w.max()), True, r"got a tuple of 3. Return \(\(loss_1"),
        (lambda w: (w.sum(), w.mean()), True, "first item is one scalar.*has_aux=True the first"),
    ],
)
def test_wrong_losses(losses, has_aux, message):
    with pytest.raises(ValueError, match=message):
        task_value_and_grad(losses, has_aux=has_aux)(jnp.ones(2))


def test_parameters_that_are_no_arrays():
    """As of an Equinox model that was not partitioned."""
    params = {"w": jnp.ones(2), "activation": jnp.tanh}
    with pytest.raises(ValueError, match=r"'activation' is of type .*eqx.partition"):
        task_value_and_grad(lambda p: (p["w"].sum(), p["w"].mean()))(params)


def test_unknown_method():
    with pytest.raises(ValueError, match='"unroll", "vmap" or "scan"'):
        task_value_and_grad(lambda w: w, method="loop")


def test_task_names():
    assert task_names({"rul": 0.0, "health": 0.0}) == ("health", "rul")
    assert task_names((0.0, 1.0)) == ("0", "1")
    assert task_names(jnp.zeros(3)) == ("0", "1", "2")
