"""The generated recurrence kernels on a real GPU, with the configuration chosen for it, against the definition in float64."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from effcompile.errors import EffcompileWarning
from effcompile.runtime import register
from tests.test_recurrence_kernels import CASES, Case, errors_of, operands_of
from tests.test_scan_kernels import CASES as SCANS
from tests.test_scan_kernels import excess_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LIMIT = 2e-2  # of bfloat16 results, relative to their norm
SUMMED = 0.1  # of the gradient of a decay that is the same at all times, a sum over time of terms of either sign
LENGTH = 333  # five whole chunks and a part of one
FORMS = [
    "linear",
    "linear-normaliser-initial",
    "linear-before-bonus",
    "retention-initial",
    "head",
    "head-normaliser",
    "key",
    "value",
]


def excessive(case: Case) -> dict[str, float]:
    with torch.device("cuda"):
        errors = errors_of(case, None)
    return {
        key: error for key, error in errors.items() if not error <= (SUMMED if key == "dgate" and case.constant else case.limit)
    }


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name: str) -> None:
    assert excessive(CASES[name]) == {}


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (64, 128)], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_many_chunks_of_every_width(name: str, dims: tuple[int, int]) -> None:
    case = replace(CASES[name], t=LENGTH, d_k=dims[0], d_v=dims[1], dtype=torch.bfloat16, out="bfloat16", limit=LIMIT)
    assert excessive(case) == {}


@pytest.mark.parametrize("name", ["head-segments", "key-segments", "value-segments", "head-strong", "key-strong", "key-resets"])
def test_segments_and_strong_decays_in_bfloat16(name: str) -> None:
    assert excessive(replace(CASES[name], t=LENGTH, dtype=torch.bfloat16, out="bfloat16", limit=LIMIT)) == {}


@pytest.mark.parametrize("name", [name for name in SCANS if not name.endswith(("no-steps", "no-batch"))])
def test_scans_and_their_gradients(name: str) -> None:
    with torch.device("cuda"):
        found = excess_of(SCANS[name])
    few = 4 if SCANS[name].gate == "h" else 1  # two numbers, sums over all else: how large the loop's own error is, is luck
    assert {key: x for key, x in found.items() if not x <= few} == {}


def test_a_kernel_that_fails_is_replaced_by_chunks_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["head"]
    monkeypatch.setattr("effcompile.codegen.recurrence._kernels", None)
    monkeypatch.setattr("effcompile.codegen.recurrence._READY", {})
    register()
    with torch.device("cuda"):
        v, operands = operands_of(case)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out, _, _ = torch.ops.effcompile.recurrence(v, operands, case.spec.to_json(), "bhtd")
    assert any(issubclass(w.category, EffcompileWarning) and "chunk by chunk" in str(w.message) for w in told)
    expected, _, _ = torch.ops.effcompile.recurrence(v.cpu(), [x.cpu() for x in operands], case.spec.to_json(), "bhtd")
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-4)
