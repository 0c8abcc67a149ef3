"""A site of which the analysis fails stays as it is, with the failure in the report; the other sites are rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._higher_order_ops.associative_scan import associative_scan_op
from torch._higher_order_ops.scan import scan
from torch.fx import Graph

from effcompile import debug
from effcompile.builder import Builder
from effcompile.passes import associative, dissect, reroll, scans
from effcompile.passes.tentative import Stop, substitutions

from .vocabulary import Compiled

aten = torch.ops.aten
T, D = 6, 4


class InjectedError(RuntimeError):
    pass


def fail(*_args: Any, **_kwargs: Any) -> Any:
    raise InjectedError("planted")


def fail_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """The first call does its work, nodes that it adds to a graph included, and fails then."""
    original, calls = getattr(owner, name), []

    def planted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append(name)
        return fail() if len(calls) == 1 else result

    monkeypatch.setattr(owner, name, planted)


# -------------------------------------------------------------------- two sites of each kind


def scanned(a: torch.Tensor, x: torch.Tensor) -> Any:
    def step(h: torch.Tensor, ax: Any) -> Any:
        h = ax[0] * h + ax[1]
        return h, h.clone()

    return [scan(step, x[0] * s, (a * s, x), dim=0)[1] for s in (0.5, 0.25)]


def combined(a: torch.Tensor, x: torch.Tensor) -> Any:
    def combine(a1: Any, b1: Any, a2: Any, b2: Any) -> Any:
        return [a1 * a2, a2 * b1 + b2]

    return [associative_scan_op(combine, [a * s, x], ())[1] for s in (0.5, 0.25)]


def doubling(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A tree of levels that is written by hand."""
    shift = 1
    while shift < T:
        before_x = torch.nn.functional.pad(x, (0, 0, shift, 0))[:T]
        before_a = torch.nn.functional.pad(a, (0, 0, shift, 0), value=1.0)[:T]
        a, x, shift = a * before_a, x + a * before_x, 2 * shift
    return x


def trees(a: torch.Tensor, x: torch.Tensor) -> Any:
    return [doubling(a, x), doubling(a, 2 * x).sin()]


def closed(a: torch.Tensor, x: torch.Tensor) -> Any:
    total = a.log().cumsum(0)
    return [torch.exp(total) * torch.cumsum(y * torch.exp(-total), 0) for y in (x, x.sin())]


SITES: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "scan": (scanned, dissect, "_like"),
    "associative scan": (combined, associative, "_scan_of"),
    "tree": (trees, scans, "_as_before"),
    "closed form": (closed, scans, "_as_before"),
}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(T, D) * 0.5 + 0.25, torch.randn(T, D)


@pytest.mark.parametrize("name", SITES)
def test_the_other_sites_are_rewritten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f, owner, function = SITES[name]
    fail_once(monkeypatch, owner, function)
    compiled = Compiled(f)
    arguments = inputs()
    torch.testing.assert_close(compiled(*arguments), f(*arguments))
    refused, rewritten = sorted(compiled.decisions("recurrence"), key=lambda d: d.outcome)
    assert (refused.outcome, refused.step) == ("refused", "internal") and "InjectedError: planted" in refused.why
    assert "test_tentative.py:" in refused.where
    assert rewritten.outcome == "rewritten" and "planted" in str(compiled.report())


@pytest.mark.parametrize("name", SITES)
def test_all_are_rewritten_otherwise(name: str) -> None:
    f, *_ = SITES[name]
    compiled = Compiled(f, ("h100-sxm",))
    compiled(*inputs())
    assert [d.outcome for d in compiled.decisions("recurrence")] == ["rewritten"] * 2


def test_a_source_that_fails_leaves_what_others_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has added by then is gone."""
    monkeypatch.setattr(associative, "survey", fail)

    def both(a: torch.Tensor, x: torch.Tensor) -> Any:
        return combined(a, x)[0], scanned(a, x)[0]

    compiled = Compiled(both, ("h100-sxm",))
    arguments = inputs()
    torch.testing.assert_close(compiled(*arguments), both(*arguments))
    outcomes = [(d.outcome, d.step) for d in compiled.decisions("recurrence")]
    assert sorted(outcomes) == [("refused", "internal"), ("rewritten", "")]


def test_a_failure_raises_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dissect, "_like", fail)
    f = torch.compile(scanned, backend="effarch", options={"fallback": "error"})
    with pytest.raises(Exception, match="InjectedError: planted"):
        f(*inputs())


# -------------------------------------------------------------------- loops


def looped(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    h, out = torch.zeros(D), []
    for t in range(T):
        h = a[t] * h + x[t]
        out.append(h)
    return torch.stack(out)


@pytest.mark.parametrize(("owner", "function"), [(dissect, "_Whole"), (reroll, "loop_of")])
def test_a_loop_that_cannot_be_analysed_stays_unrolled(owner: Any, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = debug.capture(looped, *inputs())
    before = str(graph.graph)
    monkeypatch.setattr(owner, function, fail)
    brought, log = debug.run_pass("loops", graph)
    assert str(brought.graph) == before
    (entry,) = [entry for entry in log if entry.name == "loops"]
    assert (entry.outcome, entry.step) == ("refused", "internal")
    assert entry.why == "a loop stays unrolled: an internal failure: InjectedError: planted"
    assert "test_tentative.py:" in entry.where


# -------------------------------------------------------------------- the helper


def _relus(count: int) -> tuple[Graph, list[Any]]:
    graph = debug.capture(lambda x: [x.relu() + n for n in range(count)], torch.ones(3)).graph
    return graph, [node for node in graph.nodes if node.target is aten.add.Tensor]


@pytest.mark.parametrize(
    ("error", "step", "why"),
    [
        (Stop("it is odd"), "here", "it is odd"),
        (InjectedError("planted"), "internal", "an internal failure: InjectedError: planted"),
    ],
    ids=["a reason", "a failure"],
)
def test_a_refusal_leaves_the_graph_as_it_was(error: Exception, step: str, why: str) -> None:
    graph, anchors = _relus(2)
    before = str(graph)

    def write(builder: Builder) -> None:
        builder.call(aten.sin.default, builder.call(aten.cos.default, builder.before.args[0]))
        if builder.before is anchors[1]:
            builder.undo()
        else:
            raise error

    found, refused = substitutions(((anchor, write) for anchor in anchors), "here")
    assert str(graph) == before and found == []
    (rejected,) = refused
    assert (rejected.node, rejected.step, rejected.why) == (anchors[0], step, why)
    assert rejected.error is (error if step == "internal" else None)
