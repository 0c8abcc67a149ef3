"""What the kernels of attention do, for `cost_model.schedule`: each configuration of `attention.candidates` gets a predicted time.

    seconds = predict(spec, problem, config, sizes, hardware, mode="forward")

Of an M x N tile of scores, with C and C_V the padded head dimensions:

    kernel    products                 one program                          an iteration loads
    forward   2 M N (C + C_V)          a tile of queries, over key tiles    N (C + C_V) elements
    dQ        2 M N (2 C + C_V)        a tile of queries, over key tiles    N (C + C_V)
    dK, dV    2 M N (2 C + 2 C_V)      a tile of keys, over the tiles of    M (C + C_V)
                                       queries of all heads that read it

and M N exponentials each. Tiles are counted by what the kernels themselves go by: `intervals.verdict` over the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

import sympy
import torch
from sympy.logic.boolalg import And

from ..cost_model.hardware import Hardware
from ..cost_model.schedule import DEFAULT, MOST_REGISTERS, Factors, Launch, total_seconds
from ..intervals import I0, I1, J0, J1, I, J, verdict
from ..ops.attention import AttentionSpec
from ..printers import to_torch
from ..terms import Load, Sigmoid, Term, integer_symbol, score_symbol
from . import attention
from .attention import Config, Problem
from .hooks import Variant
from .hopper import Rings
from .launching import tile_count, width_of

Mode = Literal["forward", "backward"]

_SAMPLED = 64  # lines of tiles that are looked at; of longer grids, as many at even distances
_LEAST_SAMPLED = 16
_ONE_THREAD = 32767  # elements of a tensor up to which torch works in one thread: to wake others takes milliseconds
_BASIC_OPERATIONS = 6  # of a score: scaled, compared, taken off, added up, rounded, moved
_BACKWARD_OPERATIONS = 8
_SPECIAL = (sympy.exp, sympy.log, sympy.tanh, sympy.erf, sympy.sin, sympy.cos, Sigmoid)
_TANH_OPERATIONS = 12  # where it is made of an exponential and a division
_ADDRESSES = 40  # registers of a thread beside its blocks, at least
_WISHED = 110  # and those that the compiler takes where there are so many
_CONSUMING_THREADS = 256  # of a program for Hopper: two groups of four warps
_CONSUMER_REGISTERS = 240


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Extents of one call.

    Attributes:
        named: integers that the specification mentions, by name.
        density: of the tiles that the mask's bounds leave, the share that loaded data (documents, tables) leaves, where known.
    """

    batch: int
    heads: int
    kv_heads: int
    t_q: int
    t_k: int
    named: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    density: float = 1.0

    @property
    def group(self) -> int:
        """Query heads that read one key head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Tiles:
    """Tiles of one head that hold a visible pair, by line on average and at most; `masked`: the share that a mask is applied to."""

    mean: float
    most: float
    masked: float


def predict(
    spec: AttentionSpec,
    problem: Problem,
    config: Config,
    sizes: Sizes,
    hardware: Hardware,
    *,
    mode: Mode = "forward",
    factors: Factors = DEFAULT,
) -> float:
    """Seconds of one call; infinite for a configuration that the shared memory does not hold."""
    return float(total_seconds(launches(spec, problem, config, sizes, mode=mode), hardware, factors))


def launches(spec: AttentionSpec, problem: Problem, config: Config, sizes: Sizes, *, mode: Mode = "forward") -> list[Launch]:
    """The launches of one call, with the work of each."""
    made = _Describer(spec, problem, sizes)
    if mode == "forward":
        return [*made.table(), made.forward(config)]
    passes = ((True, False), (False, True)) if config.split_dkv else ((True, True),)
    found = [made.delta(), *made.table(), *(made.dkv(config, *wanted) for wanted in passes), *made.table(), made.dq(config)]
    return [*found, *(made.captured(config) for _ in made.variant.learned)]


def count_tiles(spec: AttentionSpec, sizes: Sizes, block_m: int, block_n: int, *, by_key: bool = False) -> Tiles:
    """Active tiles of `block_m` queries by `block_n` keys, by line of queries, or of keys.

    What the mask loads is taken to allow everything: `sizes.density` says otherwise.
    """
    named = tuple(sorted(sizes.named.items()))
    return _count(spec, sizes.t_q, sizes.t_k, named, block_m, block_n, by_key, sizes.density)


@lru_cache(maxsize=4096)
def _count(
    spec: AttentionSpec,
    t_q: int,
    t_k: int,
    named: tuple[tuple[str, int], ...],
    block_m: int,
    block_n: int,
    by_key: bool,
    density: float,
) -> Tiles:
    certain, possible = _verdicts(spec)
    lines, columns = tile_count(t_q, block_m), tile_count(t_k, block_n)
    i = _starts(lines, block_m, most=lines if by_key else _sample(columns))[:, None]
    j = _starts(columns, block_n, most=_sample(lines) if by_key else columns)[None, :]
    values: dict[str, Any] = {
        "i0": i, "i1": (i + block_m).clamp(max=t_q) - 1, "j0": j, "j1": (j + block_n).clamp(max=t_k) - 1,
        "TQ": t_q, "TK": t_k, "b": 0, "h": 0, **dict(named),
    }  # fmt: skip
    shape = (i.shape[0], j.shape[1])
    active, whole = (_evaluated(term, values).broadcast_to(shape) for term in (possible, certain))
    whole = whole & ((i + block_m <= t_q) & (j + block_n <= t_k))
    along = active.sum(0 if by_key else 1).double() * density
    masked = float((active & ~whole).sum()) / max(float(active.sum()), 1.0)
    return Tiles(mean=float(along.mean()), most=float(along.max()), masked=masked)


@lru_cache(maxsize=256)
def _verdicts(spec: AttentionSpec) -> tuple[Term, Term]:
    """`(certain, possible)` in i0, i1, j0, j1, without the conditions that loaded data decides: those are never certain."""
    mask = Variant(spec).mask
    parts = mask.args if isinstance(mask, And) else (mask,)
    known = And(*(part for part in parts if not part.has(Load)))
    certain, possible = verdict(known, {I: (I0, I1), J: (J0, J1)})
    return (certain if len(known.args if isinstance(known, And) else (known,)) >= len(parts) else sympy.false), possible


def _sample(length: int) -> int:
    """How many lines of so many tiles are looked at."""
    return max(_LEAST_SAMPLED, min(_SAMPLED, _ONE_THREAD // length))


def _starts(count: int, block: int, *, most: int) -> torch.Tensor:
    """Where tiles begin: at most so many, at even distances, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long() * block


def _evaluated(condition: Term, values: Mapping[str, Any]) -> torch.Tensor:
    if condition in (sympy.true, sympy.false):
        return torch.tensor(condition == sympy.true)
    names = {integer_symbol(name): name for name in values}
    return torch.as_tensor(eval(_compiled(to_torch(condition, names)), {"torch": torch}, dict(values)))


@lru_cache(maxsize=1024)
def _compiled(text: str) -> Any:
    return compile(text, "<mask>", "eval")


class _Describer:
    """One call: its blocks' widths, and what a score costs."""

    def __init__(self, spec: AttentionSpec, problem: Problem, sizes: Sizes):
        self.spec, self.problem, self.sizes = spec, problem, sizes
        self.variant = Variant(spec)
        self.size = problem.dtype.itemsize
        self.c, self.c_v = width_of(problem.d_qk), width_of(problem.d_v)
        self.dtype = str(problem.dtype).removeprefix("torch.")
        self.special, self.operations = score_costs(spec, attention.takes_fast_tanh(spec, problem))
        queries, keys = sizes.batch * sizes.heads * sizes.t_q, sizes.batch * sizes.kv_heads * sizes.t_k
        self.query_bytes, self.key_bytes = queries * problem.d_qk * self.size, keys * problem.d_qk * self.size
        self.out_bytes, self.value_bytes = queries * problem.d_v * self.size, keys * problem.d_v * self.size
        self.row_bytes = queries * 4

    def forward(self, config: Config) -> Launch:
        launch = config.forward
        m, n = launch.block_m, launch.block_n
        tiles = count_tiles(self.spec, self.sizes, m, n)
        rescaled = m * self.c_v
        return Launch(
            name="forward",
            programs=self.sizes.batch * self.sizes.heads * tile_count(self.sizes.t_q, m),
            iterations=tiles.mean,
            longest=tiles.most,
            flops=2 * m * n * (self.c + self.c_v),
            vector=self._vector(m * n, _BASIC_OPERATIONS, tiles) + rescaled,
            outside=m * (self.c + self.c_v) * self.size,
            memory=self.query_bytes + self.key_bytes + self.value_bytes + self.out_bytes + self.row_bytes,
            **self._runs(launch, accumulators=m * self.c_v + 1.5 * m * n, resident=m * self.c),
        )

    def dq(self, config: Config) -> Launch:
        launch = config.dq
        m, n = launch.block_m, launch.block_n
        tiles = count_tiles(self.spec, self.sizes, m, n)
        return Launch(
            name="dq",
            programs=self.sizes.batch * self.sizes.heads * tile_count(self.sizes.t_q, m),
            iterations=tiles.mean,
            longest=tiles.most,
            flops=2 * m * n * (2 * self.c + self.c_v),
            vector=self._vector(m * n, _BACKWARD_OPERATIONS, tiles),
            outside=m * (2 * self.c + self.c_v) * self.size,
            memory=2 * self.query_bytes + self.key_bytes + self.value_bytes + self.out_bytes + 2 * self.row_bytes,
            **self._runs(launch, accumulators=m * self.c + 2 * m * n, resident=m * (self.c + self.c_v)),
        )

    def dkv(self, config: Config, with_k: bool, with_v: bool) -> Launch:
        launch = config.dkv
        m, n = launch.block_m, launch.block_n
        tiles = count_tiles(self.spec, self.sizes, m, n, by_key=True)
        columns = self.c + with_k * (self.c + self.c_v) + with_v * self.c_v
        sums = n * (with_k * self.c + with_v * self.c_v)
        return Launch(
            name="dkv",
            programs=self.sizes.batch * self.sizes.kv_heads * tile_count(self.sizes.t_k, n),
            iterations=self.sizes.group * tiles.mean,
            longest=self.sizes.group * tiles.most,
            flops=2 * m * n * columns,
            vector=self._vector(m * n, _BACKWARD_OPERATIONS, tiles),
            outside=2 * n * (self.c + self.c_v) * self.size,
            memory=self.query_bytes + self.out_bytes + 2 * (self.key_bytes + self.value_bytes) + 2 * self.row_bytes,
            **self._runs(launch, accumulators=sums + 2 * m * n, resident=n * (self.c + self.c_v), by_key=True),
        )

    def captured(self, config: Config) -> Launch:
        """The gradient of one load: both products of all active tiles once more."""
        launch = config.captured
        m, n = launch.block_m, launch.block_n
        tiles = count_tiles(self.spec, self.sizes, m, n)
        return Launch(
            name="captured",
            programs=self.sizes.batch * self.sizes.heads * tile_count(self.sizes.t_q, m),
            iterations=tiles.mean,
            longest=tiles.most,
            flops=2 * m * n * (self.c + self.c_v),
            vector=self._vector(m * n, _BACKWARD_OPERATIONS, tiles),
            outside=m * (self.c + self.c_v) * self.size,
            memory=self.query_bytes + self.key_bytes + self.value_bytes + self.out_bytes + 2 * self.row_bytes,
            **self._runs(launch, accumulators=3 * m * n, resident=m * (self.c + self.c_v)),
        )

    def delta(self) -> Launch:
        """Row sums of the output and its gradient, 64 rows a program: bound by memory."""
        rows = self.sizes.batch * self.sizes.heads * tile_count(self.sizes.t_q, 64)
        return Launch(
            name="delta", programs=rows, iterations=1, memory=2 * self.out_bytes + 3 * self.row_bytes,
            loaded=2 * 64 * self.c_v * self.size, vector=2 * 64 * self.c_v, dtype=self.dtype, registers=64, stages=2,
        )  # fmt: skip

    def table(self) -> list[Launch]:
        """A line of the table of tiles for each tile of queries; nothing where the mask's bounds tell."""
        if not self.variant.needs_table:
            return []
        heads = self.sizes.heads if self.variant.table_depends_on("h") else 1
        batch = self.sizes.batch if self.variant.table_depends_on("b") else 1
        lines = tile_count(self.sizes.t_q, 128)
        columns = tile_count(self.sizes.t_k, 64)
        return [Launch(name="table", programs=batch * heads * lines, iterations=tile_count(columns, 32), registers=64, vector=4096)]

    def _vector(self, scores: int, basic: int, tiles: Tiles) -> float:
        masked = tiles.masked * (2 + sympy.count_ops(self.variant.mask))
        return scores * (basic + self.operations + masked)

    def _runs(self, launch: Any, *, accumulators: float, resident: int, by_key: bool = False) -> dict[str, Any]:
        """What depends on how a program runs: its warps, registers, shared memory, loads, special functions.

        `accumulators`: float32 values that its warps hold; `resident`: elements of the tile that it keeps.
        """
        m, n = launch.block_m, launch.block_n
        moving, kept = (m, n) if by_key else (n, m)
        tile = moving * (self.c + self.c_v) * self.size
        shared: dict[str, Any] = {
            "exponentials": m * n * (1 + self.special), "loaded": tile, "dtype": self.dtype,
        }  # fmt: skip
        if isinstance(launch, Rings):  # a warp that copies, and two groups of four that share the tile that stays
            rings = (launch.slots[0] * self.c + launch.slots[1] * self.c_v) * moving * self.size
            beyond = max(0, _ADDRESSES + int(accumulators) // _CONSUMING_THREADS - _CONSUMER_REGISTERS)
            return shared | {
                "warps": 12, "registers": 160, "spilled": 4 * beyond, "stages": min(launch.slots), "parts": 2,
                "shared": 2 * tile + resident * self.size, "shared_bytes": rings + resident * self.size,
            }  # fmt: skip
        warpgroups = self.problem.arch in ("sm_90", "sm_100", "sm_103") and self.size == 2
        readers = max(1, kept // 64) if warpgroups else min(launch.num_warps, max(1, kept // 16))
        lanes = 64 if self.problem.arch.startswith("gfx") else 32
        held = int(accumulators) // (lanes * launch.num_warps)
        beyond = max(0, held + _ADDRESSES - MOST_REGISTERS)
        stages = launch.num_stages if warpgroups else max(1, launch.num_stages - 1)  # tiles of a pipeline, by Triton's lowering
        staged = stages * tile + resident * self.size
        return shared | {
            "warps": launch.num_warps, "registers": min(MOST_REGISTERS, held + _WISHED), "spilled": 4 * beyond,
            "stages": launch.num_stages,
            "shared": readers * tile, "shared_bytes": staged, "links": 2,
        }  # fmt: skip


@lru_cache(maxsize=1024)
def score_costs(spec: AttentionSpec, fast_tanh: bool) -> tuple[float, float]:
    """Special functions and other operations of a score, beside the softmax's own."""
    score = Variant(spec).score
    special = [part for part in sympy.preorder_traversal(score) if isinstance(part, _SPECIAL)]
    slow = 0 if fast_tanh else _TANH_OPERATIONS
    operations = float(sympy.count_ops(score)) + slow * len(special)
    if not score.has(I, J, Load) and not special:
        operations = 0.0 if score.has(score_symbol()) else operations  # a scale joins the exponent's product
    return float(len(special)) * (1 if fast_tanh else 2), operations
