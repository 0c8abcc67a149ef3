"""The template of recurrences with one row: h_t = a_t h_{t-1} + v_t, forward and backward.

    a_t = exp(gate_t rate), or one of the two as it is;   o_t = h_t, or h_{t-1} where it is read before the update

Backward, from the last step to the first, with c_t = d loss / d h_{t-1}:

    dh_t = c_{t+1} + do_t,  c_t = a_t dh_t       (read before: dh_t = c_{t+1},  c_t = a_t dh_t + do_t)
    dv_t = dh_t,  da_t = dh_t h_{t-1},  d log a_t = a_t da_t

A program takes BLOCK_D columns of one head and walks over time in tiles of LANES * STEPS steps; while it computes one tile, it
loads the next. Where there are too few columns to keep the memory busy, time is cut into segments: `summary_kernel` finds the map
of each, `carry_kernel` the state before each, and the segments then run side by side.

This file is real Triton for a gate that is a logarithm, and the pattern from which `scan` weaves the other variants: `if FLAG:` of
a module-level flag is decided when the file is written.
"""

# mypy: disable-error-code="assignment"
# Tuples of blocks grow step by step.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launching import begin, tile_count
from .primitives import LOG2E
from .scanning import (
    bounded,
    carry,
    compose,
    coordinates,
    dense,
    first_state,
    gradients_of_decay,
    load_state,
    parts_of_decay,
    place,
    power_of_two,
    processors,
    read_steps,
    strides,
    summarise,
    summed,
    widened,
    write_steps,
    zeros,
)

# ------------------------------------------------------------------------------------------------------------------------ Flags

DECAYS = tl.constexpr(True)  # there is a decay
GATED = tl.constexpr(True)  # a part of the decay differs from step to step
GATE_D = tl.constexpr(True)  # and from column to column
RATED = tl.constexpr(False)  # a part of the decay is the same in each step
LOG = tl.constexpr(True)  # the decay is given as its logarithm
AFTER = tl.constexpr(True)  # the output is read after the update
AGAIN = tl.constexpr(False)  # the backward computes the states again: the output does not hold them in full precision

RUNTIME = ["T", "TILES", "SEGMENTS"]
FORWARD = {"STEPS": 8, "VEC": 4}
BACKWARD = {"STEPS": 4, "VEC": 4}
OUT_DTYPE = torch.float32

# ------------------------------------------------------------------------------------------------------------------------- Scan


@triton.jit
def decays(gate, rate, t, d, END, STEPS: tl.constexpr):
    """a_t of the tile that begins at steps t [W, 1]; 1 from END on."""
    found = ()
    for u in tl.static_range(STEPS):
        a = gate[u].to(tl.float32) if GATED else 1.0
        if RATED:
            a = a * rate
        if LOG:
            a = tl.exp2(a * LOG2E)
        found = found + (tl.where((t + u < END) & (d >= 0), a, 1.0),)  # [W, D]
    return found


@triton.jit
def replay(a, b, h, READ_AFTER: tl.constexpr, STEPS: tl.constexpr):
    """The states of a tile after each step, or before it, from those before each lane."""
    found = ()
    for u in tl.static_range(STEPS):
        before = h
        h = a[u] * h + b[u]
        found = found + (h if READ_AFTER else before,)
    return found


@triton.jit
def returns(a, grad, STEPS: tl.constexpr):
    """What each step adds to c_t = a_t c_{t+1} + ...: a_t do_t, or do_t where the output is read before the update."""
    found = ()
    for u in tl.static_range(STEPS):
        if AFTER:
            found = found + (a[u] * grad[u],)
        else:
            found = found + (grad[u],)
    return found


# --------------------------------------------------------------------------------------------------------------------- Forward


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    V, Gate, Rate, Entry, Out, Final, Kept,
    stride_vb, stride_vh, stride_vt, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_rb, stride_rh, stride_rt, stride_rd, stride_eb, stride_eh, stride_es, stride_ed,
    stride_ob, stride_oh, stride_ot, stride_od, H, T, D, TILES,
    STEPS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One segment of TILES tiles: the output, the last state [B, H, D], and the state before each tile, Kept [B, H, tiles, D]."""
    b, h, block, d = coordinates(H, D, BLOCK_D, VEC)
    lane = tl.arange(0, LANES)[:, None] * STEPS  # [W, 1]
    tiles = tl.cdiv(T, STEPS * LANES)
    segment = tl.program_id(1)
    first = segment * TILES
    last = tl.minimum(first + TILES, tiles)
    END = tl.minimum(T, last * STEPS * LANES)
    state = load_state(Entry, b, h, segment, d, D, stride_eb, stride_eh, stride_es, stride_ed, BLOCK_D)
    rate = load_state(Rate, b, h, 0, d, D, stride_rb, stride_rh, stride_rt, stride_rd, BLOCK_D)

    t0 = first * STEPS * LANES
    v_at = place(V, b, h, lane, d, stride_vb, stride_vh, stride_vt, stride_vd)
    v_next = read_steps(v_at, t0, lane, END, d < D, stride_vt, STEPS)
    if GATED:
        gate_d = d if GATE_D else tl.zeros([1, 1], dtype=tl.int32)
        gate_at = place(Gate, b, h, lane, gate_d, stride_gb, stride_gh, stride_gt, stride_gd)
        gate_next = read_steps(gate_at, t0, lane, END, gate_d < D, stride_gt, STEPS)
    else:
        gate = ()
    for i in tl.range(first, last):
        t0 = i * STEPS * LANES
        ahead = t0 + STEPS * LANES
        v = widened(v_next, STEPS)
        v_next = read_steps(v_at, ahead, lane, END, d < D, stride_vt, STEPS)
        if GATED:
            gate = gate_next
            gate_next = read_steps(gate_at, ahead, lane, END, gate_d < D, stride_gt, STEPS)
        if Kept is not None:
            tl.store(Kept + ((b * H + h) * tiles + i) * D + d, state, mask=d < D)
        a = decays(gate, rate, t0 + lane, d, END, STEPS)
        entry, state = carry(a, v, state, False, STEPS, LANES)
        if Out is not None:
            o_at = place(Out, b, h, lane, d, stride_ob, stride_oh, stride_ot, stride_od)
            write_steps(o_at, replay(a, v, entry, AFTER, STEPS), t0, lane, END, d < D, stride_ot, STEPS)
    if Final is not None:
        tl.store(Final + (b * H + h) * D + d, state, mask=(d < D) & (segment == tl.num_programs(1) - 1))


# -------------------------------------------------------------------------------------------------------------------- Backward


@triton.jit
def known_states(seen, initial, t, STEPS: tl.constexpr):
    """h_{t-1} of a tile from the output, read one step earlier unless it is read before the update."""
    found = ()
    for u in tl.static_range(STEPS):
        h = seen[u].to(tl.float32)
        if AFTER:
            h = tl.where(t + u == 0, initial, h)
        found = found + (h,)
    return found


@triton.jit(do_not_specialize=RUNTIME)
def backward_kernel(
    Grad, Seen, Gate, Rate, Initial, Kept, Entry, GradV, GradGate, GradRate, GradInitial,
    stride_ob, stride_oh, stride_ot, stride_od, stride_sb, stride_sh, stride_st, stride_sd,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_rb, stride_rh, stride_rt, stride_rd,
    stride_ib, stride_ih, stride_is, stride_id, stride_eb, stride_eh, stride_es, stride_ed,
    stride_xb, stride_xh, stride_xt, stride_xd, stride_yb, stride_yh, stride_yt, stride_yd, H, T, D, TILES,
    STEPS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One segment, from its last tile to its first: gradients of V, Gate, Rate [B, H, segments, D] and the first state [B, H, D].

    Seen: the output; or V where states are computed AGAIN, from those before each tile in Kept. Entry: c after each segment. A gate
    without columns has its gradient summed over the columns of the program.
    """
    b, h, block, d = coordinates(H, D, BLOCK_D, VEC)
    lane = tl.arange(0, LANES)[:, None] * STEPS  # [W, 1]
    tiles = tl.cdiv(T, STEPS * LANES)
    segment = tl.program_id(1)
    first = segment * TILES
    last = tl.minimum(first + TILES, tiles)
    END = tl.minimum(T, last * STEPS * LANES)
    BACK: tl.constexpr = (0 if AGAIN else 1) if AFTER else 0
    c = load_state(Entry, b, h, segment, d, D, stride_eb, stride_eh, stride_es, stride_ed, BLOCK_D)
    initial = load_state(Initial, b, h, 0, d, D, stride_ib, stride_ih, stride_is, stride_id, BLOCK_D)
    rate = load_state(Rate, b, h, 0, d, D, stride_rb, stride_rh, stride_rt, stride_rd, BLOCK_D)
    rate_sum = tl.zeros([LANES, BLOCK_D], dtype=tl.float32)

    t0 = (last - 1) * STEPS * LANES
    x_at = place(GradV, b, h, lane, d, stride_xb, stride_xh, stride_xt, stride_xd)
    grad_at = place(Grad, b, h, lane, d, stride_ob, stride_oh, stride_ot, stride_od)
    grad_next = read_steps(grad_at, t0, lane, END, d < D, stride_ot, STEPS)
    if DECAYS:
        seen_at = place(Seen, b, h, lane, d, stride_sb, stride_sh, stride_st, stride_sd)
        seen_next = read_steps(seen_at, t0, lane, END, d < D, stride_st, STEPS, BACK)
    if GATED:
        gate_d = d if GATE_D else tl.zeros([1, 1], dtype=tl.int32)
        gate_at = place(Gate, b, h, lane, gate_d, stride_gb, stride_gh, stride_gt, stride_gd)
        gate_next = read_steps(gate_at, t0, lane, END, gate_d < D, stride_gt, STEPS)
        y_d = d if GATE_D else gate_d + block
        y_at = place(GradGate, b, h, lane, y_d, stride_yb, stride_yh, stride_yt, stride_yd)
    else:
        gate = ()
    for n in tl.range(0, last - first):
        i = last - 1 - n
        t0 = i * STEPS * LANES
        ahead = t0 - STEPS * LANES
        inside = (d < D) & (ahead >= 0)
        grad = widened(grad_next, STEPS)
        grad_next = read_steps(grad_at, ahead, lane, END, inside, stride_ot, STEPS)
        if GATED:
            gate = gate_next
            gate_next = read_steps(gate_at, ahead, lane, END, (gate_d < D) & (ahead >= 0), stride_gt, STEPS)
        a = decays(gate, rate, t0 + lane, d, END, STEPS)
        if DECAYS:
            seen = seen_next
            seen_next = read_steps(seen_at, ahead, lane, END, inside, stride_st, STEPS, BACK)
            if AGAIN:
                kept = tl.load(Kept + ((b * H + h) * tiles + i) * D + d, mask=d < D, other=0.0)
                v = widened(seen, STEPS)
                entry, end = carry(a, v, kept, False, STEPS, LANES)
                before = replay(a, v, entry, False, STEPS)
            else:
                before = known_states(seen, initial, t0 + lane, STEPS)
        dh, c = carry(a, returns(a, grad, STEPS), c, True, STEPS, LANES)
        grads = ()
        for m in tl.static_range(STEPS):
            if AFTER:
                dh = dh + grad[STEPS - 1 - m]
            grads = (dh,) + grads
            if AFTER:
                dh = a[STEPS - 1 - m] * dh
            else:
                dh = a[STEPS - 1 - m] * dh + grad[STEPS - 1 - m]
        write_steps(x_at, grads, t0, lane, END, d < D, stride_xt, STEPS)
        if DECAYS:
            gate_grads = ()
            for u in tl.static_range(STEPS):
                x = grads[u] * before[u]
                if LOG:
                    x = x * a[u]
                if RATED:
                    y = x * gate[u].to(tl.float32) if GATED else x
                    rate_sum += tl.where(t0 + lane + u < END, y, 0.0)
                    x = x * rate
                gate_grads = gate_grads + (x if GATE_D else tl.sum(x, 1)[:, None],)
            if GATED:
                write_steps(y_at, gate_grads, t0, lane, END, d < D if GATE_D else lane >= 0, stride_yt, STEPS)
    if RATED:
        at = (b * H + h) * tl.num_programs(1) + segment
        tl.store(GradRate + at * D + d, tl.sum(rate_sum, 0)[None, :], mask=d < D)
    if GradInitial is not None:
        tl.store(GradInitial + (b * H + h) * D + d, c, mask=(d < D) & (segment == 0))


# --------------------------------------------------------------------------------------------------------------------- Segments


@triton.jit(do_not_specialize=RUNTIME)
def summary_kernel(
    X, Gate, Rate, Products, Ends,
    stride_xb, stride_xh, stride_xt, stride_xd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_rb, stride_rh, stride_rt, stride_rd, H, T, D, TILES, REVERSE: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The map of one segment's steps: factor and offset, [B, H, segments, D] each. X is V, or if REVERSE the output's gradient."""
    b, h, block, d = coordinates(H, D, BLOCK_D, VEC)
    lane = tl.arange(0, LANES)[:, None] * STEPS  # [W, 1]
    segment = tl.program_id(1)
    first = segment * TILES
    last = tl.minimum(first + TILES, tl.cdiv(T, STEPS * LANES))
    END = tl.minimum(T, last * STEPS * LANES)
    rate = load_state(Rate, b, h, 0, d, D, stride_rb, stride_rh, stride_rt, stride_rd, BLOCK_D)
    factor = tl.full([1, BLOCK_D], 1.0, dtype=tl.float32)
    offset = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    x_at = place(X, b, h, lane, d, stride_xb, stride_xh, stride_xt, stride_xd)
    if GATED:
        gate_d = d if GATE_D else tl.zeros([1, 1], dtype=tl.int32)
        gate_at = place(Gate, b, h, lane, gate_d, stride_gb, stride_gh, stride_gt, stride_gd)
    else:
        gate = ()
    for n in tl.range(0, last - first):
        t0 = (last - 1 - n if REVERSE else first + n) * STEPS * LANES
        x = widened(read_steps(x_at, t0, lane, END, d < D, stride_xt, STEPS), STEPS)
        if GATED:
            gate = read_steps(gate_at, t0, lane, END, gate_d < D, stride_gt, STEPS)
        a = decays(gate, rate, t0 + lane, d, END, STEPS)
        p, e = summarise(a, returns(a, x, STEPS) if REVERSE else x, REVERSE, STEPS)
        p, e, before = compose(p, e, REVERSE, LANES)
        factor = bounded(factor * p)
        offset = p * offset + e
    at = ((b * H + h) * tl.num_programs(1) + segment) * D + d
    tl.store(Products + at, factor, mask=d < D)
    tl.store(Ends + at, offset, mask=d < D)


@triton.jit(do_not_specialize=RUNTIME)
def carry_kernel(
    Products, Ends, First, stride_fb, stride_fh, stride_fs, stride_fd, H, D, SEGMENTS, REVERSE: tl.constexpr,
    BLOCK_D: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Overwrites Ends with the state before each segment, from `First` on; if REVERSE, after each, from the last on."""
    b, h, block, d = coordinates(H, D, BLOCK_D, VEC)
    state = load_state(First, b, h, 0, d, D, stride_fb, stride_fh, stride_fs, stride_fd, BLOCK_D)
    for n in tl.range(0, SEGMENTS):
        at = ((b * H + h) * SEGMENTS + (SEGMENTS - 1 - n if REVERSE else n)) * D + d
        end = tl.load(Ends + at, mask=d < D, other=0.0)
        factor = tl.load(Products + at, mask=d < D, other=0.0)
        tl.store(Ends + at, state, mask=d < D)
        state = factor * state + end


# ---------------------------------------------------------------------------------------------------------------------- Launch


def plan(device, heads, t, d, config):
    """Options of a launch, programs of a segment, segments, and tiles of each.

    A row of columns is 32 numbers wide, so that whole lines of memory are read; wider where that still leaves two programs to each
    processor. A program that has a processor to itself has 8 warps. Lanes over time use the threads that are left. Each thread
    keeps STEPS * VEC operands of each kind in flight, 32 KB a program or more, and half as many programs as processors saturate the
    memory: only below that is time cut into segments, for which the operands are read twice.
    """
    room = processors(device)
    steps, vec = min(config["STEPS"], power_of_two(t)), config["VEC"]
    width = min(config.get("BLOCK_D", 128), power_of_two(d))
    while "BLOCK_D" not in config and width > 32 and heads * tile_count(d, width) < 2 * room:
        width //= 2
    programs = heads * tile_count(d, width)
    warps = 4 if programs > room else 8
    lanes = config.get("LANES", max(1, min(32 * warps * vec // width, power_of_two(tile_count(t, steps)))))
    tiles = tile_count(t, steps * lanes)
    cut = config.get("SEGMENTS", max(1, min(room // programs, tiles // 4)) if 2 * programs <= room else 1)
    each = max(1, tile_count(tiles, cut))
    options = {"STEPS": steps, "LANES": lanes, "BLOCK_D": width, "VEC": min(vec, width)}
    options["num_warps"] = max(1, min(warps, lanes * width // (32 * options["VEC"])))
    return options, programs, max(1, tile_count(tiles, each)), each


def told(planned):
    """What a plan decides, one value after the other."""
    options, *counts = planned
    return *options.values(), *counts


def as_columns(*tensors):
    """Tensors [B, H, S, D], or None, with heads and columns as one dimension where the memory of all allows it."""
    given = [x for x in tensors if x is not None]
    heads, width = given[0].shape[1], given[0].shape[3]
    if any(x.shape[3] != width or (heads > 1 and x.stride(1) != width * x.stride(3)) for x in given):
        return tensors
    return tuple(None if x is None else merged(x, heads * width) for x in tensors)


def merged(x, size):
    """The view [B, 1, S, size] of a tensor [B, H, S, D] whose heads follow one another."""
    return x.as_strided((x.shape[0], 1, x.shape[2], size), (x.stride(0), 0, x.stride(2), x.stride(3)), x.storage_offset())


def decay_rows(gate, rate, v):
    """The parts of the decay as [B, H, T, D] or [B, H, T, 1], and [B, H, 1, D]; None where there are none."""
    b, h, t, d = v.shape
    varying, constant = parts_of_decay(gate, rate, t)
    varying = None if varying is None else varying[:, :, :, 0].expand(b, h, t, -1)
    return varying, None if constant is None else constant[:, :, :, 0].expand(b, h, 1, d)


def segment_entries(start, x, gate, rate, first, planned, reverse):
    """The state that each segment begins with, [B, H, segments, D] from `first` [B, H, 1, D] on."""
    options, programs, segments, each = planned
    if segments == 1:
        return first
    b, h, t, d = x.shape
    products, ends = start.empty((2, b, h, segments, d), torch.float32)
    start(
        summary_kernel, (programs, segments, 1),
        x, gate, rate, products, ends, *x.stride(), *strides(gate, 4), *strides(rate, 4), h, t, d, each, REVERSE=reverse, **options,
    )  # fmt: skip
    start(
        carry_kernel, (programs, 1, 1), products, ends, first, *strides(first, 4), h, d, segments,
        REVERSE=reverse, BLOCK_D=options["BLOCK_D"], VEC=options["VEC"], num_warps=1,
    )  # fmt: skip
    return ends


def launch_forward(start, v, gate, rate, initial, out, final, kept, planned):
    """The output, the last state and the state before each tile, each unless None."""
    options, programs, segments, each = planned
    b, h, t, d = v.shape
    entry = segment_entries(start, v, gate, rate, initial, planned, False)
    start(
        forward_kernel, (programs, segments, 1),
        v, gate, rate, entry, out, final, kept, *(n for x in (v, gate, rate, entry, out) for n in strides(x, 4)), h, t, d, each,
        **options,
    )  # fmt: skip


def forward(v, gate=None, rate=None, initial=None, *, layout="bhtd", config=None):
    """`(out, final)`: out [B, H, T, D] in memory ordered as `layout` says, final [B, H, 1, D] float32.

    v [B, H, T, D], gate and rate [B, H, T, 1, D] with sizes of 1 where they do not differ, initial [B, H, 1, D]; of any strides.
    """
    b, h, t, d = v.shape
    out = dense(v.shape, OUT_DTYPE, v.device, layout)
    if v.numel() == 0:
        return out, first_state(v, 1, initial)
    final = torch.empty((b, h, 1, d), dtype=torch.float32, device=v.device)
    rows = as_columns(v, *decay_rows(gate, rate, v), initial, out)
    planned = plan(v.device, b * rows[0].shape[1], t, rows[0].shape[3], {**FORWARD, **(config or {})})
    begin(lambda start: launch_forward(*(start, *rows, final, None, planned)), *rows, final, *told(planned))
    return out, final


def launch_backward(start, grad, seen, v, gate, rate, initial, grad_final, outputs, planned):
    """The gradients, into `outputs`: those of v, of the gate, of the rate, of the initial state."""
    options, programs, segments, each = planned
    b, h, t, d = v.shape
    kept = None
    if AGAIN:
        kept = start.empty((b, h, tile_count(t, options["STEPS"] * options["LANES"]), d), torch.float32)
        launch_forward(start, v, gate, rate, initial, None, None, kept, planned)
    entry = segment_entries(start, grad, gate, rate, grad_final, planned, True)
    tensors = (grad, seen, gate, rate, initial)
    start(
        backward_kernel, (programs, segments, 1),
        *tensors, kept, entry, *outputs, *(n for x in (*tensors, entry, *outputs[:2]) for n in strides(x, 4)), h, t, d, each,
        **options,
    )  # fmt: skip


def backward(grad, grad_final, v, gate=None, rate=None, initial=None, out=None, *, config=None):
    """Gradients of v, and of the others by name, from those of `forward`'s results, either of which may be None."""
    b, h, t, d = v.shape
    grad = v.new_zeros(()).expand(v.shape) if grad is None else grad
    dv = torch.empty_like(v)
    if v.numel() == 0:
        return dv, {"gate": zeros(gate), "rate": zeros(rate), "initial": summed(first_state(v, 1, grad_final), initial)}
    seen = v if AGAIN else out
    varying, constant = parts_of_decay(gate, rate, t)
    gate_rows, rate_rows = decay_rows(gate, rate, v)
    grad_gate = None
    if GATED:
        if GATE_D:
            whole = varying.shape == (b, h, t, 1, d)
            grad_gate = torch.empty_like(varying)[:, :, :, 0] if whole else dense((b, h, t, d), torch.float32, v.device, "bthd")
    rows = as_columns(grad, seen, v, gate_rows, rate_rows, initial, grad_final, dv, grad_gate)
    planned = plan(v.device, b * rows[0].shape[1], t, rows[0].shape[3], {**BACKWARD, **(config or {})})
    if rows[-1] is None and GATED:
        grad_gate = torch.empty((b, h, t, tile_count(d, planned[0]["BLOCK_D"])), dtype=torch.float32, device=v.device)
        rows = (*rows[:-1], grad_gate)
    shape, layout = (b, h, planned[2], d), "bhtd" if rows[0].shape[1] == h else "bthd"
    grad_rate = None if rate_rows is None else dense(shape, torch.float32, v.device, layout)
    grad_initial = None if initial is None else torch.empty((b, h, 1, d), dtype=torch.float32, device=v.device)
    outputs = (*rows[-2:], grad_rate, grad_initial)
    begin(lambda start: launch_backward(*(start, *rows[:-2], outputs, planned)), *rows[:-2], *outputs, *told(planned))
    parts = [None if x is None else x.unsqueeze(3) for x in (grad_gate, grad_rate)]
    return dv, {**gradients_of_decay(gate, rate, t, *parts), "initial": summed(grad_initial, initial)}
