"""The part of a graph between tensors over all positions that are cut into chunks, and the one that is put together from chunks.

x [b, t, d] -> view [b, c, l, d] -> ... -> [b, c, l, e] -> view [b, t, e]
x[:, 16 c : 16 (c + 1)] -> ... -> cat of one part a chunk
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from effcompile.expr import constant_value
from effcompile.probe import Unsupported, groups, shape, span, supports
from effcompile.rules import wrap_dim

aten = torch.ops.aten

RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints})
PADS = (aten.pad.default, aten.constant_pad_nd.default)
_PARTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
_MOST_NODES = 6000
_MOST_CHUNKS = 64


@dataclass(frozen=True, kw_only=True)
class Merge:
    """`node` puts chunks together: positions are its dimension `dim`, of `chunks` times `length`."""

    node: Node
    dim: int
    chunks: int
    length: int

    @property
    def positions(self) -> int:
        return int(self.node.meta["val"].shape[self.dim])


@dataclass(frozen=True)
class Leaf:
    """A tensor that the region takes: over all positions along `time`, or over none."""

    node: Node
    time: int | None


@dataclass(kw_only=True)
class Region:
    """What is between.

    Attributes:
        inside: the nodes that are computed from the leaves, in any order, the merge included.
        leaves: what they are computed from; constants are inside.
    """

    merge: Merge
    inside: set[Node] = field(default_factory=set)
    leaves: dict[Node, Leaf] = field(default_factory=dict)


def merges_at(node: Node) -> Iterator[Merge]:
    """The ways in which a node may put chunks together."""
    try:
        if node.target in RESHAPES:
            source = node.args[0]
            assert isinstance(source, Node)
            sizes = shape(source)
            for own, other in groups(shape(node), sizes):
                merged, parts = _longer(own, shape(node)), _longer(other, sizes)
                if len(merged) == 1 and len(parts) == 2:
                    yield Merge(node=node, dim=merged[0], chunks=sizes[parts[0]], length=sizes[parts[1]])
        elif node.target is aten.cat.default:
            yield from _concatenation(node)
    except Unsupported:
        return


def _concatenation(node: Node) -> Iterator[Merge]:
    rank = len(shape(node))
    parts: list[Node] = list(node.args[0])  # type: ignore[arg-type]
    dim = wrap_dim(int(node.args[1]) if len(node.args) > 1 else 0, rank)  # type: ignore[call-overload]
    lengths = [shape(part)[dim] for part in parts]
    if 2 <= len(parts) <= _MOST_CHUNKS and lengths[0] > 1 and len(set(lengths[:-1])) == 1 and lengths[-1] <= lengths[0]:
        yield Merge(node=node, dim=dim, chunks=len(parts), length=lengths[0])


def region_of(merge: Merge) -> Region | None:
    """What a merge is computed from, back to where the positions are whole; None if it was never cut, or is too large."""
    region = Region(merge=merge, inside={merge.node})
    frontier = list(merge.node.all_input_nodes)
    cut = False
    while frontier:
        node = frontier.pop()
        if node in region.inside or node in region.leaves:
            continue
        if len(region.inside) > _MOST_NODES:
            return None
        source = _whole_before(node, merge)
        if source is not None:
            cut = True
            region.inside.add(node)
            _take(region, *source)
        elif supports(node):
            region.inside.add(node)
            frontier += node.all_input_nodes
        elif isinstance(node.meta.get("val"), torch.Tensor):
            region.leaves[node] = Leaf(node, None)
        elif node.target in _PARTS or isinstance(node.meta.get("val"), (tuple, list)):
            region.inside.add(node)
            frontier += node.all_input_nodes
        else:
            return None
    if not cut:
        return None
    _hoist_constants(region)
    return region


def _take(region: Region, whole: Node, dim: int) -> None:
    """Make a tensor over all positions a leaf; what zeros were added to its end is taken off."""
    if whole.target in (*_PARTS,):
        region.inside.add(whole)
        whole = whole.args[0]  # type: ignore[assignment]
    while (before := _unpadded(whole, dim)) is not None:
        region.inside.add(whole)
        whole = before
    region.leaves[whole] = Leaf(whole, dim)


def _unpadded(node: Node, dim: int) -> Node | None:
    """What a node is, with zeros added at the end of a dimension."""
    if node.target not in PADS or not isinstance(node.args[0], Node):
        return None
    fill = (node.args[3:] if node.target is aten.pad.default else node.args[2:]) or (0,)
    pads: list[int] = list(node.args[1])  # type: ignore[arg-type]
    place = 2 * (len(shape(node)) - 1 - dim) + 1
    others = any(n != 0 for k, n in enumerate(pads) if k != place)
    return None if others or fill[0] not in (0, None) else node.args[0]


def _whole_before(node: Node, merge: Merge) -> tuple[Node, int] | None:
    """The tensor over all positions that a node cuts into chunks or takes a chunk of, and the dimension."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    if node.target in RESHAPES or node.target is aten.unflatten.int:
        return _split_before(node, source, merge)
    if merge.node.target is not aten.cat.default:
        return None
    if node.target is aten.slice.Tensor:
        dim = wrap_dim(int(node.args[1]) if len(node.args) > 1 else 0, len(shape(source)))  # type: ignore[call-overload]
        size = shape(source)[dim]
        taken = span(node, 2, size)
        return (source, dim) if taken.step == 1 and size == merge.positions and len(taken) <= merge.length else None
    if getattr(node.target, "__name__", "") == "getitem" and source.target in _PARTS:
        whole = source.args[0]
        assert isinstance(whole, Node)
        dim = wrap_dim(int(source.args[2]) if len(source.args) > 2 else 0, len(shape(whole)))  # type: ignore[call-overload]
        fits = shape(whole)[dim] == merge.positions and shape(node)[dim] <= merge.length
        return (source, dim) if fits else None
    return None


def _split_before(node: Node, source: Node, merge: Merge) -> tuple[Node, int] | None:
    sizes = shape(node)
    for own, other in groups(sizes, shape(source)):
        whole = _longer(other, shape(source))
        if len(whole) == 1 and [sizes[d] for d in _longer(own, sizes)] == [merge.chunks, merge.length]:
            return source, whole[0]
    return None


def _longer(dims: list[int], sizes: tuple[int, ...]) -> list[int]:
    """Those of more than one element."""
    return [d for d in dims if sizes[d] > 1]


def _hoist_constants(region: Region) -> None:
    """What is computed from leaves over no positions is a leaf itself, where it meets positions: those of leaves, or of constants.

    Of a leaf that meets them in several forms, the last of which all of these are made.
    """
    order = [n for n in region.merge.node.graph.nodes if n in region.inside]
    timed = _reached(order, {leaf.node for leaf in region.leaves.values() if leaf.time is not None})
    loose = [n for n, leaf in region.leaves.items() if leaf.time is None]
    derived = _reached(order, set(loose))
    positions = [n for n in order if n not in derived and n not in timed and region.merge.length in _sizes(n)]
    meeting = _reached(order, timed | set(positions))
    border = {x for node in order if node in meeting for x in node.all_input_nodes if x in derived - meeting}
    kept = {_last_before(leaf, border, [n for n in order if n in derived - meeting]) for leaf in loose}
    behind = _reached(order, kept)
    inner = {n for n in derived - meeting if n not in kept and n not in behind}
    for node in inner:
        region.leaves.pop(node, None)
    region.inside -= inner | kept
    for node in kept:
        region.leaves.setdefault(node, Leaf(node, None))


def _last_before(leaf: Node, border: set[Node], order: list[Node]) -> Node:
    """The last node through which all of a border that a leaf reaches is computed from it."""
    from_it = _reached(order, {leaf})
    for node in (n for n in reversed(order) if n in from_it):
        around = _reached([n for n in order if n is not node], {leaf})
        if border.isdisjoint(around - {node}):
            return node
    return leaf


def _reached(order: list[Node], start: set[Node]) -> set[Node]:
    """Nodes, and those of `order` that are computed from them."""
    found = set(start)
    for node in order:
        if any(x in found for x in node.all_input_nodes):
            found.add(node)
    return found


def _sizes(node: Node) -> tuple[int, ...]:
    return shape(node) if isinstance(node.meta.get("val"), torch.Tensor) else ()


def ordered_leaves(region: Region, order: Mapping[Node, int]) -> list[Node]:
    """The leaves in the order in which the region takes them, whatever the graph's own."""
    inside = sorted(region.inside, key=lambda node: order[node])
    return list(dict.fromkeys(x for node in inside for x in node.all_input_nodes if x in region.leaves))


def signature(region: Region, order: Mapping[Node, int]) -> Hashable:
    """What a region computes: equal for regions that are alike but for their leaves."""
    leaves = ordered_leaves(region, order)
    inside = sorted(region.inside, key=lambda node: order[node])
    names = {**{node: f"leaf{k}" for k, node in enumerate(leaves)}, **{node: f"%{k}" for k, node in enumerate(inside)}}
    lines: list[Hashable] = [(region.leaves[node].time, str(node.meta["val"].dtype), shape(node)) for node in leaves]
    for node in inside:
        arguments = map_arg((node.args, node.kwargs), lambda x: names.get(x, x.name))
        lines.append((str(node.target), constant_value(node), str(arguments), str(node.meta.get("val"))))
    return names[region.merge.node], region.merge.dim, tuple(lines)
