"""Unrolled loops: steps of a graph that are equal up to what they carry, which position they read, and which they write.

    carry, y_t = body(carry, x_t, invariants)        for t = 0 .. steps - 1

Step t is compared with step t + 1 node by node. A tensor that a step takes is of the same step (`inside`), of an earlier one
(`carry`), the same for all steps (`invariant`), or a part of one tensor whose position moves by the same amount each step (`read`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .ir import Operand
from .positions import is_moved, read_part
from .repeats import Item, Run

_DEEPEST = 2  # from how many steps before a value may be carried


@dataclass(frozen=True, kw_only=True)
class Write:
    """Scatters of one value a step: y_t goes to `length` positions of `dim` (None: one, dropped) from `start + stride * t` on."""

    collected: int
    dim: int
    start: int
    stride: int
    length: int | None


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A tensor that each step writes a part of: `node` is its value after the last step, `entry` that before the first."""

    node: Node
    entry: Node
    writes: tuple[Write, ...]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """An unrolled loop, proven: what it computes, from what, and which nodes its results stand for.

    Attributes:
        body: (carries, elements of xs, invariants) -> [carries, collected values], in ATen operators with fake values.
        inits: each carry before the first step.
        xs: tensors with one element a step, in step order, along their first dimension.
        invariants: tensors and sizes that every step takes.
        finals: for each carry, the node of its value after the last step, if something outside takes that.
        collected: for each value kept from every step, its node in each step (None where the last step has no such node).
        buffers: what is written part by part.
        nodes: all nodes of the steps, in their order.
        place: the first node of the second step; all that the loop takes comes before it.
        first: the first node of the first step, of which stack traces are told.
    """

    body: GraphModule
    steps: int
    inits: tuple[Operand, ...]
    xs: tuple[Operand, ...]
    invariants: tuple[Node, ...]
    finals: tuple[Node | None, ...]
    collected: tuple[tuple[Node | None, ...], ...]
    buffers: tuple[Buffer, ...]
    nodes: tuple[Node, ...]
    place: Node
    first: Node


class RefusedError(Exception):
    """Steps that are no loop, or none that can be rolled up, and the place that shows it."""

    def __init__(self, why: str, node: Node):
        super().__init__(why)
        self.why, self.node = why, node


# -------------------------------------------------------------------- where a step's tensors come from


@dataclass(frozen=True)
class Source:
    """Where a step takes a tensor from.

    inside: the `offset`-th node of the step. carry: that of `lag` steps before. invariant: `node`, or an attribute of the module.
    read: a part of `node` that is taken outside of the steps, `stride` positions further on than the step before.
    """

    kind: str
    offset: int = 0
    lag: int = 0
    node: Any = None
    part: tuple[int, int | None] = (0, None)
    stride: int | None = None

    def continues(self, later: Source) -> bool:
        """Whether this may be the first step's, where `later` is that of all steps after it."""
        if later.kind == "carry":
            return later.lag == 1
        if later.kind == "read":
            return self.kind in ("read", "invariant")  # how far it is from there to the second step's is seen to elsewhere
        same = (self.kind, self.offset, self.lag, self.node, self.part)
        return same == (later.kind, later.offset, later.lag, later.node, later.part)


@dataclass(frozen=True)
class Line:
    """One node of a step, compared with its fellow of the step before: sources, numbers, and how far its part has moved."""

    sources: tuple[Source, ...]
    numbers: tuple[Any, ...]
    stride: int | None

    def continues(self, later: Line) -> bool:
        """Whether this may be the first step's, where `later` is that of all steps after it."""
        pairs = zip(self.sources, later.sources, strict=True)
        return self.numbers == later.numbers and all(mine.continues(theirs) for mine, theirs in pairs)


@dataclass(frozen=True)
class Steps:
    """Items cut into `count` steps of `period`, from `start` on."""

    items: Sequence[Item]
    places: dict[Node, int]
    start: int
    period: int
    count: int

    @classmethod
    def of(cls, items: Sequence[Item], places: dict[Node, int], run: Run, rotation: int = 0) -> Steps:
        """The steps of a run, from its `rotation`-th item on."""
        start = run.start + rotation
        return cls(items, places, start, run.period, (run.end - start) // run.period)

    def item(self, step: int, offset: int) -> Item:
        """The item at an offset in a step."""
        return self.items[self.start + step * self.period + offset]

    def lines(self, step: int) -> tuple[Line, ...]:
        """What a step does, for comparison with the next."""
        return tuple(self._line(step, offset) for offset in range(self.period))

    def _line(self, step: int, offset: int) -> Line:
        item = self.item(step, offset)
        before = self.item(step - 1, offset) if step else None
        previous = before.inputs if before else (None,) * len(item.inputs)
        sources = tuple(self.source(a, b, step) for a, b in zip(item.inputs, previous, strict=True))
        stride = item.part.start - before.part.start if before and item.part and before.part else None
        return Line(sources, item.numbers, stride)

    def source(self, node: Node, previous: Node | None, step: int) -> Source:
        """Where `node`, taken in a step, comes from; `previous` is what the step before has in its place."""
        distance = self._distance(node, step)
        if distance is not None:
            lag = -(distance // self.period)
            return Source("carry" if lag else "inside", offset=distance % self.period, lag=lag)
        part = read_part(node)
        if part is not None and previous is not None and self.places.get(part.source, -1) < self.start:
            earlier = read_part(previous)
            if part.is_like(earlier) and earlier is not None and earlier.start != part.start:
                return Source("read", node=part.source, part=(part.dim, part.length), stride=part.start - earlier.start)
        return Source("invariant", node=f"attribute {node.target}" if node.op == "get_attr" else node)

    def _distance(self, node: Node, step: int) -> int | None:
        place = self.places.get(node)
        if place is None or place < self.start:
            return None
        distance = place - self.start - step * self.period
        return distance if -_DEEPEST * self.period <= distance < self.period else None


# -------------------------------------------------------------------- stretches of equal steps


@dataclass(frozen=True)
class Stretch:
    """Steps `first` to `last` (excluded), all of which do the same; `lines` is what each but the first does."""

    steps: Steps
    first: int
    last: int
    lines: tuple[Line, ...]


def stretches(steps: Steps, least: int) -> list[Stretch]:
    """The longest stretches of at least `least` equal steps."""
    every = [steps.lines(step) for step in range(steps.count)]
    found, first = [], 1
    while first < steps.count:
        last = first + 1
        while last < steps.count and every[last] == every[first]:
            last += 1
        begin = first - 1 if _begins(steps, every, first) else first
        if last - begin >= least and last - first >= 2:
            found.append(Stretch(steps, begin, last, every[first]))
        first = last
    return found


def _begins(steps: Steps, every: Sequence[tuple[Line, ...]], first: int) -> bool:
    """Whether the step before `first` does the same on other carries, which fit into the place of what `first` carries."""
    lines, before = every[first], every[first - 1]
    if not all(mine.continues(theirs) for mine, theirs in zip(before, lines, strict=True)):
        return False
    inits: dict[int, Node] = {}
    for offset, line in enumerate(lines):
        for k, source in enumerate(line.sources):
            if source.kind != "carry":
                continue
            if source.lag > 1:
                return False
            init = steps.item(first - 1, offset).inputs[k]
            if inits.setdefault(source.offset, init) is not init or not _is_alike(init, steps.item(first, source.offset).node):
                return False
        places = zip(steps.item(first - 1, offset).inputs, steps.item(first, offset).inputs, line.sources, strict=True)
        if not all(source.kind != "read" or is_moved(before, after, source.stride) for before, after, source in places):
            return False
    return True


def _is_alike(one: Node, other: Node) -> bool:
    """Whether one value may take the place of another from step to step."""
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.dtype == b.dtype and a.device == b.device and [str(n) for n in a.shape] == [str(n) for n in b.shape]


def difference(steps: Steps) -> tuple[str, Node]:
    """Why there is no stretch: in what the last two steps of the middle differ."""
    step = min(max(2, steps.count // 2), steps.count - 2)
    for offset, (one, other) in enumerate(zip(steps.lines(step), steps.lines(step + 1), strict=True)):
        node = steps.item(step + 1, offset).node
        if one.numbers != other.numbers:
            return "a number changes from step to step", node
        if one.stride != other.stride:
            return "the positions that it reads or writes are not evenly spaced", node
        if one.sources != other.sources:
            return "its steps take different tensors, other than by carrying or by evenly spaced positions", node
    return "its steps differ", steps.item(step, 0).node


def moves(lines: Sequence[Line]) -> bool:
    """Whether steps carry something, and read or write positions that move: what makes of equal operators a loop over something."""
    sources = [source for line in lines for source in line.sources]
    carries = any(source.kind == "carry" for source in sources)
    return carries and (any(line.stride for line in lines) or any(source.kind == "read" for source in sources))


# -------------------------------------------------------------------- where a step begins


def best_rotation(stretch: Stretch, run: Run) -> int:
    """At which item of a run its steps begin: where least is carried.

    Of equals, at the run's start; else so that the run's end is a step's. A boundary elsewhere must carry less than those by two
    values; of several there, the one where the program jumps back to an earlier line.
    """
    period = run.period
    crossing = _crossings(stretch.lines, period)
    shift = (stretch.steps.start - run.start) % period
    natural = {0: 0, (run.end - run.start) % period: 1}

    def cost(rotation: int) -> tuple[int, int, int]:
        carried = crossing[(rotation - shift) % period]
        jumps = _jumps_back(stretch.steps.items, run.start + rotation)
        return carried + (rotation not in natural), natural.get(rotation, 2) + (not jumps), rotation

    return min(range(period), key=cost)


def _crossings(lines: Sequence[Line], period: int) -> list[int]:
    """For each offset, how many values live on from before it to at or after it, from one step or from earlier ones."""
    furthest: dict[int, int] = {}
    for offset, line in enumerate(lines):
        for source in line.sources:
            if source.kind in ("inside", "carry"):
                reach = offset + source.lag * period
                furthest[source.offset] = max(furthest.get(source.offset, 0), reach)
    change = [0] * (period + 1)
    whole = 0
    for begin, end in furthest.items():
        turns, rest = divmod(end - begin, period)
        whole += turns
        low, high = begin + 1, begin + rest + 1
        change[low] += 1
        change[min(high, period)] -= 1
        if high > period:
            change[0] += 1
            change[high - period] -= 1
    totals, total = [], whole
    for offset in range(period):
        total += change[offset]
        totals.append(total)
    return totals


def _jumps_back(items: Sequence[Item], place: int) -> bool:
    """Whether the program's lines go back between an item and the one before."""
    return place > 0 and _lines_of(items[place].node) < _lines_of(items[place - 1].node)


def _lines_of(node: Node) -> list[int]:
    text = str(node.meta.get("stack_trace") or "")
    numbers = (line.split("line ")[-1].split(",")[0] for line in text.splitlines() if line.strip().startswith("File "))
    return [int(number) for number in numbers if number.isdigit()]
