"""The roofline of a device, with each site of a report where its arithmetic intensity and its predicted time put it.

    intensity = flops / bytes of main memory,     reached = flops / predicted time

matplotlib draws it, which is not among what the package needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cost_model.hardware import Hardware
from .errors import PlotError
from .explain import Report, rows_of
from .ir import Decision, Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
_MARGIN = 4.0  # factor left around the points and the ridge


@dataclass(frozen=True, kw_only=True)
class Point:
    """One kind of site: `intensity` in flops a byte, `tflops` reached, predicted `seconds` of one of `count` sites alike."""

    label: str
    intensity: float
    tflops: float
    seconds: float
    roof_tflops: float
    count: int
    rewritten: bool


def points(report: Report) -> list[Point]:
    """The sites of a report that were decided by time, alike ones as one. What does no arithmetic has no place on a roofline."""
    found = []
    for decision, where, count in rows_of(report.decisions):
        estimate = _of_chosen(decision)
        if estimate is None or estimate.flops <= 0 or estimate.bytes <= 0 or estimate.total_s <= 0:
            continue
        found.append(
            Point(
                label=f"{decision.family} {where.partition(' ')[0]} ({estimate.candidate}, {estimate.total_s * 1e6:.3g} us)",
                intensity=estimate.flops / estimate.bytes,
                tflops=estimate.flops / estimate.total_s / 1e12,
                seconds=estimate.total_s,
                roof_tflops=estimate.matmul_tflops,
                count=count,
                rewritten=decision.outcome == "rewritten",
            )
        )
    return found


def draw(report: Report, hardware: Hardware) -> Figure:
    """The figure: the sustained bandwidth, the sustained matmul rates of the types that occur, and a marker for each point.

    Raises:
        PlotError: matplotlib is missing, or no site was decided by time.
    """
    figure_type = _figure_type()
    placed = points(report)
    if not placed:
        raise PlotError("Expected a site with a predicted time but got none: there is nothing to place on the roofline.")
    roofs = sorted({point.roof_tflops for point in placed})
    bandwidth = hardware.sustained_bandwidth_gb_s / 1e3  # TB/s, which times flops a byte is TFLOP/s
    span = _span([point.intensity for point in placed], [roof / bandwidth for roof in roofs])
    figure = figure_type(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for roof in roofs:
        corners = [span[0], roof / bandwidth, span[1]]
        axes.plot(corners, [min(roof, bandwidth * x) for x in corners], color="0.4", label=f"{roof:.4g} TFLOP/s sustained")
    for at, point in enumerate(placed):
        times = f" x{point.count}" if point.count > 1 else ""
        axes.plot(
            [point.intensity], [point.tflops], "o", color=f"C{at % 10}", markersize=8, label=point.label + times,
            fillstyle="full" if point.rewritten else "none",
        )  # fmt: skip
    title = f"{hardware.name}: {bandwidth:.3g} TB/s sustained; times are predicted; hollow: left to Inductor"
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte of main memory", ylabel="TFLOP/s", title=title, xlim=span)
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="x-small")
    return figure


def save(report: Report, hardware: Hardware, paths: Iterable[Path | str]) -> None:
    """Write the figure to files, as PNG or SVG by their names.

    Raises:
        PlotError: another kind of file, matplotlib is missing, or no site was decided by time.
    """
    targets = [checked(path) for path in paths]
    figure = draw(report, hardware)
    for path in targets:
        figure.savefig(path)


def checked(path: Path | str) -> Path:
    """The path, if its name is that of a PNG or SVG file.

    Raises:
        PlotError: it is not.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PlotError(f"Expected a file name that ends in {' or '.join(SUFFIXES)} but got path={str(path)!r}.")
    return Path(path)


def _of_chosen(decision: Decision) -> Estimate | None:
    return next((estimate for estimate in decision.estimates if estimate.candidate == decision.chosen), None)


def _span(intensities: Sequence[float], ridges: Sequence[float]) -> tuple[float, float]:
    """Intensities from left to right, with room around points and ridges."""
    all_of_them = (*intensities, *ridges)
    return min(all_of_them) / _MARGIN, max(all_of_them) * _MARGIN


def _figure_type() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("Expected matplotlib to draw with but it is not installed. Run `pip install effcompile[plot]`.") from error
    return Figure
