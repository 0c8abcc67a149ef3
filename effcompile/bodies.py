"""The body of a loop as a graph, and the views that give it its xs.

A body's values are told apart by `Ref`s: a node of the step, a state, an element of an x, or a node outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .ir import Operand
from .positions import Part
from .unrolled import RefusedError

aten = torch.ops.aten

_COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack")


@dataclass(frozen=True)
class Ref:
    """A value inside the body: a step's node (by offset), a carry, an element of an x, or a node outside."""

    kind: str
    key: Any


@dataclass(frozen=True)
class Place:
    """A node of the body: the step's node that it copies, the first step's for its origin, and what it takes, node by node."""

    ref: Ref
    node: Node
    first: Node
    inputs: Mapping[Node, Ref]


class Body:
    """Builds a body's graph, each node with the fake value that it has there.

    Attributes:
        module: (states, elements of xs, invariants) -> [new states, collected values].
        xs: for each x, what the first step reads and how far on the next one does.
        invariants: the nodes outside that the body takes.
    """

    def __init__(self, states: Mapping[Any, Operand], places: Sequence[Place], updates: Sequence[Ref], outputs: Sequence[Ref]):
        self._graph = Graph()
        self._nodes: dict[Ref, Node] = {}
        self._reads: list[tuple[Ref, Ref, int]] = []
        self.xs: list[tuple[Part, int]] = []
        self.invariants: list[Node] = []
        with _fake_mode(states.values()), torch.no_grad():
            taken = (ref for place in places for ref in place.inputs.values())
            self._inputs(states, dict.fromkeys((*taken, *outputs, *updates)))
            for ref, whole, index in self._reads:
                self._nodes[ref] = self._call(aten.select.int, (self._nodes[whole], whole.key[0].dim, index), {})
            for place in places:
                self._copy(place)
            self._outputs((*updates, *outputs))
        self.module = GraphModule({}, self._graph, class_name="Step")

    def _inputs(self, states: Mapping[Any, Operand], used: Iterable[Ref]) -> None:
        for key, init in states.items():
            device = init.base.meta["val"].device
            self._placeholder(Ref("carry", key), "carry", torch.empty(init.shape, dtype=init.dtype, device=device))
        xs = [ref for ref in used if ref.kind == "x"]
        blocks = _blocks([ref.key for ref in xs])
        for ref in xs:
            self._x(ref, blocks.get(ref.key))
        if not self.xs:
            self._placeholder(Ref("x", None), "step", torch.empty((), dtype=torch.float32))
        for ref in used:
            if ref.kind == "outside":
                self.invariants.append(ref.key)
                self._placeholder(ref, "invariant", ref.key.meta["val"])

    def _x(self, ref: Ref, block: tuple[Part, int] | None) -> None:
        """An input for what a moving read gives, or a place in that for a whole block."""
        if block is None:
            self.xs.append(ref.key)
            self._placeholder(ref, "x", _element(ref.key[0]))
            return
        whole = Ref("x", block)
        if whole not in self._nodes:
            self._x(whole, None)
        self._reads.append((ref, whole, ref.key[0].start - block[0].start))

    def _placeholder(self, ref: Ref, name: str, value: Any) -> None:
        node = self._graph.placeholder(f"{name}_{sum(r.kind == ref.kind for r in self._nodes)}")
        node.meta["val"] = value
        self._nodes[ref] = node

    def _copy(self, place: Place) -> None:
        args, kwargs = map_arg((place.node.args, place.node.kwargs), lambda node: self._nodes[place.inputs[node]])
        node = self._call(place.node.target, args, kwargs)
        node.meta.update({key: place.first.meta[key] for key in _COPIED_META if key in place.first.meta})
        if _described(node) != _described(place.node):
            raise RefusedError("its body gives another shape or dtype than its steps", place.node)
        self._nodes[place.ref] = node

    def _call(self, target: Any, args: Any, kwargs: Any) -> Node:
        node = self._graph.call_function(target, args, kwargs)
        args, kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*args, **kwargs)
        return node

    def _outputs(self, refs: Sequence[Ref]) -> None:
        """Every output is a copy of its own: none may share memory with an input, another output, or what is kept for a gradient.

        Two copies of one value would be merged into one: a copy of the first copy is not.
        """
        copies: dict[Node, Node] = {}
        results = []
        for ref in refs:
            node = self._nodes[ref]
            copies[node] = self._call(aten.clone.default, (copies.get(node, node),), {"memory_format": torch.contiguous_format})
            results.append(copies[node])
        self._graph.output(results)


def scan_value(values: Sequence[torch.Tensor], carries: int, steps: int) -> tuple[torch.Tensor, ...]:
    """What a scan gives whose body gives `values`."""
    stacked = [torch.empty((steps, *value.shape), dtype=value.dtype, device=value.device) for value in values[carries:]]
    return (*(torch.empty_like(value) for value in values[:carries]), *stacked)


def _described(node: Node) -> list[tuple[Any, ...]]:
    return [([str(n) for n in value.shape], value.dtype, value.device) for value in _values(node)]


def _values(node: Node) -> list[torch.Tensor]:
    value = node.meta["val"]
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _fake_mode(states: Iterable[Operand]) -> Any:
    modes = (getattr(state.base.meta["val"], "fake_mode", None) for state in states)
    return next((mode for mode in modes if mode is not None), contextlib.nullcontext())


def _element(part: Part) -> torch.Tensor:
    """An element of the x that reads `part` in one step."""
    value = part.source.meta["val"]
    return value.select(part.dim, 0) if part.length is None else value.narrow(part.dim, 0, part.length)


def _blocks(reads: Sequence[tuple[Part, int]]) -> dict[tuple[Part, int], tuple[Part, int]]:
    """Reads of single positions that together take all positions between one step's and the next's, each with the block of them."""
    rows: dict[Any, list[Part]] = {}
    for part, stride in reads:
        if part.length is None and abs(stride) > 1:
            rows.setdefault((part.source, part.dim, stride), []).append(part)
    found = {}
    for (source, dim, stride), parts in rows.items():
        low = min(part.start for part in parts)
        if {part.start for part in parts} == set(range(low, low + abs(stride))):
            found.update({(part, stride): (Part(source, dim, low, abs(stride)), stride) for part in parts})
    return found


def operand_of(part: Part, stride: int, steps: int) -> Operand:
    """All that a moving read takes, along a new first dimension, in step order."""
    value = part.source.meta["val"]
    span = abs(stride) * (steps - 1)
    low = part.start if stride > 0 else part.start - span
    views: list[tuple[Any, tuple[Any, ...]]] = []
    if part.length is None or part.length == abs(stride):
        high = low + span + part.extent
        step = abs(stride) if part.length is None else 1
        if (low, high, step) != (0, part.size, 1):
            views.append((aten.slice.Tensor, (part.dim, low, high, step)))
        if part.length is not None:
            views.append((aten.unflatten.int, (part.dim, [steps, part.length])))
        order = [part.dim, *(d for d in range(value.dim() + (part.length is not None)) if d != part.dim)]
    else:
        views.append((aten.slice.Tensor, (part.dim, low, low + span + part.length)))
        views.append((aten.unfold.default, (part.dim, part.length, abs(stride))))
        rest = list(range(value.dim()))
        order = [part.dim, *rest[: part.dim], value.dim(), *rest[part.dim + 1 :]]
    if order != sorted(order):
        views.append((aten.permute.default, (order,)))
    if stride < 0:
        views.append((aten.flip.default, ([0],)))
    shape = (steps, *_element(part).shape)
    return Operand(base=part.source, views=tuple(views), shape=shape, dtype=value.dtype)
