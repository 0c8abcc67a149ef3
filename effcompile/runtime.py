"""Runs the semantic operations on a GPU: hands each call to its generated kernel.

If a kernel cannot be built or launched, the call is computed by the reference, with one warning; EFFARCH_FALLBACK=error raises
instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from .config import failing_kernels_raise
from .errors import EffcompileWarning, summary
from .ops import attention as op

_warned: set[str] = set()
_registered = False


@lru_cache(maxsize=1024)
def parse(spec: str) -> op.AttentionSpec:
    """The specification behind its text, read once."""
    return op.AttentionSpec.from_json(spec)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Any, sizes: Any, spec: str, layout: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    from .codegen import attention

    parsed = parse(spec)

    def reference() -> tuple[torch.Tensor, torch.Tensor]:
        result, lse = op.reference(q, k, v, captures, sizes, parsed)
        out = op.empty_output(q, v, layout)
        out.copy_(result)
        return out, lse.float()

    with torch.cuda.device_of(q):
        return _guarded(lambda: attention.forward(q, k, v, captures, sizes, parsed, out_layout=layout), reference)


def _attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: Any, lse: Any, captures: Any, sizes: Any, spec: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from .codegen import attention

    def kernels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        dq, dk, dv, rows = attention.backward(grad, q, k, v, out, lse, captures, sizes, parse(spec))
        return dq, dk, dv, lse.new_empty((0,)) if rows is None else rows

    with torch.cuda.device_of(q):
        return _guarded(kernels, lambda: op.reference_backward(grad, q, k, v, out, lse, captures, sizes, spec))


def _guarded(kernel: Callable[[], Any], reference: Callable[[], Any]) -> Any:
    """`kernel()`; if that cannot be built or launched, `reference()` with a warning. Lack of memory is no such failure."""
    try:
        return kernel()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if failing_kernels_raise():
            raise
        warn_once(f"effarch: an attention is computed by its reference, which materialises the scores: {summary(error)}")
        return reference()


def warn_once(text: str) -> None:
    """Warn, once in a process for each text."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, EffcompileWarning, stacklevel=3)


def register() -> None:
    """Register the GPU implementations; a second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    op.LIBRARY.impl("attention", _attention, "CUDA")
    op.LIBRARY.impl("attention_backward", _attention_backward, "CUDA")
