"""Surgery on source text, guided by its syntax tree: comments and layout outside of the cuts stay as they are.

prune(source, flags)     `if FLAG:` and `x if FLAG else y` decided
expand(source, groups)   one name in an argument or parameter list becomes any number of them
replace_calls(...)       `name = loader(...)` becomes other statements
reachable(source, roots) functions that nothing needs are dropped
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Arguments = Callable[[str, ast.Call | None, ast.FunctionDef], Sequence[str]]  # group, the call it is in, the function around
_NOTHING = "\0"  # stands in a list for no element, until its comma is gone too


@dataclass(frozen=True)
class Edit:
    """Characters [start, end) become `text`."""

    start: int
    end: int
    text: str


class Source:
    """A text, its tree, and where each node stands."""

    def __init__(self, text: str):
        self.text = text
        self.tree = ast.parse(text)
        self.lines = text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """First and one past the last character. Texts are ASCII, so that byte columns are characters."""
        return (
            self.starts[node.lineno - 1] + node.col_offset,  # type: ignore[attr-defined]
            self.starts[node.end_lineno - 1] + node.end_col_offset,  # type: ignore[attr-defined]
        )

    def line_span(self, node: ast.AST) -> tuple[int, int]:
        """Whole lines of a statement, decorators and the end-of-line comment included."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])  # type: ignore[attr-defined]
        return self.starts[first - 1], self.starts[node.end_lineno]  # type: ignore[attr-defined]

    def get(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def apply(self, edits: Iterable[Edit]) -> str:
        """The text after the edits; of nested ones the outermost counts."""
        text, limit = self.text, len(self.text) + 1
        outermost: list[Edit] = []
        for edit in sorted(edits, key=lambda e: (e.start, -e.end)):
            if not outermost or edit.start >= outermost[-1].end:
                outermost.append(edit)
        for edit in reversed(outermost):
            assert edit.end <= limit
            text, limit = text[: edit.start] + edit.text + text[edit.end :], edit.start
        return text


def _fixpoint(text: str, step: Callable[[Source], list[Edit]]) -> str:
    while True:
        source = Source(text)
        edits = step(source)
        if not edits:
            return text
        text = source.apply(edits)


def prune(text: str, flags: Mapping[str, bool]) -> str:
    """Decides every `if` whose test is made of the names of flags, and shortens the others; statements and expressions alike."""

    def step(source: Source) -> list[Edit]:
        edits = []
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.If | ast.IfExp):
                continue
            known = decided(node.test, flags)
            if isinstance(known, ast.expr):
                if known is not node.test:
                    edits.append(Edit(*source.span(node.test), ast.unparse(known)))
            elif isinstance(node, ast.If):
                edits.append(Edit(*source.line_span(node), _block(source, node.body if known else node.orelse, node.col_offset)))
            else:
                edits.append(Edit(*source.span(node), source.get(node.body if known else node.orelse)))
        return edits

    return _fixpoint(text, step)


def decided(test: ast.expr, flags: Mapping[str, bool]) -> bool | ast.expr:
    """A condition's value where the flags tell it, otherwise what is left of it: the condition itself where they say nothing."""
    if isinstance(test, ast.Name):
        return flags.get(test.id, test)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = decided(test.operand, flags)
        return test if inner is test.operand else ast.UnaryOp(ast.Not(), inner) if isinstance(inner, ast.expr) else not inner
    if not isinstance(test, ast.BoolOp):
        return test
    deciding = isinstance(test.op, ast.Or)  # the value that settles it
    parts = [decided(part, flags) for part in test.values]
    if any(part is deciding for part in parts):
        return deciding
    left = [part for part in parts if isinstance(part, ast.expr)]
    if not left:
        return not deciding
    if all(a is b for a, b in zip(left, test.values, strict=False)) and len(left) == len(test.values):
        return test
    return left[0] if len(left) == 1 else ast.BoolOp(test.op, left)


def _block(source: Source, statements: Sequence[ast.stmt], indent: int) -> str:
    """The statements with the comments between them, moved to another indentation; `pass` vanishes."""
    if not statements or all(isinstance(s, ast.Pass) for s in statements):
        return ""
    start, end = source.line_span(statements[0])[0], source.line_span(statements[-1])[1]
    return textwrap.indent(textwrap.dedent(source.text[start:end]), " " * indent)


def expand(text: str, parameters: Mapping[str, Sequence[str]], arguments: Arguments) -> str:
    """Replaces group names in parameter lists by `parameters[name]`, in argument lists and tuples by `arguments(...)`."""
    source = Source(text)
    edits: list[Edit] = []
    for function in (node for node in source.tree.body if isinstance(node, ast.FunctionDef)):
        for parameter in function.args.args:
            if parameter.arg in parameters:
                names = parameters[parameter.arg] if is_kernel(function) else arguments(parameter.arg, None, function)
                edits.append(_listed(source, parameter, names))
        for listing in (node for node in ast.walk(function) if isinstance(node, ast.Call | ast.Tuple)):
            call = listing if isinstance(listing, ast.Call) else None
            for argument in listing.args if isinstance(listing, ast.Call) else listing.elts:
                if isinstance(argument, ast.Name) and argument.id in parameters:
                    edits.append(_listed(source, argument, arguments(argument.id, call, function)))
    text = re.sub(f"{_NOTHING},[ ]?", "", source.apply(edits))
    return re.sub(f"(,\\s*)?{_NOTHING}", "", text)


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether a function runs on the device."""
    return any("jit" in ast.dump(decorator) for decorator in function.decorator_list)


def _listed(source: Source, node: ast.AST, names: Sequence[str]) -> Edit:
    """`node` in a comma-separated list becomes `names`."""
    start, end = source.span(node)
    return Edit(start, end, ", ".join(names) or _NOTHING)


def replace_calls(text: str, loaders: Mapping[str, Callable[[Sequence[str]], Sequence[str]]]) -> str:
    """Replaces statements `target = loader(arguments)` by the lines that `loaders[loader](argument texts)` gives."""
    source = Source(text)
    edits = []
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call) or not isinstance(node.value.func, ast.Name):
            continue
        if node.value.func.id in loaders:
            lines = loaders[node.value.func.id]([source.get(a) for a in node.value.args])
            edits.append(Edit(*source.line_span(node), "".join(f"{' ' * node.col_offset}{line}\n" for line in lines)))
    return source.apply(edits)


def drop(text: str, names: Iterable[str]) -> str:
    """Removes top-level functions and assignments by name."""
    unwanted = set(names)
    source = Source(text)
    edits = []
    for node in source.tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        name = node.name if isinstance(node, ast.FunctionDef) else target.id if isinstance(target, ast.Name) else None
        if name in unwanted:
            edits.append(Edit(*source.line_span(node), ""))
    return source.apply(edits)


def reachable(text: str, roots: Iterable[str]) -> str:
    """Drops top-level functions and assignments that the roots do not need."""
    tree = ast.parse(text)
    needs: dict[str, set[str]] = {}
    for node in tree.body:
        mentioned = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        if isinstance(node, ast.FunctionDef):
            needs[node.name] = mentioned - {node.name}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            needs[node.targets[0].id] = mentioned - {node.targets[0].id}
    wanted, todo = set(), [root for root in roots if root in needs]
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += [other for other in needs[name] if other in needs]
    return drop(text, set(needs) - wanted)


def functions(text: str) -> dict[str, str]:
    """Top-level functions by name, each with its decorators."""
    source = Source(text)
    return {
        node.name: source.text[slice(*source.line_span(node))] for node in source.tree.body if isinstance(node, ast.FunctionDef)
    }


def tidy(text: str) -> str:
    """At most two blank lines in a row, no section headings without a section, no word to formatters and checkers."""
    text = re.sub(r"  # (fmt: skip|noqa: \w+|type: ignore\[[\w-]+\])$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(# -{20,}[^\n]*\n\s*)+(?=# -{20,})", "", text)
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    return text.rstrip() + "\n"
