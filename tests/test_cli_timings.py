"""What was timed here, on the command line: shown, exported, cleared; and the options that bound it."""

import json
import tomllib

import compress_case as case
import pytest
from edgepress.compress.choice import choose_kernel
from edgepress.driver.cli import main
from edgepress.driver.measuring.profile import measured_profile
from edgepress.driver.options import parse_arguments, recipe_from
from edgepress.runtimes.device import LocalDevice
from edgepress.runtimes.timing_cache import OperatorTiming, TimingCache, TimingKey
from edgepress.targets.registry import load_target, to_toml


def run_in(folder, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return main(words.split())


def shown(folder, words, capsys):
    assert run_in(folder, words) == 0
    return capsys.readouterr().out


def told(folder, words, capsys):
    return json.loads(shown(folder, f"{words} --json", capsys))


LARGE, SMALL = ((1, 128, 384), (384, 1536)), ((1, 384), (384, 384))


def timing(form, shapes, ratio, operator="MatMul"):
    key = TimingKey(operator=operator, form=form, shapes=shapes, attributes="", threads=1)
    return OperatorTiming(key=key, p50_ms=1 / ratio, float_p50_ms=1.0, pair_ratios=(ratio, ratio, ratio))


TIMINGS = [
    timing("dynamic", LARGE, 3.5),
    timing("dynamic", SMALL, 0.9, "3 MatMul"),
    timing("weight-only", LARGE, 1.25),
    timing("static-uint8", ((1, 16, 8, 8), (16, 16, 3, 3)), 1.75, "Conv"),
    timing("static-uint8 with conversions", ((1, 16, 8, 8), (16, 16, 3, 3)), 1.5, "Conv"),
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    made = TimingCache(tmp_path / "cache", LocalDevice().features())
    made.add(TIMINGS)
    return made


def test_the_host_is_shown_with_its_timings_and_stays_a_profile(tmp_path, cache, capsys):
    text = shown(tmp_path, "targets show host", capsys)
    assert tomllib.loads(text)["kind"] == "host"
    rows = [line.split() for line in text.splitlines() if line.startswith("# MatMul")]
    assert rows[0][:10] == [
        "#",
        "MatMul",
        "dynamic",
        "1x128x384",
        "*",
        "384x1536",
        "1",
        "0.2857",
        "1.0000",
        "3.50x",
    ]
    document = told(tmp_path, "targets show host", capsys)
    assert document["name"] == "host"
    assert document["timings_file"] == str(cache.path)
    assert len(document["timings"]) == len(TIMINGS)
    assert document["timings"][0] == json.loads(json.dumps(document["timings"][0]))
    assert document["timings"][0]["key"]["form"] == "dynamic"


def test_other_targets_have_no_timings(tmp_path, cache, capsys):
    assert "timings" not in told(tmp_path, "targets show raspberry-pi-5", capsys)
    assert "timings" not in told(tmp_path, "targets probe", capsys)
    assert cache.timings()
    for words in ("--export pi.toml", "--clear-timings"):
        assert run_in(tmp_path, f"targets show raspberry-pi-5 {words}") == 2
        assert "targets show host" in capsys.readouterr().err


@pytest.mark.usefixtures("cache")
def test_an_exported_profile_carries_what_was_timed(tmp_path, capsys):
    shown(tmp_path, "targets show host --export mine.toml", capsys)
    profile, host = load_target(tmp_path / "mine.toml"), load_target("host")
    assert (profile.name, profile.kind, profile.device) == ("mine", "cpu-class", host.device)
    dynamic = profile.kernel("MatMul", "dynamic", weight="int8")
    assert (dynamic.speedup_over_float, dynamic.evidence) == (2.2, "measured-on-target")
    assert "2 sizes, from 0.90 (1x384 * 384x384) to 3.50 (1x128x384 * 384x1536)" in dynamic.source
    conv = next(item for item in profile.kernels if item.name == "conv-static-u8s8")
    assert conv.speedup_over_float == 1.75  # between integers, as profiles have it
    before = {item.name: item for item in host.kernels}
    untimed = [item for item in profile.kernels if item.name == "gemm-static-u8s8"]
    assert untimed == [before["gemm-static-u8s8"]]
    assert run_in(tmp_path, "targets show host --export mine.toml") == 2  # never over an old file
    assert "exists already" in capsys.readouterr().err
    assert run_in(tmp_path, "targets show host --export mine.json") == 2
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_an_exported_profile_speaks_of_its_kernels_only(tmp_path, cache):
    """Whoever compiles with it has not timed the whole model on the target."""
    made = measured_profile(load_target("host"), TIMINGS, cache.device, name="mine")
    (tmp_path / "mine.toml").write_text(to_toml(made))
    profile = load_target(tmp_path / "mine.toml")
    assert choose_kernel(profile, "MatMul", "dynamic", None).evidence == "measured-on-target"
    text = "(float[N,S,64] x) => (float[N,S,64] y) { [m] y = MatMul(x, w) }"
    plan = case.plan_of(case.parse(text, {"w": case.random(0, 64, 64)}), profile)
    assert case.by_node(plan)["m"].evidence == "measured-on-target"


def test_timings_are_forgotten_on_demand(tmp_path, cache, capsys):
    text = shown(tmp_path, "targets show host --clear-timings", capsys)
    assert "No operator was timed here yet" in text
    assert not cache.path.exists()


def asked(words):
    return recipe_from(parse_arguments(["compile", "m.onnx", "--target", "host", *words.split()]))


def test_the_time_for_measuring_and_the_unmeasured_are_asked_for():
    assert (asked("").measure_seconds, asked("").allow_unmeasured) == (10, False)
    recipe = asked("--measure-seconds 0 --allow-unmeasured")
    assert (recipe.measure_seconds, recipe.allow_unmeasured) == (0, True)
    assert [asked(f"--preset {name}").measure_seconds for name in ("quick", "default", "extensive")] == [
        3,
        10,
        60,
    ]
