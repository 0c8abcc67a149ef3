"""The roofline of a report: where points lie, which files are made, and what is refused."""

from __future__ import annotations

import builtins
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

import effcompile
from effcompile import roofline_plot
from effcompile.cli import main
from effcompile.cost_model import devices
from effcompile.errors import PlotError
from effcompile.explain import Frame, Report
from effcompile.ir import Decision, Estimate

pytest.importorskip("matplotlib")
HARDWARE = "mi300x"
B, H, T, D = 2, 4, 2048, 64
FILE = f"""
import torch

class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v

Attention_inputs = tuple(torch.randn({B}, {H}, {T}, {D}, dtype=torch.bfloat16) for _ in range(3))

def double(x):
    return x * 2

double_inputs = (torch.ones(3),)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(FILE)
    return path


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v


def report_of(*estimates: tuple[str, Estimate | None]) -> Report:
    """One site for each estimate, which is that of the candidate chosen."""
    decisions = tuple(
        Decision(
            family="attention",
            outcome="left" if estimate is not None and estimate.candidate == "inductor" else "rewritten",
            why=f"a reason for {where}",
            where=where,
            chosen=estimate.candidate if estimate else "",
            estimates=(estimate,) if estimate else (),
        )
        for where, estimate in estimates
    )
    return Report(frames=(Frame(name="g", outcome="compiled", decisions=decisions),), hardware=HARDWARE)


def estimate(name: str = "triton", **numbers: float) -> Estimate:
    given = {"compute_s": 1e-3, "memory_s": 5e-4, "launch_s": 0.0, "flops": 2e11, "bytes": 1e9, "matmul_tflops": 600.0} | numbers
    return Estimate(candidate=name, **given)


def test_points_lie_where_intensity_and_time_say() -> None:
    dense, memory_bound, none = estimate(), estimate("inductor", flops=1e9, bytes=1e9, compute_s=1e-6), estimate(flops=0.0)
    found = roofline_plot.points(report_of(("a", dense), ("b", memory_bound), ("c", none), ("d", None)))
    assert [(p.intensity, p.tflops, p.rewritten) for p in found] == [
        (200.0, pytest.approx(200.0), True),
        (1.0, pytest.approx(2.0), False),
    ]


def test_sites_alike_are_one_point() -> None:
    decision = report_of(("layers.0.attn (m.py:3)", estimate())).decisions[0]
    twin = Decision(**{**vars(decision), "where": "layers.1.attn (m.py:3)"})
    (point,) = roofline_plot.points(Report(frames=(Frame(name="g", outcome="compiled", decisions=(decision, twin)),)))
    assert point.count == 2 and "layers.0-1.attn" in point.label


def test_a_models_point_is_drawn_below_the_roof() -> None:
    q, k, v = (torch.randn(B, H, T, D, dtype=torch.bfloat16) for _ in range(3))
    report, device = effcompile.explain(attention, q, k, v, hardware=HARDWARE), devices.get(HARDWARE)
    (point,) = roofline_plot.points(report)
    flops, moved = 4 * B * H * T * T * D, 4 * B * H * T * D * 2
    assert point.rewritten and point.intensity == pytest.approx(flops / moved)
    bandwidth = device.sustained_bandwidth_gb_s / 1e3
    assert point.roof_tflops == pytest.approx(device.sustained_matmul_tflops(torch.bfloat16))
    assert 0 < point.tflops < min(point.roof_tflops, bandwidth * point.intensity)
    (axes,) = roofline_plot.draw(report, device).axes
    roof, marker = axes.lines
    assert list(zip(*marker.get_data(), strict=True)) == [(point.intensity, point.tflops)]
    ridge = point.roof_tflops / bandwidth
    assert list(roof.get_xdata())[1] == pytest.approx(ridge)
    assert list(roof.get_ydata()) == pytest.approx([bandwidth * roof.get_xdata()[0], point.roof_tflops, point.roof_tflops])


@pytest.mark.parametrize("option", ["--hardware", "--hw"])
def test_the_command_writes_png_and_svg(file: Path, tmp_path: Path, option: str) -> None:
    png, svg = tmp_path / "roofline.png", tmp_path / "roofline.svg"
    result = CliRunner().invoke(
        main, ["explain", f"{file}:Attention", option, HARDWARE, "--plot", str(png), "--plot", str(svg)]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_the_device_at_hand_is_drawn_if_none_is_named(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "roofline.svg"
    result = CliRunner().invoke(main, ["explain", f"{file}:Attention", "--plot", str(path)])
    assert result.exit_code == 0, result.output
    assert path.is_file()


REFUSED = {
    "another-kind-of-file": ("Attention", "roofline.pdf", "Expected a file name that ends in .png or .svg but got path="),
    "no-site": ("double", "roofline.png", "Expected a site with a predicted time but got none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(file: Path, tmp_path: Path, name: str) -> None:
    model, path, message = REFUSED[name]
    result = CliRunner().invoke(main, ["explain", f"{file}:{model}", "--hw", HARDWARE, "--plot", str(tmp_path / path)])
    assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / path).exists()


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PlotError, match=r"Expected matplotlib to draw with .*pip install effcompile\[plot\]"):
        roofline_plot.draw(report_of(("a", estimate())), devices.get(HARDWARE))
