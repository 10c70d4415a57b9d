"""The history's file: what goes in comes out, several writers, old and newer forms, damage."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from edgepress.driver.history.rows import Measurement, RecordedRun, run_id
from edgepress.driver.history.store import FILE_NAME, MIGRATIONS, History, history_file
from edgepress.graph.errors import OutputError
from history_case import made
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / FILE_NAME


def test_the_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEPRESS_HISTORY", str(tmp_path))
    assert history_file() == tmp_path / "history.sqlite"
    monkeypatch.delenv("EDGEPRESS_HISTORY")
    assert history_file().name == "history.sqlite"
    assert "edgepress" in str(history_file().parent)


FIGURES = st.floats(min_value=1e-9, max_value=1e9)


@given(
    st.builds(
        Measurement,
        run=st.just("r"),
        thing=st.text(st.characters(codec="utf-8"), max_size=20),
        role=st.sampled_from(["bundle", "batch 4"]),
        kind=st.sampled_from(["benchmark", "verify", "compile"]),
        started=st.just("2026-01-31T00:00:00Z"),
        device=st.text(st.characters(codec="utf-8"), max_size=20),
        emulated=st.booleans(),
        threads=st.none() | st.integers(1, 2**62),
        p50_ms=st.none() | FIGURES,
        file_bytes=st.none() | st.integers(0, 2**62),
        sessions_ms=st.dictionaries(st.sampled_from(["p50", "load"]), st.lists(FIGURES).map(tuple)),
        outputs_ok=st.none() | st.booleans(),
        void=st.booleans(),
        void_reasons=st.lists(st.text(st.characters(codec="utf-8"), max_size=9)).map(tuple),
    )
)
def test_a_row_comes_back_as_it_went_in(row):
    document = {"row": row.thing}
    identity = run_id(document)
    row = msgspec.structs.replace(row, run=identity)
    with History(Path(":memory:")) as history:
        assert history.add([RecordedRun(id=identity, document=document, measurements=(row,))]) == 1
        assert history.rows() == [row]
        assert history.document(identity) == document


def test_every_field_of_a_row_has_its_column(path):
    with History(path):
        pass
    connection = sqlite3.connect(path)
    columns = [name for _, name, *_ in connection.execute("PRAGMA table_info(measurements)")]
    assert columns == list(Measurement.__struct_fields__)


def test_a_run_is_kept_once_and_in_order(path):
    with History(path) as history:
        assert history.add([made(3), made(1), made(2)]) == 3
        assert history.add([made(3), made(4)]) == 1
    with History(path) as history:
        assert [row.started[8:10] for row in history.rows()] == ["02", "03", "04", "05"]
        assert [row.started[8:10] for row in history.rows(limit=2)] == ["04", "05"]
        assert history.document(made(3).id) == {"number": 3}
        with pytest.raises(KeyError):
            history.document("0" * 64)


def test_baselines_have_names(path):
    with History(path) as history:
        history.add([made(1), made(2)])
        history.save_baseline("main", [made(1).id])
        history.save_baseline("main", [made(2).id])
        history.save_baseline("old", [made(1).id])
        assert history.baselines() == {"main": [made(2).id], "old": [made(1).id]}
        history.remove([made(1).id], baseline="old")
        assert history.baselines() == {"main": [made(2).id]}
        assert [row.run for row in history.rows()] == [made(2).id]


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from history_case import made
from edgepress.driver.history.store import History
for number in range({start}, {start} + {count}):
    with History(Path({path!r})) as history:
        history.add([made(number)])
print("done", flush=True)
"""


def writer(path, start, count):
    text = WRITER.format(tests=str(Path(__file__).parent), start=start, count=count, path=str(path))
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)


def test_two_processes_at_once_lose_nothing(path):
    both = [writer(path, 0, 25), writer(path, 20, 25)]
    assert [one.wait(120) for one in both] == [0, 0]
    with History(path) as history:
        assert {row.run for row in history.rows()} == {made(number).id for number in range(45)}


def test_a_killed_writer_leaves_whole_runs(path):
    process = writer(path, 0, 10_000)
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < 60_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    with History(path) as history:
        rows = history.rows()
        assert rows
        assert history.add([made(99_999)]) == 1
        for row in rows:
            assert run_id(history.document(row.run)) == row.run
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("SELECT count(*) FROM runs").fetchone()[0] == len(rows) + 1


def test_an_older_file_is_brought_up_with_all_that_is_in_it(path):
    with History(path) as history:
        history.add([made(1)])
    more = (*MIGRATIONS, ("CREATE TABLE notes (run TEXT, note TEXT)", "INSERT INTO notes VALUES ('r', 'n')"))
    for _ in range(2):  # the step is made once
        with History(path, migrations=more) as history:
            assert [row.run for row in history.rows()] == [made(1).id]
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT * FROM notes").fetchall() == [("r", "n")]
    assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)


def test_a_step_that_fails_changes_nothing(path):
    with History(path) as history:
        history.add([made(1)])
    broken = (*MIGRATIONS, ("CREATE TABLE notes (run TEXT)", "INSERT INTO nowhere VALUES (1)"))
    with pytest.raises(OutputError, match="cannot be used"):
        History(path, migrations=broken)
    with History(path) as history:
        assert len(history.rows()) == 1


def test_a_newer_file_is_refused_and_left_alone(path):
    with History(path, migrations=(*MIGRATIONS, ())) as history:
        history.add([made(1)])
    before = path.read_bytes()
    with pytest.raises(OutputError, match="newer edgepress") as caught:
        History(path)
    assert "EDGEPRESS_HISTORY" in caught.value.remedy
    assert path.read_bytes() == before


def test_another_programs_database_is_refused_and_left_alone(path):
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(OutputError, match="another program"):
        History(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["no database", "torn", "wrong value"])
def test_damage_is_said(path, damage):
    with History(path) as history:
        history.add([made(number) for number in range(200)])
    if damage == "no database":
        path.write_bytes(b"not a database at all" * 100)
    elif damage == "torn":
        data = bytearray(path.read_bytes())
        data[4096:] = os.urandom(len(data) - 4096)
        path.write_bytes(data)
    else:
        connection = sqlite3.connect(path)
        connection.execute("UPDATE measurements SET sessions_ms = '{\"p50\": 1}'")
        connection.commit()
        connection.close()
    with pytest.raises(OutputError, match="damaged") as caught, History(path) as history:
        history.rows()
    assert "history import" in caught.value.remedy
    assert str(path) in caught.value.where


def test_a_place_that_is_none_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be used"):
        History(tmp_path / "file" / FILE_NAME)
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(OutputError, match="cannot be used"):
        History(tmp_path / FILE_NAME)


def test_a_held_file_is_waited_for_and_then_said(path, monkeypatch):
    with History(path):
        pass
    monkeypatch.setattr("edgepress.driver.history.store._BUSY_S", 0.1)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with History(path) as history:
        with pytest.raises(OutputError, match="locked") as caught:
            history.add([made(1)])
        assert "another process" in caught.value.remedy
        holder.execute("ROLLBACK")
        assert history.add([made(1)]) == 1


def test_documents_are_kept_whole(path):
    document = {"void": False, "nested": {"b": [1, 2.5, None, "ü"], "a": {}}}
    identity = run_id(document)
    with History(path) as history:
        history.add([RecordedRun(id=identity, document=document, measurements=())])
        assert history.document(identity) == document
    stored = sqlite3.connect(path).execute("SELECT document FROM runs").fetchone()[0]
    assert json.loads(stored) == document


def test_the_first_use_by_two_processes_is_no_other_programs_database(path, monkeypatch):
    """The other one makes the file just as this one looks at it."""
    path.parent.mkdir(parents=True)
    real = sqlite3.connect

    class Watched:
        def __init__(self, *arguments, **options):
            self._real, self._made = real(*arguments, **options), False

        def __getattr__(self, name):
            return getattr(self._real, name)

        def execute(self, text, *values):
            found = self._real.execute(text, *values)
            if "application_id" in text and not self._made:  # half of what is asked about the file
                rows, self._made = found.fetchall(), True
                monkeypatch.setattr(sqlite3, "connect", real)
                with History(path) as other:
                    other.add([made(1)])
                return Answered(rows)
            return found

    class Answered:
        def __init__(self, rows):
            self._rows = rows

        def fetchone(self):
            return self._rows[0]

    monkeypatch.setattr(sqlite3, "connect", Watched)
    with History(path) as history:
        assert [row.run for row in history.rows()] == [made(1).id]


def test_a_run_that_another_process_removed_cannot_be_named(path):
    with History(path) as history, pytest.raises(OutputError) as caught:
        history.save_baseline("main", [made(1).id])
    assert "try again" in caught.value.remedy
    assert "damaged" not in caught.value.what


def test_a_home_that_there_is_not_is_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEPRESS_HISTORY", "~nobody-of-this-name/runs")
    assert history_file() == Path("~nobody-of-this-name/runs/history.sqlite")
