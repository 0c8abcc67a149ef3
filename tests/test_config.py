"""Options, environment variables and their precedence."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from effcompile.config import ENVIRONMENT, Config, cache_dir
from effcompile.errors import ConfigError

PASSES = ("normalize", "attention", "moe")


def resolve(mode=None, **options) -> Config:
    return Config.resolve(mode, options, known_passes=PASSES)


def test_defaults():
    config = Config.resolve(None, None, known_passes=PASSES)
    assert config == Config(passes={"normalize": True, "attention": True, "moe": True})
    assert (config.mode, config.hardware, config.numerics, config.fallback) == ("default", None, "contract", "inductor")
    assert (config.tuning_budget_s, config.report, config.dump, dict(config.inductor)) == (0.0, False, None, {})


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve().mode = "max-autotune"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_of_torch_compile(mode):
    assert resolve(mode).mode == mode


@pytest.mark.parametrize(
    ("name", "given", "stored"),
    [
        ("hardware", "h100-sxm", "h100-sxm"),
        ("hardware", "cpu", "cpu"),
        ("hardware", None, None),
        ("numerics", "strict", "strict"),
        ("fallback", "error", "error"),
        ("fallback", "eager", "eager"),
        ("tuning_budget_s", 3, 3.0),
        ("report", True, True),
        ("report", "out/report.json", "out/report.json"),
        ("report", Path("out/report.json"), "out/report.json"),
        ("report", print, print),
        ("dump", None, None),
        ("inductor", {"max_autotune": True}, {"max_autotune": True}),
    ],
)
def test_values(name, given, stored):
    assert getattr(resolve(**{name: given}), name) == stored


def test_passes_that_are_not_named_stay_on():
    config = resolve(passes={"moe": False})
    assert config.passes == {"normalize": True, "attention": True, "moe": False}
    assert config.enabled("attention") and not config.enabled("moe")


def test_dump_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(dump="graphs").dump == tmp_path / "graphs"
    assert resolve(dump="~/graphs").dump == Path.home() / "graphs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"hardwear": "cpu"}, r"option to be one of .*hardware.* but got 'hardwear'. Did you mean 'hardware'\?", id="typo"
        ),
        pytest.param({"zzz": 1}, r"one of passes, hardware, numerics, .* but got 'zzz'\.$", id="unknown option"),
        pytest.param({"hardware": "h100"}, r"one of a100-sxm-40, .* but got 'h100'", id="unknown hardware"),
        pytest.param({"hardware": 90}, r"hardware=90 of type int", id="hardware as a number"),
        pytest.param({"numerics": "fast"}, r"one of 'contract', 'strict' but got numerics='fast' of type str", id="numerics"),
        pytest.param({"fallback": True}, r"one of 'inductor', 'eager', 'error' but got fallback=True of type bool", id="fallback"),
        pytest.param({"fallback": []}, r"fallback=\[\] of type list", id="unhashable fallback"),
        pytest.param({"tuning_budget_s": -1}, r"seconds >= 0 but got tuning_budget_s=-1 of type int", id="negative seconds"),
        pytest.param({"tuning_budget_s": "3"}, r"tuning_budget_s='3' of type str", id="seconds as text"),
        pytest.param({"tuning_budget_s": float("nan")}, r"tuning_budget_s=nan", id="seconds that are nan"),
        pytest.param({"tuning_budget_s": True}, r"tuning_budget_s=True of type bool", id="seconds as a bool"),
        pytest.param({"report": "yes"}, r"path that ends in .json but got report='yes'", id="report"),
        pytest.param({"report": 1}, r"report=1 of type int", id="report as a number"),
        pytest.param({"dump": 3}, r"a directory, or None but got dump=3 of type int", id="dump"),
        pytest.param({"dump": ""}, r"dump='' of type str", id="empty dump"),
        pytest.param({"dump": __file__}, r"a directory, not a file but got dump=", id="dump is a file"),
        pytest.param({"passes": ["moe"]}, r"a dict with string keys but got passes=\['moe'\]", id="passes as a list"),
        pytest.param({"passes": {"mo": False}}, r"each name in passes .* but got 'mo'. Did you mean 'moe'\?", id="unknown pass"),
        pytest.param({"passes": {"moe": 0}}, r"True or False but got passes\['moe'\]=0 of type int", id="switch as a number"),
        pytest.param({"inductor": {1: 2}}, r"a dict with string keys but got inductor=\{1: 2\}", id="inductor"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        resolve(**options)


@pytest.mark.parametrize("options", [["report"], 3, {3: 4}], ids=repr)
def test_options_must_be_a_dict(options):
    with pytest.raises(ConfigError, match="a dict with string keys but got options="):
        Config.resolve(None, options, known_passes=PASSES)


@pytest.mark.parametrize("mode", ["fast", "", 3], ids=repr)
def test_bad_mode(mode):
    with pytest.raises(ConfigError, match="'reduce-overhead'.* but got mode="):
        resolve(mode)


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("EFFARCH_HARDWARE", "mi300x", "hardware", "mi300x"),
        ("EFFARCH_FALLBACK", "error", "fallback", "error"),
        ("EFFARCH_REPORT", "1", "report", True),
        ("EFFARCH_REPORT", "0", "report", False),
        ("EFFARCH_REPORT", "r.json", "report", "r.json"),
        ("EFFARCH_DUMP", os.path.abspath("graphs"), "dump", Path("graphs").absolute()),
        ("EFFARCH_DISABLE", "moe, attention,", "passes", {"normalize": True, "attention": False, "moe": False}),
    ],
)
def test_environment(monkeypatch, variable, text, name, value):
    monkeypatch.setenv(variable, text)
    assert getattr(resolve(), name) == value


def test_an_option_outranks_the_environment(monkeypatch):
    monkeypatch.setenv("EFFARCH_FALLBACK", "eager")
    monkeypatch.setenv("EFFARCH_DISABLE", "moe,attention")
    config = resolve(fallback="error", passes={"moe": True})
    assert config.fallback == "error"
    assert config.passes == {"normalize": True, "attention": False, "moe": True}


@pytest.mark.parametrize("variable", sorted(ENVIRONMENT))
def test_an_empty_variable_is_not_set(monkeypatch, variable):
    monkeypatch.setenv(variable, "")
    assert resolve() == Config(passes=dict.fromkeys(PASSES, True))
    assert cache_dir().name == ("effcompile" if variable == "EFFARCH_CACHE_DIR" else "kernels")


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("EFFARCH_FALLBACK", "none", "but got EFFARCH_FALLBACK='none'"),
        ("EFFARCH_REPORT", "true", "but got EFFARCH_REPORT='true'"),
        ("EFFARCH_HARDWARE", "h10", "EFFARCH_HARDWARE to be one of"),
        ("EFFARCH_DUMP", __file__, "a directory, not a file but got EFFARCH_DUMP="),
        ("EFFARCH_DISABLE", "atention", "each name in EFFARCH_DISABLE .*Did you mean 'attention'"),
    ],
)
def test_bad_environment(monkeypatch, variable, text, message):
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError, match=message):
        resolve()


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFARCH_CACHE_DIR", str(tmp_path / "kernels"))
    assert cache_dir() == tmp_path / "kernels"
    monkeypatch.setenv("EFFARCH_CACHE_DIR", __file__)
    with pytest.raises(ConfigError, match="a directory, not a file but got EFFARCH_CACHE_DIR="):
        cache_dir()


@pytest.mark.parametrize(
    "options",
    [{"passes": {"moe": False}}, {"hardware": "l4"}, {"numerics": "strict"}, {"tuning_budget_s": 1}, {"inductor": {"a": 1}}],
    ids=str,
)
def test_key_tells_apart_what_compiles_differently(options):
    assert resolve(**options).key() != resolve().key()


@pytest.mark.parametrize("options", [{"report": True}, {"dump": "d"}, {"passes": {"moe": True}}], ids=str)
def test_key_is_the_same_for_what_compiles_alike(options):
    assert resolve(**options).key() == resolve().key()


def test_registered_passes_are_the_default():
    from effcompile.passes import PASSES as registered

    assert tuple(Config.resolve(None, None).passes) == tuple(registered)
