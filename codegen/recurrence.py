"""Linear recurrences of any specification, forward and backward, on a GPU: chooses kernels and their configuration, launches them.

    out, normaliser, final = forward(v, operands, spec, layout)
    gradients = backward(grad, grad_normaliser, grad_final, v, operands, out, spec)

with operands and results as `ops.recurrence` says. States that k writes and q reads go through `recurrence_kernels`, chunk by
chunk on the matrix units, or `recurrence_decayed_kernels` where the decay differs from row to row or from column to column; states
of one row and decays of each element through `scan`, step by step in registers; delta rules through ATen.

What a program holds and why, for B x H heads of a state [Dk, Dv] over T steps: the state stays in registers (BLOCK_M of its
columns), and each chunk of C = 64 steps is read once. At D = 128, a chunk costs 64 (4 D BLOCK_M + 128 (D + BLOCK_M)) operations
and brings 64 (2 D + BLOCK_M) elements, so that programs of 64 columns are bound by memory, and two of them share a processor of
227 KB and 64 K registers: one computes while the other waits. Programs of 32 columns read q and k twice as often, from the
second-level cache, and are taken where 64 would leave processors without work: at B 1, H 32, D 128 on 132 processors, 128
programs of 32 columns. Fewer heads than that are cut in time, which reads k and v twice, see `recurrence_hosts.plan`. At D = 256 a
processor holds one program of 64 columns. Chunk states never go to memory, but for the gradients of a decay and of what it decays:
one state for each chunk then saves what would otherwise be a difference of large sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from ..ops.recurrence import RecurrenceSpec, empty_output, reference_backward, state_shape, without_decay
from . import attention, emit, recurrence_aten
from .attention import DTYPES, Arch
from .launching import width_of
from .recurrence_choices import product_dtype
from .recurrence_source import Settings
from .recurrence_source import source as source_text
from .recurrence_trial import tried

MAX_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Columns of the state and steps of a chunk, and how one program runs."""

    block_m: int
    chunk: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """As constants of a kernel launch."""
        return {"BLOCK_M": self.block_m, "C": self.chunk, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tiles of the passes whose state is [Dk, Dv], the widest first, and of those whose state is [Dv, Dk].

    A decay for each key or value has passes of one kind, whose state's rows it differs along, and kernels that take a chunk by
    itself: `block` and `pairs_block` rows of the state at a time.
    """

    tiles: tuple[Tile, ...]
    exchanged: tuple[Tile, ...]
    step_columns: int = 32
    block: int = 64
    weights_warps: int = 4
    pairs_block: int = 32
    pairs_warps: int = 4

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a configuration depends on, beside the specification: never a length. `constant`: the decay is the same at all times."""

    d_k: int
    d_v: int
    dtype: torch.dtype
    arch: Arch
    constant: bool = False


def forward(
    v: Tensor,
    operands: Sequence[Tensor],
    spec: RecurrenceSpec,
    layout: str,
    *,
    config: Config | None = None,
    segments: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, normaliser, final)`, as `ops.recurrence.reference`; `segments`: parts that time is cut into, chosen if not given.

    Raises:
        KernelError: shapes or dtypes that the kernels do not take, or a kernel that disagrees with the reference on this machine.
    """
    if spec.delta != "none":
        return recurrence_aten.forward(v, operands, spec, layout)
    if steps_alone(spec):
        return _scan().forward(v, operands, spec, layout)
    if v.numel() == 0:
        _checked(v, operands, spec)
        return _nothing(v, operands, spec, layout)
    module, choice = _ready(v, operands, spec, config, segments)
    v, x = _one_dtype(v, spec.named(operands))
    return module.forward(v, **x, layout=layout, **choice)


def backward(
    grad: Tensor | None,
    grad_normaliser: Tensor | None,
    grad_final: Tensor | None,
    v: Tensor,
    operands: Sequence[Tensor],
    out: Tensor | None,
    spec: RecurrenceSpec,
    *,
    decay: bool = True,
    config: Config | None = None,
    segments: int | None = None,
) -> list[Tensor]:
    """Gradients of `v` and of each operand, empty ones of gate and rate unless `decay`; those of results may be `None`.

    Raises:
        KernelError: shapes or dtypes that the kernels do not take, or a kernel that disagrees with the reference on this machine.
    """
    if spec.delta != "none":
        return without_decay(recurrence_aten.backward(grad, grad_normaliser, grad_final, v, operands, out, spec), spec, decay)
    if steps_alone(spec):
        return without_decay(_scan().backward(grad, grad_normaliser, grad_final, v, operands, out, spec), spec, decay)
    if v.numel() == 0:
        _checked(v, operands, spec)
        return without_decay(reference_backward(grad, grad_normaliser, grad_final, v, operands, out, spec), spec, decay)
    grads = (grad, grad_normaliser, grad_final)
    module, choice = _ready(v, operands, spec, config, segments, grads, decay)
    x = spec.named(operands)
    same_v, same = _one_dtype(v, x)
    found = module.backward(*grads, same_v, **same, weigh=decay, **choice)
    made = [found[name] if found[name] is None else _like(found[name], like) for name, like in {"v": v, **x}.items()]
    return without_decay(made, spec, decay)


def steps_alone(spec: RecurrenceSpec) -> bool:
    """Whether the matrix units have no part in it: one row, or a decay of each element."""
    return not spec.has_rows or spec.decay == "full"


def source(spec: RecurrenceSpec, problem: Problem, *, config: Config | None = None) -> str:
    """The text of the kernel file for a specification and a problem."""
    config = config or default_config(spec, problem)
    settings = Settings(
        d_k=problem.d_k,
        d_v=problem.d_v,
        dtype=str(problem.dtype).removeprefix("torch."),
        constant=problem.constant,
        joined=not problem.arch.startswith("sm_10"),
        near=6.0 if problem.dtype == torch.float16 else 96.0,
        precision="tf32" if problem.dtype != torch.float32 and problem.arch not in attention.WITHOUT_TF32 else "ieee",
        tiles=[tile.options() for tile in config.tiles],
        exchanged=[tile.options() for tile in config.exchanged],
        step={"BLOCK_M": config.step_columns, "num_warps": 4},
        weights={"BLOCK": config.block, "num_warps": config.weights_warps},
        far_weights={"BLOCK": config.block, "num_warps": 8},
        pairs={"BLOCK": config.pairs_block, "BLOCK_M": config.block, "num_warps": config.pairs_warps},
    )
    return source_text(spec, settings)


_READY = dict[tuple[Any, ...], tuple[ModuleType, dict[str, int]]]()


def _ready(
    v: Tensor,
    operands: Sequence[Tensor],
    spec: RecurrenceSpec,
    config: Config | None,
    segments: int | None,
    grads: Sequence[Tensor | None] | None = None,
    decay: bool = True,
) -> tuple[ModuleType, dict[str, int]]:
    """The kernels for such operands, tried on this machine, and the `tile` and `segments` to call them with."""
    given = None if grads is None else tuple(g is None for g in grads)
    looks = [(x.shape, x.dtype) for x in (v, *operands)]
    key = (spec, config, segments, given, decay, v.device, attention._directory, *looks)
    found = _READY.get(key)
    if found is None:
        x = _checked(v, operands, spec)
        module = _kernels(v, x, spec, config)
        same_v, same = _one_dtype(v, x)
        found = module, tried(module, spec, same_v, same, grads=grads, decay=decay, segments=segments)
        if len(_READY) > 4096:
            _READY.clear()
        _READY[key] = found
    return found


def _scan() -> ModuleType:
    from . import scan

    return scan


def _kernels(v: Tensor, x: Mapping[str, Tensor], spec: RecurrenceSpec, config: Config | None) -> ModuleType:
    dtype = product_dtype({**x, "v": v})
    constant = "gate" in x and all(x[name].shape[2] == 1 for name in ("gate", "rate") if name in x)
    return _module(spec, x["k"].shape[-1], v.shape[-1], dtype, v.device, constant, config, attention._directory)


@lru_cache(maxsize=1024)
def _module(
    spec: RecurrenceSpec,
    d_k: int,
    d_v: int,
    dtype: torch.dtype,
    device: torch.device,
    constant: bool,
    config: Config | None,
    directory: Path | None,
) -> ModuleType:
    problem = Problem(d_k=d_k, d_v=d_v, dtype=dtype, arch=attention.architecture(device), constant=constant)
    return emit.load_kernel(emit.write_kernel(source(spec, problem, config=config), directory, family="recurrence"))


def _checked(v: Tensor, operands: Sequence[Tensor], spec: RecurrenceSpec) -> dict[str, Tensor]:
    if len(operands) != len(spec.operands):
        raise KernelError(f"Expected operands={spec.operands!r} but got {len(operands)} tensors.")
    x = spec.named(operands)
    q, k = x["q"], x["k"]
    if not (v.ndim == k.ndim == 4 and q.shape == k.shape and v.shape[:1] == k.shape[:1] and v.shape[2] == k.shape[2]):
        raise KernelError(
            f"Expected v [B, H, T, Dv] and q, k [B, Hk, T, Dk] but got v={tuple(v.shape)}, q={tuple(q.shape)}, k={tuple(k.shape)}."
        )
    if v.shape[1] % max(k.shape[1], 1):
        raise KernelError(f"Expected H to be a multiple of Hk but got H={v.shape[1]!r}, Hk={k.shape[1]!r}.")
    if product_dtype({**x, "v": v}) not in DTYPES:
        raise KernelError(f"Expected q, k and v of {DTYPES} but got {q.dtype}, {k.dtype}, {v.dtype}. Cast them first.")
    return x


def _one_dtype(v: Tensor, x: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    if v.dtype == x["q"].dtype == x["k"].dtype:
        return v, x
    dtype = product_dtype({**x, "v": v})
    return v.to(dtype), {**x, "q": x["q"].to(dtype), "k": x["k"].to(dtype)}


def _nothing(v: Tensor, operands: Sequence[Tensor], spec: RecurrenceSpec, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """The results of no steps, or of none that have a size."""
    out, x = empty_output(v, spec, layout), spec.named(operands)
    final = x["initial"].float().clone() if "initial" in x else v.new_zeros(state_shape(v, x, spec), dtype=torch.float32)
    return out, v.new_empty(v.shape[:3] if spec.normaliser else (0,), dtype=torch.float32), final


def _like(gradient: Tensor, x: Tensor) -> Tensor:
    """In the dtype and the order in memory of `torch.empty_like(x)`."""
    wanted = torch.empty_like(x)
    if gradient.dtype == x.dtype and gradient.stride() == wanted.stride():
        return gradient
    return wanted.copy_(gradient)


# --------------------------------------------------------------------------------------------------------------- configurations

_SHARED_KB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227, "gfx950": 160, "gfx942": 64}
_FRAGMENTS = ("sm_80", "sm_86", "sm_89", "sm_120")  # where products take the state from registers, once more
_STATE_A_THREAD = 64  # float32 values of the state
_SPARE_KB = 16


def default_config(spec: RecurrenceSpec, problem: Problem) -> Config:
    """The configuration for a problem, by a fixed rule: kind of decay, dimensions, dtype, architecture.

    Raises:
        KernelError: head dimensions beyond MAX_WIDTH.
    """
    if max(problem.d_k, problem.d_v) > MAX_WIDTH:
        raise KernelError(f"Expected head dimensions up to {MAX_WIDTH} but got d_k={problem.d_k!r}, d_v={problem.d_v!r}.")
    n, m = width_of(problem.d_k), width_of(problem.d_v)
    if spec.decay in ("key", "value"):
        rows, columns = (n, m) if spec.decay == "key" else (m, n)
        tiles = _tiles(rows, columns, problem, weighted=True)
        chunk = min(tile.chunk for tile in tiles)
        block = 32 if problem.dtype == torch.float32 else 64
        return Config(tiles=tuple(replace(tile, chunk=chunk) for tile in tiles), exchanged=(), block=block)
    tiles, exchanged = _tiles(n, m, problem), _tiles(m, n, problem)
    if spec.decay == "head":
        exchanged = exchanged[-1:]  # the sums for the gradient of the decay take the registers of the wider tile
    chunk = min(tile.chunk for tile in (*tiles, *exchanged))  # states that are kept for that gradient are shared by passes
    return Config(
        tiles=tuple(replace(tile, chunk=chunk) for tile in tiles), exchanged=tuple(replace(tile, chunk=chunk) for tile in exchanged)
    )


def _tiles(rows: int, columns: int, problem: Problem, *, weighted: bool = False) -> tuple[Tile, ...]:
    """Of 64 and of 32 columns, as far as there are so many: the first leave room for a second program, the last are alone.

    A state of 256 rows leaves no such room: wide tiles then, which compute q k^T less often, where the shared memory holds them.
    Where products take the state from registers, those bound the columns: 32 for 128 rows, 16 for 256.
    """
    widths = sorted({min(columns, width) for width in (64, 32)}, reverse=True)
    if problem.dtype == torch.float32 or (rows >= 128 and problem.arch in _FRAGMENTS):
        widths = widths[-1:]
    elif rows >= 256:
        widths = widths[:1] if _SHARED_KB.get(problem.arch, 99) > 200 else widths[-1:]
    if rows >= 256 and problem.arch in _FRAGMENTS and not weighted:
        widths = [16]
    return tuple(_tile(rows, width, problem, weighted=weighted, alone=width == widths[-1]) for width in widths)


def _tile(rows: int, block_m: int, problem: Problem, *, weighted: bool, alone: bool) -> Tile:
    """A state of at most 64 values a thread; the largest chunk up to 64 steps of which the shared memory holds one beside the
    state; chunks in flight, up to three with the one at work, as they fit the shared memory or half of it, two wherever they fit.

    `weighted`: the weights within chunks [C, C] are loaded too. Blackwell's loads are not pipelined: Triton 3.6 and 3.7 keep a sum
    that other products read in a copy that lags behind.
    """
    crowded = rows >= 256 or (rows >= 128 and problem.arch in _FRAGMENTS)
    warps = 8 if crowded else max(4, rows * block_m // (32 * _STATE_A_THREAD))
    size, whole = problem.dtype.itemsize, _SHARED_KB.get(problem.arch, 99)
    room = (whole - _SPARE_KB) * 1024
    room = room if alone else room // 2
    state = rows * block_m * size

    def loaded(chunk: int) -> int:
        return chunk * (2 * rows + block_m + (chunk if weighted else 0)) * size

    def scratch(chunk: int) -> int:  # of a step: what is written in the operands' dtype
        return 0 if weighted else chunk * block_m * size

    crammed = problem.arch in _FRAGMENTS and not weighted  # a chunk's weights [C, C] are in registers, beside the state
    short = crammed or problem.dtype == torch.float32 or problem.arch.startswith("gfx")
    chunk = 16 if crammed and rows >= 256 else 32 if short else 64
    while chunk > 16 and loaded(chunk) + state + scratch(chunk) > (whole - 8) * 1024:
        chunk //= 2
    fits = (whole - 8) * 1024 - state - scratch(chunk) >= 2 * loaded(chunk)
    stages = max(2 if fits else 1, min(3, (room - state - scratch(chunk)) // loaded(chunk)))
    if problem.arch in ("sm_100", "sm_103", "cpu") or problem.arch.startswith("gfx"):
        stages = 1
    return Tile(block_m=block_m, chunk=chunk, num_warps=warps, num_stages=stages)


def candidates(spec: RecurrenceSpec, problem: Problem) -> tuple[Config, ...]:
    """The default configuration first, then others worth timing."""
    base = default_config(spec, problem)
    found = [base]
    for changes in ({"num_stages": 1}, {"num_stages": 2}, {"num_stages": 3}, {"num_warps": 4}, {"num_warps": 8}, {"chunk": 32}):
        pair = [tuple(replace(tile, **changes) for tile in tiles) for tiles in (base.tiles, base.exchanged)]
        found.append(replace(base, tiles=pair[0], exchanged=pair[1]))
    return tuple(dict.fromkeys(found))
