"""Every kernel of every family builds for every target GPU, fits its shared memory and keeps to its registers, on no GPU.

`target_cases.CASES` is the table of kernels, `target_exceptions.EXCEPTIONS` that of known failures: each must still be one.
"""

from __future__ import annotations

import pytest

from effcompile.codegen import aot
from effcompile.errors import KernelError

from .target_cases import CASES, SCANS, STACK_BYTES, TARGETS, Case
from .target_exceptions import EXCEPTIONS

QUICK = {
    ("cuda:80", "recurrence-none-D64"),
    ("cuda:86", "recurrence-key-D64-one-step"),
    ("cuda:89", "attention-causal-D64"),
    ("cuda:90", "attention-sigmoid-D64"),
    ("cuda:90", "decode-cache-D64"),
    ("cuda:90", "scan-selective"),
    ("cuda:90", "recurrence-head-D64-segments"),
    ("cuda:90", "experts-swiglu-bfloat16-along-tile3"),
    ("cuda:100", "attention-gradient-of-bias-D128"),
    ("cuda:120", "attention-window-D128"),
    ("hip:gfx942", "route-sigmoid-groups"),
    ("hip:gfx942", "attention-causal-D64"),
    ("hip:gfx950", "recurrence-none-D64"),
    ("hip:gfx950", "experts-swiglu-bfloat16-along-tile3"),
}
MATRIX = [
    pytest.param(target, case, id=f"{target}-{name}", marks=() if (target, name) in QUICK else pytest.mark.slow)
    for target in TARGETS
    for name, case in CASES.items()
    if target in case.targets
]


def fault_of(case: Case, target: str) -> str:
    """What is wrong with a case on a target, in one line; empty if nothing is."""
    try:
        reports = case.compiled(target)
    except Exception as error:
        return f"error: {_root(error)}"
    built = {report.kernel.removesuffix("_kernel").removesuffix("_hopper") for report in reports}
    assert built >= case.kernels, "the case compiles what it is there for"
    too_large = [f"{report.kernel} takes {report.shared_bytes} bytes" for report in reports if not report.fits]
    spilled = [f"{report.kernel} spills {report.spill_bytes} bytes" for report in reports if report.spill_bytes > STACK_BYTES]
    return "; ".join(too_large + spilled)


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def most_spilled(fault: str) -> int:
    """The largest spill that a fault tells of, in bytes; no other fault may stand beside it."""
    parts = fault.split("; ")
    assert all(" spills " in part for part in parts), fault
    return max(int(part.split()[-2]) for part in parts)


@pytest.mark.parametrize(("target", "case"), MATRIX)
def test_it_builds_and_fits(target: str, case: Case) -> None:
    fault, known = fault_of(case, target), EXCEPTIONS.get((target, case.id))
    if known is None:
        assert fault == ""
        return
    assert fault, f"{target} {case.id} is as it should be: take it off the exceptions ({known.reason})"
    if known.error:
        assert known.error in fault
    else:
        assert STACK_BYTES < most_spilled(fault) <= known.bytes


def test_quick_cases_and_exceptions_are_of_the_table() -> None:
    pairs = {(target, name) for name, case in CASES.items() for target in case.targets}
    assert pairs >= QUICK
    assert EXCEPTIONS.keys() <= pairs
    assert {target for target, _ in QUICK} == set(TARGETS)
    assert {CASES[name].family for _, name in QUICK} == {case.family for case in CASES.values()}
    assert all(known.reason and bool(known.bytes) != bool(known.error) for known in EXCEPTIONS.values())


def test_a_spill_and_too_much_shared_memory_are_faults() -> None:
    def case(**usage: int) -> Case:
        report = aot.Report(
            kernel="x_kernel", target="cuda:89", **{"registers": 255, "spill_bytes": 0, "shared_bytes": 1024} | usage
        )
        return Case(family="made", name="up", compiled=lambda target: [report], kernels=frozenset({"x"}))

    assert fault_of(case(), "cuda:89") == ""
    assert fault_of(case(spill_bytes=STACK_BYTES), "cuda:89") == ""
    assert fault_of(case(spill_bytes=24), "cuda:89") == "x_kernel spills 24 bytes"
    assert most_spilled("x_kernel spills 24 bytes; y_kernel spills 8 bytes") == 24
    assert fault_of(case(shared_bytes=100 * 1024), "cuda:89") == "x_kernel takes 102400 bytes"
    with pytest.raises(AssertionError):
        most_spilled("x_kernel takes 102400 bytes")


def test_a_kernel_that_does_not_compile_is_a_fault() -> None:
    def refuse(target: str) -> list[aot.Report]:
        raise KernelError("Expected this but got that.")

    assert fault_of(Case(family="made", name="up", compiled=refuse, kernels=frozenset()), "cuda:89").startswith("error: Expected")


def test_an_unknown_target_is_refused_for_scans() -> None:
    with pytest.raises(KernelError, match="Expected one of .* but got target='cuda:1'"):
        aot.compile_scan(*SCANS["rated"], target="cuda:1")
