"""Tiny random models of every kind of Hugging Face input: right results at other sizes, tasks, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from edgepress.frontends.export_check import run_torch
from edgepress.frontends.samples import prepared_image_size
from edgepress.frontends.source import load_source
from edgepress.graph.errors import ModelError, NotSupported
from edgepress.graph.model import Task
from edgepress.graph.save import to_bytes

torch = pytest.importorskip("torch")
tr = pytest.importorskip("transformers")
ort = pytest.importorskip("onnxruntime")

CORE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = CORE | {"vocab_size": 60, "max_position_embeddings": 40}
IMAGE = CORE | {"image_size": 16, "patch_size": 8, "num_labels": 5}
SOUND = CORE | {
    "conv_dim": (8, 8),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 12,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 60,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 12,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
    "image_size": 32,
}


def whisper(name: str) -> object:
    config = tr.WhisperConfig(**WHISPER)
    return tr.WhisperModel(config).get_encoder() if name == "encoder" else tr.WhisperModel(config)


BUILDERS = {
    "question-answering": lambda: tr.BertForQuestionAnswering(tr.BertConfig(**TEXT)),
    "regression": lambda: tr.BertForSequenceClassification(tr.BertConfig(**TEXT, num_labels=1)),
    "gpt2": lambda: tr.GPT2LMHeadModel(tr.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    "vit": lambda: tr.ViTForImageClassification(tr.ViTConfig(**IMAGE)),
    "vit-encoder": lambda: tr.ViTModel(tr.ViTConfig(**IMAGE)),
    "resnet": lambda: tr.ResNetForImageClassification(tr.ResNetConfig(**RESNET, num_labels=4)),
    "whisper-encoder": lambda: whisper("encoder"),
    "wav2vec2": lambda: tr.Wav2Vec2Model(tr.Wav2Vec2Config(**SOUND)),
    "masked-lm": lambda: tr.BertForMaskedLM(tr.BertConfig(**TEXT)),
    "llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**TEXT, num_key_value_heads=1)),
    "deberta": lambda: tr.DebertaV2Model(tr.DebertaV2Config(**TEXT)),
    "t5-encoder": lambda: tr.T5EncoderModel(
        tr.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ),
    "clip-vision": lambda: tr.CLIPVisionModel(tr.CLIPVisionConfig(**IMAGE)),
    "convnext": lambda: tr.ConvNextForImageClassification(
        tr.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32)
    ),
    "swin": lambda: tr.SwinForImageClassification(
        tr.SwinConfig(embed_dim=8, depths=[2], num_heads=[2], window_size=2, image_size=32, patch_size=4)
    ),
    "segformer": lambda: tr.SegformerForSemanticSegmentation(tr.SegformerConfig(**SEGFORMER)),
    "ctc": lambda: tr.Wav2Vec2ForCTC(tr.Wav2Vec2Config(**SOUND)),
}
TOKENS = ("batch", "sequence")
EXPECTED = {
    "question-answering": (Task(), TOKENS, ["start_logits", "end_logits"]),
    "regression": (Task(), TOKENS, ["logits"]),
    "gpt2": (Task(kind="token-classification"), TOKENS, ["logits"]),
    "vit": (
        Task(kind="classification", classes=tuple(f"LABEL_{i}" for i in range(5))),
        ("batch", 3, 16, 16),
        ["logits"],
    ),
    "vit-encoder": (Task(), ("batch", 3, 16, 16), ["last_hidden_state", "pooler_output"]),
    "resnet": (
        Task(kind="classification", classes=tuple(f"LABEL_{i}" for i in range(4))),
        ("batch", 3, 32, 24),
        ["logits"],
    ),
    "whisper-encoder": (Task(pooling="mean"), ("batch", 8, 24), ["last_hidden_state"]),
    "wav2vec2": (Task(pooling="mean"), ("batch", "samples"), ["last_hidden_state", "extract_features"]),
    "masked-lm": (Task(kind="token-classification"), TOKENS, ["logits"]),
    "llama": (Task(kind="token-classification"), TOKENS, ["logits"]),
    "deberta": (Task(pooling="mean"), TOKENS, ["last_hidden_state"]),
    "t5-encoder": (Task(pooling="mean"), TOKENS, ["last_hidden_state"]),
    "clip-vision": (Task(), ("batch", 3, 16, 16), ["last_hidden_state", "pooler_output"]),
    "convnext": (
        Task(kind="classification"),
        ("batch", 3, 32, 32),
        ["logits"],
    ),
    "swin": (Task(kind="classification"), ("batch", 3, 32, 32), ["logits"]),
    "segformer": (Task(), ("batch", 3, 32, 32), ["logits"]),
    "ctc": (Task(kind="token-classification"), ("batch", "samples"), ["logits"]),
}
FAST = ("gpt2", "vit-encoder", "resnet", "whisper-encoder")
CASES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in BUILDERS]


def save(folder: Path, name: str):
    """The module with random weights (norms and biases too), saved with a preprocessor where one is due."""
    torch.manual_seed(3)
    module = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    module.save_pretrained(folder)
    if name == "resnet":
        size = {"do_resize": True, "size": {"height": 32, "width": 24}}
        (folder / "preprocessor_config.json").write_text(json.dumps(size))
    return module


def inputs(source, batch: int, length: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(batch)
    sizes = {"batch": batch, "sequence": length, "samples": 400 * length}
    made = {}
    for spec in source.model.inputs:
        shape = tuple(sizes.get(dim, dim) for dim in spec.shape)
        if spec.dtype != "int64":
            made[spec.name] = generator.standard_normal(shape).astype(np.float32)
        elif spec.name == "input_ids":
            made[spec.name] = generator.integers(3, 60, shape)
        else:
            made[spec.name] = np.ones(shape, np.int64)
    return made


@pytest.mark.parametrize("name", CASES)
def test_equals_torch_at_other_sizes(name: str, tmp_path: Path) -> None:
    module = save(tmp_path, name)
    source = load_source(str(tmp_path))
    task, shape, outputs = EXPECTED[name]
    assert source.model.task == task
    assert source.model.inputs[0].shape == shape
    assert [value.name for value in source.model.outputs] == outputs
    assert ("preprocessor_config.json" in source.files) == (name == "resnet")
    session = ort.InferenceSession(to_bytes(source.model), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 3), (4, 11)):
        feeds = inputs(source, batch, length)
        with torch.no_grad():
            if hasattr(module.config, "use_cache"):
                module.config.use_cache = False
            expected = run_torch(module, feeds)
        for output, result in zip(outputs, session.run(None, feeds), strict=True):
            np.testing.assert_allclose(result, expected[output].numpy(), rtol=1e-3, atol=2e-5)


def test_two_towers_and_encoder_decoders_are_refused(tmp_path: Path) -> None:
    whisper("whole").save_pretrained(tmp_path / "whisper")
    with pytest.raises(NotSupported, match="encoder-decoder") as caught:
        load_source(str(tmp_path / "whisper"))
    assert "get_encoder" in str(caught.value.remedy)
    clip = tr.CLIPConfig(
        text_config=TEXT | {"eos_token_id": 59, "bos_token_id": 1}, vision_config=IMAGE, projection_dim=8
    )
    tr.CLIPModel(clip).save_pretrained(tmp_path / "clip")
    with pytest.raises(NotSupported, match="several kinds of input"):
        load_source(str(tmp_path / "clip"))


def test_a_size_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    save(tmp_path, "vit")
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 24, "width": 24}}')
    with pytest.raises(ModelError, match="does not run in torch"):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"size": 64}, (64, 64)),
        ({"size": [10, 20]}, (10, 20)),
        ({"size": {"height": 8, "width": 9}}, (8, 9)),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}, (224, 224)),
        ({"size": {"shortest_edge": 256}, "do_center_crop": False, "crop_size": 224}, (256, 256)),
        ({"size": 64, "do_resize": False}, None),
        ({"size": {"longest_edge": 64}}, None),
        ({"size": -1}, None),
        ({}, None),
    ],
)
def test_prepared_image_size(config: dict[str, object], size: tuple[int, int] | None) -> None:
    assert prepared_image_size(config) == size


CACHED = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[batch, 4] x, float[batch, 4] {past}) => (float[batch, 4] {present})
{{ {present} = Add(x, {past}) }}
"""


@pytest.mark.parametrize(
    ("past", "present"),
    [("past_key_values_0_key", "y"), ("past_0", "y"), ("z", "present_key_values_0"), ("z", "present_1")],
)
def test_graphs_with_a_cache_are_refused(past: str, present: str, tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(CACHED.format(past=past, present=present)), tmp_path / "m.onnx")
    with pytest.raises(NotSupported, match="KV cache") as caught:
        load_source(str(tmp_path / "m.onnx"))
    assert "use_cache=False" in str(caught.value.remedy)


def test_other_names_are_no_cache(tmp_path: Path) -> None:
    graph = CACHED.format(past="pasture", present="presentation")
    onnx.save(onnx.parser.parse_model(graph), tmp_path / "m.onnx")
    assert len(load_source(str(tmp_path / "m.onnx")).model.inputs) == 2
