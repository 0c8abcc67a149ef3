"""The implementations of each semantic operation: what each costs, and how it enters a graph.

A new family adds one function to `FAMILIES`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch.fx import Node

from effcompile.builder import Builder
from effcompile.cost_model.hardware import Hardware
from effcompile.evaluate import Evaluator
from effcompile.ir import Candidate, Match, Work
from effcompile.ops.attention import AttentionSpec, index_tensors
from effcompile.terms import Load, from_text, is_condition

from . import decode, experts_choices, hopper, recurrence_choices, route_choices, sdpa
from .hooks import Variant
from .implementation import Implementation, generates_for, hints_of_match, size_as_number
from .launching import width_of

aten = torch.ops.aten

_SAMPLES = 64
_SEEDS = 1 << 62  # of a dropout
_QUERY_TILE = 128
_MAX_DEPTH = 256  # of generated kernels
_SDPA_MAX_DEPTH = 256
_LEAST_KEYS = 256  # of a program's part of a decoding
_L2_SPEED = 2.0  # of reading again what another program has just read, in main memory's
_CPU_TRAINING_KEYS = 512  # below it the fused backward on a CPU is slower than Inductor's (benchmarks/cpu_attention.py)


def implementations(match: Match, hardware: Hardware) -> list[Implementation]:
    """All ways to carry out a match on given hardware, the original last."""
    return FAMILIES[match.family](match, hardware)


# -------------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Shape:
    b: int
    h: int
    hk: int
    tq: int
    tk: int
    d: int
    dv: int
    bytes: int

    @property
    def operands(self) -> int:
        """Bytes of queries, keys, values and output."""
        return self.rows + self.cache

    @property
    def rows(self) -> int:
        """Bytes of queries and output."""
        return self.bytes * self.b * self.h * self.tq * (self.d + self.dv)

    @property
    def cache(self) -> int:
        """Bytes of keys and values."""
        return self.bytes * self.b * self.hk * self.tk * (self.d + self.dv)

    @property
    def decodes(self) -> bool:
        """Whether there are so few queries that reading the keys is the work."""
        return self.tq <= decode.MAX_QUERIES

    @property
    def pairs(self) -> int:
        return self.b * self.h * self.tq * self.tk


def _shape(match: Match) -> _Shape:
    hints = hints_of_match(match)
    q, k, v = ([size_as_number(n, hints) for n in match.inputs[name].shape] for name in ("q", "k", "v"))
    return _Shape(q[0], q[1], k[1], q[2], k[2], q[3], v[3], torch.finfo(match.inputs["q"].dtype).bits // 8)


def _attention(match: Match, hardware: Hardware) -> list[Implementation]:
    spec, shape = match.spec, _shape(match)
    flops, density = 2 * shape.pairs * (shape.d + shape.dv), density_of(spec, shape.tq, shape.tk)
    exponentials = shape.pairs * _exponentials(spec)
    fused = Work(flops=flops * density, bytes=shape.operands, transcendentals=exponentials * density)
    found = []
    if generates_for(hardware) and max(shape.d, shape.dv) <= _deepest(match):
        few = shape.decodes and not spec.dropout
        ours = _decoding(spec, shape, density, hardware) if few else _generated(fused, shape, hardware, special=hopper.serves(spec))
        found.append(Implementation(candidate=ours, lower=lower_generated))
    found += _library(match, shape, hardware, fused)
    scores = shape.pairs * (2 * shape.bytes + 2 * shape.bytes)
    unfused = Work(flops=flops, bytes=shape.operands + scores, transcendentals=exponentials, launches=3)
    own = Candidate(name="inductor", kind="inductor", work=unfused, compute_efficiency=0.7, memory_efficiency=0.9)
    return [*found, Implementation(candidate=own, lower=None)]


def _exponentials(spec: AttentionSpec) -> int:
    """Of one pair: that of the softmax, and those of the score."""
    return (spec.normaliser == "softmax") + spec.score.count("tanh") + spec.score.count("sigmoid")


def _generated(work: Work, shape: _Shape, hardware: Hardware, *, special: bool) -> Candidate:
    """Tiles of queries are computed whole, and each is one program: few queries waste arithmetic, few programs waste processors.

    `special`: whether the kernels written for Hopper take it.
    """
    tiles = -(-shape.tq // _QUERY_TILE)
    padding = tiles * _QUERY_TILE / shape.tq
    occupied = min(1.0, shape.b * shape.h * tiles / hardware.sms)
    for_hopper = hardware.arch == "sm_90" and shape.bytes == 2 and special
    padded_work = Work(
        flops=work.flops * padding,
        bytes=work.bytes,
        transcendentals=work.transcendentals * padding,
        launches=2 if for_hopper else 1,  # descriptors are written for each launch
    )
    reached = _hopper_efficiency(shape) if for_hopper else 0.5
    return Candidate(
        name="triton", kind="generated", work=padded_work, compute_efficiency=reached * occupied, memory_efficiency=0.8 * occupied
    )  # fmt: skip


def _hopper_efficiency(shape: _Shape) -> float:
    """Beside cuDNN's 0.75: for 128 as benchmarks/attention.py has it, for others set by hand. Depths are padded to powers of 2."""
    reached = {64: 0.67, 128: 0.76, 256: 0.7}[max(64, width_of(shape.d), width_of(shape.dv))]
    return reached * (shape.d + shape.dv) / (width_of(shape.d) + width_of(shape.dv))


def _deepest(match: Match) -> int:
    """The largest head dimension that there are kernels for: more where the queries are certainly few, and there is no backward."""
    queries = match.inputs["q"].shape[2]
    few = not match.trains and sympy.sympify(queries).is_number and int(queries) <= decode.MAX_QUERIES
    return decode.MAX_DEPTH if few else _MAX_DEPTH


def _decoding(spec: AttentionSpec, shape: _Shape, density: float, hardware: Hardware) -> Candidate:
    """All queries of a key head share one tile of 16 rows or more, and its visible keys are read once, in parts, then added up."""
    span = Variant(spec).span
    keys = shape.tk * density if span is None else min(shape.tk * density, shape.tq + span)
    height = -(-shape.h // shape.hk * shape.tq // 16) * 16
    programs = shape.b * shape.hk * max(1.0, keys // _LEAST_KEYS)
    occupied = min(1.0, 2 * programs / hardware.sms)  # a program alone reads more than its share
    pairs = shape.b * shape.hk * height * keys
    work = Work(
        flops=2 * pairs * (shape.d + shape.dv),
        bytes=shape.rows + shape.cache * keys / max(1, shape.tk),
        transcendentals=pairs * _exponentials(spec),
        launches=2,
    )
    return Candidate(
        name="triton", kind="generated", work=work, compute_efficiency=0.4 * occupied, memory_efficiency=0.85 * occupied
    )  # fmt: skip


def _library(match: Match, shape: _Shape, hardware: Hardware, fused: Work) -> list[Implementation]:
    call = sdpa.as_call(
        match.spec, square=shape.tq == shape.tk and str(match.inputs["q"].shape[2]) == str(match.inputs["k"].shape[2])
    )
    if call is None or shape.d != shape.dv or match.further:
        return []
    if hardware.vendor == "cpu":
        if shape.bytes != 4 or (match.trains and not _trains_on_cpu(call, shape)):
            return []
        extra = 0 if call.attn_mask is None else shape.b * shape.tq * shape.tk * shape.bytes
        work = Work(flops=fused.flops, bytes=fused.bytes + extra, transcendentals=fused.transcendentals)
        return [Implementation(candidate=_named("sdpa-flash-cpu", work, 0.6), lower=sdpa.lower)]
    if call.attn_mask is not None or shape.bytes != 2 or shape.d > _SDPA_MAX_DEPTH or shape.d % 8:
        return []
    if shape.decodes:
        return [Implementation(candidate=_flash_decoding(shape, fused), lower=sdpa.lower)]
    found = [Implementation(candidate=_named("sdpa-flash", fused, 0.45), lower=sdpa.lower)]
    if hardware.arch in ("sm_90", "sm_100") and shape.d <= 128:
        found.append(Implementation(candidate=_named("sdpa-cudnn", fused, 0.75), lower=sdpa.lower_cudnn))
    return found


def _flash_decoding(shape: _Shape, fused: Work) -> Candidate:
    """FlashAttention 2 splits the keys too. A group of heads shares them if there is one query; else each head reads its own."""
    again = 1.0 if shape.tq == 1 else max(1.0, shape.h // shape.hk / _L2_SPEED)
    tile = -(-shape.tq // 64) * 64 / shape.tq if shape.tq > 1 else 64 / min(64, shape.h // shape.hk)
    work = Work(
        flops=fused.flops * tile,
        bytes=shape.rows + shape.cache * again,
        transcendentals=fused.transcendentals * tile,
        launches=2,
    )
    return Candidate(name="sdpa-flash", kind="library", work=work, compute_efficiency=0.45, memory_efficiency=0.8)


def _trains_on_cpu(call: sdpa.Call, shape: _Shape) -> bool:
    """Whether the fused backward is right and fast: for a row of very low biases it is wrong (torch 2.13), for few keys slow."""
    return shape.tk >= _CPU_TRAINING_KEYS and (call.attn_mask is None or is_condition(call.attn_mask))


def _named(name: str, work: Work, efficiency: float) -> Candidate:
    return Candidate(name=name, kind="library", work=work, compute_efficiency=efficiency, memory_efficiency=0.9)


def lower_generated(
    builder: Builder,
    operands: Mapping[str, Node],
    captures: Mapping[str, Node],
    sizes: Mapping[str, Any],
    match: Match,
    layout: str,
) -> dict[str, Node]:
    """Add a call of the semantic operation, which runs the generated kernels; its results by name."""
    tensors = list(captures.values())
    if match.spec.dropout:
        device = operands["q"].meta["val"].device
        tensors.append(builder.call(aten.randint.low, 0, _SEEDS, [], dtype=torch.int64, device=device))
    both = builder.call(
        torch.ops.effcompile.attention.default,
        operands["q"], operands["k"], operands["v"], tensors, list(sizes.values()), match.spec.to_json(), layout,
    )  # fmt: skip
    results = {"out": builder.call(operator.getitem, both, 0)}
    wanted = {result.name for result in match.further.values()}
    if wanted:
        results["lse"] = builder.call(operator.getitem, both, 1)
    if "lse in log2" in wanted:
        results["lse in log2"] = builder.call(aten.mul.Tensor, results["lse"], 1 / math.log(2))
    return results


def density_of(spec: AttentionSpec, tq: int, tk: int) -> float:
    """The share of (query, key) pairs that the mask keeps, sampled; data-dependent conditions count as kept."""
    return _density(spec.mask, spec.sizes, tq, tk)


@lru_cache(maxsize=256)
def _density(text: str, sizes: tuple[str, ...], tq: int, tk: int) -> float:
    mask = from_text(text)
    known = sympy.And(*[part for part in sympy.And.make_args(mask) if not part.has(Load)])
    if known is sympy.true:
        return 1.0
    grid = index_tensors(1, 1, min(tq, _SAMPLES), min(tk, _SAMPLES), torch.device("cpu"))
    grid["i"] = grid["i"] * tq // min(tq, _SAMPLES)
    grid["j"] = grid["j"] * tk // min(tk, _SAMPLES)
    values = Evaluator({**grid, **dict.fromkeys(sizes, tk)}, {}, dtype=torch.float32, device=torch.device("cpu"))
    kept = values.tensor(known, torch.bool).float().mean().item()
    return max(kept, 1.0 / _SAMPLES)


FAMILIES: dict[str, Callable[[Match, Hardware], list[Implementation]]] = {
    "attention": _attention,
    "recurrence": recurrence_choices.implementations,
    "experts": experts_choices.implementations,
    "route": route_choices.implementations,
}
