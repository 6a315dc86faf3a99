"""Two-headed networks: remaining useful life and health state from one backbone."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gaba_jax.turbofan._lstm import BidirectionalLSTM, over_steps
from gaba_jax.turbofan.data import HEALTH_NAMES


class Backbone(nnx.Module):
    """What both tasks share: temporal filters, then dense layers to 32 features.

    The 32 filters are a convolution over time whose kernels span the window and are shared by all
    channels, written as a dense layer over time. What a trend looks like is learned once for all
    sensors, which generalises better than kernels of their own; and on a CPU the backward pass of
    a matrix product is about ten times faster than that of XLA's convolution.
    """

    def __init__(self, window: int, channels: int, *, rngs: nnx.Rngs):
        self.temporal_filters = nnx.Linear(window, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(channels * 32, rngs=rngs)
        self.dense_0 = nnx.Linear(channels * 32, 64, rngs=rngs)
        self.dense_1 = nnx.Linear(64, 32, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch window channels"], *, key: jax.Array | None = None
    ) -> Float[Array, "batch 32"]:
        """The shared features."""
        filtered = self.temporal_filters(jnp.swapaxes(x, 1, 2))
        x = self.norm(filtered.reshape(x.shape[0], -1))
        return nnx.relu(self.dense_1(nnx.relu(self.dense_0(x))))


class CompactModel(nnx.Module):
    """Backbone with two linear heads, ``rul_head`` and ``health_head``; 39,172 parameters.

    Args:
      window: rows of a window.
      channels: columns of a window, 17 or 14.
      rngs: the random streams that Flax draws the initial values from.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from gaba_jax.turbofan.model import CompactModel
      >>> model = CompactModel(30, 17, rngs=nnx.Rngs(0))
      >>> rul, logits = model(jnp.zeros((4, 30, 17)))
      >>> rul.shape, logits.shape
      ((4,), (4, 3))
    """

    def __init__(self, window: int, channels: int, *, rngs: nnx.Rngs):
        self.backbone = Backbone(window, channels, rngs=rngs)
        self.rul_head = nnx.Linear(32, 1, rngs=rngs)
        self.health_head = nnx.Linear(32, len(HEALTH_NAMES), rngs=rngs)

    def heads(
        self, features: Float[Array, "batch 32"]
    ) -> tuple[Float[Array, " batch"], Float[Array, "batch 3"]]:
        """The RUL in cycles [batch] and the health logits [batch, 3]."""
        return self.rul_head(features)[:, 0], self.health_head(features)

    def __call__(
        self, x: Float[Array, "batch window channels"], *, key: jax.Array | None = None
    ) -> tuple[Float[Array, " batch"], Float[Array, "batch 3"]]:
        """RUL and logits, as :meth:`heads`; ``key`` changes nothing, there is no dropout."""
        return self.heads(self.backbone(x, key=key))


class FullModel(nnx.Module):
    """The network that the method was published with; 3,493,380 parameters, 0.2 % in the heads.

    Three convolutions, two bidirectional LSTM layers, self-attention with 8 heads, residual and
    LayerNorm, its last step, dense layers to the 32 shared features; heads of 32-64-32-16-1, which
    ends in a ReLU, and 32-32-16-3. PyTorch counts 3,497,476: its LSTM has two biases per gate.

    What was not published is chosen so: dropout after the convolutions alone, the last bias of the
    RUL head 1 (at 0 its ReLU can be dead from the start), the rest as Flax starts its layers.

    Args:
      window: rows of a window; no parameter depends on it.
      channels: columns of a window, 17 or 14.
      dropout: share of the features dropped after each convolution in training, default 0.1.
      rngs: the random streams that Flax draws the initial values from.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from gaba_jax.turbofan.model import FullModel
      >>> @nnx.eval_shape  # runs nothing: the shapes alone
      ... def outputs():
      ...     return FullModel(30, 17, rngs=nnx.Rngs(0))(jnp.zeros((4, 30, 17)))
      >>> outputs[0].shape, outputs[1].shape
      ((4,), (4, 3))
    """

    def __init__(self, window: int, channels: int, *, dropout: float = 0.1, rngs: nnx.Rngs):
        del window
        self.backbone = FullBackbone(channels, dropout, rngs=rngs)
        self.rul_head = DenseLayers(32, 64, 32, 16, 1, last_bias=1.0, rngs=rngs)
        self.health_head = DenseLayers(32, 32, 16, len(HEALTH_NAMES), rngs=rngs)

    def heads(
        self, features: Float[Array, "batch 32"]
    ) -> tuple[Float[Array, " batch"], Float[Array, "batch 3"]]:
        """The RUL in cycles [batch] and the health logits [batch, 3]."""
        return nnx.relu(self.rul_head(features)[:, 0]), self.health_head(features)

    def __call__(
        self, x: Float[Array, "batch window channels"], *, key: jax.Array | None = None
    ) -> tuple[Float[Array, " batch"], Float[Array, "batch 3"]]:
        """As :meth:`heads`; a key is for training, none for evaluation.

        In training there is dropout, and BatchNorm takes the moments of the batch and updates its
        running ones.
        """
        return self.heads(self.backbone(x, key=key))


class FullBackbone(nnx.Module):
    """Convolutions, two bidirectional LSTM layers, attention, dense layers to 32 features."""

    def __init__(self, channels: int, dropout: float, *, rngs: nnx.Rngs):
        self.frontend = Frontend(channels, dropout, rngs=rngs)
        self.lstm_0 = BidirectionalLSTM(64, 256, rngs=rngs)
        self.lstm_1 = BidirectionalLSTM(512, 256, rngs=rngs)
        self.attention = LastStepAttention(512, 8, rngs=rngs)
        self.dense = DenseLayers(512, 256, 64, 32, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch window channels"], *, key: jax.Array | None = None
    ) -> Float[Array, "batch 32"]:
        """The shared features."""
        x = jnp.swapaxes(x, 0, 1)  # time first, as the recurrences read it
        x = self.lstm_1(self.lstm_0(self.frontend(x, key=key)))
        return nnx.relu(self.dense(self.attention(x)))


class Frontend(nnx.Module):
    """Convolutions over time: kernel 3 and same padding, BatchNorm, ReLU, dropout, three times.

    Each is written as a dense layer over three neighbouring steps: on a CPU the backward pass of a
    matrix product is about ten times faster than that of XLA's convolution.
    """

    def __init__(self, channels: int, dropout: float, *, rngs: nnx.Rngs):
        widths = [(channels, 64), (64, 128), (128, 64)]
        self.convolutions = nnx.List([nnx.Linear(3 * a, b, rngs=rngs) for a, b in widths])
        self.norms = nnx.List([nnx.BatchNorm(b, momentum=0.9, rngs=rngs) for _, b in widths])
        self.dropout = nnx.Dropout(dropout)

    def __call__(
        self, x: Float[Array, "time batch channels"], *, key: jax.Array | None
    ) -> Float[Array, "time batch 64"]:
        """The features of each step."""
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            padded = jnp.pad(x, ((1, 1), (0, 0), (0, 0)))
            x = over_steps(convolution, jnp.concatenate([padded[:-2], x, padded[2:]], axis=-1))
            x = nnx.relu(norm(x, use_running_average=key is None))
            if key is not None:
                x = self.dropout(x, rngs=jax.random.fold_in(key, i))
        return x


class LastStepAttention(nnx.Module):
    r"""Self-attention over time with residual and LayerNorm, at the last step: [T, B, C] to [B, C].

    The query is that of the last step alone, since no other is read, and one query needs no key
    and no value of each step, whose products would be a fifth of the network's: for each head

    .. math::
        q \cdot (W_k x_t + b_k) = (W_k^\top q) \cdot x_t + q \cdot b_k, \quad
        \sum_t a_t (W_v x_t + b_v) = W_v \sum_t a_t x_t + b_v

    The parameters and the numbers are those of attention between all steps.
    """

    def __init__(self, features: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (
            nnx.Linear(features, features, rngs=rngs) for _ in range(4)
        )
        self.norm = nnx.LayerNorm(features, rngs=rngs)

    def __call__(self, x: Float[Array, "time batch features"]) -> Float[Array, "batch features"]:
        """The last step, with what it took from the others."""
        last = x[-1]
        query = self._by_head(self.query(last))
        to_keys = jnp.einsum("bhd,chd->bhc", query, self._by_head(self.key.kernel))
        bias = jnp.einsum("bhd,hd->bh", query, self._by_head(self.key.bias))
        scores = jnp.einsum("bhc,tbc->bht", to_keys, x) + bias[..., None]
        shares = nnx.softmax(scores / math.sqrt(query.shape[-1]))
        attended = jnp.einsum("bht,tbc->bhc", shares, x)
        values = jnp.einsum("bhc,chd->bhd", attended, self._by_head(self.value.kernel))
        values += self._by_head(self.value.bias)
        return self.norm(last + self.out(values.reshape(last.shape)))

    def _by_head(self, x: Any) -> Array:
        return x[...].reshape(*x.shape[:-1], self.num_heads, -1)


class DenseLayers(nnx.Module):
    """Dense layers with ReLU between them, and none after the last."""

    def __init__(self, *widths: int, last_bias: float = 0.0, rngs: nnx.Rngs):
        constant = nnx.initializers.constant
        biases = [0.0] * (len(widths) - 2) + [last_bias]
        self.layers = nnx.List(
            [
                nnx.Linear(a, b, bias_init=constant(bias), rngs=rngs)
                for (a, b), bias in zip(itertools.pairwise(widths), biases, strict=True)
            ]
        )

    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch out"]:
        """The last layer's output."""
        for i, layer in enumerate(self.layers):
            x = layer(nnx.relu(x) if i else x)
        return x
