"""Single steps of recurrences, as decoders take them: recognised where a product reads the state, and updated in place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule
from torch.nn import functional as F

from effcompile import pipeline, trace
from effcompile.config import Config
from effcompile.passes import single_steps
from effcompile.passes.normalize import normalize
from effcompile.pipeline import Pipeline
from effcompile.updates import Updates, update_in_place
from tests.vocabulary import GPU, Compiled, _preferring_ours, listing

UPDATE = torch.ops.effcompile.recurrence_update.default
COPY = torch.ops.aten.copy_.default
B, H, K, V = 2, 3, 16, 24

Step = Callable[..., Any]


# -------------------------------------------------------------------- steps that people write: of state, q, k, v, gate


def linear_attention(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    state.add_(k[..., None] * v[..., None, :])
    return torch.einsum("bhk,bhkv->bhv", q, state)


def retention(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    state.mul_(0.9).add_(k[..., None] @ v[..., None, :])
    return (q[..., None, :] @ state)[..., 0, :]


def gla(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    state.copy_(state * F.logsigmoid(gate).exp()[..., None] + k[..., None] * v[..., None, :])
    return (q[..., None] * state).sum(-2)


def read_before_it_is_kept(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    new = torch.sigmoid(gate.mean(-1))[..., None, None] * state + torch.einsum("bhk,bhv->bhkv", k, v)
    out = (q[..., None] * new).sum(-2)
    state.copy_(new)
    return out


def values_first(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """state [B, H, V, K]; the decay is computed where it was expanded to."""
    rate = torch.exp(-F.softplus(gate[..., :1].expand(-1, -1, V)))
    new = state * rate[..., None] + v[..., None] * k[..., None, :]
    state.copy_(new)
    return torch.matmul(new, q[..., None]).squeeze(-1)


def delta_rule(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """What is written depends on the state as it was, which is read before the step as a whole."""
    decayed = state * torch.sigmoid(gate[..., 0])[..., None, None]
    old = (decayed * k[..., None]).sum(-2)
    state.copy_(decayed + k[..., None] * (v - old)[..., None, :])
    return (q[..., None] * state).sum(-2)


def shared_keys(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """All heads share a key and a query, as in Mamba-2, and are one dimension with the batch where they are read."""
    q, k = (x[:, :1].expand(-1, H, -1).contiguous() for x in (q, k))
    new = state * torch.exp(-gate[..., 0].exp())[..., None, None] + v[..., None] * k[..., None, :]
    state.copy_(new)
    return torch.bmm(new.view(B * H, V, K), q.view(B * H, K, 1)).view(B, H, V)


STEPS: dict[str, tuple[Step, str, bool]] = {
    "linear attention": (linear_attention, "none", False),
    "retention": (retention, "head", False),
    "gla": (gla, "key", False),
    "read before it is kept": (read_before_it_is_kept, "head", False),
    "values first": (values_first, "head", True),
    "shared keys": (shared_keys, "head", True),
    "delta rule": (delta_rule, "head", False),
}  # fmt: skip


def operands(*, turned: bool = False, dtype: torch.dtype = torch.float32, state: torch.dtype | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(B, H, V, K) if turned else torch.randn(B, H, K, V)]
    made += [torch.randn(B, H, n) for n in (K, K, V, K)]
    return [x.to(state if k == 0 and state else dtype) for k, x in enumerate(made)]


def targets(module: GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes]


@pytest.mark.parametrize("name", STEPS)
def test_states_are_updated_in_place(name: str) -> None:
    step, decay, turned = STEPS[name]
    args = operands(turned=turned)
    exact = [x.double() for x in args]
    wanted = step(*exact)
    eager = [x.clone() for x in args]
    beside = step(*eager)
    mine = [x.clone() for x in args]
    found = Compiled(step, (GPU,))
    with torch.no_grad():
        out = found(*mine)
    (decision,) = found.decisions("recurrence")
    assert decision.outcome == "rewritten" and decision.spec["decay"] in (decay, "value"), decision
    assert targets(found.graphs[GPU][0]).count(UPDATE) == 1 and COPY not in targets(found.graphs[GPU][0])
    for ours, theirs, reference in ((out, beside, wanted), (mine[0], eager[0], exact[0])):
        assert (ours - reference).norm() <= 2 * (theirs - reference).norm() + 1e-6 * reference.norm()
    for ours, before in zip(mine[1:], args[1:], strict=True):
        assert torch.equal(ours, before)


@pytest.mark.parametrize("name", ["gla", "values first"])
def test_inductor_hands_the_state_itself_to_the_operation(name: str) -> None:
    step, _, turned = STEPS[name]
    args = operands(turned=turned)
    eager = [x.clone() for x in args]
    wanted = step(*eager)
    torch._dynamo.reset()
    with torch.no_grad(), _preferring_ours():
        out, (code,) = run_and_get_code(torch.compile(step, backend="effarch", fullgraph=True), *args)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(args[0], eager[0])
    assert "recurrence_update.default(" in code
    made = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)
    assert made and all(_count(sizes) < B * H * K * V for sizes in made), made


def _count(sizes: str) -> int:
    return int(torch.tensor([int(n) for n in sizes.split(",") if n.strip()]).prod())


# -------------------------------------------------------------------- near misses: recognised, but not in place


def updates_of(step: Step, *args: Tensor) -> Updates:
    """What becomes of the states of a function; the graph that is run is the original."""
    found: list[Updates] = []

    def remember(*given: Any) -> Updates:
        found.append(update_in_place(*given))
        return found[-1]

    def backend(module: GraphModule, inputs: list[Any]) -> Any:
        result = Pipeline(Config.resolve(None, {"hardware": GPU})).run(module, inputs)
        assert result.error is None and not result.failures
        return module.forward

    torch._dynamo.reset()
    with mock.patch.object(pipeline, "update_in_place", remember), _preferring_ours():
        torch.compile(step, backend=backend, fullgraph=True)(*args)
    (updates,) = found
    return updates


def returned_too(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Any:
    out = gla(state, q, k, v, gate)
    return out, state * 1.0


def scan_of_steps(steps: int, keep: Callable[[Tensor], Tensor]) -> Step:
    def run(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        def body(s: Tensor, x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            q, k, v = x
            s = s * 0.9 + k[..., None] * v[..., None, :]
            return s, (q[..., None] * s).sum(-2)

        xs = tuple(x.expand(steps, *x.shape).contiguous() for x in (q, k, v))
        last, out = torch._higher_order_ops.scan(body, state.clone(), xs)
        state.copy_(keep(last))
        return out

    return run


def first_state_read_again(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    new = state * torch.sigmoid(gate)[..., None] + k[..., None] * v[..., None, :]
    out = (q[..., None] * new).sum(-2)
    out = out + state.amax((-1, -2))[..., None]
    state.copy_(new)
    return out


LEFT: dict[str, tuple[Step, str]] = {
    "first state read again": (first_state_read_again, "amax_default reads the first state afterwards"),
    "many steps": (scan_of_steps(12, lambda x: x), "of more than 8 steps, the copy is the smaller part"),
    "another order": (scan_of_steps(3, lambda x: x.flip(-1)), "element by element"),
}


@pytest.mark.parametrize("name", LEFT)
def test_states_that_are_copied(name: str) -> None:
    step, why = LEFT[name]
    updates = updates_of(step, *operands())
    assert not updates.made and any(why in line for line in updates.left), updates


def test_few_steps_of_a_scan_are_updated_in_place() -> None:
    step = scan_of_steps(3, lambda x: x)
    updates = updates_of(step, *operands())
    assert len(updates.made) == 1 and not updates.left, updates


def test_a_gradient_keeps_the_first_state() -> None:
    args = operands()
    args[1].requires_grad_()
    updates = updates_of(scan_of_steps(3, lambda x: x), *args)
    assert not updates.made and any("a gradient needs the first state" in line for line in updates.left), updates


# -------------------------------------------------------------------- near misses: no step of a recurrence of products


def elements(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    state.copy_(state * torch.sigmoid(v)[..., None, :] + k[..., None] * v[..., None, :])
    return state.tanh().sum((-1, -2)) + (q[..., None] * state).sum(-2).sum(-1)


def own_decay_of_each_element(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    state.copy_(state * torch.exp(-(gate[..., None] * v[..., None, :]).abs()) + k[..., None] * v[..., None, :])
    return (q[..., None] * state).sum(-2)


def sees_itself(state: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    state.copy_(state * torch.sigmoid(state) + k[..., None] * v[..., None, :])
    return (q[..., None] * state).sum(-2)


REFUSED: dict[str, tuple[Step, list[Tensor], str]] = {
    "narrow state": (
        gla,
        operands(state=torch.bfloat16),
        "kept in torch.bfloat16 and updated in torch.float32, which takes its casts",
    ),
    "read in another way": (elements, operands(), "one step of a state that no product writes and reads"),
    "decays of elements": (own_decay_of_each_element, operands(), "would write a state of its own"),
    "a factor that is the state's own": (sees_itself, operands(), "would write a state of its own"),
    "returned": (returned_too, operands(), "one step of a state that no product writes and reads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_step_is_left_as_it_came(name: str) -> None:
    step, args, why = REFUSED[name]
    eager = [x.clone() for x in args]
    wanted = step(*eager)
    found = Compiled(step, (GPU,))
    with torch.no_grad():
        out = found(*args)
    refused = [d for d in found.decisions("recurrence") if d.outcome == "refused"]
    assert refused and not [d for d in found.decisions("recurrence") if d.outcome == "rewritten"]
    assert any(why in d.why for d in refused), refused
    assert UPDATE not in targets(found.graphs[GPU][0])
    for ours, theirs in zip(torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(wanted), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(args[0], eager[0])


def test_steps_that_learn_are_left_as_they_came() -> None:
    args = operands()
    args[1].requires_grad_()
    found = Compiled(gla, (GPU,))
    with torch.enable_grad():
        found(*args)
    (decision,) = found.decisions("recurrence")
    assert decision.outcome == "refused" and "a gradient needs the state" in decision.why


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_is_taken_back_leaves_no_trace(name: str) -> None:
    step, _, turned = STEPS[name]
    listings: list[str] = []

    def backend(module: GraphModule, inputs: list[Any]) -> Any:
        lifted = trace.lift(module, inputs).graph_module
        normalize(lifted)
        listings.append(listing(lifted))
        found, refused = single_steps.find(lifted)
        assert len(found) == 1 and not refused
        for substitution in found:
            substitution.apply()
        listings.append(listing(lifted))
        for substitution in found:
            substitution.undo()
        lifted.graph.lint()
        listings.append(listing(lifted))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(step, backend=backend, fullgraph=True)(*operands(turned=turned))
    before, applied, after = listings
    assert "linear_scan" in applied and before == after
