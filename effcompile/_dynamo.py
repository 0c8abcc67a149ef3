"""What Dynamo and Inductor keep to themselves, touched here alone. Tried on torch 2.11 and 2.13.

- `torch._dynamo.utils.counters`: frames begun and compiled, reasons of graph breaks and of what is not supported.
- `torch._inductor.compile_fx`, `torch._inductor.list_mode_options`: Inductor as a function, and what a mode means to it.
- `torch.compile(isolate_recompiles=True)`, from 2.13 on: compiled code that does not count towards the recompile limit of others.
- `torch.compiler.config.cache_key_tag`: a text that Inductor's caches take into their keys.
- `torch.SymInt.node.hint`: a symbolic size's value in the example inputs.
- `torch._logging.trace_structured`: artifacts for tlparse.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch._dynamo.config
import torch._dynamo.utils
import torch._inductor
import torch._logging
import torch.compiler.config
from torch.fx import GraphModule

from ._torch import keeping_saved_tensors

_UNLIMITED = 1 << 20


@dataclass(frozen=True)
class Counters:
    """A reading of Dynamo's counters."""

    total: int = 0
    ok: int = 0
    breaks: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    unsupported: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def now(cls) -> Counters:
        """The counters as they stand."""
        counters = torch._dynamo.utils.counters
        frames = counters["frames"]
        breaks, unsupported = (MappingProxyType(dict(counters[name])) for name in ("graph_break", "unimplemented"))
        return cls(frames["total"], frames["ok"], breaks, unsupported)

    def breaks_since(self, earlier: Counters) -> tuple[str, ...]:
        """The first line of each reason that was counted since `earlier`."""
        new = [reason for reason, count in self.breaks.items() if count > earlier.breaks.get(reason, 0)]
        return tuple(str(reason).strip().split("\n")[0] for reason in new)

    def advice_since(self, earlier: Counters) -> tuple[str, ...]:
        """What lets Dynamo capture what it left out since `earlier`: a loop that is not captured counts as no graph break."""
        pairs = ((self.breaks, earlier.breaks), (self.unsupported, earlier.unsupported))
        new = [str(reason) for now, before in pairs for reason, count in now.items() if count > before.get(reason, 0)]
        return tuple(advice for marks, advice in _ADVICE if any(all(mark in reason for mark in marks) for reason in new))


_ADVICE = (
    (
        ("capture_dynamic_output_shape_ops",),
        "rows that are chosen by data (torch.where(mask), nonzero, x[mask]) ended a graph: to have loops over experts captured, "
        "set torch._dynamo.config.capture_dynamic_output_shape_ops = True before compiling, or, in a Hugging Face model, "
        'experts_implementation="grouped_mm"',
    ),
    (
        ("Data-dependent branching", "attempted to jump with SymNodeVariable"),
        "a branch on a number that depends on data, such as `if idx.numel() == 0`, ended a graph, which no setting changes: a loop "
        "over experts means the same without it, since no rows add nothing",
    ),
)
"""Texts that all occur in Dynamo's reason, and what to do."""


def compile_apart(model: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(model, backend=backend)` that leaves what else was compiled of `model` as it is.

    A model that is compiled already is compiled from its original. Before torch 2.13 each call counts towards the recompile limit
    of later compilations of the same code.
    """
    original = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None) or model
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
    compiled: Callable[..., Any] = torch.compile(original, backend=backend, **apart)
    unlimited = torch._dynamo.config.patch(recompile_limit=_UNLIMITED, accumulated_recompile_limit=_UNLIMITED)
    return unlimited(compiled)


def hint_of(value: Any) -> Any:
    """A symbolic number's value in the example inputs, without a guard on it; other values as they are."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else value


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings for a torch.compile mode."""
    return {} if mode == "default" else dict(torch._inductor.list_mode_options(mode))


def inductor(module: GraphModule, example_inputs: Any, settings: Mapping[str, Any], tag: str = "") -> Callable[..., Any]:
    """Compile a graph with Inductor, under settings of its own. Compiled graphs of different `tag` are cached apart."""
    from torch._inductor.compile_fx import compile_fx

    tags = torch.compiler.config.cache_key_tag + tag
    scans = any(node.target is torch.ops.higher_order.scan for inner in _graphs(module) for node in inner.graph.nodes)
    safely = keeping_saved_tensors() if scans else contextlib.nullcontext()
    with safely, torch.compiler.config.patch(cache_key_tag=tags):  # type: ignore[attr-defined]
        compiled: Callable[..., Any] = compile_fx(module, example_inputs, config_patches=dict(settings) or None)
    return compiled


def _graphs(module: GraphModule) -> list[GraphModule]:
    return [inner for inner in module.modules() if isinstance(inner, GraphModule)]


def artifact(name: str, payload: Callable[[], str]) -> None:
    """Give tlparse a text, if it listens."""
    torch._logging.trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload)
