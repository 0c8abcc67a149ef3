"""Measures a device at hand, and makes its profile of what was found: a few seconds for each ceiling of the roofline."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import torch

from . import ceilings, conditions, devices
from .calibrations import Calibration
from .hardware import Hardware

_TYPES_OF_CPU = ("float32", "bfloat16", "float16")
Figures = dict[str, Any]


def calibrate(device: torch.device | str, *, progress: Callable[[str], object] = lambda step: None) -> Calibration:
    """Measure a device; nothing is stored.

    Args:
        progress: is called with what is measured next.

    Raises:
        UnknownHardwareError: the device is neither a CPU nor a GPU of a known make.
    """
    device = torch.device(device)
    base = devices.uncalibrated(device)
    figures: Figures = {}
    for step, measure in _steps(device, base):
        progress(step)
        figures |= measure()
    today = datetime.date.today().isoformat()
    sources = {**base.sources, **dict.fromkeys(figures, f"measured on this machine on {today}")}
    hardware = dataclasses.replace(
        base,
        **figures,
        name=f"{base.name}-calibrated",
        sources=MappingProxyType(dict(sorted(sources.items()))),
        device_pattern="",
        generic=False,
    )
    return Calibration(
        device=devices.device_name(device),
        hardware=hardware,
        conditions=conditions.current(device, ask_driver=True),
        date=today,
    )


def _steps(device: torch.device, base: Hardware) -> Iterator[tuple[str, Callable[[], Figures]]]:
    yield "main memory", lambda: _bandwidth(device, base)
    yield "matrix multiplication", lambda: _matmul(device, base)
    yield "exponentials", lambda: _exponentials(device, base)
    yield "launches", lambda: {"launch_us": ceilings.launch_us(device)}


def _bandwidth(device: torch.device, base: Hardware) -> Figures:
    rate = ceilings.bandwidth_gb_s(device)
    on_cpu = {"bandwidth_gb_s": rate} if base.vendor == "cpu" else {}  # a CPU has no datasheet here
    return {"measured_bandwidth_gb_s": rate, **on_cpu}


def _matmul(device: torch.device, base: Hardware) -> Figures:
    names = _TYPES_OF_CPU if base.vendor == "cpu" else tuple(base.matmul_tflops)
    rates = {name: rate for name in names if (rate := ceilings.matmul_tflops(device, name))}
    on_cpu = {"matmul_tflops": MappingProxyType(rates)} if base.vendor == "cpu" else {}
    return {"measured_matmul_tflops": MappingProxyType(rates), **on_cpu}


def _exponentials(device: torch.device, base: Hardware) -> Figures:
    rate = ceilings.exponentials_per_s(device, base.sms)
    return {"exp_per_clock_sm": rate / (base.sms * base.clock_mhz * 1e6)}
