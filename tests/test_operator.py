"""torch.ops.effcompile.attention: torch's own checks, its reference against the definition in float64, gradients, and strides."""

from __future__ import annotations

import math

import pytest
import torch

from effcompile import backend  # noqa: F401 - registers the operator
from effcompile.evaluate import Evaluator
from effcompile.ops.attention import AttentionSpec, captured_gradients, index_tensors, reference
from effcompile.ops.captured import DIMS, loads_that_learn
from effcompile.terms import from_text

OPERATOR = torch.ops.effcompile.attention.default
B, H, TQ, TK, D, DV = 2, 4, 5, 7, 8, 6
T0 = ("t0",)

# name: specification, captures, sizes, heads of keys
CASES = {
    "plain": (AttentionSpec(score="s * 0.5"), (), (), H),
    "grouped": (AttentionSpec(score="s * 0.5"), (), (), 2),
    "one key head": (AttentionSpec(score="s * 0.5"), (), (), 1),
    "causal": (AttentionSpec(mask="j <= i"), (), (), H),
    "soft-cap": (AttentionSpec(score="tanh(s * 0.1) * 5.0"), (), (), H),
    "bias": (AttentionSpec(score="s + t0.f[h, i, j]", captures=("t0",)), (torch.randn(H, TQ, TK),), (), H),
    "padding": (
        AttentionSpec(mask="t0.b[b, j]", captures=("t0",), empty="nan"),
        (torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool),),
        (),
        H,
    ),
    "window of a size": (AttentionSpec(mask="(j <= i + n) & (i - j < n)", sizes=("n",)), (), (3,), H),
    "scalar capture": (AttentionSpec(mask="j <= t0.i[()]", captures=("t0",)), (torch.tensor(4),), (), H),
    "learned bias": (AttentionSpec(score="s + t0.f[h, i, j]", captures=T0, learned=T0), (torch.randn(H, TQ, TK),), (), H),
    "sink": (AttentionSpec(score="s * 0.5", sink="t0.f[h]", captures=T0, learned=T0), (torch.randn(H),), (), H),
    "sink, grouped": (
        AttentionSpec(score="s * 0.5", mask="j <= i", sink="t0.f[h]", captures=T0, learned=T0),
        (torch.randn(H),),
        (),
        2,
    ),
    "empty rows are zero": (AttentionSpec(mask="j < i", empty="zero"), (), (), H),
    "empty rows are means": (AttentionSpec(mask="j < i", empty="mean"), (), (), H),
    "empty rows are nan": (AttentionSpec(mask="j < i", empty="nan"), (), (), H),
}
CASE = pytest.mark.parametrize("name", CASES)
LAYOUT = pytest.mark.parametrize("layout", ["bhtd", "bthd"])


def operands(name, dtype=torch.float32, requires_grad=False):
    _, captures, sizes, heads = CASES[name]
    q = torch.randn(B, H, TQ, D, dtype=dtype)
    k, v = torch.randn(B, heads, TK, D, dtype=dtype), torch.randn(B, heads, TK, DV, dtype=dtype)
    captures = [x.to(dtype) if x.is_floating_point() else x for x in captures]
    if requires_grad:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        captures = [x.clone().requires_grad_() if CASES[name][0].learned else x for x in captures]
    return q, k, v, captures, list(sizes)


def naive(q, k, v, captures, sizes, name):
    """The definition, one row at a time."""
    spec = CASES[name][0]
    out = torch.zeros(B, H, TQ, DV, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            group = h * k.shape[1] // H
            for i in range(TQ):
                logits = [score(name, q[b, h, i] @ k[b, group, j], b, h, i, j, captures) for j in range(TK)]
                kept = [j for j in range(TK) if takes_part(name, b, i, j, captures, sizes)]
                total = sum((logits[j].exp() for j in kept), captures[0][h].exp() if spec.sink else torch.zeros((), dtype=q.dtype))
                if kept:
                    out[b, h, i] = sum(logits[j].exp() / total * v[b, group, j] for j in kept)
                elif spec.empty == "mean":
                    out[b, h, i] = v[b, group].mean(0)
                elif spec.empty == "nan":
                    out[b, h, i] = math.nan
    return out


def score(name, s, b, h, i, j, captures):
    if name == "soft-cap":
        return (s * 0.1).tanh() * 5.0
    if name in ("bias", "learned bias"):
        return s + captures[0][h, i, j]
    return s * 0.5 if CASES[name][0].score == "s * 0.5" else s


def takes_part(name, b, i, j, captures, sizes):
    rules = {
        "causal": j <= i,
        "sink, grouped": j <= i,
        "padding": name == "padding" and bool(captures[0][b, j]),
        "window of a size": name == "window of a size" and j <= i + sizes[0] and i - j < sizes[0],
        "scalar capture": name == "scalar capture" and j <= int(captures[0]),
    }
    return j < i if name.startswith("empty") else rules.get(name, True)


@CASE
def test_reference_is_the_definition(name):
    inputs = operands(name, torch.float64)
    out, lse = reference(*inputs, CASES[name][0])
    torch.testing.assert_close(out, naive(*inputs, name), equal_nan=True, rtol=1e-12, atol=1e-12)
    assert lse.shape == (B, H, TQ) and lse.dtype == torch.float64


@CASE
@LAYOUT
def test_operator_is_the_reference(name, layout):
    inputs = operands(name)
    out, lse = OPERATOR(*inputs, CASES[name][0].to_json(), layout)
    expected, total = reference(*inputs, CASES[name][0])
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(lse, total, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in CASES if name != "empty rows are nan"])  # opcheck takes NaN for a difference
@LAYOUT
@pytest.mark.filterwarnings("ignore")
def test_opcheck(name, layout):
    inputs = operands(name, requires_grad=True)
    torch.library.opcheck(OPERATOR, (*inputs, CASES[name][0].to_json(), layout))


@LAYOUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 4, 1, 7), (2, 1, 5, 5)], ids=str)
def test_fake_strides_are_the_real_ones(layout, dtype, shape):
    b, h, tq, tk = shape
    inputs = [torch.randn(b, h, t, d, dtype=dtype) for t, d in ((tq, D), (tk, D), (tk, DV))]
    text = CASES["plain"][0].to_json()
    real = OPERATOR(*inputs, [], [], text, layout)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = OPERATOR(*(mode.from_tensor(x) for x in inputs), [], [], text, layout)
    for mine, other in zip(real, fake, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (other.shape, other.stride(), other.dtype)
    wanted = real[0] if layout == "bhtd" else real[0].transpose(1, 2)
    assert wanted.is_contiguous()


@CASE
def test_gradients(name):
    """Of queries, keys, values and what learns, against autograd through the definition in float64."""
    spec = CASES[name][0]
    inputs = operands(name, torch.float64, requires_grad=True)
    leaves = [x for x in (*inputs[:3], *inputs[3]) if x.requires_grad]
    expected = reference(*inputs, spec)[0]
    kept = expected.isfinite()
    weights = torch.where(kept, torch.randn_like(expected), 0.0)
    wanted = torch.autograd.grad(torch.where(kept, expected, 0.0), leaves, weights, retain_graph=True)
    single = [x.detach().float().requires_grad_() for x in inputs[:3]]
    captures = [x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs[3]]
    out, _ = OPERATOR(*single, captures, inputs[4], spec.to_json(), "bhtd")
    got = torch.autograd.grad(out, [*single, *(x for x in captures if x.requires_grad)], weights.float())
    assert len(got) == len(wanted) == 3 + len(spec.learned)
    if spec.empty == "nan" and name != "padding":
        return  # the gradient of a NaN row is NaN for all that it touches
    for mine, other in zip(got, wanted, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-5)


def test_no_gradient_is_sent_where_none_is_asked_for():
    q, k, v, _, _ = operands("plain")
    q.requires_grad_()
    out, lse = OPERATOR(q, k, v, [], [], CASES["plain"][0].to_json(), "bhtd")
    assert out.requires_grad and lse.requires_grad
    out.sum().backward()
    assert q.grad is not None and k.grad is None


@pytest.mark.parametrize("name", ["grouped", "sink", "empty rows are zero"])
@pytest.mark.parametrize("used", ["both", "log-sum-exp"])
def test_gradient_of_the_log_sum_exp(name, used):
    spec = CASES[name][0]
    inputs = operands(name, torch.float64, requires_grad=True)
    single = [[x.detach().float().requires_grad_() for x in part] for part in (inputs[:3], inputs[3])]
    weights = torch.randn(B, H, TQ, DV, dtype=torch.float64), torch.randn(B, H, TQ, dtype=torch.float64)
    chosen = slice(0, 2) if used == "both" else slice(1, 2)
    expected = reference(*inputs, spec)
    leaves = [*inputs[:3], *inputs[3]]
    finite = [torch.where(x.isfinite(), x, 0.0) for x in expected]
    wanted = torch.autograd.grad(finite[chosen], leaves, weights[chosen], materialize_grads=True)
    found = OPERATOR(*single[0], single[1], inputs[4], spec.to_json(), "bhtd")
    found = [torch.where(x.isfinite(), x, 0.0) for x in found]
    grads = [x.float() for x in weights[chosen]]
    got = torch.autograd.grad(found[chosen], [*single[0], *single[1]], grads, materialize_grads=True)
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-5)


PLACES = {
    "its own indices": ("t0.f[b, h, i, j]", (B, H, TQ, TK)),
    "another order": ("t0.f[i, h, b, j]", (TQ, H, B, TK)),
    "part of a tensor": ("t0.f[h, i, j]", (H, TQ + 2, TK + 1)),
    "a constant index": ("t0.f[1, j]", (3, TK)),
    "one of each head": ("t0.f[h]", (H,)),
    "one number": ("t0.f[()]", ()),
    "distances": ("t0.f[h, i - j + 6]", (H, TQ + TK)),
    "blocks": ("t0.f[i // 2, j // 3, h]", (3, 3, H)),
    "a table": ("t0.f[t1.i[i, j], h]", (4, H)),
    "a table of one head": ("t0.f[0, t1.i[i, j]]", (2, 4)),
    "the diagonal": ("t0.f[i, i]", (TQ, TQ)),
    "two places": ("t0.f[h, i] - t0.f[h, j]", (H, TK)),
}


@pytest.mark.parametrize("name", PLACES)
def test_gradients_of_loads_reach_their_elements(name):
    """Against autograd through the term itself: what a load gets is added where it was read, summed beforehand or not."""
    text, shape = PLACES[name]
    captures = [torch.randn(shape, requires_grad=True), torch.randint(0, 4, (TQ, TK))]
    spec = AttentionSpec(score=f"s + {text}", captures=("t0", "t1"), learned=T0)
    symbols = index_tensors(B, H, TQ, TK, torch.device("cpu"))
    evaluator = Evaluator(symbols, dict(zip(spec.captures, captures, strict=True)), dtype=torch.float32, device=torch.device("cpu"))
    value = evaluator.tensor(from_text(text), torch.float32).expand(B, H, TQ, TK)
    upstream = torch.randn(B, H, TQ, TK)
    (wanted,) = torch.autograd.grad(value, captures[0], upstream)
    loads = loads_that_learn(from_text(spec.score), T0)
    for summed in (False, True):
        given = []
        for load in loads:
            dims = [d for d, symbol in enumerate(DIMS) if summed and not load.has(symbol)]
            sign = -1.0 if name == "two places" and load.has(DIMS[3]) else 1.0
            given.append(sign * (upstream.sum(dims, keepdim=True) if dims else upstream))
        (found,) = captured_gradients((B, H, TQ, TK), given, None, [x.detach() for x in captures], (), spec)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [case[0] for case in CASES.values()], ids=list(CASES))
def test_specifications_survive_their_text(spec):
    assert AttentionSpec.from_json(spec.to_json()) == spec
    assert AttentionSpec.from_json(spec.to_json()).to_json() == spec.to_json()
