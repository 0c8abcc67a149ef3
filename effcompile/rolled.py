"""From equal steps to a loop: what is carried, read, collected and written, and the body that does it.

A step's nodes are sorted: invariant ones are computed once, outside; reads at moving positions become the loop's xs; scatters at
moving positions into a buffer that nothing else looks at become collected values; of the rest, the body is what something needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .bodies import Body, Place, Ref, operand_of
from .builder import is_pure
from .ir import Operand
from .positions import Part, is_moved, read_part
from .repeats import Item
from .unrolled import Buffer, Loop, RefusedError, Source, Stretch, Write

aten = torch.ops.aten
JOINS = (aten.stack.default, aten.cat.default)
SCAN: Any = torch.ops.higher_order.scan


@dataclass(frozen=True)
class Chain:
    """Scatters, by offset, each step's first into the buffer that the last of the step before gave; `entry` is the first buffer."""

    members: tuple[int, ...]
    entry: Node


def loop_of(stretch: Stretch) -> Loop:
    """The loop that equal steps are. RefusedError with the reason if they are none."""
    return _Rolling(stretch).loop()


class _Rolling:
    def __init__(self, stretch: Stretch):
        self._steps, self._first, self._lines = stretch.steps, stretch.first, stretch.lines
        self._period = stretch.steps.period
        self._windows: list[list[Node | None]] = [
            [self._steps.item(step, offset).node for offset in range(self._period)] for step in range(stretch.first, stretch.last)
        ]
        self._typical = [self._steps.item(stretch.first + 1, offset) for offset in range(self._period)]
        self._last = stretch.last
        self._refuse_effects()
        self._chains = self._find_chains()
        self._in_chain = {member: chain for chain in self._chains for member in chain.members}
        self._add_last_step()
        self._nodes = frozenset(node for window in self._windows for node in window if node is not None)
        self._initial: dict[Any, Operand] = {}
        self._update: dict[Any, Ref] = {}
        self._element_of: dict[Any, int] = {}
        self._refs: list[Ref] = []
        self._find_refs()

    # what may not be in a loop ------------------------------------------------------------------------------------------

    def _refuse_effects(self) -> None:
        for item in self._typical:
            node = item.node
            if is_pure(node):
                continue
            if node.target is SCAN:
                raise RefusedError("there is a scan in its steps, and Inductor computes a scan inside another one wrongly", node)
            tags = getattr(node.target, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags:
                raise RefusedError("random numbers are drawn in it", node)
            place = (
                node
                if node.meta.get("stack_trace")
                else next((i.node for i in self._typical if i.node.meta.get("stack_trace")), node)
            )
            raise RefusedError("its steps do more than compute values", place)

    # the last step, of which what nobody needs is gone --------------------------------------------------------------------

    def _add_last_step(self) -> None:
        """One more step at the end, if what follows is a step without the nodes of which nothing is needed."""
        items, place = self._steps.items, self._steps.start + self._last * self._period
        found: list[Node | None] = []
        for offset in range(self._period):
            item = items[place] if place < len(items) else None
            if item is not None and self._belongs(item, offset, found):
                found.append(item.node)
                place += 1
            elif offset in self._in_chain or not self._may_be_missing(offset):
                return
            else:
                found.append(None)
        if any(node is not None and (offset in self._in_chain or self._is_collected(offset)) for offset, node in enumerate(found)):
            self._windows.append(found)

    def _is_collected(self, offset: int) -> bool:
        """Whether something outside takes a node of the last full step, other than the last step after it, and of one before."""
        before, last = self._windows[0][offset], self._windows[-1][offset]
        assert before is not None and last is not None
        steps = {node for window in self._windows for node in window}
        return not (steps.issuperset(before.users) or steps.issuperset(last.users))

    def _belongs(self, item: Item, offset: int, found: Sequence[Node | None]) -> bool:
        typical, line, before = self._typical[offset], self._lines[offset], self._item(-1, offset)
        if item.label != typical.label or item.numbers != typical.numbers:
            return False
        if item.part is not None and before.part is not None and item.part.start - before.part.start != (line.stride or 0):
            return False
        sources = zip(item.inputs, before.inputs, line.sources, strict=True)
        return all(self._comes_from(node, previous, source, found) for node, previous, source in sources)

    def _comes_from(self, node: Node, previous: Node, source: Source, found: Sequence[Node | None]) -> bool:
        if source.kind == "inside":
            return source.offset < len(found) and node is found[source.offset]
        if source.kind == "carry":
            return node is self._windows[-source.lag][source.offset]
        if source.kind == "read":
            return is_moved(previous, node, source.stride)
        return (f"attribute {node.target}" if node.op == "get_attr" else node) == source.node

    def _may_be_missing(self, offset: int) -> bool:
        """Whether the node of the last step, had it been there, would have read where there is something."""
        line, item = self._lines[offset], self._item(-1, offset)
        reads: list[tuple[Part | None, int | None]] = [(item.read, line.stride)] if line.stride else []
        for node, source in zip(item.inputs, line.sources, strict=True):
            if source.kind == "read":
                reads.append((read_part(node), source.stride))
        return all(part is not None and _holds(part, part.start + (stride or 0)) for part, stride in reads)

    def _item(self, step: int, offset: int) -> Item:
        """The item in a step of the stretch, from its end if negative."""
        return self._steps.item(self._first + step if step >= 0 else self._last + step, offset)

    # buffers that are written part by part ----------------------------------------------------------------------------------

    def _find_chains(self) -> tuple[Chain, ...]:
        writers = {k for k, line in enumerate(self._lines) if self._typical[k].written is not None and line.stride}
        before = {k: self._lines[k].sources[0] for k in writers}
        chains = []
        for start in sorted(writers):
            if before[start].kind != "carry" or before[start].lag != 1:
                continue
            members = [start]
            while members[-1] != before[start].offset:
                following = [k for k in sorted(writers) if before[k].kind == "inside" and before[k].offset == members[-1]]
                if len(following) != 1:
                    break
                members.append(following[0])
            if members[-1] == before[start].offset:
                chains.append(Chain(tuple(members), self._item(0, start).inputs[0]))
        return tuple(chains)

    def _read_from(self, chain: Chain, offset: int) -> Ref:
        """What a read from a buffer under way gives: what was written this step, or one before, or what was there at first."""
        line, item = self._lines[offset], self._item(0, offset)
        part, source, node = item.read, line.sources[0], self._typical[offset].node
        if part is None:
            raise RefusedError("a buffer that is written part by part is also used as a whole", node)
        if source.kind == "carry" and (source.lag, source.offset) != (1, chain.members[-1]):
            raise RefusedError("a buffer is read as it was before the step before", node)
        written_before = chain.members.index(source.offset) if source.kind == "inside" else -1
        for position, member in enumerate(chain.members):
            written = self._item(0, member).written
            assert written is not None and self._lines[member].stride
            stride = self._lines[member].stride or 0
            if line.stride != stride or part.dim != written.dim:
                raise RefusedError("a buffer is read and written at positions that move differently", node)
            gap, rest = divmod(part.start - written.start, stride)
            if rest or part.length != written.length:
                if abs(stride) < max(part.extent, written.extent) or not _apart(part, written, abs(stride)):
                    raise RefusedError("what is read from a buffer overlaps with what is written to it", node)
            elif gap == 0 and position <= written_before:
                return self._ref_of(member, 1)
            elif gap == -1:
                return self._carried_element(offset, member, chain, part)
            elif gap < 0:
                raise RefusedError(f"a buffer is read where it was written {-gap} steps before", node)
        return self._x(Part(chain.entry, part.dim, part.start, part.length), line.stride or 0)

    def _carried_element(self, offset: int, member: int, chain: Chain, part: Part) -> Ref:
        key = ("read", offset)
        value = self._typical[offset].node.meta["val"]
        view: tuple[Any, tuple[Any, ...]] = (aten.select.int, (part.dim, part.start))
        if part.length is not None:
            view = (aten.slice.Tensor, (part.dim, part.start, part.start + part.length))
        self._initial[key] = Operand(base=chain.entry, views=(view,), shape=tuple(value.shape), dtype=value.dtype)
        self._element_of[key] = member
        return Ref("carry", key)

    # every node of a step ---------------------------------------------------------------------------------------------------

    def _find_refs(self) -> None:
        for offset in range(self._period):
            self._refs.append(self._classified(offset))
        for key in self._initial:
            if key[0] == "read":
                self._update[key] = self._ref_of(self._element_of[key], 1)
            elif key[1] == 1:
                self._update[key] = self._refs[key[0]]

    def _classified(self, offset: int) -> Ref:
        line, item = self._lines[offset], self._typical[offset]
        if offset in self._in_chain:
            if self._ref_of(offset, 1).kind == "chain":
                raise RefusedError("a buffer is written to another part by part", item.node)
            return Ref("chain", offset)
        for k, source in enumerate(line.sources):
            if source.kind in ("inside", "carry") and source.offset in self._in_chain:
                if k or item.read is None:
                    raise RefusedError("a buffer that is written part by part is also used as a whole", item.node)
                return self._read_from(self._in_chain[source.offset], offset)
        refs = [self._ref_of(offset, k) for k in range(len(line.sources))]
        outside = all(ref.kind == "outside" for ref in refs)
        if item.part is not None and line.stride:
            part = self._item(0, offset).read
            if part is None or not outside:
                raise RefusedError("a position that moves is read or written in a value that changes with it", item.node)
            return self._x(part, line.stride)
        return Ref("outside", self._windows[0][offset]) if outside else Ref("body", offset)

    def _ref_of(self, offset: int, k: int) -> Ref:
        """What the `k`-th tensor that a node takes is inside the body."""
        source = self._lines[offset].sources[k]
        if source.kind == "inside":
            return self._refs[source.offset]
        if source.kind == "carry":
            return self._carry(source, offset, k)
        first = self._item(0, offset).inputs[k]
        if source.kind == "read":
            part = read_part(first)
            assert part is not None
            return self._x(part, source.stride or 0)
        return Ref("outside", first)

    def _carry(self, source: Source, offset: int, k: int) -> Ref:
        for lag in range(1, source.lag + 1):
            key = (source.offset, lag)
            if key in self._initial:
                continue
            if lag == source.lag == 1:
                init = self._item(0, offset).inputs[k]
            else:
                init = self._steps.item(self._first - lag, source.offset).node
            value = self._typical[source.offset].node.meta["val"]
            if not isinstance(value, torch.Tensor):
                raise RefusedError("it carries something that is no tensor", self._typical[source.offset].node)
            self._initial[key] = Operand(base=init, shape=tuple(value.shape), dtype=value.dtype)
            if lag > 1:
                self._update[key] = Ref("carry", (source.offset, lag - 1))
        return Ref("carry", (source.offset, source.lag))

    def _x(self, part: Part, stride: int) -> Ref:
        return Ref("x", (part, stride))

    # the loop -----------------------------------------------------------------------------------------------------------------

    def loop(self) -> Loop:
        """The loop, with a body of what is needed."""
        outputs = _Outputs()
        finals = self._collect(outputs)
        buffers = tuple(buffer for chain in self._chains if (buffer := self._buffer(chain, outputs)) is not None)
        carries, needed = self._needed([*outputs.refs, *(Ref("carry", key) for key in finals)])
        if not carries:
            raise RefusedError("it carries nothing from step to step", self._typical[0].node)
        if len(needed) == 1 and not outputs.refs:
            raise RefusedError("a step is one operator, and the steps together are one sum or product", self._typical[0].node)
        body = Body(
            {key: self._initial[key] for key in carries}, self._places(needed), [self._update[key] for key in carries], outputs.refs
        )
        place, first = self._windows[1][0], self._windows[0][0]
        assert place is not None and first is not None
        return Loop(
            body=body.module,
            steps=len(self._windows),
            inits=tuple(self._initial[key] for key in carries),
            xs=tuple(operand_of(part, stride, len(self._windows)) for part, stride in body.xs),
            invariants=tuple(body.invariants),
            finals=tuple(finals.get(key) for key in carries),
            collected=tuple(outputs.nodes),
            buffers=buffers,
            nodes=tuple(node for window in self._windows for node in window if node is not None),
            place=place,
            first=first,
        )

    def _places(self, needed: set[int]) -> list[Place]:
        """The body's nodes, in order."""
        places = []
        for offset in sorted(needed):
            item, first = self._typical[offset], self._windows[0][offset]
            assert first is not None
            inputs = {node: self._ref_of(offset, k) for k, node in enumerate(item.inputs)}
            places.append(Place(Ref("body", offset), item.node, first, inputs))
        return places

    def _collect(self, outputs: _Outputs) -> dict[Any, Node]:
        """Collect what is taken outside; returns, by carry, the nodes whose value after the last step is taken by itself."""
        finals: dict[Any, Node] = {}
        for offset, ref in enumerate(self._refs):
            if ref.kind == "chain" or (ref.kind in ("outside", "x") and not self._reads_buffer(offset)):
                continue
            nodes = tuple(window[offset] for window in self._windows)
            taken = [node is not None and not self._nodes.issuperset(node.users) for node in nodes]
            last = nodes[-1]
            alone = [node is not None and self._is_taken_by_itself(node) for node in nodes]
            if last is not None and alone[-1] and not any(alone[:-1]) and (offset, 1) in self._initial and ref.kind == "body":
                finals[offset, 1] = last
                taken[-1] = any(user.target in JOINS for user in last.users)
            if any(taken):
                if not isinstance(self._typical[offset].node.meta["val"], torch.Tensor):
                    raise RefusedError("something that is no tensor is taken from it", self._typical[offset].node)
                outputs.add(ref, nodes)
        return finals

    def _is_taken_by_itself(self, node: Node) -> bool:
        """Whether something outside takes a value other than into a list of them."""
        return any(user not in self._nodes and user.target not in JOINS for user in node.users)

    def _reads_buffer(self, offset: int) -> bool:
        return any(s.kind in ("inside", "carry") and s.offset in self._in_chain for s in self._lines[offset].sources)

    def _buffer(self, chain: Chain, outputs: _Outputs) -> Buffer | None:
        end = self._windows[-1][chain.members[-1]]
        assert end is not None
        for window in self._windows:
            for member in chain.members:
                node = window[member]
                if node is not end and node is not None and not self._nodes.issuperset(node.users):
                    raise RefusedError("a buffer that is written part by part is looked at in between", node)
        if self._nodes.issuperset(end.users):
            return None
        self._refuse_overlap(chain)
        writes = tuple(self._write(member, outputs) for member in chain.members)
        return Buffer(node=end, entry=chain.entry, writes=writes)

    def _write(self, member: int, outputs: _Outputs) -> Write:
        part, stride = self._item(0, member).written, self._lines[member].stride
        assert part is not None and stride is not None
        if part.length is not None and part.length != abs(stride):
            raise RefusedError("it writes blocks with gaps between them", self._typical[member].node)
        collected = outputs.add(self._ref_of(member, 1))
        return Write(collected=collected, dim=part.dim, start=part.start, stride=stride, length=part.length)

    def _refuse_overlap(self, chain: Chain) -> None:
        taken = []
        dims = set()
        for member in chain.members:
            part, stride = self._item(0, member).written, self._lines[member].stride
            assert part is not None and stride is not None
            dims.add(part.dim)
            starts = [part.start + stride * step for step in range(len(self._windows))]
            taken += [(start, start + part.extent) for start in starts]
        taken.sort()
        if len(dims) > 1 or any(one[1] > other[0] for one, other in zip(taken, taken[1:], strict=False)):
            raise RefusedError("it writes to the same part of a buffer more than once", self._typical[chain.members[0]].node)

    def _needed(self, roots: Sequence[Ref]) -> tuple[list[Any], set[int]]:
        """The carries, and the offsets of the body's nodes, that the roots need."""
        frontier, carries, needed = list(roots), {}, set()
        while frontier:
            ref = frontier.pop()
            if ref.kind == "carry" and ref.key not in carries:
                carries[ref.key] = True
                frontier.append(self._update[ref.key])
            elif ref.kind == "body" and ref.key not in needed:
                needed.add(ref.key)
                frontier += [self._ref_of(ref.key, k) for k in range(len(self._lines[ref.key].sources))]
        return [key for key in self._initial if key in carries], needed


class _Outputs:
    """The values to be collected, each with its nodes by step."""

    def __init__(self) -> None:
        self.refs: list[Ref] = []
        self.nodes: list[tuple[Node | None, ...]] = []

    def add(self, ref: Ref, nodes: tuple[Node | None, ...] = ()) -> int:
        if not nodes and ref in self.refs:
            return self.refs.index(ref)
        self.refs.append(ref)
        self.nodes.append(nodes)
        return len(self.refs) - 1


def _holds(part: Part, start: int) -> bool:
    """Whether a part of this length, begun at `start`, lies in its source."""
    return part.size is not None and 0 <= start <= part.size - part.extent


def _apart(read: Part, written: Part, stride: int) -> bool:
    """Whether positions that move by the same stride never meet."""
    gap = (read.start - written.start) % stride
    return gap >= written.extent and stride - gap >= read.extent
