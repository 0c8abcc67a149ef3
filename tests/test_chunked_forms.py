"""Recurrences computed chunk by chunk are recognised by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from effcompile.passes import chunked
from effcompile.passes.chunked import CHUNKED
from effcompile.passes.roles import Prover

from . import model_zoo
from .recurrence_harness import Rewritten, assert_no_recurrence, assert_nothing_begun, assert_recurrence

RULES = (CHUNKED,)


@pytest.mark.parametrize(
    ("name", "length", "training"), [("mamba2", 64, False), ("mamba2", 49, True), ("falcon_h1", 40, False), ("falcon_h1", 64, True)]
)
def test_model(name: str, length: int, training: bool) -> None:
    model, _ = model_zoo.build(name)
    model.train(training)
    tokens = model_zoo.tokens(2, length)
    f = lambda ids: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    compiled = Rewritten(f, RULES)
    with torch.set_grad_enabled(training):
        mine, its = compiled(tokens), f(tokens)
        torch.testing.assert_close(mine, its)
    assert len(compiled.matches) == 2, [(r.step, r.why) for r in compiled.refusals]
    assert all(match.spec.decay == "head" for match in compiled.matches)
    if training:
        weights = [p for p in model.parameters() if p.requires_grad]
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), weights) for x in (mine, its)), strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7


def test_model_with_shifted_exponents() -> None:
    """xLSTM keeps its exponents small by maxima of each chunk."""
    model, _ = model_zoo.build("xlstm")
    model.eval()
    with torch.no_grad():
        f = lambda ids: model(input_ids=ids, use_cache=False).logits  # noqa: E731
        assert_no_recurrence(f, model_zoo.tokens(2, 64), rules=RULES, why="exponents are shifted by", step="maximum")


B, H, T, D, V, L = 2, 3, 32, 5, 6, 8
N = T // L
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {}
WRONG: dict[str, tuple[Any, str]] = {}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal under a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def arguments(*gate: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values [B, H, T, .] and logarithms of decays."""
    g = -F.softplus(normal(*(gate or (B, H, T)), seed=4)).detach()
    return normal(B, H, T, D, seed=1), normal(B, H, T, D, seed=2), normal(B, H, T, V, seed=3), g.requires_grad_()


def spelled(name: str, **fields: Any) -> Any:
    def register(f: Any) -> Any:
        FORMS[name] = f, fields
        return f

    return register


def wrong(name: str, why: str = "not the recurrence of") -> Any:
    def register(f: Any) -> Any:
        WRONG[name] = f, why
        return f

    return register


def causal(diagonal: int = 0) -> torch.Tensor:
    return torch.ones(L, L, dtype=torch.bool).tril(diagonal)


def cut(x: torch.Tensor) -> torch.Tensor:
    """[b, h, t, ...] -> [b, h, chunk, position, ...]."""
    return x.reshape(*x.shape[:2], N, L, *x.shape[3:])


PLAIN = {"operands": ("q", "k"), "decay": "none", "read": "after"}
GATED = {"operands": ("q", "k", "gate"), "decay": "head", "read": "after"}
PER_KEY = {**GATED, "decay": "key"}


# -------------------------------------------------------------------- all chunks at once


@spelled("states by a cumulative sum", **PLAIN)
def _(q, k, v, g):
    q, k, v = cut(q), cut(k), cut(v)
    states = (k.mT @ v).cumsum(2)
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], dim=2)
    return (q @ states + (q @ k.mT).tril() @ v).reshape(B, H, T, V)


@spelled("scaled within the chunks", **PLAIN)
def _(q, k, v, g):
    q, k, v = cut(q) * D**-0.5, cut(k), cut(v)
    states = (k.mT @ v).cumsum(2) - k.mT @ v
    return (q @ states + (q @ k.mT).masked_fill(~causal(), 0) @ v).flatten(2, 3)


def between(total, states):
    """The states before each chunk: sums of all before, decayed."""
    ends = torch.cat([total.new_zeros(B, H, 1), total[..., -1].cumsum(-1)], dim=-1)
    decay = (ends[..., :-1, None] - ends[..., None, 1:]).masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(-1), -torch.inf).exp()
    return torch.einsum("bhcz,bhzkv->bhckv", decay, states)


def gated(q, k, v, g, *, inside=0.0, carry=0.0, mask=causal, factor=1.0, eps=0.0):
    q, k, v, total = cut(q), cut(k), cut(v), cut(g).cumsum(-1)
    decay = (total[..., None] - total[..., None, :] + inside).masked_fill(~mask(), -torch.inf).exp()
    states = (k * (total[..., -1:] - total + carry).exp()[..., None]).mT @ v
    past = (q * total.exp()[..., None]) @ between(total, states)
    return ((q @ k.mT * decay) @ v + factor * past + eps).reshape(B, H, T, V)


@spelled("decays between all chunks", **GATED)
def _(q, k, v, g):
    return gated(q, k, v, g)


@spelled("heads third, an einsum of four", **GATED)
def _(q, k, v, g):
    q, k, v = (x.transpose(1, 2).reshape(B, N, L, H, -1) for x in (q, k, v))
    total = g.reshape(B, H, N, L).cumsum(-1)
    decay = (total[..., None] - total[..., None, :]).masked_fill(~causal(), -torch.inf).exp()
    diagonal = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", q, k, decay, v)
    states = torch.einsum("bclhn,bhcl,bclhp->bhcnp", k, (total[..., -1:] - total).exp(), v)
    past = torch.einsum("bclhn,bhcnp,bhcl->bclhp", q, between(total, states), total.exp())
    return (diagonal + past).reshape(B, T, H, V)


# -------------------------------------------------------------------- loops over chunks


@spelled("a loop over slices", **GATED)
def _(q, k, v, g):
    state, outputs = q.new_zeros(B, H, D, V), []
    for start in range(0, T, L):
        a, b, c, d = (x[:, :, start : start + L] for x in (q, k, v, g))
        total = d.cumsum(-1)
        decay = (total[..., None] - total[..., None, :]).masked_fill(~causal(), -torch.inf).exp()
        outputs.append((a @ b.mT * decay) @ c + (a * total.exp()[..., None]) @ state)
        state = state * total[..., -1, None, None].exp() + (b * (total[..., -1:] - total).exp()[..., None]).mT @ c
    return torch.cat(outputs, dim=2)


@spelled("a loop over chunk(), per key", **PER_KEY)
def _(q, k, v, g):
    g = g[..., None] * torch.linspace(0.1, 1, D)
    state, outputs = q.new_zeros(B, H, D, V), []
    for a, b, c, d in zip(*(x.chunk(N, dim=2) for x in (q, k, v, g)), strict=True):
        total = d.cumsum(2)
        outputs.append(((a * total.exp()) @ (b * (-total).exp()).mT).tril() @ c + (a * total.exp()) @ state)
        state = state * total[:, :, -1, :, None].exp() + (b * (total[:, :, -1:] - total).exp()).mT @ c
    return torch.cat(outputs, dim=2)


@spelled("a loop over chunks that are cut before, stacked", **GATED)
def _(q, k, v, g):
    q, k, v, total = cut(q), cut(k), cut(v), cut(g).cumsum(-1)
    state, outputs = q.new_zeros(B, H, D, V), []
    for n in range(N):
        t = total[:, :, n]
        decay = (t[..., None] - t[..., None, :]).exp().tril()
        outputs.append((q[:, :, n] @ k[:, :, n].mT * decay) @ v[:, :, n] + (q[:, :, n] * t.exp()[..., None]) @ state)
        state = state * t[..., -1, None, None].exp() + (k[:, :, n] * (t[..., -1:] - t).exp()[..., None]).mT @ v[:, :, n]
    return torch.stack(outputs, dim=2).reshape(B, H, T, V)


@spelled("a loop that writes into its result", **PLAIN)
def _(q, k, v, g):
    q, k, v = cut(q), cut(k), cut(v)
    result = torch.zeros_like(v)
    state = q.new_zeros(B, H, D, V)
    for n in range(N):
        result[:, :, n] = q[:, :, n] @ state + (q[:, :, n] @ k[:, :, n].mT).tril() @ v[:, :, n]
        state = state + k[:, :, n].mT @ v[:, :, n]
    return result.reshape(B, H, T, V)


def retention(q, k, v, power, last=L):
    """Chunk by chunk, `power(n)` the decay over n steps, [H, 1, 1] or as long as n."""
    i = torch.arange(L)
    within = power((i[:, None] - i).clamp(min=0)).tril()
    past, carried = power((i + 1)[:, None]), power((L - 1 - i)[:, None])
    state, outputs = q.new_zeros(B, H, q.shape[-1], V), []
    for a, b, c in zip(*(x.split(L, dim=2) for x in (q, k, v)), strict=True):
        outputs.append((a @ b.mT * within) @ c + (a * past) @ state)
        state = power(last) * state + (b * carried).mT @ c
    return torch.cat(outputs, dim=2)


@spelled("constant decays", **GATED)
def _(q, k, v, g):
    gamma = (1 - 2.0 ** (-5 - torch.arange(H))).view(H, 1, 1)
    return retention(q, k, v, lambda n: gamma**n)


@spelled("one constant decay", **GATED)
def _(q, k, v, g):
    return retention(q, k, v, lambda n: 0.9**n)


@spelled("chunks as long as keys are deep", **PLAIN)
def _(q, k, v, g):
    q, k = (F.pad(x, (0, L - D)) for x in (q, k))
    return retention(q, k, v, lambda n: n * 0 + 1.0)


@pytest.mark.parametrize("name", FORMS)
def test_spelling_is_rewritten(name: str) -> None:
    f, fields = FORMS[name]
    assert_recurrence(f, *arguments(), rules=RULES, **fields)


def test_slopes_that_meet_positions_in_several_forms() -> None:
    def f(q, k, v, slopes):
        slopes = F.softplus(slopes)[:, None, None]
        return retention(q, k, v, lambda n: torch.exp(-slopes * n))

    assert_recurrence(f, *arguments(H), rules=RULES, **GATED)


def test_last_state() -> None:
    def f(q, k, v, g):
        state, outputs = q.new_zeros(B, H, D, V), []
        for start in range(0, T, L):
            a, b, c, d = (x[:, :, start : start + L] for x in (q, k, v, g))
            total = d.cumsum(-1)
            outputs.append(
                (a @ b.mT * (total[..., None] - total[..., None, :]).exp().tril()) @ c + (a * total.exp()[..., None]) @ state
            )
            state = state * total[..., -1, None, None].exp() + (b * (total[..., -1:] - total).exp()[..., None]).mT @ c
        return torch.cat(outputs, dim=2), state

    compiled = assert_recurrence(f, *arguments(), rules=RULES, **GATED)
    assert [x.name for x in compiled.matches[0].further.values()] == ["final"]


# -------------------------------------------------------------------- near misses


@wrong("the decay one step off inside of chunks")
def _(q, k, v, g):
    return gated(q, k, v, g, inside=g.reshape(B, H, N, L)[..., None, :])


@wrong("a factor is missing")
def _(q, k, v, g):
    return gated(q, k, v, g, factor=0.999)


@wrong("nothing passes from chunk to chunk")
def _(q, k, v, g):
    return gated(q, k, v, g, factor=0.0)


@wrong("the decay within the last chunk is left out")
def _(q, k, v, g):
    return gated(q, k, v, g, carry=cut(g))


@wrong("the diagonal is left out")
def _(q, k, v, g):
    return gated(q, k, v, g, mask=lambda: causal(-1))


@wrong("a small number is added", why="linearly|at the position of the result")
def _(q, k, v, g):
    return gated(q, k, v, g, eps=1e-6)


@wrong("a decay of one in a million")
def _(q, k, v, g):
    return gated(q, k, v, g, carry=1e-6)


@wrong("another constant decay from chunk to chunk")
def _(q, k, v, g):
    return retention(q, k, v, lambda n: 0.9**n, last=L - 1)


@wrong("weights of which nothing is known", why="positions of a chunk are weighted by")
def _(q, k, v, g):
    weights = g[0, 0, :L, None] * g[0, 1, :L]
    q, k, v = cut(q), cut(k), cut(v)
    return (q @ ((k.mT @ v).cumsum(2) - k.mT @ v) + (q @ k.mT * weights) @ v).reshape(B, H, T, V)


@wrong("later positions", why="later positions")
def _(q, k, v, g):
    q, k, v = cut(q), cut(k), cut(v)
    return (q @ (k.mT @ v).sum(2, keepdim=True) + (q @ k.mT).tril() @ v).reshape(B, H, T, V)


@wrong("squared scores", why="linearly|at the position of the result")
def _(q, k, v, g):
    q, k, v = cut(q), cut(k), cut(v)
    states = (k.mT @ v).cumsum(2) - k.mT @ v
    return (q @ states + (q @ k.mT).square().tril() @ v).reshape(B, H, T, V)


@pytest.mark.parametrize("name", WRONG)
def test_near_miss_is_refused(name: str) -> None:
    f, why = WRONG[name]
    assert_no_recurrence(f, *arguments(), rules=RULES, why=why, step="proof")


def test_layers_that_are_alike_are_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = []
    original = Prover.roles
    monkeypatch.setattr(chunked, "_proved", {})
    monkeypatch.setattr(Prover, "roles", lambda self: proofs.append(self) or original(self))

    def f(q, k, v, g):
        return gated(q, k, gated(q, k, v, g), g)

    assert_recurrence(f, *arguments(), rules=RULES, count=2, **GATED)
    assert len(proofs) == 1


def test_scores_that_are_returned() -> None:
    def f(q, k, v, g):
        q, k, v = cut(q), cut(k), cut(v)
        scores = (q @ k.mT).tril()
        return (q @ ((k.mT @ v).cumsum(2) - k.mT @ v) + scores @ v).reshape(B, H, T, V), scores

    assert_no_recurrence(f, *arguments(), rules=RULES, why="also used by", step="uses")


def test_attention_is_none() -> None:
    def f(q, k, v, g):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True) + (q @ k.mT).softmax(-1) @ v
        return y.transpose(1, 2).reshape(B, T, H * V)

    assert_nothing_begun(f, *arguments(), rules=RULES)
