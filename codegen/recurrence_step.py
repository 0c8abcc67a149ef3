"""One step of a recurrence with a matrix state, as decoding takes it: as few passes over the state as there can be.

`update` overwrites the state: a part of it at a time, so that the passes over that find it in a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from effcompile.ops.recurrence import RecurrenceSpec, empty_output

from .recurrence_scan import factors_of

_PART = 1 << 18
"""Elements of the state at a time."""


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


def update(
    v: torch.Tensor, x: Mapping[str, torch.Tensor], state: torch.Tensor, spec: RecurrenceSpec, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the normaliser; `state`, in the dtype of the computation, becomes the state after the step. T is 1."""
    heads, width = v.shape[1], v.shape[3]
    values = v.to(state.dtype)  # [B, H, 1, W]
    if spec.normaliser:
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    q, k = (_repeated(x[name], heads).to(state.dtype) for name in ("q", "k"))  # [B, H, 1, Dk]
    factors = _factors(x, state.dtype) if "gate" in x else None
    found = torch.empty_like(values)
    for part in _parts(state):
        own = _part(state, part)
        if spec.read == "before":
            torch.matmul(_part(q, part), own, out=_part(found, part))
        if factors is not None:
            own.mul_(_part(factors, part))
        own.addcmul_(_part(k, part).mT, _part(values, part))
        if spec.read == "after":
            torch.matmul(_part(q, part), own, out=_part(found, part))
    if "bonus" in x:
        found.addcmul_((q * x["bonus"].to(state.dtype) * k).sum(-1, keepdim=True), values)
    out = empty_output(v, spec, layout)
    out.copy_(found[..., :width])
    normaliser = found[..., width].contiguous() if spec.normaliser else v.new_empty((0,), dtype=state.dtype)
    return out, normaliser


def _parts(state: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Batch entries and heads that are taken together."""
    batch, heads = state.shape[:2]
    size = max(1, state.shape[2] * state.shape[3])
    some_heads = max(1, min(heads, _PART // size))
    entries = max(1, _PART // (size * heads))
    for b in range(0, batch, entries):
        for h in range(0, heads, some_heads):
            yield slice(b, b + entries), slice(h, h + some_heads)


def _part(x: torch.Tensor, part: tuple[slice, slice]) -> torch.Tensor:
    """The batch entries and heads of an operand, all where it does not differ in them."""
    return x[tuple(slice(None) if n == 1 else own for n, own in zip(x.shape[:2], part, strict=True))]


def _factors(x: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """[B, H, Dk, W], with dimensions of size 1."""
    gate = x["gate"].squeeze(2).to(dtype)
    return factors_of(gate, x["rate"].squeeze(2).to(dtype)) if "rate" in x else gate.exp()


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
