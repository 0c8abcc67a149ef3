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
from effcompile.loops import Loop
from effcompile.pattern import GraphView

from . import associative, closed_forms, dissect
from .reroll import LEAST_STEPS, Rolled, reroll
from .tentative import Substitution

Source = Callable[[GraphModule, GraphView], tuple[list[Substitution], list[Rejected]]]

SOURCES: tuple[Source, ...] = (
    lambda module, view: associative.find(module),
    lambda module, view: closed_forms.find(module),
    dissect.find,
)
"""What is brought to `linear_scan`, in the order in which it is tried. A new source adds its function here."""

_FEWEST_CHUNKS = 3  # of a loop that is rolled up because it can be taken apart


@dataclass(kw_only=True)
class Loops:
    """What was brought, and what was not and why.

    `rolled` are the loops that are scans now; `daring` says that some of them could not run, or should not, as the scans that
    they are.
    """

    substitutions: list[Substitution] = field(default_factory=list)
    refused: list[Rejected] = field(default_factory=list)
    rolled: tuple[Rolled, ...] = ()
    unrolled: tuple[str, ...] = ()
    daring: bool = False


def bring(module: GraphModule, view: Callable[[], GraphView], *, dare: bool = True) -> Loops:
    """Replace every loop, scan and closed form that can be, for the time being.

    Args:
        view: looks at the graph as it then is.
        dare: roll up a loop of few steps too, or one that torch cannot run as a scan, if it will be taken apart.
    """
    loops = Loops()
    if dare:
        mutating = view().mutating
        daring = reroll(
            module, least_steps=_FEWEST_CHUNKS, mutating=mutating, certain=_will_be_taken_apart, accept=_only_certain
        )  # fmt: skip
        loops.daring = bool(daring.loops)
        loops.rolled = daring.loops
    plain = reroll(module, least_steps=LEAST_STEPS, mutating=view().mutating)
    loops.rolled += plain.loops
    loops.unrolled = plain.refused
    for source in SOURCES:
        found, refused = source(module, view())
        for substitution in found:
            substitution.apply()
        loops.substitutions += found
        loops.refused += refused
    return loops


def _will_be_taken_apart(loop: Loop) -> bool:
    return dissect.why_not(loop.body, len(loop.inits), len(loop.xs), loop.steps) is None


def _only_certain(loop: Loop) -> str:
    return "it is not taken apart"


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
