"""Hardware profiles, their detection, and the roofline's choice."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import sympy
import torch

from effcompile.cost_model import devices
from effcompile.cost_model.hardware import Hardware, type_name
from effcompile.cost_model.profiles import PROFILES
from effcompile.cost_model.roofline import estimate
from effcompile.cost_model.select import choose
from effcompile.errors import EffcompileError, UnknownHardwareError
from effcompile.ir import Candidate, Work

H100 = devices.get("h100-sxm")


def candidate(name="kernel", flops=0, traffic=0, kind="generated", **more) -> Candidate:
    work = {key: more.pop(key) for key in ("transcendentals", "launches") if key in more}
    return Candidate(name=name, kind=kind, work=Work(flops=flops, bytes=traffic, **work), **more)


def properties(name, major=9, minor=0, sms=132, **more) -> SimpleNamespace:
    return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=sms, total_memory=80_000_000_000, **more)


# profiles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", devices.names())
def test_profile_is_complete(name):
    profile = devices.get(name)
    assert profile.name == name
    assert "float32" in profile.matmul_tflops
    figures = {f.name: getattr(profile, f.name) for f in dataclasses.fields(Hardware)}
    described = ("name", "vendor", "arch", "sources", "device_pattern", "generic")
    for field, figure in figures.items():
        if field not in described and figure:
            assert field in profile.sources, f"{field} has no source"
    assert all(rate > 0 for rate in profile.matmul_tflops.values())


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_what_is_sustained_is_less_than_the_datasheet(profile):
    assert (
        0.4 * profile.peak_matmul_tflops("float16")
        < profile.sustained_matmul_tflops("float16")
        < profile.peak_matmul_tflops("float16")
    )
    assert 0.7 * profile.bandwidth_gb_s < profile.sustained_bandwidth_gb_s < profile.bandwidth_gb_s


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_datasheet_rate_is_a_power_of_two_a_clock(profile):
    """Matrix units do 512, 1024, 2048, 4096 or 8192 operations a clock: a slip in the table shows as anything else."""
    a_clock = profile.peak_matmul_tflops("float16") * 1e12 / (profile.sms * profile.clock_mhz * 1e6)
    nearest = min((512, 1024, 2048, 4096, 8192), key=lambda rate: abs(rate - a_clock))
    assert a_clock == pytest.approx(nearest, rel=0.08)


def test_unknown_profile_lists_the_known():
    with pytest.raises(
        UnknownHardwareError, match=r"one of a100-sxm-40, .*cpu but got hardware='h100-sxn'. Did you mean 'h100-sxm'\?"
    ):
        devices.get("h100-sxn")


@pytest.mark.parametrize(
    ("device_name", "profile"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80"),
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI355X", "mi355x"),
    ],
)
def test_device_names(device_name, profile):
    found = devices.by_device_name(device_name)
    assert found is not None and found.name == profile


def test_every_profile_has_a_device_name_that_finds_it():
    """The table above names each profile once: a new one without a row there fails here."""
    (mark,) = (mark for mark in test_device_names.pytestmark if mark.name == "parametrize")
    assert {profile for _, profile in mark.args[1]} == {profile.name for profile in PROFILES}


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA H100 NVL",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA L40",
        "NVIDIA H200 NVL",
    ],
)
def test_a_sibling_is_not_taken_for_the_device(device_name):
    assert devices.by_device_name(device_name) is None


def test_detect_cpu():
    assert devices.detect("cpu").name == "cpu"
    assert devices.detect(torch.device("cpu")).sms >= 1


def test_detect_gpu_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties("NVIDIA H100 80GB HBM3"))
    assert devices.detect(torch.device("cuda", 0)) is H100


@pytest.mark.gpu
def test_the_profile_agrees_with_the_gpu_at_hand():
    profile, device = devices.detect("cuda"), torch.cuda.get_device_properties(0)
    assert profile.sms == device.multi_processor_count
    assert profile.memory_gb == pytest.approx(device.total_memory / 1e9, rel=0.1)
    assert profile.smem_block_kb == device.shared_memory_per_block_optin // 1024
    assert profile.smem_sm_kb == device.shared_memory_per_multiprocessor // 1024


def test_detect_unknown_gpu(monkeypatch):
    nvl = properties("NVIDIA H100 NVL", L2_cache_size=50 * 2**20, shared_memory_per_block_optin=227 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: nvl)
    profile = devices.detect("cuda")
    assert profile.generic and profile.name == "generic-sm90" and profile.arch == "sm_90"
    assert (profile.sms, profile.memory_gb, profile.l2_mb, profile.smem_block_kb) == (132, 80.0, 50.0, 227)
    assert profile.bandwidth_gb_s == 2039, "the least of its architecture"
    assert profile.peak_matmul_tflops("bfloat16") == pytest.approx(756 * 132 / 114)
    assert not profile.measured_matmul_tflops
    assert set(profile.sources.values()) == {"derived from h100-pcie"}


def test_generic_scales_with_the_sms():
    slice_of_an_l4 = devices.generic(properties("NVIDIA L4-6Q", 8, 9, sms=29))
    assert slice_of_an_l4.peak_matmul_tflops("float16") < 0.51 * devices.get("l4").peak_matmul_tflops("float16")
    assert slice_of_an_l4.bandwidth_gb_s <= devices.get("l4").bandwidth_gb_s


@pytest.mark.parametrize(("major", "minor", "relative"), [(10, 3, "b200"), (12, 1, "rtx-5090"), (8, 7, "rtx-3090")])
def test_generic_of_a_newer_architecture_is_the_nearest_earlier(major, minor, relative):
    profile = devices.generic(properties("NVIDIA Next", major, minor, sms=devices.get(relative).sms))
    assert profile.arch == f"sm_{major}{minor}"
    assert profile.matmul_tflops == devices.get(relative).matmul_tflops


def test_generic_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    profile = devices.generic(properties("AMD Instinct MI308X", sms=80, gcnArchName="gfx942:sramecc+:xnack-"))
    assert (profile.vendor, profile.arch, profile.name) == ("amd", "gfx942", "generic-gfx942")


def test_generic_of_an_older_architecture_is_refused():
    with pytest.raises(UnknownHardwareError, match=r"a profile can stand for but got 'Tesla V100' \(sm_70\)"):
        devices.generic(properties("Tesla V100", 7, 0))


def test_other_devices_are_refused():
    with pytest.raises(UnknownHardwareError, match="a cpu or cuda device but got device='meta'"):
        devices.detect("meta")


@pytest.mark.parametrize(
    ("dtype", "rate"),
    [
        (torch.bfloat16, 989),
        (torch.float16, 989),
        (torch.float8_e4m3fn, 1979),
        (torch.float32, 67),
        ("tf32", 494.5),
        (torch.float64, 67),
    ],
    ids=str,
)
def test_rates_by_type(dtype, rate):
    assert H100.peak_matmul_tflops(dtype) == rate


def test_a_type_without_matrix_units_runs_at_another_ones_rate():
    assert devices.get("t4").peak_matmul_tflops(torch.bfloat16) == 8.1
    assert devices.get("a100-sxm-80").peak_matmul_tflops(torch.float8_e5m2) == 312


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, "fp16", None], ids=str)
def test_no_rate_for_other_types(dtype):
    with pytest.raises(ValueError, match="a floating-point dtype but got dtype="):
        type_name(dtype)


# roofline ---------------------------------------------------------------------------------------------------------------


def test_compute_bound():
    result = estimate(candidate(flops=794e12, traffic=3e9), H100, torch.bfloat16)
    assert result.bound == "compute"
    assert result.compute_s == pytest.approx(1.0) and result.memory_s == pytest.approx(1e-3)
    assert result.total_s == pytest.approx(1.0 + 2.5e-6)


def test_memory_bound():
    result = estimate(candidate(flops=1e9, traffic=3e12), H100, torch.bfloat16)
    assert result.bound == "memory" and result.memory_s == pytest.approx(1.0)


def test_launch_bound():
    result = estimate(candidate(flops=1e6, traffic=1e3, launches=20), H100, torch.bfloat16)
    assert result.bound == "launch" and result.launch_s == pytest.approx(50e-6)


def test_exponentials_bound_a_narrow_head():
    """A 128 x 128 tile of attention with 16-wide heads: the matrix units wait for the exponentials."""
    tile = 128 * 128
    with_exp = estimate(candidate(flops=4 * tile * 16, transcendentals=tile), H100, torch.bfloat16)
    without = estimate(candidate(flops=4 * tile * 16), H100, torch.bfloat16)
    assert with_exp.compute_s > without.compute_s
    wide = candidate(flops=4 * tile * 128, transcendentals=tile)
    assert estimate(wide, H100, torch.bfloat16).compute_s == pytest.approx(8 * without.compute_s)


def test_efficiency_divides_the_rate():
    half = estimate(candidate(flops=1e12, traffic=1e9, compute_efficiency=0.5, memory_efficiency=0.25), H100, torch.bfloat16)
    full = estimate(candidate(flops=1e12, traffic=1e9), H100, torch.bfloat16)
    assert half.compute_s == pytest.approx(2 * full.compute_s)
    assert half.memory_s == pytest.approx(4 * full.memory_s)


@pytest.mark.parametrize("by", ["symbol", "name"])
def test_symbolic_work(by):
    t, d = sympy.Symbol("T", integer=True, nonnegative=True), sympy.Symbol("D", integer=True)
    hints = {t: 4096, d: 128} if by == "symbol" else {"T": 4096, "D": 128, "unused": 1}
    symbolic = candidate(flops=4 * t**2 * d, traffic=sympy.ceiling(t / 3) * d)
    numbers = candidate(flops=4 * 4096**2 * 128, traffic=1366 * 128)
    assert estimate(symbolic, H100, torch.bfloat16, hints) == estimate(numbers, H100, torch.bfloat16)


def test_the_choice_follows_the_shape():
    """Splitting the keys pays for its reduction only when they are long."""
    t = sympy.Symbol("T", integer=True)
    one = candidate("one", traffic=64 * t, memory_efficiency=0.1)
    split = candidate("split", traffic=64 * t, launches=2)
    for length, name in ((1024, "one"), (1_000_000, "split")):
        best, estimates = choose([one, split], H100, torch.bfloat16, {"T": length})
        assert best.name == name
        assert [e.candidate for e in estimates] == ["one", "split"]


def test_a_library_call_may_win():
    ours = candidate("generated", flops=1e12, compute_efficiency=0.6)
    library = candidate("cudnn", flops=1e12, compute_efficiency=0.7, kind="library")
    assert choose([ours, library], H100, torch.bfloat16)[0] is library


def test_the_first_of_equals_wins():
    assert choose([candidate("a", flops=1), candidate("b", flops=1)], H100, torch.bfloat16)[0].name == "a"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        pytest.param(candidate(flops=sympy.Symbol("T")), r"a hint for each size but got none for \['T'\] in flops", id="no hint"),
        pytest.param(candidate(flops=-1), r"work >= 0 but got flops=-1.0", id="negative"),
        pytest.param(candidate(traffic=float("nan")), r"bytes=nan", id="nan"),
        pytest.param(candidate(traffic=sympy.oo), r"bytes=inf", id="infinite"),
        pytest.param(candidate(compute_efficiency=0.0), r"in \(0, 1\] but got compute_efficiency=0.0", id="no efficiency"),
        pytest.param(candidate(memory_efficiency=1.5), r"memory_efficiency=1.5", id="more than all"),
    ],
)
def test_bad_work(bad, message):
    with pytest.raises(EffcompileError, match=message):
        estimate(bad, H100, torch.bfloat16)


@pytest.mark.parametrize("candidates", [[], [candidate("a"), candidate("a")]], ids=["none", "two of one name"])
def test_bad_candidates(candidates):
    with pytest.raises(EffcompileError, match="candidates with different names but got candidates="):
        choose(candidates, H100, torch.bfloat16)
