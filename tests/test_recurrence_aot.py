"""Every generated recurrence kernel builds for every target GPU and fits its shared memory, on no GPU."""

from __future__ import annotations

import pytest
import torch

from effcompile.codegen import aot, recurrence
from effcompile.codegen.recurrence import Problem
from effcompile.errors import KernelError
from effcompile.ops.recurrence import RecurrenceSpec

SPECS = {
    "none": RecurrenceSpec(operands=("q", "k", "initial"), out="bfloat16"),
    "head": RecurrenceSpec(operands=("q", "k", "gate", "initial"), decay="head", out="bfloat16"),
    "normaliser": RecurrenceSpec(operands=("q", "k", "gate"), decay="head", normaliser=True, out="bfloat16"),
    "bonus": RecurrenceSpec(operands=("q", "k", "bonus"), read="before", out="bfloat16"),
    "key": RecurrenceSpec(operands=("q", "k", "gate", "initial"), decay="key", out="bfloat16"),
    "value": RecurrenceSpec(operands=("q", "k", "gate", "initial"), decay="value", out="bfloat16"),
}
SPILLED = {"forward": 96, "backward": 256}  # bytes of registers a thread, in passes over time
QUICK = {
    ("cuda:90", "none", 128),
    ("cuda:90", "head", 128),
    ("cuda:90", "key", 128),
    ("cuda:80", "none", 64),
    ("hip:gfx942", "head", 64),
    ("cuda:100", "head", 64),
}
MATRIX = [
    pytest.param(
        target, name, width, id=f"{target}-{name}-D{width}", marks=() if (target, name, width) in QUICK else pytest.mark.slow
    )
    for target in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
    for name in SPECS
    for width in (64, 128, 256)
]


# The kernels of a pass over time, by direction.
PASSES = {"none": (1, 3), "head": (1, 3), "key": (1, 2), "value": (1, 2)}
ALONE = {"sums_kernel", "slopes_kernel", "weights_kernel", "pairs_kernel"}


@pytest.mark.parametrize(("target", "name", "width"), MATRIX)
def test_the_chosen_configuration_fits(target: str, name: str, width: int) -> None:
    spec, problem = SPECS[name], Problem(d_k=width, d_v=width, dtype=torch.bfloat16, arch=aot.architecture(target))
    config = recurrence.default_config(spec, problem)
    for tile in range(len(config.tiles)):
        for direction, passes in zip(("forward", "backward"), PASSES[spec.decay], strict=True):
            reports = aot.compile_recurrence(spec, problem, target=target, tile=tile, directions=(direction,))
            chunks = [report for report in reports if report.kernel in ("replay_kernel", "chain_kernel")]
            assert len(chunks) == passes
            assert {report.kernel for report in reports} - {report.kernel for report in chunks} <= ALONE
            assert [report for report in reports if not report.fits] == []
            if target in ("cuda:90", "hip:gfx942"):
                assert [report for report in chunks if report.spill_bytes > SPILLED[direction]] == []


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_segments_and_few_steps(target: str) -> None:
    problem = Problem(d_k=64, d_v=64, dtype=torch.bfloat16, arch=aot.architecture(target))
    parts = aot.compile_recurrence(SPECS["head"], problem, target=target, segments=4, directions=("forward",))
    assert [report.kernel for report in parts] == ["sums_kernel", "replay_kernel", "carry_kernel", "replay_kernel"]
    parts = aot.compile_recurrence(SPECS["key"], problem, target=target, segments=4, directions=("forward",))
    assert [report.kernel for report in parts] == ["weights_kernel"] * 2 + ["chain_kernel", "carry_kernel", "chain_kernel"]
    few = aot.compile_recurrence(SPECS["head"], problem, target=target, steps=1, directions=("forward",))
    assert [report.kernel for report in few] == ["step_kernel"]
    assert all(report.fits and report.spill_bytes == 0 for report in few)


def test_chunks_are_loaded_ahead_on_hopper() -> None:
    problem = Problem(d_k=128, d_v=128, dtype=torch.bfloat16, arch="sm_90")
    narrow = recurrence.default_config(SPECS["none"], problem).tiles[-1]
    report = aot.compile_recurrence(SPECS["none"], problem, target="cuda:90", tile=1, directions=("forward",))[0]
    assert report.shared_bytes >= 2 * narrow.chunk * (2 * 128 + narrow.block_m) * 2, "two chunks of q, k and v at least"


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", SPECS)
def test_operands_are_loaded_ahead_wherever_kernels_run_on_hopper(name: str, width: int) -> None:
    """A product whose operands are made in the loop, and not loaded ahead, keeps its descriptors in uniform registers on Hopper;
    where those run out, Triton 3.6 loses some, and the kernel reads outside of shared memory."""
    for other in (16, 64, 256):
        problem = Problem(d_k=width, d_v=other, dtype=torch.bfloat16, arch="sm_90")
        config = recurrence.default_config(SPECS[name], problem)
        assert min(tile.num_stages for tile in (*config.tiles, *config.exchanged)) >= 2


def test_an_unknown_target_is_refused() -> None:
    problem = Problem(d_k=64, d_v=64, dtype=torch.bfloat16, arch="sm_90")
    with pytest.raises(KernelError, match="Expected one of .* but got target='cuda:1'"):
        aot.compile_recurrence(SPECS["none"], problem, target="cuda:1")
