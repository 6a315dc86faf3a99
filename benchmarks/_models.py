"""The models that the benchmarks train: an encoder and K heads, each with one batch."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gaba_jax.turbofan.model import Backbone

WINDOW, CHANNELS = 30, 17  # of a turbofan window


class Model(NamedTuple):
    params: Any
    batch: tuple[jax.Array, jax.Array]
    encoder: Callable[..., jax.Array]  # params, *batch -> features
    losses_fn: Callable[..., tuple[jax.Array, ...]]  # params, features, *batch -> K losses

    def whole(self, params: Any, *batch: jax.Array) -> tuple[jax.Array, ...]:
        """The losses from the parameters, without the split at the features."""
        return self.losses_fn(params, self.encoder(params, *batch), *batch)


class Layers(nnx.Module):
    """Dense layers with ReLU."""

    def __init__(self, widths: list[int], rngs: nnx.Rngs):
        self.layers = nnx.List(nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(widths))

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


class Unfolded(nnx.Module):
    """Two temporal convolutions of width 5, as unfold and dense; the features are their mean."""

    def __init__(self, rngs: nnx.Rngs, width: int = 128):
        self.first = nnx.Linear(5 * CHANNELS, width, rngs=rngs)
        self.second = nnx.Linear(5 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (self.first, self.second):
            length = x.shape[1] - 4
            unfolded = jnp.concatenate([x[:, i : i + length] for i in range(5)], axis=2)
            x = nnx.relu(layer(unfolded))
        return x.mean(axis=1)


class Recurrent(nnx.Module):
    """Two LSTM layers; the features are the last state."""

    def __init__(self, rngs: nnx.Rngs, width: int = 128):
        self.width = width
        self.first = nnx.RNN(nnx.OptimizedLSTMCell(CHANNELS, width, rngs=rngs))
        self.second = nnx.RNN(nnx.OptimizedLSTMCell(width, width, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        zeros = jnp.zeros((x.shape[0], self.width), x.dtype)
        for layer in (self.first, self.second):
            x = layer(x, initial_carry=(zeros, zeros))
        return x[:, -1]


class Transformer(nnx.Module):
    """Two pre-norm blocks; the features are the mean over time."""

    def __init__(self, rngs: nnx.Rngs, width: int = 128):
        self.embed = nnx.Linear(CHANNELS, width, rngs=rngs)
        self.blocks = nnx.List(
            nnx.Dict(
                norm_0=nnx.LayerNorm(width, rngs=rngs),
                attention=nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs),
                norm_1=nnx.LayerNorm(width, rngs=rngs),
                wide=nnx.Linear(width, 4 * width, rngs=rngs),
                narrow=nnx.Linear(4 * width, width, rngs=rngs),
            )
            for _ in range(2)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block.attention(block.norm_0(x))
            x = x + block.narrow(nnx.gelu(block.wide(block.norm_1(x))))
        return x.mean(axis=1)


def build(name: str, num_tasks: int, batch_size: int = 64, widths: tuple[int, ...] = ()) -> Model:
    """One of ``MODELS`` with K linear heads whose losses are up to 500 times apart."""
    rngs = nnx.Rngs(0)
    widths = widths or (256, 880, 880, 880, 880)
    shape: tuple[int, ...] = (batch_size, WINDOW, CHANNELS)
    if name == "mlp":
        trunk, shape = Layers(list(widths), rngs), (batch_size, widths[0])
    else:
        trunk = MODELS[name](rngs)
    graph, backbone, rest = nnx.split(trunk, nnx.Param, ...)
    keys = jax.random.split(jax.random.key(0), num_tasks + 2)
    x = jax.random.normal(keys[0], shape)
    y = jax.random.normal(keys[1], (batch_size, num_tasks))

    def encoder(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return nnx.merge(graph, params["backbone"], rest, copy=True)(x)

    features = jax.eval_shape(encoder, {"backbone": backbone}, x, y).shape[-1]
    heads = {
        f"head_{i}": jax.random.normal(keys[i + 2], (features,)) / features**0.5
        for i in range(num_tasks)
    }
    scales = jnp.geomspace(500.0, 1.0, num_tasks)

    def losses_fn(params: Any, h: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(
            scales[i] * jnp.mean((h @ params["heads"][f"head_{i}"] - y[:, i]) ** 2)
            for i in range(num_tasks)
        )

    return Model({"backbone": backbone, "heads": heads}, (x, y), encoder, losses_fn)


def build_loaders(num_tasks: int, rows: int = 32) -> Model:
    """One MLP and K losses, each on a batch of its own: nothing but parameters is shared."""
    rngs = nnx.Rngs(0)
    graph, params, rest = nnx.split(Layers([39, 400, 400, 400, 8], rngs), nnx.Param, ...)
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (num_tasks, rows, 39))
    y = jax.random.normal(keys[1], (num_tasks, rows, 8))
    scales = jnp.geomspace(500.0, 1.0, num_tasks)

    def encoder(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.zeros([])  # there is no feature that the losses share

    def losses_fn(params: Any, h: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        model = nnx.merge(graph, params, rest, copy=True)
        return tuple(scales[i] * jnp.mean((model(x[i]) - y[i]) ** 2) for i in range(num_tasks))

    return Model(params, (x, y), encoder, losses_fn)


MODELS: dict[str, Callable[[nnx.Rngs], nnx.Module] | None] = {
    "mlp": None,
    "turbofan": lambda rngs: Backbone(WINDOW, CHANNELS, rngs=rngs),
    "convolution": Unfolded,
    "lstm": Recurrent,
    "transformer": Transformer,
}
