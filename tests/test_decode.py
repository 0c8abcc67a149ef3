"""Attention of few queries: its kernels, run by Triton's interpreter, against the definition in float64, and what is chosen for it.

Triton reads TRITON_INTERPRET when it is imported, so the kernels run in one process of their own: this file, started as a script,
takes the name of a case on each line of its input and answers with the errors of that case.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import effcompile
from effcompile.codegen import attention, decode
from effcompile.codegen.attention import Problem
from effcompile.codegen.hooks import Variant
from effcompile.errors import KernelError
from effcompile.ir import Decision
from effcompile.ops.attention import AttentionSpec, reference
from tests.test_attention_kernels import difference

S = "s * 0.2"
Ask = Callable[[str, str], Any]
LOWEST = torch.finfo(torch.float32).min
ANY = slice(0, 0)  # of keys: none


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention over a cache: a specification, shapes, captured tensors, and into how many parts the keys are cut.

    `unread`: keys that the mask hides, and that must not be read: they hold NaN. `cache`: how K and V lie in memory.
    """

    spec: AttentionSpec
    captures: Callable[[], list[Tensor]] = list
    sizes: tuple[int, ...] = ()
    b: int = 1
    h: int = 4
    h_kv: int = 2
    t_q: int = 1
    t_k: int = 300
    d_qk: int = 24
    d_v: int = 16
    dtype: torch.dtype = torch.float32
    out_layout: str = "bhtd"
    cache: str = "bhtd"
    splits: tuple[int | None, ...] = (None, 1, 3)
    unread: tuple[slice, ...] = ()


def spec(mask: str = "True", score: str = S, **rest: Any) -> AttentionSpec:
    return AttentionSpec(score=score, mask=mask, **rest)


def at(position: int) -> Callable[[], list[Tensor]]:
    return lambda: [torch.tensor([position])]


def padding(*kept: slice) -> Tensor:
    keep = torch.zeros(len(kept), 300, dtype=torch.bool)
    for row, part in zip(keep, kept, strict=True):
        row[part] = True
    return keep


def lowest_where_padded() -> Tensor:
    return torch.where(padding(slice(40, 300), ANY), 0.0, LOWEST)


def scattered() -> Tensor:
    mask = torch.rand(1, 1, 3, 300) < 0.3
    mask[..., 128:256] = False
    return mask


T0 = ("t0",)
OFFSET = "j <= i + t0.i[0]"
WINDOW = "(j <= i + t0.i[0]) & (i + t0.i[0] - j < 50)"
PADDED = "(j <= i + 299) & bool(t0.b[b, j])"
FIRST = "((j <= i + t0.i[0]) & (i + t0.i[0] - j < 50)) | (j < 4)"
CASES: dict[str, Case] = {
    "every-key": Case(spec=spec()),
    "one-key": Case(spec=spec(), t_k=1),
    "fewer-keys-than-a-tile": Case(spec=spec(), t_k=7),
    "several-chosen-parts": Case(spec=spec(), t_k=1100, splits=(None,)),
    "more-parts-than-tiles": Case(spec=spec(), t_k=130, splits=(7, 40)),
    "causal-offset-1": Case(spec=spec(OFFSET, captures=T0), captures=at(299)),
    "causal-offset-3": Case(spec=spec(OFFSET, captures=T0), captures=at(297), t_q=3),
    "causal-offset-16": Case(spec=spec(OFFSET, captures=T0), captures=at(284), t_q=16),
    "causal-from-nothing": Case(spec=spec("j <= i"), t_q=16, t_k=16),
    "static-cache": Case(
        spec=spec(OFFSET, captures=T0), captures=at(70), t_q=3, splits=(None, 1, 9), unread=(slice(73, 300),)
    ),
    "lengths": Case(
        spec=spec("j < t0.i[b]", captures=T0), captures=lambda: [torch.tensor([250, 3])], b=2, unread=(slice(250, 300),)
    ),
    "window": Case(spec=spec(WINDOW, captures=T0), captures=at(280), unread=(slice(0, 192), slice(281, 300)), splits=(None, 1, 4)),
    "window-16": Case(spec=spec(WINDOW, captures=T0), captures=at(280), t_q=16, unread=(slice(0, 192),)),
    "window-per-head": Case(
        spec=spec("i + 290 - j < t0.i[h]", captures=T0), captures=lambda: [torch.tensor([9, 40, 70, 1])], t_q=3,
        unread=(slice(0, 192),),
    ),
    "first-keys-and-window": Case(
        spec=spec(FIRST, captures=T0), captures=at(280), splits=(3,), unread=(slice(64, 192),)
    ),
    "chunked": Case(spec=spec("(i + 290) // 20 == j // 20"), t_q=3),
    "padding": Case(
        spec=spec(PADDED, captures=T0), captures=lambda: [padding(slice(70, 290), slice(200, 280))], b=2,
        unread=(slice(0, 64), slice(290, 300)),
    ),
    "padding-zero": Case(spec=spec(PADDED, captures=T0, empty="zero"), captures=lambda: [padding(slice(40, 300), ANY)], b=2),
    "padding-mean": Case(spec=spec(PADDED, captures=T0, empty="mean"), captures=lambda: [padding(slice(40, 300), ANY)], b=2),
    "padding-nan": Case(spec=spec(PADDED, captures=T0, empty="nan"), captures=lambda: [padding(slice(40, 300), ANY)], b=2),
    "some-rows-empty-zero": Case(spec=spec("j < i - 1", empty="zero"), t_q=5),
    "some-rows-empty-mean": Case(spec=spec("j < i - 1", empty="mean"), t_q=5),
    "dense-mask": Case(spec=spec("bool(t0.b[0, 0, i, j])", captures=T0), captures=lambda: [scattered()], t_q=3),
    "bias-of-lowest": Case(spec=spec(score=S + " + t0.f[b, j]", captures=T0), captures=lambda: [lowest_where_padded()], b=2),
    "bias-by-pair": Case(
        spec=spec(score=S + " + t0.f[0, h, i, j]", captures=T0), captures=lambda: [torch.randn(1, 4, 3, 300)], t_q=3
    ),
    "alibi": Case(
        spec=spec(OFFSET, S + " + t1.f[h] * (j - i - t0.i[0])", captures=("t0", "t1")),
        captures=lambda: [torch.tensor([297]), torch.rand(4)], t_q=3,
    ),
    "soft-cap": Case(spec=spec(score="5 * tanh(s * 0.2 / 5)"), t_q=3),
    "soft-cap-zero": Case(spec=spec("j < i - 1", score="5 * tanh(s * 0.2 / 5)", empty="zero"), t_q=5),
    "sink": Case(spec=spec(sink="t0.f[h]", captures=T0), captures=lambda: [torch.randn(4)], t_q=3, splits=(None, 1, 3, 9)),
    "sink-and-window": Case(
        spec=spec(WINDOW, sink="t1.f[h]", captures=("t0", "t1")), captures=lambda: [torch.tensor([280]), torch.randn(4)],
        splits=(1, 5),
    ),
    "sink-over-empty-rows": Case(
        spec=spec("j < i - 1", sink="t0.f[h, i]", captures=T0), captures=lambda: [torch.randn(4, 5)], t_q=5
    ),
    "sigmoid": Case(spec=spec("j <= i + 250", score="sigmoid(s * 0.2 - 3)", normaliser="none", empty="zero"), t_q=3),
    "sigmoid-window": Case(
        spec=spec(WINDOW, score="sigmoid(s * 0.2 + t1.f[h])", captures=("t0", "t1"), normaliser="none", empty="zero"),
        captures=lambda: [*at(280)(), torch.randn(4)], splits=(None, 1, 4),
    ),
    "sigmoid-no-keys": Case(spec=spec("j < i - 1", score="sigmoid(s)", normaliser="none", empty="zero"), t_q=5),
    "negative-scale": Case(spec=spec(score="-0.3 * s")),
    "scale-of-a-size": Case(spec=spec("j < n0 + 250", score="s / sqrt(n0)", sizes=("n0",)), sizes=(24,)),
    "heads-alone": Case(spec=spec(), h=2, h_kv=2, t_q=3),
    "groups-of-8": Case(spec=spec(OFFSET, captures=T0), captures=at(297), h=16, t_q=3),
    "one-head-for-64": Case(spec=spec(), h=64, h_kv=1),
    "more-rows-than-a-tile": Case(spec=spec(OFFSET, captures=T0), captures=at(297), h=64, h_kv=1, t_q=3),
    "bthd": Case(spec=spec(), cache="bthd", out_layout="bthd", b=2, t_q=3),
    "columns-apart": Case(spec=spec(), cache="apart"),
    "head-80": Case(spec=spec(), d_qk=80, d_v=80),
    "head-192-128": Case(spec=spec(), d_qk=192, d_v=128),
    "head-7-3": Case(spec=spec(), d_qk=7, d_v=3),
    "latent": Case(spec=spec(), d_qk=576, d_v=512, h=16, h_kv=1, cache="latent", t_k=70),
    "latent-narrow": Case(spec=spec(), d_qk=40, d_v=32, h=16, h_kv=1, cache="latent"),
    "latent-of-all-columns": Case(spec=spec(), d_qk=32, d_v=32, cache="latent"),
    "latent-of-few-columns": Case(spec=spec(), d_qk=40, d_v=16, cache="latent"),
    "head-576-512": Case(spec=spec(), d_qk=576, d_v=512, h=16, h_kv=1, t_k=70),
    "half": Case(spec=spec(OFFSET, captures=T0), captures=at(297), t_q=3, dtype=torch.float16),
    "half-soft-cap": Case(spec=spec(score="5 * tanh(s * 0.2 / 5)"), dtype=torch.float16),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ the process


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, with NaN where nothing may be read."""
    q = torch.randn(case.b, case.t_q, case.h, case.d_qk, dtype=case.dtype).transpose(1, 2)
    shape = (case.b, case.h_kv, case.t_k)
    k = torch.randn(*shape, case.d_qk, dtype=case.dtype)
    v = k[..., : case.d_v] if case.cache == "latent" else torch.randn(*shape, case.d_v, dtype=case.dtype)
    for keys in case.unread:
        k[:, :, keys], v[:, :, keys] = float("nan"), float("nan")
    if case.cache == "bthd":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    if case.cache == "apart":
        k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (k, v))
    return q, k, v


def errors_of(case: Case) -> dict[str, float]:
    """The largest error of each result, relative to the largest value of the definition; NaN must meet NaN, infinity infinity."""
    torch.manual_seed(0)
    captures, (q, k, v) = case.captures(), operands(case)
    clean = [x.nan_to_num(0.0) for x in (q, k, v)]
    expected, expected_lse = reference(*clean, captures, case.sizes, case.spec, dtype=torch.float64)
    if case.spec.empty == "mean" and case.spec.sink is None:  # the kernels' convention for a row without keys
        _, expected_lse = reference(*clean, captures, case.sizes, replace(case.spec, empty="nan"), dtype=torch.float64)
    errors = {}
    for splits in case.splits:
        out, lse = decode.forward(q, k, v, captures, case.sizes, case.spec, splits=splits, out_layout=case.out_layout)  # type: ignore[arg-type]
        dense = out.transpose(1, 2) if case.out_layout == "bthd" else out
        errors[f"layout in {splits} parts"] = 0.0 if dense.is_contiguous() else 1.0
        errors[f"out in {splits} parts"] = difference(out, expected)
        errors[f"lse in {splits} parts"] = difference(lse, expected_lse)
    return errors


def script_output(case: Case) -> list[str]:
    """What the kernel file prints when it is run, at a small size."""
    module = decode._module(case.spec, case.d_qk, case.d_v, case.dtype, torch.device("cpu"), None, attention._directory)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        module.main(heads=4, h_kv=2, t=100, queries=2, device="cpu")
    return printed.getvalue().splitlines()


def dispatched(case: Case) -> list[str]:
    """The kinds of kernel file that `attention.forward` writes for a case."""
    with tempfile.TemporaryDirectory() as folder:
        attention.set_directory(folder)
        attention.forward(*operands(case), case.captures(), case.sizes, case.spec)
        attention.set_directory(sys.argv[1])
        return sorted(path.name.split("_")[0] for path in Path(folder).glob("*.py"))


def serve() -> None:
    """Answers each line, what to do with which case, with one line of JSON."""
    attention.set_directory(sys.argv[1])
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            task, name = line.split()
            tasks: dict[str, Callable[[Case], Any]] = {"compare": errors_of, "script": script_output, "dispatch": dispatched}
            case = CASES.get(name) or Case(spec=spec("j <= i"), t_q=int(name), t_k=20)
            answer: dict[str, Any] = {"result": tasks[task](case)}
        except Exception:
            answer = {"failure": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


# ---------------------------------------------------------------------------------------------------------------- the kernels


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(Path(__file__).resolve()), str(tmp_path_factory.mktemp("kernels"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def ask(task: str, name: str) -> Any:
            print(task, name, file=questions, flush=True)
            answer = json.loads(answers.readline())
            assert "failure" not in answer, answer["failure"]
            return answer["result"]

        yield ask


@pytest.mark.parametrize("name", CASES)
def test_results(name: str, interpreter: Ask) -> None:
    case = CASES[name]
    limit = 1e-2 if case.dtype == torch.float16 else 1e-5
    errors = interpreter("compare", name)
    assert len(errors) == 3 * len(case.splits)
    assert {key: error for key, error in errors.items() if not error <= limit} == {}


@pytest.mark.parametrize("name", ["every-key", "padding-mean", "soft-cap", "sink", "bias-by-pair"])
def test_the_file_checks_itself(name: str, interpreter: Ask) -> None:
    lines = interpreter("script", name)
    assert [line.split(":")[0] for line in lines] == ["chosen parts", "1 parts", "3 parts"]
    assert all(float(line.split("error ")[1].split(" of")[0]) < 1e-4 for line in lines)


@pytest.mark.parametrize(("queries", "kind"), [(1, "decode"), (16, "decode"), (17, "attention")])
def test_few_queries_go_to_these_kernels(queries: int, kind: str, interpreter: Ask) -> None:
    assert interpreter("dispatch", str(queries)) == [kind]


PROBLEM = Problem(d_qk=64, d_v=64, dtype=torch.bfloat16, arch="sm_90")


@pytest.mark.parametrize("name", CASES)
def test_the_file_stands_alone(name: str) -> None:
    text = decode.source(CASES[name].spec, PROBLEM)
    assert text == decode.source(CASES[name].spec, PROBLEM)
    tree = ast.parse(text)
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"torch", "triton", "triton.language"}
    assert {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} == {"concurrent.futures"}
    assert max(map(len, text.splitlines())) < 400


@pytest.mark.parametrize(
    ("name", "narrows"),
    [("every-key", False), ("window", False), ("lengths", False), ("padding", True), ("first-keys-and-window", True)],
)
def test_visible_keys_are_looked_for_only_where_their_range_does_not_tell(name: str, narrows: bool) -> None:
    assert ("def narrow" in decode.source(CASES[name].spec, PROBLEM)) == narrows


# -------------------------------------------------------------------------------------------------------------- the launch


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        pytest.param("True", None, id="every key"),
        pytest.param("j <= i + t0.i[0]", None, id="causal"),
        pytest.param("(j <= i) & (i - j < 128)", 127, id="window"),
        pytest.param("(j <= i + n0) & (i + n0 - j < 128)", 127, id="window at an offset"),
        pytest.param("(j <= t0.i[0]) & (t0.i[0] - j < 128)", 127, id="window of one query"),
        pytest.param("(j <= i) & (i - j < n0)", None, id="window of a size"),
        pytest.param("abs(i - j) <= 7", 14, id="both sides"),
        pytest.param("((j <= i) & (i - j < 128)) | (j < 4)", None, id="first keys and window"),
    ],
)
def test_the_longest_range_of_keys(mask: str, expected: int | None) -> None:
    assert Variant(spec(mask, captures=T0, sizes=("n0",))).span == expected


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The functions on the host of one kernel file."""
    return decode._module(spec(), 64, 64, torch.bfloat16, torch.device("cpu"), None, tmp_path_factory.mktemp("launch"))


@pytest.mark.parametrize(
    ("programs", "keys", "parts"),
    [
        pytest.param(8, 32768, 33, id="one round"),
        pytest.param(128, 8192, 2, id="one round, two parts"),
        pytest.param(145, 8192, 3, id="two rounds, better filled"),
        pytest.param(200, 8192, 1, id="two rounds, no better filled"),
        pytest.param(264, 8192, 1, id="as many as there is room for"),
        pytest.param(5000, 8192, 1, id="more than there is room for"),
        pytest.param(8, 4096, 16, id="no part below 256 keys"),
        pytest.param(8, 300, 1, id="few keys"),
        pytest.param(1, 0, 1, id="no keys"),
    ],
)
def test_parts_fill_one_or_two_rounds(programs: int, keys: int, parts: int, launch: Any) -> None:
    assert launch.split_count(programs, keys, 2 * 132) == parts


@pytest.mark.parametrize(
    ("d_qk", "d_v", "expected"),
    [
        (128, 128, (128, 0, 128)),
        (576, 512, (512, 64, 512)),
        (192, 128, (128, 64, 128)),
        (80, 80, (64, 16, 128)),
        (112, 112, (128, 0, 128)),
        (7, 3, (16, 0, 16)),
        (24, 16, (32, 0, 16)),
    ],
)
def test_depths_beyond_a_power_of_two_are_cut_in_two(d_qk: int, d_v: int, expected: tuple[int, int, int], launch: Any) -> None:
    assert launch.widths(d_qk, d_v) == expected


def test_values_within_the_keys_are_found_by_where_they_lie(launch: Any) -> None:
    k = torch.randn(2, 1, 10, 576)
    assert launch.is_latent(k, k[..., :512], 512)
    assert not launch.is_latent(k, k[..., :256], 512), "fewer columns than the block"
    assert not launch.is_latent(k, k[..., 64:], 512), "other columns"
    assert not launch.is_latent(k, k[..., :512].clone(), 512), "other memory"


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (96, 96), (128, 128), (256, 256), (576, 512)], ids=str)
def test_every_problem_has_a_configuration(arch: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    tiles = decode.default_config(spec(), Problem(d_qk=dims[0], d_v=dims[1], dtype=dtype, arch=arch)).tiles
    heights = [tile.block_m for tile in tiles]
    assert heights[0] == 16 and heights == sorted(set(heights))
    assert all(16 <= tile.block_n <= 128 and tile.num_stages >= 1 for tile in tiles)


def test_depths_beyond_576_are_refused() -> None:
    with pytest.raises(KernelError, match="Expected head dimensions up to 576 but got d_qk=640"):
        decode.source(spec(), replace(PROBLEM, d_qk=640))


# -------------------------------------------------------------------------------------------------------------- the choice


def repeated(x: Tensor, n: int) -> Tensor:
    return x[:, :, None].expand(x.shape[0], x.shape[1], n, *x.shape[2:]).reshape(x.shape[0], -1, *x.shape[2:])


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ repeated(k, q.shape[1] // k.shape[1]).mT * 0.1
    return torch.softmax(scores, -1) @ repeated(v, q.shape[1] // v.shape[1])


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 50 * torch.tanh(q @ repeated(k, q.shape[1] // k.shape[1]).mT / 50)
    return torch.softmax(scores, -1) @ repeated(v, q.shape[1] // v.shape[1])


def windowed(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    i, j = position + torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    scores = q @ repeated(k, q.shape[1] // k.shape[1]).mT * 0.1
    scores = scores.masked_fill((j > i) | (i - j >= 128), torch.finfo(q.dtype).min)
    return torch.softmax(scores, -1) @ repeated(v, q.shape[1] // v.shape[1])


def latent(q: Tensor, c: Tensor) -> Tensor:
    return torch.softmax(q @ c.mT * 0.1, -1) @ c[..., :512]


def cached(heads: int = 32, h_kv: int = 8, t_q: int = 1, t_k: int = 8192, depth: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((1, heads, t_q, depth), (1, h_kv, t_k, depth), (1, h_kv, t_k, depth))
    return tuple(torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)  # type: ignore[return-value]


def decided(f: Callable[..., Tensor], *args: Tensor) -> Decision:
    torch.compiler.reset()
    (decision,) = effcompile.explain(f, *args, hardware="h100-sxm").decisions
    return decision


def memory_us(decision: Decision, candidate: str = "triton") -> float:
    return next(e.memory_s for e in decision.estimates if e.candidate == candidate) * 1e6


@pytest.mark.parametrize(
    ("f", "args"),
    [
        pytest.param(plain, cached(), id="what SDPA could do too"),
        pytest.param(plain, cached(t_q=4), id="four queries"),
        pytest.param(capped, cached(), id="soft-cap"),
        pytest.param(windowed, (*cached(), torch.tensor([8191])), id="window"),
        pytest.param(latent, cached(depth=576, h_kv=1, t_k=32768)[:2], id="576 and 512"),
    ],
)
def test_the_generated_kernels_are_chosen(f: Callable[..., Tensor], args: tuple[Tensor, ...]) -> None:
    decision = decided(f, *args)
    assert (decision.outcome, decision.chosen) == ("rewritten", "triton")


def test_deeper_heads_than_the_backward_takes_only_for_few_queries_without_gradient() -> None:
    few, cache = cached(depth=576, h_kv=1)[:2]
    many = few.expand(-1, -1, 64, -1).contiguous()
    trained = few.clone().requires_grad_()
    names = [{e.candidate for e in decided(latent, q, cache).estimates} for q in (few, many, trained)]
    assert ["triton" in found for found in names] == [True, False, False]


def test_keys_are_read_once_however_many_heads_share_them() -> None:
    many, few = decided(plain, *cached(heads=64)), decided(plain, *cached(heads=8))
    assert memory_us(many) == pytest.approx(memory_us(few), rel=0.05)
    assert memory_us(decided(plain, *cached(t_k=4096))) == pytest.approx(memory_us(few) / 2, rel=0.05)


def test_flash_attention_shares_keys_in_a_group_only_for_one_query() -> None:
    one, four = (memory_us(decided(plain, *cached(t_q=n)), "sdpa-flash") for n in (1, 4))
    alone = memory_us(decided(plain, *cached(t_q=4, heads=8)), "sdpa-flash")
    assert four > 1.5 * one and alone == pytest.approx(one, rel=0.05)


def test_a_window_reads_its_keys_alone() -> None:
    decision = decided(windowed, *cached(), torch.tensor([8191]))
    assert memory_us(decision) < 0.5 * memory_us(decided(plain, *cached()))


def test_one_program_does_not_use_the_whole_bandwidth() -> None:
    lone, filled = decided(plain, *cached(heads=4, h_kv=1, t_k=256)), decided(plain, *cached(heads=4, h_kv=1, t_k=32768))
    assert memory_us(lone) > memory_us(filled) / 128 * 10


if __name__ == "__main__":
    serve()
