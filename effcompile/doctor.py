"""What this machine can do with the backend, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import config
from .cost_model import calibrations, conditions, devices
from .errors import EffcompileError

TORCH_RANGE = ((2, 11), (2, 16))  # from the first to before the second
TRITON_FROM = (3, 6)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding. `required` ones decide whether the machine is fit; `remedy` says what to do about a bad one."""

    name: str
    ok: bool
    detail: str
    required: bool = True
    remedy: str = ""


def examine() -> tuple[Check, ...]:
    """Every check, in the order of a first installation."""
    return tuple(check() for check in _CHECKS)


def healthy(checks: tuple[Check, ...]) -> bool:
    """Whether no required check failed."""
    return all(check.ok for check in checks if check.required)


def _python() -> Check:
    version = sys.version_info
    return Check(
        name="python", ok=version >= (3, 11), detail=".".join(map(str, version[:3])), remedy="install Python 3.11 or newer"
    )


def _torch() -> Check:
    low, high = TORCH_RANGE
    supported = f">={_dotted(low)},<{_dotted(high)}"
    return Check(
        name="torch",
        ok=low <= _release(torch.__version__) < high,
        detail=f"{torch.__version__} (supported {supported})",
        remedy=f"pip install 'torch{supported}'",
    )


def _triton() -> Check:
    supported = f">={_dotted(TRITON_FROM)}"
    on_gpu = torch.cuda.is_available()
    if importlib.util.find_spec("triton") is None:
        return Check(name="triton", ok=False, detail="not installed", required=on_gpu, remedy=f"pip install 'triton{supported}'")
    version = importlib.metadata.version("triton")
    return Check(
        name="triton",
        ok=_release(version) >= TRITON_FROM,
        detail=f"{version} (supported {supported})",
        required=on_gpu,
        remedy=f"pip install 'triton{supported}'",
    )


def _gpu() -> Check:
    if not torch.cuda.is_available():
        return Check(name="gpu", ok=True, detail="none: the CPU is used", required=False)
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    try:
        profile = devices.detect(device)
    except EffcompileError as error:
        return Check(name="gpu", ok=False, detail=f"{name}: {error}", remedy="choose a profile with EFFARCH_HARDWARE")
    if profile.generic:
        remedy = "choose a profile with EFFARCH_HARDWARE, or add one: see docs/hardware.md"
        return Check(name="gpu", ok=False, detail=f"{name}, no profile: {profile.name}", required=False, remedy=remedy)
    return Check(name="gpu", ok=True, detail=f"{name}, profile {profile.name}")


def _calibration() -> Check:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = calibrations.of_device(devices.device_name(device))
    except EffcompileError as error:
        return Check(name="calibration", ok=False, detail=str(error), remedy="effarch calibrate")
    if found is None:
        return Check(name="calibration", ok=True, detail="none: the profile's own figures are used", required=False)
    changes = found.conditions.changes(conditions.current(device, ask_driver=True))
    detail = "; ".join((f"of {found.date}", *changes))
    return Check(name="calibration", ok=not changes, detail=detail, required=False, remedy="effarch calibrate")


def _compiler() -> Check:
    asked = os.environ.get("CXX", "")
    found = next((path for path in map(shutil.which, filter(None, (asked, "g++", "clang++"))) if path), None)
    return Check(
        name="c++ compiler",
        ok=found is not None,
        detail=found or "none: Inductor cannot compile for the CPU",
        required=not torch.cuda.is_available(),
        remedy="install g++, or set CXX",
    )


def _cache() -> Check:
    try:
        directory = config.cache_dir()
        problem = _unwritable(directory)
    except EffcompileError as error:
        return Check(name="cache", ok=False, detail=str(error), remedy="set EFFARCH_CACHE_DIR to a directory")
    return Check(
        name="cache", ok=not problem, detail=problem or str(directory), remedy="set EFFARCH_CACHE_DIR to a writable directory"
    )


def _entry_point() -> Check:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="effarch")
    detail = 'torch.compile(backend="effarch")' if found else "effarch is not among torch.compile's backends"
    return Check(
        name="entry point", ok=bool(found), detail=detail, remedy="pip install effcompile, or pip install -e . in a checkout"
    )


def _ahead_of_time() -> Check:
    try:
        size = _compile_for_hopper()
    except Exception as error:  # whatever Triton raises is the finding
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(name="ahead of time", ok=False, detail=detail, required=False, remedy="check the installation of triton")
    return Check(name="ahead of time", ok=True, detail=f"Triton builds for sm_90 ({size} bytes of cubin)", required=False)


def _environment() -> Check:
    unknown = sorted(name for name in os.environ if name.startswith("EFFARCH_") and name not in config.ENVIRONMENT)
    detail = f"unknown: {', '.join(unknown)}" if unknown else "no unknown variables"
    return Check(name="environment", ok=not unknown, detail=detail, remedy=f"legal are {', '.join(config.ENVIRONMENT)}")


_CHECKS: tuple[Callable[[], Check], ...] = (
    _python,
    _torch,
    _triton,
    _gpu,
    _calibration,
    _compiler,
    _cache,
    _entry_point,
    _ahead_of_time,
    _environment,
)


def _compile_for_hopper() -> int:
    """Build a kernel of one line for a Hopper GPU, present or not; the size of its binary in bytes."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    @triton.jit
    def store_zero(pointer):
        tl.store(pointer, 0.0)

    source = ASTSource(store_zero, {"pointer": "*fp32"})
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"])


def _unwritable(directory: Path) -> str:
    """Why no file can be made in `directory`; the empty string if one can."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return f"{directory}: {error.strerror}"


def _release(version: str) -> tuple[int, int]:
    """Major and minor of a version: (2, 13) for "2.13.0+cpu"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
