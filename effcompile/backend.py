"""The backend: a graph goes through the rooms once, and on to Inductor.

    lift -> normalize -> recognise -> decide -> rewrite -> Inductor

Whatever fails on the way, the graph goes to Inductor as it came, and the report says why.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import operator
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import _dynamo, runtime, trace
from .codegen import choices
from .config import Config
from .cost_model import profiles, select
from .cost_model.hardware import Hardware
from .errors import ConfigError, EffcompileError, LiftError
from .explain import Frame, Report, last_report, record
from .ir import Decision, Estimate, Match, Rejected
from .passes import RULES
from .passes.normalize import normalize
from .pattern import GraphView
from .rewrite import Attempt, attempt_all, replace

log = logging.getLogger(__name__)

runtime.register()

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the rooms made of one graph: `module` is the rewritten graph, None if the original is to be used."""

    module: GraphModule | None
    frame: Frame
    hardware: str
    error: Exception | None = None


class Pipeline:
    """Takes one graph through the rooms."""

    def __init__(self, config: Config):
        self.config = config
        self.timings: dict[str, float] = {}
        self.decisions: list[Decision] = []
        self.attempts: list[Attempt] = []
        self.stages: list[tuple[str, str]] = []
        self.barriers: tuple[tuple[str, str], ...] = ()
        self.name = f"graph{next(_numbers)}"

    def run(self, module: GraphModule, example_inputs: Sequence[Any]) -> Result:
        """Never raises: what went wrong stands in the result."""
        hardware = ""
        try:
            profile = self.hardware(example_inputs)
            hardware = profile.name
            lifted = self.lift(module, example_inputs)
            self.normalize(lifted)
            rewritten = self.rewrite(lifted, profile)
        except Exception as error:
            why = str(error) if isinstance(error, LiftError) else f"{type(error).__name__}: {error}"
            log.debug("%s goes to Inductor unchanged", self.name, exc_info=True)
            return Result(module=None, frame=self.frame("fallback", why), hardware=hardware, error=error)
        outcome = "compiled" if rewritten else "unchanged"
        return Result(module=lifted if rewritten else None, frame=self.frame(outcome), hardware=hardware)

    def frame(self, outcome: str, why: str = "") -> Frame:
        """The record of what was done so far."""
        return Frame(
            name=self.name, outcome=outcome, why=why, decisions=tuple(self.decisions), attempts=tuple(self.attempts),
            barriers=self.barriers, timings=MappingProxyType(dict(self.timings)),
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
        """The device to decide for: the option's, or that of the first tensor."""
        if self.config.hardware is not None:
            return profiles.get(self.config.hardware)
        tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
        on_gpu = next((x.device for x in tensors if x.device.type != "cpu"), torch.device("cpu"))
        return profiles.detect(on_gpu)

    def lift(self, module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
        """The functional ATen graph before autograd."""
        with self.timed("lift"):
            lifted = trace.lift(module, example_inputs)
        self.barriers = tuple(lifted.barriers)
        self.keep("lifted", lifted.graph_module)
        return lifted.graph_module

    def normalize(self, module: GraphModule) -> None:
        """One spelling for what has several."""
        if not self.config.enabled("normalize"):
            return
        with self.timed("normalize"):
            for inner in graph_modules(module):
                for line in normalize(inner):
                    log.debug("%s: %s", self.name, line)
        self.keep("normalized", module)

    def rewrite(self, module: GraphModule, hardware: Hardware) -> bool:
        """Recognise, decide, replace; whether anything was replaced."""
        rules = [rule for rule in RULES if self.config.enabled(rule.name)]
        count = 0
        for inner in graph_modules(module):
            view = GraphView(inner, strict=self.config.numerics == "strict")
            with self.timed("match"):
                attempts = attempt_all(view, rules)
            self.attempts += attempts
            for attempt in attempts:
                count += self.settle(attempt, hardware)
            if count:
                inner.graph.lint()
                inner.recompile()
        self.keep("rewritten", module)
        return count > 0

    def settle(self, attempt: Attempt, hardware: Hardware) -> bool:
        """Decide about one attempt and carry the decision out; whether the graph changed."""
        log.debug("%s", attempt)
        if isinstance(attempt.result, Rejected):
            if attempt.result.step != "anchor":
                self.decisions.append(refusal(attempt, attempt.result))
            return False
        with self.timed("decide"):
            decision, lower = decide(attempt, attempt.result, hardware)
        if lower is not None:
            with self.timed("rewrite"):
                try:
                    replace(attempt.result, lower)
                except EffcompileError as error:
                    rejected = Rejected(step="verify", why=str(error), node=attempt.result.output)
                    decision, lower = refusal(attempt, rejected), None
        self.decisions.append(decision)
        return lower is not None

    def keep(self, stage: str, module: GraphModule) -> None:
        """Remember the graph after a stage, if it is to be dumped."""
        if self.config.dump is not None:
            self.stages.append((stage, module.print_readable(print_output=False)))


def graph_modules(module: GraphModule) -> list[GraphModule]:
    """A graph and the lifted bodies of its higher-order operations."""
    bodies = [inner for inner in module.modules() if isinstance(inner, GraphModule) and inner is not module]
    return [module, *(body for body in bodies if _is_lifted(body))]


def _is_lifted(body: GraphModule) -> bool:
    """Whether a body is in ATen operators throughout; those of barriers are as Dynamo wrote them."""
    calls = [node for node in body.graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    return bool(calls) and all(node.op == "call_function" and _is_aten(node) for node in calls)


def _is_aten(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem


def refusal(attempt: Attempt, rejected: Rejected) -> Decision:
    """The decision that a rejection amounts to."""
    return Decision(
        family=attempt.family, outcome="refused", why=rejected.why, where=attempt.where or attempt.module, step=rejected.step
    )  # fmt: skip


def decide(attempt: Attempt, match: Match, hardware: Hardware) -> tuple[Decision, Callable[..., Any] | None]:
    """Choose among the implementations of a match."""
    found = choices.implementations(match, hardware)
    dtype = match.inputs["q"].dtype if "q" in match.inputs else next(iter(match.inputs.values())).dtype
    best, estimates = select.choose([x.candidate for x in found], hardware, dtype)
    chosen = next(x for x in found if x.candidate is best)
    why = _why(best.name, estimates, hardware) if len(found) > 1 else f"no fused implementation on {hardware.name} expresses it"
    decision = Decision(
        family=match.family, outcome="left" if chosen.lower is None else "rewritten", why=why,
        where=attempt.where or attempt.module, spec=match.spec.to_dict(), chosen=best.name, estimates=estimates,
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


# -------------------------------------------------------------------- the entry point


def effarch(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """The torch.compile backend. Registered under its name by entry point, so that no import is needed.

    Args:
        mode: as for Inductor: "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs".
        options: see `effcompile.config.Config`.

    Raises:
        ConfigError: an unknown option or a value that an option does not take.
    """
    config = Config.resolve(mode, options)
    pipeline = Pipeline(config)
    result = pipeline.run(module, example_inputs)
    settings = {**_dynamo.mode_options(config.mode), **config.inductor}
    frame = result.frame
    start = time.perf_counter()
    if result.error is not None:
        compiled = _fall_back(module, example_inputs, config, settings, result.error, frame.why)
    elif result.module is None:
        compiled = _dynamo.inductor(module, example_inputs, settings)
    else:
        compiled, frame = _compile_rewritten(pipeline, result, module, example_inputs, settings)
    timings = {**frame.timings, "inductor": time.perf_counter() - start}
    frame = Frame(**{**vars(frame), "timings": MappingProxyType(timings)})
    record(frame)
    _deliver(config, pipeline, frame, result.hardware)
    return compiled


def _compile_rewritten(
    pipeline: Pipeline, result: Result, module: GraphModule, example_inputs: Sequence[Any], settings: dict[str, Any]
) -> tuple[Callable[..., Any], Frame]:
    assert result.module is not None
    try:
        return _dynamo.inductor(result.module, example_inputs, settings), result.frame
    except Exception as error:
        why = f"Inductor could not compile the rewritten graph: {type(error).__name__}: {error}"
        compiled = _fall_back(module, example_inputs, pipeline.config, settings, error, why)
        pipeline.decisions = [
            Decision(family=d.family, outcome="refused", why=why, where=d.where, spec=d.spec, step="inductor") for d in pipeline.decisions
        ]
        return compiled, pipeline.frame("fallback", why)


_warned: set[str] = set()


def _fall_back(
    module: GraphModule, example_inputs: Sequence[Any], config: Config, settings: dict[str, Any], error: Exception, why: str
) -> Callable[..., Any]:
    """What the option `fallback` says of a graph that we cannot handle."""
    if config.fallback == "error":
        raise error
    expected = isinstance(error, LiftError)
    if not expected and why not in _warned:
        _warned.add(why)
        warnings.warn(f"effarch left a graph to {config.fallback} unchanged: {why}", stacklevel=2)
    if config.fallback == "eager":
        return module.forward
    return _dynamo.inductor(module, example_inputs, settings)


def _deliver(config: Config, pipeline: Pipeline, frame: Frame, hardware: str) -> None:
    """Hand the report to where the options send it."""
    if config.dump is not None:
        from .debug import dump

        dump(Path(config.dump), pipeline, frame)
    if config.report is False:
        return
    if config.report is True:
        print(Report(frames=(frame,), hardware=hardware), file=sys.stderr)
    elif callable(config.report):
        config.report(Report(frames=(frame,), hardware=hardware))
    else:
        Path(str(config.report)).write_text(json.dumps(last_report().to_dict(), indent=2))


__all__ = ["ConfigError", "Pipeline", "effarch"]
