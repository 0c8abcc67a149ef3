"""The template of routers: from the logits of a token to the weights and ids of its experts, and back.

    p = score(l),  c = p + bias,  c = fill outside the groups of the greatest stat(c);  ids = the K greatest of c, w from p[ids]

A program takes BLOCK_T tokens; all experts of a token are in registers, BLOCK_E places for each of BLOCK_G groups. What is chosen
by is compared as integers in the order of the floats, NaN above all; the first of equal ones is taken, and is then below all: no
expert is chosen twice, whatever the values. Backward, p is computed again, and what reaches the K chosen scores is put in place.

This file is real Triton for a softmax that is renormalised, and the pattern from which `route` weaves the other variants: an
`if FLAG:` of a module-level flag is decided when the file is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launching import begin, tile_count
from .primitives import wide

# ------------------------------------------------------------------------------------------------------------------------ Flags

SOFTMAX = tl.constexpr(True)  # the score is a softmax, else a sigmoid
AFTER = tl.constexpr(False)  # what was chosen is scored, else all experts are
BIASED = tl.constexpr(False)  # a bias is added for the choice
GROUPED = tl.constexpr(False)  # some groups are kept
TOP2 = tl.constexpr(False)  # by the sum of their two greatest, else by the greatest
NORMED = tl.constexpr(True)  # weights are divided by their norm
SQUARED = tl.constexpr(False)  # which is the root of the sum of squares, else the sum
CLAMPED = tl.constexpr(False)  # EPS is its least value, else it is added

K = tl.constexpr(2)
GROUPS = tl.constexpr(1)
KEPT = tl.constexpr(1)
FILL = tl.constexpr(-2139095041)  # in the order of integers
EPS = tl.constexpr(0.0)
SCALE = tl.constexpr(1.0)
WEIGHTS_DTYPE = torch.float32
RUNTIME = ["T"]

# ----------------------------------------------------------------------------------------------------------------------- Scores

LOWEST = tl.constexpr(-2147483648)  # below -inf: nothing is there
NAN = tl.constexpr(2147483647)


@triton.jit
def exponential(x):
    """exp(x) to two units in the last place: the product with log2(e) in two parts."""
    y = x * 1.4426950408889634
    low = tl.fma(x, 1.4426950408889634, -y) + x * 1.925963033500e-8
    return tl.exp2(y) * (1.0 + tl.where(tl.abs(low) < 1.0, low, 0.0) * 0.6931471805599453)


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + exponential(-x))


@triton.jit
def shares(x):
    """The softmax of each row."""
    exponentials = exponential(x - tl.max(x, 1)[:, None])
    return exponentials / tl.sum(exponentials, 1)[:, None]


@triton.jit
def scored(x):
    """The scores of all experts."""
    if SOFTMAX:
        return shares(x)
    else:
        return logistic(x)


@triton.jit
def in_order(x):
    """Integers that compare as the floats do, NaN as the greatest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, NAN, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def as_float(order):
    """The float behind what `in_order` gave."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def first_greatest(order, at, AXIS: tl.constexpr):
    """`at` of the greatest along an axis, the first of equal ones, with that axis kept."""
    return tl.min(tl.where(order == tl.max(order, AXIS, keep_dims=True), at, 1 << 20), AXIS, keep_dims=True)


@triton.jit
def chosen_among(order, stat_at, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr):
    """[BLOCK_T, BLOCK_G * BLOCK_E], whether an expert's group is kept."""
    parts = tl.reshape(order, [BLOCK_T, BLOCK_G, BLOCK_E])
    greatest = tl.max(parts, 2)
    if TOP2:
        inside = tl.arange(0, BLOCK_E)[None, None, :]
        second = tl.max(tl.where(inside == first_greatest(parts, inside, 2), LOWEST, parts), 2)
        greatest = in_order(as_float(greatest) + as_float(second))
    left = tl.where(stat_at < GROUPS, greatest, LOWEST)
    kept = tl.zeros([BLOCK_T, BLOCK_G], tl.int32)
    for _ in range(KEPT):
        taken = stat_at == first_greatest(left, stat_at, 1)
        kept = tl.where(taken, 1, kept)
        left = tl.where(taken, LOWEST, left)
    return tl.reshape(tl.broadcast_to(kept[:, :, None], [BLOCK_T, BLOCK_G, BLOCK_E]), [BLOCK_T, BLOCK_G * BLOCK_E]) != 0


@triton.jit
def scored_after(x, there):
    """Scores of what was chosen [BLOCK_T, BLOCK_K]; 0 where nothing is."""
    return tl.where(there, scored(tl.where(there, x, float("-inf"))), 0.0)


@triton.jit
def norm_of(scores):
    """What weights are divided by, and the norm itself."""
    if SQUARED:
        norm = tl.sqrt(tl.sum(scores * scores, 1))
    else:
        norm = tl.sum(scores, 1)
    if CLAMPED:
        divisor = tl.where(norm < EPS, EPS, norm)
    else:
        divisor = norm + EPS
    return divisor[:, None], norm[:, None]


@triton.jit
def through_norm(grad, scores):
    """The gradient of scores from that of scores / norm: (g norm - dn/du sum(g u) + g eps) / divisor^2.

    So written, a gradient that vanishes but for eps, as that of one score does, is not the difference of two large numbers.
    """
    divisor, norm = norm_of(scores)
    mean = tl.sum(grad * (scores / divisor), 1)[:, None]
    if SQUARED:
        mean = mean * tl.where(norm > 0.0, scores / norm, 0.0)
    inner = grad * (norm / divisor) - mean
    if CLAMPED:
        inner = tl.where(norm < EPS, grad, inner)
    else:
        inner += grad * (EPS / divisor)
    return inner / divisor


# ---------------------------------------------------------------------------------------------------------------------- Kernels


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    Logits, Bias, Weights, Ids, stride_lt, stride_le, stride_b, T, SIZE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights and Ids [T, K] of Logits [T, GROUPS * SIZE]."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = tl.arange(0, BLOCK_G * BLOCK_E)
    e = at // BLOCK_E * SIZE + at % BLOCK_E
    real = (at % BLOCK_E < SIZE) & (at // BLOCK_E < GROUPS)
    b_l = tl.load(
        Logits + wide(t)[:, None] * stride_lt + (e * stride_le)[None, :], mask=(t < T)[:, None] & real[None, :], other=0.0
    ).to(tl.float32)
    b_l = tl.where(real[None, :], b_l, float("-inf"))  # [BLOCK_T, BLOCK_G * BLOCK_E]
    scores = b_l
    if not AFTER:
        scores = scored(b_l)
    choice = scores
    if BIASED:
        choice = scores + tl.load(Bias + e * stride_b, mask=real, other=0.0).to(tl.float32)[None, :]
    order = tl.where(real[None, :], in_order(choice), LOWEST)
    if GROUPED:
        kept = chosen_among(order, tl.arange(0, BLOCK_G)[None, :], BLOCK_T, BLOCK_G, BLOCK_E)
        order = tl.where(real[None, :], tl.where(kept, order, FILL), LOWEST)
    slot = tl.arange(0, BLOCK_K)[None, :]
    b_w, b_i = tl.zeros([BLOCK_T, BLOCK_K], tl.float32), tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for s in range(K):
        taken = at[None, :] == first_greatest(order, at[None, :], 1)
        b_w = tl.where(slot == s, tl.sum(tl.where(taken, scores, 0.0), 1)[:, None], b_w)
        b_i = tl.where(slot == s, tl.sum(tl.where(taken, e[None, :], 0), 1)[:, None], b_i)
        order = tl.where(taken, LOWEST, order)
    if AFTER:
        b_w = scored_after(b_w, slot < K)
    if NORMED:
        divisor, _ = norm_of(b_w)
        b_w = b_w / divisor
    place, inside = wide(t)[:, None] * K + slot, (t < T)[:, None] & (slot < K)
    tl.store(Weights + place, b_w * SCALE, mask=inside)
    tl.store(Ids + place, wide(b_i), mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def backward_kernel(
    Grad, Logits, Ids, DLogits, stride_gt, stride_gk, stride_lt, stride_le, stride_it, stride_ik, T, EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """DLogits [T, EXPERTS], contiguous."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e, slot = tl.arange(0, BLOCK_E)[None, :], tl.arange(0, BLOCK_K)[None, :]
    tokens, there = (t < T)[:, None], (t < T)[:, None] & (slot < K)
    row = wide(t)[:, None]
    b_g = tl.load(Grad + row * stride_gt + slot * stride_gk, mask=there, other=0.0).to(tl.float32) * SCALE
    b_i = tl.load(Ids + row * stride_it + slot * stride_ik, mask=there, other=-1).to(tl.int32)
    b_c = tl.load(Logits + row * stride_lt + b_i * stride_le, mask=there, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_K]
    scores = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if AFTER or not SOFTMAX:
        chosen = scored_after(b_c, slot < K)
    else:
        b_l = tl.load(Logits + row * stride_lt + e * stride_le, mask=tokens & (e < EXPERTS), other=0.0).to(tl.float32)
        b_l = tl.where(e < EXPERTS, b_l, float("-inf"))
        top = tl.max(b_l, 1)[:, None]
        exponentials = exponential(b_l - top)
        total = tl.sum(exponentials, 1)[:, None]
        scores = exponentials / total
        chosen = tl.where(slot < K, exponential(b_c - top) / total, 0.0)
    if NORMED:
        b_g = through_norm(b_g, chosen)
    if SOFTMAX:
        mean = tl.sum(tl.where(slot < K, chosen * b_g, 0.0), 1)[:, None]
        if AFTER:
            b_g = chosen * (b_g - mean)
    else:
        b_g = b_g * chosen * (1.0 - chosen)
    b_d = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for s in range(K):
        hit = e == tl.sum(tl.where(slot == s, b_i, 0), 1)[:, None]
        b_d = tl.where(hit, tl.sum(tl.where(slot == s, b_g, 0.0), 1)[:, None], b_d)
    if SOFTMAX and not AFTER:
        b_d = scores * (b_d - mean)
    tl.store(DLogits + row * EXPERTS + e, b_d, mask=tokens & (e < EXPERTS))


# --------------------------------------------------------------------------------------------------------------------- Launches


def power_of_two(n):
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def rows_of(tokens, columns):
    """How many tokens a program takes: few where there are few, else 16 places a thread."""
    return 4 if tokens <= 512 else max(4, min(32, 2048 // columns))


def launch_forward(start, logits, bias, weights, ids):
    """One program for some tokens."""
    tokens, experts = logits.shape
    size = experts // GROUPS.value
    blocks = {"BLOCK_G": power_of_two(GROUPS.value), "BLOCK_E": power_of_two(size), "BLOCK_K": power_of_two(K.value)}
    rows = rows_of(tokens, blocks["BLOCK_G"] * blocks["BLOCK_E"])
    stride = 0 if bias is None else bias.stride(0)
    start(
        forward_kernel, (tile_count(tokens, rows), 1, 1), logits, bias, weights, ids, *logits.stride(), stride, tokens,
        SIZE=size, BLOCK_T=rows, **blocks, num_warps=4,
    )  # fmt: skip


def launch_backward(start, grad, logits, ids, d_logits):
    """One program for some tokens."""
    tokens, experts = logits.shape
    columns = power_of_two(experts)
    rows = rows_of(tokens, columns)
    start(
        backward_kernel, (tile_count(tokens, rows), 1, 1), grad, logits, ids, d_logits, *grad.stride(), *logits.stride(),
        *ids.stride(), tokens, EXPERTS=experts, BLOCK_T=rows, BLOCK_E=columns, BLOCK_K=power_of_two(K.value), num_warps=4,
    )  # fmt: skip


def forward(logits, bias=None):
    """`(weights, ids)`, both [T, K], of logits [T, E] and, where a bias is added for the choice, that [E]; of any strides."""
    shape = (logits.shape[0], K.value)
    weights = torch.empty(shape, dtype=WEIGHTS_DTYPE, device=logits.device)
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    if logits.shape[0]:
        begin(lambda start: launch_forward(start, logits, bias, weights, ids), logits, bias, weights, ids)
    return weights, ids


def backward(grad, logits, ids):
    """The gradient of the logits [T, E] from that of the weights [T, K]."""
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.shape[0]:
        begin(lambda start: launch_backward(start, grad, logits, ids, d_logits), grad, logits, ids, d_logits)
    return d_logits
