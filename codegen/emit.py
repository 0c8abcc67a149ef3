"""From a specification to one standalone kernel file: importable, readable, with nothing of ours needed to run it.

The file holds, in order: the formula and the configuration, the primitives it uses, the functions that the specification asks for,
the kernels, `forward` and `backward`, a plain-torch `reference`, and a `__main__` that compares the two and times the kernels.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import sys
import tempfile
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from ..config import cache_dir
from ..errors import KernelError
from ..ops import dropout
from ..ops.attention import AttentionSpec
from ..terms import to_text
from . import weave
from .hooks import Variant

_HERE = Path(__file__).parent
_HOOKS = (
    "score", "score_and_slope", "load_slope", "kept", "visible", "sink_logit", "key_range", "query_range", "classify", "table_line",
    "load_fixed", "load_rows", "load_cols", "load_row_ends", "load_col_ends",
)  # fmt: skip
_ROOTS = ("forward", "backward", "reference", "main")
_LOADING = threading.Lock()


def default_directory() -> Path:
    """Where kernel files live unless the caller says otherwise."""
    return cache_dir() / "kernels"


def attention_source(
    spec: AttentionSpec,
    *,
    d_qk: int,
    d_v: int,
    dtype: str,
    forward: Mapping[str, int],
    dq: Mapping[str, int],
    dkv: Mapping[str, int],
    captured: Mapping[str, int],
    fast_tanh: bool = False,
    split_dkv: bool = False,
    hopper: Collection[str] = (),
) -> str:
    """The text of the kernel file. `dtype` is a torch name such as "bfloat16"; the four mappings are launch configurations;
    `hopper` names those of "forward", "dq" and "dkv" that are written for Hopper.

    Raises:
        KernelError: the specification loads from a tensor that is not among its captures.
        ExpressionError: an expression that Triton cannot compute.
    """
    variant = Variant(spec, wide_values=dtype != "float16")
    configs = {"FORWARD": forward, "DQ": dq, "DKV": dkv, **({"CAPTURED": captured} if variant.learned else {})}
    parts = [
        _constants(variant, configs, split_dkv), _primitives(_tanh(dtype, fast_tanh)), _heading("The specification"),
        variant.hooks(), _kernels(variant, configs, hopper),
        _heading("Reference"), _reference(variant), _heading("Check"), _main(variant, _MAIN, d_qk, d_v, dtype),
    ]  # fmt: skip
    return _file(_header(variant, d_qk, d_v, dtype, configs), parts, _HOPPER_IMPORTS if hopper else "")


def _kernels(variant: Variant, configs: Mapping[str, Mapping[str, int]], hopper: Collection[str]) -> str:
    """Kernels and host functions, those named by `hopper` from its own template."""
    general = _woven(variant, "attention_kernels.py", "Forward", configs)
    if not hopper:
        return general
    special = _woven(variant, "hopper_kernels.py", "Hopper", configs)
    launches = {f"launch_{name}" for name in ("forward", "dq", "dkv")}
    taken = {f"launch_{name}" for name in hopper}
    return weave.drop(general, taken) + "\n\n" + weave.drop(special, launches - taken)


def decode_source(
    spec: AttentionSpec,
    *,
    d_qk: int,
    d_v: int,
    dtype: str,
    tiles: Sequence[Mapping[str, int]],
    resident: int,
    fast_tanh: bool = False,
) -> str:
    """The text of the kernel file for few queries. `tiles` are launch configurations by rising BLOCK_M, `resident` is the number of
    programs that share a processor.

    Raises:
        KernelError: the specification loads from a tensor that is not among its captures.
        ExpressionError: an expression that Triton cannot compute.
    """
    variant = Variant(spec, wide_values=dtype != "float16")
    listed = "".join(f"    {dict(tile)!r},\n" for tile in tiles)
    settings = {"TILES": f"(\n{listed})", "RESIDENT": repr(resident), "SPAN": repr(variant.span)}
    constants = "\n".join(f"{name} = {value}" for name, value in settings.items())
    parts = [
        _constants(variant, {}, False), constants, _primitives(_tanh(dtype, fast_tanh)), _heading("The specification"),
        variant.hooks(), _woven(variant, "decode_kernels.py", "Decode", settings),
        _heading("Reference"), _reference(variant), _heading("Check"), _main(variant, _DECODE_MAIN, d_qk, d_v, dtype),
    ]  # fmt: skip
    configs = {f"{tile['BLOCK_M']} rows": tile for tile in tiles}
    return _file(_header(variant, d_qk, d_v, dtype, configs), parts)


def _woven(variant: Variant, template: str, title: str, settings: Iterable[str]) -> str:
    """The kernels and host functions of a template, with the variant's flags decided and its lists filled in."""
    text = weave.drop(_template(template), (*_HOOKS, *_SETTINGS, *variant.flags, *settings))
    text = weave.prune(text, variant.flags)
    text = weave.replace_calls(text, variant.loaders())  # type: ignore[arg-type]
    text = weave.expand(text, variant.groups, lambda name, call, function: _arguments(variant, name, call, function))
    return _without_preamble(text, title)


def _file(header: str, parts: Sequence[str], imports: str = "") -> str:
    launches = _without_preamble(_template("launching.py"), "Launches")
    body = weave.tidy(weave.reachable("\n\n".join([*parts[:2], launches, *parts[2:]]), _ROOTS))
    pool = "from concurrent.futures import ThreadPoolExecutor\n" if "ThreadPoolExecutor" in body else ""
    first = "import functools\n" if imports else ""
    return f"{header}\n\n{first}{pool}\nimport torch\nimport triton\nimport triton.language as tl\n{imports}\n{body}\n\n{_ENTRY}"


def _tanh(dtype: str, fast: bool) -> str:
    return "tanh_approx" if fast else "tanh_exact" if dtype == "float32" else "tanh"


_SETTINGS = (
    "SCALE", "SLOPE", "SLOPE_LEFT", "PRECISION", "RUNTIME", "DKV_PASSES", "TABLE_BY_BATCH", "TABLE_BY_HEAD", "TABLE_CHUNK",
    "CROWDED", "CAPTURED", "SUMS", "KEPT_SCALE",
)  # fmt: skip
_HOPPER_IMPORTS = """from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
"""
_ENTRY = 'if __name__ == "__main__":\n    main()\n'


@lru_cache(maxsize=1)
def _dropout() -> str:
    return Path(dropout.__file__).read_text(encoding="ascii")


@lru_cache(maxsize=8)
def _template(name: str) -> str:
    return (_HERE / name).read_text(encoding="ascii")


def _without_preamble(text: str, title: str) -> str:
    """The template from its first function on, under a title: docstring, imports and flags have been dealt with."""
    source = weave.Source(text)
    first = next(node for node in source.tree.body if isinstance(node, ast.FunctionDef))
    start = source.line_span(first)[0]
    return _heading(title) + "\n\n" + text[start:]


def _arguments(variant: Variant, name: str, call: ast.Call | None, function: ast.FunctionDef) -> Sequence[str]:
    """What stands for a group in an argument list: of a device function, of a kernel launch, or of a function on the host."""
    if weave.is_kernel(function):
        return variant.groups[name]
    function_called = getattr(call, "func", None)
    launched = isinstance(function_called, ast.Name) and function_called.id == "start"
    if name == "captures":
        return variant.launch_captures if launched else variant.host_captures
    if name == "table":
        if not variant.needs_table:
            return ()
        return ("table", "*table.stride()[:3]") if launched and function.name != "block_table" else ("table",)
    return variant.groups[name]


def _heading(title: str) -> str:
    return f"# {'-' * (128 - len(title))} {title}"


def _constants(variant: Variant, configs: Mapping[str, Mapping[str, int]], split_dkv: bool) -> str:
    lines = [
        "LOG2E = tl.constexpr(1.4426950408889634)",
        f"SCALE = tl.constexpr({variant.scale!r})",
        f"SLOPE_LEFT = tl.constexpr({1.0 if variant.constant_slope is None else variant.constant_slope!r})",
        f"PRECISION = tl.constexpr({variant.spec.precision!r})",
        f"RUNTIME = {['TQ', 'TK', 'LINES', 'SPLITS', *variant.groups['table'][1:], *variant.spec.sizes]!r}",
        f"TABLE_BY_BATCH = {variant.table_depends_on('b')}",
        f"TABLE_BY_HEAD = {variant.table_depends_on('h')}",
        f"DKV_PASSES = {((True, False), (False, True)) if split_dkv else ((True, True),)!r}",
        f"CROWDED = tl.constexpr({variant.crowded!r})",
        f"KEPT_SCALE = tl.constexpr({1.0 / (1.0 - variant.spec.dropout)!r})",
        f"SUMS = {variant.sums!r}",
        f"TABLE_CHUNK = {2 if variant.exact_table else 32}",
    ]
    return "\n".join(lines + [f"{name} = {dict(config)!r}" for name, config in configs.items()])


def _primitives(tanh: str) -> str:
    found = weave.functions(_template("primitives.py"))
    found["tanh"] = found[tanh].replace(f"def {tanh}(", "def tanh(")
    del found["tanh_approx"], found["tanh_exact"]
    return "\n\n".join(found.values())


def _header(variant: Variant, d_qk: int, d_v: int, dtype: str, configs: Mapping[str, Mapping[str, int]]) -> str:
    spec = variant.spec
    weights = f"P = {'softmax over j of the score' if variant.normalised else 'the score'}, where the mask holds"
    sink = "" if variant.sink is None else f"\n    sink:   {to_text(variant.sink)}"
    sizes = ", ".join((*spec.captures, *spec.sizes)) or "none"
    tiles = "\n".join(f"    {name.lower():<9}{', '.join(f'{k}={v}' for k, v in c.items())}" for name, c in configs.items())
    return f'''"""Attention, written by effcompile.

    O[b,h,i,:] = sum_j P[b,h,i,j] V[b,h//g,j,:]
    {weights};   s = Q[b,h,i,:] . K[b,h//g,j,:]

    score:  {to_text(variant.score)}
    mask:   {to_text(variant.mask)}{sink}
    empty:  {spec.empty} (a row without any key)

Shapes: q [B, H, TQ, {d_qk}], k [B, H_KV, TK, {d_qk}], v [B, H_KV, TK, {d_v}], {dtype}, any strides. Further arguments: {sizes}.
Configuration:
{tiles}

Run this file to compare the kernels with the reference and to time them.
"""'''


def _reference(variant: Variant) -> str:
    text = _REFERENCE.replace("<CAPTURES>", "".join(f", {name}" for name in variant.host_captures))
    for name, value in variant.reference_lines().items():
        text = text.replace(f"<{name}>", value)
    text = weave.prune(text, variant.flags)
    return f"{_without_preamble(_dropout(), 'Dropout')}\n\n{text}" if variant.spec.dropout else text


_REFERENCE = '''def reference(q, k, v<CAPTURES>):
    """The same in plain torch, with the whole score matrix, in the dtype of q: `(out, lse)`."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.transpose(-1, -2)
    b, h, i, j = torch.meshgrid(*(torch.arange(n, device=q.device) for n in s.shape), indexing="ij")
    score = <SCORE>
    mask = (<MASK>).expand(s.shape)
    if NORMALISED:
        x = torch.where(mask, score, float("-inf"))
        if SINK:
            i = i[..., :1]
            b, h, j = b[..., :1], h[..., :1], j[..., :1]
            sink = (s.new_zeros((*s.shape[:-1], 1)) + (<SINK>)).to(s.dtype)
            joined = torch.cat([x, sink], -1)
        else:
            joined = x
        lse = torch.logsumexp(joined, -1)
        p = torch.softmax(joined, -1)[..., : x.shape[-1]]
        if ZERO:
            p = torch.where(mask.any(-1, keepdim=True) | torch.isfinite(lse)[..., None], p, 0.0)
    else:
        lse = s.new_zeros(s.shape[:-1])
        p = torch.where(mask, score, 0.0)
    if MEAN:
        p = torch.where(torch.isneginf(lse)[..., None], 1.0 / p.shape[-1], p)
    if DROPOUT:
        b, h, i, j = torch.meshgrid(*(torch.arange(n, device=q.device) for n in s.shape), indexing="ij")
        p = torch.where(dropout_keeps(seed, b, h, i, j, <DROPOUT>), p / (1.0 - <DROPOUT>), 0.0)
    return p @ v, lse
'''


def _main(variant: Variant, template: str, d_qk: int, d_v: int, dtype: str) -> str:
    captures = []
    for name in variant.spec.captures:
        kind = "torch.bool" if name in variant.bool_captures else "torch.int32" if name in variant.int_captures else "torch.float32"
        shape = ", ".join(variant.example_extent(name))
        filled = "ones" if name in variant.bool_captures else "zeros"
        captures.append(f"    {name} = torch.{filled}([{shape}], device=device, dtype={kind})\n")
    captures += [f"    {name} = t\n" for name in variant.spec.sizes]
    passed = "".join(f", {name}" for name in variant.host_captures)
    text = template.replace("<D_QK>", str(d_qk)).replace("<D_V>", str(d_v)).replace("<DTYPE>", f"torch.{dtype}")
    return text.replace("<MAKE>", "".join(captures)).replace("<PASSED>", passed)


_MAIN = '''def main(batch=1, heads=8, h_kv=2, t=1024, device="cuda"):
    """Compares forward and backward with the reference in float32, and times the kernels."""
    torch.manual_seed(0)
    q = torch.randn(batch, heads, t, <D_QK>, device=device, dtype=<DTYPE>, requires_grad=True)
    k = torch.randn(batch, h_kv, t, <D_QK>, device=device, dtype=<DTYPE>, requires_grad=True)
    v = torch.randn(batch, h_kv, t, <D_V>, device=device, dtype=<DTYPE>, requires_grad=True)
<MAKE>    expected, _ = reference(q.float(), k.float(), v.float()<PASSED>)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    with torch.no_grad():
        out, lse = forward(q, k, v<PASSED>)
        grads = backward(grad.to(out.dtype), q, k, v, out, lse<PASSED>)
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), (out, *grads), (expected, *expected_grads)):
        worst = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        print(f"{name:>4}: largest error {worst.item():.1e} of the largest value")
    if device == "cuda":
        with torch.no_grad():
            print(f"forward  {triton.testing.do_bench(lambda: forward(q, k, v<PASSED>)):.3f} ms")
            print(f"backward {triton.testing.do_bench(lambda: backward(out, q, k, v, out, lse<PASSED>)):.3f} ms")
'''

_DECODE_MAIN = '''def main(batch=1, heads=32, h_kv=8, queries=1, t=8192, device="cuda"):
    """Compares the result with the reference in float32, and times the kernels."""
    torch.manual_seed(0)
    q = torch.randn(batch, heads, queries, <D_QK>, device=device, dtype=<DTYPE>)
    k = torch.randn(batch, h_kv, t, <D_QK>, device=device, dtype=<DTYPE>)
    v = torch.randn(batch, h_kv, t, <D_V>, device=device, dtype=<DTYPE>)
<MAKE>    expected, _ = reference(q.float(), k.float(), v.float()<PASSED>)
    for splits in (None, 1, 3):
        out, lse = forward(q, k, v<PASSED>, splits=splits)
        worst = (out.float() - expected).abs().max() / expected.abs().max()
        print(f"{splits or 'chosen'} parts: largest error {worst.item():.1e} of the largest value")
    if device == "cuda":
        ms = triton.testing.do_bench(lambda: forward(q, k, v<PASSED>))
        moved = (k.numel() + v.numel()) * k.element_size() / ms * 1e-6
        print(f"forward  {ms:.4f} ms, {moved:.0f} GB/s if it read all keys and values")
'''


# ------------------------------------------------------------------------------------------------------------------------- files


def write_kernel(text: str, directory: Path | None = None, *, family: str = "attention") -> Path:
    """Writes a kernel file under its content's name, whole or not at all, and returns its path.

    Raises:
        KernelError: the directory cannot be written to.
    """
    directory = directory or default_directory()
    name = f"{family}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    path = directory / f"{name}.py"
    if path.exists():
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise KernelError(f"Expected a writable directory but got directory={str(directory)!r}: {error}. Set another.") from error
    return path


def load_kernel(path: Path) -> ModuleType:
    """Imports a kernel file, once a process."""
    name = f"effcompile_kernels.{re.sub(r'[^0-9A-Za-z_]', '_', str(path.parent))}.{path.stem}"
    with _LOADING:
        if name in sys.modules:
            return sys.modules[name]
        location = importlib.util.spec_from_file_location(name, path)
        if location is None or location.loader is None:
            raise KernelError(f"Expected an importable kernel file but got path={str(path)!r}.")
        module = importlib.util.module_from_spec(location)
        sys.modules[name] = module
        try:
            location.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
