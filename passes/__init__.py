"""Recognisers: one file a family, from subgraph to specification."""

if __name__ != "effcompile.passes":
    raise ImportError(f"Expected import effcompile.passes but got import {__name__}: use the package's full name")

from effcompile.ir import Rule

from . import normalize as normalize
from .attention import ATTENTION
from .flex import FLEX_ATTENTION
from .sdpa import SCALED_DOT_PRODUCT

RULES: tuple[Rule, ...] = (ATTENTION, SCALED_DOT_PRODUCT, FLEX_ATTENTION)
"""The recognisers. A new architecture adds its rule here."""

PASSES: tuple[str, ...] = ("normalize", *(rule.name for rule in RULES))
"""Names of the passes, in the order in which they run; each is a module of this package."""
