"""Solves for the operands of a first-order linear recurrence, given its states in a prime field.

    y_t - c_t * y_{t-1} = o_t, t > 0        (y_0 - o_0) / c_0 = initial

c is one of what enters, o a product of what enters, each as x, exp(x), 1/x or exp(-x); initial a product of what is the
same at all steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.fx import Node

from .exact import SAMPLES, Array, P, Value, inverse

FORMS = ("plain", "exponential", "reciprocal", "reciprocal exponential")
"""x, exp(x), 1 / x, exp(-x)."""


@dataclass(frozen=True)
class Factor:
    """A node that enters, in one of `FORMS`."""

    node: Node
    form: str


Product = tuple[Factor, ...]


@dataclass(frozen=True)
class Forms:
    """The `FORMS` of a node, each [SAMPLES, T], or [SAMPLES, 1] if it is the same at all steps."""

    arrays: Mapping[str, Array]

    @property
    def timed(self) -> bool:
        """Whether it is not the same at all steps."""
        return bool(self.arrays["plain"].shape[1] > 1)

    def turned(self) -> Forms:
        """The last step first."""
        return Forms({form: x[:, ::-1] for form, x in self.arrays.items()})


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What a recurrence is made of. `reverse`: from the last step to the first.

    Attributes:
        coefficient: None for 1.
        offset: factors of a product, none for 1; None for 0.
        initial: the same.
    """

    reverse: bool
    coefficient: Factor | None
    offset: Product | None
    initial: Product | None

    @property
    def factors(self) -> Product:
        """All of them."""
        coefficient = () if self.coefficient is None else (self.coefficient,)
        return (*coefficient, *(self.offset or ()), *(self.initial or ()))


@dataclass
class Solver:
    """Solves for operands among given nodes.

    Args:
        series: each node's forms.
        reverse: whether the series are turned, so that the last step comes first.

    Attributes:
        agreeing: the most steps for which states had operands, without having them for all steps.
    """

    series: Mapping[Node, Forms]
    reverse: bool = False
    agreeing: int = 0
    _heads: dict[Any, dict[int, Product]] = field(default_factory=dict)

    def solve(self, states: Array) -> Operands | None:
        """The operands of which `states` [SAMPLES, T], T > 1, are the recurrence."""
        for coefficient in (None, *self._factors(self.series)):
            found = self._with_coefficient(states, coefficient)
            if found is not None:
                return found
        return None

    def _with_coefficient(self, states: Array, coefficient: Factor | None) -> Operands | None:
        steps = np.ones((SAMPLES, 1), np.int64) if coefficient is None else self._array(coefficient)
        second, first = int(states[0, 1]), int(states[0, 0])
        rest = (second - int(steps[0, 1 if steps.shape[1] > 1 else 0]) * first) % P
        offset = None if rest == 0 else self._products(self.series, 1).get(rest)
        if rest and offset is None:
            return None
        if not self._agrees(states, steps, offset) or (offset is None and coefficient is None):
            return None
        given = 0 if offset is None else self._multiplied(offset)[:, 0]
        before = (states[:, 0] - given) % P * inverse(steps[:, 0]) % P
        if not before.any():
            return None if offset is None else Operands(reverse=self.reverse, coefficient=coefficient, offset=offset, initial=None)
        initial = self._initial(before)
        if initial is None:
            return None
        return Operands(reverse=self.reverse, coefficient=coefficient, offset=offset, initial=initial)

    def _agrees(self, states: Array, steps: Array, offset: Product | None) -> bool:
        """Whether all states follow, each from the one before."""
        factors = steps[:, 1:] if steps.shape[1] > 1 else steps
        wanted = (states[:, 1:] - factors * states[:, :-1]) % P
        given = np.zeros((SAMPLES, 1), np.int64) if offset is None else self._multiplied(offset)
        same = (wanted == (given[:, 1:] if given.shape[1] > 1 else given)).all(axis=0)
        if same.all():
            return True
        if states[:, :3].all():
            self.agreeing = max(self.agreeing, 1 + int(same.argmin()))
        return False

    def _initial(self, wanted: Array) -> Product | None:
        untimed = {node: forms for node, forms in self.series.items() if not forms.timed}
        found = self._products(untimed, 0).get(int(wanted[0]))
        return found if found is not None and (self._multiplied(found)[:, 0] == wanted).all() else None

    def _factors(self, series: Iterable[Node]) -> Iterator[Factor]:
        nodes = list(series)
        for form in FORMS:
            yield from (Factor(node, form) for node in nodes)

    def _array(self, factor: Factor) -> Array:
        return self.series[factor.node].arrays[factor.form]

    def _multiplied(self, factors: Iterable[Factor]) -> Array:
        result = np.ones((SAMPLES, 1), np.int64)
        for factor in factors:
            result = result * self._array(factor) % P
        return result

    def _products(self, nodes: Iterable[Node], step: int) -> dict[int, Product]:
        """Products of at most one form of each node by their value at a step in the first sample; of each value the shortest."""
        key = (tuple(nodes), step)
        if key not in self._heads:
            options = [[None, *(Factor(node, form) for form in FORMS)] for node in key[0]]
            chosen = sorted((tuple(f for f in some if f is not None) for some in itertools.product(*options)), key=len)
            heads: dict[int, Product] = {}
            for factors in chosen:
                heads.setdefault(self._head(factors, step), factors)
            self._heads[key] = heads
        return self._heads[key]

    def _head(self, factors: Sequence[Factor], step: int) -> int:
        result = 1
        for factor in factors:
            array = self._array(factor)
            result = result * int(array[0, step if array.shape[1] > 1 else 0]) % P
        return result


def forms_of(value: Value, length: int) -> Forms | None:
    """The `FORMS` of what enters, if `length` is the only length that it has."""
    if [n for n in value.lengths if n != 1] not in ([], [length]):
        return None
    if value.plain is None or value.image is None:
        return None
    plain, image = (plane.reshape(SAMPLES, -1) for plane in (value.plain, value.image))
    return Forms(dict(zip(FORMS, (plain, image, inverse(plain), inverse(image)), strict=True)))
