"""Linear recurrences as their papers have them, one step each, and the ways to run a step over a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.nn.functional import logsigmoid, softplus

B, H, T, K, V = 2, 3, 12, 4, 5


@dataclass(frozen=True)
class Form:
    """One system.

    Attributes:
        step: `step(states, inputs, weights) -> (states, output)`.
        states: shapes of the states, with their first value.
        inputs: makers of the sequences [B, T, ...].
        weights: makers of what is the same in all steps.
        spec: what the recurrence must be recognised as, state by state.
        last: whether the last states are asked for.
    """

    step: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Tensor]]
    states: tuple[tuple[tuple[int, ...], float], ...]
    inputs: tuple[Callable[[], Tensor], ...]
    weights: tuple[Callable[[], Tensor], ...] = ()
    spec: tuple[dict[str, Any], ...] = field(default=())
    last: bool = True


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(B, T, *shape)


def log_decay(*shape: int) -> Callable[[], Tensor]:
    return lambda: logsigmoid(torch.randn(B, T, *shape) + 2)


def weight(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape) * 0.5


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def _read(q: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("bhk,bhkv->bhv", q, state)


def linear_attention(s: Any, x: Any, w: Any) -> Any:
    q, k, v = x
    state = s[0] + _outer(k, v)
    return (state,), _read(q, state)


def normalised_linear_attention(s: Any, x: Any, w: Any) -> Any:
    q, k, v = (torch.nn.functional.elu(x[0]) + 1, torch.nn.functional.elu(x[1]) + 1, x[2])
    state, total = s[0] + _outer(k, v), s[1] + k
    return (state, total), _read(q, state) / ((q * total).sum(-1, keepdim=True) + 1e-6)


def retention(s: Any, x: Any, w: Any) -> Any:
    q, k, v = x
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype))
    state = gamma[:, None, None] * s[0] + k.unsqueeze(-1) @ v.unsqueeze(-2)
    return (state,), (q.unsqueeze(-2) @ state).squeeze(-2)


def constant_decay(s: Any, x: Any, w: Any) -> Any:
    q, k, v = x
    state = 0.9 * s[0] + torch.einsum("bhk,bhv->bhkv", k, v)
    return (state,), torch.matmul(q[:, :, None], state)[:, :, 0]


def mamba2(s: Any, x: Any, w: Any) -> Any:
    value, dt, b, c = x  # [B, H, V], [B, H], [B, K], [B, K]
    rate, bias, skip = w
    dt = softplus(dt + bias)
    decay = torch.exp(-dt * rate.exp())
    state = s[0] * decay[..., None, None] + (dt[..., None] * value)[..., None] * b[:, None, None, :]
    return (state,), (state * c[:, None, None, :]).sum(-1) + skip[:, None] * value


def gla(s: Any, x: Any, w: Any) -> Any:
    q, k, v, g = x
    state = s[0] * g.exp().unsqueeze(-1) + _outer(k, v)
    return (state,), _read(q, state)


def hgrn2(s: Any, x: Any, w: Any) -> Any:
    q, f, v = x
    forget = torch.sigmoid(f)
    state = forget.unsqueeze(-1) * s[0] + _outer(1 - forget, v)
    return (state,), _read(q, state)


def rwkv6(s: Any, x: Any, w: Any) -> Any:
    r, k, v, decay = x
    kv = _outer(k, v)
    out = _read(r, s[0] + w[0][:, :, None] * kv)
    return (s[0] * torch.exp(-torch.exp(decay)).unsqueeze(-1) + kv,), out


def exclusive(s: Any, x: Any, w: Any) -> Any:
    q, k, v = x
    return (0.8 * s[0] + _outer(k, v),), _read(q, s[0])


def value_decay(s: Any, x: Any, w: Any) -> Any:
    q, k, g = x
    state = g.exp()[..., None, :] * s[0] + _outer(k, 1 - g.exp())
    return (state,), _read(q, state)


def mamba(s: Any, x: Any, w: Any) -> Any:
    value, dt, b, c = x  # [B, V], [B, V], [B, K], [B, K]
    rate = -torch.exp(w[0])
    dt = softplus(dt)
    state = torch.exp(dt.unsqueeze(-1) * rate) * s[0] + (dt * value).unsqueeze(-1) * b.unsqueeze(1)
    return (state,), (state @ c.unsqueeze(-1)).squeeze(-1) + w[1] * value


def rg_lru(s: Any, x: Any, w: Any) -> Any:
    value, gate_in, gate_a = x
    log_a = -8.0 * torch.sigmoid(gate_a) * softplus(w[0])
    h = torch.exp(log_a) * s[0] + torch.sqrt(1 - torch.exp(2 * log_a)) * (torch.sigmoid(gate_in) * value)
    return (h,), h


def min_gru(s: Any, x: Any, w: Any) -> Any:
    z = torch.sigmoid(x[0])
    h = torch.lerp(s[0], x[1], z)
    return (h,), h


def hgrn(s: Any, x: Any, w: Any) -> Any:
    f = 0.2 + 0.8 * torch.sigmoid(x[0])
    h = f * s[0] + (1 - f) * torch.nn.functional.silu(x[1])
    return (h,), h * torch.sigmoid(x[2])


def rwkv4(s: Any, x: Any, w: Any) -> Any:
    top, total, weightsum = s
    k, v = x
    decay, first = -torch.exp(w[0]), w[1]
    high = torch.maximum(top, first + k)
    a, b = torch.exp(top - high), torch.exp(first + k - high)
    out = (a * total + b * v) / (a * weightsum + b)
    new = torch.maximum(top + decay, k)
    a, b = torch.exp(top + decay - new), torch.exp(k - new)
    return (new, a * total + b * v, a * weightsum + b), out


def mlstm(s: Any, x: Any, w: Any) -> Any:
    state, total, top = s
    q, k, v, i, f = x
    new = torch.maximum(logsigmoid(f) + top, i)
    keep, put = torch.exp(logsigmoid(f) + top - new), torch.exp(i - new)
    state = keep[..., None, None] * state + put[..., None, None] * _outer(k, v)
    total = keep[..., None] * total + put[..., None] * k
    below = torch.maximum((q * total).sum(-1).abs(), torch.exp(-new))
    return (state, total, new), _read(q, state) / below[..., None]


_QKV = (normal(H, K), normal(H, K), normal(H, V))
_MATRIX = (((B, H, K, V), 0.0),)

FORMS: dict[str, Form] = {
    "linear_attention": Form(linear_attention, _MATRIX, _QKV, spec=({"decay": "none", "read": "after"},)),
    "normalised": Form(
        normalised_linear_attention, (*_MATRIX, ((B, H, K), 0.0)), _QKV, spec=({"decay": "none"}, {"decay": "none"})
    ),
    "normalised_without_last": Form(
        normalised_linear_attention, (*_MATRIX, ((B, H, K), 0.0)), _QKV, spec=({"decay": "none", "normaliser": True},), last=False
    ),
    "retention": Form(retention, _MATRIX, _QKV, spec=({"decay": "head", "gate": "log"},)),
    "constant_decay": Form(constant_decay, _MATRIX, _QKV, spec=({"decay": "head", "gate": "log"},)),
    "mamba2": Form(
        mamba2, (((B, H, V, K), 0.0),), (normal(H, V), normal(H), normal(K), normal(K)), (weight(H), weight(H), weight(H)),
        ({"decay": "head", "gate": "log", "operands": ("q", "k", "gate")},),
    ),
    "gla": Form(gla, _MATRIX, (*_QKV, log_decay(H, K)), spec=({"decay": "key", "gate": "log", "read": "after"},)),
    "hgrn2": Form(hgrn2, _MATRIX, (normal(H, K), normal(H, K), normal(H, V)), spec=({"decay": "key", "gate": "log"},)),
    "rwkv6": Form(
        rwkv6, _MATRIX, (*_QKV, normal(H, K)), (weight(H, K),),
        ({"decay": "key", "read": "before", "operands": ("q", "k", "gate", "bonus")},),
    ),
    "exclusive": Form(exclusive, _MATRIX, _QKV, spec=({"decay": "head", "read": "before"},)),
    "value_decay": Form(value_decay, _MATRIX, (normal(H, K), normal(H, K), log_decay(H, V)), spec=({"decay": "value"},)),
    "mamba": Form(
        mamba, (((B, V, K), 0.0),), (normal(V), normal(V), normal(K), normal(K)), (weight(V, K), weight(V)),
        ({"decay": "full", "gate": "log", "operands": ("q", "k", "gate", "rate")},),
    ),
    "rg_lru": Form(rg_lru, (((B, V), 0.0),), (normal(V), normal(V), normal(V)), (weight(V),), ({"decay": "value", "gate":
    "factor"},)), "min_gru": Form(min_gru, (((B, V), 0.0),), (normal(V), normal(V)), spec=({"decay": "value", "gate":
    "factor"},)), "hgrn": Form(hgrn, (((B, V), 0.0),), (normal(V), normal(V), normal(V)), spec=({"decay": "value", "gate":
    "factor"},)), "rwkv4": Form(
        rwkv4, (((B, V), -1e38), ((B, V), 0.0), ((B, V), 0.0)), (normal(V), normal(V)), (weight(V), weight(V)),
        ({"decay": "value", "gate": "factor"}, {"decay": "value", "gate": "factor"}),
    ),
    "mlstm": Form(
        mlstm, (((B, H, K, V), 0.0), ((B, H, K), 0.0), ((B, H), -1e4)), (*_QKV, normal(H), normal(H)),
        spec=({"decay": "head", "gate": "log"}, {"decay": "head", "gate": "log"}),
    ),
    "mlstm_without_last": Form(
        mlstm, (((B, H, K, V), 0.0), ((B, H, K), 0.0), ((B, H), -1e4)), (*_QKV, normal(H), normal(H)),
        spec=({"decay": "head", "gate": "log", "normaliser": True},), last=False,
    ),
}  # fmt: skip


def arguments(form: Form, *, grad: bool = True) -> list[Tensor]:
    """The sequences, then the weights."""
    torch.manual_seed(0)
    made = [make() for make in (*form.inputs, *form.weights)]
    return [x.requires_grad_(grad) for x in made]


def initial(form: Form, like: Tensor) -> tuple[Tensor, ...]:
    """The first states."""
    return tuple(torch.full(shape, value, dtype=like.dtype) for shape, value in form.states)


def as_scan(form: Form) -> Callable[..., Any]:
    """The form as torch's scan: outputs [B, T, ...] and last states."""

    def run(*given: Tensor) -> Any:
        xs, weights = given[: len(form.inputs)], given[len(form.inputs) :]

        def step(states: Any, inputs: Any) -> Any:
            new, out = form.step(states, inputs, weights)
            return tuple(new), out.clone()

        last, out = scan(step, initial(form, given[0]), tuple(xs), dim=1)
        return out.movedim(0, 1), *(last if form.last else ())

    return run


def as_loop(form: Form, sink: str = "stack") -> Callable[..., Any]:
    """The form as a Python loop over time, whose outputs go to a list or into a buffer."""

    def run(*given: Tensor) -> Any:
        xs, weights = given[: len(form.inputs)], given[len(form.inputs) :]
        states: Any = initial(form, given[0])
        outputs: Any = []
        buffer = None
        for t in range(xs[0].shape[1]):
            states, out = form.step(states, tuple(x[:, t] for x in xs), weights)
            if sink == "stack":
                outputs.append(out)
            else:
                buffer = out.new_zeros(out.shape[0], xs[0].shape[1], *out.shape[1:]) if buffer is None else buffer
                buffer[:, t] = out
        return torch.stack(outputs, 1) if sink == "stack" else buffer, *(states if form.last else ())

    return run
