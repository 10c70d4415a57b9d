"""What all tests share: no network, repeatable properties, and the folder of real models and data."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# Hugging Face libraries read this when they are first imported: a test that would go to the
# network fails at once instead.
os.environ["HF_HUB_OFFLINE"] = "1"
# And onnxruntime reads this: no telemetry, which would go to the network as well.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# The machine may be busy: a slow example is no failure, and every run draws the same examples.
hypothesis.settings.register_profile("edgepress", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("edgepress")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder and a history of the run's own: earlier runs decide nothing in tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("EDGEPRESS_HISTORY", str(tmp_path_factory.mktemp("history")))
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real models and data (EDGEPRESS_DATA); tests that need it skip without it."""
    named = os.environ.get("EDGEPRESS_DATA")
    folder = Path(named) if named else Path(__file__).parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real models and data are not here: set EDGEPRESS_DATA")
    return folder


CHECKOUT = Path(__file__).parents[1]
_GENERATED = {"build", "dist", "out", "__pycache__"}


def source_tree(root: Path = CHECKOUT) -> Iterator[Path]:
    """Every file of the checkout that is not generated, without asking git (a release has none)."""
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name
            for name in sorted(folders)
            if name not in _GENERATED
            and not name.endswith(".egg-info")
            and (name == ".ci" or not name.startswith("."))
        ]
        yield from (Path(folder, name) for name in sorted(files))


@pytest.fixture(scope="session")
def source_files() -> list[Path]:
    """The files that `source_tree` finds."""
    return list(source_tree())


@pytest.fixture(scope="session")
def copy_checkout(source_files: list[Path]) -> Callable[[Path], Path]:
    """A function that copies the checkout's own files into a new folder and returns it."""

    def copy(folder: Path) -> Path:
        for path in source_files:
            place = folder / path.relative_to(CHECKOUT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
        return folder

    return copy
