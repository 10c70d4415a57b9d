"""Which outlier channels are worth treating: predicted noise against predicted time, over the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import onnx_ir as ir

from ...calibration.collect import SPREAD, TYPICAL
from ...graph.edit import constant, static_dim
from ...graph.errors import InternalError
from ...graph.model import Model
from ...graph.passes import Refusal
from ...graph.weights import MappedTensor
from ..plan import Decision
from .centre import Limits
from .outlier_noise import (
    Channels,
    Factors,
    Float32s,
    Float64s,
    Indices,
    Split,
    channels_of,
    choose_factors,
    split_options,
)
from .outliers import MIGRATE, Place, places
from .split import SPLIT, FeedForward, feed_forwards

# Integer multiply-accumulates in the time of one float one, and of one element of an elementwise operator.
# Measured: onnxruntime 1.31.1, AVX512-VNNI and AMX, MiniLM at 1 x 128 tokens, 1 thread: 2.9 ps and 5.3 ps
# an integer multiply-accumulate, 32 ps one of a narrow float product, 0.25 to 0.5 ns an element.
_FLOAT_COST, _ELEMENT_COST = 10.0, 100.0
_WORTHWHILE = 0.98

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlierChoice:
    """What to do with outlier channels, and why not elsewhere.

    `factors` is for `MigrateOutliers`, `channels` for `SplitOutliers`; `noise_before` and `noise_after` are
    predicted sums over all layers looked at, as fractions of the energy of their results.
    """

    factors: dict[str, Float64s]
    channels: dict[str, Indices]
    refused: tuple[Refusal, ...]
    noise_before: float
    noise_after: float


class _Migration(NamedTuple):
    place: Place
    found: Factors
    cost: float


class _Apart(NamedTuple):
    layer: FeedForward
    options: list[tuple[Split, float]]


def choose_outliers(
    model: Model,
    decisions: Sequence[Decision],
    limits: Limits,
    *,
    migrate: bool = True,
    split: bool = True,
) -> OutlierChoice:
    """Decide for each activation that a planned dynamic MatMul reads.

    Both are fractions of the whole: the noise that goes, of the noise of all layers looked at; the time
    that is added, of that of all planned products. What takes away more than it adds is done.

    Args:
        model: the graph that the limits are of.
        decisions: the plan's.
        limits: as `collect_channel_limits` gives them with `typical`: of a sample, each of shape
            (channels,), under an activation's name + `TYPICAL`, and of one deviation under name + `SPREAD`.
        migrate: whether `MigrateOutliers` may be used.
        split: whether `SplitOutliers` may be used.
    """
    planned = {item.node for item in decisions if item.form == "dynamic"}
    work = sum(_size(node) for node in model.graph if node.name in planned and node.op_type == "MatMul")
    migrations = [
        _Migration(place, found, _mul_cost(place) / work)
        for place in places(model)
        if any(product.name in planned for product in place.products)
        and (found := _factors(place, limits)) is not None
    ]
    known = {item.place.value for item in migrations}
    aparts = [
        _Apart(layer, [(option, _split_cost(layer, option) / work) for option in options])
        for layer in feed_forwards(model)
        if layer.down.name in planned and (options := _options(layer, limits))
    ]
    before = sum(item.found.before for item in migrations)
    before += sum(item.options[0][0].before for item in aparts if item.layer.hidden not in known)
    refused: list[Refusal] = []
    factors, gain = _worth_migrating(migrations, before, refused) if migrate else ({}, 0.0)
    left = [item for item in aparts if str(item.layer.hidden.name) not in factors]
    channels, more = _worth_splitting(left, before, refused) if split else ({}, 0.0)
    return OutlierChoice(
        factors=factors,
        channels=channels,
        refused=tuple(refused),
        noise_before=before,
        noise_after=before - gain - more,
    )


def _worth_migrating(
    migrations: Sequence[_Migration], whole: float, refused: list[Refusal]
) -> tuple[dict[str, Float64s], float]:
    """The factors that pay, and the noise that they take away."""
    factors, total = {}, 0.0
    for place, found, cost in migrations:
        gain = found.before - found.after
        if gain <= cost * whole or found.after > _WORTHWHILE * found.before:
            reason = _too_little(gain, whole, cost)
            refused.append(Refusal(node=place.products[0].name or "", rule=MIGRATE, reason=reason))
            continue
        factors[str(place.value.name)] = found.by
        total += gain
    return factors, total


def _worth_splitting(
    aparts: Sequence[_Apart], whole: float, refused: list[Refusal]
) -> tuple[dict[str, Indices], float]:
    """The channels whose computing apart pays, and the noise that it takes away."""
    channels, total = {}, 0.0
    for layer, options in aparts:
        best, cost = max(options, key=lambda pair: pair[0].before - pair[0].after - pair[1] * whole)
        gain = best.before - best.after
        if gain <= cost * whole:
            reason = _too_little(gain, whole, cost)
            refused.append(Refusal(node=layer.down.name or "", rule=SPLIT, reason=reason))
            continue
        channels[str(layer.hidden.name)] = best.chosen
        total += gain
    return channels, total


def _too_little(gain: float, whole: float, cost: float) -> str:
    share = gain / whole if whole else 0.0
    return f"{share:.1%} of the model's noise would go for {cost:.1%} more time in its products"


def _factors(place: Place, limits: Limits) -> Factors | None:
    found = _channels(place.value, place.products[0], limits)
    if found is None:
        return None
    return _read(
        [product.inputs[1] for product in place.products], lambda arrays: choose_factors(found, arrays)
    )


def _options(layer: FeedForward, limits: Limits) -> list[Split]:
    found = _channels(layer.hidden, layer.down, limits)
    if found is None:
        return []
    return _read([layer.down.inputs[1]], lambda arrays: split_options(found, arrays[0]))


def _channels(value: ir.Value, product: ir.Node, limits: Limits) -> Channels | None:
    """What is known of an activation, if it has as many channels as the weight has rows."""
    known, spread = limits.get(f"{value.name}{TYPICAL}"), limits.get(f"{value.name}{SPREAD}")
    if known is None or spread is None or len(known[0]) != static_dim(product.inputs[1], 0):
        return None
    return channels_of(known, spread)


def _read(weights: Sequence[ir.Value | None], use: Callable[[list[Float32s]], _T]) -> _T:
    """What `use` makes of the contents of weights, whose pages are given back."""
    arrays = [constant(weight) for weight in weights]
    if any(array is None for array in arrays):
        raise InternalError("a weight that was constant is not", where=str(weights[0] and weights[0].name))
    result = use([np.asarray(array, np.float32) for array in arrays])
    del arrays
    for weight in weights:
        if weight is not None and isinstance(weight.const_value, MappedTensor):
            weight.const_value.release()
    return result


def _size(node: ir.Node) -> int:
    weight = node.inputs[1]
    return 0 if weight is None or weight.const_value is None else int(weight.const_value.size)


def _mul_cost(place: Place) -> float:
    """Of a migration, in integer multiply-accumulates per token."""
    width = static_dim(place.products[0].inputs[1], 0) or 0
    return 0.0 if place.folds is not None else _ELEMENT_COST * width


def _split_cost(layer: FeedForward, option: Split) -> float:
    """Of channels computed apart, in integer multiply-accumulates per token.

    The narrow product reads all of its input, the Add two operands of the width of the result.
    """
    count = len(option.chosen)
    inputs, outputs = static_dim(layer.up.inputs[1], 0) or 0, static_dim(layer.down.inputs[1], 1) or 0
    elements = count * (2 + len(layer.function)) + inputs + 2 * outputs
    return _FLOAT_COST * count * (inputs + outputs) + _ELEMENT_COST * elements
