"""Attention as one operation: specification and plain-PyTorch reference.

    O[b,h,i,:] = sum_j P[b,h,i,j] V[b,h//g,j,:],    P = softmax_j(score(s) where mask),    s = Q[b,h,i,:] . K[b,h//g,j,:]

`score` and `mask` are index expressions (see `effcompile.terms`) over `s`, the indices `b`, `h`, `i`, `j`, loads from captured
tensors and integer sizes. Nothing else is known of them: causality, windows, documents, biases and soft-caps are all expressions.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

Empty = Literal["impossible", "nan", "zero", "mean"]
Precision = Literal["ieee", "tf32"]

SPEC_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The meaning of one attention, without its tensors.

    Attributes:
        score: the logit, in natural units, of `s`, `b`, `h`, `i`, `j`; the scale stands in it.
        mask: the condition under which key `j` takes part for query `i`.
        empty: what a row without any key yields: it cannot occur (proved), NaN (softmax of -inf), zeros (SDPA's safe softmax),
            or the mean of all values (softmax of equal finite logits).
        sink: a further logit of `b`, `h`, `i` that takes its share of the softmax and has no value (attention sinks).
        captures: names of the captured tensors, in the order in which they are passed.
        sizes: names of the integers that the expressions mention, in the order in which they are passed.
        precision: how float32 operands are multiplied.
    """

    score: str = "s"
    mask: str = "True"
    empty: Empty = "impossible"
    sink: str | None = None
    captures: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    precision: Precision = "ieee"
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
        return cls(**{**fields, "captures": tuple(fields["captures"]), "sizes": tuple(fields["sizes"])})
