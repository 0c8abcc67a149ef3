"""The upcycling example: it starts where the dense model stopped, at equal active weights, and its experts are rewritten."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from effcompile import backend
from effcompile.config import Config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module."""
    for folder in ("benchmarks", "examples"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("moe_upcycling")


def dense_model(example: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return example.Llama(example.TINY, example.fused_attention).to(dtype)


@pytest.mark.parametrize("experts", [2, 8])
def test_an_upcycled_model_computes_what_the_dense_one_did(example, experts):
    dense = dense_model(example, torch.float64)
    sparse = example.upcycle(dense, experts)
    tokens = torch.randint(256, (2, 40))
    torch.testing.assert_close(sparse(tokens), dense(tokens), rtol=1e-9, atol=1e-9)


def test_each_token_takes_both_halves_of_one_copy(example):
    layer = example.Experts(dense_model(example).layers[0].feed_forward, 8)
    x = torch.randn(64, 128)
    ids = (x @ layer.router.T).topk(2).indices.sort(-1).values
    assert (ids[:, 1] == ids[:, 0] + 4).all() and ids[:, 0].unique().numel() == 4


def test_active_weights_are_the_dense_models_and_the_routers(example):
    dense = dense_model(example)
    before, after = (example.weight_counts(model) for model in (dense, example.upcycle(dense, 8)))
    assert before["active"] == before["all"] and before["routers"] == 0
    assert after["routers"] == 2 * 8 * 128
    assert after["active"] == before["active"] + after["routers"] < after["all"]


def test_balance_is_least_where_experts_are_used_alike(example):
    layer = example.Experts(dense_model(example).layers[0].feed_forward, 8)
    x = torch.randn(1, 512, 128)
    layer(x)
    even = float(layer.balance.detach())
    layer(x + 20 * layer.router[0])
    assert 0.9 < even < 1.3 < float(layer.balance.detach())


def test_files_are_trained_on_or_held_out(example, tmp_path, monkeypatch):
    for position in range(12):
        (tmp_path / f"{position:02}.py").write_bytes(bytes([position]))
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_bytes(b"other")
    monkeypatch.setattr(example.sysconfig, "get_path", lambda name: str(tmp_path))
    training, held_out = example.corpus()
    assert held_out.tolist() == [0, 10] and training.tolist() == [*range(1, 10), 11]


def test_windows_are_consecutive_bytes(example):
    text = torch.arange(100, dtype=torch.uint8)
    assert example.windows(text, torch.tensor([3, 90]), 4).tolist() == [[3, 4, 5, 6, 7], [90, 91, 92, 93, 94]]


def test_a_model_that_is_not_rewritten_is_told(example):
    model = example.upcycle(dense_model(example), 4)
    with pytest.raises(SystemExit, match="Expected 2 layers of experts rewritten in training"):
        example.assert_rewritten(model, example.loss_of, torch.randint(256, (1, 17)))


compile_with = torch.compile


def without_inductor(f: Any, **options: Any) -> Any:
    """As `torch.compile(backend="effarch")`, but what the backend makes of a graph is not compiled further."""

    def inner(graph: Any, inputs: Any, tag: Any) -> Any:
        return aot_eager(graph, inputs)

    compiled = lambda module, inputs: backend.compile_graph(module, inputs, Config.resolve(None, {}), inner)  # noqa: E731
    return compile_with(f, **{**options, "backend": compiled})


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["aot_eager", "inductor"])
def test_a_few_steps(example, tmp_path, monkeypatch, inductor):
    text = torch.frombuffer(bytearray((ROOT / "examples" / "moe_upcycling.py").read_bytes()), dtype=torch.uint8)
    monkeypatch.setattr(example, "corpus", lambda: (text[:-2000], text[-2000:]))
    if not inductor:
        monkeypatch.setattr(torch, "compile", without_inductor)
    plan = replace(example.PLANS["tiny"], steps=6, every=3, windows=4, batch=4)
    payload = example.run(plan, "cpu", tmp_path / "found.json", "tiny")
    assert json.loads((tmp_path / "found.json").read_text()) == payload
    assert payload["effarch"]["layers"] == payload["effarch"]["training"] == payload["effarch"]["evaluation"] == 2
    assert payload["effarch"]["gradient_difference"] < 1e-4
    curves = payload["curves"]
    assert [p["tokens"] for p in curves["upcycled"]] == [3072, 4608, 6144] == [p["tokens"] for p in curves["dense, after"]]
    start = curves["dense, before"][-1]["perplexity"]
    assert curves["upcycled"][0]["perplexity"] == pytest.approx(start, rel=1e-4)
    assert all(points[-1]["perplexity"] < 0.9 * points[0]["perplexity"] for points in curves.values())
    assert example.table(payload).splitlines()[2].startswith("| 3072 |")
    if importlib.util.find_spec("matplotlib"):
        assert example.plot(payload, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
