"""Which weights of an attention survive a dropout: Philox-4x32-10, as the generated kernels compute it, in plain PyTorch.

    kept[b, h, i, j]  =  the upper 31 bits of philox(seed, (j, i, h, b))  >=  p * 2^31

Nothing is stored: forward and backward compute the same numbers from the seed. Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011.
"""

from __future__ import annotations

import torch


def dropout_limit(p: float) -> int:
    """The least 31-bit number that is kept."""
    return round(p * 2**31)


MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEYS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def product(factor: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower half of the product of two 32-bit numbers, the second an int64."""
    low, high = factor * (x & 0xFFFF), factor * (x >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & WORD


def philox(seed: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The first 32 bits, as int64, for an int64 seed and four counters that broadcast."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(10):
        (high, lower), (other, least) = product(MULTIPLIERS[0], c0), product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = other ^ c1 ^ k0, least, high ^ c3 ^ k1, lower
        k0, k1 = (k0 + KEYS[0]) & WORD, (k1 + KEYS[1]) & WORD
    return c0


def dropout_keeps(
    seed: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor, p: float
) -> torch.Tensor:  # fmt: skip
    """Whether each weight is kept; b, h, i, j are int64 tensors that broadcast."""
    return (philox(seed.to(torch.int64), (j, i, h, b)) >> 1) >= dropout_limit(p)
