"""Which profile a name or a device at hand has: one that was calibrated here, a packaged one, else one after a relative's."""

from __future__ import annotations

import dataclasses
import difflib
import os
import platform
import re
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import UnknownHardwareError
from . import calibrations
from .hardware import Hardware
from .profiles import PROFILES

_BRANDS = re.compile(r"^(NVIDIA|AMD Instinct|AMD|Tesla)\s+(GeForce\s+)?", re.IGNORECASE)


def names() -> tuple[str, ...]:
    """The names that `get` takes."""
    return (*(profile.name for profile in PROFILES), "cpu", *(found.hardware.name for found in calibrations.stored()))


def get(name: str) -> Hardware:
    """The profile called `name`.

    Raises:
        UnknownHardwareError: no profile has that name.
    """
    if name == "cpu":
        return cpu()
    for profile in (*PROFILES, *(found.hardware for found in calibrations.stored())):
        if profile.name == name:
            return profile
    close = difflib.get_close_matches(str(name), names(), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UnknownHardwareError(f"Expected hardware to be one of {', '.join(names())} but got hardware={name!r}.{hint}")


def detect(device: torch.device | str) -> Hardware:
    """The profile of a device at hand: the calibrated one if there is one, with a warning once it is stale, else `uncalibrated`.

    Raises:
        UnknownHardwareError: the device is neither a CPU nor a GPU of a known make.
    """
    found = calibrations.of_device(device_name(device))
    if found is None:
        return uncalibrated(device)
    calibrations.warn_if_stale(found)
    return found.hardware


def uncalibrated(device: torch.device | str) -> Hardware:
    """The profile of a device at hand by its name, else a generic one after its architecture and properties.

    Raises:
        UnknownHardwareError: the device is neither a CPU nor a GPU of a known make.
    """
    if _checked(device).type == "cpu":
        return cpu()
    properties = torch.cuda.get_device_properties(device)
    return by_device_name(properties.name) or generic(properties)


def device_name(device: torch.device | str) -> str:
    """What the driver calls a device; of a CPU its model and number of cores.

    Raises:
        UnknownHardwareError: the device is neither a CPU nor a GPU of a known make.
    """
    if _checked(device).type == "cpu":
        return f"{_processor()}, {os.cpu_count() or 1} cores"
    return str(torch.cuda.get_device_properties(device).name)


def _checked(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise UnknownHardwareError(f"Expected a cpu or cuda device but got device={str(device)!r}: set the option hardware")
    return device


def by_device_name(device_name: str) -> Hardware | None:
    """The profile whose pattern matches the whole of a device's name, brand aside: an "RTX 4090 D" is no "RTX 4090"."""
    model = _BRANDS.sub("", device_name.strip())
    for profile in PROFILES:
        if re.fullmatch(profile.device_pattern, model, re.IGNORECASE):
            return profile
    return None


def generic(properties: Any) -> Hardware:
    """A conservative profile of an unknown GPU from `torch.cuda.get_device_properties`.

    The slowest known relative (same vendor, same architecture or the nearest earlier one) scaled to the device's SMs, with the
    device's own memory sizes.

    Raises:
        UnknownHardwareError: no profile of its vendor is of its architecture or an earlier one.
    """
    gcn = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    vendor = "amd" if gcn else "nvidia"
    arch = gcn.split(":")[0] if gcn else f"sm_{properties.major}{properties.minor}"
    relatives = [p for p in PROFILES if p.vendor == vendor and _generation(p.arch) <= _generation(arch)]
    if not relatives:
        raise UnknownHardwareError(
            f"Expected a GPU that a profile can stand for but got {properties.name!r} ({arch}): set hardware"
        )
    nearest = max(_generation(p.arch) for p in relatives)
    slowest = min((p for p in relatives if _generation(p.arch) == nearest), key=_matmul_per_sm)
    sms = properties.multi_processor_count
    origin = f"derived from {slowest.name}"
    figures = {
        "sms": sms,
        "matmul_tflops": MappingProxyType({k: v * sms / slowest.sms for k, v in slowest.matmul_tflops.items()}),
        "memory_gb": properties.total_memory / 1e9,
        "l2_mb": getattr(properties, "L2_cache_size", slowest.l2_mb * 2**20) / 2**20,
        "smem_sm_kb": getattr(properties, "shared_memory_per_multiprocessor", slowest.smem_sm_kb * 1024) // 1024,
        "smem_block_kb": getattr(properties, "shared_memory_per_block_optin", slowest.smem_block_kb * 1024) // 1024,
        "bandwidth_gb_s": slowest.bandwidth_gb_s * min(1.0, sms / slowest.sms),
    }
    return dataclasses.replace(
        slowest,
        **figures,
        name=f"generic-{arch.replace('_', '')}",
        arch=arch,
        measured_matmul_tflops=MappingProxyType({}),
        measured_bandwidth_gb_s=None,
        sources=MappingProxyType(dict.fromkeys(slowest.sources, origin)),
        device_pattern="",
        generic=True,
    )


@cache
def cpu() -> Hardware:
    """This machine's CPU, from its number of cores: 32 float32 operations a clock and core, 2.5 GHz, 10 GB/s a core."""
    cores = os.cpu_count() or 1
    assumed = ("clock_mhz", "matmul_tflops", "bandwidth_gb_s", "l2_mb", "exp_per_clock_sm", "launch_us")
    return Hardware(
        name="cpu",
        vendor="cpu",
        arch=platform.machine(),
        sms=cores,
        clock_mhz=2500,
        matmul_tflops=MappingProxyType({"float32": cores * 0.08}),
        memory_gb=_system_memory_gb(),
        bandwidth_gb_s=min(10.0 * cores, 100.0),
        l2_mb=float(cores),
        smem_sm_kb=0,
        smem_block_kb=0,
        exp_per_clock_sm=1,
        launch_us=2.0,
        sources=MappingProxyType(
            {
                "sms": "os.cpu_count",
                "memory_gb": "os.sysconf",
                **dict.fromkeys(assumed, "assumed for a current server core"),
            }
        ),
        generic=True,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _system_memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return 8.0


def _generation(arch: str) -> int:
    """An architecture's place among its vendor's: 90 for sm_90a, 0x942 for gfx942."""
    if arch.startswith("gfx"):
        return int(arch.removeprefix("gfx"), 16)
    return int(re.sub(r"\D", "", arch))


def _matmul_per_sm(profile: Hardware) -> float:
    return profile.peak_matmul_tflops("float16") / profile.sms
