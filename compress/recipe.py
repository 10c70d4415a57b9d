"""What is asked of a compile: the `Recipe`, its TOML form, and how a drift limit is written."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import msgspec
import tomli_w

from ..graph.errors import OutputError, RecipeError

SCHEMA_VERSION = 1

Precision = Literal["auto", "int8", "bf16", "fp16", "fp32"]
Quantization = Literal["auto", "dynamic", "static", "weight-only"]
CalibMethod = Literal["auto", "minmax", "percentile", "entropy", "mse"]
SkippableStage = Literal["drift", "benchmark", "golden"]
GoldenSource = Literal["generated", "data"]

# The names of calibration.limits.LIMIT_METRICS, which importing would make --help slow (a test compares).
METRICS = ("cosine", "l2", "sqnr", "kl", "top1", "flips", "accuracy", "f1", "spearman")

# A change to any other field makes the pinned choices answers to another question.
_FIELDS_PINS_SURVIVE = frozenset({"schema_version", "skip", "golden", "trust_code", "pins"})

_METRIC_NAME = re.compile(r"[a-z][a-z0-9_-]*", re.IGNORECASE)
_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?|\.[0-9]+(?:e[+-]?[0-9]+)?"
_LIMIT = re.compile(rf"(?P<number>{_NUMBER})\s*(?P<unit>%|db)?", re.IGNORECASE)


class DriftLimit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One bound on the change against the reference model.

    `metric` is None for the model's default metric. `limit` is a fraction (0.01 for 1 %) or, for
    `sqnr`, decibels; whether it bounds from above or below is the metric's own business.
    """

    metric: str | None = None
    limit: float

    def __post_init__(self) -> None:
        if self.metric is not None and self.metric not in METRICS:
            near = difflib.get_close_matches(self.metric, METRICS, n=2, cutoff=0.5)
            raise RecipeError(
                f"unknown drift metric {self.metric!r}",
                where="max_drift",
                remedy=f"did you mean {' or '.join(near)}?" if near else f"give one of {', '.join(METRICS)}",
            )
        if not math.isfinite(self.limit) or self.limit < 0:
            raise RecipeError(
                f"drift limit {self.limit!r} is not a number from 0 upwards",
                where="max_drift",
                remedy="give a limit such as 1%, cosine=0.01 or sqnr=30dB",
            )


class Pins(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The choices that a compile made by measuring: with them a replay times nothing.

    `model_sha256` and `data_sha256` say for which source graph and which calibration data the
    choices hold; `ranges_sha256` is the digest of the calibrated ranges, so that a replay can
    tell that it reached the same ones. `reverted` names the groups of nodes that went back to
    float for the drift limit, `fusions` says of each timed fusion whether it was kept.
    """

    model_sha256: str
    data_sha256: str | None = None
    precision: Precision
    quantization: Quantization | None = None
    calib_method: CalibMethod | None = None
    fusions: dict[str, bool] = {}
    reverted: tuple[str, ...] = ()
    rolled_back: tuple[str, ...] = ()
    ranges_sha256: str | None = None


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is asked of one compile, apart from the places of its files.

    `keep_float` holds regular expressions searched in node and weight names. `shapes` fixes input
    shapes for calibration inputs and timing. `threads` is what drift and benchmark run with.
    `samples` bounds the calibration samples (None: all that the data holds). `fusions` switches
    single fusion rules on or off. `pins` is absent in a recipe that a person wrote.

    Raises:
        RecipeError: if a field's value is out of its range or not a valid regular expression.
    """

    schema_version: int = SCHEMA_VERSION
    target: str
    target_overrides: dict[str, str] = {}
    precision: Precision = "auto"
    quantization: Quantization = "auto"
    calib_method: CalibMethod = "auto"
    max_drift: tuple[DriftLimit, ...] = (DriftLimit(limit=0.01),)
    keep_float: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = {}
    threads: int = 1
    samples: int | None = None
    seed: int = 0
    skip: tuple[SkippableStage, ...] = ()
    golden: GoldenSource = "generated"
    data_free: bool = False
    trust_code: bool = False
    fusions: dict[str, bool] = {}
    pins: Pins | None = None

    def __post_init__(self) -> None:
        _check_version(self.schema_version, "schema_version")
        _check_at_least(self.threads, 1, "threads")
        if self.samples is not None:
            _check_at_least(self.samples, 1, "samples")
        if not 0 <= self.seed < 2**32:
            raise _bad_value("seed", self.seed, "a whole number from 0 to 4294967295")
        if not self.target:
            raise _bad_value("target", self.target, "the name of a target or the path of a profile")
        for index, pattern in enumerate(self.keep_float):
            _check_regex(pattern, f"keep_float[{index}]")
        for name, dims in self.shapes.items():
            if any(size < 1 for size in dims):
                raise _bad_value(f"shapes.{name}", dims, "a list of sizes from 1 upwards")
        _check_metrics_once(self.max_drift)

    @property
    def override_texts(self) -> tuple[str, ...]:
        """The overrides in the form of --set, as `targets.registry.load_target` takes them."""
        return tuple(f"target.{field}={value}" for field, value in self.target_overrides.items())


def read_recipe(path: Path, *, target: str | None = None) -> Recipe:
    """Read a recipe file; `target` stands in where the file names none.

    Raises:
        RecipeError: if the file is missing, is not TOML, has an unknown key, a value of the wrong
            type or range, or a schema version that this edgepress does not read.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(
            "the recipe file does not exist", where=str(path), remedy="check the path given to --recipe"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            "the recipe file cannot be read",
            where=str(path),
            why=str(error),
            remedy="give a readable UTF-8 TOML file, such as the recipe.toml of a bundle",
        ) from error
    return parse_recipe(text, where=str(path), target=target)


def parse_recipe(text: str, *, where: str = "recipe", target: str | None = None) -> Recipe:
    """Build a recipe from TOML text; `where` names its source in errors, `target` is the fallback.

    Raises:
        RecipeError: as `read_recipe`.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            "the recipe is not valid TOML",
            where=where,
            why=str(error),
            remedy="mend that line; `edgepress compile … --dry-run` prints a valid recipe to start from",
        ) from error
    # A newer file may hold keys of its own: its version is the better complaint.
    version = tables.get("schema_version", SCHEMA_VERSION)
    _check_version(version, f"{where}: schema_version")
    _refuse_unknown_keys(tables, where)
    if "target" not in tables:
        if target is None:
            raise RecipeError(
                "the recipe names no target",
                where=where,
                remedy='add target = "…" to it or give --target; `edgepress targets list` shows them',
            )
        tables["target"] = target
    try:
        return msgspec.convert(tables, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(
            "the recipe has a value that is not allowed",
            where=where,
            why=_without_root(str(error)),
            remedy="mend that value; docs/commands.md lists what each option accepts",
        ) from error
    except RecipeError as error:
        raise RecipeError(
            error.what, where=f"{where}: {error.where}", why=error.why, remedy=error.remedy
        ) from None


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML text that `parse_recipe` reads back to an equal value."""
    header = (
        f"# edgepress recipe, schema version {recipe.schema_version}.\n"
        "# Replay: edgepress compile MODEL --recipe THIS_FILE -o OUT\n"
    )
    return header + tomli_w.dumps(_without_none(msgspec.to_builtins(recipe)))


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write `to_toml(recipe)` to a file.

    Raises:
        OutputError: if the file cannot be written.
    """
    try:
        path.write_bytes(to_toml(recipe).encode())
    except OSError as error:
        raise OutputError(
            "the recipe cannot be written",
            where=str(path),
            why=error.strerror,
            remedy="choose another place or free some space",
        ) from error


def override(recipe: Recipe, given: Mapping[str, object]) -> Recipe:
    """The recipe with the fields of `given` in place of its own.

    The pins are dropped when a field changes that the pinned choices depend on.

    Raises:
        RecipeError: if a value is out of its range.
    """
    values: dict[str, object] = {name: getattr(recipe, name) for name in Recipe.__struct_fields__}
    changed = {name for name, value in given.items() if values[name] != value}
    values.update(given)
    if changed - _FIELDS_PINS_SURVIVE:
        values["pins"] = given.get("pins")
    try:
        return msgspec.convert(values, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(
            "an option has a value that is not allowed",
            why=_without_root(str(error)),
            remedy="see `edgepress compile --help`",
        ) from error


def parse_drift_limits(text: str) -> tuple[DriftLimit, ...]:
    """Read `[METRIC=]LIMIT[,…]`: "1%", "cosine=1%,flips=0.02", "sqnr=30dB".

    Per cent become fractions; `sqnr` is in decibels, with or without the unit.

    Raises:
        RecipeError: if a part is empty, has no number, a negative or infinite one, a unit that
            does not fit its metric, or a metric that was already given.
    """
    limits = tuple(_parse_drift_limit(part.strip(), text) for part in text.split(","))
    _check_metrics_once(limits)
    return limits


def _parse_drift_limit(part: str, whole: str) -> DriftLimit:
    metric, equals, number = part.rpartition("=")
    metric, number = metric.strip().lower(), number.strip()
    match = _LIMIT.fullmatch(number)
    if not match or (equals and not _METRIC_NAME.fullmatch(metric)):
        raise _bad_drift_limit(part, whole, "it is not [METRIC=]LIMIT with a number from 0 upwards")
    value = float(match["number"])
    unit = (match["unit"] or "").lower()
    if unit == "db" and metric != "sqnr":
        raise _bad_drift_limit(part, whole, "only sqnr is measured in dB")
    if unit == "%" and metric == "sqnr":
        raise _bad_drift_limit(part, whole, "sqnr is measured in dB, not in per cent")
    if not math.isfinite(value):
        raise _bad_drift_limit(part, whole, "the number is too large")
    return DriftLimit(metric=metric or None, limit=value / 100 if unit == "%" else value)


def _bad_drift_limit(part: str, whole: str, why: str) -> RecipeError:
    return RecipeError(
        f"{part!r} is not a drift limit",
        where=f"--max-drift {whole}",
        why=why,
        remedy="give --max-drift 1%, --max-drift cosine=1%,flips=0.02 or --max-drift sqnr=30dB",
    )


def _check_metrics_once(limits: tuple[DriftLimit, ...]) -> None:
    metrics = [limit.metric for limit in limits]
    for metric in metrics:
        if metrics.count(metric) > 1:
            raise RecipeError(
                f"two drift limits for {metric or 'the default metric'}",
                where="max_drift",
                remedy="give each metric once",
            )


def _check_version(version: object, where: str) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise _bad_value(where, version, f"a whole number; this edgepress writes {SCHEMA_VERSION}")
    if version > SCHEMA_VERSION:
        raise RecipeError(
            f"the recipe has schema version {version}, this edgepress reads up to {SCHEMA_VERSION}",
            where=where,
            remedy="upgrade edgepress: pip install --upgrade edgepress",
        )


def _check_at_least(value: int, least: int, field: str) -> None:
    if value < least:
        raise _bad_value(field, value, f"a whole number from {least} upwards")


def _check_regex(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"{pattern!r} is not a regular expression",
            where=where,
            why=str(error),
            remedy="escape special characters: a literal dot is \\., a literal bracket is \\[",
        ) from error


def _bad_value(where: str, value: object, wanted: str) -> RecipeError:
    return RecipeError(f"{value!r} is not allowed here", where=where, remedy=f"give {wanted}")


def _refuse_unknown_keys(tables: dict[str, object], where: str) -> None:
    """Raise for a key that no table of the recipe has, with its path and the nearest names."""
    _refuse_unknown_in("", tables, Recipe, where)
    pins = tables.get("pins")
    if isinstance(pins, dict):
        _refuse_unknown_in("pins.", pins, Pins, where)
    limits = tables.get("max_drift")
    for index, entry in enumerate(limits if isinstance(limits, list) else []):
        if isinstance(entry, dict):
            _refuse_unknown_in(f"max_drift[{index}].", entry, DriftLimit, where)


def _refuse_unknown_in(prefix: str, table: dict[str, object], kind: type[msgspec.Struct], where: str) -> None:
    known = kind.__struct_fields__
    for key in table:
        if key in known:
            continue
        near = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=3)
        raise RecipeError(
            f"unknown key {prefix + key!r}",
            where=where,
            why=f"the keys of this table are {', '.join(known)}",
            remedy=f"did you mean {' or '.join(prefix + name for name in near)}?"
            if near
            else "remove the key",
        )


def _without_root(message: str) -> str:
    """msgspec's message with its JSON path ("at `$.pins`") turned into a TOML one."""
    return message.replace("`$.", "`").replace(" - at `$`", "")


def _without_none(table: dict[str, object]) -> dict[str, object]:
    """A table without its None entries, which TOML cannot express; nested tables too."""
    return {key: _plain(item) for key, item in table.items() if item is not None}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return _without_none(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def choices(literal: object) -> tuple[str, ...]:
    """The values of one of this module's Literal types, in order."""
    return tuple(get_args(literal))
