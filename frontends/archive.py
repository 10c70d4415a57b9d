"""A .pt2 archive (torch.export.save) read without unpickling or evaluating anything in it.

`torch.export.load` runs code that an archive brings along: pickled weights and objects, sample
inputs (its restricted unpickler falls back to the unrestricted one), size expressions (evaluated by
sympy), operator names (any attribute path below `torch`) and names that end up in generated Python.
Here every part is checked against what an export of ATen operators needs, and only what was checked
is written to a new archive, so that no second reading of the original can find something else.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import zipfile
from pathlib import Path
from typing import Any

from ..graph.errors import ModelError, NotSupported

_JSON_LIMIT_BYTES = 512 << 20
_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = {
    "data/weights/model_weights_config.json": ("data/weights/", re.compile(r"weight_\d+")),
    "data/constants/model_constants_config.json": ("data/constants/", re.compile(r"tensor_\d+")),
}
_PLAIN = {
    "archive_format": re.compile(rb"pt2"),
    "archive_version": re.compile(rb"\d{1,4}"),
    "byteorder": re.compile(rb"little"),
    ".data/version": re.compile(rb"\d{1,4}\n?"),
}
_IGNORED = (".data/serialization_id", "extra/")
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
# No bracket, quote, semicolon, "=" or line break: nothing that could be a call or a statement.
_HARMLESS = re.compile(r"[A-Za-z0-9_.,:+\-> ]*")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims)\.[a-z_]\w*\.\w+|torch\.sym_(float|int|ite|max|min|not)|math\.\w+"
    r"|_operator\.(add|and_|eq|floordiv|ge|getitem|gt|le|lt|mod|mul|ne|neg|not_|or_|pos|pow|sub|truediv)"
)
_SYMBOL = re.compile(r"[suzf]\d+|int_oo|oo|true|false")
_SPEC_TYPES = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict"})
_EXPRESSION_CALL = re.compile(
    r"Abs|Add|And|CeilToInt|CleanDiv|Equality|Eq|Float|FloatTrueDiv|FloorDiv|FloorToInt|Ge|GreaterThan|Gt|Integer"
    r"|IntTrueDiv|Le|LessThan|Lt|Max|Min|Mod|ModularIndexing|Mul|Ne|Not|Or|Pow|PowByNatural|PythonMod|Rational"
    r"|RoundToInt|StrictGreaterThan|StrictLessThan|Symbol|ToFloat|TruncToFloat|TruncToInt|Unequality|Where"
)
_EXPRESSION_NODES = (
    ast.Expression,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.BinOp,
    ast.UnaryOp,
    ast.operator,
    ast.unaryop,
)
_EXPRESSION_LIMIT = 10_000
# A number to a large power would take all the memory.
_SMALL_POWER = re.compile(r"Pow\w*\(Symbol\([^()]*\), Integer\(-?\d\)\)")


def write_checked_copy(path: Path, copy: Path) -> bytes | None:
    """Write the checked parts of an archive to `copy`; returns its sample inputs, still pickled.

    The sample inputs are not in the copy: read them with `torch.load(weights_only=True)` only.

    Raises:
        ModelError: if the file is no .pt2 archive or is damaged.
        NotSupported: if it holds anything that has to be unpickled or evaluated.
        OSError: as the file system reports it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _copy(archive, copy, path.name)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise _damaged(path.name, str(error)) from error


def _copy(archive: zipfile.ZipFile, copy: Path, where: str) -> bytes | None:
    entries = _entries(archive, where)
    for name in (_MODEL, *_CONFIGS):
        if name not in entries:
            raise _damaged(where, f"it has no {name} (an archive of an older torch: save it again)")
    samples = None
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as made:
        for name, info in entries.items():
            if name.startswith(_IGNORED):
                continue
            if name == _SAMPLES:
                samples = archive.read(info)
                continue
            data = _checked(archive, name, info, entries, where)
            made.writestr(f"model/{name}", data)
        made.writestr(f"model/{_SAMPLES}", b"")
    return samples


def _entries(archive: zipfile.ZipFile, where: str) -> dict[str, zipfile.ZipInfo]:
    """The entries by name below the archive's one folder, every one of a known kind."""
    found: dict[str, zipfile.ZipInfo] = {}
    size_bytes = 0
    folder = None
    for info in archive.infolist():
        root, _, name = info.filename.partition("/")
        folder = folder or root
        if root != folder or not name or name in found:
            raise _damaged(where, f"its entry {info.filename[:80]!r} is out of place")
        known = name in _PLAIN or name in _CONFIGS or name in (_MODEL, _SAMPLES) or _TENSOR.fullmatch(name)
        if not known and not name.startswith(_IGNORED):
            raise unsafe_archive(
                f"the entry {name[:80]!r}, which an export of plain tensors does not have", where
            )
        if info.compress_type != zipfile.ZIP_STORED:
            raise _damaged(where, f"its entry {name[:80]!r} is compressed, which torch does not do")
        size_bytes += info.file_size
        found[name] = info
    if size_bytes > Path(str(archive.filename)).stat().st_size:
        raise _damaged(where, "its entries overlap")
    return found


def _checked(
    archive: zipfile.ZipFile,
    name: str,
    info: zipfile.ZipInfo,
    entries: dict[str, zipfile.ZipInfo],
    where: str,
) -> bytes:
    if name == _MODEL or name in _CONFIGS:
        if info.file_size > _JSON_LIMIT_BYTES:
            raise _damaged(where, f"{name} has {info.file_size} bytes")
        try:
            data = json.loads(archive.read(info))
            if name == _MODEL:
                return json.dumps(_checked_model(data, where)).encode()
            _check_config(data, name, entries, where)
            return json.dumps(data).encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _damaged(where, f"{name} does not hold what torch writes ({error})") from error
    content = archive.read(info)
    if name in _PLAIN and not _PLAIN[name].fullmatch(content):
        raise _damaged(where, f"{name} does not hold what torch writes")
    return content


def _check_config(data: dict[str, Any], name: str, entries: dict[str, zipfile.ZipInfo], where: str) -> None:
    """Every tensor is raw bytes in an entry of its own, nothing is pickled."""
    folder, pattern = _CONFIGS[name]
    for key, entry in data["config"].items():
        if entry["use_pickle"] or not pattern.fullmatch(entry["path_name"]):
            raise unsafe_archive(f"{key[:80]!r}, which is pickled", where)
        if f"{folder}{entry['path_name']}" not in entries or entry["tensor_meta"] is None:
            raise _damaged(where, f"the bytes of {key[:80]!r} are missing")
    _walk(data, "config", where)


def _checked_model(model: dict[str, Any], where: str) -> dict[str, Any]:
    """The graph, its notes for debugging left out (they name files of the machine it was made on)."""
    graph_module = model["graph_module"]
    graph_module["metadata"] = {}
    for node in graph_module["graph"]["nodes"]:
        node["metadata"] = {}
    if graph_module.get("treespec_namedtuple_fields"):
        raise unsafe_archive("named tuples among its inputs or outputs", where)
    model["guards_code"] = []  # Python source; the sizes' ranges stand in range_constraints, too
    _walk(model, "model", where)
    return model


def _walk(value: Any, key: str, where: str) -> None:
    """Refuse every string that is not harmless in its place."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if ("custom_obj" in name or name == "as_graph") and inner:
                raise unsafe_archive(f"{name} (custom objects or nested graphs)", where)
            _check_text(name, "key", where)
            _walk(inner, name, where)
    elif isinstance(value, list):
        for inner in value:
            _walk(inner, key, where)
    elif isinstance(value, str):
        _check_text(value, key, where)


def _check_text(text: str, key: str, where: str) -> None:
    if key == "expr_str":
        good = _is_expression(text)
    elif key in ("in_spec", "out_spec"):
        good = _is_spec(json.loads(text))
    elif key in ("target", "as_operator"):
        good = _OPERATOR.fullmatch(text) is not None
    elif key in ("forward_arg_names", "name"):
        good = (_NAME.fullmatch(text) is not None and not keyword.iskeyword(text)) or text == ""
    else:
        good = _HARMLESS.fullmatch(text) is not None
    if not good:
        raise unsafe_archive(f"{key} {text[:80]!r}", where)


def _is_expression(text: str) -> bool:
    """Whether a size expression is arithmetic over symbols: sympy evaluates it as Python."""
    if len(text) > _EXPRESSION_LIMIT:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _EXPRESSION_NODES):
            return False
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or not _EXPRESSION_CALL.fullmatch(node.func.id):
                return False
            if node.func.id.startswith("Pow") and not _SMALL_POWER.fullmatch(ast.unparse(node)):
                return False
        elif isinstance(node, ast.Name):
            if not _EXPRESSION_CALL.fullmatch(node.id) and not _SYMBOL.fullmatch(node.id):
                return False
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if not _NAME.fullmatch(node.value):
                return False
        elif isinstance(node, ast.Pow):
            return False  # torch writes Pow(...); 9**9**9 would take all the memory
    return True


def _is_spec(spec: Any) -> bool:
    """Whether a tree of inputs or outputs is made of tuples, lists and dicts with plain keys."""
    if isinstance(spec, list):
        return len(spec) == 2 and spec[0] == 1 and _is_spec(spec[1])
    if not isinstance(spec, dict) or spec.get("type") not in _SPEC_TYPES:
        return False
    context = json.loads(spec["context"]) if spec["context"] is not None else None
    names = context if isinstance(context, list) else []
    if context is not None and not isinstance(context, list):
        return False
    plain = all(isinstance(name, str) and _NAME.fullmatch(name) for name in names)
    return plain and all(isinstance(child, dict) and _is_spec(child) for child in spec["children_spec"])


def unsafe_archive(what: str, where: str) -> NotSupported:
    """The refusal of an archive that has `what`, which is not safe to read."""
    return NotSupported(
        "the .pt2 archive holds what only running its code can read",
        where=where,
        why=f"it has {what}; torch.export.load would unpickle or evaluate that with your rights",
        remedy="export the model to .onnx where it was made; or, if you trust the file, add --trust-code",
    )


def _damaged(where: str, why: str) -> ModelError:
    return ModelError(
        "the file is not a whole .pt2 archive",
        where=where,
        why=why,
        remedy="write it again with torch.export.save of a current torch, or pass an .onnx file",
    )
