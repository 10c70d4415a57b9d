"""`TextEncoder`: sentences to the integer arrays that a text model takes, without transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..graph.errors import DataError, ModelError, RuntimeUnavailable
from .sidecars import Config, confined, find_sidecars, optional_config, position_limit

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_ARRAYS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
_TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "config.json",
        "sentence_bert_config.json",
    }
)
# Where nothing states a length: the table size of BERT, which all its relatives serve.
_DEFAULT_LENGTH = 512
# transformers writes 1e30 for "no limit".
_NO_LIMIT = 1 << 24


class TextEncoder:
    """A tokenizer with the model's own limits: truncates, pads to the longest text of the batch.

    Attributes:
        max_length: number of tokens (special ones included) beyond which a text is cut.
        vocab_size: number of tokens, added ones included.
        files: the tokenizer's files by their name in a bundle.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        pad_id: int | None,
        pad_type_id: int,
        padding_side: str,
        fixed_length: int | None,
        files: dict[str, Path],
    ) -> None:
        self.max_length = max_length
        self.vocab_size = int(tokenizer.get_vocab_size(with_added_tokens=True))
        self.files = files
        self._tokenizer = tokenizer
        self._pad_id = pad_id
        self._pad_type_id = pad_type_id
        self._fixed_length = fixed_length
        self._pad_left = padding_side == "left"

    @classmethod
    def load(
        cls, path: Path, *, most_tokens: int | None = None, fixed_length: int | None = None
    ) -> TextEncoder:
        """Load a tokenizer from its folder or its tokenizer.json.

        `max_length` is the smallest of tokenizer_config.json's model_max_length, the position
        table of config.json and sentence_bert_config.json's max_seq_length; where none of them
        says anything, tokenizer.json's own truncation, then 512.

        Args:
            path: a folder that holds tokenizer.json, or that file.
            most_tokens: a further limit, of a model whose config is not in that folder.
            fixed_length: the sequence length of a model without a dynamic sequence axis: every
                text is cut and padded to it.

        Raises:
            ModelError: if there is no tokenizer.json, or it cannot be read.
            RuntimeUnavailable: if the `tokenizers` package is not installed.
        """
        file = _tokenizer_file(path)
        folder = file.parent
        settings = optional_config(folder, "tokenizer_config.json")
        model_config = optional_config(folder, "config.json")
        tokenizer = _read_tokenizer(file)
        limits = [limit for limit in (most_tokens, fixed_length) if limit is not None]
        max_length = min(_max_length(tokenizer, folder, settings, model_config), *limits, _NO_LIMIT)
        pad_id = _pad_id(tokenizer, folder, settings, model_config)
        _set_truncation(tokenizer, file, max_length, settings)
        tokenizer.no_padding()
        found = find_sidecars(folder)
        return cls(
            tokenizer,
            max_length=max_length,
            pad_id=pad_id,
            pad_type_id=_integer(settings.get("pad_token_type_id")) or 0,
            fixed_length=fixed_length,
            padding_side=str(settings.get("padding_side", "right")),
            files={"tokenizer.json": file} | {k: v for k, v in found.items() if k in _TOKENIZER_FILES},
        )

    def encode(
        self,
        texts: Sequence[str],
        text_pairs: Sequence[str] | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> dict[str, npt.NDArray[np.int64]]:
        """Tokenize a batch, cut at `max_length` and padded to its longest text (or the fixed length).

        Args:
            texts: the sentences, at least one; an empty sentence is allowed.
            text_pairs: the second sentence of each pair, as many as `texts`.
            names: the arrays wanted, of input_ids, attention_mask, token_type_ids; all by default.

        Returns:
            name -> int64 array of shape [len(texts), length]; attention_mask is 1 on tokens.

        Raises:
            DataError: if there is no text, the pairs do not match, an item is no string, a name
                is not one that a tokenizer makes, a pair cannot be cut to `max_length`, or texts
                of different length need padding and the tokenizer names no padding token.
        """
        wanted = tuple(_ARRAYS) if names is None else tuple(names)
        unknown = [name for name in wanted if name not in _ARRAYS]
        if unknown:
            raise DataError(
                f"a tokenizer does not make the input {unknown[0]!r}",
                why=f"it makes {', '.join(_ARRAYS)}",
                remedy="give the calibration data as .npz with one array per model input",
            )
        encodings = self._tokenizer.encode_batch(_batch(texts, text_pairs))
        length = max(len(encoding.ids) for encoding in encodings)
        if length > self.max_length:  # the tokenizer gives up cutting without a word
            raise DataError(
                "a pair of texts cannot be cut to the model's length",
                why=f"max_length {self.max_length} leaves no room beside the special tokens of a pair",
                remedy="encode the texts one by one, or raise model_max_length in tokenizer_config.json",
            )
        length = self._fixed_length or length
        return {name: self._array(encodings, name, length) for name in wanted}

    def _array(self, encodings: Iterable[Encoding], name: str, length: int) -> npt.NDArray[np.int64]:
        rows = [getattr(encoding, _ARRAYS[name]) for encoding in encodings]
        array = np.full((len(rows), length), self._padding(name, rows, length), np.int64)
        for index, row in enumerate(rows):
            start = length - len(row) if self._pad_left else 0
            array[index, start : start + len(row)] = row
        return array

    def _padding(self, name: str, rows: list[list[int]], length: int) -> int:
        if name == "attention_mask":
            return 0
        if name == "token_type_ids":
            return self._pad_type_id
        if self._pad_id is None and any(len(row) != length for row in rows):
            raise DataError(
                "texts of different length cannot be put in one batch",
                where="tokenizer.json",
                why="the tokenizer names no padding token",
                remedy='add "pad_token" to tokenizer_config.json, or encode one text at a time',
            )
        return self._pad_id or 0


def _batch(texts: Sequence[str], pairs: Sequence[str] | None) -> list[Any]:
    if isinstance(texts, str) or not texts:
        raise DataError(
            "no texts to encode" if not texts else "one text where a list of texts is needed",
            remedy="pass a list of strings",
        )
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(
            "text pairs do not match",
            why=f"{len(texts)} first and {len(pairs)} second sentences",
            remedy="give one second sentence for every first one",
        )
    for index, text in enumerate((*texts, *(pairs or ()))):
        if not isinstance(text, str):
            raise DataError(
                "a text is not a string",
                where=f"item {index % len(texts)}",
                why=f"it is a {type(text).__name__}",
                remedy="check the column of texts for empty or numeric cells",
            )
    # A lone surrogate (from badly decoded input) has no UTF-8 form, which the tokenizer needs.
    clean = [_well_formed(text) for text in texts]
    return clean if pairs is None else list(zip(clean, map(_well_formed, pairs), strict=True))


def _well_formed(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _tokenizer_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise ModelError("the tokenizer does not exist", where=str(path), remedy="check the path")
    if not (path / "tokenizer.json").is_file():
        raise ModelError(
            "the folder has no tokenizer.json",
            where=str(path),
            why="only the tokenizers library's own format is read",
            remedy="convert it once with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    return confined(path, "tokenizer.json")


def _read_tokenizer(file: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RuntimeUnavailable(
            "the tokenizers package is not installed",
            why="texts are turned into model inputs with it",
            remedy="pip install 'edgepress[text]'",
        ) from error
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError("the tokenizer cannot be read", where=str(file), why=str(error)) from error
    except Exception as error:  # the Rust library raises plain Exception for a bad file
        raise ModelError(
            "the tokenizer file is damaged or of another format",
            where=str(file),
            why=str(error)[:300],
            remedy="copy tokenizer.json again from where the model came from",
        ) from error


def _max_length(tokenizer: Tokenizer, folder: Path, settings: Config, model_config: Config) -> int:
    sentence_config = optional_config(folder, "sentence_bert_config.json")
    stated = (
        _integer(settings.get("model_max_length")),
        position_limit(model_config),
        _integer(sentence_config.get("max_seq_length")),
    )
    limits = [limit for limit in stated if limit is not None and 0 < limit < _NO_LIMIT]
    if limits:
        return min(limits)
    own = (tokenizer.truncation or {}).get("max_length")
    return int(own) if own else _DEFAULT_LENGTH


def _set_truncation(tokenizer: Tokenizer, file: Path, max_length: int, settings: Config) -> None:
    side = settings.get("truncation_side", "right")
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    try:
        if max_length <= special:
            raise ValueError(f"{special} special tokens leave no room for a text")
        tokenizer.enable_truncation(max_length, direction=side)
    except (ValueError, TypeError, OverflowError) as error:
        raise ModelError(
            "the tokenizer's limits do not fit it",
            where=str(file),
            why=f"max_length {max_length}, truncation side {side!r}: {error}",
            remedy="correct model_max_length and truncation_side in tokenizer_config.json",
        ) from error


def _pad_id(tokenizer: Tokenizer, folder: Path, settings: Config, model_config: Config) -> int | None:
    special = optional_config(folder, "special_tokens_map.json")
    for source in (settings, special):
        token = source.get("pad_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found: int | None = tokenizer.token_to_id(token)
            if found is not None:
                return found
    own = (tokenizer.padding or {}).get("pad_id")
    return int(own) if own is not None else _integer(model_config.get("pad_token_id"))


def _integer(value: object) -> int | None:
    if isinstance(value, float) and math.isfinite(value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
