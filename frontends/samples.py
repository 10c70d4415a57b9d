"""Inputs to export and check a PyTorch model with, for texts, images and audio."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..graph.errors import NotSupported
from .checkpoint import Checkpoint
from .export_check import Arrays
from .sidecars import Config, optional_config

if TYPE_CHECKING:
    import torch

UNBOUNDED = 1 << 16
_SEED = 20
# Batch and length of the export itself, then of the two checks.
_TEXT_SIZES = ((2, 8), (1, 5), (3, 13))
_BATCHES = (2, 1, 3)
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_WAVE_LENGTHS = (7_680, 5_200, 11_600)  # samples: about half a second at 16 kHz
_DEFAULT_IMAGE = 224


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Inputs by name for the export (the first) and for the checks, and which axes are free.

    `axes` maps input name -> axis number -> (name of the dimension, its least size, its largest).
    """

    inputs: tuple[Arrays, ...]
    axes: dict[str, dict[int, tuple[str, int, int]]]


def samples_for(checkpoint: Checkpoint, module: torch.nn.Module) -> Samples:
    """Random inputs of the kind that the module's main input asks for.

    Raises:
        NotSupported: if the module needs several kinds of input, or one that is not known.
    """
    main = str(getattr(module, "main_input_name", "input_ids"))
    _refuse_several(checkpoint, module, main)
    if main == "input_ids":
        return _text(checkpoint, module)
    if main == "pixel_values":
        return _images(checkpoint, module)
    if main == "input_features":
        return _features(checkpoint, module)
    if main == "input_values":
        return _waves(module)
    raise NotSupported(
        f"{checkpoint.architecture} takes inputs that are not made here",
        where="config.json",
        why=f"its main input is {main}",
        remedy="pass module:factory, which gives the model and example inputs, or an .onnx file",
    )


def _refuse_several(checkpoint: Checkpoint, module: torch.nn.Module, main: str) -> None:
    kinds = {"input_ids", "pixel_values", "input_features", "input_values"}
    accepted = kinds & set(inspect.signature(module.forward).parameters)
    others = sorted(accepted - {main})
    if others:
        raise NotSupported(
            f"{checkpoint.architecture} takes several kinds of input",
            where="config.json",
            why=f"it takes {main} and {', '.join(others)}",
            remedy="save one of its towers on its own (as CLIPTextModel and CLIPVisionModel do)",
        )


def _text(checkpoint: Checkpoint, module: torch.nn.Module) -> Samples:
    """Random tokens, the last row half padding."""
    accepted = inspect.signature(module.forward).parameters
    vocabulary, padding = _vocabulary(checkpoint.config)
    limit = token_limit(checkpoint)
    generator = np.random.default_rng(_SEED)
    samples = []
    for batch, wanted in _TEXT_SIZES:
        length = min(wanted, limit)
        tokens = generator.integers(0, vocabulary, (batch, length))
        mask = np.ones((batch, length), np.int64)
        mask[-1, (length + 1) // 2 :] = 0
        tokens[tokens == padding] = (padding + 1) % vocabulary
        tokens[mask == 0] = padding
        made = {"input_ids": tokens, "attention_mask": mask}
        # RoBERTa accepts token types but knows one only, and its tokenizer makes none.
        if _types(module) > 1:
            made["token_type_ids"] = np.where(np.arange(length) > length // 2, 1, 0) * np.ones_like(mask)
        samples.append({name: made[name] for name in _TEXT_INPUTS if name in made and name in accepted})
    free = {0: ("batch", 1, UNBOUNDED), 1: ("sequence", 1, limit)}
    return Samples(inputs=tuple(samples), axes=dict.fromkeys(samples[0], free))


def token_limit(checkpoint: Checkpoint) -> int:
    """The most tokens that the export is for."""
    return min(checkpoint.max_tokens or UNBOUNDED, UNBOUNDED)


def _vocabulary(config: Config) -> tuple[int, int]:
    """Number of tokens, and the token that stands for padding."""
    count = config.get("vocab_size")
    count = count if isinstance(count, int) and count > 1 else 2
    padding = config.get("pad_token_id")
    return count, padding if isinstance(padding, int) and 0 <= padding < count else 0


def _types(module: torch.nn.Module) -> int:
    count = getattr(module.config, "type_vocab_size", 0)
    return count if isinstance(count, int) else 0


def _floats(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[Arrays, ...]:
    generator = np.random.default_rng(_SEED)
    return tuple({name: generator.standard_normal(shape).astype(np.float32)} for shape in shapes)


def _images(checkpoint: Checkpoint, module: torch.nn.Module) -> Samples:
    """Images of the size that the preprocessor makes (else the config's): only the batch is free."""
    preprocessor = optional_config(checkpoint.folder, "preprocessor_config.json")
    size = prepared_image_size(preprocessor) or _config_image_size(module) or (_DEFAULT_IMAGE,) * 2
    channels = getattr(module.config, "num_channels", 3)
    channels = channels if isinstance(channels, int) else 3
    inputs = _floats("pixel_values", [(batch, channels, *size) for batch in _BATCHES])
    return Samples(inputs=inputs, axes={"pixel_values": {0: ("batch", 1, UNBOUNDED)}})


def prepared_image_size(preprocessor: Config) -> tuple[int, int] | None:
    """Height and width in pixels that a preprocessor_config.json leads to, if it fixes both."""
    cropped = preprocessor.get("crop_size") if preprocessor.get("do_center_crop") else None
    for size in (cropped, preprocessor.get("size") if preprocessor.get("do_resize", True) else None):
        found = _height_width(size)
        if found is not None:
            return found
    return None


def _height_width(size: object) -> tuple[int, int] | None:
    if isinstance(size, dict):
        pair: tuple[Any, ...] = (size.get("height"), size.get("width"))
        if pair == (None, None):
            pair = (size.get("shortest_edge"),) * 2
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        pair = tuple(size)
    else:
        pair = (size, size)
    if all(isinstance(item, int) and not isinstance(item, bool) and item > 0 for item in pair):
        return pair[0], pair[1]
    return None


def _config_image_size(module: torch.nn.Module) -> tuple[int, int] | None:
    return _height_width(getattr(module.config, "image_size", None))


def _features(checkpoint: Checkpoint, module: torch.nn.Module) -> Samples:
    """Log-mel spectrograms of the one length that Whisper's position table takes."""
    config: Any = module.config
    mels = getattr(config, "num_mel_bins", None)
    frames = getattr(config, "max_source_positions", None)
    if not (isinstance(mels, int) and isinstance(frames, int)) or config.model_type != "whisper":
        raise NotSupported(
            f"{checkpoint.architecture} takes spectrograms of unknown length",
            where="config.json",
            why="only Whisper's encoder is known by its num_mel_bins and max_source_positions",
            remedy="pass module:factory, which gives the model and example inputs, or an .onnx file",
        )
    # Two convolutions, the second of stride 2, lie before the positions.
    inputs = _floats("input_features", [(batch, mels, 2 * frames) for batch in _BATCHES])
    return Samples(inputs=inputs, axes={"input_features": {0: ("batch", 1, UNBOUNDED)}})


def _waves(module: torch.nn.Module) -> Samples:
    """Sampled sound [batch, samples]; for spectrogram transformers [batch, frames, mels], fixed."""
    config: Any = module.config
    if config.model_type == "audio-spectrogram-transformer":
        shapes = [(batch, int(config.max_length), int(config.num_mel_bins)) for batch in _BATCHES]
        inputs = _floats("input_values", shapes)
        return Samples(inputs=inputs, axes={"input_values": {0: ("batch", 1, UNBOUNDED)}})
    waves = list(zip(_BATCHES, _WAVE_LENGTHS, strict=True))
    least = _receptive_samples(config)
    free = {0: ("batch", 1, UNBOUNDED), 1: ("samples", least, 1 << 24)}
    return Samples(inputs=_floats("input_values", waves), axes={"input_values": free})


def _receptive_samples(config: Any) -> int:
    """Sound samples that the convolutions need for two frames (one frame is a special case to torch)."""
    needed = 2
    kernels, strides = getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ())
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        needed = (needed - 1) * int(stride) + int(kernel)
    return needed
