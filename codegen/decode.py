"""Attention of few queries over many keys, on a GPU: the kernels of `decode_kernels`, their configuration and their launch.

    out, lse = forward(q, k, v, captures, sizes, spec)

q is [B, H, TQ, D] with TQ <= 16, k [B, H_KV, TK, D], v [B, H_KV, TK, D_V], each of any strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..errors import KernelError
from ..ops.attention import AttentionSpec
from . import attention, emit
from .attention import Launch, Layout, Problem

MAX_QUERIES = 16
MAX_DEPTH = 576


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles by their height, of which a launch takes the lowest that holds its rows.

    `resident`: programs that share a processor.
    """

    tiles: tuple[Launch, ...]
    resident: int = 2
    fast_tanh: bool = False


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these kernels are meant for such operands."""
    return q.shape[2] <= MAX_QUERIES and max(q.shape[3], v.shape[3]) <= MAX_DEPTH


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
    *,
    config: Config | None = None,
    splits: int | None = None,
    out_layout: Layout = "bhtd",
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: out [B, H, TQ, D_V] in v's dtype, dense in the order of `out_layout`; lse [B, H, TQ] float32, natural units,
    -inf for a row without keys.

    `splits`: into how many parts the keys are cut, each for a program of its own; chosen from the sizes if not given.
    """
    module = _module(spec, q.shape[-1], v.shape[-1], q.dtype, q.device, config, attention._directory)
    return module.forward(q, k, v, *captures, *sizes, splits=splits, out_layout=out_layout)


def source(spec: AttentionSpec, problem: Problem, *, config: Config | None = None) -> str:
    """The text of the kernel file for a specification and a problem."""
    config = config or default_config(spec, problem)
    return emit.decode_source(
        spec,
        d_qk=problem.d_qk,
        d_v=problem.d_v,
        dtype=str(problem.dtype).removeprefix("torch."),
        tiles=[tile.options() for tile in config.tiles],
        resident=config.resident,
        fast_tanh=config.fast_tanh,
    )


@lru_cache(maxsize=1024)
def _module(
    spec: AttentionSpec,
    d_qk: int,
    d_v: int,
    dtype: torch.dtype,
    device: torch.device,
    config: Config | None,
    directory: Path | None,
) -> ModuleType:
    problem = Problem(d_qk=d_qk, d_v=d_v, dtype=dtype, arch=attention.architecture(device))
    return emit.load_kernel(emit.write_kernel(source(spec, problem, config=config), directory, family="decode"))


# --------------------------------------------------------------------------------------------------------------- configurations


@dataclass(frozen=True)
class _Chip:
    """What decides about tiles: shared memory of a processor in KB, the keys and values in KB that one load should bring, how many
    such loads the shared memory should hold, and the rows from which on the matrix units take keys straight from there.
    """

    shared_kb: float
    load_kb: int
    least: int = 2
    most: int = 3
    wide_mma: int = 1024


_SM_90 = _Chip(227, 32, wide_mma=64)
_SM_80 = _Chip(163, 16)
_SMALL = _Chip(99, 16)  # sm_86, sm_89, sm_120
_AMD = _Chip(64, 16, least=1, most=1)
_HEIGHTS = (16, 32, 64, 128)
_ROW_ELEMENTS = 64 * 256  # of the sum of values, which 8 warps hold without spilling


def default_config(spec: AttentionSpec, problem: Problem) -> Config:
    """The configuration for a problem, by a fixed rule: two programs share a processor, each with two or three loads in flight.

    Raises:
        KernelError: head dimensions beyond MAX_DEPTH.
    """
    if max(problem.d_qk, problem.d_v) > MAX_DEPTH:
        raise KernelError(f"Expected head dimensions up to {MAX_DEPTH} but got d_qk={problem.d_qk!r}, d_v={problem.d_v!r}.")
    chip = _chip(problem.arch)
    heights = [m for m in _HEIGHTS if m * _padded(problem.d_v) <= _ROW_ELEMENTS and _room(m, 16, problem, chip) >= chip.least]
    tiles = tuple(_tile(m, problem, chip) for m in heights or _HEIGHTS[:1])
    return Config(tiles=tiles, fast_tanh=attention.takes_fast_tanh(spec, problem))


def _tile(block_m: int, problem: Problem, chip: _Chip) -> Launch:
    """Registers bound the scores, to 32 or 16 a thread; shared memory bounds what is in flight."""
    width = _padded(problem.d_v)
    num_warps = 4 if block_m * width < 64 * 128 or (block_m < 64 and width <= 256) else 8
    scores = (32 if block_m < 64 else 16) * 32 * num_warps
    block_n = min(128, scores // block_m, max(32, _power(chip.load_kb * 1024 // _key_bytes(problem))))
    while block_n > 16 and _room(block_m, block_n, problem, chip) < chip.least:
        block_n //= 2
    half = _room(block_m, block_n, problem, replace(chip, shared_kb=chip.shared_kb / 2))
    buffers = min(max(half, chip.least), _room(block_m, block_n, problem, chip), chip.most)
    return Launch(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=max(buffers, 1) + (block_m < chip.wide_mma))


def _room(block_m: int, block_n: int, problem: Problem, chip: _Chip) -> int:
    """How many tiles of keys and values the shared memory holds beside the queries and the weights."""
    weights = 0 if block_m >= chip.wide_mma else block_n
    others = block_m * (problem.d_qk + weights) * problem.dtype.itemsize
    return int(chip.shared_kb * 1024 - others) // (block_n * _key_bytes(problem))


def _key_bytes(problem: Problem) -> int:
    return (problem.d_qk + problem.d_v) * problem.dtype.itemsize


def _padded(width: int) -> int:
    return 2 * _power(max(width, 16) - 1)


def _power(n: int) -> int:
    """The largest power of two up to n, 1 for less than one."""
    return 1 << max(n.bit_length() - 1, 0)


def _chip(arch: str) -> _Chip:
    if arch.startswith("gfx"):
        return _AMD
    if arch in ("sm_90", "sm_100", "sm_103"):
        return _SM_90
    return _SM_80 if arch == "sm_80" else _SMALL
