"""What the benchmarks measure: their attentions are rewritten, their formulas agree with their sources, their tables render."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effcompile.config import Config
from effcompile.pipeline import Pipeline
from tests.vocabulary import GPU, assert_rewritten

ROOT = Path(__file__).resolve().parent.parent
ROWS = (
    "causal-4k", "causal-16k", "window-16k", "softcap-8k", "documents-16k", "alibi-8k", "diffusion-8k", "mla-8k", "sinks-8k",
)  # fmt: skip
DECODES = ("gqa-b1-32k", "gqa-b16-8k", "sinks-b16-8k", "latent-b16-8k")
LONG = 131072


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a benchmark as the scripts import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def small(load: Any, name: str) -> Any:
    """A row of the attention benchmark at 256 tokens."""
    return replace(next(row for row in load("attention_rows").ROWS if row.name == name), tokens=256)


def inputs_of(row: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    shapes = ((row.heads, row.width), (row.kv_heads, row.width), (row.kv_heads, row.value_width))
    return tuple(torch.randn(1, heads, row.tokens, width, dtype=dtype) for heads, width in shapes)


def test_all_rows_are_tested(load):
    assert tuple(row.name for row in load("attention_rows").ROWS) == ROWS
    assert tuple(row.name for row in load("decode").ROWS) == DECODES


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_rewritten(load, name):
    row = small(load, name)
    assert_rewritten(row.source, *inputs_of(row, torch.bfloat16), *row.extra("cpu", row.tokens, row.heads))


@pytest.mark.parametrize("name", DECODES)
def test_a_decoding_is_rewritten(load, name):
    row = replace(next(row for row in load("decode").ROWS if row.name == name), tokens=256)
    report = assert_rewritten(row.source, *row.inputs("cpu"))
    assert {d.chosen for d in report.decisions} == {"triton"}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_what_its_source_says(load, name):
    row = small(load, name)
    q, k, v = inputs_of(row, torch.float64)
    extra = row.extra("cpu", row.tokens, row.heads)
    gradient = torch.randn(1, row.heads, row.tokens, row.value_width, dtype=torch.float64)
    found = load("attention_reference").reference(row, q, k, v, extra, gradient, torch.float64)
    with load("cpu_attention").FullPrecisionSoftmax():
        expected = row.source(q, k, v, *(x.double() if x.is_floating_point() else x for x in extra))
    torch.testing.assert_close(found["out"], expected)


@pytest.mark.parametrize("name", ["window-16k", "documents-16k", "alibi-8k", "diffusion-8k"])
def test_a_dense_mask_says_the_same(load, name):
    row = small(load, name)
    q, k, v = inputs_of(row, torch.bfloat16)
    extra = row.extra("cpu", row.tokens, row.heads)
    found = load("attention_contenders").sdpa_mask(row, extra, "cpu")(q, k, v)
    torch.testing.assert_close(found, row.source(q, k, v, *extra), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["causal-4k", "softcap-8k", "sinks-8k"])
def test_no_dense_mask_where_it_would_say_less(load, name):
    assert load("attention_contenders").sdpa_mask(small(load, name), (), "cpu") is None


@pytest.mark.parametrize("mask", ["causal", "window", "documents", "block diffusion"])
def test_no_tensor_of_all_pairs_is_left(load, mask):
    """At 131072 tokens, on tensors without memory: no node of the rewritten graph is larger than the queries."""
    row = load("mask_memory").row_of(mask, LONG)
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        result = Pipeline(Config.resolve(None, {"hardware": GPU})).run(module, inputs)
        assert result.error is None and result.module is not None
        graphs.append(result.module)
        return lambda *_: (torch.empty(1, row.heads, row.tokens, row.width, dtype=torch.bfloat16),)

    with FakeTensorMode():
        inputs, extra = inputs_of(row, torch.bfloat16), row.extra("cpu", row.tokens, row.heads)
        torch.compile(row.source, backend=backend, fullgraph=True)(*inputs, *extra)
    (graph,) = graphs
    values = [node.meta.get("val") for node in graph.graph.nodes]
    sizes = [x.numel() for x in values if isinstance(x, torch.Tensor)]
    assert sizes and max(sizes) <= row.heads * row.tokens * row.width


ENVIRONMENT = {"device": "NVIDIA H100", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc", "date": "2026-01-01"}


def rendered(load: Any, payload: dict[str, Any]) -> list[str]:
    """The lines of a payload's table, without the header."""
    tables: ModuleType = load("tables")
    lines = tables.SECTIONS[payload["benchmark"]]({"environment": ENVIRONMENT, **payload}).splitlines()
    return [line for line in lines if line.startswith("|")][2:]


def test_table_of_lengths(load):
    results = [
        {"contender": "effcompile", "tokens": 512, "status": "ok", "ms": 0.1, "peak_mb": 6.1, "ms_per_4096": 0.8},
        {"contender": "softmax attention", "tokens": 512, "status": "oom"},
    ]
    payload = {"benchmark": "recurrence-length", "form": "gla", "heads": 32, "width": 128, "crossover": 512, "results": results}
    assert rendered(load, payload) == ["| 512 | 0.800 | - | 6 | - |"]


def test_table_of_decoding(load):
    common = {"row": "gla", "batch": 16, "status": "ok"}
    results = [
        {**common, "contender": "eager", "graph_ms": 0.4},
        {**common, "contender": "inductor", "graph_ms": 0.2},
        {**common, "contender": "effarch", "graph_ms": 0.1, "of_floor": 0.9, "decided": ["rewritten: triton"]},
        {**common, "batch": 128, "contender": "eager", "graph_ms": 0.4},
    ]
    assert rendered(load, {"benchmark": "recurrent-decode", "results": results}) == [
        "| gla | 16 | 4.00x | 2.00x | 0.90 | rewritten: triton |"
    ]


def test_table_of_recurrences(load):
    common = {"row": "gla", "size": "b1-t8k-h32-d128", "status": "ok", "mode": "forward"}
    results = [
        {**common, "contender": "effcompile", "ms": 0.4, "of_floor": 0.28, "first_s": 4.2, "errors": {"out": 2e-3, "dq": 3e-3}},
        {**common, "contender": "fla", "ms": 0.8, "of_floor": 0.14, "first_s": 41.0, "errors": {"out": 4e-3}},
        {**common, "contender": "effcompile", "mode": "forward+backward", "status": "crash"},
        {**common, "row": "hgrn", "contender": "effcompile", "ms": 0.4, "of_floor": None, "first_s": 4.2, "errors": {"out": 1e-3}},
        {**common, "row": "hgrn", "contender": "fla", "status": "no result in 9 s"},
    ]
    assert rendered(load, {"benchmark": "recurrence", "results": results}) == [
        "| gla | 1, 8k, 32, 128 | forward | 2.00x | 0.28 | 3e-03 | 4 | 41 |",
        "| hgrn | 1, 8k, 32, 128 | forward | no result in 9 s | - | 1e-03 | 4 | - |",
    ]


def test_table_of_training(load):
    common = {"tokens": 8192, "status": "ok"}
    results = [
        {**common, "contender": "effarch", "ms": 100.0, "peak_mb": 500, "error_vs_eager": 0.987},
        {**common, "contender": "inductor", "ms": 250.0, "peak_mb": 5000},
        {**common, "contender": "eager", "status": "oom"},
        {**common, "contender": "effarch-sdpa", "status": "crash"},
        {**common, "contender": "inductor-sdpa", "ms": 90.0, "peak_mb": 500},
    ]
    assert rendered(load, {"benchmark": "training", "size": {"layers": 4}, "results": results}) == [
        "| 8192 | as written | out of memory | 2.50x | 0.90x | 0.10 | 0.99 |",
        "| 8192 | SDPA | crash | - | - | - | - |",
    ]


def test_table_of_growing_lengths(load):
    results = [
        {"tokens": 4096, "contender": "standard", "status": "ok", "ms": 30.0, "peak_mb": 4000.0},
        {"tokens": 4096, "contender": "rewritten", "status": "ok", "ms": 10.0, "peak_mb": 500.0},
        {"tokens": 32768, "contender": "standard", "status": "oom"},
        {"tokens": 32768, "contender": "rewritten", "status": "ok", "ms": 90.0, "peak_mb": 900.0},
    ]
    assert rendered(load, {"benchmark": "flash-attention", "size": {"layers": 4}, "results": results}) == [
        "| 4096 | 3.00x | 8.00x |",
        "| 32768 | out of memory | out of memory |",
    ]


def test_table_of_masks(load):
    results = [
        {"mask": "causal", "tokens": 65536, "contender": "effarch", "status": "ok", "extra_mb": 0.0},
        {"mask": "causal", "tokens": 65536, "contender": "inductor", "status": "oom"},
        {"mask": "causal", "tokens": 65536, "contender": "sdpa-mask", "status": "cannot express it"},
    ]
    assert rendered(load, {"benchmark": "mask-memory", "results": results}) == [
        "| causal | 65536 | 4096 | 0.0 | out of memory | cannot express it |"
    ]


def test_table_of_experts(load):
    common = {"shape": "qwen3-30b", "status": "ok", "of_floor": 0.5}
    results = [
        {**common, "case": "1", "contender": "effarch", "ms": 0.3, "graph_ms": 0.05},
        {**common, "case": "1", "contender": "grouped", "ms": 0.9, "graph_ms": 0.2},
        {**common, "case": "1", "contender": "eager", "ms": 3.0},
        {**common, "case": "1", "contender": "inductor-batched", "ms": 0.9, "graph_ms": 0.1},
        {**common, "case": "1", "contender": "effarch-plain", "ms": 0.9, "graph_ms": 0.04},
        {**common, "case": "train-8192", "contender": "effarch", "ms": 4.0},
        {**common, "case": "train-8192", "contender": "inductor-grouped", "ms": 6.0},
        {**common, "case": "train-8192", "contender": "eager", "status": "not tried: too large"},
        {**common, "case": "train-8192", "contender": "batched", "status": "does not fit"},
        {**common, "case": "zipf-4096", "contender": "effarch", "status": "crash"},
        {**common, "case": "16", "contender": "grouped", "ms": 1.0},
    ]
    found = {"saved_vs_grouped": {"qwen3-30b": 0.3}, "zipf_vs_uniform": {"qwen3-30b": {"time": 1.1}}, "largest_first_s": 4.2}
    payload = {"benchmark": "moe", "results": results, "bars": {"effarch": {**found, "largest_error_vs_eager": 1.04}}}
    assert rendered(load, payload) == [
        "| qwen3-30b | 1 | 60.00x | 4.00x | - | 2.00x | 2.00x | 2.50x | 0.50 |",
        "| qwen3-30b | 8192, forward + backward | not tried | - | out of memory | 1.50x | 1.50x | - | 0.50 |",
        "| qwen3-30b | 4096, skewed | crash | - | - | - | - | - | - |",
    ]
    text = load("tables").moe({"environment": ENVIRONMENT, **payload})
    assert "forward: 2.00x in the geometric mean, 2.00x at the least" in text
    assert "grouped_mm keeps: 0.30 (qwen3-30b)" in text and "uniform one: 1.10 (qwen3-30b)" in text
    assert "first call took 4.2 s" in text and "1.04 times eager's" in text


def test_table_of_upcycling(load):
    curve = lambda *ends: [{"tokens": 10 * n, "perplexity": x, "train_s": 2.0 * n} for n, x in enumerate(ends, 1)]  # noqa: E731
    payload = {"benchmark": "moe-upcycling", "size": "tiny", "plan": {"experts": 8}}
    payload["curves"] = {"dense, before": curve(9, 8), "dense, after": curve(8, 7), "upcycled": curve(8, 6.5)}
    payload["weights"] = {"dense": {"all": 1000, "active": 1000}, "upcycled": {"all": 4000, "active": 1010}}
    assert rendered(load, payload) == ["| dense | 1,000 | 1,000 | 7.000 |", "| upcycled | 4,000 | 1,010 | 6.500 |"]


LAYERS = ("qwen3-30b", "mixtral-8x7b", "deepseek-v3")


def layer_of(load: Any, name: str, source: str, routing: str = "uniform", tokens: int = 48) -> tuple[Any, ...]:
    """A tiny layer of the benchmark of experts: its shape, itself, x, and the experts that x is drawn for."""
    pytest.importorskip("transformers")
    layers = load("moe_layers")
    shape, generator = layers.SMOKE[name], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = layers.hugging_face(shape, "eager" if source == "plain" else source, "cpu")
    ids = layers.draw(shape, tokens, routing, generator)
    x = layers.tokens_for(ids, layer.gate.weight.detach(), generator)
    return shape, layers.Plain(shape, layer) if source == "plain" else layer, x, ids


@pytest.mark.parametrize("source", ["eager", "grouped_mm", "batched_mm", "plain"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_experts_are_what_float64_says(load, name, source):
    layers, relative = load("moe_layers"), load("common").relative_l2
    shape, layer, x, ids = layer_of(load, name, source, "zipf")
    x, gradient, checked = x.requires_grad_(), torch.randn(x.shape).bfloat16(), (0, 3)
    wanted = layers.exact(shape, layer, x[0], ids, gradient[0], checked)
    out, named = layer(x), layers.leaves(layer)
    grads = torch.autograd.grad(out, (x, *(named[key] for key in ("router", "up", "down"))), gradient)
    got = {"out": out.detach()[0], "dx": grads[0][0], "drouter": grads[1]}
    got |= {key: grad[list(checked)] for key, grad in zip(("dup", "ddown"), grads[2:], strict=True)}
    assert wanted.keys() == got.keys()
    assert {key: error for key in wanted if not (error := relative(got[key], wanted[key])) < 0.015} == {}


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
@pytest.mark.parametrize("name", LAYERS)
def test_tokens_go_to_the_experts_they_are_drawn_for(load, name, routing):
    shape, layer, x, ids = layer_of(load, name, "eager", routing, tokens=512)
    assert all(len(set(row)) == shape.k for row in ids.tolist())
    differ = (layer.gate(x[0])[2].sort(-1).values != ids.sort(-1).values).sum()
    assert int(differ) == 0
    counts = torch.bincount(ids.flatten(), minlength=shape.experts)
    assert counts.min() > 0 and bool(counts.max() > 1.7 * counts.float().mean()) == (routing == "zipf")


@pytest.mark.parametrize("source", ["grouped_mm", "batched_mm", "plain"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_experts_are_rewritten(load, name, source):
    _, layer, x, _ = layer_of(load, name, source)
    assert_rewritten(layer, x, family="experts")


@pytest.mark.parametrize(
    ("name", "tokens", "active", "backward", "expected"),
    [
        ("qwen3-30b", 1, 8, False, 0.0253), ("qwen3-30b", 16, 82, False, 0.258), ("qwen3-30b", 4096, 128, False, 0.414),
        ("qwen3-30b", 16384, 128, False, 1.58), ("qwen3-30b", 8192, 128, True, 2.37), ("mixtral-8x7b", 1, 2, False, 0.235),
        ("mixtral-8x7b", 4096, 8, False, 3.65), ("mixtral-8x7b", 8192, 8, True, 21.9), ("deepseek-v3", 1, 8, False, 0.266),
        ("deepseek-v3", 16384, 256, False, 16.5),
    ],
)  # fmt: skip
def test_floors_of_layers_of_experts(load, name, tokens, active, backward, expected):
    """Milliseconds at the measured peaks of an H100, worked out by hand."""
    layers, (operations, bandwidth) = load("moe_layers"), load("attention").PEAKS["H100"]
    shape = layers.SHAPES[name]
    work = layers.flops(shape, tokens, backward=backward), layers.traffic(shape, tokens, active, backward=backward)
    assert max(work[0] / operations, work[1] / bandwidth) * 1e3 == pytest.approx(expected, rel=0.01)


def test_what_does_not_fit_is_not_tried(load):
    moe, shapes = load("moe"), load("moe_layers").SHAPES
    known = moe.cases(smoke=False)
    tried = lambda contender: [  # noqa: E731
        (shape, case.name) for shape in shapes for case in known.values()
        if moe.unfit(shapes[shape], moe.CONTENDERS[contender], case) is None
    ]  # fmt: skip
    assert len(tried("effarch")) == len(tried("grouped")) == 3 * len(known)
    assert ("deepseek-v3", "train-8192") not in tried("eager") and ("qwen3-30b", "train-8192") in tried("eager")
    assert ("qwen3-30b", "256") in tried("batched") and ("qwen3-30b", "4096") not in tried("batched")


def test_bars_of_layers_of_experts(load):
    moe = load("moe")
    common = {"shape": "qwen3-30b", "status": "ok", "rewritten": 1, "active": 128}
    results = [
        {**common, "case": "16", "contender": "effarch", "ms": 9.0, "graph_ms": 1.0, "first_s": 3.0, "errors": {"out": 0.002}},
        {**common, "case": "16", "contender": "grouped", "ms": 2.0, "graph_ms": 1.6, "errors": {"out": 0.004}},
        {**common, "case": "4096", "contender": "effarch", "ms": 2.0, "first_s": 4.0, "rewritten": 0},
        {**common, "case": "4096", "contender": "inductor-grouped", "ms": 1.8},
        {**common, "case": "zipf-4096", "contender": "effarch", "ms": 2.2, "first_s": 4.0, "active": 120},
        {**common, "case": "train-8192", "contender": "effarch", "ms": 1.0, "first_s": 5.0, "saved_mb": 3.0},
        {**common, "case": "train-8192", "contender": "grouped", "ms": 3.0, "saved_mb": 10.0},
        {**common, "case": "train-8192", "contender": "eager", "status": "oom"},
    ]
    moe.add_error_ratios(results)
    assert moe.bars(results)["effarch"] == {
        "not_rewritten": [["qwen3-30b", "4096"]],
        "forward_geometric_mean": 1.2,
        "forward_least": 0.9,
        "train": {"qwen3-30b": 3.0},
        "slower_than_a_peer": [["qwen3-30b", "4096", 0.9]],
        "saved_vs_grouped": {"qwen3-30b": 0.3},
        "zipf_vs_uniform": {"qwen3-30b": {"time": 1.1, "active": [120, 128]}},
        "largest_first_s": 5.0,
        "largest_error_vs_eager": 0.5,
    }


@pytest.mark.parametrize("wanted", [3.0, 1000e9], ids=["some", "more than there is"])
def test_processes_wait_for_memory(load, wanted):
    moe = load("moe")
    room = moe.Room(moe.MEMORY)
    with room.taken(wanted):
        assert room.free == moe.MEMORY - min(wanted, moe.MEMORY)
    assert room.free == moe.MEMORY


def script(path: str, *arguments: str) -> None:
    """Run a script of the repository as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / path), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_training_runs(tmp_path):
    out = tmp_path / "training.json"
    script("benchmarks/training.py", "--tiny", "--device", "cpu", "--contenders", "eager,effarch,effarch-sdpa", "--out", str(out))
    payload = json.loads(out.read_text())
    found = {r["contender"]: r for r in payload["results"]}
    assert payload["smoke"] and {r["status"] for r in found.values()} == {"ok"}
    assert found["effarch"]["attentions"] == 2 and found["eager"]["error"] < 1e-5
    assert all(r["error_vs_eager"] <= 2 for r in found.values())


@pytest.mark.slow
def test_layers_of_experts_run(tmp_path):
    out = tmp_path / "moe.json"
    options = ("--smoke", "--device", "cpu", "--jobs", "1", "--shapes", "qwen3", "--cases", "64,zipf,train")
    script("benchmarks/moe.py", *options, "--contenders", "effarch,effarch-plain,grouped,eager", "--out", str(out))
    payload = json.loads(out.read_text())
    assert payload["smoke"] and len(payload["results"]) == 12
    assert all(r["status"] == "ok" and max(r["errors"].values()) < 0.015 for r in payload["results"])
    assert all(r["error_vs_eager"] <= 2 for r in payload["results"])
    assert all(r["saved_mb"] > 0 for r in payload["results"] if r["case"].startswith("train"))
    assert payload["bars"].keys() == {"effarch", "effarch-plain"}


@pytest.mark.slow
def test_masks_run(tmp_path):
    out = tmp_path / "masks.json"
    script("benchmarks/mask_memory.py", "--tokens", "256", "--masks", "documents", "--device", "cpu", "--out", str(out))
    found = {r["contender"]: r["status"] for r in json.loads(out.read_text())["results"]}
    assert found == dict.fromkeys(("effarch", "flex", "sdpa-mask", "inductor"), "ok")


@pytest.mark.slow
def test_attention_runs(tmp_path):
    out = tmp_path / "attention.json"
    options = ("--rows", "diffusion", "--scale", "32", "--contenders", "eager,effarch,sdpa-mask", "--device", "cpu")
    script("benchmarks/attention.py", *options, "--out", str(out))
    results = json.loads(out.read_text())["results"]
    assert len(results) == 6 and all(r["status"] == "ok" and r["error_vs_eager"] <= 2 for r in results)


@pytest.mark.slow
def test_growing_lengths_run(tmp_path):
    script("examples/flash_attention.py", "--tokens", "128,256", "--device", "cpu", "--out", str(tmp_path))
    (out,) = tmp_path.glob("flash-attention-*.json")
    found = json.loads(out.read_text())["results"]
    assert [r["status"] for r in found] == ["ok"] * 4
    assert all(r["attention"] == 2 and r["difference"] < 1e-5 for r in found if r["contender"] == "rewritten")
    assert len(out.with_suffix(".md").read_text().splitlines()) == 4
    script("examples/flash_attention.py", "--draw", str(out))


def test_plot_of_growing_lengths(load, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    found = [
        ("standard", "ok", 128, 2.0),
        ("rewritten", "ok", 128, 1.0),
        ("standard", "oom", 256, None),
        ("rewritten", "ok", 256, 3.0),
    ]
    results = [{"contender": name, "status": status, "tokens": n, "ms": x, "peak_mb": x} for name, status, n, x in found]
    payload = {"environment": ENVIRONMENT, "size": {"layers": 2}, "results": results}
    assert load("flash_attention").plot(payload, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["attention-h100", "recurrence-length-h100"])
def test_a_result_is_drawn(load, tmp_path, name):
    pytest.importorskip("matplotlib")
    plots = load("plots")
    payload = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    figure = plots.PLOTS[payload["benchmark"]](payload)
    names = {r["contender"] for r in payload["results"]} - set(plots.LEFT_OUT)
    for axes in figure.axes:
        assert {text.get_text() for text in axes.get_legend().get_texts()} == names
