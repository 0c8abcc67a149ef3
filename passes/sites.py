"""Where a recurrence stands: the dimensions of its states, and how tensors of the graph become operands of the operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.ir import Computed, Operand
from effcompile.operands import Roles, Traced, as_operand, regrouped, trace
from effcompile.pattern import GraphView, describe
from effcompile.ranges import Ranges, recombine
from effcompile.terms import Term, integer_symbol
from effcompile.viewmaps import Index, shape_of

from .attention import batch_index
from .factors import Factor
from .reads import Reads, is_zero, reads_of
from .specify import Stop, symbol_node

aten = torch.ops.aten

B, H, I, C, D = (integer_symbol(name) for name in ("b", "h", "i", "c", "d"))
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Site:
    """One linear_scan, its dimensions named: time is `i`, those of the state x0, x1, ..."""

    def __init__(self, anchor: Node, view: GraphView):
        self.anchor, self.view = anchor, view
        self.coefficient, self.offset, self.initial = (*anchor.args, None)[:3]
        self.shape = shape_of(anchor)
        self.symbols: Index = (I, *(integer_symbol(f"x{k}") for k in range(len(self.shape) - 1)))
        self.ranges = Ranges({})
        for symbol, size in zip(self.symbols, self.shape, strict=True):
            self.ranges.add(symbol, size)
        self.reads: Reads = reads_of(anchor, self.initial, self.symbols, self.ranges)
        self.index: Index = tuple(s if n != 1 or s == I else sympy.S.Zero for s, n in zip(self.symbols, self.shape, strict=True))
        if anchor.meta["val"].dtype not in _DTYPES:
            raise Stop("dtype", f"a state of {anchor.meta['val'].dtype} has no kernel", anchor)

    def size(self, symbol: Any) -> Term:
        bounds = self.ranges.get(symbol)
        return sympy.S.One if bounds is None else bounds[1] + 1

    def initial_factor(self) -> Factor | None:
        """The state before the first step, at the states' own index; None for zeros."""
        if is_zero(self.initial):
            return None
        assert isinstance(self.initial, Node)
        rank = len(shape_of(self.initial))
        return Factor(self.initial, self.symbols[len(self.symbols) - rank :])


# -------------------------------------------------------------------- coordinates


class Axes:
    """The operation's index symbols b, h, i, c, d for the dimensions of a state."""

    def __init__(self, site: Site, batch: Sequence[Any], row: Any, column: Any):
        self.site = site
        self.ranges = Ranges({})
        sizes = [site.size(x) for x in batch]
        index = batch_index([str(x) for x in batch], sizes, site.anchor, None, self.ranges)
        extents = index.pop("extents")
        self.extents = {B: extents["b"], H: extents["h"], I: site.shape[0], C: site.size(row), D: site.size(column)}
        self.terms = {x: index[str(x)] for x in batch}
        self.terms |= {x: sympy.S.Zero for x in site.symbols[1:] if site.size(x) == 1}
        for symbol, own in ((I, I), (C, row), (D, column)):
            self.ranges.add(symbol, self.extents[symbol])
            if own is not None:
                self.terms[own] = symbol if self.extents[symbol] != 1 or symbol == I else sympy.S.Zero

    def at(self, index: Index) -> Index:
        return tuple(recombine(term.xreplace(self.terms)) for term in index)

    def roles(self, *symbols: Any) -> Roles:
        return Roles(symbols=symbols, extents=tuple(self.extents[s] for s in symbols))

    def traced(self, factor: Factor, roles: Roles, what: str) -> list[Traced]:
        """The tensors that can be passed for a factor."""
        view, here = self.site.view, self.site.view.regions.get(self.site.anchor)
        found = trace(
            factor.node, self.at(factor.index), self.ranges, roles,
            lambda n: view.regions.get(n) != here, lambda size: symbol_node(view, str(size)) is not None,
        )  # fmt: skip
        if not found:
            raise Stop(
                "operands", f"the {what} {describe(factor.node)} cannot be read as a view [batch, heads, time, ...]", factor.node
            )
        return found

    def concrete(self, size: Term) -> Any:
        if size.is_Integer:
            return int(size)
        node = symbol_node(self.site.view, str(size))
        if node is None:
            raise Stop("sizes", f"the size {size} is not known as a value of the graph", self.site.anchor)
        return node

    def operand(
        self, factors: Sequence[Factor], roles: Roles, what: str, scale: Term = sympy.S.One, *,
        full: Sequence[Any] = (), grouped: bool = False, dtype: torch.dtype | None = None,
    ) -> Operand | Computed:  # fmt: skip
        """A product of factors as one operand, of full extent along the symbols `full`."""
        parts = []
        for factor in factors:
            traced = self.traced(factor, roles, what)[-1]
            scale = scale * traced.factor
            parts.append(traced)
        group = min((x.group for x in parts if x.has_heads), default=1) if grouped else 1
        parts = [regrouped(x, group) if x.has_heads and x.group != group else x for x in parts]
        operands = tuple(self._as_operand(x) for x in parts)
        wide = self._widened(operands, roles, full)
        dtype = dtype or _promoted(operands, self.site)
        if len(operands) == 1 and scale == 1 and not wide:
            return replace(operands[0], dtype=dtype)
        return self._computed(operands, scale, wide, dtype, roles)

    def _as_operand(self, traced: Traced) -> Operand:
        """The views, with dimensions of size 1 where the tensor has none."""
        present = {axis.role for axis in traced.axes}
        extents = tuple(sympy.S.One if k not in present else n for k, n in enumerate(traced.roles.extents))
        return as_operand(
            replace(traced, roles=replace(traced.roles, extents=extents)), traced.node.meta["val"].dtype, self.concrete
        )

    def _widened(self, operands: Sequence[Operand], roles: Roles, full: Sequence[Any]) -> dict[int, Term]:
        """The positions that no operand covers and that must be, with their extents."""
        return {
            k: self.extents[s]
            for k, s in enumerate(roles.symbols)
            if s in full and self.extents[s] != 1 and all(x.shape[k] == 1 for x in operands)
        }

    def _computed(
        self, operands: tuple[Operand, ...], scale: Term, wide: dict[int, Term], dtype: torch.dtype, roles: Roles
    ) -> Computed:
        lengths = [self.concrete(wide[k]) if k in wide else -1 for k in range(len(roles.symbols))]
        like = self.site.anchor

        def compute(builder: Any, nodes: Sequence[Node]) -> Node:
            if not nodes:
                shape = [1] * len(roles.symbols)
                result = builder.call(aten.full.default, shape, float(scale), dtype=dtype, device=like.meta["val"].device)
            else:
                result = nodes[0]
                for node in nodes[1:]:
                    result = builder.call(aten.mul.Tensor, result, node)
                if scale != 1:
                    result = builder.call(aten.mul.Tensor, result, float(scale))
            return builder.call(aten.expand.default, result, lengths) if wide else result

        shape = []
        for k in range(len(roles.symbols)):
            sizes = [x.shape[k] for x in operands if x.shape[k] != 1]
            shape.append(wide.get(k, sizes[0] if sizes else sympy.S.One))
        return Computed(parts=operands, compute=compute, shape=tuple(shape), dtype=dtype)


def _promoted(operands: Sequence[Operand], site: Site) -> torch.dtype:
    result = operands[0].dtype if operands else site.anchor.meta["val"].dtype
    for x in operands:
        result = torch.promote_types(result, x.dtype)
    return result if result.is_floating_point else site.anchor.meta["val"].dtype
