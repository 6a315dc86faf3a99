"""Backward passes that are no derivative: what is known of them, and what they give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gaba_jax import balance, balanced_value_and_grad, task_value_and_grad, weighting
from gaba_jax._program import Program
from tests.slow import rest_slow_of_several

SIZE = 6
FIXED = jnp.linspace(-1.0, 2.0, SIZE)
KEY = jax.random.key(0)
MATRIX = jnp.cos(jnp.arange(36.0)).reshape(SIZE, SIZE)


def looped(step):
    return lambda g: lax.scan(lambda c, w: (step(c * w), c), g, FIXED[:3])


# What a backward pass may do with a cotangent g [SIZE]: whether it is linear, and is 0 at 0.
BACKWARD = {
    "times": (lambda g: g * FIXED, True, True),
    "product": (lambda g: MATRIX @ g, True, True),
    "masked": (lambda g: jnp.where(FIXED > 0, g, 0), True, True),
    "padded": (lambda g: jnp.pad(g, 2), True, True),
    "joined": (lambda g: jnp.concatenate([g, jnp.zeros(2)]), True, True),
    "added to zeros": (lambda g: jnp.zeros(9).at[jnp.arange(SIZE)].add(g), True, True),
    "bf16": (lambda g: g.astype(jnp.bfloat16).astype(jnp.float32), True, True),
    "loop": (looped(lambda c: c), True, True),
    "remat": (jax.checkpoint(lambda g: jnp.tanh(FIXED) * g), True, True),
    "branch": (lambda g: lax.cond(FIXED[0] > 0, lambda: g, lambda: 2 * g), True, True),
    "clipped": (lambda g: jnp.clip(g, -0.1, 0.1), False, True),
    "of norm 1": (lambda g: g / jnp.maximum(jnp.linalg.norm(g), 1e-6), False, True),
    "without NaN": (lambda g: jnp.where(jnp.isnan(g), 0, g), False, True),
    "sign": (jnp.sign, False, True),
    "squared": (lambda g: g**2, False, True),
    "int8": (lambda g: (100 * g).astype(jnp.int8).astype(jnp.float32), False, True),
    "rounded": (lambda g: lax.reduce_precision(g, 5, 2), False, True),
    "int8 in a loop": (looped(lambda c: c.astype(jnp.int8).astype(jnp.float32)), False, True),
    "rounded in remat": (jax.checkpoint(lambda g: lax.reduce_precision(g, 5, 2)), False, True),
    "cosine": (jnp.cos, False, False),
    "plus": (lambda g: g + FIXED, False, False),
    "minus in a loop": (looped(lambda c: c - 0.3), False, False),
    "plus in remat": (jax.checkpoint(lambda g: g + 1), False, False),
    "plus in a branch": (
        lambda g: lax.cond(FIXED[0] > 0, lambda: g, lambda: g + 1),
        False,
        False,
    ),
    "plus while": (
        lambda g: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + FIXED), (0, g))[1],
        False,
        False,
    ),
    "padded by 1": (lambda g: jnp.pad(g, 2, constant_values=1.0), False, False),
    "joined to ones": (lambda g: jnp.concatenate([g, jnp.ones(2)]), False, False),
    "where 1": (lambda g: jnp.where(FIXED > 0, g, 1), False, False),
    "added to ones": (lambda g: jnp.ones(9).at[jnp.arange(SIZE)].add(g), False, False),
    "ones added": (lambda g: jnp.tile(g, 2).at[0].add(1.0), False, False),
    "set": (lambda g: g.at[0].set(1.0), False, False),
    "nothing of it": (lambda g: FIXED, False, False),
    "ones multiplied": (lambda g: jnp.ones(SIZE).at[0].multiply(g[0]), False, False),
    "zeros multiplied": (lambda g: jnp.zeros(SIZE).at[0].multiply(g[0]), True, True),
    "complex": (lambda g: (lax.complex(g, 0 * g) * (1 + 1j)).real, True, True),
    "complex plus": (lambda g: (lax.complex(g, 0 * g + 0.1) * (1 + 1j)).real, False, False),
    "looked up by it": (
        lambda g: jnp.take(FIXED, (100 * g).astype(jnp.int32), mode="clip"),
        False,
        False,
    ),
    "or": (lambda g: 0.1 * (g.astype(bool) | (FIXED > 0)), False, False),
    "shifted bits": (lambda g: (4 << g.astype(jnp.int32)).astype(jnp.float32), False, False),
    "noise": (
        lambda g: (
            g + jax.random.normal(jax.random.fold_in(KEY, g.sum().astype(jnp.int32)), (SIZE,))
        ),
        False,
        False,
    ),
    "a function of the host": (
        lambda g: jax.pure_callback(np.cos, g, g, vmap_method="sequential"),
        False,
        False,
    ),
    "fp8": (lambda g: g.astype(jnp.float8_e5m2).astype(jnp.float32), False, True),
    "whole numbers": (lambda g: g + (lax.div(g.astype(int) + 1, 2) * 2 - 1), False, False),
    "NaN": (lambda g: lax.max(g, jnp.nan * jnp.ones(SIZE)), False, False),
    "solved": (lambda g: jax.scipy.linalg.solve_triangular(MATRIX, g), True, True),
    "over what may be 0": (lambda g: g / jnp.quantile(jnp.abs(g), 0.9), False, False),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_what_is_known_of_a_backward_pass(name):
    backward, linear, zero_at_zero = BACKWARD[name]
    program = Program(lambda g: jax.tree.leaves(backward(g)), [jnp.ones(SIZE)], SIZE)
    assert program.separates() == zero_at_zero
    assert program.is_linear() == linear
    at_zero = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(backward(jnp.zeros(SIZE)))])
    assert bool(jnp.all(at_zero == 0)) >= zero_at_zero


def with_backward(backward):
    """The identity, with that backward pass."""
    identity = jax.custom_vjp(lambda h: h)
    identity.defvjp(lambda h: (h, None), lambda _, g: (backward(g),))
    return identity


@jax.custom_vjp
def with_auxiliary_loss(h, loss):
    """What mixtures of experts do: the gate's loss is in no value, and joins on the way back."""
    del loss
    return h


with_auxiliary_loss.defvjp(lambda h, loss: (h, None), lambda _, g: (g, jnp.float32(0.1)))


def heads(params, h):
    return jnp.mean((h @ params["a"] - 1) ** 2), jnp.mean((h @ params["b"]) ** 2)


def experts(params, x):
    return with_auxiliary_loss(jnp.tanh(x @ params["w"]), jnp.mean((x @ params["gate"]) ** 2))


def auxiliary_loss(params, x):
    return heads(params, experts(params, x))


def auxiliary_loss_of_one(params, x):
    return heads(params, jnp.tanh(x @ params["w"]))[0], heads(params, experts(params, x))[1]


def auxiliary_loss_in_a_loop(params, x):
    def layer(h, w):
        return with_auxiliary_loss(jnp.tanh(h @ w), jnp.mean((h @ w) ** 2)), None

    return heads(params, lax.scan(layer, x, params["layers"])[0])


def rounded(backward):
    change = with_backward(backward)
    return lambda params, x: heads(params, change(jnp.tanh(x @ params["w"])))


def crossed(params, x):
    """The gradient of each output is scaled by what the other's is: 1 where that is 0."""
    both = jax.custom_vjp(lambda h: (h, 2 * h))
    both.defvjp(lambda h: (both(h), None), lambda _, g: (g[0] * jnp.cos(g[1]) + g[1],))
    one, other = both(jnp.tanh(x @ params["w"]))
    return heads(params, one)[0], heads(params, other)[1]


def crossed_in_a_body(params, x):
    """What the second output adds on its way back is of no other loss."""
    both = jax.custom_vjp(lambda h: (h, 2 * h))
    both.defvjp(lambda h: (both(h), None), lambda _, g: (g[0] * jnp.cos(g[1]) + g[1],))
    plus = with_backward(lambda g: g + 1)

    @jax.checkpoint
    def body(h):
        one, other = both(h)
        return one, plus(other)

    one, other = body(jnp.tanh(x @ params["w"]))
    return heads(params, one)[0], heads(params, other)[1]


MODELS = {
    "auxiliary loss": auxiliary_loss,
    "auxiliary loss of one": auxiliary_loss_of_one,
    "auxiliary loss in a loop": auxiliary_loss_in_a_loop,
    "int8": rounded(lambda g: (100 * g).astype(jnp.int8).astype(g.dtype) / 100),
    "reduced precision": rounded(lambda g: lax.reduce_precision(g, 5, 2)),
    "shifted": rounded(lambda g: g + 0.01),
    "crossed": crossed,
    "crossed in a body": crossed_in_a_body,
    "fp8": rounded(lambda g: g.astype(jnp.float8_e5m2).astype(g.dtype)),
}
OPTIONS = {
    "exact": {},
    "every": {"every": 2},
    "drop": {"nonfinite": "drop"},
    "lagged": {"measure": "lagged"},
    "groups": {"groups": "leaf"},
}
CASES = [(model, option) for model in MODELS for option in OPTIONS]
FAST = [("auxiliary loss", "exact"), ("auxiliary loss in a loop", "every"), ("int8", "every")]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"w": normal(1, 8, 8), "gate": normal(2, 8, 8), "a": normal(3, 8), "b": normal(4, 8)}
PARAMS["layers"] = normal(5, 3, 8, 8) / 3
X = normal(0, 4, 8)


@pytest.mark.parametrize(("model", "option"), rest_slow_of_several(CASES, FAST))
@pytest.mark.parametrize(
    "make",
    [weighting.equalize, pytest.param(weighting.upgrad, marks=pytest.mark.slow)],
)
def test_each_task_has_what_its_own_backward_pass_gives(model, option, make):
    """The same as the stacked gradients, on held updates too; the weights do not sum to 1."""
    losses_fn, rule = MODELS[model], weighting.rescaled(make(2), 3.0)
    balanced = balanced_value_and_grad(losses_fn, rule, **OPTIONS[option])
    groups = OPTIONS[option].get("groups")
    assert groups in (None, "leaf")

    def of_leaves(grads, weights):
        """[leaves or 1, K] weights, in the order of the leaves."""
        rows = jnp.broadcast_to(jnp.atleast_2d(weights), (len(PARAMS), 2))
        leaves, structure = jax.tree.flatten(grads)
        each = [jnp.tensordot(w, leaf, 1) for w, leaf in zip(rows, leaves, strict=True)]
        return structure.unflatten(each)

    losses, grads = task_value_and_grad(losses_fn)(PARAMS, X)
    if groups is None:
        _, measured = balance(rule).update(grads, balance(rule).init(PARAMS), PARAMS)
    step, state = jax.jit(balanced.value_and_grad), balanced.init(PARAMS)
    for _ in range(2):
        before = state
        (found_losses, found), state = step(PARAMS, state, X)
        lagged = option == "lagged"
        weights = before.next_task_weights if lagged else state.task_weights
        expected = of_leaves(grads, weights)
        for name in PARAMS:
            scale = max(float(jnp.max(jnp.abs(expected[name]))), 1e-6)
            np.testing.assert_allclose(found[name], expected[name], atol=2e-5 * scale)
        np.testing.assert_allclose(found_losses, losses, rtol=1e-6)
        if groups is None:
            np.testing.assert_allclose(state.task_norms, measured.task_norms, rtol=1e-5)


def test_slices_have_what_their_own_backward_pass_gives():
    def loss_fn(params, x):
        return jnp.mean((experts(params, x) @ params["a"] - 1) ** 2)

    x = normal(6, 3, 4, 8)
    balanced = balanced_value_and_grad(loss_fn, weighting.inverse_norm(3), in_axes=0)
    (_, found), state = jax.jit(balanced.value_and_grad)(PARAMS, balanced.init(PARAMS), x)
    each = jax.vmap(jax.grad(loss_fn), (None, 0))(PARAMS, x)
    weighted = functools.partial(jnp.tensordot, state.task_weights, axes=1)
    expected = jax.tree.map(weighted, each)
    assert float(jnp.max(jnp.abs(expected["gate"]))) > 0.01
    for name in PARAMS:
        scale = float(jnp.max(jnp.abs(expected[name])))
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-5 * scale)


def test_a_gradient_that_is_printed(capfd):
    """An operation without results, as in debugging."""

    def show(g):
        jax.debug.print("{}", jnp.sum(g * g))
        return g

    fn = rounded(show)
    for rule, options in [(weighting.uniform(2), {}), (weighting.inverse_norm(2), {"every": 2})]:
        balanced = balanced_value_and_grad(fn, rule, **options)
        (_, found), state = balanced.value_and_grad(PARAMS, balanced.init(PARAMS), X)
        _, grads = task_value_and_grad(fn)(PARAMS, X)
        expected = jnp.tensordot(state.task_weights, grads["w"], 1)
        scale = float(jnp.max(jnp.abs(expected)))
        np.testing.assert_allclose(found["w"], expected, rtol=0, atol=1e-6 * scale)
