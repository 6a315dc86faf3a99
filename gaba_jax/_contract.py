"""The leading-axis contract: stacked gradients, [K, *param.shape] on every leaf."""

from typing import Any

import jax

_REMEDY = (
    "Pass the output of task_value_and_grad, and put gaba() (or balance(...)) first in the chain, "
    "before any other transform."
)


def path_name(path: Any) -> str:
    """The dotted name of a leaf, as the selectors and the error messages write it."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def leaf_names(tree: Any) -> list[str]:
    """The dotted names of all leaves of a tree."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def check_stacked(updates: Any, params: Any, num_tasks: int, num_leaves: int) -> None:
    """Raises ValueError unless every leaf of ``updates`` is [num_tasks, *param.shape]."""
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    if len(leaves) != num_leaves:
        raise ValueError(
            f"updates has {len(leaves)} leaves, but init saw parameters with {num_leaves}: "
            "gradients and parameters must have the same tree structure."
        )
    shapes = {path: jax.numpy.shape(leaf) for path, leaf in jax.tree.leaves_with_path(params)}
    for path, leaf in leaves:
        name, shape = path_name(path), jax.numpy.shape(leaf)
        if not shape or shape[0] != num_tasks:
            raise ValueError(
                f"updates leaf {name!r} has shape {shape}, but its leading axis must be the "
                f"{num_tasks} tasks (num_tasks={num_tasks}). {_REMEDY}"
            )
        if params is not None and path not in shapes:
            raise ValueError(
                f"updates leaf {name!r} has no counterpart in params, which has the leaves "
                f"{', '.join(leaf_names(params))}. Gradients and params must have the same "
                "tree structure."
            )
        if params is not None and shape[1:] != shapes[path]:
            raise ValueError(
                f"updates leaf {name!r} has shape {shape}, but must have shape "
                f"{(num_tasks, *shapes[path])}: the tasks, then the parameter's shape. {_REMEDY}"
            )
