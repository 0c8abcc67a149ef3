"""Every error that a user can meet, one class a mistake. All derive from `EffcompileError`."""

from __future__ import annotations


class EffcompileError(Exception):
    """Base of all errors raised on purpose by effcompile."""


class ConfigError(EffcompileError, ValueError):
    """An option or environment variable that does not exist, or a value it does not take."""


class EffcompileWarning(UserWarning):
    """Something of ours failed, and the program goes on without it."""


class EstimateError(EffcompileError, ValueError):
    """Candidates that cannot be compared, or work whose time cannot be predicted."""


class CaptureError(EffcompileError):
    """A model that is not captured as one graph where one is asked for."""


class UnknownHardwareError(EffcompileError, ValueError):
    """A hardware name that no profile has."""


class ProfileError(EffcompileError, ValueError):
    """A file of a measured hardware profile that cannot be read."""


class PlotError(EffcompileError):
    """A picture that cannot be drawn, or a kind of file that none is written as."""


class LiftError(EffcompileError):
    """A graph that cannot be lifted faithfully. It goes to Inductor unchanged."""


class VerifyError(EffcompileError):
    """A rewrite whose result would differ from the original in shape, dtype, strides or uses."""


class ExpressionError(EffcompileError, ValueError):
    """Text that is not an index expression, or an expression that a printer cannot write."""


class KernelError(EffcompileError):
    """A kernel that could not be generated, built or launched."""


def summary(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or '(no message)').splitlines()[0]}"
