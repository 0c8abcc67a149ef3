"""What host functions of kernel files share: sizes of tiles, and how kernels are started. The emitter copies what a file uses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import triton


def tile_count(length, block):
    """How many tiles cover a length."""
    return -(-length // block)


def width_of(dim):
    """The block width that holds `dim` columns."""
    return max(16, 1 << (dim - 1).bit_length())


PLANS = dict[tuple, tuple | None]()  # what a call looks like -> its launches, or None if they cannot be told from its looks


def begin(run, *values):
    """`run(start)`, which starts kernels by `start(kernel, grid, ...)` and makes scratch memory by `start.empty(shape, dtype)`.

    values: all that it depends on: every tensor that it reads or writes, but scratch, whose addresses alone may differ between
    calls that look the same. What a call launches is found out once, and compiled side by side; then it is played again, past
    Triton's own look-up.
    """
    device = next(x.device for x in values if isinstance(x, torch.Tensor))
    if not plays(device):
        run(at_once(device))
        return
    addresses = [x.data_ptr() if isinstance(x, torch.Tensor) else 0 for x in values]
    seen = dict[int, int]()
    same = [seen.setdefault(address, at) for at, address in enumerate(addresses)]
    key = run.__code__, device, *map(look, values, addresses), *same
    plan = PLANS.get(key, ())
    if plan == ():
        if len(PLANS) > 4096:
            PLANS.clear()
        plan = PLANS[key] = planned(run, values, device)
    if plan is None:
        run(at_once(device))
    else:
        play(plan, values, addresses, device)


def look(value, address):
    """What decides, beside which other values have the same address, what a value makes a call launch."""
    return (value.shape, value.stride(), value.dtype, address % 16 == 0) if isinstance(value, torch.Tensor) else value


def plays(device):
    """Whether launches are recorded for a device: not by the interpreter, and not on AMD, where Triton looks at sizes too."""
    return device.type == "cuda" and torch.version.hip is None


def at_once(device):
    """A `start` that leaves all to Triton."""

    def start(kernel, grid, *args, **options):
        kernel[grid](*args, **options)

    start.empty = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
    return start


def planned(run, values, device):
    """`(launches, scratch)`: (kernel, grid, arguments, where addresses go, where tile copies go) each, (shape, dtype) each."""
    launches, made = [], []

    def start(kernel, grid, *args, **options):
        launches.append((kernel, grid, args, options))

    def empty(shape, dtype):
        made.append(torch.empty(shape, dtype=dtype, device=device))
        return made[-1]

    start.empty = empty  # type: ignore[attr-defined]
    run(start)
    kernels, tensors, found = compiled(launches, device), [*values, *made], []
    for built, (kernel, grid, args, options) in zip(kernels, launches, strict=True):
        spots, copies = list[tuple](), list[tuple]()
        kept = [*args, *(options[name] for name in kernel.arg_names[len(args) :])]
        for at, x in enumerate(args):
            of_tiles = hasattr(x, "block_shape")
            if isinstance(x, torch.Tensor) or of_tiles:
                slot, offset = slot_of(x.base if of_tiles else x, tensors)
                if built is None or slot is None or (of_tiles and offset):
                    return None
                kept[at] = based_on(x, None) if of_tiles else None  # a plan keeps no memory alive
                (copies if of_tiles else spots).append((at, slot, offset))
        found.append((built, grid, kept, spots, copies))
    return found, [(x.shape, x.dtype) for x in made]


def slot_of(x, tensors):
    """The position of the tensor that x is or is a view of, and how many bytes later x begins; `(None, 0)` if that is uncertain."""
    for slot, other in enumerate(tensors):
        if other is x:
            return slot, 0
    storage = x.untyped_storage().data_ptr()
    same = [slot for slot, t in enumerate(tensors) if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() == storage]
    if len(same) > 1:
        same = [slot for slot in same if tensors[slot].data_ptr() == x.data_ptr()][:1]
    return (same[0], x.data_ptr() - tensors[same[0]].data_ptr()) if same else (None, 0)


BUILT = dict[tuple, object]()  # (kernel, device, kinds of its arguments) -> the compiled kernel


def kind_of(value):
    """What Triton looks at in an argument when it compiles: two arguments of one kind share a kernel."""
    if isinstance(value, int):
        return "one" if value == 1 else ("int", value % 16 == 0, -(2**31) <= value < 2**31)
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):  # copies of tiles
        return (*kind_of(value.base), *value.block_shape)
    return value


def compiled(launches, device):
    """The kernel of each of them: new ones are compiled side by side. None for a kernel that Triton did not compile."""
    keys = [(id(kernel), device, tuple(map(kind_of, args)), *options.values()) for kernel, _, args, options in launches]
    new = {key: launch for key, launch in zip(keys, launches, strict=True) if key not in BUILT}

    def build(launch):
        kernel, grid, args, options = launch
        built = kernel.warmup(*args, grid=grid, **options)
        return built, built and built[grid]  # which makes its launcher

    def attempt(launch):
        try:
            return build(launch)
        except Exception:  # Python's own parser may fail in two threads at once
            return None

    if len(new) > 1:
        with ThreadPoolExecutor(8, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
            found = dict(zip(new, pool.map(attempt, new.values()), strict=True))
    else:
        found = dict.fromkeys(new)
    for key, launch in new.items():
        BUILT[key] = (found[key] or build(launch))[0]
    return [BUILT[key] for key in keys]


def play(plan, values, addresses, device):
    """The launches of a plan, with the addresses of these tensors."""
    launches, scratch = plan
    made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in scratch]
    if made:
        values = [*values, *made]
        addresses = [*addresses, *(x.data_ptr() for x in made)]
    stream, observed = triton.runtime.driver.active.get_current_stream(device.index), is_observed()
    for built, grid, args, spots, copies in launches:
        args = args.copy()
        for at, slot, offset in spots:
            args[at] = addresses[slot] + offset
        for at, slot, _ in copies:
            args[at] = based_on(args[at], values[slot])
        if observed:
            built[grid](*args)
        else:
            built.run(*grid, stream, built.function, built.packed_metadata, None, None, None, *args)


def is_observed():
    """Whether somebody, such as a profiler, asked Triton to tell of each launch."""
    hooks = triton.knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook))


def based_on(copies, tensor):
    """The same copies of tiles, of another tensor."""
    made = object.__new__(type(copies))
    made.__dict__.update(copies.__dict__, base=tensor)
    return made
