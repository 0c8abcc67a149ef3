"""Routers: every one of token choice as published, against one specification; capacities; what a specification refuses."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from effcompile.ops.route import RouteSpec, route

T, E, K = 13, 12, 3


@dataclass(frozen=True)
class Router:
    """A router, written by hand as its model writes it, and the specification that should mean the same."""

    spec: RouteSpec
    written: object
    bias: bool = False


def softmax_then_top_k(logits):
    weights, ids = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float), K, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids


def softmax_as_it_is(logits):
    return torch.topk(F.softmax(logits, dim=1, dtype=torch.float), K, dim=-1)


def top_k_then_softmax(logits):
    top, ids = torch.topk(logits, K, dim=-1)
    return F.softmax(top, dim=1, dtype=top.dtype), ids


def p_norm(logits):
    weights, ids = torch.topk(logits.softmax(1), K, dim=-1)
    return weights / torch.norm(weights, p=2, dim=-1, keepdim=True), ids


def biased_sigmoid_in_groups(logits, bias):
    scores = logits.sigmoid()
    choice = scores + bias
    group_scores = choice.view(-1, 4, E // 4).topk(2, dim=-1)[0].sum(dim=-1)
    group_idx = torch.topk(group_scores, k=2, dim=-1, sorted=False)[1]
    group_mask = torch.zeros_like(group_scores).scatter_(1, group_idx, 1)
    score_mask = group_mask.unsqueeze(-1).expand(-1, 4, E // 4).reshape(-1, E)
    ids = torch.topk(choice.masked_fill(~score_mask.bool(), float("-inf")), k=K, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return weights * 2.5, ids


def biased_sigmoid(logits, bias):
    scores = torch.sigmoid(logits)
    _, ids = torch.topk(scores + bias, K, dim=-1, sorted=False)
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-6), ids


def biased_softmax_with_a_floor(logits, bias):
    scores = F.softmax(logits, dim=1, dtype=torch.float)
    _, ids = torch.topk(scores + bias, K, dim=-1)
    weights = torch.gather(scores, dim=-1, index=ids)
    return weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=0.3), ids


def softmax_in_groups(logits):
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    group_scores = scores.view(-1, 4, E // 4).max(dim=-1).values
    kept = torch.zeros_like(group_scores).scatter_(1, torch.topk(group_scores, k=2, dim=-1, sorted=False)[1], 1)
    mask = kept.unsqueeze(-1).expand(-1, 4, E // 4).reshape(-1, E)
    weights, ids = torch.topk(scores.masked_fill(~mask.bool(), 0.0), k=K, dim=-1, sorted=False)
    return weights * 16.0, ids


def sigmoid_before(logits):
    return torch.topk(logits.sigmoid(), K, dim=-1)


def sigmoid_after(logits):
    top, ids = torch.topk(logits, K, dim=-1)
    return top.sigmoid(), ids


def scattered_sigmoid(logits):
    """Dense: every expert's weight, which is zero for those that were not chosen."""
    top, ids = torch.topk(logits, K, dim=1)
    dense = torch.sigmoid(torch.full_like(logits, float("-inf")).scatter_(1, ids, top).float()).to(logits.dtype)
    return dense.gather(1, ids), ids


def first_come(logits):
    """Top-1 with a capacity of two assignments in each of the sequences, which have `T` tokens."""
    probabilities = F.softmax(logits, dim=-1).view(-1, T, E)
    ids = probabilities.argmax(-1)
    hot = F.one_hot(ids, E)
    kept = (hot * (hot.cumsum(-2) <= 2)).sum(-1).bool()
    weights = torch.where(kept, probabilities.max(-1).values, 0.0)
    return weights.view(-1, 1), torch.where(kept, ids, -1).view(-1, 1)


def first_choices_first(logits):
    """GShard: the second choices queue behind the first ones of all tokens."""
    weights, ids = torch.topk(F.softmax(logits, dim=-1), 2, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    first, second = F.one_hot(ids[:, 0], E), F.one_hot(ids[:, 1], E)
    places = torch.stack([first.cumsum(0) * first, (second.cumsum(0) + first.sum(0)) * second], 1).sum(-1)  # [T, 2], from one
    return torch.where(places <= 2, weights, 0.0), torch.where(places <= 2, ids, -1)


GROUPS = {"groups": 4, "kept_groups": 2}
ROUTERS = {
    "softmax-renormalised": Router(RouteSpec(k=K, norm=1), softmax_then_top_k),
    "softmax": Router(RouteSpec(k=K), softmax_as_it_is),
    "top-k-then-softmax": Router(RouteSpec(k=K, score_after=True), top_k_then_softmax),
    "p-norm": Router(RouteSpec(k=K, norm=2), p_norm),
    "biased-sigmoid-groups": Router(
        RouteSpec(k=K, score="sigmoid", select_bias=True, group_stat="top2", norm=1, eps=1e-20, scale=2.5, **GROUPS),
        biased_sigmoid_in_groups,
        True,
    ),  # fmt: skip
    "biased-sigmoid": Router(RouteSpec(k=K, score="sigmoid", select_bias=True, norm=1, eps=1e-6), biased_sigmoid, True),
    "biased-softmax-floor": Router(
        RouteSpec(k=K, select_bias=True, norm=1, eps=0.3, clamp=True), biased_softmax_with_a_floor, True
    ),
    "softmax-groups": Router(RouteSpec(k=K, group_fill="zero", scale=16.0, **GROUPS), softmax_in_groups),
    "sigmoid-before": Router(RouteSpec(k=K, score="sigmoid"), sigmoid_before),
    "sigmoid-after": Router(RouteSpec(k=K, score="sigmoid", score_after=True), sigmoid_after),
    "scattered-sigmoid": Router(RouteSpec(k=K, score="sigmoid", score_after=True), scattered_sigmoid),
    "capacity": Router(RouteSpec(k=1, capacity=2, span=T), first_come),
    "capacity-two-choices": Router(RouteSpec(k=2, norm=1, capacity=2), first_choices_first),
}
NAMES = pytest.mark.parametrize("name", ROUTERS)


def operands(router, t, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(t, E, generator=generator, dtype=torch.float64).mul(2).to(dtype)
    return logits, torch.randn(E, generator=generator).mul(0.3) if router.bias else None


def written(router, logits, bias):
    return router.written(logits, bias) if router.bias else router.written(logits)


def by_id(weights, ids):
    """Weights and ids of each token in the order of the ids: that of a top-k that is not sorted is its own affair."""
    ids, order = ids.sort(dim=-1, stable=True)
    return weights.gather(-1, order), ids


# -------------------------------------------------------------------- the routers of published models


@NAMES
@pytest.mark.parametrize("t", [T, 4 * T], ids=lambda t: f"T{t}")
def test_a_router_is_its_specification(name, t):
    router = ROUTERS[name]
    logits, bias = operands(router, t)
    weights, ids = route(logits, bias, router.spec)
    expected, expected_ids = by_id(*written(router, logits, bias))
    weights, ids = by_id(weights, ids)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected.detach(), rtol=1e-6, atol=1e-7)


@NAMES
def test_the_gradient_of_the_logits_is_the_same(name):
    router = ROUTERS[name]
    logits, bias = operands(router, 2 * T, dtype=torch.float64)
    pulled = torch.randn(2 * T, router.spec.k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (lambda x: route(x, bias, router.spec, dtype=torch.float64), lambda x: written(router, x, bias)):
        leaf = logits.clone().requires_grad_()
        weights, _ = by_id(*run(leaf))
        found.append(torch.autograd.grad(weights, leaf, pulled.to(weights.dtype))[0])
    assert found[1].abs().max() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_the_specifications_differ():
    """Routers that mean the same by the algebra do, and no others."""
    logits, _ = operands(ROUTERS["softmax"], 2 * T)
    bias = torch.linspace(-0.6, 0.6, E)
    found = {name: by_id(*route(logits, bias if router.bias else None, router.spec)) for name, router in ROUTERS.items()}
    same = {"softmax-renormalised top-k-then-softmax", "sigmoid-before sigmoid-after"}
    same |= {f"sigmoid-{when} scattered-sigmoid" for when in ("before", "after")}
    alike = {f"{a} {b}" for a, b in combinations(ROUTERS, 2) if is_close(found[a], found[b])}
    assert alike == same


def is_close(first, second):
    return torch.equal(first[1], second[1]) and torch.allclose(first[0], second[0], rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_the_specifications(dtype):
    logits, _ = operands(ROUTERS["softmax"], T, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    weights, ids = route(logits, None, RouteSpec(k=K, weights=name))
    expected, expected_ids = torch.topk(F.softmax(logits, -1, dtype=torch.float), K, -1)
    assert weights.dtype == dtype and torch.equal(weights, expected.to(dtype)) and torch.equal(ids, expected_ids)
    weights, _ = route(logits, None, RouteSpec(k=K, logits_dtype=name))
    assert weights.dtype == torch.float32 and torch.equal(weights, torch.topk(F.softmax(logits, -1), K, -1)[0].float())


# -------------------------------------------------------------------- properties


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 6), st.integers(1, 4), st.integers(0, 5), st.integers(0, 4), st.integers(0, 99))
def test_a_capacity_is_counted_one_by_one(t, experts, k, capacity, span, seed):
    k = min(k, experts)
    spec = RouteSpec(k=k, capacity=capacity, span=span if capacity else 0)
    logits = torch.randn(t, experts, generator=torch.Generator().manual_seed(seed))
    weights, ids = route(logits, None, spec)
    _, all_ids = route(logits, None, RouteSpec(k=k))
    room: dict[tuple[int, int], int] = {}
    for slot in range(k):
        for token in range(t):
            place = (token // span if capacity and span else 0, int(all_ids[token, slot]))
            room[place] = room.get(place, 0) + 1
            fits = not capacity or room[place] <= capacity
            assert int(ids[token, slot]) == (place[1] if fits else -1)
            assert (float(weights[token, slot]) > 0) == fits


# -------------------------------------------------------------------- the specification


@NAMES
def test_a_specification_is_read_as_it_was_written(name):
    spec = ROUTERS[name].spec
    assert RouteSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"k": 0}, "a token goes to one expert at least"),
        ({"score": "tanh"}, "Expected score to be one of"),
        ({"norm": 3}, "Expected norm to be one of"),
        ({"group_stat": "mean"}, "Expected group_stat to be one of"),
        ({"group_fill": "nan"}, "Expected group_fill to be one of"),
        ({"weights": "float31"}, "Expected weights to name a dtype but got weights='float31'"),
        ({"groups": 2, "kept_groups": 3}, "of the groups, one at least is kept"),
        ({"score": "none", "norm": 1}, "a norm is for weights that are not negative"),
        ({"eps": 1e-6}, "eps is part of a norm"),
        ({"clamp": True}, "eps is part of a norm"),
        ({"capacity": -1}, "capacity and span are not negative"),
        ({"span": 4}, "a span is for a capacity"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_specification_refuses(fields, why):
    with pytest.raises(ValueError, match=why):
        RouteSpec(**{"k": 2, **fields})


@pytest.mark.parametrize(
    ("logits", "bias", "fields", "why"),
    [
        (torch.zeros(2, 3, E), None, {}, r"Expected logits \[T, E\] of floats but got logits.shape=\(2, 3, 12\)"),
        (torch.zeros(3, E, dtype=torch.int64), None, {}, "Expected logits .* dtype=torch.int64"),
        (torch.zeros(3, E), None, {"select_bias": True}, r"Expected a bias of shape \(12,\) but got bias=None"),
        (torch.zeros(3, E), torch.zeros(E), {}, "Expected no bias"),
        (torch.zeros(3, E), torch.zeros(E + 1), {"select_bias": True}, r"got bias=\(13,\)"),
        (torch.zeros(3, E), None, {"groups": 5}, "Expected experts that divide into 5 groups"),
        (torch.zeros(3, 4), None, {"groups": 4, "group_stat": "top2"}, "of two at least for top2, but got E=4"),
        (torch.zeros(3, E), None, {"groups": 6, "k": 3}, "Expected k up to 2, the experts to choose from, but got k=3"),
    ],
    ids=["three-dims", "integers", "bias-missing", "bias-not-wanted", "bias-shape", "uneven-groups", "small-groups", "k-too-large"],
)
def test_operands_are_refused(logits, bias, fields, why):
    with pytest.raises(ValueError, match=why):
        route(logits, bias, RouteSpec(**{"k": 2, **fields}))
