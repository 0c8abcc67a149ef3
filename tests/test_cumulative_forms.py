"""Linear attention as a cumulative sum of products of keys and values: one recurrence, whose states are kept for no step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from .vocabulary import Compiled, assert_all_rewritten, assert_refused, assert_within_contract

B, H, T, D, V = 2, 3, 12, 4, 5
Forms = dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]]
FORMS: Forms = {}
PLAIN = {"operands": ("q", "k"), "decay": "none", "read": "after", "normaliser": False}
GATED = {**PLAIN, "operands": ("q", "k", "gate"), "decay": "head"}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def arguments(*further: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values [B, H, T, .], and one tensor more of a given shape."""
    more = (normal(*further, seed=4),) if further else ()
    return normal(B, H, T, D, seed=1), normal(B, H, T, D, seed=2), normal(B, H, T, V, seed=3), *more


def spelled(name: str, *further: int, **fields: Any) -> Any:
    def register(f: Any) -> Any:
        FORMS[name] = f, further, fields
        return f

    return register


def outer(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return k[..., :, None] * v[..., None, :]


def read(q: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bhtd,bhtdv->bhtv", q, states)


@spelled("broadcast product, einsum", **PLAIN)
def _(q, k, v):
    return read(q, torch.cumsum(outer(k, v), dim=2))


@spelled("outer einsum", **PLAIN)
def _(q, k, v):
    return read(q, torch.einsum("bhtd,bhtv->bhtdv", k, v).cumsum(2))


@spelled("products of matrices", **PLAIN)
def _(q, k, v):
    states = (k.unsqueeze(-1) @ v.unsqueeze(-2)).cumsum(-3)
    return (q.unsqueeze(-2) @ states).squeeze(-2)


@spelled("sum of a product", **PLAIN)
def _(q, k, v):
    return (q.unsqueeze(-1) * outer(k, v).cumsum(2)).sum(-2)


@spelled("time second, features", **PLAIN)
def _(q, k, v):
    q, k, v = F.elu(q.transpose(1, 2)) + 1, F.elu(k.transpose(1, 2)) + 1, v.transpose(1, 2)
    return torch.einsum("bthd,bthdv->bthv", q, torch.einsum("bthd,bthv->bthdv", k, v).cumsum(1))


@spelled("normalised", **{**PLAIN, "normaliser": True})
def _(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    total = torch.einsum("bhtd,bhtd->bht", q, k.cumsum(2))
    return read(q, outer(k, v).cumsum(2)) / (total[..., None] + 1e-6)


@spelled("normalised within one einsum", **{**PLAIN, "normaliser": True})
def _(q, k, v):
    q, k = F.relu(q) + 0.1, F.relu(k) + 0.1
    total = 1 / ((q * k.cumsum(2)).sum(-1) + 1e-6)
    return torch.einsum("bhtd,bhtdv,bht->bhtv", q, outer(k, v).cumsum(2), total)


@spelled("an initial state", B, H, D, V, **{**PLAIN, "operands": ("q", "k", "initial")})
def _(q, k, v, s):
    return read(q, outer(k, v).cumsum(2) + s[:, :, None])


@spelled("an initial state in front", B, H, D, V, **{**PLAIN, "operands": ("q", "k", "initial")})
def _(q, k, v, s):
    return read(q, torch.cat([s[:, :, None], outer(k, v)], 2).cumsum(2)[:, :, 1:])


@spelled("the last state too", **PLAIN)
def _(q, k, v):
    states = outer(k, v).cumsum(2)
    return read(q, states), states[:, :, -1]


@spelled("decayed", B, H, T, **GATED)
def _(q, k, v, g):
    total = F.logsigmoid(g).cumsum(-1)[..., None, None]
    return read(q, total.exp() * (outer(k, v) * (-total).exp()).cumsum(2))


@spelled("decayed by products", B, H, T, **GATED)
def _(q, k, v, g):
    total = torch.sigmoid(g).cumprod(-1)[..., None, None]
    return read(q, total * (outer(k, v) / total).cumsum(2))


@spelled("decayed by key", B, H, T, D, **{**GATED, "decay": "key"})
def _(q, k, v, g):
    total = F.logsigmoid(g).cumsum(2)[..., None]
    return read(q, total.exp() * (outer(k, v) / total.exp()).cumsum(2))


@spelled("decayed and normalised", B, H, T, **{**GATED, "normaliser": True})
def _(q, k, v, g):
    total = F.logsigmoid(g).cumsum(-1)[..., None]
    q, k = q.exp(), k.exp()
    states = total.exp()[..., None] * outer(k * (-total).exp(), v).cumsum(2)
    sums = total.exp() * (k * (-total).exp()).cumsum(2)
    return read(q, states) / (q * sums).sum(-1, keepdim=True)


@pytest.mark.parametrize("name", FORMS)
def test_spelling(name: str) -> None:
    f, further, fields = FORMS[name]
    compiled = assert_within_contract(f, *arguments(*further))
    assert_all_rewritten(compiled, "recurrence", **fields)
    assert len(compiled.decisions("recurrence")) == 1


def test_bfloat16() -> None:
    f, _, fields = FORMS["normalised"]
    args = [x.detach().bfloat16().requires_grad_() for x in arguments()]
    assert_all_rewritten(assert_within_contract(f, *args), "recurrence", **fields)


def test_states_that_are_also_returned() -> None:
    def f(q, k, v):
        states = outer(k, v).cumsum(2)
        return read(q, states), states

    assert_refused(f, *arguments(), why="states of all steps are also used by output", step="reads", family="recurrence")


@pytest.mark.parametrize(
    "f",
    [
        pytest.param(lambda q, k, v: v.cumsum(2), id="by-itself"),
        pytest.param(lambda q, k, v: (q * k.cumsum(2)).sum(-1), id="of-keys-alone"),
        pytest.param(lambda q, k, v: q.cumsum(-1) @ k.mT, id="along-what-is-summed"),
        pytest.param(lambda q, k, v: (q @ k.mT).cumsum(-1) @ v, id="of-scores"),
    ],
)
def test_other_cumulative_sums_are_left_without_a_word(f: Any) -> None:
    compiled = Compiled(f, ("h100-sxm",))
    compiled(*arguments())
    assert not compiled.decisions("recurrence")
