"""Recurrences with one decay for a head, or none, chunk by chunk.

With G the sum of the chunk's log decays up to a step, S the state at its start and D_ij = exp(G_i - G_j) for j <= i, else 0:

    O = ((q k^T) * D) V + exp(G) (q S)          S' = exp(G_C) S + k^T (exp(G_C - G) V)

Only S' of one chunk waits for the one before it. Heads that share q and k share q k^T, q S and k^T V: their columns stand side by
side.
A state that is read before its update has exp(G_i - g_i - G_j) for j < i, and the bonus on the diagonal.

The sums G are float64: a difference of two of them has a small absolute error however strong the decays are, so no decay needs a
special case. The gradient of a log decay is the sum over all pairs of steps that it lies between, added without a subtraction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from effcompile.ops.recurrence import RecurrenceSpec, empty_output

from .recurrence_blocks import LOG2_E, Block, blocks, chunk_length, load, load_logs, load_with_column, store

Tensors = Mapping[str, torch.Tensor]

_ELEMENTS = 1 << 18
"""Of a block's largest tensor: a few of them stay in a core's cache."""


@dataclass(frozen=True, kw_only=True)
class Decays:
    """The decays of one block; 1 stands for a dimension along which they do not differ.

    Attributes:
        pairs: D [m|1, B|1, Hk, g, C, C].
        read: exp(G), or exp(G - g), [m|1, B|1, Hk, g, C, 1].
        write: exp(G_C - G), of the same shape.
        whole: exp(G_C) [m|1, B|1, Hk, 1, g, 1].
    """

    pairs: torch.Tensor
    read: torch.Tensor
    write: torch.Tensor
    whole: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The operands of one block: q, k [m, B, Hk, C, Dk], values [m, B, Hk, g, C, W], bonus [m, B, Hk, g, C, Dk]."""

    q: torch.Tensor
    k: torch.Tensor
    values: torch.Tensor
    decays: Decays | None
    bonus: torch.Tensor | None


class Plan:
    """Sizes, and what of the operands every block needs."""

    def __init__(self, v: torch.Tensor, x: Tensors, logs: torch.Tensor | None, spec: RecurrenceSpec) -> None:
        self.v, self.q, self.k, self.bonus, self.spec = v, x["q"], x["k"], x.get("bonus"), spec
        self.b, self.h, self.t, _ = v.shape
        self.heads, self.dk = self.k.shape[1], self.k.shape[3]
        self.group = self.h // self.heads
        self.width = v.shape[3] + spec.normaliser
        self.dtype = torch.promote_types(v.dtype, torch.float32)
        self.logs = logs
        self.batch = self.b * self.heads
        length = chunk_length(self.dk, self.width)
        elements = self.b * self.h * length * max(self.dk, self.width, length)
        self.blocks = list(blocks(self.t, length, max(1, _ELEMENTS // max(1, elements))))

    def decays(self, block: Block) -> Decays | None:
        """Those of a block."""
        if self.logs is None:
            return None
        logs = load_logs(self.logs.expand(-1, self.h, -1, -1), block).squeeze(-1).unflatten(2, (self.heads, self.group)) * LOG2_E
        total = logs.cumsum(-1)
        read = total if self.spec.read == "after" else total - logs
        above = torch.ones(block.length, block.length, dtype=torch.bool, device=logs.device).triu(self.offset)
        exponents = (read.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(above, -torch.inf)
        last = total[..., -1:]
        return Decays(
            pairs=exponents.exp2_().to(self.dtype),
            read=read.exp2().to(self.dtype).unsqueeze(-1),
            write=(last - total).exp2_().to(self.dtype).unsqueeze(-1),
            whole=last.exp2().to(self.dtype).unsqueeze(-3),
        )

    @property
    def offset(self) -> int:
        """The first diagonal of [C, C] that is zero."""
        return 1 if self.spec.read == "after" else 0

    def values(self, block: Block) -> torch.Tensor:
        """v, with the normaliser's ones, as [m, B, Hk, g, C, W]."""
        loaded = load_with_column(self.v, 1.0, block, self.dtype) if self.spec.normaliser else load(self.v, block, self.dtype)
        return loaded.unflatten(2, (self.heads, self.group))

    def loaded(self, block: Block) -> Loaded:
        """The operands of a block."""
        bonus = None
        if self.bonus is not None:
            whole = self.bonus.expand(self.b, self.h, self.t, self.dk)
            bonus = load(whole, block, self.dtype).unflatten(2, (self.heads, self.group))
        q, k = load(self.q, block, self.dtype), load(self.k, block, self.dtype)
        return Loaded(q=q, k=k, values=self.values(block), decays=self.decays(block), bonus=bonus)

    @property
    def per_head(self) -> bool:
        """Whether heads that share q and k have different scores."""
        return self.logs is not None or self.bonus is not None

    def matrices(self, x: torch.Tensor) -> torch.Tensor:
        """[m, B, Hk, ..., C, D] as a batch of matrices [-1, C, D]."""
        return x.reshape(-1, *x.shape[-2:])

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """[m, B, Hk, g, C, W] as [m B Hk, C, g W]."""
        m, length = x.shape[0], x.shape[4]
        return x.transpose(3, 4).reshape(m * self.batch, length, self.group * self.width)

    def parted(self, x: torch.Tensor) -> torch.Tensor:
        """[m B Hk, C, g W] as a view [m, B, Hk, g, C, W]."""
        return x.view(-1, self.b, self.heads, x.shape[1], self.group, self.width).transpose(3, 4)

    def states(self, chunks: int) -> torch.Tensor:
        """Room for the states at the borders of so many chunks, [m + 1, B, Hk, Dk, g, W]."""
        return self.v.new_empty((chunks + 1, self.b, self.heads, self.dk, self.group, self.width), dtype=self.dtype)

    def columns(self, states: torch.Tensor) -> torch.Tensor:
        """[m, B, Hk, Dk, g, W] as [m B Hk, Dk, g W]."""
        return states.view(-1, self.dk, self.group * self.width)

    def split(self, state: torch.Tensor) -> torch.Tensor:
        """A state [B, H, Dk, W] as a view [B, Hk, Dk, g, W]."""
        return state.unflatten(1, (self.heads, self.group)).transpose(2, 3)


def forward(
    v: torch.Tensor, x: Tensors, logs: torch.Tensor | None, spec: RecurrenceSpec, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, the normaliser and the last state.

    Args:
        x: the operands by name.
        logs: log decays [B|1, H|1, T|1, 1], below a bound at which their sum over a chunk would overflow; None for no decay.
    """
    plan = Plan(v, x, logs, spec)
    out = empty_output(v, spec, layout)
    normaliser = v.new_empty(v.shape[:3] if spec.normaliser else (0,), dtype=plan.dtype)
    final = v.new_empty((plan.b, plan.h, plan.dk, plan.width), dtype=plan.dtype)
    plan.split(final).copy_(plan.split(x["initial"])) if "initial" in x else final.zero_()
    for block in plan.blocks:
        x_block = plan.loaded(block)
        states = plan.states(block.chunks)
        states[0] = plan.split(final)
        advance(states, x_block.k, x_block.values, x_block.decays, plan)
        plan.split(final).copy_(states[-1])
        found = _read(x_block, states[:-1], plan).flatten(2, 3)
        store(found[..., : v.shape[3]], out, block)
        if spec.normaliser:
            store(found[..., v.shape[3] :], normaliser.unsqueeze(-1), block)
    return out, normaliser, final


def advance(states: torch.Tensor, k: torch.Tensor, values: torch.Tensor, decays: Decays | None, plan: Plan) -> None:
    """Fill states[1:] from states[0]."""
    written = values if decays is None else values * decays.write
    torch.bmm(plan.matrices(k).mT, plan.joined(written), out=plan.columns(states[1:]))
    chain(states, decays)


def chain(states: torch.Tensor, decays: Decays | None, *, reverse: bool = False) -> None:
    """Add to each state, in place, the decayed one before it (in reverse, after it)."""
    order = -1 if reverse else 1
    ordered = states.unbind(0)[::order]
    if decays is None:
        for entering, state in zip(ordered, ordered[1:], strict=False):
            state.add_(entering)
        return
    factors = decays.whole.expand(len(ordered) - 1, *decays.whole.shape[1:]).unbind(0)[::order]
    for entering, state, factor in zip(ordered, ordered[1:], factors, strict=False):
        state.addcmul_(entering, factor)


def scores_of(x: Loaded, plan: Plan) -> torch.Tensor:
    """(q k^T) * D without a bonus: [m, B, Hk, g|1, C, C]."""
    length = x.q.shape[3]
    products = torch.bmm(plan.matrices(x.q), plan.matrices(x.k).mT).view(*x.q.shape[:3], 1, length, length)
    return products.tril_(plan.offset - 1) if x.decays is None else products * x.decays.pairs


def with_bonus(scores: torch.Tensor, x: Loaded, plan: Plan) -> torch.Tensor:
    """`scores_of`, which may be overwritten, with q . (bonus * k) on the diagonal."""
    if x.bonus is None:
        return scores
    if scores.shape[3] != plan.group:
        scores = scores.repeat(1, 1, 1, plan.group, 1, 1)
    scores.diagonal(dim1=-2, dim2=-1).copy_(((x.q * x.k).unsqueeze(3) * x.bonus).sum(-1))
    return scores


def weighted(weights: torch.Tensor, values: torch.Tensor, plan: Plan) -> torch.Tensor:
    """weights [m, B, Hk, g|1, C, C] @ values [m, B, Hk, g, C, W]."""
    if plan.per_head:
        return torch.bmm(plan.matrices(weights), plan.matrices(values)).view(values.shape)
    return plan.parted(torch.bmm(plan.matrices(weights), plan.joined(values)))


def _read(x: Loaded, starts: torch.Tensor, plan: Plan) -> torch.Tensor:
    """What q reads in each step: [m, B, Hk, g, C, W]."""
    inside = weighted(with_bonus(scores_of(x, plan), x, plan), x.values, plan)
    carried = plan.parted(torch.bmm(plan.matrices(x.q), plan.columns(starts)))
    return inside.add_(carried) if x.decays is None else inside.addcmul_(carried, x.decays.read)
