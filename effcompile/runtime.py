"""Runs the semantic operations: hands each call to its generated kernel, or to its lowering for a CPU.

If a kernel cannot be built or launched, an attention is computed by the reference and a recurrence chunk by chunk in ATen, with one
warning; EFFARCH_FALLBACK=error raises instead.
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
from .ops import recurrence

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
        kernels = lambda: attention.forward(q, k, v, captures, sizes, parsed, out_layout=layout)  # noqa: E731
        return _guarded(kernels, reference, _ATTENTION)


def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: Any,
    lse: Any,
    captures: Any,
    sizes: Any,
    spec: str,
    grad_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    from .codegen import attention

    def kernels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        return attention.backward(grad, q, k, v, out, lse, captures, sizes, parse(spec), grad_lse=grad_lse)

    def reference() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        return op.reference_backward(grad, q, k, v, out, lse, captures, sizes, spec, grad_lse)

    with torch.cuda.device_of(q):
        return _guarded(kernels, reference, _ATTENTION)


@lru_cache(maxsize=1024)
def parse_recurrence(spec: str) -> recurrence.RecurrenceSpec:
    """The specification behind its text, read once."""
    return recurrence.RecurrenceSpec.from_json(spec)


def _recurrence(v: torch.Tensor, operands: Any, spec: str, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .codegen import recurrence_aten

    parsed = parse_recurrence(spec)

    def reference() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        result, normaliser, final = recurrence.reference(v, operands, parsed)
        out = recurrence.empty_output(v, parsed, layout)
        out.copy_(result)
        return out, normaliser.contiguous(), final.clone(memory_format=torch.contiguous_format)

    return _guarded(lambda: recurrence_aten.forward(v, operands, parsed, layout), reference, _RECURRENCE)


def _recurrence_backward(
    grad: Any, grad_normaliser: Any, grad_final: Any, v: torch.Tensor, operands: Any, out: Any, spec: str, decay: bool
) -> list[torch.Tensor]:
    from .codegen import recurrence_aten

    parsed = parse_recurrence(spec)
    arguments = (grad, grad_normaliser, grad_final, v, operands, out, parsed)

    def reference() -> list[torch.Tensor]:
        found = recurrence.reference_backward(*arguments)
        return [torch.empty_like(x).copy_(g) for x, g in zip((v, *operands), found, strict=True)]

    return recurrence.without_decay(_guarded(lambda: recurrence_aten.backward(*arguments), reference, _RECURRENCE), parsed, decay)


def _recurrence_on_gpu(v: torch.Tensor, operands: Any, spec: str, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .codegen import recurrence as kernels

    with torch.cuda.device_of(v):
        return _guarded(
            lambda: kernels.forward(v, operands, parse_recurrence(spec), layout),
            lambda: _recurrence(v, operands, spec, layout),
            _CHUNKS,
        )


def _recurrence_backward_on_gpu(
    grad: Any, grad_normaliser: Any, grad_final: Any, v: torch.Tensor, operands: Any, out: Any, spec: str, decay: bool
) -> list[torch.Tensor]:
    from .codegen import recurrence as kernels

    with torch.cuda.device_of(v):
        return _guarded(
            lambda: kernels.backward(grad, grad_normaliser, grad_final, v, operands, out, parse_recurrence(spec), decay=decay),
            lambda: _recurrence_backward(grad, grad_normaliser, grad_final, v, operands, out, spec, decay),
            _CHUNKS,
        )


def _recurrence_update(
    v: torch.Tensor, operands: Any, state: torch.Tensor, spec: str, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    from .codegen import recurrence_update

    found = recurrence_update.on_cpu(v, operands, state, parse_recurrence(spec), layout)
    return _copied(_recurrence, v, operands, state, spec, layout) if found is None else found


def _recurrence_update_on_gpu(
    v: torch.Tensor, operands: Any, state: torch.Tensor, spec: str, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    from .codegen import recurrence_update

    with torch.cuda.device_of(v):
        kernels = lambda: recurrence_update.on_gpu(v, operands, state, parse_recurrence(spec), layout)  # noqa: E731
        found: tuple[torch.Tensor, torch.Tensor] | None = _guarded(kernels, lambda: None, _COPIED)
    return _copied(_recurrence_on_gpu, v, operands, state, spec, layout) if found is None else found


def _copied(
    forward: Callable[..., Any], v: torch.Tensor, operands: Any, state: torch.Tensor, spec: str, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What nothing updates in place: a last state of its own, copied over the initial one."""
    out, normaliser, final = forward(v, [*operands, state], spec, layout)
    state.copy_(final)
    return out, normaliser


_ATTENTION = "an attention is computed by its reference, which materialises the scores"
_RECURRENCE = "a recurrence is computed by its reference, one step after the other"
_COPIED = "the state of a recurrence is copied, not updated in place"
_CHUNKS = "a recurrence is computed by torch's own operations, chunk by chunk"


def _guarded(kernel: Callable[[], Any], reference: Callable[[], Any], told: str) -> Any:
    """`kernel()`; if that cannot be built or launched, `reference()` and a warning of `told`. Lack of memory is no such failure."""
    try:
        return kernel()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if failing_kernels_raise():
            raise
        warn_once(f"effarch: {told}: {summary(error)}")
        return reference()


def warn_once(text: str) -> None:
    """Warn, once in a process for each text."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, EffcompileWarning, stacklevel=3)


def register() -> None:
    """Register the implementations that are no references; a second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    op.LIBRARY.impl("attention", _attention, "CUDA")
    op.LIBRARY.impl("attention_backward", _attention_backward, "CUDA")
    op.LIBRARY.impl("recurrence", _recurrence, "CPU")
    op.LIBRARY.impl("recurrence_backward", _recurrence_backward, "CPU")
    op.LIBRARY.impl("recurrence_update", _recurrence_update, "CPU")
    op.LIBRARY.impl("recurrence", _recurrence_on_gpu, "CUDA")
    op.LIBRARY.impl("recurrence_update", _recurrence_update_on_gpu, "CUDA")
    op.LIBRARY.impl("recurrence_backward", _recurrence_backward_on_gpu, "CUDA")
