"""What the templates of experts share: flags, the activation, and where a program works.

`if FLAG:` of a module-level flag is decided when a file is written, and parameters that are not used then vanish. The activation
here, SwiGLU, stands for the specification's own, which takes its place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import sigmoid, wide

# ------------------------------------------------------------------------------------------------------------------------ Flags

GATED = tl.constexpr(True)  # the first projection has a gate beside `up`
INTERLEAVED = tl.constexpr(False)  # in even columns, `up` in odd ones
WEIGHTED_IN = tl.constexpr(False)  # the routing weight multiplies the input
WEIGHTED_OUT = tl.constexpr(True)  # or the output
APART = tl.constexpr(False)  # every expert's weights and biases are tensors of their own

PRECISION = tl.constexpr("ieee")
RUNTIME = [
    "ASSIGNMENTS", "SLOTS", "EXPERTS", "TILES", "BLOCKS", "LENGTH", "HEIGHT", "SPAN", "BEGIN", "LAST",
]  # fmt: skip  # parameters whose values no kernel is compiled for

# ------------------------------------------------------------------------------------------------------------------- Activation


@triton.jit
def activation(gate, up):
    """The activation, in float32."""
    return gate * sigmoid(gate) * up


@triton.jit
def activation_and_slopes(gate, up):
    """The activation, and its slopes by gate and by up."""
    part = sigmoid(gate)
    return gate * part * up, up * part * (1.0 + gate * (1.0 - part)), gate * part


# ------------------------------------------------------------------------------------------------------------------------ Loads


@triton.jit
def load_inside(at, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """What is at [R, C] addresses, zeros where `rows` [R, 1] and `cols` [1, C] do not hold; those that are not asked for, do."""
    if ROWS and COLS:
        return tl.load(at, mask=rows & cols, other=0.0)
    elif ROWS:
        return tl.load(at, mask=rows, other=0.0)
    elif COLS:
        return tl.load(at, mask=cols, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def of_expert(First, e, reach):
    """Where an expert's tensor begins. First: the first expert's; `reach`: elements from one to the next, or a table of them, [E].

    Tensors that stand apart begin a multiple of 16 bytes from each other.
    """
    if APART:
        return First + tl.multiple_of(tl.load(reach + e), 128 // First.dtype.element_ty.primitive_bitwidth)
    else:
        return First + wide(e) * reach


@triton.jit
def load_weights(Weights, assignment, inside, stride_wt, stride_ws, SLOTS):
    """The routing weights of assignments, in float32."""
    at = Weights + ((assignment // SLOTS) * stride_wt + (assignment % SLOTS) * stride_ws)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_expert(Ids, assignment, inside, stride_it, stride_is, SLOTS, EXPERTS):
    """The expert of each assignment, -1 for those that are dropped."""
    at = Ids + ((assignment // SLOTS) * stride_it + (assignment % SLOTS) * stride_is)
    e = tl.load(at, mask=inside, other=-1)
    return tl.where((e >= 0) & (e < EXPERTS), e, -1).to(tl.int32)
