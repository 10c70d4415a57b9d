"""The runtime on a device: its own, unpacked wheels, or what to do when there is none."""

import sys
import zipfile

import pytest
import ssh_case
from edgepress.graph.errors import RecipeError, RuntimeUnavailable
from edgepress.runtimes.ssh_environment import (
    RuntimeWish,
    fitting_wheels,
    prepare_python,
    try_runtime,
)

PI = {
    "python": [3, 11, 2],
    "machine": "aarch64",
    "libc": ["glibc", "2.36"],
    "modules": [],
    "packages": {},
    "environments": [],
}
VERSIONS = {"numpy": "2.0.0", "onnxruntime": "9.9.0"}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with ssh_case.running_board(tmp_path_factory.mktemp("board")) as made:
        yield made


@pytest.fixture
def board(running):
    return running.reset()


def make_wheels(folder, first_line="", **versions):
    """Wheels of stand-ins for numpy and onnxruntime that only have a version."""
    folder.mkdir(exist_ok=True)
    for name, version in (VERSIONS | versions).items():
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            body = f"__version__ = {version!r}\n"
            wheel.writestr(f"{name}/__init__.py", (first_line if name == "onnxruntime" else "") + body)
            tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            wheel.writestr(f"{name}-{version}.dist-info/WHEEL", tag)
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            wheel.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
            wheel.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return folder


def bare(session, **more):
    """What the device says of itself, were it one with Python alone."""
    return {**session.probe(), "modules": [], "packages": {}, **more}


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("onnxruntime-1.31.1-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl", True),
        ("onnxruntime-1.31.1-cp312-cp312-manylinux_2_28_aarch64.whl", False),
        ("onnxruntime-1.31.1-cp311-cp311-manylinux_2_28_x86_64.whl", False),
        ("onnxruntime-1.31.1-cp311-cp311-manylinux_2_39_aarch64.whl", False),
        ("onnxruntime-1.31.1-cp311-cp311-musllinux_1_2_aarch64.whl", False),
        ("protobuf-7.0.0-cp310-abi3-manylinux2014_aarch64.whl", True),
        ("protobuf-7.0.0-cp312-abi3-manylinux2014_aarch64.whl", False),
        ("flatbuffers-25.1-py2.py3-none-any.whl", True),
        ("old-1.0-py2-none-any.whl", False),
        ("own-1.0-cp311-cp311-linux_aarch64.whl", True),
        ("freethreaded-1.0-cp311-cp311t-linux_aarch64.whl", False),
        ("not a wheel.whl", False),
    ],
)
def test_a_wheel_fits_a_device_or_not(tmp_path, name, fits):
    (tmp_path / name).touch()
    assert bool(fitting_wheels(tmp_path, PI)) is fits


def test_the_newest_fitting_wheel_of_a_project_is_taken(tmp_path):
    for version in ("1.9.0", "1.31.1", "1.4.0"):
        (tmp_path / f"onnxruntime-{version}-py3-none-any.whl").touch()
    assert str(fitting_wheels(tmp_path, PI)["onnxruntime"][0]) == "1.31.1"


def test_the_devices_own_runtime_is_used_where_it_is_the_right_one(board):
    with ssh_case.session(board, settings={"python": sys.executable}) as session:
        facts = session.probe()
        own = facts["packages"]["onnxruntime"]
        python = prepare_python(session, facts, RuntimeWish(version=own))
        assert (python.program, python.runtime_version) == (facts["executable"], own)
        other = prepare_python(session, facts, RuntimeWish(version="0.0.1", any_version=True))
        assert other.runtime_version == own
    assert not (board.root / "python").exists()


def test_wheels_are_unpacked_once_where_pip_is_missing(board):
    wish = RuntimeWish(version="9.9.0", wheels=make_wheels(board.folder / "wheels"))
    notes = []
    with ssh_case.session(board, log=notes.append) as session:
        first = prepare_python(session, bare(session), wish)
        assert try_runtime(session, first) == "onnxruntime 9.9.0 numpy 2.0.0"
    with ssh_case.session(board, log=notes.append) as session:
        facts = bare(session)
        assert prepare_python(session, facts, wish) == first
        assert prepare_python(session, facts, RuntimeWish(version="9.9.0")) == first
    assert sum("installing onnxruntime 9.9.0" in note for note in notes) == 1


def test_wheels_of_another_version_are_taken_and_said(board):
    wish = RuntimeWish(version="1.2.3", wheels=make_wheels(board.folder / "wheels"))
    notes = []
    with ssh_case.session(board, log=notes.append) as session:
        assert prepare_python(session, bare(session), wish).runtime_version == "9.9.0"
    assert "the wheels bring onnxruntime 9.9.0, not 1.2.3" in notes


def test_wheels_that_do_not_fit_are_refused_with_the_command_that_fetches_others(board):
    (board.folder / "wheels").mkdir()
    wish = RuntimeWish(version="1.31.1", wheels=board.folder / "wheels")
    with ssh_case.session(board) as session, pytest.raises(RecipeError) as caught:
        prepare_python(session, {**PI}, wish)
    assert "no wheel of onnxruntime and numpy fits" in caught.value.what
    assert "--python-version 3.11" in caught.value.remedy
    assert "--platform manylinux_2_28_aarch64" in caught.value.remedy
    assert "onnxruntime==1.31.1" in caught.value.remedy


def test_a_device_without_a_runtime_or_a_way_to_install_it(board):
    with ssh_case.session(board) as session:
        with pytest.raises(RuntimeUnavailable, match="no runtime for the model") as caught:
            prepare_python(session, bare(session), RuntimeWish(version="1.31.1"))
        assert "--wheels wheels" in caught.value.remedy
        with pytest.raises(RuntimeUnavailable, match="no runtime for the model"):
            prepare_python(session, bare(session), RuntimeWish())


def test_an_old_python_is_refused(board):
    with ssh_case.session(board) as session, pytest.raises(RuntimeUnavailable, match=r"Python is 3\.7\.3"):
        prepare_python(session, bare(session, python=[3, 7, 3]), RuntimeWish(version="1.31.1"))


def test_a_runtime_that_dies_with_sigill_is_not_kept_and_another_one_works(board):
    dying = make_wheels(board.folder / "dying", "import os\nos.kill(os.getpid(), 4)\n")
    good = make_wheels(board.folder / "good", onnxruntime="8.8.0")
    with ssh_case.session(board) as session:
        with pytest.raises(RuntimeUnavailable, match="SIGILL") as caught:
            prepare_python(session, bare(session), RuntimeWish(wheels=dying))
        assert "--wheels" in caught.value.remedy
    assert board.left() == []
    with ssh_case.session(board) as session:
        assert prepare_python(session, bare(session), RuntimeWish(wheels=good)).runtime_version == "8.8.0"
        made = sorted(path.name for path in (board.root / "python").iterdir())
    assert len(made) == 1
    assert "8.8.0" in made[0]


def test_a_runtime_that_does_not_load_says_why(board):
    broken = make_wheels(board.folder / "broken", "raise ImportError('libgomp.so.1: cannot open')\n")
    with (
        ssh_case.session(board) as session,
        pytest.raises(RuntimeUnavailable, match="does not load on the device") as caught,
    ):
        prepare_python(session, bare(session), RuntimeWish(wheels=broken))
    assert "libgomp.so.1" in caught.value.why


def test_a_damaged_wheel_is_said(board):
    wheels = make_wheels(board.folder / "wheels")
    (wheels / "numpy-2.0.0-py3-none-any.whl").write_bytes(b"PK no zip")
    with (
        ssh_case.session(board) as session,
        pytest.raises(RuntimeUnavailable, match="could not do it") as caught,
    ):
        prepare_python(session, bare(session), RuntimeWish(wheels=wheels))
    assert "not a zip file" in caught.value.why


@pytest.mark.slow
def test_a_virtual_environment_is_made_offline(board):
    wish = RuntimeWish(version="9.9.0", wheels=make_wheels(board.folder / "wheels"))
    with ssh_case.session(board) as session:
        facts = session.probe()
        if "ensurepip" not in facts["modules"]:
            pytest.skip("this Python has no ensurepip")
        python = prepare_python(session, facts, wish)
        assert python.origin == "virtual environment"
        assert try_runtime(session, python) == "onnxruntime 9.9.0 numpy 2.0.0"
