"""NVML by a made-up library: energy counters, power, slow-downs, and what stands in for it."""

import ctypes

import pytest
from edgepress.runtimes import device_runner as runner

OK, NOT_SUPPORTED = 0, 3


class Gpu:
    """What one GPU answers; None is NVML_ERROR_NOT_SUPPORTED."""

    def __init__(self, millijoules=None, milliwatts=None, reasons=None):
        self.millijoules, self.milliwatts, self.reasons = millijoules, milliwatts, reasons


class Library:
    """libnvidia-ml as ctypes shows it: functions that write through pointers and give a code."""

    def __init__(self, *gpus, init=OK):
        self.gpus, self.init = gpus, init

    def nvmlInit_v2(self):  # noqa: N802 - NVIDIA's names
        return self.init

    def nvmlDeviceGetCount_v2(self, count):  # noqa: N802
        count._obj.value = len(self.gpus)
        return OK

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):  # noqa: N802
        handle._obj.value = index.value + 1
        return OK

    def _answer(self, gpu, pointer, name):
        value = getattr(self.gpus[gpu.value - 1], name)
        if value is None:
            return NOT_SUPPORTED
        pointer._obj.value = value
        return OK

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu, value):  # noqa: N802
        assert isinstance(value._obj, ctypes.c_ulonglong)
        return self._answer(gpu, value, "millijoules")

    def nvmlDeviceGetPowerUsage(self, gpu, value):  # noqa: N802
        assert isinstance(value._obj, ctypes.c_uint)
        return self._answer(gpu, value, "milliwatts")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu, value):  # noqa: N802
        assert isinstance(value._obj, ctypes.c_ulonglong)
        return self._answer(gpu, value, "reasons")


def probe_of(library, folder, answers=None):
    """A machine without anything but these GPUs."""
    return runner.Probe(
        folder,
        lambda argv, _: (answers or {}).get(argv[0]),
        gpus=lambda: None if library is None else runner.Nvml(library),
    )


def test_energy_is_counted_where_every_gpu_counts_it(tmp_path):
    gpus = [Gpu(millijoules=5_000_000_000, milliwatts=1), Gpu(millijoules=10, milliwatts=1)]
    (meter,), notes = runner.find_meters(probe_of(Library(*gpus), tmp_path, {"nvidia-smi": "300.0\n"}))
    assert (meter.name, meter.covers, notes) == ("NVML", "NVIDIA GPUs, boards included", [])
    meter.sample(10.0)
    gpus[0].millijoules += 60_000
    gpus[1].millijoules += 1_500
    meter.sample(11.0)
    assert meter.joules == pytest.approx(61.5)
    assert meter.covered_s == 1.0


def test_power_is_read_where_a_gpu_counts_no_energy(tmp_path):
    gpus = [Gpu(millijoules=7, milliwatts=61_250), Gpu(milliwatts=30_000), Gpu()]
    (meter,), _ = runner.find_meters(probe_of(Library(*gpus), tmp_path))
    assert meter.name == "NVML"
    meter.sample(0.0)
    meter.sample(2.0)
    assert meter.joules == pytest.approx(182.5)


@pytest.mark.parametrize("library", [None, Library(), Library(Gpu())], ids=["none", "no GPU", "mute GPU"])
def test_nvidia_smi_stands_in_where_nvml_gives_nothing(library, tmp_path):
    (meter,), _ = runner.find_meters(probe_of(library, tmp_path, {"nvidia-smi": "61.25\n"}))
    assert meter.name == "nvidia-smi"
    assert runner.find_meters(probe_of(library, tmp_path)) == ([], [])


def test_a_library_that_does_not_come_up_or_is_another_one():
    with pytest.raises(OSError, match="does not come up"):
        runner.Nvml(Library(Gpu(), init=9))
    with pytest.raises(OSError, match="nvmlInit_v2"):
        runner.Nvml(object())


def test_a_gpu_that_heats_up_voids_a_run_on_it_and_no_other(tmp_path):
    gpu = Gpu(milliwatts=1, reasons=0x4 | 0x1)  # its power limit, and idle: the usual way of working
    probe = probe_of(Library(Gpu(), gpu), tmp_path)
    before = runner.read_state(probe, gpus=True)
    assert before["throttled_now"] == []
    gpu.reasons = 0x4 | 0x40
    during = runner.read_state(probe, gpus=True)
    assert during["throttled_now"] == ["GPU 1: hardware thermal slowdown"]
    assert runner.void_reasons([before, during, before]) == [
        "GPU 1: hardware thermal slowdown during the run"
    ]
    assert runner.read_state(probe)["throttled_now"] is None  # the processor's run is none of its business
    assert runner.Nvml(Library(Gpu())).slowdowns() is None


def test_an_older_library_has_not_every_function(tmp_path):
    class Older(Library):
        nvmlDeviceGetTotalEnergyConsumption = property()  # noqa: N815 - reading it is an AttributeError

    (meter,), _ = runner.find_meters(probe_of(Older(Gpu(millijoules=1, milliwatts=5000)), tmp_path))
    meter.sample(0.0)
    meter.sample(1.0)
    assert meter.joules == pytest.approx(5.0)


def test_a_recorded_board_never_reads_this_machines_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_nvml", lambda: runner.Nvml(Library(Gpu(milliwatts=5000))))
    assert runner.Probe(tmp_path, lambda _argv, _s: None).nvml() is None
    assert runner.Probe().nvml().watts() == 5.0
