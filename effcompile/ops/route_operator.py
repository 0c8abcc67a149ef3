"""The router behind its logits as one operator, `effcompile::route`, with its gradient.

    weights, ids = torch.ops.effcompile.route(logits, bias, spec)

as `effcompile.ops.route` defines them, without a capacity. The ids, and so the bias, have no gradient. For that of the logits only
logits and ids are kept: with u the scores of what was chosen, n their norm and g the gradient of the weights,

    du_s = scale (g_s / n - (sum_r g_r u_r) / n^2 dn/du_s),        dn/du_s = 1, or u_s / |u|, or 0 where n is clamped
    dl_e = p_e ([e = ids_s] du_s - sum_r u_r du_r)  of a softmax,  [e = ids_s] u_s (1 - u_s) du_s  of a sigmoid
"""

from __future__ import annotations

from typing import Any

import torch

from .._torch import below_autograd
from .attention import LIBRARY
from .route import RouteSpec, check, route, weights_of

_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define("route(Tensor logits, Tensor? bias, str spec) -> (Tensor, Tensor)", tags=_TAGS)
LIBRARY.define("route_backward(Tensor grad, Tensor logits, Tensor ids, str spec) -> Tensor", tags=_TAGS)


def checked(logits: torch.Tensor, bias: torch.Tensor | None, spec: str) -> RouteSpec:
    """The specification behind a text, for operands that go with it.

    Raises:
        ValueError: they do not, or the specification has a capacity.
    """
    parsed = RouteSpec.from_json(spec)
    if parsed.capacity:
        raise ValueError(f"Expected a router without a capacity but got capacity={parsed.capacity!r}. Call ops.route.route.")
    check(logits, bias, parsed)
    return parsed


def reference(logits: torch.Tensor, bias: torch.Tensor | None, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`(weights [T, k], ids [T, k])` by the definition."""
    weights, ids = route(logits, bias, checked(logits, bias, spec))
    return weights.contiguous(), ids.contiguous()


def reference_backward(
    grad: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, spec: str, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The gradient of the logits, contiguous, by autograd through the definition."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        weights = weights_of(leaf, ids, RouteSpec.from_json(spec), dtype=dtype)
        (found,) = torch.autograd.grad(weights, leaf, grad.to(weights.dtype))
    return found.contiguous()


@torch.library.register_fake("effcompile::route", lib=LIBRARY)
def _fake(logits: Any, bias: Any, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    parsed = checked(logits, bias, spec)
    shape = (logits.shape[0], parsed.k)
    return logits.new_empty(shape, dtype=getattr(torch, parsed.weights)), logits.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("effcompile::route_backward", lib=LIBRARY)
def _fake_backward(grad: Any, logits: Any, ids: Any, spec: str) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class _Differentiable(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, bias: torch.Tensor | None, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.ops.effcompile.route(logits, bias, spec)
        ctx.save_for_backward(logits, ids)
        ctx.spec = spec
        ctx.mark_non_differentiable(ids)
        return weights, ids

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        return torch.ops.effcompile.route_backward(grad, *ctx.saved_tensors, ctx.spec), None, None


def _with_gradient(keys: Any, logits: torch.Tensor, bias: torch.Tensor | None, spec: str) -> Any:
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Differentiable.apply(logits, bias, spec)
    return below_autograd(torch.ops.effcompile.route.default, keys, logits, bias, spec)


LIBRARY.impl("route", _with_gradient, "Autograd", with_keyset=True)
