"""A layer of experts: each token through the few that its router chose, and their results added up, as one operation.

    y_t = sum_s w[t,s] (act(x_t U_e + b1_e) D_e + b2_e),    e = ids[t,s]

Anchored at what adds up: a sum over slots, an accumulation into rows of tokens, a contraction with weights, the last addition of a
loop over experts. What it adds up is read backwards, element by element (`experts_terms`), so that sorting by expert and sorting
back, copying tokens or matrices for each assignment, and computing all experts to multiply most of them with zero say the same. The
router stays in the graph as it is.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch.fx import Node

from effcompile.errors import ExpressionError
from effcompile.ir import Match, Rejected, Rule
from effcompile.pattern import GraphView
from effcompile.viewmaps import is_float

from .experts_anchors import ANCHORS, may_end
from .experts_nodes import Facts
from .experts_read import read, total_of
from .experts_routes import routing_of
from .experts_specify import Layer, match_of
from .experts_terms import RowInterpreter, RowRanges
from .specify import Stop

_FACTS: WeakKeyDictionary[GraphView, Facts] = WeakKeyDictionary()


def recognise(anchor: Node, view: GraphView) -> Match | Rejected:
    """Match the layer of experts that ends in an addition, or say at which step and why it is none that we take."""
    facts = _FACTS.setdefault(view, Facts())
    if not may_end(anchor, facts):
        return Rejected(step="anchor", why="nothing routed is added up", node=anchor)
    try:
        return _match(anchor, view, facts)
    except Stop as stop:
        return stop.rejected
    except ExpressionError as error:
        return Rejected(step="expression", why=str(error), node=anchor)


def _match(anchor: Node, view: GraphView, facts: Facts) -> Match:
    here = view.regions.get(anchor)
    rows = RowInterpreter(RowRanges({}, {}), facts, lambda node: is_float(node) and view.regions.get(node) != here)
    total = total_of(rows, anchor)
    readings = [read(rows, summand, anchor) for summand in total.summands]
    routing = routing_of(rows, total, readings, anchor)
    return match_of(Layer(rows=rows, view=view, anchor=anchor, routing=routing, rest=total.rest))


EXPERTS = Rule(
    name="experts",
    family="experts",
    summary="what experts make of the tokens routed to them, added up: a layer of a Mixture of Experts",
    anchors=ANCHORS,
    recognise=recognise,
    early=True,
    quiet=True,
)
