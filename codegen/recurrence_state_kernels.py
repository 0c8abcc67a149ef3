"""Recurrences whose states go from segment to segment, or through few steps."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import wide
from .recurrence_gates import BEFORE, BONUS, GATED, RATED, RUNTIME, VECTOR, load_gates


@triton.jit(do_not_specialize=RUNTIME)
def carry_kernel(
    Slots, Totals, Initial, Final,
    stride_ib, stride_ih, stride_in, stride_im, stride_fb, stride_fh, stride_fn, stride_fm, H, SEGMENTS,
    START: tl.constexpr, FINISH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Slots [B, H, SEGMENTS, ROWS, WIDTH]: what each segment adds to a state becomes the state that enters it.

    Totals is what each segment leaves of a state: one factor, or one for each row.
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
            if VECTOR:
                p_at = Totals + (head * SEGMENTS + segment) * ROWS + n
                state = state * tl.load(p_at, mask=n < ROWS, other=0.0)[:, None]
            else:
                state = state * tl.load(Totals + head * SEGMENTS + segment)
        state += added
    if FINISH:
        f_at = Final + b * stride_fb + h * stride_fh
        tl.store(f_at + (n[:, None] * stride_fn + m[None, :] * stride_fm), state.to(Final.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=RUNTIME)
def step_kernel(
    Q, K, V, Out, Normaliser, Gate, Rate, Bonus, Initial, Final,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_rb, stride_rh, stride_rt, stride_rd,
    stride_ub, stride_uh, stride_ut, stride_ud,
    stride_ib, stride_ih, stride_in, stride_im, stride_fb, stride_fh, stride_fn, stride_fm,
    GROUP_Q, GROUP_K, H, T, BY_COLUMN: tl.constexpr, EXTRA: tl.constexpr, START: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Few steps of BLOCK_M columns of one head's state, one after the other, in float32: the state is read and written once.

    Final may be Initial: no program reads what another writes. The normaliser's column is read, used and written by block 0 alone.
    """
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
            column = tl.load(i_at + n * stride_in + M * stride_im, mask=(n < N) & (block == 0), other=0.0).to(tl.float32)
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
                d = m if BY_COLUMN else n
                D: tl.constexpr = M if BY_COLUMN else N
                if RATED:
                    r_at = r_at + d * stride_rd
                decay = tl.exp2(load_gates(g_at + d * stride_gd, r_at, d < D))
                if BY_COLUMN:
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
