"""`effcompile::recurrence` in C++: every form against the definition in float64, decays of any size, threads, no compiler."""

from __future__ import annotations

import math

import pytest
import torch
from torch._higher_order_ops.scan import scan

from effcompile import backend, last_report  # noqa: F401 - registers the operators
from effcompile.codegen import (
    recurrence_aten,
    recurrence_chunks,
    recurrence_native,
    recurrence_native_rows,
    recurrence_native_steps,
)
from effcompile.errors import EffcompileWarning

from .recurrence_cases import DECAYS, FORM, FORMS, FREE, NEG_INF, Case, Form, Sizes, assert_contract, exact, named


def compiled(case: Case, layout: str = "bhtd") -> dict[str, torch.Tensor]:
    """The results and gradients of the kernels, by name; none of them may be missing."""
    x, spec = case.spec.named(case.operands), case.spec
    if case.form.rows:
        results = recurrence_native_steps.forward(case.v, x, spec, layout)
        found = recurrence_native_steps.backward(*case.weights, case.v, x, spec)
    else:
        results = recurrence_native_rows.forward(case.v, x, spec, layout)
        assert results is not None
        found = recurrence_native_rows.backward(case.weights[0], case.weights[2], case.v, x, results[0], spec)
    assert results is not None and found is not None, "there was no kernel"
    gradients = [recurrence_aten._as_operand(found[name], like) for name, like in (("v", case.v), *x.items())]
    return named(case, results, gradients)


@FORM
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(t=1),
        Sizes(t=16, h=6, heads=3, dk=33, dv=40, b=1),
        Sizes(t=65, b=1, h=40, heads=1, dk=1, dv=1),
        Sizes(t=40, b=1, h=2, heads=2, dk=3, dv=64),
    ],
    ids=["T37", "T1", "T16-grouped-wide", "T65-many-heads", "T40-D64"],
)
@pytest.mark.parametrize("layout", ["bhtd", "tbhd"])
def test_every_form_within_the_contract(form, sizes, layout):
    case = Case(form, sizes)
    assert_contract(case, compiled(case, layout))


@pytest.mark.parametrize("form", FREE.values(), ids=list(FREE))
@pytest.mark.parametrize("kind", DECAYS)
def test_extreme_decays_within_the_contract(form, kind):
    case = Case(form, Sizes(b=1, h=2, heads=2, t=90), logs=DECAYS[kind])
    assert_contract(case, compiled(case))


@pytest.mark.parametrize("factors", [(0.0,), (0.0, 1.0, 0.5), (-1.0, -0.9), (1e-30, 1.0), (1e4, 1e-4), (1e30, 0.0)], ids=str)
def test_factors_of_any_sign_and_size(factors):
    case = Case(FORMS["rg-lru"], Sizes(b=1, h=1, t=200))
    at = case.spec.operands.index("gate")
    case.operands[at] = torch.tensor(factors)[torch.arange(case.operands[at].numel()) % len(factors)].view(case.operands[at].shape)
    assert_contract(case, compiled(case))


@pytest.mark.parametrize("name", ["retention", "mamba-2", "gla", "rwkv-6", "rwkv-5", "mamba", "rg-lru", "rwkv-4", "gsa", "mlstm"])
def test_a_thousand_steps_within_the_contract(name):
    for scale in (0.01, 30.0):
        case = Case(FORMS[name], Sizes(b=1, h=2, heads=1, t=1000, dk=8, dv=4), scale=scale)
        assert_contract(case, compiled(case))


@pytest.mark.parametrize("name", ["mamba", "rwkv-6", "rg-lru"])
def test_float64(name):
    case = Case(FORMS[name], Sizes(b=1, h=2, heads=1), dtype=torch.float64, out="float64")
    found = compiled(case)
    for name, true in exact(case).items():
        torch.testing.assert_close(found[name], true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["mamba-2", "gla", "rwkv-6", "mamba", "rg-lru", "rwkv-4", "mlstm"])
def test_bfloat16_operands(name):
    case = Case(FORMS[name], Sizes(t=100, heads=2), dtype=torch.bfloat16, out="bfloat16")
    assert_contract(case, compiled(case))


@pytest.mark.parametrize("name", ["mamba", "gla", "rg-lru", "mlstm"])
@pytest.mark.parametrize("sent", [(0,), (2,), (0, 1)], ids=str)
def test_results_that_send_no_gradient(name, sent):
    case = Case(FORMS[name])
    case.weights = [w if i in sent else None for i, w in enumerate(case.weights)]
    assert_contract(case, compiled(case))


@FORM
def test_operands_in_any_memory_order(form):
    """Steps that are neighbours, odd strides, and operands that are expanded."""
    case = Case(form, Sizes(t=50, dv=33))
    case.v = case.v.transpose(2, 3).contiguous().transpose(2, 3)
    case.operands = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in case.operands]
    if "gate" in case.spec.operands:
        at = case.spec.operands.index("gate")
        gate = case.operands[at]
        case.operands[at] = gate.select(2, 0).unsqueeze(2).expand(gate.shape)
    assert_contract(case, compiled(case))


@pytest.mark.parametrize("name", ["mamba", "gla", "rg-lru", "rwkv-6"])
def test_threads_share_the_work(name, monkeypatch):
    monkeypatch.setattr(recurrence_native, "threads", lambda elements, blocks: 3)
    case = Case(FORMS[name], Sizes(t=40, dv=70))
    assert_contract(case, compiled(case))


@pytest.mark.parametrize(("elements", "blocks", "expected"), [(10, 4, 1), (1 << 20, 1, 1), (1 << 20, 8, 4), (1 << 16, 8, 2)])
def test_small_work_is_not_shared(elements, blocks, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert recurrence_native.threads(elements, blocks) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponential(dtype):
    """Against float64's own, everywhere: a scan of zeros from a state of one shows the decay."""
    dtype = getattr(torch, dtype)
    low, high = (-110, 90) if dtype == torch.float32 else (-750, 711)
    points = torch.cat(
        [torch.linspace(low, high, 4000), torch.linspace(-1, 1, 2000), torch.tensor([NEG_INF, math.inf, math.nan, 0.0, -1e-30])]
    )
    points = points.to(dtype)
    spec = Form(decay="value", rows=False, initial=True).spec(str(dtype).removeprefix("torch."))
    n = points.numel()
    operands = {"gate": points.view(1, 1, 1, 1, n), "initial": torch.ones(1, 1, 1, n, dtype=dtype)}
    found = recurrence_native_rows.forward(torch.zeros(1, 1, 1, n, dtype=dtype), operands, spec, "bhtd")
    assert found is not None
    true = points.double().exp().to(dtype)
    assert torch.equal(found[0].view(-1).isnan(), true.isnan()) and torch.equal(found[0].view(-1).isinf(), true.isinf())
    kept = true.isfinite()
    ulps = torch.finfo(dtype).eps * true[kept] + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((found[0].view(-1)[kept] - true[kept]).abs() <= 1.01 * ulps).all()


# -------------------------------------------------------------------- when


def test_states_with_many_rows_go_backwards_in_chunks(monkeypatch):
    chunked = []
    whole = recurrence_chunks.forward
    monkeypatch.setattr(recurrence_chunks, "forward", lambda *a: chunked.append("forward") or whole(*a))
    backwards = recurrence_aten.chunks_backward.backward
    monkeypatch.setattr(recurrence_aten.chunks_backward, "backward", lambda *a: chunked.append("backward") or backwards(*a))
    for rows, expected in ((64, []), (65, ["backward"])):
        chunked.clear()
        case = Case(FORMS["retention"], Sizes(b=1, h=1, heads=1, t=70, dk=rows, dv=4))
        recurrence_aten.forward(case.v, case.operands, case.spec, "bhtd")
        recurrence_aten.backward(*case.weights, case.v, case.operands, None, case.spec)
        assert chunked == expected


@pytest.mark.parametrize("name", ["rg-lru", "mamba"])
@pytest.mark.parametrize("operand", ["gate", "initial"])
def test_shapes_that_do_not_fit_are_told(name, operand):
    """Kernels look at no sizes, so the call must."""
    case = Case(FORMS[name])
    at = case.spec.operands.index(operand)
    case.operands[at] = case.operands[at].repeat_interleave(2, dim=1)
    with pytest.raises(RuntimeError, match="expanded size"):
        recurrence_aten.forward(case.v, case.operands, case.spec, "bhtd")


@pytest.fixture
def forgotten():
    """Nothing that this process has compiled is known."""

    def forget():
        for cached in (recurrence_native.compiling, recurrence_native.kernel, recurrence_native._warn):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("name", ["rg-lru", "mamba", "gla"])
@pytest.mark.parametrize("when", ["at once", "later"])
def test_without_a_compiler_aten_does_the_same(name, when, monkeypatch):
    def planted(*_):
        raise RuntimeError("planted")

    monkeypatch.delenv("EFFARCH_FALLBACK", raising=False)
    monkeypatch.setattr(recurrence_native, "compile_cpp", planted if when == "at once" else lambda *_: planted)
    case = Case(FORMS[name])
    with pytest.warns(
        EffcompileWarning, match="computed by torch's own operations, since their C\\+\\+ cannot be compiled: .*planted"
    ) as told:
        assert_contract(case)
    assert len(told) == 1
    monkeypatch.setenv("EFFARCH_FALLBACK", "error")
    recurrence_native.compiling.cache_clear()
    recurrence_native.kernel.cache_clear()
    with pytest.raises(RuntimeError, match="planted"):
        recurrence_aten.forward(case.v, case.operands, case.spec, "bhtd")


@pytest.mark.usefixtures("replace_where_possible")
def test_kernels_are_compiled_beside_the_graph(monkeypatch):
    """From the decision on, before Inductor begins; the text is the one that is called."""
    events = []

    def noted(what, function):
        return lambda text, *rest: events.append((what, text)) or function(text, *rest)

    for what in ("compiling", "kernel"):
        monkeypatch.setattr(recurrence_native, what, noted(what, getattr(recurrence_native, what)))
    a, b = torch.rand(2, 70, 5), torch.randn(2, 70, 5)
    found = torch.compile(_scan, backend="effarch", options={"fallback": "error"})(a, b)
    torch.testing.assert_close(found, _scan(a, b))
    assert [what for what, _ in events][:2] == ["compiling", "kernel"]
    assert len({text for _, text in events}) == 1


def _linear_attention(q, k, v):
    return ((q @ k.mT) * torch.ones(q.shape[2], q.shape[2]).tril()) @ v


def _scan(a, b):
    h, out = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        out.append(h)
    return torch.stack(out, 1)


@pytest.mark.parametrize(("steps", "outcome"), [(16, "left"), (512, "rewritten")])
def test_what_is_short_is_left(steps, outcome):
    """Inductor fuses it, and calling an operation costs more."""
    torch.compile(_linear_attention, backend="effarch", options={"fallback": "error"})(*torch.randn(3, 1, 4, steps, 16))
    assert last_report().decisions[-1].outcome == outcome


@pytest.mark.parametrize(("steps", "calls"), [(16, 0), (80, 1)])
def test_a_loop_is_left_as_long_as_it_is_unrolled(steps, calls, monkeypatch):
    called = []
    forward = recurrence_aten.forward
    monkeypatch.setattr(recurrence_aten, "forward", lambda *given: called.append(given) or forward(*given))
    a, b = torch.rand(1, steps, 8), torch.randn(1, steps, 8)
    torch.testing.assert_close(torch.compile(_scan, backend="effarch", options={"fallback": "error"})(a, b), _scan(a, b))
    assert len(called) == calls


def test_a_scan_that_is_called_step_by_step_is_not_left():
    """Inductor does not fuse its steps."""

    def model(a, b):
        return scan(lambda h, x: ((y := x[0] * h + x[1]), y.clone()), b.new_zeros(8), (a, b))[1]

    torch.compile(model, backend="effarch", options={"fallback": "error"})(torch.rand(24, 8), torch.randn(24, 8))
    assert last_report().decisions[-1].outcome == "rewritten"


def test_texts_are_the_same_for_all_sizes():
    """The constants of a text are a decay's kind, the reading and the dtype: no shape."""
    texts = {
        recurrence_native_steps.text(torch.float32, {n: x.shape for n, x in case.spec.named(case.operands).items()}, case.spec)
        for case in (Case(FORMS["mamba"], Sizes(t=t, dk=dk, dv=dv)) for t, dk, dv in ((3, 4, 5), (9, 8, 7)))
    }
    assert len(texts) == 1
