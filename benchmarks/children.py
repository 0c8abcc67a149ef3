"""One measurement, one process: a child prints its result as a line of JSON, and no child's state or crash reaches the next."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common import ROOT, failure

MARK = "RESULT "
TURN = "EFFCOMPILE_BENCH_TURN"
"""The environment variable that names the file which children lock while they measure."""


def run_child(script: str, arguments: list[str], *, timeout: float, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The result of `script --child *arguments`, with `process_s`; on a crash or a timeout, a status that says so."""
    start = time.perf_counter()
    results, status = run_children(script, arguments, timeout=timeout, variables=variables)
    return {**results[-1], "process_s": round(time.perf_counter() - start, 2)} if results else status


def run_children(
    script: str, arguments: list[str], *, timeout: float, variables: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All results of `script --child *arguments`, and a status that says why there are no more of them."""
    command = [sys.executable, script, "--child", *arguments]
    child = subprocess.Popen(
        command,
        env={**os.environ, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = child.communicate(timeout=timeout)
        last = (errors.strip().splitlines() or ["no message"])[-1]
        status = {"status": "crash", "error": f"exit {child.returncode}: {last[:300]}"}
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the child and the compiler's workers that it started
        output, _ = child.communicate()
        status = {"status": f"no result in {timeout:.0f} s"}
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    return [json.loads(line[len(MARK) :]) for line in lines], status


def answer(measure: Callable[[], dict[str, Any]]) -> None:
    """Hand the result of `measure`, or what it raised, to the parent."""
    try:
        result = measure()
    except Exception as error:
        result = failure(error)
    print(MARK + json.dumps(result), flush=True)


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """While a child measures, children that run beside it do not; they import and compile."""
    path = os.environ.get(TURN)
    if not path:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def model_zoo() -> Any:
    """The module tests/model_zoo.py: tiny Hugging Face models with random weights."""
    path = Path(ROOT, "tests", "model_zoo.py")
    spec = importlib.util.spec_from_file_location("model_zoo", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"Expected the registry of tiny models at {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
