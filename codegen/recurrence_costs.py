"""What the chunk kernels of recurrences do, for `cost_model.schedule`: each entry of `recurrence.candidates` gets a predicted time.

    seconds = predict(spec, problem, config, sizes, hardware, mode="forward")

One pass over time, for a state of N rows of which a program holds M columns, in chunks of C steps:

    decay                products of a chunk                           a chunk loads
    none, one a head     2 C^2 N + 2 C N M + 2 C^2 M + 2 C N M        C (2 N + M) elements
    each key or value    2 C N M + 2 C^2 M + 2 C N M                  C (2 N + C + M)

the latter after a launch that weighs the pairs of steps of each chunk, 2 C^2 N. Backward there are three passes, or two and a
launch over the pairs of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..cost_model.hardware import Hardware
from ..cost_model.schedule import DEFAULT, MOST_REGISTERS, Factors, Launch, total_seconds
from ..ops.recurrence import RecurrenceSpec
from .launching import tile_count, width_of
from .recurrence import Config, Problem, Tile

Mode = Literal["forward", "backward"]

_ADDRESSES = 48  # registers of a thread beside its blocks, at least
_WISHED = 110  # and those that the compiler takes where there are so many
_STATE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Extents of one call; `key_heads`: of q and k. `slopes`: backward, whether the decay gets a gradient."""

    batch: int
    heads: int
    steps: int
    key_heads: int
    slopes: bool = True


@dataclass(frozen=True)
class Plan:
    """As `recurrence_hosts.plan`: the tile, its position, and the parts that time is cut into."""

    tile: Tile
    at: int
    segments: int


def predict(
    spec: RecurrenceSpec,
    problem: Problem,
    config: Config,
    sizes: Sizes,
    hardware: Hardware,
    *,
    mode: Mode = "forward",
    factors: Factors = DEFAULT,
) -> float:
    """Seconds of one call; infinite for a configuration that the shared memory does not hold."""
    return float(total_seconds(launches(spec, problem, config, sizes, hardware, mode=mode), hardware, factors))


def launches(
    spec: RecurrenceSpec, problem: Problem, config: Config, sizes: Sizes, hardware: Hardware, *, mode: Mode = "forward"
) -> list[Launch]:
    """The launches of one call, with the work of each."""
    made = _Describer(spec, problem, config, sizes, hardware)
    if spec.decay in ("key", "value"):
        return made.decayed(backward=mode == "backward")
    return made.in_chunks() if mode == "forward" else made.three_passes()


def plan(tiles: tuple[Tile, ...], heads: int, width: int, steps: int, processors: int) -> Plan:
    """Which tile the host takes: the rule of `recurrence_hosts.plan`."""
    at = next(
        (at for at, tile in enumerate(tiles) if 10 * heads * tile_count(width, tile.block_m) >= 9 * processors), len(tiles) - 1
    )
    tile = tiles[at]
    programs = heads * tile_count(width, tile.block_m)
    if 2 * programs > processors:
        return Plan(tile, at, 1)
    return Plan(tile, at, max(1, min(tile_count(2 * processors, programs), steps // (4 * tile.chunk))))


class _Describer:
    """One call of a recurrence."""

    def __init__(self, spec: RecurrenceSpec, problem: Problem, config: Config, sizes: Sizes, hardware: Hardware):
        self.spec, self.problem, self.config, self.sizes = spec, problem, config, sizes
        self.size = problem.dtype.itemsize
        self.dtype = str(problem.dtype).removeprefix("torch.")
        self.by_value = spec.decay == "value"
        self.heads = sizes.batch * sizes.heads
        self.columns = problem.d_k if self.by_value else problem.d_v
        self.rows = problem.d_v if self.by_value else problem.d_k
        self.plan = plan(config.tiles, self.heads, self.columns, sizes.steps, hardware.sms)
        keys, values = sizes.batch * sizes.key_heads * sizes.steps * problem.d_k, self.heads * sizes.steps * problem.d_v
        self.key_bytes, self.value_bytes = keys * self.size, values * self.size

    def in_chunks(self) -> list[Launch]:
        return [*self.sums(), *self.replay("replay", self.plan.tile, self.problem.d_k, self.problem.d_v)]

    def three_passes(self) -> list[Launch]:
        """dQ and dK with the state [Dv, Dk], dV with [Dk, Dv]."""
        d_k, d_v = self.problem.d_k, self.problem.d_v
        exchanged = self.config.exchanged[min(self.plan.at, len(self.config.exchanged) - 1)]
        weighed = self.sizes.slopes and self.spec.decay == "head"
        found = [*self.sums(), *self.replay("dq", exchanged, d_v, d_k, weighed=weighed), *self.sums()]
        found += self.replay("dv", self.plan.tile, d_k, d_v)
        found += self.replay("dk", exchanged, d_v, d_k, weighed=weighed)
        return [*found, self.small("slopes", self.heads * tile_count(self.sizes.steps, exchanged.chunk))] if weighed else found

    def replay(self, name: str, tile: Tile, n: int, m: int, *, weighed: bool = False) -> list[Launch]:
        """One pass, or where time is cut one that sums up, one that carries and one that emits."""
        c, width, columns = tile.chunk, width_of(n), tile.block_m
        flops = 2 * c * (c * width + 2 * width * columns + c * columns)
        work = Launch(
            name=name,
            programs=self.heads * tile_count(m, columns) * self.plan.segments,
            iterations=self._chunks(c),
            flops=flops,
            exponentials=c * c if self.spec.decay == "head" else 0,
            vector=3 * c * c + 2 * width * columns + c * columns,
            loaded=c * (2 * width + columns) * self.size,
            shared=self._fragments(tile, c, width),
            outside=2 * width * columns * _STATE_BYTES,
            memory=2 * self.key_bytes + 2 * self.value_bytes + weighed * self._state_bytes(c),
            **self._runs(tile, width, weighed=weighed),
        )
        return self._cut(work, flops - 2 * c * (c * width + width * columns + c * columns))

    def decayed(self, *, backward: bool) -> list[Launch]:
        """Weights of pairs, passes over prepared chunks, and backward the pairs' own gradients."""
        found = [self.weights(), self.small("far weights", self.heads * self._chunks(self.plan.tile.chunk))]
        if not backward:
            found += self.chain("chain", keeps=self.by_value)
            return [*found, *self.pairs(gradients=False)] if self.by_value else found
        return [*found, *self.chain("there", keeps=True), *self.chain("back", keeps=True), *self.pairs(gradients=True)]

    def weights(self) -> Launch:
        c, width = self.plan.tile.chunk, width_of(self.rows)
        chunks = self.heads * tile_count(self.sizes.steps, c)
        written = chunks * c * (2 * width + c) * self.size
        return Launch(
            name="weights", programs=chunks, iterations=tile_count(width, self.config.block), flops=2 * c * c * self.config.block,
            exponentials=4 * c * self.config.block, vector=8 * c * self.config.block + c * c,
            loaded=c * self.config.block * (2 * self.size + _STATE_BYTES), outside=written / chunks,
            memory=2 * self.key_bytes + self.heads * self.sizes.steps * width * _STATE_BYTES + written,
            dtype=self.dtype, warps=self.config.weights_warps, registers=168, stages=1,
            shared_bytes=3 * c * self.config.block * self.size,
        )  # fmt: skip

    def chain(self, name: str, *, keeps: bool) -> list[Launch]:
        tile, width = self.plan.tile, width_of(self.rows)
        c, columns = tile.chunk, tile.block_m
        chunks = self.heads * tile_count(self.sizes.steps, c)
        prepared = chunks * c * (2 * width + c) * self.size
        work = Launch(
            name=name,
            programs=self.heads * tile_count(self.columns, columns) * self.plan.segments,
            iterations=self._chunks(c),
            flops=2 * c * columns * (2 * width + c),
            vector=2 * width * columns + c * columns,
            loaded=c * (2 * width + c + columns) * self.size,
            shared=self._fragments(tile, c, width),
            outside=2 * width * columns * _STATE_BYTES,
            memory=prepared + 2 * self.value_bytes + keeps * self._state_bytes(c),
            **self._runs(tile, width, weighted=True),
        )
        return self._cut(work, 2 * c * columns * width)

    def pairs(self, *, gradients: bool) -> list[Launch]:
        """Near chunks, then far ones, of which there are none as a rule."""
        c, block = self.plan.tile.chunk, self.config.pairs_block
        chunks, columns = self.heads * tile_count(self.sizes.steps, c), width_of(self.columns)
        blocks = tile_count(self.rows, block)
        both = 2 if gradients else 1
        work = Launch(
            name="pairs", programs=chunks * blocks, iterations=tile_count(columns, self.config.block),
            flops=2 * c * self.config.block * (c + both * block), exponentials=4 * c * block, vector=8 * c * block,
            loaded=self.config.block * (2 * c + both * block) * self.size, outside=c * block * self.size * (2 + 2 * both),
            memory=2 * both * (self.key_bytes + self.value_bytes) + both * self._state_bytes(c),
            dtype=self.dtype, warps=self.config.pairs_warps, registers=200, stages=1,
            shared_bytes=self.config.block * (2 * c + block) * self.size,
        )  # fmt: skip
        return [work, self.small("far pairs", chunks * blocks)]

    def sums(self) -> list[Launch]:
        """The running sums of the logarithms of decays; a rule of the same decay at all times needs none."""
        if self.spec.decay != "head" or self.problem.constant:
            return []
        return [self.small("sums", self.heads * tile_count(self.sizes.steps, self.plan.tile.chunk), warps=1)]

    def small(self, name: str, programs: int, warps: int = 4) -> Launch:
        """A launch whose programs do next to nothing."""
        return Launch(name=name, programs=programs, iterations=1, registers=32, warps=warps, vector=256)

    def _cut(self, work: Launch, summing_flops: float) -> list[Launch]:
        if self.plan.segments == 1:
            return [work]
        summed = {item: getattr(work, item) for item in work.__dataclass_fields__} | {"name": "enter", "flops": summing_flops}
        return [Launch(**summed), self.small("carry", self.heads * tile_count(self.rows, 16) * tile_count(self.columns, 64)), work]

    def _chunks(self, chunk: int) -> int:
        return tile_count(tile_count(self.sizes.steps, chunk), self.plan.segments)

    def _state_bytes(self, chunk: int) -> int:
        return self.heads * tile_count(self.sizes.steps, chunk) * self.problem.d_k * self.problem.d_v * self.size

    def _fragments(self, tile: Tile, c: int, width: int) -> float:
        """Operands of the products as the matrix units read them: once for each 64 rows of a result."""
        return self.size * (2 * c * width + 2 * tile_count(width, 64) * c * tile.block_m + 2 * width * tile.block_m)

    def _runs(self, tile: Tile, width: int, *, weighted: bool = False, weighed: bool = False) -> dict[str, Any]:
        """`weighted`: the weights within chunks are loaded; `weighed`: sums for the gradient of the decay are kept too."""
        c, columns = tile.chunk, tile.block_m
        warps = max(8, tile.num_warps) if weighed else tile.num_warps
        held = width * columns + c * c + 2 * c * columns + weighed * c * columns
        registers = held // (32 * warps)
        loaded = c * (2 * width + columns + weighted * c) * self.size
        return {
            "dtype": self.dtype, "warps": warps, "registers": min(MOST_REGISTERS, registers + _WISHED),
            "spilled": 4 * max(0, registers + _ADDRESSES - MOST_REGISTERS), "stages": tile.num_stages,
            "links": 3 if self.spec.decay == "none" or weighted else 4 if self.problem.constant else 5,
            "shared_bytes": tile.num_stages * loaded + (width + (0 if weighted else c)) * columns * self.size,
        }  # fmt: skip
