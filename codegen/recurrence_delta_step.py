"""Few steps of a delta rule, as decoding takes them: one by one, in place, a part of the states at a time.

S <- A_t * S + beta_t (k_t v_t^T - w_t (R^T e_t)^T)          R = A_t * S, or S
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effcompile.ops.recurrence import RecurrenceSpec, empty_output, state_shape

from .recurrence_scan import factors_of
from .recurrence_step import _part, _parts, _repeated

Tensors = Mapping[str, torch.Tensor]


def forward(v: torch.Tensor, x: Tensors, spec: RecurrenceSpec, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, an empty normaliser and the last state."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    state = v.new_zeros(state_shape(v, x, spec), dtype=dtype)
    if "initial" in x:
        state.copy_(x["initial"])
    out, normaliser = update(v, x, state, spec, layout)
    return out, normaliser, state


def update(
    v: torch.Tensor, x: Tensors, state: torch.Tensor, spec: RecurrenceSpec, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and an empty normaliser; `state`, in the dtype of the computation, becomes the last state."""
    out, rows = empty_output(v, spec, layout), _rows(v, x, state.dtype)
    for part in _parts(state):
        own, result = _part(state, part), _part(out, part)
        of_part = {name: _part(row, part) for name, row in rows.items()}
        for t in range(v.shape[2]):
            now = {name: row[:, :, min(t, row.shape[2] - 1), None] for name, row in of_part.items()}  # [b, h, 1, D]
            _step(own, now, spec)
            result[:, :, t] = (now["q"] @ own)[:, :, 0]
    return out, v.new_empty((0,), dtype=state.dtype)


def _rows(v: torch.Tensor, x: Tensors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What steps take, [B, H, T, D] each, with 1 where it does not differ."""
    rows = {name: _repeated(x[name], v.shape[1]).to(dtype) for name in ("q", "k", "erase", "write") if name in x}
    rows["v"] = v.to(dtype)
    if "beta" in x:
        rows["beta"] = x["beta"].unsqueeze(-1).to(dtype)
    if "gate" in x:
        rows["decay"] = factors_of(x["gate"].to(dtype), x["rate"].to(dtype) if "rate" in x else None).squeeze(-1)
    return rows


def _step(own: torch.Tensor, now: Tensors, spec: RecurrenceSpec) -> None:
    erase = now.get("erase", now["k"])
    held = erase @ own if spec.delta == "previous" else None
    if "decay" in now:
        own.mul_(now["decay"].mT)
    if held is None:
        held = erase @ own
    beta = now.get("beta", 1.0)
    if "write" not in now:
        own.addcmul_(now["k"].mT, beta * (now["v"] - held))
        return
    own.addcmul_(now["k"].mT, beta * now["v"])
    own.addcmul_(now["write"].mT, -beta * held)
