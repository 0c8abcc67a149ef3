"""Associative scans, whole, as trees of calls and by hand: which become a linear scan, and what only resembles one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._higher_order_ops.associative_scan import associative_scan, associative_scan_op

from effcompile import debug
from effcompile.passes import associative
from effcompile.passes.normalize import normalize
from tests import model_zoo
from tests.substituting import FUNCTORCH, SCAN, assert_equal, assert_left, assert_scans, replaced


def gates(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 + 0.1


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


A, B = gates(2, 8, 3), values(2, 8, 3)


def affine(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]


def tree(combine, xs, dim=1, reverse=False):
    return associative_scan(combine, xs, dim=dim, reverse=reverse, combine_mode="generic")


def whole(combine, xs, dim=1, reverse=False):
    """torch's operation as it is captured on a GPU."""
    moved = [x.movedim(dim, 0) for x in xs]
    moved = [x.flip([0]) for x in moved] if reverse else moved
    n = len(xs)
    states = associative_scan_op(lambda *leaves: list(combine(leaves[:n], leaves[n:])), moved, ())
    states = [x.flip([0]) for x in states] if reverse else states
    return [x.movedim(0, dim) for x in states]


def operands(scan):
    """Three steps are two levels of a tree, of which Dynamo makes more calls than one would like to wait for."""
    return (A, B) if scan is whole else (gates(2, 3, 2), values(2, 3, 2))


# -------------------------------------------------------------------- combine functions

COMBINES: dict[str, tuple[Callable[..., Any], int]] = {
    "affine": (affine, 1),
    "offset first": (lambda x, y: (x[0] * y[1] + y[0], y[1] * x[1]), 0),
    "sum turned": (lambda x, y: (x[0] * y[0], y[1] + x[1] * y[0]), 1),
    "addcmul": (lambda x, y: (y[0].mul(x[0]), torch.addcmul(y[1], y[0], x[1])), 1),
    "subtraction of a negative": (lambda x, y: (x[0] * y[0], y[1] - (-x[1]) * y[0]), 1),
    "expanded twice": (lambda x, y: (x[0] * y[0], (x[1] * y[0] + y[1]) * 0.5 + 0.5 * (y[1] + y[0] * x[1])), 1),
}


@pytest.mark.parametrize(("scan", "name"), [(tree, "offset first"), (tree, "addcmul"), *((whole, name) for name in COMBINES)])
def test_combine_functions(scan, name):
    combine, result = COMBINES[name]
    xs = operands(scan)[:: 1 if result else -1]
    found = assert_scans(associative.find, lambda x, y: scan(combine, (x, y))[result], *xs)
    coefficient, offset, initial = found.scans[0].args
    assert coefficient is not None and initial is None


@pytest.mark.parametrize(("scan", "dim", "reverse"), [(tree, 0, True), (tree, 2, False), (whole, 0, False), (whole, 2, True)])
def test_dimensions_and_directions(scan, dim, reverse):
    assert_scans(associative.find, lambda a, b: scan(affine, (a, b), dim, reverse)[1], gates(3, 2, 3), values(3, 2, 3))


@pytest.mark.parametrize(("scan", "length"), [(tree, 2), (tree, 6), (whole, 1), (whole, 2), (whole, 5)])
def test_lengths(scan, length):
    assert_scans(associative.find, lambda a, b: scan(affine, (a, b))[1], gates(2, length, 3), values(2, length, 3))


def test_one_step_is_no_scan():
    assert_left(associative.find, lambda a, b: tree(affine, (a, b))[1], gates(2, 1, 3), values(2, 1, 3), why="")


@pytest.mark.parametrize("scan", [tree, whole])
def test_all_results(scan):
    """The products of the coefficients are a recurrence as well: from one, by zero."""
    found = assert_scans(associative.find, lambda a, b: tuple(scan(affine, (a, b))), *operands(scan), count=2)
    assert sorted(node.args[2] is not None for node in found.scans) == [False, True]


@pytest.mark.parametrize("scan", [tree, whole])
def test_two_recurrences_share_a_coefficient(scan):
    def combine(x, y):
        return x[0] * y[0], y[0] * x[1] + y[1], y[0] * x[2] + y[2]

    a, b = operands(scan)
    found = assert_scans(associative.find, lambda a, b, c: tuple(scan(combine, (a, b, c))[1:]), a, b, b + 1, count=2)
    assert found.scans[0].args[0].name == found.scans[1].args[0].name or scan is tree


@pytest.mark.parametrize("scan", [tree, whole])
@pytest.mark.parametrize(
    ("combine", "wanted"),
    [(lambda x, y: (x[0] + y[0],), [False, True, False]), (lambda x, y: (x[0] * y[0],), [True] * 3)],
    ids=["sum", "product"],
)
def test_one_leaf(scan, combine, wanted):
    found = assert_scans(associative.find, lambda a: scan(combine, (a,))[0], operands(scan)[0])
    given_operands = [x is not None for x in found.scans[0].args]
    assert given_operands == wanted


def in_log_space(x, y):
    return x[0] + y[0], torch.logaddexp(y[0] + x[1], y[1])


@pytest.mark.parametrize("scan", [tree, whole])
def test_log_space(scan):
    def f(a, b):
        return scan(in_log_space, (a.log(), b))[1].exp()

    found = assert_scans(associative.find, f, *operands(scan))
    assert found.names.count("exp") == 2 + (scan is whole)


def test_half_precision():
    torch._dynamo.reset()
    graph = debug.capture(lambda a, b: whole(affine, (a, b))[1], A.to(torch.bfloat16), B.to(torch.bfloat16))
    (found,), _ = associative.find(graph)
    assert found.scans[0].meta["val"].dtype is torch.bfloat16


# -------------------------------------------------------------------- trees by hand


def doubling(a, b, shift):
    step = 1
    while step < b.shape[1]:
        a, b = a * shift(a, step, 1.0), b + a * shift(b, step, 0.0)
        step *= 2
    return b


def padded(x, step, fill):
    return F.pad(x, (0, 0, step, 0), value=fill)[:, : x.shape[1]]


def padded_then_sliced(x, step, fill):
    return F.pad(x[:, :-step], (0, 0, step, 0), value=fill)


def joined(x, step, fill):
    return torch.cat([torch.full_like(x[:, :step], fill), x[:, :-step]], dim=1)


def rolled(x, step, fill):
    late = torch.arange(x.shape[1])[:, None] >= step
    return torch.where(late, x.roll(step, 1), fill)


def masked(x, step, fill):
    early = torch.arange(x.shape[1]) < step
    return x.roll(step, dims=1).masked_fill(early[None, :, None], fill)


def in_place(a, b):
    step, b = 1, b.clone()
    while step < b.shape[1]:
        b[:, step:] = b[:, step:] + a[:, step:] * b[:, :-step].clone()
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], dim=1)
        step *= 2
    return b


def even_and_odd(a, b):
    """Recursive doubling with the results interleaved again."""
    n = b.shape[1]
    if n == 1:
        return a, b
    half = n // 2 * 2
    a_odd, b_odd = even_and_odd(a[:, 0:half:2] * a[:, 1:half:2], a[:, 1:half:2] * b[:, 0:half:2] + b[:, 1:half:2])
    last = a_odd.shape[1] - (n % 2 == 0)
    a_even, b_even = a[:, 2::2] * a_odd[:, :last], a[:, 2::2] * b_odd[:, :last] + b[:, 2::2]
    a_even, b_even = (torch.cat([x[:, :1], y], 1) for x, y in ((a, a_even), (b, b_even)))
    pairs = []
    for even, odd in ((a_even, a_odd), (b_even, b_odd)):
        joint = torch.stack([even[:, : n // 2], odd], 2).reshape(b.shape[0], half, -1)
        pairs.append(torch.cat([joint, even[:, n // 2 :]], 1) if n % 2 else joint)
    return pairs[0], pairs[1]


BY_HAND: dict[str, Callable[..., Any]] = {
    "padded": lambda a, b: doubling(a, b, padded),
    "padded then sliced": lambda a, b: doubling(a, b, padded_then_sliced),
    "joined": lambda a, b: doubling(a, b, joined),
    "rolled": lambda a, b: doubling(a, b, rolled),
    "masked": lambda a, b: doubling(a, b, masked),
    "in place": in_place,
    "even and odd": lambda a, b: even_and_odd(a, b)[1],
}


@pytest.mark.parametrize("length", [3, 5, 8])
@pytest.mark.parametrize("name", BY_HAND)
def test_trees_by_hand(name, length):
    assert_scans(associative.find, BY_HAND[name], gates(2, length, 3), values(2, length, 3))


def test_two_steps_by_hand_are_left():
    """x + a * shift(x) is as likely a token shift."""
    assert_left(associative.find, BY_HAND["padded"], gates(2, 2, 3), values(2, 2, 3), why="")


def test_cumulative_sum_by_hand():
    def f(x):
        for step in (1, 2, 4):
            x = x + padded(x, step, 0.0)
        return x

    found = assert_scans(associative.find, f, B)
    assert found.scans[0].args[0] is None


def test_initial_state():
    def f(a, b, h):
        products, sums = even_and_odd(a, b)
        return sums + products * h[:, None]

    found = assert_scans(associative.find, f, A, B, values(2, 3))
    assert found.scans[0].args[2] is not None


def test_coefficient_without_channels():
    def f(a, b):
        return doubling(a[..., None], b, padded)

    found = assert_scans(associative.find, f, gates(2, 8), B)
    assert found.scans[0].args[0].meta["val"].shape == (8, 2, 1)


def test_one_scan_after_another():
    def f(a, b, c):
        return doubling(a, doubling(a, b, padded) * c, padded)

    assert_scans(associative.find, f, A, B, gates(2, 8, 3), count=2)


def test_what_comes_before_and_after():
    """A token shift in front, by operations that are followed too, and a gate behind."""

    def f(a, b, c):
        x = b * c + (1 - c) * padded(b, 1, 0.0)
        return doubling(a, x * 2, padded) * c

    assert_scans(associative.find, f, A, B, gates(3))


@settings(max_examples=12, deadline=None)
@given(length=st.integers(3, 40), batch=st.integers(1, 3), width=st.integers(1, 3), dim=st.integers(0, 2), reverse=st.booleans())
def test_any_shape(length, batch, width, dim, reverse):
    """Dimensions of one size are told apart by what is done along them."""
    shape = [batch, width]
    shape.insert(dim, length)

    def f(a, b):
        a, b = (x.movedim(dim, 1).flip(1) if reverse else x.movedim(dim, 1) for x in (a, b))
        states = even_and_odd(a, b)[1] if length % 2 else doubling(a, b, joined)
        return (states.flip(1) if reverse else states).movedim(1, dim)

    assert_scans(associative.find, f, gates(*shape), values(*shape))


# -------------------------------------------------------------------- what is left

NOT_AFFINE = {
    "sums of both": lambda x, y: (x[0] + y[0], y[0] * x[1] + y[1]),
    "decay on the wrong side": lambda x, y: (x[0] * y[0], x[0] * y[1] + x[1]),
    "earlier decay": lambda x, y: (x[0] * y[0], x[0] * x[1] + y[1]),
    "a little more": lambda x, y: (x[0] * y[0] + 1e-6, y[0] * x[1] + y[1]),
    "maximum": lambda x, y: (x[0] + y[0], torch.maximum(y[0] + x[1], y[1])),
    "nonlinear": lambda x, y: (x[0] * y[0], torch.tanh(y[0] * x[1] + y[1])),
}


@pytest.mark.parametrize(("scan", "name"), [(tree, "a little more"), (tree, "nonlinear"), *((whole, name) for name in NOT_AFFINE)])
def test_other_combine_functions(scan, name):
    assert_left(
        associative.find, lambda a, b: scan(NOT_AFFINE[name], (a, b))[1], A, B, why="combine function is not that of a linear"
    )


def test_a_logarithm_stays_one():
    assert_left(associative.find, lambda a, b: whole(in_log_space, (a.log(), b))[1], A, B, why="used as a logarithm")
    assert_left(associative.find, lambda a, b: tree(in_log_space, (a.log(), b))[1], *operands(tree), why="used as a logarithm")


def test_the_lower_levels_of_another_tree_are_left():
    """The coefficients of its lower levels are products, and still the whole is none."""
    combine = NOT_AFFINE["decay on the wrong side"]
    assert_left(associative.find, lambda a, b: tree(combine, (a, b))[1], A, B, why="combine function is not that of a linear")


WRONG = {
    "a level is missing": lambda a, b: doubling_to(a, b, (1, 2)),
    "the last shift is wrong": lambda a, b: doubling_to(a, b, (1, 2, 3)),
    "the coefficients are not updated": lambda a, b: constant_coefficient(a, b),
    "padded by ones": lambda a, b: doubling(a, b, lambda x, step, fill: padded(x, step, 1.0)),
    "padded by a little": lambda a, b: doubling(a, b, lambda x, step, fill: padded(x, step, fill + 1e-9)),
}


def doubling_to(a, b, steps):
    for step in steps:
        a, b = a * padded(a, step, 1.0), b + a * padded(b, step, 0.0)
    return b


def constant_coefficient(a, b):
    for step in (1, 2, 4):
        b = b + a * padded(b, step, 0.0)
    return b


@pytest.mark.parametrize("name", WRONG)
def test_wrong_trees(name):
    why = "steps only" if name.startswith(("a level", "the last")) else "steps only|not the states of a linear recurrence"
    assert_left(associative.find, WRONG[name], A, B, why=why)


def test_a_tree_with_one_wrong_slice():
    """Dynamo's tree with an odd element in the place of an even one."""
    torch._dynamo.reset()
    graph = debug.capture(lambda a, b: tree(affine, (a, b))[1], A, B)
    slices = [n for n in graph.graph.nodes if n.target is torch.ops.aten.slice.Tensor and n.args[2:] == (2, None, 2)]
    last = slices[-1]
    last.args = (*last.args[:2], 1, -1, 2)
    found, rejected = associative.find(graph)
    assert found == []
    assert any("results are not the recurrence's states" in x.why for x in rejected)


def test_rotations_and_token_shifts_are_no_scans():
    def f(x, cos, sin):
        left, right = x.chunk(2, -1)
        y = x * cos + torch.cat([-right, left], -1) * sin
        return y + 0.5 * F.pad(y, (0, 0, 1, -1))

    assert_left(associative.find, f, values(2, 8, 6), gates(8, 6), gates(8, 6), why="")


def test_switching_grad_mode_inside():
    def f(a, b):
        a, b = a * padded(a, 1, 1.0), b + a * padded(b, 1, 0.0)
        with torch.no_grad():
            a, b = a * padded(a, 2, 1.0), b + a * padded(b, 2, 0.0)
        return b

    assert_left(associative.find, f, gates(2, 4, 3).requires_grad_(), values(2, 4, 3), why="switched inside")


def test_symbolic_lanes():
    def f(a, b):
        return doubling(a[..., :1], b, padded)

    torch._dynamo.reset()
    a, b = gates(4, 5, 6), values(4, 5, 6)
    torch._dynamo.mark_dynamic(a, 0), torch._dynamo.mark_dynamic(b, 0)
    graph = debug.capture(f, a, b)
    (found,), _ = associative.find(graph)
    found.apply()
    found.commit()
    graph.graph.lint()
    graph.recompile()
    assert_equal(graph(*debug.example_inputs(graph)), f(a, b))


def test_symbolic_length():
    """A tree is made for one length; its guards hold for others."""
    torch._dynamo.reset()
    a, b = gates(2, 7, 3), values(2, 7, 3)
    torch._dynamo.mark_dynamic(a, 1), torch._dynamo.mark_dynamic(b, 1)
    graph = debug.capture(lambda a, b: doubling_to(a, b, (1, 2, 4)), a, b)
    found, rejected = associative.find(graph)
    assert found == []
    assert any("its length is symbolic" in x.why for x in rejected)


# -------------------------------------------------------------------- models


@pytest.mark.parametrize(("name", "layers"), [("mamba", 2), ("jamba", 1)])
def test_models(name, layers):
    """Every layer's scan is found, and nothing of its tree is left."""
    torch._dynamo.reset()
    model, inputs = model_zoo.build(name)
    model.eval()
    with torch.no_grad():
        wanted = model(**inputs)[0]
        (graph,) = [g for g in debug.capture_all(model, **inputs) if len(g.graph.nodes) > 50]
        normalize(graph)
        found, rejected = associative.find(graph)
        assert len(found) == layers and rejected == []
        for substitution in found:
            substitution.apply()
            substitution.commit()
        graph.graph.lint()
        graph.recompile()
        names = [str(getattr(node.target, "__name__", "")) for node in graph.graph.nodes]
        assert not set(FUNCTORCH) & set(names)
        assert sum(node.target is SCAN for node in graph.graph.nodes) == layers
        results = graph(*debug.example_inputs(graph))
    found_logits = [x for x in results if isinstance(x, torch.Tensor) and x.shape == wanted.shape]
    assert any(torch.allclose(x, wanted, rtol=1e-3, atol=1e-5) for x in found_logits)


def test_a_model_without_scans():
    torch._dynamo.reset()
    model, inputs = model_zoo.build("llama")
    with torch.no_grad():
        graph = debug.capture(model.eval(), **inputs)
    assert associative.find(graph) == ([], [])


def test_replaced_checks_results():
    """The vocabulary itself: a wrong substitute is seen."""

    def wrong(graph):
        found, rejected = associative.find(graph)
        for substitution in found:
            scan = substitution.scans[0]
            scan.args = (None, *scan.args[1:])
        return found, rejected

    with pytest.raises(AssertionError):
        replaced(wrong, lambda a, b: whole(affine, (a, b))[1], A, B)
