"""Which kernels of `hopper_kernels` serve a problem, with which tiles and rings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops.attention import AttentionSpec

COPY_BYTES = 16  # what the tensor memory accelerator wants addresses and strides to be multiples of


@dataclass(frozen=True, kw_only=True)
class Rings:
    """Tile of queries by tile of keys, and the slots of the two rings that a program keeps filled.

    `slots`: of keys and of values (forward, dQ); of queries and of output gradients (dK, dV).
    """

    block_m: int
    block_n: int
    slots: tuple[int, int]

    def options(self) -> dict[str, int]:
        """As keyword arguments of a kernel launch."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "SLOTS_A": self.slots[0], "SLOTS_B": self.slots[1]}


def copies(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensor memory accelerator can copy tiles of all of them: dense rows, nothing expanded, addresses and strides of
    whole 16 bytes."""
    return all(_copies(tensor) for tensor in tensors)


def _copies(tensor: Tensor) -> bool:
    size = tensor.element_size()
    if tensor.stride(-1) != 1 or tensor.numel() == 0:
        return False
    strides = tensor.stride()[:-1]
    return all(stride > 0 and stride * size % COPY_BYTES == 0 for stride in strides) and _address(tensor) % COPY_BYTES == 0


def _address(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.data_ptr()


def serves(spec: AttentionSpec) -> bool:
    """Whether these kernels are written for a specification: weights of a softmax, none of them dropped."""
    return not spec.dropout and spec.normaliser == "softmax"


def takes(dtype: torch.dtype, arch: str) -> bool:
    """Whether these kernels are built for a dtype on an architecture."""
    return arch == "sm_90" and dtype in (torch.bfloat16, torch.float16)


# By padded head dimension. All fit 227 KB of shared memory without spilling: tests/test_aot.py.
_FORWARD = {
    64: Rings(block_m=128, block_n=128, slots=(3, 3)),
    128: Rings(block_m=128, block_n=128, slots=(3, 3)),
    256: Rings(block_m=128, block_n=64, slots=(2, 2)),
}
_DQ = {
    64: Rings(block_m=128, block_n=128, slots=(3, 3)),
    128: Rings(block_m=128, block_n=128, slots=(2, 2)),
    256: Rings(block_m=128, block_n=32, slots=(4, 2)),
}
_DKV = {
    64: Rings(block_m=64, block_n=128, slots=(4, 4)),
    128: Rings(block_m=64, block_n=128, slots=(3, 3)),
    256: Rings(block_m=32, block_n=128, slots=(3, 2)),
}
_SHORT_VALUES = {  # keys of 256, values of at most 128
    "dq": Rings(block_m=128, block_n=64, slots=(2, 2)),
    "dkv": Rings(block_m=64, block_n=128, slots=(2, 2)),
}
# Masks over loaded integers, and derivatives that vary over a tile, take registers of their own. None: no tile is small enough.
_CROWDED: dict[str, dict[int, Rings | None]] = {
    "forward": {256: Rings(block_m=128, block_n=32, slots=(4, 4))},
    "dq": {128: Rings(block_m=128, block_n=64, slots=(4, 4)), 256: None},
    "dkv": {256: None},
}
_SLOPED: dict[str, dict[int, Rings | None]] = {"dkv": {128: Rings(block_m=32, block_n=128, slots=(6, 6))}}


def rings(d_qk: int, d_v: int, *, crowded: bool, sloped: bool) -> dict[str, Rings]:
    """The rings of each kernel that is worth taking: "forward", "dq", "dkv".

    Args:
        d_qk, d_v: the padded head dimensions of keys and of values.
        crowded: whether the mask compares loaded integers.
        sloped: whether the derivative of the score varies over a tile.
    """
    width = max(64, d_qk, d_v)
    found: dict[str, Rings | None] = {"forward": _FORWARD[width], "dq": _DQ[width], "dkv": _DKV[width]}
    if d_v < width and not sloped and not crowded:
        found |= _SHORT_VALUES if width == 256 else {}
    for name in found:
        if sloped:
            found[name] = _SLOPED.get(name, {}).get(width, found[name])
        if crowded:
            found[name] = _CROWDED.get(name, {}).get(width, found[name])
    return {name: chosen for name, chosen in found.items() if chosen is not None}


def neighbours(rings: Rings, *, by_key: bool = False) -> list[Rings]:
    """Others worth timing. `by_key`: the tile of keys stays, as dK and dV have it; it is 128, 64 for each group of warps."""
    first, second = rings.slots
    fewer = replace(rings, slots=(max(1, first - 1), max(1, second - 1)))
    return [fewer, replace(rings, slots=(first + 1, second + 1)), _other_tile(rings, by_key=by_key)]


def _other_tile(rings: Rings, *, by_key: bool) -> Rings:
    """Half of the moving tile in twice the slots, or twice a small tile of queries in half of them."""
    first, second = rings.slots
    halves = (2 * first, 2 * second)
    if by_key:
        smaller = replace(rings, block_m=rings.block_m // 2, slots=halves)
        larger = replace(rings, block_m=2 * rings.block_m, slots=(max(1, first // 2), max(1, second // 2)))
        return smaller if rings.block_m > 32 else larger
    return replace(rings, block_n=rings.block_n // 2, slots=halves) if rings.block_n == 128 else rings
