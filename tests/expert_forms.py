"""Layers of experts as people write them: functions of tokens, a router and weights, each with what it must be read as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

T, D, N, E, K = 14, 12, 8, 5, 2
"""Tokens, their channels, columns of a gate, experts, slots of a token."""

SWIGLU: dict[str, Any] = {"activation": "gate * up * sigmoid(gate)", "gated": True, "biased": (False, False), "weighted": "output"}


@dataclass(frozen=True, kw_only=True)
class Form:
    """A function that is a layer of experts, its inputs, and fields of its specification."""

    name: str
    f: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    fields: dict[str, Any] = field(default_factory=dict)


class Forms(list[Form]):
    """Forms under readable names, in the order in which they are written down."""

    def __call__(self, name: str, make: Callable[[], tuple[Any, ...]], **fields: Any) -> Callable[[Any], Any]:
        """Register a form with the fields that its specification must have."""

        def register(f: Callable[..., Any]) -> Callable[..., Any]:
            self.append(Form(name=name, f=f, make=make, fields=fields))
            return f

        return register


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Standard normal times `scale`, that requires a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).requires_grad_()


def linear(bias: bool = False) -> tuple[torch.Tensor, ...]:
    """Tokens, router, and weights as a Linear has them: [E, 2 N, D] and [E, D, N]; with biases, those at the end."""
    found = (normal(T, D), normal(E, D, seed=1), normal(E, 2 * N, D, seed=2, scale=D**-0.5), normal(E, D, N, seed=3, scale=N**-0.5))
    return (*found, normal(E, 2 * N, seed=4), normal(E, D, seed=5)) if bias else found


def stored(bias: bool = False) -> tuple[torch.Tensor, ...]:
    """Tokens, router, and weights as products take them: [E, D, 2 N] and [E, N, D]; with biases, those at the end."""
    x, router, up, down, *biases = linear(bias)
    return x, router, *(w.detach().mT.contiguous().requires_grad_() for w in (up, down)), *biases


def modules(bias: bool = False, gated: bool = True) -> tuple[torch.Tensor, ...]:
    """Tokens, router, then for each expert its gate, up and down weights; with biases, without a gate: up, bias, down, bias."""
    found = [normal(T, D), normal(E, D, seed=1)]
    for e in range(E):
        shapes: list[tuple[int, ...]] = [(N, D), (N, D), (D, N)] if gated else [(N, D), (N,), (D, N), (D,)]
        found += [normal(*shape, seed=10 * e + k, scale=shape[-1] ** -0.5) for k, shape in enumerate(shapes)]
    return tuple(found)


def route(x: torch.Tensor, router: torch.Tensor, k: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids [T, k]: the largest of the probabilities, brought to a sum of 1."""
    weights, ids = torch.topk((x @ router.mT).softmax(-1), k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """[..., 2 N] to [..., N], the gate first."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def dense_of(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The weights of all experts [T, E], zero for those not chosen."""
    return torch.zeros(weights.shape[0], E, dtype=weights.dtype).scatter(1, ids, weights)


def grouped(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Each group of rows times its matrix [E, r, c], in bfloat16."""
    if rows.dtype == torch.float64:
        ends = offsets.tolist()
        return torch.cat([rows[a:b] @ w for a, b, w in zip([0, *ends], ends, matrices, strict=False)])
    return torch.ops.aten._grouped_mm(rows.bfloat16(), matrices.bfloat16(), offsets)


def narrow() -> tuple[torch.Tensor, ...]:
    """As `linear`, in bfloat16, with rows of a multiple of 16 bytes."""
    d, n = 16, 8
    shapes = ((T, d), (E, d), (E, 2 * n, d), (E, d, n))
    return tuple(
        normal(*shape, seed=k, scale=shape[-1] ** -0.5).detach().bfloat16().requires_grad_() for k, shape in enumerate(shapes)
    )
