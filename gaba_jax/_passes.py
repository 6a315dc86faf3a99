"""One forward pass and the ways back from it: whole, behind an encoder, or in micro-batches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from gaba_jax._checks import check_inexact, check_losses, is_stacked
from gaba_jax._statistics import wide


class Pass(NamedTuple):
    """K losses after their forward pass.

    Attributes:
      losses: [K].
      aux: what the losses function returned beside them.
      pull_back: ``cotangent [K] -> gradient`` of ``sum_i cotangent_i L_i``.
      pull_back_one: ``i -> gradient`` of loss i, from what loss i depends on alone where the losses
        were returned apart.
      pull_back_apart: the leaves of the first from K cotangents that are scalars, or from one of
        [K] where the losses came stacked; None where there is no one program for them.
      apart: whether the losses were returned apart.
      feature_gradients: leaves [K, ...] of the gradients on an encoder's features.
    """

    losses: Array
    aux: Any
    pull_back: Callable[[Array], Any]
    pull_back_one: Callable[[int], Any]
    pull_back_apart: Callable[..., list[Array]] | None
    apart: bool
    feature_gradients: Callable[[], list[Array]] | None = None

    def each_gradient(self) -> list[Array]:
        """Leaves [K, ...]."""
        return stack([self.pull_back_one(i) for i in range(self.losses.shape[0])])


def whole(losses_of: Callable[[Any], Any], inputs: Any, has_aux: bool) -> Pass:
    """Runs the forward pass of ``losses_of(inputs)`` and checks what it returns."""

    def checked(inputs: Any) -> tuple[Any, Any]:
        out = losses_of(inputs)
        losses, aux = split_aux(out) if has_aux else (out, None)
        check_losses(losses, has_aux)
        return losses, aux

    losses, pushforward, aux = jax.linearize(checked, inputs, has_aux=True)
    stacked, apart = _stack_losses(losses), not is_stacked(losses)

    def transpose(pick: Callable[[Any], Any], cotangent: Any) -> Any:
        # Transposing what one loss depends on leaves the others out of the backward pass.
        transposed = jax.linear_transpose(lambda tangent: pick(pushforward(tangent)), inputs)
        return transposed(cotangent)[0]

    def pull_back(cotangent: Array) -> Any:
        return transpose(_stack_losses, cotangent.astype(stacked.dtype))

    def pull_back_one(index: int) -> Any:
        one = jnp.ones_like(stacked[0])
        return transpose(lambda out: _each(out)[index].astype(one.dtype), one)

    def pull_back_apart(*cotangents: Array) -> list[Array]:
        pick = _each if apart else _stack_losses
        given = list(cotangents) if apart else cotangents[0]
        return jax.tree.leaves(transpose(pick, given))

    return Pass(stacked, aux, pull_back, pull_back_one, pull_back_apart, apart)


def with_encoder(
    losses_fn: Callable[..., Any],
    encoder: Callable[..., Any],
    has_aux: bool,
    params: Any,
    *args: Any,
    of_sum: bool = False,
    **kwargs: Any,
) -> Pass:
    """``losses_fn(params, encoder(params, ...), ...)``, whose features have gradients too.

    With ``of_sum`` those are of the sum of the losses, each of which has features of its own.
    """
    features, pull_features = jax.vjp(lambda p: encoder(p, *args, **kwargs), params)
    if not jax.tree.leaves(features):
        raise ValueError("encoder returned no features; it must return the pytree that heads read.")
    check_inexact(
        features, "the encoder's features", "Compute it in losses_fn, from its arguments."
    )
    heads = whole(lambda both: losses_fn(*both, *args, **kwargs), (params, features), has_aux)

    def through_encoder(grads: tuple[Any, Any]) -> Any:
        return jax.tree.map(jnp.add, grads[0], pull_features(grads[1])[0])

    def feature_gradients() -> list[Array]:
        if of_sum:
            return jax.tree.leaves(heads.pull_back(jnp.ones_like(heads.losses))[1])
        return stack([heads.pull_back_one(i)[1] for i in range(heads.losses.shape[0])])

    return heads._replace(
        pull_back=lambda cotangent: through_encoder(heads.pull_back(cotangent)),
        pull_back_one=lambda index: through_encoder(heads.pull_back_one(index)),
        pull_back_apart=None,
        feature_gradients=feature_gradients,
    )


def in_microbatches(
    forward: Callable[..., Pass],
    size: int,
    has_features: bool,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Pass:
    """The pass of the mean loss over the parts of a batch; every part is run anew for each use."""
    parts = _Parts(size, (args, kwargs))

    def run(part: Any) -> Pass:
        args, kwargs = parts.filled(part)
        return forward(params, *args, **kwargs)

    def mean(pull: Callable[[Pass], Any]) -> Any:
        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, pull(run(part))), None

        total, _ = lax.scan(add, zeros_to_sum(params), parts.arrays)
        return jax.tree.map(lambda t, p: (t / parts.number).astype(p.dtype), total, params)

    def feature_gradients() -> list[Array]:
        def of_part(part: Any) -> list[Array]:
            gradients = run(part).feature_gradients
            assert gradients is not None
            return gradients()

        each = lax.map(of_part, parts.arrays)
        return [jnp.moveaxis(leaf, 0, 1) / parts.number for leaf in each]

    losses, aux = lax.map(lambda part: (run(part).losses, run(part).aux), parts.arrays)
    return Pass(
        jnp.mean(losses, axis=0),
        aux,
        lambda cotangent: mean(lambda part: part.pull_back(cotangent)),
        lambda index: mean(lambda part: part.pull_back_one(index)),
        pull_back_apart=None,
        apart=True,
        feature_gradients=feature_gradients if has_features else None,
    )


class _Parts:
    """The arguments of a losses function, whose arrays are cut into parts along the batch."""

    def __init__(self, size: int, arguments: Any):
        self._leaves, self._structure = jax.tree.flatten(arguments)
        split = [leaf for leaf in self._leaves if _ndim(leaf) > 0]
        lengths = {leaf.shape[0] for leaf in split}
        if len(lengths) != 1 or (batch := lengths.pop()) % size:
            raise ValueError(
                f"microbatch_size={size} must divide the leading axis of every array in the "
                f"arguments; their shapes are {[getattr(x, 'shape', ()) for x in self._leaves]}. "
                "Let losses_fn close over what is no part of the batch; pass random keys as "
                "jax.random.key(...)."
            )
        self.number = batch // size
        # Part m is every number-th example: each device of a sharded batch has its share of a part.
        self.arrays = (
            jnp.arange(self.number),
            [
                jnp.moveaxis(jnp.reshape(leaf, (size, self.number, *leaf.shape[1:])), 1, 0)
                for leaf in split
            ],
        )

    def filled(self, part: tuple[Array, list[Array]]) -> Any:
        """The arguments of one part."""
        number, arrays = part
        sliced = iter(arrays)

        def fill(leaf: Any) -> Any:
            if _ndim(leaf) > 0:
                return next(sliced)
            is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jax.random.fold_in(leaf, number) if is_key else leaf

        return jax.tree.unflatten(self._structure, map(fill, self._leaves))


def _ndim(leaf: Any) -> int:
    return leaf.ndim if isinstance(leaf, jax.Array | np.ndarray) else 0


def stack(grads: Sequence[Any]) -> list[Array]:
    """Leaves [K, ...] of the gradients of K tasks."""
    return [jnp.stack(leaf) for leaf in zip(*map(jax.tree.leaves, grads), strict=True)]


def zeros_to_sum(params: Any) -> Any:
    """Zeros to which gradients of the parameters are added."""
    # Alike in sharding too, which on a mesh of Explicit axes is part of the type.
    return jax.tree.map(lambda p: jnp.zeros_like(p, wide(p)), params)


def _each(losses: Any) -> list[Array]:
    """The losses as a list of scalars, float64 all if one of them is, else float32."""
    each = list(losses) if is_stacked(losses) else jax.tree.leaves(losses)
    is_wide = any(jnp.result_type(loss) == jnp.float64 for loss in each)
    return [jnp.asarray(loss, jnp.float64 if is_wide else jnp.float32) for loss in each]


def _stack_losses(losses: Any) -> Array:
    """The losses as one [K] array."""
    if is_stacked(losses):
        return losses.astype(jnp.float64 if losses.dtype == jnp.float64 else jnp.float32)
    return jnp.stack(_each(losses))


def split_aux(out: Any) -> tuple[Any, Any]:
    """The pair that has_aux=True promises."""
    if not isinstance(out, tuple) or len(out) != 2:
        got = f"a tuple of {len(out)}" if isinstance(out, tuple) else f"a {type(out).__name__}"
        raise ValueError(
            f"with has_aux=True losses_fn must return a pair (losses, aux), got {got}. Return "
            "((loss_1, loss_2), aux), or leave has_aux out where there is no aux."
        )
    return out
