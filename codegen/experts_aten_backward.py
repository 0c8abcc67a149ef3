"""The gradients of `effcompile::experts`, with ATen's products.

For the rows x of all assignments, H the pre-activation that the forward pass kept, a = act(H), computed again, and g the incoming
gradient of a row's token:

    c = g D^T         dw = a . c + g . b2     dH = w c act'(H)
    dx = dH U^T       dU = x^T dH             dD = (w a)^T g        db1 = sum of dH        db2 = sum of w g

If the weight multiplies the input, x stands for w x above, w elsewhere is 1, and dw = x . dx before dx is multiplied by w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from effcompile.ops.experts import ExpertsSpec, Tensors, each_operand, expert_count, halves

from .experts_activation import activation, blocks, wide_halves
from .experts_aten import Layer, combine, gather_rows, row_weights
from .experts_segments import Assignments, Segments, assign, rows_of, segments, transposed


def backward(
    grad: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, up: Tensors, down: Tensors, biases: Tensors,
    h: torch.Tensor, spec: ExpertsSpec, wanted: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of x, weights, each of up, down and biases; empty where `wanted` (see `ops.experts.GRADIENTS`) says no."""
    operands = list(each_operand(x, weights, up, down, biases, wanted))
    if not ids.numel():
        return [torch.zeros_like(operand) if want else operand.new_empty(0) for operand, want in operands]
    found = [torch.empty_like(operand) if want else operand.new_empty(0) for operand, want in operands]
    experts, ups, downs = expert_count(down, spec), 2 + len(up), 2 + len(up) + len(down)
    gradients = Layer.of(found[2:ups], found[ups:downs], found[downs:], experts, spec)
    assigned = assign(ids, experts)
    step = _Step(x, weights, Layer.of(up, down, biases, experts, spec), assigned, spec)
    for_x, for_weights, for_up, for_down, for_biases = wanted
    g = grad[assigned.token].to(x.dtype)
    inner = step.through_activation(g, h[: assigned.kept])
    if for_down:
        step.way.outer(inner.activation, g, gradients.down)
    if for_up:
        step.weights_up(inner.pre, gradients)
    if for_biases:
        step.biases(g, inner.pre, gradients)
    if for_x or (for_weights and spec.weighted == "input"):
        dx = step.inputs(inner.pre)
    if for_weights:
        of_rows = step.of_weights(g, inner) if spec.weighted == "output" else step.of_input_weights(dx)
        found[1].copy_(torch.cat([of_rows, of_rows.new_zeros(1)])[assigned.row])
    if for_x:
        found[0].copy_(combine(dx if step.input_weights is None else dx * step.input_weights, None, assigned, x.dtype))
    return found


@dataclass(frozen=True)
class _Inner:
    """What goes back through the activation: w a [kept, f], dH [kept, F] and a . c [kept]."""

    activation: torch.Tensor
    pre: torch.Tensor
    products: torch.Tensor


class _Step:
    """The rows of one call: what each gradient is made of."""

    def __init__(self, x: torch.Tensor, weights: torch.Tensor, layer: Layer, assigned: Assignments, spec: ExpertsSpec):
        self.x, self.weights, self.layer, self.assigned, self.spec = x, weights, layer, assigned, spec
        self.way: Segments = segments(assigned, *layer.up, layer.down)
        self.w = row_weights(weights, assigned)[:, None] if spec.weighted == "output" else None

    @property
    def input_weights(self) -> torch.Tensor | None:
        """[kept + 1, 1], what multiplies the input of each row."""
        if self.spec.weighted != "input":
            return None
        w = row_weights(self.weights, self.assigned)
        return torch.cat([w, w.new_zeros(1)])[:, None]

    def through_activation(self, g: torch.Tensor, h: torch.Tensor) -> _Inner:
        """Computed in float32 at least, and kept in the dtype of `h`."""
        functions = activation(self.spec.activation, self.spec.gated)
        c = h.new_empty((h.shape[0], h.shape[1] // len(functions.arguments)))
        self.way.product(g, transposed(self.layer.down), None, c)
        wide = torch.promote_types(h.dtype, torch.float32)
        inner = _Inner(torch.empty_like(c), torch.empty_like(h), c.new_empty(c.shape[:1], dtype=wide))
        for at in blocks(h):
            arguments = wide_halves(h[at], self.spec)
            value, *slopes = functions.slopes(**arguments)
            own = c[at].to(wide)
            inner.products[at] = (own * value).sum(-1)
            if self.w is not None:
                own, value = own * self.w[at], value * self.w[at]
            inner.activation[at] = value
            pre = halves(inner.pre[at], self.spec)
            for name, slope in zip(arguments, slopes, strict=True):
                pre[name].copy_(own * slope)
        return inner

    def weights_up(self, pre: torch.Tensor, out: Layer) -> None:
        """dU = x^T dH."""
        rows = gather_rows(self.x, self.weights, self.assigned, self.spec)
        for bank, columns in zip(out.up, pre.chunk(len(out.up), dim=1), strict=True):
            self.way.outer(rows, columns, bank)

    def biases(self, g: torch.Tensor, pre: torch.Tensor, out: Layer) -> None:
        """db1 = sum of dH, db2 = sum of w g."""
        for bank, columns in zip(out.up_bias, pre.chunk(max(1, len(out.up_bias)), dim=1), strict=False):
            self.way.sums(columns, bank)
        if out.down_bias is not None:
            self.way.sums(g if self.w is None else g * self.w, out.down_bias)

    def inputs(self, pre: torch.Tensor) -> torch.Tensor:
        """dx = dH U^T, [kept + 1, d]; the last row is for `combine` to fill."""
        dx = self.x.new_empty((pre.shape[0] + 1, self.x.shape[1]))
        for at, (bank, columns) in enumerate(zip(self.layer.up, pre.chunk(len(self.layer.up), dim=1), strict=True)):
            self.way.product(columns, transposed(bank), None, dx[:-1], add=at > 0)
        return dx

    def of_weights(self, g: torch.Tensor, inner: _Inner) -> torch.Tensor:
        """dw = a . c + g . b2, [kept]."""
        if self.layer.down_bias is None:
            return inner.products
        return inner.products + (g * rows_of(self.layer.down_bias, self.assigned).to(inner.products.dtype)).sum(-1)

    def of_input_weights(self, dx: torch.Tensor) -> torch.Tensor:
        """dw = x . dx, [kept], before dx is multiplied by w."""
        wide = torch.promote_types(dx.dtype, torch.float32)
        return (dx[:-1].to(wide) * self.x[self.assigned.token]).sum(-1)
