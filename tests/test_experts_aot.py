"""Every generated kernel of experts builds for every target GPU, fits its shared memory and spills no registers, on no GPU."""

from __future__ import annotations

import pytest
import torch

from effcompile.codegen import aot, experts
from effcompile.codegen.experts import Problem
from effcompile.errors import KernelError
from effcompile.ops.experts import ExpertsSpec

GPT_OSS = "min(gate, 7) * sigmoid(1.702 * min(gate, 7)) * (max(-7, min(up, 7)) + 1)"
SPECS = {
    "swiglu": ExpertsSpec(out="bfloat16"),
    "interleaved": ExpertsSpec(activation=GPT_OSS, interleaved=True, biased=(True, True), out="bfloat16"),
    "pair-input": ExpertsSpec(stacking="pair", weighted="input", biased=(True, True), out="bfloat16"),
    "ungated": ExpertsSpec(activation="max(0, up) ** 2", gated=False, out="bfloat16"),
    "apart": ExpertsSpec(stacking="experts_pair", biased=(True, False), out="bfloat16"),
}
TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
QUICK = {
    ("cuda:90", "swiglu", torch.bfloat16, 3),
    ("cuda:90", "interleaved", torch.bfloat16, 3),
    ("cuda:90", "pair-input", torch.bfloat16, 3),
    ("cuda:90", "apart", torch.bfloat16, 3),
    ("cuda:80", "swiglu", torch.bfloat16, 3),
    ("cuda:100", "swiglu", torch.bfloat16, 3),
    ("hip:gfx942", "swiglu", torch.bfloat16, 3),
}
MATRIX = [
    pytest.param(*case, id="-".join(str(x).removeprefix("torch.") for x in case), marks=() if case in QUICK else pytest.mark.slow)
    for target in TARGETS
    for name in SPECS
    for dtype, tiles in ((torch.bfloat16, 4), (torch.float32, 3))
    for case in [(target, name, dtype, tile) for tile in range(tiles)]
]

FORWARD = ["count_kernel", "order_kernel", "first_kernel", "rows_kernel", "combine_kernel"]
BACKWARD = ["count_kernel", "order_kernel", "slopes_kernel", "rows_kernel", "combine_kernel"]


def kernels(reports: list[aot.Report], spec: ExpertsSpec) -> list[str]:
    """In the order of launches, but those that find out where tensors that stand apart are."""
    names = [report.kernel for report in reports]
    assert ("reach_kernel" in names) == (not spec.is_stacked)
    return [name for name in names if name != "reach_kernel"]


@pytest.mark.parametrize(("target", "name", "dtype", "tile"), MATRIX)
def test_the_chosen_configuration_fits(target: str, name: str, dtype: torch.dtype, tile: int) -> None:
    spec, problem = SPECS[name], Problem(dtype=dtype, arch=aot.architecture(target))
    for along in (True, False):
        reports = aot.compile_experts(spec, problem, target=target, tile=tile, along=along)
        outer = ["outer_kernel"] * (3 if spec.is_pair else 2)
        sums = ["sums_kernel"] * (spec.biased[0] * (1 + spec.is_pair) + spec.biased[1])
        assert kernels(reports, spec) == [*FORWARD, *BACKWARD, "route_kernel", *outer, *sums]
        assert [report for report in reports if not report.fits or report.spill_bytes] == []


@pytest.mark.parametrize("along", [True, False], ids=["along", "across"])
@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
@pytest.mark.parametrize("name", SPECS)
def test_few_assignments(name: str, target: str, along: bool) -> None:
    problem = Problem(dtype=torch.bfloat16, arch=aot.architecture(target))
    reports = aot.compile_experts(
        SPECS[name], problem, target=target, tokens=1, along=along, keep=False, directions=("forward",)
    )  # fmt: skip
    assert kernels(reports, SPECS[name]) == ["few_first_kernel", "few_second_kernel", "combine_kernel"]
    assert [report for report in reports if not report.fits or report.spill_bytes] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_loaded_ahead_on_hopper(dtype: torch.dtype) -> None:
    """The memory of three blocks at least of what the largest products load."""
    problem = Problem(dtype=dtype, arch="sm_90")
    tile = experts.default_config(SPECS["swiglu"], problem).tiles[-1]
    reports = aot.compile_experts(SPECS["swiglu"], problem, target="cuda:90", tile=3, directions=("forward",))
    shared = {report.kernel: report.shared_bytes for report in reports}
    block = tile.first.block_k * (tile.first.block_m + 2 * tile.first.block_n) * dtype.itemsize
    assert shared["first_kernel"] >= 3 * block and shared["rows_kernel"] >= 3 * block


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_configurations_follow_one_rule(arch: str, name: str) -> None:
    for dtype, heights in ((torch.bfloat16, [16, 32, 64, 128]), (torch.float32, [16, 32, 64])):
        config = experts.default_config(SPECS[name], Problem(dtype=dtype, arch=arch))
        assert [tile.first.block_m for tile in config.tiles] == heights
        assert all(tile.first.block_m == tile.rows.block_m == tile.slopes.block_m for tile in config.tiles)
        launches = [config.outer, *(x for tile in config.tiles for x in (tile.first, tile.rows, tile.slopes))]
        assert all(16 <= x.block_n <= 256 and x.num_warps in (4, 8) and 1 <= x.num_stages <= 6 for x in launches)
        assert experts.candidates(SPECS[name], Problem(dtype=dtype, arch=arch))[0] == config


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(KernelError, match="Expected one of .* but got target='cuda:1'"):
        aot.compile_experts(SPECS["swiglu"], Problem(dtype=torch.bfloat16, arch="sm_90"), target="cuda:1")
