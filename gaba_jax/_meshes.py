"""Where arrays lie on a mesh of Explicit axes, which is part of their types."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array


def is_explicit() -> bool:
    """Whether the mesh has such axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and bool(mesh.explicit_axes)


def placed(array: Array, place: Callable[[tuple[Any, ...]], Sequence[Any]]) -> Array:
    """The array with another spec, which is made of its own."""
    if not is_explicit():
        return array
    spec = place(tuple(jax.typeof(array).sharding.spec))
    return jax.sharding.reshard(array, jax.sharding.PartitionSpec(*spec))


def replicated(array: Array) -> Array:
    """The same on every device."""
    return placed(array, lambda _: ())
