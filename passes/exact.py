"""Evaluates part of a graph in a prime field, where equal means equal: exponentials and all.

Every number x is held as the pair (x, exp x) of elements of Z_P, either of which may be unknown:

    (x, X) + (y, Y) = (x + y, X * Y)      exp (x, X) = (X, ?)      logaddexp = (?, X + Y)      cumsum = (sum, product)
    (x, X) * (y, Y) = (x * y, ?)          log (x, X) = (?, x)      x * n/m   = (., X ** (n/m)) for a constant n/m

What enters is drawn at random, x and exp x apart: a variable and its exponential are algebraically independent. Two expressions
that are equal thus have equal values; two that differ are taken for equal with a probability of (degree / P) ** SAMPLES, by the
lemma of Schwartz and Zippel; the degree is of the order of the number of steps. P = 2Q + 1 with Q prime: exp x is drawn from the
squares, of which every fractional power exists.

Only dimensions that values move along have their length here ("kept"). The others are *lanes*: nothing but the element at the same
place meets in them, which is proved by their numbers, so that one element stands for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from effcompile import _torch

P = 2147483579
Q = (P - 1) // 2
SAMPLES = 3
KEPT, WILD = 0, -1
"""Labels of dimensions: one with its length, and one along which the value is constant. A lane has a positive number."""

Array = Any
Operation = Callable[..., "Value"]
"""`operation(evaluator, node, args, kwargs)`"""


class OutsideError(Exception):
    """An operation, or a use of one, that is not evaluated here."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Value:
    """A tensor: `plain` and `image` (its exponential) are [SAMPLES, (hidden,) *dims], of length 1 in lanes and constant dimensions.

    Attributes:
        labels: of each dimension.
        hidden: label of the dimension that a functorch region hides, None outside of one.
        support: the nodes drawn at random that it may depend on.
        scalar: the number that it is throughout, if known.
        integers: `plain` holds integers themselves, not their residues, so that they can be compared.
    """

    plain: Array | None
    image: Array | None
    labels: tuple[int, ...]
    hidden: int | None = None
    support: frozenset[Node] = frozenset()
    scalar: Fraction | None = None
    integers: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the dimensions as held here."""
        array = self.plain if self.plain is not None else self.image
        if array is None:
            raise OutsideError("a value of which nothing is known")
        return tuple(array.shape[1 if self.hidden is None else 2 :])

    def map(self, function: Callable[[Array], Array], **changes: Any) -> Value:
        """With `function` applied to what is known of it."""
        plain, image = (None if x is None else function(x) for x in (self.plain, self.image))
        return replace(self, plain=plain, image=image, **changes)

    def axis(self, dim: int) -> int:
        """Where a dimension is in the arrays."""
        return dim % max(len(self.labels), 1) + (1 if self.hidden is None else 2)


# -------------------------------------------------------------------- the field


def power(base: Array, exponent: int) -> Array:
    """`base ** exponent`; of 0 to a negative power, 0."""
    result, base, exponent = np.ones_like(base), base, exponent % (P - 1)
    while exponent:
        if exponent & 1:
            result = result * base % P
        base, exponent = base * base % P, exponent >> 1
    return result


def inverse(x: Array) -> Array:
    """`1 / x`, and 0 for 0."""
    return power(x, P - 2)


def cumulative_product(x: Array, axis: int) -> Array:
    """Of all elements up to each, by doubling."""
    x, step = np.moveaxis(x, axis, 0).copy(), 1
    while step < x.shape[0]:
        x[step:] = x[step:] * x[:-step] % P
        step *= 2
    return np.moveaxis(x, 0, axis)


def residue(fraction: Fraction) -> int:
    """A rational number in Z_P."""
    return fraction.numerator * pow(fraction.denominator, -1, P) % P


def fractional_power(x: Array, exponent: Fraction) -> Array:
    """Of squares, exactly; any other x ** (n/m) is some value that no identity holds for."""
    if exponent.denominator == 1:
        return power(x, exponent.numerator)
    return power(x, exponent.numerator * pow(exponent.denominator, -1, Q) % Q)


# -------------------------------------------------------------------- sizes


class Sizes:
    """Sizes as integers: symbolic ones as in the example inputs, or with other lengths of some symbols."""

    def __init__(self, nodes: Iterable[Node]):
        self.lengths: dict[Any, int] = {}
        for node in nodes:
            value = held_by(node)
            for n in value.shape if isinstance(value, torch.Tensor) else (value,):
                if isinstance(n, torch.SymInt) and _torch.expression(n).is_Symbol:
                    self.lengths[_torch.expression(n)] = _torch.size_hint(n, 0)

    def with_length(self, symbol: Any, length: int) -> Sizes:
        """The same but for one symbol."""
        other = Sizes(())
        other.lengths = {**self.lengths, symbol: length}
        return other

    def __call__(self, size: Any) -> int:
        if isinstance(size, Node):
            size = held_by(size)
        if isinstance(size, int):
            return int(size)
        if not isinstance(size, torch.SymInt):
            raise OutsideError("a size that is no integer")
        found = _torch.expression(size).subs(self.lengths)
        if not found.is_Integer:
            raise OutsideError("a size that is not known")
        return int(found)

    def shape(self, node: Node) -> tuple[int, ...]:
        """Of a node's tensor."""
        value = held_by(node)
        if not isinstance(value, torch.Tensor):
            raise OutsideError("a value that is no tensor")
        return tuple(self(n) for n in value.shape)


def held_by(node: Node) -> Any:
    """The fake value of a node, in lifted graphs and in those of Dynamo."""
    return node.meta.get("val", node.meta.get("example_value"))


# -------------------------------------------------------------------- names of operations


def name_of(node: Node) -> str:
    """An operation's name without its overload: of ATen, of Python's operators or torch's functions inside functorch regions."""
    if node.op == "call_method":
        return _PYTHON.get(str(node.target), str(node.target))
    if node.op != "call_function":
        return ""
    if isinstance(node.target, _torch.OpOverload):
        return str(node.target._schema.name).removeprefix("aten::") if node.target.namespace == "aten" else ""
    name = getattr(node.target, "__name__", "")
    return _PYTHON.get(name, name)


_PYTHON = {
    "truediv": "div",
    "true_divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "float": "to",
    "double": "to",
}
ENTER_LANE, LEAVE_LANE = "_add_batch_dim", "_remove_batch_dim"


class Evaluator:
    """Values of a graph's nodes. What is not in `inside`, and no constant, is drawn at random.

    Args:
        operations: what is followed, by name.
        inside: the nodes to be followed.
        constants: nodes that depend on no input.
        hidden: nodes in functorch regions, whose own dimensions do not show.
        same: for nodes that compute what an earlier one computes, that one.
        linked: nodes outside that are exp, log or neg of another one, which is met too.
    """

    def __init__(
        self,
        operations: Mapping[str, Operation],
        inside: set[Node],
        constants: set[Node],
        hidden: set[Node],
        sizes: Sizes,
        same: Mapping[Node, Node] = MappingProxyType({}),
        linked: Mapping[Node, Node] = MappingProxyType({}),
    ):
        self.operations = operations
        self.inside, self.constants, self.hidden, self.sizes = inside, constants, hidden, sizes
        self._same, self._linked = same, linked
        self._random = np.random.default_rng(0)
        self._unit = self._draw_squares((SAMPLES,))
        self._parents = [0]
        self._values: dict[Node, Value | None] = {}

    # ------------------------------------------------------------ values

    def run(self, nodes: Iterable[Node]) -> None:
        """Evaluate nodes in their order."""
        for node in nodes:
            self._values[node] = self._attempt(node)

    def value(self, node: Node) -> Value | None:
        """The value of a node that was met, if it has one."""
        return self._values.get(node)

    def _attempt(self, node: Node) -> Value | None:
        try:
            value = self.operations[name_of(node)](self, node, *bound(node))
            return self._checked(node, value)
        except (OutsideError, ValueError, TypeError, IndexError, KeyError, ArithmeticError):
            return None

    def _checked(self, node: Node, value: Value) -> Value:
        """The value, if its dimensions are the node's."""
        shape = self.sizes.shape(node)
        if len(shape) != len(value.labels):
            raise OutsideError("a value of another rank")
        for size, label, length in zip(shape, value.labels, value.lengths, strict=True):
            if length != (size if label == KEPT else 1):
                raise OutsideError("a value of another length")
        return value

    def drawn(self, node: Node, labels: Sequence[int]) -> Value:
        """A value at random, exp x and x apart, for a node outside."""
        node = self._same.get(node, node)
        if node in self.hidden:
            raise OutsideError("a value inside a functorch region that is not followed")
        if node in self._linked:
            return self._followed(node, labels)
        shape = tuple(n if label == KEPT else 1 for n, label in zip(self.sizes.shape(node), labels, strict=True))
        plain = self._random.integers(1, P, (SAMPLES, *shape), dtype=np.int64)
        image = self._draw_squares((SAMPLES, *shape))
        value = Value(plain=plain, image=image, labels=tuple(labels), support=frozenset((node,)))
        self._values[node] = value
        return value

    def _followed(self, node: Node, labels: Sequence[int]) -> Value:
        """A node outside as the function that it is of another one, which may have been met."""
        if self.known(self._linked[node]) is None:
            self.drawn(self._linked[node], labels)
        self._values[node] = self._attempt(node)
        value = self.known(node)
        assert value is not None
        return value

    def _draw_squares(self, shape: tuple[int, ...]) -> Array:
        root = self._random.integers(1, P, shape, dtype=np.int64)
        return root * root % P

    def number(self, value: Any) -> Value:
        """A constant; exp of a rational number is that power of one fixed element."""
        if isinstance(value, (bool, int)):
            fraction = Fraction(int(value))
        elif isinstance(value, float) and math.isfinite(value):
            fraction = Fraction(value)
        elif value == -math.inf:
            return Value(plain=None, image=np.zeros(SAMPLES, dtype=np.int64), labels=())
        else:
            raise OutsideError("a number that is not finite")
        plain = np.full(SAMPLES, residue(fraction), dtype=np.int64)
        return Value(plain=plain, image=fractional_power(self._unit, fraction), labels=(), scalar=fraction)

    # ------------------------------------------------------------ lanes

    def lane(self) -> int:
        """A new lane."""
        self._parents.append(len(self._parents))
        return len(self._parents) - 1

    def lane_of(self, label: int) -> int:
        """A label, lanes by the number that all equal ones share."""
        while label > 0 and self._parents[label] != label:
            label = self._parents[label]
        return label

    def merged(self, labels: Sequence[int], lengths: Sequence[int]) -> int:
        """The label of a dimension in which several meet: a lane meets itself alone, or what is constant along it."""
        lanes = {self.lane_of(label) for label in labels if label > 0}
        if any(label == KEPT and length != 1 for label, length in zip(labels, lengths, strict=True)):
            if lanes:
                raise OutsideError("a lane meets a dimension that values move along")
            return KEPT
        if lanes:
            first = min(lanes)
            for lane in lanes:
                self._parents[lane] = first
            return first
        return WILD if WILD in labels else KEPT

    def is_laned(self, value: Value) -> bool:
        """Whether no two dimensions are the same lane, as in an outer product of a tensor with itself."""
        lanes = [self.lane_of(label) for label in (*value.labels, value.hidden or 0) if label > 0]
        return len(lanes) == len(set(lanes))

    # ------------------------------------------------------------ arguments

    def operands(self, arguments: Sequence[Any]) -> list[Value]:
        """Operands of a pointwise operation. Those seen for the first time have the lanes of what they meet."""
        known = [self.known(argument) for argument in arguments]
        met = [value for value in known if value is not None]
        values = []
        for argument, value in zip(arguments, known, strict=True):
            if value is None:
                labels = self._labels_beside(self.sizes.shape(argument), met)
                value = self.drawn(argument, labels)
            values.append(value)
        return values

    def known(self, argument: Any) -> Value | None:
        if not isinstance(argument, Node):
            return self.number(argument)
        if not isinstance(held_by(argument), torch.Tensor):
            return self.number(self.sizes(argument))
        if argument not in self.inside:
            argument = self._same.get(argument, argument)
        if argument in self._values:
            value = self._values[argument]
            if value is None:
                raise OutsideError("an operand without a value")
            return value
        if argument in self.constants:
            self._values[argument] = self._attempt(argument)
            return self.known(argument)
        if argument in self.inside:
            raise OutsideError("an operand that comes later")
        return None

    def _labels_beside(self, shape: tuple[int, ...], met: Sequence[Value]) -> list[int]:
        labels = []
        for back in range(len(shape), 0, -1):
            beside = [(v.labels[-back], v.lengths[-back]) for v in met if len(v.labels) >= back]
            if shape[-back] == 1 or any(label == KEPT and length == shape[-back] for label, length in beside):
                labels.append(KEPT)
            else:
                labels.append(next((label for label, _ in beside if label > 0), 0) or self.lane())
        return labels

    def along(self, argument: Any, dim: int, beside: Sequence[Value] = ()) -> Value:
        """An operand that is moved along a dimension, which is kept."""
        value = self.known(argument)
        if value is None:
            shape = self.sizes.shape(argument)
            if beside:
                labels = self._labels_beside(shape, beside)
            else:
                labels = [KEPT if size == 1 else self.lane() for size in shape]
            labels[dim % len(shape)] = KEPT
            return self.drawn(argument, labels)
        return self.kept(value, dim, argument)

    def kept(self, value: Value, dim: int, node: Node) -> Value:
        """The value with a dimension of its own length."""
        label = value.labels[dim]
        if label > 0:
            raise OutsideError("values move along a lane")
        if label == KEPT:
            return value
        length, axis = self.sizes.shape(node)[dim], value.axis(dim)
        labels = list(value.labels)
        labels[dim] = KEPT
        return value.map(lambda x: np.repeat(x, length, axis=axis), labels=tuple(labels))

    def viewed(self, argument: Any) -> Value:
        """The operand of a view."""
        value = self.known(argument)
        if value is None:
            raise OutsideError("a view of what is outside")
        return value

    def aligned(self, values: Sequence[Value]) -> tuple[list[Value], tuple[int, ...], int | None]:
        """Operands broadcast to one rank, with the labels of the result."""
        rank = max(len(v.labels) for v in values)
        hides = any(v.hidden is not None for v in values)
        wide = [spread(v, rank, hides) for v in values]
        columns = [
            self.merged([v.labels[k] for v in wide], [v.lengths[k] for v in wide])
            for k in range(rank)
        ]  # fmt: skip
        hidden = None
        if hides:
            labels = [KEPT if v.hidden is None else v.hidden for v in wide]
            hidden = self.merged(labels, [array_of(v).shape[1] for v in wide])
        return wide, tuple(columns), hidden


def array_of(value: Value) -> Array:
    """One of the arrays of a value."""
    array = value.plain if value.plain is not None else value.image
    if array is None:
        raise OutsideError("a value of which nothing is known")
    return array


def spread(value: Value, rank: int, hides: bool) -> Value:
    """With leading dimensions of length 1, and a hidden one."""
    missing = rank - len(value.labels)
    inner = value.lengths
    hidden = (array_of(value).shape[1],) if value.hidden is not None else (1,) if hides else ()
    labels = (*(KEPT,) * missing, *value.labels)
    shape = (SAMPLES, *hidden, *(1,) * missing, *inner)
    return value.map(lambda x: x.reshape(shape), labels=labels, hidden=KEPT if hides and value.hidden is None else value.hidden)


def bound(node: Node) -> tuple[list[Any], dict[str, Any]]:
    """Arguments in the order of the schema, as far as they are given without a gap; the others by name."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if isinstance(node.target, _torch.OpOverload):
        for schema in node.target._schema.arguments[len(args) :]:
            if schema.name not in kwargs or schema.kwarg_only:
                break
            args.append(kwargs.pop(schema.name))
    return args, kwargs
