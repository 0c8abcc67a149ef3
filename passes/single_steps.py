"""One step of a recurrence, as decoding takes it: a state that a product reads, and that goes back to where it came from.

    new = factor * state + offset,   state.copy_(new),   out = new . q        =  linear_scan(factor, offset, state), of one step

Each of the two passes over the state that the operation makes, reading and writing, is needed; what `torch.compile` makes of the
original often makes three, since what is read across the rows that are written is a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from effcompile.builder import Builder, is_tensor_node
from effcompile.ir import Rejected
from effcompile.pattern import CASTS
from effcompile.viewmaps import shape_of

from .factors import is_contracted
from .scans import scan_of
from .tentative import Stop, Substitution, substitutions

aten = torch.ops.aten

STEP = "single step"  # in the meta of a scan that stands for one
_COPIES = (aten.clone.default, aten.contiguous.default)
_MULTIPLIED = (aten.mul.Tensor, aten.mul.Scalar)


@dataclass(frozen=True, kw_only=True)
class _Step(Substitution):
    """The new state as it is read, by the last of `pairs` as `write` keeps it. `passed`: the new state, and copies on that way."""

    write: Node
    passed: frozenset[Node]

    def apply(self) -> None:
        *read, (old, last) = self.pairs
        self.write.replace_input_with(old, last)
        for node, seen in read:
            node.replace_all_uses_with(seen, delete_user_cb=lambda user: user not in self.passed)


def find(module: GraphModule) -> tuple[list[Substitution], list[Rejected]]:
    """Scans of one step, not yet applied, and why what resembles one stays."""
    return substitutions(_sites(module), "scan")


def _sites(module: GraphModule) -> Iterator[tuple[Node, Callable[[Builder], Substitution | None]]]:
    for write in module.graph.nodes:
        if write.target is aten.copy_.default and write.args[0].op == "placeholder":
            passed = _copies(write.args[1])
            new = passed[-1]
            if is_tensor_node(new) and new.target is aten.add.Tensor and any(is_contracted(node) for node in passed):
                yield new, partial(_substitution, write, passed)


def _substitution(write: Node, passed: list[Node], builder: Builder) -> Substitution | None:
    state: Any = write.args[0]
    new = passed[-1]
    sides = [x for x in new.args if is_tensor_node(x)]
    decayed = [side for side in sides if _taken(side, state) is not None]
    if len(sides) != 2 or len(decayed) != 1 or new.kwargs:
        return None
    if any(node.meta["val"].dtype != state.meta["val"].dtype for node in passed):
        raise Stop(f"the state is kept in {state.meta['val'].dtype} and updated in {new.meta['val'].dtype}, which takes its casts")
    if shape_of(new) != shape_of(state):
        raise Stop("the new state has another shape than the old one")
    factor = _taken(decayed[0], state)
    offset = sides[1 - sides.index(decayed[0])]
    scan = scan_of(builder, _coefficient(builder, factor, new), _offset(builder, offset, new), state)
    scan.meta[STEP] = True
    own = {*passed, write}
    read = [(node, builder.call(aten.select.int, scan, 0, 0)) for node in passed if not node.users.keys() <= own]
    kept = (passed[0], builder.call(aten.select.int, scan, 0, -1))
    return _Step(
        what="one step of a recurrence", anchor=new, pairs=(*read, kept), scans=(scan,), write=write, passed=frozenset(passed)
    )  # fmt: skip


def _taken(side: Node, state: Node) -> Any:
    """What the state is multiplied with in `side`: 1 where that is the state itself; None where it is no such product."""
    if _uncast(side) is state:
        return 1
    if side.target not in _MULTIPLIED or side.kwargs:
        return None
    left, right = side.args
    if isinstance(left, Node) and _uncast(left) is state:
        return right
    return left if isinstance(right, Node) and _uncast(right) is state else None


def _copies(node: Any) -> list[Node]:
    """A node and what it is a copy or a cast of, and so on."""
    found = [node]
    while found[-1].op == "call_function" and (found[-1].target in CASTS or found[-1].target in _COPIES):
        found.append(found[-1].args[0])  # type: ignore[arg-type]
    return found


def _uncast(node: Any) -> Any:
    while isinstance(node, Node) and node.op == "call_function" and node.target in CASTS:
        node = node.args[0]
    return node


def _coefficient(builder: Builder, factor: Any, new: Node) -> Node | None:
    """[1, ...], of the state's rank and one more."""
    if factor == 1:
        return None
    value = new.meta["val"]
    if not isinstance(factor, Node):
        return builder.call(aten.full.default, [1] * (value.dim() + 1), factor, dtype=value.dtype, device=value.device)
    for _ in range(value.dim() + 1 - factor.meta["val"].dim()):
        factor = builder.call(aten.unsqueeze.default, factor, 0)
    return factor


def _offset(builder: Builder, offset: Node, new: Node) -> Node:
    """[1, ...], of all of the state's elements, in its dtype."""
    value = new.meta["val"]
    if offset.meta["val"].dtype != value.dtype:
        offset = builder.call(aten._to_copy.default, offset, dtype=value.dtype)
    if shape_of(offset) != shape_of(new):
        if not all(isinstance(n, int) for n in value.shape):
            raise Stop("what is added to the state is expanded to symbolic sizes")
        offset = builder.call(aten.expand.default, offset, list(value.shape))
    return builder.call(aten.unsqueeze.default, offset, 0)
