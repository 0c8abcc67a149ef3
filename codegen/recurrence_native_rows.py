"""Recurrences whose state is one row, in C++: `recurrence_rows` with one call of a kernel instead of operations step by step.

A kernel takes [O, P, T, D], of which each column is on its own: heads and batch entries may stand for columns and the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from effcompile.ops.recurrence import RecurrenceSpec, empty_output

from . import recurrence_native as native
from .recurrence_rows import spread

Tensors = Mapping[str, torch.Tensor]

_WIDTH = 32  # W of native_common.cpp


def text(dtype: torch.dtype, spec: RecurrenceSpec) -> str:
    """The kernels' text, for the dtype of v."""
    flags = (("LOG", spec.gate == "log"), ("BEFORE", spec.read == "before"))
    return native.source("rows", torch.promote_types(dtype, torch.float32), flags)


@dataclass(kw_only=True)
class _Call:
    """The operands that forward and backward share."""

    v: torch.Tensor
    x: Tensors
    spec: RecurrenceSpec

    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(self.v.dtype, torch.float32)
        b, h, _, d = self.v.shape
        sizes = (b, h, d)
        columns = 2 if d >= _WIDTH else max(range(3), key=lambda i: (sizes[i], i))  # which of them are the columns
        outer = [dim for dim in (0, 1, 3) if dim != (0, 1, 3)[columns]]
        self.order = (*outer, 2, (0, 1, 3)[columns])
        self.operands = {name: self.fitting(name, native.wide(tensor, self.dtype)) for name, tensor in self.x.items()}

    def fitting(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """An operand as [B, H, T, D], the initial state as [B, H, 1, D]: kernels look at no sizes.

        Raises:
            RuntimeError: its shape does not fit.
        """
        b, h, _, d = self.v.shape
        return x.expand(b, h, 1, d) if name == "initial" else x.squeeze(3).expand(self.v.shape)

    def numbers(self) -> list[int]:
        """Sizes, threads and decays."""
        o, p, t, d = (self.v.shape[dim] for dim in self.order)
        blocks = o * p * math.ceil(d / _WIDTH)
        gates = [number for name in ("gate", "rate") for number in self.view(self.operands.get(name))]
        return [o, p, t, d, native.threads(self.v.numel(), blocks), *gates]

    def view(self, x: torch.Tensor | None) -> list[int]:
        """[B, H, T|1, D], as a kernel takes it."""
        found = native.view(x, 4)
        return [found[0], *(found[1 + dim] for dim in self.order)]

    def run(self, function: str, *tensors: torch.Tensor | None) -> bool:
        """Whether there was a kernel to call."""
        kernel = native.kernel(text(self.v.dtype, self.spec), function)
        if kernel is None:
            return False
        kernel([*self.numbers(), *(number for x in tensors for number in self.view(x))])
        return True


def forward(
    v: torch.Tensor, x: Tensors, spec: RecurrenceSpec, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The output, no normaliser, and the last state; None if there is no kernel."""
    call = _Call(v=v, x=x, spec=spec)
    out = empty_output(v, spec, layout)
    result = out if out.dtype == call.dtype else empty_output(v, spec, layout).to(call.dtype)
    final = v.new_empty((*v.shape[:2], 1, v.shape[3]), dtype=call.dtype)
    if not call.run("rows_forward", native.wide(v, call.dtype), call.operands.get("initial"), result, final):
        return None
    if result is not out:
        out.copy_(result)
    return out, v.new_empty((0,), dtype=call.dtype), final


def backward(
    grad: torch.Tensor | None,
    grad_final: torch.Tensor | None,
    v: torch.Tensor,
    x: Tensors,
    out: torch.Tensor | None,
    spec: RecurrenceSpec,
) -> dict[str, torch.Tensor] | None:
    """The gradients of v and of the operands, by name, in the dtype of the computation; None if there is no kernel."""
    call = _Call(v=v, x=x, spec=spec)
    states = None
    if "gate" in x:
        states = out if out is not None and out.dtype == call.dtype else _states(v, x, spec, call.dtype)
        if states is None:
            return None
    found = {"v": torch.empty_like(v, dtype=call.dtype)}
    decays = torch.empty_like(found["v"]) if "gate" in x else None
    if "initial" in x:
        found["initial"] = v.new_empty((*v.shape[:2], 1, v.shape[3]), dtype=call.dtype)
    grads = (native.wide(grad, call.dtype), native.wide(grad_final, call.dtype))
    if not call.run("rows_backward", states, call.operands.get("initial"), *grads, found["v"], decays, found.get("initial")):
        return None
    return found if decays is None else found | spread(decays.unsqueeze(-2), x)


def _states(v: torch.Tensor, x: Tensors, spec: RecurrenceSpec, dtype: torch.dtype) -> torch.Tensor | None:
    """The output in the dtype of the computation, computed again."""
    wide = RecurrenceSpec(**{**spec.to_dict(), "out": str(dtype).removeprefix("torch.")})
    found = forward(v, x, wide, "bthd")
    return None if found is None else found[0]
