"""Biases, slopes and tables that learn: the tensors that a score loads get their gradients from the attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effcompile.ops.attention import AttentionSpec
from tests.attention_forms import SCALE, B, D, H, Spelling, T, attend, bhtd, causal_of, normal, positions, scores_of
from tests.test_attention_spellings import SPELLINGS
from tests.test_attention_variants import VARIANTS
from tests.vocabulary import TARGETS, Compiled, assert_all_rewritten, assert_within_contract

KNOWN = {case.name: case for case in (*SPELLINGS, *VARIANTS)}
FIXED = [
    "dense bias", "dense bias to SDPA", "relative bias of T5", "relative bias by clamped distance", "ALiBi",
    "ALiBi of key positions", "ALiBi by baddbmm", "scores shifted by a constant a row", "windows of Swin", "table of distances",
    "slopes by outer product", "logarithm of the distance", "forgetting gates", "bias of places in a window",
]  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_a_bias_that_was_given_may_learn_instead(name: str):
    case = KNOWN[name]
    args = tuple(x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in case.make())
    assert_all_rewritten(assert_within_contract(case.f, *args), **case.fields, learned=learned_of(case, args))


def learned_of(case: Spelling, args: tuple[Any, ...]) -> tuple[str, ...]:
    """What learns beside queries, keys and values: the first captured tensor; of Swin's, the table and the mask."""
    return ("t0", "t2") if case.name == "windows of Swin" else ("t0",)


def of_each_key(q, k, v, temperature):
    return attend(scores_of(q, k) * temperature, v)


def cut_out_of_a_table(q, k, v, table):
    return attend(scores_of(q, k) + table[:, :T, 3 : T + 3], v)


def by_distance_in_two_directions(q, k, v, table):
    n = positions(q)
    row, column = table[:, n // 4][:, :, n // 4], table[:, n % 4][:, :, n % 4]
    return attend(scores_of(q, k) + row + column, v)


def soft_capped(q, k, v, bias):
    return attend(20.0 * torch.tanh((scores_of(q, k) + bias) / 20.0), v)


def of_all_scores(q, k, v, temperature):
    return attend(scores_of(q, k) * temperature.exp(), v)


def of_two_queries(q, k, v, bias):
    return attend(scores_of(q[:, :, -2:], k) + bias[:, :, -2:], v)


def shared_by_two_layers(q, k, v, bias):
    return attend(scores_of(attend(scores_of(q, k) + bias, v), k) + bias, v)


def sinks_of_each_row(q, k, v, sinks):
    s = torch.cat([scores_of(q, k).masked_fill(~causal_of(q), -math.inf), 2.0 * sinks.expand(B, H, T, 1)], -1)
    return s.softmax(-1)[..., :-1] @ v


def one_sink(q, k, v, sink):
    s = torch.cat([scores_of(q, k), sink.exp().expand(B, H, T, 1)], -1)
    return s.softmax(-1)[..., :-1] @ v


FORMS = {
    "temperature of each key": (of_each_key, (T,)),
    "one temperature": (of_all_scores, ()),
    "part of a table": (cut_out_of_a_table, (H, T + 5, T + 5)),
    "sum of two tables": (by_distance_in_two_directions, (H, 4, 4)),
    "within a soft cap": (soft_capped, (1, H, T, T)),
    "few queries": (of_two_queries, (1, H, T, T)),
    "bias of two layers": (shared_by_two_layers, (1, 1, T, T)),
    "a sink of each row": (sinks_of_each_row, (H, T, 1)),
    "one sink for all": (one_sink, (1,)),
}


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str):
    f, shape = FORMS[name]
    compiled = assert_within_contract(f, *bhtd(), normal(*shape, seed=5))
    assert_all_rewritten(compiled, learned=("t0",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dense bias", "relative bias of T5", "ALiBi"])
def test_half_precision(name: str, dtype: torch.dtype):
    case = KNOWN[name]
    args = tuple(x.detach().to(dtype).requires_grad_() for x in case.make())
    assert_all_rewritten(assert_within_contract(case.f, *args), learned=("t0",))


def test_a_bias_alone_learns():
    q, k, v = (x.detach() for x in bhtd())
    compiled = assert_within_contract(KNOWN["dense bias"].f, q, k, v, normal(1, H, T, T))
    assert_all_rewritten(compiled, learned=("t0",))


def test_nothing_learns_through_a_condition():
    def f(q, k, v, limits):
        n = positions(q)
        return attend(scores_of(q, k).masked_fill(n[None] - n[:, None] > limits.abs()[:, None, None], -math.inf), v)

    compiled = Compiled(f)
    args = (*bhtd(), normal(H).abs().detach().requires_grad_())
    (compiled(*args)).sum().backward()
    assert_all_rewritten(compiled, learned=())
    assert args[3].grad is None


class RelativeBias(nn.Module):
    """A block with a table of distances, which two layers share, and dimensions that the compiler does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, H)
        self.qkv = nn.ModuleList(nn.Linear(H * D, 3 * H * D) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = torch.arange(x.shape[1])
        bias = self.table((n[None] - n[:, None]).clamp(-8, 8) + 8).permute(2, 0, 1)
        for layer in self.qkv:
            q, k, v = layer(x).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=SCALE).transpose(1, 2).flatten(2)
        return x


def test_lengths_that_are_symbols():
    torch.manual_seed(0)
    module = RelativeBias()
    compiled = Compiled(module, dynamic=True)
    for length in (5, 12):
        x = normal(B, length, H * D)
        parameters = [x, *module.parameters()]
        wanted = torch.autograd.grad(module(x).square().sum(), parameters)
        for target in TARGETS:
            found = torch.autograd.grad(compiled(x, target=target).square().sum(), parameters)
            for mine, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert_all_rewritten(compiled)
    assert all(len(d.spec["learned"]) == 1 for d in compiled.decisions())


def test_through_inductor():
    """The operation's list of gradients passes through Inductor."""
    spec = AttentionSpec(score="s + t0.f[0, h, i, j] + t1.f[h]", captures=("t0", "t1"), learned=("t1", "t0"))
    text = spec.to_json()

    def f(q, k, v, bias, slopes):
        return torch.ops.effcompile.attention(q, k, v, [bias, slopes], [], text, "bhtd")[0]

    args = (*bhtd(), normal(1, H, T, T), normal(H))
    wanted = torch.autograd.grad(f(*args).sum(), args)
    found = torch.autograd.grad(torch.compile(f, backend="inductor", fullgraph=True)(*args).sum(), args)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other)
