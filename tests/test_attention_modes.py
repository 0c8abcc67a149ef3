"""Recognised attention under grad modes and autocast, in half precision, with symbolic sizes, and in modules."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effcompile import backend
from tests.attention_forms import (
    CAUSAL,
    HK,
    PADDED,
    SCALE,
    D,
    H,
    T,
    attend,
    bhtd,
    causal_of,
    lowest,
    normal,
    positions,
    scores_of,
    with_padding,
)
from tests.test_attention_spellings import SPELLINGS
from tests.vocabulary import TARGETS, Compiled, assert_all_rewritten, assert_refused, assert_within_contract, listing

# -------------------------------------------------------------------- modes, dtypes and sizes


def test_a_border_of_grad_mode_stays():
    def f(q, k, v):
        with torch.no_grad():
            s = scores_of(q, k)
        return attend(s, v)

    assert_refused(f, *bhtd(), why="no function of a contraction", step="scores")
    assert_within_contract(f, *bhtd())


def test_probabilities_without_gradient():
    def f(q, k, v):
        with torch.no_grad():
            weights = scores_of(q, k).softmax(-1)
        return weights @ v

    compiled = assert_within_contract(f, *bhtd())
    assert [d.outcome for d in compiled.decisions()] == ["refused"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_without_gradients(mode):
    def f(q, k, v):
        return attend(scores_of(q, k) + (1.0 - causal_of(q).float()) * lowest(q), v)

    with mode():
        assert_all_rewritten(assert_within_contract(f, *bhtd(), grad=False), **CAUSAL)


def padded_lowest(q, k, v, keep):
    return attend(scores_of(q, k) + (1.0 - keep[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min, v)


def test_an_added_fill_of_an_empty_row_is_a_mask_if_nothing_learns():
    """In training an empty row passes gradients to queries and keys, which the specification's mean does not."""
    with torch.no_grad():
        compiled = assert_within_contract(padded_lowest, *with_padding(), grad=False)
    assert_all_rewritten(compiled, **PADDED, empty="mean")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["matmul", "softmax in float32", "repeat_kv by expand and reshape", "SDPA is_causal", "documents",
                                  "one minus the mask, times the lowest number", "ALiBi", "soft cap", "sinks", "pre-scaled queries",
                                  "positions as floats", "bmm over folded heads", "by hand, amax"])  # fmt: skip
def test_half_precision(name, dtype):
    case = next(case for case in SPELLINGS if case.name == name)
    args = [x.detach().to(dtype).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in case.make()]  # fmt: skip
    compiled = assert_within_contract(case.f, *args)
    assert_all_rewritten(compiled)


def test_positions_that_a_dtype_cannot_tell_apart():
    """bfloat16 counts 0 to 256; beyond, neighbours are equal, and the mask with them."""

    def f(q, k, v):
        n = positions(q).to(torch.bfloat16)
        return attend(scores_of(q, k).masked_fill(n[None] > n[:, None], -math.inf), v)

    args = tuple(normal(1, 1, 300, D, seed=n) for n in range(3))
    compiled = assert_within_contract(f, *args)
    assert_all_rewritten(compiled)
    assert "t0" in compiled.decisions()[0].spec["mask"]


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(where):
    def f(q, k, v):
        return attend(scores_of(q, k).masked_fill(~causal_of(q), -math.inf), v)

    def inside(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return f(q, k, v)

    def outside(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return compiled(*args)

    compiled = Compiled(inside if where == "inside" else f)
    eager = inside(*bhtd())
    found = (compiled if where == "inside" else outside)(*bhtd())
    assert found.dtype == eager.dtype == torch.bfloat16
    assert_all_rewritten(compiled, mask="j <= i")
    exact = f(*(x.double() for x in bhtd()))
    assert (found - exact).norm() <= 2 * (eager - exact).norm()


def hugging_face(q, k, v):
    group = q.shape[1] // k.shape[1]
    b, n, t, d = k.shape
    k, v = (x[:, :, None].expand(b, n, group, t, d).reshape(b, n * group, t, d) for x in (k, v))
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(t)[None]
    mask = torch.where(j <= i, 0.0, torch.finfo(q.dtype).min)[None, None]
    weights = F.softmax(q @ k.transpose(2, 3) * SCALE + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous()


def windowed(q, k, v):
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (j > i - q.shape[2] // 2), enable_gqa=True)


def folded(q, k, v):
    b, h, t, d = q.shape
    k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    mask = torch.ones(t, t, dtype=torch.bool).tril()
    s = torch.baddbmm(torch.zeros(1, 1, 1), q, k.mT, beta=0, alpha=SCALE)
    return torch.bmm(s.masked_fill(~mask, -math.inf).softmax(-1), v).view(b, h, t, d)


@pytest.mark.parametrize("dims", [(2,), (0,), (0, 2)], ids=["length", "batch", "both"])
@pytest.mark.parametrize("f", [hugging_face, windowed, folded], ids=lambda f: f.__name__)
def test_symbolic_sizes(f, dims):
    args = bhtd(H, HK)
    for x in args:
        for dim in dims:
            torch._dynamo.mark_dynamic(x, dim)
    compiled = assert_within_contract(f, *args)
    assert_all_rewritten(compiled)
    graphs = len(compiled.frames["cpu"])
    again = bhtd(H, HK, 14, 14) if 2 in dims else args
    again = tuple(torch.cat([x.detach(), x.detach()[:1]]).requires_grad_() for x in again) if 0 in dims else again
    assert_within_contract(compiled, *again)
    assert len(compiled.frames["cpu"]) == graphs, "compiled again for another size"


def test_an_integer_that_may_be_negative():
    """`offset` may be of either sign: what depends on it must hold for both."""

    def f(q, k, v, offset):
        i, j = positions(q)[:, None], positions(k)[None]
        return attend(scores_of(q, k).masked_fill((j > i + offset) & (j > 0), -math.inf), v)

    compiled = Compiled(f)
    for offset in (3, -4, 2):  # the second is compiled for any integer
        assert_within_contract(compiled, *bhtd(), offset)
    assert len(compiled.frames[TARGETS[0]]) == 2


# -------------------------------------------------------------------- modules


class SelfAttention(nn.Module):
    """Attention as vision transformers write it."""

    def __init__(self, causal: bool = False):
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.register_buffer("mask", torch.ones(16, 16).tril().view(1, 1, 16, 16) if causal else None)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        s = q @ k.transpose(-2, -1) * (c // 4) ** -0.5
        if self.mask is not None:
            s = s.masked_fill(self.mask[:, :, :n, :n] == 0, float("-inf"))
        return self.out((s.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c))


def modules() -> dict[str, tuple[nn.Module, str]]:
    return {
        "vision transformer": (SelfAttention(), "rewritten"),
        "GPT with a buffer": (SelfAttention(causal=True), "rewritten"),
        "MultiheadAttention": (_Mha(), "rewritten"),
        "MultiheadAttention, evaluated": (_Mha().eval(), "rewritten"),
    }


class _Mha(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", ["vision transformer", "GPT with a buffer", "MultiheadAttention", "MultiheadAttention, evaluated"])
def test_module(name):
    module, _ = modules()[name]
    compiled = Compiled(module)
    x = normal(2, T, 24)
    eager = module(x)
    for target in TARGETS:
        torch.testing.assert_close(compiled(x, target=target), eager, atol=1e-6, rtol=1e-5)
    assert_all_rewritten(compiled)


def every_row_empty(q, k, v, keep):
    return attend(scores_of(q, k).masked_fill(~keep, lowest(q)), v)


def every_row_shifted(q, k, v, keep):
    return attend(scores_of(q, k) + torch.where(keep, 0.0, lowest(q))[:, None], v)


@pytest.mark.parametrize("f", [every_row_empty, every_row_shifted], ids=lambda f: f.__name__)
def test_training_on_a_cpu(f):
    """SDPA on a CPU differentiates rows of very low finite logits with weights of 1: a bias is not handed to it in training."""
    args = tuple(normal(1, 1, 512, D, seed=n) for n in range(3))
    assert_within_contract(Compiled(f, ("cpu",), forced=False), *args, torch.zeros(512, dtype=torch.bool))


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the graph before differs by version")
def test_golden(golden):
    """A small Hugging Face attention before and after."""
    compiled = Compiled(hugging_face, (TARGETS[0],))
    lifted: list[str] = []
    original = backend.Pipeline.normalize

    def keep(self, module):
        lifted.append(listing(module))
        original(self, module)

    with mock.patch.object(backend.Pipeline, "normalize", keep):
        compiled(*bhtd(H, HK))
    (after,) = compiled.graphs[TARGETS[0]]
    golden("attention.txt", f"before\n\n{lifted[0]}\n\nafter\n\n{listing(after)}\n")
