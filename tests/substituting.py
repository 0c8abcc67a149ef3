"""What tests of a finder of scans say: this function is a scan and computes the same, that one is left for this reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from effcompile import debug
from effcompile.ir import Rejected
from effcompile.passes.tentative import Substitution

SCAN = torch.ops.effcompile.linear_scan.default
FUNCTORCH = (
    "_vmap_increment_nesting",
    "_vmap_decrement_nesting",
    "_add_batch_dim",
    "_remove_batch_dim",
    "lazy_load_decompositions",
)

Find = Callable[[GraphModule], tuple[list[Substitution], list[Rejected]]]


@dataclass(frozen=True)
class Replaced:
    """A graph in which all that was found has been replaced."""

    graph: GraphModule
    substitutions: list[Substitution]
    reasons: list[str]

    @property
    def scans(self) -> list[Node]:
        return [node for node in self.graph.graph.nodes if node.target is SCAN]

    @property
    def names(self) -> list[str]:
        """The operations of the graph, by name."""
        return [
            getattr(n.target, "__name__", str(n.target)).split(".")[0] for n in self.graph.graph.nodes if n.op == "call_function"
        ]


def replaced(find: Find, f: Callable[..., Any], *args: Any) -> Replaced:
    """Capture `f`, replace all that is found, and check that the graph computes what `f` does.

    Each substitution is first applied and taken back, which must leave the graph as it was.
    """
    torch._dynamo.reset()
    graph = debug.capture(f, *args)
    before = graph.print_readable(print_output=False)
    for substitution in find(graph)[0]:
        graph.graph.lint()
        substitution.apply()
        graph.graph.lint()
        substitution.undo()
    graph.graph.lint()
    graph.recompile()
    assert graph.print_readable(print_output=False) == before
    substitutions, rejected = find(graph)
    for substitution in substitutions:
        check_meta(substitution)
        substitution.apply()
    for substitution in substitutions:
        substitution.commit()
    graph.graph.lint()
    graph.recompile()
    assert_equal(graph(*debug.example_inputs(graph)), f(*args))
    return Replaced(graph, substitutions, [x.why for x in rejected])


def check_meta(substitution: Substitution) -> None:
    """The substitutes have the shapes, dtypes and memory order of what they replace."""
    assert substitution.scans and all(node.target is SCAN for node in substitution.scans)
    for old, new in substitution.pairs:
        a, b = old.meta["val"], new.meta["val"]
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        long = [k for k, n in enumerate(a.shape) if n != 1]
        assert sorted(long, key=a.stride) == sorted(long, key=b.stride)


def assert_equal(found: Any, wanted: Any) -> None:
    for x, y in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        torch.testing.assert_close(x, y, **({"rtol": 1e-8, "atol": 1e-10} if x.dtype is torch.float64 else {}))


def assert_scans(find: Find, f: Callable[..., Any], *args: Any, count: int = 1) -> Replaced:
    """`f` becomes `count` scans, of nothing that is left in functorch regions."""
    result = replaced(find, f, *args)
    assert len(result.scans) == count, (result.reasons, result.names)
    assert result.reasons == []
    assert not set(FUNCTORCH) & set(result.names)
    return result


def assert_left(find: Find, f: Callable[..., Any], *args: Any, why: str) -> None:
    """`f` has no scan; a reason that matches `why` is given, or none at all if `why` is empty."""
    result = replaced(find, f, *args)
    assert result.scans == [], "a scan was found"
    if why:
        assert any(re.search(why, reason) for reason in result.reasons), result.reasons
    else:
        assert result.reasons == []
