"""Changes to a graph that can be taken back: what is replaced stays in it, unused, until it is known what became of its
substitute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from effcompile.builder import erase_with_inputs, is_pure


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """Nodes that stand in for others of equal value.

    Attributes:
        what: the kind of thing replaced, for a sentence: "a scan", "a loop of 64 steps".
        anchor: the node that was replaced, for the report's source line.
        pairs: each replaced node with its substitute.
        scans: the `linear_scan` nodes by which the substitutes are computed.
        regions: runs of nodes that are pure as wholes, though not one by one (those of a functorch region, a higher-order operation
            with its results), in graph order. `commit` removes those that nothing uses any more.
    """

    what: str
    anchor: Node
    pairs: Sequence[tuple[Node, Node]]
    scans: tuple[Node, ...] = ()
    regions: tuple[tuple[Node, ...], ...] = ()

    def apply(self) -> None:
        """Let the substitutes take over the uses."""
        for old, new in self.pairs:
            old.replace_all_uses_with(new)

    def undo(self) -> None:
        """Give the uses that are left back, and remove what only the substitutes needed."""
        for old, new in self.pairs:
            new.replace_all_uses_with(old)
        for _, new in self.pairs:
            if not new.users and not new._erased:
                erase_with_inputs(new)

    def commit(self) -> None:
        """Remove what was replaced."""
        for old in (*(old for old, _ in reversed(self.pairs)), self.anchor):
            if not old.users and not old._erased:
                erase_with_inputs(old)
        for region in reversed(self.regions):
            _erase_region(region)


def _erase_region(region: Sequence[Node]) -> None:
    """Remove a region that nothing outside uses, and what only it needed."""
    nodes = [node for node in region if not node._erased]
    inside = set(nodes)
    if any(user not in inside for node in nodes for user in node.users):
        return
    sources = {source: None for node in nodes for source in node.all_input_nodes if source not in inside}
    for node in reversed(nodes):
        node.graph.erase_node(node)
    for source in sources:
        if not source._erased and not source.users and source.op != "placeholder" and is_pure(source):
            erase_with_inputs(source)
