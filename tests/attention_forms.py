"""What tests of recognised attention are written in: inputs, pieces of attentions, and a register of spellings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.vocabulary import TARGETS, Compiled, assert_all_rewritten, assert_within_contract

B, H, HK, T, D = 2, 6, 3, 10, 8
SCALE = D**-0.5
SCALED = f"{SCALE!r} * s"
LOWEST = torch.finfo(torch.float32).min


def lowest(x: torch.Tensor) -> float:
    return torch.finfo(x.dtype).min


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)
    return x.requires_grad_(grad)


def bhtd(heads: int = H, kv_heads: int | None = None, queries: int = T, keys: int = T, **options: Any) -> tuple[torch.Tensor, ...]:
    """q, k, v as [batch, heads, length, depth]."""
    kv = heads if kv_heads is None else kv_heads
    return (
        normal(B, heads, queries, D, **options),
        normal(B, kv, keys, D, seed=1, **options),
        normal(B, kv, keys, D, seed=2, **options),
    )


def bthd(heads: int = H, kv_heads: int | None = None) -> tuple[torch.Tensor, ...]:
    """q, k, v as [batch, length, heads, depth]."""
    return tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in bhtd(heads, kv_heads))


@dataclass(frozen=True)
class Spelling:
    """A function that is attention, its inputs, and what it must be read as."""

    name: str
    f: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    fields: dict[str, Any] = field(default_factory=dict)
    untrained: tuple[str, ...] = ()


FLASH_ON_CPU = ("cpu",)  # its backward takes the weights of a row of very negative finite logits for 1


class Spellings(list[Spelling]):
    """Spellings under readable names, in the order in which they are written down."""

    def __call__(
        self, name: str, make: Callable[[], tuple[Any, ...]] = bhtd, untrained: tuple[str, ...] = (), **fields: Any
    ) -> Callable[[Any], Any]:
        """Register a spelling with the fields that its specification must have.

        Gradients are not compared on the targets in `untrained`.
        """

        def register(f: Callable[..., Any]) -> Callable[..., Any]:
            self.append(Spelling(name, f, make, fields, untrained))
            return f

        return register


def assert_read_as_written(case: Spelling) -> None:
    """The spelling is rewritten into the specification that it was registered with, and is as good as eager on every target."""
    trained = tuple(target for target in TARGETS if target not in case.untrained)
    if trained:
        compiled = assert_within_contract(Compiled(case.f, trained), *case.make())
        assert_all_rewritten(compiled, **case.fields)
    if case.untrained:
        assert_within_contract(Compiled(case.f, case.untrained), *case.make(), grad=False)


PLAIN: dict[str, Any] = {"score": SCALED, "mask": "True", "empty": "impossible", "sink": None}
CAUSAL: dict[str, Any] = {**PLAIN, "mask": "j <= i"}


def grouped() -> tuple[torch.Tensor, ...]:
    return bhtd(H, HK)


def positions(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[-2], device=x.device)


def attend(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1) @ v


def scores_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2) * SCALE


def causal_of(q: torch.Tensor) -> torch.Tensor:
    return torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril()


def with_padding() -> tuple[Any, ...]:
    """The last two keys of the second row are padding."""
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[1, -2:] = False
    return *bhtd(), keep


PADDED: dict[str, Any] = {"score": SCALED, "mask": "bool(t0.b[b, j])"}
