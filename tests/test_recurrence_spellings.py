"""Recurrences as people write them, from papers' listings and models' own files, through all rooms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn import functional as F

from .vocabulary import assert_all_rewritten, assert_refused, assert_within_contract

B, H, T, D, V = 2, 3, 12, 4, 5
Forms = dict[str, tuple[Any, tuple[Callable[[], Tensor], ...], tuple[dict[str, Any], ...]]]
FORMS: Forms = {}
PLAIN = {"operands": ("q", "k"), "decay": "none"}
GATED = {"operands": ("q", "k", "gate"), "decay": "head"}
ROWS = {"operands": ("gate",), "decay": "value", "gate": "factor"}


def normal(*shape: int, seed: int = 0) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


QKV = (normal(B, H, T, D, seed=1), normal(B, H, T, D, seed=2), normal(B, H, T, V, seed=3))
MAMBA = (normal(B, T, V), normal(B, T, V, seed=1), normal(V, D, seed=2), normal(B, T, D, seed=3), normal(B, T, D, seed=4))
SSD = (normal(B, T, H, V), normal(B, T, H, seed=4), normal(B, T, H, D, seed=5), normal(B, T, H, D, seed=6))


def spelled(name: str, *makers: Callable[[], Tensor], specs: tuple[dict[str, Any], ...]) -> Any:
    def register(f: Any) -> Any:
        FORMS[name] = f, makers, specs
        return f

    return register


def combine(left: Any, right: Any) -> Any:
    return left[0] * right[0], left[1] * right[0] + right[1]


@spelled("linear attention that writes into its result", *QKV, specs=({**PLAIN, "normaliser": True},))
def _(q, k, v):
    state, total = torch.zeros(B, H, D, V), torch.zeros(B, H, D)
    out = torch.empty(B, H, T, V)
    for t in range(T):
        state = state + torch.einsum("bhd,bhv->bhdv", k[:, :, t], v[:, :, t])
        total = total + k[:, :, t]
        below = torch.einsum("bhd,bhd->bh", q[:, :, t], total).clamp(min=1e-6)
        out[:, :, t] = torch.einsum("bhd,bhdv->bhv", q[:, :, t], state) / below.unsqueeze(-1)
    return out


@spelled("RetNet, chunk by chunk", *QKV, specs=(GATED,))
def _(q, k, v):
    size, i = 4, torch.arange(4)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float32))
    within = torch.where(i[:, None] >= i, gamma[:, None, None] ** (i[:, None] - i), 0.0)
    past, carried = (gamma[:, None] ** (i + 1))[..., None], (gamma[:, None] ** (size - 1 - i))[..., None]
    state, out = torch.zeros(B, H, D, V), []
    for c in range(T // size):
        a, b, x = (y[:, :, c * size : (c + 1) * size] for y in (q, k, v))
        out.append((a @ b.mT * within) @ x + (a @ state) * past)
        state = gamma.view(H, 1, 1) ** size * state + (b * carried).mT @ x
    return torch.cat(out, 2)


@spelled("lightning attention, chunk by chunk", *QKV, specs=(GATED,))
def _(q, k, v):
    slope, size = torch.tensor([0.5, 0.25, 0.125]).view(H, 1, 1), 4
    r = torch.arange(size) + 1.0
    past, carried = torch.exp(-slope * r[:, None]), torch.exp(-slope * (size - r[:, None]))
    difference = r[:, None] - r[None]
    within = torch.exp(torch.where(difference >= 0, -slope * difference, -torch.inf))
    state, out = torch.zeros(B, H, D, V), []
    for start in range(0, T, size):
        a, b, x = (y[:, :, start : start + size] for y in (q, k, v))
        out.append(torch.matmul(torch.matmul(a, b.mT) * within, x) + torch.matmul(a * past, state))
        state = state * torch.exp(-slope * size) + torch.matmul((b * carried).transpose(-1, -2), x)
    return torch.cat(out, 2)


@spelled("RetNet from the number 0", *QKV, specs=({**GATED, "operands": ("q", "k", "gate", "initial")},))
def _(q, k, v):
    gamma = 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), H))
    state, out = 0, []
    for t in range(T):
        state = gamma.view(1, H, 1, 1) * state + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        out.append((q[:, :, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(out, 2)


@spelled("GLA, decayed after it is read", *QKV, normal(B, H, T, D, seed=4), normal(B, H, D, V, seed=8),
         specs=({"operands": ("q", "k", "gate", "initial"), "decay": "key", "read": "after"},))  # fmt: skip
def _(q, k, v, g, state):
    out = []
    for t in range(T):
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        out.append(torch.einsum("bhd,bhdv->bhv", q[:, :, t], state))
        state = state * torch.sigmoid(g[:, :, t])[..., None]
    return torch.stack(out, 2)


@spelled("GLA, step by step", *QKV, normal(B, H, T, D, seed=4), specs=({"operands": ("q", "k", "gate"), "decay": "key"},))
def _(q, k, v, g):
    g, q = F.logsigmoid(g) / 16, q * D**-0.5
    o, h = torch.zeros_like(v), torch.zeros(B, H, D, V)
    for i in range(T):
        h = h * g[:, :, i].exp()[..., None] + k[:, :, i][..., None] * v[:, :, i][..., None, :]
        o[:, :, i] = (q[:, :, i][..., None] * h).sum(-2)
    return o, h


@spelled("GLA, associative scan", *QKV, normal(B, H, T, D, seed=4), specs=({"operands": ("q", "k", "gate"), "decay": "key"},))
def _(q, k, v, g):
    decay = torch.sigmoid(g)[..., None].expand(B, H, T, D, V)
    _, states = associative_scan(combine, (decay, k[..., None] * v[..., None, :]), dim=2, combine_mode="generic")
    return torch.einsum("bhtd,bhtdv->bhtv", q, states)


def segment_sums(x):
    n = x.size(-1)
    total = x.cumsum(-1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)


def segment_sums_that_are_stable(x):
    n = x.size(-1)
    spread = x[..., None].expand(*x.shape, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(-1), 0)
    return spread.cumsum(-2).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)


def duality(x, a, b, c, segments, size=4):
    """The listing of Mamba-2's paper."""
    x, a, b, c = (y.reshape(y.shape[0], -1, size, *y.shape[2:]) for y in (x, a, b, c))
    a = a.permute(0, 3, 1, 2)
    total = a.cumsum(-1)
    diagonal = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, torch.exp(segments(a)), x)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", b, torch.exp(total[..., -1:] - total), x)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = torch.exp(segments(F.pad(total[..., -1], (1, 0))))
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)
    past = torch.einsum("bclhn,bchpn,bhcl->bclhp", c, states[:, :-1], torch.exp(total))
    return (diagonal + past).reshape(B, -1, *x.shape[3:]), states[:, -1]


@spelled("Mamba-2's listing", *SSD, specs=(GATED,))
def _(x, dt, b, c):
    dt = F.softplus(dt)
    return duality(x * dt[..., None], -dt, b, c, segment_sums_that_are_stable)


@spelled("Mamba-2's listing, differences of sums", *SSD, specs=(GATED,))
def _(x, dt, b, c):
    dt = F.softplus(dt)
    return duality(x * dt[..., None], -dt, b, c, segment_sums)[0]


@spelled("Mamba-2 as one einsum of four", *SSD, specs=(GATED,))
def _(x, dt, b, c):
    dt = F.softplus(dt)
    decay = torch.exp(segment_sums_that_are_stable(-dt.permute(0, 2, 1)))
    return torch.einsum("bihn,bjhn,bhij,bjhp->bihp", c, b, decay, x * dt[..., None])


@spelled("Mamba, a loop over einsums", *MAMBA, specs=({"operands": ("q", "k", "gate", "rate"), "decay": "full"},))
def _(u, dt, a, b, c):
    dt, a = F.softplus(dt), -torch.exp(a)
    decay, written = torch.exp(torch.einsum("bld,dn->bldn", dt, a)), torch.einsum("bld,bln,bld->bldn", dt, b, u)
    x, ys = torch.zeros(B, V, D), []
    for i in range(T):
        x = decay[:, i] * x + written[:, i]
        ys.append(torch.einsum("bdn,bn->bd", x, c[:, i]))
    return torch.stack(ys, 1)


@spelled("Mamba, associative scan", *MAMBA, specs=({"operands": ("q", "k", "gate", "rate"), "decay": "full"},))
def _(u, dt, a, b, c):
    dt = F.softplus(dt)
    scanned = torch.exp(dt[..., None] * -torch.exp(a)), (dt * u)[..., None] * b[:, :, None]
    _, states = associative_scan(combine, scanned, dim=1, combine_mode="generic")
    return (states @ c[..., None]).squeeze(-1)


@spelled("HGRN with a lower bound", *(normal(B, T, V, seed=n) for n in range(3)), normal(V, seed=7), specs=(ROWS,))
def _(i, f, o, bound):
    bound = bound.softmax(0)
    f = bound + (1 - bound) * f.sigmoid()
    x, h, out = F.silu(i) * (1 - f), torch.zeros(B, V), []
    for t in range(T):
        h = f[:, t] * h + x[:, t]
        out.append(h)
    return torch.stack(out, 1) * o.sigmoid()


def log_g(x):
    return torch.where(x >= 0, (F.relu(x) + 0.5).log(), -F.softplus(-x))


@spelled("minGRU in log space", normal(B, T, 2 * V), specs=(ROWS,))
def _(x):
    hidden, gate = x.chunk(2, dim=-1)
    total = (-F.softplus(gate)).cumsum(dim=1)
    values = -F.softplus(-gate) + log_g(hidden)
    return (total + (values - total).logcumsumexp(dim=1)).exp()


@spelled("minGRU in log space, from a state", normal(B, T, V), normal(B, T, V, seed=1), normal(B, 1, V, seed=2),
         specs=({**ROWS, "operands": ("gate", "initial")},))  # fmt: skip
def _(k, h, h0):
    values = torch.cat([log_g(h0), -F.softplus(-k) + log_g(h)], dim=1)
    total = F.pad(torch.cumsum(-F.softplus(k), dim=1), (0, 0, 1, 0))
    return torch.exp(total + torch.logcumsumexp(values - total, dim=1))[:, 1:]


@spelled("RWKV-4", *(normal(B, T, V, seed=n) for n in range(2)), *(normal(V, seed=n) for n in (2, 3)), specs=(ROWS, ROWS))
def _(k, v, w, u):
    w = -torch.exp(w)
    a, b, top, out = torch.zeros(B, V), torch.zeros(B, V), torch.full((B, V), -1e38), []
    for t in range(T):
        first = u + k[:, t]
        high = torch.maximum(top, first)
        x, y = torch.exp(top - high), torch.exp(first - high)
        out.append((x * a + y * v[:, t]) / (x * b + y))
        high = torch.maximum(top + w, k[:, t])
        x, y = torch.exp(top + w - high), torch.exp(k[:, t] - high)
        a, b, top = x * a + y * v[:, t], x * b + y, high
    return torch.stack(out, 1)


@spelled("RWKV-6 with heads third", *(normal(B, T, H, n, seed=n) for n in (D, D, V, D)), normal(H, D, seed=9),
         specs=({"operands": ("q", "k", "gate", "bonus"), "decay": "key", "read": "before"},))  # fmt: skip
def _(r, k, v, w, u):
    state, out = torch.zeros(B, H, D, V), torch.zeros(B, T, H, V)
    for t in range(T):
        kv = k[:, t].reshape(B, H, D, 1) @ v[:, t].reshape(B, H, 1, V)
        out[:, t] = (r[:, t].reshape(B, H, 1, D) @ (u[None, :, :, None] * kv + state)).squeeze(2)
        state = kv + torch.exp(-torch.exp(w[:, t])).unsqueeze(-1) * state
    return out


@spelled("mLSTM, step by step", *QKV, normal(B, H, T, seed=4), normal(B, H, T, seed=6), specs=({**GATED, "normaliser": True},))
def _(q, k, v, i, f):
    state, total, top, out = torch.zeros(B, H, D, V), torch.zeros(B, H, D), torch.zeros(B, H, 1), []
    k, f = k / math.sqrt(D), F.logsigmoid(f)
    for t in range(T):
        new = torch.maximum(f[:, :, t, None] + top, i[:, :, t, None])
        keep, put = torch.exp(f[:, :, t, None] + top - new), torch.exp(i[:, :, t, None] - new)
        state = keep[..., None] * state + put[..., None] * (k[:, :, t, :, None] @ v[:, :, t, None, :])
        total = keep * total + put * k[:, :, t]
        below = torch.maximum((q[:, :, t, None, :] @ total[..., None]).squeeze(-1).abs(), torch.exp(-new)) + 1e-6
        out.append((q[:, :, t, None, :] @ state).squeeze(-2) / below)
        top = new
    return torch.stack(out, 2)


@pytest.mark.parametrize("name", FORMS)
def test_spelling(name: str) -> None:
    f, makers, specs = FORMS[name]
    compiled = assert_within_contract(f, *(make() for make in makers))
    assert_all_rewritten(compiled, "recurrence")
    found = compiled.decisions("recurrence")
    assert len(found) == len(specs)
    for decision, wanted in zip(found, specs, strict=True):
        assert {name: decision.spec[name] for name in wanted} == wanted


def test_complex_states_are_refused_with_their_reason() -> None:
    def f(x, nu, theta):
        decay = torch.exp(torch.complex(-torch.exp(nu), torch.exp(theta)))
        _, h = associative_scan(combine, (decay.expand(B, T, V), x.to(torch.complex64)), dim=1, combine_mode="generic")
        return h.real

    args = (make().detach() for make in (normal(B, T, V), normal(V, seed=1), normal(V, seed=2)))
    assert_refused(f, *args, why="complex numbers", family="recurrence")


def test_a_loop_of_which_one_state_stays_is_given_back() -> None:
    """Both states go on behind the last step that is rolled up."""

    def f(q, k, v, g):
        q, k, g = q.exp(), k.exp(), g.sigmoid()
        state, total, out = 0, 0, []
        for t in range(T):
            state = g[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
            total = g[:, :, t, None] * total + k[:, :, t]
            read = torch.einsum("bhd,bhdv->bhv", q[:, :, t], state)
            out.append(read / (q[:, :, t] * total).sum(-1, keepdim=True))
        return torch.stack(out, 2)

    assert_within_contract(f, *(make() for make in QKV), normal(B, H, T, seed=4)())


def test_a_small_number_beside_the_decay_is_refused() -> None:
    def f(u, dt, a, b, c):
        dt, a = F.softplus(dt), -torch.exp(a)
        decay = torch.einsum("bld,dn->bldn", dt, a)
        total = F.pad(decay[:, 1:], (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).exp().flip(1)
        x = (torch.einsum("bld,bld,bln->bldn", dt, u, b) * total).cumsum(1) / (total + 1e-12)
        return torch.einsum("bldn,bln->bld", x, c)

    args = (make().detach() for make in MAMBA)
    assert_refused(f, *args, why="is the decay from each step of a weighted cumulative sum", family="recurrence")
