"""Closed forms of recurrences by cumulative sums and products: which become a linear scan, and what only resembles one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from effcompile import debug
from effcompile.passes import closed_forms
from tests import model_zoo
from tests.substituting import assert_equal, assert_left, assert_scans


def logs(*shape: int) -> torch.Tensor:
    """Logarithms of decays, not so small that a closed form loses its digits."""
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


G, X = logs(2, 6, 3), values(2, 6, 3)
H = values(2, 3) * 0.5
POSITIVE = X.abs() + 0.1


def total(g):
    return g.cumsum(1)


def products(g):
    return g.exp().cumprod(1)


def heinsen(g, log_x):
    """The log-space form of minGRU and minLSTM."""
    a_star = g.cumsum(1)
    return a_star + (log_x - a_star).logcumsumexp(1)


TWO_OPERANDS: dict[str, Callable[..., Any]] = {
    "exponentials": lambda g, x: total(g).exp() * (x * (-total(g)).exp()).cumsum(1),
    "division": lambda g, x: (x / total(g).exp()).cumsum(1) * total(g).exp(),
    "reciprocal": lambda g, x: (x * total(g).exp().reciprocal()).cumsum(1) * total(g).exp(),
    "divided by the inverse": lambda g, x: (x * total(-g).exp()).cumsum(1) / total(-g).exp(),
    "products": lambda g, x: products(g) * (x / products(g)).cumsum(1),
    "power of -1": lambda g, x: products(g) * (x * products(g).pow(-1)).cumsum(1),
    "product and sum": lambda g, x: products(g) * (x * (-total(g)).exp()).cumsum(1),
    "shifted by the maximum": lambda g, x: (lambda f, m: (f - m).exp() * (x * (m - f).exp()).cumsum(1))(
        total(g), total(g).amax(1, keepdim=True)
    ),
    "shifted by the last": lambda g, x: (lambda f: (f - f[:, -1:]).exp() * (x * (f[:, -1:] - f).exp()).cumsum(1))(total(g)),
    "half the exponent twice": lambda g, x: (
        (0.5 * total(g)).exp() * (total(g) / 2).exp() * (x * (-0.5 * total(g)).exp() ** 2).cumsum(1)
    ),
    "transposed": lambda g, x: (
        (lambda f, y: f.exp() * (y * (-f).exp()).cumsum(-1))(g.mT.cumsum(-1), x.mT).mT
    ),
    "reversed": lambda g, x: (lambda f: f.exp() * (x * (-f).exp()).flip(1).cumsum(1).flip(1))(g.flip(1).cumsum(1).flip(1)),
    "by logcumsumexp": lambda g, x: heinsen(g, x).exp(),
    "logcumsumexp times exponential": lambda g, x: (x - total(g)).logcumsumexp(1).exp() * total(g).exp(),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO_OPERANDS)
def test_spellings(name):
    found = assert_scans(closed_forms.find, TWO_OPERANDS[name], G, X)
    coefficient, offset, initial = found.scans[0].args
    assert coefficient is not None and initial is None
    assert not {"cumsum", "cumprod", "logcumsumexp"} & set(found.names)


FURTHER: dict[str, Callable[..., Any]] = {
    "initial state": lambda g, x, h: total(g).exp() * ((x * (-total(g)).exp()).cumsum(1) + h[:, None]),
    "initial state by itself": lambda g, x, h: (
        total(g).exp() * (x * (-total(g)).exp()).cumsum(1) + total(g).exp() * h.unsqueeze(1)
    ),
    "initial state of products": lambda g, x, h: products(g) * (h[:, None] + (x / products(g)).cumsum(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", FURTHER)
def test_initial_states(name):
    found = assert_scans(closed_forms.find, FURTHER[name], G, X, H)
    assert found.scans[0].args[2] is not None
    assert "cumsum" not in found.names


def test_initial_state_in_log_space():
    """An initial state joined in front of the values, with a decay of one, and cut off again."""

    def f(g, x, h):
        log_values = torch.cat([h.log()[:, None], x.log()], dim=1)
        return heinsen(F.pad(g, (0, 0, 1, 0)), log_values).exp()[:, -x.shape[1] :]

    found = assert_scans(closed_forms.find, f, G, POSITIVE, H.abs() + 0.1)
    offset, initial = found.scans[0].args[1:]
    assert offset.meta["val"].shape == (6, 2, 3) and initial is not None
    assert "cat" not in found.names and "pad" not in found.names


def test_initial_state_as_the_first_step():
    """If it is not cut off, it is one more step."""

    def f(g, x, h):
        log_values = torch.cat([h.log()[:, None], x.log()], dim=1)
        return heinsen(F.pad(g, (0, 0, 1, 0)), log_values).exp()

    found = assert_scans(closed_forms.find, f, G, POSITIVE, H.abs() + 0.1)
    assert found.scans[0].args[1].meta["val"].shape == (7, 2, 3)


def test_several_factors():
    """What is summed is a product of which only one factor is a weight."""

    def f(g, x, z):
        return total(g).exp() * (x * (-total(g)).exp() * (1 - z)).cumsum(1)

    assert_scans(closed_forms.find, f, G, X, values(2, 6, 3))


def test_decay_without_channels():
    found = assert_scans(closed_forms.find, lambda g, x: TWO_OPERANDS["exponentials"](g[..., None], x), logs(2, 6), X)
    assert found.scans[0].args[0].meta["val"].shape == (6, 2, 1)


def test_a_gate_of_softplus():
    """minGRU as it is written: decays and inputs by softplus, in log space."""

    def f(gate, hidden):
        log_values = -F.softplus(-gate) + torch.where(hidden >= 0, (hidden.relu() + 0.5).log(), -F.softplus(-hidden))
        return heinsen(-F.softplus(gate), log_values).exp()

    found = assert_scans(closed_forms.find, f, values(2, 6, 3), X)
    assert "logcumsumexp" not in found.names


def test_sums_that_are_used_elsewhere_stay():
    def f(g, x):
        f = total(g)
        return f.exp() * (x * (-f).exp()).cumsum(1), f

    found = assert_scans(closed_forms.find, f, G, X)
    assert found.names.count("cumsum") == 1


def test_strides_are_kept():
    def f(g, x):
        return TWO_OPERANDS["exponentials"](g.mT, x.mT).view(2, 18)

    assert_scans(closed_forms.find, f, logs(2, 3, 6), values(2, 3, 6))


def test_half_precision():
    """The exponential of a small exponent is taken in float32: it would be 1 in bfloat16, and nothing would decay."""
    torch._dynamo.reset()
    g, x = torch.full((2, 64, 3), -0.001, dtype=torch.bfloat16), X.new_ones(2, 64, 3).to(torch.bfloat16)
    f = TWO_OPERANDS["exponentials"]
    graph = debug.capture(f, g, x)
    (found,), _ = closed_forms.find(graph)
    coefficient, offset, _ = (argument and argument.meta["val"].dtype for argument in found.scans[0].args)
    assert (coefficient, offset) == (torch.float32, torch.bfloat16)
    found.apply()
    found.commit()
    graph.recompile()
    wanted, eager, result = f(g.double(), x.double()), f(g, x), graph(*debug.example_inputs(graph))[0]
    assert (result - wanted).norm() <= 2 * (eager - wanted).norm()


def test_symbolic_sizes():
    """A closed form holds for all lengths."""
    g, x = logs(4, 6, 3), values(4, 6, 3)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(g, dim), torch._dynamo.mark_dynamic(x, dim)
    torch._dynamo.reset()
    graph = debug.capture(TWO_OPERANDS["exponentials"], g, x)
    (found,), rejected = closed_forms.find(graph)
    assert rejected == []
    found.apply()
    found.commit()
    graph.graph.lint()
    graph.recompile()
    assert_equal(graph(*debug.example_inputs(graph)), TWO_OPERANDS["exponentials"](g, x))


@settings(max_examples=10, deadline=None)
@given(
    length=st.integers(2, 12), batch=st.integers(1, 3), width=st.integers(1, 3), dim=st.integers(0, 2),
    name=st.sampled_from(("exponentials", "products", "by logcumsumexp")),
)  # fmt: skip
def test_any_shape(length, batch, width, dim, name):
    shape = [batch, width]
    shape.insert(dim, length)

    def f(g, x):
        return TWO_OPERANDS[name](g.movedim(dim, 1), x.movedim(dim, 1)).movedim(1, dim)

    assert_scans(closed_forms.find, f, logs(*shape), values(*shape))


# -------------------------------------------------------------------- what is left

WEIGHTS = "is the decay from each step of a weighted cumulative sum"
CLOSE: dict[str, tuple[Callable[..., Any], str]] = {
    "weights of the same sign": (lambda g, x: total(g).exp() * (x * total(g).exp()).cumsum(1), WEIGHTS),
    "another decay outside": (lambda g, x: total(2 * g).exp() * (x * (-total(g)).exp()).cumsum(1), WEIGHTS),
    "a power of a decay": (lambda g, x: (2 * total(g)).exp() * (x * (-2 * total(g)).exp()).cumsum(1), WEIGHTS),
    "a constant added": (lambda g, x: products(g) * (x / (products(g) + 1e-8)).cumsum(1), WEIGHTS),
    "the wrong dimension": (lambda g, x: total(g).exp() * (x * (-total(g)).exp()).cumsum(2), WEIGHTS),
    "clamped": (lambda g, x: total(g).exp() * (x * (-total(g).clamp(min=-2.0)).exp()).cumsum(1), "pass through clamp"),
    "clamped product": (lambda g, x: products(g) * (x / products(g).clamp(min=1e-6)).cumsum(1), "pass through clamp"),
    "clamped everywhere": (
        lambda g, x: total(g).clamp(min=-2.0).exp() * (x * (-total(g).clamp(min=-2.0)).exp()).cumsum(1), "pass through clamp",
    ),
    "one direction only": (lambda g, x: total(g).exp() * (x * (-total(g)).exp()).flip(1).cumsum(1).flip(1), WEIGHTS),
    "a logarithm": (heinsen, "used as a logarithm"),
    "rounded": (lambda g, x: total(g).exp() * (x * (-total(g)).round(decimals=3).exp()).cumsum(1), "pass through round"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSE)
def test_what_is_close(name):
    f, why = CLOSE[name]
    assert_left(closed_forms.find, f, G, X, why=why)


@pytest.mark.parametrize(
    "f",
    [
        lambda g, x: total(g),
        lambda g, x: total(g).exp() * x,
        lambda g, x: products(g),
        lambda g, x: x.cumsum(1) * g,
        lambda g, x: (x - x.logcumsumexp(1)).exp(),
    ],
    ids=["sum", "decay", "product", "times", "softmax so far"],
)
def test_cumulative_operations_by_themselves_are_left_without_a_word(f):
    assert_left(closed_forms.find, f, G, X, why="")


@pytest.mark.parametrize("name", ["mamba2", "llama"])
def test_models_without_closed_forms(name):
    """Segment sums within chunks are sums of sums, with no weights in between."""
    torch._dynamo.reset()
    model, inputs = model_zoo.build(name)
    with torch.no_grad():
        graph = debug.capture(model.eval(), **inputs)
    assert closed_forms.find(graph) == ([], [])
