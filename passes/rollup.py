"""A proven loop and the scan that takes its place, in a form that torch can run.

Torch's scan wants of a body that its results share no memory with each other or with its inputs, and that states keep their shape,
dtype and strides. `can_run` says of which loops it has no gradient.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from effcompile._torch import storage_key
from effcompile.bodies import scan_value
from effcompile.builder import Builder, erase_with_inputs, escapes, is_pure
from effcompile.errors import VerifyError
from effcompile.ir import Operand
from effcompile.pattern import source_line
from effcompile.rolled import JOINS, SCAN
from effcompile.unrolled import Buffer, Loop
from effcompile.viewmaps import is_float, size_term

aten = torch.ops.aten

_GRADIENTS_PAST_CONSTANTS = (2, 13)  # from this torch on, scan computes gradients where some of its inputs require none


@dataclass(frozen=True, kw_only=True)
class Rolled:
    """A loop that is now a scan: its node, how many nodes it stands for, the line it comes from."""

    scan: Node
    steps: int
    replaced: int
    where: str


def can_run(loop: Loop, trains: bool, requiring: Collection[Node] = ()) -> str | None:
    """Why torch's scan cannot run a loop, or None if it can. Tried on torch 2.11 and 2.13.

    `trains` says whether a gradient will be asked for; `requiring` are the graph's nodes that require one. Scan computes gradients
    only of a body all of whose results have one.
    """
    if not trains:
        return None
    outputs, reached = gradients(loop, requiring)
    if not all(output.requires_grad for output in outputs):
        return "torch's scan has no gradient where a state, or a value collected from each step, has none"
    if torch_version() < _GRADIENTS_PAST_CONSTANTS and any(is_float(place) and reached[place] is None for place in reached):
        return "the scan of this torch has no gradient where none reaches a floating-point input of the step"
    return None


def gradients(loop: Loop, requiring: Collection[Node]) -> tuple[list[torch.Tensor], dict[Node, torch.Tensor | None]]:
    """The body's results, and the gradients that reach its inputs, as fake tensors.

    All floating-point states require a gradient; of the other floating-point inputs, all where torch needs it, else those that do.
    """
    places = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    sources = [*(x.base for x in loop.xs), *([None] * (not loop.xs)), *loop.invariants]
    everywhere = torch_version() < _GRADIENTS_PAST_CONSTANTS
    with Builder(loop.body.graph, places[0]).fake_mode(), torch.enable_grad():
        values = []
        for k, place in enumerate(places):
            value, state = place.meta["val"], k < len(loop.inits)
            if isinstance(value, torch.Tensor):
                needs = state or everywhere or sources[k - len(loop.inits)] in requiring
                value = torch.empty_like(value).requires_grad_(needs and value.is_floating_point())
            values.append(value)
        outputs = list(loop.body(*values))
        given = {place: value for place, value in zip(places, values, strict=True) if getattr(value, "requires_grad", False)}
        ends = [output for output in outputs if output.requires_grad]
        ones = [torch.ones_like(output, requires_grad=False) for output in ends]
        found = torch.autograd.grad(ends, list(given.values()), ones, allow_unused=True) if ends and given else ()
    return outputs, dict(zip(given, found, strict=False))


class Replacement:
    """One loop, and the nodes that take its place. `trains` is None if the scan will not be run, and torch's needs do not count."""

    def __init__(self, module: GraphModule, loop: Loop, trains: bool | None, requiring: set[Node], renamed: dict[Node, Node]):
        self._module, self._loop, self._requiring, self._renamed = module, loop, requiring, renamed
        self._runs, self._trains = trains is not None, bool(trains)
        self._builder = Builder(module.graph, loop.place)
        self._nodes = frozenset(loop.nodes)
        self._given: dict[Node, Node] = {}
        self._lists: dict[Node, Node] = {}

    def carry_out(self) -> Rolled:
        """Put a scan in the place of the loop. Whatever is raised, the graph is as it was."""
        if self._trains:
            self._make_gradients_contiguous()
        if self._runs:
            _make_two_results(self._loop.body)
        name = _body_name(self._module)
        setattr(self._module, name, self._loop.body)
        try:
            scan, carries, collected = self._scan(name)
            for node, value in zip(self._loop.finals, carries, strict=True):
                if node is not None:
                    value = _with_contiguous_gradient(self._builder, value) if self._trains else value
                    self._given[node] = self._standing_for(value, node)
            for buffer in self._loop.buffers:
                self._given[buffer.node] = self._standing_for(self._written(buffer, collected), buffer.node)
            self._gather_lists(collected)
            self._gather_elements(collected)
        except Exception:
            self._builder.undo()
            delattr(self._module, name)
            raise
        if self._trains:
            self._propagate()
        erased = self._swap()
        return Rolled(scan=scan, steps=self._loop.steps, replaced=erased, where=source_line(self._loop.first))

    def _make_gradients_contiguous(self) -> None:
        """Scan's backward carries gradients, whose strides may not change from step to step: where they would, they are copied."""
        states = [node for node in self._loop.body.graph.nodes if node.op == "placeholder"][: len(self._loop.inits)]
        _, reached = gradients(self._loop, self._requiring)
        for state in states:
            gradient = reached.get(state)
            if gradient is not None and not gradient.is_contiguous():
                builder = Builder(self._loop.body.graph, state.next)
                users = list(state.users)
                copy = _with_contiguous_gradient(builder, state)
                for user in users:
                    user.replace_input_with(state, copy)
        self._loop.body.recompile()

    # the scan -----------------------------------------------------------------------------------------------------------

    def _scan(self, name: str) -> tuple[Node, list[Node], list[Node]]:
        """The scan's node, its last carries, and what it collects."""
        loop, builder = self._loop, self._builder
        xs = [self._operand(x) for x in loop.xs] or [
            builder.call(aten.zeros.default, [loop.steps], dtype=torch.float32, device="cpu")
        ]
        memories: set[int] = set()
        invariants = [self._apart(self._now(node), memories, contiguous=self._trains) for node in loop.invariants]
        inits = [self._apart(self._operand(init), memories, contiguous=True) for init in loop.inits]
        if self._trains and torch_version() < _GRADIENTS_PAST_CONSTANTS:
            self._propagate()
            tracked = [node for node in (*inits, *xs, *invariants) if self._is_tracked(node)]
            inits, xs, invariants = ([self._made_tracked(node, tracked) for node in nodes] for nodes in (inits, xs, invariants))
        outputs = loop.body.graph.find_nodes(op="output")[0].args[0]
        values = [output.meta["val"] for output in outputs]  # type: ignore[union-attr]
        with builder.graph.inserting_before(builder.before):
            body = builder.graph.get_attr(name)
            scan = builder.graph.call_function(SCAN, (body, inits, xs, invariants))
        builder.added += [body, scan]
        scan.meta.update({key: value for key, value in loop.first.meta.items() if key in _ORIGIN})
        scan.meta["rolled"] = True  # it was no scan as it came
        with builder.fake_mode(), torch.no_grad():
            scan.meta["val"] = scan_value(values, len(inits), loop.steps)
        parts = [builder.call(operator.getitem, scan, index) for index in range(len(values))]
        return scan, parts[: len(inits)], parts[len(inits) :]

    def _apart(self, node: Node, memories: set[int], contiguous: bool = False) -> Node:
        """A state or invariant as it is, or a copy if another one lives in the same memory, which torch refuses."""
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            return node
        if storage_key(value) in memories or (contiguous and not value.is_contiguous()):
            node = self._builder.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        memories.add(storage_key(node.meta["val"]))
        return node

    def _now(self, node: Node) -> Node:
        """What stands for a node after other loops have been replaced."""
        while node in self._renamed:
            node = self._renamed[node]
        return node

    def _operand(self, operand: Operand) -> Node:
        node = self._now(operand.base)
        for target, arguments in operand.views:
            node = self._builder.call(target, node, *arguments)
        return node

    def _propagate(self) -> None:
        """What was added requires a gradient if an input of it does."""
        for node in self._builder.added:
            if not self._requiring.isdisjoint(node.all_input_nodes):
                self._requiring.add(node)

    def _is_tracked(self, node: Node) -> bool:
        return node in self._requiring and is_float(node)

    def _made_tracked(self, node: Node, tracked: Sequence[Node]) -> Node:
        """A value that requires a gradient, if it can have one: joined with nothing of an input that does, which changes no number.

        Before torch 2.13, scan's gradient stopped at the first step where the first state required none, and where an x required
        none it failed.
        """
        if not tracked or self._is_tracked(node) or not is_float(node):
            return node
        call = self._builder.call
        nothing = call(aten.slice.Tensor, call(aten.reshape.default, tracked[0], [-1]), 0, 0, 0)
        if nothing.meta["val"].dtype != node.meta["val"].dtype:
            nothing = call(aten.to.dtype, nothing, node.meta["val"].dtype)
        joined = call(aten.cat.default, [call(aten.reshape.default, node, [-1]), nothing])
        return call(aten.view.default, joined, _sizes(self._builder, node))

    # what its results stand for -----------------------------------------------------------------------------------------

    def _written(self, buffer: Buffer, collected: Sequence[Node]) -> Node:
        """The buffer after the last step."""
        call, steps = self._builder.call, self._loop.steps
        value, size = self._now(buffer.entry), buffer.entry.meta["val"].shape
        for write in buffer.writes:
            parts = collected[write.collected]
            if write.stride < 0:
                parts = call(aten.flip.default, parts, [0])
            parts = self._along(parts, write.dim, joined=write.length is not None)
            span = abs(write.stride) * (steps - 1)
            low = write.start if write.stride > 0 else write.start - span
            high = low + span + (write.length or 1)
            step = 1 if write.length is not None else abs(write.stride)
            whole = isinstance(size[write.dim], int) and (low, high, step) == (0, size[write.dim], 1)
            value = parts if whole else call(aten.slice_scatter.default, value, parts, write.dim, low, high, step)
        return value

    def _along(self, parts: Node, dim: int, joined: bool) -> Node:
        """Values stacked along the first dimension, stacked along `dim` instead, or concatenated along it."""
        order = list(range(1, parts.meta["val"].dim()))
        order.insert(dim, 0)
        if order != sorted(order):
            parts = self._builder.call(aten.permute.default, parts, order)
        return self._builder.call(aten.flatten.using_ints, parts, dim, dim + 1) if joined else parts

    def _gather_lists(self, collected: Sequence[Node]) -> None:
        """Stacks and concatenations of collected values are made from whole stretches of them."""
        places = {
            node: (index, step)
            for index, nodes in enumerate(self._loop.collected)
            for step, node in enumerate(nodes)
            if node is not None
        }
        users = dict.fromkeys(user for node in places for user in node.users if user.target in JOINS and user not in self._nodes)
        for user in users:
            self._builder.before = user
            pieces = [self._piece(user, run, collected) for run in _runs(user.args[0], places)]  # type: ignore[arg-type]
            dim = _dim_of(user)
            result = pieces[0] if len(pieces) == 1 else self._builder.call(aten.cat.default, pieces, dim)
            self._lists[user] = self._standing_for(result, user)
        self._builder.before = self._loop.place

    def _piece(self, user: Node, run: _Stretch, collected: Sequence[Node]) -> Node:
        call, stacked, dim = self._builder.call, user.target is aten.stack.default, _dim_of(user)
        if run.count == 1:
            return call(aten.unsqueeze.default, run.node, dim) if stacked else run.node
        parts = collected[run.index]
        low = run.start if run.stride > 0 else run.start - run.count + 1
        if run.count != self._loop.steps:
            parts = call(aten.slice.Tensor, parts, 0, low, low + run.count)
        if run.stride < 0:
            parts = call(aten.flip.default, parts, [0])
        return self._along(parts, dim, joined=not stacked)

    def _gather_elements(self, collected: Sequence[Node]) -> None:
        """What else takes a collected value takes an element of them all."""
        for index, nodes in enumerate(self._loop.collected):
            for step, node in enumerate(nodes):
                if node is None or node in self._given:
                    continue
                if any(user not in self._nodes and user not in self._lists for user in node.users):
                    element = self._builder.call(aten.select.int, collected[index], 0, step)
                    self._given[node] = self._standing_for(element, node)

    def _standing_for(self, value: Node, original: Node) -> Node:
        """`value` with the original's strides, and memory of its own where the original's may reach the caller."""
        ours, theirs = value.meta["val"], original.meta["val"]
        if [str(n) for n in ours.shape] != [str(n) for n in theirs.shape] or ours.dtype != theirs.dtype:
            raise VerifyError(
                f"Expected {tuple(theirs.shape)} {theirs.dtype} for {original} but got {tuple(ours.shape)} {ours.dtype}"
            )
        if not _same_strides(ours, theirs):
            return _with_strides(self._builder, value, theirs)
        if escapes(original) and (
            value.target is aten.select.int or value in self._given.values() or value in self._lists.values()
        ):
            return self._builder.call(aten.clone.default, value)
        return value

    # taking over --------------------------------------------------------------------------------------------------------

    def _swap(self) -> int:
        """Let the new nodes take over, and erase the old ones; returns how many. Nothing can fail here."""
        for old, new in self._lists.items():
            old.replace_all_uses_with(new)
            old.graph.erase_node(old)
        for old, new in self._given.items():
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self._nodes)
        self._renamed.update(self._lists)
        self._renamed.update(self._given)
        erased = 0
        for node in reversed(self._loop.nodes):
            if node.users:
                continue
            inputs = [source for source in node.all_input_nodes if source not in self._nodes]
            node.graph.erase_node(node)
            erased += 1
            for source in inputs:
                if not source.users and is_pure(source):
                    erase_with_inputs(source)
        for node in reversed(self._builder.added):
            if not node.users and node.target is operator.getitem:
                node.graph.erase_node(node)
        return erased


def _make_two_results(body: GraphModule) -> None:
    """Inductor fails on a scan with one result (torch 2.11 and 2.13): its only state's first element is collected beside it."""
    output = body.graph.find_nodes(op="output")[0]
    results = list(output.args[0])  # type: ignore[arg-type]
    if len(results) > 1:
        return
    builder = Builder(body.graph, output)
    output.meta["val"] = results[0].meta["val"]
    first = builder.call(aten.select.int, builder.call(aten.view.default, results[0], [-1]), 0, 0)
    output.args = ([*results, builder.call(aten.clone.default, first)],)
    body.recompile()


def _with_contiguous_gradient(builder: Builder, value: Node) -> Node:
    """The same value, whose gradient is copied to be contiguous."""
    flat = builder.call(aten.view.default, value, [-1])
    return builder.call(aten.view.default, flat, _sizes(builder, value))


def _sizes(builder: Builder, node: Node) -> list[Any]:
    shape = node.meta["val"].shape
    return [n if isinstance(n, int) else builder.call(aten.sym_size.int, node, k) for k, n in enumerate(shape)]


_ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack")


@dataclass
class _Stretch:
    """Entries of a list: one node, or `count` collected values from step `start` on, forwards or backwards."""

    node: Node
    index: int = -1
    start: int = 0
    count: int = 1
    stride: int = 0


def _runs(entries: Sequence[Node], places: dict[Node, tuple[int, int]]) -> list[_Stretch]:
    """A list cut into the longest stretches of values collected in successive steps."""
    runs: list[_Stretch] = []
    for entry in entries:
        index, step = places.get(entry, (-1, 0))
        last = runs[-1] if runs else None
        if last is not None and index >= 0 and index == last.index:
            stride = step - (last.start + last.stride * (last.count - 1))
            if abs(stride) == 1 and last.stride in (0, stride):
                last.stride, last.count = stride, last.count + 1
                continue
        runs.append(_Stretch(entry, index, step))
    return runs


def _dim_of(join: Node) -> int:
    """The dimension of a stack or concatenation, counted from the front."""
    dim = join.args[1] if len(join.args) > 1 else join.kwargs.get("dim", 0)
    return int(dim) % join.meta["val"].dim()  # type: ignore[arg-type]


def _same_strides(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two values lie alike in memory; strides of dimensions of size 1 do not count."""
    strides = zip(theirs.shape, ours.stride(), theirs.stride(), strict=True)
    return all((isinstance(n, int) and n == 1) or size_term(s) == size_term(t) for n, s, t in strides)


def _with_strides(builder: Builder, value: Node, wanted: torch.Tensor) -> Node:
    """A copy in the memory order of `wanted`, contiguous if that has no dense one."""
    order = list(range(wanted.dim()))
    if not wanted.is_contiguous() and all(isinstance(s, int) for s in wanted.stride()):
        order.sort(key=lambda k: -wanted.stride()[k])
    if order == sorted(order):
        return builder.call(aten.clone.default, value, memory_format=torch.contiguous_format)
    copy = builder.call(aten.permute.default, value, order)
    copy = builder.call(aten.clone.default, copy, memory_format=torch.contiguous_format)
    return builder.call(aten.permute.default, copy, [order.index(k) for k in range(len(order))])


def _body_name(module: GraphModule) -> str:
    """A name for one more body in a module."""
    return next(name for name in map("scan_step_{}".format, itertools.count()) if not hasattr(module, name))


def torch_version() -> tuple[int, int]:
    """Major and minor version of torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)
