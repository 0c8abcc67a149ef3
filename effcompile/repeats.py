"""Runs of a graph in which the same operators come again and again, as an unrolled loop leaves them: found in linear time.

A node's *label* is its operator, the constants among its arguments, and the shape and dtype of its result; which tensors it takes,
which position it reads and which number it adds are left open. A run of period d is a stretch with label[i] = label[i + d].
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from ._torch import OpOverload
from .positions import Part, read_part, written_part

_NUMBERS = ("number", "Tensor", "Optional[Tensor]", "Optional[number]")  # types of arguments that hold a number to calculate with
_CANDIDATES = 24  # how many periods are tried at a node: the distances to the next nodes of its label
_MODULUS, _BASE = (1 << 61) - 1, 1_000_003


@dataclass(frozen=True)
class Item:
    """A node, its label, and what the label leaves open: tensors (and sizes) taken, numbers, and the part read or written."""

    node: Node
    label: int
    inputs: tuple[Node, ...]
    numbers: tuple[Any, ...]
    read: Part | None
    written: Part | None

    @property
    def part(self) -> Part | None:
        """The part that is read or written."""
        return self.read or self.written


@dataclass(frozen=True, kw_only=True)
class Run:
    """Items `start` to `end`, where each label equals the one `period` further on while that lies in the run."""

    start: int
    end: int
    period: int

    @property
    def steps(self) -> int:
        """How many whole periods."""
        return (self.end - self.start) // self.period


def items_of(graph: Graph, regions: Mapping[Node, int]) -> list[Item]:
    """The calls of a graph in order, without attributes and arithmetic on sizes, which stand where they were first needed.

    Calls in different `regions` (grad mode, autocast) have different labels.
    """
    labels: dict[Hashable, int] = {}
    outside = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    found = []
    for node in graph.nodes:
        if node.op != "call_function" and node.op != "call_method":
            continue
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, tuple, list)) and value is not None and outside.issuperset(node.all_input_nodes):
            outside.add(node)
        else:
            found.append(_item(node, labels, regions.get(node, -1)))
    return found


def _item(node: Node, labels: dict[Hashable, int], region: int) -> Item:
    read, written = read_part(node), written_part(node)
    part = read or written
    inputs: list[Node] = []
    numbers: list[Any] = []
    if part is not None:
        inputs = [argument for argument in node.args[: 1 if read else 2] if isinstance(argument, Node)]
        form: Hashable = (part.dim, part.length)
    else:
        form = (
            tuple(_form(a, inputs, numbers, _holds_number(node, k)) for k, a in enumerate(node.args)),
            tuple((name, _form(a, inputs, numbers, False)) for name, a in node.kwargs.items()),
        )
    key = (node.op, node.target, form, _described(node.meta.get("val")), region)
    return Item(node, labels.setdefault(key, len(labels)), tuple(inputs), tuple(numbers), read, written)


def _holds_number(node: Node, index: int) -> bool:
    schema = node.target._schema.arguments if isinstance(node.target, OpOverload) else ()
    return index < len(schema) and str(schema[index].type) in _NUMBERS


def _form(argument: Any, inputs: list[Node], numbers: list[Any], number: bool) -> Hashable:
    if isinstance(argument, Node):
        inputs.append(argument)
        return "*"
    if isinstance(argument, (tuple, list)):
        return tuple(_form(part, inputs, numbers, False) for part in argument)
    if number and isinstance(argument, (int, float)):
        numbers.append(argument)
        return "#"
    if isinstance(argument, (slice, dict)):
        return repr(argument)
    return type(argument), argument


def _described(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(str(n) for n in value.shape), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(_described(part) for part in value)
    return str(type(value))


class Repeats:
    """Finds runs in a list of items, outer loops before inner ones, and none across one that was taken."""

    def __init__(self, items: Sequence[Item], least: int):
        self._labels = [item.label for item in items]
        self._least = least
        self._next = _occurrences(self._labels)
        self._hashes, self._powers = [0], [1]
        for label in self._labels:
            self._hashes.append((self._hashes[-1] * _BASE + label + 1) % _MODULUS)
            self._powers.append(self._powers[-1] * _BASE % _MODULUS)
        self._floor = self._place = 0
        self._told: dict[int, int] = {}
        self._refused: list[Run] = []

    def __iter__(self) -> Iterator[Run]:
        """Runs of at least `least` periods. After each, `take` what was made of it or `refuse` it, or other periods are tried."""
        while self._place < len(self._labels):
            start = self._place
            for run in self._runs_at(start):
                if any(run.period % other.period == 0 and run.end <= other.end for other in self._refused):
                    continue
                yield run
                if self._place > start:
                    break
            else:
                self._place += 1

    def _runs_at(self, start: int) -> list[Run]:
        """The runs that a place begins, not told of before: the longest first, and of equals that of the smallest period."""
        runs = []
        for follower in self._next[start]:
            period = follower - start
            if self._told.get(period, 0) <= start and self._repeats(start, period):
                runs.append(self._extended(start, period))
                self._told[period] = runs[-1].end
        return sorted(runs, key=lambda run: (run.start - run.end, run.period))

    def take(self, end: int) -> None:
        """What lies before `end` is done with."""
        self._place = self._floor = max(end, self._place + 1)

    def refuse(self, run: Run) -> None:
        """Two steps of a run taken for one are no loop either. Shorter periods are still tried."""
        self._refused = [other for other in self._refused if other.end > self._place] + [run]

    def _repeats(self, start: int, period: int) -> bool:
        length = (self._least - 1) * period
        if start + period + length > len(self._labels):
            return False
        return self._hash(start, length) == self._hash(start + period, length)

    def _hash(self, start: int, length: int) -> int:
        return (self._hashes[start + length] - self._hashes[start] * self._powers[length]) % _MODULUS

    def _extended(self, start: int, period: int) -> Run:
        end = start + self._least * period
        while end < len(self._labels) and self._labels[end] == self._labels[end - period]:
            end += 1
        while start > self._floor and self._labels[start - 1] == self._labels[start - 1 + period]:
            start -= 1
        return Run(start=start, end=end, period=period)


def _occurrences(labels: Sequence[int]) -> list[tuple[int, ...]]:
    """For each place the next ones with the same label."""
    result: list[tuple[int, ...]] = [()] * len(labels)
    later: dict[int, tuple[int, ...]] = {}
    for place in reversed(range(len(labels))):
        result[place] = later.get(labels[place], ())
        later[labels[place]] = (place, *result[place])[:_CANDIDATES]
    return result
