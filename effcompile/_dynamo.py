"""What Dynamo and Inductor keep to themselves, touched here alone. Tried on torch 2.11 and 2.13.

- `torch._dynamo.utils.counters`: frames begun and compiled, reasons of graph breaks.
- `torch._inductor.compile_fx`, `torch._inductor.list_mode_options`: Inductor as a function, and what a mode means to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch._dynamo.utils
import torch._inductor
from torch.fx import GraphModule


@dataclass(frozen=True)
class Counters:
    """A reading of Dynamo's counters."""

    total: int = 0
    ok: int = 0
    breaks: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def now(cls) -> Counters:
        """The counters as they stand."""
        counters = torch._dynamo.utils.counters
        frames = counters["frames"]
        return cls(frames["total"], frames["ok"], MappingProxyType(dict(counters["graph_break"])))

    def breaks_since(self, earlier: Counters) -> tuple[str, ...]:
        """The first line of each reason that was counted since `earlier`."""
        new = [reason for reason, count in self.breaks.items() if count > earlier.breaks.get(reason, 0)]
        return tuple(str(reason).strip().split("\n")[0] for reason in new)


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings for a torch.compile mode."""
    return {} if mode == "default" else dict(torch._inductor.list_mode_options(mode))


def inductor(module: GraphModule, example_inputs: Any, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile a graph with Inductor, under settings of its own."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Callable[..., Any] = compile_fx(module, example_inputs, config_patches=dict(settings) or None)
    return compiled
