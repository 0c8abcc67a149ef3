"""What a mask costs in memory at long sequences: effarch, Inductor, FlexAttention with its block mask, SDPA with a dense one.

    python benchmarks/mask_memory.py [--tokens 65536,131072] [--masks causal,documents] [--contenders effarch] [--out FILE]

Attention of two heads of width 64, forward, in bfloat16. A dense mask, one byte for each pair of a query and a key, has 4 GiB at
65536 tokens and 16 GiB at 131072; the scores have four times that. Masks that are index expressions should cost nothing, and packed
documents, whose bounds depend on data, one small table of tiles. A result holds, in MiB of the device:

    extra_mb    beyond the inputs and the result, at the peak of a warm call, with what was made beforehand for the mask and stays
    kept_mb     of that, what was made beforehand and stays
    making_mb   at the peak while that was made and the first call compiled and ran, beyond the inputs

and the median milliseconds of a call. On an H100 everything takes about five minutes; what does not fit into `--budget` seconds is
skipped. On a CPU, where memory is not measured, `--tokens 256` tries the script.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from attention_contenders import CONTENDERS
from attention_rows import ROWS, Row
from common import (
    MIB,
    Budget,
    cold_caches,
    environment,
    failure,
    import_effcompile,
    median_ms,
    peak_mb,
    release,
    report,
    result_path,
    select,
    start_report,
    synchronize,
    warm_up,
    write_json,
)
from torch import Tensor

LENGTHS = "65536,131072"
HEADS, WIDTH = 2, 64
MASKS = {"causal": "causal-4k", "window": "window-16k", "documents": "documents-16k", "block diffusion": "diffusion-8k"}
PEERS = ("effarch", "flex", "sdpa-mask", "inductor")
RESERVE_S = 15.0  # about what one measurement takes, with its compilation


def row_of(mask: str, tokens: int) -> Row:
    """The row of the attention benchmark with that mask, narrow and long."""
    row = next(row for row in ROWS if row.name == MASKS[mask])
    return replace(row, heads=HEADS, kv_heads=HEADS, width=WIDTH, value_width=WIDTH, tokens=tokens)


def measure(row: Row, contender: str, device: str) -> dict[str, Any]:
    """One contender, alone and from empty caches: exceptions become results."""
    release(device)
    try:
        with cold_caches(), torch.no_grad():
            return _measure(row, contender, device)
    except Exception as error:  # a contender that runs out of memory is a result, and the others still run
        return failure(error)
    finally:
        release(device)


def _measure(row: Row, contender: str, device: str) -> dict[str, Any]:
    shape = (1, row.heads, row.tokens, row.width)
    inputs: tuple[Tensor, ...] = tuple(torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    extra = row.extra(device, row.tokens, row.heads)
    before = _start(device)
    start_report()
    attention = CONTENDERS[contender](row, extra, device)
    if attention is None:
        return {"status": "cannot express it"}
    kept = _allocated(device) - before
    out = attention(*inputs)
    result: dict[str, Any] = {"status": "ok"}
    if contender == "effarch":
        result["report"] = report()
    size = out.numel() * out.element_size() / MIB
    del out
    making = _peak(device) - before
    peak = peak_mb(lambda: attention(*inputs), device)
    result["ms"] = round(median_ms(lambda: attention(*inputs), device), 3)
    if peak is None:
        return result | {"extra_mb": None, "kept_mb": None, "making_mb": None}
    return result | {"extra_mb": round(kept + peak - size, 2), "kept_mb": round(kept, 2), "making_mb": round(making, 2)}


def _start(device: str) -> float:
    """What is allocated now, from where peaks are counted."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return _allocated(device)


def _allocated(device: str) -> float:
    synchronize(device)
    return torch.cuda.memory_allocated() / MIB if device == "cuda" else 0.0


def _peak(device: str) -> float:
    synchronize(device)
    return torch.cuda.max_memory_allocated() / MIB if device == "cuda" else 0.0


def main() -> None:
    """Read the command line, measure, write the JSON file after each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default=LENGTHS, help="comma-separated lengths")
    parser.add_argument("--masks", help="comma-separated parts of: " + ", ".join(MASKS))
    parser.add_argument("--contenders", help="comma-separated parts of: " + ", ".join(PEERS))
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    import_effcompile()
    warm_up(args.device)
    budget, path = Budget(args.budget), result_path("mask-memory", args.device, args.out)
    payload: dict[str, Any] = {"benchmark": "mask-memory", "environment": environment(args.device), "smoke": args.device != "cuda"}
    payload |= {"heads": HEADS, "width": WIDTH, "results": []}
    for tokens in map(int, args.tokens.split(",")):
        for mask in select(list(MASKS), args.masks):
            for contender in select(PEERS, args.contenders):
                skipped = {"status": f"skipped: {args.budget:.0f} s were spent"}
                found = measure(row_of(mask, tokens), contender, args.device) if budget.left > RESERVE_S else skipped
                result = {"mask": mask, "tokens": tokens, "contender": contender, **found}
                payload["results"].append(result)
                write_json(path, payload)
                print({name: value for name, value in result.items() if name != "report"}, flush=True)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
