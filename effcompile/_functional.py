"""Second step of lifting: in-place operators become functional ones; what was written to an input is written back at the end.

A tensor that is written to, or whose view is, belongs to a *memory*. Each write gives the memory a new value:
`select(x, 0, i).copy_(y)` becomes `x1 = select_scatter(x, y, 0, i)`. Later reads of its views are taken anew from the newest.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from effcompile import _torch
from effcompile._record import Barrier, Recording, Sizes
from effcompile._regions import Modes, modes, written_arguments
from effcompile.errors import LiftError

aten = torch.ops.aten

# In-place operators that mean the same under autocast as their functional forms.
AUTOCAST_NEUTRAL = frozenset(
    name
    for line in (
        "abs add ceil clamp clamp_max clamp_min div exponential floor leaky_relu mul neg relu round",
        "sigmoid sign silu sqrt sub tanh tril triu zero",
        "and bitwise_and bitwise_or bitwise_xor eq ge gt le logical_and logical_not logical_or lt ne",
        "copy fill index_add index_copy index_fill index_put masked_fill masked_scatter scatter scatter_add scatter_reduce",
    )
    for name in line.split()
)
RENAMED = {"aten::normal_": "normal_functional"}
DETACHING = (aten.detach.default, aten.alias.default)


@dataclass
class Memory:
    """One storage that is written to. `current` is its newest value, computed by a node of the new graph, in the root's shape."""

    root: Node
    current: Node
    version: int = 0


def functionalise(recording: Recording) -> Recording:
    """The recording without in-place operators, but for the final `aten.copy_` to each input that was written to.

    Operators without a functional form stay in place and become barriers.
    Raises LiftError where functional form would change aliasing or gradients.
    """
    if not any(_is_mutable(node) for node in recording.graph.nodes):
        return recording
    return _Functionaliser(recording).run()


def functional_form(func: Any) -> Any:
    """The operator that computes what `func` writes, or None. `copy_`, `fill_` and `zero_` count as having one."""
    if func in _SPELLED:
        return func
    name = RENAMED.get(func._schema.name, func._schema.name.removeprefix("aten::").removesuffix("_"))
    if func.namespace != "aten" or func._schema.name.removesuffix("_") == func._schema.name:
        return None
    writes = [argument for argument in func._schema.arguments if argument.alias_info and argument.alias_info.is_write]
    if writes != func._schema.arguments[:1] or str(writes[0].type) != "Tensor":
        return None
    packet = getattr(aten, name, None)
    form = getattr(packet, func._overloadname, None) if packet is not None else None
    return form if form is not None and not form._schema.is_mutable else None


class _Functionaliser:
    def __init__(self, recording: Recording) -> None:
        self._old = recording.graph
        self._recording = recording
        self._new = Graph(tracer_cls=recording.graph._tracer_cls)
        self._sizes = Sizes(self._new)
        self._nodes: dict[Node, Any] = {}
        self._memories: dict[int, Memory | None] = {}
        self._taken: dict[Node, tuple[Node, int]] = {}
        self._parents: dict[Node, tuple[Node, Node | None]] = {}
        self._modes = dict(modes(recording.graph))
        self._gradients = any(state.grad for state in self._modes.values())
        self._requiring: set[int] = set()
        self._barriers = {barrier.node: barrier for barrier in recording.barriers}
        self._place: Node = next(iter(recording.graph.nodes))

    def run(self) -> Recording:
        self._find_memories()
        with self._recording.fake_mode or contextlib.nullcontext():
            for node in self._old.nodes:
                self._place = node
                self._step(node)
        barriers = tuple(Barrier(node=self._nodes[b.node], why=b.why, mutates=b.mutates) for b in self._barriers.values())
        return Recording(
            graph=self._new, attributes=self._recording.attributes, barriers=barriers, fake_mode=self._recording.fake_mode
        )

    def _find_memories(self) -> None:
        """Which storages are written to by operators that have a functional form, and that nothing else writes to them."""
        opaque: set[int] = set()
        for node in self._old.nodes:
            if (key := _key(node)) and node.meta["val"].requires_grad:
                self._requiring.add(key)
            if node in self._barriers and self._barriers[node].mutates:
                opaque.update(key for source in node.all_input_nodes for key in _keys(source))
            if not _is_mutable(node):
                continue
            keys = {key for written, _ in written_arguments(node) for key in _keys(written)}
            if functional_form(node.target) is not None:
                self._memories.update(dict.fromkeys(keys))
                continue
            opaque.update(keys)
            why = f"{node.target} writes in place and has no functional form"
            self._barriers[node] = Barrier(node=node, why=why, mutates=True)
        if opaque & self._memories.keys():
            raise LiftError(
                "Expected a tensor's in-place operators to be all ATen's but got one that is also written to by a barrier."
            )

    def _step(self, node: Node) -> None:
        if node.op == "output":
            self._write_back()
            self._copied(node)
        elif _is_mutable(node) and node not in self._barriers:
            self._write(node)
        elif (key := _key(node)) in self._memories:
            self._member(node, key)
        else:
            self._nodes[node] = self._copied(node)
            self._taken[node] = (self._nodes[node], self._version_of(node))

    def _version_of(self, node: Node) -> int:
        """How many writes there have been to the memory of a node, or of the parts that it splits."""
        memories = [self._memories.get(key) for key in _keys(node)]
        return sum(memory.version for memory in memories if memory is not None)

    def _copied(self, node: Node) -> Node:
        created = self._new.node_copy(node, self._read)
        if node.op == "placeholder":
            if hasattr(node, "_dynamo_source"):
                created._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
            self._sizes.add_input(created, node.meta.get("val"))
        return created

    # memories -------------------------------------------------------------------------------------------------------

    def _member(self, node: Node, key: int) -> None:
        """Enter a node whose storage is written to somewhere: the first is the memory's root, the others its views."""
        memory = self._memories[key]
        parent = next((source for source in _sources(node) if _key(source) == key), None)
        if memory is None:
            created = self._copied(node)
            self._nodes[node] = created
            self._memories[key] = Memory(root=node, current=created)
        elif node.op in ("placeholder", "get_attr"):
            both = f"{memory.root.name!r} and {node.name!r}"
            raise LiftError(f"Expected inputs that do not overlap where one is written to but got {both}.")
        elif parent is None or node in self._barriers:
            raise LiftError(f"Expected views by ATen operators of what is written to but got {node.name!r}, a view by other means.")
        else:
            self._parents[node] = (parent, node)
            fresh = memory.version == 0
            self._nodes[node] = self._copied(node) if fresh else self._read(node)
            self._taken[node] = (self._nodes[node], memory.version)

    def _read(self, node: Node) -> Node:
        """The new graph's node for the present value of an old one."""
        memory = self._memories.get(_key(node))
        if memory is None:
            return self._nodes[node]
        if node is memory.root:
            return memory.current
        taken = self._taken.get(node)
        if taken is not None and taken[1] == memory.version:
            return taken[0]
        parent, view = self._parents[node]
        if view is None:
            created = self._read(parent)
        else:
            if _key(node) in self._requiring and self._modes[node].key != self._modes[self._place].key:
                what = f"{node.name!r}, used across a switch"
                raise LiftError(f"Expected a view and its use after a write in one grad mode but got {what}.")
            created = self._view_again(view, parent)
        self._taken[node] = (created, memory.version)
        return created

    def _view_again(self, view: Node, parent: Node) -> Node:
        base = self._read(parent)
        if view.target is operator.getitem:
            several = view.args[0]
            assert isinstance(several, Node)
            parts, version = self._taken[several]
            if version != self._version_of(several):
                parts = self._emit(several.target, (base, *self._sized(several.args[1:])), several.kwargs, several)
                self._taken[several] = (parts, self._version_of(several))
            return self._emit(operator.getitem, (parts, view.args[1]), {}, view)
        args = tuple(base if argument is parent else self._sized(argument) for argument in view.args)
        return self._emit(view.target, args, dict(view.kwargs), view)

    def _sized(self, argument: Any) -> Any:
        return torch.fx.map_arg(argument, self._read)

    def _write(self, node: Node) -> None:
        target = written_arguments(node)[0][0]
        memory = self._memories[_key(target)]
        assert memory is not None
        self._refuse_lost_gradients(node, target, memory)
        value = self._like(self._functional(node, self._modes[node]), target)
        while target is not memory.root:
            parent, view = self._parents[target]
            value = value if view is None else self._scattered(view, parent, value)
            target = parent
        value = self._own(value, node, target)
        memory.current, memory.version = value, memory.version + 1
        if isinstance(node.meta.get("val"), torch.Tensor):
            self._parents[node] = (written_arguments(node)[0][0], None)

    def _refuse_lost_gradients(self, node: Node, target: Node, memory: Memory) -> None:
        """In place, a tensor keeps its history through a write that autograd does not see; in functional form it would lose it."""
        if not self._gradients or _key(target) not in self._requiring:
            return
        unseen = not self._modes[node].tracks_gradients
        while target is not memory.root and not unseen:
            target, view = self._parents[target]
            unseen = view is not None and view.target in DETACHING
        if unseen:
            what = f"{node.name!r}, which is not"
            raise LiftError(f"Expected writes to a tensor that requires grad to be seen by autograd but got {what}.")

    # values ---------------------------------------------------------------------------------------------------------

    def _functional(self, node: Node, state: Modes) -> Node:
        """What the in-place node computes, not yet in its target's shape and dtype."""
        name = node.target._schema.name.removeprefix("aten::").removesuffix("_")  # type: ignore[union-attr]
        autocast = state.autocasts or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        if autocast and name not in AUTOCAST_NEUTRAL:
            what = f"{node.target} in {node.name!r}"
            raise LiftError(f"Expected in-place operators without a cast of their own under autocast but got {what}.")
        args, kwargs = self._sized(node.args), self._sized(dict(node.kwargs))
        spelled = _SPELLED.get(node.target)
        if spelled is not None:
            return spelled(self, node, *args, **kwargs)
        return self._emit(functional_form(node.target), args, kwargs, node)

    def _like(self, value: Node, target: Node) -> Node:
        """`value` cast and expanded to the dtype and shape of `target`."""
        ours, theirs = value.meta["val"], target.meta["val"]
        if ours.device != theirs.device:
            value = self._emit(aten.to.device, (value, theirs.device, ours.dtype), {}, self._place)
        if ours.dtype != theirs.dtype:
            value = self._emit(aten.to.dtype, (value, theirs.dtype), {}, self._place)
        if not _same_sizes(ours.shape, theirs.shape):
            sizes = [self._sizes.node(size) if isinstance(size, torch.SymInt) else size for size in theirs.shape]
            value = self._emit(aten.expand.default, (value, sizes), {}, self._place)
        return value

    def _own(self, value: Node, write: Node, root: Node) -> Node:
        """A copy of `value` if it is still the memory of the tensor that was copied: the two must not alias."""
        source = self._sized(write.args[1]) if write.target in (aten.copy_.default, aten.fill_.Tensor) else None
        if source is None or _key(source) != _key(value):
            return value
        dense = root.meta["val"].is_contiguous()
        return self._emit(aten.clone.default, (value,), {"memory_format": torch.contiguous_format} if dense else {}, write)

    def _scattered(self, view: Node, parent: Node, value: Node) -> Node:
        """The parent's new value after its view `view` has become `value`."""
        several = view.args[0] if view.target is operator.getitem else view
        assert isinstance(several, Node)
        inverse = _INVERSES.get(several.target)
        if inverse is None:
            what = f"{view.name!r}, a write through {several.target}"
            raise LiftError(f"Expected writes through slices and permutations but got {what}.")
        return inverse(self, view, self._read(parent), value)

    def _emit(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], source: Node) -> Node:
        """A new node with the value that fake tensors give it and the origin of `source`."""
        created = self._new.call_function(target, args, dict(kwargs))
        created.meta.update(source.meta)
        with torch.no_grad():
            values = torch.fx.map_arg((args, dict(kwargs)), lambda node: node.meta["val"])
            created.meta["val"] = created.meta["example_value"] = target(*values[0], **values[1])
        return created

    def _write_back(self) -> None:
        """Give inputs their new values, and let what is returned be views of them again."""
        for memory in self._memories.values():
            if memory is not None and memory.version and memory.root.op in ("placeholder", "get_attr"):
                root = self._nodes[memory.root]
                memory.current = self._new.call_function(aten.copy_.default, (root, memory.current))
                memory.current.meta.update(memory.root.meta)
                memory.current.meta.pop("grapharg", None)
                memory.version += 1


# How a view is undone: (rewriter, view, parent's value, the view's new value) -> the parent's new value. -------------

Inverse = Callable[[_Functionaliser, Node, Node, Node], Node]


def _given(node: Node, *names: str) -> list[Any]:
    """The arguments of an ATen node by name, defaults filled in."""
    arguments = {schema.name: schema.default_value for schema in node.target._schema.arguments}  # type: ignore[union-attr]
    arguments.update(zip(arguments, node.args, strict=False))
    arguments.update(node.kwargs)
    return [arguments[name] for name in names]


def _same(rewriter: _Functionaliser, view: Node, parent: Node, value: Node) -> Node:
    return value


def _from_select(rewriter: _Functionaliser, view: Node, parent: Node, value: Node) -> Node:
    dim, index = (rewriter._sized(argument) for argument in _given(view, "dim", "index"))
    return rewriter._emit(aten.select_scatter.default, (parent, value, dim, index), {}, view)


def _from_slice(rewriter: _Functionaliser, view: Node, parent: Node, value: Node) -> Node:
    dim, start, end, step = (rewriter._sized(argument) for argument in _given(view, "dim", "start", "end", "step"))
    if step == 1 and _same_sizes(parent.meta["val"].shape, value.meta["val"].shape):
        return value
    return rewriter._emit(aten.slice_scatter.default, (parent, value, dim, start, end, step), {}, view)


def _from_diagonal(rewriter: _Functionaliser, view: Node, parent: Node, value: Node) -> Node:
    return rewriter._emit(aten.diagonal_scatter.default, (parent, value, *_given(view, "offset", "dim1", "dim2")), {}, view)


def _from_transpose(rewriter: _Functionaliser, view: Node, parent: Node, value: Node) -> Node:
    return rewriter._emit(aten.transpose.int, (value, *_given(view, "dim0", "dim1")), {}, view)


def _from_t(rewriter: _Functionaliser, view: Node, parent: Node, value: Node) -> Node:
    return rewriter._emit(aten.t.default, (value,), {}, view)


def _from_permute(rewriter: _Functionaliser, view: Node, parent: Node, value: Node) -> Node:
    (dims,) = _given(view, "dims")
    order = [dim % len(dims) for dim in dims]
    return rewriter._emit(aten.permute.default, (value, [order.index(axis) for axis in range(len(order))]), {}, view)


def _from_reshape(rewriter: _Functionaliser, view: Node, parent: Node, value: Node) -> Node:
    sizes = [rewriter._sizes.node(size) if isinstance(size, torch.SymInt) else size for size in parent.meta["val"].shape]
    return rewriter._emit(aten.reshape.default, (value, sizes), {}, view)


def _from_split(rewriter: _Functionaliser, view: Node, parent: Node, value: Node) -> Node:
    several, index = view.args
    assert isinstance(several, Node) and isinstance(index, int)
    (dim,) = _given(several, "dim")
    lengths = [part.shape[dim] for part in several.meta["val"]]
    start, length = sum(lengths[:index]), lengths[index]
    bounds = [rewriter._sizes.node(bound) if isinstance(bound, torch.SymInt) else bound for bound in (start, start + length)]
    return rewriter._emit(aten.slice_scatter.default, (parent, value, dim, *bounds), {}, view)


def _from_unbind(rewriter: _Functionaliser, view: Node, parent: Node, value: Node) -> Node:
    several, index = view.args
    assert isinstance(several, Node)
    return rewriter._emit(aten.select_scatter.default, (parent, value, *_given(several, "dim"), index), {}, view)


_INVERSES: dict[Any, Inverse] = {
    **dict.fromkeys((*DETACHING, aten.contiguous.default, aten.lift_fresh.default), _same),
    **dict.fromkeys((aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other), _same),
    aten.select.int: _from_select,
    aten.slice.Tensor: _from_slice,
    aten.diagonal.default: _from_diagonal,
    aten.transpose.int: _from_transpose,
    aten.t.default: _from_t,
    aten.permute.default: _from_permute,
    aten.split.Tensor: _from_split,
    aten.split_with_sizes.default: _from_split,
    aten.unbind.int: _from_unbind,
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.unsqueeze.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
        ),
        _from_reshape,
    ),
}


# In-place operators whose functional forms autograd or Inductor do not have. ----------------------------------------


def _copy(rewriter: _Functionaliser, node: Node, target: Node, source: Node, non_blocking: bool = False) -> Node:
    return source


def _fill(rewriter: _Functionaliser, node: Node, target: Node, value: Any) -> Node:
    if isinstance(value, Node):
        return value
    return rewriter._emit(aten.full_like.default, (target, value), {}, node)


def _zero(rewriter: _Functionaliser, node: Node, target: Node) -> Node:
    return rewriter._emit(aten.zeros_like.default, (target,), {}, node)


_SPELLED: dict[Any, Callable[..., Node]] = {
    aten.copy_.default: _copy,
    aten.fill_.Scalar: _fill,
    aten.fill_.Tensor: _fill,
    aten.zero_.default: _zero,
}


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, _torch.OpOverload) and node.target._schema.is_mutable


def _key(node: Any) -> int:
    """The storage of a node's tensor, or 0."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return _torch.storage_key(value) if isinstance(value, torch.Tensor) else 0


def _keys(argument: Any) -> set[int]:
    """The storages of a node's tensors, or of a list of nodes'."""
    if isinstance(argument, (tuple, list)):
        return set().union(*(_keys(part) for part in argument)) if argument else set()
    value = argument.meta.get("val") if isinstance(argument, Node) else None
    values = value if isinstance(value, (tuple, list)) else (value,)
    return {_torch.storage_key(part) for part in values if isinstance(part, torch.Tensor)} - {0}


def _sources(node: Node) -> list[Node]:
    """The nodes that a view may be of: its arguments, seen through a list of parts."""
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return node.args[0].all_input_nodes
    return node.all_input_nodes


def _same_sizes(left: Any, right: Any) -> bool:
    """Whether two shapes are equal as far as is known without a new guard."""
    plain = [[_torch.expression(size) if isinstance(size, torch.SymInt) else size for size in shape] for shape in (left, right)]
    return plain[0] == plain[1]
