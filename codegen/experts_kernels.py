"""The experts template: products of each expert's rows with its weights, and what stands around them.

Rows are assignments in the order of experts (`experts_order_kernels`): a tile of BLOCK_M rows belongs to one expert. With g the
incoming gradient of a row's token, H the pre-activation and w the routing weight,

    first_kernel    H = x U + b1,  a = act(H)                                  rows of x gathered, gate and up in two sums
    rows_kernel     y = w (a D + b2)  and  dx = dH U^T                         rows scattered to t * SLOTS + s
    slopes_kernel   c = g D^T,  dH = w c act'(H),  w a,  dw = a . c            rows of g gathered
    outer_kernel    dU = x^T dH  and  dD = (w a)^T g                           summed over an expert's rows
    sums_kernel     db1 = sum of dH  and  db2 = sum of w g

If the weight multiplies the input, x stands for w x, w elsewhere is 1, and dw = x . dx before dx is multiplied by w. Columns of H
are in the order of U's. Bounds of loops are values of the run, not of the compilation, and every product takes what was loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .experts_parts import (
    GATED,
    INTERLEAVED,
    PRECISION,
    RUNTIME,
    WEIGHTED_IN,
    WEIGHTED_OUT,
    activation,
    activation_and_slopes,
    load_inside,
    load_weights,
    of_expert,
)  # fmt: skip
from .primitives import wide

# ------------------------------------------------------------------------------------------------------------------------- Tiles


@triton.jit
def place(Tiles, Offsets, TILES, COLUMNS, GROUP: tl.constexpr):
    """`(expert, first row, one past its last row, column of tiles)` of a program; the expert is -1 where there is nothing to do.

    GROUP tiles of rows take a column of tiles before the next one: those of one expert share its weights while they are cached.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP * COLUMNS)
    inside = pid % (GROUP * COLUMNS)
    size = tl.minimum(TILES - group * GROUP, GROUP)
    tile = group * GROUP + inside % size
    e = tl.load(Tiles + tile)
    return e, tl.load(Tiles + TILES + tile), tl.load(Offsets + tl.maximum(e, 0) + 1), inside // size


@triton.jit
def multiply(acc, a_at, b_at, cols, K, stride_ak, stride_bk, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr):
    """acc + A B for addresses of A's rows [BLOCK_M, 1] and of B's columns [1, BLOCK_N]."""
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        b_a = load_inside(a_at + (k * stride_ak)[None, :], k[None, :] < K, k[None, :] < K, False, not EVEN_K)
        b_b = load_inside(b_at + (k * stride_bk)[:, None], k[:, None] < K, cols, not EVEN_K, not EVEN_N)
        acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def multiply_twice(
    acc, other, a_at, b_at, c_at, cols, K, stride_ak, stride_bk, stride_ck,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """acc + A B and other + A C."""
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        b_a = load_inside(a_at + (k * stride_ak)[None, :], k[None, :] < K, k[None, :] < K, False, not EVEN_K)
        b_b = load_inside(b_at + (k * stride_bk)[:, None], k[:, None] < K, cols, not EVEN_K, not EVEN_N)
        b_c = load_inside(c_at + (k * stride_ck)[:, None], k[:, None] < K, cols, not EVEN_K, not EVEN_N)
        acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
        other = tl.dot(b_a, b_c, other, input_precision=PRECISION)
    return acc, other


@triton.jit
def load_bias(Bias, e, col, F, reach, stride_f):
    """[1, N]: the expert's bias of columns."""
    return tl.load(of_expert(Bias, e, reach) + col * stride_f, mask=col < F, other=0.0).to(tl.float32)[None, :]


@triton.jit
def left_and_right(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N // 2] twice, so that what is made of a sum needs half the registers at a time."""
    return tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))


@triton.jit
def load_halves(H, row, inside, column, stride_m, F, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gate and up of a tile of H, in float32."""
    base = H + (wide(row) * stride_m)[:, None]
    if INTERLEAVED:
        pair = (2 * column * BLOCK_N + tl.arange(0, 2 * BLOCK_N))[None, :]
        both = tl.load(base + pair, mask=inside[:, None] & (pair < 2 * F), other=0.0)
        gate, up = tl.split(tl.reshape(both, [BLOCK_M, BLOCK_N, 2]))
    else:
        col = (column * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        gate = tl.load(base + col, mask=inside[:, None] & (col < F), other=0.0)
        up = tl.load(base + (F + col), mask=inside[:, None] & (col < F), other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def store_halves(H, gate, up, row, inside, column, stride_m, F, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gate and up where H has them: side by side, or in turn."""
    base = H + (wide(row) * stride_m)[:, None]
    if INTERLEAVED:
        pair = (2 * column * BLOCK_N + tl.arange(0, 2 * BLOCK_N))[None, :]
        both = tl.reshape(tl.join(gate.to(H.dtype.element_ty), up.to(H.dtype.element_ty)), [BLOCK_M, 2 * BLOCK_N])
        tl.store(base + pair, both, mask=inside[:, None] & (pair < 2 * F))
    else:
        col = (column * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        tl.store(base + col, gate.to(H.dtype.element_ty), mask=inside[:, None] & (col < F))
        tl.store(base + (F + col), up.to(H.dtype.element_ty), mask=inside[:, None] & (col < F))


# ---------------------------------------------------------------------------------------------------------------------- Products


@triton.jit
def finish_gated(
    GateBias, UpBias, H, Acts, gate, up, e, row, inside, column, reach_a, stride_af, reach_b, stride_bf, stride_hm, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores what the products of a tile's columns make: H, if there is one, and Acts."""
    col = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if UpBias is not None:
        gate += load_bias(GateBias, e, col, F, reach_a, stride_af)
        up += load_bias(UpBias, e, col, F, reach_b, stride_bf)
    if H is not None:
        store_halves(H, gate, up, row, inside, column, stride_hm, F, BLOCK_M, BLOCK_N)
    acts = activation(gate, up).to(Acts.dtype.element_ty)
    tl.store(Acts + (wide(row) * F)[:, None] + col[None, :], acts, mask=inside[:, None] & (col < F)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def first_kernel(
    X, Weights, Gate, Up, GateBias, UpBias, H, Acts, Sorted, Offsets, Tiles,
    stride_xt, stride_xd, stride_wt, stride_ws, reach_g, stride_gd, stride_gf, reach_u, stride_ud, stride_uf,
    reach_a, stride_af, reach_b, stride_bf, stride_hm, D, F, SLOTS, TILES,
    EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Acts [ASSIGNMENTS, F], the activations of a tile, and H before it, if there is one."""
    e, first, end, column = place(Tiles, Offsets, TILES, tl.cdiv(F, BLOCK_N), GROUP)
    if e < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    inside = row < end
    assignment = tl.load(Sorted + row, mask=inside, other=0)
    x_at = X + (wide(assignment // SLOTS) * stride_xt)[:, None]
    col = column * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (col < F)[None, :]
    if INTERLEAVED:
        pair = 2 * column * BLOCK_N + tl.arange(0, 2 * BLOCK_N)
        u_at = of_expert(Up, e, reach_u) + (pair * stride_uf)[None, :]
        both = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        both = multiply(both, x_at, u_at, (pair < 2 * F)[None, :], D, stride_xd, stride_ud, BLOCK_K, EVEN_D, EVEN_F)
        gate, up = tl.split(tl.reshape(both, [BLOCK_M, BLOCK_N, 2]))
    else:
        u_at = of_expert(Up, e, reach_u) + (col * stride_uf)[None, :]
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if GATED:
            g_at = of_expert(Gate, e, reach_g) + (col * stride_gf)[None, :]
            gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            gate, up = multiply_twice(gate, up, x_at, g_at, u_at, cols, D, stride_xd, stride_gd, stride_ud, BLOCK_K, EVEN_D, EVEN_F)
        else:
            up = multiply(up, x_at, u_at, cols, D, stride_xd, stride_ud, BLOCK_K, EVEN_D, EVEN_F)
    if WEIGHTED_IN:
        w = load_weights(Weights, assignment, inside, stride_wt, stride_ws, SLOTS)[:, None]
        up *= w
        if GATED:
            gate *= w
    if GATED:
        if WIDE:
            g0, g1 = left_and_right(gate, BLOCK_M, BLOCK_N)
            u0, u1 = left_and_right(up, BLOCK_M, BLOCK_N)
            finish_gated(
                GateBias, UpBias, H, Acts, g0, u0, e, row, inside, 2 * column,
                reach_a, stride_af, reach_b, stride_bf, stride_hm, F, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
            finish_gated(
                GateBias, UpBias, H, Acts, g1, u1, e, row, inside, 2 * column + 1,
                reach_a, stride_af, reach_b, stride_bf, stride_hm, F, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
        else:
            finish_gated(
                GateBias, UpBias, H, Acts, gate, up, e, row, inside, column,
                reach_a, stride_af, reach_b, stride_bf, stride_hm, F, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        mask = inside[:, None] & cols
        if UpBias is not None:
            up += load_bias(UpBias, e, col, F, reach_b, stride_bf)
        if H is not None:
            tl.store(H + (wide(row) * stride_hm)[:, None] + col[None, :], up.to(H.dtype.element_ty), mask=mask)
        acts = activation(up)  # type: ignore[call-arg]
        tl.store(Acts + (wide(row) * F)[:, None] + col[None, :], acts.to(Acts.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def rows_kernel(
    A, B, U, V, Bias, Weights, X, Dots, Out, Sorted, Offsets, Tiles,
    stride_am, reach_u, stride_uk, stride_un, reach_v, stride_vk, stride_vn, reach_b, stride_bn,
    stride_wt, stride_ws, stride_xt, stride_xd, K, N, SLOTS, TILES, ASSIGNMENTS,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Out [ASSIGNMENTS, N], by assignment: A U + Bias, times the weight if there are Weights; A and B are rows, in order.

    With B it is A U + B V. With Dots [columns of tiles, ASSIGNMENTS] these are the sums, over the columns of a tile, of it times X
    before the weight.
    """
    e, first, end, column = place(Tiles, Offsets, TILES, tl.cdiv(N, BLOCK_N), GROUP)
    if e < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    inside = row < end
    assignment = tl.load(Sorted + row, mask=inside, other=0)
    shift = (wide(tl.where(inside, row, first)) * stride_am)[:, None]
    col = column * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (col < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    u_at = of_expert(U, e, reach_u) + (col * stride_un)[None, :]
    acc = multiply(acc, A + shift, u_at, cols, K, 1, stride_uk, BLOCK_K, EVEN_K, EVEN_N)
    if B is not None:
        v_at = of_expert(V, e, reach_v) + (col * stride_vn)[None, :]
        acc = multiply(acc, B + shift, v_at, cols, K, 1, stride_vk, BLOCK_K, EVEN_K, EVEN_N)
    if Bias is not None:
        acc += load_bias(Bias, e, col, N, reach_b, stride_bn)
    mask = inside[:, None] & cols
    if Dots is not None:
        x_at = X + (wide(assignment // SLOTS) * stride_xt)[:, None] + (col * stride_xd)[None, :]
        dots = tl.sum(acc * tl.load(x_at, mask=mask, other=0.0).to(tl.float32), 1)
        tl.store(Dots + wide(column) * ASSIGNMENTS + assignment, dots, mask=inside)
    if Weights is not None:
        acc *= load_weights(Weights, assignment, inside, stride_wt, stride_ws, SLOTS)[:, None]
    tl.store(Out + (wide(assignment) * N)[:, None] + col[None, :], acc.to(Out.dtype.element_ty), mask=mask)


@triton.jit
def finish_slopes(H, DH, Scaled, Acts, slopes, w, row, inside, column, stride_hm, F, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Stores what the gradient of a tile's activations makes, see `slopes_kernel`, and gives what it makes for Dots."""
    col = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = inside[:, None] & (col < F)[None, :]
    if GATED:
        gate, up = load_halves(H, row, inside, column, stride_hm, F, BLOCK_M, BLOCK_N)
        acts, by_gate, by_up = activation_and_slopes(gate, up)
    else:
        h_at = (wide(row) * stride_hm)[:, None] + col[None, :]
        up = tl.load(H + h_at, mask=mask, other=0.0).to(tl.float32)
        acts, by_up = activation_and_slopes(up)  # type: ignore[call-arg]
    dots = tl.sum(tl.where(mask, acts * slopes, 0.0), 1)
    if WEIGHTED_OUT:
        slopes *= w
        acts *= w
    if Acts is not None:
        tl.store(Acts + (wide(row) * F)[:, None] + col[None, :], acts.to(Acts.dtype.element_ty), mask=mask)
    by_up *= slopes
    if GATED:
        by_gate *= slopes
        store_halves(DH, by_gate, by_up, row, inside, column, stride_hm, F, BLOCK_M, BLOCK_N)
    else:
        tl.store(DH + h_at, by_up.to(DH.dtype.element_ty), mask=mask)
    if WEIGHTED_IN and Scaled is not None:
        by_up *= w
        if GATED:
            by_gate *= w
            store_halves(Scaled, by_gate, by_up, row, inside, column, stride_hm, F, BLOCK_M, BLOCK_N)
        else:
            tl.store(Scaled + h_at, by_up.to(Scaled.dtype.element_ty), mask=mask)
    return dots


@triton.jit(do_not_specialize=RUNTIME)
def slopes_kernel(
    Grad, Down, Weights, H, DH, Scaled, Acts, Dots, Sorted, Offsets, Tiles,
    stride_gt, stride_gd, reach_d, stride_df, stride_dd, stride_wt, stride_ws, stride_hm, D, F, SLOTS, TILES, ASSIGNMENTS,
    EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """DH, the gradient of H, of a tile.

    Further, those that there are: Scaled, DH times the weight of the input; Acts [ASSIGNMENTS, F], the activations times the weight
    of the output; Dots [columns of tiles, ASSIGNMENTS], what its columns give to the gradient of that weight.
    """
    e, first, end, column = place(Tiles, Offsets, TILES, tl.cdiv(F, BLOCK_N), GROUP)
    if e < 0:
        return
    row = first + tl.arange(0, BLOCK_M)
    inside = row < end
    assignment = tl.load(Sorted + row, mask=inside, other=0)
    col = column * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (col < F)[None, :]
    g_at = Grad + (wide(assignment // SLOTS) * stride_gt)[:, None]
    d_at = of_expert(Down, e, reach_d) + (col * stride_df)[None, :]
    slopes = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    slopes = multiply(slopes, g_at, d_at, cols, D, stride_gd, stride_dd, BLOCK_K, EVEN_D, EVEN_F)
    w = 1.0
    if WEIGHTED_IN or WEIGHTED_OUT:
        w = load_weights(Weights, assignment, inside, stride_wt, stride_ws, SLOTS)[:, None]
    if WIDE:
        left, right = left_and_right(slopes, BLOCK_M, BLOCK_N)
        dots = finish_slopes(H, DH, Scaled, Acts, left, w, row, inside, 2 * column, stride_hm, F, BLOCK_M, BLOCK_N // 2)
        dots += finish_slopes(H, DH, Scaled, Acts, right, w, row, inside, 2 * column + 1, stride_hm, F, BLOCK_M, BLOCK_N // 2)
    else:
        dots = finish_slopes(H, DH, Scaled, Acts, slopes, w, row, inside, column, stride_hm, F, BLOCK_M, BLOCK_N)
    if Dots is not None:
        tl.store(Dots + wide(column) * ASSIGNMENTS + assignment, dots, mask=inside)


# -------------------------------------------------------------------------------------------------------------- Sums over rows


@triton.jit(do_not_specialize=RUNTIME)
def outer_kernel(
    Left, Right, Out, Sorted, Offsets, stride_lm, stride_ld, stride_rm, stride_rd, reach_o, stride_om, stride_on, M, N, SLOTS,
    BY_TOKEN: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Out [E, M, N]: the sum over an expert's rows of Left^T Right; BY_TOKEN says which of the two, 0 or 1, has a row a token."""
    columns = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * columns
    e = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    m = tile // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    end = tl.load(Offsets + e + 1)
    for begin in range(tl.load(Offsets + e), end, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        inside = row < end
        token = tl.load(Sorted + row, mask=inside, other=0) // SLOTS
        if BY_TOKEN == 0:
            left, right = token, row
        else:
            left, right = row, token
        left_at = Left + (wide(left) * stride_lm)[None, :] + (m * stride_ld)[:, None]
        right_at = Right + (wide(right) * stride_rm)[:, None] + (n * stride_rd)[None, :]
        b_left = load_inside(left_at, (m < M)[:, None], inside[None, :], not EVEN_M, True)
        b_right = load_inside(right_at, inside[:, None], (n < N)[None, :], True, not EVEN_N)
        acc = tl.dot(b_left, b_right, acc, input_precision=PRECISION)
    out_at = of_expert(Out, e, reach_o) + (m * stride_om)[:, None] + (n * stride_on)[None, :]
    tl.store(out_at, acc.to(Out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def sums_kernel(
    Rows, Weights, Out, Sorted, Offsets, stride_rm, stride_rd, stride_wt, stride_ws, reach_o, stride_on, N, SLOTS,
    BY_TOKEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Out [E, N]: the sum of an expert's Rows, which are the tokens' if BY_TOKEN, times their Weights, if there are any."""
    e = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    end = tl.load(Offsets + e + 1)
    for begin in range(tl.load(Offsets + e), end, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        inside = row < end
        assignment = tl.load(Sorted + row, mask=inside, other=0)
        if BY_TOKEN:
            at = assignment // SLOTS
        else:
            at = row
        mask = inside[:, None] & (n < N)[None, :]
        b_rows = tl.load(Rows + (wide(at) * stride_rm)[:, None] + (n * stride_rd)[None, :], mask=mask, other=0.0).to(tl.float32)
        if Weights is not None:
            b_rows *= load_weights(Weights, assignment, inside, stride_wt, stride_ws, SLOTS)[:, None]
        total += tl.sum(b_rows, 0)
    tl.store(of_expert(Out, e, reach_o) + n * stride_on, total.to(Out.dtype.element_ty), mask=n < N)
