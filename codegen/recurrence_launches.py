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
    VECTOR,
    carry_kernel,
    replay_kernel,
    step_kernel,
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


def replay(
    start, read, write, value, gates, *,
    out=None, normaliser=None, initial=None, final=None, bonus=None, left=None, right=None, extra=0,
    reverse=False, exchanged=False, along=None, weigh=0, kept=None, segments=None, chosen=None,
):  # fmt: skip
    """One pass over time. `read`, `write` [B, Hx, T, N], `value` [B, Hx, T, M]; of `extra` and `weigh` tells the kernel."""
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
    states, sums, slopes = kept or (None, None, None)
    values = {
        "Q": read, "K": write, "V": value, "Out": out, "Normaliser": normaliser, "Gate": gate, "Rate": rate, "Bonus": bonus,
        "Left": left, "Right": right, "Along": along, "States": states, "Sums": sums, "GradGate": slopes,
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
    slots, totals = entering(start, values, ends, options, (batch, heads, segments, n + (extra >= 2), m + (extra == 1)), grid)
    del totals
    values |= {"Initial": slots, "Final": None, **strided("i", "bhsnm", slots), **strided("f", "bhsnm", None)}
    launch(start, replay_kernel, grid, values, EMIT=True, WEIGH=weigh, START=True, FINISH=False, **options)


def entering(start, values, ends, options, shape, grid):
    """The states that enter each segment, [B, H, segments, N, M], from what each segment adds to a state and leaves of it."""
    batch, heads, segments, rows, width = shape
    device = values["K"].device
    slots = torch.empty(shape, dtype=torch.float32, device=device)
    totals = torch.empty((*shape[:3], (options["M"] if options["COLUMNS"] else options["N"]) if VECTOR else 1), device=device)
    summed = values | {"Totals": totals, "Initial": None, "Final": slots, "Out": None, "Normaliser": None}
    summed |= {**strided("i", "bhsnm", None), **strided("f", "bhsnm", slots)}
    launch(start, replay_kernel, grid, summed, EMIT=False, WEIGH=0, START=False, FINISH=True, **options)
    launch(
        start, carry_kernel, (batch * heads, tile_count(rows, 16), tile_count(width, 64)),
        {**ends, "Slots": slots, "Totals": totals, "H": heads, "SEGMENTS": segments},
        COLUMNS=options["COLUMNS"], START=ends["Initial"] is not None, FINISH=ends["Final"] is not None, ROWS=rows, WIDTH=width,
        BLOCK_N=16, BLOCK_M=64, num_warps=4,
    )  # fmt: skip
    return slots, totals


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
    gates = along_state(gate, k, v), along_state(rate, k, v)
    bonus = None if bonus is None else bonus.expand(batch, heads, t, -1)

    def run(start):
        if t <= FEW:
            step(start, q, k, v, gates, out, normaliser, initial, final, bonus)
        else:
            replay(
                start, q, k, v, gates, out=out, normaliser=normaliser, initial=initial, final=final, bonus=bonus,
                extra=int(NORMALISED), segments=segments, chosen=tile,
            )  # fmt: skip

    begin(run, v, q, k)
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


def decay_gradients(slopes, gate, rate, v):
    """Of gate and rate, from that of the logarithm: [B, H, T, D], or [B, H, T, parts] to be summed."""
    if VECTOR:
        slopes = slopes[..., None, :] if BY_VALUE else slopes[..., None]
    else:
        slopes = slopes.sum(-1)[..., None, None]
    if rate is None:
        return slopes.sum_to_size(gate.shape).to(gate.dtype), None
    by_gate = (slopes * rate.float()).sum_to_size(gate.shape).to(gate.dtype)
    return by_gate, (slopes * gate.float()).sum_to_size(rate.shape).to(rate.dtype)


def backward(
    grad, grad_normaliser, grad_final, v, q, k, *, gate=None, rate=None, bonus=None, initial=None, segments=None, tile=None
):  # fmt: skip
    """Gradients `{"v": ..., "q": ..., "k": ..., ...}` of each given operand of `forward`; gradients of results may be None."""
    batch, heads, t, d_v = v.shape
    d_k, device = k.shape[-1], v.device
    grad = torch.zeros_like(v) if grad is None else grad.to(v.dtype)
    along_ones = grad_normaliser
    if NORMALISED and grad_normaliser is None:
        along_ones = torch.zeros((1, 1, 1), device=device).expand(batch, heads, t)
    gates = along_state(gate, k, v), along_state(rate, k, v)
    wide_bonus = None if bonus is None else bonus.expand(batch, heads, t, -1)
    grouped = k.shape[1] != heads
    empty = lambda x, dtype=None: torch.empty((batch, heads, t, x.shape[-1]), dtype=dtype or x.dtype, device=device)  # noqa: E731
    dv = torch.empty_like(v)
    dq, dk = (empty(x, torch.float32) if grouped else torch.empty_like(x) for x in (q, k))
    d_initial = None if initial is None else torch.empty((batch, heads, *initial.shape[2:]), dtype=torch.float32, device=device)
    transposed = lambda x: None if x is None else x.transpose(-1, -2)  # noqa: E731
    width = d_v if BY_VALUE else d_k
    kept = None
    if GATED:
        weighing, _ = plan(TILES if BY_VALUE else EXCHANGED_TILES, batch * heads, width, t, device, tile)
        columns = width if VECTOR else tile_count(width, weighing["BLOCK_M"])
        rows = d_k if BY_VALUE else d_v + NORMALISED
        states = torch.empty((batch, heads, tile_count(t, weighing["C"]), rows, width), dtype=SAVED_DTYPE, device=device)
        sums = torch.empty((2, batch, heads, t, columns), dtype=torch.float32, device=device)
        kept = states, sums[0], sums[1]

    def weighed(along, weigh, wanted):
        return {"along": along, "weigh": weigh, "kept": kept} if GATED and wanted else {}

    def run(start):
        if BY_VALUE:
            replay(start, q, k, v, gates, initial=initial, segments=segments, chosen=tile, **weighed(grad, 1, True))
        replay(
            start, grad, v, k, gates, out=dq, initial=transposed(initial), bonus=wide_bonus, left=along_ones,
            extra=2 * NORMALISED, exchanged=True, segments=segments, chosen=tile, **weighed(q, 1, not BY_VALUE),
        )  # fmt: skip
        replay(
            start, k, q, grad, gates, out=dv, initial=None if grad_final is None else grad_final[..., :d_v], bonus=wide_bonus,
            reverse=True, segments=segments, chosen=tile, **weighed(v, 2, BY_VALUE),
        )  # fmt: skip
        replay(
            start, v, grad, q, gates, out=dk, initial=transposed(grad_final), final=transposed(d_initial), bonus=wide_bonus,
            right=along_ones, extra=3 * NORMALISED, reverse=True, exchanged=True, segments=segments, chosen=tile,
            **weighed(k, 2, not BY_VALUE),
        )  # fmt: skip

    begin(run, grad, v, q, k)
    found = {"v": dv, "q": dq, "k": dk}
    if grouped:
        found |= {"q": gathered(dq, q.shape[1]).to(q.dtype), "k": gathered(dk, k.shape[1]).to(k.dtype)}
    if GATED:
        found["gate"], found["rate"] = decay_gradients(sums[1], gate, rate, v)
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
