"""Attention on one GPU: effarch on plain PyTorch against eager, Inductor, FlexAttention and SDPA, side by side in one run.

    python benchmarks/attention.py [--rows causal,window] [--contenders eager,effarch] [--modes forward] [--budget 480] [--out FILE]

A result holds: median milliseconds; seconds of the first call, from empty caches; peak memory beyond the inputs; largest and
relative L2 error of the output and the gradients against a blocked float64 reference on fresh random inputs, and its ratio to
eager's own error; the share of the floor, max(operations / peak, bytes / bandwidth); and what effarch's report says.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from attention_contenders import CONTENDERS, Attention
from attention_reference import eager_rounding, reference
from attention_rows import ROWS, Extra, Row
from common import (
    Budget,
    cold_caches,
    environment,
    failure,
    first_call,
    import_effcompile,
    max_error,
    median_ms,
    peak_mb,
    relative_l2,
    release,
    report,
    result_path,
    select,
    start_report,
    warm_up,
    write_json,
)
from torch import Tensor

MODES = ("forward", "forward+backward")
PEAKS = {"H100": (790e12, 3.0e12), "H200": (790e12, 4.3e12)}  # measured: bf16 operations/s, bytes/s
RESERVE_S = 12.0  # about what one contender takes, with its compilation
NOTES = (
    "first_s starts from empty caches and leaves out process start, imports and the start of Inductor's worker processes",
    "flex and sdpa-mask: their masks are made beforehand and count neither in first_s nor in peak_mb",
    "eager-blocked: eager's rounding, a block of queries at a time; it stands in for eager's error where eager does not fit",
    "error_vs_eager: the largest ratio of relative L2 errors over the output and the gradients",
)


class Case:
    """One row's tensors, its reference, and the measurement of contenders on them."""

    def __init__(self, row: Row, device: str, precision: torch.dtype):
        self.row, self.device = row, device
        shape = {"q": (row.heads, row.width), "k": (row.kv_heads, row.width), "v": (row.kv_heads, row.value_width)}
        make = lambda heads, width: torch.randn(1, heads, row.tokens, width, device=device, dtype=torch.bfloat16)  # noqa: E731
        self.inputs: tuple[Tensor, ...] = tuple(make(*shape[name]) for name in "qkv")
        self.gradient = make(row.heads, row.value_width)
        self.extra: Extra = row.extra(device, row.tokens, row.heads)
        self.reference = reference(row, *self.inputs, self.extra, self.gradient, precision)
        release(device)

    def call(self, attention: Attention, mode: str) -> Callable[[], dict[str, Tensor]]:
        """One step of `mode` as a function without arguments; it returns the output, and the gradients if it makes them."""
        if mode == "forward":

            def forward() -> dict[str, Tensor]:
                with torch.no_grad():
                    return {"out": attention(*self.inputs)}

            return forward
        leaves = tuple(x.detach().requires_grad_() for x in self.inputs)

        def both() -> dict[str, Tensor]:
            out = attention(*leaves)
            grads = torch.autograd.grad(out, leaves, self.gradient)
            return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

        return both

    def errors(self, results: dict[str, Tensor]) -> dict[str, dict[str, float]]:
        return {
            name: {"max": max_error(got, self.reference[name]), "rel_l2": relative_l2(got, self.reference[name])}
            for name, got in results.items()
        }

    def floor_ms(self, mode: str) -> float | None:
        """The least time that this device's measured peaks allow; None where they are not known."""
        name = torch.cuda.get_device_name() if self.device == "cuda" else ""
        peaks = next((value for key, value in PEAKS.items() if key in name), None)
        if peaks is None:
            return None
        backward = mode != "forward"
        return max(self.row.flops(backward=backward) / peaks[0], 0.0 if backward else self.row.bytes() / peaks[1]) * 1e3


def measure(case: Case, contender: str, mode: str) -> dict[str, Any]:
    """One contender, alone and from empty caches: exceptions become results."""
    result: dict[str, Any] = {"row": case.row.name, "title": case.row.title, "mode": mode, "contender": contender}
    release(case.device)
    try:
        with cold_caches():
            result |= _measure(case, contender, mode)
    except Exception as error:  # a contender that fails is a result, and the others still run
        result |= failure(error)
    release(case.device)
    return result


def _measure(case: Case, contender: str, mode: str) -> dict[str, Any]:
    attention = CONTENDERS[contender](case.row, case.extra, case.device)
    if attention is None:
        return {"status": "cannot express it"}
    start_report()
    step = case.call(attention, mode)
    got, first_s = first_call(step, case.device)
    result: dict[str, Any] = {"status": "ok", "first_s": round(first_s, 2), "errors": case.errors(got)}
    del got
    if contender == "effarch":
        result["report"] = report()
    peak, floor = peak_mb(step, case.device), case.floor_ms(mode)
    ms = median_ms(step, case.device, budget_ms=80.0)
    result |= {"ms": round(ms, 4), "peak_mb": None if peak is None else round(peak, 1)}
    return result | {"floor_ms": floor and round(floor, 4), "of_floor": floor and round(floor / ms, 3)}


def blocked_errors(case: Case, mode: str) -> dict[str, Any]:
    """The errors of eager's rounding, computed in blocks."""
    got = eager_rounding(case.row, *case.inputs, case.extra, case.gradient)
    kept = {"out": got["out"]} if mode == "forward" else got
    base = {"row": case.row.name, "title": case.row.title, "mode": mode, "contender": "eager-blocked", "status": "ok"}
    return {**base, "errors": case.errors(kept)}


def add_error_ratios(results: list[dict[str, Any]]) -> None:
    """Set `error_vs_eager` on every result that has errors."""
    for result in results:
        same = [r for r in results if r["row"] == result["row"] and r["mode"] == result["mode"] and "errors" in r]
        base = next((r for name in ("eager", "eager-blocked") for r in same if r["contender"] == name), None)
        if base is None or "errors" not in result:
            continue
        ratios = [result["errors"][name]["rel_l2"] / max(base["errors"][name]["rel_l2"], 1e-30) for name in result["errors"]]
        result["error_vs_eager"] = round(max(ratios), 3) if all(r == r for r in ratios) else float("nan")


def bars(results: list[dict[str, Any]], tokens: dict[str, int]) -> list[dict[str, Any]]:
    """What effarch is held to, row by row: faster than Inductor at T >= 8192, first call, memory beside FlexAttention, error."""
    found = []
    for ours in (r for r in results if r["contender"] == "effarch" and r["status"] == "ok"):
        same = [r for r in results if (r["row"], r["mode"]) == (ours["row"], ours["mode"])]
        peers = {r["contender"]: r for r in same if r["status"] == "ok"}
        bar: dict[str, Any] = {"row": ours["row"], "mode": ours["mode"], "first_call_under_15_s": ours["first_s"] < 15}
        if tokens[ours["row"]] >= 8192 and "inductor" in peers:
            bar["times_faster_than_inductor"] = round(peers["inductor"]["ms"] / ours["ms"], 2)
        fused = [peers[name]["ms"] for name in ("flex", "sdpa-flash2", "sdpa-cudnn", "sdpa-mask") if name in peers]
        if fused:
            bar["times_faster_than_best_fused_peer"] = round(min(fused) / ours["ms"], 2)
        if ours["peak_mb"] and "flex" in peers and peers["flex"]["peak_mb"]:
            bar["memory_vs_flex"] = round(ours["peak_mb"] / peers["flex"]["peak_mb"], 2)
            bar["memory_vs_flex_at_most_1.2"] = bar["memory_vs_flex"] <= 1.2
        if "error_vs_eager" in ours:
            bar["error_at_most_twice_eager"] = ours["error_vs_eager"] <= 2.0
        found.append(bar)
    return found


def show(result: dict[str, Any]) -> None:
    """Print one result on one line."""
    head = f"{result['row']:<14} {result['mode']:<17} {result['contender']:<14}"
    if "ms" not in result:
        print(head, result["status"], result.get("error", "")[:140], flush=True)
        return
    memory = "" if result["peak_mb"] is None else f"{result['peak_mb']:9.0f} MB"
    worst = max(error["rel_l2"] for error in result["errors"].values())
    chosen = ", ".join(f"{d['outcome']}: {d['chosen'] or d['why']}" for d in result.get("report", {}).get("decisions", []))
    print(f"{head}{result['ms']:10.3f} ms  first {result['first_s']:6.1f} s {memory}  error {worst:.1e}  {chosen}", flush=True)


def run(rows: list[Row], contenders: list[str], modes: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, written out after each."""
    budget, path = Budget(args.budget), result_path("attention", args.device, args.out)
    payload: dict[str, Any] = {"benchmark": "attention", "environment": environment(args.device), "notes": NOTES}
    payload |= {"dtype": "bfloat16", "seed": args.seed, "scale": args.scale, "reference": args.reference}
    payload |= {"results": [], "bars": []}
    results, tokens = payload["results"], {row.name: row.tokens for row in rows}

    def record(result: dict[str, Any]) -> None:
        results.append(result)
        add_error_ratios(results)
        payload["bars"] = bars(results, tokens)
        write_json(path, payload)
        show(result)

    for row in rows:
        case = Case(row, args.device, getattr(torch, args.reference)) if budget.left > RESERVE_S else None
        for mode in modes:
            done: dict[str, str] = {}
            for contender in contenders:
                if case is not None and budget.left > RESERVE_S:
                    record(measure(case, contender, mode))
                else:
                    skipped = {"row": row.name, "title": row.title, "mode": mode, "contender": contender}
                    record({**skipped, "status": f"skipped: {args.budget:.0f} s were spent"})
                done[contender] = results[-1]["status"]
            if case is not None and done.get("eager") != "ok":
                record(blocked_errors(case, mode))
        del case
        release(args.device)
    print(f"written to {path}")
    return payload


def main() -> None:
    """Read the command line, measure, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="comma-separated parts of row names, or 'all' (default: the five of the first table)")
    parser.add_argument("--contenders", help="comma-separated parts of: " + ", ".join(CONTENDERS))
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated: forward, forward+backward")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--reference", choices=("float64", "float32"), default="float64", help="precision of the reference")
    parser.add_argument("--scale", type=int, default=1, help="divide the tokens by this: a quick try, not a figure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    unknown = set(args.modes.split(",")) - set(MODES)
    if unknown:
        raise SystemExit(f"Expected modes of {MODES} but got {sorted(unknown)}")
    names = [row.name for row in ROWS if args.rows or not row.later]
    chosen = select(names, None if args.rows == "all" else args.rows)
    rows = [replace(row, tokens=row.tokens // args.scale) for row in ROWS if row.name in chosen]
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    import_effcompile()
    warm_up(args.device)
    run(rows, select(list(CONTENDERS), args.contenders), args.modes.split(","), args)


if __name__ == "__main__":
    main()
