"""The rows of the attention benchmark: sizes, the eager source, and the same attention as a formula.

`keep(i, j, extra, tokens)` and `score(s, h, i, j, extra)` state each row a second time, apart from the eager source: FlexAttention
takes them, and the blocked reference computes them in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import attention_sources as sources
import torch
from torch import Tensor

Extra = tuple[Tensor, ...]
Keep = Callable[[Any, Any, Extra, int], Any]


def _unchanged(s: Tensor, h: Any, i: Any, j: Any, extra: Extra) -> Tensor:
    return s


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attention. `density` is the share of the T x T scores that take part; `extra` makes the captured tensors.

    `is_bias`: what `score` does to s is to add something.
    """

    name: str
    title: str
    heads: int
    kv_heads: int
    tokens: int
    width: int
    value_width: int
    density: float
    source: Callable[..., Tensor]
    keep: Keep
    score: Callable[[Tensor, Any, Any, Any, Extra], Tensor] = _unchanged
    extra: Callable[[str, int, int], Extra] = lambda device, tokens, heads: ()
    is_plain_causal: bool = False
    is_bias: bool = False
    has_sink: bool = False
    later: bool = False

    @property
    def is_score_unchanged(self) -> bool:
        """The scaled product itself."""
        return self.score is _unchanged

    def flops(self, *, backward: bool) -> float:
        """Multiplications and additions of the two products; the backward pass has five of them."""
        forward = 2.0 * self.heads * self.tokens**2 * (self.width + self.value_width) * self.density
        return 3.5 * forward if backward else forward

    def bytes(self) -> float:
        """q, k, v read once and the output written once, at two bytes an element."""
        return 2.0 * self.tokens * (self.heads + self.kv_heads) * (self.width + self.value_width)


def _causal(i: Any, j: Any, extra: Extra, tokens: int) -> Any:
    return j <= i


def _window(size: int) -> Keep:
    return lambda i, j, extra, tokens: (j <= i) & (i - j < size)


def _same_document(i: Any, j: Any, extra: Extra, tokens: int) -> Any:
    return (j <= i) & (extra[0][i] == extra[0][j])


def _block_diffusion(size: int) -> Keep:
    def keep(i: Any, j: Any, extra: Extra, tokens: int) -> Any:
        half = tokens // 2
        row, column = i % half // size, j % half // size
        return ((row == column) & ((i < half) == (j < half))) | ((j >= half) & (row > column))

    return keep


def _alibi(s: Tensor, h: Any, i: Any, j: Any, extra: Extra) -> Tensor:
    return s + extra[0][h] * (j - i)


def _capped(s: Tensor, h: Any, i: Any, j: Any, extra: Extra) -> Tensor:
    return torch.tanh(s / 50.0) * 50.0


def _eight_documents(device: str, tokens: int, heads: int) -> Extra:
    return (torch.arange(8, device=device).repeat_interleave(tokens // 8),)


def _slopes(device: str, tokens: int, heads: int) -> Extra:
    return (torch.exp2(-8.0 / heads * torch.arange(1, heads + 1, device=device)),)


def _sinks(device: str, tokens: int, heads: int) -> Extra:
    return (torch.randn(heads, device=device, dtype=torch.bfloat16),)


def _windowed(tokens: int, window: int) -> float:
    return (window * tokens - window * window / 2) / tokens**2


GQA = {"heads": 32, "kv_heads": 8, "width": 128, "value_width": 128}
CAUSAL = {"source": sources.causal, "keep": _causal, "is_plain_causal": True, "density": 0.5}
ROWS: tuple[Row, ...] = (
    Row(name="causal-4k", title="causal, GQA 32/8, D 128, T 4096", tokens=4096, **CAUSAL, **GQA),
    Row(name="causal-16k", title="causal, GQA 32/8, D 128, T 16384", tokens=16384, **CAUSAL, **GQA),
    Row(
        name="window-16k",
        title="sliding window 1024, GQA 32/8, D 128, T 16384",
        tokens=16384,
        density=_windowed(16384, 1024),
        source=sources.sliding_window,
        keep=_window(1024),
        **GQA,
    ),
    Row(
        name="softcap-8k",
        title="soft-cap 50, causal, GQA 16/8, D 256, T 8192",
        tokens=8192,
        density=0.5,
        source=sources.soft_cap,
        keep=_causal,
        score=_capped,
        heads=16,
        kv_heads=8,
        width=256,
        value_width=256,
    ),
    Row(
        name="documents-16k",
        title="8 packed documents of 2048, causal, GQA 32/8, D 128",
        tokens=16384,
        density=0.5 / 8,
        source=sources.documents,
        keep=_same_document,
        extra=_eight_documents,
        **GQA,
    ),
    Row(
        name="alibi-8k",
        title="ALiBi, causal, MHA 32, D 128, T 8192",
        tokens=8192,
        density=0.5,
        source=sources.alibi,
        keep=_causal,
        score=_alibi,
        is_bias=True,
        extra=_slopes,
        heads=32,
        kv_heads=32,
        width=128,
        value_width=128,
        later=True,
    ),
    Row(
        name="diffusion-8k",
        title="block diffusion, 32-token blocks, GQA 32/8, D 128, T 8192",
        tokens=8192,
        density=0.25,
        source=sources.block_diffusion,
        keep=_block_diffusion(32),
        later=True,
        **GQA,
    ),
    Row(
        name="mla-8k",
        title="MLA prefill, 16 heads, D 192/128, T 8192",
        tokens=8192,
        heads=16,
        kv_heads=16,
        width=192,
        value_width=128,
        later=True,
        **CAUSAL,
    ),
    Row(
        name="sinks-8k",
        title="sinks and window 128, GQA 64/8, D 64, T 8192",
        tokens=8192,
        density=_windowed(8192, 128),
        source=sources.sinks,
        keep=_window(128),
        extra=_sinks,
        heads=64,
        kv_heads=8,
        width=64,
        value_width=64,
        has_sink=True,
        later=True,
    ),
)
