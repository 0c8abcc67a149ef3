"""Contractions in one form: two operands, their indices as letters, and the summed letter.

matmul(A, B)[..., m, n] = sum_r A[..., m, r] B[..., r, n]        einsum("bhid,bhjd->bhij", Q, K)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from .terms import Term
from .viewmaps import Index, broadcast, shape_of

aten = torch.ops.aten

_ROLES = {
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.addmm.default: (1, 2),
}
BIASED = (aten.baddbmm.default, aten.addmm.default)
"""Contractions that add their first argument to the result, with factors `beta` and `alpha`."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Dot(sympy.Function):
    """`Dot(node, *index)`: one element of a contraction's result."""

    is_real = True

    @property
    def node_name(self) -> str:
        return str(self.args[0])

    @property
    def index(self) -> tuple[Term, ...]:
        return self.args[1:]


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """`output[out] = sum_summed left[left_letters] * right[right_letters]`, operands broadcast over missing or size-1 letters."""

    node: Node
    operands: tuple[Node, Node]
    letters: tuple[str, str]
    out: str
    summed: str

    def operand_index(self, which: int, index: Index, summed: Term) -> Index:
        """The index into an operand for an index of the output and of the sum."""
        at = {**dict(zip(self.out, index, strict=True)), self.summed: summed}
        return broadcast(tuple(at[letter] for letter in self.letters[which]), shape_of(self.operands[which]))

    def size(self, letter: str) -> Term:
        """The extent of a letter: the largest of its operands'."""
        sizes = [
            shape_of(operand)[letters.index(letter)]
            for operand, letters in zip(self.operands, self.letters, strict=True)
            if letter in letters
        ]
        return next((n for n in sizes if n != 1), sympy.S.One)

    def own(self, which: int) -> list[str]:
        """The output's letters that only one operand has (rows of the left, columns of the right), size-1 ones included."""
        other = self.letters[1 - which]
        return [letter for letter in self.letters[which] if letter in self.out and letter not in other]


def contraction_of(node: Node) -> Contraction | None:
    """`node` as a contraction of two operands over one dimension; None if it is none."""
    if node.op != "call_function":
        return None
    if node.target in _ROLES:
        return _product(node)
    if node.target is aten.einsum.default:
        return _einsum(node)
    return None


def _product(node: Node) -> Contraction | None:
    left, right = (node.args[k] for k in _ROLES[node.target])
    rank_left, rank_right = (len(shape_of(x)) for x in (left, right))
    if rank_left < 2 or rank_right < 2:
        return None
    rank = max(rank_left, rank_right)
    batch, (m, n, r) = _LETTERS[: rank - 2], "xyz"
    return Contraction(
        node=node,
        operands=(left, right),
        letters=(batch[rank - rank_left :] + m + r, batch[rank - rank_right :] + r + n),
        out=batch + m + n,
        summed=r,
    )


def _einsum(node: Node) -> Contraction | None:
    equation, operands = node.args[0], node.args[1]
    if len(operands) != 2 or "->" not in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    if "..." in equation:
        expanded = _spell_out(left, right, out, operands)
        if expanded is None:
            return None
        left, right, out = expanded
    summed = (set(left) | set(right)) - set(out)
    if len(summed) != 1 or any(len(set(x)) != len(x) for x in (left, right, out)):
        return None
    letter = summed.pop()
    if letter not in left or letter not in right:
        return None
    return Contraction(node=node, operands=tuple(operands), letters=(left, right), out=out, summed=letter)


def _spell_out(left: str, right: str, out: str, operands: Any) -> tuple[str, str, str] | None:
    """Letters for the dimensions that an ellipsis stands for."""
    free = [c for c in "ABCDEFGHIJ" if c not in left + right + out]
    counts = [len(shape_of(x)) - len(s.replace("...", "")) for x, s in zip(operands, (left, right), strict=True)]
    rank = max(n for n, s in zip(counts, (left, right), strict=True) if "..." in s)
    if rank > len(free):
        return None
    spelled = [s.replace("...", "".join(free[rank - n : rank])) for s, n in zip((left, right), counts, strict=True)]
    return spelled[0], spelled[1], out.replace("...", "".join(free[:rank]))
