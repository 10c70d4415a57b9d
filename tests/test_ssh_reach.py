"""Reaching a device by ssh: what its URL says, and what is said of one that cannot be reached."""

import contextlib
import socket
import sys
import threading

import pytest
import ssh_case
from edgepress.graph.errors import RecipeError, RuntimeUnavailable
from edgepress.runtimes.remote import DeviceUrl, parse_device_url
from edgepress.runtimes.ssh_errors import clean_lines, trouble_kind, unreachable


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with ssh_case.running_board(tmp_path_factory.mktemp("board")) as made:
        yield made


@pytest.fixture
def board(running):
    return running.reset()


def refused(connection):
    """The error of a connection that cannot be opened; nothing of it may stay here."""
    with pytest.raises(RuntimeUnavailable) as caught:
        connection.open()
    connection.close()
    assert caught.value.where
    assert caught.value.remedy
    return caught.value


def works(board, **settings):
    connection = ssh_case.connection(board, **settings)
    try:
        return connection.call("boot", {"boot_id_file": str(board.boot_id)}).reply == {"boot_id": "first"}
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("local", DeviceUrl(kind="local")),
        ("ssh://pi", DeviceUrl(kind="ssh", host="pi")),
        ("ssh://pi@10.0.0.7:2222", DeviceUrl(kind="ssh", host="10.0.0.7", user="pi", port=2222)),
        ("ssh://pi@[fe80::1%eth0]:22", DeviceUrl(kind="ssh", host="fe80::1%eth0", user="pi", port=22)),
    ],
)
def test_a_device_is_named_by_a_url(text, url):
    assert parse_device_url(text) == url
    assert parse_device_url(str(url)) == url


@pytest.mark.parametrize(
    "text",
    [
        *("", "pi@board", "http://board", "ssh://", "ssh://@board", "ssh://board:0", "ssh://board:70000"),
        *(
            "ssh://board/home",
            "ssh://-oProxyCommand=id",
            "ssh://-x@board",
            "ssh://a b",
            "ssh://a;b",
            "ssh://$(id)",
        ),
        *("ssh://[::1", "ssh://board:22x", "ssh://a`b`@board", "ssh://board\n"),
    ],
)
def test_what_is_no_device_or_could_be_an_option_is_refused(text):
    with pytest.raises(RecipeError):
        parse_device_url(text)


def test_a_password_is_refused_and_never_shown():
    for text in ("ssh://pi:hunter2@board", "ssh://pi:hunter2@board:x/", "sftp://pi:hunter2@board"):
        with pytest.raises(RecipeError) as caught:
            parse_device_url(text)
        assert "hunter2" not in str(caught.value)


def test_emulated_boards_have_names():
    url = parse_device_url("emulated:raspberry-pi-5")
    assert (url.kind, url.host, str(url)) == ("emulated", "raspberry-pi-5", "emulated:raspberry-pi-5")
    with pytest.raises(RecipeError, match="raspberry-pi-6") as caught:
        parse_device_url("emulated:raspberry-pi-6")
    assert "emulated:raspberry-pi-" in caught.value.remedy


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("ssh: Could not resolve hostname pi: Name or service not known", "unknown host"),
        ("ssh: connect to host pi port 22: No route to host", "no route"),
        ("ssh: connect to host pi port 22: Connection timed out", "timeout"),
        ("pi@board: Permission denied (publickey,password).\nConnection closed", "refused login"),
        ("Received disconnect from 10.0.0.1: 2: Too many authentication failures", "refused login"),
        ("/home/u/.ssh/config: line 1: Bad configuration option: colour", "configuration"),
        ("client_loop: send disconnect: Broken pipe", "cut"),
        ('Load key "k": Permission denied', "unknown"),
    ],
)
def test_what_ssh_says_is_told_apart(words, kind):
    assert trouble_kind(words) == kind
    assert str(unreachable(words, login="pi@board", key="board", where="ssh://pi@board"))


def test_lines_of_a_device_neither_steer_the_terminal_nor_show_credentials():
    lines = clean_lines(
        "\x1b[31mred\x1b]0;title\x07\x00\nfetch https://me:hunter2@index/simple\n" + "x" * 999
    )
    assert "\x1b" not in lines[0]
    assert "hunter2" not in lines[1]
    assert len(lines[2]) == 300


def test_a_wrong_host_key_is_reported_and_the_right_one_works(board):
    board.know(ssh_case.make_key(board.folder / "other_key"))
    error = refused(ssh_case.connection(board))
    assert "another host key" in error.what
    assert str(board.port) in error.remedy
    board.know(board.host_key)
    assert works(board)


def test_an_unknown_host_key_is_not_accepted_silently(board):
    board.known_hosts.write_text("")
    assert "not known yet" in refused(ssh_case.connection(board)).what
    assert board.known_hosts.read_text() == ""


def test_a_refused_login_is_reported_and_works_once_the_key_is_known(board):
    board.authorized.write_text("")
    error = refused(ssh_case.connection(board))
    assert "refuses the login" in error.what
    assert "ssh-copy-id" in error.remedy
    board.write()
    assert works(board)


def test_a_host_without_a_server(board):
    board.stop()
    assert "no ssh server answers" in refused(ssh_case.connection(board)).what
    board.start()
    assert works(board)


@contextlib.contextmanager
def listener(answer):
    """A port that takes connections and does with them what `answer` does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = server.accept()
                    taken.append(peer)
                    answer(peer)

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for peer in taken:
            peer.close()


def test_a_host_that_never_answers(board):
    with listener(lambda _peer: None) as port:
        error = refused(ssh_case.connection(board, f"ssh://board:{port}", connect_s=1.0))
    assert "does not answer in time" in error.what


def test_a_host_that_hangs_up(board):
    with listener(lambda peer: peer.close()) as port:
        error = refused(ssh_case.connection(board, f"ssh://board:{port}"))
    assert "closed the connection" in error.what


def test_a_machine_without_ssh(board):
    assert "not on this machine" in refused(ssh_case.connection(board, program="no-such-ssh")).what


def test_a_device_without_python(board):
    with (
        pytest.raises(RuntimeUnavailable, match="has no no-such-python"),
        ssh_case.session(board, settings={"python": "no-such-python"}),
    ):
        pass


def test_what_a_login_script_prints_is_not_taken_for_an_answer(board):
    noisy = board.folder / "noisy python"
    forged = 'echo \'{"boot_id": "forged"}\''
    noisy.write_text(f'#!/bin/sh\n{forged}\necho welcome >&2\nexec {sys.executable} "$@"\n')
    noisy.chmod(0o755)
    assert works(board, python=str(noisy))


def test_the_connection_is_shared_and_closed(board):
    connection = ssh_case.connection(board)
    logins = board.log.read_text().count("Accepted publickey")
    try:
        for _ in range(3):
            assert connection.call("boot", {}).status == 0
        folder = connection._folder
        assert connection.connected()
    finally:
        connection.close()
    assert not connection.connected()
    assert not folder.exists()
    assert board.log.read_text().count("Accepted publickey") == logins + 1
    with pytest.raises(RuntimeUnavailable, match="closed here"):
        connection.open()
