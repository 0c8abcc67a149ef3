"""The implementations of a recurrence: generated kernels on a GPU, chunks in ATen on a CPU, or what stood there."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch.fx import Node

from effcompile.builder import Builder
from effcompile.cost_model.hardware import Hardware
from effcompile.ir import Candidate, Match, Work
from effcompile.ops.recurrence import RecurrenceSpec

from .implementation import Implementation, generates_for, hints_of_match, size_as_number

_CHUNK = 64
_ROW_BYTES = 4  # of a state's element, and of a gate's
_ATEN_CALLS_PER_STEP = 1  # of a state with one row, or a decay of each element
_ATEN_CALLS_PER_CHUNK = 4
_ATEN_CALLS = 40


@dataclass(frozen=True)
class _Shape:
    b: int
    h: int
    t: int
    dk: int
    dv: int
    bytes: int
    gates: int  # elements of gate and rate

    @property
    def state(self) -> int:
        return self.b * self.h * self.dk * self.dv


def _shape(match: Match) -> _Shape:
    hints = hints_of_match(match)
    sizes = {name: [size_as_number(n, hints) for n in x.shape] for name, x in match.inputs.items()}
    b, h, t, dv = sizes["v"]
    gates = sum(_count(sizes[name]) for name in ("gate", "rate") if name in sizes)
    dk = sizes["k"][3] if "k" in sizes else 1
    return _Shape(b, h, t, dk, dv, torch.finfo(match.inputs["v"].dtype).bits // 8, gates)


def product_dtype(x: Mapping[str, Any]) -> torch.dtype:
    """The dtype of matrix products: what q, k and v, or v alone, are promoted to."""
    return reduce(torch.promote_types, (x[name].dtype for name in ("q", "k", "v") if name in x))


def _count(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def implementations(match: Match, hardware: Hardware) -> list[Implementation]:
    """All ways to carry out a recurrence on given hardware, the original last."""
    shape = _shape(match)
    found = []
    if hardware.vendor == "cpu" or generates_for(hardware):
        in_aten = hardware.vendor == "cpu" or miscompiled(match.spec, product_dtype(match.inputs), hardware.arch)
        ours = Candidate(
            name="chunks" if in_aten else "triton",
            kind="library" if in_aten else "generated",
            work=_work(match, shape, in_aten=in_aten),
            compute_efficiency=0.4,
            memory_efficiency=0.6,
        )
        found.append(Implementation(candidate=ours, lower=lower))
    own = Candidate(name="inductor", kind="inductor", work=_left(match, shape), compute_efficiency=0.7, memory_efficiency=0.9)
    return [*found, Implementation(candidate=own, lower=None)]


def miscompiled(spec: RecurrenceSpec, dtype: torch.dtype, arch: str) -> bool:
    """Whether Triton 3.6 makes such a kernel read outside of shared memory, which ends the process's use of the GPU.

    On Hopper, a product whose operands are made in the loop and not loaded ahead keeps its descriptors in uniform registers; where
    those run out, as they do with decays by row or column in 16 bits, some are lost (seen by compute-sanitizer on an H100).
    """
    return arch.startswith("sm_90") and dtype != torch.float32 and spec.has_rows and spec.decay in ("key", "value")


def _work(match: Match, shape: _Shape, *, in_aten: bool) -> Work:
    """Chunks of C steps: 4 dk dv + 2 C (dk + dv) operations a step, and each operand once (design: cost per token and head)."""
    columns = shape.b * shape.h * shape.t
    operands = columns * (2 * shape.dk + 2 * shape.dv) * shape.bytes + shape.gates * _ROW_BYTES
    if not match.spec.has_rows or match.spec.decay == "full":
        calls = shape.t * _ATEN_CALLS_PER_STEP
        flops = 4 * columns * shape.dk * shape.dv
        traffic = operands + (2 * columns * shape.dk * shape.dv * _ROW_BYTES if in_aten else 0)
    else:
        calls = -(-shape.t // _CHUNK) * _ATEN_CALLS_PER_CHUNK
        flops = columns * (4 * shape.dk * shape.dv + 2 * _CHUNK * (shape.dk + shape.dv))
        traffic = operands + 2 * columns // _CHUNK * shape.dk * shape.dv * _ROW_BYTES
    return Work(flops=flops, bytes=traffic, launches=calls + _ATEN_CALLS if in_aten else 3)


def _left(match: Match, shape: _Shape) -> Work:
    """What the recogniser says; else weights for all pairs of positions, written and read a few times."""
    if match.leaving is None:
        pairs = shape.b * shape.h * shape.t**2
        return Work(flops=2 * pairs * (shape.dk + shape.dv), bytes=24 * pairs, transcendentals=pairs, launches=8)
    hints = hints_of_match(match)
    work = match.leaving
    numbers = {name: size_as_number(getattr(work, name), hints) for name in ("flops", "bytes", "transcendentals")}
    return replace(work, **numbers)


def lower(
    builder: Builder,
    operands: Mapping[str, Node],
    captures: Mapping[str, Node],
    sizes: Mapping[str, Any],
    match: Match,
    layout: str,
) -> dict[str, Node]:
    """Add a call of the semantic operation."""
    results = builder.call(
        torch.ops.effcompile.recurrence.default,
        operands["v"], [operands[name] for name in match.spec.operands], match.spec.to_json(), layout,
    )  # fmt: skip
    wanted = {"out": 0, **{x.name: {"normaliser": 1, "final": 2}[x.name] for x in match.further.values()}}
    return {name: builder.call(operator.getitem, results, position) for name, position in wanted.items()}
