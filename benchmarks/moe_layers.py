"""Layers of experts for benchmarks: Hugging Face's modules and one in plain PyTorch, tokens of a known routing, float64, floors.

Tokens x [T, d] are drawn for experts chosen beforehand: noise, moved by a combination of the router's rows to where the logits of
the chosen experts lie between 3 and 4 and all others between -1/2 and 1/2. So the routing, uniform or skewed, is the same for all
contenders, whatever they round, and results can be held against float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LIFT = 3.0  # the least logit of a chosen expert


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer's sizes: d channels, f columns of each expert's gate, E experts, k of them for each token.

    groups, kept: the router chooses among the best `kept` of `groups` groups. shared: experts that all tokens go through.
    """

    family: str
    d: int
    f: int
    experts: int
    k: int
    groups: int = 1
    kept: int = 1
    shared: int = 0

    @property
    def expert_bytes(self) -> int:
        """Of one expert's three matrices in bfloat16."""
        return 6 * self.d * self.f

    @property
    def weight_bytes(self) -> int:
        """Of all that the layer keeps."""
        return (self.experts + self.shared) * self.expert_bytes + 2 * self.experts * self.d


SHAPES = {
    "qwen3-30b": Shape(family="qwen3", d=2048, f=768, experts=128, k=8),
    "mixtral-8x7b": Shape(family="mixtral", d=4096, f=14336, experts=8, k=2),
    "deepseek-v3": Shape(family="deepseek", d=7168, f=2048, experts=256, k=8, groups=8, kept=4, shared=1),
}
SMOKE = {name: replace(shape, d=128, f=32, experts=16, k=4, kept=min(shape.kept, 2)) for name, shape in SHAPES.items()}
SCALING = 2.5  # of DeepSeek-V3's routing weights


def flops(shape: Shape, tokens: int, *, backward: bool) -> float:
    """Of the matrix products: 6 d f for each token and expert, 2 d E of the router; twice as much again for the gradients."""
    forward = tokens * (6.0 * shape.d * shape.f * (shape.k + shape.shared) + 2.0 * shape.d * shape.experts)
    return forward * (3 if backward else 1)


def traffic(shape: Shape, tokens: int, active: int, *, backward: bool) -> float:
    """Bytes: weights of the active experts, router, tokens and results once; with gradients, weights twice, and theirs once."""
    weights = (active + shape.shared) * shape.expert_bytes + 2.0 * shape.experts * shape.d
    rows = 2.0 * tokens * shape.d
    return 3 * weights + 5 * rows if backward else weights + 2 * rows


# ----------------------------------------------------------------------------------------------------------------- routing


def draw(shape: Shape, tokens: int, routing: str, generator: torch.Generator) -> Tensor:
    """Experts [T, k] of each token, all different, as many in each group that it chooses among.

    routing: `uniform`, or `zipf`, where the n-th most popular is drawn in proportion to 1 / n.
    """
    device = generator.device
    popularity = torch.zeros(shape.experts, device=device)
    if routing == "zipf":
        ranks = torch.randperm(shape.experts, generator=generator, device=device) + 1
        popularity = -ranks.float().log()
    keys = popularity - torch.rand(tokens, shape.experts, generator=generator, device=device).log().neg().log()
    best = keys.unflatten(1, (shape.groups, -1)).topk(shape.k // shape.kept)  # [T, groups, k / kept]
    chosen = best.values.sum(-1).topk(shape.kept).indices
    firsts = torch.arange(shape.groups, device=device)[:, None] * (shape.experts // shape.groups)
    return (best.indices + firsts).gather(1, chosen[..., None].expand(-1, -1, best.indices.shape[-1])).flatten(1)


def kept_groups(scores: Tensor, shape: Shape) -> Tensor:
    """[T, E]: whether an expert stands in one of the groups whose two best scores have the largest sums."""
    best = scores.unflatten(1, (shape.groups, -1)).topk(2).values.sum(-1).topk(shape.kept).indices
    kept = torch.zeros(scores.shape[0], shape.groups, dtype=torch.bool, device=scores.device).scatter(1, best, True)
    return kept.repeat_interleave(shape.experts // shape.groups, 1)


def tokens_for(ids: Tensor, router: Tensor, generator: torch.Generator) -> Tensor:
    """x [1, T, d] in bfloat16 that the router [E, d] sends to `ids` [T, k]."""
    rows, device = len(ids), ids.device
    logits = torch.rand(rows, len(router), generator=generator, device=device) - 0.5
    logits.scatter_(1, ids, LIFT + torch.rand(ids.shape, generator=generator, device=device))
    x = torch.randn(rows, router.shape[1], generator=generator, device=device)
    wide = router.double()
    inverse = torch.linalg.solve(wide @ wide.T, wide).float()  # [E, d]: router @ inverse.T = 1
    return x.addmm_(logits - x @ router.float().T, inverse).bfloat16()[None]


# ------------------------------------------------------------------------------------------------------------------ layers


def hugging_face(shape: Shape, implementation: str, device: str) -> nn.Module:
    """The layer of the installed transformers with random weights in bfloat16; its experts by one of transformers' ways."""
    config, block = _block(shape)
    config._experts_implementation = implementation
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            layer = block(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return layer.eval()


def _block(shape: Shape) -> tuple[Any, type[nn.Module]]:
    common: dict[str, Any] = {"hidden_size": shape.d, "num_experts_per_tok": shape.k}
    if shape.family == "mixtral":
        from transformers.models.mixtral import modeling_mixtral as mixtral

        sizes: dict[str, Any] = {"intermediate_size": shape.f, "num_local_experts": shape.experts}
        return mixtral.MixtralConfig(**common, **sizes), mixtral.MixtralSparseMoeBlock
    if shape.family == "qwen3":
        from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

        sizes = {"moe_intermediate_size": shape.f, "num_experts": shape.experts, "norm_topk_prob": True}
        return qwen3.Qwen3MoeConfig(**common, **sizes), qwen3.Qwen3MoeSparseMoeBlock
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    sizes = {"moe_intermediate_size": shape.f, "n_routed_experts": shape.experts, "n_shared_experts": shape.shared}
    groups: dict[str, Any] = {
        "n_group": shape.groups,
        "topk_group": shape.kept,
        "norm_topk_prob": True,
        "routed_scaling_factor": SCALING,
    }
    return deepseek.DeepseekV3Config(**common, **sizes, **groups), deepseek.DeepseekV3MoE


class Plain(nn.Module):
    """The same layer as one would write it down first: the weights of each token's experts, gathered, in two einsums.

    Run as it stands it copies k experts for each token.
    """

    def __init__(self, shape: Shape, other: nn.Module):
        super().__init__()
        self.shape = shape
        self.router, self.up, self.down = other.gate.weight, other.experts.gate_up_proj, other.experts.down_proj
        self.shared = other.shared_experts if shape.shared else None

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts [T, k] of x [T, d]."""
        if self.shape.family == "deepseek":
            scores = torch.sigmoid(x.float() @ self.router.float().T)
            ids = scores.masked_fill(~kept_groups(scores, self.shape), float("-inf")).topk(self.shape.k).indices
            weights = scores.gather(1, ids)
            return weights / weights.sum(-1, keepdim=True) * SCALING, ids
        weights, ids = torch.softmax((x @ self.router.T).float(), dim=-1).topk(self.shape.k)
        return weights / weights.sum(-1, keepdim=True), ids

    def forward(self, hidden: Tensor) -> Tensor:
        """[1, T, d] -> [1, T, d]."""
        x = hidden.flatten(0, 1)
        weights, ids = self.route(x)
        gate, up = torch.einsum("td,tkfd->tkf", x, self.up[ids]).chunk(2, dim=-1)
        y = torch.einsum("tkf,tkdf->tkd", F.silu(gate) * up, self.down[ids])
        out = (y * weights[..., None].to(y.dtype)).sum(1).view_as(hidden)
        return out if self.shared is None else out + self.shared(hidden)


def leaves(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Router and experts of either layer, under the names that errors are reported by; the rest under their own."""
    if isinstance(layer, Plain):
        found = {"router": layer.router, "up": layer.up, "down": layer.down}
    else:
        found = {"router": layer.gate.weight, "up": layer.experts.gate_up_proj, "down": layer.experts.down_proj}
    named = {id(p) for p in found.values()}
    return found | {name: p for name, p in layer.named_parameters() if id(p) not in named}


# ----------------------------------------------------------------------------------------------------------------- float64


def exact(
    shape: Shape, layer: nn.Module, x: Tensor, ids: Tensor, gradient: Tensor | None = None, checked: Sequence[int] = ()
) -> dict[str, Tensor]:
    """The layer's result on x [T, d], routed to `ids` [T, k], in float64, one expert's weights at a time.

    With `gradient` [T, d]: the gradients of x, of the router, and of the weights of the `checked` experts, stacked.
    """
    named = leaves(layer)
    backward = gradient is not None
    x64 = x.detach().double().requires_grad_(backward)
    router = named["router"].detach().double().requires_grad_(backward)
    weights = _weights(shape, x64, router, ids)
    out, dx, dweights = (torch.zeros_like(t, requires_grad=False) for t in (x64, x64, weights))
    dups, ddowns = {}, {}
    rows_of = [(e, *(ids == e).nonzero().unbind(1)) for e in range(shape.experts)]
    for e, tokens, slots in rows_of:
        leaf = lambda t: t.detach().double().requires_grad_(backward)  # noqa: E731
        rows, weight, up, down = leaf(x64[tokens]), leaf(weights[tokens, slots]), leaf(named["up"][e]), leaf(named["down"][e])
        y = _swiglu(rows, up, down) * weight[:, None]
        out.index_add_(0, tokens, y.detach())
        if gradient is not None:
            drows, dweight, dup, ddown = torch.autograd.grad(y, (rows, weight, up, down), gradient.double()[tokens])
            dx.index_add_(0, tokens, drows)
            dweights[tokens, slots] = dweight
            if e in checked:
                dups[e], ddowns[e] = dup, ddown
    if shape.shared:
        up = torch.cat((layer_weight(layer, "gate_proj"), layer_weight(layer, "up_proj"))).double()
        y = _swiglu(x64, up, layer_weight(layer, "down_proj").double())
        out += y.detach()
        if gradient is not None:
            dx += torch.autograd.grad(y, x64, gradient.double())[0]
    if gradient is None:
        return {"out": out}
    through_router, drouter = torch.autograd.grad(weights, (x64, router), dweights)
    return {
        "out": out, "dx": dx + through_router, "drouter": drouter,
        "dup": torch.stack([dups[e] for e in checked]), "ddown": torch.stack([ddowns[e] for e in checked]),
    }  # fmt: skip


def layer_weight(layer: nn.Module, name: str) -> Tensor:
    """A matrix of the shared experts."""
    shared = layer.shared if isinstance(layer, Plain) else layer.shared_experts
    return getattr(shared, name).weight.detach()


def _weights(shape: Shape, x: Tensor, router: Tensor, ids: Tensor) -> Tensor:
    chosen = (x @ router.T).gather(1, ids)
    if shape.family != "deepseek":
        return chosen.softmax(-1)  # the probabilities of the chosen, brought to a sum of 1
    scores = chosen.sigmoid()
    return scores / scores.sum(-1, keepdim=True) * SCALING


def _swiglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = (x @ up.T).chunk(2, dim=-1)
    return (F.silu(gate) * value) @ down.T
