"""A model named `owner/name` on the Hugging Face hub: told from paths, fetched without code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..graph.errors import ModelError, NotSupported, OutputError, RuntimeUnavailable
from .quiet import to_log
from .sidecars import SIDECAR_NAMES

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_TIMEOUT_S = 5.0
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}")
_FILE_ENDINGS = re.compile(
    r"\.(bin|ckpt|engine|gguf|h5|hdf5|json|keras|msgpack|npz|onnx|ort|pb|pkl|plan|pt|pt2|pth|py|safetensors"
    r"|tflite|toml|zip)",
    re.IGNORECASE,
)
# Exact names or names with a shard number: "*.safetensors" would also fetch precision variants.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")


def is_hub_id(reference: str) -> bool:
    """Whether a string that is no existing path is well formed as `owner/name` on the hub.

    Not so: anything with the ending of a model file, or whose first part is a folder here (then
    the rest was mistyped).
    """
    if not _HUB_ID.fullmatch(reference) or "--" in reference or ".." in reference:
        return False
    if _FILE_ENDINGS.fullmatch(Path(reference).suffix):
        return False
    return not Path(reference.partition("/")[0]).is_dir()


def fetch(hub_id: str, *, cache_folder: Path | None, offline: bool) -> Path:
    """The local folder of a hub model: safetensors weights, configs and tokenizer, never code.

    Args:
        hub_id: "owner/name".
        cache_folder: where the hub's cache lives; its own default if None.
        offline: use only what was fetched before.

    Raises:
        ModelError: if the hub knows no such model, keeps it gated, or it has no safetensors.
        RuntimeUnavailable: if huggingface_hub is missing, or neither the network nor the cache
            has the model.
        OutputError: if the cache cannot be written.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors

        # The transport's base class, whichever HTTP library this version of the hub stands on.
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    except ImportError as error:
        raise RuntimeUnavailable(
            "the huggingface_hub package is not installed", remedy="pip install 'edgepress[hf]'"
        ) from error
    with to_log():
        try:
            if offline or constants.HF_HUB_OFFLINE:
                return _cached(hub_id, cache_folder, why="network access is off")
            try:
                info = huggingface_hub.HfApi().model_info(hub_id, timeout=_TIMEOUT_S)
            except errors.GatedRepoError as error:
                raise ModelError(
                    "the hub model is gated",
                    where=hub_id,
                    why="its owner asks for an agreement first",
                    remedy="accept it on the model's page, then `hf auth login`",
                ) from error
            except errors.RepositoryNotFoundError as error:
                raise ModelError(
                    "there is no such model, neither here nor on the Hugging Face hub",
                    where=hub_id,
                    remedy="check the spelling; for a private model, `hf auth login` first",
                ) from error
            _require_safetensors(hub_id, info)
            return _download(hub_id, cache_folder)
        except (HTTPError, ConnectionError, TimeoutError) as error:
            why = f"the hub cannot be reached ({type(error).__name__})"
            return _cached(hub_id, cache_folder, why=why)
        except OSError as error:
            raise OutputError(
                "the model cannot be stored in the hub's cache",
                where=str(error.filename or cache_folder or "the hub's cache"),
                why=error.strerror or str(error),
                remedy="free some space, or choose another cache folder",
            ) from error


def _download(hub_id: str, cache_folder: Path | None) -> Path:
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    quiet_before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return _snapshot(hub_id, cache_folder, local=False)
    except errors.EntryNotFoundError as error:
        raise _unavailable(hub_id, "the download ended before the model was whole") from error
    finally:
        if not quiet_before:
            enable_progress_bars()


def _snapshot(hub_id: str, cache_folder: Path | None, *, local: bool) -> Path:
    """The hub library's snapshot of the files that are wanted; complete, or it raises."""
    import huggingface_hub

    folder = huggingface_hub.snapshot_download(
        hub_id,
        cache_dir=cache_folder,
        etag_timeout=_TIMEOUT_S,
        allow_patterns=[*_WEIGHTS, *SIDECAR_NAMES],
        local_files_only=local,
    )
    return Path(folder)


def _require_safetensors(hub_id: str, info: ModelInfo) -> None:
    names = [entry.rfilename for entry in info.siblings or ()]
    if any("/" not in name and name.endswith(".safetensors") for name in names):
        return
    raise ModelError(
        "the hub model has no safetensors weights",
        where=hub_id,
        why="only safetensors are read: the older formats can run code when they are loaded",
        remedy="pick a model or revision with model.safetensors, or convert it with transformers on a "
        "machine you can spare: AutoModel.from_pretrained(ID).save_pretrained(FOLDER)",
    )


def _cached(hub_id: str, cache_folder: Path | None, *, why: str) -> Path:
    from huggingface_hub import errors

    try:
        folder = _snapshot(hub_id, cache_folder, local=True)
    except errors.EntryNotFoundError as error:
        raise _unavailable(hub_id, why) from error
    weights = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    if not weights or not (folder / "config.json").is_file():
        raise _unavailable(hub_id, why)
    return folder


def _unavailable(hub_id: str, why: str) -> RuntimeUnavailable:
    return RuntimeUnavailable(
        "the model is not on this machine and cannot be fetched",
        where=hub_id,
        why=why,
        remedy="if it is a path, check its spelling; otherwise fetch it where there is network "
        f"(`hf download {hub_id} --local-dir FOLDER`) and name the folder",
    )


def refuse_remote_code_of_hub(hub_id: str) -> NotSupported:
    """The refusal of a hub model that needs its own Python code (which is never fetched)."""
    return NotSupported(
        "the hub model needs its own Python code",
        where=hub_id,
        why="code is never fetched from the hub by edgepress",
        remedy=f"read the code, fetch it yourself (`hf download {hub_id} --local-dir FOLDER`), then "
        f"`edgepress compile FOLDER --trust-code`",
    )
