"""How good the cost model's choices are: all configurations of cases drawn at random are timed, the chosen compared with the best.

`--fit RESULT.json` needs no GPU: it fits the model's factors to the times of a result. `--smoke` invents the times.

All configurations are compiled side by side first, in processes of their own, and then timed one by one, alone on the device.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from children import answer, run_children
from common import Budget, cache_environment, environment, failure, median_ms, release, result_path, synchronize, write_json
from cost_model_cases import FAMILIES, Candidate, Case, call_of, candidates, draw, predicted_ms

from effcompile.cost_model import devices
from effcompile.cost_model.fit import fit
from effcompile.cost_model.hardware import Hardware
from effcompile.cost_model.schedule import DEFAULT, Factors

COMPILING = 0.7  # of the budget, at most
CALL_S = 60.0  # for one child's start and for a job that hangs
FATAL = ("crash", "no result")  # what took its process along is not tried again; memory, alone on the device, suffices for more
TOP = 3  # candidates that are measured where a few may be
NOTES = (
    "ms: the median of warm calls, the caches of the device flushed in between; the first candidate of a case is the fixed rule's",
    "shares are best time over chosen time: rule, the model's first, the best of its first three; geometric means and worst cases",
    "candidates that the device refuses are passed over; refused_first: cases whose first choice by the model is one of them",
    "mape is over candidates that ran, of those that the model expects to",
    "a case counts once all its candidates have run or were refused",
)
Jobs = list[tuple[Case, int]]


# ------------------------------------------------------------------------------------------------------------------ measuring


def child(kind: str, path: str, numbers: Sequence[str]) -> None:
    """Compiles or times the jobs of these numbers, until the time that the file says; each answer is a line."""
    given = json.loads(Path(path).read_text())
    jobs, until = [(Case(**case), at) for case, at in given["jobs"]], given["until"][kind]
    for number in map(int, numbers):
        if time.time() > until:
            return
        case, at = jobs[number]
        answer(partial(measured, case, at, kind, given["device"]))


def measured(case: Case, at: int, kind: str, device: str) -> dict[str, Any]:
    """One candidate, called once, and timed if that is asked for. What it raises is its result."""
    try:
        release(device)
        call = call_of(case, candidates(case, devices.detect(device))[at], device)
        call()
        synchronize(device)
        return {"status": "ok", **({"ms": round(median_ms(call, device, budget_ms=30.0), 5)} if kind == "time" else {})}
    except Exception as error:
        result = failure(error)
    try:
        synchronize(device)
    except Exception as error:
        raise SystemExit(f"{error}: {result}") from error  # the device takes no more calls from this process
    return result


def carried_out(kind: str, path: Path, numbers: list[int], until: float, folder: Path) -> dict[int, dict[str, Any]]:
    """The answers of children to these jobs, one child after the other: a job at which one dies is left out by the next."""
    found, left = dict[int, dict[str, Any]](), list(numbers)
    while left and time.time() < until:
        timeout = until - time.time() + CALL_S
        answers, status = run_children(
            __file__, [kind, str(path), *map(str, left)], timeout=timeout, variables=cache_environment(folder)
        )
        found |= {number: result for number, result in zip(left, answers, strict=False)}
        left = left[len(answers) :]
        if left and time.time() < until:
            found[left.pop(0)] = status
    return found


def times_of(jobs: Jobs, args: argparse.Namespace, budget: Budget, hardware: Hardware) -> list[dict[str, Any]]:
    """What became of each job: status, and `ms` of those that ran."""
    if args.smoke:
        return invented(jobs, hardware, args.seed)
    with tempfile.TemporaryDirectory(prefix="effcompile-bench-", ignore_cleanup_errors=True) as folder:
        path, now = Path(folder, "jobs.json"), time.time()
        until = {"compile": now + COMPILING * budget.left, "time": now + budget.left}
        listed = [(case.to_dict(), at) for case, at in jobs]
        write_json(path, {"device": args.device, "until": until, "jobs": listed})
        shares = [list(range(len(jobs)))[worker :: args.jobs] for worker in range(args.jobs)]
        with ThreadPoolExecutor(args.jobs) as pool:
            compiled = pool.map(lambda share: carried_out("compile", path, share, until["compile"], Path(folder)), shares)
            results = {number: result for found in compiled for number, result in found.items()}
        print(f"compiled {len(results)} of {len(jobs)} candidates in {args.budget - budget.left:.0f} s", flush=True)
        ready = [number for number in sorted(results) if not results[number]["status"].startswith(FATAL)]
        timed = carried_out("time", path, ready, until["time"], Path(folder))
    refused = {number: result for number, result in results.items() if number not in ready}
    return [timed.get(n) or refused.get(n) or {"status": "skipped: the time was spent"} for n in range(len(jobs))]


def invented(jobs: Jobs, hardware: Hardware, seed: int) -> list[dict[str, Any]]:
    """Times by other factors than the model's, with noise: nothing is run."""
    source, truth, found = random.Random(seed), Factors(matmul=0.7, latency_clocks=1100.0, overlap=0.4), []
    for case, at in jobs:
        ms = predicted_ms(case, candidates(case, hardware)[at], hardware, truth) * math.exp(source.gauss(0.0, 0.03))
        found.append({"status": "ok", "ms": ms} if math.isfinite(ms) else {"status": "error", "error": "does not fit"})
    return found


# ------------------------------------------------------------------------------------------------------------------- judging


def described(case: Case, hardware: Hardware) -> tuple[list[Candidate], list[float], float]:
    """A case's candidates, their predicted times and how long the decision took, in milliseconds."""
    start = time.perf_counter()
    found = candidates(case, hardware)
    predicted = [predicted_ms(case, candidate, hardware) for candidate in found]
    return found, predicted, (time.perf_counter() - start) * 1e3


def judged(row: dict[str, Any]) -> dict[str, float] | None:
    """The shares of one case; None unless it is whole, and more than one candidate ran."""
    entries = row["candidates"]
    ran = [entry for entry in entries if "ms" in entry]
    if len(ran) < 2 or any(entry["status"].startswith("skipped") for entry in entries):
        return None
    best = min(entry["ms"] for entry in ran)
    order = sorted(entries, key=lambda entry: math.inf if entry["predicted_ms"] is None else entry["predicted_ms"])
    ranked = [entry for entry in order if "ms" in entry]
    errors = [abs(entry["predicted_ms"] / entry["ms"] - 1) for entry in ran if entry["predicted_ms"] is not None]
    rule = entries[0].get("ms")
    shares = {"model": best / ranked[0]["ms"], f"model_best_of_{TOP}": best / min(entry["ms"] for entry in ranked[:TOP])}
    more = {"refused_first": float("ms" not in order[0]), "mape": statistics.fmean(errors) if errors else math.nan}
    return shares | more | {"rule": 0.0 if rule is None else best / rule}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means and worst cases, over all families and of each."""
    found: dict[str, Any] = {}
    for family in ("all", *FAMILIES):
        mine = [row for row in rows if family in ("all", row["case"]["family"])]
        verdicts = [verdict for row in mine if (verdict := judged(row)) is not None]
        if not verdicts:
            continue
        names = ("rule", "model", f"model_best_of_{TOP}")
        shares = {name: [verdict[name] for verdict in verdicts if verdict[name] > 0] for name in names}
        found[family] = {
            "cases": len(verdicts),
            "candidates": sum(len(row["candidates"]) for row in mine),
            **{name: {"geomean": _geomean(x), "worst": round(min(x), 4)} for name, x in shares.items() if x},
            "refused_first": int(sum(verdict["refused_first"] for verdict in verdicts)),
            "mape": _mean([verdict["mape"] for verdict in verdicts if not math.isnan(verdict["mape"])]),
            "selection_ms": {"median": round(statistics.median(r["selection_ms"] for r in mine), 2),
                             "worst": round(max(r["selection_ms"] for r in mine), 2)},
        }  # fmt: skip
    return found


def _mean(errors: list[float]) -> float | None:
    return round(statistics.fmean(errors), 4) if errors else None


def _geomean(shares: list[float]) -> float:
    return round(math.exp(statistics.fmean(map(math.log, shares))), 4)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All cases, measured and judged, and written."""
    budget = Budget(args.budget)
    hardware = devices.get("h100-sxm") if args.smoke else devices.detect(args.device)
    cases = draw(args.cases, args.seed)
    decisions = [described(case, hardware) for case in cases]
    jobs = [(case, at) for case, (found, _, _) in zip(cases, decisions, strict=True) for at in range(len(found))]
    results = iter(times_of(jobs, args, budget, hardware))
    rows = []
    for case, (found, predicted, selection_ms) in zip(cases, decisions, strict=True):
        entries = [
            {"config": _text(candidate), "predicted_ms": round(ms, 5) if math.isfinite(ms) else None, **next(results)}
            for candidate, ms in zip(found, predicted, strict=True)
        ]
        rows.append({"name": case.name, "case": case.to_dict(), "selection_ms": round(selection_ms, 3), "candidates": entries})
    payload: dict[str, Any] = {"benchmark": "cost-model", "environment": environment(args.device), "notes": NOTES}
    payload |= {"hardware": hardware.name, "invented": args.smoke, "seed": args.seed, "summary": summary(rows), "results": rows}
    path = result_path("cost-model", args.device, args.out)
    write_json(path, payload)
    print(json.dumps(payload["summary"], indent=1))
    print(f"written to {path}")
    return payload


def _text(candidate: Candidate) -> str:
    return repr(candidate.config) if candidate.splits is None else f"{candidate.config!r}, splits={candidate.splits}"


# -------------------------------------------------------------------------------------------------------------------- fitting


def fitted(payload: dict[str, Any], others: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Factors by every other case, judged by the cases between; then by all, judged by other devices' results too."""
    hardware = devices.get(payload["hardware"])
    rows = [row for row in payload["results"] if judged(row) is not None]
    known, held_out = rows[::2], rows[1::2]
    halves, whole = (fit(*_measurements(part, hardware)) for part in (known, rows))

    def judged_by(part: list[dict[str, Any]], factors: Factors) -> dict[str, Any]:
        return {name: summary(_repredicted(part, hardware, f)) for name, f in (("before", DEFAULT), ("after", factors))}

    found = {"factors": asdict(whole), "held_out": judged_by(held_out, halves), "all": judged_by(rows, whole)}
    for other in others:
        device = devices.get(other["hardware"])
        found[other["hardware"]] = summary(_repredicted(other["results"], device, whole))
    return found


def _measurements(rows: list[dict[str, Any]], hardware: Hardware) -> tuple[Callable[[Factors], list[float]], list[float]]:
    kept = [
        (case, candidate, entry["ms"])
        for row in rows
        for case, candidate, entry in _entries(row, hardware)
        if "ms" in entry and math.isfinite(predicted_ms(case, candidate, hardware))
    ]

    def predict(factors: Factors) -> list[float]:
        return [predicted_ms(case, candidate, hardware, factors) for case, candidate, _ in kept]

    return predict, [ms for *_, ms in kept]


def _entries(row: dict[str, Any], hardware: Hardware) -> list[tuple[Case, Candidate, dict[str, Any]]]:
    """The candidates that a result was taken of, as far as there still are such configurations."""
    case = Case(**row["case"])
    known = {_text(candidate): candidate for candidate in candidates(case, hardware)}
    return [(case, known[entry["config"]], entry) for entry in row["candidates"] if entry["config"] in known]


def _repredicted(rows: list[dict[str, Any]], hardware: Hardware, factors: Factors) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        entries = []
        for case, candidate, entry in _entries(row, hardware):
            ms = predicted_ms(case, candidate, hardware, factors)
            entries.append({**entry, "predicted_ms": ms if math.isfinite(ms) else None})
        found.append({**row, "candidates": entries})
    return found


def main() -> None:
    """Read the command line; measure or fit."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=64, help="how many are drawn")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile side by side")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="invent the times: a try of the rest, not a figure")
    parser.add_argument("--fit", metavar="RESULT.json", help="fit the factors to a result, and print them")
    parser.add_argument(
        "--judge", metavar="RESULT.json", action="append", default=[], help="with --fit: on another device's result"
    )
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    if args.fit:
        payload, *others = (json.loads(Path(path).read_text()) for path in (args.fit, *args.judge))
        print(json.dumps(fitted(payload, others), indent=1))
        return
    args.device = "cpu" if args.smoke else args.device
    run(args)


if __name__ == "__main__":
    main()
