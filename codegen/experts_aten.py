"""`effcompile::experts` on a CPU, and what any device falls back to: with ATen's products.

Assignments are sorted by expert, so that each expert has a segment of rows; what the experts give is gathered back, token by
token, without atomic additions. For the rows x of all assignments:

    H = x U + b1        y = act(H) D + b2        out_t = sum of w y over the rows of token t
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from effcompile.ops.experts import ExpertsSpec, Tensors, expert_count, split_biases, width

from .experts_activation import activate
from .experts_segments import Assignments, Bank, assign, banks, segments


@dataclass(frozen=True)
class Layer:
    """Weights and biases, or their gradients, as banks: of the first projection one, or gate and up."""

    up: list[Bank]
    down: Bank
    up_bias: list[Bank]
    down_bias: Bank | None

    @classmethod
    def of(cls, up: Tensors, down: Tensors, biases: Tensors, experts: int, spec: ExpertsSpec) -> Layer:
        first, second = split_biases(biases, experts, spec)
        parts = 2 if spec.is_pair else 1
        return cls(
            banks(up, parts, spec),
            banks(down, 1, spec)[0],
            banks(first, parts, spec) if first else [],
            banks(second, 1, spec)[0] if second else None,
        )


def forward(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Tensors, down: Tensors, biases: Tensors, spec: ExpertsSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [T, d_out] and the pre-activation H [T k, F], as `ops.experts.reference` defines them, H in the dtype of x."""
    h = x.new_empty((ids.numel(), width(up, spec)))
    if not ids.numel():
        return x.new_zeros((x.shape[0], down[0].shape[-1]), dtype=spec.out_dtype), h
    experts = expert_count(down, spec)
    layer, assigned = Layer.of(up, down, biases, experts, spec), assign(ids, experts)
    way, own = segments(assigned, *layer.up, layer.down), h[: assigned.kept]
    rows = gather_rows(x, weights, assigned, spec)
    for at, (bank, columns) in enumerate(zip(layer.up, own.chunk(len(layer.up), dim=1), strict=True)):
        way.product(rows, bank, layer.up_bias[at] if layer.up_bias else None, columns)
    y = x.new_empty((assigned.kept + 1, down[0].shape[-1]))
    way.product(activate(own, spec), layer.down, layer.down_bias, y[:-1])
    return combine(y, weights if spec.weighted == "output" else None, assigned, spec.out_dtype), h


def gather_rows(x: torch.Tensor, weights: torch.Tensor, assigned: Assignments, spec: ExpertsSpec) -> torch.Tensor:
    """What each row's expert gets: [kept, d]."""
    rows = x[assigned.token]
    return (rows * row_weights(weights, assigned)[:, None]).to(rows.dtype) if spec.weighted == "input" else rows


def row_weights(weights: torch.Tensor, assigned: Assignments) -> torch.Tensor:
    """The weight of each row, [kept], in float32 at least."""
    return weights.reshape(-1)[assigned.order].to(torch.promote_types(weights.dtype, torch.float32))


def combine(y: torch.Tensor, weights: torch.Tensor | None, assigned: Assignments, dtype: torch.dtype) -> torch.Tensor:
    """The weighted sum [T, d_out] of each token's rows. `y` has one row more than `kept`, which is made zero: for dropped ones.

    Sums are taken in float32 at least, in a fixed order.
    """
    if not assigned.all_kept:
        y[-1].zero_()
        weights = None if weights is None else torch.where(assigned.row < assigned.kept, weights, 0.0)
    if not y.dtype == dtype == (y.dtype if weights is None else weights.dtype):
        wide = torch.promote_types(torch.promote_types(y.dtype, dtype), torch.float32)
        y, weights = y.to(wide), None if weights is None else weights.to(wide)
    return F.embedding_bag(assigned.row, y, per_sample_weights=weights, mode="sum").to(dtype)
