"""What the templates of recurrences share: flags, and how operands and decays are loaded.

`if FLAG:` of a module-level flag is decided when a file is written, and parameters that are not used then vanish.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import LOG2E

# ------------------------------------------------------------------------------------------------------------------------ Flags

GATED = tl.constexpr(True)  # there is a decay
VECTOR = tl.constexpr(False)  # it differs along one dimension of the state
RATED = tl.constexpr(False)  # its logarithm is the product of two tensors
CONSTANT = tl.constexpr(False)  # it is the same at all times
BEFORE = tl.constexpr(False)  # the state is read before its update
BONUS = tl.constexpr(False)  # and the update's own part is weighted
BESIDE = tl.constexpr(False)  # but by torch's operations: what no template of its decay does
NORMALISED = tl.constexpr(False)  # the state has one column more, which ones meet

SUMMED = tl.constexpr(True)  # one decay for the state, and not the same at all times: `sums_kernel` has summed it
JOINED = tl.constexpr(True)  # two products may add up in one sum: false for some Blackwells, where Triton takes a wrong one

PRECISION = tl.constexpr("ieee")
RESET = tl.constexpr(-86.0)  # 2 ** RESET of a state is nothing: counted instead of summed, so that sums after it keep their digits
LEAST = tl.constexpr(-160.0)  # 2 ** LEAST is zero in float32
NEAR = tl.constexpr(96.0)  # steps whose running sums stay within +-NEAR are one product: its factors fit the operands' range
RUNTIME = [
    "H", "T", "CHUNKS", "SEGMENT", "SEGMENTS", "SHARES", "COLUMNS",
    "GROUP_Q", "GROUP_K", "GROUP_V", "GROUP_A", "GROUP_W", "GROUP_X", "GROUP_Y", "GROUP_Z",
]  # fmt: skip  # parameters whose values no kernel is compiled for

# ------------------------------------------------------------------------------------------------------------------------ Loads


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
