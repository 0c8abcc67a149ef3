"""The time of a kernel launch by the schedule model: limits, monotonicity, symbols."""

from __future__ import annotations

import dataclasses
import math

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from effcompile.cost_model import devices
from effcompile.cost_model.fit import fit
from effcompile.cost_model.profiles import PROFILES
from effcompile.cost_model.schedule import DEFAULT, Factors, Launch, evaluated, occupancy, seconds, total_seconds
from effcompile.errors import EstimateError

H100 = devices.get("h100-sxm")


def launch(**changes) -> Launch:
    """A product of 128 x 128 x 64 an iteration, two programs to a processor."""
    given = {
        "programs": 1320, "iterations": 64, "flops": 2 * 128 * 128 * 64, "loaded": 4096, "warps": 8, "registers": 128,
        "shared_bytes": 96 * 1024, "stages": 3, "memory": 10_000_000,
    }  # fmt: skip
    return Launch(name="product", **{**given, **changes})


# limits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_a_huge_grid_takes_the_time_of_the_busiest_resource(profile):
    work = launch(programs=10**7, shared_bytes=0, stages=8, loaded=0, memory=0, iterations=1024)
    if not occupancy(work, profile):
        pytest.skip("needs more threads than this device has")
    roof = work.flops * work.programs * 1024 / (profile.sustained_matmul_tflops("bfloat16") * 1e12 * DEFAULT.matmul)
    assert seconds(work, profile) == pytest.approx(roof, rel=0.05)


def test_a_stream_takes_the_time_of_main_memory():
    work = launch(programs=10**6, flops=0, memory=10**12)
    assert seconds(work, H100) == pytest.approx(10**12 / (3.0e12 * DEFAULT.memory), rel=0.02)


def test_one_round_takes_one_program_however_many_there_are():
    """Fewer programs than processors: what each takes from memory is too little to matter."""
    assert seconds(launch(programs=1, memory=0), H100) == pytest.approx(seconds(launch(programs=132, memory=0), H100))


def test_an_empty_launch_takes_its_latency():
    nothing = Launch(name="nothing", programs=1, iterations=0)
    assert H100.launch_us * 1e-6 <= seconds(nothing, H100) < 2 * H100.launch_us * 1e-6


def test_one_program_too_many_takes_another_round():
    full, over = (seconds(launch(programs=n, memory=0), H100) for n in (264, 265))
    assert over == pytest.approx(2 * full - H100.launch_us * 1e-6)


def test_programs_of_falling_length_need_no_last_round():
    """Under a causal mask short programs fill the gaps of the last round."""
    causal = {"iterations": 32, "longest": 64, "memory": 0}
    full, over = (seconds(launch(programs=n, **causal), H100) for n in (2640, 2650))
    assert full < over < 1.01 * full


def test_the_longest_program_bounds_a_launch():
    alike, uneven = launch(programs=132, memory=0), launch(programs=132, iterations=16, longest=64, memory=0)
    assert seconds(uneven, H100) == pytest.approx(seconds(alike, H100), rel=0.2)


# occupancy ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, 2, id="as-it-is"),
        pytest.param({"shared_bytes": 0}, 2, id="registers"),
        pytest.param({"shared_bytes": 0, "registers": 64}, 4, id="fewer-registers"),
        pytest.param({"shared_bytes": 0, "registers": 33, "warps": 4}, 12, id="registers-come-in-steps-of-8"),
        pytest.param({"shared_bytes": 0, "registers": 16, "warps": 1}, 32, id="programs"),
        pytest.param({"shared_bytes": 114 * 1024}, 1, id="what-the-driver-keeps"),
        pytest.param({"shared_bytes": 228 * 1024}, 0, id="does-not-fit"),
    ],
)
def test_occupancy_on_an_h100(changes, expected):
    assert occupancy(launch(**changes), H100) == expected


def test_threads_bound_the_occupancy_of_small_chips():
    work = launch(registers=16, shared_bytes=0, warps=16)
    assert (occupancy(work, H100), occupancy(work, devices.get("rtx-4090"))) == (4, 3)


def test_what_does_not_fit_takes_forever():
    assert seconds(launch(shared_bytes=228 * 1024), H100) == math.inf


# monotonicity -------------------------------------------------------------------------------------------------------------

WORK = ("flops", "exponentials", "vector", "loaded", "shared", "outside", "memory", "spilled", "links")
QUANTITIES = ("programs", "iterations", *WORK)


@given(
    name=st.sampled_from(QUANTITIES),
    programs=st.integers(1, 5000),
    iterations=st.integers(1, 500),
    stages=st.integers(1, 4),
    more=st.floats(1.0, 8.0),
)
def test_more_work_takes_no_less_time(name, programs, iterations, stages, more):
    base = launch(
        programs=programs, iterations=iterations, stages=stages, exponentials=4096, vector=4096, shared=4096, outside=4096
    )
    base = dataclasses.replace(base, spilled=8, links=2)
    changed = dataclasses.replace(base, **{name: int(getattr(base, name) * more)})
    assert seconds(changed, H100) >= seconds(base, H100) * (1 - 1e-9)


@given(programs=st.integers(1, 5000), stages=st.integers(1, 5))
def test_more_loads_in_flight_take_no_more_time(programs, stages):
    base = launch(programs=programs, stages=stages, links=2)
    assert seconds(dataclasses.replace(base, stages=stages + 1), H100) <= seconds(base, H100)


def test_a_second_program_hides_the_first_ones_latency():
    short = {"flops": 2 * 16 * 16 * 16, "stages": 1, "programs": 264, "memory": 0, "loaded": 64}
    alone, beside = launch(**short, shared_bytes=200 * 1024), launch(**short)
    assert seconds(beside, H100) < 0.6 * seconds(alone, H100)


def test_specialised_warps_overlap_what_one_program_does():
    both = launch(exponentials=128 * 64, shared_bytes=200 * 1024, programs=132)
    assert seconds(dataclasses.replace(both, parts=2), H100) < seconds(both, H100)


# symbols ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 100, 128, 129, 5000, 100_000])
def test_symbols_and_numbers_agree(length):
    t = sympy.Symbol("t", integer=True, positive=True)
    sizes = {"programs": 8 * sympy.ceiling(t / 128), "iterations": sympy.ceiling(t / 64), "memory": 4096 * t}
    symbolic = launch(**sizes)
    numbers = evaluated(symbolic, {"t": length})
    assert float(seconds(symbolic, H100).subs(t, length)) == pytest.approx(seconds(numbers, H100))


def test_a_symbol_without_a_number_is_refused():
    with pytest.raises(EstimateError, match=r"Expected a number for each size but got none for \['t'\] in programs of launch"):
        evaluated(launch(programs=sympy.Symbol("t")), {"s": 3})


# factors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [("matmul", 0.0), ("memory", -1.0), ("overlap", 1.5), ("overlap", -0.1), ("latency_clocks", 0.0)]
)
def test_factors_are_checked(name, value):
    with pytest.raises(EstimateError, match=f"Expected a positive factor .* but got {name}={value!r}"):
        Factors(**{name: value})


def test_fit_recovers_factors():
    truth = Factors(matmul=0.7, memory=0.8, latency_clocks=1200.0)
    works = [launch(programs=n, iterations=i) for n in (1, 132, 1000, 10_000) for i in (1, 8, 64)]
    works += [launch(programs=1000, flops=0, memory=m) for m in (10**9, 10**10)]
    predict = lambda factors: [seconds(work, H100, factors) for work in works]  # noqa: E731
    found = fit(predict, predict(truth))
    for name in ("matmul", "memory", "latency_clocks"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.02)


@pytest.mark.parametrize("times", [[], [0.0], [math.inf]], ids=["none", "zero", "infinite"])
def test_fit_refuses_times_that_are_none(times):
    with pytest.raises(EstimateError, match="Expected positive and finite times"):
        fit(lambda factors: [1.0] * len(times), times)


def test_launches_follow_one_another():
    assert total_seconds([launch(), launch()], H100) == pytest.approx(2 * seconds(launch(), H100))
