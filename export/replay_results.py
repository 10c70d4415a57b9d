"""What replaying a bundle's kernels on a device came to: values that serialise, and how they are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from ..runtimes.base import Array
from ..runtimes.replay import Played
from .replay_compare import WRONG_FRACTION, Difference, Judgement, compare, judge
from .replay_record import Recording
from .replay_rounding import TOLD, Rounding, rounding_of
from .replay_units import QUANTIZING_OPS, is_integer_kernel, is_integer_operator

State = Literal["identical", "rounds otherwise", "differs", "this machine is wrong", "not run"]
_MOST_JUDGED, _JUDGED_SAMPLES = 12, 3
_CARRIERS = frozenset({"Cast", "DequantizeLinear", "QuantizeLinear", "Reshape", "Transpose"})


class UnitResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One unit, on this machine and on the device.

    Attributes:
        unit: the name of its operator in the graph; `places` more have the same operator and weights.
        kernel: what the device's runtime ran for it, and `kernel_here` this machine's.
        integer: whether it computes in integers on the device.
        state: "rounds otherwise" is a kernel that both machines compute bit for bit as its source says,
            which rounds otherwise on the one than on the other.
        difference: None where one of the two did not run.
        judgement: who is right, where they differ and that could be computed (in the first samples that do).
        why: in words.
    """

    unit: str
    places: int
    kernel: str
    kernel_here: str
    integer: bool
    state: State
    difference: Difference | None = None
    judgement: Judgement | None = None
    why: str | None = None

    @property
    def failed(self) -> bool:
        """Whether the device is to blame: it did not run at all, or what its integer kernel gives is wrong.

        Integers must be the same, and so must types and shapes. Floats of an integer kernel may be some
        roundings apart; more than that is to blame on the device unless this machine is shown to be wrong.
        """
        if self.state == "not run":
            return True
        found = self.difference
        if self.state != "differs" or not self.integer or found is None:
            return False
        if not found.shapes or found.integers_differing:
            return True
        if self.judgement is not None and self.judgement.wrong in ("device", "neither"):
            return self.judgement.wrong == "device"
        return found.ulps is None or found.fraction > WRONG_FRACTION


def unit_results(
    recording: Recording, here: Sequence[Played], there: Sequence[Played], device: str
) -> tuple[UnitResult, ...]:
    """Every unit of a recording, in its order.

    Args:
        recording: the units and what they were fed.
        here: what this machine made of them.
        there: what the device made of them.
        device: its name.
    """
    results, judged = [], 0
    for index in range(len(recording.models)):
        pair = (here[index], there[index])
        result = _result(recording, index, pair, device, may_judge=judged < _MOST_JUDGED)
        judged += result.judgement is not None
        results.append(result)
    return tuple(results)


def _result(
    recording: Recording, index: int, pair: tuple[Played, Played], device: str, *, may_judge: bool
) -> UnitResult:
    (mine, other), item = pair, recording.models[index]
    kernel, kernel_here = kernel_name(other.kernels), kernel_name(mine.kernels)
    base = UnitResult(
        unit=item.name,
        places=len(item.places),
        kernel=kernel if other.error is None else item.operator,
        kernel_here=kernel_here if mine.error is None else item.operator,
        integer=item.unit.moves or is_integer_kernel(other.kernels),
        state="identical",
    )
    if mine.error is not None or other.error is not None:
        where, reason = (device, other.error) if other.error is not None else ("this machine", mine.error)
        return msgspec.structs.replace(base, state="not run", why=f"on {where}: {reason}")
    difference = compare(_flat(mine), _flat(other))
    found = msgspec.structs.replace(base, difference=difference)
    if difference.identical:
        return found
    rounding = _rounding(recording, index, mine, other)
    if rounding is not None:
        return msgspec.structs.replace(found, state="rounds otherwise", why=rounding)
    why = None
    if set(mine.kernels) != set(other.kernels):
        why = f"{device} runs {kernel} where this machine runs {kernel_here}"
    may_judge = may_judge or difference.integers_differing > 0  # the verdict hangs on it
    judgement = _judged(recording, index, mine, other) if may_judge and difference.shapes else None
    here_is_wrong = judgement is not None and judgement.wrong == "host"
    state: State = "this machine is wrong" if here_is_wrong else "differs"
    return msgspec.structs.replace(found, state=state, judgement=judgement, why=why)


def kernel_name(kernels: Mapping[str, int]) -> str:
    """The kernels that a unit came to, as one name: its integer operators if it has some."""
    integers = sorted(name for name in kernels if is_integer_operator(name))
    if integers:
        return " + ".join(integers)
    computing = sorted(name for name in kernels if name not in _CARRIERS)
    if computing and QUANTIZING_OPS & kernels.keys() - {"DynamicQuantizeLinear"}:
        return f"{' + '.join(computing)} in float"
    return " + ".join(computing or sorted(kernels)) or "none"


def _rounding(recording: Recording, index: int, mine: Played, other: Played) -> str | None:
    """In words, if all samples differ only in how both machines' kernels are known to round."""
    unit = recording.models[index].unit
    told: dict[tuple[Rounding, Rounding], None] = {}
    for sample, names in enumerate(recording.feeds[index]):
        first, second = mine.outputs[sample], other.outputs[sample]
        if len(first) != 1 or first[0].tobytes() == second[0].tobytes():
            continue
        feeds = _load(recording, names)
        here, there = (rounding_of(unit, feeds, results[0]) for results in (first, second))
        if here is None or there is None or here == there:
            return None
        told[here, there] = None
    if len(told) != 1:
        return None
    here, there = next(iter(told))
    return f"there {TOLD[there]}, here {TOLD[here]}; all bits are as computed so"


def _judged(recording: Recording, index: int, mine: Played, other: Played) -> Judgement | None:
    """Who is right in the samples that differ; of several judgements the one that is worst for the device."""
    found: list[Judgement] = []
    for sample, names in enumerate(recording.feeds[index]):
        here, there = mine.outputs[sample], other.outputs[sample]
        if compare(here, there).identical:
            continue
        judgement = judge(recording.models[index].data, _load(recording, names), here, there)
        if judgement is None:
            return None
        found.append(judgement)
        if len(found) == _JUDGED_SAMPLES:
            break
    return max(found, key=lambda item: _GRAVITY[item.wrong], default=None)


_GRAVITY = {"neither": 0, "host": 1, "both": 2, "device": 3}


def _load(recording: Recording, names: Sequence[str]) -> list[Array]:
    return [np.load(recording.folder / name, allow_pickle=False) for name in names]


def _flat(played: Played) -> list[Array]:
    return [array for sample in played.outputs for array in sample]
