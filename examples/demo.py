"""What effarch does with a real model: a small Mistral in plain PyTorch attention, its report, and a comparison with eager.

    python examples/demo.py [--tokens 1024] [--layers 4] [--no-inductor]

Random weights, nothing is downloaded. On a CPU it takes about a minute, most of it in Inductor; on a GPU the model is larger.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import effcompile

VOCABULARY = 2048
Model = Callable[..., Tensor]


def build(device: str, layers: int) -> nn.Module:
    """A Mistral with a sliding window and grouped-query attention, as transformers writes it (`attn_implementation="eager"`)."""
    from transformers import AutoModelForCausalLM, MistralConfig

    width = 2048 if device == "cuda" else 384
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64 // 2,
        head_dim=64,
        sliding_window=256,
        max_position_embeddings=16384,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").to(device).eval()


def logits(model: Model, tokens: Tensor) -> Tensor:
    """[1, T] -> [1, T, V]."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


@dataclass
class Run:
    """One way of running the model: what it took, and how far its logits are from float64."""

    name: str
    model: Model
    first_s: float
    error: float
    warm_ms: float = math.nan
    memory_mb: float = math.nan


def first(name: str, model: Model, tokens: Tensor, exact: Tensor) -> Run:
    """The first call, compilation from an empty cache included, and the relative L2 error of its result."""
    from torch._inductor.utils import clear_caches  # torch 2.11 to 2.13

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = folder
        clear_caches()
        start = time.perf_counter()
        got = logits(model, tokens)
        _wait(tokens)
        seconds = time.perf_counter() - start
    error = torch.linalg.vector_norm(got.double() - exact) / torch.linalg.vector_norm(exact)
    return Run(name, model, seconds, float(error))


def time_in_turn(runs: list[Run], tokens: Tensor, rounds: int = 5) -> None:
    """Medians of warm calls, one call of each a round: what slows the machine for a while slows all."""
    samples: dict[str, list[float]] = {run.name: [] for run in runs}
    for _ in range(rounds):
        for run in runs:
            start = time.perf_counter()
            logits(run.model, tokens)
            _wait(tokens)
            samples[run.name].append((time.perf_counter() - start) * 1e3)
    for run in runs:
        run.warm_ms = statistics.median(samples[run.name])


def _wait(tokens: Tensor) -> None:
    if tokens.is_cuda:
        torch.cuda.synchronize()


def memory(step: Callable[[], Tensor], tokens: Tensor) -> float:
    """MiB that `step` takes at its peak: from the allocator on a GPU, from the system's record on Linux, NaN elsewhere."""
    if tokens.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - base) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc: hand freed memory back, so that its use again counts
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use
        base = _resident("VmRSS")
        step()
        return (_resident("VmHWM") - base) / 2**10
    except (OSError, AttributeError, StopIteration):
        return math.nan


def _resident(field: str) -> int:
    """A field of this process's memory record, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def show(runs: list[Run]) -> None:
    """Print the runs as a table, with the speed over the first of them."""
    print(f"{'':<10}{'first call':>12}{'then':>12}{'speed':>9}{'memory':>12}{'error to float64':>19}")
    for run in runs:
        used = "-" if math.isnan(run.memory_mb) else f"{run.memory_mb:.0f} MB"
        speed = f"{runs[0].warm_ms / run.warm_ms:.2f}x"
        print(f"{run.name:<10}{run.first_s:>10.1f} s{run.warm_ms:>9.1f} ms{speed:>9}{used:>12}{run.error:>19.1e}")


def main() -> None:
    """Build the model, run it three ways, print the report and the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--tokens", type=int, default=8192 if device == "cuda" else 1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--no-inductor", action="store_true", help="leave out the comparison with torch.compile's own backend")
    args = parser.parse_args()

    model = build(device, args.layers)
    tokens = torch.randint(5, VOCABULARY, (1, args.tokens), device=device)
    print(f"Mistral, {args.layers} layers, {args.tokens} tokens, eager attention, on {device}\n")
    exact = logits(copy.deepcopy(model).double(), tokens)

    torch.compile(lambda x: x.sin() + 1)(tokens)  # starts the compiler's worker processes, so that neither contender pays
    runs = [first("eager", model, tokens, exact)]
    runs.append(first("effarch", torch.compile(model, backend="effarch"), tokens, exact))
    print(effcompile.last_report(), "\n", flush=True)
    if not args.no_inductor:
        runs.append(first("inductor", torch.compile(model), tokens, exact))
    time_in_turn(runs, tokens)
    for run in runs:
        run.memory_mb = memory(lambda run=run: logits(run.model, tokens), tokens)
    show(runs)


if __name__ == "__main__":
    main()
