"""A linear recurrence computed chunk by chunk: within a chunk in parallel, between chunks by a decayed sum of states.

    o_i = q_i^T S_i,   S_i = exp(g_i) S_{i-1} + k_i v_i^T       however the chunks are cut, padded, looped over and put together

The region between the tensors over all positions and their result (`chunks`) is proposed to be this recurrence, and proved so by
evaluating both (`roles`). Equal to the original up to the order of additions. What is added to the result, multiplied with it or
done with the operands before they are cut stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.builder import Builder
from effcompile.errors import ExpressionError
from effcompile.ir import Computed, Match, Operand, Rejected, Result, Rule, Work
from effcompile.operands import Traced, as_operand, regrouped
from effcompile.ops.recurrence import OPTIONAL, RecurrenceSpec
from effcompile.ops.recurrence import Decay as Along
from effcompile.pattern import GraphView, describe
from effcompile.probe import Unsupported, shape, supports
from effcompile.ranges import Ranges
from effcompile.terms import FloorDiv, Term, integer_symbol
from effcompile.viewmaps import VIEWS, Index, shape_of

from .chunks import PADS, RESHAPES, Region, merges_at, region_of, signature
from .roles import Axis, Form, Prover, Role, Roles, Unproved
from .specify import B, Coordinates, D, H, I, J, Stop, candidates

aten = torch.ops.aten

C = integer_symbol("c")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.matmul.default)
_MOVING = frozenset({*VIEWS, *RESHAPES, *PADS, operator.getitem})
_MAXIMA = (aten.max.dim, aten.amax.default, aten.maximum.default, aten.max.other, aten.cummax.default)
_POSITIVE = (aten.sigmoid.default, aten.exp.default)


def recognise(anchor: Node, view: GraphView) -> Match | Rejected:
    """Match the recurrence whose chunks a node puts together, or say at which step and why it is none that we take."""
    found: Match | Rejected = Rejected(step="anchor", why="no chunks of positions are put together", node=anchor)
    try:
        regions = [region for merge in merges_at(anchor) if (region := region_of(merge)) is not None and _is_quadratic(region)]
    except Unsupported as error:  # of symbolic sizes
        return Rejected(step="anchor", why=str(error), node=anchor)
    for region in regions:
        try:
            return _Chunked(region, view).match()
        except Stop as stop:
            found = stop.rejected
        except (Unproved, Unsupported) as error:
            found = Rejected(step="proof", why=str(error), node=anchor)
        except ExpressionError as error:
            found = Rejected(step="expression", why=str(error), node=anchor)
    return found


def _is_quadratic(region: Region) -> bool:
    """Whether the positions of a chunk meet each other, and more than one tensor is cut."""
    timed = [leaf for leaf in region.leaves.values() if leaf.time is not None]
    return len(timed) >= 3 and any(_count(node, region.merge.length) >= 2 for node in region.inside)


def _count(node: Node, size: int) -> int:
    value = node.meta.get("val")
    return sum(n == size for n in value.shape) if isinstance(value, torch.Tensor) else 0


@dataclass(frozen=True)
class _Final:
    """A node that is the last state, its dimensions in the operation's index symbols."""

    node: Node
    layout: Index


class _Chunked:
    """One region, and the recurrence that it is.

    Raises:
        Stop, Unproved, Unsupported: it is none, or is not to be taken.
    """

    def __init__(self, region: Region, view: GraphView):
        self.region, self.view, self.merge = region, view, region.merge
        self.output = region.merge.node
        self.sizes = shape(self.output)
        self.length = self._length()
        self._check_modes()
        self._check_maxima()
        self.prover = Prover(region, view.order, self.length)
        self.roles = _roles(self.prover)
        self.lanes = [d for d in range(len(self.sizes)) if d not in (self.merge.dim, self.roles.column)]
        if len(self.lanes) > 2:
            raise Stop("operands", f"the result has {len(self.lanes)} dimensions beside positions and columns", self.output)
        self.symbols = dict(zip(self.lanes, (B, H), strict=False))
        extents = {str(s): sympy.Integer(self.sizes[d]) for d, s in self.symbols.items()}
        self.extents = {
            "b": sympy.S.One,
            "h": sympy.S.One,
            **extents,
            "i": sympy.Integer(self.length),
            "j": sympy.Integer(self.length),
        }

    def match(self) -> Match:
        """The match; zeros at the result's end have then been taken off and added behind it."""
        self._check()
        inputs = self._inputs()
        finals = self._finals()
        dead = self._check_dead([x.node for x in finals])
        output = self.output if self.length == self.merge.positions else self._unpadded()
        dead |= {self.output} - {output}
        by_key = "gate" in self.roles.parts and "n" in self.roles.parts["gate"].axes
        along: Along = "none" if "gate" not in inputs else "key" if by_key else "head"
        spec = RecurrenceSpec(
            operands=tuple(name for name in OPTIONAL if name in inputs), decay=along,
            out=str(output.meta["val"].dtype).removeprefix("torch."),
        )  # fmt: skip
        layout = tuple(
            I if d == self.merge.dim else D if d == self.roles.column else self.symbols[d] for d in range(len(self.sizes))
        )
        return Match(
            family="recurrence", anchor=self.merge.node, output=output, spec=spec, inputs=inputs,
            interior=frozenset(dead), layout=layout,
            further={x.node: Result(name="final", layout=x.layout) for x in finals},
            trains=any(self.view.needs_gradient(base, self.output) for x in inputs.values() for base in x.bases),
            leaving=_leaving(dead),
        )  # fmt: skip

    # ---------------------------------------------------------------- what may not be

    def _length(self) -> int:
        """How many positions there are before padding."""
        found = {shape(leaf.node)[leaf.time] for leaf in self.region.leaves.values() if leaf.time is not None}
        if len(found) != 1:
            raise Stop("operands", f"tensors of {' and '.join(map(str, sorted(found)))} positions are cut into chunks", self.output)
        return found.pop()

    def _check_modes(self) -> None:
        here = self.view.regions.get(self.output)
        other = next((n for n in self.region.inside if self.view.regions.get(n) != here and n.op == "call_function"), None)
        if other is not None:
            raise Stop("modes", "grad mode or autocast changes between the tensors that are cut and their result", other)

    def _check_maxima(self) -> None:
        found = next((node for node in self.region.inside if node.target in _MAXIMA), None)
        if found is not None:
            why = f"the exponents are shifted by {describe(found)}, and chunks with such shifts are not read as a recurrence"
            raise Stop("maximum", why, found)

    def _check(self) -> None:
        dtype = self.output.meta["val"].dtype
        if dtype not in _DTYPES:
            raise Stop("dtype", f"{dtype} has no kernel; float16, bfloat16 and float32 have", self.output)
        if self.view.strict and any(_is_narrow(node) for node in self.region.inside):
            raise Stop("numerics", "numerics=strict keeps the roundings within a chunk, which a recurrence omits", self.output)
        if self.roles.form == "factor":
            gate = self.prover.leaf(self.roles.parts["gate"])
            while gate.target in VIEWS:
                gate = gate.args[0]  # type: ignore[assignment]
            if gate.target not in _POSITIVE:
                raise Stop("decay", f"a decay is not known to be positive: {describe(gate)}", gate)

    def _check_dead(self, finals: list[Node]) -> set[Node]:
        """All that meets within the region must vanish, and no gradient be cut in it."""
        dead = self.view.dead_without(self.output, *finals)
        for node in self.region.inside:
            if node is not self.output and node not in dead and _count(node, self.merge.length) >= 1 and not self._is_cut(node):
                user = next((u for u in node.users if u not in dead), None)
                raise Stop("uses", f"a part of the recurrence is also used by {describe(user) if user else 'something else'}", node)
            if node.target is aten.detach.default and self.view.needs_gradient(node.args[0], self.output):  # type: ignore[arg-type]
                raise Stop("gradient", "the gradient is cut within the recurrence", node)
        return dead

    def _is_cut(self, node: Node) -> bool:
        """Whether a node only holds a leaf, or a constant."""
        while node not in self.region.leaves:
            sources = node.all_input_nodes
            if not sources:
                return True
            if len(sources) > 1 or node.target not in _MOVING:
                return False
            node = sources[0]
        return True

    # ---------------------------------------------------------------- operands

    def _inputs(self) -> dict[str, Operand | Computed]:
        parts = self.roles.parts
        inner = self._coordinates(self._depth())
        query, key = self._grouped(inner)
        value = self._traced("v", self._coordinates(self.sizes[self.roles.column]), J)[-1]
        inputs: dict[str, Operand | Computed] = {
            "v": self._view(regrouped(value, 1) if _shared(value) > 1 else value),
            "q": _changed(self._view(query), _scaling(self.roles.factor)),
            "k": self._view(key),
        }
        if "gate" in parts:
            gate = self._traced("gate", inner, J)[-1]
            gate = regrouped(gate, 1) if gate.has_heads and gate.group > 1 else gate
            inputs["gate"] = _changed(_lengthened(self._view(gate)), _LOGS[self.roles.form])
        elif self.roles.constant is not None:
            inputs["gate"] = self._constant_gate(self.roles.constant, query.node)
        return inputs

    def _constant_gate(self, logs: Any, beside: Node) -> Computed:
        """Log-decays [b, h, 1, 1, 1] that no tensor gives."""
        order = [self.lanes.index(d) for symbol in (B, H) for d, s in self.symbols.items() if s == symbol]
        values = logs.transpose(order).reshape([*(logs.shape[k] for k in order), *[1] * (5 - len(order))])
        if sum(n > 1 for n in values.shape) > 1:
            raise Stop("decay", "constant decays differ in both batch and heads", self.output)
        along = int(values.shape[1] > 1)

        def compute(builder: Builder, nodes: Any) -> Node:
            device = nodes[0].meta["val"].device
            parts = [
                builder.call(aten.full.default, [1] * 5, float(x), dtype=torch.float32, device=device) for x in values.flatten()
            ]
            return parts[0] if len(parts) == 1 else builder.call(aten.cat.default, parts, along)

        base = Operand(base=beside, shape=shape_of(beside), dtype=beside.meta["val"].dtype)
        return Computed(parts=(base,), compute=compute, shape=tuple(map(sympy.Integer, values.shape)), dtype=torch.float32)

    def _depth(self) -> int:
        part = self.roles.parts["k"]
        return next((n for n, axis in zip(shape(self.prover.leaf(part)), part.axes, strict=True) if axis == "n"), 1)

    def _coordinates(self, depth: int) -> Coordinates:
        ranges = Ranges({})
        extents = {**self.extents, "d": sympy.Integer(depth)}
        for symbol in (B, H, I, J, D):
            ranges.add(symbol, extents[str(symbol)])
        return Coordinates(ranges=ranges, index={}, extents=extents)

    def _traced(self, role: Role, at: Coordinates, position: sympy.Symbol) -> list[Traced]:
        part = self.roles.parts[role]
        index = tuple(self._term(axis, group, position) for axis, group in zip(part.axes, part.groups, strict=True))
        leaf = self.prover.leaf(part)
        found = candidates(leaf, index, at, self.view, self.output, (B, H, position, D))
        found = [x for x in found if x.factor == 1]
        if not found:
            raise Stop(
                "operands",
                f"{describe(self.prover.leaf(part))} cannot be read as a [batch, heads, length, depth] view",
                self.prover.leaf(part),
            )
        return found

    def _term(self, axis: Any, group: int, position: sympy.Symbol) -> Term:
        if axis == "one":
            return sympy.S.Zero
        if axis in ("t", "n"):
            return position if axis == "t" else D
        if axis == self.roles.column:
            return D
        symbol = self.symbols[axis]
        return FloorDiv(symbol, sympy.Integer(group)) if group > 1 else symbol

    def _grouped(self, at: Coordinates) -> tuple[Traced, Traced]:
        """Queries and keys, as far back as both have the same groups of heads."""
        queries, keys = self._traced("q", at, I), self._traced("k", at, J)
        for query in reversed(queries):
            for key in reversed(keys):
                if query.group == key.group and query.has_heads == key.has_heads:
                    return query, key
        return regrouped(queries[-1], 1), regrouped(keys[-1], 1)

    def _view(self, traced: Traced) -> Operand:
        return as_operand(traced, traced.node.meta["val"].dtype, int)

    # ---------------------------------------------------------------- the last state

    def _finals(self) -> list[_Final]:
        """What is the last state, of that which is computed within the region and used elsewhere."""
        around = self._around()
        found = []
        for node in around:
            if any(user not in around and user is not self.output for user in node.users) and not self._is_cut(node):
                layout = self._state_layout(node)
                if layout is not None:
                    found.append(_Final(node, layout))
        return found

    def _around(self) -> dict[Node, None]:
        """The region, and what is computed from it beside its result; in the graph's order."""
        known = dict.fromkeys(self.region.leaves)
        found: dict[Node, None] = {}
        for node in self.output.graph.nodes:
            inputs = node.all_input_nodes
            within = bool(inputs) and all(x in found or x in known for x in inputs) and any(x in found for x in inputs)
            if node is not self.output and (node in self.region.inside or (within and supports(node))):
                found[node] = None
        return found

    def _state_layout(self, node: Node) -> Index | None:
        """The dimensions of a node as those of the last state, if it is that."""
        sizes = shape(node)
        of = {
            **{symbol: self.sizes[dim] for dim, symbol in self.symbols.items()},
            C: self._depth(),
            D: self.sizes[self.roles.column],
        }
        if len(sizes) != len(of):
            return None
        for layout in permutations(of):
            if all(of[symbol] == n for symbol, n in zip(layout, sizes, strict=True)):
                axes: list[Axis] = ["n" if s == C else self.roles.column if s == D else self._lane(s) for s in layout]
                if self.prover.is_final(node, axes, self.roles):
                    return layout
        return None

    def _lane(self, symbol: Term) -> int:
        return next(dim for dim, s in self.symbols.items() if s == symbol)

    # ---------------------------------------------------------------- the padded end

    def _unpadded(self) -> Node:
        """The result without the zeros at its end, which are added again behind it."""
        merge = self.merge
        builder = Builder(self.output.graph, self.output.next)
        kept = builder.call(aten.slice.Tensor, self.output, merge.dim, 0, self.length)
        pads = [0] * (2 * (len(self.sizes) - merge.dim))
        pads[-1] = merge.positions - self.length
        padded = builder.call(aten.constant_pad_nd.default, kept, pads, 0.0)
        for node in (kept, padded):
            self.view.regions[node] = self.view.regions[self.output]
            node.meta.update({key: x for key, x in self.output.meta.items() if key != "val"})
        self.output.replace_all_uses_with(padded, delete_user_cb=lambda user: user is not kept)
        return kept


_proved: dict[Hashable, Roles | str] = {}
"""What regions are known to be, or why they are none, by their signatures."""
_MOST_KEPT = 64


def _roles(prover: Prover) -> Roles:
    """What a region is; of regions that are alike, as those of a model's layers, the first is proved.

    Raises:
        Unproved: nothing that is known.
    """
    key = signature(prover.region, prover.order)
    if key not in _proved:
        if len(_proved) >= _MOST_KEPT:
            _proved.clear()
        try:
            _proved[key] = prover.roles()
        except Unproved as error:
            _proved[key] = str(error)
    known = _proved[key]
    if isinstance(known, str):
        raise Unproved(known)
    return known


def _is_narrow(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _shared(traced: Traced) -> int:
    return traced.group if traced.has_heads else int(traced.roles.heads)


def _lengthened(operand: Operand) -> Operand:
    """With a dimension for the columns, along which it does not differ."""
    return replace(operand, views=(*operand.views, (aten.unsqueeze.default, (-1,))), shape=(*operand.shape, sympy.S.One))


Step = tuple[Any, tuple[Any, ...]]
_LOGS: dict[Form, tuple[Step, ...]] = {
    "log": (),
    "negative": ((aten.neg.default, ()),),
    "factor": ((aten.log.default, ()),),
    "exponential": ((aten.exp.default, ()), (aten.neg.default, ())),
}


def _scaling(factor: float) -> tuple[Step, ...]:
    return () if factor == 1 else ((aten.mul.Tensor, (factor,)),)


def _changed(operand: Operand, steps: tuple[Step, ...]) -> Operand | Computed:
    """An operand after further operations, each on its own."""
    if not steps:
        return operand
    dtype = torch.promote_types(operand.dtype, torch.float32)

    def compute(builder: Builder, nodes: Any) -> Node:
        node: Node = builder.call(aten._to_copy.default, nodes[0], dtype=dtype)
        for target, arguments in steps:
            node = builder.call(target, node, *arguments)
        return node

    return Computed(parts=(operand,), compute=compute, shape=operand.shape, dtype=dtype)


def _leaving(interior: Collection[Node]) -> Work:
    """What the nodes cost as they stand: products of matrices, and sums of element-wise products, whose every term is read once,
    from caches at about the rate of main memory. What else there is, is fused into those."""
    flops, elements, exponentials, launches = sympy.S.Zero, sympy.S.Zero, sympy.S.Zero, 0
    for node in interior:
        if node.target in _PRODUCTS:
            left = node.args[-2]
            assert isinstance(left, Node)
            flops += 2 * sympy.Mul(*shape_of(node)) * shape_of(left)[-1]
            elements += sympy.Mul(*shape_of(node))
        elif node.target is aten.sum.dim_IntList:
            assert isinstance(node.args[0], Node)
            elements += sympy.Mul(*shape_of(node.args[0]))
        elif node.target is aten.exp.default:
            exponentials += sympy.Mul(*shape_of(node))
            continue
        else:
            continue
        launches += 1
    return Work(flops=flops, bytes=4 * elements, transcendentals=exponentials, launches=max(1, launches))


CHUNKED = Rule(
    name="chunked",
    early=True,
    quiet=True,
    family="recurrence",
    summary="a linear recurrence computed chunk by chunk, proved by evaluating it",
    anchors=RESHAPES | {aten.cat.default},
    recognise=recognise,
)
