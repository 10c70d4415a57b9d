"""Which ONNX operators TensorRT's parser takes, release by release: data from onnx-tensorrt's own tables."""

from __future__ import annotations

import functools
from importlib import resources

import msgspec

from ..graph.errors import TargetError


class OperatorEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A supported operator: its types in TensorRT's names ("FP16") and what restricts it, in words."""

    types: tuple[str, ...]
    restrictions: str = ""


class OperatorTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One release's table.

    Attributes:
        opset_min: the oldest opset of the default domain that is parsed.
        opset_max: the newest.
        transcription: how the table became data.
        hand_transcribed: whether the support flags were copied by hand.
        unsupported: the operators that the table names and refuses.
        operators: the supported ones, by ONNX name.
    """

    opset_min: int
    opset_max: int
    transcription: str
    hand_transcribed: bool
    unsupported: tuple[str, ...]
    operators: dict[str, OperatorEntry]


class OperatorTables(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every release's table, oldest first, with source and licence of the data."""

    source: str
    license: str
    versions: dict[str, OperatorTable]


@functools.cache
def operator_tables() -> OperatorTables:
    """The tables that edgepress ships."""
    text = resources.files(__package__).joinpath("tensorrt_operators.json").read_bytes()
    return msgspec.json.decode(text, type=OperatorTables)


def operator_table(version: str) -> OperatorTable:
    """The table of one release, such as "8.5".

    Raises:
        TargetError: if there is no table of that release.
    """
    versions = operator_tables().versions
    if version not in versions:
        raise TargetError(
            f"there is no operator table of TensorRT {version}",
            where="runtime.operator_table",
            remedy=f"there are: {', '.join(versions)}; take the nearest older one",
        )
    return versions[version]


def first_support(op: str) -> str | None:
    """The oldest release here whose table supports an operator, or None."""
    for version, table in operator_tables().versions.items():
        if op in table.operators:
            return version
    return None
