"""Every generated kernel builds for every target GPU, fits its shared memory and keeps its accumulators in registers, on no GPU."""

from __future__ import annotations

import pytest
import torch

from effcompile.codegen import aot
from effcompile.codegen.attention import Problem
from effcompile.errors import KernelError
from effcompile.ops.attention import AttentionSpec

SPECS = {
    "causal": AttentionSpec(score="s * 0.088", mask="j <= i"),
    "window": AttentionSpec(score="s * 0.088", mask="(j <= i) & (i - j < 1024)"),
    "documents": AttentionSpec(score="s * 0.088", mask="(j <= i) & (t0.i[b, i] == t0.i[b, j])", captures=("t0",)),
    "soft-cap": AttentionSpec(score="50 * tanh(s * 0.0625 / 50)", mask="j <= i"),
}
STACK_BYTES = 16  # the assembler's own frame of up to four registers, in the smallest kernels too; a spill takes more
DIMS = {"D64": (64, 64), "D128": (128, 128), "D256": (256, 256), "D192-128": (192, 128)}
QUICK = {("cuda:90", "causal", "D128"), ("cuda:80", "causal", "D64"), ("hip:gfx942", "causal", "D64")}
MATRIX = [
    pytest.param(target, name, dims, id=f"{target}-{name}-{dims}", marks=() if (target, name, dims) in QUICK else pytest.mark.slow)
    for target in ("cuda:80", "cuda:89", "cuda:90", "cuda:100", "hip:gfx942")
    for name in SPECS
    for dims in DIMS
]


@pytest.mark.parametrize(("target", "name", "dims"), MATRIX)
def test_the_chosen_configuration_fits(target: str, name: str, dims: str) -> None:
    d_qk, d_v = DIMS[dims]
    problem = Problem(d_qk=d_qk, d_v=d_v, dtype=torch.bfloat16, arch=aot.architecture(target))
    reports = aot.compile_kernels(SPECS[name], problem, target=target)
    assert {"forward_kernel", "delta_kernel", "dq_kernel", "dkv_kernel"} <= {report.kernel for report in reports}
    assert [report for report in reports if report.spill_bytes > STACK_BYTES or not report.fits] == []


def test_an_unknown_target_is_refused() -> None:
    problem = Problem(d_qk=64, d_v=64, dtype=torch.bfloat16, arch="sm_90")
    with pytest.raises(KernelError, match="Expected one of .* but got target='cuda:1'"):
        aot.compile_kernels(SPECS["causal"], problem, target="cuda:1")
