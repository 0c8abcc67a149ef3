"""Operands of every form of `effcompile::recurrence`, and what its results are compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from effcompile.codegen import recurrence_aten
from effcompile.ops.recurrence import OPTIONAL, RecurrenceSpec, reference, reference_backward, state_shape

FLOOR_ULPS = 8.0  # below it, two correct results may differ in the order of their additions alone
NEG_INF = -math.inf


@dataclass(frozen=True, kw_only=True)
class Form:
    """A kind of recurrence, from which operands of any size are drawn.

    Attributes:
        over: dimensions of the gate that have size 1, among "bht".
    """

    decay: str = "none"
    rows: bool = True
    gate: str = "log"
    rate: bool = False
    read: str = "after"
    bonus: bool = False
    normaliser: bool = False
    initial: bool = False
    over: str = ""
    delta: str = "none"
    beta: bool = False
    erase: bool = False
    write: bool = False

    def spec(self, out: str = "float32") -> RecurrenceSpec:
        there = {
            "q": self.rows,
            "k": self.rows,
            "gate": self.decay != "none",
            "rate": self.rate,
            "bonus": self.bonus,
            "beta": self.beta,
            "erase": self.erase,
            "write": self.write,
            "initial": self.initial,
        }
        return RecurrenceSpec(
            operands=tuple(name for name in OPTIONAL if there[name]),
            decay=self.decay,
            gate=self.gate,
            read=self.read,
            normaliser=self.normaliser,
            delta=self.delta,
            out=out,
        )


FORMS = {
    "linear attention": Form(),
    "normalised linear attention": Form(normaliser=True, initial=True),
    "linear attention with a bonus": Form(read="before", bonus=True),
    "retention": Form(decay="head", over="bt", initial=True),
    "mamba-2": Form(decay="head", rate=True),
    "mlstm": Form(decay="head", normaliser=True, initial=True),
    "head, read before": Form(decay="head", read="before", initial=True),
    "head, read before with a bonus": Form(decay="head", read="before", bonus=True),
    "head, one gate for all heads": Form(decay="head", over="h"),
    "gla": Form(decay="key", initial=True),
    "gla with a normaliser": Form(decay="key", normaliser=True),
    "gla with a rate": Form(decay="key", rate=True),
    "rwkv-5": Form(decay="key", read="before", bonus=True, over="bt"),
    "rwkv-6": Form(decay="key", read="before", bonus=True, initial=True),
    "key, read before": Form(decay="key", read="before", over="h"),
    "gsa": Form(decay="value", initial=True),
    "mamba": Form(decay="full", rate=True, initial=True),
    "full": Form(decay="full", read="before", bonus=True),
    "rg-lru": Form(decay="value", rows=False, gate="factor", initial=True),
    "rg-lru of logarithms": Form(decay="value", rows=False),
    "lru with a rate": Form(decay="value", rows=False, rate=True, initial=True),
    "rwkv-4": Form(decay="value", rows=False, read="before", over="bt", initial=True),
    "one row, one decay": Form(decay="head", rows=False, initial=True),
    "sum": Form(rows=False),
    "sum, read before": Form(rows=False, read="before"),
}
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    b: int = 2
    h: int = 4
    heads: int = 4  # of q and k
    t: int = 37
    dk: int = 5
    dv: int = 6


@dataclass
class Case:
    """Operands of one form, and random weights of its three results.

    The keys of a delta rule have length 1, unless they are `raw`; beta is below `strongest`.
    """

    form: Form
    sizes: Sizes = field(default_factory=Sizes)
    scale: float = 1.0
    logs: tuple[float, ...] = ()  # log decays to draw from; uniform in [-scale, 0] if there are none
    dtype: torch.dtype = torch.float32
    out: str = "float32"
    raw: bool = False
    strongest: float = 1.0

    def __post_init__(self) -> None:
        s, form = self.sizes, self.form
        self.spec = form.spec(self.out)
        rows = s.dk if form.rows else 1
        drawn = {
            "q": lambda: torch.randn(s.b, s.heads, s.t, rows),
            "k": lambda: self._keys(rows),
            "gate": lambda: self._gate(rows),
            "rate": lambda: -3 * torch.rand(1, s.h, 1, rows if form.decay in ("key", "full") else 1, 1),
            "bonus": lambda: torch.randn(1, s.h, 1, rows),
            "beta": lambda: self.strongest * torch.rand(s.b, s.h, s.t),
            "erase": lambda: self._keys(rows),
            "write": lambda: self._keys(rows),
            "initial": lambda: torch.randn(s.b, s.h, rows, s.dv + form.normaliser),
        }
        self.v = torch.randn(s.b, s.h, s.t, s.dv).to(self.dtype)
        self.operands = [drawn[name]().to(self.dtype) for name in self.spec.operands]
        self._write_where_it_erases()
        wide = torch.promote_types(self.dtype, torch.float32)
        named = self.spec.named(self.operands)
        self.weights = [
            torch.randn(s.b, s.h, s.t, s.dv).to(self.spec.out_dtype),
            torch.randn(s.b, s.h, s.t).to(wide) if form.normaliser else None,
            torch.randn(state_shape(self.v, named, self.spec)).to(wide),
        ]

    def _write_where_it_erases(self) -> None:
        """A step that writes elsewhere than it erases may let the state grow: as RWKV-7, at a part of each element."""
        named = self.spec.named(self.operands)
        if "write" in named:
            named["write"].copy_(named.get("erase", named["k"]) * torch.rand_like(named["write"]))

    def _keys(self, rows: int) -> torch.Tensor:
        keys = torch.randn(self.sizes.b, self.sizes.heads, self.sizes.t, rows)
        return keys if self.raw or self.form.delta == "none" else torch.nn.functional.normalize(keys, dim=-1)

    def _gate(self, rows: int) -> torch.Tensor:
        s, form = self.sizes, self.form
        shape = [1 if letter in form.over else size for letter, size in zip("bht", (s.b, s.h, s.t), strict=True)]
        shape += [rows if form.decay in ("key", "full") and not form.rate else 1, s.dv if form.decay in ("value", "full") else 1]
        if form.gate == "factor":
            return 1.9 * torch.rand(shape) - 0.9
        if form.rate:
            return torch.rand(shape) * self.scale
        if self.logs:
            return torch.tensor(self.logs)[torch.randint(len(self.logs), shape)]
        return -torch.rand(shape) * self.scale

    def in_float64(self) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
        return self.v.double(), [x.double() for x in self.operands], [None if w is None else w.double() for w in self.weights]


def ours(case: Case, layout: str = "bhtd") -> dict[str, torch.Tensor]:
    """The results and gradients of the lowering, by name."""
    results = recurrence_aten.forward(case.v, case.operands, case.spec, layout)
    saved = None if case.form.rows else results[0]
    return named(case, results, recurrence_aten.backward(*case.weights, case.v, case.operands, saved, case.spec))


def named(case: Case, results, gradients) -> dict[str, torch.Tensor]:
    names = ("out", "normaliser", "final", "dv", *(f"d{name}" for name in case.spec.operands))
    return dict(zip(names, (*results, *gradients), strict=True))


def sequential(case: Case) -> dict[str, torch.Tensor]:
    """The same by the definition, in the operands' own precision."""
    gradients = reference_backward(*case.weights, case.v, case.operands, None, case.spec)
    return named(case, reference(case.v, case.operands, case.spec), gradients)


def exact(case: Case) -> dict[str, torch.Tensor]:
    """The same in float64."""
    v, operands, weights = case.in_float64()
    gradients = reference_backward(*weights, v, operands, None, case.spec, dtype=torch.float64)
    return named(case, reference(v, operands, case.spec, dtype=torch.float64), gradients)


def assert_contract(case: Case, found: dict[str, torch.Tensor] | None = None, *, floor: float = FLOOR_ULPS) -> None:
    """Errors against float64 are at most twice those of the definition in float32, and the same elements are not finite."""
    mine, theirs, true = found or ours(case), sequential(case), exact(case)
    for name, x in true.items():
        a, b = mine[name], theirs[name]
        assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.dtype} {a.shape}, not {b.dtype} {b.shape}"
        assert torch.equal(a.isnan(), b.isnan()), f"{name}: {a.isnan().sum()} NaN, not {b.isnan().sum()}"
        kept = b.isfinite() & x.isfinite()
        a, b, x = (torch.where(kept, t.double(), 0.0) for t in (a, b, x))
        allowed = 2 * (b - x).norm() + floor * torch.finfo(mine[name].dtype).eps * x.norm()
        assert (a - x).norm() <= allowed, f"{name}: error {(a - x).norm():.2e}, allowed {allowed:.2e}, norm {x.norm():.2e}"


DECAYS = {
    "none at all": (0.0,),
    "tiny": (-1e-30, -1e-8),
    "mild": (-0.01, -0.3),
    "strong": (-8.0, -20.0),
    "beyond float32": (-90.0, -500.0),
    "resets": (-0.05, -0.05, -0.05, NEG_INF),
    "nothing but resets": (NEG_INF,),
    "huge": (-1e30, -0.1),
    "growth": (0.2, -0.1, 0.0),
    "bursts of growth": (12.0, -12.0, -12.0, NEG_INF),
    "all kinds": (0.0, NEG_INF, -1e30, -1e-30, -60.0, -1.0, -0.01, 0.3, -20.0),
}


FREE = {name: form for name, form in FORMS.items() if form.decay != "none" and form.gate == "log" and not form.rate}
