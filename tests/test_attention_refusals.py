"""What is no attention, or none that we take, is refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.attention_forms import SCALE, B, D, H, T, attend, bhtd, causal_of, lowest, normal, scores_of, with_padding
from tests.vocabulary import Compiled, assert_refused, assert_within_contract

# -------------------------------------------------------------------- near misses

NEAR_MISSES: list[tuple[str, Callable[..., Any], Callable[[], tuple[Any, ...]], str, str]] = []


def refused(name: str, why: str, step: str, make: Callable[[], tuple[Any, ...]] = bhtd) -> Callable[[Any], Any]:
    """Register a function that is no attention that we take, with the reason and the step at which it must be refused."""

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        NEAR_MISSES.append((name, f, make, why, step))
        return f

    return register


@refused("probabilities returned", "the probabilities are also used by output", "uses")
def _(q, k, v):
    weights = scores_of(q, k).softmax(-1)
    return weights @ v, weights


@refused("probabilities averaged over heads", "the probabilities are also used by mean", "uses")
def _(q, k, v):
    weights = scores_of(q, k).softmax(-1)
    return weights @ v, weights.mean(1)


@refused("probabilities used twice", "the probabilities feed 2 contractions", "probabilities")
def _(q, k, v):
    weights = scores_of(q, k).softmax(-1)
    return weights @ v + weights @ k


@refused("scores used elsewhere", "the scores are also used by", "uses")
def _(q, k, v):
    s = scores_of(q, k)
    return attend(s, v), s.sum()


@refused("softmax over queries", "not over the axis of the softmax", "probabilities")
def _(q, k, v):
    return scores_of(q, k).softmax(-2) @ v


@refused("softmax over heads", "not over the axis of the softmax", "probabilities")
def _(q, k, v):
    return scores_of(q, k).softmax(1) @ v


@refused("the largest scores kept", "the mask depends on the scores", "mask")
def _(q, k, v):
    s = scores_of(q, k)
    least = s.topk(3, dim=-1).values[..., -1:]
    return attend(s.masked_fill(s < least, -math.inf), v)


@refused("a mask of the scores", "the mask depends on the scores", "mask")
def _(q, k, v):
    s = scores_of(q, k)
    return attend(torch.where(s > 0, s, -math.inf), v)


@refused("probabilities squared", "the probabilities are changed by square", "probabilities")
def _(q, k, v):
    return scores_of(q, k).softmax(-1).square() @ v


@refused("keys weighted after the softmax", "the probabilities are changed", "probabilities", lambda: (*bhtd(), torch.rand(T)))
def _(q, k, v, weight):
    return (scores_of(q, k).softmax(-1) * weight) @ v


@refused("keys hidden after the softmax", "masked by what the softmax is not", "probabilities")
def _(q, k, v):
    return scores_of(q, k).softmax(-1).masked_fill(~causal_of(q), 0.0) @ v


@refused("an empty row's mean, of some keys", "masked by what the softmax is not", "probabilities", with_padding)
def _(q, k, v, keep):
    weights = scores_of(q, k).masked_fill(~(keep[:, None, None] & causal_of(q).tril(-1)), lowest(q)).softmax(-1)
    return weights.masked_fill(~keep[:, None, None], 0.0) @ v


@refused("two more logits than values", "2 more logits than values", "probabilities", lambda: (*bhtd(), normal(H, 2)))
def _(q, k, v, sinks):
    s = torch.cat([scores_of(q, k), sinks[None, :, None].expand(B, H, T, 2)], -1)
    return s.softmax(-1)[..., :-2] @ v


@refused("probabilities masked and normalised again", "the probabilities are", "probabilities")
def _(q, k, v):
    weights = scores_of(q, k).softmax(-1) * causal_of(q)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@refused(
    "differential, kept apart by heads that are mixed", "the probabilities are changed by sub", "probabilities",
    lambda: (*bhtd(), normal(B, H, T, D, seed=7), normal(H, H, seed=8)),
)  # fmt: skip
def _(q, k, v, k2, mix):
    return (scores_of(q, k).softmax(-1) - torch.einsum("bhij,hg->bgij", scores_of(q, k2), mix).softmax(-1)) @ v


@refused("talking heads", "depends on both the query and the key", "scores", lambda: (*bhtd(), normal(H, H)))
def _(q, k, v, mix):
    return attend(torch.einsum("bhij,hg->bgij", scores_of(q, k), mix), v)


@refused("query groups before key heads", "the keys cannot be read", "operands",
         lambda: (normal(B, T, 2, 3, D), normal(B, T, 3, D, seed=1), normal(B, T, 3, D, seed=2)))  # fmt: skip
def _(q, k, v):
    weights = (torch.einsum("bigkd,bjkd->bgkij", q, k) * SCALE).softmax(-1)
    return torch.einsum("bgkij,bjkd->bigkd", weights, v)


@refused("scores passed on", "the scores are also used by output", "uses")
def _(q, k, v):
    s = scores_of(q, k)
    return attend(s, v), s


@refused(
    "one softmax over two sets of values",
    "feed 2 contractions",
    "probabilities",
    lambda: (*bhtd(), normal(B, H, 2, D), normal(B, H, 2, D)),
)
def _(q, k, v, k2, v2):
    weights = torch.cat([scores_of(q, k2), scores_of(q, k)], -1).softmax(-1)
    return weights[..., :2] @ v2 + weights[..., 2:] @ v


@refused("float64", "float64 operands have no kernel", "dtype", lambda: tuple(x.detach().double() for x in bhtd()))
def _(q, k, v):
    return attend(scores_of(q, k), v)


@refused("scores without queries", "no function of a contraction", "scores", lambda: (normal(B, H, T, T), normal(B, H, T, D)))
def _(logits, v):
    return attend(logits, v)


@refused("scores that index a table", "", "scores", lambda: (*bhtd(), normal(64, grad=False)))
def _(q, k, v, table):
    return attend(table[(q @ k.mT).abs().long().clamp(max=63)], v)


@pytest.mark.parametrize(("name", "f", "make", "why", "step"), NEAR_MISSES, ids=[case[0] for case in NEAR_MISSES])
def test_near_miss(name, f, make, why, step):
    assert_refused(f, *make(), why=why, step=step)


def route(x, gate):
    return torch.topk((x @ gate).softmax(-1), 2).values


def vocabulary(x, head):
    return (x @ head).softmax(-1)


def gated(x, gate):
    return x * (x @ gate).softmax(-1)


def then_projected(x, gate):
    return (x @ gate).softmax(-1).relu().sum(-1, keepdim=True) * x @ gate


@pytest.mark.parametrize("f", [route, vocabulary, gated, then_projected], ids=lambda f: f.__name__)
def test_other_softmaxes_are_no_site(f):
    compiled = Compiled(f)
    compiled(normal(T, D), normal(D, D, seed=1))
    assert compiled.decisions() == []


def linear(q, k, v):
    weights = scores_of(q, k).relu()
    return weights / weights.sum(-1, keepdim=True) @ v


def squared(q, k, v):
    return scores_of(q, k).relu().square() @ v


@pytest.mark.parametrize("f", [linear, squared], ids=lambda f: f.__name__)
def test_other_normalisers_are_no_site(f):
    assert assert_within_contract(f, *bhtd()).decisions() == []
