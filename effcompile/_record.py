"""First step of lifting: each node of Dynamo's graph becomes the ATen operators that it calls, in their order, modes included.

Nothing is executed where Dynamo's own fake result will do: a node that makes one operator call costs one argument parse. In-place
operators stay in place here (`_functional` removes them); higher-order operators, functorch regions and calls that never reach the
dispatcher are copied as they stand and listed as barriers.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.proxy import GraphAppendingTracer, Proxy

from effcompile import _torch
from effcompile.errors import LiftError

aten = torch.ops.aten
MODE_SWITCHES = (_torch.SET_GRAD, _torch.AUTOCAST_ENTER, _torch.AUTOCAST_EXIT, _torch.INFERENCE_ENTER, _torch.INFERENCE_EXIT)
WHOLE = {aten.reshape.default, aten.contiguous.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other}
LIFTED_BODIES = ("tag_activation_checkpoint", "invoke_subgraph")
COPIED_MODULES = ("torch._functorch.", "torch._C._functorch.", "torch.autograd.", "torch.func.")
COPIED_METHODS = {"backward", "register_hook", "requires_grad_", "retain_grad", "register_post_accumulate_grad_hook"}
AUGMENTED = tuple(getattr(operator, name) for name in ("setitem", "iadd", "isub", "imul", "itruediv", "imatmul", "iand", "ior"))
WRITTEN_OUT = (aten.where.default, aten.nonzero_numpy.default)
NUMBERS = (int, float, bool, complex)
PLAIN = (*NUMBERS, str, torch.dtype, torch.device, torch.layout, torch.memory_format, slice, range, type(None), type(...))
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)

TRANSFORMS = "a region of torch.func transforms is kept as it is"

LiftBody = Callable[[GraphModule], GraphModule | None]


@dataclass(frozen=True, kw_only=True)
class Barrier:
    """A node that was copied, not opened. `mutates` if it may write to its arguments, `run` if it is one of many in a row."""

    node: Node
    why: str
    mutates: bool = False
    run: bool = False


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The ATen graph, new values of attributes (lifted bodies), the barriers in it, and its table of symbolic sizes."""

    graph: Graph
    attributes: Mapping[str, Any]
    barriers: tuple[Barrier, ...]
    fake_mode: _torch.FakeTensorMode | None


@dataclass(frozen=True)
class Traced:
    """A tensor of Dynamo's graph: its fake value, and the node of the new graph that computes it."""

    value: torch.Tensor
    node: Node


@dataclass(frozen=True)
class Opaque:
    """A value of Dynamo's graph that is no tensor and no number (a context, a body), known by its node alone."""

    node: Node


class ReadsDataError(Exception):
    """A call whose operators need the value of a tensor."""


class SeveralOperatorsError(Exception):
    """A call thought to make one operator call made another."""


class Sizes:
    """Nodes of `graph` for symbolic numbers. Sizes come from the graph's inputs, arithmetic is written out where first needed.

    `chosen` are the symbols of sizes that depend on data that a node has, as the number of rows that a mask chooses, each
    with what it is at most.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.chosen: dict[Any, int | None] = {}
        self._known: dict[Any, Node] = {}
        self._inputs: list[tuple[Node, torch.Tensor]] = []
        self._tracer = GraphAppendingTracer(graph)

    def add_chosen(self, node: Node, value: torch.Tensor, most: int | None) -> dict[Any, int]:
        """Learn the sizes of a result that depend on data: each new symbol, with the dimension that it is the size of."""
        found: dict[Any, int] = {}
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and _torch.has_unbacked(size):
                symbol = _torch.expression(size)
                if symbol.is_Symbol and symbol not in self.chosen:
                    found[symbol] = dim
        self.chosen.update(dict.fromkeys(found, most))
        self._inputs += [(node, value)] if found else []
        return found

    def certainly(self, condition: Any) -> bool:
        """Whether a condition only says that as many elements are chosen as there can be."""
        expression = _torch.expression(condition) if isinstance(condition, torch.SymBool) else None
        if not (isinstance(expression, sympy.core.relational.Relational) and expression.lhs in self.chosen):
            return False
        if isinstance(expression, sympy.Ge):
            return bool(expression.rhs.is_Integer and expression.rhs <= 0)
        most = self.chosen[expression.lhs]
        return isinstance(expression, sympy.Le) and most is not None and bool(expression.rhs.is_Integer and expression.rhs >= most)

    def add_input(self, node: Node, value: Any) -> None:
        """Learn the symbol that a placeholder (or a barrier's result) carries, or the sizes of its tensor."""
        if isinstance(value, SYMBOLIC):
            self._known.setdefault(_torch.expression(value), node)
        elif isinstance(value, torch.Tensor):
            self._inputs.append((node, value))

    def node(self, value: Any) -> Any:
        """The node that computes `value`, or a plain number if it is constant."""
        expression = _torch.expression(value)
        if expression.is_number:
            return value.node.maybe_as_int() if isinstance(value, torch.SymInt) else value.node.pytype(expression)
        if expression not in self._known:
            for symbol in expression.free_symbols:
                if symbol not in self._known:
                    self._known[symbol] = self._from_shapes(symbol)
            proxies = {symbol: Proxy(self._known[symbol], self._tracer) for symbol in expression.free_symbols}
            written = _torch.write_expression(expression, proxies)
            if not isinstance(written, Proxy):
                return written
            self._known[expression] = written.node
            written.node.meta["val"] = written.node.meta["example_value"] = value
        return self._known[expression]

    def _from_shapes(self, symbol: Any) -> Node:
        for node, value in self._inputs:
            for op, numbers in ((aten.sym_size.int, value.shape), (aten.sym_stride.int, value.stride())):
                for dim, number in enumerate(numbers):
                    if isinstance(number, torch.SymInt) and _torch.expression(number) == symbol:
                        return self._input_size(op, node, dim, number)
        raise LiftError(f"Expected symbolic sizes to be inputs or sizes of inputs but got symbol={symbol!s}, which is neither.")

    def _input_size(self, op: Any, node: Node, dim: int, number: torch.SymInt) -> Node:
        created = self._graph.call_function(op, (node, dim))
        created.meta["val"] = created.meta["example_value"] = number
        return created


def record(gm: GraphModule, lift_body: LiftBody) -> Recording:
    """The ATen graph of `gm`, which is left as it is. `lift_body` lifts a checkpointed body, or gives None to keep it as it is.

    Raises LiftError for sizes that depend on data (but the number of rows that an operator chose), called modules, and calls that
    cannot be followed.
    """
    return _Recorder(gm, lift_body).run()


@dataclass
class _Call:
    """The call being recorded: which node made it, where its tensors come from, and what it is expected to return."""

    source: Node
    nodes: dict[int, Node] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    example: Any = None
    emitted: list[Node] = field(default_factory=list)
    expected: Any = None
    single: bool = False
    listening: bool = False


class _Recorder:
    def __init__(self, gm: GraphModule, lift_body: LiftBody) -> None:
        self._gm = gm
        self._lift_body = lift_body
        self._graph = Graph(tracer_cls=gm.graph._tracer_cls)
        self._sizes = Sizes(self._graph)
        self._values: dict[Node, Any] = {}
        self._attributes: dict[str, Any] = {}
        self._barriers: list[Barrier] = []
        self._several: set[Any] = set()
        self._functorch_depth = 0
        self._fakes = _torch.fake_mode_of(n.meta.get("example_value") for n in gm.graph.nodes)
        self._listener = _torch.PreDispatchListener(self._on_operator)
        self._call = _Call(next(iter(gm.graph.nodes)))

    def run(self) -> Recording:
        fakes = self._fakes or contextlib.nullcontext()
        with fakes, _torch.without_new_sizes(self._fakes), _torch.restored_modes() as self._carry_out, self._listener:
            for node in self._gm.graph.nodes:
                self._step(node)
        return Recording(graph=self._graph, attributes=self._attributes, barriers=tuple(self._barriers), fake_mode=self._fakes)

    def _step(self, node: Node) -> None:
        example = node.meta.get("example_value")
        if node.op == "placeholder":
            self._refuse_unknown_sizes(node, example)
        if node.op == "placeholder":
            self._placeholder(node, example)
        elif node.op == "get_attr":
            self._attribute(node, example)
        elif node.op == "output":
            created = self._graph.output(self._as_argument(node.args[0]))
            created.meta.update(node.meta)
        elif node.op == "call_module":
            raise LiftError(f"Expected a graph of functions but got node={node.name!r}, a call of module {node.target!r}.")
        else:
            self._values[node] = self._function(node, example)
        self._refuse_unknown_sizes(node, example)

    def _refuse_unknown_sizes(self, node: Node, example: Any) -> None:
        """LiftError if a node's result, or its shape, depends on tensor data, but for how many rows operators chose."""
        if not _torch.unbacked_symbols(_torch.pytree.tree_leaves(example)) <= set(self._sizes.chosen):
            raise LiftError(f"Expected shapes that follow from the inputs' but got node={node.name!r}, whose size depends on data.")

    # inputs ---------------------------------------------------------------------------------------------------------

    def _placeholder(self, node: Node, example: Any) -> None:
        created = self._graph.create_node("placeholder", node.target, node.args, {}, name=node.name, type_expr=node.type)
        created.meta.update(node.meta)
        if example is not None:
            created.meta["val"] = example
        if hasattr(node, "_dynamo_source"):
            created._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
        self._sizes.add_input(created, example)
        if isinstance(example, torch.Tensor):
            self._values[node] = Traced(example, created)
        else:
            self._values[node] = example if isinstance(example, SYMBOLIC) else Opaque(created)

    def _attribute(self, node: Node, example: Any) -> None:
        value = _attribute_of(self._gm, str(node.target))
        created = self._graph.create_node("get_attr", node.target, (), {}, name=node.name, type_expr=node.type)
        created.meta.update(node.meta)
        if not isinstance(value, torch.Tensor):
            self._values[node] = Opaque(created)
            return
        if not isinstance(example, torch.Tensor):
            example = self._fakes.from_tensor(value, static_shapes=True) if self._fakes else value
        created.meta["val"] = created.meta["example_value"] = example
        self._values[node] = Traced(example, created)

    # calls ----------------------------------------------------------------------------------------------------------

    def _function(self, node: Node, example: Any) -> Any:
        target = node.target
        if isinstance(target, _torch.HigherOrderOperator):
            return self._higher_order(node, example)
        nesting = _functorch_nesting(target)
        self._functorch_depth += max(nesting, 0)
        inside = self._functorch_depth > 0
        self._functorch_depth += min(nesting, 0)
        if inside:
            return self._copy(node, example, TRANSFORMS, mutates=True)
        if target in MODE_SWITCHES:
            self._carry_out(node, target, tuple(node.args))
            return self._copy(node, example)
        if _is_copied(node):
            why = TRANSFORMS if "functorch" in str(getattr(target, "__module__", "")) else "a call into autograd itself"
            return self._copy(node, example, why, mutates=True)
        if target is torch.tensor:
            return self._constant(node, example)
        if target is operator.getitem and isinstance(self._values[node.args[0]], (tuple, list)):  # type: ignore[index]
            return self._values[node.args[0]][node.args[1]]  # type: ignore[index]
        if example is not None and not _has_tensor(example) and _is_numbers(example):
            return example
        if any(isinstance(self._values[source], Opaque) for source in node.all_input_nodes):
            return self._copy(node, example, "a call on a value that is no tensor", mutates=True)
        return self._record_call(node, example)

    def _constant(self, node: Node, example: Any) -> Any:
        data = node.args[0]
        if not isinstance(data, (bool, int, float)) or node.kwargs.get("requires_grad") or example is None:
            return self._copy(node, example)
        created = self._graph.call_function(aten.full.default, ([], data), {"dtype": example.dtype, "device": example.device})
        self._describe(created, node, example)
        return Traced(example, created)

    def _higher_order(self, node: Node, example: Any) -> Any:
        name = str(node.target)
        why = f"{name} is kept whole"
        mutates = _writes_by_name(node)
        for key in (str(source.target) for source in node.all_input_nodes if source.op == "get_attr"):
            body = _attribute_of(self._gm, key)
            if not isinstance(body, GraphModule):
                continue
            lifted = self._attributes.get(key) or (self._lift_body(body) if name in LIFTED_BODIES else None)
            if lifted is not None:
                self._attributes[key] = lifted
                why = f"{name} is kept whole, its body is lifted by itself"
            mutates = mutates or (lifted is None and _writes(body))
        return self._copy(node, example, why, mutates=mutates)

    def _copy(self, node: Node, example: Any, why: str = "", mutates: bool = False) -> Any:
        """The node as it stands, on the new graph's values; a barrier if `why` is given."""
        args, kwargs = self._as_argument(node.args), self._as_argument(node.kwargs)
        created = self._graph.create_node(node.op, node.target, args, kwargs, name=node.name, type_expr=node.type)
        created.meta.update(node.meta)
        if why:
            run = not isinstance(node.target, _torch.HigherOrderOperator)
            self._barriers.append(Barrier(node=created, why=why, mutates=mutates, run=run))
        if example is None:
            return Opaque(created)
        created.meta["val"] = example
        return self._unpack(created, example, node)

    def _unpack(self, created: Node, example: Any, source: Node) -> Any:
        """The value of a node with result `example`, with one getitem for each part."""
        if isinstance(example, torch.Tensor):
            return Traced(example, created)
        if isinstance(example, SYMBOLIC):
            self._sizes.add_input(created, example)
            return example
        if not isinstance(example, (tuple, list)):
            return example if isinstance(example, PLAIN) and example is not None else Opaque(created)
        return tuple(self._unpack(self._part(created, index, part, source), part, source) for index, part in enumerate(example))

    def _part(self, created: Node, index: int, part: Any, source: Node) -> Node:
        getitem = self._graph.call_function(operator.getitem, (created, index))
        self._describe(getitem, source, part)
        self._call.emitted.append(getitem)
        return getitem

    # recording ------------------------------------------------------------------------------------------------------

    def _record_call(self, node: Node, example: Any) -> Any:
        target = getattr(torch.Tensor, str(node.target), None) if node.op == "call_method" else node.target
        if target is None:
            raise LiftError(f"Expected a method of a tensor but got node={node.name!r}, a call of {node.target!r}.")
        self._call = _Call(node, example=example)
        args, kwargs = self._as_value(node.args), self._as_value(node.kwargs)
        try:
            return self._followed(node, target, args, kwargs, example)
        except ReadsDataError:
            self._undo()
            return self._copy(node, example, "a call that reads a tensor's value", mutates=_writes_by_name(node))

    def _followed(self, node: Node, target: Any, args: Any, kwargs: Any, example: Any) -> Any:
        result: Any = None
        single = example is not None and target not in self._several and target is not operator.getitem
        if single:
            single, result = self._try_single(target, args, kwargs, example)
        if not single:
            result = self._listened(target, args, kwargs)
        if not self._call.emitted:
            return self._unseen(node, example, result)
        return self._matched(result, result if example is None else example)

    def _try_single(self, target: Any, args: Any, kwargs: Any, example: Any) -> tuple[bool, Any]:
        """Call `target` on the supposition that it is one operator whose result is Dynamo's; undo it if it is not."""
        self._call.expected, self._call.single = example, True
        try:
            result = self._listened(target, args, kwargs)
            if _same(result, example) or self._is_factory_call(result):
                return True, result
        except SeveralOperatorsError:
            pass
        self._several.add(target)
        self._undo()
        nodes, alive = self._call.nodes, self._call.alive
        self._call = _Call(self._call.source, nodes=nodes, alive=alive, example=example)
        return False, None

    def _undo(self) -> None:
        for created in reversed(self._call.emitted):
            self._graph.erase_node(created)

    def _listened(self, target: Any, args: Any, kwargs: Any) -> Any:
        self._call.listening = True
        try:
            return target(*args, **kwargs)
        finally:
            self._call.listening = False

    def _is_factory_call(self, result: Any) -> bool:
        """Whether the call made a tensor from nothing. Python's factories hand back a copy of what the operator gave them."""
        emitted = self._call.emitted
        return isinstance(result, torch.Tensor) and len(emitted) == 1 and "Tensor" not in str(emitted[0].target._schema.arguments)

    def _unseen(self, node: Node, example: Any, result: Any) -> Any:
        """A call that made no operator call: a check that held, or something that must be kept."""
        if result is None and example is None and not node.users:
            return None
        returns_argument = isinstance(result, torch.Tensor) and id(result) in self._call.nodes
        if returns_argument and not str(node.target).endswith("_"):
            return Traced(result, self._call.nodes[id(result)])
        return self._copy(node, example, "a call that the dispatcher does not see", mutates=True)

    def _matched(self, result: Any, example: Any) -> Any:
        """Values for a recorded result, with Dynamo's fakes in place of ours so that what aliases in Dynamo aliases here."""
        if isinstance(result, torch.Tensor):
            created = self._origin(result)
            if isinstance(example, torch.Tensor) and example is not result:
                created.meta["val"] = created.meta["example_value"] = example
                return Traced(example, created)
            return Traced(result, created)
        if isinstance(result, (tuple, list)) and not isinstance(result, torch.Size):
            return tuple(self._matched(part, other) for part, other in zip(result, example, strict=True))
        return example

    def _on_operator(self, func: _torch.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._call.listening:
            return func(*args, **kwargs)
        if func is aten._assert_tensor_metadata.default:
            return None
        if func is aten._assert_scalar.default and self._sizes.certainly(args[0]):
            return None
        if func in (aten.item.default, aten._local_scalar_dense.default):
            if getattr(args[0], "constant", None) is not None:
                return func(*args)
            raise ReadsDataError
        if _is_spelling(func) or func in WRITTEN_OUT:
            with self._listener.resumed():
                return func.decompose(*args, **kwargs)
        if not _returns_tensor(func) and func._schema.returns:
            return func(*args, **kwargs)
        created = self._graph.call_function(func, self._argument(args), self._argument(kwargs))
        self._call.emitted.append(created)
        result = self._result_of(func, args, kwargs)
        self._bind(created, result)
        if torch.Tag.dynamic_output_shape in func.tags and isinstance(result, torch.Tensor):
            _torch.bind_sizes(created, self._sizes.add_chosen(created, result, _most(_masks(func, args))))
        return result

    def _result_of(self, func: _torch.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func._schema.is_mutable:
            return self._written(func, args, kwargs)
        if not self._call.single:
            with self._choosing_as_before(func, args):
                return func(*args, **kwargs)
        if len(self._call.emitted) > 1:
            raise SeveralOperatorsError
        return _shaped(func, self._call.expected)

    def _choosing_as_before(self, func: _torch.OpOverload, args: Any) -> contextlib.AbstractContextManager[None]:
        """Where an operator chooses by a mask, it is to find as many as Dynamo's result says."""
        if torch.Tag.dynamic_output_shape not in func.tags:
            return contextlib.nullcontext()
        given = _torch.pytree.tree_leaves(args)
        own = _torch.unbacked_symbols(given)
        found = {
            _torch.expression(size): size
            for leaf in _torch.pytree.tree_leaves(self._call.example)
            for size in (leaf.shape if isinstance(leaf, torch.Tensor) else ())
            if isinstance(size, torch.SymInt) and _torch.expression(size) not in own and _torch.has_unbacked(size)
        }
        return _torch.choosing(_masks(func, args), next(iter(found.values()))) if len(found) == 1 else contextlib.nullcontext()

    def _written(self, func: _torch.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an in-place operator returns. It is not run: Dynamo's fake values must stay as they are."""
        if torch.Tag.inplace_view in func.tags or func._schema.name in ("aten::set_", "aten::resize_", "aten::resize_as_"):
            what = f"{self._call.source.name!r}, which changes one by {func}"
            raise LiftError(f"Expected tensors to keep their shapes but got {what}.")
        returned = func._schema.returns
        if not returned:
            return None
        if all(r.alias_info is not None for r in returned):
            written = [value for value, schema in _bound(func, args, kwargs) if schema.alias_info and schema.alias_info.is_write]
            if len(written) == len(returned):
                return written[0] if len(returned) == 1 else tuple(written)
        if self._call.single and len(self._call.emitted) == 1:
            return _shaped(func, self._call.expected)
        raise LiftError(f"Expected an in-place operator that returns what it wrote but got {func} in {self._call.source.name!r}.")

    def _bind(self, created: Node, result: Any) -> None:
        self._describe(created, self._call.source, result)
        if isinstance(result, torch.Tensor):
            self._know(result, created)
        elif isinstance(result, (tuple, list)):
            for index, part in enumerate(result):
                if isinstance(part, torch.Tensor):
                    self._know(part, self._part(created, index, part, self._call.source))

    def _know(self, value: torch.Tensor, node: Node) -> None:
        self._call.nodes[id(value)] = node
        self._call.alive.append(value)

    def _describe(self, created: Node, source: Node, value: Any) -> None:
        created.meta.update(source.meta)
        created.meta.pop(_torch.BINDINGS, None)
        if value is None:
            created.meta.pop("example_value", None)
        else:
            created.meta["val"] = created.meta["example_value"] = value

    # arguments ------------------------------------------------------------------------------------------------------

    def _as_value(self, argument: Any) -> Any:
        """Dynamo's argument as what the call takes: fake tensors and numbers. Notes which node each tensor is."""
        if isinstance(argument, Node):
            return self._as_value_of(self._values[argument])
        if isinstance(argument, (tuple, list)):
            return _rebuilt(argument, [self._as_value(part) for part in argument])
        if isinstance(argument, dict):
            return {key: self._as_value(part) for key, part in argument.items()}
        if isinstance(argument, slice):
            return slice(*(self._as_value(part) for part in (argument.start, argument.stop, argument.step)))
        return argument

    def _as_value_of(self, value: Any) -> Any:
        if isinstance(value, Traced):
            self._know(value.value, value.node)
            return value.value
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            return type(value)(self._as_value_of(part) for part in value) if type(value) in (tuple, list) else value
        return value

    def _argument(self, value: Any) -> Any:
        """An operator's argument as FX writes it."""
        if isinstance(value, torch.Tensor):
            return self._origin(value)
        if isinstance(value, SYMBOLIC):
            return self._sizes.node(value)
        if isinstance(value, (tuple, list)):
            return _rebuilt(value, [self._argument(part) for part in value])
        if isinstance(value, dict):
            return {key: self._argument(part) for key, part in value.items()}
        if isinstance(value, PLAIN):
            return value
        raise LiftError(f"Expected an argument that a graph can hold but got {type(value).__name__} in {self._call.source.name!r}.")

    def _origin(self, value: torch.Tensor) -> Node:
        """The node that computes a tensor of the present call. Python's factories hand on shallow copies of operators' results."""
        node = self._call.nodes.get(id(value))
        if node is None and isinstance(value, _torch.FakeTensor):
            key = _torch.storage_key(value)
            node = next((n for n in reversed(self._call.emitted) if _is_shallow_copy(value, n.meta.get("val"), key)), None)
        if node is None and not isinstance(value, _torch.FakeTensor) and value.dim() == 0:
            node = self._scalar(value)
        if node is None:
            raise LiftError(f"Expected tensors of the graph but got one of unknown origin in {self._call.source.name!r}.")
        self._know(value, node)
        return node

    def _scalar(self, value: torch.Tensor) -> Node:
        """A number that Python's indexing made a tensor of."""
        options = {"dtype": value.dtype, "device": value.device}
        with _torch.without_fake_mode():
            number = value.item()
        created = self._graph.call_function(aten.full.default, ([], number), options)
        self._describe(created, self._call.source, aten.full.default([], number, **options))
        return created

    def _as_argument(self, argument: Any) -> Any:
        """Dynamo's argument as an argument of a node that is copied."""
        if isinstance(argument, Node):
            return self._node_of(self._values[argument])
        if isinstance(argument, (tuple, list)):
            return _rebuilt(argument, [self._as_argument(part) for part in argument])
        if isinstance(argument, dict):
            return {key: self._as_argument(part) for key, part in argument.items()}
        if isinstance(argument, slice):
            return slice(*(self._as_argument(part) for part in (argument.start, argument.stop, argument.step)))
        return argument

    def _node_of(self, value: Any) -> Any:
        if isinstance(value, (Traced, Opaque)):
            return value.node
        if isinstance(value, SYMBOLIC):
            return self._sizes.node(value)
        if isinstance(value, (tuple, list)):
            return tuple(self._node_of(part) for part in value)
        return value


def _masks(func: _torch.OpOverload, args: Any) -> list[_torch.FakeTensor]:
    """The tensors whose elements that are not zero an operator chooses."""
    tensors = [x for x in _torch.pytree.tree_leaves(args) if isinstance(x, _torch.FakeTensor)]
    return [x for x in tensors if x.dtype is torch.bool or func is aten.nonzero.default]


def _most(masks: Sequence[torch.Tensor]) -> int | None:
    """How many elements a mask can choose."""
    sizes = [mask.numel() for mask in masks]
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], int) else None


def _attribute_of(gm: GraphModule, path: str) -> Any:
    value: Any = gm
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _functorch_nesting(target: Any) -> int:
    name = getattr(target, "__name__", "")
    if name.endswith(("increment_nesting", "enter_dual_level")):
        return 1
    return -1 if name.endswith(("decrement_nesting", "exit_dual_level")) else 0


def _is_copied(node: Node) -> bool:
    if node.op == "call_method":
        return node.target in COPIED_METHODS
    module = f"{getattr(node.target, '__module__', None)}."
    return module.startswith(COPIED_MODULES)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    return isinstance(value, (tuple, list)) and any(_has_tensor(part) for part in value)


def _is_numbers(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_numbers(part) for part in value)
    return isinstance(value, (*PLAIN, *SYMBOLIC))


def _writes(body: GraphModule) -> bool:
    """Whether a body that Dynamo traced may write in place: by name, for it was not run."""
    calls = (node for node in body.graph.nodes if node.op in ("call_function", "call_method"))
    return any(_writes_by_name(node) for node in calls) or any(_writes(c) for c in body.children() if isinstance(c, GraphModule))


def _writes_by_name(node: Node) -> bool:
    """Whether a call is written as one that works in place."""
    name = getattr(node.target, "__name__", str(node.target))
    if isinstance(node.target, _torch.HigherOrderOperator):
        return "mutation" in name
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or node.target in AUGMENTED or "out" in node.kwargs or bool(node.kwargs.get("inplace"))


_SPELLINGS: dict[Any, bool] = {}


def _is_spelling(func: _torch.OpOverload) -> bool:
    """Whether an operator is a way to write other views (`chunk`, `T`, `expand_as`): its definition is recorded instead."""
    if func not in _SPELLINGS:
        aliases = any(argument.alias_info is not None for argument in func._schema.arguments)
        _SPELLINGS[func] = aliases and not func._schema.is_mutable and func not in WHOLE and _torch.is_composite(func)
    return _SPELLINGS[func]


def _returns_tensor(func: _torch.OpOverload) -> bool:
    return any("Tensor" in str(returned.type) for returned in func._schema.returns)


def _bound(func: _torch.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The operator's arguments that were given, each with its schema."""
    for index, schema in enumerate(func._schema.arguments):
        if index < len(args):
            yield args[index], schema
        elif schema.name in kwargs:
            yield kwargs[schema.name], schema


def _shaped(func: _torch.OpOverload, expected: Any) -> Any:
    """Dynamo's result in the form in which `func` returns it, or SeveralOperatorsError if it cannot be its result."""
    returned = func._schema.returns
    if len(returned) > 1:
        if not isinstance(expected, tuple) or len(expected) != len(returned):
            raise SeveralOperatorsError
        return tuple(expected)
    is_list = str(returned[0].type).startswith("List") if returned else False
    if is_list and isinstance(expected, (tuple, list)):
        return list(expected)
    if not is_list and isinstance(expected, torch.Tensor):
        return expected
    raise SeveralOperatorsError


def _is_shallow_copy(value: torch.Tensor, other: Any, key: int) -> bool:
    return isinstance(other, torch.Tensor) and _torch.storage_key(other) == key and other.shape == value.shape


def _same(result: Any, example: Any) -> bool:
    if isinstance(result, torch.Tensor):
        return result is example
    if isinstance(result, (tuple, list)) and isinstance(example, (tuple, list)):
        return len(result) == len(example) and all(_same(part, other) for part, other in zip(result, example, strict=True))
    return False


def _rebuilt(original: tuple[Any, ...] | list[Any], parts: list[Any]) -> Any:
    return parts if isinstance(original, list) else tuple(parts)
