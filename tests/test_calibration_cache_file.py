"""The calibration cache as a file, and in a compile: read back, refused, used without data."""

import json
import os

import driver_case as case
import numpy as np
import pytest
from edgepress.calibration.cache_file import (
    CalibratedOn,
    CalibrationCache,
    channel_entries,
    range_entries,
    read_cache,
    require_current,
    write_cache,
)
from edgepress.compress.recipe import DriftLimit, Recipe
from edgepress.driver.compile import compile_model
from edgepress.export.verify import read_manifest
from edgepress.graph.errors import DataError, OutputError
from edgepress.graph.scheme import Scheme
from hypothesis import given
from hypothesis import strategies as st

DATA = CalibratedOn(name="d.npz", digest="1" * 64, origin="real", samples=7)
floats = st.floats(allow_nan=False, allow_infinity=False)
pairs = st.tuples(floats, floats).map(lambda pair: (min(pair), max(pair)))
channels = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5).map(
    lambda values: (np.array(values, np.float32), np.array(values, np.float32) + np.float32(1))
)


def cache(**changes):
    values = {"model": "m", "model_sha256": "0" * 64, "data": DATA, "method": "auto"}
    return CalibrationCache(**values | changes)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), pairs, max_size=4),
       st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), channels, max_size=3))  # fmt: skip
def test_what_is_written_is_read_back_exactly(tmp_path_factory, ranges, limits):
    path = tmp_path_factory.mktemp("cache") / "ranges.json"
    limits = {name: pair for name, pair in limits.items() if np.isfinite(pair[1]).all()}
    made = cache(
        activation=Scheme(dtype="uint8", symmetric=False),
        ranges=range_entries(
            {name.encode("utf-8", "replace").decode(): pair for name, pair in ranges.items()}
        ),
        channels=channel_entries(limits),
    )
    write_cache(made, path)
    found = read_cache(path)
    assert found == made
    assert found.range_pairs() == made.range_pairs()
    for name, pair in limits.items():
        for side, known in zip(pair, found.channel_arrays()[name], strict=True):
            np.testing.assert_array_equal(side, known)
    assert [item.name for item in path.parent.iterdir()] == ["ranges.json"]


def test_a_person_can_read_it(tmp_path):
    write_cache(cache(ranges=range_entries({"h": (-1.5, 2.0)})), tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["ranges"] == {"h": {"min": -1.5, "max": 2.0}}


@pytest.mark.parametrize(
    "text",
    ["", "{}", "nonsense", "[]", '{"format": "other"}', b"\xff\xfe"],
)
def test_what_is_no_cache_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match="no calibration cache"):
        read_cache(tmp_path / "c.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"ranges": {"h": {"min": 2, "max": 1}}},
        {"ranges": {"h": {"min": 1}}},
        {"channels": {"h": {"min": [1, 2], "max": [3]}}},
        {"surplus": 1},
        {"method": "guess"},
    ],
)
def test_wrong_entries_are_refused(tmp_path, changes):
    write_cache(cache(), tmp_path / "c.json")
    known = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps(known | changes))
    with pytest.raises(DataError, match="no calibration cache"):
        read_cache(tmp_path / "c.json")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_cache(cache(model="old"), tmp_path / "c.json")

    def full(_number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written"):
        write_cache(cache(model="new"), tmp_path / "c.json")
    assert read_cache(tmp_path / "c.json").model == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["c.json"]


HERE = {"model_sha256": "0" * 64, "data_digest": "1" * 64, "method": "auto", "versions": {"x": "1"}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_sha256": "2" * 64}, "another model"),
        ({"data_digest": "2" * 64}, "7 samples of d.npz"),
        ({"method": "minmax"}, "--calib-method auto"),
        ({"versions": {"x": "2"}}, "made with x 1"),
    ],
)
def test_a_cache_of_anything_else_is_refused(tmp_path, changes, says):
    known = cache(versions={"x": "1"})
    assert require_current(known, tmp_path, **HERE) is None
    with pytest.raises(DataError) as caught:
        require_current(known, tmp_path, **HERE | changes)
    assert says in caught.value.why
    assert "delete the file" in caught.value.remedy


def test_without_data_to_calibrate_anew_other_versions_are_only_noted(tmp_path):
    known = cache(versions={"x": "1"})
    note = require_current(known, tmp_path, **HERE | {"data_digest": None, "versions": {"x": "2"}})
    assert "x 1" in note


# --- in a compile ------------------------------------------------------------------------------

LOOSE = (DriftLimit(metric="l2", limit=0.5),)


def compiled(folder, out, quantization="static", model=None, **given):
    recipe = Recipe(target="raspberry-pi-4", quantization=quantization, skip=("benchmark",), max_drift=LOOSE)
    return compile_model(
        model or folder / "cnn.onnx",
        target="raspberry-pi-4",
        output=folder / out,
        calib_cache=folder / "ranges.json",
        recipe=recipe,
        **given,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, data, a cache, and the bundle that was made with it."""
    folder = tmp_path_factory.mktemp("cached")
    case.cnn(folder / "cnn.onnx")
    images = np.random.default_rng(0).standard_normal((20, 3, 16, 16)).astype(np.float32)
    np.savez(folder / "images.npz", image=images)
    np.savez(folder / "eval.npz", image=-images[:6])
    compiled(folder, "first", calib=str(folder / "images.npz"))
    return folder


def test_a_second_compile_does_not_calibrate(home, monkeypatch):
    written = (home / "ranges.json").read_bytes()
    monkeypatch.setattr("edgepress.driver.observing.collect_ranges", None)
    result = compiled(home, "second", calib=str(home / "images.npz"))
    assert result.drift is not None
    assert (home / "second" / "model.onnx").read_bytes() == (home / "first" / "model.onnx").read_bytes()
    assert (home / "ranges.json").read_bytes() == written


def test_a_cache_alone_is_enough_and_drift_is_said_not_to_be_measured(home):
    result = compiled(home, "alone")
    assert result.drift is None
    assert any("drift is not measured" in note for note in result.notes)
    assert not (home / "alone" / "drift.json").exists()
    assert (home / "alone" / "model.onnx").read_bytes() == (home / "first" / "model.onnx").read_bytes()
    (record,) = read_manifest(home / "alone").data
    assert (record.name, record.split) == ("images.npz", "calibrate")
    assert record.samples == json.loads((home / "ranges.json").read_text())["data"]["samples"]


def test_a_cache_with_evaluation_data_measures_drift(home):
    result = compiled(home, "measured", eval_data=str(home / "eval.npz"))
    assert result.drift is not None
    assert result.drift.samples == 6
    assert {record.split for record in read_manifest(home / "measured").data} == {"calibrate", "evaluate"}


def test_ranges_that_a_person_changed_are_used(home, tmp_path):
    known = json.loads((home / "ranges.json").read_text())
    known["ranges"]["image"] = {"min": -100.0, "max": 100.0}
    for name in ("cnn.onnx", "images.npz"):
        (tmp_path / name).write_bytes((home / name).read_bytes())
    (tmp_path / "ranges.json").write_text(json.dumps(known))
    wide = compiled(tmp_path, "wide", eval_data=str(tmp_path / "images.npz"))
    narrow = compiled(home, "narrow", eval_data=str(home / "eval.npz"))
    assert wide.drift.l2 > 5 * narrow.drift.l2


def test_generated_ranges_stamp_what_is_made_of_them(home, tmp_path):
    known = json.loads((home / "ranges.json").read_text())
    known["data"]["origin"] = "generated"
    (tmp_path / "cnn.onnx").write_bytes((home / "cnn.onnx").read_bytes())
    (tmp_path / "ranges.json").write_text(json.dumps(known))
    assert compiled(tmp_path, "out").stamps == ("data-free",)


def test_nothing_to_calibrate_writes_no_cache(home, tmp_path):
    (tmp_path / "cnn.onnx").write_bytes((home / "cnn.onnx").read_bytes())
    result = compile_model(
        tmp_path / "cnn.onnx",
        target="raspberry-pi-4",
        output=tmp_path / "out",
        calib=str(home / "images.npz"),
        calib_cache=tmp_path / "ranges.json",
        recipe=Recipe(target="raspberry-pi-4", precision="fp32", skip=("benchmark",)),
    )
    assert not (tmp_path / "ranges.json").exists()
    assert any("no calibration cache was written" in note for note in result.notes)
