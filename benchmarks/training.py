"""A training step of a Llama-3-shaped model: eager, Inductor and effarch, on attention as written and on SDPA.

    python benchmarks/training.py [--tokens 8192,32768] [--contenders eager,effarch] [--budget 560] [--out FILE]
    python benchmarks/training.py --tiny --device cpu --out FILE     narrow and short: to try the script, not a figure

The model is examples/llama.py: four layers of Llama 3 8B's widths (4096, 32 query and 8 key heads of 128, 14336), a vocabulary of
8192, which keeps the logits small beside the layers, bfloat16 weights, batch 1, no activation checkpoints. A step is the forward
pass, the mean cross-entropy of the next token, and the backward pass to fresh gradients of every weight. No optimizer: its step is
the same for all contenders and touches no activation.

Each contender runs at each length in a process of its own, from empty caches: out of memory, a crash and no result in time are
results. A result holds: median milliseconds of a step; seconds of the first; peak memory beyond the weights, gradients included;
attentions that effarch rewrote; and the relative L2 error of all gradients together, against float32 (on a CPU: float64), computed
after all else. On an H100 everything takes about ten minutes; what does not fit into `--budget` seconds is skipped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from children import answer, run_child
from common import (
    ROOT,
    Budget,
    cache_environment,
    environment,
    failure,
    first_call,
    import_effcompile,
    median_ms,
    peak_mb,
    release,
    report,
    result_path,
    select,
    warm_up,
    write_json,
)
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(ROOT / "examples"))
from llama import TINY, Llama, Size, eager_attention, fused_attention

WIDE = Size(layers=4, vocabulary=8192)
LENGTHS = (8192, 32768)
TINY_LENGTHS = (512,)  # the least at which effarch trains by fused kernels on a CPU
CONTENDERS: dict[str, tuple[Callable[..., Tensor], dict[str, Any] | None]] = {  # attention; options of torch.compile
    "effarch": (eager_attention, {"backend": "effarch"}),
    "inductor": (eager_attention, {}),
    "eager": (eager_attention, None),
    "effarch-sdpa": (fused_attention, {"backend": "effarch"}),
    "inductor-sdpa": (fused_attention, {}),
}
RESERVE_S = 20.0  # less than that is not enough for a process


def build(attention: Callable[..., Tensor], *, tiny: bool, device: str) -> nn.Module:
    """The model with weights that every process draws alike: bfloat16 on a GPU, float32 on a CPU."""
    torch.manual_seed(0)
    with torch.device(device):
        return Llama(TINY if tiny else WIDE, attention).to(torch.bfloat16 if device == "cuda" else torch.float32)


def loss(model: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each next token. `tokens` [1, T + 1]."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def gradients(model: Callable[..., Tensor], weights: Iterable[nn.Parameter], tokens: Tensor) -> tuple[Tensor, ...]:
    """One step: the gradient of every weight, in memory of its own."""
    return torch.autograd.grad(loss(model, tokens), tuple(weights))


def child(contender: str, length: int, device: str, tiny: bool) -> dict[str, Any]:
    """One contender at one length."""
    import_effcompile()
    attention, options = CONTENDERS[contender]
    if options is not None:
        warm_up(device)
    model = build(attention, tiny=tiny, device=device)
    weights = tuple(model.parameters())
    tokens = torch.randint(0, model.head.out_features, (1, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
    trained = model if options is None else torch.compile(model, dynamic=False, **options)
    step = lambda: gradients(trained, weights, tokens)  # noqa: E731
    found, first_s = first_call(step, device)
    got = [g.cpu() for g in found]
    del found
    result: dict[str, Any] = {"status": "ok", "first_s": round(first_s, 2)}
    if options and "backend" in options:
        result["report"] = report()
        result["attentions"] = sum(d["outcome"] == "rewritten" for d in result["report"]["decisions"])
    peak = peak_mb(step, device)
    ms = median_ms(step, device, budget_ms=500.0)
    result |= {"ms": round(ms, 3), "tokens_per_s": round(length / ms * 1e3), "peak_mb": None if peak is None else round(peak)}
    release(device)
    try:
        return result | {"error": gradient_error(got, model, tokens, tiny=tiny, device=device)}
    except torch.OutOfMemoryError as error:  # the reference needs more than the contender did
        return result | {"error": None, "reference": failure(error)["status"]}


def gradient_error(got: list[Tensor], model: nn.Module, tokens: Tensor, *, tiny: bool, device: str) -> float:
    """`||g - g*|| / ||g*||` over all weights together; g* in the next wider precision, eager, from the same weights."""
    wider = torch.float32 if device == "cuda" else torch.float64
    with torch.device("meta"):
        exact = Llama(TINY if tiny else WIDE, ungrouped_attention)
    exact.load_state_dict({name: x.to(wider) for name, x in model.state_dict().items()}, assign=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = gradients(exact, exact.parameters(), tokens)
    error = sum(float((g.to(device).double() - x.double()).square().sum()) for g, x in zip(got, expected, strict=True))
    norm = sum(float(x.double().square().sum()) for x in expected)
    return float(f"{(error / norm) ** 0.5:.3e}")


def ungrouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """SDPA on repeated keys and values: in float32, torch has no fused kernel for groups."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def add_ratios(results: list[dict[str, Any]]) -> None:
    """Set `error_vs_eager` where eager's gradients are known at that length."""
    for result in (r for r in results if r.get("error")):
        eager = next((r for r in results if r["contender"] == "eager" and r["tokens"] == result["tokens"]), {})
        if eager.get("error"):
            result["error_vs_eager"] = round(result["error"] / eager["error"], 3)


def run(contenders: list[str], lengths: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, written out after each."""
    budget, path = Budget(args.budget), result_path("training", args.device, args.out)
    payload: dict[str, Any] = {"benchmark": "training", "environment": environment(args.device), "smoke": args.tiny}
    payload |= {"size": vars(TINY if args.tiny else WIDE), "results": []}
    for length in lengths:
        for contender in contenders:
            result = {"tokens": length, "contender": contender, **measure(contender, length, budget, args)}
            payload["results"].append(result)
            add_ratios(payload["results"])
            write_json(path, payload)
            print({name: value for name, value in result.items() if name != "report"}, flush=True)
    print(f"written to {path}")
    return payload


def measure(contender: str, length: int, budget: Budget, args: argparse.Namespace) -> dict[str, Any]:
    """The result of one process, with caches of its own."""
    if budget.left < RESERVE_S:
        return {"status": f"skipped: {args.budget:.0f} s were spent"}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments = [contender, str(length), args.device, "tiny" if args.tiny else "wide"]
        timeout = min(args.timeout, budget.left)
        return run_child(__file__, arguments, timeout=timeout, variables=cache_environment(Path(folder)))


def main() -> None:
    """Read the command line, run the children, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=4, metavar=("CONTENDER", "TOKENS", "DEVICE", "SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", help="comma-separated lengths (default: 8192,32768)")
    parser.add_argument("--contenders", help="comma-separated parts of: " + ", ".join(CONTENDERS))
    parser.add_argument("--budget", type=float, default=560.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--timeout", type=float, default=200.0, help="seconds for one process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a narrow model and 512 tokens: to try the script, not a figure")
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    if args.child:
        contender, length, device, size = args.child
        answer(lambda: child(contender, int(length), device, size == "tiny"))
        return
    default = TINY_LENGTHS if args.tiny else LENGTHS
    lengths = [int(length) for length in args.tokens.split(",")] if args.tokens else list(default)
    run(select(list(CONTENDERS), args.contenders), lengths, args)


if __name__ == "__main__":
    main()
