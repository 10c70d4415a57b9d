"""Sentences in padded batches, as a server runs them, and their embeddings in plain NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from edgepress.benchmarks.sentence_accuracy import Array, Floats, Run

STS_TRAIN = "stsb/sts-train.csv"
"""The training sentences of the STS Benchmark, below the folder of the measuring data."""


def padded(feeds: Sequence[dict[str, Array]], size: int) -> list[dict[str, Array]]:
    """Inputs of shape (1, tokens) as batches of `size`, in order, padded with zeros to the longest."""
    batches = []
    for start in range(0, len(feeds), size):
        part = feeds[start : start + size]
        longest = max(item["input_ids"].shape[1] for item in part)
        batches.append(
            {
                name: np.concatenate(
                    [np.pad(item[name], ((0, 0), (0, longest - item[name].shape[1]))) for item in part]
                )
                for name in part[0]
            }
        )
    return batches


def embed(run: Run, batches: Sequence[dict[str, Array]], names: Sequence[str]) -> Floats:
    """Mean over the attended tokens, not normalised; shape (sentences, hidden).

    Args:
        run: inputs to the last hidden state, shape (batch, tokens, hidden).
        batches: as `padded` gives them.
        names: the inputs that the model takes.
    """
    pooled = []
    for batch in batches:
        hidden = np.asarray(run({name: batch[name] for name in names}), np.float64)
        mask = batch["attention_mask"].astype(np.float64)
        pooled.append((hidden * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True))
    return np.concatenate(pooled)
