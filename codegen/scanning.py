"""What kernels that scan over time share, on the device and on the host. The emitter copies what a file uses.

A program holds a tile of LANES * STEPS steps: lane w takes steps w * STEPS to w * STEPS + STEPS - 1, one after another. What
differs from step to step is a tuple of STEPS blocks [LANES, BLOCK_D]. A step is an affine map h -> a h + b of the state: the lanes
summarise theirs, carry the state across, and replay.
"""

# mypy: disable-error-code="assignment"
# Tuples of blocks grow step by step.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .primitives import wide

LOG = tl.constexpr(True)  # a flag: factors are exponentials, and so not negative

# ----------------------------------------------------------------------------------------------------------------------- Device


@triton.jit
def coordinates(H, D, BLOCK_D: tl.constexpr, VEC: tl.constexpr):
    """Batch, head, block of columns, and its columns [1, BLOCK_D], of which a thread takes VEC neighbours."""
    blocks = tl.cdiv(D, BLOCK_D)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    d = block * BLOCK_D + tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_D), VEC), VEC)
    return wide(head // H), wide(head % H), block, d[None, :]


@triton.jit
def place(base, b, h, t, d, stride_b, stride_h, stride_t, stride_d):
    """Pointers to [b, h, t, d]."""
    return base + b * stride_b + h * stride_h + wide(t) * stride_t + wide(d) * stride_d


@triton.jit
def load_state(State, b, h, s, d, D, stride_b, stride_h, stride_s, stride_d, BLOCK_D: tl.constexpr):
    """[1, BLOCK_D] of the states [B, H, S, D] at s; zeros if there are none."""
    if State is None:
        return tl.zeros([1, BLOCK_D], dtype=tl.float32)
    else:
        at = place(State, b, h, s, d, stride_b, stride_h, stride_s, stride_d)
        return tl.load(at, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def read_steps(at, t0, lane, END, inside, stride_t, STEPS: tl.constexpr, BACK: tl.constexpr = 0):
    """Steps t0 + lane + u - BACK, u < STEPS, of what `at` points to at step `lane`; zeros before 0, from END on, and outside."""
    at += wide(t0 - BACK) * stride_t
    found = ()
    for u in tl.static_range(STEPS):
        t = t0 + lane + u - BACK
        known = (t < END) & inside
        if u < BACK:
            known = known & (t >= 0)
        found = found + (tl.load(at + u * stride_t, mask=known, other=0.0),)
    return found


@triton.jit
def write_steps(at, values, t0, lane, END, inside, stride_t, STEPS: tl.constexpr):
    """The opposite of `read_steps`."""
    at += wide(t0) * stride_t
    for u in tl.static_range(STEPS):
        tl.store(at + u * stride_t, values[u].to(at.dtype.element_ty), mask=(t0 + lane + u < END) & inside)


@triton.jit
def widened(values, STEPS: tl.constexpr):
    """As float32."""
    found = ()
    for u in tl.static_range(STEPS):
        found = found + (values[u].to(tl.float32),)
    return found


@triton.jit
def no_steps(STEPS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros."""
    found = ()
    for _ in tl.static_range(STEPS):
        found = found + (tl.zeros([LANES, BLOCK_D], dtype=tl.float32),)
    return found


@triton.jit
def bounded(x):
    """A product of factors, kept finite: infinity times a state of zero is not a number."""
    if not LOG:
        x = tl.maximum(x, -3.4028234663852886e38)
    return tl.minimum(x, 3.4028234663852886e38)


@triton.jit
def follow(p1, e1, x1, y1, p2, e2, x2, y2):
    """One map h -> p h + e after another. h -> x h + y is the same without its last step: of a single one, (1, 0)."""
    return bounded(p1 * p2), p2 * e1 + e2, bounded(p1 * x2), x2 * e1 + y2


@triton.jit
def summarise(a, b, REVERSE: tl.constexpr, STEPS: tl.constexpr):
    """Each lane's steps as one map: its factor and its offset."""
    p = a[STEPS - 1 if REVERSE else 0]
    e = b[STEPS - 1 if REVERSE else 0]
    for n in tl.static_range(1, STEPS):
        p = bounded(p * a[STEPS - 1 - n if REVERSE else n])
        e = a[STEPS - 1 - n if REVERSE else n] * e + b[STEPS - 1 - n if REVERSE else n]
    return p, e


@triton.jit
def compose(p, e, REVERSE: tl.constexpr, LANES: tl.constexpr):
    """The maps of all lanes after one another, [1, BLOCK_D]; and for each lane [LANES, BLOCK_D] the offset of those before it."""
    if LANES == 1:
        return p, e, e * 0.0
    else:
        one = tl.full(p.shape, 1.0, tl.float32)
        p, e, x, y = tl.associative_scan((p, e, one, one * 0.0), 0, follow, reverse=REVERSE)
        last = tl.arange(0, LANES)[:, None] == (0 if REVERSE else LANES - 1)
        return tl.sum(tl.where(last, p, 0.0), 0)[None, :], tl.sum(tl.where(last, e, 0.0), 0)[None, :], y


@triton.jit
def carry(a, b, state, REVERSE: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr):
    """The state before each lane's first step [LANES, BLOCK_D], and the one after the last lane [1, BLOCK_D]."""
    if LANES == 1:
        entry = state
        for n in tl.static_range(STEPS):
            state = a[STEPS - 1 - n if REVERSE else n] * state + b[STEPS - 1 - n if REVERSE else n]
        return entry, state
    else:
        p, e = summarise(a, b, REVERSE, STEPS)
        first = tl.arange(0, LANES)[:, None] == (LANES - 1 if REVERSE else 0)
        p, end, before = compose(p, tl.where(first, p * state + e, e), REVERSE, LANES)
        return tl.where(first, state, before), end


# ------------------------------------------------------------------------------------------------------------------------- Host


def power_of_two(n):
    """The least that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def processors(device):
    """Multiprocessors or compute units of a GPU; of anything else, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def strides(x, rank):
    """Of a tensor; zeros of none."""
    return (0,) * rank if x is None else x.stride()


def dense(shape, dtype, device, layout):
    """An empty [B, H, T, D], dense in the order of `layout`: "bhtd", "bthd" or "tbhd"."""
    order = {"bhtd": (0, 1, 2), "bthd": (0, 2, 1), "tbhd": (2, 0, 1)}[layout]
    memory = torch.empty([shape[n] for n in order] + [shape[3]], dtype=dtype, device=device)
    return memory.permute(*(order.index(n) for n in range(3)), 3)


def first_state(v, rows, initial):
    """[B, H, N, D] float32 to be overwritten."""
    b, h, _, d = v.shape
    states = torch.empty((b, h, rows, d), dtype=torch.float32, device=v.device)
    return states.zero_() if initial is None else states.copy_(initial)


def zeros(x):
    """Like a tensor, or None."""
    return None if x is None else torch.zeros_like(x)


def summed(parts, like):
    """`parts` summed over the dimensions in which `like` has size 1, as a tensor like it; None for None."""
    if like is None or (parts.shape == like.shape and parts.stride() == like.stride() and parts.dtype == like.dtype):
        return parts
    gone = [n for n, size in enumerate(like.shape) if size == 1 and parts.shape[n] != 1]
    return torch.empty_like(like).copy_(parts.sum(gone, keepdim=True) if gone else parts)


def parts_of_decay(gate, rate, t):
    """The decay's logarithm as a part that differs from step to step, and one that does not; either may be None."""
    if gate is None or (gate.shape[2] == t and (rate is None or rate.shape[2] == 1)):
        return gate, rate
    if rate is None:
        return None, gate
    if gate.shape[2] == 1 and rate.shape[2] == t:
        return rate, gate
    product = gate.float() * rate.float()
    return (product, None) if product.shape[2] == t else (None, product)


def gradients_of_decay(gate, rate, t, grad_varying, grad_constant):
    """The gradients of gate and rate, by name, from those of `parts_of_decay`, which are summed where they are larger."""
    varying, constant = parts_of_decay(gate, rate, t)
    if all(x is None or x is gate or x is rate for x in (varying, constant)):
        found = {id(varying): summed(grad_varying, varying), id(constant): summed(grad_constant, constant)}
        return {"gate": found.get(id(gate)), "rate": found.get(id(rate))}
    product, grad = (varying, grad_varying) if constant is None else (constant, grad_constant)
    grad = summed(grad, product)
    return {"gate": summed(grad * rate.float(), gate), "rate": summed(grad * gate.float(), rate)}
