"""Parallel spellings of linear recurrences are recognised by what they mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from effcompile.passes.parallel import PARALLEL

from .recurrence_harness import Rewritten, assert_no_recurrence, assert_nothing_begun, assert_recurrence

B, H, T, D, V = 2, 4, 24, 8, 6
RULES = (PARALLEL,)
Forms = dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]
FORMS: Forms = {}
REFUSED: Forms = {}


def normal(*shape: int, seed: int = 0, grad: bool = True) -> torch.Tensor:
    """Standard normal under a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def q() -> torch.Tensor:
    return normal(B, H, T, D, seed=1)


def k() -> torch.Tensor:
    return normal(B, H, T, D, seed=2)


def v() -> torch.Tensor:
    return normal(B, H, T, V, seed=3)


def g(*shape: int) -> torch.Tensor:
    return normal(*(shape or (B, H, T)), seed=4)


def spelled(name: str, *args: Any, **fields: Any) -> Any:
    """Registers a spelling, its arguments made by functions, and the fields of the specification that it means."""

    def register(f: Any) -> Any:
        FORMS[name] = f, args, fields
        return f

    return register


def refused(name: str, *args: Any, **why: Any) -> Any:
    def register(f: Any) -> Any:
        REFUSED[name] = f, args, why
        return f

    return register


PLAIN = {"operands": ("q", "k"), "decay": "none", "read": "after", "normaliser": False}
GATED = {**PLAIN, "operands": ("q", "k", "gate"), "decay": "head"}
PER_KEY = {**GATED, "decay": "key"}


def lower_triangle(diagonal: int = 0) -> torch.Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril(diagonal)


# -------------------------------------------------------------------- without a decay


@spelled("tril of the scores", q, k, v, **PLAIN)
def _(q, k, v):
    return (q @ k.mT).tril() @ v


@spelled("times a triangle of ones", q, k, v, **PLAIN)
def _(q, k, v):
    return (q @ k.mT * torch.ones(T, T).tril()) @ v


@spelled("masked_fill with zero", q, k, v, **PLAIN)
def _(q, k, v):
    return torch.matmul((q @ k.transpose(-1, -2)).masked_fill(~lower_triangle(), 0.0), v)


@spelled("where over positions", q, k, v, **PLAIN)
def _(q, k, v):
    i = torch.arange(T)
    return torch.einsum("bhij,bhjd->bhid", torch.where(i[:, None] < i, 0.0, torch.einsum("bhid,bhjd->bhij", q, k)), v)


@spelled("einsum, heads third", lambda: q().transpose(1, 2), lambda: k().transpose(1, 2), lambda: v().transpose(1, 2), **PLAIN)
def _(q, k, v):
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
    return torch.einsum("bhij,bjhd->bihd", scores.tril(), v)


@spelled("einsum of a whole model", lambda: normal(B, T, 16), lambda: normal(48, 16, seed=5), **PLAIN)
def _(x, w):
    q, k, v = (part.view(B, T, H, 4).transpose(1, 2) for part in F.linear(x, w).chunk(3, dim=-1))
    return ((q @ k.mT).tril() @ v).transpose(1, 2).reshape(B, T, 16)


@spelled("elu + 1 features, scaled", q, k, v, **PLAIN)
def _(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q * D**-0.5 @ k.mT).tril() @ v


@spelled("softmax features (Hedgehog)", q, k, v, **PLAIN)
def _(q, k, v):
    q, k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1) for x in (q, k))
    return (q @ k.mT).tril() @ v


@spelled("three dimensions", lambda: normal(B, T, D), lambda: normal(B, T, D, seed=2), lambda: normal(B, T, V, seed=3), **PLAIN)
def _(q, k, v):
    return torch.bmm(torch.bmm(q, k.mT).tril(), v)


@spelled("two dimensions", lambda: normal(T, D), lambda: normal(T, D, seed=2), lambda: normal(T, V, seed=3), **PLAIN)
def _(q, k, v):
    return (q @ k.mT).tril() @ v


@spelled("exclusive", q, k, v, **{**PLAIN, "read": "before"})
def _(q, k, v):
    return (q @ k.mT).tril(-1) @ v


@spelled("grouped queries", q, lambda: normal(B, 2, T, D, seed=2), lambda: normal(B, 2, T, V, seed=3), **PLAIN)
def _(q, k, v):
    k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(B, H, T, -1) for x in (k, v))
    return (q @ k.mT).tril() @ v


@spelled("queries and keys of a group (Mamba-2)", lambda: normal(B, T, 2, D), lambda: normal(B, T, 2, D, seed=2), v, g, **GATED)
def _(q, k, v, g):
    q, k = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (q, k))
    total = F.logsigmoid(g).cumsum(-1)
    decay = (total[..., None] - total[..., None, :]).masked_fill(~lower_triangle(), -torch.inf).exp()
    return (q @ k.mT * decay) @ v


# -------------------------------------------------------------------- one decay a head


def retention(q, k, v, gamma):
    i = torch.arange(T)
    decay = torch.where(i[:, None] >= i, gamma[:, None, None] ** (i[:, None] - i), 0.0)
    return (q @ k.mT * decay) @ v


@spelled("retention, gammas from positions of heads", q, k, v, **GATED)
def _(q, k, v):
    return retention(q, k, v, 1 - 2.0 ** (-5 - torch.arange(H)))


@spelled("retention, one constant", q, k, v, **GATED)
def _(q, k, v):
    i = torch.arange(T)
    return (q @ k.mT * (0.9 ** (i[:, None] - i)).tril()) @ v


@spelled("retention, learned gammas", q, k, v, lambda: normal(H), **GATED)
def _(q, k, v, x):
    return retention(q, k, v, torch.sigmoid(x))


@spelled("retention, logarithms from an input", q, k, v, lambda: normal(H), **GATED)
def _(q, k, v, x):
    i = torch.arange(T)
    distance = (i[:, None] - i).clamp(min=0)
    return (q @ k.mT * (-F.softplus(x)[:, None, None] * distance).exp() * lower_triangle()) @ v


@spelled("retention, ALiBi-like slopes on absolute distances", q, k, v, lambda: normal(H), **GATED)
def _(q, k, v, x):
    i = torch.arange(T)
    slopes = x.exp().view(H, 1, 1)
    return (q @ k.mT * torch.exp(-slopes * (i[:, None] - i).abs()) * lower_triangle()) @ v


def divided_differences(g, mask=lower_triangle):
    total = g.cumsum(-1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(~mask(), -torch.inf).exp()


@spelled("masked before exp", q, k, v, g, **GATED)
def _(q, k, v, g):
    return (q @ k.mT * divided_differences(F.logsigmoid(g))) @ v


@spelled("masked after exp", q, k, v, g, **GATED)
def _(q, k, v, g):
    total = F.logsigmoid(g).cumsum(-1)
    return (q @ k.mT * (total.unsqueeze(-1) - total.unsqueeze(-2)).exp()).tril() @ v


@spelled("masked by the lowest number", q, k, v, g, **GATED)
def _(q, k, v, g):
    total = F.logsigmoid(g).cumsum(-1)
    bias = torch.where(lower_triangle(), 0.0, torch.finfo(torch.float32).min)
    return (q @ k.mT * (total.unsqueeze(-1) - total.unsqueeze(-2) + bias).exp()) @ v


@spelled("masked by a large number", q, k, v, g, **GATED)
def _(q, k, v, g):
    total = F.logsigmoid(g).cumsum(-1)
    return (q @ k.mT * (total.unsqueeze(-1) - total.unsqueeze(-2) - 1e9 * (~lower_triangle()).float()).exp()) @ v


@spelled("a product of two exponentials", q, k, v, g, **GATED)
def _(q, k, v, g):
    total = F.logsigmoid(g).cumsum(-1)
    return torch.einsum("bhij,bhjd->bhid", (q @ k.mT).tril() * total.exp()[..., None] * (-total).exp()[..., None, :], v)


@spelled("cumulative products", q, k, v, g, **GATED)
def _(q, k, v, g):
    total = torch.sigmoid(g).cumprod(-1)
    return ((q @ k.mT) * (total[..., None] / total[..., None, :])).tril() @ v


@spelled("segment sums", q, k, v, g, **GATED)
def _(q, k, v, g):
    spread = F.logsigmoid(g)[..., None].expand(B, H, T, T).masked_fill(~lower_triangle(-1), 0)
    decay = spread.cumsum(-2).masked_fill(~lower_triangle(), -torch.inf).exp()
    return (q @ k.mT * decay) @ v


@spelled("state-space duality: dt and A, B and C of one group", lambda: normal(B, T, D), lambda: normal(B, T, D, seed=2),
         lambda: normal(B, T, H, V, seed=3), lambda: normal(B, T, H, seed=4), lambda: normal(H, seed=5), **GATED)  # fmt: skip
def _(c, b, x, dt, a):
    dt = F.softplus(dt)
    total = (dt * -a.exp()).cumsum(1)
    decay = torch.exp((total[:, :, None] - total[:, None]).masked_fill(~lower_triangle()[..., None], -torch.inf))
    weights = torch.einsum("bin,bjn->bij", c, b)[..., None] * decay * dt[:, None]
    return torch.einsum("bijh,bjhp->bihp", weights, x)


@spelled("input gates (mLSTM without a maximum)", q, k, v, g, lambda: normal(B, H, T, seed=6), **GATED)
def _(q, k, v, f, i):
    total = F.logsigmoid(f).cumsum(-1)
    logs = (total[..., None] - total[..., None, :] + i[..., None, :]).masked_fill(~lower_triangle(), -torch.inf)
    return (q @ k.mT * D**-0.5 * logs.exp()) @ v


@spelled("exclusive, decays between", q, k, v, g, **{**GATED, "read": "before"})
def _(q, k, v, g):
    g = F.logsigmoid(g)
    total = g.cumsum(-1)
    decay = ((total - g)[..., None] - total[..., None, :]).exp()
    return (q @ k.mT * decay).tril(-1) @ v


@spelled("exclusive, the row's own decay too", q, k, v, g, **{**GATED, "read": "before"})
def _(q, k, v, g):
    return (q @ k.mT * divided_differences(F.logsigmoid(g), lambda: lower_triangle(-1))) @ v


@spelled("a diagonal beside it", q, k, v, g, lambda: normal(H, 1, D), **{**GATED, "read": "before"})
def _(q, k, v, g, u):
    past = (q @ k.mT * divided_differences(F.logsigmoid(g), lambda: lower_triangle(-1))) @ v
    return past + (q * u * k).sum(-1, keepdim=True) * v


# -------------------------------------------------------------------- one decay a key channel


@spelled("gated linear attention", q, k, v, lambda: g(B, H, T, D), **PER_KEY)
def _(q, k, v, g):
    total = F.logsigmoid(g).cumsum(2)
    return ((q * total.exp()) @ (k * (-total).exp()).mT).tril() @ v


@spelled("gated linear attention, divided, scaled", q, k, v, lambda: g(B, H, T, D), **PER_KEY)
def _(q, k, v, g):
    total = F.logsigmoid(g).cumsum(2).exp()
    return torch.einsum("bhid,bhjd->bhij", q * total * D**-0.5, k / total).tril() @ v


@spelled("gated linear attention, exclusive", q, k, v, lambda: g(B, H, T, D), **{**PER_KEY, "read": "before"})
def _(q, k, v, g):
    g = F.logsigmoid(g)
    total = g.cumsum(2)
    return ((q * (total - g).exp()) @ (k * (-total).exp()).mT).tril(-1) @ v


# -------------------------------------------------------------------- normalised


@spelled("divided by the sum of the row", q, k, v, **{**PLAIN, "normaliser": True})
def _(q, k, v):
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelled("the output divided", q, k, v, **{**PLAIN, "normaliser": True})
def _(q, k, v):
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    return weights @ v / (weights.sum(-1)[..., None] + 1e-6)


@spelled("retention, normalised without a gradient", q, k, v, **{**GATED, "normaliser": True})
def _(q, k, v):
    i = torch.arange(T)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H))
    decay = torch.where(i[:, None] >= i, gamma[:, None, None] ** (i[:, None] - i), 0.0)
    decay = decay / decay.sum(-1, keepdim=True).sqrt()
    weights = q @ k.mT * decay
    return (weights / weights.detach().sum(-1, keepdim=True).abs().clamp(min=1)) @ v


@spelled("mLSTM without a maximum", q, k, v, g, lambda: normal(B, H, T, seed=6), **{**GATED, "normaliser": True})
def _(q, k, v, f, i):
    total = F.logsigmoid(f).cumsum(-1)
    logs = (total[..., None] - total[..., None, :] + i[..., None, :]).masked_fill(~lower_triangle(), -torch.inf)
    weights = q @ (k * D**-0.5).mT * logs.exp()
    weights = weights / weights.sum(-1, keepdim=True).abs().clamp(min=1.0)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


@spelled("divided, heads third", lambda: q().transpose(1, 2), lambda: k().transpose(1, 2), lambda: v().transpose(1, 2),
         **{**PLAIN, "normaliser": True})  # fmt: skip
def _(q, k, v):
    weights = torch.einsum("bihd,bjhd->bhij", q.exp(), k.exp()).tril()
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)


@spelled("sums that begin one later for the keys", q, k, v, g, **GATED)
def _(q, k, v, g):
    g = F.logsigmoid(g)
    total = g.cumsum(-1)
    return (q @ k.mT * (total[..., None] - (total - g)[..., None, :]).masked_fill(~lower_triangle(), -torch.inf).exp()) @ v


@spelled("sums shifted by a concatenation", q, k, v, g, **{**GATED, "read": "before"})
def _(q, k, v, g):
    total = F.logsigmoid(g).cumsum(-1)
    before = torch.cat([torch.zeros(B, H, 1), total[..., :-1]], dim=-1)
    return (q @ k.mT * (before[..., None] - total[..., None, :]).masked_fill(~lower_triangle(-1), -torch.inf).exp()) @ v


# -------------------------------------------------------------------- a maximum taken off the exponents of each row

STABLE = {**GATED, "normaliser": True}


def large() -> torch.Tensor:
    """Input gates whose exponentials leave the range of float32."""
    return (100 + normal(B, H, T, seed=6)).detach().requires_grad_()


def mlstm(q, k, v, f, i, maximum):
    """The weights are divided as xLSTM's are; `maximum` takes the rows' from their exponents."""
    logs = exponents(f, i)
    top = maximum(logs)
    weights = q @ (k * D**-0.5).mT * (logs - top).exp()
    return (weights / torch.maximum(weights.sum(-1, keepdim=True).abs(), (-top).exp())) @ v


@spelled("mLSTM, amax", q, k, v, g, large, **STABLE)
def _(q, k, v, f, i):
    return mlstm(q, k, v, f, i, lambda logs: logs.amax(-1, keepdim=True))


@spelled("mLSTM, max", q, k, v, g, large, **STABLE)
def _(q, k, v, f, i):
    return mlstm(q, k, v, f, i, lambda logs: logs.max(dim=-1, keepdim=True).values)


@spelled("mLSTM, maximum without a gradient", q, k, v, g, lambda: normal(B, H, T, seed=6), **STABLE)
def _(q, k, v, f, i):
    return mlstm(q, k, v, f, i, lambda logs: logs.amax(-1, keepdim=True).detach())


@spelled("mLSTM, the authors' own", q, k, v, g, large, **STABLE)
def _(q, k, v, f, i):
    sums = torch.cat([torch.zeros(B, H, 1, 1), F.logsigmoid(f)[..., None].cumsum(-2)], dim=-2).expand(-1, -1, -1, T + 1)
    differences = (sums - sums.mT)[:, :, 1:, 1:]
    logs = torch.where(lower_triangle(), differences, -torch.inf) + i[:, :, None, :]
    top, _ = logs.max(dim=-1, keepdim=True)
    weights = (q @ (k / D**0.5).mT) * torch.exp(logs - top)
    total = torch.maximum(weights.sum(-1, keepdim=True).abs(), torch.exp(-top))
    return (weights / (total + 1e-6)) @ v


@spelled("mLSTM, time second, batch and heads apart", lambda: q().transpose(1, 2), lambda: k().transpose(1, 2),
         lambda: v().transpose(1, 2), lambda: g().transpose(1, 2), lambda: large().transpose(1, 2), **STABLE)  # fmt: skip
def _(q, k, v, f, i):
    total = F.logsigmoid(f).cumsum(1)
    differences = total[:, :, None] - total[:, None] + i[:, None]
    logs = torch.where(lower_triangle()[..., None], differences, -torch.inf)
    top = logs.amax(2)
    weights = torch.einsum("bihd,bjhd->bijh", q, k) * (logs - top[:, :, None]).exp()
    total = torch.maximum(weights.sum(2).abs(), torch.exp(-top))
    return torch.einsum("bijh,bjhv->bihv", weights, v) / total[..., None]


@spelled("gates that heads share", q, k, v, lambda: g(B, 1, T), lambda: 3 * normal(B, 1, T, seed=6), **STABLE)
def _(q, k, v, f, i):
    return mlstm(q, k, v, f, i, lambda logs: logs.amax(-1, keepdim=True))


@spelled("a constant decay, the numerator alone", q, k, v, large, **GATED)
def _(q, k, v, i):
    t = torch.arange(T)
    logs = (-0.1 * (t[:, None] - t) + i[..., None, :]).masked_fill(~lower_triangle(), -torch.inf)
    return (q @ k.mT * (logs - logs.amax(-1, keepdim=True)).exp()) @ v


@pytest.mark.parametrize("name", FORMS)
def test_spelling_is_rewritten(name: str) -> None:
    f, args, fields = FORMS[name]
    assert_recurrence(f, *(make() for make in args), rules=RULES, **fields)


@pytest.mark.parametrize("name", ["mLSTM, amax", "a constant decay, the numerator alone"])
def test_maxima_of_rows_need_no_matrix(name: str) -> None:
    f, makers, _ = FORMS[name]
    compiled = Rewritten(f, RULES)
    result = compiled(*(make().detach() for make in makers))
    assert result.isfinite().all()
    shapes = [tuple(n.meta["val"].shape) for n in compiled.graphs[0].graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert compiled.matches and all(shape.count(T) < 2 for shape in shapes)


# -------------------------------------------------------------------- none, or not to be taken


def gated_scores(q, k, g):
    return q @ k.mT * divided_differences(F.logsigmoid(g))


@refused("later positions", q, k, v, g, why="later positions take part", step="mask")
def _(q, k, v, g):
    i = torch.arange(T)
    return (q @ k.mT * 0.9 ** (i[:, None] - i).abs()) @ v


@refused("a window", q, k, v, why="not known to be causal", step="mask")
def _(q, k, v):
    return (q @ k.mT).tril().triu(-8) @ v


@refused("a mask that is an input", q, k, v, lower_triangle, why="not known to be causal", step="mask")
def _(q, k, v, mask):
    return (q @ k.mT).masked_fill(~mask, 0.0) @ v


@refused("a decay of the squared distance", q, k, v, why="not a ratio", step="decay")
def _(q, k, v):
    i = torch.arange(T)
    return (q @ k.mT * 0.9 ** ((i[:, None] - i) ** 2)).tril() @ v


@refused("a decay that is an input", q, k, v, lambda: normal(T, T), why="no decay from one position to the other", step="decay")
def _(q, k, v, decay):
    return (q @ k.mT * decay).tril() @ v


@refused("two sums", q, k, v, g, lambda: normal(B, H, T, seed=6), why="not a ratio", step="decay")
def _(q, k, v, g, f):
    difference = F.logsigmoid(g).cumsum(-1)[..., None] - F.logsigmoid(f).cumsum(-1)[..., None, :]
    return (q @ k.mT * difference.exp()).tril() @ v


@refused("twice the sum on one side", q, k, v, g, why="not a ratio", step="decay")
def _(q, k, v, g):
    total = F.logsigmoid(g).cumsum(-1)
    return (q @ k.mT * (2 * total[..., None] - total[..., None, :]).exp()).tril() @ v


@refused("halved on the diagonal", q, k, v, g, why="weight for itself", step="mask")
def _(q, k, v, g):
    return (gated_scores(q, k, g) * (1 - 0.5 * torch.eye(T))) @ v


@refused("squared scores", q, k, v, why="no multiple of the scores", step="scores")
def _(q, k, v):
    return (q @ k.mT).square().tril() @ v


@refused("rectified scores", q, k, v, g, why="no multiple of the scores", step="scores")
def _(q, k, v, g):
    return (torch.relu(q @ k.mT) * divided_differences(F.logsigmoid(g))) @ v


@refused("weights that are returned", q, k, v, g, why="weights are also used", step="uses")
def _(q, k, v, g):
    weights = gated_scores(q, k, g)
    return weights @ v, weights


@refused("scores that are returned", q, k, v, g, why="scores are also used", step="uses")
def _(q, k, v, g):
    scores = q @ k.mT
    return (scores * divided_differences(F.logsigmoid(g))) @ v, scores


def exponents(f, i):
    """Logarithms of an mLSTM's weights."""
    total = F.logsigmoid(f).cumsum(-1)
    return (total[..., None] - total[..., None, :] + i[..., None, :]).masked_fill(~lower_triangle(), -torch.inf)


@refused("a maximum of other exponents", q, k, v, g, lambda: normal(B, H, T, seed=6), why="of other exponents", step="rows")
def _(q, k, v, f, i):
    logs = exponents(f, i)
    return (q @ k.mT * (logs - (0.5 * logs).amax(-1, keepdim=True)).exp()) @ v


@refused("a maximum with another decay", q, k, v, g, lambda: normal(B, H, T, seed=6), why="of other exponents", step="rows")
def _(q, k, v, f, i):
    return (q @ k.mT * (exponents(f, i) - exponents(i, f).amax(-1, keepdim=True)).exp()) @ v


@refused("twice the maximum", q, k, v, g, lambda: normal(B, H, T, seed=6), why="over both positions", step="rows")
def _(q, k, v, f, i):
    logs = exponents(f, i)
    return (q @ k.mT * (logs - 2 * logs.amax(-1, keepdim=True)).exp()) @ v


@refused("a maximum of all rows", q, k, v, g, lambda: normal(B, H, T, seed=6), why="over both positions", step="rows")
def _(q, k, v, f, i):
    logs = exponents(f, i)
    return (q @ k.mT * (logs - logs.amax((-1, -2), keepdim=True)).exp()) @ v


@refused("a maximum with scores", q, k, v, g, lambda: normal(B, H, T, seed=6), why="no multiple of the scores", step="scores")
def _(q, k, v, f, i):
    logs, scores = exponents(f, i), q @ k.mT
    return (scores * (logs - (scores + logs).amax(-1, keepdim=True)).exp()) @ v


@refused("a learned decay of unknown sign", q, k, v, lambda: normal(H), why="not known to be positive", step="decay")
def _(q, k, v, gamma):
    return retention(q, k, v, gamma)


@refused("products of unknown sign", q, k, v, g, why="not known to be positive", step="decay")
def _(q, k, v, g):
    total = g.cumprod(-1)
    return (q @ k.mT * (total[..., None] / total[..., None, :])).tril() @ v


@refused("float64", lambda: q().double(), lambda: k().double(), lambda: v().double(), why="float64 has no kernel", step="dtype")
def _(q, k, v):
    return (q @ k.mT).tril() @ v


@pytest.mark.parametrize("name", REFUSED)
def test_near_miss_is_refused(name: str) -> None:
    f, args, why = REFUSED[name]
    assert_no_recurrence(f, *(make() for make in args), rules=RULES, **why)


def test_gradient_cut_inside() -> None:
    def f(q, k, v, g):
        total = F.logsigmoid(g).cumsum(-1)
        return (q @ k.mT * (total[..., None] - total.detach()[..., None, :]).exp()).tril() @ v

    args = q(), k(), v(), g()
    assert_no_recurrence(f, *args, rules=RULES, why="gradient is cut", step="gradient", grad=True)
    with torch.no_grad():
        assert_recurrence(f, *args, rules=RULES, grad=False, **GATED)


def test_strict_keeps_roundings() -> None:
    args = (x().detach().bfloat16() for x in (q, k, v))
    assert_no_recurrence(lambda q, k, v: (q @ k.mT).tril() @ v, *args, rules=RULES, why="keeps the rounding", strict=True)


def test_modes_between() -> None:
    def f(q, k, v):
        with torch.no_grad():
            scores = q @ k.mT
        return scores.tril() @ v

    assert_nothing_begun(f, q(), k(), v(), rules=RULES)


@pytest.mark.parametrize(
    "f",
    [
        pytest.param(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, id="softmax"),
        pytest.param(lambda q, k, v: (q @ k.mT).masked_fill(~lower_triangle(), -torch.inf).softmax(-1) @ v, id="causal-softmax"),
        pytest.param(lambda q, k, v: (q @ k.mT) @ v, id="product-of-three"),
        pytest.param(lambda q, k, v: q @ (k.mT @ v), id="other-order"),
        pytest.param(lambda q, k, v: torch.ones(T, T).tril() @ v, id="a-triangle"),
    ],
)
def test_something_else(f: Any) -> None:
    assert_nothing_begun(f, q(), k(), v(), rules=RULES)


# -------------------------------------------------------------------- dtypes, sizes, what overflows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["masked before exp", "grouped queries", "segment sums", "divided by the sum of the row"])
def test_narrow_dtypes(name: str, dtype: torch.dtype) -> None:
    f, makers, fields = FORMS[name]
    args = [(0.3 * make()).detach().to(dtype).requires_grad_() for make in makers]
    assert_recurrence(f, *args, rules=RULES, **fields)


def test_autocast() -> None:
    f, makers, fields = FORMS["masked before exp"]

    def cast(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return f(*args)

    assert_recurrence(cast, *(make() for make in makers), rules=RULES, **fields)


@pytest.mark.parametrize("batch", [2, 3])
def test_symbolic_sizes(batch: int) -> None:
    def f(q, k, v, g):
        t = q.shape[2]
        total = F.logsigmoid(g).cumsum(-1)
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        return (q @ k.mT * (total[..., None] - total[..., None, :]).masked_fill(~mask, -torch.inf).exp()) @ v

    args = [normal(batch, H, 10 * batch, *rest, seed=n) for n, rest in enumerate([(D,), (D,), (V,), ()])]
    for x in args:
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 2)
    compiled = assert_recurrence(f, *args, rules=RULES, **GATED)
    assert any(isinstance(n, torch.SymInt) for n in compiled.matches[0].output.meta["val"].shape)


def test_decays_that_overflow_in_parallel() -> None:
    """exp(-cumsum(g)) leaves the range of float32; the recurrence does not, and agrees with float64."""
    f, makers, _ = FORMS["gated linear attention"]
    args = [x.detach() for x in (q(), k(), v(), 4 - 16 * g(B, H, T, D).abs())]
    compiled = Rewritten(f, RULES)
    mine = compiled(*args)
    assert compiled.matches and not f(*args).isfinite().all()
    total = F.logsigmoid(args[3].double()).cumsum(2)
    differences = (total[:, :, :, None] - total[:, :, None]).masked_fill(~lower_triangle()[..., None], -torch.inf).exp()
    exact = torch.einsum("bhid,bhjd,bhijd,bhjv->bhiv", args[0].double(), args[1].double(), differences, args[2].double())
    torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


def test_two_in_one_graph() -> None:
    def f(q, k, v, g):
        first = gated_scores(q, k, g) @ v
        return (q @ k.mT).tril() @ first

    assert_recurrence(f, q(), k(), v(), g(), rules=RULES, count=2)


def test_half_of_a_layer() -> None:
    """Queries, keys and values as slices of one projection, the output folded into the model's width."""

    def f(x, into, gate, out):
        q, k, v = F.linear(x, into).view(B, T, 3, H, 8).permute(2, 0, 3, 1, 4)
        total = -F.softplus(F.linear(x, gate)).transpose(1, 2).cumsum(-1)
        y = (q @ k.mT * (total[..., None] - total[..., None, :]).exp()).tril() @ v
        return F.linear(y.transpose(1, 2).flatten(2), out)

    weights = (0.2 * normal(n, 32, seed=n).detach() for n in (96, H, 32))
    assert_recurrence(f, normal(B, T, 32), *(w.requires_grad_() for w in weights), rules=RULES, **GATED)
