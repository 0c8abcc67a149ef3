"""Index expressions mean what the graph computes: random programs, element by element, and the cases that once differed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from torch.fx import GraphModule, Node

from effcompile.canonical import canonical
from effcompile.errors import ExpressionError
from effcompile.evaluate import Evaluator
from effcompile.expr import Interpreter, names_of
from effcompile.ranges import Ranges
from effcompile.terms import Load, Term, from_text, integer_symbol, is_condition, to_text
from effcompile.trace import lift
from effcompile.viewmaps import shape_of

INDEX = [integer_symbol(name) for name in ("b", "h", "i", "j")]
Step = tuple[Callable[..., torch.Tensor], tuple[int, ...]]


class _Values(torch.fx.Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, module: GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value
        return value


@dataclass
class Reading:
    """A function's result, read as a term: the term, the node, and the value of every node."""

    term: Term
    node: Node
    values: dict[str, Any]
    ranges: Ranges
    symbols: tuple[sympy.Symbol, ...] = field(default=())

    @property
    def loads(self) -> set[str]:
        """The names of the tensors that are loaded."""
        return set(names_of(self.term, Load))

    def evaluate(self, term: Term) -> torch.Tensor:
        """The term at every index, as a tensor of the node's shape."""
        shape = self.values[self.node.name].shape
        grid = {}
        for dim, symbol in enumerate(self.symbols):
            grid[symbol.name] = torch.arange(shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])
        evaluator = Evaluator(grid, self.values, dtype=torch.float32, device=torch.device("cpu"))
        dtype = torch.bool if is_condition(term) else torch.int64 if term.is_integer else torch.float32
        return evaluator.tensor(term, dtype).expand(shape)

    def check(self) -> None:
        """The term, its canonical form and its text all evaluate to what the graph computes."""
        wanted = self.values[self.node.name]
        tidy = canonical(self.term, self.ranges, self.symbols[-1]) if self.symbols else self.term
        for term in (self.term, tidy, from_text(to_text(tidy))):
            found = self.evaluate(term)
            if wanted.is_floating_point():
                torch.testing.assert_close(found.to(wanted.dtype), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
            else:
                assert torch.equal(found.to(wanted.dtype), wanted), f"{term}: {found}, not {wanted}"


def read(f: Callable[..., torch.Tensor], *args: torch.Tensor) -> Reading:
    """Capture `f` as torch.compile does, and read its result."""
    captured: list[Any] = []

    def backend(module: GraphModule, inputs: list[Any]) -> Any:
        captured.extend((lift(module, inputs).graph_module, inputs))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend=backend, fullgraph=True, dynamic=False)(*args)
        module, inputs = captured
        run = _Values(module)
        run.run(*inputs)
    (output,) = next(n for n in module.graph.nodes if n.op == "output").args[0]
    shape = shape_of(output)
    symbols = tuple(INDEX[4 - len(shape) :])
    ranges = Ranges({})
    for symbol, size in zip(symbols, shape, strict=True):
        ranges.add(symbol, size)
    term = Interpreter(ranges).element(output, symbols)
    return Reading(term, output, run.values, ranges, symbols)


# -------------------------------------------------------------------- random programs

_NUMBERS = st.sampled_from([-3, -2, -1, 0, 1, 2, 3, 5])
_DIVISORS = st.sampled_from([-3, -2, 1, 2, 3, 4])
_FRACTIONS = st.sampled_from([-1.5, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 2.5])
_MOST_ELEMENTS = 200


def _numeric(x: torch.Tensor) -> torch.Tensor:
    return x.long() if x.dtype is torch.bool else x


@st.composite
def _integer_step(draw: Any, x: torch.Tensor) -> Callable[..., torch.Tensor]:
    n, d = draw(_NUMBERS), draw(_DIVISORS)
    return draw(
        st.sampled_from(
            [
                lambda x: x + n,
                lambda x: n - x,
                lambda x: x * n,
                lambda x: -x,
                lambda x: x.abs(),
                lambda x: x // d,
                lambda x: x % d,
                lambda x: torch.div(x, d, rounding_mode="trunc"),
                lambda x: x.clamp(n, n + 3),
                lambda x: x.clamp(max=n),
                lambda x: x == n,
                lambda x: x < n,
                lambda x: x >= n,
                lambda x: x != n,
                lambda x: ~x,
                lambda x: x & 1,
                lambda x: x | 2,
                lambda x: x.bool(),
                lambda x: x.logical_not(),
                lambda x: x.to(torch.uint8),
                lambda x: x.to(torch.int8),
                lambda x: x.float(),
                lambda x: x / d,
                lambda x: x.square(),
                lambda x: x > n + 0.5,
                lambda x: x <= n - 0.5,
                lambda x: x.to(torch.int32),
                lambda x: x.to(torch.uint8) - 1,
                lambda x: x * 100,
                lambda x: x.sign(),
            ]
        )
    )


@st.composite
def _bool_step(draw: Any, x: torch.Tensor) -> Callable[..., torch.Tensor]:
    return draw(
        st.sampled_from(
            [
                lambda x: ~x,
                lambda x: x.logical_not(),
                lambda x: x.long(),
                lambda x: x.float(),
                lambda x: 1 - x.long(),
                lambda x: x == 0,
                lambda x: x * 3,
                lambda x: (1.0 - x.float()) * -1e9,
                lambda x: x.to(torch.uint8),
                lambda x: x == True,  # noqa: E712
            ]
        )
    )


@st.composite
def _float_step(draw: Any, x: torch.Tensor) -> Callable[..., torch.Tensor]:
    c = draw(_FRACTIONS)
    return draw(
        st.sampled_from(
            [
                lambda x: x + c,
                lambda x: x * c,
                lambda x: c - x,
                lambda x: -x,
                lambda x: x.abs(),
                lambda x: x.relu(),
                lambda x: x.tanh(),
                lambda x: x.sigmoid(),
                lambda x: x.clamp(-3, 3).exp(),
                lambda x: x.abs().sqrt(),
                lambda x: x.square(),
                lambda x: x.floor(),
                lambda x: x.ceil(),
                lambda x: x.trunc(),
                lambda x: x.clamp(-99, 99).long(),
                lambda x: x < c,
                lambda x: x >= c,
                lambda x: x == c,
                lambda x: x.bool(),
                lambda x: x / 4,
                lambda x: x // 2,
                lambda x: x % 3,
                lambda x: x * 1e6 - 1e6,
                lambda x: x.sin(),
                lambda x: (x.abs() + 1).log(),
                lambda x: (x.square() + 1).rsqrt(),
                lambda x: (x.abs() + 0.5).reciprocal(),
                lambda x: torch.erf(x),
                lambda x: x.bfloat16() < c,
                lambda x: x.bfloat16().float(),
                lambda x: torch.where(x > c, x, -math.inf),
                lambda x: x.sign(),
            ]
        )
    )


@st.composite
def _view_step(draw: Any, x: torch.Tensor) -> Callable[..., torch.Tensor]:
    dims = st.integers(0, x.dim() - 1)
    d, e = draw(dims), draw(dims)
    n = x.shape[d]
    order = draw(st.permutations(range(x.dim())))
    start, step = draw(st.integers(-n - 2, n - 1)), draw(st.integers(1, 2))
    length = draw(st.integers(1, n))
    at, times, diagonal = draw(st.integers(-n, n - 1)), draw(st.integers(1, 3)), draw(st.integers(-3, 3))
    options: list[Callable[..., torch.Tensor]] = [
        lambda x: x.transpose(d, e),
        lambda x: x.permute(order),
        lambda x: x.unsqueeze(d),
        lambda x: x.unsqueeze(-1),
        lambda x: x.squeeze(),
        lambda x: x.flip(d),
        lambda x: x.flatten(),
        lambda x: x.reshape(-1, n),
        lambda x: x.reshape(n, -1),
        lambda x: x.reshape(-1, 2 if x.numel() % 2 == 0 else 1),
        lambda x: x.narrow(d, n - length, length),
        lambda x: x.transpose(0, d)[start::step],
        lambda x: x.transpose(0, d)[..., :length],
        lambda x: x.roll(1, d),
        lambda x: x.repeat_interleave(times, d),
        lambda x: x.repeat(times, *[1] * (x.dim() - 1)),
        lambda x: x.repeat(*[1] * (x.dim() - 1), times),
        lambda x: torch.cat([x, x.flip(d)], d),
        lambda x: torch.stack([x, x], d),
        lambda x: torch.nn.functional.pad(x, (1, times)),
        lambda x: torch.nn.functional.pad(x, (-1, 1)) if x.shape[-1] > 1 else x,
        lambda x: x.chunk(2, d)[-1],
        lambda x: x.split(length, d)[0],
        lambda x: x[None].expand(times, *x.shape),
        lambda x: x.contiguous(),
        lambda x: x.cumsum(d),
        lambda x: torch.diff(_numeric(x), dim=d, prepend=_numeric(x).narrow(d, 0, 1)),
        lambda x: torch.cat([x.narrow(d, 0, length), x], d),
        lambda x: x.index_select(d, torch.arange(length)),
        lambda x: torch.ones_like(x).cumsum(d),
        lambda x: x.unflatten(d, (n, 1)),
        lambda x: x.mT if x.dim() > 1 else x,
    ]
    if x.dim() > 1:
        options += [lambda x: x.select(d, at), lambda x: x.tril(diagonal), lambda x: x.triu(diagonal), lambda x: x.unbind(d)[at]]
    return draw(st.sampled_from(options))


@st.composite
def _pair_step(draw: Any, x: torch.Tensor, y: torch.Tensor) -> Callable[..., torch.Tensor]:
    common: list[Callable[..., torch.Tensor]] = [
        lambda x, y: x < y,
        lambda x, y: x <= y,
        lambda x, y: x > y,
        lambda x, y: x == y,
        lambda x, y: x != y,
        lambda x, y: torch.where(x > 0, y, x),
        lambda x, y: torch.where(x == 0, x, y),
        lambda x, y: _numeric(x) + _numeric(y),
        lambda x, y: _numeric(x) - _numeric(y),
        lambda x, y: x * y,
        lambda x, y: torch.maximum(x, y),
        lambda x, y: torch.minimum(x, y),
        lambda x, y: _numeric(x).masked_fill(y != 0, -1),
        lambda x, y: torch.logical_xor(x, y),
        lambda x, y: torch.logical_or(x, y),
        lambda x, y: _numeric(x) % (_numeric(y).abs() + 1),
        lambda x, y: _numeric(x) // (_numeric(y).abs() + 2),
        lambda x, y: torch.add(_numeric(x), _numeric(y), alpha=2),
        lambda x, y: _numeric(x) / (_numeric(y).abs() + 1),
    ]
    if not x.is_floating_point() and not y.is_floating_point():
        common += [lambda x, y: x & y, lambda x, y: x | y, lambda x, y: x ^ y]
        if x.dtype is torch.int64:
            common += [
                lambda x, y: y[x % y.shape[0]],
                lambda x, y: y[-1 - x % y.shape[0]],
                lambda x, y: y.flatten()[x.clamp(0, 1) - 1],
            ]
            common += [lambda x, y: y[..., x % y.shape[-1]]]
    return draw(st.sampled_from(common))


def inputs() -> list[torch.Tensor]:
    """Tensors that a program starts from: data of each kind."""
    generator = torch.Generator().manual_seed(3)
    integers = torch.randint(-4, 5, (3, 4), generator=generator)
    return [integers, integers.flip(0) > 0, torch.randn(3, 4, generator=generator)]


def starts() -> list[torch.Tensor]:
    """Tensors that a program makes of indices."""
    n, m = torch.arange(4), torch.arange(6).view(2, 3)
    return [
        n,
        m,
        n[:, None] - n[None],
        n[:, None] >= n,
        torch.arange(1, 9, 3),
        torch.ones(4, 4).tril(),
        torch.full((4, 4), -math.inf).triu(1),
    ]


@st.composite
def programs(draw: Any) -> list[Step]:
    """Steps, each of which takes values made before; checked on the values as they are drawn."""
    pool = inputs() + starts()
    steps: list[Step] = []
    for _ in range(draw(st.integers(2, 9))):
        k = draw(st.sampled_from([len(pool) - 1, len(pool) - 1, 0, 1, 2, *range(len(pool))]))
        x = pool[k]
        kind = draw(st.sampled_from(["view", "point", "pair"]))
        operands: tuple[int, ...] = (k,)
        if kind == "pair":
            operands = (k, draw(st.integers(0, len(pool) - 1)))
            f = draw(_pair_step(x, pool[operands[1]]))
        elif kind == "view" and x.dim():
            f = draw(_view_step(x))
        elif x.is_floating_point():
            f = draw(_float_step(x))
        else:
            f = draw(_bool_step(x) if x.dtype is torch.bool else _integer_step(x))
        try:
            result = f(*(pool[n] for n in operands))
        except (RuntimeError, IndexError):
            continue
        if 0 < result.numel() <= _MOST_ELEMENTS and result.dim() <= 4:
            pool.append(result)
            steps.append((f, operands))
    hypothesis.assume(steps)
    return steps


def run(steps: list[Step], given_inputs: list[torch.Tensor]) -> torch.Tensor:
    pool = given_inputs + starts()
    for f, operands in steps:
        pool.append(f(*(pool[k] for k in operands)))
    return pool[-1]


_SEARCH = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
    ],
)


@given(programs())
@_SEARCH
def test_a_random_program_is_read_as_what_it_computes(steps):
    reading = read(lambda *xs: run(steps, list(xs)).clone(), *inputs())
    try:
        to_text(canonical(reading.term, reading.ranges, INDEX[-1]))
    except ExpressionError:
        hypothesis.event("without a text")
        return
    hypothesis.event("loaded as it is" if reading.loads == {reading.node.name} else "read")
    reading.check()


# -------------------------------------------------------------------- what is known without the data


def n() -> torch.Tensor:
    return torch.arange(6)


CLOSED: dict[str, Callable[[], torch.Tensor]] = {
    "a slice from before the beginning": lambda: n()[-9:4],
    "a slice from the end with a step": lambda: n()[-5::2],
    "the last column": lambda: (n()[:, None] * 10 + n())[..., -1],
    "positions counted from the end": lambda: n()[n() - 6],
    "two positions apart": lambda: (n()[:, None] * 10 + n()).unsqueeze(1)[n(), :, n()],
    "a triangle of a flipped one": lambda: torch.ones(4, 6).tril(1).flip(1).triu(-1),
    "the logarithm of a mask": lambda: torch.ones(4, 4).tril().log(),
    "division of negatives": lambda: (n() - 3) // 2 + torch.div(n() - 3, -2, rounding_mode="trunc") + (n() - 3) % -4,
    "a cumulative sum of ones": lambda: torch.ones(2, 6, dtype=torch.bool).cumsum(-1),
    "Hugging Face's document of plain positions": lambda: (torch.diff(n()[None], prepend=n()[None, :1] - 1) != 1).cumsum(-1),
    "concatenation, transposed": lambda: torch.cat([n().view(2, 3), -n().view(2, 3)], 1).t(),
    "repeat and repeat_interleave": lambda: n().repeat(2) - n().repeat_interleave(2),
    "a chain of selections": lambda: n().view(1, 2, 3).unbind(1)[-1].chunk(3, -1)[-1],
    "padding cut and added": lambda: torch.nn.functional.pad(n() + 1, (-2, 3), value=7),
    "truth in numbers": lambda: (1 - (n() > 2).long()) * 3 + (n() > 2).float(),
    "exclusive or": lambda: (n() > 2) ^ (n() % 2 == 0),
    "one position of many": lambda: torch.ones(1, 6, 1).expand(2, 6, 3)[:, 2],
}


@pytest.mark.parametrize("name", CLOSED)
def test_known_without_data(name):
    reading = read(lambda x: CLOSED[name]().clone(), torch.zeros(()))
    assert not reading.loads
    reading.check()


X = torch.tensor([[3, 0, 255], [7, 1, 2]])
LOADED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "a byte that wraps": (lambda x: x - 1, X.to(torch.uint8)),
    "a cast that wraps": (lambda x: (x * 2).to(torch.int8), X),
    "the complement of an integer": (lambda x: (~x).bool(), X),
    "the lowest bit": (lambda x: (x & 1) == 0, X),
    "an infinite quotient rounded down": (lambda x: (x - math.inf) // 2, X.float()),
    "a comparison of rounded sums": (lambda x: x * 0.1 + 0.2 == 0.3, torch.tensor([1.0, 2.0, 3.0])),
    "a large constant that cancels": (lambda x: x * 1e9 - 1e9, torch.tensor([0.0, 1.0, 1.0])),
    "a large factor of a difference": (lambda x: (1 - x) * -1e30, torch.tensor([0.0, 1.0, 1.0])),
    "a cumulative sum of data": (lambda x: x.cumsum(1)[:, 2], X),
    "rounded positions": (lambda x: (torch.arange(300).bfloat16() == 257) & (x > 0), torch.ones(())),
    "a comparison of a rounded number": (lambda x: x.bfloat16() > 0.5, torch.tensor([0.5, 0.501, 0.51])),
    "the square root of what may be negative": (lambda x: (x - 5).float().sqrt(), X),
    "where of an integer condition": (lambda x: torch.where((x - 1).bool(), x, -x), X),
}


@pytest.mark.parametrize("name", LOADED)
def test_what_cannot_be_known_is_loaded(name):
    f, x = LOADED[name]
    reading = read(lambda y: f(y).clone(), x)
    assert reading.loads
    reading.check()


def test_a_branch_not_taken_may_index_outside():
    """Both halves of a concatenation are evaluated at every index."""
    a, b = torch.randn(2), torch.randn(5)
    reading = read(lambda a, b: torch.cat([a, b]).clone(), a, b)
    assert len(reading.loads) == 2
    reading.check()


def test_positions_in_data():
    table, at = torch.randn(5, 3), torch.tensor([[4, -5], [0, -1]])
    reading = read(lambda table, at: table[at].clone(), table, at)
    assert len(reading.loads) == 2
    reading.check()
