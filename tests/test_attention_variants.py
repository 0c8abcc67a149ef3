"""Attention as papers and repositories write it: masks by index arithmetic and by data, biases, sinks, latents, differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.attention_forms import (
    CAUSAL,
    FLASH_ON_CPU,
    HK,
    PADDED,
    PLAIN,
    SCALE,
    SCALED,
    B,
    D,
    H,
    Spelling,
    Spellings,
    assert_read_as_written,
    attend,
    bhtd,
    causal_of,
    lowest,
    normal,
    positions,
    scores_of,
    with_padding,
)
from tests.vocabulary import GPU, Compiled, assert_all_rewritten, assert_within_contract

N, BLOCK = 16, 4  # length, and length of a block
VARIANTS = variant = Spellings()


def square(heads: int = H, kv_heads: int | None = None, **options: Any) -> tuple[torch.Tensor, ...]:
    return bhtd(heads, kv_heads, N, N, **options)


def grid(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return positions(q)[:, None], positions(k)[None]


def masked(q, k, v, mask):
    return attend(scores_of(q, k).masked_fill(~mask, -math.inf), v)


# -------------------------------------------------------------------- documents

DOCUMENTS: dict[str, Any] = {"score": SCALED, "mask": "t0.i[i] == t0.i[j]", "empty": "impossible"}


def with_starts() -> tuple[Any, ...]:
    return *square(), torch.tensor([0, 5, 9, 16])


@variant("documents by searchsorted", with_starts, **DOCUMENTS)
def _(q, k, v, starts):
    doc = torch.searchsorted(starts, positions(q), right=True)
    return masked(q, k, v, doc[:, None] == doc)


@variant("documents by bucketize", with_starts, **DOCUMENTS)
def _(q, k, v, starts):
    doc = torch.bucketize(positions(q), starts[1:], right=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=doc[:, None] == doc)


@variant("documents by marks that are counted", with_starts, **DOCUMENTS)
def _(q, k, v, starts):
    doc = torch.zeros(N + 1, dtype=torch.long).index_fill(0, starts, 1)[:N].cumsum(0)
    return masked(q, k, v, doc[:, None] == doc)


@variant("documents by ids repeated", lambda: (*square(), torch.tensor([5, 4, 7])), **DOCUMENTS)
def _(q, k, v, lengths):
    doc = torch.repeat_interleave(torch.arange(3), lengths, output_size=N)
    return masked(q, k, v, doc[:, None] == doc)


@variant("documents after a token", lambda: (*square(), torch.arange(B * N).view(B, N) % 7),
         score=SCALED, mask="(j <= i) & (t0.i[b, i] == t0.i[b, j])", empty="impossible")  # fmt: skip
def _(q, k, v, tokens):
    doc = (tokens == 0).cumsum(-1)
    return masked(q, k, v, (doc[:, None, :, None] == doc[:, None, None, :]) & causal_of(q))


@variant("documents by slices", square, score=SCALED, empty="impossible")
def _(q, k, v):
    mask = torch.full((N, N), -math.inf)
    for a, b in ((0, 5), (5, 9), (9, 16)):
        mask[..., a:b, a:b] = 0
    return attend(scores_of(q, k) + mask, v)


@variant("documents by block_diag", square, score=SCALED, empty="impossible")
def _(q, k, v):
    return masked(q, k, v, torch.block_diag(*(torch.ones(n, n) for n in (5, 4, 7))) != 0)


# -------------------------------------------------------------------- prefixes and patterns


@variant("prefix by assignment", square, score=SCALED, mask="(j <= 3) | (j <= i) & (j >= 4)", empty="impossible")
def _(q, k, v):
    mask = torch.full((N, N), -math.inf).triu(1)
    mask[:, :4] = 0
    return attend(scores_of(q, k) + mask, v)


@variant("prefix lengths", lambda: (*square(), torch.tensor([4, 7])), mask="(j <= i) | (j <= t0.i[b] - 1)", empty="impossible")
def _(q, k, v, lengths):
    i, j = grid(q, k)
    return masked(q, k, v, ((j <= i) | (j < lengths[:, None, None]))[:, None])


@variant("band of two triangles", square, score=SCALED, mask="(j <= i) & (j >= i - 3)", empty="impossible")
def _(q, k, v):
    ones = torch.ones(N, N)
    return masked(q, k, v, ones.tril() - ones.tril(-4) != 0)


@variant("chunks by a distance of zero", square, score=SCALED, mask="(i // 4 == j // 4) & (j <= i)", empty="impossible")
def _(q, k, v):
    i, j = grid(q, k)
    return masked(q, k, v, ((i // BLOCK - j // BLOCK).abs() == 0) & (j <= i))


@variant("triangle rewritten twice", square, **CAUSAL)
def _(q, k, v):
    mask = torch.ones(N, N).tril()
    return attend(scores_of(q, k) + mask.masked_fill(mask == 0, -math.inf).masked_fill(mask == 1, 0.0), v)


@variant("logarithm of a triangle", square, **CAUSAL)
def _(q, k, v):
    return attend(scores_of(q, k) + torch.log(torch.ones(N, N).tril()), v)


@variant("strided", square, mask="(((i - j) % 4 == 0) | (j >= i - 3)) & (j <= i)", empty="impossible")
def _(q, k, v):
    i, j = grid(q, k)
    return masked(q, k, v, (i >= j) & ((i - j < BLOCK) | ((i - j) % BLOCK == 0)))


@variant("window and global tokens", lambda: (*square(), torch.arange(N).expand(B, N) % 5 == 0), empty="impossible",
         mask="(j <= i + 2) & (j >= i - 2) | bool(t0.b[b, i]) | bool(t0.b[b, j])")  # fmt: skip
def _(q, k, v, anywhere):
    i, j = grid(q, k)
    return masked(q, k, v, ((i - j).abs() <= 2) | anywhere[:, None, :, None] | anywhere[:, None, None, :])


@variant("blocks listed in a table", lambda: (*square(), torch.eye(4).roll(1, 1) + torch.eye(4) > 0), empty="zero",
         mask="bool(t0.b[i // 4, j // 4])")  # fmt: skip
def _(q, k, v, blocks):
    i, j = grid(q, k)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=blocks[i // BLOCK, j // BLOCK])


@variant("random blocks and neighbours", lambda: (*square(), torch.tensor([[0, 2], [1, 3], [0, 3], [1, 2]])), empty="impossible")
def _(q, k, v, drawn):
    i, j = grid(q, k)
    blocks = torch.zeros(4, 4, dtype=torch.bool).scatter(1, drawn, True)
    return masked(q, k, v, ((i // BLOCK - j // BLOCK).abs() <= 1) | blocks[i // BLOCK, j // BLOCK])


@variant("causal blocks", square, score=SCALED, mask="j // 4 <= i // 4", empty="impossible")
def _(q, k, v):
    n = positions(q) // BLOCK
    return masked(q, k, v, n[:, None] >= n)


@variant("noisy and clean blocks", lambda: bhtd(queries=2 * N, keys=2 * N), score=SCALED, empty="impossible")
def _(q, k, v):
    n = torch.arange(N) // BLOCK
    same, before = n[:, None] == n, n[:, None] > n
    upper, lower = torch.cat([same, before], 1), torch.cat([torch.zeros_like(same), same | before], 1)
    return masked(q, k, v, torch.cat([upper, lower]))


@variant(
    "tree after a prefix",
    lambda: (*bhtd(queries=4, keys=20), torch.eye(4, dtype=torch.bool)),
    mask="(j <= 15) | (j >= 16) & bool(t0.b[i, max(0, j - 16)])",
    empty="impossible",
)
def _(q, k, v, tree):
    mask = torch.hstack([torch.ones(4, N, dtype=torch.bool), tree])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@variant("window a head", lambda: (*square(), torch.tensor([2, 4, 8, 16, 3, 5])), mask="(j <= i) & (j >= i + 1 - t0.i[h])")
def _(q, k, v, width):
    i, j = grid(q, k)
    return masked(q, k, v, (j <= i) & (i - j < width[:, None, None]))


@variant("places of an image", square, empty="impossible",
         mask="(i % 4 <= j % 4 + 1) & (i // 4 <= j // 4 + 1) & (j % 4 <= i % 4 + 1) & (j // 4 <= i // 4 + 1)")  # fmt: skip
def _(q, k, v):
    y, x = positions(q) // 4, positions(q) % 4
    return masked(q, k, v, ((y[:, None] - y).abs() <= 1) & ((x[:, None] - x).abs() <= 1))


# -------------------------------------------------------------------- blocks that the data select


def chosen_blocks(q, k):
    means = k.view(*k.shape[:2], N // BLOCK, BLOCK, D).mean(3)
    return (q @ means.mT).topk(2, dim=-1).indices


SELECTED: dict[str, Any] = {"score": SCALED, "mask": "(j <= i) & bool(t0.b[b, h, i, j // 4])", "empty": "nan"}


@variant("selected by scatter", square, **SELECTED)
def _(q, k, v):
    blocks = torch.zeros(B, H, N, N // BLOCK, dtype=torch.bool).scatter(-1, chosen_blocks(q, k), True)
    return masked(q, k, v, blocks.repeat_interleave(BLOCK, dim=-1) & causal_of(q))


BY_BLOCK: dict[str, Any] = {"score": SCALED, "mask": "(j <= i) & bool(t0.b[b, h, i // 4, j // 4])", "empty": "nan"}


def chosen_for_blocks(q, k):
    queries, keys = (x.view(*x.shape[:2], N // BLOCK, BLOCK, D).mean(3) for x in (q, k))
    return (queries @ keys.mT).topk(2, dim=-1).indices


@variant("selected for a block of queries, by scatter", square, **BY_BLOCK)
def _(q, k, v):
    blocks = torch.zeros(B, H, N // BLOCK, N // BLOCK, dtype=torch.bool).scatter(-1, chosen_for_blocks(q, k), True)
    mask = blocks.repeat_interleave(BLOCK, dim=-1).repeat_interleave(BLOCK, dim=-2)
    return masked(q, k, v, mask & causal_of(q))


@variant("selected for a block of queries, by scatter_", square, **BY_BLOCK)
def _(q, k, v):
    blocks = torch.zeros(B, H, N // BLOCK, N // BLOCK, dtype=torch.bool)
    blocks.scatter_(-1, chosen_for_blocks(q, k), True)
    mask = blocks[..., :, None, :, None].expand(-1, -1, -1, BLOCK, -1, BLOCK).reshape(B, H, N, N)
    return masked(q, k, v, mask & causal_of(q))


@variant("selected for a block of queries, to SDPA", square, mask="t0.f[b, h, i // 4, j // 4] > 0", empty="zero")
def _(q, k, v):
    blocks = torch.zeros(B, H, N // BLOCK, N // BLOCK).scatter(-1, chosen_for_blocks(q, k), 1.0) > 0
    mask = blocks.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@variant("selected for a block of queries, an own block always", square,
         mask="((i // 4 == j // 4) | bool(t0.b[b, h, i // 4, j // 4])) & (j <= i)", empty="impossible")  # fmt: skip
def _(q, k, v):
    """As MoBA: the block of the query itself, and the best ones before it."""
    i, j = grid(q, k)
    blocks = torch.zeros(B, H, N // BLOCK, N // BLOCK, dtype=torch.bool).scatter(-1, chosen_for_blocks(q, k), True)
    chosen = blocks[:, :, i // BLOCK, j // BLOCK]
    return masked(q, k, v, (chosen | (i // BLOCK == j // BLOCK)) & (j <= i))


@variant("selected by one_hot", square, mask="(j <= i) & (t0.i[b, h, i, j // 4] != 0)", empty="nan")
def _(q, k, v):
    blocks = F.one_hot(chosen_blocks(q, k), N // BLOCK).sum(-2).bool()
    return masked(q, k, v, blocks.repeat_interleave(BLOCK, dim=-1) & causal_of(q))


@variant("selected by equality with any", square, empty="nan")
def _(q, k, v):
    blocks = (chosen_blocks(q, k)[..., None, :] == (positions(k) // BLOCK)[:, None]).any(-1)
    return masked(q, k, v, blocks & causal_of(q))


@variant("selected for a group of heads", lambda: square(H, HK), mask="(j <= i) & bool(t0.b[b, h // 2, i, j // 4])", empty="zero")
def _(q, k, v):
    indices = chosen_blocks(q.view(B, HK, 2, N, D).mean(2), k)
    blocks = torch.zeros(B, HK, N, N // BLOCK, dtype=torch.bool).scatter(-1, indices, True)
    mask = blocks.repeat_interleave(2, 1).repeat_interleave(BLOCK, -1) & causal_of(q)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@variant("selected pages of one query", lambda: bhtd(queries=1, keys=N), mask="bool(t0.b[b, h, j // 4])", empty="zero")
def _(q, k, v):
    pages = k.view(B, H, N // BLOCK, BLOCK, D)
    bound = torch.maximum(q * pages.amax(3), q * pages.amin(3)).sum(-1)
    blocks = torch.zeros(B, H, N // BLOCK, dtype=torch.bool).scatter(-1, bound.topk(2, -1).indices, True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=blocks.repeat_interleave(BLOCK, -1)[:, :, None])


@variant("blocks above a threshold", square, mask="(i == j) | (t0.f[b, h, i, j // 4] > 0.2)", empty="impossible")
def _(q, k, v):
    share = (q @ k.view(B, H, N // BLOCK, BLOCK, D).mean(3).mT).detach().softmax(-1)
    return masked(q, k, v, (share > 0.2).repeat_interleave(BLOCK, -1) | torch.eye(N, dtype=torch.bool))


# -------------------------------------------------------------------- rows without a key, made zero


@variant("a NaN is made zero", with_padding, **PADDED, empty="zero")
def _(q, k, v, keep):
    weights = scores_of(q, k).masked_fill(~keep[:, None, None], -math.inf).softmax(-1)
    return torch.nan_to_num(weights) @ v


@variant("what is not a number is made zero", with_padding, **PADDED, empty="zero")
def _(q, k, v, keep):
    weights = scores_of(q, k).masked_fill(~keep[:, None, None], -math.inf).softmax(-1)
    return weights.masked_fill(weights.isnan(), 0.0) @ v


def every_key_hidden() -> tuple[Any, ...]:
    """As `with_padding`; the second row has no key at all."""
    *tensors, keep = with_padding()
    keep[1] = False
    return *tensors, keep


@variant("masked again after the softmax", every_key_hidden, **PADDED, empty="zero")
def _(q, k, v, keep):
    weights = scores_of(q, k).masked_fill(~keep[:, None, None], lowest(q)).softmax(-1)
    return weights.masked_fill(~keep[:, None, None], 0.0) @ v


@variant("multiplied with the mask after the softmax", every_key_hidden, **PADDED, empty="zero")
def _(q, k, v, keep):
    weights = scores_of(q, k).masked_fill(~keep[:, None, None], lowest(q)).softmax(-1)
    return (weights * keep[:, None, None]) @ v


@variant("a NaN multiplied with the mask", every_key_hidden, **PADDED, empty="nan")
def _(q, k, v, keep):
    weights = scores_of(q, k).masked_fill(~keep[:, None, None], -math.inf).softmax(-1)
    return (weights * keep[:, None, None]) @ v


@variant("rows without any key made zero", every_key_hidden, mask="(j <= i) & bool(t0.b[b, j])", empty="zero")
def _(q, k, v, keep):
    mask = keep[:, None, None] & causal_of(q)
    weights = scores_of(q, k).masked_fill(~mask, -math.inf).softmax(-1)
    return torch.where(mask.any(-1, keepdim=True), weights, 0.0) @ v


# -------------------------------------------------------------------- biases


@variant("table of distances", lambda: (*square(), normal(H, 2 * N - 1, grad=False)), score=f"{SCALED} + t0.f[h, i + 15 - j]")
def _(q, k, v, table):
    i, j = grid(q, k)
    return attend(scores_of(q, k) + table.gather(1, (i - j + N - 1).flatten().expand(H, N * N)).view(H, N, N), v)


@variant("slopes by outer product", lambda: (*square(), torch.linspace(0.1, 0.6, H)), score=f"{SCALED} + j * t0.f[h]")
def _(q, k, v, slopes):
    return attend(scores_of(q, k) + torch.outer(slopes, positions(k).float())[:, None], v)


@variant("logarithm of the distance", lambda: (*square(), torch.linspace(0.1, 0.6, H)), mask="j <= i", empty="impossible")
def _(q, k, v, slopes):
    i, j = grid(q, k)
    bias = -torch.log1p(slopes[:, None, None] * (i - j).abs())
    return attend((scores_of(q, k) + bias).masked_fill(~causal_of(q), -math.inf), v)


@variant("forgetting gates", lambda: (*square(), normal(B, H, N, grad=False)), score=f"{SCALED} + t0.f[b, h, i] - t0.f[b, h, j]")
def _(q, k, v, gates):
    total = F.logsigmoid(gates).cumsum(-1)
    return attend((scores_of(q, k) + total[..., :, None] - total[..., None, :]).masked_fill(~causal_of(q), -math.inf), v)


@variant("scores grow with the row", square, score="0.353553 * s * log(i + 2)", mask="j <= i")
def _(q, k, v):
    return attend((scores_of(q, k) * torch.log(positions(q)[:, None] + 2.0)).masked_fill(~causal_of(q), -math.inf), v)


def windows() -> tuple[Any, ...]:
    return *(normal(8, 3, N, D, seed=n) for n in range(3)), normal(49, 3, grad=False)


@variant("bias of places in a window", windows, score=f"{SCALED} + t0.f[7 * (i // 4) + i % 4 + 24 - 7 * (j // 4) - j % 4, h]")
def _(q, k, v, table):
    place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
    away = (place[:, :, None] - place[:, None]).permute(1, 2, 0) + 3
    index = away[..., 0] * 7 + away[..., 1]
    return attend(scores_of(q, k) + table[index.view(-1)].view(N, N, -1).permute(2, 0, 1), v)


@variant("shifted windows", windows, mask="True")
def _(q, k, v, table):
    image = torch.zeros(8, 8)
    parts = (slice(0, -4), slice(-4, -2), slice(-2, None))
    for n, (rows, columns) in enumerate((a, b) for a in parts for b in parts):
        image[rows, columns] = n
    part = image.view(2, 4, 2, 4).permute(0, 2, 1, 3).reshape(4, N)
    apart = part.unsqueeze(1) - part.unsqueeze(2)
    apart = apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)
    s = (scores_of(q, k).view(2, 4, 3, N, N) + apart[None, :, None]).view(-1, 3, N, N)
    return attend(s, v)


# -------------------------------------------------------------------- further logits

ONE_MORE: dict[str, Any] = {"score": SCALED, "mask": "True", "empty": "impossible", "sink": "0"}


@variant("one in the denominator", **ONE_MORE)
def _(q, k, v):
    e = scores_of(q, k).exp()
    return e / (1 + e.sum(-1, keepdim=True)) @ v


@variant("one in the denominator, shifted", **ONE_MORE)
def _(q, k, v):
    s = scores_of(q, k)
    most = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - most).exp()
    return e / (e.sum(-1, keepdim=True) + torch.exp(-most)) @ v


@variant("one in the denominator, after the values", **ONE_MORE)
def _(q, k, v):
    e = scores_of(q, k).exp()
    return (e @ v) / (e.sum(-1, keepdim=True) + 1)


@variant("one in the denominator, masked", **{**ONE_MORE, "mask": "j <= i"})
def _(q, k, v):
    e = torch.where(causal_of(q), scores_of(q, k).exp(), 0.0)
    return e / (1 + e.sum(-1, keepdim=True)) @ v


@variant("zero padded in front", **ONE_MORE)
def _(q, k, v):
    return F.pad(scores_of(q, k), (1, 0)).softmax(-1)[..., 1:] @ v


@variant("a small number in the denominator", score=SCALED, sink="-11.5129")
def _(q, k, v):
    e = scores_of(q, k).exp()
    return e / (e.sum(-1, keepdim=True) + 1e-5) @ v


@variant("sinks in front", lambda: (*bhtd(), normal(H)), score=SCALED, mask="j <= i", sink="t0.f[h]")
def _(q, k, v, sinks):
    s = scores_of(q, k).masked_fill(~causal_of(q), -math.inf)
    return torch.cat([sinks.view(1, H, 1, 1).expand(*s.shape[:3], 1), s], -1).softmax(-1)[..., 1:] @ v


@variant("sinks in the denominator", lambda: (*bhtd(), normal(H)), score=SCALED, sink="t0.f[h]")
def _(q, k, v, sinks):
    e = scores_of(q, k).exp()
    return e / (e.sum(-1, keepdim=True) + sinks.exp().view(1, H, 1, 1)) @ v


@variant(
    "sinks take the whole of a row without keys", lambda: (*every_key_hidden(), normal(H)), **PADDED, empty="zero", sink="t1.f[h]"
)
def _(q, k, v, keep, sinks):
    s = scores_of(q, k).masked_fill(~keep[:, None, None], lowest(q))
    return torch.cat([s, sinks.view(1, H, 1, 1).expand(*s.shape[:3], 1)], -1).softmax(-1)[..., :-1] @ v


# -------------------------------------------------------------------- softmax by hand


@variant("by hand, masked by a product", **CAUSAL)
def _(q, k, v):
    s = scores_of(q, k)
    e = (s - s.max(-1, keepdim=True)[0]).exp() * causal_of(q)
    return e / e.sum(-1, keepdim=True) @ v


@variant("by hand, masked by where", **CAUSAL)
def _(q, k, v):
    s = scores_of(q, k)
    e = torch.where(causal_of(q), (s - s.amax(-1, keepdim=True)).exp(), 0.0)
    return e / e.sum(-1, keepdim=True) @ v


@variant("by hand, powers of two", **PLAIN)
def _(q, k, v):
    s = scores_of(q, k) / math.log(2)
    e = torch.exp2(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True) @ v


@variant("softmin", **PLAIN)
def _(q, k, v):
    return F.softmin(-scores_of(q, k), dim=-1) @ v


@variant("infinite scores made finite", **PLAIN)
def _(q, k, v):
    return attend(torch.nan_to_num(scores_of(q, k)), v)


@variant("infinite scores made a finite fill", score=SCALED, mask="j <= i - 1", empty="mean", untrained=FLASH_ON_CPU)
def _(q, k, v):
    s = scores_of(q, k).masked_fill(~causal_of(q).tril(-1), -math.inf)
    return attend(torch.nan_to_num(s, neginf=-1e9), v)


@variant("infinite sums made a finite fill", score=SCALED, mask="j <= i - 1", empty="mean", untrained=FLASH_ON_CPU)
def _(q, k, v):
    return attend(torch.nan_to_num(scores_of(q, k) + torch.full((q.shape[2], k.shape[2]), -math.inf).triu()), v)


# -------------------------------------------------------------------- sums of probabilities


def two_pairs() -> tuple[torch.Tensor, ...]:
    return *bhtd(), normal(*bhtd()[0].shape, seed=7), normal(*bhtd()[1].shape, seed=8)


@variant("differential", two_pairs, **CAUSAL)
def _(q, k, v, q2, k2):
    fill = torch.full((q.shape[2], k.shape[2]), -math.inf).triu(1)
    return ((scores_of(q, k) + fill).softmax(-1) - 0.5 * (scores_of(q2, k2) + fill).softmax(-1)) @ v


@variant("differential, learned share", lambda: (*two_pairs(), normal(H)), **PLAIN)
def _(q, k, v, q2, k2, share):
    weights = scores_of(q, k).softmax(-1) - share[:, None, None] * scores_of(q2, k2).softmax(-1)
    return torch.einsum("bhij,bhjd->bihd", weights, v)


@variant("differential, heads in pairs", lambda: (*bhtd(2 * H)[:2], bhtd()[2], normal(D), normal(D, seed=1)), **CAUSAL)
def _(q, k, v, a, b):
    s = torch.nan_to_num(scores_of(q, k)) + torch.full((q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype).triu(1)
    weights = F.softmax(s, dim=-1, dtype=torch.float32).type_as(s).view(B, H, 2, q.shape[2], k.shape[2])
    return (weights[:, :, 0] - ((a * b).sum().exp() + 0.8) * weights[:, :, 1]) @ v


@variant("probabilities scaled", lambda: (*bhtd(), normal(H)), **PLAIN)
def _(q, k, v, share):
    return (0.7 * scores_of(q, k).softmax(-1) * share[:, None, None]) @ v


@variant("two attentions averaged", lambda: two_pairs()[:4], **PLAIN)
def _(q, k, v, q2):
    return ((scores_of(q, k).softmax(-1) + scores_of(q2, k).softmax(-1)) / 2) @ v


# -------------------------------------------------------------------- learned temperatures


@variant("temperature that learns", lambda: (*bhtd(), normal(H)), **PLAIN)
def _(q, k, v, temperature):
    return attend(scores_of(q, k) * temperature[:, None, None], v)


@variant("cosines with a temperature that learns", lambda: (*bhtd(), normal(H, 1, 1)), score="s", mask="True")
def _(q, k, v, temperature):
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return attend(s * temperature.clamp(max=math.log(100.0)).exp(), v)


@variant("temperature that learns, keys first", lambda: (*bhtd(), normal(H)), score="s", mask="True")
def _(q, k, v, temperature):
    return ((k @ q.mT) * temperature[:, None, None]).softmax(-2).mT @ v


@variant("temperature that learns, einsum", lambda: (*bhtd(), normal(H)), score="s", mask="True")
def _(q, k, v, temperature):
    s = torch.einsum("bhid,bhjd->bhij", q, k) * temperature.exp().view(1, H, 1, 1)
    return torch.einsum("bhij,bhjd->bihd", s.softmax(-1), v)


# -------------------------------------------------------------------- heads, latents, parts of tensors


def grouped_queries() -> tuple[torch.Tensor, ...]:
    return normal(B, HK, 2, N, D), normal(B, HK, N, D, seed=1), normal(B, HK, N, D, seed=2)


@variant("queries of groups in five dimensions", grouped_queries, **CAUSAL)
def _(q, k, v):
    weights = (torch.einsum("bkgid,bkjd->bkgij", q, k) * SCALE).masked_fill(~causal_of(k), -math.inf).softmax(-1)
    return torch.einsum("bkgij,bkjd->bkgid", weights, v)


@variant(
    "queries of groups, length first", lambda: (normal(B, N, HK, 2, D), normal(B, N, HK, D), normal(B, N, HK, D, seed=1)), **PLAIN
)
def _(q, k, v):
    weights = (torch.einsum("bikgd,bjkd->bkgij", q, k) * SCALE).softmax(-1)
    return torch.einsum("bkgij,bjkd->bikgd", weights, v)


@variant("SDPA in five dimensions", lambda: tuple(normal(B, 2, HK, N, D, seed=n) for n in range(3)), **CAUSAL)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@variant("queries that all heads share", lambda: (normal(B, 5, D), *bhtd()[1:]), **PLAIN)
def _(q, k, v):
    return attend(scores_of(q[:, None].expand(-1, H, -1, -1), k), v)


@variant("latent queries that all share", lambda: (normal(5, D), *bhtd()[1:]), **PLAIN)
def _(q, k, v):
    return attend(scores_of(q, k), v)


@variant("latent queries that all share, SDPA", lambda: (normal(5, D), *bhtd()[1:]), **{**PLAIN, "empty": "impossible"})
def _(q, k, v):
    return F.scaled_dot_product_attention(q.expand(B, H, -1, -1), k, v)


@variant("keys of a group, values of each head", lambda: (*bhtd(H, HK)[:2], bhtd()[2]), **PLAIN)
def _(q, k, v):
    return attend(scores_of(q, k.repeat_interleave(H // HK, 1)), v)


@variant(
    "keys and values of one latent", lambda: (normal(B, H, 4, 24), normal(B, N, 24, seed=1)), score="0.204124 * s", mask="True"
)
def _(q, latent):
    s = torch.einsum("bhid,bjd->bhij", q, latent) * 24**-0.5
    return torch.einsum("bhij,bjd->bhid", s.softmax(-1), latent[..., :16])


@variant("keys and values of one latent, SDPA", lambda: (normal(B, H, 4, 24), normal(B, N, 24, seed=1)), mask="True")
def _(q, latent):
    k = latent[:, None]
    return F.scaled_dot_product_attention(q, k, k[..., :16], enable_gqa=True)


@variant("the first keys of a cache", lambda: bhtd(queries=4, keys=24), **PLAIN)
def _(q, k, v):
    return attend(scores_of(q, k[:, :, :20]), v[:, :, :20])


@variant("the first keys of a cache, SDPA", lambda: bhtd(queries=4, keys=24), **PLAIN)
def _(q, k, v):
    return F.scaled_dot_product_attention(q, k.narrow(2, 0, 20), v.narrow(2, 0, 20))


@variant("parts of every tensor", lambda: bhtd(2 * H, queries=N, keys=24), **PLAIN)
def _(q, k, v):
    return attend(scores_of(q[:, ::2, 3:9], k[:, 1::2, 2:22]), v[:, ::2, 2:22])


@variant("every other key", lambda: bhtd(keys=24), **PLAIN)
def _(q, k, v):
    return attend(scores_of(q, k[:, :, 1::2]), v[:, :, ::2])


@variant("scores added to a mask by addmm", lambda: tuple(normal(N, D, seed=n) for n in range(3)), **CAUSAL)
def _(q, k, v):
    return torch.addmm(torch.full((N, N), -math.inf).triu(1), q, k.t(), alpha=SCALE).softmax(-1) @ v


@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_variant(case: Spelling):
    assert_read_as_written(case)


# -------------------------------------------------------------------- other modes


def in_two_parts(q, k, v, q_rope, k_rope):
    return attend((q @ k.mT + q_rope @ k_rope.mT) * 12**-0.5, v)


def shifted_positions(q, k, v, u, w, r):
    """Transformer-XL: the distance's share of the scores comes out of a second contraction, shifted by one each row."""
    distance = ((q + w[:, None]) @ r.mT).expand(B, H, N, N)
    distance = F.pad(distance, (1, 0)).view(B, H, N + 1, N)[:, :, 1:].view(B, H, N, N)
    return attend((((q + u[:, None]) @ k.mT + distance) * SCALE).masked_fill(~causal_of(q), -math.inf), v)


def gathered_positions(q, k, v, r):
    """DeBERTa: content to position, gathered from a second contraction."""
    i, j = grid(q, k)
    return attend((q @ k.mT + (q @ r.mT).gather(-1, (i - j + N).expand(B, H, N, N))) * SCALE, v)


SECOND_CONTRACTIONS = {
    "in two parts": (in_two_parts, lambda: (*square(), normal(B, H, N, 4), normal(B, 1, N, 4, seed=1))),
    "shifted positions": (shifted_positions, lambda: (*square(), normal(H, D), normal(H, D, seed=1), normal(H, N, D, seed=2))),
    "gathered positions": (gathered_positions, lambda: (*square(), normal(H, 2 * N, D))),
}


@pytest.mark.parametrize("name", SECOND_CONTRACTIONS)
def test_a_second_contraction_is_a_bias(name):
    f, make = SECOND_CONTRACTIONS[name]
    compiled = assert_within_contract(f, *make())
    assert_all_rewritten(compiled, learned=("t0",))
    assert "t0.f" in compiled.decisions()[0].spec["score"]


def test_a_change_that_no_attention_follows_is_undone():
    """The share of the second softmax would be moved behind the values, if that one were an attention too."""

    def f(q, k, v, bias):
        return (scores_of(q, k).softmax(-1) - 0.5 * bias.softmax(-1)) @ v + attend(scores_of(k, q), v)

    compiled = Compiled(f, (GPU,))
    compiled(*bhtd(), normal(H, 10, 10))
    outcomes = [d.outcome for d in compiled.decisions()]
    assert outcomes.count("rewritten") == 1 and "refused" in outcomes
    (graph,) = compiled.graphs[GPU]
    products = [n for n in graph.graph.nodes if n.target in (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default)]
    assert len(products) == 2, "scores and values of the one that was left"


def test_a_change_of_an_attention_that_is_left_is_taken_back():
    """A CPU leaves soft-capped scores to Inductor, which then gets one contraction with the values, as it was written."""

    def capped(q, k):
        return (20.0 * torch.tanh(scores_of(q, k) / 20.0)).softmax(-1)

    def f(q, k, v, k2):
        return (capped(q, k) - 0.5 * capped(q, k2)) @ v + attend(scores_of(k, q), v)

    compiled = assert_within_contract(Compiled(f, ("cpu",)), *bhtd(), normal(B, H, 10, D, seed=7))
    assert sorted(d.outcome for d in compiled.decisions()) == ["left", "left", "rewritten"]
    (graph,) = compiled.graphs["cpu"]
    products = [n for n in graph.graph.nodes if n.target in (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default)]
    assert len(products) == 3, "two of scores and one of values"


NARROW = ["differential, heads in pairs", "probabilities scaled", "one in the denominator", "sinks in front", "a NaN is made zero",
          "temperature that learns", "queries of groups in five dimensions", "keys and values of one latent"]  # fmt: skip


@pytest.mark.parametrize("name", NARROW)
def test_half_precision(name):
    case = next(case for case in VARIANTS if case.name == name)
    args = [x.detach().bfloat16().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in case.make()]  # fmt: skip
    assert_all_rewritten(assert_within_contract(case.f, *args))


def cache_prefix(q, k, v, n):
    return F.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n])


def latent_prefix(q, k, v, n):
    return F.scaled_dot_product_attention(q, k, v[..., :4], is_causal=True)


@pytest.mark.parametrize("f", [cache_prefix, latent_prefix], ids=lambda f: f.__name__)
def test_parts_of_symbolic_sizes(f):
    compiled = Compiled(f)
    for n in (12, 20, 17):
        args = bhtd(queries=4, keys=n + 4)
        torch._dynamo.mark_dynamic(args[1], 2)
        torch._dynamo.mark_dynamic(args[2], 2)
        assert_within_contract(compiled, *args, n)
    assert_all_rewritten(compiled)


part = st.tuples(st.integers(0, 2), st.integers(1, 2))  # where a slice starts, and its step


def cut(x, dim, size, start, step):
    return x[(slice(None),) * dim + (slice(start, start + step * (size - 1) + 1, step),)]


@settings(max_examples=15, deadline=None)
@given(heads=st.tuples(part, part), lengths=st.tuples(part, part), transposed=st.booleans(), group=st.sampled_from((1, 2)))
def test_any_part_of_any_tensor(heads, lengths, transposed, group):
    """Queries, keys and values cut out of longer tensors, along heads and lengths."""

    def f(q, k, v):
        (q, k, v) = (x.transpose(1, 2) if transposed else x for x in (q, k, v))
        q = cut(cut(q, 1, 2 * group, *heads[0]), 2, 5, *lengths[0])
        k, v = (cut(cut(x, 1, 2, *heads[1]), 2, 7, *lengths[1]).repeat_interleave(group, 1) for x in (k, v))
        return attend(scores_of(q, k), v)

    torch._dynamo.reset()
    compiled = Compiled(f, (GPU,))
    assert_within_contract(compiled, *(normal(1, 20, 20, D, seed=n) for n in range(3)), grad=False)
    assert_all_rewritten(compiled, mask="True")
