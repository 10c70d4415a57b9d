"""Shards of statistics merge exactly: any split of the data, in any order and tree, gives the same ranges."""

import calibration_case as case
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from edgepress.calibration.collect import collect_ranges
from edgepress.calibration.data import open_data
from edgepress.calibration.histogram import Histogram
from edgepress.calibration.ranges import METHODS, RangeObserver
from edgepress.calibration.statistics_file import (
    merge_statistics,
    read_statistics,
    statistics_of,
    write_statistics,
)
from edgepress.graph.errors import DataError, OutputError
from edgepress.graph.scheme import Scheme
from hypothesis import given, settings

SCHEMES = (Scheme(dtype="uint8", symmetric=False), Scheme(dtype="int8", symmetric=True))
CHAIN = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 3] x) => (float[N, 3] y) { a = Neg (x)  y = Tanh (a) }"""

values = st.floats(-(2.0**99), 2.0**99, width=32) | st.sampled_from([0.0, -0.0, np.inf, -np.inf, 2.0**-130])
arrays = hnp.arrays(np.float32, st.integers(1, 40), elements=values)


def merged_in_some_tree(observers, random):
    waiting = list(observers)
    while len(waiting) > 1:
        random.shuffle(waiting)
        waiting.append(waiting.pop().merge(waiting.pop()))
    return waiting[0]


@settings(max_examples=25)
@given(st.lists(arrays, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_ranges_do_not_depend_on_split_order_or_tree(parts, random):
    together = RangeObserver("t")
    together.update(np.concatenate(parts))
    shards = []
    for part in parts:
        shards.append(RangeObserver("t"))
        shards[-1].update(part)
    merged = merged_in_some_tree(shards, random)
    assert merged.to_bytes() == together.to_bytes()
    if together.histogram.total:
        for scheme in SCHEMES:
            for method in METHODS:
                assert merged.choose(scheme, method) == together.choose(scheme, method)


@given(arrays)
def test_plain_data_holds_everything(part):
    histogram = Histogram()
    histogram.add(part, "t")
    text = msgspec.json.encode(histogram.state())
    again = Histogram.from_state(msgspec.json.decode(text, type=type(histogram.state())))
    assert again.to_bytes() == histogram.to_bytes()
    assert (again.minimum, again.maximum) == (histogram.minimum, histogram.maximum)


@pytest.fixture
def shards(tmp_path):
    x = np.random.default_rng(0).standard_normal((30, 3)).astype("f4")
    found = []
    for index, rows in enumerate((x[:7], x[7:20], x[20:], x)):
        np.save(tmp_path / f"{index}.npy", rows)
        data = open_data(str(tmp_path / f"{index}.npy"), case.VECTOR)
        model = case.model_of(CHAIN)
        found.append(statistics_of(collect_ranges(model, ["a", "x"], data), data, model.fingerprint()))
    return found


def test_shards_merge_to_what_all_of_the_data_gives(shards, tmp_path):
    a, b, c, everything = shards
    left, right = (merge_statistics(merge_statistics(a, b), c), merge_statistics(c, merge_statistics(b, a)))
    write_statistics(left, tmp_path / "left")
    write_statistics(right, tmp_path / "right")
    assert (tmp_path / "left").read_bytes() == (tmp_path / "right").read_bytes()
    again = read_statistics(tmp_path / "left")
    assert again == left
    assert sum(shard.samples for shard in again.shards) == 30
    assert again.tensors == everything.tensors
    for name, observer in again.observers(method="mse").items():
        assert observer.limits(SCHEMES[0]) == everything.observers(method="mse")[name].limits(SCHEMES[0])


def test_what_does_not_belong_together_is_not_merged(shards):
    a, b, *_ = shards
    with pytest.raises(DataError, match="count twice"):
        merge_statistics(merge_statistics(a, b), a)
    with pytest.raises(DataError, match="different graphs"):
        merge_statistics(a, msgspec.structs.replace(b, model_sha256="0" * 64))
    with pytest.raises(DataError, match="1 tensors"):
        merge_statistics(a, msgspec.structs.replace(b, tensors={"x": b.tensors["x"]}))


@pytest.mark.parametrize(
    "change",
    [
        {"counts": [-1, 2]},
        {"first_bin": 10**6},
        {"exponent": 4000},
        {"minimum": None},
        {"minimum": 1e30, "maximum": 1e31},
        {"zeros": -1},
        {"counts": [2**62, 2**62]},
    ],
)
def test_damaged_statistics_are_refused(shards, tmp_path, change):
    state = msgspec.structs.replace(shards[0].tensors["a"], **change)
    broken = msgspec.structs.replace(shards[0], tensors={"a": state})
    write_statistics(broken, tmp_path / "s.json")
    with pytest.raises(DataError, match="damaged"):
        read_statistics(tmp_path / "s.json")


def test_files_that_are_no_statistics_are_refused(shards, tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_statistics(tmp_path / "none")
    (tmp_path / "s.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="holds no calibration statistics"):
        read_statistics(tmp_path / "s.json")
    write_statistics(msgspec.structs.replace(shards[0], schema_version=99), tmp_path / "s.json")
    with pytest.raises(DataError, match="schema version 99"):
        read_statistics(tmp_path / "s.json")
    with pytest.raises(OutputError):
        write_statistics(shards[0], tmp_path / "missing" / "s.json")
