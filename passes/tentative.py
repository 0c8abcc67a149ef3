"""Changes to a graph that can be taken back: what is replaced stays in it, unused, until it is known what became of its
substitute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from effcompile.builder import Builder, erase_with_inputs, is_pure
from effcompile.errors import summary
from effcompile.ir import Rejected


class Stop(Exception):
    """What is there stays as it is, for a reason."""


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
        """Give the uses that are left back, and remove what only the substitutes needed.

        What stands before a replaced node is computed from substitutes alone, and goes on using them.
        """
        for old, new in self.pairs:
            new.replace_all_uses_with(old, delete_user_cb=lambda user, old=old: old < user)
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


def substitutions(
    sites: Iterable[tuple[Node, Callable[[Builder], Substitution | None]]], step: str
) -> tuple[list[Substitution], list[Rejected]]:
    """What is written for each site, not yet applied, and why nothing is for others.

    Args:
        sites: an anchor, and what writes its substitute with a builder before that node. `Stop` says why it does not; it and any
            other exception leave the graph as it was, and the other sites to be tried.
        step: the stage of recognition that a `Stop` is reported at.
    """
    found, refused = [], []
    for anchor, write in sites:
        builder = Builder(anchor.graph, anchor)
        try:
            substitution = write(builder)
        except Exception as error:
            builder.undo()
            refused.append(rejection(error, step, anchor))
            continue
        if substitution is not None:
            found.append(substitution)
    return found, refused


def rejection(error: Exception, step: str, node: Node | None = None) -> Rejected:
    """Why something stays as it is: what a `Stop` says, or that something else went wrong, which nothing should."""
    if isinstance(error, Stop):
        return Rejected(step=step, why=str(error), node=node)
    return Rejected(step="internal", why=f"an internal failure: {summary(error)}", node=node, error=error)


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
