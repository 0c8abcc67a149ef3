"""Cases of the cost model's benchmark: what is drawn, which configurations each has, how one is called, and its predicted time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common import import_effcompile
from torch import Tensor

import_effcompile()

from effcompile.codegen import attention, attention_costs, decode, decode_costs, emit, recurrence, recurrence_costs  # noqa: E402
from effcompile.cost_model.hardware import Hardware  # noqa: E402
from effcompile.cost_model.schedule import DEFAULT, Factors, total_seconds  # noqa: E402
from effcompile.ops.attention import AttentionSpec  # noqa: E402
from effcompile.ops.recurrence import RecurrenceSpec  # noqa: E402

MOST_SCORES = 3e10  # of one attention: a call stays below some 20 ms
MOST_ELEMENTS = 1e8  # of one operand: many processes hold theirs side by side
FAMILIES = ("attention", "decode", "recurrence")
MASKS = {
    "causal": "j <= i",
    "full": "True",
    "window": "(j <= i) & (i - j < {window})",
    "prefix": "(j <= i) | (j < {window})",
    "alibi": "j <= i",
    "softcap": "j <= i",
    "softcap-window": "(j <= i) & (i - j < {window})",
}
DECAYS = ("none", "constant", "head", "key", "value")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem at one size, forward or backward. `form`: a name of MASKS, or of DECAYS; `kv_heads`: of keys, or of q and k."""

    family: str
    mode: str
    form: str
    batch: int
    heads: int
    kv_heads: int
    steps: int
    width: int
    window: int = 0
    queries: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def name(self) -> str:
        queries = f"-q{self.queries}" if self.queries else ""
        window = f"{self.window}" if "{window}" in MASKS.get(self.form, "") else ""
        return (
            f"{self.family}-{self.mode}-{self.form}{window}-b{self.batch}-h{self.heads}/{self.kv_heads}-t{self.steps}{queries}"
            f"-d{self.width}"
        )


@dataclass(frozen=True)
class Candidate:
    """One configuration; `splits` of the keys when decoding."""

    config: Any
    splits: int | None = None


def draw(count: int, seed: int) -> list[Case]:
    """Different cases of all families in turn, in random order: half attention, a quarter each of decoding and of recurrences."""
    source, found = random.Random(seed), dict[Case, None]()
    makers = (_attention, _recurrence, _attention, _decode)
    while len(found) < count:
        case = makers[len(found) % len(makers)](source)
        if _fits(case):
            found[case] = None
    return list(found)


def _attention(source: random.Random) -> Case:
    kv_heads = source.choice((1, 2, 4, 8))
    return Case(
        family="attention",
        mode=source.choice(("forward", "forward", "backward")),
        form=source.choice(tuple(MASKS)),
        batch=source.choice((1, 1, 2, 4, 8)),
        heads=kv_heads * source.choice((1, 2, 4, 8)),
        kv_heads=kv_heads,
        steps=_length(source, 7, 15),
        width=source.choice((64, 64, 128, 128, 128, 256)),
        window=2 ** source.randint(6, 12),
    )


def _decode(source: random.Random) -> Case:
    kv_heads = source.choice((1, 2, 4, 8))
    return Case(
        family="decode",
        mode="forward",
        form=source.choice(("full", "softcap", "window")),
        batch=source.choice((1, 2, 4, 8, 16, 32)),
        heads=kv_heads * source.choice((1, 4, 8)),
        kv_heads=kv_heads,
        steps=_length(source, 9, 15),
        width=source.choice((64, 128, 128, 256)),
        window=2 ** source.randint(7, 12),
        queries=source.choice((1, 1, 1, 4, 16)),
    )


def _recurrence(source: random.Random) -> Case:
    heads = source.choice((1, 4, 8, 16, 32, 64))
    return Case(
        family="recurrence",
        mode=source.choice(("forward", "forward", "backward")),
        form=source.choice(DECAYS),
        batch=source.choice((1, 1, 2, 4, 8)),
        heads=heads,
        kv_heads=heads,
        steps=_length(source, 4, 15),
        width=source.choice((64, 128, 128, 256)),
    )


def _length(source: random.Random, low: int, high: int) -> int:
    """A power of two, or a number around it that tiles do not divide."""
    whole = 2 ** source.randint(low, high)
    return whole if source.random() < 0.6 else max(16, int(whole * source.uniform(0.6, 1.0)))


def _fits(case: Case) -> bool:
    scores = case.batch * case.heads * (case.queries or case.steps) * case.steps
    elements = case.batch * case.heads * case.steps * case.width
    return elements <= MOST_ELEMENTS and (case.family == "recurrence" or scores * case.width <= MOST_SCORES * 128)


# ---------------------------------------------------------------------------------------------------------- specifications


def spec_of(case: Case) -> Any:
    """The specification of a case's operation."""
    if case.family == "recurrence":
        decay: Any = "head" if case.form == "constant" else case.form
        names = ("q", "k", *(() if decay == "none" else ("gate",)))
        return RecurrenceSpec(operands=names, decay=decay, out="bfloat16")
    mask = MASKS[case.form].format(window=case.window)
    if case.queries:  # the last ones
        mask = mask.replace("i", f"(i + {case.steps - case.queries})")
    scaled = f"{case.width**-0.5!r}*s"
    score = f"50*tanh({scaled}/50)" if "softcap" in case.form else scaled
    score = f"{scaled} + t0.f[h]*(j - i)" if case.form == "alibi" else score
    return AttentionSpec(score=score, mask=mask, captures=("t0",) if case.form == "alibi" else ())


def problem_of(case: Case, arch: str) -> Any:
    """What the configurations of a case depend on."""
    if case.family == "recurrence":
        return recurrence.Problem(d_k=case.width, d_v=case.width, dtype=torch.bfloat16, arch=arch, constant=case.form == "constant")
    return attention.Problem(d_qk=case.width, d_v=case.width, dtype=torch.bfloat16, arch=arch)


def candidates(case: Case, hardware: Hardware) -> list[Candidate]:
    """The rule's configuration first. Those that differ only in what the case's mode does not run count as one."""
    spec, problem = spec_of(case), problem_of(case, hardware.arch)
    if case.family == "recurrence":
        return [Candidate(config) for config in recurrence.candidates(spec, problem)]
    if case.family == "decode":
        return _decode_candidates(case, hardware)
    found: dict[Any, Candidate] = {}
    for config in attention.candidates(spec, problem):
        ran = config.forward if case.mode == "forward" else (config.dq, config.dkv, config.split_dkv)
        found.setdefault(ran, Candidate(config))
    return list(found.values())


def _decode_candidates(case: Case, hardware: Hardware) -> list[Candidate]:
    """The rule's tiles with several numbers of parts, and the rule's parts with more and fewer loads in flight."""
    spec, problem, sizes = spec_of(case), problem_of(case, hardware.arch), sizes_of(case)
    base = decode.default_config(spec, problem)
    parts = decode_costs.split_candidates(spec, base, sizes, hardware)
    others = []
    for change in (-1, 1):
        tiles = tuple(replace(tile, num_stages=max(1, tile.num_stages + change)) for tile in base.tiles)
        others.append(Candidate(replace(base, tiles=tiles), parts[0]))
    return [*(Candidate(base, splits) for splits in parts), *others]


def sizes_of(case: Case) -> Any:
    """The extents of a case's call."""
    if case.family == "recurrence":
        return recurrence_costs.Sizes(
            batch=case.batch, heads=case.heads, steps=case.steps, key_heads=case.kv_heads, slopes=case.form != "constant"
        )
    return attention_costs.Sizes(
        batch=case.batch, heads=case.heads, kv_heads=case.kv_heads, t_q=case.queries or case.steps, t_k=case.steps
    )


def predicted_ms(case: Case, candidate: Candidate, hardware: Hardware, factors: Factors = DEFAULT) -> float:
    """The cost model's time for one candidate; infinite if it does not fit."""
    spec, problem, sizes = spec_of(case), problem_of(case, hardware.arch), sizes_of(case)
    if case.family == "recurrence":
        work = recurrence_costs.launches(spec, problem, candidate.config, sizes, hardware, mode=case.mode)  # type: ignore[arg-type]
    elif case.family == "decode":
        work = decode_costs.launches(spec, problem, candidate.config, sizes, candidate.splits or 1)
    else:
        work = attention_costs.launches(spec, problem, candidate.config, sizes, mode=case.mode)  # type: ignore[arg-type]
    return float(total_seconds(work, hardware, factors)) * 1e3


# -------------------------------------------------------------------------------------------------------------------- calls


def call_of(case: Case, candidate: Candidate, device: str) -> Callable[[], Any]:
    """One candidate as a function without arguments, on random data."""
    torch.manual_seed(0)
    return (_recurrence_call if case.family == "recurrence" else _attention_call)(case, candidate, device)


def _attention_call(case: Case, candidate: Candidate, device: str) -> Callable[[], Any]:
    spec, config = spec_of(case), candidate.config

    def make(heads: int, steps: int) -> Tensor:
        return torch.randn(case.batch, heads, steps, case.width, device=device, dtype=torch.bfloat16)

    q, k, v = make(case.heads, case.queries or case.steps), make(case.kv_heads, case.steps), make(case.kv_heads, case.steps)
    captures = [torch.rand(case.heads, device=device) * 0.1] if spec.captures else []
    if case.family == "decode":
        return lambda: decode.forward(q, k, v, captures, [], spec, config=config, splits=candidate.splits)
    if case.mode == "forward":
        return lambda: attention.forward(q, k, v, captures, [], spec, config=config)
    out = torch.randn_like(q)
    lse = torch.full(q.shape[:3], 10.0, device=device)  # what the rows add up to does not matter for the time
    grad = torch.randn_like(out)
    return lambda: attention.backward(grad, q, k, v, out, lse, captures, [], spec, config=config)


def _recurrence_call(case: Case, candidate: Candidate, device: str) -> Callable[[], Any]:
    spec, problem = spec_of(case), problem_of(case, attention.architecture(torch.device(device)))
    module = emit.load_kernel(emit.write_kernel(recurrence.source(spec, problem, config=candidate.config), family="recurrence"))

    def make(*last: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(case.batch, case.steps, case.heads, *last, device=device, dtype=dtype).transpose(1, 2)

    x = {"q": make(case.width) * case.width**-0.5, "k": make(case.width)}
    gates = {"head": (1, 1), "key": (case.width, 1), "value": (1, case.width)}
    if case.form == "constant":
        x["gate"] = -torch.rand(1, case.heads, 1, 1, 1, device=device) / 16
    elif case.form != "none":
        x["gate"] = torch.nn.functional.logsigmoid(make(*gates[case.form], dtype=torch.float32)) / 16
    v = make(case.width)
    tile, segments = module.choice(v, x["k"])
    if case.mode == "forward":
        return lambda: module.forward(v, **x, layout="bthd", tile=tile, segments=segments)
    out = module.forward(v, **x, layout="bthd", tile=tile, segments=segments)[0]
    grads = (torch.randn_like(out), None, None)
    weigh = case.form != "constant"
    return lambda: module.backward(*grads, v, **x, weigh=weigh, tile=tile, segments=segments)
