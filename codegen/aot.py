"""Compiles generated kernels for GPUs that are not there, and says what they would use.

    for report in compile_kernels(spec, problem, target="cuda:90"): print(report)

No GPU is needed: Triton compiles for a named target, and registers and stack are read off the binary.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..errors import KernelError
from ..ops.attention import AttentionSpec
from ..ops.experts import ExpertsSpec
from ..ops.recurrence import RecurrenceSpec
from ..ops.route import RouteSpec
from . import decode, emit, experts, recurrence, route, scan
from .attention import Config, Problem, source
from .hooks import Variant

TARGETS: dict[str, GPUTarget] = {
    **{f"cuda:{cc}": GPUTarget("cuda", cc, 32) for cc in (75, 80, 86, 89, 90, 100, 120)},
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
    "hip:gfx950": GPUTarget("hip", "gfx950", 64),
}
SHARED_BYTES = {
    "cuda:75": 64, "cuda:80": 163, "cuda:86": 99, "cuda:89": 99, "cuda:90": 227, "cuda:100": 227, "cuda:120": 99,
    "hip:gfx942": 64, "hip:gfx950": 160,
}  # fmt: skip
_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one kernel uses: registers a thread, bytes of spilled registers a thread, bytes of shared memory a program."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int

    @property
    def fits(self) -> bool:
        """Whether a program fits the shared memory of the target."""
        return self.shared_bytes <= SHARED_BYTES[self.target] * 1024


@dataclass(frozen=True)
class _Launch:
    """One recorded launch."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


class _Recorder:
    """Stands for a kernel and notes its launches instead of making them."""

    def __init__(self, kernel: Any, log: list[_Launch]):
        self.kernel, self.log = kernel, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.log.append(_Launch(self.kernel, args, options))


def architecture(target: str) -> str:
    """The name that configurations go by: "cuda:90" is "sm_90"."""
    kind, _, chip = target.partition(":")
    return f"sm_{chip}" if kind == "cuda" else chip


def compile_kernels(
    spec: AttentionSpec,
    problem: Problem,
    *,
    target: str,
    config: Config | None = None,
    group: int = 4,
    kernels: Sequence[str] | None = None,
) -> list[Report]:
    """Compiles forward and backward of a specification for `target`; `kernels` restricts by name.

    Raises:
        KernelError: an unknown target, or Triton's interpreter is on.
    """
    if target not in TARGETS:
        raise KernelError(f"Expected one of {sorted(TARGETS)} but got target={target!r}.")
    reports = []
    for launch in _launches(spec, problem, config, group):
        name = launch.kernel.__name__
        if kernels is None or name in kernels:
            reports.append(_compile(launch, name, target))
    return reports


def compile_decode(
    spec: AttentionSpec,
    problem: Problem,
    *,
    target: str,
    config: decode.Config | None = None,
    group: int = 4,
    queries: int = 1,
    splits: int | None = None,
    latent: bool = False,
) -> list[Report]:
    """Compiles the kernels for few queries. `latent`: V is the first columns of K.

    Raises:
        KernelError: an unknown target, or Triton's interpreter is on.
    """
    if target not in TARGETS:
        raise KernelError(f"Expected one of {sorted(TARGETS)} but got target={target!r}.")
    q, k, v, captures = _operands(spec, problem, group)
    q = q[:, :, :queries]
    v = k[..., : problem.d_v] if latent else v.transpose(1, 2).contiguous().transpose(1, 2)  # strides of its own
    with _recording(decode.source(spec, problem, config=config)) as (module, log):
        module.forward(q, k, v, *captures, *[4096] * len(spec.sizes), splits=splits)
        return [_compile(launch, launch.kernel.__name__, target) for launch in log]


def compile_recurrence(
    spec: RecurrenceSpec,
    problem: recurrence.Problem,
    *,
    target: str,
    config: recurrence.Config | None = None,
    tile: int = 0,
    group: int = 1,
    steps: int = 4096,
    segments: int = 1,
    directions: Sequence[str] = ("forward", "backward"),
) -> list[Report]:
    """Compiles the kernels of a recurrence, with the `tile`-th tile of its configuration; few `steps` have a kernel of their own.

    Raises:
        KernelError: an unknown target, or Triton's interpreter is on.
    """
    if target not in TARGETS:
        raise KernelError(f"Expected one of {sorted(TARGETS)} but got target={target!r}.")
    v, x, grads = _recurrence_operands(spec, problem, group, steps)
    with _recording(recurrence.source(spec, problem, config=config)) as (module, log):
        if "forward" in directions:
            module.forward(v, **x, tile=tile, segments=segments)
        if "backward" in directions:
            module.backward(*grads, v, **x, tile=tile, segments=segments)
        return [_compile(launch, launch.kernel.__name__, target) for launch in log]


def compile_scan(
    spec: RecurrenceSpec,
    v: Tensor,
    operands: Sequence[Tensor],
    *,
    target: str,
    layout: str = "bthd",
    processors: int = 132,
    config: scan.Overrides | None = None,
) -> list[Report]:
    """Compiles the kernels of a recurrence computed step by step, as a GPU of so many processors runs them for such operands.

    Raises:
        KernelError: an unknown target, or Triton's interpreter is on.
    """
    if target not in TARGETS:
        raise KernelError(f"Expected one of {sorted(TARGETS)} but got target={target!r}.")
    named = spec.named(operands)
    with _recording(scan.source(spec, scan.Problem.of(v, named))) as (module, log):
        module.processors = lambda device: processors  # type: ignore[attr-defined]
        out, final = module.forward(v, **named, layout=layout, config=config)
        module.backward(out, final, v, **named, **({} if spec.has_rows else {"out": out}), config=config)
        return [_compile(launch, launch.kernel.__name__, target) for launch in log]


def compile_experts(
    spec: ExpertsSpec,
    problem: experts.Problem,
    *,
    target: str,
    sizes: tuple[int, int, int] = (2048, 768, 128),
    tokens: int = 4096,
    slots: int = 8,
    tile: int | None = None,
    along: bool = True,
    keep: bool = True,
    config: experts.Config | None = None,
    directions: Sequence[str] = ("forward", "backward"),
) -> list[Report]:
    """Compiles the kernels of a layer of experts of `sizes` d, f and E.

    Args:
        tile: which of the configuration's; as the sizes choose if not given.
        along: whether weights stand in memory along what their product sums.
        keep: whether the pre-activation is written, as it is for a gradient.

    Raises:
        KernelError: an unknown target, or Triton's interpreter is on.
    """
    if target not in TARGETS:
        raise KernelError(f"Expected one of {sorted(TARGETS)} but got target={target!r}.")
    d, f, count = sizes
    dtype, columns = problem.dtype, f if spec.is_pair or not spec.gated else 2 * f

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def stack(inner: int, outer: int) -> Tensor:
        return empty(count, outer, inner).mT if along else empty(count, inner, outer)

    def stored(of_all: Tensor) -> list[Tensor]:
        return [of_all] if spec.is_stacked else [*of_all]

    parts = range(2 if spec.is_pair else 1)
    ups, down = [x for _ in parts for x in stored(stack(d, columns))], stored(stack(f, d))
    first = [x for _ in parts for x in stored(empty(count, columns))] if spec.biased[0] else []
    biases = first, stored(empty(count, d)) if spec.biased[1] else []
    x, h = empty(tokens, d), empty(tokens * slots, len(parts) * columns) if keep else None
    ids, weights = empty(tokens, slots, dtype=torch.int64), empty(tokens, slots) if spec.weighted != "none" else None
    operands = (x, ids, weights, ups, down, biases)
    with _recording(experts.source(spec, problem, config=config)) as (module, log):
        if "forward" in directions:
            chosen = module.choice(tokens, slots, count, keep=keep) if tile is None else (tile, False)
            module.forward(*operands, out=x, h=h, tile=chosen[0], few=chosen[1])
        if "backward" in directions:
            module.backward(x, *operands, h, dx=x, d_weights=weights, d_up=ups, d_down=down, d_biases=biases, tile=tile)
        return [_compile(launch, launch.kernel.__name__, target) for launch in log]


def compile_route(
    spec: RouteSpec, *, target: str, experts: int = 128, tokens: int = 4096, dtype: torch.dtype = torch.float32
) -> list[Report]:
    """Compiles the kernels of a router of so many experts.

    Raises:
        KernelError: an unknown target, or Triton's interpreter is on.
    """
    if target not in TARGETS:
        raise KernelError(f"Expected one of {sorted(TARGETS)} but got target={target!r}.")
    logits = torch.empty((tokens, experts), dtype=dtype, device="meta")
    bias = torch.empty(experts, device="meta") if spec.select_bias else None
    with _recording(route.source(spec)) as (module, log):
        weights, ids = module.forward(logits, bias)
        module.backward(weights, logits, ids)
        return [_compile(launch, launch.kernel.__name__, target) for launch in log]


def _recurrence_operands(
    spec: RecurrenceSpec, problem: recurrence.Problem, group: int, steps: int
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    b, h, d_k, d_v = 2, 8 * group, problem.d_k, problem.d_v
    gate = {"head": (1, 1), "key": (d_k, 1), "value": (1, d_v)}.get(spec.decay, (1, 1))
    state, time = (b, h, d_k, d_v + spec.normaliser), 1 if problem.constant else steps

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    made = {
        "q": empty(b, steps, h // group, d_k, dtype=problem.dtype).transpose(1, 2),
        "k": empty(b, steps, h // group, d_k, dtype=problem.dtype).transpose(1, 2),
        "gate": empty(b, time, h, *gate).transpose(1, 2),
        "rate": empty(1, h, 1, 1, 1),
        "bonus": empty(1, h, 1, d_k),
        "initial": empty(*state),
    }
    v = empty(b, steps, h, d_v, dtype=problem.dtype).transpose(1, 2)
    grads = [empty(*v.shape, dtype=spec.out_dtype), empty(b, h, steps) if spec.normaliser else None, empty(*state)]
    return v, {name: made[name] for name in spec.operands}, grads


def _launches(spec: AttentionSpec, problem: Problem, config: Config | None, group: int) -> list[_Launch]:
    """The launches that forward and backward make on tensors without memory."""
    with _recording(source(spec, problem, config=config)) as (module, log):
        q, k, v, captures = _operands(spec, problem, group)
        sizes = [4096] * len(spec.sizes)
        out, lse = module.forward(q, k, v, *captures, *sizes)
        module.backward(out, q, k, v, out, lse, *captures, *sizes)
    return log


@contextmanager
def _recording(text: str) -> Iterator[tuple[ModuleType, list[_Launch]]]:
    """The module of a kernel file, and the launches that it makes instead of running them."""
    log: list[_Launch] = []
    with tempfile.TemporaryDirectory() as directory:
        module = _fresh(emit.write_kernel(text, Path(directory)))
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                setattr(module, name, _Recorder(value, log))
        yield module, log


def _fresh(path: Path) -> ModuleType:
    location = importlib.util.spec_from_file_location(path.stem, path)
    assert location is not None and location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    if triton.knobs.runtime.interpret:
        raise KernelError("Expected a compiler but got TRITON_INTERPRET='1'. Unset it.")
    return module


def _operands(spec: AttentionSpec, problem: Problem, group: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    t, h_kv = 4096, 8
    variant = Variant(spec)

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    captures = []
    for name in spec.captures:
        dtype = torch.bool if name in variant.bool_captures else torch.int64 if name in variant.int_captures else torch.float32
        captures.append(empty(*[t] * variant.ranks[name], dtype=dtype))
    q, k, v = empty(2, h_kv * group, t, problem.d_qk), empty(2, h_kv, t, problem.d_qk), empty(2, h_kv, t, problem.d_v)
    return q, k, v, captures


def _compile(launch: _Launch, name: str, target: str) -> Report:
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | {
        key: value for key, value in launch.options.items() if key in kernel.arg_names
    }
    options = {key: value for key, value in launch.options.items() if key not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        kind, constant, divisible = _classify(values[parameter.name], parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(at,)] = constant
        if divisible:
            attributes[(at,)] = [["tt.divisibility", 16]]
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    built = triton.compile(language(kernel, signature, constants, attributes), target=TARGETS[target], options=options)
    registers, spill = _amd_usage(built.asm["amdgcn"]) if target.startswith("hip") else _nvidia_usage(built.asm["cubin"])
    return Report(kernel=name, target=target, registers=registers, spill_bytes=spill, shared_bytes=built.metadata.shared)


def _classify(value: Any, parameter: Any) -> tuple[str, Any, bool]:
    """Type in the signature, value if constant, whether it is a multiple of 16: as Triton specialises a launch."""
    if parameter.is_constexpr or value is None:
        return "constexpr", value, False
    if isinstance(value, TensorDescriptor):
        element = _POINTERS[value.base.dtype].removeprefix("*")
        return f"tensordesc<{element}{list(value.block_shape)},{value.layout!r}>", None, False
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype], None, True
    if parameter.do_not_specialize:
        return "i32", None, False
    if value == 1:
        return "constexpr", 1, False
    return "i32" if abs(value) < 2**31 else "i64", None, value % 16 == 0


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise KernelError(f"Expected the resource usage of a kernel but got output={text!r}.")
    return int(found[1]), int(found[2])


def _amd_usage(assembly: str) -> tuple[int, int]:
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", assembly))
    return registers, max(int(n) for n in re.findall(r"\.private_segment_fixed_size:\s+(\d+)", assembly))
