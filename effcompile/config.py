"""Every option and environment variable, validated in one place.

An option comes from `torch.compile(..., options={...})`, else from its environment variable, else from its default.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import platformdirs

from .errors import ConfigError

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
Numerics = Literal["contract", "strict"]
Fallback = Literal["inductor", "eager", "error"]
ReportTarget = bool | str | Callable[[Any], Any]

ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "EFFARCH_HARDWARE": "name of the hardware profile to plan for (see `effarch hw list`)",
        "EFFARCH_FALLBACK": "what becomes of a graph on which a pass or a kernel build fails: inductor, eager or error",
        "EFFARCH_REPORT": "0: no report; 1: print it to standard error; FILE.json: write it there",
        "EFFARCH_DUMP": "directory for the graphs before and after each pass, and the kernels",
        "EFFARCH_CACHE_DIR": "directory for generated kernels",
        "EFFARCH_PROFILE_DIR": "directory for calibrated hardware profiles",
        "EFFARCH_DISABLE": "passes to leave out, separated by commas (see `effarch passes`)",
    }
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One compilation's options, complete and valid. Made by `Config.resolve`.

    Attributes:
        mode: torch.compile's mode, handed on to Inductor. An option too, since torch.compile takes a mode or options but not both.
        passes: for each registered pass, whether it runs.
        hardware: name of the hardware profile to plan for; None detects the device of the graph.
        numerics: "contract" bounds the error against float64; "strict" also keeps the original's rounding points.
        fallback: what becomes of a graph on which a pass or a kernel build fails.
        tuning_budget_s: seconds that may be spent on measuring candidates. Nothing is measured yet: the cost model decides.
        report: False; True prints to standard error; a path writes JSON; a callable receives the report.
        dump: directory for the graphs before and after each pass, and the kernels; None writes nothing.
        inductor: further Inductor options, as `torch.compile(options=...)` takes them.
    """

    mode: Mode = "default"
    passes: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))
    hardware: str | None = None
    numerics: Numerics = "contract"
    fallback: Fallback = "inductor"
    tuning_budget_s: float = 0.0
    report: ReportTarget = False
    dump: Path | None = None
    inductor: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def resolve(
        cls,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        known_passes: Iterable[str] | None = None,
    ) -> Config:
        """The configuration of one `torch.compile(backend="effarch", mode=mode, options=options)`.

        `known_passes` are the legal names of passes, by default those that are registered.

        Raises:
            ConfigError: an option does not exist, or a value is not one it takes.
        """
        options = _mapping("options", {} if options is None else options)
        names = tuple(registered_passes() if known_passes is None else known_passes)
        if mode is not None and "mode" in options:
            raise ConfigError(f"Expected mode once but got mode={mode!r} and options['mode']={options['mode']!r}")
        for name in options:
            if name not in _OPTIONS:
                raise ConfigError(_unknown("option", name, _OPTIONS))

        def value(name: str, default: Any, variable: str | None = None) -> Any:
            if name in options:
                return _OPTIONS[name](name, options[name])
            if variable is not None and (text := os.environ.get(variable, "")):
                return _OPTIONS[name](variable, _from_environment(name, text))
            return default

        return cls(
            mode=value("mode", "default") if mode is None else _mode("mode", mode),
            passes=_passes(value("passes", {}), names),
            hardware=value("hardware", None, "EFFARCH_HARDWARE"),
            numerics=value("numerics", "contract"),
            fallback=value("fallback", "inductor", "EFFARCH_FALLBACK"),
            tuning_budget_s=value("tuning_budget_s", 0.0),
            report=value("report", False, "EFFARCH_REPORT"),
            dump=value("dump", None, "EFFARCH_DUMP"),
            inductor=value("inductor", MappingProxyType({})),
        )

    def enabled(self, name: str) -> bool:
        """Whether the pass `name` runs."""
        return self.passes.get(name, True)

    def key(self) -> str:
        """One line of JSON that differs whenever the compiled graph may: every field but `report`, `dump` and `fallback`."""
        fields = {
            "mode": self.mode,
            "passes": dict(self.passes),
            "hardware": self.hardware,
            "numerics": self.numerics,
            "tuning_budget_s": self.tuning_budget_s,
            "inductor": dict(self.inductor),
        }
        return json.dumps(fields, sort_keys=True, default=repr)


def cache_dir() -> Path:
    """The directory of generated kernels: EFFARCH_CACHE_DIR, else the user's cache directory. It may not exist yet.

    Raises:
        ConfigError: EFFARCH_CACHE_DIR names a file.
    """
    path = _directory("EFFARCH_CACHE_DIR", os.environ.get("EFFARCH_CACHE_DIR") or None)
    return path or Path(platformdirs.user_cache_dir("effcompile", appauthor=False))


def profile_dir() -> Path:
    """The directory of calibrated profiles: EFFARCH_PROFILE_DIR, else in the user's configuration directory. It may not exist yet.

    Raises:
        ConfigError: EFFARCH_PROFILE_DIR names a file.
    """
    path = _directory("EFFARCH_PROFILE_DIR", os.environ.get("EFFARCH_PROFILE_DIR") or None)
    return path or Path(platformdirs.user_config_dir("effcompile", appauthor=False)) / "profiles"


def failing_kernels_raise() -> bool:
    """Whether a kernel that fails while a compiled graph runs raises: EFFARCH_FALLBACK=error. The option is not known by then."""
    return os.environ.get("EFFARCH_FALLBACK") == "error"


def registered_passes() -> tuple[str, ...]:
    """Names of the registered passes, in the order in which they run."""
    from .passes import PASSES  # importing it loads every recogniser

    return tuple(PASSES)


def _unknown(what: str, name: Any, legal: Iterable[str]) -> str:
    legal = tuple(legal)
    close = difflib.get_close_matches(str(name), legal, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Expected {what} to be one of {', '.join(legal) or 'none'} but got {name!r}.{hint}"


def _bad(expected: str, name: str, value: Any) -> ConfigError:
    return ConfigError(f"Expected {expected} but got {name}={value!r} of type {type(value).__name__}")


def _one_of(name: str, value: Any, legal: tuple[str, ...]) -> Any:
    if value not in legal:
        raise _bad(f"one of {', '.join(map(repr, legal))}", name, value)
    return value


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _bad("a dict with string keys", name, value)
    return MappingProxyType(dict(value))


def _switches(name: str, value: Any) -> Mapping[str, bool]:
    switches = _mapping(name, value)
    for key, on in switches.items():
        if not isinstance(on, bool):
            raise _bad("True or False", f"{name}[{key!r}]", on)
    return switches


def _hardware(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise _bad("the name of a hardware profile, or None", name, value)
    from .cost_model import devices  # the devices read options too

    if value not in devices.names():
        raise ConfigError(_unknown(name, value, devices.names()))
    return value


def _mode(name: str, value: Any) -> Any:
    return _one_of(name, value, get_args(Mode))


def _numerics(name: str, value: Any) -> Any:
    return _one_of(name, value, get_args(Numerics))


def _fallback(name: str, value: Any) -> Any:
    return _one_of(name, value, get_args(Fallback))


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise _bad("a finite number of seconds >= 0", name, value)
    return float(value)


def _report(name: str, value: Any) -> ReportTarget:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool) or callable(value) or (isinstance(value, str) and value.endswith(".json")):
        return value
    raise _bad("True, False, a callable, or a path that ends in .json", name, value)


def _directory(name: str, value: Any) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise _bad("a directory, or None", name, value)
    path = Path(value).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise _bad("a directory, not a file", name, value)
    return path


def _passes(switches: Mapping[str, bool], names: tuple[str, ...]) -> Mapping[str, bool]:
    """For each pass of `names` whether it runs: the option, else EFFARCH_DISABLE, else True."""
    disabled = [name.strip() for name in os.environ.get("EFFARCH_DISABLE", "").split(",") if name.strip()]
    for origin, given in (("passes", tuple(switches)), ("EFFARCH_DISABLE", tuple(disabled))):
        for name in given:
            if name not in names:
                raise ConfigError(_unknown(f"each name in {origin}", name, names))
    return MappingProxyType({name: switches.get(name, name not in disabled) for name in names})


def _from_environment(name: str, text: str) -> Any:
    if name == "report":
        return {"0": False, "1": True}.get(text, text)
    return text


_OPTIONS: Mapping[str, Callable[[str, Any], Any]] = MappingProxyType(
    {
        "passes": _switches,
        "hardware": _hardware,
        "numerics": _numerics,
        "fallback": _fallback,
        "tuning_budget_s": _seconds,
        "report": _report,
        "dump": _directory,
        "inductor": _mapping,
        "mode": _mode,
    }
)
