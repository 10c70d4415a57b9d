"""Hugging Face datasets, from local folders of data files: columns, splits, labels, names, refusals."""

from __future__ import annotations

import json
import sys

import calibration_case as case
import numpy as np
import pytest
from edgepress.calibration.data import open_data
from edgepress.calibration.hub_datasets import DEFAULT_SAMPLES, parse_reference
from edgepress.graph.errors import DataError, NotSupported, RuntimeUnavailable
from edgepress.graph.model import TensorSpec

IMAGES = (TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 16, 16)),)


def open_hub(source, inputs=case.TEXT, **options):
    pytest.importorskip("datasets")
    return open_data(source, inputs, encoder=options.pop("encoder", case.WordEncoder()), **options)


def rows_of(folder, split, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"hf:{folder}"


def encoded(*texts):
    return sorted(tuple(case.WordEncoder().encode([text])["input_ids"][0].tolist()) for text in texts)


def ids(data):
    return sorted(tuple(sample["input_ids"][0].tolist()) for sample in data)


@pytest.mark.parametrize(
    ("text", "name", "revision", "parts", "columns"),
    [
        ("hf:imdb", "imdb", None, (), {}),
        ("hf:nyu-mll/glue:mrpc:train", "nyu-mll/glue", None, ("mrpc", "train"), {}),
        ("hf:a/b@v1.0::test", "a/b", "v1.0", ("", "test"), {}),
        ("hf:./data,text=body,label=stars", "./data", None, (), {"text": "body", "label": "stars"}),
        ("hf:a/b:c, text = x , text_pair=y,score=z", "a/b", None, ("c",),
         {"text": "x", "text_pair": "y", "score": "z"}),
    ],
)  # fmt: skip
def test_references(text, name, revision, parts, columns):
    found = parse_reference(text)
    assert (found.name, found.revision, found.parts) == (name, revision, parts)
    given = {role: getattr(found.columns, role) for role in ("text", "text_pair", "label", "score", "image")}
    assert {role: column for role, column in given.items() if column} == columns


@pytest.mark.parametrize(
    "text", ["hf:", "hf:a:b:c:d", "hf:a,text", "hf:a,body=text", "hf:a,text=", "hf:a,text=b,text=c"]
)
def test_malformed_references_are_refused(text):
    with pytest.raises(DataError, match="not understood") as caught:
        parse_reference(text)
    assert "hf:NAME" in caught.value.remedy


def test_texts_with_labels_and_splits(tmp_path):
    rows_of(tmp_path / "d", "validation", [{"text": "v", "label": 1}])
    source = rows_of(tmp_path / "d", "train", [{"text": f"one {i}", "label": i % 3} for i in range(9)])
    data = open_hub(source)
    assert ids(data) == encoded(*(f"one {i}" for i in range(9)))
    assert sorted(data.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (data.name, data.origin) == ("hf:d:train", "real")
    assert str(tmp_path) not in " ".join((data.name, *data.notes))
    for other in (f"{source}:validation", f"{source}::validation", f"{source}:default:validation"):
        assert ids(open_hub(other)) == encoded("v")


def test_a_label_stays_with_its_text_and_the_digest_with_the_seed(tmp_path):
    source = rows_of(tmp_path / "d", "train", [{"text": "w " * (i + 1), "label": i} for i in range(12)])
    data = open_hub(source, seed=3)
    lengths = [int(sample["attention_mask"].sum()) - 3 for sample in data]
    assert lengths == data.labels.tolist()
    assert lengths != sorted(lengths)
    assert open_hub(source, seed=3).digest == data.digest
    few = open_hub(source, samples=4, seed=3)
    assert len(few) == 4
    assert few.digest == open_hub(source, samples=4, seed=3).digest != data.digest


def test_the_number_of_rows_is_bounded(tmp_path):
    source = rows_of(tmp_path / "d", "train", [{"text": f"t {i}"} for i in range(DEFAULT_SAMPLES + 40)])
    assert len(open_hub(source)) == DEFAULT_SAMPLES
    assert len(open_hub(source, samples=DEFAULT_SAMPLES + 10)) == DEFAULT_SAMPLES + 10


def test_columns_can_be_chosen(tmp_path):
    rows = [{"body": f"b {i}", "title": f"t {i}", "stars": i % 2, "text": "no"} for i in range(4)]
    source = rows_of(tmp_path / "d", "train", rows)
    data = open_hub(f"{source},text=title,text_pair=body,label=stars")
    joined = case.WordEncoder().encode([f"t {i}" for i in range(4)], [f"b {i}" for i in range(4)])
    assert ids(data) == sorted(map(tuple, joined["input_ids"].tolist()))
    assert sorted(data.labels.tolist()) == [0, 0, 1, 1]
    assert ids(open_hub(f"{source},text=body")) == encoded("b 0", "b 1", "b 2", "b 3")


def test_scored_pairs(tmp_path):
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i / 2} for i in range(3)]
    source = rows_of(tmp_path / "d", "train", rows)
    data = open_hub(f"{source},text=sentence1,text_pair=sentence2,score=label")
    assert len(data) == 6
    assert sorted(data.pairs.score.tolist()) == [0, 0.5, 1]
    assert data.labels is None
    assert open_hub(source).pairs is None


def test_secret_labels_and_missing_texts_are_noted(tmp_path):
    rows = [{"text": "a", "label": -1}, {"text": None, "label": -1}, {"text": "c", "label": -1}]
    data = open_hub(rows_of(tmp_path / "d", "test", rows) + ":test")
    assert data.labels is None
    assert ids(data) == encoded("a", "c")
    notes = " ".join(data.notes)
    assert "without a label" in notes
    assert "1 rows without a text" in notes


def test_parquet_with_class_names_goes_by_the_models_numbers(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b b"], "label": [0, 1]}, features=features)
    (tmp_path / "d").mkdir()
    made.to_parquet(tmp_path / "d" / "train.parquet")
    data = open_hub(f"hf:{tmp_path / 'd'}", classes=("POS", "NEG"))
    by_length = {
        int(sample["attention_mask"].sum()): label for sample, label in zip(data, data.labels, strict=True)
    }
    assert by_length == {3: 1, 4: 0}


def pictures(folder):
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(("cat", "dog")):
        (folder / "train" / name).mkdir(parents=True)
        pixels = np.full((16, 16, 3), 51 * (number + 1), np.uint8)
        image.fromarray(pixels).save(folder / "train" / name / "0.png")
    config = {"do_resize": True, "size": {"height": 16, "width": 16}, "do_normalize": False}
    (folder.parent / "preprocessor_config.json").write_text(json.dumps(config))
    return f"hf:{folder}", folder.parent / "preprocessor_config.json"


def test_images_are_prepared_as_from_a_folder(tmp_path):
    source, preprocessor = pictures(tmp_path / "pets")
    data = open_hub(source, IMAGES, preprocessor=preprocessor, classes=("dog", "cat"))
    labelled = zip(data, data.labels, strict=True)
    found = {round(float(sample["pixel_values"].mean()), 3): int(label) for sample, label in labelled}
    assert found == {0.2: 1, 0.4: 0}
    from_folder = open_data(str(tmp_path / "pets" / "train"), IMAGES, preprocessor=preprocessor)
    assert sorted(data.contents) == sorted(from_folder.contents)


def test_images_inside_parquet_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    _, preprocessor = pictures(tmp_path / "pets")
    columns = {"image": [image.open(tmp_path / "pets" / "train" / "dog" / "0.png")] * 2, "label": [0, 1]}
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "d" / "train.parquet")
    data = open_hub(f"hf:{tmp_path / 'd'}", IMAGES, preprocessor=preprocessor)
    assert [round(float(sample["pixel_values"].mean()), 3) for sample in data] == [0.4, 0.4]
    assert sorted(data.labels.tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("suffix", "says"),
    [
        (":nope", "no config or split 'nope'"),
        (":nope:train", "no config 'nope'"),
        (":default:tain", "did you mean 'train'"),
        (",text=boddy", "did you mean 'body'"),
        (",text=number", "holds a int"),
        ("", "which column holds the texts"),
        (",text=body,score=number", "two texts"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, suffix, says):
    source = rows_of(tmp_path / "d", "train", [{"body": "b", "number": 1}])
    with pytest.raises(DataError) as caught:
        open_hub(source + suffix)
    assert says in str(caught.value)
    assert caught.value.remedy


def test_images_without_an_image_column_are_refused(tmp_path):
    source = rows_of(tmp_path / "d", "train", [{"body": "b"}])
    with pytest.raises(DataError, match="which column holds the images"):
        open_hub(source, IMAGES)


def test_several_splits_without_train_have_to_be_chosen_from(tmp_path):
    rows_of(tmp_path / "d", "validation", [{"text": "a"}])
    source = rows_of(tmp_path / "d", "test", [{"text": "a"}])
    with pytest.raises(DataError, match="several splits") as caught:
        open_hub(source)
    assert "'test'" in caught.value.why
    assert "'validation'" in caught.value.why


def test_a_dataset_with_a_script_is_refused_and_nothing_runs(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "d.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(NotSupported, match="code of its own"):
        open_hub(f"hf:{tmp_path / 'd'}")
    assert not (tmp_path / "ran").exists()


def test_formats_that_nobody_asked_for_are_refused(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    with pytest.raises(NotSupported, match="hdf5"):
        open_hub(f"hf:{tmp_path / 'd'}")


@pytest.mark.parametrize("content", [b"PAR1 and no more", b""])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.parquet").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        open_hub(f"hf:{tmp_path / 'd'}")


def hub_answers(monkeypatch, failure):
    """Let the hub's own client fail as it does for such names."""
    pytest.importorskip("datasets")
    import huggingface_hub

    def dataset_info(*_args, **_options):
        raise failure

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def failed(kind):
    pytest.importorskip("datasets")
    from huggingface_hub import errors

    class Failed(getattr(errors, kind)):
        def __init__(self):
            pass

    return Failed()


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("GatedRepoError", DataError, "gated"),
        ("RepositoryNotFoundError", DataError, "no such dataset"),
        ("RevisionNotFoundError", DataError, "no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, kind, error, says):
    hub_answers(monkeypatch, failed(kind))
    with pytest.raises(error, match=says):
        open_hub("hf:owner/name@v9")


def test_without_network_the_remedy_is_a_download_elsewhere(monkeypatch):
    hub_answers(monkeypatch, ConnectionError("no route"))
    with pytest.raises(RuntimeUnavailable) as caught:
        open_hub("hf:owner/name")
    assert "hf download owner/name --repo-type dataset" in caught.value.remedy
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeUnavailable, match="fetched") as caught:
        open_hub("hf:owner/name")
    assert "HF_HUB_OFFLINE" in caught.value.why


@pytest.mark.parametrize("name", ["../up", "/no/such/folder", "a/b/c", "owner/..", "-x y"])
def test_what_is_no_name_is_not_asked_for(monkeypatch, name):
    hub_answers(monkeypatch, AssertionError("asked"))
    with pytest.raises(DataError, match="no such dataset"):
        open_hub(f"hf:{name}")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeUnavailable) as caught:
        open_data("hf:imdb", case.TEXT, encoder=case.WordEncoder())
    assert "edgepress[datasets]" in caught.value.remedy
