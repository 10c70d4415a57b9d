"""Every model of onnx's own backend tests through load, exact clean-up and save: equal, or said why not.

    python benchmarks/backend_models.py [WORD]

Prints how many models came out equal, were refused by name, cannot be run by onnxruntime at all, differ,
or crashed; the last two are listed and make the exit code 1. WORD keeps the models whose name holds it.
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from edgepress.graph.cleanup import exact_cleanup
from edgepress.graph.errors import Unavailable, UserError
from edgepress.graph.load import load_model
from edgepress.graph.passes import run_passes
from edgepress.graph.save import to_bytes

_NEWEST_IR = 11
# The tests are of onnx's next operator set; the runtime loads it when it is told to.
os.environ["ALLOW_RELEASED_ONNX_OPSET_ONLY"] = "0"
_DRAWS = ("bernoulli", "random", "dropout", "multinomial")


def node_models() -> Iterator[tuple[str, onnx.ModelProto, Sequence[Any]]]:
    """(name, model, inputs) of the operator tests, which onnx generates."""
    from onnx.backend.test.case.node import collect_testcases

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    for case in cases:
        if case.model is not None and case.data_sets:
            yield case.name, case.model, case.data_sets[0][0]


def stored_models() -> Iterator[tuple[str, onnx.ModelProto, Sequence[Any]]]:
    """(name, model, inputs) of the models that come with the package."""
    root = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for path in sorted(root.glob("*/*/model.onnx")):
        model = onnx.load(path)
        files = sorted(
            (path.parent / "test_data_set_0").glob("input_*.pb"), key=lambda file: int(file.stem[6:])
        )
        pairs = zip(files, model.graph.input, strict=False)
        yield path.parent.name, model, [_stored_value(file, value) for file, value in pairs]


def _stored_value(file: Path, value: onnx.ValueInfoProto) -> Any:
    if value.type.HasField("sequence_type"):
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(file.read_bytes()))
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))


def run(model: bytes, feeds: dict[str, Any]) -> list[Any]:
    """The outputs, without any optimisation of onnxruntime's own."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, feeds)
    return outputs


def verdict(model: onnx.ModelProto, inputs: Sequence[Any], folder: Path) -> tuple[str, str]:
    """What became of one model: ("equal" | "refused" | "not run" | "differs" | "crashed", details)."""
    model.ir_version = min(model.ir_version, _NEWEST_IR)  # the runtime knows most of the newest operators
    names = [value.name for value in model.graph.input]
    feeds = {name: _fed(value) for name, value in zip(names, inputs, strict=False) if value is not None}
    try:
        wanted = run(model.SerializeToString(), feeds)
    except Exception as error:  # noqa: BLE001 - the runtime raises types of its own for each status
        return "not run", str(error).splitlines()[0][:100]
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    try:
        cleaned = load_model(path)
        run_passes(cleaned, exact_cleanup())
        found = run(to_bytes(cleaned), feeds)
    except (UserError, Unavailable) as error:
        return "refused", error.what
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return "crashed", f"{type(error).__name__}: {str(error)[:300]}"
    same = len(wanted) == len(found) and all(map(_same, wanted, found))
    return ("equal", "") if same else ("differs", f"{_short(wanted)} became {_short(found)}")


def _fed(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _same(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, list):
        return len(wanted) == len(found) and all(map(_same, wanted, found))
    if not isinstance(wanted, np.ndarray):
        return bool(wanted == found)
    if wanted.dtype != found.dtype or wanted.shape != found.shape:
        return False
    if wanted.dtype.kind != "f":
        return bool(np.array_equal(wanted, found))
    tolerance = max(1e-5, float(np.finfo(wanted.dtype).eps))
    return bool(np.allclose(wanted, found, rtol=tolerance, atol=tolerance, equal_nan=True))


def _short(values: Sequence[Any]) -> str:
    return " ".join(str(value).replace("\n", " ")[:60] for value in values)


def main() -> int:
    """Run all, print the counts; 1 if any model crashed or differs."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    counts: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model, inputs in (*node_models(), *stored_models()):
            if word not in name or any(draw in name for draw in _DRAWS):
                continue
            result, details = verdict(model, inputs, Path(folder))
            counts[result] += 1
            if result == "refused":
                reasons[details] += 1
            if result in ("differs", "crashed"):
                bad.append(f"{result}: {name}: {details}")
    for result, count in counts.most_common():
        print(f"{count:6} {result}")
    for reason, count in reasons.most_common():
        print(f"{count:6} refused: {reason}")
    print(*bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
