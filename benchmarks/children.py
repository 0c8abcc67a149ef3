"""One measurement, one process: a child prints its result as a line of JSON, and no child's state or crash reaches the next."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import ROOT

MARK = "RESULT "


def run_child(script: str, arguments: list[str], *, timeout: float, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The result of `script --child *arguments`, with `process_s`; on a crash or a timeout, a status that says so."""
    command = [sys.executable, script, "--child", *arguments]
    start = time.perf_counter()
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
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the child and the compiler's workers that it started
        child.communicate()
        return {"status": f"no result in {timeout:.0f} s"}
    seconds = time.perf_counter() - start
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    if not lines:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        return {"status": "crash", "error": f"exit {child.returncode}: {last[:300]}"}
    return {**json.loads(lines[-1][len(MARK) :]), "process_s": round(seconds, 2)}


def answer(result: dict[str, Any]) -> None:
    """Hand `result` to the parent."""
    print(MARK + json.dumps(result), flush=True)


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
