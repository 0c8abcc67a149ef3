"""A way to carry out a match: a candidate for the cost model, with what adds it to a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import Node

from effcompile.cost_model.hardware import Hardware
from effcompile.ir import Candidate, Match
from effcompile.viewmaps import hints_of

Lower = Callable[..., "Node | Mapping[str, Node]"]

_TYPICAL_SIZE = 1024  # of a dimension that depends on data


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A candidate for the cost model, with what adds it to a graph; `lower` is None for leaving the original."""

    candidate: Candidate
    lower: Lower | None


def hints_of_match(match: Match) -> dict[str, int]:
    """The symbolic sizes of a match's graph, as they were in the example inputs."""
    hints: dict[str, int] = {}
    for node in match.output.graph.find_nodes(op="placeholder"):
        hints.update(hints_of(node, _TYPICAL_SIZE))
    return hints


def size_as_number(size: Any, hints: Mapping[str, int]) -> int:
    """A size as a number: a symbolic one as it was in the example inputs."""
    term = sympy.sympify(size)
    return int(term.xreplace({s: sympy.Integer(hints.get(s.name, _TYPICAL_SIZE)) for s in term.free_symbols}))


def generates_for(hardware: Hardware) -> bool:
    """Whether kernels are generated for an architecture: NVIDIA from sm_80 on, AMD CDNA 3 and 4."""
    arch = hardware.arch
    return (arch.startswith("sm_") and int(arch.removeprefix("sm_").rstrip("af")) >= 80) or arch in ("gfx942", "gfx950")
