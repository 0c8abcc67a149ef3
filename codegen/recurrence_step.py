"""One step of a recurrence with a matrix state, as decoding takes it: as few passes over the state as there can be."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effcompile.ops.recurrence import RecurrenceSpec, empty_output

from .recurrence_scan import factors_of


def forward(
    v: torch.Tensor, x: Mapping[str, torch.Tensor], spec: RecurrenceSpec, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, the normaliser and the state after the step; T is 1."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    heads, width = v.shape[1], v.shape[3]
    values = v.to(dtype)  # [B, H, 1, W]
    if spec.normaliser:
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    q, k = (_repeated(x[name], heads).to(dtype) for name in ("q", "k"))  # [B, H, 1, Dk]
    entry = x["initial"].to(dtype) if "initial" in x else None
    if entry is None:
        final = k.mT * values
    elif "gate" in x:
        final = (_factors(x, dtype) * entry).addcmul_(k.mT, values)
    else:
        final = torch.addcmul(entry, k.mT, values)
    seen = final if spec.read == "after" else entry
    found = torch.zeros_like(values) if seen is None else q @ seen
    if "bonus" in x:
        found.addcmul_((q * x["bonus"].to(dtype) * k).sum(-1, keepdim=True), values)
    out = empty_output(v, spec, layout)
    out.copy_(found[..., :width])
    normaliser = found[..., width].contiguous() if spec.normaliser else v.new_empty((0,), dtype=dtype)
    return out, normaliser, final.contiguous()


def _factors(x: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[B, H, Dk, W], with dimensions of size 1."""
    gate = x["gate"].squeeze(2).to(dtype)
    return factors_of(gate, x["rate"].squeeze(2).to(dtype)) if "rate" in x else gate.exp()


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
