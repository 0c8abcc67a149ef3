"""What every benchmark shares: timing, memory, errors, cold caches, the record of the environment and the JSON files.

Times are wall-clock medians, never a mean of one run. A figure counts only beside the peers of the same run.
"""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "EFFARCH_CACHE_DIR")
MIB = 2**20


def import_effcompile() -> Any:
    """The package: the installed one, or else the checkout that this file stands in."""
    if importlib.util.find_spec("effcompile") is None:
        sys.path.insert(0, str(ROOT))
    import effcompile

    if "effarch" not in torch._dynamo.list_backends():  # a checkout that is not installed has no entry point
        from effcompile.backend import effarch

        torch._dynamo.register_backend(effarch, name="effarch")
    return effcompile


# ------------------------------------------------------------------------------------------------------------ environment


def device_name(device: str) -> str:
    """The accelerator's own name, or the processor's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def slug(name: str) -> str:
    """`name` as part of a file name: `NVIDIA H100 80GB HBM3` becomes `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """EFFCOMPILE_COMMIT where set, otherwise git's answer for the checkout, or `unknown`. A `+` behind it: changed files."""
    if told := os.environ.get("EFFCOMPILE_COMMIT"):
        return told
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return str(importlib.import_module(package).__version__)


def environment(device: str) -> dict[str, Any]:
    """Where and with what the figures were taken."""
    import_effcompile()
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": importlib.metadata.version("transformers") if importlib.util.find_spec("transformers") else None,
        "python": ".".join(map(str, sys.version_info[:3])),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def result_path(benchmark: str, device: str, out: str | None) -> Path:
    """`out` if given, else `<benchmark>-<device>.json` in $OUT, else the same in benchmarks/results."""
    if out:
        return Path(out)
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    return folder / f"{benchmark}-{slug(device_name(device))}.json"


def write_json(path: Path, payload: dict[str, Any]) -> None:
    """Write `payload` in one step, so that a run which is cut off leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(payload, indent=1, sort_keys=False) + "\n")
    part.replace(path)


@contextmanager
def cold_caches() -> Iterator[Path]:
    """Empty caches of compiled code for the time being, on disk and in this process: Inductor's, Triton's and ours."""
    from torch._inductor.utils import clear_caches  # torch 2.11 to 2.13

    before = {name: os.environ.get(name) for name in CACHE_VARIABLES}
    with tempfile.TemporaryDirectory(prefix="effcompile-bench-", ignore_cleanup_errors=True) as folder:
        os.environ.update(cache_environment(Path(folder)))
        clear_caches()
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def cache_environment(folder: Path) -> dict[str, str]:
    """The variables that put all caches of compiled code under `folder`."""
    return {name: str(folder / name.split("_", maxsplit=1)[0].lower()) for name in CACHE_VARIABLES}


# ------------------------------------------------------------------------------------------------------------------ timing


@dataclass
class Budget:
    """Seconds that a run may take. What does not fit is skipped, and recorded as skipped."""

    seconds: float
    started: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.started)


def synchronize(device: str) -> None:
    """Wait for the device's queue; a CPU has none."""
    if device == "cuda":
        torch.cuda.synchronize()


def first_call(fn: Callable[[], Any], device: str) -> tuple[Any, float]:
    """The result of the first call and its seconds, compilation included."""
    start = time.perf_counter()
    result = fn()
    synchronize(device)
    return result, time.perf_counter() - start


def median_ms(fn: Callable[[], Any], device: str, *, budget_ms: float = 100.0) -> float:
    """The median time of a warm call in milliseconds: device events on a GPU, the host's clock on a CPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(fn, warmup=15, rep=budget_ms, return_mode="median"))
    return statistics.median(sample_ms(fn, budget_ms=budget_ms))


def sample_ms(fn: Callable[[], Any], *, budget_ms: float) -> list[float]:
    """Times of single calls on the host's clock: two to warm up, then at least five and as many as `budget_ms` holds."""
    fn(), fn()
    samples: list[float] = []
    while len(samples) < 5 or (sum(samples) < budget_ms and len(samples) < 200):
        start = time.perf_counter()
        fn()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def interleaved_ms(contenders: dict[str, Callable[[], Any]], *, budget_ms: float, rounds: int = 5) -> dict[str, float]:
    """Medians of several contenders, timed in turn round by round: what slows the machine for a while slows all of them."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, fn in contenders.items():
            samples[name] += sample_ms(fn, budget_ms=budget_ms / rounds)
    return {name: statistics.median(times) for name, times in samples.items()}


def peak_mb(fn: Callable[[], Any], device: str) -> float | None:
    """Device memory that one warm call takes beyond what was allocated before it, in MiB. None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - base) / MIB


def release(device: str) -> None:
    """Forget compiled code and hand back unused memory, so that the next contender starts alone."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def warm_up(device: str) -> None:
    """Pay once for what no contender should pay: the context, the libraries' handles and Inductor's worker processes."""
    x = torch.randn(64, 64, device=device, requires_grad=True)
    torch.compile(lambda x: (x @ x).sin() + 1, dynamic=False)(x).sum().backward()
    synchronize(device)
    release(device)


# ------------------------------------------------------------------------------------------------------------------ errors


def relative_l2(got: torch.Tensor, reference: torch.Tensor) -> float:
    """`||got - reference|| / ||reference||` in the reference's precision; NaN stays NaN."""
    difference = torch.linalg.vector_norm(got.to(reference.dtype) - reference)
    return float(difference / torch.linalg.vector_norm(reference).clamp_min(torch.finfo(reference.dtype).tiny))


def max_error(got: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest absolute difference."""
    return float((got.to(reference.dtype) - reference).abs().max())


def failure(error: BaseException) -> dict[str, Any]:
    """An exception as part of a result: out of memory is a result of its own."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower():
        return {"status": "oom"}
    return {"status": "error", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def start_report() -> None:
    """Forget what effarch compiled before."""
    import_effcompile().reset_report()


def report() -> dict[str, Any]:
    """What effarch made of what it compiled since `start_report`: decisions, graphs handed on, graph breaks, seconds by stage."""
    found = import_effcompile().last_report()
    names = ("family", "outcome", "chosen", "why", "where")
    return {
        "decisions": [{**{name: getattr(d, name) for name in names}, "where": _inside(d.where)} for d in found.decisions],
        "handed_on": [frame.why for frame in found.frames if frame.outcome == "fallback"],
        "graph_breaks": list(found.graph_breaks),
        "timings": {stage: round(seconds, 4) for stage, seconds in found.timings.items()},
    }


def _inside(where: str) -> str:
    """A source location without the folders of this machine."""
    return where.rpartition(f"site-packages{os.sep}")[2].replace(f"{ROOT}{os.sep}", "")


def select(names: Sequence[str], chosen: str | None) -> list[str]:
    """The names that equal one of the comma-separated parts of `chosen`, or contain one that equals none; all without `chosen`.

    Raises:
        SystemExit: a part that fits no name.
    """
    if not chosen:
        return list(names)
    parts = chosen.split(",")
    for part in parts:
        if not any(part in name for name in names):
            raise SystemExit(f"Expected a part of {', '.join(names)} but got {part!r}")
    return [name for name in names if any(part == name or (part in name and part not in names) for part in parts)]
