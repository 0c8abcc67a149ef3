"""The generated kernels of routers: under Triton's interpreter against the definition, and compiled for GPUs that are not there.

Triton reads TRITON_INTERPRET when it is imported, so the kernels run in one process of their own: this file, started as a script,
takes a task and a case on each line of its input and answers with what it found.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile import runtime
from effcompile.codegen import aot, attention, emit, route
from effcompile.errors import EffcompileWarning, KernelError
from effcompile.ops import route_operator
from effcompile.ops.route import RouteSpec, weights_of
from effcompile.ops.route import route as definition
from tests.interpreter import Ask, interpreted, serve

OP = torch.ops.effcompile.route
FLOOR_ULPS = 8.0  # below it, two correct results may differ in the order of their additions alone
GROUPS = {"groups": 4, "kept_groups": 2}
DEEPSEEK = {"k": 4, "score": "sigmoid", "select_bias": True, "group_stat": "top2", "norm": 1, "eps": 1e-20, "scale": 2.5, **GROUPS}
SPECS: dict[str, dict[str, Any]] = {
    "softmax": {"k": 3},
    "softmax-renormalised": {"k": 2, "norm": 1},
    "softmax-after": {"k": 4, "score_after": True},
    "softmax-after-biased": {"k": 4, "score_after": True, "select_bias": True},
    "p-norm": {"k": 3, "norm": 2, "eps": 1e-3, "scale": 0.5},
    "p-norm-floor": {"k": 3, "norm": 2, "eps": 0.4, "clamp": True},
    "floor": {"k": 2, "norm": 1, "eps": 0.5, "clamp": True},
    "sigmoid": {"k": 3, "score": "sigmoid", "scale": 3.0},
    "sigmoid-biased": {"k": 3, "score": "sigmoid", "select_bias": True, "norm": 1, "eps": 1e-6},
    "sigmoid-after": {"k": 1, "score": "sigmoid", "score_after": True},
    "sigmoid-after-normed": {"k": 3, "score": "sigmoid", "score_after": True, "norm": 1, "eps": 0.1},
    "sigmoid-groups": DEEPSEEK,
    "sigmoid-groups-zero": {**DEEPSEEK, "group_fill": "zero"},
    "softmax-groups": {"k": 3, "group_fill": "zero", "scale": 16.0, **GROUPS},
    "softmax-after-groups": {"k": 3, "score_after": True, "group_stat": "top2", **GROUPS},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One router: the fields of its specification, sizes, and how its logits are made.

    Attributes:
        values: "normal", "ties" between few values, "infinite" with -inf among them, "nan" with NaN among them.
        views: whether operands are of other strides than dense.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    tokens: int = 7
    experts: int = 16
    dtype: str = "float32"
    values: str = "normal"
    views: bool = False


# ------------------------------------------------------------------------------------------------------------------ the process


def operands_of(case: Case) -> tuple[Tensor, Tensor | None, Tensor, RouteSpec]:
    generator, spec = torch.Generator().manual_seed(0), RouteSpec(**case.fields)
    shape = (case.tokens, case.experts)
    logits = torch.randn(shape, generator=generator).mul(2)
    if case.values == "ties":
        logits = torch.randint(-1, 2, shape, generator=generator).float()
    elif case.values in ("infinite", "nan"):
        number = float("nan") if case.values == "nan" else float("-inf")
        logits[torch.rand(shape, generator=generator) < 0.3] = number
        logits[:1] = number
    logits = logits.to(getattr(torch, case.dtype))
    bias = torch.randint(-3, 4, (case.experts,), generator=generator).float() / 4 if spec.select_bias else None
    grad = torch.randn((case.tokens, spec.k), generator=generator).to(getattr(torch, spec.weights))
    if case.views:
        logits, grad = logits.t().contiguous().t(), torch.stack([grad, grad], -1)[..., 0]
        bias = None if bias is None else torch.stack([bias, bias], -1)[:, 0]
    return logits, bias, grad, spec


def excess_of(case: Case, device: str = "cpu") -> dict[str, float]:
    """Ids that differ, and by how much each error exceeds what is allowed: twice the definition's in float32, with a floor."""
    *operands, spec = operands_of(case)
    logits, bias, grad = (x if x is None else x.to(device) for x in operands)
    weights, ids = route.forward(logits, bias, spec)
    d_logits = route.backward(grad, logits, ids, spec)
    theirs, their_ids = definition(logits, bias, spec)
    assert ids.dtype == torch.int64 and weights.dtype == theirs.dtype and d_logits.dtype == logits.dtype
    assert all(len(set(row)) == spec.k and 0 <= min(row) <= max(row) < case.experts for row in ids.tolist())
    their_d = route_operator.reference_backward(grad, logits, ids, spec.to_json())
    exact = weights_of(logits.double(), ids, spec, dtype=torch.float64)
    exact_d = route_operator.reference_backward(grad.double(), logits.double(), ids, spec.to_json(), dtype=torch.float64)
    return {
        "ids": float((ids != their_ids).sum()),
        "weights": excess(weights, exact, theirs),
        "d_logits": excess(d_logits, exact_d, their_d, fewer=case.values == "nan"),
    }


def excess(mine: Tensor, exact: Tensor, theirs: Tensor, *, fewer: bool = False) -> float:
    """`fewer`: autograd multiplies 0 by the NaN of experts that were not chosen, the kernels do not."""
    surplus = mine.isnan() & ~theirs.isnan() if fewer else mine.isnan() != theirs.isnan()
    if surplus.any():
        return float("inf")
    a, b, x = (y[~theirs.isnan()].double() for y in (mine, theirs, exact))
    allowed = 2 * (b - x).norm() + FLOOR_ULPS * torch.finfo(mine.dtype).eps * x.norm()
    return ((a - x).norm() / allowed.clamp(min=1e-30)).item()


def chosen_of(case: Case) -> list[list[int]]:
    logits, bias, _, spec = operands_of(case)
    found: list[list[int]] = route.forward(logits, bias, spec)[1].tolist()
    return found


def agreement(case: Case) -> list[str]:
    """What is wrong with a case's kernels, and with kernels that scale otherwise."""
    spec, found = RouteSpec(**case.fields), []
    for text in (route.source(spec), route.source(spec).replace("SCALE = tl.constexpr(", "SCALE = tl.constexpr(1.5 * ")):
        module = emit.load_kernel(emit.write_kernel(text, attention._directory, family="route"))
        for direction in ("forward", "backward"):
            found.append(route.disagreement(module, spec, case.experts, torch.float32, torch.device("cpu"), direction))
    return found


def script_output(case: Case) -> list[str]:
    """What the kernel file prints when it is run, at a small size."""
    module = emit.load_kernel(emit.write_kernel(route.source(RouteSpec(**case.fields)), attention._directory, family="route"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.main(tokens=5, experts=case.experts, device="cpu")
    return printed.getvalue().splitlines()


def not_a_number(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Memory as it should not be read."""

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        made = create(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else -7)

    return filled


def run() -> None:
    """Answers questions. New memory holds NaN: what nobody writes is seen."""
    for name in ("empty", "empty_like"):
        setattr(torch, name, not_a_number(getattr(torch, name)))
    attention.set_directory(sys.argv[1])
    torch.set_num_threads(1)
    tasks: dict[str, Callable[[Case], Any]] = {
        "compare": excess_of, "chosen": chosen_of, "agree": agreement, "script": script_output,
    }  # fmt: skip
    serve({task: lambda fields, do=do: do(Case(**fields)) for task, do in tasks.items()})


# -------------------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with interpreted(__file__, tmp_path_factory.mktemp("kernels")) as ask:
        yield ask


def assert_right(found: dict[str, float]) -> None:
    assert set(found) == {"ids", "weights", "d_logits"}
    assert found["ids"] == 0
    assert {name: x for name, x in found.items() if not x <= 1} == {}


EACH = pytest.mark.parametrize("name", SPECS)


@EACH
def test_results_and_gradients(ask: Ask, name: str) -> None:
    assert_right(ask("compare", asdict(Case(fields=SPECS[name]))))


@EACH
@pytest.mark.parametrize("values", ["ties", "infinite", "nan"])
def test_values_without_an_order(ask: Ask, name: str, values: str) -> None:
    """The first of equal ones is chosen, none twice, and what is not a number neither hides nor repeats."""
    assert_right(ask("compare", asdict(Case(fields=SPECS[name], values=values))))


SIZES = {
    "no-tokens": Case(fields=SPECS["softmax-renormalised"], tokens=0),
    "one-token": Case(fields=SPECS["sigmoid-groups"], tokens=1),
    "many-tokens": Case(fields=SPECS["softmax-renormalised"], tokens=520, experts=8),
    "many-experts": Case(fields={**DEEPSEEK, "k": 8, "groups": 8, "kept_groups": 4}, tokens=5, experts=512),
    "odd-experts": Case(fields=SPECS["softmax-renormalised"], experts=37),
    "odd-groups": Case(fields={**DEEPSEEK, "groups": 3, "kept_groups": 2}, experts=21),
    "groups-of-one": Case(fields={"k": 2, "groups": 16, "kept_groups": 3}),
    "all-experts": Case(fields={"k": 5, "norm": 1}, experts=5),
    "one-expert": Case(fields={"k": 1}, experts=1),
    "many-slots": Case(fields={"k": 32, "norm": 1}, experts=40),
    "all-groups": Case(fields={**DEEPSEEK, "kept_groups": 4}),
    "views": Case(fields=DEEPSEEK, views=True),
    "views-softmax": Case(fields=SPECS["softmax-renormalised"], views=True),
    "bfloat16": Case(fields={**DEEPSEEK, "weights": "bfloat16"}, dtype="bfloat16"),
    "float16": Case(fields={**SPECS["softmax-after"], "weights": "float16"}, dtype="float16"),
    "bfloat16-logits": Case(fields=SPECS["softmax-renormalised"], dtype="bfloat16"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_dtypes(ask: Ask, name: str) -> None:
    assert_right(ask("compare", asdict(SIZES[name])))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_router(ask: Ask, data: st.DataObject) -> None:
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 7))
    kept = data.draw(st.integers(1, groups))
    norm, score = data.draw(st.sampled_from([0, 1, 2])), data.draw(st.sampled_from(["softmax", "sigmoid"]))
    fields = {
        "k": data.draw(st.integers(1, kept * size)), "groups": groups, "kept_groups": kept, "norm": norm, "score": score,
        "eps": data.draw(st.sampled_from([0.0, 1e-3])) if norm else 0.0, "score_after": data.draw(st.booleans()),
        "select_bias": data.draw(st.booleans()), "group_stat": data.draw(st.sampled_from(["max", "top2"])),
    }  # fmt: skip
    values = data.draw(st.sampled_from(["ties", "normal", "infinite"]))
    assert_right(ask("compare", asdict(Case(fields=fields, experts=groups * size, tokens=3, values=values))))


def test_the_first_of_equal_ones_is_chosen(ask: Ask) -> None:
    case = Case(fields={"k": 3}, values="ties")
    logits, *_ = operands_of(case)
    expected = [sorted(range(16), key=lambda e: (-row[e], e))[:3] for row in logits.tolist()]
    assert ask("chosen", asdict(case)) == expected


@pytest.mark.parametrize("name", ["softmax-renormalised", "sigmoid-groups", "p-norm-floor"])
def test_kernels_are_tried_on_the_machine_at_hand(ask: Ask, name: str) -> None:
    right_forward, right_backward, *wrong = ask("agree", asdict(Case(fields=SPECS[name])))
    assert right_forward == right_backward == ""
    assert all("kernels that agree with the reference but got" in why for why in wrong)


@pytest.mark.parametrize("name", ["softmax-renormalised", "sigmoid-groups", "softmax-after", "floor"])
def test_a_kernel_file_checks_itself(ask: Ask, name: str) -> None:
    ids, *errors = ask("script", asdict(Case(fields=SPECS[name])))
    assert " 0 of " in ids and len(errors) == 2
    assert all(float(line.partition("error ")[2].split()[0]) < 1e-5 for line in errors)


# -------------------------------------------------------------------------------------------------------- files and what is refused


@EACH
def test_a_file_needs_nothing_of_ours(name: str) -> None:
    text = route.source(RouteSpec(**SPECS[name]))
    assert "effcompile" not in text.replace("written by effcompile", "")
    assert "SOFTMAX" not in text and "NORMED" not in text


@pytest.mark.parametrize(
    ("fields", "experts", "dtype", "why"),
    [
        ({"capacity": 2}, 16, torch.float32, "a capacity of 2 assignments"),
        ({}, 513, torch.float32, "513 experts are more than the 512"),
        ({"k": 33}, 64, torch.float32, "33 experts of a token are more than 32"),
        ({}, 16, torch.float64, "computed in float32"),
        ({"logits_dtype": "bfloat16"}, 16, torch.bfloat16, "computed in float32"),
        ({"score": "none"}, 16, torch.float32, "no score"),
    ],
    ids=["capacity", "experts", "slots", "float64", "rounded", "no-score"],
)
def test_what_has_no_kernel(fields: dict[str, Any], experts: int, dtype: torch.dtype, why: str) -> None:
    spec = RouteSpec(**{"k": 2, **fields})
    assert why in str(route.refusal(spec, experts, dtype))
    with pytest.raises(KernelError, match=why):
        route.forward(torch.zeros(3, experts, dtype=dtype), None, spec)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(KernelError, match="Expected one of .* but got target='cuda:1'"):
        aot.compile_route(RouteSpec(k=1), target="cuda:1")


# ----------------------------------------------------------------------------------------------------------------- the operator


@EACH
def test_the_operator_is_the_definition(name: str) -> None:
    runtime.register()
    logits, bias, grad, spec = operands_of(Case(fields=SPECS[name]))
    found = []
    for f in (lambda x: OP(x, bias, spec.to_json()), lambda x: definition(x, bias, spec)):
        leaf = logits.clone().requires_grad_()
        weights, ids = f(leaf)
        assert not ids.requires_grad
        found.append((weights.detach(), ids, *torch.autograd.grad(weights, leaf, grad)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["softmax-renormalised", "sigmoid-groups"])
def test_the_operator_is_well_behaved(name: str) -> None:
    runtime.register()
    logits, bias, _, spec = operands_of(Case(fields=SPECS[name]))
    torch.library.opcheck(OP.default, (logits.requires_grad_(), bias, spec.to_json()))


def test_the_operator_refuses_a_capacity() -> None:
    with pytest.raises(ValueError, match="Expected a router without a capacity but got capacity=2"):
        OP(torch.zeros(3, 4, device="meta"), None, RouteSpec(k=1, capacity=2).to_json())


def test_a_kernel_that_cannot_be_launched_is_replaced_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, bias, grad, spec = operands_of(Case(fields=SPECS["sigmoid-groups"]))
    failing = mock.Mock(side_effect=KernelError("no such kernel"))
    monkeypatch.setattr(route, "forward", failing)
    monkeypatch.setattr(route, "backward", failing)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(runtime, "_warned", set())
    with pytest.warns(EffcompileWarning, match="a router is computed by its reference"):
        weights, ids = runtime._route(logits, bias, spec.to_json())
    torch.testing.assert_close((weights, ids), definition(logits, bias, spec))
    d_logits = runtime._route_backward(grad, logits, ids, spec.to_json())
    torch.testing.assert_close(d_logits, route_operator.reference_backward(grad, logits, ids, spec.to_json()))
    monkeypatch.setenv("EFFARCH_FALLBACK", "error")
    with pytest.raises(KernelError, match="no such kernel"):
        runtime._route(logits, bias, spec.to_json())


if __name__ == "__main__":
    run()
