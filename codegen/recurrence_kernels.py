"""The recurrence template: a state in registers that runs through time a chunk of steps at a time.

    S_i = A_i * S_{i-1} + k_i v_i^T          o_i = q_i^T S_i        (or of the state before: o_i = q_i^T S_{i-1} + bonus)

In a chunk that is entered with state S, with G the running sum of the logarithms of the decays in it,

    o_i = q_i^T (exp(G_i) * S) + sum_{j <= i} (q_i^T (exp(G_i - G_j) * k_j v_j^T))
    S <- exp(G_C) * S + sum_j exp(G_C - G_j) * k_j v_j^T

where exp(G_i - G_j) = exp(G_i - r) exp(r - G_j), r = G_C / 2, is a factor of what is read and one of what was written, unless they
leave the range of the operands: heads with such chunks take a way of their own. The gradients are the same recurrence with the
parts exchanged, so that one kernel serves all four (docs of `recurrence_launches`):

    o:  reads q, writes k v^T, forwards            dv: reads k, writes q do^T, backwards
    dq: reads do, writes v k^T, forwards           dk: reads v, writes do q^T, backwards

Names say the part: Q [T, N] reads, K [T, N] and V [T, M] write, the state is [N, M], of which a program holds BLOCK_M columns. The
decay is one for the state; decays by row or column have a template of their own, `recurrence_decayed_kernels`. Gates are in units
of log2.
The delta rule's inverse T = (I - N)^-1 would be made of the same weights where a chunk is entered, and W replace what V writes.

No dot takes the transpose of another dot's result, which Triton 3.2 to 3.7 computes wrongly on Hopper; on Blackwell each has its
own sum, since two dots with one sum in a loop are wrong on some.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import wide
from .recurrence_gates import (
    BEFORE,
    BONUS,
    CONSTANT,
    GATED,
    JOINED,
    NEAR,
    PRECISION,
    RATED,
    RESET,
    RUNTIME,
    load_gates,
    load_rows,
)

# ------------------------------------------------------------------------------------------------------------------------ Gates


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


# --------------------------------------------------------------------------------------------------------------- Before and after


@triton.jit(do_not_specialize=RUNTIME)
def sums_kernel(
    Gate, Rate, Totals, Counts, Far, stride_gb, stride_gh, stride_gt, stride_rb, stride_rh, stride_rt, H, T, CHUNKS,
    REVERSE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`running_sums` of one chunk of one head, [B, H, CHUNKS, C], in the order of travel: scans have no place on a serial path.

    Far [B, H, CHUNKS] tells for which chunks one factor for what reads and one for what writes are not exact.
    """
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
    whole = tl.sum(tl.where(i == C - 1, total, 0.0), 0)
    far = (tl.max(tl.abs(total - 0.5 * whole)) > NEAR) | (tl.max(count) > 0)
    tl.store(Far + head * CHUNKS + c, far.to(tl.int32))


@triton.jit(do_not_specialize=RUNTIME)
def slopes_kernel(Sums, Differences, Parts, Slopes, T, CHUNKS, BLOCKS, SHARES, C: tl.constexpr):
    """The gradient of the logarithms of one chunk of one head, [B, H, T, D], of what `replay_kernel` left:

        Slopes_t = sum Parts + sum_{i >= t} Differences_i (- Sums_t where the state is read before its update)

    where Differences and Sums [B, H, T, BLOCKS] are summed over blocks of columns, and Parts [B, H, CHUNKS, SHARES] over all.
    """
    c = tl.program_id(0) % CHUNKS
    head = wide(tl.program_id(0) // CHUNKS)
    t = c * C + tl.arange(0, C)
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


@triton.jit
def travel(
    Q, K, V, Out, Normaliser, Gate, Rate, ChunkSums, ChunkCounts, Far, Bonus, Left, Right, Initial, Final, Totals, Along, States,
    Sums, Differences, Parts,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_rb, stride_rh, stride_rt, stride_rd,
    stride_ub, stride_uh, stride_ut, stride_ud, stride_lb, stride_lh, stride_lt, stride_xb, stride_xh, stride_xt,
    stride_ib, stride_ih, stride_is, stride_in, stride_im, stride_fb, stride_fh, stride_fs, stride_fn, stride_fm,
    stride_ab, stride_ah, stride_at, stride_ad,
    GROUP_Q, GROUP_K, GROUP_V, GROUP_A, H, T, CHUNKS, SEGMENT, SEGMENTS,
    EMIT: tl.constexpr, REVERSE: tl.constexpr, EXCHANGED: tl.constexpr, EXTRA: tl.constexpr, FAR: tl.constexpr,
    WEIGH: tl.constexpr, START: tl.constexpr, FINISH: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`replay_kernel` of heads of which some chunk is far, FAR, or none."""
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
            if FAR:
                after = power(whole - total, count == whole_count)  # [C]
            else:  # with half of it before the products and half after them
                half = tl.exp2(0.5 * whole)
                after = tl.exp2(0.5 * whole - total)
                factor = tl.exp2(read - 0.5 * whole)
            b_u = (b_v.to(tl.float32) * after[:, None]).to(b_v.dtype)
        if GATED and WEIGH > 0:  # loaded long before they are needed: these loads are not made in earlier steps
            a_at = Along + b * stride_ab + (h // GROUP_A) * stride_ah + wide(t0) * stride_at
            b_a = load_rows(a_at, order, inside, m, stride_at, stride_ad, M, BLOCK_M)
            s_at = States + (head * CHUNKS + c) * ((N + (EXTRA >= 2)) * M)
            x_at = (head * T + t0 + order) * tl.cdiv(M, BLOCK_M) + block
            if WEIGH == 2:
                before = tl.load(Sums + x_at, mask=inside, other=0.0)
                b_e = tl.load(s_at + (n[:, None] * M + m[None, :]), mask=within, other=0.0)
                if EXTRA >= 2:
                    b_r = tl.load(s_at + N * M + m, mask=m < M, other=0.0).to(tl.float32)
                share = decay
                if not BEFORE:  # and by the gate of the chunk's first step in time
                    r_now = r_base
                    if RATED:
                        r_now = r_base + wide(t0) * stride_rt
                    share *= tl.exp2(load_gates(g_base + wide(t0) * stride_gt, r_now, head >= 0))
        near_state = state
        entering_row = row
        if GATED and not FAR:
            near_state = state * half
            if EXTRA == 1:
                column = column * half
            if EXTRA >= 2:
                row = row * half

        # -------------------------------------------------------------------------------------------------------- reading
        if EMIT:
            b_q = load_rows(q_base + wide(t0) * stride_qt, order, inside, n, stride_qt, stride_qd, N, BLOCK_N)  # [C, N]
            b_s = near_state.to(b_q.dtype)
            if EXTRA == 2:
                left = tl.load(
                    Left + b * stride_lb + h * stride_lh + wide(t0) * stride_lt + order * stride_lt, mask=inside, other=0.0
                )
                left = left.to(tl.float32)
            if EXTRA == 3:
                left = inside.to(tl.float32)
            w = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            if EXTRA >= 2:
                w += left[:, None] * right[None, :]
            if GATED and FAR:
                near = seen & (read_count[:, None] == count[None, :])
                w = tl.where(near, w * power(read[:, None] - total[None, :], near), 0.0)
            else:
                w = tl.where(seen, w, 0.0)
            if EXTRA == 1:
                if GATED and not FAR:
                    norm = tl.sum(w * after[None, :], 1)
                else:
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
            if GATED and FAR:
                factor = power(read, read_count == 0)
                entered = entered * factor[:, None]
                if EXTRA == 1:
                    from_column = from_column * factor
            if EXTRA == 1:
                norm += from_column
                if GATED and not FAR:
                    norm = norm * factor
            b_x = b_v if FAR else b_u
            if JOINED and WEIGH < 2:
                acc = tl.dot(b_w, b_x, entered, input_precision=PRECISION)
                if GATED and not FAR:
                    acc = acc * factor[:, None]
            else:
                written = tl.dot(b_w, b_x, input_precision=PRECISION)
                if GATED and not FAR:
                    written = written * factor[:, None]
                    entered = entered * factor[:, None]
                acc = entered + written
            read_there = acc  # but of the step itself
            if Out is not None:
                if not BEFORE:
                    if WEIGH > 0:
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
            both = tl.sum(b_a.to(tl.float32) * read_there, 1)
            if WEIGH == 1:
                tl.store(Sums + x_at, both, mask=inside)
                tl.store(s_at + (n[:, None] * M + m[None, :]), state.to(States.dtype.element_ty), mask=within)
                if EXTRA >= 2:
                    tl.store(s_at + N * M + m, entering_row.to(States.dtype.element_ty), mask=m < M)
            else:
                x = tl.sum(b_a.to(tl.float32) * entered, 1)
                tl.store(Differences + x_at, before - both, mask=inside)
                SHARES: tl.constexpr = N + C + (BLOCK_M if EXTRA >= 2 else 0)
                p_at = Parts + ((head * CHUNKS + c) * tl.cdiv(M, BLOCK_M) + block) * SHARES
                tl.store(p_at + n, tl.sum(b_e.to(tl.float32) * state, 1) * share, mask=n < N)
                tl.store(p_at + N + i, x)
                if EXTRA >= 2:
                    beside = entering_row * b_r * share
                    tl.store(p_at + N + C + tl.arange(0, BLOCK_M), tl.where(m < M, beside, 0.0))

        # -------------------------------------------------------------------------------------------------------- writing
        if GATED and FAR:
            near_state = state * decay
        state = near_state + tl.dot(tl.trans(b_k), b_u, input_precision=PRECISION)
        if EXTRA == 1:
            kept = b_k.to(tl.float32)
            if GATED:
                kept = kept * after[:, None]
                if FAR:
                    column = column * decay
            column += tl.sum(kept, 0)
        if EXTRA >= 2:
            kept = b_v.to(tl.float32) * right[:, None]
            if GATED:
                kept = kept * after[:, None]
                if FAR:
                    row = row * decay
            row += tl.sum(kept, 0)
        if GATED and not FAR:
            state = state * half
            if EXTRA == 1:
                column = column * half
            if EXTRA >= 2:
                row = row * half
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
        tl.store(Totals + head * SEGMENTS + segment, tl.exp2(passed), mask=block == 0)


@triton.jit(do_not_specialize=RUNTIME)
def replay_kernel(
    Q, K, V, Out, Normaliser, Gate, Rate, ChunkSums, ChunkCounts, Far, Bonus, Left, Right, Initial, Final, Totals, Along, States,
    Sums, Differences, Parts,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_rb, stride_rh, stride_rt, stride_rd,
    stride_ub, stride_uh, stride_ut, stride_ud, stride_lb, stride_lh, stride_lt, stride_xb, stride_xh, stride_xt,
    stride_ib, stride_ih, stride_is, stride_in, stride_im, stride_fb, stride_fh, stride_fs, stride_fn, stride_fm,
    stride_ab, stride_ah, stride_at, stride_ad,
    GROUP_Q, GROUP_K, GROUP_V, GROUP_A, H, T, CHUNKS, SEGMENT, SEGMENTS,
    EMIT: tl.constexpr, REVERSE: tl.constexpr, EXCHANGED: tl.constexpr, EXTRA: tl.constexpr,
    WEIGH: tl.constexpr, START: tl.constexpr, FINISH: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One segment of time of BLOCK_M columns of one head's state.

    EMIT: write Out; otherwise only what the segment does to a state, Final and Totals. REVERSE: time runs backwards, over the
    same chunks. EXCHANGED: the state is [Dv, Dk]. EXTRA: the state's additional column, which V meets with ones (1), or its
    additional row, which Q meets with Left (2) or K with Right (3), the other with ones. START, FINISH: Initial and Final are
    there. WEIGH: on the way of dq (1), keep the state that enters each chunk and sums of q dq; on that of dk (2), what the gradient
    of the logarithms is made of. With S the state that enters a chunk and R that which enters it on the way back,

        dg_t = sum_m decay R S + sum_{i >= t} q_i dq_i + sum_{i < t} k_i dk_i - sum_{i >= t} k_i dk_i

    where the first sum of k dk counts what came from beyond the chunk, the second what came from within: nothing large cancels.
    The sums over steps and columns are left to `slopes_kernel`.
    """
    head = wide(tl.program_id(0) // tl.cdiv(M, BLOCK_M))
    distant = False
    if GATED:
        if CONSTANT:
            g_base = Gate + head // H * stride_gb + head % H * stride_gh
            r_base = Rate
            if RATED:
                r_base = Rate + head // H * stride_rb + head % H * stride_rh
            distant = tl.abs(load_gates(g_base, r_base, head >= 0)) * (0.5 * C) > NEAR
        else:
            most = tl.zeros([128], tl.int32)
            for first in range(0, CHUNKS, 128):
                at = first + tl.arange(0, 128)
                most = tl.maximum(most, tl.load(Far + head * CHUNKS + at, mask=at < CHUNKS, other=0))
            distant = tl.max(most, 0) > 0
    for FAR in tl.static_range(0, 2 if GATED else 1):
        if distant == (FAR == 1):
            travel(
                Q, K, V, Out, Normaliser, Gate, Rate, ChunkSums, ChunkCounts, Far, Bonus, Left, Right, Initial, Final, Totals,
                Along, States, Sums, Differences, Parts, stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh,
                stride_kt, stride_kd, stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
                stride_gb, stride_gh, stride_gt, stride_gd, stride_rb, stride_rh, stride_rt, stride_rd, stride_ub, stride_uh,
                stride_ut, stride_ud, stride_lb, stride_lh, stride_lt, stride_xb, stride_xh, stride_xt, stride_ib, stride_ih,
                stride_is, stride_in, stride_im, stride_fb, stride_fh, stride_fs, stride_fn, stride_fm, stride_ab, stride_ah,
                stride_at, stride_ad, GROUP_Q, GROUP_K, GROUP_V, GROUP_A, H, T, CHUNKS, SEGMENT, SEGMENTS, EMIT, REVERSE,
                EXCHANGED, EXTRA, FAR, WEIGH, START, FINISH, N, M, BLOCK_N, BLOCK_M, C,
            )  # fmt: skip
