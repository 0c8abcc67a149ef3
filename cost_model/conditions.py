"""What a measurement of a device holds under: its driver, the kernel compiler, its power limit."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

import torch

_DRIVER = Path("/proc/driver/nvidia/version")
_QUERY_S = 10


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What is not known is None.

    Attributes:
        driver: version of a GPU's driver.
        triton: version of Triton.
        power_limit_w: watts that a GPU may draw.
    """

    driver: str | None = None
    triton: str | None = None
    power_limit_w: float | None = None

    def changes(self, now: Conditions) -> tuple[str, ...]:
        """What is known to differ, in words."""
        pairs = [(item.name, getattr(self, item.name), getattr(now, item.name)) for item in fields(self)]
        return tuple(
            f"{name.replace('_', ' ')} was {then} and is {today}"
            for name, then, today in pairs
            if then is not None and today is not None and then != today
        )


def current(device: torch.device | str, *, ask_driver: bool = False) -> Conditions:
    """The conditions on this machine. The power limit takes a question to the driver's tool, and is None without `ask_driver`."""
    on_nvidia = torch.device(device).type == "cuda" and torch.version.hip is None
    return Conditions(
        driver=_driver() if on_nvidia else None,
        triton=_triton(),
        power_limit_w=_power_limit(torch.device(device)) if on_nvidia and ask_driver else None,
    )


def _driver() -> str | None:
    try:
        found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _power_limit(device: torch.device) -> float | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    command = [tool, f"--id=GPU-{uuid}", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_S, check=True).stdout
        return float(answer)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
