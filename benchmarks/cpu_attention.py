"""Attention functions on a CPU: is effarch ever slower than Inductor on the same source?

    python benchmarks/cpu_attention.py [--tokens 64,256] [--variants causal,padding] [--dtypes float32] [--threads 2] [--out FILE]

Both are timed in turn, round by round, in one process; a ratio above 1 says how many times faster effarch is. Differences below the
spread of repeated runs, about a twentieth, are noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import attention_sources as sources
import torch
from common import (
    Budget,
    environment,
    failure,
    import_effcompile,
    interleaved_ms,
    relative_l2,
    release,
    report,
    result_path,
    select,
    start_report,
    write_json,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

Extra = tuple[Tensor, ...]
NOISE = 0.95
WIDTH, HEADS = 64, 8
VARIANTS: dict[str, tuple[Callable[..., Tensor], int]] = {  # source and key-value heads
    "causal": (sources.causal, 8),
    "padding": (sources.padding, 8),
    "gqa": (sources.causal, 2),
    "softcap": (sources.soft_cap, 8),
}
MODES = ("forward", "forward+backward")


class FullPrecisionSoftmax(TorchFunctionMode):
    """Makes the sources' softmax keep its input's dtype, so that float64 inputs give a float64 result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.softmax:
            kwargs.pop("dtype")
        return func(*args, **kwargs)


def step(attention: Callable[..., Tensor], inputs: list[Tensor], extra: Extra, mode: str) -> Callable[[], list[Tensor]]:
    """One call of `mode`: the output, and the gradients of q, k and v."""
    if mode == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [attention(*inputs, *extra)]

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]

    def both() -> list[Tensor]:
        out = attention(*leaves, *extra)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return both


def measure(variant: str, tokens: int, dtype: str, mode: str) -> dict[str, Any]:
    """Both contenders on one set of inputs."""
    result: dict[str, Any] = {"variant": variant, "tokens": tokens, "dtype": dtype, "mode": mode}
    source, kv_heads = VARIANTS[variant]
    make = lambda heads: torch.randn(2, heads, tokens, WIDTH, dtype=getattr(torch, dtype))  # noqa: E731
    inputs = [make(HEADS), make(kv_heads), make(kv_heads)]
    lengths = torch.tensor([[tokens], [tokens * 3 // 4]])
    extra = ((torch.arange(tokens) < lengths).long(),) if variant == "padding" else ()
    release("cpu")
    start_report()
    try:
        ours = step(torch.compile(source, backend="effarch", dynamic=False), inputs, extra, mode)
        got = ours()
        found = report()
        theirs = step(torch.compile(source, dynamic=False), inputs, extra, mode)
        theirs()
        with FullPrecisionSoftmax():
            exact = step(source, [x.double() for x in inputs], extra, mode)()
        eager = step(source, inputs, extra, mode)()
        ms = interleaved_ms({"effarch": ours, "inductor": theirs}, budget_ms=200.0)
    except Exception as error:  # one failing case is a result, and the others still run
        return result | failure(error)
    errors = [relative_l2(a, b) / max(relative_l2(e, b), 1e-30) for a, b, e in zip(got, exact, eager, strict=True)]
    result |= {"status": "ok", "ms": {name: round(value, 4) for name, value in ms.items()}, "report": found}
    return result | {"times_faster": round(ms["inductor"] / ms["effarch"], 3), "error_vs_eager": round(max(errors), 3)}


def show(result: dict[str, Any]) -> None:
    """Print one result on one line."""
    head = f"{result['variant']:<8} T {result['tokens']:<5} {result['dtype']:<9} {result['mode']:<17}"
    if result["status"] != "ok":
        print(head, result["status"], result.get("error", "")[:120], flush=True)
        return
    chosen = ", ".join(f"{d['outcome']}: {d['chosen'] or d['why']}" for d in result["report"]["decisions"])
    times = f"effarch {result['ms']['effarch']:9.3f} ms  inductor {result['ms']['inductor']:9.3f} ms"
    print(f"{head} {times}  {result['times_faster']:6.2f}x  {chosen}", flush=True)


def main() -> None:
    """Read the command line, measure, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="64,128,256,512,1024,2048")
    parser.add_argument("--variants", help="comma-separated parts of: " + ", ".join(VARIANTS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1800.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    import_effcompile()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    path, budget = result_path("cpu-attention", "cpu", args.out), Budget(args.budget)
    payload: dict[str, Any] = {"benchmark": "cpu-attention", "environment": environment("cpu"), "results": []}
    cases = [
        (variant, int(tokens), dtype, mode)
        for variant in select(list(VARIANTS), args.variants)
        for tokens in args.tokens.split(",")
        for dtype in args.dtypes.split(",")
        for mode in args.modes.split(",")
    ]
    for number, case in enumerate(cases):
        if budget.left <= 0:
            payload["skipped"] = len(cases) - number
            print(f"skipped {payload['skipped']} of {len(cases)} cases: {args.budget:.0f} s were spent")
            break
        payload["results"].append(measure(*case))
        ran = [r for r in payload["results"] if r["status"] == "ok"]
        payload["slower"] = [r for r in ran if r["times_faster"] < NOISE]
        write_json(path, payload)
        show(payload["results"][-1])
    print(f"slower than Inductor: {len(payload.get('slower', []))} of {len(payload['results'])}; written to {path}")


if __name__ == "__main__":
    main()
