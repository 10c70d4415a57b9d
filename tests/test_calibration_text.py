"""Text files as calibration data: columns, pairs, labels, lengths, malformed rows."""

from __future__ import annotations

import calibration_case as case
import numpy as np
import pytest
from edgepress.calibration.data import open_data, split_data
from edgepress.graph.errors import DataError
from edgepress.graph.model import TensorSpec

TEXT, WordEncoder = case.TEXT, case.WordEncoder

STS = "a\tb\tc\t{i}\t{score}\t{one}\t{two}"


def open_text(path, inputs=TEXT, **options):
    return open_data(str(path), inputs, encoder=options.pop("encoder", WordEncoder()), **options)


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def ids(data):
    return sorted(tuple(sample["input_ids"][0].tolist()) for sample in data)


def expected(*texts):
    return sorted(tuple(WordEncoder().encode([text])["input_ids"][0].tolist()) for text in texts)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("t.txt", ["one two", "", "  ", "three"]),
        ("t.jsonl", ['{"text": "one two"}', "", '"three"']),
        ("t.csv", ["text", '"one two"', "three"]),
        ("t.tsv", ["id\tsentence", "0\tone two", "1\tthree"]),
        ("bom.txt", ["\ufeffone two", "three"]),
    ],
)
def test_texts(tmp_path, name, lines):
    data = open_text(write(tmp_path / name, *lines))
    assert ids(data) == expected("one two", "three")
    assert set(next(iter(data))) == {"input_ids", "attention_mask"}


def test_quotes_stay_in_tab_separated_files(tmp_path):
    data = open_text(write(tmp_path / "t.tsv", "sentence\tlabel", 'he said "yes\t1', 'no" way\t0'))
    assert ids(data) == expected('he said "yes', 'no" way')
    assert sorted(data.labels.tolist()) == [0, 1]


def test_quoted_commas_and_newlines_in_csv(tmp_path):
    data = open_text(write(tmp_path / "t.csv", "label,text", '1,"one, two"', '0,"three\nfour"'))
    assert ids(data) == expected("one, two", "three\nfour")


def test_text_pairs_are_one_input(tmp_path):
    data = open_text(write(tmp_path / "t.jsonl", '{"text": "a", "text_pair": "b c", "label": 1}'))
    assert ids(data) == expected("a | b c")
    assert data.pairs is None
    data = open_text(write(tmp_path / "u.csv", "sentence1,sentence2,label", "a,b c,0"))
    assert ids(data) == expected("a | b c")


def test_scored_pairs_become_distinct_sentences(tmp_path):
    lines = ["sentence1,sentence2,score", "a,b,5", "b,c,2.5", "d,a,0"]
    data = open_text(write(tmp_path / "t.csv", *lines))
    assert len(data) == 4
    assert ids(data) == expected("a", "b", "c", "d")
    samples = [sample["input_ids"].tolist() for sample in data]
    found = {
        (str(samples[a]), str(samples[b]), score)
        for a, b, score in zip(data.pairs.first, data.pairs.second, data.pairs.score, strict=True)
    }
    one = {text: str([list(expected(text)[0])]) for text in "abcd"}
    assert found == {(one["a"], one["b"], 5.0), (one["b"], one["c"], 2.5), (one["d"], one["a"], 0.0)}


def test_sts_benchmark_layout_without_header(tmp_path):
    lines = [STS.format(i=i, score=i % 5, one=f"left {i}", two=f"right {i}") for i in range(10)]
    lines[3] += "\tsource\tsource"
    data = open_text(write(tmp_path / "sts-dev.csv", *lines))
    assert (len(data), len(data.pairs)) == (20, 10)
    assert len(open_text(tmp_path / "sts-dev.csv", samples=4).pairs) == 4


def test_split_keeps_connected_pairs_together(tmp_path):
    lines = ["sentence1\tsentence2\tscore"]
    lines += [f"s{i}\tt{i}\t{i % 6}" for i in range(40)] + [f"s{i}\tS{i + 1}\t3" for i in range(0, 40, 8)]
    data = open_text(write(tmp_path / "t.tsv", *lines))
    left, right = split_data(data, 0.5, 0)
    assert not set(left.identities) & set(right.identities)
    assert len(left.pairs) + len(right.pairs) == len(data.pairs)
    assert len(left) + len(right) == len(data)


def test_class_names_do_not_depend_on_what_is_drawn(tmp_path):
    lines = ["text,label", *[f"w{i},{'abc'[i % 3]}" for i in range(30)]]
    path = write(tmp_path / "t.csv", *lines)
    for seed in range(5):
        data = open_text(path, samples=1, seed=seed)
        word = next(iter(data))["input_ids"].tolist()
        index = next(i for i in range(30) if [list(expected(f"w{i}")[0])] == word)
        assert data.labels.tolist() == [index % 3]
    known = open_text(path, classes=("C", "B", "A"))
    assert known.class_names == ("C", "B", "A")
    assert np.bincount(known.labels).tolist() == [10, 10, 10]


def test_static_length_is_padded_with_the_tokenizers_own_padding_and_cut_with_its_end(tmp_path):
    fixed = tuple(TensorSpec(name=spec.name, dtype="int32", shape=(1, 5)) for spec in TEXT)
    data = open_text(write(tmp_path / "t.txt", "x", "one two three four five six"), inputs=fixed)
    rows = {tuple(s["attention_mask"][0].tolist()): s["input_ids"][0] for s in data}
    short, long = rows[1, 1, 1, 0, 0], rows[1, 1, 1, 1, 1]
    assert short[3:].tolist() == [9, 9]
    assert (long[0], long[-1], long.dtype) == (1, 2, np.int32)
    assert data.padding == "to 5 tokens (static)"


def test_texts_are_cut_at_the_deployed_length(tmp_path):
    data = open_text(write(tmp_path / "t.txt", "one two three four"), shapes={"input_ids": (1, 4)})
    assert next(iter(data))["input_ids"].shape == (1, 4)


def test_batches_of_texts_are_padded_to_their_longest(tmp_path):
    data = open_text(write(tmp_path / "t.txt", "a", "b c d", "e f"))
    feeds, count = next(data.batches(3))
    assert (feeds["input_ids"].shape, count) == ((3, 5), 3)
    assert data.padding == "to the longest of the batch"


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("t.txt", b"", "no samples"),
        ("t.txt", b"\xff\xfe\x00x", "UTF-8"),
        ("t.txt", b"a\x00b\n", "zero bytes"),
        ("t.jsonl", b'{"text": ', "row 1"),
        ("t.jsonl", b"[1]\n", "row 1"),
        ("t.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "row 2"),
        ("t.jsonl", b'{"text": 3}\n', "no text"),
        ("t.jsonl", b'{"text": "a", "label": [1]}\n', "label"),
        ("t.jsonl", b'{"text": "a", "label": 99999999999999999999}\n', "label"),
        ("t.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', "row 2"),
        ("t.jsonl", b'{"sentence1": "a", "score": 1}\n', "sentence2"),
        ("t.csv", b"a,b\n1,2\n", "no known columns"),
        ("t.csv", b"text,label\nx\n", "row 2"),
        ("t.csv", b'text\n"x\n', "row"),
        ("t.csv", b"sentence1,sentence2,score\na,b,high\n", "score"),
        ("t.csv", b"sentence1,sentence2,score\na,b,nan\n", "score"),
        ("t.tsv", b"text\tlabel\nx\t-1\n", "negative"),
    ],
)
def test_bad_text_is_a_data_error(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_text(tmp_path / name)
    assert word in str(caught.value)


def test_text_without_tokenizer(tmp_path):
    with pytest.raises(DataError, match="tokenizer") as caught:
        open_text(write(tmp_path / "t.txt", "a"), encoder=None)
    assert "--tokenizer" in str(caught.value)


def test_text_for_an_image_input(tmp_path):
    spec = (TensorSpec(name="pixels", dtype="float32", shape=("N", 3)),)
    with pytest.raises(DataError, match="pixels"):
        open_text(write(tmp_path / "t.txt", "a"), inputs=spec)
