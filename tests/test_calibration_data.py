"""Opening, drawing, splitting and refusing calibration data."""

from __future__ import annotations

import sys
import zipfile

import calibration_case as case
import numpy as np
import pytest
from edgepress.calibration.data import generated_data, open_data, require_disjoint, split_data
from edgepress.calibration.generated import resolve_shapes
from edgepress.calibration.stored import open_arrays
from edgepress.graph.errors import DataError, NotSupported
from edgepress.graph.model import TensorSpec
from edgepress.graph.tables import index_bounds
from hypothesis import given, settings
from hypothesis import strategies as st

TEXT, VECTOR, WordEncoder = case.TEXT, case.VECTOR, case.WordEncoder
IMAGE = (TensorSpec(name="input", dtype="float32", shape=("N", 3, 4, 5)),)


def rows_of(data, name="x"):
    return np.concatenate([sample[name] for sample in data])


def test_npz_gives_shuffled_samples_with_their_labels(tmp_path):
    x = np.arange(60, dtype=np.float32).reshape(20, 3)
    np.savez(tmp_path / "d.npz", x=x, labels=np.arange(20), extra=np.zeros(3))
    data = open_data(str(tmp_path / "d.npz"), VECTOR, samples=8, seed=3)
    got = rows_of(data)
    assert got.shape == (8, 3)
    assert got.dtype == np.float32
    assert (x[data.labels] == got).all()
    assert sorted(data.labels) != list(range(8))  # no prefix
    assert data.name == "d.npz"
    assert (data.origin, data.split) == ("real", "all")
    assert any("'extra'" in note for note in data.notes)
    assert (rows_of(data) == got).all()  # read again


def test_sorted_classes_are_all_drawn(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.random.rand(1000, 3).astype("f4"), labels=np.repeat(np.arange(10), 100))
    data = open_data(str(tmp_path / "d.npz"), VECTOR, samples=200, seed=0)
    assert (np.bincount(data.labels, minlength=10) > 5).all()


def test_digest_depends_on_content_not_on_order(tmp_path):
    x = np.random.default_rng(0).random((9, 3)).astype("f4")
    np.savez(tmp_path / "a.npz", x=x)
    np.savez_compressed(tmp_path / "b.npz", x=x[::-1])
    np.savez(tmp_path / "c.npz", x=x + 1)
    first, second, third = (open_data(str(tmp_path / f"{n}.npz"), VECTOR).digest for n in "abc")
    assert first == second != third


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_stored_rows_equal_numpy(tmp_path, save, order, monkeypatch):
    monkeypatch.setattr("edgepress.calibration.stored.IN_MEMORY_BYTES", 64)  # large members go to a file
    x = np.asarray(np.random.default_rng(1).random((7, 2, 3)), order=order).astype(">f8", order="K")
    save(tmp_path / "x.npz", x=x, y=np.float32(3))
    arrays = open_arrays(tmp_path / "x.npz")
    assert all((arrays["x"].row(i) == x[i]).all() for i in range(7))
    assert (arrays["x"].whole() == x).all()
    assert arrays["x"].row(0).dtype == np.dtype("float64")
    assert arrays["y"].whole() == 3


def test_lone_array_of_any_name_feeds_a_model_of_one_input(tmp_path):
    np.savez(tmp_path / "d.npz", pictures=np.zeros((2, 3), "f4"), labels=np.zeros(2, int))
    assert len(open_data(str(tmp_path / "d.npz"), VECTOR)) == 2
    np.save(tmp_path / "d.npy", np.zeros((4, 3), "f4"))
    assert len(open_data(str(tmp_path / "d.npy"), VECTOR)) == 4


def test_the_only_array_with_as_many_axes_feeds_a_model_of_one_input(tmp_path):
    np.savez(tmp_path / "d.npz", pictures=np.ones((2, 3), "f4"), classes=np.array(["a", "b", "c"]))
    data = open_data(str(tmp_path / "d.npz"), VECTOR)
    assert rows_of(data).tolist() == [[1, 1, 1]] * 2
    assert any("'classes'" in note for note in data.notes)
    np.savez(tmp_path / "e.npz", train=np.ones((2, 3), "f4"), test=np.ones((2, 3), "f4"))
    with pytest.raises(DataError, match="no data for input 'x'"):
        open_data(str(tmp_path / "e.npz"), VECTOR)


def test_rows_with_their_own_batch_axis_and_scalars(tmp_path):
    specs = (*VECTOR, TensorSpec(name="t", dtype="float32", shape=()))
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 1, 3), "f4"), t=np.arange(4, dtype="f4"))
    samples = list(open_data(str(tmp_path / "d.npz"), specs))
    assert {(s["x"].shape, s["t"].shape) for s in samples} == {((1, 3), ())}


@pytest.mark.parametrize(
    ("have", "want", "ok"),
    [
        (np.array([1, 2], np.int8), "int64", True),
        (np.array([1, 2**40]), "int32", False),
        (np.array([True, False]), "int64", True),
        (np.array([0.5, 0.25]), "float32", True),
        (np.array([0.5, 1e300]), "float32", False),
        (np.array([0.5], np.float16), "float32", True),
        (np.array([1, 2], np.uint8), "float32", False),
        (np.array([1.0, 2.0], np.float32), "int64", False),
        (np.array(["a", "b"]), "string", True),
    ],
)
def test_casts(tmp_path, have, want, ok):
    np.save(tmp_path / "x.npy", have)
    spec = (TensorSpec(name="x", dtype=want, shape=("N",)),)
    if ok:
        got = rows_of(open_data(str(tmp_path / "x.npy"), spec))
        assert sorted(got.tolist()) == sorted(have.tolist())
        assert want in {"string", got.dtype.name}
    else:
        with pytest.raises(DataError, match="x"):
            open_data(str(tmp_path / "x.npy"), spec)


def test_rounded_float64_is_said(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 3), 0.1))
    assert any("rounded" in note for note in open_data(str(tmp_path / "x.npy"), VECTOR).notes)


def test_float16_inputs_take_wider_floats_with_a_note_and_nothing_else(tmp_path):
    spec = (TensorSpec(name="x", dtype="float16", shape=("N", 3)),)
    np.save(tmp_path / "x.npy", np.full((2, 3), 0.1, np.float32))
    data = open_data(str(tmp_path / "x.npy"), spec)
    assert rows_of(data).dtype == np.float16
    np.testing.assert_array_equal(rows_of(data), np.full((2, 3), np.float16(0.1)))
    assert any("rounded to the input's narrower type" in note for note in data.notes)
    for values in (np.full((2, 3), 1e6, np.float32), np.ones((2, 3), np.uint8), np.ones((2, 3), np.int64)):
        np.save(tmp_path / "x.npy", values)
        with pytest.raises(DataError, match="'x'"):
            open_data(str(tmp_path / "x.npy"), spec)


def test_channels_last_bytes_are_refused_with_the_calls_to_make(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.zeros((6, 4, 5, 3), np.uint8))
    with pytest.raises(DataError) as caught:
        open_data(str(tmp_path / "d.npz"), IMAGE)
    text = str(caught.value)
    assert "transpose(0, 3, 1, 2)" in text
    assert "astype(np.float32)" in text
    assert "NHWC" in text


def test_missing_channel_axis_is_explained(tmp_path):
    np.save(tmp_path / "d.npy", np.zeros((6, 28, 28), "f4"))
    spec = (TensorSpec(name="x", dtype="float32", shape=(1, 1, 28, 28)),)
    with pytest.raises(DataError) as caught:
        open_data(str(tmp_path / "d.npy"), spec)
    assert "x[:, None]" in str(caught.value)


def bad_arrays(tmp_path):
    """Name -> (path, a word that the message must hold)."""
    cases = {}

    def put(name, word, **arrays):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        cases[name] = (tmp_path / f"{name}.npz", word)

    good = np.zeros((4, 3), "f4")
    put("names", "did you mean", xs=good, other=good)
    put("rank", "axes", x=np.zeros((4, 3, 1, 1), "f4"))
    put("static", "dimension", x=np.zeros((4, 5), "f4"))
    put("nan", "NaN", x=np.full((4, 3), np.nan, "f4"))
    put("inf", "NaN or infinite", x=np.full((4, 3), np.inf, "f4"))
    put("empty", "no samples", x=np.zeros((0, 3), "f4"))
    put("labels", "labels for 4 samples", x=good, labels=np.zeros(3, int))
    put("label_type", "labels are float64", x=good, labels=np.zeros(4))
    put("label_shape", "labels have shape", x=good, labels=np.zeros((4, 1), int))
    put("label_sign", "negative", x=good, labels=np.array([0, 1, -1, 0]))
    ragged = np.array([np.zeros(2), np.zeros(3)], object)
    np.savez(tmp_path / "pickle.npz", x=ragged)
    cases["pickle"] = (tmp_path / "pickle.npz", "pickled")
    np.save(tmp_path / "record.npy", np.zeros(3, [("a", "f4")]))
    cases["record"] = (tmp_path / "record.npy", "structured")
    whole = (tmp_path / "rank.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    cases["cut"] = (tmp_path / "cut.npz", "npz")
    np.save(tmp_path / "short.npy", good)
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-8])
    cases["short"] = (tmp_path / "short.npy", "truncated")
    (tmp_path / "magic.npy").write_bytes(b"not an array at all")
    cases["magic"] = (tmp_path / "magic.npy", "npy")
    cases["missing"] = (tmp_path / "nowhere.npz", "does not exist")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    cases["suffix"] = (tmp_path / "photo.jpg", "not read as data")
    (tmp_path / "hollow").mkdir()
    cases["hollow"] = (tmp_path / "hollow", "no .npy or .npz")
    with zipfile.ZipFile(tmp_path / "crc.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", (tmp_path / "magic.npy").read_bytes())
    cases["member"] = (tmp_path / "crc.npz", "npy")
    return cases


def test_every_bad_array_file_is_a_data_error_that_says_what(tmp_path):
    for name, (path, word) in bad_arrays(tmp_path).items():
        with pytest.raises(DataError) as caught:
            open_data(str(path), VECTOR)
        assert word in str(caught.value), (name, str(caught.value))
        assert str(tmp_path) not in str(caught.value) or name == "missing"


def test_misspelt_path_gets_a_near_name(tmp_path):
    (tmp_path / "calibration.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"calibration\.npz"):
        open_data(str(tmp_path / "calibratoin.npz"), VECTOR)


def test_zero_samples_asked_for(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 3), "f4"))
    with pytest.raises(DataError, match="0 samples"):
        open_data(str(tmp_path / "x.npy"), VECTOR, samples=0)


def test_folder_of_samples_and_batches(tmp_path):
    np.save(tmp_path / "a.npy", np.full((3,), 1, "f4"))
    np.save(tmp_path / "b.npy", np.arange(6, dtype="f4").reshape(2, 3))
    np.savez(tmp_path / "c.npz", x=np.full((1, 3), 9, "f4"))
    data = open_data(str(tmp_path), VECTOR)
    assert rows_of(data).tolist() == [[1, 1, 1], [0, 1, 2], [3, 4, 5], [9, 9, 9]]
    part = open_data(str(tmp_path), VECTOR, samples=2, seed=1)
    assert len(list(part)) == 2


def test_folder_per_class_gives_labels(tmp_path):
    for name, count in (("2", 1), ("10", 2)):
        (tmp_path / "n" / name).mkdir(parents=True)
        np.save(tmp_path / "n" / name / "s.npy", np.full((count, 3), int(name), "f4"))
    data = open_data(str(tmp_path / "n"), VECTOR)
    assert data.labels.tolist() == rows_of(data)[:, 0].tolist()
    for name, value in (("cat", 5), ("dog", 7)):
        (tmp_path / "w" / name).mkdir(parents=True)
        np.save(tmp_path / "w" / name / "s.npy", np.full((3,), value, "f4"))
    data = open_data(str(tmp_path / "w"), VECTOR)
    assert dict(zip(data.labels.tolist(), rows_of(data)[:, 0].tolist(), strict=True)) == {0: 5, 1: 7}
    assert data.class_names == ("cat", "dog")
    swapped = open_data(str(tmp_path / "w"), VECTOR, classes=("Dog", "Cat"))
    assert dict(zip(swapped.labels.tolist(), rows_of(swapped)[:, 0].tolist(), strict=True)) == {1: 5, 0: 7}


def test_many_files_need_few_descriptors(tmp_path):
    resource = pytest.importorskip("resource")
    for index in range(120):
        np.save(tmp_path / f"{index:03}.npy", np.full((3,), index, "f4"))
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, old[1]))
    try:
        assert len(list(open_data(str(tmp_path), VECTOR))) == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


@pytest.fixture
def generator_module(tmp_path, monkeypatch):
    (tmp_path / "edgepress_test_samples.py").write_text(
        "import numpy as np\n"
        "state = []\n"
        "def good():\n"
        "    for i in range(6):\n"
        "        yield {'x': np.full((3,), i, np.float32)}, i % 2\n"
        "def batched():\n"
        "    yield {'x': np.arange(6, dtype=np.float32).reshape(2, 3)}\n"
        "def unstable():\n"
        "    state.append(0)\n"
        "    yield {'x': np.full((3,), len(state), np.float32)}\n"
        "def failing():\n"
        "    yield {'x': np.zeros(3, np.float32)}\n"
        "    raise KeyError('pixels')\n"
        "def wrong():\n"
        "    yield [1, 2]\n"
        "def ragged():\n"
        "    yield {'x': [[1.0, 2.0, 3.0], [1.0]]}\n"
        "def objects():\n"
        "    yield {'x': {'a': 1}}\n"
        "def nothing():\n"
        "    return []\n"
    )
    monkeypatch.chdir(tmp_path)
    yield "edgepress_test_samples"
    sys.modules.pop("edgepress_test_samples", None)


def test_generator_function(generator_module):
    data = open_data(f"{generator_module}:good", VECTOR, samples=4, seed=2)
    assert rows_of(data)[:, 0].tolist() == sorted(rows_of(data)[:, 0].tolist())
    assert (rows_of(data)[:, 0] % 2 == data.labels).all()
    assert len(open_data(f"{generator_module}:batched", VECTOR)) == 2
    assert str(generator_module) in data.name


@pytest.mark.parametrize(
    ("function", "word"),
    [
        ("failing", "KeyError"),
        ("wrong", "yields a list"),
        ("nothing", "no samples"),
        ("ragged", "no array"),
        ("objects", "no array"),
        ("goood", "did you mean"),
    ],
)
def test_bad_generator(generator_module, function, word):
    with pytest.raises(DataError) as caught:
        open_data(f"{generator_module}:{function}", VECTOR)
    assert word in str(caught.value)


def test_generator_that_changes_between_passes_is_refused(generator_module):
    data = open_data(f"{generator_module}:unstable", VECTOR)
    with pytest.raises(DataError, match="second pass"):
        list(data)


def test_generator_of_a_missing_module():
    with pytest.raises(DataError, match="generator fails"):
        open_data("no_such_module_here:samples", VECTOR)


def test_batches_fill_up_a_fixed_batch(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(15, dtype="f4").reshape(5, 3))
    fixed = (TensorSpec(name="x", dtype="float32", shape=(2, 3)),)
    data = open_data(str(tmp_path / "x.npy"), fixed)
    assert data.static_batch == 2
    assert [(feeds["x"].shape, count) for feeds, count in data.batches(2)] == [((2, 3), 2)] * 2 + [
        ((2, 3), 1)
    ]
    free = open_data(str(tmp_path / "x.npy"), VECTOR)
    assert [(feeds["x"].shape, count) for feeds, count in free.batches(2)][-1] == ((1, 3), 1)


def test_samples_of_different_shapes_are_not_one_batch(tmp_path):
    spec = (TensorSpec(name="x", dtype="float32", shape=("N", "L")),)
    np.save(tmp_path / "a.npy", np.zeros((1, 3), "f4"))
    np.save(tmp_path / "b.npy", np.zeros((1, 4), "f4"))
    data = open_data(str(tmp_path), spec)
    assert data.largest_sample()["x"].shape == (1, 4)
    with pytest.raises(DataError, match="one batch"):
        list(data.batches(2))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 12), min_size=2, max_size=40),
    seed=st.integers(0, 5),
    fraction=st.sampled_from([0.1, 0.5, 0.8]),
)
def test_split_is_disjoint_complete_and_repeatable(tmp_path_factory, values, seed, fraction):
    path = tmp_path_factory.mktemp("split") / "x.npy"
    np.save(path, np.repeat(np.array(values, "f4")[:, None], 3, axis=1))
    data = open_data(str(path), VECTOR)
    if len(set(values)) == 1:
        with pytest.raises(DataError, match="cannot be split"):
            split_data(data, fraction, seed)
        return
    left, right = split_data(data, fraction, seed)
    assert (left.split, right.split) == ("calibrate", "evaluate")
    assert not set(left.identities) & set(right.identities)
    assert sorted([*rows_of(left)[:, 0], *rows_of(right)[:, 0]]) == sorted(values)
    again, _ = split_data(data, fraction, seed)
    assert again.digest == left.digest


def test_split_keeps_to_the_fraction(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((500, 3)).astype("f4"))
    left, right = split_data(open_data(str(tmp_path / "x.npy"), VECTOR), 0.8, 1)
    assert (len(left), len(right)) == (400, 100)
    assert any("split 400 calibrate / 100 evaluate" in note for note in left.notes)


def test_overlap_is_taken_out_of_calibration(tmp_path):
    (tmp_path / "calib.txt").write_text("One  text.\nanother text\nthird\n")
    (tmp_path / "eval.txt").write_text("one text.\nfourth\n")
    calib, held_out = (
        open_data(str(tmp_path / f"{name}.txt"), TEXT, encoder=WordEncoder()) for name in ("calib", "eval")
    )
    left, right, removed = require_disjoint(calib, held_out)
    assert (len(left), len(right), removed) == (2, 2, 1)
    assert any("1 samples" in note for note in left.notes)
    with pytest.raises(DataError, match="every calibration sample"):
        require_disjoint(held_out, held_out)


def test_generated_data_is_stamped_repeatable_and_in_range():
    specs = (
        *TEXT,
        TensorSpec(name="token_type_ids", dtype="int64", shape=("b", "s")),
        TensorSpec(name="pixels", dtype="float32", shape=("b", 2)),
    )
    shapes = {"input_ids": (1, 7)}
    data = generated_data(specs, shapes, 5, 3, vocab_size=11, ranges={"pixels": (2.0, 3.0)})
    first, again = list(data), list(generated_data(specs, shapes, 5, 3, vocab_size=11))
    assert data.origin == "generated"
    assert data.notes
    assert first[0]["input_ids"].shape == (1, 7)
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(first, again, strict=True))
    assert any((first[0]["input_ids"] != sample["input_ids"]).any() for sample in first[1:])
    for sample in first:
        assert 0 <= sample["input_ids"].min() <= sample["input_ids"].max() < 11
        assert (sample["attention_mask"] == 1).all()
        assert (sample["token_type_ids"] == 0).all()
        assert 2 <= sample["pixels"].min() <= sample["pixels"].max() <= 3


def test_generated_data_needs_sizes():
    with pytest.raises(DataError, match="dynamic axis") as caught:
        generated_data(TEXT, {}, 2)
    assert "--shape input_ids:" in str(caught.value)
    with pytest.raises(DataError, match="no input"):
        resolve_shapes(TEXT, {"input_idz": (1, 4)})
    with pytest.raises(DataError, match="does not fit"):
        resolve_shapes(VECTOR, {"x": (1, 4)})
    with pytest.raises(NotSupported, match="string"):
        generated_data((TensorSpec(name="s", dtype="string", shape=("N",)),), {}, 1)


def test_index_limits_follow_ids_to_their_table():
    ir = pytest.importorskip("onnx_ir")
    from edgepress.graph.model import Model, Origin

    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (int32[b, s] ids, float[b] x) => (float[b, s, 2] y, float[b] z)
    <float[5, 2] table = {0,1,2,3,4,5,6,7,8,9}>
    { wide = Cast <to: int = 7> (ids)  y = Gather (table, wide)  z = Identity (x) }"""
    model = Model(ir.from_onnx_text(text), origin=Origin(kind="memory", name="m"))
    assert index_bounds(model) == {"ids": 5}
