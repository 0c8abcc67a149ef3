"""effcompile: efficient LLM architectures, fast, from plain PyTorch.

`torch.compile(model, backend="effarch")` is the front door and needs no import. This module has the rest: `explain` says what
the backend makes of a model, `last_report` what it made of those compiled so far, `debug` takes one pass by itself.
"""

from __future__ import annotations

import importlib
from typing import Any

from .errors import ConfigError, EffcompileError
from .explain import Report, explain, last_report, reset_report
from .ir import Decision

__version__ = "0.1.0"

__all__ = ["ConfigError", "Decision", "EffcompileError", "Report", "debug", "explain", "last_report", "reset_report"]


def __getattr__(name: str) -> Any:
    if name == "debug":
        return importlib.import_module(".debug", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
