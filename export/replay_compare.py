"""Two machines' results of the same kernel on the same inputs, held against each other bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from ..runtimes.base import Array

_WRONG_STEPS = 1.0
WRONG_FRACTION = 1e-3
"""Floats are wrong that are further off than this fraction of the largest of them."""
_CLEARLY = 4.0
_Q_PER_AXIS, _Q_KNOWN = 13, 21
_MISSING = (float("inf"), 1.0)


class Difference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far results are apart.

    Attributes:
        elements: of all arrays.
        differing: how many elements are not the same bits.
        integers_differing: how many of them are integers.
        steps: the largest difference of two integers.
        max_abs: the largest difference of two finite floats; `fraction` the same in one array, as a fraction
            of the largest finite float there on this machine.
        ulps: the most representable floats between two, None where one is not finite or is missing.
        shapes: whether shapes and types agree.
    """

    elements: int = 0
    differing: int = 0
    integers_differing: int = 0
    steps: int = 0
    max_abs: float = 0.0
    fraction: float = 0.0
    ulps: int | None = 0
    shapes: bool = True

    @property
    def identical(self) -> bool:
        """Whether all bits are the same."""
        return self.shapes and not self.differing


def compare(host: Sequence[Array], device: Sequence[Array]) -> Difference:
    """Results in the same order, on this machine and on a device."""
    total = Difference(shapes=len(host) == len(device))
    for mine, other in zip(host, device, strict=False):
        total = _together(total, _compare_one(mine, other))
    return total


def _compare_one(mine: Array, other: Array) -> Difference:
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return Difference(elements=mine.size, differing=mine.size, ulps=None, shapes=False)
    if mine.dtype.kind in "iub":
        apart = np.abs(mine.astype(np.int64) - other.astype(np.int64))
        count = int(np.count_nonzero(apart))
        return Difference(
            elements=mine.size, differing=count, integers_differing=count, steps=int(apart.max(initial=0))
        )
    if mine.dtype.kind != "f":
        count = int(np.count_nonzero(np.asarray(mine != other)))
        return Difference(elements=mine.size, differing=count, ulps=None if count else 0)
    bits = np.dtype(f"u{mine.dtype.itemsize}")
    unlike = np.ascontiguousarray(mine).view(bits) != np.ascontiguousarray(other).view(bits)
    count = int(np.count_nonzero(unlike))
    if not count:
        return Difference(elements=mine.size)
    first, second = np.asarray(mine)[unlike], np.asarray(other)[unlike]
    finite = np.isfinite(first) & np.isfinite(second)
    wide = np.abs(first[finite].astype(np.float64) - second[finite].astype(np.float64))
    furthest = float(wide.max(initial=0.0))
    return Difference(
        elements=mine.size,
        differing=count,
        max_abs=furthest,
        fraction=furthest / _largest(mine),
        ulps=int(ulps_between(first, second).max(initial=0)) if finite.all() else None,
    )


def _largest(values: Array) -> float:
    """The largest finite magnitude; 1 where there is none but 0."""
    wide = np.abs(np.asarray(values, np.float64))
    return float(wide[np.isfinite(wide)].max(initial=0.0)) or 1.0


def ulps_between(first: Array, second: Array) -> npt.NDArray[np.int64]:
    """How many steps of their type two arrays of finite floats of one shape are apart; 0 and -0 are none."""
    width = first.dtype.itemsize
    places = []
    for values in (first, second):
        bits = np.ascontiguousarray(values).view(f"i{width}").astype(np.int64)
        magnitude = bits & np.int64((1 << (8 * width - 1)) - 1)
        places.append(np.where(bits < 0, -magnitude, magnitude))
    apart: npt.NDArray[np.int64] = np.abs(places[0] - places[1])
    return apart


def _together(first: Difference, second: Difference) -> Difference:
    return Difference(
        elements=first.elements + second.elements,
        differing=first.differing + second.differing,
        integers_differing=first.integers_differing + second.integers_differing,
        steps=max(first.steps, second.steps),
        max_abs=max(first.max_abs, second.max_abs),
        fraction=max(first.fraction, second.fraction),
        ulps=None if first.ulps is None or second.ulps is None else max(first.ulps, second.ulps),
        shapes=first.shapes and second.shapes,
    )


class Judgement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far two machines' results are from the operators' definition, in steps of the integers, or as a
    fraction of the largest value for floats.

    Attributes:
        host: the largest distance on this machine.
        device: the largest distance on the device.
        wrong: who is wrong: "host", "device", "both" or "neither" (both within one step, or 0.1 %).
    """

    host: float
    device: float
    wrong: str


def judge(
    data: bytes, feeds: Sequence[Array], host: Sequence[Array], device: Sequence[Array]
) -> Judgement | None:
    """Who is right, by ONNX's reference implementation; None where it has none of an operator.

    Args:
        data: a unit's model.
        feeds: i0, i1, ….
        host: the results on this machine.
        device: the results on the device.
    """
    expected = _reference(data, feeds)
    if expected is None:
        return None
    found = {}
    for name, results in (("host", host), ("device", device)):
        far = [_distance(right, result) for right, result in zip(expected, results, strict=False)]
        far += [_MISSING] * (len(results) != len(expected))
        found[name] = max(far, key=lambda item: item[0] / item[1])
    bad = {name: far > limit for name, (far, limit) in found.items()}
    apart = {name: far for name, (far, _) in found.items()}
    if all(bad.values()):
        # A definition that neither follows to the letter, unless the device is clearly further away. (Where
        # this machine is, the device is not right for that.)
        wrong = "device" if apart["device"] > _CLEARLY * apart["host"] else "both"
    else:
        wrong = next((name for name, is_bad in bad.items() if is_bad), "neither")
    return Judgement(host=apart["host"], device=apart["device"], wrong=wrong)


def _distance(expected: Array, found: Array) -> tuple[float, float]:
    """(distance, what is allowed)."""
    if expected.shape != found.shape:
        return _MISSING
    right, given = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    same = (right == given) | (np.isnan(right) & np.isnan(given))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(right - given))
    far = float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0))
    if np.asarray(found).dtype.kind in "iub":
        return far, _WRONG_STEPS
    return far / _largest(right), WRONG_FRACTION


def _reference(data: bytes, feeds: Sequence[Array]) -> list[Array] | None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load_model_from_string(data)
    for opset in model.opset_import:
        # It knows QuantizeLinear and DequantizeLinear from 19 on only; what they and the operators between
        # them do with these attributes and inputs has been the same since 13.
        if opset.domain in ("", "ai.onnx") and _Q_PER_AXIS <= opset.version < _Q_KNOWN:
            opset.version = _Q_KNOWN
    try:
        evaluator = ReferenceEvaluator(model)
        names = evaluator.input_names
        with np.errstate(over="ignore", invalid="ignore"):
            return [np.asarray(value) for value in evaluator.run(None, dict(zip(names, feeds, strict=True)))]
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # operators of com.microsoft, types that it does not know
