"""Time cut into blocks of chunks: what the parts of the ATen lowering of `effcompile::recurrence` share.

A block holds m chunks of C steps. Its tensors are [m, B, H, C, D] and contiguous, so that chunks, batch and heads are one batch of
matrices, and what does not depend on the state before it is one operation for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

LOG2_E = 1.4426950408889634
STRONGEST = 1000.0
"""A log decay whose exponential is 0 in float64."""


def chunk_length(dk: int, dv: int) -> int:
    """Steps a chunk: work inside a chunk grows with it, work on states shrinks."""
    return 64 if max(dk, dv) > 32 else 32


@dataclass(frozen=True, kw_only=True)
class Block:
    """The steps from `start` on, as `chunks` chunks of `length` steps; a block of one chunk may have fewer `rows` than that."""

    start: int
    chunks: int
    length: int
    rows: int


def blocks(steps: int, length: int, chunks: int, *, power_of_two: bool = False) -> Iterator[Block]:
    """`steps` as blocks of at most `chunks` chunks of `length`; the last may be one shorter chunk, filled up to a power of two."""
    whole = steps // length
    for first in range(0, whole, chunks):
        m = min(chunks, whole - first)
        yield Block(start=first * length, chunks=m, length=length, rows=m * length)
    if rest := steps % length:
        filled = 1 << (rest - 1).bit_length() if power_of_two else rest
        yield Block(start=whole * length, chunks=1, length=filled, rows=rest)


def window(x: torch.Tensor, block: Block) -> torch.Tensor:
    """A view of [B, H, T, D] as [m, B, H, C, D], in a block that is not full [1, B, H, rows, D]."""
    part = x[:, :, block.start : block.start + block.rows]
    if block.rows < block.length:
        return part.unsqueeze(0)
    return part.unflatten(2, (block.chunks, block.length)).permute(2, 0, 1, 3, 4)


def load(x: torch.Tensor, block: Block, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, T, D] as a new [m, B, H, C, D]; steps that do not exist are zero."""
    b, h, _, d = x.shape
    loaded = torch.empty((block.chunks, b, h, block.length, d), dtype=dtype, device=x.device)
    loaded[:, :, :, : block.rows].copy_(window(x, block))
    loaded[:, :, :, block.rows :] = 0
    return loaded


def load_logs(logs: torch.Tensor, block: Block) -> torch.Tensor:
    """Log decays [B, H, T|1, D] as [m|1, B, H, C, D] in float64; those of steps that do not exist are zero.

    float64 keeps the error of a difference of two sums small however strong the decays are, and exp(-1000) is 0 in it: no decay
    needs to be stronger, and none needs a special case.
    """
    if logs.shape[2] == 1:
        loaded = logs.expand(-1, -1, block.length, -1).unsqueeze(0).to(torch.float64, copy=True)
        loaded[:, :, :, block.rows if block.chunks == 1 else block.length :] = 0
    else:
        loaded = load(logs, block, torch.float64)
    return loaded.clamp_(-STRONGEST, STRONGEST)


def load_with_column(x: torch.Tensor, column: torch.Tensor | float, block: Block, dtype: torch.dtype) -> torch.Tensor:
    """As `load`, with one more column: a number, or [B, H, T]."""
    b, h, _, d = x.shape
    loaded = torch.zeros((block.chunks, b, h, block.length, d + 1), dtype=dtype, device=x.device)
    present = loaded[:, :, :, : block.rows]
    present[..., :d].copy_(window(x, block))
    if isinstance(column, torch.Tensor):
        present[..., d:].copy_(window(column.unsqueeze(-1), block))
    else:
        present[..., d] = column
    return loaded


def store(loaded: torch.Tensor, target: torch.Tensor, block: Block) -> None:
    """Write [m, B, H, C, D] to its steps of [B, H, T, D]."""
    window(target, block).copy_(loaded[:, :, :, : block.rows])


def later_sum(x: torch.Tensor, *, inclusive: bool) -> torch.Tensor:
    """Sums over the steps from t on, or after t, along the last dimension but one."""
    found = x.flip(-2).cumsum(-2).flip(-2)
    return found if inclusive else _shifted(found[..., 1:, :], found, first=0)


def earlier_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums over the steps before t, along the last dimension but one."""
    return _shifted(x[..., :-1, :].cumsum(-2), x, first=1)


def _shifted(part: torch.Tensor, like: torch.Tensor, *, first: int) -> torch.Tensor:
    shifted = torch.zeros_like(like)
    shifted[..., first : first + part.shape[-2], :] = part
    return shifted


def between(pairs: torch.Tensor, *, inclusive: bool) -> torch.Tensor:
    """For each step t the sum of pairs[i, j] over j < t <= i, or j < t < i: [..., C, 1]."""
    ones = torch.ones(pairs.shape[-1], pairs.shape[-1], dtype=pairs.dtype, device=pairs.device)
    sums = pairs.tril(-1) @ ones.triu(1)  # [i, t]: over j < t
    return sums.tril_(0 if inclusive else -1).sum(-2).unsqueeze(-1)
