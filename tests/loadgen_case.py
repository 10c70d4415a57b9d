"""A made-up LoadGen: its interface, and recorded summaries as its results."""

import json
import threading
from pathlib import Path
from types import SimpleNamespace

SCENARIOS = ("SingleStream", "MultiStream", "Offline", "Server")
SUMMARIES = json.loads((Path(__file__).with_name("data_device") / "loadgen-summaries.json").read_text())


class FakeLoadGen:
    """LoadGen's interface: issues some queries as its scenario does, and writes a recorded summary."""

    def __init__(self, title="SingleStream", queries=3, size=1):
        self.title, self.queries, self.size = title, queries, size
        self.completed, self.settings, self.destroyed = [], None, []
        self.TestScenario = SimpleNamespace(**{name: name for name in SCENARIOS})
        self.TestMode = SimpleNamespace(PerformanceOnly="performance")
        self.TestSettings = self.LogOutputSettings = self.LogSettings = SimpleNamespace
        self._lock = threading.Lock()

    def QuerySampleResponse(self, item, data, size):  # noqa: N802 - LoadGen's names
        assert data == size == 0
        return item

    def QuerySamplesComplete(self, responses):  # noqa: N802
        with self._lock:
            self.completed.append(list(responses))

    def ConstructSUT(self, issue, flush):  # noqa: N802
        self.issue, self.flush = issue, flush
        return "sut"

    def ConstructQSL(self, _total, _fitting, load, unload):  # noqa: N802
        load([0])
        unload([0])
        return "qsl"

    def DestroySUT(self, sut):  # noqa: N802
        self.destroyed.append(sut)

    def DestroyQSL(self, qsl):  # noqa: N802
        self.destroyed.append(qsl)

    def StartTestWithLogSettings(self, sut, qsl, settings, log):  # noqa: N802
        assert (sut, qsl) == ("sut", "qsl")
        self.settings = settings
        for number in range(self.queries):
            first = number * self.size
            self.issue([SimpleNamespace(id=first + one) for one in range(self.size)])
        self.flush()
        folder, record = Path(log.log_output.outdir), SUMMARIES[self.title]
        (folder / "mlperf_log_summary.txt").write_text(record["summary"])
        (folder / "mlperf_log_detail.txt").write_text(record["detail"])
