"""An activation of experts, and its slopes, as Python functions of torch tensors, written from its term.

A pre-activation is taken in blocks of rows that stay in a core's cache: the operations of an activation then pass over memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import sympy
import torch

from effcompile.ops.experts import ExpertsSpec, activation_term, halves
from effcompile.printers import shared, to_torch
from effcompile.terms import Term, derivative

Function = Callable[..., tuple[torch.Tensor, ...]]

_BLOCK = 1 << 17
"""Elements of a block: with its temporaries it fits a second-level cache."""


@dataclass(frozen=True)
class Activation:
    """Functions of `arguments`: gate and up, or up alone. `value` is (activation,), `slopes` (activation, slope by each)."""

    arguments: tuple[str, ...]
    value: Function
    slopes: Function


@lru_cache(maxsize=256)
def activation(text: str, gated: bool) -> Activation:
    """The functions of an activation.

    Raises:
        ExpressionError: a function in it that torch lacks, or without a derivative.
    """
    arguments = ("gate", "up") if gated else ("up",)
    term = activation_term(text)
    slopes = [derivative(term, sympy.Symbol(name, real=True)) for name in arguments]
    return Activation(arguments, _function(arguments, [term]), _function(arguments, [term, *slopes]))


def _function(arguments: Sequence[str], terms: Sequence[Term]) -> Function:
    """A function of tensors that gives every term as a tensor, what they share computed once."""
    names: dict[Term, str] = {}
    lines = []
    for at, part in enumerate(shared(terms)):
        lines.append(f"    x{at} = {to_torch(part, names)}")
        names[part] = f"x{at}"
    results = ", ".join(_tensor(term, names) for term in terms)
    source = "\n".join([f"def function({', '.join(arguments)}):", *lines, f"    return ({results},)"])
    namespace = {"torch": torch}
    exec(source, namespace)  # written from a parsed term: its names are those above, its functions torch's
    return namespace["function"]  # type: ignore[return-value]


def _tensor(term: Term, names: dict[Term, str]) -> str:
    """A term that is the same everywhere, such as the slope of `up`, becomes a tensor."""
    text = to_torch(term, names)
    return text if term.free_symbols else f"torch.full_like(up, {text})"


def activate(h: torch.Tensor, spec: ExpertsSpec) -> torch.Tensor:
    """The activation [N, f] of a pre-activation [N, F], computed in float32 at least, in the dtype of `h`."""
    functions = activation(spec.activation, spec.gated)
    parts = list(blocks(h))
    if len(parts) == 1:
        return functions.value(**wide_halves(h, spec))[0].to(h.dtype)
    out = h.new_empty((h.shape[0], h.shape[1] // len(functions.arguments)))
    for rows in parts:
        out[rows] = functions.value(**wide_halves(h[rows], spec))[0]
    return out


def blocks(h: torch.Tensor) -> Iterator[slice]:
    """The rows of a pre-activation [N, F], on a CPU in blocks."""
    step = max(1, _BLOCK // max(1, h.shape[1])) if h.device.type == "cpu" else max(1, h.shape[0])
    yield from (slice(start, start + step) for start in range(0, h.shape[0], step))


def wide_halves(h: torch.Tensor, spec: ExpertsSpec) -> dict[str, torch.Tensor]:
    """The activation's arguments, in float32 at least."""
    return {name: part.to(torch.promote_types(h.dtype, torch.float32)) for name, part in halves(h, spec).items()}
