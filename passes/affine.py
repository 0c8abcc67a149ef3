"""One step of a loop, read as a function of one of its states: `factor * state + shift`, or `max(state + rise, other)`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.fx import Node
from torch.fx.node import map_arg

from effcompile.contraction import BIASED, Contraction, contraction_of
from effcompile.pattern import CASTS, describe

from .factors import constant
from .tentative import Stop

aten = torch.ops.aten


@dataclass(frozen=True)
class Known:
    """A value free of the state. `batched`: for each step, along a first dimension; else the same in all steps."""

    value: Any
    batched: bool


@dataclass(frozen=True)
class Affine:
    """`factor * state + shift`; None for 1 and for 0. `places`: the number of the state's element that each element holds."""

    factor: Known | None
    shift: Known | None
    places: Any


@dataclass(frozen=True)
class Maximum:
    """`max(state + rise, other)`, elements in place."""

    rise: Known | None
    other: Known


Value = Known | Affine | Maximum


class Body(Protocol):
    """The body of a loop: its nodes in order, and the values of those that no unsolved state reaches."""

    nodes: list[Node]

    def value(self, node: Any) -> Known: ...

    def inputs_of(self, node: Any) -> set[Node]: ...


def lifted(node: Node, known: Mapping[Node, Known]) -> Known:
    """What a node of one step is for all steps."""
    target: Any = node.target
    args, kwargs = node.args, node.kwargs
    contraction = contraction_of(node) if node.target not in BIASED else None
    inputs: list[Node] = []
    map_arg((args, kwargs), inputs.append)
    batched = [n for n in dict.fromkeys(inputs) if known[n].batched]
    if contraction is not None and batched:
        return _contracted(contraction, known)

    def call(*values: Any) -> Any:
        given = dict(zip(batched, values, strict=True))
        filled = map_arg((args, kwargs), lambda n: given[n] if n in given else known[n].value)
        return target(*filled[0], **filled[1])

    return Known(torch.vmap(call)(*(known[n].value for n in batched)), True) if batched else Known(call(), False)


def _contracted(contraction: Contraction, known: Mapping[Node, Known]) -> Known:
    """A contraction, its operands with a letter more for the steps."""
    values = [known[x] for x in contraction.operands]
    letters = ["T" * x.batched + own for x, own in zip(values, contraction.letters, strict=True)]
    equation = f"{letters[0]},{letters[1]}->T{contraction.out}"
    return Known(torch.ops.effcompile.contract(equation, values[0].value, values[1].value), True)


def combined(function: Callable[..., Any], *values: Known | None) -> Known:
    """A function of values of one step, carried out for all steps."""
    present = [x for x in values if x is not None]
    batched = [x for x in present if x.batched]

    def call(*given: Any) -> Any:
        supply = iter(given)
        return function(*(None if x is None else next(supply) if x.batched else x.value for x in values))

    return Known(torch.vmap(call)(*(x.value for x in batched)), True) if batched else Known(call(), False)


class Step:
    """Reads the nodes of a body as functions of one state."""

    def __init__(self, body: Body, state: Node):
        self.body = body
        self.state = state
        self.values: dict[Node, Value] = {state: Affine(None, None, _places(shape_of(state)))}

    def solve(self, output: Any) -> Value:
        """What `output`, the new value of the state, is.

        Raises:
            Stop: it is no such function.
        """
        needed = self.body.inputs_of(output)
        reached = {self.state}
        for node in self.body.nodes:
            if node in needed and any(x in reached for x in node.all_input_nodes):
                reached.add(node)
                self.values[node] = self._read(node)
        result = self.values.get(output) or self.body.value(output)
        if isinstance(result, Affine) and not np.array_equal(result.places, _places(shape_of(self.state))):
            raise Stop("a state is rearranged from step to step")
        return result

    def of(self, node: Any) -> Value:
        """A node, or a number."""
        return self.values[node] if isinstance(node, Node) and node in self.values else self.body.value(node)

    def _read(self, node: Node) -> Value:
        value = constant(node)
        if value is not None:
            return Known(float(value), False)
        if node.target in _IDENTITIES:
            if not node.meta["val"].dtype.is_floating_point:
                raise Stop(f"a state is cast to {node.meta['val'].dtype}")
            return self.of(node.args[0])
        if node.target in _VIEWS:
            return self._viewed(node)
        if contraction_of(node) is not None and node.target is not aten.baddbmm.default:
            raise Stop(f"{describe(node)} mixes the elements of a state: it is no element-wise recurrence (the delta rule is none)")
        reader = _READERS.get(node.target)
        result = None if reader is None else reader(self, node)
        if result is None:
            raise Stop(f"{describe(node)} is not linear in a state")
        return result

    def _viewed(self, node: Node) -> Affine:
        value = self._affine(node.args[0])
        shape = shape_of(node.args[0])

        def move(x: Any) -> Any:
            return node.target(torch.broadcast_to(x, shape), *node.args[1:], **node.kwargs)

        factor, shift = (x and combined(move, x) for x in (value.factor, value.shift))
        return Affine(factor, shift, _moved(node, value.places))

    def _affine(self, node: Any) -> Affine:
        value = self.of(node)
        if not isinstance(value, Affine):
            raise Stop("the maximum of a state is computed with")
        return value

    def sides(self, node: Node) -> tuple[Value, Value]:
        """The two operands; a maximum is computed with in no way that we know."""
        left, right = self.of(node.args[0]), self.of(node.args[1])
        if isinstance(left, Maximum) or isinstance(right, Maximum):
            raise Stop("the maximum of a state is computed with")
        return left, right


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of a value of a body, as plain numbers."""
    shape = tuple(node.meta["val"].shape)
    if not all(isinstance(n, int) for n in shape):
        raise Stop(f"the size {shape} of a state is not a fixed number")
    return shape


def _places(shape: tuple[int, ...]) -> Any:
    return np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)


def _in_place(value: Affine, node: Node) -> Affine:
    """Places of a result that an operand was broadcast to."""
    return replace(value, places=np.broadcast_to(value.places, shape_of(node)))


# -------------------------------------------------------------------- views

_IDENTITIES = frozenset({
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, *CASTS
})  # fmt: skip


def _moved(node: Node, places: Any) -> Any:
    return _VIEWS[node.target](places, node)


def _reshaped(places: Any, node: Node) -> Any:
    return places.reshape(shape_of(node))


def _transposed(places: Any, node: Node) -> Any:
    return np.swapaxes(places, *node.args[1:3])  # type: ignore[arg-type]


def _permuted(places: Any, node: Node) -> Any:
    return np.transpose(places, node.args[1])  # type: ignore[arg-type]


def _expanded(places: Any, node: Node) -> Any:
    return np.broadcast_to(places, shape_of(node))


_VIEWS: dict[Any, Callable[[Any, Node], Any]] = {
    aten.unsqueeze.default: _reshaped,
    aten.squeeze.dim: _reshaped,
    aten.squeeze.default: _reshaped,
    aten.squeeze.dims: _reshaped,
    aten.view.default: _reshaped,
    aten.reshape.default: _reshaped,
    aten._unsafe_view.default: _reshaped,
    aten.flatten.using_ints: _reshaped,
    aten.unflatten.int: _reshaped,
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
    aten.expand.default: _expanded,
}


def source_of(node: Node) -> tuple[Node, Callable[[Any], Any]] | None:
    """What a node holds all elements of in another order, and how to get it back; None if there is none."""
    if node.target not in _VIEWS and node.target not in _IDENTITIES:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    old, new = source.meta["val"], node.meta["val"]
    if old.dtype != new.dtype or old.numel() != new.numel():
        return None
    if node.target is aten.transpose.int:
        return source, lambda x: x.transpose(*node.args[1:3])
    if node.target is aten.permute.default:
        order = [int(d) % old.dim() for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return source, lambda x: x.permute([order.index(d) for d in range(len(order))])
    return source, lambda x: x.reshape(old.shape)


# -------------------------------------------------------------------- arithmetic


def _sum(node: Node, left: Value, right: Value, factor: Any = 1) -> Affine | None:
    """`left + factor * right`."""
    right = right if factor == 1 else _times(right, Known(factor, False))
    if isinstance(left, Known):
        left, right = right, left
    assert isinstance(left, Affine)
    if isinstance(right, Known):
        return _in_place(replace(left, shift=_plus(left.shift, right)), node)
    assert isinstance(right, Affine)
    if not np.array_equal(left.places, right.places):
        raise Stop(f"{describe(node)} mixes the elements of a state")
    one = Known(1.0, False)
    factor = combined(operator.add, left.factor or one, right.factor or one)
    return Affine(factor, _plus(left.shift, right.shift), left.places)


def _plus(left: Known | None, right: Known | None) -> Known | None:
    return (left or right) if left is None or right is None else combined(operator.add, left, right)


def _times(value: Value, other: Known, operation: Callable[[Any, Any], Any] = operator.mul) -> Known | Affine:
    if isinstance(value, Known):
        return combined(operation, value, other)
    assert isinstance(value, Affine)
    if value.factor is None and operation is operator.mul:
        factor = other
    else:
        factor = combined(operation, value.factor or Known(1.0, False), other)
    return Affine(factor, value.shift and combined(operation, value.shift, other), value.places)


def _add(step: Step, node: Node) -> Value | None:
    return _sum(node, *step.sides(node), _alpha(node))


def _subtract(step: Step, node: Node) -> Value | None:
    return _sum(node, *step.sides(node), -_alpha(node))


def _reverse_subtract(step: Step, node: Node) -> Value | None:
    left, right = step.sides(node)
    return _sum(node, right, left, -1) if _alpha(node) == 1 else None


def _alpha(node: Node) -> Any:
    return node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)


def _multiply(step: Step, node: Node) -> Value | None:
    left, right = step.sides(node)
    if isinstance(left, Known):
        left, right = right, left
    return _scaled(node, left, right, operator.mul) if isinstance(right, Known) and isinstance(left, Affine) else None


def _divide(step: Step, node: Node) -> Value | None:
    left, right = step.sides(node)
    if not isinstance(right, Known) or not isinstance(left, Affine) or node.kwargs.get("rounding_mode"):
        return None
    return _scaled(node, left, right, operator.truediv)


def _scaled(node: Node, value: Affine, other: Known, operation: Callable[[Any, Any], Any]) -> Affine:
    scaled = _times(value, other, operation)
    assert isinstance(scaled, Affine)
    return _in_place(scaled, node)


def _negate(step: Step, node: Node) -> Value | None:
    return _scaled(node, step._affine(node.args[0]), Known(-1, False), operator.mul)


def _choose(step: Step, node: Node) -> Value | None:
    """`where(condition, a, b)`."""
    return _selected(node, step.of(node.args[0]), step.of(node.args[1]), step.of(node.args[2]))


def _fill(step: Step, node: Node) -> Value | None:
    """`masked_fill(a, condition, b)` is `where(condition, b, a)`."""
    return _selected(node, step.of(node.args[1]), step.of(node.args[2]), step.of(node.args[0]))


def _selected(node: Node, condition: Value, then: Value, otherwise: Value) -> Value | None:
    if not isinstance(condition, Known) or isinstance(then, Maximum) or isinstance(otherwise, Maximum):
        return None
    affine = [_in_place(x, node) for x in (then, otherwise) if isinstance(x, Affine)]
    if any(not np.array_equal(x.places, affine[0].places) for x in affine):
        raise Stop(f"{describe(node)} mixes the elements of a state")
    (factor, shift), (other_factor, other_shift) = (_parts(x) for x in (then, otherwise))
    if shift is None and other_shift is None:
        return Affine(combined(_where, condition, factor, other_factor), None, affine[0].places)
    shift, other_shift = (x or Known(0.0, False) for x in (shift, other_shift))
    return Affine(
        combined(_where, condition, factor, other_factor), combined(_where, condition, shift, other_shift), affine[0].places
    )  # fmt: skip


def _parts(value: Known | Affine) -> tuple[Known, Known | None]:
    """Factor and shift, None for 0."""
    if isinstance(value, Known):
        zero = not isinstance(value.value, torch.Tensor) and value.value == 0
        return Known(0.0, False), None if zero else value
    return value.factor or Known(1.0, False), value.shift


def _where(condition: Any, then: Any, otherwise: Any) -> Any:
    return torch.where(condition, then, otherwise)


def _add_product(step: Step, node: Node) -> Value | None:
    """`a + value * b * c`."""
    first, *factors = (step.of(x) for x in node.args[:3])
    scale = node.kwargs.get("value", 1)
    tainted = [x for x in factors if isinstance(x, Affine)]
    if len(tainted) > 1 or any(isinstance(x, Maximum) for x in (first, *factors)):
        return None
    if tainted:
        other = next(x for x in factors if isinstance(x, Known))
        product = _scaled(node, tainted[0], other if scale == 1 else combined(lambda x: x * scale, other), operator.mul)
        return _sum(node, product, first)
    return _sum(node, first, combined(operator.mul, *factors), scale)  # type: ignore[arg-type]


def _interpolate(step: Step, node: Node) -> Value | None:
    """`a + weight * (b - a)`."""
    start, end, weight = (step.of(x) for x in node.args[:3])
    if not isinstance(weight, Known) or not isinstance(start, (Known, Affine)) or not isinstance(end, (Known, Affine)):
        return None
    rest = combined(lambda w: 1 - w, weight)
    parts = [
        combined(operator.mul, x, w) if isinstance(x, Known) else _scaled(node, x, w, operator.mul)
        for x, w in ((start, rest), (end, weight))
    ]
    return _sum(node, *parts)  # type: ignore[arg-type]


def _add_batched_product(step: Step, node: Node) -> Value | None:
    """`beta * a + alpha * b @ c`."""
    first, left, right = (step.of(x) for x in node.args[:3])
    if not isinstance(first, Affine) or not isinstance(left, Known) or not isinstance(right, Known):
        return None
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    kept = first if beta == 1 else _scaled(node, first, Known(beta, False), operator.mul)
    return _sum(node, kept, combined(lambda a, b: torch.bmm(a, b) * alpha, left, right))


def _maximum(step: Step, node: Node) -> Value | None:
    left, right = step.sides(node)
    if isinstance(left, Known):
        left, right = right, left
    if not isinstance(right, Known) or not isinstance(left, Affine) or left.factor is not None:
        return None
    return Maximum(left.shift, right) if np.array_equal(left.places, _places(shape_of(step.state))) else None


_READERS: dict[Any, Callable[[Step, Node], Value | None]] = {
    aten.add.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _subtract,
    aten.sub.Scalar: _subtract,
    aten.rsub.Tensor: _reverse_subtract,
    aten.rsub.Scalar: _reverse_subtract,
    aten.mul.Tensor: _multiply,
    aten.mul.Scalar: _multiply,
    aten.div.Tensor: _divide,
    aten.div.Scalar: _divide,
    aten.neg.default: _negate,
    aten.where.self: _choose,
    aten.where.ScalarSelf: _choose,
    aten.where.ScalarOther: _choose,
    aten.masked_fill.Scalar: _fill,
    aten.masked_fill.Tensor: _fill,
    aten.addcmul.default: _add_product,
    aten.lerp.Tensor: _interpolate,
    aten.lerp.Scalar: _interpolate,
    aten.baddbmm.default: _add_batched_product,
    aten.maximum.default: _maximum,
    aten.max.other: _maximum,
}
