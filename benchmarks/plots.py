"""Draws the results that a picture tells best, each as a PNG beside its JSON file, which the README's tables then show.

    python benchmarks/plots.py

Attention: the share of the hardware's floor that each contender reaches, row by row. Length: time and memory over the sequence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("eager-blocked",)  # stands in for eager's error alone
Payload = dict[str, Any]


def attention(payload: Payload) -> Figure:
    """Bars of the floor's share by row, one panel for each pass; a contender without a result has no bar."""
    results = [r for r in payload["results"] if r["contender"] not in LEFT_OUT]
    modes, rows = (list(dict.fromkeys(r[key] for r in results)) for key in ("mode", "row"))
    contenders = sorted(
        dict.fromkeys(r["contender"] for r in results if r.get("of_floor")), key=lambda name: (name != "effarch", name)
    )
    figure = Figure(figsize=(6 * len(modes), 4.5), layout="constrained")
    width = 0.8 / len(contenders)
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        for at, name in enumerate(contenders):
            shares = {r["row"]: r.get("of_floor") or 0.0 for r in results if r["contender"] == name and r["mode"] == mode}
            axes.bar([i + at * width for i in range(len(rows))], [shares.get(row, 0.0) for row in rows], width, label=name)
        axes.set_xticks([i + 0.4 - width / 2 for i in range(len(rows))], rows, rotation=20, ha="right")
        axes.set(title=mode, ylabel="share of the floor", ylim=(0, 1))
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def recurrence_length(payload: Payload) -> Figure:
    """Time and memory over the length, on logarithmic axes."""
    results = payload["results"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("ms", "peak_mb"), ("latency, ms", "memory, MiB"), strict=True):
        for name in dict.fromkeys(r["contender"] for r in results):
            line = [(r["tokens"], r[key]) for r in results if r["contender"] == name and r.get(key)]
            axes.plot([x for x, _ in line], [y for _, y in line], "o-", label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


PLOTS: dict[str, Callable[[Payload], Figure]] = {"attention": attention, "recurrence-length": recurrence_length}


def main() -> None:
    """Read the command line; draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    for path in sorted(parser.parse_args().results.glob("*.json")):
        payload = json.loads(path.read_text())
        if payload.get("benchmark") in PLOTS:
            PLOTS[payload["benchmark"]](payload).savefig(path.with_suffix(".png"))
            print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
