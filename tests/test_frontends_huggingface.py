"""Exports of tiny random models: right results, kept names, no traces, refused when they differ."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
from edgepress.frontends import export_check, torch_export
from edgepress.frontends.checkpoint import read_checkpoint
from edgepress.frontends.export_cache import ExportNote, cache_key
from edgepress.frontends.samples import samples_for
from edgepress.frontends.source import Source, load_source
from edgepress.graph.errors import ModelError, NotSupported, OutputError, RuntimeUnavailable
from edgepress.graph.save import to_bytes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
ort = pytest.importorskip("onnxruntime")

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}


def bert() -> object:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def distilbert() -> object:
    config = transformers.DistilBertConfig(
        vocab_size=60,
        dim=16,
        n_layers=1,
        n_heads=2,
        hidden_dim=24,
        max_position_embeddings=40,
        id2label={0: "bad", 1: "fair", 2: "good"},
    )
    return transformers.DistilBertForSequenceClassification(config).half()


def roberta() -> object:
    config = transformers.RobertaConfig(
        **SMALL | {"max_position_embeddings": 14}, pad_token_id=1, type_vocab_size=1, num_labels=5
    )
    return transformers.RobertaForTokenClassification(config)


BUILDERS = {"bert": bert, "distilbert": distilbert, "roberta": roberta}


def save(folder: Path, build) -> Path:
    """A model folder with random weights that are not close to symmetric or zero."""
    torch.manual_seed(7)
    module = build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float32).to(parameter.dtype) * 0.2)
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("huggingface")


@pytest.fixture(scope="session")
def exported(place: Path):
    """Folder and source of a builder's model, exported once a session into a shared cache."""
    made: dict[str, tuple[Path, Source]] = {}

    def get(name: str) -> tuple[Path, Source]:
        if name not in made:
            folder = save(place / name, BUILDERS[name])
            made[name] = folder, load_source(str(folder), cache_folder=place / "cache")
        return made[name]

    return get


def run(source: Source, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(to_bytes(source.model), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def batch(source: Source, size: int, length: int) -> dict[str, np.ndarray]:
    """Random tokens, each row padded to another length."""
    generator = np.random.default_rng(length)
    tokens = generator.integers(5, 60, (size, length))
    mask = (np.arange(length) < generator.integers(1, length + 1, (size, 1))).astype(np.int64)
    made = {
        "input_ids": np.where(mask == 1, tokens, 1),
        "attention_mask": mask,
        "token_type_ids": generator.integers(0, 2, (size, length)),
    }
    return {value.name: made[value.name] for value in source.model.inputs}


@pytest.mark.parametrize("name", BUILDERS)
def test_equals_torch_at_other_shapes(exported, name: str) -> None:
    folder, source = exported(name)
    module = getattr(transformers, source_class(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    for size, length in ((1, 1), (2, 8), (4, 12)):
        inputs = batch(source, size, length)
        with torch.no_grad():
            expected = module(**{key: torch.from_numpy(array) for key, array in inputs.items()})
        results = run(source, inputs)
        assert [value.name for value in source.model.outputs] == list(expected)
        for output, result in zip(expected.values(), results, strict=True):
            np.testing.assert_allclose(result, output.numpy(), rtol=1e-4, atol=2e-5)


def source_class(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["architectures"][0]


def test_interface_and_task(exported) -> None:
    expected = {
        "bert": (["input_ids", "attention_mask", "token_type_ids"], ["last_hidden_state", "pooler_output"]),
        "distilbert": (["input_ids", "attention_mask"], ["logits"]),
        "roberta": (["input_ids", "attention_mask"], ["logits"]),
    }
    for name, (inputs, outputs) in expected.items():
        model = exported(name)[1].model
        assert [value.name for value in model.inputs] == inputs
        assert [value.name for value in model.outputs] == outputs
        assert all(value.shape == ("batch", "sequence") for value in model.inputs)
        assert all(value.dtype == "int64" for value in model.inputs)
        assert model.outputs[0].shape is not None
        assert model.outputs[0].shape[0] == "batch"
        assert model.opset == 20
    tasks = {name: exported(name)[1].model.task for name in expected}
    assert (tasks["bert"].kind, tasks["bert"].pooling) == ("embedding", "mean")
    assert (tasks["distilbert"].kind, tasks["distilbert"].classes) == (
        "classification",
        ("bad", "fair", "good"),
    )
    assert (tasks["roberta"].kind, len(tasks["roberta"].classes)) == ("token-classification", 5)


def test_parameter_names_and_values_are_kept(exported) -> None:
    folder, source = exported("bert")
    module = transformers.BertModel.from_pretrained(folder)
    weights = source.model.graph.initializers
    for name, parameter in module.named_parameters():
        assert name in weights, name
        array, expected = weights[name].const_value.numpy(), parameter.detach().numpy()
        transposed = any(use.node.op_type == "MatMul" for use in weights[name].uses())  # as MatMul takes it
        np.testing.assert_array_equal(array.T if transposed else array, expected)
    assert weights["encoder.layer.0.intermediate.dense.weight"].shape.numpy() == (16, 24)
    assert not any(node.op_type in ("Constant", "Identity") for node in source.model.graph)


def test_nothing_of_the_machine_stays_in_the_model(exported, place: Path) -> None:
    for name in BUILDERS:
        data = to_bytes(exported(name)[1].model)
        for trace in (b"site-packages", b"stack_trace", b".py", str(place).encode(), b"pkg.torch"):
            assert trace not in data, trace


def test_baseline_note_and_origin(exported) -> None:
    folder, source = exported("distilbert")
    assert "eager attention, opset 20" in source.baseline_note
    assert f"torch {torch.__version__}" in source.baseline_note
    assert "F16 to F32" in source.baseline_note
    assert source.model.origin.name == "distilbert"
    assert set(source.model.origin.files) == {"config.json", "model.safetensors"}
    assert source.files == {"config.json": folder / "config.json"}
    assert "F16" not in exported("bert")[1].baseline_note


def test_same_fingerprint_in_another_process(exported) -> None:
    folder, source = exported("bert")
    code = (
        "import sys\nfrom edgepress.frontends.source import load_source\n"
        "print(load_source(sys.argv[1]).model.fingerprint())"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == source.model.fingerprint()
    assert result.stderr == ""  # torch, transformers and their warnings stay off the terminal


def test_cache_is_used_and_checked(
    exported, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, source = exported("bert")
    cache = tmp_path / "cache"
    shutil.copytree(place / "cache", cache)
    calls = []

    def counted(*_args: object, **_options: object) -> None:
        calls.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_export, "export_checkpoint", counted)
    again = load_source(str(folder), cache_folder=cache)
    assert again.model.fingerprint() == source.model.fingerprint()
    assert again.baseline_note == source.baseline_note
    assert not calls
    with pytest.raises(OutputError, match="cannot be stored") as caught:
        load_source(str(folder), cache_folder=cache, opset=18)
    assert "No space" in str(caught.value.why)
    assert len(calls) == 1
    stale, running = (cache / "exports" / f".edgepress-export-{name}" for name in ("old", "new"))
    stale.mkdir()
    os.utime(stale, (1, 1))
    entries = {entry.name for entry in (cache / "exports").iterdir()}
    running.mkdir()
    for data in (cache / "exports").glob("*/model.onnx.data"):
        flipped = bytearray(data.read_bytes())
        flipped[100] ^= 1
        data.unlink()
        data.write_bytes(flipped)
    with pytest.raises(OutputError):
        load_source(str(folder), cache_folder=cache)
    assert len(calls) == 2
    assert not stale.exists()
    assert running.exists()
    running.rmdir()
    left = {entry.name for entry in (cache / "exports").iterdir()}
    assert len(entries - left) == 2  # the damaged entry is gone, nothing half-made is left
    assert left < entries


def test_changed_weights_miss_the_cache(exported, tmp_path: Path) -> None:
    folder, _ = exported("bert")
    digests = read_checkpoint(folder, trust_code=False).digests()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    same = read_checkpoint(copy, trust_code=False).digests()
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    other = read_checkpoint(copy, trust_code=False).digests()
    keys = [cache_key(found, 20, {}) for found in (digests, same, other)]
    assert keys[0] == keys[1] != keys[2]
    assert cache_key(digests, 21, {}) != keys[0]


def test_an_export_that_differs_is_refused(exported, place: Path) -> None:
    folder, source = exported("bert")
    checkpoint = read_checkpoint(folder, trust_code=False)
    notes = {file.parent: json.loads(file.read_text()) for file in place.glob("cache/exports/*/export.json")}
    paths = [entry / "model.onnx" for entry in notes]
    path = next(path for path in paths if b"pooler_output" in path.read_bytes())
    module, attention = torch_export._load_module(checkpoint)
    assert attention == "eager"
    _, *checked = samples_for(checkpoint, module).inputs
    assert len({inputs["input_ids"].shape for inputs in checked}) == 2
    assert all((inputs["attention_mask"] == 0).any() for inputs in checked)
    names = [value.name for value in source.model.outputs]
    with torch.no_grad():
        assert export_check.compare_with_torch(path, module, checked, names) <= export_check.TOLERANCE
        module.encoder.layer[0].output.dense.weight[3, 5] += 0.05
        with pytest.raises(ModelError, match="does not compute what") as caught:
            export_check.compare_with_torch(path, module, checked, names)
        assert "relative difference" in str(caught.value.why)
        module.encoder.layer[0].output.dense.weight[3, 5] = float("nan")
        with pytest.raises(ModelError, match="not finite"):
            export_check.compare_with_torch(path, module, checked, names)
        with pytest.raises(ModelError, match="cannot run"):
            export_check.compare_with_torch(path.with_name("export.json"), module, checked, names)


def test_pooler_without_weights_is_left_out(tmp_path: Path) -> None:
    folder = save(tmp_path, lambda: transformers.BertModel(transformers.BertConfig(**SMALL), False))
    module, _ = torch_export._load_module(read_checkpoint(folder, trust_code=False))
    assert module.pooler is None


def test_missing_parameters_are_not_made_up(exported, tmp_path: Path) -> None:
    folder, _ = exported("bert")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    rewrite_config(copy, num_hidden_layers=2)
    with pytest.raises(ModelError, match="weights are incomplete") as caught:
        load_source(str(copy))
    assert "encoder.layer.1." in str(caught.value.why)
    rewrite_config(copy, num_hidden_layers=1, vocab_size=61)
    with pytest.raises(ModelError, match="cannot load"):
        load_source(str(copy))


def rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def test_process_state_is_left_as_it_was(exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, _ = exported("distilbert")
    copy = shutil.copytree(folder, tmp_path / "copy")
    rewrite_config(copy, dim=32)  # fails late: after transformers and its logging are in use
    logger = logging.getLogger("torch")

    def state() -> tuple[object, ...]:
        return (
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            list(logger.handlers),
            logger.propagate,
            list(warnings.filters),
            transformers.utils.logging.is_progress_bar_enabled(),
            sorted(path.name for path in Path.cwd().iterdir()),
        )

    before = state()
    capfd.readouterr()
    with pytest.raises(ModelError):
        load_source(str(copy))
    assert state() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["BertForPreTraining"]}, NotSupported, "BertForPreTraining"),
        ({"architectures": ["NoSuchModel"]}, NotSupported, "NoSuchModel"),
        ({"architectures": ["PreTrainedConfigModel"]}, NotSupported, "unknown"),
        ({"architectures": ["ViTModel"]}, ModelError, "cannot load"),
        ({"architectures": None}, ModelError, "which architecture"),
        ({"model_type": None}, ModelError, "which kind of model"),
        ({"model_type": "no-such-type"}, ModelError, "does not describe a model"),
        ({"hidden_size": "sixteen"}, ModelError, "does not describe a model"),
        ({"hidden_size": 17}, ModelError, "cannot load"),
        ({"is_encoder_decoder": True}, NotSupported, "encoder-decoder"),
        ({"quantization_config": {"bits": 4}}, NotSupported, "already quantized"),
        ({"auto_map": {"AutoModel": "modeling.Net"}}, NotSupported, "own Python code"),
    ],
)
def test_configs_that_are_refused(
    exported, tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    copy = shutil.copytree(exported("bert")[0], tmp_path / "copy")
    (copy / "modeling.py").write_text("raise SystemExit('this code must not run')")
    rewrite_config(copy, **changes)
    with pytest.raises(error, match=message) as caught:
        load_source(str(copy))
    assert caught.value.remedy or error is NotSupported


def test_malformed_folders(exported, tmp_path: Path) -> None:
    folder, _ = exported("bert")

    def copy(name: str) -> Path:
        return shutil.copytree(folder, tmp_path / name)

    broken = copy("config")
    (broken / "config.json").write_text('{"model_type": "bert",')
    with pytest.raises(ModelError, match="not valid JSON"):
        load_source(str(broken))
    (broken / "config.json").write_text("[" * 200_000)
    with pytest.raises(ModelError, match="not valid JSON"):
        load_source(str(broken))
    (broken / "config.json").unlink()
    with pytest.raises(ModelError, match="not a Hugging Face model"):
        load_source(str(broken))

    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights") as caught:
        load_source(str(pickled))
    assert "save_pretrained" in str(caught.value.remedy)
    (pickled / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_source(str(pickled))

    adapter = copy("adapter")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    with pytest.raises(NotSupported, match="adapter"):
        load_source(str(adapter))

    outside = copy("outside")
    (outside / "model.safetensors").unlink()
    (outside / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ModelError, match="outside its folder"):
        load_source(str(outside))


def test_damaged_safetensors(exported, tmp_path: Path) -> None:
    folder, _ = exported("bert")
    copy = shutil.copytree(folder, tmp_path / "copy")
    whole = (folder / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(whole[:8], "little")
    cases = {
        "truncated weights": whole[:-10],
        "truncated header": whole[: header_bytes // 2],
        "too short": whole[:3],
        "empty": b"",
        "trailing bytes": whole + b"x",
        "header of another format": whole[:8] + b"x" * header_bytes + whole[8 + header_bytes :],
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "no object": (2).to_bytes(8, "little") + b"[]",
        "no tensors": (7).to_bytes(8, "little") + b'{"a":1}',
    }
    for case, data in cases.items():
        (copy / "model.safetensors").write_bytes(data)
        with pytest.raises(ModelError, match="damaged or truncated") as caught:
            read_checkpoint(copy, trust_code=False)
        assert ("lfs" in str(caught.value.why)) == (case == "git-lfs pointer")


def test_sharded_weights(exported, tmp_path: Path) -> None:
    folder, _ = exported("bert")
    module = transformers.BertModel.from_pretrained(folder)
    module.save_pretrained(tmp_path, max_shard_size="4KB")
    checkpoint = read_checkpoint(tmp_path, trust_code=False)
    assert len(checkpoint.weights) > 2
    loaded, _ = torch_export._load_module(checkpoint)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, module.get_parameter(name))
    shard = next(name for name in sorted(checkpoint.weights) if name.endswith(".safetensors"))
    (tmp_path / shard).rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="incomplete") as caught:
        read_checkpoint(tmp_path, trust_code=False)
    assert shard in str(caught.value.why)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        read_checkpoint(tmp_path, trust_code=False)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_missing_packages(exported, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    folder, _ = exported("bert")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeUnavailable, match=package) as caught:
        load_source(str(folder))
    assert "pip install 'edgepress[hf]'" in str(caught.value.remedy)


def test_opsets_that_torch_does_not_write(exported) -> None:
    folder, _ = exported("bert")
    with pytest.raises(NotSupported, match="opset 12"):
        load_source(str(folder), opset=12)


def test_note_serialises(exported, place: Path) -> None:
    exported("bert")
    file = next(place.glob("cache/exports/*/export.json"))
    note = msgspec.json.decode(file.read_bytes(), type=ExportNote)
    assert 0 <= note.relative_error <= export_check.TOLERANCE
    assert set(note.files) == {"model.onnx", "model.onnx.data"}
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(file.read_bytes().replace(b'"opset"', b'"upset"'), type=ExportNote)


REMOTE = """
import torch
from transformers import BertConfig, BertModel

class OwnConfig(BertConfig):
    model_type = "own-bert"

class OwnModel(BertModel):
    config_class = OwnConfig

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, **rest):
        output = super().forward(input_ids, attention_mask, token_type_ids)
        output.last_hidden_state = output.last_hidden_state * 2
        return output
"""


def test_trusted_code_is_run(exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=True
    )
    copy = shutil.copytree(exported("bert")[0], tmp_path / "own")
    (copy / "own.py").write_text(REMOTE)
    rewrite_config(
        copy,
        model_type="own-bert",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"},
    )
    checkpoint = read_checkpoint(copy, trust_code=True)
    module, _ = torch_export._load_module(checkpoint)
    assert type(module).__name__ == "OwnModel"
    assert "own.py" in checkpoint.digests()


def test_minilm(tmp_path: Path) -> None:
    place = os.environ.get("EDGEPRESS_MINILM")
    if not place or not Path(place, "model.safetensors").is_file():
        pytest.skip("EDGEPRESS_MINILM does not name the model's folder")
    source = load_source(place, cache_folder=tmp_path)
    assert (source.model.task.kind, source.model.task.pooling) == ("embedding", "mean")
    assert source.encoder is not None
    assert {"tokenizer.json", "config.json", "1_Pooling/config.json"} <= set(source.files)
    inputs = source.encoder.encode(["A man is playing a guitar.", "Someone plays the guitar.", "It rains."])
    hidden = run(source, inputs)[0]
    mask = inputs["attention_mask"][:, :, None]
    pooled = (hidden * mask).sum(axis=1) / mask.sum(axis=1)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    assert pooled[0] @ pooled[1] > 0.8
    assert pooled[0] @ pooled[2] < 0.3
