"""Host functions of experts: how assignments are ordered, and the launches of a tile's kernels, forward and backward."""

from __future__ import annotations

import torch

from .experts_few_kernels import few_first_kernel, few_second_kernel
from .experts_kernels import first_kernel, outer_kernel, rows_kernel, slopes_kernel, sums_kernel
from .experts_order_kernels import combine_kernel, count_kernel, order_kernel, reach_kernel, route_kernel
from .experts_parts import APART, GATED, INTERLEAVED, WEIGHTED_IN, WEIGHTED_OUT
from .launching import begin, tile_count, width_of
from .recurrence_hosts import launch, processors, strided

PAIR = False  # gate and up are tensors of their own
TILES = (
    {
        "FIRST": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4},
        "ROWS": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4},
        "SLOPES": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 4},
    },
)  # by rising BLOCK_M, the same in the three
OUTER = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
FEW = {
    "ALONG": {"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4},  # weights whose rows of D or F are dense
    "ACROSS": {"BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4},
}

# ------------------------------------------------------------------------------------------------------------------------- Order


def choice(tokens, slots, experts, *, keep):
    """`(tile, few)`: the position in TILES for so many tokens, and whether they are so few that none are sorted.

    A tile holds one and a half times the rows that an expert has if they are spread evenly. What is not sorted reads the weights
    again for each assignment: as long as these are up to a quarter of the experts, one in nine comes twice. `keep`: for a gradient.
    """
    assignments = tokens * slots
    rows = 1.5 * assignments / max(1, min(assignments, experts))
    tile = next((at for at, tile in enumerate(TILES) if tile["FIRST"]["BLOCK_M"] >= rows), len(TILES) - 1)
    return tile, not keep and (tokens == 1 or 4 * assignments <= experts)


def blocks_of(assignments):
    """`(blocks, length, sub)` of a counting sort: up to 128 blocks, each of `length` assignments, `sub` at a time."""
    sub = 64
    length = max(sub, width_of(tile_count(assignments, 128)))
    return tile_count(assignments, length), length, sub


def arrange(start, ids, experts, height):
    """The order of the assignments `ids` [T, SLOTS] as kernels of rows take it, in tiles of `height` rows."""
    assignments = ids.numel()
    blocks, length, sub = blocks_of(assignments)
    width = width_of(experts)
    tiles = min(assignments, tile_count(assignments, height) + min(assignments, experts))
    empty = lambda *shape: start.empty(shape, torch.int32)  # noqa: E731
    counts, order, offsets, table = empty(blocks, width), empty(assignments), empty(experts + 1), empty(2, tiles)
    values = {
        "Ids": ids, "Counts": counts, "Sorted": order, "Offsets": offsets, "Tiles": table, **strided("i", "ts", ids),
        "ASSIGNMENTS": assignments, "SLOTS": ids.shape[1], "EXPERTS": experts, "BLOCKS": blocks, "LENGTH": length, "TILES": tiles,
        "HEIGHT": height,
    }  # fmt: skip
    options = {"SUB": min(sub, max(16, 8192 // width)), "WIDTH": width, "CHUNK": 16, "num_warps": 4}
    launch(start, count_kernel, (blocks, 1, 1), values, **options)
    launch(start, order_kernel, (blocks, 1, 1), values, **options)
    return {"Sorted": order, "Offsets": offsets, "Tiles": table, "TILES": tiles, "SLOTS": ids.shape[1], "ASSIGNMENTS": assignments}


def combine(start, ids, y, out, experts, parts=1):
    """The sums of y [T, SLOTS, parts, D] over a token's assignments."""
    values = {
        "Ids": ids, "Y": y, "Out": out, **strided("i", "ts", ids), **strided("o", "td", out), "WIDTH": out.shape[1],
        "EXPERTS": experts,
    }  # fmt: skip
    block = min(1024, width_of(out.shape[1]))
    grid = (out.shape[0], tile_count(out.shape[1], block), 1)
    launch(start, combine_kernel, grid, values, EACH=ids.shape[1], PARTS=parts, BLOCK=block, num_warps=4)


# ----------------------------------------------------------------------------------------------------------------------- Weights

NONE = (None, 0)  # weights or biases that are not there


def firsts(tensors, experts):
    """The first expert's part of what all experts have: of each tensor, or each of `experts` tensors is one's own."""
    return [*tensors[::experts]] if APART else [x[0] for x in tensors]


def all_of(start, tensors, experts):
    """`(the first expert's part, what leads to the others')`, see `of_expert`, of what all experts have."""
    if APART:
        return [(tensors[at], reach(start, tensors[at : at + experts])) for at in range(0, len(tensors), experts)]
    return [(x[0], x.stride(0)) for x in tensors]


def reach(start, tensors):
    """A table of how many elements after the first each tensor begins."""
    table, last = start.empty((len(tensors),), torch.int64), len(tensors) - 1
    for since in range(0, len(tensors), 32):
        some = {f"E{at}": tensors[min(since + at, last)] for at in range(32)}
        values = {"First": tensors[0], **some, "Out": table, "BEGIN": since, "LAST": last}
        launch(start, reach_kernel, (1, 1, 1), values, num_warps=1)
    return table


def led(letter, dims, part):
    """The strides within an expert's part and what leads to the others', by the names of kernel parameters."""
    first, lead = part
    return {f"reach_{letter}": lead, **strided(letter, dims, first)}


def turned(part):
    """Transposed."""
    first, lead = part
    return first.mT, lead


# ---------------------------------------------------------------------------------------------------------------------- Launches


def over_tiles(start, kernel, order, width, values, tile, **even):
    """One program for each tile of rows and of `width` columns."""
    grid = (order["TILES"] * tile_count(width, tile["BLOCK_N"]), 1, 1)
    launch(start, kernel, grid, order | values, WIDE=tile["BLOCK_M"] * tile["BLOCK_N"] >= 1024 * tile["num_warps"], **even, **tile)


def first(start, order, x, weights, halves, biases, h, acts, tile):
    """Activations, and H before them if there, of x [T, D]; `halves`: gate and up [D, F] of experts, or none and both in turn."""
    (gate, up), (gate_bias, up_bias) = halves, biases
    width = acts.shape[1]
    values = {
        "X": x, "Weights": weights, "Gate": gate[0], "Up": up[0], "GateBias": gate_bias[0], "UpBias": up_bias[0], "H": h,
        "Acts": acts, **strided("x", "td", x), **strided("w", "ts", weights), **led("g", "df", gate), **led("u", "df", up),
        **led("a", "f", gate_bias), **led("b", "f", up_bias), **strided("h", "md", h), "D": x.shape[1], "F": width,
    }  # fmt: skip
    even = {"EVEN_D": x.shape[1] % tile["BLOCK_K"] == 0, "EVEN_F": width % tile["BLOCK_N"] == 0}
    over_tiles(start, first_kernel, order, width, values, tile, **even)


def rows(start, order, a, u, bias, weights, out, tile, *, more=(None, NONE), x=None, dots=None):
    """out [ASSIGNMENTS, N] of rows a [ASSIGNMENTS, K], in order, and u [K, N] of experts, and of two such more, by assignment."""
    b, v = more
    inner, width = u[0].shape
    values = {
        "A": a, "B": b, "U": u[0], "V": v[0], "Bias": bias[0], "Weights": weights, "X": x, "Dots": dots, "Out": out,
        **strided("a", "md", a), **led("u", "kn", u), **led("v", "kn", v), **led("b", "n", bias),
        **strided("w", "ts", weights), **strided("x", "td", x), "K": inner, "N": width,
    }  # fmt: skip
    even = {"EVEN_K": inner % tile["BLOCK_K"] == 0, "EVEN_N": width % tile["BLOCK_N"] == 0}
    over_tiles(start, rows_kernel, order, width, values, tile, **even)


def slopes(start, order, grad, down, weights, h, dh, scaled, acts, dots, tile):
    """The gradient of H and what else is there: see `slopes_kernel`."""
    width, inner = down[0].shape
    values = {
        "Grad": grad, "Down": down[0], "Weights": weights, "H": h, "DH": dh, "Scaled": scaled, "Acts": acts, "Dots": dots,
        **strided("g", "td", grad), **led("d", "fd", down), **strided("w", "ts", weights), **strided("h", "md", h),
        "D": inner, "F": width,
    }  # fmt: skip
    even = {"EVEN_D": inner % tile["BLOCK_K"] == 0, "EVEN_F": width % tile["BLOCK_N"] == 0}
    over_tiles(start, slopes_kernel, order, width, values, tile, **even)


def outer(start, order, left, right, out, experts, by_token):
    """out [M, N] of experts: sums over the rows of each of left^T right, of which that at `by_token` has a row for each token."""
    height, width = out[0].shape
    tile = OUTER
    values = {
        "Left": left, "Right": right, "Out": out[0], **strided("l", "md", left), **strided("r", "md", right),
        **led("o", "mn", out), "M": height, "N": width,
    }  # fmt: skip
    grid = (experts * tile_count(height, tile["BLOCK_M"]) * tile_count(width, tile["BLOCK_N"]), 1, 1)
    even = {"EVEN_M": height % tile["BLOCK_M"] == 0, "EVEN_N": width % tile["BLOCK_N"] == 0}
    launch(start, outer_kernel, grid, order | values, BY_TOKEN=by_token, **even, **tile)


def sums(start, order, of, weights, out, experts, by_token):
    """out [N] of all experts: sums of each expert's rows, times their weights if there are any."""
    values = {
        "Rows": of, "Weights": weights, "Out": out[0], **strided("r", "md", of), **strided("w", "ts", weights),
        **led("o", "n", out), "N": len(out[0]),
    }  # fmt: skip
    grid = (experts, tile_count(len(out[0]), 64), 1)
    launch(start, sums_kernel, grid, order | values, BY_TOKEN=by_token, BLOCK_K=32, BLOCK_N=64, num_warps=4)


def route(start, ids, dots, grad, bias, d_weights, experts):
    """The gradient of the routing weights."""
    values = {
        "Ids": ids, "Dots": dots, "Grad": grad, "Bias": bias[0], "DWeights": d_weights, **strided("i", "ts", ids),
        **strided("g", "td", grad), **led("b", "d", bias), **strided("w", "ts", d_weights), "WIDTH": grad.shape[1],
        "ASSIGNMENTS": ids.numel(), "SLOTS": ids.shape[1], "EXPERTS": experts, "SPAN": dots.shape[0],
    }  # fmt: skip
    launch(start, route_kernel, (tile_count(ids.numel(), 64), 1, 1), values, BLOCK=64, BLOCK_D=64, num_warps=4)


# -------------------------------------------------------------------------------------------------------------- Few assignments


def few_tile(part):
    """How a product with weights [K, N] of all experts is cut: along K where that is how they stand in memory."""
    return FEW["ALONG" if part[0].stride(0) == 1 else "ACROSS"]


def take_few(start, x, ids, weights, halves, biases, down, down_bias, out, experts):
    """All of it for few assignments."""
    inner, width = down[0].shape
    (gate, up), (gate_bias, up_bias) = halves, biases
    tile = few_tile(up)
    acts = start.empty((ids.numel(), inner), torch.float32)
    common = {
        "Ids": ids, "Weights": weights, **strided("i", "ts", ids), **strided("w", "ts", weights), "SLOTS": ids.shape[1],
        "EXPERTS": experts, "Acts": acts, "F": inner,
    }  # fmt: skip
    values = common | {
        "X": x, "Gate": gate[0], "Up": up[0], "GateBias": gate_bias[0], "UpBias": up_bias[0], **strided("x", "td", x),
        **led("g", "df", gate), **led("u", "df", up), **led("a", "f", gate_bias), **led("b", "f", up_bias), "D": x.shape[1],
    }  # fmt: skip
    launch(start, few_first_kernel, (ids.numel(), tile_count(inner, tile["BLOCK_N"]), 1), values, **tile)
    tile = few_tile(down)
    columns = tile_count(width, tile["BLOCK_N"])
    most = tile_count(inner, 2 * tile["BLOCK_K"])
    parts = max(1, min(8, most, tile_count(4 * processors(x.device), ids.numel() * columns)))
    span = tile_count(tile_count(inner, parts), tile["BLOCK_K"])
    parts = tile_count(inner, span * tile["BLOCK_K"])
    y = start.empty((*ids.shape, parts, width), torch.float32)
    values = common | {
        "Down": down[0], "Bias": down_bias[0], "Y": y, **led("d", "fd", down), **led("b", "d", down_bias), "D": width,
        "SPAN": span,
    }  # fmt: skip
    launch(start, few_second_kernel, (ids.numel(), columns, parts), values, **tile)
    combine(start, ids, y, out, experts, parts)


# --------------------------------------------------------------------------------------------------------------------- Operation


def halves_of(parts):
    """Gate and up [..., F] of all experts as parts of the first projection; no gate where there is none."""
    if not GATED:
        return NONE, parts[0]
    if PAIR:
        return parts[0], parts[1]
    first, lead = parts[0]
    if INTERLEAVED:
        return (first[..., 0::2], lead), (first[..., 1::2], lead)
    width = first.shape[-1] // 2
    return (first[..., :width], lead), (first[..., width:], lead)


def views(tensors, experts):
    """What `halves_of` makes: views whose addresses are not those of what they are views of."""
    return [first for first, _ in halves_of([(x, 0) for x in firsts(tensors, experts)])] if tensors else []


def biases_of(start, biases, experts):
    """Gate's and up's biases [F] of all experts, and the second projection's."""
    first_biases, second = (all_of(start, of, experts) for of in biases)
    return (halves_of(first_biases) if first_biases else (NONE, NONE)), (second[0] if second else NONE)


def forward(x, ids, weights, up, down, biases, *, out, h=None, tile=None, few=None):
    """Writes `out` [T, d_out] and, if it is there, the pre-activation `h` [ASSIGNMENTS, columns of U].

    x [T, D], ids and weights [T, SLOTS], or no weights, up: a tensor [E, D, columns] or gate and up, down: a tensor [E, F, d_out],
    biases: a list for each, of any strides; or as many tensors as there are experts where one is said here, if APART.
    `tile`: which of TILES, `few`: whether no rows are sorted; chosen if not given.
    """
    experts = len(down) if APART else len(down[0])
    width = down[0].shape[-2]
    if tile is None or few is None:
        tokens, slots = ids.shape
        tile, few = choice(tokens, slots, experts, keep=h is not None)
    shape = TILES[tile]

    def run(start):
        ups, (second,) = all_of(start, up, experts), all_of(start, down, experts)
        biases_in, bias_out = biases_of(start, biases, experts)
        if few:
            take_few(start, x, ids, weights, halves_of(ups), biases_in, second, bias_out, out, experts)
            return
        order = arrange(start, ids, experts, shape["FIRST"]["BLOCK_M"])
        acts = start.empty((ids.numel(), width), x.dtype)
        halves = (NONE, ups[0]) if INTERLEAVED else halves_of(ups)
        first(start, order, x, weights, halves, biases_in, h, acts, shape["FIRST"])
        y = start.empty((ids.numel(), out.shape[1]), x.dtype)
        rows(start, order, acts, second, bias_out, weights if WEIGHTED_OUT else None, y, shape["ROWS"])
        combine(start, ids, y, out, experts)

    begin(
        run, x, ids, weights, *up, *views(up, experts), *down, *biases[0], *views(biases[0], experts), *biases[1], out, h, tile, few
    )


def backward(
    grad, x, ids, weights, up, down, biases, h, *, dx=None, d_weights=None, d_up=(), d_down=(), d_biases=((), ()), tile=None
):
    """Writes the gradients that are there, as the operands are; `h` is what `forward` wrote."""
    experts = len(down) if APART else len(down[0])
    width = down[0].shape[-2]
    if tile is None:
        tokens, slots = ids.shape
        tile, _ = choice(tokens, slots, experts, keep=True)
    shape = TILES[tile]
    inward = d_weights is not None and WEIGHTED_IN
    outward = d_weights is not None and WEIGHTED_OUT

    def run(start):
        ups, (second,) = all_of(start, up, experts), all_of(start, down, experts)
        order = arrange(start, ids, experts, shape["FIRST"]["BLOCK_M"])
        empty = lambda wanted, *sizes, dtype=x.dtype: start.empty(sizes, dtype) if wanted else None  # noqa: E731
        dots = lambda wanted, n, kind: empty(  # noqa: E731
            wanted, tile_count(n, shape[kind]["BLOCK_N"]), ids.numel(), dtype=torch.float32
        )
        dh = start.empty(h.shape, x.dtype)
        scaled = empty(WEIGHTED_IN and bool(d_up), *h.shape)
        acts = empty(bool(d_down), ids.numel(), width)
        by_acts, by_x = dots(outward, width, "SLOPES"), dots(inward, x.shape[1], "ROWS")
        slopes(start, order, grad, second, weights, h, dh, scaled, acts, by_acts, shape["SLOPES"])
        if dx is not None or inward:
            slope = dh.unflatten(1, (len(ups), -1)).unbind(1)
            more = (slope[1], turned(ups[1])) if PAIR else (None, NONE)
            y = empty(True, *ids.shape, x.shape[1])
            given = {"more": more, "x": x if inward else None, "dots": by_x}
            rows(start, order, slope[0], turned(ups[0]), NONE, weights if WEIGHTED_IN else None, y, shape["ROWS"], **given)
            if dx is not None:
                combine(start, ids, y, dx, experts)
        if d_weights is not None:
            bias = biases_of(start, biases, experts)[1] if outward else NONE
            route(start, ids, by_acts if outward else by_x, grad, bias, d_weights, experts)
        wanted = [all_of(start, of, experts) for of in (d_up, d_down, *d_biases)]
        sum_rows(start, order, grad, x, weights, dh, dh if scaled is None else scaled, acts, wanted, experts)

    begin(run, grad, x, ids, weights, *up, *down, *biases[0], *biases[1], h, dx, d_weights, *d_up, *d_down, *d_biases[0],
          *d_biases[1], tile, len(d_up), len(d_down), len(d_biases[0]), len(d_biases[1]))  # fmt: skip


def sum_rows(start, order, grad, x, weights, dh, scaled, acts, wanted, experts):
    """The gradients of weights and biases: sums over each expert's rows; `scaled`: what meets x."""
    d_up, d_down, d_first, d_second = wanted
    width = dh.shape[1] // max(1, len(d_up), len(d_first))
    for at, out in enumerate(d_up):
        outer(start, order, x, scaled[:, at * width : (at + 1) * width], out, experts, 0)
    for out in d_down:
        outer(start, order, acts, grad, out, experts, 1)
    for at, out in enumerate(d_first):
        sums(start, order, dh[:, at * width : (at + 1) * width], None, out, experts, False)
    for out in d_second:
        sums(start, order, grad, weights if WEIGHTED_OUT else None, out, experts, True)
