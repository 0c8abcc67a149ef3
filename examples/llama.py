"""A Llama-3-shaped language model in plain PyTorch, with its attention written out as in a textbook.

Grouped-query attention under rotary positions and a causal mask, RMS norms, and a gated feed-forward layer; untied embeddings, no
biases. Shapes: tokens [B, T], hidden states [B, T, W], queries [B, H, T, D], keys and values [B, Hkv, T, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Size:
    """The widths of Llama 3 8B; its layers and its vocabulary are the caller's to choose."""

    layers: int = 32
    vocabulary: int = 128256
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 14336

    @property
    def depth(self) -> int:
        """Of one head."""
        return self.width // self.heads


TINY = Size(layers=2, vocabulary=256, width=128, heads=4, kv_heads=2, hidden=256)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D) + mask) V, with every matrix in memory."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same by a call of torch's fused kernels, which need no mask."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def causal_mask(x: Tensor) -> Tensor:
    """[T, T] for x [B, T, W]: zero where a key may be seen, minus infinity where it lies ahead."""
    tokens = x.shape[1]
    return torch.full((tokens, tokens), float("-inf"), dtype=x.dtype, device=x.device).triu(1)


def rotary(x: Tensor, base: float = 500000.0) -> Tensor:
    """Turn pairs of x [B, H, T, D], half a depth apart, by an angle that grows with the position."""
    frequency = base ** (-torch.arange(0, x.shape[-1], 2, device=x.device) / x.shape[-1])
    angle = torch.arange(x.shape[2], device=x.device)[:, None] * frequency  # [T, D / 2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Each group of query heads shares one head of keys and values."""

    def __init__(self, size: Size, attention: Attention):
        super().__init__()
        self.depth, self.attention = size.depth, attention
        self.q = nn.Linear(size.width, size.width, bias=False)
        self.k, self.v = (nn.Linear(size.width, size.kv_heads * size.depth, bias=False) for _ in range(2))
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, W] -> [B, T, W]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.depth)).transpose(1, 2) for project in (self.q, self.k, self.v))
        return self.out(self.attention(rotary(q), rotary(k), v, mask).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, size: Size):
        super().__init__()
        self.gate, self.up = (nn.Linear(size.width, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, W] -> [B, T, W]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention, then the feed-forward layer, each behind a norm and beside a residual."""

    def __init__(self, size: Size, attention: Attention):
        super().__init__()
        self.before_attention, self.before_feed_forward = nn.RMSNorm(size.width, eps=1e-5), nn.RMSNorm(size.width, eps=1e-5)
        self.attention, self.feed_forward = SelfAttention(size, attention), FeedForward(size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, W] -> [B, T, W]."""
        x = x + self.attention(self.before_attention(x), mask)
        return x + self.feed_forward(self.before_feed_forward(x))


class Llama(nn.Module):
    """Embedding, layers, norm, and the logits of the last `last` positions: all of them without it."""

    def __init__(self, size: Size, attention: Attention = eager_attention):
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.layers = nn.ModuleList(Layer(size, attention) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-5)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """[B, T] -> [B, T or `last`, vocabulary]."""
        x = self.embedding(tokens)
        mask = causal_mask(x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x if last is None else x[:, -last:]))
