"""Operands of a recurrence from what was found of them: tensors, and terms over (batch, head, position, depth).

    k * exp(i_t)        log(1 - 2**(-5 - h))        -exp(A[h]) * dt[b, t, h]

Loads from tensors become views of them, index symbols become `arange`s, the rest is computed with ATen operations, for one position
at a time: it is small beside the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.builder import Builder
from effcompile.evaluate import Evaluator
from effcompile.expr import Interpreter
from effcompile.ir import Computed, Operand
from effcompile.operands import Traced, as_operand, regrouped
from effcompile.pattern import GraphView, describe
from effcompile.terms import Load, Term
from effcompile.viewmaps import shape_of

from .specify import B, Coordinates, D, H, Stop, candidates, symbol_node

aten = torch.ops.aten

_RANK = 4


class Composer:
    """Makes operands of one recurrence.

    `interpreter` is what read the terms; `beside` a tensor among the operands.
    """

    def __init__(self, view: GraphView, anchor: Node, at: Coordinates, interpreter: Interpreter, beside: Node):
        self.view, self.anchor, self.at, self.interpreter, self.beside = view, anchor, at, interpreter, beside

    def tensor(self, traced: Traced) -> Operand:
        """An operand that is a view of a tensor, in the tensor's dtype."""
        return as_operand(traced, traced.node.meta["val"].dtype, self.concrete)

    def concrete(self, size: Term) -> Any:
        """A size as an argument of a node."""
        if size.is_Integer:
            return int(size)
        node = symbol_node(self.view, str(size))
        if node is None:
            raise Stop("sizes", f"the size {size} is not known as a value of the graph", self.anchor)
        return node

    def term(self, term: Term, position: sympy.Symbol, *, last: int = 0) -> Operand | Computed:
        """A term as a tensor [b, h, position, d], of size 1 where it does not differ, with `last` more dimensions of size 1."""
        roles = (B, H, position, D)
        loads = sorted(term.atoms(Load), key=str)
        parts = [self.tensor(self._traced(load, roles)) for load in loads]
        views = ((aten.unsqueeze.default, (-1,)),) * last
        if len(parts) == 1 and term == loads[0]:
            return Operand(
                base=parts[0].base, views=(*parts[0].views, *views), shape=parts[0].shape + (1,) * last, dtype=parts[0].dtype
            )
        compute = self._evaluation(term, loads, roles, last)
        return Computed(
            parts=tuple(parts) or (self._any(),), compute=compute, shape=self._extents(term, parts, roles), dtype=torch.float32
        )

    def product(self, traced: Traced, factors: Sequence[tuple[Term, bool]], position: sympy.Symbol) -> Operand | Computed:
        """A tensor times terms; those marked are exponents."""
        factors = [(term, is_exponent) for term, is_exponent in factors if term != (0 if is_exponent else 1)]
        if not factors:
            return self.tensor(traced)
        factor = sympy.Mul(*(sympy.exp(term) if is_exponent else term for term, is_exponent in factors))
        if factor.is_number:
            return _scaled(self.tensor(traced), float(factor))
        return _multiplied(self.tensor(traced), self.term(factor, position))

    def _any(self) -> Operand:
        """An operand that says on which device to compute."""
        return Operand(base=self.beside, shape=shape_of(self.beside), dtype=self.beside.meta["val"].dtype)

    def _traced(self, load: Load, roles: tuple[Term, ...]) -> Traced:
        node = self.interpreter.loaded[load.tensor]
        at = Coordinates(
            ranges=self.at.ranges, index=self.at.index, extents={**self.at.extents, str(roles[2]): self.at.extents["i"]}
        )
        found = [x for x in candidates(node, load.indices, at, self.view, self.anchor, roles) if x.factor == 1]
        if not found:
            raise Stop("operands", f"{describe(node)} cannot be read as a [batch, heads, length, depth] view", node)
        return regrouped(found[0], 1) if found[0].has_heads and found[0].group > 1 else found[0]

    def _extents(self, term: Term, parts: Sequence[Operand], roles: tuple[Term, ...]) -> tuple[Term, ...]:
        sizes = []
        for dim, symbol in enumerate(roles):
            own = [part.shape[dim] for part in parts if part.shape[dim] != 1]
            sizes.append(own[0] if own else self.at.extents[str(symbol)] if symbol in term.free_symbols else sympy.S.One)
        return tuple(sizes)

    def _evaluation(
        self, term: Term, loads: list[Load], roles: tuple[Term, ...], last: int
    ) -> Callable[[Builder, Sequence[Node]], Node]:
        names = {load: sympy.Symbol(f"load{k}", real=True) for k, load in enumerate(loads)}
        inner = term.xreplace(names)
        extents = {str(s): self.concrete(self.at.extents[str(s)]) for s in roles if s in inner.free_symbols}
        dims = {str(symbol): dim for dim, symbol in enumerate(roles)}

        def compute(builder: Builder, nodes: Sequence[Node]) -> Node:
            device = nodes[0].meta["val"].device
            symbols: dict[str, Any] = {name: _positions(builder, extents[name], dims[name], device) for name in extents}
            for name, node in zip(names.values(), nodes, strict=False):
                symbols[name.name] = builder.call(aten._to_copy.default, node, dtype=torch.float32)
            evaluator = Evaluator(
                symbols, {}, dtype=torch.float32, device=device, call=builder.call, is_tensor=lambda x: isinstance(x, Node)
            )
            result: Node = evaluator.tensor(inner, torch.float32)
            if result.meta["val"].dim() < _RANK:
                result = builder.call(aten.view.default, result, [1] * _RANK)
            for _ in range(last):
                result = builder.call(aten.unsqueeze.default, result, -1)
            return result

        return compute


def _positions(builder: Builder, size: Any, dim: int, device: torch.device) -> Node:
    """0, 1, 2, ... along one of four dimensions."""
    node = builder.call(aten.arange.default, size, device=device)
    return builder.call(aten.view.default, node, [-1 if d == dim else 1 for d in range(_RANK)])


def _scaled(operand: Operand, factor: float) -> Computed:
    def compute(builder: Builder, nodes: Sequence[Node]) -> Node:
        return builder.call(aten.mul.Tensor, nodes[0], factor)

    return Computed(parts=(operand,), compute=compute, shape=operand.shape, dtype=operand.dtype)


def _multiplied(operand: Operand, factor: Operand | Computed) -> Computed:
    inner = factor.parts if isinstance(factor, Computed) else (factor,)
    shape = tuple(m if n == 1 else n for n, m in zip(operand.shape, factor.shape, strict=True))

    def compute(builder: Builder, nodes: Sequence[Node]) -> Node:
        other = factor.compute(builder, nodes[1:]) if isinstance(factor, Computed) else nodes[1]
        return builder.call(aten.mul.Tensor, nodes[0], other)

    dtype = torch.promote_types(operand.dtype, torch.float32)
    return Computed(parts=(operand, *inner), compute=compute, shape=shape, dtype=dtype)
