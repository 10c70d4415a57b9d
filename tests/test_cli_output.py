"""What commands write: tables and JSON on stdout, progress on stderr."""

import io
import json
import re
from pathlib import Path

import pytest
from edgepress.driver.output import (
    Answer,
    Table,
    format_bytes,
    format_ms,
    format_percent,
    json_text,
    render,
    write_answer,
)
from edgepress.driver.reporter import (
    LiveReporter,
    PlainReporter,
    SilentReporter,
    absolute_progress,
    console_reporter,
)
from rich.console import Console

ANSWER = Answer(
    document={"b": Path("out"), "a": (1, None)},
    blocks=(
        "Made [bold]out[/bold].",
        Table(
            title="Sizes",
            columns=("what", "bytes"),
            rows=(("x" * 200, "7"), ("y", "1000")),
            numeric=frozenset({"bytes"}),
        ),
    ),
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines_of(answer, stream=None):
    stream = stream or io.StringIO()
    write_answer(answer, as_json=False, stream=stream)
    return stream.getvalue().splitlines()


def test_a_pipe_gets_plain_unwrapped_lines():
    lines = lines_of(ANSWER)
    assert lines[0] == "Made [bold]out[/bold]."
    assert lines[1:3] == ["", "Sizes"]
    assert lines[4].split() == ["x" * 200, "7"]
    assert lines[4].index("7") == lines[5].index("1000") + 3
    assert not any("\x1b" in line or line != line.rstrip() for line in lines)


def test_colour_is_for_terminals_and_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = "\n".join(lines_of(ANSWER, Terminal()))
    assert "\x1b[" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = "\n".join(lines_of(ANSWER, Terminal()))
    # Bold and dim may stay; a colour code (30 to 49, 90 to 107) may not.
    assert not re.search(r"\x1b\[[0-9;]*\b(?:3\d|4\d|9\d|10[0-7])m", plain)


def test_what_a_device_calls_itself_moves_no_cursor():
    evil = "board\x1b[2J\x9b1m\x07"
    text = render([evil, Table(columns=("a",), rows=((evil,),), title=evil)], io.StringIO())
    assert not set(text) & {"\x1b", "\x9b", "\x07"}
    stream = io.StringIO()
    PlainReporter(stream, "normal").warn(evil)
    assert "\x1b" not in stream.getvalue()


def test_json_is_one_document_in_a_fixed_order():
    stream = io.StringIO()
    write_answer(ANSWER, as_json=True, stream=stream)
    assert json.loads(stream.getvalue()) == {"a": [1, None], "b": "out"}
    assert stream.getvalue().index('"a"') < stream.getvalue().index('"b"')
    assert stream.getvalue().endswith("}\n")


def test_json_refuses_what_it_cannot_say():
    with pytest.raises(TypeError, match="cannot stand in an answer"):
        json_text({"a": object()})


def test_names_that_the_stream_cannot_encode_still_arrive():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    write_answer(Answer(document={}, blocks=("naïve \udcff",)), as_json=False, stream=stream)
    assert raw.getvalue() == b"na\\xefve \\udcff\n"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (22_900_000, "22.9 MB"), (3e9, "3.00 GB")],
)
def test_sizes(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 ms"), (0.0412, "0.0412 ms"), (1, "1.00 ms"), (11.84, "11.8 ms"), (1234.5, "1234 ms")],
)
def test_durations(value, text):
    assert format_ms(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0, "0 %"), (0.257, "25.7 %"), (1, "100 %"), (0.000412, "0.0412 %")],
        *[(4.7e-17, "4.7e-15 %"), (-0.05, "-5.00 %")],
    ],
)
def test_percentages(value, text):
    assert format_percent(value) == text


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def plain(verbosity):
    stream, clock = io.StringIO(), Clock()
    return PlainReporter(stream, verbosity, clock), stream, clock


def work(reporter, clock, steps, seconds_each):
    with reporter.stage("calibrate", total=steps) as stage:
        for _ in range(steps):
            clock.now_s += seconds_each
            stage.advance()


def test_short_stages_are_silent_and_long_ones_say_how_long():
    reporter, stream, clock = plain("normal")
    work(reporter, clock, 2, 0.5)
    assert stream.getvalue() == ""
    work(reporter, clock, 3, 1.0)
    assert stream.getvalue() == "calibrate: 3.0 s\n"


def test_a_long_stage_tells_the_time_left_every_ten_seconds():
    reporter, stream, clock = plain("normal")
    work(reporter, clock, 30, 1.0)
    assert stream.getvalue().splitlines() == [
        "calibrate: 10 of 30, about 20 s left",
        "calibrate: 20 of 30, about 10 s left",
        "calibrate: 30 of 30, about 0 s left",
        "calibrate: 30.0 s",
    ]


def test_a_stage_of_unknown_length_counts():
    reporter, stream, clock = plain("normal")
    with reporter.stage("download") as stage:
        clock.now_s += 11
        stage.advance(5)
    assert stream.getvalue().splitlines() == ["download: 5 done", "download: 11.0 s"]


def test_quiet_and_verbose():
    reporter, stream, clock = plain("quiet")
    work(reporter, clock, 30, 1.0)
    reporter.note("n")
    reporter.warn("w")
    assert stream.getvalue() == "warning: w\n"
    reporter, stream, clock = plain("verbose")
    work(reporter, clock, 1, 0.1)
    reporter.note("n")
    assert stream.getvalue() == "calibrate: 0.1 s\nn\n"


def test_the_library_default_says_nothing(capsys):
    reporter = SilentReporter()
    with reporter.stage("x", total=2) as stage:
        stage.advance()
    reporter.note("n")
    reporter.warn("w")
    assert capsys.readouterr() == ("", "")


def test_the_reporter_suits_the_stream(monkeypatch):
    assert isinstance(console_reporter(io.StringIO(), "normal"), PlainReporter)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(console_reporter(Terminal(), "normal"), LiveReporter)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(console_reporter(Terminal(), "normal"), PlainReporter)


def live(verbosity):
    stream = Terminal()
    return LiveReporter(Console(file=stream, force_terminal=True, width=100), verbosity), stream


def interrupted(reporter):
    with reporter.stage("outer", total=2):
        with reporter.stage("inner", total=4) as stage:
            stage.advance(4)
        raise KeyboardInterrupt


def test_live_stages_nest_and_clean_up_after_an_error():
    reporter, stream = live("verbose")
    with pytest.raises(KeyboardInterrupt):
        interrupted(reporter)
    reporter.warn("[red]careful[/red]")
    text = stream.getvalue()
    assert "outer" in text
    assert "inner: 0.0 s" in text
    assert "warning: [red]careful[/red]" in text
    # The cursor is shown again once the display has stopped.
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_absolute_counts_become_steps():
    reporter, stream, clock = plain("normal")
    with reporter.stage("drift", total=8) as stage:
        tell = absolute_progress(stage)
        for done in (1, 3, 4, 2):  # the second round begins with 2
            clock.now_s += 5
            tell(done, 4)
    assert stream.getvalue().splitlines() == [
        "drift: 3 of 8, about 17 s left",
        "drift: 6 of 8, about 7 s left",
        "drift: 20.0 s",
    ]


def test_live_and_quiet_shows_only_warnings():
    reporter, stream = live("quiet")
    with reporter.stage("work", total=1) as stage:
        stage.advance()
    reporter.note("n")
    reporter.warn("w")
    assert re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()) == "warning: w\n"
