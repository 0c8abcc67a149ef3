"""Small device functions that generated kernels share. The emitter copies those that a kernel uses into its file."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def wide(x):
    """An index as int64, where it is about to be multiplied by a stride."""
    return tl.cast(x, tl.int64)


@triton.jit
def tanh(x):
    """tanh through exp2, without overflow: absolute error about 1e-7."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * 1.4426950408889634)))


@triton.jit
def tanh_exact(x):
    """tanh within a few units in the last place: a series near zero, where the quotient cancels."""
    z = x * x
    near = x * (1.0 + z * (-0.3333333333 + z * (0.1333333333 + z * (-0.0539682540 + z * (0.0218694885 + z * -0.0088632355)))))
    return tl.where(tl.abs(x) < 0.3, near, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * 1.4426950408889634))))


@triton.jit
def tanh_approx(x):
    """tanh by NVIDIA's own instruction: relative error 2^-11, one operation."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) through exp2."""
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def floor_div(a, b):
    """a // b rounding towards minus infinity, whichever way the hardware rounds."""
    q = a // b
    r = a - q * b
    return q - tl.where((r != 0) & ((r < 0) != (b < 0)), 1, 0)


@triton.jit
def floor_mod(a, b):
    """a % b with the sign of b, whichever sign the hardware gives it."""
    r = a % b
    return r + tl.where((r != 0) & ((r < 0) != (b < 0)), b, 0)


@triton.jit
def load_tile(base, left, stride_t, stride_d, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr, CHECK: tl.constexpr):
    """[ROWS, COLS] of the matrix at `base`; zeros from column D and, if CHECK, from row `left` on."""
    t = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, COLS)[None, :]
    at = base + (t * stride_t + d * stride_d)
    if CHECK:
        if COLS > D:
            return tl.load(at, mask=(t < left) & (d < D), other=0.0)
        else:
            return tl.load(at, mask=t < left, other=0.0)
    else:
        if COLS > D:
            return tl.load(at, mask=d < D, other=0.0)
        else:
            return tl.load(at)


@triton.jit
def store_tile(base, tile, left, stride_t, stride_d, ROWS: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr):
    """Writes [ROWS, COLS] into the matrix at `base`, up to row `left` and column D."""
    t = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, COLS)[None, :]
    tl.store(base + (t * stride_t + d * stride_d), tile.to(base.dtype.element_ty), mask=(t < left) & (d < D))


@triton.jit
def tile_range(lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    """Tiles [first, full_first) partial, [full_first, full_last) full, [full_last, last) partial, of half-open index ranges."""
    first = tl.cast(lo // BLOCK, tl.int32)
    last = tl.maximum(tl.cast((hi + BLOCK - 1) // BLOCK, tl.int32), first)
    full_first = tl.minimum(tl.maximum(tl.cast((full_lo + BLOCK - 1) // BLOCK, tl.int32), first), last)
    full_last = tl.maximum(tl.minimum(tl.cast(full_hi // BLOCK, tl.int32), last), full_first)
    return first, full_first, full_last, last


@triton.jit
def mean_of_values(
    v_base, TK, stride_vt, stride_vd,
    D_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """[D_V]: the mean over all keys."""
    acc = tl.zeros([BLOCK_V], dtype=tl.float32)
    for n in range(0, tl.cdiv(TK, BLOCK_N)):
        j0 = n * BLOCK_N
        b_v = load_tile(v_base + wide(j0) * stride_vt, TK - j0, stride_vt, stride_vd, BLOCK_N, BLOCK_V, D_V, True)
        acc += tl.sum(b_v.to(tl.float32), 0)
    return acc / TK
