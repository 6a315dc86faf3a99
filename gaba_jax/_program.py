"""The backward pass as a program: which tasks each of its operations serves, and at what cost."""

import collections
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]  # since jax 0.12 another name of Jaxpr
    JaxprEqn,
    Literal,
    jaxpr_as_fun,
)
from jaxtyping import Array

from gaba_jax._linearity import Value, bodies_of, follow, opened

# The tasks whose operations are one larger operation. More take more memory than they save time.
_AT_ONCE = 4
# Calls whose body is read as if it stood in their place.
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
# Operations whose parts are not looked into.
_BODIES = frozenset({"checkpoint", "cond", "remat2", "scan", "while"}) | _CALLS


class Rows(NamedTuple):
    """What a variable is for each of some tasks: ``array`` is [len(tasks), ...]."""

    tasks: tuple[int, ...]
    array: Array

    def of(self, tasks: Sequence[int]) -> Array:
        """[len(tasks), ...], zeros for a task that does not have the variable."""
        if tuple(tasks) == self.tasks:
            return self.array
        zeros = jnp.zeros_like(self.array[0])
        index = {task: i for i, task in enumerate(self.tasks)}
        return jnp.stack([self.array[index[t]] if t in index else zeros for t in tasks])


class Program:
    """A transposed function of K cotangents, read operation by operation.

    An operation is run for the tasks whose cotangent reaches it, and where it meets two sums of
    different tasks it is no sum at all: so a part of the model that one loss alone uses is passed
    backward once, however many losses there are.

    Attributes:
      leaves: the variables that are the gradients.
      made_by: the operation that makes a variable.
    """

    def __init__(self, pull: Callable[..., Sequence[Array]], cotangents: Sequence[Array], k: int):
        closed = _inlined(jax.make_jaxpr(pull)(*cotangents))
        jaxpr = closed.jaxpr
        self._jaxpr = jaxpr
        self._cotangents = tuple(cotangents)
        self._constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        self.leaves: list[Any] = list(jaxpr.outvars)
        self.made_by: dict[Any, JaxprEqn] = {}
        everyone = tuple(range(k))
        each = [(i,) for i in everyone] if len(cotangents) == k else [everyone]
        self._tasks: dict[Any, tuple[int, ...]] = dict(zip(jaxpr.invars, each, strict=True))
        for eqn in jaxpr.eqns:
            reached = tuple(sorted({task for var in eqn.invars for task in self.tasks(var)}))
            for var in eqn.outvars:
                self.made_by[var] = eqn
                self._tasks[var] = reached
        self._at_zero = follow(jaxpr, [Value(True, 0.0)] * len(jaxpr.invars))

    def tasks(self, var: Any) -> tuple[int, ...]:
        """The tasks whose cotangent reaches the variable."""
        return () if isinstance(var, Literal) else self._tasks.get(var, ())

    def separates(self) -> bool:
        """Whether a task whose cotangent does not reach a variable is 0 there, and in each leaf.

        Else what a task has is told by passing it backward by itself alone.
        """
        unreached = [var for eqn in self._jaxpr.eqns for var in self._unreached(eqn)]
        if any(self._unreached(eqn) for eqn in self._at_zero.loud):
            return False
        return all(self._at_zero.of(var).number == 0 for var in (*unreached, *self.leaves))

    def _unreached(self, eqn: JaxprEqn) -> list[Any]:
        """The operands that some of the tasks of an operation do not reach."""
        tasks = {task for var in eqn.invars for task in self.tasks(var)}
        return [var for var in eqn.invars if self.tasks(var) and set(self.tasks(var)) < tasks]

    def is_linear(self) -> bool:
        """Whether the program is linear in the cotangents, as far as is known."""
        if self._at_zero.rounds or not self.separates():
            return False
        run = jaxpr_as_fun(ClosedJaxpr(self._jaxpr, list(self._constants.values())))
        try:
            transposed = jax.linear_transpose(run, *self._cotangents)
            jax.eval_shape(transposed, jax.eval_shape(run, *self._cotangents))
        except Exception:  # each operation that is not linear fails with an error of its own
            return False
        return True

    def is_merge(self, eqn: JaxprEqn) -> bool:
        """Whether the operation adds what some tasks have to what others have."""
        if eqn.primitive.name != "add_any":
            return False
        one, other = (set(self.tasks(var)) for var in eqn.invars)
        return bool(one and other) and not one & other

    def mixes(self) -> bool:
        """Whether an operation with a body of its own gets a zero for a task it does not serve."""
        return any(
            self._unreached(eqn)
            for eqn in self._jaxpr.eqns
            if eqn.primitive.name in _BODIES or bodies_of(eqn)
        )

    def known(self, wanted: Iterable[Any]) -> dict[Any, Array]:
        """Variables that no cotangent reaches."""
        wanted = [var for var in wanted if not isinstance(var, Literal)]
        found = dict(self._constants)
        eqns = [eqn for eqn in self._needed(wanted) if not self.tasks(eqn.outvars[0])]
        self._run(eqns, [var for var in wanted if var not in found], found)
        return found

    def rows(self, wanted: Sequence[Any]) -> dict[Any, Rows]:
        """What each of the variables is for each task that reaches it, from unit cotangents."""
        needed = self._needed(wanted)
        groups: dict[tuple[int, ...], list[JaxprEqn]] = collections.defaultdict(list)
        for eqn in needed:
            if not self.is_merge(eqn):
                groups[self.tasks(eqn.outvars[0])].append(eqn)
        found: dict[Any, Rows] = {}
        one_hot = [
            jnp.ones_like(c)[None] if c.ndim == 0 else _identity(c) for c in self._cotangents
        ]
        for var, rows in zip(self._jaxpr.invars, one_hot, strict=True):
            found[var] = Rows(self.tasks(var), rows)
        known = dict(self._constants)
        read_by = {
            tasks: {var for eqn in eqns for var in eqn.invars if not isinstance(var, Literal)}
            for tasks, eqns in groups.items()
        }
        merged = {var for eqn in needed if self.is_merge(eqn) for var in eqn.invars}

        def value(var: Any) -> Rows:
            if var not in found:
                one, other = map(value, self.made_by[var].invars)
                joined = jnp.concatenate([one.array, other.array])
                found[var] = Rows(one.tasks + other.tasks, joined)
            return found[var]

        for tasks in sorted(groups, key=len):
            eqns = groups[tasks]
            outside = merged.union(wanted, *(r for t, r in read_by.items() if t != tasks))
            made = [v for eqn in eqns for v in eqn.outvars if v in outside]
            if not tasks:
                self._run(eqns, made, known)
                continue
            inside = {var for eqn in eqns for var in eqn.outvars}
            inputs = [var for var in dict.fromkeys(_reads(eqns)) if var not in inside]
            moving = [var for var in inputs if self.tasks(var)]
            fixed = [var for var in inputs if not self.tasks(var)]
            run = self._segment(eqns, [*moving, *fixed], made)
            run = functools.partial(_with_last, run, [known[var] for var in fixed])
            stacked = [value(var).of(tasks) for var in moving]
            outs = _for_each(run, stacked)
            found.update((v, Rows(tasks, out)) for v, out in zip(made, outs, strict=True))
        return {var: value(var) for var in wanted}

    def path(self, eqns: Sequence[JaxprEqn]) -> Callable[[Array], Array]:
        """A chain of operations, each on the result of the one before, as a function."""
        steps = []
        for eqn in eqns:
            (moving,) = [var for var in _reads([eqn]) if self.tasks(var)]
            fixed = [var for var in dict.fromkeys(_reads([eqn])) if var is not moving]
            known = self.known(fixed)
            run = self._segment([eqn], [moving, *fixed], eqn.outvars)
            steps.append((run, [known[var] for var in fixed]))

        def follow(value: Array) -> Array:
            for run, fixed in steps:
                (value,) = run(value, *fixed)
            return value

        return follow

    def operations(self, wanted: Sequence[Any], per_task: bool) -> int:
        """Floating-point operations to the variables, for each task that reaches them or once."""
        return sum(
            _operations(eqn) * (len(self.tasks(eqn.outvars[0])) if per_task else 1)
            for eqn in self._needed(wanted)
            if not self.is_merge(eqn)
        )

    def _needed(self, wanted: Iterable[Any]) -> list[JaxprEqn]:
        live = {var for var in wanted if not isinstance(var, Literal)}
        needed: list[JaxprEqn] = []
        for eqn in reversed(self._jaxpr.eqns):
            if live.intersection(eqn.outvars):
                needed.append(eqn)
                live.update(var for var in eqn.invars if not isinstance(var, Literal))
        return needed[::-1]

    def _segment(self, eqns: Sequence[JaxprEqn], invars: Any, outvars: Any) -> Any:
        part = self._jaxpr.replace(
            constvars=[], invars=list(invars), outvars=list(outvars), eqns=list(eqns)
        )
        return jaxpr_as_fun(ClosedJaxpr(part, []))

    def _run(self, eqns: Sequence[JaxprEqn], made: Sequence[Any], known: dict[Any, Any]) -> None:
        """Runs what no cotangent reaches."""
        inside = {var for eqn in eqns for var in eqn.outvars}
        inputs = [var for var in dict.fromkeys(_reads(eqns)) if var not in inside]
        outs = self._segment(eqns, inputs, made)(*(known[var] for var in inputs))
        known.update(zip(made, outs, strict=True))

    def is_zero(self, var: Any) -> bool:
        """Whether a variable that no cotangent reaches is 0, as far as is known."""
        return not self.tasks(var) and self._at_zero.of(var).number == 0


def _identity(cotangent: Array) -> Array:
    return jnp.eye(cotangent.shape[0], dtype=cotangent.dtype)


def _with_last(run: Any, last: Sequence[Array], *first: Array) -> Any:
    return run(*first, *last)


def _for_each(run: Callable[..., Any], stacked: Sequence[Array]) -> list[Array]:
    """Runs for each task: up to ``_AT_ONCE`` of them in one operation, a loop over such parts."""
    number = stacked[0].shape[0]
    if number == 1:
        return [out[None] for out in run(*(array[0] for array in stacked))]
    if number <= _AT_ONCE:
        return jax.vmap(run)(*stacked)
    part = math.ceil(number / math.ceil(number / _AT_ONCE))  # parts as even as can be
    return lax.map(lambda arrays: run(*arrays), list(stacked), batch_size=part)


def _reads(eqns: Sequence[JaxprEqn]) -> list[Any]:
    return [var for eqn in eqns for var in eqn.invars if not isinstance(var, Literal)]


def _inlined(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program with the bodies of its calls in their place."""
    if not any(map(_is_call, closed.jaxpr.eqns)):
        return closed
    avals: list[Any] = [variable.aval for variable in closed.jaxpr.invars]
    types = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    return jax.make_jaxpr(functools.partial(_evaluate, closed))(*types)


def _is_call(eqn: JaxprEqn) -> bool:
    placed = (*eqn.params.get("in_shardings", ()), *eqn.params.get("out_shardings", ()))
    return eqn.primitive.name in _CALLS and not any(
        isinstance(sharding, jax.sharding.Sharding) for sharding in placed
    )


def _evaluate(closed: ClosedJaxpr, *args: Any) -> list[Any]:
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else values[var]

    for eqn in jaxpr.eqns:
        ins = map(read, eqn.invars)
        if _is_call(eqn):
            (body,) = bodies_of(eqn)
            body = body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, [])
            outs = _evaluate(body, *ins)
        else:
            moving = [var for var in eqn.invars if not isinstance(var, Literal)]
            alone = jaxpr.replace(constvars=[], invars=moving, outvars=eqn.outvars, eqns=[eqn])
            outs = jaxpr_as_fun(ClosedJaxpr(alone, []))(*map(read, moving))
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _operations(eqn: JaxprEqn) -> int:
    """Floating-point operations, as far as they can be told from the shapes."""
    bodies = bodies_of(eqn)
    if bodies:
        total = max(sum(map(_operations, opened(body).eqns)) for body in bodies)
        return total * eqn.params.get("length", 1)
    shapes: list[Any] = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    size = sum(math.prod(getattr(var.aval, "shape", ())) for var in eqn.outvars)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * size * math.prod(shapes[0].shape[axis] for axis in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        features = eqn.params["dimension_numbers"].rhs_spec[0]
        return 2 * size * math.prod(shapes[1].shape) // shapes[1].shape[features]
    return size
