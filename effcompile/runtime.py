"""Runs the semantic operations: hands each call to its generated kernel, or to its lowering for a CPU.

If a kernel cannot be built or launched, an attention is computed by the reference, a recurrence chunk by chunk in ATen, experts
segment by segment and a router by the reference, with one warning; EFFARCH_FALLBACK=error raises instead.
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
from .ops import experts, experts_operator, recurrence, route_operator  # noqa: F401  whose import defines operators

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


def _experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Any, down: Any, biases: Any, spec: str) -> torch.Tensor:
    return _experts_forward(x, ids, weights, up, down, biases, spec)[0]


def _experts_forward(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Any, down: Any, biases: Any, spec: str
) -> tuple[torch.Tensor, torch.Tensor]:
    from .codegen import experts_aten

    arguments = (x, ids, weights, up, down, biases, experts.ExpertsSpec.from_json(spec))
    experts.check(*arguments)

    def reference() -> tuple[torch.Tensor, torch.Tensor]:
        out, h = experts.reference(*arguments)
        return out, h.to(x.dtype)

    return _guarded(lambda: experts_aten.forward(*arguments), reference, _EXPERTS)


def _experts_backward(
    grad: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Any, down: Any, biases: Any,
    h: torch.Tensor, spec: str, wanted: Any,
) -> list[torch.Tensor]:  # fmt: skip
    from .codegen import experts_aten_backward

    parsed = experts.ExpertsSpec.from_json(spec)

    def reference() -> list[torch.Tensor]:
        return experts.reference_backward(grad, x, ids, weights, up, down, biases, parsed, wanted)

    kernels = lambda: experts_aten_backward.backward(grad, x, ids, weights, up, down, biases, h, parsed, wanted)  # noqa: E731
    return _guarded(kernels, reference, _EXPERTS)


def _experts_on_gpu(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Any, down: Any, biases: Any, spec: str
) -> torch.Tensor:
    from .codegen import experts as kernels

    arguments = (x, ids, weights, up, down, biases)
    with torch.cuda.device_of(x):
        return _guarded(
            lambda: kernels.forward(*arguments, experts.ExpertsSpec.from_json(spec), keep=False)[0],
            lambda: _experts(*arguments, spec),
            _SEGMENTS,
        )


def _experts_forward_on_gpu(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Any, down: Any, biases: Any, spec: str
) -> tuple[torch.Tensor, torch.Tensor]:
    from .codegen import experts as kernels

    arguments = (x, ids, weights, up, down, biases)
    with torch.cuda.device_of(x):
        return _guarded(
            lambda: kernels.forward(*arguments, experts.ExpertsSpec.from_json(spec)),
            lambda: _experts_forward(*arguments, spec),
            _SEGMENTS,
        )


def _experts_backward_on_gpu(
    grad: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Any, down: Any, biases: Any,
    h: torch.Tensor, spec: str, wanted: Any,
) -> list[torch.Tensor]:  # fmt: skip
    from .codegen import experts as kernels

    arguments = (grad, x, ids, weights, up, down, biases, h)
    with torch.cuda.device_of(x):
        return _guarded(
            lambda: kernels.backward(*arguments, experts.ExpertsSpec.from_json(spec), wanted),
            lambda: _experts_backward(*arguments, spec, wanted),
            _SEGMENTS,
        )


def _route(logits: torch.Tensor, bias: torch.Tensor | None, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    from .codegen import route as kernels

    parsed = route_operator.checked(logits, bias, spec)
    with torch.cuda.device_of(logits):
        return _guarded(
            lambda: kernels.forward(logits, bias, parsed), lambda: route_operator.reference(logits, bias, spec), _ROUTE
        )  # fmt: skip


def _route_backward(grad: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, spec: str) -> torch.Tensor:
    from .codegen import route as kernels

    with torch.cuda.device_of(logits):
        return _guarded(
            lambda: kernels.backward(grad, logits, ids, route_operator.RouteSpec.from_json(spec)),
            lambda: route_operator.reference_backward(grad, logits, ids, spec),
            _ROUTE,
        )


_ATTENTION = "an attention is computed by its reference, which materialises the scores"
_RECURRENCE = "a recurrence is computed by its reference, one step after the other"
_EXPERTS = "experts are computed by their reference, one after the other"
_SEGMENTS = "experts are computed by torch's own operations, segment by segment"
_ROUTE = "a router is computed by its reference, which sorts all experts"
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
    op.LIBRARY.impl("route", route_operator.reference, "CPU")
    op.LIBRARY.impl("route_backward", route_operator.reference_backward, "CPU")
    op.LIBRARY.impl("route", _route, "CUDA")
    op.LIBRARY.impl("route_backward", _route_backward, "CUDA")
    op.LIBRARY.impl("experts", _experts, "CPU")
    op.LIBRARY.impl("experts_forward", _experts_forward, "CPU")
    op.LIBRARY.impl("experts_backward", _experts_backward, "CPU")
    op.LIBRARY.impl("experts", _experts_on_gpu, "CUDA")
    op.LIBRARY.impl("experts_forward", _experts_forward_on_gpu, "CUDA")
    op.LIBRARY.impl("experts_backward", _experts_backward_on_gpu, "CUDA")
