"""Which kernels of a recurrence are compiled for which GPU, on no GPU; test_targets.py has what each of them uses."""

from __future__ import annotations

import pytest
import torch

from effcompile.codegen import aot, recurrence
from effcompile.codegen.recurrence import Problem
from effcompile.errors import KernelError

from .target_cases import RECURRENCES

# The kernels of a pass over time, by direction.
PASSES = {"none": (1, 3), "head": (1, 3), "key": (1, 2), "value": (1, 2)}
ALONE = {"sums_kernel", "slopes_kernel", "weights_kernel", "pairs_kernel"}


@pytest.mark.parametrize("name", RECURRENCES)
@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_the_passes_over_time(target: str, name: str) -> None:
    spec, problem = RECURRENCES[name], Problem(d_k=64, d_v=64, dtype=torch.bfloat16, arch=aot.architecture(target))
    config = recurrence.default_config(spec, problem)
    for tile in range(len(config.tiles)):
        for direction, passes in zip(("forward", "backward"), PASSES[spec.decay], strict=True):
            reports = aot.compile_recurrence(spec, problem, target=target, tile=tile, directions=(direction,))
            chunks = [report for report in reports if report.kernel in ("replay_kernel", "chain_kernel")]
            assert len(chunks) == passes
            assert {report.kernel for report in reports} - {report.kernel for report in chunks} <= ALONE


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_segments_and_few_steps(target: str) -> None:
    problem = Problem(d_k=64, d_v=64, dtype=torch.bfloat16, arch=aot.architecture(target))
    parts = aot.compile_recurrence(RECURRENCES["head"], problem, target=target, segments=4, directions=("forward",))
    assert [report.kernel for report in parts] == ["sums_kernel", "replay_kernel", "carry_kernel", "replay_kernel"]
    parts = aot.compile_recurrence(RECURRENCES["key"], problem, target=target, segments=4, directions=("forward",))
    assert [report.kernel for report in parts] == ["weights_kernel"] * 2 + ["chain_kernel", "carry_kernel", "chain_kernel"]
    few = aot.compile_recurrence(RECURRENCES["head"], problem, target=target, steps=1, directions=("forward",))
    assert [report.kernel for report in few] == ["step_kernel"]
    assert all(report.fits and report.spill_bytes == 0 for report in few)


def test_chunks_are_loaded_ahead_on_hopper() -> None:
    problem = Problem(d_k=128, d_v=128, dtype=torch.bfloat16, arch="sm_90")
    narrow = recurrence.default_config(RECURRENCES["none"], problem).tiles[-1]
    report = aot.compile_recurrence(RECURRENCES["none"], problem, target="cuda:90", tile=1, directions=("forward",))[0]
    assert report.shared_bytes >= 2 * narrow.chunk * (2 * 128 + narrow.block_m) * 2, "two chunks of q, k and v at least"


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", RECURRENCES)
def test_operands_are_loaded_ahead_wherever_kernels_run_on_hopper(name: str, width: int) -> None:
    """A product whose operands are made in the loop, and not loaded ahead, keeps its descriptors in uniform registers on Hopper;
    where those run out, Triton 3.6 loses some, and the kernel reads outside of shared memory."""
    for other in (16, 64, 256):
        problem = Problem(d_k=width, d_v=other, dtype=torch.bfloat16, arch="sm_90")
        config = recurrence.default_config(RECURRENCES[name], problem)
        assert min(tile.num_stages for tile in (*config.tiles, *config.exchanged)) >= 2


def test_an_unknown_target_is_refused() -> None:
    problem = Problem(d_k=64, d_v=64, dtype=torch.bfloat16, arch="sm_90")
    with pytest.raises(KernelError, match="Expected one of .* but got target='cuda:1'"):
        aot.compile_recurrence(RECURRENCES["none"], problem, target="cuda:1")
