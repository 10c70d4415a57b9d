"""Many small comparisons timed one after the other on a device: operators, each in its forms."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from ..graph.errors import EdgepressError, RuntimeUnavailable
from .base import Array
from .device import Device, Form
from .timing import BenchmarkResult, Schedule

_LEAST_S = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimingJob:
    """Forms to be timed against the first of them.

    Attributes:
        build: makes the forms, the baseline first, and the inputs of those that have none of their own;
            called only if there is time for the job.
        schedule: how much to measure.
        estimate_s: about how long that takes on a processor of a desk.
    """

    build: Callable[[], tuple[Sequence[Form], Mapping[str, Array]]]
    schedule: Schedule
    estimate_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """What one job came to: its times, or why the runtime there does not run it.

    Attributes:
        index: the job's place in the sequence that was given.
    """

    index: int
    result: BenchmarkResult | None = None
    reason: str = ""


@runtime_checkable
class JobTimer(Protocol):
    """A device that times many jobs in one go, since each call to it takes a while."""

    def time_jobs(self, jobs: Iterable[TimingJob], *, budget_s: float) -> Iterator[JobOutcome]:
        """See `time_jobs` below."""


def time_jobs(device: Device, jobs: Iterable[TimingJob], *, budget_s: float) -> Iterator[JobOutcome]:
    """Time jobs in order while there is time; a job that would not fit any more is passed over.

    Args:
        device: where; one that is a `JobTimer` does it in its own way.
        jobs: what.
        budget_s: seconds of timing on the device; copying and starting there do not count.

    Raises:
        RuntimeUnavailable: if the device goes away; what was yielded before holds.
    """
    if isinstance(device, JobTimer):
        yield from device.time_jobs(jobs, budget_s=budget_s)
        return
    deadline = time.monotonic() + budget_s
    for index, job in enumerate(jobs):
        left_s = deadline - time.monotonic()
        if job.estimate_s > left_s:
            continue
        forms, feeds = job.build()
        schedule = dataclasses.replace(job.schedule, limit_s=min(job.schedule.limit_s, max(_LEAST_S, left_s)))
        try:
            result = device.time(forms, feeds, schedule)
        except RuntimeUnavailable:
            raise
        except EdgepressError as error:
            yield JobOutcome(index=index, reason=error.what)
            continue
        yield JobOutcome(index=index, result=result)
