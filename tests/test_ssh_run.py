"""Programs on a device: every way that they end is told apart, nothing stays, and the next run works."""

import contextlib
import os
import signal
import threading

import pytest
import ssh_case
from edgepress.graph.errors import OutputError, RuntimeUnavailable


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with ssh_case.running_board(tmp_path_factory.mktemp("board")) as made:
        yield made


@pytest.fixture
def board(running):
    return running.reset()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = ssh_case.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def works(session):
    """A run that writes a result: the same device still does what it is told."""
    words = ssh_case.python("open('result.json', 'w').write('{\"ok\": 1}')", "print('done')")
    end = session.run_program(words, result="result.json")
    return (end.status, end.result, end.told[-1]) == (0, b'{"ok": 1}', "done")


def sleeper(board):
    """A program that says where it is and does not end by itself, and how to learn its process id."""
    mark = board.folder / "sleeper"
    words = ssh_case.python(
        "import os, time, subprocess",
        "open('scratch', 'w').write('x')",
        "child = subprocess.Popen(['sleep', '600'])",
        f"open({str(mark) + '.new'!r}, 'w').write('%d %d' % (os.getpid(), child.pid))",
        f"os.rename({str(mark) + '.new'!r}, {str(mark)!r})",
        "time.sleep(600)",
    )
    return words, mark


@contextlib.contextmanager
def when(path, action):
    """Do something once a file appears, while the block runs."""
    failed = []

    def wait():
        try:
            ssh_case.until(path.exists)
            action()
        except (AssertionError, OSError) as error:  # shown by the block's end
            failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()
    assert not failed


def nothing_left(board, mark):
    for pid in map(int, mark.read_text().split()):
        ssh_case.until(lambda pid=pid: not alive(pid))
    ssh_case.until(lambda: board.left() == [])


def test_a_program_runs_in_a_folder_of_its_own(board):
    with ssh_case.session(board) as session:
        assert works(session)
        end = session.run_program(
            ssh_case.python(
                "import os, sys, tempfile",
                "print(os.getcwd(), tempfile.gettempdir(), os.environ['EXTRA'], file=sys.stderr)",
                "sys.exit(7)",
            ),
            environment={"EXTRA": "a b'c"},
        )
    cwd, scratch, extra = end.told[-1].split(" ", 2)
    assert end.status == 7
    assert cwd == scratch
    assert cwd.startswith(str(board.root / "runs"))
    assert extra == "a b'c"
    assert end.result is None
    assert board.left() == []


def test_exit_status_255_is_the_programs_own(board):
    with ssh_case.session(board) as session:
        assert session.run_program(ssh_case.python("raise SystemExit(255)")).status == 255
        assert works(session)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SIGILL", "Illegal instruction"),
        ("SIGSEGV", "died on the device with SIGSEGV"),
        ("SIGKILL", "was killed"),
    ],
)
def test_a_crash_of_the_program_is_no_loss_of_the_device(board, name, words):
    program = ssh_case.python(
        "import os", "print('loading', flush=True)", f"os.kill(os.getpid(), {signal.Signals[name]})"
    )
    with ssh_case.session(board) as session:
        with pytest.raises(RuntimeUnavailable, match=words) as caught:
            session.run_program(program)
        assert "loading" in caught.value.why
        assert works(session)
    assert board.left() == []


def test_a_shells_report_of_a_signal_counts_as_the_signal(board):
    with ssh_case.session(board) as session:
        with pytest.raises(RuntimeUnavailable, match="SIGILL"):
            session.run_program(["sh", "-c", "sh -c 'kill -ILL $$'; exit $?"])
        assert works(session)


def test_a_program_that_is_not_there(board):
    with ssh_case.session(board) as session:
        with pytest.raises(RuntimeUnavailable, match="no program /no/such/python"):
            session.run_program(["/no/such/python"])
        assert works(session)


def test_a_program_without_end_is_ended_with_all_that_it_started(board):
    words, mark = sleeper(board)
    with ssh_case.session(board) as session:
        with pytest.raises(RuntimeUnavailable, match="was ended after 1 s"):
            session.run_program(words, limit_s=1.0)
        nothing_left(board, mark)
        assert works(session)


def test_a_full_disk_in_a_run(board):
    with ssh_case.session(board) as session:
        with pytest.raises(OutputError, match="full"):
            session.run_program(ssh_case.python("raise OSError(28, 'No space left on device')"))
        assert works(session)


def test_a_connection_that_is_cut_in_a_run(board):
    words, mark = sleeper(board)
    with ssh_case.session(board) as session, when(mark, board.cut):
        with pytest.raises(RuntimeUnavailable, match="connection to the device was cut while") as caught:
            session.run_program(words)
        assert "was not restarted" in caught.value.why
    nothing_left(board, mark)
    with ssh_case.session(board) as session:
        assert works(session)


def test_a_board_that_restarts_in_a_run(board):
    words, mark = sleeper(board)

    def restart():
        board.boot_id.write_text("second\n")
        board.cut()

    with ssh_case.session(board) as session, when(mark, restart):
        with pytest.raises(RuntimeUnavailable, match="device restarted while") as caught:
            session.run_program(words)
        assert "power supply" in caught.value.remedy
    nothing_left(board, mark)
    with ssh_case.session(board) as session:
        assert works(session)


def test_a_board_that_goes_away_in_a_run(board):
    words, mark = sleeper(board)
    with ssh_case.session(board, return_s=1.0) as session, when(mark, board.stop):
        with pytest.raises(RuntimeUnavailable, match="device went away while") as caught:
            session.run_program(words)
        assert "no ssh server answers" in caught.value.why
    nothing_left(board, mark)
    board.start()
    with ssh_case.session(board) as session:
        assert works(session)


def test_a_clock_that_is_set_meanwhile_is_only_noted(board):
    mark = board.folder / "jumped"
    (board.folder / "site").mkdir()
    (board.folder / "site" / "sitecustomize.py").write_text(
        "import os, time\n"
        "real = time.time\n"
        f"time.time = lambda: real() + 3600 * os.path.exists({str(mark)!r})\n"
    )
    board.restart([f"SetEnv XDG_CACHE_HOME={board.cache} HOME={board.folder} PYTHONPATH={board.folder}/site"])
    notes = []
    with ssh_case.session(board, log=notes.append) as session:
        assert works(session)
        assert notes == []
        end = session.run_program(ssh_case.python(f"open({str(mark)!r}, 'w')"))
    assert end.status == 0
    assert end.elapsed_s < 60
    assert end.clock_jump_s == pytest.approx(3600, abs=5)
    assert "was set by +3600" in notes[0]


def test_two_runs_at_once_wait_for_each_other(board):
    notes = []
    with ssh_case.session(board) as first:
        with (
            pytest.raises(RuntimeUnavailable, match="another run is on the device"),
            ssh_case.session(board, busy_s=0.3),
        ):
            pass

        def told(text):
            notes.append(text)
            first.close()

        with ssh_case.session(board, log=told, busy_s=20.0) as second:
            assert works(second)
    assert "is in use by" in notes[0]


def test_a_lock_that_was_lost_is_noticed_before_the_next_step(board):
    with ssh_case.session(board) as session:
        board.cut()
        ssh_case.until(lambda: not session._lock.running())
        with pytest.raises(RuntimeUnavailable, match="was cut before"):
            session.ask("boot", {})


def test_a_caller_that_falls_silent_loses_the_device(board):
    with ssh_case.session(board, settings={"silence_s": 0.5}) as silent:
        with ssh_case.session(board) as other:
            assert works(other)
        with pytest.raises(RuntimeUnavailable, match="before 'run'"):
            works(silent)


def test_what_interrupted_runs_left_goes_with_the_next_run(board):
    old, unfinished, used = (board.root / name for name in ("files/old", "python/half", "files/used"))
    for folder in (board.root / "runs" / "dead", old, unfinished, used):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    os.utime(old, (0, 0))
    with ssh_case.session(board) as session:
        assert works(session)
    assert (board.left(), old.exists(), unfinished.exists(), used.exists()) == ([], False, False, True)
