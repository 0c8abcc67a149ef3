"""What a call runs of a recurrence's kernel file is tried once on the machine at hand, on a small problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..ops.recurrence import RecurrenceSpec, reference, reference_backward
from .trust import compared, trust

_LENGTH, _HEADS = 150, 2  # two whole chunks and a part of one
_FEW = 3
_STRONG = 60.0  # by which the second head's decays are stronger: what is one product for the first is halved again for it


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Which kernels a call runs.

    Attributes:
        backward: gradients, or results.
        tile: the position in the file's TILES.
        split: whether time is cut into segments.
        few: whether each step is taken by itself.
        dtypes: of v and of the operands.
        given: which results have gradients.
        decay: whether gradients of gate and rate are wanted.
    """

    backward: bool
    tile: int
    split: bool
    few: bool
    dtypes: tuple[torch.dtype, ...]
    given: tuple[bool, bool, bool] = (True, True, True)
    decay: bool = True

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"


_trusted: set[tuple[ModuleType, torch.device, Trial]] = set()


def tried(
    module: ModuleType,
    spec: RecurrenceSpec,
    v: Tensor,
    x: Mapping[str, Tensor],
    *,
    grads: Sequence[Tensor | None] | None = None,
    decay: bool = True,
    segments: int | None = None,
) -> dict[str, int]:
    """The `tile` and `segments` that a call takes, after kernels for them have been tried; `grads` of the results for gradients.

    Raises:
        KernelError: the kernels do not agree with the reference.
    """
    tile, parts = module.choice(v, x["k"])
    segments = segments or parts
    trial = Trial(
        backward=grads is not None,
        tile=tile,
        split=segments > 1,
        few=grads is None and v.shape[2] <= module.FEW,
        dtypes=(v.dtype, *(x[name].dtype for name in spec.operands)),
        given=(True, True, True) if grads is None else (grads[0] is not None, grads[1] is not None, grads[2] is not None),
        decay=decay,
    )
    if (module, v.device, trial) not in _trusted:
        trust(module, v.device, str(trial), lambda: disagreement(module, spec, v.device, trial))
        _trusted.add((module, v.device, trial))
    return {"tile": tile, "segments": segments}


def disagreement(module: ModuleType, spec: RecurrenceSpec, device: torch.device, trial: Trial) -> str:
    """Why the kernels of a trial are not to be trusted on a device: empty if they give what the reference gives."""
    v, operands, grads = example(module, spec, device, trial)
    exact = [v.float(), *(x.float() for x in operands)]
    x = spec.named(operands)
    options = {"segments": 2 if trial.split else 1, "tile": trial.tile}
    if not trial.backward:
        wanted = dict(zip(("out", "normaliser", "final"), reference(exact[0], exact[1:], spec), strict=True))
        got = dict(zip(wanted, module.forward(v, **x, **options), strict=True))
        return compared(got, wanted, v.dtype, trial.direction)
    by_out, by_normaliser, by_final = [None if g is None else g.float() for g in grads]
    found = reference_backward(by_out, by_normaliser, by_final, exact[0], exact[1:], None, spec)
    wanted = dict(zip(("v", *spec.operands), found, strict=True))
    got = module.backward(*grads, v, **x, **options, weigh=trial.decay)
    if not trial.decay:
        wanted = {name: g for name, g in wanted.items() if name not in ("gate", "rate")}
    sums = [name for name in ("gate", "rate", "bonus") if name in x and x[name].shape[2] == 1]
    return compared(got, wanted, v.dtype, trial.direction, sums=sums)


def example(
    module: ModuleType, spec: RecurrenceSpec, device: torch.device, trial: Trial
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Operands of a small problem, and gradients of its results."""
    d_k, d_v, _ = module.SIZES
    generator = torch.Generator(device="cpu").manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device)

    b, h, t = 1, _HEADS, _FEW if trial.few else _LENGTH
    time = 1 if getattr(module, "CONSTANT_DECAY", False) else t
    gate = {"head": (1, 1), "key": (d_k, 1), "value": (1, d_v)}.get(spec.decay, (1, 1))
    strength = torch.ones(1, h, 1, 1, 1, device=device)
    strength[:, -1] = _STRONG
    columns = d_v + spec.normaliser
    made = {
        "q": make(b, h, t, d_k).mul(d_k**-0.5),
        "k": make(b, h, t, d_k),
        "gate": make(1, h, time, *gate).abs().mul(-0.2) * strength,
        "rate": make(1, h, 1, 1, 1).abs(),
        "bonus": make(1, h, 1, d_k),
        "initial": make(b, h, d_k, columns),
    }
    dtypes = dict(zip(("v", *spec.operands), trial.dtypes, strict=True))
    grads = [make(b, h, t, d_v).to(spec.out_dtype), make(b, h, t) if spec.normaliser else None, make(b, h, d_k, columns)]
    given = [g if wanted else None for g, wanted in zip(grads, trial.given, strict=True)]
    return make(b, h, t, d_v).to(dtypes["v"]), [made[name].to(dtypes[name]) for name in spec.operands], given
