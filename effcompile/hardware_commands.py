"""The commands about devices: `effarch hw list`, `show` and `diff`, and `effarch calibrate`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import click
import torch

from .cost_model import calibrations, conditions, devices
from .cost_model.calibrate import calibrate as measured
from .cost_model.hardware import Hardware
from .terminal import console, table

_TEXTS = ("name", "sources", "device_pattern")


@click.group()
def hw() -> None:
    """The devices that are known, and the one at hand."""


@hw.command(name="list")
def list_devices() -> None:
    """List the devices that have a profile, with their rates; calibrated ones last."""
    listed = table("name", "arch", "SMs", "bf16 TFLOP/s", "sustained", "memory GB", "GB/s", "sustained")
    for name in devices.names():
        device = devices.get(name)
        rates = (device.peak_matmul_tflops("bfloat16"), device.sustained_matmul_tflops("bfloat16"))
        memory = (device.memory_gb, device.bandwidth_gb_s, device.sustained_bandwidth_gb_s)
        listed.add_row(name, device.arch, str(device.sms), *(f"{figure:.4g}" for figure in (*rates, *memory)))
    console().print(listed)


@hw.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
def show(name: str | None, as_json: bool) -> None:
    """Show each figure of a profile and where it comes from; of the device at hand, if no NAME is given."""
    device = devices.detect(_at_hand()) if name is None else devices.get(name)
    if as_json:
        click.echo(json.dumps(device.to_dict(), indent=2))
        return
    shown = table("figure", device.name, "source")
    for figure, value in _figures(device):
        shown.add_row(figure, value, device.sources.get(figure.partition(" ")[0], ""))
    console().print(shown)
    for change in _changes_of(device):
        console().print(f"stale: {change}")


@hw.command()
@click.argument("first", required=False)
@click.argument("second", required=False)
def diff(first: str | None, second: str | None) -> None:
    """Show where two profiles differ: FIRST and SECOND, or FIRST and the device at hand, or that device's before calibration."""
    one = devices.uncalibrated(_at_hand()) if first is None else devices.get(first)
    other = devices.detect(_at_hand()) if second is None else devices.get(second)
    mine, theirs = dict(_figures(one)), dict(_figures(other))
    differing = [figure for figure in {**mine, **theirs} if mine.get(figure) != theirs.get(figure)]
    if not differing:
        click.echo(f"{one.name} and {other.name} have the same figures")
        return
    shown = table("figure", one.name, other.name)
    for figure in differing:
        shown.add_row(figure, mine.get(figure, ""), theirs.get(figure, ""))
    console().print(shown)


@click.command()
@click.option("--device", metavar="DEVICE", help="cpu or cuda; the GPU at hand if there is one.")
@click.option("--dry-run", is_flag=True, help="Measure and show, but store nothing.")
def calibrate(device: str | None, dry_run: bool) -> None:
    """Measure the device at hand, and plan by what was measured from now on."""
    target = _at_hand() if device is None else torch.device(device)
    found = measured(target, progress=lambda step: click.echo(f"measuring {step} ...", err=True))
    before = dict(_figures(devices.uncalibrated(target)))
    shown = table("figure", "before", "measured")
    for figure, value in _figures(found.hardware):
        if found.hardware.sources.get(figure.partition(" ")[0], "").startswith("measured on this machine"):
            shown.add_row(figure, before.get(figure, ""), value)
    console().print(shown)
    if not dry_run:
        click.echo(f"stored as {found.hardware.name} in {calibrations.save(found)}")


def _at_hand() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _changes_of(device: Hardware) -> tuple[str, ...]:
    """What changed since a profile was calibrated, if it was on the device at hand."""
    at_hand = _at_hand()
    found = calibrations.of_device(devices.device_name(at_hand))
    if found is None or found.hardware != device:
        return ()
    return found.conditions.changes(conditions.current(at_hand, ask_driver=True))


def _figures(device: Hardware) -> Iterator[tuple[str, str]]:
    """Each figure as text; of a rate by type, each type's."""
    for item in dataclasses.fields(device):
        value = getattr(device, item.name)
        if item.name in _TEXTS or value in (None, ""):
            continue
        if isinstance(value, Mapping):
            yield from ((f"{item.name} {key}", _text(figure)) for key, figure in value.items())
        else:
            yield item.name, _text(value)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
