"""Copies onto a device: resumed, checked by hash, and what is said when they fail."""

import hashlib
import random

import pytest
import ssh_case
from edgepress.graph.errors import ModelError, OutputError, RuntimeUnavailable
from edgepress.runtimes import ssh_copy
from edgepress.runtimes.ssh_copy import copy_files

BIG_BYTES = 24 << 20


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with ssh_case.running_board(tmp_path_factory.mktemp("board")) as made:
        yield made


@pytest.fixture
def board(running):
    return running.reset()


def make_file(folder, name, size_bytes, seed=0):
    path = folder / name
    path.write_bytes(random.Random(seed).randbytes(size_bytes))
    return path


def there(board):
    """Files of the device's cache of copies: their SHA-256 by name."""
    files = [path for path in (board.root / "files").rglob("*") if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_arrive_once_and_are_not_sent_again(board):
    files = {"a.bin": make_file(board.folder, "a.bin", 700_001), "sub/empty": board.folder / "empty"}
    files["sub/empty"].write_bytes(b"")
    told = []
    with ssh_case.session(board) as session:
        first = copy_files(session, files, progress=lambda *done: told.append(done))
        second = copy_files(session, files)
    assert (first.sent_bytes, first.present_bytes) == (700_001, 0)
    assert (second.folder, second.sent_bytes, second.present_bytes) == (first.folder, 0, 700_001)
    assert there(board) == {"a.bin": digest(files["a.bin"]), "empty": digest(files["sub/empty"])}
    assert told[-1] == (700_001, 700_001)


def test_other_contents_go_into_another_folder(board):
    path = make_file(board.folder, "a.bin", 100)
    with ssh_case.session(board) as session:
        first = copy_files(session, {"a.bin": path})
        path.write_bytes(b"other")
        second = copy_files(session, {"a.bin": path})
    assert first.folder != second.folder


def test_a_copy_that_was_cut_goes_on_where_it_stopped(board):
    path = make_file(board.folder, "big.bin", BIG_BYTES)

    def cut(done, _total):
        if done > BIG_BYTES // 3:
            board.cut()

    with ssh_case.session(board) as session:
        with pytest.raises(RuntimeUnavailable, match="connection to the device was cut") as caught:
            copy_files(session, {"big.bin": path}, progress=cut)
        assert "was not restarted" in caught.value.why
    ssh_case.until(lambda: "big.bin.part" in there(board))
    assert "big.bin" not in there(board)
    with ssh_case.session(board) as session:
        report = copy_files(session, {"big.bin": path})
    assert 0 < report.present_bytes < BIG_BYTES
    assert report.sent_bytes == BIG_BYTES - report.present_bytes
    assert there(board) == {"big.bin": digest(path)}


def test_a_part_of_something_else_is_not_continued(board):
    path = make_file(board.folder, "a.bin", 100_000)
    with ssh_case.session(board) as session:
        folder = copy_files(session, {"a.bin": path}).folder
        whole = board.root.joinpath("files", folder.rpartition("/")[2], "a.bin")
        whole.unlink()
        whole.with_name("a.bin.part").write_bytes(b"x" * 50_000)
        report = copy_files(session, {"a.bin": path})
    assert report.present_bytes == 0
    assert there(board) == {"a.bin": digest(path)}


def test_a_file_that_changed_on_the_device_is_sent_again(board):
    path = make_file(board.folder, "a.bin", 100_000)
    with ssh_case.session(board) as session:
        folder = copy_files(session, {"a.bin": path}).folder
        whole = board.root.joinpath("files", folder.rpartition("/")[2], "a.bin")
        data = bytearray(whole.read_bytes())
        data[5_000] ^= 1
        whole.write_bytes(data)
        assert copy_files(session, {"a.bin": path}).sent_bytes == 100_000
    assert there(board) == {"a.bin": digest(path)}


def test_a_file_that_changes_here_meanwhile_is_not_put_in_place(board):
    path = make_file(board.folder, "a.bin", 3_000_000)

    def change(done, _total):
        if done:
            path.write_bytes(b"y" * 3_000_000)

    with (
        ssh_case.session(board) as session,
        pytest.raises(RuntimeUnavailable, match="arrives damaged"),
    ):
        copy_files(session, {"a.bin": path}, progress=change)
    assert there(board) == {}


def test_a_full_disk_is_recognised_and_nothing_stays(board):
    limited = board.folder / "limited"
    limited.write_text('#!/bin/sh\nulimit -f 2000\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n')
    limited.chmod(0o755)
    path = make_file(board.folder, "big.bin", BIG_BYTES // 4)
    board.restart([f"ForceCommand {limited}"])
    with ssh_case.session(board) as session:
        with pytest.raises(OutputError, match="disk or quota is full") as caught:
            copy_files(session, {"big.bin": path})
        assert str(board.root) in caught.value.where
        assert "df -h" in caught.value.remedy
    assert there(board) == {}
    board.restart()
    with ssh_case.session(board) as session:
        copy_files(session, {"big.bin": path})
    assert there(board) == {"big.bin": digest(path)}


def test_a_disk_that_is_too_small_is_known_before_anything_is_sent(board):
    path = make_file(board.folder, "a.bin", 1000)
    with ssh_case.session(board) as session:
        ask = session.ask
        session.ask = lambda *words, **more: {**ask(*words, **more), "free_bytes": 999}
        with pytest.raises(OutputError, match="full") as caught:
            copy_files(session, {"a.bin": path})
    assert "1000 bytes are to be copied, 999 are free" in caught.value.why
    assert there(board) == {}


def test_a_missing_file_is_the_models_fault(board):
    with ssh_case.session(board) as session, pytest.raises(ModelError, match="cannot be read"):
        copy_files(session, {"a.bin": board.folder / "absent"})


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_no_file_leaves_its_folder_on_the_device(board, name):
    path = make_file(board.folder, "a.bin", 10)
    with ssh_case.session(board) as session, pytest.raises(RuntimeUnavailable, match="could not do it"):
        copy_files(session, {name: path})
    assert not (board.root / "files" / "outside").exists()
    assert there(board) == {}


def test_a_file_that_cannot_be_read_meanwhile_is_no_lost_connection(tmp_path):
    told = ssh_copy._Told(None, 0, 4)
    sent = ssh_copy._Sent(name="m", path=tmp_path / "gone", sha256="", size_bytes=4, offset=0)
    with pytest.raises(ModelError, match="cannot be read"):
        list(ssh_copy._chunks(sent, told))
    folder = ssh_copy._Sent(name="m", path=tmp_path, sha256="", size_bytes=4, offset=0)
    with pytest.raises(ModelError, match="cannot be read"):
        list(ssh_copy._chunks(folder, told))
