"""The template of recurrences whose decay differs from element to element of the state [N, D], as in a selective scan.

    S_t = a_t * S_{t-1} + k_t v_t^T,   a_t = exp(gate_t rate), or one of the two as it is;   o_t = q_t^T S_t, or q_t^T S_{t-1}

Backward, from the last step to the first, with C_t = d loss / d S_{t-1}:

    dS_t = C_{t+1} + q_t do_t^T,  C_t = a_t * dS_t       (read before: dS_t = C_{t+1},  C_t = a_t * dS_t + q_t do_t^T)
    dq_t = S_t do_t (S_{t-1} do_t),  dk_t = dS_t v_t,  dv_t = dS_t^T k_t,  d log a_t = C_t * S_{t-1} (a_t * dS_t * S_{t-1})

A program takes BLOCK_D columns of one head and walks over time in tiles of LANES * STEPS steps. A tile's v, gate and output stay in
registers while the N rows of the state go through one after another, each as a scan of one row (`scanning`): nothing of size
[T, N, D] ever exists. Between tiles the state waits in memory. Backward, a first sweep keeps the state before each tile; the tile's
own states are computed again from there. Sums over columns, dq and dk, and over time, that of the rate, are left in parts, one for
each program or tile, and added up in a fixed order.

This file is real Triton for a selective scan, and the pattern from which `scan` weaves the other variants: `if FLAG:` of a
module-level flag is decided when the file is written.
"""

# mypy: disable-error-code="assignment"
# Tuples of blocks grow step by step.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launching import begin, tile_count
from .primitives import LOG2E, wide
from .scanning import (
    carry,
    coordinates,
    dense,
    first_state,
    gradients_of_decay,
    load_state,
    no_steps,
    parts_of_decay,
    place,
    power_of_two,
    processors,
    read_steps,
    strides,
    summed,
    widened,
    write_steps,
    zeros,
)

# ------------------------------------------------------------------------------------------------------------------------ Flags

GATED = tl.constexpr(True)  # a part of the decay differs from step to step
GATE_K = tl.constexpr(False)  # and from row to row
GATE_D = tl.constexpr(True)  # and from column to column
RATED = tl.constexpr(True)  # a part of the decay is the same in each step
LOG = tl.constexpr(True)  # the decay is given as its logarithm
AFTER = tl.constexpr(True)  # the output is read after the update

RUNTIME = ["T"]
FORWARD = {"STEPS": 8, "VEC": 2}
BACKWARD = {"STEPS": 4, "VEC": 2}
OUT_DTYPE = torch.float32

# ------------------------------------------------------------------------------------------------------------------------- Rows


@triton.jit
def decays(gate, rate, t, d, END, STEPS: tl.constexpr):
    """a_t of one row of the state in the tile that begins at steps t [W, 1]; 1 from END on."""
    if RATED and LOG:
        rate = rate * LOG2E
    found = ()
    for u in tl.static_range(STEPS):
        a = gate[u].to(tl.float32) if GATED else 1.0
        if RATED:
            a = a * rate
        if LOG and not RATED:
            a = a * LOG2E
        if LOG:
            a = tl.exp2(a)
        found = found + (tl.where((t + u < END) & (d >= 0), a, 1.0),)  # [W, D]
    return found


@triton.jit
def products(x, y, STEPS: tl.constexpr):
    """x_t y_t of a tile."""
    found = ()
    for u in tl.static_range(STEPS):
        found = found + (x[u] * y[u],)
    return found


@triton.jit
def side_by_side(values, BLOCK_D: tl.constexpr, VEC: tl.constexpr, STEPS: tl.constexpr):
    """[LANES, BLOCK_D]: column u is the sum of values[u] over its columns, so that one store takes all steps."""
    column = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_D), VEC), VEC)[None, :]
    found = tl.zeros(values[0].shape, dtype=tl.float32)
    for u in tl.static_range(STEPS):
        found = tl.where(column == u, tl.sum(values[u], 1)[:, None], found)
    return found


# --------------------------------------------------------------------------------------------------------------------- Forward


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    V, Gate, Rate, Q, K, States, Out,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gk, stride_gd,
    stride_rb, stride_rh, stride_rt, stride_rk, stride_rd, stride_qb, stride_qh, stride_qt, stride_qk,
    stride_kb, stride_kh, stride_kt, stride_kk, stride_ob, stride_oh, stride_ot, stride_od,
    stride_s, H, GROUP, T, D, N,
    STEPS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The output, unless None. The state before tile i is at States + i * stride_s, [B, H, N, D], the one after it is put next."""
    b, h, block, d = coordinates(H, D, BLOCK_D, VEC)
    lane = tl.arange(0, LANES)[:, None] * STEPS  # [W, 1]
    once = tl.zeros([1, 1], dtype=tl.int32)
    state_at = States + (b * H + h) * N * D + d
    v_at = place(V, b, h, lane, d, stride_vb, stride_vh, stride_vt, stride_vd)
    q_at = place(Q, b, h // GROUP, lane, once, stride_qb, stride_qh, stride_qt, stride_qk)
    k_at = place(K, b, h // GROUP, lane, once, stride_kb, stride_kh, stride_kt, stride_kk)
    rate = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    if GATED:
        gate_d = d if GATE_D else once
        gate_at = place(Gate, b, h, lane, gate_d, stride_gb, stride_gh, stride_gt, stride_gd)
    else:
        gate = ()
    for i in tl.range(0, tl.cdiv(T, STEPS * LANES)):
        t0 = i * STEPS * LANES
        v = widened(read_steps(v_at, t0, lane, T, d < D, stride_vt, STEPS), STEPS)
        if GATED and not GATE_K:
            gate = read_steps(gate_at, t0, lane, T, gate_d < D, stride_gt, STEPS)
        out = no_steps(STEPS, LANES, BLOCK_D)
        for n in tl.range(0, N):
            state = tl.load(state_at + i * stride_s + n * D, mask=d < D, other=0.0)
            k = widened(read_steps(k_at + n * stride_kk, t0, lane, T, lane >= 0, stride_kt, STEPS), STEPS)
            if RATED:
                rate = load_state(Rate, b, h, n, d, D, stride_rb, stride_rh, stride_rk, stride_rd, BLOCK_D)
            if GATED and GATE_K:
                gate = read_steps(gate_at + n * stride_gk, t0, lane, T, gate_d < D, stride_gt, STEPS)
            a = decays(gate, rate, t0 + lane, d, T, STEPS)
            x = products(k, v, STEPS)
            s, state = carry(a, x, state, False, STEPS, LANES)
            tl.store(state_at + (i + 1) * stride_s + n * D, state, mask=d < D)
            if Out is not None:
                q = widened(read_steps(q_at + n * stride_qk, t0, lane, T, lane >= 0, stride_qt, STEPS), STEPS)
                added = ()
                for u in tl.static_range(STEPS):
                    before = s
                    s = a[u] * s + x[u]
                    added = added + (out[u] + q[u] * (s if AFTER else before),)
                out = added
        if Out is not None:
            o_at = place(Out, b, h, lane, d, stride_ob, stride_oh, stride_ot, stride_od)
            write_steps(o_at, out, t0, lane, T, d < D, stride_ot, STEPS)
        tl.debug_barrier()  # the states that were put are read next


# -------------------------------------------------------------------------------------------------------------------- Backward


@triton.jit(do_not_specialize=RUNTIME)
def backward_kernel(
    Grad, V, Gate, Rate, Q, K, States, Carry, GradV, GradGate, GradRate, GradQ, GradK,
    stride_ob, stride_oh, stride_ot, stride_od, stride_vb, stride_vh, stride_vt, stride_vd,
    stride_gb, stride_gh, stride_gt, stride_gk, stride_gd, stride_rb, stride_rh, stride_rt, stride_rk, stride_rd,
    stride_qb, stride_qh, stride_qt, stride_qk, stride_kb, stride_kh, stride_kt, stride_kk,
    stride_xb, stride_xh, stride_xt, stride_xd, stride_yb, stride_yh, stride_yt, stride_yk, stride_yd,
    stride_s, stride_p, H, GROUP, T, D, N,
    STEPS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """From the last tile to the first: gradients of V, Gate, Rate [tiles, B, H, N, D], and Q and K [blocks, B, H, N, T or more].

    Carry [B, H, N, D] goes from the gradient of the last state to that of the first. A gate without columns has its gradient summed
    over the columns of the program.
    """
    b, h, block, d = coordinates(H, D, BLOCK_D, VEC)
    lane = tl.arange(0, LANES)[:, None] * STEPS  # [W, 1]
    once = tl.zeros([1, 1], dtype=tl.int32)
    head = b * H + h
    tiles = tl.cdiv(T, STEPS * LANES)
    heads = tl.num_programs(0) // tl.cdiv(D, BLOCK_D)
    v_at = place(V, b, h, lane, d, stride_vb, stride_vh, stride_vt, stride_vd)
    x_at = place(GradV, b, h, lane, d, stride_xb, stride_xh, stride_xt, stride_xd)
    grad_at = place(Grad, b, h, lane, d, stride_ob, stride_oh, stride_ot, stride_od)
    q_at = place(Q, b, h // GROUP, lane, once, stride_qb, stride_qh, stride_qt, stride_qk)
    k_at = place(K, b, h // GROUP, lane, once, stride_kb, stride_kh, stride_kt, stride_kk)
    column = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_D), VEC), VEC)[None, :]  # as a step of each lane
    part = (wide(block) * heads + head) * N * stride_p + lane + column  # [W, D]
    rate = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    if GATED:
        gate_d = d if GATE_D else once
        gate_at = place(Gate, b, h, lane, gate_d, stride_gb, stride_gh, stride_gt, stride_gd)
        y_d = d if GATE_D else once + block
        y_at = place(GradGate, b, h, lane, y_d, stride_yb, stride_yh, stride_yt, stride_yd)
    else:
        gate = ()
    for back in tl.range(0, tiles):
        i = tiles - 1 - back
        t0 = i * STEPS * LANES
        grad = widened(read_steps(grad_at, t0, lane, T, d < D, stride_ot, STEPS), STEPS)
        v = widened(read_steps(v_at, t0, lane, T, d < D, stride_vt, STEPS), STEPS)
        if GATED and not GATE_K:
            gate = read_steps(gate_at, t0, lane, T, gate_d < D, stride_gt, STEPS)
        grad_v = no_steps(STEPS, LANES, BLOCK_D)
        grad_gate = no_steps(STEPS, LANES, BLOCK_D)
        for n in tl.range(0, N):
            kept = tl.load(States + i * stride_s + (head * N + n) * D + d, mask=d < D, other=0.0)
            c = tl.load(Carry + (head * N + n) * D + d, mask=d < D, other=0.0)
            q = widened(read_steps(q_at + n * stride_qk, t0, lane, T, lane >= 0, stride_qt, STEPS), STEPS)
            k = widened(read_steps(k_at + n * stride_kk, t0, lane, T, lane >= 0, stride_kt, STEPS), STEPS)
            if RATED:
                rate = load_state(Rate, b, h, n, d, D, stride_rb, stride_rh, stride_rk, stride_rd, BLOCK_D)
            if GATED and GATE_K:
                gate = read_steps(gate_at + n * stride_gk, t0, lane, T, gate_d < D, stride_gt, STEPS)
            a = decays(gate, rate, t0 + lane, d, T, STEPS)
            x = products(k, v, STEPS)
            s, end = carry(a, x, kept, False, STEPS, LANES)
            before = ()
            grad_q = ()
            for u in tl.static_range(STEPS):
                before = before + (s,)
                after = a[u] * s + x[u]
                grad_q = grad_q + (grad[u] * (after if AFTER else s),)
                s = after
            seen = products(q, grad, STEPS)
            ds, c = carry(a, products(a, seen, STEPS) if AFTER else seen, c, True, STEPS, LANES)
            tl.store(Carry + (head * N + n) * D + d, c, mask=d < D)
            rate_sum = tl.zeros([LANES, BLOCK_D], dtype=tl.float32)
            new_v = ()
            new_gate = ()
            grad_k = ()
            for m in tl.static_range(1, STEPS + 1):
                if AFTER:
                    ds = ds + seen[STEPS - m]
                grad_k = (ds * v[STEPS - m],) + grad_k
                new_v = (grad_v[STEPS - m] + ds * k[STEPS - m],) + new_v
                y = tl.where(t0 + lane + (STEPS - m) < T, ds * before[STEPS - m], 0.0)
                ds = a[STEPS - m] * ds
                if LOG:
                    y = y * a[STEPS - m]
                if RATED:
                    rate_sum += y * gate[STEPS - m].to(tl.float32) if GATED else y
                    y = y * rate
                if GATED and GATE_K:
                    new_gate = (y if GATE_D else tl.sum(y, 1)[:, None],) + new_gate
                if GATED and not GATE_K:
                    new_gate = (grad_gate[STEPS - m] + y,) + new_gate
                if not AFTER:
                    ds = ds + seen[STEPS - m]
            grad_v = new_v
            known = (column < STEPS) & (t0 + lane + column < T)
            tl.store(GradQ + part + n * stride_p + t0, side_by_side(grad_q, BLOCK_D, VEC, STEPS), mask=known)
            tl.store(GradK + part + n * stride_p + t0, side_by_side(grad_k, BLOCK_D, VEC, STEPS), mask=known)
            if RATED:
                rate_at = GradRate + ((i * heads + head) * N + n) * D + d
                tl.store(rate_at, tl.sum(rate_sum, 0)[None, :], mask=d < D)
            if GATED and GATE_K:
                inside = d < D if GATE_D else lane >= 0
                write_steps(y_at + n * stride_yk, new_gate, t0, lane, T, inside, stride_yt, STEPS)
            if GATED and not GATE_K:
                grad_gate = new_gate
        write_steps(x_at, grad_v, t0, lane, T, d < D, stride_xt, STEPS)
        if GATED and not GATE_K:
            if GATE_D:
                write_steps(y_at, grad_gate, t0, lane, T, d < D, stride_yt, STEPS)
            else:
                sums = ()
                for u in tl.static_range(STEPS):
                    sums = sums + (tl.sum(grad_gate[u], 1)[:, None],)
                write_steps(y_at, sums, t0, lane, T, lane >= 0, stride_yt, STEPS)
        tl.debug_barrier()  # what is carried was put by other threads


# ---------------------------------------------------------------------------------------------------------------------- Launch


def plan(device, heads, t, d, config):
    """Options of a launch, and its programs.

    A row of columns is 16 numbers wide, wider where that still leaves two programs to each processor. The lanes over time use the
    threads that are left; each costs work of its own, so that programs have 4 warps only until there are some for every scheduler.
    """
    room, vec = processors(device), config["VEC"]
    width = min(config.get("BLOCK_D", 64), power_of_two(d))
    while "BLOCK_D" not in config and width > 16 and heads * tile_count(d, width) < 2 * room:
        width //= 2
    steps = min(config["STEPS"], power_of_two(t), width)
    programs = heads * tile_count(d, width)
    warps = 4 if programs < 8 * room else 1
    vec = min(vec, width)
    lanes = config.get("LANES", max(1, min(32 * warps * vec // width, power_of_two(tile_count(t, steps)))))
    options = {"STEPS": steps, "LANES": lanes, "BLOCK_D": width, "VEC": vec}
    options["num_warps"] = max(1, min(warps, lanes * width // (32 * vec)))
    return options, programs


def decay_views(gate, rate, v, rows):
    """The parts of the decay as [B, H, T, N or 1, D or 1] and [B, H, 1, N, D]; None where there are none."""
    b, h, t, d = v.shape
    varying, constant = parts_of_decay(gate, rate, t)
    varying = None if varying is None else varying.expand(b, h, t, -1, -1)
    return varying, None if constant is None else constant.expand(b, h, 1, rows, d)


def launch_forward(start, v, gate, rate, q, k, states, stride, out, planned):
    """The output, unless None, and the states between tiles."""
    options, programs = planned
    b, h, t, d = v.shape
    start(
        forward_kernel, (programs, 1, 1),
        v, gate, rate, q, k, states, out,
        *v.stride(), *strides(gate, 5), *strides(rate, 5), *q.stride(), *k.stride(), *strides(out, 4),
        stride, h, h // k.shape[1], t, d, k.shape[3], **options,
    )  # fmt: skip


def forward(v, q, k, gate=None, rate=None, initial=None, *, layout="bhtd", config=None):
    """`(out, final)`: out [B, H, T, D] in memory ordered as `layout` says, final [B, H, N, D] float32.

    v [B, H, T, D], q and k [B, H_K, T, N], gate and rate [B, H, T, N, D] with sizes of 1 where they do not differ, initial
    [B, H, N, D]; of any strides.
    """
    b, h, t, d = v.shape
    out, final = dense(v.shape, OUT_DTYPE, v.device, layout), first_state(v, k.shape[3], initial)
    if final.numel() == 0 or t == 0:
        return out, final
    planned = plan(v.device, b * h, t, d, {**FORWARD, **(config or {})})
    varying, constant = decay_views(gate, rate, v, k.shape[3])
    run = lambda start: launch_forward(start, v, varying, constant, q, k, final, 0, out, planned)  # noqa: E731
    begin(run, v, varying, constant, q, k, final, out, *planned[0].values())
    return out, final


def backward(grad, grad_final, v, q, k, gate=None, rate=None, initial=None, *, config=None):
    """Gradients of v, and of the others by name, from those of `forward`'s results, either of which may be None."""
    b, h, t, d = v.shape
    rows, carried = k.shape[3], first_state(v, k.shape[3], grad_final)
    named = {"q": q, "k": k, "gate": gate, "rate": rate, "initial": initial}
    if carried.numel() == 0 or t == 0:
        return torch.empty_like(v), {**{name: zeros(x) for name, x in named.items()}, "initial": summed(carried, initial)}
    grad = v.new_zeros(()).expand(v.shape) if grad is None else grad
    options, programs = planned = plan(v.device, b * h, t, d, {**BACKWARD, **(config or {})})
    tiles, blocks = tile_count(t, options["STEPS"] * options["LANES"]), tile_count(d, options["BLOCK_D"])
    new = {"dtype": torch.float32, "device": v.device}
    states = torch.empty((tiles + 1, b, h, rows, d), **new)
    states[0].copy_(first_state(v, rows, initial))
    varying, constant = decay_views(gate, rate, v, rows)
    dv, parts = torch.empty_like(v), torch.empty((2, blocks, b, h, rows, 16 * tile_count(t, 16)), **new)
    grad_gate = grad_rate = None
    if varying is not None:
        grad_gate = torch.empty((b, h, t, varying.shape[3], d if varying.shape[4] == d else blocks), **new)
    if constant is not None:
        grad_rate = torch.empty((tiles, b, h, rows, d), **new)

    def run(start):
        launch_forward(start, v, varying, constant, q, k, states, states.stride(0), None, planned)
        start(
            backward_kernel, (programs, 1, 1),
            grad, v, varying, constant, q, k, states, carried, dv, grad_gate, grad_rate, parts[0], parts[1],
            *grad.stride(), *v.stride(), *strides(varying, 5), *strides(constant, 5), *q.stride(), *k.stride(),
            *dv.stride(), *strides(grad_gate, 5), states.stride(0), parts.stride(-2), h, h // k.shape[1], t, d, rows, **options,
        )  # fmt: skip

    begin(
        run, grad, v, varying, constant, q, k, states, carried, dv, grad_gate, grad_rate, parts, *options.values()
    )  # fmt: skip
    return dv, {
        "q": summed_heads(parts[0], q),
        "k": summed_heads(parts[1], k),
        **gradients_of_decay(gate, rate, t, grad_gate, None if grad_rate is None else grad_rate.sum(0).unsqueeze(2)),
        "initial": summed(carried, initial),
    }


def summed_heads(parts, like):
    """[blocks, B, H, N, T or more] summed over blocks and the heads of a group, as a tensor like [B, H_K, T, N]."""
    b, h, t, rows = like.shape
    whole = parts.sum(0).view(b, h, -1, rows, parts.shape[-1]).sum(2)
    return torch.empty_like(like).copy_(whole[..., :t].transpose(2, 3))
