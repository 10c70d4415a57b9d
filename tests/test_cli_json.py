"""--json says everything that the tables say: each cell is looked for among the document's values.

A cell counts as found when it is a string of the document, or when nothing is left of it after taking
out the document's strings, its numbers in their units, and the few words that only connect them.
"""

import json
import re
from importlib import import_module

import numpy as np
import pytest
from cli_case import calib_file, make_model, model_file, samples
from edgepress.driver.cli import _COMMAND_MODULES
from edgepress.driver.options import parse_arguments
from edgepress.driver.output import Table, format_bytes, format_ms, format_percent, json_text
from edgepress.driver.reporter import SilentReporter
from onnx import helper

# Names of rows and words between figures: they carry no result of their own.
SAID_BY_ROWS = """
model size latency median p99 load time peak memory drift cosine l2 sqnr kl flips max abs top1 limit of it to
baseline files every digest holds later measurements golden samples equal bit by within the tolerance manifest
none made from asked for session options versions stamps opset evidence precision task target data yes no
difference not slower faster input output points multiply accumulates fewer cut alone
"""
WORDS = frozenset(SAID_BY_ROWS.split())
PHRASES = frozenset({"the runtime's defaults"})
UNITS = "%|ms|dB|kB|MB|GB|B|x"
NUMBER = re.compile(rf"(?<![\w.])[-+]?\d+(?:,\d{{3}})*(?:\.\d+)?(?:e[-+]?\d+)?(?: ?(?:{UNITS}))?(?![\w.])")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, labelled data, and a bundle."""
    folder = tmp_path_factory.mktemp("json")
    model_file(folder, make_model(width=256))
    calib_file(folder, x=samples(), labels=np.arange(40) % 16)
    np.savez(folder / "in.npz", x=samples(3))
    answer_of(folder, "compile model.onnx --target raspberry-pi-5 --calib calib.npz -o out --skip benchmark")
    return folder


def answer_of(folder, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = parse_arguments(words.split())
        module = import_module(f"edgepress.driver.{_COMMAND_MODULES[arguments.command]}")
        return module.run(arguments, SilentReporter())


def values_of(document, strings, numbers):
    """Every key, string and number of a JSON document."""
    if isinstance(document, dict):
        for key, value in document.items():
            strings.add(key)
            values_of(value, strings, numbers)
    elif isinstance(document, list):
        for value in document:
            values_of(value, strings, numbers)
    elif isinstance(document, str):
        strings.add(document)
    elif isinstance(document, (int, float)) and not isinstance(document, bool):
        numbers.add(document)


def renderings(number):
    """A number in every unit and precision that tables use."""
    yield from (str(number), f"{number:.2f}", f"{number:.1f}", f"{number:.3g}", f"{number:.2f}x")
    yield from (f"{number:.1f} dB", f"{number * 100:.2f}", f"{number * 100:+.2f}", format_percent(number))
    if number >= 0:
        yield from (format_bytes(number), format_ms(number))
    if isinstance(number, int):
        yield f"{number:,}"


def left_over(cell, strings, shown):
    """What of a cell the document does not say."""
    if cell in PHRASES or cell in strings or any(cell in text for text in strings):
        return ""
    rest = cell
    for text in sorted(strings, key=len, reverse=True):
        if len(text) >= 3 and text in rest:
            rest = rest.replace(text, " ")
    rest = NUMBER.sub(lambda found: " " if found[0] in shown else found[0], rest)
    words = re.split(r"[\s\[\](),:;]+", rest.replace(" = ", " "))
    return " ".join(
        word for word in words if word and word.lower() not in WORDS and word not in strings | {"="}
    )


def unsaid(answer):
    """(column, cell, what is missing) for every cell of every table that the document does not hold."""
    strings, numbers = set(), set()
    values_of(json.loads(json_text(answer.document)), strings, numbers)
    shown = {text for number in numbers for text in renderings(number)}
    tables = [block for block in answer.blocks if isinstance(block, Table)]
    assert tables, "the command prints no table"
    return [
        (column, cell, rest)
        for table in tables
        for row in table.rows
        for column, cell in zip(table.columns, row, strict=True)
        if (rest := left_over(cell, strings, shown))
    ]


@pytest.mark.parametrize(
    "words",
    [
        "compile model.onnx --target host --calib calib.npz -o timed",
        "compile model.onnx --target raspberry-pi-5 --calib calib.npz -o dry --dry-run",
        "compile model.onnx --target raspberry-pi-5 --calib calib.npz -o dry --dry-run -v",
        "inspect model.onnx",
        "inspect model.onnx --target raspberry-pi-5",
        "inspect model.onnx --prunable",
        "compile model.onnx --target raspberry-pi-5 --calib calib.npz --prune 0.3 -o cut --skip benchmark",
        "inspect cut",
        "inspect out",
        "verify out",
        "run out --inputs in.npz",
        "drift model.onnx out --data calib.npz --max-drift l2=50%,sqnr=1dB,flips=90%",
        "benchmark out --baseline model.onnx --rounds 1",
        "targets list",
        "doctor",
    ],
)
def test_the_document_holds_every_cell(home, words):
    assert unsaid(answer_of(home, words)) == []


def test_a_profile_is_told_in_full(home):
    import tomllib

    for words in ("targets show raspberry-pi-4", "targets probe"):
        answer = answer_of(home, words)
        document = json.loads(json_text(answer.document))
        for key, value in tomllib.loads(answer.blocks[0]).items():
            assert key in document
            if isinstance(value, (str, int)):
                assert document[key] == value


def test_what_a_tensorrt_table_says_is_told_in_full(home):
    graph = make_model(
        nodes=[
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="quantize"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="back"),
            helper.make_node("MatMul", ["d", "w1"], ["h"], name="first"),
            helper.make_node("MatMul", ["h", "w2"], ["y"], name="second"),
        ]
    )
    model_file(home, graph, "dynamic.onnx")
    answer = answer_of(home, "inspect dynamic.onnx --target jetson-orin-nano")
    strings = set()
    values_of(json.loads(json_text(answer.document)), strings, set())
    findings = [block for block in answer.blocks if isinstance(block, str) and "\n  why: " in block]
    assert findings
    for block in findings:
        level, why, remedy = (line.split(": ", 1)[-1].strip() for line in block.splitlines())
        assert why in strings
        assert remedy.removeprefix("do:").strip() in strings
        assert level.split(" in ")[0] in strings


def test_the_search_notices_a_figure_that_the_document_lacks(home):
    answer = answer_of(home, "drift model.onnx out --data calib.npz")
    document = json.loads(json_text(answer.document))
    document["drift"]["l2"] = None
    document["drift"]["outputs"] = []
    thinner = type(answer)(document=document, blocks=answer.blocks)
    assert [cell for _, cell, _ in unsaid(thinner)] == [format_percent(answer.document["drift"].l2)]
