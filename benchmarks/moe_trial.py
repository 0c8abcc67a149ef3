"""One contender on one layer of experts: what it runs, and everything that is measured of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from attention import PEAKS
from common import MIB, cold_caches, failure, first_call, median_ms, peak_mb, relative_l2, report, start_report
from moe_layers import Plain, Shape, draw, exact, flops, hugging_face, leaves, tokens_for, traffic
from recurrent_decode import graph_ms
from torch import Tensor, nn

SAMPLE = 1024  # tokens whose results are held against float64; gradients are of all
DECODE = 16  # tokens up to which a step is replayed from a CUDA graph too
MEMORY = 70e9  # bytes of the device that layers and what they copy may fill


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a layer is run on: tokens of a routing, forward or with all gradients."""

    name: str
    tokens: int
    routing: str = "uniform"
    backward: bool = False


def cases(smoke: bool) -> dict[str, Case]:
    """All cases, those that might upset the device last."""
    sizes, skewed, trained = ((64, 16, 1), 64, 64) if smoke else ((4096, 256, 16384, 16, 1), 4096, 8192)
    forward = [Case(name=str(n), tokens=n) for n in sizes]
    skew = Case(name=f"zipf-{skewed}", tokens=skewed, routing="zipf")
    train = Case(name=f"train-{trained}", tokens=trained, backward=True)
    return {case.name: case for case in (forward[0], skew, train, *forward[1:])}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A source, by transformers' name for its experts or `plain`, and what compiles it; `prepared`: side by side beforehand."""

    source: str
    options: Mapping[str, Any] | None = None
    prepared: bool = False


CONTENDERS = {
    "effarch": Contender(source="grouped_mm", options={"backend": "effarch"}),
    "inductor-grouped": Contender(source="grouped_mm", options={}, prepared=True),
    "grouped": Contender(source="grouped_mm"),
    "inductor-batched": Contender(source="batched_mm", options={}, prepared=True),
    "batched": Contender(source="batched_mm"),
    "effarch-plain": Contender(source="plain", options={"backend": "effarch"}, prepared=True),
    "eager": Contender(source="eager"),
    "inductor-eager": Contender(source="eager", options={}),
}
OURS = ("effarch", "effarch-plain")
PEERS = tuple(name for name in CONTENDERS if name not in OURS)


def unfit(shape: Shape, contender: Contender, case: Case) -> str | None:
    """Why a contender is not tried on a case, from its size."""
    if contender.source == "batched_mm" and shape.weight_bytes + copied(shape, case) * (3 if case.backward else 1) > MEMORY:
        return "does not fit"  # of what it copies alone
    if contender.source == "eager" and case.backward and 3 * shape.experts * shape.weight_bytes / PEAKS["H100"][1] > 1.0:
        return "not tried: for each expert it writes a gradient as large as all weights"
    return None


def copied(shape: Shape, case: Case) -> float:
    """Bytes of the experts' weights, once for each assignment."""
    return float(case.tokens * shape.k * shape.expert_bytes)


class Trial:
    """One layer by one contender, and its measurements."""

    def __init__(self, shape: Shape, name: str, device: str, seed: int):
        self.shape, self.name, self.device, self.seed = shape, name, device, seed
        self.contender = CONTENDERS[name]
        torch.manual_seed(seed)
        plain = self.contender.source == "plain"
        layer = hugging_face(shape, "eager" if plain else self.contender.source, device)
        self.layer: nn.Module = Plain(shape, layer) if plain else layer

    def compiled(self) -> Callable[[Tensor], Tensor]:
        """The layer as the contender runs it, compiled afresh."""
        torch.compiler.reset()
        options = self.contender.options
        return self.layer if options is None else torch.compile(self.layer, dynamic=False, **options)

    def inputs(self, case: Case) -> tuple[Tensor, Tensor]:
        """x [1, T, d] and the experts [T, k] that the router sends it to."""
        generator = torch.Generator(self.device).manual_seed(self.seed + 1)
        ids = draw(self.shape, case.tokens, case.routing, generator)
        return tokens_for(ids, leaves(self.layer)["router"].detach(), generator), ids

    def step(self, call: Callable[[Tensor], Tensor], x: Tensor, case: Case) -> Callable[[], dict[str, Tensor]]:
        """One step as a function without arguments; it returns the result and, if it makes them, the gradients."""
        if not case.backward:

            def forward() -> dict[str, Tensor]:
                with torch.no_grad():
                    return {"out": call(x)}

            return forward
        x = x.detach().requires_grad_()
        wanted = {"x": x, **leaves(self.layer)}
        gradient = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(2), device=x.device).bfloat16()

        def both() -> dict[str, Tensor]:
            out = call(x)
            grads = torch.autograd.grad(out, tuple(wanted.values()), gradient)
            found = {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
            return {"out": out.detach(), **found, "gradient": gradient}

        return both

    def prepare(self, case: Case) -> dict[str, Any]:
        """The first call alone."""
        x, _ = self.inputs(case)
        _, first_s = first_call(self.step(self.compiled(), x, case), self.device)
        return {"first_s": round(first_s, 2)}

    def measure(self, case: Case) -> dict[str, Any]:
        """All figures of one case; those of ours from empty caches of their own."""
        with cold_caches() if self.name == "effarch" else contextlib.nullcontext():
            return self._measure(case)

    def _measure(self, case: Case) -> dict[str, Any]:
        x, ids = self.inputs(case)
        call = self.compiled()
        step = self.step(call, x, case)
        start_report()
        got, first_s = first_call(step, self.device)
        found = [int(n) for n in torch.bincount(ids.flatten(), minlength=self.shape.experts).tolist()]
        result: dict[str, Any] = {"status": "ok", "first_s": round(first_s, 2), "active": sum(n > 0 for n in found)}
        result["errors"] = self.errors(got, x, ids, case, found)
        del got
        if self.name in OURS:
            result["report"] = report()
            result["rewritten"] = sum(
                d["family"] == "experts" and d["outcome"] == "rewritten" for d in result["report"]["decisions"]
            )
        if case.backward:
            result["saved_mb"] = saved_mb(call, x)
        peak = peak_mb(step, self.device)
        ms = median_ms(step, self.device)
        result |= {"ms": round(ms, 4), "peak_mb": None if peak is None else round(peak, 1)}
        if case.tokens <= DECODE and self.device == "cuda":
            result |= replayed(step) if self.contender.source != "eager" else {"graph": "its loop reads sizes back"}
        floor = floor_ms(self.shape, case, result["active"], self.device)
        share = floor and round(floor / result.get("graph_ms", ms), 3)
        return result | {"floor_ms": floor and round(floor, 4), "of_floor": share}

    def errors(self, got: dict[str, Tensor], x: Tensor, ids: Tensor, case: Case, counts: list[int]) -> dict[str, float]:
        """Relative L2 errors against float64."""
        tokens = case.tokens if case.backward else min(SAMPLE, case.tokens)
        by_count = sorted(range(len(counts)), key=counts.__getitem__)
        checked = sorted({by_count[0], by_count[-1]})
        gradient = got["gradient"][0] if case.backward else None
        wanted = exact(self.shape, self.layer, x[0, :tokens], ids[:tokens], gradient, checked)
        mine = {name: got[name] for name in wanted}
        mine |= {name: got[name][0, :tokens] for name in ("out", "dx") if name in wanted}
        mine |= {name: got[name][checked] for name in ("dup", "ddown") if name in wanted}
        return {name: float(f"{relative_l2(mine[name], tensor):.3e}") for name, tensor in wanted.items()}


def saved_mb(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """What a forward pass keeps for the backward pass beyond the input, the weights and the result, in MiB.

    On a GPU, from the allocator; on a CPU, the tensors that autograd is handed.
    """
    x = x.detach().requires_grad_()
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = call(x)
        torch.cuda.synchronize()
        return round((torch.cuda.memory_allocated() - before - out.nbytes) / MIB, 2)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() != x.data_ptr():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(x)
    return round(sum(kept.values()) / MIB, 4)


def replayed(step: Callable[[], Any]) -> dict[str, Any]:
    """The time of a replay from a CUDA graph, or why there is none."""
    try:
        return {"graph_ms": round(graph_ms(step), 4)}
    except Exception as error:
        return {"graph": failure(error).get("error", "oom")}


def floor_ms(shape: Shape, case: Case, active: int, device: str) -> float | None:
    """The least time that this device's measured peaks allow; None where they are not known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peaks = next((value for key, value in PEAKS.items() if key in name), None)
    if peaks is None:
        return None
    operations = flops(shape, case.tokens, backward=case.backward)
    return max(operations / peaks[0], traffic(shape, case.tokens, active, backward=case.backward) / peaks[1]) * 1e3


def answered(trial: Trial, case: Case, stage: str) -> dict[str, Any]:
    """One case as a result: exceptions are results, and the other cases still run."""
    reason = unfit(trial.shape, trial.contender, case)
    if reason is not None:
        return {"case": case.name, "status": reason}
    try:
        return {"case": case.name, **(trial.measure(case) if stage == "measure" else trial.prepare(case))}
    except Exception as error:
        return {"case": case.name, **failure(error)}
