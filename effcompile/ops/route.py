"""Which experts each token of a Mixture of Experts goes to, and with what weights: specification and plain-PyTorch reference.

Of the logits l [T, E] of each token, the scores are p = score(l), or with `score_after` p = l until the choice is made:

    c = p + bias                                               what is chosen by; without a bias, p
    of `groups` groups of E / groups experts, the `kept_groups` with the greatest stat(c); elsewhere c = fill
    ids = topk(c, k)                                           in descending order of c, the first of equal ones first
    w = p[ids],  or with `score_after` score(l[ids])
    w = scale * w / (norm_p(w) + eps),  or scale * w / max(norm_p(w), eps),  or without a norm scale * w

NaN counts as the greatest value. Of groups with equal stat the first are kept. `aten.topk` leaves the order among equals open.

With a `capacity` an expert takes the first so many assignments of each span of tokens, all first choices before all second ones;
others get the id -1, which `effcompile.ops.experts` drops, and the weight 0.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import torch

Score = Literal["softmax", "sigmoid", "none"]
GroupStat = Literal["max", "top2"]
GroupFill = Literal["zero", "-inf"]

SPEC_VERSION = 1
DROPPED = -1
"""The id of an assignment that its expert has no room for."""
_LEGAL: dict[str, tuple[Any, ...]] = {
    "score": ("softmax", "sigmoid", "none"),
    "group_stat": ("max", "top2"),
    "group_fill": ("zero", "-inf"),
    "norm": (0, 1, 2),
}


@dataclass(frozen=True, kw_only=True)
class RouteSpec:
    """The meaning of one router behind its logits, without its tensors.

    Attributes:
        k: how many experts a token goes to.
        score: the function of the logits that weighs, over all experts or, with `score_after`, over those that were chosen.
        score_after: the experts are chosen by the logits, and only what was chosen is scored.
        select_bias: a bias [E] is added for the choice alone.
        groups: into how many groups of neighbours the experts are divided.
        kept_groups: how many of them a token may choose from.
        group_stat: the greatest c of a group, or the sum of the two greatest.
        group_fill: what the c of the other groups' experts becomes.
        norm: the p of the norm that divides the weights of a token; 0 for none.
        eps: is added to that norm.
        clamp: `eps` is the least value of the norm instead.
        scale: a factor of all weights.
        capacity: how many assignments an expert takes of each span; 0 for any number.
        span: how many consecutive tokens share that capacity; 0 for all.
        logits_dtype: dtype that the logits are cast to first, and that everything is computed in.
        weights: dtype of the weights.
    """

    k: int
    score: Score = "softmax"
    score_after: bool = False
    select_bias: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_stat: GroupStat = "max"
    group_fill: GroupFill = "-inf"
    norm: int = 0
    eps: float = 0.0
    clamp: bool = False
    scale: float = 1.0
    capacity: int = 0
    span: int = 0
    logits_dtype: str = "float32"
    weights: str = "float32"
    version: int = SPEC_VERSION

    def __post_init__(self) -> None:
        for name, legal in _LEGAL.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"Expected {name} to be one of {legal} but got {name}={getattr(self, name)!r}")
        for name in ("logits_dtype", "weights"):
            if not isinstance(getattr(torch, getattr(self, name), None), torch.dtype):
                raise ValueError(f"Expected {name} to name a dtype but got {name}={getattr(self, name)!r}")
        for told, holds in self._needs():
            if not holds:
                raise ValueError(f"Expected another specification: {told}, but got {self!r}")

    def _needs(self) -> list[tuple[str, bool]]:
        return [
            ("a token goes to one expert at least", self.k >= 1),
            ("of the groups, one at least is kept", 1 <= self.kept_groups <= self.groups),
            ("a norm is for weights that are not negative, a softmax's or sigmoid's", not self.norm or self.score != "none"),
            ("eps is part of a norm, and not negative", self.eps >= 0 and (bool(self.norm) or not (self.eps or self.clamp))),
            ("capacity and span are not negative", self.capacity >= 0 and self.span >= 0),
            ("a span is for a capacity", bool(self.capacity) or not self.span),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON-ready values."""
        return asdict(self)

    def to_json(self) -> str:
        """One line of JSON, the same for equal specifications."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    @cache
    def from_json(text: str) -> RouteSpec:
        """Read what `to_json` wrote."""
        return RouteSpec(**json.loads(text))


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, spec: RouteSpec, *, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain PyTorch.

    Args:
        logits: [T, E].
        bias: [E], if `spec.select_bias`.
        dtype: to compute in, instead of the specification's.

    Returns:
        The weights [T, k], in the dtype of the specification (in `dtype`, if given), and the ids [T, k], int64. The weights are
        differentiable.

    Raises:
        ValueError: operands that do not go with the specification.
    """
    check(logits, bias, spec)
    values = logits.to(dtype or getattr(torch, spec.logits_dtype))
    scores = values if spec.score_after else _score(values, spec.score)
    choice = scores.detach() if bias is None else scores.detach() + bias.detach().to(scores.dtype)
    ids = _greatest(_within_groups(choice, spec), spec.k)
    weights = _weighed(scores.gather(-1, ids), spec)
    if spec.capacity:
        fits = _fitting(ids, logits.shape[-1], spec)
        weights, ids = torch.where(fits, weights, 0.0), torch.where(fits, ids, DROPPED)
    return weights.to(dtype or getattr(torch, spec.weights)), ids


def weights_of(logits: torch.Tensor, ids: torch.Tensor, spec: RouteSpec, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weights [T, k] of experts that have been chosen, without a capacity; in the dtype of the computation."""
    values = logits.to(dtype or getattr(torch, spec.logits_dtype))
    scores = values if spec.score_after else _score(values, spec.score)
    return _weighed(scores.gather(-1, ids), spec)


def _weighed(weights: torch.Tensor, spec: RouteSpec) -> torch.Tensor:
    """What was gathered, scored if that was not done before, divided by its norm and scaled."""
    weights = _score(weights, spec.score) if spec.score_after else weights
    if spec.norm:
        total = weights.sum(-1, keepdim=True) if spec.norm == 1 else weights.norm(p=2, dim=-1, keepdim=True)
        weights = weights / (total.clamp(min=spec.eps) if spec.clamp else total + spec.eps)
    return weights * spec.scale


def _greatest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the greatest values of each row are, the first of equal ones first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _score(values: torch.Tensor, score: Score) -> torch.Tensor:
    if score == "none":
        return values
    return values.softmax(-1) if score == "softmax" else values.sigmoid()


def _within_groups(choice: torch.Tensor, spec: RouteSpec) -> torch.Tensor:
    """`choice`, with the fill outside the kept groups."""
    if spec.groups == spec.kept_groups:
        return choice
    grouped = choice.unflatten(-1, (spec.groups, -1))  # [T, groups, E / groups]
    stat = grouped.amax(-1) if spec.group_stat == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(stat, dtype=torch.bool).scatter_(-1, _greatest(stat, spec.kept_groups), True)
    return grouped.masked_fill(~kept[..., None], 0.0 if spec.group_fill == "zero" else float("-inf")).flatten(-2)


def _fitting(ids: torch.Tensor, experts: int, spec: RouteSpec) -> torch.Tensor:
    """[T, k], whether an assignment is among the first `capacity` of its expert and span."""
    spans = torch.arange(ids.shape[0], device=ids.device) // (spec.span or max(1, ids.shape[0]))
    place = (spans[:, None] * experts + ids).mT.reshape(-1)  # first choices first
    order = place.argsort(stable=True)
    ordered = place[order]
    rank = torch.arange(place.shape[0], device=ids.device) - torch.searchsorted(ordered, ordered)
    fits = torch.empty_like(place, dtype=torch.bool)
    fits[order] = rank < spec.capacity
    return fits.view(ids.shape[1], ids.shape[0]).mT


def check(logits: torch.Tensor, bias: torch.Tensor | None, spec: RouteSpec) -> None:
    """Refuse operands that do not go with the specification.

    Raises:
        ValueError: naming the operand, what it should be and what it is.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"Expected logits [T, E] of floats but got logits.shape={tuple(logits.shape)!r}, dtype={logits.dtype!r}")
    experts = logits.shape[-1]
    if (bias is not None) != spec.select_bias or (bias is not None and tuple(bias.shape) != (experts,)):
        wanted = f"a bias of shape ({experts},)" if spec.select_bias else "no bias, as select_bias is False,"
        raise ValueError(f"Expected {wanted} but got bias={None if bias is None else tuple(bias.shape)!r}")
    size, rest = experts // spec.groups, experts % spec.groups
    if rest or (spec.group_stat == "top2" and spec.kept_groups < spec.groups and size < 2):
        raise ValueError(f"Expected experts that divide into {spec.groups} groups, of two at least for top2, but got E={experts!r}")
    if spec.k > size * spec.kept_groups:
        raise ValueError(f"Expected k up to {size * spec.kept_groups}, the experts to choose from, but got k={spec.k!r}")
