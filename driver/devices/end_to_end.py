"""A whole model on two machines: how far apart, and how far this machine is from itself in equal forms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np

from ...export.golden import difference, failures
from ...export.manifest import Manifest
from ...export.samples import Feeds
from ...graph.errors import DataError
from ...runtimes.base import Array
from ...runtimes.replay import Played

Verdict = Literal["identical", "within the spread", "beyond the spread", "not run"]
_MARGIN = 4.0


class Apart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far two sets of outputs are apart, each figure the worst over outputs and samples.

    `relative_l2` and `cosine_distance` are of floats, `mismatch_fraction` of others.
    """

    identical: bool
    max_abs: float
    relative_l2: float
    cosine_distance: float
    mismatch_fraction: float = 0.0

    @property
    def far(self) -> float:
        """One number to compare by."""
        return max(self.relative_l2, self.mismatch_fraction)


class EndToEnd(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole model on the golden samples.

    Attributes:
        samples: how many.
        verdict: the device against this machine, by the spread.
        from_record: the device from the outputs that the bundle carries, and whether that is within the
            manifest's tolerance.
        from_here: the device from this machine, whose runtime optimises as the target's.
        from_arm: the device from this machine with sums of integers spelled out as 64-bit Arm computes them;
            None where the graph has none, or the device is no such.
        spread: name of an equal form -> how far this machine is from itself in it.
        widest: the largest finite `far` of the spread, or what the manifest measured if that is more.
        drift_here: this machine from the untouched model; None without one.
        drift_there: the device from the untouched model.
        kernels: operator -> kernels of it that the device ran for one sample.
        kernels_here: the same on this machine.
        problems: what the manifest's tolerance does not allow.
        error: why it did not run there.
    """

    samples: int
    verdict: Verdict
    from_record: Apart | None = None
    within_tolerance: bool | None = None
    from_here: Apart | None = None
    from_arm: Apart | None = None
    spread: dict[str, Apart]
    widest: float
    drift_here: Apart | None = None
    drift_there: Apart | None = None
    kernels: dict[str, int] = {}
    kernels_here: dict[str, int] = {}
    problems: tuple[str, ...] = ()
    error: str | None = None

    @property
    def identical(self) -> bool:
        """Whether the device gives this machine's bits, with its own or with Arm's sums."""
        return any(item is not None and item.identical for item in (self.from_here, self.from_arm))

    @property
    def failed(self) -> bool:
        """Whether it did not run, or is beyond the tolerance and far beyond this machine's own spread."""
        if self.from_here is None:
            return True
        return not self.within_tolerance and self.from_here.far > _MARGIN * self.widest


def end_to_end(
    manifest: Manifest,
    recorded: Sequence[Feeds],
    *,
    here: Played,
    there: Played,
    variants: Mapping[str, Played],
    baseline: Sequence[Feeds] | None,
    arm: Played | None = None,
) -> EndToEnd:
    """Compare the whole model's outputs.

    Args:
        manifest: of the bundle.
        recorded: the golden outputs per sample.
        here: this machine's outputs.
        there: the device's outputs.
        variants: this machine's outputs in equal forms.
        baseline: outputs of the untouched model per sample.
        arm: this machine's outputs with sums as 64-bit Arm computes them.
    """
    names = [spec.name for spec in manifest.model.outputs]
    mine = _by_name(here, names)
    spread = {name: apart(mine, _by_name(item, names)) for name, item in variants.items()}
    # A form that overflows here says nothing of roundings.
    widest = max((item.far for item in spread.values() if math.isfinite(item.far)), default=0.0)
    widest = max(widest, _measured(manifest))
    samples = max(len(here.outputs), 1)
    if there.error is not None:
        return EndToEnd(
            samples=len(here.outputs), verdict="not run", spread=spread, widest=widest, error=there.error
        )
    other = _by_name(there, names)
    found = apart(mine, other)
    from_arm = None if arm is None else apart(_by_name(arm, names), other)
    nearest = min((item for item in (found, from_arm) if item is not None), key=lambda item: item.far)
    problems = _problems(manifest, recorded, other)
    return EndToEnd(
        samples=len(other),
        verdict=(
            "identical"
            if found.identical or nearest.identical
            else "within the spread"
            if nearest.far <= widest
            else "beyond the spread"
        ),
        from_record=apart(recorded, other),
        within_tolerance=not problems,
        from_here=found,
        from_arm=from_arm,
        spread=spread,
        widest=widest,
        drift_here=None if baseline is None else apart(baseline, mine),
        drift_there=None if baseline is None else apart(baseline, other),
        kernels={name: count // samples for name, count in sorted(there.kernels.items())},
        kernels_here={name: count // samples for name, count in sorted(here.kernels.items())},
        problems=tuple(problems),
    )


def apart(reference: Sequence[Feeds], candidate: Sequence[Feeds]) -> Apart:
    """The worst over outputs and samples; both in the same order of samples.

    Raises:
        DataError: if an output has another shape or kind of type, or is missing.
    """
    cosine = l2 = largest = mismatch = 0.0
    identical = True
    for first, second in zip(reference, candidate, strict=True):
        for name, array in first.items():
            other = second.get(name)
            if other is None or other.shape != array.shape:
                raise DataError(
                    f"output {name!r} has another shape than in what it is compared with",
                    why="missing" if other is None else f"{list(other.shape)} instead of {list(array.shape)}",
                )
            if other.dtype.kind != array.dtype.kind:
                raise DataError(
                    f"output {name!r} has another type than in what it is compared with",
                    why=f"{other.dtype} instead of {array.dtype}",
                )
            found = difference(array, other)
            identical = identical and found.identical
            cosine = max(cosine, found.cosine_distance or 0.0)
            l2 = max(l2, found.relative_l2 or 0.0)
            mismatch = max(mismatch, found.mismatch_fraction or 0.0)
            largest = max(largest, _max_abs(array, other))
    return Apart(
        identical=identical,
        max_abs=largest,
        relative_l2=l2,
        cosine_distance=cosine,
        mismatch_fraction=mismatch,
    )


def _max_abs(first: Array, second: Array) -> float:
    if first.dtype.kind not in "fiub" or second.dtype.kind not in "fiub":
        return 0.0
    one, other = first.astype(np.float64), second.astype(np.float64)
    if not np.array_equal(np.isfinite(one), np.isfinite(other)):
        return math.inf
    both = np.isfinite(one)
    return float(np.max(np.abs(one[both] - other[both]), initial=0.0))


def _by_name(played: Played, names: Sequence[str]) -> list[Feeds]:
    return [dict(zip(names, sample, strict=True)) for sample in played.outputs]


def _measured(manifest: Manifest) -> float:
    """The largest spread that was measured when the bundle was made, over further inputs, too."""
    golden = manifest.golden
    pairs = [
        pair
        for tolerance in (golden.tolerances if golden is not None else ())
        for pair in (tolerance.relative_l2, tolerance.mismatch_fraction)
        if pair is not None
    ]
    return max((measured for measured, _ in pairs), default=0.0)


def _problems(manifest: Manifest, recorded: Sequence[Feeds], found: Sequence[Feeds]) -> list[str]:
    golden = manifest.golden
    limits = {} if golden is None else {item.name: item for item in golden.tolerances}
    return [
        f"sample {number}, output {name!r}: {text}"
        for number, (reference, candidate) in enumerate(zip(recorded, found, strict=True))
        for name, array in reference.items()
        for text in failures(limits[name], array, candidate[name], exact=False)
    ]
