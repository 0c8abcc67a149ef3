"""What a recogniser may ask of a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ._regions import mode_regions, modes, requires_grad
from .builder import is_pure
from .contraction import contraction_of
from .expr import Interpreter
from .ranges import Ranges
from .trace import lift
from .viewmaps import VIEWS, is_float

aten = torch.ops.aten

CASTS = frozenset({
    aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
    aten._autocast_to_reduced_precision.default, aten._autocast_to_full_precision.default,
})  # fmt: skip


class GraphView:
    """A lifted graph with the facts that recognisers ask for, each computed once.

    Attributes:
        strict: whether the original's rounding points must be kept (the option `numerics="strict"`).
        mutating: nodes that may write to memory, which no operation may be moved across.
    """

    def __init__(self, module: GraphModule, *, strict: bool = False, mutating: frozenset[Node] = frozenset()):
        self.module = module
        self.strict = strict
        self.mutating = mutating

    @property
    def graph(self) -> Graph:
        return self.module.graph

    @cached_property
    def regions(self) -> dict[Node, int]:
        """Nodes between the same grad-mode and autocast borders, with no write between them, have the same number."""
        return mode_regions(self.module.graph, self.mutating)

    @cached_property
    def _requires_grad(self) -> set[Node]:
        return requires_grad(self.module)

    @cached_property
    def _tracking(self) -> set[Node]:
        return {node for node, state in modes(self.module.graph) if state.tracks_gradients}

    def needs_gradient(self, captured: Node, anchor: Node) -> bool:
        """Whether autograd would send a gradient from an operation at `anchor` to `captured`."""
        return anchor in self._tracking and captured in self._requires_grad

    @cached_property
    def order(self) -> dict[Node, int]:
        """Position of each node."""
        return {node: k for k, node in enumerate(self.module.graph.nodes)}

    def interpreter(self, ranges: Ranges, anchor: Node, *, opaque: Iterable[Node] = ()) -> Interpreter:
        """An interpreter that loads what lies beyond the anchor's mode region, if a gradient flows through it."""
        stops = frozenset(opaque)
        here = self.regions.get(anchor)

        def is_opaque(node: Node) -> bool:
            return node in stops or (self.regions.get(node) != here and is_float(node))

        return Interpreter(ranges, is_opaque)

    def body(self, attribute: Node) -> Graph:
        """The graph of a function that a higher-order operation holds as an attribute, lifted.

        Raises:
            LiftError: it cannot be lifted.
        """
        module = self.module.get_submodule(str(attribute.target))
        assert isinstance(module, GraphModule)
        return lift(module).graph_module.graph

    def dead_without(self, *outputs: Node) -> set[Node]:
        """The nodes that only `outputs` need, themselves and those that nothing needs included."""
        dead = set(outputs)
        for node in reversed(self.graph.nodes):
            if node.op != "placeholder" and is_pure(node) and all(user in dead for user in node.users):
                dead.add(node)
        return dead


def contractions_after(node: Node, through: Callable[[Node], bool] | None = None) -> Iterator[tuple[Node, Node]]:
    """Contractions that `node` reaches through views, casts and dropout: `(contraction, the operand that came from node)`.

    `through` names further operations to follow. What else uses the node is not followed; a contraction that nothing uses is none.
    """
    seen: set[Node] = set()
    frontier = [node]
    while frontier:
        current = frontier.pop()
        for user in current.users:
            if contraction_of(user) is not None:
                if user.users:
                    yield user, current
            elif user not in seen and (is_passage(user) or (through is not None and through(user))):
                seen.add(user)
                frontier.append(user)


def is_passage(node: Node) -> bool:
    """Whether a node only moves, casts or drops out its first input."""
    return node.target in VIEWS or node.target in CASTS or node.target is aten.dropout.default


def describe(node: Node) -> str:
    """A node for a sentence: its operation, and the user's line if known."""
    line = source_line(node).rpartition("/")[2]
    name = getattr(node.target, "__name__", str(node.target)) if node.op == "call_function" else node.op
    return str(name).split(".")[0] + (f" at {line}" if line else "")


def source_line(node: Node) -> str:
    """`file:line` of the user's code that a node comes from, or its module path, or nothing."""
    trace = node.meta.get("stack_trace")
    if trace:
        lines = [line.strip() for line in str(trace).splitlines() if line.strip().startswith("File ")]
        lines = [line for line in lines if "/site-packages/torch/" not in line] or lines
        if lines:
            parts = lines[-1].split('"')
            number = lines[-1].split("line ")[-1].split(",")[0]
            return f"{parts[1]}:{number}"
    return module_path(node)


def module_path(node: Node) -> str:
    """The path of the innermost module that a node comes from, as the model's `named_modules` has it."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    path = re.sub(r"(?:\._modules)?\['([^']+)'\]", r".\1", re.sub(r"^[LG]\['[^']*'\]", "", str(path)))
    return path.strip(".")
