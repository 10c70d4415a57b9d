"""The device runner's readers of power, clocks and throttling, on recorded boards of several generations."""

import itertools
import struct
import sys
import time
from pathlib import Path

import pytest
from edgepress.runtimes import device_runner as runner
from hypothesis import given
from hypothesis import strategies as st

BOARDS = Path(__file__).with_name("data_device")


class Board:
    """A recorded board below a folder, whose files and answers a test may change."""

    def __init__(self, name, folder):
        self.root, self.answers, self.asked = folder, {}, []
        kind, title, lines = "", "", []
        for line in [*(BOARDS / f"{name}.txt").read_text().splitlines(), "== /end"]:
            if line.startswith(("== ", "$ ")):
                self._put(kind, title, "\n".join(lines) + "\n")
                kind, _, title = line.partition(" ")
                lines = []
            else:
                lines.append(line)
        self.probe = runner.Probe(folder, self.command)

    def _put(self, kind, title, text):
        if kind == "==":
            self.write(title, text)
        elif kind == "$":
            self.answers[title] = text

    def write(self, path, text):
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def command(self, argv, timeout_s):
        assert timeout_s > 0
        self.asked.append(" ".join(argv))
        return self.answers.get(" ".join(argv))


@pytest.fixture
def board(request, tmp_path):
    return Board(request.param, tmp_path)


def boards(*names):
    return pytest.mark.parametrize("board", names, indirect=True)


@boards("raspberry-pi-4")
def test_raspberry_pi_4_has_state_but_no_meter(board):
    state = runner.read_state(board.probe)
    assert state["clock_hz"] == 1_800_457_088
    assert state["temperature_c"] == 48.2
    assert state["throttled_now"] == state["throttled_since_boot"] == []
    assert runner.find_meters(board.probe) == ([], [])
    device = runner.read_device(board.probe)
    assert device["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert device["cpu"]["name"] == "Cortex-A72"
    assert device["governor"] == "ondemand"
    assert device["memory_bytes"] == 3_884_404 * 1024
    assert not runner.is_emulated(device)


@boards("raspberry-pi-4")
def test_raspberry_pi_without_vcgencmd_is_read_from_sysfs(board):
    board.answers.clear()
    assert runner.read_state(board.probe)["throttled_now"] == []
    assert runner.read_state(board.probe)["clock_hz"] == 1_800_000_000
    assert runner.read_state(board.probe)["temperature_c"] == 48.199
    board.write("/sys/class/hwmon/hwmon1/in0_lcrit_alarm", "1\n")
    assert runner.read_state(board.probe)["throttled_now"] == ["under-voltage"]
    board.write("/sys/devices/platform/soc/soc:firmware/get_throttled", "50005\n")
    state = runner.read_state(board.probe)
    assert state["throttled_now"] == ["under-voltage", "throttled"]
    assert state["throttled_since_boot"] == ["under-voltage", "throttled"]


@boards("raspberry-pi-5")
def test_raspberry_pi_5_power_is_the_sum_of_its_rails(board):
    (meter,), notes = runner.find_meters(board.probe)
    assert (meter.name, notes) == ("PMIC", [])
    pairs = [
        *((0.01, 3.7), (0.1, 3.3), (0.2, 1.8), (0.02, 1.1), (0.0, 0.6), (0.2, 1.1)),
        *((0.3, 0.8), (2.0, 0.9), (0.0001221, 3.3), (0.00006105, 3.3), (0.02, 5.1)),
    ]
    rails = runner.parse_pmic(board.answers["vcgencmd pmic_read_adc"])
    assert len(rails) == len(pairs)
    assert "EXT5V" not in rails  # a voltage without a current is no power
    expected = sum(amperes * volts for amperes, volts in pairs)
    assert sum(rails.values()) == pytest.approx(expected)
    meter.sample(10.0)
    meter.sample(12.0)
    assert meter.joules == pytest.approx(2 * expected)


@boards("jetson-nano", "jetson-agx-xavier", "jetson-agx-orin", "jetson-orin-nano")
def test_jetson_rails_of_every_generation(board):
    expected = {
        "NVIDIA Jetson Nano Developer Kit": ("POM_5V_IN", 2.875, "MAXN"),
        "Jetson-AGX": ("GPU+CPU+SOC+CV+VDDRQ+SYS5V", 10.0, "MODE_30W_ALL"),
        "NVIDIA Jetson AGX Orin Developer Kit": ("VDD_GPU_SOC+VDD_CPU_CV+VIN_SYS_5V0", 22.2, "MAXN"),
        "NVIDIA Jetson Orin Nano Developer Kit": ("VDD_IN", 4.8, "15W"),
    }
    device = runner.read_device(board.probe)
    covers, watts, mode = expected[device["board"]]
    assert device["power_mode"] == mode
    (meter,), _ = runner.find_meters(board.probe)
    assert (meter.name, meter.covers) == ("INA3221", covers)
    meter.sample(0.0)
    meter.sample(1.0)
    assert meter.joules == pytest.approx(watts)
    assert "tegrastats --interval 100" not in board.asked


@boards("jetson-agx-orin")
def test_supplies_of_a_carrier_board_are_not_counted_beside_the_modules_rails(board):
    # An AGX Orin Industrial, whose carrier board's supplies feed the module.
    for channel, name in enumerate(("CVB_ATX_12V", "CVB_ATX_3V3", "CVB_ATX_5V"), 1):
        folder = "/sys/bus/i2c/drivers/ina3221/2-0041/hwmon/hwmon6"
        board.write(f"{folder}/in{channel}_label", f"{name}\n")
        board.write(f"{folder}/in{channel}_input", "12000\n")
        board.write(f"{folder}/curr{channel}_input", "2000\n")
    assert runner.jetson_rails(board.probe)["CVB_ATX_12V"] == 24.0
    (meter,), _ = runner.find_meters(board.probe)
    assert meter.covers == "VDD_GPU_SOC+VDD_CPU_CV+VIN_SYS_5V0"


@boards("jetson-agx-orin")
def test_over_current_events_void_a_run(board):
    before = runner.read_state(board.probe)
    assert before["throttle_events"] == {"over-current oc1": 0, "over-current oc3": 37}
    assert before["temperature_c"] == 77.281  # a zone that is switched off does not count
    assert runner.void_reasons([before, before]) == []
    board.write("/sys/class/hwmon/hwmon5/oc3_event_cnt", "40\n")
    after = runner.read_state(board.probe)
    assert runner.void_reasons([before, after]) == ["over-current oc3: 3 times during the run"]


TEGRASTATS = {
    "RAM 1016/3956MB (lfb 472x4MB) SWAP 0/1978MB (cached 0MB) IRAM 0/252kB(lfb 252kB) CPU [5%@102,off] "
    "EMC_FREQ 0% GR3D_FREQ 0% PLL@31C PMIC@100C POM_5V_IN 1560/1600 POM_5V_GPU 0/0 POM_5V_CPU 324/330": {
        "POM_5V_IN": 1.56,
        "POM_5V_GPU": 0.0,
        "POM_5V_CPU": 0.324,
    },
    "01-05-2024 12:00:00 RAM 2448/7773MB (lfb 2x4MB) SWAP 0/3886MB (cached 0MB) EMC_FREQ 0%@204 "
    "GR3D_FREQ 0%@[305] cpu@48.1C VDD_IN 4800mW/4790mW VDD_CPU_GPU_CV 480mW/480mW VDD_SOC 1440mW/1440mW": {
        "VDD_IN": 4.8,
        "VDD_CPU_GPU_CV": 0.48,
        "VDD_SOC": 1.44,
    },
    "": {},
    "RAM 1016/3956MB (lfb 472x4MB)": {},
}


@pytest.mark.parametrize("line", TEGRASTATS, ids=["JetPack 4", "JetPack 6", "nothing", "no rails"])
def test_tegrastats_lines(line):
    assert runner.parse_tegrastats(line) == TEGRASTATS[line]


@boards("raspberry-pi-4")
def test_tegrastats_stands_in_where_sysfs_gives_no_rail(board):
    board.answers["tegrastats --interval 100"] = next(iter(TEGRASTATS)) + "\n"
    (meter,), _ = runner.find_meters(board.probe)
    assert (meter.name, meter.covers) == ("tegrastats", "POM_5V_IN")
    meter.sample(0.0)
    meter.sample(2.0)
    assert meter.joules == pytest.approx(3.12)


@boards("intel-laptop")
def test_rapl_counts_packages_and_memory_across_a_wrap(board):
    (meter,), _ = runner.find_meters(board.probe)
    assert (meter.name, meter.covers) == ("RAPL", "package-0+dram")
    meter.sample(5.0)
    board.write("/sys/class/powercap/intel-rapl:0/energy_uj", "671150\n")
    board.write("/sys/class/powercap/intel-rapl:0:1/energy_uj", "1500000\n")
    meter.sample(6.0)
    assert meter.joules == pytest.approx(1.0 + 0.5)  # 328850 uJ up to the wrap, 671150 after it
    assert (meter.readings, meter.covered_s) == (2, 1.0)
    meter.restart()
    assert (meter.joules, meter.readings, meter.covered_s) == (0.0, 0, 0.0)


@given(steps=st.lists(st.integers(0, 1000), min_size=1, max_size=20), limit=st.integers(1000, 3000))
def test_a_wrapping_counter_loses_nothing(steps, limit, tmp_path_factory):
    file = tmp_path_factory.mktemp("zone") / "energy_uj"
    meter = runner.EnergyCounter("c", "", [(lambda: int(file.read_text()), limit)])
    for second, total in enumerate(itertools.accumulate([0, *steps])):
        file.write_text(f"{total % limit}\n")
        meter.sample(float(second))
    assert meter.joules * 1e6 == pytest.approx(sum(steps) - limit * sum(s == limit for s in steps))


@boards("intel-laptop")
def test_rapl_that_only_root_may_read_is_said_to_be_so(board):
    for zone in ("0", "0:1"):
        (board.root / f"sys/class/powercap/intel-rapl:{zone}/energy_uj").unlink()
    meters, (note,) = runner.find_meters(board.probe)
    assert meters == []
    assert "needs root" in note


@boards("intel-laptop")
def test_thermal_throttling_of_a_processor_voids_a_run(board):
    before = runner.read_state(board.probe)
    assert before["clock_hz"] == 4_100_000_000
    assert before["throttle_events"] == {"thermal throttling, core": 5, "thermal throttling, package": 9}
    board.write("/sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count", "3\n")
    reasons = runner.void_reasons([before, runner.read_state(board.probe)])
    assert reasons == ["thermal throttling, core: 2 times during the run"]


@boards("intel-laptop")
def test_nvidia_smi_adds_up_the_cards(board):
    query = "nvidia-smi --query-gpu=power.draw --format=csv,noheader,nounits"
    board.answers[query] = "61.25\n[N/A]\n30.00\n"
    meters, _ = runner.find_meters(board.probe)
    assert [meter.name for meter in meters] == ["RAPL", "nvidia-smi"]
    meters[1].sample(0.0)
    meters[1].sample(2.0)
    assert meters[1].joules == pytest.approx(182.5)
    board.answers[query] = "[N/A]\n"
    assert [meter.name for meter in runner.find_meters(board.probe)[0]] == ["RAPL"]


@pytest.mark.parametrize(
    ("text", "now", "since_boot"),
    [
        ("throttled=0x0", [], []),
        ("throttled=0x50005\n", ["under-voltage", "throttled"], ["under-voltage", "throttled"]),
        ("throttled=0x80008", ["soft temperature limit"], ["soft temperature limit"]),
        ("throttled=0x20000", [], ["Arm frequency capped"]),
    ],
)
def test_bits_of_get_throttled(text, now, since_boot):
    assert runner.parse_throttled(text) == (now, since_boot)


@pytest.mark.parametrize("text", ["", "throttled=", "VCHI initialization failed", "throttled=0xzz"])
def test_an_answer_that_is_none(text):
    with pytest.raises(ValueError, match="get_throttled"):
        runner.parse_throttled(text)


def pi_state(text):
    now, since_boot = runner.parse_throttled(text)
    return {"throttled_now": now, "throttled_since_boot": since_boot, "throttle_events": None}


@pytest.mark.parametrize(
    ("texts", "reasons"),
    [
        (("0x0", "0x0"), []),
        (("0x50000", "0x50000"), []),  # long ago
        (("0x0", "0x10000"), ["under-voltage during the run"]),  # came and went
        (("0x0", "0x40004", "0x40000"), ["throttled during the run"]),  # seen in between, said once
        (("0x1", "0x0"), ["under-voltage during the run"]),
        (("0x40000", "0x60000"), ["Arm frequency capped during the run"]),
    ],
)
def test_which_runs_are_void(texts, reasons):
    assert runner.void_reasons([pi_state(text) for text in texts]) == reasons


class Clock:
    """Seconds that pass only when somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-4
        return self.now


def test_energy_is_of_the_busy_phase_and_net_of_idle():
    clock, busy = Clock(), []

    def step():
        busy.append(1)
        clock.now += 0.5

    meter = runner.PowerMeter("m", "all", lambda: 30.0 if busy else 10.0)
    (found,) = runner.measure_energy(step, [meter], seconds=5.0, idle_s=1e-3, interval_s=60.0, clock=clock)
    count = found["inferences"]
    assert count == len(busy) == 10
    # Only two readings: at the start, still idle, and at the end; between them the trapezoid is 20 W.
    assert found["readings"] == 2
    assert found["watts"] == pytest.approx(20.0)
    assert found["idle_watts"] == pytest.approx(10.0)
    assert found["joules_per_inference"] == pytest.approx(20.0 * found["seconds"] / count, rel=1e-4)
    assert found["joules_per_inference_above_idle"] == pytest.approx(found["joules_per_inference"] / 2)


def test_energy_is_right_though_a_meter_answers_for_a_part_of_the_time():
    clock, busy = Clock(), []

    def step():
        busy.append(1)
        clock.now += 1.0
        time.sleep(0.01)  # the readings are of another thread

    meter = runner.PowerMeter("m", "all", lambda: 10.0 if len(busy) < 10 else None)
    (found,) = runner.measure_energy(step, [meter], seconds=20.0, idle_s=0.0, interval_s=1e-3, clock=clock)
    assert found["inferences"] >= 20
    assert found["seconds"] < 12
    assert found["joules_per_inference"] == pytest.approx(10.0, rel=1e-2)


def test_energy_is_of_one_inference_at_least():
    meter = runner.PowerMeter("m", "all", lambda: 10.0)
    (found,) = runner.measure_energy(lambda: None, [meter], seconds=1e-12, idle_s=0.0, interval_s=60.0)
    assert found["inferences"] == 1


def test_a_meter_that_falls_silent_gives_no_number():
    meter = runner.PowerMeter("m", "all", lambda: None)
    (found,) = runner.measure_energy(lambda: None, [meter], seconds=0.01, idle_s=0.0, interval_s=60.0)
    assert found["joules_per_inference"] is None
    assert "not measured" in found["why"]


def test_clock_jumps_and_sleep_are_told_apart():
    times = {"wall": 1000.0, "monotonic": 50.0, "boot": 70.0}
    watch = runner.ClockWatch(
        wall=lambda: times["wall"], monotonic=lambda: times["monotonic"], boot=lambda: times["boot"]
    )

    def after(**steps):
        for name, step in steps.items():
            times[name] += step
        return watch.read()

    found = after(wall=10.001, monotonic=10.0, boot=10.0)
    assert (found["elapsed_s"], found["wall_clock_step_s"], found["suspended_s"]) == (10.0, 0.0, 0.0)
    found = after(wall=-3600.0)
    assert found["wall_clock_step_s"] == pytest.approx(-3600, abs=0.01)
    found = after(wall=3600.0 + 30.0, boot=30.0)
    assert found["suspended_s"] == pytest.approx(30.0)
    assert found["wall_clock_step_s"] == 0.0


def test_hwcap_bits_are_those_of_real_boards(tmp_path):
    # 0x8fb is what a Cortex-A72 under emulation reports, 0x119ffb a Cortex-A76.
    assert runner.hwcap_features(0x8FB) == [
        *("aes", "asimd", "cpuid", "crc32", "fp", "pmull", "sha1", "sha2")
    ]
    assert "asimddp" in runner.hwcap_features(0x119FFB)
    assert runner.hwcap_features(0, 1 << 13 | 1 << 14) == ["bf16", "i8mm"]
    words = [6, 4096, 16, 0x8FB, 26, 0, 0, 0]
    (tmp_path / "proc/self").mkdir(parents=True)
    size = struct.calcsize("L")
    data = struct.pack(f"={len(words)}{'Q' if size == 8 else 'I'}", *words)
    (tmp_path / "proc/self/auxv").write_bytes(data)
    (tmp_path / "proc/cpuinfo").write_text("Features : fp asimd asimddp\nCPU part : 0xd08\n")
    cpu = runner.read_cpu(runner.Probe(tmp_path), "aarch64")
    assert cpu["hwcap"] == "0x8fb"
    assert "crc32" in cpu["hwcap_features"]
    assert cpu["claimed_only"] == ["asimddp"]  # the file claims what the kernel does not confirm
    assert "hwcap_features" not in runner.read_cpu(runner.Probe(tmp_path), "x86_64")
    assert runner.read_auxv(data[:-3])[16] == 0x8FB  # cut short


def test_commands_that_fail_hang_or_are_missing():
    python = sys.executable
    assert runner.run_command([python, "-c", "print('hi')"], 30.0) == "hi\n"
    assert runner.run_command([python, "-c", "print('hi'); raise SystemExit(1)"], 30.0) is None
    assert runner.run_command(["no-such-program-here"], 1.0) is None
    assert runner.run_command([python, "-c", "import time; time.sleep(60)"], 0.3) is None


def test_a_command_without_end_gives_its_first_line(tmp_path, monkeypatch):
    script = tmp_path / "tegrastats"
    script.write_text(
        f"#!{sys.executable}\nimport time\nprint('VDD_IN 1mW/1mW', flush=True)\ntime.sleep(60)\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert runner.run_command(["tegrastats", "--interval", "100"], 30.0) == "VDD_IN 1mW/1mW\n"
