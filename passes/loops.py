"""Brings loops, scans and closed forms to `linear_scan`, for `passes.recurrence` to read, and takes back what it could not use.

    unrolled loop -> scan -> linear_scan      associative scan -> linear_scan      closed form -> linear_scan

Each source finds its own. What is replaced stays in the graph until the recognisers have run; a loop that was rolled up stays a
scan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from effcompile.ir import Rejected
from effcompile.pattern import GraphView
from effcompile.unrolled import Loop

from . import associative, closed_forms, dissect, single_steps
from .reroll import LEAST_STEPS, Rerolled, Rolled, reroll
from .tentative import Substitution, rejection

Source = Callable[[GraphModule, GraphView], tuple[list[Substitution], list[Rejected]]]

SOURCES: tuple[Source, ...] = (
    lambda module, view: associative.find(module),
    lambda module, view: closed_forms.find(module),
    dissect.find,
    lambda module, view: single_steps.find(module),
)
"""What is brought to `linear_scan`, in the order in which it is tried. A new source adds its function here."""

_FEWEST_CHUNKS = 3  # of a loop that is rolled up because it can be taken apart


@dataclass(kw_only=True)
class Loops:
    """What was brought, and what was not and why.

    `rolled` are the loops that are scans now; `daring` says that some of them could not run, or should not, as the scans that
    they are. `unrolled` says why others are none.
    """

    substitutions: list[Substitution] = field(default_factory=list)
    refused: list[Rejected] = field(default_factory=list)
    rolled: tuple[Rolled, ...] = ()
    unrolled: tuple[Rejected, ...] = ()
    daring: bool = False


def bring(module: GraphModule, view: Callable[[], GraphView], *, dare: bool = True) -> Loops:
    """Replace every loop, scan and closed form that can be, for the time being.

    Args:
        view: looks at the graph as it then is.
        dare: roll up a loop of few steps too, or one that torch cannot run as a scan, if it will be taken apart.
    """
    daring = Rerolled()
    if dare:
        daring = reroll(module, least_steps=_FEWEST_CHUNKS, mutating=view().mutating, accept=_why_not, runs=False)
    plain = reroll(module, least_steps=LEAST_STEPS, mutating=view().mutating)
    stay = [x for x in daring.refused if x not in plain.refused and x.node is not None and not x.node._erased]
    loops = Loops(rolled=daring.loops + plain.loops, unrolled=(*plain.refused, *stay), daring=bool(daring.loops))
    for source in SOURCES:
        found, refused = _found_by(source, module, view)
        for substitution in found:
            substitution.apply()
        loops.substitutions += found
        loops.refused += refused
    return loops


def _why_not(loop: Loop) -> str | None:
    """Why a loop is rolled up only if torch can run it, and it is long."""
    return dissect.why_not(loop.body, len(loop.inits), len(loop.xs), loop.steps)


def _found_by(
    source: Source, module: GraphModule, view: Callable[[], GraphView]
) -> tuple[list[Substitution], list[Rejected]]:  # fmt: skip
    """What a source finds. If it fails, nothing, and the graph is as it was."""
    before = set(module.graph.nodes)
    try:
        return source(module, view())
    except Exception as error:
        for node in reversed(module.graph.nodes):
            if node not in before:
                module.graph.erase_node(node)
        return [], [rejection(error, "scan")]


def settle(substitutions: Sequence[Substitution]) -> list[Substitution]:
    """Keep what became of the substitutions; where a `linear_scan` is still in use, give back what it replaced, and return it."""
    returned = []
    for substitution in reversed(substitutions):
        if any(_in_use(scan) for scan in substitution.scans):
            returned.append(substitution)
            substitution.undo()
        else:
            substitution.commit()
    return returned


def _in_use(node: Node) -> bool:
    return not node._erased and bool(node.users)
