"""A graph as a Python file that runs by itself: its code, its constants, random inputs of its shapes, and a `__main__`."""

from __future__ import annotations

import importlib
import operator
import pprint
import re
import types
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from ._dynamo import hint_of

_INLINE = 64  # elements of a constant that is written out
_PROVIDED = {"torch", "device", "inf", "nan", "NoneType"}

_PRELUDE = """from math import inf, nan

import torch
import torch.fx
from torch import device
{imports}
NoneType = type(None)
"""

_MAIN = """
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [random_input(spec, generator) if isinstance(spec, dict) else spec for spec in INPUTS]


def random_input(spec, generator):
    dtype = getattr(torch, spec["dtype"])
    if dtype.is_floating_point or dtype.is_complex:
        values = torch.randn(spec["shape"], generator=generator, device="cpu").to(dtype)
    else:
        low, high = spec["range"]
        values = torch.randint(low, high + 1, spec["shape"], generator=generator, device="cpu").to(dtype)
    tensor = torch.empty_strided(spec["shape"], spec["stride"], dtype=dtype, device=spec["device"])
    return tensor.copy_(values).requires_grad_(spec["requires_grad"])


if __name__ == "__main__":
    outputs = Graph()(*inputs())
    for position, output in enumerate(outputs if isinstance(outputs, (tuple, list)) else [outputs]):
        described = f"{output.dtype} {list(output.shape)}" if isinstance(output, torch.Tensor) else repr(output)
        print(f"output {position}: {described}")
"""


def write(path: Path, module: GraphModule, example_inputs: Sequence[Any], title: str) -> str:
    """Write the file, and next to it constants too large to be written out; returns the file's text."""
    constants: dict[str, torch.Tensor] = {}
    classes = list(_classes(module, "Graph", constants))
    imports, missing = _imports(module)
    parts = [f'"""{title}"""\n', _PRELUDE.format(imports="".join(f"{line}\n" for line in imports))]
    parts += [f"# Cannot run: {name} is not importable.\n" for name in missing]
    parts += [f"INPUTS = {pprint.pformat([describe_input(x) for x in example_inputs], width=120, sort_dicts=False)}\n"]
    if constants:
        stored = path.with_suffix(".pt")
        torch.save(constants, stored)
        parts.append(f'CONSTANTS = torch.load(__file__.removesuffix(".py") + "{stored.suffix}")\n')
    text = "\n".join([*parts, *classes, _MAIN])
    path.write_text(text, encoding="utf-8")
    return text


def code(module: GraphModule) -> str:
    """The graph as Python, with shapes, strides and the lines of the model; its bodies after it."""
    own = module.graph.python_code("self", verbose=True, include_stride=True, include_device=True).src.strip("\n")
    bodies = [f"# {name}\n{code(inner)}" for name, inner in module.named_children() if isinstance(inner, GraphModule)]
    return "\n\n".join([own, *bodies])


def describe_input(value: Any) -> Any:
    """Shape, dtype and the like of a tensor, as a dict; a number as it is, a symbolic one as its example."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return hint_of(value)
    if not isinstance(value, torch.Tensor):
        return value if isinstance(value, (int, float, bool, str, type(None))) else repr(value)
    described = {
        "shape": [int(hint_of(n)) for n in value.shape],
        "stride": [int(hint_of(n)) for n in value.stride()],
        "dtype": str(value.dtype).removeprefix("torch."),
        "device": str(value.device),
        "requires_grad": value.requires_grad and value.is_leaf,
    }
    if not (value.dtype.is_floating_point or value.dtype.is_complex):
        described["range"] = _range(value)
    return described


def _range(value: torch.Tensor) -> list[int]:
    if type(value) is not torch.Tensor or value.numel() == 0:
        return [0, 1]
    return [int(value.min().item()), int(value.max().item())]


def _classes(module: GraphModule, name: str, constants: dict[str, torch.Tensor]) -> Iterable[str]:
    """A class for each body, and one for the graph, with its constants and bodies as attributes."""
    lines = []
    for target in sorted({str(node.target) for node in module.graph.nodes if node.op == "get_attr"}):
        value = reduce(getattr, target.split("."), module)
        if isinstance(value, GraphModule):
            body = f"{name}_{re.sub(r'[^0-9a-zA-Z_]', '_', target)}"
            yield from _classes(value, body, constants)
            lines.append(f"self.{target} = torch.fx.symbolic_trace({body}())  # higher-order operators take GraphModules")
        elif isinstance(value, torch.Tensor):
            lines.append(f"self.{target} = {_constant(f'{name}.{target}', value, constants)}")
        else:
            lines.append(f"self.{target} = {value!r}")
    source = module.graph.python_code("self", verbose=True, include_stride=True, include_device=True).src.strip("\n")
    yield "\n".join(
        [
            f"\nclass {name}(torch.nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in lines),
            "",
            *(f"    {line}".rstrip() for line in source.split("\n")),
            "",
        ]
    )


def _constant(name: str, value: torch.Tensor, constants: dict[str, torch.Tensor]) -> str:
    value = value.detach()
    if value.numel() <= _INLINE and type(value) is torch.Tensor and value.layout is torch.strided:
        return f"torch.tensor({value.tolist()!r}, dtype={value.dtype}, device={str(value.device)!r})"
    constants[name] = value
    return f"CONSTANTS[{name!r}]"


def _imports(module: GraphModule) -> tuple[list[str], list[str]]:
    """Lines that bring in the other names that the code mentions, and names that cannot be had."""
    lines: set[str] = set()
    missing: set[str] = set()
    graphs = [inner for inner in module.modules() if isinstance(inner, GraphModule)]
    if any("effcompile" in str(node.target) for inner in graphs for node in inner.graph.nodes):
        lines.add("import effcompile.backend  # registers torch.ops.effcompile")
    for inner in graphs:
        generated = inner.graph.python_code("self")
        for name, value in generated.globals.items():
            if name in _PROVIDED or not re.search(rf"\b{re.escape(name)}\b", generated.src):
                continue
            line = _import_of(name, value)
            (lines if line else missing).add(line or name)
    return sorted(lines), sorted(missing)


def _import_of(name: str, value: Any) -> str | None:
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__} as {name}"
    origin, qualified = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if not origin or not qualified.isidentifier():
        return None
    try:
        found = operator.attrgetter(qualified)(importlib.import_module(origin))
    except (ImportError, AttributeError):
        return None
    return f"from {origin} import {qualified} as {name}" if found is value else None
