"""How time and memory of a linear recurrence grow with the sequence, beside causal softmax attention of the same shape.

    python benchmarks/recurrence_length.py [--form simple-gla] [--lengths 4096,65536,262144] [--out FILE]

Batch 1, 32 heads of 128, bfloat16, forward. A result holds median milliseconds, peak memory beyond the inputs, and milliseconds per
4096 tokens: the same for all lengths if time is linear. `crossover`: the least length from which the recurrence is the faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import environment, failure, import_effcompile, median_ms, peak_mb, release, result_path, write_json
from recurrence import FORMS, Call, Form, Inputs, effcompile_call, inputs_of
from torch import Tensor
from torch.nn import functional as F

HEADS, WIDTH = 32, 128
LENGTHS = tuple(2**k for k in range(9, 19))


def softmax_call(form: Form) -> Call:
    """Causal attention by torch, on the operands that a form has."""

    def call(x: Inputs) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2)

    return call


CONTENDERS: dict[str, Callable[[Form], Call]] = {"effcompile": effcompile_call, "softmax attention": softmax_call}


def measured(form: Form, call: Call, length: int, device: str) -> dict[str, Any]:
    """One length."""
    x = inputs_of(form, (1, length, HEADS, WIDTH), device, 0)
    with torch.no_grad():
        call(x)
        peak, ms = peak_mb(lambda: call(x), device), median_ms(lambda: call(x), device)
    return {"status": "ok", "ms": round(ms, 4), "peak_mb": peak and round(peak, 1), "ms_per_4096": round(ms * 4096 / length, 4)}


def crossover(results: list[dict[str, Any]]) -> int | None:
    """The least length from which on the recurrence takes less time at every length."""
    times = {(r["contender"], r["tokens"]): r["ms"] for r in results if "ms" in r}
    faster = {
        t: times["effcompile", t] < ms for (name, t), ms in times.items() if name != "effcompile" and ("effcompile", t) in times
    }
    found = None
    for length in sorted(faster, reverse=True):
        if not faster[length]:
            break
        found = length
    return found


def main() -> None:
    """Read the command line, measure, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", default="simple-gla", choices=[name for name, form in FORMS.items() if form.decay != "rows"])
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="comma-separated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    import_effcompile()
    form, path = FORMS[args.form], result_path("recurrence-length", args.device, args.out)
    payload: dict[str, Any] = {"benchmark": "recurrence-length", "environment": environment(args.device), "form": form.name}
    payload |= {"heads": HEADS, "width": WIDTH, "results": []}
    for name, make in CONTENDERS.items():
        call = make(form)
        for length in map(int, args.lengths.split(",")):
            try:
                found = measured(form, call, length, args.device)
            except Exception as error:  # a length that does not fit is a result
                found = failure(error)
            release(args.device)
            payload["results"].append({"contender": name, "tokens": length, **found})
            payload["crossover"] = crossover(payload["results"])
            write_json(path, payload)
            print(payload["results"][-1], flush=True)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
