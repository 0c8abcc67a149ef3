"""Sparse upcycling: a small dense language model becomes a Mixture of Experts, and both go on at equal active parameters.

    python examples/moe_upcycling.py [--size tiny|small] [--device cpu] [--out FOLDER]
    python examples/moe_upcycling.py --draw FOLDER/moe-upcycling-DEVICE.json     the table and the plot again, nothing trained

The text is the source of Python's standard library, byte by byte; every tenth file is held out. A dense model (examples/llama.py)
is trained; then it goes on, and beside it the same model with each feed-forward layer made into experts (Komatsuzaki et al. 2022,
"Sparse Upcycling"), on the same batches, both with a fresh optimizer.

Each token goes to 2 of E experts of half the width, so that as many weights work on it as before, the router's aside. A gated layer
is the sum of its two halves: E / 2 experts are copies of the first, E / 2 of the second. The fresh router gives copy i of both
halves the same row, so that the best two are both halves of one copy, each with weight 2 p / (p + p) = 1: the first step starts
where the dense model stopped. One expert of full width for each token would not do: weighted by its probability it changes what the
model computes, weighted by 1 it teaches the router nothing.

The experts are written as a loop in which each computes all tokens. `torch.compile(backend="effarch")` makes of it one operation
that computes two experts a token, in training and evaluation; that it did is asserted from its report.

Tiny: about two minutes on two cores. Small (default on a GPU): 27 million weights, a few minutes on an H100. Written to FOLDER
(default: $OUT or benchmarks/results): perplexities over tokens as JSON, and a plot if matplotlib is there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from llama import TINY, FeedForward, Llama, Size, fused_attention
from torch import Tensor, nn
from torch.nn import functional as F

import effcompile

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from common import environment, relative_l2, result_path, write_json

ACTIVE = 2  # experts of a token
HELD_OUT = 10  # one file of so many


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model and its training: `tokens` in each of `batch` windows, `steps` before and again after upcycling."""

    model: Size
    experts: int
    tokens: int
    batch: int
    steps: int
    every: int  # steps between evaluations
    windows: int  # that are evaluated
    rate: float = 1e-3
    balance: float = 0.01  # weight of the loss that keeps experts in use


SMALL = Size(layers=8, vocabulary=256, width=512, heads=8, kv_heads=8, hidden=1536)
PLANS = {
    "tiny": Plan(model=TINY, experts=8, tokens=128, batch=16, steps=240, every=60, windows=64, rate=3e-3),
    "small": Plan(model=SMALL, experts=16, tokens=512, batch=64, steps=800, every=100, windows=256),
}

# ------------------------------------------------------------------------------------------------------------------- text


def corpus() -> tuple[Tensor, Tensor]:
    """The bytes of the standard library's sources, for training and held out; whole files in the order of their paths."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for position, path in enumerate(files):
        parts[position % HELD_OUT == 0].append(path.read_bytes())
    training, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return training, held_out


def windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """`length` + 1 bytes from each start: [B, length + 1]."""
    return text[starts[:, None] + torch.arange(length + 1)].long()


# ----------------------------------------------------------------------------------------------------------------- experts


class Experts(nn.Module):
    """Gated experts of half a feed-forward layer's width, two for each token."""

    def __init__(self, dense: FeedForward, experts: int):
        super().__init__()
        halves = zip(dense.gate.weight.chunk(2), dense.up.weight.chunk(2), dense.down.weight.chunk(2, dim=1), strict=True)
        gates, ups, downs = ([x.detach() for x in half for _ in range(experts // 2)] for half in zip(*halves, strict=True))
        self.gate, self.up, self.down = (nn.Parameter(torch.stack(x)) for x in (gates, ups, downs))  # [E, f, d], [E, d, f]
        row = torch.randn(experts // 2, dense.gate.in_features) * dense.gate.in_features**-0.5
        self.router = nn.Parameter(row.repeat(2, 1).to(self.gate))  # [E, d]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, W] -> [B, T, W]; sets `balance`, at least 1, and 1 where all experts are used alike (Switch Transformer)."""
        tokens = x.flatten(0, 1)
        probabilities = torch.softmax(tokens.float() @ self.router.float().T, dim=-1)
        best, ids = probabilities.topk(ACTIVE, dim=-1)
        weights = (ACTIVE * best / best.sum(-1, keepdim=True)).to(x.dtype)
        used = F.one_hot(ids, len(self.gate)).sum(1).float().mean(0) / ACTIVE
        self.balance = len(self.gate) * (used * probabilities.mean(0)).sum()
        out = torch.zeros_like(tokens)
        for e in range(len(self.gate)):
            weight = (weights * (ids == e)).sum(-1, keepdim=True)
            inner = F.silu(F.linear(tokens, self.gate[e])) * F.linear(tokens, self.up[e])
            out = out + weight * F.linear(inner, self.down[e])
        return out.view_as(x)


def upcycle(dense: Llama, experts: int) -> Llama:
    """A copy of the model whose feed-forward layers are experts; it computes the same."""
    sparse = copy.deepcopy(dense)
    for layer in sparse.layers:
        layer.feed_forward = Experts(layer.feed_forward, experts)
    return sparse


def weight_counts(model: Llama) -> dict[str, int]:
    """All weights, those that work on one token, and the routers'."""
    layers = [m for m in model.modules() if isinstance(m, Experts)]
    stacked = sum(x.numel() for m in layers for x in (m.gate, m.up, m.down))
    total = sum(x.numel() for x in model.parameters())
    routers = sum(m.router.numel() for m in layers)
    share = ACTIVE / len(layers[0].gate) if layers else 0.0
    return {"all": total, "active": total - stacked + round(stacked * share), "routers": routers}


# ---------------------------------------------------------------------------------------------------------------- training


def loss_of(model: Llama, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the next byte in nats, and the sum of the layers' `balance`. tokens [B, T + 1]."""
    logits = model(tokens[:, :-1])
    balance = [m.balance for m in model.modules() if isinstance(m, Experts)]
    cross_entropy = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    return cross_entropy, torch.stack(balance).sum() if balance else torch.zeros_like(cross_entropy)


Loss = Callable[[Llama, Tensor], tuple[Tensor, Tensor]]


class Trainer:
    """AdamW on float32 copies of the weights, which a model in bfloat16 gets back after each step."""

    def __init__(self, model: Llama, plan: Plan, loss: Loss):
        self.model, self.plan, self.loss = model, plan, loss
        self.weights = list(model.parameters())
        self.masters = [w.detach().float().clone() for w in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.1)

    def step(self, tokens: Tensor, number: int) -> None:
        """One batch; the rate rises over a tenth of the steps and falls along a cosine to a tenth."""
        done = number / self.plan.steps
        scale = min(1.0, 10 * (done + 1 / self.plan.steps)) * (0.55 + 0.45 * math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * scale
        cross_entropy, balance = self.loss(self.model, tokens)
        found = torch.autograd.grad(cross_entropy + self.plan.balance * balance, self.weights)
        for master, gradient in zip(self.masters, found, strict=True):
            master.grad = gradient.float()
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


@torch.no_grad()
def perplexity(model: Llama, loss: Loss, held_out: Tensor, plan: Plan, device: str) -> float:
    """exp of the mean cross-entropy of a byte, over windows spread evenly over the held-out text."""
    starts = torch.linspace(0, len(held_out) - plan.tokens - 2, plan.windows).long()
    batches = [windows(held_out, some, plan.tokens).to(device) for some in starts.split(plan.batch)]
    return math.exp(sum(float(loss(model, tokens)[0]) for tokens in batches) / len(batches))


def train(
    model: Llama, plan: Plan, texts: tuple[Tensor, Tensor], device: str, *, seed: int, seen: int, loss: Loss = loss_of
) -> list[dict[str, float]]:
    """`plan.steps` steps from `seen` tokens on: perplexities before, between and after."""
    training, held_out = texts
    trainer, generator = Trainer(model, plan, loss), torch.Generator().manual_seed(seed)
    points, started, spent = [], time.perf_counter(), 0.0
    for number in range(plan.steps + 1):
        if number % plan.every == 0 or number == plan.steps:
            spent += time.perf_counter() - started
            tokens = seen + number * plan.batch * plan.tokens
            points.append({"tokens": tokens, "perplexity": round(perplexity(model, loss, held_out, plan, device), 4)})
            points[-1]["train_s"] = round(spent, 2)
            print(f"  {tokens:>10} tokens   perplexity {points[-1]['perplexity']:.4f}   {spent:7.1f} s", flush=True)
            started = time.perf_counter()
        if number < plan.steps:
            starts = torch.randint(len(training) - plan.tokens - 1, (plan.batch,), generator=generator)
            trainer.step(windows(training, starts, plan.tokens).to(device), number)
    return points


def rewritten() -> int:
    """Layers of experts that effarch rewrote since its report was last forgotten."""
    decisions = effcompile.last_report().decisions
    return sum(d.family == "experts" and d.outcome == "rewritten" for d in decisions)


def assert_rewritten(model: Llama, loss: Loss, tokens: Tensor) -> dict[str, Any]:
    """Compile a training step and an evaluation; all layers' experts must be rewritten in both, and the loss be eager's.

    Raises:
        SystemExit: one was not, or computes something else.
    """
    layers = sum(isinstance(m, Experts) for m in model.modules())
    found: dict[str, Any] = {"layers": layers}
    expected = loss_of(model, tokens)
    wanted = torch.autograd.grad(expected[0], [m.gate for m in model.modules() if isinstance(m, Experts)])
    for name in ("training", "evaluation"):
        effcompile.reset_report()
        start = time.perf_counter()
        with torch.set_grad_enabled(name == "training"):
            got = loss(model, tokens)
        found[name] = rewritten()
        found[f"{name}_first_s"] = round(time.perf_counter() - start, 1)
        found[f"{name}_difference"] = float(f"{float((got[0] - expected[0]).detach().abs()):.1e}")
        if found[name] != layers:
            raise SystemExit(f"Expected {layers} layers of experts rewritten in {name} but got:\n{effcompile.last_report()}")
        if name == "training":
            grads = torch.autograd.grad(got[0], [m.gate for m in model.modules() if isinstance(m, Experts)])
            found["gradient_difference"] = max(float(f"{relative_l2(a, b):.1e}") for a, b in zip(grads, wanted, strict=True))
    tolerance = 1e-4 if tokens.device.type == "cpu" else 2e-2
    if not max(found["training_difference"], found["evaluation_difference"]) < tolerance:
        raise SystemExit(f"Expected the compiled loss to be eager's within {tolerance} but got {found}")
    return found


def run(plan: Plan, device: str, path: Path, size: str) -> dict[str, Any]:
    """Train, upcycle, go on with both; written out at the end of each."""
    torch.manual_seed(0)
    texts = corpus()
    with torch.device(device):
        dense = Llama(plan.model, fused_attention).to(torch.bfloat16 if device == "cuda" else torch.float32)
    payload: dict[str, Any] = {"benchmark": "moe-upcycling", "environment": environment(device), "size": size}
    payload |= {"plan": asdict(plan), "text": {"training_bytes": len(texts[0]), "held_out_bytes": len(texts[1])}, "curves": {}}
    print(f"dense model, {weight_counts(dense)['all']} weights, {len(texts[0])} bytes to train on")
    payload["curves"]["dense, before"] = train(dense, plan, texts, device, seed=1, seen=0)
    seen = plan.steps * plan.batch * plan.tokens
    sparse = upcycle(dense, plan.experts)
    payload["weights"] = {"dense": weight_counts(dense), "upcycled": weight_counts(sparse)}
    loss = torch.compile(loss_of, backend="effarch", dynamic=False)
    first = windows(texts[0], torch.arange(plan.batch) * plan.tokens, plan.tokens).to(device)
    payload["effarch"] = assert_rewritten(sparse, loss, first)
    print(f"upcycled, {payload['weights']['upcycled']}: effarch {payload['effarch']}")
    payload["curves"]["upcycled"] = train(sparse, plan, texts, device, seed=2, seen=seen, loss=loss)
    write_json(path, payload)
    print("dense, going on")
    payload["curves"]["dense, after"] = train(dense, plan, texts, device, seed=2, seen=seen)
    ends = {name: payload["curves"][name][-1]["perplexity"] for name in ("dense, after", "upcycled")}
    payload["perplexity_ratio"] = round(ends["upcycled"] / ends["dense, after"], 4)
    write_json(path, payload)
    return payload


# ---------------------------------------------------------------------------------------------------------------- showing


def table(payload: dict[str, Any]) -> str:
    """Perplexity of both over the tokens since the upcycling."""
    lines = ["| tokens | dense | upcycled |", "| ---: | ---: | ---: |"]
    for a, b in zip(payload["curves"]["dense, after"], payload["curves"]["upcycled"], strict=True):
        lines.append(f"| {a['tokens']} | {a['perplexity']:.3f} | {b['perplexity']:.3f} |")
    return "\n".join(lines)


def plot(payload: dict[str, Any], path: Path) -> bool:
    """Held-out perplexity over tokens, as a PNG.

    Returns:
        whether it was drawn: without matplotlib it is not.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    colours = {"dense, before": "tab:blue", "dense, after": "tab:blue", "upcycled": "tab:orange"}
    for name, points in payload["curves"].items():
        label = None if name == "dense, before" else name.removesuffix(", after")
        line = [p for p in points if p["tokens"]]  # before any training, the perplexity says nothing
        axes.plot([p["tokens"] for p in line], [p["perplexity"] for p in line], "o-", color=colours[name], label=label)
    axes.set(xlabel="tokens (bytes)", ylabel="held-out perplexity of a byte", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    experts, where = payload["plan"]["experts"], payload["environment"]
    figure.suptitle(f"Upcycled to {experts} experts of half the width, 2 a token; {where['device']}", fontsize=10)
    figure.savefig(path, dpi=150)
    return True


def main() -> None:
    """Train, or read what was found; then show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=tuple(PLANS), help="default: small on a GPU, tiny on a CPU")
    parser.add_argument("--steps", type=int, help="before upcycling, and again after it")
    parser.add_argument("--out", type=Path, help="a folder")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="show the results of an earlier run")
    args = parser.parse_args()
    if args.draw:
        path, payload = args.draw, json.loads(args.draw.read_text())
    else:
        size = args.size or ("small" if args.device == "cuda" else "tiny")
        plan = replace(PLANS[size], steps=args.steps) if args.steps else PLANS[size]
        path = result_path("moe-upcycling", args.device, None)
        path = args.out / path.name if args.out else path
        payload = run(plan, args.device, path, size)
    drawn = plot(payload, path.with_suffix(".png"))
    print(f"\n{table(payload)}\n\nupcycled / dense at the end: {payload['perplexity_ratio']}")
    print(f"{path}" + (", .png" if drawn else "; no plot: matplotlib is not installed"))


if __name__ == "__main__":
    main()
