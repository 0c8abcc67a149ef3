"""Recurrences of matrix states in C++, step by step: any decay, with states that never leave a core's cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effcompile.ops.recurrence import RecurrenceSpec, empty_output, state_shape

from . import recurrence_native as native

Tensors = Mapping[str, torch.Tensor]

_WIDTH = 32  # W of native_common.cpp


def text(dtype: torch.dtype, shapes: Mapping[str, Sequence[Any]], spec: RecurrenceSpec) -> str:
    """The kernels' text, for the dtype of v and the operands' shapes."""
    gates = [shapes[name] for name in ("gate", "rate") if name in shapes]
    rows, columns = (any(shape[dim] != 1 for shape in gates) for dim in (3, 4))
    flags = (("ROWS", rows), ("COLUMNS", columns), ("BEFORE", spec.read == "before"))
    return native.source("steps", torch.promote_types(dtype, torch.float32), flags)


@dataclass(kw_only=True)
class _Call:
    """The operands that forward and backward share."""

    v: torch.Tensor
    x: Tensors
    spec: RecurrenceSpec

    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(self.v.dtype, torch.float32)
        self.shape = state_shape(self.v, self.x, self.spec)  # [B, H, K, D]
        self.values = native.wide(self.v, self.dtype)
        self.operands = {name: self.fitting(name, native.wide(tensor, self.dtype)) for name, tensor in self.x.items()}

    def fitting(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """An operand, for all of what it is the same for: kernels look at no sizes.

        Raises:
            RuntimeError: its shape does not fit.
        """
        b, h, rows, _ = self.shape
        each = (b, h, self.v.shape[2], rows)
        if name == "initial":
            return x.expand(self.shape)
        if name == "bonus":
            return x.expand(each)
        if name in ("gate", "rate"):
            if any(stride == 0 != size - 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
                x = x.contiguous()  # what is the same has size 1, and one gradient
            return x.expand(*each, 1 if x.shape[4] == 1 else self.v.shape[3])
        return x.expand(b, x.shape[1] if h % x.shape[1] == 0 else h, *each[2:])

    @property
    def tiles(self) -> int:
        """Of columns."""
        return math.ceil(self.shape[3] / _WIDTH)

    def numbers(self) -> list[int]:
        """Sizes, threads and operands."""
        b, h, rows, columns = self.shape
        steps, group = self.v.shape[2], h // self.operands["k"].shape[1]
        threads = native.threads(b * h * steps * rows * columns, b * h * self.tiles)
        found = [b, h, steps, rows, columns, group, threads, int(self.spec.normaliser), *native.view(self.values, 4)]
        for name in ("q", "k", "bonus", "gate", "rate", "initial"):
            found += native.view(self.operands.get(name), 5 if name in ("gate", "rate") else 4)
        return found

    def room(self, x: torch.Tensor) -> torch.Tensor:
        """For the gradient of gate or rate: for each batch entry and head, and for each tile of columns that share one."""
        b, h, _, columns = self.shape
        return x.new_empty((b, h, x.shape[2], x.shape[3], columns if x.shape[4] != 1 else self.tiles), dtype=self.dtype)

    def run(self, function: str, numbers: list[int]) -> bool:
        """Whether there was a kernel to call, with `numbers` behind the operands."""
        kernel = native.kernel(text(self.v.dtype, {name: x.shape for name, x in self.x.items()}, self.spec), function)
        if kernel is None:
            return False
        kernel([*self.numbers(), *numbers])
        return True


def forward(
    v: torch.Tensor, x: Tensors, spec: RecurrenceSpec, layout: str, final: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The output, the normaliser and the last state; None if there is no kernel.

    `final`: where the last state is written, in the dtype of the computation; that may be the initial state.
    """
    call = _Call(v=v, x=x, spec=spec)
    out = empty_output(v, spec, layout)
    direct = out.dtype == call.dtype and not spec.normaliser
    result = out if direct else v.new_empty((*v.shape[:3], call.shape[3]), dtype=call.dtype)
    final = v.new_empty(call.shape, dtype=call.dtype) if final is None else final
    if not call.run("steps_forward", [*native.view(result, 4), *native.view(final, 4)]):
        return None
    if not direct:
        out.copy_(result[..., : v.shape[3]])
    normaliser = result[..., -1].contiguous() if spec.normaliser else v.new_empty((0,), dtype=call.dtype)
    return out, normaliser, final


def backward(
    grad: torch.Tensor | None, grad_normaliser: torch.Tensor | None, grad_final: torch.Tensor | None,
    v: torch.Tensor, x: Tensors, spec: RecurrenceSpec,
) -> dict[str, torch.Tensor] | None:  # fmt: skip
    """The gradients of v and of the operands, by name, in the dtype of the computation; None if there is no kernel, or no step."""
    if v.shape[2] == 0:
        return None
    call = _Call(v=v, x=x, spec=spec)
    whole = (*v.shape[:3], call.shape[3])
    dv = v.new_empty(whole, dtype=call.dtype)
    lines = {n: v.new_empty((call.tiles, *v.shape[:3], call.shape[2]), dtype=call.dtype) for n in ("q", "k", "bonus") if n in x}
    decays = {name: call.room(x[name]) for name in ("gate", "rate") if name in x}
    initial = v.new_empty(call.shape, dtype=call.dtype) if "initial" in x else None
    grad, grad_final = _joined(grad, grad_normaliser, whole, call.dtype), native.wide(grad_final, call.dtype)
    across = [int(name in x and x[name].shape[4] == 1) for name in ("gate", "rate")]
    results = [number for name in ("q", "k", "bonus") for number in native.view(lines.get(name), 5)]
    results += [number for name in ("gate", "rate") for number in native.view(decays.get(name), 5)]
    numbers = [*native.view(grad, 4), *native.view(grad_final, 4), *native.view(dv, 4), *results, *across, *native.view(initial, 4)]
    if not call.run("steps_backward", numbers):
        return None
    found = {"v": dv[..., : v.shape[3]], **{name: _over_groups(line.sum(0), x[name]) for name, line in lines.items()}}
    found |= {name: total.sum(-1, keepdim=True) if x[name].shape[4] == 1 else total for name, total in decays.items()}
    return found | ({} if initial is None else {"initial": initial})


def _joined(
    grad: torch.Tensor | None, normaliser: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor | None:
    """The gradient of what q reads, with the normaliser's column."""
    if shape[3] == (0 if grad is None else grad.shape[3]) or (grad is None and normaliser is None):
        return native.wide(grad, dtype)
    like = grad if grad is not None else normaliser
    assert like is not None
    found = like.new_zeros(shape, dtype=dtype)
    if grad is not None:
        found[..., : grad.shape[3]] = grad
    if normaliser is not None:
        found[..., -1] = normaliser
    return found


def _over_groups(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B, H, T, K], summed over the heads that share one of q or k."""
    if like.shape[1] in (1, gradient.shape[1]):
        return gradient
    return gradient.unflatten(1, (like.shape[1], -1)).sum(2)
