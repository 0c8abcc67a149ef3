"""Launches that are played again hand the driver what Triton itself would; kernels are compiled side by side, once for new looks.

A driver without a GPU stands in: kernels are really compiled, for an H100, and their launches noted.
"""

from __future__ import annotations

import gc
import weakref
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


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def kernels(spec: AttentionSpec, arch: str, directory: Path, *, plays: bool = True) -> ModuleType:
    problem = attention.Problem(d_qk=32, d_v=32, dtype=torch.bfloat16, arch=arch)
    module = emit.load_kernel(emit.write_kernel(attention.source(spec, problem), directory))
    module.plays = lambda device: plays  # type: ignore[attr-defined]
    return module


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
        return "address"
    if hasattr(value, "block_shape"):
        return value.base.dtype, tuple(value.shape), tuple(value.strides), tuple(value.block_shape), value.layout
    return "address" if isinstance(value, int) and value > 2**40 else value


def noted(driver: Noting) -> list[tuple[str, tuple[Any, ...]]]:
    found = [(name, tuple(map(plain, arguments))) for name, arguments in driver.launches]
    driver.launches.clear()
    return found


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("spec", [CAUSAL, DOCUMENTS], ids=["causal", "documents"])
def test_what_is_played_is_what_triton_launches(driver: Noting, tmp_path: Path, spec: AttentionSpec, arch: str) -> None:
    run(kernels(spec, arch, tmp_path / "triton", plays=False), spec)
    wanted = noted(driver)
    module = kernels(spec, arch, tmp_path / "played")
    for _ in range(2):
        run(module, spec)
        assert noted(driver) == wanted
    assert len(module.PLANS) == 2 and None not in module.PLANS.values()
    assert len(wanted) >= 4


def test_other_lengths_are_told_apart(driver: Noting, tmp_path: Path) -> None:
    module = kernels(CAUSAL, "sm_90", tmp_path)
    run(module, CAUSAL, 64)
    noted(driver)
    run(module, CAUSAL, 72)
    longer = noted(driver)
    run(kernels(CAUSAL, "sm_90", tmp_path / "triton", plays=False), CAUSAL, 72)
    assert noted(driver) == longer
    assert len(module.PLANS) == 4


def test_lengths_that_share_kernels_compile_nothing(driver: Noting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = kernels(CAUSAL, "sm_90", tmp_path)
    run(module, CAUSAL, 64)
    compiled = len(driver.compiled)
    monkeypatch.setattr(module, "ThreadPoolExecutor", None)
    run(module, CAUSAL, 128)
    assert len(driver.compiled) == compiled == len(module.BUILT)
    assert len(module.PLANS) == 4


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


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(8), torch.zeros(9)[1:]),
        (torch.zeros(4, 4), torch.zeros(4, 4).t()),
        (1, 2),
        (None, 0),
    ],
    ids=["dtype", "address", "strides", "size", "none"],
)
def test_looks_that_differ(tmp_path: Path, one: Any, other: Any) -> None:
    module = kernels(CAUSAL, "sm_90", tmp_path)
    look = lambda x: module.look(x, x.data_ptr() if isinstance(x, Tensor) else 0)  # noqa: E731
    assert look(one) != look(other)
    assert look(one) == look(one)


class Launches:
    """A host function that starts one kernel, which is compiled to nothing, and the addresses that it is given."""

    def __init__(self, tmp_path: Path) -> None:
        self.module, self.got = kernels(CAUSAL, "sm_90", tmp_path), []
        self.kernel = SimpleNamespace(arg_names=["a", "b", "c"], warmup=lambda *args, grid, **options: self)
        self.function, self.packed_metadata = 1, None

    def run(self, *args: Any) -> None:
        self.note(*args[9:])  # behind the grid, the stream, the function, and what is said about them

    def note(self, *args: Any) -> None:
        self.got.append(args)

    def __getitem__(self, grid: Any) -> Any:
        return self.note

    def addresses(self, run: Any, *values: Any) -> tuple[Any, ...]:
        self.module.begin(run, *values)
        return self.got.pop()


@pytest.mark.usefixtures("driver")
def test_views_are_found_in_later_calls(tmp_path: Path) -> None:
    launches = Launches(tmp_path)

    def call(x: Tensor, y: Tensor) -> tuple[Any, ...]:
        return launches.addresses(lambda start: start(launches.kernel, (1, 1, 1), x[:, 4:], y.t(), 7), x, y)

    for _ in range(2):
        x, y = torch.zeros(8, 8), torch.zeros(8, 8)
        assert call(x, y) == (x.data_ptr() + 16, y.data_ptr(), 7)
    assert len(launches.module.PLANS) == 1


@pytest.mark.usefixtures("driver")
def test_one_tensor_in_two_places_is_no_plan_for_two_tensors(tmp_path: Path) -> None:
    launches = Launches(tmp_path)

    def call(x: Tensor, y: Tensor) -> tuple[Any, ...]:
        return launches.addresses(lambda start: start(launches.kernel, (1, 1, 1), x, y, 7), x, y)

    x, y = torch.zeros(8, 8), torch.zeros(8, 8)
    assert call(x, x) == (x.data_ptr(), x.data_ptr(), 7)
    assert call(x, y) == (x.data_ptr(), y.data_ptr(), 7)
    assert call(y, y) == (y.data_ptr(), y.data_ptr(), 7)
    assert len(launches.module.PLANS) == 2


@pytest.mark.usefixtures("driver")
def test_parts_of_one_memory_are_told_apart_or_left_to_triton(tmp_path: Path) -> None:
    launches = Launches(tmp_path)
    direct = SimpleNamespace(arg_names=["a", "b", "c"], warmup=launches.kernel.warmup)

    class Kernel:
        arg_names, warmup = direct.arg_names, staticmethod(direct.warmup)

        def __getitem__(self, grid: Any) -> Any:
            return launches.note

    def call(x: Tensor, y: Tensor, at: int) -> tuple[Any, ...]:
        return launches.addresses(lambda start: start(Kernel(), (1, 1, 1), x[at:], y[at:], 7), x, y, at)

    packed = torch.zeros(4, 8, 8)
    assert call(packed[0], packed[2], 0) == (packed[0].data_ptr(), packed[2].data_ptr(), 7)
    a, b = call(packed[0], packed[2], 1)[:2]
    assert (a.data_ptr(), b.data_ptr()) == (packed[0, 1:].data_ptr(), packed[2, 1:].data_ptr()), "tensors: Triton's own launch"
    assert list(launches.module.PLANS.values()).count(None) == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_plan_keeps_no_memory_alive(driver: Noting, tmp_path: Path, arch: str) -> None:
    module, (tensors, _) = kernels(CAUSAL, arch, tmp_path), operands(CAUSAL)
    results = [*module.forward(*tensors)]
    driver.launches.clear()
    assert len(module.PLANS) == 1 and None not in module.PLANS.values()
    alive = [weakref.ref(x) for x in (*tensors, *results)]
    tensors.clear(), results.clear()
    gc.collect()
    assert [x() for x in alive] == [None] * len(alive)


@pytest.mark.usefixtures("driver")
def test_who_observes_launches_is_told_by_triton(tmp_path: Path) -> None:
    launches, x = Launches(tmp_path), torch.zeros(8)
    launches.addresses(lambda start: start(launches.kernel, (1, 1, 1), x, x, 7), x)
    ways: list[str] = []
    launches.run = lambda *args: ways.append("past it")  # type: ignore[method-assign]
    launches.note = lambda *args: ways.append("by Triton")  # type: ignore[method-assign]
    observer = lambda metadata: None  # noqa: E731
    for hooked in (False, True):
        if hooked:
            triton.knobs.runtime.launch_enter_hook.add(observer)
        launches.module.begin(lambda start: start(launches.kernel, (1, 1, 1), x, x, 7), x)
    triton.knobs.runtime.launch_enter_hook.remove(observer)
    assert ways == ["past it", "by Triton"]


@pytest.mark.usefixtures("driver")
def test_scratch_is_new_memory_each_time(tmp_path: Path) -> None:
    launches = Launches(tmp_path)
    x = torch.zeros(8)

    def run(start: Any) -> None:
        scratch = start.empty((4, 4), torch.float32)
        start(launches.kernel, (1, 1, 1), scratch[1:], x, scratch)

    for _ in range(2):
        later, _, first = launches.addresses(run, x)
        assert later == first + 16 and first != x.data_ptr()


@pytest.mark.parametrize("fails", [False, True], ids=["compiled", "failed"])
def test_new_looks_are_compiled_before_anything_runs(
    driver: Noting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    module = kernels(CAUSAL, "sm_90", tmp_path)
    names = ["forward_hopper_kernel", "delta_kernel", "dkv_hopper_kernel", "dq_hopper_kernel"]
    prepared: list[str] = []

    class AtOnce(Executor):
        """Does what is submitted before it returns, or fails to."""

        def __init__(self, workers: int, **options: Any) -> None:
            pass

        def submit(self, fn: Any, /, launch: Any) -> Future[Any]:
            assert [name for name, _ in driver.launches] == names[:1], "all of the backward pass before its first launch"
            prepared.append(launch[0].__name__)
            future: Future[Any] = Future()
            future.set_result(None if fails else fn(launch))
            return future

    monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)
    run(module, CAUSAL)
    assert prepared == names[1:], "one kernel alone needs no company"
    assert [name for name, _ in noted(driver)] == names
    run(module, CAUSAL)
    assert prepared == names[1:], "known looks are not prepared again"
    assert [name for name, _ in noted(driver)] == names
