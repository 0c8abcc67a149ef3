"""Attention one block of queries at a time: in float64 as the reference, or with eager's own rounding where eager does not fit.

    for each block I of queries:  S = score(Q_I K^T * scale) where keep,  P = softmax(S),  O_I = P V

The gradients come from autograd through each block; those of k and v are summed over the blocks.
"""

from __future__ import annotations

import torch
from attention_rows import Extra, Row
from torch import Tensor

BLOCK_ELEMENTS = 2**27  # scores of one block: 1 GiB in float64


def reference(row: Row, q: Tensor, k: Tensor, v: Tensor, extra: Extra, gradient: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients (`out`, `dq`, `dk`, `dv`) with everything in `dtype`."""
    return _blocked(row, q.to(dtype), k.to(dtype), v.to(dtype), extra, gradient.to(dtype), softmax=dtype, total=dtype)


def eager_rounding(row: Row, q: Tensor, k: Tensor, v: Tensor, extra: Extra, gradient: Tensor) -> dict[str, Tensor]:
    """The same with eager's rounding: scores and weights in the dtype of the inputs, the softmax in float32.

    It rounds once a block where eager rounds the sum over all queries, so the errors of dk and dv are near eager's, not equal.
    """
    return _blocked(row, q, k, v, extra, gradient, softmax=torch.float32, total=torch.float32)


def _blocked(
    row: Row, q: Tensor, k: Tensor, v: Tensor, extra: Extra, gradient: Tensor, *, softmax: torch.dtype, total: torch.dtype
) -> dict[str, Tensor]:
    tokens = q.shape[2]
    size = max(1, min(tokens, BLOCK_ELEMENTS // (q.shape[0] * q.shape[1] * tokens)))
    parts: list[tuple[Tensor, Tensor]] = []
    dk, dv = torch.zeros_like(k, dtype=total), torch.zeros_like(v, dtype=total)
    k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
    for start in range(0, tokens, size):
        block = q[:, :, start : start + size].detach().requires_grad_()
        out = _block(row, block, k, v, extra, start, softmax)
        grads = torch.autograd.grad(out, (block, k, v), gradient[:, :, start : start + size])
        parts.append((out.detach(), grads[0]))
        dk, dv = dk.add_(grads[1]), dv.add_(grads[2])
        del out, grads
    return {"out": torch.cat([o for o, _ in parts], dim=2), "dq": torch.cat([g for _, g in parts], dim=2), "dk": dk, "dv": dv}


def _block(row: Row, q: Tensor, k: Tensor, v: Tensor, extra: Extra, start: int, softmax: torch.dtype) -> Tensor:
    """The output [B, H, I, Dv] of the queries from `start` on."""
    batch, heads, size, width = q.shape
    kv_heads, tokens = k.shape[1], k.shape[2]
    grouped = q.reshape(batch, kv_heads, -1, width)  # [B, Hkv, G * I, D]
    scores = torch.matmul(grouped, k.transpose(2, 3)).view(batch, heads, size, tokens) * width**-0.5
    h = torch.arange(heads, device=q.device).view(heads, 1, 1)
    i = torch.arange(start, start + size, device=q.device).view(size, 1)
    j = torch.arange(tokens, device=q.device).view(1, tokens)
    scores = row.score(scores, h, i, j, extra).to(q.dtype).masked_fill(~row.keep(i, j, extra, row.tokens), float("-inf"))
    if row.has_sink:
        scores = torch.cat([scores, extra[0].to(q.dtype).view(1, heads, 1, 1).expand(batch, heads, size, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=softmax).to(q.dtype)[..., :tokens]
    return torch.matmul(weights.reshape(batch, kv_heads, -1, tokens), v).view(batch, heads, size, -1)
