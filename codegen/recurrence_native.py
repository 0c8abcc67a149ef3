"""Recurrences on a CPU in C++: what compiles the kernels, and how they are called.

The texts are `native_*.cpp` beside this file; a few constants before them make a kernel. Torch's own compiler for CPUs compiles
them beside the rest of the graph and once for a machine. Where there is no C++ compiler, the same is done in ATen.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from effcompile._torch import compile_cpp
from effcompile.config import failing_kernels_raise
from effcompile.errors import EffcompileWarning, summary

_HERE = Path(__file__).parent
_REALS = {torch.float32: "float", torch.float64: "double"}
_ELEMENTS_A_THREAD = 1 << 15

Kernel = Callable[..., None]
Tensors = Mapping[str, torch.Tensor]


@lru_cache(maxsize=64)
def source(name: str, dtype: torch.dtype, flags: tuple[tuple[str, bool], ...]) -> str:
    """The text of the kernels `native_<name>.cpp`, for a dtype and with the constants that they ask for."""
    constants = [f"using real = {_REALS[dtype]};", *(f"constexpr bool {flag} = {str(on).lower()};" for flag, on in flags)]
    return "\n".join(["#include <type_traits>", *constants, "", _text("common"), _text(name)])


@lru_cache(maxsize=8)
def _text(name: str) -> str:
    return (_HERE / f"native_{name}.cpp").read_text(encoding="ascii")


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="effarch-cpp")


@lru_cache(maxsize=256)
def compiling(text: str) -> Callable[[], ctypes.CDLL] | None:
    """Begin to compile; what is returned waits for it. None where that fails at once."""
    try:
        return compile_cpp(text, _pool().submit)
    except Exception as error:
        _failed(error)
        return None


@lru_cache(maxsize=256)
def kernel(text: str, function: str) -> Kernel | None:
    """A function of a text, compiled; None where that fails."""
    loaded = compiling(text)
    if loaded is None:
        return None
    try:
        found = getattr(loaded(), function)
    except Exception as error:
        _failed(error)
        return None
    found.restype = None
    return lambda numbers: found((ctypes.c_int64 * len(numbers))(*numbers))


def _failed(error: Exception) -> None:
    if failing_kernels_raise():
        raise error
    _warn(summary(error))


@lru_cache(maxsize=1)
def _warn(why: str) -> None:
    text = f"effarch: recurrences are computed by torch's own operations, since their C++ cannot be compiled: {why}"
    warnings.warn(text, EffcompileWarning, stacklevel=4)


def view(x: torch.Tensor | None, dimensions: int) -> list[int]:
    """A tensor as a kernel takes it: address and strides, which are 0 where a dimension has size 1. None, as no tensor."""
    if x is None:
        return [0] * (1 + dimensions)
    return [x.data_ptr(), *(stride if size != 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True))]


def threads(elements: int, blocks: int) -> int:
    """So many share the work."""
    return max(1, min(torch.get_num_threads(), blocks, elements // _ELEMENTS_A_THREAD))


def supports(v: torch.Tensor) -> bool:
    """Whether there are kernels for a tensor."""
    return v.device.type == "cpu" and torch.promote_types(v.dtype, torch.float32) in _REALS and v.numel() > 0


def wide(x: Any, dtype: torch.dtype) -> Any:
    """A tensor in the dtype of the computation, as it is in memory; None stays."""
    return None if x is None else x.to(dtype).resolve_neg()
