"""The wheel, installed where nothing of the checkout is in reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import effcompile

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("effcompile", "passes", "codegen", "cost_model")

ATTENTION = """
import sys
import torch

def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / 4.0, dim=-1) @ v

q, k, v = (torch.randn(1, 2, 16, 16) for _ in range(3))
assert "effcompile" not in sys.modules
compiled = torch.compile(attention, backend="effarch", fullgraph=True, options={"fallback": "error"})
torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
print(sys.modules["effcompile"].__file__)
"""


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "EFFARCH_"))}
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in a copy, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    out = copy / "out"
    succeeded(run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy, cwd=copy))
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of a new environment with the wheel in it.

    torch and the rest come from this environment by a plain path, which leaves out what an editable install hooks in.
    """
    home = tmp_path_factory.mktemp("installed")
    succeeded(run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home))
    python = home / "venv" / "bin" / "python"
    command = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(succeeded(run(python, "-c", command, cwd=home)).strip())
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *(p for p in sys.path if p.endswith("-packages"))}
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    succeeded(run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=home))
    return python.parent


def test_the_wheel_holds_each_module_and_kernel_once(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {f"effcompile/{path.relative_to(ROOT / 'effcompile')}" for path in (ROOT / "effcompile").glob("*.py")}
    expected |= {f"effcompile/ops/{path.name}" for path in (ROOT / "effcompile" / "ops").glob("*.py")}
    expected |= {f"effcompile/{room}/{path.name}" for room in PACKAGES[1:] for path in (ROOT / room).glob("*.py")}
    expected |= {f"effcompile/codegen/{path.name}" for path in (ROOT / "codegen").glob("*.cpp")}
    assert files == expected | {"effcompile/py.typed"}


def test_entry_point(installed, tmp_path):
    listed = succeeded(run(installed / "python", "-c", "import torch; print(torch.compiler.list_backends(()))", cwd=tmp_path))
    assert "'effarch'" in listed


def test_backend_needs_no_import(installed, tmp_path):
    printed = succeeded(run(installed / "python", "-c", ATTENTION, cwd=tmp_path))
    assert Path(printed.strip()).is_relative_to(installed.parent)


def test_console_script(installed, tmp_path):
    from effcompile.config import registered_passes

    printed = succeeded(run(installed / "effarch", "passes", cwd=tmp_path))
    assert [line.split()[0] for line in printed.splitlines()[1:]] == list(registered_passes())
    assert succeeded(run(installed / "effarch", "--version", cwd=tmp_path)) == f"effarch, version {effcompile.__version__}\n"


@pytest.mark.parametrize("name", PACKAGES[1:])
def test_bare_names_are_not_installed(installed, tmp_path, name):
    result = run(installed / "python", "-c", f"import {name}", cwd=tmp_path)
    assert f"ModuleNotFoundError: No module named '{name}'" in result.stderr
