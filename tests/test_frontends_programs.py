"""`.pt2` archives and `module:factory`: right results, and nothing in a doctored archive is run."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edgepress.frontends.imports import is_importable
from edgepress.frontends.source import load_source
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.edit import is_constant
from edgepress.graph.errors import ModelError, NotSupported, RuntimeUnavailable
from edgepress.graph.passes import run_passes
from edgepress.graph.save import to_bytes

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
FACTORY = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.linear = torch.nn.Linear(4, 3)
        self.table = torch.nn.Embedding(7, 4)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
        self.shift = torch.full((3,), 0.5)

    def forward(self, tokens, x):
        y = self.linear(torch.relu(x) + self.table(tokens).mean(1)) * self.scale + self.shift
        return {"logits": y, "total": x.sum(1)}

batch = torch.export.Dim("batch", min=1, max=64)
length = torch.export.Dim("length", min=2, max=64)
SHAPES = {"tokens": {0: batch, 1: length}, "x": {0: batch}}
EXAMPLE = (torch.randint(0, 7, (2, 5)), torch.randn(2, 4))

def by_place():
    return Net(), EXAMPLE, SHAPES

def by_name():
    return Net(), dict(x=EXAMPLE[1], tokens=EXAMPLE[0]), SHAPES

def fixed():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), (torch.randn(1, 3, 8, 8),)

def fails():
    raise KeyError("no such thing")

def wrong():
    return Net()

class Nested(torch.nn.Module):
    def forward(self, x, scale):
        return x[0] + x[1] * scale

def nested():
    return Nested(), ([torch.ones(2), torch.ones(2)], torch.ones(2))

number = 3
"""


class Trap:
    """Unpickling one creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    (folder / "edgepress_factory_case.py").write_text(FACTORY)
    return folder


@pytest.fixture(scope="module")
def factory() -> dict[str, object]:
    names: dict[str, object] = {}
    exec(FACTORY, names)
    return names


@pytest.fixture(scope="module")
def archive(place: Path, factory: dict[str, object]) -> Path:
    module, example, shapes = factory["by_place"]()
    torch.export.save(torch.export.export(module.eval(), example, dynamic_shapes=shapes), place / "net.pt2")
    return place / "net.pt2"


def check(source, module) -> None:
    shapes = {value.name: value.shape for value in source.model.inputs}
    assert shapes == {"tokens": ("batch", "tokens_1"), "x": ("batch", 4)}
    session = ort.InferenceSession(to_bytes(source.model), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    for batch, length in ((1, 2), (5, 9)):
        tokens = generator.integers(0, 7, (batch, length))
        x = generator.standard_normal((batch, 4)).astype(np.float32)
        with torch.no_grad():
            expected = module.eval()(torch.from_numpy(tokens), torch.from_numpy(x))
        results = session.run(["logits", "total"], {"tokens": tokens, "x": x})
        for name, result in zip(expected, results, strict=True):
            np.testing.assert_allclose(result, expected[name].numpy(), rtol=1e-5, atol=1e-5)


def test_archive_equals_torch(archive: Path, factory: dict[str, object]) -> None:
    source = load_source(str(archive))
    check(source, factory["Net"]())
    assert source.model.origin.kind == "torch"
    assert set(source.model.origin.files) == {"net.pt2"}
    assert "of torch" in source.baseline_note
    assert "linear.bias" in source.model.graph.initializers


def test_trusted_archive(archive: Path, factory: dict[str, object]) -> None:
    check(load_source(str(archive), trust_code=True), factory["Net"]())


def entries(cache: Path) -> set[str]:
    return {path.name for path in (cache / "exports").iterdir()}


def test_an_archive_is_exported_once(
    archive: Path, factory: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_source(str(archive), cache_folder=tmp_path)
    assert len(entries(tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", None)
        lines: list[str] = []
        again = load_source(str(archive), cache_folder=tmp_path, progress=lines.append)
    check(again, factory["Net"]())
    assert again.model.fingerprint() == first.model.fingerprint()
    assert (again.model.origin, again.baseline_note) == (first.model.origin, first.baseline_note)
    assert not any("exporting" in line for line in lines)


def test_other_content_opset_or_trust_is_another_export(archive: Path, tmp_path: Path) -> None:
    load_source(str(archive), cache_folder=tmp_path)
    load_source(str(archive), cache_folder=tmp_path, trust_code=True)
    load_source(str(archive), cache_folder=tmp_path, opset=18)
    copy = rewrite(archive, tmp_path / "net.pt2", lambda found: found.update({"extra/note": b"x"}))
    load_source(str(copy), cache_folder=tmp_path)
    assert len(entries(tmp_path)) == 4


def test_a_damaged_export_in_the_cache_is_made_anew(
    archive: Path, factory: dict[str, object], tmp_path: Path
) -> None:
    load_source(str(archive), cache_folder=tmp_path)
    for path in (tmp_path / "exports").glob("*/model.onnx"):
        path.write_bytes(path.read_bytes()[:-20])
    check(load_source(str(archive), cache_folder=tmp_path), factory["Net"]())


def test_a_factory_is_run_every_time(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(place)
    load_source("edgepress_factory_case:fixed", cache_folder=tmp_path)
    assert not (tmp_path / "exports").exists()


def rewrite(archive: Path, made: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    with zipfile.ZipFile(archive) as file:
        entries = {info.filename.partition("/")[2]: file.read(info) for info in file.infolist()}
    change(entries)
    with zipfile.ZipFile(made, "w") as file:
        for name, data in entries.items():
            file.writestr(f"net/{name}", data)
    return made


def in_json(name: str, change: Callable[[dict], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(entries: dict[str, bytes]) -> None:
        data = json.loads(entries[name])
        change(data)
        entries[name] = json.dumps(data).encode()

    return apply


def pickled_weight(marker: Path) -> Callable[[dict[str, bytes]], None]:
    def apply(entries: dict[str, bytes]) -> None:
        entries["data/weights/weight_0"] = as_torch(Trap(marker))
        in_json(WEIGHTS, lambda data: data["config"]["linear.weight"].update(use_pickle=True))(entries)

    return apply


def custom_object(marker: Path) -> Callable[[dict[str, bytes]], None]:
    def apply(entries: dict[str, bytes]) -> None:
        entries["data/constants/opaque_obj_0"] = pickle.dumps(Trap(marker))
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        in_json(CONSTANTS, lambda data: data["config"].update(shift=entry))(entries)

    return apply


def as_torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def touch(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def set_expression(text: str) -> Callable[[dict[str, bytes]], None]:
    def change(data: dict) -> None:
        size = data["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]
        size["as_expr"]["expr_str"] = text

    return in_json(MODEL, change)


def set_node(**fields: object) -> Callable[[dict[str, bytes]], None]:
    return in_json(MODEL, lambda data: data["graph_module"]["graph"]["nodes"][0].update(fields))


def set_spec(context: str) -> Callable[[dict[str, bytes]], None]:
    spec = [1, {"type": "builtins.dict", "context": context, "children_spec": []}]

    def change(data: dict) -> None:
        data["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(spec)

    return in_json(MODEL, change)


def set_argument_name(text: str) -> Callable[[dict[str, bytes]], None]:
    def change(data: dict) -> None:
        data["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [text, "x"]

    return in_json(MODEL, change)


DOCTORED: dict[str, Callable[[Path], Callable[[dict[str, bytes]], None]]] = {
    "sample inputs": lambda marker: (
        lambda entries: entries.update({SAMPLES: as_torch(((Trap(marker),), {}))})
    ),
    "bare pickle as sample inputs": lambda marker: (
        lambda entries: entries.update({SAMPLES: pickle.dumps(Trap(marker))})
    ),
    "pickled weight": pickled_weight,
    "custom object": custom_object,
    "older weights": lambda marker: (
        lambda entries: entries.update({"data/weights/model.pt": as_torch({"linear.weight": Trap(marker)})})
    ),
    "compiled code": lambda _: lambda entries: entries.update({"data/aotinductor/model/a.so": b"\x7fELF"}),
    "size expression": lambda marker: set_expression(touch(marker)),
    "size expression in a name": lambda marker: set_expression(f"Symbol({touch(marker)!r})"),
    "size expression by attribute": lambda _: set_expression("Symbol('s0').__class__"),
    "size expression of great power": lambda _: set_expression("Pow(Integer(9), Integer(999999999))"),
    "operator": lambda _: set_node(target="torch.os.system"),
    "extension operator": lambda _: set_node(target="#triton:kernel"),
    "node name": lambda marker: set_node(name=f"x): {touch(marker)}\n#"),
    "argument name": lambda marker: set_argument_name(f"x={touch(marker)}"),
    "enumeration": lambda _: set_spec('[{"__enum__": true, "fqn": "antigravity:X", "name": "Y"}]'),
    "default factory": lambda _: set_spec('{"default_factory_module": "antigravity"}'),
    "nested graph": lambda _: set_node(inputs=[{"name": "f", "arg": {"as_graph": {"name": "g"}}, "kind": 1}]),
}


@pytest.mark.parametrize("case", DOCTORED)
def test_doctored_archives_run_nothing(case: str, archive: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    file = rewrite(archive, tmp_path / "net.pt2", DOCTORED[case](marker))
    with pytest.raises(NotSupported, match="only running its code can read") as caught:
        load_source(str(file))
    assert not marker.exists()
    assert "--trust-code" in str(caught.value.remedy)


def test_the_traps_work(archive: Path, tmp_path: Path) -> None:
    """torch.export.load itself runs them: the refusals above are not about harmless files."""
    cases = ("sample inputs", "pickled weight", "size expression")
    files = [rewrite(archive, tmp_path / f"{case}.pt2", DOCTORED[case](tmp_path / case)) for case in cases]
    code = (
        "import sys, torch\nfor name in sys.argv[1:]:\n"
        "    try:\n        torch.export.load(name)\n    except Exception:\n        pass"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, files)], check=True, capture_output=True)
    assert all((tmp_path / case).exists() for case in cases)


def test_guards_and_notes_are_left_out(archive: Path, factory: dict[str, object], tmp_path: Path) -> None:
    """Python source in places that the program does not need is dropped, not run."""
    marker = tmp_path / "marker"

    def change(data: dict) -> None:
        data["guards_code"] = [touch(marker)]
        data["graph_module"]["graph"]["nodes"][0]["metadata"] = {"stack_trace": touch(marker)}

    file = rewrite(archive, tmp_path / "net.pt2", in_json(MODEL, change))
    check(load_source(str(file)), factory["Net"]())
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries.pop(MODEL),
        lambda entries: entries.pop(WEIGHTS),
        lambda entries: entries.pop("data/weights/weight_0"),
        lambda entries: entries.update({MODEL: b"[]"}),
        lambda entries: entries.update({MODEL: b"{"}),
        lambda entries: entries.update({WEIGHTS: b'{"config": {"a": 1}}'}),
        lambda entries: entries.update({SAMPLES: b""}),
        lambda entries: entries.update({SAMPLES: b"PK"}),
        lambda entries: entries.update({"data/weights/weight_0": b"1234"}),
        lambda entries: entries.update({"byteorder": b"big"}),
    ],
)
def test_damaged_archives(change: Callable[[dict[str, bytes]], None], archive: Path, tmp_path: Path) -> None:
    with pytest.raises((ModelError, NotSupported)):
        load_source(str(rewrite(archive, tmp_path / "net.pt2", change)))


def test_files_that_are_no_archives(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2], whole[: len(whole) - 9]):
        (tmp_path / "net.pt2").write_bytes(data)
        with pytest.raises(ModelError, match="not a whole"):
            load_source(str(tmp_path / "net.pt2"))
    with zipfile.ZipFile(tmp_path / "net.pt2", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"net/{MODEL}", b"{}" * 1000)
    with pytest.raises(ModelError, match="compressed"):
        load_source(str(tmp_path / "net.pt2"))


@pytest.mark.parametrize("name", ["by_place", "by_name"])
def test_factory_equals_torch(
    name: str, place: Path, factory: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    source = load_source(f"edgepress_factory_case:{name}")
    check(source, factory["Net"]())
    assert source.model.origin.name == f"edgepress_factory_case:{name}"
    assert set(source.model.origin.files) == {"edgepress_factory_case.py"}
    assert str(place) not in sys.path


def test_factory_without_dynamic_shapes_is_fixed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    source = load_source("edgepress_factory_case:fixed")
    assert [value.shape for value in source.model.inputs] == [(1, 3, 8, 8)]
    assert [(value.name, value.shape) for value in source.model.outputs] == [("output", (1, 4, 6, 6))]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fails", ModelError, "factory fails"),
        ("missing", ModelError, "factory fails"),
        ("number", ModelError, "factory fails"),
        ("wrong", ModelError, "does not give a model"),
        ("nested", NotSupported, "other inputs than tensors"),
    ],
)
def test_factories_that_do_not_fit(
    name: str, error: type[Exception], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(error, match=message):
        load_source(f"edgepress_factory_case:{name}")


def test_what_cannot_be_imported_is_no_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_importable("edgepress_no_such_module:make")
    with pytest.raises(ModelError, match="no such model"):
        load_source("edgepress_no_such_module:make")


def test_without_torch(archive: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "torch", None)
    for reference in (str(archive), "edgepress_factory_case:fixed"):
        with pytest.raises(RuntimeUnavailable, match="torch") as caught:
            load_source(reference)
        assert "edgepress[torch]" in str(caught.value.remedy)


def test_the_weights_of_an_exported_lstm_are_constants_after_clean_up(tmp_path):
    """torch's exporter reorders the gates in the graph: nothing could quantize weights that are computed."""
    torch.manual_seed(5)

    class Steps(torch.nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0]

    module = Steps(6, 40, num_layers=2, bidirectional=True, batch_first=True).eval()
    path = tmp_path / "lstm.pt2"
    torch.export.save(torch.export.export(module, (torch.randn(2, 5, 6),)), path)
    model = load_source(str(path)).model
    run_passes(model, exact_cleanup())
    found = [node for node in model.graph if node.op_type == "LSTM"]
    assert len(found) == 2
    assert all(is_constant(value) for node in found for value in node.inputs[1:4])
    assert not {"Slice", "Concat"} & {node.op_type for node in model.graph}
