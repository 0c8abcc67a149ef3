"""A recurrence, forward and backward, whichever template its chunks are of: host functions of its kernel file."""

from __future__ import annotations

import torch

from .launching import begin, tile_count, width_of
from .recurrence_gates import BEFORE, BESIDE, BONUS, GATED, NORMALISED, VECTOR
from .recurrence_hosts import launch, plan, strided
from .recurrence_launches import TILES, backward_in_chunks, forward_in_chunks
from .recurrence_state_kernels import step_kernel

BY_VALUE = False  # the decay is one for each value
OUT_DTYPE = torch.bfloat16
FEW = 8  # steps up to which each is taken by itself
STEP = {"BLOCK_M": 32, "num_warps": 4}
ORDERS = {"bhtd": (0, 1, 2), "bthd": (0, 2, 1), "tbhd": (2, 0, 1)}


def along_state(x, k, v):
    """A gate or rate [B, H, T, Dk, Dv] as [B, H, T, D] along the dimension in which the decay differs, D = 1 if in none."""
    if x is None:
        return None
    width = (v if BY_VALUE else k).shape[-1] if VECTOR else 1
    return (x[..., 0, :] if BY_VALUE else x[..., 0]).expand(*v.shape[:3], width)


def step(start, q, k, v, gates, out, normaliser, initial, final, bonus):
    """Few steps, one by one."""
    gate, rate = gates
    batch, heads, t, m = v.shape
    n = k.shape[-1]
    values = {
        "Q": q, "K": k, "V": v, "Out": out, "Normaliser": normaliser, "Gate": gate, "Rate": rate, "Bonus": bonus,
        "Initial": initial, "Final": final, "GROUP_Q": heads // q.shape[1], "GROUP_K": heads // k.shape[1], "H": heads, "T": t,
        **strided("q", "bhtd", q), **strided("k", "bhtd", k), **strided("v", "bhtd", v), **strided("o", "bhtd", out),
        **strided("g", "bhtd", gate), **strided("r", "bhtd", rate), **strided("u", "bhtd", bonus),
        **strided("i", "bhnm", initial), **strided("f", "bhnm", final),
    }  # fmt: skip
    launch(
        start, step_kernel, (batch * heads * tile_count(m, STEP["BLOCK_M"]), 1, 1), values,
        BY_COLUMN=BY_VALUE, EXTRA=int(NORMALISED), START=initial is not None, N=n, M=m, BLOCK_N=width_of(n), **STEP,
    )  # fmt: skip


def empty_like_order(v, order):
    """[B, H, T, D] in OUT_DTYPE, in memory ordered as `order` says."""
    order = ORDERS[order]
    out = torch.empty([v.shape[d] for d in order] + [v.shape[3]], dtype=OUT_DTYPE, device=v.device)
    return out.permute(*(order.index(d) for d in range(3)), 3)


# --------------------------------------------------------------------------------------------------------------------- Operation


def choice(v, k, tile=None):
    """`(tile, segments)`: the position in TILES, and into how many parts time is cut."""
    width = (k if BY_VALUE else v).shape[-1]
    found, segments = plan(TILES, v.shape[0] * v.shape[1], width, v.shape[2], v.device, tile)
    return TILES.index(found), segments


def forward(v, q, k, *, gate=None, rate=None, bonus=None, initial=None, layout="bhtd", segments=None, tile=None, final=None):
    """`(out, normaliser, final)` of v [B, H, T, Dv], q, k [B, Hk, T, Dk], gate, rate [B, H, T, Dk, Dv], bonus [B, H, T, Dk], of any
    strides, with 1 where they do not differ; normaliser [B, H, T], empty if there is none, and final, like initial, in float32.

    `segments`: into how many parts time is cut, `tile`: which of TILES; chosen from the sizes if not given. `final`: where the last
    state is written; for up to FEW steps that may be `initial`.
    """
    batch, heads, t, d_v = v.shape
    if tile is None or segments is None:
        tile, parts = choice(v, k, tile)
        segments = segments or parts
    out = empty_like_order(v, layout)
    normaliser = torch.empty((batch, heads, t) if NORMALISED else (0,), dtype=torch.float32, device=v.device)
    if final is None:
        final = torch.empty((batch, heads, k.shape[-1], d_v + NORMALISED), dtype=torch.float32, device=v.device)

    def run(start):
        gates = along_state(gate, k, v), along_state(rate, k, v)
        wide_bonus = None if bonus is None else bonus.expand(batch, heads, t, -1)
        if t <= FEW:
            step(start, q, k, v, gates, out, normaliser, initial, final, wide_bonus)
        else:
            forward_in_chunks(start, q, k, v, gates, out, normaliser, initial, final, wide_bonus, segments, tile)

    begin(run, v, q, k, gate, rate, bonus, initial, out, normaliser, final, segments, tile)
    if BESIDE:
        out += own_weight(q, k, bonus, heads) * v
    return out, normaliser, final


def gathered(x, heads):
    """[B, H, T, D] summed over the heads that share one of `heads`."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def own_weight(q, k, bonus, heads):
    """q . (bonus * k), [B, H, T, 1]."""
    return ((q.float() * k.float()).repeat_interleave(heads // k.shape[1], 1) * bonus).sum(-1, keepdim=True)


def own_part(grad, q, k, v, bonus):
    """The gradient of the bonus: q k (do . v), summed over what it does not differ in."""
    heads = v.shape[1]
    weight = (grad.float() * v.float()).sum(-1, keepdim=True)
    both = (q.float() * k.float()).repeat_interleave(heads // k.shape[1], 1)
    return (both * weight).sum_to_size(bonus.shape).to(bonus.dtype)


def decay_gradients(slopes, gate, rate):
    """Of gate and rate, from that of the logarithm [B, H, T, D]."""
    slopes = slopes[..., None, :] if BY_VALUE else slopes[..., None]
    if rate is None:
        return slopes.sum_to_size(gate.shape).to(gate.dtype), None
    by_gate = (slopes * rate.float()).sum_to_size(gate.shape).to(gate.dtype)
    return by_gate, (slopes * gate.float()).sum_to_size(rate.shape).to(rate.dtype)


def backward(
    grad, grad_normaliser, grad_final, v, q, k, *, gate=None, rate=None, bonus=None, initial=None, segments=None, tile=None,
    weigh=True,
):  # fmt: skip
    """Gradients `{"v": ..., "q": ..., "k": ..., ...}` of each given operand of `forward`; gradients of results may be None.

    `weigh`: whether those of gate and rate are wanted.
    """
    batch, heads, t, d_v = v.shape
    device = v.device
    if tile is None or segments is None:
        tile, parts = choice(v, k, tile)
        segments = segments or parts
    grad = torch.zeros_like(v) if grad is None else grad.to(v.dtype)
    along_ones = grad_normaliser
    if NORMALISED and grad_normaliser is None:
        along_ones = torch.zeros((1, 1, 1), device=device).expand(batch, heads, t)
    grouped = k.shape[1] != heads
    empty = lambda x, dtype=None: torch.empty((batch, heads, t, x.shape[-1]), dtype=dtype or x.dtype, device=device)  # noqa: E731
    dv = torch.empty_like(v)
    dq, dk = (empty(x, torch.float32) if grouped else torch.empty_like(x) for x in (q, k))
    d_initial = None if initial is None else torch.empty((batch, heads, *initial.shape[2:]), dtype=torch.float32, device=device)
    slopes = None
    if GATED:
        if weigh:
            width = (d_v if BY_VALUE else k.shape[-1]) if VECTOR else 1
            slopes = torch.empty((batch, heads, t, width), dtype=torch.float32, device=device)

    def run(start):
        gates = along_state(gate, k, v), along_state(rate, k, v)
        wide_bonus = None if bonus is None else bonus.expand(batch, heads, t, -1)
        backward_in_chunks(
            start, grad, along_ones, grad_final, v, q, k, gates, wide_bonus, initial, dv, dq, dk, d_initial, slopes, segments, tile
        )  # fmt: skip

    begin(run, grad, v, q, k, gate, rate, bonus, initial, grad_final, along_ones, dq, dk, dv, d_initial, slopes, segments, tile)
    if BESIDE:
        dv += own_weight(q, k, bonus, heads) * grad
        weighted = bonus * (grad.float() * v.float()).sum(-1, keepdim=True)
        group = heads // k.shape[1]
        dq += weighted * k.repeat_interleave(group, 1)
        dk += weighted * q.repeat_interleave(group, 1)
    found = {"v": dv, "q": dq, "k": dk}
    if grouped:
        found |= {"q": gathered(dq, q.shape[1]).to(q.dtype), "k": gathered(dk, k.shape[1]).to(k.dtype)}
    if GATED:
        found["gate"], found["rate"] = decay_gradients(slopes, gate, rate) if weigh else (None, None)
    if BONUS or BESIDE:
        found["bonus"] = own_part(grad, q, k, v, bonus)
    if initial is not None:
        found["initial"] = first_decay(d_initial, gate, rate).to(initial.dtype)
    return found


def first_decay(d_initial, gate, rate):
    """The gradient of the initial state, from that of the state after the first decay where that is what the chunks find."""
    if not GATED or BEFORE or VECTOR:
        return d_initial
    first = gate[:, :, 0].float() if rate is None else gate[:, :, 0].float() * rate[:, :, 0].float()
    return d_initial * first.exp()
