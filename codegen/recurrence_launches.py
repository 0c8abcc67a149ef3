"""Host functions of the recurrence template: which parts of `recurrence_kernels` are exchanged, for the result and each gradient.

          reads   writes      state       time
    o     q       k v^T       [Dk, Dv]    forwards
    dq    do      v k^T       [Dv, Dk]    forwards
    dv    k       q do^T      [Dk, Dv]    backwards
    dk    v       do q^T      [Dv, Dk]    backwards

The gradient of the decay comes from dq and dk; the additional column of v, the ones of the normaliser, is an additional row of the
state in them.
"""

from __future__ import annotations

import torch

from .launching import tile_count, width_of
from .recurrence_gates import GATED, NORMALISED, SUMMED
from .recurrence_hosts import carry, launch, strided, transposed
from .recurrence_kernels import replay_kernel, slopes_kernel, sums_kernel

TILES = (
    {"BLOCK_M": 64, "C": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 32, "C": 64, "num_warps": 4, "num_stages": 3},
)
EXCHANGED_TILES = TILES  # of the passes whose state is [Dv, Dk]
SAVED_DTYPE = torch.bfloat16  # of the states that are kept for the gradient of the decay

# --------------------------------------------------------------------------------------------------------------------- Launches


def chunk_sums(start, gates, t, chunk, reverse):
    """The running sums of the logarithms in each chunk and the counts of resets, [B, H, chunks, C] each, in the order of travel.

    The third result, [B, H, chunks], says which chunks are far.
    """
    gate, rate = gates
    batch, heads = gate.shape[:2]
    chunks = tile_count(t, chunk)
    totals, counts = (start.empty((batch, heads, chunks, chunk), dtype) for dtype in (torch.float32, torch.int32))
    far = start.empty((batch, heads, chunks), torch.int32)
    values = {
        "Gate": gate, "Rate": rate, "Totals": totals, "Counts": counts, "Far": far, "H": heads, "T": t, "CHUNKS": chunks,
        **strided("g", "bhtd", gate), **strided("r", "bhtd", rate),
    }  # fmt: skip
    launch(start, sums_kernel, (batch * heads * chunks, 1, 1), values, REVERSE=reverse, C=chunk, num_warps=1)
    return totals, counts, far


def tile_of(exchanged, chosen):
    """The tile at a position in TILES, or what is there for passes whose state is [Dv, Dk]."""
    tiles = EXCHANGED_TILES if exchanged else TILES
    return tiles[min(chosen, len(tiles) - 1)]


def replay(
    start, read, write, value, gates, *,
    out=None, normaliser=None, initial=None, final=None, bonus=None, left=None, right=None, extra=0,
    segments, chosen, reverse=False, exchanged=False, along=None, weigh=0, kept=None, summed=None,
):  # fmt: skip
    """One pass over time. `read`, `write` [B, Hx, T, N], `value` [B, Hx, T, M]; of `extra` and `weigh` tells the kernel.

    `summed`: `chunk_sums` of passes before this one, by direction and chunk.
    """
    gate, rate = gates
    shaped = max((read, write, value), key=lambda x: x.shape[1])
    batch, heads, t = shaped.shape[:3]
    n, m = write.shape[-1], value.shape[-1]
    tile = tile_of(exchanged, chosen)
    chunk = tile["C"]
    chunks = tile_count(t, chunk)
    length = tile_count(chunks, segments)
    segments = tile_count(chunks, length)
    states, sums, differences, parts = kept or (None, None, None, None)
    totals = counts = far = None
    if SUMMED:
        summed = {} if summed is None else summed
        if (reverse, chunk) not in summed:
            summed[reverse, chunk] = chunk_sums(start, gates, t, chunk, reverse)
        totals, counts, far = summed[reverse, chunk]
    values = {
        "Q": read, "K": write, "V": value, "Out": out, "Normaliser": normaliser, "Gate": gate, "Rate": rate, "Bonus": bonus,
        "Left": left, "Right": right, "Along": along, "States": states, "Sums": sums, "Differences": differences, "Parts": parts,
        "ChunkSums": totals, "ChunkCounts": counts, "Far": far,
        "GROUP_Q": heads // read.shape[1], "GROUP_K": heads // write.shape[1], "GROUP_V": heads // value.shape[1],
        "GROUP_A": 1 if along is None else heads // along.shape[1],
        "H": heads, "T": t, "CHUNKS": chunks, "SEGMENT": length, "SEGMENTS": segments, "Totals": None,
        **strided("q", "bhtd", read), **strided("k", "bhtd", write), **strided("v", "bhtd", value), **strided("o", "bhtd", out),
        **strided("g", "bhtd", gate), **strided("r", "bhtd", rate), **strided("u", "bhtd", bonus), **strided("a", "bhtd", along),
        **strided("l", "bht", left), **strided("x", "bht", right),
    }  # fmt: skip
    options = {
        "REVERSE": reverse, "EXCHANGED": exchanged, "EXTRA": extra, "N": n, "M": m,
        "BLOCK_N": width_of(n), **tile,
    }  # fmt: skip
    if weigh:  # more is held at once
        options["num_warps"] = max(8, tile["num_warps"])
    ends = {"Initial": initial, "Final": final, **strided("i", "bhnm", initial), **strided("f", "bhnm", final)}
    grid = (batch * heads * tile_count(m, tile["BLOCK_M"]), segments, 1)
    if segments == 1:
        values |= {**ends, "stride_is": 0, "stride_fs": 0}
        launch(
            start,
            replay_kernel,
            grid,
            values,
            EMIT=True,
            WEIGH=weigh,
            START=initial is not None,
            FINISH=final is not None,
            **options,
        )
        return
    slots = entering(start, values, ends, options, (batch, heads, segments, n + (extra >= 2), m + (extra == 1)), grid)
    values |= {"Initial": slots, "Final": None, **strided("i", "bhsnm", slots), **strided("f", "bhsnm", None)}
    launch(start, replay_kernel, grid, values, EMIT=True, WEIGH=weigh, START=True, FINISH=False, **options)


def entering(start, values, ends, options, shape, grid):
    """The states that enter each segment, [B, H, segments, N, M], from what each segment adds to a state and leaves of it."""
    slots = start.empty(shape, torch.float32)
    totals = start.empty((*shape[:3], 1), torch.float32)
    summed = values | {"Totals": totals, "Initial": None, "Final": slots, "Out": None, "Normaliser": None}
    summed |= {**strided("i", "bhsnm", None), **strided("f", "bhsnm", slots)}
    launch(start, replay_kernel, grid, summed, EMIT=False, WEIGH=0, START=False, FINISH=True, **options)
    carry(start, slots, totals, ends)
    return slots


def weighing(start, v, k, t, tile):
    """What the passes that make the gradient of the logarithms leave for `slopes_kernel`, and the length of a chunk.

    States that enter chunks; for each step, and for each chunk, what its columns add up to (`replay_kernel`, WEIGH).
    """
    batch, heads, _, d_v = v.shape
    d_k = k.shape[-1]
    config = tile_of(True, tile)
    chunks, blocks = tile_count(t, config["C"]), tile_count(d_k, config["BLOCK_M"])
    states = start.empty((batch, heads, chunks, d_v + NORMALISED, d_k), SAVED_DTYPE)
    sums, differences = (start.empty((batch, heads, t, blocks), torch.float32) for _ in range(2))
    shares = blocks * (config["C"] + d_v + NORMALISED * config["BLOCK_M"])
    return (states, sums, differences, start.empty((batch, heads, chunks, shares), torch.float32)), config["C"]


def finish_slopes(start, kept, slopes, chunk):
    """The gradient of the logarithms."""
    _, sums, differences, parts = kept
    batch, heads, t, _ = slopes.shape
    values = {
        "Sums": sums, "Differences": differences, "Parts": parts, "Slopes": slopes, "T": t, "CHUNKS": parts.shape[2],
        "BLOCKS": sums.shape[-1], "SHARES": parts.shape[-1],
    }  # fmt: skip
    launch(start, slopes_kernel, (batch * heads * parts.shape[2], 1, 1), values, C=chunk, num_warps=1)


# ----------------------------------------------------------------------------------------------------------------------- Passes


def forward_in_chunks(start, q, k, v, gates, out, normaliser, initial, final, bonus, segments, tile):
    """One pass."""
    replay(
        start, q, k, v, gates, out=out, normaliser=normaliser, initial=initial, final=final, bonus=bonus, extra=int(NORMALISED),
        segments=segments, chosen=tile,
    )  # fmt: skip


def backward_in_chunks(
    start, grad, along_ones, grad_final, v, q, k, gates, bonus, initial, dv, dq, dk, d_initial, slopes, segments, tile
):
    """Three passes; `along_ones`: the gradient of the normaliser, [B, H, T]."""
    weighed, chunk = lambda along, way: dict[str, object](), None
    if GATED:
        if slopes is not None:
            kept, chunk = weighing(start, v, k, v.shape[2], tile)
            weighed = lambda along, way: {"along": along, "weigh": way, "kept": kept}  # noqa: E731
    shared = {"segments": segments, "chosen": tile, "summed": {}, "bonus": bonus}
    replay(
        start, grad, v, k, gates, out=dq, initial=transposed(initial), left=along_ones, extra=2 * NORMALISED, exchanged=True,
        **weighed(q, 1), **shared,
    )  # fmt: skip
    d_v = v.shape[-1]
    replay(start, k, q, grad, gates, out=dv, initial=None if grad_final is None else grad_final[..., :d_v], reverse=True, **shared)
    replay(
        start, v, grad, q, gates, out=dk, initial=transposed(grad_final), final=transposed(d_initial), right=along_ones,
        extra=3 * NORMALISED, reverse=True, exchanged=True, **weighed(k, 2), **shared,
    )  # fmt: skip
    if slopes is not None:
        finish_slopes(start, kept, slopes, chunk)
