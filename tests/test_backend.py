"""torch.compile(model, backend="effarch"): results and gradients as in eager in every mode of use; each option has its effect."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import effcompile
from effcompile import trace
from effcompile.errors import ConfigError, LiftError
from tests import model_zoo

pytestmark = pytest.mark.usefixtures("replace_where_possible")

GPU = "h100-sxm"  # planned for, on CPU tensors: the semantic operation runs its reference
ROOT = Path(__file__).resolve().parent.parent
HARDWARE = pytest.mark.parametrize("hardware", [None, GPU], ids=["cpu", GPU])


class Attention(nn.Module):
    """Causal attention of 4 heads over 2 key heads, between projections."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        b, t, c = x.shape
        q = self.q(x).view(b, t, 4, c // 4).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, 2, c // 4).permute(2, 0, 3, 1, 4).repeat_interleave(2, dim=2)
        scores = q @ k.mT / (c // 4) ** 0.5
        causal = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1, dtype=torch.float32).to(v.dtype)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, c))


def attend(q, k, v):
    return torch.softmax(q @ k.mT * 0.25, dim=-1) @ v


class Reports(list):
    """Receives the report of each graph."""

    __call__ = list.append

    @property
    def decisions(self):
        return [decision for report in self for decision in report.decisions]

    @property
    def outcomes(self):
        return [decision.outcome for decision in self.decisions]

    @property
    def frames(self):
        return [frame for report in self for frame in report.frames]


def compiled(model, *, fullgraph=True, dynamic=None, **options):
    reports = Reports()
    options = {"report": reports, "fallback": "error", **options}
    return torch.compile(model, backend="effarch", fullgraph=fullgraph, dynamic=dynamic, options=options), reports


def assert_settled(reports, hardware, sites=1):
    """Every site is rewritten for the GPU; on a CPU there is nothing to rewrite a site to in low precision and short training."""
    assert len(reports.outcomes) == sites
    assert set(reports.outcomes) <= ({"rewritten"} if hardware else {"rewritten", "left"})


def qkv(t=16, d=16, dtype=torch.float32, requires_grad=False):
    return [torch.randn(2, 2, t, d).to(dtype).requires_grad_(requires_grad) for _ in range(3)]


def assert_close(actual, expected, *, dtype=torch.float32):
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# modes of use -------------------------------------------------------------------------------------------------------------


@HARDWARE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_inference(hardware, dtype):
    model, x = Attention().to(dtype).eval(), torch.randn(2, 24, 32, dtype=dtype)
    f, reports = compiled(model, hardware=hardware)
    with torch.no_grad():
        assert_close(f(x), model(x), dtype=dtype)
    assert_settled(reports, hardware)


@HARDWARE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training(hardware, dtype):
    ours = Attention().to(dtype)
    theirs, x = copy.deepcopy(ours), torch.randn(2, 24, 32, dtype=dtype)
    f, reports = compiled(ours, hardware=hardware)
    for model in (f, theirs):
        model(x).float().square().mean().backward()
    assert_settled(reports, hardware)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad.abs().sum() > 0
        assert_close(mine.grad, other.grad, dtype=dtype)


@pytest.mark.parametrize("where", ["outside", "inside"])
@HARDWARE
def test_autocast(hardware, where):
    model, x = Attention(), torch.randn(2, 24, 32)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)

    def inside(x):
        with autocast:
            return model(x)

    f, reports = compiled(inside if where == "inside" else model, hardware=hardware)
    with autocast if where == "outside" else nullcontext():
        result = f(x)
    with autocast:
        expected = model(x)
    assert result.dtype == expected.dtype == torch.bfloat16
    assert_close(result, expected, dtype=torch.bfloat16)
    assert_settled(reports, hardware)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
@HARDWARE
def test_grad_modes(hardware, mode):
    f, reports = compiled(attend, hardware=hardware)
    inputs = qkv(requires_grad=True)
    with mode():
        result = f(*inputs)
    assert result.requires_grad == (mode is torch.enable_grad)
    assert result.is_inference() == (mode is torch.inference_mode)
    assert_close(result, attend(*inputs))
    assert_settled(reports, hardware)


@HARDWARE
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "automatic"])
def test_dynamic_lengths(hardware, marked):
    model = Attention().eval()
    f, reports = compiled(model, hardware=hardware)
    for t in (16, 24, 40, 33):
        x = torch.randn(2, t, 32)
        if marked:
            torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad():
            assert_close(f(x), model(x))
    assert reports.outcomes == ["rewritten"] * (1 if marked else 2)


@HARDWARE
def test_dynamic_training(hardware):
    ours = Attention()
    theirs = copy.deepcopy(ours)
    f, reports = compiled(ours, hardware=hardware, dynamic=True)
    for t in (16, 31):
        x = torch.randn(2, t, 32)
        for model in (f, theirs):
            model(x).square().mean().backward()
    assert_settled(reports, hardware)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, other.grad)


@HARDWARE
def test_mutated_input(hardware):
    def step(cache, q, k, position):
        cache.index_copy_(2, position, k)
        return attend(q, cache, cache)

    f, reports = compiled(step, hardware=hardware)
    ours, theirs = torch.zeros(2, 2, 8, 16), torch.zeros(2, 2, 8, 16)
    for position in range(3):
        q, k = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16)
        at = torch.tensor([position])
        assert_close(f(ours, q, k, at), step(theirs, q, k, at))
        assert torch.equal(ours, theirs)
    assert set(reports.outcomes) == {"rewritten"}


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@HARDWARE
def test_decoding_with_a_cache(hardware, cache):
    """Prefill and four steps of a Hugging Face model: the same tokens' logits, step by step."""
    import transformers

    model, inputs = model_zoo.build("llama", attention="sdpa")

    def decode(step):
        if cache == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=32)
        else:
            past = transformers.DynamicCache(config=model.config)
        ids, logits = inputs["input_ids"][:, :12], []
        for _ in range(5):
            out = step(input_ids=ids, past_key_values=past, use_cache=True)
            logits.append(out.logits[:, -1])
            ids = logits[-1].argmax(-1, keepdim=True)
        return torch.stack(logits)

    with torch.no_grad():
        expected = decode(model)
        f, reports = compiled(model, hardware=hardware, fullgraph=False)
        assert_close(decode(f), expected)
    assert reports.outcomes and set(reports.outcomes) <= {"rewritten", "left"}


@HARDWARE
def test_activation_checkpointing(hardware):
    ours = Attention()
    theirs, x = copy.deepcopy(ours), torch.randn(2, 24, 32, requires_grad=True)

    def run(model, x):
        return checkpoint(model, x, use_reentrant=False).square().mean()

    f, reports = compiled(run, hardware=hardware)
    grads = [torch.autograd.grad(call(model, x), [x, *model.parameters()]) for call, model in ((f, ours), (run, theirs))]
    assert_settled(reports, hardware)
    for mine, other in zip(*grads, strict=True):
        assert_close(mine, other)


def test_every_frame_of_a_broken_graph_is_reported():
    def broken(q, k, v):
        x = attend(q, k, v)
        torch._dynamo.graph_break()
        return attend(x, k, v)

    effcompile.reset_report()
    f, reports = compiled(broken, fullgraph=False)
    inputs = qkv()
    assert_close(f(*inputs), broken(*inputs))
    assert [frame.outcome for frame in reports.frames] == ["compiled", "compiled"]
    report = effcompile.last_report()
    assert len(report.frames) == 2 and len(report.graph_breaks) == 1
    assert "graph_break" in str(report)


def test_frames_that_fell_back_are_counted():
    def unsupported(q, k, v):
        for _ in range(2):
            q = attend(q, k, v)
            torch._dynamo.graph_break()
        return q

    effcompile.reset_report()
    f, _ = compiled(unsupported, fullgraph=False)
    inputs = qkv()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(f(*inputs), unsupported(*inputs))
    report = effcompile.last_report()
    assert report.frames_fell_back >= 1 and report.frames_total > report.frames_fell_back
    assert "ran eagerly without a graph break" in str(report)


def test_sites_in_a_row():
    """A site whose operands are the result of another."""
    f, reports = compiled(lambda q: attend(attend(q, q, q), q, attend(q, q, q)))
    (q, _, _) = qkv()
    assert_close(f(q), attend(attend(q, q, q), q, attend(q, q, q)))
    assert reports.outcomes == ["rewritten"] * 3


def test_two_models_with_different_options():
    model, x = Attention().eval(), torch.randn(1, 16, 32)
    first, of_first = compiled(model, hardware=GPU)
    second, of_second = compiled(model, passes={"attention": False})
    with torch.no_grad():
        for f in (first, second, first, second):
            assert_close(f(x), model(x))
    assert of_first.outcomes == ["rewritten"] and of_second.outcomes == []


def test_threads():
    """Two threads compile and run functions of their own."""
    results, errors = {}, []

    def work(name, function, inputs):
        try:
            f, reports = compiled(function)
            results[name] = [f(*inputs) for _ in range(3)], reports.outcomes
        except Exception as error:
            errors.append(error)

    def doubled(q, k, v):
        return attend(q, k, v) * 2

    cases = {"a": (attend, qkv()), "b": (doubled, qkv(t=24))}
    threads = [threading.Thread(target=work, args=(name, *case)) for name, case in cases.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for name, (function, inputs) in cases.items():
        outputs, outcomes = results[name]
        assert outcomes == ["rewritten"]
        for output in outputs:
            assert_close(output, function(*inputs))


def test_it_is_quiet(capfd):
    model, x = Attention(), torch.randn(2, 16, 32)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="effcompile")
        warnings.filterwarnings("error", message=".*(effarch|effcompile)")
        torch.compile(model, backend="effarch")(x).sum().backward()
        effcompile.explain(model, x, hardware=GPU)
    out, err = capfd.readouterr()
    assert out == "" and "eff" not in err


# options ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_are_accepted(mode):
    inputs = qkv()
    assert_close(torch.compile(attend, backend="effarch", mode=mode)(*inputs), attend(*inputs))
    assert [d.outcome for d in effcompile.last_report().frames[-1].decisions] == ["rewritten"]


def test_mode_among_options():
    """torch.compile takes `mode` or `options`, not both."""
    inputs = qkv()
    f, _ = compiled(attend, mode="max-autotune-no-cudagraphs")
    assert_close(f(*inputs), attend(*inputs))
    with pytest.raises(RuntimeError, match="Either mode or options"):
        torch.compile(attend, backend="effarch", mode="reduce-overhead", options={"report": True})


@pytest.mark.parametrize("name", ["attention", "sdpa"])
def test_a_pass_is_switched_off(name):
    functions = {"attention": attend, "sdpa": F.scaled_dot_product_attention}
    inputs = qkv()
    for other, function in functions.items():
        torch._dynamo.reset()
        f, reports = compiled(function, passes={name: False}, hardware=GPU)
        assert_close(f(*inputs), function(*inputs))
        assert reports.outcomes == ([] if other == name else ["rewritten"])


def test_a_pass_is_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("EFFARCH_DISABLE", "attention")
    f, reports = compiled(attend)
    f(*qkv())
    assert reports.outcomes == []


def test_hardware_decides():
    inputs = qkv()
    f, reports = compiled(attend, hardware=GPU)
    f(*inputs)
    g, of_cpu = compiled(attend)
    g(*inputs)
    assert [d.chosen for d in reports.decisions] == ["triton"] and [d.chosen for d in of_cpu.decisions] == ["sdpa-flash-cpu"]
    assert reports[0].hardware == GPU


def test_strict_numerics():
    f, reports = compiled(attend, numerics="strict")
    f(*qkv())
    g, of_half = compiled(attend, numerics="strict")
    inputs = qkv(dtype=torch.bfloat16)
    result = g(*inputs)
    assert reports.outcomes == ["rewritten"]
    (refused,) = of_half.decisions
    assert (refused.outcome, refused.step) == ("refused", "numerics") and "numerics=strict" in refused.why
    assert_close(result, attend(*inputs), dtype=torch.bfloat16)


def test_report_to_stderr(capfd):
    f, _ = compiled(attend, report=True)
    f(*qkv())
    out, err = capfd.readouterr()
    assert out == "" and "sdpa-flash-cpu" in err and "1 graph: 1 rewritten" in err


def test_report_to_a_file(tmp_path):
    effcompile.reset_report()
    path = tmp_path / "report.json"
    f, _ = compiled(attend, report=path)
    f(*qkv())
    report = json.loads(path.read_text())
    assert [d["outcome"] for d in report["decisions"]] == ["rewritten"] and report["hardware"] == "cpu"


def test_dump(tmp_path):
    f, _ = compiled(attend, dump=tmp_path, hardware=GPU)
    f(*qkv())
    (folder,) = tmp_path.iterdir()
    written = {path.name for path in folder.iterdir()}
    assert {"0-lifted.py", "1-normalize.py", "5-attention.py", "5-attention.diff", "report.json"} <= written


def test_inductor_options_reach_inductor():
    f, _ = compiled(attend, inductor={"no_such_option_of_inductor": 1}, fallback="inductor")
    with pytest.raises(BackendCompilerFailed, match="no_such_option_of_inductor"):
        f(*qkv())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardwear": "cpu"}, "one of passes, hardware, .* but got 'hardwear'. Did you mean 'hardware'"),
        ({"hardware": "h100"}, "one of .*h100-sxm.* but got 'h100'"),
        ({"passes": {"atention": False}}, "Did you mean 'attention'"),
        ({"fallback": "crash"}, "one of 'inductor', 'eager', 'error'"),
        ({"tuning_budget_s": -1}, "finite number of seconds"),
    ],
    ids=["option", "hardware", "pass", "fallback", "seconds"],
)
def test_a_bad_option_raises_at_the_first_call(options, message):
    f = torch.compile(attend, backend="effarch", options=options)
    with pytest.raises(BackendCompilerFailed, match=message) as raised:
        f(*qkv())
    assert isinstance(raised.value.inner_exception, ConfigError)


@pytest.mark.parametrize("fallback", ["inductor", "eager", "error"])
def test_a_graph_that_cannot_be_lifted(fallback, monkeypatch):
    """No failure, so no warning: the report says why."""

    def refuse(*_):
        raise LiftError("Expected something else but got this")

    monkeypatch.setattr(trace, "lift", refuse)
    inputs = qkv()
    f, reports = compiled(attend, fallback=fallback)
    if fallback == "error":
        with pytest.raises(BackendCompilerFailed, match="Expected something else"):
            f(*inputs)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="effcompile")
        assert_close(f(*inputs), attend(*inputs))
    (frame,) = reports.frames
    assert (frame.outcome, frame.why) == ("fallback", "Expected something else but got this")


# logs ---------------------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
q = torch.randn(1, 2, 8, 8)
torch.compile(lambda q: torch.softmax(q @ q.mT, -1) @ q, backend="effarch")(q)
"""


@pytest.mark.parametrize("logs", ["+effcompile", "effcompile", ""], ids=["debug", "info", "none"])
def test_torch_logs(logs, tmp_path):
    environment = {**os.environ, **({"TORCH_LOGS": logs} if logs else {}), "PYTHONPATH": str(ROOT)}
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    found = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    lines = [line for line in found.stderr.splitlines() if "graph0" in line]
    assert any("attention at script.py:4 rewritten" in line for line in lines) == bool(logs)
    assert any("softmax_int" in line and "matched" in line for line in lines) == (logs == "+effcompile")
    assert found.stdout == "" and bool(found.stderr) == bool(logs)
