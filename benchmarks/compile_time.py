"""What effarch adds to compilation on a CPU: its seconds before Inductor beside Inductor's own, over the tiny models.

    python benchmarks/compile_time.py [--models llama,gemma2] [--timeout 300] [--out FILE]
    python benchmarks/compile_time.py --second-process [--models llama]

Each model is compiled in a fresh process with caches off: once by effarch, whose report says what lifting, normalising, matching
and deciding took, and once by Inductor alone on the graph that effarch would have got. `--second-process` turns the caches on
instead, and runs effarch twice in fresh processes over one new cache folder: the second should find both of torch's caches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from children import answer, model_zoo, run_child
from common import cache_environment, environment, first_call, import_effcompile, report, result_path, select, write_json


class TimedInductor:
    """Inductor as a backend that counts the seconds it takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        start = time.perf_counter()
        try:
            return compile_fx(graph, inputs)
        finally:
            self.seconds += time.perf_counter() - start


def child(name: str, backend: str) -> dict[str, Any]:
    """Compile and run one model once."""
    import_effcompile()
    model, inputs = model_zoo().build(name)
    timed = TimedInductor()
    compiled = torch.compile(model, backend=timed if backend == "inductor" else backend)
    with torch.no_grad():
        _, seconds = first_call(lambda: compiled(**inputs), "cpu")
    counters = torch._dynamo.utils.counters
    result: dict[str, Any] = {"status": "ok", "first_s": round(seconds, 3)}
    result["fxgraph_cache_hit"] = counters["inductor"]["fxgraph_cache_hit"]
    result["autograd_cache_hit"] = counters["aot_autograd"]["autograd_cache_hit"]
    if backend == "inductor":
        return {**result, "inductor_s": round(timed.seconds, 3)}
    timings = report()["timings"]
    added = sum(seconds for stage, seconds in timings.items() if stage != "inductor")
    return {**result, "timings": timings, "added_s": round(added, 4)}


def cold(name: str, timeout: float) -> dict[str, Any]:
    """effarch's added seconds and Inductor's own, each from nothing."""
    result: dict[str, Any] = {"model": name}
    for backend in ("effarch", "inductor"):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            variables = {**cache_environment(Path(folder)), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
            result[backend] = run_child(__file__, [name, backend], timeout=timeout, variables=variables)
    if all(result[backend]["status"] == "ok" for backend in ("effarch", "inductor")) and result["inductor"]["inductor_s"] > 0:
        result["added_share"] = round(result["effarch"]["added_s"] / result["inductor"]["inductor_s"], 4)
    return result


def twice(name: str, timeout: float) -> dict[str, Any]:
    """Two processes, one after the other, over one cache folder."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        variables = cache_environment(Path(folder))
        runs = [run_child(__file__, [name, "effarch"], timeout=timeout, variables=variables) for _ in range(2)]
    result: dict[str, Any] = {"model": name, "first": runs[0], "second": runs[1]}
    if all(run["status"] == "ok" for run in runs):
        result["hits_both"] = runs[1]["fxgraph_cache_hit"] > 0 and runs[1]["autograd_cache_hit"] > 0
    return result


def show(result: dict[str, Any]) -> None:
    """Print one model's result on one line."""
    shown = {key: value for key, value in result.items() if key != "model"}
    for key, value in shown.items():
        if isinstance(value, dict):
            shown[key] = {k: v for k, v in value.items() if k != "timings"}
    print(f"{result['model']:<20}", "  ".join(f"{key}: {value}" for key, value in shown.items()), flush=True)


def main() -> None:
    """Read the command line, run the children, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "BACKEND"), help=argparse.SUPPRESS)
    parser.add_argument("--models", help="comma-separated parts of model names (default: all; with --second-process: llama)")
    parser.add_argument("--second-process", action="store_true", help="measure what a second process finds in the caches")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one process")
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    if args.child:
        answer(lambda: child(*args.child))
        return
    names = select(model_zoo().NAMES, args.models or ("llama" if args.second_process else None))
    benchmark = "compile-cache" if args.second_process else "compile-time"
    path = result_path(benchmark, "cpu", args.out)
    payload: dict[str, Any] = {"benchmark": benchmark, "environment": environment("cpu"), "results": []}
    for name in names:
        payload["results"].append((twice if args.second_process else cold)(name, args.timeout))
        if not args.second_process:
            shares = [r["added_share"] for r in payload["results"] if "added_share" in r]
            payload["median_added_share"] = round(statistics.median(shares), 4) if shares else None
        write_json(path, payload)
        show(payload["results"][-1])
    print(f"written to {path}" + ("" if args.second_process else f"; median of added / Inductor: {payload['median_added_share']}"))


if __name__ == "__main__":
    main()
