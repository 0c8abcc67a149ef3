"""Delta rules in ATen: every form against the definition in float64, torch's checks, stability over many steps."""

from __future__ import annotations

import pytest
import torch

from effcompile import backend  # noqa: F401 - registers the operators
from effcompile.codegen import recurrence_aten, recurrence_update
from effcompile.ops.recurrence import reference

from .recurrence_cases import FLOOR_ULPS, Case, Form, Sizes, assert_contract, ours

OPERATOR = torch.ops.effcompile.recurrence.default
BACKWARD = torch.ops.effcompile.recurrence_backward.default


FORMS = {
    "deltanet": Form(delta="decayed", beta=True),
    "delta rule, raw": Form(delta="decayed", initial=True),
    "gated deltanet": Form(delta="decayed", decay="head", beta=True, initial=True),
    "gated with a rate": Form(delta="decayed", decay="head", rate=True, beta=True),
    "erase before decay": Form(delta="previous", decay="head", beta=True, initial=True),
    "constant decay": Form(delta="decayed", decay="head", over="bt", beta=True),
    "comba": Form(delta="decayed", decay="head", beta=True, erase=True, initial=True),
    "kimi": Form(delta="decayed", decay="key", beta=True, initial=True),
    "kimi with a rate": Form(delta="decayed", decay="key", rate=True, beta=True),
    "rwkv-7": Form(delta="previous", decay="key", erase=True, write=True, initial=True),
    "write apart, one decay": Form(delta="previous", decay="head", beta=True, erase=True, write=True),
    "write apart, no decay": Form(delta="decayed", beta=True, write=True),
}
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


@FORM
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(t=150, heads=2),
        Sizes(t=1),
        Sizes(t=8, heads=1),
        Sizes(t=65, h=1, heads=1, dk=33, dv=40, b=1),
        Sizes(t=129, b=1, h=2, heads=1, dk=1, dv=1),
    ],
    ids=["T37", "T150-grouped", "T1", "T8-one-key-head", "T65-wide", "T129-D1"],
)
def test_every_form_within_the_contract(form, sizes):
    # Of so few elements a single one may prevail whose terms cancel: there the definition's own error is small by luck alone.
    assert_contract(Case(form, sizes), floor=FLOOR_ULPS if sizes.dk > 1 else 100.0)


@FORM
@pytest.mark.parametrize("scale", [1e-4, 30.0], ids=["gates-near-1", "gates-near-0"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_gates_and_strengths(form, scale, beta):
    assert_contract(Case(form, Sizes(b=1, h=2, heads=1, t=300, dk=8, dv=4), scale=scale, strongest=beta))


@pytest.mark.parametrize("name", ["gated deltanet", "erase before decay", "kimi", "rwkv-7"])
@pytest.mark.parametrize("logs", [(-8.0, -20.0), (-90.0, -500.0), (-0.05, -0.05, -torch.inf), (2.0, -6.0), (0.3, -0.4)], ids=str)
def test_extreme_decays(name, logs):
    assert_contract(Case(FORMS[name], Sizes(b=1, h=2, heads=2, t=90), logs=logs))


@pytest.mark.parametrize("name", ["deltanet", "gated deltanet", "kimi", "rwkv-7"])
def test_raw_keys(name):
    """Keys of a length at which a step may overshoot."""
    assert_contract(Case(FORMS[name], Sizes(t=70, dk=8), raw=True, strongest=0.2))


@FORM
def test_no_steps(form):
    case = Case(form, Sizes(t=0))
    assert torch.equal(ours(case)["final"], reference(case.v, case.operands, case.spec)[2])


@FORM
def test_results_that_send_no_gradient(form):
    for sent in (0, 2):
        case = Case(form, Sizes(t=12))  # a chunk adds up what step after step takes away: small gradients are differences
        case.weights = [w if i == sent else None for i, w in enumerate(case.weights)]
        assert_contract(case)


@FORM
def test_bfloat16_operands(form):
    assert_contract(Case(form, Sizes(t=100, heads=2), dtype=torch.bfloat16, out="bfloat16"))


@FORM
@pytest.mark.parametrize("steps", [9, 70])
def test_gradcheck(form, steps):
    sizes = Sizes(b=1, h=2, heads=1, t=steps, dk=3, dv=2)
    case = Case(form, sizes, dtype=torch.float64, out="float64")
    leaves = [x.requires_grad_() for x in (case.v, *case.operands)]
    text = case.spec.to_json()
    assert torch.autograd.gradcheck(lambda v, *operands: OPERATOR(v, list(operands), text, "bhtd")[::2], leaves, fast_mode=True)


@FORM
@pytest.mark.filterwarnings("ignore")
def test_opcheck(form):
    case = Case(form, Sizes(b=1, h=2, heads=1, t=11))
    case.v.requires_grad_()
    case.operands = [x.requires_grad_() for x in case.operands]
    torch.library.opcheck(OPERATOR, (case.v, case.operands, case.spec.to_json(), "bthd"))
    v, operands = case.v.detach(), [x.detach() for x in case.operands]
    torch.library.opcheck(BACKWARD, (*case.weights, v, operands, None, case.spec.to_json(), True))


@FORM
@pytest.mark.parametrize("steps", [1, 3, 8, 9])
def test_a_state_is_updated_in_place(form, steps):
    case = Case(Form(**{**form.__dict__, "initial": True}), Sizes(t=steps))
    wanted = reference(case.v, case.operands, case.spec)
    *operands, state = case.operands
    address = state.data_ptr()
    out, _ = torch.ops.effcompile.recurrence_update(case.v, operands, state, case.spec.to_json(), "bthd")
    assert state.data_ptr() == address
    torch.testing.assert_close(out, wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, wanted[2], rtol=1e-5, atol=1e-5)
    taken = recurrence_update.on_cpu(case.v, operands, state, case.spec, "bthd")
    assert (taken is not None) == (steps <= 8)


@FORM
@pytest.mark.parametrize("cut", [3, 64, 100])
def test_two_halves_through_the_state_are_the_whole(form, cut):
    case = Case(Form(**{**form.__dict__, "initial": True}), Sizes(t=140, heads=2))
    whole = recurrence_aten.forward(case.v, case.operands, case.spec, "bhtd")
    *time, state = case.operands
    parts = []
    for piece in (slice(None, cut), slice(cut, None)):
        operands = [x if x.shape[2] == 1 else x[:, :, piece] for x in time]
        out, _, state = recurrence_aten.forward(case.v[:, :, piece], [*operands, state], case.spec, "bhtd")
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, whole[2], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deltanet", "gated deltanet", "kimi", "rwkv-7"])
def test_many_steps_stay_stable(name):
    case = Case(FORMS[name], Sizes(b=1, h=1, heads=1, t=65536, dk=16, dv=8), scale=0.01)
    mine = recurrence_aten.forward(case.v, case.operands, case.spec, "bhtd")
    v, operands, _ = case.in_float64()
    for found, true in zip(mine[::2], reference(v, operands, case.spec, dtype=torch.float64)[::2], strict=True):
        assert (found.double() - true).norm() <= 1e-4 * true.norm()
