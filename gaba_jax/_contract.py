"""The leading-axis contract: stacked gradients, [K, *param.shape] on every leaf."""

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
    updates: Any, params: Any, num_tasks: int, num_leaves: int, remedy: str = _REMEDY
) -> None:
    """Raises ValueError unless every leaf of ``updates`` is [num_tasks, *param.shape]."""
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            "params came as optax.LookaheadParams, but must be those the gradients belong to: "
            "put gaba() inside, as in optax.lookahead(optax.chain(gaba(), optax.adam(1e-3)), ...)."
        )
    leaves = jax.tree.leaves(updates)
    if len(leaves) != num_leaves:
        raise ValueError(
            f"updates has {len(leaves)} leaves, but init saw parameters with {num_leaves}: "
            f"gradients and parameters must have the same tree structure. {remedy}"
        )
    names = leaf_names(updates)
    if params is not None and leaf_names(params) != names:
        raise ValueError(
            f"updates has the leaves {', '.join(names)}, but params has "
            f"{', '.join(leaf_names(params))}: gradients and params must have the same structure."
        )
    of_params = [None] * len(leaves) if params is None else jax.tree.leaves(params)
    for name, leaf, param in zip(names, leaves, of_params, strict=True):
        shape = jnp.shape(leaf)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                f"updates leaf {name!r} has dtype {jnp.result_type(leaf)}, but gradients must be "
                "floating-point. Keep what is not trained out of the tree, or have None there."
            )
        if not shape or shape[0] != num_tasks:
            raise ValueError(
                f"updates leaf {name!r} has shape {shape}, but its leading axis must be the "
                f"{num_tasks} tasks (num_tasks={num_tasks}). {remedy}"
            )
        expected = shape if param is None else (num_tasks, *jnp.shape(param))
        if shape != expected:
            raise ValueError(
                f"updates leaf {name!r} has shape {shape}, but must have shape {expected}: "
                f"the tasks, then the parameter's shape. {remedy}"
            )
