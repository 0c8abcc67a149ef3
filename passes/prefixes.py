"""Finds what is a first-order linear recurrence, however it is computed.

    h_t = c_t * h_{t-1} + o_t,  from h_{-1} = initial or 0;  or the same from the last step to the first

Where values are moved along a dimension (slices, concatenations, paddings, cumulative sums, functorch regions), everything that
they pass through by pointwise arithmetic and views is evaluated exactly (`exact`), from what enters at random. A result is such a
recurrence if operands solve for it (`first_order`). It does not matter how it is computed: a tree of any shape, doubling steps,
quotients by cumulative products, sums of exponentials.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from effcompile import _torch
from effcompile._regions import mode_regions
from effcompile.builder import is_pure

from .exact import LEAVE_LANE, Array, Evaluator, OutsideError, Sizes, Value, name_of
from .exact_moves import MOVES
from .exact_operations import CREATIONS, OPERATIONS, VIEWS
from .first_order import Forms, Operands, Solver, forms_of

AS_LOGARITHM = "it is a recurrence in log space whose result is used as a logarithm"
_MOST_OPERANDS = 4
_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """`node` computes a recurrence along its dimension `dim`.

    Attributes:
        dims: for each node of the operands, the dimension of `node` that each of its own is; None for one of length 1.
        interior: the nodes between what enters and the result, itself included.
    """

    node: Node
    dim: int
    operands: Operands
    dims: dict[Node, tuple[int | None, ...]]
    interior: frozenset[Node]


@dataclass(frozen=True)
class Component:
    """Connected nodes, in graph order, through which values pass that `entries` move along a dimension of `length`."""

    nodes: tuple[Node, ...]
    entries: tuple[Node, ...]
    length: int


@dataclass(frozen=True)
class Left:
    """A component in which nothing was found.

    Attributes:
        evaluated: the nodes that have a value, if some of them are of the component's length.
        agreeing: of how many steps the best attempt gave an account.
        why: what stands against a recurrence that was found all the same.
    """

    component: Component
    evaluated: tuple[Node, ...]
    agreeing: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the search found.

    Attributes:
        found: recurrences whose results are needed when all others are taken as given.
        left: components with none.
        blocks: the functorch regions.
    """

    found: tuple[Recurrence, ...]
    left: tuple[Left, ...]
    blocks: tuple[tuple[Node, ...], ...]


def survey(module: GraphModule, wanted: Callable[[Component], bool], accept: Callable[[Recurrence], bool]) -> Survey:
    """Search a graph.

    Args:
        wanted: which components to evaluate.
        accept: which recurrences to take; others stay as they are.
    """
    return _Search(module, wanted, accept).run()


class _Search:
    def __init__(self, module: GraphModule, wanted: Callable[[Component], bool], accept: Callable[[Recurrence], bool]):
        self.nodes = list(module.graph.nodes)
        self.order = {node: k for k, node in enumerate(self.nodes)}
        self.wanted, self.accept = wanted, accept
        self.blocks = functorch_blocks(self.nodes)
        self.regional = {node for block in self.blocks for node in block}
        self.hidden = {node for node in self.regional if name_of(node) != LEAVE_LANE}
        self.sizes = Sizes(self.nodes)
        self.constants = _constants(self.nodes)
        self.regions = mode_regions(module.graph)
        self.same = _repetitions(self.nodes, self.regions)
        self.movers = self._movers()
        self.found: dict[Node, Recurrence] = {}
        self.claimed: set[Node] = set()
        self.left: list[Left] = []
        self.failed: dict[Node, int] = {}

    def run(self) -> Survey:
        for length in self._lengths():
            given: set[Node] = set()  # moves that led nowhere: what if they were not followed?
            for attempt in range(_ROUNDS):
                components = [c for c in self._components(length, given) if self.wanted(c)]
                results = [self._recurrences(component) for component in components]
                if not results:
                    break
                given.update(entry for x in results if isinstance(x, Left) for entry in x.component.entries[:1])
                if attempt == 0:
                    self.left += [x for x in results if isinstance(x, Left)]
            for left in self.left:
                self.failed.update(dict.fromkeys(left.evaluated, left.component.length))
        needed = self._needed()
        return Survey(
            found=tuple(r for n, r in self.found.items() if n in needed),
            left=tuple(x for x in self.left if self.claimed.isdisjoint(x.component.nodes)),
            blocks=self.blocks,
        )

    # ------------------------------------------------------------ components

    def _lengths(self) -> list[int]:
        """Lengths along which something floating-point is moved, the longest first: a tree's levels are shorter than the whole.

        Of two that differ by one the shorter comes first: an initial state in front of the steps is not a step.
        """
        lengths = sorted(self.movers, reverse=True)
        for k in range(len(lengths) - 1):
            if lengths[k] == lengths[k + 1] + 1:
                lengths[k], lengths[k + 1] = lengths[k + 1], lengths[k]
        return lengths

    def _movers(self) -> dict[int, list[Node]]:
        """The nodes that move something floating-point along a dimension, by its length."""
        movers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for length in self._moved(node):
                movers.setdefault(length, []).append(node)
        return movers

    def _moved(self, node: Node) -> set[int]:
        """The lengths, from 2 on, of the dimensions along which a node moves operands."""
        lengths: set[int] = set()
        moves = MOVES.get(name_of(node))
        if moves is None or not _is_float(node) or node in self.constants:
            return lengths
        for source, dim in moves(node):
            shape = source.meta["val"].shape if _is_float(source) else ()
            if isinstance(dim, int) and -len(shape) <= dim < len(shape):
                with contextlib.suppress(OutsideError):
                    lengths.add(self.sizes(shape[dim]))
        return lengths - {0, 1}

    def _components(self, length: int, given: set[Node]) -> list[Component]:
        """Nodes that values moved along a dimension of this length reach, by connection; not the lower levels of what failed."""
        given = self.claimed | given | {node for node, whole in self.failed.items() if 2 * length - 1 <= whole}
        movers = [node for node in self.movers[length] if node not in given]
        reached = self._reached(movers, given)
        begin = set(movers)
        components = []
        while reached:
            some = _connected(next(iter(reached)), reached)
            reached -= some
            nodes = tuple(sorted(some, key=self.order.__getitem__))
            entries = (n for n in nodes if n in begin and some.isdisjoint(n.all_input_nodes))
            components.append(Component(nodes, tuple(entries), length))
        return components

    def _reached(self, movers: Sequence[Node], given: set[Node]) -> set[Node]:
        """What is computed from moved values by operations that are followed."""
        reached: set[Node] = set()
        frontier = list(movers)
        while frontier:
            node = frontier.pop()
            if node not in reached and node not in given and node not in self.constants and name_of(node) in OPERATIONS:
                reached.add(node)
                frontier += node.users
        return reached

    # ------------------------------------------------------------ recurrences

    def _recurrences(self, component: Component) -> Left | None:
        """Enter those in a component, each at the first node that holds it; or say how far it went, and what stopped it."""
        reader = _Reader(self._evaluated(component, self.sizes), component.length)
        held: set[Node] = set()
        why, found = "", False
        for node in component.nodes:
            if node in self.hidden:
                continue
            if _hands_on(node) and any(source in held for source in node.all_input_nodes):
                held.add(node)
                continue
            recurrence = reader.recurrence(node)
            if recurrence is None:
                continue
            held.add(node)
            if self.accept(recurrence):
                obstacle = self._obstacle(component, recurrence)
                why = why or obstacle
                if not obstacle:
                    found = True
                    self.found[node] = recurrence
                    self.claimed |= recurrence.interior
        if found:
            return None
        if not why and any(reader.is_logarithmic(node) for node in component.nodes):
            why = AS_LOGARITHM
        results = any(reader.is_candidate(node) for node in component.nodes)
        evaluated = tuple(node for node in component.nodes if results and reader.evaluator.value(node) is not None)
        return Left(component, evaluated, reader.agreeing, why)

    def _evaluated(self, component: Component, sizes: Sizes) -> Evaluator:
        inside = set(component.nodes)
        outside = {self.same.get(x, x) for node in inside for x in node.all_input_nodes} - inside
        operands = {node: self._operand(node) for node in outside if name_of(node) in ("exp", "log", "neg")}
        linked = {node: operand for node, operand in operands.items() if operand in outside}
        evaluator = Evaluator(OPERATIONS, inside, self.constants, self.hidden, sizes, self.same, linked)
        evaluator.run(component.nodes)
        return evaluator

    def _operand(self, node: Node) -> Node:
        operand = node.all_input_nodes[0]
        return self.same.get(operand, operand)

    def _obstacle(self, component: Component, recurrence: Recurrence) -> str:
        """Why a recurrence cannot be computed at the place of its result, or nothing."""
        if len({self.regions[node] for node in recurrence.interior}) != 1:
            return "grad mode or autocast is switched inside the recurrence"
        if self._is_written(recurrence):
            return "something that it reads may be written to before it ends"
        if not self._holds_for_all_lengths(component, recurrence):
            return "its length is symbolic, and what is computed is a recurrence for some lengths only"
        return ""

    def _is_written(self, recurrence: Recurrence) -> bool:
        keys = {_torch.storage_key(node.meta["val"]) for node in recurrence.dims} - {0}
        first = min(self.order[node] for node in recurrence.interior)
        for node in self.nodes[first : self.order[recurrence.node]]:
            if node in self.regional or not _may_write(node):
                continue
            values = [source.meta.get("val") for source in node.all_input_nodes]
            if any(isinstance(x, torch.Tensor) and _torch.storage_key(x) in keys for x in values):
                return True
        return False

    def _holds_for_all_lengths(self, component: Component, recurrence: Recurrence) -> bool:
        """Of a symbolic length: whether the same is found at other lengths."""
        size = recurrence.node.meta["val"].shape[recurrence.dim]
        if isinstance(size, int):
            return True
        for symbol, more in itertools.product(_torch.expression(size).free_symbols, (1, 2, 5)):
            sizes = self.sizes.with_length(symbol, self.sizes.lengths[symbol] + more)
            other = _Reader(self._evaluated(component, sizes), sizes(size)).recurrence(recurrence.node)
            if other is None or other.operands != recurrence.operands:
                return False
        return True

    def _needed(self) -> set[Node]:
        """The recurrences that are still needed when each is computed from what enters it."""
        frontier = [n for n in self.nodes if n not in self.regional and n.op != "placeholder" and not is_pure(n)]
        reached: set[Node] = set()
        while frontier:
            node = frontier.pop()
            if node not in reached:
                reached.add(node)
                frontier += self.found[node].dims if node in self.found else node.all_input_nodes
        return reached & self.found.keys()


class _Reader:
    """Reads recurrences of one length off evaluated nodes."""

    def __init__(self, evaluator: Evaluator, length: int):
        self.evaluator, self.length = evaluator, length
        self._solvers: dict[frozenset[Node], tuple[Solver, Solver] | None] = {}
        self._forms: dict[Node, Forms | None] = {}

    @property
    def agreeing(self) -> int:
        """The most steps that an unsolved result has in common with a recurrence."""
        return max((s.agreeing for pair in self._solvers.values() if pair for s in pair), default=0)

    def recurrence(self, node: Node) -> Recurrence | None:
        """What recurrence a node's values are, along the one dimension that values are moved along."""
        value = self.evaluator.value(node)
        if value is None or value.plain is None or not self.is_candidate(node):
            return None
        operands = self._solved(value, value.plain)
        return None if operands is None else self._placed(node, value.lengths.index(self.length), operands)

    def is_logarithmic(self, node: Node) -> bool:
        """Whether a node's values are the logarithms of a recurrence."""
        value = self.evaluator.value(node)
        if value is None or value.plain is not None or value.image is None or not self.is_candidate(node):
            return False
        operands = self._solved(value, value.image)
        return operands is not None and None not in (operands.coefficient, operands.offset)

    def is_candidate(self, node: Node) -> bool:
        """Whether a node has values along one dimension, of the length that is read."""
        value = self.evaluator.value(node)
        if value is None or value.hidden is not None or not _is_float(node) or (value.plain is None and value.image is None):
            return False
        return [n for n in value.lengths if n != 1] == [self.length]

    def _solved(self, value: Value, plane: Array) -> Operands | None:
        solvers = self._solvers_for(value.support)
        if solvers is None:
            return None
        states = plane.reshape(plane.shape[0], -1)
        return solvers[0].solve(states) or solvers[1].solve(states[:, ::-1])

    def _solvers_for(self, support: frozenset[Node]) -> tuple[Solver, Solver] | None:
        if support not in self._solvers:
            few = 0 < len(support) <= _MOST_OPERANDS
            nodes = sorted(support, key=lambda node: node.name)
            self._solvers[support] = (self._solver(nodes, False), self._solver(nodes, True)) if few else None
        return self._solvers[support]

    def _solver(self, nodes: Sequence[Node], reverse: bool) -> Solver:
        series = {node: self._forms_of(node) for node in nodes}
        return Solver({node: forms.turned() if reverse else forms for node, forms in series.items() if forms}, reverse)

    def _forms_of(self, node: Node) -> Forms | None:
        if node not in self._forms:
            value = self.evaluator.value(node)
            self._forms[node] = None if value is None else forms_of(value, self.length)
        return self._forms[node]

    def _placed(self, node: Node, dim: int, operands: Operands) -> Recurrence | None:
        """With the place of each operand's dimensions, if lanes meet themselves alone."""
        evaluator = self.evaluator
        value = evaluator.value(node)
        interior = self._interior(node)
        if value is None or not all(v is None or evaluator.is_laned(v) for v in map(evaluator.value, interior)):
            return None
        places = {evaluator.lane_of(label): k for k, label in enumerate(value.labels) if label > 0}
        dims: dict[Node, tuple[int | None, ...]] = {}
        for factor in operands.factors:
            operand = evaluator.value(factor.node)
            assert operand is not None
            lanes = [evaluator.lane_of(label) if label > 0 else 0 for label in operand.labels]
            if any(lane and lane not in places for lane in lanes):
                return None
            lengths = operand.lengths
            dims[factor.node] = tuple(
                places[lane] if lane else dim if n != 1 else None for lane, n in zip(lanes, lengths, strict=True)
            )
        return Recurrence(node=node, dim=dim, operands=operands, dims=dims, interior=frozenset(interior))

    def _interior(self, node: Node) -> set[Node]:
        """The nodes that a value passes through from what enters."""
        found: set[Node] = set()
        frontier = [node]
        while frontier:
            current = frontier.pop()
            if current in self.evaluator.inside and current not in found:
                found.add(current)
                frontier += current.all_input_nodes
        return found


_COPIES = ("to", "_to_copy", "clone", "contiguous", "alias", "type_as", "lift_fresh")


def _hands_on(node: Node) -> bool:
    """Whether a node holds what its operand holds."""
    name = name_of(node)
    if name in VIEWS or name in _COPIES:
        return True
    return name == "slice" and node.meta["val"].shape == node.args[0].meta["val"].shape  # type: ignore[union-attr]


def _connected(start: Node, nodes: set[Node]) -> set[Node]:
    """The nodes that are connected with one through others of them."""
    found: set[Node] = set()
    frontier = [start]
    while frontier:
        node = frontier.pop()
        if node in nodes and node not in found:
            found.add(node)
            frontier += node.users
            frontier += node.all_input_nodes
    return found


def _is_float(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _may_write(node: Node) -> bool:
    if isinstance(node.target, _torch.OpOverload):
        return bool(node.target._schema.is_mutable)
    return node.op != "placeholder" and not is_pure(node)


def functorch_blocks(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], ...]:
    """The outermost functorch regions, each with the loading of its decompositions."""
    blocks: list[tuple[Node, ...]] = []
    begun: list[Node] = []
    depth = 0
    for node in nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        depth += name == "_vmap_increment_nesting"
        if depth or name == "lazy_load_decompositions":
            begun.append(node)
        if name == "_vmap_decrement_nesting":
            depth -= 1
            if not depth:
                blocks.append(tuple(begun))
                begun = []
    return tuple(blocks)


def _constants(nodes: Sequence[Node]) -> set[Node]:
    """Nodes computed from nothing but numbers and sizes."""
    constants: set[Node] = set()
    for node in nodes:
        name = name_of(node)
        tensors = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]
        follows = name in OPERATIONS and bool(tensors) and all(source in constants for source in tensors)
        if name in CREATIONS or follows:
            constants.add(node)
    return constants


def _repetitions(nodes: Sequence[Node], regions: Mapping[Node, int]) -> dict[Node, Node]:
    """The nodes that compute once more, in the same mode, what an earlier one computes; each with the first."""
    first: dict[Hashable, Node] = {}
    same: dict[Node, Node] = {}
    for node in nodes:
        if isinstance(node.target, _torch.OpOverload) and is_pure(node):
            key = (node.target, _key(node.args, same), _key(node.kwargs, same), regions[node])
            if first.setdefault(key, node) is not node:
                same[node] = first[key]
    return same


def _key(argument: object, same: Mapping[Node, Node]) -> Hashable:
    """Equal for equal arguments; 1, 1.0 and True are not."""
    if isinstance(argument, Node):
        return same.get(argument, argument)
    if isinstance(argument, (tuple, list)):
        return tuple(_key(part, same) for part in argument)
    if isinstance(argument, Mapping):
        return tuple((name, _key(part, same)) for name, part in argument.items())
    return type(argument), str(argument)
