"""What the tests of calibration/ share: specs, a word tokenizer, models in text form, a runner of lambdas."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from edgepress.graph.model import Model, Origin, TensorSpec

VECTOR = (TensorSpec(name="x", dtype="float32", shape=("N", 3)),)
TEXT = (
    TensorSpec(name="input_ids", dtype="int64", shape=("b", "s")),
    TensorSpec(name="attention_mask", dtype="int64", shape=("b", "s")),
)


class WordEncoder:
    """One token per word, framed by 1 and 2, padded with 9: the shape of a real tokenizer's answer."""

    max_length = 16

    def encode(self, texts, text_pairs=None):
        both = texts if text_pairs is None else [f"{a} | {b}" for a, b in zip(texts, text_pairs, strict=True)]
        rows = [
            [1, *(3 + sum(word.encode()) for word in text.split()), 2][: self.max_length] for text in both
        ]
        length = max(map(len, rows))
        ids = np.array([row + [9] * (length - len(row)) for row in rows], np.int64)
        mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int64)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


class FakeRunner:
    """A runner whose answer is a function of its feeds."""

    load_ms = 0.0

    def __init__(self, inputs, answer):
        self.inputs = tuple(inputs)
        self.outputs = ()
        self.runs = 0
        self._answer = answer

    def run(self, feeds, output_names=None):
        assert output_names is None
        self.runs += 1
        assert set(feeds) == {spec.name for spec in self.inputs}
        return {name: np.asarray(value) for name, value in self._answer(feeds).items()}


def model_of(text):
    """A model from ONNX text."""
    return Model(ir.from_onnx_text(text), origin=Origin(kind="memory", name="case"))
