"""`ReferenceOutputs`: what the untouched model answers, computed once for all candidates."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..graph.errors import DataError, InternalError
from ..graph.model import Task
from ..runtimes.feeds import fit_floats, widen_floats
from .data import CalibrationData
from .representation import Representation, count_non_finite

if TYPE_CHECKING:
    from ..runtimes.base import Runner

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
# Representations beyond this move from memory to an unnamed file.
IN_MEMORY_BYTES = 256 * 2**20


class ReferenceOutputs:
    """Representations of every sample, in the data's order; only they are kept, not raw outputs.

    Attributes:
        digest: which data they are of.
        split: which side of it.
        batch_size: samples per batch.
        representation: what is compared.
        non_finite: NaN or infinite values in the reference's raw outputs.
    """

    def __init__(self, data: CalibrationData, task: Task, batch_size: int) -> None:
        self.digest = data.digest
        self.split = data.split
        self.task = task
        self.batch_size = batch_size
        self.representation: Representation | None = None
        self.non_finite = 0
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115
        self._layout: list[dict[str, tuple[tuple[int, ...], np.dtype[Any]]]] = []

    @classmethod
    def collect(
        cls,
        runner: Runner,
        data: CalibrationData,
        task: Task,
        *,
        batch_size: int = 1,
        progress: Progress | None = None,
    ) -> ReferenceOutputs:
        """Run the reference model over the data.

        Args:
            runner: the untouched model.
            data: evaluation samples.
            task: decides what is compared.
            batch_size: samples per batch; a batch size that the model fixes wins.
            progress: called with (samples run, samples to run).

        Raises:
            DataError: if there are no samples.
        """
        if len(data) == 0:
            raise DataError("the evaluation data holds no samples", where=data.name)
        found = cls(data, task, data.static_batch or batch_size)
        try:
            found._fill(runner, data, progress)
        except BaseException:
            found.close()
            raise
        return found

    def _fill(self, runner: Runner, data: CalibrationData, progress: Progress | None) -> None:
        for feeds, outputs, count in run_batches(runner, data, self.batch_size):
            if self.representation is None:
                self.representation = Representation(self.task, outputs)
            self.non_finite += count_non_finite(outputs)
            for sample in self.representation.rows(outputs, feeds, count):
                self._append(sample)
            if progress is not None:
                progress(len(self), len(data))

    def close(self) -> None:
        """Give the memory or the file back."""
        self._file.close()

    def __enter__(self) -> ReferenceOutputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._layout)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        """Output name -> rows, sample by sample."""
        self._file.seek(0)
        for layout in self._layout:
            sample = {}
            for name, (shape, dtype) in layout.items():
                size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                sample[name] = np.frombuffer(self._file.read(size), dtype).reshape(shape)
            yield sample

    def require_same(self, data: CalibrationData, task: Task, batch_size: int) -> None:
        """Raise unless these are the reference's outputs for just this data, task and batch size.

        Raises:
            InternalError: if they are not.
        """
        own = (self.digest, self.split, len(self), self.task, self.batch_size)
        asked = (data.digest, data.split, len(data), task, data.static_batch or batch_size)
        if own != asked:
            raise InternalError("the stored reference outputs are of other data", why=f"{own} != {asked}")

    def _append(self, sample: Mapping[str, Array]) -> None:
        self._layout.append({name: (values.shape, values.dtype) for name, values in sample.items()})
        for values in sample.values():
            self._file.write(np.ascontiguousarray(values).tobytes())


def run_batches(
    runner: Runner, data: CalibrationData, batch_size: int
) -> Iterator[tuple[Mapping[str, Array], dict[str, Array], int]]:
    """Feeds, outputs and how many samples count, batch by batch.

    Floats go in as the runner declares them, and 16-bit ones come out as float32.
    """
    taken = {spec.name for spec in runner.inputs}
    for feeds, count in data.batches(batch_size):
        own = {name: values for name, values in feeds.items() if name in taken}
        yield feeds, widen_floats(runner.run(fit_floats(runner.inputs, own))), count
