"""Transformers architectures with random weights, made from their configs, and their ONNX exports.

Every tensor is random, norm scales and shifts and running statistics too: a net whose LayerNorms are the
identity hides wrong fusions. Residual branches of convolutions end in small scales, as training from
zero-initialised ones leaves them (Goyal et al. 2017, arXiv:1706.02677, section 5.1): without, a deep random
net is so badly conditioned that rounding alone moves its scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
OPSET = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture: its classes in transformers, and what makes it tiny.

    Attributes:
        name: as it appears in the table.
        model: class name in transformers; `part` an attribute of it that is exported instead.
        config: class name of the config.
        tiny: config fields of the small form.
        full: config fields of the form that is near the published one (elsewhere the defaults).
        kind: which inputs it takes: "text", "ids", "image", "mel" or "wave".
        common: config fields of both forms.
        arguments: further arguments of the forward.
    """

    name: str
    model: str
    config: str
    tiny: Mapping[str, Any]
    kind: str
    full: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    common: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    part: str | None = None

    def build(self, *, full: bool = False, seed: int = 0) -> Any:
        """The module in evaluation mode, with random weights."""
        with quiet():
            import torch
            import transformers

            torch.manual_seed(seed)
            fields = {**self.common, **(self.full if full else self.tiny)}
            config = getattr(transformers, self.config)(**fields)
            module = getattr(transformers, self.model)(config)
            module = module if self.part is None else getattr(module, self.part)
            _randomise(module.eval())
            return module

    def shapes(self, *, full: bool = False) -> tuple[tuple[int, int], ...]:
        """Three pairs of batch and length that results are compared at; images keep their size."""
        if self.kind == "image":
            side = 224 if full else 64
            return ((1, side), (2, side), (3, side))
        if self.kind == "mel":
            frames = 3000 if full else 100
            return ((1, frames), (2, frames), (3, frames))
        if self.kind == "wave":
            return ((1, 16000), (2, 8000), (1, 4321)) if full else ((1, 128), (2, 300), (3, 257))
        return ((1, 128), (2, 47), (1, 9)) if full else ((1, 32), (2, 13), (3, 24))

    def feeds(self, batch: int, size: int, *, vocabulary: int, seed: int = 0) -> dict[str, Array]:
        """Random inputs; images are blurred noise, of a batch of texts all but the first are padded.

        Args:
            batch: samples.
            size: tokens, pixels of a side, frames or samples of a wave.
            vocabulary: ids are drawn below it.
            seed: of the numbers.
        """
        random = np.random.default_rng(seed)
        if self.kind == "image":
            return {"pixel_values": _images(random, batch, size)}
        if self.kind == "mel":
            return {"input_features": random.standard_normal((batch, 80, size)).astype(np.float32)}
        if self.kind == "wave":
            return {"input_values": random.standard_normal((batch, size)).astype(np.float32)}
        mask = np.ones((batch, size), np.int64)
        for row in range(1, batch):
            mask[row, size - row * (size // 4) :] = 0
        return {"input_ids": random.integers(3, vocabulary, (batch, size)), "attention_mask": mask}

    def export(self, module: Any, file: Path, *, full: bool = False) -> None:
        """Write the ONNX form, batch dynamic, and length where there is one.

        Raises:
            Exception: whatever torch.onnx.export raises.
        """
        with quiet():
            import torch

            batch, size = self.shapes(full=full)[1]
            feeds = self.feeds(batch, size, vocabulary=vocabulary_of(module))
            arguments = {name: torch.from_numpy(array) for name, array in feeds.items()}
            axes: dict[int, Any] = {0: torch.export.Dim("batch")}
            if self.kind in ("text", "ids", "wave"):
                axes[1] = torch.export.Dim("length", min=2)
            dynamic: dict[str, Any] = dict.fromkeys(arguments, axes)
            dynamic |= dict.fromkeys(self.arguments)
            program = torch.onnx.export(
                module,
                (),
                kwargs={**arguments, **self.arguments},
                dynamic_shapes=dynamic,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
            )
            assert program is not None
            program.save(str(file), external_data=full)

    def run(self, module: Any, feeds: Mapping[str, Array]) -> list[Array]:
        """What torch gives, in the order of the outputs of the export."""
        import torch
        from torch.utils import _pytree

        arguments = {name: torch.from_numpy(array) for name, array in feeds.items()}
        with torch.no_grad():
            given = module(**arguments, **self.arguments)
        return [leaf.numpy() for leaf in _pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]


def vocabulary_of(module: Any) -> int:
    """How many ids the module knows; 1 for those that take none."""
    return int(getattr(module.config, "vocab_size", 1) or 1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the talk of exporters and libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _images(random: np.random.Generator, batch: int, size: int) -> Array:
    """Smooth random images with some noise, (batch, 3, size, size): white noise pools to nothing."""
    coarse = random.standard_normal((batch, 3, 8, 8))
    places = np.linspace(0, 7, size)
    left = np.minimum(places.astype(np.int64), 6)
    weights = np.zeros((size, 8))
    weights[np.arange(size), left] = 1 - (places - left)
    weights[np.arange(size), left + 1] = places - left
    smooth = weights @ coarse @ weights.T + 0.1 * random.standard_normal((batch, 3, size, size))
    images: Array = smooth.astype(np.float32)
    return images


def _randomise(module: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            # What starts at zero (tables of relative positions) would hide what is done with it.
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        for block in module.modules():
            if hasattr(block, "shortcut") and isinstance(getattr(block, "layer", None), torch.nn.Sequential):
                block.layer[-1].normalization.weight.mul_(_RESIDUAL_SCALE)


_RESIDUAL_SCALE = 0.2
_TEXT: Mapping[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "vocab_size": 500,
}  # fmt: skip
_VISION: Mapping[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip
# torch 2.13 cannot decompose scaled_dot_product_attention with a bias that does not follow the batch.
_EAGER: Mapping[str, Any] = {"attn_implementation": "eager"}
_NO_CACHE: Mapping[str, Any] = {"use_cache": False}


def _of(
    name: str, family: str, kind: str, tiny: Mapping[str, Any], suffix: str = "Model", **more: Any
) -> Architecture:
    config = more.pop("config", f"{family}Config")
    return Architecture(name=name, model=family + suffix, config=config, kind=kind, tiny=tiny, **more)


ARCHITECTURES: tuple[Architecture, ...] = (
    _of("BERT", "Bert", "text", _TEXT),
    _of("RoBERTa", "Roberta", "text", {**_TEXT, "max_position_embeddings": 130}),
    _of("DistilBERT", "DistilBert", "text",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 500}),
    _of("ALBERT", "Albert", "text", {**_TEXT, "embedding_size": 32},
        full={"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}),
    _of("MobileBERT", "MobileBert", "text",
        {**_TEXT, "intra_bottleneck_size": 32, "embedding_size": 32, "num_feedforward_networks": 2,
         "true_hidden_size": 32}),
    _of("ELECTRA", "Electra", "text", {**_TEXT, "embedding_size": 32}),
    _of("MPNet", "MPNet", "text", _TEXT),
    _of("DeBERTa-v2", "DebertaV2", "text",
        {**_TEXT, "position_buckets": 8, "max_position_embeddings": 128},
        common={"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
                "norm_rel_ebd": "layer_norm", "position_biased_input": False},
        full={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
              "intermediate_size": 3072, "position_buckets": 256}),
    _of("ViT", "ViT", "image", _VISION),
    _of("DeiT", "DeiT", "image", _VISION),
    _of("BEiT", "Beit", "image", _VISION, common={"use_relative_position_bias": True, **_EAGER}),
    _of("Swin", "Swin", "image",
        {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4],
         "window_size": 4}, common=_EAGER),
    _of("ConvNeXt", "ConvNext", "image", {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2},
        "ForImageClassification"),
    _of("ResNet", "ResNet", "image",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "num_labels": 10},
        "ForImageClassification"),
    _of("RegNet", "RegNet", "image",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "groups_width": 16,
         "num_labels": 10}, "ForImageClassification"),
    _of("MobileNet v1", "MobileNetV1", "image",
        {"image_size": 64, "depth_multiplier": 0.25, "num_labels": 10}, "ForImageClassification",
        full={"image_size": 224}),
    _of("MobileNet v2", "MobileNetV2", "image",
        {"image_size": 64, "depth_multiplier": 0.35, "num_labels": 10}, "ForImageClassification",
        full={"image_size": 224}),
    _of("EfficientNet", "EfficientNet", "image",
        {"image_size": 64, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280,
         "in_channels": [32, 16], "out_channels": [16, 24], "kernel_sizes": [3, 5], "strides": [1, 2],
         "num_block_repeats": [1, 2], "expand_ratios": [1, 6], "num_labels": 10}, "ForImageClassification",
        full={"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}),
    _of("SegFormer", "Segformer", "image",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 2], "hidden_sizes": [32, 64],
         "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
         "decoder_hidden_size": 32}, "ForSemanticSegmentation"),
    _of("CLIP text", "CLIPText", "text", {**_TEXT, "max_position_embeddings": 77, "eos_token_id": 2},
        full={"max_position_embeddings": 128}),
    _of("CLIP vision", "CLIPVision", "image", _VISION),
    _of("Whisper encoder", "Whisper", "mel",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 500,
         "max_source_positions": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 1}, part="encoder"),
    _of("wav2vec2", "Wav2Vec2", "wave",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
         "conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
         "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}),
    _of("T5 encoder", "T5", "text",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 500},
        "EncoderModel", common=_EAGER),
    _of("GPT-2", "GPT2", "text", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 500},
        "LMHeadModel", common=_NO_CACHE, arguments=_NO_CACHE),
    _of("Llama-style", "Llama", "text", {**_TEXT, "num_key_value_heads": 2}, "ForCausalLM",
        common=_NO_CACHE, arguments=_NO_CACHE,
        full={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
              "num_key_value_heads": 4, "intermediate_size": 2048}),
)  # fmt: skip
"""The architectures of the table, in its order."""


def architecture(name: str) -> Architecture:
    """The architecture called `name`.

    Raises:
        KeyError: if there is none.
    """
    for item in ARCHITECTURES:
        if item.name == name:
            return item
    raise KeyError(name)
