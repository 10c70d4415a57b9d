"""The small files beside a model (tokenizer, preprocessor, configs): found, confined and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..graph.errors import ModelError

Config = dict[str, Any]

SIDECAR_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "config.json",
    "preprocessor_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "1_Pooling/config.json",
)

# Config files are a few kB; a label map of 20,000 classes has about one MB.
_JSON_LIMIT_BYTES = 32 << 20

# These families count positions from padding_idx + 1, so that their table has unusable rows.
_POSITIONS_AFTER_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


def find_sidecars(folder: Path) -> dict[str, Path]:
    """The known small files that exist in `folder`, by their name in a bundle.

    Raises:
        ModelError: if one of them is a link that leads out of the folder.
    """
    return {name: confined(folder, name) for name in SIDECAR_NAMES if (folder / name).is_file()}


def confined(folder: Path, name: str) -> Path:
    """`folder`/`name`, proved to lie inside the folder once links are followed.

    A hub cache keeps `snapshots/<commit>/<name>` as a link to `blobs/<digest>`; that one way out
    is allowed.

    Raises:
        ModelError: if the name climbs out of the folder or a link leads out of it.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parents[1] / "blobs")
    resolved = (folder / name).resolve()
    if not any(resolved.is_relative_to(place) for place in allowed):
        raise ModelError(
            "a file of the model lies outside its folder",
            where=str(folder / name),
            why="it is a link or a name that leads out of the folder",
            remedy="copy the file itself into the folder; do not trust this folder otherwise",
        )
    return folder / name


def read_config(path: Path) -> Config:
    """A JSON file that holds one object.

    Raises:
        ModelError: if it cannot be read, is no JSON, or holds something else than an object.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise ModelError(
            f"{path.name} does not hold a JSON object",
            where=str(path),
            why=f"its top level is a {type(data).__name__}",
            remedy="copy the file again from where the model came from",
        )
    return data


def read_json(path: Path) -> object:
    """The value in a JSON file, of limited size.

    Raises:
        ModelError: if it cannot be read or is no JSON.
    """
    try:
        if path.stat().st_size > _JSON_LIMIT_BYTES:
            raise ModelError(
                f"{path.name} is too large for a config file",
                where=str(path),
                why=f"it has {path.stat().st_size} bytes; the limit is {_JSON_LIMIT_BYTES}",
                remedy="check that it is the right file",
            )
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path.name} is not valid JSON",
            where=str(path),
            why=str(error),
            remedy="copy the file again from where the model came from, or correct it",
        ) from error
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read", where=str(path), why=str(error)) from error


def optional_config(folder: Path, name: str) -> Config:
    """The JSON object in `folder`/`name`, or an empty one where there is no such file."""
    return read_config(confined(folder, name)) if (folder / name).is_file() else {}


def position_limit(config: Config) -> int | None:
    """Number of tokens that the position table of a Hugging Face config.json serves, if it says so."""
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(positions, int) or isinstance(positions, bool) or positions <= 0:
        return None
    if config.get("model_type") in _POSITIONS_AFTER_PADDING:
        padding = config.get("pad_token_id")
        positions -= (padding if isinstance(padding, int) else 1) + 1
    return max(positions, 1)
