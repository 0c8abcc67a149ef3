"""The generated kernels of step-by-step recurrences, run by Triton's interpreter, against the definition in float64.

Triton reads TRITON_INTERPRET when it is imported, so the kernels run in one process of their own: this file, started as a script,
takes a task and a case on each line of its input and answers with what it found.
"""

from __future__ import annotations

import ast
import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from effcompile.codegen import attention, emit, scan
from effcompile.errors import KernelError
from effcompile.ops.recurrence import RecurrenceSpec, empty_output, reference, reference_backward
from tests.interpreter import Ask, interpreted, serve

FLOOR_ULPS = 8.0  # below it, two correct results may differ in the order of their additions alone


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recurrence: a specification in short, shapes, and how its operands are made.

    Attributes:
        gate, rate: the dimensions of [B, H, T, Dk, Dv] in which they differ, as letters of "bhtkd"; none for no such operand.
        values: how the gate's numbers are made, see `decay_values`.
        tile: overrides of the launches' options.
        without: results that have no gradient.
    """

    rows: int = 0
    gate: str | None = "bhtd"
    rate: str | None = None
    kind: str = "log"
    read: str = "after"
    initial: bool = False
    b: int = 1
    h: int = 2
    h_k: int = 1
    t: int = 8
    d: int = 6
    dtype: str = "float32"
    out: str = "float32"
    layout: str = "bhtd"
    values: str = "decays"
    views: bool = False
    tile: dict[str, int] = field(default_factory=lambda: {"STEPS": 3, "LANES": 2, "BLOCK_D": 4, "VEC": 2, "SEGMENTS": 1})
    without: str | None = None

    @property
    def spec(self) -> RecurrenceSpec:
        has = {
            "q": self.rows,
            "k": self.rows,
            "gate": self.gate is not None,
            "rate": self.rate is not None,
            "initial": self.initial,
        }
        decay = (
            "none" if self.gate is None else "full" if self.rows else "value" if "d" in self.gate + (self.rate or "") else "head"
        )
        return RecurrenceSpec(
            operands=tuple(name for name, given in has.items() if given),
            decay=decay,  # type: ignore[arg-type]
            gate=self.kind,  # type: ignore[arg-type]
            read=self.read,  # type: ignore[arg-type]
            out=self.out,
        )


ALONE = {"STEPS": 4, "LANES": 1, "BLOCK_D": 16, "VEC": 1, "SEGMENTS": 1}
CUT = {"STEPS": 2, "LANES": 2, "BLOCK_D": 8, "VEC": 2, "SEGMENTS": 3}
MANY = {"STEPS": 4, "LANES": 8, "BLOCK_D": 4, "VEC": 4, "SEGMENTS": 1}
CASES: dict[str, Case] = {
    "gate": Case(b=2),
    "gate-many-lanes": Case(h=1, t=37, tile=MANY, initial=True),
    "gate-initial": Case(initial=True),
    "gate-before": Case(read="before", initial=True),
    "gate-before-without-initial": Case(read="before"),
    "gate-one-lane": Case(tile=ALONE, initial=True),
    "gate-segments": Case(tile=CUT, t=11, initial=True),
    "gate-segments-before": Case(tile=CUT, read="before", initial=True),
    "gate-segments-rounded": Case(tile=CUT, out="bfloat16", initial=True),
    "gate-chosen-tile": Case(tile={}, h=1, t=20),
    "factor": Case(kind="factor", values="factors", initial=True),
    "factor-segments": Case(kind="factor", values="factors", tile=CUT, initial=True),
    "factor-constant": Case(kind="factor", values="factors", gate="hd"),
    "factor-of-the-head": Case(kind="factor", values="factors", gate="bht", initial=True),
    "no-decay": Case(gate=None, initial=True),
    "no-decay-before": Case(gate=None, read="before", initial=True, tile=CUT),
    "rated": Case(gate="btd", rate="d", initial=True, b=2),
    "rated-segments": Case(gate="btd", rate="hd", initial=True, tile=CUT),
    "rated-head": Case(gate="bht", rate="d"),
    "rate-of-each-step": Case(gate="hd", rate="bt", initial=True),
    "gate-and-rate-of-each-step": Case(gate="bhtd", rate="bt", initial=True),
    "gate-and-rate-constant": Case(gate="h", rate="d", initial=True),
    "constant": Case(gate="d", initial=True),
    "constant-segments": Case(gate="d", tile=CUT),
    "constant-of-the-head": Case(gate="h", initial=True),
    "head": Case(gate="bht", initial=True),
    "head-shared-by-the-batch": Case(gate="ht", tile=CUT, b=2),
    "rounded": Case(out="bfloat16", dtype="bfloat16", initial=True),
    "rounded-before": Case(out="bfloat16", read="before", initial=True),
    "rounded-rated": Case(out="float16", gate="btd", rate="d"),
    "half": Case(dtype="float16", initial=True),
    "heads-last": Case(layout="bthd", views=True, initial=True),
    "heads-last-rounded": Case(layout="bthd", views=True, out="bfloat16", tile=CUT, initial=True),
    "heads-last-rated": Case(layout="bthd", views=True, gate="bhtd", rate="hd", initial=True),
    "time-first": Case(layout="tbhd", views=True),
    "odd-columns": Case(d=5, views=True, initial=True),
    "one-column": Case(d=1, t=9),
    "one-step": Case(t=1, initial=True),
    "one-step-rated": Case(t=1, gate="btd", rate="d", initial=True, tile={}),
    "no-steps": Case(t=0, initial=True),
    "no-batch": Case(b=0, initial=True),
    "resets": Case(values="resets", initial=True),
    "growth": Case(values="growth", initial=True, t=60),
    "growth-of-nothing": Case(
        values="explosion", kind="factor", t=300, h=1, d=2, tile={"STEPS": 32, "LANES": 4, "BLOCK_D": 2, "VEC": 2, "SEGMENTS": 2}
    ),
    "vanishing": Case(values="vanishing", initial=True),
    "without-final": Case(without="final", initial=True),
    "without-out": Case(without="out", initial=True),
    "selective": Case(h=1, rows=2, gate="btd", rate="kd", b=2),
    "selective-many-lanes": Case(rows=2, gate="btd", rate="kd", h=1, t=37, tile=MANY),
    "selective-initial": Case(rows=3, gate="btd", rate="hkd", initial=True),
    "selective-one-lane": Case(h=1, rows=2, gate="bhtd", rate="kd", tile=ALONE, initial=True),
    "selective-before": Case(h=1, rows=2, gate="bhtd", rate="kd", read="before", initial=True),
    "selective-groups": Case(rows=2, gate="bhtd", rate="kd", h=4, h_k=2, t=9),
    "selective-whole-gate": Case(h=1, rows=2, gate="bhtkd", initial=True),
    "selective-rows-and-columns-apart": Case(h=1, rows=2, gate="bhtk", rate="d", initial=True),
    "selective-steps-and-elements-apart": Case(h=1, rows=2, gate="t", rate="hkd"),
    "selective-constant": Case(h=1, rows=2, gate="kd", initial=True),
    "selective-rate-of-each-step": Case(h=1, rows=2, gate="kd", rate="bhtd"),
    "selective-both-of-each-step": Case(h=1, rows=2, gate="tk", rate="td", t=9),
    "selective-rounded": Case(h=1, rows=2, gate="btd", rate="kd", dtype="bfloat16", out="bfloat16"),
    "selective-heads-last": Case(h=1, rows=2, gate="btd", rate="kd", layout="bthd", views=True),
    "selective-views": Case(h=1, rows=2, gate="btd", rate="kd", layout="bhtd", views=True, d=7, initial=True),
    "selective-resets": Case(h=1, rows=2, gate="btd", rate="kd", values="resets", initial=True),
    "selective-chosen-tile": Case(rows=2, gate="btd", rate="kd", tile={}, t=20, h=1, d=4),
    "selective-one-step": Case(h=1, rows=5, gate="btd", rate="kd", tile={}, t=1, initial=True),
    "selective-no-steps": Case(h=1, rows=2, gate="btd", rate="kd", t=0, initial=True),
    "selective-without-out": Case(h=1, rows=2, gate="btd", rate="kd", without="out"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ the process


def decay_values(case: Case, shape: tuple[int, ...]) -> Tensor:
    """Logarithms of decays, or decays."""
    x = torch.rand(shape)
    if case.values == "factors":
        return torch.where(x < 0.1, 0.0, torch.where(x < 0.3, -x, 1.4 * x))
    if case.values == "resets":
        return torch.where(x < 0.1, float("-inf"), torch.where(x < 0.3, -1e30, torch.where(x < 0.5, 0.0, -x)))
    if case.values == "growth":
        return x - 0.4
    if case.values == "explosion":
        return torch.where(x < 0.01, 0.0, 3.0 + x)
    if case.values == "vanishing":
        return -60 * x
    return -x * 0.5


def operands_of(case: Case) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    dtype, rows = getattr(torch, case.dtype), max(1, case.rows)
    sizes = {"b": case.b, "h": case.h, "t": case.t, "k": rows, "d": case.d}

    def differing(letters: str) -> tuple[int, ...]:
        return tuple(size if name in letters else 1 for name, size in sizes.items())

    def placed(x: Tensor) -> Tensor:
        """The tensor, or a view with time before heads and columns two apart of the same numbers."""
        if not case.views:
            return x
        if case.layout == "bhtd":
            return torch.stack([x, x], -1)[..., 0]
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    v = torch.randn(case.b, case.h, case.t, case.d, dtype=dtype)
    if case.values == "explosion":
        v[:, :, :-3] = 0
    made = {
        "q": lambda: torch.randn(case.b, case.h_k, case.t, rows, dtype=dtype),
        "k": lambda: torch.randn(case.b, case.h_k, case.t, rows, dtype=dtype),
        "gate": lambda: decay_values(case, differing(case.gate or "")).to(dtype),
        "rate": lambda: torch.rand(differing(case.rate or "")) + 0.5,
        "initial": lambda: torch.randn(case.b, case.h, rows, case.d),
    }
    return placed(v), [placed(made[name]()) for name in case.spec.operands]


def excess_of(case: Case) -> dict[str, float]:
    """By how much the error of each result exceeds what is allowed: twice the float32 loop's, with a floor. At most 1 is fine."""
    v, operands = operands_of(case)
    spec, tile = case.spec, case.tile or None
    out, normaliser, final = scan.forward(v, operands, spec, case.layout, config=tile)
    assert normaliser.shape == (0,) and out.stride() == empty_output(v, spec, case.layout).stride() and out.dtype == spec.out_dtype
    exact, loop = (reference(v, operands, spec, dtype=dtype) for dtype in (torch.float64, torch.float32))
    grads = [torch.randn_like(out), None, torch.randn_like(final)]
    grads = [None if case.without == name else g for name, g in zip(("out", "", "final"), grads, strict=True)]
    ours = [out, final, *scan.backward(*grads, v, operands, None if spec.has_rows else out, spec, config=tile)]
    theirs = [
        [results[0].to(spec.out_dtype) if dtype == torch.float32 else results[0], results[2], *backward]
        for dtype, results in ((torch.float64, exact), (torch.float32, loop))
        for backward in [reference_backward(*grads, *in_float64(v, operands, dtype), out, spec, dtype=dtype)]
    ]
    for x, mine in zip((v, *operands), ours[2:], strict=True):
        assert mine.dtype == x.dtype and mine.shape == x.shape and mine.stride() == torch.empty_like(x).stride()
    names = ["out", "final", "d_v", *(f"d_{name}" for name in spec.operands)]
    return {name: excess(*each) for name, *each in zip(names, ours, *theirs, strict=True)}


def in_float64(v: Tensor, operands: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The operands; for the exact gradients in float64, so that those are not rounded."""
    return (v.double(), [x.double() for x in operands]) if dtype == torch.float64 else (v, operands)


def excess(mine: Tensor, exact: Tensor, loop: Tensor) -> float:
    kept = loop.isfinite() & exact.isfinite()
    if not mine[kept].isfinite().all() or not torch.equal(mine.isnan(), loop.isnan()):
        return float("inf")
    a, b, x = (y[kept].double() for y in (mine, loop, exact))
    allowed = 2 * (b - x).norm() + FLOOR_ULPS * torch.finfo(mine.dtype).eps * x.norm()
    return ((a - x).norm() / allowed.clamp(min=1e-30)).item()


def script_output(case: Case) -> list[str]:
    """What the kernel file prints when it is run, at a small size."""
    v, operands = operands_of(case)
    text = scan.source(case.spec, scan.Problem.of(v, case.spec.named(operands)))
    module = emit.load_kernel(emit.write_kernel(text, attention._directory, family="scan"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.main(batch=1, heads=1, t=5, d=4, device="cpu")
    return printed.getvalue().splitlines()


def agreement(case: Case) -> list[str]:
    """What is wrong with a case's kernels, forwards and backwards, and with kernels that take another decay."""
    v, operands = operands_of(case)
    problem = scan.Problem.of(v, case.spec.named(operands))
    found = []
    for text in (scan.source(case.spec, problem), scan.source(case.spec, problem).replace("1.4426950408889634", "1.3")):
        module = emit.load_kernel(emit.write_kernel(text, attention._directory, family="scan"))
        found += [scan.disagreement(module, case.spec, problem, v.dtype, v.device, d) for d in ("forward", "backward")]
    return found


def not_a_number(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Memory as it should not be read."""
    return lambda *args, **kwargs: create(*args, **kwargs).fill_(float("nan"))


def run() -> None:
    """Answers questions. New memory holds NaN: what nobody writes is seen."""
    for name in ("empty", "empty_like", "empty_strided"):
        setattr(torch, name, not_a_number(getattr(torch, name)))
    attention.set_directory(sys.argv[1])
    torch.set_num_threads(1)
    tasks: dict[str, Callable[[Case], Any]] = {"compare": excess_of, "script": script_output, "agree": agreement}
    serve({task: lambda fields, do=do: do(Case(**fields)) for task, do in tasks.items()})


# -------------------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with interpreted(__file__, tmp_path_factory.mktemp("kernels")) as ask:
        yield ask


def assert_close(found: dict[str, float]) -> None:
    assert {"out", "final", "d_v"} <= set(found)
    assert {name: x for name, x in found.items() if not x <= 1} == {}


SLOW = {
    "gate-before-without-initial", "gate-segments-before", "factor-constant", "factor-of-the-head", "no-decay", "rated-segments",
    "rated-head", "rate-of-each-step", "gate-and-rate-constant", "constant", "constant-of-the-head", "head", "rounded-before",
    "rounded-rated", "heads-last-rounded", "time-first", "one-column", "one-step-rated", "vanishing", "without-final",
    "selective-many-lanes", "selective-one-lane", "selective-groups", "selective-rate-of-each-step", "selective-both-of-each-step",
    "selective-steps-and-elements-apart", "selective-views", "selective-rounded", "selective-without-out", "no-batch",
    "no-decay-before", "factor-segments", "gate-and-rate-of-each-step", "heads-last-rated", "odd-columns", "half", "without-out",
    "growth", "gate-many-lanes", "selective-chosen-tile", "selective-heads-last", "selective-rows-and-columns-apart",
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES])
def test_results_and_gradients(ask: Ask, name: str) -> None:
    assert_close(ask("compare", asdict(CASES[name])))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.builds(
        Case,
        rows=st.sampled_from([0, 0, 1, 3]),
        gate=st.sampled_from(["bhtd", "td", "ht"]),
        rate=st.sampled_from([None, "hd"]),
        read=st.sampled_from(["after", "before"]),
        initial=st.booleans(),
        t=st.integers(1, 18),
        d=st.integers(1, 9),
        layout=st.sampled_from(["bhtd", "bthd", "tbhd"]),
        views=st.booleans(),
        tile=st.fixed_dictionaries(
            {
                "STEPS": st.integers(1, 3),
                "LANES": st.sampled_from([1, 2, 4]),
                "BLOCK_D": st.sampled_from([4, 8]),
                "VEC": st.sampled_from([1, 2, 4]),
                "SEGMENTS": st.integers(1, 4),
            }
        ),
    )
)
def test_shapes_and_tiles(ask: Ask, case: Case) -> None:
    assert_close(ask("compare", asdict(case)))


@pytest.mark.parametrize("name", ["gate-initial", "factor", "selective-initial"])
def test_the_file_checks_itself(ask: Ask, name: str) -> None:
    lines = ask("script", asdict(CASES[name]))
    errors = [float(line.split()[3]) for line in lines]
    assert len(errors) == 3 + len(CASES[name].spec.operands)
    assert max(errors) < 1e-5


@pytest.mark.parametrize("name", ["gate-initial", pytest.param("selective-initial", marks=pytest.mark.slow)])
def test_kernels_that_disagree_with_the_reference_are_not_trusted(ask: Ask, name: str) -> None:
    forward, backward, *wrong = ask("agree", asdict(CASES[name]))
    assert forward == backward == ""
    assert all("agree with the reference" in why for why in wrong)


# ------------------------------------------------------------------------------------------------------------------- the files


def text_of(case: Case) -> str:
    v, operands = operands_of(case)
    return scan.source(case.spec, scan.Problem.of(v, case.spec.named(operands)))


@pytest.mark.parametrize("name", CASES)
def test_a_file_stands_by_itself(name: str) -> None:
    text = text_of(CASES[name])
    tree = ast.parse(text)
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in modules} <= {"concurrent", "torch", "triton"}
    flags = {"DECAYS", "GATED", "GATE_K", "GATE_D", "RATED", "LOG", "AGAIN"}
    assert not flags & {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}, "flags are decided"
    assert max(map(len, text.splitlines())) < 200


def test_states_are_not_computed_again_where_the_output_holds_them() -> None:
    assert "Kept +" in text_of(CASES["rounded"]).partition("def backward_kernel")[2]
    assert "Kept +" not in text_of(CASES["gate"]).partition("def backward_kernel")[2]


def test_one_file_for_all_sizes() -> None:
    assert text_of(CASES["gate"]) == text_of(replace(CASES["gate"], b=3, h=4, t=20, d=9))


# ---------------------------------------------------------------------------------------------------------------- the launches


def planned(heads: int, t: int, d: int, processors: int = 132) -> dict[str, int]:
    """What the chosen launch of a recurrence with one row looks like: its options, programs, segments."""
    module = emit.load_kernel(emit.write_kernel(text_of(CASES["gate"]), family="scan"))
    with mock.patch.object(module, "processors", lambda device: processors):
        options, programs, segments, each = module.plan(torch.device("cpu"), heads, t, d, module.FORWARD)
    tiles = -(-t // (options["STEPS"] * options["LANES"]))
    assert segments * each >= tiles > (segments - 1) * each, "each segment has a tile"
    return {**options, "programs": programs, "segments": segments}


def test_many_columns_are_not_cut() -> None:
    found = planned(4, 4096, 64 * 128)
    assert (found["segments"], found["num_warps"]) == (1, 4)
    assert found["programs"] >= 2 * 132


def test_some_columns_keep_many_loads_in_flight() -> None:
    found = planned(1, 8192, 32 * 128)
    assert (found["segments"], found["num_warps"], found["programs"]) == (1, 8, 128)
    assert found["STEPS"] * found["LANES"] * found["BLOCK_D"] * 2 * 2 >= 32 * 1024, "bytes of two operands of 2 bytes"


def test_few_columns_are_cut_in_time() -> None:
    found = planned(1, 65536, 512)
    assert found["programs"] * found["segments"] >= 66
    assert planned(1, 64, 512)["segments"] == 1, "not a short sequence"


def test_one_step_is_one_step() -> None:
    found = planned(1, 1, 4096)
    assert (found["STEPS"], found["LANES"], found["segments"]) == (1, 1, 1)
    assert found["programs"] >= 32


def test_heads_and_columns_are_one_dimension_where_memory_allows() -> None:
    module = emit.load_kernel(emit.write_kernel(text_of(CASES["gate"]), family="scan"))
    last = torch.arange(2 * 5 * 3 * 4.0).view(2, 5, 3, 4).transpose(1, 2)  # [B, H, T, D]
    whole, none = module.as_columns(last, None)
    assert whole.shape == (2, 1, 5, 12) and none is None
    assert torch.equal(whole[:, 0], last.transpose(1, 2).flatten(2))
    for other in (last.contiguous(), last[:, :1].expand(2, 3, 5, 4), last[..., :1]):
        assert module.as_columns(last, other)[0] is last


# ---------------------------------------------------------------------------------------------------------------- the refusals


def bad(
    name: str, change: Callable[[Tensor], Tensor], case: str = "selective-initial"
) -> tuple[Tensor, list[Tensor], RecurrenceSpec]:
    v, operands = operands_of(CASES[case])
    spec = CASES[case].spec
    named = {"v": v, **spec.named(operands)}
    named[name] = change(named[name])
    return named.pop("v"), list(named.values()), spec


BAD = {
    "float64": (bad("k", Tensor.double), r"got k\.dtype=torch\.float64"),
    "integers": (bad("v", Tensor.int), r"got v\.dtype=torch\.int32"),
    "heads": (bad("q", lambda x: x.repeat(1, 3, 1, 1)), r"got q\.shape="),
    "steps": (bad("gate", lambda x: x[:, :, :5]), r"got gate\.shape="),
    "rank": (bad("v", lambda x: x[0]), r"got v\.shape="),
    "rate": (bad("rate", lambda x: x[..., 0]), r"got rate\.shape="),
    "initial": (bad("initial", lambda x: x[:, :1]), r"got initial\.shape="),
    "one row's initial": (bad("initial", lambda x: x[:, :, 0], "gate-initial"), r"got initial\.shape="),
}


@pytest.mark.parametrize("name", BAD)
def test_operands_that_do_not_fit_are_refused(name: str) -> None:
    (v, operands, spec), why = BAD[name]
    with pytest.raises(KernelError, match=why):
        scan.forward(v, operands, spec, "bhtd")
    with pytest.raises(KernelError, match=why):
        scan.backward(v, None, None, v, operands, v, spec)


@pytest.mark.parametrize(
    "spec",
    [
        RecurrenceSpec(operands=("q", "k", "gate"), decay="key"),
        RecurrenceSpec(operands=("q", "k"), normaliser=True),
        RecurrenceSpec(operands=("q", "k", "gate", "bonus"), decay="full", read="before"),
    ],
    ids=["decay-of-rows", "normaliser", "bonus"],
)
def test_other_recurrences_are_refused(spec: RecurrenceSpec) -> None:
    assert not scan.takes(spec)
    with pytest.raises(KernelError, match="Expected one row, or a decay for each element"):
        scan.forward(torch.empty(1, 1, 2, 4), [torch.empty(1, 1, 2, 3)] * len(spec.operands), spec, "bhtd")


def test_more_rows_than_are_meant_are_refused() -> None:
    v, operands, spec = bad("v", lambda v: v)
    wide = [x.expand(-1, -1, -1, 3).repeat(1, 1, 1, 100) if name in "qk" else x for name, x in spec.named(operands).items()]
    wide[spec.operands.index("rate")] = torch.ones(1, 1, 1, 1, 1)
    wide[spec.operands.index("initial")] = torch.zeros(1, 2, 300, 6)
    with pytest.raises(KernelError, match="Expected at most 256 rows but got k.shape="):
        scan.forward(v, wide, spec, "bhtd")


if __name__ == "__main__":
    run()
