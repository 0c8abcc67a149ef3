"""Recurrences whose state is one row, h_t = a_t * h_{t-1} + v_t: scans of the output in place.

Backwards the same scan runs from the last step to the first. With D_t the gradient of h_t, D_t = grad_t + a_{t+1} * D_{t+1},
dv_t = D_t and da_t = D_t * h_{t-1}. A state that is read before its update is the output one step later.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effcompile.ops.recurrence import RecurrenceSpec, empty_output

from .recurrence_scan import factors_of, scan_

Tensors = Mapping[str, torch.Tensor]


def forward(v: torch.Tensor, x: Tensors, spec: RecurrenceSpec, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, no normaliser, and the last state."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    out, factors, initial = empty_output(v, spec, layout), _factors(v, x, spec, dtype), _initial(v, x, dtype)
    result = out if out.dtype == dtype else empty_output(v, spec, layout).to(dtype)
    states, values = result.movedim(2, 0), v.movedim(2, 0)
    final = initial.clone(memory_format=torch.contiguous_format)
    if v.shape[2] and spec.read == "after":
        states.copy_(values)
        scan_(states, factors, initial)
        final.copy_(states[-1])
    elif v.shape[2]:
        states[0] = initial
        states[1:] = values[:-1]
        scan_(states[1:], factors[:-1], initial)
        torch.addcmul(values[-1].to(dtype), factors[-1], states[-1], out=final)
    if result is not out:
        out.copy_(result)
    return out, v.new_empty((0,), dtype=dtype), final.unsqueeze(2)


def backward(
    grad: torch.Tensor | None,
    grad_final: torch.Tensor | None,
    v: torch.Tensor,
    x: Tensors,
    out: torch.Tensor | None,
    spec: RecurrenceSpec,
) -> dict[str, torch.Tensor]:
    """The gradients of v and of the operands, by name, in the dtype of the computation."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    found = {"v": torch.empty_like(v, dtype=dtype)}
    if v.shape[2] == 0:
        ended = v.new_zeros((*v.shape[:2], 1, v.shape[3]), dtype=dtype) if grad_final is None else grad_final.clone()
        return found | {name: ended if name == "initial" else torch.zeros_like(tensor) for name, tensor in x.items()}
    factors, initial = _factors(v, x, spec, dtype), _initial(v, x, dtype)
    d_states = found["v"].movedim(2, 0)  # [T, B, H, D]
    d_initial = _start(d_states, grad, grad_final, spec)
    scan_(d_states[:-1], factors[1:], d_states[-1], reverse=True)
    if "initial" in x:
        found["initial"] = (
            factors[0] * d_states[0] if d_initial is None else torch.addcmul(d_initial, factors[0], d_states[0])
        ).unsqueeze(2)
    if "gate" in x:
        found |= _gate_gradients(d_states, _before(v, x, out, initial, spec), factors, x, spec)
    return found


def _factors(v: torch.Tensor, x: Tensors, spec: RecurrenceSpec, dtype: torch.dtype) -> torch.Tensor:
    """[T, B|1, H|1, D|1]."""
    if "gate" not in x:
        return v.new_ones((1, 1, 1, 1), dtype=dtype).expand(v.shape[2], -1, -1, -1)
    gate, rate = (x[name].movedim(2, 0).squeeze(-2).to(dtype) if name in x else None for name in ("gate", "rate"))
    assert gate is not None
    found = gate if spec.gate == "factor" else factors_of(gate, rate)
    return found.expand(v.shape[2], -1, -1, -1)


def _initial(v: torch.Tensor, x: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, D]."""
    if "initial" in x:
        return x["initial"].squeeze(2).to(dtype)
    return v.new_zeros((*v.shape[:2], v.shape[3]), dtype=dtype)


def _start(
    d_states: torch.Tensor, grad: torch.Tensor | None, grad_final: torch.Tensor | None, spec: RecurrenceSpec
) -> torch.Tensor | None:
    """Fill in what each state receives from its own reading, the last also from `grad_final`; returns what the initial state
    does."""
    final = None if grad_final is None else grad_final.squeeze(2)
    if grad is None:
        d_states.zero_()
    elif spec.read == "after":
        d_states.copy_(grad.movedim(2, 0))
    else:
        d_states[:-1] = grad.movedim(2, 0)[1:]
        d_states[-1] = 0
    if final is not None:
        d_states[-1] += final
    return None if grad is None or spec.read == "after" else grad[:, :, 0].to(d_states.dtype)


def _before(v: torch.Tensor, x: Tensors, out: torch.Tensor | None, initial: torch.Tensor, spec: RecurrenceSpec) -> torch.Tensor:
    """The states before each step, [T, B, H, D]: a view of the output, if that holds them, or computed again."""
    exact = out is not None and out.dtype == initial.dtype
    if spec.read == "before" and exact and out is not None:
        return out.movedim(2, 0)
    if not exact or out is None:
        wide = RecurrenceSpec(**{**spec.to_dict(), "out": str(initial.dtype).removeprefix("torch.")})
        out = forward(v, x, wide, "tbhd")[0]
    if spec.read == "before":
        return out.movedim(2, 0)
    return torch.cat([initial.unsqueeze(0), out.movedim(2, 0)[:-1]])


def _gate_gradients(
    d_states: torch.Tensor, before: torch.Tensor, factors: torch.Tensor, x: Tensors, spec: RecurrenceSpec
) -> dict[str, torch.Tensor]:
    change = before.mul_(d_states) if before.is_contiguous() and spec.read == "after" else before * d_states
    if spec.gate == "log":
        change.mul_(factors)
    return spread(change.movedim(0, 2).unsqueeze(-2), x)


def spread(change: torch.Tensor, x: Tensors) -> dict[str, torch.Tensor]:
    """From the gradient [B, H, T, 1, D] of the decays or their logarithms to those of gate and rate."""
    if "rate" not in x:
        return {"gate": change.sum_to_size(x["gate"].shape)}
    return {"gate": (change * x["rate"]).sum_to_size(x["gate"].shape), "rate": (change * x["gate"]).sum_to_size(x["rate"].shape)}
