"""Linear recurrences: recognised from a scan, for what they are, with results and gradients against float64."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch._higher_order_ops.scan import scan

from effcompile.explain import explain
from effcompile.ir import Decision

from .recurrence_forms import FORMS, B, H, K, T, V, arguments, as_scan
from .vocabulary import Compiled, assert_refused, assert_within_contract


def recurrences(compiled: Compiled) -> list[Decision]:
    return [d for d in compiled.report().decisions if d.family == "recurrence"]


def assert_specs(compiled: Compiled, specs: tuple[dict[str, Any], ...]) -> None:
    """Every recurrence is rewritten, and has one of the given specifications."""
    found = recurrences(compiled)
    assert [d.outcome for d in found] == ["rewritten"] * len(specs), [(d.outcome, d.step, d.why) for d in found]
    for decision, wanted in zip(found, specs, strict=True):
        assert {name: decision.spec[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", FORMS)
def test_scan(name: str) -> None:
    form = FORMS[name]
    compiled = assert_within_contract(as_scan(form), *arguments(form))
    assert_specs(compiled, form.spec)


def test_one_state_too_few_steps() -> None:
    form = FORMS["gla"]
    compiled = assert_within_contract(as_scan(form), *(x[:, :2] for x in arguments(form, grad=False)))
    assert_specs(compiled, form.spec)


def _scan_of(step: Any) -> Any:
    def run(x: torch.Tensor, state: torch.Tensor, *more: torch.Tensor) -> Any:
        last, out = scan(lambda s, v: step(s, v, *more), state, x, dim=1)
        return out, last

    return run


def _copied(new: torch.Tensor) -> Any:
    return new, new.clone()


@pytest.mark.parametrize(
    ("step", "why"),
    [
        pytest.param(lambda s, x: _copied(torch.tanh(s + x)), "tanh.* is not linear", id="tanh"),
        pytest.param(lambda s, x: _copied(s * torch.sigmoid(s) + x), "sigmoid.* is not linear", id="gated-by-itself"),
        pytest.param(lambda s, x: _copied(s @ torch.eye(V) + x), "mixes the elements", id="matrix"),
        pytest.param(lambda s, x: _copied(s.roll(1, -1) * 0.5 + x), "not linear", id="rolled"),
        pytest.param(lambda s, x: _copied(s * s + x), "not linear", id="squared"),
        pytest.param(lambda s, x: _copied(s.cumsum(-1) + x), "not linear", id="cumulative"),
        pytest.param(lambda s, x: _copied(torch.maximum(s, x) * 0.5), "maximum", id="scaled-maximum"),
    ],
)
def test_refused(step: Any, why: str) -> None:
    assert_refused(_scan_of(step), torch.randn(B, T, V), torch.zeros(B, V), why=why, family="recurrence")


def test_transposed_state_is_refused() -> None:
    run = _scan_of(lambda s, x: _copied(s.mT.contiguous() * 0.5 + x))
    assert_refused(run, torch.randn(B, T, V, V), torch.zeros(B, V, V), why="rearranged from step to step", family="recurrence")


def test_delta_rule_is_refused_with_its_reason() -> None:
    def delta(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor) -> Any:
        def step(s: Any, x: Any) -> Any:
            q, k, v = x
            s = s + k[..., None] * (v - torch.einsum("bhk,bhkv->bhv", k, s))[..., None, :]
            return s, torch.einsum("bhk,bhkv->bhv", q, s)

        return scan(step, state, (q, k, v), dim=0)

    args = [torch.randn(T, B, H, n) for n in (K, K, V)]
    assert_refused(delta, *args, torch.zeros(B, H, K, V), why="delta rule", family="recurrence")


def test_states_that_depend_on_one_another() -> None:
    def rotation(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        def step(s: Any, v: Any) -> Any:
            new = (0.9 * s[0] - 0.1 * s[1] + v, 0.1 * s[0] + 0.9 * s[1])
            return new, new[0] + new[1]

        return scan(step, (a, b), x, dim=1)

    assert_refused(
        rotation, torch.randn(B, T, V), torch.zeros(B, V), torch.zeros(B, V), why="depend on one another", family="recurrence"
    )


def test_a_factor_that_may_be_negative_goes_element_by_element() -> None:
    run = _scan_of(lambda s, x: _copied(torch.tanh(x) * s + x))
    compiled = assert_within_contract(run, torch.randn(B, T, V, requires_grad=True), torch.randn(B, V, requires_grad=True))
    assert_specs(compiled, ({"gate": "factor", "decay": "value", "operands": ("gate", "initial")},))


def test_a_decay_that_may_be_negative_flips_keys_and_queries() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor) -> Any:
        def step(s: Any, x: Any) -> Any:
            q, k, v = x
            s = a[:, None, None] * s + k[..., None] * v[..., None, :]
            return s, torch.einsum("bhk,bhkv->bhv", q, s)

        return scan(step, torch.zeros(B, H, K, V, dtype=q.dtype), (q, k, v), dim=0)[1]

    args = [torch.randn(T, B, H, n, requires_grad=True) for n in (K, K, V)]
    compiled = assert_within_contract(run, *args, torch.tensor([0.9, -0.8, -0.3], requires_grad=True))
    assert_specs(compiled, ({"decay": "head", "gate": "log", "operands": ("q", "k", "gate")},))


# -------------------------------------------------------------------- one meaning, other spellings


def _folded(s: Any, q: Any, k: Any, v: Any, a: Any) -> Any:
    flat = s.reshape(B * H, K, V) * a.reshape(B * H, 1, 1) + torch.bmm(k.reshape(B * H, K, 1), v.reshape(B * H, 1, V))
    return flat.reshape(B, H, K, V), torch.bmm(q.reshape(B * H, 1, K), flat).reshape(B, H, V)


def _added_in_place_of_the_product(s: Any, q: Any, k: Any, v: Any, a: Any) -> Any:
    s = torch.baddbmm(s.view(B * H, K, V) * a.view(B * H, 1, 1), k.view(B * H, K, 1), v.view(B * H, 1, V)).view(B, H, K, V)
    return s, torch.einsum("bhkv,bhk->bhv", s, q)


def _fused_multiply(s: Any, q: Any, k: Any, v: Any, a: Any) -> Any:
    s = torch.addcmul(s * a[..., None, None], k[..., None], v[..., None, :])
    return s, (s * q[..., None]).sum(dim=2)


def _written_transposed(s: Any, q: Any, k: Any, v: Any, a: Any) -> Any:
    state = a[..., None, None] * s.mT + v[..., None] * k[..., None, :]
    return state.mT.contiguous(), (state @ q[..., None])[..., 0]


def _decayed_afterwards(s: Any, q: Any, k: Any, v: Any, a: Any) -> Any:
    s = a[..., None, None] * (s + torch.einsum("bhk,bhv->bhkv", k / a[..., None], v))
    return s, torch.einsum("bhk,bhkv->bhv", q * K**-0.5, s)


def _two_factors(s: Any, q: Any, k: Any, v: Any, a: Any) -> Any:
    s = 0.5 * s * a[..., None, None] * torch.exp(-a.abs())[..., None, None] + k[..., None] * v[..., None, :]
    return s, torch.einsum("bhk,bhkv->bhv", q, s)


def _chosen(s: Any, q: Any, k: Any, v: Any, a: Any) -> Any:
    keep = (v[..., :1] > 0)[..., None]
    s = torch.where(keep, s, torch.zeros_like(s)) * a[..., None, None] + k[..., None] * v[..., None, :]
    return s, torch.einsum("bhk,bhkv->bhv", q, s)


_SPELLINGS = {f.__name__.strip("_"): f for f in (
    _folded, _added_in_place_of_the_product, _fused_multiply, _written_transposed, _decayed_afterwards, _two_factors, _chosen
)}  # fmt: skip


@pytest.mark.parametrize("name", _SPELLINGS)
def test_spelling(name: str) -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: torch.Tensor, state: torch.Tensor) -> Any:
        def step(s: Any, x: Any) -> Any:
            q, k, v, a = x
            return _SPELLINGS[name](s, q, k, v, torch.sigmoid(a))

        last, out = scan(step, state, (q, k, v, a), dim=0)
        return out, last

    torch.manual_seed(0)
    args = [torch.randn(T, B, H, *n, requires_grad=True) for n in ((K,), (K,), (V,), ())]
    compiled = assert_within_contract(run, *args, torch.randn(B, H, K, V, requires_grad=True))
    assert_specs(compiled, ({"decay": "head", "gate": "log", "operands": ("q", "k", "gate", "initial")},))


def test_queries_in_groups_share_their_keys() -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        def step(s: Any, x: Any) -> Any:
            q, k, v = x
            s = 0.9 * s + k.repeat_interleave(2, 1)[..., None] * v[..., None, :]
            return s, torch.einsum("bhk,bhkv->bhv", q.repeat_interleave(2, 1), s)

        return scan(step, torch.zeros(B, 4, K, V, dtype=q.dtype), (q, k, v), dim=0)[1]

    args = [torch.randn(T, B, h, n, requires_grad=True) for h, n in ((2, K), (2, K), (4, V))]
    compiled = assert_within_contract(run, *args)
    assert_specs(compiled, ({"decay": "head", "operands": ("q", "k", "gate")},))


@pytest.mark.parametrize("shape", [(), (B,), (B, 2, 3), (1, V)], ids=str)
def test_elements_of_any_shape(shape: tuple[int, ...]) -> None:
    def run(a: torch.Tensor, x: torch.Tensor, h: torch.Tensor) -> Any:
        return scan(lambda s, v: _copied(torch.sigmoid(v[0]) * s + v[1]), h, (a, x), dim=0)[1]

    args = [torch.randn(T, *shape, requires_grad=True), torch.randn(T, *shape, requires_grad=True)]
    compiled = assert_within_contract(run, *args, torch.randn(shape, requires_grad=True))
    assert_specs(compiled, ({"gate": "factor"},))


def test_bfloat16() -> None:
    form = FORMS["gla"]
    args = [x.detach().bfloat16().requires_grad_() for x in arguments(form)]
    assert_specs(assert_within_contract(as_scan(form), *args), form.spec)


def test_states_of_every_step_are_not_kept_for_what_a_loop_would_not_keep() -> None:
    def run(k: torch.Tensor, v: torch.Tensor) -> Any:
        def step(s: Any, x: Any) -> Any:
            s = 0.9 * s + x[0][:, :, None] * x[1][:, None, :]
            return s, s.amax((1, 2))

        return scan(step, torch.zeros(1, 64, 64), (k, v), dim=0)[1]

    args = [torch.randn(512, 1, 64), torch.randn(512, 1, 64)]
    assert_refused(run, *args, why="8 MiB over all steps, would have to be kept for amax", family="recurrence")


def test_symbols_are_equal_by_name_and_not_by_identity() -> None:
    """Sympy forgets a symbol once it has made many others, but not the expressions that hold it: two of one name are then about."""
    q, k, v, g = (torch.randn(256, 1, 4, *end) for end in ((8,), (8,), (16,), ()))

    def step(state: Any, x: Any) -> Any:
        q, k, v, g = x
        state = g.exp()[..., None, None] * state + torch.einsum("bhk,bhv->bhkv", k, v)
        return state, torch.einsum("bhk,bhkv->bhv", q, state)

    def f(q: Any, k: Any, v: Any, g: Any) -> Any:
        return scan(step, q.new_zeros(1, 4, 8, 16), (q, k, v, g))[1]

    for _ in range(2):
        report = explain(f, q, k, v, g, hardware="h100-sxm")
        (match,) = [attempt.result for attempt in report.frames[0].attempts if attempt.matched]
        assert [int(n) for n in match.inputs["v"].shape] == [4, 1, 256, 16]
        sympy.Symbol._Symbol__xnew_cached_.cache_clear()


@pytest.mark.parametrize("hardware", ["h100-sxm", "a100-sxm-80"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decays_by_key_have_kernels(hardware: str, dtype: torch.dtype) -> None:
    q, k, v, g = (torch.randn(512, 1, 4, d, dtype=dtype) for d in (32, 32, 64, 32))

    def step(state: Any, x: Any) -> Any:
        q, k, v, g = x
        state = torch.nn.functional.logsigmoid(g).exp()[..., None] * state + k[..., None] * v[..., None, :]
        return state, (q[..., None] * state).sum(-2)

    def f(q: Any, k: Any, v: Any, g: Any) -> Any:
        return scan(step, q.new_zeros(1, 4, 32, 64), (q, k, v, g))[1]

    (decision,) = explain(f, q, k, v, g, hardware=hardware).decisions
    assert (decision.spec["decay"], decision.chosen) == ("key", "triton")
