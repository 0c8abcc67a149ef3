"""The arrows of the house: which room may import which, read off the sources."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("passes", "codegen", "cost_model")

# Recognition and generation meet in these alone.
MEETING_PLACES = {"pipeline", "explain", "debug", "cli"}
# What a room may import of ours, besides itself.
ALLOWED = {
    "errors": set(),
    "terms": {"errors"},
    "ir": {"errors", "terms"},
    "cost_model": {"ir", "errors", "config"},
    "codegen": {
        *("ir", "errors", "config", "terms", "viewmaps", "printers", "intervals", "evaluate", "builder", "ops", "cost_model"),
        "_torch",  # its compiler of C++
    },
}
# A pass may use the whole language of graphs and index expressions, and nothing that comes after it.
FORBIDDEN = {"passes": {"codegen", "cost_model", "trace", "runtime", "doctor", "backend", *MEETING_PLACES}}
# Interfaces private to torch change without notice: these alone touch them.
TORCH_PRIVATE = {f"effcompile/{name}.py" for name in ("_torch", "_dynamo", "trace")}
# Underscored in name, documented in fact.
TORCH_PUBLIC = {"_check"}


def sources() -> list[Path]:
    folders = (ROOT / "effcompile", ROOT / "effcompile" / "ops", *(ROOT / room for room in ROOMS))
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "effcompile" else ["effcompile", *parts]
    return ".".join(parts)


def room_of(module: str) -> str:
    """`passes` for effcompile.passes.attention, `ir` for effcompile.ir."""
    return (module.split(".") + [""])[1]


def imports(source: str, module: str) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it; `module` names a file, a package's as package.__init__."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    module = module_name(path)
    ours = (name for name in imports(path.read_text(), module) if name.startswith("effcompile."))
    return {room_of(name) for name in ours} - {room_of(module), "PASSES", "__version__"}


def private_torch(source: str) -> set[str]:
    """Dotted names of torch's that hold a part with a leading underscore, operators aside."""
    tree = ast.parse(source)
    dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | set(imports(source, ""))
    names = (name.split(".") for name in dotted if name.startswith("torch.") and not name.startswith("torch.ops."))
    return {
        ".".join(parts)
        for parts in names
        if any(p.startswith("_") and not p.startswith("__") and p not in TORCH_PUBLIC for p in parts)
    }


@pytest.mark.parametrize(
    ("source", "module", "names"),
    [
        ("import effcompile.ir", "effcompile.cli", {"effcompile.ir"}),
        ("from . import ir", "effcompile.cli", {"effcompile", "effcompile.ir"}),
        ("from ..ir import Work", "effcompile.passes.moe", {"effcompile.ir", "effcompile.ir.Work"}),
        ("from .moe import X", "effcompile.passes.__init__", {"effcompile.passes.moe", "effcompile.passes.moe.X"}),
        ("def f():\n    from ..codegen import cpu", "effcompile.passes.moe", {"effcompile.codegen", "effcompile.codegen.cpu"}),
    ],
)
def test_imports_are_read(source, module, names):
    assert set(imports(source, module)) == names


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch._dynamo", {"torch._dynamo"}),
        ("from torch._inductor import compile_fx", {"torch._inductor", "torch._inductor.compile_fx"}),
        ("torch._C._x(1)", {"torch._C", "torch._C._x"}),
        ("torch.ops.aten._softmax(x)\ntorch._check(x)\ntorch.fx.__version__", set()),
    ],
)
def test_private_names_are_read(source, names):
    assert private_torch(source) == names


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    room = room_of(module_name(path))
    used = rooms_imported(path)
    if room in ALLOWED:
        assert used <= ALLOWED[room], f"{room} may import {sorted(ALLOWED[room])} alone"
    assert not used & FORBIDDEN.get(room, set()), f"{room} must not import {sorted(FORBIDDEN[room])}"
    if room not in MEETING_PLACES:
        assert not {"passes", "codegen"} <= used | ({room} & {"passes", "codegen"}), (
            f"only {sorted(MEETING_PLACES)} may import both"
        )


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_private_torch_stays_in_its_place(path):
    if str(path.relative_to(ROOT)) not in TORCH_PRIVATE:
        assert private_torch(path.read_text()) == set()


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_bare_imports(path):
    bare = {name for name in imports(path.read_text(), module_name(path)) if name.split(".")[0] in ROOMS}
    assert not bare, f"write effcompile.{bare and min(bare)}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_refuses_its_bare_name(room):
    code = f"import {room}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"ImportError: Expected import effcompile.{room} but got import {room}" in result.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_linked_and_flat(room):
    link = ROOT / "effcompile" / room
    assert link.is_symlink() and link.resolve() == ROOT / room
    assert not [path for path in (ROOT / room).iterdir() if path.is_dir() and any(path.glob("*.py"))], "rooms are flat"
    assert importlib.import_module(f"effcompile.{room}").__name__ == f"effcompile.{room}"


def test_packages_are_the_folders():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    inside = (path.parent for path in (ROOT / "effcompile").glob("*/__init__.py") if not path.parent.is_symlink())
    folders = {"effcompile", *(f"effcompile.{path.name}" for path in inside), *(f"effcompile.{room}" for room in ROOMS)}
    assert set(settings["packages"]) == folders
    assert settings["package-dir"] == {f"effcompile.{room}": room for room in ROOMS}


def test_supported_torch_is_written_alike():
    """The range that pip checks and the one that `effarch doctor` checks."""
    from effcompile.doctor import TORCH_RANGE, TRITON_FROM

    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    low, high = (f"{major}.{minor}" for major, minor in TORCH_RANGE)
    assert f"torch>={low},<{high}" in dependencies
    assert any(line.startswith(f"triton>={TRITON_FROM[0]}.{TRITON_FROM[1]};") for line in dependencies)


def test_every_variable_and_option_is_documented():
    from effcompile.config import _OPTIONS, ENVIRONMENT

    page = (ROOT / "docs" / "backend-and-options.md").read_text()
    assert not [name for name in (*ENVIRONMENT, *_OPTIONS) if f"`{name}`" not in page]


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (page.parent / link).exists()]
