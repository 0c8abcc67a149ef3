"""Decoding on one GPU: one query over a long cache, effarch on plain PyTorch against eager, Inductor, FlexAttention and SDPA.

    python benchmarks/decode.py [--rows gqa,latent] [--contenders eager,effarch] [--budget 300] [--scale 1] [--out FILE]

A result holds: median milliseconds, launched one by one and, on a GPU, replayed from a CUDA graph; seconds of the first call, from
empty caches; errors against float64 and their ratio to eager's; and the share of the floor, the bytes of the keys and values that
are visible, each read once, at the device's measured bandwidth.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from attention import PEAKS, RESERVE_S
from attention_sources import repeat_kv
from common import (
    Budget,
    cold_caches,
    environment,
    failure,
    first_call,
    import_effcompile,
    max_error,
    median_ms,
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
from torch.nn import functional as F

Tensors = tuple[Tensor, ...]
Step = Callable[..., Tensor]


# ------------------------------------------------------------------------------------------------------------ sources


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every key of the cache takes part."""
    groups = q.shape[1] // k.shape[1]
    scores = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * q.shape[-1] ** -0.5
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), repeat_kv(v, groups))


def sinks(q: Tensor, k: Tensor, v: Tensor, position: Tensor, sink: Tensor, window: int = 128) -> Tensor:
    """GPT-OSS: a window that ends at `position` [1], and a learned logit a head. `sink` [H]."""
    groups = q.shape[1] // k.shape[1]
    row = position + torch.arange(q.shape[2], device=q.device)[:, None]
    column = torch.arange(k.shape[2], device=q.device)[None, :]
    scores = torch.matmul(q, repeat_kv(k, groups).transpose(2, 3)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill((column > row) | (row - column >= window), torch.finfo(q.dtype).min)
    scores = torch.cat([scores, sink.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)[..., :-1]
    return torch.matmul(weights, repeat_kv(v, groups))


def latent(q: Tensor, cache: Tensor) -> Tensor:
    """DeepSeek's MLA with its projections absorbed: keys are the whole latent [B, 1, T, 576], values its first 512 columns."""
    scores = torch.matmul(q, cache.transpose(2, 3)) * 192**-0.5
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), cache[..., :512])


# --------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class Row:
    """One decoding. `visible` keys of `tokens` take part; `is_plain`: a call of SDPA says the same."""

    name: str
    title: str
    source: Step
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    width: int
    window: int | None = None
    is_latent: bool = False
    has_sink: bool = False

    def inputs(self, device: str) -> Tensors:
        def make(heads: int, tokens: int) -> Tensor:
            return torch.randn(self.batch, heads, tokens, self.width, device=device, dtype=torch.bfloat16)

        if self.is_latent:
            return make(self.heads, 1), make(self.kv_heads, self.tokens)
        qkv = make(self.heads, 1), make(self.kv_heads, self.tokens), make(self.kv_heads, self.tokens)
        if not self.has_sink:
            return qkv
        return (*qkv, torch.tensor([self.tokens - 1], device=device), torch.randn(self.heads, device=device, dtype=torch.bfloat16))

    def bytes(self) -> float:
        """Visible keys and values, each read once, at two bytes an element."""
        visible = min(self.tokens, self.window or self.tokens)
        return 2.0 * self.batch * self.kv_heads * visible * self.width * (1 if self.is_latent else 2)


GQA: dict[str, Any] = {"source": full, "heads": 32, "kv_heads": 8, "width": 128}
ROWS: tuple[Row, ...] = (
    Row(name="gqa-b1-32k", title="GQA 32/8, D 128, batch 1, cache 32768", batch=1, tokens=32768, **GQA),
    Row(name="gqa-b16-8k", title="GQA 32/8, D 128, batch 16, cache 8192", batch=16, tokens=8192, **GQA),
    Row(
        name="sinks-b16-8k", title="sinks and window 128, GQA 64/8, D 64, batch 16, cache 8192", source=sinks,
        batch=16, heads=64, kv_heads=8, tokens=8192, width=64, window=128, has_sink=True,
    ),
    Row(
        name="latent-b16-8k", title="absorbed MLA, 16 heads, D 576/512, batch 16, cache 8192", source=latent,
        batch=16, heads=16, kv_heads=1, tokens=8192, width=576, is_latent=True,
    ),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- contenders


def compiled(backend: str) -> Callable[[Row], Step | None]:
    """The source under a backend of torch.compile."""
    return lambda row: torch.compile(row.source, backend=backend, dynamic=False)


def sdpa(row: Row) -> Step | None:
    """torch's own choice among its fused kernels, where it needs no dense mask."""
    if row.source is not full:
        return None
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def flex(row: Row) -> Step | None:
    """FlexAttention's decoding kernel; it has no sinks, and wants values of a depth of their own memory."""
    if row.has_sink:
        return None
    from torch.nn.attention.flex_attention import flex_attention

    call = torch.compile(flex_attention, dynamic=False)
    if row.is_latent:
        return lambda q, cache: call(q, cache, cache[..., :512], scale=192**-0.5, enable_gqa=True)
    return lambda q, k, v: call(q, k, v, enable_gqa=True)


CONTENDERS: dict[str, Callable[[Row], Step | None]] = {
    "eager": lambda row: row.source,
    "inductor": compiled("inductor"),
    "effarch": compiled("effarch"),
    "flex": flex,
    "sdpa": sdpa,
}


# -------------------------------------------------------------------------------------------------------- measurement


def measure(row: Row, inputs: Tensors, expected: Tensor, contender: str, device: str) -> dict[str, Any]:
    """One contender, alone and from empty caches: exceptions become results."""
    result: dict[str, Any] = {"row": row.name, "title": row.title, "contender": contender}
    release(device)
    try:
        with cold_caches(), torch.no_grad():
            result |= _measure(row, inputs, expected, contender, device)
    except Exception as error:  # a contender that fails is a result, and the others still run
        result |= failure(error)
    release(device)
    return result


def _measure(row: Row, inputs: Tensors, expected: Tensor, contender: str, device: str) -> dict[str, Any]:
    attention = CONTENDERS[contender](row)
    if attention is None:
        return {"status": "cannot express it"}
    start_report()
    got, first_s = first_call(lambda: attention(*inputs), device)
    result: dict[str, Any] = {"status": "ok", "first_s": round(first_s, 2), "rel_l2": relative_l2(got, expected)}
    result["max_error"] = max_error(got, expected)
    if contender == "effarch":
        result["report"] = report()
    ms = median_ms(lambda: attention(*inputs), device, budget_ms=80.0)
    graphed, floor = graph_ms(lambda: attention(*inputs), device), floor_ms(row, device)
    result |= {"ms": round(ms, 4), "graph_ms": graphed and round(graphed, 4), "floor_ms": floor and round(floor, 4)}
    return result | {"of_floor": floor and round(floor / (graphed or ms), 3)}


def graph_ms(step: Callable[[], Tensor], device: str) -> float | None:
    """The median time of a replay, which leaves out the host; None on a CPU."""
    if device != "cuda":
        return None
    from triton.testing import do_bench_cudagraph

    with torch.cuda.stream(torch.cuda.Stream()):
        return float(do_bench_cudagraph(step, rep=50, return_mode="median"))


def floor_ms(row: Row, device: str) -> float | None:
    """The least time that this device's measured bandwidth allows; None where it is not known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peaks = next((value for key, value in PEAKS.items() if key in name), None)
    return peaks and row.bytes() / peaks[1] * 1e3


def reference(row: Row, inputs: Tensors) -> Tensor:
    """The source in float64, one sequence at a time."""
    q, cache, *rest = inputs
    parts = []
    for at in range(row.batch):
        batched = [x[at : at + 1].double() for x in (q, cache, *rest[: 0 if row.is_latent else 1])]
        others = [x.double() if x.is_floating_point() else x for x in rest[1:]]
        parts.append(row.source(*batched, *others))
    return torch.cat(parts)


def add_ratios(results: list[dict[str, Any]]) -> None:
    """Set `error_vs_eager` and `times_faster` than each peer."""
    for result in (r for r in results if r["status"] == "ok"):
        peers = {r["contender"]: r for r in results if r["row"] == result["row"] and r["status"] == "ok"}
        if "eager" in peers:
            result["error_vs_eager"] = round(result["rel_l2"] / max(peers["eager"]["rel_l2"], 1e-30), 3)
        if result["contender"] == "effarch":
            result["times_faster"] = {
                name: round(_time(peer) / _time(result), 2) for name, peer in peers.items() if peer is not result
            }


def _time(result: dict[str, Any]) -> float:
    return result["graph_ms"] or result["ms"]


def show(result: dict[str, Any]) -> None:
    """Print one result on one line."""
    head = f"{result['row']:<14} {result['contender']:<9}"
    if "ms" not in result:
        print(head, result["status"], result.get("error", "")[:140], flush=True)
        return
    graph = "" if result["graph_ms"] is None else f"  in a graph {result['graph_ms']:8.4f} ms"
    floor = "" if result["of_floor"] is None else f"  {result['of_floor']:.0%} of the floor"
    chosen = ", ".join(f"{d['outcome']}: {d['chosen'] or d['why']}" for d in result.get("report", {}).get("decisions", []))
    print(f"{head}{result['ms']:9.4f} ms{graph}{floor}  error {result['rel_l2']:.1e}  {chosen}", flush=True)


def run(rows: list[Row], contenders: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, written out after each."""
    budget, path = Budget(args.budget), result_path("decode", args.device, args.out)
    payload: dict[str, Any] = {"benchmark": "decode", "environment": environment(args.device), "dtype": "bfloat16"}
    payload |= {"seed": args.seed, "scale": args.scale, "results": []}
    for row in rows:
        inputs = row.inputs(args.device)
        with torch.no_grad():
            expected = reference(row, inputs)
        for contender in contenders:
            if budget.left > RESERVE_S:
                result = measure(row, inputs, expected, contender, args.device)
            else:
                result = {
                    "row": row.name,
                    "title": row.title,
                    "contender": contender,
                    "status": f"skipped: {args.budget:.0f} s were spent",
                }
            payload["results"].append(result)
            add_ratios(payload["results"])
            write_json(path, payload)
            show(result)
        del inputs, expected
        release(args.device)
    print(f"written to {path}")
    return payload


def main() -> None:
    """Read the command line, measure, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="comma-separated parts of: " + ", ".join(row.name for row in ROWS))
    parser.add_argument("--contenders", help="comma-separated parts of: " + ", ".join(CONTENDERS))
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--scale", type=int, default=1, help="divide the keys by this: a quick try, not a figure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    chosen = select([row.name for row in ROWS], args.rows)
    rows = [replace(row, tokens=row.tokens // args.scale) for row in ROWS if row.name in chosen]
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    import_effcompile()
    warm_up(args.device)
    run(rows, select(list(CONTENDERS), args.contenders), args)


if __name__ == "__main__":
    main()
