"""The second state of a normalised linear attention: the sum of the keys, beside the sum of their products with the values.

S_t = a_t S_{t-1} + k_t v_t^T,   n_t = a_t n_{t-1} + k_t     read by the same queries: q_t^T S_t and q_t . n_t
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.viewmaps import Index, shape_of

from .factors import Factor, aligned, product
from .reads import Read, is_zero
from .sites import Site

LINEAR_SCAN = torch.ops.effcompile.linear_scan.default

Leaves = tuple[Any, Counter[Any]]
_OPAQUE = (torch.ops.aten.exp.default, torch.ops.aten.sigmoid.default)  # functions by which decays are made


def normaliser_of(site: Site, read: Read, keys: Sequence[Factor], column: Any) -> Read | None:
    """The read of the keys' own recurrence, its index in the symbols of `site`; None if there is none.

    Args:
        keys: what is written to the rows of the state.
        column: the symbol of the state's columns.
    """
    if not is_zero(site.initial) or column is None:
        return None
    rows = tuple(s for s in site.symbols if s != column)
    for node in site.view.graph.nodes:
        if node.target is LINEAR_SCAN and node is not site.anchor and _has_shape(node, rows, site):
            found = _read_of(Site(node, site.view), site, read, keys, rows)
            if found is not None:
                return found
    return None


def _has_shape(node: Node, rows: Index, site: Site) -> bool:
    return shape_of(node) == tuple(site.size(s) for s in rows) and node.meta["val"].dtype == site.anchor.meta["val"].dtype


def _read_of(other: Site, site: Site, read: Read, keys: Sequence[Factor], rows: Index) -> Read | None:
    reads = other.reads
    if reads.whole or len(reads.contractions) != 1 or not is_zero(other.initial) or any(node.users for node in reads.last):
        return None
    total = reads.contractions[0]
    renamed = dict(zip(other.symbols, rows, strict=True))

    alike = (
        total.before == read.before and total.beside is None and renamed[total.summed] == read.summed
        and leaves([_renamed(total.query, renamed)], site) == leaves([read.query], site)
        and leaves([_renamed(Factor(other.offset, other.index), renamed)], site) == leaves(keys, site)
        and _decays(other, renamed, site) == _decays(site, {}, site)
    )  # fmt: skip
    if not alike:
        return None
    return Read(
        node=total.node, index=tuple(term.xreplace(renamed) for term in total.index), query=_renamed(total.query, renamed),
        summed=read.summed, before=total.before, beside=None,
    )  # fmt: skip


def _decays(own: Site, renamed: dict[Any, Any], site: Site) -> Leaves | None:
    if own.coefficient is None:
        return None
    factor = aligned(own.coefficient, own.symbols)
    return leaves([_renamed(factor, renamed)], site)


def _renamed(factor: Factor, renamed: dict[Any, Any]) -> Factor:
    return Factor(factor.node, tuple(term.xreplace(renamed) for term in factor.index))


def leaves(factors: Sequence[Factor], site: Site) -> Leaves:
    """A product, taken apart as far as it goes; equal for equal products, however often their factors are computed."""
    scale: Any = sympy.S.One
    found: Counter[Any] = Counter()
    for factor in factors:
        parts = product(factor, site.ranges, lambda f: True)
        scale = scale * parts.scale
        found.update(_inside(part, site) for part in parts.factors)
    return scale, found


def _inside(factor: Factor, site: Site) -> Any:
    """A factor, or the function that it is and what it is one of."""
    node = factor.node
    if node.target not in _OPAQUE:
        return factor
    scale, inner = leaves([Factor(node.args[0], factor.index)], site)  # type: ignore[arg-type]
    return node.target, scale, frozenset(inner.items())
