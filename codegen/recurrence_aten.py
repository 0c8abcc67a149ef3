"""`effcompile::recurrence` on a CPU, and what any device falls back to: in C++, or with plain ATen.

In C++ every form is taken step by step. In ATen, and backwards for states with many rows, which are faster so:

rows    a state of one row: a scan of the output in place
heads   one decay for a head, or none: chunks
keys    one decay for each row of the state: chunks with scaled queries and keys
steps   any other decay, few steps, and decays that let the state grow: step by step

Delta rules go through `recurrence_delta`, few steps of them through `recurrence_delta_step`: ATen on any device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from effcompile.ops.recurrence import FEW_STEPS, RecurrenceSpec

from . import recurrence_chunks as chunks
from . import recurrence_chunks_backward as chunks_backward
from . import recurrence_delta as delta
from . import recurrence_delta_backward as delta_backward
from . import recurrence_delta_step as delta_step
from . import recurrence_keys as keys
from . import recurrence_keys_backward as keys_backward
from . import recurrence_native as native
from . import recurrence_native_rows as native_rows
from . import recurrence_native_steps as native_steps
from . import recurrence_rows as rows
from . import recurrence_step as step
from . import recurrence_steps as steps
from .recurrence_blocks import chunk_length

Tensors = Mapping[str, torch.Tensor]
Form = Literal["rows", "steps", "heads", "keys"]

_FEW_STEPS = 4
"""So many are soonest done step by step."""
_FEW_ROWS, _SHORT = 64, 64
"""Rows of the state, or steps, up to which C++ is faster backwards than chunks in ATen (both measured on AVX-512 and AVX2)."""
_GROWTH = 60.0
"""The sum of positive log decays up to which what grows inside a chunk stays finite beside operands of ordinary size."""


def forward(
    v: torch.Tensor, operands: Sequence[torch.Tensor], spec: RecurrenceSpec, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output in memory as `layout` says, the normaliser and the last state, as `ops.recurrence.reference` defines them."""
    x = spec.named(operands)
    if spec.delta != "none":
        if v.shape[2] <= FEW_STEPS:
            return delta_step.forward(v, x, spec, layout)
        logs, single = _delta_logs(v, x, spec)
        return delta.forward(v, x, logs, spec, layout, single=single)
    if spec.has_rows and v.shape[2] == 1:
        return step.forward(v, x, spec, layout)
    if native.supports(v):
        compiled = (native_steps if spec.has_rows else native_rows).forward(v, x, spec, layout)
        if compiled is not None:
            return compiled
    form, logs = choose(v, x, spec)
    if form == "heads":
        return chunks.forward(v, x, logs, spec, layout)
    if form == "keys" and logs is not None:
        return keys.forward(v, x, logs, spec, layout)
    if form == "rows":
        return rows.forward(v, x, spec, layout)
    return steps.forward(v, x, spec, layout)


def backward(
    grad: torch.Tensor | None, grad_normaliser: torch.Tensor | None, grad_final: torch.Tensor | None,
    v: torch.Tensor, operands: Sequence[torch.Tensor], out: torch.Tensor | None, spec: RecurrenceSpec,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients of v and of each operand, in their shapes and dtypes. `out` saves work where the state is one row."""
    x = spec.named(operands)
    cpp = native.supports(v) and spec.delta == "none"
    found = _backward_in_cpp(grad, grad_normaliser, grad_final, v, x, out, spec) if cpp else None
    if found is None:
        found = _backward_in_aten(grad, grad_normaliser, grad_final, v, x, out, spec)
    return [_as_operand(found[name], like) for name, like in (("v", v), *x.items())]


def _backward_in_cpp(
    grad: torch.Tensor | None, grad_normaliser: torch.Tensor | None, grad_final: torch.Tensor | None,
    v: torch.Tensor, x: Tensors, out: torch.Tensor | None, spec: RecurrenceSpec,
) -> dict[str, torch.Tensor] | None:  # fmt: skip
    if not spec.has_rows:
        return native_rows.backward(grad, grad_final, v, x, out, spec)
    if x["k"].shape[3] > _FEW_ROWS and v.shape[2] > _SHORT and choose(v, x, spec)[0] != "steps":
        return None
    return native_steps.backward(grad, grad_normaliser, grad_final, v, x, spec)


def _backward_in_aten(
    grad: torch.Tensor | None, grad_normaliser: torch.Tensor | None, grad_final: torch.Tensor | None,
    v: torch.Tensor, x: Tensors, out: torch.Tensor | None, spec: RecurrenceSpec,
) -> dict[str, torch.Tensor]:  # fmt: skip
    if spec.delta != "none":
        logs, single = _delta_logs(v, x, spec)
        found = delta_backward.backward(grad, grad_final, v, x, logs, spec, single=single)
        return found | _gate_gradients(found["logs"].unsqueeze(-1), x) if "logs" in found else found
    form, logs = choose(v, x, spec)
    if form == "heads":
        found = chunks_backward.backward(grad, grad_normaliser, grad_final, v, x, logs, spec)
    elif form == "keys" and logs is not None:
        found = keys_backward.backward(grad, grad_normaliser, grad_final, v, x, logs, spec)
    elif form == "rows":
        found = rows.backward(grad, grad_final, v, x, out, spec)
    else:
        found = steps.backward(grad, grad_normaliser, grad_final, v, x, spec)
    return found | _gate_gradients(found["logs"].unsqueeze(-1), x) if "logs" in found else found


def _as_operand(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Summed over the dimensions of size 1, in the dtype and memory order that `torch.empty_like` gives."""
    gradient, found = gradient.sum_to_size(like.shape), torch.empty_like(like)
    if gradient.dtype == found.dtype and gradient.stride() == found.stride():
        return gradient
    return found.copy_(gradient)


def _gate_gradients(d_logs: torch.Tensor, x: Tensors) -> dict[str, torch.Tensor]:
    """From the gradient [B, H, T, Dk|1, 1] of the log decays."""
    if "rate" not in x:
        return {"gate": d_logs}
    return {"gate": d_logs * x["rate"], "rate": d_logs * x["gate"]}


def choose(v: torch.Tensor, x: Tensors, spec: RecurrenceSpec) -> tuple[Form, torch.Tensor | None]:
    """How to compute, and the log decays [B|1, H|1, T|1, Dk|1] of the chunked forms, if they decay."""
    if not spec.has_rows:
        return "rows", None
    if v.shape[2] < _FEW_STEPS:
        return "steps", None
    if spec.decay == "none":
        return "heads", None
    shapes = [x[name].shape for name in ("gate", "rate") if name in x]
    if any(shape[4] != 1 for shape in shapes) or 0 in v.shape or x["k"].numel() == 0:
        return "steps", None
    logs = _logs(v, x)
    if _grows(logs, x["k"].shape[-1], v.shape[-1] + spec.normaliser):
        return "steps", None
    if logs.shape[3] == 1:
        return "heads", logs
    return "keys", logs


def _delta_logs(v: torch.Tensor, x: Tensors, spec: RecurrenceSpec) -> tuple[torch.Tensor | None, bool]:
    """A delta rule's log decays [B|1, H|1, T|1, Dk|1], if it decays, and whether its steps are taken one by one."""
    if spec.decay == "none":
        return None, False
    logs = _logs(v, x)
    return logs, logs.numel() > 0 and _grows(logs, x["k"].shape[-1], v.shape[-1])


def _logs(v: torch.Tensor, x: Tensors) -> torch.Tensor:
    logs = x["gate"].to(torch.promote_types(v.dtype, torch.float32))
    return (logs * x["rate"] if "rate" in x else logs).squeeze(-1)


def _grows(logs: torch.Tensor, dk: int, dv: int) -> bool:
    return float(logs.amax()) * chunk_length(dk, dv) > _GROWTH
