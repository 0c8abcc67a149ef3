"""The time of one kernel launch, from what its programs do and how they share the device's processors.

A launch starts P programs of n iterations each (L the longest). A processor holds at most

    occ = min(its registers / (lanes * warps * registers a thread), its shared memory / a program's, its threads / a program's)

of them. With r = min(occ, ceil(P / processors)) of them side by side, work passes through the device in

    rounds = P / (r * processors), rounded up where programs are alike

since a last round that is not full takes as long as a full one, unless short programs are left for it, as under a causal mask whose
longest rows start first. How alike: e = 2 n / L - 1, between 0 (lengths from nothing to L) and 1 (all the same).

An iteration of r programs takes the time of the resource that it keeps busiest, and of the others what does not overlap:

    roofs  = r flops / matmul rate,  r exponentials / their rate,  r vector operations / 128 a clock,  r shared bytes / 128 a clock
    busy   = max(roofs) + (1 - overlap) (sum - max of one program's roofs) / parts
    own    = busy for r = 1, + links * clocks of a link: what a program takes that has the processor to itself
    alone  = max(own, latency / (stages - 1)); with one stage, own + latency
    t      = max(busy, alone, r bytes / second-level rate, r * processors * main memory's bytes / bandwidth)

`parts` of one program run beside one another, as specialised warps do. Links are products and sums of one iteration that wait for
one another. Finally, with three latencies for a program's first loads, its first products and its last stores,

    outside = 3 latency + r outside bytes / second-level rate
    T       = launch latency + max(rounds (n t + outside), L t + outside)

so that one round of a tiny grid takes the time of its longest program, and a huge grid that of its busiest resource.

Every quantity of `Launch` may be a number or a sympy expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import sympy

from ..errors import EstimateError
from .hardware import Hardware

Quantity = Any  # a number or a sympy expression

MOST_REGISTERS = 255  # of a thread
_LANES_A_CLOCK = 128  # float32 operations that an SM's four schedulers issue each clock
_SHARED_BYTES_A_CLOCK = 128  # 32 banks of 4 bytes
_RESERVED_SHARED = 1024  # bytes of shared memory that the driver keeps for itself, of each program
_MOST_PROGRAMS = 32
_TINY = 1e-9  # stands for nothing where it is divided by
_REGISTER_STEP = 8  # registers of a thread are allotted in steps


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What a profile does not say and a fit may change. All but `overlap` are positive.

    Attributes:
        matmul: share of the sustained matmul rate that a loop reaches; what compilers' schedules leave of large GEMMs' rate.
        memory: share of the sustained bandwidth.
        l2_bytes_clock_sm: bytes from the second-level cache an SM takes each clock: about 6 TB/s over an H100's 132 SMs.
        overlap: of the roofs that a program meets beside the busiest one, the share that runs at the same time.
        latency_clocks: from a load's start to its data in shared memory, with the barrier behind it.
        link_clocks: between a product's start and that of another that reads its result, beside what the units take for it.
    """

    matmul: float = 0.95
    memory: float = 0.9
    l2_bytes_clock_sm: float = 26.0
    overlap: float = 0.6
    latency_clocks: float = 800.0
    link_clocks: float = 170.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not (0 <= value <= 1 if item.name == "overlap" else value > 0):
                raise EstimateError(f"Expected a positive factor (overlap: in [0, 1]) but got {item.name}={value!r}")


DEFAULT = Factors()


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What one kernel launch does. Quantities of an iteration are those of one program.

    Attributes:
        programs: of the grid.
        iterations: of a program's loop, on average; `longest` of the longest program, the same if not given.
        flops: of matrix products, an iteration.
        exponentials, vector: special functions and other float32 operations, an iteration.
        loaded: bytes that an iteration brings from the second-level cache.
        shared: bytes that an iteration's products read from shared memory.
        outside: bytes that a program loads and stores outside its loop.
        memory: different bytes of main memory that the whole launch reads and writes.
        dtype: of the products.
        warps, registers, shared_bytes: of a program: its warps, registers a thread, bytes of shared memory.
        spilled: bytes of registers a thread that spilled, written and read once an iteration.
        stages: loads in flight, the one at work included.
        parts: independent parts of a program that run beside one another.
        links: products and sums of an iteration that wait for one another.
    """

    name: str
    programs: Quantity
    iterations: Quantity
    longest: Quantity | None = None
    flops: Quantity = 0
    exponentials: Quantity = 0
    vector: Quantity = 0
    loaded: Quantity = 0
    shared: Quantity = 0
    outside: Quantity = 0
    memory: Quantity = 0
    dtype: Any = "bfloat16"
    warps: int = 4
    registers: int = 128
    shared_bytes: Quantity = 0
    spilled: int = 0
    stages: int = 2
    parts: int = 1
    links: Quantity = 0


@dataclass(frozen=True)
class _Processor:
    """Registers and threads that one processor holds, and the threads of a warp."""

    registers: int = 65536
    threads: int = 2048
    lanes: int = 32


# CUDA's programming guide, "Technical specifications per compute capability"; AMD's CDNA 3 whitepaper.
_PROCESSORS = MappingProxyType(
    {
        "sm_75": _Processor(threads=1024),
        **dict.fromkeys(("sm_86", "sm_89", "sm_120"), _Processor(threads=1536)),
        **dict.fromkeys(("gfx942", "gfx950"), _Processor(registers=131072, threads=2048, lanes=64)),
    }
)


def occupancy(launch: Launch, hardware: Hardware) -> Quantity:
    """How many programs of a launch one processor holds at once; 0: not even one."""
    has = _PROCESSORS.get(hardware.arch, _Processor())
    threads = launch.warps * has.lanes
    registers = -(-launch.registers // _REGISTER_STEP) * _REGISTER_STEP
    bounds: list[Quantity] = [has.registers // (threads * max(registers, 1)), has.threads // threads, _MOST_PROGRAMS]
    if _is_symbolic(launch.shared_bytes):
        by_shared = sympy.floor(hardware.smem_sm_kb * 1024 / (launch.shared_bytes + _RESERVED_SHARED))
        return sympy.Min(*bounds, by_shared)
    if launch.shared_bytes > hardware.smem_block_kb * 1024:
        return 0
    reserved = _RESERVED_SHARED if hardware.smem_sm_kb > hardware.smem_block_kb else 0
    if launch.shared_bytes:
        bounds.append(int(hardware.smem_sm_kb * 1024 // (launch.shared_bytes + reserved)))
    return min(bounds)


def seconds(launch: Launch, hardware: Hardware, factors: Factors = DEFAULT) -> Quantity:
    """The time of one launch; infinite where a processor does not hold one program. The formula stands above."""
    held = occupancy(launch, hardware)
    if not _is_symbolic(held) and held < 1:
        return float("inf")
    side_by_side = _max(1, _min(held, _ceiling(launch.programs / hardware.sms)))
    longest = launch.iterations if launch.longest is None else launch.longest
    rounds = _rounds(launch.programs / (side_by_side * hardware.sms), launch.iterations, longest)
    working = _min(launch.programs, side_by_side * hardware.sms)
    each = _iteration(launch, hardware, factors, side_by_side, working)
    outside = _outside(launch, hardware, factors, side_by_side)
    return hardware.launch_us * 1e-6 + _max(rounds * (launch.iterations * each + outside), longest * each + outside)


def total_seconds(launches: Sequence[Launch], hardware: Hardware, factors: Factors = DEFAULT) -> Quantity:
    """The time of launches one after the other."""
    return sum(seconds(launch, hardware, factors) for launch in launches)


def evaluated(launch: Launch, values: dict[Any, float]) -> Launch:
    """The launch with numbers for the symbols of its quantities, by symbol or by name.

    Raises:
        EstimateError: a symbol has no number.
    """
    by_name = {str(symbol): value for symbol, value in values.items()}

    def number(name: str, term: Quantity) -> Quantity:
        if not _is_symbolic(term):
            return term
        missing = sorted(s.name for s in term.free_symbols if s.name not in by_name)
        if missing:
            raise EstimateError(f"Expected a number for each size but got none for {missing!r} in {name} of launch {launch.name!r}")
        return float(term.subs({s: by_name[s.name] for s in term.free_symbols}))

    return replace(launch, **{item.name: number(item.name, getattr(launch, item.name)) for item in fields(launch)})


def _rounds(filled: Quantity, mean: Quantity, longest: Quantity) -> Quantity:
    """Rounds of programs, `filled` if the last one needed not be full."""
    alike = _max(0, 2 * mean / _max(longest, _TINY) - 1)
    return filled + alike * (_ceiling(filled) - filled)


def _iteration(launch: Launch, hardware: Hardware, factors: Factors, side_by_side: Quantity, working: Quantity) -> Quantity:
    clock = hardware.clock_mhz * 1e6
    roofs = [
        launch.flops * hardware.sms / (hardware.sustained_matmul_tflops(launch.dtype) * 1e12 * factors.matmul),
        launch.exponentials / (hardware.exp_per_clock_sm * clock),
        launch.vector / (_LANES_A_CLOCK * clock),
        (launch.shared + 2 * launch.spilled * launch.warps * 32) / (_SHARED_BYTES_A_CLOCK * clock),
    ]
    largest = _max(*roofs)
    rest = (1 - factors.overlap) * (sum(roofs) - largest)
    busy = side_by_side * largest + rest / launch.parts
    latency = factors.latency_clocks / clock
    own = largest + rest / launch.parts + launch.links * factors.link_clocks / clock
    alone = _max(own, latency / (launch.stages - 1)) if launch.stages > 1 else own + latency
    second_level = side_by_side * launch.loaded / (factors.l2_bytes_clock_sm * clock)
    share = launch.memory / _max(launch.programs * launch.iterations, _TINY)
    main = working * share / (hardware.sustained_bandwidth_gb_s * 1e9 * factors.memory)
    return _max(busy, alone, second_level, main)


def _outside(launch: Launch, hardware: Hardware, factors: Factors, side_by_side: Quantity) -> Quantity:
    """Loads and stores outside the loop; programs beside this one compute meanwhile."""
    clock = hardware.clock_mhz * 1e6
    return 3 * factors.latency_clocks / clock + side_by_side * launch.outside / (factors.l2_bytes_clock_sm * clock)


def _is_symbolic(value: Quantity) -> bool:
    return isinstance(value, sympy.Basic) and not value.is_number


def _max(*values: Quantity) -> Quantity:
    return sympy.Max(*values) if any(map(_is_symbolic, values)) else max(values)


def _min(*values: Quantity) -> Quantity:
    return sympy.Min(*values) if any(map(_is_symbolic, values)) else min(values)


def _ceiling(value: Quantity) -> Quantity:
    return sympy.ceiling(value) if _is_symbolic(value) else -int(-value // 1)
