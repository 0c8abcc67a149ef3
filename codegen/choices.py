"""The implementations of each semantic operation: what each costs, and how it enters a graph.

A new family adds one function to `FAMILIES`.
"""

from __future__ import annotations

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
from effcompile.viewmaps import hints_of

from . import sdpa

Lower = Callable[..., Node]

_SAMPLES = 64
_TYPICAL_SIZE = 1024  # of a dimension that depends on data
_QUERY_TILE = 128
_MAX_DEPTH = 256  # of generated kernels
_SDPA_MAX_DEPTH = 256
_CPU_TRAINING_KEYS = 512  # below it the fused backward on a CPU is slower than Inductor's (benchmarks/cpu_attention.py)


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A candidate for the cost model, with what adds it to a graph; `lower` is None for leaving the original."""

    candidate: Candidate
    lower: Lower | None


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
        return self.bytes * self.b * (self.h * self.tq * (self.d + self.dv) + self.hk * self.tk * (self.d + self.dv))

    @property
    def pairs(self) -> int:
        return self.b * self.h * self.tq * self.tk


def _shape(match: Match) -> _Shape:
    hints = _hints(match)
    q, k, v = ([_number(n, hints) for n in match.inputs[name].shape] for name in ("q", "k", "v"))
    return _Shape(q[0], q[1], k[1], q[2], k[2], q[3], v[3], torch.finfo(match.inputs["q"].dtype).bits // 8)


def _hints(match: Match) -> dict[str, int]:
    hints: dict[str, int] = {}
    for node in match.output.graph.find_nodes(op="placeholder"):
        hints.update(hints_of(node, _TYPICAL_SIZE))
    return hints


def _number(size: Any, hints: Mapping[str, int]) -> int:
    """A size as a number: a symbolic one as it was in the example inputs."""
    term = sympy.sympify(size)
    return int(term.xreplace({s: sympy.Integer(hints.get(s.name, _TYPICAL_SIZE)) for s in term.free_symbols}))


def _attention(match: Match, hardware: Hardware) -> list[Implementation]:
    spec, shape = match.spec, _shape(match)
    flops, density = 2 * shape.pairs * (shape.d + shape.dv), density_of(spec, shape.tq, shape.tk)
    exponentials = shape.pairs * (1 + spec.score.count("tanh"))
    fused = Work(flops=flops * density, bytes=shape.operands, transcendentals=exponentials * density)
    found = []
    if generates_for(hardware) and max(shape.d, shape.dv) <= _MAX_DEPTH:
        found.append(Implementation(candidate=_generated(fused, shape, hardware), lower=lower_generated))
    found += _library(match, shape, hardware, fused)
    scores = shape.pairs * (2 * shape.bytes + 2 * shape.bytes)
    unfused = Work(flops=flops, bytes=shape.operands + scores, transcendentals=exponentials, launches=3)
    own = Candidate(name="inductor", kind="inductor", work=unfused, compute_efficiency=0.7, memory_efficiency=0.9)
    return [*found, Implementation(candidate=own, lower=None)]


def _generated(work: Work, shape: _Shape, hardware: Hardware) -> Candidate:
    """Tiles of queries are computed whole, and each is one program: few queries waste arithmetic, few programs waste processors."""
    tiles = -(-shape.tq // _QUERY_TILE)
    padding = tiles * _QUERY_TILE / shape.tq
    occupied = min(1.0, shape.b * shape.h * tiles / hardware.sms)
    padded = Work(flops=work.flops * padding, bytes=work.bytes, transcendentals=work.transcendentals * padding)
    return Candidate(
        name="triton", kind="generated", work=padded, compute_efficiency=0.5 * occupied, memory_efficiency=0.8 * occupied
    )  # fmt: skip


def generates_for(hardware: Hardware) -> bool:
    """Whether kernels are generated for an architecture: NVIDIA from sm_80 on, AMD CDNA 3 and 4."""
    arch = hardware.arch
    return (arch.startswith("sm_") and int(arch.removeprefix("sm_").rstrip("af")) >= 80) or arch in ("gfx942", "gfx950")


def _library(match: Match, shape: _Shape, hardware: Hardware, fused: Work) -> list[Implementation]:
    call = sdpa.as_call(
        match.spec, square=shape.tq == shape.tk and str(match.inputs["q"].shape[2]) == str(match.inputs["k"].shape[2])
    )
    if call is None or shape.d != shape.dv:
        return []
    if hardware.vendor == "cpu":
        if shape.bytes != 4 or (match.trains and not _trains_on_cpu(call, shape)):
            return []
        extra = 0 if call.attn_mask is None else shape.b * shape.tq * shape.tk * shape.bytes
        work = Work(flops=fused.flops, bytes=fused.bytes + extra, transcendentals=fused.transcendentals)
        return [Implementation(candidate=_named("sdpa-flash-cpu", work, 0.6), lower=sdpa.lower)]
    if call.attn_mask is not None or shape.bytes != 2 or shape.d > _SDPA_MAX_DEPTH or shape.d % 8:
        return []
    found = [Implementation(candidate=_named("sdpa-flash", fused, 0.45), lower=sdpa.lower)]
    if hardware.arch in ("sm_90", "sm_100") and shape.d <= 128 and shape.tq > 1:
        found.append(Implementation(candidate=_named("sdpa-cudnn", fused, 0.75), lower=sdpa.lower_cudnn))
    return found


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
) -> Node:
    """Add a call of the semantic operation, which runs the generated kernels."""
    both = builder.call(
        torch.ops.effcompile.attention.default,
        operands["q"], operands["k"], operands["v"], list(captures.values()), list(sizes.values()), match.spec.to_json(), layout,
    )  # fmt: skip
    return builder.call(operator.getitem, both, 0)


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


FAMILIES: dict[str, Callable[[Match, Hardware], list[Implementation]]] = {"attention": _attention}
