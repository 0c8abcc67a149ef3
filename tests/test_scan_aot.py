"""The kernels of step-by-step recurrences build for every target GPU, fit it, and keep what they carry in registers, on no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effcompile.codegen import aot
from effcompile.errors import KernelError
from effcompile.ops.recurrence import RecurrenceSpec

Problem = tuple[RecurrenceSpec, Tensor, list[Tensor]]
STACK_BYTES = 16  # the assembler's own frame of up to four registers, in the smallest kernels too; a spill takes more
HALF = torch.bfloat16


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads_last(b: int, h: int, t: int, d: int, dtype: torch.dtype) -> Tensor:
    return shaped(b, t, h, d, dtype=dtype).transpose(1, 2)


def gated(b: int, h: int, t: int, d: int, dtype: torch.dtype, **fields: str) -> Problem:
    """HGRN, minGRU and the like."""
    v, gate = heads_last(b, h, t, d, dtype), heads_last(b, h, t, d, dtype).unsqueeze(3)
    spec = RecurrenceSpec(operands=("gate", "initial"), decay="value", out=str(dtype).removeprefix("torch."), **fields)  # type: ignore[arg-type]
    return spec, v, [gate, shaped(b, h, 1, d)]


def rated(b: int, t: int, d: int) -> Problem:
    """RG-LRU: a logarithm times a rate of each channel."""
    spec = RecurrenceSpec(operands=("gate", "rate"), decay="value")
    return spec, shaped(b, 1, t, d), [shaped(b, 1, t, 1, d), shaped(1, 1, 1, 1, d)]


def selective(b: int, t: int, d: int, n: int, dtype: torch.dtype = torch.float32) -> Problem:
    """Mamba."""
    spec = RecurrenceSpec(operands=("q", "k", "gate", "rate"), decay="full", out=str(dtype).removeprefix("torch."))
    key, gate = shaped(b, 1, t, n, dtype=dtype), shaped(b, 1, t, 1, d, dtype=dtype)
    return spec, shaped(b, 1, t, d, dtype=dtype), [key, key, gate, shaped(1, 1, 1, n, d)]


PROBLEMS: dict[str, Problem] = {
    "few-columns": gated(1, 1, 8192, 1024, torch.float32),
    "some-columns": gated(1, 32, 8192, 128, HALF),
    "many-columns": gated(4, 64, 4096, 128, HALF),
    "many-columns-float32": gated(8, 32, 2048, 256, torch.float32),
    "factor-before": gated(8, 8, 1024, 64, torch.float32, gate="factor", read="before"),
    "one-step": gated(1, 32, 1, 128, torch.float32),
    "rated": rated(1, 2048, 2560),
    "selective": selective(1, 2048, 5120, 16),
    "selective-batch": selective(8, 2048, 5120, 16, HALF),
    "selective-one-step": selective(1, 1, 5120, 16),
}
QUICK = {
    ("cuda:90", "some-columns"),
    ("cuda:90", "few-columns"),
    ("cuda:90", "selective"),
    ("cuda:80", "rated"),
    ("hip:gfx942", "selective"),
}
MATRIX = [
    pytest.param(target, name, id=f"{target}-{name}", marks=() if (target, name) in QUICK else pytest.mark.slow)
    for target in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
    for name in PROBLEMS
]


@pytest.mark.parametrize(("target", "name"), MATRIX)
def test_the_chosen_launch_fits(target: str, name: str) -> None:
    spec, v, operands = PROBLEMS[name]
    reports = aot.compile_scan(spec, v, operands, target=target)
    kernels = {report.kernel for report in reports}
    assert kernels >= {"forward_kernel", "backward_kernel"}
    assert ("summary_kernel" in kernels) == (name == "few-columns")
    assert [report for report in reports if report.spill_bytes > STACK_BYTES or not report.fits] == []


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(KernelError, match="Expected one of .* but got target='cuda:1'"):
        aot.compile_scan(*PROBLEMS["rated"], target="cuda:1")
