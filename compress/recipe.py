"""What is asked of a compile: the `Recipe`, its TOML form, and how a drift limit is written."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import msgspec
import tomli_w

from ..graph.errors import OutputError, RecipeError
from ..targets.profile import Form
from .drift_limit import DriftLimit as DriftLimit  # noqa: PLC0414 - a part of the recipe's own form
from .drift_limit import check_metrics_once
from .prune.report import Importance, Repair

SCHEMA_VERSION = 1

Precision = Literal["auto", "int8", "int8+fp16", "int8+bf16", "bf16", "bf16-compute", "fp16", "fp32"]
INT8_PRECISIONS: tuple[Precision, ...] = ("int8", "int8+fp16", "int8+bf16")
"""Precisions that ask for INT8 by name."""
Quantization = Literal["auto", "dynamic", "static", "weight-only"]
CalibMethod = Literal["auto", "minmax", "percentile", "entropy", "mse"]
SkippableStage = Literal["drift", "benchmark", "golden"]
IoDtype = Literal["fp32", "fp16", "bf16"]
GoldenSource = Literal["generated", "data"]
StaticActivation = Literal["uint8", "int8"]

# A change to any other field makes the pinned choices answers to another question.
_FIELDS_PINS_SURVIVE = frozenset(
    {"schema_version", "skip", "golden", "trust_code", "benchmark_rounds", "measure_seconds"}
    | {"max_memory_bytes", "pins"}
)
Shape = tuple[int, ...]


class ShapeRange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The least and the largest shape that an input takes; both with a size for every axis."""

    min: Shape
    max: Shape


class Pins(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The choices that a compile made by measuring: with them a replay times nothing.

    `model_sha256` and `data_sha256` say for which source graph and which calibration data the
    choices hold; `ranges_sha256` is the digest of the calibrated ranges, so that a replay can
    tell that it reached the same ones. `reverted` names the groups of nodes that went back to
    float for the drift limit, `fusions` says of each timed fusion whether it was kept. `forms` holds
    node by node what timing chose against the target's tables, `static_activation` the type of static
    activations where it is not the profile's, `pruned` the places of the units that were cut out of each
    group, `session_config` the entries that were the fastest.
    """

    model_sha256: str
    data_sha256: str | None = None
    precision: Precision
    quantization: Quantization | None = None
    calib_method: CalibMethod | None = None
    fusions: dict[str, bool] = {}
    forms: dict[str, Form] = {}
    static_activation: StaticActivation | None = None
    session_config: dict[str, str] | None = None
    reverted: tuple[str, ...] = ()
    rolled_back: tuple[str, ...] = ()
    pruned: dict[str, tuple[int, ...]] = {}
    ranges_sha256: str | None = None


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that is asked of one compile, apart from the places of its files.

    `io_dtype` is the type of the artifact's float32 inputs and outputs (fp32: as the model has them).
    `keep_float` holds regular expressions searched in node and weight names. `shapes` fixes input
    shapes for calibration inputs, counting and timing; `shape_ranges` adds the least and the largest
    shape to some of them. `threads` is what drift and benchmark run with. `samples` bounds the
    calibration samples, `max_memory_bytes` what calibrating static ranges holds, `eval_samples` those
    that drift is measured on (None: all that the data holds). `ranking_samples` are those that finding
    the worst groups of nodes may cost three forwards each, when a drift limit is exceeded;
    `prune` is the part of the multiply-accumulates that is cut out, `min_speedup` and `max_size_bytes` are
    goals for the compiled model that more is cut for; `prune_importance` says how units are ranked,
    `prune_repair` how layers that lost inputs are fitted.
    `benchmark_rounds` counts interleaved pairs of sessions. `fusions` switches single fusion rules on
    or off. `measure_seconds` bounds the timing of operators and switches on the host that the plan is
    made from (0: by the profile alone); `allow_unmeasured` takes lowerings that nothing is known of.
    `pins` is absent in a recipe that a person wrote.

    Raises:
        RecipeError: if a field's value is out of its range or not a valid regular expression.
    """

    schema_version: int = SCHEMA_VERSION
    target: str
    target_overrides: dict[str, str] = {}
    precision: Precision = "auto"
    io_dtype: IoDtype = "fp32"
    quantization: Quantization = "auto"
    calib_method: CalibMethod = "auto"
    prune: float | None = None
    min_speedup: float | None = None
    max_size_bytes: int | None = None
    prune_importance: Importance = "obs"
    prune_repair: Repair = "least-squares"
    max_drift: tuple[DriftLimit, ...] = (DriftLimit(limit=0.01),)
    keep_float: tuple[str, ...] = ()
    shapes: dict[str, Shape] = {}
    shape_ranges: dict[str, ShapeRange] = {}
    threads: int = 1
    samples: int | None = None
    max_memory_bytes: int | None = None
    eval_samples: int | None = None
    ranking_samples: int = 128
    benchmark_rounds: int = 5
    measure_seconds: int = 10
    allow_unmeasured: bool = False
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
        for field in ("samples", "max_memory_bytes", "eval_samples", "ranking_samples", "benchmark_rounds"):
            value = getattr(self, field)
            if value is not None:
                _check_at_least(value, 1, field)
        _check_at_least(self.measure_seconds, 0, "measure_seconds")
        if self.prune is not None and not 0 < self.prune < 1:
            raise _bad_value("prune", self.prune, "a part between 0 and 1, such as 0.5 or 50%")
        if self.min_speedup is not None and not 1 < self.min_speedup <= 1000:
            raise _bad_value("min_speedup", self.min_speedup, "a number of times above 1, such as 2x")
        if self.max_size_bytes is not None:
            _check_at_least(self.max_size_bytes, 1, "max_size_bytes")
        if not 0 <= self.seed < 2**32:
            raise _bad_value("seed", self.seed, "a whole number from 0 to 4294967295")
        if not self.target:
            raise _bad_value("target", self.target, "the name of a target or the path of a profile")
        for index, pattern in enumerate(self.keep_float):
            _check_regex(pattern, f"keep_float[{index}]")
        for name, dims in self.shapes.items():
            if any(size < 1 for size in dims):
                raise _bad_value(f"shapes.{name}", dims, "a list of sizes from 1 upwards")
        for name, limits in self.shape_ranges.items():
            _check_range(name, limits, self.shapes.get(name))
        check_metrics_once(self.max_drift)

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


def _check_range(name: str, limits: ShapeRange, shape: Shape | None) -> None:
    """Raise unless 1 <= min <= shape <= max holds on every axis."""
    if shape is None:
        raise _bad_value(f"shape_ranges.{name}", name, "a range only to inputs that shapes names, too")
    triples = list(zip(limits.min, shape, limits.max, strict=False))
    ranks = {len(limits.min), len(shape), len(limits.max)}
    if len(ranks) > 1 or not all(1 <= least <= usual <= most for least, usual, most in triples):
        raise RecipeError(
            f"the range of shapes of {name!r} is not in order",
            where=f"shape_ranges.{name}",
            why=f"min {_times(limits.min)}, usual {_times(shape)}, max {_times(limits.max)}",
            remedy="give as many sizes to each, on every axis 1 <= min <= usual <= max",
        )


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))


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
    ranges = tables.get("shape_ranges")
    for name, entry in (ranges if isinstance(ranges, dict) else {}).items():
        if isinstance(entry, dict):
            _refuse_unknown_in(f"shape_ranges.{name}.", entry, ShapeRange, where)
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
