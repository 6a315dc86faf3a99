"""A bidirectional LSTM layer for training on few cores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float


class BidirectionalLSTM(nnx.Module):
    r"""One layer over both directions of time, [T, B, C] to [T, B, 2 H].

    .. math::
        z_t = W x_t + U h_{t-1} + b = (i, f, g, o), \quad
        c_t = \sigma(f) c_{t-1} + \sigma(i) \tanh g, \quad h_t = \sigma(o) \tanh c_t

    with one bias per gate, where PyTorch has two that only ever act as their sum; that of f starts
    at 1, so that the cell remembers at first.
    """

    def __init__(self, channels: int, hidden: int, *, rngs: nnx.Rngs):
        self.forward = _Direction(channels, hidden, reverse=False, rngs=rngs)
        self.backward = _Direction(channels, hidden, reverse=True, rngs=rngs)

    def __call__(self, x: Float[Array, "time batch channels"]) -> Float[Array, "time batch out"]:
        """The outputs h of both directions at each step."""
        return jnp.concatenate([self.forward(x), self.backward(x)], axis=-1)


class _Direction(nnx.Module):
    """The products with x are one matrix product for all steps, before the loop."""

    def __init__(self, channels: int, hidden: int, *, reverse: bool, rngs: nnx.Rngs):
        self.reverse = reverse
        forget = nnx.initializers.constant(jnp.repeat(jnp.array([0.0, 1.0, 0.0, 0.0]), hidden))
        self.inputs = nnx.Linear(channels, 4 * hidden, bias_init=forget, rngs=rngs)
        orthogonal = nnx.initializers.orthogonal()
        self.recurrent = nnx.Param(orthogonal(rngs.params(), (hidden, 4 * hidden)))

    def __call__(self, x: Array) -> Array:
        return _recurrence(self.reverse, over_steps(self.inputs, x), self.recurrent[...])


def over_steps(
    layer: nnx.Linear, x: Float[Array, "time batch channels"]
) -> Float[Array, "time batch out"]:
    """A dense layer at each step, as one product of matrices.

    Given three axes, XLA's CPU backend transposes copies of x and of its cotangent for the gradient
    of the kernel, which then takes a third longer.
    """
    return layer(_flat(x)).reshape(*x.shape[:-1], -1)


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(reverse: bool, projected: Array, kernel: Array) -> Array:
    """H [T, B, H] from the products with x [T, B, 4 H] and U, transposed [H, 4 H].

    The backward pass is written out for one reason: the gradient of U is a sum over the steps,
    which then is one matrix product after the loop, not one in each step.
    """
    return _steps(reverse, projected, kernel)[0]


def _steps(reverse: bool, projected: Array, kernel: Array) -> tuple[Array, Any]:
    """h, and what the backward pass reads: c and the gates, all [T, B, H]."""

    def step(carry: tuple[Array, Array], products: Array) -> tuple[tuple[Array, Array], Any]:
        h, c = carry
        i, f, g, o = jnp.split(products + h @ kernel, 4, axis=-1)
        i, f, g, o = nnx.sigmoid(i), nnx.sigmoid(f), jnp.tanh(g), nnx.sigmoid(o)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        return (h, c), (h, (c, (i, f, g, o)))

    zeros = jnp.zeros((projected.shape[1], kernel.shape[0]), projected.dtype)
    return lax.scan(step, (zeros, zeros), projected, reverse=reverse)[1]


def _forward_pass(reverse: bool, projected: Array, kernel: Array) -> tuple[Array, Any]:
    outputs, kept = _steps(reverse, projected, kernel)
    return outputs, (outputs, *kept, kernel)


def _backward_pass(reverse: bool, kept: Any, cotangents: Array) -> tuple[Array, Array]:
    outputs, cells, gates, kernel = kept

    def before(x: Array) -> Array:
        """Of the step before, as the recurrence runs; zero before the first."""
        zero = jnp.zeros_like(x[:1])
        return jnp.concatenate([x[1:], zero] if reverse else [zero, x[:-1]])

    def step(carry: tuple[Array, Array], at: Any) -> tuple[tuple[Array, Array], Array]:
        dh, dc = carry
        cotangent, c, c_before, (i, f, g, o) = at
        dh = dh + cotangent
        tanh_c = jnp.tanh(c)
        dc = dc + dh * o * (1 - tanh_c**2)
        of_gates = (
            dc * g * i * (1 - i),
            dc * c_before * f * (1 - f),
            dc * i * (1 - g**2),
            dh * tanh_c * o * (1 - o),
        )
        dz = jnp.concatenate(of_gates, axis=-1)
        return (dz @ kernel.T, dc * f), dz

    zeros = jnp.zeros_like(cells[0])
    inputs = (cotangents, cells, before(cells), gates)
    _, dz = lax.scan(step, (zeros, zeros), inputs, reverse=not reverse)
    return dz, _flat(before(outputs)).T @ _flat(dz)


_recurrence.defvjp(_forward_pass, _backward_pass)
