"""What the kernels of `decode` do, for `cost_model.schedule`.

    seconds = predict(spec, problem, config, sizes, hardware, splits=4)

A program takes the G TQ rows of queries that read one key head, in tiles of M, and one part of the keys: an iteration multiplies
2 M N (D + D_V) and loads N (D + D_V) elements, which are used once. Several parts leave their sums in float32 to one more launch.
"""

from __future__ import annotations

from ..cost_model.hardware import Hardware
from ..cost_model.schedule import DEFAULT, MOST_REGISTERS, Factors, Launch, total_seconds
from ..ops.attention import AttentionSpec
from . import attention
from .attention import Launch as Tile
from .attention import Problem
from .attention_costs import Sizes, count_tiles, score_costs
from .decode import Config
from .decode_kernels import LEAST_KEYS, split_count
from .hooks import Variant
from .launching import tile_count, width_of

_OPERATIONS = 6  # of a score
_ADDRESSES = 80  # registers of a thread beside its blocks


def predict(
    spec: AttentionSpec,
    problem: Problem,
    config: Config,
    sizes: Sizes,
    hardware: Hardware,
    *,
    splits: int | None = None,
    factors: Factors = DEFAULT,
) -> float:
    """Seconds of one call; `splits` as the host function chooses them if not given."""
    chosen = chosen_splits(spec, config, sizes, hardware) if splits is None else splits
    return float(total_seconds(launches(spec, problem, config, sizes, chosen), hardware, factors))


def chosen_splits(spec: AttentionSpec, config: Config, sizes: Sizes, hardware: Hardware) -> int:
    """The parts that `decode_kernels.forward` cuts the keys into by its own rule."""
    span = Variant(spec).span
    keys = sizes.t_k if span is None else min(sizes.t_k, sizes.t_q + span)
    return split_count(_programs(config, sizes), keys, config.resident * hardware.sms)


def split_candidates(spec: AttentionSpec, config: Config, sizes: Sizes, hardware: Hardware) -> tuple[int, ...]:
    """The rule's number of parts first, then others worth timing: halves, doubles, and one part alone."""
    rule = chosen_splits(spec, config, sizes, hardware)
    most = max(1, sizes.t_k // LEAST_KEYS)
    return tuple(dict.fromkeys(min(most, max(1, splits)) for splits in (rule, rule // 2, 2 * rule, 4 * rule, 1)))


def launches(spec: AttentionSpec, problem: Problem, config: Config, sizes: Sizes, splits: int) -> list[Launch]:
    """The launches of one call, with the work of each."""
    size, width = problem.dtype.itemsize, problem.d_qk + problem.d_v
    rows = sizes.batch * sizes.heads * sizes.t_q
    tile = tile_of(config, sizes)
    visible = count_tiles(spec, sizes, sizes.t_q, tile.block_n).mean
    programs = _programs(config, sizes) * splits
    special, operations = score_costs(spec, attention.takes_fast_tanh(spec, problem))
    partial_bytes = rows * splits * (problem.d_v + 2) * 4 if splits > 1 else 0
    keys = sizes.batch * sizes.kv_heads * min(visible * tile.block_n, sizes.t_k)
    work = Launch(
        name="decode",
        programs=programs,
        iterations=max(1.0, visible / splits),
        longest=max(1, -(-int(visible) // splits)),
        flops=2 * max(16, tile.block_m) * tile.block_n * (width_of(problem.d_qk) + width_of(problem.d_v)),
        exponentials=tile.block_m * tile.block_n * (1 + special),
        vector=tile.block_m * tile.block_n * (_OPERATIONS + operations) + tile.block_m * width_of(problem.d_v),
        loaded=tile.block_n * width * size,
        shared=tile.block_n * width * size,
        outside=tile.block_m * width * size,
        memory=keys * width * size + rows * width * size + partial_bytes,
        dtype=str(problem.dtype).removeprefix("torch."),
        **_runs(tile, problem),
    )
    if splits == 1:
        return [work]
    combined = Launch(
        name="combine", programs=rows, iterations=tile_count(splits, 32), registers=64,
        memory=partial_bytes + rows * problem.d_v * size,
        loaded=min(splits, 32) * problem.d_v * 4, vector=min(splits, 32) * problem.d_v * 2,
    )  # fmt: skip
    return [work, combined]


def tile_of(config: Config, sizes: Sizes) -> Tile:
    """The lowest tile that holds the rows of one key head, else the highest."""
    return next((tile for tile in config.tiles if tile.block_m >= sizes.group * sizes.t_q), config.tiles[-1])


def _programs(config: Config, sizes: Sizes) -> int:
    return sizes.batch * sizes.kv_heads * tile_count(sizes.group * sizes.t_q, tile_of(config, sizes).block_m)


def _runs(tile: Tile, problem: Problem) -> dict[str, int]:
    size = problem.dtype.itemsize
    moving = tile.block_n * (problem.d_qk + problem.d_v) * size
    held = tile.block_m * (width_of(problem.d_v) + 2 * tile.block_n)
    registers = _ADDRESSES + held // (32 * tile.num_warps)
    kept = tile.block_m * (problem.d_qk + tile.block_n) * size
    return {
        "warps": tile.num_warps, "registers": min(MOST_REGISTERS, registers), "spilled": 4 * max(0, registers - MOST_REGISTERS),
        "stages": tile.num_stages, "links": 3, "shared_bytes": max(1, tile.num_stages - 1) * moving + kept,
    }  # fmt: skip
