"""Who computes a row: the eager source as it is, compiled by Inductor, compiled by effarch, and the fused peers called by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attention_rows import Extra, Row
from torch import Tensor
from torch.nn import functional as F

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    """FlexAttention, compiled, with its block mask made beforehand: neither its first call nor its memory counts the mask."""
    if row.has_sink:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        return row.keep(i, j, extra)

    def score_mod(s: Tensor, b: Any, h: Any, i: Any, j: Any) -> Tensor:
        return row.score(s, h, i, j, extra)

    compiled = torch.compile(flex_attention, dynamic=False)
    tokens = row.tokens
    mask = create_block_mask(mask_mod, None, None, tokens, tokens, device=device)
    modify = score_mod if row.score.__name__ != "_unchanged" else None
    return lambda q, k, v: compiled(q, k, v, score_mod=modify, block_mask=mask, enable_gqa=row.heads != row.kv_heads)


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


CONTENDERS: dict[str, Callable[[Row, Extra, str], Attention | None]] = {
    "eager": eager,
    "inductor": inductor,
    "effarch": effarch,
    "flex": flex,
    "sdpa-flash2": _sdpa("FLASH_ATTENTION"),
    "sdpa-cudnn": _sdpa("CUDNN_ATTENTION"),
}
