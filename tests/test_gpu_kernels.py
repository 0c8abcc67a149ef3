"""The generated attention kernels on a real GPU, with the configuration chosen for it, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effcompile.codegen import attention, emit, hopper
from effcompile.codegen.decode import MAX_QUERIES
from effcompile.runtime import register
from tests.test_attention_kernels import CASES, Case, difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NAMES = [name for name, case in CASES.items() if case.t_q > MAX_QUERIES]
LIMIT = 2e-2  # of bfloat16 results, relative to the largest value


def operands(case: Case, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q [B, H, TQ, D], k, v with rows that tile copies can take, and the gradient of the output."""
    torch.manual_seed(0)
    keys = case.t_k + length - case.t_q
    sizes = [(case.h, length, case.d_qk), (case.h_kv, keys, case.d_qk), (case.h_kv, keys, case.d_v)]
    q, k, v = (torch.randn(case.b, t, h, d, dtype=dtype, device="cuda").transpose(1, 2) for h, t, d in sizes)
    return q, k, v, torch.randn(case.b, case.h, length, case.d_v, dtype=dtype, device="cuda")


def errors(case: Case, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> dict[str, float]:
    captures = [x.cuda() for x in case.captures()]
    out, lse = attention.forward(q, k, v, captures, case.sizes, case.spec, out_layout=case.out_layout)  # type: ignore[arg-type]
    grads = attention.backward(grad, q, k, v, out, lse, captures, case.sizes, case.spec)[:3]
    ours = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))

    problem = attention.Problem(d_qk=q.shape[-1], d_v=v.shape[-1], dtype=q.dtype, arch=attention.architecture(q.device))
    module = emit.load_kernel(emit.write_kernel(attention.source(case.spec, problem)))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = module.reference(*leaves, *captures, *case.sizes)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    theirs = dict(zip(("out", "lse", "dq", "dk", "dv"), (expected, expected_lse, *wanted), strict=True))
    return {name: difference(ours[name], theirs[name]) for name in ours if name in case.checks}


@pytest.mark.parametrize("name", NAMES)
def test_results_and_gradients(name: str) -> None:
    case = CASES[name]
    found = errors(case, *operands(case, case.t_q, torch.bfloat16))
    assert {key: error for key, error in found.items() if not error <= LIMIT} == {}


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("name", ["causal", "window", "soft-cap"])
def test_many_tiles_of_every_depth(name: str, dims: tuple[int, int]) -> None:
    case = CASES[name]
    wide = Case(spec=case.spec, h=4, h_kv=2, d_qk=dims[0], d_v=dims[1])
    found = errors(wide, *operands(wide, 777, torch.bfloat16))
    assert {key: error for key, error in found.items() if not error <= LIMIT} == {}


def test_operands_that_cannot_be_copied_in_tiles() -> None:
    case = CASES["causal"]
    q, k, v, grad = operands(case, 200, torch.bfloat16)
    k = torch.stack([k, k], -1).flatten(-2)[..., ::2]
    assert not hopper.copies([k])
    found = errors(case, q, k, v, grad)
    assert {key: error for key, error in found.items() if not error <= LIMIT} == {}


def test_an_output_gradient_that_cannot_be_copied_in_tiles() -> None:
    case = CASES["causal"]
    q, k, v, grad = operands(case, 200, torch.bfloat16)
    found = errors(case, q, k, v, grad[..., :1].expand(grad.shape))
    assert {key: error for key, error in found.items() if not error <= LIMIT} == {}


def test_the_device_of_the_operands_counts() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = CASES["causal"]
    register()
    first = operands(case, 200, torch.bfloat16)[:3]
    second = [x.to("cuda:1") for x in first]
    assert torch.cuda.current_device() == 0
    here, there = (torch.ops.effcompile.attention(*x, [], [], case.spec.to_json(), "bhtd")[0] for x in (first, second))
    assert there.device == second[0].device
    assert torch.equal(here.cpu(), there.cpu())
