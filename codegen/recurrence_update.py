"""Few steps of a recurrence whose initial state is overwritten by the last: a decoder's state is read once and written once.

Every program reads the columns of the state that it writes, and no others, before it writes them. What is not taken is None, and
nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.recurrence import FEW_STEPS, RecurrenceSpec
from . import recurrence, recurrence_delta_step, recurrence_step
from . import recurrence_native as native
from . import recurrence_native_steps as native_steps
from .recurrence_trial import tried

Updated = tuple[Tensor, Tensor]


def on_gpu(v: Tensor, operands: Sequence[Tensor], state: Tensor, spec: RecurrenceSpec, layout: str) -> Updated | None:
    """`(out, normaliser)`, as `ops.recurrence.update_reference`, by the kernel for few steps.

    Raises:
        KernelError: as `recurrence.forward`, before anything is written.
    """
    if spec.delta != "none" or recurrence.steps_alone(spec) or state.dtype != torch.float32 or v.numel() == 0:
        return None
    x = recurrence._checked(v, [*operands, state], spec)
    module = recurrence._kernels(v, x, spec, None)
    if not 0 < v.shape[2] <= module.FEW:
        return None
    v, x = recurrence._one_dtype(v, x)
    out, normaliser, _ = module.forward(v, **x, layout=layout, final=state, **tried(module, spec, v, x))
    return out, normaliser


def on_cpu(v: Tensor, operands: Sequence[Tensor], state: Tensor, spec: RecurrenceSpec, layout: str) -> Updated | None:
    """The same in C++ or, for one step, by torch's own operations, which are faster then."""
    x = spec.named([*operands, state])
    if not spec.has_rows or state.dtype != torch.promote_types(v.dtype, torch.float32) or v.numel() == 0:
        return None
    if spec.delta != "none":
        return recurrence_delta_step.update(v, x, state, spec, layout) if v.shape[2] <= FEW_STEPS else None
    if v.shape[2] == 1:
        return recurrence_step.update(v, x, state, spec, layout)
    compiled = native_steps.forward(v, x, spec, layout, final=state) if native.supports(v) else None
    return None if compiled is None else compiled[:2]
