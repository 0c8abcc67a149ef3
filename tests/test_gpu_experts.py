"""The generated kernels of experts and routers on a real GPU, with the configuration chosen for it, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.test_experts_kernels import CASES, GPT_OSS, Case, dropping, errors_of
from tests.test_route_kernels import SIZES, SPECS, assert_right, excess_of
from tests.test_route_kernels import Case as Router

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LIMITS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # relative to the norm
WIDE = Case(experts=11, k=3, d=256, f=384, d_out=256, ids=dropping)
FORMS = {
    "swiglu": WIDE,
    "gpt-oss": replace(WIDE, activation=GPT_OSS, interleaved=True, biased=(True, True), along=False),
    "pair-input": replace(WIDE, stacking="pair", weighted="input", biased=(True, True)),
    "ungated": replace(WIDE, gated=False, activation="max(0, up) ** 2", biased=(False, True)),
    "unweighted": replace(WIDE, weighted="none"),
    "apart": replace(WIDE, stacking="experts_pair", biased=(True, True)),
    "apart-many": replace(WIDE, stacking="experts", experts=40, d=64, f=64, d_out=72),
}  # fmt: skip


def excessive(case: Case) -> dict[str, float]:
    with torch.device("cuda"):
        errors = errors_of(case, None)
    return {key: error for key, error in errors.items() if not error <= case.limit}


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name: str) -> None:
    case = CASES[name]
    assert excessive(replace(case, limit=LIMITS[case.dtype])) == {}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("t", [1, 3, 40, 300, 1500])
@pytest.mark.parametrize("name", FORMS)
def test_every_tile_of_whole_and_of_ragged_widths(name: str, t: int, dtype: torch.dtype) -> None:
    case = replace(FORMS[name], t=t, dtype=dtype, out=str(dtype).removeprefix("torch."), limit=LIMITS[dtype])
    ragged = replace(case, d=136, f=72, d_out=200)
    assert [excessive(x) for x in (case, ragged, replace(case, keep=False))] == [{}, {}, {}]


@pytest.mark.parametrize("name", ["swiglu", "apart"])
def test_a_call_that_is_played_again_reads_the_new_operands(name: str) -> None:
    """Launches are planned once: the second call has other addresses, of weights too."""
    case = replace(FORMS[name], t=300, dtype=torch.bfloat16, out="bfloat16", limit=LIMITS[torch.bfloat16])
    kept = []
    for _ in range(3):
        kept.append(torch.empty(1 << 20, device="cuda"))  # so that what follows has addresses of its own
        assert excessive(case) == {}


@pytest.mark.parametrize("values", ["normal", "ties", "infinite", "nan"])
@pytest.mark.parametrize("name", SPECS)
def test_routers(name: str, values: str) -> None:
    assert_right(excess_of(Router(fields=SPECS[name], tokens=300, values=values), "cuda"))


@pytest.mark.parametrize("name", SIZES)
def test_routers_of_every_size(name: str) -> None:
    assert_right(excess_of(SIZES[name], "cuda"))
