"""The time of a candidate by the roof that it meets: arithmetic, main memory, or launches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

from ..errors import EstimateError
from ..ir import Candidate, Estimate
from .hardware import Hardware


def estimate(candidate: Candidate, hardware: Hardware, dtype: Any, hints: Mapping[Any, int] | None = None) -> Estimate:
    """Predict one candidate's time in seconds.

        compute = max(flops / (sustained matmul rate * efficiency), transcendentals / exponential rate)
        memory  = bytes / (sustained bandwidth * efficiency)
        launch  = launches * launch latency

    `dtype` is the operands' type; `hints` gives values to the symbols of `candidate.work`, by symbol or by name.

    Raises:
        EstimateError: the work mentions a symbol that has no hint, or is negative, or an efficiency is not in (0, 1].
    """
    for name in ("compute_efficiency", "memory_efficiency"):
        share = getattr(candidate, name)
        if not 0 < share <= 1:
            raise EstimateError(f"Expected an efficiency in (0, 1] but got {name}={share!r} of candidate {candidate.name!r}")
    work = candidate.work
    flops, traffic, exponentials = (
        _value(what, getattr(work, what), candidate.name, hints or {}) for what in ("flops", "bytes", "transcendentals")
    )
    rate = hardware.sustained_matmul_tflops(dtype)
    matmul_s = flops / (rate * 1e12 * candidate.compute_efficiency)
    return Estimate(
        candidate=candidate.name,
        compute_s=max(matmul_s, exponentials / hardware.sustained_exp_per_s),
        memory_s=traffic / (hardware.sustained_bandwidth_gb_s * 1e9 * candidate.memory_efficiency),
        launch_s=work.launches * hardware.launch_us * 1e-6,
        flops=flops,
        bytes=traffic,
        matmul_tflops=rate,
    )


def _value(what: str, expression: Any, candidate: str, hints: Mapping[Any, int]) -> float:
    term = sympy.sympify(expression)
    by_name = {str(symbol): value for symbol, value in hints.items()}
    missing = sorted(s.name for s in term.free_symbols if s.name not in by_name)
    if missing:
        raise EstimateError(f"Expected a hint for each size but got none for {missing!r} in {what} of candidate {candidate!r}")
    value = float(term.subs({s: by_name[s.name] for s in term.free_symbols}))
    if not 0 <= value < float("inf"):
        raise EstimateError(f"Expected finite work >= 0 but got {what}={value!r} of candidate {candidate!r}")
    return value
