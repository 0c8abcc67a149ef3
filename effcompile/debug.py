"""To see why a pass does what it does: one graph, one pass, every attempt; and a compile as files to read and run.

graph = effcompile.debug.capture(model, *inputs)
graph, log = effcompile.debug.run_pass("attention", graph)
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch.fx import GraphModule

from . import _dynamo, standalone, trace
from .codegen.sources import kernel_source
from .config import Config
from .errors import CaptureError, ConfigError, LiftError
from .explain import Frame, Report
from .ir import Match
from .passes import PASSES
from .passes.normalize import normalize
from .pipeline import Pipeline, Settled, copied, graph_modules

_STAGES, _INPUTS = "effcompile_stages", "effcompile_inputs"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one pass did at one anchor.

    Attributes:
        anchor: name of the node in the graph.
        outcome: "rewritten", "left" (recognised, but nothing was expected to be gained), "refused", or "applied" by normalize.
        step: for a refusal, where recognition stopped.
        where: `file:line` of the model's code.
        module: path of the module that it runs in.
        spec: what was recognised, if something was.
    """

    name: str
    anchor: str
    outcome: str
    why: str = ""
    step: str = ""
    where: str = ""
    module: str = ""
    chosen: str = ""
    spec: Any = field(default_factory=lambda: MappingProxyType({}))

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON-ready values."""
        return {**vars(self), "spec": dict(self.spec)}

    def __str__(self) -> str:
        place = ", ".join(filter(None, (self.module, self.where)))
        start = f"{self.name} at {self.anchor}{f' ({place})' if place else ''}: {self.outcome}"
        if self.outcome == "refused":
            return f"{start} at step {self.step!r}: {self.why}"
        spec = f", {json.dumps(dict(self.spec), sort_keys=True)}" if self.spec else ""
        return f"{start}{f' as {self.chosen}' if self.chosen else ''}{f': {self.why}' if self.why else ''}{spec}"


def capture(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> GraphModule:
    """The lifted graph of `model(*args, **kwargs)`, as the passes see it. Nothing is compiled; the model runs once, eagerly.

    Raises:
        CaptureError: the model is not one graph; `capture_all` gives all of them.
        LiftError: the graph cannot be lifted.
    """
    graphs, breaks = _captured(model, args, kwargs)
    if len(graphs) != 1:
        reasons = "".join(f"\n  graph break: {reason}" for reason in breaks)
        raise CaptureError(f"Expected one graph but got {len(graphs)}: use effcompile.debug.capture_all.{reasons}")
    return graphs[0]


def capture_all(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> tuple[GraphModule, ...]:
    """The lifted graphs of `model(*args, **kwargs)`, in the order in which they run.

    Raises:
        LiftError: a graph cannot be lifted.
    """
    return _captured(model, args, kwargs)[0]


def _captured(model: Callable[..., Any], args: Any, kwargs: Any) -> tuple[tuple[GraphModule, ...], tuple[str, ...]]:
    graphs: list[GraphModule] = []
    errors: list[LiftError] = []

    def collect(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        try:
            graph = trace.lift(module, inputs).graph_module
        except LiftError as error:
            errors.append(error)
            return module.forward
        graph.meta[_STAGES] = ("lift",)
        graph.meta[_INPUTS] = tuple(inputs)
        graphs.append(graph)
        return module.forward

    before = _dynamo.Counters.now()
    _dynamo.compile_apart(model, collect)(*args, **kwargs)
    if errors:
        raise errors[0]
    return tuple(graphs), _dynamo.Counters.now().breaks_since(before)


def example_inputs(graph: GraphModule) -> tuple[Any, ...]:
    """The inputs, parameters among them, with which a captured graph ran: `graph(*example_inputs(graph))` runs it again."""
    return tuple(_dynamo.hint_of(value) for value in graph.meta[_INPUTS])


# -------------------------------------------------------------------- one pass


def run_pass(name: str, graph: GraphModule, *, hardware: str | None = None) -> tuple[GraphModule, tuple[Entry, ...]]:
    """Run one pass by itself on a copy of a captured graph; returns the copy and a log of every attempt.

    A recogniser reads normalized graphs: where `normalize` has not run, it runs first, and the log begins with what it did.
    `hardware` is the profile to decide for, by default that of the device that the graph's tensors are on.

    Raises:
        ConfigError: unknown pass or hardware.
    """
    if name not in PASSES:
        raise ConfigError(f"Expected the name of a pass, one of {', '.join(PASSES)}, but got {name=}")
    result = copied(graph)
    log: list[Entry] = []
    if name == "normalize" or "normalize" not in result.meta.get(_STAGES, ()):
        log += _normalized(result)
    if name == "loops":
        log += _brought(result)
    elif name != "normalize":
        log += _recognised(name, result, hardware)
    result.meta[_STAGES] = (*result.meta.get(_STAGES, ("lift",)), *{"normalize": None, name: None})
    return result, tuple(log)


def _normalized(graph: GraphModule) -> list[Entry]:
    log = []
    for inner in graph_modules(graph):
        for line in normalize(inner):
            rewrite, _, anchor = line.partition(" at ")
            log.append(Entry(name="normalize", anchor=anchor, outcome="applied", why=rewrite.replace("_", " ")))
        inner.recompile()
    return log


def _brought(graph: GraphModule) -> list[Entry]:
    """Loops, scans and closed forms, in the spelling that the recurrences are recognised in."""
    pipeline = Pipeline(Config.resolve(None, {}))
    brought = pipeline.bring_loops(graph)
    log = [
        Entry(name="loops", anchor=x.scan.name, outcome="applied", why=f"a loop of {x.steps} steps as a scan", where=x.where)
        for found in brought
        for x in found.rolled
    ]
    log += [
        Entry(name="loops", anchor=x.anchor.name, outcome="applied", why=f"a {x.what} as linear_scan")
        for found in brought
        for x in found.substitutions
    ]
    return log + [entry_of(settled) for settled in pipeline.settled]


def _recognised(name: str, graph: GraphModule, hardware: str | None) -> list[Entry]:
    options = {"passes": {other: other in (name, "loops") for other in PASSES}}
    pipeline = Pipeline(Config.resolve(None, {**options, **({"hardware": hardware} if hardware else {})}))
    pipeline.recognise(graph, pipeline.hardware([node.meta.get("val") for node in graph.graph.nodes]))
    return [entry_of(settled) for settled in pipeline.settled]


def entry_of(settled: Settled) -> Entry:
    """The log's line for what became of an anchor."""
    attempt, decision = settled.attempt, settled.decision
    at = {"name": attempt.rule, "anchor": attempt.anchor, "where": attempt.where, "module": attempt.module}
    if decision is not None:
        return Entry(
            **at, outcome=decision.outcome, why=decision.why, step=decision.step, chosen=decision.chosen, spec=decision.spec
        )  # fmt: skip
    assert not isinstance(attempt.result, Match)
    return Entry(**at, outcome="refused", why=attempt.result.why, step=attempt.result.step)


# -------------------------------------------------------------------- a compile as files


def dump(directory: Path | str, pipeline: Pipeline, frame: Frame) -> Path:
    """Write what became of one graph to a folder of its own under `directory`, and return that folder.

    0-lifted.py, 1-normalize.py, ...   the graph after each pass; each file runs by itself
    1-normalize.diff, ...              what that pass changed
    attempts.txt                       every anchor and what was made of it
    report.json                        the decisions, with their estimates
    kernels/                           the generated kernels; each file runs by itself
    """
    folder = _new_folder(Path(directory), frame.name)
    before = ""
    for number, (stage, module) in enumerate(pipeline.stages):
        title = f"{frame.name} after {stage}."
        standalone.write(folder / f"{number}-{stage}.py", module, pipeline.example_inputs, title)
        code = standalone.code(module)
        if number:
            earlier = f"{number - 1}-{pipeline.stages[number - 1][0]}"
            changes = _diff(before, code, earlier, f"{number}-{stage}")
            (folder / f"{number}-{stage}.diff").write_text(changes, encoding="utf-8")
        before = code
    lines = [str(entry_of(settled)) for settled in pipeline.settled]
    (folder / "attempts.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    kernels = _write_kernels(folder / "kernels", pipeline)
    report = Report(frames=(frame,), hardware=frame.hardware).to_dict()
    report["attempts"] = [
        {**entry_of(settled).to_dict(), "kernel": kernels.get(position)} for position, settled in enumerate(pipeline.settled)
    ]
    (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    return folder


def _new_folder(directory: Path, name: str) -> Path:
    """`directory/name`, or with a number behind it if that is taken, as by an earlier process."""
    for suffix in ("", *(f"-{n}" for n in range(1, 10_000))):
        folder = directory / f"{name}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"Expected a directory with room for another graph but got dump={str(directory)!r}: empty it")


def _diff(before: str, after: str, earlier: str, later: str) -> str:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), earlier, later, lineterm="")
    return "".join(f"{line}\n" for line in lines) or "# nothing changed\n"


def _write_kernels(folder: Path, pipeline: Pipeline) -> dict[int, str]:
    """The generated kernels, one file each; their names by the position of the attempt that they carry out."""
    names: dict[int, str] = {}
    for position, settled in enumerate(pipeline.settled):
        match = settled.attempt.result
        if settled.decision is None or settled.decision.chosen != "triton" or not isinstance(match, Match):
            continue
        source = kernel_source(match, pipeline.profile.arch if pipeline.profile else "")
        names[position] = f"{match.family}_{hashlib.sha256(source.encode()).hexdigest()[:12]}.py"
        folder.mkdir(exist_ok=True)
        (folder / names[position]).write_text(source, encoding="utf-8")
    return names


__all__ = ["Entry", "capture", "capture_all", "dump", "example_inputs", "run_pass"]
