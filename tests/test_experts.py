"""Experts: the definition against a loop over tokens, the ATen lowering against the definition, gradients, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from effcompile.codegen import experts_activation, experts_aten, experts_aten_backward, experts_segments
from effcompile.errors import EffcompileWarning, ExpressionError
from effcompile.ops.experts import ExpertsSpec, activate, check, reference

from .experts_cases import (
    ACTIVATIONS,
    BACKWARD,
    FORMS,
    FORWARD,
    OPERATOR,
    SWIGLU,
    Case,
    Sizes,
    assert_contract,
    by_definition,
    named,
    ours,
    spec_of,
    token_by_token,
)

FORM = pytest.mark.parametrize("form", FORMS)
HALVES = [torch.bfloat16, torch.float16]


def case_of(form, **fields):
    name, spec = FORMS[form]
    return Case(name, spec, **fields)


def ids_like(*rows):
    return torch.tensor(rows)


# -------------------------------------------------------------------- the definition


@FORM
def test_the_definition_is_a_loop_over_tokens(form):
    case = case_of(form, dtype=torch.float64)
    out, h = reference(*case.arguments, case.spec)
    torch.testing.assert_close(out, token_by_token(case), rtol=1e-12, atol=1e-12)
    assert h.shape == (22, 14 if case.spec.gated else 7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_the_definition(name):
    case = Case(name, spec_of(name), dtype=torch.float64)
    torch.testing.assert_close(reference(*case.arguments, case.spec)[0], token_by_token(case), rtol=1e-9, atol=1e-9)


def test_the_pre_activation_is_sorted_by_expert():
    case = case_of("one-none", sizes=Sizes(t=3, experts=3), dtype=torch.float64, ids=ids_like([2, 0], [9, 2], [0, -1]))
    _, h = reference(*case.arguments, case.spec)
    rows = [case.x[t] @ case.up[0][e] for t, e in ((0, 0), (2, 0), (0, 2), (1, 2))]
    torch.testing.assert_close(h, torch.stack([*rows, 0 * rows[0], 0 * rows[0]]))
    torch.testing.assert_close(FORWARD(*case.arguments, case.spec.to_json())[1][:4], h[:4])


# -------------------------------------------------------------------- the lowering


@FORM
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_every_form_within_the_contract(form, dtype):
    assert_contract(case_of(form, dtype=dtype))


@FORM
def test_float64(form):
    case = case_of(form, dtype=torch.float64)
    found, true = ours(case), by_definition(case, torch.float64)
    for name in true:
        torch.testing.assert_close(found[name], true[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_activation_within_the_contract(name, dtype):
    assert_contract(Case(name, spec_of(name), dtype=dtype, sizes=Sizes(t=23)))


EDGES = {
    "no-token": Sizes(t=0),
    "one-token": Sizes(t=1),
    "one-expert": Sizes(experts=1),
    "one-choice": Sizes(k=1),
    "more-choices-than-experts": Sizes(k=4, experts=2),
    "most-experts-empty": Sizes(t=3, experts=40),
    "width-one": Sizes(d=1, f=1, out=1),
    "several-blocks": Sizes(t=60, d=16, f=1500, out=16),
}


@pytest.mark.parametrize("sizes", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("form", ["one-output-biased", "experts_pair-input-biased", "interleaved", "ungated"])
def test_odd_sizes_within_the_contract(form, sizes):
    assert_contract(case_of(form, sizes=sizes))


ROUTES = {
    "all-on-one": torch.full((11, 2), 3),
    "all-dropped": torch.full((11, 2), -1),
    "all-dropped-above": torch.full((11, 2), 5),
    "first-and-last": torch.tensor([[0, 4]] * 11),
    "one-kept": torch.full((11, 2), -7).index_put((torch.tensor(6), torch.tensor(1)), torch.tensor(2)),
    "twice-the-same": torch.arange(11).remainder(5)[:, None].expand(11, 2),
    "int32": torch.arange(22, dtype=torch.int32).remainder(7).view(2, 11).mT,
    "uint8": torch.arange(22, dtype=torch.uint8).view(11, 2),
}


@pytest.mark.parametrize("ids", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("form", ["one-output-biased", "experts-input-biased", "pair-none"])
def test_odd_routes_within_the_contract(form, ids):
    case = case_of(form, ids=ids)
    assert_contract(case)
    torch.testing.assert_close(ours(case)["out"].double(), token_by_token(case), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["one-output-biased", "pair-input"])
def test_a_dropped_assignment_can_have_any_weight(form):
    case = case_of(form)
    dropped = (case.ids < 0) | (case.ids >= case.sizes.experts)
    assert dropped.any() and not dropped.all()
    expected = ours(case)
    case.weights = torch.where(dropped, float("nan"), case.weights)
    for name, x in ours(case).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", ["one-output-biased", "one-input-biased"])
def test_weights_of_a_wider_dtype(form, dtype):
    assert_contract(case_of(form, dtype=dtype, weights_dtype=torch.float32))


def test_a_result_wider_than_the_operands():
    case = case_of("one-output", dtype=torch.bfloat16, weights_dtype=torch.float32)
    spec = replace(case.spec, out="float32")
    out = OPERATOR(*case.arguments, spec.to_json())
    rounded = OPERATOR(*case.arguments, case.spec.to_json())
    assert out.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert torch.equal(out.bfloat16(), rounded)
    assert not torch.equal(out.bfloat16().float(), out)


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "contiguous"])
@pytest.mark.parametrize("form", ["one-output", "pair-output", "experts-output", "experts_pair-output"])
def test_gradients_lie_in_memory_as_their_operands(form, transposed):
    case = case_of(form, transposed=transposed)
    _, h = FORWARD(*case.arguments, case.spec.to_json())
    found = BACKWARD(case.grad, *case.arguments, h, case.spec.to_json(), case.wanted)
    operands = (case.x, case.weights, *case.up, *case.down)
    assert [x.stride() for x in found] == [torch.empty_like(x).stride() for x in operands]


def test_results_are_the_same_each_time():
    case = case_of("one-output-biased", sizes=Sizes(t=200, k=4, d=16, f=16, out=16))
    first = ours(case)
    for _ in range(3):
        assert all(torch.equal(x, first[name]) for name, x in ours(case).items())


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(list(FORMS)),
    sizes=st.builds(
        Sizes, t=st.integers(0, 30), k=st.integers(1, 4), experts=st.integers(1, 9), d=st.integers(1, 9), f=st.integers(1, 9),
        out=st.integers(1, 9),
    ),
    favourite=st.floats(0, 1),
    dropped=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_any_imbalance_and_any_drops_within_the_contract(form, sizes, favourite, dropped, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, sizes.experts, (sizes.t, sizes.k), generator=generator)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < favourite, 0, ids)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < dropped, sizes.experts, ids)
    assert_contract(case_of(form, sizes=sizes, ids=ids, dtype=dtype, seed=seed))


# -------------------------------------------------------------------- where the device alone knows how many rows an expert has


def on_a_device(monkeypatch, way):
    """Multiply as on a device other than a CPU, by `way` where it is not None."""
    for module in (experts_aten, experts_aten_backward):
        monkeypatch.setattr(module, "assign", experts_segments.assign_on_device)
        if way is not None:
            monkeypatch.setattr(module, "segments", lambda assigned, *operands: way(assigned))


@FORM
@pytest.mark.parametrize("way", [experts_segments.Masked, experts_segments.Grouped], ids=lambda way: way.__name__.lower())
def test_without_asking_the_device(form, way, monkeypatch):
    on_a_device(monkeypatch, way)
    assert_contract(case_of(form, sizes=Sizes(t=9, experts=4, d=8, f=8, out=8)))


@pytest.mark.parametrize("ids", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("way", [experts_segments.Masked, experts_segments.Grouped], ids=lambda way: way.__name__.lower())
def test_odd_routes_without_asking_the_device(ids, way, monkeypatch):
    on_a_device(monkeypatch, way)
    assert_contract(case_of("one-output-biased", sizes=Sizes(d=8, f=8, out=8), ids=ids))


@pytest.mark.parametrize(
    ("dtype", "sizes", "way"),
    [
        (torch.bfloat16, Sizes(d=8, f=16, out=8), "Grouped"),
        (torch.bfloat16, Sizes(d=8, f=12, out=8), "Masked"),
        (torch.bfloat16, Sizes(d=9, f=16, out=8), "Masked"),
        (torch.float32, Sizes(d=8, f=16, out=8), "Masked"),
    ],
    ids=["aligned", "odd-f", "odd-d", "float32"],
)
@pytest.mark.parametrize("form", ["one-output", "pair-output", "experts-output", "experts_pair-output"])
def test_torchs_grouped_product_gets_what_it_takes(form, dtype, sizes, way, monkeypatch):
    on_a_device(monkeypatch, None)
    taken = []
    for name in ("Grouped", "Masked"):
        kind = getattr(experts_segments, name)
        monkeypatch.setattr(experts_segments, name, lambda assigned, kind=kind: taken.append(kind.__name__) or kind(assigned))
    assert_contract(case_of(form, dtype=dtype, sizes=sizes))
    assert taken == [way, way]


class _Reads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_device_is_not_asked(monkeypatch):
    on_a_device(monkeypatch, experts_segments.Masked)
    case = case_of("one-output-biased")
    with _Reads() as reads:
        _, h = experts_aten.forward(*case.arguments, case.spec)
        experts_aten_backward.backward(case.grad, *case.arguments, h, case.spec, case.wanted)
    assert reads.count == 0
    with _Reads() as reads:
        reference(*case.arguments, case.spec)
    assert reads.count > 0


# -------------------------------------------------------------------- autograd


def leaves_of(case, **wanted):
    """The operands as leaves, those of which `wanted` says no without a gradient."""
    operands = (case.x, case.weights, case.up, case.down, case.biases)
    names = ("x", "weights", "up", "down", "biases")

    def leaf(x, name):
        return x.detach().clone(memory_format=torch.preserve_format).requires_grad_(wanted.get(name, True))

    return [leaf(x, n) if isinstance(x, torch.Tensor) else [leaf(y, n) for y in x] for x, n in zip(operands, names, strict=True)]


@FORM
def test_gradients_by_differences(form):
    case = case_of(form, dtype=torch.float64, sizes=Sizes(t=3, k=2, experts=2, d=2, f=2, out=2))
    if form in ("ungated", "ungated-experts"):
        case.x += 0.05  # away from the kinks
    x, weights, up, down, biases = leaves_of(case)
    text = case.spec.to_json()

    def run(x, *rest):
        tensors = iter(rest)
        w = next(tensors) if case.spec.weighted != "none" else weights.detach()
        return OPERATOR(x, case.ids, w, *([next(tensors) for _ in own] for own in (up, down, biases)), text)

    given = () if case.spec.weighted == "none" else (weights,)
    assert torch.autograd.gradcheck(run, (x, *given, *up, *down, *biases))


@pytest.mark.parametrize("form", ["one-output-biased", "pair-input", "experts-none-biased", "interleaved", "ungated"])
def test_torchs_own_checks(form):
    case = case_of(form, dtype=torch.float64)
    x, weights, up, down, biases = leaves_of(case)
    torch.library.opcheck(OPERATOR, (x, case.ids, weights, up, down, biases, case.spec.to_json()))
    text = case.spec.to_json()
    below = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(FORWARD, (*case.arguments, text), **below)
    _, h = FORWARD(*case.arguments, text)
    torch.library.opcheck(BACKWARD, (case.grad, *case.arguments, h.nan_to_num(), text, case.wanted), **below)


def test_only_x_and_the_pre_activation_are_kept():
    case = case_of("one-output-biased", sizes=Sizes(t=50, d=8, f=12, out=8))
    x, weights, up, down, biases = leaves_of(case)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        OPERATOR(x, case.ids, weights, up, down, biases, case.spec.to_json())
    own = {t.data_ptr() for t in (x, case.ids, weights, *up, *down, *biases)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(100, 24)]


GRADIENTS = ("x", "weights", "up", "down", "biases")


@pytest.mark.parametrize("only", [*GRADIENTS, "down-and-x"])
@pytest.mark.parametrize("form", ["one-output-biased", "experts_pair-input-biased"])
def test_unwanted_gradients_are_not_computed(form, only, monkeypatch):
    case = case_of(form)
    wanted = {name: name in only.split("-and-") for name in GRADIENTS}
    outer, calls = experts_segments.Sliced.outer, []
    monkeypatch.setattr(experts_segments.Sliced, "outer", lambda self, *args: calls.append(1) or outer(self, *args))
    x, weights, up, down, biases = leaves_of(case, **wanted)
    out = OPERATOR(x, case.ids, weights, up, down, biases, case.spec.to_json())
    out.backward(case.grad)
    expected = ours(case)
    calls.clear()
    found = {}
    for name, own in zip(GRADIENTS, ([x], [weights], up, down, biases), strict=True):
        assert all((tensor.grad is not None) == wanted[name] for tensor in own), name
        if wanted[name]:
            found[name] = torch.cat([tensor.grad.reshape(-1) for tensor in own])
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[f"d{name}"], rtol=1e-5, atol=1e-6)
    _, h = FORWARD(*case.arguments, case.spec.to_json())
    results = BACKWARD(case.grad, *case.arguments, h, case.spec.to_json(), list(wanted.values()))
    assert [x.numel() > 0 for x in results] == [wanted[name] for name in case.names]
    banks = 2 if case.spec.is_pair else 1
    assert len(calls) == banks * wanted["up"] + wanted["down"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_it_is_the_same(dynamic):
    case = case_of("one-output-biased")
    text = case.spec.to_json()

    def layer(x, ids, weights, up, down, bias, second):
        return OPERATOR(x * 2, ids, weights, [up], [down], [bias, second], text) * 2

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for t in (11, 7):
        found = []
        for f in (layer, compiled):
            x, weights, up, down, biases = leaves_of(replace(case, sizes=Sizes(t=t), ids=None))
            ids = torch.arange(2 * t).remainder(6).view(t, 2)
            out = f(x, ids, weights, *up, *down, *biases)
            out.sum().backward()
            found.append([out, *(leaf.grad for leaf in (x, weights, *up, *down, *biases))])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_what_fails_falls_back_on_the_definition(part, monkeypatch):
    case = case_of("experts-output-biased")
    module = experts_aten if part == "forward" else experts_aten_backward
    _, h = FORWARD(*case.arguments, case.spec.to_json())

    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(module, part, fail)
    monkeypatch.setattr("effcompile.runtime._warned", set())
    with pytest.warns(EffcompileWarning, match="experts are computed by their reference, one after the other: .*no such kernel"):
        found = ours(case)
    assert_contract(case, found)
    monkeypatch.setenv("EFFARCH_FALLBACK", "error")
    with pytest.raises(RuntimeError, match="no such kernel"):
        ours(case)
    assert h.shape == (22, 14)


# -------------------------------------------------------------------- activations


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_and_its_slopes(name):
    spec = spec_of(name)
    torch.manual_seed(0)
    h = torch.randn(9, 14, dtype=torch.float64) * 4
    parts = {"gate": h[:, :7], "up": h[:, 7:]} if spec.gated else {"up": h}
    leaves = [x.clone().requires_grad_() for x in parts.values()]
    value = ACTIVATIONS[name][1](*leaves)
    slopes = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
    found = experts_activation.activation(spec.activation, spec.gated).slopes(**parts)
    for mine, theirs in zip(found, (value, *slopes), strict=True):
        torch.testing.assert_close(mine.to(torch.float64), theirs, rtol=1e-9, atol=1e-9)
    for own in (experts_activation.activate(h, spec), activate(h, spec)):
        torch.testing.assert_close(own, value.detach(), rtol=1e-9, atol=1e-9)


def test_an_activation_without_a_slope():
    with pytest.raises(ExpressionError, match="Expected a differentiable term"):
        experts_activation.activation("gate * (up % 2)", True)


# -------------------------------------------------------------------- what is refused


@FORM
def test_a_specification_is_read_as_it_was_written(form):
    spec = FORMS[form][1]
    assert ExpertsSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"stacking": "triple"}, "Expected stacking to be one of"),
        ({"weighted": "both"}, "Expected weighted to be one of"),
        ({"out": "float31"}, "Expected out to name a dtype but got out='float31'"),
        ({"gated": False, "activation": "up", "stacking": "pair"}, "Expected a gate where its weights stand apart"),
        ({"gated": False, "activation": "up", "stacking": "experts_pair"}, "Expected a gate where its weights stand apart"),
        ({"gated": False, "activation": "up", "interleaved": True}, "Expected gate and up in one tensor"),
        ({"stacking": "pair", "interleaved": True}, "Expected gate and up in one tensor"),
        ({"gated": False, "activation": SWIGLU}, "Expected an activation of `up` but got"),
        ({"activation": "gate * up * s"}, "Expected an activation of `gate` and `up` but got"),
        ({"activation": "gate * t0.f[()]"}, "Expected an activation of `gate` and `up` but got"),
        ({"activation": "gate *"}, "Expected an index expression"),
    ],
)
def test_a_specification_refuses(fields, why):
    with pytest.raises(ValueError, match=why):
        ExpertsSpec(**fields)


T, K, E, D, WIDTH, OUT = 4, 2, 3, 5, 6, 7
BAD = {
    "x-dims": ("x", torch.zeros(2, T, D), r"Expected x to have the shape"),
    "ids-tokens": ("ids", torch.zeros(T + 1, K, dtype=torch.int64), r"Expected ids to have .* \(4, 2\), \[T, k\], .*\(5, 2\)"),
    "ids-one-dim": ("ids", torch.zeros(T, dtype=torch.int64), "Expected ids to have the shape"),
    "ids-float": ("ids", torch.zeros(T, K), "Expected ids of an integer dtype but got ids.dtype=torch.float32"),
    "ids-bool": ("ids", torch.zeros(T, K, dtype=torch.bool), "Expected ids of an integer dtype but got ids.dtype=torch.bool"),
    "weights": ("weights", torch.zeros(T, K + 1), r"Expected weights to have the shape \(4, 2\)"),
    "up-rows": ("up", [torch.zeros(E, D + 1, 2 * WIDTH)], r"Expected up to have the shape \(3, 5, 12\), d rows of F columns"),
    "up-columns": ("up", [torch.zeros(E, D, WIDTH)], r"Expected up to have the shape \(3, 5, 12\)"),
    "up-experts": ("up", [torch.zeros(E + 1, D, 2 * WIDTH)], r"Expected up to have the shape \(3, 5, 12\)"),
    "up-two": ("up", [torch.zeros(E, D, 2 * WIDTH)] * 2, "Expected 1 tensors in up for stacking='one'"),
    "up-dtype": ("up", [torch.zeros(E, D, 2 * WIDTH).half()], "Expected up in the dtype of x, .* but got up.dtype=torch.float16"),
    "down-dims": ("down", [torch.zeros(WIDTH, OUT)], r"Expected down to be \[E, f, d_out\] or a tensor for each expert"),
    "down-none": ("down", [], "Expected down to be"),
    "down-no-expert": ("down", [torch.zeros(0, WIDTH, OUT)], "Expected at least one expert"),
    "down-dtype": ("down", [torch.zeros(E, WIDTH, OUT).double()], "Expected down in the dtype of x"),
    "biases-missing": ("biases", [torch.zeros(E, 2 * WIDTH)], r"Expected 2 tensors in biases for .*, biased=\(True, True\)"),
    "bias-first": ("biases", [torch.zeros(E, WIDTH), torch.zeros(E, OUT)], r"Expected biases.* \(3, 12\), F values"),
    "bias-second": ("biases", [torch.zeros(E, 2 * WIDTH), torch.zeros(E, D)], r"Expected biases.* \(3, 7\), d_out values"),
}  # fmt: skip


def right_operands():
    return {
        "x": torch.zeros(T, D),
        "ids": torch.zeros(T, K, dtype=torch.int64),
        "weights": torch.zeros(T, K),
        "up": [torch.zeros(E, D, 2 * WIDTH)],
        "down": [torch.zeros(E, WIDTH, OUT)],
        "biases": [torch.zeros(E, 2 * WIDTH), torch.zeros(E, OUT)],
    }


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("where", ["operator", "definition", "fake"])
def test_operands_are_refused(name, where):
    operand, value, why = BAD[name]
    spec = ExpertsSpec(biased=(True, True))
    check(*right_operands().values(), spec)
    operands = [*{**right_operands(), operand: value}.values()]
    with pytest.raises(ValueError, match=why):
        if where == "definition":
            reference(*operands, spec)
        elif where == "operator":
            OPERATOR(*operands, spec.to_json())
        else:
            OPERATOR(*torch.utils._pytree.tree_map(lambda x: x.to("meta"), operands), spec.to_json())


def test_no_weights_are_needed_where_none_are_read():
    case = case_of("one-none")
    spec = case.spec.to_json()
    expected = OPERATOR(*case.arguments, spec)
    assert torch.equal(OPERATOR(case.x, case.ids, case.x.new_empty(0), case.up, case.down, [], spec), expected)


def test_the_gradients_of_a_case_are_told_apart():
    """`named` joins what belongs to one operand: a near miss is seen."""
    case = case_of("experts_pair-output-biased")
    found = ours(case)
    assert set(found) == {"out", "dx", "dweights", "dup", "ddown", "dbiases"}
    found["dup"] = found["dup"].roll(1)
    with pytest.raises(AssertionError, match="dup: error"):
        assert_contract(case, found)
    assert named(case, found["out"], [case.x] * len(case.names))["dx"].shape == (case.x.numel(),)
