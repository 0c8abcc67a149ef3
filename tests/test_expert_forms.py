"""Layers of experts in the forms in which they are written: what each is read as, and its results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.expert_forms import (
    SWIGLU,
    D,
    E,
    Forms,
    K,
    N,
    T,
    dense_of,
    grouped,
    linear,
    modules,
    narrow,
    normal,
    route,
    stored,
    swiglu,
)  # fmt: skip
from tests.vocabulary import Compiled, assert_all_rewritten, assert_refused, assert_within_contract

FORMS = form = Forms()
BIASED: dict[str, Any] = {**SWIGLU, "biased": (True, True)}

# -------------------------------------------------------------------- each assignment with a copy of its expert's weights


@form("copied weights, rows repeated", linear, **SWIGLU, stacking="one")
def _(x, router, up, down):
    weights, ids = route(x, router)
    ids = ids.reshape(-1)
    h = torch.bmm(up[ids], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    y = torch.bmm(down[ids], swiglu(h).unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(T, K, D).sum(1)


@form("copied weights, biases of the expert", lambda: stored(bias=True), **BIASED, stacking="one")
def _(x, router, up, down, up_bias, down_bias):
    weights, ids = route(x, router)
    h = torch.einsum("td,tkdf->tkf", x, up[ids]) + up_bias[ids]
    y = torch.einsum("tkf,tkfd->tkd", swiglu(h), down[ids]) + down_bias[ids]
    return torch.einsum("tkd,tk->td", y, weights)


@form("copied weights, added at the tokens of rows", linear, **SWIGLU)
def _(x, router, up, down):
    weights, ids = route(x, router)
    tokens = torch.arange(T).repeat_interleave(K)
    ids = ids.reshape(-1)
    y = down[ids] @ swiglu((up[ids] @ x[tokens].unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, tokens, y.squeeze(-1) * weights.reshape(-1, 1))


@form("copied weights, matmul with the routing weights", linear, **SWIGLU)
def _(x, router, up, down):
    weights, ids = route(x, router)
    h = torch.matmul(up[ids], x[:, None, :, None]).squeeze(-1)
    y = torch.matmul(down[ids], swiglu(h).unsqueeze(-1)).squeeze(-1)
    return torch.matmul(weights.unsqueeze(1), y).squeeze(1)


@form("copied weights, no routing weights", linear, **{**SWIGLU, "weighted": "none"})
def _(x, router, up, down):
    _, ids = route(x, router)
    h = torch.einsum("td,tkfd->tkf", x, up[ids])
    return torch.einsum("tkf,tkdf->tkd", swiglu(h), down[ids]).sum(1)


@form("copied weights, batch and sequence", lambda: (normal(2, 7, D), *linear()[1:]), **SWIGLU)
def _(x, router, up, down):
    b, s, d = x.shape
    rows = x.view(-1, d)
    weights, ids = route(rows, router)
    h = torch.einsum("td,tkfd->tkf", rows, up[ids])
    y = torch.einsum("tkf,tkdf->tkd", swiglu(h), down[ids])
    return (y * weights[..., None]).view(b, s, K, d).sum(2)


@form("tokens weighted before the experts", linear, **{**SWIGLU, "weighted": "input"})
def _(x, router, up, down):
    weights, ids = route(x, router)
    ids = ids.reshape(-1)
    rows = x.repeat_interleave(K, 0) * weights.reshape(-1, 1)
    h = torch.bmm(up[ids], rows.unsqueeze(-1)).squeeze(-1)
    y = torch.bmm(down[ids], swiglu(h).unsqueeze(-1)).squeeze(-1)
    return y.view(T, K, D).sum(1)


# -------------------------------------------------------------------- sorted by expert, and back


@form("sorted, counted by a histogram, back by index_put", narrow, **SWIGLU)
def _(x, router, up, down):
    weights, ids = route(x, router)
    flat = ids.reshape(-1)
    by_expert, order = torch.sort(flat)
    offsets = torch.histc(by_expert.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
    h = grouped(x[order // K], up.mT, offsets)
    y = grouped(swiglu(h), down.mT, offsets) * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(T * K)
    return y[back].view(T, K, -1).sum(1)


@form("sorted, counted by comparison, back by argsort", narrow, **SWIGLU)
def _(x, router, up, down):
    weights, ids = route(x, router)
    order = ids.flatten().argsort(stable=True)
    offsets = (ids.flatten()[:, None] == torch.arange(E)).sum(0).cumsum(0).int()
    h = grouped(x[order // K], up.mT, offsets)
    y = grouped(swiglu(h), down.mT, offsets)[order.argsort()]
    return (y.view(T, K, -1) * weights.unsqueeze(-1)).sum(1)


@form("sorted, counted by one_hot, added at the tokens of rows", narrow, **SWIGLU)
def _(x, router, up, down):
    weights, ids = route(x, router)
    order = ids.view(-1).argsort()
    tokens = order // K
    offsets = F.one_hot(ids, E).sum((0, 1)).cumsum(0).int()
    h = grouped(x[tokens], up.mT, offsets)
    y = grouped(swiglu(h), down.mT, offsets) * weights.view(-1)[order].unsqueeze(-1)
    return torch.zeros(T, y.shape[-1], dtype=y.dtype).index_add(0, tokens, y)


@form("sorted, slots before tokens, scattered at the tokens", narrow, **SWIGLU)
def _(x, router, up, down):
    weights, ids = route(x, router)
    order = ids.mT.reshape(-1).argsort()
    tokens = order % T
    offsets = torch.zeros(E).scatter_add(0, ids.flatten(), torch.ones(T * K)).cumsum(0).int()
    h = grouped(x[tokens], up.mT, offsets)
    y = grouped(swiglu(h), down.mT, offsets) * weights.mT.reshape(-1)[order].unsqueeze(-1)
    return torch.zeros(T, y.shape[-1], dtype=y.dtype).scatter_add(0, tokens[:, None].expand_as(y), y)


# -------------------------------------------------------------------- one expert after the other, on all tokens


@form("loop, weights summed where the id is the expert", modules, **SWIGLU, stacking="experts_pair")
def _(x, router, *experts):
    weights, ids = route(x, router)
    out = torch.zeros_like(x)
    for e in range(E):
        gate, up, down = experts[3 * e : 3 * e + 3]
        weight = (weights * (ids == e)).sum(-1, keepdim=True)
        out = out + weight * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return out


@form("loop, dense weights", modules, **SWIGLU, stacking="experts_pair")
def _(x, router, *experts):
    dense = dense_of(*route(x, router))
    out = 0
    for e in range(E):
        gate, up, down = experts[3 * e : 3 * e + 3]
        out += dense[:, e : e + 1] * ((F.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT)
    return out


@form("loop, masked outputs", lambda: modules(bias=True, gated=False), activation="max(0, up) ** 2", gated=False,
      biased=(True, True), weighted="output", stacking="experts")  # fmt: skip
def _(x, router, *experts):
    probabilities = (x @ router.mT).softmax(-1)
    ids = probabilities.topk(K, dim=-1)[1]
    out = torch.zeros_like(x)
    for e in range(E):
        up, up_bias, down, down_bias = experts[4 * e : 4 * e + 4]
        chosen = (ids == e).any(-1, keepdim=True)
        y = F.linear(F.relu(F.linear(x, up, up_bias)).square(), down, down_bias)
        out = out + torch.where(chosen, y * probabilities[:, e, None], 0.0)
    return out


@form("loop, slices of stacked weights", linear, **SWIGLU, stacking="one")
def _(x, router, up, down):
    weights, ids = route(x, router)
    hot = F.one_hot(ids, E).to(x.dtype)
    dense = torch.einsum("tk,tke->te", weights, hot)
    out = torch.zeros_like(x)
    for e in range(E):
        out = out + dense[:, e].unsqueeze(-1) * F.linear(swiglu(F.linear(x, up[e])), down[e])
    return out


@form("loop, begun with a shared expert", lambda: (normal(2, 7, D), *modules()[1:]), **SWIGLU, stacking="experts_pair")
def _(x, router, *experts):
    weights, ids = (x @ router.mT).softmax(-1).topk(K, dim=-1)
    out = x + F.silu(x)
    for e in range(E):
        gate, up, down = experts[3 * e : 3 * e + 3]
        weight = (weights * (ids == e)).sum(-1, keepdim=True)
        out = out + weight * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return out


@form("loop, results stacked and summed", modules, **SWIGLU, stacking="experts_pair")
def _(x, router, *experts):
    dense = dense_of(*route(x, router))
    each = zip(experts[::3], experts[1::3], experts[2::3], strict=True)
    found = [F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d) for g, u, d in each]
    return (torch.stack(found, 1) * dense.unsqueeze(-1)).sum(1)


@form("loop, one expert for each token", modules, **SWIGLU, stacking="experts_pair")
def _(x, router, *experts):
    weight, which = (x @ router.mT).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for e in range(E):
        gate, up, down = experts[3 * e : 3 * e + 3]
        y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        out = out + y * (weight * (which == e)).unsqueeze(-1)
    return out


# -------------------------------------------------------------------- all experts on all tokens


@form("dense, combined by an einsum", stored, **SWIGLU, stacking="one")
def _(x, router, up, down):
    dense = dense_of(*route(x, router))
    y = torch.einsum("tef,efd->ted", swiglu(torch.einsum("td,edf->tef", x, up)), down)
    return torch.einsum("te,ted->td", dense, y)


@form("dense, masked probabilities", stored, **SWIGLU)
def _(x, router, up, down):
    probabilities = (x @ router.mT).softmax(-1)
    ids = probabilities.topk(K, dim=-1).indices
    kept = probabilities * torch.zeros_like(probabilities).scatter(1, ids, 1.0)
    kept = kept / kept.sum(-1, keepdim=True)
    y = swiglu(x.expand(E, T, D) @ up) @ down
    return (y * kept.mT.unsqueeze(-1)).sum(0)


@form("dense, softmax of the chosen logits", lambda: stored(bias=True), **BIASED)
def _(x, router, up, down, up_bias, down_bias):
    logits = x @ router.mT
    values, ids = logits.topk(K, dim=-1)
    weights = torch.full_like(logits, float("-inf")).scatter(1, ids, values).softmax(-1)
    h = torch.bmm(x.unsqueeze(0).expand(E, -1, -1), up) + up_bias[:, None]
    y = torch.bmm(swiglu(h), down) + down_bias[:, None]
    return torch.einsum("etd,te->td", y, weights)


@form("dense, tokens weighted before the experts", stored, **{**SWIGLU, "weighted": "input"})
def _(x, router, up, down):
    values, ids = (x @ router.mT).topk(K, dim=-1)
    scores = torch.full((T, E), float("-inf")).scatter(1, ids, values).sigmoid()
    rows = x.repeat(E, 1) * scores.mT.reshape(-1, 1)
    return torch.bmm(swiglu(torch.bmm(rows.view(E, -1, D), up)), down).sum(0)


# -------------------------------------------------------------------- activations


def _with(activation):
    def f(x, router, up, down):
        weights, ids = route(x, router)
        y = torch.einsum("tkf,tkfd->tkd", activation(torch.einsum("td,tkdf->tkf", x, up[ids])), down[ids])
        return (y * weights.unsqueeze(-1)).sum(1)

    return f


def _ungated() -> tuple[torch.Tensor, ...]:
    x, router, _, down = stored()
    return x, router, normal(E, D, N, seed=2, scale=D**-0.5), down


def _clamped(h):
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _second_half_gates(h):
    up, gate = h.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


for _name, _activation, _make, _fields in (
    ("gelu", lambda h: F.gelu(h[..., :N]) * h[..., N:], stored, {"gated": True}),
    ("gelu-tanh, gate last", _second_half_gates, stored, {"gated": True}),
    ("clamped and interleaved", _clamped, stored, {"gated": True, "interleaved": True}),
    ("glu", F.glu, stored, {"gated": True, "activation": "gate * sigmoid(up)"}),
    ("relu squared", lambda h: F.relu(h).square(), _ungated, {"gated": False, "activation": "max(0, up) ** 2"}),
    ("linear", lambda h: h, _ungated, {"gated": False, "activation": "up"}),
):
    form(f"activation: {_name}", _make, **_fields)(_with(_activation))


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.name)
def test_a_form_is_read_as_written(case):
    compiled = assert_within_contract(Compiled(case.f), *case.make())
    assert_all_rewritten(compiled, "experts", **case.fields)
    assert len(compiled.decisions("experts")) == 1


# -------------------------------------------------------------------- sizes and modes


def _sorted_of_any_length(x, router, up, down):
    weights, ids = route(x, router)
    order = ids.flatten().argsort()
    offsets = F.one_hot(ids, E).sum((0, 1)).cumsum(0).int()
    y = grouped(swiglu(grouped(x[order // K], up.mT, offsets)), down.mT, offsets)[order.argsort()]
    return (y.view(x.shape[0], K, -1) * weights.unsqueeze(-1)).sum(1)


def _copied_of_any_length(x, router, up, down):
    weights, ids = route(x, router)
    ids = ids.reshape(-1)
    h = torch.bmm(up[ids], x.repeat_interleave(K, 0).unsqueeze(-1)).squeeze(-1)
    y = torch.bmm(down[ids], swiglu(h).unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(x.shape[0], K, -1).sum(1)


def _dense_of_any_length(x, router, up, down):
    rows = x.repeat(E, 1).view(E, -1, x.shape[-1])
    y = torch.bmm(swiglu(torch.bmm(rows, up.mT)), down.mT)
    return (y * dense_of(*route(x, router)).mT.unsqueeze(-1)).sum(0)


OF_ANY_LENGTH = {"sorted": _sorted_of_any_length, "copied": _copied_of_any_length, "dense": _dense_of_any_length}


@pytest.mark.parametrize("name", OF_ANY_LENGTH)
@pytest.mark.parametrize("length", [T, 1], ids=["symbolic", "one token"])
def test_the_number_of_tokens(name, length):
    x, *rest = narrow()
    x = x.detach()[:length].clone().requires_grad_()
    if length > 1:
        torch._dynamo.mark_dynamic(x, 0)
    compiled = assert_within_contract(Compiled(OF_ANY_LENGTH[name]), x, *rest)
    assert_all_rewritten(compiled, "experts", **SWIGLU)


def test_under_autocast_the_experts_are_narrow():
    def f(x, router, up, down):
        with torch.autocast("cpu", torch.bfloat16):
            return _copied_of_any_length(x, router, up, down)

    compiled = Compiled(f)
    args = linear()
    exact, mine = _copied_of_any_length(*args), compiled(*args)
    assert_all_rewritten(compiled, "experts", **SWIGLU)
    assert (mine.float() - exact).norm() <= 2 * (f(*args).float() - exact).norm()


def test_strict_numerics_keep_narrow_experts_as_they_are():
    from effcompile.config import Config
    from effcompile.pipeline import Pipeline

    kept = []

    def backend(module, inputs):
        kept.append(Pipeline(Config.resolve(None, {"hardware": "h100-sxm", "numerics": "strict"})).run(module, inputs).frame)
        return module.forward

    torch.compile(_copied_of_any_length, backend=backend)(*narrow())
    (decision,) = (d for d in kept[0].decisions if d.family == "experts")
    assert (decision.outcome, decision.step) == ("refused", "numerics")


def test_a_feed_forward_layer_is_no_site():
    def f(x, router, up, down):
        h = x + F.linear(swiglu(F.linear(x, up[0])), down[0])
        return h + F.linear(swiglu(F.linear(F.layer_norm(h, (D,)), up[1])), down[1]) * (x @ router.mT).sigmoid().sum(
            1, keepdim=True
        )

    compiled = Compiled(f)
    compiled(*linear())
    assert not compiled.decisions("experts")


def test_an_expert_chosen_twice_counts_twice_where_its_weights_are_added():
    """With `(w * (ids == e)).sum(-1)` a repeated id is no matter; with a scatter it is, and ids must be known to differ."""

    def added(x, ids, weights, *experts):
        ids = ids.clamp(0, E - 1)
        return _loop(x, [(weights * (ids == e)).sum(-1) for e in range(E)], experts)

    def scattered(x, ids, weights, *experts):
        dense = dense_of(weights, ids.clamp(0, E - 1))
        return _loop(x, [dense[:, e] for e in range(E)], experts)

    x, _, *experts = modules()
    ids = torch.randint(E, (T, 1)).expand(T, K).clone()
    args = (x, ids, normal(T, K, seed=7), *experts)
    compiled = assert_within_contract(Compiled(added), *args)
    assert_all_rewritten(compiled, "experts", **SWIGLU)
    assert_refused(scattered, *args, why="chosen an expert twice", step="route", family="experts")


def _loop(x, weights, experts):
    out = torch.zeros_like(x)
    for e, weight in enumerate(weights):
        gate, up, down = experts[3 * e : 3 * e + 3]
        out = out + weight.unsqueeze(-1) * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return out
