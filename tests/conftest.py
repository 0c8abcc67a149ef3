"""Settings of the whole suite. They stand before torch is imported, and pytest-xdist's workers inherit them."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
if "PYTEST_XDIST_WORKER" not in os.environ:
    for _name in [name for name in os.environ if name.startswith("EFFARCH_")]:
        del os.environ[_name]  # a developer's own settings must not decide a test
    # An operation's new backward does not change the key under which its compiled graph is kept: begin with empty caches.
    _caches = Path(tempfile.mkdtemp(prefix="effcompile-tests-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_caches / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(_caches / "triton")
    os.environ["EFFARCH_CACHE_DIR"] = str(_caches / "kernels")
    os.environ["EFFARCH_PROFILE_DIR"] = str(_caches / "profiles")
    atexit.register(shutil.rmtree, _caches, ignore_errors=True)

import hypothesis
import pytest
import torch

_EXEMPT = ("torch", "transformers")
# The same examples each time; HYPOTHESIS_PROFILE=explore looks for new ones.
hypothesis.settings.register_profile("suite", derandomize=True)
hypothesis.settings.register_profile("explore", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what tests find to tests/golden instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """Compares a text with a file of `tests/golden`, or writes it there under `--update-golden`."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"{path} differs; --update-golden writes it"

    return compare


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` on a machine that has none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No compiled code, random state or grad mode of one test reaches the next."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.enable_grad():
        yield


@pytest.fixture
def replace_where_possible(monkeypatch: pytest.MonkeyPatch):
    """The first candidate that is not Inductor's own is chosen: graphs as small as tests' would often be left."""
    from effcompile.cost_model import select

    choose = select.choose

    def prefer_ours(candidates, *args):
        best, estimates = choose(candidates, *args)
        return next((candidate for candidate in candidates if candidate.kind != "inductor"), best), estimates

    monkeypatch.setattr(select, "choose", prefer_ours)


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch):
    """`torch.empty`, `empty_like` and `empty_strided` yield NaN: an element which nobody wrote is seen.

    Eager calls from this project, its kernels and its tests alone: traced ones, torch's own and transformers' stay as they are.
    `Tensor.new_empty` is replaced below, for all callers.
    """
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _filled(getattr(torch, name)))


def _filled(create):
    def filled(*args, **kwargs):
        tensor = create(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if caller in _EXEMPT or type(tensor) is not torch.Tensor or not tensor.is_floating_point():
            return tensor
        tensor.detach().fill_(float("nan"))
        return tensor

    return filled


def _new_empty(self, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    tensor = torch.empty(size, dtype=dtype or self.dtype, layout=layout or self.layout, device=device or self.device)
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


# Dynamo cannot see through a patched method, so `Tensor.new_empty` is replaced behind the dispatcher, for real tensors alone.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("new_empty", _new_empty, "CPU")
if torch.cuda.is_available():
    _LIBRARY.impl("new_empty", _new_empty, "CUDA")
