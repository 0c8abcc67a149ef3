"""The experts of a Mixture of Experts as one operation: specification and plain-PyTorch reference.

Token t goes to the experts ids[t, 0], ..., ids[t, k-1], and their results are added up:

    y_t = sum_s w[t,s] (act(x_t U_e + b1_e) D_e + b2_e),    e = ids[t,s]                       (weighted = "output")
    y_t = sum_s         act((w[t,s] x_t) U_e + b1_e) D_e + b2_e                                (weighted = "input")

An id outside 0..E-1 drops its assignment: it adds nothing. The activation is an expression of `gate` and `up`, the two halves of
what the first projection gives, or of `up` alone where that has no gate: SwiGLU is `gate * sigmoid(gate) * up`, squared ReLU
`max(0, up) ** 2`, the clamped gate of GPT-OSS `(up + 1) * gate * sigmoid(1.702 * gate)` of clamped `gate` and `up`.

How the weights are stored (U_e is [d, F], D_e is [f, d_out]; F = 2 f with a gate, else f):

    stacking        up                                       down                  biases
    one             one tensor [E, d, F]                     one [E, f, d_out]     [E, F];  [E, d_out]
    pair            gate [E, d, f], up [E, d, f]             one [E, f, d_out]     [E, f], [E, f];  [E, d_out]
    experts         E tensors [d, F]                         E [f, d_out]          E [F];  E [d_out]
    experts_pair    E gates [d, f], then E ups [d, f]        E [f, d_out]          E [f], E [f];  E [d_out]

Each is a view of any strides, so that a Linear's weight [F, d] is passed transposed, without a copy. `biases` holds the first
projection's biases, stored as `up` is, then the second's, stored as `down` is, each if the specification says that it is there.

For the gradient, beside the operands only the pre-activation H [T k, F] is kept: x_t U_e + b1_e of each assignment, in the order of
`(ids == e).nonzero()` for e = 0, 1, ..., dropped assignments last (their rows may hold anything), columns in the order of U_e's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import torch

from ..evaluate import Evaluator
from ..terms import Load, Term, from_text

Stacking = Literal["one", "pair", "experts", "experts_pair"]
Weighted = Literal["output", "input", "none"]
Tensors = Sequence[torch.Tensor]

SPEC_VERSION = 1  # part of the key of compiled graphs: raised when an operator's schema changes
SYMBOLS = frozenset({"gate", "up"})
STACKINGS = ("one", "pair", "experts", "experts_pair")
WEIGHTED = ("output", "input", "none")
GRADIENTS = ("x", "weights", "up", "down", "biases")
"""The operands that can have a gradient, in the order of `experts_backward`'s argument `wanted`."""


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """The meaning of a layer of experts, without its tensors.

    Attributes:
        activation: an expression (see `effcompile.terms`) of `gate` and `up`, or of `up` alone.
        gated: whether the first projection has a gate beside `up`.
        interleaved: in a first projection that is one tensor, gate stands in the even columns and `up` in the odd ones; else gate
            stands in the first half of the columns.
        stacking: how the weights and biases are stored, see above.
        biased: whether the first and the second projection have a bias.
        weighted: what the routing weight multiplies, the expert's output or its input; with "none" there are no weights.
        out: dtype of the result.
    """

    activation: str = "gate * up * sigmoid(gate)"
    gated: bool = True
    interleaved: bool = False
    stacking: Stacking = "one"
    biased: tuple[bool, bool] = (False, False)
    weighted: Weighted = "output"
    out: str = "float32"
    version: int = SPEC_VERSION

    def __post_init__(self) -> None:
        for name, value, legal in (("stacking", self.stacking, STACKINGS), ("weighted", self.weighted, WEIGHTED)):
            if value not in legal:
                raise ValueError(f"Expected {name} to be one of {legal} but got {name}={value!r}")
        if self.is_pair and not self.gated:
            raise ValueError(f"Expected a gate where its weights stand apart but got stacking={self.stacking!r}, gated=False")
        if self.interleaved and (self.is_pair or not self.gated):
            raise ValueError(f"Expected gate and up in one tensor where they are interleaved but got {self!r}")
        if not isinstance(getattr(torch, self.out, None), torch.dtype):
            raise ValueError(f"Expected out to name a dtype but got out={self.out!r}")
        term = activation_term(self.activation)
        unknown = {symbol.name for symbol in term.free_symbols} - (SYMBOLS if self.gated else {"up"})
        if unknown or term.has(Load):
            names = "`gate` and `up`" if self.gated else "`up`"
            raise ValueError(f"Expected an activation of {names} but got activation={self.activation!r}")

    @property
    def is_pair(self) -> bool:
        """Whether gate and up are tensors of their own."""
        return self.stacking in ("pair", "experts_pair")

    @property
    def is_stacked(self) -> bool:
        """Whether all experts stand in one tensor."""
        return self.stacking in ("one", "pair")

    @property
    def term(self) -> Term:
        """The activation as a term."""
        return activation_term(self.activation)

    @property
    def out_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.out)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def counts(self, experts: int) -> tuple[int, int, int, int]:
        """How many tensors `up`, `down`, the first and the second bias are."""
        each = 1 if self.is_stacked else experts
        first = 2 * each if self.is_pair else each
        return first, each, first * self.biased[0], each * self.biased[1]

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON-ready values."""
        return asdict(self)

    def to_json(self) -> str:
        """One line of JSON, the same for equal specifications."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    @cache
    def from_json(text: str) -> ExpertsSpec:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return ExpertsSpec(**{**fields, "biased": tuple(fields["biased"])})


@cache
def activation_term(text: str) -> Term:
    """The term that `terms.to_text` wrote, over the real symbols `gate` and `up`."""
    return from_text(text, reals=SYMBOLS)


def expert_count(down: Tensors, spec: ExpertsSpec) -> int:
    """E, the number of experts."""
    return down[0].shape[0] if spec.is_stacked else len(down)


def width(up: Tensors, spec: ExpertsSpec) -> int:
    """F, the columns of the first projection, gate and up together."""
    return up[0].shape[-1] * (2 if spec.is_pair else 1)


def split_biases(biases: Tensors, experts: int, spec: ExpertsSpec) -> tuple[Tensors, Tensors]:
    """The first projection's biases and the second's, each empty where there are none."""
    first = spec.counts(experts)[2]
    return biases[:first], biases[first:]


def of_expert(tensors: Tensors, e: int, experts: int, spec: ExpertsSpec) -> list[torch.Tensor]:
    """Expert e's part of weights or biases: [whole], or [gate, up] where the first projection is a pair."""
    return [x[e] for x in tensors] if spec.is_stacked else list(tensors[e::experts])


def halves(h: torch.Tensor, spec: ExpertsSpec) -> dict[str, torch.Tensor]:
    """The activation's arguments as views of a pre-activation [..., F]."""
    if not spec.gated:
        return {"up": h}
    if spec.interleaved:
        return {"gate": h[..., 0::2], "up": h[..., 1::2]}
    f = h.shape[-1] // 2
    return {"gate": h[..., :f], "up": h[..., f:]}


def reference(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Tensors, down: Tensors, biases: Tensors, spec: ExpertsSpec,
    *, dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The definition, expert by expert in plain PyTorch. How many tokens an expert has is read from `ids`.

    Args:
        x: [T, d].
        ids: [T, k] integers; what is not in 0..E-1 drops its assignment.
        weights: [T, k]; not read with `weighted="none"`, where an empty tensor will do.
        up, down, biases: as `spec.stacking` and `spec.biased` say.
        dtype: to compute in; float32, or float64 for float64 operands, if not given.

    Returns:
        The result [T, d_out] in the dtype of the specification (in `dtype`, if given), and the pre-activation H [T k, F] in the
        dtype of the computation, with zeros for dropped assignments.

    Raises:
        ValueError: operands that do not go together.
    """
    check(x, ids, weights, up, down, biases, spec)
    out_dtype = dtype or spec.out_dtype
    dtype = dtype or torch.promote_types(x.dtype, torch.float32)
    experts = expert_count(down, spec)
    first, second = split_biases(biases, experts, spec)
    out = x.new_zeros((x.shape[0], down[0].shape[-1]), dtype=dtype)
    kept = []
    for e in range(experts):
        token, slot = (ids == e).nonzero(as_tuple=True)
        w = None if spec.weighted == "none" else weights[token, slot].to(dtype)[:, None]
        rows = x[token].to(dtype)
        h = (rows * w if w is not None and spec.weighted == "input" else rows) @ _whole(of_expert(up, e, experts, spec), dtype)
        h = h + _whole(of_expert(first, e, experts, spec), dtype) if first else h
        y = activate(h, spec) @ _whole(of_expert(down, e, experts, spec), dtype)
        y = y + _whole(of_expert(second, e, experts, spec), dtype) if second else y
        out = out.index_add(0, token, y * w if w is not None and spec.weighted == "output" else y)
        kept.append(h)
    dropped = ids.numel() - sum(h.shape[0] for h in kept)
    return out.to(out_dtype), torch.cat([*kept, out.new_zeros((dropped, width(up, spec)))])


def _whole(parts: Tensors, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([x.to(dtype) for x in parts], dim=-1)


def activate(h: torch.Tensor, spec: ExpertsSpec) -> torch.Tensor:
    """The activation [..., f] of a pre-activation [..., F], in its dtype."""
    arguments = halves(h, spec)
    value = Evaluator(arguments, {}, dtype=h.dtype, device=h.device).tensor(spec.term, h.dtype)
    return torch.as_tensor(value).expand(arguments["up"].shape)


def each_operand(
    x: torch.Tensor, weights: torch.Tensor, up: Tensors, down: Tensors, biases: Tensors, wanted: Sequence[bool]
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Every operand that can have a gradient, in the order of `experts_backward`'s results, and whether it is wanted."""
    for tensors, want in zip(([x], [weights], up, down, biases), wanted, strict=True):
        yield from ((tensor, want) for tensor in tensors)


def reference_backward(
    grad: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Tensors, down: Tensors, biases: Tensors,
    spec: ExpertsSpec, wanted: Sequence[bool], *, dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of x, weights, each of up, down and biases, by autograd through the definition; empty where `wanted` says no."""
    operands = list(each_operand(x, weights, up, down, biases, wanted))
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(want) for tensor, want in operands]
        groups = iter(leaves)
        own_x, own_weights = next(groups), next(groups)
        own_up, own_down, own_biases = ([next(groups) for _ in tensors] for tensors in (up, down, biases))
        out, _ = reference(own_x, ids, own_weights, own_up, own_down, own_biases, spec, dtype=dtype)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        if asked and out.requires_grad:
            found = torch.autograd.grad(out, asked, grad.to(out.dtype), materialize_grads=True)
        else:
            found = tuple(torch.zeros_like(leaf) for leaf in asked)
    results = iter(found)
    return [torch.empty_like(leaf).copy_(next(results)) if leaf.requires_grad else leaf.new_empty(0) for leaf in leaves]


# -------------------------------------------------------------------- what the operands have to be


def check(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Tensors, down: Tensors, biases: Tensors, spec: ExpertsSpec
) -> None:
    """Refuse operands that do not go together. Sizes that are not known yet count as right.

    Raises:
        ValueError: naming the operand, what it should be and what it is.
    """
    _check_lists(up, down, biases, spec)
    experts, f = expert_count(down, spec), down[0].shape[-2]
    halved = 2 if spec.gated and not spec.is_pair else 1
    t, k, d, out = x.shape[0], ids.shape[-1] if ids.dim() else 1, x.shape[-1], down[0].shape[-1]
    stack = (experts,) if spec.is_stacked else ()
    first, second = split_biases(biases, experts, spec)
    _check_shape("x", x, (t, d), "[T, d]")
    _check_shape("ids", ids, (t, k), "[T, k]")
    if spec.weighted != "none":
        _check_shape("weights", weights, (t, k), "[T, k], as ids")
    for name, tensors, shape, told in (
        ("up", up, (*stack, d, halved * f), "d rows of F columns for an expert"),
        ("down", down, (*stack, f, out), "f rows of d_out columns for an expert"),
        ("biases", first, (*stack, halved * f), "F values for an expert"),
        ("biases", second, (*stack, out), "d_out values for an expert"),
    ):
        for tensor in tensors:
            _check_shape(name, tensor, shape, told)
    _check_dtypes(x, ids, up, down)


def _check_lists(up: Tensors, down: Tensors, biases: Tensors, spec: ExpertsSpec) -> None:
    if not down or (spec.is_stacked and down[0].dim() != 3):
        raise ValueError(f"Expected down to be [E, f, d_out] or a tensor for each expert but got down={_shapes(down)}")
    if not expert_count(down, spec):
        raise ValueError(f"Expected at least one expert but got down={_shapes(down)}")
    counts = spec.counts(expert_count(down, spec))
    for name, tensors, count in (("up", up, counts[0]), ("down", down, counts[1]), ("biases", biases, counts[2] + counts[3])):
        if len(tensors) != count:
            raise ValueError(
                f"Expected {count} tensors in {name} for stacking={spec.stacking!r}, biased={spec.biased!r}"
                f" but got {name}={_shapes(tensors)}"
            )


def _shapes(tensors: Tensors) -> str:
    return f"[{', '.join(str(tuple(x.shape)) for x in tensors[:4])}{', ...' if len(tensors) > 4 else ''}] ({len(tensors)} tensors)"


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[Any, ...], told: str) -> None:
    got = tuple(tensor.shape)
    known = [(a, b) for a, b in zip(got, shape, strict=False) if isinstance(a, int) and isinstance(b, int)]
    if len(got) != len(shape) or any(a != b for a, b in known):
        raise ValueError(f"Expected {name} to have the shape {shape}, {told}, but got {name}.shape={got!r}")


def _check_dtypes(x: torch.Tensor, ids: torch.Tensor, up: Tensors, down: Tensors) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"Expected ids of an integer dtype but got ids.dtype={ids.dtype!r}")
    for name, tensors in (("up", up), ("down", down)):
        for tensor in tensors:
            if tensor.dtype != x.dtype:
                raise ValueError(f"Expected {name} in the dtype of x, {x.dtype}, but got {name}.dtype={tensor.dtype!r}")
