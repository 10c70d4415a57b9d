"""The timings cache: what is kept comes back, damaged files are empty, processes lose nothing."""

import json
import subprocess
import sys

import msgspec
import pytest
from edgepress.runtimes.device import DeviceFeatures
from edgepress.runtimes.timing_cache import (
    OperatorTiming,
    TimingCache,
    TimingKey,
    clear_timings,
    ratio_of,
)

DEVICE = DeviceFeatures(
    architecture="x86-64", core="Some Core (TM) 3", isa_features=("avx2",), runtime="onnxruntime",
    runtime_version="1.31.1",
)  # fmt: skip


def timing(form="dynamic", *, size=64, ratios=(2.0, 2.5, 1.5), threads=1):
    key = TimingKey(operator="MatMul", form=form, shapes=((1, size), (size, size)), threads=threads)
    return OperatorTiming(key=key, p50_ms=0.5, float_p50_ms=1.0, pair_ratios=ratios)


def test_what_was_added_comes_back_in_another_process_s_eyes(tmp_path):
    cache = TimingCache(tmp_path, DEVICE)
    assert cache.timings() == ()
    assert cache.add([timing(), timing("weight-only")])
    again = TimingCache(tmp_path, DEVICE)
    assert again.timings() == (timing(), timing("weight-only"))
    assert again.get(timing().key) == timing()
    assert again.get(timing(threads=2).key) is None
    assert again.get(timing(size=65).key) is None


def test_a_newer_timing_replaces_the_older(tmp_path):
    cache = TimingCache(tmp_path, DEVICE)
    cache.add([timing()])
    newer = msgspec.structs.replace(timing(), p50_ms=0.25)
    cache.add([newer])
    assert cache.timings() == TimingCache(tmp_path, DEVICE).timings() == (newer,)


def test_other_processors_and_runtimes_have_files_of_their_own(tmp_path):
    TimingCache(tmp_path, DEVICE).add([timing()])
    for changed in (
        {"runtime_version": "1.32.0"},
        {"isa_features": ("avx2", "avx512f")},
        {"core": "Some Core TM 3"},
    ):
        other = TimingCache(tmp_path, msgspec.structs.replace(DEVICE, **changed))
        assert other.timings() == ()
        assert other.path.name.startswith(
            f"onnxruntime-{changed.get('runtime_version', '1.31.1')}-some-core-"
        )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: "",
        lambda text: text[: len(text) // 2],
        lambda _: "[1, 2",
        lambda text: text.replace('"p50_ms": 0.5', '"p50_ms": -1.0'),
        lambda text: text.replace('"p50_ms": 0.5', '"p50_ms": "fast"'),
        lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
        lambda text: text.replace('"schema_version": 1', '"schema_version": 1, "more": 2'),
        lambda text: text.replace("Some Core", "Same Core"),
        lambda text: "\udcff".join(text).encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
)
def test_a_damaged_file_counts_as_empty_and_is_replaced(tmp_path, spoil):
    cache = TimingCache(tmp_path, DEVICE)
    cache.add([timing()])
    cache.path.write_text(spoil(cache.path.read_text()), encoding="utf-8")
    spoiled = TimingCache(tmp_path, DEVICE)
    assert spoiled.timings() == ()
    assert spoiled.add([timing("weight-only")])
    assert TimingCache(tmp_path, DEVICE).timings() == (timing("weight-only"),)


def test_a_file_beyond_all_bounds_is_not_read(tmp_path):
    cache = TimingCache(tmp_path, DEVICE)
    cache.add([timing()])
    with cache.path.open("ab") as file:
        file.write(b" " * (1 << 24))
    assert TimingCache(tmp_path, DEVICE).timings() == ()


def test_the_file_is_plain_json_without_leftovers(tmp_path):
    cache = TimingCache(tmp_path, DEVICE)
    cache.add([timing()])
    document = json.loads(cache.path.read_text())
    assert document["device"]["core"] == DEVICE.core
    assert document["timings"][0]["key"]["shapes"] == [[1, 64], [64, 64]]
    names = {path.name for path in cache.path.parent.iterdir()}
    assert names == {cache.path.name, f"{cache.path.name}.lock"}


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_runtimes_timing_cache import DEVICE, timing
from edgepress.runtimes.timing_cache import TimingCache
cache = TimingCache(Path(sys.argv[1]), DEVICE)
for size in range(40):
    cache.add([timing(size=int(sys.argv[2]) + size)])
"""


def test_two_processes_at_once_lose_nothing(tmp_path):
    here = __file__.rpartition("/")[0]
    running = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), start, here])
        for start in ("100", "200")
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    sizes = {item.key.shapes[0][1] for item in TimingCache(tmp_path, DEVICE).timings()}
    assert sizes == {*range(100, 140), *range(200, 240)}


def test_a_place_that_cannot_be_written_only_keeps_nothing(tmp_path):
    (tmp_path / "timings").write_text("a file where the folder should be")
    cache = TimingCache(tmp_path, DEVICE)
    assert cache.add([timing()]) is False
    assert cache.timings() == (timing(),)


def test_the_oldest_go_when_there_are_too_many(tmp_path):
    cache = TimingCache(tmp_path, DEVICE)
    cache.add([timing(size=size) for size in range(1, 5001)])
    kept = TimingCache(tmp_path, DEVICE).timings()
    assert len(kept) == 4096
    assert kept[-1] == timing(size=5000)


def test_clearing_removes_the_files_of_all_processors(tmp_path):
    other = msgspec.structs.replace(DEVICE, core="other")
    for device in (DEVICE, other):
        TimingCache(tmp_path, device).add([timing()])
    assert len(clear_timings(tmp_path)) == 2
    assert TimingCache(tmp_path, DEVICE).timings() == ()
    assert clear_timings(tmp_path / "absent") == []


@pytest.mark.parametrize("changed", [{"p50_ms": 0.0}, {"float_p50_ms": float("nan")}, {"pair_ratios": ()}])
def test_a_timing_has_figures_above_zero(changed):
    with pytest.raises(ValueError, match="above zero"):
        msgspec.structs.replace(timing(), **changed)


def test_ratios_are_summed_up_by_their_median():
    against = ratio_of([2.0, 2.5, 1.5], "float", "dynamic")
    assert (against.ratio, against.low, against.high) == (2.0, 1.5, 2.5)
    assert timing().comparison == against
