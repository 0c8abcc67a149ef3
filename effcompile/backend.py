"""The backend: a graph goes through the pipeline, and on to Inductor.

Whatever fails on the way, the graph goes to Inductor as it came, and the report says why.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch.fx import GraphModule

from . import __version__, _dynamo
from .config import Config
from .errors import LiftError, summary
from .explain import Frame, Report, last_report, record
from .pipeline import Pipeline, Result
from .runtime import warn_once

log = logging.getLogger(__name__)

CACHE_TAG = f"effcompile-{__version__}"  # a graph that holds our operations means what this version says


def effarch(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """The torch.compile backend. Registered under its name by entry point, so that no import is needed.

    Args:
        mode: as for Inductor: "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs".
        options: see `effcompile.config.Config`.

    Raises:
        ConfigError: an unknown option or a value that an option does not take.
    """
    config = Config.resolve(mode, options)
    settings = {**_dynamo.mode_options(config.mode), **config.inductor}
    return compile_graph(module, example_inputs, config, lambda graph, inputs, tag: _dynamo.inductor(graph, inputs, settings, tag))


def compile_graph(
    module: GraphModule, example_inputs: Sequence[Any], config: Config, compiler: Callable[[GraphModule, Sequence[Any], str], Any]
) -> Callable[..., Any]:
    """Take a graph through the rooms, have `compiler(graph, inputs, tag)` compile what came out, and record and deliver the report.

    If `compiler` fails on a rewritten graph, it gets the original.
    """
    pipeline = Pipeline(config)
    result = pipeline.run(module, example_inputs)
    frame = result.frame
    for failure in result.failures:
        _failed(config, f"one site was left as it came: {summary(failure)}", failure)
    with pipeline.timed("inductor"):
        if result.error is not None:
            compiled = _fall_back(module, example_inputs, config, compiler, result.error, frame.why)
        elif result.module is None:
            compiled = compiler(module, example_inputs, "")
        else:
            compiled, frame = _compile_rewritten(pipeline, result, module, example_inputs, compiler)
    frame = dataclasses.replace(frame, timings=MappingProxyType(dict(pipeline.timings)))
    log.info("%s: %s%s", frame.name, frame.outcome, f", {frame.why}" if frame.why else "")
    record(frame)
    _deliver(config, pipeline, frame)
    return compiled


def _compile_rewritten(
    pipeline: Pipeline, result: Result, module: GraphModule, example_inputs: Sequence[Any], compiler: Any
) -> tuple[Callable[..., Any], Frame]:
    assert result.module is not None
    try:
        return compiler(result.module, example_inputs, CACHE_TAG), result.frame
    except Exception as error:
        why = f"the rewritten graph could not be compiled: {summary(error)}"
        log.debug("%s: %s", pipeline.name, why, exc_info=True)
        compiled = _fall_back(module, example_inputs, pipeline.config, compiler, error, why)
        return compiled, pipeline.frame("fallback", why, step="inductor")


def _fall_back(
    module: GraphModule, example_inputs: Sequence[Any], config: Config, compiler: Any, error: Exception, why: str
) -> Callable[..., Any]:
    """What the option `fallback` says of a graph that we cannot handle. A graph that cannot be lifted is no failure of ours.

    Neither is one that cannot be compiled as it came, for which Dynamo has ways of its own.
    """
    if config.fallback == "error":
        raise error
    compiled = module.forward if config.fallback == "eager" else compiler(module, example_inputs, "")
    if not isinstance(error, LiftError):
        _failed(config, f"a graph was left to {config.fallback} as it came: {why}", error)
    return compiled


def _failed(config: Config, what: str, error: Exception) -> None:
    """One warning a reason, or the error itself where that is asked for."""
    if config.fallback == "error":
        raise error
    warn_once(f"effarch: {what}")


def _deliver(config: Config, pipeline: Pipeline, frame: Frame) -> None:
    """Hand the report to where the options send it."""
    report = Report(frames=(frame,), hardware=frame.hardware)
    _dynamo.artifact(f"effarch_{frame.name}", lambda: json.dumps(report.to_dict(), indent=2))
    try:
        if config.dump is not None:
            from .debug import dump

            dump(config.dump, pipeline, frame)
        if config.report is True:
            print(report, file=sys.stderr)
        elif callable(config.report):
            config.report(report)
        elif config.report:
            Path(str(config.report)).write_text(json.dumps(last_report().to_dict(), indent=2), encoding="utf-8")
    except Exception as error:
        _failed(config, f"the report of {frame.name} could not be delivered: {summary(error)}", error)


__all__ = ["Pipeline", "compile_graph", "effarch"]
