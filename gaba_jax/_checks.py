"""What is checked when a step is traced: parameters, losses, and the leading axis of gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

_REMEDY = (
    "Pass the output of task_value_and_grad, and put gaba() (or balance(...)) first in the chain, "
    "before any other transform. Around it, TaskMultiSteps accumulates gradients where "
    "optax.MultiSteps cannot."
)


def path_name(path: Any) -> str:
    """The dotted name of a leaf, as the selectors and the error messages write it."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # the array of a Flax variable
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".") or "(the whole tree)"


def leaf_names(tree: Any) -> list[str]:
    """The dotted names of all leaves of a tree."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def each_task(values: Array, leaf: Array) -> Array:
    """[K] values with the axes that a leaf [K, ...] has, to broadcast over it."""
    return jnp.expand_dims(values, tuple(range(1, leaf.ndim)))


def check_stacked(
    updates: Any,
    params: Any,
    num_tasks: int,
    num_leaves: int,
    remedy: str = _REMEDY,
    what: str = "updates",
) -> None:
    """Raises ValueError, about ``what``, unless every leaf is [num_tasks, *param.shape]."""
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "params came as optax.LookaheadParams, but must be those the gradients belong to: "
            "put gaba() inside, as in optax.lookahead(optax.chain(gaba(), optax.adam(1e-3)), ...)."
        )
    leaves = jax.tree.leaves(updates)
    if len(leaves) != num_leaves:
        raise ValueError(
            f"{what} has {len(leaves)} leaves, but init saw parameters with {num_leaves}: "
            f"gradients and parameters must have the same tree structure. {remedy}"
        )
    names = leaf_names(updates)
    if params is not None and leaf_names(params) != names:
        raise ValueError(
            f"{what} has the leaves {', '.join(names)}, but params has "
            f"{', '.join(leaf_names(params))}: gradients and params must have the same structure."
        )
    of_params = [None] * len(leaves) if params is None else jax.tree.leaves(params)
    for name, leaf, param in zip(names, leaves, of_params, strict=True):
        shape = jnp.shape(leaf)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                f"{what} leaf {name!r} has dtype {jnp.result_type(leaf)}, but gradients must be "
                "floating-point. Keep what is not trained out of the tree, or have None there."
            )
        if not shape or shape[0] != num_tasks:
            raise ValueError(
                f"{what} leaf {name!r} has shape {shape}, but its leading axis must be the "
                f"{num_tasks} tasks (num_tasks={num_tasks}). {remedy}"
            )
        expected = shape if param is None else (num_tasks, *jnp.shape(param))
        if shape != expected:
            raise ValueError(
                f"{what} leaf {name!r} has shape {shape}, but must have shape {expected}: "
                f"the tasks, then the parameter's shape. {remedy}"
            )


def is_stacked(losses: Any) -> bool:
    """Whether losses came as one [K] array."""
    return hasattr(losses, "ndim") and losses.ndim == 1


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


def check_losses(losses: Any, has_aux: bool = False) -> None:
    """Raises ValueError on losses that are not K real scalars."""
    _check_no_aux(losses)
    leaves = jax.tree.leaves_with_path(losses, is_leaf=lambda leaf: leaf is None)
    if not leaves:
        raise ValueError("losses_fn returned no losses.")
    for path, loss in leaves:
        if loss is None:
            raise ValueError(
                f"loss {path_name(path)!r} is None. A task without labels in a batch keeps its "
                "place: return any finite number for it, such as 0.0, and leave it out of the "
                "update with task_mask=, False for that task."
            )
    if len(leaves) == 1 and leaves[0][1] is losses and jnp.shape(losses) == ():
        returned = "a pair whose first item is one scalar" if has_aux else "one scalar"
        remedy = " With has_aux=True the first item holds all losses: ((loss_1, loss_2), aux)."
        raise ValueError(
            f"losses_fn returned {returned}; return the K task losses apart, as a tuple, a dict or "
            f"a [K] array, instead of their sum.{remedy if has_aux else ''}"
        )
    for path, loss in leaves:
        shape = jnp.shape(loss)
        if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise ValueError(
                f"losses_fn must return real floating-point losses; loss {path_name(path)!r} has "
                f"dtype {jnp.result_type(loss)}."
            )
        if shape and not (is_stacked(losses) and shape[0] > 0):
            raise ValueError(
                "losses_fn must return a [K] array, or a tuple, list or dict of K scalars; loss "
                f"{path_name(path)!r} has shape {shape}. Reduce it first, with .mean() or .sum(); "
                "with an auxiliary output pass has_aux=True."
            )


def _check_no_aux(returned: Any) -> None:
    if not isinstance(returned, tuple) or len(returned) != 2:
        return
    first: Any = returned[0]
    if isinstance(first, tuple | list | dict) or is_stacked(first):
        raise ValueError(
            "losses_fn returned a pair whose first item holds several losses, as (losses, aux) "
            "does: pass has_aux=True, or all that is in it would be balanced and minimised. "
            "Return K losses flat: a tuple, list or dict of scalars, or a [K] array."
        )


def check_driver_arguments(shared: Any, weight_task_specific: bool, nonfinite: str) -> None:
    """Raises ValueError on arguments that no driver takes."""
    if nonfinite not in ("propagate", "drop"):
        raise ValueError(f'{nonfinite=} must be "propagate" or "drop".')
    if not weight_task_specific and shared is None:
        raise ValueError(
            "weight_task_specific=False needs an explicit shared=..., such as "
            'exclude("rul_head", "health_head"): what is task-specific must be known before the '
            "first gradient."
        )
