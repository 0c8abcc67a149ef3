"""Lifting whole models: the lifted graphs give eager's logits and gradients, and are functional."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule

from effcompile.errors import LiftError
from effcompile.trace import lift
from tests import model_zoo

CHEAP = ("llama", "t5", "deepseek_v3_mla", "mamba")
# One graph of each of Switch Transformers' twenty resizes a tensor in place.
REFUSED = {"switch_transformers": "keep their shapes"}
# Eager cannot train the first two: what a backward needs is written to before. aot_eager cannot on Dynamo's own graph of the third.
UNTRAINABLE = ("rwkv", "xlstm", "qwen3_next")
# Generic associative scans run in functorch regions, whose order of additions eager does not share.
INEXACT = ("mamba", "jamba")


class Lifting:
    """A backend that runs lifted graphs, and notes why others were refused."""

    def __init__(self) -> None:
        self.lifted = 0
        self.refused: list[str] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Any:
        try:
            lifted = lift(gm, example_inputs)
        except LiftError as error:
            self.refused.append(str(error))
            return aot_eager(gm, example_inputs)
        lifted.graph_module.graph.lint()
        for node in lifted.graph_module.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node not in lifted.opaque:
                assert not node.target._schema.is_mutable, node.format_node()
        self.lifted += 1
        return aot_eager(lifted.graph_module, example_inputs)


def cases(names: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, id=name, marks=() if name in CHEAP else pytest.mark.slow) for name in names]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def assert_refusals(name: str, backend: Lifting) -> None:
    assert backend.lifted > 0
    why = REFUSED.get(name)
    assert bool(backend.refused) == (why is not None) and all(why in reason for reason in backend.refused)  # type: ignore[operator]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", cases(model_zoo.NAMES))
def test_inference(name: str, attention: str) -> None:
    if name not in model_zoo.FAMILIES["attention"] and attention == "sdpa":
        pytest.skip("one attention is enough where attention is not the point")
    try:
        model, inputs = model_zoo.build(name, attention=attention)
    except ValueError:
        pytest.skip(f"{name} has no {attention} attention")
    backend = Lifting()
    with torch.no_grad():
        expected = model_zoo.result(model(**inputs))
        actual = model_zoo.result(torch.compile(model, backend=backend)(**inputs))
    assert relative_error(actual, expected) <= (1e-6 if name in INEXACT else 0.0)
    assert_refusals(name, backend)


def step(model: nn.Module, call: Any, inputs: model_zoo.Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of each parameter that gets one, for a fixed random gradient of the logits."""
    model.zero_grad()
    logits = model_zoo.result(call(**inputs))
    (logits * model_zoo.normal(*logits.shape)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", cases(tuple(name for name in model_zoo.NAMES if name not in UNTRAINABLE)))
def test_training_step(name: str) -> None:
    model, inputs = model_zoo.build(name)
    backend = Lifting()
    expected, expected_gradients = step(model, model, inputs)
    actual, gradients = step(model, torch.compile(model, backend=backend), inputs)
    assert relative_error(actual, expected) <= 1e-6
    assert gradients.keys() >= expected_gradients.keys()
    beside = gradients.keys() - expected_gradients.keys()  # compiled code may send zeros to what an unused output depends on
    assert not any(gradients[key].any() for key in beside)
    worst = max(relative_error(gradients[key], expected_gradients[key]) for key in expected_gradients)
    assert worst <= 2e-5
    assert_refusals(name, backend)
