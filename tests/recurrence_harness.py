"""What tests of recurrences that are no loops say: this is rewritten so, with equal results; that is refused, for this reason.

A function is compiled with the given rules alone, and what they match is replaced whatever it costs.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule, Node

from effcompile import trace
from effcompile.builder import Builder
from effcompile.ir import Match, Rejected, Rule
from effcompile.passes.normalize import normalize
from effcompile.pattern import GraphView
from effcompile.pipeline import graph_modules
from effcompile.rewrite import Attempt, attempt_again, attempt_all, is_stale, replace

from .vocabulary import _compare, _InFloat64, results

Function = Callable[..., Any]


def lower(builder: Builder, operands: Mapping[str, Node], captures: Any, sizes: Any, match: Match, layout: str) -> dict[str, Node]:
    """The operation itself, its results by name."""
    given = [operands[name] for name in match.spec.operands]
    results = builder.call(torch.ops.effcompile.recurrence.default, operands["v"], given, match.spec.to_json(), layout)
    return {name: builder.call(operator.getitem, results, k) for k, name in enumerate(("out", "normaliser", "final"))}


class Rewritten:
    """A function compiled with the given rules alone."""

    def __init__(self, f: Function, rules: Sequence[Rule], *, dynamic: bool | None = None, strict: bool = False):
        self.f, self.rules, self.strict = f, rules, strict
        self.attempts: list[Attempt] = []
        self.graphs: list[GraphModule] = []
        self._call = torch.compile(f, backend=self._backend, fullgraph=True, dynamic=dynamic)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    @property
    def matches(self) -> list[Match]:
        return [a.result for a in self.attempts if isinstance(a.result, Match)]

    @property
    def refusals(self) -> list[Rejected]:
        """Why sites at which something was begun are none."""
        return [a.result for a in self.attempts if isinstance(a.result, Rejected) and a.result.step != "anchor"]

    def _backend(self, module: GraphModule, inputs: list[Any]) -> Function:
        lifted = trace.lift(module, inputs)
        graphs = graph_modules(lifted.graph_module)
        for inner in graphs:
            normalize(inner)
        for inner in graphs:
            self._rewrite(inner, lifted.mutating)
        self.graphs.append(lifted.graph_module)
        return aot_eager(lifted.graph_module, inputs)

    def _rewrite(self, module: GraphModule, mutating: frozenset[Node]) -> None:
        for attempt in attempt_all(GraphView(module, strict=self.strict, mutating=mutating), self.rules):
            if isinstance(attempt.result, Match) and is_stale(attempt.result, module.graph):
                attempt = attempt_again(attempt, self.rules, GraphView(module, mutating=mutating))
            if attempt.error is not None:
                raise attempt.error
            self.attempts.append(attempt)
            if isinstance(attempt.result, Match):
                replace(attempt.result, lower)
        module.graph.lint()
        module.recompile()


def assert_recurrence(
    f: Function, *args: Any, rules: Sequence[Rule], count: int = 1, grad: bool = True, dynamic: bool | None = None, **fields: Any
) -> Rewritten:
    """`f` holds `count` recurrences of the given fields, all replaced; results and gradients are as good as eager's."""
    compiled = Rewritten(f, rules, dynamic=dynamic)
    eager = results(f, args, grad=grad)
    with _InFloat64():
        exact = results(f, args, dtype=torch.float64, grad=grad)
    mine = results(compiled, args, grad=grad)
    assert len(compiled.matches) == count, [(r.step, r.why) for r in compiled.refusals]
    for match in compiled.matches:
        for name, wanted in fields.items():
            found = getattr(match.spec, name)
            assert found == wanted, f"{name} is {found!r}, not {wanted!r}"
    assert len(mine) == len(eager) == len(exact)
    for position, (a, b, x) in enumerate(zip(mine, eager, exact, strict=True)):
        _compare(a, b, x, f"result {position}")
    return compiled


def assert_no_recurrence(
    f: Function, *args: Any, rules: Sequence[Rule], why: str, step: str | None = None, strict: bool = False, grad: bool = False
) -> None:
    """`f` has a site that is refused, for a reason that matches `why`, and none that is taken."""
    compiled = Rewritten(f, rules, strict=strict)
    results(compiled, args, grad=grad)
    assert not compiled.matches, [m.spec for m in compiled.matches]
    assert any(re.search(why, r.why) and step in (None, r.step) for r in compiled.refusals), [
        (r.step, r.why) for r in compiled.refusals
    ]


def assert_nothing_begun(f: Function, *args: Any, rules: Sequence[Rule]) -> None:
    """No site of `f` looks like a recurrence."""
    compiled = Rewritten(f, rules)
    results(compiled, args, grad=False)
    assert not compiled.matches and not compiled.refusals, [m.spec for m in compiled.matches] + [r.why for r in compiled.refusals]
