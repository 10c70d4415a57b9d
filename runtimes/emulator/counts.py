"""Executed instructions by kind, as the emulator's plugin writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from ...graph.errors import RuntimeUnavailable

DOT = ("sdot", "udot", "usdot", "mmla")
WIDENING = ("widening_8", "widening_16")
FMA = ("fmla_32", "fmla_16", "bfloat")
_Count = Annotated[int, msgspec.Meta(ge=0)]


def read_counts(path: Path) -> dict[int, dict[str, int]]:
    """The marked regions of one program by their tags; a tag that was used twice has its last counts.

    Args:
        path: what the plugin wrote: one JSON object a line.

    Raises:
        RuntimeUnavailable: if it is missing, or no such text.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        rows = [msgspec.json.decode(line, type=dict[str, _Count]) for line in lines]
        for row in rows:
            if not {"tag", "total", *DOT, *WIDENING, *FMA} <= row.keys():
                raise ValueError(f"only {sorted(row)}")
        return {row.pop("tag"): row for row in rows}
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise RuntimeUnavailable(
            "the emulator wrote no instruction counts",
            where=str(path),
            why=str(error),
            remedy="`edgepress emulator check` says whether it works",
        ) from error


def instructions_of(region: Mapping[str, int], inferences: int) -> dict[str, float | dict[str, float]]:
    """What one inference executes, as the benchmark's result gives it.

    Args:
        region: one of `read_counts`.
        inferences: how many ran between the marks.

    Returns:
        `total`; `dot` (SDOT, UDOT, USDOT, SMMLA: four or more products at once), `widening` (8- and
        16-bit multiplications into wider sums), `fma` (FMLA of float32 and float16, BFloat16); and
        `by_kind`, all kinds that the plugin tells apart.
    """
    kinds = {name: count / inferences for name, count in region.items() if name != "total"}
    return {
        "total": region["total"] / inferences,
        "dot": sum(kinds[name] for name in DOT),
        "widening": sum(kinds[name] for name in WIDENING),
        "fma": sum(kinds[name] for name in FMA),
        "by_kind": {name: count for name, count in kinds.items() if count},
    }
