"""A Python loop over time or chunks that was unrolled becomes one scan again.

h1 = f(h0, x[:, 0]); h2 = f(h1, x[:, 1]); ...; y = stack([h1, h2, ...], 1)
    ->  h, ys = scan(f, h0, x.transpose(0, 1)); y = ys.transpose(0, 1)

The same operators run on the same values in the same order: equal to the last bit where they compute alike on any strides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import GraphModule, Node

from effcompile._regions import mode_regions, requires_grad
from effcompile.errors import EffcompileError
from effcompile.ir import Rejected
from effcompile.pattern import source_line
from effcompile.repeats import Repeats, Run, items_of
from effcompile.rolled import loop_of
from effcompile.unrolled import Loop, RefusedError, Steps, Stretch, best_rotation, difference, moves, stretches

from .rollup import Replacement, Rolled, can_run
from .tentative import Stop, rejection

# Measured with an RNN and an LSTM on a CPU: from here on an unrolled loop takes longer to compile than a scan.
LEAST_STEPS = 64
_FEWEST = 3  # two steps may be alike by chance


@dataclass(frozen=True, kw_only=True)
class Rerolled:
    """What became of a graph's loops; `refused` says why others stay unrolled."""

    loops: tuple[Rolled, ...] = ()
    refused: tuple[Rejected, ...] = ()


@dataclass
class _Found:
    loops: list[Loop] = field(default_factory=list)
    refused: list[Rejected] = field(default_factory=list)


def find_loops(
    module: GraphModule, *, least_steps: int = LEAST_STEPS, mutating: frozenset[Node] = frozenset()
) -> tuple[tuple[Loop, ...], tuple[Rejected, ...]]:
    """The outermost unrolled loops of at least `least_steps` steps, and why others cannot be rolled up.

    The graph is left as it is. Nodes in `mutating` write behind its back: no loop has one inside.
    """
    if least_steps < _FEWEST:
        raise EffcompileError(f"Expected at least {_FEWEST} steps to a loop but got {least_steps=}")
    items = items_of(module.graph, mode_regions(module.graph, mutating))
    places = {item.node: place for place, item in enumerate(items)}
    found = _Found()
    repeats = Repeats(items, least_steps)
    for run in repeats:
        steps = Steps.of(items, places, run)
        equal = stretches(steps, least_steps)
        loops = _loops_in(run, steps, equal, least_steps, found)
        if loops:
            found.loops += loops
            repeats.take(run.end)
        elif equal:
            repeats.refuse(run)
    return tuple(found.loops), _distinct(found.refused)


def _loops_in(run: Run, steps: Steps, equal: list[Stretch], least: int, found: _Found) -> list[Loop]:
    """The loops among the stretches of equal steps of a run."""
    if not equal:
        if moves(steps.lines(steps.count - 1)):
            why, node = difference(steps)
            found.refused.append(_stays(Stop(why), node))
        return []
    rotation = best_rotation(equal[0], run)
    candidates = equal
    if rotation:
        candidates = stretches(Steps.of(steps.items, steps.places, run, rotation), least) or equal
    loops = []
    for stretch in candidates:
        try:
            loop = loop_of(stretch)
        except RefusedError as error:
            if moves(stretch.lines):
                found.refused.append(_stays(Stop(error.why), error.node))
            continue
        except Exception as error:
            found.refused.append(_stays(error, stretch.steps.item(stretch.first, 0).node))
            continue
        if loop.xs or loop.collected:
            loops.append(loop)
    return loops


def _stays(error: Exception, node: Node) -> Rejected:
    rejected = rejection(error, "reroll", node)
    return replace(rejected, why=f"a loop stays unrolled: {rejected.why}")


def _distinct(refused: Sequence[Rejected]) -> tuple[Rejected, ...]:
    """One for each reason and source line."""
    found: dict[tuple[str, str], Rejected] = {}
    for rejected in refused:
        found.setdefault((rejected.why, source_line(rejected.node) if rejected.node is not None else ""), rejected)
    return tuple(found.values())


# -------------------------------------------------------------------- the pass


def reroll(
    module: GraphModule,
    *,
    least_steps: int = LEAST_STEPS,
    mutating: frozenset[Node] = frozenset(),
    accept: Callable[[Loop], str | None] = lambda loop: None,
    runs: bool = True,
) -> Rerolled:
    """Replace each unrolled loop of at least `least_steps` steps by a scan. A loop inside the steps of another stays in its body.

    `accept` gives a reason to leave a loop unrolled, or None. A loop whose scan cannot be built stays as it is. If the scan `runs`,
    torch must be able to run it: else it will be replaced. A graph with a scan is to be compiled by `_dynamo.inductor`, or within
    `_torch.keeping_saved_tensors()`.
    """
    rolled: list[Rolled] = []
    refused: list[Rejected] = []
    requiring = requires_grad(module)
    changed = True
    while changed:
        changed = False
        loops, stay = find_loops(module, least_steps=least_steps, mutating=mutating)
        refused = list(stay)
        renamed: dict[Node, Node] = {}
        for loop in loops:
            try:
                trains = any(node in requiring for node in loop.nodes)
                why = accept(loop) or (can_run(loop, trains, requiring) if runs else None)
                if why is not None:
                    raise Stop(why)
                rolled.append(Replacement(module, loop, trains if runs else None, requiring, renamed).carry_out())
                changed = True
            except Exception as error:
                refused.append(_stays(error, loop.first))
        if changed:
            module.graph.lint()
            module.recompile()
    return Rerolled(loops=tuple(rolled), refused=_distinct(refused))
