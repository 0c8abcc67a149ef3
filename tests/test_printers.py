"""Terms as source: torch's text computes what Python does; Triton's text is what we expect to read."""

from __future__ import annotations

import math

import pytest
import sympy
import torch

from effcompile.errors import ExpressionError
from effcompile.printers import shared, to_torch, to_triton
from effcompile.terms import Load, derivative, from_text, integer_symbol, score_symbol, to_text

TRITON = {
    "s * 0.125": "0.125 * s",
    "s / 3": "s / 3",
    "50 * tanh(s * 0.02)": "50 * tanh(0.02 * s)",
    "sigmoid(s) * s": "s * sigmoid(s)",
    "s / sqrt(n0)": "s / tl.sqrt(tl.cast(n0, tl.float32))",
    "where((j <= i) & (i - j < 8), s, -inf)": 'tl.where((i - j < 8) & (j <= i), s, float("-inf"))',
    "(i - j) // 4": "floor_div(i - j, 4)",
    "i // 4": "i // 4",
    "(j - i) % 4": "floor_mod(j - i, 4)",
    "min(i, 3, j)": "tl.minimum(tl.minimum(i, j), 3)",
    "s ** 2 - 1 / s": "s * s - 1.0 / s",
    "s ** 1.5": "tl.exp2(tl.log2(s) * 1.5)",
    "sqrt(2) * s": "s * 1.4142135623730951",
    "~(bool(i))": "~(i != 0)",
}


@pytest.mark.parametrize(("text", "expected"), TRITON.items(), ids=list(TRITON))
def test_triton_text(text: str, expected: str) -> None:
    assert to_triton(from_text(text)) == expected


def test_triton_names_stand_for_whole_subterms() -> None:
    term = from_text("s * 0.5 + t0.f[h, j - i]")
    load = next(iter(term.atoms(Load)))
    assert to_triton(term, {load: "bias"}) == "0.5 * s + bias"


def test_triton_refuses_a_load_without_a_name() -> None:
    with pytest.raises(ExpressionError, match="a name for every load"):
        to_triton(from_text("t0.f[i]"))


@pytest.mark.parametrize("printer", [to_triton, to_torch])
def test_an_unknown_function_is_refused(printer) -> None:
    with pytest.raises(ExpressionError, match="Expected a term that"):
        printer(sympy.gamma(score_symbol()))


VALUES = [
    "s * 0.125 - 3", "s / 3", "50 * tanh(s * 0.02)", "sigmoid(s) * s", "s / sqrt(n0)", "where((j <= i) & (i - j < 8), s, -2)",
    "(i - j) // 4 + s", "(j - i) % 4 + s", "min(i, 3, j) * s", "max(s, -1) + abs(s)", "s ** 2 - 1 / s", "exp(-s) + log(s + 9)",
    "t0.f[i, j] * s", "t1.i[j] + s", "where(bool(t2.b[j]), s, 0.5)", "erf(s) + sin(s) * cos(s)", "floor(s) + ceil(s)", 
    "min(n0, 5) + s",
]  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_torch_text_computes_the_term(text: str) -> None:
    term = from_text(text)
    torch.manual_seed(0)
    tensors = {"t0": torch.randn(4, 6).double(), "t1": torch.arange(6) - 2, "t2": torch.arange(6) % 2 == 0}
    i, j, s = torch.arange(4)[:, None], torch.arange(6)[None, :], torch.randn(4, 6).double()
    found = eval(to_torch(term), {"torch": torch, "s": s, "i": i, "j": j, "n0": 24, **tensors})
    for a in range(4):
        for b in range(6):
            loads = {load: _element(tensors, load, a, b) for load in term.atoms(Load)}
            at = {score_symbol(): s[a, b].item(), integer_symbol("i"): a, integer_symbol("j"): b, integer_symbol("n0"): 24}
            assert math.isclose(float(found[a, b]), float(term.subs(loads).subs(at).evalf()), rel_tol=1e-9, abs_tol=1e-12)


def _element(tensors: dict[str, torch.Tensor], load: Load, i: int, j: int) -> sympy.Number:
    at = tuple(int(index.subs({integer_symbol("i"): i, integer_symbol("j"): j})) for index in load.indices)
    value = tensors[load.tensor][at].item()
    return sympy.Float(value, 17) if isinstance(value, float) else sympy.Integer(int(value))


def test_shared_subterms_come_innermost_first() -> None:
    score = from_text("50 * tanh(s * 0.02)")
    assert [to_text(part) for part in shared([score, derivative(score, score_symbol())])] == ["tanh(0.02 * s)"]
    inner_and_outer = shared([from_text("exp(tanh(s * 2))"), from_text("exp(tanh(s * 2)) + tanh(s * 2)")])
    assert [to_text(part) for part in inner_and_outer] == ["tanh(2 * s)", "exp(tanh(2 * s))"]


def test_nothing_is_shared_without_need() -> None:
    assert shared([from_text("s * 2"), from_text("s * 3 - j"), from_text("s + (-j)")]) == []
