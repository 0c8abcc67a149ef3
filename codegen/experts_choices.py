"""The implementations of a layer of experts: generated kernels on a GPU, ATen's products on a CPU, or what stood there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effcompile.builder import Builder
from effcompile.cost_model.hardware import Hardware
from effcompile.ir import Candidate, Match, Work
from effcompile.ops.experts import ExpertsSpec

from .implementation import Implementation, generates_for, hints_of_match, size_as_number

aten = torch.ops.aten

_FEW = 4  # rows for an expert, below which assignments are not sorted
_LAUNCHES, _LAUNCHES_OF_FEW = 6, 2
_LAUNCHES_OF_EXPERT = 4  # on a CPU
_PLACED = 32  # tensors that a launch writes into a table of where they are


@dataclass(frozen=True)
class _Shape:
    tokens: int
    slots: int
    experts: int
    depth: int  # channels of a token
    up: int  # columns of the first projection, gate and up together
    inner: int
    out: int
    bytes: int

    @property
    def assignments(self) -> int:
        return self.tokens * self.slots

    @property
    def weights(self) -> float:
        """Bytes of the weights of the experts that are expected to be chosen, if all are equally likely."""
        unchosen = (1 - min(1.0, self.slots / self.experts)) ** self.tokens
        return self.experts * (1 - unchosen) * self.of_expert * self.bytes

    @property
    def of_expert(self) -> int:
        """Elements of one expert's weights."""
        return self.depth * self.up + self.inner * self.out


def _shape(match: Match) -> _Shape:
    hints = hints_of_match(match)
    sizes = {name: [size_as_number(n, hints) for n in x.shape] for name, x in match.inputs.items()}
    spec: ExpertsSpec = match.spec
    tokens, slots = sizes["ids"]
    inner, out = sizes["down0"][-2:]
    experts = sizes["down0"][0] if spec.is_stacked else sum(name.startswith("down") for name in sizes)
    up = 2 * inner if spec.gated else inner
    return _Shape(tokens, slots, experts, sizes["x"][-1], up, inner, out, torch.finfo(match.inputs["x"].dtype).bits // 8)


def implementations(match: Match, hardware: Hardware) -> list[Implementation]:
    """All ways to carry out a layer of experts on given hardware, the original last."""
    shape = _shape(match)
    found = []
    if hardware.vendor == "cpu" or generates_for(hardware):
        found.append(Implementation(candidate=_ours(match, shape, hardware), lower=lower))
    own = Candidate(
        name="inductor", kind="inductor", work=_left(match, shape), compute_efficiency=0.6, memory_efficiency=0.8
    )  # fmt: skip
    return [*found, Implementation(candidate=own, lower=None)]


def _ours(match: Match, shape: _Shape, hardware: Hardware) -> Candidate:
    """Each chosen expert's weights once, and the rows of assignments between the steps. Efficiencies are set by hand."""
    on_cpu = hardware.vendor == "cpu"
    rows = shape.assignments * (shape.depth + 2 * shape.inner + 2 * shape.out + (shape.up if match.trains else 0))
    launches = _LAUNCHES_OF_FEW if shape.assignments < _FEW * shape.experts else _LAUNCHES
    if not match.spec.is_stacked:
        launches += sum(match.spec.counts(shape.experts)) // _PLACED + 1
    work = Work(
        flops=2 * shape.assignments * shape.of_expert,
        bytes=shape.weights + shape.bytes * (rows + shape.tokens * (shape.depth + shape.out)),
        launches=_LAUNCHES_OF_EXPERT * min(shape.experts, shape.assignments) if on_cpu else launches,
    )
    name, kind = ("aten", "library") if on_cpu else ("triton", "generated")
    return Candidate(name=name, kind=kind, work=work, compute_efficiency=0.6, memory_efficiency=0.8)  # type: ignore[arg-type]


def _left(match: Match, shape: _Shape) -> Work:
    """What the recogniser found of the original."""
    left = match.leaving
    if left is None:
        return Work(flops=2 * shape.assignments * shape.of_expert, bytes=shape.weights, launches=_LAUNCHES)
    hints = hints_of_match(match)
    return Work(flops=size_as_number(left.flops, hints), bytes=size_as_number(left.bytes, hints), launches=left.launches)


def lower(
    builder: Builder, operands: Mapping[str, Node], captures: Mapping[str, Node], sizes: Mapping[str, Any], match: Match,
    layout: str,
) -> Node:  # fmt: skip
    """Add a call of the semantic operation, and what else is added; the result as [b, h, i, d], with tokens as i, or b and i."""

    def listed(name: str) -> list[Node]:
        return [node for key, node in operands.items() if key.rstrip("0123456789") == name]

    x, ids = operands["x"], operands["ids"]
    weights = operands.get("weights")
    if weights is None:
        weights = builder.call(aten.empty.memory_format, [0], dtype=torch.float32, device=x.meta["val"].device)
    called = builder.call(
        torch.ops.effcompile.experts.default, x, ids, weights, listed("up"), listed("down"), listed("bias"), match.spec.to_json()
    )
    for rest in listed("rest"):
        called = builder.call(aten.add.Tensor, called, rest)
    shape = match.output.meta["val"].shape
    if len(shape) == 3:
        lengths = [n if isinstance(n, int) else -1 for n in shape[:2]]
        called = builder.call(aten.unflatten.int, called, 0, lengths)
        return builder.call(aten.unsqueeze.default, called, 1)
    return builder.call(aten.unsqueeze.default, builder.call(aten.unsqueeze.default, called, 0), 0)
