"""Operations that move values along a dimension, followed exactly: slices, joins, paddings, cumulative sums, functorch regions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.fx import Node

from .exact import (
    ENTER_LANE,
    KEPT,
    LEAVE_LANE,
    WILD,
    Array,
    Evaluator,
    Operation,
    OutsideError,
    P,
    Sizes,
    Value,
    bound,
    cumulative_product,
    held_by,
    name_of,
    spread,
)  # fmt: skip
from .exact_operations import applied, needed, operation, unsqueezed

MOVES: dict[str, Callable[[Node], Iterable[tuple[Node, int]]]] = {}
"""Each operand that is moved, with the dimension along which it is."""


def _moves(*names: str, dim: int) -> Callable[[Operation], Operation]:
    """Register an operation that moves its first operand along the dimension given as argument `dim`."""

    def moved(node: Node) -> Iterable[tuple[Node, int]]:
        args, kwargs = bound(node)
        given = args[dim] if len(args) > dim else kwargs.get("dim", kwargs.get("dims", 0))
        dims = given if isinstance(given, (tuple, list)) else (given,)
        return [(args[0], d) for d in dims]

    MOVES.update(dict.fromkeys(names, moved))
    return operation(*names)


@_moves("slice", dim=1)
def _slice(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    dim = args[1] if len(args) > 1 else 0
    if evaluator.sizes.shape(args[0]) == evaluator.sizes.shape(node) and evaluator.known(args[0]) is not None:
        return evaluator.viewed(args[0])
    value = evaluator.along(args[0], dim)
    return _sliced(value, dim, _bounds(evaluator, args[2:]))


def _bounds(evaluator: Evaluator, args: Sequence[Any]) -> slice:
    numbers = [None if n is None else evaluator.sizes(n) for n in (*args, None, None, None)[:3]]
    return slice(*numbers)


def _sliced(value: Value, dim: int, part: slice) -> Value:
    axis = value.axis(dim)
    return value.map(lambda x: x[(*(slice(None),) * axis, part)])


@_moves("cumsum", dim=1)
def _cumulative_sum(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.along(args[0], args[1])
    axis = value.axis(args[1])
    if value.integers:
        return replace(value, plain=np.cumsum(needed(value.plain), axis=axis), image=None, scalar=None)
    plain = applied(lambda x: np.cumsum(x, axis=axis) % P, [value.plain])
    image = applied(lambda x: cumulative_product(x, axis), [value.image])
    return replace(value, plain=plain, image=image, scalar=None)


@_moves("cumprod", dim=1)
def _cumulative_product(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.along(args[0], args[1])
    plain = cumulative_product(needed(value.plain), value.axis(args[1]))
    return replace(value, plain=plain, image=None, scalar=None, integers=False)


@_moves("logcumsumexp", dim=1)
def _cumulative_logarithm(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value = evaluator.along(args[0], args[1])
    image = np.cumsum(needed(value.image), axis=value.axis(args[1])) % P
    return replace(value, plain=None, image=image, scalar=None, integers=False)


CUMULATIVE = frozenset(("cumsum", "cumprod", "logcumsumexp"))


@_moves("flip", dim=1)
def _flip(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    if len(args[1]) != 1:
        raise OutsideError("a flip of several dimensions")
    value = evaluator.along(args[0], args[1][0])
    return value.map(lambda x: np.flip(x, axis=value.axis(args[1][0])))


@_moves("roll", dim=2)
def _roll(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    if len(args) < 3 or len(args[2]) != 1:
        raise OutsideError("a roll of several dimensions")
    value = evaluator.along(args[0], args[2][0])
    return value.map(lambda x: np.roll(x, evaluator.sizes(args[1][0]), axis=value.axis(args[2][0])))


def _parts(node: Node) -> Iterable[tuple[Node, int]]:
    args, kwargs = bound(node)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return [(part, dim) for part in args[0] if isinstance(part, Node)]


@operation("cat")
def _concatenate(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(evaluator.sizes.shape(node))
    known = [value for part in args[0] if (value := evaluator.known(part)) is not None]
    return _joined(evaluator, [evaluator.along(part, dim, known) for part in args[0]], dim)


MOVES["cat"] = _parts


def _joined(evaluator: Evaluator, parts: Sequence[Value], dim: int) -> Value:
    hides = any(part.hidden is not None for part in parts)
    parts = [spread(part, len(part.labels), hides) for part in parts]
    apart = [_sliced(part, dim, slice(0, 1)) for part in parts]
    _, labels, hidden = evaluator.aligned(apart)
    axis = parts[0].axis(dim)
    planes: list[Array | None] = []
    for plane in ("plain", "image"):
        arrays = [getattr(part, plane) for part in parts]
        planes.append(None if any(x is None for x in arrays) else np.concatenate(_broadcast(arrays, axis), axis=axis))
    support = frozenset().union(*(part.support for part in parts))
    labels = (*labels[:dim], KEPT, *labels[dim + 1 :])
    return Value(plain=planes[0], image=planes[1], labels=labels, hidden=hidden, support=support)


def _broadcast(arrays: Sequence[Array], axis: int) -> list[Array]:
    """To one shape in all dimensions but `axis`."""
    common = np.broadcast_shapes(*(x.shape[:axis] + (1,) + x.shape[axis + 1 :] for x in arrays))
    return [np.broadcast_to(x, common[:axis] + (x.shape[axis],) + common[axis + 1 :]) for x in arrays]


@operation("stack")
def _stack(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(evaluator.sizes.shape(node))
    return _joined(evaluator, [unsqueezed(value, dim) for value in evaluator.operands(args[0])], dim)


@operation("constant_pad_nd", "pad")
def _pad(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    if name_of(node) == "pad" and (args[2] if len(args) > 2 else kwargs.get("mode", "constant")) != "constant":
        raise OutsideError("a padding by other values")
    given = args[3:4] if name_of(node) == "pad" else args[2:3]
    fill = given[0] if given else kwargs.get("value", 0)
    value: Value | None = None
    for dim, before, after in _padded(evaluator.sizes, node, args):
        value = evaluator.along(args[0], dim) if value is None else evaluator.kept(value, dim, args[0])
        value = _padded_along(evaluator, value, dim, before, after, 0 if fill is None else fill)
    return evaluator.viewed(args[0]) if value is None else value


def _padded(sizes: Sizes, node: Node, args: Sequence[Any]) -> list[tuple[int, int, int]]:
    """(dimension, before, after) of a padding."""
    amounts = [sizes(n) for n in args[1]]
    rank = len(held_by(node).shape)
    pairs = [(rank - 1 - k, *amounts[2 * k : 2 * k + 2]) for k in range(len(amounts) // 2)]
    return [(dim, before, after) for dim, before, after in pairs if before or after]


def _padded_along(evaluator: Evaluator, value: Value, dim: int, before: int, after: int, fill: Any) -> Value:
    number, axis = evaluator.number(fill), value.axis(dim)
    planes: list[Array | None] = []
    for held, constant in ((value.plain, number.plain), (value.image, number.image)):
        if held is None or constant is None:
            planes.append(None)
            continue
        kept = held[(*(slice(None),) * axis, slice(max(0, -before), held.shape[axis] - max(0, -after)))]
        edges = [
            constant.reshape(-1, *(1,) * (held.ndim - 1)) + np.zeros(_resized(held.shape, axis, n), np.int64)
            for n in (before, after)
        ]
        planes.append(np.concatenate([edges[0], kept, edges[1]], axis=axis))
    return replace(value, plain=planes[0], image=planes[1], scalar=None, integers=False)


def _resized(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return shape[:axis] + (max(0, length),) + shape[axis + 1 :]


def _pad_dims(node: Node) -> Iterable[tuple[Node, int]]:
    amounts = node.args[1]
    rank = len(held_by(node).shape)
    return [(node.args[0], rank - 1 - k // 2) for k, n in enumerate(amounts) if n != 0]  # type: ignore[arg-type, misc]


MOVES["constant_pad_nd"] = MOVES["pad"] = _pad_dims


@_moves("slice_scatter", dim=2)
def _slice_scatter(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    dim = args[2] if len(args) > 2 else 0
    return _written(evaluator, args[0], args[1], dim, _bounds(evaluator, args[3:]))


@_moves("select_scatter", dim=2)
def _select_scatter(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    dim, index = args[2] % len(evaluator.sizes.shape(node)), evaluator.sizes(args[3])
    return _written(evaluator, args[0], args[1], dim, slice(index, index + 1 or None), select=True)


def _written(evaluator: Evaluator, target: Node, source: Node, dim: int, part: slice, select: bool = False) -> Value:
    """`target` with a part along a dimension replaced."""
    known = [value for x in (target, source) if (value := evaluator.known(x)) is not None]
    into = evaluator.along(target, dim, () if select else known)
    dim %= len(into.labels)
    new = evaluator.operands((source,))[0] if select else evaluator.along(source, dim, known)
    new = unsqueezed(new, dim) if select else new
    first = _sliced(into, dim, slice(0, 1))
    _, labels, hidden = evaluator.aligned([first, _sliced(new, dim, slice(0, 1)) if new.lengths[dim] else first])
    axis = into.axis(dim)
    planes: list[Array | None] = []
    for old, fresh in ((into.plain, new.plain), (into.image, new.image)):
        if old is None or fresh is None:
            planes.append(None)
            continue
        shape = np.broadcast_shapes(_resized(old.shape, axis, 1), _resized(fresh.shape, axis, 1))
        held = np.broadcast_to(old, _resized(shape, axis, old.shape[axis])).copy()
        held[(*(slice(None),) * axis, part)] = fresh
        planes.append(held)
    labels = (*labels[:dim], KEPT, *labels[dim + 1 :])
    return Value(plain=planes[0], image=planes[1], labels=labels, hidden=hidden, support=into.support | new.support)


# -------------------------------------------------------------------- functorch regions


@operation(ENTER_LANE)
def _hide(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, dim = evaluator.viewed(args[0]), args[1]
    if value.hidden is not None:
        raise OutsideError("nested functorch regions")
    dim %= len(value.labels)
    labels = (*value.labels[:dim], *value.labels[dim + 1 :])
    return value.map(lambda x: np.moveaxis(x, dim + 1, 1), labels=labels, hidden=value.labels[dim])


@operation(LEAVE_LANE)
def _show(evaluator: Evaluator, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Value:
    value, length, dim = evaluator.viewed(args[0]), evaluator.sizes(args[2]), args[3]
    dim %= len(value.labels) + 1
    if value.hidden is None:
        value = unsqueezed(value, dim)
        return replace(value, labels=(*value.labels[:dim], WILD if length != 1 else KEPT, *value.labels[dim + 1 :]))
    labels = (*value.labels[:dim], value.hidden, *value.labels[dim:])
    return value.map(lambda x: np.moveaxis(x, 1, dim + 1), labels=labels, hidden=None)
