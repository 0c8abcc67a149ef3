"""Linear recurrences on one GPU: the generated kernels beside fla-core's in one run, one process for each of them and form.

    python -m benchmarks recurrence        or
    python benchmarks/recurrence.py [--rows linear,gla] [--contenders effcompile] [--modes forward] [--budget 900] [--out FILE]

A result holds: median milliseconds; seconds of the first call, from empty caches; peak memory beyond the inputs; relative L2 errors
of the output and the gradients at 1024 steps of two heads against the definition in float64; and the share of the floor,
max(operations / peak, bytes / bandwidth), where operations are those of chunks of 64.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attention import MODES, PEAKS
from children import TURN, answer, run_children, turn
from common import (
    Budget,
    cache_environment,
    environment,
    failure,
    first_call,
    import_effcompile,
    median_ms,
    peak_mb,
    relative_l2,
    result_path,
    select,
    write_json,
)
from torch import Tensor

SHAPES = {"b1-t8k-h32-d128": (1, 8192, 32, 128), "b4-t4k-h64-d128": (4, 4096, 64, 128), "b8-t2k-h32-d256": (8, 2048, 32, 256)}
SHAPES["b8-t1k-h8-d64"] = (8, 1024, 8, 64)
CHUNK = 64
SMALL = (1, 1024, 2)  # batch, steps and heads at which errors are measured
TIMEOUT_S = 240.0
NOTES = (
    "contenders take [B, T, H, D] tensors as they lie; fla-core's functions are called with scale 1 and without states",
    "effcompile is the operation that compiled graphs call, with its autograd formula",
    "first_s leaves out imports; without jobs, later sizes of a row find what earlier ones compiled; with jobs, that many processes"
    " compiled side by side, one for each size; what is timed, by fla-core's autotuner too, is alone on the device",
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A recurrence: its decay, whether it is the same at all times, and the function of fla-core that computes it."""

    name: str
    decay: str
    peer: str
    constant: bool = False

    def flops(self, shape: tuple[int, int, int, int], *, backward: bool) -> float:
        """Of the chunkwise form; the backward pass by the table of the design: 10 D D + 2 C (5 D)."""
        b, t, h, d = shape
        forward = 4.0 * d * d + 4.0 * CHUNK * d
        return b * t * h * (forward + (10.0 * d * d + 10.0 * CHUNK * d if backward else 0.0))

    def bytes(self, shape: tuple[int, int, int, int], *, backward: bool) -> float:
        """q, k, v and the output; with gradients 7 tensors more; gates in float32, read once and, backwards, read and written."""
        b, t, h, d = shape
        gate = 0 if self.decay == "none" or self.constant else 4 * (d if self.decay == "key" else 1)
        return float(b * t * h * (2 * d * (11 if backward else 4) + gate * (3 if backward else 1)))


FORMS = {
    form.name: form
    for form in (
        Form(name="linear", decay="none", peer="linear_attn.chunk_linear_attn"),
        Form(name="retention", decay="head", constant=True, peer="retention.chunk_retention"),
        Form(name="simple-gla", decay="head", peer="simple_gla.chunk_simple_gla"),
        Form(name="gla", decay="key", peer="gla.chunk_gla"),
        Form(name="hgrn", decay="rows", peer="hgrn.chunk_hgrn"),
    )
}
CONTENDERS = ("effcompile", "fla")
Inputs = dict[str, Tensor]
Call = Callable[[Inputs], Tensor]


def inputs_of(form: Form, shape: tuple[int, int, int, int], device: str, seed: int) -> Inputs:
    """q, k, v [B, T, H, D] in bfloat16 and the logarithm of the decay in float32."""
    generator = torch.Generator(device=device).manual_seed(seed)
    b, t, h, d = shape

    def make(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    found = {"v": make(b, t, h, d).bfloat16()}
    if form.decay != "rows":
        found |= {"q": make(b, t, h, d).mul(d**-0.5).bfloat16(), "k": make(b, t, h, d).bfloat16()}
    if form.decay == "head" and not form.constant:
        found["g"] = torch.nn.functional.logsigmoid(make(b, t, h)) / 16
    if form.decay in ("key", "rows"):
        found["g"] = torch.nn.functional.logsigmoid(make(b, t, h, d)) / 16
    return found


@functools.cache
def retention_gate(heads: int, device: torch.device) -> Tensor:
    """RetNet's decay of each head, which a compiler computes once: [1, H, 1, 1, 1]."""
    gate = torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device=device, dtype=torch.float64)))
    return gate.float().view(1, heads, 1, 1, 1)


@functools.cache
def spec_of(form: Form) -> tuple[Any, str]:
    """The specification of a form, and as the operation takes it: a compiled graph holds it as a constant."""
    from effcompile.ops.recurrence import RecurrenceSpec

    decay: Any = "value" if form.decay == "rows" else form.decay
    names = (*(() if form.decay == "rows" else ("q", "k")), *(("gate",) if decay != "none" else ()))
    spec = RecurrenceSpec(operands=names, decay=decay, out="bfloat16")
    return spec, spec.to_json()


def specified(form: Form, x: Inputs) -> tuple[Tensor, list[Tensor]]:
    """The same as operands of the operation, views of [B, H, T, ...]."""
    v = x["v"].transpose(1, 2)
    operands = [] if form.decay == "rows" else [x["q"].transpose(1, 2), x["k"].transpose(1, 2)]
    if form.constant:
        operands.append(retention_gate(v.shape[1], v.device))
    elif form.decay == "head":
        operands.append(x["g"].transpose(1, 2)[..., None, None])
    elif form.decay in ("key", "rows"):
        wide = x["g"].transpose(1, 2)
        operands.append(wide[..., None] if form.decay == "key" else wide[..., None, :])
    return v, operands


def effcompile_call(form: Form) -> Call:
    """The operation that a compiled graph calls, with the generated kernels behind it."""
    from effcompile.runtime import register

    register()
    _, text = spec_of(form)

    def call(x: Inputs) -> Tensor:
        v, operands = specified(form, x)
        return torch.ops.effcompile.recurrence(v, operands, text, "bthd")[0].transpose(1, 2)

    return call


def tune_in_turn() -> None:
    """While Triton's autotuner times a kernel, no other process measures: they compile."""
    import triton

    benchmarker = triton.runtime.driver.active.get_benchmarker()

    def timed(call: Callable[[], Any], **options: Any) -> Any:
        call()  # which compiles it
        with turn():
            return benchmarker(call, **options)

    triton.runtime.driver.active.get_benchmarker = lambda: timed


def fla_call(form: Form) -> Call:
    """fla-core's function for the form."""
    tune_in_turn()
    module, _, name = form.peer.rpartition(".")
    function = getattr(importlib.import_module(f"fla.ops.{module}"), name)

    def call(x: Inputs) -> Tensor:
        if form.decay == "rows":
            b, t, h, d = x["v"].shape
            out, _ = function(x["v"].view(b, t, h * d), x["g"].view(b, t, h * d))
            return out.view(b, t, h, d)
        options: dict[str, Any] = {"scale": 1.0, "normalize": False} if form.name == "linear" else {"scale": 1.0}
        if "g" in x:
            options["g"] = x["g"]
        out = function(x["q"], x["k"], x["v"], **options)
        return out[0] if isinstance(out, tuple) else out

    return call


CALLS: dict[str, Callable[[Form], Call]] = {"effcompile": effcompile_call, "fla": fla_call}


def step_of(call: Call, x: Inputs, mode: str) -> Callable[[], dict[str, Tensor]]:
    """One step of `mode` as a function without arguments; it returns the output, and the gradients if it makes them."""
    if mode == "forward":

        def forward() -> dict[str, Tensor]:
            with torch.no_grad():
                return {"out": call(x)}

        return forward
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    gradient = torch.randn_like(x["v"])

    def both() -> dict[str, Tensor]:
        out = call(leaves)
        grads = torch.autograd.grad(out, list(leaves.values()), gradient)
        return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}, "gradient": gradient}

    return both


def errors_of(form: Form, call: Call, width: int, device: str, mode: str, seed: int) -> dict[str, float]:
    """Relative L2 errors against the definition in float64 at a small size."""
    from effcompile.ops.recurrence import reference

    b, t, h = SMALL
    x = inputs_of(form, (b, t, h, width), device, seed)
    got = step_of(call, x, mode)()
    leaves = {name: tensor.double().requires_grad_() for name, tensor in x.items()}
    v, operands = specified(form, leaves)
    wanted = reference(v, operands, spec_of(form)[0], dtype=torch.float64)[0].transpose(1, 2)
    errors = {"out": relative_l2(got["out"], wanted.detach())}
    if mode != "forward":
        grads = torch.autograd.grad(wanted, list(leaves.values()), got["gradient"].double())
        errors |= {f"d{name}": relative_l2(got[f"d{name}"], grad) for name, grad in zip(leaves, grads, strict=True)}
    return errors


def floor_ms(form: Form, shape: tuple[int, int, int, int], device: str, mode: str) -> float | None:
    """The least time that this device's measured peaks allow; None where they are not known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peaks = next((value for key, value in PEAKS.items() if key in name), None)
    if peaks is None:
        return None
    backward = mode != "forward"
    return max(form.flops(shape, backward=backward) / peaks[0], form.bytes(shape, backward=backward) / peaks[1]) * 1e3


def child(form: Form, contender: str, device: str, seed: int, scale: int, asked: list[str]) -> None:
    """One form by one contender in this process: answers with each `size:mode` that is asked for."""
    import_effcompile()
    call = CALLS[contender](form)
    for name in asked:
        size, mode = name.split(":")
        checked = contender == "effcompile"  # another size would be tuned for once more
        measure = functools.partial(measured, form, call, size, device, mode, seed, scale, checked=checked)
        answer(lambda size=size, mode=mode, measure=measure: {"size": size, "mode": mode, **measure()})


def measured(form: Form, call: Call, size: str, device: str, mode: str, seed: int, scale: int, *, checked: bool) -> dict[str, Any]:
    """One measurement, with errors where they are `checked`; a contender that fails is a result, and the others still run."""
    b, t, h, d = SHAPES[size]
    shape = (b, t // scale, h, d)
    try:
        torch.manual_seed(seed)
        x = inputs_of(form, shape, device, seed)
        step = step_of(call, x, mode)
        _, first_s = first_call(step, device)
        with turn():
            peak, ms, floor = peak_mb(step, device), median_ms(step, device), floor_ms(form, shape, device, mode)
        result: dict[str, Any] = {"status": "ok", "ms": round(ms, 4), "first_s": round(first_s, 2)}
        result |= {"peak_mb": None if peak is None else round(peak, 1), "floor_ms": floor and round(floor, 4)}
        result["of_floor"] = floor and round(floor / ms, 3)
        return result | ({"errors": errors_of(form, call, d, device, mode, seed)} if checked else {})
    except Exception as error:
        return failure(error)


def bars(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster than fla-core, row by row, beside the bar of 1.5."""
    timed = {identity(r): r for r in results if r["status"] == "ok"}
    found = []
    for (row, size, mode, contender), ours in timed.items():
        theirs = timed.get((row, size, mode, "fla"))
        if contender == "effcompile" and theirs is not None:
            times = round(theirs["ms"] / ours["ms"], 2)
            found.append({"row": row, "size": size, "mode": mode, "times_faster_than_fla": times, "at_least_1.5": times >= 1.5})
    return found


def run(args: argparse.Namespace) -> None:
    """All measurements, written out after each process; with `--jobs`, side by side before, to fill the caches of compiled code."""
    budget, path = Budget(args.budget), result_path("recurrence", args.device, args.out)
    payload: dict[str, Any] = {"benchmark": "recurrence", "environment": environment(args.device), "notes": NOTES}
    payload |= {"dtype": "bfloat16", "seed": args.seed, "scale": args.scale, "jobs": args.jobs, "results": [], "bars": []}
    pairs = [(row, name) for row in select(list(FORMS), args.rows) for name in select(list(CONTENDERS), args.contenders)]
    asked = [f"{size}:{mode}" for size in select(list(SHAPES), args.sizes) for mode in args.modes.split(",")]

    def results_of(row: str, contender: str, names: list[str], timeout: float) -> list[dict[str, Any]]:
        arguments = [row, contender, args.device, str(args.seed), str(args.scale), *names]
        variables = {**cache_environment(Path(folder)), "TRITON_CACHE_AUTOTUNING": "1", TURN: str(Path(folder, "turn"))}
        found, status = run_children(__file__, arguments, timeout=timeout, variables=variables)
        missing = [dict(zip(("size", "mode"), name.split(":"), strict=True)) | status for name in names[len(found) :]]
        return [{"row": row, "contender": contender, **result} for result in (*found, *missing)]

    def prepared(job: tuple[str, str, str]) -> list[dict[str, Any]]:
        row, contender, size = job
        names = [name for name in asked if name.startswith(f"{size}:")]
        return results_of(row, contender, names, args.prepare)

    own = tempfile.TemporaryDirectory(prefix="effcompile-bench-", ignore_cleanup_errors=True)
    with contextlib.nullcontext(args.caches) if args.caches else own as folder:
        if args.tuned:
            copy_tuning(Path(args.tuned), Path(folder))
        first: dict[tuple[str, ...], float] = {}
        if args.jobs:
            for one in select(list(CONTENDERS), args.contenders):
                jobs = [(row, one, size) for size in select(list(SHAPES), args.sizes) for row, other in pairs if other == one]
                with ThreadPoolExecutor(args.jobs) as pool:
                    found = [x for results in pool.map(prepared, jobs) for x in results]
                first |= {identity(x): x["first_s"] for x in found if "first_s" in x}
                print(f"{one}: compiled {len(found)} cases in {args.budget - budget.left:.0f} s", flush=True)
        for row, contender in pairs:
            for result in results_of(row, contender, asked, max(1.0, min(TIMEOUT_S, budget.left))):
                if "first_s" in result:
                    result["first_s"] = first.get(identity(result), result["first_s"])
                payload["results"].append(result)
                show(result)
            if args.tuned:
                copy_tuning(Path(folder), Path(args.tuned))
            payload["bars"] = bars(payload["results"])
            write_json(path, payload)
    print(f"written to {path}")


def copy_tuning(source: Path, target: Path) -> None:
    """What Triton's autotuner found, a small file for each kernel, from one folder of caches to another."""
    for found in source.rglob("*.autotune.json"):
        kept = target / found.relative_to(source)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found, kept)


def identity(result: dict[str, Any]) -> tuple[str, ...]:
    """What a result is of."""
    return tuple(result[name] for name in ("row", "size", "mode", "contender"))


def show(result: dict[str, Any]) -> None:
    """Print one result on one line."""
    head = f"{result['row']:<11} {result['size']:<16} {result['mode']:<17} {result['contender']:<11}"
    if "ms" not in result:
        print(head, result["status"], result.get("error", "")[:140], flush=True)
        return
    error = f"  error {max(result['errors'].values()):.1e}" if "errors" in result else ""
    print(f"{head}{result['ms']:9.4f} ms  floor {result['floor_ms']}  first {result['first_s']:6.1f} s{error}", flush=True)


def main() -> None:
    """Read the command line, measure, write the JSON file."""
    if sys.argv[1:2] == ["--child"]:
        row, contender, device, seed, scale, *asked = sys.argv[2:]
        child(FORMS[row], contender, device, int(seed), int(scale), asked)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="comma-separated parts of: " + ", ".join(FORMS))
    parser.add_argument("--sizes", help="comma-separated parts of: " + ", ".join(SHAPES))
    parser.add_argument("--contenders", help="comma-separated parts of: " + ", ".join(CONTENDERS))
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated: forward, forward+backward")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds; what does not fit is skipped")
    parser.add_argument("--jobs", type=int, default=0, help="compile with so many processes side by side before")
    parser.add_argument("--prepare", type=float, default=300.0, help="seconds for each of them")
    parser.add_argument("--caches", help="a folder of compiled code to begin with and to keep: first calls are then no figures")
    parser.add_argument("--tuned", help="a folder of fla-core's tuning to begin with and to keep: no first calls of it then")
    parser.add_argument("--scale", type=int, default=1, help="divide the steps by this: a quick try, not a figure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--out", help="the JSON file (default: $OUT or benchmarks/results)")
    args = parser.parse_args()
    unknown = set(args.modes.split(",")) - set(MODES)
    if unknown:
        raise SystemExit(f"Expected modes of {MODES} but got {sorted(unknown)}")
    run(args)


if __name__ == "__main__":
    main()
