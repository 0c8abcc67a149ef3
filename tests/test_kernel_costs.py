"""What kernels are described to do: tiles that masks leave, resources, and times that were measured on an H100."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from effcompile.codegen import attention, decode, decode_costs, recurrence, recurrence_costs
from effcompile.codegen.attention_costs import Sizes, count_tiles, launches, predict
from effcompile.cost_model import devices
from effcompile.cost_model.schedule import occupancy
from effcompile.ops.attention import AttentionSpec
from effcompile.ops.recurrence import RecurrenceSpec
from effcompile.terms import from_text

H100 = devices.get("h100-sxm")
RESULT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "attention-h100.json"
SCALE = "0.08838834764831843 * s"
CAUSAL = AttentionSpec(score=SCALE, mask="j <= i")
WINDOW = AttentionSpec(score=SCALE, mask="(j <= i) & (i - j < 1024)")
SOFT_CAP = AttentionSpec(score="50 * tanh(0.00125 * s)", mask="j <= i")
DOCUMENTS = AttentionSpec(score=SCALE, mask="(j <= i) & (t0.i[b, i] == t0.i[b, j])", captures=("t0",))


def problem(width: int = 128, arch: str = "sm_90", dtype: torch.dtype = torch.bfloat16) -> attention.Problem:
    return attention.Problem(d_qk=width, d_v=width, dtype=dtype, arch=arch)


def sizes(steps: int, heads: int = 32, kv_heads: int = 8, batch: int = 1, queries: int | None = None, **more) -> Sizes:
    return Sizes(batch=batch, heads=heads, kv_heads=kv_heads, t_q=queries or steps, t_k=steps, **more)


# tiles ------------------------------------------------------------------------------------------------------------------

MASKS = {
    "full": "True",
    "causal": "j <= i",
    "window": "(j <= i) & (i - j < 100)",
    "band": "(j - i < 50) & (i - j < 50)",
    "prefix": "(j <= i) | (j < 70)",
    "chunks": "i // 64 == j // 64",
    "never": "False",
    "runtime": "(j <= i) & (i - j < width)",
}


@pytest.mark.parametrize("by_key", [False, True], ids=["by-query", "by-key"])
@pytest.mark.parametrize("tile", [(32, 32), (64, 16), (16, 64)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_tiles_are_those_that_hold_a_visible_pair(name, tile, by_key):
    """Counted from every element: 300 queries and 410 keys, neither a multiple of a tile."""
    spec = AttentionSpec(mask=MASKS[name], sizes=("width",) if name == "runtime" else ())
    t_q, t_k, (m, n) = 300, 410, tile
    named = {"width": 80} if name == "runtime" else {}
    found = count_tiles(spec, Sizes(batch=1, heads=1, kv_heads=1, t_q=t_q, t_k=t_k, named=named), m, n, by_key=by_key)
    text = MASKS[name].replace("width", "80")
    i, j = torch.arange(t_q)[:, None], torch.arange(t_k)[None, :]
    seen = eval(text, {"i": i, "j": j}) & (i >= 0) & (j >= 0)
    padded = torch.zeros(-(-t_q // m) * m, -(-t_k // n) * n, dtype=torch.bool)
    padded[:t_q, :t_k] = seen
    active = padded.view(padded.shape[0] // m, m, padded.shape[1] // n, n).any(3).any(1)
    by_line = active.sum(0 if by_key else 1).double()
    assert (found.mean, found.most) == pytest.approx((float(by_line.mean()), float(by_line.max())))


def test_long_grids_are_sampled():
    """A causal mask over a million steps: half the tiles."""
    found = count_tiles(CAUSAL, sizes(2**20), 128, 128)
    assert found.mean == pytest.approx(2**13 / 2, rel=0.03)


def test_loaded_data_leaves_every_tile_that_the_bounds_leave():
    everything, eighth = (count_tiles(DOCUMENTS, sizes(4096, density=density), 128, 128) for density in (1.0, 0.125))
    assert everything.mean == count_tiles(CAUSAL, sizes(4096), 128, 128).mean
    assert everything.masked == 1.0, "no tile is certain to be whole"
    assert eighth.mean == pytest.approx(everything.mean / 8)


# resources --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("spec", [CAUSAL, WINDOW, SOFT_CAP], ids=["causal", "window", "soft-cap"])
def test_default_configurations_fit_and_do_not_spill(spec, width):
    chosen = attention.default_config(spec, problem(width))
    for mode in ("forward", "backward"):
        for launch in launches(spec, problem(width), chosen, sizes(4096), mode=mode):
            assert occupancy(launch, H100) >= 1, launch
            assert launch.spilled == 0, launch


def test_a_ring_too_long_for_the_shared_memory_is_the_last_choice():
    times = {
        config.forward: predict(CAUSAL, problem(), config, sizes(4096), H100) for config in attention.candidates(CAUSAL, problem())
    }
    assert {rings.slots for rings, time in times.items() if math.isinf(time)} == {(4, 4)}


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_every_attention_candidate_has_a_time(arch):
    for dtype in (torch.bfloat16, torch.float32):
        kernels = problem(128, arch, dtype)
        for config in attention.candidates(CAUSAL, kernels):
            for mode in ("forward", "backward"):
                assert predict(CAUSAL, kernels, config, sizes(1024), H100, mode=mode) > 0


@pytest.mark.parametrize("decay", ["none", "head", "key", "value"])
@pytest.mark.parametrize("steps", [16, 1000, 32768])
def test_every_recurrence_candidate_has_a_time(decay, steps):
    spec = RecurrenceSpec(operands=("q", "k", *(() if decay == "none" else ("gate",))), decay=decay)
    kernels = recurrence.Problem(d_k=128, d_v=128, dtype=torch.bfloat16, arch="sm_90")
    for config in recurrence.candidates(spec, kernels):
        for mode in ("forward", "backward"):
            extents = recurrence_costs.Sizes(batch=1, heads=8, steps=steps, key_heads=8)
            time = recurrence_costs.predict(spec, kernels, config, extents, H100, mode=mode)
            assert 1e-6 < time < 0.1


# times ------------------------------------------------------------------------------------------------------------------

ROWS = {
    "causal-4k": (CAUSAL, 128, sizes(4096)),
    "causal-16k": (CAUSAL, 128, sizes(16384)),
    "window-16k": (WINDOW, 128, sizes(16384)),
    "softcap-8k": (SOFT_CAP, 256, sizes(8192, heads=16)),
    "documents-16k": (DOCUMENTS, 128, sizes(16384, density=1 / 8)),
}


def measured_ms(row: str) -> dict[str, float]:
    results = json.loads(RESULT.read_text())["results"]
    return {r["mode"]: r["ms"] for r in results if r["row"] == row and r["contender"] == "effarch" and r["status"] == "ok"}


@pytest.mark.parametrize("row", ROWS)
def test_attention_takes_about_the_time_that_was_measured(row):
    """Within 25 % of the packaged result, uncalibrated."""
    spec, width, extents = ROWS[row]
    chosen = attention.default_config(spec, problem(width))
    forward, backward = (predict(spec, problem(width), chosen, extents, H100, mode=mode) * 1e3 for mode in ("forward", "backward"))
    measured = measured_ms(row)
    assert forward == pytest.approx(measured["forward"], rel=0.25)
    assert forward + backward == pytest.approx(measured["forward+backward"], rel=0.25)


FORMS = {"linear": ("none", False), "retention": ("head", True), "simple-gla": ("head", False)}


@pytest.mark.parametrize("row", FORMS)
def test_a_recurrence_takes_about_the_time_that_was_measured(row):
    """Forward, within 35 % of the packaged result, uncalibrated. Backward it predicts too little: not compared."""
    decay, constant = FORMS[row]
    operands = ("q", "k") if decay == "none" else ("q", "k", "gate")
    spec = RecurrenceSpec(operands=operands, decay=decay, out="bfloat16")
    kernels = recurrence.Problem(d_k=128, d_v=128, dtype=torch.bfloat16, arch="sm_90", constant=constant)
    extents = recurrence_costs.Sizes(batch=1, heads=32, steps=8192, key_heads=32)
    found = recurrence_costs.predict(spec, kernels, recurrence.default_config(spec, kernels), extents, H100) * 1e3
    results = json.loads(RESULT.with_name("recurrence-h100.json").read_text())["results"]
    asked = (row, "b1-t8k-h32-d128", "forward", "effcompile")
    (measured,) = [r["ms"] for r in results if (r["row"], r["size"], r["mode"], r["contender"]) == asked]
    assert found == pytest.approx(measured, rel=0.35)


def test_decoding_is_bound_by_memory_once_the_keys_are_cut():
    """One query of 32 heads over 32768 keys of 8: 134 MB, 0.045 ms at 3 TB/s."""
    spec = AttentionSpec(score=SCALE)
    chosen, extents = decode.default_config(spec, problem()), sizes(32768, queries=1)
    rule = decode_costs.chosen_splits(spec, chosen, extents, H100)
    cut, whole = (decode_costs.predict(spec, problem(), chosen, extents, H100, splits=splits) * 1e3 for splits in (rule, 1))
    assert rule > 16
    assert 0.045 < cut < 0.075
    assert whole > 4 * cut
    assert decode_costs.predict(spec, problem(), chosen, extents, H100) * 1e3 == cut


def test_the_models_tile_of_a_recurrence_is_the_hosts():
    from effcompile.codegen import recurrence_hosts

    for heads, steps in ((1, 64), (8, 4096), (32, 8192), (66, 100), (256, 2048)):
        spec = RecurrenceSpec(operands=("q", "k"))
        config = recurrence.default_config(spec, recurrence.Problem(d_k=128, d_v=128, dtype=torch.bfloat16, arch="sm_90"))
        tiles = [tile.options() for tile in config.tiles]
        found = recurrence_costs.plan(config.tiles, heads, 128, steps, 1)
        tile, segments = recurrence_hosts.plan(tiles, heads, 128, steps, torch.device("cpu"))  # one processor
        assert (found.tile.options(), found.segments) == (tile, segments)


def test_masks_of_this_file_are_read():
    for text in MASKS.values():
        from_text(text)
