"""The generated attention kernels, run by Triton's interpreter, against plain torch in float64; and built for GPUs without one.

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effcompile.codegen import attention, emit, hopper
from effcompile.errors import KernelError
from effcompile.ops.attention import AttentionSpec
from tests.interpreter import Ask, interpreted, serve

S = "s * 0.2"
T = 97
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention: a specification, shapes, and how to make its captured tensors from (B, H, TQ, TK)."""

    spec: AttentionSpec
    captures: Callable[[], list[Tensor]] = list
    sizes: tuple[int, ...] = ()
    b: int = 1
    h: int = 2
    h_kv: int = 1
    t_q: int = T
    t_k: int = T
    d_qk: int = 24
    d_v: int = 16
    dtype: torch.dtype = torch.float32
    out_layout: str = "bhtd"
    checks: tuple[str, ...] = ("out", "lse", "dq", "dk", "dv", "t0", "t1", "t2")
    tiles: tuple[int, int] = (32, 32)
    limit: float = 1e-5
    lse_learns: bool = False


def documents(length: int = T) -> Tensor:
    return torch.stack([torch.arange(length) // 30, (torch.arange(length) >= length // 2).long()])


def left_padding() -> Tensor:
    keep = torch.ones(2, T, dtype=torch.bool)
    keep[0, :40] = False
    return keep


def dense_mask() -> Tensor:
    mask = torch.rand(1, 1, T, T) < 0.3
    mask[..., 0] = True
    mask[..., 32:64, 32:96] = False  # whole tiles: empty
    mask[..., 64:96, 0:32] = True  # and full
    return mask


def buckets(length: int = T) -> Tensor:
    return torch.randint(0, 9, (length, length))


def additive_causal() -> Tensor:
    return torch.where(torch.arange(T)[:, None] >= torch.arange(T), 0.0, LOWEST)[None, None]


def spec(mask: str = "j <= i", score: str = S, **rest: Any) -> AttentionSpec:
    return AttentionSpec(score=score, mask=mask, **rest)


def weighed(score: str, mask: str = "j <= i", **rest: Any) -> AttentionSpec:
    """The score is the weight: no softmax."""
    return spec(mask, score, normaliser="none", empty="zero", **rest)


T0, T1, SEED = ("t0",), ("t0", "t1"), ("seed",)
N = 45  # of cases with learned tensors


def learning(
    score: str,
    captures: Callable[[], list[Tensor]],
    mask: str = "j <= i",
    learned: tuple[str, ...] = T0,
    empty: str = "impossible",
    **rest: Any,
) -> Case:
    """A case whose captured tensors get a gradient."""
    names = tuple(f"t{at}" for at in range(len(captures())))
    written = spec(mask, score, captures=names, learned=learned, empty=empty)
    return Case(spec=written, captures=captures, **{"t_q": N, "t_k": N, **rest})


PADDED = "(j <= i) & bool(t0.b[b, j])"
CASES: dict[str, Case] = {
    "causal": Case(spec=spec(), h=4, h_kv=2),
    "causal-bthd": Case(spec=spec(), out_layout="bthd"),
    "full": Case(spec=spec("True"), t_k=130),
    "full-one-key": Case(spec=spec("True"), t_k=1),
    "one-query": Case(spec=spec("j <= i + 129"), t_q=1, t_k=130),
    "multi-query": Case(spec=spec(), h=3, h_kv=1),
    "window": Case(spec=spec("(j <= i) & (i - j < 20)")),
    "window-wider-than-a-tile": Case(spec=spec("(j <= i) & (i - j < 70)"), t_q=192, t_k=192),
    "window-per-head": Case(spec=spec("(j <= i) & (i - j < t0.i[h])", captures=T0), captures=lambda: [torch.tensor([9, 40])]),
    "both-sides": Case(spec=spec("abs(i - j) <= 7")),
    "chunked": Case(spec=spec("(i // 20 == j // 20) & (j <= i)")),
    "block-causal": Case(spec=spec("i // 16 >= j // 16")),
    "prefix": Case(spec=spec("(j <= i) | (j < n0)", sizes=("n0",)), sizes=(29,)),
    "first-keys-and-window": Case(spec=spec("((j <= i) & (i - j < 10)) | ((j <= i) & (j < 3))")),
    "cache-offset": Case(spec=spec("j <= i + t0.i[0]", captures=T0), captures=lambda: [torch.tensor([60])], t_k=157),
    "lengths": Case(spec=spec("j < t0.i[b]", captures=T0), captures=lambda: [torch.tensor([50, 3])], b=2),
    "documents": Case(spec=spec("(j <= i) & (t0.i[b, i] == t0.i[b, j])", captures=T0), captures=lambda: [documents()], b=2),
    "documents-both-ways": Case(spec=spec("t0.i[0, i] == t0.i[0, j]", captures=T0), captures=lambda: [documents()[:1]], b=2),
    "dense-mask": Case(spec=spec("bool(t0.b[0, 0, i, j])", captures=T0), captures=lambda: [dense_mask()]),
    "blocks-of-each-head": Case(
        spec=spec("bool(t0.b[b, h, i // 16, j // 16]) & (j <= i)", captures=T0, empty="zero"),
        captures=lambda: [torch.rand(2, 2, 3, 3) < 0.4], b=2, t_q=N, t_k=N, tiles=(16, 16),
    ),
    "padding-zero": Case(spec=spec(PADDED, captures=T0, empty="zero"), captures=lambda: [left_padding()], b=2),
    "padding-mean": Case(spec=spec(PADDED, captures=T0, empty="mean"), captures=lambda: [left_padding()], b=2),
    "padding-nan": Case(spec=spec(PADDED, captures=T0, empty="nan"), captures=lambda: [left_padding()], b=2, checks=("out", "lse")),
    "empty-mean-without-table": Case(spec=spec("(j <= i) & (i < 50)", empty="mean")),
    "empty-zero-without-table": Case(spec=spec("(j < i) & (i - j < 9)", empty="zero")),
    "soft-cap": Case(spec=spec(score="5 * tanh(s * 0.2 / 5)")),
    "soft-cap-beyond-float-range": Case(spec=spec(score="500 * tanh(s / 100)"), limit=1e-4),
    "soft-cap-sink": Case(
        spec=spec(score="5 * tanh(s / 25)", sink="t0.f[h]", captures=T0, learned=T0), captures=lambda: [torch.randn(2)]
    ),
    "alibi": Case(spec=spec(score=S + " + t0.f[h] * (j - i)", captures=T0), captures=lambda: [torch.rand(2)]),
    "negative-scale": Case(spec=spec(score="-0.3 * s")),
    "scale-of-a-size": Case(spec=spec(score="s / sqrt(n0)", sizes=("n0",)), sizes=(24,)),
    "bias": Case(spec=spec("True", S + " + t0.f[0, h, i, j]", captures=T0), captures=lambda: [torch.randn(1, 2, T, T)]),
    "bias-strided": Case(
        spec=spec("j <= i", S + " + t0.f[0, h, i, j]", captures=T0), captures=lambda: [torch.randn(1, T, T, 2).permute(0, 3, 1, 2)]
    ),
    "bias-of-lowest": Case(spec=spec("True", S + " + t0.f[0, 0, i, j]", captures=T0), captures=lambda: [additive_causal()]),
    "bias-by-key": Case(
        spec=spec("True", S + " + t0.f[b, j]", captures=T0), captures=lambda: [torch.where(left_padding(), 0.0, LOWEST)], b=2
    ),
    "bias-from-buckets": Case(
        spec=spec("j <= i", S + " + t0.f[t1.i[i, j], h]", captures=T1), captures=lambda: [torch.randn(9, 2), buckets()]
    ),
    "bias-relative": Case(
        spec=spec("True", S + " + t0.f[h, j - i + 96]", captures=T0), captures=lambda: [torch.randn(2, 2 * T)]
    ),
    "score-of-where": Case(spec=spec("True", f"where(j <= i, {S}, -inf)")),
    "sink": Case(spec=spec("(j <= i) & (i - j < 13)", sink="t0.f[h]", captures=T0, learned=T0), captures=lambda: [torch.randn(2)]),
    "sink-doubled": Case(spec=spec(sink="2 * t0.f[h // 2, 0]", captures=T0, learned=T0), captures=lambda: [torch.randn(2, 3)], h=3),
    "softmax-plus-one": Case(spec=spec(sink="0")),
    "sink-over-empty-rows": Case(
        spec=spec("j < i - 5", sink="t0.f[h, i]", captures=T0, learned=T0), captures=lambda: [torch.randn(2, T)]
    ),
    "learned-bias": learning(S + " + t0.f[0, h, i, j]", lambda: [torch.randn(1, 2, N, N)], b=2),
    "learned-bias-of-all-heads": learning(S + " + t0.f[i, j]", lambda: [torch.randn(N, 30)], mask="True", h=3, t_k=30),
    "learned-bias-of-a-longer-table": learning(
        S + " + t0.f[h, i, j]", lambda: [torch.randn(2, N + 3, 60)], mask="abs(i - j) <= 7"
    ),
    "learned-bias-of-each-entry": learning(S + " + t0.f[b, h, i, j]", lambda: [torch.randn(2, N, N, 2).permute(0, 3, 1, 2)], b=2),
    "learned-buckets": learning(S + " + t0.f[t1.i[i, j], h]", lambda: [torch.randn(9, 2), buckets(N)], b=2),
    "learned-buckets-in-documents": learning(
        S + " + t0.f[t1.i[i, j], h]", lambda: [torch.randn(9, 2), buckets(N), documents(N)], mask="t2.i[b, i] == t2.i[b, j]", b=2
    ),
    "learned-relative": learning(S + " + t0.f[h, j - i + 44]", lambda: [torch.randn(2, 2 * N)], b=2),
    "learned-slopes": learning(S + " + t0.f[h] * (j - i)", lambda: [torch.rand(2)], b=2),
    "learned-slopes-in-documents": learning(
        S + " + t0.f[h] * (j - i) + t0.f[0]", lambda: [torch.rand(2), documents(N)], mask="t1.i[b, i] == t1.i[b, j]", b=2
    ),
    "learned-by-key": learning(S + " + t0.f[b, j]", lambda: [torch.randn(2, N)], b=2),
    "learned-by-key-in-documents": learning(
        S + " * t0.f[j]", lambda: [torch.randn(N), documents(N)], mask="(j <= i) & (t1.i[b, i] == t1.i[b, j])", b=2
    ),
    "learned-temperature": learning("s * t0.f[()]", lambda: [torch.rand(())], b=2),
    "learned-soft-capped": learning(
        "5 * tanh((s * 0.2 + t0.f[h, i // 8, j // 8]) / 5) + t1.f[h, i]",
        lambda: [torch.randn(2, 6, 6), torch.randn(2, N)], learned=T1,
    ),
    "learned-with-empty-rows": learning(
        S + " + t0.f[h, i, j]", lambda: [torch.randn(2, N, N), left_padding()[:, :N]], mask="(j <= i) & bool(t1.b[b, j])",
        b=2, empty="mean",
    ),
    "log-sum-exp": Case(spec=spec(), lse_learns=True, t_q=N, t_k=N),
    "log-sum-exp-of-some-rows": replace(
        learning("5 * tanh(s / 25) + t0.f[h, i, j]", lambda: [torch.randn(2, N, N)], "(j < i) & (i - j < 9)", empty="zero"),
        lse_learns=True,
    ),
    "log-sum-exp-with-a-sink": Case(
        spec=spec(sink="t0.f[h]", captures=T0, learned=T0), captures=lambda: [torch.randn(2)], lse_learns=True, t_q=N, t_k=N
    ),
    "dropout": Case(spec=spec(captures=SEED, dropout=0.3), captures=lambda: [torch.tensor(1 << 40)], t_q=N, t_k=N),
    "dropout-with-a-bias-and-a-sink": replace(
        learning(S + " + t0.f[h, i, j]", lambda: [torch.randn(2, N, N), torch.randn(2), torch.tensor(5)], b=2),
        spec=spec(
            "abs(i - j) < 9", S + " + t0.f[h, i, j]", sink="t1.f[h]", captures=(*T1, *SEED), learned=T1, dropout=0.5
        ),
        lse_learns=True,
    ),
    "dropout-in-documents": Case(
        spec=spec("t0.i[b, i] == t0.i[b, j]", captures=(*T0, *SEED), dropout=0.1),
        captures=lambda: [documents(N), torch.tensor(7)], b=2, t_q=N, t_k=N, tiles=(16, 32),
    ),
    "sigmoid-gate": Case(spec=spec(score="s * sigmoid(s)")),
    "sigmoid": Case(spec=weighed("sigmoid(s * 0.2 - 4.5)"), h=4, h_kv=2),
    "sigmoid-far-from-zero": Case(spec=weighed("sigmoid(40 * s)", "True"), limit=1e-4),
    "sigmoid-window-of-few-keys": Case(spec=weighed("sigmoid(s * 0.2)", "(j < i) & (i - j < 9)")),
    "sigmoid-in-documents": Case(
        spec=weighed("sigmoid(s * 0.2 - 3)", "(j <= i) & (t0.i[b, i] == t0.i[b, j])", captures=T0),
        captures=lambda: [documents()], b=2,
    ),
    "sigmoid-shared-among-rows": Case(spec=weighed("sigmoid(s * 0.2) / (i + 1)"), t_q=N, t_k=N),
    "sigmoid-alibi": replace(
        learning("sigmoid(s * 0.2 + t0.f[h] * (j - i) + t1.f[h])", lambda: [torch.rand(2), torch.randn(2)], b=2),
        spec=weighed("sigmoid(s * 0.2 + t0.f[h] * (j - i) + t1.f[h])", captures=T1, learned=T1),
    ),
    "sigmoid-learned-bias-with-dropout": replace(
        learning("s", lambda: [torch.randn(2, N, N), torch.tensor(3)], b=2),
        spec=weighed("sigmoid(s * 0.2 + t0.f[h, i, j])", "abs(i - j) < 9", captures=(*T0, *SEED), learned=T0, dropout=0.4),
    ),
    "squared-relu": Case(spec=weighed("max(0, s * 0.2) ** 2"), t_q=N, t_k=N),
    "half-sigmoid": Case(spec=weighed("sigmoid(s * 0.2 - 4.5)"), dtype=torch.float16, d_qk=64, d_v=64),
    "head-80": Case(spec=spec(), d_qk=80, d_v=80, t_q=65, t_k=65),
    "head-96-64": Case(spec=spec(), d_qk=96, d_v=64, h_kv=2, t_q=65, t_k=65),
    "half": Case(spec=spec(), dtype=torch.float16, d_qk=64, d_v=64),
    "half-soft-cap": Case(spec=spec(score="5 * tanh(s * 0.2 / 5)"), dtype=torch.float16, d_qk=64, d_v=64),
    "uneven-tiles": Case(spec=spec("(j <= i) & (i - j < 20)"), tiles=(16, 64)),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ the process


def errors_of(case: Case) -> dict[str, float]:
    """The largest error of each result, relative to the largest value of the reference; NaN must meet NaN, infinity infinity."""
    torch.manual_seed(0)
    captures = case.captures()
    q = torch.randn(case.b, case.t_q, case.h, case.d_qk, dtype=case.dtype).transpose(1, 2)
    k = torch.randn(case.b, case.h_kv, case.t_k, 2 * case.d_qk, dtype=case.dtype)[..., ::2]
    v = torch.randn(case.b, case.h_kv, case.t_k, case.d_v, dtype=case.dtype)
    launch = attention.Launch(block_m=case.tiles[0], block_n=case.tiles[1])
    config = attention.Config(forward=launch, dq=launch, dkv=launch, captured=launch)
    out, lse = attention.forward(q, k, v, captures, case.sizes, case.spec, config=config, out_layout=case.out_layout)  # type: ignore[arg-type]
    grad = torch.randn(out.shape, dtype=out.dtype)
    grad_lse = torch.randn(lse.shape) if case.lse_learns else None
    dq, dk, dv, learned = attention.backward(
        grad, q, k, v, out, lse, captures, case.sizes, case.spec, config=config, grad_lse=grad_lse
    )
    names = ("dq", "dk", "dv", *case.spec.learned)
    ours = {"out": out, "lse": lse, **dict(zip(names, (dq, dk, dv, *learned), strict=True))}

    problem = attention.Problem(d_qk=case.d_qk, d_v=case.d_v, dtype=case.dtype, arch="cpu")
    module = emit.load_kernel(emit.write_kernel(attention.source(case.spec, problem, config=config), attention._directory))
    tensors = [x.double() if x.is_floating_point() else x for x in captures]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    leaves += [tensors[case.spec.captures.index(name)].requires_grad_() for name in case.spec.learned]
    expected, expected_lse = module.reference(*leaves[:3], *tensors, *case.sizes)
    results, weights = (expected,), (grad.double(),)
    if grad_lse is not None:
        results, weights = (expected, torch.where(expected_lse.isfinite(), expected_lse, 0.0)), (*weights, grad_lse.double())
    grads = torch.autograd.grad(results, leaves, weights)
    theirs = {"out": expected, "lse": expected_lse, **dict(zip(names, grads, strict=True))}
    dense = out.transpose(1, 2) if case.out_layout == "bthd" else out
    return {"layout": 0.0 if dense.is_contiguous() else 1.0} | {name: difference(ours[name], theirs[name]) for name in theirs}  # type: ignore[arg-type]


def difference(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    special = ~torch.isfinite(theirs)
    same = torch.equal(torch.nan_to_num(ours[special], nan=1.5), torch.nan_to_num(theirs[special], nan=1.5))
    if not same or not torch.isfinite(ours[~special]).all():
        return math.inf
    if (~special).sum() == 0:
        return 0.0
    return ((ours - theirs)[~special].abs().max() / theirs[~special].abs().max().clamp(min=0.5)).item()


def script_output(case: Case) -> list[str]:
    """What the kernel file prints when it is run, at a small size."""
    problem = attention.Problem(d_qk=case.d_qk, d_v=case.d_v, dtype=case.dtype, arch="cpu")
    module = emit.load_kernel(emit.write_kernel(attention.source(case.spec, problem), attention._directory))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.main(heads=2, h_kv=1, t=48, device="cpu")
    return printed.getvalue().splitlines()


def run() -> None:
    """Answers what to do with which case."""
    attention.set_directory(sys.argv[1])
    torch.set_num_threads(1)
    tasks: dict[str, Callable[[Case], Any]] = {"compare": errors_of, "script": script_output}
    serve({task: lambda name, do=do: do(CASES[name]) for task, do in tasks.items()})


# -------------------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with interpreted(__file__, tmp_path_factory.mktemp("kernels")) as ask:
        yield ask


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name: str, interpreter: Ask) -> None:
    case = CASES[name]
    errors = interpreter("compare", name)
    limit = 1e-2 if case.dtype == torch.float16 else case.limit
    worst = {key: error for key, error in errors.items() if (key in case.checks or key == "layout") and not error <= limit}
    assert not worst


@pytest.mark.parametrize("name", ["causal", "documents", "bias-from-buckets", "prefix", "soft-cap", "padding-mean", "sigmoid"])
def test_the_file_checks_itself(name: str, interpreter: Ask) -> None:
    lines = interpreter("script", name)
    assert [line.split(":")[0].strip() for line in lines] == ["out", "dq", "dk", "dv"]
    assert all(float(line.split("error ")[1].split(" of")[0]) < 1e-4 for line in lines)


PROBLEM = attention.Problem(d_qk=64, d_v=64, dtype=torch.bfloat16, arch="sm_80")


ALONE = [name for name, case in CASES.items() if not case.spec.learned and name != "dropout"] + [
    "sink-doubled",
    "learned-soft-capped",
]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ALONE)
def test_the_file_stands_alone(name: str, arch: str) -> None:
    problem = replace(PROBLEM, arch=arch)
    text = attention.source(CASES[name].spec, problem)
    assert text == attention.source(CASES[name].spec, problem)
    tree = ast.parse(text)
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {module.partition(".")[0] for module in modules} <= {"concurrent", "functools", "torch", "triton"}
    assert max(map(len, text.splitlines())) < 400


@pytest.mark.parametrize(
    ("name", "tabled"),
    [("causal", False), ("window", False), ("prefix", False), ("lengths", False), ("cache-offset", False)]
    + [
        ("blocks-of-each-head", True),
        ("documents", True),
        ("dense-mask", True),
        ("padding-mean", True),
        ("first-keys-and-window", True),
    ],
)
def test_a_table_only_where_the_mask_needs_one(name: str, tabled: bool) -> None:
    assert ("table" in attention.source(CASES[name].spec, PROBLEM)) == tabled


def test_no_maximum_where_the_score_is_bounded() -> None:
    assert "peak = new_peak" not in attention.source(CASES["soft-cap"].spec, PROBLEM)
    assert "peak = new_peak" in attention.source(CASES["soft-cap"].spec, replace(PROBLEM, dtype=torch.float16))
    assert "peak = new_peak" in attention.source(CASES["soft-cap-sink"].spec, PROBLEM)


def test_writing_is_safe_side_by_side(tmp_path: Path) -> None:
    text = attention.source(CASES["causal"].spec, PROBLEM)
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: emit.write_kernel(text, tmp_path), range(32)))
    assert [path.read_text() for path in paths] == [text]
    assert list(tmp_path.iterdir()) == list(paths)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KernelError, match="Expected a writable directory but got directory="):
        emit.write_kernel("x = 1\n", tmp_path / "file")


def test_a_load_from_a_tensor_that_is_not_captured_is_refused() -> None:
    with pytest.raises(KernelError, match="but got tensor='t0'"):
        attention.source(spec(score="s + t0.f[i, j]"), PROBLEM)


def test_a_sink_without_a_softmax_is_refused() -> None:
    with pytest.raises(KernelError, match="Expected a softmax around a sink but got normaliser='none'"):
        attention.source(weighed("sigmoid(s)", sink="0"), PROBLEM)


def test_nothing_of_a_softmax_is_left_without_one() -> None:
    text = attention.source(weighed("sigmoid(s)"), replace(PROBLEM, arch="sm_90"))
    assert not any(word in text for word in ("new_peak", "tl.log", "delta_kernel", "gluon", "weight("))


def test_head_dimensions_beyond_256_are_refused() -> None:
    with pytest.raises(KernelError, match="Expected head dimensions up to 256 but got d_qk=576"):
        attention.source(spec(), replace(PROBLEM, d_qk=576, d_v=512))


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


BAD = {
    "dtype": (shaped(1, 2, 4, 8, dtype=torch.float64), shaped(1, 2, 4, 8), shaped(1, 2, 4, 8), [], "one dtype"),
    "rank": (shaped(2, 4, 8), shaped(1, 2, 4, 8), shaped(1, 2, 4, 8), [], "H a multiple of H_KV"),
    "heads": (shaped(1, 3, 4, 8), shaped(1, 2, 4, 8), shaped(1, 2, 4, 8), [], "H a multiple of H_KV"),
    "keys": (shaped(1, 2, 4, 8), shaped(1, 2, 5, 8), shaped(1, 2, 4, 8), [], "H a multiple of H_KV"),
    "captures": (shaped(1, 2, 4, 8), shaped(1, 2, 4, 8), shaped(1, 2, 4, 8), [shaped(1)], "but got 1 tensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_operands_that_do_not_fit_are_refused(name: str) -> None:
    q, k, v, captures, why = BAD[name]
    with pytest.raises(KernelError, match=why):
        attention.forward(q, k, v, captures, (), spec())


WHOLE = torch.empty(2, 3, 8, 64, dtype=torch.bfloat16)
UNCOPIED = {
    "sparse-rows": WHOLE[..., ::2],
    "narrow-rows": WHOLE[..., :20].contiguous(),
    "odd-address": WHOLE[..., 1:33],
    "expanded": WHOLE[:1].expand(2, 3, 8, 64),
    "empty": WHOLE[:, :, :0],
}


@pytest.mark.parametrize("name", UNCOPIED)
def test_operands_that_tile_copies_do_not_take(name: str) -> None:
    assert hopper.copies([WHOLE, WHOLE.transpose(1, 2), WHOLE[..., 8:40]])
    assert not hopper.copies([WHOLE, UNCOPIED[name]])


def test_candidates_start_with_the_default_and_differ() -> None:
    found = attention.candidates(spec(), PROBLEM)
    assert found[0] == attention.default_config(spec(), PROBLEM)
    assert len(set(found)) == len(found) > 3


@pytest.mark.parametrize("width", [64, 128, 256])
def test_candidates_for_hopper_keep_the_tiles_that_its_kernels_are_written_for(width: int) -> None:
    """128 queries, or 128 keys for dK and dV, in two groups of warps: 64 rows are what one takes."""
    problem = attention.Problem(d_qk=width, d_v=width, dtype=torch.bfloat16, arch="sm_90")
    found = attention.candidates(spec(), problem)
    assert {config.for_hopper for config in found} == {frozenset(("forward", "dq", "dkv"))}
    assert {tile.block_m for config in found for tile in (config.forward, config.dq)} == {128}
    assert {config.dkv.block_n for config in found} == {128}
    assert {config.dkv.block_m for config in found} == {32, 64}


if __name__ == "__main__":
    run()
