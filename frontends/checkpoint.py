"""What a Hugging Face folder holds, checked without torch: config, safetensors weights, task."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ..graph.errors import ModelError, NotSupported
from ..graph.load import file_digest
from ..graph.model import Task
from .sidecars import Config, confined, find_sidecars, position_limit, read_config
from .task import architecture_of, task_of_config

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_UNSAFE = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")
_HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit
_LFS_POINTER = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A Hugging Face model folder that passed every check that needs no framework.

    Attributes:
        folder: where it lies.
        config: the contents of config.json.
        architecture: the class that the weights are for.
        task: what its outputs mean.
        weights: the safetensors files (and their index), by name.
        sidecars: tokenizer, preprocessor and config files, by name.
        dtypes: the safetensors types of the weights, sorted ("F16", "F32").
        remote_code: whether the architecture is code in the folder.
    """

    folder: Path
    config: Config
    architecture: str
    task: Task
    weights: dict[str, Path]
    sidecars: dict[str, Path]
    dtypes: tuple[str, ...]
    remote_code: bool

    @property
    def max_tokens(self) -> int | None:
        """Number of tokens that the position table serves, if the config says so."""
        return position_limit(self.config)

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file that the model is made from, by name."""
        files = self.weights | self.sidecars
        if self.remote_code:
            files = files | {path.name: path for path in self.folder.glob("*.py")}
        return {name: file_digest(files[name]) for name in sorted(files)}


def read_checkpoint(folder: Path, *, trust_code: bool) -> Checkpoint:
    """Check a Hugging Face folder: config, architecture, safetensors headers, no code.

    Raises:
        ModelError: if config.json or the weights are missing, malformed or truncated, or the
            weights come in a format that can run code.
        NotSupported: if the architecture or its form (adapter, quantized weights, code of its own
            without `trust_code`) is not supported.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            "the folder is not a Hugging Face model",
            where=str(folder),
            why="it has no config.json",
            remedy="name the folder that holds config.json and model.safetensors, or an .onnx file",
        )
    config = read_config(confined(folder, "config.json"))
    remote_code = _check_form(config, folder, trust_code=trust_code)
    task = task_of_config(config, folder)
    weights = _find_weights(folder)
    dtypes: set[str] = set()
    for name, path in weights.items():
        if name != _INDEX:
            dtypes |= _check_header(path)
    return Checkpoint(
        folder=folder,
        config=config,
        architecture=architecture_of(config, where="config.json"),
        task=task,
        weights=weights,
        sidecars=find_sidecars(folder),
        dtypes=tuple(sorted(dtypes)),
        remote_code=remote_code,
    )


def _check_form(config: Config, folder: Path, *, trust_code: bool) -> bool:
    """Refuse forms that are not exported; returns whether the folder's own code is to run."""
    refused = None
    if (folder / "adapter_config.json").is_file():
        refused = (
            "an adapter (PEFT) folder",
            "merge it first: model.merge_and_unload().save_pretrained(FOLDER)",
        )
    elif config.get("quantization_config"):
        refused = ("already quantized weights", "pass the model with its original float weights")
    elif config.get("is_encoder_decoder") and not _encoder_only(config):
        refused = (
            "an encoder-decoder model",
            "save its encoder alone: model.get_encoder().save_pretrained(FOLDER)",
        )
    elif not isinstance(config.get("model_type"), str):
        raise ModelError(
            "config.json does not say which kind of model it is",
            where=str(folder / "config.json"),
            why='"model_type" is missing or not a string',
            remedy='add it, for example "model_type": "bert"',
        )
    if refused:
        raise NotSupported(f"{refused[0]} is not supported", where=str(folder), remedy=refused[1])
    if not config.get("auto_map"):
        return False
    if not trust_code:
        raise NotSupported(
            "the model needs its own Python code, which is not run",
            where=str(folder / "config.json"),
            why='its "auto_map" names code that comes with the model; running it gives it your rights',
            remedy="read that code; if you trust it, add --trust-code",
        )
    return True


def _encoder_only(config: Config) -> bool:
    """Whether the weights are the encoder of a model whose config describes both halves."""
    name = architecture_of(config, where="config.json")
    return name.endswith(("Encoder", "EncoderModel", "ForAudioClassification"))


def _find_weights(folder: Path) -> dict[str, Path]:
    if (folder / _SINGLE).is_file():
        return {_SINGLE: confined(folder, _SINGLE)}
    if (folder / _INDEX).is_file():
        shards = read_config(confined(folder, _INDEX)).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        missing = [name for name in names if not confined(folder, name).is_file()]
        if not names or missing:
            raise ModelError(
                "the weights are incomplete",
                where=str(folder / _INDEX),
                why=f"{missing[0]} is missing" if missing else 'it has no "weight_map"',
                remedy="download the missing files again",
            )
        return {_INDEX: folder / _INDEX} | {name: folder / name for name in names}
    unsafe = [name for name in _UNSAFE if (folder / name).is_file()]
    if unsafe:
        raise ModelError(
            "the folder has no safetensors weights",
            where=str(folder / unsafe[0]),
            why="only safetensors are read: loading the older formats can run code hidden in the file",
            remedy="convert it with transformers on a machine you can spare: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
        )
    raise ModelError(
        "the folder has no weights",
        where=str(folder),
        why=f"there is neither {_SINGLE} nor {_INDEX}",
        remedy="download the model completely",
    )


def _check_header(path: Path) -> set[str]:
    """The types in a safetensors file, whose header must describe exactly the bytes that follow."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = int.from_bytes(start, "little")
        if start and _LFS_POINTER.startswith(start):
            raise _damaged(path, "it is a git-lfs pointer, not the weights (run `git lfs pull`)")
        if len(start) < 8 or not 2 <= header_bytes <= min(_HEADER_LIMIT_BYTES, size_bytes - 8):
            raise _damaged(path, f"its header does not fit into its {size_bytes} bytes")
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError) as error:
            raise _damaged(path, "its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    tensors: dict[str, Any] = {name: entry for name, entry in header.items() if name != "__metadata__"}
    try:
        needed = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        dtypes = {str(entry["dtype"]) for entry in tensors.values()}
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise _damaged(path, "its header does not describe tensors") from error
    if needed != size_bytes - 8 - header_bytes:
        present = size_bytes - 8 - header_bytes
        raise _damaged(path, f"its header describes {needed} bytes of weights, the file holds {present}")
    return dtypes


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(
        "the safetensors file is damaged or truncated",
        where=str(path),
        why=why,
        remedy="download or copy it again",
    )
