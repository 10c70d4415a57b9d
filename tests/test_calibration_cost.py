"""The memory bound of a calibration: how it is written, held, and what is said before the run."""

import calibration_case as case
import numpy as np
import pytest
from edgepress.calibration.collect import collect_ranges
from edgepress.calibration.cost import OBSERVER_BYTES, CalibrationCost
from edgepress.calibration.data import open_data
from edgepress.calibration.size import parse_size
from edgepress.graph.errors import DataError, RecipeError

WIDE = 30_000
CHAIN = f"""<ir_version: 10, opset_import: ["" : 20]>
g (float[N, {WIDE}] x) => (float[N, {WIDE}] y) {{ a = Neg (x)  b = Abs (a)  c = Relu (b)  y = Tanh (c) }}"""
BYTES = 4 * WIDE


@pytest.fixture
def data(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((5, WIDE)).astype("f4"))
    return open_data(str(tmp_path / "x.npy"), case.model_of(CHAIN).inputs)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MB", 512_000_000), ("1.5 GiB", 3 * 2**29), ("300000000", 300_000_000), ("64kib", 65536), ("7B", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "12 parsecs", "-1MB", "0", "0.1B", "1e9", "٣MB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RecipeError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(("together", "passes"), [(4, 1), (2, 2), (1, 4)])
def test_a_smaller_bound_takes_more_passes_and_finds_the_same(data, together, passes):
    names, told, steps = ["a", "b", "c", "y"], [], []
    free = collect_ranges(case.model_of(CHAIN), names, data)
    bound = len(names) * OBSERVER_BYTES + together * BYTES
    found = collect_ranges(
        case.model_of(CHAIN),
        names,
        data,
        memory_limit_bytes=bound,
        announce=told.append,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert {name: item.to_bytes() for name, item in found.items()} == {
        name: item.to_bytes() for name, item in free.items()
    }
    (cost,) = told
    assert (cost.passes, cost.samples) == (passes, 5)
    assert 0 < cost.memory_bytes <= bound
    assert cost.seconds > 0
    assert steps[-1] == (5 * passes, 5 * passes)


def test_one_tensor_that_does_not_fit_is_named(data):
    bound = 2 * OBSERVER_BYTES + BYTES - 1
    with pytest.raises(DataError, match="too small") as caught:
        collect_ranges(case.model_of(CHAIN), ["a", "b"], data, memory_limit_bytes=bound)
    assert "'a'" in caught.value.where
    assert "0.1 MB" in caught.value.why


def test_counts_that_do_not_fit_are_told(data):
    with pytest.raises(DataError, match="too small") as caught:
        collect_ranges(case.model_of(CHAIN), ["a", "b"], data, memory_limit_bytes=OBSERVER_BYTES)
    assert "counts of 2 tensors" in caught.value.why


def test_the_estimate_reads_well():
    cost = CalibrationCost(seconds=12.3, memory_bytes=84_000_000, passes=2, samples=512)
    assert str(cost) == "about 12 s and 84 MB, 2 passes over 512 samples"
    small = CalibrationCost(seconds=0.2, memory_bytes=1_500_000, passes=1, samples=3)
    assert str(small) == "less than 1 s and 1.5 MB, one pass over 3 samples"
