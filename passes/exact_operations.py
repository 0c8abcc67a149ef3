"""Pointwise operations, constants and views, followed exactly; see `exact` for what a value is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from torch.fx import Node

from .exact import (
    KEPT,
    SAMPLES,
    WILD,
    Array,
    Evaluator,
    Operation,
    OutsideError,
    P,
    Value,
    array_of,
    fractional_power,
    held_by,
    inverse,
    name_of,
    power,
    residue,
    spread,
)  # fmt: skip

# -------------------------------------------------------------------- pointwise operations

OPERATIONS: dict[str, Operation] = {}


def operation(*names: str) -> Callable[[Operation], Operation]:
    """Register what follows the operations of these names."""

    def register(handler: Operation) -> Operation:
        OPERATIONS.update(dict.fromkeys(names, handler))
        return handler

    return register


def _combined(
    evaluator: Evaluator,
    arguments: Sequence[Any],
    plain: Callable[..., Array] | None,
    image: Callable[..., Array] | None = None,
    **changes: Any,
) -> Value:
    """A pointwise operation by what it does to the numbers and to their exponentials."""
    values, labels, hidden = evaluator.aligned(evaluator.operands(arguments))
    support = frozenset().union(*(v.support for v in values))
    return Value(
        plain=applied(plain, [v.plain for v in values]),
        image=applied(image, [v.image for v in values]),
        labels=labels, hidden=hidden, support=support, **changes,
    )  # fmt: skip


def applied(function: Callable[..., Array] | None, planes: Sequence[Array | None]) -> Array | None:
    """What a function makes of arrays, if all of them are known."""
    if function is None or any(plane is None for plane in planes):
        return None
    return function(*planes)


def _scalars(evaluator: Evaluator, arguments: Sequence[Any]) -> list[Fraction | None]:
    known = [evaluator.known(argument) for argument in arguments]
    return [None if value is None else value.scalar for value in known]


def _integral(evaluator: Evaluator, arguments: Sequence[Any]) -> bool:
    """Whether operands are integers that are known themselves."""
    known = [evaluator.known(argument) for argument in arguments]
    some = any(v is not None and v.integers for v in known)
    return some and all(v is not None and (v.integers or (v.scalar is not None and v.scalar.denominator == 1)) for v in known)


@operation("add", "sub", "rsub")
def _add(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    left, right = args[:2]
    alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
    if name_of(node) == "rsub":
        left, right = right, left
    factor = Fraction(alpha) * (1 if name_of(node) == "add" else -1)
    if _integral(evaluator, (left, right)) and factor.denominator == 1:
        return _combined(evaluator, (left, right), lambda x, y: x + int(factor) * y, integers=True)
    scale = residue(factor)
    return _combined(evaluator, (left, right), lambda x, y: (x + scale * y) % P, lambda x, y: x * fractional_power(y, factor) % P)


@operation("neg")
def _negate(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _combined(evaluator, args, lambda x: -x % P, inverse)


@operation("mul")
def _multiply(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _scaled(evaluator, args[0], args[1])


def _scaled(evaluator: Evaluator, left: Any, right: Any) -> Value:
    """A product; one with a constant is known by its exponential too."""
    factors = _scalars(evaluator, (left, right))
    if _integral(evaluator, (left, right)):
        return _combined(evaluator, (left, right), lambda x, y: x * y, integers=True)
    image = None
    if factors[1] is not None:
        image = lambda x, y: fractional_power(x, factors[1])  # noqa: E731
    elif factors[0] is not None:
        image = lambda x, y: fractional_power(y, factors[0])  # noqa: E731
    return _combined(evaluator, (left, right), lambda x, y: x * y % P, image)


@operation("div")
def _divide(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    if kwargs.get("rounding_mode") is not None or len(args) > 2:
        raise OutsideError("a division that rounds")
    divisor = _scalars(evaluator, args)[1]
    if divisor is not None and divisor != 0:
        return _scaled_by(evaluator, args[0], 1 / divisor)
    return _combined(evaluator, args, lambda x, y: x * inverse(y) % P)


def _scaled_by(evaluator: Evaluator, argument: Any, factor: Fraction) -> Value:
    scale = residue(factor)
    return _combined(evaluator, (argument,), lambda x: x * scale % P, lambda x: fractional_power(x, factor))


@operation("reciprocal")
def _reciprocal(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _combined(evaluator, args, inverse)


@operation("square")
def _square(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _combined(evaluator, args, lambda x: x * x % P)


@operation("pow")
def _power(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    if isinstance(args[0], (int, float)) or not isinstance(args[1], (int, float)) or args[1] != int(args[1]):
        raise OutsideError("a power that is not an integer one")
    return _combined(evaluator, args[:1], lambda x: power(x, int(args[1])))


@operation("exp")
def _exponential(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.operands(args[:1])[0]
    return replace(value, plain=needed(value.image), image=None, scalar=None, integers=False)


@operation("log")
def _logarithm(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.operands(args[:1])[0]
    return replace(value, plain=None, image=needed(value.plain), scalar=None, integers=False)


@operation("expm1")
def _exponential_less_one(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.operands(args[:1])[0]
    return replace(value, plain=(needed(value.image) - 1) % P, image=None, scalar=None, integers=False)


@operation("log1p")
def _logarithm_of_one_more(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.operands(args[:1])[0]
    return replace(value, plain=None, image=(needed(value.plain) + 1) % P, scalar=None, integers=False)


def needed(plane: Array | None) -> Array:
    """An array that must be known."""
    if plane is None:
        raise OutsideError("the exponential of a product, or a logarithm itself")
    return plane


@operation("logaddexp")
def _add_exponentials(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _combined(evaluator, args, None, lambda x, y: (x + y) % P)


@operation("addcmul")
def _add_product(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    scale = residue(Fraction(kwargs.get("value", 1)))
    return _combined(evaluator, args[:3], lambda x, y, z: (x + scale * y % P * z) % P)


@operation("lerp")
def _interpolate(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _combined(evaluator, args[:3], lambda x, y, w: (x + w * ((y - x) % P)) % P)


@operation("where")
def _where(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _chosen(evaluator, *args)


@operation("masked_fill")
def _masked_fill(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, mask, fill = args
    return _chosen(evaluator, mask, fill, value)


def _chosen(evaluator: Evaluator, mask: Any, then: Any, otherwise: Any) -> Value:
    """By a mask that is known; any other is a variable m in m * then + (1 - m) * otherwise."""
    condition = evaluator.known(mask)
    if condition is not None and condition.integers:
        values, labels, hidden = evaluator.aligned(evaluator.operands((mask, then, otherwise)))
        chosen = [
            applied(lambda x, y: np.where(values[0].plain != 0, x, y), [getattr(v, plane) for v in values[1:]])
            for plane in ("plain", "image")
        ]
        support = values[1].support | values[2].support
        return Value(plain=chosen[0], image=chosen[1], labels=labels, hidden=hidden, support=support)
    return _combined(evaluator, (mask, then, otherwise), lambda m, x, y: (m * x + (1 - m) % P * y) % P)


_COMPARISONS = {"ge": np.greater_equal, "gt": np.greater, "le": np.less_equal, "lt": np.less, "eq": np.equal, "ne": np.not_equal}


@operation(*_COMPARISONS)
def _compare(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    if not _integral(evaluator, args):
        raise OutsideError("a comparison of values that are not known")
    compare = _COMPARISONS[name_of(node)]
    return _combined(evaluator, args, lambda x, y: compare(x, y).astype(np.int64), integers=True)


@operation("to", "_to_copy", "clone", "contiguous", "alias", "type_as", "lift_fresh", "_autocast_to_full_precision",
            "_autocast_to_reduced_precision")  # fmt: skip
def _same(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    before, after = (held_by(x).dtype for x in (args[0], node))
    if before.is_floating_point and not after.is_floating_point:
        raise OutsideError("a cast that rounds to integers")
    value = evaluator.operands(args[:1])[0]
    return value if not after.is_floating_point else replace(value, integers=False)


# -------------------------------------------------------------------- constants


@operation("zeros", "zeros_like", "new_zeros")
def _zeros(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _filled(evaluator, node, 0)


@operation("ones", "ones_like", "new_ones")
def _ones(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    return _filled(evaluator, node, 1)


@operation("full", "full_like", "scalar_tensor", "new_full")
def _full(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    position = {"scalar_tensor": 0, "new_full": 2}.get(name_of(node), 1)
    return _filled(evaluator, node, args[position])


def _filled(evaluator: Evaluator, node: Node, number: Any) -> Value:
    value, rank = evaluator.number(number), len(evaluator.sizes.shape(node))
    return value.map(lambda x: x.reshape((SAMPLES, *(1,) * rank)), labels=(WILD,) * rank)


@operation("arange")
def _arange(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    numbers = [evaluator.sizes(a) for a in args[:3]]
    held = np.broadcast_to(np.arange(*numbers, dtype=np.int64), (SAMPLES, *evaluator.sizes.shape(node)))
    return Value(plain=held, image=None, labels=(KEPT,), integers=True)


CREATIONS = frozenset(("zeros", "ones", "full", "scalar_tensor", "arange", "zeros_like", "ones_like", "full_like", "new_zeros",
                       "new_ones", "new_full"))  # fmt: skip


# -------------------------------------------------------------------- views

VIEWS = frozenset(("permute", "transpose", "t", "unsqueeze", "squeeze", "view", "reshape", "_unsafe_view", "flatten", "unflatten",
                   "expand"))  # fmt: skip


@operation("permute")
def _permute(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.viewed(args[0])
    return _permuted(value, [d % len(value.labels) for d in args[1]])


@operation("transpose", "t")
def _transpose(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.viewed(args[0])
    order = list(range(len(value.labels)))
    first, second = args[1:3] if len(args) > 2 else (0, len(order) - 1)
    order[first], order[second] = order[second], order[first]
    return _permuted(value, order)


def _permuted(value: Value, order: Sequence[int]) -> Value:
    axes = [*range(value.axis(0)), *(value.axis(d) for d in order)] if order else [*range(2 if value.hidden is not None else 1)]
    return value.map(lambda x: x.transpose(axes), labels=tuple(value.labels[d] for d in order))


@operation("unsqueeze")
def _unsqueeze(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.viewed(args[0])
    dim = args[1] % (len(value.labels) + 1)
    return unsqueezed(value, dim)


def unsqueezed(value: Value, dim: int) -> Value:
    """With a dimension of length 1 more."""
    labels = (*value.labels[:dim], KEPT, *value.labels[dim:])
    return value.map(lambda x: np.expand_dims(x, dim + (1 if value.hidden is None else 2)), labels=labels)


@operation("squeeze", "view", "reshape", "_unsafe_view", "flatten", "unflatten")
def _reshape(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.viewed(args[0])
    before, after = evaluator.sizes.shape(args[0]), evaluator.sizes.shape(node)
    labels = _regrouped(before, after, value.labels)
    hidden = () if value.hidden is None else (array_of(value).shape[1],)
    shape = (SAMPLES, *hidden, *(n if label == KEPT else 1 for n, label in zip(after, labels, strict=True)))
    return value.map(lambda x: x.reshape(shape), labels=labels)


def _regrouped(before: Sequence[int], after: Sequence[int], labels: Sequence[int]) -> tuple[int, ...]:
    """Labels of a reshape's result: kept dimensions are joined and split with each other, a lane only moves."""
    if 0 in before:
        raise OutsideError("a reshape of nothing")
    result: list[int] = []
    i = j = 0
    while i < len(before) or j < len(after):
        first, start = i, j
        left, right, i, j = *(math.prod(x[k : k + 1]) for x, k in ((before, i), (after, j))), i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        i, j = min(i, len(before)), min(j, len(after))
        result += _group(before[first:i], after[start:j], labels[first:i])
    return tuple(result)


def _group(before: Sequence[int], after: Sequence[int], labels: Sequence[int]) -> list[int]:
    present = [label for size, label in zip(before, labels, strict=True) if size != 1]
    if all(label == KEPT for label in present):
        return [KEPT] * len(after)
    if len(present) == 1 and sum(size != 1 for size in after) == 1:
        return [present[0] if size != 1 else KEPT for size in after]
    if all(label == WILD for label in present):
        return [WILD if size != 1 else KEPT for size in after]
    raise OutsideError("a reshape that joins or splits lanes")


@operation("expand")
def _expand(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, after = evaluator.viewed(args[0]), evaluator.sizes.shape(node)
    before = (*(1,) * (len(after) - len(value.labels)), *evaluator.sizes.shape(args[0]))
    value = spread(value, len(after), value.hidden is not None)
    labels = [WILD if m != n else label for m, n, label in zip(before, after, value.labels, strict=True)]
    return replace(value, labels=tuple(labels))


@operation("select")
def _select(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.viewed(args[0])
    dim, index = args[1] % len(value.labels), evaluator.sizes(args[2])
    value = evaluator.kept(value, dim, args[0])
    return value.map(lambda x: np.take(x, index, axis=value.axis(dim)), labels=(*value.labels[:dim], *value.labels[dim + 1 :]))
