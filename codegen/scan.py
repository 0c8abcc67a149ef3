"""Recurrences computed step by step, on a GPU: chooses a configuration, writes the kernels, launches them.

    out, normaliser, final = forward(v, operands, spec, layout)
    dv, *gradients = backward(grad, grad_normaliser, grad_final, v, operands, out, spec)

For recurrences with one row (`scan_kernels`), and for those with rows whose decay differs from element to element of the state
(`selective_kernels`). Operands as `ops.recurrence.reference` takes them, of any strides, in `DTYPES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from ..ops.recurrence import RecurrenceSpec, reference, reference_backward
from . import attention, emit, weave
from .scanning import parts_of_decay
from .trust import compared, trust

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_ROWS = 256
Shape = tuple[int, ...]
Overrides = dict[str, int]  # of a launch: STEPS, VEC, LANES, BLOCK_D, SEGMENTS


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a kernel file depends on, beside the specification.

    Attributes:
        t, d: one step or several, one column or several, as 1 or 2.
        gate, rate: the shapes of these operands, with 2 for any size above 1.
    """

    t: int
    d: int
    gate: Shape | None
    rate: Shape | None

    @classmethod
    def of(cls, v: Tensor, operands: dict[str, Tensor]) -> Problem:
        shapes = {name: tuple(min(2, n) for n in operands[name].shape) for name in ("gate", "rate") if name in operands}
        return cls(t=min(2, v.shape[2]), d=min(2, v.shape[3]), gate=shapes.get("gate"), rate=shapes.get("rate"))


def takes(spec: RecurrenceSpec) -> bool:
    """Whether these kernels compute a recurrence: with one row, or with a decay of its own for each element of the state."""
    return not spec.normaliser and "bonus" not in spec.operands and (not spec.has_rows or spec.decay == "full")


def forward(
    v: Tensor, operands: Sequence[Tensor], spec: RecurrenceSpec, layout: str, *, config: Overrides | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, normaliser, final)`: out [B, H, T, Dv] in memory ordered as `layout` says, nothing, final [B, H, Dk, Dv] float32.

    Raises:
        KernelError: a specification, shapes or dtypes that the kernels do not take.
    """
    named = _checked(v, operands, spec)
    module = _trusted(v, named, spec, "forward")
    out, final = module.forward(v, **named, layout=layout, config=config)
    return out, v.new_empty((0,), dtype=torch.float32), final


def backward(
    grad: Tensor | None, grad_normaliser: Tensor | None, grad_final: Tensor | None,
    v: Tensor, operands: Sequence[Tensor], out: Tensor | None, spec: RecurrenceSpec, *, config: Overrides | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of v and of each operand, like them. The sums over what an operand does not differ in have a fixed order.

    `out` is the forward's, for a recurrence with one row; `grad_normaliser` is that of an empty tensor.
    """
    named = _checked(v, operands, spec)
    module = _trusted(v, named, spec, "backward")
    given = named if spec.has_rows else {**named, "out": out}
    dv, found = module.backward(grad, grad_final, v, **given, config=config)
    return [dv, *(found[name] for name in spec.operands)]


def _trusted(v: Tensor, named: dict[str, Tensor], spec: RecurrenceSpec, direction: str) -> ModuleType:
    """The kernels of a problem, which have agreed with the reference on this machine."""
    problem = Problem.of(v, named)
    module = _module(spec, problem, v.device, _folder())
    trust(module, v.device, direction, lambda: disagreement(module, spec, problem, v.dtype, v.device, direction))
    return module


def disagreement(
    module: ModuleType, spec: RecurrenceSpec, problem: Problem, dtype: torch.dtype, device: torch.device, direction: str
) -> str:
    """Why a kernel file is not to be trusted on a device: empty if it gives what the reference gives, on a small problem."""
    v, operands, grads = example(spec, problem, dtype, device)
    named, exact = spec.named(operands), [v.float(), *(x.float() for x in operands)]
    if direction == "forward":
        out, _, final = reference(exact[0], exact[1:], spec)
        got = dict(zip(("out", "final"), module.forward(v, **named, layout="bhtd", config=None), strict=True))
        return compared(got, {"out": out, "final": final}, dtype, direction)
    wanted = reference_backward(grads[0], None, grads[1], exact[0], exact[1:], None, spec)
    given = named if spec.has_rows else {**named, "out": reference(v, operands, spec)[0]}
    dv, found = module.backward(grads[0].to(spec.out_dtype), grads[1], v, **given, config=None)
    return compared({"v": dv, **found}, dict(zip(("v", *spec.operands), wanted, strict=True)), dtype, direction)


def example(
    spec: RecurrenceSpec, problem: Problem, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Operands of a small problem of the same kind, and gradients of its output and its last state."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device)

    b, h, t, d, rows = 2, 2, 1 if problem.t == 1 else 70, 1 if problem.d == 1 else 40, 16 if spec.has_rows else 1
    whole = (b, h, t, rows, d)
    shapes = {
        name: tuple(1 if n == 1 else full for n, full in zip(shape, whole, strict=True))
        for name, shape in (("gate", problem.gate), ("rate", problem.rate))
        if shape is not None
    }
    made = {name: make(*shape).abs() * (-0.3 if name == "gate" and spec.gate == "log" else 0.5) for name, shape in shapes.items()}
    made |= {"q": make(b, h, t, rows).mul(rows**-0.5).to(dtype), "k": make(b, h, t, rows).to(dtype), "initial": make(b, h, rows, d)}
    return make(b, h, t, d).to(dtype), [made[name] for name in spec.operands], [make(b, h, t, d), make(b, h, rows, d)]


def _folder() -> Path | None:
    return attention._directory


def _checked(v: Tensor, operands: Sequence[Tensor], spec: RecurrenceSpec) -> dict[str, Tensor]:
    if not takes(spec):
        raise KernelError(f"Expected one row, or a decay for each element, no bonus and no normaliser, but got spec={spec!r}.")
    named = spec.named(operands)
    for name, x in {"v": v, **named}.items():
        if x.dtype not in DTYPES:
            raise KernelError(f"Expected operands of one of {DTYPES} but got {name}.dtype={x.dtype!r}. Cast it first.")
        if not _fits(name, tuple(x.shape), tuple(v.shape), named):
            raise KernelError(f"Expected the shapes of a recurrence of v={tuple(v.shape)} but got {name}.shape={tuple(x.shape)!r}.")
    if spec.has_rows and named["k"].shape[3] > MAX_ROWS:
        raise KernelError(f"Expected at most {MAX_ROWS} rows but got k.shape={tuple(named['k'].shape)!r}.")
    return named


def _fits(name: str, shape: Shape, v: Shape, named: dict[str, Tensor]) -> bool:
    if len(v) != 4:
        return False
    rows = named["k"].shape[-1] if "k" in named else 1
    if name == "v":
        return True
    if name == "initial":
        return shape == (v[0], v[1], rows, v[3])
    if name in ("q", "k"):
        return len(shape) == 4 and shape == (v[0], named["k"].shape[1], v[2], rows) and v[1] % shape[1] == 0
    return len(shape) == 5 and all(n in (1, whole) for n, whole in zip(shape, (*v[:3], rows, v[3]), strict=True))


# ----------------------------------------------------------------------------------------------------------------------- files


@lru_cache(maxsize=1024)
def _module(spec: RecurrenceSpec, problem: Problem, device: torch.device, directory: Path | None) -> ModuleType:
    family = "selective" if spec.has_rows else "scan"
    return emit.load_kernel(emit.write_kernel(source(spec, problem), directory, family=family))


def source(spec: RecurrenceSpec, problem: Problem) -> str:
    """The text of the kernel file for a specification and a problem."""
    flags, configs = _flags(spec, problem), CONFIGS[spec.has_rows]
    settings = {
        "LOG2E": "tl.constexpr(1.4426950408889634)",
        "AFTER": f"tl.constexpr({flags['AFTER']})",
        "RUNTIME": repr(RUNTIME),
        "OUT_DTYPE": f"torch.{spec.out}",
        **{name: repr(config) for name, config in configs.items()},
    }
    names = ("scanning.py", "selective_kernels.py" if spec.has_rows else "scan_kernels.py")
    shared, kernels = (weave.prune(weave.drop(emit._template(name), (*flags, *settings)), flags) for name in names)
    parts = [
        "\n".join(f"{name} = {value}" for name, value in settings.items()), emit._primitives("tanh"),
        emit._without_preamble(shared, "Time"), emit._without_preamble(kernels, "Kernels"),
        emit._heading("Reference"), weave.prune(_REFERENCE, flags), emit._heading("Check"), _main(spec, problem),
    ]  # fmt: skip
    return emit._file(_header(spec, problem), parts)


RUNTIME = ["T", "TILES", "SEGMENTS"]
# Registers hold STEPS * VEC of each operand twice, this tile's and the next one's: tests/test_scan_aot.py.
CONFIGS: dict[bool, dict[str, dict[str, int]]] = {
    False: {"FORWARD": {"STEPS": 8, "VEC": 4}, "BACKWARD": {"STEPS": 4, "VEC": 4}},
    True: {"FORWARD": {"STEPS": 8, "VEC": 2}, "BACKWARD": {"STEPS": 4, "VEC": 2}},
}


def _flags(spec: RecurrenceSpec, problem: Problem) -> dict[str, bool]:
    gate, rate = (None if shape is None else torch.empty(shape, device="meta") for shape in (problem.gate, problem.rate))
    varying, constant = parts_of_decay(gate, rate, problem.t)
    flags = {
        "DECAYS": gate is not None,
        "GATED": varying is not None,
        "GATE_D": varying is not None and varying.shape[4] == problem.d,
        "RATED": constant is not None,
        "LOG": gate is not None and spec.gate == "log",
        "AFTER": spec.read == "after",
    }
    if spec.has_rows:
        return {**flags, "GATE_K": varying is not None and varying.shape[3] > 1}
    return {**flags, "AGAIN": gate is not None and spec.out != "float32"}


def _header(spec: RecurrenceSpec, problem: Problem) -> str:
    factor, t = "gate_t" if problem.rate is None else "gate_t * rate", "t" if spec.read == "after" else "{t-1}"
    lines = ["h_t = a_t * h_{t-1} + v_t", f"o_t = h_{t}"]
    if spec.has_rows:
        lines = ["S_t = a_t * S_{t-1} + k_t v_t^T", f"o_t = q_t^T S_{t}"]
    if problem.gate is None:
        lines[0] = lines[0].replace("a_t * ", "")
    else:
        lines.append(f"a_t = {f'exp({factor})' if spec.gate == 'log' else factor}, one for each {_ELEMENT[spec.decay]}")
    formula = "\n".join(f"    {line}" for line in lines)
    shapes = ", ".join(f"{name} [{', '.join(map(str, _shape(name, problem)))}]" for name in ("v", *spec.operands))
    listed = {name.lower(): ", ".join(f"{k}={v}" for k, v in config.items()) for name, config in CONFIGS[spec.has_rows].items()}
    configs = "\n".join(f"    {name:<9}{text}" for name, text in listed.items())
    return f'''"""A recurrence, written by effcompile.

{formula}

Shapes: {shapes}, any strides. The result is {spec.out}, the state float32.
Configuration:
{configs}

Run this file to compare the kernels with the reference and to time them.
"""'''


_ELEMENT = {"head": "head", "key": "row", "value": "column", "full": "element of the state"}


def _shape(name: str, problem: Problem) -> tuple[Any, ...]:
    if name in ("gate", "rate"):
        pattern = problem.gate if name == "gate" else problem.rate
        assert pattern is not None
        return tuple(1 if n == 1 else letter for n, letter in zip(pattern, ("B", "H", "T", "N", "D"), strict=True))
    return {"v": ("B", "H", "T", "D"), "initial": ("B", "H", "N", "D")}.get(name, ("B", "H_K", "T", "N"))


_REFERENCE = '''def reference(v, q=None, k=None, gate=None, rate=None, initial=None):
    """The same step by step in plain torch, in the dtype of v: `(out, final)`."""
    heads, steps = v.shape[1:3]
    q, k = (torch.ones_like(v[..., :1]) if x is None else x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    state = v.new_zeros((*v.shape[:2], k.shape[3], v.shape[3])) if initial is None else initial
    a = torch.ones((), dtype=v.dtype, device=v.device).expand(*v.shape[:3], 1, 1)
    if DECAYS:
        a = gate if rate is None else gate * rate
        if LOG:
            a = torch.exp(a)
        a = a.expand(*v.shape[:3], -1, -1)
    out = []
    for t in range(steps):
        before = state
        state = a[:, :, t] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, :, None] * (state if AFTER else before)).sum(2))
    return torch.stack(out, 2), state
'''


def _main(spec: RecurrenceSpec, problem: Problem) -> str:
    sizes = {"B": "batch", "H": "heads", "H_K": "heads", "T": "t", "N": "16" if spec.has_rows else "1", "D": "d"}
    lines = []
    for name in spec.operands:
        value = f"torch.randn({', '.join(sizes.get(str(n), '1') for n in _shape(name, problem))}, device=device)"
        if name in ("gate", "rate"):
            value += ".sigmoid()" if name == "rate" or spec.gate == "factor" else ".abs() * -0.1"
        lines.append(f"        {name}={value},\n")
    return _MAIN.replace("<MAKE>", "".join(lines)).replace("<OUT>", "" if spec.has_rows else ", out=out")


_MAIN = '''def main(batch=2, heads=4, t=2048, d=256, device="cuda"):
    """Compares forward and backward with the reference, and times the kernels."""
    torch.manual_seed(0)
    v = torch.randn(batch, t, heads, d, device=device).transpose(1, 2)
    operands = dict(
<MAKE>    )
    leaves = {name: x.requires_grad_() for name, x in {"v": v, **operands}.items()}
    expected, expected_final = reference(**leaves)
    grad, grad_final = torch.randn_like(expected), torch.randn_like(expected_final)
    expected_grads = torch.autograd.grad((expected, expected_final), list(leaves.values()), (grad, grad_final))
    with torch.no_grad():
        out, final = forward(**leaves)
        dv, grads = backward(grad, grad_final, **leaves<OUT>)
        ours, theirs = (out, final, dv, *(grads[name] for name in operands)), (expected, expected_final, *expected_grads)
        for name, x, y in zip(("out", "final", "dv", *(f"d_{name}" for name in operands)), ours, theirs):
            print(f"{name:>9}: largest error {((x - y).abs().max() / y.abs().max()).item():.1e} of the largest value")
        if device == "cuda":
            print(f"forward  {triton.testing.do_bench(lambda: forward(**leaves)):.3f} ms")
            print(f"backward {triton.testing.do_bench(lambda: backward(grad, grad_final, **leaves<OUT>)):.3f} ms")
'''
