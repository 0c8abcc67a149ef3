"""Which kernels of experts are compiled for which GPU, on no GPU; test_targets.py has what each of them uses."""

from __future__ import annotations

import pytest
import torch

from effcompile.codegen import aot, experts
from effcompile.codegen.experts import Problem
from effcompile.errors import KernelError
from effcompile.ops.experts import ExpertsSpec

from .target_cases import EXPERTS

FORWARD = ["count_kernel", "order_kernel", "first_kernel", "rows_kernel", "combine_kernel"]
BACKWARD = ["count_kernel", "order_kernel", "slopes_kernel", "rows_kernel", "combine_kernel"]


def kernels(reports: list[aot.Report], spec: ExpertsSpec) -> list[str]:
    """In the order of launches, but those that find out where tensors that stand apart are."""
    names = [report.kernel for report in reports]
    assert ("reach_kernel" in names) == (not spec.is_stacked)
    return [name for name in names if name != "reach_kernel"]


@pytest.mark.parametrize("name", EXPERTS)
def test_kernels_of_both_directions(name: str) -> None:
    spec, problem = EXPERTS[name], Problem(dtype=torch.bfloat16, arch="sm_90")
    reports = aot.compile_experts(spec, problem, target="cuda:90", tile=0)
    outer = ["outer_kernel"] * (3 if spec.is_pair else 2)
    sums = ["sums_kernel"] * (spec.biased[0] * (1 + spec.is_pair) + spec.biased[1])
    assert kernels(reports, spec) == [*FORWARD, *BACKWARD, "route_kernel", *outer, *sums]


@pytest.mark.parametrize("name", EXPERTS)
def test_few_assignments(name: str) -> None:
    problem = Problem(dtype=torch.bfloat16, arch="sm_90")
    reports = aot.compile_experts(EXPERTS[name], problem, target="cuda:90", tokens=1, keep=False, directions=("forward",))
    assert kernels(reports, EXPERTS[name]) == ["few_first_kernel", "few_second_kernel", "combine_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_loaded_ahead_on_hopper(dtype: torch.dtype) -> None:
    """The memory of three blocks at least of what the largest products load."""
    problem = Problem(dtype=dtype, arch="sm_90")
    tile = experts.default_config(EXPERTS["swiglu"], problem).tiles[-1]
    reports = aot.compile_experts(EXPERTS["swiglu"], problem, target="cuda:90", tile=3, directions=("forward",))
    shared = {report.kernel: report.shared_bytes for report in reports}
    block = tile.first.block_k * (tile.first.block_m + 2 * tile.first.block_n) * dtype.itemsize
    assert shared["first_kernel"] >= 3 * block and shared["rows_kernel"] >= 3 * block


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_configurations_follow_one_rule(arch: str, name: str) -> None:
    for dtype, heights in ((torch.bfloat16, [16, 32, 64, 128]), (torch.float32, [16, 32, 64])):
        config = experts.default_config(EXPERTS[name], Problem(dtype=dtype, arch=arch))
        assert [tile.first.block_m for tile in config.tiles] == heights
        assert all(tile.first.block_m == tile.rows.block_m == tile.slopes.block_m for tile in config.tiles)
        launches = [config.outer, *(x for tile in config.tiles for x in (tile.first, tile.rows, tile.slopes))]
        assert all(16 <= x.block_n <= 256 and x.num_warps in (4, 8) and 1 <= x.num_stages <= 6 for x in launches)
        assert experts.candidates(EXPERTS[name], Problem(dtype=dtype, arch=arch))[0] == config


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(KernelError, match="Expected one of .* but got target='cuda:1'"):
        aot.compile_experts(EXPERTS["swiglu"], Problem(dtype=torch.bfloat16, arch="sm_90"), target="cuda:1")
