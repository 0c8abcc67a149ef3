"""The attention kernels for Hopper: tensor memory accelerator, asynchronous matrix products, warps of different duties.

They replace `launch_forward`, `launch_dq` and `launch_dkv` of `attention_kernels`, whose hooks, flags and groups of arguments
they share. In each program one warp (the producer) copies tiles into rings of shared memory, and two groups of four warps (the
consumers) each compute half of the rows:

    forward, dQ   64 of BLOCK_M = 128 queries a consumer, a ring of keys and one of values
    dK, dV        64 of BLOCK_N = 128 keys a consumer, a ring of queries and one of output gradients

A ring of n slots has two barriers a slot: `ready` (the copy has landed) and `free` (both consumers are done). `at` counts the
tiles since the start: tile `at` is in slot at % n, and the parity of at // n tells its round from the one before.

Positions number the tiles that a program visits, [start, stop); those in [full_start, full_stop) need no mask.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_kernels import (
    BY_HEAD,
    DKV_PASSES,
    FOLDED,
    HEAD,
    KEY_HEAD,
    MEAN,
    ONLINE,
    PER_HEAD,
    RUNTIME,
    SCALE,
    SCALED,
    SINK,
    SLOPE_LEFT,
    SLOPED,
    TABLE,
    ZERO,
    key_range,
    load_cols,
    load_fixed,
    load_rows,
    query_range,
    score,
    score_and_slope,
    sink_logit,
    table_line,
    visible,
    weight,
)  # fmt: skip
from .launching import tile_count, width_of
from .primitives import LOG2E, mean_of_values, tile_range, wide

CROWDED = gl.constexpr(False)  # masks need many registers: tiles with a mask are computed without overlap

# ----------------------------------------------------------------------------------------------------------------------- Rings


@gluon.jit
def barriers(SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr):
    """The barriers of a program, in one allocation: `ready` and `free` of what stays for a piece of work; from RING_A on `ready`,
    then `free` of every slot of ring A; likewise of ring B."""
    made = gl.allocate_shared_memory(gl.int64, [RING_A + 2 * SLOTS_A + 2 * SLOTS_B, 1], mbarrier.MBarrierLayout())
    mbarrier.init(made.index(0), count=1)
    mbarrier.init(made.index(1), count=2)
    for slot in gl.static_range(SLOTS_A):
        mbarrier.init(made.index(RING_A + slot), count=1)
        mbarrier.init(made.index(RING_A + SLOTS_A + slot), count=2)
    for slot in gl.static_range(SLOTS_B):
        mbarrier.init(made.index(RING_A + 2 * SLOTS_A + slot), count=1)
        mbarrier.init(made.index(RING_A + 2 * SLOTS_A + SLOTS_B + slot), count=2)
    fence_async_shared()
    return made


RING_A = gl.constexpr(2)  # its first barrier


@gluon.jit
def await_ready(bars, at, FIRST: gl.constexpr, SLOTS: gl.constexpr):
    """Wait for the copy of tile `at` of the ring whose barriers start at FIRST; its slot."""
    slot = at % SLOTS
    mbarrier.wait(bars.index(FIRST + slot), (at // SLOTS) & 1)
    return slot


@gluon.jit
def leave(bars, slot, FIRST: gl.constexpr, SLOTS: gl.constexpr):
    """Give a slot back to the producer."""
    mbarrier.arrive(bars.index(FIRST + SLOTS + slot), count=1)


@gluon.jit
def await_free(bars, at, FIRST: gl.constexpr, SLOTS: gl.constexpr):
    """Wait until the slot of tile `at` has been left by the tile before; the slot."""
    slot = at % SLOTS
    mbarrier.wait(bars.index(FIRST + SLOTS + slot), ((at // SLOTS) & 1) ^ 1)
    return slot


@gluon.jit
def feed(source, ring, bars, b, h, t, at, FIRST: gl.constexpr, SLOTS: gl.constexpr):
    """Start the copy of rows from t on of one head into the slot of tile `at`."""
    slot = await_free(bars, at, FIRST, SLOTS)
    ready = bars.index(FIRST + slot)
    mbarrier.expect(ready, source.block_type.nbytes)
    tma.async_copy_global_to_shared(source, [b, h, t, 0], ready, ring.index(slot))


@gluon.jit
def write_rows(
    base, first, left, values, stride_t, stride_d, ROWS: gl.constexpr, WIDTH: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr
):
    """Write values [ROWS, WIDTH] from row `first` on of the matrix at `base`, up to row `left` and column D."""
    t = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    at = base + (t.to(gl.int64) * stride_t + d * stride_d)
    gl.store(at, values.to(base.dtype.element_ty), mask=(t < left) & (d < D))


@gluon.jit
def head_base(tensor, b, h, stride_b, stride_h):
    """The first element of one head."""
    return tensor + b.to(gl.int64) * stride_b + h.to(gl.int64) * stride_h


# ------------------------------------------------------------------------------------------------------------------- Positions


@gluon.jit
def key_positions(b, h, m, TQ, TK, fixed, captures, table, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """start, full_start, full_stop, stop of the key tiles of query tile m, and the list of them, if a table has it."""
    if TABLE:
        line = table_line(b, h, m, table)
        full = gl.load(line)
        return 0, 0, full, full + gl.load(line + 1), line + 2
    else:
        i0 = m * BLOCK_M
        lo, full_lo, full_hi, hi = key_range(b, h, i0, gl.minimum(i0 + BLOCK_M, TQ) - 1, TQ, TK, fixed, captures)
        start, full_start, full_stop, stop = tile_range(lo, full_lo, full_hi, hi, BLOCK_N)
        return start, full_start, full_stop, stop, 0


@gluon.jit
def query_positions(b, h, n, TQ, TK, fixed, captures, table, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """start, full_start, full_stop, stop of the query tiles of key tile n, and the list of them, if a table has it."""
    if TABLE:
        line = table_line(b, h, n, table)
        full = gl.load(line)
        return 0, 0, full, full + gl.load(line + 1), line + 2
    else:
        j0 = n * BLOCK_N
        lo, full_lo, full_hi, hi = query_range(b, h, j0, gl.minimum(j0 + BLOCK_N, TK) - 1, TQ, TK, fixed, captures)
        start, full_start, full_stop, stop = tile_range(lo, full_lo, full_hi, hi, BLOCK_M)
        return start, full_start, full_stop, stop, 0


@gluon.jit
def tile_at(position, full_stop, tiles, LENGTH):
    """The tile of a position; LENGTH is the room of the table's first list, of full tiles."""
    if TABLE:
        return gl.load(tiles + position + gl.where(position >= full_stop, LENGTH - full_stop, 0))
    else:
        return position


# --------------------------------------------------------------------------------------------------------------------- Forward


@gluon.jit
def place(work, HEADS, H, M_TILES):
    """Batch entry, head and query tile of a piece of work: the last tiles, the longest under causality, come first."""
    return (work % HEADS) // H, (work % HEADS) % H, M_TILES - 1 - work // HEADS


@gluon.jit
def forward_producer(
    q_source, k_source, v_source, q_ring, k_ring, v_ring, bars,
    HEADS, H, GROUP, M_TILES, TQ, TK, captures, table,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr,
):  # fmt: skip
    """Copies the queries of each piece of work, then its keys and values, tile by tile."""
    at = 0
    turn = 0
    for work in range(gl.program_id(0), HEADS * M_TILES, gl.num_programs(0)):
        b, h, m = place(work, HEADS, H, M_TILES)
        fixed = load_fixed(b, h, captures)
        mbarrier.wait(bars.index(1), (turn & 1) ^ 1)
        mbarrier.expect(bars.index(0), 2 * q_source.block_type.nbytes)
        for half in gl.static_range(2):
            i0 = m * BLOCK_M + half * (BLOCK_M // 2)
            tma.async_copy_global_to_shared(q_source, [b, h, i0, 0], bars.index(0), q_ring.index(half))
        start, full_start, full_stop, stop, tiles = key_positions(b, h, m, TQ, TK, fixed, captures, table, BLOCK_M, BLOCK_N)
        for position in range(start, stop):
            j0 = tile_at(position, full_stop, tiles, gl.cdiv(TK, BLOCK_N)) * BLOCK_N
            feed(k_source, k_ring, bars, b, h // GROUP, j0, at, RING_A, SLOTS_A)
            feed(v_source, v_ring, bars, b, h // GROUP, j0, at, RING_A + 2 * SLOTS_A, SLOTS_B)
            at += 1
        turn += 1  # noqa: SIM113


@gluon.jit
def soften(
    s, total, peak, n, b, h, i, TQ, TK, fixed, rows, captures,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, DTYPE: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Weights of a tile of scores [64, N] against the maximum so far, as an operand; the new normaliser [64], maximum [64] and the
    factor [64] by which what was summed before shrinks."""
    j = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))[None, :]
    inside = i < TQ
    cols = load_cols(b, h, gl.minimum(j, TK - 1), fixed, captures)
    if MASKED:
        inside = inside & (j < TK)
    if SCALED:
        x = s
    else:
        x = score(s, b, h, i, j, inside, fixed, rows, cols, captures)
    if MASKED:
        x = gl.where(visible(b, h, i, j, inside, fixed, rows, cols, captures) & (j < TK), x, float("-inf"))
    if ONLINE:
        if SCALED:
            new_peak = gl.maximum(peak, gl.max(x, 1) * SCALE)
            p = weight(x * SCALE - new_peak[:, None])
        else:
            new_peak = gl.maximum(peak, gl.max(x, 1))
            p = weight(x - new_peak[:, None])
        decay = weight(peak - new_peak)
        total = total * decay + gl.sum(p, 1)
    else:
        new_peak = peak
        p = weight(x)
        decay = total
        total = total + gl.sum(p, 1)
    return gl.convert_layout(p.to(DTYPE), P_LAYOUT), total, new_peak, decay


@gluon.jit
def attend_pipelined(
    acc, total, peak, p, at, q, k_ring, v_ring, bars, tiles, first, last, full_stop, b, h, i, TQ, TK,
    fixed, rows, captures, MASKED: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_QK: gl.constexpr, BLOCK_V: gl.constexpr,
    SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr, DTYPE: gl.constexpr,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, ACC_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Adds positions [first, last): scores of one tile while the weights `p` of the tile before meet their values."""
    zero = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    for position in range(first, last):
        n = tile_at(position, full_stop, tiles, gl.cdiv(TK, BLOCK_N))
        slot = await_ready(bars, at, RING_A, SLOTS_A)
        pending_s = warpgroup_mma(
            q, k_ring.index(slot).reshape([BLOCK_N, BLOCK_QK]).permute([1, 0]), zero, use_acc=False, is_async=True
        )  # fmt: skip
        before = await_ready(bars, at - 1, RING_A + 2 * SLOTS_A, SLOTS_B)
        pending_acc = warpgroup_mma(p, v_ring.index(before).reshape([BLOCK_N, BLOCK_V]), acc, is_async=True)
        if MASKED and CROWDED:
            s, acc = warpgroup_mma_wait(0, [pending_s, pending_acc])
        else:
            s = warpgroup_mma_wait(1, [pending_s])
        leave(bars, slot, RING_A, SLOTS_A)
        next_p, total, peak, decay = soften(
            s, total, peak, n, b, h, i, TQ, TK, fixed, rows, captures, MASKED, BLOCK_N, DTYPE, S_LAYOUT, P_LAYOUT,
        )  # fmt: skip
        if not (MASKED and CROWDED):
            acc = warpgroup_mma_wait(0, [pending_acc])
        leave(bars, before, RING_A + 2 * SLOTS_A, SLOTS_B)
        if ONLINE:
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, ACC_LAYOUT))[:, None]
        p = next_p
        at += 1
    return acc, total, peak, p, at


@gluon.jit
def forward_consumer(
    q_ring, k_ring, v_ring, bars, Out, Lse,
    stride_ob, stride_oh, stride_ot, stride_od, HEADS, H, GROUP, M_TILES, TQ, TK, captures, table,
    HALF: gl.constexpr, D_V: gl.constexpr, BLOCK_QK: gl.constexpr, BLOCK_V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Half of the queries of each piece of work: O [64, D_V] and log-sum-exp [64]."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    q = q_ring.index(HALF).reshape([64, BLOCK_QK])
    zero = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    at = 0
    turn = 0
    for work in range(gl.program_id(0), HEADS * M_TILES, gl.num_programs(0)):
        b, h, m = place(work, HEADS, H, M_TILES)
        i0 = m * BLOCK_M + HALF * 64
        i = i0 + gl.arange(0, 64, ROW)[:, None]  # [64, 1]
        fixed = load_fixed(b, h, captures)
        rows = load_rows(b, h, gl.minimum(i, TQ - 1), fixed, captures)
        acc = gl.zeros([64, BLOCK_V], gl.float32, ACC_LAYOUT)
        total = gl.zeros([64], gl.float32, ROW)
        peak = gl.full([64], -3.4028234663852886e38, gl.float32, ROW)
        if SINK:
            logit = gl.zeros([64, 1], gl.float32, S_LAYOUT) + sink_logit(b, h, i, fixed, rows, captures)
            logit = gl.sum(logit, 1)
            if FOLDED:
                logit = logit * LOG2E
            peak = gl.maximum(peak, logit)
            total = weight(logit - peak)
        start, full_start, full_stop, stop, tiles = key_positions(b, h, m, TQ, TK, fixed, captures, table, BLOCK_M, BLOCK_N)
        mbarrier.wait(bars.index(0), turn & 1)
        if start < stop:
            slot = await_ready(bars, at, RING_A, SLOTS_A)
            s = warpgroup_mma(q, k_ring.index(slot).reshape([BLOCK_N, BLOCK_QK]).permute([1, 0]), zero, use_acc=False)
            leave(bars, slot, RING_A, SLOTS_A)
            n = tile_at(start, full_stop, tiles, gl.cdiv(TK, BLOCK_N))
            p, total, peak, decay = soften(
                s, total, peak, n, b, h, i, TQ, TK, fixed, rows, captures, True, BLOCK_N, DTYPE, S_LAYOUT, P_LAYOUT,
            )  # fmt: skip
            at += 1
            start += 1
            if HEAD:
                acc, total, peak, p, at = attend_pipelined(
                    acc, total, peak, p, at, q, k_ring, v_ring, bars, tiles,
                    start, gl.minimum(full_start, stop), full_stop, b, h, i, TQ, TK, fixed, rows, captures,
                    True, BLOCK_N, BLOCK_QK, BLOCK_V, SLOTS_A, SLOTS_B, DTYPE, S_LAYOUT, P_LAYOUT, ACC_LAYOUT,
                )  # fmt: skip
            acc, total, peak, p, at = attend_pipelined(
                acc, total, peak, p, at, q, k_ring, v_ring, bars, tiles,
                gl.maximum(start, full_start), full_stop, full_stop, b, h, i, TQ, TK, fixed, rows, captures,
                False, BLOCK_N, BLOCK_QK, BLOCK_V, SLOTS_A, SLOTS_B, DTYPE, S_LAYOUT, P_LAYOUT, ACC_LAYOUT,
            )  # fmt: skip
            acc, total, peak, p, at = attend_pipelined(
                acc, total, peak, p, at, q, k_ring, v_ring, bars, tiles,
                gl.maximum(start, full_stop), stop, full_stop, b, h, i, TQ, TK, fixed, rows, captures,
                True, BLOCK_N, BLOCK_QK, BLOCK_V, SLOTS_A, SLOTS_B, DTYPE, S_LAYOUT, P_LAYOUT, ACC_LAYOUT,
            )  # fmt: skip
            mbarrier.arrive(bars.index(1), count=1)
            slot = await_ready(bars, at - 1, RING_A + 2 * SLOTS_A, SLOTS_B)
            acc = warpgroup_mma(p, v_ring.index(slot).reshape([BLOCK_N, BLOCK_V]), acc)
            leave(bars, slot, RING_A + 2 * SLOTS_A, SLOTS_B)
        else:
            mbarrier.arrive(bars.index(1), count=1)
        lse = gl.log(total)
        if ONLINE:
            if FOLDED:
                lse = lse + peak / LOG2E
            else:
                lse = lse + peak
        if ZERO:
            total = gl.where(total == 0, 1.0, total)
        acc = acc / gl.convert_layout(total, gl.SliceLayout(1, ACC_LAYOUT))[:, None]
        write_rows(head_base(Out, b, h, stride_ob, stride_oh), i0, TQ, acc, stride_ot, stride_od, 64, BLOCK_V, D_V, ACC_LAYOUT)
        t = i0 + gl.arange(0, 64, ROW)
        gl.store(Lse + (b * H + h).to(gl.int64) * TQ + t, lse, mask=t < TQ)
        turn += 1  # noqa: SIM113


@gluon.jit(do_not_specialize=RUNTIME)
def forward_hopper_kernel(
    q_source, k_source, v_source, Out, Lse, table, stride_ob, stride_oh, stride_ot, stride_od,
    HEADS, H, GROUP, M_TILES, TQ, TK, captures,
    D_V: gl.constexpr, BLOCK_QK: gl.constexpr, BLOCK_V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr,
):  # fmt: skip
    """Every piece of work whose number is this program's modulo the number of programs."""
    DTYPE: gl.constexpr = q_source.dtype
    q_ring = gl.allocate_shared_memory(DTYPE, [2, 1, 1, BLOCK_M // 2, BLOCK_QK], q_source.layout)
    k_ring = gl.allocate_shared_memory(DTYPE, [SLOTS_A, 1, 1, BLOCK_N, BLOCK_QK], k_source.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [SLOTS_B, 1, 1, BLOCK_N, BLOCK_V], v_source.layout)
    bars = barriers(SLOTS_A, SLOTS_B)
    gl.warp_specialize(
        [
            (forward_producer, (
                q_source, k_source, v_source, q_ring, k_ring, v_ring, bars,
                HEADS, H, GROUP, M_TILES, TQ, TK, captures, table, BLOCK_M, BLOCK_N, SLOTS_A, SLOTS_B,
            )),
            (forward_consumer, (
                q_ring, k_ring, v_ring, bars, Out, Lse,
                stride_ob, stride_oh, stride_ot, stride_od, HEADS, H, GROUP, M_TILES, TQ, TK, captures, table,
                gl.constexpr(0), D_V, BLOCK_QK, BLOCK_V, BLOCK_M, BLOCK_N, SLOTS_A, SLOTS_B, DTYPE,
            )),
            (forward_consumer, (
                q_ring, k_ring, v_ring, bars, Out, Lse,
                stride_ob, stride_oh, stride_ot, stride_od, HEADS, H, GROUP, M_TILES, TQ, TK, captures, table,
                gl.constexpr(1), D_V, BLOCK_QK, BLOCK_V, BLOCK_M, BLOCK_N, SLOTS_A, SLOTS_B, DTYPE,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------------- dQ


@gluon.jit
def dq_producer(
    k_source, v_source, k_ring, v_ring, bars, b, h, h_kv, m, TQ, TK, captures, table,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr,
):  # fmt: skip
    """Copies keys and values, tile by tile."""
    fixed = load_fixed(b, h, captures)
    start, full_start, full_stop, stop, tiles = key_positions(b, h, m, TQ, TK, fixed, captures, table, BLOCK_M, BLOCK_N)
    for position in range(start, stop):
        at = position - start
        j0 = tile_at(position, full_stop, tiles, gl.cdiv(TK, BLOCK_N)) * BLOCK_N
        feed(k_source, k_ring, bars, b, h_kv, j0, at, RING_A, SLOTS_A)
        feed(v_source, v_ring, bars, b, h_kv, j0, at, RING_A + 2 * SLOTS_A, SLOTS_B)


@gluon.jit
def gather_dq_pipelined(
    dq, s, q, g, norm, delta, k_ring, v_ring, bars, tiles, start, first, last, full_stop, stop,
    b, h, i, TQ, TK, fixed, rows, captures, MASKED: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_QK: gl.constexpr, BLOCK_V: gl.constexpr, SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr, DTYPE: gl.constexpr,
    S_LAYOUT: gl.constexpr, DS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Adds positions [first, last) to dQ [64, D_QK]; `s` holds the products q . k of the position to come."""
    zero = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    for position in range(first, last):
        at = position - start
        v_slot = await_ready(bars, at, RING_A + 2 * SLOTS_A, SLOTS_B)
        v = v_ring.index(v_slot).reshape([BLOCK_N, BLOCK_V]).permute([1, 0])
        LATE: gl.constexpr = MASKED and CROWDED
        if not LATE:
            pending_dp = warpgroup_mma(g, v, zero - delta, is_async=True)
        n = tile_at(position, full_stop, tiles, gl.cdiv(TK, BLOCK_N))
        j = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))[None, :]  # [1, N]
        inside = i < TQ
        cols = load_cols(b, h, gl.minimum(j, TK - 1), fixed, captures)
        if MASKED:
            inside = inside & (j < TK)
        x, slope = score_and_slope(s, b, h, i, j, inside, fixed, rows, cols, captures)
        if MASKED:
            x = gl.where(visible(b, h, i, j, inside, fixed, rows, cols, captures) & (j < TK), x, float("-inf"))
        p = weight(x - norm)
        if SLOPED:
            p = p * slope
        if LATE:
            pending_dp = warpgroup_mma(g, v, zero - delta, is_async=True)
        dp = warpgroup_mma_wait(0, [pending_dp])
        leave(bars, v_slot, RING_A + 2 * SLOTS_A, SLOTS_B)
        ds = gl.convert_layout((p * dp).to(DTYPE), DS_LAYOUT)
        k_slot = at % SLOTS_A
        pending_dq = warpgroup_mma(ds, k_ring.index(k_slot).reshape([BLOCK_N, BLOCK_QK]), dq, is_async=True)
        next_slot = await_ready(bars, gl.minimum(at + 1, stop - start - 1), RING_A, SLOTS_A)
        pending_s = warpgroup_mma(
            q, k_ring.index(next_slot).reshape([BLOCK_N, BLOCK_QK]).permute([1, 0]), zero, use_acc=False, is_async=True
        )  # fmt: skip
        s, dq = warpgroup_mma_wait(0, [pending_s, pending_dq])
        leave(bars, k_slot, RING_A, SLOTS_A)
    return dq, s


@gluon.jit
def dq_consumer(
    q_ring, g_ring, k_ring, v_ring, bars, Norm, Delta, GradQ,
    stride_db, stride_dh, stride_dt, stride_dd, stride_n, b, h, m, H, TQ, TK, captures, table,
    HALF: gl.constexpr, D_QK: gl.constexpr, BLOCK_QK: gl.constexpr, BLOCK_V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Half of the queries of a tile: dQ [64, D_QK]."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_QK, 16])
    DS_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, ACC_LAYOUT, 2)
    q = q_ring.index(HALF).reshape([64, BLOCK_QK])
    g = g_ring.index(HALF).reshape([64, BLOCK_V])
    i0 = m * BLOCK_M + HALF * 64
    i = i0 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))[:, None]  # [64, 1]
    fixed = load_fixed(b, h, captures)
    rows = load_rows(b, h, gl.minimum(i, TQ - 1), fixed, captures)
    line = (b * H + h).to(gl.int64) * stride_n + i
    norm = gl.load(Norm + line, mask=i < TQ, other=0.0)  # [64, 1]
    delta = gl.load(Delta + line, mask=i < TQ, other=0.0)
    dq = gl.zeros([64, BLOCK_QK], gl.float32, ACC_LAYOUT)
    start, full_start, full_stop, stop, tiles = key_positions(b, h, m, TQ, TK, fixed, captures, table, BLOCK_M, BLOCK_N)
    if start < stop:
        mbarrier.wait(bars.index(0), 0)
        slot = await_ready(bars, 0, RING_A, SLOTS_A)
        zero = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
        s = warpgroup_mma(q, k_ring.index(slot).reshape([BLOCK_N, BLOCK_QK]).permute([1, 0]), zero, use_acc=False)
        if HEAD:
            dq, s = gather_dq_pipelined(
                dq, s, q, g, norm, delta, k_ring, v_ring, bars, tiles,
                start, start, full_start, full_stop, stop, b, h, i, TQ, TK, fixed, rows, captures,
                True, BLOCK_N, BLOCK_QK, BLOCK_V, SLOTS_A, SLOTS_B, DTYPE, S_LAYOUT, DS_LAYOUT,
            )  # fmt: skip
        dq, s = gather_dq_pipelined(
            dq, s, q, g, norm, delta, k_ring, v_ring, bars, tiles,
            start, full_start, full_stop, full_stop, stop, b, h, i, TQ, TK, fixed, rows, captures,
            False, BLOCK_N, BLOCK_QK, BLOCK_V, SLOTS_A, SLOTS_B, DTYPE, S_LAYOUT, DS_LAYOUT,
        )  # fmt: skip
        dq, s = gather_dq_pipelined(
            dq, s, q, g, norm, delta, k_ring, v_ring, bars, tiles,
            start, full_stop, stop, full_stop, stop, b, h, i, TQ, TK, fixed, rows, captures,
            True, BLOCK_N, BLOCK_QK, BLOCK_V, SLOTS_A, SLOTS_B, DTYPE, S_LAYOUT, DS_LAYOUT,
        )  # fmt: skip
    base = head_base(GradQ, b, h, stride_db, stride_dh)
    write_rows(base, i0, TQ, dq * SLOPE_LEFT, stride_dt, stride_dd, 64, BLOCK_QK, D_QK, ACC_LAYOUT)


@gluon.jit(do_not_specialize=RUNTIME)
def dq_hopper_kernel(
    q_source, k_source, v_source, g_source, Norm, Delta, GradQ, table,
    stride_db, stride_dh, stride_dt, stride_dd, stride_n, H, GROUP, TQ, TK, captures,
    D_QK: gl.constexpr, BLOCK_QK: gl.constexpr, BLOCK_V: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: dQ [M, D_QK]."""
    DTYPE: gl.constexpr = q_source.dtype
    m = gl.num_programs(1) - 1 - gl.program_id(1)
    b = gl.program_id(0) // H
    h = gl.program_id(0) % H
    q_ring = gl.allocate_shared_memory(DTYPE, [2, 1, 1, BLOCK_M // 2, BLOCK_QK], q_source.layout)
    g_ring = gl.allocate_shared_memory(DTYPE, [2, 1, 1, BLOCK_M // 2, BLOCK_V], g_source.layout)
    k_ring = gl.allocate_shared_memory(DTYPE, [SLOTS_A, 1, 1, BLOCK_N, BLOCK_QK], k_source.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [SLOTS_B, 1, 1, BLOCK_N, BLOCK_V], v_source.layout)
    bars = barriers(SLOTS_A, SLOTS_B)
    mbarrier.expect(bars.index(0), 2 * (q_source.block_type.nbytes + g_source.block_type.nbytes))
    for half in gl.static_range(2):
        i0 = m * BLOCK_M + half * (BLOCK_M // 2)
        tma.async_copy_global_to_shared(q_source, [b, h, i0, 0], bars.index(0), q_ring.index(half))
        tma.async_copy_global_to_shared(g_source, [b, h, i0, 0], bars.index(0), g_ring.index(half))
    gl.warp_specialize(
        [
            (dq_producer, (
                k_source, v_source, k_ring, v_ring, bars, b, h, h // GROUP, m, TQ, TK, captures, table,
                BLOCK_M, BLOCK_N, SLOTS_A, SLOTS_B,
            )),
            (dq_consumer, (
                q_ring, g_ring, k_ring, v_ring, bars, Norm, Delta, GradQ,
                stride_db, stride_dh, stride_dt, stride_dd, stride_n, b, h, m, H, TQ, TK, captures, table,
                gl.constexpr(0), D_QK, BLOCK_QK, BLOCK_V, BLOCK_M, BLOCK_N, SLOTS_A, SLOTS_B, DTYPE,
            )),
            (dq_consumer, (
                q_ring, g_ring, k_ring, v_ring, bars, Norm, Delta, GradQ,
                stride_db, stride_dh, stride_dt, stride_dd, stride_n, b, h, m, H, TQ, TK, captures, table,
                gl.constexpr(1), D_QK, BLOCK_QK, BLOCK_V, BLOCK_M, BLOCK_N, SLOTS_A, SLOTS_B, DTYPE,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------- dK, dV


@gluon.jit
def feed_queries(
    q_source, g_source, norm_source, delta_source, q_ring, g_ring, norm_ring, delta_ring, bars,
    at, b, h_first, members, n, TQ, TK, captures, table,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr,
):  # fmt: skip
    """Copies the query tiles that key tile n meets in heads [h_first, h_first + members): partial ones, full ones, partial ones."""
    h = h_first
    fixed = load_fixed(b, h, captures)
    start, full_start, full_stop, stop, tiles = query_positions(b, h, n, TQ, TK, fixed, captures, table, BLOCK_M, BLOCK_N)
    for part in gl.static_range(3):
        first = start if part == 0 else full_start if part == 1 else full_stop
        count = (full_start if part == 0 else full_stop if part == 1 else stop) - first
        for step in range(0, members * count):
            h = h_first + step // count
            i0 = tile_at(first + step % count, full_stop, tiles, gl.cdiv(TQ, BLOCK_M)) * BLOCK_M
            slot = await_free(bars, at, RING_A, SLOTS_A)
            ready = bars.index(RING_A + slot)
            mbarrier.expect(
                ready, q_source.block_type.nbytes + norm_source.block_type.nbytes + delta_source.block_type.nbytes
            )  # fmt: skip
            tma.async_copy_global_to_shared(q_source, [b, h, i0, 0], ready, q_ring.index(slot))
            tma.async_copy_global_to_shared(norm_source, [b, h, i0], ready, norm_ring.index(slot))
            tma.async_copy_global_to_shared(delta_source, [b, h, i0], ready, delta_ring.index(slot))
            feed(g_source, g_ring, bars, b, h, i0, at, RING_A + 2 * SLOTS_A, SLOTS_B)
            at += 1
    return at


@gluon.jit
def dkv_producer(
    q_source, g_source, norm_source, delta_source, q_ring, g_ring, norm_ring, delta_ring, bars,
    b, h_kv, GROUP, n, TQ, TK, captures, table,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr,
):  # fmt: skip
    """Copies queries, output gradients and row statistics of every head of the group."""
    at = 0
    if PER_HEAD:
        for h in range(h_kv * GROUP, (h_kv + 1) * GROUP):
            at = feed_queries(
                q_source, g_source, norm_source, delta_source, q_ring, g_ring, norm_ring, delta_ring,
                bars, at, b, h, 1, n, TQ, TK, captures, table, BLOCK_M, BLOCK_N, SLOTS_A, SLOTS_B,
            )  # fmt: skip
    else:
        at = feed_queries(
            q_source, g_source, norm_source, delta_source, q_ring, g_ring, norm_ring, delta_ring,
            bars, at, b, h_kv * GROUP, GROUP, n, TQ, TK, captures, table,
            BLOCK_M, BLOCK_N, SLOTS_A, SLOTS_B,
        )  # fmt: skip


@gluon.jit
def statistics(ring, slot, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """[1, M] of a ring of row statistics."""
    held = ring.index(slot)._reinterpret(gl.float32, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return held.load(gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def gather_dkv_pipelined(
    dk, dv, s, at, end, k, v, q_ring, g_ring, norm_ring, delta_ring, bars,
    tiles, first, last, full_stop, b, h_first, members, j, TQ, TK, captures,
    MASKED: gl.constexpr, WITH_K: gl.constexpr, WITH_V: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_QK: gl.constexpr, BLOCK_V: gl.constexpr, SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr, DTYPE: gl.constexpr,
    S_LAYOUT: gl.constexpr, K_LAYOUT: gl.constexpr, V_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Adds positions [first, last) of `members` heads to dK [64, D_QK] and dV [64, D_V]; `s` holds the products k . q of tile `at`,
    the last tile is `end` - 1."""
    zero = gl.zeros([64, BLOCK_M], gl.float32, S_LAYOUT)
    count = last - first
    if BY_HEAD:
        pass
    else:
        h = h_first
        fixed = load_fixed(b, h, captures)
        cols = load_cols(b, h, gl.minimum(j, TK - 1), fixed, captures)
    for step in range(0, members * count):
        h = h_first + step // count
        if BY_HEAD:
            fixed = load_fixed(b, h, captures)
            cols = load_cols(b, h, gl.minimum(j, TK - 1), fixed, captures)
        q_slot = at % SLOTS_A
        q = q_ring.index(q_slot).reshape([BLOCK_M, BLOCK_QK])
        g_slot = await_ready(bars, at, RING_A + 2 * SLOTS_A, SLOTS_B)
        g = g_ring.index(g_slot).reshape([BLOCK_M, BLOCK_V])
        LATE: gl.constexpr = MASKED and CROWDED
        if WITH_K and not LATE:
            delta = statistics(delta_ring, q_slot, BLOCK_M, S_LAYOUT)
            pending_dp = warpgroup_mma(v, g.permute([1, 0]), zero - delta, is_async=True)
        m = tile_at(first + step % count, full_stop, tiles, gl.cdiv(TQ, BLOCK_M))
        i = m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, S_LAYOUT))[None, :]  # [1, M]
        inside = j < TK
        rows = load_rows(b, h, gl.minimum(i, TQ - 1), fixed, captures)
        if MASKED:
            inside = inside & (i < TQ)
        x, slope = score_and_slope(s, b, h, i, j, inside, fixed, rows, cols, captures)
        if MASKED:
            x = gl.where(visible(b, h, i, j, inside, fixed, rows, cols, captures) & inside, x, float("-inf"))
        p = weight(x - statistics(norm_ring, q_slot, BLOCK_M, S_LAYOUT))
        if WITH_V:
            pending_dv = warpgroup_mma(gl.convert_layout(p.to(DTYPE), V_LAYOUT), g, dv, is_async=True)
        if WITH_K:
            if SLOPED:
                p = p * slope
            if LATE:
                delta = statistics(delta_ring, q_slot, BLOCK_M, S_LAYOUT)
                pending_dp = warpgroup_mma(v, g.permute([1, 0]), zero - delta, is_async=True)
            dp = warpgroup_mma_wait(1 if WITH_V and not LATE else 0, [pending_dp])
            if not WITH_V:
                leave(bars, g_slot, RING_A + 2 * SLOTS_A, SLOTS_B)
            ds = gl.convert_layout((p * dp).to(DTYPE), K_LAYOUT)
            pending_dk = warpgroup_mma(ds, q, dk, is_async=True)
        next_slot = await_ready(bars, gl.minimum(at + 1, end - 1), RING_A, SLOTS_A)
        pending_s = warpgroup_mma(
            k, q_ring.index(next_slot).reshape([BLOCK_M, BLOCK_QK]).permute([1, 0]), zero, use_acc=False, is_async=True
        )  # fmt: skip
        if WITH_K:
            if WITH_V:
                s, dk, dv = warpgroup_mma_wait(0, [pending_s, pending_dk, pending_dv])
            else:
                s, dk = warpgroup_mma_wait(0, [pending_s, pending_dk])
        else:
            s, dv = warpgroup_mma_wait(0, [pending_s, pending_dv])
        leave(bars, q_slot, RING_A, SLOTS_A)
        if WITH_V:
            leave(bars, g_slot, RING_A + 2 * SLOTS_A, SLOTS_B)
        at += 1
    return dk, dv, s, at


@gluon.jit
def gather_heads_pipelined(
    dk, dv, at, k, v, q_ring, g_ring, norm_ring, delta_ring, bars,
    b, h_first, members, n, j, TQ, TK, captures, table,
    WITH_K: gl.constexpr, WITH_V: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_QK: gl.constexpr, BLOCK_V: gl.constexpr, SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr, DTYPE: gl.constexpr,
    S_LAYOUT: gl.constexpr, K_LAYOUT: gl.constexpr, V_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Adds every query tile that key tile n meets, in heads [h_first, h_first + members), which all see the same mask."""
    h = h_first
    fixed = load_fixed(b, h, captures)
    start, full_start, full_stop, stop, tiles = query_positions(b, h, n, TQ, TK, fixed, captures, table, BLOCK_M, BLOCK_N)
    if start < stop:
        end = at + members * (stop - start)
        slot = await_ready(bars, at, RING_A, SLOTS_A)
        zero = gl.zeros([64, BLOCK_M], gl.float32, S_LAYOUT)
        s = warpgroup_mma(k, q_ring.index(slot).reshape([BLOCK_M, BLOCK_QK]).permute([1, 0]), zero, use_acc=False)
        if KEY_HEAD:
            dk, dv, s, at = gather_dkv_pipelined(
                dk, dv, s, at, end, k, v, q_ring, g_ring, norm_ring, delta_ring, bars,
                tiles, start, full_start, full_stop, b, h_first, members, j, TQ, TK, captures,
                True, WITH_K, WITH_V, BLOCK_M, BLOCK_QK, BLOCK_V, SLOTS_A, SLOTS_B, DTYPE, S_LAYOUT, K_LAYOUT, V_LAYOUT,
            )  # fmt: skip
        dk, dv, s, at = gather_dkv_pipelined(
            dk, dv, s, at, end, k, v, q_ring, g_ring, norm_ring, delta_ring, bars,
            tiles, full_start, full_stop, full_stop, b, h_first, members, j, TQ, TK, captures,
            False, WITH_K, WITH_V, BLOCK_M, BLOCK_QK, BLOCK_V, SLOTS_A, SLOTS_B, DTYPE, S_LAYOUT, K_LAYOUT, V_LAYOUT,
        )  # fmt: skip
        dk, dv, s, at = gather_dkv_pipelined(
            dk, dv, s, at, end, k, v, q_ring, g_ring, norm_ring, delta_ring, bars,
            tiles, full_stop, stop, full_stop, b, h_first, members, j, TQ, TK, captures,
            True, WITH_K, WITH_V, BLOCK_M, BLOCK_QK, BLOCK_V, SLOTS_A, SLOTS_B, DTYPE, S_LAYOUT, K_LAYOUT, V_LAYOUT,
        )  # fmt: skip
    return dk, dv, at


@gluon.jit
def dkv_consumer(
    k_ring, v_ring, q_ring, g_ring, norm_ring, delta_ring, bars, GradK, GradV,
    stride_db, stride_dh, stride_dt, stride_dd, stride_eb, stride_eh, stride_et, stride_ed, b, h_kv, GROUP, n, TQ, TK,
    captures, table, HALF: gl.constexpr, WITH_K: gl.constexpr, WITH_V: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr,
    BLOCK_QK: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Half of the keys of a tile, over all query heads of the group: dK [64, D_QK] and dV [64, D_V]."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    DK_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_QK, 16])
    DV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    K_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, DK_LAYOUT, 2)
    V_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, DV_LAYOUT, 2)
    k = k_ring.index(HALF).reshape([64, BLOCK_QK])
    if WITH_K:
        v = v_ring.index(HALF).reshape([64, BLOCK_V])
    else:
        v = k  # not read
    j0 = n * BLOCK_N + HALF * 64
    j = j0 + gl.arange(0, 64, gl.SliceLayout(1, S_LAYOUT))[:, None]  # [64, 1]
    if WITH_K:
        dk = gl.zeros([64, BLOCK_QK], gl.float32, DK_LAYOUT)
    else:
        dk = 0.0
    if WITH_V:
        dv = gl.zeros([64, BLOCK_V], gl.float32, DV_LAYOUT)
    else:
        dv = 0.0
    mbarrier.wait(bars.index(0), 0)
    at = 0
    if PER_HEAD:
        for h in range(h_kv * GROUP, (h_kv + 1) * GROUP):
            dk, dv, at = gather_heads_pipelined(
                dk, dv, at, k, v, q_ring, g_ring, norm_ring, delta_ring, bars,
                b, h, 1, n, j, TQ, TK, captures, table, WITH_K, WITH_V, BLOCK_M, BLOCK_N, BLOCK_QK, BLOCK_V,
                SLOTS_A, SLOTS_B, DTYPE, S_LAYOUT, K_LAYOUT, V_LAYOUT,
            )  # fmt: skip
    else:
        dk, dv, at = gather_heads_pipelined(
            dk, dv, at, k, v, q_ring, g_ring, norm_ring, delta_ring, bars,
            b, h_kv * GROUP, GROUP, n, j, TQ, TK, captures, table, WITH_K, WITH_V, BLOCK_M, BLOCK_N, BLOCK_QK, BLOCK_V,
            SLOTS_A, SLOTS_B, DTYPE, S_LAYOUT, K_LAYOUT, V_LAYOUT,
        )  # fmt: skip
    if WITH_K:
        base = head_base(GradK, b, h_kv, stride_db, stride_dh)
        write_rows(base, j0, TK, dk * SLOPE_LEFT, stride_dt, stride_dd, 64, BLOCK_QK, D_QK, DK_LAYOUT)
    if WITH_V:
        base = head_base(GradV, b, h_kv, stride_eb, stride_eh)
        write_rows(base, j0, TK, dv, stride_et, stride_ed, 64, BLOCK_V, D_V, DV_LAYOUT)


@gluon.jit(do_not_specialize=RUNTIME)
def dkv_hopper_kernel(
    q_source, k_source, v_source, g_source, norm_source, delta_source, GradK, GradV, table,
    stride_db, stride_dh, stride_dt, stride_dd, stride_eb, stride_eh, stride_et, stride_ed, H_KV, GROUP, TQ, TK, captures,
    WITH_K: gl.constexpr, WITH_V: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr,
    BLOCK_QK: gl.constexpr, BLOCK_V: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    SLOTS_A: gl.constexpr, SLOTS_B: gl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head: dK [N, D_QK] and dV [N, D_V]."""
    DTYPE: gl.constexpr = q_source.dtype
    n = gl.program_id(1)
    b = gl.program_id(0) // H_KV
    h_kv = gl.program_id(0) % H_KV
    k_ring = gl.allocate_shared_memory(DTYPE, [2, 1, 1, BLOCK_N // 2, BLOCK_QK], k_source.layout)
    if WITH_K:
        v_ring = gl.allocate_shared_memory(DTYPE, [2, 1, 1, BLOCK_N // 2, BLOCK_V], v_source.layout)
    else:
        v_ring = k_ring  # not read
    q_ring = gl.allocate_shared_memory(DTYPE, [SLOTS_A, 1, 1, BLOCK_M, BLOCK_QK], q_source.layout)
    g_ring = gl.allocate_shared_memory(DTYPE, [SLOTS_B, 1, 1, BLOCK_M, BLOCK_V], g_source.layout)
    norm_ring = gl.allocate_shared_memory(gl.float32, [SLOTS_A, 1, 1, BLOCK_M], norm_source.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [SLOTS_A, 1, 1, BLOCK_M], delta_source.layout)
    bars = barriers(SLOTS_A, SLOTS_B)
    mbarrier.expect(bars.index(0), 2 * k_source.block_type.nbytes + (2 * v_source.block_type.nbytes if WITH_K else 0))
    for half in gl.static_range(2):
        j0 = n * BLOCK_N + half * (BLOCK_N // 2)
        tma.async_copy_global_to_shared(k_source, [b, h_kv, j0, 0], bars.index(0), k_ring.index(half))
        if WITH_K:
            tma.async_copy_global_to_shared(v_source, [b, h_kv, j0, 0], bars.index(0), v_ring.index(half))
    gl.warp_specialize(
        [
            (dkv_producer, (
                q_source, g_source, norm_source, delta_source, q_ring, g_ring, norm_ring, delta_ring,
                bars, b, h_kv, GROUP, n, TQ, TK, captures, table,
                BLOCK_M, BLOCK_N, SLOTS_A, SLOTS_B,
            )),
            (dkv_consumer, (
                k_ring, v_ring, q_ring, g_ring, norm_ring, delta_ring, bars, GradK, GradV,
                stride_db, stride_dh, stride_dt, stride_dd, stride_eb, stride_eh, stride_et, stride_ed, b, h_kv, GROUP, n, TQ, TK,
                captures, table, gl.constexpr(0), WITH_K, WITH_V, D_QK, D_V, BLOCK_QK, BLOCK_V, BLOCK_M, BLOCK_N,
                SLOTS_A, SLOTS_B, DTYPE,
            )),
            (dkv_consumer, (
                k_ring, v_ring, q_ring, g_ring, norm_ring, delta_ring, bars, GradK, GradV,
                stride_db, stride_dh, stride_dt, stride_dd, stride_eb, stride_eh, stride_et, stride_ed, b, h_kv, GROUP, n, TQ, TK,
                captures, table, gl.constexpr(1), WITH_K, WITH_V, D_QK, D_V, BLOCK_QK, BLOCK_V, BLOCK_M, BLOCK_N,
                SLOTS_A, SLOTS_B, DTYPE,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------- Launch


@triton.jit(do_not_specialize=RUNTIME)
def mean_kernel(
    V, Out, Lse,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od, H, GROUP, TQ, TK,
    D_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows without keys among a tile of queries become the mean of all values."""
    b = wide(tl.program_id(0) // H)
    h = wide(tl.program_id(0) % H)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    empty = tl.load(Lse + (b * H + h) * TQ + i, mask=i < TQ, other=0.0) == float("-inf")
    if tl.max(empty.to(tl.int32)) == 1:
        v_base = V + b * stride_vb + (h // GROUP) * stride_vh
        mean = mean_of_values(v_base, TK, stride_vt, stride_vd, D_V, BLOCK_N, BLOCK_V)
        d = tl.arange(0, BLOCK_V)
        at = Out + b * stride_ob + h * stride_oh + wide(i)[:, None] * stride_ot + d[None, :] * stride_od
        values = tl.broadcast_to(mean[None, :], [BLOCK_M, BLOCK_V]).to(Out.dtype.element_ty)
        tl.store(at, values, mask=empty[:, None] & (d < D_V)[None, :])


@functools.cache
def processors(device):
    """Multiprocessors of a GPU; of anything else, as many as an H100 has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def copy_layout(swizzle, bits, rank):
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=rank)


def described(tensor, block, layout):
    """The copies of a tensor block by block, past checks that the caller has made before choosing these kernels."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(
        base=tensor, shape=tensor.shape, strides=tensor.stride(), block_shape=block, layout=layout, padding="zero"
    )  # fmt: skip
    return made


def tiles_of(tensor, height, width):
    """The copies of `tensor` [B, H, T, D] in tiles of [height, width]; zeros beyond T and D."""
    size = tensor.element_size()
    return described(tensor, [1, 1, height, width], copy_layout(min(128, width * size), 8 * size, 4))


def lines_of(tensor, length):
    """The copies of row statistics [B, H, T] in pieces of `length`."""
    return described(tensor, [1, 1, length], copy_layout(0, 32, 3))


def launch_forward(start, q, k, v, out, lse, table, config, captures):
    """O and log-sum-exp."""
    batch, heads, t_q, d_qk = q.shape
    h_kv, t_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    block_m, block_n, block_qk, block_v = config["BLOCK_M"], config["BLOCK_N"], width_of(d_qk), width_of(d_v)
    m_tiles = tile_count(t_q, block_m)
    start(
        forward_hopper_kernel, (min(processors(q.device), batch * heads * m_tiles), 1, 1),
        tiles_of(q, block_m // 2, block_qk), tiles_of(k, block_n, block_qk), tiles_of(v, block_n, block_v), out, lse, table,
        *out.stride(), batch * heads, heads, heads // h_kv, m_tiles, t_q, t_k, captures,
        D_V=d_v, BLOCK_QK=block_qk, BLOCK_V=block_v, **config, num_warps=4,
    )  # fmt: skip
    if MEAN:
        start(
            mean_kernel, (batch * heads, tile_count(t_q, 64), 1),
            v, out, lse, *v.stride(), *out.stride(), heads, heads // h_kv, t_q, t_k,
            D_V=d_v, BLOCK_V=block_v, BLOCK_M=64, BLOCK_N=64, num_warps=4,
        )  # fmt: skip


def launch_dq(start, grad_out, q, k, v, norm, delta, dq, table, config, captures):
    """dQ."""
    batch, heads, t_q, d_qk = q.shape
    h_kv, t_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    block_m, block_n, block_qk, block_v = config["BLOCK_M"], config["BLOCK_N"], width_of(d_qk), width_of(d_v)
    start(
        dq_hopper_kernel, (batch * heads, tile_count(t_q, block_m), 1),
        tiles_of(q, block_m // 2, block_qk), tiles_of(k, block_n, block_qk), tiles_of(v, block_n, block_v),
        tiles_of(grad_out, block_m // 2, block_v), norm, delta, dq, table,
        *dq.stride(), norm.stride(1), heads, heads // h_kv, t_q, t_k, captures,
        D_QK=d_qk, BLOCK_QK=block_qk, BLOCK_V=block_v, **config, num_warps=4,
    )  # fmt: skip


def launch_dkv(start, grad_out, q, k, v, norm, delta, any_empty, dk, dv, table, config, captures):
    """dK and dV."""
    batch, heads, t_q, d_qk = q.shape
    h_kv, t_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    block_m, block_n, block_qk, block_v = config["BLOCK_M"], config["BLOCK_N"], width_of(d_qk), width_of(d_v)
    for with_k, with_v in DKV_PASSES:
        start(
            dkv_hopper_kernel, (batch * h_kv, tile_count(t_k, block_n), 1),
            tiles_of(q, block_m, block_qk), tiles_of(k, block_n // 2, block_qk), tiles_of(v, block_n // 2, block_v),
            tiles_of(grad_out, block_m, block_v), lines_of(norm, block_m), lines_of(delta, block_m), dk, dv, table,
            *dk.stride(), *dv.stride(), h_kv, heads // h_kv, t_q, t_k, captures, WITH_K=with_k, WITH_V=with_v,
            D_QK=d_qk, D_V=d_v, BLOCK_QK=block_qk, BLOCK_V=block_v, **config, num_warps=4,
        )  # fmt: skip
