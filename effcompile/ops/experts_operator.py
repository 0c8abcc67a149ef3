"""The experts of a Mixture of Experts as operators of PyTorch: schemas, shapes of results, and the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._torch import below_autograd
from .attention import LIBRARY
from .experts import ExpertsSpec, Tensors, check, each_operand, width

_TAGS = (torch.Tag.pt2_compliant_tag,)
_OPERANDS = "Tensor x, Tensor ids, Tensor weights, Tensor[] up, Tensor[] down, Tensor[] biases"
LIBRARY.define(f"experts({_OPERANDS}, str spec) -> Tensor", tags=_TAGS)
LIBRARY.define(f"experts_forward({_OPERANDS}, str spec) -> (Tensor, Tensor)", tags=_TAGS)
LIBRARY.define(f"experts_backward(Tensor grad, {_OPERANDS}, Tensor h, str spec, bool[] wanted) -> Tensor[]", tags=_TAGS)


@torch.library.register_fake("effcompile::experts", lib=LIBRARY)
def _fake(x: Any, ids: Any, weights: Any, up: Any, down: Any, biases: Any, spec: str) -> torch.Tensor:
    parsed = ExpertsSpec.from_json(spec)
    check(x, ids, weights, up, down, biases, parsed)
    out: torch.Tensor = x.new_empty((x.shape[0], down[0].shape[-1]), dtype=parsed.out_dtype)
    return out


@torch.library.register_fake("effcompile::experts_forward", lib=LIBRARY)
def _fake_forward(x: Any, ids: Any, weights: Any, up: Any, down: Any, biases: Any, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    h = x.new_empty((ids.shape[0] * ids.shape[1], width(up, ExpertsSpec.from_json(spec))))
    return _fake(x, ids, weights, up, down, biases, spec), h


@torch.library.register_fake("effcompile::experts_backward", lib=LIBRARY)
def _fake_backward(
    grad: Any, x: Any, ids: Any, weights: Any, up: Any, down: Any, biases: Any, h: Any, spec: str, wanted: Any
) -> list[torch.Tensor]:
    operands = each_operand(x, weights, up, down, biases, wanted)
    return [torch.empty_like(tensor) if want else tensor.new_empty(0) for tensor, want in operands]


class _Differentiable(torch.autograd.Function):
    """The operator with its gradient.

    `torch.library.register_autograd` would do, but takes lists of tensors apart and together again at each call.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: str, counts: tuple[int, int], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        lists = _lists(tensors, counts)
        out, h = torch.ops.effcompile.experts_forward(x, ids, weights, *lists, spec)
        ctx.save_for_backward(x, ids, weights, h, *tensors)
        ctx.spec, ctx.counts = spec, counts
        result: torch.Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, ids, weights, h, *tensors = ctx.saved_tensors
        _, _, for_x, _, for_weights, *needed = ctx.needs_input_grad
        lists = _lists(tensors, ctx.counts)
        weighted = for_weights and ExpertsSpec.from_json(ctx.spec).weighted != "none"
        wanted = [for_x, weighted, *(any(group) for group in _lists(needed, ctx.counts))]
        found = torch.ops.effcompile.experts_backward(grad, x, ids, weights, *lists, h, ctx.spec, wanted)
        given = [dx if need else None for dx, need in zip(found, (for_x, weighted, *needed), strict=True)]
        return None, None, given[0], None, *given[1:]


def _lists(tensors: Sequence[Any], counts: tuple[int, int]) -> tuple[list[Any], list[Any], list[Any]]:
    """up, down and biases, that were passed one after the other."""
    ups, downs = counts
    return list(tensors[:ups]), list(tensors[ups : ups + downs]), list(tensors[ups + downs :])


def _with_gradient(
    keys: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Tensors, down: Tensors, biases: Tensors, spec: str
) -> Any:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weights, *up, *down, *biases)):
        return _Differentiable.apply(spec, (len(up), len(down)), x, ids, weights, *up, *down, *biases)
    return below_autograd(torch.ops.effcompile.experts.default, keys, x, ids, weights, up, down, biases, spec)


LIBRARY.impl("experts", _with_gradient, "Autograd", with_keyset=True)
