"""Which part of a tensor a node reads or writes: x[:, t], x[:, 8 * t : 8 * t + 8], unbind(x)[t], split(x, 8)[t]; y[:, t] = v."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ._torch import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """Positions `start` to `start + length` of a tensor along a dimension; `length` None is one position, its dimension dropped."""

    source: Node
    dim: int
    start: int
    length: int | None

    @property
    def extent(self) -> int:
        """How many positions."""
        return 1 if self.length is None else self.length

    @property
    def size(self) -> int | None:
        """The source's size along the dimension, if it is known."""
        size = self.source.meta["val"].shape[self.dim]
        return size if isinstance(size, int) else None

    def is_like(self, other: Part | None) -> bool:
        """Whether two parts differ in where they begin at most."""
        return other is not None and (self.source, self.dim, self.length) == (other.source, other.dim, other.length)


def read_part(node: Node) -> Part | None:
    """What a select, a slice or an element of unbind or split takes; None for other nodes and for sizes that are not known."""
    reader = _READERS.get(node.target) if node.op == "call_function" else None
    return reader(node) if reader is not None else None


def written_part(node: Node) -> Part | None:
    """What a select_scatter or slice_scatter writes; its source is the buffer before."""
    if node.target is aten.select_scatter.default:
        return _selected(node)
    return _sliced(node) if node.target is aten.slice_scatter.default else None


def is_moved(before: Node, after: Node, stride: int | None) -> bool:
    """Whether two nodes read the same but for `stride` positions by which the second is further on."""
    one, other = read_part(before), read_part(after)
    return one is not None and other is not None and one.is_like(other) and other.start - one.start == stride


def given(node: Node) -> dict[str, Any]:
    """The arguments of an ATen node by name, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    arguments = {schema.name: schema.default_value for schema in node.target._schema.arguments}
    arguments.update(zip(arguments, node.args, strict=False))
    arguments.update(node.kwargs)
    return arguments


def _dim(source: Any, dim: Any) -> tuple[int, int | None] | None:
    """A dimension counted from the front, and its size if that is known; None for what is no dimension of a tensor."""
    value = source.meta.get("val") if isinstance(source, Node) else None
    if not isinstance(value, torch.Tensor) or not isinstance(dim, int) or not -value.dim() <= dim < value.dim():
        return None
    size = value.shape[dim]
    return dim % value.dim(), size if isinstance(size, int) else None


def _from_front(position: Any, size: int | None) -> int | None:
    """A position counted from the front, None if it is not known."""
    if not isinstance(position, int) or (position < 0 and size is None):
        return None
    return position if position >= 0 else max(position + size, 0)  # type: ignore[operator]


def _selected(node: Node) -> Part | None:
    arguments = given(node)
    source, place = arguments["self"], _dim(arguments["self"], arguments["dim"])
    start = _from_front(arguments["index"], place[1]) if place is not None else None
    return Part(source, place[0], start, None) if place is not None and start is not None else None


def _sliced(node: Node) -> Part | None:
    arguments = given(node)
    source, place = arguments["self"], _dim(arguments["self"], arguments["dim"])
    if place is None or arguments["step"] != 1:
        return None
    dim, size = place
    start = _from_front(arguments["start"] or 0, size)
    end = _from_front(_END if arguments["end"] is None else arguments["end"], size)
    length = node.meta["val"].shape[dim] if node.target is aten.slice.Tensor else None
    if size is not None and start is not None and end is not None:
        start = min(start, size)
        length = max(min(end, size) - start, 0)
    return Part(source, dim, start, length) if start is not None and isinstance(length, int) else None


def _element(node: Node) -> Part | None:
    several, index = node.args
    if not isinstance(several, Node) or several.target not in _SPLITS or not isinstance(index, int):
        return None
    arguments = given(several)  # type: ignore[arg-type]
    source, place = arguments["self"], _dim(arguments["self"], arguments["dim"])
    if place is None or place[1] is None:
        return None
    values = several.meta["val"]
    if several.target is aten.unbind.int:
        return Part(source, place[0], index % len(values), None)
    lengths = [value.shape[place[0]] for value in values]
    return Part(source, place[0], sum(lengths[: index % len(lengths)]), lengths[index])


_SPLITS = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default)
_END = (1 << 63) - 1

_READERS: dict[Any, Callable[[Node], Part | None]] = {
    aten.select.int: _selected,
    aten.slice.Tensor: _sliced,
    operator.getitem: _element,
}
