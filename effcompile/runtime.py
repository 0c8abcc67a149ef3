"""Runs the semantic operations on a GPU: hands each call to its generated kernel.

If a kernel cannot be built or launched, the call is computed by the reference, with one warning.
"""

from __future__ import annotations

import logging
import warnings
from functools import lru_cache
from typing import Any

import torch

from .errors import KernelError
from .ops import attention as op

log = logging.getLogger(__name__)

_warned: set[str] = set()
_registered = False


@lru_cache(maxsize=1024)
def parse(spec: str) -> op.AttentionSpec:
    """The specification behind its text, read once."""
    return op.AttentionSpec.from_json(spec)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Any, sizes: Any, spec: str, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    from .codegen import attention

    parsed = parse(spec)
    try:
        return attention.forward(q, k, v, captures, sizes, parsed, out_layout=layout)
    except KernelError as error:
        _warn(error)
        result, lse = op.reference(q, k, v, captures, sizes, parsed)
        out = op.empty_output(q, v, layout)
        out.copy_(result)
        return out, lse.float()


def _attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: Any, lse: Any, captures: Any, sizes: Any, spec: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from .codegen import attention

    parsed = parse(spec)
    try:
        dq, dk, dv, rows = attention.backward(grad, q, k, v, out, lse, captures, sizes, parsed)
    except KernelError as error:
        _warn(error)
        return op.reference_backward(grad, q, k, v, out, lse, captures, sizes, spec)
    return dq, dk, dv, lse.new_empty((0,)) if rows is None else rows


def _warn(error: KernelError) -> None:
    text = str(error)
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"effarch computes this attention by its reference, which materialises the scores: {text}", stacklevel=3)


def register() -> None:
    """Register the GPU implementations; a second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    op.LIBRARY.impl("attention", _attention, "CUDA")
    op.LIBRARY.impl("attention_backward", _attention_backward, "CUDA")
