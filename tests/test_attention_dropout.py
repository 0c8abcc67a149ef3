"""Dropout of an attention's weights: drawn from a seed by Philox, the same in forward and backward, right in distribution."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch.nn import functional as F

from effcompile.ops.attention import AttentionSpec, reference
from effcompile.ops.dropout import dropout_keeps, philox
from tests.attention_forms import SCALE, SCALED, B, D, H, T, attend, bhtd, causal_of, lowest, normal, scores_of, with_padding
from tests.vocabulary import GPU, Compiled, assert_all_rewritten, assert_refused

P = 0.25


def hugging_face(q, k, v):
    weights = scores_of(q, k).masked_fill(~causal_of(q), -math.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, P, training=True) @ v


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=P, is_causal=True)


def masked_again(q, k, v):
    weights = scores_of(q, k).masked_fill(~causal_of(q), -math.inf).softmax(-1)
    return F.dropout(weights.masked_fill(~causal_of(q), 0.0), P).nan_to_num() @ v


def folded(q, k, v):
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    weights = (torch.bmm(q, k.mT) * SCALE).masked_fill(~causal_of(q), -math.inf).softmax(-1)
    return torch.bmm(F.dropout(weights, P), v)


FORMS = {f.__name__: f for f in (hugging_face, sdpa, masked_again, folded)}


@pytest.mark.parametrize("name", FORMS)
def test_form(name):
    compiled = Compiled(FORMS[name], (GPU,))
    args = bhtd()
    compiled(*args).sum().backward()
    assert_all_rewritten(compiled, dropout=P, score=SCALED, mask="j <= i")
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in args)
    (graph,) = compiled.graphs[GPU]
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.randint.low) == 1 and torch.ops.aten.dropout.default not in targets


def test_a_seed_decides():
    compiled = Compiled(hugging_face, (GPU,))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        args = bhtd()
        out = compiled(*args)
        found.append((out, *torch.autograd.grad(out.sum(), args)))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])


def test_two_layers_draw_apart():
    def f(q, k, v):
        return sdpa(q, k, v), sdpa(q, k, v)

    first, second = Compiled(f, (GPU,))(*bhtd())
    assert not torch.equal(first, second)


def test_the_mean_is_the_attention_without_dropout():
    """Over many seeds; and each weight is left as often as it should be, whatever its position."""
    q, k, v = (x.detach() for x in bhtd(2))
    spec = AttentionSpec(score=SCALED, mask="j <= i", dropout=P, captures=("seed",))
    draws = 400
    total = sum(reference(q, k, v, [torch.tensor(seed)], (), spec)[0] for seed in range(draws)) / draws
    exact = attend(scores_of(q, k).masked_fill(~causal_of(q), -math.inf), v)
    assert (total - exact).abs().max() < 6 * v.abs().max() * math.sqrt(P / (1 - P) / draws)


def indices(b, h, i, j):
    return torch.meshgrid(*(torch.arange(n) for n in (b, h, i, j)), indexing="ij")


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_independence(p):
    kept = dropout_keeps(torch.tensor(1234567890123), *indices(3, 4, 96, 96), p).double()
    n = kept.numel()
    deviation = math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) < 5 * deviation / math.sqrt(n)
    for dim in range(4):
        others = [d for d in range(4) if d != dim]
        rows = kept.mean(others)
        assert (rows - (1 - p)).abs().max() < 5 * deviation / math.sqrt(n / kept.shape[dim]), "every position alike"
        neighbours = (
            (kept.narrow(dim, 1, kept.shape[dim] - 1) - 1 + p) * (kept.narrow(dim, 0, kept.shape[dim] - 1) - 1 + p)
        ).mean()
        assert abs(neighbours) < 5 * deviation**2 / math.sqrt(n / 2), "neighbours do not know of one another"
    other = dropout_keeps(torch.tensor(1234567890124), *indices(3, 4, 96, 96), p).double()
    assert abs(((kept - 1 + p) * (other - 1 + p)).mean()) < 5 * deviation**2 / math.sqrt(n), "nor do neighbouring seeds"


def test_philox_is_the_published_one():
    """The known answers of Random123's Philox-4x32-10."""
    word = 0xFFFFFFFF
    for seed, counter, answer in (
        (0, (0, 0, 0, 0), 0x6627E8D5),
        (-1, (word, word, word, word), 0x408F276D),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xD16CFE09),
    ):
        found = philox(torch.tensor(seed), tuple(torch.tensor(c) for c in counter))
        assert int(found) == answer
    assert numpy.uint32(int(found)) == found


def fills(q, k, v, keep):
    s = scores_of(q, k).masked_fill(~(keep[:, None, None] & causal_of(q).tril(-1)), lowest(q))
    return F.dropout(s.softmax(-1), P) @ v


def twice(q, k, v):
    return F.dropout(F.dropout(scores_of(q, k).softmax(-1), P), P) @ v


def everything(q, k, v):
    return F.dropout(scores_of(q, k).softmax(-1), 1.0) @ v


def returned(q, k, v):
    weights = F.dropout(scores_of(q, k).softmax(-1), P)
    return weights @ v, weights


def of_scores(q, k, v):
    return attend(F.dropout(scores_of(q, k), P), v)


def shared_by_heads(weights, k, v):
    return F.dropout((weights @ k.mT).softmax(-1), P).expand(B, H, T, T) @ v


@pytest.mark.parametrize(
    ("f", "make", "why", "step"),
    [
        (fills, with_padding, "dropout p=0.25 of rows that may have no key but fills", "dropout"),
        (twice, bhtd, "the probabilities are changed", "probabilities"),
        (everything, bhtd, "dropout p=1.0 leaves nothing", "dropout"),
        (returned, bhtd, "the probabilities are also used by output", "uses"),
        (of_scores, bhtd, "no function of a contraction", "scores"),
        (shared_by_heads, lambda: (normal(B, 1, T, D), normal(B, 1, T, D, seed=1), normal(B, H, T, D)), "dropped alike", "dropout"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_refused(f, make, why, step):
    assert_refused(f, *make(), why=why, step=step)


def test_a_cpu_leaves_it():
    compiled = Compiled(sdpa, ("cpu",))
    compiled(*bhtd())
    assert [d.outcome for d in compiled.decisions()] == ["left"]
