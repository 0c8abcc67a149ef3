"""Loops over experts that choose rows by data: `torch.where`, `nonzero` and masks, as most models are written.

Dynamo captures them under `capture_dynamic_output_shape_ops`; without it the report says so.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import effcompile
from tests.expert_forms import SWIGLU, D, E, T, route, stored, swiglu
from tests.vocabulary import assert_refused, assert_rewritten, assert_within_contract

FORMS = {}
REFUSED = {}


def form(name):
    """Register a loop that is a layer of experts."""
    return lambda f: FORMS.setdefault(name, f)


def refused(name, why, step):
    """Register a loop that looks like one and is none."""
    return lambda f: REFUSED.setdefault(name, pytest.param(f, why, step, id=name))


def expert(rows, up, down, e):
    """What expert e makes of rows."""
    return swiglu(rows @ up[e]) @ down[e]


@pytest.fixture
def captured():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


@form("torch.where of ids")
def _(x, router, up, down):
    weights, ids = route(x, router)
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, slots = torch.where(ids == e)
        out.index_add_(0, tokens, expert(x[tokens], up, down, e) * weights[tokens, slots, None])
    return out


@form("torch.where of one_hot, slots first")
def _(x, router, up, down):
    weights, ids = route(x, router)
    mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
    out = torch.zeros((T, D), dtype=x.dtype)
    for e in range(E):
        slots, tokens = torch.where(mask[e])
        rows = x[None, tokens].reshape(-1, D)
        out.index_add_(0, tokens, (expert(rows, up, down, e) * weights[tokens, slots, None]).to(x.dtype))
    return out


@form("nonzero")
def _(x, router, up, down):
    weights, ids = route(x, router)
    out = torch.zeros_like(x)
    for e in range(E):
        found = (ids == e).nonzero()
        tokens, slots = found[:, 0], found[:, 1]
        out = out.index_add(0, tokens, weights[tokens, slots].unsqueeze(-1) * expert(x[tokens], up, down, e))
    return out


@form("rows added in place")
def _(x, router, up, down):
    weights, ids = route(x, router)
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, slots = torch.where(ids == e)
        out[tokens] += weights[tokens, slots, None] * expert(x[tokens], up, down, e)
    return out


@form("a mask of tokens")
def _(x, router, up, down):
    weights, ids = route(x, router)
    out = torch.zeros_like(x)
    for e in range(E):
        mask = (ids == e).any(-1)
        own = (weights * (ids == e)).sum(-1)
        out[mask] += expert(x[mask], up, down, e) * own[mask].unsqueeze(-1)
    return out


@form("added to shared experts")
def _(x, router, up, down):
    weights, ids = route(x, router)
    out = torch.tanh(x)
    for e in range(E):
        tokens, slots = torch.where(ids == e)
        out = out.index_add(0, tokens, expert(x[tokens], up, down, e) * weights[tokens, slots, None])
    return out


@pytest.mark.parametrize("name", FORMS)
def test_a_loop_that_chooses_rows_is_a_layer_of_experts(name, captured):
    report = assert_rewritten(FORMS[name], *stored(), family="experts", **SWIGLU)
    assert len([d for d in report.decisions if d.family == "experts"]) == 1


@pytest.mark.parametrize("name", FORMS)
def test_its_results_are_those_of_eager(name, captured):
    assert_within_contract(FORMS[name], *stored())


def test_no_rows_are_looked_for_any_more(captured):
    compiled = assert_within_contract(FORMS["torch.where of ids"], *stored())
    assert all("nonzero" not in str(graph.graph) for graphs in compiled.graphs.values() for graph in graphs)


@refused("the weights of another expert", "weights", "route")
def _(x, router, up, down):
    weights, ids = route(x, router)
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, slots = torch.where(ids == e)
        out = out.index_add(0, tokens, expert(x[tokens], up, down, e) * weights[tokens, 1 - slots, None])
    return out


@refused("another token's row", "cannot be read as a view", "tokens")
def _(x, router, up, down):
    weights, ids = route(x, router)
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, slots = torch.where(ids == e)
        out = out.index_add(0, tokens, expert(x.flip(0)[tokens], up, down, e) * weights[tokens, slots, None])
    return out


@refused("experts out of their order", "matrices are not those of the experts", "weights")
def _(x, router, up, down):
    weights, ids = route(x, router)
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, slots = torch.where(ids == e)
        out = out.index_add(0, tokens, expert(x[tokens], up, down, E - 1 - e) * weights[tokens, slots, None])
    return out


@refused("ids that may repeat, written once", "written but once", "combine")
def _(x, router, up, down):
    weights, ids = route(x, router)
    ids = ids % 3
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, slots = torch.where(ids == e)
        out[tokens] += weights[tokens, slots, None] * expert(x[tokens], up, down, e)
    return out


@refused("rows where ids differ", "not weighted by whether one expert was chosen|known to be zero", "route")
def _(x, router, up, down):
    weights, ids = route(x, router)
    out = torch.zeros_like(x)
    for e in range(E):
        tokens, slots = torch.where(ids != e)
        out = out.index_add(0, tokens, expert(x[tokens], up, down, e) * weights[tokens, slots, None])
    return out


@refused("experts that choose their tokens", r"expert choice", "combine")
def _(x, router, up, down):
    weights, tokens = (x @ router.mT).softmax(-1).mT.topk(4, dim=-1)
    y = torch.bmm(swiglu(torch.bmm(x[tokens], up)), down) * weights[..., None]
    return torch.zeros_like(x).index_add(0, tokens.reshape(-1), y.reshape(-1, D))


@pytest.mark.parametrize(("f", "why", "step"), REFUSED.values())
def test_a_near_miss_is_refused(f, why, step, captured):
    assert_refused(f, *stored(), why=why, step=step, family="experts")


def test_without_the_setting_the_report_names_it():
    report = effcompile.explain(FORMS["torch.where of ids"], *stored())
    assert [line for line in report.advice if "capture_dynamic_output_shape_ops = True" in line] == list(report.advice)
    assert report.advice[0] in report.text(1000)


def test_chosen_rows_do_not_keep_the_rest_of_a_graph_from_being_rewritten(captured):
    def f(q, x):
        return (q @ q.mT).softmax(-1) @ q, x[x[:, 0] > 0].exp()

    report = assert_rewritten(f, torch.randn(2, 64, 32), stored()[0])
    assert [frame.outcome for frame in report.frames] == ["compiled"]
    assert_within_contract(f, torch.randn(2, 64, 32), stored()[0])


def test_a_branch_on_how_many_rows_is_named(captured):
    def branching(x, router, up, down):
        weights, ids = route(x, router)
        out = torch.zeros_like(x)
        for e in range(E):
            tokens, slots = torch.where(ids == e)
            if tokens.numel() == 0:
                continue
            out.index_add_(0, tokens, expert(x[tokens], up, down, e) * weights[tokens, slots, None])
        return out

    report = effcompile.explain(branching, *stored())
    assert len(report.advice) == 1
    assert "no setting changes" in report.advice[0]


def test_with_the_setting_there_is_no_advice(captured):
    assert effcompile.explain(FORMS["nonzero"], *stored()).advice == ()
