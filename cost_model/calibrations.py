"""Profiles that were measured on a machine of the user's, kept as readable JSON, one file a device."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config import profile_dir
from ..errors import EffcompileWarning, ProfileError
from .conditions import Conditions, current
from .hardware import Hardware

_FORMAT = 1
_warned: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One device's measured profile.

    Attributes:
        device: what the driver calls the device.
        hardware: the profile, with the measured figures in it and their sources.
        conditions: what held while it was measured.
        date: the day, as YYYY-MM-DD.
    """

    device: str
    hardware: Hardware
    conditions: Conditions
    date: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON-ready values."""
        return {
            "format": _FORMAT,
            "device": self.device,
            "date": self.date,
            "conditions": dataclasses.asdict(self.conditions),
            "hardware": self.hardware.to_dict(),
        }


def path_of(device: str) -> Path:
    """The file of a device's calibration, there or not."""
    return profile_dir() / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def save(calibration: Calibration) -> Path:
    """Write a calibration, in the place of an earlier one, and say where."""
    path = path_of(calibration.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(calibration.to_dict(), indent=2) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def of_device(device: str) -> Calibration | None:
    """The stored calibration of a device.

    Raises:
        ProfileError: its file is not what `save` writes.
    """
    path = path_of(device)
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else None


def stored() -> tuple[Calibration, ...]:
    """All that are stored, in the order of their files' names.

    Raises:
        ProfileError: a file is not what `save` writes.
    """
    return tuple(_read(path, path.stat().st_mtime_ns) for path in sorted(profile_dir().glob("*.json")))


def warn_if_stale(calibration: Calibration) -> None:
    """Warn, once a process, if the device at hand is known to be under other conditions."""
    changes = calibration.conditions.changes(current("cpu" if calibration.hardware.vendor == "cpu" else "cuda"))
    if changes and calibration.device not in _warned:
        _warned.add(calibration.device)
        told = f"The profile of {calibration.device}, calibrated on {calibration.date}, is stale: {'; '.join(changes)}."
        warnings.warn(f"{told} Run `effarch calibrate`, or delete {path_of(calibration.device)}.", EffcompileWarning, stacklevel=2)


@lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> Calibration:
    """A file as of its time of change."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != _FORMAT:
            raise ValueError(f"its format is {values['format']!r}, not {_FORMAT}")
        return Calibration(
            device=values["device"],
            date=values["date"],
            conditions=Conditions(**values["conditions"]),
            hardware=Hardware.from_dict(values["hardware"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ProfileError(
            f"Expected a profile that `effarch calibrate` wrote but got {path}: {error}. Calibrate again, or delete it."
        ) from error
