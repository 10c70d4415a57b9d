"""Answers as CSV, JUnit, Markdown and whole files; plots as SVG and HTML."""

import argparse
import csv
import io
import itertools
import json
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from edgepress.driver.history.formats import (
    check_format,
    csv_text,
    deliver,
    formatted,
    junit_text,
    markdown_text,
    write_whole,
)
from edgepress.driver.history.plot import html_page, series_of, sparkline, svg_figure
from edgepress.driver.history.rows import METRICS_BY_NAME, Measurement
from edgepress.driver.output import Answer, Case, Table
from edgepress.graph.errors import OutputError, RecipeError
from hypothesis import given
from hypothesis import strategies as st

SVG = "{http://www.w3.org/2000/svg}"
P50, SIZE = METRICS_BY_NAME["p50"], METRICS_BY_NAME["size"]
NASTY = '<script>alert("x")</script>&\x00\x1b[31m]]>\ufffe'


def asked(**given_options):
    options = {"json": False, "format": None, "output": None, **given_options}
    return argparse.Namespace(**options)


ANSWER = Answer(
    document={"a": 1},
    blocks=("Text.", Table(columns=("x", "y"), rows=(("1", "2"),), numeric=frozenset({"y"}))),
    records=[{"name": "n", "p50_ms": 1.5}],
    cases=[Case(name="g", group="s", state="passed")],
)


# -------------------------------------------------------------------------------------------- CSV


@given(
    st.lists(st.dictionaries(st.sampled_from("abc"), st.text() | st.floats(allow_nan=False) | st.booleans()))
)
def test_csv_is_read_back_by_the_csv_module(records):
    text = csv_text(records)
    rows = list(csv.reader(io.StringIO(text, newline="")))
    names = rows[0] if rows else []
    for record, row in zip(records, rows[1:], strict=True) if names else ():
        for name, cell in zip(names, row, strict=True):
            value = record.get(name)
            if value is None:
                assert cell == ""
            elif isinstance(value, bool):
                assert cell == str(value).lower()
            elif isinstance(value, float):
                assert float(cell) == value
            else:
                one_line = re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", value)
                assert cell in (one_line, f"'{one_line}")


@given(
    st.sampled_from("=+-@\uff1d\uff0b\uff0d\uff20"),
    st.text(),
    st.sampled_from(["", " ", "\t", "\r\n", "\u2003"]),
)
def test_no_cell_of_text_is_a_formula(first, rest, blanks):
    text = csv_text([{"device": blanks + first + rest}])
    (_, (cell,)) = csv.reader(io.StringIO(text, newline=""))
    assert cell.startswith("'")


def test_numbers_in_csv_are_numbers_and_unrounded():
    (_, row) = csv.reader(io.StringIO(csv_text([{"a": -1.25e-9, "b": None, "c": 10**15, "d": ("x", "=y")}])))
    assert row == ["-1.25e-09", "", "1000000000000000", "x; =y"]


# ------------------------------------------------------------------------------------------ JUnit


def test_junit_has_the_usual_structure():
    cases = [
        Case(name="p90>+5%", group="edgepress.net", state="passed", told="10 ms"),
        Case(name="size>1kB", group="edgepress.net", state="failed", text="2 kB", reason="failed"),
        Case(name="p99>+5%", group="edgepress.net", state="skipped", text="too noisy"),
        Case(name="reference", group="edgepress", state="error", text="there is none", reason="missing"),
    ]
    root = ElementTree.fromstring(junit_text(cases))
    (suite,) = root
    assert root.tag, suite.tag == ("testsuites", "testsuite")
    # Attributes and children that the schema of Jenkins' xUnit plugin (junit-10.xsd) allows.
    assert set(root.attrib) <= {"name", "time", "tests", "failures", "errors"}
    counts = {"tests": "4", "failures": "1", "errors": "1"}
    assert {key: root.get(key) for key in counts} == counts
    assert {key: suite.get(key) for key in (*counts, "skipped")} == {**counts, "skipped": "1"}
    assert set(suite.attrib) <= {"name", "tests", "failures", "errors", "skipped", "time", "timestamp"}
    assert all(set(case.attrib) == {"name", "time", "classname"} for case in suite)
    assert all(set(child.attrib) <= {"type", "message"} for case in suite for child in case)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
    assert [case.get("name") for case in suite] == [case.name for case in cases]
    assert all(case.get("classname") and case.get("time") for case in suite)
    assert [[child.tag for child in case] for case in suite] == [
        ["system-out"],
        ["failure"],
        ["skipped"],
        ["error"],
    ]
    failure = suite[1][0]
    assert (failure.get("message"), failure.get("type"), failure.text) == ("2 kB", "failed", "2 kB")


@given(st.text())
def test_junit_is_xml_whatever_a_device_is_called(text):
    made = junit_text([Case(name=text, group=text, state="failed", text=text, told=text)])
    root = ElementTree.fromstring(made.encode())
    assert root[0][0].get("name") is not None


# --------------------------------------------------------------------------------------- Markdown


def test_markdown_tables():
    table = Table(
        columns=("name", "p50"),
        rows=(("a|b", "1 ms"), ("<b>x</b>\nnext", "2 ms")),
        title="T*",
        numeric=frozenset({"p50"}),
    )
    assert markdown_text(["One.\nTwo_.", table]).splitlines() == [
        "One.  ",
        "Two\\_.",
        "",
        "**T\\***",
        "",
        "| name | p50 |",
        "| --- | ---: |",
        "| a\\|b | 1 ms |",
        "| &lt;b&gt;x&lt;/b&gt; next | 2 ms |",
    ]


@given(st.text())
def test_no_cell_leaves_its_row_or_makes_a_tag(text):
    made = markdown_text([Table(columns=("x",), rows=((text,),))])
    lines = made.rstrip("\n").split("\n")
    assert len(lines) == 3
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", lines[2])) == 2
    assert "<" not in lines[2]


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "form"),
    [("a.json", "json"), ("a.csv", "csv"), ("a.XML", "junit"), ("a.md", "markdown"), ("a.txt", "table")],
)
def test_a_files_ending_says_its_form(tmp_path, name, form):
    stream = io.StringIO()
    path = tmp_path / name
    path.write_text("old")
    deliver(ANSWER, asked(output=str(path)), stream)
    written = path.read_text()
    stamp = re.compile(r'timestamp="[^"]+"')
    assert stamp.sub("", written) == stamp.sub("", formatted(ANSWER, form))
    assert stream.getvalue().startswith("Text.\n")  # the tables are still shown
    assert list(tmp_path.iterdir()) == [path]


def test_forms_on_stdout():
    for form in ("json", "csv", "junit", "markdown", "table"):
        stream = io.StringIO()
        deliver(ANSWER, asked(format=form), stream)
        assert stream.getvalue()[:5] == formatted(ANSWER, form)[:5]
    stream = io.StringIO()
    deliver(ANSWER, asked(json=True), stream)
    assert json.loads(stream.getvalue()) == {"a": 1}


def test_json_on_stdout_beside_a_file_of_another_form(tmp_path):
    stream = io.StringIO()
    options = asked(json=True, format="csv", output=str(tmp_path / "a"))
    check_format(options)
    deliver(ANSWER, options, stream)
    assert json.loads(stream.getvalue()) == {"a": 1}
    assert (tmp_path / "a").read_text() == "name,p50_ms\nn,1.5\n"


def test_what_cannot_be_delivered_is_said_before_any_work(tmp_path):
    with pytest.raises(RecipeError, match="contradict"):
        check_format(asked(json=True, format="csv"))
    with pytest.raises(RecipeError, match="not known"):
        check_format(asked(output=str(tmp_path / "a.odd")))
    with pytest.raises(OutputError, match="cannot be written"):
        check_format(asked(output=str(tmp_path / "missing" / "a.csv")))
    with pytest.raises(OutputError, match="cannot be written"):
        check_format(asked(format="csv", output=str(tmp_path)))
    check_format(asked(json=True, format="json"))
    with pytest.raises(OutputError, match="cannot be written"):
        write_whole(tmp_path / "missing" / "a", "text")


# ------------------------------------------------------------------------------------------ plots


def row(number, **fields):
    return Measurement(
        **{
            "run": f"{number:064x}", "thing": "bundle", "role": "bundle", "kind": "benchmark",
            "started": f"2026-01-{number:02}T12:00:00Z", "device": "local", "model": "net", "target": "host",
            "threads": 1, "p50_ms": 10.0 + number, "p50_low_ms": 9.5 + number, "p50_high_ms": 11.0 + number,
            "file_bytes": 2_000_000, **fields,
        }
    )  # fmt: skip


def figure(rows, metrics=(P50, SIZE)):
    return ElementTree.fromstring(svg_figure(series_of(rows), metrics))


def panels(root):
    return [group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}polyline") is not None]


def test_a_panel_for_every_metric_with_unit_ticks_and_marks():
    root = figure([row(number) for number in range(1, 6)])
    first, second = panels(root)
    texts = [text.text for text in first.findall(f"{SVG}text")]
    assert texts[0] == "p50 latency [ms], axis not from 0"
    assert "2026-01-01 12:00" in texts
    assert second.find(f"{SVG}text").text == "file size [MB]"
    ticks = [float(text) for text in texts if re.fullmatch(r"[0-9.]+", text)]
    steps = {round(high - low, 9) for low, high in itertools.pairwise(ticks)}
    assert len(steps) == 1
    assert min(ticks) <= 10.5
    assert max(ticks) >= 16
    assert len(first.findall(f"{SVG}g/{SVG}circle")) == 5
    # A whisker is three lines; sizes have none.
    assert len([line for line in first.findall(f"{SVG}line") if line.get("class") == "whisker"]) == 15
    assert not [line for line in second.findall(f"{SVG}line") if line.get("class") == "whisker"]


def test_marks_lie_where_the_axis_says():
    (panel,) = panels(figure([row(1), row(2), row(3)], [P50]))
    grid = [float(line.get("y1")) for line in panel.findall(f"{SVG}line") if line.get("class") == "grid"]
    texts = [text.text for text in panel.findall(f"{SVG}text")]
    ticks = [float(text) for text in texts if re.fullmatch(r"[0-9.]+", text)]
    slope = (grid[-1] - grid[0]) / (ticks[-1] - ticks[0])
    marks = [float(circle.get("cy")) for circle in panel.findall(f"{SVG}g/{SVG}circle")]
    assert marks == pytest.approx([grid[0] + slope * (value - ticks[0]) for value in (11, 12, 13)], abs=0.2)
    assert marks == sorted(marks, reverse=True)


def test_nothing_leaves_the_figure():
    rows = [row(number, p50_ms=10.0**number, p50_low_ms=None, p50_high_ms=None) for number in range(1, 9)]
    for rows_ in (rows, rows[:1], [row(1, p50_ms=0.25, p50_low_ms=None, p50_high_ms=None, file_bytes=0)] * 1):
        root = figure(rows_)
        for panel in panels(root):
            for circle in panel.findall(f"{SVG}g/{SVG}circle"):
                assert 84 <= float(circle.get("cx")) <= 940
                assert 34 <= float(circle.get("cy")) <= 208.5
        for text in root.iter(f"{SVG}text"):
            if text.get("text-anchor") == "middle":
                assert float(text.get("x")) <= 960 - 55


def test_void_runs_are_marked_and_not_joined():
    root = figure([row(1), row(2, void=True, void_reasons=("throttled",)), row(3)], [P50])
    (panel,) = panels(root)
    (line,) = panel.findall(f"{SVG}polyline")
    assert len(line.get("points").split()) == 2
    hollow = [circle for circle in panel.findall(f"{SVG}g/{SVG}circle") if circle.get("fill") == "#fff"]
    assert len(hollow) == 1
    titles = [title.text for title in panel.iter(f"{SVG}title")]
    assert any("void: throttled" in title for title in titles)
    assert any("void runs" in (text.text or "") for text in root.iter(f"{SVG}text"))


def test_series_are_told_apart_by_what_differs():
    rows = [row(1), row(2, threads=4), row(3, device="pi5"), row(4, target="pi", shapes="x:1")]
    names = [series.name for series in series_of(rows)]
    assert names == [
        "net for host, 1 threads",
        "net for host, 4 threads",
        "net for host on pi5",
        "net for pi",
    ]


def test_series_of_another_size_have_an_axis_of_their_own():
    rows = [row(number, model=name, p50_ms=size + number / 100) for name, size in SIZES for number in (1, 2)]
    names = [
        {title.text.split(" ")[0] for title in panel.iter(f"{SVG}title")}
        for panel in panels(figure(rows, [P50]))
    ]
    assert names == [{"large"}, {"middle", "alike"}, {"small"}]


SIZES = (("small", 1.0), ("middle", 12.0), ("large", 40.0), ("alike", 14.0))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_a_page_needs_nothing_else_and_escapes_every_name():
    rows = [row(1, model=NASTY, device=NASTY, void=True, void_reasons=(NASTY,)), row(2)]
    text = html_page(series_of(rows), [P50], "2026-01-31T00:00:00Z")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert [value for _, value in page.attributes if value and "://" in value] == [
        "http://www.w3.org/2000/svg"
    ]
    assert "@import" not in text
    assert page.tags.count("tr") == 3
    ElementTree.fromstring(svg_figure(series_of(rows), [P50]))


@given(st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=60))
def test_small_lines_for_a_terminal(values):
    line = sparkline(values)
    shown = values[-40:]
    assert len(line) == len(shown)
    if max(shown) > min(shown):
        assert line[shown.index(max(shown))] == "█"
        assert line[shown.index(min(shown))] == "▁"


@given(st.floats(1e-9, 1e12), st.floats(0, 1e3))
def test_axes_hold_every_range(low, spread):
    rows = [row(1, p50_ms=low, p50_low_ms=None, p50_high_ms=None),
            row(2, p50_ms=low * (1 + spread), p50_low_ms=None, p50_high_ms=None)]  # fmt: skip
    found = panels(figure(rows, [P50]))
    assert len(found) == 1
    (panel,) = found
    assert all(34 <= float(mark.get("cy")) <= 208.5 for mark in panel.findall(f"{SVG}g/{SVG}circle"))
    texts = [text.text for text in panel.findall(f"{SVG}text")]
    ticks = [text for text in texts if re.fullmatch(r"[0-9.]+", text)]
    assert 2 <= len(ticks) <= 8
    assert len(set(ticks)) == len(ticks)


# ------------------------------------------------------------------------------------ what stands there


def test_a_link_leads_to_the_file_and_what_is_no_file_stays(tmp_path):
    real, link, pipe = tmp_path / "real.json", tmp_path / "link.json", tmp_path / "pipe.json"
    real.write_text("old")
    link.symlink_to(real)
    write_whole(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="cannot be written") as caught:
        write_whole(pipe, "new")
    assert "stdout" in caught.value.remedy
    assert pipe.is_fifo()
    with pytest.raises(OutputError, match="no such folder"):
        write_whole(real / "x.json", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "pipe.json", "real.json"]
