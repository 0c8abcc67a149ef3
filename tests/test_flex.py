"""flex_attention: its functions read as expressions, and what of it is left as it is."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.vocabulary import Compiled, assert_all_rewritten, assert_refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

T = 33
DOCUMENTS = torch.arange(T) // 8
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def plain(q, k, v):
    return flex_attention(q, k, v, enable_gqa=True)


def soft_cap(q, k, v):
    def score(s, b, h, i, j):
        return torch.where(j <= i, 20 * torch.tanh(s / 20), -float("inf"))

    return flex_attention(q, k, v, score_mod=score, enable_gqa=True, scale=0.5)


def documents_with_slopes(q, k, v):
    def score(s, b, h, i, j):
        return torch.where((DOCUMENTS[i] == DOCUMENTS[j]) & (j <= i), s + SLOPES[h] * (j - i), -float("inf"))

    return flex_attention(q, k, v, score_mod=score, enable_gqa=True)


def bias(q, k, v):
    table = torch.linspace(-1, 1, 2 * 4).view(2, 4)
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s * 2 + table[b, h], enable_gqa=True)


def block_mask(q, k, v):
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, T, T, device="cpu")
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


def log_sum_exp(q, k, v):
    out, lse = flex_attention(q, k, v, return_lse=True, enable_gqa=True)
    return out + lse[..., None]


def log_sum_exp_alone(q, k, v):
    return flex_attention(q, k, v, return_lse=True, enable_gqa=True)[1]


def operands():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, T, 16, generator=generator) for heads in (4, 2, 2))


@pytest.mark.parametrize(
    ("f", "fields"),
    [
        (plain, {"score": "0.25 * s", "mask": "True"}),
        (soft_cap, {"score": "20 * tanh(0.025 * s)", "mask": "j <= i", "empty": "impossible"}),
        (documents_with_slopes, {"mask": "(j <= i) & (t1.i[i] == t1.i[j])", "empty": "impossible"}),
        (bias, {"mask": "True"}),
        (log_sum_exp, {"score": "0.25 * s", "mask": "True"}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_functions_become_a_specification(f, fields):
    args = operands()
    compiled = Compiled(f, ("h100-sxm",))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), f(*args), atol=2e-6, rtol=1e-5)
    assert_all_rewritten(compiled, **fields)


@pytest.mark.parametrize(
    ("f", "why", "step"),
    [
        (block_mask, "block mask leaves out blocks by lists that the graph cannot prove", "mask"),
        (log_sum_exp_alone, "log-sum-exp alone is used", "uses"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_refusals(f, why, step):
    with torch.no_grad():
        assert_refused(f, *operands(), why=why, step=step)
