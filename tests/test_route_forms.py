"""Routers in the forms in which they are written: what each is read as, its results and gradients, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from effcompile import runtime
from tests.vocabulary import GPU, Compiled, assert_all_rewritten, assert_refused, assert_within_contract, results

T, D, E, K = 11, 6, 12, 3
runtime.register()


@dataclass(frozen=True, kw_only=True)
class Form:
    """A function of tokens, a router's weights and a bias of the choice, and fields of the specification it must be read as."""

    name: str
    f: Callable[..., Any]
    fields: dict[str, Any] = field(default_factory=dict)


FORMS: list[Form] = []


def form(name: str, **fields: Any) -> Callable[[Any], Any]:
    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        FORMS.append(Form(name=name, f=f, fields={**PLAIN, **fields}))
        return f

    return register


PLAIN: dict[str, Any] = {
    "k": K, "score": "softmax", "score_after": False, "select_bias": False, "groups": 1, "kept_groups": 1, "norm": 0, "eps": 0.0,
    "clamp": False, "scale": 1.0, "weights": "float32", "logits_dtype": "float32", "capacity": 0,
}  # fmt: skip


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Tokens, a router's weights, a bias of the choice."""
    generator = torch.Generator().manual_seed(3)
    x, router = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((T, D), (E, D)))
    return x, router, torch.randn(E, generator=generator).mul(0.3)


def used(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The weight of each expert, in whatever order they were chosen: that of a top-k that is not sorted is its own affair."""
    return torch.zeros((*ids.shape[:-1], E), dtype=weights.dtype).scatter(-1, ids, weights)


# -------------------------------------------------------------------- softmax


@form("softmax, renormalised", norm=1)
def _(x, router, bias):
    p = F.softmax(F.linear(x, router), dim=1, dtype=torch.float)
    weights, ids = torch.topk(p, K, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return used(weights, ids), ids.sort(-1).values


@form("softmax, renormalised in place, with eps", norm=1, eps=1e-9)
def _(x, router, bias):
    weights, ids = (x @ router.T).softmax(-1).topk(K)
    weights /= weights.sum(-1, keepdim=True).add(1e-9)
    return used(weights, ids), ids.sort(-1).values


@form("softmax of batches, renormalised with a floor, cast", norm=1, eps=0.25, clamp=True, weights="bfloat16")
def _(x, router, bias):
    weights, ids = torch.topk(torch.softmax((x @ router.T).view(1, T, E), -1), K)
    weights = weights / torch.clamp(weights.sum(-1, keepdim=True), min=0.25)
    return used(weights.to(torch.bfloat16), ids), ids.sort(-1).values


@form("softmax as it is")
def _(x, router, bias):
    weights, ids = torch.topk(F.softmax(x @ router.T, dim=-1), K, sorted=False)
    return used(weights, ids), ids.sort(-1).values


@form("softmax by hand", norm=1)
def _(x, router, bias):
    logits = x @ router.T
    exponentials = (logits - logits.max(-1, keepdim=True).values).exp()
    weights, ids = torch.topk(exponentials / exponentials.sum(-1, keepdim=True), K)
    return used(weights * weights.sum(-1, keepdim=True).reciprocal(), ids), ids.sort(-1).values


@form("top-k, then softmax", score_after=True)
def _(x, router, bias):
    top, ids = torch.topk(F.linear(x, router, bias), K, dim=-1)
    return used(F.softmax(top, dim=1, dtype=top.dtype), ids), ids.sort(-1).values


@form("top-k of logits, the softmax of all gathered and renormalised", score_after=True)
def _(x, router, bias):
    logits = x @ router.T
    ids = logits.topk(K).indices
    weights = logits.softmax(-1).gather(-1, ids)
    return used(weights / weights.sum(-1, keepdim=True), ids), ids.sort(-1).values


@form("2-norm", norm=2)
def _(x, router, bias):
    weights, ids = torch.topk((x @ router.T).softmax(1), K, dim=-1)
    return used(weights / torch.norm(weights, p=2, dim=-1, keepdim=True), ids), ids.sort(-1).values


@form("2-norm by hand, scaled", norm=2, scale=1.5, eps=1e-5)
def _(x, router, bias):
    weights, ids = torch.topk((x @ router.T).softmax(1), K, dim=-1)
    return used(1.5 * weights / (weights.pow(2).sum(-1, keepdim=True).sqrt() + 1e-5), ids), ids.sort(-1).values


@form("1-norm, vectors", norm=1)
def _(x, router, bias):
    weights, ids = torch.topk((x @ router.T).softmax(1), K, dim=-1)
    return used(weights / torch.linalg.vector_norm(weights, ord=1, dim=-1, keepdim=True), ids), ids.sort(-1).values


@form("softmax, scaled before it is divided", norm=1, scale=2.0)
def _(x, router, bias):
    weights, ids = torch.topk((x @ router.T).softmax(1), K, dim=-1)
    return used(weights * 2.0 / weights.sum(-1)[:, None], ids), ids.sort(-1).values


# -------------------------------------------------------------------- groups


def kept_mask(stat, groups, kept):
    ids = torch.topk(stat, k=kept, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(stat).scatter_(1, ids, 1)
    return mask.unsqueeze(-1).expand(-1, groups, E // groups).reshape(-1, E)


GROUPED = {"groups": 4, "kept_groups": 2}
DEEPSEEK = {"score": "sigmoid", "select_bias": True, "norm": 1, "eps": 1e-20, "scale": 2.5, "group_stat": "top2", **GROUPED}


@form("biased sigmoid in groups", **DEEPSEEK, group_fill="-inf")
def _(x, router, bias):
    scores = F.linear(x.float(), router.float()).sigmoid()
    choice = scores + bias
    stat = choice.view(-1, 4, E // 4).topk(2, dim=-1)[0].sum(dim=-1)
    choice = choice.masked_fill(~kept_mask(stat, 4, 2).bool(), float("-inf"))
    ids = torch.topk(choice, k=K, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return used(weights * 2.5, ids), ids.sort(-1).values


@form("biased sigmoid in groups, chosen without gradients", **DEEPSEEK, group_fill="zero")
def _(x, router, bias):
    scores = (x @ router.T).sigmoid()
    with torch.no_grad():
        choice = scores + bias.unsqueeze(0)
        stat = choice.view(-1, 4, E // 4).topk(2, dim=-1)[0].sum(dim=-1)
        ids = torch.topk(choice.masked_fill(~kept_mask(stat, 4, 2).bool(), 0.0), k=K, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return used(weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5, ids), ids.sort(-1).values


@form("biased sigmoid in groups, masked by where", **DEEPSEEK, group_fill="-inf")
def _(x, router, bias):
    scores = (x @ router.T).sigmoid()
    parts = (scores + bias).unflatten(-1, (4, -1))
    kept = parts.topk(2).values.sum(-1).topk(2).indices
    mask = torch.zeros(T, 4, dtype=torch.bool).scatter(1, kept, True)
    choice = torch.where(mask[..., None], parts, -torch.inf).flatten(1)
    ids = choice.topk(K).indices
    weights = scores.gather(-1, ids)
    return used(2.5 * (weights / (weights.sum(-1, keepdim=True) + 1e-20)), ids), ids.sort(-1).values


@form("softmax in groups", scale=16.0, group_stat="max", group_fill="zero", **GROUPED)
def _(x, router, bias):
    scores = (x @ router.T).softmax(dim=-1, dtype=torch.float32)
    stat = scores.view(T, 4, -1).max(dim=-1).values
    weights, ids = torch.topk(scores.masked_fill(~kept_mask(stat, 4, 2).bool(), 0.0), k=K, dim=-1, sorted=False)
    return used(weights * 16.0, ids), ids.sort(-1).values


@form("softmax in groups, multiplied by the mask, one kept", group_stat="max", group_fill="zero", groups=4, kept_groups=1)
def _(x, router, bias):
    scores = (x @ router.T).softmax(dim=-1)
    weights, ids = torch.topk(scores * kept_mask(scores.view(T, 4, -1).amax(-1), 4, 1), k=K)
    return used(weights, ids), ids.sort(-1).values


@form("one group of four, not kept elsewhere", group_stat="max", group_fill="-inf", groups=4, kept_groups=1, score="sigmoid")
def _(x, router, bias):
    scores = (x @ router.T).sigmoid()
    ids = torch.topk(scores.masked_fill(~kept_mask(scores.view(T, 4, -1).amax(-1), 4, 1).bool(), -torch.inf), k=K).indices
    return used(scores.gather(1, ids), ids), ids.sort(-1).values


@form("all in one group, which is kept", select_bias=True, score="sigmoid", norm=1)
def _(x, router, bias):
    scores = (x @ router.T).sigmoid()
    stat = (scores + bias).view(T, 1, E).topk(2, dim=-1)[0].sum(dim=-1)
    ids = torch.topk((scores + bias).masked_fill(~kept_mask(stat, 1, 1).bool(), 0.0), k=K).indices
    weights = scores.gather(1, ids)
    return used(weights / weights.sum(-1, keepdim=True), ids), ids.sort(-1).values


@form("all groups are kept", select_bias=True, score="sigmoid", groups=4, kept_groups=4, group_stat="top2")
def _(x, router, bias):
    scores = (x @ router.T).sigmoid()
    stat = (scores + bias).view(T, 4, -1).topk(2, dim=-1)[0].sum(dim=-1)
    ids = torch.topk((scores + bias).masked_fill(~kept_mask(stat, 4, 4).bool(), 0.0), k=K).indices
    return used(scores.gather(1, ids), ids), ids.sort(-1).values


# -------------------------------------------------------------------- sigmoid


@form("biased sigmoid", score="sigmoid", select_bias=True, norm=1, eps=1e-6)
def _(x, router, bias):
    scores = torch.sigmoid((x @ router.T).float())
    _, ids = torch.topk(scores + bias, K, dim=-1, sorted=False)
    weights = scores.gather(1, ids)
    return used(weights / (weights.sum(-1, keepdim=True) + 1e-6), ids), ids.sort(-1).values


@form("biased softmax with a floor", select_bias=True, norm=1, eps=0.3, clamp=True)
def _(x, router, bias):
    scores = F.softmax(x @ router.T, dim=1, dtype=torch.float)
    _, ids = torch.topk(scores.detach() + bias, K, dim=-1)
    weights = torch.gather(scores, dim=-1, index=ids)
    return used(weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=0.3), ids), ids.sort(-1).values


@form("sigmoid before", score="sigmoid")
def _(x, router, bias):
    weights, ids = torch.topk((x @ router.T).sigmoid(), K)
    return used(weights, ids), ids.sort(-1).values


@form("sigmoid after", score="sigmoid", score_after=True)
def _(x, router, bias):
    top, ids = torch.topk(x @ router.T, K)
    return used(top.sigmoid(), ids), ids.sort(-1).values


@form("sigmoid after, renormalised and scaled", score="sigmoid", score_after=True, norm=1, scale=3.0, eps=3e-5)
def _(x, router, bias):
    top, ids = torch.topk(x @ router.T, K)
    weights = torch.sigmoid(top)
    return used(weights / (weights.sum(-1, keepdim=True) + 3e-5) * 3, ids), ids.sort(-1).values


@form("biased choice of logits, scored after", score="sigmoid", score_after=True, select_bias=True)
def _(x, router, bias):
    logits = x @ router.T
    ids = torch.topk(logits + bias, K).indices
    return used(logits.gather(1, ids).sigmoid(), ids), ids.sort(-1).values


@form("one expert", k=1, score="sigmoid", score_after=True)
def _(x, router, bias):
    top, ids = torch.topk(x @ router.T, 1)
    return used(torch.sigmoid(top.float()), ids), ids.sort(-1).values


# -------------------------------------------------------------------- what else uses them


@form("probabilities in an auxiliary loss", norm=1)
def _(x, router, bias):
    p = (x @ router.T).softmax(-1)
    weights, ids = torch.topk(p, K)
    weights = weights / weights.sum(-1, keepdim=True)
    counts = F.one_hot(ids, E).sum(1).float().mean(0)
    return used(weights, ids), ids, (counts * p.mean(0)).sum() * E


@form("logits in a z-loss, ids and weights returned", norm=1)
def _(x, router, bias):
    logits = x @ router.T
    weights, ids = torch.topk(logits.softmax(-1), K)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids, logits.logsumexp(-1).square().mean()


@form("what was chosen is used before it is divided too")
def _(x, router, bias):
    weights, ids = torch.topk((x @ router.T).softmax(-1), K)
    return used(weights / weights.sum(-1, keepdim=True), ids), ids, weights.sum()


@form("a temperature that is learned per expert stays behind", norm=1)
def _(x, router, bias):
    weights, ids = torch.topk((x @ router.T).softmax(-1), K)
    return weights / weights.sum(-1, keepdim=True) * bias[ids], ids


@form("weights whose gradient is cut", norm=1)
def _(x, router, bias):
    logits = x @ router.T
    weights, ids = torch.topk(logits.softmax(-1), K)
    return (weights / weights.sum(-1, keepdim=True)).detach() * logits.mean(-1, keepdim=True), ids


EACH = pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name.replace(" ", "-"))


@EACH
def test_a_form_is_its_specification_and_computes_the_same(case: Form) -> None:
    compiled = assert_within_contract(Compiled(case.f, (GPU,)), *operands())
    assert_all_rewritten(compiled, "route", **case.fields)
    (graph,) = compiled.graphs[GPU]
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.effcompile.route.default) == 1 and torch.ops.aten.topk.default not in targets


def test_on_a_cpu_it_is_left_to_inductor() -> None:
    compiled = Compiled(FORMS[0].f, ("cpu",))
    compiled(*operands())
    (decision,) = compiled.decisions("route")
    assert decision.outcome == "left" and "no fused implementation on" in decision.why


def test_it_is_worth_it_on_a_gpu() -> None:
    compiled = Compiled(FORMS[0].f, (GPU,), forced=False)
    compiled(*operands())
    assert_all_rewritten(compiled, "route", norm=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_a_narrow_dtype(dtype: torch.dtype) -> None:
    """The softmax after the choice is in the dtype of the logits; the operation rounds its result alone."""

    def f(x, router, bias):
        top, ids = torch.topk(x @ router.T, K)
        return used(top.softmax(-1), ids), ids

    compiled = assert_within_contract(Compiled(f, (GPU,)), *operands(dtype))
    assert_all_rewritten(compiled, "route", weights=str(dtype).removeprefix("torch."), score_after=True)


def test_a_number_of_tokens_that_varies() -> None:
    compiled = Compiled(FORMS[0].f, (GPU,))
    for t in (7, 5):
        x, router, bias = operands()
        x = x[:t].detach().requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        found, expected = (results(f, (x, router, bias)) for f in (compiled, FORMS[0].f))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert_all_rewritten(compiled, "route", norm=1)


# -------------------------------------------------------------------- near misses


def of_logits(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, router, bias: f(x @ router.T, bias)


def chosen_by_other_scores(logits, bias):
    ids = logits.softmax(-1).topk(K).indices
    return used(logits.sigmoid().gather(1, ids), ids)


def chosen_by_logits_weighed_among_all(logits, bias):
    ids = logits.topk(K).indices
    return used(logits.softmax(-1).gather(1, ids), ids)


def weighed_by_what_is_chosen_by(logits, bias):
    weights, ids = (logits.sigmoid() + bias).topk(K)
    return used(weights, ids)


def scored_twice(logits, bias):
    weights, ids = logits.softmax(-1).topk(K)
    return used(weights.softmax(-1), ids).sum() + (weights * ids).sum()


def chosen_logits_used_again(logits, bias):
    top, ids = logits.topk(K)
    return used(top.softmax(-1), ids), top.sum()


def masked_by_something_else(logits, bias):
    scores = logits.sigmoid()
    ids = scores.masked_fill(bias > 0, float("-inf")).topk(K).indices
    return used(scores.gather(1, ids), ids)


def groups_by_the_mean(logits, bias):
    scores = logits.softmax(-1)
    weights, ids = scores.masked_fill(~kept_mask(scores.view(T, 4, -1).mean(-1), 4, 2).bool(), 0.0).topk(K)
    return used(weights, ids)


def groups_by_other_scores(logits, bias):
    scores = logits.sigmoid()
    stat = scores.view(T, 4, -1).amax(-1)
    ids = (scores + bias).masked_fill(~kept_mask(stat, 4, 2).bool(), float("-inf")).topk(K).indices
    return used(scores.gather(1, ids), ids)


def groups_filled_with_one(logits, bias):
    scores = logits.softmax(-1)
    weights, ids = scores.masked_fill(~kept_mask(scores.view(T, 4, -1).amax(-1), 4, 2).bool(), 1.0).topk(K)
    return used(weights, ids)


def interleaved_groups(logits, bias):
    scores = logits.softmax(-1)
    kept = scores.view(T, -1, 4).amax(1).topk(2).indices
    mask = torch.zeros(T, 4).scatter(1, kept, 1.0).unsqueeze(1).expand(-1, E // 4, -1).reshape(T, E)
    weights, ids = scores.masked_fill(~mask.bool(), 0.0).topk(K)
    return used(weights, ids)


def more_than_a_group(logits, bias):
    scores = logits.softmax(-1)
    weights, ids = scores.masked_fill(~kept_mask(scores.view(T, 4, -1).amax(-1), 4, 1).bool(), 0.0).topk(4)
    return used(weights, ids)


def bias_of_each_token(logits, bias):
    scores = logits.sigmoid()
    ids = (scores + scores.flip(0)).topk(K).indices
    return used(scores.gather(1, ids), ids)


def in_float64(logits, bias):
    weights, ids = logits.double().softmax(-1).topk(K)
    return used(weights, ids)


def weights_without_a_gradient(logits, bias):
    with torch.no_grad():
        scores = logits.sigmoid()
    ids = scores.topk(K).indices
    return used(scores.gather(1, ids) * logits.mean(-1, keepdim=True), ids)


REFUSED = [
    (chosen_by_other_scores, "weights", "chosen by other scores than they are weighted by"),
    (chosen_by_logits_weighed_among_all, "weights", "the softmax of all of them is not divided by the sum of what is chosen"),
    (weighed_by_what_is_chosen_by, "weights", "the bias of the choice included"),
    (chosen_logits_used_again, "uses", "what is chosen is also used by"),
    (masked_by_something_else, "weights", "chosen by other scores than they are weighted by"),
    (groups_by_the_mean, "groups", "not kept by their greatest, or by the sum of their two greatest"),
    (groups_by_other_scores, "groups", "by something else than what experts are chosen by"),
    (groups_filled_with_one, "groups", "chosen by 1, neither 0 nor -inf"),
    (interleaved_groups, "groups", "not of equally many neighbouring experts"),
    (more_than_a_group, "groups", "more experts are chosen than the kept groups have"),
    (bias_of_each_token, "choice", "not scores, with a bias for each expert or without"),
    (in_float64, "dtype", "float64 has no kernel"),
    (weights_without_a_gradient, "modes", "different grad or autocast modes"),
]  # fmt: skip


@pytest.mark.parametrize(("f", "step", "why"), REFUSED, ids=[f.__name__ for f, *_ in REFUSED])
def test_a_near_miss_is_refused(f: Callable[..., Any], step: str, why: str) -> None:
    assert_refused(of_logits(f), *operands(), why=why, step=step, family="route")


def a_top_k_that_is_not_scored(logits, bias):
    top, ids = logits.topk(K)
    return used(top, ids)


def the_least(logits, bias):
    weights, ids = logits.softmax(-1).topk(K, largest=False)
    return used(weights, ids)


def tokens_for_experts(logits, bias):
    weights, ids = logits.softmax(-1).topk(K, dim=0)
    return weights * ids


def positions_alone(logits, bias):
    return logits.softmax(-1).topk(K).indices


def values_alone(logits, bias):
    return logits.softmax(-1).topk(K).values


@pytest.mark.parametrize(
    "f", [a_top_k_that_is_not_scored, the_least, tokens_for_experts, positions_alone, values_alone], ids=lambda f: f.__name__
)
def test_what_is_no_router_is_passed_over(f: Callable[..., Any]) -> None:
    compiled = Compiled(of_logits(f), (GPU,))
    compiled(*operands())
    assert compiled.decisions("route") == []


# -------------------------------------------------------------------- whole layers: router and experts

WIDTH = 8


def experts(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).requires_grad_()


def mixed(x, weights, ids, up, down, activation):
    """Each assignment with a copy of its expert's weights, added up."""
    h = torch.einsum("td,tkfd->tkf", x, up[ids])
    return torch.einsum("tkf,tkdf,tk->td", activation(h), down[ids], weights)


def swiglu(h):
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def mixtral(x, router, bias, up, down):
    batch = x.unsqueeze(0)
    rows = batch.view(-1, D)
    logits = F.linear(rows, router)
    weights, ids = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), K, dim=-1)
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(rows.dtype)
    out = torch.zeros_like(rows)
    mask = F.one_hot(ids, E).permute(2, 1, 0)
    for e in range(E):
        chosen = mask[e].to(rows.dtype)  # [K, T]
        y = F.linear(swiglu(F.linear(rows, up[e])), down[e])
        out = out + y * (chosen * weights.T).sum(0)[:, None]
    return out.view(1, T, D), logits.logsumexp(-1).square().mean()


def deepseek(x, router, bias, up, down):
    scores = F.linear(x.float(), router.float()).sigmoid()
    with torch.no_grad():
        choice = scores.view(-1, E) + bias.unsqueeze(0)
        stat = choice.view(-1, 4, E // 4).topk(2, dim=-1)[0].sum(dim=-1)
        ids = torch.topk(choice.masked_fill(~kept_mask(stat, 4, 2).bool(), float("-inf")), k=K, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5
    flat = ids.reshape(-1)
    h = torch.bmm(up[flat], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    y = torch.bmm(down[flat], swiglu(h).unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
    shared = F.linear(swiglu(F.linear(x, up[0])), down[0])
    return y.view(T, K, D).sum(1) + shared


def gpt_oss(x, router, bias, up, down):
    top, ids = torch.topk(F.linear(x, router, bias), K, dim=-1)
    weights = F.softmax(top, dim=1, dtype=top.dtype)
    scores = torch.zeros(T, E).scatter(1, ids, weights)
    h = torch.einsum("td,efd->etf", x, up)
    gate, linear = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(min=-7.0, max=7.0)
    y = torch.einsum("etf,edf->etd", (linear + 1) * gate * torch.sigmoid(1.702 * gate), down)
    return (y * scores.T[..., None]).sum(0)


def input_scaled(x, router, bias, up, down):
    top, ids = torch.topk(F.linear(x, router), K, dim=1)
    scores = torch.full((T, E), float("-inf")).scatter(1, ids, top).sigmoid().T  # [E, T]
    rows = x.repeat(E, 1) * scores.reshape(-1, 1)
    y = torch.bmm(swiglu(torch.bmm(rows.view(E, -1, D), up.mT)), down.mT)
    return y.view(-1, D).reshape(E, -1, D).sum(0)


LAYERS = {
    mixtral: {"score": "softmax", "norm": 1},
    deepseek: DEEPSEEK,
    gpt_oss: {"score": "softmax", "score_after": True},
    input_scaled: {"score": "sigmoid", "score_after": True},
}


@pytest.mark.parametrize("f", LAYERS, ids=lambda f: f.__name__)
def test_a_layer_gets_its_router_and_its_experts(f: Callable[..., Any]) -> None:
    arguments = (*operands(), experts(5, E, 2 * WIDTH, D), experts(6, E, D, WIDTH))
    compiled = assert_within_contract(Compiled(f, (GPU,)), *arguments)
    assert_all_rewritten(compiled, "route", **LAYERS[f])
    assert_all_rewritten(compiled, "experts")
    (graph,) = compiled.graphs[GPU]
    targets = [node.target for node in graph.graph.nodes]
    assert torch.ops.aten.topk.default not in targets
    assert targets.count(torch.ops.effcompile.route.default) == targets.count(torch.ops.effcompile.experts.default) == 1
