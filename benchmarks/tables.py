"""Writes the README's tables of results, from benchmarks/results/*.json, between the marks results:begin and results:end.

    python benchmarks/tables.py           rewrite them
    python benchmarks/tables.py --check   exit 1 if the README differs from the JSON files

Tables hold ratios to the peers of the same run, with the device, the versions and the commit; absolute times stay in the JSON
files. Files of quick tries (`--scale`, `--smoke`) are passed over.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MISSING = "-"

Payload = dict[str, Any]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(peer: float | None, ours: float | None) -> str:
    """How many times less `ours` is than `peer`: `2.5x`."""
    return MISSING if not peer or not ours else f"{peer / ours:.2f}x"


def share(part: float | None, whole: float | None) -> str:
    """`part / whole` with two digits."""
    return MISSING if not part or not whole else f"{part / whole:.2f}"


def source(payload: Payload) -> str:
    """Where and with what a file's figures were taken, in one sentence."""
    where = payload["environment"]
    versions = [f"torch {where['torch']}"] + ([f"Triton {where['triton']}"] if where.get("triton") else [])
    return f"*{where['device']}, {', '.join(versions)}, commit {where['commit']}, {where['date']}.*"


def _by_contender(results: list[Payload], **where: Any) -> dict[str, Payload]:
    chosen = [r for r in results if all(r[key] == value for key, value in where.items())]
    return {r["contender"]: r for r in chosen}


def _value(found: dict[str, Payload], contender: str, key: str) -> float | None:
    return found.get(contender, {}).get(key)


def _against_eager(found: dict[str, Payload]) -> str:
    ran_out = found.get("eager", {}).get("status") == "oom"
    return "eager runs out of memory" if ran_out else times(_value(found, "eager", "ms"), _value(found, "effarch", "ms"))


def attention(payload: Payload) -> str:
    """Speed against each peer, memory, error and the share of the floor, for each row and mode."""
    results = payload["results"]
    peers = ("eager", "Inductor", "FlexAttention", "SDPA")
    header = ("attention", "mode", *peers, "floor / ours", "memory / Flex's", "error / eager's")
    rows = []
    for row, mode in dict.fromkeys((r["row"], r["mode"]) for r in results):
        found = _by_contender(results, row=row, mode=mode)
        ours = found.get("effarch")
        if ours is None:
            continue
        if "ms" not in ours:
            rows.append((ours["title"], mode, ours["status"], *[MISSING] * 6))
            continue
        sdpa = [ms for name in ("sdpa-flash2", "sdpa-cudnn", "sdpa-mask") if (ms := _value(found, name, "ms"))]
        speed = [times(_value(found, name, "ms"), ours["ms"]) for name in ("inductor", "flex")]
        best = times(min(sdpa, default=None), ours["ms"])
        memory = share(ours["peak_mb"], _value(found, "flex", "peak_mb"))
        floor = MISSING if ours["of_floor"] is None else f"{ours['of_floor']:.2f}"
        error = MISSING if "error_vs_eager" not in ours else f"{ours['error_vs_eager']:.2f}"
        rows.append((ours["title"], mode, _against_eager(found), *speed, best, floor, memory, error))
    first = [r["first_s"] for r in results if r["contender"] == "effarch" and "first_s" in r]
    note = f"The longest first call of effarch took {max(first):.0f} s." if first else ""
    lead = (
        "How many times faster than each peer, which all ran beside it; SDPA is the better of FlashAttention 2 and cuDNN,"
        " or a fused kernel with a dense mask."
    )
    return "\n\n".join(filter(None, ("#### Attention written in plain PyTorch", lead, table(header, rows), note, source(payload))))


def models(payload: Payload) -> str:
    """Speed and memory of whole models, and their errors."""
    results = payload["results"]
    header = ("model", "tokens", "eager", "Inductor", "memory / Inductor's", "error / eager's")
    rows = []
    for name in dict.fromkeys(r["model"] for r in results):
        found = _by_contender(results, model=name)
        ours = found.get("effarch")
        if ours is None:
            continue
        if "ms" not in ours:
            rows.append((name, str(ours["tokens"]), ours["status"], *[MISSING] * 3))
            continue
        memory = share(ours["peak_mb"], _value(found, "inductor", "peak_mb"))
        error = share(ours["error_to_float32"], ours["eagers_error_to_float32"])
        speed = times(_value(found, "inductor", "ms"), ours["ms"])
        rows.append((name, str(ours["tokens"]), _against_eager(found), speed, memory, error))
    lead = "Hugging Face models at their real width, two layers, eager attention, one forward pass: how many times faster."
    return "\n\n".join(("#### Whole models", lead, table(header, rows), source(payload)))


def flash_attention(payload: Payload) -> str:
    """Latency and memory of standard attention over those of the rewritten one, length by length."""
    results = payload["results"]
    peers = [name for name in dict.fromkeys(r["contender"] for r in results) if name != "rewritten"]
    header = ("tokens", *(f"{name}: latency" for name in peers), *(f"{name}: memory" for name in peers))
    rows = []
    for tokens in dict.fromkeys(r["tokens"] for r in results):
        found = _by_contender(results, tokens=tokens)
        rows.append((str(tokens), *(_against(found, name, key, "rewritten") for key in ("ms", "peak_mb") for name in peers)))
    lead = (
        f"examples/flash_attention.py: {payload['size']['layers']} layers of Llama 3 8B's widths, one forward pass; how many times"
        " the latency, and the peak memory beyond the weights, of the same model rewritten by effarch."
    )
    return "\n\n".join(("#### Llama 3 at growing lengths", lead, table(header, rows), source(payload)))


def training(payload: Payload) -> str:
    """Speed and memory of a whole training step, on both ways to write attention."""
    results = payload["results"]
    header = ("tokens", "source", "eager", "Inductor", "Inductor on SDPA", "memory / Inductor's", "error / eager's")
    rows = []
    for tokens in dict.fromkeys(r["tokens"] for r in results):
        found = _by_contender(results, tokens=tokens)
        for title, suffix in (("as written", ""), ("SDPA", "-sdpa")):
            name = f"effarch{suffix}"
            ours = found.get(name)
            if ours is None:
                continue
            if "ms" not in ours:
                rows.append((str(tokens), title, ours["status"], *[MISSING] * 4))
                continue
            speed = [_against(found, peer, "ms", name) for peer in ("eager", "inductor", "inductor-sdpa")]
            error = MISSING if "error_vs_eager" not in ours else f"{ours['error_vs_eager']:.2f}"
            memory = share(ours["peak_mb"], _value(found, f"inductor{suffix}", "peak_mb"))
            rows.append((str(tokens), title, *speed, memory, error))
    lead = (
        f"A step (forward and backward, no optimizer) of {payload['size']['layers']} layers of Llama 3 8B's widths in bfloat16,"
        " batch 1: how many times faster effarch is on either source."
    )
    return "\n\n".join(("#### Training", lead, table(header, rows), source(payload)))


def mask_memory(payload: Payload) -> str:
    """What a mask costs beyond the inputs and the results, in MiB."""
    results = payload["results"]
    names = list(dict.fromkeys(r["contender"] for r in results))
    header = ("mask", "tokens", "dense, MiB", *(f"{name}, MiB" for name in names))
    rows = []
    for mask, tokens in dict.fromkeys((r["mask"], r["tokens"]) for r in results):
        found = _by_contender(results, mask=mask, tokens=tokens)
        cells = [_mebibytes(found.get(name, {})) for name in names]
        rows.append((mask, str(tokens), f"{tokens**2 / 2**20:.0f}", *cells))
    lead = (
        "Memory that a call takes at its peak beyond its inputs and its result, with what stays for its mask;"
        " dense: one byte for each pair of a query and a key."
    )
    return "\n\n".join(("#### Memory of masks", lead, table(header, rows), source(payload)))


def _mebibytes(result: Payload) -> str:
    if result.get("status") == "ok":
        return MISSING if result["extra_mb"] is None else f"{result['extra_mb']:.1f}"
    return "out of memory" if result.get("status") == "oom" else result.get("status", MISSING)


def _against(found: dict[str, Payload], peer: str, key: str, ours: str) -> str:
    """How many times `ours` the peer takes; in words, if it ran out of memory or gave no result."""
    other = found.get(peer, {"status": MISSING})
    if other["status"] == "ok":
        return times(other[key], _value(found, ours, key))
    return "out of memory" if other["status"] == "oom" else other["status"]


RAISES = {"error": "raises"}


def recurrence(payload: Payload) -> str:
    """Kernels of recurrences against fla-core's, beside the floor."""
    results = payload["results"]
    header = ("recurrence", "B, T, H, D", "pass", "fla-core", "floor", "error", "first call, s", "fla-core's, s")
    rows = []
    for row, size, mode in dict.fromkeys((r["row"], r["size"], r["mode"]) for r in results):
        found = _by_contender(results, row=row, size=size, mode=mode)
        ours, theirs = found.get("effcompile", {}), found.get("fla", {"status": MISSING})
        if ours.get("status") != "ok":
            continue
        speed = times(theirs["ms"], ours["ms"]) if theirs["status"] == "ok" else RAISES.get(theirs["status"], theirs["status"])
        floor = MISSING if ours["of_floor"] is None else f"{ours['of_floor']:.2f}"
        error = f"{max(ours['errors'].values()):.0e}"
        first = [f"{x['first_s']:.0f}" if "first_s" in x else MISSING for x in (ours, theirs)]
        rows.append((row, ", ".join(re.findall(r"[0-9]+k?", size)), mode, speed, floor, error, *first))
    lead = "How many times faster than fla-core's kernels, which ran beside them, and the share of the floor."
    if any(RAISES["error"] in cells for cells in rows):
        lead += " Where it raises, the result file says what."
    return "\n\n".join(("#### Recurrences", lead, table(header, rows), source(payload)))


def recurrence_length(payload: Payload) -> str:
    """Time and memory over the length, beside softmax attention."""
    results = payload["results"]
    header = ("tokens", "ms for 4096 tokens", "softmax attention's", "memory, MiB", "softmax attention's, MiB")
    rows = []
    for tokens in dict.fromkeys(r["tokens"] for r in results):
        found = _by_contender(results, tokens=tokens)
        pair = found.get("effcompile", {}), found.get("softmax attention", {})
        rows.append((str(tokens), *(f"{x[key]:.3f}" if key in x else MISSING for key in ("ms_per_4096",) for x in pair)))
        rows[-1] += tuple(f"{x['peak_mb']:.0f}" if x.get("peak_mb") else MISSING for x in pair)
    lead = (
        f"One forward pass of {payload['form']}, {payload['heads']} heads of {payload['width']}, beside torch's fused softmax"
        f" attention: faster from {payload['crossover']} tokens on."
    )
    return "\n\n".join(("#### Length", lead, table(header, rows), source(payload)))


def recurrent_decode(payload: Payload) -> str:
    """Single steps that update a state, replayed from CUDA graphs."""
    results = payload["results"]
    header = ("step", "batch", "eager", "Inductor", "floor", "decided")
    rows = []
    for row, batch in dict.fromkeys((r["row"], r["batch"]) for r in results):
        found = _by_contender(results, row=row, batch=batch)
        ours = found.get("effarch", {})
        if not ours.get("graph_ms"):
            continue
        speed = [times(_value(found, peer, "graph_ms"), ours["graph_ms"]) for peer in ("eager", "inductor")]
        rows.append((row, str(batch), *speed, f"{ours['of_floor']:.2f}", ", ".join(ours["decided"]) or MISSING))
    lead = "One token, the state updated in place, replayed from a CUDA graph: how many times faster, and the share of the floor."
    return "\n\n".join(("#### Decoding with a recurrent state", lead, table(header, rows), source(payload)))


def recurrent_models(payload: Payload) -> str:
    """Speed of whole recurrent models, and their first call, of which Dynamo's tracing is the same for all."""
    results = payload["results"]
    header = ("model", "width", "tokens", "eager", "Inductor", "first call / Inductor's", "Dynamo / first call")
    rows = []
    for name, width in dict.fromkeys((r["model"], r["width"]) for r in results):
        found = _by_contender(results, model=name, width=width)
        ours, inductor = found.get("effarch"), found.get("inductor", {})
        if ours is None or "ms" not in ours:
            continue
        speed = [times(_value(found, peer, "ms"), ours["ms"]) for peer in ("eager", "inductor")]
        if "ms" not in inductor and inductor:
            speed[1] = inductor["status"]
        first = share(ours["first_s"], inductor.get("first_s")), share(ours["dynamo_s"], ours["first_s"])
        rows.append((name, str(width), str(ours["tokens"]), *speed, *first))
    lead = "Hugging Face models of two layers with random weights, one forward pass: how many times faster."
    return "\n\n".join(("#### Whole recurrent models", lead, table(header, rows), source(payload)))


def coverage(payload: Payload) -> str:
    """Attention sites rewritten out of those found, model by model."""
    results, total = payload["results"], payload["totals"]
    implementations = list(dict.fromkeys(r["attention"] for r in results))
    by_key = {(r["model"], r["attention"]): r for r in results}

    def cell(model: str, implementation: str) -> str:
        found = by_key.get((model, implementation), {"status": "not run"})
        return f"{found['rewritten']} of {found['sites']}" if found["status"] == "ok" else found["status"]

    rows = [(name, *(cell(name, i) for i in implementations)) for name in dict.fromkeys(r["model"] for r in results)]
    lead = (
        f"Attention sites rewritten, of those found, in tiny Hugging Face models, decided for {payload['hardware']}:"
        f" {total['rewritten']} of {total['sites']}"
        f" ({total['left']} left to Inductor, {total['refused']} refused)."
        f" The largest relative error of an output is {total['largest_error_rel_l2']:.0e}."
    )
    return "\n\n".join(("#### Coverage", lead, table(("model", *implementations), rows), source(payload)))


def compile_time(payload: Payload) -> str:
    """The median share of compile time that effarch adds."""
    shares = [r["added_share"] for r in payload["results"] if "added_share" in r]
    lead = (
        f"Before Inductor starts, effarch takes {payload['median_added_share']:.1%} of the time that Inductor takes alone"
        f" (median of {len(shares)} models, cold; largest {max(shares):.1%})."
    )
    return "\n\n".join(("#### Compile time", lead, source(payload)))


def compile_cache(payload: Payload) -> str:
    """How many second processes found both caches."""
    ran = [r for r in payload["results"] if "hits_both" in r]
    hits = sum(r["hits_both"] for r in ran)
    lead = f"In a second process both of torch's caches, AOTAutograd's and Inductor's, are hit for {hits} of {len(ran)} models."
    return "\n\n".join(("#### Compile cache", lead, source(payload)))


def cpu_attention(payload: Payload) -> str:
    """Speed against Inductor on a CPU: median and least over the lengths."""
    ran = [r for r in payload["results"] if r["status"] == "ok"]
    rows = []
    for variant, dtype, mode in dict.fromkeys((r["variant"], r["dtype"], r["mode"]) for r in ran):
        ratios = [r["times_faster"] for r in ran if (r["variant"], r["dtype"], r["mode"]) == (variant, dtype, mode)]
        rows.append((variant, dtype, mode, f"{statistics.median(ratios):.2f}x", f"{min(ratios):.2f}x"))
    lengths = sorted({r["tokens"] for r in ran})
    threads, shortest, longest = payload["environment"]["threads"], lengths[0], lengths[-1]
    lead = f"How many times faster than Inductor on a CPU (threads: {threads}; T {shortest} to {longest})."
    header = ("attention", "dtype", "mode", "median", "least")
    return "\n\n".join(("#### Attention on a CPU", lead, table(header, rows), source(payload)))


def moe(payload: Payload) -> str:
    """Layers of experts: speed over each peer and over the best of them, case by case, and what the cases come to."""
    results = payload["results"]
    header = ("layer", "tokens", "eager", "grouped_mm", "batched_mm", "Inductor", "best peer", "plain: best peer", "floor / ours")
    rows, best = [], {}
    for shape, case in dict.fromkeys((r["shape"], r["case"]) for r in results):
        found = _by_contender(results, shape=shape, case=case)
        ours = found.get("effarch")
        if ours is None:
            continue
        tokens = {"zipf": "{}, skewed", "train": "{}, forward + backward"}.get(case.partition("-")[0], "{}")
        title = tokens.format(case.rpartition("-")[2])
        if "ms" not in ours:
            rows.append((shape, title, ours["status"], *[MISSING] * 6))
            continue
        inductor = [x for name, x in found.items() if name.startswith("inductor-") and "ms" in x]
        peers = inductor + [found[name] for name in ("eager", "grouped", "batched") if "ms" in found.get(name, {})]
        speed = [_moe_against(found.get(name, {"status": MISSING}), ours) for name in ("eager", "grouped", "batched")]
        least, compiled = (min(map(_moe_ms, some), default=None) for some in (peers, inductor))
        plain = found.get("effarch-plain", {})
        over = (times(compiled, _moe_ms(ours)), times(least, _moe_ms(ours)))
        floor = MISSING if ours["of_floor"] is None else f"{ours['of_floor']:.2f}"
        rows.append((shape, title, *speed, *over, times(least, _moe_ms(plain)) if "ms" in plain else MISSING, floor))
        if least:
            best[shape, case] = least / _moe_ms(ours)
    lead = (
        "A whole layer, router included, on Hugging Face's source: how many times faster than each of transformers' ways to compute"
        " experts, than the best of Inductor on any, and than the best of all; `plain` is the same layer written with two einsums."
        " Up to 16 tokens, what can be captured is replayed from a CUDA graph."
    )
    parts = ("#### Mixture of Experts", lead, table(header, rows), _moe_summary(payload, best), source(payload))
    return "\n\n".join(filter(None, parts))


def _moe_ms(result: Payload) -> float:
    """Of a replay, where there is one."""
    return float(result.get("graph_ms") or result["ms"])


def _moe_against(other: Payload, ours: Payload) -> str:
    if "ms" in other:
        return times(_moe_ms(other), _moe_ms(ours))
    return "out of memory" if other["status"] in ("oom", "does not fit") else other["status"].partition(":")[0]


def _moe_summary(payload: Payload, best: dict[tuple[str, str], float]) -> str:
    """Means over the best peer, memory kept for gradients, skewed routing and first calls, in sentences."""
    told = []
    forward = [ratio for (_, case), ratio in best.items() if case.isdigit()]
    trained = [ratio for (_, case), ratio in best.items() if case.startswith("train")]
    for ratios, what in ((forward, "forward"), (trained, "forward and backward")):
        if ratios:
            mean = statistics.geometric_mean(ratios)
            told.append(f"Over the best peer, {what}: {mean:.2f}x in the geometric mean, {min(ratios):.2f}x at the least.")
    bars = payload["bars"].get("effarch", {})
    if saved := bars.get("saved_vs_grouped"):
        shares = ", ".join(f"{share:.2f} ({shape})" for shape, share in saved.items())
        told.append(f"Kept for the gradient, over what Hugging Face's grouped_mm keeps: {shares}.")
    if skew := bars.get("zipf_vs_uniform"):
        shares = ", ".join(f"{found['time']:.2f} ({shape})" for shape, found in skew.items())
        told.append(f"Time at a routing by Zipf's law over that at a uniform one: {shares}.")
    if bars.get("largest_first_s"):
        told.append(f"The longest first call took {bars['largest_first_s']:.1f} s.")
    if bars.get("largest_error_vs_eager"):
        told.append(f"The largest error is {bars['largest_error_vs_eager']:.2f} times eager's.")
    return " ".join(told)


def moe_upcycling(payload: Payload) -> str:
    """Held-out perplexity of a dense model and of its upcycled copy."""
    curves, weights, plan = payload["curves"], payload["weights"], payload["plan"]
    ends = {name: curves[name][-1] for name in ("dense, after", "upcycled")}
    rows = []
    for title, name, key in (("dense", "dense, after", "dense"), ("upcycled", "upcycled", "upcycled")):
        counts, end = weights[key], ends[name]
        rows.append((title, f"{counts['all']:,}", f"{counts['active']:,}", f"{end['perplexity']:.3f}"))
    start, end = curves["upcycled"][0], ends["upcycled"]
    lead = (
        f"examples/moe_upcycling.py, size {payload['size']}: a dense model of perplexity {start['perplexity']:.3f} goes on for"
        f" {end['tokens'] - start['tokens']:,} bytes of text, as it is and with its feed-forward layers made into"
        f" {plan['experts']} experts of half the width, 2 for each byte, which effarch computes in training and evaluation."
    )
    header = ("model", "weights", "active", "held-out perplexity of a byte")
    return "\n\n".join(("#### Upcycling", lead, table(header, rows), source(payload)))


SECTIONS: dict[str, Callable[[Payload], str]] = {
    "attention": attention,
    "mask-memory": mask_memory,
    "flash-attention": flash_attention,
    "training": training,
    "models": models,
    "recurrence": recurrence,
    "recurrence-length": recurrence_length,
    "recurrent-decode": recurrent_decode,
    "recurrent-models": recurrent_models,
    "moe": moe,
    "moe-upcycling": moe_upcycling,
    "coverage": coverage,
    "compile-time": compile_time,
    "compile-cache": compile_cache,
    "cpu-attention": cpu_attention,
}


def render(folder: Path) -> str:
    """All sections, in the order of `SECTIONS`, one for each JSON file."""
    payloads = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    payloads = [(path, p) for path, p in payloads if p.get("scale", 1) == 1 and not p.get("smoke")]
    found = [SECTIONS[name](p) + picture(path) for name in SECTIONS for path, p in payloads if p.get("benchmark") == name]
    return "\n\n".join(found) if found else "No results yet."


def picture(result: Path) -> str:
    """The plot beside a result file, if there is one."""
    path = result.with_suffix(".png")
    return f"\n\n![{result.stem}](benchmarks/results/{path.name})" if path.exists() else ""


def insert(text: str, tables: str) -> str:
    """`text` with `tables` between the two marks.

    Raises:
        SystemExit: the marks are not there, each once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"Expected one {BEGIN} and after it one {END} in the README")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{tables}\n{text[text.index(END) :]}"


def main() -> None:
    """Read the command line; rewrite the README or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is not up to date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    text = args.readme.read_text()
    fresh = insert(text, render(args.results))
    if args.check:
        if fresh != text:
            raise SystemExit(f"{args.readme} differs from {args.results}: run python benchmarks/tables.py")
    else:
        args.readme.write_text(fresh)


if __name__ == "__main__":
    main()
