"""The ATen lowering of effcompile::recurrence: every form against the definition in float64, torch's checks, odd decays."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effcompile import (
    backend,  # noqa: F401 - registers the operators
    runtime,
)
from effcompile.codegen import (
    recurrence_aten,
    recurrence_blocks,
    recurrence_keys,
    recurrence_native,
    recurrence_rows,
    recurrence_scan,
    recurrence_steps,
)
from effcompile.errors import EffcompileWarning
from effcompile.ops.recurrence import reference

from .recurrence_cases import DECAYS, FORM, FORMS, FREE, NEG_INF, Case, Form, Sizes, assert_contract, exact, named, ours

OPERATOR = torch.ops.effcompile.recurrence.default
BACKWARD = torch.ops.effcompile.recurrence_backward.default


@pytest.fixture(autouse=True)
def without_cpp(monkeypatch):
    monkeypatch.setattr(recurrence_native, "supports", lambda v: False)


# -------------------------------------------------------------------- every form


@FORM
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(t=150, heads=2),
        Sizes(t=1),
        Sizes(t=3, heads=1),
        Sizes(t=64, h=1, heads=1, dk=33, dv=40, b=1),
        Sizes(t=129, b=1, h=2, heads=1, dk=1, dv=1),
    ],
    ids=["T37", "T150-grouped", "T1", "T3-one-key-head", "T64-wide", "T129-D1"],
)
def test_every_form_within_the_contract(form, sizes):
    assert_contract(Case(form, sizes))


@pytest.mark.parametrize("form", FREE.values(), ids=list(FREE))
@pytest.mark.parametrize("kind", DECAYS)
def test_extreme_decays_within_the_contract(form, kind):
    case = Case(form, Sizes(b=1, h=2, heads=2, t=90), logs=DECAYS[kind])
    if kind != "bursts of growth":
        assert all(x.isfinite().all() for x in exact(case).values())
    assert_contract(case)


@pytest.mark.parametrize("name", ["retention", "mamba-2", "gla", "rwkv-6", "rwkv-5", "mamba", "rg-lru", "rwkv-4", "gsa", "mlstm"])
@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_a_thousand_steps_within_the_contract(name, scale):
    assert_contract(Case(FORMS[name], Sizes(b=1, h=2, heads=1, t=1000, dk=8, dv=4), scale=scale))


@pytest.mark.parametrize("factors", [(0.0,), (0.0, 1.0, 0.5), (-1.0, -0.9), (1e-30, 1.0), (1e4, 1e-4), (1e30, 0.0)], ids=str)
def test_factors_of_any_sign_and_size(factors):
    case = Case(FORMS["rg-lru"], Sizes(b=1, h=1, t=200))
    at = case.spec.operands.index("gate")
    case.operands[at] = torch.tensor(factors)[torch.arange(case.operands[at].numel()) % len(factors)].view(case.operands[at].shape)
    assert_contract(case)


@FORM
def test_no_steps(form):
    """The state stays; nothing is read."""
    case = Case(form, Sizes(t=0))
    out, normaliser, final = recurrence_aten.forward(case.v, case.operands, case.spec, "bhtd")
    wanted = reference(case.v, case.operands, case.spec)
    assert out.shape == case.v.shape and normaliser.numel() == 0
    assert torch.equal(final, wanted[2])
    gradients = recurrence_aten.backward(*case.weights, case.v, case.operands, out, case.spec)
    for name, x, gradient in zip(("v", *case.spec.operands), (case.v, *case.operands), gradients, strict=True):
        assert gradient.shape == x.shape
        assert torch.equal(gradient, case.weights[2] if name == "initial" else torch.zeros_like(x))


@pytest.mark.parametrize("name", ["mamba-2", "gla", "mamba", "rg-lru", "rwkv-4", "mlstm", "linear attention"])
@pytest.mark.parametrize("sent", [(0,), (2,), (0, 2), (0, 1)], ids=str)
def test_results_that_send_no_gradient(name, sent):
    case = Case(FORMS[name])
    case.weights = [w if i in sent else None for i, w in enumerate(case.weights)]
    assert_contract(case)


@pytest.mark.parametrize("name", ["mlstm", "gla with a normaliser"])
def test_a_gradient_of_the_normaliser_alone(name):
    case = Case(FORMS[name])
    case.weights = [None, case.weights[1], None]
    assert_contract(case)


# -------------------------------------------------------------------- the operators


@FORM
@pytest.mark.parametrize("layout", ["bhtd", "bthd", "tbhd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fake_metadata_is_the_real_one(form, layout, dtype):
    case = Case(form, Sizes(heads=2), dtype=getattr(torch, dtype), out=dtype)
    text = case.spec.to_json()
    case.operands = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in case.operands]  # odd strides

    def run(v, operands, weights):
        results = OPERATOR(v, operands, text, layout)
        return (*results, *BACKWARD(*weights, v, operands, None if form.rows else results[0], text, True))

    real = run(case.v, case.operands, case.weights)
    with torch._subclasses.FakeTensorMode() as mode:
        lift = lambda x: None if x is None else mode.from_tensor(x)  # noqa: E731
        fake = run(lift(case.v), [lift(x) for x in case.operands], [lift(w) for w in case.weights])
    assert len(real) == len(fake)
    for mine, other in zip(real, fake, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)
        assert mine.isfinite().all()
    assert len({x.untyped_storage().data_ptr() for x in real if x.numel()}) == sum(x.numel() > 0 for x in real), (
        "results share memory"
    )


@FORM
@pytest.mark.filterwarnings("ignore")
def test_opcheck(form):
    case = Case(form, Sizes(b=1, h=2, heads=1, t=5))
    case.v.requires_grad_()
    case.operands = [x.requires_grad_() for x in case.operands]
    torch.library.opcheck(OPERATOR, (case.v, case.operands, case.spec.to_json(), "bthd"))
    v, operands = case.v.detach(), [x.detach() for x in case.operands]
    out = None if form.rows else OPERATOR(v, operands, case.spec.to_json(), "bhtd")[0]
    torch.library.opcheck(BACKWARD, (*case.weights, v, operands, out, case.spec.to_json(), True))


@FORM
def test_gradcheck(form):
    case = Case(form, Sizes(b=1, h=2, heads=1, t=9, dk=3, dv=2), dtype=torch.float64, out="float64")
    leaves = [x.requires_grad_() for x in (case.v, *case.operands)]
    text = case.spec.to_json()

    def call(v, *operands):
        out, normaliser, final = OPERATOR(v, list(operands), text, "bhtd")
        return (out, normaliser, final) if form.normaliser else (out, final)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("name", ["mamba-2", "gla", "rwkv-6", "mamba", "rg-lru", "rwkv-4", "mlstm"])
def test_bfloat16_operands(name):
    """Computed in float32: the error of rounding operands and results, not of a state in bfloat16."""
    case = Case(FORMS[name], Sizes(t=100, heads=2), dtype=torch.bfloat16, out="bfloat16")
    assert_contract(case)


@pytest.mark.parametrize("read", ["after", "before"])
def test_gradients_of_one_row_do_not_trust_a_rounded_output(read):
    case = Case(Form(decay="value", rows=False, read=read, initial=True), Sizes(t=100), out="bfloat16")
    assert_contract(case)


# -------------------------------------------------------------------- how it is computed


def test_each_form_goes_its_way():
    ways = {name: recurrence_aten.choose(*_chosen(form))[0] for name, form in FORMS.items()}
    assert {ways[name] for name in ("linear attention", "retention", "mamba-2", "mlstm")} == {"heads"}
    assert {ways[name] for name in ("gla", "rwkv-5", "rwkv-6")} == {"keys"}
    assert {ways[name] for name in ("gsa", "mamba", "full")} == {"steps"}
    assert {ways[name] for name in ("rg-lru", "rwkv-4", "sum")} == {"rows"}


def _chosen(form, **kwargs):
    case = Case(form, **kwargs)
    return case.v, case.spec.named(case.operands), case.spec


@pytest.mark.parametrize("name", ["mamba-2", "gla"])
def test_few_steps_and_growth_go_step_by_step(name):
    form = replace(FORMS[name], rate=False)
    assert recurrence_aten.choose(*_chosen(form, sizes=Sizes(t=1)))[0] == "steps"
    assert recurrence_aten.choose(*_chosen(form, logs=(3.0, -3.0)))[0] == "steps"
    assert recurrence_aten.choose(*_chosen(form, logs=(0.1, -3.0)))[0] != "steps"


@pytest.mark.parametrize(
    ("log", "size"), [(0.0, 64), (-0.5, 64), (-1.0, 32), (-3.0, 8), (-20.0, 2), (-100.0, 1), (NEG_INF, 1)], ids=str
)
def test_chunks_are_halved_as_far_as_their_decays_need(log, size):
    logs = torch.full((1, 1, 1, 64, 3), log, dtype=torch.float64).clamp(-1000, 1000)
    levels = recurrence_keys.decays_of(logs, "after", torch.float32, mild=60.0).levels
    assert [level.size for level in levels if not level.halves] == ([size] if size > 1 else [])
    assert [level.size for level in levels if level.halves] == [n for n in (2, 4, 8, 16, 32, 64) if n > size]
    factors = torch.cat([x.flatten() for level in levels for x in (level.rows, level.columns)])
    assert factors.isfinite().all() and factors.max() < 2.0**61


def test_every_pair_of_steps_is_in_one_level():
    logs = -torch.rand(1, 1, 1, 64, 1, dtype=torch.float64) * 20
    pairs = torch.zeros(1, 1, 1, 64, 64)
    for level in recurrence_keys.decays_of(logs, "after", torch.float32, mild=60.0).levels:
        part = level.of_pairs(pairs)
        part += 1 if level.halves else torch.ones_like(part).tril(-1)
    assert torch.equal(pairs[0, 0, 0], torch.ones(64, 64).tril(-1))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [1, 5, 47, 48, 49, 200, 1000])
@pytest.mark.parametrize("lanes", [3, 5000])
def test_scan(steps, lanes, reverse):
    x, a, entering = torch.randn(steps, lanes), torch.randn(steps, lanes), torch.randn(lanes)
    a[steps // 2] = 0.0
    a[::7, 0] = math.inf if lanes == 5000 else 0.0
    expected, before = torch.empty_like(x), entering
    for t in reversed(range(steps)) if reverse else range(steps):
        before = expected[t] = x[t] + a[t] * before
    recurrence_scan.scan_(x, a, entering, reverse=reverse)
    torch.testing.assert_close(x, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_scan_whose_factors_overflow_together():
    """A product of factors that is infinite beside a state of zero is no NaN."""
    x, a = torch.zeros(64, 2), torch.full((64, 2), 1e4)
    x[-1] = 1.0
    recurrence_scan.scan_(x, a, torch.zeros(2))
    assert torch.equal(x[:-1], torch.zeros(63, 2)) and torch.equal(x[-1], torch.ones(2))


@pytest.mark.parametrize("steps", [0, 1, 63, 64, 65, 500])
@pytest.mark.parametrize("chunks", [1, 3])
def test_blocks_cover_time_once(steps, chunks):
    found = list(recurrence_blocks.blocks(steps, 64, chunks, power_of_two=True))
    assert [t for block in found for t in range(block.start, block.start + block.rows)] == list(range(steps))
    for block in found:
        assert block.chunks <= chunks and block.length & (block.length - 1) == 0
        assert block.rows == block.chunks * block.length or (block.chunks == 1 and block.length // 2 < block.rows < block.length)


def test_memory_is_linear_in_the_steps(monkeypatch):
    """No tensor of a step-by-step recurrence holds the states of all steps, and none of a chunked one all pairs of steps."""
    largest = []
    for name in ("mamba", "mamba-2", "gla"):
        case = Case(FORMS[name], Sizes(b=1, h=1, heads=1, t=4096, dk=16, dv=16))
        seen = _Largest()
        with seen:
            ours(case)
        largest.append(seen.elements)
    assert max(largest) <= 2 * recurrence_steps._STATES < 4096 * 16 * 16


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest storage that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


# -------------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(list(FORMS.values())),
    b=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    t=st.integers(1, 140),
    dk=st.integers(1, 9),
    dv=st.integers(1, 9),
    scale=st.sampled_from([1e-6, 0.1, 2.0, 40.0]),
    layout=st.sampled_from(["bhtd", "bthd", "tbhd"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(form, b, heads, group, t, dk, dv, scale, layout, seed):
    torch.manual_seed(seed)
    case = Case(form, Sizes(b=b, h=heads * group, heads=heads, t=t, dk=dk, dv=dv), scale=scale)
    # Of so few elements a single one may prevail whose terms cancel: there the definition's own error is small by luck alone.
    assert_contract(case, ours(case, layout), floor=100.0)


@settings(max_examples=15, deadline=None)
@given(
    t=st.integers(2, 200), cut=st.integers(1, 199), name=st.sampled_from(["mamba-2", "gla", "rwkv-6", "mamba", "rg-lru", "mlstm"])
)
def test_two_halves_through_the_state_are_the_whole(t, cut, name):
    form = replace(FORMS[name], initial=True)
    case, cut = Case(form, Sizes(t=t, heads=2)), min(cut, t - 1)
    whole = recurrence_aten.forward(case.v, case.operands, case.spec, "bhtd")
    time = {name: x for name, x in case.spec.named(case.operands).items() if name != "initial"}
    state, parts = case.operands[-1], []
    for piece in (slice(None, cut), slice(cut, None)):
        operands = [x if x.shape[2] == 1 != t else x[:, :, piece] for x in time.values()]
        out, _, state = recurrence_aten.forward(case.v[:, :, piece], [*operands, state], case.spec, "bhtd")
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, whole[2], rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------- failures


def test_a_failing_lowering_is_replaced_by_the_definition(monkeypatch):
    def planted(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(recurrence_aten, "forward", planted)
    monkeypatch.setattr(recurrence_aten, "backward", planted)
    monkeypatch.setattr(runtime, "_warned", set())
    monkeypatch.delenv("EFFARCH_FALLBACK", raising=False)
    case = Case(FORMS["mamba-2"])
    text = case.spec.to_json()
    with pytest.warns(EffcompileWarning, match="a recurrence is computed by its reference, .*planted"):
        results = OPERATOR(case.v, case.operands, text, "bthd")
        gradients = BACKWARD(*case.weights, case.v, case.operands, None, text, True)
    assert results[0].transpose(1, 2).is_contiguous()
    assert_contract(case, named(case, results, gradients))
    monkeypatch.setenv("EFFARCH_FALLBACK", "error")
    with pytest.raises(RuntimeError, match="planted"):
        OPERATOR(case.v, case.operands, text, "bhtd")


@pytest.mark.parametrize("name", ["mamba-2", "gla", "mamba"])
def test_gradients_of_a_decay_that_nothing_asks_for_are_not_computed(name, monkeypatch):
    asked = []
    real = runtime.recurrence.without_decay
    monkeypatch.setattr(runtime.recurrence, "without_decay", lambda x, spec, decay: asked.append(decay) or real(x, spec, decay))
    case = Case(FORMS[name])
    decays = [operand in ("gate", "rate") for operand in case.spec.operands]
    found = []
    for learns in (True, False):
        operands = [x.detach().requires_grad_(learns or not decay) for x, decay in zip(case.operands, decays, strict=True)]
        v = case.v.detach().requires_grad_()
        OPERATOR(v, operands, case.spec.to_json(), "bhtd")[0].sum().backward()
        found.append([v.grad, *(x.grad for x in operands)])
    assert asked == [True, False]
    for with_it, without, decay in zip(*found, [False, *decays], strict=True):
        assert (without is None) == decay
        assert with_it is not None and (decay or torch.equal(with_it, without))


def test_rows_of_a_failing_shape_are_told():
    with pytest.raises(RuntimeError):
        recurrence_rows.forward(
            torch.randn(1, 1, 4, 3), {"gate": torch.randn(1, 1, 5, 1, 3)}, Form(decay="value", rows=False).spec(), "bhtd"
        )
