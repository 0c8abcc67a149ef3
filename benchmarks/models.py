"""Whole Hugging Face models at their real width, two layers, random weights, eager attention: eager, Inductor and effarch.

    python benchmarks/models.py [--models mistral] [--contenders inductor,effarch] [--tokens 8192] [--smoke] [--out FILE]

One forward pass over the whole prompt. A result holds median milliseconds, seconds of the first call from empty caches, peak memory
beyond the weights, and the relative L2 error of the logits against eager and against eager in float32 (at `--error-tokens`, where
the float32 scores fit).
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import (
    cold_caches,
    environment,
    failure,
    first_call,
    import_effcompile,
    median_ms,
    peak_mb,
    relative_l2,
    release,
    report,
    result_path,
    select,
    start_report,
    warm_up,
    write_json,
)
from torch import Tensor, nn

VOCABULARY = 8192
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "sliding_window": 1024,
    },
    "gemma2": {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 4096,
    },
}
SMOKE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
CONTENDERS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "eager": lambda model: model,
    "inductor": lambda model: torch.compile(model, dynamic=False),
    "effarch": lambda model: torch.compile(model, backend="effarch", dynamic=False),
}


def build(name: str, device: str, *, smoke: bool) -> nn.Module:
    """The model in bfloat16 with eager attention. `smoke` makes it narrow, to try the script."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**MODELS[name], **(SMOKE | {"sliding_window": 32} if smoke else {})}
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 16384, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(name, **common, **tokens, **sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    return model.eval()


def logits(model: Callable[..., Any], tokens: Tensor) -> Tensor:
    """[1, T] -> [1, T, V], without gradients."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


class Case:
    """One model with its prompt, and eager's logits in bfloat16 and in float32 to compare with."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.device = name, args.device
        self.model = build(name, args.device, smoke=args.smoke)
        self.tokens = torch.randint(5, VOCABULARY - 5, (1, args.tokens), device=args.device)
        self.short = self.tokens[:, : args.error_tokens].contiguous()
        self.eager, self.eager_short = logits(self.model, self.tokens), logits(self.model, self.short)
        self.exact = logits(copy.deepcopy(self.model).float(), self.short)
        release(args.device)

    def measure(self, contender: str) -> dict[str, Any]:
        """One contender, alone and from empty caches: exceptions become results."""
        result: dict[str, Any] = {"model": self.name, "tokens": self.tokens.shape[1], "contender": contender}
        release(self.device)
        try:
            with cold_caches():
                result |= self._measure(contender)
        except Exception as error:  # a contender that fails is a result, and the others still run
            result |= failure(error)
        release(self.device)
        return result

    def _measure(self, contender: str) -> dict[str, Any]:
        start_report()
        compiled = CONTENDERS[contender](self.model)
        step = lambda: logits(compiled, self.tokens)  # noqa: E731
        got, first_s = first_call(step, self.device)
        result: dict[str, Any] = {
            "status": "ok",
            "first_s": round(first_s, 2),
            "error_to_eager": relative_l2(got.float(), self.eager.float()),
        }
        del got
        if contender == "effarch":
            result["report"] = report()
        peak = peak_mb(step, self.device)
        result |= {"ms": round(median_ms(step, self.device), 3), "peak_mb": None if peak is None else round(peak)}
        short = logits(compiled, self.short)
        result |= {"error_to_float32": relative_l2(short, self.exact)}
        return result | {"eagers_error_to_float32": relative_l2(self.eager_short, self.exact)}


def show(result: dict[str, Any]) -> None:
    """Print one result on one line."""
    head = f"{result['model']:<9} T {result['tokens']:<6} {result['contender']:<9}"
    if "ms" not in result:
        print(head, result["status"], result.get("error", "")[:140], flush=True)
        return
    memory = "" if result["peak_mb"] is None else f"{result['peak_mb']:7.0f} MB"
    errors = f"error to float32 {result['error_to_float32']:.2e}, eager's {result['eagers_error_to_float32']:.2e}"
    print(f"{head}{result['ms']:10.2f} ms  first {result['first_s']:6.1f} s {memory}  {errors}", flush=True)


def main() -> None:
    """Read the command line, measure, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="comma-separated parts of: " + ", ".join(MODELS))
    parser.add_argument("--contenders", help="comma-separated parts of: " + ", ".join(CONTENDERS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--error-tokens", type=int, default=2048, help="length at which errors against float32 are taken")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="narrow models: a quick try, not a figure")
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    import_effcompile()
    path = result_path("models", args.device, args.out)
    payload: dict[str, Any] = {"benchmark": "models", "environment": environment(args.device), "smoke": args.smoke, "results": []}
    torch.manual_seed(0)
    warm_up(args.device)
    for name in select(list(MODELS), args.models):
        case = Case(name, args)
        for contender in select(list(CONTENDERS), args.contenders):
            payload["results"].append(case.measure(contender))
            write_json(path, payload)
            show(payload["results"][-1])
        del case
        release(args.device)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
