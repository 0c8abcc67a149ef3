"""A scan, taken apart into operations on whole sequences, as far as its states are linear recurrences.

    state_t = c_t * state_{t-1} + o_t   with c, o free of this state   ->   linear_scan(c, o, initial)
    state_t = max(state_{t-1} + g_t, x_t)                              ->   F + max(initial, cummax(x - F)),   F = cumsum(g)
    state_t = x_t                                                      ->   x, one step late
    everything else that a step computes                               ->   the same for all steps at once

States are solved one after the other: one that is solved is a sequence like any other to the next. The running maximum by which
RWKV and mLSTM keep their exponents small is such a state of its own, so the sums that it stabilises are linear recurrences with
known factors.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from effcompile.builder import Builder, is_pure
from effcompile.ir import Rejected
from effcompile.ops import linear_scan as _linear_scan  # noqa: F401  defines the operator
from effcompile.pattern import GraphView, describe

from .affine import Known, Maximum, Step, combined, lifted, source_of
from .tentative import Stop, Substitution, substitutions

aten = torch.ops.aten
SCAN = torch.ops.higher_order.scan
LINEAR_SCAN = torch.ops.effcompile.linear_scan.default
CONTRACT = torch.ops.effcompile.contract.default


def find(module: GraphModule, view: GraphView) -> tuple[list[Substitution], list[Rejected]]:
    """The scans of a graph, each with what it amounts to, added to the graph and not yet used; and why others are left alone."""
    scans = [node for node in module.graph.nodes if node.op == "call_function" and node.target is SCAN]
    return substitutions(((node, partial(_substitution, node, view)) for node in scans), "scan")


def why_not(body: GraphModule, states: int, sequences: int, steps: int) -> str | None:
    """Why a loop with this body, in ATen operators with fake values, would not be taken apart; None if it would."""
    places = [node for node in body.graph.nodes if node.op == "placeholder"]
    values = [node.meta["val"] for node in places]
    if not sequences:
        return "nothing is read step by step"
    try:
        with Builder(body.graph, places[0]).fake_mode(), torch.no_grad():
            for k in range(states, states + sequences):
                values[k] = values[k].new_empty((steps, *values[k].shape))
            _Whole(body.graph, states, sequences).run(*values)
    except Stop as stop:
        return str(stop)
    return None


def _substitution(node: Node, view: GraphView, builder: Builder) -> Substitution:
    body_attribute, initial, xs, further = node.args[:4]
    body = view.body(body_attribute)  # type: ignore[arg-type]
    inputs = [*initial, *xs, *further]  # type: ignore[misc]
    fakes = [x.meta["val"] for x in inputs]
    if not xs or any(isinstance(n, int) and n == 0 for n in fakes[len(initial)].shape[:1]):  # type: ignore[arg-type]
        raise Stop("the scan has no steps")
    whole = _Whole(body, len(initial), len(xs))  # type: ignore[arg-type]
    with builder.fake_mode(), torch.no_grad():
        traced = make_fx(whole.run, tracing_mode="real")(*fakes)
    results = _inline(traced, inputs, builder)
    pairs = []
    for user in node.users:
        assert user.target is operator.getitem
        pairs.append((user, _like(builder, results[user.args[1]], user)))  # type: ignore[index]
    scans = tuple(n for n in builder.added if n.target is LINEAR_SCAN)
    return Substitution(what="scan", anchor=node, pairs=tuple(pairs), scans=scans)


def _inline(traced: GraphModule, inputs: list[Node], builder: Builder) -> list[Node]:
    """The nodes of a traced function, on `inputs`; returns its results."""
    traced.graph.eliminate_dead_code()
    given = iter(inputs)
    copies: dict[Node, Node] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(given)
        elif node.op == "get_attr":
            raise Stop("a step holds a constant tensor of its own")
        elif node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: copies[n])
            if node.target is CONTRACT:
                copies[node] = builder.call(aten.einsum.default, args[0], list(args[1:]))
            else:
                copies[node] = builder.call(node.target, *args, **kwargs)
    output = next(n for n in traced.graph.nodes if n.op == "output")
    return [copies[x] for x in output.args[0]]


def _like(builder: Builder, new: Node, old: Node) -> Node:
    """`new` with dtype and strides of `old`."""
    if new.meta["val"].dtype != old.meta["val"].dtype:
        new = builder.call(aten._to_copy.default, new, dtype=old.meta["val"].dtype)
    if new.meta["val"].stride() != old.meta["val"].stride() and old.meta["val"].is_contiguous():
        new = builder.call(aten.clone.default, new, memory_format=torch.contiguous_format)
    return new


class _Whole:
    """Runs the body of a scan for all steps at once. `run` is made to be traced."""

    def __init__(self, body: torch.fx.Graph, states: int, sequences: int):
        self.nodes = list(body.nodes)
        self.placeholders = [n for n in self.nodes if n.op == "placeholder"]
        self.states = self.placeholders[:states]
        self.sequences = self.placeholders[states : states + sequences]
        self.outputs = list(next(n for n in self.nodes if n.op == "output").args[0])  # type: ignore[arg-type]
        self.known: dict[Node, Known] = {}
        self._check()
        self.needs = {state: self.inputs_of(self.outputs[k]) & set(self.states) for k, state in enumerate(self.states)}

    def _check(self) -> None:
        for node in self.nodes:
            if node.op == "get_attr":
                raise Stop("a step holds a constant tensor of its own")
            if node.op == "call_function" and not is_pure(node):
                raise Stop(f"a step contains {describe(node)}, which has an effect or draws random numbers")

    def inputs_of(self, node: Any) -> set[Node]:
        """All that a node is computed from, itself included."""
        seen: set[Node] = set()
        frontier = [node]
        while frontier:
            current = frontier.pop()
            if isinstance(current, Node) and current not in seen:
                seen.add(current)
                frontier += current.all_input_nodes
        return seen

    def run(self, *inputs: Any) -> list[Any]:
        """All results of the scan: last states, then the sequences of outputs."""
        self.length = inputs[len(self.states)].shape[0]
        for node, value in zip(self.placeholders, inputs, strict=True):
            if node not in self.states:
                self.known[node] = Known(value, node in self.sequences)
        last = self._solve(dict(zip(self.states, inputs, strict=False)))
        results = [last[state] for state in self.states]
        return results + [self._sequence(self.value(out)) for out in self.outputs[len(self.states) :]]

    def value(self, node: Any) -> Known:
        """A node that depends on solved states alone, for all steps at once."""
        if not isinstance(node, Node):
            return Known(node, False)
        missing = self.inputs_of(node) - set(self.known)
        for current in self.nodes if missing else ():
            if current in missing:
                self.known[current] = lifted(current, self.known)
        return self.known[node]

    def _solve(self, initial: dict[Node, Any]) -> dict[Node, Any]:
        """The last value of each state; its values before each step are known from then on."""
        last: dict[Node, Any] = {}
        unsolved = list(self.states)
        while unsolved:
            state = next((s for s in unsolved if self.needs[s] - {s} <= set(last)), None)
            if state is None:
                raise Stop("its states depend on one another")
            unsolved.remove(state)
            if self.outputs[self.states.index(state)] is state:
                self.known[state], last[state] = Known(initial[state], False), initial[state]
                continue
            after = self._states(state, initial[state])
            self._learn(self.outputs[self.states.index(state)], after)
            before = torch.cat([initial[state].to(after.dtype).unsqueeze(0), after[:-1]])
            self.known[state], last[state] = Known(before, True), after[-1]
        return last

    def _learn(self, output: Node, after: Any) -> None:
        """The new value of a state is known, and so is what it is a view of: a step may read either."""
        value = Known(after, True)
        while output not in self.known:
            self.known[output] = value
            source = source_of(output)
            if source is None:
                return
            output, back = source
            value = combined(back, value)

    def _states(self, state: Node, initial: Any) -> Any:
        """The values of a state after each step."""
        new = Step(self, state).solve(self.outputs[self.states.index(state)])
        if isinstance(new, Known):
            return self._sequence(new)
        if not initial.dtype.is_floating_point:
            raise Stop(f"a state of {initial.dtype} changes from step to step")
        if isinstance(new, Maximum):
            return self._running_maximum(new, initial)
        factor = None if new.factor is None else self._factor(new.factor, initial)
        offset = torch.zeros_like(initial) if new.shift is None else new.shift
        return LINEAR_SCAN(factor, self._full(offset, initial), initial)

    def _running_maximum(self, new: Maximum, initial: Any) -> Any:
        other = self._full(new.other, initial)
        if new.rise is None:
            return torch.maximum(other.cummax(0)[0], initial)
        total = self._full(new.rise, initial).cumsum(0)
        return total + torch.maximum((other - total).cummax(0)[0], initial)

    def _sequence(self, known: Known) -> Any:
        """With the steps as the first dimension."""
        return known.value if known.batched else known.value.unsqueeze(0).expand(self.length, *known.value.shape)

    def _full(self, known: Any, like: Any) -> Any:
        """A sequence of values of the shape and dtype of `like`."""
        known = known if isinstance(known, Known) else Known(known, False)
        value = self._factor(known, like)
        return value.expand(self.length, *like.shape).to(like.dtype)

    def _factor(self, known: Known, like: Any) -> Any:
        """A tensor with the steps, or 1, as the first dimension and one more dimension than `like`."""
        value = known.value
        if not isinstance(value, torch.Tensor):
            return torch.full((1,) * (like.dim() + 1), value, dtype=like.dtype, device=like.device)
        value = value if known.batched else value.unsqueeze(0)
        return value.reshape(value.shape[:1] + (1,) * (like.dim() + 1 - value.dim()) + value.shape[1:])
