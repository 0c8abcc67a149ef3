"""Experts of few assignments, one an assignment and a block of columns at a time: weights are read once and no rows are sorted.

Bound by memory: products are sums of what a program's threads multiply, without the matrix units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .experts_parts import GATED, RUNTIME, WEIGHTED_IN, WEIGHTED_OUT, activation, load_expert, load_weights, of_expert
from .primitives import wide

# --------------------------------------------------------------------------------------------------------------- Few assignments


@triton.jit
def load_columns(at, k, cols, K):
    """[BLOCK_N, BLOCK_K] of weights, in float32."""
    return tl.load(at, mask=cols & (k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=RUNTIME)
def few_first_kernel(
    X, Ids, Weights, Gate, Up, GateBias, UpBias, Acts, stride_xt, stride_xd, stride_it, stride_is, stride_wt, stride_ws,
    reach_g, stride_gd, stride_gf, reach_u, stride_ud, stride_uf, reach_a, stride_af, reach_b, stride_bf,
    D, F, SLOTS, EXPERTS, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Acts [ASSIGNMENTS, F] in float32: activations, by assignment."""
    a = tl.program_id(0)
    e = load_expert(Ids, a, True, stride_it, stride_is, SLOTS, EXPERTS)
    if e < 0:
        return
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (n < F)[:, None]
    u_at = of_expert(Up, e, reach_u) + (n * stride_uf)[:, None]
    up_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if GATED:
        g_at = of_expert(Gate, e, reach_g) + (n * stride_gf)[:, None]
        gate_sum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for begin in range(0, D, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        b_x = tl.load(X + wide(a // SLOTS) * stride_xt + k * stride_xd, mask=k < D, other=0.0).to(tl.float32)[None, :]
        up_sum += b_x * load_columns(u_at + (k * stride_ud)[None, :], k, cols, D)
        if GATED:
            gate_sum += b_x * load_columns(g_at + (k * stride_gd)[None, :], k, cols, D)
    up = tl.sum(up_sum, 1)
    if GATED:
        gate = tl.sum(gate_sum, 1)
    if WEIGHTED_IN:
        w = load_weights(Weights, a, True, stride_wt, stride_ws, SLOTS)
        up *= w
        if GATED:
            gate *= w
    if UpBias is not None:
        up += tl.load(of_expert(UpBias, e, reach_b) + n * stride_bf, mask=n < F, other=0.0).to(tl.float32)
        if GATED:
            gate += tl.load(of_expert(GateBias, e, reach_a) + n * stride_af, mask=n < F, other=0.0).to(tl.float32)
    if GATED:
        acts = activation(gate, up)
    else:
        acts = activation(up)  # type: ignore[call-arg]
    tl.store(Acts + wide(a) * F + n, acts, mask=n < F)


@triton.jit(do_not_specialize=RUNTIME)
def few_second_kernel(
    Acts, Ids, Weights, Down, Bias, Y, stride_it, stride_is, stride_wt, stride_ws,
    reach_d, stride_df, stride_dd, reach_b, stride_bd, D, F, SLOTS, EXPERTS, SPAN,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Y [ASSIGNMENTS, parts, D] in float32: what SPAN * BLOCK_K rows of Down give, a part for each third index."""
    a = tl.program_id(0)
    e = load_expert(Ids, a, True, stride_it, stride_is, SLOTS, EXPERTS)
    if e < 0:
        return
    part = tl.program_id(2)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = (n < D)[:, None]
    d_at = of_expert(Down, e, reach_d) + (n * stride_dd)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    start = part * SPAN * BLOCK_K
    for begin in range(start, tl.minimum(start + SPAN * BLOCK_K, F), BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        b_a = tl.load(Acts + wide(a) * F + k, mask=k < F, other=0.0)[None, :]
        acc += b_a * load_columns(d_at + (k * stride_df)[None, :], k, cols, F)
    y = tl.sum(acc, 1)
    if Bias is not None:
        if part == 0:
            y += tl.load(of_expert(Bias, e, reach_b) + n * stride_bd, mask=n < D, other=0.0).to(tl.float32)
    if WEIGHTED_OUT:
        y *= load_weights(Weights, a, True, stride_wt, stride_ws, SLOTS)
    tl.store(Y + (wide(a) * tl.num_programs(2) + part) * D + n, y, mask=n < D)
