"""The recurrence template: a state in registers that runs through time a chunk of steps at a time.

    S_i = A_i * S_{i-1} + k_i v_i^T          o_i = q_i^T S_i        (or of the state before: o_i = q_i^T S_{i-1} + bonus)

In a chunk that is entered with state S, with G the running sum of the logarithms of the decays in it,

    o_i = q_i^T (exp(G_i) * S) + sum_{j <= i} (q_i^T (exp(G_i - G_j) * k_j v_j^T))
    S <- exp(G_C) * S + sum_j exp(G_C - G_j) * k_j v_j^T

The gradients are the same recurrence with the parts exchanged, so that one kernel serves all four (docs of `recurrence_launches`):

    o:  reads q, writes k v^T, forwards            dv: reads k, writes q do^T, backwards
    dq: reads do, writes v k^T, forwards           dk: reads v, writes do q^T, backwards

Names say the part: Q [T, N] reads, K [T, N] and V [T, M] write, the state is [N, M], of which a program holds BLOCK_M columns. The
decay is one for the state, or for each of its rows, or (in exchanged parts) for each of its columns. Gates are in units of log2.
The delta rule's inverse T = (I - N)^-1 would be made of the same weights where a chunk is entered, and W replace what V writes.

No dot takes the transpose of another dot's result, which Triton 3.2 to 3.7 computes wrongly on Hopper; on Blackwell each has its
own sum, since two dots with one sum in a loop are wrong on some.

`if FLAG:` of a module-level flag is decided when the file is written, and parameters that are not used then vanish.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import LOG2E, wide

# ------------------------------------------------------------------------------------------------------------------------ Flags

GATED = tl.constexpr(True)  # there is a decay
VECTOR = tl.constexpr(False)  # it differs along one dimension of the state
RATED = tl.constexpr(False)  # its logarithm is the product of two tensors
CONSTANT = tl.constexpr(False)  # it is the same at all times
BEFORE = tl.constexpr(False)  # the state is read before its update
BONUS = tl.constexpr(False)  # and the update's own part is weighted

SUMMED = tl.constexpr(True)  # one decay for the state, and not the same at all times: `sums_kernel` has summed it
JOINED = tl.constexpr(True)  # two products may add up in one sum: false for some Blackwells, where Triton takes a wrong one

PRECISION = tl.constexpr("ieee")
RESET = tl.constexpr(-86.0)  # 2 ** RESET of a state is nothing: counted instead of summed, so that sums after it keep their digits
LEAST = tl.constexpr(-160.0)  # 2 ** LEAST is zero in float32
NEAR = tl.constexpr(96.0)  # a chunk whose running sums stay within +-NEAR is one product: its factors fit the operands' range
RUNTIME = ["T", "CHUNKS", "SEGMENT", "SEGMENTS", "SHARES"]

# ------------------------------------------------------------------------------------------------------------------------ Gates


@triton.jit
def load_rows(base, order, inside, d, stride_t, stride_d, D: tl.constexpr, WIDTH: tl.constexpr):
    """[C, WIDTH] of the matrix at `base`, its rows in `order`; zeros outside of the sequence and from column D on."""
    at = base + (order[:, None] * stride_t + d[None, :] * stride_d)
    if WIDTH > D:
        return tl.load(at, mask=inside[:, None] & (d[None, :] < D), other=0.0)
    else:
        return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def load_gates(g_at, r_at, inside):
    """Logarithms of decays in units of log2; 0, no decay, outside."""
    g = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
    if RATED:
        g = g * tl.load(r_at, mask=inside, other=0.0).to(tl.float32)
    return g * LOG2E


@triton.jit
def load_vectors(g_at, r_at, inside):
    """The same for decays that are one for each row or column, none below what is zero in float32."""
    g = load_gates(g_at, r_at, inside)
    return tl.where(g < LEAST, LEAST, g)


@triton.jit
def running_sums(g):
    """[C] each: the running sum of the logarithms but resets, and the running count of resets."""
    far = (g < RESET).to(tl.int32)
    return tl.cumsum(tl.where(far == 1, 0.0, g), 0), tl.cumsum(far, 0)


@triton.jit
def running_multiples(g, i, first, last):
    """The same up to step i where each step from `first` up to before `last` has the logarithm g, and the others none."""
    steps = tl.minimum(tl.maximum(i + 1 - first, 0), last - first)
    far = g < RESET
    return tl.where(far, 0.0, g) * steps, tl.where(far, steps, 0)


@triton.jit
def power(x, allowed):
    """2 ** x where allowed, else 0, without computing the power of what is not."""
    return tl.exp2(tl.where(allowed, x, float("-inf")))


@triton.jit
def sums_of(rows, g, dtype: tl.constexpr):
    """[C, WIDTH] float32: for each row, the sum of g over those that `rows` [C, C] holds, by products of the operands' dtype."""
    if dtype == tl.float32:
        return tl.dot(rows.to(tl.float32), g, input_precision="ieee")
    else:
        b_rows = rows.to(dtype)
        high = g.to(dtype)
        rest = g - high.to(tl.float32)
        middle = rest.to(dtype)
        low = (rest - middle.to(tl.float32)).to(dtype)
        if JOINED:
            return tl.dot(b_rows, low, tl.dot(b_rows, middle, tl.dot(b_rows, high)))
        else:
            return tl.dot(b_rows, high) + tl.dot(b_rows, middle) + tl.dot(b_rows, low)


@triton.jit
def sums_in_blocks(g, height, AFTER: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr):
    """[C, WIDTH]: sums in blocks of `height` rows, of the rows after each one, or up to and with it."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if AFTER:
        return sums_of((i // height == j // height) & (j > i), g, DTYPE)
    else:
        return sums_of((i // height == j // height) & (j <= i), g, DTYPE)


@triton.jit
def paired(height, C: tl.constexpr):
    """[C, C]: whether the column's block of `height` is the first of a pair whose second holds the row."""
    i = tl.arange(0, C)[:, None] // height
    j = tl.arange(0, C)[None, :] // height
    return (i % 2 == 1) & (j == i - 1)


@triton.jit
def within_block(height, C: tl.constexpr):
    """[C, C]: whether the row's block of `height` holds the column, at or before the row."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return (i // height == j // height) & (j <= i)


@triton.jit
def distant_weights(b_q, b_k, g_at, r_at, inside, C: tl.constexpr):
    """`(w, up_to, height)`: w_ij = sum_n q_in k_jn 2 ** (sum of g_n between j and i) for j in an earlier block of `height` than i.

    Blocks are halved until sums in them, `up_to` and with each row, are mild; each time, pairs of blocks that adjoin have factors
    relative to the border between them: decays from one step to another, of which none is large.
    """
    height = C
    w = tl.zeros([C, C], tl.float32)
    up_to = tl.zeros(g_at.shape, tl.float32) + 2 * NEAR
    while (tl.max(tl.abs(up_to)) > NEAR) & (height > 1):
        height = height // 2
        g = load_vectors(g_at, r_at, inside)
        after = sums_in_blocks(g, height, True, C, b_k.dtype)
        b_right = (b_k.to(tl.float32) * tl.exp2(after)).to(b_k.dtype)
        up_to = sums_in_blocks(g, height, False, C, b_k.dtype)
        b_left = (b_q.to(tl.float32) * tl.exp2(up_to - g if BEFORE else up_to)).to(b_k.dtype)
        w += tl.where(paired(height, C), tl.dot(b_left, tl.trans(b_right), input_precision=PRECISION), 0.0)
    return w, tl.where(height == 1, 0.0, up_to), height


@triton.jit
def distant_sums(s, b_v, g_at, r_at, inside, C: tl.constexpr):
    """`(sums, up_to, height)`: sums_im = sum_j s_ij v_jm 2 ** (sum of g_m between j and i), over the same j and in the same way."""
    height = C
    acc = tl.zeros(b_v.shape, tl.float32)
    up_to = tl.zeros(b_v.shape, tl.float32) + 2 * NEAR
    while (tl.max(tl.abs(up_to)) > NEAR) & (height > 1):
        height = height // 2
        g = load_vectors(g_at, r_at, inside)
        after = sums_in_blocks(g, height, True, C, b_v.dtype)
        up_to = sums_in_blocks(g, height, False, C, b_v.dtype)
        b_w = tl.where(paired(height, C), s, 0.0).to(b_v.dtype)
        b_right = (b_v.to(tl.float32) * tl.exp2(after)).to(b_v.dtype)
        acc += tl.dot(b_w, b_right, input_precision=PRECISION) * tl.exp2(up_to - g if BEFORE else up_to)
    return acc, tl.where(height == 1, 0.0, up_to), height


# --------------------------------------------------------------------------------------------------------------- Before and after


@triton.jit(do_not_specialize=RUNTIME)
def sums_kernel(
    Gate, Rate, Totals, Counts, stride_gb, stride_gh, stride_gt, stride_rb, stride_rh, stride_rt, H, T, CHUNKS,
    REVERSE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`running_sums` of one chunk of one head, [B, H, CHUNKS, C], in the order of travel: scans have no place on a serial path."""
    c = tl.program_id(0) % CHUNKS
    head = wide(tl.program_id(0) // CHUNKS)
    i = tl.arange(0, C)
    t = c * C + i
    if REVERSE:
        t = c * C + C - 1 - i
        if not BEFORE:
            t += 1  # backwards, a state that is read after its update decays with the gate of the step after
    g_at = Gate + (head // H) * stride_gb + (head % H) * stride_gh + wide(t) * stride_gt
    r_at = Rate
    if RATED:
        r_at = Rate + (head // H) * stride_rb + (head % H) * stride_rh + wide(t) * stride_rt
    total, count = running_sums(load_gates(g_at, r_at, t < T))
    at = (head * CHUNKS + c) * C + i
    tl.store(Totals + at, total)
    tl.store(Counts + at, count)


@triton.jit(do_not_specialize=RUNTIME)
def slopes_kernel(
    Sums, Differences, Parts, Slopes, T, CHUNKS, BLOCKS, SHARES, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of the logarithms of one chunk of one head, [B, H, T, D], of what `replay_kernel` left:

        Slopes_t = sum Parts + sum_{i >= t} Differences_i (- Sums_t where the state is read before its update)

    With a decay for each column, these are [B, H, T, D] and Parts [B, H, CHUNKS, D]. With one for the state, all are summed over
    BLOCKS of columns, and Parts [B, H, CHUNKS, SHARES] over all.
    """
    c = tl.program_id(0) % CHUNKS
    head = wide(tl.program_id(0) // CHUNKS)
    t = c * C + tl.arange(0, C)
    if VECTOR:
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = (head * T + t)[:, None] * D + d[None, :]
        inside = (t < T)[:, None] & (d < D)[None, :]
        found = tl.cumsum(tl.load(Differences + at, mask=inside, other=0.0), 0, reverse=True)
        if BEFORE:
            found -= tl.load(Sums + at, mask=inside, other=0.0)
        found += tl.load(Parts + (head * CHUNKS + c) * D + d, mask=d < D, other=0.0)[None, :]
        tl.store(Slopes + at, found, mask=inside)
    else:
        later = tl.zeros([C], tl.float32)
        own = tl.zeros([C], tl.float32)
        for block in range(0, BLOCKS):
            at = (head * T + t) * BLOCKS + block
            later += tl.load(Differences + at, mask=t < T, other=0.0)
            if BEFORE:
                own += tl.load(Sums + at, mask=t < T, other=0.0)
        parts = tl.zeros([128], tl.float32)
        for first in range(0, SHARES, 128):
            share = first + tl.arange(0, 128)
            parts += tl.load(Parts + (head * CHUNKS + c) * SHARES + share, mask=share < SHARES, other=0.0)
        found = tl.cumsum(later, 0, reverse=True) + tl.sum(parts, 0)
        if BEFORE:
            found -= own
        tl.store(Slopes + head * T + t, found, mask=t < T)


# ------------------------------------------------------------------------------------------------------------------------ Chunks


@triton.jit(do_not_specialize=RUNTIME)
def replay_kernel(
    Q, K, V, Out, Normaliser, Gate, Rate, ChunkSums, ChunkCounts, Bonus, Left, Right, Initial, Final, Totals, Along, States, Sums,
    Differences, Parts,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_rb, stride_rh, stride_rt, stride_rd,
    stride_ub, stride_uh, stride_ut, stride_ud, stride_lb, stride_lh, stride_lt, stride_xb, stride_xh, stride_xt,
    stride_ib, stride_ih, stride_is, stride_in, stride_im, stride_fb, stride_fh, stride_fs, stride_fn, stride_fm,
    stride_ab, stride_ah, stride_at, stride_ad,
    GROUP_Q, GROUP_K, GROUP_V, GROUP_A, H, T, CHUNKS, SEGMENT, SEGMENTS,
    EMIT: tl.constexpr, REVERSE: tl.constexpr, EXCHANGED: tl.constexpr, COLUMNS: tl.constexpr, EXTRA: tl.constexpr,
    WEIGH: tl.constexpr, START: tl.constexpr, FINISH: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One segment of time of BLOCK_M columns of one head's state.

    EMIT: write Out; otherwise only what the segment does to a state, Final and Totals. REVERSE: time runs backwards, over the
    same chunks. EXCHANGED: the state is [Dv, Dk]. COLUMNS: the decay is by column of the state, else by row. EXTRA: the state's
    additional column, which V meets with ones (1), or its additional row, which Q meets with Left (2) or K with Right (3), the
    other with ones. START, FINISH: Initial and Final are there. WEIGH: on the way of dq (1), keep the state that enters each
    chunk and sums of q dq; on that of dk (2), what the gradient of the logarithms is made of. With S the state that enters a chunk
    and R that which enters it on the way back,

        dg_t = sum_m decay R S + sum_{i >= t} q_i dq_i + sum_{i < t} k_i dk_i - sum_{i >= t} k_i dk_i

    where the first sum of k dk counts what came from beyond the chunk, the second what came from within: nothing large cancels.
    The sums over steps, and over columns where the decay is one for the state, are left to `slopes_kernel`.
    """
    block = tl.program_id(0) % tl.cdiv(M, BLOCK_M)
    head = wide(tl.program_id(0) // tl.cdiv(M, BLOCK_M))
    b = head // H
    h = head % H
    segment = tl.program_id(1)
    steps = tl.minimum(SEGMENT, CHUNKS - segment * SEGMENT)
    n = tl.arange(0, BLOCK_N)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, C)  # steps in the order of travel
    order = C - 1 - i if REVERSE else i  # and in time
    seen = i[None, :] < i[:, None] if BEFORE else i[None, :] <= i[:, None]

    q_base = Q + b * stride_qb + (h // GROUP_Q) * stride_qh
    k_base = K + b * stride_kb + (h // GROUP_K) * stride_kh
    v_base = V + b * stride_vb + (h // GROUP_V) * stride_vh
    within = (n < N)[:, None] & (m < M)[None, :]
    state = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    column = tl.zeros([BLOCK_N], tl.float32)
    row = tl.zeros([BLOCK_M], tl.float32)
    if START:
        i_at = Initial + b * stride_ib + h * stride_ih + segment * stride_is
        state = tl.load(i_at + (n[:, None] * stride_in + m[None, :] * stride_im), mask=within, other=0.0).to(tl.float32)
        if EXTRA == 1:
            column = tl.load(i_at + n * stride_in + M * stride_im, mask=n < N, other=0.0).to(tl.float32)
        if EXTRA >= 2:
            row = tl.load(i_at + N * stride_in + m * stride_im, mask=m < M, other=0.0).to(tl.float32)
    shift = 0
    if GATED:
        if REVERSE and not BEFORE:
            shift = 1  # backwards, a state that is read after its update decays with the gate of the step after
        g_base = Gate + b * stride_gb + h * stride_gh
        r_base = Rate
        if RATED:
            r_base = Rate + b * stride_rb + h * stride_rh
        if VECTOR:
            d = m if COLUMNS else n
            D: tl.constexpr = M if COLUMNS else N
            g_at = g_base + (order[:, None] * stride_gt + d[None, :] * stride_gd)
            r_at = r_base
            if RATED:
                r_at = r_base + (order[:, None] * stride_rt + d[None, :] * stride_rd)
            passed = tl.zeros([BLOCK_M if COLUMNS else BLOCK_N], tl.float32)
        else:
            passed = 0.0
        if CONSTANT:
            one = load_gates(g_base, r_base, head >= 0)

    for step in range(0, steps):
        c = segment * SEGMENT + step
        if REVERSE:
            c = CHUNKS - 1 - c
        t0 = c * C
        inside = t0 + order < T
        b_k = load_rows(k_base + wide(t0) * stride_kt, order, inside, n, stride_kt, stride_kd, N, BLOCK_N)  # [C, N]
        b_v = load_rows(v_base + wide(t0) * stride_vt, order, inside, m, stride_vt, stride_vd, M, BLOCK_M)  # [C, M]
        b_u = b_v  # as it enters the state after the chunk
        if EXTRA == 3:
            right = tl.load(
                Right + b * stride_xb + h * stride_xh + wide(t0) * stride_xt + order * stride_xt, mask=inside, other=0.0
            )
            right = right.to(tl.float32)
        if EXTRA == 2:
            right = inside.to(tl.float32)
        if GATED:
            gated = t0 + order + shift < T
            if VECTOR:
                g_now = g_at + wide(t0 + shift) * stride_gt
                r_now = r_at
                if RATED:
                    r_now = r_at + wide(t0 + shift) * stride_rt
                held = gated[:, None] & (d[None, :] < D)
                g = load_vectors(g_now, r_now, held)  # [C, M] or [C, N]
                whole = tl.sum(g, 0)
                total = tl.cumsum(g, 0)
                read = total
                if BEFORE:
                    read = total - g
                mild = tl.max(tl.abs(total)) <= NEAR
                decay = tl.exp2(whole)  # across the chunk
                one_before = tl.where(mild, 1.0, decay)  # the state's factor before the update and after it
                one_after = tl.where(mild, decay, 1.0)
                if mild:  # factors relative to the chunk's start fit the operands' range
                    factor = tl.exp2(-total)
                else:  # to its end: none is large
                    g = load_vectors(g_now, r_now, held)
                    factor = tl.exp2(tl.cumsum(g, 0, reverse=True) - g)
                if COLUMNS:
                    b_u = (b_v.to(tl.float32) * factor).to(b_v.dtype)
                else:
                    b_h = (b_k.to(tl.float32) * factor).to(b_k.dtype)
            else:
                if CONSTANT:
                    if REVERSE:
                        first = tl.maximum(t0 + C + shift - T, 0)
                        last = C
                    else:
                        first = 0
                        last = tl.minimum(T - t0, C)
                    total, count = running_multiples(one, i, first, last)
                    whole, whole_count = running_multiples(one, C - 1, first, last)
                    read, read_count = total, count
                    if BEFORE:
                        read, read_count = running_multiples(one, i - 1, first, last)
                else:
                    l_at = ChunkSums + (head * CHUNKS + c) * C
                    n_at = ChunkCounts + (head * CHUNKS + c) * C
                    total, count = tl.load(l_at + i), tl.load(n_at + i)
                    whole, whole_count = tl.load(l_at + C - 1), tl.load(n_at + C - 1)
                    read, read_count = total, count
                    if BEFORE:
                        read = tl.load(l_at + i - 1, mask=i > 0, other=0.0)
                        read_count = tl.load(n_at + i - 1, mask=i > 0, other=0)
                decay = power(whole, whole_count == 0)
                after = power(whole - total, count == whole_count)  # [C]

        # -------------------------------------------------------------------------------------------------------- reading
        if EMIT:
            b_q = load_rows(q_base + wide(t0) * stride_qt, order, inside, n, stride_qt, stride_qd, N, BLOCK_N)  # [C, N]
            b_s = state.to(b_q.dtype)
            if EXTRA == 2:
                left = tl.load(
                    Left + b * stride_lb + h * stride_lh + wide(t0) * stride_lt + order * stride_lt, mask=inside, other=0.0
                )
                left = left.to(tl.float32)
            if EXTRA == 3:
                left = inside.to(tl.float32)
            if GATED and VECTOR:
                if COLUMNS:
                    entered = tl.dot(b_q, b_s, input_precision=PRECISION)
                    s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
                    if EXTRA >= 2:
                        entered += left[:, None] * row[None, :]
                        s += left[:, None] * right[None, :]
                    entered = entered * tl.exp2(read)
                    own = tl.sum(tl.where(i[:, None] == i[None, :], s, 0.0), 1)
                    if mild:
                        b_w = tl.where(i[None, :] < i[:, None], s, 0.0).to(b_v.dtype)
                        written = tl.dot(b_w, b_u, input_precision=PRECISION) * tl.exp2(read)
                    else:
                        written, near, height = distant_sums(s, b_v, g_now, r_now, held, C)
                        b_w = tl.where(within_block(height, C) & (i[None, :] < i[:, None]), s, 0.0).to(b_v.dtype)
                        b_c = (b_v.to(tl.float32) * tl.exp2(-near)).to(b_v.dtype)
                        if BEFORE:
                            near -= load_vectors(g_now, r_now, held)
                        close = tl.dot(b_w, b_c, input_precision=PRECISION)
                        written += tl.where(height == 1, 0.0, close * tl.exp2(near))
                    acc = entered + written  # [C, M]
                else:
                    b_r = (b_q.to(tl.float32) * tl.exp2(read)).to(b_q.dtype)
                    entered = tl.dot(b_r, b_s, input_precision=PRECISION)
                    if mild:
                        w = tl.where(seen, tl.dot(b_r, tl.trans(b_h), input_precision=PRECISION), 0.0)
                    else:
                        w, near, height = distant_weights(b_q, b_k, g_now, r_now, held, C)
                        b_c = (b_k.to(tl.float32) * tl.exp2(-near)).to(b_k.dtype)
                        if BEFORE:
                            near -= load_vectors(g_now, r_now, held)
                        b_n = (b_q.to(tl.float32) * tl.exp2(near)).to(b_q.dtype)
                        close = tl.dot(b_n, tl.trans(b_c), input_precision=PRECISION)
                        w += tl.where(within_block(height, C) & seen, close, 0.0)
                    acc = entered + tl.dot(w.to(b_v.dtype), b_v, input_precision=PRECISION)
                    if EXTRA == 1:
                        norm = tl.sum(w, 1) + tl.sum(b_q.to(tl.float32) * tl.exp2(read) * column[None, :], 1)
            else:
                w = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
                if EXTRA >= 2:
                    w += left[:, None] * right[None, :]
                if GATED:
                    near = seen & (read_count[:, None] == count[None, :])
                    w = tl.where(near, w * power(read[:, None] - total[None, :], near), 0.0)
                else:
                    w = tl.where(seen, w, 0.0)
                if EXTRA == 1:
                    norm = tl.sum(w, 1)
                if WEIGH > 0:  # what a step writes and reads itself cancels in the gradient of the decays: kept out of it
                    own = tl.sum(tl.where(i[:, None] == i[None, :], w, 0.0), 1)
                    w = tl.where(i[:, None] == i[None, :], 0.0, w)
                b_w = w.to(b_v.dtype)
                entered = tl.dot(b_q, b_s, input_precision=PRECISION)
                if EXTRA >= 2:
                    entered += left[:, None] * row[None, :]
                if EXTRA == 1:
                    from_column = tl.sum(b_q.to(tl.float32) * column[None, :], 1)
                if GATED:
                    factor = power(read, read_count == 0)
                    entered = entered * factor[:, None]
                    if EXTRA == 1:
                        from_column = from_column * factor
                if EXTRA == 1:
                    norm += from_column
                if JOINED and WEIGH == 0:
                    acc = tl.dot(b_w, b_v, entered, input_precision=PRECISION)
                else:
                    written = tl.dot(b_w, b_v, input_precision=PRECISION)
                    acc = entered + written
            if Out is not None:
                if not BEFORE:
                    if WEIGH > 0 or (VECTOR and COLUMNS):
                        acc += own[:, None] * b_v.to(tl.float32)
                if BONUS:
                    u_at = Bonus + b * stride_ub + h * stride_uh + wide(t0) * stride_ut
                    both = b_q.to(tl.float32) * b_k.to(tl.float32)
                    if EXCHANGED:
                        b_b = load_rows(u_at, order, inside, m, stride_ut, stride_ud, M, BLOCK_M)
                        acc += tl.sum(both, 1)[:, None] * (b_b.to(tl.float32) * b_v.to(tl.float32))
                    else:
                        b_b = load_rows(u_at, order, inside, n, stride_ut, stride_ud, N, BLOCK_N)
                        acc += tl.sum(both * b_b.to(tl.float32), 1)[:, None] * b_v.to(tl.float32)
                o_at = Out + b * stride_ob + h * stride_oh + wide(t0) * stride_ot
                o_at += order[:, None] * stride_ot + m[None, :] * stride_od
                tl.store(o_at, acc.to(Out.dtype.element_ty), mask=inside[:, None] & (m[None, :] < M))
            if EXTRA == 1:
                tl.store(Normaliser + head * T + t0 + order, norm, mask=inside & (block == 0))

        # ---------------------------------------------------------------------------------------- gradient of the logarithms
        if GATED and WEIGH > 0:
            a_at = Along + b * stride_ab + (h // GROUP_A) * stride_ah + wide(t0) * stride_at
            b_a = load_rows(a_at, order, inside, m, stride_at, stride_ad, M, BLOCK_M).to(tl.float32)
            s_at = States + (head * CHUNKS + c) * ((N + (EXTRA >= 2)) * M)
            if VECTOR:
                x_at = (head * T + t0 + order)[:, None] * M + m[None, :]
                x_inside = inside[:, None] & (m[None, :] < M)
                x = b_a * entered
                y = b_a * written
            else:
                x_at = (head * T + t0 + order) * tl.cdiv(M, BLOCK_M) + block
                x_inside = inside
                x = tl.sum(b_a * entered, 1)
                y = tl.sum(b_a * written, 1)
            if WEIGH == 1:
                tl.store(Sums + x_at, x + y, mask=x_inside)
                tl.store(s_at + (n[:, None] * M + m[None, :]), state.to(States.dtype.element_ty), mask=within)
                if EXTRA >= 2:
                    tl.store(s_at + N * M + m, row.to(States.dtype.element_ty), mask=m < M)
            else:
                before = tl.load(Sums + x_at, mask=x_inside, other=0.0)
                tl.store(Differences + x_at, before - (x + y), mask=x_inside)
                b_e = tl.load(s_at + (n[:, None] * M + m[None, :]), mask=within, other=0.0).to(tl.float32)
                beside = tl.zeros([BLOCK_M], tl.float32)
                if EXTRA >= 2:
                    beside = row * tl.load(s_at + N * M + m, mask=m < M, other=0.0).to(tl.float32)
                share = decay
                if not BEFORE:  # and by the gate of the chunk's first step in time
                    r_now = r_base
                    if VECTOR:
                        if RATED:
                            r_now = r_base + wide(t0) * stride_rt + m * stride_rd
                        share *= tl.exp2(load_gates(g_base + wide(t0) * stride_gt + m * stride_gd, r_now, m < M))
                    else:
                        if RATED:
                            r_now = r_base + wide(t0) * stride_rt
                        share *= tl.exp2(load_gates(g_base + wide(t0) * stride_gt, r_now, head >= 0))
                if VECTOR:
                    across = (tl.sum(b_e * state, 0) + beside) * share + tl.sum(x, 0)  # [M]
                    tl.store(Parts + (head * CHUNKS + c) * M + m, across, mask=m < M)
                else:
                    SHARES: tl.constexpr = N + C + (BLOCK_M if EXTRA >= 2 else 0)
                    p_at = Parts + ((head * CHUNKS + c) * tl.cdiv(M, BLOCK_M) + block) * SHARES
                    tl.store(p_at + n, tl.sum(b_e * state, 1) * share, mask=n < N)
                    tl.store(p_at + N + i, x)
                    if EXTRA >= 2:
                        tl.store(p_at + N + C + tl.arange(0, BLOCK_M), tl.where(m < M, beside * share, 0.0))

        # -------------------------------------------------------------------------------------------------------- writing
        if GATED and VECTOR:
            if COLUMNS:
                added = tl.dot(tl.trans(b_k), b_u, input_precision=PRECISION)
                state = (state * one_before[None, :] + added) * one_after[None, :]
                if EXTRA >= 2:
                    row = (row * one_before + tl.sum(right[:, None] * (b_v.to(tl.float32) * factor), 0)) * one_after
            else:
                added = tl.dot(tl.trans(b_h), b_v, input_precision=PRECISION)
                state = (state * one_before[:, None] + added) * one_after[:, None]
                if EXTRA == 1:
                    column = (column * one_before + tl.sum(b_k.to(tl.float32) * factor, 0)) * one_after
            passed += whole
        else:
            if GATED:
                b_u = (b_v.to(tl.float32) * after[:, None]).to(b_v.dtype)
                state = state * decay
            state += tl.dot(tl.trans(b_k), b_u, input_precision=PRECISION)
            if EXTRA == 1:
                kept = b_k.to(tl.float32)
                if GATED:
                    kept = kept * after[:, None]
                    column = column * decay
                column += tl.sum(kept, 0)
            if EXTRA >= 2:
                kept = b_v.to(tl.float32) * right[:, None]
                if GATED:
                    kept = kept * after[:, None]
                    row = row * decay
                row += tl.sum(kept, 0)
            if GATED:
                passed += tl.where(whole_count == 0, whole, -1e4)

    if FINISH:
        f_at = Final + b * stride_fb + h * stride_fh + segment * stride_fs
        f_type = Final.dtype.element_ty
        tl.store(f_at + (n[:, None] * stride_fn + m[None, :] * stride_fm), state.to(f_type), mask=within)
        if EXTRA == 1:
            tl.store(f_at + n * stride_fn + M * stride_fm, column.to(f_type), mask=(n < N) & (block == 0))
        if EXTRA >= 2:
            tl.store(f_at + N * stride_fn + m * stride_fm, row.to(f_type), mask=m < M)
    if GATED and not EMIT:
        if VECTOR:
            tl.store(Totals + (head * SEGMENTS + segment) * D + d, tl.exp2(passed), mask=(d < D) & (COLUMNS | (block == 0)))
        else:
            tl.store(Totals + head * SEGMENTS + segment, tl.exp2(passed), mask=block == 0)


@triton.jit(do_not_specialize=RUNTIME)
def carry_kernel(
    Slots, Totals, Initial, Final,
    stride_ib, stride_ih, stride_in, stride_im, stride_fb, stride_fh, stride_fn, stride_fm, H, SEGMENTS,
    COLUMNS: tl.constexpr, START: tl.constexpr, FINISH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Slots [B, H, SEGMENTS, ROWS, WIDTH]: what each segment adds to a state becomes the state that enters it.

    Totals is what each segment leaves of a state: one factor, or one for each row or column.
    """
    head = wide(tl.program_id(0))
    b = head // H
    h = head % H
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    within = (n < ROWS)[:, None] & (m < WIDTH)[None, :]
    inner = n[:, None] * WIDTH + m[None, :]
    state = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if START:
        i_at = Initial + b * stride_ib + h * stride_ih
        state = tl.load(i_at + (n[:, None] * stride_in + m[None, :] * stride_im), mask=within, other=0.0).to(tl.float32)
    for segment in range(0, SEGMENTS):
        at = Slots + (head * SEGMENTS + segment) * (ROWS * WIDTH) + inner
        added = tl.load(at, mask=within, other=0.0)
        tl.store(at, state, mask=within)
        if GATED:
            p_at = Totals + head * SEGMENTS + segment
            if VECTOR:
                if COLUMNS:
                    p_at = Totals + (head * SEGMENTS + segment) * WIDTH
                    state = state * tl.load(p_at + m, mask=m < WIDTH, other=0.0)[None, :]
                else:
                    p_at = Totals + (head * SEGMENTS + segment) * ROWS
                    state = state * tl.load(p_at + n, mask=n < ROWS, other=0.0)[:, None]
            else:
                state = state * tl.load(p_at)
        state += added
    if FINISH:
        f_at = Final + b * stride_fb + h * stride_fh
        tl.store(f_at + (n[:, None] * stride_fn + m[None, :] * stride_fm), state.to(Final.dtype.element_ty), mask=within)


# -------------------------------------------------------------------------------------------------------------------------- Steps


@triton.jit(do_not_specialize=RUNTIME)
def step_kernel(
    Q, K, V, Out, Normaliser, Gate, Rate, Bonus, Initial, Final,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_rb, stride_rh, stride_rt, stride_rd,
    stride_ub, stride_uh, stride_ut, stride_ud,
    stride_ib, stride_ih, stride_in, stride_im, stride_fb, stride_fh, stride_fn, stride_fm,
    GROUP_Q, GROUP_K, H, T, COLUMNS: tl.constexpr, EXTRA: tl.constexpr, START: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Few steps of BLOCK_M columns of one head's state, one after the other, in float32: the state is read and written once."""
    block = tl.program_id(0) % tl.cdiv(M, BLOCK_M)
    head = wide(tl.program_id(0) // tl.cdiv(M, BLOCK_M))
    b = head // H
    h = head % H
    n = tl.arange(0, BLOCK_N)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    within = (n < N)[:, None] & (m < M)[None, :]
    state = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    column = tl.zeros([BLOCK_N], tl.float32)
    if START:
        i_at = Initial + b * stride_ib + h * stride_ih
        state = tl.load(i_at + (n[:, None] * stride_in + m[None, :] * stride_im), mask=within, other=0.0).to(tl.float32)
        if EXTRA == 1:
            column = tl.load(i_at + n * stride_in + M * stride_im, mask=n < N, other=0.0).to(tl.float32)
    q_at = Q + b * stride_qb + (h // GROUP_Q) * stride_qh + n * stride_qd
    k_at = K + b * stride_kb + (h // GROUP_K) * stride_kh + n * stride_kd
    v_at = V + b * stride_vb + h * stride_vh + m * stride_vd
    for t in range(0, T):
        at = wide(t)
        q = tl.load(q_at + at * stride_qt, mask=n < N, other=0.0).to(tl.float32)
        k = tl.load(k_at + at * stride_kt, mask=n < N, other=0.0).to(tl.float32)
        v = tl.load(v_at + at * stride_vt, mask=m < M, other=0.0).to(tl.float32)
        entered = state
        norm = tl.sum(q * column, 0)
        if GATED:
            g_at = Gate + b * stride_gb + h * stride_gh + at * stride_gt
            r_at = Rate
            if RATED:
                r_at = Rate + b * stride_rb + h * stride_rh + at * stride_rt
            if VECTOR:
                d = m if COLUMNS else n
                D: tl.constexpr = M if COLUMNS else N
                if RATED:
                    r_at = r_at + d * stride_rd
                decay = tl.exp2(load_gates(g_at + d * stride_gd, r_at, d < D))
                if COLUMNS:
                    state = state * decay[None, :]
                else:
                    state = state * decay[:, None]
                    column = column * decay
            else:
                decay = tl.exp2(load_gates(g_at, r_at, head >= 0))
                state = state * decay
                column = column * decay
        state += k[:, None] * v[None, :]
        seen = entered if BEFORE else state
        if EXTRA == 1:
            column += k
            if not BEFORE:
                norm = tl.sum(q * column, 0)
            tl.store(Normaliser + head * T + t, norm, mask=block == 0)
        o = tl.sum(q[:, None] * seen, 0)
        if BONUS:
            u_at = Bonus + b * stride_ub + h * stride_uh + at * stride_ut
            o += tl.sum(q * k * tl.load(u_at + n * stride_ud, mask=n < N, other=0.0).to(tl.float32), 0) * v
        o_at = Out + b * stride_ob + h * stride_oh + at * stride_ot
        tl.store(o_at + m * stride_od, o.to(Out.dtype.element_ty), mask=m < M)
    f_at = Final + b * stride_fb + h * stride_fh
    tl.store(f_at + (n[:, None] * stride_fn + m[None, :] * stride_fm), state.to(Final.dtype.element_ty), mask=within)
    if EXTRA == 1:
        tl.store(f_at + n * stride_fn + M * stride_fm, column.to(Final.dtype.element_ty), mask=(n < N) & (block == 0))
