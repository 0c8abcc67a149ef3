"""What looks like a layer of experts and is none that the operation takes: left as it is, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.expert_forms import D, E, K, N, T, dense_of, grouped, linear, modules, narrow, route, stored, swiglu
from tests.vocabulary import assert_refused

REFUSED: dict[str, Any] = {}


def refused(name, make, why, step):
    """Register a function that looks like a layer of experts, and why it is none."""

    def register(f):
        REFUSED[name] = pytest.param(f, make, why, step, id=name)
        return f

    return register


@refused("weights of all experts", stored, "every expert computes for every token", "route")
def _(x, router, up, down):
    y = torch.einsum("tef,efd->ted", swiglu(torch.einsum("td,edf->tef", x, up)), down)
    return torch.einsum("te,ted->td", (x @ router.mT).softmax(-1), y)


@refused("weights above a threshold", stored, "every expert computes for every token", "route")
def _(x, router, up, down):
    probabilities = (x @ router.mT).softmax(-1)
    kept = probabilities * (probabilities >= probabilities.topk(K, dim=-1).values[:, -1:])
    y = torch.einsum("tef,efd->ted", swiglu(torch.einsum("td,edf->tef", x, up)), down)
    return torch.einsum("te,ted->td", kept, y)


@refused("weights that are not zero elsewhere", stored, "every expert computes for every token", "route")
def _(x, router, up, down):
    weights, ids = route(x, router)
    dense = torch.full((T, E), 0.01).scatter(1, ids, weights)
    y = torch.einsum("tef,efd->ted", swiglu(torch.einsum("td,edf->tef", x, up)), down)
    return torch.einsum("te,ted->td", dense, y)


@refused("tokens weighted before experts with biases", lambda: stored(bias=True), "every expert computes for every token", "route")
def _(x, router, up, down, up_bias, down_bias):
    values, ids = (x @ router.mT).topk(K, dim=-1)
    scores = torch.full((T, E), float("-inf")).scatter(1, ids, values).sigmoid()
    h = torch.bmm(x * scores.mT.unsqueeze(-1), up) + up_bias[:, None]
    return (torch.bmm(swiglu(h), down) + down_bias[:, None]).sum(0)


@refused("an activation that is not zero at zero", stored, "every expert computes for every token", "route")
def _(x, router, up, down):
    values, ids = (x @ router.mT).topk(K, dim=-1)
    scores = torch.full((T, E), float("-inf")).scatter(1, ids, values).sigmoid()
    h = torch.bmm(x * scores.mT.unsqueeze(-1), up)
    return torch.bmm(torch.sigmoid(h[..., :N]) + h[..., N:], down).sum(0)


@refused("offsets of other ids", narrow, "do not count the ids that its rows are sorted by", "groups")
def _(x, router, up, down):
    weights, ids = route(x, router)
    order = ids.flatten().argsort()
    offsets = F.one_hot(ids.roll(1, 1).clamp(max=2), E).sum((0, 1)).cumsum(0).int()
    y = grouped(swiglu(grouped(x[order // K], up.mT, offsets)), down.mT, offsets)[order.argsort()]
    return (y.view(T, K, -1) * weights.unsqueeze(-1)).sum(1)


@refused("rows not brought back", narrow, "not brought back to the order of tokens", "groups")
def _(x, router, up, down):
    weights, ids = route(x, router)
    order = ids.flatten().argsort()
    offsets = F.one_hot(ids, E).sum((0, 1)).cumsum(0).int()
    y = grouped(swiglu(grouped(x[order // K], up.mT, offsets)), down.mT, offsets)
    return (y.view(T, K, -1) * weights.unsqueeze(-1)).sum(1)


@refused("sorted from the last expert on", narrow, "descending", "groups")
def _(x, router, up, down):
    weights, ids = route(x, router)
    order = ids.flatten().argsort(descending=True)
    offsets = F.one_hot(ids, E).sum((0, 1)).cumsum(0).int()
    y = grouped(swiglu(grouped(x[order // K], up.mT, offsets)), down.mT, offsets)
    return torch.zeros_like(x).index_add(0, order // K, y * weights.flatten()[order].unsqueeze(-1))


@refused("offsets of some of the ids", narrow, "do not count the ids that its rows are sorted by", "groups")
def _(x, router, up, down):
    weights, ids = route(x, router)
    order = ids.flatten().argsort()
    offsets = F.one_hot(ids.flatten()[: T * K // 2], E).sum(0).cumsum(0).int()
    y = grouped(swiglu(grouped(x[order // K], up.mT, offsets)), down.mT, offsets)[order.argsort()]
    return (y.view(T, K, -1) * weights.unsqueeze(-1)).sum(1)


@refused("rows brought back by another order", narrow, "not brought back to the order of tokens", "groups")
def _(x, router, up, down):
    weights, ids = route(x, router)
    order, other = ids.flatten().argsort(), ids.flip(0).flatten().argsort()
    offsets = F.one_hot(ids, E).sum((0, 1)).cumsum(0).int()
    y = grouped(swiglu(grouped(x[order // K], up.mT, offsets)), down.mT, offsets)[other]
    return (y.view(T, K, -1) * weights.unsqueeze(-1)).sum(1)


@refused("weights that are not sorted as the rows are", narrow, "weights cannot be read as a view", "route")
def _(x, router, up, down):
    weights, ids = route(x, router)
    order = ids.flatten().argsort()
    offsets = F.one_hot(ids, E).sum((0, 1)).cumsum(0).int()
    y = grouped(swiglu(grouped(x[order // K], up.mT, offsets)), down.mT, offsets) * weights.reshape(-1, 1)
    return y[order.argsort()].view(T, K, -1).sum(1)


@refused("biases of other experts", lambda: stored(bias=True), "not those of the experts that were chosen", "weights")
def _(x, router, up, down, up_bias, down_bias):
    weights, ids = route(x, router)
    h = torch.einsum("td,tkdf->tkf", x, up[ids]) + up_bias[ids.flip(-1)]
    y = torch.einsum("tkf,tkfd->tkd", swiglu(h), down[ids]) + down_bias[ids]
    return torch.einsum("tkd,tk->td", y, weights)


@refused("experts that choose their tokens", stored, "every expert computes for every token", "route")
def _(x, router, up, down):
    weights, tokens = (x @ router.mT).softmax(-1).topk(4, dim=0)
    dense = torch.zeros(T, E).scatter(0, tokens, weights)
    y = torch.einsum("tef,efd->ted", swiglu(torch.einsum("td,edf->tef", x, up)), down)
    return torch.einsum("te,ted->td", dense, y)


@refused("tokens of other slots", linear, "not the token's own row", "tokens")
def _(x, router, up, down):
    weights, ids = route(x, router)
    rows = x[ids.flatten()]
    h = torch.bmm(up[ids.flatten()], rows.unsqueeze(-1)).squeeze(-1)
    y = torch.bmm(down[ids.flatten()], swiglu(h).unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(T, K, D).sum(1)


@refused("first and second projection of different experts", linear, "not those of the experts that were chosen", "weights")
def _(x, router, up, down):
    weights, ids = route(x, router)
    h = torch.einsum("td,tkfd->tkf", x, up[ids.flip(-1)])
    y = torch.einsum("tkf,tkdf->tkd", swiglu(h), down[ids])
    return (y * weights.unsqueeze(-1)).sum(1)


@refused("ids from outside", lambda: (*linear(), torch.randint(E, (T, K))), "may be negative", "route")
def _(x, router, up, down, ids):
    h = torch.einsum("td,tkfd->tkf", x, up[ids])
    return torch.einsum("tkf,tkdf->tkd", swiglu(h), down[ids]).sum(1)


@refused("projections used again", linear, "also used by", "uses")
def _(x, router, up, down):
    weights, ids = route(x, router)
    h = torch.einsum("td,tkfd->tkf", x, up[ids])
    y = torch.einsum("tkf,tkdf->tkd", swiglu(h), down[ids])
    return (y * weights.unsqueeze(-1)).sum(1), h.square().mean()


@refused("an activation across columns", linear, "neither the halves", "activation")
def _(x, router, up, down):
    weights, ids = route(x, router)
    h = torch.einsum("td,tkfd->tkf", x, up[ids])
    y = torch.einsum("tkf,tkdf->tkd", h[..., :N] * h[..., N:].flip(-1), down[ids])
    return (y * weights.unsqueeze(-1)).sum(1)


@refused("a loop over some experts twice", modules, "each once", "route")
def _(x, router, *experts):
    dense = dense_of(*route(x, router))
    out = torch.zeros_like(x)
    for e in (0, 1, 1, 2):
        gate, up, down = experts[3 * e : 3 * e + 3]
        out = out + dense[:, e, None] * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    return out


@refused("a loop whose experts differ", modules, "differ in their activation", "activation")
def _(x, router, *experts):
    dense = dense_of(*route(x, router))
    out = torch.zeros_like(x)
    for e in range(E):
        gate, up, down = experts[3 * e : 3 * e + 3]
        activation = F.silu if e else F.relu
        out = out + dense[:, e, None] * F.linear(activation(F.linear(x, gate)) * F.linear(x, up), down)
    return out


@pytest.mark.parametrize(("f", "make", "why", "step"), REFUSED.values())
def test_a_near_miss_is_refused(f, make, why, step):
    assert_refused(f, *make(), why=why, step=step, family="experts")
