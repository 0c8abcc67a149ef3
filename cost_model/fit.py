"""Factors of the schedule model from measured times: non-negative least squares on the logarithm of time.

    minimise over factors f > 0:   sum over measurements of (log predicted(f) - log measured)^2

by Levenberg and Marquardt's method on the logarithms of the factors, which keeps them positive; `overlap` goes by its logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch

from ..errors import EstimateError
from .schedule import DEFAULT, Factors

_NAMES = tuple(item.name for item in fields(Factors))
_FURTHEST = 3.0  # a factor stays within exp(3) = 20 times its start: what measurements say nothing about stays near it
_STEP = 1e-3
_PULL = 0.02  # towards the start, in units of one measurement's logarithm


def fit(predict: Callable[[Factors], Sequence[float]], measured: Sequence[float], *, start: Factors = DEFAULT) -> Factors:
    """The factors under which `predict` comes closest to `measured`, in the same unit of time.

    Raises:
        EstimateError: no measurements, or times that are not positive and finite.
    """
    if not measured or not all(0 < x < math.inf for x in (*measured, *predict(start))):
        raise EstimateError(f"Expected positive and finite times, measured and predicted, but got {len(measured)} measurements")
    wanted = torch.tensor(measured, dtype=torch.float64).log()
    origin = _to_vector(start)

    def residual(x: torch.Tensor) -> torch.Tensor:
        times = torch.tensor(predict(_from_vector(x)), dtype=torch.float64).log()
        return torch.cat([times - wanted, _PULL * (x - origin)])

    return _from_vector(_minimised(residual, origin))


def _minimised(residual: Callable[[torch.Tensor], torch.Tensor], origin: torch.Tensor) -> torch.Tensor:
    x, damping = origin.clone(), 1e-2
    found = residual(x)
    for _ in range(40):
        jacobian = torch.stack([(residual(x + _STEP * axis) - found) / _STEP for axis in torch.eye(len(x), dtype=x.dtype)], 1)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ found
        step = torch.linalg.solve(normal + damping * torch.diag(normal.diagonal() + 1e-9), -gradient)
        tried = torch.minimum(torch.maximum(x + step, origin - _FURTHEST), origin + _FURTHEST)
        then = residual(tried)
        if then.square().sum() < found.square().sum():
            converged = float((tried - x).abs().max()) < 1e-4
            x, found, damping = tried, then, damping / 3
            if converged:
                break
        elif damping > 1e6:
            break
        else:
            damping *= 4
    return x


def _to_vector(factors: Factors) -> torch.Tensor:
    values = []
    for name in _NAMES:
        value = getattr(factors, name)
        if name == "overlap":
            value = min(max(value, 1e-3), 1 - 1e-3)
            value = value / (1 - value)
        values.append(math.log(value))
    return torch.tensor(values, dtype=torch.float64)


def _from_vector(x: torch.Tensor) -> Factors:
    values = {name: math.exp(value) for name, value in zip(_NAMES, x.tolist(), strict=True)}
    values["overlap"] = values["overlap"] / (1 + values["overlap"])
    return Factors(**values)
