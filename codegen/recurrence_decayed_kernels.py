"""The recurrence template for decays along one dimension of the state, a chunk of C steps at a time.

Say that the state S [N, M] decays along N, with x [T, N] its reader and y [T, N] its writer there, w [T, M] the writer and z [T, M]
the reader (in a gradient) along M. For a decay of each key these are q, k, v and do; for one of each value do, v, k and q. With G
the running sum of the logarithms in a chunk and S the state that enters it,

    reads_i = x_i exp(G_i)      writes_j = y_j exp(G_C - G_j)      A_ij = sum_n x_in y_jn exp(G_in - G_jn), j <= i

depend on one chunk alone: `weights_kernel`. What is left to be done chunk after chunk has no decay but one factor for each row,
`chain_kernel`; with R the gradient of the state after a chunk,

    x^T S:  reads S + A w            S <- exp(G_C) S + writes^T w             (the output by key, dq by value)
    y^T R:  writes R + A^T z         R <- exp(G_C) R + reads^T z              (dv by key, dk by value)

The rest are sums over pairs of steps of a chunk, and of what the states that were kept give: `pairs_kernel`, with s_ij = z_i . w_j,

    dx_i = exp(G_i) (S z_i) + sum_{j <= i} s_ij y_j exp(G_i - G_j)            (dq by key, the output by value)
    dy_j = exp(G_C - G_j) (R w_j) + sum_{i >= j} s_ij x_i exp(G_i - G_j)      (dk by key, dv by value)

and the gradient of each logarithm, the sum over all pairs of steps that it lies between.

Where the decays of a chunk are mild, exp(G_i - G_j) is a factor of i and one of j, both relative to G_C / 2. Where they are not,
the chunk is far, and halved again and again: pairs of a later half's i and an earlier half's j part at the border between them, at
which no factor is large. Far chunks have launches of their own, which find nothing to do where there are none.

Gates are in units of log2. No dot takes the transpose of another dot's result, which Triton 3.2 to 3.7 computes wrongly on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import wide
from .recurrence_gates import BEFORE, BONUS, NEAR, NORMALISED, PRECISION, RATED, RUNTIME, load_rows, load_vectors

# ------------------------------------------------------------------------------------------------------------------------- Pairs


@triton.jit
def sums_in(g, HEIGHT: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """[C, WIDTH]: running sums of g, each in its block of HEIGHT rows, up to and with a row, or from it on."""
    if HEIGHT == C:
        return tl.cumsum(g, 0, reverse=REVERSE)
    else:
        return tl.reshape(tl.cumsum(tl.reshape(g, [C // HEIGHT, HEIGHT, WIDTH]), 1, reverse=REVERSE), [C, WIDTH])


@triton.jit
def adjoining(i, j, HEIGHT: tl.constexpr):
    """Whether step i is in the second block of a pair of blocks of HEIGHT, and j in its first."""
    return (i // HEIGHT % 2 == 1) & (j // HEIGHT == i // HEIGHT - 1)


@triton.jit
def together(i, j, height):
    """Whether j comes before i in one block of `height`."""
    return (i // height == j // height) & (j < i)


@triton.jit
def scaled(b_x, exponent):
    """b_x 2 ** exponent, in the dtype of b_x."""
    return (b_x.to(tl.float32) * tl.exp2(exponent)).to(b_x.dtype)


@triton.jit
def until(total, g):
    """Of the running sums with each row, what a state that is read there has decayed by."""
    if BEFORE:
        return total - g
    else:
        return total


@triton.jit
def remaining(g, total, whole, b_x):
    """What a write at a row has decayed by at the end of the chunk."""
    if b_x.dtype == tl.float32:
        return tl.cumsum(g, 0, reverse=True) - g
    else:
        return whole[None, :] - total


@triton.jit
def distant_weights(b_x, b_y, g, C: tl.constexpr, WIDTH: tl.constexpr):
    """[C, C]: w_ij = sum_n x_in y_jn 2 ** (sum of g_n between j and i) for j < i, however strong the decays are."""
    w = tl.zeros([C, C], tl.float32)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    total = tl.cumsum(g, 0)
    far = True
    height = C
    for level in tl.static_range(1, 7):
        if (C >> level) > 0:
            if far:
                total = sums_in(g, C >> level, False, C, WIDTH)
                b_left = scaled(b_x, until(total, g))
                b_right = scaled(b_y, sums_in(g, C >> level, True, C, WIDTH) - g)
                w += tl.where(adjoining(i, j, C >> level), tl.dot(b_left, tl.trans(b_right), input_precision=PRECISION), 0.0)
                far = tl.max(tl.abs(total)) > NEAR
                height = C >> level
    if height > 1:
        b_left = scaled(b_x, until(total, g))
        b_right = scaled(b_y, -total)
        w += tl.where(together(i, j, height), tl.dot(b_left, tl.trans(b_right), input_precision=PRECISION), 0.0)
    return w


@triton.jit(do_not_specialize=RUNTIME)
def weights_kernel(
    X, Y, Gate, Rate, Bonus, Reads, Writes, Weights, Decays, Far,
    stride_xb, stride_xh, stride_xt, stride_xd, stride_yb, stride_yh, stride_yt, stride_yd,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_rb, stride_rh, stride_rt, stride_rd,
    stride_ub, stride_uh, stride_ut, stride_ud, GROUP_X, GROUP_Y, H, T, CHUNKS,
    FAR: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What one chunk of one head reads, Reads, and writes, Writes [B, H, CHUNKS, C, BLOCK_N], Weights [B, H, CHUNKS, C, C] and
    Decays [B, H, CHUNKS, BLOCK_N] across it; without X only what it writes.

    Steps beyond the last are zeros, which neither write nor decay; so are columns from N on. Far [B, H, CHUNKS] tells for which
    chunks one product for all pairs is not exact: their weights are what a second launch, FAR, is for.
    """
    c = tl.program_id(0) % CHUNKS
    head = wide(tl.program_id(0) // CHUNKS)
    b = head // H
    h = head % H
    i = tl.arange(0, C)
    t0 = wide(c * C)
    inside = c * C + i < T
    chunk = head * CHUNKS + c
    y_base = Y + b * stride_yb + (h // GROUP_Y) * stride_yh + t0 * stride_yt
    g_base = Gate + b * stride_gb + h * stride_gh + t0 * stride_gt
    r_base = Rate
    if RATED:
        r_base = Rate + b * stride_rb + h * stride_rh + t0 * stride_rt
    if FAR:
        if tl.load(Far + chunk) == 0:
            return
    if X is not None:
        x_base = X + b * stride_xb + (h // GROUP_X) * stride_xh + t0 * stride_xt
        w = tl.zeros([C, C], tl.float32)
        own = tl.zeros([C], tl.float32)
    most = 0.0
    for first in tl.static_range(0, BLOCK_N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        held = inside[:, None] & (n < N)[None, :]
        b_y = load_rows(y_base, i, inside, n, stride_yt, stride_yd, N, BLOCK_N)
        r_at = r_base
        if RATED:
            r_at = r_base + (i[:, None] * stride_rt + n[None, :] * stride_rd)
        g = load_vectors(g_base + (i[:, None] * stride_gt + n[None, :] * stride_gd), r_at, held)
        if not FAR:
            total = tl.cumsum(g, 0)
            whole = tl.sum(g, 0)
            at = chunk * (C * BLOCK_N) + (i[:, None] * BLOCK_N + n[None, :])
            tl.store(Writes + at, scaled(b_y, remaining(g, total, whole, b_y)))
            tl.store(Decays + chunk * BLOCK_N + n, tl.exp2(whole))
            middle = 0.5 * whole[None, :]
            most = tl.maximum(most, tl.max(tl.abs(total - middle)))
        if X is not None:
            b_x = load_rows(x_base, i, inside, n, stride_xt, stride_xd, N, BLOCK_N)
            if FAR:
                w += distant_weights(b_x, b_y, g, C, BLOCK)
            else:
                read = until(total, g)
                tl.store(Reads + at, scaled(b_x, read))
                b_left = scaled(b_x, read - middle)
                b_right = scaled(b_y, middle - total)
                w += tl.dot(b_left, tl.trans(b_right), input_precision=PRECISION)
            if BONUS or not BEFORE:
                both = b_x.to(tl.float32) * b_y.to(tl.float32)
                if BONUS:
                    u_base = Bonus + b * stride_ub + h * stride_uh + t0 * stride_ut
                    both = both * load_rows(u_base, i, inside, n, stride_ut, stride_ud, N, BLOCK_N).to(tl.float32)
                own += tl.sum(both, 1)
    if X is not None:
        w = tl.where(i[None, :] < i[:, None], w, tl.where(i[None, :] == i[:, None], own[:, None], 0.0))
        tl.store(Weights + chunk * (C * C) + (i[:, None] * C + i[None, :]), w.to(Weights.dtype.element_ty))
    if not FAR:
        tl.store(Far + chunk, (most > NEAR).to(tl.int32))


# ------------------------------------------------------------------------------------------------------------------------- Chain


@triton.jit(do_not_specialize=RUNTIME)
def chain_kernel(
    Reads, Writes, Weights, Decays, W, Out, Normaliser, Extra, Initial, Final, Totals, States, Columns,
    stride_wb, stride_wh, stride_wt, stride_wd, stride_ob, stride_oh, stride_ot, stride_od, stride_eb, stride_eh, stride_et,
    stride_ib, stride_ih, stride_is, stride_in, stride_im, stride_fb, stride_fh, stride_fs, stride_fn, stride_fm,
    GROUP_W, H, T, CHUNKS, SEGMENT, SEGMENTS,
    REVERSE: tl.constexpr, START: tl.constexpr, FINISH: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One segment of time of BLOCK_M columns of one head's state, forwards or, with Reads and Writes exchanged, backwards.

    Reads: absent if nothing is read, only what the segment does to a state is wanted. The normaliser's column of the state meets
    ones, or Extra [B, H, T]. States, Columns: where the state that enters each chunk is kept, if given. START, FINISH:
    Initial and Final are there. Totals [B, H, SEGMENTS, BLOCK_N]: what is left of a state, if asked for.
    """
    block = tl.program_id(0) % tl.cdiv(M, BLOCK_M)
    head = wide(tl.program_id(0) // tl.cdiv(M, BLOCK_M))
    b = head // H
    h = head % H
    segment = tl.program_id(1)
    steps = tl.minimum(SEGMENT, CHUNKS - segment * SEGMENT)
    n = tl.arange(0, BLOCK_N)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.arange(0, C)
    within = (n < N)[:, None] & (m < M)[None, :]
    state = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    column = tl.zeros([BLOCK_N], tl.float32)
    if START:
        i_at = Initial + b * stride_ib + h * stride_ih + segment * stride_is
        state = tl.load(i_at + (n[:, None] * stride_in + m[None, :] * stride_im), mask=within, other=0.0).to(tl.float32)
        if NORMALISED:
            column = tl.load(i_at + n * stride_in + M * stride_im, mask=n < N, other=0.0).to(tl.float32)
    passed = tl.zeros([BLOCK_N], tl.float32) + 1.0
    w_base = W + b * stride_wb + (h // GROUP_W) * stride_wh

    for step in range(0, steps):
        c = segment * SEGMENT + step
        if REVERSE:
            c = CHUNKS - 1 - c
        chunk = head * CHUNKS + c
        inside = c * C + i < T
        at = chunk * (C * BLOCK_N) + (i[:, None] * BLOCK_N + n[None, :])
        b_k = tl.load(Writes + at)  # [C, N]
        b_w = load_rows(w_base + wide(c * C) * stride_wt, i, inside, m, stride_wt, stride_wd, M, BLOCK_M)  # [C, M]
        decay = tl.load(Decays + chunk * BLOCK_N + n)
        if NORMALISED:
            ones = inside.to(tl.float32)
            if Extra is not None:
                e_at = Extra + b * stride_eb + h * stride_eh + wide(c * C) * stride_et + i * stride_et
                ones = tl.load(e_at, mask=inside, other=0.0).to(tl.float32)
        if States is not None:
            s_at = States + chunk * (BLOCK_N * M) + (n[:, None] * M + m[None, :])
            tl.store(s_at, state.to(States.dtype.element_ty), mask=(m < M)[None, :])
            if NORMALISED:
                tl.store(Columns + chunk * BLOCK_N + n, column, mask=(n >= 0) & (block == 0))
        if Reads is not None:
            b_q = tl.load(Reads + at)
            if REVERSE:
                b_a = tl.load(Weights + chunk * (C * C) + (i[:, None] + i[None, :] * C))
            else:
                b_a = tl.load(Weights + chunk * (C * C) + (i[:, None] * C + i[None, :]))
            entered = tl.dot(b_q, state.to(b_q.dtype), input_precision=PRECISION)
            written = tl.dot(b_a, b_w, input_precision=PRECISION)
            o_at = Out + b * stride_ob + h * stride_oh + wide(c * C) * stride_ot
            o_at += i[:, None] * stride_ot + m[None, :] * stride_od
            tl.store(o_at, (entered + written).to(Out.dtype.element_ty), mask=inside[:, None] & (m[None, :] < M))
            if Normaliser is not None:
                norm = tl.sum(b_a.to(tl.float32), 1) + tl.sum(b_q.to(tl.float32) * column[None, :], 1)
                tl.store(Normaliser + head * T + c * C + i, norm, mask=inside & (block == 0))
        state = state * decay[:, None]
        state += tl.dot(tl.trans(b_k), b_w, input_precision=PRECISION)
        if NORMALISED:
            column = column * decay + tl.sum(b_k.to(tl.float32) * ones[:, None], 0)
        if Totals is not None:
            passed = passed * decay

    if FINISH:
        f_at = Final + b * stride_fb + h * stride_fh + segment * stride_fs
        f_type = Final.dtype.element_ty
        tl.store(f_at + (n[:, None] * stride_fn + m[None, :] * stride_fm), state.to(f_type), mask=within)
        if NORMALISED:
            tl.store(f_at + n * stride_fn + M * stride_fm, column.to(f_type), mask=(n < N) & (block == 0))
    if Totals is not None:
        tl.store(Totals + (head * SEGMENTS + segment) * N + n, passed, mask=(n < N) & (block == 0))


# ------------------------------------------------------------------------------------------------------------ Gradients of pairs


@triton.jit
def near_pairs(
    s, s_back, from_start, from_end, across, b_x, b_y, g, BACK: tl.constexpr, SLOPES: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """`(dx, dy, slopes)` [C, BLOCK] but what a step gives itself, where one product for all pairs is exact."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    whole = tl.sum(g, 0)
    middle = 0.5 * whole
    total = tl.cumsum(g, 0) - middle[None, :]
    b_pairs = tl.where(j < i, s, 0.0).to(b_y.dtype)
    right = tl.exp2(-total)
    b_right = (b_y.to(tl.float32) * right).to(b_y.dtype)
    left = tl.exp2(until(total, g))
    dx = from_start * tl.exp2(middle)[None, :] + tl.dot(b_pairs, b_right, input_precision=PRECISION)
    dx = dx * left
    dy = from_end
    slopes = from_end
    if BACK:
        b_pairs = tl.where(i < j, s_back, 0.0).to(b_y.dtype)
        b_left = (b_x.to(tl.float32) * left).to(b_x.dtype)
        from_end = from_end * tl.exp2(middle)[None, :]
        dy = (from_end + tl.dot(b_pairs, b_left, input_precision=PRECISION)) * right
        if SLOPES:
            fixed = across * tl.exp2(whole) + tl.sum(b_y.to(tl.float32) * (right * from_end), 0)
            reads = b_x.to(tl.float32) * dx
            slopes = until(tl.cumsum(reads - b_y.to(tl.float32) * dy, 0, reverse=True), reads) + fixed[None, :]
    return dx, dy, slopes


@triton.jit
def distant_pairs(
    s, s_back, from_start, from_end, across, b_x, b_y, g,
    BACK: tl.constexpr, SLOPES: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The same however strong the decays are."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    total = tl.cumsum(g, 0)
    dx = from_start * tl.exp2(until(total, g))
    dy = from_end * tl.exp2(tl.cumsum(g, 0, reverse=True) - g)
    slopes = from_end
    if SLOPES:
        wrote = b_y.to(tl.float32) * dy
        slopes = until(tl.cumsum(b_x.to(tl.float32) * dx, 0, reverse=True), b_x.to(tl.float32) * dx)
        slopes += tl.cumsum(wrote, 0) - wrote + (across * tl.exp2(tl.sum(g, 0)))[None, :]
    far = True
    height = C
    for level in tl.static_range(1, 7):
        if (C >> level) > 0:
            if far:
                total = sums_in(g, C >> level, False, C, WIDTH)
                after = sums_in(g, C >> level, True, C, WIDTH) - g
                b_pairs = tl.where(adjoining(i, j, C >> level), s, 0.0).to(b_y.dtype)
                more = tl.dot(b_pairs, scaled(b_y, after), input_precision=PRECISION) * tl.exp2(until(total, g))
                dx += more
                if BACK:
                    b_pairs = tl.where(adjoining(j, i, C >> level), s_back, 0.0).to(b_y.dtype)
                    back = tl.dot(b_pairs, scaled(b_x, until(total, g)), input_precision=PRECISION) * tl.exp2(after)
                    dy += back
                    if SLOPES:  # pairs part at a border: they lie on both its sides
                        reads = b_x.to(tl.float32) * more
                        wrote = b_y.to(tl.float32) * back
                        slopes += until(sums_in(reads, C >> level, True, C, WIDTH), reads)
                        slopes += sums_in(wrote, C >> level, False, C, WIDTH) - wrote
                far = tl.max(tl.abs(total)) > NEAR
                height = C >> level
    if height > 1:
        b_pairs = tl.where(together(i, j, height), s, 0.0).to(b_y.dtype)
        more = tl.dot(b_pairs, scaled(b_y, -total), input_precision=PRECISION) * tl.exp2(until(total, g))
        dx += more
        if BACK:
            b_pairs = tl.where(together(j, i, height), s_back, 0.0).to(b_y.dtype)
            back = tl.dot(b_pairs, scaled(b_x, until(total, g)), input_precision=PRECISION) * tl.exp2(-total)
            dy += back
            if SLOPES:
                reads = b_x.to(tl.float32) * more
                slopes += until(tl.cumsum(reads - b_y.to(tl.float32) * back, 0, reverse=True), reads)
    return dx, dy, slopes


@triton.jit(do_not_specialize=RUNTIME)
def pairs_kernel(
    Z, W, X, Y, Gate, Rate, Bonus, Starts, Ends, StartColumns, EndColumns, Extra, DX, DY, Slopes, Far,
    stride_zb, stride_zh, stride_zt, stride_zd, stride_wb, stride_wh, stride_wt, stride_wd,
    stride_xb, stride_xh, stride_xt, stride_xd, stride_yb, stride_yh, stride_yt, stride_yd,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_rb, stride_rh, stride_rt, stride_rd,
    stride_ub, stride_uh, stride_ut, stride_ud, stride_eb, stride_eh, stride_et,
    stride_pb, stride_ph, stride_pt, stride_pd, stride_ob, stride_oh, stride_ot, stride_od,
    GROUP_Z, GROUP_W, GROUP_X, GROUP_Y, H, T, CHUNKS, COLUMNS,
    FAR: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One chunk of BLOCK columns of DX and DY, those that are given, and of Slopes [B, H, T, N], the gradient of the logarithms.

    Starts, Ends [B, H, CHUNKS, BLOCK_N, M]: the states that entered the chunk, S, and on the way back, R; StartColumns, EndColumns
    [B, H, CHUNKS, BLOCK_N] their additional columns. FAR: the chunks that Far [B, H, CHUNKS] names, else the others. The gradient
    of a logarithm adds what came from beyond the chunk and what comes from pairs in it, each summed over rows of the chunk alone:
    nothing large cancels. COLUMNS: M at run time. With a constant bound, a loop of one iteration is folded away, and Triton 3.6
    miscompiles what is left on Hopper.
    """
    c = tl.program_id(0) % CHUNKS
    head = wide(tl.program_id(0) // CHUNKS)
    b = head // H
    h = head % H
    i = tl.arange(0, C)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t0 = wide(c * C)
    inside = c * C + i < T
    chunk = head * CHUNKS + c
    if (tl.load(Far + chunk) != 0) != FAR:
        return
    z_base = Z + b * stride_zb + (h // GROUP_Z) * stride_zh + t0 * stride_zt
    w_base = W + b * stride_wb + (h // GROUP_W) * stride_wh + t0 * stride_wt
    s = tl.zeros([C, C], tl.float32)  # z_i . w_j
    s_back = tl.zeros([C, C], tl.float32)  # w_j . z_i
    from_start = tl.zeros([C, BLOCK], tl.float32)
    from_end = tl.zeros([C, BLOCK], tl.float32)
    across = tl.zeros([BLOCK], tl.float32)
    WIDTH: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    for first in range(0, COLUMNS, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        b_z = load_rows(z_base, i, inside, m, stride_zt, stride_zd, M, WIDTH)  # [C, M]
        b_w = load_rows(w_base, i, inside, m, stride_wt, stride_wd, M, WIDTH)
        s_at = chunk * (BLOCK_N * M) + (n[:, None] * M + m[None, :])
        b_s = tl.load(Starts + s_at, mask=(m < M)[None, :], other=0.0)  # [BLOCK, M]
        s += tl.dot(b_z, tl.trans(b_w), input_precision=PRECISION)
        from_start += tl.dot(b_z, tl.trans(b_s), input_precision=PRECISION)
        if DY is not None:
            b_e = tl.load(Ends + s_at, mask=(m < M)[None, :], other=0.0)
            s_back += tl.dot(b_w, tl.trans(b_z), input_precision=PRECISION)
            from_end += tl.dot(b_w, tl.trans(b_e), input_precision=PRECISION)
            if Slopes is not None:
                across += tl.sum(b_s.to(tl.float32) * b_e.to(tl.float32), 1)
    if NORMALISED:
        extra = tl.load(Extra + b * stride_eb + h * stride_eh + t0 * stride_et + i * stride_et, mask=inside, other=0.0).to(
            tl.float32
        )
        b_s_column = tl.load(StartColumns + chunk * BLOCK_N + n)
        b_e_column = tl.load(EndColumns + chunk * BLOCK_N + n)
        s += extra[:, None]
        s_back += extra[None, :]
        from_start += extra[:, None] * b_s_column[None, :]
        from_end += b_e_column[None, :]
        if Slopes is not None:
            across += b_s_column * b_e_column

    held = inside[:, None] & (n < N)[None, :]
    g_at = Gate + b * stride_gb + h * stride_gh + t0 * stride_gt + (i[:, None] * stride_gt + n[None, :] * stride_gd)
    r_at = Rate
    if RATED:
        r_at = Rate + b * stride_rb + h * stride_rh + t0 * stride_rt + (i[:, None] * stride_rt + n[None, :] * stride_rd)
    g = load_vectors(g_at, r_at, held)
    y_base = Y + b * stride_yb + (h // GROUP_Y) * stride_yh + t0 * stride_yt
    b_y = load_rows(y_base, i, inside, n, stride_yt, stride_yd, N, BLOCK_N)
    own = tl.sum(tl.where(i[:, None] == i[None, :], s, 0.0), 1)
    b_x = b_y
    if DY is not None:
        x_base = X + b * stride_xb + (h // GROUP_X) * stride_xh + t0 * stride_xt
        b_x = load_rows(x_base, i, inside, n, stride_xt, stride_xd, N, BLOCK_N)
    BACK: tl.constexpr = DY is not None
    SLOPES: tl.constexpr = Slopes is not None
    if FAR:
        dx, dy, slopes = distant_pairs(s, s_back, from_start, from_end, across, b_x, b_y, g, BACK, SLOPES, C, BLOCK)
    else:
        dx, dy, slopes = near_pairs(s, s_back, from_start, from_end, across, b_x, b_y, g, BACK, SLOPES, C)
    if BONUS or not BEFORE:
        weight = own[:, None]
        if BONUS:
            u_base = Bonus + b * stride_ub + h * stride_uh + t0 * stride_ut
            weight = weight * load_rows(u_base, i, inside, n, stride_ut, stride_ud, N, BLOCK_N).to(tl.float32)
        dx += weight * b_y.to(tl.float32)
        if DY is not None:
            dy += weight * b_x.to(tl.float32)
    if DX is not None:
        p_at = DX + b * stride_pb + h * stride_ph + t0 * stride_pt + (i[:, None] * stride_pt + n[None, :] * stride_pd)
        tl.store(p_at, dx.to(DX.dtype.element_ty), mask=held)
    if DY is not None:
        o_at = DY + b * stride_ob + h * stride_oh + t0 * stride_ot + (i[:, None] * stride_ot + n[None, :] * stride_od)
        tl.store(o_at, dy.to(DY.dtype.element_ty), mask=held)
        if Slopes is not None:
            tl.store(Slopes + (head * T + t0) * N + (i[:, None] * N + n[None, :]), slopes, mask=held)
