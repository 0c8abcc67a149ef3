"""Linear recurrences as models write them in plain PyTorch, each beside the same as one call of `effcompile::recurrence`.

A row has its inputs, its eager source, and the call. The sources' loops are those of Hugging Face's CPU paths (Mamba,
RecurrentGemma) or of the papers (the state's update, one step after the other); retention and Mamba-2 have the parallel form too,
which forms [T, T].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recurrence at one model's sizes.

    Attributes:
        inputs: draws the inputs of a batch of sequences of some length.
        eager: the sources by name.
        operation: the same through the operator, given `recurrence(v, spec fields, **operands)`.
    """

    sizes: str
    inputs: Callable[[int, int], Inputs]
    eager: dict[str, Callable[..., Tensor]]
    operation: Callable[..., Tensor]


def call(v: Tensor, fields: dict[str, Any], layout: str = "bhtd", **operands: Tensor) -> Tensor:
    """The operator's first result. v: [B, H, T, Dv]; operands in the order that the specification asks for."""
    from effcompile.ops.recurrence import RecurrenceSpec

    spec = RecurrenceSpec(operands=tuple(operands), out=str(v.dtype).removeprefix("torch."), **fields)
    return torch.ops.effcompile.recurrence(v, list(operands.values()), spec.to_json(), layout)[0]


# -------------------------------------------------------------------- matrix states: q, k [B, H, T, Dk], v [B, H, T, Dv]


def matrix_loop(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
    """One step after the other; log decays [B, H, T, 1 or Dk], or [1, H, 1, 1]."""
    state = torch.zeros(*v.shape[:2], q.shape[-1], v.shape[-1], dtype=v.dtype)
    decay = log.exp().expand(*v.shape[:3], -1)
    heads = v.shape[1] // q.shape[1]
    q, k = q.repeat_interleave(heads, 1), k.repeat_interleave(heads, 1)
    outputs = []
    for t in range(v.shape[2]):
        state = state * decay[:, :, t].unsqueeze(-1) + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        outputs.append((q[:, :, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(outputs, dim=2)


def matrix_parallel(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
    """((q k^T) * D) v with D [T, T]; log decays one for a head."""
    steps = v.shape[2]
    total = log.expand(*v.shape[:3], 1).squeeze(-1).cumsum(-1)
    later = torch.ones(steps, steps, dtype=torch.bool).triu(1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    heads = v.shape[1] // q.shape[1]
    return ((q @ k.mT).repeat_interleave(heads, 1) * decay) @ v


def _matrix(b: int, t: int, h: int, heads: int, dk: int, dv: int, log: Tensor) -> Inputs:
    q, k = torch.randn(b, heads, t, dk) * dk**-0.5, torch.randn(b, heads, t, dk)
    return q, k, torch.randn(b, h, t, dv), log


def _retention_logs(h: int) -> Tensor:
    return torch.log1p(-(2.0 ** (-5 - torch.arange(h).float()))).view(1, h, 1, 1)


def _matrix_operation(decay: str) -> Callable[..., Tensor]:
    return lambda q, k, v, log: call(v, {"decay": decay}, q=q, k=k, gate=log.unsqueeze(-1))


# -------------------------------------------------------------------- single rows


def rg_lru_loop(x: Tensor, gate: Tensor) -> Tensor:
    """RecurrentGemma's scan over x [B, T, D] with factors `gate` of the same shape."""
    states = torch.zeros_like(x)
    state = torch.zeros(x[:, 0].shape, dtype=torch.promote_types(x.dtype, torch.float32))
    for t in range(x.shape[1]):
        state = gate[:, t].type(state.dtype) * state.to(gate.device)
        state = state + x[:, t].type(state.dtype)
        states[:, t] = state.type(x.dtype)
    return states


def _rg_lru_operation(x: Tensor, gate: Tensor) -> Tensor:
    fields = {"decay": "value", "gate": "factor"}
    return call(x.unsqueeze(1), fields, gate=gate.unsqueeze(1).unsqueeze(-2)).squeeze(1)


def rwkv4_loop(key: Tensor, value: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    """RWKV-4's weighted mean, key and value [B, T, D], decay and bonus [D], without the stabiliser."""
    output = torch.zeros_like(value)
    numerator = denominator = torch.zeros_like(value[:, 0])
    factor = torch.exp(-torch.exp(decay))
    for t in range(value.shape[1]):
        now = torch.exp(key[:, t] + first)
        output[:, t] = (numerator + now * value[:, t]) / (denominator + now)
        weight = torch.exp(key[:, t])
        numerator = factor * numerator + weight * value[:, t]
        denominator = factor * denominator + weight
    return output


def _rwkv4_operation(key: Tensor, value: Tensor, decay: Tensor, first: Tensor) -> Tensor:
    weight, now = key.exp(), (key + first).exp()
    fields, gate = {"decay": "value", "read": "before"}, -decay.exp().view(1, 1, 1, 1, -1)
    numerator, denominator = (call(x.unsqueeze(1), fields, gate=gate).squeeze(1) for x in (weight * value, weight))
    return (numerator + now * value) / (denominator + now)


# -------------------------------------------------------------------- a decay for each element


def mamba_loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Mamba's selective scan as in Hugging Face's slow path: x, dt [B, D, T]; a [D, N]; b, c [B, T, N]."""
    discrete_a = torch.exp(a[None, :, None, :] * dt[:, :, :, None])
    discrete_b = dt[:, :, :, None] * b[:, None, :, :] * x[:, :, :, None]
    state = torch.zeros(x.shape[0], x.shape[1], a.shape[1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[2]):
        state = discrete_a[:, :, t, :] * state + discrete_b[:, :, t, :]
        outputs.append(torch.matmul(state, c[:, t, :].unsqueeze(-1))[:, :, 0])
    return torch.stack(outputs, dim=-1)


def _mamba_operation(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    v, gate = (dt * x).mT.unsqueeze(1), dt.mT[:, None, :, None, :]
    operands = {"q": c.unsqueeze(1), "k": b.unsqueeze(1), "gate": gate, "rate": a.mT[None, None, None]}
    return call(v, {"decay": "full"}, **operands).squeeze(1).mT


ROWS: dict[str, Row] = {
    "gla": Row(
        sizes="H 4, Dk 128, Dv 256",
        inputs=lambda b, t: _matrix(b, t, 4, 4, 128, 256, F.logsigmoid(torch.randn(b, 4, t, 128)) / 16),
        eager={"loop": matrix_loop},
        operation=_matrix_operation("key"),
    ),
    "retention": Row(
        sizes="H 8, Dk 64, Dv 128",
        inputs=lambda b, t: _matrix(b, t, 8, 8, 64, 128, _retention_logs(8)),
        eager={"loop": matrix_loop, "parallel": matrix_parallel},
        operation=_matrix_operation("head"),
    ),
    "mamba-2": Row(
        sizes="H 24, Dk 128 in one group, Dv 64",
        inputs=lambda b, t: _matrix(b, t, 24, 1, 128, 64, -F.softplus(torch.randn(b, 24, t, 1) - 3) * 4),
        eager={"loop": matrix_loop, "parallel": matrix_parallel},
        operation=_matrix_operation("head"),
    ),
    "rg-lru": Row(
        sizes="D 2560",
        inputs=lambda b, t: (torch.randn(b, t, 2560), torch.rand(b, t, 2560) * 0.5 + 0.5),
        eager={"loop": rg_lru_loop},
        operation=_rg_lru_operation,
    ),
    "rwkv-4": Row(
        sizes="D 2560",
        inputs=lambda b, t: (torch.randn(b, t, 2560), torch.randn(b, t, 2560), torch.randn(2560), torch.randn(2560)),
        eager={"loop": rwkv4_loop},
        operation=_rwkv4_operation,
    ),
    "mamba": Row(
        sizes="D 1536, N 16",
        inputs=lambda b, t: (
            torch.randn(b, 1536, t),
            F.softplus(torch.randn(b, 1536, t) - 3),
            -torch.arange(1.0, 17.0).expand(1536, 16).contiguous(),
            torch.randn(b, t, 16),
            torch.randn(b, t, 16),
        ),
        eager={"loop": mamba_loop},
        operation=_mamba_operation,
    ),
}
