"""Launches past Triton's look-up hand the driver what Triton itself would; kernels are compiled side by side, once for new shapes.

A driver without a GPU stands in: kernels are really compiled, for an H100, and their launches noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from effcompile.codegen import attention, emit
from effcompile.ops.attention import AttentionSpec

CAUSAL = AttentionSpec(score="s * 0.2", mask="j <= i")
DOCUMENTS = AttentionSpec(score="s * 0.2", mask="(j <= i) & (t0.i[b, i] == t0.i[b, j])", captures=("t0",))


class Noting:
    """A driver of one imaginary H100 that notes the arguments of each launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[Any, ...]]] = []
        self.compiled: list[str] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, *rest: (0, name, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448, "multiprocessor_count": 132},
        )

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.compiled.append(metadata.name)
        return lambda x, y, z, stream, function, packed, *rest: self.launches.append((function, (x, y, z, *rest[3:])))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Noting]:
    noting = Noting()
    monkeypatch.setattr(triton.runtime.driver, "_active", noting)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "triton")
        yield noting


def kernels(spec: AttentionSpec, arch: str, directory: Path) -> ModuleType:
    problem = attention.Problem(d_qk=32, d_v=32, dtype=torch.bfloat16, arch=arch)
    return emit.load_kernel(emit.write_kernel(attention.source(spec, problem), directory))


def operands(spec: AttentionSpec, t: int = 64) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and captured tensors."""
    shapes = [(1, 4, t, 32), (1, 2, t, 32), (1, 2, t, 32)]
    captures = [torch.zeros(1, t, dtype=torch.int64) for _ in spec.captures]
    return [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes], captures


def run(module: ModuleType, spec: AttentionSpec, t: int = 64) -> None:
    tensors, captures = operands(spec, t)
    out, lse = module.forward(*tensors, *captures)
    module.backward(torch.zeros_like(out), *tensors, out, lse, *captures)


def plain(value: Any) -> Any:
    """An argument without its address."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    return plain(value.base) if hasattr(value, "block_shape") else value


def noted(driver: Noting) -> list[tuple[str, tuple[Any, ...]]]:
    found = [(name, tuple(map(plain, arguments))) for name, arguments in driver.launches]
    driver.launches.clear()
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("spec", [CAUSAL, DOCUMENTS], ids=["causal", "documents"])
def test_the_second_launch_is_the_first_again(driver: Noting, tmp_path: Path, spec: AttentionSpec, arch: str) -> None:
    module = kernels(spec, arch, tmp_path)
    run(module, spec)
    first = noted(driver)
    compiled = len(driver.compiled)
    assert len(module.KNOWN) == compiled >= 4
    run(module, spec)
    assert noted(driver) == first
    assert len(driver.compiled) == compiled


def test_other_lengths_are_told_apart(driver: Noting, tmp_path: Path) -> None:
    module = kernels(CAUSAL, "sm_90", tmp_path)
    run(module, CAUSAL, 64)
    noted(driver)
    run(module, CAUSAL, 72)
    longer = noted(driver)
    fresh = kernels(CAUSAL, "sm_90", tmp_path / "fresh")
    run(fresh, CAUSAL, 72)
    assert noted(driver) == longer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(8), torch.zeros(8)[1:]),
        (1, 2),
        (16, 17),
        (2**20, 2**40),
        (None, 0),
    ],
    ids=["dtype", "address", "one", "multiple-of-16", "wide", "none"],
)
def test_kinds_that_compile_apart(tmp_path: Path, one: Any, other: Any) -> None:
    kind_of = kernels(CAUSAL, "sm_90", tmp_path).kind_of
    assert kind_of(one) != kind_of(other)
    assert kind_of(one) == kind_of(one)


ON_GPU = SimpleNamespace(shape=(1,), stride=lambda: (1,), dtype=torch.bfloat16, device=torch.device("cuda"))


def start_all(module: ModuleType, start: Any) -> None:
    """Forward and backward by `start` alone, as `begin` has them."""
    q, k, v = operands(CAUSAL)[0]
    lse = torch.empty(q.shape[:3])
    module.launch_forward(start, q, k, v, torch.empty_like(q), lse, module.FORWARD)
    module.launch_dkv(start, q, q, k, v, lse, lse, None, torch.empty_like(k), torch.empty_like(v), module.DKV)
    module.launch_dq(start, q, q, k, v, lse, lse, torch.empty_like(q), module.DQ)


@pytest.mark.parametrize("fails", [False, True], ids=["compiled", "failed"])
def test_new_shapes_are_compiled_first(driver: Noting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    module = kernels(CAUSAL, "sm_90", tmp_path)
    prepared: list[str] = []

    class AtOnce(Executor):
        """Does what is submitted before it returns, or fails to."""

        def __init__(self, workers: int, **options: Any) -> None:
            pass

        def submit(self, fn: Any, /, *args: Any, **options: Any) -> Future[Any]:
            assert driver.launches == []
            prepared.append(fn.__self__.__name__)
            if not fails:
                fn(*args, **options)
            return Future()

    monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)
    names = ["forward_hopper_kernel", "dkv_hopper_kernel", "dq_hopper_kernel"]
    module.begin(lambda start: start_all(module, start), ON_GPU)
    assert prepared == names
    assert [name for name, _ in driver.launches] == names
    driver.launches.clear()
    module.begin(lambda start: start_all(module, start), ON_GPU)
    assert prepared == names, "known shapes are not prepared again"
    assert [name for name, _ in driver.launches] == names


def test_compiling_side_by_side(driver: Noting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    module = kernels(CAUSAL, "sm_90", tmp_path)
    module.begin(lambda start: start_all(module, start), ON_GPU)
    assert len(driver.launches) == 3
