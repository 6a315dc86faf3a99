"""What a backward pass is while its cotangents are 0, and whether it rounds them: is it linear?

A derivative is linear in its cotangents. A ``jax.custom_vjp`` may have any function in its place:
one that clips or rounds, or adds the gradient of a loss that is nowhere in the model's value.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]  # since jax 0.12 another name of Jaxpr
    Jaxpr,
    JaxprEqn,
    Literal,
)

# All elements of the result are what all elements of the first operand are.
_SAME = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "reshape", "squeeze", "transpose"}
)
_ARITHMETIC: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "add_any": lambda a, b: a + b,
    "clamp": lambda least, a, most: min(max(a, least), most),
    "div": lambda a, b: a / b if b else math.nan,
    "max": max,
    "min": min,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "sub": lambda a, b: a - b,
}
# Operands that the result is made of: it is 0 where all of them are.
_PARTS: dict[str, tuple[int, ...] | slice] = {
    "concatenate": slice(None),
    "dynamic_update_slice": (0, 1),
    "pad": (0, 1),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
    "scatter-max": (0, 2),
    "scatter-min": (0, 2),
    "scatter-sub": (0, 2),
    "select_n": slice(1, None),
}
# Where one factor is 0, so is the product.
_PRODUCTS = frozenset({"mul", "dot_general", "conv_general_dilated"})
# What is not 0 at 0, or need not be. Any other operation is 0 where all that moves in it is 0: also
# a kernel that nobody can look into, since that of a derivative is linear.
_NOT_ZERO_AT_ZERO = frozenset(
    {"acos", "acosh", "argmax", "argmin", "atan2", "bessel_i0e", "cholesky", "clz", "cos", "cosh"}
    | {"cumlogsumexp", "cumprod", "digamma", "eig", "eigh", "eq", "eq_to", "erf_inv", "erfc"}
    | {"exp", "exp2", "ge", "gt", "householder_product", "igamma", "igammac", "integer_pow"}
    | {"is_finite", "le", "le_to", "lgamma", "log", "logistic", "lt", "lt_to", "lu", "ne"}
    | {"nextafter", "not", "polygamma", "pow", "qr", "regularized_incomplete_beta", "rsqrt"}
    | {"schur", "sort", "svd", "top_k", "zeta", "approx_top_k", "geqrf", "random_seed"}
)


class Value(NamedTuple):
    """What is known of a variable while all cotangents are 0.

    Attributes:
      moves: whether it depends on a cotangent.
      number: what each of its elements is, where that is known.
    """

    moves: bool
    number: float | None

    def joined(self, other: "Value") -> "Value":
        """What is known of a variable that is the one or the other."""
        same = self.number == other.number
        return Value(self.moves or other.moves, self.number if same else None)


class Followed(NamedTuple):
    """What is known of all variables of a program, and whether it rounds what moves."""

    values: dict[Any, Value]
    rounds: bool

    def of(self, var: Any) -> Value:
        """That of one variable."""
        if not isinstance(var, Literal):
            return self.values[var]
        aval: Any = var.aval
        if jnp.issubdtype(aval.dtype, jnp.complexfloating):
            return Value(False, None if var.val else 0.0)
        return Value(False, float(np.asarray(var.val)))


UNKNOWN = Value(False, None)


def follow(jaxpr: Jaxpr, inputs: Sequence[Value]) -> Followed:
    """Follows what is known from the inputs to every variable."""
    values: dict[Any, Value] = dict.fromkeys(jaxpr.constvars, UNKNOWN)
    values |= zip(jaxpr.invars, inputs, strict=True)
    found, rounds = Followed(values, False), False
    for eqn in jaxpr.eqns:
        ins = [found.of(var) for var in eqn.invars]
        outs, rounded = _follow_eqn(eqn, ins)
        values |= zip(eqn.outvars, outs, strict=True)
        rounds |= rounded
    return Followed(values, rounds)


def _follow_eqn(eqn: JaxprEqn, ins: list[Value]) -> tuple[list[Value], bool]:
    params, name = eqn.params, eqn.primitive.name
    if name == "scan":
        fixed, carried = params["num_consts"], params["num_carry"]
        return _loop(params["jaxpr"], ins[:fixed], ins[fixed:][:carried], ins[fixed + carried :])
    if name == "while":
        tested, fixed = params["cond_nconsts"], params["body_nconsts"]
        ins = ins[tested:]
        return _loop(params["body_jaxpr"], ins[:fixed], ins[fixed:], [])
    if name == "cond":
        each = [_body(branch, ins[1:]) for branch in params["branches"]]
        outs = [_all_joined(values) for values in zip(*(outs for outs, _ in each), strict=True)]
        if ins[0].moves:
            outs = [value._replace(moves=True) for value in outs]
        return outs, any(rounded for _, rounded in each)
    bodies = list(bodies_of(eqn))
    if len(bodies) == 1 and len(_open(bodies[0]).invars) == len(ins):
        return _body(bodies[0], ins)
    moves = any(value.moves for value in ins)
    numbers = [value.number for value in ins]
    number = _number(eqn, numbers, [value.number for value in ins if value.moves])
    return [Value(moves, number)] * len(eqn.outvars), moves and _rounds(eqn)


def _number(eqn: JaxprEqn, numbers: list[float | None], moving: list[float | None]) -> float | None:
    """What each element of the result is."""
    name = eqn.primitive.name
    if name in _SAME:
        return numbers[0]
    if name in _PARTS:
        which = _PARTS[name]
        parts = numbers[which] if isinstance(which, slice) else [numbers[i] for i in which]
        return 0.0 if set(parts) == {0} else None
    if name in _PRODUCTS and 0 in numbers:
        return 0.0
    if name == "div" and numbers[0] == 0 and numbers[1] is None:
        return 0.0
    if name in _ARITHMETIC:
        if None in numbers:
            return None
        number = _ARITHMETIC[name](*numbers)
        return number if math.isfinite(number) else None
    if name == "integer_pow" and eqn.params["y"] > 0 and numbers[0] == 0:
        return 0.0
    known = bool(moving) and set(moving) == {0} and name not in _NOT_ZERO_AT_ZERO
    return 0.0 if known else None


def _rounds(eqn: JaxprEqn) -> bool:
    """Whether it rounds by more than a dtype of floats does, which is no linear function."""
    if eqn.primitive.name == "reduce_precision":
        return True
    if eqn.primitive.name != "convert_element_type":
        return False
    avals: list[Any] = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    before, after = (jnp.issubdtype(aval.dtype, jnp.inexact) for aval in avals)
    return before and not after


def _loop(
    body: Any, fixed: list[Value], carried: list[Value], each: list[Value]
) -> tuple[list[Value], bool]:
    """After any number of iterations."""
    while True:
        outs, rounded = _body(body, [*fixed, *carried, *each])
        joined = [a.joined(b) for a, b in zip(carried, outs, strict=False)]
        if joined == carried:
            return [*joined, *outs[len(joined) :]], rounded
        carried = joined


def _body(body: ClosedJaxpr | Jaxpr, ins: Sequence[Value]) -> tuple[list[Value], bool]:
    jaxpr = _open(body)
    found = follow(jaxpr, ins)
    return [found.of(var) for var in jaxpr.outvars], found.rounds


def _all_joined(values: Sequence[Value]) -> Value:
    first, *rest = values
    for value in rest:
        first = first.joined(value)
    return first


def bodies_of(eqn: JaxprEqn) -> list[ClosedJaxpr | Jaxpr]:
    """The programs inside an operation."""
    parts: list[Any] = []
    for value in eqn.params.values():
        parts.extend(value if isinstance(value, tuple | list) else (value,))
    return [part for part in parts if isinstance(part, ClosedJaxpr | Jaxpr)]


def _open(body: ClosedJaxpr | Jaxpr) -> Jaxpr:
    return body.jaxpr if isinstance(body, ClosedJaxpr) else body
