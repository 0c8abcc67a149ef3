"""Linear recurrences on a CPU: `effcompile::recurrence` beside the same in plain PyTorch.

    python benchmarks/recurrence_cpu.py [--rows gla,mamba] [--tokens 512] [--batch 1] [--threads 1,2] [--out FILE]

All contenders of a row are called in turn, round by round, in one process; a ratio above 1 says how many times faster the operator
is. Inductor compiles the unrolled loop, which takes it seconds a step, so it runs on `--inductor-rows` and few tokens alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import (
    Budget,
    environment,
    failure,
    first_call,
    import_effcompile,
    relative_l2,
    release,
    result_path,
    select,
    write_json,
)
from recurrence_sources import ROWS, Inputs
from torch import Tensor

MODES = ("forward", "forward+backward")
OURS = "effarch"
Step = Callable[[], list[Tensor]]


def step(source: Callable[..., Tensor], inputs: Inputs, mode: str) -> Step:
    """One call of `mode`: the output, and the gradients of all inputs."""
    if mode == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [source(*inputs)]

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]

    def both() -> list[Tensor]:
        out = source(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return both


def in_turn_ms(contenders: dict[str, Step], *, budget_s: float) -> dict[str, float]:
    """Medians of calls in turn: at least three rounds, and as many as `budget_s` holds, up to thirty."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    started = time.perf_counter()
    for number in range(30):
        if number >= 3 and time.perf_counter() - started > budget_s:
            break
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(times) for name, times in samples.items()}


def measure(name: str, batch: int, tokens: int, mode: str, threads: int, *, inductor: bool, budget_s: float) -> dict[str, Any]:
    """All contenders on one set of inputs."""
    torch.set_num_threads(threads)
    row = ROWS[name]
    result: dict[str, Any] = {"row": name, "sizes": row.sizes, "batch": batch, "tokens": tokens, "mode": mode, "threads": threads}
    inputs = row.inputs(batch, tokens)
    release("cpu")
    try:
        contenders = {OURS: step(row.operation, inputs, mode)}
        contenders |= {f"eager {form}": step(source, inputs, mode) for form, source in row.eager.items()}
        if inductor:
            compiled = torch.compile(row.eager["loop"], backend="inductor", dynamic=False)
            contenders["inductor loop"] = step(compiled, inputs, mode)
            _, result["inductor_first_s"] = first_call(contenders["inductor loop"], "cpu")
        exact = step(row.eager["loop"], tuple(x.double() for x in inputs), mode)()
        got, eager = contenders[OURS](), contenders["eager loop"]()
        ms = in_turn_ms(contenders, budget_s=budget_s)
    except Exception as error:  # one failing case is a result, and the others still run
        return result | failure(error)
    errors = [relative_l2(a, b) / max(relative_l2(e, b), 1e-7) for a, b, e in zip(got, exact, eager, strict=True)]
    result |= {"status": "ok", "ms": {contender: round(value, 4) for contender, value in ms.items()}}
    result["times_faster"] = {contender: round(value / ms[OURS], 2) for contender, value in ms.items() if contender != OURS}
    return result | {"error_vs_eager": round(max(errors), 3)}


def show(result: dict[str, Any]) -> None:
    """Print one result on one line."""
    head = f"{result['row']:<10} B {result['batch']} T {result['tokens']:<5} {result['mode']:<17} {result['threads']} threads"
    if result["status"] != "ok":
        print(head, result["status"], result.get("error", "")[:120], flush=True)
        return
    ratios = "  ".join(f"{name} {value:.1f}x" for name, value in result["times_faster"].items())
    print(f"{head} {result['ms'][OURS]:9.2f} ms  faster than {ratios}  error {result['error_vs_eager']:.2f} of eager's", flush=True)


def main() -> None:
    """Read the command line, measure, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="comma-separated parts of: " + ", ".join(ROWS))
    parser.add_argument("--tokens", default="512")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--inductor-rows", default="rg-lru,mamba", help="rows that Inductor gets too; 'none' for none")
    parser.add_argument("--inductor-tokens", type=int, default=32)
    parser.add_argument("--case-seconds", type=float, default=4.0, help="seconds of calls for one case")
    parser.add_argument("--budget", type=float, default=1800.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    import_effcompile()
    from effcompile import runtime

    runtime.register()
    torch.manual_seed(0)
    path, budget = result_path("cpu-recurrence", "cpu", args.out), Budget(args.budget)
    payload: dict[str, Any] = {"benchmark": "cpu-recurrence", "environment": environment("cpu"), "results": []}
    small = [] if args.inductor_rows == "none" else select(list(ROWS), args.inductor_rows)
    cases = [
        (name, tokens, mode, int(threads), tokens == args.inductor_tokens and name in small)
        for name in select(list(ROWS), args.rows)
        for tokens in [*([args.inductor_tokens] if name in small else []), *map(int, args.tokens.split(","))]
        for mode in args.modes.split(",")
        for threads in args.threads.split(",")
    ]
    for number, (name, tokens, mode, threads, inductor) in enumerate(cases):
        if budget.left <= 0:
            payload["skipped"] = len(cases) - number
            print(f"skipped {payload['skipped']} of {len(cases)} cases: {args.budget:.0f} s were spent")
            break
        how = {"inductor": inductor, "budget_s": args.case_seconds}
        payload["results"].append(measure(name, args.batch, tokens, mode, threads, **how))
        write_json(path, payload)
        show(payload["results"][-1])
    print(f"written to {path}")


if __name__ == "__main__":
    main()
