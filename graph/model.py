"""`Model`: the one in-memory graph that every stage works on, with where it came from and its task."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec
import onnx_ir as ir

from .passes import PassRecord

_DIGEST_KEY = "edgepress.sha256"
_IDENTITY_KEY = "edgepress.identity"
_IDENTITIES = itertools.count()


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One graph input or output: name, NumPy type name ("float32"), and shape.

    What is no tensor has its type in words ("sequence(float32)").

    A dimension is an int, the name of a dynamic axis, or None where nothing is known; `shape` is
    None where not even the rank is known.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


class Task(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model's outputs mean; it decides the default drift metric.

    `pooling` says how a [batch, sequence, hidden] output becomes one embedding per sample:
    the mean over attended tokens, the first token, or not at all.
    """

    kind: Literal["embedding", "classification", "token-classification"] = "embedding"
    pooling: Literal["mean", "cls", "none"] = "none"
    classes: tuple[str, ...] = ()


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a model came from: no paths of the machine, only names and digests.

    `files` maps each source file's name (relative to the model) to its SHA-256.
    """

    kind: Literal["onnx", "huggingface", "torch", "memory"]
    name: str
    files: dict[str, str] = {}
    exporter: str | None = None


class Model:
    """Owns one onnx_ir graph with its origin, task and the record of every pass applied.

    Weights may be memory-mapped and shared between forks; nothing ever writes to them in place.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        origin: Origin,
        task: Task | None = None,
        records: list[PassRecord] | None = None,
    ) -> None:
        self.ir = model
        self.origin = origin
        self.task = task or Task()
        self.records: list[PassRecord] = list(records or [])

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.ir.graph

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that a caller feeds (initializers listed as inputs by old opsets left out)."""
        weights = self.graph.initializers
        return tuple(_spec(value) for value in self.graph.inputs if value.name not in weights)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph outputs, in order."""
        return tuple(_spec(value) for value in self.graph.outputs)

    @property
    def opset(self) -> int:
        """The version of the default ONNX operator set."""
        return self.graph.opset_imports.get("", 0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all initializers of the main graph and its subgraphs; shared ones count once."""
        seen: dict[int, int] = {}
        for graph in self.all_graphs():
            for value in graph.initializers.values():
                if value.const_value is not None:
                    seen[id(value.const_value)] = value.const_value.nbytes
        return sum(seen.values())

    def all_graphs(self) -> Iterator[ir.Graph]:
        """The main graph and every subgraph (If/Loop/Scan bodies)."""
        yield self.graph
        yield from self.graph.subgraphs()

    def fork(self) -> Model:
        """An independent copy of the graph; weights are shared, not copied."""
        return Model(self.ir.clone(), origin=self.origin, task=self.task, records=self.records)

    def structure_hash(self) -> str:
        """A hash of nodes, attributes, connections and which tensor objects stand where.

        Cheap (reads no weight data); differs as soon as any pass changes the graph. Valid within
        this process only: compare, never store.
        """
        return self._hash(_identity)

    def fingerprint(self) -> str:
        """SHA-256 over structure and the contents of all weights: the same in every process."""
        return self._hash(tensor_digest)

    def _hash(self, identify: Callable[[ir.TensorProtocol], str]) -> str:
        digest = hashlib.sha256()
        _hash_graph(self.graph, digest, identify)
        return digest.hexdigest()


def tensor_digest(tensor: ir.TensorProtocol) -> str:
    """SHA-256 of a tensor's type, shape and bytes; computed once per tensor object."""
    known = tensor.meta.get(_DIGEST_KEY)
    if isinstance(known, str):
        return known
    digest = hashlib.sha256(f"{tensor.dtype.name}{list(tensor.shape)}".encode())
    if tensor.dtype == ir.DataType.STRING:
        for item in tensor.numpy().ravel():
            text = item if isinstance(item, bytes) else str(item).encode()
            digest.update(len(text).to_bytes(8, "little") + text)
    else:
        digest.update(tensor.tobytes())
    result = digest.hexdigest()
    tensor.meta[_DIGEST_KEY] = result
    return result


def _identity(tensor: ir.TensorProtocol) -> str:
    """A number of the tensor object; unlike id() it is not given out again when the object has gone."""
    return str(tensor.meta.setdefault(_IDENTITY_KEY, next(_IDENTITIES)))


def _spec(value: ir.Value) -> TensorSpec:
    shape = None if value.shape is None else tuple(_dimension(dim) for dim in value.shape)
    return TensorSpec(name=value.name or "", dtype=_type_text(value.type), shape=shape)


def _type_text(kind: ir.TypeProtocol | None) -> str:
    if kind is None:
        return "unknown"
    if isinstance(kind, ir.TensorType):
        return type_name(kind.dtype)
    name = type(kind).__name__.removesuffix("Type").removesuffix("Tensor").lower()
    inner = kind.elem_type
    return f"{name}({_type_text(inner) if not isinstance(inner, ir.DataType) else type_name(inner)})"


def type_name(dtype: ir.DataType) -> str:
    """The NumPy-style name of an ONNX type: "float32", "int64", "string", "bfloat16"."""
    if dtype == ir.DataType.STRING:
        return "string"
    try:
        return dtype.numpy().name
    except TypeError:
        return dtype.name.lower()


def _dimension(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _hash_graph(graph: ir.Graph, digest: hashlib._Hash, identify: Callable[[ir.TensorProtocol], str]) -> None:
    def feed(*parts: object) -> None:
        digest.update(repr(parts).encode())

    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            feed(kind, value.name, str(value.dtype), str(value.shape))
    for name in sorted(graph.initializers):
        tensor = graph.initializers[name].const_value
        feed("weight", name, None if tensor is None else identify(tensor))
    feed(sorted(graph.opset_imports.items()))
    for node in graph:
        feed(
            node.domain,
            node.op_type,
            node.overload,
            [None if value is None else value.name for value in node.inputs],
            [value.name for value in node.outputs],
        )
        for name in sorted(node.attributes):
            _hash_attribute(name, node.attributes[name], digest, identify)
    feed("end")


def _hash_attribute(
    name: str, attribute: ir.Attr, digest: hashlib._Hash, identify: Callable[[ir.TensorProtocol], str]
) -> None:
    digest.update(repr((name, attribute.type.name)).encode())
    if attribute.type == ir.AttributeType.GRAPH:
        _hash_graph(attribute.as_graph(), digest, identify)
    elif attribute.type == ir.AttributeType.GRAPHS:
        for graph in attribute.as_graphs():
            _hash_graph(graph, digest, identify)
    elif attribute.type == ir.AttributeType.TENSOR:
        digest.update(identify(attribute.as_tensor()).encode())
    elif attribute.type == ir.AttributeType.TENSORS:
        for tensor in attribute.as_tensors():
            digest.update(identify(tensor).encode())
    else:
        digest.update(repr(attribute.value).encode())
