"""Dynamo's graph lifted to one functional ATen graph before autograd: what the recognisers read.

    Dynamo's graph --record--> the ATen operators it calls --functionalise--> no in-place operators --> unused nodes dropped

Symbolic sizes are kept. Grad-mode, autocast and inference-mode switches stay in the graph as nodes. Higher-order operators and
whatever the dispatcher does not see stay as they are and are listed as barriers. Dynamo's graph is not changed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from effcompile import _torch
from effcompile._functional import functionalise
from effcompile._record import MODE_SWITCHES, Barrier, Recording, record
from effcompile._regions import mode_regions, requires_grad
from effcompile.errors import LiftError

__all__ = ["Lifted", "lift", "mode_regions", "requires_grad"]

aten = torch.ops.aten
CARRIED_ATTRIBUTES = (
    "_param_name_to_source",
    "_source_to_user_stacks",
    "_backend_id",
    "shape_env",
    "compile_subgraph_reason",
    "saved_tensors_hooks_pack_0",
    "saved_tensors_hooks_unpack_0",
)
# Write to their running statistics without saying so in their schema.
STATISTICS = {aten.batch_norm.default: 5, aten.instance_norm.default: 5}


@dataclass(frozen=True, kw_only=True)
class Lifted:
    """A functional ATen graph with the placeholders of the graph it was lifted from.

    `barriers` names what was not opened, each with the reason (of a run of nodes with one reason, the first). `opaque` holds every
    such node, `mutating` those that may write to memory, which no operator may be moved across. `seconds` is what lifting took.
    """

    graph_module: GraphModule
    barriers: tuple[tuple[str, str], ...]
    opaque: frozenset[Node]
    mutating: frozenset[Node]
    seconds: float


def lift(gm: GraphModule, example_inputs: Sequence[Any] = ()) -> Lifted:
    """The graph of `gm` in functional ATen operators, for `compile_fx` with the same `example_inputs` (which are not looked at).

    The one in-place operators left are `aten.copy_` to mutated inputs, just before the output, and those of barriers.
    Raises LiftError with the reason if that graph would not mean the same.
    """
    start = time.perf_counter()
    try:
        recording = functionalise(record(gm, _lift_body))
        graph_module = _module(gm, recording)
    except LiftError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise LiftError(f"Expected a graph whose operators can be recorded but got {type(error).__name__}: {reason}") from error
    kept = set(graph_module.graph.nodes)
    barriers = [barrier for barrier in recording.barriers if barrier.node in kept]
    return Lifted(
        graph_module=graph_module,
        barriers=_reported(barriers),
        opaque=frozenset(barrier.node for barrier in barriers),
        mutating=frozenset(barrier.node for barrier in barriers if barrier.mutates),
        seconds=time.perf_counter() - start,
    )


def _reported(barriers: Sequence[Barrier]) -> tuple[tuple[str, str], ...]:
    """Name and reason of each barrier, one for a run of them with one reason in regions that are copied node by node."""
    runs = (b for i, b in enumerate(barriers) if not (b.run and i and barriers[i - 1].why == b.why))
    return tuple((barrier.node.name, barrier.why) for barrier in runs)


def _lift_body(body: GraphModule) -> GraphModule | None:
    """The body of a checkpoint or subgraph lifted by itself, or None where it must stay as it is, as when it writes to an input."""
    try:
        lifted = lift(body)
    except LiftError:
        return None
    writes = any(isinstance(n.target, _torch.OpOverload) and n.target._schema.is_mutable for n in lifted.graph_module.graph.nodes)
    return None if writes or lifted.mutating else lifted.graph_module


def _module(gm: GraphModule, recording: Recording) -> GraphModule:
    """A module on the recorded graph that carries what `compile_fx` reads from Dynamo's."""
    barriers = {barrier.node for barrier in recording.barriers}
    graph = recording.graph
    graph.eliminate_dead_code(is_impure_node=lambda node: node in barriers or is_impure(node))
    graph.set_codegen(gm.graph._codegen)
    graph_module = GraphModule(gm, graph, class_name=type(gm).__name__)
    for name, value in recording.attributes.items():
        setattr(graph_module, name, value)
    graph_module.meta.update(gm.meta)
    for name in CARRIED_ATTRIBUTES:
        if hasattr(gm, name):
            setattr(graph_module, name, getattr(gm, name))
    return graph_module


def is_impure(node: Node) -> bool:
    """Whether a node of a lifted graph must stay where nothing uses its result: modes, writes, checks and random numbers."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr":
        return False
    if not isinstance(node.target, _torch.OpOverload):
        return node.op == "call_method" or node.target in MODE_SWITCHES or isinstance(node.target, _torch.HigherOrderOperator)
    if node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:
        return True
    training = STATISTICS.get(node.target)
    if training is not None:
        return len(node.args) <= training or bool(node.args[training])
    return not node.target._schema.returns
