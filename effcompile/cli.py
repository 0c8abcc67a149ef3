"""The command line: `effarch explain`, `passes`, `hw`, `calibrate` and `doctor`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch

from . import config, doctor, roofline_plot
from .cost_model import devices
from .cost_model.hardware import Hardware
from .errors import EffcompileError
from .hardware_commands import calibrate, hw
from .terminal import console, table


class _Fallible(click.Group):
    """Shows the errors that are raised on purpose as one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EffcompileError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Fallible)
@click.version_option(package_name="effcompile")
def main() -> None:
    """See what the effarch backend of torch.compile does, and what this machine can do with it."""


main.add_command(hw)
main.add_command(calibrate)


@main.command()
@click.argument("target", metavar="FILE.py:NAME")
@click.option(
    "--hardware",
    "--hw",
    "hardware",
    metavar="NAME",
    help="Plan for this device instead of the one at hand (see `effarch hw list`).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--dump", type=click.Path(file_okay=False), metavar="DIR", help="Write graphs and kernels to this directory.")
@click.option("--train", is_flag=True, help="Plan with gradients, in training mode.")
@click.option(
    "--plot",
    "plots",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    multiple=True,
    help="Draw what was chosen on the device's roofline, as PNG or SVG; may be given twice. Needs matplotlib.",
)
def explain(target: str, hardware: str | None, as_json: bool, dump: str | None, train: bool, plots: tuple[str, ...]) -> None:
    """Capture NAME of FILE.py and report what matched, what was refused and why, and what was chosen.

    NAME is a module or a function. Its inputs are NAME_inputs or example_inputs in the same file: a tuple of positional
    arguments, a dict of keyword arguments, or a function that returns either.
    """
    import effcompile

    for path in plots:
        roofline_plot.checked(path)
    module, name = _load(target)
    model = _model(module, name)
    args, kwargs = _inputs(module, name)
    if hardware is not None:
        devices.get(hardware)
    with _mode(model, (args, kwargs), train):
        report = effcompile.explain(model, *args, hardware=hardware, dump=dump, **kwargs)
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    if plots:
        roofline_plot.save(report, _planned_for(report.hardware), plots)


@main.command()
def passes() -> None:
    """List the passes, in the order in which they run."""
    listed = table("pass", "what it does")
    for name in config.registered_passes():
        listed.add_row(name, _summary(importlib.import_module(f"effcompile.passes.{name.replace('-', '_')}")))
    console().print(listed)


@main.command(name="doctor")
def examine() -> None:
    """Say what this machine can do and what is missing. The exit code is 1 if the backend cannot be used."""
    listed = table("", "check", "finding", "remedy")
    checks = doctor.examine()
    for check in checks:
        mark = "ok" if check.ok else ("missing" if check.required else "note")
        listed.add_row(mark, check.name, check.detail, "" if check.ok else check.remedy)
    console().print(listed)
    sys.exit(0 if doctor.healthy(checks) else 1)


def _planned_for(name: str) -> Hardware:
    """The profile that a report was made for: one that has the name, else that of the GPU at hand."""
    if name not in devices.names() and torch.cuda.is_available():
        at_hand = devices.detect("cuda")
        if at_hand.name == name:
            return at_hand
    return devices.get(name)


def _load(target: str) -> tuple[ModuleType, str]:
    """The module of FILE.py:NAME, run under a name of its own, and NAME."""
    text, _, name = target.rpartition(":")
    path = Path(text)
    if not text or not name.isidentifier() or path.suffix != ".py":
        raise click.BadParameter(f"Expected FILE.py:NAME but got {target!r}")
    if not path.is_file():
        raise click.BadParameter(f"Expected a file but got {text!r}, which does not exist")
    spec = importlib.util.spec_from_file_location(f"_effarch_explained_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # true of every path that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module, name


def _model(module: ModuleType, name: str) -> Any:
    """The module instance or function called `name`; a module class is made without arguments."""
    if not hasattr(module, name):
        public = [
            key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise click.BadParameter(
            f"Expected a name of {module.__file__} but got {name!r}: it defines {', '.join(public) or 'nothing to call'}"
        )
    model = getattr(module, name)
    if inspect.isclass(model) and issubclass(model, torch.nn.Module):
        try:
            return model()
        except TypeError as error:
            raise click.BadParameter(f"Expected a module, or a class that needs no arguments, but got {name!r}: {error}") from error
    if not isinstance(model, torch.nn.Module) and not inspect.isroutine(model):
        raise click.BadParameter(
            f"Expected a torch.nn.Module or a function but got {name}={model!r} of type {type(model).__name__}"
        )
    return model


def _inputs(module: ModuleType, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from NAME_inputs or example_inputs."""
    for key in (f"{name}_inputs", "example_inputs"):
        if not hasattr(module, key):
            continue
        value = getattr(module, key)
        value = value() if callable(value) else value
        if isinstance(value, Mapping):
            return (), dict(value)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(value), {}
        raise click.BadParameter(
            f"Expected {key} to be a tuple or a dict of inputs but got {value!r} of type {type(value).__name__}"
        )
    raise click.BadParameter(
        f"Expected {name}_inputs or example_inputs in {module.__file__}, a tuple or a dict of inputs, but got neither"
    )


@contextlib.contextmanager
def _mode(model: Any, inputs: Any, train: bool) -> Iterator[None]:
    """Gradients and the module's mode: in training, floating-point inputs of a function require gradients."""
    if isinstance(model, torch.nn.Module):
        model.train(train)
    elif train:
        args, kwargs = inputs
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.is_leaf:
                value.requires_grad_()
    with torch.set_grad_enabled(train):
        yield


def _summary(module: ModuleType) -> str:
    """The first line of a module's docstring."""
    return (inspect.getdoc(module) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
