"""Attention as people write it in PyTorch: no fused call, the mask built inside the function from positions and document numbers.

Shapes: q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv]; the result is [B, H, T, Dv]. The spellings differ on purpose: a finite
or infinite fill, an additive mask or a filled one, an expanded or a repeated key.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def repeat_kv(x: Tensor, n: int) -> Tensor:
    """[B, Hkv, T, D] -> [B, Hkv * n, T, D], each head n times in a row."""
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, n, tokens, width).reshape(batch, heads * n, tokens, width)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An additive mask of zeros and the least finite number, added to scaled scores."""
    groups, tokens = q.shape[1] // k.shape[1], q.shape[2]
    position = torch.arange(tokens, device=q.device)
    mask = torch.zeros(tokens, tokens, dtype=q.dtype, device=q.device)
    mask = mask.masked_fill(position[None, :] > position[:, None], torch.finfo(q.dtype).min)
    scores = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, repeat_kv(v, groups))


def sliding_window(q: Tensor, k: Tensor, v: Tensor, window: int = 1024) -> Tensor:
    """Each query sees itself and the `window - 1` keys before it."""
    groups, tokens = q.shape[1] // k.shape[1], q.shape[2]
    row = torch.arange(tokens, device=q.device)[:, None]
    column = torch.arange(tokens, device=q.device)[None, :]
    keep = (column <= row) & (row - column < window)
    zero, least = torch.zeros((), dtype=q.dtype, device=q.device), torch.finfo(q.dtype).min
    mask = torch.where(keep, zero, least)[None, None]
    scores = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, repeat_kv(v, groups))


def soft_cap(q: Tensor, k: Tensor, v: Tensor, cap: float = 50.0) -> Tensor:
    """Gemma 2: scores pass through `cap * tanh(scores / cap)` before the mask."""
    groups, tokens = q.shape[1] // k.shape[1], q.shape[2]
    position = torch.arange(tokens, device=q.device)
    keep = position[None, :] <= position[:, None]
    mask = torch.where(keep, torch.zeros((), dtype=q.dtype, device=q.device), torch.finfo(q.dtype).min)
    scores = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = torch.tanh(scores / cap) * cap
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, repeat_kv(v, groups))


def documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    """Packed sequences: causal, and only within a document. `document` [T] holds each token's document number."""
    groups, tokens = q.shape[1] // k.shape[1], q.shape[2]
    position = torch.arange(tokens, device=q.device)
    keep = (position[:, None] >= position[None, :]) & (document[:, None] == document[None, :])
    scores = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~keep, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, repeat_kv(v, groups))


def block_diffusion(q: Tensor, k: Tensor, v: Tensor, block: int = 32) -> Tensor:
    """BD3-LM in training: the first half of the sequence is noisy, the second the same tokens clean.

    A noisy block sees itself and the clean blocks before it; a clean block sees itself and the clean blocks before it.
    """
    groups, tokens = q.shape[1] // k.shape[1], q.shape[2]
    position = torch.arange(tokens, device=q.device)
    half, number = position // (tokens // 2), position % (tokens // 2) // block
    row, column = number[:, None], number[None, :]
    itself = (row == column) & (half[:, None] == half[None, :])
    keep = itself | ((half[None, :] == 1) & (row > column))
    scores = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~keep, torch.finfo(q.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, repeat_kv(v, groups))


def padding(q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> Tensor:
    """Every query sees the keys that are no padding. `attended` [B, T] is 1 at a token and 0 at padding, as tokenizers give it."""
    groups = q.shape[1] // k.shape[1]
    mask = (1.0 - attended[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    scores = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, repeat_kv(v, groups))


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """Press et al., 2022: a penalty that grows with the distance, by the head's slope. `slopes` [H] in float32."""
    tokens = q.shape[2]
    position = torch.arange(tokens, device=q.device)
    distance = position[None, :] - position[:, None]
    bias = (slopes[:, None, None] * distance).to(q.dtype)[None]
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 + bias
    scores = scores.masked_fill(distance > 0, torch.finfo(q.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def sinks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, window: int = 128) -> Tensor:
    """GPT-OSS: a window, and one learned logit a head that takes its share of the softmax and has no value. `sink` [H]."""
    batch, heads, tokens, _ = q.shape
    groups = heads // k.shape[1]
    row = torch.arange(tokens, device=q.device)[:, None]
    column = torch.arange(tokens, device=q.device)[None, :]
    scores = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill((column > row) | (row - column >= window), torch.finfo(q.dtype).min)
    scores = torch.cat([scores, sink.reshape(1, -1, 1, 1).expand(batch, heads, tokens, 1)], dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)[..., :-1]
    return torch.matmul(weights, repeat_kv(v, groups))
