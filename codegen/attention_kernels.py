"""The attention template: online softmax over the tiles of keys that the mask leaves, forward and backward.

    O[b,h,i,:] = sum_j P[b,h,i,j] V[b,h//g,j,:],    P = softmax_j(score where visible),    s = Q[b,h,i,:] . K[b,h//g,j,:]

This file is real Triton for causal attention, and the pattern from which `emit` weaves every other variant:

- the functions under "Hooks" are replaced by those that the specification asks for;
- `captures`, `fixed`, `rows`, `cols`, `row_ends`, `col_ends` and `table` stand for lists of arguments of any length: captured
  tensors with their strides and sizes; loads that depend on neither index, on i, on j, and their ends over a tile; the block table;
- `if FLAG:` of a module-level flag is decided when the file is written.

Blocks: b_q [M, D], b_k [N, D], scores [M, N]; the kernel of dK and dV works on their transposes [N, M].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launching import begin, tile_count, width_of
from .primitives import LOG2E, load_tile, mean_of_values, store_tile, tile_range, wide

# ------------------------------------------------------------------------------------------------------------------------ Flags

NORMALISED = tl.constexpr(True)  # a softmax makes weights of the score; without one it is the weight itself
ONLINE = tl.constexpr(True)  # the maximum is tracked; not needed where the score is bounded
FOLDED = tl.constexpr(True)  # the score is in units of log2: log2(e) is part of its constants
SCALED = tl.constexpr(True)  # the score is SCALE * s
SLOPED = tl.constexpr(False)  # the derivative of the score varies over a tile
TABLE = tl.constexpr(False)  # tiles come from a block table
EXACT = tl.constexpr(False)  # the table looks at every element
HEAD = tl.constexpr(True)  # partial key tiles may come before the full ones
KEY_HEAD = tl.constexpr(True)  # partial query tiles may come before the full ones
BY_HEAD = tl.constexpr(False)  # a load that is read once depends on the head
PER_HEAD = tl.constexpr(False)  # the mask depends on the head
SINK = tl.constexpr(False)  # a logit without a value joins the softmax
ZERO = tl.constexpr(False)  # a row without keys is zero
MEAN = tl.constexpr(False)  # a row without keys is the mean of all values
DROPOUT = tl.constexpr(False)  # some weights are set to zero at random
LEARNS = tl.constexpr(False)  # the score loads what gets a gradient
SINK_LEARNS = tl.constexpr(False)  # so does the logit without a value

SCALE = tl.constexpr(1.0)  # of SCALED, in the unit of the score
SLOPE = tl.constexpr(1.0)  # the derivative of the score, natural units, where it is constant
SLOPE_LEFT = tl.constexpr(1.0)  # the part of the derivative that is left to multiply with at the end
KEPT_SCALE = tl.constexpr(1.0)  # of the weights that DROPOUT leaves
PRECISION = tl.constexpr("ieee")
RUNTIME = ["TQ", "TK"]
TABLE_BY_BATCH = True
TABLE_BY_HEAD = True
TABLE_CHUNK = 32
FORWARD = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
DQ = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
DKV_PASSES = ((True, True),)  # (with K, with V): both at once, or one after the other where registers are short
DKV = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
CAPTURED = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
SUMS = (("nothing", True, True),)  # of each load that learns: what a program sums over, whether it depends on b and on h

# ------------------------------------------------------------------------------------------------------------------------ Hooks


@triton.jit
def score(s, b, h, i, j, inside, fixed, rows, cols, captures):
    """The logit of one pair."""
    return s * SCALE


@triton.jit
def score_and_slope(s, b, h, i, j, inside, fixed, rows, cols, captures):
    """The logit of one pair, and its derivative by s in natural units."""
    return s * SCALE, 1.0


@triton.jit
def load_slope(s, b, h, i, j, inside, fixed, rows, cols, captures, AT: tl.constexpr):
    """The derivative of the score by load AT of those that learn, natural units."""
    return 1.0


@triton.jit
def kept(b, h, i, j, captures):
    """Whether the weight of one pair survives the dropout."""
    return i + j >= 0


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


@triton.jit
def query_range(b, h, j0, j1, TQ, TK, fixed, captures):
    """lo, full_lo, full_hi, hi of the queries of keys [j0, j1]."""
    return j0, tl.minimum(TQ, j1), TQ, TQ


@triton.jit
def classify(b, h, i0, i1, j0, j1, fixed, row_ends, col_ends, captures):
    """Whether a tile may hold a visible pair, and whether it certainly holds nothing else."""
    return j0 <= i1, j1 <= i0


def load_fixed(b, h, captures):
    """Loads that depend on neither index."""


def load_rows(b, h, i, fixed, captures):
    """Loads that depend on the query alone."""


def load_cols(b, h, j, fixed, captures):
    """Loads that depend on the key alone."""


def load_row_ends(b, h, i, fixed, captures):
    """Least and greatest of each load of `load_rows` over the last axis of i."""


def load_col_ends(b, h, j, fixed, captures):
    """Least and greatest of each load of `load_cols` over the last axis of j."""


# --------------------------------------------------------------------------------------------------------------------- Forward


@triton.jit
def weight(x):
    """exp of a logit that is in the unit of the score."""
    if FOLDED:
        return tl.exp2(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def attend(
    acc, total, peak, b_q, k_base, v_base, tiles, first, last, b, h, i, TQ, TK,
    stride_kt, stride_kd, stride_vt, stride_vd, fixed, rows, captures,
    MASKED: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds key tiles [first, last) to the running sum `acc` [M, D_V], its normaliser `total` [M] and its maximum `peak` [M]."""
    for step in tl.range(first, last):
        if TABLE:
            n = tl.load(tiles + step)
        else:
            n = step
        j0 = n * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)[None, :]  # [1, N]
        b_k = load_tile(k_base + wide(j0) * stride_kt, TK - j0, stride_kt, stride_kd, BLOCK_N, BLOCK_QK, D_QK, MASKED)
        s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [M, N]
        inside = i < TQ
        cols = load_cols(b, h, tl.minimum(j, TK - 1), fixed, captures)
        if MASKED:
            inside = inside & (j < TK)
        if SCALED:
            x = s
        else:
            x = score(s, b, h, i, j, inside, fixed, rows, cols, captures)
        if MASKED:
            seen = visible(b, h, i, j, inside, fixed, rows, cols, captures) & (j < TK)
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
        if DROPOUT:
            p = tl.where(kept(b, h, i, j, captures), p, 0.0)
        b_v = load_tile(v_base + wide(j0) * stride_vt, TK - j0, stride_vt, stride_vd, BLOCK_N, BLOCK_V, D_V, MASKED)
        acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
    return acc, total, peak


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    Q, K, V, Out, Lse, table,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    H, GROUP, TQ, TK, captures,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: O [M, D_V] and log-sum-exp [M]. The last tiles, the longest under causality, start first."""
    m = tl.num_programs(1) - 1 - tl.program_id(1)
    b = wide(tl.program_id(0) // H)
    h = wide(tl.program_id(0) % H)
    i0 = m * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)[:, None]  # [M, 1]
    fixed = load_fixed(b, h, captures)
    rows = load_rows(b, h, tl.minimum(i, TQ - 1), fixed, captures)

    k_base = K + b * stride_kb + (h // GROUP) * stride_kh
    v_base = V + b * stride_vb + (h // GROUP) * stride_vh
    q_base = Q + b * stride_qb + h * stride_qh + wide(i0) * stride_qt
    b_q = load_tile(q_base, TQ - i0, stride_qt, stride_qd, BLOCK_M, BLOCK_QK, D_QK, True)

    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], -3.4028234663852886e38, dtype=tl.float32)
    if SINK:
        logit = tl.sum(tl.zeros([BLOCK_M, 1], tl.float32) + sink_logit(b, h, i, fixed, rows, captures), 1)
        if FOLDED:
            logit = logit * LOG2E
        peak = tl.maximum(peak, logit)
        total = weight(logit - peak)
    if TABLE:
        line = table_line(b, h, m, table)
        full = tl.load(line)
        partial = tl.load(line + 1)
        acc, total, peak = attend(
            acc, total, peak, b_q, k_base, v_base, line + 2, 0, full, b, h, i, TQ, TK,
            stride_kt, stride_kd, stride_vt, stride_vd, fixed, rows, captures, False, D_QK, D_V, BLOCK_N, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
        acc, total, peak = attend(
            acc, total, peak, b_q, k_base, v_base, line + 2 + tl.cdiv(TK, BLOCK_N), 0, partial, b, h, i, TQ, TK,
            stride_kt, stride_kd, stride_vt, stride_vd, fixed, rows, captures, True, D_QK, D_V, BLOCK_N, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
    else:
        lo, full_lo, full_hi, hi = key_range(b, h, i0, tl.minimum(i0 + BLOCK_M, TQ) - 1, TQ, TK, fixed, captures)
        first, full_first, full_last, last = tile_range(lo, full_lo, full_hi, hi, BLOCK_N)
        if HEAD:
            acc, total, peak = attend(
                acc, total, peak, b_q, k_base, v_base, None, first, full_first, b, h, i, TQ, TK,
                stride_kt, stride_kd, stride_vt, stride_vd, fixed, rows, captures, True, D_QK, D_V, BLOCK_N, BLOCK_QK, BLOCK_V,
            )  # fmt: skip
        acc, total, peak = attend(
            acc, total, peak, b_q, k_base, v_base, None, full_first, full_last, b, h, i, TQ, TK,
            stride_kt, stride_kd, stride_vt, stride_vd, fixed, rows, captures, False, D_QK, D_V, BLOCK_N, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
        acc, total, peak = attend(
            acc, total, peak, b_q, k_base, v_base, None, full_last, last, b, h, i, TQ, TK,
            stride_kt, stride_kd, stride_vt, stride_vd, fixed, rows, captures, True, D_QK, D_V, BLOCK_N, BLOCK_QK, BLOCK_V,
        )  # fmt: skip

    lse = total
    if NORMALISED:
        lse = tl.log(total)
        if ONLINE:
            if FOLDED:
                lse = lse + peak / LOG2E
            else:
                lse = lse + peak
        if ZERO:
            acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        else:
            acc = acc / total[:, None]
    if MEAN:
        if tl.min(total) == 0:
            mean = mean_of_values(v_base, TK, stride_vt, stride_vd, D_V, BLOCK_N, BLOCK_V)
            acc = tl.where((total == 0)[:, None], mean[None, :], acc)
    if DROPOUT:
        acc = acc * KEPT_SCALE
    o_base = Out + b * stride_ob + h * stride_oh + wide(i0) * stride_ot
    store_tile(o_base, acc, TQ - i0, stride_ot, stride_od, BLOCK_M, BLOCK_V, D_V)
    o_m = tl.arange(0, BLOCK_M)
    tl.store(Lse + (b * H + h) * TQ + i0 + o_m, lse, mask=i0 + o_m < TQ)


# -------------------------------------------------------------------------------------------------------------------- Backward


@triton.jit(do_not_specialize=RUNTIME)
def delta_kernel(
    Out, GradOut, Lse, GradLse, Norm, Delta, GradSink, AnyEmpty,
    stride_ob, stride_oh, stride_ot, stride_od, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_n, H, TQ, captures,
    D_V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Row statistics of the backward pass, a tile of queries at a time.

    Norm: the log-sum-exp in the unit of the score, +inf for a row without keys. Delta: sum_d O dO, less the gradient of the
    log-sum-exp: dS = P (dP - Delta). GradSink: -P_sink Delta. Lines of Norm and Delta are stride_n >= TQ long, the rest zeros.
    """
    b = wide(tl.program_id(0) // H)
    h = wide(tl.program_id(0) % H)
    i0 = tl.program_id(1) * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    o_base = Out + b * stride_ob + h * stride_oh + wide(i0) * stride_ot
    g_base = GradOut + b * stride_gb + h * stride_gh + wide(i0) * stride_gt
    b_o = load_tile(o_base, TQ - i0, stride_ot, stride_od, BLOCK_M, BLOCK_V, D_V, True).to(tl.float32)
    b_g = load_tile(g_base, TQ - i0, stride_gt, stride_gd, BLOCK_M, BLOCK_V, D_V, True).to(tl.float32)
    delta = tl.sum(b_o * b_g, 1)  # [M]
    at = (b * H + h) * TQ + i
    if GradLse is not None:
        delta = delta - tl.load(GradLse + at, mask=i < TQ, other=0.0)
    lse = tl.load(Lse + at, mask=i < TQ, other=0.0)
    empty = lse == float("-inf")
    norm = lse
    if FOLDED:
        norm = lse * LOG2E
    line = (b * H + h) * stride_n + i
    tl.store(Norm + line, tl.where(empty, float("inf"), norm), mask=i < stride_n)
    tl.store(Delta + line, delta, mask=i < stride_n)
    if MEAN:
        if tl.max(empty.to(tl.int32)) == 1:
            tl.store(AnyEmpty, 1)
    if SINK_LEARNS:
        i_column = i[:, None]
        fixed = load_fixed(b, h, captures)
        rows = load_rows(b, h, tl.minimum(i_column, TQ - 1), fixed, captures)
        logit = tl.sum(tl.zeros([BLOCK_M, 1], tl.float32) + sink_logit(b, h, i_column, fixed, rows, captures), 1)
        share = tl.where(empty, 0.0, tl.exp(logit - lse))
        tl.store(GradSink + at, -share * delta, mask=i < TQ)


@triton.jit
def gather_dq(
    dq, b_q, b_g, norm, delta, k_base, v_base, tiles, first, last, b, h, i, TQ, TK,
    stride_kt, stride_kd, stride_vt, stride_vd, fixed, rows, captures,
    MASKED: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds key tiles [first, last) to dQ [M, D_QK]."""
    for step in tl.range(first, last):
        if TABLE:
            n = tl.load(tiles + step)
        else:
            n = step
        j0 = n * BLOCK_N
        j = j0 + tl.arange(0, BLOCK_N)[None, :]  # [1, N]
        b_k = load_tile(k_base + wide(j0) * stride_kt, TK - j0, stride_kt, stride_kd, BLOCK_N, BLOCK_QK, D_QK, MASKED)
        b_v = load_tile(v_base + wide(j0) * stride_vt, TK - j0, stride_vt, stride_vd, BLOCK_N, BLOCK_V, D_V, MASKED)
        s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [M, N]
        dp = tl.dot(b_g, b_v.T, input_precision=PRECISION)
        inside = i < TQ
        cols = load_cols(b, h, tl.minimum(j, TK - 1), fixed, captures)
        if MASKED:
            inside = inside & (j < TK)
        x, slope = score_and_slope(s, b, h, i, j, inside, fixed, rows, cols, captures)
        if MASKED:
            seen = visible(b, h, i, j, inside, fixed, rows, cols, captures) & (j < TK)
        if DROPOUT:
            dp = tl.where(kept(b, h, i, j, captures), dp * KEPT_SCALE, 0.0)
        if NORMALISED:
            p = weight(x - norm)
            if MASKED:
                p = tl.where(seen, p, 0.0)
            ds = p * (dp - delta)
        else:
            ds = dp
            if MASKED:
                ds = tl.where(seen, ds, 0.0)
        if SLOPED:
            ds = ds * slope
        dq = tl.dot(ds.to(b_k.dtype), b_k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=RUNTIME)
def dq_kernel(
    Q, K, V, GradOut, Norm, Delta, GradQ, table,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_db, stride_dh, stride_dt, stride_dd, stride_n, H, GROUP, TQ, TK, captures,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: dQ [M, D_QK]."""
    m = tl.num_programs(1) - 1 - tl.program_id(1)
    b = wide(tl.program_id(0) // H)
    h = wide(tl.program_id(0) % H)
    i0 = m * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)[:, None]  # [M, 1]
    fixed = load_fixed(b, h, captures)
    rows = load_rows(b, h, tl.minimum(i, TQ - 1), fixed, captures)

    k_base = K + b * stride_kb + (h // GROUP) * stride_kh
    v_base = V + b * stride_vb + (h // GROUP) * stride_vh
    q_base = Q + b * stride_qb + h * stride_qh + wide(i0) * stride_qt
    g_base = GradOut + b * stride_gb + h * stride_gh + wide(i0) * stride_gt
    b_q = load_tile(q_base, TQ - i0, stride_qt, stride_qd, BLOCK_M, BLOCK_QK, D_QK, True)
    b_g = load_tile(g_base, TQ - i0, stride_gt, stride_gd, BLOCK_M, BLOCK_V, D_V, True)
    line = (b * H + h) * stride_n + i
    norm = tl.load(Norm + line, mask=i < TQ, other=0.0)  # [M, 1]
    delta = tl.load(Delta + line, mask=i < TQ, other=0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_QK], dtype=tl.float32)
    if TABLE:
        line = table_line(b, h, m, table)
        full = tl.load(line)
        partial = tl.load(line + 1)
        dq = gather_dq(
            dq, b_q, b_g, norm, delta, k_base, v_base, line + 2, 0, full, b, h, i, TQ, TK, stride_kt, stride_kd,
            stride_vt, stride_vd, fixed, rows, captures, False, D_QK, D_V, BLOCK_N, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
        dq = gather_dq(
            dq, b_q, b_g, norm, delta, k_base, v_base, line + 2 + tl.cdiv(TK, BLOCK_N), 0, partial, b, h, i, TQ, TK,
            stride_kt, stride_kd, stride_vt, stride_vd, fixed, rows, captures, True, D_QK, D_V, BLOCK_N, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
    else:
        lo, full_lo, full_hi, hi = key_range(b, h, i0, tl.minimum(i0 + BLOCK_M, TQ) - 1, TQ, TK, fixed, captures)
        first, full_first, full_last, last = tile_range(lo, full_lo, full_hi, hi, BLOCK_N)
        if HEAD:
            dq = gather_dq(
                dq, b_q, b_g, norm, delta, k_base, v_base, None, first, full_first, b, h, i, TQ, TK, stride_kt, stride_kd,
                stride_vt, stride_vd, fixed, rows, captures, True, D_QK, D_V, BLOCK_N, BLOCK_QK, BLOCK_V,
            )  # fmt: skip
        dq = gather_dq(
            dq, b_q, b_g, norm, delta, k_base, v_base, None, full_first, full_last, b, h, i, TQ, TK, stride_kt, stride_kd,
            stride_vt, stride_vd, fixed, rows, captures, False, D_QK, D_V, BLOCK_N, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
        dq = gather_dq(
            dq, b_q, b_g, norm, delta, k_base, v_base, None, full_last, last, b, h, i, TQ, TK, stride_kt, stride_kd,
            stride_vt, stride_vd, fixed, rows, captures, True, D_QK, D_V, BLOCK_N, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
    d_base = GradQ + b * stride_db + h * stride_dh + wide(i0) * stride_dt
    store_tile(d_base, dq * SLOPE_LEFT, TQ - i0, stride_dt, stride_dd, BLOCK_M, BLOCK_QK, D_QK)


@triton.jit
def gather_dkv(
    dk, dv, b_k, b_v, Q, GradOut, Norm, Delta, tiles, first, last, b, h_first, members, j, TQ, TK,
    stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_n, captures,
    MASKED: tl.constexpr, EMPTY: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds query tiles [first, last) of `members` heads to dK [N, D_QK] and dV [N, D_V], in one loop over both.

    EMPTY: only rows without keys, all keys with equal weight; they send no gradient through the scores. WITH_K, WITH_V: which of
    the two is wanted.
    """
    count = last - first
    if BY_HEAD:
        pass
    else:
        h = wide(h_first)
        fixed = load_fixed(b, h, captures)
        cols = load_cols(b, h, tl.minimum(j, TK - 1), fixed, captures)
    for step in tl.range(0, members * count):
        h = wide(h_first + step // count)
        if BY_HEAD:
            fixed = load_fixed(b, h, captures)
            cols = load_cols(b, h, tl.minimum(j, TK - 1), fixed, captures)
        if TABLE:
            m = step % count if EMPTY else tl.load(tiles + step % count)
        else:
            m = first + step % count
        i0 = m * BLOCK_M
        i = i0 + tl.arange(0, BLOCK_M)[None, :]  # [1, M]
        q_base = Q + h * stride_qh + wide(i0) * stride_qt
        g_base = GradOut + h * stride_gh + wide(i0) * stride_gt
        b_q = load_tile(q_base, TQ - i0, stride_qt, stride_qd, BLOCK_M, BLOCK_QK, D_QK, MASKED)
        b_g = load_tile(g_base, TQ - i0, stride_gt, stride_gd, BLOCK_M, BLOCK_V, D_V, MASKED)
        if MASKED:
            norm = tl.load(Norm + h * stride_n + i, mask=i < TQ, other=0.0)  # [1, M]
            delta = tl.load(Delta + h * stride_n + i, mask=i < TQ, other=0.0)
        else:
            norm = tl.load(Norm + h * stride_n + i)
            delta = tl.load(Delta + h * stride_n + i)
        s = tl.dot(b_k, b_q.T, input_precision=PRECISION)  # [N, M]
        inside = j < TK
        rows = load_rows(b, h, tl.minimum(i, TQ - 1), fixed, captures)
        if MASKED:
            inside = inside & (i < TQ)
        x, slope = score_and_slope(s, b, h, i, j, inside, fixed, rows, cols, captures)
        if EMPTY:
            p = tl.where((norm == float("inf")) & inside, 1.0 / TK, 0.0)
        else:
            p = weight(x - norm) if NORMALISED else x
            if MASKED:
                seen = visible(b, h, i, j, inside, fixed, rows, cols, captures) & inside
                p = tl.where(seen, p, 0.0)
        left = p
        if DROPOUT:
            survives = kept(b, h, i, j, captures)
            left = tl.where(survives, p * KEPT_SCALE, 0.0)
        if WITH_V:
            dv = tl.dot(left.to(b_g.dtype), b_g, dv, input_precision=PRECISION)
        if WITH_K:
            dp = tl.dot(b_v, b_g.T, input_precision=PRECISION)
            if DROPOUT:
                dp = tl.where(survives, dp * KEPT_SCALE, 0.0)
            if NORMALISED:
                ds = p * (dp - delta)
            else:
                ds = dp
                if MASKED:
                    ds = tl.where(seen, ds, 0.0)
            if SLOPED:
                ds = ds * slope
            dk = tl.dot(ds.to(b_q.dtype), b_q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def gather_heads(
    dk, dv, b_k, b_v, Q, GradOut, Norm, Delta, AnyEmpty, n, b, h_first, members, j, TQ, TK, table,
    stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_n, captures,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds every query tile that key tile n meets, in heads [h_first, h_first + members), which all see the same mask."""
    if TABLE:
        line = table_line(b, h_first, n, table)
        full = tl.load(line)
        partial = tl.load(line + 1)
        dk, dv = gather_dkv(
            dk, dv, b_k, b_v, Q, GradOut, Norm, Delta, line + 2, 0, full, b, h_first, members, j, TQ, TK,
            stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_n, captures,
            False, False, WITH_K, WITH_V, D_QK, D_V, BLOCK_M, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
        dk, dv = gather_dkv(
            dk, dv, b_k, b_v, Q, GradOut, Norm, Delta, line + 2 + tl.cdiv(TQ, BLOCK_M), 0, partial, b, h_first, members, j, TQ, TK,
            stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_n, captures,
            True, False, WITH_K, WITH_V, D_QK, D_V, BLOCK_M, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
    else:
        h = wide(h_first)
        fixed = load_fixed(b, h, captures)
        j0 = n * BLOCK_N
        lo, full_lo, full_hi, hi = query_range(b, h, j0, tl.minimum(j0 + BLOCK_N, TK) - 1, TQ, TK, fixed, captures)
        first, full_first, full_last, last = tile_range(lo, full_lo, full_hi, hi, BLOCK_M)
        if KEY_HEAD:
            dk, dv = gather_dkv(
                dk, dv, b_k, b_v, Q, GradOut, Norm, Delta, None, first, full_first, b, h_first, members, j, TQ, TK,
                stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_n, captures,
                True, False, WITH_K, WITH_V, D_QK, D_V, BLOCK_M, BLOCK_QK, BLOCK_V,
            )  # fmt: skip
        dk, dv = gather_dkv(
            dk, dv, b_k, b_v, Q, GradOut, Norm, Delta, None, full_first, full_last, b, h_first, members, j, TQ, TK,
            stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_n, captures,
            False, False, WITH_K, WITH_V, D_QK, D_V, BLOCK_M, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
        dk, dv = gather_dkv(
            dk, dv, b_k, b_v, Q, GradOut, Norm, Delta, None, full_last, last, b, h_first, members, j, TQ, TK,
            stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_n, captures,
            True, False, WITH_K, WITH_V, D_QK, D_V, BLOCK_M, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
    if MEAN:
        if WITH_V:
            if tl.load(AnyEmpty) != 0:
                dk, dv = gather_dkv(
                    dk, dv, b_k, b_v, Q, GradOut, Norm, Delta, None, 0, tl.cdiv(TQ, BLOCK_M), b, h_first, members, j, TQ, TK,
                    stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_n, captures,
                    True, True, False, True, D_QK, D_V, BLOCK_M, BLOCK_QK, BLOCK_V,
                )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME)
def dkv_kernel(
    Q, K, V, GradOut, Norm, Delta, GradK, GradV, AnyEmpty, table,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_db, stride_dh, stride_dt, stride_dd, stride_eb, stride_eh, stride_et, stride_ed, stride_n, H_KV, GROUP, TQ, TK, captures,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head, over all query heads of its group: dK [N, D_QK] and dV [N, D_V]."""
    n = tl.program_id(1)
    b = wide(tl.program_id(0) // H_KV)
    h_kv = wide(tl.program_id(0) % H_KV)
    j0 = n * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)[:, None]  # [N, 1]
    k_base = K + b * stride_kb + h_kv * stride_kh + wide(j0) * stride_kt
    v_base = V + b * stride_vb + h_kv * stride_vh + wide(j0) * stride_vt
    b_k = load_tile(k_base, TK - j0, stride_kt, stride_kd, BLOCK_N, BLOCK_QK, D_QK, True)
    b_v = load_tile(v_base, TK - j0, stride_vt, stride_vd, BLOCK_N, BLOCK_V, D_V, True)

    q_base = Q + b * stride_qb
    g_base = GradOut + b * stride_gb
    norm = Norm + b * GROUP * H_KV * stride_n
    delta = Delta + b * GROUP * H_KV * stride_n
    dk = tl.zeros([BLOCK_N, BLOCK_QK], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    if PER_HEAD:
        for h in range(h_kv * GROUP, (h_kv + 1) * GROUP):
            dk, dv = gather_heads(
                dk, dv, b_k, b_v, q_base, g_base, norm, delta, AnyEmpty, n, b, h, 1, j, TQ, TK, table,
                stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_n, captures,
                WITH_K, WITH_V, D_QK, D_V, BLOCK_M, BLOCK_N, BLOCK_QK, BLOCK_V,
            )  # fmt: skip
    else:
        dk, dv = gather_heads(
            dk, dv, b_k, b_v, q_base, g_base, norm, delta, AnyEmpty, n, b, h_kv * GROUP, GROUP, j, TQ, TK, table,
            stride_qh, stride_qt, stride_qd, stride_gh, stride_gt, stride_gd, stride_n, captures,
            WITH_K, WITH_V, D_QK, D_V, BLOCK_M, BLOCK_N, BLOCK_QK, BLOCK_V,
        )  # fmt: skip
    if WITH_K:
        d_base = GradK + b * stride_db + h_kv * stride_dh + wide(j0) * stride_dt
        store_tile(d_base, dk * SLOPE_LEFT, TK - j0, stride_dt, stride_dd, BLOCK_N, BLOCK_QK, D_QK)
    if WITH_V:
        e_base = GradV + b * stride_eb + h_kv * stride_eh + wide(j0) * stride_et
        store_tile(e_base, dv, TK - j0, stride_et, stride_ed, BLOCK_N, BLOCK_V, D_V)


# -------------------------------------------------------------------------------------------------- Gradients of captured tensors


@triton.jit
def add_tile(
    acc, Q, K, V, GradOut, Norm, Delta, b, h, m, n,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd, stride_n, H, GROUP, TQ, TK, captures,
    AT: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to `acc` [M, N] the gradients that load AT gets from query tile m and key tile n."""
    i0 = m * BLOCK_M
    j0 = n * BLOCK_N
    i = i0 + tl.arange(0, BLOCK_M)[:, None]  # [M, 1]
    j = j0 + tl.arange(0, BLOCK_N)[None, :]  # [1, N]
    fixed = load_fixed(b, h, captures)
    rows = load_rows(b, h, tl.minimum(i, TQ - 1), fixed, captures)
    cols = load_cols(b, h, tl.minimum(j, TK - 1), fixed, captures)
    q_base = Q + b * stride_qb + h * stride_qh + wide(i0) * stride_qt
    g_base = GradOut + b * stride_gb + h * stride_gh + wide(i0) * stride_gt
    k_base = K + b * stride_kb + (h // GROUP) * stride_kh + wide(j0) * stride_kt
    v_base = V + b * stride_vb + (h // GROUP) * stride_vh + wide(j0) * stride_vt
    b_q = load_tile(q_base, TQ - i0, stride_qt, stride_qd, BLOCK_M, BLOCK_QK, D_QK, True)
    b_k = load_tile(k_base, TK - j0, stride_kt, stride_kd, BLOCK_N, BLOCK_QK, D_QK, True)
    s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [M, N]
    b_g = load_tile(g_base, TQ - i0, stride_gt, stride_gd, BLOCK_M, BLOCK_V, D_V, True)
    b_v = load_tile(v_base, TK - j0, stride_vt, stride_vd, BLOCK_N, BLOCK_V, D_V, True)
    dp = tl.dot(b_g, b_v.T, input_precision=PRECISION)
    line = (b * H + h) * stride_n + i
    norm = tl.load(Norm + line, mask=i < TQ, other=0.0)  # [M, 1]
    delta = tl.load(Delta + line, mask=i < TQ, other=0.0)
    inside = (i < TQ) & (j < TK)
    seen = visible(b, h, i, j, inside, fixed, rows, cols, captures) & inside
    if DROPOUT:
        dp = tl.where(kept(b, h, i, j, captures), dp * KEPT_SCALE, 0.0)
    if NORMALISED:
        x = score(s, b, h, i, j, inside, fixed, rows, cols, captures)
        ds = tl.where(seen, weight(x - norm), 0.0) * (dp - delta)
    else:
        ds = tl.where(seen, dp, 0.0)
    return acc + ds * load_slope(s, b, h, i, j, inside, fixed, rows, cols, captures, AT)


@triton.jit(do_not_specialize=RUNTIME)
def captured_kernel(
    Q, K, V, GradOut, Norm, Delta, Grad, table,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd, stride_n,
    TILES, HEADS, SUMMED_B, SUMMED_H, H, GROUP, TQ, TK, captures,
    AT: tl.constexpr, OVER: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of what load AT reads.

    OVER "keys": one tile of queries, summed over the keys, [M]. "queries": the other way round, [N]. "nothing": one tile of both
    [M, N], summed over SUMMED_B batch entries and SUMMED_H heads; Grad has HEADS heads.
    """
    tile = tl.program_id(0) % TILES
    outer = tl.program_id(0) // TILES
    b = wide(outer // HEADS)
    h = wide(outer % HEADS)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    if OVER == "nothing":
        m = tile // tl.cdiv(TK, BLOCK_N)
        n = tile % tl.cdiv(TK, BLOCK_N)
        i0 = m * BLOCK_M
        j0 = n * BLOCK_N
        for step in tl.range(0, SUMMED_B * SUMMED_H):
            b_at = b + step // SUMMED_H
            h_at = h + step % SUMMED_H
            fixed = load_fixed(b_at, h_at, captures)
            lo, full_lo, full_hi, hi = key_range(b_at, h_at, i0, tl.minimum(i0 + BLOCK_M, TQ) - 1, TQ, TK, fixed, captures)
            if (lo < j0 + BLOCK_N) & (hi > j0):
                acc = add_tile(
                    acc, Q, K, V, GradOut, Norm, Delta, b_at, h_at, m, n, stride_qb, stride_qh, stride_qt, stride_qd,
                    stride_kb, stride_kh, stride_kt, stride_kd, stride_vb, stride_vh, stride_vt, stride_vd,
                    stride_gb, stride_gh, stride_gt, stride_gd, stride_n, H, GROUP, TQ, TK, captures,
                    AT, D_QK, D_V, BLOCK_QK, BLOCK_V, BLOCK_M, BLOCK_N,
                )  # fmt: skip
        at = (wide(outer) * TQ + i0 + i[:, None]) * TK + j0 + j[None, :]
        tl.store(Grad + at, acc, mask=(i0 + i < TQ)[:, None] & (j0 + j < TK)[None, :])
    else:
        if TABLE:
            line = table_line(b, h, tile, table)
            full = tl.load(line)
            first = 0
            last = full + tl.load(line + 1)
        else:
            fixed = load_fixed(b, h, captures)
            if OVER == "keys":
                i0 = tile * BLOCK_M
                lo, full_lo, full_hi, hi = key_range(b, h, i0, tl.minimum(i0 + BLOCK_M, TQ) - 1, TQ, TK, fixed, captures)
                first, full_first, full_last, last = tile_range(lo, full_lo, full_hi, hi, BLOCK_N)
            else:
                j0 = tile * BLOCK_N
                lo, full_lo, full_hi, hi = query_range(b, h, j0, tl.minimum(j0 + BLOCK_N, TK) - 1, TQ, TK, fixed, captures)
                first, full_first, full_last, last = tile_range(lo, full_lo, full_hi, hi, BLOCK_M)
        for step in tl.range(first, last):
            if TABLE:
                room = tl.cdiv(TK, BLOCK_N) if OVER == "keys" else tl.cdiv(TQ, BLOCK_M)
                other = tl.load(line + 2 + step + tl.where(step >= full, room - full, 0))
            else:
                other = step
            acc = add_tile(
                acc, Q, K, V, GradOut, Norm, Delta, b, h, tile if OVER == "keys" else other, other if OVER == "keys" else tile,
                stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
                stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd, stride_n,
                H, GROUP, TQ, TK, captures, AT, D_QK, D_V, BLOCK_QK, BLOCK_V, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if OVER == "keys":
            tl.store(Grad + wide(outer) * TQ + tile * BLOCK_M + i, tl.sum(acc, 1), mask=tile * BLOCK_M + i < TQ)
        else:
            tl.store(Grad + wide(outer) * TK + tile * BLOCK_N + j, tl.sum(acc, 0), mask=tile * BLOCK_N + j < TK)


# --------------------------------------------------------------------------------------------------------------- Block table


@triton.jit
def table_line(b, h, outer, table):
    """One line of the table: count of full tiles, count of partial ones, then both lists, each with room for every tile."""
    return table + outer


@triton.jit(do_not_specialize=RUNTIME)
def table_kernel(
    Table, LINES, H, TQ, TK, captures,
    BY_KEY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The key tiles that one query tile meets; BY_KEY: the query tiles that one key tile meets."""
    outer = tl.program_id(1)
    b = wide(tl.program_id(0) // H)
    h = wide(tl.program_id(0) % H)
    fixed = load_fixed(b, h, captures)
    if BY_KEY:
        j0 = outer * BLOCK_N
        j1 = tl.minimum(j0 + BLOCK_N, TK) - 1
        lo, full_lo, full_hi, hi = query_range(b, h, j0, j1, TQ, TK, fixed, captures)
        first, full_first, full_last, last = tile_range(lo, full_lo, full_hi, hi, BLOCK_M)
        width = tl.cdiv(TQ, BLOCK_M)
    else:
        i0 = outer * BLOCK_M
        i1 = tl.minimum(i0 + BLOCK_M, TQ) - 1
        lo, full_lo, full_hi, hi = key_range(b, h, i0, i1, TQ, TK, fixed, captures)
        first, full_first, full_last, last = tile_range(lo, full_lo, full_hi, hi, BLOCK_N)
        width = tl.cdiv(TK, BLOCK_N)
    line = Table + (wide(tl.program_id(0)) * LINES + outer) * (2 + 2 * width)
    full_count = 0
    partial_count = 0
    for start in range(first, last, CHUNK):
        inner = start + tl.arange(0, CHUNK)
        if BY_KEY:
            possible, certain = survey(b, h, inner, outer, TQ, TK, fixed, captures, BY_KEY, BLOCK_M, BLOCK_N, CHUNK)
            whole = (inner + 1) * BLOCK_M <= TQ
        else:
            possible, certain = survey(b, h, outer, inner, TQ, TK, fixed, captures, BY_KEY, BLOCK_M, BLOCK_N, CHUNK)
            whole = (inner + 1) * BLOCK_N <= TK
        full = ((inner < last) & possible & certain & whole).to(tl.int32)
        partial = ((inner < last) & possible).to(tl.int32) - full
        tl.store(line + 1 + full_count + tl.cumsum(full, 0), inner, mask=full != 0)
        tl.store(line + 1 + width + partial_count + tl.cumsum(partial, 0), inner, mask=partial != 0)
        full_count += tl.sum(full, 0)
        partial_count += tl.sum(partial, 0)
    tl.store(line, full_count)
    tl.store(line + 1, partial_count)


@triton.jit
def survey(
    b, h, m, n, TQ, TK, fixed, captures,
    BY_KEY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """[CHUNK] each: whether tiles (m, n), one of them a vector, may hold a visible pair, and whether they hold nothing else."""
    if BY_KEY:
        i = (m * BLOCK_M)[:, None] + tl.arange(0, BLOCK_M)[None, :]  # [CHUNK, M]
        j = n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [1, N]
    else:
        i = m * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]  # [1, M]
        j = (n * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :]  # [CHUNK, N]
    if EXACT:
        if BY_KEY:
            i = i[:, :, None]  # [CHUNK, M, 1]
            j = j[:, None, :]  # [1, 1, N]
        else:
            i = i[:, :, None]  # [1, M, 1]
            j = j[:, None, :]  # [CHUNK, 1, N]
        inside = (i < TQ) & (j < TK)
        rows = load_rows(b, h, tl.minimum(i, TQ - 1), fixed, captures)
        cols = load_cols(b, h, tl.minimum(j, TK - 1), fixed, captures)
        seen = visible(b, h, i, j, inside, fixed, rows, cols, captures)
        possible = tl.max(tl.max((seen & inside).to(tl.int32), 2), 1) != 0
        certain = tl.min(tl.min((seen | (inside == 0)).to(tl.int32), 2), 1) != 0
    else:
        row_ends = load_row_ends(b, h, tl.minimum(i, TQ - 1), fixed, captures)
        col_ends = load_col_ends(b, h, tl.minimum(j, TK - 1), fixed, captures)
        i0 = tl.min(i, 1)  # [CHUNK] or [1]
        j0 = tl.min(j, 1)
        i1 = tl.minimum(i0 + BLOCK_M, TQ) - 1
        j1 = tl.minimum(j0 + BLOCK_N, TK) - 1
        possible, certain = classify(b, h, i0, i1, j0, j1, fixed, row_ends, col_ends, captures)
        possible = tl.broadcast_to(possible, [CHUNK])
        certain = tl.broadcast_to(certain, [CHUNK])
    return possible, certain


# ---------------------------------------------------------------------------------------------------------------------- Launch


def block_table(start, q, k, captures, *, config, by_key):
    """[B, H, tiles, 2 + 2 * width] int32: the tiles that each tile meets, full ones and partial ones apart.

    B and H are 1, expanded, where the mask does not depend on them.
    """
    batch, heads, t_q, t_k = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    table_batch, table_heads = (batch if TABLE_BY_BATCH else 1), (heads if TABLE_BY_HEAD else 1)
    by_query_tiles, by_key_tiles = tile_count(t_q, config["BLOCK_M"]), tile_count(t_k, config["BLOCK_N"])
    lines, width = (by_key_tiles, by_query_tiles) if by_key else (by_query_tiles, by_key_tiles)
    table = start.empty((table_batch, table_heads, lines, 2 + 2 * width), torch.int32)
    start(
        table_kernel, (table_batch * table_heads, lines, 1),
        table, lines, table_heads, t_q, t_k, captures,
        BY_KEY=by_key, BLOCK_M=config["BLOCK_M"], BLOCK_N=config["BLOCK_N"], CHUNK=TABLE_CHUNK, num_warps=4,
    )  # fmt: skip
    return table.expand(batch, heads, -1, -1)


def launch_forward(start, q, k, v, out, lse, table, config, captures):
    """O and log-sum-exp."""
    batch, heads, t_q, d_qk = q.shape
    h_kv, t_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    start(
        forward_kernel, (batch * heads, tile_count(t_q, config["BLOCK_M"]), 1),
        q, k, v, out, lse, table, *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        heads, heads // h_kv, t_q, t_k, captures,
        D_QK=d_qk, D_V=d_v, BLOCK_QK=width_of(d_qk), BLOCK_V=width_of(d_v), **config,
    )  # fmt: skip


def launch_dq(start, grad_out, q, k, v, norm, delta, dq, table, config, captures):
    """dQ."""
    batch, heads, t_q, d_qk = q.shape
    h_kv, t_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    start(
        dq_kernel, (batch * heads, tile_count(t_q, config["BLOCK_M"]), 1),
        q, k, v, grad_out, norm, delta, dq, table,
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *dq.stride(), norm.stride(1),
        heads, heads // h_kv, t_q, t_k, captures,
        D_QK=d_qk, D_V=d_v, BLOCK_QK=width_of(d_qk), BLOCK_V=width_of(d_v), **config,
    )  # fmt: skip


def launch_dkv(start, grad_out, q, k, v, norm, delta, any_empty, dk, dv, table, config, captures):
    """dK and dV."""
    batch, heads, t_q, d_qk = q.shape
    h_kv, t_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    for with_k, with_v in DKV_PASSES:
        start(
            dkv_kernel, (batch * h_kv, tile_count(t_k, config["BLOCK_N"]), 1),
            q, k, v, grad_out, norm, delta, dk, dv, any_empty, table,
            *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *dk.stride(), *dv.stride(), norm.stride(1),
            h_kv, heads // h_kv, t_q, t_k, captures, WITH_K=with_k, WITH_V=with_v,
            D_QK=d_qk, D_V=d_v, BLOCK_QK=width_of(d_qk), BLOCK_V=width_of(d_v), **config,
        )  # fmt: skip


def launch_captured(start, grad_out, q, k, v, norm, delta, grads, config, captures):
    """The gradient of what each load that learns reads."""
    batch, heads, t_q, d_qk = q.shape
    h_kv, t_k, d_v = v.shape[1], v.shape[2], v.shape[3]
    m_tiles, n_tiles = tile_count(t_q, config["BLOCK_M"]), tile_count(t_k, config["BLOCK_N"])
    for at, ((over, _, _), grad) in enumerate(zip(SUMS, grads, strict=True)):
        tiles = {"keys": m_tiles, "queries": n_tiles, "nothing": m_tiles * n_tiles}[over]
        if TABLE:
            table = block_table(start, q, k, captures, config=config, by_key=over == "queries")
        start(
            captured_kernel, (grad.shape[0] * grad.shape[1] * tiles, 1, 1),
            q, k, v, grad_out, norm, delta, grad, table, *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), norm.stride(1),
            tiles, grad.shape[1], batch // grad.shape[0], heads // grad.shape[1], heads, heads // h_kv, t_q, t_k, captures,
            AT=at, OVER=over, D_QK=d_qk, D_V=d_v, BLOCK_QK=width_of(d_qk), BLOCK_V=width_of(d_v), **config,
        )  # fmt: skip


def allocate_captured(q, k):
    """For each load that learns a float32 [B, H, TQ, TK], of size 1 in dimensions that are summed in a kernel."""
    batch, heads, t_q, t_k = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    shapes = {
        "keys": lambda by_batch, by_head: (batch, heads, t_q, 1),
        "queries": lambda by_batch, by_head: (batch, heads, 1, t_k),
        "nothing": lambda by_batch, by_head: (batch if by_batch else 1, heads if by_head else 1, t_q, t_k),
    }
    made = [shapes[over](by_batch, by_head) for over, by_batch, by_head in SUMS]
    return [torch.empty(shape, dtype=torch.float32, device=q.device) for shape in made]


def allocate_out(q, v, out_layout):
    """[B, H, T, D_V], dense in the order of `out_layout`: "bhtd" or "bthd"."""
    batch, heads, t_q, _ = q.shape
    if out_layout == "bthd":
        return torch.empty((batch, t_q, heads, v.shape[-1]), dtype=v.dtype, device=q.device).transpose(1, 2)
    return torch.empty((batch, heads, t_q, v.shape[-1]), dtype=v.dtype, device=q.device)


def forward(q, k, v, captures, *, config=None, out_layout="bhtd"):
    """`(out, lse)` of q [B, H, TQ, D], k [B, H_KV, TK, D], v [B, H_KV, TK, D_V], of any strides. lse is float32, natural units."""
    config = config or FORWARD
    out = allocate_out(q, v, out_layout)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)

    def run(start):
        if TABLE:
            table = block_table(start, q, k, captures, config=config, by_key=False)
        launch_forward(start, q, k, v, out, lse, table, config, captures)

    begin(run, q, k, v, out, lse, *config.values(), captures)
    return out, lse


def backward(grad_out, q, k, v, out, lse, captures, *, grad_lse=None, dq_config=None, dkv_config=None):
    """`(dq, dk, dv, d_sink, d_loads)` for the results of `forward`, the last two of what learns.

    grad_lse: [B, H, TQ], the gradient of lse, if it is used.
    d_sink: [B, H, TQ] float32, the gradient of each row's logit without a value, or `None`. d_loads: of what each load in the score
    reads, [B, H, TQ, TK] float32, of size 1 in dimensions that are summed already.
    """
    dq_config, dkv_config = dq_config or DQ, dkv_config or DKV
    batch, heads, t_q, _ = q.shape
    d_v = v.shape[-1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    norm, delta = torch.empty((2, batch, heads, -4 * (-t_q // 4)), dtype=torch.float32, device=q.device)
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    d_sink = any_empty = None
    d_loads = []
    if LEARNS:
        d_loads = allocate_captured(q, k)
    if SINK_LEARNS:
        d_sink = torch.empty_like(lse)
    if MEAN:
        any_empty = torch.zeros(1, dtype=torch.int32, device=q.device)

    def run(start):
        if NORMALISED:
            start(
                delta_kernel, (batch * heads, tile_count(norm.shape[-1], 64), 1),
                out, grad_out, lse, grad_lse, norm, delta, d_sink, any_empty, *out.stride(), *grad_out.stride(), norm.stride(1),
                heads, t_q, captures, D_V=d_v, BLOCK_V=width_of(d_v), BLOCK_M=64, num_warps=4,
            )  # fmt: skip
        if TABLE:
            table = block_table(start, q, k, captures, config=dkv_config, by_key=True)
        launch_dkv(start, grad_out, q, k, v, norm, delta, any_empty, dk, dv, table, dkv_config, captures)
        if TABLE:
            table = block_table(start, q, k, captures, config=dq_config, by_key=False)
        launch_dq(start, grad_out, q, k, v, norm, delta, dq, table, dq_config, captures)
        if LEARNS:
            launch_captured(start, grad_out, q, k, v, norm, delta, d_loads, CAPTURED, captures)

    begin(
        run, grad_out, q, k, v, out, lse, grad_lse, norm, delta, dq, dk, dv, any_empty, d_sink, *d_loads, *dq_config.values(),
        *dkv_config.values(), captures,
    )  # fmt: skip
    return dq, dk, dv, d_sink, d_loads
