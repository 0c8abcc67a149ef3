"""Delta rules, chunk by chunk.

With a = -beta * erase, V = beta * v, w where a step writes what it erases, and S the state at a chunk's start (G and E as
`recurrence_delta_pairs` says), the columns that the chunk writes at w are U:

    U = V + N U + (a * exp E) S          N = erasures(a, w), strictly lower

where the keys are w; where they are further keys k, V is written there and read by what erases: erasures(a, k) V stands for V.
Both parts of U = T V + W S, with T = (I - N)^-1 and W = T (a * exp E), come from one triangular solution, for all chunks of a
block. Only two products of a chunk wait for the chunk before it:

    U = T V + W S          S' = exp(G_C) * S + (w * exp(G_C - G))^T U [+ (k * exp(G_C - G))^T V]
    O = (q * exp G) S + reads(q, w) U [+ reads(q, k) V]

Chunks of one step are the definition: decays that let the state grow take them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from effcompile.ops.recurrence import RecurrenceSpec, empty_output

from .recurrence_blocks import Block, blocks, chunk_length, load, load_logs, store
from .recurrence_delta_pairs import Decays, decays_of
from .recurrence_keys import matmul

Tensors = Mapping[str, torch.Tensor]

_ELEMENTS = 1 << 18
"""Of a block's largest tensor: a few of them stay in a core's cache."""


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """The operands of one block, [m, B, H, C, D]; `key` is None where it is `write`."""

    q: torch.Tensor
    key: torch.Tensor | None
    write: torch.Tensor
    erase: torch.Tensor
    beta: torch.Tensor | None
    v: torch.Tensor
    decays: Decays

    @property
    def a(self) -> torch.Tensor:
        """-beta * erase."""
        return -self.erase if self.beta is None else -self.beta * self.erase

    @property
    def values(self) -> torch.Tensor:
        """beta * v."""
        return self.v if self.beta is None else self.beta * self.v


@dataclass(frozen=True, kw_only=True)
class Transform:
    """U = own + through S.

    Attributes:
        lower: I - N, [m, B, H, C, C]; its diagonal is not looked at.
        through: W, [m, B, H, C, Dk].
        own: T V, [m, B, H, C, Dv].
        crossed: erasures(a, k), where keys and `write` differ.
    """

    lower: torch.Tensor
    through: torch.Tensor
    own: torch.Tensor
    crossed: torch.Tensor | None


class Plan:
    """Sizes, and what of the operands every block needs. Shared heads are repeated, block by block."""

    def __init__(self, v: torch.Tensor, x: Tensors, logs: torch.Tensor | None, spec: RecurrenceSpec, *, single: bool) -> None:
        self.v, self.x, self.spec = v, x, spec
        self.b, self.h, self.t, self.width = v.shape
        self.dk = x["k"].shape[3]
        self.dtype = torch.promote_types(v.dtype, torch.float32)
        self.logs = v.new_zeros((1, 1, 1, 1)) if logs is None else logs
        length = 1 if single else chunk_length(self.dk, self.width)
        elements = self.b * self.h * max(length, 1) * max(self.dk, self.width, length)
        elements = max(elements, self.b * self.h * self.dk * self.width)
        self.blocks = list(blocks(self.t, length, max(1, _ELEMENTS // max(1, elements)), power_of_two=True))

    def part(self, name: str, block: Block) -> torch.Tensor:
        """An operand's steps, for every head: [m, B, H, C, D]."""
        loaded = load(self.x[name], block, self.dtype)
        return loaded if loaded.shape[2] == self.h else loaded.repeat_interleave(self.h // loaded.shape[2], dim=2)

    def chunks(self, block: Block, *, for_gradients: bool = False) -> Chunks:
        """The operands of a block."""
        k = self.part("k", block)
        write = self.part("write", block) if "write" in self.x else k
        beta = None
        if "beta" in self.x:
            beta = load(self.x["beta"].expand(self.b, self.h, self.t).unsqueeze(-1), block, self.dtype)
        return Chunks(
            q=self.part("q", block),
            key=None if write is k else k,
            write=write,
            erase=self.part("erase", block) if "erase" in self.x else k,
            beta=beta,
            v=load(self.v, block, self.dtype),
            decays=decays_of(load_logs(self.logs, block), self.spec, self.dtype, for_gradients=for_gradients),
        )

    def states(self, chunks: int) -> torch.Tensor:
        """Room for the states at the borders of so many chunks, [m + 1, B, H, Dk, Dv]."""
        return self.v.new_empty((chunks + 1, self.b, self.h, self.dk, self.width), dtype=self.dtype)


def forward(
    v: torch.Tensor, x: Tensors, logs: torch.Tensor | None, spec: RecurrenceSpec, layout: str, *, single: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, an empty normaliser and the last state.

    Args:
        x: the operands by name.
        logs: log decays [B|1, H|1, T|1, Dk|1]; None for no decay.
        single: whether each step is a chunk; without, the decays are below a bound at which their sum over a chunk would overflow.
    """
    plan = Plan(v, x, logs, spec, single=single)
    out = empty_output(v, spec, layout)
    final = v.new_zeros((plan.b, plan.h, plan.dk, plan.width), dtype=plan.dtype)
    if "initial" in x:
        final.copy_(x["initial"])
    for block in plan.blocks:
        chunks = plan.chunks(block)
        states = plan.states(block.chunks)
        states[0] = final
        columns = advance(states, transform(chunks), chunks)
        final.copy_(states[-1])
        found = matmul(chunks.q * chunks.decays.read, states[:-1])
        found += matmul(chunks.decays.reads.products(chunks.q, chunks.write), columns)
        if chunks.key is not None:
            found += matmul(chunks.decays.reads.products(chunks.q, chunks.key), chunks.values)
        store(found, out, block)
    return out, v.new_empty((0,), dtype=plan.dtype), final


def transform(x: Chunks) -> Transform:
    """What the columns U are made of, for all chunks of a block."""
    a, values = x.a, x.values
    lower = x.decays.erasures.products(a, x.write).neg_()
    crossed = None if x.key is None else x.decays.erasures.products(a, x.key)
    right = values if crossed is None else matmul(crossed, values)
    both = torch.cat([a * x.decays.erase, right], dim=-1)
    solved = torch.linalg.solve_triangular(lower, both, upper=False, unitriangular=True)
    dk = a.shape[-1]
    return Transform(lower=lower, through=solved[..., :dk].contiguous(), own=solved[..., dk:].contiguous(), crossed=crossed)


def advance(states: torch.Tensor, made: Transform, x: Chunks) -> torch.Tensor:
    """Fill states[1:] from states[0]; returns U [m, B, H, C, Dv]."""
    batch = lambda t: t.view(t.shape[0], -1, *t.shape[-2:])  # noqa: E731
    columns, through, all_states = batch(made.own), batch(made.through), batch(states)
    writes = batch(x.write * x.decays.write).mT
    if x.key is not None:
        states[1:] = matmul((x.key * x.decays.write).mT, x.values)
    for c, whole in enumerate(x.decays.whole.expand(len(columns), *x.decays.whole.shape[1:])):
        columns[c].baddbmm_(through[c], all_states[c])
        if x.key is None:
            torch.mul(states[c], whole, out=states[c + 1])
        else:
            states[c + 1].addcmul_(states[c], whole)
        all_states[c + 1].baddbmm_(writes[c], columns[c])
    return made.own
