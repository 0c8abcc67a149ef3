"""Kernels that do not build or that spill on a target today, each with its reason: tests fail once one of them no longer does.

Spills are bounds, in bytes a thread, above what Triton 3.7 leaves.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Known:
    """A failure: spills of up to so many `bytes`, or a part of the compiler's `error`."""

    reason: str
    bytes: int = 0
    error: str = ""


SPILLS: dict[str, dict[str, dict[str, int]]] = {  # by reason, target and case
    "float32's tiles are one rule for all devices, which was made for none of them": {
        "cuda:100": {
            "attention-causal-D128-float32": 2240,
        },
        "cuda:120": {
            "attention-causal-D128-float32": 2752,
        },
        "cuda:80": {
            "attention-causal-D128-float32": 2048,
        },
        "cuda:86": {
            "attention-causal-D128-float32": 1536,
        },
        "cuda:89": {
            "attention-causal-D128-float32": 1536,
        },
        "cuda:90": {
            "attention-causal-D128-float32": 1856,
        },
    },
    "a pass over time holds the state, a chunk's weights and its sums; smaller tiles have not been timed on this device": {
        "cuda:100": {
            "recurrence-bonus-D128": 128,
            "recurrence-bonus-D128-segments": 64,
            "recurrence-bonus-D256": 320,
            "recurrence-bonus-D256-segments": 256,
            "recurrence-head-D128": 128,
            "recurrence-head-D128-segments": 64,
            "recurrence-head-D256": 832,
            "recurrence-head-D256-segments": 320,
            "recurrence-none-D128": 64,
            "recurrence-none-D256": 256,
            "recurrence-normaliser-D128": 512,
            "recurrence-normaliser-D128-segments": 448,
            "recurrence-normaliser-D256": 960,
            "recurrence-normaliser-D256-segments": 512,
            "recurrence-normaliser-D64": 64,
        },
        "cuda:120": {
            "recurrence-bonus-D64": 128,
            "recurrence-bonus-D64-segments": 128,
            "recurrence-head-D128": 128,
            "recurrence-head-D256": 64,
            "recurrence-normaliser-D128": 192,
            "recurrence-normaliser-D256": 64,
            "recurrence-normaliser-D64": 64,
        },
        "cuda:86": {
            "recurrence-bonus-D64": 64,
            "recurrence-normaliser-D64-segments": 64,
        },
        "cuda:89": {
            "recurrence-bonus-D64": 64,
            "recurrence-normaliser-D64-segments": 64,
        },
        "cuda:90": {
            "recurrence-bonus-D128": 512,
            "recurrence-bonus-D128-segments": 384,
            "recurrence-bonus-D256": 704,
            "recurrence-bonus-D256-segments": 704,
            "recurrence-bonus-D64": 64,
            "recurrence-bonus-D64-segments": 64,
            "recurrence-head-D128": 128,
            "recurrence-head-D128-segments": 64,
            "recurrence-head-D256": 896,
            "recurrence-head-D256-segments": 320,
            "recurrence-none-D128": 64,
            "recurrence-none-D256": 192,
            "recurrence-none-D256-segments": 128,
            "recurrence-normaliser-D128": 512,
            "recurrence-normaliser-D128-segments": 512,
            "recurrence-normaliser-D256": 1088,
            "recurrence-normaliser-D256-segments": 1280,
            "recurrence-normaliser-D64": 64,
        },
        "hip:gfx942": {
            "recurrence-bonus-D256": 64,
            "recurrence-head-D128": 192,
            "recurrence-head-D256": 512,
            "recurrence-head-D256-segments": 192,
            "recurrence-normaliser-D128": 320,
            "recurrence-normaliser-D256": 1536,
            "recurrence-normaliser-D256-segments": 576,
            "recurrence-normaliser-D64": 64,
        },
        "hip:gfx950": {
            "recurrence-head-D128": 192,
            "recurrence-head-D256": 448,
            "recurrence-head-D256-segments": 64,
            "recurrence-normaliser-D128": 1280,
            "recurrence-normaliser-D256": 1408,
            "recurrence-normaliser-D256-segments": 384,
        },
    },
    "gradients of pairs within a chunk hold both operands with their scales; smaller blocks spill as much": {
        "cuda:100": {
            "recurrence-key-D128": 448,
            "recurrence-key-D64": 448,
        },
        "cuda:120": {
            "recurrence-key-D128": 384,
            "recurrence-key-D256": 64,
            "recurrence-key-D64": 384,
            "recurrence-value-D128": 256,
            "recurrence-value-D64": 256,
        },
        "cuda:80": {
            "recurrence-key-D128": 384,
            "recurrence-key-D256": 384,
            "recurrence-key-D64": 384,
            "recurrence-value-D128": 256,
            "recurrence-value-D256": 256,
            "recurrence-value-D64": 256,
        },
        "cuda:86": {
            "recurrence-key-D128": 448,
            "recurrence-key-D256": 64,
            "recurrence-key-D64": 448,
            "recurrence-value-D128": 256,
            "recurrence-value-D64": 256,
        },
        "cuda:89": {
            "recurrence-key-D128": 448,
            "recurrence-key-D256": 64,
            "recurrence-key-D64": 448,
            "recurrence-value-D128": 256,
            "recurrence-value-D64": 256,
        },
        "cuda:90": {
            "recurrence-key-D128": 448,
            "recurrence-key-D256": 448,
            "recurrence-key-D64": 448,
            "recurrence-value-D128": 384,
            "recurrence-value-D256": 384,
            "recurrence-value-D64": 384,
        },
    },
    "dK and dV of narrow heads need a few registers more than there are, in tiles that sm_86 and sm_89 hold": {
        "cuda:120": {
            "attention-causal-D64": 64,
            "attention-dropout-D64": 64,
            "attention-sigmoid-D64": 64,
            "attention-soft-cap-D64": 128,
            "attention-window-D64": 64,
        },
    },
}

EXCEPTIONS: dict[tuple[str, str], Known] = {
    (target, case): Known(bytes=most, reason=reason)
    for reason, by_target in SPILLS.items()
    for target, cases in by_target.items()
    for case, most in cases.items()
}
