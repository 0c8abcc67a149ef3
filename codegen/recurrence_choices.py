"""The implementations of a recurrence: generated kernels on a GPU, C++ on a CPU, or what stood there."""

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
from effcompile.ops.recurrence import FEW_STEPS, RecurrenceSpec

from . import recurrence_native as native
from . import recurrence_native_rows as native_rows
from . import recurrence_native_steps as native_steps
from .implementation import Implementation, generates_for, hints_of_match, size_as_number

_CHUNK = 64
_ROW_BYTES = 4  # of a state's element, and of a gate's
_CALL_LAUNCHES = 10  # what it takes to call the operation from Python, beside what Inductor launches by itself
_CPP_LAUNCHES = 25  # what calling an operation of ours costs on a CPU, in launches
_UNROLLED = 64  # steps from which on a loop stays rolled up
_FUSED = 10  # of an unrolled loop's small operations, as Inductor's C++ carries them out in the time of a launch
_ATEN_PASSES = 5  # over the state, of a step


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
        on_cpu = hardware.vendor == "cpu"
        ours = Candidate(
            name="cpp" if on_cpu else "triton",
            kind="generated",
            work=_work_in_cpp(match, shape) if on_cpu else _work(match, shape),
            compute_efficiency=0.4,
            memory_efficiency=0.85 if _is_few(match, shape) else 0.6,
        )
        found.append(Implementation(candidate=ours, lower=lower))
    own = Candidate(
        name="inductor", kind="inductor", work=_left(match, shape, hardware), compute_efficiency=0.7, memory_efficiency=0.9
    )
    return [*found, Implementation(candidate=own, lower=None)]


def _work(match: Match, shape: _Shape) -> Work:
    """Chunks of C steps: 4 dk dv + 2 C (dk + dv) operations a step, and each operand once (design: cost per token and head)."""
    columns = shape.b * shape.h * shape.t
    traffic = _operand_bytes(shape)
    if _is_few(match, shape):  # beside the kernel one for its gates, and one for what comes of its output
        moved = traffic + 2 * shape.state * _ROW_BYTES
        return Work(flops=6 * columns * shape.dk * shape.dv, bytes=moved, launches=3 + _CALL_LAUNCHES)
    if not match.spec.has_rows or match.spec.decay == "full":
        return Work(flops=4 * columns * shape.dk * shape.dv, bytes=traffic, launches=3)
    flops = columns * (4 * shape.dk * shape.dv + 2 * _CHUNK * (shape.dk + shape.dv))
    return Work(flops=flops, bytes=traffic + 2 * columns // _CHUNK * shape.dk * shape.dv * _ROW_BYTES, launches=3)


def _work_in_cpp(match: Match, shape: _Shape) -> Work:
    """Step by step: each element of the state once a step, its decay too where it is its own. With the update beside it, an
    exponential takes half as long again."""
    elements = shape.b * shape.h * shape.t * shape.dk * shape.dv
    if shape.t == 1 and _is_few(match, shape):
        return Work(
            flops=6 * elements, bytes=_operand_bytes(shape) + _ATEN_PASSES * shape.state * _ROW_BYTES, launches=_CPP_LAUNCHES
        )
    exponentials = elements if match.spec.decay == "full" and match.spec.has_rows else shape.gates
    return Work(
        flops=4 * elements, bytes=_operand_bytes(shape), transcendentals=3 * exponentials // 2, launches=_CPP_LAUNCHES
    )  # fmt: skip


def _is_few(match: Match, shape: _Shape) -> bool:
    """Whether each step is taken by itself, with a state that is read and written once."""
    return bool(match.spec.has_rows and match.spec.decay != "full" and shape.t <= FEW_STEPS and "initial" in match.spec.operands)


def _operand_bytes(shape: _Shape) -> int:
    return shape.b * shape.h * shape.t * (2 * shape.dk + 2 * shape.dv) * shape.bytes + shape.gates * _ROW_BYTES


def _left(match: Match, shape: _Shape, hardware: Hardware) -> Work:
    """What the recogniser says; else weights for all pairs of positions, written and read a few times."""
    if match.leaving is None:
        pairs = shape.b * shape.h * shape.t**2
        return Work(flops=2 * pairs * (shape.dk + shape.dv), bytes=24 * pairs, transcendentals=pairs, launches=8)
    hints = hints_of_match(match)
    work = match.leaving
    numbers = {name: size_as_number(getattr(work, name), hints) for name in ("flops", "bytes", "transcendentals")}
    fused = hardware.vendor == "cpu" and shape.t < _UNROLLED and not _has_scans(match)
    return replace(work, **numbers, launches=-(-work.launches // _FUSED) if fused else work.launches)


def _has_scans(match: Match) -> bool:
    """Whether the graph came with loops that are run step by step, by an operation of their own."""
    scans = match.anchor.graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan)
    return any(not scan.meta.get("rolled") for scan in scans)


def lower(
    builder: Builder,
    operands: Mapping[str, Node],
    captures: Mapping[str, Node],
    sizes: Mapping[str, Any],
    match: Match,
    layout: str,
) -> dict[str, Node]:
    """Add a call of the semantic operation. On a CPU, its kernels are compiled from here on, beside the rest of the graph."""
    _prepare(match.spec, operands)
    results = builder.call(
        torch.ops.effcompile.recurrence.default,
        operands["v"], [operands[name] for name in match.spec.operands], match.spec.to_json(), layout,
    )  # fmt: skip
    wanted = {"out": 0, **{x.name: {"normaliser": 1, "final": 2}[x.name] for x in match.further.values()}}
    return {name: builder.call(operator.getitem, results, position) for name, position in wanted.items()}


def _prepare(spec: RecurrenceSpec, operands: Mapping[str, Node]) -> None:
    values = {name: node.meta["val"] for name, node in operands.items()}
    v = values["v"]
    if v.device.type != "cpu":
        return
    if not spec.has_rows:
        native.compiling(native_rows.text(v.dtype, spec))
    elif v.shape[2] != 1:
        native.compiling(native_steps.text(v.dtype, {name: x.shape for name, x in values.items()}, spec))
