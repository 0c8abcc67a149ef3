"""Attention is recognised by what it means: each spelling gives one specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.attention_forms import (
    CAUSAL,
    FLASH_ON_CPU,
    HK,
    LOWEST,
    PADDED,
    PLAIN,
    SCALE,
    SCALED,
    B,
    D,
    H,
    Spelling,
    Spellings,
    T,
    assert_read_as_written,
    attend,
    bhtd,
    bthd,
    causal_of,
    grouped,
    lowest,
    normal,
    positions,
    scores_of,
    with_padding,
)
from tests.vocabulary import TARGETS

SPELLINGS = spelled = Spellings()

# -------------------------------------------------------------------- contractions, layouts and scales


@spelled("matmul", **PLAIN)
def _(q, k, v):
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) * SCALE, dim=-1), v)


@spelled("matmul, divided by a square root", **PLAIN)
def _(q, k, v):
    return (q @ k.mT / math.sqrt(D)).softmax(-1) @ v


@spelled("matmul, divided by a tensor", **PLAIN)
def _(q, k, v):
    return (q @ k.mT / torch.sqrt(torch.tensor(float(D)))).softmax(-1) @ v


@spelled("matmul, divided by a tensor of the depth", **PLAIN)
def _(q, k, v):
    return (q @ k.mT / torch.tensor(k.shape[-1], dtype=q.dtype).sqrt()).softmax(-1) @ v


@spelled("scale from torch.full", **PLAIN)
def _(q, k, v):
    return (q @ k.mT / torch.full([], D**0.5, dtype=q.dtype, device=q.device)).softmax(-1) @ v


@spelled("pre-scaled queries", **PLAIN)
def _(q, k, v):
    return attend((q * SCALE) @ k.mT, v)


@spelled("pre-scaled queries, factor first", **PLAIN)
def _(q, k, v):
    return attend((torch.tensor(SCALE) * q) @ k.mT, v)


@spelled("pre-scaled keys", **PLAIN)
def _(q, k, v):
    return attend(q @ (k / math.sqrt(D)).mT, v)


@spelled("both pre-scaled by a fourth root", **PLAIN)
def _(q, k, v):
    return attend((q * D**-0.25) @ (k * D**-0.25).mT, v)


@spelled("negated twice", **PLAIN)
def _(q, k, v):
    return attend((-q * SCALE) @ -k.mT, v)


@spelled("unscaled", score="s", mask="True")
def _(q, k, v):
    return attend(q @ k.mT, v)


@spelled("negative scale", score=f"-{SCALED}", mask="True")
def _(q, k, v):
    return attend(q @ k.mT * -SCALE, v)


@spelled("transposed contraction", **PLAIN)
def _(q, k, v):
    return attend((k @ q.mT).mT * SCALE, v)


@spelled("keys before queries", **PLAIN)
def _(q, k, v):
    return ((k @ q.mT) * SCALE).softmax(dim=-2).mT @ v


@spelled("keys before queries, values from the left", **PLAIN)
def _(q, k, v):
    return (v.mT @ ((k @ q.mT) * SCALE).softmax(dim=-2)).mT


@spelled("einsum bhid", **PLAIN)
def _(q, k, v):
    return torch.einsum("bhij,bhjd->bhid", (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE).softmax(-1), v)


@spelled("einsum bihd", bthd, **PLAIN)
def _(q, k, v):
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@spelled("einsum bqhd, flattened heads", bthd, **PLAIN)
def _(q, k, v):
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE, -1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, T, H * D)


@spelled("einsum with keys first", **PLAIN)
def _(q, k, v):
    return torch.einsum("bhdj,bhij->bhid", v.mT, (torch.einsum("bhjd,bhid->bhij", k, q) * SCALE).softmax(-1))


@spelled("einsum with the softmax in the middle", **PLAIN)
def _(q, k, v):
    weights = (torch.einsum("bhid,bhjd->bijh", q, k) * SCALE).softmax(2)
    return torch.einsum("bijh,bhjd->bhid", weights, v)


@spelled("einsum with an ellipsis", **PLAIN)
def _(q, k, v):
    return torch.einsum("...ij,...jd->...id", (torch.einsum("...id,...jd->...ij", q, k) * SCALE).softmax(-1), v)


@spelled("einsum with spaces", **PLAIN)
def _(q, k, v):
    weights = torch.einsum("b h i d, b h j d -> b h i j", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("b h i j, b h j d -> b h i d", weights, v)


@spelled("bmm over folded heads", **PLAIN)
def _(q, k, v):
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * SCALE).softmax(-1), v).view(B, H, T, D)


@spelled("bmm over folded heads, softmax unfolded", **PLAIN)
def _(q, k, v):
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    weights = (torch.bmm(q, k.transpose(1, 2)).view(B, H, T, T) * SCALE).softmax(-1)
    return torch.bmm(weights.view(B * H, T, T), v).view(B, H, T, D)


@spelled("baddbmm with an empty bias", **PLAIN)
def _(q, k, v):
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    scores = torch.baddbmm(torch.empty(B * H, T, T), q, k.mT, beta=0.0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v).view(B, H, T, D)


@spelled("fused projection, chunked", lambda: (normal(B, T, 3 * H * D),), **PLAIN)
def _(x):
    q, k, v = (y.view(B, T, H, D).transpose(1, 2) for y in x.chunk(3, dim=-1))
    return attend(scores_of(q, k), v).transpose(1, 2).reshape(B, T, H * D)


@spelled("fused projection, split", lambda: (normal(B, T, 3 * H * D),), **PLAIN)
def _(x):
    q, k, v = (y.view(B, T, H, D).transpose(1, 2) for y in x.split(H * D, dim=2))
    return attend(scores_of(q, k), v).transpose(1, 2).reshape(B, T, H * D)


@spelled("fused projection, unbound", lambda: (normal(B, T, 3 * H * D),), **PLAIN)
def _(x):
    q, k, v = x.reshape(B, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(scores_of(q, k), v).transpose(1, 2).reshape(B, T, H * D)


@spelled("fused projection, interleaved by head", lambda: (normal(B, T, 3 * H * D),), **PLAIN)
def _(x):
    fused = x.view(B, T, H, 3, D)
    q, k, v = (fused[..., n, :].transpose(1, 2) for n in range(3))
    return attend(scores_of(q, k), v).transpose(1, 2).reshape(B, T, H * D)


@spelled("fused projection, indexed", lambda: (normal(B, T, 3 * H * D),), **PLAIN)
def _(x):
    qkv = x.reshape(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    return attend(scores_of(qkv[0], qkv[1]), qkv[-1])


@spelled("batch 1", lambda: tuple(x.detach()[:1].clone().requires_grad_() for x in bhtd()), **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(~causal_of(q), -math.inf), v)


@spelled("one head", lambda: bhtd(1), **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(~causal_of(q), -math.inf), v)


@spelled("one head, no head dimension", lambda: tuple(normal(B, T, D, seed=n) for n in range(3)), **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(~causal_of(q), -math.inf), v)


@spelled("no batch dimension", lambda: tuple(normal(T, D, seed=n) for n in range(3)), **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(~causal_of(q), -math.inf), v)


@spelled("softmax in float32", **PLAIN)
def _(q, k, v):
    weights = F.softmax(scores_of(q, k), dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, p=0.0, training=True) @ v


@spelled("inactive dropout", **PLAIN)
def _(q, k, v):
    return F.dropout(scores_of(q, k).softmax(-1), p=0.1, training=False) @ v


# -------------------------------------------------------------------- softmax by hand


@spelled("by hand, amax", **PLAIN)
def _(q, k, v):
    s = scores_of(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@spelled("by hand, max", **PLAIN)
def _(q, k, v):
    s = scores_of(q, k)
    e = (s - s.max(dim=-1, keepdim=True).values).exp()
    return e / e.sum(dim=-1, keepdim=True) @ v


@spelled("by hand, detached max", **PLAIN)
def _(q, k, v):
    s = scores_of(q, k)
    e = (s - s.max(dim=-1, keepdim=True)[0].detach()).exp()
    return e / e.sum(dim=-1, keepdim=True) @ v


@spelled("by hand, without a shift", **PLAIN)
def _(q, k, v):
    e = scores_of(q, k).exp()
    return e / e.sum(-1, keepdim=True) @ v


@spelled("by hand, sums without keepdim", **PLAIN)
def _(q, k, v):
    s = scores_of(q, k)
    e = torch.exp(s - s.amax(-1)[..., None])
    return (e / e.sum(-1).unsqueeze(-1)) @ v


@spelled("by hand, reciprocal", **PLAIN)
def _(q, k, v):
    e = scores_of(q, k).exp()
    return e * e.sum(-1, keepdim=True).reciprocal() @ v


@spelled("by hand, logsumexp", **PLAIN)
def _(q, k, v):
    s = scores_of(q, k)
    return (s - torch.logsumexp(s, dim=-1, keepdim=True)).exp() @ v


@spelled("by hand, log_softmax", **PLAIN)
def _(q, k, v):
    return F.log_softmax(scores_of(q, k), dim=-1).exp() @ v


@spelled("by hand, divided after the values", **PLAIN)
def _(q, k, v):
    s = scores_of(q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e @ v) / e.sum(-1, keepdim=True)


# -------------------------------------------------------------------- heads in groups


@spelled("repeat_kv by expand and reshape", grouped, **CAUSAL)
def _(q, k, v):
    k, v = (x[:, :, None].expand(B, HK, H // HK, T, D).reshape(B, H, T, D) for x in (k, v))
    return attend(scores_of(q, k).masked_fill(~causal_of(q), lowest(q)), v)


@spelled("repeat_interleave", grouped, **CAUSAL)
def _(q, k, v):
    k, v = (x.repeat_interleave(H // HK, dim=1) for x in (k, v))
    return attend(scores_of(q, k).masked_fill(~causal_of(q), lowest(q)), v)


@spelled("repeat, heads in the other order", grouped, **CAUSAL)
def _(q, k, v):
    k, v = (x.repeat(1, H // HK, 1, 1) for x in (k, v))
    return attend(scores_of(q, k).masked_fill(~causal_of(q), lowest(q)), v)


@spelled("enable_gqa", grouped, **CAUSAL)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@spelled("grouped in five dimensions", grouped, **CAUSAL)
def _(q, k, v):
    q = q.view(B, HK, H // HK, T, D)
    s = torch.einsum("bkgid,bkjd->bkgij", q, k) * SCALE
    weights = s.masked_fill(~causal_of(k), -math.inf).softmax(-1)
    return torch.einsum("bkgij,bkjd->bkgid", weights, v).reshape(B, H, T, D)


@spelled("grouped by a broadcast matmul", grouped, **CAUSAL)
def _(q, k, v):
    q, k, v = q.view(B, HK, H // HK, T, D), k[:, :, None], v[:, :, None]
    return attend(scores_of(q, k).masked_fill(~causal_of(q), -math.inf), v).reshape(B, H, T, D)


@spelled("one head of keys", lambda: bhtd(H, 1), **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(~causal_of(q), lowest(q)), v)


@spelled("one head of keys, expanded for SDPA", lambda: bhtd(H, 1), **CAUSAL)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True)


@spelled("one head of keys, broadcast by SDPA", lambda: bhtd(H, 1), **CAUSAL)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelled("one head of keys in einsum", lambda: (normal(B, H, T, D), normal(B, T, D, seed=1), normal(B, T, D, seed=2)), **CAUSAL)
def _(q, k, v):
    s = torch.einsum("bhid,bjd->bhij", q, k) * SCALE
    return torch.einsum("bhij,bjd->bhid", s.masked_fill(~causal_of(q), lowest(q)).softmax(-1), v)


@spelled("grouped and folded", grouped, **CAUSAL)
def _(q, k, v):
    k, v = (x[:, :, None].expand(B, HK, H // HK, T, D).reshape(B * H, T, D) for x in (k, v))
    s = torch.bmm(q.reshape(B * H, T, D), k.mT) * SCALE
    return torch.bmm(s.masked_fill(~causal_of(q), lowest(q)).softmax(-1), v).view(B, H, T, D)


# -------------------------------------------------------------------- SDPA's own forms


@spelled("SDPA", **PLAIN)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@spelled("SDPA is_causal", **CAUSAL)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelled("SDPA with a boolean mask", **CAUSAL)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_of(q))


@spelled("SDPA with an added mask", **CAUSAL)
def _(q, k, v):
    mask = torch.full((T, T), -math.inf).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelled("SDPA in three dimensions", lambda: tuple(normal(B, T, D, seed=n) for n in range(3)), **CAUSAL)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelled("SDPA with a scale", score="0.5 * s", mask="True")
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.5)


@spelled("SDPA of transposed views", bthd, **CAUSAL)
def _(q, k, v):
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2).contiguous().view(B, T, H * D)


@spelled("SDPA, queries broadcast over the batch", lambda: (normal(1, H, T, D), *bhtd()[1:]), **PLAIN)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


# -------------------------------------------------------------------- causality


@spelled("masked_fill of a triangle", **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(torch.ones(T, T).tril() == 0, -math.inf), v)


@spelled("masked_fill above the diagonal", **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1), lowest(q)), v)


@spelled("where with a large number", **CAUSAL)
def _(q, k, v):
    return attend(torch.where(causal_of(q), scores_of(q, k), -1e9), v)


@spelled("where with the branches exchanged", **CAUSAL)
def _(q, k, v):
    return attend(torch.where(~causal_of(q), torch.finfo(q.dtype).min, scores_of(q, k)), v)


@spelled("where with a tensor", **CAUSAL)
def _(q, k, v):
    s = scores_of(q, k)
    return attend(torch.where(causal_of(q), s, torch.full([], torch.finfo(s.dtype).min)), v)


@spelled("an infinite triangle added", **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k) + torch.full((T, T), -math.inf).triu(1), v)


@spelled("an infinite triangle added, built in place", **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k) + torch.zeros(T, T).masked_fill_(causal_of(q).logical_not(), -math.inf), v)


@spelled("one minus the mask, times the lowest number", **CAUSAL)
def _(q, k, v):
    mask = torch.ones(T, T, dtype=q.dtype).tril()[None, None]
    return attend(scores_of(q, k) + (1.0 - mask) * torch.finfo(q.dtype).min, v)


@spelled("GPT's mask product", **CAUSAL)
def _(q, k, v):
    mask = torch.ones(T, T).tril().view(1, 1, T, T)
    return attend(scores_of(q, k) * mask + -1e10 * (1 - mask), v)


@spelled("compared positions", **CAUSAL)
def _(q, k, v):
    n = positions(q)
    return attend(scores_of(q, k).masked_fill(n[None, :] > n[:, None], -math.inf), v)


@spelled("compared positions, the other way round", **CAUSAL)
def _(q, k, v):
    n = positions(q)
    return attend(scores_of(q, k).masked_fill(~(n.view(-1, 1) >= n), -math.inf), v)


@spelled("difference of positions", **CAUSAL)
def _(q, k, v):
    n = positions(q)
    return attend(torch.where((n[:, None] - n[None]) < 0, -math.inf, scores_of(q, k)), v)


@spelled("positions as floats", **CAUSAL)
def _(q, k, v):
    n = positions(q).float()
    return attend(torch.where(n[:, None] >= n[None], scores_of(q, k), -math.inf), v)


@spelled("masked before the scale", **CAUSAL)
def _(q, k, v):
    return attend((q @ k.mT).masked_fill(~causal_of(q), -math.inf) * SCALE, v)


@spelled("mask as integers", **CAUSAL)
def _(q, k, v):
    mask = causal_of(q).to(torch.int64)
    return attend(scores_of(q, k) + (1 - mask) * LOWEST, v)


@spelled("mask as bytes", **CAUSAL)
def _(q, k, v):
    mask = causal_of(q).to(torch.uint8)
    return attend(scores_of(q, k).masked_fill((1 - mask).bool(), lowest(q)), v)


@spelled("triangle of indices, flipped twice", **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(causal_of(q).flip(0, 1).flip(0).flip(1).logical_not(), lowest(q)), v)


@spelled("transposed triangle", **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(~torch.ones(T, T, dtype=torch.bool).triu().t(), lowest(q)), v)


@spelled("causality by cumulative sums", **CAUSAL)
def _(q, k, v):
    n = torch.ones(T, dtype=torch.int64).cumsum(0)
    return attend(scores_of(q, k).masked_fill(n[None] > n[:, None], lowest(q)), v)


@spelled("anti-causal", score=SCALED, mask="j >= i")
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(causal_of(q).tril(-1), -math.inf), v)


@spelled("strictly causal", score=SCALED, mask="j <= i - 1", empty="nan")
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(~causal_of(q).tril(-1), -math.inf), v)


@spelled("strictly causal, mean of an empty row", untrained=FLASH_ON_CPU, score=SCALED, mask="j <= i - 1", empty="mean")
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(~causal_of(q).tril(-1), lowest(q)), v)


@spelled("strictly causal, zeros for an empty row", score=SCALED, mask="j <= i - 1", empty="zero")
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_of(q).tril(-1))


@spelled("strictly causal, an added mask of SDPA", score=SCALED, mask="j <= i - 1", empty="zero")
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.full((T, T), -math.inf).triu())


@spelled("strictly causal, the lowest number to SDPA", untrained=TARGETS)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.full((T, T), LOWEST).triu())


# -------------------------------------------------------------------- fewer queries than keys


@spelled("cross attention", lambda: bhtd(queries=7, keys=12), **PLAIN)
def _(q, k, v):
    return attend(scores_of(q, k), v)


@spelled("is_causal with fewer queries", lambda: bhtd(queries=7, keys=12), **CAUSAL)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelled("causal with cached keys", lambda: bhtd(queries=7, keys=12), score=SCALED, mask="j <= i + 5", empty="impossible")
def _(q, k, v):
    i, j = torch.arange(7) + 5, torch.arange(12)
    return attend(scores_of(q, k).masked_fill(j > i[:, None], -math.inf), v)


@spelled(
    "causal with cached keys, by a diagonal", lambda: bhtd(queries=7, keys=12), score=SCALED, mask="j <= i + 5", empty="impossible"
)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(7, 12, dtype=torch.bool).tril(diagonal=12 - 7))


@spelled(
    "causal with cached keys, rows of a square",
    lambda: bhtd(queries=7, keys=12),
    score=SCALED,
    mask="j <= i + 5",
    empty="impossible",
)
def _(q, k, v):
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[-7:, :12]
    return attend(scores_of(q, k).masked_fill(~mask, -math.inf), v)


@spelled("more queries than keys", lambda: bhtd(queries=12, keys=7), score=SCALED, mask="j <= i", empty="impossible")
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(~torch.ones(12, 7, dtype=torch.bool).tril(), -math.inf), v)


@spelled("one query", lambda: bhtd(queries=1, keys=12), **PLAIN)
def _(q, k, v):
    return attend(scores_of(q, k), v)


@spelled("one query, heads in groups", lambda: bhtd(H, HK, queries=1, keys=12), **PLAIN)
def _(q, k, v):
    k, v = (x[:, :, None].expand(B, HK, H // HK, 12, D).reshape(B, H, 12, D) for x in (k, v))
    return attend(scores_of(q, k), v)


@spelled("one query, five dimensions", lambda: bhtd(H, HK, queries=1, keys=12), score=SCALED, mask="True")
def _(q, k, v):
    s = torch.einsum("bkgid,bkjd->bkgij", q.view(B, HK, H // HK, 1, D), k) * SCALE
    return torch.einsum("bkgij,bkjd->bkgid", s.softmax(-1), v).reshape(B, H, 1, D)


@spelled("a prefix of a static cache", lambda: (normal(B, H, 4, D), normal(B, H, 16, D, seed=1), normal(B, H, 16, D, seed=2)),
         score=SCALED, mask="j <= i + 3", empty="impossible")  # fmt: skip
def _(q, k, v):
    i, j = torch.arange(4)[:, None] + 3, torch.arange(16)[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i)[None, None])


# -------------------------------------------------------------------- windows, chunks, documents, padding, prefixes

WINDOW: dict[str, Any] = {"score": SCALED, "mask": "(j <= i) & (j >= i - 3)", "empty": "impossible"}


@spelled("window by a difference", **WINDOW)
def _(q, k, v):
    n = positions(q)
    away = n[:, None] - n[None]
    return attend(scores_of(q, k).masked_fill(~((away >= 0) & (away < 4)), -math.inf), v)


@spelled("window by a bound", **WINDOW)
def _(q, k, v):
    i, j = positions(q)[:, None], positions(k)[None]
    return attend(torch.where((j <= i) & (j > i - 4), scores_of(q, k), LOWEST), v)


@spelled("window by two triangles", **WINDOW)
def _(q, k, v):
    mask = torch.ones(T, T, dtype=torch.bool).tril().triu(-3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelled("window by the exclusive or of triangles", **WINDOW)
def _(q, k, v):
    ones = torch.ones(T, T, dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=ones.tril() & ~ones.tril(-4))


@spelled("window as two masks added", **WINDOW)
def _(q, k, v):
    causal = torch.full((T, T), -math.inf).triu(1)
    far = torch.full((T, T), -math.inf).tril(-4)
    return attend(scores_of(q, k) + causal + far, v)


@spelled("window on both sides", score=SCALED, mask="(j <= i + 2) & (j >= i - 2)", empty="impossible")
def _(q, k, v):
    n = positions(q)
    return attend(scores_of(q, k).masked_fill((n[:, None] - n).abs() > 2, -math.inf), v)


@spelled("chunks", score=SCALED, mask="(i // 4 == j // 4) & (j <= i)", empty="impossible")
def _(q, k, v):
    i, j = positions(q)[:, None], positions(k)[None]
    return attend(scores_of(q, k).masked_fill(~((j <= i) & (i // 4 == j // 4)), -math.inf), v)


@spelled("dilated", score=SCALED, empty="impossible")
def _(q, k, v):
    i, j = positions(q)[:, None], positions(k)[None]
    return attend(scores_of(q, k).masked_fill(~((j <= i) & ((i - j) % 3 == 0)), -math.inf), v)


@spelled("window with the first keys kept", score=SCALED, empty="impossible")
def _(q, k, v):
    i, j = positions(q)[:, None], positions(k)[None]
    return attend(scores_of(q, k).masked_fill(~((j <= i) & ((j > i - 4) | (j < 2))), -math.inf), v)


@spelled("prefix", score=SCALED, mask="(j <= 3) | (j <= i)", empty="impossible")
def _(q, k, v):
    mask = causal_of(q)
    prefix = torch.arange(T) < 4
    return attend(scores_of(q, k).masked_fill(~(mask | prefix), -math.inf), v)


def with_documents() -> tuple[Any, ...]:
    return *bhtd(), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]])


DOCUMENTS: dict[str, Any] = {"score": SCALED, "mask": "(j <= i) & (t0.i[b, i] == t0.i[b, j])", "empty": "impossible"}


@spelled("documents", with_documents, **DOCUMENTS)
def _(q, k, v, doc):
    mask = causal_of(q) & (doc[:, None, :, None] == doc[:, None, None, :])
    return attend(scores_of(q, k).masked_fill(~mask, -math.inf), v)


@spelled("documents, exchanged", with_documents, **DOCUMENTS)
def _(q, k, v, doc):
    mask = (doc.unsqueeze(1) == doc.unsqueeze(2)).unsqueeze(1).logical_and(causal_of(q))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelled("documents, not different", with_documents, **DOCUMENTS)
def _(q, k, v, doc):
    different = doc[:, None, :, None] - doc[:, None, None, :] != 0
    return attend(scores_of(q, k).masked_fill(different | ~causal_of(q), lowest(q)), v)


@spelled("documents, gathered by index", with_documents, **DOCUMENTS)
def _(q, k, v, doc):
    n, b = positions(q), torch.arange(B)
    mask = doc[b[:, None, None], n[:, None]] == doc[b[:, None, None], n[None]]
    return attend(scores_of(q, k).masked_fill(~(mask[:, None] & causal_of(q)), -math.inf), v)


@spelled("documents by gather", with_documents, **DOCUMENTS)
def _(q, k, v, doc):
    n = positions(q)
    own = doc.gather(1, n.expand(B, T))
    return attend(scores_of(q, k).masked_fill(~((own[:, None, :, None] == own[:, None, None]) & causal_of(q)), -math.inf), v)


POSITION_IDS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 0, 1, 0, 1, 2, 3]])


@spelled("documents from positions", lambda: (*bhtd(), POSITION_IDS),
         score=SCALED, empty="impossible")  # fmt: skip
def _(q, k, v, position_ids):
    doc = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    mask = (doc[:, None, :, None] == doc[:, None, None, :]) & causal_of(q)
    return attend(scores_of(q, k).masked_fill(~mask, -math.inf), v)


@spelled("one document from plain positions", **CAUSAL)
def _(q, k, v):
    ids = positions(q)[None].expand(B, T)
    doc = (torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    mask = (doc[:, None, :, None] == doc[:, None, None, :]) & causal_of(q)
    return attend(scores_of(q, k).masked_fill(~mask, -math.inf), v)


def with_left_padding() -> tuple[Any, ...]:
    """The first two keys of the second row are padding, so that the first causal rows have no key."""
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[1, :2] = False
    return *bhtd(), keep


@spelled("padding, -inf", with_padding, **PADDED, empty="nan")
def _(q, k, v, keep):
    return attend(scores_of(q, k).masked_fill(~keep[:, None, None, :], -math.inf), v)


@spelled("padding, lowest", with_padding, **PADDED, empty="mean")
def _(q, k, v, keep):
    return attend(scores_of(q, k).masked_fill(~keep[:, None, None, :], lowest(q)), v)


@spelled("padding as an added float mask", with_padding, mask="True", empty="impossible")
def _(q, k, v, keep):
    return attend(scores_of(q, k) + (1.0 - keep[:, None, None, :].to(q.dtype)) * LOWEST, v)


@spelled("padding to SDPA", with_padding, **PADDED, empty="zero")
def _(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :].expand(B, H, T, T))


@spelled("padding as integers", lambda: (*bhtd(), with_padding()[-1].long()), mask="True")
def _(q, k, v, keep):
    return attend(scores_of(q, k) + (1 - keep[:, None, None, :]) * LOWEST, v)


@spelled("padding as integers compared", lambda: (*bhtd(), with_padding()[-1].long()), score=SCALED, empty="mean")
def _(q, k, v, keep):
    return attend(scores_of(q, k).masked_fill(keep[:, None, None, :] == 0, lowest(q)), v)


@spelled("padding as bytes", lambda: (*bhtd(), with_padding()[-1].to(torch.uint8)), score=SCALED, empty="mean")
def _(q, k, v, keep):
    return attend(scores_of(q, k).masked_fill((1 - keep[:, None, None, :]) != 0, lowest(q)), v)


@spelled("padding added as a dense float", lambda: (*bhtd(), torch.where(with_padding()[-1], 0.0, LOWEST)), mask="True")
def _(q, k, v, bias):
    return attend(scores_of(q, k) + bias[:, None, None, :], v)


@spelled("infinite padding added as a dense float", lambda: (*bhtd(), torch.where(with_padding()[-1], 0.0, -math.inf)), mask="True")
def _(q, k, v, bias):
    return attend(scores_of(q, k) + bias[:, None, None, :], v)


@spelled("left padding and causality, -inf", with_left_padding, score=SCALED, empty="nan")
def _(q, k, v, keep):
    return attend(scores_of(q, k).masked_fill(~(keep[:, None, None, :] & causal_of(q)), -math.inf), v)


@spelled("left padding and causality, lowest", with_left_padding, untrained=FLASH_ON_CPU, score=SCALED, empty="mean")
def _(q, k, v, keep):
    return attend(scores_of(q, k).masked_fill(~(keep[:, None, None, :] & causal_of(q)), lowest(q)), v)


@spelled("left padding and causality, SDPA", with_left_padding, score=SCALED, empty="zero")
def _(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :] & causal_of(q))


@spelled("left padding and causality, two lowest added", with_left_padding, untrained=FLASH_ON_CPU)
def _(q, k, v, keep):
    causal = torch.where(causal_of(q), 0.0, LOWEST)
    padding = torch.where(keep, 0.0, LOWEST)[:, None, None, :]
    return attend(scores_of(q, k) + causal + padding, v)


@spelled("left padding, -1e4 is no mask", with_left_padding, mask="True")
def _(q, k, v, keep):
    return attend(scores_of(q, k) + torch.where(keep[:, None, None, :] & causal_of(q), 0.0, -1e4), v)


@spelled("left padding, -1e9 added leaves the scores apart", with_left_padding, untrained=FLASH_ON_CPU, mask="True")
def _(q, k, v, keep):
    return attend(scores_of(q, k) + torch.where(keep[:, None, None, :] & causal_of(q), 0.0, -1e9), v)


@spelled("padded queries added", lambda: (*bhtd(), torch.where(with_padding()[-1], 0.0, LOWEST)), untrained=FLASH_ON_CPU)
def _(q, k, v, bias):
    return attend(scores_of(q, k) + bias[:, None, :, None], v)


def with_a_past() -> tuple[Any, ...]:
    keep = with_padding()[-1]
    return *bhtd(), keep[:, :4].clone(), keep[:, 4:].clone()


@spelled("padding of a past and of the present", with_a_past, score=SCALED, empty="nan")
def _(q, k, v, past, present):
    keep = torch.cat([past, present], dim=1)
    return attend(scores_of(q, k).masked_fill(~keep[:, None, None, :], -math.inf), v)


@spelled("lengths", lambda: (*bhtd(), torch.tensor([10, 6])), score=SCALED, empty="nan")
def _(q, k, v, lengths):
    keep = positions(k)[None] < lengths[:, None]
    return attend(scores_of(q, k).masked_fill(~keep[:, None, None], -math.inf), v)


# -------------------------------------------------------------------- scores


def with_bias() -> tuple[Any, ...]:
    return *bhtd(), normal(1, H, T, T, seed=5, grad=False)


@spelled("dense bias", with_bias, score=f"{SCALED} + t0.f[0, h, i, j]", mask="True")
def _(q, k, v, bias):
    return attend(scores_of(q, k) + bias, v)


@spelled("dense bias to SDPA", with_bias, score=f"{SCALED} + t0.f[0, h, i, j]", mask="True")
def _(q, k, v, bias):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@spelled("a causal mask held in a tensor", lambda: (*bhtd(), torch.ones(16, 16, dtype=torch.bool).tril()), empty="nan")
def _(q, k, v, mask):
    return attend(scores_of(q, k).masked_fill(~mask[:T, :T], -math.inf), v)


@spelled("relative bias of T5", lambda: (*bhtd(), normal(32, H, grad=False)), mask="True")
def _(q, k, v, table):
    n = positions(q)
    away = n[None, :] - n[:, None]
    sign = (away > 0).long() * 16
    away = away.abs()
    large = 8 + (torch.log(away.float() / 8) / math.log(128 / 8) * 8).long()
    bucket = sign + torch.where(away < 8, away, large.clamp(max=15))
    return attend(scores_of(q, k) + F.embedding(bucket, table).permute(2, 0, 1)[None], v)


@spelled("relative bias by clamped distance", lambda: (*bhtd(), normal(2 * 4 + 1, H, grad=False)), mask="True")
def _(q, k, v, table):
    n = positions(q)
    bias = table[(n[None, :] - n[:, None]).clamp(-4, 4) + 4].permute(2, 0, 1)
    return attend(scores_of(q, k) + bias, v)


def with_slopes() -> tuple[Any, ...]:
    return *bhtd(), 2.0 ** -torch.arange(1.0, H + 1)


@spelled("ALiBi", with_slopes, mask="j <= i", empty="impossible")
def _(q, k, v, slopes):
    n = positions(q)
    bias = slopes[:, None, None] * (n[None, :] - n[:, None])
    return attend((scores_of(q, k) + bias).masked_fill(~causal_of(q), -math.inf), v)


@spelled("ALiBi of key positions", with_slopes, mask="j <= i", empty="impossible")
def _(q, k, v, slopes):
    return attend((scores_of(q, k) + slopes.view(H, 1, 1) * positions(k)).masked_fill(~causal_of(q), -math.inf), v)


@spelled("ALiBi, slopes computed", mask="j <= i", empty="impossible")
def _(q, k, v):
    slopes = torch.pow(2.0, -(torch.arange(H) + 1).float())
    n = positions(q)
    return attend((scores_of(q, k) - slopes[:, None, None] * (n[:, None] - n).abs()).masked_fill(~causal_of(q), -math.inf), v)


@spelled("ALiBi by baddbmm", with_slopes, mask="True")
def _(q, k, v, slopes):
    alibi = (slopes[:, None] * positions(k))[None].expand(B, H, T).reshape(B * H, 1, T)
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    scores = alibi.baddbmm(batch1=q, batch2=k.mT, beta=0.5, alpha=SCALE)
    return torch.bmm(scores.view(B, H, T, T).softmax(-1).view(B * H, T, T), v).view(B, H, T, D)


@spelled("soft cap", score="20 * tanh(0.05 * s)", mask="j <= i")
def _(q, k, v):
    s = 20.0 * torch.tanh(q @ k.mT / 20.0)
    return attend(s.masked_fill(~causal_of(q), lowest(q)), v)


@spelled("temperature a head", lambda: (*bhtd(), torch.linspace(0.5, 1.5, H)), mask="True")
def _(q, k, v, temperature):
    return attend(scores_of(q, k) * temperature[:, None, None], v)


@spelled("scores shifted by a constant a row", lambda: (*bhtd(), normal(B, H, T, 1, grad=False)), mask="True")
def _(q, k, v, shift):
    return attend(scores_of(q, k) - shift, v)


@spelled("sinks", lambda: (*bhtd(), normal(H)), score=SCALED, mask="j <= i", sink="t0.f[h]")
def _(q, k, v, sinks):
    s = scores_of(q, k).masked_fill(~causal_of(q), lowest(q))
    weights = torch.cat([s, sinks.reshape(1, -1, 1, 1).expand(B, -1, T, -1)], dim=-1).softmax(-1)
    return weights[..., :-1] @ v


@spelled("sinks, shifted", lambda: (*bhtd(), normal(H)), score=SCALED, mask="j <= i", sink="t0.f[h]")
def _(q, k, v, sinks):
    s = scores_of(q, k).masked_fill(~causal_of(q), lowest(q))
    s = torch.cat([s, sinks.reshape(1, -1, 1, 1).expand(B, -1, T, -1)], dim=-1)
    weights = (s - s.max(dim=-1, keepdim=True).values).softmax(-1)
    return weights[..., :-1] @ v


@spelled("softmax plus one", score=SCALED, mask="True", sink="0")
def _(q, k, v):
    s = torch.cat([scores_of(q, k), torch.zeros(B, H, T, 1)], dim=-1)
    return s.softmax(-1)[..., :-1] @ v


@spelled("normalised queries and keys", lambda: (*bhtd(), normal(D), normal(D, seed=1)), **CAUSAL)
def _(q, k, v, a, b):
    q, k = F.rms_norm(q, (D,), a), F.rms_norm(k, (D,), b)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelled("rotary positions", **CAUSAL)
def _(q, k, v):
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    cos, sin = (torch.cat([x, x], -1) for x in (angle.cos(), angle.sin()))

    def rotate(x):
        return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin

    return attend(scores_of(rotate(q), rotate(k)).masked_fill(~causal_of(q), -math.inf), v)


@spelled(
    "concatenated keys of MLA",
    lambda: (*bhtd(), normal(B, H, T, 4), normal(B, 1, T, 4, seed=1)),
    score="0.288675 * s",
    mask="j <= i",
)
def _(q, k, v, q_rope, k_rope):
    q = torch.cat([q, q_rope], -1)
    k = torch.cat([k, k_rope.expand(-1, H, -1, -1)], -1)
    return attend((q @ k.mT * (D + 4) ** -0.5).masked_fill(~causal_of(q), -math.inf), v)


@spelled("values of another depth", lambda: (*bhtd()[:2], normal(B, H, T, 12)), **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k).masked_fill(~causal_of(q), -math.inf), v)


def swin_windows() -> tuple[Any, ...]:
    """12 windows of 9 places, 3 heads; 4 windows an image."""
    mask = torch.where(normal(4, 9, 9, grad=False) > 0, 0.0, -100.0)
    return *(normal(12, 3, 9, D, seed=n) for n in range(3)), normal(25, 3, grad=False), torch.randint(0, 25, (9, 9)), mask


@spelled("windows of Swin", swin_windows, mask="True")
def _(q, k, v, table, index, mask):
    bias = table[index.view(-1)].view(9, 9, -1).permute(2, 0, 1).contiguous()
    s = scores_of(q, k) + bias.unsqueeze(0)
    s = (s.view(3, 4, 3, 9, 9) + mask.unsqueeze(1).unsqueeze(0)).view(-1, 3, 9, 9)
    return attend(s, v)


@pytest.mark.parametrize("case", SPELLINGS, ids=lambda case: case.name)
def test_spelling(case: Spelling):
    assert_read_as_written(case)
