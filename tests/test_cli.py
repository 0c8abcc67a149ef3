"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import effcompile
from effcompile import doctor
from effcompile.cli import main
from effcompile.config import registered_passes
from effcompile.cost_model import devices

FILE = """
import torch
import effcompile_cli_sibling

class Model(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layer = torch.nn.Linear(width, width)
    def forward(self, x, scale=1.0):
        return self.layer(x) * scale

class NeedsWidth(Model):
    def __init__(self, width):
        super().__init__(width)

model = Model()

def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v

attention_inputs = tuple(torch.randn(1, 2, 16, 8) for _ in range(3))

def double(x):
    return x * 2

def double_inputs():
    return {"x": torch.ones(3)}

example_inputs = (torch.ones(2, 8),)
bad_inputs = 3
bad = double
number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some_models.py"
    path.write_text(FILE)
    (tmp_path / "effcompile_cli_sibling.py").write_text("")
    return path


@pytest.fixture
def explained(monkeypatch):
    """Stands in for `effcompile.explain`, and keeps what it was called with."""
    calls = []

    class Report:
        def to_dict(self):
            return {"decisions": []}

        def __str__(self):
            return "a report"

    def explain(model, *args, **kwargs):
        calls.append(SimpleNamespace(model=model, args=args, kwargs=kwargs, grad=torch.is_grad_enabled()))
        return Report()

    monkeypatch.setattr(effcompile, "explain", explain)
    return calls


def run(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# explain ----------------------------------------------------------------------------------------------------------------


def test_explain_function(file, explained):
    result = run("explain", f"{file}:attention")
    assert (result.exit_code, result.output) == (0, "a report\n")
    (call,) = explained
    assert call.model.__name__ == "attention" and [tuple(a.shape) for a in call.args] == [(1, 2, 16, 8)] * 3
    assert call.kwargs == {"hardware": None, "dump": None} and not call.grad
    assert str(file.parent) not in sys.path


@pytest.mark.parametrize("name", ["model", "Model"])
def test_explain_module(file, explained, name):
    assert run("explain", f"{file}:{name}").exit_code == 0
    (call,) = explained
    assert isinstance(call.model, torch.nn.Module) and not call.model.training
    assert [tuple(a.shape) for a in call.args] == [(2, 8)]


def test_explain_keyword_inputs_from_a_function(file, explained):
    assert run("explain", f"{file}:double").exit_code == 0
    (call,) = explained
    assert call.args == () and call.kwargs["x"].tolist() == [1.0, 1.0, 1.0]


def test_explain_options(file, explained, tmp_path):
    result = run("explain", f"{file}:model", "--hardware", "mi300x", "--json", "--dump", tmp_path / "graphs", "--train")
    assert json.loads(result.output) == {"decisions": []}
    (call,) = explained
    assert call.kwargs == {"hardware": "mi300x", "dump": str(tmp_path / "graphs")}
    assert call.grad and call.model.training


def test_explain_trains_a_function(file, explained):
    assert run("explain", f"{file}:attention", "--train").exit_code == 0
    (call,) = explained
    assert call.grad and all(tensor.requires_grad for tensor in call.args)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{file}", "Expected FILE.py:NAME but got"),
        ("{file}:", "Expected FILE.py:NAME but got"),
        ("{file}:a b", "Expected FILE.py:NAME but got"),
        ("{file}.txt:model", "Expected FILE.py:NAME but got"),
        ("gone.py:model", "Expected a file but got 'gone.py', which does not exist"),
        ("{file}:modle", "but got 'modle': it defines Model, NeedsWidth, model, attention, double"),
        ("{file}:number", "Expected a torch.nn.Module or a function but got number=3 of type int"),
        ("{file}:NeedsWidth", "Expected a module, or a class that needs no arguments, but got 'NeedsWidth'"),
        ("{file}:bad", "Expected bad_inputs to be a tuple or a dict of inputs but got 3 of type int"),
    ],
)
def test_explain_bad_target(file, explained, target, message):
    result = run("explain", target.format(file=file))
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert explained == []


def test_explain_without_inputs(file, explained):
    file.write_text("def f(x):\n    return x\n")
    result = run("explain", f"{file}:f")
    assert result.exit_code == 2 and "Expected f_inputs or example_inputs in" in result.output


def test_explain_unknown_hardware(file, explained):
    result = run("explain", f"{file}:attention", "--hardware", "h100")
    assert result.exit_code == 1 and "Expected hardware to be one of a100-sxm-40" in result.output
    assert "Traceback" not in result.output and explained == []


def test_explain_recognises_attention(file):
    result = run("explain", f"{file}:attention", "--json")
    assert result.exit_code == 0, result.output
    assert "attention" in [decision["family"] for decision in json.loads(result.stdout)["decisions"]]


# the others -------------------------------------------------------------------------------------------------------------


def test_passes_lists_every_pass_with_its_description():
    result = run("passes")
    assert result.exit_code == 0, result.output
    lines = [line.split(maxsplit=1) for line in result.output.splitlines()[1:]]
    assert [line[0] for line in lines] == list(registered_passes())
    assert all(len(line) == 2 for line in lines), "each has a description"


def test_hardware_lists_every_profile():
    result = run("hw", "list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()[1:]] == list(devices.names())


def test_doctor_on_this_machine():
    result = run("doctor")
    assert result.exit_code == (0 if doctor.healthy(doctor.examine()) else 1)
    for name in ("python", "torch", "triton", "gpu", "c++ compiler", "cache", "entry point", "ahead of time"):
        assert name in result.output


def found(name: str) -> doctor.Check:
    return next(check for check in doctor.examine() if check.name == name)


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "3.0.0+cu130"])
def test_doctor_reports_an_unsupported_torch(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert not found("torch").ok and version in found("torch").detail
    assert run("doctor").exit_code == 1


@pytest.mark.parametrize("version", ["2.11.0", "2.15.1+cu130"])
def test_doctor_accepts_the_supported_range(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    assert found("torch").ok


def test_doctor_reports_an_unwritable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFARCH_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    assert not found("cache").ok and "Not a directory" in found("cache").detail
    monkeypatch.setenv("EFFARCH_CACHE_DIR", str(tmp_path / "kernels"))
    assert found("cache").ok


def test_doctor_reports_a_missing_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not found("c++ compiler").ok


def test_doctor_reports_a_misspelt_variable(monkeypatch):
    monkeypatch.setenv("EFFARCH_REPROT", "1")
    check = found("environment")
    assert not check.ok and "EFFARCH_REPROT" in check.detail and "EFFARCH_REPORT" in check.remedy


def test_doctor_fails_only_for_what_is_required():
    note = doctor.Check(name="n", ok=False, detail="", required=False)
    assert doctor.healthy((note,))
    assert not doctor.healthy((note, doctor.Check(name="m", ok=False, detail="")))
