"""Layers of experts for tests: their operands in every way of storing them, what a loop over tokens gives, and the contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch.nn import functional as F

from effcompile import runtime
from effcompile.ops.experts import ExpertsSpec, each_operand, reference, reference_backward

runtime.register()
OPERATOR = torch.ops.effcompile.experts.default
FORWARD = torch.ops.effcompile.experts_forward.default
BACKWARD = torch.ops.effcompile.experts_backward.default
FLOOR_ULPS = 4.0

SWIGLU = "gate * up * sigmoid(gate)"
ACTIVATIONS: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
    "swiglu": (SWIGLU, lambda gate, up: F.silu(gate) * up),
    "geglu": ("gate * up * (1 / 2 + erf(gate / sqrt(2)) / 2)", lambda gate, up: F.gelu(gate) * up),
    "geglu-tanh": (
        "gate * up * (1 + tanh(sqrt(2 / 3.141592653589793) * (gate + 0.044715 * gate ** 3))) / 2",
        lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    ),
    "clamped": (
        "(1 + min(7, max(-7, up))) * min(7, gate) * sigmoid(1.702 * min(7, gate))",
        lambda gate, up: (up.clamp(-7, 7) + 1) * (g := gate.clamp(max=7)) * torch.sigmoid(1.702 * g),
    ),
    "reglu": ("max(0, gate) * up", lambda gate, up: F.relu(gate) * up),
    "bilinear": ("gate * up", lambda gate, up: gate * up),
    "gate-unused": ("up", lambda gate, up: up),
    "relu2": ("max(0, up) ** 2", lambda up: F.relu(up) ** 2),
    "relu": ("max(0, up)", lambda up: F.relu(up)),
    "silu": ("up * sigmoid(up)", lambda up: F.silu(up)),
    "linear": ("up", lambda up: up),
}
UNGATED = ("relu2", "relu", "silu", "linear")


def spec_of(name: str, **fields: object) -> ExpertsSpec:
    """A specification with one of the `ACTIVATIONS`."""
    return ExpertsSpec(activation=ACTIVATIONS[name][0], gated=name not in UNGATED, **fields)  # type: ignore[arg-type]


FORMS: dict[str, tuple[str, ExpertsSpec]] = {}
for _stacking, _weighted, _biased in product(
    ("one", "pair", "experts", "experts_pair"), ("output", "input", "none"), (False, True)
):
    _name = f"{_stacking}-{_weighted}{'-biased' if _biased else ''}"
    FORMS[_name] = ("swiglu", spec_of("swiglu", stacking=_stacking, weighted=_weighted, biased=(_biased, _biased)))
FORMS["interleaved"] = ("clamped", spec_of("clamped", interleaved=True, biased=(True, True)))
FORMS["interleaved-experts"] = ("swiglu", spec_of("swiglu", interleaved=True, stacking="experts"))
FORMS["ungated"] = ("relu2", spec_of("relu2"))
FORMS["ungated-experts"] = ("relu2", spec_of("relu2", stacking="experts", biased=(True, True)))
FORMS["bias-first"] = ("swiglu", spec_of("swiglu", biased=(True, False)))
FORMS["bias-second"] = ("swiglu", spec_of("swiglu", stacking="experts_pair", biased=(False, True)))


@dataclass(frozen=True)
class Sizes:
    t: int = 11
    k: int = 2
    experts: int = 5
    d: int = 6
    f: int = 7
    out: int = 4


@dataclass
class Case:
    """One call. `ids` are drawn evenly, and some are dropped, unless they are given."""

    name: str
    spec: ExpertsSpec
    sizes: Sizes = field(default_factory=Sizes)
    dtype: torch.dtype = torch.float32
    ids: torch.Tensor | None = None
    weights_dtype: torch.dtype | None = None
    transposed: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        s, generator = self.sizes, torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        self.spec = replace(self.spec, out=str(self.dtype).removeprefix("torch."))
        width = 2 * s.f if self.spec.gated else s.f
        self.x, self.grad = draw(s.t, s.d), draw(s.t, s.out)
        self.weights = torch.rand(s.t, s.k, generator=generator).to(self.weights_dtype or self.dtype)
        if self.ids is None:
            self.ids = torch.randint(-1, s.experts + 1, (s.t, s.k), generator=generator)
        up = draw(s.experts, width, s.d).mT / s.d**0.5
        down = draw(s.experts, s.out, s.f).mT / s.f**0.5
        up, down = (x if self.transposed else x.contiguous() for x in (up, down))
        bias, second = draw(s.experts, width), draw(s.experts, s.out)
        self.up, self.down = stored(up, self.spec, first=True), stored(down, self.spec)
        self.biases = stored(bias, self.spec, first=True) if self.spec.biased[0] else []
        self.biases += stored(second, self.spec) if self.spec.biased[1] else []
        self.whole = (up, down, bias if self.spec.biased[0] else None, second if self.spec.biased[1] else None)

    @property
    def arguments(self) -> tuple:
        return self.x, self.ids, self.weights, self.up, self.down, self.biases

    @property
    def wanted(self) -> list[bool]:
        return [True, self.spec.weighted != "none", True, True, bool(self.biases)]

    @property
    def names(self) -> list[str]:
        """Of the gradients."""
        lists = [[name] * len(tensors) for name, tensors in (("up", self.up), ("down", self.down), ("biases", self.biases))]
        return ["x", "weights", *sum(lists, [])]


def stored(x: torch.Tensor, spec: ExpertsSpec, *, first: bool = False) -> list[torch.Tensor]:
    """Weights or biases of all experts, stored as the specification says."""
    f = x.shape[-1] // 2
    parts = [x[..., :f], x[..., f:]] if first and spec.is_pair else [x]
    return parts if spec.is_stacked else [part[e] for part in parts for e in range(x.shape[0])]


def token_by_token(case: Case) -> torch.Tensor:
    """The layer in float64: one token, one expert, one vector at a time."""
    up, down, bias, second = (None if x is None else x.double() for x in case.whole)
    act = ACTIVATIONS[case.name][1]
    rows = []
    for t in range(case.x.shape[0]):
        total = torch.zeros(down.shape[-1], dtype=torch.float64)
        for s in range(case.ids.shape[1]):
            e, w, x = int(case.ids[t, s]), case.weights[t, s].double(), case.x[t].double()
            if not 0 <= e < up.shape[0]:
                continue
            h = (x * w if case.spec.weighted == "input" else x) @ up[e] + (0.0 if bias is None else bias[e])
            half = h.shape[0] // 2
            if not case.spec.gated:
                a = act(h)
            else:
                a = act(h[0::2], h[1::2]) if case.spec.interleaved else act(h[:half], h[half:])
            y = a @ down[e] + (0.0 if second is None else second[e])
            total = total + (y * w if case.spec.weighted == "output" else y)
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros(0, down.shape[-1], dtype=torch.float64)


def named(case: Case, out: torch.Tensor, gradients: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The result and the gradients, those of one operand's tensors joined."""
    found = {"out": out}
    for name in dict.fromkeys(case.names):
        found[f"d{name}"] = torch.cat([g.reshape(-1) for g, own in zip(gradients, case.names, strict=True) if own == name])
    return found


def ours(case: Case) -> dict[str, torch.Tensor]:
    """By the operators, as autograd calls them."""
    spec = case.spec.to_json()
    out, h = FORWARD(*case.arguments, spec)
    return named(case, out, BACKWARD(case.grad, *case.arguments, h, spec, case.wanted))


def by_definition(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By the definition, everything in `dtype`."""
    wide = [x.to(dtype) for x, _ in each_operand(case.x, case.weights, case.up, case.down, case.biases, case.wanted)]
    ups, downs = 2 + len(case.up), 2 + len(case.up) + len(case.down)
    arguments = (wide[0], case.ids, wide[1], wide[2:ups], wide[ups:downs], wide[downs:])
    out, _ = reference(*arguments, case.spec, dtype=dtype)
    return named(case, out, reference_backward(case.grad.to(dtype), *arguments, case.spec, case.wanted, dtype=dtype))


def assert_contract(case: Case, found: dict[str, torch.Tensor] | None = None) -> None:
    """Errors against float64 are at most twice those of the definition in the dtype of the case."""
    mine, theirs, true = found or ours(case), by_definition(case, case.dtype), by_definition(case, torch.float64)
    for name, x in true.items():
        a, b = mine[name], theirs[name]
        assert a.shape == b.shape == x.shape, f"{name}: {a.shape}, not {b.shape}"
        assert a.isfinite().all(), f"{name}: not finite"
        error, eager = (a.double() - x).norm(), (b.double() - x).norm()
        allowed = 2 * eager + FLOOR_ULPS * torch.finfo(a.dtype).eps * x.norm()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, eager's own {eager:.2e}, norm {x.norm():.2e}"
