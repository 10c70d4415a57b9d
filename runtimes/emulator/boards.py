"""The boards that can be emulated: what their processor is and what their system says of it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path

from ...graph.errors import RecipeError

_COMMON = "fp asimd"
_ARMV8_2 = "aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """One cache of a processor, as sysfs lists it.

    Attributes:
        kind: "Data", "Instruction" or "Unified".
        shared: whether all cores have it together.
    """

    level: int
    kind: str
    size_kib: int
    shared: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmulatedBoard:
    """One board.

    Attributes:
        name: after `emulated:`.
        cpu: QEMU's name of the processor.
        model: what the board calls itself; it says that it is none.
        part, variant, revision: of the processor, as in /proc/cpuinfo.
        features: likewise; onnxruntime chooses its kernels partly by them, so they fit `cpu` exactly.
        mhz: what sysfs calls the highest clock; nothing here runs at it.
        counts: whether instructions can be counted (the emulator takes plugins).
    """

    name: str
    cpu: str
    model: str
    part: int
    variant: int
    revision: int
    features: str
    cores: int
    mhz: int
    caches: tuple[Cache, ...]
    counts: bool = True

    @property
    def emulator(self) -> str:
        """The program's name in the board's /usr/bin."""
        return "qemu-aarch64" if self.counts else "qemu-aarch64-new"


def _caches(data_kib: int, code_kib: int, second_kib: int, third_kib: int | None) -> tuple[Cache, ...]:
    own = (
        Cache(level=1, kind="Data", size_kib=data_kib),
        Cache(level=1, kind="Instruction", size_kib=code_kib),
        Cache(level=2, kind="Unified", size_kib=second_kib, shared=third_kib is None),
    )
    if third_kib is None:
        return own
    return (*own, Cache(level=3, kind="Unified", size_kib=third_kib, shared=True))


BOARDS: Mapping[str, EmulatedBoard] = {
    board.name: board
    for board in (
        EmulatedBoard(
            name="raspberry-pi-4",
            cpu="cortex-a72",
            model="Raspberry Pi 4 Model B (emulated, not a board)",
            part=0xD08,
            variant=0,
            revision=3,
            # QEMU's Cortex-A72 has the cryptographic instructions, the Pi's has not: they are left out here.
            features=f"{_COMMON} crc32 cpuid",
            cores=4,
            mhz=1500,
            caches=_caches(32, 48, 1024, None),
        ),
        EmulatedBoard(
            name="raspberry-pi-5",
            cpu="cortex-a76",
            model="Raspberry Pi 5 Model B (emulated, not a board)",
            part=0xD0B,
            variant=4,
            revision=1,
            features=f"{_COMMON} {_ARMV8_2}",
            cores=4,
            mhz=2400,
            caches=_caches(64, 64, 512, 2048),
        ),
        EmulatedBoard(
            name="jetson-orin",
            cpu="cortex-a78ae",
            model="Jetson Orin Nano, its CPU (emulated, not a board)",
            part=0xD42,
            variant=0,
            revision=1,
            features=f"{_COMMON} {_ARMV8_2} uscat ilrcpc flagm",
            cores=6,
            mhz=1510,
            caches=_caches(64, 64, 256, 4096),
            counts=False,
        ),
    )
}


def board_named(name: str, *, where: str = "--device") -> EmulatedBoard:
    """The board of a name.

    Raises:
        RecipeError: if there is none.
    """
    if name in BOARDS:
        return BOARDS[name]
    near = difflib.get_close_matches(name, BOARDS, n=1)
    known = f"there are {', '.join(f'emulated:{board}' for board in BOARDS)}"
    raise RecipeError(
        f"no emulated board is called {name!r}",
        where=where,
        remedy=f"did you mean emulated:{near[0]}? {known}" if near else known,
    )


def write_identity(board: EmulatedBoard, folder: Path) -> None:
    """What the board's /proc/cpuinfo and /sys say, written to `folder`/cpuinfo and `folder`/sys."""
    lines = []
    for core in range(board.cores):
        lines += [
            f"processor\t: {core}",
            "BogoMIPS\t: 108.00",
            f"Features\t: {board.features}",
            "CPU implementer\t: 0x41",
            "CPU architecture: 8",
            f"CPU variant\t: {board.variant:#x}",
            f"CPU part\t: {board.part:#x}",
            f"CPU revision\t: {board.revision}",
            "",
        ]
    cpuinfo = "\n".join([*lines, f"Model\t\t: {board.model}", ""])
    files = {"cpuinfo": cpuinfo, "sys/firmware/devicetree/base/model": f"{board.model}\0"}
    files |= {f"sys/devices/system/cpu/{name}": text for name, text in _processor_files(board).items()}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")


def _processor_files(board: EmulatedBoard) -> dict[str, str]:
    everyone = f"0-{board.cores - 1}\n"
    files = dict.fromkeys(("possible", "present", "online"), everyone)
    clock = f"{board.mhz * 1000}\n"
    for core in range(board.cores):
        own = {
            "topology/core_id": f"{core}\n",
            "topology/physical_package_id": "0\n",
            "topology/core_siblings_list": everyone,
            "topology/package_cpus_list": everyone,
            "topology/cluster_cpus_list": everyone,
            "cpufreq/cpuinfo_max_freq": clock,
            "cpufreq/scaling_max_freq": clock,
            "cpufreq/scaling_cur_freq": clock,
            "cpufreq/scaling_governor": "emulated\n",
        }
        for index, cache in enumerate(board.caches):
            own |= {
                f"cache/index{index}/level": f"{cache.level}\n",
                f"cache/index{index}/type": f"{cache.kind}\n",
                f"cache/index{index}/size": f"{cache.size_kib}K\n",
                f"cache/index{index}/shared_cpu_list": everyone if cache.shared else f"{core}\n",
            }
        files |= {f"cpu{core}/{name}": text for name, text in own.items()}
    return files
