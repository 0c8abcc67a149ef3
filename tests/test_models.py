"""Every model of the zoo: its results as in eager, and what becomes of each attention in it."""

from __future__ import annotations

import copy
from collections import Counter
from functools import lru_cache

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from effcompile import backend
from effcompile.config import Config
from effcompile.explain import Report
from tests import model_zoo

pytestmark = [
    pytest.mark.usefixtures("replace_where_possible"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::DeprecationWarning"),
]

GPU = "h100-sxm"

# Attentions in one forward pass; none of them is lost on a GPU, in evaluation, however the model spells them, but those REFUSED.
SITES = {
    "llama": 2,
    "mistral_swa": 2,
    "gemma2": 2,
    "gpt2": 2,
    "bert": 2,
    "t5": 6,
    "whisper": 6,
    "deepseek_v3_mla": 2,
    "bloom": 2,
    "longformer": 2,
    "gpt_oss_attn": 2,
    "diffllama": 4,
    "vit": 2,
    "llama_bidirectional": 2,
    "mixtral": 2,
    "qwen3_moe": 2,
    "deepseek_v3": 2,
    "olmoe": 2,
    "gpt_oss": 2,
    "granitemoe": 2,
    "switch_transformers": 6,
    "llama4": 2,
    "mamba": 0,
    "mamba_seqscan": 0,
    "mamba2": 0,
    "falcon_h1": 2,
    "jamba": 1,
    "rwkv": 0,
    "recurrent_gemma": 1,
    "xlstm": 0,
    "minimax_lightning": 0,
    "qwen3_next": 1,
    "kimi_linear": 1,
}
# RWKV-4's numerator and denominator are one recurrence each, and so are the states and normalisers that xLSTM hands from chunk to
# chunk; inside of a chunk it is refused, for its stabiliser.
RECURRENCES = {
    "mamba": {"rewritten": 2},
    "mamba_seqscan": {"rewritten": 2},
    "mamba2": {"rewritten": 2},
    "falcon_h1": {"rewritten": 2},
    "jamba": {"rewritten": 1},
    "rwkv": {"rewritten": 4},
    "recurrent_gemma": {"rewritten": 1},
    "xlstm": {"rewritten": 4, "refused: decay": 2},
    "minimax_lightning": {"refused: proof": 2, "refused: mask": 4},  # its decays are buffers
    "qwen3_next": {"refused: proof": 1, "refused: uses": 2},
    "kimi_linear": {"refused: proof": 2, "refused: scan": 1},
}
EAGER_ONLY = {
    "bloom", "longformer", "gpt_oss_attn", "gpt_oss", "switch_transformers", "mamba", "mamba_seqscan", "mamba2", "rwkv", "xlstm"
}  # fmt: skip
SLOW = {"switch_transformers", "mamba", "mamba_seqscan", "jamba", "rwkv", "xlstm", "kimi_linear", "minimax_lightning"}
# On a CPU there is no kernel for soft-caps and sinks, nor for values of another depth than the keys'.
LEFT_ON_CPU = {
    "gemma2-eager",
    *(
        f"{name}-{a}"
        for name in ("gpt_oss_attn", "gpt_oss", "deepseek_v3_mla", "deepseek_v3", "kimi_linear")
        for a in ("eager", "sdpa")
    ),
}
# Overlapping chunks of rows are no dense attention.
REFUSED = {"longformer": "refused: probabilities"}
# Dropout is switched off for all.
TRAINING = {
    "llama": {"rewritten": 2},
    "gemma2": {"rewritten": 2},
    "gpt2": {"rewritten": 2},
    "bert": {"rewritten": 2},
    "t5": {"rewritten": 6},
    "whisper": {"rewritten": 5},  # layer by layer, and the two encoder layers share a graph
    "bloom": {"rewritten": 2},
    "vit": {"rewritten": 2},
    "diffllama": {"rewritten": 4},
    "deepseek_v3_mla": {"rewritten": 2},
}


def _slow(name, attention):
    costly = name in SLOW or (attention == "sdpa" and model_zoo.ENTRIES[name].family == "moe")
    return [pytest.mark.slow] if costly else []


CASES = [
    pytest.param(name, attention, id=f"{name}-{attention}", marks=_slow(name, attention))
    for name in model_zoo.NAMES
    for attention in (("eager",) if name in EAGER_ONLY else ("eager", "sdpa"))
]


class Compiled:
    """A model through the rooms and aot_eager, or Inductor; `report` tells what was made of it."""

    def __init__(self, model, hardware, compiler=None):
        self.frames = []
        self.config = Config.resolve(None, {"hardware": hardware, "report": self._collect})
        self.compiler = compiler or (lambda graph, inputs, tag: aot_eager(graph, inputs))
        self.call = torch.compile(model, backend=self._backend)

    def _backend(self, module, inputs):
        return backend.compile_graph(module, inputs, self.config, self.compiler)

    def _collect(self, report):
        self.frames += report.frames

    @property
    def report(self):
        return Report(frames=tuple(self.frames))

    def outcomes(self, family="attention"):
        """How many sites of a family had which outcome; refusals by their step."""
        own = (d for d in self.report.decisions if d.family == family)
        return dict(Counter(f"refused: {d.step}" if d.outcome == "refused" else d.outcome for d in own))


@lru_cache(maxsize=2)
def built(name, attention):
    model, inputs = model_zoo.build(name, attention=attention)
    with torch.no_grad():
        return model, inputs, model_zoo.result(model(**inputs))


def assert_same(actual, expected, tolerance=1e-5):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.1e}"


def test_the_table_names_every_model():
    assert set(SITES) == set(model_zoo.NAMES)


@pytest.mark.parametrize("hardware", [GPU, None], ids=["gpu", "cpu"])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_inference(name, attention, hardware):
    model, inputs, expected = built(name, attention)
    f = Compiled(model, hardware)
    with torch.no_grad():
        assert_same(model_zoo.result(f.call(**inputs)), expected)
    fused = "left" if hardware is None and f"{name}-{attention}" in LEFT_ON_CPU else "rewritten"
    outcome = REFUSED.get(name, fused)
    assert f.outcomes() == ({outcome: SITES[name]} if SITES[name] else {})
    assert f.outcomes("recurrence") == RECURRENCES.get(name, {})


def without_dropout(model):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "dropout_rate", "attn_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@pytest.mark.parametrize("name", TRAINING)
def test_training(name):
    model, inputs, _ = built(name, "eager")
    theirs = without_dropout(copy.deepcopy(model))
    ours = copy.deepcopy(theirs)
    f = Compiled(ours, GPU)
    for call in (f.call, theirs):
        model_zoo.result(call(**inputs)).float().square().sum().backward()
    assert f.outcomes() == TRAINING[name]
    compared = 0
    for (path, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if other.grad is None:  # compiled code sends zeros to what an unused output depends on
            assert mine.grad is None or not mine.grad.any(), path
        elif other.grad.abs().max() > 1e-6:
            assert_same(mine.grad, other.grad, tolerance=1e-3)
            compared += 1
    assert compared > 5


@pytest.mark.parametrize("name", ["gemma2", "whisper", "qwen3_moe"])
def test_through_inductor(name):
    model, inputs, expected = built(name, "eager")
    f = Compiled(model, GPU, lambda graph, example_inputs, tag: backend._dynamo.inductor(graph, example_inputs, {}, tag))
    with torch.no_grad():
        assert_same(model_zoo.result(f.call(**inputs)), expected, tolerance=2e-5)
    assert f.outcomes() == {"rewritten": SITES[name]}
    assert {frame.outcome for frame in f.frames} == {"compiled"}
