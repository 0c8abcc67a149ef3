"""The implementations of a router: one generated kernel on a GPU, or what stood there."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from effcompile.builder import Builder
from effcompile.cost_model.hardware import Hardware
from effcompile.ir import Candidate, Match, Work

from .implementation import Implementation, generates_for, hints_of_match, size_as_number
from .route import refusal

aten = torch.ops.aten


def implementations(match: Match, hardware: Hardware) -> list[Implementation]:
    """All ways to carry out a router on given hardware, the original last. On a CPU that is the only one."""
    hints, logits = hints_of_match(match), match.inputs["logits"]
    tokens, experts = (size_as_number(n, hints) for n in logits.shape)
    chosen = tokens * match.spec.k
    found = []
    if generates_for(hardware) and refusal(match.spec, experts, logits.dtype) is None:
        work = Work(flops=0, bytes=tokens * experts * logits.dtype.itemsize + chosen * 12)
        ours = Candidate(name="triton", kind="generated", work=work, memory_efficiency=0.6)
        found.append(Implementation(candidate=ours, lower=lower))
    left = match.leaving or Work(flops=0, bytes=0)
    own = Work(flops=0, bytes=size_as_number(left.bytes, hints), launches=left.launches)
    return [
        *found,
        Implementation(candidate=Candidate(name="inductor", kind="inductor", work=own, memory_efficiency=0.8), lower=None),
    ]


def lower(
    builder: Builder, operands: Mapping[str, Node], captures: Mapping[str, Node], sizes: Mapping[str, Any], match: Match,
    layout: str,
) -> dict[str, Node]:  # fmt: skip
    """Add a call of the semantic operation; its results by name, [b, h, i, d] with tokens as i, or as b and i, and slots as d."""
    both = builder.call(torch.ops.effcompile.route.default, operands["logits"], operands.get("bias"), match.spec.to_json())
    (ids,) = match.further
    nodes = {"out": (0, match.output), match.further[ids].name: (1, ids)}
    return {
        name: _with_heads(builder, builder.call(operator.getitem, both, position), original)
        for name, (position, original) in nodes.items()
    }


def _with_heads(builder: Builder, result: Node, original: Node) -> Node:
    shape = original.meta["val"].shape
    if len(shape) == 3:
        lengths = [n if isinstance(n, int) else -1 for n in shape[:2]]
        result = builder.call(aten.unflatten.int, result, 0, lengths)
        return builder.call(aten.unsqueeze.default, result, 1)
    return builder.call(aten.unsqueeze.default, builder.call(aten.unsqueeze.default, result, 0), 0)
