"""What became of a model: one record a frame, one decision a site, and a table to print."""

from __future__ import annotations

import io
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import _dynamo
from .config import Config
from .ir import Decision
from .rewrite import Attempt, hits_by_rule

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One graph that reached the backend.

    Attributes:
        outcome: "compiled" (as rewritten), "unchanged" (nothing to rewrite), or "fallback" (handed on as it came, for `why`).
        hardware: name of the profile that was planned for.
        barriers: nodes that were not looked into, each with the reason.
        timings: seconds by stage: lift, normalize, match, decide, rewrite, inductor.
    """

    name: str
    outcome: str
    why: str = ""
    hardware: str = ""
    decisions: tuple[Decision, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    barriers: tuple[tuple[str, str], ...] = ()
    timings: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, kw_only=True)
class Report:
    """All frames of a model or process, and what torch.compile itself left out.

    Attributes:
        graph_breaks: Dynamo's reasons, with the number of times each occurred.
        advice: what would let Dynamo capture more of the model, one sentence each.
        frames_total, frames_fell_back: frames that Dynamo began, and those that it then ran eagerly without a graph break.
    """

    frames: tuple[Frame, ...] = ()
    graph_breaks: tuple[str, ...] = ()
    frames_total: int = 0
    frames_fell_back: int = 0
    hardware: str = ""
    advice: tuple[str, ...] = ()

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
                {
                    "name": f.name,
                    "outcome": f.outcome,
                    "why": f.why,
                    "hardware": f.hardware,
                    "sites": len(f.decisions),
                    "timings": dict(f.timings),
                    "barriers": [list(barrier) for barrier in f.barriers],
                }
                for f in self.frames
            ],
            "graph_breaks": list(self.graph_breaks),
            "advice": list(self.advice),
            "frames_total": self.frames_total,
            "frames_fell_back": self.frames_fell_back,
            "timings": self.timings,
            "rules": {name: list(row) for name, row in hits_by_rule(a for f in self.frames for a in f.attempts).items()},
        }

    def __str__(self) -> str:
        return self.text(min(max(shutil.get_terminal_size((140, 0)).columns, 100), 160))

    def text(self, width: int) -> str:
        """The report in lines of at most `width` columns. Sites that differ in numbers alone, as layers do, share a row."""
        buffer = io.StringIO()
        console = Console(file=buffer, width=width, force_terminal=False, emoji=False)
        title = f"effarch on {self.hardware}" if self.hardware else "effarch"
        if self.decisions:
            console.print(_table(title, rows_of(self.decisions)))
        else:
            console.print(title)
        for line in self._footer():
            console.print(line, highlight=False, markup=False)
        return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().split("\n"))

    def _footer(self) -> list[str]:
        counts = Counter(d.outcome for d in self.decisions)
        sites = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "no site of a known family"
        graphs = f"{len(self.frames)} graph{'' if len(self.frames) == 1 else 's'}"
        lines = [f"{graphs}: {sites}"]
        lines += [f"graph {f.name} was handed on as it came: {f.why}" for f in self.frames if f.outcome == "fallback"]
        if self.frames_fell_back:
            lines.append(f"{self.frames_fell_back} of {self.frames_total} frames ran eagerly without a graph break")
        lines += [f"graph break: {reason}" for reason in self.graph_breaks]
        lines += self.advice
        if self.timings:
            lines.append("seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.timings.items()))
        return lines


def rows_of(decisions: Iterable[Decision]) -> list[tuple[Decision, str, int]]:
    """`(decision, where, number of sites)`: decisions alike but for numbers in where they are, with those as ranges."""
    groups: dict[tuple[str, ...], list[Decision]] = {}
    for d in decisions:
        module, _, line = d.where.partition(" ")
        key = (d.family, d.outcome, d.chosen, d.why, _NUMBER.sub("#", module) if line else module, line)
        groups.setdefault(key, []).append(d)
    return [(found[0], _common([d.where for d in found]), len(found)) for found in groups.values()]


def _common(places: list[str]) -> str:
    """`layers.0.attn (m.py:3)`, `layers.1.attn (m.py:3)` -> `layers.0-1.attn (m.py:3)`."""
    modules = [place.partition(" ")[0] for place in places]
    rest = places[0][len(modules[0]) :]
    if len(set(modules)) == 1:
        return places[0]
    numbers = [[int(n) for n in _NUMBER.findall(module)] for module in modules]
    ranges = iter([_range(sorted(set(column))) for column in zip(*numbers, strict=True)])
    return _NUMBER.sub(lambda _: next(ranges), modules[0]) + rest


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    steady = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if steady else "{" + ",".join(map(str, numbers)) + "}"


def _table(title: str, rows: list[tuple[Decision, str, int]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("family", "outcome", "chosen"):
        table.add_column(name, no_wrap=True)
    table.add_column("sites", no_wrap=True, justify="right")
    table.add_column("where", overflow="fold", ratio=2, min_width=24)
    table.add_column("why", overflow="fold", ratio=3)
    for d, where, count in rows:
        cells = (d.family, d.outcome, d.chosen, str(count), where, f"{d.step}: {d.why}" if d.step else d.why)
        table.add_row(*map(escape, cells))
    return table


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
            {
                "candidate": e.candidate,
                "compute_s": e.compute_s,
                "memory_s": e.memory_s,
                "launch_s": e.launch_s,
                "total_s": e.total_s,
                "bound": e.bound,
                "flops": e.flops,
                "bytes": e.bytes,
            }
            for e in decision.estimates
        ],
    }


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
    names = {frame.hardware: None for frame in frames if frame.hardware}
    return Report(
        frames=frames,
        graph_breaks=now.breaks_since(since),
        frames_total=now.total - since.total,
        frames_fell_back=(now.total - now.ok) - (since.total - since.ok),
        hardware=hardware or ", ".join(names),
        advice=now.advice_since(since),
    )


def explain(
    model: Callable[..., Any], /, *args: Any, hardware: str | None = None, dump: str | Path | None = None, **kwargs: Any
) -> Report:
    """Capture `model(*args, **kwargs)` as torch.compile would, and say what effarch makes of it. Nothing is compiled.

    The model runs once, eagerly, graph by graph. `hardware` names the device to decide for (`effarch hw list` lists them);
    by default the one that the tensors are on.

    Raises:
        ConfigError: unknown hardware.
    """
    from .pipeline import Pipeline

    config = Config.resolve(None, {**({"hardware": hardware} if hardware else {}), **({"dump": dump} if dump else {})})
    frames: list[Frame] = []

    def collect(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        pipeline = Pipeline(config)
        frame = pipeline.run(module, example_inputs).frame
        frames.append(frame)
        if config.dump is not None:
            from .debug import dump as write

            write(config.dump, pipeline, frame)
        return module.forward

    since = _dynamo.Counters.now()
    _dynamo.compile_apart(model, collect)(*args, **kwargs)
    return _report(tuple(frames), since, config.hardware or "")
