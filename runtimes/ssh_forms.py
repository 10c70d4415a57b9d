"""Forms of a model for a device: the request that remote_run.py reads, and what its times mean."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from ..graph.errors import RuntimeUnavailable
from . import timing
from .base import Array
from .device import Form

_METHOD = "fresh sessions in alternating order, runs interleaved round robin, on the device"


def write_request(
    forms: Sequence[Form],
    feeds: Mapping[str, Array],
    plan: Mapping[str, float],
    folder: Path,
    place: Callable[[Form, Path], str],
) -> dict[str, Path]:
    """Write what remote_run.py needs; the files by the names that they get on the device.

    Args:
        forms: what is to run.
        feeds: inputs by name of the forms that have none of their own.
        plan: how much to measure, as the device runner's `Plan` names it; empty for one run.
        folder: where the files are written here.
        place: brings a form's model onto the device (a free path here is given) and says where it lies.
    """
    files: dict[str, Path] = {}
    entries = []
    for index, form in enumerate(forms):
        own = feeds if form.feeds is None else form.feeds
        name = f"feeds-{index}.npz"
        arrays: dict[str, Any] = {f"input_{number}": values for number, values in enumerate(own.values())}
        files[name] = folder / name
        np.savez(files[name], **arrays)
        entries.append(
            {
                "name": form.name,
                "model": place(form, folder / f"{index}.onnx"),
                "threads": form.options.threads,
                "level": form.options.level_name,
                "config": form.options.config,
                "inputs": list(own),
                "feeds": name,
            }
        )
    files["request.json"] = folder / "request.json"
    files["request.json"].write_bytes(msgspec.json.encode({"forms": entries, "plan": plan}))
    return files


def result_of(
    found: Any, names: Sequence[str], feeds: Mapping[str, Array], where: str
) -> timing.BenchmarkResult:
    """The latencies of the device runner's `time_entries` as a result; the first form is the baseline.

    Args:
        found: by form: `series_ns` and `load_ms` of each session, and `warm_up_runs`, as the device wrote it.
        names: the forms, in order.
        feeds: inputs by name; the first axis of the first of them is the batch.
        where: the device.

    Raises:
        RuntimeUnavailable: if these are no times of these forms.
    """
    batch = next((len(values) for values in feeds.values() if values.ndim), 1)
    try:
        times = {name: msgspec.convert(found[name], _Times) for name in names}
        counts = [[len(series) for series in item.series_ns] for item in times.values()]
        if any(other != counts[0] for other in counts) or not counts[0] or min(counts[0]) < 1:
            raise ValueError(f"runs of the sessions: {counts}")
    except (msgspec.ValidationError, LookupError, TypeError, ValueError) as error:
        raise no_times(where, error) from error
    plain = {name: msgspec.structs.asdict(item) for name, item in times.items()}
    return timing.result_of(plain, dict.fromkeys(times, batch), _METHOD)


def outputs_of(written: bytes, where: str) -> dict[str, Array]:
    """The outputs by name that remote_run.py wrote on the device.

    Raises:
        RuntimeUnavailable: if it wrote something else.
    """
    try:
        with stored_arrays(written) as stored:
            return {str(name): stored[f"output_{index}"] for index, name in enumerate(stored["names"])}
    except ARCHIVE_FAILURES as error:
        raise RuntimeUnavailable(
            "the device wrote no valid outputs",
            where=where,
            why=f"{type(error).__name__}: {error}",
            remedy="try again; report it if it stays so",
        ) from error


ARCHIVE_FAILURES = (ValueError, LookupError, TypeError, EOFError, MemoryError, zipfile.BadZipFile)
"""What reading an archive raises that a device made up."""


def stored_arrays(written: bytes) -> Any:
    """An open archive of arrays from a device, none of which takes more memory than travelled.

    Raises:
        ValueError: if it is packed: a few bytes could become any number.
        BadZipFile: if it is none.
    """
    with zipfile.ZipFile(io.BytesIO(written)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > len(written):
            raise ValueError("its arrays are larger than the file")
    return np.load(io.BytesIO(written), allow_pickle=False)


def json_of(written: bytes, where: str) -> Any:
    """The document that the device wrote.

    Raises:
        RuntimeUnavailable: if it is none.
    """
    try:
        return msgspec.json.decode(written)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise no_times(where, error) from error


def no_times(where: str, error: Exception) -> RuntimeUnavailable:
    """The error for a device that wrote something that its program does not write."""
    return RuntimeUnavailable(
        "the device wrote no valid times",
        where=where,
        why=f"{type(error).__name__}: {error}",
        remedy="try again; report it if it stays so",
    )


_Duration = Annotated[float, msgspec.Meta(ge=0, lt=1e12)]


class _Times(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One form of `time_entries`."""

    series_ns: list[list[Annotated[int, msgspec.Meta(ge=1)]]]
    load_ms: Annotated[list[_Duration], msgspec.Meta(min_length=1)]
    warm_up_runs: Annotated[int, msgspec.Meta(ge=0)]
