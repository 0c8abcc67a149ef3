"""What the leaves of a region are to its result, found by its derivatives at random places, and proved by evaluating it.

    result[b, t, h, p] = sum over j <= t, n of exp(G_t - G_j) q[b, t, h, n] k[b, j, h, n] v[b, j, h, p]

    depends on the leaf     at t only    q             on p, at positions <= t    v
                            linearly, not on p    k    otherwise                  the gate

A proposal is taken only if the recurrence it stands for agrees with the region in float64, at random values of several magnitudes
and at positions around the borders of chunks. What a leaf's dimension has to do with one of the result's is found the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from effcompile.probe import Places, Probe, shape

from .chunks import Leaf, Region, ordered_leaves

Role = Literal["q", "k", "v", "gate", "initial"]
Form = Literal["log", "negative", "factor", "exponential"]
"""What the log-decay is of the gate: itself, its negative, its logarithm, -exp of it."""

_TOLERANCE = 1e-9
_ROUNDING = 1e-13  # a share of the largest derivative up to which another is none
_MAGNITUDES = (1.0, 0.1, 3.0)
_FORMS: tuple[Form, ...] = ("log", "negative", "factor", "exponential")

_LOGARITHM: dict[Form, Callable[[Tensor], Tensor]] = {
    "log": lambda x: x,
    "negative": torch.neg,
    "factor": torch.log,
    "exponential": lambda x: -x.exp(),
}
_GATE: dict[Form, Callable[[Tensor], Tensor]] = {
    "log": lambda x: x,
    "negative": torch.neg,
    "factor": torch.exp,
    "exponential": lambda x: x.neg().log(),
}

Axis = int | Literal["t", "n", "one"]
"""What a leaf's dimension is: the result's dimension of that number, the position, the depth, or of size 1."""


class Unproved(Exception):
    """No recurrence was found that the region is."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One operand: the number of its leaf, what each dimension is; `groups`: how many of the result's share an element there."""

    leaf: int
    axes: tuple[Axis, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Roles:
    """A proved proposal. `column` is the result's dimension that is v's own; `factor` a constant before q.

    `constant` are log-decays that no leaf gives, over the result's dimensions but positions and column; of size 1 where they do not
    differ.
    """

    parts: Mapping[Role, Part]
    form: Form
    column: int
    factor: float
    constant: np.ndarray[Any, Any] | None = None

    @property
    def decays(self) -> bool:
        """Whether there is a decay."""
        return "gate" in self.parts or self.constant is not None


class Prover:
    """Finds and proves what a region is.

    Args:
        length: positions of the leaves; those of the result beyond it must be zero.
    """

    def __init__(self, region: Region, order: Mapping[Node, int], length: int):
        self.region, self.order, self.length = region, order, length
        self.merge = region.merge
        self.sizes = shape(self.merge.node)
        self.leaves = ordered_leaves(region, order)
        self.places = self._lane(self._positions())
        self.generator = torch.Generator().manual_seed(0)

    def leaf(self, part: Part) -> Node:
        """The tensor of an operand."""
        return self.leaves[part.leaf]

    def roles(self) -> Roles:
        """The proposal that holds.

        Raises:
            Unproved: none does.
        """
        proposal, parts, column = self._proposed()
        with torch.no_grad(), torch.device("cpu"):
            return self._proved(proposal, parts, column)

    def _proved(self, proposal: str, parts: Mapping[Role, Part], column: int) -> Roles:
        for roles in self._candidates(parts, column):
            factor = self._agrees(roles)
            if factor is not None:
                return replace(roles, factor=factor)
        raise Unproved(f"the result is not the recurrence of {proposal}")

    def _candidates(self, parts: Mapping[Role, Part], column: int) -> Iterator[Roles]:
        for form in _FORMS if "gate" in parts else _FORMS[:1]:
            yield Roles(parts=parts, form=form, column=column, factor=0.0)
        if "gate" not in parts:
            constant = self._measured(column)
            if constant is not None:
                differing = [d for d, n in zip(self._lane_dims(column), constant.shape, strict=True) if n > 1]
                self.places = tuple(np.arange(self.sizes[d]) if d in differing else p for d, p in enumerate(self.places))
                yield Roles(parts=parts, form="log", column=column, factor=0.0, constant=constant)

    def _lane_dims(self, column: int) -> list[int]:
        return [dim for dim in range(len(self.sizes)) if dim not in (self.merge.dim, column)]

    def _measured(self, column: int) -> np.ndarray[Any, Any] | None:
        """The log-decay from the first position to the second, for each lane: with ones for all leaves, 1 + decay over 1."""
        lanes = self._lane_dims(column)
        places = tuple(
            np.arange(n) if dim in lanes else np.arange(2) if dim == self.merge.dim else np.array([0])
            for dim, n in enumerate(self.sizes)
        )
        probe = self._probe({self.merge.node: places})
        ones = {n: torch.ones([len(p) for p in probe.places[n]], dtype=torch.float64) for n in self.leaves if n in probe.places}
        result = probe.run(ones)[self.merge.node].select(column, 0).movedim(self.merge.dim - (self.merge.dim > column), 0)
        decays = result[1] / result[0] - 1
        if not (decays.isfinite() & (decays > 0)).all():
            return None
        logs = decays.log().numpy()
        for axis in range(logs.ndim):
            first = logs.take([0], axis)
            logs = first if np.allclose(logs, first, rtol=_TOLERANCE, atol=_ROUNDING) else logs
        return np.asarray(logs)

    # ---------------------------------------------------------------- places and values

    def _lane(self, positions: np.ndarray[Any, Any]) -> Places:
        """One element of each dimension, the last but one where there are as many, at some positions."""
        return tuple(
            positions if dim == self.merge.dim else np.array([max(n - 2, n - 1 - (n > 2))]) for dim, n in enumerate(self.sizes)
        )

    def _lanes(self, positions: np.ndarray[Any, Any]) -> Places:
        """The first element of each dimension, and that one."""
        return tuple(p if dim == self.merge.dim else np.unique([0, int(p[0])]) for dim, p in enumerate(self._lane(positions)))

    def _probe(self, outputs: Mapping[Node, Places]) -> Probe:
        return Probe(outputs, self.leaves, self.order)

    def _positions(self) -> np.ndarray[Any, Any]:
        """Around the borders of the first chunks and the last."""
        chunks, length = self.merge.chunks, self.merge.length
        starts = {0, 1, chunks - 1} | ({chunks // 2} if chunks > 3 else set())
        within = {0, 1, length // 2, length - 1}
        found = np.unique([c * length + i for c in starts for i in within])
        return found[found < self.merge.positions]

    def _values(self, probe: Probe, magnitude: float, decays: Sequence[Node], form: Form = "log") -> dict[Node, Tensor]:
        """Random values for the leaves; those of gates are such that nothing overflows."""
        values = {}
        for node in self.leaves:
            if node not in probe.places:
                continue
            if not node.meta["val"].dtype.is_floating_point:
                raise Unproved(f"{node.name} holds no floating-point numbers")
            size = [len(p) for p in probe.places[node]]
            value = torch.randn(size, generator=self.generator, dtype=torch.float64, device="cpu") * magnitude
            if node in decays:
                value = _GATE[form](-(value.abs() + 0.01) / (1 + self.length / 64))
            values[node] = value
        return values

    # ---------------------------------------------------------------- proposing

    def _proposed(self) -> tuple[str, dict[Role, Part], int]:
        with torch.enable_grad(), torch.inference_mode(False), torch.device("cpu"):
            return self._derived()

    def _derived(self) -> tuple[str, dict[Role, Part], int]:
        position = self._somewhere()
        places = self._lanes(np.array([position]))
        probe = self._probe({self.merge.node: places})
        leaves = self._values(probe, 0.5, self.leaves)
        for value in leaves.values():
            value.requires_grad_()
        result = probe.run(leaves)[self.merge.node]
        base = (0,) * len(places)
        found = self._gradients(result, leaves, base)
        others = {}
        for dim, p in enumerate(places):
            if len(p) > 1:
                others[dim] = self._gradients(result, leaves, (*base[:dim], 1, *base[dim + 1 :]))
        dependences = [
            _Dependence(self.region.leaves[node], probe.places[node], found[node], {d: o[node] for d, o in others.items()})
            for node in leaves
        ]
        return self._assigned(dependences, leaves, float(result[base].detach()), position)

    def _weights(self) -> Node | None:
        """A leaf that may be weights of positions for positions of a chunk."""
        loose = (leaf.node for leaf in self.region.leaves.values() if leaf.time is None)
        return next((n for n in loose if shape(n).count(self.merge.length) > 1), None)

    def _somewhere(self) -> int:
        """The last but one of the positions that leaves have too."""
        positions = self._positions()
        return int(positions[positions < self.length][-2])

    def _gradients(self, result: Tensor, leaves: Mapping[Node, Tensor], at: tuple[int, ...]) -> dict[Node, Tensor]:
        nodes = list(leaves)
        if not result.requires_grad:
            raise Unproved("the result depends on no leaf")
        found = torch.autograd.grad(result[at], [leaves[n] for n in nodes], retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(nodes, found, strict=True)}

    def _assigned(
        self, dependences: Sequence[_Dependence], leaves: Mapping[Node, Tensor], value: float, position: int
    ) -> tuple[str, dict[Role, Part], int]:
        parts: dict[Role, Part] = {}
        for x in dependences:
            x.check_causal(position, self._weights())
        queries = [x for x in dependences if x.leaf.time is not None and x.is_now(position) and x.is_linear(leaves, value)]
        if len(queries) != 1:
            raise Unproved(f"{len(queries)} tensors are read at the position of the result alone")
        query = queries[0]
        linear = [x for x in dependences if x is not query and x.leaf.time is not None and x.is_linear(leaves, value)]
        own = [x for x in linear if x.follows - query.follows]
        if len(linear) != 2 or len(own) != 1:
            raise Unproved(f"{len(linear)} tensors of all positions take part linearly, {len(own)} with a dimension of their own")
        key = next(x for x in linear if x != own[0])
        column = (own[0].follows - query.follows - key.follows) or {-1}
        if len(column) != 1 or column == {-1}:
            raise Unproved("the values have no one dimension of their own")
        gates = [x for x in dependences if x not in (query, *linear)]
        if len(gates) > 1:
            raise Unproved(f"{len(gates)} further tensors take part: {', '.join(x.leaf.node.name for x in gates)}")
        roles: list[tuple[Role, _Dependence]] = [("q", query), ("k", key), ("v", own[0])]
        roles += [("gate", x) for x in gates]
        for role, x in roles:
            parts[role] = x.part(self.sizes, self.leaves.index(x.leaf.node))
        return ", ".join(f"{role}={x.leaf.node.name}" for role, x in roles), parts, column.pop()

    # ---------------------------------------------------------------- proving

    def _agrees(self, roles: Roles) -> float | None:
        """The constant before q with which the recurrence is the region's result at all magnitudes; None if there is none."""
        factor = None
        gates = [self.leaf(roles.parts["gate"])] if "gate" in roles.parts else []
        probe = self._probe({self.merge.node: self.places})
        for magnitude in _MAGNITUDES:
            values = self._values(probe, magnitude, gates, roles.form)
            region = probe.run(values)[self.merge.node].movedim(self.merge.dim, -1).movedim(_after(roles.column, self), -1)
            wanted, scale = self._recurrence(roles, probe, values)
            rows = self.places[self.merge.dim] < self.length
            inside, beyond = region[..., torch.from_numpy(rows), :], region[..., torch.from_numpy(~rows), :]
            if factor is None:
                factor = float((inside * wanted).sum() / wanted.square().sum())
                factor = float(round(factor)) if abs(factor - round(factor)) <= _TOLERANCE else factor
            wrong = (inside - factor * wanted).abs() > _TOLERANCE * abs(factor) * scale
            if beyond.any() or not inside.isfinite().all() or wrong.any():
                return None
        return factor

    def _recurrence(self, roles: Roles, probe: Probe, values: Mapping[Node, Tensor]) -> tuple[Tensor, Tensor]:
        """[*lanes, positions, columns]: the recurrence's output at the places of the result, and that of absolute values."""
        rows = self.places[self.merge.dim][self.places[self.merge.dim] < self.length]
        lanes: list[Axis] = [*self._lane_dims(roles.column)]
        positions = np.arange(int(rows.max()) + 1)
        v = self._aligned(roles.parts["v"], probe, values, [*lanes, "t", roles.column], positions)
        q = self._aligned(roles.parts["q"], probe, values, [*lanes, "t", "n"], rows)
        k = self._aligned(roles.parts["k"], probe, values, [*lanes, "t", "n"], positions)
        later = torch.from_numpy(positions > rows[:, None])[..., None]
        decay = torch.zeros(1, dtype=torch.float64)
        if roles.decays:
            total = self._logs(roles, probe, values, lanes, positions).cumsum(-2)
            decay = total[..., torch.from_numpy(rows), None, :] - total[..., None, :, :]
        decay = decay.masked_fill(later, -torch.inf).exp()

        def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            weights = torch.einsum("...in,...jn,...ijn->...ij", q, k, decay) if decay.shape[-1] > 1 else (q @ k.mT) * decay[..., 0]
            return weights @ v

        return read(q, k, v), read(q.abs(), k.abs(), v.abs())

    def is_final(self, node: Node, axes: Sequence[Axis], roles: Roles) -> bool:
        """Whether a node, its dimensions read so, is the state after the last position."""
        try:
            with torch.no_grad(), torch.device("cpu"):
                return self._is_final(node, axes, roles)
        except Unproved:  # it does not depend on all positions
            return False

    def _is_final(self, node: Node, axes: Sequence[Axis], roles: Roles) -> bool:
        wanted = tuple(np.arange(n) if axis == "n" else self.places[int(axis)] for axis, n in zip(axes, shape(node), strict=True))
        probe = self._probe({node: wanted})
        lanes: list[Axis] = [*self._lane_dims(roles.column)]
        gates = [self.leaf(roles.parts["gate"])] if "gate" in roles.parts else []
        positions = np.arange(self.length)
        for magnitude in _MAGNITUDES:
            values = self._values(probe, magnitude, gates, roles.form)
            state = probe.value(probe.run(values), node, wanted)
            order: list[Axis] = [*lanes, "n", roles.column]
            state = state.permute([list(axes).index(axis) for axis in order])
            v = self._aligned(roles.parts["v"], probe, values, [*lanes, "t", roles.column], positions)
            k = self._aligned(roles.parts["k"], probe, values, [*lanes, "t", "n"], positions)
            if roles.decays:
                total = self._logs(roles, probe, values, lanes, positions).cumsum(-2)
                k = k * (total[..., -1:, :] - total).exp()
            expected = k.mT @ v
            if not (state - expected).abs().max() <= _TOLERANCE * expected.abs().max():
                return False
        return True

    def _logs(
        self, roles: Roles, probe: Probe, values: Mapping[Node, Tensor], lanes: Sequence[Axis], positions: np.ndarray[Any, Any]
    ) -> Tensor:
        """The log-decays [*lanes, positions, depth or 1]."""
        if roles.constant is not None:
            own = [self.places[int(lane)] if n > 1 else np.array([0]) for lane, n in zip(lanes, roles.constant.shape, strict=True)]
            logs = torch.from_numpy(roles.constant[np.ix_(*own)])[..., None, None]
            return logs.expand(*logs.shape[:-2], len(positions), 1)
        gate = self._aligned(roles.parts["gate"], probe, values, [*lanes, "t", "n"], positions)
        return _LOGARITHM[roles.form](gate).expand(*gate.shape[:-2], len(positions), -1)

    def _aligned(
        self, part: Part, probe: Probe, values: Mapping[Node, Tensor], order: Sequence[Axis], positions: np.ndarray[Any, Any]
    ) -> Tensor:
        """A leaf's values with its dimensions in this order, at these positions, and each at the places of the result's."""
        value, has = values[self.leaf(part)], probe.places[self.leaf(part)]
        kept: list[Axis] = []
        for dim in reversed(range(len(part.axes))):
            axis = part.axes[dim]
            if axis == "one":
                value = value.squeeze(dim)
            elif axis != "n":
                wanted = positions if axis == "t" else self.places[axis] // part.groups[dim]
                if not np.isin(wanted, has[dim]).all():
                    raise Unproved(f"the result does not depend on all of {self.leaf(part).name}")
                value = value.index_select(dim, torch.from_numpy(np.searchsorted(has[dim], wanted)))
            if axis != "one":
                kept.insert(0, axis)
        value = value.permute([kept.index(axis) for axis in order if axis in kept])
        for dim, axis in enumerate(order):
            if axis not in kept:
                value = value.unsqueeze(dim)
        return value


def _after(column: int, prover: Prover) -> int:
    """The column's dimension, once that of the positions has been moved to the end."""
    return column - (column > prover.merge.dim)


class _Dependence:
    """How the result depends on one leaf: where its gradient is not zero, and where it is not for another element of the result."""

    def __init__(self, leaf: Leaf, places: Places, gradient: Tensor, others: Mapping[int, Tensor]):
        self.leaf, self.places, self.gradient = leaf, places, gradient
        self.where = self._where(gradient)
        self.moved = {
            (dim, own)
            for dim, other in others.items()
            for own, (mine, its) in enumerate(zip(self.where, self._where(other), strict=True))
            if own != leaf.time and not np.array_equal(mine, its)
        }
        self.follows = {dim for dim, _ in self.moved}

    @staticmethod
    def _where(gradient: Tensor) -> list[np.ndarray[Any, Any]]:
        nonzero = gradient.abs() > _ROUNDING * gradient.abs().max()
        dims = range(gradient.dim())
        return [
            torch.nonzero(nonzero.any(dim=[d for d in dims if d != own]) if len(dims) > 1 else nonzero)[:, 0].numpy()
            for own in dims
        ]

    def _times(self) -> np.ndarray[Any, Any]:
        assert self.leaf.time is not None
        return self.places[self.leaf.time][self.where[self.leaf.time]]

    def is_now(self, position: int) -> bool:
        """Whether only the result's own position counts."""
        return self.leaf.time is not None and self._times().tolist() == [position]

    def check_causal(self, position: int, weights: Node | None) -> None:
        """Raises if later positions take part; `weights` is a tensor over both positions of a chunk that may be why."""
        if self.leaf.time is not None and len(self._times()) and self._times().max() > position:
            if weights is not None:
                raise Unproved(f"positions of a chunk are weighted by {weights.name}, of which nothing is known")
            raise Unproved(f"later positions of {self.leaf.node.name} take part")

    def is_linear(self, leaves: Mapping[Node, Tensor], value: float) -> bool:
        """Whether the result is linear in the leaf (by Euler's rule for homogeneous functions)."""
        return abs(float((self.gradient * leaves[self.leaf.node].detach()).sum()) - value) <= 1e-9 * abs(value)

    def part(self, sizes: Sequence[int], number: int) -> Part:
        """What each of its dimensions is.

        Raises:
            Unproved: one is several things.
        """
        axes: list[Axis] = []
        grouped: list[int] = []
        its = shape(self.leaf.node)
        for own, n in enumerate(its):
            of = [dim for dim, d in self.moved if d == own]
            group = 1
            if own == self.leaf.time:
                axis: Axis = "t"
            elif n == 1:
                axis = "one"
            elif not of:
                axis = "n"
            elif len(of) == 1 and sizes[of[0]] % n == 0:
                axis, group = of[0], sizes[of[0]] // n
            else:
                raise Unproved(f"dimension {own} of {self.leaf.node.name} is none of the result's")
            axes.append(axis)
            grouped.append(group)
        counted = [a for a in axes if a != "one"]
        if len(set(counted)) != len(counted):
            raise Unproved(f"two dimensions of {self.leaf.node.name} are one of the result's")
        return Part(leaf=number, axes=tuple(axes), groups=tuple(grouped))
