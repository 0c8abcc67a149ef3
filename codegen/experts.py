"""Layers of experts of any specification, forward and backward, on a GPU: chooses kernels and their configuration, launches them.

    out, h = forward(x, ids, weights, up, down, biases, spec, keep=True)
    gradients = backward(grad, x, ids, weights, up, down, biases, h, spec, wanted)

with operands and results as `ops.experts` says. Assignments are sorted by expert on the device, and each expert's rows go through
its weights in tiles of BLOCK_M rows, as many as the host knows to be enough: T k / BLOCK_M and one more for each expert. Nothing is
read back. Few assignments are not sorted at all (`experts_few_kernels`).

What bounds them: with r = T k / E rows for an expert, weights of 2 bytes are used in 2 r operations each, so that below some 260
rows (790 TFLOP/s at 3 TB/s) memory is the limit, and a tile's size is no matter but for what is wasted beyond r rows; above, a tile
of 128 rows by 256 columns (gate and up, 128 each) keeps eight warps busy with 128 sums a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from effcompile.ops.experts import ExpertsSpec, Tensors, check, each_operand, expert_count, split_biases, width

from ..errors import KernelError
from . import attention, emit
from .attention import DTYPES, Arch
from .experts_source import Settings
from .experts_source import source as source_text
from .experts_trial import tried

_LIMIT = 2**31
"""Offsets within one expert's weights are 32-bit integers."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A tile [block_m, block_n] of a product, block_k of what it sums at a time, and how one program runs.

    `group`: tiles of rows that take a column of tiles before the next one.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8

    def options(self) -> dict[str, int]:
        """As constants of a kernel launch."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP": self.group,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The products of one height of tiles: the first projection (gate and up of block_n columns each), products whose results are
    scattered (second projection, gradient of x), and the gradient of the pre-activation."""

    first: Launch
    rows: Launch
    slopes: Launch

    def options(self) -> dict[str, dict[str, int]]:
        return {"FIRST": self.first.options(), "ROWS": self.rows.options(), "SLOPES": self.slopes.options()}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles by rising height, the gradients of weights, and columns and depth of few assignments' products: of weights that are
    dense along what is summed, and across."""

    tiles: tuple[Tile, ...]
    outer: Launch
    along: tuple[int, int] = (16, 256)
    across: tuple[int, int] = (64, 32)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a configuration depends on, beside the specification: never a size."""

    dtype: torch.dtype
    arch: Arch


def forward(
    x: Tensor, ids: Tensor, weights: Tensor, up: Tensors, down: Tensors, biases: Tensors, spec: ExpertsSpec,
    *, keep: bool = True, config: Config | None = None, tile: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result [T, d_out] and the pre-activation H [T k, F], as `ops.experts.reference` defines them; H is empty unless `keep`.

    `tile`: which of the configuration's, chosen if not given.

    Raises:
        KernelError: shapes or dtypes that the kernels do not take, or a kernel that disagrees with the reference on this machine.
        ValueError: operands that do not go together.
    """
    _check(x, ids, weights, up, down, biases, spec)
    out = x.new_empty((x.shape[0], down[0].shape[-1]), dtype=spec.out_dtype)
    h = x.new_empty((ids.numel(), width(up, spec))) if keep else x.new_empty(0)
    if _is_empty(x, ids, down):
        return _without_rows(out, ids, down, biases, spec), h
    module = _kernels(x, spec, config)
    grouped = _grouped(biases, down, spec)
    choice = tried(module, spec, x, ids, weights, up, down, biases, wanted=None, keep=keep, tile=tile)
    module.forward(
        x, ids, weights if spec.weighted != "none" else None, up, down, grouped, out=out, h=h if keep else None, **choice
    )
    return out, h


def backward(
    grad: Tensor, x: Tensor, ids: Tensor, weights: Tensor, up: Tensors, down: Tensors, biases: Tensors, h: Tensor,
    spec: ExpertsSpec, wanted: Sequence[bool], *, config: Config | None = None, tile: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, weights, each of up, down and biases; empty where `wanted` (see `ops.experts.GRADIENTS`) says no.

    Raises:
        KernelError: shapes or dtypes that the kernels do not take, or a kernel that disagrees with the reference on this machine.
        ValueError: operands that do not go together.
    """
    _check(x, ids, weights, up, down, biases, spec)
    wanted = [want and (name != "weights" or spec.weighted != "none") for name, want in zip(_NAMES, wanted, strict=True)]
    found = [torch.empty_like(of) if want else of.new_empty(0) for of, want in each_operand(x, weights, up, down, biases, wanted)]
    if _is_empty(x, ids, down):
        return [g.zero_() for g in found]
    if not any(wanted):
        return found
    module = _kernels(x, spec, config)
    choice = tried(module, spec, x, ids, weights, up, down, biases, wanted=wanted, keep=True, tile=tile)
    groups = iter(found)
    dx, d_weights = next(groups), next(groups)
    d_up, d_down, d_biases = ([next(groups) for _ in tensors] for tensors in (up, down, biases))
    routed = weights if spec.weighted != "none" else None
    module.backward(
        grad.to(x.dtype), x, ids, routed, up, down, _grouped(biases, down, spec), h.contiguous(),
        dx=dx if wanted[0] else None,
        d_weights=d_weights if wanted[1] else None,
        d_up=d_up if wanted[2] else (),
        d_down=d_down if wanted[3] else (),
        d_biases=_grouped(d_biases, down, spec) if wanted[4] else ((), ()),
        tile=choice["tile"],
    )  # fmt: skip
    return found


_NAMES = ("x", "weights", "up", "down", "biases")


def source(spec: ExpertsSpec, problem: Problem, *, config: Config | None = None) -> str:
    """The text of the kernel file for a specification and a problem."""
    config = config or default_config(spec, problem)
    named = {"ALONG": config.along, "ACROSS": config.across}
    settings = Settings(
        dtype=str(problem.dtype).removeprefix("torch."),
        precision="tf32" if problem.dtype != torch.float32 and problem.arch not in attention.WITHOUT_TF32 else "ieee",
        tiles=[tile.options() for tile in config.tiles],
        outer={name: value for name, value in config.outer.options().items() if name != "GROUP"},
        few={name: {"BLOCK_N": n, "BLOCK_K": k, "num_warps": 4} for name, (n, k) in named.items()},
    )
    return source_text(spec, settings)


def refusal(x: Tensor, up: Tensors, down: Tensors, biases: Tensors, spec: ExpertsSpec) -> str | None:
    """Why the kernels do not take these operands, if they do not."""
    if x.dtype not in DTYPES:
        return f"Expected x of {DTYPES} but got x.dtype={x.dtype!r}. Cast it first."
    for name, tensors in (("up", up), ("down", down)):
        for tensor in tensors[:: 1 if spec.is_stacked else len(down)]:
            if sum((size - 1) * stride for size, stride in zip(tensor.shape[-2:], tensor.stride()[-2:], strict=True)) >= _LIMIT:
                return (
                    f"Expected an expert's weights within {_LIMIT} elements but got {name}.stride()={tensor.stride()!r}. Copy them."
                )
    return None if spec.is_stacked else _unlike(up, down, biases)


def _unlike(up: Tensors, down: Tensors, biases: Tensors) -> str | None:
    """Why one expert's tensors cannot be read as another's are: kernels know what leads from one to another, no more."""
    for name, tensors in (("up", up), ("down", down), ("biases", biases)):
        for begin in range(0, len(tensors), len(down)):
            some = tensors[begin : begin + len(down)]
            if len({(x.stride(), x.dtype, x.device) for x in some}) > 1:
                return f"Expected all experts' {name} of the same strides, dtype and device but got others. Make them alike."
            if len({x.data_ptr() % 16 for x in some}) > 1:
                return f"Expected all experts' {name} a multiple of 16 bytes apart but got others. Copy them."
    return None


def _check(x: Tensor, ids: Tensor, weights: Tensor, up: Tensors, down: Tensors, biases: Tensors, spec: ExpertsSpec) -> None:
    check(x, ids, weights, up, down, biases, spec)
    why = refusal(x, up, down, biases, spec)
    if why:
        raise KernelError(why)


def _is_empty(x: Tensor, ids: Tensor, down: Tensors) -> bool:
    """Whether there is nothing to multiply."""
    return not (x.numel() and ids.numel() and down[0].numel())


def _without_rows(out: Tensor, ids: Tensor, down: Tensors, biases: Tensors, spec: ExpertsSpec) -> Tensor:
    if out.numel() and ids.numel():
        raise KernelError(f"Expected weights that have a size but got down.shape={tuple(down[0].shape)!r}. Leave the layer out.")
    return out.zero_()


def _grouped(biases: Tensors, down: Tensors, spec: ExpertsSpec) -> tuple[list[Tensor], list[Tensor]]:
    """The biases of each projection."""
    first, second = split_biases(biases, expert_count(down, spec), spec)
    return list(first), list(second)


def _kernels(x: Tensor, spec: ExpertsSpec, config: Config | None) -> ModuleType:
    return _module(spec, x.dtype, x.device, config, attention._directory)


@lru_cache(maxsize=1024)
def _module(
    spec: ExpertsSpec, dtype: torch.dtype, device: torch.device, config: Config | None, directory: Path | None
) -> ModuleType:
    problem = Problem(dtype=dtype, arch=attention.architecture(device))
    return emit.load_kernel(emit.write_kernel(source(spec, problem, config=config), directory, family="experts"))


# --------------------------------------------------------------------------------------------------------------- configurations

_SHARED_KB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227, "gfx950": 160, "gfx942": 64}
_FRAGMENTS = ("sm_80", "sm_86", "sm_89", "sm_120", "cpu")  # where products take what they multiply from registers
_BLACKWELL = ("sm_100", "sm_103")  # where sums come to registers all at once
_SPARE_KB = 4


def default_config(spec: ExpertsSpec, problem: Problem) -> Config:
    """The configuration for a problem, by a fixed rule: dtype, architecture, and what a kernel does beside its product."""
    heights = (16, 32, 64) if problem.dtype == torch.float32 else (16, 32, 64, 128)
    return Config(tiles=tuple(_tile(height, spec, problem) for height in heights), outer=_outer(problem))


def _tile(height: int, spec: ExpertsSpec, problem: Problem) -> Tile:
    """Columns by the height: few rows are bound by memory, where small programs hide its latency, many by the matrix units."""
    if problem.dtype == torch.float32:  # sums and operands are in registers
        launch = _staged(height, 32, 2 if spec.gated else 1, 4 if height < 32 else 8, problem)
        return Tile(first=launch, rows=launch, slopes=launch)
    warps = 4 if height < 64 else 8
    narrow = height < 64 or problem.arch in _FRAGMENTS or _is_small(problem)
    columns = 64 if narrow else 128
    wide = columns if height < 64 else 2 * columns
    turned = 64 if spec.interleaved else columns  # gate and up are parted in registers
    if height == 128 and spec.weighted == "input":
        wide = 128  # a row of x beside each sum
    return Tile(
        first=_staged(height, turned if problem.arch in _BLACKWELL else columns, 2 if spec.gated else 1, warps, problem),
        rows=_staged(height, wide, 1, warps, problem),
        slopes=_staged(height, turned, 1, warps, problem),
    )


def _outer(problem: Problem) -> Launch:
    """Half of the stages are of the rows' positions, which are loaded before the rows."""
    if problem.dtype == torch.float32:
        launch = _staged(64, 64, 1, 8, problem)
    else:
        launch = _staged(128, 64 if _is_small(problem) else 128, 1, 8, problem)
    if problem.arch.startswith("gfx"):
        return launch
    return replace(launch, num_stages=6, block_k=32 if problem.arch in _FRAGMENTS else launch.block_k)


def _is_small(problem: Problem) -> bool:
    """Whether the shared memory holds no three stages of wide tiles."""
    return _shared(problem) < 160 * 1024


def _staged(height: int, columns: int, matrices: int, warps: int, problem: Problem) -> Launch:
    """As many stages as the shared memory holds, up to four."""
    size = problem.dtype.itemsize
    depth = 32 if size == 4 else 64
    loaded = depth * (height + matrices * columns) * size
    held = (_shared(problem) - _SPARE_KB * 1024) // loaded
    stages = max(1, min(4, held + 1 if problem.arch in _FRAGMENTS else held))
    if problem.arch.startswith("gfx"):
        stages = min(stages, 2)
    return Launch(block_m=height, block_n=columns, block_k=depth, num_warps=warps, num_stages=stages)


def _shared(problem: Problem) -> int:
    return _SHARED_KB.get(problem.arch, 99) * 1024


def candidates(spec: ExpertsSpec, problem: Problem) -> tuple[Config, ...]:
    """The default configuration first, then others worth timing."""
    base = default_config(spec, problem)
    found = [base]
    for changes in ({"num_stages": 3}, {"num_warps": 4}, {"num_warps": 8}, {"block_n": 64}, {"block_n": 128}, {"block_k": 128}):
        tiles = tuple(_changed(tile, changes) for tile in base.tiles)
        found.append(replace(base, tiles=tiles))
    return tuple(dict.fromkeys(found))


def _changed(tile: Tile, changes: dict[str, int]) -> Tile:
    return Tile(first=replace(tile.first, **changes), rows=replace(tile.rows, **changes), slopes=replace(tile.slopes, **changes))
