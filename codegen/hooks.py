"""From an attention specification to the functions that the template leaves open.

Loads are sorted by what they depend on: neither index (`fixed`), the query (`rows`), the key (`cols`), or both (`pair`, loaded
inside the score). The first three are read once, outside of the loop that does not change them, and handed on by name.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import sympy

from ..errors import KernelError
from ..intervals import I0, I1, J0, J1, I, J, interval, tile_bounds, verdict
from ..ops.attention import AttentionSpec
from ..ops.captured import loads_that_learn, slope
from ..ops.dropout import dropout_limit
from ..printers import shared, to_torch, to_triton
from ..terms import BoolLoad, IntLoad, Load, Term, derivative, from_text, integer_symbol, score_symbol, to_text

LOG2E = 1.4426950408889634
HUGE = 1e30  # a constant beyond this stands for minus infinity, and leaves no room for a factor log2(e)
SAFE_EXPONENT = 100.0  # 2 ** x neither overflows float32, nor do sums of it over 2 ** 27 keys
LEVELS = ("fixed", "rows", "cols", "pair")


@lru_cache(maxsize=512)
def _read(text: str) -> Term:
    return from_text(text)


@dataclass(frozen=True)
class Variant:
    """What the template needs to know of a specification. `wide_values`: the dtype of V has the range of float32."""

    spec: AttentionSpec
    wide_values: bool = True

    def __post_init__(self) -> None:
        missing = sorted(self.ranks.keys() - set(self.spec.captures))
        if missing:
            raise KernelError(f"Expected loads from captures={self.spec.captures!r} but got tensor={missing[0]!r}. Capture it.")
        if self.spec.sink is not None and not self.normalised:
            raise KernelError(f"Expected a softmax around a sink but got normaliser={self.spec.normaliser!r}. Leave the sink out.")

    @cached_property
    def score(self) -> Term:
        return _read(self.spec.score)

    @cached_property
    def mask(self) -> Term:
        return _read(self.spec.mask)

    @cached_property
    def sink(self) -> Term | None:
        return None if self.spec.sink is None else _read(self.spec.sink)

    @cached_property
    def slope(self) -> Term:
        """d score / d s, natural units."""
        return derivative(self.score, score_symbol())

    @cached_property
    def learned(self) -> tuple[Load, ...]:
        """The loads of the score that get a gradient."""
        return loads_that_learn(self.score, self.spec.learned)

    @cached_property
    def sums(self) -> tuple[tuple[str, bool, bool], ...]:
        """Of each load that learns: over which of "keys", "queries" or "nothing" a program sums its gradient, and whether the load
        depends on the batch entry and on the head."""
        over = {"fixed": "keys", "rows": "keys", "cols": "queries", "pair": "nothing"}
        batch, head = integer_symbol("b"), integer_symbol("h")
        return tuple((over[_level(load)], load.has(batch), load.has(head)) for load in self.learned)

    @cached_property
    def loads(self) -> dict[str, list[Load]]:
        """Loads by level, each after those that its indices contain."""
        found: dict[str, list[Load]] = {level: [] for level in LEVELS}
        terms = [self.score, self.mask, self.slope, *([] if self.sink is None else [self.sink])]
        for term in terms:
            for part in sympy.postorder_traversal(term):
                if isinstance(part, Load) and part not in found[_level(part)]:
                    found[_level(part)].append(part)
        return found

    @cached_property
    def names(self) -> dict[Term, str]:
        """The variable of each load."""
        return {load: f"{load.tensor}_{level.rstrip('s')}{at}" for level in LEVELS for at, load in enumerate(self.loads[level])}

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Dimensions of each captured tensor."""
        ranks = dict.fromkeys(self.spec.captures, 0)
        return ranks | {load.tensor: len(load.indices) for loads in self.loads.values() for load in loads}

    @cached_property
    def bool_captures(self) -> frozenset[str]:
        return frozenset(load.tensor for loads in self.loads.values() for load in loads if isinstance(load, BoolLoad))

    @cached_property
    def int_captures(self) -> frozenset[str]:
        loaded = {load.tensor for loads in self.loads.values() for load in loads if isinstance(load, IntLoad)}
        return frozenset(loaded | ({"seed"} if self.spec.dropout else set()))

    def example_extent(self, name: str) -> list[str]:
        """A shape, in the variables of the example, that every index of the loads from a tensor stays within."""
        load = next((x for level in LEVELS for x in self.loads[level] if x.tensor == name), None)
        known = {integer_symbol("b"): "batch", integer_symbol("h"): "heads", I: "t", J: "t", sympy.S.Zero: "1"}
        return [] if load is None else [known.get(index, "4 * t") for index in load.indices]

    # ------------------------------------------------------------------------------------------------------------ decisions

    @property
    def normalised(self) -> bool:
        """Whether a softmax makes weights of the score; without one it is the weight itself."""
        return self.spec.normaliser == "softmax"

    @cached_property
    def folded(self) -> bool:
        """Whether log2(e) may be multiplied into the score: nothing in it stands for minus infinity in disguise."""
        if not self.normalised:
            return False
        if any(abs(float(n)) > HUGE for n in self.score.atoms(sympy.Number) if n.is_finite):
            return False
        if any(type(load) is Load for level in LEVELS[1:] for load in self.loads[level] if self.score.has(load)):
            return False
        added = [part for part in sympy.Add.make_args(sympy.expand(self.score)) if part.has(Load)]
        return all(part.has(score_symbol(), I, J) for part in added)

    @cached_property
    def logit(self) -> Term:
        """The score in the kernel's unit: log2 if folded, else natural."""
        if not self.folded:
            return self.score
        return sympy.Add(*(part * sympy.Float(LOG2E) for part in sympy.Add.make_args(self.score)))

    @cached_property
    def scale(self) -> float | None:
        """The positive factor, if the logit is a factor times s."""
        if not self.normalised:
            return None
        factor = self.logit / score_symbol()
        return float(factor) if factor.is_number and factor.is_positive else None

    @cached_property
    def constant_slope(self) -> float | None:
        return float(self.slope) if self.slope.is_number and self.slope.is_finite else None

    @cached_property
    def bounded(self) -> bool:
        """Whether exp(score) cannot leave the range of float32, so that no maximum has to be subtracted."""
        if not (self.folded and self.wide_values and self.sink is None):
            return False
        moving = {symbol: (None, None) for symbol in self.logit.free_symbols}
        ends = interval(self.logit, moving)
        return all(end is not None and end.is_number and abs(float(end)) <= SAFE_EXPONENT for end in ends)

    @cached_property
    def needs_table(self) -> bool:
        return tile_bounds(self.mask, wanted="j").remaining or tile_bounds(self.mask, wanted="i").remaining

    @cached_property
    def exact_table(self) -> bool:
        """Whether the mask loads by pair: then only a look at every element tells."""
        return any(self.mask.has(load) for load in self.loads["pair"])

    def has_head(self, wanted: Literal["i", "j"]) -> bool:
        """Whether partial tiles can come before the full ones."""
        bounds = tile_bounds(self.mask, wanted=wanted)
        return not (bounds.lo == 0 and bounds.full_lo == 0)

    @cached_property
    def span(self) -> int | None:
        """`n` neighbouring queries meet a range of at most `n + span` keys; None if no number is known."""
        bounds, n = tile_bounds(self.mask, wanted="j"), sympy.Dummy("n", integer=True, positive=True)
        lows, highs = sympy.Max.make_args(bounds.lo), sympy.Min.make_args(bounds.hi)
        lengths = [sympy.expand((hi - lo).xreplace({I1: I0 + n - 1})) for hi in highs for lo in lows]
        return min((int(spare) for length in lengths for spare in (length - n, length - 1) if spare.is_Integer), default=None)

    @cached_property
    def loads_by_head(self) -> bool:
        """Whether a load that depends on the key alone, or on neither index, depends on the head."""
        return any(load.has(integer_symbol("h")) for level in ("fixed", "cols") for load in self.loads[level])

    @cached_property
    def flags(self) -> dict[str, bool]:
        return {
            "NORMALISED": self.normalised,
            "ONLINE": self.normalised and not self.bounded,
            "FOLDED": self.folded,
            "SCALED": self.scale is not None and not self.bounded,
            "SLOPED": self.constant_slope is None,
            "TABLE": self.needs_table,
            "EXACT": self.exact_table,
            "HEAD": self.has_head("j") and not self.needs_table,
            "KEY_HEAD": self.has_head("i") and not self.needs_table,
            "BY_HEAD": self.loads_by_head,
            "PER_HEAD": self.mask.has(integer_symbol("h")),
            "SINK": self.sink is not None,
            "ZERO": self.spec.empty == "zero",
            "MEAN": self.spec.empty == "mean",
            "DROPOUT": self.spec.dropout != 0,
            "LEARNS": bool(self.learned),
            "SINK_LEARNS": self.sink is not None and bool(loads_that_learn(self.sink, self.spec.learned)),
        }

    def table_depends_on(self, index: str) -> bool:
        return self.mask.has(integer_symbol(index))

    # ---------------------------------------------------------------------------------------------------------------- lists

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """What each group name of the template stands for in a kernel's parameters."""
        captures: list[str] = []
        for name in self.spec.captures:
            captures += [name, *(f"{name}_s{d}" for d in range(self.ranks[name]))]
        lists = {level: tuple(self.names[load] for load in self.loads[level]) for level in ("fixed", "rows", "cols")}
        return {
            **lists,
            "captures": (*captures, *self.spec.sizes),
            "row_ends": tuple(end for name in lists["rows"] for end in (f"{name}_lo", f"{name}_hi")),
            "col_ends": tuple(end for name in lists["cols"] for end in (f"{name}_lo", f"{name}_hi")),
            "table": ("table", "table_b", "table_h", "table_m") if self.needs_table else (),
        }

    @cached_property
    def host_captures(self) -> tuple[str, ...]:
        return (*self.spec.captures, *self.spec.sizes)

    @cached_property
    def launch_captures(self) -> tuple[str, ...]:
        """Arguments of a kernel launch: pointers, strides, sizes."""
        passed: list[str] = []
        for name in self.spec.captures:
            passed.append(f"{name}.view(torch.uint8)" if name in self.bool_captures else name)
            if self.ranks[name]:
                passed.append(f"*{name}.stride()")
        return (*passed, *self.spec.sizes)

    # ---------------------------------------------------------------------------------------------------------------- loads

    def load_lines(self, level: str, indices: Mapping[str, str]) -> list[str]:
        """Assignments that read the loads of a level; `indices` gives the expressions of b, h, i and j."""
        used = self.loads[level]
        lines = []
        names: dict[Term, str] = dict(self.names)
        for index, text in indices.items():
            if text == index or not any(load.has(integer_symbol(index)) for load in used):
                continue
            lines.append(f"{index}_in = {text}")
            names[integer_symbol(index)] = f"{index}_in"
        return lines + [f"{self.names[load]} = {self.load_call(load, names)}" for load in used]

    def load_call(self, load: Load, names: Mapping[Term, str], mask: str = "") -> str:
        """`tl.load` of one element, block-wide, as a number: float32 or an integer."""
        at = load.tensor
        order = sorted(enumerate(load.indices), key=lambda pair: LEVELS.index(_level(pair[1])))
        inner = {term: name for term, name in names.items() if term != load}
        for d, index in order:
            if index == 0:
                continue
            text = to_triton(index, inner)
            if not index.has(J):
                text = f"wide({text})"
            at += f" + {text if _is_plain(text) else f'({text})'} * {load.tensor}_s{d}"
        call = f"tl.load({at}, mask={mask}, other=0)" if mask else f"tl.load({at})"
        return f"{call}.to(tl.float32)" if type(load) is Load else f"{call}.to(tl.int32)" if isinstance(load, BoolLoad) else call

    def loaders(self) -> dict[str, object]:
        """Writers of the statements that the template calls `load_...`."""
        empty = {"b": "b", "h": "h"}
        return {
            "load_fixed": lambda args: self.load_lines("fixed", empty),
            "load_rows": lambda args: self.load_lines("rows", {**empty, "i": args[2]}),
            "load_cols": lambda args: self.load_lines("cols", {**empty, "j": args[2]}),
            "load_row_ends": lambda args: self.load_lines("rows", {**empty, "i": args[2]}) + self.end_lines("rows"),
            "load_col_ends": lambda args: self.load_lines("cols", {**empty, "j": args[2]}) + self.end_lines("cols"),
        }

    def end_lines(self, level: str) -> list[str]:
        return [
            f"{name}_{end} = tl.{function}({name}, 1)"
            for name in (self.names[load] for load in self.loads[level])
            for end, function in (("lo", "min"), ("hi", "max"))
        ]

    # ---------------------------------------------------------------------------------------------------------------- hooks

    def hooks(self) -> str:
        """Source of every hook."""
        pair = ("b", "h", "i", "j", "inside", "fixed", "rows", "cols", "captures")
        parts = [
            self.function("score", ("s", *pair), to_text(self.score), [self.logit]),
            self.function("score_and_slope", ("s", *pair), f"{to_text(self.score)}; its derivative", [self.logit, self.slope_term]),
            self.function("visible", pair, to_text(self.mask), [self.mask]),
            self.range_function("key_range", "j"),
            self.range_function("query_range", "i"),
        ]
        if self.spec.dropout:
            parts.append(self.survivors())
        if self.learned:
            parts.append(self.load_slopes(("s", *pair)))
        if self.sink is not None:
            parts.append(self.function("sink_logit", ("b", "h", "i", "fixed", "rows", "captures"), to_text(self.sink), [self.sink]))
        if self.needs_table:
            parts += [self.classify(), TABLE_LINE]
        return "\n\n".join(parts)

    def survivors(self) -> str:
        """The function that says which weights a dropout leaves."""
        lines = [
            "pairs = (i + j) * 0",
            "head, entry = tl.cast(h, tl.int32), tl.cast(b, tl.int32)",
            "drawn, _, _, _ = tl.philox(tl.load(seed), pairs + j, pairs + i, pairs + head, pairs + entry)",
            f"return (drawn >> 1).to(tl.int32) >= {dropout_limit(self.spec.dropout)}",
        ]
        return self.device_function("kept", ("b", "h", "i", "j", "captures"), f"Dropout p={self.spec.dropout}", lines)

    def load_slopes(self, parameters: Sequence[str]) -> str:
        """The functions that `load_slope` chooses from, and itself."""
        parts, lines = [], []
        for at, load in enumerate(self.learned):
            term = slope(self.score, load)
            parts.append(self.function(f"load_slope_{at}", parameters, f"d score / d {to_text(load)}", [term]))
            listed = ", ".join(p for parameter in parameters for p in self.groups.get(parameter, (parameter,)))
            lines += [f"{'elif' if at else 'if'} AT == {at}:", f"    slope = load_slope_{at}({listed})"]
        doc = "The derivative of the score by load AT of those that learn, natural units."
        parts.append(self.device_function("load_slope", (*parameters, "AT: tl.constexpr"), doc, [*lines, "return slope"]))
        return "\n\n".join(parts)

    @property
    def crowded(self) -> bool:
        """Whether the mask compares loaded integers, of 64 bits as a rule."""
        return any(isinstance(load, IntLoad) for load in self.mask.atoms(Load))

    @property
    def slope_term(self) -> Term:
        return self.slope if self.constant_slope is None else sympy.S.One

    def function(self, name: str, parameters: Sequence[str], doc: str, terms: Sequence[Term]) -> str:
        lines, names = [], dict(self.names)
        for load in self.loads["pair"]:
            if any(term.has(load) for term in terms):
                lines.append(f"{self.names[load]} = {self.load_call(load, names, mask='inside')}")
        shared_lines, texts = self.computed(terms, names)
        values = ", ".join(self.block(text, term) for text, term in zip(texts, terms, strict=True))
        return self.device_function(name, parameters, doc, [*lines, *shared_lines, f"return {values}"])

    @staticmethod
    def block(text: str, term: Term) -> str:
        """A condition without an index in it is a Python constant: as a block it broadcasts."""
        return "(i >= 0) | (j >= 0)" if term == sympy.true else "(i < 0) & (j < 0)" if term == sympy.false else text

    def device_function(self, name: str, parameters: Sequence[str], doc: str, lines: Sequence[str]) -> str:
        listed = [p for parameter in parameters for p in self.groups.get(parameter, (parameter,))]
        body = textwrap.indent("\n".join([f'"""{doc}"""', *lines]), "    ")
        return f"@triton.jit\ndef {name}({', '.join(listed)}):\n{body}\n"

    def range_function(self, name: str, wanted: Literal["i", "j"]) -> str:
        size = integer_symbol("TK" if wanted == "j" else "TQ")
        bounds = tile_bounds(self.mask, wanted=wanted, size=size)
        full = (bounds.hi, bounds.hi) if self.needs_table else (bounds.full_lo, bounds.full_hi)  # a table finds them itself
        ends, ranges = (bounds.lo, *full, bounds.hi), ("i0", "i1") if wanted == "j" else ("j0", "j1")
        lines, values = self.computed(ends, dict(self.names))
        whom = ("keys", "queries") if wanted == "j" else ("queries", "keys")
        doc = f"lo, full_lo, full_hi, hi: {whom[0]} that {whom[1]} [{ranges[0]}, {ranges[1]}] may meet, and that they all meet."
        parameters = ("b", "h", *ranges, "TQ", "TK", "fixed", "captures")
        return self.device_function(name, parameters, doc, [*lines, f"return {', '.join(values)}"])

    @staticmethod
    def computed(terms: Sequence[Term], names: dict[Term, str]) -> tuple[list[str], list[str]]:
        """Assignments of what several terms share, and the terms by means of them."""
        lines = []
        for at, part in enumerate(shared(terms)):
            lines.append(f"e{at} = {to_triton(part, names)}")
            names[part] = f"e{at}"
        return lines, [to_triton(term, names) for term in terms]

    def classify(self) -> str:
        ranges: dict[Term, tuple[Term, Term]] = {I: (I0, I1), J: (J0, J1)}
        names: dict[Term, str] = dict(self.names)
        for level in ("rows", "cols"):
            for load in self.loads[level]:
                ends = [sympy.Symbol(f"{self.names[load]}_{end}", integer=load.is_integer, real=True) for end in ("lo", "hi")]
                ranges[load] = (ends[0], ends[1])
        certain, possible = verdict(self.mask, ranges)
        texts = [_constant(c) if c in (sympy.true, sympy.false) else to_triton(c, names) for c in (possible, certain)]
        doc = "Whether a tile of [i0, i1] x [j0, j1] may hold a visible pair, and whether it certainly holds nothing else."
        parameters = ("b", "h", "i0", "i1", "j0", "j1", "fixed", "row_ends", "col_ends", "captures")
        return self.device_function("classify", parameters, doc, [f"return {texts[0]}, {texts[1]}"])

    # ------------------------------------------------------------------------------------------------------------ reference

    def reference_lines(self) -> dict[str, str]:
        """Expressions of the plain torch reference."""
        return {
            "SCORE": to_torch(self.score) if self.score.has(score_symbol()) else f"0 * s + {to_torch(self.score)}",
            "MASK": _torch_condition(self.mask),
            "SINK": "" if self.sink is None else to_torch(self.sink),
            "DROPOUT": repr(self.spec.dropout),
        }


TABLE_LINE = '''@triton.jit
def table_line(b, h, outer, table, table_b, table_h, table_m):
    """One line of the table: count of full tiles, count of partial ones, then both lists, each with room for every tile."""
    return table + b * table_b + h * table_h + wide(outer) * table_m
'''


def _torch_condition(mask: Term) -> str:
    if mask in (sympy.true, sympy.false):
        return f"torch.full((1, 1, 1, 1), {mask}, device=q.device)"
    return to_torch(mask)


def _constant(condition: Term) -> str:
    return "i0 >= 0" if condition == sympy.true else "i0 < 0"


def _level(term: Term) -> str:
    by_query, by_key = term.has(I), term.has(J)
    return "pair" if by_query and by_key else "rows" if by_query else "cols" if by_key else "fixed"


def _is_plain(text: str) -> bool:
    return text.isidentifier() or text.isdigit() or (text.startswith("wide(") and text.count("(") == 1)
