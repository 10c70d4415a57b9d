"""What compression does to sentence embeddings, computed in plain NumPy: no code of edgepress decides.

The same quantities come out of `edgepress drift`; the benchmarks print both, and they must agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Run = Callable[[Mapping[str, Array]], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Sentence pairs with a score from 0 to 5; `first` and `second` are positions in `sentences`."""

    sentences: tuple[str, ...]
    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    score: Floats


def read_sts(path: Path) -> Pairs:
    """An STS Benchmark file: TAB separated, no quoting; columns 5 to 7 are score and sentences."""
    rows = [line.rstrip("\r\n").split("\t") for line in path.open(encoding="utf-8") if line.strip()]
    position: dict[str, int] = {}
    ends = [[position.setdefault(text, len(position)) for text in row[5:7]] for row in rows]
    return Pairs(
        sentences=tuple(position),
        first=np.array([end[0] for end in ends]),
        second=np.array([end[1] for end in ends]),
        score=np.array([float(row[4]) for row in rows]),
    )


def tokenize(sentences: Sequence[str], model_folder: Path, longest: int = 256) -> list[dict[str, Array]]:
    """One set of inputs a sentence, arrays of shape (1, tokens): cut at `longest`, never padded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest)
    feeds = []
    for text in sentences:
        encoded = tokenizer.encode(text)
        feeds.append(
            {
                "input_ids": np.array([encoded.ids], np.int64),
                "attention_mask": np.array([encoded.attention_mask], np.int64),
                "token_type_ids": np.array([encoded.type_ids], np.int64),
            }
        )
    return feeds


def embed(run: Run, feeds: list[dict[str, Array]], names: list[str]) -> Floats:
    """Mean over the attended tokens of what `run` gives, not normalised; shape (sentences, hidden).

    Args:
        run: inputs to the last hidden state, shape (1, tokens, hidden).
        feeds: one set of inputs a sentence.
        names: the inputs that the model takes.
    """
    pooled = []
    for sentence in feeds:
        hidden = np.asarray(run({name: sentence[name] for name in names}), np.float64)[0]
        mask = sentence["attention_mask"][0].astype(np.float64)
        pooled.append((hidden * mask[:, None]).sum(axis=0) / mask.sum())
    return np.stack(pooled)


def compare(reference: Floats, candidate: Floats, pairs: Pairs) -> dict[str, float]:
    """How far a candidate's embeddings are from the reference's, all as fractions.

    Args:
        reference: shape (sentences, hidden).
        candidate: the same shape.
        pairs: which sentences are to be held against the scores.

    Returns:
        `l2`: norm of all differences over norm of the reference (not normalised embeddings);
        `cosine`: mean cosine distance; `neighbour`: share of sentences whose nearest other sentence
        by cosine stays the same; `spearman`: rank correlation of the pairs' cosines with the scores.
    """
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (reference, candidate)]
    nearest = []
    for unit in units:
        similar = unit @ unit.T
        np.fill_diagonal(similar, -np.inf)
        nearest.append(similar.argmax(axis=1))
    cosines = (units[1][pairs.first] * units[1][pairs.second]).sum(axis=1)
    return {
        "l2": float(np.linalg.norm(candidate - reference) / np.linalg.norm(reference)),
        "cosine": float(1 - (units[0] * units[1]).sum(axis=1).mean()),
        "neighbour": float((nearest[0] == nearest[1]).mean()),
        "spearman": float(np.corrcoef(_ranks(pairs.score), _ranks(cosines))[0, 1]),
    }


def _ranks(values: Floats) -> Floats:
    """Ranks from 1; ties share the mean of theirs."""
    _, position, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks: Floats = (last - (count - 1) / 2)[position]
    return ranks
