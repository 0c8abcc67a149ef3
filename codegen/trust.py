"""Kernels are trusted only after they have agreed with the reference on the machine at hand.

Some versions of Triton compute recurrent kernels wrongly on some GPUs. A kernel file is tried once for a version of Triton and an
architecture; the verdict is kept in the cache directory.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType

import torch
import triton
from torch import Tensor

from ..config import cache_dir
from ..errors import KernelError
from .attention import architecture

LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""The relative error, in the L2 norm, up to which kernels on operands of a dtype agree with the reference."""

_verdicts: dict[tuple[str, str, int], str] = {}  # kernel file, part of it, device -> why not, or nothing


def trust(module: ModuleType, device: torch.device, what: str, disagreement: Callable[[], str]) -> None:
    """Return if a kernel file is to be trusted on a device.

    Args:
        what: the part of the file that is tried, each for itself.
        disagreement: runs the kernels on a small problem; what is wrong with the result, or nothing.

    Raises:
        KernelError: its kernels do not agree with the reference.
    """
    if device.type != "cuda":
        return
    key = (str(module.__file__), what, device.index or 0)
    if key not in _verdicts:
        _verdicts[key] = _verdict(module, device, what, disagreement)
    if _verdicts[key]:
        raise KernelError(_verdicts[key])


def _verdict(module: ModuleType, device: torch.device, what: str, disagreement: Callable[[], str]) -> str:
    told = f"{Path(str(module.__file__)).stem} {what} {architecture(device)} {triton.__version__}"
    path = cache_dir() / "verified" / f"{hashlib.sha256(told.encode()).hexdigest()[:24]}.txt"
    if path.exists():
        return path.read_text()
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            "Expected a kernel that was tried before but a CUDA graph is being captured. Call the function once before."
        )
    why = disagreement()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(why)
        os.replace(temporary, path)
    except OSError:
        pass  # it is tried again in the next process
    return why


def compared(
    got: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype, direction: str, *, sums: Collection[str] = ()
) -> str:
    """What is wrong with results, beside those of the reference; empty if nothing is.

    `sums`: results whose terms cancel, being summed over all time: four times the error is allowed.
    """
    for name, value in wanted.items():
        error = _distance(got[name], value)
        if not error <= LIMITS[dtype] * (4 if name in sums else 1):
            return (
                f"Expected {direction} kernels that agree with the reference but got {name} with error={error!r} on "
                f"{architecture(value.device)} by Triton {triton.__version__}. Try another version."
            )
    return ""


def _distance(got: Tensor, wanted: Tensor) -> float:
    if wanted.numel() == 0:
        return 0.0
    return float((got.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-6))
