"""Samples from a Hugging Face dataset (`hf:NAME…`): streamed, a bounded number, never any code of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..frontends.quiet import to_log
from ..graph.errors import DataError, NotSupported, RuntimeUnavailable
from ..graph.model import TensorSpec
from .hub_columns import Columns, image_samples, text_samples
from .schema import near_names, quoted
from .source import Opened
from .text import Lengths

if TYPE_CHECKING:
    from ..frontends.text import TextEncoder

PREFIX = "hf:"
DEFAULT_SAMPLES = 512
"""How many rows are taken where nobody says: a dataset of the hub may have billions."""

# Rows are drawn at random out of this many at a time, and out of the dataset's shuffled files.
_BUFFER_ROWS = 1000
_TIMEOUT_S = 5.0
_FORM = "hf:NAME[@REVISION][:CONFIG][:SPLIT][,ROLE=COLUMN…]"
_ROLES = tuple(field.name for field in dataclasses.fields(Columns))
_HUB_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")
# Builders that read plain data. Others (hdf5, sql, eval, pandas…) parse formats that nobody asked for here.
_BUILDERS = ("arrow", "csv", "imagefolder", "json", "parquet", "text", "webdataset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubReference:
    """What the user wrote behind `hf:`; `parts` are the config, the split, or both (see `_place`)."""

    text: str
    name: str
    revision: str | None
    parts: tuple[str, ...]
    columns: Columns


def is_hub_dataset(source: str) -> bool:
    """Whether data is named as a Hugging Face dataset."""
    return source.startswith(PREFIX)


def parse_reference(text: str) -> HubReference:
    """Read `hf:NAME[@REVISION][:CONFIG][:SPLIT][,ROLE=COLUMN…]`.

    Raises:
        DataError: if it is not of that form, or a role is unknown or named twice.
    """
    place, *named = text.removeprefix(PREFIX).split(",")
    name, *parts = place.split(":")
    name, _, revision = name.partition("@")
    columns: dict[str, str] = {}
    for item in named:
        role, equals, column = (part.strip() for part in item.partition("="))
        if role not in _ROLES or not equals or not column:
            raise _malformed(text, f"{item!r} is not ROLE=COLUMN with one of the roles {quoted(_ROLES)}")
        if role in columns:
            raise _malformed(text, f"two columns for {role}")
        columns[role] = column
    if not name or len(parts) > 2:
        raise _malformed(text, "there is no name" if not name else f"{len(parts)} parts follow the name")
    return HubReference(
        text=text, name=name, revision=revision or None, parts=tuple(parts), columns=Columns(**columns)
    )


def _malformed(text: str, why: str) -> DataError:
    return DataError(
        "the dataset's name is not understood",
        where=text,
        why=why,
        remedy=f"write {_FORM}, such as hf:nyu-mll/glue:mrpc:train,text=sentence1,text_pair=sentence2",
    )


def open_hub_dataset(
    source: str,
    inputs: Sequence[TensorSpec],
    samples: int | None,
    seed: int,
    *,
    encoder: TextEncoder | None,
    lengths: Lengths,
    classes: Sequence[str],
    preprocessor: Path | None,
) -> tuple[Opened, str]:
    """Stream rows of a dataset and keep them as samples; also the name under which they are recorded.

    Args:
        source: see `parse_reference`; NAME is a dataset of the hub or a local folder of data files.
        inputs: the model's inputs.
        samples: how many rows; 512 where it is None.
        seed: seed of the shuffle that draws them.
        encoder: the model's tokenizer, for texts.
        lengths: limits on the sequence length.
        classes: the model's class names.
        preprocessor: the model's preprocessor_config.json, for images.

    Raises:
        DataError: if the dataset, config, split or a column does not exist, is gated, or does not fit.
        NotSupported: if it is made by code of its own, or of files that are not read here.
        RuntimeUnavailable: if the datasets package is missing, or the hub cannot be reached.
    """
    reference = parse_reference(source)
    _require_datasets(source)
    wanted = DEFAULT_SAMPLES if samples is None else samples
    with _quiet(), tempfile.TemporaryDirectory(prefix="edgepress-datasets-") as scratch, _failures(source):
        local = Path(reference.name).expanduser()
        revision = None if local.is_dir() else _revision(reference)
        builder = _builder(reference, local, revision, scratch)
        config, split, stream = _stream(reference, builder, local, revision, scratch)
        name = _recorded_name(reference, local, revision, config, split)
        rows, columns, features = _rows(stream, reference, inputs, wanted, seed)
    note = f"{len(rows)} rows of {name}, shuffled in steps of {_BUFFER_ROWS} rows (seed {seed})"
    if columns.image is not None:
        opened = image_samples(
            rows, columns, features, inputs, preprocessor=preprocessor, classes=classes, where=name
        )
    else:
        opened = text_samples(
            rows, columns, features, inputs, encoder=encoder, lengths=lengths, classes=classes, where=name
        )
    return dataclasses.replace(opened, notes=(note, *opened.notes)), name


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's log lines and bars off the terminal."""
    import datasets  # noqa: F401 - its loggers have to be there to be quieted
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with to_log():
            yield
    finally:
        if not before:
            enable_progress_bars()


def _require_datasets(source: str) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise RuntimeUnavailable(
            "the datasets package is not installed",
            where=source,
            why="Hugging Face datasets are read with it",
            remedy="pip install 'edgepress[datasets]', or pass the samples as a file",
        )


def _revision(reference: HubReference) -> str | None:
    """The commit of a dataset on the hub, asked for first: it says at once what is wrong with the name.

    Raises:
        DataError: if there is no such dataset, or it is gated.
        RuntimeUnavailable: if the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    name = reference.name
    if not _HUB_NAME.fullmatch(name) or ".." in name:
        raise DataError(
            "there is no such dataset",
            where=reference.text,
            why=f"{name!r} is neither a folder here nor the name of a dataset on the hub",
            remedy="check the path, or give owner/name of the hub",
        )
    if constants.HF_HUB_OFFLINE:
        raise _unreachable(reference, "network access is off (HF_HUB_OFFLINE)")
    try:
        info = huggingface_hub.HfApi().dataset_info(name, revision=reference.revision, timeout=_TIMEOUT_S)
    except errors.GatedRepoError as error:
        raise _gated(reference) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(
            f"the dataset has no revision {reference.revision!r}",
            where=reference.text,
            remedy="give a branch, tag or commit of it, or leave @REVISION out",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            "there is no such dataset, neither here nor on the Hugging Face hub",
            where=reference.text,
            remedy="check the spelling; for a private dataset, `hf auth login` first",
        ) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise _unreachable(reference, f"the hub cannot be reached ({type(error).__name__})") from error
    return info.sha


def _unreachable(reference: HubReference, why: str) -> RuntimeUnavailable:
    return RuntimeUnavailable(
        "the dataset is not on this machine and cannot be fetched",
        where=reference.text,
        why=why,
        remedy="if it is a folder, check its spelling; otherwise fetch it where there is network "
        f"(`hf download {reference.name} --repo-type dataset --local-dir FOLDER`) and name hf:FOLDER",
    )


def _gated(reference: HubReference) -> DataError:
    return DataError(
        "the dataset is gated",
        where=reference.text,
        why="its owner asks for an agreement first",
        remedy="accept it on the dataset's page, then `hf auth login`",
    )


def _builder(
    reference: HubReference, local: Path, revision: str | None, scratch: str, config: str | None = None
) -> Any:
    """The dataset's builder; nothing of it is downloaded but lists of files."""
    from datasets import load_dataset_builder

    path = str(local.resolve()) if local.is_dir() else reference.name
    builder = load_dataset_builder(path, config, revision=revision, cache_dir=scratch)
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _BUILDERS:
        raise NotSupported(
            f"datasets made of {kind} are not read",
            where=reference.text,
            why=f"only plain data is: {', '.join(_BUILDERS)}",
            remedy="save the rows as .jsonl, .csv or .npz and pass that file",
        )
    return builder


def _stream(
    reference: HubReference, builder: Any, local: Path, revision: str | None, scratch: str
) -> tuple[str | None, str, Any]:
    """Config, split and rows: `NAME:X` is the config X where there is one, else the split X."""
    configs = list(builder.builder_configs) or [builder.config.name]
    parts = reference.parts
    config, split = (parts[0] or None, parts[1] or None) if len(parts) == 2 else (None, None)
    if len(parts) == 1:
        config, split = (parts[0], None) if parts[0] in configs else (None, parts[0] or None)
    if config is not None:
        if config not in configs:
            raise _no_such("config", config, configs, reference)
        builder = _builder(reference, local, revision, scratch, config)
    streams = builder.as_streaming_dataset()
    if split is None:
        if len(streams) > 1 and "train" not in streams:
            raise DataError(
                "the dataset has several splits",
                where=reference.text,
                why=f"they are {quoted(streams)}",
                remedy=f"name one: hf:{reference.name}:{config or ''}:{next(iter(streams))}",
            )
        split = "train" if "train" in streams else str(next(iter(streams)))
    if split not in streams:
        raise _no_such("split" if len(parts) == 2 else "config or split", split, streams, reference, configs)
    return config, split, streams[split]


def _no_such(
    what: str, wanted: str, known: Any, reference: HubReference, configs: Sequence[str] = ()
) -> DataError:
    named = f"; its configs are {quoted(configs[:20])}" if len(configs) > 1 else ""
    several = "splits" if what != "config" else "configs"
    return DataError(
        f"the dataset has no {what} {wanted!r}{near_names(wanted, [*map(str, known), *configs])}",
        where=reference.text,
        why=f"its {several} are {quoted(list(map(str, known))[:20])}{named}",
        remedy=f"write {_FORM}; parts of a split are not cut out: use --samples",
    )


def _recorded_name(
    reference: HubReference, local: Path, revision: str | None, config: str | None, split: str
) -> str:
    """The name without any folder of this machine, with the revision that was read."""
    name = local.resolve().name if local.is_dir() else reference.name
    commit = "" if revision is None else f"@{revision[:12]}"
    return ":".join(filter(None, (f"{PREFIX}{name}{commit}", config, split)))


def _rows(
    stream: Any, reference: HubReference, inputs: Sequence[TensorSpec], wanted: int, seed: int
) -> tuple[list[dict[str, Any]], Columns, Mapping[str, Any]]:
    """The drawn rows with the columns that are used, which ones these are, and the features known."""
    if wanted < 1:
        raise DataError(f"{wanted} samples asked for", remedy="pass --samples 1 or more")
    features: Mapping[str, Any] = stream.features or {}
    names = list(features) or list(next(iter(stream), {}))
    if not names:
        raise DataError("the dataset holds no rows", where=reference.text, remedy="name another split")
    columns = reference.columns.resolved(names, features, inputs, reference.text)
    stream = stream.select_columns(list(columns.used))
    if columns.image is not None and columns.image in features:
        from datasets import Image

        # The bytes as they are: decoding is done here, with the formats that are trusted.
        stream = stream.cast_column(columns.image, Image(decode=False))
    rows = list(itertools.islice(stream.shuffle(seed=seed, buffer_size=_BUFFER_ROWS), wanted))
    if not rows:
        raise DataError("the dataset holds no rows", where=reference.text, remedy="name another split")
    return rows, columns, features


@contextmanager
def _failures(source: str) -> Iterator[None]:
    """Turn what the datasets library raises into errors that say what to do."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    reference = parse_reference(source)
    try:
        yield
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise _gated(reference) from error
        raise _unreadable(source, error) from error
    except (HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise _unreachable(reference, f"{type(error).__name__}: {_first_line(error)}") from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise _unreadable(source, error) from error
        raise NotSupported(
            "the dataset is made by Python code of its own",
            where=source,
            why="code that comes with a dataset is never run",
            remedy="use a version of it in Parquet, CSV or JSON, or write module:function yourself",
        ) from error
    except (DatasetsError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: BaseException) -> DataError:
    return DataError(
        "the dataset cannot be read",
        where=source,
        why=f"{type(error).__name__}: {_first_line(error)}",
        remedy=f"check the name and its files; the form is {_FORM}",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
