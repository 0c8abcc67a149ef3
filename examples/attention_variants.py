"""Five attentions as papers write them, in plain PyTorch: what effarch makes of each, and that the result is the same.

    python examples/attention_variants.py

Shapes: q, k, v and the result are [B, H, T, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import effcompile

BATCH, HEADS, TOKENS, WIDTH = 1, 4, 256, 64


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Vaswani et al., 2017: softmax(Q K^T / sqrt(d)) V, and no look ahead."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1) @ v


def sliding_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Beltagy et al., 2020, and Mistral: the last 64 keys."""
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)[None, :]
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    scores = torch.where((j <= i) & (i - j < 64), scores, float("-inf"))
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


def documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    """Packed sequences: tokens of one document see each other, causally. `document` [T] numbers them."""
    position = torch.arange(q.shape[2], device=q.device)
    keep = (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])
    bias = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill(~keep, torch.finfo(q.dtype).min)
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias, dim=-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """Press et al., 2022: each head penalises distance by its slope. `slopes` [H]."""
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[None, :] - position[:, None]
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + slopes[:, None, None] * distance
    return scores.masked_fill(distance > 0, float("-inf")).softmax(dim=-1) @ v


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma 2: scores saturate at 50 before the causal mask."""
    scores = 50.0 * torch.tanh(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 / 50.0)
    future = torch.triu(torch.full((q.shape[2], k.shape[2]), float("-inf"), device=q.device), diagonal=1)
    return torch.softmax(scores + future, dim=-1) @ v


def inputs(device: str) -> dict[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The functions with fresh random inputs."""
    qkv = tuple(torch.randn(BATCH, HEADS, TOKENS, WIDTH, device=device) for _ in range(3))
    document = torch.arange(4, device=device).repeat_interleave(TOKENS // 4)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=device)
    return {causal: qkv, sliding_window: qkv, documents: (*qkv, document), alibi: (*qkv, slopes), soft_cap: qkv}


def main() -> None:
    """Explain each function, run it compiled, compare with eager in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for function, arguments in inputs(device).items():
        print(f"== {function.__name__}")
        print(effcompile.explain(function, *arguments))
        exact = function(*(x.double() if x.is_floating_point() else x for x in arguments))
        got = torch.compile(function, backend="effarch")(*arguments)
        eager = function(*arguments)
        errors = [float((x - exact).norm() / exact.norm()) for x in (got, eager)]
        print(f"relative error against float64: {errors[0]:.1e} compiled, {errors[1]:.1e} eager\n")
        if not errors[0] <= 2 * errors[1] + 1e-6:
            raise SystemExit(f"{function.__name__}: the compiled function differs from eager")


if __name__ == "__main__":
    main()
