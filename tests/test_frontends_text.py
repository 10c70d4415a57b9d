"""TextEncoder: the same arrays as transformers' AutoTokenizer makes, and its limits."""

from __future__ import annotations

import json
import os
import string
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from edgepress.frontends.text import TextEncoder
from edgepress.graph.errors import DataError, ModelError, RuntimeUnavailable

tokenizers = pytest.importorskip("tokenizers")

AWKWARD = [
    "hello world",
    "",
    "   \n\t ",
    "Ünïcödé naïve İstanbul ﬁne",
    "日本語 中文 🎉👩‍👩‍👧 E=mc²",
    "a\x00b\u200bc\ufffd",
    "[MASK] hello [SEP] [PAD]",
    "hello world " * 300,
    "x" * 500,
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece_folder(folder: Path, **settings: object) -> Path:
    """A BERT tokenizer of single letters and a few words, as save_pretrained lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits + string.punctuation
    words = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "hello", "world", "中", "文"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens(SPECIAL)
    # What a file brings along is not what the model needs: fixed padding, another cut.
    tokenizer.enable_padding(length=7)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "BertTokenizer",
        "model_max_length": 40,
        "do_lower_case": True,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return folder


def byte_level_folder(folder: Path) -> Path:
    """A RoBERTa tokenizer with hardly any merges: padding id 1, no token types."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet, "he", "ll", "hell"]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens(words[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "RobertaTokenizer", "model_max_length": 1e30, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model = {"model_type": "roberta", "max_position_embeddings": 34, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(model))
    return folder


def reference(folder: Path, encoder: TextEncoder, texts: list[str], pairs: list[str] | None):
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    return auto(
        texts, pairs, padding=True, truncation=True, max_length=encoder.max_length, return_tensors="np"
    )


@pytest.mark.parametrize("build", [wordpiece_folder, byte_level_folder])
@pytest.mark.parametrize("paired", [False, True])
def test_equals_auto_tokenizer(tmp_path: Path, build, paired: bool) -> None:
    folder = build(tmp_path / "model")
    encoder = TextEncoder.load(folder)
    pairs = AWKWARD[::-1] if paired else None
    expected = reference(folder, encoder, AWKWARD, pairs)
    result = encoder.encode(AWKWARD, pairs)
    assert {"input_ids", "attention_mask"} <= set(expected)
    for name in expected:
        np.testing.assert_array_equal(result[name], expected[name], err_msg=name)
        assert result[name].dtype == np.int64


@pytest.mark.parametrize("paired", [False, True])
def test_equals_auto_tokenizer_on_minilm(paired: bool) -> None:
    place = os.environ.get("EDGEPRESS_MINILM")
    if not place or not Path(place, "tokenizer.json").is_file():
        pytest.skip("EDGEPRESS_MINILM does not name the model's folder")
    encoder = TextEncoder.load(Path(place))
    assert encoder.max_length == 256
    assert encoder.vocab_size == 30522
    pairs = AWKWARD[::-1] if paired else None
    expected = reference(Path(place), encoder, AWKWARD, pairs)
    result = encoder.encode(AWKWARD, pairs)
    for name in result:
        np.testing.assert_array_equal(result[name], expected[name], err_msg=name)


def test_pads_to_the_longest_of_the_batch_only(tmp_path: Path) -> None:
    encoder = TextEncoder.load(wordpiece_folder(tmp_path))
    arrays = encoder.encode(["hello", "hello world hello"])
    assert arrays["input_ids"].shape == (2, 5)
    assert arrays["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert arrays["input_ids"][0, 3:].tolist() == [0, 0]


def test_left_padding(tmp_path: Path) -> None:
    encoder = TextEncoder.load(wordpiece_folder(tmp_path, padding_side="left"))
    mask = encoder.encode(["hello", "hello world hello"])["attention_mask"]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_names_choose_the_arrays(tmp_path: Path) -> None:
    encoder = TextEncoder.load(wordpiece_folder(tmp_path))
    assert list(encoder.encode(["hello"], names=["attention_mask", "input_ids"])) == [
        "attention_mask",
        "input_ids",
    ]
    with pytest.raises(DataError, match="pixel_values") as caught:
        encoder.encode(["hello"], names=["pixel_values"])
    assert "npz" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("tokenizer_length", "positions", "sentence_length", "expected"),
    [
        (40, None, None, 40),
        (40, 32, None, 32),
        (40, 32, 16, 16),
        (10**30, None, None, 5),
        (1e30, 24, None, 24),
    ],
)
def test_max_length_is_the_smallest_limit(
    tmp_path: Path, tokenizer_length, positions, sentence_length, expected: int
) -> None:
    wordpiece_folder(tmp_path, model_max_length=tokenizer_length)
    if positions:
        config = {"model_type": "bert", "max_position_embeddings": positions}
        (tmp_path / "config.json").write_text(json.dumps(config))
    if sentence_length:
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": sentence_length}))
    encoder = TextEncoder.load(tmp_path)
    assert encoder.max_length == expected
    assert encoder.encode(["hello " * 100])["input_ids"].shape == (1, expected)


def test_positions_after_padding_are_not_all_usable(tmp_path: Path) -> None:
    assert TextEncoder.load(byte_level_folder(tmp_path)).max_length == 32


def test_file_and_folder_load_the_same(tmp_path: Path) -> None:
    folder = wordpiece_folder(tmp_path)
    by_file = TextEncoder.load(folder / "tokenizer.json")
    assert by_file.max_length == 40
    assert sorted(by_file.files) == ["tokenizer.json", "tokenizer_config.json"]


def test_lone_surrogate_is_replaced(tmp_path: Path) -> None:
    encoder = TextEncoder.load(wordpiece_folder(tmp_path))
    bad, replaced = encoder.encode(["hello \ud800"]), encoder.encode(["hello ?"])
    np.testing.assert_array_equal(bad["input_ids"], replaced["input_ids"])


@pytest.mark.parametrize(
    ("texts", "pairs", "message"),
    [
        ([], None, "no texts"),
        ("hello", None, "one text"),
        (["a"], ["b", "c"], "pairs do not match"),
        (["a", None], None, "not a string"),
    ],
)
def test_bad_texts(tmp_path: Path, texts, pairs, message: str) -> None:
    encoder = TextEncoder.load(wordpiece_folder(tmp_path))
    with pytest.raises(DataError, match=message):
        encoder.encode(texts, pairs)


def test_pair_that_cannot_be_cut(tmp_path: Path) -> None:
    encoder = TextEncoder.load(wordpiece_folder(tmp_path, model_max_length=3))
    assert encoder.encode(["hello world"])["input_ids"].shape == (1, 3)
    short = wordpiece_folder(tmp_path / "short", model_max_length=4)
    tokenizer = json.loads((short / "tokenizer.json").read_text())
    tokenizer["post_processor"]["pair"] += [tokenizer["post_processor"]["pair"][-1]] * 2
    (short / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="cannot be cut"):
        TextEncoder.load(short).encode(["hello"], ["world"])


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(st.text(max_size=80), min_size=1, max_size=4))
def test_any_text_gives_a_well_formed_batch(tmp_path_factory: pytest.TempPathFactory, texts) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-text"
    encoder = TextEncoder.load(folder if folder.exists() else wordpiece_folder(folder))
    arrays = encoder.encode(texts)
    mask = arrays["attention_mask"]
    assert mask.shape == arrays["input_ids"].shape == arrays["token_type_ids"].shape
    assert mask.shape[0] == len(texts)
    assert mask.sum(axis=1).max() == mask.shape[1] <= encoder.max_length
    assert ((arrays["input_ids"] >= 0) & (arrays["input_ids"] < encoder.vocab_size)).all()
    for row, text in enumerate(texts):
        alone = encoder.encode([text])["input_ids"][0]
        np.testing.assert_array_equal(arrays["input_ids"][row][mask[row] == 1], alone)


def test_no_padding_token(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = TextEncoder.load(tmp_path)
    assert encoder.encode(["a a", "a b"])["input_ids"].tolist() == [[0, 0], [0, 1]]
    with pytest.raises(DataError, match="one batch"):
        encoder.encode(["a", "a a"])


def test_missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        TextEncoder.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        TextEncoder.load(tmp_path)
    folder = wordpiece_folder(tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nonsense"}}')
    with pytest.raises(ModelError, match="damaged or of another format"):
        TextEncoder.load(folder)
    wordpiece_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text("[1, 2]")
    with pytest.raises(ModelError, match="JSON object"):
        TextEncoder.load(folder)
    (folder / "tokenizer_config.json").write_text('{"a": ')
    with pytest.raises(ModelError, match="not valid JSON"):
        TextEncoder.load(folder)
    wordpiece_folder(tmp_path, model_max_length=2)
    with pytest.raises(ModelError, match="limits do not fit") as caught:
        TextEncoder.load(folder)
    assert "2 special tokens" in str(caught.value.why)
    wordpiece_folder(tmp_path, truncation_side="middle")
    with pytest.raises(ModelError, match="limits do not fit"):
        TextEncoder.load(folder)


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = wordpiece_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(RuntimeUnavailable, match="tokenizers") as caught:
        TextEncoder.load(folder)
    assert "pip install 'edgepress[text]'" in str(caught.value.remedy)


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    folder = wordpiece_folder(tmp_path / "model")
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(ModelError, match="outside its folder"):
        TextEncoder.load(folder)


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    wordpiece_folder(blobs)
    snapshot.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert TextEncoder.load(snapshot).max_length == 40
