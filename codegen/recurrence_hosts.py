"""How the kernels of recurrences are launched: what the host functions of all templates share."""

from __future__ import annotations

import torch

from .launching import tile_count
from .recurrence_state_kernels import carry_kernel


def strided(letter, dims, tensor):
    """The strides of a tensor by the names of kernel parameters; none for no tensor."""
    strides = [0] * len(dims) if tensor is None else tensor.stride()
    return {f"stride_{letter}{dim}": stride for dim, stride in zip(dims, strides, strict=True)}


def launch(start, kernel, grid, values, **options):
    """Start a kernel with those of `values` and `options` that are its parameters; `options` are constants."""
    taken = {name: value for name, value in options.items() if name in kernel.arg_names or name.startswith("num_")}
    start(kernel, grid, *[values[name] for name in kernel.arg_names if name in values], **taken)


def processors(device):
    """Of the GPU; 1 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def plan(tiles, heads, width, t, device, chosen=None):
    """`(tile, segments)`: the widest tile of columns whose programs keep nine processors of ten busy, else the narrowest, and then
    as many segments of time as fill the processors twice, each of at least four chunks.

    Time splits the work at the cost of reading k and v once more; columns split it at the cost of reading q and k again, from
    the second-level cache, and of computing q k^T again.
    """
    count = processors(device)
    if chosen is not None:
        tiles = tiles[chosen : chosen + 1] or tiles[-1:]
    tile = next((tile for tile in tiles if 10 * heads * tile_count(width, tile["BLOCK_M"]) >= 9 * count), tiles[-1])
    programs = heads * tile_count(width, tile["BLOCK_M"])
    if 2 * programs > count:
        return tile, 1
    return tile, max(1, min(tile_count(2 * count, programs), t // (4 * tile["C"])))


def carry(start, slots, totals, ends):
    """What each segment adds to a state, slots [B, H, segments, N, M], becomes the state that enters it; `totals`: what is left."""
    batch, heads, segments, rows, width = slots.shape
    launch(
        start, carry_kernel, (batch * heads, tile_count(rows, 16), tile_count(width, 64)),
        {**ends, "Slots": slots, "Totals": totals, "H": heads, "SEGMENTS": segments},
        START=ends["Initial"] is not None, FINISH=ends["Final"] is not None, ROWS=rows, WIDTH=width, BLOCK_N=16, BLOCK_M=64,
        num_warps=4,
    )  # fmt: skip


def transposed(x):
    """The last two dimensions exchanged; none for no tensor."""
    return None if x is None else x.transpose(-1, -2)
