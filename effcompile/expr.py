"""Index expressions: what one element of a node is, as a term over its index.

    element(node, (b, h, i, j))  ->  sympy term over b, h, i, j, sizes, `Load`s of captured tensors and `Dot`s of contractions

The interpreter walks from the element asked for towards the inputs. Pointwise operations become sympy, views change the index,
index arithmetic (arange, cat, cumsum of a constant, gathers) is evaluated, and whatever is none of these is loaded. So spelling
vanishes: an expanded, transposed, concatenated or gathered mask reads the same as the condition that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Node

from . import elementwise
from .contraction import Contraction, Dot, contraction_of
from .elementwise import as_number
from .faithful import is_exact, rounded, simple_number, stands_for
from .ranges import Ranges
from .rules import RULES
from .terms import BoolLoad, IntLoad, IsTrue, Load, Term, Where, is_condition, number, truth
from .viewmaps import Index, broadcast, is_float, shape_of, size_term, view_source

aten = torch.ops.aten

_MAX_DEPTH = 400
_LONGEST_NUMBER = 64  # operations of a number that are computed again for each pair of query and key, rather than loaded


class Interpreter:
    """Evaluates elements of the nodes of one graph.

    Args:
        ranges: bounds of the index symbols in use.
        is_opaque: nodes to load rather than look through (e.g. those beyond a grad-mode border).
    """

    def __init__(self, ranges: Ranges, is_opaque: Callable[[Node], bool] = lambda node: False):
        self.ranges = ranges
        self.is_opaque = is_opaque
        self.loaded: dict[str, Node] = {}
        self._memo: dict[tuple[Node, Index, bool], Term] = {}
        self._depth = self._branches = 0

    @property
    def nesting(self) -> int:
        """How many elements are being read, each for the one before."""
        return self._depth

    def element(self, node: Node, index: Index) -> Term:
        """The element of `node` at `index`, one term for each dimension."""
        key = (node, index, self._branches > 0)
        found = self._memo.get(key)
        if found is None:
            self._depth += 1
            try:
                found = self._memo[key] = self._evaluate(node, index)
            finally:
                self._depth -= 1
        return found

    def branch(self, node: Node, index: Index) -> Term:
        """The element of `node` in one branch of a `Where`; outside of `node`, where the other is taken, any element."""
        self._branches += 1
        try:
            return self.element(node, index)
        finally:
            self._branches -= 1

    def load(self, node: Node, index: Index) -> Term:
        """The element as a load of `node`'s materialised tensor."""
        value = node.meta["val"]
        self.loaded[node.name] = node
        index = tuple(self._within(i, n) if n != 1 else sympy.S.Zero for i, n in zip(index, shape_of(node), strict=True))
        name = sympy.Symbol(node.name)
        if value.dtype is torch.bool:
            return IsTrue(BoolLoad(name, *index))
        return (Load if value.dtype.is_floating_point else IntLoad)(name, *index)

    def _within(self, index: Term, size: Term) -> Term:
        if not self._branches or self.ranges.is_below(index, size):
            return index
        below = index if self.ranges.is_nonnegative(size - 1 - index) else sympy.Min(index, size - 1)
        return below if self.ranges.is_nonnegative(index) else sympy.Max(below, 0)

    def contraction(self, dot: Dot) -> Contraction:
        """The contraction that a `Dot` is an element of."""
        found = contraction_of(self.loaded[dot.node_name])
        assert found is not None
        return found

    def is_sought(self, term: Term) -> bool:
        """Whether a term is, or is made of, what stops the interpreter: scores, or a node that is opaque to it."""
        return bool(term.has(Dot)) or any(self.is_opaque(self.loaded[load.tensor]) for load in term.atoms(Load))

    # ---------------------------------------------------------------- one node

    def _evaluate(self, node: Node, index: Index) -> Term:
        if self.is_opaque(node) or self._depth > _MAX_DEPTH or node.op != "call_function":
            return self._constant(node, index)
        viewed = view_source(node, index, self.ranges)
        if viewed is not None:
            return self.element(*viewed)
        handler = RULES.get(node.target)
        result = None
        if handler is not None:
            result = handler(self, node, index)
        elif node.target in elementwise.ARITHMETIC or node.target in elementwise.CONDITIONS or node.target in elementwise.RELATIONS:
            result = self._pointwise(node, index)
        elif contraction_of(node) is not None:
            self.loaded[node.name] = node
            result = Dot(sympy.Symbol(node.name), *index)
        if result is None or not stands_for(result, node.meta["val"].dtype, self.ranges):
            return self.load(node, index)
        if not is_condition(result) and is_longer(result, _LONGEST_NUMBER) and not self.is_sought(result):
            return self.load(node, index)
        return result

    def _constant(self, node: Node, index: Index) -> Term:
        value = constant_value(node)
        return self.load(node, index) if value is None else truth(value) if isinstance(value, bool) else number(value)

    def argument(self, value: Any, index: Index) -> Term:
        """An operand at an index of the broadcast result: a tensor's element, a number, a SymInt."""
        if isinstance(value, Node):
            if not isinstance(value.meta.get("val"), torch.Tensor):
                return size_term(value.meta["val"])
            return self.element(value, broadcast(index, shape_of(value)))
        return truth(value) if isinstance(value, bool) else number(value)

    def _pointwise(self, node: Node, index: Index) -> Term | None:
        arguments = [self.argument(a, index) if a is not None else None for a in node.args]
        keywords = {k: self.argument(a, index) for k, a in node.kwargs.items() if k in ("alpha", "min", "max")}
        keywords = {{"min": "low", "max": "high"}.get(k, k): v for k, v in keywords.items()}
        if node.target in elementwise.BITWISE and node.meta["val"].dtype is not torch.bool:
            return None
        if node.target in elementwise.DISCONTINUOUS and not all(is_exact(a) for a in arguments if a is not None):
            return None
        if node.target in elementwise.RELATIONS:
            arguments = [rounded(a, node.args[0].meta["val"].dtype) for a in arguments]
        return self.apply(lambda *a: self._operate(node.target, a, keywords), arguments, is_float(node))

    def _operate(self, target: Any, arguments: tuple[Any, ...], keywords: dict[str, Term]) -> Term:
        if sympy.nan in arguments and target not in elementwise.CONDITIONS:
            return sympy.nan if target not in elementwise.RELATIONS else truth(elementwise.RELATIONS[target] is sympy.Ne)
        if target in elementwise.RELATIONS:
            return elementwise.compare(self.ranges, elementwise.RELATIONS[target], *arguments)
        if target in elementwise.CONDITIONS:
            return elementwise.CONDITIONS[target](*arguments)
        return elementwise.ARITHMETIC[target](*(a if a is None else as_number(a) for a in arguments), **keywords)

    def apply(self, operation: Callable[..., Term], arguments: list[Any], floating: bool = False) -> Term:
        """`f(Where(c, a, b), y) -> Where(c, f(a, y), f(b, y))`: for integers, conditions, constants, infinities."""
        arguments = [as_number(a) if floating and is_condition(a) else a for a in arguments]
        for k, a in enumerate(arguments):
            if not isinstance(a, Where):
                continue
            others = [x for n, x in enumerate(arguments) if n != k and x is not None]
            constant = all(x.is_number for x in (*others, *a.args[1:]))
            if floating and not constant and not a.has(sympy.oo, -sympy.oo):
                continue
            condition, then, otherwise = a.args
            return self.ranges.where(
                condition,
                self.apply(operation, [*arguments[:k], then, *arguments[k + 1 :]], floating),
                self.apply(operation, [*arguments[:k], otherwise, *arguments[k + 1 :]], floating),
            )
        return simple_number(operation(*arguments))


def is_longer(term: Term, most: int) -> bool:
    """Whether a term has more than `most` subterms."""
    left, stack = most, [term]
    while stack:
        left -= 1
        if left < 0:
            return True
        stack += stack.pop().args
    return False


def constant_value(node: Node) -> bool | int | float | None:
    """The value of an attribute that holds a single number."""
    if node.op != "get_attr":
        return None
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part, None)
    if not isinstance(owner, torch.Tensor) or owner.numel() != 1 or owner.device.type == "meta" or owner.requires_grad:
        return None
    value: bool | int | float = owner.detach().reshape(()).item()
    return value


def names_of(term: Term, kind: type[sympy.Function]) -> dict[str, list[Any]]:
    """The functions of a kind in a term, by the name of their node, in order of appearance."""
    found: dict[str, list[Any]] = {}
    for atom in sympy.preorder_traversal(term):
        if isinstance(atom, kind) and atom not in found.setdefault(str(atom.args[0]), []):
            found[str(atom.args[0])].append(atom)
    return found


def rename(term: Term, names: Mapping[str, str]) -> Term:
    """A term with the tensors of its loads renamed."""
    return term.xreplace({sympy.Symbol(old): sympy.Symbol(new) for old, new in names.items()})
