"""Host functions of the recurrence template: which parts of `recurrence_kernels` are exchanged, for the result and each gradient.

          reads   writes      state       time       decays along
    o     q       k v^T       [Dk, Dv]    forwards   rows if it is one for each key, columns if one for each value
    dq    do      v k^T       [Dv, Dk]    forwards   the other way round
    dv    k       q do^T      [Dk, Dv]    backwards  as for o
    dk    v       do q^T      [Dv, Dk]    backwards  as for dq

The gradient of the decay comes from the two passes whose columns it runs along, dq and dk, or o and dv where it is one for each
value; the additional column of v, the ones of the normaliser, is an additional row of the state in dq and dk.
"""

from __future__ import annotations

import torch

from .launching import begin, tile_count, width_of
from .recurrence_kernels import (
    BEFORE,
    BONUS,
    GATED,
    SUMMED,
    VECTOR,
    carry_kernel,
    replay_kernel,
    slopes_kernel,
    step_kernel,
    sums_kernel,
)

BY_VALUE = False  # the decay is one for each value
NORMALISED = False
OUT_DTYPE = torch.bfloat16
FEW = 8  # steps up to which each is taken by itself
TILES = (
    {"BLOCK_M": 64, "C": 64, "num_warps": 4, "num_stages": 2},
    {"BLOCK_M": 32, "C": 64, "num_warps": 4, "num_stages": 3},
)
EXCHANGED_TILES = TILES  # of the passes whose state is [Dv, Dk]
SAVED_DTYPE = torch.bfloat16  # of the states that are kept for the gradient of the decay
STEP = {"BLOCK_M": 32, "num_warps": 4}
ORDERS = {"bhtd": (0, 1, 2), "bthd": (0, 2, 1), "tbhd": (2, 0, 1)}

# --------------------------------------------------------------------------------------------------------------------- Launches


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


def along_state(x, k, v):
    """A gate or rate [B, H, T, Dk, Dv] as [B, H, T, D] along the dimension in which the decay differs, D = 1 if in none."""
    if x is None:
        return None
    width = (v if BY_VALUE else k).shape[-1] if VECTOR else 1
    return (x[..., 0, :] if BY_VALUE else x[..., 0]).expand(*v.shape[:3], width)


def chunk_sums(start, gates, t, chunk, reverse):
    """The running sums of the logarithms in each chunk and the counts of resets, [B, H, chunks, C] each, in the order of travel."""
    gate, rate = gates
    batch, heads = gate.shape[:2]
    chunks = tile_count(t, chunk)
    totals, counts = (start.empty((batch, heads, chunks, chunk), dtype) for dtype in (torch.float32, torch.int32))
    values = {
        "Gate": gate, "Rate": rate, "Totals": totals, "Counts": counts, "H": heads, "T": t, "CHUNKS": chunks,
        **strided("g", "bhtd", gate), **strided("r", "bhtd", rate),
    }  # fmt: skip
    launch(start, sums_kernel, (batch * heads * chunks, 1, 1), values, REVERSE=reverse, C=chunk, num_warps=1)
    return totals, counts


def replay(
    start, read, write, value, gates, *,
    out=None, normaliser=None, initial=None, final=None, bonus=None, left=None, right=None, extra=0,
    reverse=False, exchanged=False, along=None, weigh=0, kept=None, segments=None, chosen=None, summed=None,
):  # fmt: skip
    """One pass over time. `read`, `write` [B, Hx, T, N], `value` [B, Hx, T, M]; of `extra` and `weigh` tells the kernel.

    `summed`: `chunk_sums` of passes before this one, by direction and chunk.
    """
    gate, rate = gates
    shaped = max((read, write, value), key=lambda x: x.shape[1])
    batch, heads, t = shaped.shape[:3]
    n, m = write.shape[-1], value.shape[-1]
    tile, parts = plan(EXCHANGED_TILES if exchanged else TILES, batch * heads, m, t, value.device, chosen)
    segments = segments or parts
    chunk = tile["C"]
    chunks = tile_count(t, chunk)
    length = tile_count(chunks, segments)
    segments = tile_count(chunks, length)
    columns = exchanged != BY_VALUE
    states, sums, differences, parts = kept or (None, None, None, None)
    totals = counts = None
    if SUMMED:
        summed = {} if summed is None else summed
        if (reverse, chunk) not in summed:
            summed[reverse, chunk] = chunk_sums(start, gates, t, chunk, reverse)
        totals, counts = summed[reverse, chunk]
    values = {
        "Q": read, "K": write, "V": value, "Out": out, "Normaliser": normaliser, "Gate": gate, "Rate": rate, "Bonus": bonus,
        "Left": left, "Right": right, "Along": along, "States": states, "Sums": sums, "Differences": differences, "Parts": parts,
        "ChunkSums": totals, "ChunkCounts": counts,
        "GROUP_Q": heads // read.shape[1], "GROUP_K": heads // write.shape[1], "GROUP_V": heads // value.shape[1],
        "GROUP_A": 1 if along is None else heads // along.shape[1],
        "H": heads, "T": t, "CHUNKS": chunks, "SEGMENT": length, "SEGMENTS": segments, "Totals": None,
        **strided("q", "bhtd", read), **strided("k", "bhtd", write), **strided("v", "bhtd", value), **strided("o", "bhtd", out),
        **strided("g", "bhtd", gate), **strided("r", "bhtd", rate), **strided("u", "bhtd", bonus), **strided("a", "bhtd", along),
        **strided("l", "bht", left), **strided("x", "bht", right),
    }  # fmt: skip
    options = {
        "REVERSE": reverse, "EXCHANGED": exchanged, "COLUMNS": columns, "EXTRA": extra, "N": n, "M": m,
        "BLOCK_N": width_of(n), **tile,
    }  # fmt: skip
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
    batch, heads, segments, rows, width = shape
    slots = start.empty(shape, torch.float32)
    totals = start.empty((*shape[:3], (options["M"] if options["COLUMNS"] else options["N"]) if VECTOR else 1), torch.float32)
    summed = values | {"Totals": totals, "Initial": None, "Final": slots, "Out": None, "Normaliser": None}
    summed |= {**strided("i", "bhsnm", None), **strided("f", "bhsnm", slots)}
    launch(start, replay_kernel, grid, summed, EMIT=False, WEIGH=0, START=False, FINISH=True, **options)
    launch(
        start, carry_kernel, (batch * heads, tile_count(rows, 16), tile_count(width, 64)),
        {**ends, "Slots": slots, "Totals": totals, "H": heads, "SEGMENTS": segments},
        COLUMNS=options["COLUMNS"], START=ends["Initial"] is not None, FINISH=ends["Final"] is not None, ROWS=rows, WIDTH=width,
        BLOCK_N=16, BLOCK_M=64, num_warps=4,
    )  # fmt: skip
    return slots


def step(start, q, k, v, gates, out, normaliser, initial, final, bonus):
    """Few steps, one by one."""
    gate, rate = gates
    batch, heads, t, m = v.shape
    n = k.shape[-1]
    values = {
        "Q": q, "K": k, "V": v, "Out": out, "Normaliser": normaliser, "Gate": gate, "Rate": rate, "Bonus": bonus,
        "Initial": initial, "Final": final, "GROUP_Q": heads // q.shape[1], "GROUP_K": heads // k.shape[1], "H": heads, "T": t,
        **strided("q", "bhtd", q), **strided("k", "bhtd", k), **strided("v", "bhtd", v), **strided("o", "bhtd", out),
        **strided("g", "bhtd", gate), **strided("r", "bhtd", rate), **strided("u", "bhtd", bonus),
        **strided("i", "bhnm", initial), **strided("f", "bhnm", final),
    }  # fmt: skip
    launch(
        start, step_kernel, (batch * heads * tile_count(m, STEP["BLOCK_M"]), 1, 1), values,
        COLUMNS=BY_VALUE, EXTRA=int(NORMALISED), START=initial is not None, N=n, M=m, BLOCK_N=width_of(n), **STEP,
    )  # fmt: skip


def empty_like_order(v, order):
    """[B, H, T, D] in OUT_DTYPE, in memory ordered as `order` says."""
    order = ORDERS[order]
    out = torch.empty([v.shape[d] for d in order] + [v.shape[3]], dtype=OUT_DTYPE, device=v.device)
    return out.permute(*(order.index(d) for d in range(3)), 3)


# --------------------------------------------------------------------------------------------------------------------- Operation


def forward(v, q, k, *, gate=None, rate=None, bonus=None, initial=None, layout="bhtd", segments=None, tile=None):
    """`(out, normaliser, final)` of v [B, H, T, Dv], q, k [B, Hk, T, Dk], gate, rate [B, H, T, Dk, Dv], bonus [B, H, T, Dk], of any
    strides, with 1 where they do not differ; normaliser [B, H, T], empty if there is none, and final, like initial, in float32.

    `segments`: into how many parts time is cut, `tile`: which of TILES; chosen from the sizes if not given.
    """
    batch, heads, t, d_v = v.shape
    out = empty_like_order(v, layout)
    normaliser = torch.empty((batch, heads, t) if NORMALISED else (0,), dtype=torch.float32, device=v.device)
    final = torch.empty((batch, heads, k.shape[-1], d_v + NORMALISED), dtype=torch.float32, device=v.device)

    def run(start):
        gates = along_state(gate, k, v), along_state(rate, k, v)
        wide_bonus = None if bonus is None else bonus.expand(batch, heads, t, -1)
        if t <= FEW:
            step(start, q, k, v, gates, out, normaliser, initial, final, wide_bonus)
        else:
            replay(
                start, q, k, v, gates, out=out, normaliser=normaliser, initial=initial, final=final, bonus=wide_bonus,
                extra=int(NORMALISED), segments=segments, chosen=tile,
            )  # fmt: skip

    begin(run, v, q, k, gate, rate, bonus, initial, out, normaliser, final, segments, tile)
    return out, normaliser, final


def gathered(x, heads):
    """[B, H, T, D] summed over the heads that share one of `heads`."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def own_part(grad, q, k, v, bonus):
    """The gradient of the bonus: q k (do . v), summed over what it does not differ in."""
    heads = v.shape[1]
    weight = (grad.float() * v.float()).sum(-1, keepdim=True)
    both = (q.float() * k.float()).repeat_interleave(heads // k.shape[1], 1)
    return (both * weight).sum_to_size(bonus.shape).to(bonus.dtype)


def weighing(v, k, tile):
    """What the passes that make the gradient of the logarithms leave for `slopes_kernel`, and that gradient [B, H, T, D].

    States that enter chunks; for each step, and for each chunk, what its columns add up to (`replay_kernel`, WEIGH).
    """
    batch, heads, t, d_v = v.shape
    d_k, device = k.shape[-1], v.device
    width, rows = (d_v, d_k) if BY_VALUE else (d_k, d_v + NORMALISED)
    config, _ = plan(TILES if BY_VALUE else EXCHANGED_TILES, batch * heads, width, t, device, tile)
    chunks, blocks = tile_count(t, config["C"]), tile_count(width, config["BLOCK_M"])
    states = torch.empty((batch, heads, chunks, rows, width), dtype=SAVED_DTYPE, device=device)
    columns = width if VECTOR else blocks
    sums, differences = torch.empty((2, batch, heads, t, columns), dtype=torch.float32, device=device)
    shares = width if VECTOR else blocks * (config["C"] + (d_k if BY_VALUE else d_v) + NORMALISED * config["BLOCK_M"])
    parts = torch.empty((batch, heads, chunks, shares), dtype=torch.float32, device=device)
    slopes = torch.empty((batch, heads, t, width if VECTOR else 1), dtype=torch.float32, device=device)
    return (states, sums, differences, parts), slopes, config["C"]


def finish_slopes(start, kept, slopes, chunk):
    """The gradient of the logarithms."""
    _, sums, differences, parts = kept
    batch, heads, t, width = slopes.shape
    values = {
        "Sums": sums, "Differences": differences, "Parts": parts, "Slopes": slopes, "T": t, "CHUNKS": parts.shape[2],
        "BLOCKS": sums.shape[-1], "SHARES": parts.shape[-1],
    }  # fmt: skip
    block = min(64, width_of(width))
    grid = batch * heads * parts.shape[2], tile_count(width, block), 1
    launch(start, slopes_kernel, grid, values, D=width, C=chunk, BLOCK=block, num_warps=4 if VECTOR else 1)


def decay_gradients(slopes, gate, rate):
    """Of gate and rate, from that of the logarithm [B, H, T, D]."""
    slopes = slopes[..., None, :] if BY_VALUE else slopes[..., None]
    if rate is None:
        return slopes.sum_to_size(gate.shape).to(gate.dtype), None
    by_gate = (slopes * rate.float()).sum_to_size(gate.shape).to(gate.dtype)
    return by_gate, (slopes * gate.float()).sum_to_size(rate.shape).to(rate.dtype)


def backward(
    grad, grad_normaliser, grad_final, v, q, k, *, gate=None, rate=None, bonus=None, initial=None, segments=None, tile=None,
    weigh=True,
):  # fmt: skip
    """Gradients `{"v": ..., "q": ..., "k": ..., ...}` of each given operand of `forward`; gradients of results may be None.

    `weigh`: whether those of gate and rate are wanted.
    """
    batch, heads, t, d_v = v.shape
    device = v.device
    grad = torch.zeros_like(v) if grad is None else grad.to(v.dtype)
    along_ones = grad_normaliser
    if NORMALISED and grad_normaliser is None:
        along_ones = torch.zeros((1, 1, 1), device=device).expand(batch, heads, t)
    grouped = k.shape[1] != heads
    empty = lambda x, dtype=None: torch.empty((batch, heads, t, x.shape[-1]), dtype=dtype or x.dtype, device=device)  # noqa: E731
    dv = torch.empty_like(v)
    dq, dk = (empty(x, torch.float32) if grouped else torch.empty_like(x) for x in (q, k))
    d_initial = None if initial is None else torch.empty((batch, heads, *initial.shape[2:]), dtype=torch.float32, device=device)
    kept, slopes, chunk = (None,) * 4, None, None
    if GATED:
        if weigh:
            kept, slopes, chunk = weighing(v, k, tile)

    def run(start):
        gates = along_state(gate, k, v), along_state(rate, k, v)
        wide_bonus = None if bonus is None else bonus.expand(batch, heads, t, -1)
        transposed = lambda x: None if x is None else x.transpose(-1, -2)  # noqa: E731
        shared = {"segments": segments, "chosen": tile, "summed": {}}
        weighed = lambda along, way: {"along": along, "weigh": way, "kept": kept} if slopes is not None else {}  # noqa: E731
        if BY_VALUE:
            if weigh:
                replay(start, q, k, v, gates, initial=initial, **weighed(grad, 1), **shared)
        replay(
            start, grad, v, k, gates, out=dq, initial=transposed(initial), bonus=wide_bonus, left=along_ones,
            extra=2 * NORMALISED, exchanged=True, **({} if BY_VALUE else weighed(q, 1)), **shared,
        )  # fmt: skip
        replay(
            start, k, q, grad, gates, out=dv, initial=None if grad_final is None else grad_final[..., :d_v], bonus=wide_bonus,
            reverse=True, **(weighed(v, 2) if BY_VALUE else {}), **shared,
        )  # fmt: skip
        replay(
            start, v, grad, q, gates, out=dk, initial=transposed(grad_final), final=transposed(d_initial), bonus=wide_bonus,
            right=along_ones, extra=3 * NORMALISED, reverse=True, exchanged=True, **({} if BY_VALUE else weighed(k, 2)), **shared,
        )  # fmt: skip
        if slopes is not None:
            finish_slopes(start, kept, slopes, chunk)

    begin(
        run, grad, v, q, k, gate, rate, bonus, initial, grad_final, along_ones, dq, dk, dv, d_initial, *kept, slopes, segments, tile
    )  # fmt: skip
    found = {"v": dv, "q": dq, "k": dk}
    if grouped:
        found |= {"q": gathered(dq, q.shape[1]).to(q.dtype), "k": gathered(dk, k.shape[1]).to(k.dtype)}
    if GATED:
        found["gate"], found["rate"] = decay_gradients(slopes, gate, rate) if weigh else (None, None)
    if BONUS:
        found["bonus"] = own_part(grad, q, k, v, bonus)
    if initial is not None:
        found["initial"] = first_decay(d_initial, gate, rate).to(initial.dtype)
    return found


def first_decay(d_initial, gate, rate):
    """The gradient of the initial state from that of the state after the first decay."""
    if not GATED or BEFORE:
        return d_initial
    first = gate[:, :, 0].float() if rate is None else gate[:, :, 0].float() * rate[:, :, 0].float()
    return d_initial * first.exp()
