"""Gradients of `recurrence_delta`, chunk by chunk from the last to the first.

With S the state at a chunk's start, dS' the gradient of that at its end, M = reads(q, w), N = erasures(a, w), T = (I - N)^-1 and
W = T (a * exp E):

    dU = M^T dO + (w * exp(G_C - G)) dS'       Y = T^T dU       dS = exp(G_C) * dS' + (q * exp G)^T dO + W^T dU
    dM = dO U^T       dN = Y U^T               dV = Y
    dq = dO S^T * exp G + its share of dM      da = Y S^T * exp E + its share of dN
    dw = U dS'^T * exp(G_C - G) + its shares of dM and dN

Of dS, W^T (w * exp(G_C - G)) dS' alone waits for the chunk after. Further keys k give dM' = dO V^T, dP = Y V^T and
dV = erasures(a, k)^T Y + reads(q, k)^T dO + (k * exp(G_C - G)) dS'.

The log decay of step t stands in the pairs that t lies between, in all reads and erasures of S from t on, in all writes into S'
before t, and in S itself on its way to S'. Its gradient adds these up. beta is in a = -beta * erase and in V = beta * v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from effcompile.ops.recurrence import RecurrenceSpec

from .recurrence_blocks import Block, earlier_sum, later_sum, load, store
from .recurrence_delta import Chunks, Plan, Transform, advance, transform
from .recurrence_keys import matmul

Tensors = Mapping[str, torch.Tensor]


def backward(
    grad: torch.Tensor | None, grad_final: torch.Tensor | None,
    v: torch.Tensor, x: Tensors, logs: torch.Tensor | None, spec: RecurrenceSpec, *, single: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The gradients of v, of the operands and of `logs` [B, H, T, Dk|1], by name, in the dtype of the computation."""
    plan = Plan(v, x, logs, spec, single=single)
    found = _room(plan, logs)
    later = v.new_zeros((plan.b, plan.h, plan.dk, plan.width), dtype=plan.dtype)
    if grad_final is not None:
        later.copy_(grad_final)
    whole = v.new_zeros(()).expand(v.shape) if grad is None else grad
    for block, start in zip(reversed(plan.blocks), reversed(_entries(plan)), strict=True):
        later = _backward_block(load(whole, block, plan.dtype), later, start, plan, block, found)
    if "beta" in found:
        found["beta"] = found["beta"].squeeze(-1)
    for name in ("q", "k", "erase", "write"):
        if name in found and x[name].shape[1] != plan.h:
            found[name] = found[name].unflatten(1, (x[name].shape[1], -1)).sum(2)
    return found | ({"initial": later.clone()} if "initial" in x else {})


def _room(plan: Plan, logs: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """For gradients, [B, H, T, D] each."""
    widths = {"v": plan.width, "q": plan.dk, "k": plan.dk}
    widths |= {name: plan.dk for name in ("erase", "write") if name in plan.x}
    widths |= {"beta": 1} if "beta" in plan.x else {}
    widths |= {} if logs is None else {"logs": logs.shape[3]}
    return {name: plan.v.new_empty((plan.b, plan.h, plan.t, width), dtype=plan.dtype) for name, width in widths.items()}


def _entries(plan: Plan) -> list[torch.Tensor]:
    """The state at the start of each block."""
    state = plan.v.new_zeros((plan.b, plan.h, plan.dk, plan.width), dtype=plan.dtype)
    if "initial" in plan.x:
        state.copy_(plan.x["initial"])
    entries = [state]
    for block in plan.blocks[:-1]:
        chunks, states = plan.chunks(block), plan.states(block.chunks)
        states[0] = entries[-1]
        advance(states, transform(chunks), chunks)
        entries.append(states[-1].clone())
    return entries[: len(plan.blocks)]


@dataclass(frozen=True, kw_only=True)
class Borders:
    """The states at the starts of a block's chunks and the gradients at their ends, [m, B, H, Dk, Dv]."""

    starts: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Those of one block's operands, [m, B, H, C, D]; `key` is None where it is `write`."""

    q: torch.Tensor
    a: torch.Tensor
    write: torch.Tensor
    key: torch.Tensor | None
    values: torch.Tensor
    logs: torch.Tensor | None


def _backward_block(
    d_out: torch.Tensor, later: torch.Tensor, start: torch.Tensor, plan: Plan, block: Block, found: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Write one block's gradients; returns that of the state at its start."""
    x = plan.chunks(block, for_gradients=True)
    made, states = transform(x), plan.states(block.chunks)
    states[0] = start
    columns = advance(states, made, x)
    reads, writes = x.decays.reads.products(x.q, x.write), x.write * x.decays.write
    d_columns = matmul(reads.mT, d_out)
    d_states = torch.empty_like(states)
    d_states[:-1] = matmul((x.q * x.decays.read).mT, d_out).add_(matmul(made.through.mT, d_columns))
    d_states[-1] = later
    _chain(d_states, made, writes, x)
    borders = Borders(starts=states[:-1], ends=d_states[1:])
    d_columns += matmul(writes, borders.ends)
    solved = torch.linalg.solve_triangular(made.lower.mT, d_columns, upper=True, unitriangular=True)
    gradients = _through_states(d_out, solved, columns, borders, x, made, with_logs="logs" in found)
    _through_pairs(d_out, solved, columns, reads, made, x, gradients)
    _store(gradients, x, block, found)
    return d_states[0]


def _chain(d_states: torch.Tensor, made: Transform, writes: torch.Tensor, x: Chunks) -> None:
    """Add to each gradient of a state, in place, what comes from the one after it."""
    batch = lambda t: t.view(t.shape[0], -1, *t.shape[-2:])  # noqa: E731
    through, written, all_states = batch(made.through).mT, batch(writes), batch(d_states)
    wholes = x.decays.whole.expand(len(written), *x.decays.whole.shape[1:])
    for c in reversed(range(len(written))):
        d_states[c].addcmul_(d_states[c + 1], wholes[c])
        all_states[c].baddbmm_(through[c], torch.bmm(written[c], all_states[c + 1]))


def _through_states(
    d_out: torch.Tensor, solved: torch.Tensor, columns: torch.Tensor, borders: Borders, x: Chunks, made: Transform,
    *, with_logs: bool,
) -> Gradients:  # fmt: skip
    """What comes from the states at the chunks' borders, and from V."""
    decays = x.decays
    to_end = lambda t: matmul(t, borders.ends.mT).mul_(decays.write)  # noqa: E731
    dq = matmul(d_out, borders.starts.mT).mul_(decays.read)
    da = matmul(solved, borders.starts.mT).mul_(decays.erase)
    dw = to_end(columns)
    dk, dv = None, solved
    if x.key is not None and made.crossed is not None:
        dk = to_end(x.values)
        dv = matmul(made.crossed.mT, solved).add_(matmul(x.key * decays.write, borders.ends))
        dv += matmul(decays.reads.products(x.q, x.key).mT, d_out)
    d_logs = None
    if with_logs:
        over = lambda t: t if decays.read.shape[-1] != 1 else t.sum(-1, keepdim=True)  # noqa: E731
        d_logs = later_sum(over(x.q * dq), inclusive=True)
        d_logs += later_sum(over(x.a * da), inclusive=decays.erasures.inclusive)
        d_logs += earlier_sum(over(x.write * dw if x.key is None else x.write * dw + x.key * dk))
        d_logs += over((borders.ends * borders.starts).sum(-1).unsqueeze(-2) * decays.whole.mT)
    return Gradients(q=dq, a=da, write=dw, key=dk, values=dv, logs=d_logs)


def _through_pairs(
    d_out: torch.Tensor, solved: torch.Tensor, columns: torch.Tensor, reads: torch.Tensor, made: Transform, x: Chunks, to: Gradients
) -> None:
    """Add what comes from the products inside the chunks."""
    of_reads, of_erasures, a = x.decays.reads, x.decays.erasures, x.a
    of_reads.backward(matmul(d_out, columns.mT), reads, x.q, x.write, to.q, to.write, to.logs)
    of_erasures.backward(matmul(solved, columns.mT), -made.lower, a, x.write, to.a, to.write, to.logs)
    if x.key is not None and to.key is not None and made.crossed is not None:
        values = x.values
        products = of_reads.products(x.q, x.key)
        of_reads.backward(matmul(d_out, values.mT), products, x.q, x.key, to.q, to.key, to.logs)
        of_erasures.backward(matmul(solved, values.mT), made.crossed, a, x.key, to.a, to.key, to.logs)


def _store(gradients: Gradients, x: Chunks, block: Block, found: dict[str, torch.Tensor]) -> None:
    """Write them to their steps, as those of the operands themselves."""
    beta = 1.0 if x.beta is None else x.beta
    named = {"q": gradients.q, "v": gradients.values * beta}
    d_erase = gradients.a * -beta
    dk = gradients.write if gradients.key is None else gradients.key
    if "erase" in found:
        named["erase"] = d_erase
    else:
        dk = dk + d_erase
    named["k"] = dk
    if "write" in found:
        named["write"] = gradients.write
    if "beta" in found:
        named["beta"] = (gradients.values * x.v).sum(-1, keepdim=True) - (gradients.a * x.erase).sum(-1, keepdim=True)
    if gradients.logs is not None:
        named["logs"] = gradients.logs
    for name, gradient in named.items():
        store(gradient, found[name], block)
