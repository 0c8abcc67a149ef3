"""Latency and memory of a Llama-3-shaped model at growing lengths: its attention as written, and as effarch rewrites it.

    python examples/flash_attention.py [--tokens 4096,16384,32768] [--layers 4] [--contenders standard,rewritten] [--out FOLDER]
    python examples/flash_attention.py --draw FOLDER/flash-attention-DEVICE.json     the table and the plot again, nothing measured

The model is examples/llama.py: plain PyTorch, with every score matrix in memory. One forward pass over the whole prompt, as before
the first token of an answer; random weights of Llama 3 8B's widths in bfloat16 on a GPU (about three minutes for two contenders,
and as much again for two more), of a tiny model in float32 on a CPU (about a minute). Out of memory is a result.

Written to FOLDER (default: $OUT or benchmarks/results): the figures as JSON, a Markdown table, and a plot if matplotlib is there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo import memory
from llama import TINY, Llama, Size, fused_attention
from torch import Tensor, nn

import effcompile

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from common import cold_caches, environment, failure, first_call, median_ms, relative_l2, release, result_path, warm_up, write_json

LENGTHS = {"cuda": "4096,16384,32768", "cpu": "128,256,512"}
Prefill = Callable[[Tensor], Tensor]


def prefill(model: Callable[..., Tensor]) -> Prefill:
    """The logits of the last position, [1, T] -> [1, 1, V], without gradients."""

    def run(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model(tokens, last=1)

    return run


def contenders(size: Size, model: nn.Module) -> dict[str, Callable[[], Prefill]]:
    """Ways of running the same weights."""

    def fused() -> nn.Module:
        with torch.device("meta"):
            other = Llama(size, fused_attention)
        other.load_state_dict(model.state_dict(), assign=True)
        return other.eval()

    return {
        "standard": lambda: prefill(model),
        "rewritten": lambda: prefill(torch.compile(model, backend="effarch", dynamic=False)),
        "inductor": lambda: prefill(torch.compile(model, dynamic=False)),
        "sdpa": lambda: prefill(fused()),
    }


def measure(make: Callable[[], Prefill], tokens: Tensor, expected: Tensor | None) -> tuple[dict[str, Any], Tensor | None]:
    """One contender at one length, from empty caches, and its logits; what it raises becomes a result."""
    device = tokens.device.type
    release(device)
    try:
        with cold_caches():
            effcompile.reset_report()
            run = make()
            logits, first_s = first_call(lambda: run(tokens), device)
            result: dict[str, Any] = {"status": "ok", "first_s": round(first_s, 2)}
            peak_mb = memory(lambda: run(tokens), tokens)
            result |= {"ms": round(median_ms(lambda: run(tokens), device), 3)}
            result |= {"peak_mb": None if math.isnan(peak_mb) else round(peak_mb, 1)}
            if expected is not None:
                result["difference"] = float(f"{relative_l2(logits.float(), expected.float()):.2e}")
            return result, logits
    except Exception as error:  # a contender that runs out of memory is a result, and the others still run
        return failure(error), None


def run(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """All measurements, written out after each; `difference` is the relative L2 distance to the first contender that ran."""
    device = args.device
    size = Size(layers=args.layers or 4) if device == "cuda" else TINY
    torch.manual_seed(0)
    with torch.device(device):
        model = Llama(size).to(torch.bfloat16 if device == "cuda" else torch.float32).eval()
    warm_up(device)
    ways = contenders(size, model)
    if unknown := set(args.contenders.split(",")) - set(ways):
        raise SystemExit(f"Expected contenders of {sorted(ways)} but got {sorted(unknown)}")
    payload: dict[str, Any] = {"benchmark": "flash-attention", "environment": environment(device)}
    payload |= {"smoke": device != "cuda", "size": vars(size), "results": []}
    for length in map(int, args.tokens.split(",")):
        tokens = torch.randint(0, size.vocabulary, (1, length), device=device)
        expected = None
        for name in args.contenders.split(","):
            result, logits = measure(ways[name], tokens, expected)
            expected = logits if expected is None else expected
            if name == "rewritten" and result["status"] == "ok":
                result["attention"] = sum(d.outcome == "rewritten" for d in effcompile.last_report().decisions)
            payload["results"].append({"tokens": length, "contender": name, **result})
            write_json(path, payload)
            print(payload["results"][-1], flush=True)
    return payload


# ---------------------------------------------------------------------------------------------------------------- showing


def table(payload: dict[str, Any]) -> str:
    """One row a length: latency and peak memory beyond the weights of each contender, and what `rewritten` gains."""
    names = list(dict.fromkeys(r["contender"] for r in payload["results"]))
    found = {(r["tokens"], r["contender"]): r for r in payload["results"]}
    header = ["tokens", *(f"{name}, ms" for name in names), "faster", *(f"{name}, MiB" for name in names), "less memory"]
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(["---:"] * len(header)) + " |"]
    for length in dict.fromkeys(r["tokens"] for r in payload["results"]):
        row = [found.get((length, name), {"status": "-"}) for name in names]
        gains = [_gain(found, length, key) for key in ("ms", "peak_mb")]
        cells = [str(length), *(_cell(r, "ms") for r in row), gains[0], *(_cell(r, "peak_mb") for r in row), gains[1]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(result: dict[str, Any], key: str) -> str:
    if result["status"] == "ok":
        return "-" if result[key] is None else f"{result[key]:.1f}"
    return "out of memory" if result["status"] == "oom" else result["status"]


def _gain(found: dict[tuple[int, str], dict[str, Any]], length: int, key: str) -> str:
    values = [found.get((length, name), {}).get(key) for name in ("standard", "rewritten")]
    return f"{values[0] / values[1]:.2f}x" if all(values) else "-"


def plot(payload: dict[str, Any], path: Path) -> bool:
    """Both figures over the length, on logarithmic axes, as a PNG; crosses on the edge stand for out of memory.

    Returns:
        whether it was drawn: without matplotlib it is not.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    results = payload["results"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("ms", "peak_mb"), ("latency, ms", "peak memory, MiB"), strict=True):
        for name in dict.fromkeys(r["contender"] for r in results):
            line = [(r["tokens"], r[key]) for r in results if r["contender"] == name and r.get(key)]
            lost = [r["tokens"] for r in results if r["contender"] == name and r["status"] == "oom"]
            (drawn,) = axes.plot([x for x, _ in line], [y for _, y in line], "o-", label=name)
            axes.plot(lost, [0.97] * len(lost), "x", color=drawn.get_color(), transform=axes.get_xaxis_transform())
        lengths = sorted({r["tokens"] for r in results})
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend()
    layers, where = payload["size"]["layers"], payload["environment"]
    figure.suptitle(f"Llama 3, {layers} layers, one forward pass on {where['device']} (crosses: out of memory)", fontsize=11)
    figure.savefig(path, dpi=150)
    return True


def show(payload: dict[str, Any], path: Path) -> None:
    """Print the table and write it, and the plot, beside the JSON file."""
    text = table(payload)
    path.with_suffix(".md").write_text(text + "\n")
    print(f"\n{text}\n")
    drawn = plot(payload, path.with_suffix(".png"))
    print(f"written to {path}, .md" + (", .png" if drawn else "; no plot: matplotlib is not installed"))


def main() -> None:
    """Measure, or read what was measured; then show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", help="comma-separated lengths")
    parser.add_argument("--layers", type=int, help="on a GPU (default: 4; Llama 3 8B has 32)")
    parser.add_argument("--contenders", default="standard,rewritten", help="comma-separated: standard, rewritten, inductor, sdpa")
    parser.add_argument("--out", type=Path, help="a folder")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="show the results of an earlier run")
    args = parser.parse_args()
    if args.draw:
        show(json.loads(args.draw.read_text()), args.draw)
        return
    args.tokens = args.tokens or LENGTHS[args.device]
    path = result_path("flash-attention", args.device, None)
    path = args.out / path.name if args.out else path
    path.parent.mkdir(parents=True, exist_ok=True)
    show(run(args, path), path)


if __name__ == "__main__":
    main()
