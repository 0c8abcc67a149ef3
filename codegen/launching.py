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
    key = run.__code__, device, *map(look, values, addresses), *map(addresses.index, addresses)
    if key not in PLANS:
        if len(PLANS) > 4096:
            PLANS.clear()
        PLANS[key] = planned(run, values, device)
    if PLANS[key] is None:
        run(at_once(device))
    else:
        play(PLANS[key], values, addresses, device)


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
    """`(launches, scratch)`: (launcher, arguments, where addresses go, where tile copies go) each, and (shape, dtype) each."""
    launches, made = [], []

    def start(kernel, grid, *args, **options):
        launches.append((kernel, grid, args, options))

    def empty(shape, dtype):
        made.append(torch.empty(shape, dtype=dtype, device=device))
        return made[-1]

    start.empty = empty  # type: ignore[attr-defined]
    run(start)
    launchers, tensors, found = compiled(launches, device), [*values, *made], []
    for launcher, (kernel, _, args, options) in zip(launchers, launches, strict=True):
        constants = [options[name] for name in kernel.arg_names[len(args) :]]
        bases = [getattr(x, "base", x) if hasattr(x, "block_shape") else x for x in args]
        spots = [(at, *slot_of(x, tensors)) for at, x in enumerate(bases) if isinstance(x, torch.Tensor)]
        if launcher is None or any(slot is None for _, slot, _ in spots):
            return None
        copies = [(at, slot) for at, slot, _ in spots if bases[at] is not args[at]]
        if any(offset for at, _, offset in spots if bases[at] is not args[at]):
            return None
        found.append((launcher, [*args, *constants], [spot for spot in spots if bases[spot[0]] is args[spot[0]]], copies))
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


def compiled(launches, device):
    """What launches each of them: kernels are compiled side by side. None for a kernel that Triton did not compile."""

    def build(launch):
        kernel, grid, args, options = launch
        built = kernel.warmup(*args, grid=grid, **options)
        return built and built[grid]

    def attempt(launch):
        try:
            return build(launch), True
        except Exception:  # Python's own parser may fail in two threads at once
            return None, False

    with ThreadPoolExecutor(8, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        built = list(pool.map(attempt, launches))
    return [launcher if done else build(launch) for (launcher, done), launch in zip(built, launches, strict=True)]


def play(plan, values, addresses, device):
    """The launches of a plan, with the addresses of these tensors."""
    launches, scratch = plan
    made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in scratch]
    if made:
        values = [*values, *made]
        addresses = [*addresses, *(x.data_ptr() for x in made)]
    for launcher, args, spots, copies in launches:
        args = args.copy()
        for at, slot, offset in spots:
            args[at] = addresses[slot] + offset
        for at, slot in copies:
            args[at] = based_on(args[at], values[slot])
        launcher(*args)


def based_on(copies, tensor):
    """The same copies of tiles of another tensor."""
    made = object.__new__(type(copies))
    made.__dict__.update(copies.__dict__, base=tensor)
    return made
