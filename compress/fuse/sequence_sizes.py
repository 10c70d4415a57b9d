"""The sizes of batch and sequence of a region laid out sequence first, as its Reshapes need them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ...graph.edit import Editor, static_dim
from ...graph.symbolic import Term

Leading = tuple[Term, Term]
"""The sizes of batch and sequence: numbers, or names of dynamic axes."""


class SequenceSizes:
    """The sizes of batch and sequence in a region, and the shapes that are made of them."""

    def __init__(
        self,
        terms: Leading,
        sizes: list[ir.Value | int],
        last: ir.Node | None,
        editor: Editor,
        graph: ir.Graph,
    ) -> None:
        self._sizes, self._last, self._editor, self._graph = sizes, last, editor, graph
        self._vectors: dict[tuple[int, ...], ir.Value] = {}
        names = [terms[1], terms[0]]
        self.dims = [name if isinstance(name, int) else ir.SymbolicDim(str(name)) for name in names]
        if all(isinstance(name, int) for name in names):
            self._tokens: int | ir.SymbolicDim | None = math.prod(int(str(name)) for name in names)
        elif all(isinstance(name, int) or str(name).isidentifier() for name in names):
            self._tokens = ir.SymbolicDim("*".join(str(name) for name in names))
        else:
            self._tokens = None

    @classmethod
    def of(cls, turned: ir.Value, terms: Leading, editor: Editor, graph: ir.Graph) -> SequenceSizes:
        """The sizes as the first two axes of `turned` [S, B, X] say."""
        numbers = [terms[1], terms[0]]
        if all(isinstance(number, int) for number in numbers):
            return cls(terms, [int(str(number)) for number in numbers], None, editor, graph)
        maker = turned.producer()
        shape = editor.value(
            "Shape",
            [turned],
            before=graph[0] if maker is None else None,
            after=maker,
            stem=f"{turned.name}/sizes",
            dtype=ir.DataType.INT64,
            shape=ir.Shape([3]),
        )
        found: list[ir.Value | int] = []
        last = shape.producer()
        for place, number in enumerate(numbers):
            if isinstance(number, int):
                found.append(number)
                continue
            ends = [editor.constant(np.array([end], np.int64), "sizes", graph) for end in (place, place + 1)]
            size = editor.value(
                "Slice",
                [shape, *ends],
                after=last,
                stem=f"{turned.name}/size",
                dtype=ir.DataType.INT64,
                shape=ir.Shape([1]),
            )
            last = size.producer()
            found.append(size)
        return cls(terms, found, last, editor, graph)

    def vector(self, *inner: int) -> ir.Value:
        """[S, B, *inner] as an int64 vector."""
        if inner not in self._vectors:
            parts = [
                self._editor.constant(np.array([part], np.int64), "sizes", self._graph)
                if isinstance(part, int)
                else part
                for part in self._sizes
            ]
            if self._last is None:
                numbers = [part for part in self._sizes if isinstance(part, int)]
                made = self._editor.constant(np.array([*numbers, *inner], np.int64), "sizes", self._graph)
            else:
                tail = self._editor.constant(np.array(inner, np.int64), "sizes", self._graph)
                made = self._editor.value(
                    "Concat",
                    [*parts, tail],
                    {"axis": 0},
                    after=self._last,
                    stem="sequence_major/shape",
                    dtype=ir.DataType.INT64,
                    shape=ir.Shape([2 + len(inner)]),
                )
            self._vectors[inner] = made
        return self._vectors[inner]

    def flat_target(self, width: int | None) -> ir.Value:
        """[-1, width] as an int64 vector."""
        return self._editor.constant(np.array([-1, width], np.int64), "tokens", self._graph)

    def tokens(self, value: ir.Value) -> ir.Shape:
        """[S * B, X] for a value [B, S, X]."""
        return ir.Shape([self._tokens, static_dim(value, 2)])

    def flat(self, turned: ir.Value) -> ir.Value:
        """[S, B, X] -> [S * B, X]."""
        maker = turned.producer()
        return self._editor.value(
            "Reshape",
            [turned, self.flat_target(static_dim(turned, 2))],
            before=self._graph[0] if maker is None else None,
            after=maker,
            stem=f"{turned.name}/tokens",
            dtype=turned.dtype,
            shape=self.tokens(turned),
        )
