"""Whole recurrent Hugging Face models with random weights and two layers: eager, Inductor and effarch.

    python benchmarks/recurrent_models.py [--models mamba,rwkv] [--widths 64] [--contenders eager,effarch] [--out FILE]

Each pair of model and contender runs in a process of its own from empty caches; with `--jobs`, first calls share the processors. A
result holds median milliseconds of a forward pass over the prompt, seconds of the first call, of those what Dynamo's tracing took
(which no backend can shorten), and the relative L2 error of the logits against eager in float64 on a CPU, in float32 on a GPU.
Widths are the published ones on a GPU; on a CPU 64, where the recurrence takes most of eager's time, and 512, where matrix products
do, which all contenders share.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from children import TURN, answer, run_child, turn
from common import (
    cache_environment,
    environment,
    first_call,
    import_effcompile,
    median_ms,
    relative_l2,
    report,
    result_path,
    select,
    write_json,
)
from torch import Tensor, nn

VOCABULARY = 8192
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 2560, "state_size": 16},
    "mamba2": {"hidden_size": 2560, "state_size": 128, "num_heads": 80, "head_dim": 64, "n_groups": 1, "chunk_size": 256},
    "rwkv": {"hidden_size": 2560, "context_length": 1024, "attention_hidden_size": 2560, "intermediate_size": 10240},
    "recurrent_gemma": {
        "hidden_size": 2560, "intermediate_size": 15360, "num_attention_heads": 10, "lru_width": 2560,
        "block_types": ["recurrent", "attention"], "attention_window_size": 2048,
    },
}  # fmt: skip
WIDTHS = {"cpu": (64, 512), "cuda": (2560,)}


def narrowed(name: str, width: int) -> dict[str, Any]:
    """What makes a model narrower: state sizes and numbers of groups stay."""
    changes: dict[str, dict[str, Any]] = {
        "mamba": {},
        "mamba2": {"num_heads": 2 * width // 64, "chunk_size": 128},
        "rwkv": {"attention_hidden_size": width, "intermediate_size": 4 * width},
        "recurrent_gemma": {"intermediate_size": 3 * width, "num_attention_heads": width // 16, "lru_width": width},
    }
    return {"hidden_size": width, "vocab_size": 16 * width, **changes[name]}


TOKENS = {"cpu": {}, "cuda": {"mamba": 2048, "mamba2": 2048, "recurrent_gemma": 2048}}
DEFAULT_TOKENS = 512
CONTENDERS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "eager": lambda model: model,
    "inductor": lambda model: torch.compile(model, dynamic=False),
    "effarch": lambda model: torch.compile(model, backend="effarch", dynamic=False),
}


def build(name: str, device: str, width: int) -> nn.Module:
    """The model, in bfloat16 on a GPU and in float32 on a CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": VOCABULARY, **MODELS[name], **(narrowed(name, width) if device == "cpu" else {})}
    config = AutoConfig.for_model(name, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def logits(model: Callable[..., Any], tokens: Tensor) -> Tensor:
    """[1, T] -> [1, T, V], without gradients."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def child(name: str, contender: str, device: str, width: int) -> dict[str, Any]:
    """One contender on one model."""
    import_effcompile()
    model = build(name, device, width)
    length = TOKENS[device].get(name, DEFAULT_TOKENS)
    tokens = torch.randint(5, model.config.vocab_size - 5, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    compiled = CONTENDERS[contender](model)
    out, seconds = first_call(lambda: logits(compiled, tokens), device)
    result: dict[str, Any] = {"status": "ok", "tokens": length, "first_s": round(seconds, 2)}
    if contender != "eager":
        result["dynamo_s"] = round(_dynamo_seconds(), 2)
    if contender == "effarch":
        result["recurrences"] = sum(d["family"] == "recurrence" and d["outcome"] == "rewritten" for d in report()["decisions"])
    with turn():
        result["ms"] = round(median_ms(lambda: logits(compiled, tokens), device), 3)
    exact = logits(copy.deepcopy(model).to(torch.float64 if device == "cpu" else torch.float32), tokens)
    result["error"] = float(f"{relative_l2(out, exact):.3e}")
    return result


def _dynamo_seconds() -> float:
    """Seconds of Dynamo's tracing, without the backend that it called."""
    times = torch._dynamo.utils.compile_times(repr="csv", aggregate=True)
    seconds = dict(zip(times[0], (float(x) for x in times[1]), strict=True))
    inner = [seconds[name] for name in seconds if name.endswith("call_user_compiler")]
    outer = [seconds[name] for name in seconds if name.endswith("_compile.compile_inner")]
    return max(0.0, sum(outer) - sum(inner))


def measured(case: tuple[str, int, str], device: str, timeout: float, variables: dict[str, str]) -> dict[str, Any]:
    """The result of one model, width and contender, from a process of its own."""
    name, width, contender = case
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        variables = variables | cache_environment(Path(folder))
        found = run_child(__file__, [name, contender, device, str(width)], timeout=timeout, variables=variables)
    return {"model": name, "width": width, "contender": contender, **found}


def main() -> None:
    """Read the command line, run the children, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=4, metavar=("MODEL", "CONTENDER", "DEVICE", "WIDTH"), help=argparse.SUPPRESS)
    parser.add_argument("--models", help="comma-separated parts of model names (default: all)")
    parser.add_argument("--widths", help="comma-separated (default: all)")
    parser.add_argument("--contenders", help="comma-separated parts of contender names (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that import and compile side by side; they measure in turn")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    if args.child:
        *which, width = args.child
        answer(lambda: child(*which, int(width)))
        return
    path = result_path("recurrent-models", args.device, args.out)
    payload: dict[str, Any] = {"benchmark": "recurrent-models", "environment": environment(args.device), "jobs": args.jobs}
    widths = [width for width in WIDTHS[args.device] if not args.widths or str(width) in args.widths.split(",")]
    cases = list(itertools.product(select(tuple(MODELS), args.models), widths, select(tuple(CONTENDERS), args.contenders)))
    results: dict[tuple[str, int, str], dict[str, Any]] = {}
    with tempfile.NamedTemporaryFile() as file, ThreadPoolExecutor(args.jobs) as pool:
        variables = {TURN: file.name} if args.jobs > 1 else {}
        running = {pool.submit(measured, case, args.device, args.timeout, variables): case for case in cases}
        for done in as_completed(running):
            results[running[done]] = done.result()
            print(results[running[done]], flush=True)
            write_json(path, payload | {"results": [results[case] for case in cases if case in results]})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
