"""Closed forms of first-order linear recurrences, by cumulative sums and products.

    exp(F) * (cumsum(x * exp(-F)) + h0), F = cumsum(g)           =  linear_scan(exp(g), x, h0)
    cumprod(a) * cumsum(b / cumprod(a))                          =  linear_scan(a, b)
    exp(F + logcumsumexp(log(x) - F)), F = cumsum(g)             =  linear_scan(exp(g), x)
    cumsum(x), read by a contraction                             =  linear_scan(None, x)

They hold in whatever way they are written, and are proved by evaluating them exactly: `prefixes` says how. Exponents are shifted as
one likes, as long as the shift cancels. In floating point a closed form overflows where the decay over all steps leaves the range
of exp; the recurrence does not. A cumulative product by itself stays as it is, and so does a cumulative sum that no contraction
reads or that adds up no products of keys and values.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from effcompile.ir import Rejected
from effcompile.pattern import describe

from .exact import name_of
from .exact_moves import CUMULATIVE
from .exact_operations import OPERATIONS
from .factors import is_contracted
from .prefixes import Component, Recurrence, survey
from .scans import written
from .tentative import Substitution

SUM = "cumulative sum"  # in the meta of a scan that stands for one
_NEAR = 12  # operations between two cumulative ones that are looked through for a reason


def find(module: GraphModule) -> tuple[list[Substitution], list[Rejected]]:
    """Scans in place of closed forms, not yet applied, and why what resembles one stays."""
    found = survey(module, _has_cumulative, _is_wanted)
    explained = {node for recurrence in found.found for node in recurrence.interior}
    reasons = []
    obstacles = {node: left.why for left in found.left if left.why for node in left.component.nodes}
    for node in module.graph.nodes:
        if name_of(node) in CUMULATIVE and node not in explained:
            why = obstacles.get(node) or _why_not(node)
            if why and (_is_weighted(node) or why in obstacles.values()):
                reasons.append(Rejected(step="closed form", why=why, node=node))
    substitutions, refused = written(found.found, "a closed form of a recurrence", found.blocks, "closed form")
    for scan in (scan for substitution in substitutions for scan in substitution.scans if scan.args[0] is None):
        scan.meta[SUM] = True
    return substitutions, refused + reasons


def _has_cumulative(component: Component) -> bool:
    names = [name_of(node) for node in component.nodes]
    alone = all(name in CUMULATIVE for name in names)
    return any(name in CUMULATIVE for name in names) and (not alone or any(is_contracted(node) for node in component.nodes))


def _is_wanted(recurrence: Recurrence) -> bool:
    """Whether a recurrence is more than a cumulative sum or product, or a sum that a contraction reads."""
    operands = recurrence.operands
    if operands.offset is None or not any(name_of(node) in CUMULATIVE for node in recurrence.interior):
        return False
    return operands.coefficient is not None or is_contracted(recurrence.node)


def _is_weighted(node: Node) -> bool:
    """Whether a cumulative sum adds up what was weighted by another cumulative operation."""
    way = _way_to_another(node)
    if way is None or name_of(node) == "cumprod":
        return False
    return name_of(node) == "logcumsumexp" or any(name_of(n) in ("mul", "div") for n in way)


def _why_not(node: Node) -> str:
    way = _way_to_another(node)
    if way is None:
        return ""
    opaque = [n for n in way if name_of(n) not in OPERATIONS]
    if opaque:
        return f"the weights of a cumulative sum pass through {describe(opaque[0])}, after which they need not cancel"
    return "no tensor, or exponential of one, is the decay from each step of a weighted cumulative sum to the next"


def _way_to_another(node: Node) -> list[Node] | None:
    """The operations between a cumulative one and the nearest one that it depends on."""
    ways: list[list[Node]] = [[source] for source in node.all_input_nodes]
    seen: set[Node] = set()
    while ways:
        way = ways.pop(0)
        last = way[-1]
        if name_of(last) in CUMULATIVE:
            return way[:-1]
        if last not in seen and len(way) < _NEAR:
            seen.add(last)
            same = (s for s in last.all_input_nodes if _spans(s, node))
            ways += [[*way, source] for source in same]
    return None


def _spans(node: Node, other: Node) -> bool:
    """Whether two tensors have a length in common that is not 1."""
    shapes = [set(getattr(n.meta.get("val"), "shape", ())) - {1} for n in (node, other)]
    return bool(shapes[0] & shapes[1])
