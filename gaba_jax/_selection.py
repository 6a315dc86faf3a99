"""Which parameters are shared between the tasks, and on which of those norms are measured."""

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from gaba_jax._checks import leaf_names, path_name

# Flax's collection of leaves whose "gradients" are new values: the scales of fp8 layers.
OVERWRITTEN = "_overwrite_with_gradient"
Selector = Any  # a pytree of bools, or a callable params -> pytree of bools
Groups = Literal["top", "leaf"] | Callable[[Any], Any]


class Selection(NamedTuple):
    """Static, per leaf in tree order. ``shared`` is None where the gradients are to tell.

    What is ``overwritten`` with its gradient is neither shared nor measured nor weighted; () is
    none. ``groups`` are the numbers of the leaves' groups, None where there is one set of weights.
    """

    shared: tuple[bool, ...] | None
    measure_on: tuple[bool, ...]
    weight_task_specific: bool = True
    overwritten: tuple[bool, ...] = ()
    groups: tuple[int, ...] | None = None

    def num_groups(self) -> int | None:
        """How many sets of weights there are; None where it is one, without an axis for it."""
        return None if self.groups is None else len(set(self.groups))

    def wanted(self, every: bool = False) -> tuple[bool, ...]:
        """The leaves whose norms somebody reads; all of them with ``every``."""
        if every:
            return (True,) * len(self.measure_on)
        if self.shared is None:
            return self.measure_on
        return tuple(s and m for s, m in zip(self.shared, self.measure_on, strict=True))

    def coefficients(self, task_weights: Array, usable: Array) -> list[Array | None]:
        """Per leaf the [K] factors of the task gradients; None for those that are overwritten.

        Where the same numbers are meant it is the same array. Of groups the weights are [G, K].
        """
        plain, leaves = usable.astype(task_weights.dtype), len(self.measure_on)
        each = [task_weights[i] for i in range(self.num_groups() or 0)]
        weights = [task_weights] * leaves if self.groups is None else [each[i] for i in self.groups]
        shared, over = self.shared or (True,) * leaves, self.overwritten or (False,) * leaves
        return [
            None if o else w if s or self.weight_task_specific else plain
            for w, s, o in zip(weights, shared, over, strict=True)
        ]


class _ByName:
    """A callable ``params -> mask`` (the optax convention) that goes by key paths."""

    def __init__(self, kind: str, names: tuple[str, ...]):
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(
                f"{kind}{names!r}: give one or more non-empty names, such as {kind}('backbone')."
            )
        self._kind = kind
        self._names = names

    def __repr__(self) -> str:
        return f"{self._kind}({', '.join(map(repr, self._names))})"

    def __call__(self, params: Any) -> Any:
        paths = leaf_names(params)
        for name in self._names:
            if paths and not any(_matches(name, path) for path in paths):
                hint = ""
                if jax.tree_util.all_leaves([params]):
                    hint = (
                        " Under optax.inject_hyperparams, which takes functions for schedules, "
                        "name the argument in static_args."
                    )
                segments = {segment for path in paths for segment in path.split(".")}
                close = difflib.get_close_matches(name, [*paths, *sorted(segments)], n=1)
                meant = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"{self!r}: {name!r} matches no parameter.{meant} A name matches whole "
                    f"segments of a path; the paths are: {', '.join(paths)}.{hint}"
                )
        matched = [any(_matches(name, path) for name in self._names) for path in paths]
        chosen = matched if self._kind == "only" else [not match for match in matched]
        return jax.tree.unflatten(jax.tree.structure(params), chosen)


def exclude(*names: str) -> Callable[[Any], Any]:
    """Selects every parameter but those under the given names.

    Args:
      *names: each matches whole segments of the dotted key path
        (``jax.tree_util.keystr(path, simple=True, separator=".")``, without Flax's trailing
        ``.value``); ``fnmatch`` globs are allowed: ``"head*"``, ``"decoder.*.kernel"``.

    Returns:
      A callable ``params -> mask``, a pytree of bools, for ``shared=`` or ``measure_on=`` (or any
      optax argument that takes a mask).

    Raises:
      ValueError: no name is given; or, when called, a name matches nothing.

    Example:
      >>> import gaba_jax
      >>> params = {"backbone": {"w": 1.0}, "rul_head": {"w": 1.0}, "health_head": {"w": 1.0}}
      >>> gaba_jax.exclude("*_head")(params)
      {'backbone': {'w': True}, 'health_head': {'w': False}, 'rul_head': {'w': False}}
    """
    return _ByName("exclude", names)


def only(*names: str) -> Callable[[Any], Any]:
    """Selects the parameters under the given names and no others.

    Args:
      *names: as for :func:`exclude`.

    Returns:
      A callable ``params -> mask``, a pytree of bools.

    Raises:
      ValueError: no name is given; or, when called, a name matches nothing.

    Example:
      >>> import gaba_jax
      >>> gaba_jax.only("backbone.last")({"backbone": {"first": 1.0, "last": 1.0}, "head": 1.0})
      {'backbone': {'first': False, 'last': True}, 'head': False}
    """
    return _ByName("only", names)


def _matches(name: str, path: str) -> bool:
    wanted, segments = name.split("."), path.split(".")
    return any(
        all(map(fnmatch.fnmatchcase, segments[start:], wanted))
        for start in range(len(segments) - len(wanted) + 1)
    )


def select(
    shared: Selector | None,
    measure_on: Selector | None,
    params: Any,
    weight_task_specific: bool = True,
    groups: Groups | None = None,
) -> Selection:
    """Resolves both selectors and the groups on a tree of parameters (or ShapeDtypeStructs).

    Raises:
      ValueError: a selection, or what the two have in common, holds no leaf.
    """
    paths = leaf_names(params)
    shared_mask = None if shared is None else _resolve("shared", shared, params, paths)
    measure_mask = (
        (True,) * len(paths)
        if measure_on is None
        else _resolve("measure_on", measure_on, params, paths)
    )
    if shared_mask is not None and paths:
        measured = tuple(a and b for a, b in zip(shared_mask, measure_mask, strict=True))
        if not any(measured):
            raise ValueError(
                f"{shared=} and {measure_on=} have no leaf in common, so there is nothing to "
                f"measure. The paths are: {', '.join(paths)}"
            )
    over = tuple(map(is_overwritten, paths))
    measure_mask = _without(over, measure_mask)
    shared_mask = None if shared_mask is None else _without(over, shared_mask)
    numbers = None
    if groups is not None:
        names = _names_of_groups(groups, params)
        numbers = tuple(map(list(dict.fromkeys(names)).index, names))
    return Selection(shared_mask, measure_mask, weight_task_specific, over, numbers)


def group_names(params: Any, groups: Groups | None = None) -> list[str]:
    """The names of the groups of parameters, in the order of their weights.

    Args:
      params: the parameters.
      groups: as for :func:`gaba_jax.by_group`.

    Returns:
      G names: row g of ``task_weights`` [G, K] is of group g.

    Raises:
      ValueError: ``groups`` names no group for some parameter.

    Example:
      >>> from gaba_jax import group_names
      >>> params = {"encoder": {"kernel": 1.0, "bias": 0.0}, "head": 1.0}
      >>> group_names(params), group_names(params, "leaf")
      (['encoder', 'head'], ['encoder.bias', 'encoder.kernel', 'head'])
    """
    return list(dict.fromkeys(_names_of_groups("top" if groups is None else groups, params)))


def check_groups(groups: Any) -> None:
    """Raises ValueError on what does not say how parameters are grouped."""
    if not (callable(groups) or groups in ("top", "leaf")):
        raise ValueError(
            f'{groups=} must be "top", one group for each top-level key of the parameters, "leaf", '
            "one for each leaf, or a function params -> pytree of names."
        )


def _names_of_groups(groups: Groups, params: Any) -> list[str]:
    """The name of each leaf's group."""
    if groups == "leaf":
        return leaf_names(params)
    if not callable(groups):
        return [path_name(path[:1]) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names, leaves = _broadcast("groups", "names", groups(params), params), leaf_names(params)
    for name, path in zip(names, leaves, strict=True):
        if not (isinstance(name, str) and name):
            raise ValueError(
                f"groups must give every parameter the name of its group; at {path!r} it is "
                f"{name!r}."
            )
    return names


def is_overwritten(path: str) -> bool:
    """Whether the leaf of this name holds new values in place of a gradient."""
    return OVERWRITTEN in path.split(".")


def _without(over: tuple[bool, ...], mask: tuple[bool, ...]) -> tuple[bool, ...]:
    return tuple(chosen and not each for chosen, each in zip(mask, over, strict=True))


def _resolve(
    argument: str, selector: Selector, params: Any, paths: Sequence[str]
) -> tuple[bool, ...]:
    # A callable that is itself a tree (an Equinox module) is a mask.
    is_function = callable(selector) and jax.tree_util.all_leaves([selector])
    mask = selector(params) if is_function else selector
    leaves = _broadcast(argument, "bools", mask, params)
    for leaf, path in zip(leaves, paths, strict=True):
        if isinstance(leaf, Tracer) or np.ndim(leaf) or leaf not in (True, False):
            raise ValueError(
                f"{argument} must be a pytree of concrete bools; at {path!r} it is {leaf!r}. Use "
                "exclude(...), only(...) or a callable params -> mask."
            )
    if paths and not any(leaves):
        raise ValueError(f"{argument} selects no parameter. The paths are: {', '.join(paths)}")
    return tuple(bool(leaf) for leaf in leaves)


def _broadcast(argument: str, of: str, prefix: Any, params: Any) -> list[Any]:
    """What a prefix of the tree, as in optax, says of each leaf."""
    try:
        broadcast = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), prefix, params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{argument} must be a pytree of {of} with the structure of the parameters (or a "
            f"prefix of it); it does not fit: {error}"
        ) from error
    return jax.tree.leaves(broadcast)
