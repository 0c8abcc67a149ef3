"""A layer of experts on one GPU: effarch on Hugging Face's source and on a plain one, against Hugging Face's ways and Inductor.

    python benchmarks/moe.py --jobs 10 [--shapes qwen3] [--cases 4096,train] [--contenders effarch] [--budget 480] [--out FILE]
    python benchmarks/moe.py --smoke --device cpu --out FILE     tiny layers: to try the script, not a figure

The layers, router included, are those of Qwen3-30B-A3B, Mixtral 8x7B and DeepSeek-V3 (with its shared expert), in bfloat16, with
random weights. Cases: forward passes of 1 to 16384 tokens; 4096 tokens of skewed routing; forward and backward of 8192 tokens with
all gradients. The routing is uniform, or drawn by Zipf's law, and known (see moe_layers.py). Each contender runs on each shape in a
process of its own, and these take turns on the device, whole; with `--jobs`, that many processes compile beforehand for the
contenders that take long, side by side.

A result holds: median milliseconds, and up to 16 tokens those of a replay from a CUDA graph; seconds of the first call; peak memory
beyond weights and tokens; what forward keeps for backward; relative L2 errors against float64; the number of experts that got
tokens; the share of the floor, max(operations / peak, bytes / bandwidth); and what effarch decided.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from children import TURN, answer, run_children, turn
from common import Budget, cache_environment, environment, import_effcompile, release, result_path, select, warm_up, write_json
from moe_layers import SHAPES, SMOKE, Shape, hugging_face
from moe_trial import CONTENDERS, MEMORY, OURS, PEERS, Case, Contender, Trial, answered, cases, copied, unfit

TIMEOUT_S = 90.0  # for one contender on one shape, from its turn on
RESERVE_S = 15.0  # less than that is not enough for a process
AHEAD = 3  # processes that import while one has its turn
NOTES = (
    "first_s leaves out imports and the start of Inductor's workers; of effarch it is from empty caches, alone on the machine;"
    " of the contenders that compiled side by side beforehand (with jobs) it is that of so many processes at once",
    "errors are of the first 1024 tokens; those of the experts' gradients of the two with the most and the fewest tokens",
    "effarch-plain: weights of each token's experts, gathered, in two einsums; it runs as written only where the copies fit",
)


# ------------------------------------------------------------------------------------------------------------ one process


def child(stage: str, shape: str, contender: str, device: str, seed: int, smoke: bool, asked: list[str]) -> None:
    """One contender on one shape in this process: answers with each case that is asked for."""
    import_effcompile()
    import_layers()
    if CONTENDERS[contender].options is not None:
        warm_up(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    known = cases(smoke)
    with turn() if stage == "measure" else contextlib.nullcontext():
        if stage == "measure":
            signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S)  # ends this process, whatever it waits for
        trial = Trial((SMOKE if smoke else SHAPES)[shape], contender, device, seed)
        for name in asked:
            answer(functools.partial(answered, trial, known[name], stage))
            release(device)
        del trial
        release(device)


def import_layers() -> None:
    """Pay for imports before the turn on the device."""
    for shape in SMOKE.values():
        hugging_face(shape, "eager", "cpu")


# ---------------------------------------------------------------------------------------------------------- all processes


@dataclass
class Room:
    """Memory of the device that processes share."""

    free: float
    changed: threading.Condition = field(default_factory=threading.Condition)

    @contextlib.contextmanager
    def taken(self, wanted: float) -> Iterator[None]:
        """Wait until `wanted` bytes are free, or all of them, and hold them."""
        wanted = min(wanted, MEMORY)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= wanted)
            self.free -= wanted
        try:
            yield
        finally:
            with self.changed:
                self.free += wanted
                self.changed.notify_all()


def room_for(shape: Shape, contender: Contender, asked: list[Case]) -> float:
    """Bytes that a process takes which compiles these cases: weights, their gradients, what is copied, and rows of assignments."""
    found = [case for case in asked if unfit(shape, contender, case) is None]
    if not found:
        return 0.0
    copies = max(copied(shape, case) for case in found) if contender.source == "batched_mm" else 0.0
    rows = max(case.tokens * shape.k * 2.0 * (4 * shape.d + 5 * shape.f) for case in found)
    return shape.weight_bytes * (2 if any(case.backward for case in found) else 1) + copies + rows + 1e9


def pairs_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Shapes and contenders, in the order in which they are measured: the slowest contenders last."""
    chosen = select(list(SHAPES), args.shapes)
    return [(shape, name) for name in select(list(CONTENDERS), args.contenders) for shape in chosen]


def run(args: argparse.Namespace) -> None:
    """All measurements, written out after each process."""
    budget, path = Budget(args.budget), result_path("moe", args.device, args.out)
    known = cases(args.smoke)
    asked = select(list(known), args.cases)
    payload: dict[str, Any] = {"benchmark": "moe", "environment": environment(args.device), "smoke": args.smoke, "notes": NOTES}
    payload |= {"dtype": "bfloat16", "seed": args.seed, "jobs": args.jobs, "results": [], "bars": {}}
    writing = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="effcompile-bench-", ignore_cleanup_errors=True) as folder:
        variables = {**cache_environment(Path(folder)), TURN: str(Path(folder, "turn"))}
        children = functools.partial(results_of, args, variables)
        first = prepare(args, children, [known[name] for name in asked], budget) if args.jobs else {}

        def measure(pair: tuple[str, str]) -> None:
            results: list[dict[str, Any]]
            if budget.left < RESERVE_S:
                skipped = {"shape": pair[0], "contender": pair[1], "status": f"skipped: {args.budget:.0f} s were spent"}
                results = [{**skipped, "case": name} for name in asked]
            else:
                results = children("measure", *pair, asked, budget.left)
            with writing:
                for result in results:
                    if "first_s" in result:
                        result["first_s"] = first.get(identity(result), result["first_s"])
                    payload["results"].append(result)
                    show(result)
                add_error_ratios(payload["results"])
                payload["bars"] = bars(payload["results"])
                write_json(path, payload)

        with ThreadPoolExecutor(AHEAD if args.device == "cuda" else 1) as pool:
            list(pool.map(measure, pairs_of(args)))
    print(f"written to {path} in {args.budget - budget.left:.0f} s")


Children = Callable[[str, str, str, list[str], float], list[dict[str, Any]]]


def results_of(
    args: argparse.Namespace, variables: dict[str, str], stage: str, shape: str, contender: str, names: list[str], timeout: float
) -> list[dict[str, Any]]:
    """What one process answers, and for the cases that it did not come to, why."""
    arguments = [stage, shape, contender, args.device, str(args.seed), str(int(args.smoke)), *names]
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "2"} if stage == "prepare" else {}
    found, status = run_children(__file__, arguments, timeout=timeout, variables={**variables, **threads})
    if status.get("error", "").startswith(f"exit {-signal.SIGALRM.value}:"):
        status = {"status": f"no result in {TIMEOUT_S:.0f} s"}
    missing = [{"case": name, **status} for name in names[len(found) :]]
    return [{"shape": shape, "contender": contender, **result} for result in (*found, *missing)]


def prepare(args: argparse.Namespace, children: Children, asked: list[Case], budget: Budget) -> dict[tuple[str, ...], float]:
    """Fill the caches of compiled code, with processes side by side as memory allows; the seconds of first calls."""
    room, shapes = Room(MEMORY), SMOKE if args.smoke else SHAPES
    groups = [group for group in ([c for c in asked if c.backward], [c for c in asked if not c.backward]) if group]
    pairs = [pair for pair in pairs_of(args) if CONTENDERS[pair[1]].prepared]
    jobs = [(room_for(shapes[shape], CONTENDERS[name], group), shape, name, group) for shape, name in pairs for group in groups]

    def one(job: tuple[float, str, str, list[Case]]) -> list[dict[str, Any]]:
        wanted, shape, name, group = job
        if not wanted:
            return []
        with room.taken(wanted):
            return children("prepare", shape, name, [case.name for case in group], max(1.0, min(args.prepare, budget.left)))

    with ThreadPoolExecutor(args.jobs) as pool:
        found = [result for results in pool.map(one, sorted(jobs, key=lambda job: -job[0])) for result in results]
    print(f"compiled {len(found)} cases in {args.budget - budget.left:.0f} s", flush=True)
    return {identity(result): result["first_s"] for result in found if "first_s" in result}


def identity(result: dict[str, Any]) -> tuple[str, ...]:
    """What a result is of."""
    return tuple(result[name] for name in ("shape", "case", "contender"))


def time_of(result: dict[str, Any]) -> float | None:
    """Milliseconds that a result is judged by: those of a replay, where it is replayed."""
    return result.get("graph_ms", result.get("ms"))


def add_error_ratios(results: list[dict[str, Any]]) -> None:
    """Set `error_vs_eager`, the largest ratio; eager is Hugging Face's loop, or grouped_mm where that fails."""
    by_identity = {identity(result): result for result in results if "errors" in result}
    for (shape, case, _), result in by_identity.items():
        base = next((found for name in ("eager", "grouped") if (found := by_identity.get((shape, case, name)))), None)
        if base is not None:
            ratios = [result["errors"][name] / max(base["errors"][name], 1e-30) for name in base["errors"]]
            result["error_vs_eager"] = round(max(ratios), 3) if all(r == r for r in ratios) else float("nan")


def bars(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What effarch is held to, by contender of ours: speed over the best peer, memory, skew, first call, error."""
    by_identity = {identity(result): result for result in results}
    return {ours: _bars(by_identity, ours) for ours in OURS if any(key[2] == ours for key in by_identity)}


def _bars(found: dict[tuple[str, ...], dict[str, Any]], ours: str) -> dict[str, Any]:
    mine = {(key[0], key[1]): result for key, result in found.items() if key[2] == ours and result["status"] == "ok"}
    faster = {key: times_faster(found, *key, ours) for key in mine}
    known = {key: ratio for key, ratio in faster.items() if ratio is not None}
    forward = [ratio for (_, case), ratio in known.items() if not case.startswith(("train", "zipf"))]
    train = {shape: ratio for (shape, case), ratio in known.items() if case.startswith("train")}
    saved, skew = {}, {}
    for (shape, case), result in mine.items():
        theirs = found.get((shape, case, "grouped"), {}).get("saved_mb")
        if case.startswith("train") and theirs:
            saved[shape] = round(result["saved_mb"] / theirs, 3)
        even = mine.get((shape, case.removeprefix("zipf-")))
        if case.startswith("zipf") and even:
            skew[shape] = {"time": round(result["ms"] / even["ms"], 3), "active": [result["active"], even["active"]]}
    errors = [result["error_vs_eager"] for result in mine.values() if "error_vs_eager" in result]
    return {
        "not_rewritten": [list(key) for key, result in mine.items() if not result["rewritten"]],
        "forward_geometric_mean": round(statistics.geometric_mean(forward), 3) if forward else None,
        "forward_least": min(forward, default=None),
        "train": train,
        "slower_than_a_peer": [[*key, ratio] for key, ratio in known.items() if ratio < 1.0],
        "saved_vs_grouped": saved,
        "zipf_vs_uniform": skew,
        "largest_first_s": max((result["first_s"] for result in mine.values()), default=None),
        "largest_error_vs_eager": max(errors, default=None),
    }  # fmt: skip


def times_faster(found: dict[tuple[str, ...], dict[str, Any]], shape: str, case: str, ours: str) -> float | None:
    """How many times faster than the best peer that gave a result."""
    peers = [ms for name in PEERS if (ms := time_of(found.get((shape, case, name), {})))]
    mine = time_of(found[shape, case, ours])
    return round(min(peers) / mine, 3) if peers and mine else None


def show(result: dict[str, Any]) -> None:
    """Print one result on one line."""
    head = f"{result['shape']:<13} {result['case']:<11} {result['contender']:<17}"
    if "ms" not in result:
        print(head, result["status"], result.get("error", "")[:140], flush=True)
        return
    graph = f"  graph {result['graph_ms']:.4f}" if "graph_ms" in result else ""
    saved = f"  saved {result['saved_mb']} MB" if "saved_mb" in result else ""
    decided = f"  rewritten {result['rewritten']}" if "rewritten" in result else ""
    worst = max(result["errors"].values())
    print(
        f"{head}{result['ms']:10.4f} ms{graph}  floor {result['floor_ms']}  first {result['first_s']:5.1f} s{saved}"
        f"  error {worst:.1e}{decided}",
        flush=True,
    )


def main() -> None:
    """Read the command line, measure, write the JSON file."""
    if sys.argv[1:2] == ["--child"]:
        stage, shape, contender, device, seed, smoke, *asked = sys.argv[2:]
        child(stage, shape, contender, device, int(seed), smoke == "1", asked)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="comma-separated parts of: " + ", ".join(SHAPES))
    parser.add_argument("--cases", help="comma-separated parts of: " + ", ".join(cases(smoke=False)))
    parser.add_argument("--contenders", help="comma-separated parts of: " + ", ".join(CONTENDERS))
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--jobs", type=int, default=0, help="compile with so many processes side by side before")
    parser.add_argument("--prepare", type=float, default=120.0, help="seconds for each of them")
    parser.add_argument("--smoke", action="store_true", help="tiny layers and few tokens: to try the script, not a figure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
