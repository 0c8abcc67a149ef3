"""Which candidate to carry out: the one with the shortest predicted time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import EstimateError
from ..ir import Candidate, Estimate
from .hardware import Hardware
from .roofline import estimate


def choose(
    candidates: Sequence[Candidate], hardware: Hardware, dtype: Any, hints: Mapping[Any, int] | None = None
) -> tuple[Candidate, tuple[Estimate, ...]]:
    """The fastest candidate, and the estimates of all in the order given. Among equals the first wins.

    Raises:
        EstimateError: there are no candidates, two have one name, or a candidate cannot be estimated.
    """
    candidate_names = [candidate.name for candidate in candidates]
    if not candidates or len(set(candidate_names)) != len(candidate_names):
        raise EstimateError(f"Expected candidates with different names but got candidates={candidate_names!r}")
    estimates = tuple(estimate(candidate, hardware, dtype, hints) for candidate in candidates)
    best = min(range(len(estimates)), key=lambda index: estimates[index].total_s)
    return candidates[best], estimates
