"""The generated recurrence kernels, run by Triton's interpreter, against the definition in float64.

Triton reads TRITON_INTERPRET when it is imported, so the kernels run in one process of their own: this file, started as a script,
takes the name of a case on each line of its input and answers with the errors of that case.
"""

from __future__ import annotations

import ast
import contextlib
import io
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from effcompile.codegen import attention, emit, recurrence
from effcompile.codegen.recurrence_source import trim
from effcompile.codegen.recurrence_trial import Trial, disagreement
from effcompile.errors import KernelError
from effcompile.ops.recurrence import RecurrenceSpec, empty_output, reference, reference_backward
from tests.interpreter import Ask, interpreted, serve

T = 37  # two chunks of 16 and a part of one


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recurrence: its specification, shapes, and how large its decays are. `gate` makes [B, H, T, Dk, Dv], some of size 1."""

    decay: str = "none"
    read: str = "after"
    rated: bool = False
    bonus: bool = False
    initial: bool = False
    normaliser: bool = False
    gate: Callable[..., Tensor] = lambda *shape: -torch.rand(shape) * 0.3
    constant: bool = False
    shared_gate: bool = False
    b: int = 1
    h: int = 1
    h_k: int = 1
    t: int = T
    d_k: int = 24
    d_v: int = 40
    dtype: torch.dtype = torch.float32
    out: str = "float32"
    layout: str = "bhtd"
    segments: int | None = None
    grads: tuple[bool, bool, bool] = (True, True, True)  # of out, normaliser, final
    limit: float = 1e-5
    tile: tuple[int, int] = (32, 16)

    @property
    def spec(self) -> RecurrenceSpec:
        has = {
            "q": True, "k": True, "gate": self.decay != "none", "rate": self.rated, "bonus": self.bonus, "initial": self.initial
        }  # fmt: skip
        return RecurrenceSpec(
            operands=tuple(name for name, given in has.items() if given),
            decay=self.decay,  # type: ignore[arg-type]
            read=self.read,  # type: ignore[arg-type]
            normaliser=self.normaliser,
            out=self.out,
        )


def scattered(*values: float) -> Callable[..., Tensor]:
    """Small decays, and here and there one of `values`."""

    def make(*shape: int) -> Tensor:
        gate = -torch.rand(shape) * 0.3
        for value in values:
            gate = torch.where(torch.rand(shape) < 0.05, value, gate)
        return gate

    return make


def strong(*shape: int) -> Tensor:
    return -torch.rand(shape) * 30.0


CASES: dict[str, Case] = {
    "linear": Case(),
    "linear-views": Case(layout="bthd", b=2, h=2),
    "linear-segments": Case(segments=2, initial=True),
    "linear-before-bonus": Case(read="before", bonus=True, initial=True),
    "linear-normaliser": Case(normaliser=True),
    "linear-normaliser-initial": Case(normaliser=True, initial=True, h=2),
    "linear-normaliser-segments": Case(normaliser=True, initial=True, segments=3),
    "whole-chunks": Case(t=32, decay="head", initial=True),
    "few-steps": Case(t=3, decay="head", initial=True, h=2),
    "few-steps-key": Case(t=2, decay="key", initial=True),
    "few-steps-value": Case(t=2, decay="value", initial=True, rated=True),
    "one-step-normaliser": Case(t=1, decay="key", normaliser=True, initial=True),
    "few-steps-bonus": Case(t=4, decay="key", read="before", bonus=True, initial=True),
    "few-steps-before-normaliser": Case(t=3, decay="head", read="before", normaliser=True, initial=True),
    "retention": Case(decay="head", constant=True),
    "retention-initial": Case(decay="head", constant=True, initial=True, h=3, h_k=3, b=2),
    "retention-segments": Case(decay="head", constant=True, segments=2, initial=True),
    "retention-reset": Case(decay="head", constant=True, gate=lambda *s: torch.full(s, -70.0), initial=True),
    "head": Case(decay="head", initial=True),
    "head-rated": Case(decay="head", rated=True, h=2),
    "head-shared-gate": Case(decay="head", shared_gate=True, b=2, h=2, h_k=2),
    "head-before-bonus": Case(decay="head", read="before", bonus=True),
    "head-normaliser": Case(decay="head", normaliser=True, initial=True),
    "head-normaliser-segments": Case(decay="head", normaliser=True, initial=True, segments=2),
    "head-segments": Case(decay="head", segments=2, initial=True),
    "head-strong": Case(decay="head", gate=strong, initial=True, limit=1e-4),
    "head-resets": Case(decay="head", gate=scattered(-math.inf, -1e30, -61.0, -110.0), initial=True, segments=2),
    "head-growth": Case(decay="head", gate=scattered(1.0), initial=True),
    "head-only-final": Case(decay="head", grads=(False, False, True), normaliser=True, initial=True),
    "key": Case(decay="key", initial=True),
    "key-before-bonus": Case(decay="key", read="before", bonus=True, initial=True),
    "key-normaliser": Case(decay="key", normaliser=True, initial=True),
    "key-segments": Case(decay="key", segments=2, initial=True, normaliser=True),
    "key-strong": Case(decay="key", gate=strong, initial=True),
    "key-strong-before": Case(decay="key", gate=strong, read="before", limit=1e-4),
    "key-resets": Case(decay="key", gate=scattered(-math.inf, -1e30, -61.0, -110.0), initial=True, segments=2, limit=2e-5),
    "key-growth": Case(decay="key", gate=scattered(1.0), initial=True),
    "value": Case(decay="value", initial=True),
    "value-before": Case(decay="value", read="before", bonus=True, h=2),
    "value-segments": Case(decay="value", segments=3, initial=True),
    "value-strong": Case(decay="value", gate=strong, initial=True),
    "value-resets": Case(decay="value", gate=scattered(-math.inf, -1e30, -61.0), initial=True, limit=2e-5),
    "half": Case(decay="head", dtype=torch.float16, out="float16", limit=3e-3, initial=True),
    "half-key": Case(decay="key", dtype=torch.float16, out="float16", limit=3e-3, initial=True),
    "half-key-strong": Case(decay="key", dtype=torch.float16, out="float16", limit=3e-3, gate=strong),
    "half-without-decay": Case(dtype=torch.float16, out="float16", limit=3e-3, normaliser=True),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ the process


def operands_of(case: Case) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    d_gate = {"head": (1, 1), "key": (case.d_k, 1), "value": (1, case.d_v)}.get(case.decay, (1, 1))
    time = 1 if case.constant else case.t
    columns = case.d_v + case.normaliser
    made = {
        "q": torch.randn(case.b, case.h_k, case.t, 2 * case.d_k)[..., ::2].mul(case.d_k**-0.5),
        "k": torch.randn(case.b, case.t, case.h_k, case.d_k).transpose(1, 2),
        "gate": case.gate(1 if case.shared_gate else case.b, 1 if case.shared_gate else case.h, time, *d_gate),
        "rate": torch.rand(1, case.h, 1, 1, 1),
        "bonus": torch.randn(1, case.h, 1, case.d_k),
        "initial": torch.randn(case.b, case.h, case.d_k, columns),
    }
    halves = ("q", "k")
    v = torch.randn(case.t, case.b, case.h, case.d_v).permute(1, 2, 0, 3).to(case.dtype)
    return v, [made[name].to(case.dtype) if name in halves else made[name] for name in case.spec.operands]


def config_of(case: Case) -> recurrence.Config:
    tile = recurrence.Tile(block_m=case.tile[0], chunk=case.tile[1], num_warps=4, num_stages=1)
    return recurrence.Config(tiles=(tile,), exchanged=(tile,))


def errors_of(case: Case, config: recurrence.Config | None) -> dict[str, float]:
    """The error of each result and gradient, relative to its norm; and 1.0 where strides, shapes or dtypes are not as promised."""
    spec, (v, operands) = case.spec, operands_of(case)
    results = recurrence.forward(v, operands, spec, case.layout, config=config, segments=case.segments)
    exact = [x.double() for x in (v, *operands)]
    wanted = reference(exact[0], exact[1:], spec, dtype=torch.float64)
    names = ("out", "normaliser", "final")
    errors = {name: difference(ours, theirs) for name, ours, theirs in zip(names, results, wanted, strict=True)}
    expected_out = empty_output(v, spec, case.layout)
    errors["layout"] = float(results[0].stride() != expected_out.stride() or results[0].dtype != expected_out.dtype)

    grads = [
        torch.randn(result.shape) if given and result.numel() else None for given, result in zip(case.grads, results, strict=True)
    ]
    if grads[0] is not None:
        grads[0] = grads[0].to(results[0].dtype)
    ours = recurrence.backward(*grads, v, operands, None, spec, config=config, segments=case.segments)
    theirs = reference_backward(
        *(g if g is None else g.double() for g in grads), exact[0], exact[1:], None, spec, dtype=torch.float64
    )
    for name, x, got, want in zip(("v", *spec.operands), (v, *operands), ours, theirs, strict=True):
        like = torch.empty_like(x)
        errors[f"d{name}"] = difference(got, want)
        errors[f"d{name}-layout"] = float((got.stride(), got.dtype, got.shape) != (like.stride(), like.dtype, like.shape))
    return errors


def compare(case: Case) -> dict[str, float]:
    return errors_of(case, config_of(case))


def difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not torch.isfinite(ours).all():
        return math.inf
    return 0.0 if ours.numel() == 0 else float((ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-3))


def without_decay(case: Case) -> list[list[float]]:
    """By how much gradients differ where that of the decay is not asked for; those of gate and rate by their size."""
    v, operands = operands_of(case)
    grads = [torch.ones_like(v), None, None]
    both = [recurrence.backward(*grads, v, operands, None, case.spec, decay=d, config=config_of(case)) for d in (True, False)]
    return [[float(y.numel())] if y.shape != x.shape else [difference(y, x.double())] for x, y in zip(*both, strict=True)]


def kernels_of(case: Case) -> Any:
    problem = recurrence.Problem(d_k=case.d_k, d_v=case.d_v, dtype=case.dtype, arch="cpu", constant=case.constant)
    return emit.load_kernel(emit.write_kernel(recurrence.source(case.spec, problem), attention._directory, family="recurrence"))


def script_output(case: Case) -> list[str]:
    """What the kernel file prints when it is run, at a small size."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        kernels_of(case).main(heads=2, t=40, device="cpu")
    return printed.getvalue().splitlines()


def verdict(case: Case) -> list[str]:
    """Why the kernels of a case, and kernels that compute something else, are not trusted, forwards and backwards."""
    module, device = kernels_of(case), torch.device("cpu")
    wrong = replace(case.spec, read="before" if case.spec.read == "after" else "after")
    dtypes = (case.dtype, *(x.dtype for x in operands_of(case)[1]))
    trials = [Trial(backward=back, tile=0, split=True, few=False, dtypes=dtypes) for back in (False, True)]
    return [disagreement(module, spec, device, trial) for spec in (case.spec, wrong) for trial in trials]


def run() -> None:
    """Answers what to do with which case."""
    attention.set_directory(sys.argv[1])
    torch.set_num_threads(1)
    tasks: dict[str, Callable[[Case], Any]] = {
        "compare": compare,
        "script": script_output,
        "verdict": verdict,
        "without": without_decay,
    }
    serve({task: lambda name, do=do: do(CASES[name]) for task, do in tasks.items()})


# -------------------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with interpreted(__file__, tmp_path_factory.mktemp("kernels")) as ask:
        yield ask


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name: str, interpreter: Ask) -> None:
    errors = interpreter("compare", name)
    assert {key: error for key, error in errors.items() if not error <= CASES[name].limit} == {}


@pytest.mark.parametrize("name", ["head-rated", "key", "value"])
def test_the_gradient_of_the_decay_is_left_out(name: str, interpreter: Ask) -> None:
    found = dict(zip(("v", *CASES[name].spec.operands), interpreter("without", name), strict=True))
    assert set(found) >= {"v", "q", "k", "gate"} and max(x for (x,) in found.values()) < 1e-6


@pytest.mark.parametrize("name", ["head-normaliser", "key-before-bonus", "value"])
def test_the_file_checks_itself(name: str, interpreter: Ask) -> None:
    lines = interpreter("script", name)
    assert [line.split(":")[0].strip() for line in lines][:4] == ["out", "dv", "dq", "dk"]
    assert all(float(line.split("error ")[1].split(" of")[0]) < 1e-5 for line in lines)


@pytest.mark.parametrize("name", ["retention-initial", "head", "key", "value"])
def test_kernels_that_disagree_with_the_reference_are_not_trusted(name: str, interpreter: Ask) -> None:
    right, right_back, wrong, wrong_back = interpreter("verdict", name)
    assert right == right_back == ""
    assert wrong.startswith("Expected forward kernels that agree with the reference but got out with error=")
    assert wrong_back.startswith("Expected backward kernels that agree with the reference but got v with error=")


WRITTEN = ("linear-normaliser", "linear-before-bonus", "retention", "head-rated", "key", "value-before")
PROBLEM = recurrence.Problem(d_k=128, d_v=64, dtype=torch.bfloat16, arch="sm_90")


@pytest.mark.parametrize("name", WRITTEN)
def test_the_file_stands_alone(name: str) -> None:
    case = CASES[name]
    text = recurrence.source(case.spec, replace(PROBLEM, constant=case.constant))
    assert text == recurrence.source(case.spec, replace(PROBLEM, constant=case.constant))
    tree = ast.parse(text)
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {module.partition(".")[0] for module in modules} <= {"concurrent", "torch", "triton"}
    assert not {"GATED", "VECTOR", "RATED", "JOINED"} & {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_parameters_that_nothing_uses_vanish() -> None:
    text = "@triton.jit\ndef f(a, b, c):\n    return g(a, b, c) + c\n\n\n@triton.jit\ndef g(a, b, c):\n    return b\n"
    assert trim(text).replace(" ", "") == "@triton.jit\ndeff(b,c):\nreturng(b)+c\n\n\n@triton.jit\ndefg(b):\nreturnb\n"


def test_a_decay_that_is_always_the_same_is_summed_without_a_scan() -> None:
    spec = CASES["retention"].spec
    assert "running_sums(" in recurrence.source(spec, PROBLEM)
    assert "running_sums(" not in recurrence.source(spec, replace(PROBLEM, constant=True))


@pytest.mark.parametrize(
    ("arch", "joined"), [("sm_90", True), ("sm_100", False), ("sm_103", False), ("gfx942", True)], ids=lambda x: str(x)
)
def test_two_products_add_up_in_one_sum_only_where_it_is_right(arch: str, joined: bool) -> None:
    text = recurrence.source(CASES["head"].spec, replace(PROBLEM, arch=arch))
    assert ("tl.dot(b_w, b_x, entered" in text) == joined


@pytest.mark.parametrize("name", WRITTEN)
def test_no_product_takes_the_transpose_of_a_product(name: str) -> None:
    """What Triton 3.2 to 3.7 computes wrongly on Hopper: only what was loaded is transposed, or loaded and scaled."""
    tree = ast.parse(recurrence.source(CASES[name].spec, PROBLEM))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    transposed = {ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "tl.trans"}
    assert "b_k" in transposed and transposed <= {"b_k", "b_w", "b_z", "b_s", "b_e", "b_right"}
    results = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and "tl.dot" in ast.unparse(node.value)]
    assert results and not {ast.unparse(node.targets[0]) for node in results} & transposed


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


BAD = {
    "dtype": (
        shaped(1, 2, 4, 8, dtype=torch.float64),
        [shaped(1, 2, 4, 8)] * 2,
        "but got torch.float32, torch.float32, torch.float64",
    ),
    "rank": (shaped(2, 4, 8), [shaped(1, 2, 4, 8)] * 2, "Expected v .B, H, T, Dv. and q, k"),
    "heads": (shaped(1, 3, 4, 8), [shaped(1, 2, 4, 8)] * 2, "but got H=3, Hk=2"),
    "steps": (shaped(1, 2, 4, 8), [shaped(1, 2, 5, 8)] * 2, "Expected v .B, H, T, Dv. and q, k"),
    "operands": (shaped(1, 2, 4, 8), [shaped(1, 2, 4, 8)], "but got 1 tensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_operands_that_do_not_fit_are_refused(name: str) -> None:
    v, operands, why = BAD[name]
    with pytest.raises(KernelError, match=why):
        recurrence.forward(v, operands, CASES["linear"].spec, "bhtd")


def test_dimensions_beyond_256_are_refused() -> None:
    with pytest.raises(KernelError, match="Expected head dimensions up to 256 but got d_k=128, d_v=512"):
        recurrence.source(CASES["linear"].spec, replace(PROBLEM, d_v=512))


@pytest.mark.parametrize("initial", [False, True], ids=["from zeros", "from a state"])
def test_no_steps(initial: bool) -> None:
    case = replace(CASES["linear"], initial=initial, t=0)
    v, operands = operands_of(case)
    out, _, final = recurrence.forward(v, operands, case.spec, "bhtd")
    assert out.shape == v.shape and final.dtype == torch.float32
    assert torch.equal(final, operands[2] if initial else torch.zeros_like(final))


def test_candidates_start_with_the_default_and_differ() -> None:
    found = recurrence.candidates(CASES["head"].spec, PROBLEM)
    assert found[0] == recurrence.default_config(CASES["head"].spec, PROBLEM)
    assert len(set(found)) == len(found) > 3


if __name__ == "__main__":
    run()
