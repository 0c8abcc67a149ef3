"""Attention as one operation: specification and plain-PyTorch reference.

    O[b,h,i,:] = sum_j P[b,h,i,j] V[b,h//g,j,:],    P = softmax_j(score(s) where mask),    s = Q[b,h,i,:] . K[b,h//g,j,:]

`score` and `mask` are index expressions (see `effcompile.terms`) over `s`, the indices `b`, `h`, `i`, `j`, loads from captured
tensors and integer sizes. Nothing else is known of them: causality, windows, documents, biases and soft-caps are all expressions.
Without a normaliser, as in sigmoid attention, the score itself is the weight: P = score(s) where mask, else 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ..evaluate import Evaluator
from ..terms import from_text
from .captured import gradient, loads_that_learn, slope
from .dropout import dropout_keeps

Empty = Literal["impossible", "nan", "zero", "mean"]
Normaliser = Literal["softmax", "none"]
Precision = Literal["ieee", "tf32"]

SPEC_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The meaning of one attention, without its tensors.

    Attributes:
        score: the logit, in natural units, of `s`, `b`, `h`, `i`, `j`; the scale stands in it. Without a normaliser, the weight.
        mask: the condition under which key `j` takes part for query `i`.
        empty: what a row without any key yields: it cannot occur (proved), NaN (softmax of -inf), zeros (SDPA's safe softmax),
            or the mean of all values (softmax of equal finite logits).
        sink: a further logit of `b`, `h`, `i` that takes its share of the softmax and has no value (attention sinks).
        captures: names of the captured tensors, in the order in which they are passed.
        sizes: names of the integers that the expressions mention, in the order in which they are passed.
        learned: names of the captured tensors that get a gradient, through the score or the sink.
        dropout: the share of the weights that are set to zero, the others divided by what is left; the last captured tensor, the
            integer `seed`, then decides which ones (see `ops.dropout`).
        precision: how float32 operands are multiplied.
        normaliser: "softmax" makes weights of the logits of a row; "none" takes each as it is. A row without any key is then zero,
            there is no sink, and the log-sum-exp is given as zeros.
    """

    score: str = "s"
    mask: str = "True"
    empty: Empty = "impossible"
    sink: str | None = None
    captures: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    dropout: float = 0.0
    precision: Precision = "ieee"
    normaliser: Normaliser = "softmax"
    version: int = SPEC_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON-ready values."""
        return asdict(self)

    def to_json(self) -> str:
        """One line of JSON, the same for equal specifications."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AttentionSpec:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        lists = {name: tuple(fields[name]) for name in ("captures", "sizes", "learned")}
        return cls(**{**fields, **lists})


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    captures: Sequence[torch.Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain PyTorch: materialises the scores.

    Args:
        q: [B, H, Tq, D].
        k: [B, H / g, Tk, D].
        v: [B, H / g, Tk, Dv].
        captures: tensors that the expressions load from, in the order of `spec.captures`.
        sizes: integers that they mention, in the order of `spec.sizes`.
        dtype: to compute in; float32, or float64 for float64 operands, if not given.

    Returns:
        The output [B, H, Tq, Dv] in the dtype of `v`, and the log-sum-exp of the logits [B, H, Tq] in `dtype`.
    """
    dtype = dtype or torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    logits = q.to(dtype) @ keys.mT
    indices = index_tensors(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    evaluator = Evaluator(
        {
            **indices,
            **dict(zip(spec.sizes, sizes, strict=True)),
            "s": logits,
        },
        dict(zip(spec.captures, captures, strict=True)),
        dtype=dtype,
        device=q.device,
    )
    scores = evaluator.tensor(from_text(spec.score), dtype).expand(logits.shape)
    mask = evaluator.tensor(from_text(spec.mask), torch.bool).expand(logits.shape)
    sink = None if spec.sink is None else evaluator.tensor(from_text(spec.sink), dtype).expand(*logits.shape[:3], 1)
    if spec.normaliser == "softmax":
        weights, lse = _softmax(scores, mask, sink, spec.empty)
    else:
        weights, lse = torch.where(mask, scores, 0.0), torch.zeros(logits.shape[:3], dtype=dtype, device=q.device)
    if spec.dropout:
        kept = dropout_keeps(captures[-1], indices["b"], indices["h"], indices["i"], indices["j"], spec.dropout)
        weights = torch.where(kept, weights / (1.0 - spec.dropout), 0.0)
    return (weights @ values).to(v.dtype), lse


def _softmax(
    scores: torch.Tensor, mask: torch.Tensor, sink: torch.Tensor | None, empty: Empty
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights [B, H, Tq, Tk] and the log-sum-exps [B, H, Tq] of scores where `mask`, beside the logit `sink` [B, H, Tq, 1]."""
    masked = scores.masked_fill(~mask, float("-inf"))
    if empty == "mean":
        masked = torch.where(mask.any(-1, keepdim=True), masked, torch.zeros_like(masked))
    if sink is not None:
        masked = torch.cat([masked, sink], dim=-1)
    weights = masked.softmax(-1)[..., : scores.shape[-1]]
    if empty == "zero":
        weights = torch.where(mask.any(-1, keepdim=True), weights, torch.zeros_like(weights))
    return weights, masked.logsumexp(-1)


def index_tensors(b: int, h: int, i: int, j: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The index symbols as tensors that broadcast to [b, h, i, j]."""
    shapes = {"b": (b, (-1, 1, 1, 1)), "h": (h, (-1, 1, 1)), "i": (i, (-1, 1)), "j": (j, (-1,))}
    return {name: torch.arange(n, device=device).view(shape) for name, (n, shape) in shapes.items()}


# -------------------------------------------------------------------- the operators

LIBRARY = torch.library.Library("effcompile", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor[] captures, SymInt[] sizes, str spec, str layout) -> (Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] captures, SymInt[] sizes,"
    " str spec, Tensor? grad_lse=None) -> (Tensor, Tensor, Tensor, Tensor[])",
    tags=_TAGS,
)

Layout = Literal["bhtd", "bthd"]


def empty_output(q: torch.Tensor, v: torch.Tensor, layout: str) -> torch.Tensor:
    """An output [B, H, Tq, Dv], in memory ordered as `layout` says."""
    b, h, t, d = q.shape[0], q.shape[1], q.shape[2], v.shape[3]
    if layout == "bthd":
        return v.new_empty((b, t, h, d)).transpose(1, 2)
    return v.new_empty((b, h, t, d))


@torch.library.register_fake("effcompile::attention", lib=LIBRARY)
def _fake(q: Any, k: Any, v: Any, captures: Any, sizes: Any, spec: str, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_output(q, v, layout), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("effcompile::attention_backward", lib=LIBRARY)
def _fake_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, captures: Any, sizes: Any, spec: str, grad_lse: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    learned = learned_captures(AttentionSpec.from_json(spec), captures)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), [torch.empty_like(x) for x in learned]


def learned_captures(spec: AttentionSpec, captures: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The captured tensors that get a gradient."""
    return [captures[spec.captures.index(name)] for name in spec.learned]


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captures: Any, sizes: Any, spec: str, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    result, lse = reference(q, k, v, captures, sizes, AttentionSpec.from_json(spec))
    out = empty_output(q, v, layout)
    out.copy_(result)
    return out, lse.float()


def reference_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: Any,
    lse: Any,
    captures: Any,
    sizes: Any,
    spec: str,
    grad_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Gradients of queries, keys, values and captured tensors that learn, by autograd through the definition."""
    parsed = AttentionSpec.from_json(spec)
    learned = learned_captures(parsed, captures)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        leaves += [x.detach().float().requires_grad_() for x in learned]  # what many positions load is summed in float32
        given = dict(zip(parsed.captures, captures, strict=True)) | dict(zip(parsed.learned, leaves[3:], strict=True))
        results = reference(leaves[0], leaves[1], leaves[2], list(given.values()), sizes, parsed)
        count = 1 if grad_lse is None else 2
        found = torch.autograd.grad(results[:count], leaves, (grad, grad_lse)[:count], materialize_grads=True)
    dq, dk, dv, *others = (torch.empty_like(x).copy_(g) for x, g in zip((q, k, v, *learned), found, strict=True))
    return dq, dk, dv, others


def captured_gradients(
    shape: tuple[int, int, int, int],
    values: Sequence[torch.Tensor],
    rows: torch.Tensor | None,
    captures: Any,
    sizes: Any,
    spec: AttentionSpec,
) -> list[torch.Tensor]:
    """The gradients of the captured tensors that learn.

    Args:
        shape: B, H, TQ, TK.
        values: of each load of `loads_that_learn(score)`, its gradient [B, H, TQ, TK], of size 1 where it is summed already.
        rows: the gradient of each row's sink logit [B, H, TQ], if there is one that learns.
    """
    symbols = {**index_tensors(*shape, captures[0].device), **dict(zip(spec.sizes, sizes, strict=True))}
    evaluator = Evaluator(symbols, dict(zip(spec.captures, captures, strict=True)), dtype=torch.float32, device=captures[0].device)
    places = list(zip(loads_that_learn(from_text(spec.score), spec.learned), values, strict=True))
    if rows is not None:
        assert spec.sink is not None
        sink = from_text(spec.sink)
        for load in loads_that_learn(sink, spec.learned):
            places.append((load, rows[..., None] * evaluator.tensor(slope(sink, load), torch.float32)))
    tensors = zip(spec.learned, learned_captures(spec, captures), strict=True)
    return [gradient(x, [place for place in places if place[0].tensor == name], evaluator) for name, x in tensors]


LIBRARY.impl("attention", _cpu, "CPU")
LIBRARY.impl("attention_backward", reference_backward, "CPU")


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, captures, sizes, spec, _layout = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *captures)
    ctx.sizes, ctx.spec = sizes, spec
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *captures = ctx.saved_tensors
    no_sizes: list[Any] | None = None if ctx.sizes else []  # autograd takes an empty list for a list of tensors
    if grad is None and grad_lse is None:
        return None, None, None, [None] * len(captures), no_sizes, None, None
    grad = torch.zeros_like(out) if grad is None else grad
    dq, dk, dv, learned = torch.ops.effcompile.attention_backward(
        grad, q, k, v, out, lse, captures, ctx.sizes, ctx.spec, grad_lse
    )  # fmt: skip
    spec = AttentionSpec.from_json(ctx.spec)
    captured = dict.fromkeys(spec.captures) | dict(zip(spec.learned, learned, strict=True))
    return dq, dk, dv, list(captured.values()), no_sizes, None, None


torch.library.register_autograd("effcompile::attention", _differentiate, setup_context=_save, lib=LIBRARY)
