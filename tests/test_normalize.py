"""One spelling for what has several, before and after, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from effcompile.passes.normalize import normalize
from effcompile.trace import lift

aten = torch.ops.aten
X, V = torch.randn(2, 3, 5), torch.randn(2, 5, 4)


def normalised(f: Callable[..., Any], *args: torch.Tensor) -> list[Any]:
    """The operators of `f` after normalisation, which must leave its result as it is."""
    found: list[Any] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graph = lift(module, inputs).graph_module
        normalize(graph)
        graph.graph.lint()
        graph.recompile()
        found.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    result = torch.compile(f, backend=backend, fullgraph=True)(*args)
    torch.testing.assert_close(result, f(*args), equal_nan=True)
    return found


def e(x, keepdim=True):
    return (x - x.amax(-1, keepdim=keepdim)).exp()


SOFTMAXES: dict[str, Callable[..., Any]] = {
    "amax": lambda x: e(x) / e(x).sum(-1, keepdim=True),
    "max": lambda x: (w := (x - x.max(-1, keepdim=True)[0]).exp()) / w.sum(-1, keepdim=True),
    "no shift": lambda x: (w := x.exp()) / w.sum(-1, keepdim=True),
    "middle dimension": lambda x: (w := (x - x.amax(1, keepdim=True)).exp()) / w.sum(1, keepdim=True),
    "dimensions put back": lambda x: (w := (x - x.amax(-1)[..., None]).exp()) / w.sum(-1).unsqueeze(2),
    "reshaped": lambda x: (w := x.exp()) / w.sum(-1).view(2, 3, 1),
    "reciprocal": lambda x: (w := x.exp()) * w.sum(-1, keepdim=True).reciprocal(),
    "reciprocal first": lambda x: w.sum(-1, keepdim=True).reciprocal() * w if (w := x.exp()) is not None else None,
    "logsumexp": lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(),
    "logsumexp without keepdim": lambda x: (x - x.logsumexp(-1)[..., None]).exp(),
    "log_softmax": lambda x: x.log_softmax(-1).exp(),
    "masked after the exponential": lambda x: (w := x.exp().masked_fill(x > 1, 0.0)) / w.sum(-1, keepdim=True),
    "shifted, then masked": lambda x: (w := (x - x.amax(-1, keepdim=True)).exp().masked_fill(x < 0, 0.0)) / w.sum(-1, keepdim=True),
}


@pytest.mark.parametrize("name", [n for n in SOFTMAXES if n != "amax"])
def test_a_softmax_by_hand(name):
    assert aten.softmax.int in normalised(SOFTMAXES[name], X)


def test_a_softmax_divided_after_the_values():
    def f(x, v):
        w = x.exp()
        return torch.bmm(w, v) / w.sum(-1, keepdim=True)

    targets = normalised(f, X, V)
    assert aten.softmax.int in targets and aten.div.Tensor not in targets


OTHERS: dict[str, Callable[..., Any]] = {
    "a sum and something": lambda x: (w := x.exp()) / (w.sum(-1, keepdim=True) + 1e-6),
    "a sum of something else": lambda x: x.exp() / x.sigmoid().sum(-1, keepdim=True),
    "two dimensions": lambda x: (w := x.exp()) / w.sum((-1, -2), keepdim=True),
    "no exponential": lambda x: (w := x.sigmoid()) / w.sum(-1, keepdim=True),
    "a sum that meets another dimension": lambda x: (w := x[0, :, :3].exp()) / w.sum(-1),
    "logsumexp of something else": lambda x: (x - (2 * x).logsumexp(-1, keepdim=True)).exp(),
    "masked by one": lambda x: (w := x.exp().masked_fill(x > 1, 1.0)) / w.sum(-1, keepdim=True),
    "half the reciprocal": lambda x: (w := x.exp()) * (2 * w.sum(-1, keepdim=True)).reciprocal(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_softmax(name):
    assert aten.softmax.int not in normalised(OTHERS[name], X)


def test_values_divided_by_the_sums_of_other_rows():
    """A sum over queries has the shape of one over keys if there are as many."""

    def f(x, v):
        w = x.exp()
        return torch.bmm(w, v) / w.sum(1).unsqueeze(-1)

    assert aten.softmax.int not in normalised(f, torch.randn(2, 5, 5), V)


def test_an_empty_part_of_a_concatenation():
    assert aten.cat.default not in normalised(lambda x: torch.cat([x[:, :0], x], 1) * 2, X)


def test_dropout_outside_training():
    assert normalised(lambda x: torch.dropout(x, 0.5, False) * 2, X) == [aten.mul.Tensor]


def test_zero_added_to_integers():
    assert normalised(lambda x: (x + 0) * 2, X.long()) == [aten.mul.Tensor]


def test_zero_added_to_floats_stays():
    """-0.0 + 0 is 0.0."""
    assert aten.add.Tensor in normalised(lambda x: (x + 0) * 2, X)


def test_numbers_are_folded():
    assert normalised(lambda x: x * (1 / torch.tensor(64.0).sqrt() + 1), X) == [aten.full.default, aten.mul.Tensor]


def test_numbers_of_an_input_are_not_folded():
    assert aten.sqrt.default in normalised(lambda x, n: x * n.sqrt(), X, torch.tensor(64.0))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.cat([x.new_empty(0), x]),
        lambda x: torch.cat([x.new_empty(0), x]).view(-1, 1),
        lambda x: (x.long() + 0, x.long())[0],
        lambda x: x + 0 if not x.is_floating_point() else torch.cat([x[:0], x]),
    ],
    ids=["cat", "view of cat", "sum", "cat of slice"],
)
def test_what_is_returned_keeps_memory_of_its_own(f):
    """A result may be written to by its caller, and the input must not change with it."""

    def backend(module, inputs):
        graph = lift(module, inputs).graph_module
        normalize(graph)
        graph.recompile()
        return graph

    x = torch.arange(5.0)
    torch.compile(f, backend=backend, fullgraph=True)(x).add_(1)
    assert x.tolist() == [0, 1, 2, 3, 4]


EINSUMS = {
    "scores, a decay, values": ("bihn,bjhn,bhij,bjhp->bihp", [(2, 3, 4, 5), (2, 6, 4, 5), (2, 4, 3, 6), (2, 6, 4, 7)], 2),
    "a factor of the result": ("bhtd,bhtdv,bht->bhtv", [(2, 3, 4, 5), (2, 3, 4, 5, 6), (2, 3, 4)], 1),
    "several sums": ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)], 2),
    "a length of 1 for another": ("ab,bc,cd->ad", [(2, 3), (1, 4), (4, 5)], 2),
    "nothing summed over": ("bd,bn,bd->bdn", [(2, 3), (2, 4), (2, 3)], 1),
    "the sum of one alone": ("ab,cd,d->ac", [(2, 3), (4, 5), (5,)], 2),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum_of_several_is_products_of_two(name: str) -> None:
    equation, shapes, count = EINSUMS[name]
    with torch.backends.opt_einsum.flags(enabled=False):
        found = normalised(lambda *xs: torch.einsum(equation, *xs), *(torch.randn(shape) for shape in shapes))
    assert found.count(aten.einsum.default) == count
    assert (aten.mul.Tensor in found) == (name in ("scores, a decay, values", "a factor of the result"))
