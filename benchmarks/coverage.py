"""Which attention effarch finds in real models on a CPU: every tiny model, with eager and with SDPA attention, against eager.

    python benchmarks/coverage.py [--models llama,bert] [--attention eager,sdpa] [--hardware h100-sxm] [--timeout 300] [--out FILE]

A result holds the attention sites and what became of them (rewritten, left, refused, with the reason), and the relative L2 error
of the model's output against the model run without a compiler. With `--hardware` decisions are those for that device; the model
still runs on the CPU, where the semantic operation is computed by its reference.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from children import answer, model_zoo, run_child
from common import environment, import_effcompile, max_error, relative_l2, report, result_path, select, write_json

OUTCOMES = ("rewritten", "left", "refused")


def child(name: str, attention: str, hardware: str) -> dict[str, Any]:
    """Run one model without a compiler and with effarch, on the same inputs."""
    import_effcompile()
    zoo = model_zoo()
    try:
        model, inputs = zoo.build(name, attention=attention)
    except ValueError as error:
        return {"status": "not offered", "error": " ".join(str(error).split())[:200]}
    compiled = torch.compile(model, backend="effarch", options={"hardware": None if hardware == "cpu" else hardware})
    with torch.no_grad():
        expected, got = zoo.result(model(**inputs)), zoo.result(compiled(**inputs))
    result: dict[str, Any] = {"status": "ok", "error_rel_l2": relative_l2(got, expected), "error_max": max_error(got, expected)}
    return {**result, "report": report()}


def count(result: dict[str, Any]) -> dict[str, Any]:
    """Add the number of attention sites by outcome, and the distinct reasons of those that were not rewritten."""
    sites = [d for d in result.get("report", {}).get("decisions", []) if d["family"] == "attention"]
    counts = Counter(d["outcome"] for d in sites)
    reasons = sorted({f"{d['outcome']}: {d['why']}" for d in sites if d["outcome"] != "rewritten"})
    return {**result, "sites": len(sites), **{outcome: counts[outcome] for outcome in OUTCOMES}, "reasons": reasons}


def show(result: dict[str, Any]) -> None:
    """Print one result: a line, and a line for each reason."""
    head = f"{result['model']:<20} {result['attention']:<6}"
    if result["status"] != "ok":
        print(head, result["status"], result.get("error", "")[:120], flush=True)
        return
    counts = "  ".join(f"{outcome} {result[outcome]:>2}" for outcome in OUTCOMES)
    print(f"{head} sites {result['sites']:>2}  {counts}  error {result['error_rel_l2']:.1e}", flush=True)
    for reason in result["reasons"]:
        print(f"{'':<28}{reason[:160]}", flush=True)


def totals(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the models that ran, and the largest error."""
    ran = [r for r in results if r["status"] == "ok"]
    sums = {name: sum(r[name] for r in ran) for name in ("sites", *OUTCOMES)}
    return {**sums, "ran": len(ran), "largest_error_rel_l2": max((r["error_rel_l2"] for r in ran), default=None)}


def main() -> None:
    """Read the command line, run the children, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "ATTENTION", "HARDWARE"), help=argparse.SUPPRESS)
    parser.add_argument("--models", help="comma-separated parts of model names")
    parser.add_argument("--attention", default="eager,sdpa")
    parser.add_argument("--hardware", default="cpu", help="the device to decide for")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one model")
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    if args.child:
        answer(lambda: child(*args.child))
        return
    path = result_path("coverage", args.hardware, args.out)
    payload: dict[str, Any] = {
        "benchmark": "coverage", "environment": environment("cpu"), "hardware": args.hardware, "results": []
    }  # fmt: skip
    for name in select(model_zoo().NAMES, args.models):
        for attention in args.attention.split(","):
            found = run_child(__file__, [name, attention, args.hardware], timeout=args.timeout)
            payload["results"].append(count({"model": name, "attention": attention, **found}))
            payload["totals"] = totals(payload["results"])
            write_json(path, payload)
            show(payload["results"][-1])
    print("; ".join(f"{key} {value}" for key, value in payload["totals"].items()), f"\nwritten to {path}")


if __name__ == "__main__":
    main()
