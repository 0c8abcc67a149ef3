"""Lifting: the ATen graph means what Dynamo's graph meant, in results, gradients, written inputs, modes and random numbers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from effcompile.errors import LiftError
from effcompile.trace import Lifted, lift, mode_regions, requires_grad

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Lifting:
    """A backend that lifts and compiles what it lifted. Keeps each lifted graph and Dynamo's graph."""

    def __init__(self, compiler: Callable[..., Any] = aot_eager) -> None:
        self.lifted: list[Lifted] = []
        self.sources: list[GraphModule] = []
        self._compiler = compiler

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Any:
        before = gm.print_readable(print_output=False)
        lifted = lift(gm, example_inputs)
        assert gm.print_readable(print_output=False) == before
        lifted.graph_module.graph.lint()
        assert_functional(lifted)
        self.lifted.append(lifted)
        self.sources.append(gm)
        return self._compiler(lifted.graph_module, example_inputs)

    @property
    def only(self) -> Lifted:
        (lifted,) = self.lifted
        return lifted

    def targets(self) -> list[Any]:
        return [node.target for node in self.only.graph_module.graph.nodes if node.op == "call_function"]


def inductor(graph_module: GraphModule, example_inputs: list[Any]) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, example_inputs)


# Inductor's C++ compiler takes seconds a graph.
COMPILERS = [pytest.param(aot_eager, id="aot_eager"), pytest.param(inductor, id="inductor", marks=pytest.mark.slow)]


def assert_functional(lifted: Lifted) -> None:
    """The one writes are copies to inputs, in a block before the output, or a barrier's."""
    nodes = [n for n in lifted.graph_module.graph.nodes if n not in lifted.opaque]
    writes = [n for n in nodes if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable]
    assert all(n.target is aten.copy_.default and n.args[0].op in ("placeholder", "get_attr") for n in writes)
    for node in nodes:
        assert node.op in ("placeholder", "output", "get_attr", "call_function"), node.format_node()


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def assert_same_as_eager(
    function: Callable[..., Any],
    *inputs: Any,
    compiler: Callable[..., Any] = aot_eager,
    dynamic: bool | None = False,
    exact: bool = True,
    reference: Any = None,
) -> Lifting:
    """Outputs, gradients, and what was written to inputs and buffers: as in eager, or as by the backend `reference`."""
    backend = Lifting(compiler)
    module = function if isinstance(function, nn.Module) else None
    results = []
    for compiled in (False, True):
        target = copy.deepcopy(module) if module is not None else function
        ours = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs]
        chosen = backend if compiled else reference
        call = torch.compile(target, backend=chosen, fullgraph=True, dynamic=dynamic) if chosen else target
        torch.manual_seed(3)
        outputs = tensors(call(*ours))
        loss = [o.float().sin().sum() for o in outputs if o.requires_grad]
        if loss:
            torch.stack(loss).sum().backward()
        state = list(target.state_dict().values()) if isinstance(target, nn.Module) else []
        leaves = tensors(ours) + (list(target.parameters()) if isinstance(target, nn.Module) else [])
        results.append((outputs, tensors(ours), state, [leaf.grad for leaf in leaves]))
    for expected, actual in zip(*results, strict=True):
        assert len(expected) == len(actual)
        for left, right in zip(expected, actual, strict=True):
            assert (left is None) == (right is None)
            if left is not None:
                assert left.dtype == right.dtype and left.shape == right.shape and left.requires_grad == right.requires_grad
                torch.testing.assert_close(right, left, **({"rtol": 0, "atol": 0} if exact else {}))
    return backend


def assert_refused(function: Callable[..., Any], *inputs: Any, why: str, dynamic: bool | None = False) -> None:
    """Lifting refuses with a reason that contains `why`, and what Dynamo traced still runs."""
    refusals: list[LiftError] = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        with pytest.raises(LiftError) as caught:
            lift(gm, example_inputs)
        refusals.append(caught.value)
        return aot_eager(gm, example_inputs)

    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    (refusal,) = refusals
    assert why in str(refusal) and "\n" not in str(refusal) and str(refusal).endswith((".", ")"))


def x(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(grad)


# Results and gradients ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("scale", torch.tensor(0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        mask = torch.arange(x.shape[1])[:, None] < torch.arange(x.shape[1])
        return torch.matmul(scores.masked_fill(mask, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("compiler", [aot_eager, inductor], ids=["aot_eager", "inductor"])
def test_attention_keeps_its_operators_whole(compiler: Callable[..., Any]) -> None:
    backend = assert_same_as_eager(Attention(), x(2, 5, 16, grad=True), compiler=compiler, exact=compiler is aot_eager)
    assert backend.targets().count(aten.matmul.default) == 2
    assert {aten.softmax.int, aten.linear.default, aten.layer_norm.default} <= set(backend.targets())
    assert backend.only.barriers == ()


FUNCTIONS = {
    "einsum": lambda a: torch.einsum("bij,bkj->bik", a, a * 2),
    "split": lambda a: [part * 2 for part in a.split(2, dim=1)],
    "chunk_and_views": lambda a: [part.flatten(1).mT.movedim(0, 1).unflatten(1, (4, -1)) for part in a.chunk(2, dim=2)],
    "topk": lambda a: a.topk(2, dim=-1),
    "named_tuple": lambda a: a.max(dim=1).values + a.min(dim=1)[0],
    "advanced_indexing": lambda a: a[:, torch.tensor([1, 0]), None, ..., ::2],
    "boolean_where": lambda a: torch.where(a > 0, a, torch.tensor(-1.0)) + torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "one_hot": lambda a: F.one_hot(a.argmax(-1), 4) * a,
    "casts": lambda a: (a.to(torch.float16).float() + a.type_as(a) + a.double()).to(a.dtype),
    "sdpa": lambda a: F.scaled_dot_product_attention(a, a, a, is_causal=True),
    "cumsum_flip_roll": lambda a: a.cumsum(1).flip(0).roll(1, 2),
    "stack_cat": lambda a: torch.cat([torch.stack([a, a * 2]).sum(0), a], dim=-1),
    "factories": lambda a: a + torch.arange(4) + torch.zeros(4) + a.new_ones(4) + torch.full((4,), 2.0) + torch.eye(4),
    "identities": lambda a: F.dropout(a, 0.5, training=False).contiguous().to(a.dtype).expand_as(a) * 2,
    "detach_and_data": lambda a: a * a.detach() + a.data,
    "norms": lambda a: F.rms_norm(a, (4,)) + F.group_norm(a, 2) + F.normalize(a, dim=-1),
    "python_function_of_many_operators": lambda a: torch.cdist(a, a) + torch.logsumexp(a, -1, keepdim=True),
    "multi_head": lambda a: F.multi_head_attention_forward(
        a, a, a, 4, 2, torch.ones(12, 4), torch.ones(12), None, None, False, 0.0, torch.eye(4), torch.zeros(4)
    )[0],
    "tensor_argument": lambda a: torch.tensor([[1.0, 2.0, 3.0, 4.0]]) @ a[0],
    "unused_result": lambda a: (a * 2, a.sum())[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str) -> None:
    assert_same_as_eager(FUNCTIONS[name], x(3, 4, 4, grad=True))


def test_unused_operators_are_dropped() -> None:
    def function(a: torch.Tensor) -> torch.Tensor:
        torch.matmul(a, a)
        return a * 2

    assert assert_same_as_eager(function, x(3, 3, grad=True)).targets() == [aten.mul.Tensor]


# In-place operators ---------------------------------------------------------------------------------------------------


def relu_in_place(a: torch.Tensor) -> torch.Tensor:
    return F.relu(a * 2, inplace=True) + 1


def rows(a: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(4, 3)
    for i in range(4):
        out[i] = a[i] * 2 + (out[i - 1] if i else 0.0)
    return out


def through_views(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    b = a * 1
    view = b.view(2, 2, 3).transpose(0, 1)
    view[0].mul_(2)
    b[1:3, ::2] = 7.0
    view.unsqueeze(-1).squeeze(-1).permute(2, 0, 1)[1].add_(a[:2, :2])
    return b, view * 1


def through_splits(a: torch.Tensor) -> torch.Tensor:
    b = a * 1
    first, second = b.split([1, 3])
    second.add_(first)
    b.unbind(1)[2].zero_()
    b.chunk(2, dim=0)[1].diagonal().fill_(5.0)
    return b + second.sum()


def accumulated(a: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(4, 3)
    out += a
    out[1] -= a[0]
    out.index_add_(0, torch.tensor([0, 0]), a[:2])
    out.masked_fill_(a > 1, 0.5).index_put_((torch.tensor([0]), torch.tensor([1])), a[0, 0])
    out.scatter_(1, torch.zeros(4, 1, dtype=torch.long), a[:, :1])
    return out.clamp_(min=-1.0)


def cast_by_copy(a: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(4, 3, dtype=torch.float64)
    out.copy_(a[0])
    out[2] = a[1].half()
    return out


def kept_apart(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    b = a * 2
    out = torch.empty_like(b)
    out.copy_(b)
    b.add_(1)
    return b, out


IN_PLACE = (relu_in_place, rows, through_views, through_splits, accumulated, cast_by_copy, kept_apart)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: f.__name__)
def test_in_place(function: Callable[..., Any], compiler: Callable[..., Any]) -> None:
    if compiler is inductor and function not in (rows, through_views):
        pytest.skip("two through Inductor are enough")
    inputs = x(4, 3, grad=function is not through_splits)  # autograd forbids writes to one of several views
    assert_same_as_eager(function, inputs, compiler=compiler, exact=compiler is aot_eager)


def test_copies_do_not_alias_what_was_copied() -> None:
    def function(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        b = a * 2
        return b, torch.empty_like(b).copy_(b)

    with torch.no_grad():
        b, c = torch.compile(function, backend=Lifting(), fullgraph=True)(x(3))
    b.zero_()
    assert c.abs().sum() > 0


# Written inputs -------------------------------------------------------------------------------------------------------


def static_cache(cache: torch.Tensor, new: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    cache.index_copy_(1, at, new)
    return cache.sum(1) * 2


def returns_written(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a.mul_(2)
    return a, a[1:]


def reads_between(a: torch.Tensor) -> torch.Tensor:
    before = a * 3
    a.add_(1)
    after = a * 3
    a[0] = 9.0
    return before + after + a


def writes_two(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a.copy_(b)
    b.add_(a)
    return a - b


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (static_cache, lambda: (x(2, 5, 3), x(2, 1, 3), torch.tensor([2]))),
        (returns_written, lambda: (x(3, 4),)),
        (reads_between, lambda: (x(3, 4),)),
        (writes_two, lambda: (x(3, 4), x(3, 4))),
    ],
    ids=["static_cache", "returns_written", "reads_between", "writes_two"],
)
def test_written_inputs(function: Any, inputs: Any, compiler: Callable[..., Any], grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        backend = assert_same_as_eager(function, *inputs(), compiler=compiler, exact=compiler is aot_eager)
    written = [node for node in backend.only.graph_module.graph.nodes if node.target is aten.copy_.default]
    assert len(written) == (2 if function is writes_two else 1)
    assert all(node.args[0].op == "placeholder" for node in written)


def test_written_input_through_inductor() -> None:
    with torch.no_grad():
        assert_same_as_eager(static_cache, x(2, 5, 3), x(2, 1, 3), torch.tensor([2]), compiler=inductor, exact=False)


def test_written_input_that_is_a_view() -> None:
    base, expected = x(4, 6), x(4, 6)
    torch.compile(reads_between, backend=Lifting(), fullgraph=True)(base[1:3, ::2])
    reads_between(expected[1:3, ::2])
    assert torch.equal(base, expected)


def test_gradient_written_into_an_input() -> None:
    def function(cache: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        cache[1] = new * 2
        return cache.sin()

    assert_same_as_eager(function, x(3, 4), x(4, grad=True))


def test_written_input_that_requires_grad_but_is_no_leaf() -> None:
    gradients = []
    for compiled in (False, True):
        leaf = x(3, 4, grad=True)
        middle = leaf * 2
        call = torch.compile(reads_between, backend=Lifting(), fullgraph=True) if compiled else reads_between
        (call(middle).sum() + middle.sin().sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_written_input_is_returned_as_itself() -> None:
    a = x(3, 4)
    with torch.no_grad():
        whole, part = torch.compile(returns_written, backend=Lifting(), fullgraph=True)(a)
    assert whole.data_ptr() == a.data_ptr() and part._base is not None and part.data_ptr() == a[1:].data_ptr()


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        with torch.no_grad():
            self.average.lerp_(x.mean((0, 2, 3)), 0.1)
        return self.instance(self.norm(x)) + self.average[:, None, None]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_running_statistics(training: bool, compiler: Callable[..., Any]) -> None:
    assert_same_as_eager(Normalised().train(training), x(2, 3, 4, 4, grad=True), compiler=compiler, exact=compiler is aot_eager)


def unsqueezes(a: torch.Tensor) -> torch.Tensor:
    return (a * 1).unsqueeze_(0) * 2


def transposes(a: torch.Tensor) -> torch.Tensor:
    return (a * 1).t_() + 1


def writes_detached(a: torch.Tensor) -> torch.Tensor:
    b = a * 2
    b.detach().mul_(3)
    return b * b


def writes_without_grad(a: torch.Tensor) -> torch.Tensor:
    b = a * 2
    with torch.no_grad():
        b.mul_(3)
    return b * b


def writes_expanded(a: torch.Tensor) -> torch.Tensor:
    b = a.new_zeros(1, 3)
    b.expand(1, 3).add_(1.0)
    b.as_strided((3,), (1,)).add_(1.0)
    return b + a


@pytest.mark.parametrize(
    ("function", "input_", "why"),
    [
        (unsqueezes, x(3, 3), "keep their shapes"),
        (transposes, x(3, 3), "keep their shapes"),
        (writes_detached, x(3, 3, grad=True), "seen by autograd"),
        (writes_without_grad, x(3, 3, grad=True), "seen by autograd"),
        (writes_expanded, x(3, 3), "through slices and permutations"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refused_writes(function: Any, input_: torch.Tensor, why: str) -> None:
    assert_refused(function, input_, why=why)


def test_refused_where_two_inputs_overlap() -> None:
    base = x(6)
    assert_refused(writes_two, base[:4], base[2:], why="do not overlap")


# Attributes -----------------------------------------------------------------------------------------------------------


def test_attributes_stay_attributes() -> None:
    constant, inner = torch.arange(3.0), Attention()
    graph = torch.fx.Graph()
    a = graph.placeholder("a")
    product = graph.call_function(torch.mul, (a, graph.get_attr("constant")))
    graph.output((graph.call_function(F.linear, (product, graph.get_attr("inner.weight"))),))
    root = nn.Module()
    root.constant = nn.Buffer(constant)
    root.inner = nn.Linear(3, 2, bias=False)
    gm = GraphModule(root, graph)
    with torch._subclasses.FakeTensorMode() as mode:
        a.meta["example_value"] = mode.from_tensor(x(2, 3))
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.meta["example_value"] = mode.from_tensor(x(2, 3))
    lifted = lift(gm).graph_module
    assert {node.target for node in lifted.graph.nodes if node.op == "get_attr"} == {"constant", "inner.weight"}
    assert lifted.inner.weight is gm.inner.weight and lifted.constant is gm.constant
    torch.testing.assert_close(lifted(x(2, 3)), gm(x(2, 3)))
    assert inner is not None


def test_called_module_is_refused() -> None:
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(LiftError, match="a call of module '0'"):
        lift(gm)


# Modes ----------------------------------------------------------------------------------------------------------------


def autocast_inside(a: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        b = torch.matmul(a, a)
        with torch.autocast("cpu", enabled=False):
            c = torch.matmul(a, b.float())
        b.mul_(2)
        return torch.matmul(b, c) + a.softmax(-1)


def no_grad_inside(a: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        b = a.exp()
        with torch.enable_grad():
            c = a * 2
        d = a.sin()
    return a * b + c + d


def inference_inside(a: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        b = a * 2
        c = b.sum()
    return a + 1 if c.shape == () else b


def modes_inside(a: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        b = F.multi_head_attention_forward(
            a, a, a, 4, 2, torch.ones(12, 4), torch.ones(12), None, None, False, 0.0, torch.eye(4), torch.zeros(4)
        )[0]
    return a + b


@pytest.mark.parametrize("function", [autocast_inside, no_grad_inside, inference_inside, modes_inside], ids=lambda f: f.__name__)
def test_modes_inside(function: Callable[..., Any]) -> None:
    # autograd adds bfloat16 gradients up in another order than the compiler, lifted or not
    backend = assert_same_as_eager(function, x(4, 4, 4, grad=True), reference=None if function is no_grad_inside else "aot_eager")
    assert aten._assert_tensor_metadata.default not in backend.targets()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_ambient_autocast(compiler: Callable[..., Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        backend = assert_same_as_eager(Attention(), x(2, 5, 16, grad=True), compiler=compiler, exact=False)
        linear = next(n for n in backend.only.graph_module.graph.nodes if n.target is aten.linear.default)
    assert linear.meta["val"].dtype == torch.bfloat16 and linear.args[0].meta["val"].dtype == torch.float32


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_ambient_modes(context: Callable[..., Any]) -> None:
    inputs = x(2, 5, 16, grad=True)
    with context():
        backend = assert_same_as_eager(Attention(), inputs)
        assert requires_grad(backend.only.graph_module, grad=False) <= set(backend.only.graph_module.graph.nodes)


def test_autocast_with_a_cast_in_place_is_refused() -> None:
    def function(a: torch.Tensor) -> torch.Tensor:
        b = a.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            b.pow_(2)
        return b

    assert_refused(function, x(3), why="under autocast")


def test_modes_are_restored_after_a_refusal() -> None:
    def function(a: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return (a * 1).unsqueeze_(0) * 2

    assert_refused(function, x(3), why="keep their shapes")
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch) is False


def test_mode_regions() -> None:
    backend = assert_same_as_eager(no_grad_inside, x(4, 4, grad=True))
    graph = backend.only.graph_module.graph
    number = mode_regions(graph)
    exp, sin, double, last = (
        next(n for n in graph.nodes if n.target is target and (target is not aten.mul.Tensor or 2 in n.args))
        for target in (aten.exp.default, aten.sin.default, aten.mul.Tensor, aten.add.Tensor)
    )
    assert number[exp] == number[sin] != number[double] == number[last]
    parted = mode_regions(graph, mutating=frozenset({exp}))
    assert parted[exp] != parted[sin]


def test_requires_grad() -> None:
    def function(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            cut, view = a.exp(), a.view(-1)
        return a * b, b.sin(), a.detach() + b, a.argmax(), cut, view, c @ a, a.topk(2).values, a > 0, cut + b

    backend = Lifting()
    inputs = (x(3, 3, grad=True), x(3, 3), x(3, 3, grad=True))
    expected = [tensor.requires_grad for tensor in torch.compile(function, backend=backend, fullgraph=True)(*inputs)]
    module = backend.only.graph_module
    requiring = requires_grad(module)
    outputs = module.graph.output_node().args[0]
    assert [node in requiring for node in outputs] == expected == [tensor.requires_grad for tensor in function(*inputs)]


def test_nothing_requires_grad_where_grad_mode_is_off() -> None:
    backend = assert_same_as_eager(Attention(), x(2, 5, 16, grad=True))
    module = backend.only.graph_module
    assert module.graph.output_node().args[0][0] in requires_grad(module)
    views = {aten.view.default, aten.permute.default, aten.unbind.int, aten.transpose.int}
    computed = {n for n in requires_grad(module, grad=False) if n.op == "call_function"}
    assert {n.target for n in computed} <= views


# Higher-order operators -----------------------------------------------------------------------------------------------


def targets_named(module: GraphModule, name: str) -> list[Node]:
    return [node for node in module.graph.nodes if name in str(node.target)]


def checkpointed(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    from torch.utils.checkpoint import checkpoint

    def block(y: torch.Tensor) -> torch.Tensor:
        z = torch.zeros_like(y)
        z[0] = y[0]
        return F.dropout(torch.matmul(y, w).softmax(-1), 0.5) + z

    return checkpoint(block, checkpoint(block, a.sin(), use_reentrant=False), use_reentrant=False) * 2


def test_checkpoint_is_kept_and_its_body_lifted() -> None:
    backend = assert_same_as_eager(checkpointed, x(4, 4, grad=True), x(4, 4, grad=True))
    module = backend.only.graph_module
    assert len(targets_named(module, "tag_activation_checkpoint")) == 2 and len(backend.only.barriers) == 2
    body = module.get_submodule(str(targets_named(module, "wrap_body")[0].target))
    assert aten.softmax.int in {node.target for node in body.graph.nodes}
    source = backend.sources[0].get_submodule(str(targets_named(module, "wrap_body")[0].target))
    assert aten.softmax.int not in {node.target for node in source.graph.nodes}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        return a * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 100  # not the derivative: tracing through the forward would show


def test_autograd_function_keeps_its_backward() -> None:
    backend = assert_same_as_eager(lambda a: Doubled.apply(a.sin()).cos(), x(3, grad=True))
    assert any("autograd_function_apply" in why for _, why in backend.only.barriers)


def flex(a: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q = a * 2
    return flex_attention(q, a, a, score_mod=lambda score, b, h, i, j: torch.where(j <= i, score, -float("inf"))) + 1


def branches(a: torch.Tensor) -> torch.Tensor:
    return torch.cond(a.sum() > 0, lambda y: y.sin() * 2, lambda y: y.cos() * 1, (a * 1,)) + 1


def looped(a: torch.Tensor) -> torch.Tensor:
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2), (torch.tensor(0), a * 1))[1] + 1


def scanned(a: torch.Tensor) -> torch.Tensor:
    from torch._higher_order_ops.scan import scan

    return scan(lambda carry, y: (carry + y, carry * y), torch.zeros(4), a * 1)[1] + 1


def associative(a: torch.Tensor) -> torch.Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    return associative_scan(lambda l, r: (l[0] * r[0], r[0] * l[1] + r[1]), (a * 1, a * 2), 0, combine_mode="generic")[1] + 1


@pytest.mark.parametrize(
    ("function", "grad"),
    [(flex, False), (branches, True), (looped, False), (scanned, True), (associative, True)],
    ids=["flex_attention", "cond", "while_loop", "scan", "associative_scan"],
)
def test_higher_order_operators_are_barriers(function: Callable[..., Any], grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        inputs = x(1, 2, 4, 16) if function is flex else x(4, 4, grad=grad)
        backend = assert_same_as_eager(function, inputs, exact=False)
    assert backend.only.barriers
    assert aten.add.Tensor in backend.targets()


def test_invoke_subgraph_bodies_are_lifted() -> None:
    @torch.compiler.nested_compile_region
    def layer(a: torch.Tensor) -> torch.Tensor:
        return torch.matmul(a, a).softmax(-1)

    backend = assert_same_as_eager(lambda a: layer(layer(a) * 2), x(4, 4, grad=True))
    bodies = [m for m in backend.only.graph_module.children() if isinstance(m, GraphModule)]
    assert bodies and all(aten.softmax.int in {n.target for n in body.graph.nodes} for body in bodies)


def test_write_to_what_a_region_of_transforms_uses_is_refused() -> None:
    def function(a: torch.Tensor) -> torch.Tensor:
        b = a * 2
        c = torch.vmap(lambda y: y.sum())(b)
        b.add_(1)
        return b + c

    assert_refused(function, x(3, 3), why="also written to by a barrier")


def test_functorch_is_as_before_after_lifting_a_transform() -> None:
    def function(a: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda y: (y * 2).sin().sum())(a) + torch.vmap(lambda y: y * y.sum())(a)

    level = torch._C._functorch.maybe_current_level()
    assert_same_as_eager(function, x(3, 3))
    assert torch._C._functorch.maybe_current_level() == level

    def refused(a: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda y: y * y.sum())(a).unsqueeze_(0)

    assert_refused(refused, x(3, 3), why="keep their shapes")
    assert torch._C._functorch.maybe_current_level() == level
    assert torch.equal(torch.ones(2).add(1), torch.full((2,), 2.0))


def test_operator_without_functional_form_is_a_barrier() -> None:
    @torch.library.custom_op("effcompile_test::bump", mutates_args=("a",))
    def bump(a: torch.Tensor, by: float) -> None:
        a.add_(by)

    def function(a: torch.Tensor) -> torch.Tensor:
        b = a * 2
        bump(b, 3.0)
        return b + 1

    backend = assert_same_as_eager(function, x(3))
    (barrier,) = backend.only.mutating
    assert "bump" in str(barrier.target)
    number = mode_regions(backend.only.graph_module.graph, backend.only.mutating)
    assert len(set(number.values())) == 2


# Random numbers -------------------------------------------------------------------------------------------------------


def noisy(a: torch.Tensor) -> torch.Tensor:
    b = F.dropout(a, 0.5) + torch.rand(4) + torch.randn_like(a)
    torch.rand(3)
    c = torch.empty_like(a).uniform_(0.0, 1.0) + torch.empty(4).normal_() + torch.bernoulli(a.sigmoid())
    return F.dropout(b + c, 0.25, training=True) + F.gumbel_softmax(a, dim=-1)


def test_random_numbers_are_inductors() -> None:
    results = []
    for backend in ("inductor", Lifting(inductor)):
        torch._dynamo.reset()
        torch.manual_seed(7)
        a = x(4, 4, grad=True)
        out = torch.compile(noisy, backend=backend, fullgraph=True)(a)
        out.sum().backward()
        results.append((out, a.grad, torch.rand(2)))
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)


def test_lifting_draws_no_random_numbers() -> None:
    states = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        before = torch.get_rng_state()
        lift(gm, example_inputs)
        states.append(torch.equal(before, torch.get_rng_state()))
        return gm.forward

    torch.compile(noisy, backend=backend)(x(4, 4))
    assert states == [True]


# Data-dependent graphs ------------------------------------------------------------------------------------------------


def test_constant_tensor_as_a_size() -> None:
    backend = assert_same_as_eager(
        lambda a: a.view(torch.div(torch.tensor(8), 2, rounding_mode="trunc"), -1) * 2, x(2, 8, grad=True)
    )
    assert backend.only.barriers in ((), (("view", "a call that reads a tensor's value"),))


@pytest.mark.parametrize(
    "function",
    [lambda a: a * a.sum().item(), lambda a: a.new_zeros(int((a > 0).sum().item()))],
    ids=["item", "size"],
)
def test_data_dependent_graphs_are_refused(function: Callable[..., Any]) -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        assert_refused(function, x(4, 4), why="depends on data")


# Symbolic sizes -------------------------------------------------------------------------------------------------------


def sized(a: torch.Tensor) -> torch.Tensor:
    n, m = a.shape
    b = a.reshape(n * m).view(m, -1).new_zeros(n + m // 2, m) + torch.arange(m)
    b[1:3] = a[:2] * n
    return b.sum(0) * (1.0 / m**0.5) + a.view(-1)[:m] + torch.ones(a.numel()).sum()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_symbolic_sizes_are_kept(compiler: Callable[..., Any]) -> None:
    backend = Lifting(compiler)
    compiled = torch.compile(sized, backend=backend, fullgraph=True)
    for n, m in ((8, 6), (10, 4), (14, 22)):
        a = x(n, m)
        torch._dynamo.mark_dynamic(a, 0, min=4, max=64)
        torch._dynamo.mark_dynamic(a, 1, min=4, max=64)
        torch.testing.assert_close(compiled(a), sized(a))
    values = [node.meta["val"] for node in backend.only.graph_module.graph.nodes if node.op == "placeholder"]
    assert sum(isinstance(value, torch.SymInt) for value in values) == 2


def test_lifting_adds_no_guard() -> None:
    counts = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        shape_env = next(n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder").node.shape_env
        before = len(shape_env.guards)
        lift(gm, example_inputs)
        counts.append((before, len(shape_env.guards)))
        return gm.forward

    torch.compile(sized, backend=backend, dynamic=True)(x(8, 6))
    ((before, after),) = counts
    assert before == after


def test_dynamic_training() -> None:
    assert_same_as_eager(Attention(), x(2, 5, 16, grad=True), dynamic=True)


# What compile_fx and the reports read ---------------------------------------------------------------------------------


def test_metadata_is_carried() -> None:
    backend = assert_same_as_eager(Attention(), x(2, 5, 16, grad=True))
    lifted, source = backend.only.graph_module, backend.sources[0]
    ours, theirs = ([n for n in module.graph.nodes if n.op == "placeholder"] for module in (lifted, source))
    assert [n.name for n in ours] == [n.name for n in theirs] and [n.target for n in ours] == [n.target for n in theirs]
    assert all(a._dynamo_source is b._dynamo_source and a.meta.keys() >= b.meta.keys() for a, b in zip(ours, theirs, strict=True))
    assert lifted.meta == source.meta and lifted._param_name_to_source is source._param_name_to_source
    for node in lifted.graph.nodes:
        if node.op == "call_function":
            assert "stack_trace" in node.meta and "source_fn_stack" in node.meta, node
            assert isinstance(node.meta["val"], (torch.Tensor, tuple, list))
        if node.target in (aten.linear.default, aten.layer_norm.default):
            assert list(node.meta["nn_module_stack"].values())[-1][1] in (nn.Linear, nn.LayerNorm)
    assert backend.only.seconds > 0


CACHE_SCRIPT = """
import sys; sys.path[:0] = {path!r}
import torch
from torch._dynamo.utils import counters
from test_trace import Lifting, inductor, x
torch.manual_seed(0)
def step(backend):
    torch._dynamo.reset()
    torch.compile(lambda a: a.sin() * 2, backend=backend, fullgraph=True)(x(3, grad=True)).sum().backward()
step(Lifting(inductor))
print(counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"], dict(counters["aot_autograd"]))
"""


def test_caches_hit_in_a_second_process(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    environment["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "1"
    script = CACHE_SCRIPT.format(path=[str(here), str(here.parent)])
    lines = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert run.returncode == 0, run.stderr
        lines.append(run.stdout.splitlines()[-1])
    assert lines[0].startswith("0 ") and lines[1].startswith("1 "), lines


# Bad input ------------------------------------------------------------------------------------------------------------


def test_unknown_failures_become_refusals() -> None:
    graph = torch.fx.Graph()
    a = graph.placeholder("a")
    with torch._subclasses.FakeTensorMode() as mode:
        a.meta["example_value"] = mode.from_tensor(x(2, 3))
    graph.output((graph.call_function(torch.matmul, (a, a)),))
    with warnings.catch_warnings(), pytest.raises(LiftError, match="RuntimeError: "):
        lift(GraphModule(nn.Module(), graph))
    graph = torch.fx.Graph()
    b = graph.placeholder("b")
    b.meta.update(a.meta)
    graph.output((graph.call_method("no_such_method", (b,)),))
    with pytest.raises(LiftError, match="no_such_method"):
        lift(GraphModule(nn.Module(), graph))
