"""Correctness and configuration sweep of the generated attention kernels on one GPU. Temporary.

    python benchmarks/_kernel_probe.py [--quick] [--workers 14]     writes $OUT/kernel_probe.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OUT = Path(os.environ.get("OUT", "/tmp"))

import torch  # noqa: E402

from effcompile.codegen import attention as A  # noqa: E402
from effcompile.codegen import emit  # noqa: E402
from effcompile.ops.attention import AttentionSpec  # noqa: E402

S128 = "s*0.08838834764831845"
SPECS = {
    "causal": AttentionSpec(score=S128, mask="j <= i"),
    "window": AttentionSpec(score=S128, mask="(j <= i) & (i - j < 1024)"),
    "docs": AttentionSpec(score=S128, mask="(j <= i) & (t0.i[b,i] == t0.i[b,j])", captures=("t0",)),
    "softcap": AttentionSpec(score="50*tanh(s*0.0625/50)", mask="j <= i"),
    "softcap_online": AttentionSpec(score="120*tanh(s*0.0625/120)", mask="j <= i"),
    "alibi": AttentionSpec(score=f"{S128} + t0.f[h]*(j-i)", mask="j <= i", captures=("t0",)),
    "bias": AttentionSpec(score=f"{S128} + t0.f[0,h,i,j]", mask="True", captures=("t0",)),
    "sink": AttentionSpec(score="s*0.125", mask="(j <= i) & (i - j < 128)", captures=("t0",), sink="t0.f[h]"),
    "prefix": AttentionSpec(score=S128, mask="(j <= i) | (j < n0)", sizes=("n0",)),
    "padding": AttentionSpec(score=S128, mask="(j <= i) & bool(t0.b[b,j])", captures=("t0",), empty="mean"),
    "full": AttentionSpec(score=S128),
}
# name: (spec, heads, kv heads, d_qk, d_v, T)
TIMED = {
    "causal_4k": ("causal", 32, 8, 128, 128, 4096),
    "causal_16k": ("causal", 32, 8, 128, 128, 16384),
    "window_16k": ("window", 32, 8, 128, 128, 16384),
    "docs_16k": ("docs", 32, 8, 128, 128, 16384),
    "softcap_8k": ("softcap", 16, 8, 256, 256, 8192),
    "softcap_online_8k": ("softcap_online", 16, 8, 256, 256, 8192),
    "mla_8k": ("causal", 16, 16, 192, 128, 8192),
    "alibi_8k": ("alibi", 32, 32, 128, 128, 8192),
    "sink_d64_8k": ("sink", 64, 8, 64, 64, 8192),
}
FORWARD = {
    64: [(128, 128, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3)],
    128: [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 64, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3), (128, 64, 8, 4), (128, 128, 8, 1)],
    256: [(128, 64, 8, 2), (128, 128, 8, 1), (128, 32, 8, 3), (128, 32, 8, 4), (64, 64, 4, 2), (64, 128, 8, 1), (128, 64, 8, 1), (64, 32, 4, 3)],
}  # fmt: skip
DQ = {
    64: [(128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)],
    128: [(128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 128, 8, 2), (128, 32, 4, 3), (128, 128, 8, 1), (128, 128, 8, 2), (64, 128, 4, 2)],
    256: [(64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3), (128, 64, 8, 1), (64, 64, 4, 1), (64, 32, 8, 3)],
}  # fmt: skip
DKV = {
    64: [(64, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2)],
    128: [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 3), (64, 128, 8, 1), (64, 128, 8, 3), (128, 64, 8, 2), (32, 128, 8, 4), (32, 128, 4, 2)],
    256: [(64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 1), (32, 64, 8, 3), (32, 64, 4, 2), (32, 32, 4, 2), (32, 128, 8, 1), (64, 64, 4, 1)],
}  # fmt: skip


def width(d_qk, d_v):
    return max(64, 1 << (max(d_qk, d_v) - 1).bit_length())


def configs(spec, d_qk, d_v, fast_tanh):
    """Triples (forward, dq, dkv) that cover each list; the first entry of each is its default."""
    w = width(d_qk, d_v)
    lists = FORWARD[w], DQ[w], DKV[w]
    launch = lambda t: A.Launch(block_m=t[0], block_n=t[1], num_warps=t[2], num_stages=t[3])  # noqa: E731
    return [
        A.Config(**{name: launch(found[at % len(found)]) for name, found in zip(("forward", "dq", "dkv"), lists)}, fast_tanh=fast_tanh)
        for at in range(max(map(len, lists)))
    ]


def captures_of(name, heads, t):
    if name == "docs":
        return [(torch.arange(t, device="cuda") // max(1, t // 8)).int()[None]], []
    if name == "alibi":
        return [torch.logspace(-1, -8, heads, base=2.0, device="cuda")], []
    if name == "bias":
        return [torch.randn(1, heads, t, t, device="cuda")], []
    if name == "sink":
        return [torch.randn(heads, device="cuda")], []
    if name == "padding":
        return [(torch.arange(t, device="cuda") >= 200)[None]], []
    return [], ([t // 3] if name == "prefix" else [])


def operands(heads, h_kv, d_qk, d_v, t, t_k=None):
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    t_k = t_k or t
    return make(1, heads, t, d_qk), make(1, h_kv, t_k, d_qk), make(1, h_kv, t_k, d_v)


class Timed:
    """A kernel whose launches are timed by events."""

    def __init__(self, kernel, name, log):
        self.kernel, self.name, self.log = kernel, name, log

    def __getitem__(self, grid):
        def launch(*args, **options):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self.kernel[grid](*args, **options)
            end.record()
            self.log.append((self.name, start, end))

        return launch


def compile_one(case, config):
    """In a worker: both directions once, which fills Triton's cache on disk."""
    spec_name, heads, h_kv, d_qk, d_v, _ = TIMED[case]
    t = 2048
    began = time.time()
    errors = []
    captures, sizes = captures_of(spec_name, heads, t)
    q, k, v = operands(heads, h_kv, d_qk, d_v, t)
    spec = SPECS[spec_name]
    out = lse = None
    try:
        out, lse = A.forward(q, k, v, captures, sizes, spec, config=config)
    except Exception as error:
        errors.append(f"forward: {error!r}"[:200])
        out, lse = torch.zeros_like(q[..., :d_v]), torch.zeros(q.shape[:3], device="cuda")
    for direction in ("both",):
        try:
            A.backward(out, q, k, v, out, lse, captures, sizes, spec, config=config)
        except Exception as error:
            errors.append(f"backward {direction}: {error!r}"[:200])
    torch.cuda.synchronize()
    return case, time.time() - began, errors


def time_one(case, config, repeats):
    """{kernel: median ms} and end-to-end medians of one configuration."""
    spec_name, heads, h_kv, d_qk, d_v, t = TIMED[case]
    spec = SPECS[spec_name]
    captures, sizes = captures_of(spec_name, heads, t)
    q, k, v = operands(heads, h_kv, d_qk, d_v, t)
    problem = A.Problem(d_qk=d_qk, d_v=d_v, dtype=q.dtype, arch=A.architecture(q.device))
    path = emit.write_kernel(A.source(spec, problem, config=config), A._directory)
    module = emit.load_kernel(path)
    log, saved = [], {}
    for name in [n for n in vars(module) if n.endswith("_kernel")]:
        saved[name] = getattr(module, name)
        setattr(module, name, Timed(saved[name], name, log))
    result = {}
    try:
        failed = []
        out, lse = torch.zeros(1, heads, t, d_v, device="cuda", dtype=q.dtype), torch.zeros(1, heads, t, device="cuda")
        try:
            for _ in range(2):
                out, lse = module.forward(q, k, v, *captures, *sizes)
        except Exception as error:
            failed.append(f"forward {error!r}"[:160])
        run = {"forward": lambda: module.forward(q, k, v, *captures, *sizes), "backward": lambda: module.backward(out, q, k, v, out, lse, *captures, *sizes)}
        for direction, call in run.items():
            try:
                call()
                torch.cuda.synchronize()
                log.clear()
                for _ in range(repeats):
                    call()
                torch.cuda.synchronize()
            except Exception as error:
                failed.append(f"{direction} {error!r}"[:160])
            times = {}
            for name, start, end in log:
                times.setdefault(name, []).append(start.elapsed_time(end))
            result[direction] = {name: statistics.median(values) for name, values in times.items()}
            log.clear()
        if failed:
            result["failed"] = failed
    finally:
        for name, kernel in saved.items():
            setattr(module, name, kernel)
    return result


def check(name, heads, h_kv, d_qk, d_v, t, t_k=None):
    """Errors of bf16 kernels against float64-like references, as multiples of the bf16 eager error."""
    spec = SPECS[name]
    captures, sizes = captures_of(name, heads, t)
    q, k, v = operands(heads, h_kv, d_qk, d_v, t, t_k)
    out, lse = A.forward(q, k, v, captures, sizes, spec)
    module = A._module(spec, d_qk, d_v, q.dtype, q.device, None)
    grad = torch.randn_like(out)
    ours = (out, *A.backward(grad, q, k, v, out, lse, captures, sizes, spec)[:3])

    def eager(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        result, _ = module.reference(*leaves, *captures, *sizes)
        return (result, *torch.autograd.grad(result, leaves, grad.to(dtype)))

    exact, rough = eager(torch.float64), eager(torch.bfloat16)
    report = {}
    for key, a, e, r in zip(("out", "dq", "dk", "dv"), ours, exact, rough):
        ours_error, eager_error = (a.double() - e).norm() / e.norm(), (r.double() - e).norm() / e.norm()
        report[key] = [ours_error.item(), eager_error.item()]
    report["ok"] = all(a <= 1.2 * e + 1e-3 for a, e in (report[k] for k in ("out", "dq", "dk", "dv")))
    return report


CHECKS = [
    ("causal", 8, 2, 128, 128, 777), ("causal", 4, 4, 64, 64, 1024), ("window", 8, 2, 128, 128, 1024), ("docs", 8, 2, 128, 128, 1024),
    ("softcap", 4, 2, 256, 256, 768), ("softcap_online", 4, 2, 256, 256, 768), ("alibi", 8, 8, 128, 128, 1024), ("bias", 4, 4, 128, 128, 512),
    ("sink", 8, 2, 64, 64, 1024), ("prefix", 8, 2, 128, 128, 1000), ("padding", 8, 2, 128, 128, 1024), ("causal", 4, 4, 192, 128, 1024),
    ("causal", 4, 2, 80, 80, 700), ("causal", 4, 2, 96, 96, 700), ("full", 4, 4, 128, 128, 512), ("full", 4, 2, 24, 16, 333),
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="three configurations a case")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--cases", default=",".join(TIMED))
    arguments = parser.parse_args()
    began = time.time()
    A.set_directory("/tmp/effcompile_probe_kernels")
    results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": {}, "timings": []}

    jobs = []
    for case in arguments.cases.split(","):
        spec_name, heads, h_kv, d_qk, d_v, _ = TIMED[case]
        for tanh in (True, False) if case == "softcap_8k" else (case.startswith("softcap"),):
            found = configs(SPECS[spec_name], d_qk, d_v, tanh)
            few = arguments.quick or case in ("softcap_online_8k", "alibi_8k") or (case == "softcap_8k" and not tanh)
            jobs += [(case, config) for config in (found[:3] if few else found)]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn"), initializer=A.set_directory, initargs=("/tmp/effcompile_probe_kernels",)) as pool:
        futures = [pool.submit(compile_one, case, config) for case, config in jobs if case != "causal_4k"]
        for future in as_completed(futures):
            try:
                case, seconds, errors = future.result()
                for error in errors:
                    print("compile", case, error, flush=True)
            except Exception as error:
                print("worker", repr(error)[:200], flush=True)
    print(f"compiled {len(jobs)} configurations in {time.time() - began:.0f} s", flush=True)

    for arguments_of_check in CHECKS:
        label = "-".join(map(str, arguments_of_check))
        try:
            results["checks"][label] = check(*arguments_of_check)
        except Exception:
            results["checks"][label] = {"ok": False, "error": traceback.format_exc()[-1500:]}
        report = results["checks"][label]
        print("check", label, "ok" if report["ok"] else "FAILED", {k: [f"{x:.1e}" for x in v] for k, v in report.items() if isinstance(v, list)}, report.get("error", ""), flush=True)
        torch.cuda.empty_cache()
    save(results)

    for case, config in jobs:
        if time.time() - began > 400:
            print("out of time", flush=True)
            break
        try:
            timing = time_one(case, config, 5)
        except Exception as error:
            timing = {"failed": [repr(error)[:200]]}
        results["timings"].append({"case": case, "config": config.to_dict(), **timing})
        torch.cuda.empty_cache()
    save(results)
    summary(results)
    print(f"total {time.time() - began:.0f} s")


def save(results):
    (OUT / "kernel_probe.json").write_text(json.dumps(results, indent=1))


def summary(results):
    """The best configurations of each kernel in each case."""
    kernels = {"forward_kernel": "forward", "dq_kernel": "dq", "dkv_kernel": "dkv"}
    for case in dict.fromkeys(row["case"] for row in results["timings"]):
        rows = [row for row in results["timings"] if row["case"] == case]
        for kernel, part in kernels.items():
            seen = {}
            for row in rows:
                value = row.get("forward", {}).get(kernel) or row.get("backward", {}).get(kernel)
                if value:
                    c = row["config"][part]
                    key = f"{c['block_m']}x{c['block_n']}w{c['num_warps']}s{c['num_stages']}" + ("t" if row["config"]["fast_tanh"] else "")
                    seen[key] = min(value, seen.get(key, 1e9))
            print(case, part, "  ".join(f"{k}={v:.3f}" for k, v in sorted(seen.items(), key=lambda kv: kv[1])))
        others = {n: round(v, 4) for row in rows[:1] for d in ("forward", "backward") for n, v in row.get(d, {}).items() if n not in kernels}
        print(case, "others", others, "failed", [row["failed"] for row in rows if "failed" in row][:3])


if __name__ == "__main__":
    main()
