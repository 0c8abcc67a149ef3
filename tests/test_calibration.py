"""Measuring a device, keeping what was measured, and planning by it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from effcompile import doctor
from effcompile.cli import main
from effcompile.cost_model import calibrate as calibrating
from effcompile.cost_model import calibrations, ceilings, conditions, devices
from effcompile.cost_model.calibrations import Calibration
from effcompile.cost_model.conditions import Conditions
from effcompile.errors import EffcompileWarning, ProfileError

CPU = torch.device("cpu")
RATES = {"float32": 0.25, "bfloat16": 0.5, "float16": None}


@pytest.fixture(autouse=True)
def directory(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFARCH_PROFILE_DIR", str(tmp_path / "profiles"))
    monkeypatch.setattr(calibrations, "_warned", set())
    return tmp_path / "profiles"


@pytest.fixture
def measured(monkeypatch):
    """Ceilings that are known, in the place of measured ones."""
    monkeypatch.setattr(ceilings, "bandwidth_gb_s", lambda device: 40.0)
    monkeypatch.setattr(ceilings, "matmul_tflops", lambda device, name: RATES[name])
    monkeypatch.setattr(ceilings, "exponentials_per_s", lambda device, sms: sms * 2500e6 * 0.5)
    monkeypatch.setattr(ceilings, "launch_us", lambda device: 1.5)


@pytest.fixture
def h100(monkeypatch):
    """The device at hand is an H100 under known conditions, and its calibration is stored."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80_000_000_000
    )
    now = Conditions(driver="550.54", triton="3.6.0", power_limit_w=700.0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(calibrations, "current", lambda device: dataclasses.replace(now, power_limit_w=None))
    hardware = dataclasses.replace(devices.get("h100-sxm"), name="h100-sxm-calibrated", measured_bandwidth_gb_s=2900.0)
    found = Calibration(device=properties.name, hardware=hardware, conditions=now, date="2026-01-02")
    calibrations.save(found)
    return found


def test_what_was_measured_stands_in_the_profile(measured):
    steps = []
    found = calibrating.calibrate(CPU, progress=steps.append)
    assert steps == ["main memory", "matrix multiplication", "exponentials", "launches"]
    assert found.device == devices.device_name("cpu") and found.hardware.name == "cpu-calibrated"
    assert found.hardware.sustained_bandwidth_gb_s == 40.0
    assert found.hardware.sustained_matmul_tflops(torch.bfloat16) == 0.5
    assert found.hardware.sustained_matmul_tflops(torch.float16) == 0.25, "no figure of its own: the next wider type's"
    assert found.hardware.exp_per_clock_sm == pytest.approx(0.5)
    assert found.hardware.launch_us == 1.5
    assert found.hardware.sources["launch_us"] == f"measured on this machine on {found.date}"
    assert found.hardware.sources["sms"] == devices.cpu().sources["sms"], "what was not measured keeps its source"


def test_a_stored_calibration_is_the_device_s_profile(measured):
    assert devices.detect("cpu") == devices.cpu()
    found = calibrating.calibrate(CPU)
    calibrations.save(found)
    assert calibrations.of_device(found.device) == found
    assert devices.detect("cpu") == found.hardware
    assert devices.uncalibrated("cpu") == devices.cpu()
    assert devices.names()[-1] == "cpu-calibrated" and devices.get("cpu-calibrated") == found.hardware


def test_a_later_calibration_takes_the_place_of_an_earlier_one(measured, directory):
    found = calibrating.calibrate(CPU)
    calibrations.save(found)
    assert devices.detect("cpu").launch_us == 1.5
    calibrations.save(dataclasses.replace(found, hardware=dataclasses.replace(found.hardware, launch_us=9.0)))
    assert devices.detect("cpu").launch_us == 9.0
    assert len(list(directory.iterdir())) == 1


def test_another_device_keeps_its_own_profile(h100, monkeypatch):
    other = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: other)
    assert devices.detect("cuda") is devices.get("h200")


@pytest.mark.parametrize("change", [{"driver": "560.10"}, {"triton": "3.7.0"}], ids=str)
def test_a_stale_calibration_is_used_with_one_warning(h100, monkeypatch, change):
    now = dataclasses.replace(h100.conditions, **change)
    monkeypatch.setattr(calibrations, "current", lambda device: now)
    (name, value), *_ = change.items()
    with pytest.warns(EffcompileWarning, match=rf"calibrated on 2026-01-02, is stale: {name} was .* and is {value}"):
        assert devices.detect("cuda") == h100.hardware
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.detect("cuda") == h100.hardware


def test_unchanged_or_unknown_conditions_are_not_stale(h100, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.detect("cuda") == h100.hardware
    assert h100.conditions.changes(Conditions()) == ()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting property name"),
        ('{"format": 99}', "its format is 99, not 1"),
        ('{"format": 1, "device": "x", "date": "d", "conditions": {}, "hardware": {"speed": 1}}', "speed"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(directory, text, why):
    path = calibrations.path_of(devices.device_name("cpu"))
    directory.mkdir()
    path.write_text(text)
    with pytest.raises(ProfileError, match=rf"Expected a profile that `effarch calibrate` wrote but got {path}: .*{why}"):
        devices.detect("cpu")


def test_the_driver_s_version_is_read(monkeypatch, tmp_path):
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version: 12\n")
    monkeypatch.setattr(conditions, "_DRIVER", tmp_path / "version")
    assert conditions.current("cuda").driver == "550.54.15"
    assert conditions.current("cpu").driver is None


def test_products_get_smaller_for_a_type_without_units(monkeypatch):
    sizes = []
    monkeypatch.setattr(ceilings, "_product", lambda n, dtype, device: (sizes.append(n), (0.5, lambda: None))[1])
    monkeypatch.setattr(ceilings, "seconds", lambda run, device: 1.0)
    assert ceilings.matmul_tflops(CPU, "float32") == pytest.approx(2 * sizes[-1] ** 3 / 1e12)
    assert sizes[-1] < ceilings._MATRIX["cpu"]


def test_every_ceiling_of_a_cpu_is_measured(monkeypatch):
    monkeypatch.setattr(ceilings, "_MATRIX", {"cpu": 64})
    monkeypatch.setattr(ceilings, "_COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(ceilings, "_WARM_S", {"cpu": 0.0})
    found = calibrating.calibrate(CPU).hardware
    measured = (found.measured_bandwidth_gb_s, *found.measured_matmul_tflops.values(), found.exp_per_clock_sm, found.launch_us)
    assert len(measured) == 6 and all(0 < figure < float("inf") for figure in measured)


@pytest.mark.gpu
def test_the_ceilings_of_a_gpu_are_below_its_datasheet():
    found = calibrating.calibrate("cuda").hardware
    assert found.measured_bandwidth_gb_s < found.bandwidth_gb_s
    assert all(rate < found.matmul_tflops[name] for name, rate in found.measured_matmul_tflops.items())
    assert 0 < found.launch_us < 20 and 1 < found.exp_per_clock_sm <= 32


# the command line ---------------------------------------------------------------------------------------------------------


def run(*arguments):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.output


def test_calibrate_shows_stores_and_is_then_used(measured, directory):
    told = run("calibrate", "--device", "cpu")
    assert "measuring main memory ..." in told and "stored as cpu-calibrated" in told
    assert "cpu-calibrated" in run("hw", "list")
    assert json.loads(run("hw", "show", "--json"))["launch_us"] == 1.5
    rows = {line.split()[0]: line.split()[1:] for line in run("hw", "diff").splitlines()}
    assert rows["figure"] == ["cpu", "cpu-calibrated"] and rows["launch_us"] == ["2", "1.5"] and "sms" not in rows


def test_a_dry_run_stores_nothing(measured, directory):
    assert "stored" not in run("calibrate", "--device", "cpu", "--dry-run")
    assert not directory.exists()


def test_show_gives_each_figure_its_source():
    lines = run("hw", "show", "h100-sxm").splitlines()
    assert lines[0].split() == ["figure", "h100-sxm", "source"]
    (memory,) = (line for line in lines if "measured_bandwidth_gb_s" in line)
    assert memory.strip().split(maxsplit=2)[1:] == ["3000", devices.get("h100-sxm").sources["measured_bandwidth_gb_s"]]


def test_diff_of_two_profiles():
    rows = {line.split()[0]: line.split()[1:] for line in run("hw", "diff", "h100-sxm", "h200").splitlines()}
    assert rows["memory_gb"] == ["80", "141"] and "sms" not in rows
    assert "have the same figures" in run("hw", "diff", "h200", "h200")


def test_doctor_tells_of_a_stale_calibration(measured, monkeypatch):
    found = calibrating.calibrate(CPU)
    calibrations.save(dataclasses.replace(found, conditions=Conditions(triton="3.0.0")))
    (check,) = (check for check in doctor.examine() if check.name == "calibration")
    assert not check.ok and not check.required and "triton was 3.0.0 and is" in check.detail
