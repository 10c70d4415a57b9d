"""What a MODEL argument may be, and what an .onnx file and the files beside it say about the task."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import onnx
import onnx.parser
import pytest
from edgepress.frontends.hub import is_hub_id
from edgepress.frontends.source import load_source
from edgepress.graph.errors import ModelError, NotSupported, RuntimeUnavailable

LINEAR = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[batch, 4] x) => (float[batch, 3] {output})
<float[4, 3] w = {{1,2,3,4,5,6,7,8,9,10,11,12}}, float[3] b = {{1,2,3}}>
{{ y = MatMul(x, w) {output} = {tail} }}
"""
ENCODER = """
<ir_version: 10, opset_import: ["" : 20]>
net (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask)
  => (float[batch, sequence, 2] {output})
<float[8, 2] table = {{1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}}, int64[1] last = {{-1}}>
{{
  rows = Gather(table, input_ids)
  wide = Unsqueeze(attention_mask, last)
  mask = Cast<to = 1>(wide)
  {output} = Mul(rows, mask)
}}
"""


def write(folder: Path, text: str, name: str = "model.onnx") -> str:
    path = folder / name
    onnx.save(onnx.parser.parse_model(text), path)
    return str(path)


def linear(folder: Path, output: str = "y2", tail: str = "Add(y, b)") -> str:
    return write(folder, LINEAR.format(output=output, tail=tail))


def encoder(folder: Path, output: str = "hidden") -> str:
    return write(folder, ENCODER.format(output=output))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "reference",
    [
        "model.onnx",
        "./owner/name",
        "../name",
        "~/name",
        "~nobody-of-this-name/model",
        "/nowhere/name",
        "owner/name/more",
        "owner/name.onnx",
        "owner/model.safetensors",
        "name",
        "owner/",
        "/",
        "owner\\name",
        "owner/na me",
        "owner/..",
        "here/typo",
        "x" * 5000,
        "nul\0byte",
        "",
    ],
)
def test_what_is_no_hub_id_is_never_looked_up(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load_source(reference)
    assert time.monotonic() - started < 1
    assert caught.value.remedy


@pytest.mark.parametrize(
    "reference", ["sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-base-en-v1.5", "a/b", "0x/y_z"]
)
def test_hub_ids(reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(reference)


def test_near_names_are_offered(tmp_path: Path) -> None:
    linear(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_source(str(tmp_path / "modle.onnx"))
    assert "did you mean" in str(caught.value.remedy)
    assert "model.onnx" in str(caught.value.remedy)


def test_offline_hub_id_is_answered_from_the_cache_only(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(RuntimeUnavailable) as caught:
        load_source("nobody/nothing", cache_folder=tmp_path, offline=True)
    assert "hf download nobody/nothing" in str(caught.value.remedy)
    snapshot = tmp_path / "hub" / "models--nobody--nothing" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    refs = tmp_path / "hub" / "models--nobody--nothing" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    with pytest.raises(RuntimeUnavailable):
        load_source("nobody/nothing", cache_folder=tmp_path, offline=True)
    config = {"model_type": "bert", "architectures": ["BertForPreTraining"]}
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(NotSupported, match="BertForPreTraining"):
        load_source("nobody/nothing", cache_folder=tmp_path, offline=True)
    (snapshot / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "code.Net"}}))
    with pytest.raises(NotSupported, match="own Python code"):
        load_source("nobody/nothing", cache_folder=tmp_path, offline=True, trust_code=True)


def test_unreachable_hub_is_reported_quickly(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    code = (
        "import sys, time, pathlib\n"
        "from edgepress.frontends.hub import fetch\n"
        "from edgepress.graph.errors import RuntimeUnavailable\n"
        "import huggingface_hub.hf_api  # not part of the time\n"
        "start = time.monotonic()\n"
        "try:\n    fetch('nobody/nothing', cache_folder=pathlib.Path(sys.argv[1]), offline=False)\n"
        "except RuntimeUnavailable as error:\n    print(error.why, time.monotonic() - start < 6)\n"
    )
    with socket.socket() as held:  # bound but not listening: the connection is refused
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "NO_PROXY": "127.0.0.1"}
        environment.pop("HF_HUB_OFFLINE", None)
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert "cannot be reached" in result.stdout
    assert result.stdout.strip().endswith("True")
    assert result.stderr == ""


def test_onnx_file(tmp_path: Path) -> None:
    source = load_source(linear(tmp_path))
    assert source.model.origin.kind == "onnx"
    assert source.model.task.kind == "classification"
    assert source.encoder is None
    assert source.files == {}
    assert "opset 20" in source.baseline_note


def test_folder_with_one_onnx_file(tmp_path: Path) -> None:
    linear(tmp_path)
    assert load_source(str(tmp_path)).model.origin.name == "model.onnx"
    shutil.copy(tmp_path / "model.onnx", tmp_path / "other.onnx")
    with pytest.raises(ModelError, match="several") as caught:
        load_source(str(tmp_path))
    assert "other.onnx" in str(caught.value.why)


@pytest.mark.parametrize(
    ("output", "tail", "kind"),
    [
        ("y2", "Add(y, b)", "classification"),
        ("y2", "Softmax(y)", "classification"),
        ("logits", "Relu(y)", "classification"),
        ("probabilities", "Relu(y)", "classification"),
        ("y2", "Relu(y)", "embedding"),
        ("y2", "Add(y, y)", "embedding"),
        ("sentence_embedding", "Add(y, b)", "embedding"),
    ],
)
def test_task_of_a_flat_output(tmp_path: Path, output: str, tail: str, kind: str) -> None:
    task = load_source(linear(tmp_path, output, tail)).model.task
    assert (task.kind, task.pooling, task.classes) == (kind, "none", ())


def test_classes_beside_the_file(tmp_path: Path) -> None:
    path = linear(tmp_path, "y2", "Relu(y)")
    (tmp_path / "labels.txt").write_text("cat\ndog\n\nbird\n")
    task = load_source(path).model.task
    assert task.kind == "classification"
    assert task.classes == ("cat", "dog", "bird")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")  # two names for three outputs: of another model
    assert load_source(path).model.task.kind == "embedding"


def test_task_of_an_encoder(tmp_path: Path) -> None:
    path = encoder(tmp_path)
    assert load_source(path).model.task.pooling == "mean"
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    source = load_source(path)
    assert source.model.task.pooling == "cls"
    assert source.files == {"1_Pooling/config.json": pooling}
    pooling.write_text(json.dumps({"pooling_mode": "mean"}))
    assert load_source(path).model.task.pooling == "mean"
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    assert load_source(path).model.task.pooling == "none"
    pooling.write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_source(path)


def test_pooling_path_may_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"pooling_mode_cls_token": true}')
    folder = tmp_path / "model"
    folder.mkdir()
    modules = [{"type": "sentence_transformers.models.Pooling", "path": ".."}]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="outside its folder"):
        load_source(encoder(folder))


def test_token_classifier(tmp_path: Path) -> None:
    assert load_source(encoder(tmp_path, "logits")).model.task.kind == "token-classification"
    path = encoder(tmp_path)
    config = {"architectures": ["BertForTokenClassification"], "id2label": {"1": "B", "0": "O"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    task = load_source(path).model.task
    assert (task.kind, task.classes) == ("token-classification", ("O", "B"))


def test_config_that_does_not_fit_the_graph_is_not_believed(tmp_path: Path) -> None:
    path = encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    assert load_source(path).model.task.kind == "embedding"


def test_tokenizer_and_preprocessor_are_taken_along(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    other = tmp_path / "other"
    other.mkdir()
    path = encoder(tmp_path)
    for folder, token in ((tmp_path, "a"), (other, "b")):
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, token: 1}, unk_token="?"))
        made.save(str(folder / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    (other / "preprocessor_config.json").write_text('{"do_resize": true}')
    beside = load_source(path)
    assert beside.encoder is not None
    assert beside.encoder.encode(["a"])["input_ids"].tolist() == [[1]]
    assert beside.encoder.max_length == 7
    asked = load_source(path, tokenizer=str(other), preprocessor=str(other))
    assert asked.encoder is not None
    assert asked.encoder.encode(["a"])["input_ids"].tolist() == [[0]]
    # The other tokenizer must not be combined with the settings of the one beside the model.
    assert asked.files == {
        "preprocessor_config.json": other / "preprocessor_config.json",
        "tokenizer.json": other / "tokenizer.json",
    }
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 3}')
    limited = load_source(path, tokenizer=str(other)).encoder
    assert limited is not None
    assert limited.max_length == 3
    with pytest.raises(ModelError, match="tokenizer does not exist"):
        load_source(path, tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="preprocessor does not exist"):
        load_source(path, preprocessor=str(tmp_path / "nowhere"))


def test_fixed_sequence_axis(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = write(tmp_path, ENCODER.format(output="hidden").replace("sequence", "4"))
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "?"}')
    encode = load_source(path).encoder
    assert encode is not None
    assert encode.encode(["a", "a a a a a a"])["input_ids"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert encode.encode(["a"])["attention_mask"].tolist() == [[1, 0, 0, 0]]


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name in ("model.pt", "model.safetensors", "model"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ModelError, match="not a model that edgepress reads"):
            load_source(str(tmp_path / name))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="not a Hugging Face model"):
        load_source(str(empty))
