"""Compiled graphs are found again by a second process, and only by one that means the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import json, sys, time
import torch
from torch import nn
from torch._dynamo.utils import counters
import effcompile.backend as backend
from effcompile.cost_model import select
from effcompile.ops import attention

choose = select.choose
select.choose = lambda found, *rest: (next(c for c in [*found] if c.kind != "inductor"), choose(found, *rest)[1])
setup = json.loads(sys.argv[1])
if "version" in setup:
    backend.CACHE_TAG = "effcompile-" + setup["version"]
if "spec_version" in setup:
    attention.AttentionSpec.__dataclass_fields__["version"].default = setup["spec_version"]
    attention.AttentionSpec.__init__.__kwdefaults__["version"] = setup["spec_version"]

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        t = x.shape[1]
        scores = (q @ k.mT * 0.25).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
        return x + self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(x.shape))

torch.manual_seed(0)
model, reports = nn.Sequential(Block(), Block(), Block()), []
x = torch.randn(2, 48, 32)
expected = model(x)
f = torch.compile(model, backend="effarch", options={"report": reports.append, "fallback": "error", **setup["options"]})
start = time.perf_counter()
with torch.set_grad_enabled(setup.get("train", False)):
    result = f(x)
    if setup.get("train"):
        result.sum().backward()
seconds = time.perf_counter() - start
assert torch.allclose(result, expected, atol=1e-5)
print(json.dumps({
    "decisions": [(d.outcome, d.chosen) for r in reports for d in r.decisions],
    "aot": [counters["aot_autograd"]["autograd_cache_" + k] for k in ("hit", "miss", "bypass")],
    "fx": [counters["inductor"]["fxgraph_cache_" + k] for k in ("hit", "miss", "bypass")],
    "seconds": seconds,
}))
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script in a process of its own; all runs of one test share their caches."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "EFFARCH_CACHE_DIR": "kernels"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(tmp_path / folder) for name, folder in caches.items()}}

    def once(**setup):
        setup = {"options": {}, **setup}
        command = [sys.executable, str(script), json.dumps(setup)]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout.splitlines()[-1])

    return once


def hit(result):
    """Whether the graph was found in the caches, rather than compiled."""
    hits, misses, bypasses = result["aot"]
    assert bypasses == result["fx"][2] == 0
    assert (hits > 0) != (misses > 0)
    return hits > 0


@pytest.mark.parametrize(
    ("options", "chosen", "train"),
    [
        pytest.param({}, "sdpa-flash-cpu", False, id="library call"),
        pytest.param({"hardware": "h100-sxm"}, "triton", False, id="our operation"),
        pytest.param({"hardware": "h100-sxm"}, "triton", True, id="our operation, training", marks=pytest.mark.slow),
    ],
)
def test_a_second_process_finds_what_the_first_compiled(run, options, chosen, train):
    first, second = (run(options=options, train=train) for _ in range(2))
    assert not hit(first) and hit(second)
    assert second["fx"][0] > 0 and second["fx"][1] == 0
    assert first["decisions"] == second["decisions"] == [["rewritten", chosen]] * 3, "a report is complete on a hit too"
    assert second["seconds"] < first["seconds"]


def test_what_means_something_else_is_not_found(run):
    gpu = {"options": {"hardware": "h100-sxm"}}
    assert not hit(run(**gpu))
    assert not hit(run(options={"passes": {"attention": False}})), "no rewrite"
    assert not hit(run(**gpu, version="0.0.0")), "another version of effcompile"
    assert not hit(run(**gpu, spec_version=999)), "another version of the specification"
    assert hit(run(**gpu)), "the first is still there"
