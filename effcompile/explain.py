"""What became of a model: one record a frame, one decision a site, and a table to print."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import _dynamo
from .config import Config
from .ir import Decision
from .rewrite import Attempt, hits_by_rule


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One graph that reached the backend.

    Attributes:
        outcome: "compiled" (as rewritten), "unchanged" (nothing to rewrite), or "fallback" (handed on as it came, for `why`).
        timings: seconds by stage: lift, normalize, match, decide, rewrite, inductor.
    """

    name: str
    outcome: str
    why: str = ""
    decisions: tuple[Decision, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    barriers: tuple[tuple[str, str], ...] = ()
    timings: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, kw_only=True)
class Report:
    """All frames of a model or process, and what torch.compile itself left out.

    Attributes:
        graph_breaks: Dynamo's reasons, with the number of times each occurred.
        frames_total, frames_fell_back: frames that Dynamo began, and those that it then ran eagerly without a graph break.
    """

    frames: tuple[Frame, ...] = ()
    graph_breaks: tuple[str, ...] = ()
    frames_total: int = 0
    frames_fell_back: int = 0
    hardware: str = ""

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """All sites, in graph order."""
        return tuple(decision for frame in self.frames for decision in frame.decisions)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by stage, summed over frames."""
        total: Counter[str] = Counter()
        for frame in self.frames:
            total.update(frame.timings)
        return dict(total)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "hardware": self.hardware,
            "decisions": [decision_dict(d) for d in self.decisions],
            "frames": [
                {"name": f.name, "outcome": f.outcome, "why": f.why, "timings": dict(f.timings), "barriers": [list(b) for b in f.barriers]}
                for f in self.frames
            ],
            "graph_breaks": list(self.graph_breaks),
            "frames_total": self.frames_total,
            "frames_fell_back": self.frames_fell_back,
            "timings": self.timings,
            "rules": {name: list(row) for name, row in hits_by_rule(a for f in self.frames for a in f.attempts).items()},
        }

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=140, force_terminal=False)
        console.print(self._table())
        for line in self._footer():
            console.print(line, highlight=False, markup=False)
        return buffer.getvalue().rstrip()

    def _table(self) -> Table:
        table = Table(title=f"effarch on {self.hardware}" if self.hardware else "effarch")
        for column in ("family", "outcome", "chosen", "where", "why"):
            table.add_column(column, overflow="fold")
        for d in self.decisions:
            table.add_row(d.family, d.outcome, d.chosen, d.where, d.why)
        return table

    def _footer(self) -> list[str]:
        counts = Counter(d.outcome for d in self.decisions)
        sites = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "no site of a known family"
        lines = [f"{len(self.frames)} graph(s): {sites}"]
        lines += [f"graph {f.name} was handed on unchanged: {f.why}" for f in self.frames if f.outcome == "fallback"]
        if self.frames_fell_back:
            lines.append(f"{self.frames_fell_back} of {self.frames_total} frames ran eagerly without a graph break")
        lines += [f"graph break: {reason}" for reason in self.graph_breaks]
        ours = {k: v for k, v in self.timings.items() if k != "inductor"}
        if ours:
            lines.append("seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.timings.items()))
        return lines


def decision_dict(decision: Decision) -> dict[str, Any]:
    """A decision as JSON-ready values."""
    return {
        "family": decision.family,
        "outcome": decision.outcome,
        "why": decision.why,
        "where": decision.where,
        "chosen": decision.chosen,
        "spec": dict(decision.spec),
        "step": decision.step,
        "estimates": [
            {"candidate": e.candidate, "total_s": e.total_s, "bound": e.bound} for e in decision.estimates
        ],
    }  # fmt: skip


# -------------------------------------------------------------------- the process's own record

_frames: list[Frame] = []
_since = _dynamo.Counters()


def record(frame: Frame) -> None:
    """Remember a compiled frame for `last_report`."""
    _frames.append(frame)


def last_report() -> Report:
    """All frames that the backend compiled in this process since `reset_report`."""
    return _report(tuple(_frames), _since)


def reset_report() -> None:
    """Forget the frames compiled so far."""
    global _since
    _frames.clear()
    _since = _dynamo.Counters.now()


def _report(frames: tuple[Frame, ...], since: _dynamo.Counters, hardware: str = "") -> Report:
    now = _dynamo.Counters.now()
    return Report(
        frames=frames,
        graph_breaks=now.breaks_since(since),
        frames_total=now.total - since.total,
        frames_fell_back=(now.total - now.ok) - (since.total - since.ok),
        hardware=hardware,
    )


def explain(
    model: Callable[..., Any], /, *args: Any, hardware: str | None = None, dump: str | Path | None = None, **kwargs: Any
) -> Report:
    """Capture `model(*args, **kwargs)` as torch.compile would, and say what effarch makes of it. Nothing is compiled.

    The model runs once, eagerly, graph by graph. `hardware` names the device to decide for (`effarch hardware` lists them);
    by default the one that the tensors are on.

    Raises:
        ConfigError: unknown hardware.
    """
    from .backend import Pipeline

    config = Config.resolve(None, {"hardware": hardware, "dump": None if dump is None else str(dump)})
    frames: list[Frame] = []
    used: list[str] = []

    def collect(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        result = Pipeline(config).run(module, example_inputs)
        frames.append(result.frame)
        used.append(result.hardware)
        return module.forward

    since = _dynamo.Counters.now()
    compiled = torch.compile(model, backend=collect)
    compiled(*args, **kwargs)
    return _report(tuple(frames), since, hardware or (used[0] if used else ""))
