"""What a device at hand sustains, measured: each ceiling of the roofline by itself, on random data, as a median."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_REPEATS = 9
_WARM_S = {"cuda": 0.3, "cpu": 0.05}  # long enough for a GPU under load to come to its lasting clock
_LAUNCHES = 200
_AHEAD = 16  # large products, during which the host gets ahead of the GPU
_EXP_ROUNDS, _EXP_BLOCK, _EXP_WAVES = 2000, 1024, 16
_MATRIX = {"cuda": 8192, "cpu": 1536}
_SMALLEST, _LONG_S = 256, 0.02  # of a product of a quarter of the rows and columns
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
_CACHED = 4096  # elements a core that stay in its nearest cache


def bandwidth_gb_s(device: torch.device) -> float:
    """GB/s of a large copy, reads and writes counted."""
    size = min(_COPY_BYTES[device.type], _free_bytes(device) // 4)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device) / 1e9


def matmul_tflops(device: torch.device, name: str) -> float | None:
    """TFLOP/s of a large square product in a type of `Hardware.matmul_tflops`; None where torch has no such product there."""
    if name == "float8":
        return None
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    with _tensor_float(name == "tf32"):
        n = _MATRIX[device.type]
        while n > _SMALLEST and _product(n // 4, dtype, device)[0] > _LONG_S:
            n //= 4  # a type without units of its own
        run = _product(n, dtype, device)[1]
        return 2 * n**3 / seconds(run, device) / 1e12


def _product(n: int, dtype: torch.dtype, device: torch.device) -> tuple[float, Callable[[], object]]:
    """Seconds of the second product of two n by n matrices, and what carries out another one."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        torch.mm(a, b, out=out)

    run()
    _wait(device)
    return _timed(run, device), run


def exponentials_per_s(device: torch.device, sms: int) -> float:
    """Float32 exponentials a second over the whole device."""
    if device.type == "cuda":
        return _exponentials_on_gpu(device, sms)
    x = torch.rand(sms * _CACHED)
    rounds = 100

    def run() -> None:
        for _ in range(rounds):
            torch.exp(x, out=out)

    out = torch.empty_like(x)
    return rounds * x.numel() / seconds(run, device)


def launch_us(device: torch.device) -> float:
    """Microseconds from one small kernel's start to the next one's: in a stream that the host has filled, or on a CPU of a call."""
    x = torch.zeros(1, device=device)

    def run() -> None:
        for _ in range(_LAUNCHES):
            x.add_(1.0)

    if device.type == "cpu":
        return seconds(run, device) / _LAUNCHES * 1e6
    run()
    busy = torch.zeros(_MATRIX["cuda"], _MATRIX["cuda"], dtype=torch.float16, device=device)
    return statistics.median(_queued(run, busy) for _ in range(_REPEATS)) / _LAUNCHES * 1e6


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of one run, warm."""
    deadline = time.perf_counter() + _WARM_S[device.type]
    while time.perf_counter() < deadline:
        run()
        _wait(device)
    return statistics.median(_timed(run, device) for _ in range(_REPEATS))


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return _between_events(run)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _queued(run: Callable[[], object], busy: torch.Tensor) -> float:
    """Seconds on the GPU alone: everything is queued while it multiplies `busy`."""
    for _ in range(_AHEAD):
        torch.mm(busy, busy)
    return _between_events(run)


def _between_events(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**32


@contextmanager
def _tensor_float(on: bool) -> Iterator[None]:
    """Products of float32 in TF32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _exponentials_on_gpu(device: torch.device, sms: int) -> float:
    import triton
    import triton.language as tl

    @triton.jit
    def exponentials(Out, rounds, BLOCK: tl.constexpr):
        x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
        for _ in range(rounds):
            x = tl.exp2(x) - 1.0  # stays in [0, 1]
        tl.store(Out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), x)

    programs = sms * _EXP_WAVES
    out = torch.empty(programs * _EXP_BLOCK, device=device)
    time_s = seconds(lambda: exponentials[(programs,)](out, _EXP_ROUNDS, BLOCK=_EXP_BLOCK), device)
    return programs * _EXP_BLOCK * _EXP_ROUNDS / time_s
