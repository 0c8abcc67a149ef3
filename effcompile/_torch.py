"""The interfaces private to torch that lifting stands on, each touched here alone. Tried on torch 2.11 and 2.13.

- `torch.fx.experimental.proxy_tensor.ProxyTorchDispatchMode`: the dispatcher lets only this class (and two others) listen on the
  PreDispatch key, above autocast and autograd, where `matmul` and `softmax` are still whole.
- `torch._ops.OpOverload._can_decompose`, `.decompose`: run a composite operator's own definition.
- `torch.amp.autocast_mode._enter_autocast` and kin, `torch._C._set_grad_enabled`: the nodes by which Dynamo switches modes.
- `torch._C._AutoDispatchBelowAutograd`, `torch._C._after_autograd_keyset`, `OpOverload.redispatch`: what an operator does below its
  gradient.
- `torch._C._autograd._get_data_attr`: what `x.data` is in a graph.
- `torch._functorch.config.donated_buffer`: whether a backward may overwrite what the forward saved for it.
- `torch._inductor.codecache.CppCodeCache`: compiles C++ for the machine at hand, and keeps what it compiled.
- `torch.fx.experimental.symbolic_shapes.CallMethodKey`, `ShapeEnv.ignore_fresh_unbacked_symbols`, `FakeTensor.nonzero_memo`,
  `meta["unbacked_bindings"]`: which dimension of a result has a size that depends on data, and how often a mask holds.
- `torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode`: raised where such a size is compared.
- `torch.utils._pytree`: nested arguments, flattened.
- `torch.utils._sympy.interp`: a symbolic size's expression as calls of `operator`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
import torch._functorch.config
from torch._C import DispatchKey  # type: ignore[attr-defined]
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload, _pop_mode_from_pre_dispatch, _set_mode_pre_dispatch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as without_fake_mode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.experimental.symbolic_shapes import CallMethodKey
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode as DataDependentError
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.symbol import SymT, symbol_is_type

__all__ = [
    "AUTOCAST_ENTER",
    "AUTOCAST_EXIT",
    "BINDINGS",
    "DATA_ATTRIBUTE",
    "INFERENCE_ENTER",
    "INFERENCE_EXIT",
    "SET_GRAD",
    "DataDependentError",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "PreDispatchListener",
    "below_autograd",
    "choosing",
    "bind_sizes",
    "compile_cpp",
    "expression",
    "fake_mode_of",
    "has_unbacked",
    "is_composite",
    "keeping_saved_tensors",
    "pytree",
    "restored_modes",
    "size_hint",
    "storage_key",
    "unbacked_symbols",
    "without_fake_mode",
    "without_new_sizes",
    "write_expression",
]

SET_GRAD: Any = torch._C._set_grad_enabled
DATA_ATTRIBUTE: Any = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]
AUTOCAST_ENTER: Any = torch.amp.autocast_mode._enter_autocast
AUTOCAST_EXIT: Any = torch.amp.autocast_mode._exit_autocast
INFERENCE_ENTER: Any = torch.autograd.grad_mode._enter_inference_mode
INFERENCE_EXIT: Any = torch.autograd.grad_mode._exit_inference_mode

BINDINGS = "unbacked_bindings"

Handler = Callable[[OpOverload, tuple[Any, ...], dict[str, Any]], Any]


def below_autograd(op: OpOverload, keys: Any, *args: Any) -> Any:
    """An operator's results from its kernel for the Autograd key, which has been given the dispatch keys of the call."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)  # type: ignore[attr-defined]


class PreDispatchListener(ProxyTorchDispatchMode):
    """Hands every operator that reaches the dispatcher to `handler`, before autocast and autograd see it.

    While the handler runs the listener is off; `with listener.resumed():` inside it turns it on again.
    """

    def __init__(self, handler: Handler) -> None:
        TorchDispatchMode.__init__(self, DispatchKey.PreDispatch)
        self._mode_key = torch._C._TorchDispatchModeKey.PROXY  # type: ignore[attr-defined]
        self.enter_stack: list[Any] = []
        self._handler = handler
        self._python_dispatchers: list[Any] = []

    def __enter__(self) -> Self:
        # modes on a dispatch key of their own are served by the Python dispatcher alone
        self._python_dispatchers.append(enable_python_dispatcher())
        self._python_dispatchers[-1].__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> bool | None:
        result = super().__exit__(*exception)
        self._python_dispatchers.pop().__exit__(*exception)
        return result

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """Listen again inside the handler, as the dispatcher itself would after it (entering anew would flush its tables)."""
        _set_mode_pre_dispatch(self)
        try:
            yield
        finally:
            _pop_mode_from_pre_dispatch()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return self._handler(func, args, kwargs or {})

    def __sym_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


def fake_mode_of(values: Iterable[Any]) -> FakeTensorMode | None:
    """The mode of the first fake tensor: the one Dynamo traced with (the tracing context holds a fresh one), or None."""
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def keeping_saved_tensors() -> contextlib.AbstractContextManager[None]:
    """Compile graphs that hold a scan in here, if they train.

    Inductor takes the numbers of the inputs that a backward may overwrite for those of its loops' inputs too, and gives wrong
    gradients: a loop overwrites its first state, which is still needed (torch 2.11 and 2.13).
    """
    context: contextlib.AbstractContextManager[None] = torch._functorch.config.patch(donated_buffer=False)  # type: ignore[attr-defined]
    return context


def compile_cpp(text: str, submit: Callable[..., Any]) -> Callable[[], Any]:
    """Hand the compilation of C++ to `submit`; what is returned waits for the library, a `ctypes.CDLL`, and may raise.

    Products and sums are contracted, loops are vectorised; inf and NaN keep their meaning, and sums their order.
    """
    from torch._inductor.codecache import CppCodeCache  # nothing else needs it, and it takes a second

    found: Callable[[], Any] = CppCodeCache.load_async(
        text, submit_fn=submit, extra_flags=("-ffp-contract=fast", "-ftree-loop-vectorize")
    )
    return found


def is_composite(func: OpOverload) -> bool:
    """Whether `func` is defined by other operators for every backend and for autograd alike."""
    return func._can_decompose()


def storage_key(value: torch.Tensor) -> int:
    """Equal for two fake tensors exactly if they share memory (while both live); 0 for one without a storage, as inside vmap."""
    try:
        return value.untyped_storage()._cdata
    except NotImplementedError:
        return 0


def expression(value: torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
    """The sympy expression of a symbolic number, with the replacements that are known so far."""
    return value.node.expr


def size_hint(value: torch.SymInt, fallback: int) -> int:
    """The number as it was in the example inputs, or `fallback` if it depends on tensor data."""
    return int(value.node.hint) if value.node.has_hint() else fallback


def has_unbacked(value: torch.SymInt | torch.SymFloat | torch.SymBool) -> bool:
    """Whether the number depends on tensor data, not on shapes alone."""
    return any(_is_unbacked(symbol) for symbol in value.node.expr.free_symbols)


def _is_unbacked(symbol: Any) -> bool:
    return symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT))


def unbacked_symbols(values: Iterable[Any]) -> set[Any]:
    """The symbols of what depends on tensor data in symbolic numbers and the shapes of tensors."""
    numbers: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            numbers += value.shape if value._has_symbolic_sizes_strides else ()
        else:
            numbers.append(value)
    symbolic = (n for n in numbers if isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool)))
    return {symbol for n in symbolic for symbol in n.node.expr.free_symbols if _is_unbacked(symbol)}


def without_new_sizes(mode: FakeTensorMode | None) -> contextlib.AbstractContextManager[Any]:
    """Operators that are run in here again leave no new sizes of chosen rows behind for others to look for."""
    if mode is None or mode.shape_env is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = mode.shape_env.ignore_fresh_unbacked_symbols()
    return context


@contextlib.contextmanager
def choosing(masks: Iterable[FakeTensor], count: torch.SymInt) -> Iterator[None]:
    """Fake tensors whose elements that are not zero are as many as `count` in here."""
    before = [(mask, mask.nonzero_memo) for mask in masks]
    for mask, _ in before:
        mask.nonzero_memo = count  # type: ignore[assignment]
    try:
        yield
    finally:
        for mask, own in before:
            mask.nonzero_memo = own


def bind_sizes(node: Node, sizes: Mapping[Any, int]) -> None:
    """Note that symbols are the sizes of a node's dimensions, so that they keep their names where the graph is traced again."""
    if sizes:
        node.meta[BINDINGS] = {symbol: (CallMethodKey("size"), pytree.SequenceKey(dim)) for symbol, dim in sizes.items()}


def write_expression(value: Any, proxies: dict[Any, Any]) -> Any:
    """Evaluate a sympy expression on `proxies` (by symbol): an FX proxy, or a plain number for a constant."""
    return sympy_interp(PythonReferenceAnalysis, proxies, value)


@contextlib.contextmanager
def restored_modes() -> Iterator[Callable[[Node, Any, tuple[Any, ...]], Any]]:
    """Gives `carry_out(node, target, args)`, which switches grad mode and autocast as a graph's mode node says.

    On leaving, whatever the nodes left switched is switched back. Inference mode is not entered: it changes no shape or dtype.
    """
    open_autocasts: list[Any] = []
    grad_mode = torch.is_grad_enabled()

    def carry_out(node: Node, target: Any, args: tuple[Any, ...]) -> Any:
        if target is SET_GRAD:
            target(*args)
        elif target is AUTOCAST_ENTER:
            open_autocasts.append((node, target(*args)))
        elif target is AUTOCAST_EXIT:
            index = next(i for i, (entered, _) in enumerate(open_autocasts) if entered is node.args[0])
            target(open_autocasts.pop(index)[1])

    try:
        yield carry_out
    finally:
        for _, entered in reversed(open_autocasts):
            AUTOCAST_EXIT(entered)
        torch._C._set_grad_enabled(grad_mode)
