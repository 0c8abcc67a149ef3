"""Which kernels are compiled for which targets: one table, of all families, in the configurations that the project chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from effcompile.codegen import aot, experts, recurrence
from effcompile.codegen.attention import Problem
from effcompile.ops.attention import AttentionSpec
from effcompile.ops.experts import ExpertsSpec
from effcompile.ops.recurrence import RecurrenceSpec
from effcompile.ops.route import RouteSpec

TARGETS = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx950")
STACK_BYTES = 16  # the assembler's own frame of up to four registers, in the smallest kernels too; a spill takes more
HALF = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: `compiled(target)` are the reports of its kernels, of which `kernels` are the least that there must be."""

    family: str
    name: str
    compiled: Callable[[str], list[aot.Report]]
    kernels: frozenset[str]
    targets: tuple[str, ...] = TARGETS

    @property
    def id(self) -> str:
        return f"{self.family}-{self.name}"


# -------------------------------------------------------------------------------------------------------------------- attention

DIMS = {"D64": (64, 64), "D128": (128, 128), "D256": (256, 256), "D192-128": (192, 128)}
LATENT = {"D576-512": (576, 512)}
ATTENTION = {
    "causal": AttentionSpec(score="s * 0.088", mask="j <= i"),
    "window": AttentionSpec(score="s * 0.088", mask="(j <= i) & (i - j < 1024)"),
    "documents": AttentionSpec(score="s * 0.088", mask="(j <= i) & (t0.i[b, i] == t0.i[b, j])", captures=("t0",)),
    "soft-cap": AttentionSpec(score="50 * tanh(s * 0.0625 / 50)", mask="j <= i"),
    "sigmoid": AttentionSpec(score="sigmoid(s * 0.088 - 9.0)", mask="j <= i", normaliser="none", empty="zero"),
    "dropout": AttentionSpec(score="s * 0.088", mask="j <= i", captures=("seed",), dropout=0.1),
}
LEARNED = {
    "bias": AttentionSpec(score="s * 0.088 + t0.f[0, h, i, j]", mask="j <= i", captures=("t0",), learned=("t0",)),
    "buckets": AttentionSpec(score="s * 0.088 + t0.f[t1.i[i, j], h]", captures=("t0", "t1"), learned=("t0",)),
    "slopes": AttentionSpec(
        score="s * 0.088 + t0.f[h] * (j - i)", mask="(j <= i) & (t1.i[b, i] == t1.i[b, j])", captures=("t0", "t1"), learned=("t0",)
    ),
    "by-key": AttentionSpec(score="s * 0.088 + t0.f[b, j]", mask="j <= i", captures=("t0",), learned=("t0",)),
}
DECODING = {
    "cache": AttentionSpec(score="s * 0.088", mask="j <= i + t0.i[0]", captures=("t0",)),
    "window": AttentionSpec(score="s * 0.088", mask="(j <= i + t0.i[0]) & (i + t0.i[0] - j < 1024)", captures=("t0",)),
    "padding": AttentionSpec(score="s * 0.088", mask="(j <= i + t0.i[0]) & bool(t1.b[b, j])", captures=("t0", "t1"), empty="mean"),
    "soft-cap": AttentionSpec(score="50 * tanh(s * 0.0625 / 50)"),
    "sink": AttentionSpec(score="s * 0.088", sink="t0.f[h]", captures=("t0",)),
    "sigmoid": AttentionSpec(score="sigmoid(s * 0.088 - 9.0)", normaliser="none", empty="zero"),
}


def _problem(dims: str, target: str, *, dtype: torch.dtype = HALF, copies: bool = True) -> Problem:
    d_qk, d_v = (DIMS | LATENT)[dims]
    return Problem(d_qk=d_qk, d_v=d_v, dtype=dtype, arch=aot.architecture(target), copies=copies)


def _attention(
    target: str, spec: AttentionSpec, dims: str, dtype: torch.dtype = HALF, copies: bool = True, only: tuple[str, ...] | None = None
) -> list[aot.Report]:
    return aot.compile_kernels(spec, _problem(dims, target, dtype=dtype, copies=copies), target=target, kernels=only)


def _decode(target: str, spec: AttentionSpec, dims: str) -> list[aot.Report]:
    """Groups of heads of each height of tiles, in one part and in eight."""
    found = []
    for group in (4, 32, 64, 128):
        # V apart from K, as deep as in latent attention, spills a little in higher tiles
        for latent in ((True, False) if group == 4 else (True,)) if dims in LATENT else (False,):
            for splits in (1, 8):
                problem = _problem(dims, target)
                found += aot.compile_decode(spec, problem, target=target, group=group, splits=splits, latent=latent)
    return found


def _attention_cases() -> list[Case]:
    found = []
    for name, spec in ATTENTION.items():
        kernels = frozenset({"forward", "dq", "dkv"} | ({"delta"} if spec.normaliser == "softmax" else set()))
        for dims in DIMS:
            compiled = partial(_attention, spec=spec, dims=dims)
            found.append(Case(family="attention", name=f"{name}-{dims}", compiled=compiled, kernels=kernels))
            loaded = partial(_attention, spec=spec, dims=dims, copies=False)
            found.append(
                Case(family="attention", name=f"{name}-{dims}-loaded", compiled=loaded, kernels=kernels, targets=("cuda:90",))
            )
    full = partial(_attention, spec=ATTENTION["causal"], dims="D128", dtype=torch.float32)
    found.append(
        Case(family="attention", name="causal-D128-float32", compiled=full, kernels=frozenset({"forward", "delta", "dq", "dkv"}))
    )
    for name, spec in LEARNED.items():
        for dims in DIMS:
            compiled = partial(_attention, spec=spec, dims=dims, only=("captured_kernel",))
            found.append(
                Case(family="attention", name=f"gradient-of-{name}-{dims}", compiled=compiled, kernels=frozenset({"captured"}))
            )
    return found


def _decode_cases() -> list[Case]:
    kernels = frozenset({"decode", "combine"})
    return [
        Case(family="decode", name=f"{name}-{dims}", compiled=partial(_decode, spec=spec, dims=dims), kernels=kernels)
        for name, spec in DECODING.items()
        for dims in (*DIMS, *LATENT)
    ]


# ------------------------------------------------------------------------------------------------------------------- recurrences

RECURRENCES = {
    "none": RecurrenceSpec(operands=("q", "k", "initial"), out="bfloat16"),
    "head": RecurrenceSpec(operands=("q", "k", "gate", "initial"), decay="head", out="bfloat16"),
    "normaliser": RecurrenceSpec(operands=("q", "k", "gate"), decay="head", normaliser=True, out="bfloat16"),
    "bonus": RecurrenceSpec(operands=("q", "k", "bonus"), read="before", out="bfloat16"),
    "key": RecurrenceSpec(operands=("q", "k", "gate", "initial"), decay="key", out="bfloat16"),
    "value": RecurrenceSpec(operands=("q", "k", "gate", "initial"), decay="value", out="bfloat16"),
}
WIDTHS = (64, 128, 256)


def _chunks(target: str, spec: RecurrenceSpec, width: int, segments: int = 1) -> list[aot.Report]:
    """Each tile of the configuration, forward and backward; in several segments, forward alone."""
    problem = recurrence.Problem(d_k=width, d_v=width, dtype=HALF, arch=aot.architecture(target))
    tiles = len(recurrence.default_config(spec, problem).tiles)
    directions = ("forward", "backward") if segments == 1 else ("forward",)
    built = partial(aot.compile_recurrence, spec, problem, target=target, segments=segments, directions=directions)
    return [report for tile in range(tiles) for report in built(tile=tile)]


def _steps(target: str, spec: RecurrenceSpec, width: int) -> list[aot.Report]:
    problem = recurrence.Problem(d_k=width, d_v=width, dtype=HALF, arch=aot.architecture(target))
    return aot.compile_recurrence(spec, problem, target=target, steps=1, directions=("forward",))


def _recurrence_cases() -> list[Case]:
    found = []
    for name, spec in RECURRENCES.items():
        by_gate = spec.decay in ("key", "value")
        passes = frozenset({"chain"} if by_gate else {"replay"})
        for width in WIDTHS:
            whole, parts = partial(_chunks, spec=spec, width=width), partial(_chunks, spec=spec, width=width, segments=4)
            found.append(Case(family="recurrence", name=f"{name}-D{width}", compiled=whole, kernels=passes))
            found.append(Case(family="recurrence", name=f"{name}-D{width}-segments", compiled=parts, kernels=passes | {"carry"}))
            if "initial" in spec.operands:
                steps = partial(_steps, spec=spec, width=width)
                found.append(
                    Case(family="recurrence", name=f"{name}-D{width}-one-step", compiled=steps, kernels=frozenset({"step"}))
                )
    return found


# ------------------------------------------------------------------------------------------------------------------------- scans

ScanProblem = tuple[RecurrenceSpec, Tensor, list[Tensor]]


def _shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _heads_last(b: int, h: int, t: int, d: int, dtype: torch.dtype) -> Tensor:
    return _shaped(b, t, h, d, dtype=dtype).transpose(1, 2)


def _gated(b: int, h: int, t: int, d: int, dtype: torch.dtype, **fields: str) -> ScanProblem:
    """HGRN, minGRU and the like."""
    v, gate = _heads_last(b, h, t, d, dtype), _heads_last(b, h, t, d, dtype).unsqueeze(3)
    spec = RecurrenceSpec(operands=("gate", "initial"), decay="value", out=str(dtype).removeprefix("torch."), **fields)  # type: ignore[arg-type]
    return spec, v, [gate, _shaped(b, h, 1, d)]


def _rated(b: int, t: int, d: int) -> ScanProblem:
    """RG-LRU: a logarithm times a rate of each channel."""
    spec = RecurrenceSpec(operands=("gate", "rate"), decay="value")
    return spec, _shaped(b, 1, t, d), [_shaped(b, 1, t, 1, d), _shaped(1, 1, 1, 1, d)]


def _selective(b: int, t: int, d: int, n: int, dtype: torch.dtype = torch.float32) -> ScanProblem:
    """Mamba."""
    spec = RecurrenceSpec(operands=("q", "k", "gate", "rate"), decay="full", out=str(dtype).removeprefix("torch."))
    key, gate = _shaped(b, 1, t, n, dtype=dtype), _shaped(b, 1, t, 1, d, dtype=dtype)
    return spec, _shaped(b, 1, t, d, dtype=dtype), [key, key, gate, _shaped(1, 1, 1, n, d)]


SCANS: dict[str, ScanProblem] = {
    "few-columns": _gated(1, 1, 8192, 1024, torch.float32),
    "some-columns": _gated(1, 32, 8192, 128, HALF),
    "many-columns": _gated(4, 64, 4096, 128, HALF),
    "many-columns-float32": _gated(8, 32, 2048, 256, torch.float32),
    "factor-before": _gated(8, 8, 1024, 64, torch.float32, gate="factor", read="before"),
    "one-step": _gated(1, 32, 1, 128, torch.float32),
    "rated": _rated(1, 2048, 2560),
    "selective": _selective(1, 2048, 5120, 16),
    "selective-batch": _selective(8, 2048, 5120, 16, HALF),
    "selective-one-step": _selective(1, 1, 5120, 16),
}


def _scan(target: str, name: str) -> list[aot.Report]:
    return aot.compile_scan(*SCANS[name], target=target)


def _scan_cases() -> list[Case]:
    kernels = {name: {"forward", "backward"} | ({"summary"} if name == "few-columns" else set()) for name in SCANS}
    return [
        Case(family="scan", name=name, compiled=partial(_scan, name=name), kernels=frozenset(found))
        for name, found in kernels.items()
    ]


# ----------------------------------------------------------------------------------------------------------- experts and routers

GPT_OSS = "min(gate, 7) * sigmoid(1.702 * min(gate, 7)) * (max(-7, min(up, 7)) + 1)"
EXPERTS = {
    "swiglu": ExpertsSpec(out="bfloat16"),
    "interleaved": ExpertsSpec(activation=GPT_OSS, interleaved=True, biased=(True, True), out="bfloat16"),
    "pair-input": ExpertsSpec(stacking="pair", weighted="input", biased=(True, True), out="bfloat16"),
    "ungated": ExpertsSpec(activation="max(0, up) ** 2", gated=False, out="bfloat16"),
    "apart": ExpertsSpec(stacking="experts_pair", biased=(True, False), out="bfloat16"),
}
ROUTERS = {
    "softmax": RouteSpec(k=3, norm=1),
    "softmax-after": RouteSpec(k=4, score_after=True),
    "softmax-groups": RouteSpec(k=3, groups=4, kept_groups=2, group_fill="zero", scale=16.0),
    "p-norm": RouteSpec(k=3, norm=2, eps=1e-3, scale=0.5),
    "sigmoid-after": RouteSpec(k=3, score="sigmoid", score_after=True, norm=1, eps=0.1),
    "sigmoid-groups": RouteSpec(
        k=4, score="sigmoid", select_bias=True, groups=4, kept_groups=2, group_stat="top2", norm=1, eps=1e-20, scale=2.5
    ),
}


def _experts(target: str, spec: ExpertsSpec, dtype: torch.dtype, tile: int, along: bool) -> list[aot.Report]:
    problem = experts.Problem(dtype=dtype, arch=aot.architecture(target))
    return aot.compile_experts(spec, problem, target=target, tile=tile, along=along)


def _few_experts(target: str, spec: ExpertsSpec, along: bool) -> list[aot.Report]:
    problem = experts.Problem(dtype=HALF, arch=aot.architecture(target))
    return aot.compile_experts(spec, problem, target=target, tokens=1, along=along, keep=False, directions=("forward",))


def _route(target: str, spec: RouteSpec) -> list[aot.Report]:
    """Few and many experts, many tokens and few."""
    sizes = ((8, 4096), (256, 4096), (512, 16))
    built = partial(aot.compile_route, spec, target=target, dtype=HALF)
    return [report for count, tokens in sizes for report in built(experts=count, tokens=tokens)]


def _experts_cases() -> list[Case]:
    found = []
    for name, spec in EXPERTS.items():
        kernels = {"count", "order", "first", "rows", "combine", "slopes", "route", "outer"}
        kernels |= {"sums"} if any(spec.biased) else set()
        apart = set() if spec.is_stacked else {"reach"}
        for along in (True, False):
            place = "along" if along else "across"
            for dtype, tiles in ((HALF, 4), (torch.float32, 3)):
                for tile in range(tiles):
                    compiled = partial(_experts, spec=spec, dtype=dtype, tile=tile, along=along)
                    full = f"{name}-{str(dtype).removeprefix('torch.')}-{place}-tile{tile}"
                    found.append(Case(family="experts", name=full, compiled=compiled, kernels=frozenset(kernels | apart)))
            few = partial(_few_experts, spec=spec, along=along)
            names = frozenset({"few_first", "few_second", "combine"} | apart)
            found.append(Case(family="experts", name=f"{name}-few-{place}", compiled=few, kernels=names))
    return found


def _route_cases() -> list[Case]:
    kernels = frozenset({"forward", "backward"})
    return [Case(family="route", name=name, compiled=partial(_route, spec=spec), kernels=kernels) for name, spec in ROUTERS.items()]


CASES: dict[str, Case] = {
    case.id: case
    for case in chain(
        _attention_cases(), _decode_cases(), _recurrence_cases(), _scan_cases(), _experts_cases(), _route_cases()
    )
}  # fmt: skip
