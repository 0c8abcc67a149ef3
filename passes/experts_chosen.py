"""What experts add to the rows of the tokens that a mask chose, one expert after the other.

    t, s = nonzero(m)        out.index_add(0, t, y)[n, c] = out[n, c] + sum_s where(m[n, s], y[place of (n, s), c], 0)
                             out[m] += y                  = out[n, c] + where(m[n], y[place of n, c], 0)

The place of an element is the row of `nonzero(m)` that it stands in: what is read there is read at that element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile import elementwise
from effcompile.builder import is_tensor_node
from effcompile.contraction import Dot
from effcompile.terms import IntLoad, Term, Where
from effcompile.viewmaps import VIEWS, shape_of

from .experts_nodes import argument, holds_each_once
from .experts_terms import C, Place, RowInterpreter, SlotSum, T, slot_of
from .specify import Stop

aten = torch.ops.aten

_COPIES = (aten.clone.default, aten.contiguous.default)


@dataclass(frozen=True, kw_only=True)
class Landing:
    """`base` with `values` added to the rows `positions`, a mask or what is part of `nonzero(mask)`.

    `once` if what lands on a row twice counts but once.
    """

    base: Node
    positions: Node
    mask: Node
    values: Node
    once: bool


def landing_of(node: Node) -> Landing | None:
    """What a node adds to rows that a mask chose; None if it does not."""
    if node.target is aten.index_add.default:
        base, dim, positions, values = node.args[:4]
        once = False
        if dim != 0 or argument(node, "alpha", 1) != 1:
            return None
    elif node.target is aten.index_put.default and len(node.args[1]) == 1:  # type: ignore[arg-type]
        base, (positions,), values = node.args[:3]  # type: ignore[misc]
        once = not argument(node, "accumulate", False)
        values = _added(base, positions, values) if once else values
    else:
        return None
    mask = _mask_behind(positions)
    if mask is None or not is_tensor_node(values) or not is_tensor_node(base):
        return None
    return Landing(base=base, positions=positions, mask=mask, values=values, once=once)  # type: ignore[arg-type]


def _added(base: Any, positions: Any, values: Any) -> Any:
    """y of `out[p] = out[p] + y`."""
    if not isinstance(values, Node) or values.target is not aten.add.Tensor or values.kwargs:
        return None
    for own, y in (values.args, values.args[::-1]):
        if isinstance(own, Node) and own.target is aten.index.Tensor and own.args == (base, [positions]):
            return y
    return None


def _mask_behind(positions: Any) -> Node | None:
    """The mask that rows were chosen by."""
    if not isinstance(positions, Node):
        return None
    if positions.meta["val"].dtype is torch.bool:
        return positions if positions.meta["val"].dim() == 1 else None
    node = positions
    while node.op == "call_function" and (node.target in VIEWS or node.target in _COPIES or _is_part(node)):
        node = node.all_input_nodes[0]
    mask = node.args[0] if node.target is aten.nonzero.default else None
    return mask if isinstance(mask, Node) and mask.meta["val"].dim() in (1, 2) else None


def _is_part(node: Node) -> bool:
    source = node.args[0] if node.args else None
    return node.target is aten.unbind.int or (isinstance(source, Node) and source.target is aten.unbind.int)


def chosen_summands(rows: RowInterpreter, anchor: Node) -> tuple[list[Term], Node] | None:
    """`(summands, base)` of what a chain of such additions adds at [t, c]; None if the anchor is none.

    Raises:
        Stop: an addition is not to the rows of the tokens that its mask chose.
    """
    found: list[Term] = []
    node = anchor
    while (landing := landing_of(node)) is not None:
        found.append(_summand(rows, landing, anchor))
        node = landing.base
    return (found[::-1], node) if found else None


def _summand(rows: RowInterpreter, landing: Landing, anchor: Node) -> Term:
    sizes = shape_of(landing.mask)
    tokens = shape_of(anchor)[0]
    coordinates = _coordinates(rows, landing, anchor)
    others = [(x, n) for x, n in zip(coordinates, sizes, strict=True) if x != T]
    if len(others) != len(sizes) - 1 or sizes[coordinates.index(T)] != tokens:
        raise Stop("combine", "the mask that chooses rows is not of the tokens", landing.mask)
    rows.ranges.choosing(landing.mask, shape_of(landing.values)[0])
    place = Place(sympy.Symbol(landing.mask.name), *coordinates)
    chosen = elementwise.as_condition(rows.element(landing.mask, coordinates))
    value = elementwise.as_number(rows.element(landing.values, (place, C)))
    if not others:
        return Where(chosen, value, sympy.S.Zero)
    if landing.once and not _at_most_once(rows, chosen, others[0][0]):
        raise Stop("combine", "a row that is chosen twice is written but once", anchor)
    slot = others[0][0]
    products = value.atoms(Dot)
    if len(products) != 1:
        raise Stop("anchor", "what is added up is no multiple of one projection", anchor)
    (product,) = products
    factor, rest = (sympy.expand(value).coeff(product, k) for k in (1, 0))
    if sympy.expand(factor * product + rest - value) != 0 or factor.has(Dot):
        raise Stop("anchor", "what is added up is not linear in a projection", anchor)
    weight = SlotSum(slot, Where(chosen, factor, sympy.S.Zero)) if slot != 0 else Where(chosen, factor, sympy.S.Zero)
    if rest != 0:
        raise Stop("anchor", "something else than the experts' results is added to the rows", anchor)
    return weight * product


def _at_most_once(rows: RowInterpreter, chosen: Term, slot: Term) -> bool:
    """Whether a condition holds for at most one slot of a token: it compares ids of which a token has each once."""
    if slot == 0:
        return True
    loads = [x for x in chosen.args if isinstance(x, IntLoad)] if isinstance(chosen, sympy.Eq) else []
    return len(loads) == 1 and loads[0].indices[-1] == slot and holds_each_once(rows.loaded[loads[0].tensor])


def _coordinates(rows: RowInterpreter, landing: Landing, anchor: Node) -> tuple[Term, ...]:
    """An element of the mask: the token on the dimension that says which row is added to, and its slot on the other."""
    sizes = shape_of(landing.mask)
    if len(sizes) == 1:
        return (T,)
    marks = tuple(sympy.Dummy(integer=True, nonnegative=True) for _ in sizes)
    token = rows.element(landing.positions, (Place(sympy.Symbol(landing.mask.name), *marks),))
    if token not in marks:
        raise Stop("combine", "which token a row is added to is not known from the mask that chose it", anchor)
    slots = tuple(slot_of(n) if n != 1 else sympy.S.Zero for n in sizes)
    for x, n in zip(slots, sizes, strict=True):
        if x != 0:
            rows.ranges.add(x, n)
    return tuple(T if mark == token else x for mark, x in zip(marks, slots, strict=True))
