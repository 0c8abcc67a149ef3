"""The log-sum-exp of the scores as a second result of an attention, with its gradient; and weights that are returned."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from tests.attention_forms import HK, SCALE, B, D, H, T, attend, bhtd, causal_of, lowest, normal, scores_of, with_padding
from tests.vocabulary import GPU, Compiled, assert_all_rewritten, assert_refused, assert_within_contract


def beside_the_softmax(q, k, v):
    s = scores_of(q, k).masked_fill(~causal_of(q), -math.inf)
    return attend(s, v), s.logsumexp(-1)


def alone_in_float32(q, k, v):
    s = scores_of(q, k)
    return s.softmax(-1, dtype=torch.float32).to(q.dtype) @ v, s.float().logsumexp(-1, keepdim=True)


def as_the_divisor(q, k, v):
    s = scores_of(q, k)
    total = s.logsumexp(-1, keepdim=True)
    return torch.exp(s - total) @ v, total.squeeze(-1)


def squared_as_a_penalty(q, k, v):
    s = scores_of(q, k)
    out = attend(s, v)
    return out, s.logsumexp(-1).square().mean()


def of_groups(q, k, v):
    s = torch.einsum("bkgid,bkjd->bkgij", q.view(B, HK, H // HK, T, D), k) * SCALE
    out = torch.einsum("bkgij,bkjd->bkgid", s.softmax(-1), v)
    return out, s.logsumexp(-1)


def of_queries_first(q, k, v):
    s = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE
    return torch.einsum("bhij,bhjd->bihd", s.softmax(-1), v), s.logsumexp(-1).transpose(1, 2)


def of_folded_heads(q, k, v):
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    s = torch.bmm(q, k.mT) * SCALE
    return torch.bmm(s.softmax(-1), v), s.logsumexp(-1)


def with_a_sink(q, k, v, sink):
    s = torch.cat([scores_of(q, k), sink.view(1, H, 1, 1).expand(B, H, T, 1)], -1)
    return s.softmax(-1)[..., :-1] @ v, s.logsumexp(-1)


def with_a_bias(q, k, v, bias):
    s = scores_of(q, k) + bias
    return attend(s, v), s.logsumexp(-1)


def rows_without_keys(q, k, v, keep):
    s = scores_of(q, k).masked_fill(~(keep[:, None, None] & causal_of(q).tril(-1)), -math.inf)
    return torch.nan_to_num(s.softmax(-1)) @ v, s.logsumexp(-1)


def merged_parts(q, k, v):
    """Two parts of the keys, each an attention of its own, merged by the logarithms of their sums."""
    parts = []
    for part in (slice(0, 4), slice(4, None)):
        s = scores_of(q, k[:, :, part])
        parts.append((attend(s, v[:, :, part]), s.logsumexp(-1, keepdim=True)))
    total = torch.logaddexp(parts[0][1], parts[1][1])
    return sum(out * (lse - total).exp() for out, lse in parts)


FORMS = {
    f.__name__: (f, make)
    for f, make in (
        (beside_the_softmax, bhtd), (alone_in_float32, bhtd), (as_the_divisor, bhtd), (squared_as_a_penalty, bhtd),
        (of_groups, lambda: bhtd(H, HK)), (of_queries_first, bhtd), (of_folded_heads, bhtd),
        (with_a_sink, lambda: (*bhtd(), normal(H))), (with_a_bias, lambda: (*bhtd(), normal(H, T, T))),
        (rows_without_keys, with_padding), (merged_parts, bhtd),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_form(name):
    f, make = FORMS[name]
    assert_all_rewritten(assert_within_contract(Compiled(f, (GPU,)), *make()))


@pytest.mark.parametrize("name", ["beside_the_softmax", "merged_parts"])
def test_half_precision(name):
    args = (x.detach().bfloat16().requires_grad_() for x in bhtd())
    assert_all_rewritten(assert_within_contract(Compiled(FORMS[name][0], (GPU,)), *args))


def test_merged_parts_are_the_whole():
    torch.testing.assert_close(merged_parts(*bhtd()), attend(scores_of(*bhtd()[:2]), bhtd()[2]))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:return_lse is deprecated")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_flex_attention():
    def f(q, k, v):
        out, lse = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(j <= i, s, -math.inf), return_lse=True)
        return out * lse.exp()[..., None]

    compiled = Compiled(f, (GPU,))
    with torch.no_grad():
        args = tuple(normal(1, 2, 33, 16, seed=n, grad=False) for n in range(3))
        torch.testing.assert_close(compiled(*args), f(*args), atol=1e-5, rtol=1e-4)
    assert_all_rewritten(compiled, mask="j <= i")


def of_fills(q, k, v, keep):
    s = scores_of(q, k).masked_fill(~(keep[:, None, None] & causal_of(q).tril(-1)), lowest(q))
    return attend(s, v), s.logsumexp(-1)


def before_the_values(q, k, v):
    s = scores_of(q, k)
    return s.softmax(-1) @ (v * s.logsumexp(-1)[..., None].sigmoid())


def of_other_scores(q, k, v):
    s = scores_of(q, k)
    return attend(s, v), (s * 2.0).logsumexp(-1)


def over_the_queries(q, k, v):
    s = scores_of(q, k)
    return attend(s, v), s.logsumexp(-2)


def of_shifted_scores(q, k, v):
    s = scores_of(q, k)
    s = s - s.amax(-1, keepdim=True)
    return attend(s, v), s.logsumexp(-1)


def weights_returned(q, k, v):
    weights = scores_of(q, k).softmax(-1)
    return weights @ v, weights


@pytest.mark.parametrize(
    ("f", "make", "why"),
    [
        (of_fills, with_padding, "the log-sum-exp is used of rows that may have no key but fills"),
        (before_the_values, bhtd, "the log-sum-exp is used by .* before the values are summed"),
        (of_other_scores, bhtd, "the scores are also used by"),
        (over_the_queries, bhtd, "the scores are also used by logsumexp"),
        (of_shifted_scores, bhtd, "the scores are also used by"),
        (weights_returned, bhtd, "the probabilities are also used by output"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_refused(f, make, why):
    assert_refused(f, *make(), why=why, step="uses")
    assert_within_contract(f, *make())


def test_a_cpu_leaves_it():
    compiled = Compiled(beside_the_softmax, ("cpu",))
    compiled(*bhtd())
    assert [d.outcome for d in compiled.decisions()] == ["left"]
