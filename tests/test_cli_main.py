"""The command line as a whole: help, start-up cost, spelling, exit codes, signals and pipes."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from edgepress import __version__
from edgepress.compress.recipe import DriftLimit, Pins, Recipe, write_recipe
from edgepress.driver import cli
from edgepress.driver.commands import COMMANDS
from edgepress.driver.options import build_parser, parse_arguments, parse_assignment, parse_shape, recipe_from
from edgepress.driver.output import Answer
from edgepress.graph.errors import (
    DriftExceeded,
    InternalError,
    ModelError,
    NotSupported,
    RecipeError,
)

HEAVY = (
    "torch",
    "onnxruntime",
    "transformers",
    "tokenizers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "numpy",
    "rich",
    "datasets",
    "pyarrow",
)


def leaves(commands=COMMANDS, prefix=()):
    for command in commands:
        path = (*prefix, command.name)
        yield from leaves(command.subcommands, path) if command.subcommands else [path]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["compile", "--help"], ["targets", "list", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys\n"
        "from edgepress.driver.cli import main\n"
        "code = main(sys.argv[1:])\n"
        f"print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])\n"
        "raise SystemExit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_help_is_quick():
    # CPU time, not wall time: the machine may be busy. The claim is 0.3 s.
    program = (
        "import os, edgepress.driver.cli as cli; cli.main(['--help']); "
        "times = os.times(); print(times.user + times.system)"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout.splitlines()[-1]))
    assert min(seconds) < 0.3


@pytest.mark.parametrize("path", list(leaves()), ids=" ".join)
def test_every_command_has_help_with_examples(path, capsys):
    assert cli.main([*path, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:" in text
    assert f"edgepress {' '.join(path)}" in text


@pytest.mark.parametrize("path", list(leaves()), ids=" ".join)
def test_every_example_parses(path):
    command = next(item for item in COMMANDS if item.name == path[0])
    for name in path[1:]:
        command = next(item for item in command.subcommands if item.name == name)
    assert command.examples
    for example in command.examples:
        words = example.partition(" > ")[0].split()
        assert words[0] == "edgepress"
        parse_arguments(words[1:])


def test_the_promised_surface_exists():
    words = """
        compile m.onnx --target host -o out --calib c.npz --eval e.npz --samples 3 --precision int8
        --quantization static --calib-method mse --max-drift cosine=1% --keep-float a --keep-float b
        --shape x:1x2 --threads 2 --tokenizer t --preprocessor p --set target.a=1 --data-free --trust-code
        --skip drift,golden --overwrite --seed 7 --dry-run --json -q
    """
    arguments = parse_arguments(words.split())
    assert recipe_from(arguments) == Recipe(
        target="host",
        target_overrides={"a": "1"},
        precision="int8",
        quantization="static",
        calib_method="mse",
        max_drift=(DriftLimit(metric="cosine", limit=0.01),),
        keep_float=("a", "b"),
        shapes={"x": (1, 2)},
        threads=2,
        samples=3,
        seed=7,
        skip=("drift", "golden"),
        data_free=True,
        trust_code=True,
    )
    assert (arguments.calib, arguments.eval, arguments.output) == ("c.npz", "e.npz", "out")


def test_underscores_count_as_dashes_in_names_but_not_in_values():
    arguments = parse_arguments(
        ["compile", "a_b.onnx", "--calib_method=mse", "--keep_float", "x_y", "--target=a_b"]
    )
    assert (arguments.model, arguments.calib_method, arguments.keep_float) == ("a_b.onnx", "mse", ["x_y"])
    assert arguments.target == "a_b"
    assert parse_arguments(["verify", "--", "--a_b"]).bundle == "--a_b"


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("compile m.onnx --targ host", "--target"),
        ("compile m.onnx --target host --precison int8", "--precision"),
        ("compil m.onnx", "did you mean compile"),
        ("compile m.onnx --precision int9", "did you mean int8"),
        ("compile m.onnx --threads two", "edgepress compile --help"),
        ("compile m.onnx --threads 0", "edgepress compile --help"),
        ("drift a b --samples 0", "edgepress drift --help"),
        ("compile m.onnx --seed=-1", "edgepress compile --help"),
        ("compile", "edgepress compile --help"),
        ("targets shwo host", "did you mean show"),
        ("verify out -q -v", "edgepress verify --help"),
        ("", "edgepress --help"),
    ],
)
def test_a_command_line_that_is_not_understood(words, remedy, capsys):
    assert cli.main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert remedy in printed.err.splitlines()[-1]
    assert printed.err.splitlines()[-1].startswith("  do:")
    assert "Traceback" not in printed.err


def test_a_recipe_file_is_overridden_by_options(tmp_path):
    pinned = Recipe(
        target="raspberry-pi-5",
        seed=5,
        target_overrides={"a": "1", "b": "2"},
        shapes={"x": (1,), "y": (2,)},
        pins=Pins(model_sha256="0", precision="int8"),
    )
    write_recipe(pinned, tmp_path / "r.toml")
    start = ["compile", "m.onnx", "--recipe", str(tmp_path / "r.toml")]
    assert recipe_from(parse_arguments(start)) == pinned
    alias = ["compile", "m.onnx", "--config", str(tmp_path / "r.toml")]
    assert recipe_from(parse_arguments(alias)) == pinned
    assert recipe_from(parse_arguments([*start, "--skip", "benchmark"])).pins == pinned.pins
    changed = recipe_from(parse_arguments([*start, "--set", "target.b=3", "--shape", "y:4", "--seed", "0"]))
    assert (changed.target, changed.seed, changed.pins) == ("raspberry-pi-5", 0, None)
    assert changed.target_overrides == {"a": "1", "b": "3"}
    assert changed.shapes == {"x": (1,), "y": (4,)}


@pytest.mark.parametrize(
    "words",
    [
        "--skip verify",
        "--skip drift,",
        "--max-drift 1%,2%",
        "--keep-float (",
        "--shape x",
        "--shape x:1 --shape x:2",
        "--set a=1",
    ],
)
def test_bad_option_values_are_recipe_errors(words):
    with pytest.raises(RecipeError) as caught:
        recipe_from(parse_arguments(["compile", "m.onnx", "--target", "host", *words.split()]))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("input_ids:1x128", ("input_ids", (1, 128))),
        ("image:0:1X3x224x224", ("image:0", (1, 3, 224, 224))),
        ("scores:7", ("scores", (7,))),
    ],
)
def test_shapes(text, expected):
    assert parse_shape(text) == (*expected, None)


@pytest.mark.parametrize(
    "text", ["", "x", "x:", ":1x2", "x:1x", "x:0x2", "x:-1", "x:1,2", "x:1.5", "x:batch"]
)
def test_malformed_shapes_are_refused(text):
    with pytest.raises(RecipeError, match="is not a shape"):
        parse_shape(text)


def test_assignments():
    assert parse_assignment("target.memory.ram_bytes = 1024") == ("memory.ram_bytes", "1024")
    assert parse_assignment("target.name=a=b") == ("name", "a=b")


@pytest.mark.parametrize("text", ["", "target", "target.x", "target.=1", "cpu.x=1", "target.x=", "=1"])
def test_malformed_assignments_are_refused(text):
    with pytest.raises(RecipeError, match="is not an override"):
        parse_assignment(text)


def test_a_compile_needs_a_target():
    with pytest.raises(RecipeError, match="no target"):
        recipe_from(parse_arguments(["compile", "m.onnx"]))


def fail_with(error):
    def run(_arguments, _reporter):
        raise error

    return run


@pytest.fixture
def doctor_runs(monkeypatch):
    """Let `edgepress doctor` run a function of the test's own instead."""
    from edgepress.driver import doctor_command

    return lambda run: monkeypatch.setattr(doctor_command, "run", run)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelError("broken", where="m.onnx", remedy="mend it"), 2),
        (DriftExceeded("too far", remedy="mend it"), 3),
        (NotSupported("no", remedy="mend it"), 4),
        (MemoryError(), 4),
        (ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir.passes"), 4),
        (OSError(errno.ENOSPC, "No space left on device", "out/model.onnx"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_foreseen_failures_print_lines_and_no_trace(doctor_runs, capsys, error, code):
    doctor_runs(fail_with(error))
    assert cli.main(["doctor"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert code == 130 or "\n  do:    " in printed.err


def test_verbose_shows_the_trace(doctor_runs, capsys):
    doctor_runs(fail_with(ModelError("broken", remedy="mend it")))
    assert cli.main(["doctor", "-v"]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.index("Traceback") < printed.index("error: broken")


@pytest.mark.parametrize(
    "error", [KeyError("x"), InternalError("an invariant"), PermissionError(13, "no", "f")]
)
def test_an_unforeseen_failure_is_called_a_bug(doctor_runs, capsys, error):
    doctor_runs(fail_with(error))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().err
    assert "this is a bug in edgepress" in printed
    assert __version__ in printed
    assert "edgepress doctor" in printed
    assert "-v" in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_a_library_that_prints_does_not_spoil_the_answer(doctor_runs, capsys):
    def run(_arguments, _reporter):
        sys.stdout.write("chatter\n")
        return Answer(document={"a": 1}, blocks=("text",), exit_code=3)

    doctor_runs(run)
    assert cli.main(["doctor", "--json"]) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"a": 1}
    assert "chatter" in printed.err


def test_terminate_counts_as_interrupt_and_the_handler_is_put_back(doctor_runs, capsys):
    def run(_arguments, _reporter):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(5)
        return Answer(document={}, blocks=("not reached",))

    before = signal.getsignal(signal.SIGTERM)
    doctor_runs(run)
    assert cli.main(["doctor"]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert "interrupted" in capsys.readouterr().err


def test_main_runs_outside_the_main_thread(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]
    assert __version__ in capsys.readouterr().out


def test_a_reader_that_closes_the_pipe_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "edgepress", "targets", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


def test_python_dash_m_is_the_same_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "edgepress", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"edgepress {__version__}"


def test_options_are_never_abbreviated():
    parser = build_parser()
    assert parser.allow_abbrev is False
    with pytest.raises(RecipeError):
        parse_arguments(["compile", "m.onnx", "--over"])
