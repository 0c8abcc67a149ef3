"""The text of the kernel file of a layer of experts: importable, readable, with nothing of ours needed to run it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from effcompile.ops.experts import ExpertsSpec
from effcompile.printers import shared, to_torch, to_triton
from effcompile.terms import Term, derivative, to_text

from . import emit, weave
from .recurrence_source import _assigns, trim

_TEMPLATES = {
    "experts_parts": "Loads", "experts_order_kernels": "Order", "experts_kernels": "Rows", "experts_few_kernels": "Few assignments",
    "recurrence_hosts": "Starting", "experts_launches": "Launches",
}  # fmt: skip
_FLAGS = ("GATED", "INTERLEAVED", "WEIGHTED_IN", "WEIGHTED_OUT", "APART")
_SETTINGS = (*_FLAGS, "PAIR", "PRECISION", "RUNTIME", "TILES", "OUTER", "FEW", "activation", "activation_and_slopes")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a file holds beside the specification: launch configurations, see `experts_launches`, tiles by rising rows.

    `precision`: of float32's products; of no consequence for operands of 16 bits.
    """

    dtype: str
    precision: str
    tiles: Sequence[Mapping[str, Mapping[str, int]]]
    outer: Mapping[str, int]
    few: Mapping[str, Mapping[str, int]]
    fast_tanh: bool = False


def flags(spec: ExpertsSpec) -> dict[str, bool]:
    """The template's flags for a specification."""
    return {
        "GATED": spec.gated,
        "INTERLEAVED": spec.interleaved,
        "WEIGHTED_IN": spec.weighted == "input",
        "WEIGHTED_OUT": spec.weighted == "output",
        "APART": not spec.is_stacked,
    }


def source(spec: ExpertsSpec, settings: Settings) -> str:
    """The text of the kernel file.

    Raises:
        ExpressionError: an activation that Triton cannot compute, or without a derivative.
    """
    decided = flags(spec)
    text = "\n\n".join(_template(name, title, decided) for name, title in _TEMPLATES.items())
    runtime = next(ast.unparse(x) for x in ast.parse(emit._template("experts_parts.py")).body if _assigns(x, "RUNTIME"))
    parts = [
        f"{_constants(spec, settings)}\n{runtime}", emit._primitives(emit._tanh(settings.dtype, settings.fast_tanh)),
        emit._heading("The activation"), _activation(spec),
        trim(text), emit._heading("Reference"), _reference(spec), emit._heading("Check"), _MAIN.replace("<MADE>", _made(spec)),
    ]  # fmt: skip
    return emit._file(_header(spec, settings), parts)


def _template(name: str, title: str, decided: Mapping[str, bool]) -> str:
    text = weave.drop(emit._template(f"{name}.py"), _SETTINGS)
    return emit._without_preamble(weave.prune(text, decided), title)


def _constants(spec: ExpertsSpec, settings: Settings) -> str:
    listed = "".join(f"    {{\n{_lines(tile, 8)}    }},\n" for tile in settings.tiles)
    return "\n".join(
        [
            f"DTYPE = torch.{settings.dtype}",
            f"PRECISION = tl.constexpr({settings.precision!r})",
            *(f"{name} = {value}" for name, value in flags(spec).items()),
            f"PAIR = {spec.is_pair}",
            f"TILES = (\n{listed})",
            f"OUTER = {dict(settings.outer)!r}",
            f"FEW = {{\n{_lines(settings.few, 4)}}}",
        ]
    )


def _lines(named: Mapping[str, Mapping[str, int]], indent: int) -> str:
    return "".join(f'{" " * indent}"{name}": {dict(options)!r},\n' for name, options in named.items())


# --------------------------------------------------------------------------------------------------------------------- Activation


def _activation(spec: ExpertsSpec) -> str:
    arguments = ("gate", "up") if spec.gated else ("up",)
    slopes = [derivative(spec.term, sympy.Symbol(name, real=True)) for name in arguments]
    told = "by gate and by up" if spec.gated else "by up"
    return "\n\n".join(
        [
            _function("activation", arguments, [spec.term], "The activation, in float32."),
            _function("activation_and_slopes", arguments, [spec.term, *slopes], f"The activation, and its slopes {told}."),
        ]
    )


def _function(name: str, arguments: Sequence[str], terms: Sequence[Term], told: str) -> str:
    """A device function of float32 blocks that gives every term as a block, what they share computed once."""
    names: dict[Term, str] = {}
    lines = []
    for at, part in enumerate(shared(terms)):
        lines.append(f"    x{at} = {to_triton(part, names)}\n")
        names[part] = f"x{at}"
    results = ", ".join(_block(term, names) for term in terms)
    return f'@triton.jit\ndef {name}({", ".join(arguments)}):\n    """{told}"""\n{"".join(lines)}    return {results}\n'


def _block(term: Term, names: Mapping[Term, str]) -> str:
    """A term that is the same everywhere becomes a block."""
    return to_triton(term, names) if term.free_symbols else f"tl.full(up.shape, {float(term)!r}, tl.float32)"


# ----------------------------------------------------------------------------------------------------------------------- The rest


def _header(spec: ExpertsSpec, settings: Settings) -> str:
    inside = "(w[t,s] x_t)" if spec.weighted == "input" else "x_t"
    weight = "w[t,s] " if spec.weighted == "output" else ""
    halves = "one after the other"
    if spec.gated:
        halves = (
            "in turn in U's columns" if spec.interleaved else "tensors of their own" if spec.is_pair else "halves of U's columns"
        )
    stored = "U [E, d, F], D [E, f, d_out]" if spec.is_stacked else "U [d, F] and D [f, d_out] of each expert"
    tiles = "\n".join(f"    {tile['FIRST']['BLOCK_M']} rows" for tile in settings.tiles)
    gate = f"gate and up: {halves}" if spec.gated else "no gate"
    biases = [name for name, there in zip(("b1", "b2"), spec.biased, strict=True) if there]
    first, second = (f" + {name}_e" if there else "" for name, there in zip(("b1", "b2"), spec.biased, strict=True))
    return f'''"""A layer of experts, written by effcompile.

    y_t = sum_s {weight}(act({inside} U_e{first}) D_e{second}),  e = ids[t,s]

    act:  {to_text(spec.term)};   {gate}

Shapes: x [T, d], ids and weights [T, k], {stored}, {settings.dtype}, any strides.
Biases: {", ".join(biases) or "none"}.
An id outside 0..E-1 drops its assignment.
Tiles, of which the first is taken that holds one and a half times the rows of an expert:
{tiles}

Run this file to compare the kernels with the reference and to time them.
"""'''


def _reference(spec: ExpertsSpec) -> str:
    gate, up = ("h[..., 0::2]", "h[..., 1::2]") if spec.interleaved else ("h[..., :f]", "h[..., f:]")
    term = to_torch(spec.term) if spec.term.free_symbols else f"torch.full_like(up, {float(spec.term)!r})"
    lines = [f"gate, up = {gate}, {up}" if spec.gated else "up = h"]
    text = _REFERENCE.replace("<HALVES>", lines[0]).replace("<TERM>", term)
    first, second = ("True" if there else "False" for there in spec.biased)
    decided = {**flags(spec), "FIRST_BIAS": first == "True", "SECOND_BIAS": second == "True"}
    return weave.prune(text, decided)


_REFERENCE = '''def reference(x, ids, weights, up, down, biases):
    """The same in plain torch, expert by expert, in the dtype of x: `(out, h)`."""
    if APART:
        experts = len(down)
        stacked = lambda of: [torch.stack(of[at : at + experts]) for at in range(0, len(of), experts)]
        up, down, biases = stacked(up), stacked(down), [stacked(of) for of in biases]
    first, second = torch.cat(list(up), -1), down[0]
    out, kept, f = x.new_zeros((x.shape[0], second.shape[-1])), [], second.shape[1]
    for e in range(second.shape[0]):
        token, slot = (ids == e).nonzero(as_tuple=True)
        rows = x[token]
        if WEIGHTED_IN:
            rows = rows * weights[token, slot][:, None]
        h = rows @ first[e]
        if FIRST_BIAS:
            h = h + torch.cat([b[e] for b in biases[0]])
        kept.append(h)
        <HALVES>
        y = (<TERM>) @ second[e]
        if SECOND_BIAS:
            y = y + biases[1][0][e]
        if WEIGHTED_OUT:
            y = y * weights[token, slot][:, None]
        out = out.index_add(0, token, y)
    return out, torch.cat(kept)
'''


def _made(spec: ExpertsSpec) -> str:
    width = "f" if spec.is_pair or not spec.gated else "2 * f"
    stack, count = ("experts, ", 1) if spec.is_stacked else ("", "experts")
    ups = f"[make({stack}{width}, d).mT for _ in range({_times(count, 2 if spec.is_pair else 1)})]"
    first = f"[make({stack}{width}) for _ in range({_times(count, 2 if spec.is_pair else 1)})]" if spec.biased[0] else "[]"
    second = f"[make({stack}d) for _ in range({count})]" if spec.biased[1] else "[]"
    return f"    up, down, biases = {ups}, [make({stack}d, f).mT for _ in range({count})], ({first}, {second})\n"


def _times(count: int | str, parts: int) -> str:
    return str(count * parts) if isinstance(count, int) else f"{parts} * {count}" if parts > 1 else count


_MAIN = '''def main(tokens=1024, slots=2, experts=8, d=1024, f=2048, device="cuda"):
    """Compares forward and backward with the reference in float64, and times the kernels."""
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(shape, device=device).mul(shape[-1] ** -0.5).to(DTYPE)
    x, weights = make(tokens, d).mul(d**0.5), torch.rand(tokens, slots, device=device)
    ids = torch.rand(tokens, experts, device=device).argsort(1)[:, :slots]
<MADE>    operands = [x, weights, *up, *down, *biases[0], *biases[1]]
    leaves = [t.double().requires_grad_() for t in operands]
    ends = 2 + len(up), 2 + len(up) + len(down), 2 + len(up) + len(down) + len(biases[0])
    listed = lambda of: (of[2 : ends[0]], of[ends[0] : ends[1]], (of[ends[1] : ends[2]], of[ends[2] :]))
    expected, h = reference(leaves[0], ids, leaves[1], *listed(leaves))
    grad = torch.randn_like(expected).to(DTYPE)
    theirs = torch.autograd.grad(expected, leaves, grad.double(), allow_unused=True)
    out, kept = torch.empty_like(expected, dtype=DTYPE), torch.empty_like(h, dtype=DTYPE)
    ours = [torch.empty_like(t) for t in operands]
    d_weights = ours[1] if WEIGHTED_IN or WEIGHTED_OUT else None
    given = {"dx": ours[0], "d_weights": d_weights, **dict(zip(("d_up", "d_down", "d_biases"), listed(ours)))}
    with torch.no_grad():
        forward(x, ids, weights, up, down, biases, out=out, h=kept)
        backward(grad, x, ids, weights, up, down, biases, kept, **given)
    counted = (("up", up), ("down", down), ("bias", [*biases[0], *biases[1]]))
    names = ["x", "weights", *(f"{name}{at}" for name, tensors in counted for at in range(len(tensors)))]
    for name, got, wanted in [("out", out, expected), *((f"d{n}", *pair) for n, *pair in zip(names, ours, theirs))]:
        if wanted is not None:
            worst = (got.double() - wanted).norm() / wanted.norm()
            print(f"{name:>8}: error {worst.item():.1e} of the norm")
    if device == "cuda":
        run = lambda: forward(x, ids, weights, up, down, biases, out=out, h=kept)
        print(f"forward  {triton.testing.do_bench(run):.3f} ms")
        run = lambda: backward(grad, x, ids, weights, up, down, biases, kept, **given)
        print(f"backward {triton.testing.do_bench(run):.3f} ms")
'''
