"""The text of a recurrence's kernel file: importable, readable, with nothing of ours needed to run it."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ops.recurrence import RecurrenceSpec
from . import emit, weave

FLAGS = (
    "GATED", "VECTOR", "RATED", "CONSTANT", "SUMMED", "BEFORE", "BONUS", "BESIDE", "BY_VALUE", "NORMALISED", "JOINED"
)  # fmt: skip
_SETTINGS = (
    "PRECISION", "NEAR", "OUT_DTYPE", "SAVED_DTYPE", "FEW", "TILES", "EXCHANGED_TILES", "WEIGHTS", "FAR_WEIGHTS", "PAIRS",
    "STEP", "RUNTIME",
)  # fmt: skip
_TEMPLATES = {"gates": "Loads", "state_kernels": "States", "hosts": "Launches", "operation": "Operation"}
_IN_CHUNKS = {"kernels": "Chunks", "launches": "Passes"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a file holds beside the specification: `tiles` for a state [Dk, Dv], the widest first, and `exchanged` for [Dv, Dk].

    Where the decay differs along one dimension of the state, `tiles` are for one whose rows it differs along, and there are kernels
    that take a chunk by itself.

    `joined`: two products may add up in one sum. `near`: of a chunk's running sums of log2 decays, up to where it is one product.
    `precision`: of float32's products; of no consequence for operands of 16 bits.
    """

    d_k: int
    d_v: int
    dtype: str
    constant: bool
    joined: bool
    near: float
    precision: str
    tiles: Sequence[Mapping[str, int]]
    exchanged: Sequence[Mapping[str, int]]
    step: Mapping[str, int]
    weights: Mapping[str, int]
    far_weights: Mapping[str, int]
    pairs: Mapping[str, int]


def flags(spec: RecurrenceSpec, *, constant: bool) -> dict[str, bool]:
    """The template's flags for a specification; `constant`: its decay is the same at all times."""
    vector = spec.decay in ("key", "value")
    return {
        "GATED": spec.decay != "none",
        "VECTOR": vector,
        "RATED": "rate" in spec.operands,
        "CONSTANT": constant and spec.decay == "head",
        "SUMMED": spec.decay == "head" and not constant,
        "BEFORE": spec.read == "before",
        "BONUS": "bonus" in spec.operands and spec.decay != "value",
        "BESIDE": "bonus" in spec.operands and spec.decay == "value",
        "BY_VALUE": spec.decay == "value",
        "NORMALISED": spec.normaliser,
    }


def source(spec: RecurrenceSpec, settings: Settings) -> str:
    """The text of the kernel file."""
    decided = {**flags(spec, constant=settings.constant), "JOINED": settings.joined}
    prefix = "decayed_" if decided["VECTOR"] else ""
    named = {**_TEMPLATES, **{prefix + name: title for name, title in _IN_CHUNKS.items()}}
    text = "\n\n".join(_template(name, title, decided) for name, title in named.items())
    asked = ("BY_VALUE", "NORMALISED")  # by host functions, as values
    used = {name: value for name, value in decided.items() if name in asked}
    constants = [f"{name} = {value!r}" for name, value in {**used, **_values(spec, settings)}.items()]
    runtime = next(ast.unparse(x) for x in ast.parse(emit._template("recurrence_gates.py")).body if _assigns(x, "RUNTIME"))
    limits = [f"{name} = tl.constexpr({value!r})" for name, value in _limits(spec, settings).items()]
    parts = [
        "\n".join(["LOG2E = tl.constexpr(1.4426950408889634)", *limits, runtime, *constants]), emit._primitives("tanh"),
        trim(text), emit._heading("Reference"), _reference(spec), emit._heading("Check"), _main(spec),
    ]  # fmt: skip
    return emit._file(_header(spec, settings), parts)


def _assigns(statement: ast.stmt, name: str) -> bool:
    return isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name


def _template(name: str, title: str, decided: Mapping[str, bool]) -> str:
    text = weave.drop(emit._template(f"recurrence_{name}.py"), (*FLAGS, *_SETTINGS, "RESET", "LEAST"))
    return emit._without_preamble(weave.prune(text, decided), title)


def _limits(spec: RecurrenceSpec, settings: Settings) -> dict[str, Any]:
    return {"PRECISION": settings.precision, "RESET": -86.0, "LEAST": -160.0, "NEAR": settings.near}


def _values(spec: RecurrenceSpec, settings: Settings) -> dict[str, Any]:
    return {
        "SIZES": _Bare(f"({settings.d_k}, {settings.d_v}, torch.{settings.dtype})"),
        **({"CONSTANT_DECAY": settings.constant} if spec.decay != "none" else {}),
        "OUT_DTYPE": _Bare(f"torch.{spec.out}"),
        "SAVED_DTYPE": _Bare(f"torch.{settings.dtype}"),
        "FEW": 8,
        "TILES": tuple(dict(tile) for tile in settings.tiles),
        "EXCHANGED_TILES": tuple(dict(tile) for tile in settings.exchanged),
        "WEIGHTS": dict(settings.weights),
        "FAR_WEIGHTS": dict(settings.far_weights),
        "PAIRS": dict(settings.pairs),
        "STEP": dict(settings.step),
        "ORDERS": {"bhtd": (0, 1, 2), "bthd": (0, 2, 1), "tbhd": (2, 0, 1)},
    }


class _Bare(str):
    """A text that is its own representation."""

    def __repr__(self) -> str:
        return str(self)


# --------------------------------------------------------------------------------------------------------------------- Parameters


def trim(text: str) -> str:
    """Drops the parameters of device functions that their bodies do not use, and the arguments for them, until all are used."""
    while True:
        source = weave.Source(text)
        unused = {
            node.name: [at for at, parameter in enumerate(node.args.args) if not _uses(node, parameter.arg)]
            for node in source.tree.body
            if isinstance(node, ast.FunctionDef) and weave.is_kernel(node)
        }
        edits: list[weave.Edit] = []
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef) and unused.get(node.name):
                edits += _without(source, node.args.args, unused[node.name])
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and unused.get(node.func.id):
                edits += _without(source, node.args, unused[node.func.id])
        if not edits:
            return text
        text = source.apply(edits)


def _uses(function: ast.FunctionDef, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for part in function.body for node in ast.walk(part))


def _without(source: weave.Source, listed: Sequence[ast.AST], dropped: Sequence[int]) -> list[weave.Edit]:
    """Removes elements of a comma-separated list, each with the comma after it or, at the end, before it."""
    edits = []
    for at in dropped:
        start, end = source.span(listed[at])
        if at + 1 < len(listed):
            end = source.span(listed[at + 1])[0]
            if "\n" in source.text[start:end]:
                end = source.text.index("\n", start)
        elif at:
            start = source.span(listed[at - 1])[1]
        edits.append(weave.Edit(start, end, ""))
    return edits


# --------------------------------------------------------------------------------------------------------------------- The rest


def _header(spec: RecurrenceSpec, settings: Settings) -> str:
    decay = {
        "none": "",
        "head": "exp(gate_t) * ",
        "key": "diag(exp(gate_t)) * ",
        "value": "S_{t-1} diag(exp(gate_t)) with ",
    }[spec.decay]
    read = "S_t" if spec.read == "after" else "S_{t-1}"
    own = " + (q_t . (bonus_t * k_t)) v_t" if "bonus" in spec.operands else ""
    tiles = "\n".join(f"    {', '.join(f'{k}={v}' for k, v in tile.items())}" for tile in settings.tiles)
    update = f"{decay}S_{{t-1}} + k_t v_t^T" if spec.decay != "value" else "S_{t-1} diag(exp(gate_t)) + k_t v_t^T"
    rate = "\n    gate_t stands for gate_t * rate_t" if "rate" in spec.operands else ""
    norm = "\n    normaliser_t = q_t^T n_t, where v has a further column of ones and S the column n" if spec.normaliser else ""
    return f'''"""A linear recurrence, written by effcompile.

    S_t = {update}
    o_t = q_t^T {read}{own}{rate}{norm}

Shapes: v [B, H, T, {settings.d_v}], q, k [B, Hk, T, {settings.d_k}], {settings.dtype}, any strides.
Operands: v, {", ".join(spec.operands)}.
Tiles, of which the widest that keeps the processors busy is taken:
{tiles}

Run this file to compare the kernels with the reference and to time them.
"""'''


def _reference(spec: RecurrenceSpec) -> str:
    decided = flags(spec, constant=False)
    return weave.prune(_REFERENCE, {**decided, "BONUS": "bonus" in spec.operands})


_REFERENCE = '''def reference(v, q, k, *, gate=None, rate=None, bonus=None, initial=None):
    """The same in plain torch, step by step, in the dtype of v: `(out, normaliser, final)`."""
    heads = v.shape[1]
    q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    if NORMALISED:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = v.new_zeros((*v.shape[:2], k.shape[-1], v.shape[-1])) if initial is None else initial
    if GATED:
        decay = (gate * rate if RATED else gate).exp().expand(*v.shape[:3], -1, -1)
    if BONUS:
        bonus = bonus.expand(*v.shape[:3], -1)
    outs = []
    for t in range(v.shape[2]):
        before = state
        added = k[:, :, t, :, None] * v[:, :, t, None, :]
        if GATED:
            state = state * decay[:, :, t]
        state = state + added
        seen = before if BEFORE else state
        if BONUS:
            seen = seen + bonus[:, :, t, :, None] * added
        outs.append((q[:, :, t, :, None] * seen).sum(-2))
    out = torch.stack(outs, 2)
    if NORMALISED:
        return out[..., :-1], out[..., -1], state
    return out, out.new_empty((0,)), state
'''


def _main(spec: RecurrenceSpec) -> str:
    gate = {"head": "1, 1", "key": "d_k, 1", "value": "1, d_v"}.get(spec.decay, "")
    made = {
        "gate": f"-torch.rand(1, heads, 1 if CONSTANT_DECAY else t, {gate}, device=device)",
        "rate": "torch.rand(1, heads, 1, 1, 1, device=device)",
        "bonus": "torch.randn(1, heads, 1, d_k, device=device)",
        "initial": f"torch.randn(batch, heads, d_k, d_v{' + 1' if spec.normaliser else ''}, device=device)",
    }
    lines = "".join(f'    more["{name}"] = {text}\n' for name, text in made.items() if name in spec.operands)
    return _MAIN.replace("<MORE>", lines)


_MAIN = '''def main(batch=1, heads=8, t=1024, device="cuda"):
    """Compares forward and backward with the reference in float64, and times the kernels."""
    torch.manual_seed(0)
    d_k, d_v, dtype = SIZES
    make = lambda d: torch.randn(batch, heads, t, d, device=device).mul(d**-0.25).to(dtype)
    v, q, k = make(d_v), make(d_k), make(d_k)
    more = {}
<MORE>    leaves = {name: x.double().requires_grad_() for name, x in {"v": v, "q": q, "k": k, **more}.items()}
    expected, _, _ = reference(**leaves)
    grad = torch.randn_like(expected)
    theirs = dict(zip(leaves, torch.autograd.grad(expected, list(leaves.values()), grad)))
    with torch.no_grad():
        out, _, _ = forward(v, q, k, **more)
        ours = backward(grad.to(out.dtype), None, None, v, q, k, **more)
    for name, got, wanted in [("out", out, expected), *((f"d{name}", ours[name], theirs[name]) for name in theirs)]:
        worst = (got.double() - wanted).norm() / wanted.norm()
        print(f"{name:>8}: error {worst.item():.1e} of the norm")
    if device == "cuda":
        with torch.no_grad():
            print(f"forward  {triton.testing.do_bench(lambda: forward(v, q, k, **more)):.3f} ms")
            print(f"backward {triton.testing.do_bench(lambda: backward(out, None, None, v, q, k, **more)):.3f} ms")
'''
