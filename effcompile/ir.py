"""The nouns: frozen records that the rooms hand to one another.

A *rule* recognises; it returns a `Match` (what the subgraph means) or a `Rejected` (why not). The cost model turns a match and
its `Candidate`s into a `Decision`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch.fx import Node

Outcome = Literal["rewritten", "left", "refused"]
CandidateKind = Literal["generated", "library", "inductor"]
Bound = Literal["compute", "memory", "launch"]


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A rule did not apply. `step` names the stage of recognition, `node` the place that stopped it.

    `error` is what was raised, which nothing should.
    """

    why: str
    step: str = ""
    node: Node | None = None
    error: Exception | None = None


@dataclass(frozen=True, kw_only=True)
class Match:
    """A subgraph and its meaning: `output` equals the semantic operation `spec` of `inputs`.

    `inputs` are the operation's tensor operands by role; `captures` the further tensors that its expressions load from, by name;
    `sizes` the symbolic integers they mention, by name. `interior` are the nodes that vanish with the rewrite;
    `layout` the index of each of `output`'s dimensions, in the operation's own index symbols; `further` the nodes that equal
    another result of the operation, with its name and their layout; `trains` says whether a gradient will be asked for; `leaving`
    what the subgraph costs if it is left as it is, where the candidates cannot tell from the operation alone.
    """

    family: str
    anchor: Node
    output: Node
    spec: Any
    inputs: Mapping[str, Operand | Computed]
    captures: Mapping[str, Node] = field(default_factory=lambda: MappingProxyType({}))
    sizes: Mapping[str, Node | int] = field(default_factory=lambda: MappingProxyType({}))
    interior: frozenset[Node] = frozenset()
    layout: tuple[Any, ...] = ()
    further: Mapping[Node, Result] = field(default_factory=lambda: MappingProxyType({}))
    trains: bool = False
    leaving: Work | None = None

    @property
    def bases(self) -> frozenset[Node]:
        """The nodes that the operation will be computed from."""
        sizes = (size for size in self.sizes.values() if isinstance(size, Node))
        return frozenset((*(base for x in self.inputs.values() for base in x.bases), *self.captures.values(), *sizes))


@dataclass(frozen=True, kw_only=True)
class Result:
    """A further result of an operation: its name, and the index of each dimension of the node that equals it."""

    name: str
    layout: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Operand:
    """A tensor operand, as a chain of views on a node of the graph.

    `views` are `(overload, args)` pairs applied to `base` in turn; `shape` and `dtype` describe the result, which the rewriter
    casts to `dtype` if the base has another.
    """

    base: Node
    views: tuple[tuple[Any, tuple[Any, ...]], ...] = ()
    shape: tuple[Any, ...]
    dtype: Any

    @property
    def bases(self) -> tuple[Node, ...]:
        return (self.base,)


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A tensor operand that further nodes compute: `compute(builder, nodes)` of `parts`."""

    parts: tuple[Operand, ...]
    compute: Callable[[Any, Sequence[Node]], Node]
    shape: tuple[Any, ...]
    dtype: Any

    @property
    def bases(self) -> tuple[Node, ...]:
        return tuple(part.base for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One recogniser. `anchors` are the overloads at which it is tried; `recognise(anchor, view)` matches or says why not.

    `early` rules are tried before loops are brought to one spelling. `quiet` ones have common operations as anchors: where
    nothing of their family begins, that is not recorded.
    """

    name: str
    family: str
    summary: str
    anchors: frozenset[Any]
    recognise: Callable[[Node, Any], Match | Rejected]
    early: bool = False
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a computation costs at least: arithmetic and main-memory traffic. Numbers, or sympy in the graph's sizes."""

    flops: Any
    bytes: Any
    transcendentals: Any = 0
    launches: int = 1


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to carry out a match. `efficiency` is the share of the peak rates that this kind of kernel reaches."""

    name: str
    kind: CandidateKind
    work: Work
    compute_efficiency: float = 1.0
    memory_efficiency: float = 1.0
    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Predicted time of one candidate, in seconds, by the roof that it meets.

    `flops` and `bytes` are what it was predicted from, `matmul_tflops` the rate that its operands' type sustains.
    """

    candidate: str
    compute_s: float
    memory_s: float
    launch_s: float
    flops: float = 0.0
    bytes: float = 0.0
    matmul_tflops: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds: the longer of compute and memory, plus launches."""
        return max(self.compute_s, self.memory_s) + self.launch_s

    @property
    def bound(self) -> Bound:
        """The largest of the three terms."""
        terms: dict[Bound, float] = {"compute": self.compute_s, "memory": self.memory_s, "launch": self.launch_s}
        return max(terms, key=lambda name: terms[name])


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was made of one site, and why, in one sentence that a person understands."""

    family: str
    outcome: Outcome
    why: str
    where: str
    spec: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    chosen: str = ""
    estimates: tuple[Estimate, ...] = ()
    step: str = ""
