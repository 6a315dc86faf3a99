"""Losses and stacked gradients of several tasks from one forward pass."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from gaba_jax._contract import path_name

Method = Literal["unroll", "vmap", "scan"]


def task_value_and_grad(
    losses_fn: Callable[..., Any], *, has_aux: bool = False, method: Method = "unroll"
) -> Callable[..., tuple[Any, Any]]:
    r"""Evaluates K losses and the gradient of each, as :func:`jax.value_and_grad` does for one.

    One forward pass; its residuals serve K backward passes.

    Args:
      losses_fn: ``losses_fn(params, *args, **kwargs)`` returns the K task losses: a [K] array, or
        a tuple, list or dict of K scalars (a dict in pytree order, its keys sorted).
      has_aux: whether ``losses_fn`` returns ``(losses, aux)``.
      method: how the K backward passes run. "unroll" (default): one after the other in the
        program, fastest; "vmap": batched, the most memory; "scan": in a loop, for a program whose
        size does not grow with K. The numbers are the same.

    Returns:
      A function of the same arguments that returns ``(losses, grads)``: losses [K], and grads with
      the structure of ``params`` and leaves [K, \*param.shape]. With ``has_aux``,
      ``((losses, aux), grads)``.

      A NaN in one task does not reach the gradients of the others under "unroll", where losses
      are returned separately (tuple, list, dict): each is transposed by itself. A stacked [K] array
      cannot be told apart, and "vmap" and "scan" send zeros through every task: zero times
      NaN is NaN.

    Raises:
      ValueError: an unknown method; losses that are no real scalars.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gaba_jax import task_value_and_grad
      >>> def losses_fn(w, x):
      ...     y = x @ w
      ...     return {"mean": y.mean(), "energy": (y**2).sum()}
      >>> losses, grads = task_value_and_grad(losses_fn)(jnp.ones(2), jnp.eye(2))
      >>> losses, grads  # sorted keys: "energy" first
      (Array([2., 1.], dtype=float32), Array([[2. , 2. ],
             [0.5, 0.5]], dtype=float32))
    """
    if method not in ("unroll", "vmap", "scan"):
        raise ValueError(f'{method=} must be "unroll", "vmap" or "scan".')

    def value_and_grad(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        check_params(params)
        linear = linearize_losses(lambda p: losses_fn(p, *args, **kwargs), params, has_aux)
        num_tasks = linear.losses.shape[0]
        if method == "unroll":
            each = [linear.pull_back_one(i) for i in range(num_tasks)]
            grads = jax.tree.map(lambda *slices: jnp.stack(slices), *each)
        else:
            one_hot = jnp.eye(num_tasks, dtype=linear.losses.dtype)
            if method == "vmap":
                grads = jax.vmap(linear.pull_back)(one_hot)
            else:
                grads = lax.map(linear.pull_back, one_hot)
        return ((linear.losses, linear.aux) if has_aux else linear.losses), grads

    return value_and_grad


class LinearizedLosses(NamedTuple):
    """K losses after their one forward pass.

    ``pull_back(cotangent [K])`` is the gradient of ``sum_i cotangent_i L_i``; ``pull_back_one(i)``
    that of loss i, from what loss i depends on alone where losses were returned separately.
    """

    losses: Array
    aux: Any
    pull_back: Callable[[Array], Any]
    pull_back_one: Callable[[int], Any]


def linearize_losses(
    losses_of: Callable[[Any], Any], inputs: Any, has_aux: bool
) -> LinearizedLosses:
    """Runs the forward pass of ``losses_of(inputs)`` and checks what it returns."""

    def checked(inputs: Any) -> tuple[Any, Any]:
        out = losses_of(inputs)
        losses, aux = _split_aux(out) if has_aux else (out, None)
        _check_losses(losses)
        return losses, aux

    losses, pushforward, aux = jax.linearize(checked, inputs, has_aux=True)
    stacked = _stack(losses)

    def transpose(pick: Callable[[Any], Array], cotangent: Array) -> Any:
        # Transposing what one loss depends on leaves the others out of the backward pass.
        transposed = jax.linear_transpose(lambda tangent: pick(pushforward(tangent)), inputs)
        return transposed(cotangent.astype(stacked.dtype))[0]

    def pull_back_one(index: int) -> Any:
        one = jnp.ones_like(stacked[0])
        return transpose(lambda out: _pick(out, index).astype(one.dtype), one)

    return LinearizedLosses(stacked, aux, functools.partial(transpose, _stack), pull_back_one)


def task_names(losses: Any) -> tuple[str, ...]:
    """Names of the K losses, in the order of the task axis.

    Args:
      losses: what ``losses_fn`` returned: a dict (its keys, sorted), or a tuple, list or [K] array
        (their positions).

    Returns:
      K names.

    Example:
      >>> from gaba_jax import task_names
      >>> task_names({"rul": 1.0, "health": 2.0})
      ('health', 'rul')
    """
    if _is_stacked(losses):
        return tuple(map(str, range(losses.shape[0])))
    return tuple(path_name(path) for path, _ in jax.tree.leaves_with_path(losses))


def _is_stacked(losses: Any) -> bool:
    return hasattr(losses, "ndim") and losses.ndim == 1


def _pick(losses: Any, index: int) -> Array:
    return losses[index] if _is_stacked(losses) else jax.tree.leaves(losses)[index]


def _stack(losses: Any) -> Array:
    """The losses as one [K] array, float64 if one of them is, else float32."""
    each = [losses] if _is_stacked(losses) else jax.tree.leaves(losses)
    wide = any(jnp.result_type(loss) == jnp.float64 for loss in each)
    each = [jnp.asarray(loss, jnp.float64 if wide else jnp.float32) for loss in each]
    return each[0] if _is_stacked(losses) else jnp.stack(each)


def _split_aux(out: Any) -> tuple[Any, Any]:
    if not isinstance(out, tuple) or len(out) != 2:
        raise ValueError(
            f"with has_aux=True losses_fn must return a pair (losses, aux), got {type(out)}."
        )
    return out


def check_params(params: Any) -> None:
    """Raises ValueError on parameters that have no gradient."""
    check_inexact(
        params,
        "params",
        "Split the trainable parameters off first, with nnx.split(model, nnx.Param, ...) or "
        "eqx.partition(model, eqx.is_inexact_array).",
    )


def check_inexact(tree: Any, what: str, remedy: str) -> None:
    """Raises ValueError on a leaf that is not floating-point."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        kind = leaf.dtype if hasattr(leaf, "dtype") else type(leaf)  # of a function, say
        if not jnp.issubdtype(kind, jnp.inexact):
            is_array = hasattr(leaf, "dtype")
            got = f"has dtype {kind}" if is_array else f"is of type {kind.__name__}"
            raise ValueError(
                f"{what} must be floating-point; leaf {path_name(path)!r} {got}. {remedy}"
            )


def _check_losses(losses: Any) -> None:
    leaves = jax.tree.leaves_with_path(losses)
    if not leaves:
        raise ValueError("losses_fn returned no losses.")
    if len(leaves) == 1 and leaves[0][1] is losses and jnp.shape(losses) == ():
        raise ValueError(
            "losses_fn returned one scalar; return the K task losses apart, as a tuple, a dict or "
            "a [K] array, instead of their sum."
        )
    for path, loss in leaves:
        shape = jnp.shape(loss)
        if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise ValueError(
                f"losses_fn must return real floating-point losses; loss {path_name(path)!r} has "
                f"dtype {jnp.result_type(loss)}."
            )
        if shape and not (_is_stacked(losses) and shape[0] > 0):
            raise ValueError(
                "losses_fn must return a [K] array, or a tuple, list or dict of K scalars; loss "
                f"{path_name(path)!r} has shape {shape}. Reduce it first, with .mean() or .sum(); "
                "with an auxiliary output pass has_aux=True."
            )
