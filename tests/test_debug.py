"""effcompile.debug: the captured graph, one pass by itself, and a compile as files that run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import effcompile
from effcompile import debug, standalone
from effcompile.config import Config
from effcompile.errors import CaptureError, ConfigError, LiftError
from effcompile.explain import Frame
from effcompile.passes import PASSES
from effcompile.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("replace_where_possible")

ROOT = Path(__file__).resolve().parent.parent
GPU = "h100-sxm"


class Block(torch.nn.Module):
    """Two attentions: one that is taken, and one whose weights are used elsewhere."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8))

    def forward(self, q, k, v):
        x = torch.nn.functional.dropout(torch.softmax(q @ k.mT / 2, dim=-1), 0.1, self.training) @ (v * self.scale)
        weights = (x @ k.mT).softmax(-1)
        return weights @ v, weights.sum()


def attend(q, k, v):
    return torch.softmax(q @ k.mT / 2, dim=-1) @ v


def qkv(t=16):
    return [torch.randn(2, 2, t, 8) for _ in range(3)]


def broken(q, k, v):
    x = attend(q, k, v)
    torch._dynamo.graph_break()
    return attend(x, k, v)


# capture ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Block().eval(), attend], ids=["module", "function"])
def test_capture(model):
    inputs = qkv()
    graph = debug.capture(model, *inputs)
    targets = {node.target for node in graph.graph.nodes}
    assert {torch.ops.aten.matmul.default, torch.ops.aten.softmax.int} <= targets
    expected = model(*inputs)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    torch.testing.assert_close(list(graph(*debug.example_inputs(graph))), expected)


def test_capture_keyword_arguments():
    q, k, v = qkv()
    assert isinstance(debug.capture(attend, q, v=v, k=k), torch.fx.GraphModule)


def test_capture_of_several_graphs():
    message = r"one graph but got 2: use effcompile.debug.capture_all(.|\n)*graph break: .*graph_break"
    with pytest.raises(CaptureError, match=message):
        debug.capture(broken, *qkv())
    assert len(debug.capture_all(broken, *qkv())) == 2


def test_capture_of_no_graph():
    with pytest.raises(CaptureError, match="one graph but got 0"):
        debug.capture(lambda: 3)


def test_capture_of_what_cannot_be_lifted(monkeypatch):
    def refuse(*_):
        raise LiftError("Expected something else")

    monkeypatch.setattr(debug.trace, "lift", refuse)
    with pytest.raises(LiftError, match="something else"):
        debug.capture_all(attend, *qkv())


def test_capture_of_a_compiled_model():
    """Captured from the original, and what was compiled stays compiled."""
    compiled_graphs = []

    def backend(module, inputs):
        compiled_graphs.append(module)
        return module.forward

    model = torch.compile(Block().eval(), backend=backend)
    inputs = qkv()
    model(*inputs)
    for _ in range(12):  # more than the recompile limit
        assert debug.capture(model, *inputs) is not None
    model(*inputs)
    assert len(compiled_graphs) == 1


# one pass -----------------------------------------------------------------------------------------------------------------


def test_run_pass():
    inputs = qkv()
    graph = debug.capture(Block().eval(), *inputs)
    before = graph.print_readable(print_output=False)
    result, log = debug.run_pass("attention", graph, hardware=GPU)
    assert graph.print_readable(print_output=False) == before
    assert "effcompile.attention" in result.code and "effcompile.attention" not in graph.code
    torch.testing.assert_close(result(*debug.example_inputs(graph)), graph(*debug.example_inputs(graph)))
    first, second = [entry for entry in log if entry.name == "attention"]
    assert (first.outcome, first.chosen, first.spec["mask"]) == ("rewritten", "triton", "True")
    assert (second.outcome, second.step) == ("refused", "uses") and "probabilities" in second.why
    assert first.where.endswith(f"test_debug.py:{_line('x = torch.nn')}") and second.where.endswith(f":{_line('.softmax(-1)')}")


def _line(text):
    return next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


def test_log_entries_are_lines():
    _, log = debug.run_pass("attention", debug.capture(Block().eval(), *qkv()), hardware=GPU)
    lines = [str(entry) for entry in log]
    assert all("\n" not in line for line in lines)
    assert any("attention at softmax_int (" in line and "test_debug.py" in line and "rewritten as triton" in line for line in lines)
    assert any("refused at step 'uses': the probabilities are also used by sum" in line for line in lines)
    json.dumps([entry.to_dict() for entry in log])


def test_normalize_runs_first_where_it_has_not():
    def written_out(q, k, v):
        e = torch.exp(q @ k.mT)
        return e / e.sum(-1, keepdim=True) @ v

    graph = debug.capture(written_out, *qkv())
    _, log = debug.run_pass("attention", graph, hardware=GPU)
    assert [(entry.name, entry.outcome) for entry in log] == [("normalize", "applied"), ("attention", "rewritten")]
    normalized, log = debug.run_pass("normalize", graph)
    assert [entry.name for entry in log] == ["normalize"] and "softmax" in normalized.code
    _, log = debug.run_pass("attention", normalized, hardware=GPU)
    assert [entry.name for entry in log] == ["attention"]


def recurrent(x):
    h, out = torch.zeros(3), []
    for t in range(len(x)):
        h = torch.tanh(h + x[t])
        out.append(h)
    return torch.stack(out)


@pytest.mark.parametrize("steps", [6, 64])
def test_what_became_of_a_loop(steps, caplog):
    graph = debug.capture(recurrent, torch.randn(steps, 3))
    with caplog.at_level("DEBUG", logger="effcompile"):
        result, log = debug.run_pass("loops", graph)
    loop, *others = [entry for entry in log if entry.name == "loops"]
    assert not others and loop.where.endswith(f"test_debug.py:{_line('h = torch.tanh')}")
    if steps == 64:
        assert (loop.outcome, loop.why) == ("applied", "a loop of 64 steps as a scan") and "scan" in result.code
        assert "graph: a loop of 64 steps" in caplog.text
    else:
        assert (loop.outcome, loop.step) == ("refused", "reroll") and "is not linear" in loop.why
        assert loop.why in caplog.text and "test_debug.py:" in caplog.text


def test_a_loop_that_stays_unrolled_is_no_site():
    """It is told where passes are debugged, not in the table of what was decided."""
    report = effcompile.explain(recurrent, torch.randn(6, 3))
    assert not report.decisions and report.to_dict()["rules"]["loops"][:2] == [0, 1]


def test_a_refusal_in_training():
    _, log = debug.run_pass("attention", debug.capture(Block().train(), *qkv()))
    assert ("refused", "uses") in [(entry.outcome, entry.step) for entry in log]


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_runs_by_itself(name):
    graph = debug.capture(attend, *qkv())
    result, _ = debug.run_pass(name, graph)
    torch.testing.assert_close(result(*debug.example_inputs(graph)), graph(*debug.example_inputs(graph)))


@pytest.mark.parametrize(
    ("name", "hardware", "message"),
    [
        ("atention", None, "one of normalize, chunked, experts, loops, attention, .* but got name='atention'"),
        ("attention", "h100", "but got 'h100'"),
    ],
    ids=["pass", "hardware"],
)
def test_unknown_names(name, hardware, message):
    graph = debug.capture(attend, *qkv())
    with pytest.raises(ConfigError, match=message):
        debug.run_pass(name, graph, hardware=hardware)


# dump ---------------------------------------------------------------------------------------------------------------------


def dumped(model, inputs, folder, **kwargs):
    effcompile.explain(model, *inputs, hardware=GPU, dump=folder, **kwargs)
    return sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)


def execute(path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_dump_of_a_graph(tmp_path):
    (folder,) = dumped(Block().eval(), qkv(), tmp_path)
    stages = ["0-lifted", *(f"{n}-{name}" for n, name in enumerate(PASSES, 1))]
    names = {path.name for path in folder.iterdir()}
    assert {f"{stage}.py" for stage in stages} | {f"{stage}.diff" for stage in stages[1:]} <= names
    assert {"attempts.txt", "report.json"} <= names
    difference = (folder / "5-attention.diff").read_text()
    assert "\n+" in difference and "torch.ops.effcompile.attention.default(" in difference
    assert (folder / "6-sdpa.diff").read_text() == "# nothing changed\n"
    attempts = (folder / "attempts.txt").read_text().splitlines()
    assert len(attempts) == 2 and "rewritten as triton" in attempts[0] and "refused" in attempts[1]
    report = json.loads((folder / "report.json").read_text())
    assert [d["outcome"] for d in report["decisions"]] == ["rewritten", "refused"]
    kernel = folder / "kernels" / report["attempts"][0]["kernel"]
    compile(kernel.read_text(), str(kernel), "exec")


def test_dumped_graphs_run(tmp_path):
    (folder,) = dumped(Block().eval(), qkv(), tmp_path)
    for stage in ("0-lifted", "5-attention"):
        assert execute(folder / f"{stage}.py") == "output 0: torch.float32 [2, 2, 16, 8]\noutput 1: torch.float32 []\n"


def test_dumped_graphs_agree(tmp_path):
    """The rewritten file computes what the lifted one does, from the same random inputs."""
    (folder,) = dumped(Block().eval(), qkv(), tmp_path)
    results = []
    for stage in ("0-lifted", "5-attention"):
        scope = {"__name__": stage, "__file__": str(folder / f"{stage}.py")}
        exec(compile((folder / f"{stage}.py").read_text(), stage, "exec"), scope)
        results.append(scope["Graph"]()(*scope["inputs"]()))
    torch.testing.assert_close(*results)


def everything(x, ids, table):
    """Integers, constants small and large, a checkpointed body, modes, a symbolic size."""
    big = torch.tensor(list(range(100)))
    x = checkpoint(lambda a: torch.softmax(a @ a.mT, -1) @ a, x, use_reentrant=False) + torch.tensor([1.0, float("inf")]).min()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = x @ table
    with torch.no_grad():
        y = table[ids] + big[ids].unsqueeze(-1)
    return x, y, x.shape[0]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_dump_of_everything_runs(tmp_path, dynamic):
    inputs = [torch.randn(6, 8, requires_grad=True), torch.tensor([3, 7, 0]), torch.randn(8, 8)]
    if dynamic:
        torch._dynamo.mark_dynamic(inputs[0], 0)
    (folder,) = dumped(everything, inputs, tmp_path)
    for path in sorted(folder.glob("*.py")):
        assert "output 0: torch.bfloat16 [6, 8]\noutput 1: torch.float32 [3, 8]\n" in execute(path)


class WithConstants(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("small", torch.tensor([1.0, float("-inf"), float("nan")]))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("large", torch.arange(1000.0).view(10, 100))

    def forward(self, x):
        return torch.nan_to_num(x[:1] * self.small).sum() + (x[:1] * self.large).sum() + (x * self.flags), 3


def test_constants_are_kept(tmp_path):
    module = torch.fx.symbolic_trace(WithConstants())
    text = standalone.write(tmp_path / "constants.py", module, [torch.zeros(2)], "Constants.")
    assert "torch.tensor([1.0, -inf, nan], dtype=torch.float32, device='cpu')" in text and "CONSTANTS['Graph.large']" in text
    scope = {"__name__": "constants", "__file__": str(tmp_path / "constants.py")}
    exec(text, scope)
    torch.testing.assert_close(scope["Graph"]()(torch.ones(2)), module(torch.ones(2)))
    assert execute(tmp_path / "constants.py") == "output 0: torch.float32 [2]\noutput 1: 3\n"


def test_dumps_do_not_overwrite_each_other(tmp_path):
    first = dumped(broken, qkv(), tmp_path)
    assert len(first) == 2
    for _ in range(2):
        debug.dump(tmp_path, Pipeline(Config.resolve()), Frame(name="twice", outcome="unchanged"))
    assert {path.name for path in tmp_path.iterdir()} >= {"twice", "twice-1"}


def test_the_walk_through_is_true(tmp_path):
    """docs/debugging-a-pass.md shows what really happens."""
    page = (ROOT / "docs" / "debugging-a-pass.md").read_text()
    path = tmp_path / "model.py"
    path.write_text(page.split("```python\n")[1].split("```")[0])
    scope = {"__name__": "model"}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    graph = debug.capture(scope["Attention"](), *scope["example_inputs"])
    _, (entry,) = debug.run_pass("attention", graph, hardware=GPU)
    assert str(entry).replace(str(tmp_path), "/home/me") in page
