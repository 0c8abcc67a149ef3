"""One gated linear attention written four ways, in plain PyTorch: effarch makes the same operation of each.

python examples/linear_attention.py

S_t = exp(g_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t          (Mamba-2, simple GLA; q, k [B, H, T, K], v [B, H, T, V], g [B,
H, T])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

import effcompile

BATCH, HEADS, TOKENS, KEY, VALUE, CHUNK = 1, 4, 512, 32, 64, 64


def as_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The definition, one token after the other."""
    state = q.new_zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[2]):
        state = g[:, :, t].exp()[..., None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(outputs, 2)


def as_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The same with torch's scan, which Dynamo does not unroll."""

    def step(state: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q, k, v, g = x
        state = g.exp()[..., None, None] * state + torch.einsum("bhk,bhv->bhkv", k, v)
        return state, torch.einsum("bhk,bhkv->bhv", q, state)

    state = q.new_zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3])
    return scan(step, state, tuple(x.movedim(2, 0) for x in (q, k, v, g)))[1].movedim(0, 2)


def as_product(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The parallel form: attention whose weights are decays, quadratic in the number of tokens."""
    total = g.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).exp().tril()
    return (q @ k.mT * decay) @ v


def as_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The parallel form within chunks, the recurrence between them."""
    q, k, v, g = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v, g))
    total = g.cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    inside = (q @ k.mT * decay) @ v
    written = (k * (total[..., -1:] - total).exp()[..., None]).mT @ v
    state = torch.zeros_like(written[:, :, 0])
    outputs = []
    for n in range(q.shape[2]):
        outputs.append(inside[:, :, n] + (q[:, :, n] * total[:, :, n].exp()[..., None]) @ state)
        state = total[:, :, n, -1].exp()[..., None, None] * state + written[:, :, n]
    return torch.cat(outputs, 2)


def inputs(device: str) -> tuple[Tensor, ...]:
    """q, k, v and the logarithm of the decay."""
    q, k = (torch.randn(BATCH, HEADS, TOKENS, KEY, device=device) * KEY**-0.25 for _ in range(2))
    v = torch.randn(BATCH, HEADS, TOKENS, VALUE, device=device)
    return q, k, v, torch.nn.functional.logsigmoid(torch.randn(BATCH, HEADS, TOKENS, device=device) + 3)


def main() -> None:
    """Explain each way, run it compiled, compare with the definition in float64."""
    torch.manual_seed(0)
    arguments = inputs("cuda" if torch.cuda.is_available() else "cpu")
    exact = as_loop(*(x.double() for x in arguments))
    ways: tuple[Callable[..., Tensor], ...] = (as_loop, as_scan, as_product, as_chunks)
    specs = set()
    for way in ways:
        report = effcompile.explain(way, *arguments)
        print(f"== {way.__name__}")
        print(report)
        specs |= {str(sorted(d.spec.items())) for d in report.decisions if d.outcome == "rewritten"}
        got = torch.compile(way, backend="effarch")(*arguments)
        error = float((got - exact).norm() / exact.norm())
        print(f"relative error against float64: {error:.1e}\n")
        if not error < 1e-5:
            raise SystemExit(f"{way.__name__}: the compiled function differs from the definition")
    print(f"{len(ways)} ways, {len(specs)} operation{'s' if len(specs) != 1 else ''}")


if __name__ == "__main__":
    main()
