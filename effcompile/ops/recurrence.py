"""A linear recurrence as one operation: specification and plain-PyTorch reference.

Each batch b and head h carries a state S [Dk, Dv]:

    S_t = A_t * S_{t-1} + k_t v_t^T          A_t = exp(gate_t * rate), or gate_t itself
    o_t = q_t^T S_t                          or, read before the update, q_t^T S_{t-1} + (q_t . (bonus * k_t)) v_t

Without `k` and `q` there is one row, Dk = 1, that is written and read as it is: h_t = a_t * h_{t-1} + v_t. The decay is one for a
head, for each row ("key"), each column ("value") or each element ("full") of the state.

A delta rule takes out what the state holds at e_t before it writes (Schlag et al. 2021, eq. 24; Yang et al. 2025, eq. 10):

    S_t = A_t * S_{t-1} + beta_t (k_t v_t^T - w_t (R_t^T e_t)^T)          R_t = A_t * S_{t-1}, or S_{t-1}

where e = `erase` and w = `write` are k, and beta is 1, if they are not given.

Linear attention has no decay; RetNet, lightning attention, Mamba-2 and mLSTM one for a head; GLA, HGRN2 and RWKV-6 one for each
row; GSA's first pass one for each column; Mamba one for each element; LRU, RG-LRU, HGRN, minGRU and RWKV-4 have a single row.
DeltaNet, gated DeltaNet, Kimi delta attention and TTT-linear without its norm are delta rules that erase at the key, Comba one
with an erase of its own; RWKV-7 erases and writes at two further keys, reading the state before its decay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import torch

from .._torch import below_autograd
from .attention import LIBRARY

Decay = Literal["none", "head", "key", "value", "full"]
Gate = Literal["log", "factor"]
Read = Literal["after", "before"]
Delta = Literal["none", "decayed", "previous"]

SPEC_VERSION = 3  # part of the key of compiled graphs: raised when an operator's schema changes
OPTIONAL = ("q", "k", "gate", "rate", "bonus", "beta", "erase", "write", "initial")
"""The operands beside `v`, in the order in which they are passed."""
FEW_STEPS = 8
"""Up to so many steps of a matrix state are taken one by one, and its memory can hold the last state as it held the first."""


@dataclass(frozen=True, kw_only=True)
class RecurrenceSpec:
    """The meaning of one recurrence, without its tensors.

    Attributes:
        operands: which of `OPTIONAL` there are, in that order.
        decay: the dimensions of the state along which the decay differs.
        gate: whether `gate` is the decay's logarithm or the decay. A decay itself needs a state of one row.
        read: whether o_t is read after the update with k_t and v_t or before it.
        normaliser: the state has one column more, which v meets with ones; q reads it into the second result.
        delta: whether a step takes out what the state holds at `erase`, and whether it reads that from the decayed state or from
            the previous one.
        out: dtype of the first result.
    """

    operands: tuple[str, ...] = ()
    decay: Decay = "none"
    gate: Gate = "log"
    read: Read = "after"
    normaliser: bool = False
    delta: Delta = "none"
    out: str = "float32"
    version: int = SPEC_VERSION

    def __post_init__(self) -> None:
        if tuple(name for name in OPTIONAL if name in self.operands) != self.operands:
            raise ValueError(f"Expected operands to be some of {OPTIONAL}, in that order, but got operands={self.operands!r}")
        for name, needed in self._needs():
            if not needed:
                raise ValueError(f"Expected another specification: {name}, but got {self!r}")

    def _needs(self) -> list[tuple[str, bool]]:
        has = set(self.operands)
        return [
            ("q and k go together", ("q" in has) == ("k" in has)),
            ("a decay needs a gate, and a gate a decay", ("gate" in has) == (self.decay != "none")),
            ("a rate multiplies a gate that is a logarithm", "rate" not in has or ("gate" in has and self.gate == "log")),
            ("a decay itself needs a state of one row", self.gate == "log" or "k" not in has),
            ("a bonus is for a state that is read before its update", "bonus" not in has or ("k" in has and self.read == "before")),
            ("beta, erase and write belong to a delta rule", self.delta != "none" or not has & {"beta", "erase", "write"}),
            ("a delta rule has keys, a decay of whole rows and no bonus, and is read after its update", self._can_erase),
            ("a normaliser needs q, and one decay for all columns", not self.normaliser or self.can_normalise),
        ]

    @property
    def can_normalise(self) -> bool:
        """Whether the keys' own sum can be a further column of the state."""
        plain = self.delta == "none" and "bonus" not in self.operands
        return plain and "q" in self.operands and self.decay in ("none", "head", "key")

    @property
    def _can_erase(self) -> bool:
        rows = self.has_rows and self.decay in ("none", "head", "key")
        return self.delta == "none" or (rows and self.read == "after" and "bonus" not in self.operands)

    @property
    def has_rows(self) -> bool:
        """Whether the state is a matrix that k writes and q reads."""
        return "k" in self.operands

    @property
    def out_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.out)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def named(self, operands: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The operands by name."""
        return dict(zip(self.operands, operands, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON-ready values."""
        return asdict(self)

    def to_json(self) -> str:
        """One line of JSON, the same for equal specifications."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    @cache
    def from_json(text: str) -> RecurrenceSpec:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return RecurrenceSpec(**{**fields, "operands": tuple(fields["operands"])})


def reference(
    v: torch.Tensor, operands: Sequence[torch.Tensor], spec: RecurrenceSpec, *, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, step by step in plain PyTorch.

    Args:
        v: [B, H, T, Dv].
        operands: those that `spec.operands` names.
            q, k: [B, Hk, T, Dk]; head h of v meets head h // (H // Hk).
            gate, rate: [B, H, T, Dk, Dv], of size 1 where they do not differ (the decay's dimensions, and any of B, H, T).
            bonus: [B, H, T, Dk], B, H and T of size 1 where it does not differ.
            beta: [B, H, T], of size 1 where it does not differ.
            erase, write: like k, each with its own number of heads.
            initial: [B, H, Dk, Dv], the state before the first step; zeros if not given. With a normaliser [B, H, Dk, Dv + 1].
        dtype: to compute in; float32, or float64 for float64 operands, if not given.

    Returns:
        o [B, H, T, Dv] in the dtype of the specification (in `dtype`, if given); q_t . n_t [B, H, T], where the normaliser's
        column n of the state is asked for, else empty; and the last state, like `initial`. The latter two in the dtype of the
        computation.
    """
    out_dtype = dtype or spec.out_dtype
    dtype = dtype or torch.promote_types(v.dtype, torch.float32)
    b, h, t, _ = v.shape
    x = {name: tensor.to(dtype) for name, tensor in spec.named(operands).items()}
    values = v.to(dtype)
    if spec.normaliser:
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    keys, queries = (_heads(x[name], h) if name in x else torch.ones_like(values[..., :1]) for name in ("k", "q"))
    decay = _decay(x, spec).expand(b, h, t, -1, -1) if "gate" in x else None
    bonus = x["bonus"].expand(b, h, t, -1) if "bonus" in x else None
    erase, again = (_heads(x[name], h) if name in x else keys for name in ("erase", "write"))
    beta = x["beta"].expand(b, h, t) if "beta" in x else values.new_ones(b, h, t)
    state = x["initial"] if "initial" in x else values.new_zeros(b, h, keys.shape[-1], values.shape[-1])
    outputs = []
    for i in range(t):
        before = state
        write = keys[:, :, i, :, None] * values[:, :, i, None, :]
        decayed = before if decay is None else decay[:, :, i] * before
        if spec.delta != "none":
            held = (erase[:, :, i, :, None] * (decayed if spec.delta == "decayed" else before)).sum(-2, keepdim=True)
            write = beta[:, :, i, None, None] * (write - again[:, :, i, :, None] * held)
        state = write + decayed
        seen = state if spec.read == "after" else before
        if bonus is not None:
            seen = seen + bonus[:, :, i, :, None] * write
        outputs.append((queries[:, :, i, :, None] * seen).sum(-2))
    result = torch.stack(outputs, dim=2) if outputs else torch.zeros_like(values)
    if spec.normaliser:
        return result[..., :-1].to(out_dtype), result[..., -1], state
    return result.to(out_dtype), result.new_empty((0,)), state


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _decay(x: Mapping[str, torch.Tensor], spec: RecurrenceSpec) -> torch.Tensor:
    """[B, H, T, Dk, Dv], with dimensions of size 1."""
    gate = x["gate"] * x["rate"] if "rate" in x else x["gate"]
    return gate if spec.gate == "factor" else gate.exp()


# -------------------------------------------------------------------- the operators

_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("recurrence(Tensor v, Tensor[] operands, str spec, str layout) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
LIBRARY.define(
    "recurrence_backward(Tensor? grad, Tensor? grad_normaliser, Tensor? grad_final, Tensor v, Tensor[] operands, Tensor? out,"
    " str spec, bool decay) -> Tensor[]",
    tags=_TAGS,
)

LIBRARY.define(
    "recurrence_update(Tensor v, Tensor[] operands, Tensor(a!) state, str spec, str layout) -> (Tensor, Tensor)", tags=_TAGS
)

Layout = Literal["bhtd", "bthd", "tbhd"]
_ORDER = {"bhtd": (0, 1, 2), "bthd": (0, 2, 1), "tbhd": (2, 0, 1)}


def empty_output(v: torch.Tensor, spec: RecurrenceSpec, layout: str) -> torch.Tensor:
    """An output [B, H, T, Dv], in memory ordered as `layout` says."""
    order = _ORDER[layout]
    out = v.new_empty([v.shape[d] for d in order] + [v.shape[3]], dtype=spec.out_dtype)
    return out.permute(*(order.index(d) for d in range(3)), 3)


def state_shape(v: torch.Tensor, operands: Mapping[str, torch.Tensor], spec: RecurrenceSpec) -> tuple[Any, ...]:
    """Of the state, [B, H, Dk, Dv]."""
    rows = operands["k"].shape[-1] if spec.has_rows else 1
    return v.shape[0], v.shape[1], rows, v.shape[3] + int(spec.normaliser)


@torch.library.register_fake("effcompile::recurrence", lib=LIBRARY)
def _fake(v: Any, operands: Any, spec: str, layout: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parsed = RecurrenceSpec.from_json(spec)
    dtype = torch.promote_types(v.dtype, torch.float32)
    normaliser = v.new_empty(v.shape[:3] if parsed.normaliser else (0,), dtype=dtype)
    final = v.new_empty(state_shape(v, parsed.named(operands), parsed), dtype=dtype)
    return empty_output(v, parsed, layout), normaliser, final


@torch.library.register_fake("effcompile::recurrence_update", lib=LIBRARY)
def _fake_update(v: Any, operands: Any, state: Any, spec: str, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    out, normaliser, _ = _fake(v, [*operands, state], spec, layout)
    return out, normaliser


@torch.library.register_fake("effcompile::recurrence_backward", lib=LIBRARY)
def _fake_backward(
    grad: Any, grad_normaliser: Any, grad_final: Any, v: Any, operands: Any, out: Any, spec: str, decay: bool
) -> list[torch.Tensor]:
    return without_decay([torch.empty_like(x) for x in (v, *operands)], RecurrenceSpec.from_json(spec), decay)


def update_reference(
    v: torch.Tensor, operands: Sequence[torch.Tensor], state: torch.Tensor, spec: RecurrenceSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference` with `state` as the initial state, the last operand of the specification, and the last state written to it.

    Returns the first two results. There is no gradient: what a gradient would need is overwritten.
    """
    out, normaliser, final = reference(v, [*operands, state], spec)
    state.copy_(final)
    return out, normaliser


def without_decay(gradients: Sequence[torch.Tensor | None], spec: RecurrenceSpec, decay: bool) -> list[torch.Tensor]:
    """Gradients of `v` and of each operand; unless `decay`, empty ones of gate and rate."""
    kept = [decay or name not in ("gate", "rate") for name in ("v", *spec.operands)]
    like = next(x for x in gradients if x is not None)
    return [x if keep and x is not None else like.new_empty(0) for x, keep in zip(gradients, kept, strict=True)]


def reference_backward(
    grad: torch.Tensor | None, grad_normaliser: torch.Tensor | None, grad_final: torch.Tensor | None,
    v: torch.Tensor, operands: Sequence[torch.Tensor], out: torch.Tensor | None, spec: RecurrenceSpec,
    *, dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of `v` and of each operand, by autograd through the definition."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (v, *operands)]
        results = reference(leaves[0], leaves[1:], spec, dtype=dtype)
        grads = (grad, grad_normaliser, grad_final)
        given = [(r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True) if g is not None and r.requires_grad]
        if not given:  # no step, and no state before it
            return [torch.zeros_like(x) for x in (v, *operands)]
        found = torch.autograd.grad([r for r, _ in given], leaves, [g for _, g in given], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.to(x.dtype) for x, g in zip((v, *operands), found, strict=True)]


class _Differentiable(torch.autograd.Function):
    """The operator with its gradient.

    `torch.library.register_autograd` would do, but takes lists of tensors apart and together again at each call.
    """

    @staticmethod
    def forward(ctx: Any, keys: Any, spec: str, layout: str, v: torch.Tensor, *operands: torch.Tensor) -> Any:
        out, normaliser, final = below_autograd(torch.ops.effcompile.recurrence.default, keys, v, list(operands), spec, layout)
        parsed = RecurrenceSpec.from_json(spec)
        ctx.save_for_backward(v, *operands, *(() if parsed.has_rows else (out,)))  # without rows, the output is the state
        ctx.count, ctx.spec = len(operands), spec
        if not parsed.normaliser:
            ctx.mark_non_differentiable(normaliser)
        ctx.set_materialize_grads(False)
        return out, normaliser, final

    @staticmethod
    def backward(ctx: Any, grad: Any, grad_normaliser: Any, grad_final: Any) -> tuple[Any, ...]:  # type: ignore[override]
        v, *rest = ctx.saved_tensors
        operands, out = rest[: ctx.count], next(iter(rest[ctx.count :]), None)
        if grad is None and grad_normaliser is None and grad_final is None:
            return (None,) * (4 + ctx.count)
        needed = ctx.needs_input_grad[4:]
        names = RecurrenceSpec.from_json(ctx.spec).operands
        decay = any(need for name, need in zip(names, needed, strict=True) if name in ("gate", "rate"))
        found = torch.ops.effcompile.recurrence_backward(grad, grad_normaliser, grad_final, v, operands, out, ctx.spec, decay)
        return None, None, None, found[0], *(x if need else None for x, need in zip(found[1:], needed, strict=True))


def _with_gradient(keys: Any, v: torch.Tensor, operands: Sequence[torch.Tensor], spec: str, layout: str) -> Any:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (v, *operands)):
        return _Differentiable.apply(keys, spec, layout, v, *operands)
    return below_autograd(torch.ops.effcompile.recurrence.default, keys, v, operands, spec, layout)


LIBRARY.impl("recurrence", _with_gradient, "Autograd", with_keyset=True)
