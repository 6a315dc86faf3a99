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
_SAME = frozenset({"broadcast_in_dim", "copy", "reshape", "squeeze", "transpose"})
# What is exact on numbers, in any dtype.
_EXACT: dict[str, Callable[..., float]] = {
    "clamp": lambda least, a, most: min(max(a, least), most),
    "max": max,
    "min": min,
    "neg": lambda a: -a,
}
# Operands that the result is made of: it is 0 where all of them are.
_PARTS: dict[str, tuple[int, ...] | slice] = {
    "complex": slice(None),
    "concatenate": slice(None),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "gather": (0,),
    "pad": (0, 1),
    "rem": (0,),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
    "scatter-max": (0, 2),
    "scatter-min": (0, 2),
    "scatter-mul": (0,),
    "scatter-sub": (0, 2),
    "select_n": slice(1, None),
}
# Where one factor is 0, so is the product.
_PRODUCTS = frozenset({"mul", "dot_general", "conv_general_dilated"})
# The last operand divided by the others.
_SOLVES = frozenset({"triangular_solve", "tridiagonal_solve"})
# What is not 0 at 0, or need not be. Any other operation is 0 where all that moves in it is 0: also
# a kernel that nobody can look into, since that of a derivative is linear.
_NOT_ZERO_AT_ZERO = frozenset(
    """
    acos acosh approx_top_k argmax argmin atan2 bessel_i0e cholesky clz cond cos cosh
    cumlogsumexp cumprod digamma eig eigh eq eq_to erf_inv erfc exp exp2 ge geqrf gt
    householder_product igamma igammac integer_pow io_callback is_finite le le_to lgamma log
    logistic lt lt_to lu ne nextafter not or polygamma pow pure_callback qr random_bits
    random_fold_in random_seed random_split random_wrap reduce_and reduce_prod
    regularized_incomplete_beta rng_bit_generator rsqrt schur shift_left
    shift_right_arithmetic shift_right_logical sort svd threefry2x32 top_k while xor zeta
    """.split()  # noqa: SIM905  # a list would have a line for each
)
_LEAST_BITS = 16  # of a dtype of floats whose rounding is taken for none


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
    """What is known of all variables of a program.

    Attributes:
      values: of each variable.
      rounds: whether what moves is rounded.
      loud: the operations in whose bodies something that moves is not 0.
    """

    values: dict[Any, Value]
    rounds: bool
    loud: list[JaxprEqn]

    def of(self, var: Any) -> Value:
        """That of one variable."""
        if not isinstance(var, Literal):
            return self.values[var]
        array = np.asarray(var.val)
        kinds = (jnp.number, jnp.bool_)
        if not array.size or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
            return UNKNOWN
        first = array.flat[0]
        if not np.all(array == first) or (np.iscomplexobj(array) and first != 0):
            return UNKNOWN
        return Value(False, 0.0 if first == 0 else float(first))


UNKNOWN = Value(False, None)


def follow(jaxpr: Jaxpr, inputs: Sequence[Value]) -> Followed:
    """Follows what is known from the inputs to every variable."""
    values: dict[Any, Value] = dict.fromkeys(jaxpr.constvars, UNKNOWN)
    values |= zip(jaxpr.invars, inputs, strict=True)
    found, rounds = Followed(values, False, []), False
    for eqn in jaxpr.eqns:
        done = _follow_eqn(eqn, [found.of(var) for var in eqn.invars])
        values |= zip(eqn.outvars, done.outs, strict=True)
        rounds |= done.rounds
        if done.loud:
            found.loud.append(eqn)
    return found._replace(rounds=rounds)


class _Done(NamedTuple):
    outs: list[Value]
    rounds: bool
    loud: bool


def _follow_eqn(eqn: JaxprEqn, ins: list[Value]) -> _Done:
    params, name = eqn.params, eqn.primitive.name
    if name == "scan":
        body = opened(params["jaxpr"])
        # What is sliced, or stacked, has an axis more outside; the names of parameters change.
        carried = sum(map(_same_shape, eqn.outvars, body.outvars))
        sliced = len(ins) - sum(map(_same_shape, eqn.invars, body.invars))
        fixed = len(ins) - carried - sliced
        return _loop(body, ins[:fixed], ins[fixed:][:carried], ins[fixed + carried :])
    if name == "while" and {"cond_nconsts", "body_nconsts", "body_jaxpr"} <= set(params):
        tested, fixed = params["cond_nconsts"], params["body_nconsts"]
        ins = ins[tested:]
        return _loop(params["body_jaxpr"], ins[:fixed], ins[fixed:], [])
    if name == "cond" and "branches" in params:
        each = [_body(branch, ins[1:]) for branch in params["branches"]]
        outs = [_all_joined(values) for values in zip(*(done.outs for done in each), strict=True)]
        if ins[0].moves:
            outs = [value._replace(moves=True) for value in outs]
        return _Done(outs, any(d.rounds for d in each), any(d.loud for d in each))
    bodies = bodies_of(eqn)
    if len(bodies) == 1 and len(opened(bodies[0]).invars) == len(ins):
        return _body(bodies[0], ins)
    moves = any(value.moves for value in ins)
    value = Value(moves, _number(eqn, ins))
    return _Done([value] * len(eqn.outvars), moves and _rounds(eqn), False)


def _number(eqn: JaxprEqn, ins: list[Value]) -> float | None:
    """What each element of the result is."""
    name, numbers = eqn.primitive.name, [value.number for value in ins]
    if name in _SAME:
        return numbers[0]
    if name == "convert_element_type":
        return _converted(numbers[0], eqn)
    if name in _PARTS:
        which = _PARTS[name]
        parts = numbers[which] if isinstance(which, slice) else [numbers[i] for i in which]
        replaces = name != "scatter" or eqn.params.get("update_jaxpr") is None
        return 0.0 if replaces and set(parts) == {0} else None
    if name in _PRODUCTS and 0 in numbers:
        return 0.0 if all(n is None or math.isfinite(n) for n in numbers) else None
    if name == "div":
        by = ins[1]
        nonzero = by.number != 0 if by.number is not None else not by.moves
        return 0.0 if numbers[0] == 0 and nonzero else None
    if name in _SOLVES:
        return 0.0 if numbers[-1] == 0 and not any(value.moves for value in ins[:-1]) else None
    if name in ("add", "add_any", "sub"):
        one, other = numbers
        if one == 0 and other is not None:
            return -other if name == "sub" else other
        return one if other == 0 else None
    if name in _EXACT:
        return None if None in numbers else _EXACT[name](*numbers)
    if name == "integer_pow" and eqn.params["y"] > 0 and numbers[0] == 0:
        return 0.0
    moving = {value.number for value in ins if value.moves}
    return 0.0 if moving == {0} and name not in _NOT_ZERO_AT_ZERO else None


def _converted(number: float | None, eqn: JaxprEqn) -> float | None:
    """In the dtype of the result."""
    aval: Any = eqn.outvars[0].aval
    if not number or jnp.issubdtype(aval.dtype, jnp.complexfloating):
        return 0.0 if number == 0 else None
    return float(np.asarray(number).astype(aval.dtype))


def _rounds(eqn: JaxprEqn) -> bool:
    """Whether it rounds by more than a dtype of floats does, which is no linear function."""
    if eqn.primitive.name == "reduce_precision":
        return True
    if eqn.primitive.name != "convert_element_type":
        return False
    avals: list[Any] = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    before, after = (aval.dtype for aval in avals)
    return jnp.issubdtype(before, jnp.inexact) and not keeps_digits(after)


def keeps_digits(dtype: Any) -> bool:
    """Whether the dtype is one whose rounding is taken for none."""
    return jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= _LEAST_BITS


def _same_shape(one: Any, other: Any) -> bool:
    return one.aval.shape == other.aval.shape


def _loop(body: Any, fixed: list[Value], carried: list[Value], each: list[Value]) -> _Done:
    """After any number of iterations."""
    while True:
        done = _body(body, [*fixed, *carried, *each])
        joined = [a.joined(b) for a, b in zip(carried, done.outs, strict=False)]
        if joined == carried:
            return done._replace(outs=[*joined, *done.outs[len(joined) :]])
        carried = joined


def _body(body: ClosedJaxpr | Jaxpr, ins: Sequence[Value]) -> _Done:
    jaxpr = opened(body)
    found = follow(jaxpr, ins)
    loud = bool(found.loud) or any(v.moves and v.number != 0 for v in found.values.values())
    return _Done([found.of(var) for var in jaxpr.outvars], found.rounds, loud)


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


def opened(body: ClosedJaxpr | Jaxpr) -> Jaxpr:
    """The program without its constants."""
    return body.jaxpr if isinstance(body, ClosedJaxpr) else body
