"""Attention of any specification, forward and backward, on a GPU: chooses a configuration, writes the kernels, launches them.

    out, lse = forward(q, k, v, captures, sizes, spec)
    dq, dk, dv, d_captured = backward(grad_out, q, k, v, out, lse, captures, sizes, spec)

q is [B, H, TQ, D], k [B, H_KV, TK, D], v [B, H_KV, TK, D_V], each of any strides; query head h reads key head h // (H // H_KV).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import KernelError
from ..ops.attention import AttentionSpec, captured_gradients
from . import emit, hopper
from .hooks import Variant
from .hopper import Rings
from .launching import width_of

Layout = Literal["bhtd", "bthd"]
Tile = tuple[int, int, int, int]  # queries, keys, warps, stages
Arch = str  # "sm_90", "gfx942", or "cpu" for Triton's interpreter

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WITHOUT_TF32 = ("gfx950",)  # whose compiler refuses the word, whatever the operands
_directory: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Tile of queries by tile of keys, and how one program runs."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        """As keyword arguments of a kernel launch."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Launches of the kernels: general ones, or those for Hopper. `captured` is that of the gradients of captured tensors.

    `fast_tanh`: NVIDIA's own tanh instruction, with a relative error of 2^-11. `split_dkv`: dK and dV in two passes, each
    with twice the registers for its sum, at the cost of one more product of Q and K.
    """

    forward: Launch | Rings
    dq: Launch | Rings
    dkv: Launch | Rings
    captured: Launch
    fast_tanh: bool = False
    split_dkv: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def for_hopper(self) -> frozenset[str]:
        """The kernels that are those for Hopper."""
        return frozenset(name for name in ("forward", "dq", "dkv") if isinstance(getattr(self, name), Rings))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a configuration depends on, beside the specification: never a sequence length.

    `copies`: whether the tensor memory accelerator, where there is one, can copy tiles of the operands.
    """

    d_qk: int
    d_v: int
    dtype: torch.dtype
    arch: Arch
    copies: bool = True

    @property
    def width(self) -> int:
        """The larger head dimension, as the kernels pad it."""
        return max(width_of(self.d_qk), width_of(self.d_v))


def set_directory(directory: Path | str | None) -> None:
    """Where kernel files are written from now on; `None`: the user's cache directory."""
    global _directory
    _directory = None if directory is None else Path(directory)
    _module.cache_clear()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
    *,
    config: Config | None = None,
    out_layout: Layout = "bhtd",
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: out [B, H, TQ, D_V] in v's dtype, dense in the order of `out_layout`; lse [B, H, TQ] float32, natural units,
    -inf for a row without keys.

    Few queries go to the kernels of `decode`, unless a `config` for these ones is given.

    Raises:
        KernelError: shapes or dtypes that the kernels do not take.
    """
    _check(q, k, v, captures, sizes, spec)
    if config is None and not spec.dropout and _decode().takes(q, k, v):
        return _decode().forward(q, k, v, captures, sizes, spec, out_layout=out_layout)
    module = _kernels(q, k, v, captures, sizes, spec, config)
    return module.forward(q, k, v, *captures, *sizes, out_layout=out_layout)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    captures: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
    *,
    grad_lse: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`(dq, dk, dv, d_captured)`, the last one of each captured tensor in `spec.learned`.

    `grad_lse` [B, H, TQ] is the gradient of the log-sum-exp, if it is used.

    A row without keys sends no gradient, but that of a "mean" row to the values.
    """
    _check(q, k, v, captures, sizes, spec)
    module = _kernels(q, k, v, captures, sizes, spec, config)
    if hopper.takes(q.dtype, architecture(q.device)) and not hopper.copies([grad_out]):
        grad_out = grad_out.contiguous()
    dq, dk, dv, d_sink, d_loads = module.backward(grad_out, q, k, v, out, lse, *captures, *sizes, grad_lse=grad_lse)
    if not spec.learned:
        return dq, dk, dv, []
    shape = (*q.shape[:3], k.shape[2])
    return dq, dk, dv, captured_gradients(shape, d_loads, d_sink, captures, sizes, spec)


def source(spec: AttentionSpec, problem: Problem, *, config: Config | None = None) -> str:
    """The text of the kernel file for a specification and a problem."""
    config = config or default_config(spec, problem)
    return emit.attention_source(
        spec,
        d_qk=problem.d_qk,
        d_v=problem.d_v,
        dtype=str(problem.dtype).removeprefix("torch."),
        forward=config.forward.options(),
        dq=config.dq.options(),
        dkv=config.dkv.options(),
        captured=config.captured.options(),
        fast_tanh=config.fast_tanh,
        split_dkv=config.split_dkv,
        hopper=config.for_hopper,
    )


@lru_cache(maxsize=1)
def _decode() -> ModuleType:
    """The kernels for few queries, which build on this module."""
    from . import decode

    return decode


def _kernels(
    q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, config: Config | None
) -> ModuleType:
    return _module(spec, q.shape[-1], v.shape[-1], q.dtype, q.device, hopper.copies([q, k, v]), config)


@lru_cache(maxsize=1024)
def _module(
    spec: AttentionSpec, d_qk: int, d_v: int, dtype: torch.dtype, device: torch.device, copies: bool, config: Config | None
) -> ModuleType:
    problem = Problem(d_qk=d_qk, d_v=d_v, dtype=dtype, arch=architecture(device), copies=copies)
    return emit.load_kernel(emit.write_kernel(source(spec, problem, config=config), _directory))


def _check(q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> None:
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise KernelError(f"Expected q, k and v of one dtype of {DTYPES} but got {q.dtype}, {k.dtype}, {v.dtype}. Cast them first.")
    if not (q.ndim == k.ndim == v.ndim == 4 and _fit(q.shape, k.shape, v.shape)):
        raise KernelError(
            "Expected q [B, H, TQ, D], k [B, H_KV, TK, D] and v [B, H_KV, TK, D_V] with H a multiple of H_KV but got "
            f"q={tuple(q.shape)}, k={tuple(k.shape)}, v={tuple(v.shape)}."
        )
    if len(captures) != len(spec.captures) or len(sizes) != len(spec.sizes):
        raise KernelError(
            f"Expected captures={spec.captures!r} and sizes={spec.sizes!r} but got {len(captures)} tensors, {len(sizes)} integers."
        )


def _fit(q: torch.Size, k: torch.Size, v: torch.Size) -> bool:
    return q[1] % k[1] == 0 and k[:3] == v[:3] and q[0] == k[0] and q[3] == k[3]


# --------------------------------------------------------------------------------------------------------------- configurations


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> Arch:
    """`"sm_90"`, `"gfx942"`, ...; `"cpu"` for Triton's interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _rule(forward: Tile, dq: Tile, dkv: Tile, captured: Tile, *, split: bool = False) -> Config:
    launches = [Launch(block_m=m, block_n=n, num_warps=w, num_stages=s) for m, n, w, s in (forward, dq, dkv, captured)]
    return Config(forward=launches[0], dq=launches[1], dkv=launches[2], captured=launches[3], split_dkv=split)


# By padded head dimension, for 2-byte operands. All fit the shared memory without spilling: tests/test_aot.py.
_SM_90 = {  # 227 KB of shared memory a block
    64: _rule((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3), (64, 64, 4, 2)),
    128: _rule((128, 64, 8, 3), (128, 64, 8, 3), (32, 128, 8, 2), (64, 64, 8, 2)),
    256: _rule((128, 32, 8, 4), (128, 32, 8, 2), (32, 128, 8, 2), (64, 32, 8, 1), split=True),
}
_SM_100 = {  # likewise, accumulators outside of the registers
    64: _rule((128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 3), (64, 64, 4, 2)),
    128: _rule((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2)),
    256: _rule((128, 32, 8, 4), (128, 32, 8, 2), (32, 128, 8, 2), (64, 32, 8, 1), split=True),
}
_SM_80 = {  # 163 KB
    64: _rule((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2)),
    128: _rule((128, 32, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 1)),
    256: _rule((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1), (64, 32, 8, 1), split=True),
}
_SMALL = {  # sm_86, sm_89, sm_120: 99 KB
    64: _rule((128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 1)),
    128: _rule((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), (64, 32, 8, 1)),
    256: _rule((64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1), split=True),
}
_AMD = {  # 64 KB of LDS, wavefronts of 64
    64: _rule((128, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1)),
    128: _rule((128, 32, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
    256: _rule((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 4, 1), split=True),
}
_FULL_PRECISION = {  # float32 operands
    64: _rule((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
    128: _rule((32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    256: _rule((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
}


def default_config(spec: AttentionSpec, problem: Problem) -> Config:
    """The configuration for a problem, by a fixed rule: head dimension, dtype, architecture.

    Raises:
        KernelError: head dimensions beyond 256.
    """
    if problem.width > 256:
        raise KernelError(f"Expected head dimensions up to 256 but got d_qk={problem.d_qk!r}, d_v={problem.d_v!r}.")
    rule = replace(_rules(problem)[max(64, problem.width)], fast_tanh=takes_fast_tanh(spec, problem))
    if spec.dropout:  # random numbers take registers of their own
        rule = replace(rule, dkv=replace(rule.dkv, block_m=max(16, rule.dkv.block_m // 2)))  # type: ignore[union-attr]
    special = problem.copies and hopper.takes(problem.dtype, problem.arch) and hopper.serves(spec)
    return _for_hopper(rule, spec, problem) if special else rule


def _for_hopper(rule: Config, spec: AttentionSpec, problem: Problem) -> Config:
    """The rule with Hopper's own kernels; rows that average all values send gradients to them only through the general one."""
    variant = Variant(spec)
    sloped = variant.constant_slope is None
    chosen = hopper.rings(width_of(problem.d_qk), width_of(problem.d_v), crowded=variant.crowded, sloped=sloped)
    if spec.empty == "mean":
        chosen = {name: rings for name, rings in chosen.items() if name != "dkv"}
    return replace(rule, **chosen)  # type: ignore[arg-type]


def takes_fast_tanh(spec: AttentionSpec, problem: Problem) -> bool:
    """Whether NVIDIA's own tanh will do: its error times a soft-cap is below the rounding of bfloat16 scores, not of float16."""
    return "tanh" in spec.score and problem.arch.startswith("sm_") and problem.dtype == torch.bfloat16


def _rules(problem: Problem) -> dict[int, Config]:
    if problem.dtype == torch.float32 or problem.arch == "cpu":
        return _FULL_PRECISION
    if problem.arch.startswith("gfx"):
        return _AMD
    if problem.arch in ("sm_100", "sm_103"):
        return _SM_100
    if problem.arch == "sm_90":
        return _SM_90
    return _SM_80 if problem.arch == "sm_80" else _SMALL


def candidates(spec: AttentionSpec, problem: Problem) -> tuple[Config, ...]:
    """The default configuration first, then others worth timing, kernel by kernel around it."""
    base = default_config(spec, problem)
    found = [base, replace(base, split_dkv=not base.split_dkv)]
    for name in ("forward", "dq", "dkv", *(("captured",) if Variant(spec).learned else ())):
        launch: Launch | Rings = getattr(base, name)
        by_key = name == "dkv"
        for other in hopper.neighbours(launch, by_key=by_key) if isinstance(launch, Rings) else _neighbours(launch):
            found.append(replace(base, **{name: other}))  # type: ignore[arg-type]
    return tuple(dict.fromkeys(found))


def _neighbours(launch: Launch) -> list[Launch]:
    return [
        replace(launch, num_stages=launch.num_stages + 1),
        replace(launch, block_n=max(16, launch.block_n // 2)),
        replace(launch, block_n=launch.block_n * 2),
        replace(launch, block_m=max(16, launch.block_m // 2)),
        replace(launch, num_warps=12 - launch.num_warps if launch.num_warps in (4, 8) else 4),
    ]
