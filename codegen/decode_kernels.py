"""The decoding template: few queries over many keys, which several programs share.

    O[b,h,i,:] = sum_j P[b,h,i,j] V[b,h//g,j,:],    P = softmax_j(score where visible),    s = Q[b,h,i,:] . K[b,h//g,j,:]

One program takes the queries of all heads that read one key head, and a part of the keys: row r of its tile is query r % TQ of
head h_kv * GROUP + r // TQ, so that K and V are read once. It leaves its unnormalised sum of values, the normaliser and the maximum
that both are relative to, and `combine_kernel` adds the parts up. With one part nothing is added, and it writes the output itself.

This file is real Triton, and the pattern from which `emit` weaves every variant, by the same hooks, lists and flags as
`attention_kernels`. Here `h` and `i` are columns [M, 1], and so is what depends on them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launching import begin, tile_count, width_of
from .primitives import LOG2E, load_tile, mean_of_values, tile_range, wide

# ------------------------------------------------------------------------------------------------------------------------ Flags

NORMALISED = tl.constexpr(True)  # a softmax makes weights of the score; without one it is the weight itself
ONLINE = tl.constexpr(True)  # the maximum is tracked; not needed where the score is bounded
FOLDED = tl.constexpr(True)  # the score is in units of log2: log2(e) is part of its constants
SCALED = tl.constexpr(True)  # the score is SCALE * s
TABLE = tl.constexpr(False)  # the mask empties tiles within the range of keys
PER_HEAD = tl.constexpr(False)  # the mask depends on the head
SINK = tl.constexpr(False)  # a logit without a value joins the softmax
ZERO = tl.constexpr(False)  # a row without keys is zero
MEAN = tl.constexpr(False)  # a row without keys is the mean of all values

SCALE = tl.constexpr(1.0)  # of SCALED, in the unit of the score
PRECISION = tl.constexpr("ieee")
RUNTIME = ["TQ", "TK", "SPLITS"]
SPAN = None  # n queries meet a range of at most n + SPAN keys
TILES = ({"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},)  # by height
RESIDENT = 2  # programs that share a processor

# ------------------------------------------------------------------------------------------------------------------------ Hooks


@triton.jit
def score(s, b, h, i, j, inside, fixed, rows, cols, captures):
    """The logit of one pair."""
    return s * SCALE


@triton.jit
def visible(b, h, i, j, inside, fixed, rows, cols, captures):
    """Whether key j takes part for query i."""
    return j <= i


@triton.jit
def sink_logit(b, h, i, fixed, rows, captures):
    """The logit without a value, natural units."""
    return tl.cast(i, tl.float32)


@triton.jit
def key_range(b, h, i0, i1, TQ, TK, fixed, captures):
    """lo, full_lo, full_hi, hi of the keys of queries [i0, i1]."""
    return 0, 0, tl.minimum(TK, i0 + 1), tl.minimum(TK, i1 + 1)


def load_fixed(b, h, captures):
    """Loads that depend on neither index."""


def load_rows(b, h, i, fixed, captures):
    """Loads that depend on the query alone."""


def load_cols(b, h, j, fixed, captures):
    """Loads that depend on the key alone."""


# ---------------------------------------------------------------------------------------------------------------------- Decode


@triton.jit
def weight(x):
    """exp of a logit that is in the unit of the score."""
    if FOLDED:
        return tl.exp2(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def load_lines(lines, stride_d, COLS: tl.constexpr, D: tl.constexpr):
    """[M, COLS] of the lines that start at `lines` [M, 1]; zeros from column D on."""
    d = tl.arange(0, COLS)[None, :]
    if COLS > D:
        return tl.load(lines + d * stride_d, mask=d < D, other=0.0)
    else:
        return tl.load(lines + d * stride_d)


@triton.jit
def narrow(
    first, last, b, h, i, hi, TK, fixed, rows, captures,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """Of key tiles [first, last) those between the first and the last visible pair, and the end of their keys."""
    nearest = tl.full([BLOCK_M, REACH], 2147483647, dtype=tl.int32)
    farthest = tl.full([BLOCK_M, REACH], -1, dtype=tl.int32)
    for j0 in tl.range(first * BLOCK_N, tl.minimum(last * BLOCK_N, hi), REACH):
        j = j0 + tl.arange(0, REACH)[None, :]
        inside = (j < hi) & (j < last * BLOCK_N)
        cols = load_cols(b, h, tl.minimum(j, TK - 1), fixed, captures)
        seen = visible(b, h, i, j, inside, fixed, rows, cols, captures) & inside
        nearest = tl.minimum(nearest, tl.where(seen, j, 2147483647))
        farthest = tl.maximum(farthest, tl.where(seen, j, -1))
    end = tl.max(farthest) + 1
    last = tl.cdiv(end, BLOCK_N)
    return tl.minimum(tl.min(nearest) // BLOCK_N, last), last, end


@triton.jit
def attend(
    acc, total, peak, b_q, b_q_tail, k_base, v_base, first, last, b, h, i, hi, TK,
    stride_kt, stride_kd, stride_vt, stride_vd, fixed, rows, captures, LATENT: tl.constexpr,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds key tiles [first, last), up to key `hi`, to the sum `acc` [M, D_V], its normaliser `total` [M] and maximum `peak` [M].

    One loop, masked throughout: a second one would fill and drain the pipeline of loads once more.
    """
    for step in tl.range(0, last - first):  # from 0: a start that another loop found would hide how the loads are aligned
        j0 = (first + step) * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)[None, :]  # [1, N]
        inside = j < hi
        cols = load_cols(b, h, tl.minimum(j, TK - 1), fixed, captures)
        k_tile = k_base + wide(j0) * stride_kt
        b_k = load_tile(k_tile, hi - j0, stride_kt, stride_kd, BLOCK_N, BLOCK_QK, D_QK, True)
        s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [M, N]
        if BLOCK_TAIL > 0:
            k_tile += BLOCK_QK * stride_kd
            b_k_tail = load_tile(k_tile, hi - j0, stride_kt, stride_kd, BLOCK_N, BLOCK_TAIL, D_QK - BLOCK_QK, True)
            s = tl.dot(b_q_tail, b_k_tail.T, s, input_precision=PRECISION)
        if SCALED:
            x = s
        else:
            x = score(s, b, h, i, j, inside, fixed, rows, cols, captures)
        seen = visible(b, h, i, j, inside, fixed, rows, cols, captures) & inside
        x = tl.where(seen, x, float("-inf") if NORMALISED else 0.0)
        if NORMALISED:
            if ONLINE:
                if SCALED:
                    new_peak = tl.maximum(peak, tl.max(x, 1) * SCALE)
                    p = weight(x * SCALE - new_peak[:, None])
                else:
                    new_peak = tl.maximum(peak, tl.max(x, 1))
                    p = weight(x - new_peak[:, None])
                decay = weight(peak - new_peak)
                peak = new_peak
                total = total * decay + tl.sum(p, 1)
                acc = acc * decay[:, None]
            else:
                p = weight(x)
                total = total + tl.sum(p, 1)
        else:
            p = x
        if LATENT:
            b_v = b_k
        else:
            v_tile = v_base + wide(j0) * stride_vt
            b_v = load_tile(v_tile, hi - j0, stride_vt, stride_vd, BLOCK_N, BLOCK_V, D_V, True)
        acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
    return acc, total, peak


@triton.jit
def normalised(acc, total, peak):
    """The output [M, D_V] and the log-sum-exp [M] of a complete sum."""
    lse = total
    if NORMALISED:
        lse = tl.log(total)
        if ONLINE:
            if FOLDED:
                lse = lse + peak / LOG2E
            else:
                lse = lse + peak
        if ZERO:
            total = tl.where(total == 0, 1.0, total)
        acc = acc / total[:, None]
    return acc, lse


@triton.jit(do_not_specialize=RUNTIME)
def decode_kernel(
    Q, K, V, Out, Lse, Sums, Totals, Peaks,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    H_KV, GROUP, ROW_TILES, SPLITS, TQ, TK, captures, WHOLE: tl.constexpr, LATENT: tl.constexpr,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_TAIL: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of a key head's rows over one part of its keys. WHOLE: the only part. LATENT: V is the first columns of K."""
    part = tl.program_id(1)
    b = wide(tl.program_id(0) // ROW_TILES // H_KV)
    h_kv = wide(tl.program_id(0) // ROW_TILES % H_KV)
    r = tl.program_id(0) % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # [M, 1]
    row = tl.minimum(r, GROUP * TQ - 1)  # rows beyond the last repeat it, and are not stored
    h = h_kv * GROUP + row // TQ
    i = row % TQ
    fixed = load_fixed(b, h, captures)
    rows = load_rows(b, h, i, fixed, captures)

    k_base = K + b * stride_kb + h_kv * stride_kh
    v_base = V + b * stride_vb + h_kv * stride_vh
    q_lines = Q + b * stride_qb + h * stride_qh + wide(i) * stride_qt
    b_q = load_lines(q_lines, stride_qd, BLOCK_QK, D_QK)
    if BLOCK_TAIL > 0:
        b_q_tail = load_lines(q_lines + BLOCK_QK * stride_qd, stride_qd, BLOCK_TAIL, D_QK - BLOCK_QK)
    else:
        b_q_tail = b_q

    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], -3.4028234663852886e38, dtype=tl.float32)
    if SINK:
        if part == 0:
            logit = tl.sum(tl.zeros([BLOCK_M, 1], tl.float32) + sink_logit(b, h, i, fixed, rows, captures), 1)
            if FOLDED:
                logit = logit * LOG2E
            peak = tl.maximum(peak, logit)
            total = weight(logit - peak)

    lo, full_lo, full_hi, hi = key_range(b, h, tl.min(i), tl.max(i), TQ, TK, fixed, captures)
    if PER_HEAD:
        lo = tl.min(lo + tl.zeros([BLOCK_M, 1], dtype=tl.int64))
        hi = tl.max(hi + tl.zeros([BLOCK_M, 1], dtype=tl.int64))
    hi = tl.cast(hi, tl.int32)
    first, full_first, full_last, last = tile_range(lo, full_lo, full_hi, hi, BLOCK_N)
    share = tl.cdiv(last - first, SPLITS)
    first = tl.minimum(first + part * share, last)
    last = tl.minimum(first + share, last)
    if TABLE:
        first, last, hi = narrow(
            first, last, b, h, i, hi, TK, fixed, rows, captures, BLOCK_M, BLOCK_N, 4096 // BLOCK_M,
        )  # fmt: skip
    acc, total, peak = attend(
        acc, total, peak, b_q, b_q_tail, k_base, v_base, first, last, b, h, i, hi, TK,
        stride_kt, stride_kd, stride_vt, stride_vd, fixed, rows, captures, LATENT, D_QK, D_V,
        BLOCK_N, BLOCK_QK, BLOCK_TAIL, BLOCK_V,
    )  # fmt: skip

    d = tl.arange(0, BLOCK_V)[None, :]
    stored = r < GROUP * TQ
    at = (b * H_KV * GROUP + h) * TQ + i  # [M, 1]
    if WHOLE:
        out, lse = normalised(acc, total, peak)
        if MEAN:
            if tl.min(total) == 0:
                mean = mean_of_values(v_base, TK, stride_vt, stride_vd, D_V, 16, BLOCK_V)
                out = tl.where((total == 0)[:, None], mean[None, :], out)
        o_lines = Out + b * stride_ob + h * stride_oh + wide(i) * stride_ot
        tl.store(o_lines + d * stride_od, out.to(Out.dtype.element_ty), mask=stored & (d < D_V))
        tl.store(Lse + at, lse[:, None], mask=stored)
    else:
        at = at * SPLITS + part
        tl.store(Sums + at * D_V + d, acc, mask=stored & (d < D_V))
        tl.store(Totals + at, total[:, None], mask=stored)
        if ONLINE:
            tl.store(Peaks + at, peak[:, None], mask=stored)


@triton.jit(do_not_specialize=RUNTIME)
def combine_kernel(
    Sums, Totals, Peaks, V, Out, Lse,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od, H, GROUP, SPLITS, TQ, TK,
    D_V: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row of the output from the parts of its sum. What a part without keys has left is not read."""
    at = wide(tl.program_id(0))
    b = at // TQ // H
    h = at // TQ % H
    d = tl.arange(0, BLOCK_V)[None, :]
    acc = tl.zeros([1, BLOCK_V], dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    peak = tl.full([1], -3.4028234663852886e38, dtype=tl.float32)
    for start in tl.range(0, SPLITS, CHUNK):
        part = start + tl.arange(0, CHUNK)
        totals = tl.load(Totals + at * SPLITS + part, mask=part < SPLITS, other=0.0)  # [C]
        lines = (at * SPLITS + part)[:, None] * D_V
        left = totals != 0 if NORMALISED else part < SPLITS
        sums = tl.load(Sums + lines + d, mask=left[:, None] & (d < D_V), other=0.0)  # [C, D_V]
        if ONLINE:
            peaks = tl.load(Peaks + at * SPLITS + part, mask=part < SPLITS, other=-3.4028234663852886e38)
            new_peak = tl.maximum(peak, tl.max(peaks, 0))
            decay = weight(peak - new_peak)
            share = weight(peaks - new_peak)
            peak = new_peak
            total = total * decay + tl.sum(totals * share, 0)
            acc = acc * decay[:, None] + tl.sum(sums * share[:, None], 0)[None, :]
        else:
            total = total + tl.sum(totals, 0)
            acc = acc + tl.sum(sums, 0)[None, :]
    out, lse = normalised(acc, total, peak)
    if MEAN:
        if tl.min(total) == 0:
            v_base = V + b * stride_vb + (h // GROUP) * stride_vh
            out = mean_of_values(v_base, TK, stride_vt, stride_vd, D_V, 16, BLOCK_V)[None, :]
    o_line = Out + b * stride_ob + h * stride_oh + at % TQ * stride_ot
    tl.store(o_line + d * stride_od, out.to(Out.dtype.element_ty), mask=d < D_V)
    tl.store(Lse + at + tl.arange(0, 1), lse)


# ---------------------------------------------------------------------------------------------------------------------- Launch


LEAST_KEYS = 256  # a part of fewer keys costs more than it saves


def widths(d_qk, d_v):
    """Columns of the blocks of K, of what is left of K beyond a power of two, and of V: 576 is 512 and 64, 80 is 64 and 16."""
    whole, main = width_of(d_qk), 1 << (d_qk.bit_length() - 1)
    tail = width_of(d_qk - main)
    split = main >= 16 and main + tail < whole
    return (main if split else whole), (tail if split else 0), width_of(d_v)


def tile_for(height):
    """The lowest tile that holds `height` rows, else the highest of all."""
    return next((tile for tile in TILES if tile["BLOCK_M"] >= height), TILES[-1])


def processors(device):
    """Multiprocessors or compute units of a GPU; of anything else, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def split_count(programs, keys, slots):
    """How many parts of LEAST_KEYS or more to cut the keys into, so that they fill one or two rounds of programs on the GPU."""
    one, two = slots // programs, 2 * slots // programs
    return max(1, min(keys // LEAST_KEYS, two if two > 2.2 * one else one))


def is_latent(k, v, block_qk):
    """Whether V is the first columns of K, all of them in the block that K is multiplied by."""
    return k.data_ptr() == v.data_ptr() and k.stride() == v.stride() and v.shape[3] == min(k.shape[3], block_qk)


def allocate_out(q, v, out_layout):
    """[B, H, T, D_V], dense in the order of `out_layout`: "bhtd" or "bthd"."""
    batch, heads, t_q, _ = q.shape
    if out_layout == "bthd":
        return torch.empty((batch, t_q, heads, v.shape[-1]), dtype=v.dtype, device=q.device).transpose(1, 2)
    return torch.empty((batch, heads, t_q, v.shape[-1]), dtype=v.dtype, device=q.device)


def forward(q, k, v, captures, *, splits=None, out_layout="bhtd"):
    """`(out, lse)` of q [B, H, TQ, D], k [B, H_KV, TK, D], v [B, H_KV, TK, D_V], of any strides. lse is float32, natural units.

    `splits`: into how many parts the keys are cut; chosen from the sizes if not given.
    """
    batch, heads, t_q, d_qk = q.shape
    h_kv, t_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    group = heads // h_kv
    tile = tile_for(group * t_q)
    row_tiles = tile_count(group * t_q, tile["BLOCK_M"])
    programs = batch * h_kv * row_tiles
    if splits is None:
        splits = split_count(programs, t_k if SPAN is None else min(t_k, t_q + SPAN), RESIDENT * processors(q.device))
    out = allocate_out(q, v, out_layout)
    lse = torch.empty((batch, heads, t_q), dtype=torch.float32, device=q.device)
    sums = totals = peaks = None
    if splits > 1:
        sums = torch.empty((batch, heads, t_q, splits, d_v), dtype=torch.float32, device=q.device)
        totals, peaks = torch.empty((2, batch, heads, t_q, splits), dtype=torch.float32, device=q.device)
    block_qk, block_tail, block_v = widths(d_qk, d_v)
    latent = is_latent(k, v, block_qk)

    def run(start):
        start(
            decode_kernel, (programs, splits, 1),
            q, k, v, out, lse, sums, totals, peaks, *q.stride(), *k.stride(), *v.stride(), *out.stride(),
            h_kv, group, row_tiles, splits, t_q, t_k, captures, WHOLE=splits == 1, LATENT=latent,
            D_QK=d_qk, D_V=d_v, BLOCK_QK=block_qk, BLOCK_TAIL=block_tail, BLOCK_V=block_v, **tile,
        )  # fmt: skip
        if splits > 1:
            start(
                combine_kernel, (batch * heads * t_q, 1, 1),
                sums, totals, peaks, v, out, lse, *v.stride(), *out.stride(), heads, group, splits, t_q, t_k,
                D_V=d_v, BLOCK_V=block_v, CHUNK=max(8, min(32, 4096 // block_v)), num_warps=4,
            )  # fmt: skip

    begin(run, q, k, v, out, lse, sums, totals, peaks, splits, latent, captures)
    return out, lse
