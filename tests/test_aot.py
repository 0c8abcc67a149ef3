"""Which kernels of attention are compiled for which GPU, on no GPU; test_targets.py has what each of them uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from effcompile.codegen import aot, decode
from effcompile.codegen.attention import Problem
from effcompile.errors import KernelError
from effcompile.ops.attention import AttentionSpec

from .target_cases import ATTENTION, DECODING


def kinds(reports: list[aot.Report]) -> set[str]:
    """What the kernels compute, for whichever GPU they are written."""
    return {report.kernel.removesuffix("_kernel").removesuffix("_hopper") for report in reports}


def test_kernels_for_hopper_where_tiles_can_be_copied() -> None:
    problem = Problem(d_qk=64, d_v=64, dtype=torch.bfloat16, arch="sm_90")
    names = {report.kernel for report in aot.compile_kernels(ATTENTION["causal"], problem, target="cuda:90")}
    assert names == {"forward_hopper_kernel", "delta_kernel", "dq_hopper_kernel", "dkv_hopper_kernel"}
    loaded = aot.compile_kernels(ATTENTION["causal"], replace(problem, copies=False), target="cuda:90")
    assert {report.kernel for report in loaded} == {"forward_kernel", "delta_kernel", "dq_kernel", "dkv_kernel"}


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_a_sink_that_is_a_number(target: str) -> None:
    problem = Problem(d_qk=64, d_v=64, dtype=torch.bfloat16, arch=aot.architecture(target))
    assert kinds(aot.compile_kernels(AttentionSpec(sink="0"), problem, target=target)) == {"forward", "delta", "dq", "dkv"}
    assert aot.compile_decode(AttentionSpec(sink="0"), problem, target=target)


@pytest.mark.parametrize("name", DECODING)
def test_few_queries_load_keys_ahead(name: str) -> None:
    problem = Problem(d_qk=128, d_v=128, dtype=torch.bfloat16, arch="sm_90")
    tile = decode.default_config(DECODING[name], problem).tiles[0]
    report = aot.compile_decode(DECODING[name], problem, target="cuda:90")[0]
    assert report.shared_bytes >= 3 * tile.block_n * (128 + 128) * 2, "three tiles of keys and values"


@pytest.mark.parametrize("compiler", [aot.compile_kernels, aot.compile_decode])
def test_an_unknown_target_is_refused(compiler: Callable[..., list[aot.Report]]) -> None:
    problem = Problem(d_qk=64, d_v=64, dtype=torch.bfloat16, arch="sm_90")
    with pytest.raises(KernelError, match="Expected one of .* but got target='cuda:1'"):
        compiler(ATTENTION["causal"], problem, target="cuda:1")
