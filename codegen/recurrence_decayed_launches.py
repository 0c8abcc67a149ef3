"""Host functions of recurrences whose decay differs along one dimension of the state: the roles of `recurrence_decayed_kernels`.

                 x     y    w    z     x^T S    y^T R    dx      dy
    by key       q     k    v    do    o        dv       dq      dk
    by value     do    v    k    q     dq       dk       o       dv

Backward, and the output where the decay is one for each value, need the states that enter chunks: they are computed again, not kept
from forward to backward.
"""

from __future__ import annotations

import torch

from .launching import tile_count, width_of
from .recurrence_decayed_kernels import chain_kernel, pairs_kernel, weights_kernel
from .recurrence_gates import NORMALISED
from .recurrence_hosts import carry, launch, strided, transposed

BY_VALUE = False
TILES = (
    {"BLOCK_M": 64, "C": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 32, "C": 64, "num_warps": 4, "num_stages": 3},
)
WEIGHTS = {"BLOCK": 64, "num_warps": 4}
FAR_WEIGHTS = {"BLOCK": 64, "num_warps": 8}  # of chunks whose decays are strong
PAIRS = {"BLOCK": 32, "BLOCK_M": 64, "num_warps": 4}
SAVED_DTYPE = torch.bfloat16  # of the states that enter chunks

# --------------------------------------------------------------------------------------------------------------------- Launches


def weigh(start, x, y, gates, bonus, shape, tile):
    """`(reads, writes, weights, decays, far)` of each chunk, those of x None without it; `shape`: (B, H, T)."""
    gate, rate = gates
    batch, heads, t = shape
    chunk, chunks, width = tile["C"], tile_count(t, tile["C"]), width_of(y.shape[-1])
    empty = lambda *sizes, dtype=y.dtype: start.empty((batch, heads, chunks, *sizes), dtype)  # noqa: E731
    reads, weights = (None, None) if x is None else (empty(chunk, width), empty(chunk, chunk))
    writes, decays, far = empty(chunk, width), empty(width, dtype=torch.float32), empty(dtype=torch.int32)
    values = {
        "X": x, "Y": y, "Gate": gate, "Rate": rate, "Bonus": bonus, "Reads": reads, "Writes": writes, "Weights": weights,
        "Decays": decays, "Far": far, "GROUP_X": 1 if x is None else heads // x.shape[1], "GROUP_Y": heads // y.shape[1],
        "H": heads, "T": t, "CHUNKS": chunks, **strided("x", "bhtd", x), **strided("y", "bhtd", y), **strided("g", "bhtd", gate),
        **strided("r", "bhtd", rate), **strided("u", "bhtd", bonus),
    }  # fmt: skip
    for distant in (False, True) if x is not None else (False,):
        options = {"FAR": distant, "N": y.shape[-1], "BLOCK_N": width, "C": chunk, **(FAR_WEIGHTS if distant else WEIGHTS)}
        options["BLOCK"] = min(options["BLOCK"], width)
        launch(start, weights_kernel, (batch * heads * chunks, 1, 1), values, **options)
    return reads, writes, weights, decays, far


def chain(
    start, prepared, w, shape, n, tile, segments, *,
    out=None, normaliser=None, extra=None, initial=None, final=None, kept=(None, None), reverse=False,
):  # fmt: skip
    """One pass over time for w [B, Hw, T, M]: writes `out` [B, H, T, M] if given, and the states that enter chunks into `kept`."""
    reads, writes, weights, decays, _ = prepared
    if reverse:
        reads, writes = writes, reads
    batch, heads, t = shape
    m = w.shape[-1]
    chunks = writes.shape[2]
    length = tile_count(chunks, segments)
    segments = tile_count(chunks, length)
    values = {
        "Reads": None if out is None else reads, "Writes": writes, "Weights": None if out is None else weights, "Decays": decays,
        "W": w, "Out": out, "Normaliser": normaliser, "Extra": extra, "Totals": None, "States": kept[0], "Columns": kept[1],
        "GROUP_W": heads // w.shape[1], "H": heads, "T": t, "CHUNKS": chunks, "SEGMENT": length, "SEGMENTS": segments,
        **strided("w", "bhtd", w), **strided("o", "bhtd", out), **strided("e", "bht", extra),
    }  # fmt: skip
    options = {"REVERSE": reverse, "N": n, "M": m, "BLOCK_N": writes.shape[-1], **tile}
    ends = {"Initial": initial, "Final": final, **strided("i", "bhnm", initial), **strided("f", "bhnm", final)}
    grid = (batch * heads * tile_count(m, tile["BLOCK_M"]), segments, 1)
    if segments == 1:
        values |= {**ends, "stride_is": 0, "stride_fs": 0}
        launch(start, chain_kernel, grid, values, START=initial is not None, FINISH=final is not None, **options)
        return
    slots = start.empty((batch, heads, segments, n, m + NORMALISED), torch.float32)
    totals = start.empty((batch, heads, segments, n), torch.float32)
    summed = values | {"Reads": None, "Weights": None, "Out": None, "Normaliser": None, "States": None, "Columns": None}
    summed |= {"Totals": totals, "Initial": None, "Final": slots, **strided("o", "bhtd", None)}
    summed |= {**strided("i", "bhsnm", None), **strided("f", "bhsnm", slots)}
    launch(start, chain_kernel, grid, summed, START=False, FINISH=True, **options)
    carry(start, slots, totals, ends)
    if out is None and kept[0] is None:
        return
    values |= {"Initial": slots, "Final": None, **strided("i", "bhsnm", slots), **strided("f", "bhsnm", None)}
    launch(start, chain_kernel, grid, values, START=True, FINISH=False, **options)


def pairs(start, prepared, z, w, x, y, gates, bonus, starts, ends, extra, dx, dy, slopes, shape, n, tile):
    """What pairs of steps of one chunk, and the states kept on the way there and back, give to dx, dy and the logarithms."""
    gate, rate = gates
    batch, heads, t = shape
    chunks, m, width = tile_count(t, tile["C"]), w.shape[-1], width_of(n)
    values = {
        "Z": z, "W": w, "X": x, "Y": y, "Gate": gate, "Rate": rate, "Bonus": bonus, "Starts": starts[0], "Ends": ends[0],
        "StartColumns": starts[1], "EndColumns": ends[1], "Extra": extra, "DX": dx, "DY": dy, "Slopes": slopes, "Far": prepared[-1],
        "GROUP_Z": heads // z.shape[1], "GROUP_W": heads // w.shape[1], "GROUP_X": 1 if x is None else heads // x.shape[1],
        "GROUP_Y": heads // y.shape[1], "H": heads, "T": t, "CHUNKS": chunks, "COLUMNS": m,
        **strided("z", "bhtd", z), **strided("w", "bhtd", w), **strided("x", "bhtd", x), **strided("y", "bhtd", y),
        **strided("g", "bhtd", gate), **strided("r", "bhtd", rate), **strided("u", "bhtd", bonus), **strided("e", "bht", extra),
        **strided("p", "bhtd", dx), **strided("o", "bhtd", dy),
    }  # fmt: skip
    options = {**PAIRS, "BLOCK": min(PAIRS["BLOCK"], width), "BLOCK_M": min(PAIRS["BLOCK_M"], width_of(m))}
    grid = (batch * heads * chunks, tile_count(n, options["BLOCK"]), 1)
    for distant in (False, True):
        launch(start, pairs_kernel, grid, values, FAR=distant, N=n, M=m, BLOCK_N=width, C=tile["C"], **options)


def keeping(start, shape, n, m, tile):
    """Room for the states that enter chunks and, with a normaliser, their additional columns."""
    sizes = *shape[:2], tile_count(shape[2], tile["C"]), width_of(n)
    return start.empty((*sizes, m), SAVED_DTYPE), start.empty(sizes, torch.float32) if NORMALISED else None


# ----------------------------------------------------------------------------------------------------------------------- Passes


def forward_in_chunks(start, q, k, v, gates, out, normaliser, initial, final, bonus, segments, tile):
    """By key one pass over time; by value that of the states alone, and their products with q in all chunks at once."""
    shape, n, m = v.shape[:3], k.shape[-1], v.shape[-1]
    if BY_VALUE:
        n, m = m, n
    tile = TILES[tile]
    along = shape, n, tile, segments
    if BY_VALUE:
        prepared = weigh(start, None, v, gates, None, shape, tile)
        kept = keeping(start, shape, n, m, tile)
        chain(start, prepared, k, *along, initial=transposed(initial), final=transposed(final), kept=kept)
        pairs(start, prepared, q, k, None, v, gates, None, kept, (None, None), None, out, None, None, shape, n, tile)
    else:
        prepared = weigh(start, q, k, gates, bonus, shape, tile)
        chain(start, prepared, v, *along, out=out, normaliser=normaliser if NORMALISED else None, initial=initial, final=final)


def backward_in_chunks(
    start, grad, along_ones, grad_final, v, q, k, gates, bonus, initial, dv, dq, dk, d_initial, slopes, segments, tile
):
    """One pass there, one back, and the pairs of steps; `along_ones`: the gradient of the normaliser, [B, H, T]."""
    shape, n, m = v.shape[:3], k.shape[-1], v.shape[-1]
    if BY_VALUE:
        n, m = m, n
    tile = TILES[tile]
    along = shape, n, tile, segments
    starts, ends = (keeping(start, shape, n, m, tile) for _ in range(2))
    if BY_VALUE:
        prepared = weigh(start, grad, v, gates, None, shape, tile)
        chain(start, prepared, k, *along, out=dq, initial=transposed(initial), kept=starts)
        chain(
            start, prepared, q, *along, out=dk, initial=transposed(grad_final), final=transposed(d_initial), kept=ends, reverse=True
        )
        pairs(start, prepared, q, k, grad, v, gates, None, starts, ends, None, None, dv, slopes, shape, n, tile)
    else:
        prepared = weigh(start, q, k, gates, bonus, shape, tile)
        chain(start, prepared, v, *along, initial=initial, kept=starts)
        chain(start, prepared, grad, *along, out=dv, extra=along_ones, initial=grad_final, final=d_initial, kept=ends, reverse=True)
        pairs(start, prepared, grad, v, q, k, gates, bonus, starts, ends, along_ones, dq, dk, slopes, shape, n, tile)
