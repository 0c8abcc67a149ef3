"""What tests of a recogniser say: this is rewritten, that is refused for this reason, the compiled function is as good as eager.

Functions are captured by torch.compile as users call it, and run through all rooms. On a CPU a rewritten graph for a GPU runs the
operations' references; the CPU's own lowering is checked beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

from effcompile.codegen import choices
from effcompile.config import Config
from effcompile.cost_model import select
from effcompile.explain import Frame, Report
from effcompile.ir import Decision
from effcompile.pipeline import Pipeline

GPU = "h100-sxm"
TARGETS = (GPU, "cpu")
_FLOOR_ULPS = 8.0  # below it, two correct results may differ in the order of their additions alone

Function = Callable[..., Any]


class Compiled:
    """A function compiled for several targets at once, with the report of each.

    Args:
        targets: hardware names; "cpu" is the machine's own.
        forced: replace wherever an implementation exists, also where the cost model would not.
    """

    def __init__(self, f: Function, targets: Sequence[str] = TARGETS, *, forced: bool = True, dynamic: bool | None = None):
        self.f, self.targets, self.forced = f, targets, forced
        self.frames: dict[str, list[Frame]] = {target: [] for target in targets}
        self.graphs: dict[str, list[torch.fx.GraphModule]] = {target: [] for target in targets}
        self.active = targets[0]
        self._call = torch.compile(f, backend=self._backend, fullgraph=True, dynamic=dynamic)

    def __call__(self, *args: Any, target: str | None = None) -> Any:
        self.active = target or self.targets[0]
        return self._call(*args)

    def report(self, target: str | None = None) -> Report:
        """What was made of the function for a target."""
        target = target or self.targets[0]
        return Report(frames=tuple(self.frames[target]), hardware=target)

    def decisions(self, family: str = "attention") -> list[Decision]:
        """The decisions of one family, for the first target."""
        return [d for d in self.report().decisions if d.family == family]

    def _backend(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Function:
        compiled = {target: self._compile(module, inputs, target) for target in self.targets}
        return lambda *args: compiled[self.active](*args)

    def _compile(self, module: torch.fx.GraphModule, inputs: list[Any], target: str) -> Function:
        config = Config.resolve(None, {"hardware": None if target == "cpu" else target})
        with _preferring_ours() if self.forced else nullcontext():
            result = Pipeline(config).run(module, inputs)
        if result.error is not None:
            raise result.error
        self.frames[target].append(result.frame)
        self.graphs[target].append(module if result.module is None else result.module)
        return aot_eager(self.graphs[target][-1], inputs)


@contextmanager
def _preferring_ours() -> Iterator[None]:
    """The first candidate that is not Inductor's is chosen; graphs as small as tests' would often be left."""
    original = select.choose

    def choose(candidates: Any, *args: Any) -> Any:
        best, estimates = original(candidates, *args)
        return next((c for c in candidates if c.kind != "inductor"), best), estimates

    with mock.patch.object(select, "choose", choose), mock.patch.object(choices, "_CPU_TRAINING_KEYS", 0):
        yield


# -------------------------------------------------------------------- what was decided


def assert_rewritten(f: Function, *args: Any, hardware: str = GPU, family: str = "attention", **fields: Any) -> Report:
    """Every decision about `f` is a rewrite, and there is one; its specification has the given fields.

    Numbers in a field are compared to six digits: a scale may be written as a quotient, a product or a power.
    """
    compiled = Compiled(f, (hardware,))
    with torch.random.fork_rng():
        compiled(*args)
    assert_all_rewritten(compiled, family, **fields)
    return compiled.report()


def assert_all_rewritten(compiled: Compiled, family: str = "attention", **fields: Any) -> None:
    """As `assert_rewritten`, of a function that has run."""
    found = compiled.decisions(family)
    assert found, f"no {family} was recognised in {compiled.f}"
    for decision in found:
        assert decision.outcome == "rewritten", f"{decision.outcome} at step {decision.step!r}: {decision.why}"
        for name, wanted in fields.items():
            assert canonical(decision.spec[name]) == canonical(wanted), f"{name} is {decision.spec[name]!r}, not {wanted!r}"


def assert_refused(f: Function, *args: Any, why: str, step: str | None = None, family: str = "attention") -> Report:
    """`f` has a site that is refused, for a reason that matches `why` (a regular expression), and none that is rewritten."""
    compiled = Compiled(f, (GPU,))
    with torch.random.fork_rng():
        compiled(*args)
    found = compiled.decisions(family)
    assert found, f"no decision about {compiled.f}"
    for decision in found:
        assert decision.outcome == "refused", f"{decision.outcome}: {decision.spec}"
    assert any(re.search(why, d.why) and step in (None, d.step) for d in found), [(d.step, d.why) for d in found]
    return compiled.report()


def canonical(field: Any) -> Any:
    """A specification's field with every number that has a fraction rounded to six digits."""
    if not isinstance(field, str):
        return field
    return re.sub(r"\d+\.\d+(e[-+]?\d+)?", lambda m: f"{float(m[0]):.6g}", field)


def spec_text(decision: Decision) -> str:
    """A specification as a line in which equal meanings are equal."""
    return json.dumps({name: canonical(value) for name, value in decision.spec.items()}, sort_keys=True)


# -------------------------------------------------------------------- what it computes


class _InFloat64(TorchFunctionMode):
    """Every floating-point dtype that a function names is float64."""

    _CASTS = ("float", "half", "bfloat16")

    def __enter__(self) -> Any:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.default)
        super().__exit__(*error)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in self._CASTS and len(args) == 1:
            return args[0].double()
        args, kwargs = tree_map_only(torch.dtype, lambda d: torch.float64 if d.is_floating_point else d, (args, kwargs or {}))
        return function(*args, **kwargs)


def results(f: Function, args: Sequence[Any], *, dtype: torch.dtype | None = None, grad: bool = True) -> list[torch.Tensor]:
    """The outputs of `f`, and the gradients of those `args` that require one, each flattened into a list.

    The gradient is that of a fixed random weighting of the outputs.
    """
    inputs = [_fresh(x, dtype) for x in args]
    with torch.random.fork_rng():
        outputs = [x for x in tree_flatten(f(*inputs))[0] if isinstance(x, torch.Tensor)]
    found = [x.detach() for x in outputs]
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    differentiable = [x for x in outputs if x.requires_grad]
    if grad and leaves and differentiable:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in differentiable]
        found += torch.autograd.grad(differentiable, leaves, weights, materialize_grads=True)
    return found


def _fresh(x: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    copy = x.detach().clone(memory_format=torch.preserve_format)
    if dtype is not None and x.is_floating_point():
        copy = copy.to(dtype)
    for dim in getattr(x, "_dynamo_dynamic_indices", ()):
        torch._dynamo.mark_dynamic(copy, dim)
    return copy.requires_grad_(x.requires_grad)


def assert_within_contract(f: Function | Compiled, *args: Any, grad: bool = True) -> Compiled:
    """The compiled function's error against float64 is at most twice eager's, outputs and gradients, for every target.

    Elements that are not finite must be the same ones as in eager.
    """
    compiled = f if isinstance(f, Compiled) else Compiled(f)
    eager = results(compiled.f, args, grad=grad)
    with _InFloat64():
        exact = results(compiled.f, args, dtype=torch.float64, grad=grad)
    for target in compiled.targets:
        mine = results(lambda *xs, target=target: compiled(*xs, target=target), args, grad=grad)
        assert len(mine) == len(eager) == len(exact)
        for position, (a, b, x) in enumerate(zip(mine, eager, exact, strict=True)):
            _compare(a, b, x, f"result {position} for {target}")
    return compiled


def _compare(mine: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    assert mine.dtype == eager.dtype and mine.shape == eager.shape, (
        f"{what}: {mine.dtype} {mine.shape}, not {eager.dtype} {eager.shape}"
    )
    if not mine.is_floating_point():
        assert torch.equal(mine, eager), what
        return
    assert torch.equal(mine.isnan(), eager.isnan()), f"{what}: {mine.isnan().sum()} NaN, eager has {eager.isnan().sum()}"
    kept = eager.isfinite() & exact.isfinite()
    a, b, x = (torch.where(kept, t.double(), 0.0) for t in (mine, eager, exact))
    allowed = 2 * (b - x).norm() + _FLOOR_ULPS * torch.finfo(mine.dtype).eps * x.norm()
    error = (a - x).norm()
    assert error <= allowed, (
        f"{what}: error {error:.3e}, allowed {allowed:.3e}, eager's own {(b - x).norm():.3e}, norm {x.norm():.3e}"
    )


def listing(module: torch.fx.GraphModule) -> str:
    """A graph as one line an operation: its result's number, the operator, what it takes, and the shape."""
    names: dict[torch.fx.Node, str] = {}
    lines = []
    for node in module.graph.nodes:
        if node.op == "output":
            lines.append(f"return {torch.fx.node.map_arg(node.args[0], lambda n: _Name(names[n]))}")
            continue
        names[node] = f"%{len(names)}"
        args = torch.fx.node.map_arg(node.args, lambda n: _Name(names[n]))
        call = f"{node.target}{args}" if node.op == "call_function" else node.op
        value = node.meta.get("val")
        lines.append(f"{names[node]} = {call}" + (f"  # {list(value.shape)}" if isinstance(value, torch.Tensor) else ""))
    return "\n".join(lines)


class _Name(str):
    __repr__ = str.__str__
