"""The emulator for tests: set up once for all workers of a run, skipped where that cannot be."""

import contextlib
import os
import platform
import shutil

import pytest
from edgepress.driver.devices.emulated import emulator
from edgepress.graph.errors import RuntimeUnavailable
from edgepress.runtimes.emulator.boards import BOARDS

PI_4, PI_5 = BOARDS["raspberry-pi-4"], BOARDS["raspberry-pi-5"]


def silent(_name):
    return contextlib.nullcontext()


def shared_cache(factory):
    """A cache folder that all workers of a run have together: what is set up there takes half a minute."""
    base = factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "emulator-cache"


def ready(*boards):
    """The emulator with these boards, and the folder of their packages; as EDGEPRESS_CACHE says."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("emulated boards run on Linux on x86-64")
    for program in ("apt-get", "dpkg-deb", "ssh", "ssh-keygen"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    place = emulator()
    try:
        place.install(list(boards), silent)
        return place, place.site(None, silent)
    except RuntimeUnavailable as error:
        if "fetched" not in error.what and "keyring" not in error.what:
            raise
        pytest.skip(f"{error.what}: {error.why}")
