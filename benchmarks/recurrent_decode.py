"""Decoding with a recurrent state: one token, the state updated in place; eager, Inductor and effarch on the same plain PyTorch.

    python benchmarks/recurrent_decode.py [--rows mamba2,gla] [--batches 1,16,128] [--out FILE]

A result holds median milliseconds, launched one by one and, on a GPU, replayed from a CUDA graph; the share of the floor, the bytes
of the state read and written once at the device's measured bandwidth; and the relative L2 errors of the output and of the state
against float64. Of effarch it says what was decided.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from attention import PEAKS
from common import (
    environment,
    failure,
    first_call,
    import_effcompile,
    median_ms,
    relative_l2,
    release,
    result_path,
    select,
    write_json,
)
from torch import Tensor
from torch.nn import functional as F

Step = Callable[..., Tensor]


def mamba2_step(state: Tensor, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, a_log: Tensor, skip: Tensor) -> Tensor:
    """state [B, H, P, N], x [B, H, P], b, c [B, N], dt [B, H], a_log, skip [H]: the output [B, H, P]."""
    dt = F.softplus(dt.float())
    decay = torch.exp(-torch.exp(a_log) * dt)
    update = (dt[..., None] * x.float())[..., None] * b.float()[:, None, None]
    state.copy_(state * decay[..., None, None] + update)
    return ((state * c.float()[:, None, None]).sum(-1) + skip[:, None] * x.float()).to(x.dtype)


def mamba2_matmul_step(state: Tensor, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, a_log: Tensor, skip: Tensor) -> Tensor:
    """The same, read by a product of matrices, as Hugging Face's models do."""
    dt = F.softplus(dt.float())
    decay = torch.exp(-torch.exp(a_log) * dt)
    update = (dt[..., None] * x.float())[..., None] * b.float()[:, None, None]
    new = state * decay[..., None, None] + update
    state.copy_(new)
    out = torch.matmul(new, c.to(new.dtype)[:, None, :, None]).squeeze(-1)
    return (out + skip[:, None] * x.float()).to(x.dtype)


def gated_delta_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor) -> Tensor:
    """state [B, H, K, V], q, k [B, H, K], v [B, H, V], beta, gate [B, H]: the output [B, H, V]."""
    q, k, v = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1), v.float()
    decayed = state * F.logsigmoid(gate.float()).exp()[..., None, None]
    delta = (v - (decayed * k[..., None]).sum(-2)) * beta.float().sigmoid()[..., None]
    state.copy_(decayed + k[..., None] * delta[..., None, :])
    return (q[..., None] * state).sum(-2).to(gate.dtype)


def gla_step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """state [B, H, K, V], q, k [B, H, K], v [B, H, V], gate [B, H, K]: the output [B, H, V]."""
    decay = F.logsigmoid(gate.float()).div(16).exp()
    state.copy_(state * decay[..., None] + k.float()[..., None] * v.float()[..., None, :])
    return (q.float()[..., None] * state).sum(-2).to(q.dtype)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step with its operands: `sizes` of each after the batch; the first is the state."""

    name: str
    step: Step
    sizes: tuple[tuple[int, ...], ...]
    shared: int = 0  # of the last operands, how many have no batch

    def operands(self, batch: int, device: str) -> list[Tensor]:
        """The state in float32, the rest in bfloat16, what is shared in float32."""
        generator = torch.Generator(device=device).manual_seed(0)
        made = []
        for position, size in enumerate(self.sizes):
            alone = position >= len(self.sizes) - self.shared
            x = torch.randn(size if alone else (batch, *size), generator=generator, device=device)
            made.append(x if alone or position == 0 else x.bfloat16())
        return made


_MAMBA2 = ((80, 64, 128), (80, 64), (128,), (128,), (80,), (80,), (80,))
ROWS = (
    Row(name="mamba2", step=mamba2_step, sizes=_MAMBA2, shared=2),
    Row(name="mamba2-matmul", step=mamba2_matmul_step, sizes=_MAMBA2, shared=2),
    Row(name="gated-delta", step=gated_delta_step, sizes=((32, 128, 128), (32, 128), (32, 128), (32, 128), (32,), (32,))),
    Row(name="gla", step=gla_step, sizes=((32, 128, 128), (32, 128), (32, 128), (32, 128), (32, 128))),
)
CONTENDERS: dict[str, Callable[[Step], Step]] = {
    "eager": lambda step: step,
    "inductor": lambda step: torch.compile(step, dynamic=False),
    "effarch": lambda step: torch.compile(step, backend="effarch", dynamic=False),
}


def graph_ms(fn: Callable[[], Any]) -> float:
    """The median time of a replay from a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return median_ms(graph.replay, "cuda")


def measured(row: Row, batch: int, contender: str, device: str) -> dict[str, Any]:
    """One contender on one row."""
    torch._dynamo.reset()
    operands = row.operands(batch, device)
    in_float64 = [x.double() for x in operands]
    exact = row.step(*in_float64)
    compiled = CONTENDERS[contender](row.step)
    with torch.no_grad():
        out, seconds = first_call(lambda: compiled(*operands), device)
        errors = {"error": relative_l2(out, exact), "state_error": relative_l2(operands[0], in_float64[0])}
        result: dict[str, Any] = {"status": "ok", "first_s": round(seconds, 2), **{k: float(f"{x:.3e}") for k, x in errors.items()}}
        if contender == "effarch":
            decisions = import_effcompile().last_report().frames[-1].decisions
            result["decided"] = [f"{d.outcome}: {d.chosen or d.why}" for d in decisions]
        result["ms"] = round(median_ms(lambda: compiled(*operands), device), 4)
        if device == "cuda":
            result["graph_ms"] = round(graph_ms(lambda: compiled(*operands)), 4)
            peak = next((bandwidth for name, (_, bandwidth) in PEAKS.items() if name in torch.cuda.get_device_name()), None)
            if peak is not None:
                result["of_floor"] = round(2 * operands[0].nbytes / peak * 1e3 / result["graph_ms"], 3)
    return result


def main() -> None:
    """Read the command line, measure, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="comma-separated parts of: " + ", ".join(row.name for row in ROWS))
    parser.add_argument("--batches", default="1,16,128", help="comma-separated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    import_effcompile()
    path = result_path("recurrent-decode", args.device, args.out)
    payload: dict[str, Any] = {"benchmark": "recurrent-decode", "environment": environment(args.device), "results": []}
    by_name = {row.name: row for row in ROWS}
    for name in select(list(by_name), args.rows):
        for batch in map(int, args.batches.split(",")):
            for contender in CONTENDERS:
                try:
                    found = measured(by_name[name], batch, contender, args.device)
                except Exception as error:  # a contender that fails is a result, and the others still run
                    found = failure(error)
                release(args.device)
                payload["results"].append({"row": name, "batch": batch, "contender": contender, **found})
                write_json(path, payload)
                print(payload["results"][-1], flush=True)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
