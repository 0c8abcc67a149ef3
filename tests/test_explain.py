"""explain: what it counts, where it points, how it reads, and that it leaves everything else alone."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import effcompile
from effcompile.errors import ConfigError
from effcompile.explain import Report, rows_of
from effcompile.ir import Decision
from effcompile.terms import from_text, score_symbol
from tests import model_zoo

pytestmark = pytest.mark.usefixtures("replace_where_possible")

GPU = "h100-sxm"


def attend(q, k, v):
    return torch.softmax(q @ k.mT / 2, dim=-1) @ v


def shared(q, k, v):
    weights = torch.softmax(q @ k.mT, dim=-1)
    return weights @ v, weights.mean()


def broken(q, k, v):
    x = attend(q, k, v)
    torch._dynamo.graph_break()
    return attend(x, k, v)


def qkv(**kwargs):
    return [torch.randn(2, 2, 16, 8, **kwargs) for _ in range(3)]


def line_of(text):
    return next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


def test_a_rewrite():
    (decision,) = effcompile.explain(attend, *qkv(), hardware=GPU).decisions
    assert (decision.family, decision.outcome, decision.chosen) == ("attention", "rewritten", "triton")
    assert decision.where == f"test_explain.py:{line_of('torch.softmax(q @ k.mT / 2')}"
    assert from_text(decision.spec["score"]).subs(score_symbol(), 3) == 1.5 and "triton" in decision.why
    assert {e.candidate for e in decision.estimates} >= {"triton", "inductor"}


def test_a_refusal():
    (decision,) = effcompile.explain(shared, *qkv(), hardware=GPU).decisions
    assert (decision.outcome, decision.step, decision.chosen) == ("refused", "uses", "")
    assert decision.why == f"the probabilities are also used by mean at test_explain.py:{line_of('weights.mean()')}"


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_where_in_a_hugging_face_model(attention):
    model, inputs = model_zoo.build("llama", attention=attention)
    report = effcompile.explain(model, **inputs, hardware=GPU)
    file = {"eager": "modeling_llama.py", "sdpa": "sdpa_attention.py"}[attention]
    for layer, decision in enumerate(report.decisions):
        module, _, line = decision.where.partition(" ")
        assert module == f"model.layers.{layer}.self_attn" and model.get_submodule(module)
        assert re.fullmatch(rf"\({file}:\d+\)", line)


class Nested(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleDict({"a": torch.nn.ModuleList([Leaf()])})

    def forward(this, q, k, v):
        return this.blocks["a"][0](q, k, v)


class Leaf(torch.nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v)


def test_module_paths_are_those_of_the_model():
    model = Nested()
    (decision,) = effcompile.explain(model, *qkv()).decisions
    path = decision.where.partition(" ")[0]
    assert path == "blocks.a.0" and isinstance(model.get_submodule(path), Leaf)


def test_every_frame_counts():
    report = effcompile.explain(broken, *qkv())
    assert [frame.outcome for frame in report.frames] == ["compiled", "compiled"]
    assert len(report.decisions) == 2 and len(report.graph_breaks) == 1
    assert report.frames_total >= 2 and report.frames_fell_back == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
def test_grad_modes(mode):
    with mode():
        report = effcompile.explain(attend, *qkv(requires_grad=True), hardware=GPU)
    assert [d.outcome for d in report.decisions] == ["rewritten"]


def test_training_and_evaluation():
    class Dropping(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.dropout(torch.softmax(q @ k.mT, -1), 0.5, self.training) @ v

    model = Dropping()
    (training,) = effcompile.explain(model.train(), *qkv(), hardware=GPU).decisions
    (evaluation,) = effcompile.explain(model.eval(), *qkv(), hardware=GPU).decisions
    assert (training.outcome, training.spec["dropout"]) == ("rewritten", 0.5)
    assert (evaluation.outcome, evaluation.spec["dropout"]) == ("rewritten", 0.0)


def test_what_was_compiled_stays_compiled():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    f, inputs = torch.compile(attend, backend=backend), qkv()
    f(*inputs)
    for _ in range(12):  # more than the recompile limit
        assert len(effcompile.explain(attend, *inputs).frames) == 1
        assert len(effcompile.explain(f, *inputs).frames) == 1
    f(*inputs)
    assert len(graphs) == 1


def test_explain_is_not_in_the_process_record():
    effcompile.reset_report()
    effcompile.explain(attend, *qkv())
    assert effcompile.last_report().frames == ()


def test_unknown_hardware():
    with pytest.raises(ConfigError, match=r"one of a100-sxm-40, .*h100-sxm.* but got 'h1000'"):
        effcompile.explain(attend, *qkv(), hardware="h1000")


def test_hardware_from_the_environment(monkeypatch):
    monkeypatch.setenv("EFFARCH_HARDWARE", GPU)
    assert effcompile.explain(attend, *qkv()).hardware == GPU


def test_to_dict_is_json():
    report = effcompile.explain(broken, *qkv(), hardware=GPU)
    record = json.loads(json.dumps(report.to_dict()))
    assert record["hardware"] == GPU and [f["sites"] for f in record["frames"]] == [1, 1]
    assert record["rules"]["attention"][:2] == [2, 2]
    for decision in record["decisions"]:
        for estimate in decision["estimates"]:
            assert estimate["total_s"] == pytest.approx(max(estimate["compute_s"], estimate["memory_s"]) + estimate["launch_s"])
    assert set(record["timings"]) == {"lift", "normalize", "loops", "match", "decide", "rewrite"}


# the text -----------------------------------------------------------------------------------------------------------------


def decision(where, outcome="rewritten", why="because", **fields):
    return Decision(family="attention", outcome=outcome, why=why, where=where, **fields)


@pytest.mark.parametrize("width", [100, 140, 160])
def test_text_fits(width):
    model, inputs = model_zoo.build("llama", attention="eager")
    text = effcompile.explain(model, **inputs, hardware=GPU).text(width)
    lines = text.split("\n")
    assert max(map(len, lines)) <= width
    assert lines[0] == "effarch on h100-sxm"
    assert "1 graph: 2 rewritten" in lines
    joined = re.sub(r"\s+", " ", text)
    assert "model.layers.0-1.self_attn" in joined and "modeling_llama.py" in joined


def test_text_of_nothing():
    assert effcompile.explain(lambda x: x + 1, torch.ones(2)).text(100).split("\n")[:2] == [
        "effarch on cpu",
        "1 graph: no site of a known family",
    ]


def test_text_is_not_markup():
    assert "[bold]" in Report(frames=(_frame(decision("x.py:1", why="a [bold] claim")),)).text(120)


def _frame(*decisions):
    from effcompile.explain import Frame

    return Frame(name="graph0", outcome="compiled", decisions=decisions)


def test_a_fallback_is_told():
    frame = dataclasses.replace(_frame(), outcome="fallback", why="Expected this but got that")
    assert "graph graph0 was handed on as it came: Expected this but got that" in str(Report(frames=(frame,)))


@pytest.mark.parametrize(
    ("places", "shown"),
    [
        (["layers.0.attn (m.py:3)", "layers.1.attn (m.py:3)", "layers.2.attn (m.py:3)"], ["layers.0-2.attn (m.py:3)"]),
        (["layers.0.attn (m.py:3)", "layers.4.attn (m.py:3)"], ["layers.{0,4}.attn (m.py:3)"]),
        (["layers.0.attn (m.py:3)", "layers.1.attn (m.py:9)"], ["layers.0.attn (m.py:3)", "layers.1.attn (m.py:9)"]),
        (["m.py:3", "m.py:4"], ["m.py:3", "m.py:4"]),
        (["m.py:3", "m.py:3"], ["m.py:3"]),
        (["a.0.b.1 (m.py:3)", "a.1.b.1 (m.py:3)"], ["a.0-1.b.1 (m.py:3)"]),
    ],
    ids=["a range", "a set", "different lines", "no module", "twice", "two numbers"],
)
def test_layers_share_a_row(places, shown):
    rows = rows_of([decision(place) for place in places])
    assert [where for _, where, _ in rows] == shown
    assert sum(count for *_, count in rows) == len(places)


def test_different_decisions_do_not_share_a_row():
    rows = rows_of([decision("a.0 (m.py:3)"), decision("a.1 (m.py:3)", "refused", "no")])
    assert [count for *_, count in rows] == [1, 1]
