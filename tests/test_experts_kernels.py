"""The generated kernels of experts, run by Triton's interpreter, against the definition in float64.

Triton reads TRITON_INTERPRET when it is imported, so the kernels run in one process of their own: this file, started as a script,
takes the name of a case on each line of its input and answers with the errors of that case. Memory that nothing has written is NaN.
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
from torch.utils._pytree import tree_map

from effcompile.codegen import attention, emit, experts
from effcompile.codegen.experts_trial import Trial, disagreement, example
from effcompile.errors import KernelError
from effcompile.ops.experts import ExpertsSpec, each_operand, reference, reference_backward
from tests.interpreter import Ask, interpreted, serve

GPT_OSS = "min(gate, 7) * sigmoid(1.702 * min(gate, 7)) * (max(-7, min(up, 7)) + 1)"
RELU2 = "max(0, up) ** 2"
Ids = Callable[[int, int, int], Tensor]


def spread(t: int, k: int, experts: int) -> Tensor:
    return torch.rand(t, experts).argsort(1)[:, :k]


def dropping(t: int, k: int, experts: int) -> Tensor:
    """Some outside on either side, some experts without rows, a token without any."""
    ids = torch.randint(-1, experts + 1, (t, k))
    ids[ids == 1] = -7
    ids[0] = experts
    return ids


def on_one(t: int, k: int, experts: int) -> Tensor:
    return torch.full((t, k), experts - 1)


def nowhere(t: int, k: int, experts: int) -> Tensor:
    return torch.full((t, k), -1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer: its specification, sizes, and where tokens go. `along`: weights are dense along what is summed.

    Of blocks of 64 x 64, what is made of a product is made of its left half, then of its right one.
    """

    activation: str = "gate * up * sigmoid(gate)"
    gated: bool = True
    interleaved: bool = False
    stacking: str = "one"
    biased: tuple[bool, bool] = (False, False)
    weighted: str = "output"
    ids: Ids = spread
    t: int = 21
    k: int = 2
    experts: int = 4
    d: int = 40
    f: int = 24
    d_out: int = 40
    along: bool = True
    dtype: torch.dtype = torch.float32
    out: str = "float32"
    id_dtype: torch.dtype = torch.int64
    keep: bool = True
    height: int = 16
    columns: int = 32  # of a block
    wanted: tuple[bool, ...] = (True,) * 5
    limit: float = 2e-6

    @property
    def spec(self) -> ExpertsSpec:
        return ExpertsSpec(
            activation=self.activation, gated=self.gated, interleaved=self.interleaved, stacking=self.stacking,  # type: ignore[arg-type]
            biased=self.biased, weighted=self.weighted, out=self.out,  # type: ignore[arg-type]
        )  # fmt: skip


HALF = Case(dtype=torch.float16, out="float16", limit=2e-3)
APART = Case(stacking="experts")
OSS = Case(activation=GPT_OSS, interleaved=True, biased=(True, True), along=False)

CASES: dict[str, Case] = {
    "one": Case(columns=16),
    "pair": Case(stacking="pair"),
    "interleaved-biased": replace(OSS, columns=16),
    "ungated": Case(gated=False, activation=RELU2, d_out=56, columns=16),
    "ungated-biased-input": Case(gated=False, activation=RELU2, biased=(True, True), weighted="input"),
    "pair-biased": Case(stacking="pair", biased=(True, True), along=False),
    "input": Case(weighted="input"),
    "pair-input": Case(weighted="input", stacking="pair", k=1),
    "interleaved-input": replace(OSS, weighted="input", along=True, d_out=24),
    "halves": Case(height=64, columns=64, f=80, biased=(True, True)),
    "halves-interleaved-input": replace(OSS, height=64, columns=64, f=72, weighted="input", ids=dropping),
    "halves-ungated": Case(height=64, columns=64, f=72, gated=False, activation=RELU2),
    "unweighted": Case(weighted="none", biased=(False, True)),
    "dropped": Case(ids=dropping, k=3, id_dtype=torch.int32),
    "dropped-biased": replace(OSS, ids=dropping, k=3),
    "dropped-input": Case(ids=dropping, weighted="input", biased=(True, True)),
    "all-dropped": Case(ids=nowhere, biased=(True, True)),
    "on-one-expert": Case(ids=on_one, k=1, t=75, height=32),
    "many-experts": Case(experts=19, k=4, t=40, d=24, d_out=24, height=32),
    "whole-tiles": Case(d=64, f=32, d_out=64, t=16, k=1, ids=on_one),
    "one-token": Case(t=1),
    "one-expert": Case(experts=1, k=1, t=20),
    "no-tokens": Case(t=0),
    "no-slots": Case(k=0, biased=(True, True)),
    "frozen": Case(wanted=(True, True, False, False, False), biased=(True, True)),
    "frozen-input": Case(wanted=(True, True, False, False, False), biased=(True, True), weighted="input"),
    "weights-alone": Case(wanted=(False, True, False, False, False), weighted="input"),
    "biases-alone": Case(wanted=(False, False, False, False, True), biased=(True, True), stacking="pair"),
    "wants-nothing": Case(wanted=(False,) * 5),
    "few": Case(t=1, keep=False, experts=8, k=3),
    "few-dropped": Case(t=3, keep=False, experts=40, k=3, ids=dropping),
    "few-interleaved": replace(OSS, t=2, keep=False, experts=17, ids=dropping),
    "few-ungated": Case(t=2, keep=False, experts=16, gated=False, activation=RELU2, weighted="input", biased=(True, True)),
    "few-long": Case(t=1, keep=False, experts=8, f=200, d=70, d_out=24, along=False),
    "not-kept": Case(keep=False),
    "apart": APART,
    "apart-ungated": replace(APART, gated=False, activation=RELU2, d_out=56),
    "apart-pair-biased": replace(APART, stacking="experts_pair", biased=(True, True), along=False, columns=16),
    "apart-interleaved": replace(OSS, stacking="experts", weighted="input", ids=dropping, k=3),
    "apart-biased-dropped": replace(APART, biased=(True, True), ids=dropping),
    "apart-many-half": replace(HALF, stacking="experts_pair", experts=19, k=4, t=40, d=24, d_out=24, height=32),
    "apart-frozen": replace(APART, wanted=(True, True, False, False, False)),
    "apart-few": replace(OSS, stacking="experts", t=2, keep=False, experts=17, ids=dropping),
    "half": HALF,
    "half-interleaved": replace(HALF, activation=GPT_OSS, interleaved=True, biased=(True, True), along=False),
    "half-input": replace(HALF, out="float32", weighted="input", stacking="pair", ids=dropping),
    "half-few": replace(HALF, t=2, keep=False, experts=16),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ the process


def operands_of(case: Case) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    width = case.f * (1 if case.spec.is_pair or not case.gated else 2)
    count = 2 if case.spec.is_pair else 1

    def stored(of_all: Tensor) -> list[Tensor]:
        return [of_all] if case.spec.is_stacked else [x.clone() for x in of_all]

    def matrices(inner: int, columns: int) -> list[Tensor]:
        shape = (case.experts, columns, inner) if case.along else (case.experts, inner, columns)
        made = stored(torch.randn(shape).mul(inner**-0.5).to(case.dtype))
        return [x.mT for x in made] if case.along else made

    ids = case.ids(case.t, case.k, case.experts).to(case.id_dtype)
    weights = torch.rand(case.t, 2 * case.k)[:, ::2] if case.weighted != "none" else torch.empty(0)
    biases = [x for _ in range(count * case.biased[0]) for x in stored(torch.randn(case.experts, width))]
    biases += stored(torch.randn(case.d_out, case.experts).T) * case.biased[1]
    x = torch.randn(case.t, 2 * case.d)[:, ::2].to(case.dtype)
    return x, ids, weights, [x for _ in range(count) for x in matrices(case.d, width)], matrices(case.f, case.d_out), biases


def config_of(case: Case) -> experts.Config:
    launch = experts.Launch(block_m=case.height, block_n=case.columns, block_k=32, num_warps=4, num_stages=1, group=3)
    tile = experts.Tile(first=launch, rows=replace(launch, block_n=32), slopes=launch)
    outer = replace(launch, block_m=32, block_n=32, block_k=16)
    return experts.Config(tiles=(tile,), outer=outer, along=(16, 64), across=(32, 16))


def errors_of(case: Case, config: experts.Config | None) -> dict[str, float]:
    """The error of each result and gradient, relative to its norm; and 1.0 where strides, shapes or dtypes are not as promised."""
    spec, operands = case.spec, operands_of(case)
    x, ids, weights, up, down, biases = operands
    out, h = experts.forward(*operands, spec, keep=case.keep, config=config)
    exact = [x.double(), ids, weights.double(), *([t.double() for t in ts] for ts in (up, down, biases))]
    wanted_out, wanted_h = reference(*exact, spec, dtype=torch.float64)  # type: ignore[arg-type]
    errors = {"out": difference(out, wanted_out), "layout": float(out.dtype != spec.out_dtype)}
    if not case.keep:
        return errors | {"no-h": float(h.numel())}
    rows = int(((ids >= 0) & (ids < case.experts)).sum())
    errors |= {"h": difference(h[:rows], wanted_h[:rows]), "h-layout": float(h.dtype != x.dtype or h.shape != wanted_h.shape)}
    grad = torch.randn(out.shape).to(out.dtype)
    ours = experts.backward(grad, *operands, h, spec, case.wanted, config=config)
    theirs = reference_backward(grad.double(), *exact, spec, case.wanted, dtype=torch.float64)  # type: ignore[arg-type]
    given = list(each_operand(x, weights, up, down, biases, case.wanted))
    counted = (("up", up), ("down", down), ("bias", biases))
    names = ["x", "weights", *(f"{name}{at}" for name, tensors in counted for at in range(len(tensors)))]
    for name, (of, want), got, exact_grad in zip(names, given, ours, theirs, strict=True):
        if not want or (name == "weights" and case.weighted == "none"):
            errors[f"d{name}-size"] = float(got.numel())
            continue
        like = torch.empty_like(of)
        errors[f"d{name}"] = difference(got, exact_grad)
        errors[f"d{name}-layout"] = float((got.stride(), got.dtype, got.shape) != (like.stride(), like.dtype, like.shape))
    return errors


def difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape or not torch.isfinite(ours).all():
        return math.inf
    return 0.0 if ours.numel() == 0 else float((ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-3))


def kernels_of(case: Case) -> Any:
    text = experts.source(case.spec, experts.Problem(dtype=case.dtype, arch="cpu"), config=config_of(case))
    return emit.load_kernel(emit.write_kernel(text, attention._directory, family="experts"))


def script_output(case: Case) -> list[str]:
    """What the kernel file prints when it is run, at a small size."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        kernels_of(case).main(tokens=20, slots=2, experts=3, d=32, f=16, device="cpu")
    return printed.getvalue().splitlines()


def verdict(case: Case) -> list[str]:
    """Why the kernels of a case, and kernels that compute something else, are not trusted, forwards and backwards."""
    module, device = kernels_of(case), torch.device("cpu")
    wrong = replace(case.spec, activation="up" if not case.gated else "gate * up")
    bias_dtypes = [torch.float32] * ((2 if case.spec.is_pair else 1) * case.biased[0] + case.biased[1])
    trials = [
        Trial(
            tile=0, few=few, keep=not few, wanted=wanted, dense=(True, False), whole=(False, False, False),
            dtypes=(torch.int64, torch.float32, *bias_dtypes),
        )
        for few, wanted in ((False, None), (False, case.wanted), (True, None))
    ]  # fmt: skip
    return [disagreement(module, spec, device, trial) for spec in (case.spec, wrong) for trial in trials]


def ordered(case: Case) -> list[Any]:
    """What a counting sort of many assignments makes, and what it should."""
    module = kernels_of(case)
    torch.manual_seed(1)
    ids = dropping(2800, 3, case.experts)
    start = module.at_once(torch.device("cpu"))
    made = module.arrange(start, ids, case.experts, 64)
    flat = torch.where((ids >= 0) & (ids < case.experts), ids, case.experts).flatten()
    counts = torch.bincount(flat, minlength=case.experts + 1)[: case.experts]
    ends = counts.cumsum(0)
    order = flat.argsort(stable=True)[: int(ends[-1])]
    tiles = [(e, int(ends[e] - counts[e]) + 64 * at) for e in range(case.experts) for at in range(-(-int(counts[e]) // 64))]
    found = [tuple(pair) for pair in made["Tiles"].T.tolist()]
    return [
        made["Sorted"][: len(order)].equal(order.int()),
        made["Offsets"].tolist() == [0, *ends.tolist()],
        found[: len(tiles)] == tiles,
        {e for e, _ in found[len(tiles) :]} <= {-1},
        len(tiles) <= made["TILES"] == len(found),
        module.blocks_of(ids.numel())[0] > 1 and module.blocks_of(ids.numel())[1] > 64,
    ]


def run() -> None:
    """Answers what to do with which case."""
    attention.set_directory(sys.argv[1])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    tasks: dict[str, Callable[[Case], Any]] = {
        "compare": lambda case: errors_of(case, config_of(case)), "script": script_output, "verdict": verdict, "order": ordered
    }  # fmt: skip
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
    assert "out" in errors and ("dx-layout" in errors or not CASES[name].keep or not CASES[name].wanted[0])


@pytest.mark.parametrize("name", ["interleaved-biased", "ungated-biased-input", "pair-biased", "apart-pair-biased"])
def test_the_file_checks_itself(name: str, interpreter: Ask) -> None:
    lines = interpreter("script", name)
    case = CASES[name]
    each = 1 if case.spec.is_stacked else 3
    ups = [f"dup{at}" for at in range(2 * each if case.spec.is_pair else each)]
    expected = ["out", "dx", "dweights", *ups, *(f"ddown{at}" for at in range(each))]
    assert [line.split(":")[0].strip() for line in lines][: len(expected)] == expected
    assert all(float(line.split("error ")[1].split(" of")[0]) < 1e-5 for line in lines)


@pytest.mark.parametrize("name", ["dropped-biased", "pair-input", "apart-biased-dropped"])
def test_kernels_that_disagree_with_the_reference_are_not_trusted(name: str, interpreter: Ask) -> None:
    *right, wrong, wrong_back, wrong_few = interpreter("verdict", name)
    assert right == ["", "", ""]
    assert wrong.startswith("Expected forward kernels that agree with the reference but got out with error=")
    assert wrong_back.startswith("Expected backward kernels that agree with the reference but got x with error=")
    assert wrong_few.startswith("Expected forward kernels that agree with the reference but got out with error=")


def test_a_trial_draws_the_same_numbers_whatever_the_default_device() -> None:
    whole, dtypes = (False, False, False), (torch.int64, torch.float32)
    trial = Trial(tile=0, few=False, keep=True, wanted=None, dense=(True, False), whole=whole, dtypes=dtypes)
    wanted = example(kernels_of(Case()), Case().spec, torch.device("cpu"), trial)
    with torch.device("meta"):
        given = example(kernels_of(Case()), Case().spec, torch.device("cpu"), trial)
    assert tree_map(torch.equal, given, wanted) == (True, True, True, [True], [True], [])


@pytest.mark.parametrize("name", ["many-experts"])
def test_assignments_are_ordered_by_expert(name: str, interpreter: Ask) -> None:
    assert interpreter("order", name) == [True] * 6


WRITTEN = ("pair-biased", "interleaved-biased", "ungated-biased-input")
PROBLEM = experts.Problem(dtype=torch.bfloat16, arch="sm_90")


@pytest.mark.parametrize("name", WRITTEN)
def test_the_file_stands_alone(name: str) -> None:
    text = experts.source(CASES[name].spec, PROBLEM)
    assert text == experts.source(CASES[name].spec, PROBLEM)
    tree = ast.parse(text)
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {module.partition(".")[0] for module in modules} <= {"concurrent", "torch", "triton"}
    assert not {"GATED", "INTERLEAVED"} & {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("name", WRITTEN)
def test_products_take_what_was_loaded(name: str) -> None:
    """Nothing that a product takes was computed, or transposed: what Triton 3.2 to 3.7 gets wrong, or slow, on Hopper."""
    tree = ast.parse(experts.source(CASES[name].spec, PROBLEM))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    products = [call for call in calls if ast.unparse(call.func) == "tl.dot"]
    operands = {ast.unparse(x) for call in products for x in call.args[:2]}
    loaded = {
        ast.unparse(node.targets[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "load_inside"
    }
    assert products and operands <= loaded and "tl.trans" not in {ast.unparse(call.func) for call in calls}


@pytest.mark.parametrize(
    ("tokens", "slots", "count", "keep", "expected"),
    [
        pytest.param(1, 8, 128, False, (0, True), id="one-token"),
        pytest.param(1, 8, 128, True, (0, False), id="one-token-for-a-gradient"),
        pytest.param(4, 8, 128, False, (0, True), id="few"),
        pytest.param(16, 8, 128, False, (0, False), id="one-row-an-expert"),
        pytest.param(256, 8, 128, False, (1, False), id="16-rows"),
        pytest.param(256, 2, 8, False, (3, False), id="64-rows"),
        pytest.param(4096, 8, 128, False, (3, False), id="256-rows"),
    ],
)
def test_the_tile_follows_from_the_rows_of_an_expert(
    tokens: int, slots: int, count: int, keep: bool, expected: tuple[int, bool], tmp_path: Any
) -> None:
    module = emit.load_kernel(emit.write_kernel(experts.source(CASES["one"].spec, PROBLEM), tmp_path, family="experts"))
    assert [tile["FIRST"]["BLOCK_M"] for tile in module.TILES] == [16, 32, 64, 128]
    assert module.choice(tokens, slots, count, keep=keep) == expected


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


TWO: dict[str, Any] = {"up": [shaped(8, 8)] * 2, "down": [shaped(4, 8)] * 2, "spec": ExpertsSpec(stacking="experts")}
REFUSED = {
    "float64": (
        {"x": shaped(3, 8, dtype=torch.float64), "up": [shaped(4, 8, 8, dtype=torch.float64)],
         "down": [shaped(4, 4, 8, dtype=torch.float64)]},
        KernelError, "got x.dtype=torch.float64",
    ),
    "far-apart": ({"up": [shaped(4, 8, 8).as_strided((4, 8, 8), (8, 2**29, 1))]}, KernelError, "but got up.stride()="),
    "shapes": ({"down": [shaped(4, 5, 8)]}, ValueError, "Expected up to have the shape"),
    "count": ({"up": [shaped(4, 8, 8)] * 2}, ValueError, "Expected 1 tensors in up"),
    "strides": ({**TWO, "down": [shaped(4, 8), shaped(8, 4).T]}, KernelError, "all experts' down of the same strides"),
    "apart-by-odd": (
        {**TWO, "down": [torch.empty(4, 8), torch.empty(33)[1:].view(4, 8)]},
        KernelError, "all experts' down a multiple of 16 bytes apart",
    ),
    "no-hidden-size": ({"up": [shaped(4, 8, 0)], "down": [shaped(4, 0, 8)]}, KernelError, "Expected weights that have a size"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_do_not_take_is_refused(name: str) -> None:
    changes, error, why = REFUSED[name]
    given: dict[str, Any] = {
        "x": shaped(3, 8), "ids": shaped(3, 2, dtype=torch.int64), "weights": shaped(3, 2), "up": [shaped(4, 8, 8)],
        "down": [shaped(4, 4, 8)], "biases": [], "spec": ExpertsSpec(),
    }  # fmt: skip
    with pytest.raises(error) as caught:
        experts.forward(**{**given, **changes})
    assert why in str(caught.value)


if __name__ == "__main__":
    run()
