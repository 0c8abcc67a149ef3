"""Assignments of tokens to experts in the order of experts, and results in the order of tokens.

A counting sort that keeps the order of an expert's assignments: `count_kernel` counts, in each of a few blocks of assignments, how
many go to each expert; `order_kernel` adds up what comes before, and writes each assignment to its place. All of it stays on the
device: how many rows an expert has is never known outside, where only a bound of how many tiles of rows there are is.

    Sorted   [ASSIGNMENTS]  assignments t * SLOTS + s, those of expert 0 first; dropped ones are nowhere
    Offsets  [EXPERTS + 1]  where the rows of each expert begin
    Tiles    [2, TILES]     the expert of each tile of HEIGHT rows, -1 where there is no tile; its first row
"""

from __future__ import annotations

import triton
import triton.language as tl

from .experts_parts import RUNTIME, load_expert, of_expert
from .primitives import wide

# ------------------------------------------------------------------------------------------------------------------------- Order


@triton.jit
def belongs(Ids, assignment, inside, experts, stride_it, stride_is, SLOTS, EXPERTS):
    """The experts of assignments, [SUB], and which of `experts` they are, [SUB, WIDTH]."""
    e = load_expert(Ids, assignment, inside, stride_it, stride_is, SLOTS, EXPERTS)
    return e, (e[:, None] == experts[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=RUNTIME)
def count_kernel(
    Ids, Counts, stride_it, stride_is, ASSIGNMENTS, SLOTS, EXPERTS, LENGTH, SUB: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Counts [BLOCKS, WIDTH]: how many of a block of LENGTH assignments go to each expert."""
    block = tl.program_id(0)
    experts = tl.arange(0, WIDTH)
    counts = tl.zeros([WIDTH], tl.int32)
    for begin in range(0, LENGTH, SUB):
        a = block * LENGTH + begin + tl.arange(0, SUB)
        _, mine = belongs(Ids, a, a < ASSIGNMENTS, experts, stride_it, stride_is, SLOTS, EXPERTS)
        counts += tl.sum(mine, 0)
    tl.store(Counts + block * WIDTH + experts, counts)


@triton.jit(do_not_specialize=RUNTIME)
def order_kernel(
    Ids, Counts, Sorted, Offsets, Tiles, stride_it, stride_is, ASSIGNMENTS, SLOTS, EXPERTS, BLOCKS, LENGTH, TILES, HEIGHT,
    SUB: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sorted for a block of assignments, the tiles of every BLOCKS-th stripe of SUB tiles and, in the first program, Offsets."""
    block = tl.program_id(0)
    experts = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.int32)
    before = tl.zeros([WIDTH], tl.int32)
    for begin in range(0, BLOCKS, CHUNK):
        b = (begin + tl.arange(0, CHUNK))[:, None]
        counts = tl.load(Counts + b * WIDTH + experts[None, :], mask=b < BLOCKS, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where(b < block, counts, 0), 0)
    ends = tl.cumsum(total, 0)
    if block == 0:
        tl.store(Offsets, 0)
        tl.store(Offsets + 1 + experts, ends, mask=experts < EXPERTS)
    base = ends - total + before
    i = tl.arange(0, SUB)
    for begin in range(0, LENGTH, SUB):
        a = block * LENGTH + begin + i
        e, mine = belongs(Ids, a, a < ASSIGNMENTS, experts, stride_it, stride_is, SLOTS, EXPERTS)
        other = load_expert(Ids, a, a < ASSIGNMENTS, stride_it, stride_is, SLOTS, EXPERTS)
        earlier = (e[:, None] == other[None, :]) & (i[:, None] > i[None, :])
        row = tl.sum(mine * base[None, :], 1) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(Sorted + row, a, mask=e >= 0)
        base += tl.sum(mine, 0)
    tiles = (total + HEIGHT - 1) // HEIGHT
    last = tl.cumsum(tiles, 0)
    count = tl.sum(tiles, 0)
    shift = ends - total - (last - tiles) * HEIGHT
    for begin in range(block * SUB, TILES, BLOCKS * SUB):
        tile = begin + i
        e = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
        row = tl.sum(tl.where(e[:, None] == experts[None, :], shift[None, :], 0), 1) + tile * HEIGHT
        tl.store(Tiles + tile, tl.where(tile < count, e, -1), mask=tile < TILES)
        tl.store(Tiles + TILES + tile, row, mask=tile < TILES)


# ----------------------------------------------------------------------------------------------------------------------- Combine


@triton.jit(do_not_specialize=RUNTIME)
def combine_kernel(
    Ids, Y, Out, stride_it, stride_is, stride_od, stride_ot, WIDTH, EXPERTS,
    EACH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Out [T, WIDTH]: the sum of Y [T, EACH, PARTS, WIDTH] over a token's assignments, in their order, without dropped ones."""
    t = tl.program_id(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(EACH):
        e = tl.load(Ids + t * stride_it + s * stride_is)
        kept = (e >= 0) & (e < EXPERTS) & (col < WIDTH)
        for part in tl.static_range(PARTS):
            at = Y + ((wide(t) * EACH + s) * PARTS + part) * WIDTH + col
            total += tl.load(at, mask=kept, other=0.0).to(tl.float32)
    tl.store(Out + wide(t) * stride_ot + col * stride_od, total.to(Out.dtype.element_ty), mask=col < WIDTH)


@triton.jit(do_not_specialize=RUNTIME)
def route_kernel(
    Ids, Dots, Grad, Bias, DWeights, stride_it, stride_is, stride_gt, stride_gd, reach_b, stride_bd, stride_wt, stride_ws,
    WIDTH, ASSIGNMENTS, SLOTS, EXPERTS, SPAN, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK routing weights: the sums of their SPAN Dots [SPAN, ASSIGNMENTS], and of Grad [T, WIDTH] times the
    expert's Bias [WIDTH], if there is one; 0 for what is dropped."""
    a = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = a < ASSIGNMENTS
    e = load_expert(Ids, a, inside, stride_it, stride_is, SLOTS, EXPERTS)
    kept = inside & (e >= 0)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, SPAN):
        total += tl.load(Dots + wide(part) * ASSIGNMENTS + a, mask=kept, other=0.0)
    if Bias is not None:
        grad_at = Grad + (wide(a // SLOTS) * stride_gt)[:, None]
        bias_at = of_expert(Bias, tl.maximum(e, 0), reach_b)[:, None]
        for begin in range(0, WIDTH, BLOCK_D):
            d = (begin + tl.arange(0, BLOCK_D))[None, :]
            mask = kept[:, None] & (d < WIDTH)
            b_grad = tl.load(grad_at + d * stride_gd, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(b_grad * tl.load(bias_at + d * stride_bd, mask=mask, other=0.0).to(tl.float32), 1)
    at = DWeights + ((a // SLOTS) * stride_wt + (a % SLOTS) * stride_ws)
    tl.store(at, tl.where(kept, total, 0.0).to(DWeights.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def reach_kernel(
    First, E0, E1, E2, E3, E4, E5, E6, E7, E8, E9, E10, E11, E12, E13, E14, E15,
    E16, E17, E18, E19, E20, E21, E22, E23, E24, E25, E26, E27, E28, E29, E30, E31, Out, BEGIN, LAST,
):  # fmt: skip
    """Out [E]: how many elements after the first expert's tensor another's begins, of 32 experts from BEGIN on."""
    some = (
        E0, E1, E2, E3, E4, E5, E6, E7, E8, E9, E10, E11, E12, E13, E14, E15,
        E16, E17, E18, E19, E20, E21, E22, E23, E24, E25, E26, E27, E28, E29, E30, E31,
    )  # fmt: skip
    size: tl.constexpr = First.dtype.element_ty.primitive_bitwidth // 8
    for at in tl.static_range(32):
        tl.store(Out + tl.minimum(BEGIN + at, LAST), (some[at].to(tl.int64) - First.to(tl.int64)) // size)
