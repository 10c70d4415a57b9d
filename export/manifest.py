"""`Manifest`: what a bundle is, what it was made from, and how a runtime has to be set up to run it.

Nothing in it depends on when or on which machine it was written: same inputs and plan, same bytes.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any, Literal, get_args

import msgspec

from ..compress.recipe import IoDtype
from ..graph.errors import ModelError, NotSupported
from ..graph.model import Origin, Task, TensorSpec
from ..runtimes.base import SessionOptions
from ..targets.profile import Evidence

SCHEMA_VERSION = 1

# C#'s enum has no ORT_ENABLE_LAYOUT; ORT_ENABLE_ALL is what a session does without being told.
GraphOptimizationLevel = Literal["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"]
_DEFAULT_LEVEL = "ORT_ENABLE_ALL"

# Config entries steer numerics and speed only. A bundle comes from strangers: entries that name a
# file (profiles, external initializers, optimized models, state) are not in this list.
CONFIG_KEYS = frozenset(
    {
        "mlas.disable_kleidiai",
        "mlas.enable_gemm_fastmath_arm64_bfloat16",
        "mlas.qnbit.force_fp32",
        "mlas.use_lut_gemm",
        "optimization.disable_specified_optimizers",
        "optimization.enable_cast_chain_elimination",
        "optimization.enable_gelu_approximation",
        "session.disable_aot_function_inlining",
        "session.disable_double_qdq_remover",
        "session.disable_prepacking",
        "session.disable_qdq_constant_folding",
        "session.disable_quant_qdq",
        "session.dynamic_block_base",
        "session.enable_dq_matmulnbits_fusion",
        "session.enable_quant_qdq_cleanup",
        "session.force_spinning_stop",
        "session.inter_op.allow_spinning",
        "session.intra_op.allow_spinning",
        "session.qdq_matmulnbits_accuracy_level",
        "session.qdq_matmulnbits_block_size",
        "session.qdqisint8allowed",
        "session.set_denormal_as_zero",
        "session.use_deterministic_compute",
        "session.use_device_allocator_for_initializers",
        "session.x64quantprecision",
    }
)
_MAX_VALUE_LENGTH = 1024
_DIGEST = re.compile(r"[0-9a-f]{64}")
_BASE_PACKAGES = ("edgepress", "numpy", "onnx", "onnx-ir", "onnxruntime")


class SessionSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How to set up an onnxruntime session: the enum name of the level, and config entries.

    Only what Python, C, C++, C#, Java and JavaScript can all set. `graph_optimization_level` is
    absent where onnxruntime's default (`ORT_ENABLE_ALL`) is meant.

    Raises:
        ValueError: if a config key is not one of `CONFIG_KEYS`, or its value is not one line of
            at most 1024 characters.
    """

    graph_optimization_level: GraphOptimizationLevel | None = None
    config: dict[str, str]

    def __post_init__(self) -> None:
        for key, value in self.config.items():
            if key not in CONFIG_KEYS:
                raise ValueError(f"session config entry {key!r} is not one that a bundle may set")
            if len(value) > _MAX_VALUE_LENGTH or not value.isprintable():
                raise ValueError(f"session config entry {key!r} has a value that is no single line")

    def options(self, *, threads: int) -> SessionOptions:
        """The same as options of a session."""
        return SessionOptions(
            threads=threads,
            graph_optimization_level=self.graph_optimization_level,
            config=dict(self.config),
        )


def session_settings(options: SessionOptions) -> SessionSettings:
    """What of a session's options a bundle carries: the level, absent if default, and the config.

    Raises:
        ValueError: if not every language binding can set it that way, or a bundle may not.
    """
    level = None if options.level_name == _DEFAULT_LEVEL else options.level_name
    if level is not None and level not in get_args(GraphOptimizationLevel):
        raise ValueError(f"graph optimization level {level!r} cannot be set from every language")
    return msgspec.convert(
        {"graph_optimization_level": level, "config": dict(sorted(options.config.items()))}, SessionSettings
    )


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model of the bundle; `files` are its ONNX file and, for large ones, its weights."""

    name: str
    files: tuple[str, ...]
    fingerprint: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    ir_version: int

    def __post_init__(self) -> None:
        if self.files not in (("model.onnx",), ("model.onnx", "model.onnx.data")):
            raise ValueError("model files are model.onnx and, for large models, model.onnx.data")
        _require_digest(self.fingerprint, "model.fingerprint")


class TargetRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The target by name, the runtime that runs the model there, and the SHA-256 of its profile."""

    name: str
    runtime: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    profile_digest: str

    def __post_init__(self) -> None:
        _require_digest(self.profile_digest, "target.profile_digest")


class DataRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One set of samples that the compile used, by name and digest only."""

    name: str
    digest: str
    origin: Literal["real", "generated"]
    split: Literal["calibrate", "evaluate"]
    samples: int


class InputShapes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shapes that an input was compiled for: the least, the usual (timed) and the largest one."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class PrecisionSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was asked for, what was done, and how many operators run in which type.

    `form` is the plan's precision: "bf16-storage" and "fp16-storage" say that weights are kept in 16
    bits and computed with in float32, "fp16" and "bf16" that the arithmetic is 16 bits too. `io_dtype`
    says that the model's float32 inputs and outputs were made 16 bits; fp32 leaves them as they were.
    """

    requested: str
    form: str = ""
    io_dtype: IoDtype = "fp32"
    quantization: str
    operators: dict[str, int]


class OutputTolerance(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How far a golden output may be from its record: measured drift, and the limits made of it.

    Floating outputs have `cosine_distance` and `relative_l2`, others `mismatch_fraction`, each as
    [measured, allowed]. An output with none of them does not repeat (random operators): only its
    type and shape are compared.
    """

    name: str
    cosine_distance: tuple[float, float] | None = None
    relative_l2: tuple[float, float] | None = None
    mismatch_fraction: tuple[float, float] | None = None


class GoldenSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The two files of one golden sample, relative to the bundle."""

    inputs: str
    outputs: str


class GoldenRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The golden samples, where their inputs came from, and how their tolerance was measured."""

    source: Literal["generated", "data"]
    seed: int
    threads: int
    samples: tuple[GoldenSample, ...]
    numerics: Literal["float32", "float16", "bfloat16", "int8"]
    method: str
    tolerances: tuple[OutputTolerance, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a reader of a bundle has to know, without opening the model.

    `evidence` is the grade of the weakest choice in the plan. `shapes` holds the inputs that a range
    was asked for, or that follow one. `assets` are the tokenizer and
    preprocessor files below `assets/`. `stamps` mark every figure of the bundle ("data-free").
    """

    format: Literal["edgepress-bundle"] = "edgepress-bundle"
    schema_version: int = SCHEMA_VERSION
    model: ModelRecord
    source: Origin
    task: Task
    target: TargetRecord
    data: tuple[DataRecord, ...] = ()
    shapes: dict[str, InputShapes] = {}
    evidence: Evidence
    precision: PrecisionSummary
    session_options: SessionSettings
    golden: GoldenRecord | None = None
    assets: tuple[str, ...] = ()
    stamps: tuple[str, ...] = ()
    versions: dict[str, str]

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema version {self.schema_version} is not {SCHEMA_VERSION}")
        for name in (self.source.name, *self.source.files, *(record.name for record in self.data)):
            if name.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", name):
                raise ValueError(f"{name!r} is a path of one machine, not a name")
        if self.golden is not None:
            measured = [tolerance.name for tolerance in self.golden.tolerances]
            if measured != [spec.name for spec in self.model.outputs]:
                raise ValueError("golden.tolerances do not name the model's outputs in order")


def package_versions(*used: str) -> dict[str, str]:
    """Versions of edgepress's core packages and of further ones that the compile used, by name.

    Packages that are not installed are left out.
    """
    found = {}
    for name in sorted({*_BASE_PACKAGES, *used}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as indented JSON with a final newline: the same bytes for equal values."""
    return to_json(manifest)


def to_json(value: object) -> bytes:
    """Any serialisable value as indented JSON with a final newline, mappings in sorted order."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=2) + b"\n"


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """Read a manifest from JSON; `where` names its file in errors.

    Raises:
        ModelError: if it is not JSON, has an unknown key, or a value of the wrong type.
        NotSupported: if its schema version is newer than this edgepress.
    """
    _refuse_other_version(data, where)
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(
            "the bundle's manifest is not valid",
            where=where,
            why=str(error),
            remedy="compile the model again, or restore the file from where the bundle came from",
        ) from error


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of manifest.json."""
    return msgspec.json.schema(Manifest)


def _refuse_other_version(data: bytes, where: str) -> None:
    try:
        head = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return
    version = head.get("schema_version") if isinstance(head, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise NotSupported(
            f"the bundle has schema version {version}, this edgepress reads up to {SCHEMA_VERSION}",
            where=where,
            remedy="upgrade edgepress: pip install --upgrade edgepress",
        )


def _require_digest(text: str, field: str) -> None:
    if not _DIGEST.fullmatch(text):
        raise ValueError(f"{field} is not a SHA-256 in hexadecimal")
