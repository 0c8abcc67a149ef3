"""Routers on a GPU: writes the kernels of a specification, tries them once, launches them.

    weights, ids = forward(logits, bias, spec)
    d_logits = backward(grad, logits, ids, spec)

One launch each; operands as `ops.route_operator` takes them, of any strides, in `DTYPES`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..errors import KernelError
from ..ops.route import RouteSpec, check, route, weights_of
from . import attention, emit, weave
from .trust import compared, trust

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_EXPERTS = 512
MAX_SLOTS = 32
_FILLS = {"-inf": -2139095041, "zero": 0}  # in the order of integers, see `route_kernels.in_order`


def refusal(spec: RouteSpec, experts: int, dtype: torch.dtype) -> str | None:
    """Why there are no kernels for a specification, so many experts and logits of a dtype, if there are none."""
    if spec.capacity:
        return f"a capacity of {spec.capacity} assignments of each expert depends on all tokens, and each is routed by itself"
    if experts > MAX_EXPERTS:
        return f"{experts} experts are more than the {MAX_EXPERTS} that a program holds in registers"
    if spec.k > MAX_SLOTS:
        return f"{spec.k} experts of a token are more than {MAX_SLOTS}, beyond which sorting is faster"
    if dtype not in DTYPES or spec.logits_dtype != "float32" or getattr(torch, spec.weights) not in DTYPES:
        return "routers are computed in float32, of float16, bfloat16 or float32"
    if spec.score == "none":
        return "what is chosen has no score, which is left to torch's top-k"
    return None


def forward(logits: Tensor, bias: Tensor | None, spec: RouteSpec) -> tuple[Tensor, Tensor]:
    """Weights [T, k] and ids [T, k], as `ops.route.route` defines them.

    Raises:
        KernelError: operands that the kernels do not take, or kernels that disagree with the definition on this machine.
        ValueError: operands that do not go together.
    """
    check(logits, bias, spec)
    module = _trusted(logits, spec, "forward")
    weights, ids = module.forward(logits, bias)
    return weights, ids


def backward(grad: Tensor, logits: Tensor, ids: Tensor, spec: RouteSpec) -> Tensor:
    """The gradient of the logits, contiguous.

    Raises:
        KernelError: operands that the kernels do not take, or kernels that disagree with the definition on this machine.
    """
    result: Tensor = _trusted(logits, spec, "backward").backward(grad, logits, ids)
    return result


def _trusted(logits: Tensor, spec: RouteSpec, direction: str) -> ModuleType:
    """The kernels of a specification, which have agreed with the definition on this machine."""
    why = refusal(spec, logits.shape[1], logits.dtype)
    if why:
        raise KernelError(f"Expected a router that there are kernels for but got spec={spec!r}: {why}.")
    module = _module(spec, attention._directory)
    experts, device = logits.shape[1], logits.device
    trust(
        module,
        device,
        f"{direction} {experts} {logits.dtype}",
        lambda: disagreement(module, spec, experts, logits.dtype, device, direction),
    )
    return module


def disagreement(
    module: ModuleType, spec: RouteSpec, experts: int, dtype: torch.dtype, device: torch.device, direction: str
) -> str:
    """Why a kernel file is not to be trusted on a device: empty if it gives what the definition gives, on a few tokens.

    Their logits are a different order of the same numbers for each token, far enough from one another for a choice that rounding
    does not change; and each is compared in both sizes of a program.
    """
    for tokens in (5, 517):
        logits, bias = example(spec, tokens, experts, dtype, device)
        wide = logits.float()
        weights, ids = route(wide, bias, spec)
        if direction == "forward":
            got_weights, got_ids = module.forward(logits, bias)
            got, wanted = {"weights": got_weights, "ids": got_ids}, {"weights": weights, "ids": ids}
        else:
            grad = torch.arange(weights.numel(), device=device).mul(2.4).cos().view_as(weights)  # neighbours differ
            leaf = wide.detach().requires_grad_()
            with torch.enable_grad():
                (exact,) = torch.autograd.grad(weights_of(leaf, ids, spec), leaf, grad)
            got, wanted = {"logits": module.backward(grad, logits, ids)}, {"logits": exact}
        why = compared(got, wanted, getattr(torch, spec.weights) if direction == "forward" else dtype, direction)
        if why:
            return why
    return ""


def example(spec: RouteSpec, tokens: int, experts: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Logits and bias of a small problem."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    order = torch.rand((tokens, experts), generator=generator, device="cpu").argsort(-1)
    logits = torch.linspace(-3, 3, experts, device="cpu")[order].to(device, dtype)
    bias = (
        torch.randint(-4, 5, (experts,), generator=generator, device="cpu").to(device, torch.float32) if spec.select_bias else None
    )
    return logits, bias


# ----------------------------------------------------------------------------------------------------------------------- files


@lru_cache(maxsize=1024)
def _module(spec: RouteSpec, directory: Path | None) -> ModuleType:
    return emit.load_kernel(emit.write_kernel(source(spec), directory, family="route"))


def flags(spec: RouteSpec) -> dict[str, bool]:
    """The template's flags for a specification."""
    return {
        "SOFTMAX": spec.score == "softmax",
        "AFTER": spec.score_after,
        "BIASED": spec.select_bias,
        "GROUPED": spec.kept_groups < spec.groups,
        "TOP2": spec.group_stat == "top2",
        "NORMED": bool(spec.norm),
        "SQUARED": spec.norm == 2,
        "CLAMPED": spec.clamp,
    }


def source(spec: RouteSpec) -> str:
    """The text of the kernel file of a specification."""
    grouped = spec.kept_groups < spec.groups
    settings = {
        "K": f"tl.constexpr({spec.k})",
        "GROUPS": f"tl.constexpr({spec.groups if grouped else 1})",
        "KEPT": f"tl.constexpr({spec.kept_groups if grouped else 1})",
        "FILL": f"tl.constexpr({_FILLS[spec.group_fill]})",
        "EPS": f"tl.constexpr({spec.eps!r})",
        "SCALE": f"tl.constexpr({spec.scale!r})",
        "LOWEST": "tl.constexpr(-2147483648)",
        "NAN": "tl.constexpr(2147483647)",
        "WEIGHTS_DTYPE": f"torch.{spec.weights}",
        "RUNTIME": "['T']",
    }
    decided = flags(spec)
    kernels = weave.prune(weave.drop(emit._template("route_kernels.py"), (*decided, *settings)), decided)
    parts = [
        "\n".join(f"{name} = {value}" for name, value in settings.items()), emit._primitives("tanh"),
        emit._without_preamble(kernels, "Kernels"), emit._heading("Reference"), weave.prune(_REFERENCE, decided),
        emit._heading("Check"), weave.prune(_MAIN, decided),
    ]  # fmt: skip
    return emit._file(_header(spec), parts)


def _header(spec: RouteSpec) -> str:
    score = f"{spec.score}(l)"
    lines = [f"p = {'l' if spec.score_after else score},  c = p{' + bias' if spec.select_bias else ''}"]
    if spec.kept_groups < spec.groups:
        stat = "the greatest c" if spec.group_stat == "max" else "the sum of the two greatest c"
        lines.append(f"of {spec.groups} groups the {spec.kept_groups} with {stat}; in others c = {spec.group_fill}")
    lines.append(f"ids = the {spec.k} greatest of c;  w = {f'{spec.score}(l[ids])' if spec.score_after else 'p[ids]'}")
    norm = {1: "sum(w)", 2: "sqrt(sum(w^2))"}.get(spec.norm)
    if norm:
        lines.append(f"w = {spec.scale!r} w / " + (f"max({norm}, {spec.eps!r})" if spec.clamp else f"({norm} + {spec.eps!r})"))
    elif spec.scale != 1.0:
        lines.append(f"w = {spec.scale!r} w")
    formula = "\n".join(f"    {line}" for line in lines)
    return f'''"""A router, written by effcompile.

{formula}

Shapes: logits [T, E], of any strides{", bias [E]" if spec.select_bias else ""}; weights {spec.weights} and ids int64 [T, {spec.k}].
Among equals the first is chosen.

Run this file to compare the kernels with the reference and to time them.
"""'''


_REFERENCE = '''def reference(logits, bias=None):
    """The same in plain torch, in the dtype of logits: `(weights, ids)`."""
    scores = logits
    if not AFTER:
        if SOFTMAX:
            scores = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
    choice = scores
    if BIASED:
        choice = choice + bias
    if GROUPED:
        parts = choice.unflatten(-1, (GROUPS.value, -1))
        if TOP2:
            stat = parts.topk(2, -1).values.sum(-1)
        else:
            stat = parts.amax(-1)
        order = stat.sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(stat).scatter(-1, order[..., : KEPT.value], 1)[..., None] != 0
        choice = torch.where(kept, parts, 0.0 if FILL.value == 0 else float("-inf")).flatten(-2)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[..., : K.value]
    weights = scores.gather(-1, ids)
    if AFTER:
        if SOFTMAX:
            weights = weights.softmax(-1)
        else:
            weights = weights.sigmoid()
    if NORMED:
        if SQUARED:
            norm = weights.norm(p=2, dim=-1, keepdim=True)
        else:
            norm = weights.sum(-1, keepdim=True)
        if CLAMPED:
            weights = weights / norm.clamp(min=EPS.value)
        else:
            weights = weights / (norm + EPS.value)
    return weights * SCALE.value, ids
'''

_MAIN = '''def main(tokens=4096, experts=128, device="cuda"):
    """Compares forward and backward with the reference, and times the kernels."""
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device=device, requires_grad=True)
    bias = None
    if BIASED:
        bias = torch.randn(experts, device=device)
    expected, expected_ids = reference(logits, bias)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, logits, grad)
    with torch.no_grad():
        weights, ids = forward(logits, bias)
        d_logits = backward(grad, logits, ids)
        print(f"    ids: {(ids != expected_ids).sum().item()} of {ids.numel()} differ")
        for name, x, y in (("weights", weights, expected), ("dlogits", d_logits, expected_grad)):
            print(f"{name:>7}: largest error {((x - y).abs().max() / y.abs().max()).item():.1e} of the largest value")
        if device == "cuda":
            print(f"forward  {triton.testing.do_bench(lambda: forward(logits, bias)):.4f} ms")
            print(f"backward {triton.testing.do_bench(lambda: backward(grad, logits, ids)):.4f} ms")
'''
