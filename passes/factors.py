"""A node as a product of others, as far as that takes its dimensions apart.

dt[b, t, d] * B[b, t, n] * x[b, t, d]   seen at [b, t, d, n]   is   {dt, x}(b, t, d) and {B}(b, t, n)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.contraction import Contraction, contraction_of
from effcompile.pattern import CASTS
from effcompile.ranges import Ranges
from effcompile.terms import Term, number
from effcompile.viewmaps import VIEWS, Index, broadcast, shape_of, view_source

aten = torch.ops.aten

Mixed = Callable[["Factor"], bool]
_ONE = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
_ZERO = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_FULL = (aten.full.default, aten.full_like.default, aten.new_full.default)
_SUMS = (aten.sum.dim_IntList,)
_LETTERS = "abcdefghijklmnop"


@dataclass(frozen=True)
class Factor:
    """`node[index]`."""

    node: Node
    index: Index

    @property
    def symbols(self) -> frozenset[Any]:
        """The index symbols that it depends on."""
        return frozenset().union(*(term.free_symbols for term in self.index))


def aligned(node: Node, symbols: Index) -> Factor:
    """A node whose dimensions are the last of `symbols`, as in broadcasting: of size 1, it is read at 0."""
    shape = shape_of(node)
    own = symbols[len(symbols) - len(shape) :]
    return Factor(node, tuple(s if n != 1 else sympy.S.Zero for s, n in zip(own, shape, strict=True)))


@dataclass(frozen=True)
class Product:
    """`scale * factors[0] * factors[1] * ...`"""

    scale: Term
    factors: tuple[Factor, ...]


def product(factor: Factor, ranges: Ranges, is_mixed: Mixed) -> Product:
    """A factor as a product, taken apart as long as `is_mixed` says of a part that it should be."""
    scale: Term = sympy.S.One
    found: list[Factor] = []
    stack = [factor]
    while stack:
        part = stack.pop()
        value = constant(part.node)
        if value is not None:
            scale = scale * value
            continue
        step = inputs_of(part, ranges) if is_mixed(part) else None
        if step is None:
            found.append(part)
        else:
            scale = scale * step.scale
            stack += reversed(step.factors)
    return Product(scale, tuple(found))


def inputs_of(factor: Factor, ranges: Ranges) -> Product | None:
    """One step back from a factor: through a view, a cast, a product; None if it is neither."""
    node, index = factor.node, factor.index
    viewed = view_source(node, index, ranges)
    if viewed is not None:
        return Product(sympy.S.One, (Factor(*viewed),))
    if node.op != "call_function":
        return None
    if node.target in CASTS:
        return _cast(node, index)
    if node.target is aten.neg.default:
        return Product(sympy.S.NegativeOne, (Factor(node.args[0], index),))  # type: ignore[arg-type]
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return _multiplied(node, index)
    if node.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(node.args[1], (int, float)) and not node.kwargs:
        return Product(1 / number(node.args[1]), (Factor(node.args[0], index),))  # type: ignore[arg-type]
    outer = contraction_of(node)
    if outer is not None and len(node.args) == 2 and outer.size(outer.summed) == 1:
        indices = [outer.operand_index(which, index, sympy.S.Zero) for which in (0, 1)]
        return Product(sympy.S.One, tuple(Factor(x, i) for x, i in zip(outer.operands, indices, strict=True)))
    if node.target is aten.einsum.default:
        return _outer_einsum(node, index)
    return None


def _cast(node: Node, index: Index) -> Product | None:
    source = node.args[0]
    assert isinstance(source, Node)
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    exact = before.is_floating_point and torch.promote_types(before, after) is after
    return Product(sympy.S.One, (Factor(source, index),)) if exact else None


def _multiplied(node: Node, index: Index) -> Product:
    scale: Term = sympy.S.One
    found = []
    for argument in node.args[:2]:
        if isinstance(argument, Node) and isinstance(argument.meta.get("val"), torch.Tensor):
            found.append(Factor(argument, broadcast(index, shape_of(argument))))
        else:
            scale = scale * number(argument)  # type: ignore[arg-type]
    return Product(scale, tuple(found))


def _outer_einsum(node: Node, index: Index) -> Product | None:
    """`einsum("bhk,bhv->bhkv", k, v)` sums over nothing."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "->" not in equation or "." in equation:
        return None
    inputs, out = equation.split("->")
    letters = inputs.split(",")
    if set("".join(letters)) != set(out) or any(len(set(x)) != len(x) for x in (*letters, out)):
        return None
    at = dict(zip(out, index, strict=True))
    return Product(
        sympy.S.One,
        tuple(Factor(x, broadcast(tuple(at[c] for c in own), shape_of(x))) for x, own in zip(operands, letters, strict=True)),  # type: ignore[arg-type]
    )  # fmt: skip


def constant(node: Node) -> Term | None:
    """The one number that a node is full of."""
    while node.op == "call_function":
        if node.target in _ONE:
            return sympy.S.One
        if node.target in _ZERO:
            return sympy.S.Zero
        if node.target in _FULL and isinstance(node.args[1], (int, float)):
            return number(node.args[1])
        if node.target not in CASTS and node.target not in VIEWS:
            return None
        node = node.args[0]  # type: ignore[assignment]
    return None


def contraction(node: Node) -> Contraction | None:
    """`node` as a contraction of two tensors: a product of matrices, or the sum of a product over one dimension."""
    if node.op != "call_function":
        return None
    if node.target in _SUMS:
        return _summed_product(node)
    return contraction_of(node) if len(node.args) == 2 else None


def contractions_with(operand: Node) -> list[Node]:
    """The contractions that take a node: products of matrices, and sums of element-wise products with it."""
    found = []
    for user in operand.users:
        found += [x for x in (sums_of(user) if user.target is aten.mul.Tensor else [user]) if contraction(x) is not None]
    return found


def is_contracted(node: Node) -> bool:
    """Whether a contraction reads a node, through views and casts or directly."""
    frontier, seen = [node], {node}
    while frontier:
        current = frontier.pop()
        if contractions_with(current):
            return True
        passed = [user for user in current.users if (user.target in VIEWS or user.target in CASTS) and user not in seen]
        seen.update(passed)
        frontier += passed
    return False


def sums_of(product: Node) -> list[Node]:
    """What uses a product, directly or through casts."""
    found: list[Node] = []
    for user in product.users:
        found += sums_of(user) if user.target in CASTS else [user]
    return found


def _summed_product(node: Node) -> Contraction | None:
    source = node.args[0]
    while isinstance(source, Node) and source.target in CASTS:
        source = source.args[0]
    if not isinstance(source, Node) or source.target is not aten.mul.Tensor or not all(isinstance(a, Node) for a in source.args):
        return None
    rank, dims = len(shape_of(source)), node.args[1]
    if dims is None or len(dims) != 1:  # type: ignore[arg-type]
        return None
    letters = _LETTERS[:rank]
    summed = letters[dims[0] % rank]  # type: ignore[index, operator]
    keep = len(node.args) > 2 and node.args[2]
    operands: tuple[Any, Any] = source.args  # type: ignore[assignment]
    own = [letters[rank - len(shape_of(x)) :] for x in operands]
    out = letters.replace(summed, "z" if keep else "")
    return Contraction(node=node, operands=operands, letters=(own[0], own[1]), out=out, summed=summed)
