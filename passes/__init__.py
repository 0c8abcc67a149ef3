"""Recognisers: one file a family, from subgraph to specification."""

if __name__ != "effcompile.passes":
    raise ImportError(f"Expected import effcompile.passes but got import {__name__}: use the package's full name")

from effcompile.ir import Rule

from . import loops as loops
from . import normalize as normalize
from .attention import ATTENTION
from .chunked import CHUNKED
from .experts import EXPERTS
from .flex import FLEX_ATTENTION
from .parallel import PARALLEL
from .recurrence import RECURRENCE
from .route import ROUTE
from .sdpa import SCALED_DOT_PRODUCT
from .sigmoid import SIGMOID_ATTENTION

RULES: tuple[Rule, ...] = (
    ATTENTION,
    SCALED_DOT_PRODUCT,
    FLEX_ATTENTION,
    SIGMOID_ATTENTION,
    CHUNKED,
    RECURRENCE,
    PARALLEL,
    EXPERTS,
    ROUTE,
)
"""The recognisers. A new architecture adds its rule here."""

_EARLY, _LATE = (tuple(rule.name for rule in RULES if rule.early is early) for early in (True, False))

PASSES: tuple[str, ...] = ("normalize", *_EARLY, "loops", *_LATE)
"""Names of the passes, in the order in which they run; each is a module of this package."""
