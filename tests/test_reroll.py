"""Unrolled loops that become one scan again, and what only looks like a loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager

from effcompile import _dynamo, debug
from effcompile.builder import Builder
from effcompile.errors import EffcompileError
from effcompile.passes import rollup
from effcompile.passes.reroll import Rerolled, find_loops, reroll
from effcompile.passes.rollup import can_run, torch_version
from effcompile.pattern import source_line
from effcompile.trace import lift
from tests.model_zoo import build, result

aten = torch.ops.aten
SCAN = torch.ops.higher_order.scan
T, B, D = 8, 2, 4


@dataclass
class Outcome:
    """What became of a function's graph."""

    graph: Any = None
    rerolled: Rerolled = field(default_factory=Rerolled)
    value: Any = None

    @property
    def scans(self) -> int:
        return self.count(SCAN)

    def count(self, target: Any) -> int:
        return sum(node.target is target for node in self.graph.graph.nodes)

    @property
    def steps(self) -> list[int]:
        return [loop.steps for loop in self.rerolled.loops]


def as_it_is(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """No compiler: torch runs a scan as a Python loop."""
    module.recompile()
    return module


def inductor(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    return _dynamo.inductor(module, inputs, {})


def rolled(
    f: Callable[..., Any], *args: Any, compiler: Any = aot_eager, train: bool = True, least: int = 4, tol: float = 1e-5
) -> Outcome:
    """`f` with its loops rolled up, whose outputs and gradients must be those of `f`, and whose outputs' strides too."""
    outcome = Outcome()

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        outcome.graph = lift(module, inputs).graph_module
        outcome.rerolled = reroll(outcome.graph, least_steps=least)
        outcome.graph.graph.lint()
        return compiler(outcome.graph, inputs)

    with torch.set_grad_enabled(train):
        ours, theirs = (tuple(_leaf(a, train) for a in args) for _ in range(2))
        torch._dynamo.reset()
        got = torch.compile(f, backend=backend, fullgraph=True)(*ours)
        want = f(*theirs)
        _compare(got, want, tol)
        if train:
            _scalar(got).backward()
            _scalar(want).backward()
            for a, b in zip(ours, theirs, strict=True):
                if isinstance(a, torch.Tensor) and a.requires_grad:
                    torch.testing.assert_close(
                        *(g.grad if g.grad is not None else torch.zeros_like(g) for g in (a, b)), rtol=tol, atol=tol
                    )
    outcome.value = got
    return outcome


def _leaf(a: Any, train: bool) -> Any:
    return a.detach().clone().requires_grad_(train) if isinstance(a, torch.Tensor) and a.is_floating_point() else a


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _compare(got: Any, want: Any, tol: float) -> None:
    for a, b in zip(_tensors(got), _tensors(want), strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)
        assert a.stride() == b.stride()


def _scalar(value: Any) -> torch.Tensor:
    weights = (1.0 + 0.1 * k for k in itertools.count())
    return sum(
        (w * (x.float() * x.float().cos()).sum() for w, x in zip(weights, _tensors(value), strict=False) if x.requires_grad),
        torch.zeros(()),
    )


def inputs(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*shape) / 2 for shape in shapes)


# -------------------------------------------------------------------- every read with every sink

READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "select": lambda x: lambda t: x[:, t],
    "unbind": lambda x: (lambda parts: lambda t: parts[t])(x.unbind(1)),
    "slice": lambda x: lambda t: x[:, t : t + 1].squeeze(1),
    "split": lambda x: (lambda parts: lambda t: parts[t].squeeze(1))(x.split(1, dim=1)),
    "chunk": lambda x: (lambda parts: lambda t: parts[t].squeeze(1))(x.chunk(T, dim=1)),
    "leading": lambda x: (lambda moved: lambda t: moved[t])(x.transpose(0, 1)),
    "narrow": lambda x: lambda t: x.narrow(1, t, 1).squeeze(1),
    "backwards": lambda x: lambda t: x[:, T - 1 - t],
    "negative": lambda x: lambda t: x[:, t - T],
}


class Stacked:
    def __init__(self, x):
        self.outs = []

    def put(self, t, h):
        self.outs.append(h)

    def get(self):
        return torch.stack(self.outs, 1)


class StackedLast(Stacked):
    def get(self):
        return torch.stack(self.outs, -1)


class Concatenated(Stacked):
    def put(self, t, h):
        self.outs.append(h[:, None])

    def get(self):
        return torch.cat(self.outs, dim=1)


class Reversed(Stacked):
    def get(self):
        return torch.stack(self.outs[::-1], 1)


class Written:
    def __init__(self, x):
        self.out = torch.zeros_like(x)

    def put(self, t, h):
        self.out[:, t] = h

    def get(self):
        return self.out


class WrittenInEmpty(Written):
    def __init__(self, x):
        self.out = torch.empty(B, T, D)


class WrittenBackwards(Written):
    def put(self, t, h):
        self.out[:, T - 1 - t] = h


class WrittenAsSlices(Written):
    def put(self, t, h):
        self.out[:, t : t + 1] = h[:, None]


class WrittenInPart(Written):
    def __init__(self, x):
        self.out = torch.ones(B, 3 * T, D)

    def put(self, t, h):
        self.out[:, 2 * t + 3] = h


class Nothing:
    def __init__(self, x):
        pass

    def put(self, t, h):
        pass

    def get(self):
        return None


SINKS = {
    "stack": Stacked,
    "stack last": StackedLast,
    "cat": Concatenated,
    "stack reversed": Reversed,
    "zeros": Written,
    "empty": WrittenInEmpty,
    "backwards": WrittenBackwards,
    "slices": WrittenAsSlices,
    "part of ones": WrittenInPart,
    "nothing": Nothing,
}


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("read", READS)
def test_every_read_with_every_sink(read, sink):
    def f(x, w):
        at, out, h = READS[read](x), SINKS[sink](x), x[:, 0] * 0.5
        for t in range(T):
            h = torch.tanh(at(t) + h @ w)
            out.put(t, h)
        return out.get(), h

    outcome = rolled(f, *inputs((B, T, D), (D, D)), compiler=as_it_is, train=False)
    assert outcome.steps == [T] and outcome.scans == 1
    assert outcome.count(aten.matmul.default) == 0 and outcome.count(aten.tanh.default) == 0
    assert not outcome.rerolled.refused


# -------------------------------------------------------------------- forms of loops


def cell(h, x, w):
    return torch.tanh(x + h @ w)


def lstm(x, w, h, c):
    outs = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] + h @ w).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outs.append(h)
    return torch.stack(outs, 1), h, c


def chunked(x, w, s):
    """Linear attention by chunks of three."""
    outs = []
    for t in range(0, x.shape[1], 3):
        q = x[:, t : t + 3]
        outs.append(q @ s + (q @ q.transpose(1, 2)).tril() @ q)
        s = s * 0.9 + q.transpose(1, 2) @ (q @ w)
    return torch.cat(outs, 1), s


def from_none(x, w):
    h, outs = None, []
    for t in range(x.shape[1]):
        h = x[:, t] if h is None else cell(h, x[:, t], w)
        outs.append(h)
    return torch.stack(outs, 1)


def dead_end(x, w):
    """The state after the last step is used by nothing."""
    h, outs = torch.zeros(B, D), []
    for t in range(x.shape[1]):
        outs.append((h * x[:, t]).cos())
        h = cell(h, x[:, t], w)
    return torch.stack(outs, 1)


def both_ways(x, w):
    forth, back, h = [], [], torch.zeros(B, D)
    for t in range(x.shape[1]):
        h = cell(h, x[:, t], w)
        forth.append(h)
    h = torch.zeros(B, D)
    for t in reversed(range(x.shape[1])):
        h = cell(h, x[:, t], w)
        back.append(h)
    return torch.stack(forth, 1) + torch.stack(back[::-1], 1)


def two_layers(x, w):
    for weight in (w, w.t()):
        h, outs = torch.zeros(B, D), []
        for t in range(x.shape[1]):
            h = cell(h, x[:, t], weight)
            outs.append(h)
        x = torch.stack(outs, 1)
    return x


def list_to_list(x, w):
    """The second layer takes the first's outputs out of a list."""
    values = x.unbind(1)
    for weight in (w, w.t()):
        h, outs = torch.zeros(B, D), []
        for value in values:
            h = cell(h, value, weight)
            outs.append(h)
        values = outs
    return torch.stack(list(values), 1)


def layers_in_step(x, w):
    a, b, outs = torch.zeros(B, D), torch.zeros(B, D), []
    for t in range(x.shape[1]):
        a = cell(a, x[:, t], w)
        b = cell(b, a, w.t())
        outs.append(b)
    return torch.stack(outs, 1), a


def layers_of_own_weights(x, w, v):
    """Two cells of equal form in a step: half a step looks like a step."""
    a, b, outs = torch.zeros(B, D), torch.zeros(B, D), []
    for t in range(x.shape[1]):
        a = torch.tanh(a @ w + x[:, t])
        b = torch.tanh(b @ v + x[:, t])
        outs.append(a * b)
    return torch.stack(outs, 1)


def recomputed(x, w):
    """What does not change is computed anew in each step."""
    h = torch.zeros(B, D)
    for t in range(x.shape[1]):
        decay = torch.exp(-torch.exp(w[0]))
        h = h * decay + x[:, t]
    return h


def shifted(x, w):
    h, previous, outs = torch.zeros(B, D), torch.zeros(B, D), []
    for t in range(x.shape[1]):
        h = cell(h, x[:, t] + 0.5 * previous, w)
        previous = x[:, t]
        outs.append(h)
    return torch.stack(outs, 1)


def neighbours(x, w):
    h = torch.zeros(B, D)
    for t in range(1, x.shape[1]):
        h = cell(h, x[:, t] * x[:, t - 1], w)
    return h


def windows(x, w):
    """Overlapping slices."""
    h, outs = torch.zeros(B, D), []
    for t in range(x.shape[1] - 2):
        h = cell(h, x[:, t : t + 3].sum(1), w)
        outs.append(h)
    return torch.stack(outs, 1)


def every_other(x, w):
    h, outs = torch.zeros(B, D), []
    for t in range(1, x.shape[1], 2):
        h = cell(h, x[:, t], w)
        outs.append(h)
    return torch.stack(outs, 1)


def blocks_with_gaps(x, w):
    h = torch.zeros(B, D)
    for t in range(0, x.shape[1] - 1, 3):
        h = cell(h, x[:, t : t + 2].prod(1), w)
    return h


def in_place(x, w):
    """h[t] from h[t - 1] in one buffer, which holds x at first."""
    y = x.clone()
    for t in range(1, x.shape[1]):
        y[:, t] = y[:, t] + torch.tanh(y[:, t - 1].clone() @ w)
    return y


def in_place_twice(x, w):
    y, h = torch.zeros(B, 2 * x.shape[1], D), torch.zeros(B, D)
    for t in range(x.shape[1]):
        h = cell(h, x[:, t], w)
        y[:, 2 * t] = h
        y[:, 2 * t + 1] = -h
    return y


def written_chunks(x, w):
    y, h = torch.zeros_like(x), torch.zeros(B, D)
    for t in range(0, x.shape[1], 2):
        h = cell(h, x[:, t : t + 2].sum(1), w)
        y[:, t : t + 2] = x[:, t : t + 2] + h[:, None]
    return y


def second_order(x, w):
    a, b, outs = torch.zeros(B, D), torch.zeros(B, D), []
    for t in range(x.shape[1]):
        a, b = x[:, t] + 0.5 * a @ w - 0.25 * b, a
        outs.append(a)
    return torch.stack(outs, 1)


def generated(x, w):
    """Nothing is read, and something collected."""
    h, outs = x[:, 0], []
    for _ in range(x.shape[1]):
        h = torch.tanh(h @ w)
        outs.append(h)
    return torch.stack(outs, 1)


def states_in_between(x, w):
    h, outs = torch.zeros(B, D), []
    for t in range(x.shape[1]):
        h = cell(h, x[:, t], w)
        outs.append(h)
    return outs[3] * outs[5], torch.stack(outs[2:6], 1), outs[-1]


def inner_values(x, w):
    h, outs, inner = torch.zeros(B, D), [], []
    for t in range(x.shape[1]):
        z = x[:, t] + h @ w
        h = torch.tanh(z)
        outs.append(h)
        inner.append(z)
    return torch.stack(outs, 1), torch.cat(inner, -1), inner[2] * inner[5]


def transposed_state(x, w):
    h = torch.zeros(D, B)
    for t in range(x.shape[1]):
        h = cell(h.t(), x[:, t], w).t()
    return h


def integers(x, w):
    h, n = torch.zeros(B, D), torch.zeros(B, dtype=torch.int64)
    for t in range(x.shape[1]):
        n = n + (x[:, t].sum(-1) > 0)
        h = h * 0.5 + x[:, t] * n[:, None]
    return h, n


def without_gradient(x, w):
    h, outs = torch.zeros(B, D), []
    with torch.no_grad():
        for t in range(x.shape[1]):
            h = cell(h, x[:, t], w)
            outs.append(h)
    return torch.stack(outs, 1) * x


def masked(x, w):
    h, outs = torch.zeros(B, D), []
    mask = torch.arange(x.shape[1]) > 2
    index = torch.arange(x.shape[1]) % D
    for t in range(x.shape[1]):
        h = torch.where(mask[t], cell(h, x[:, t], w), h + torch.nn.functional.embedding(index[t], w))
        outs.append(h)
    return torch.stack(outs, 1)


def used_both_ways(x, w):
    """x is read step by step and as a whole."""
    h, outs = x[:, 0], []
    for t in range(x.shape[1]):
        h = torch.softmax((x * h[:, None]).sum(-1), -1)[:, 0, None] * x[:, t] + h @ w
        outs.append(h)
    return torch.stack(outs, 1), h


def compared(x, w):
    """No gradient reaches what is only compared."""
    h, outs = torch.zeros(B, D), []
    for t in range(x.shape[1]):
        h = torch.where(x[:, t] > 0.1, h @ w + 1, h * 0.5)
        outs.append(h)
    return torch.stack(outs, 1)


FORMS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], list[int]]] = {
    "lstm": (lstm, ((B, T, 4 * D), (D, 4 * D), (B, D), (B, D)), [T]),
    "chunks": (chunked, ((B, 12, D), (D, D), (B, D, D)), [4]),
    "from none": (from_none, ((B, T, D), (D, D)), [T - 1]),
    "dead end": (dead_end, ((B, T, D), (D, D)), [T]),
    "both ways": (both_ways, ((B, T, D), (D, D)), [T, T]),
    "two layers": (two_layers, ((B, T, D), (D, D)), [T, T]),
    "list to list": (list_to_list, ((B, T, D), (D, D)), [T, T]),
    "layers in a step": (layers_in_step, ((B, T, D), (D, D)), [T]),
    "layers of own weights": (layers_of_own_weights, ((B, T, D), (D, D), (D, D)), [T]),
    "recomputed": (recomputed, ((B, T, D), (D, D)), [T]),
    "shifted": (shifted, ((B, T, D), (D, D)), [T - 1]),
    "neighbours": (neighbours, ((B, T, D), (D, D)), [T - 1]),
    "windows": (windows, ((B, T, D), (D, D)), [T - 2]),
    "every other": (every_other, ((B, 2 * T, D), (D, D)), [T]),
    "blocks with gaps": (blocks_with_gaps, ((B, 15, D), (D, D)), [5]),
    "in place": (in_place, ((B, T, D), (D, D)), [T - 1]),
    "in place twice": (in_place_twice, ((B, T, D), (D, D)), [T]),
    "written chunks": (written_chunks, ((B, 2 * T, D), (D, D)), [T]),
    "second order": (second_order, ((B, T, D), (D, D)), [T - 2]),
    "generated": (generated, ((B, T, D), (D, D)), [T]),
    "states in between": (states_in_between, ((B, T, D), (D, D)), [T]),
    "inner values": (inner_values, ((B, T, D), (D, D)), [T]),
    "transposed state": (transposed_state, ((B, T, D), (D, D)), [T]),
    "masked": (masked, ((B, T, D), (D, D)), [T]),
    "used both ways": (used_both_ways, ((B, T, D), (D, D)), [T]),
    "compared": (compared, ((B, T, D), (D, D)), [T]),
    "without gradient": (without_gradient, ((B, T, D), (D, D)), [T]),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_of_loop(name):
    f, shapes, steps = FORMS[name]
    outcome = rolled(f, *inputs(*shapes), compiler=as_it_is, train=False)
    assert outcome.steps == steps
    assert not outcome.rerolled.refused


TRAINING = (
    "lstm",
    "chunks",
    "two layers",
    "windows",
    "in place",
    "second order",
    "inner values",
    "transposed state",
    "without gradient",
)


@pytest.mark.parametrize("name", TRAINING)
def test_gradients(name):
    f, shapes, steps = FORMS[name]
    assert rolled(f, *inputs(*shapes)).steps == steps


@pytest.mark.parametrize("name", ["generated", "compared"])
def test_gradients_where_none_reaches_an_input(name):
    f, shapes, steps = FORMS[name]
    outcome = rolled(f, *inputs(*shapes))
    if torch_version() < (2, 13):
        (rejected,) = outcome.rerolled.refused
        assert "no gradient where none reaches" in rejected.why
    else:
        assert outcome.steps == steps


@pytest.mark.parametrize("name", ["lstm", "in place", "masked"])
def test_gradients_where_the_input_needs_none(name):
    f, shapes, steps = FORMS[name]

    def constant_input(x, *weights):
        return f(x.detach(), *weights)

    assert rolled(constant_input, *inputs(*shapes)).steps == steps


@pytest.mark.parametrize(("name", "train"), [("recomputed", False), ("two layers", True)], ids=["eval", "train"])
def test_inductor(name, train):
    """A scan with one result; first states and gradients of two loops that are alike."""
    f, shapes, steps = FORMS[name]
    assert rolled(f, *inputs(*shapes), compiler=inductor, train=train).steps == steps


def test_bfloat16():
    """The same operators on the same numbers: equal to the last bit."""
    x, w, h, c = (a.bfloat16() for a in inputs((B, T, 4 * D), (D, 4 * D), (B, D), (B, D)))
    assert rolled(lstm, x, w, h, c, compiler=as_it_is, train=False, tol=0).steps == [T]


def test_a_batch_of_any_size():
    def f(x, w):
        h, outs = x.new_zeros(x.shape[0], D), []
        for t in range(T):
            h = torch.tanh(x[:, t].view(x.shape[0], 2, -1).flip(1).view(x.shape[0], -1) + h @ w)
            outs.append(h)
        return torch.stack(outs, 1).view(x.shape[0], -1)

    graphs = []

    def backend(module, inputs):
        graphs.append(lift(module, inputs).graph_module)
        assert [loop.steps for loop in reroll(graphs[-1], least_steps=4).loops] == [T]
        return graphs[-1]

    (w,) = inputs((D, D))
    compiled = torch.compile(f, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (4, 6):
            (x,) = inputs((batch, T, D))
            torch.testing.assert_close(compiled(x, w), f(x, w))


def test_an_inner_loop_stays_in_the_body_of_the_outer():
    def f(x, w):
        h, outs = torch.zeros(B, D), []
        for block in range(5):
            state = h * 0.5
            for t in range(4):
                state = cell(state, x[:, 4 * block + t], w)
            h = h + torch.sigmoid(state)
            outs.append(h)
        return torch.stack(outs, 1)

    outcome = rolled(f, *inputs((B, 20, D), (D, D)))
    assert outcome.steps == [5]
    body = outcome.graph.scan_step_0.graph
    assert sum(node.target is aten.tanh.default for node in body.nodes) == 4
    assert [node.meta["val"].shape for node in body.nodes if node.op == "placeholder"] == [(B, D), (B, 4, D), (D, D)]


def test_the_body_is_clean():
    """What does not change is computed once, outside; what nothing needs is gone."""
    outcome = rolled(recomputed, *inputs((B, T, D), (D, D)), compiler=as_it_is, train=False)
    body = outcome.graph.scan_step_0.graph
    targets = [node.target for node in body.nodes if node.op == "call_function"]
    assert targets[:2] == [aten.mul.Tensor, aten.add.Tensor] and aten.exp.default not in targets
    assert outcome.count(aten.exp.default) == 2
    assert all("val" in node.meta for node in body.nodes if node.op != "output")


def test_where_a_loop_comes_from():
    outcome = rolled(recomputed, *inputs((B, T, D), (D, D)), compiler=as_it_is, train=False)
    (loop,) = outcome.rerolled.loops
    assert __file__ in loop.where and __file__ in loop.scan.meta["stack_trace"]


# -------------------------------------------------------------------- near misses


def other_weight_once(x, w, v):
    h, outs = torch.zeros(B, D), []
    for t in range(12):
        h = cell(h, x[:, t], v if t == 5 else w)
        outs.append(h)
    return torch.stack(outs, 1)


def reset_once(x, w, v):
    h, outs = torch.zeros(B, D), []
    for t in range(12):
        if t == 6:
            h = v[:B]
        h = cell(h, x[:, t], w)
        outs.append(h)
    return torch.stack(outs, 1)


def jump_once(x, w, v):
    h, outs = torch.zeros(B, D), []
    for t in [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]:
        h = cell(h, x[:, t], w)
        outs.append(h)
    return torch.stack(outs, 1)


def other_function_once(x, w, v):
    h = torch.zeros(B, D)
    for t in range(12):
        h = torch.sigmoid(x[:, t] + h @ w) if t == 4 else cell(h, x[:, t], w)
    return h


def looked_at_in_between(x, w, v):
    """A state in between is used by what follows."""
    h, seen = torch.zeros(B, D), None
    for t in range(12):
        h = cell(h, x[:, t], w)
        if t == 7:
            seen = h.exp()
    return h * seen


@pytest.mark.parametrize(
    ("f", "steps"),
    [
        (other_weight_once, [5, 6]),
        (reset_once, [6, 6]),
        (jump_once, [6, 4]),
        (other_function_once, [4, 7]),
        (looked_at_in_between, [8, 4]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_regular_stretches_of_an_irregular_loop(f, steps):
    assert rolled(f, *inputs((B, 12, D), (D, D), (D, D))).steps == steps


def out_of_order(x, w):
    h = torch.zeros(B, D)
    for t in [0, 3, 1, 2, 7, 5, 4, 6]:
        h = cell(h, x[:, t], w)
    return h


def counted(x, w):
    h = torch.zeros(B, D)
    for t in range(T):
        h = cell(h, x[:, t] * (t + 2), w)
    return h


def own_weights(x, *weights):
    h = torch.zeros(B, D)
    for t, w in enumerate(weights):
        h = cell(h, x[:, t], w)
    return h


def random(x, w):
    h = torch.zeros(B, D)
    for t in range(T):
        h = torch.dropout(cell(h, x[:, t], w), 0.0001, True)
    return h


def switching_gradients(x, w):
    h = torch.zeros(B, D)
    for t in range(T):
        with torch.no_grad():
            scale = x[:, t].abs().amax()
        h = cell(h, x[:, t] / scale, w)
    return h


def whole_buffer(x, w):
    y, h = torch.zeros_like(x), torch.zeros(B, D)
    for t in range(T):
        h = cell(h, x[:, t] + y.mean(1), w)
        y[:, t] = h
    return y


def buffer_in_between(x, w):
    y, h, seen = torch.zeros_like(x), torch.zeros(B, D), []
    for t in range(T):
        h = cell(h, x[:, t], w)
        y[:, t] = h
        if t == 3:
            seen.append(y)
            y = y.clone()
    return y + seen[0]


def overlapping_writes(x, w):
    y, h = torch.zeros(B, T + 1, D), torch.zeros(B, D)
    for t in range(T):
        h = cell(h, x[:, t], w)
        y[:, t : t + 2] = h[:, None]
    return y


def read_long_after(x, w):
    y = x.clone()
    for t in range(3, T):
        y[:, t] = torch.tanh(y[:, t].clone() + y[:, t - 3].clone() @ w)
    return y


def moving_place_in_a_state(x, w):
    h = torch.zeros(B, T)
    for t in range(T):
        h = h * 0.5 + (h[:, t, None] + x[:, t, :1])
    return h


def nothing_carried(x, w):
    return torch.stack([torch.tanh(x[:, t] @ w) for t in range(T)], 1)


def one_operator(x, w):
    total = torch.zeros(B, D)
    for t in range(T):
        total = total + x[:, t]
    return total * w[0]


def integer_state(x, w):
    h, n = torch.zeros(B, D), torch.zeros(B, dtype=torch.int64)
    for t in range(T):
        n = n + (x[:, t].sum(-1) > 0)
        h = h * 0.5 + x[:, t] * n[:, None]
    return h, n


REFUSALS: dict[Callable[..., Any], str] = {
    out_of_order: "not evenly spaced",
    counted: "a number changes from step to step",
    own_weights: "take different tensors",
    random: "random numbers are drawn in it",
    switching_gradients: "do more than compute values",
    whole_buffer: "also used as a whole",
    overlapping_writes: "more than once",
    read_long_after: "was written 3 steps before",
    moving_place_in_a_state: "in a value that changes with it",
    one_operator: "a step is one operator",
    integer_state: "no gradient where a state",
}


@pytest.mark.parametrize("f", REFUSALS, ids=lambda f: f.__name__)
def test_what_stays_unrolled(f):
    shapes = ((B, T, D), *((D, D),) * (T if f is own_weights else 1))
    with torch.random.fork_rng():
        outcome = rolled(f, *inputs(*shapes), tol=1e-3 if f is random else 1e-5)
    assert outcome.scans == 0
    refused = outcome.rerolled.refused
    assert any(REFUSALS[f] in x.why and "test_reroll.py:" in source_line(x.node) for x in refused), refused


def test_states_of_integers_without_gradient():
    assert rolled(integer_state, *inputs((B, T, D), (D, D)), train=False).steps == [T]


def test_a_buffer_that_is_looked_at_in_between():
    assert rolled(buffer_in_between, *inputs((B, T, D), (D, D))).steps == [4, 4]


@pytest.mark.parametrize(
    "f", [nothing_carried, lambda x, w: cell(cell(cell(x[:, 0], x[:, 1], w), x[:, 2], w), x[:, 3], w)], ids=["map", "few"]
)
def test_what_is_no_loop(f):
    outcome = rolled(f, *inputs((B, T, D), (D, D)), least=5)
    assert outcome.scans == 0 and not outcome.rerolled.refused


def recurrent(x, w):
    h, outs = torch.zeros(B, D), []
    for t in range(T):
        h = cell(h, x[:, t], w)
        outs.append(h)
    return torch.stack(outs, 1)


def test_autocast_inside_the_graph():
    """The body would have to be under autocast by itself."""

    def f(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return recurrent(x, w)

    outcome = rolled(f, *inputs((B, T, D), (D, D)), compiler=as_it_is, train=False, tol=0)
    assert outcome.scans == 0 and "gives another shape or dtype" in outcome.rerolled.refused[0].why


def test_autocast_around_the_graph():
    with torch.autocast("cpu", torch.bfloat16):
        outcome = rolled(recurrent, *inputs((B, T, D), (D, D)), train=False, tol=0)
    assert outcome.steps == [T]


def test_too_few_steps_are_no_loop():
    graph = debug.capture(lambda x: x + 1, torch.ones(3))
    with pytest.raises(EffcompileError, match="Expected at least 3 steps to a loop but got least_steps=2"):
        reroll(graph, least_steps=2)


def test_a_loop_that_is_not_accepted_stays():
    graph = debug.capture(recomputed, *inputs((B, T, D), (D, D)))
    before = str(graph.graph)
    outcome = reroll(graph, least_steps=4, accept=lambda loop: f"it has {loop.steps} steps")
    assert str(graph.graph) == before and not outcome.loops
    (rejected,) = outcome.refused
    assert rejected.why == f"a loop stays unrolled: it has {T} steps" and source_line(rejected.node).startswith(f"{__file__}:")


@pytest.mark.parametrize("where", ["_written", "_gather_lists", "_gather_elements", "_standing_for", "_scan"])
def test_the_graph_is_as_it_was_if_something_fails(where, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("on purpose")

    def f(x, w):
        out, outs, h = torch.zeros_like(x), [], torch.zeros(B, D)
        for t in range(T):
            h = cell(h, x[:, t], w)
            out[:, t] = h
            outs.append(h)
        return out, torch.stack(outs), h

    graph = debug.capture(f, *inputs((B, T, D), (D, D)))
    before = str(graph.graph)
    monkeypatch.setattr(rollup.Replacement, where, fail)
    outcome = reroll(graph, least_steps=4)
    assert str(graph.graph) == before and not hasattr(graph, "scan_step_0")
    assert not outcome.loops and "an internal failure: RuntimeError: on purpose" in outcome.refused[0].why


def test_finding_changes_nothing():
    graph = debug.capture(lstm, *inputs((B, T, 4 * D), (D, 4 * D), (B, D), (B, D)))
    before = str(graph.graph)
    (loop,), refused = find_loops(graph, least_steps=4)
    assert str(graph.graph) == before and not refused
    assert (loop.steps, len(loop.inits), len(loop.xs), len(loop.invariants)) == (T, 2, 1, 1)
    assert can_run(loop, trains=True, requiring=set(graph.graph.nodes)) is None


# -------------------------------------------------------------------- properties


CELLS = {
    "rnn": lambda h, x, w: torch.tanh(x + h @ w),
    "gate": lambda h, x, w: torch.sigmoid(x) * h + (1 - torch.sigmoid(x)) * (x @ w),
    "norm": lambda h, x, w: torch.nn.functional.layer_norm(h * 0.5 + x, (D,), w[0], w[1]),
    "max": lambda h, x, w: torch.maximum(h - torch.exp(w[0]), x),
    "outer": lambda h, x, w: (x[:, :, None] @ h[:, None] * w).sum(1) + h,
}


@st.composite
def loops(draw):
    steps = draw(st.integers(5, 9))
    return {
        "steps": steps,
        "cells": draw(st.lists(st.sampled_from(sorted(CELLS)), min_size=1, max_size=2)),
        "read": draw(st.sampled_from(["select", "unbind", "backwards", "leading"])),
        "sink": draw(st.sampled_from(["stack", "cat", "zeros", "backwards", "nothing", "stack reversed"])),
        "first": draw(st.sampled_from(["zeros", "input", "none"])),
        "skip": draw(st.sampled_from([None, 2, 4])),
        "late": draw(st.booleans()),
    }


def function_of(loop):
    def f(x, w):
        at, out = READS[loop["read"]](x), SINKS[loop["sink"]](x)
        h = {"zeros": torch.zeros(B, D), "input": x[:, 0].cos(), "none": None}[loop["first"]]
        for t in range(loop["steps"]):
            before = h
            for name in loop["cells"]:
                h = at(t) * 0.5 if h is None else CELLS[name](h, at(t), w)
            if t == loop["skip"]:
                h = h * 2
            out.put(t, before if loop["late"] and before is not None else h)
        return out.get(), h

    return f


@hypothesis.settings(max_examples=20, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(loop=loops())
def test_any_loop_comes_out_equal(loop):
    f, args = function_of(loop), inputs((B, T + 1, D), (D, D))
    graph = debug.capture(f, *args)
    names = [node.target for node in graph.graph.nodes if node.op == "placeholder"]
    values = dict(zip(("L_x_", "L_w_"), args, strict=True))
    want = graph(*(values[name] for name in names))
    outcome = reroll(graph, least_steps=4)
    if loop["skip"] is None:
        assert len(outcome.loops) == 1, outcome
    with torch.no_grad():
        torch.testing.assert_close(graph(*(values[name] for name in names)), want, rtol=1e-6, atol=1e-6)


@hypothesis.settings(max_examples=4, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(loop=loops())
def test_any_loop_has_the_same_gradients(loop):
    rolled(function_of(loop), *inputs((B, T + 1, D), (D, D)))


def test_ten_thousand_nodes():
    """Every step of each of three layers is found; one pass over the graph, not one a step."""
    graph = torch.fx.Graph()
    with torch._subclasses.FakeTensorMode() as mode:
        x, w = (graph.placeholder(name) for name in "xw")
        x.meta["val"], w.meta["val"] = mode.from_tensor(torch.empty(B, 500, D)), mode.from_tensor(torch.empty(D, D))
        end = graph.output(())
        builder = Builder(graph, end)
        end.meta["val"] = x.meta["val"]
        for _ in range(3):
            h, outs = builder.call(aten.zeros.default, [B, D]), []
            for t in range(500):
                value = builder.call(aten.select.int, x, 1, t)
                gate = builder.call(aten.sigmoid.default, value)
                h = builder.call(
                    aten.add.Tensor, builder.call(aten.mul.Tensor, gate, h), builder.call(aten.matmul.default, value, w)
                )
                h = builder.call(aten.tanh.default, h)
                outs.append(h)
            x = builder.call(aten.stack.default, outs, 1)
    end.args = (x,)
    module = torch.fx.GraphModule({}, graph)
    assert len(graph.nodes) > 9_000
    assert [loop.steps for loop in reroll(module).loops] == [500] * 3
    assert len(graph.nodes) < 50


# -------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "steps"),
    [("rwkv", [64, 64]), ("mamba_seqscan", [64, 64]), ("recurrent_gemma", [64]), ("xlstm", [4, 4])],
    ids=lambda v: str(v),
)
def test_a_model(name, steps):
    model, arguments = build(name)
    found = []

    def backend(module, inputs):
        lifted = lift(module, inputs)
        before = len(lifted.graph_module.graph.nodes)
        outcome = reroll(lifted.graph_module, least_steps=4, mutating=lifted.mutating)
        found.extend(loop.steps for loop in outcome.loops)
        after = len(lifted.graph_module.graph.nodes)
        assert after < before - 2 * sum(loop.steps for loop in outcome.loops) or not outcome.loops
        return as_it_is(lifted.graph_module, inputs)

    with torch.no_grad():
        compiled = result(torch.compile(model, backend=backend)(**arguments))
        torch.testing.assert_close(compiled, result(model(**arguments)), rtol=1e-6, atol=1e-6)
    assert found == steps


def test_a_model_that_trains():
    model, arguments = build("mamba_seqscan")

    def backend(module, inputs):
        lifted = lift(module, inputs)
        assert [loop.steps for loop in reroll(lifted.graph_module, mutating=lifted.mutating).loops] == [64, 64]
        return aot_eager(lifted.graph_module, inputs)

    parameters = list(model.parameters())
    gradients = []
    for call in (torch.compile(model, backend=backend), model):
        gradients.append(torch.autograd.grad(result(call(**arguments)).square().sum(), parameters, allow_unused=True))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
