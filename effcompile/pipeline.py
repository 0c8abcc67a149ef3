"""One graph through the rooms.

    lift -> normalize -> recognise -> decide -> rewrite

What fails at one site leaves that site as it came; what fails on the whole leaves the graph, and the result says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import runtime, trace
from ._torch import DataDependentError, OpOverload
from .codegen import choices
from .config import Config
from .cost_model import devices, select
from .cost_model.hardware import Hardware
from .errors import LiftError, VerifyError, summary
from .explain import Frame
from .ir import Decision, Estimate, Match, Rejected, Rule
from .passes import RULES, loops, rearrange
from .passes.loops import Loops
from .passes.normalize import normalize
from .pattern import GraphView
from .rewrite import Attempt, attempt_again, attempt_all, is_stale, replace, unmatched
from .updates import update_in_place

log = logging.getLogger(__name__)

runtime.register()

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the rooms made of one graph.

    Attributes:
        module: the rewritten graph; None if the original is to be used.
        error: why the whole graph is left alone.
        failures: what went wrong at single sites, which are left alone.
    """

    module: GraphModule | None
    frame: Frame
    error: Exception | None = None
    failures: tuple[Exception, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What became of one anchor; `decision` is None where nothing of the rule's family was begun."""

    attempt: Attempt
    decision: Decision | None


class Pipeline:
    """Takes one graph through the rooms."""

    def __init__(self, config: Config):
        self.config = config
        self.timings: dict[str, float] = {}
        self.settled: list[Settled] = []
        self.stages: list[tuple[str, GraphModule]] = []
        self.example_inputs: tuple[Any, ...] = ()
        self.failures: list[Exception] = []
        self.barriers: tuple[tuple[str, str], ...] = ()
        self.mutating: frozenset[Node] = frozenset()
        self.profile: Hardware | None = None
        self.dared_too_much = False
        self.name = "graph"

    def run(self, module: GraphModule, example_inputs: Sequence[Any]) -> Result:
        """Never raises: what went wrong stands in the result."""
        self.name = f"graph{next(_numbers)}"
        self.example_inputs = tuple(example_inputs)
        try:
            self.profile = self.hardware(example_inputs)
            lifted, rewritten = self.through_the_rooms(module, example_inputs, dare=True)
            if self.dared_too_much:
                self.settled.clear()
                self.stages.clear()
                self.failures.clear()
                lifted, rewritten = self.through_the_rooms(module, example_inputs, dare=False)
        except DataDependentError as error:
            why = f"a pass cannot tell without the data: {summary(error)}"
            return Result(module=None, frame=self.frame("fallback", why), error=LiftError(why))
        except Exception as error:
            why = str(error) if isinstance(error, LiftError) else summary(error)
            log.debug("%s is left as it came", self.name, exc_info=True)
            return Result(module=None, frame=self.frame("fallback", why), error=error)
        frame = self.frame("compiled" if rewritten else "unchanged")
        return Result(module=lifted if rewritten else None, frame=frame, failures=tuple(self.failures))

    def through_the_rooms(self, module: GraphModule, example_inputs: Sequence[Any], *, dare: bool) -> tuple[GraphModule, bool]:
        """The graph that came out, and whether anything in it was replaced. `dare` is that of `passes.loops.bring`."""
        assert self.profile is not None
        lifted = self.lift(module, example_inputs)
        self.normalize(lifted)
        rewritten = self.recognise(lifted, self.profile, dare=dare)
        if rewritten:
            self.update_in_place(lifted)
        return lifted, rewritten

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(settled.decision for settled in self.settled if settled.decision is not None)

    def frame(self, outcome: str, why: str = "", step: str = "graph") -> Frame:
        """The record of what was done so far. In a graph that is left alone, nothing is rewritten."""
        decisions = self.decisions
        if outcome == "fallback":
            decisions = tuple(d if d.outcome == "refused" else _undone(d, why, step) for d in decisions)
        return Frame(
            name=self.name, outcome=outcome, why=why, hardware=self.profile.name if self.profile else "", decisions=decisions,
            attempts=tuple(settled.attempt for settled in self.settled), barriers=self.barriers,
            timings=MappingProxyType(dict(self.timings)),
        )  # fmt: skip

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - start

    # ---------------------------------------------------------------- stages

    def hardware(self, example_inputs: Sequence[Any]) -> Hardware:
        """The device to decide for: the option's, or that of the first tensor that is not on the CPU."""
        if self.config.hardware is not None:
            return devices.get(self.config.hardware)
        tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
        on_gpu = next((x.device for x in tensors if x.device.type != "cpu"), torch.device("cpu"))
        return devices.detect(on_gpu)

    def lift(self, module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
        """The functional ATen graph before autograd."""
        with self.timed("lift"):
            lifted = trace.lift(module, example_inputs)
        self.barriers = tuple(lifted.barriers)
        self.mutating = lifted.mutating
        self.keep("lifted", lifted.graph_module)
        return lifted.graph_module

    @property
    def strict(self) -> bool:
        """Whether the original's rounding points are kept."""
        return self.config.numerics == "strict"

    def normalize(self, module: GraphModule) -> None:
        """One spelling for what has several."""
        if not self.config.enabled("normalize"):
            return
        with self.timed("normalize"):
            for inner in graph_modules(module):
                for line in normalize(inner, strict=self.strict):
                    log.debug("%s: %s", self.name, line)
                inner.recompile()
        self.keep("normalize", module)

    def recognise(self, module: GraphModule, hardware: Hardware, *, dare: bool = True) -> bool:
        """Recognise, decide, replace; whether anything was replaced."""
        rules = [rule for rule in RULES if self.config.enabled(rule.name)]
        early = self.rewrite(module, hardware, [rule for rule in rules if rule.early], None)
        brought = self.bring_loops(module, dare=dare)
        late = self.rewrite(module, hardware, [rule for rule in rules if not rule.early], brought)
        self.forget_refusals_of_what_was_rewritten()
        return early or late or any(found.rolled for found in brought)

    def forget_refusals_of_what_was_rewritten(self) -> None:
        """A refusal of an early rule is no decision where a later one rewrote a site of the same family and module."""
        rewritten = {(x.attempt.family, x.attempt.module) for x in self.settled if _is_rewritten(x)}
        early = {rule.name for rule in RULES if rule.early}
        self.settled = [
            dataclasses.replace(x, decision=None)
            if x.attempt.rule in early and not x.attempt.matched and (x.attempt.family, x.attempt.module) in rewritten
            else x
            for x in self.settled
        ]

    def bring_loops(self, module: GraphModule, *, dare: bool = True) -> list[Loops]:
        """Loops, scans and closed forms in the spelling of `passes.recurrence`; each can be taken back."""
        if not (self.config.enabled("loops") and self.config.enabled("recurrence")):
            return []
        with self.timed("loops"):
            brought = [loops.bring(inner, lambda inner=inner: self.view(inner), dare=dare) for inner in graph_modules(module)]  # type: ignore[misc]
        for found in brought:
            for loop in found.rolled:
                log.debug("%s: a loop of %d steps (%s) is a scan", self.name, loop.steps, loop.where)
            for rejected in found.unrolled:
                self.settle_unmatched(rejected, "loops")
            for rejected in found.refused:
                self.settle_unmatched(rejected, "recurrence")
        if any(found.substitutions or found.rolled for found in brought):
            module.recompile()
        self.keep("loops", module)
        return brought

    def settle_unmatched(self, rejected: Rejected, family: str) -> None:
        """Record what the rules did not get to see. A loop that is no scan is no site of any family: nothing was to be decided."""
        attempt = unmatched(rejected, family)
        log.debug("%s: %s", self.name, attempt)
        if rejected.error is not None:
            self.failures.append(rejected.error)
        self.settled.append(Settled(attempt=attempt, decision=None if family == "loops" else refusal(attempt, rejected)))

    def settle_loops(self, module: GraphModule, brought: list[Loops], outcomes: dict[int, Settled]) -> None:
        """Give back the loops of which a part could not be rewritten; decisions about their other parts are void."""
        returned = []
        with self.timed("rewrite"):
            for found in brought:
                back = loops.settle(found.substitutions)
                self.dared_too_much = self.dared_too_much or (found.daring and bool(back))
                returned += back
        names = {scan.name: x for x in returned for scan in x.scans}
        for position, settled in outcomes.items():
            part = names.get(settled.attempt.anchor)
            if part is not None and _is_rewritten(settled):
                assert settled.decision is not None
                why = f"another state of the same {part.what} cannot be rewritten"
                outcomes[position] = dataclasses.replace(settled, decision=_undone(settled.decision, why, "loop"))
        alive = set()
        for inner in graph_modules(module):
            alive |= {node.name for node in inner.graph.nodes}
            inner.graph.lint()
            inner.recompile()
        self.barriers = tuple(barrier for barrier in self.barriers if barrier[0] in alive)

    def rewrite(self, module: GraphModule, hardware: Hardware, rules: Sequence[Rule], brought: list[Loops] | None) -> bool:
        """Recognise, decide, replace, with loops brought to one spelling; whether anything was replaced."""
        found: list[tuple[GraphModule, Attempt]] = []
        for inner in graph_modules(module):
            with self.timed("match"):
                found += [(inner, attempt) for attempt in attempt_all(self.view(inner), rules)]
        outcomes: dict[int, Settled] = {}
        for rule in rules:
            changed = set()
            for position, (inner, attempt) in enumerate(found):
                if attempt.rule == rule.name:
                    outcomes[position] = self.settle(inner, attempt, rule, hardware)
                    if _is_rewritten(outcomes[position]):
                        changed.add(inner)
            for inner in changed:
                inner.graph.lint()
                inner.recompile()
            self.keep(rule.name, module)
        if brought is not None:
            self.tidy(module, brought, found, outcomes)
        self.settled += [outcomes[position] for position in sorted(outcomes)]
        return any(_is_rewritten(settled) for settled in outcomes.values())

    def tidy(
        self, module: GraphModule, brought: list[Loops], found: list[tuple[GraphModule, Attempt]], outcomes: dict[int, Settled]
    ) -> None:
        """Take back what was done for the sake of sites that were not rewritten."""
        for inner in graph_modules(module):
            names = {x.attempt.anchor for k, x in outcomes.items() if found[k][0] is inner and _is_rewritten(x)}
            for line in rearrange.take_back(inner, names):
                log.debug("%s: %s", self.name, line)
                inner.recompile()
        self.settle_loops(module, brought, outcomes)

    def update_in_place(self, module: GraphModule) -> None:
        """Let recurrences write to the states that they are given, where the graph copies them there."""
        with self.timed("rewrite"):
            updates = update_in_place(module, self.mutating)
        for line in (*updates.made, *updates.left):
            log.debug("%s: %s", self.name, line)
        self.keep("in place", module)

    def view(self, module: GraphModule) -> GraphView:
        """What the recognisers read of a graph."""
        return GraphView(module, strict=self.strict, mutating=self.mutating)

    def settle(self, module: GraphModule, attempt: Attempt, rule: Rule, hardware: Hardware) -> Settled:
        """Decide about one attempt and carry the decision out."""
        if isinstance(attempt.result, Match) and is_stale(attempt.result, module.graph):
            with self.timed("match"):
                attempt = attempt_again(attempt, [rule], self.view(module))
        log.debug("%s: %s", self.name, attempt)
        if attempt.error is not None:
            self.failures.append(attempt.error)
        if isinstance(attempt.result, Rejected):
            none_begun = attempt.result.step == "anchor"
            return Settled(attempt=attempt, decision=None if none_begun else refusal(attempt, attempt.result))
        step = "decide"
        try:
            with self.timed("decide"):
                decision, lower = decide(attempt, attempt.result, hardware)
            step = "rewrite"
            if lower is not None:
                with self.timed("rewrite"):
                    replace(attempt.result, lower)
        except VerifyError as error:
            decision = refusal(attempt, Rejected(step="verify", why=str(error)))
        except Exception as error:
            self.failures.append(error)
            log.debug("%s: %s is left as it came", self.name, attempt.anchor, exc_info=True)
            decision = refusal(attempt, Rejected(step=step, why=f"an internal failure: {summary(error)}"))
        log.info("%s: %s at %s %s: %s", self.name, decision.family, decision.where, decision.outcome, decision.why)
        return Settled(attempt=attempt, decision=decision)

    def keep(self, stage: str, module: GraphModule) -> None:
        """Remember the graph after a stage, if it is to be dumped."""
        if self.config.dump is not None:
            self.stages.append((stage, copied(module)))


def _is_rewritten(settled: Settled) -> bool:
    return settled.decision is not None and settled.decision.outcome == "rewritten"


def _undone(decision: Decision, why: str, step: str) -> Decision:
    return dataclasses.replace(decision, outcome="refused", why=why, step=step, chosen="", estimates=())


def copied(module: GraphModule) -> GraphModule:
    """A copy with a graph of its own, bodies of higher-order operations too; tensors are shared."""
    copy = GraphModule(module, deepcopy(module.graph), class_name=type(module).__name__)
    copy.meta.update(module.meta)
    for name, inner in module.named_modules():
        if isinstance(inner, GraphModule) and name and "." not in name:
            setattr(copy, name, copied(inner))
    return copy


def graph_modules(module: GraphModule) -> list[GraphModule]:
    """A graph and the lifted bodies of its higher-order operations."""
    bodies = [inner for inner in module.modules() if isinstance(inner, GraphModule) and inner is not module]
    return [module, *(body for body in bodies if _is_lifted(body))]


def _is_lifted(body: GraphModule) -> bool:
    """Whether a body is in ATen operators throughout; those of barriers are as Dynamo wrote them."""
    calls = [node for node in body.graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    return bool(calls) and all(node.op == "call_function" and _is_aten(node) for node in calls)


def _is_aten(node: Node) -> bool:
    return isinstance(node.target, OpOverload) or node.target is operator.getitem


def refusal(attempt: Attempt, rejected: Rejected) -> Decision:
    """The decision that a rejection amounts to."""
    return Decision(
        family=attempt.family, outcome="refused", why=rejected.why, where=attempt.site, step=rejected.step
    )  # fmt: skip


def decide(attempt: Attempt, match: Match, hardware: Hardware) -> tuple[Decision, Callable[..., Any] | None]:
    """Choose among the implementations of a match."""
    found = choices.implementations(match, hardware)
    dtype = next(iter(match.inputs.values())).dtype
    best, estimates = select.choose([x.candidate for x in found], hardware, dtype)
    chosen = next(x for x in found if x.candidate is best)
    why = _why(best.name, estimates, hardware) if len(found) > 1 else f"no fused implementation on {hardware.name} expresses it"
    decision = Decision(
        family=match.family, outcome="left" if chosen.lower is None else "rewritten", why=why,
        where=attempt.site, spec=match.spec.to_dict(), chosen=best.name, estimates=estimates,
    )  # fmt: skip
    return decision, chosen.lower


def _why(name: str, estimates: tuple[Estimate, ...], hardware: Hardware) -> str:
    ours = next(e for e in estimates if e.candidate == name)
    others = [e for e in estimates if e.candidate != name]
    nearest = min(others, key=lambda e: e.total_s)
    return (
        f"{name} is expected to take {ours.total_s * 1e6:.0f} us on {hardware.name} ({ours.bound}-bound), "
        f"{nearest.candidate} {nearest.total_s * 1e6:.0f} us"
    )  # fmt: skip
