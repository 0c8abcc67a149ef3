"""Attention whose weights are sigmoids of the scores, with no softmax: spellings, near misses, and gates that are no attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from effcompile.ops.attention import AttentionSpec
from tests.attention_forms import (
    HK,
    SCALE,
    SCALED,
    B,
    D,
    H,
    Spelling,
    Spellings,
    T,
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
from tests.vocabulary import (
    GPU,
    Compiled,
    assert_all_rewritten,
    assert_refused,
    assert_rewritten,
    assert_within_contract,
    results,
)

SPELLINGS = spelling = Spellings()
PLAIN: dict[str, Any] = {"normaliser": "none", "empty": "zero", "score": f"sigmoid({SCALED} - 2.5)", "mask": "True", "sink": None}
CAUSAL: dict[str, Any] = {**PLAIN, "mask": "j <= i"}
OFFSET = 2.5


@spelling("plain", **PLAIN)
def _(q, k, v):
    return torch.sigmoid(scores_of(q, k) - OFFSET) @ v


@spelling("in float32 and cast back", **PLAIN)
def _(q, k, v):
    return (scores_of(q, k).float() - OFFSET).sigmoid().to(q.dtype) @ v


@spelling("einsum, sequence before heads", lambda: bthd(), **PLAIN)
def _(q, k, v):
    weights = torch.einsum("bihd,bjhd->bhij", q * SCALE, k).sub(OFFSET).sigmoid()
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@spelling("heads folded into the batch", **PLAIN)
def _(q, k, v):
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    return torch.bmm(torch.sigmoid(torch.bmm(q, k.mT) * SCALE - OFFSET), v).view(B, H, T, D)


@spelling("grouped heads", grouped, **PLAIN)
def _(q, k, v):
    k, v = (x.repeat_interleave(H // HK, 1) for x in (k, v))
    return torch.sigmoid(scores_of(q, k) - OFFSET) @ v


@spelling("causal, infinite fill", **CAUSAL)
def _(q, k, v):
    return (scores_of(q, k) - OFFSET).masked_fill(~causal_of(q), -math.inf).sigmoid() @ v


@spelling("causal, finite fill", **CAUSAL)
def _(q, k, v):
    return (scores_of(q, k) - OFFSET).masked_fill(~causal_of(q), lowest(q)).sigmoid() @ v


@spelling("causal, added fill", **CAUSAL)
def _(q, k, v):
    bias = torch.zeros(T, T, dtype=q.dtype).masked_fill(~causal_of(q), lowest(q))
    return torch.sigmoid(scores_of(q, k) + bias - OFFSET) @ v


@spelling("causal, filled after the sigmoid", **CAUSAL)
def _(q, k, v):
    return torch.sigmoid(scores_of(q, k) - OFFSET).masked_fill(~causal_of(q), 0.0) @ v


@spelling("causal, multiplied after the sigmoid", **CAUSAL)
def _(q, k, v):
    return (torch.sigmoid(scores_of(q, k) - OFFSET) * causal_of(q)) @ v


@spelling("causal, tril of the weights", **CAUSAL)
def _(q, k, v):
    return torch.sigmoid(scores_of(q, k) - OFFSET).tril() @ v


@spelling("sliding window", **{**PLAIN, "mask": "(j <= i) & (j >= i - 3)"})
def _(q, k, v):
    i, j = positions(q)[:, None], positions(k)[None]
    return torch.where((j <= i) & (i - j < 4), scores_of(q, k) - OFFSET, -math.inf).sigmoid() @ v


@spelling("padding", with_padding, **{**PLAIN, "mask": "bool(t0.b[b, j])"})
def _(q, k, v, keep):
    return (scores_of(q, k) - OFFSET).masked_fill(~keep[:, None, None], -math.inf).sigmoid() @ v


@spelling("divided by the number of keys", **{**PLAIN, "score": f"0.1 * sigmoid({SCALED})"})
def _(q, k, v):
    return (scores_of(q, k).sigmoid() / k.shape[-2]) @ v


@spelling("divided by the position", **{**CAUSAL, "score": f"sigmoid({SCALED}) / (i + 1)"})
def _(q, k, v):
    return (scores_of(q, k).sigmoid().tril() / (positions(q)[:, None] + 1)) @ v


@spelling("offset of each head that learns", lambda: (*bhtd(), normal(H)), score=f"sigmoid({SCALED} + t0.f[h])", learned=("t0",))
def _(q, k, v, offset):
    return torch.sigmoid(scores_of(q, k) + offset[:, None, None]) @ v


@spelling("ALiBi", lambda: (*bhtd(), torch.linspace(0.1, 0.6, H)), mask="j <= i", normaliser="none")
def _(q, k, v, slopes):
    distance = positions(k)[None] - positions(q)[:, None]
    scores = scores_of(q, k) + slopes[:, None, None] * distance - math.log(T)
    return scores.masked_fill(distance > 0, -math.inf).sigmoid() @ v


@spelling("a bias for each pair that learns", lambda: (*bhtd(), normal(1, H, T, T)), learned=("t0",), normaliser="none")
def _(q, k, v, bias):
    return torch.sigmoid(scores_of(q, k) + bias) @ v


@spelling("no query or key in common", lambda: bhtd(queries=1, keys=7), **PLAIN)
def _(q, k, v):
    return torch.sigmoid(scores_of(q, k) - OFFSET) @ v


@pytest.mark.parametrize("case", SPELLINGS, ids=lambda case: case.name)
def test_spelling(case: Spelling):
    """Read as it is written, and as good as eager, with its gradients."""
    compiled = assert_within_contract(Compiled(case.f, (GPU, "cpu")), *case.make())
    assert_all_rewritten(compiled, **case.fields)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    def f(q, k, v):
        return (scores_of(q, k) - OFFSET).masked_fill(~causal_of(q), -math.inf).sigmoid() @ v

    compiled = assert_within_contract(Compiled(f, (GPU,)), *bhtd(dtype=dtype))
    assert_all_rewritten(compiled, **CAUSAL)


def test_symbolic_lengths():
    def f(q, k, v):
        return torch.sigmoid(scores_of(q, k)).tril() @ v

    compiled = Compiled(f, (GPU,))
    for length in (10, 13):
        args = bhtd(queries=length, keys=length)
        for x in args:
            torch._dynamo.mark_dynamic(x, 2)
        torch.testing.assert_close(compiled(*args), f(*args))
    assert_all_rewritten(compiled, **{**CAUSAL, "score": f"sigmoid({SCALED})"})
    assert len(compiled.decisions()) == 1


def dropped(q, k, v):
    return F.dropout(torch.sigmoid(scores_of(q, k)).tril(), 0.25) @ v


def test_dropout():
    """As many weights are dropped as in eager mode, and the others are divided by what is left."""
    report = assert_rewritten(dropped, *bhtd(), normaliser="none", dropout=0.25, mask="j <= i")
    assert len(report.decisions) == 1
    q, k, v = bhtd(grad=False)
    eye = torch.eye(T).expand(B, H, T, T)
    whole = torch.sigmoid(scores_of(q, k)).tril()
    got = Compiled(dropped, (GPU,))(q, k, eye)
    kept = got != 0
    torch.testing.assert_close(got[kept], whole[kept] / 0.75)
    share = kept.sum() / (whole != 0).sum()
    assert 0.65 < share < 0.85


def test_a_row_without_keys_is_zero():
    def f(q, k, v):
        return torch.sigmoid(scores_of(q, k)).tril(-1) @ v

    args = bhtd()
    out, *grads = results(Compiled(f, (GPU,)), args)
    assert (out[:, :, 0] == 0).all() and all(grad.isfinite().all() for grad in grads)
    assert_within_contract(f, *args)


def test_decoding_is_rewritten():
    args = bhtd(heads=4, kv_heads=4, queries=1, keys=512, grad=False, dtype=torch.bfloat16)
    report = assert_rewritten(lambda q, k, v: torch.sigmoid(scores_of(q, k) - 6.0) @ v, *args, normaliser="none")
    assert [d.chosen for d in report.decisions] == ["triton"]


def test_the_cost_model_takes_long_ones():
    """Where nothing is forced: no library has these, and eager writes every weight."""
    args = tuple(torch.zeros(1, 8, 2048, 64, dtype=torch.bfloat16) for _ in range(3))
    compiled = Compiled(lambda q, k, v: torch.sigmoid(scores_of(q, k) - 7.6).tril() @ v, (GPU,), forced=False)
    compiled(*args)
    assert [(d.outcome, d.chosen) for d in compiled.decisions()] == [("rewritten", "triton")]


# -------------------------------------------------------------------- near misses


def returned(q, k, v):
    weights = torch.sigmoid(scores_of(q, k))
    return weights @ v, weights


def used_twice(q, k, v):
    weights = torch.sigmoid(scores_of(q, k))
    return weights @ v + weights @ k


def divided_by_their_sum(q, k, v):
    weights = torch.sigmoid(scores_of(q, k))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def masked_by_scores(q, k, v):
    scores = scores_of(q, k)
    return torch.where(scores > 0, scores, -math.inf).sigmoid() @ v


def summed(q, k, v):
    scores = scores_of(q, k)
    return torch.sigmoid(scores) @ v, scores.sum()


def without_gradient(q, k, v):
    with torch.no_grad():
        weights = torch.sigmoid(scores_of(q, k))
    return weights @ v


NEAR_MISSES = {
    returned: ("uses", "the weights are also used by output"),
    used_twice: ("probabilities", "the weights feed 2 contractions"),
    divided_by_their_sum: ("uses", "also used by sum"),
    masked_by_scores: ("mask", "the mask depends on the scores"),
    summed: ("uses", "the scores are also used by sum"),
    without_gradient: ("modes", "grad mode or autocast changes between the sigmoid"),
}


@pytest.mark.parametrize("f", NEAR_MISSES, ids=lambda f: f.__name__)
def test_near_miss(f):
    step, why = NEAR_MISSES[f]
    assert_refused(f, *bhtd(), step=step, why=why)
    assert_within_contract(Compiled(f, (GPU,)), *bhtd())


# -------------------------------------------------------------------- no attention at all


def gated_linear_unit(x, gate, up, down):
    return (torch.sigmoid(x @ gate) * (x @ up)) @ down


def two_layers(x, gate, up, down):
    return torch.sigmoid(x @ gate) @ down


def feature_map(x, gate, up, down):
    q, k, v = (torch.sigmoid(x @ w).unflatten(-1, (2, -1)).transpose(1, 2) for w in (gate, up, gate))
    return q @ (k.mT @ v)


def gated_scores(x, gate, up, down):
    q, k, v = (x @ w for w in (gate, up, gate))
    return (torch.sigmoid(x[..., :1]) * (q @ k.mT)).square() @ v


@pytest.mark.parametrize("f", [gated_linear_unit, two_layers, feature_map, gated_scores], ids=lambda f: f.__name__)
def test_gates_are_no_site(f):
    compiled = assert_within_contract(Compiled(f, (GPU,)), normal(B, T, D), normal(D, 16), normal(D, 16, seed=1), normal(16, D))
    assert [d for d in compiled.decisions()] == []


def test_the_specification_is_read_again():
    spec = AttentionSpec(score="sigmoid(s)", normaliser="none", empty="zero")
    assert AttentionSpec.from_json(spec.to_json()) == spec
    assert AttentionSpec().normaliser == "softmax"
