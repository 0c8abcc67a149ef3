"""What host functions of kernel files share: sizes of tiles, and how kernels are started. The emitter copies what a file uses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def tile_count(length, block):
    """How many tiles cover a length."""
    return -(-length // block)


def width_of(dim):
    """The block width that holds `dim` columns."""
    return max(16, 1 << (dim - 1).bit_length())


def kind_of(value):
    """What Triton looks at in an argument when it compiles: two arguments of one kind share a kernel."""
    if isinstance(value, int):
        return "one" if value == 1 else ("int", value % 16 == 0, -(2**31) <= value < 2**31)
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):  # a descriptor of tiles
        return (*kind_of(value.base), *value.block_shape)
    return value


KNOWN = dict[tuple, tuple]()  # (kernel, kinds of its arguments) -> the compiled kernel, the arguments that are constants of it
PREPARED = set[tuple]()  # shapes whose kernels are compiled


def launched(kernel, grid, *args, **options):
    """Launch a kernel on a grid of three dimensions. What was launched before is not looked up by Triton again."""
    key = (id(kernel), tuple(map(kind_of, args)), tuple(options.values()))
    if key in KNOWN:
        compiled, constants = KNOWN[key]
        compiled[grid](*args, *constants)
        return
    compiled = kernel[grid](*args, **options)
    if compiled is not None and torch.version.hip is None:  # the interpreter compiles nothing; AMD looks at sizes too
        KNOWN[key] = compiled, [options[name] for name in kernel.arg_names[len(args) :]]


def begin(run, *tensors):
    """`run(start)`, which starts kernels by `start(kernel, grid, ...)`; those of new shapes are compiled side by side first.

    What fails there, as Python's own parser may in two threads at once, is compiled when it is launched.
    """
    device = tensors[0].device
    shapes = (device, *((x.shape, x.stride(), x.dtype) for x in tensors))
    if shapes not in PREPARED and device.type == "cuda":
        with ThreadPoolExecutor(8, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
            run(lambda kernel, grid, *args, **options: pool.submit(kernel.warmup, *args, grid=grid, **options))
        if len(PREPARED) > 4096:
            PREPARED.clear()
        PREPARED.add(shapes)
    run(launched)
