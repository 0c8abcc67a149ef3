"""The text of the kernel file that carries out a match: one function a family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from effcompile.ir import Match

from . import attention, recurrence, scan


def kernel_source(match: Match, arch: str) -> str:
    """The text of the kernel file for an architecture, such as "sm_90"."""
    return SOURCES[match.family](match, arch)


def _attention(match: Match, arch: str) -> str:
    q, v = match.inputs["q"], match.inputs["v"]
    problem = attention.Problem(d_qk=int(q.shape[3]), d_v=int(v.shape[3]), dtype=q.dtype, arch=arch)
    return attention.source(match.spec, problem)


def _recurrence(match: Match, arch: str) -> str:
    x, v = match.inputs, match.inputs["v"]
    if recurrence.steps_alone(match.spec):
        shapes = {name: tuple(1 if n == 1 else 2 for n in x[name].shape) for name in ("gate", "rate") if name in x}
        t, d = (1 if n == 1 else 2 for n in v.shape[2:])
        return scan.source(match.spec, scan.Problem(t=t, d=d, gate=shapes.get("gate"), rate=shapes.get("rate")))
    constant = "gate" in x and all(x[name].shape[2] == 1 for name in ("gate", "rate") if name in x)
    problem = recurrence.Problem(d_k=int(x["k"].shape[3]), d_v=int(v.shape[3]), dtype=v.dtype, arch=arch, constant=constant)
    return recurrence.source(match.spec, problem)


SOURCES: dict[str, Callable[[Match, Any], str]] = {"attention": _attention, "recurrence": _recurrence}
