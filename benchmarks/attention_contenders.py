"""Who computes a row: the eager source as it is, compiled by Inductor, compiled by effarch, and the fused peers called by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attention_rows import Extra, Row
from attention_sources import repeat_kv
from torch import Tensor
from torch.nn import functional as F

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
LARGEST_EAGER_MASK = 16384  # tokens: create_block_mask writes every pair out, in int64, unless it is compiled


def eager(row: Row, extra: Extra, device: str) -> Attention:
    """The source as it is."""
    return lambda q, k, v: row.source(q, k, v, *extra)


def inductor(row: Row, extra: Extra, device: str) -> Attention:
    """The source under torch.compile's own backend."""
    compiled = torch.compile(row.source, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, *extra)


def effarch(row: Row, extra: Extra, device: str) -> Attention:
    """The source under this project's backend."""
    compiled = torch.compile(row.source, backend="effarch", dynamic=False)
    return lambda q, k, v: compiled(q, k, v, *extra)


def flex(row: Row, extra: Extra, device: str) -> Attention | None:
    """FlexAttention, compiled, with its block mask made beforehand: neither its first call nor its memory counts the mask.

    It has no sinks; a logit without a value is written with its log-sum-exp L instead: O * sigmoid(L - sink).
    """
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        return row.keep(i, j, extra, row.tokens)

    def score_mod(s: Tensor, b: Any, h: Any, i: Any, j: Any) -> Tensor:
        return row.score(s, h, i, j, extra)

    tokens = row.tokens
    make = create_block_mask if tokens <= LARGEST_EAGER_MASK else torch.compile(create_block_mask, dynamic=False)
    options = {
        "score_mod": None if row.is_score_unchanged else score_mod,
        "block_mask": make(mask_mod, None, None, tokens, tokens, device=device),
        "enable_gqa": row.heads != row.kv_heads,
    }

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not row.has_sink:
            return flex_attention(q, k, v, **options)
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **options)
        return out * torch.sigmoid(aux.lse - extra[0][:, None])[..., None].to(out.dtype)

    return torch.compile(call, dynamic=False)


def _sdpa(backend: str) -> Callable[[Row, Extra, str], Attention | None]:
    def contender(row: Row, extra: Extra, device: str) -> Attention | None:
        if not row.is_plain_causal:
            return None
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=row.heads != row.kv_heads)

        return call

    return contender


def sdpa_mask(row: Row, extra: Extra, device: str) -> Attention | None:
    """SDPA with the mask, or the biased mask, as a dense tensor made beforehand, by the first fused kernel that takes it."""
    if row.has_sink or row.is_plain_causal or not (row.is_score_unchanged or row.is_bias):
        return None
    from torch.nn.attention import SDPBackend, sdpa_kernel

    h = torch.arange(row.heads, device=device).view(-1, 1, 1)
    i, j = torch.arange(row.tokens, device=device).view(-1, 1), torch.arange(row.tokens, device=device).view(1, -1)
    mask = row.keep(i, j, extra, row.tokens)[None, None]
    if not row.is_score_unchanged:
        zero = torch.zeros((), device=device)
        mask = row.score(zero, h, i, j, extra).to(torch.bfloat16)[None].masked_fill(~mask, float("-inf"))
    groups = row.heads // row.kv_heads
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backends if device == "cuda" else SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, repeat_kv(k, groups), repeat_kv(v, groups), attn_mask=mask)

    return call


CONTENDERS: dict[str, Callable[[Row, Extra, str], Attention | None]] = {
    "eager": eager,
    "inductor": inductor,
    "effarch": effarch,
    "flex": flex,
    "sdpa-flash2": _sdpa("FLASH_ATTENTION"),
    "sdpa-cudnn": _sdpa("CUDNN_ATTENTION"),
    "sdpa-mask": sdpa_mask,
}
