"""Never worse than not being there: whatever fails, the result is right, with one warning and the reason in the report."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from effcompile import backend, pipeline, rewrite, runtime
from effcompile.builder import Builder
from effcompile.codegen import attention as kernels
from effcompile.codegen import choices
from effcompile.errors import EffcompileWarning, KernelError, VerifyError
from effcompile.ops import attention as op
from effcompile.pattern import GraphView

pytestmark = pytest.mark.usefixtures("replace_where_possible")

GPU = "h100-sxm"


class InjectedError(RuntimeError):
    pass


def fail(*_args, **_kwargs):
    raise InjectedError("planted")


def attend(q, k, v):
    return torch.softmax(q @ k.mT * 0.25, dim=-1) @ v


def fail_recognition(monkeypatch):
    broken = [dataclasses.replace(rule, recognise=fail) if rule.name == "attention" else rule for rule in pipeline.RULES]
    monkeypatch.setattr(pipeline, "RULES", tuple(broken))


def fail_half_way(monkeypatch):
    """The lowering adds nodes, and then fails."""

    def half(builder, operands, captures, sizes, match, layout):
        builder.call(torch.ops.aten.relu.default, operands["q"])
        fail()

    monkeypatch.setattr(choices, "lower_generated", half)


def fail_kernel_operator(monkeypatch):
    """The operation that is added has no meaning for fake tensors."""
    monkeypatch.setattr(choices, "lower_generated", lambda b, operands, *_: b.call(fail, operands["q"]))


def fail_inductor_on_rewritten(monkeypatch):
    inductor = backend._dynamo.inductor

    def broken(module, inputs, settings, tag=""):
        if any("effcompile" in str(node.target) for node in module.graph.nodes):
            fail()
        return inductor(module, inputs, settings, tag)

    monkeypatch.setattr(backend._dynamo, "inductor", broken)


# Each plants one failure; the step that the report names, and whether the whole graph is given up.
FAULTS = {
    "hardware": (lambda m: m.setattr(pipeline.devices, "get", fail), "graph", True),
    "lift": (lambda m: m.setattr(pipeline.trace, "lift", fail), "graph", True),
    "normalize": (lambda m: m.setattr(pipeline, "normalize", fail), "graph", True),
    "view": (lambda m: m.setattr(pipeline, "GraphView", fail), "graph", True),
    "recognise": (fail_recognition, "internal", False),
    "implementations": (lambda m: m.setattr(choices, "implementations", fail), "decide", False),
    "select": (lambda m: m.setattr(pipeline.select, "choose", fail), "decide", False),
    "lowering": (lambda m: m.setattr(choices, "lower_generated", fail), "rewrite", False),
    "lowering half way": (fail_half_way, "rewrite", False),
    "operator": (fail_kernel_operator, "rewrite", False),
    "verify": (lambda m: m.setattr(rewrite, "_verify", fail), "rewrite", False),
    "inductor": (fail_inductor_on_rewritten, "inductor", True),
}


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(runtime, "_warned", set())


def compiled(monkeypatch, name, **options):
    reports = []
    plant, step, whole = FAULTS[name]
    f = torch.compile(attend, backend="effarch", fullgraph=True, options={"report": reports.append, "hardware": GPU, **options})
    plant(monkeypatch)
    return f, reports, step, whole


def qkv(**kwargs):
    return [torch.randn(2, 2, 16, 16, **kwargs) for _ in range(3)]


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_costs_a_warning(name, monkeypatch):
    f, reports, step, whole = compiled(monkeypatch, name)
    inputs = qkv()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = f(*inputs)
    torch.testing.assert_close(result, attend(*inputs))
    ours = [str(w.message) for w in caught if issubclass(w.category, EffcompileWarning)]
    assert len(ours) == 1 and "planted" in ours[0]
    (report,) = reports
    (frame,) = report.frames
    assert (frame.outcome == "fallback") == whole
    reasons = [d.why for d in report.decisions] + [frame.why]
    assert any("InjectedError: planted" in reason for reason in reasons) and "planted" in str(report)
    assert all((d.outcome, d.step) == ("refused", step) for d in report.decisions)
    assert bool(report.decisions) == (name not in ("hardware", "lift", "normalize", "view"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_raises_where_that_is_asked_for(name, monkeypatch):
    f, reports, *_ = compiled(monkeypatch, name, fallback="error")
    with pytest.raises(BackendCompilerFailed, match="planted") as raised:
        f(*qkv())
    assert isinstance(raised.value.inner_exception, InjectedError)


@pytest.mark.parametrize("name", ["lift", "select", "inductor"])
def test_a_failure_with_fallback_eager(name, monkeypatch):
    f, _, _, _ = compiled(monkeypatch, name, fallback="eager")
    inputs = qkv()
    with pytest.warns(EffcompileWarning, match="planted"):
        result = f(*inputs)
    torch.testing.assert_close(result, attend(*inputs))


def test_a_failure_of_a_first_try_is_no_failure(monkeypatch):
    """What was done for loops of few steps is done over if it cannot be used; what went wrong then does not count."""
    original = pipeline.Pipeline.through_the_rooms

    def planted(own, *args, dare):
        if dare:
            own.failures.append(InjectedError("planted"))
            own.dared_too_much = True
        return original(own, *args, dare=dare)

    monkeypatch.setattr(pipeline.Pipeline, "through_the_rooms", planted)
    reports = []
    f = torch.compile(attend, backend="effarch", options={"report": reports.append, "hardware": GPU, "fallback": "error"})
    inputs = qkv()
    torch.testing.assert_close(f(*inputs), attend(*inputs))
    assert [d.outcome for d in reports[0].decisions] == ["rewritten"]


def test_training_through_a_failure(monkeypatch):
    f, *_ = compiled(monkeypatch, "lowering half way")
    inputs = qkv(requires_grad=True)
    with pytest.warns(EffcompileWarning, match="one site was left"):
        f(*inputs).sum().backward()
    mine = [x.grad for x in inputs]
    expected = torch.autograd.grad(attend(*inputs).sum(), inputs)
    torch.testing.assert_close(mine, list(expected))


def test_a_reason_is_warned_of_once(monkeypatch):
    f, reports, *_ = compiled(monkeypatch, "select")
    g = torch.compile(lambda q, k, v: attend(q, k, v) + 1, backend="effarch", options={"report": reports.append, "hardware": GPU})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        f(*qkv())
        g(*qkv())
    assert len(reports) == 2
    assert len([w for w in caught if issubclass(w.category, EffcompileWarning)]) == 1


@pytest.mark.parametrize("target", ["callable", "file", "dump"])
def test_a_report_that_cannot_be_delivered(target, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    targets = {"callable": {"report": fail}, "file": {"report": str(blocked / "x.json")}, "dump": {"dump": str(blocked / "x")}}
    inputs = qkv()
    f = torch.compile(attend, backend="effarch", options=targets[target])
    with pytest.warns(EffcompileWarning, match="could not be delivered"):
        result = f(*inputs)
    torch.testing.assert_close(result, attend(*inputs))


# replacing ----------------------------------------------------------------------------------------------------------------


def matched(function, *inputs):
    """The lifted, normalized graph of a function, and the match in it."""
    found = []

    def collect(module, example_inputs):
        lifted = pipeline.trace.lift(module, example_inputs).graph_module
        pipeline.normalize(lifted)
        found.append(lifted)
        return module.forward

    torch.compile(function, backend=collect, fullgraph=True)(*inputs)
    (attempt,) = [a for a in rewrite.attempt_all(GraphView(found[0]), pipeline.RULES) if a.matched]
    return found[0], attempt.result


def text(module):
    module.recompile()
    return module.print_readable(print_output=False, include_stride=True)


def wrong_shape(builder: Builder, operands, captures, sizes, match, layout):
    return builder.call(torch.ops.aten.slice.Tensor, operands["q"], 2, 0, 3)


def not_fake(builder: Builder, operands, captures, sizes, match, layout):
    return builder.call(torch.ops.aten.mm.default, operands["q"], operands["k"])


@pytest.mark.parametrize("lower", [wrong_shape, not_fake, fail], ids=lambda f: f.__name__)
@pytest.mark.parametrize("swapped", [False, True], ids=["as is", "swapped and copied"])
def test_replace_leaves_the_graph_as_it_was(lower, swapped):
    def function(q, k, v):
        out = attend(q, k, v)
        return out.transpose(1, 2).contiguous() if swapped else out

    module, match = matched(function, *qkv())
    before = text(module)
    with pytest.raises((VerifyError, RuntimeError)):
        rewrite.replace(match, lower)
    assert text(module) == before
    module.graph.lint()


def test_a_refused_verification_is_no_failure(monkeypatch):
    monkeypatch.setattr(choices, "lower_generated", wrong_shape)
    reports = []
    f = torch.compile(attend, backend="effarch", options={"report": reports.append, "hardware": GPU, "fallback": "error"})
    inputs = qkv()
    torch.testing.assert_close(f(*inputs), attend(*inputs))
    (decision,) = reports[0].decisions
    assert (decision.outcome, decision.step) == ("refused", "verify") and "shape" in decision.why


def test_an_original_that_cannot_be_compiled_raises_as_without_us(monkeypatch):
    monkeypatch.setattr(backend._dynamo, "inductor", fail)
    f = torch.compile(lambda x: x + 1, backend="effarch")
    with pytest.raises(BackendCompilerFailed, match="planted"):
        f(torch.ones(3))


# while a compiled graph runs ----------------------------------------------------------------------------------------------

SPEC = op.AttentionSpec(score="s * 0.25")


@pytest.mark.parametrize("error", [KernelError("planted"), RuntimeError("planted")], ids=lambda e: type(e).__name__)
def test_a_kernel_that_cannot_be_built(error, monkeypatch):
    def broken(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(kernels, "forward", broken)
    monkeypatch.setattr(kernels, "backward", broken)
    q, k, v = qkv()
    with pytest.warns(EffcompileWarning, match="reference, which materialises the scores: .*planted") as caught:
        for _ in range(2):
            out, lse = runtime._attention(q, k, v, [], [], SPEC.to_json(), "bthd")
            grads = runtime._attention_backward(torch.ones_like(out), q, k, v, out, lse, [], [], SPEC.to_json())
    assert len(caught) == 1
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, attend(q, k, v))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(attend(*leaves).sum(), leaves)
    torch.testing.assert_close(list(grads[:3]), list(expected))


@pytest.mark.parametrize(
    ("error", "environment"),
    [(torch.OutOfMemoryError("planted"), ""), (KernelError("planted"), "error")],
    ids=["memory", "asked for"],
)
def test_a_kernel_failure_that_raises(error, environment, monkeypatch):
    def broken(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(kernels, "forward", broken)
    monkeypatch.setenv("EFFARCH_FALLBACK", environment)
    with pytest.raises(type(error), match="planted"):
        runtime._attention(*qkv(), [], [], SPEC.to_json(), "bhtd")
