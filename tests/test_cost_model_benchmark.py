"""The benchmark of the cost model: its cases, its verdicts, the fit of factors, and a run with Triton's interpreter."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

from effcompile.cost_model import devices

ROOT = Path(__file__).resolve().parent.parent
H100 = devices.get("h100-sxm")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/cost_model.py, as the scripts import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("cost_model")


def arguments(out: Path, **changes: object) -> argparse.Namespace:
    given = {"budget": 60.0, "jobs": 1, "device": "cpu", "seed": 3, "smoke": True, "cases": 24, "out": str(out)}
    return argparse.Namespace(**{**given, **changes})


def row(*candidates: tuple[float | None, float | None], status: str = "error") -> dict[str, object]:
    """A result of candidates (predicted, measured); one without a measurement has the status."""
    entries = [
        {"config": str(at), "predicted_ms": predicted, **({"status": status} if ms is None else {"status": "ok", "ms": ms})}
        for at, (predicted, ms) in enumerate(candidates)
    ]
    return {"case": {"family": "attention"}, "selection_ms": 1.0, "candidates": entries}


def test_cases_are_reproducible_and_of_all_families(bench):
    cases = bench.draw(64, seed=5)
    assert cases == bench.draw(64, seed=5) != bench.draw(64, seed=6)
    assert len(set(cases)) == 64
    assert {case.family for case in cases} == set(bench.FAMILIES)
    forms = {case.form for case in bench.draw(400, seed=5)}
    modules = importlib.import_module("cost_model_cases")
    assert forms == {*modules.MASKS, *modules.DECAYS}


def test_the_rule_is_the_first_candidate_and_every_one_has_a_prediction(bench):
    for case in bench.draw(24, seed=7):
        found, predicted, _ = bench.described(case, H100)
        assert len(found) > 1
        assert all(ms > 0 for ms in predicted)
        assert math.isfinite(predicted[0]), f"the model expects the rule not to fit: {case.name}"


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        pytest.param([(1.0, 2.0), (2.0, 1.0)], {"rule": 0.5, "model": 0.5, "model_best_of_3": 1.0}, id="wrong-choice"),
        pytest.param([(2.0, 2.0), (1.0, 1.0)], {"rule": 0.5, "model": 1.0, "mape": 0.0}, id="right-choice"),
        pytest.param([(3.0, 2.0), (1.0, None), (2.0, 1.0)], {"model": 1.0, "refused_first": 1.0}, id="first-choice-refused"),
        pytest.param([(None, 1.0), (2.0, 4.0)], {"model": 0.25, "rule": 1.0, "mape": 0.5}, id="expected-not-to-fit"),
        pytest.param([(1.0, None), (1.0, 2.0), (2.0, 1.0)], {"rule": 0.0}, id="rule-refused"),
    ],
)
def test_verdict(bench, candidates, expected):
    verdict = bench.judged(row(*candidates))
    assert {name: verdict[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    "unfinished",
    [
        pytest.param(row((1.0, 2.0), (2.0, None), (3.0, 1.0), status="skipped: the time was spent"), id="skipped"),
        pytest.param(row((1.0, 2.0), (2.0, None)), id="only-one-ran"),
    ],
)
def test_no_verdict(bench, unfinished):
    assert bench.judged(unfinished) is None


def test_smoke_run_says_that_its_times_are_invented(bench, tmp_path):
    out = tmp_path / "result.json"
    bench.run(arguments(out))
    written = json.loads(out.read_text())
    assert written["invented"] is True
    assert len(written["results"]) == 24
    assert 0 < written["summary"]["all"]["model"]["worst"] <= written["summary"]["all"]["model"]["geomean"] <= 1


def test_fit_finds_the_factors_behind_invented_times(bench, tmp_path):
    out = tmp_path / "result.json"
    bench.run(arguments(out, cases=40))
    payload = json.loads(out.read_text())
    found = bench.fitted(payload, [{**payload, "hardware": "h200"}])
    assert found["factors"]["matmul"] == pytest.approx(0.7, rel=0.15)
    assert found["factors"]["latency_clocks"] == pytest.approx(1100, rel=0.15)
    before, after = (found["held_out"][when]["all"]["mape"] for when in ("before", "after"))
    assert after < 0.06 < before
    assert found["h200"]["all"]["cases"] == found["all"]["after"]["all"]["cases"]


def test_measures_in_processes_of_their_own(bench, tmp_path, monkeypatch):
    """With the interpreter, whose times mean nothing: what is tested is that children answer for every job."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    shared = {"mode": "forward", "batch": 1, "heads": 1, "kv_heads": 1, "steps": 16, "width": 16}
    drawn = [bench.Case(family="decode", form="full", queries=1, **shared), bench.Case(family="recurrence", form="none", **shared)]
    monkeypatch.setattr(bench, "draw", lambda count, seed: drawn)
    payload = bench.run(arguments(tmp_path / "result.json", smoke=False, budget=200.0))
    assert payload["invented"] is False
    for result in payload["results"]:
        assert all("ms" in entry for entry in result["candidates"]), result


def test_a_job_at_which_a_process_dies_is_left_out_by_the_next(bench, tmp_path, monkeypatch):
    """Job 1 takes its process along; 0 and 2 are still answered."""
    crash = {"status": "crash", "error": "exit 1"}

    def run_children(script, arguments, **options):
        numbers = [int(number) for number in arguments[2:]]
        done = numbers[: numbers.index(1)] if 1 in numbers else numbers
        return [{"status": "ok", "ms": float(number)} for number in done], crash

    monkeypatch.setattr(bench, "run_children", run_children)
    found = bench.carried_out("time", tmp_path / "jobs.json", [0, 1, 2], bench.time.time() + 60, tmp_path)
    assert found == {0: {"status": "ok", "ms": 0.0}, 1: crash, 2: {"status": "ok", "ms": 2.0}}
