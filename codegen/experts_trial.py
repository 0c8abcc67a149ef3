"""What a call runs of a kernel file of experts is tried once on the machine at hand, on a small problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from effcompile.ops.experts import ExpertsSpec, Tensors, each_operand, expert_count, reference, reference_backward, split_biases

from .trust import compared, trust

_EXPERTS, _SLOTS = 5, 3


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Which kernels a call runs.

    Attributes:
        tile: the position in the file's TILES.
        few: whether no rows are sorted.
        keep: whether the pre-activation is written.
        wanted: which gradients are, or none for results.
        dense: whether each of up and down stands in memory along what its product sums.
        whole: whether each of d, f and d_out is a multiple of every block's width.
        dtypes: of ids, weights and biases, which all experts have alike.
    """

    tile: int
    few: bool
    keep: bool
    wanted: tuple[bool, ...] | None
    dense: tuple[bool, bool]
    whole: tuple[bool, bool, bool]
    dtypes: tuple[torch.dtype, ...]

    @property
    def direction(self) -> str:
        return "forward" if self.wanted is None else "backward"


_trusted: set[tuple[ModuleType, torch.device, Trial]] = set()


def tried(
    module: ModuleType, spec: ExpertsSpec, x: Tensor, ids: Tensor, weights: Tensor, up: Tensors, down: Tensors, biases: Tensors,
    *, wanted: Sequence[bool] | None, keep: bool, tile: int | None,
) -> dict[str, int | bool]:  # fmt: skip
    """The `tile` of a call, and whether it takes `few` assignments one by one, after kernels for them have been tried.

    Raises:
        KernelError: the kernels do not agree with the reference.
    """
    chosen, few = module.choice(*ids.shape, expert_count(down, spec), keep=keep)
    chosen, few = (chosen, few) if tile is None else (tile, False)
    trial = Trial(
        tile=chosen,
        few=few,
        keep=keep,
        wanted=None if wanted is None else tuple(wanted),
        dense=(up[0].stride(-2) == 1, down[0].stride(-2) == 1),
        whole=tuple(n % unit(module, chosen) == 0 for n in (x.shape[1], *down[0].shape[-2:])),  # type: ignore[arg-type]
        dtypes=(ids.dtype, weights.dtype, *(bias.dtype for bias in biases[:: 1 if spec.is_stacked else len(down)])),
    )
    if (module, x.device, trial) not in _trusted:
        trust(module, x.device, str(trial), lambda: disagreement(module, spec, x.device, trial))
        _trusted.add((module, x.device, trial))
    return {"tile": chosen, "few": few}


def unit(module: ModuleType, tile: int) -> int:
    """The widest block of the products of a tile, all being powers of two."""
    launches = (*module.TILES[tile].values(), module.OUTER)
    return max(options[name] for options in launches for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))


def disagreement(module: ModuleType, spec: ExpertsSpec, device: torch.device, trial: Trial) -> str:
    """Why the kernels of a trial are not to be trusted on a device: empty if they give what the reference gives."""
    x, ids, weights, up, down, biases = example(module, spec, device, trial)
    wide_x, wide_weights = x.float(), weights.float()
    wide_up, wide_down, wide_biases = ([t.float() for t in tensors] for tensors in (up, down, biases))
    wanted_out, wanted_h = reference(wide_x, ids, wide_weights, wide_up, wide_down, wide_biases, spec)
    out, h = torch.empty_like(wanted_out), x.new_empty(wanted_h.shape)
    grouped = tuple(map(list, split_biases(biases, _EXPERTS, spec)))
    routed = None if spec.weighted == "none" else weights
    if trial.wanted is None:
        module.forward(
            x, ids, routed, up, down, grouped, out=out, h=h if trial.keep else None, tile=trial.tile, few=trial.few
        )  # fmt: skip
        got, wanted = {"out": out}, {"out": wanted_out}
        if trial.keep:
            rows = int(((ids >= 0) & (ids < _EXPERTS)).sum())
            got["h"], wanted["h"] = h[:rows], wanted_h[:rows]
        return compared(got, wanted, x.dtype, trial.direction)
    grad = torch.linspace(-1, 1, out.numel(), device=device).cos().view_as(out).to(x.dtype)
    found = reference_backward(grad.float(), wide_x, ids, wide_weights, wide_up, wide_down, wide_biases, spec, trial.wanted)
    made = [torch.empty_like(of) for of, _ in each_operand(x, weights, up, down, biases, trial.wanted)]
    ends = 2 + len(up), 2 + len(up) + len(down)
    by = trial.wanted
    given = {
        "dx": made[0] if by[0] else None, "d_weights": made[1] if by[1] else None, "d_up": made[2 : ends[0]] if by[2] else (),
        "d_down": made[ends[0] : ends[1]] if by[3] else (),
        "d_biases": tuple(map(list, split_biases(made[ends[1] :], _EXPERTS, spec))) if by[4] else ((), ()),
    }  # fmt: skip
    module.backward(grad, x, ids, routed, up, down, grouped, wanted_h.to(x.dtype), **given, tile=trial.tile)
    counted = (("up", up), ("down", down), ("bias", biases))
    names = ["x", "weights", *(f"{name}{at}" for name, tensors in counted for at in range(len(tensors)))]
    wants = [want for _, want in each_operand(x, weights, up, down, biases, by)]
    pairs = {name: pair for name, want, *pair in zip(names, wants, made, found, strict=True) if want}
    return compared(
        {name: a for name, (a, _) in pairs.items()}, {name: b for name, (_, b) in pairs.items()}, x.dtype, trial.direction
    )  # fmt: skip


def example(
    module: ModuleType, spec: ExpertsSpec, device: torch.device, trial: Trial
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Operands of a small problem: tiles that are whole and tiles that are not, an expert without rows, assignments dropped."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = module.DTYPE) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").mul(shape[-1] ** -0.5).to(device, dtype)

    def stored(of_all: Tensor) -> list[Tensor]:
        return [of_all] if spec.is_stacked else [x.clone() for x in of_all]

    def matrices(inner: int, columns: int, along: bool) -> list[Tensor]:
        return [x.mT for x in stored(make(_EXPERTS, columns, inner))] if along else stored(make(_EXPERTS, inner, columns))

    block = unit(module, trial.tile)
    d, f, d_out = (block if whole else block // 2 + 40 for whole in trial.whole)
    tokens = 2 if trial.few else module.TILES[trial.tile]["FIRST"]["BLOCK_M"] + 20
    ids_dtype, weights_dtype, *bias_dtypes = trial.dtypes
    ids = torch.randint(-1, _EXPERTS - 1, (tokens, _SLOTS), generator=generator, device="cpu")
    ids[: tokens // 2, 0] = 1
    weights = torch.rand((tokens, _SLOTS), generator=generator, device="cpu").to(device, weights_dtype)
    columns = f if spec.is_pair or not spec.gated else 2 * f
    parts = 2 if spec.is_pair else 1
    up = [x for _ in range(parts) for x in matrices(d, columns, trial.dense[0])]
    down = matrices(f, d_out, trial.dense[1])
    sizes = [columns] * parts * spec.biased[0] + [d_out] * spec.biased[1]
    biases = [x for n, dtype in zip(sizes, bias_dtypes, strict=True) for x in stored(make(_EXPERTS, n, dtype=dtype))]
    return make(tokens, d).mul(d**0.5), ids.to(device, ids_dtype), weights, up, down, biases
