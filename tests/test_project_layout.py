"""The checkout as a package: what is packaged, which way imports go, and folders with any name."""

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Folders of the checkout that are no part of the import package.
OUTSIDE = {"tests", "docs", "demo", "benchmarks", "build", "dist", "out"}
# What each folder may import besides itself; DESIGN: one direction.
MAY_IMPORT = {
    "graph": set(),
    "frontends": {"graph"},
    "targets": {"graph"},
    "runtimes": {"graph", "frontends", "targets"},
    "calibration": {"graph", "frontends", "targets", "runtimes"},
    "compress": {"graph", "frontends", "targets", "runtimes", "calibration"},
    "export": {"graph", "frontends", "targets", "runtimes", "calibration", "compress"},
    "driver": {"graph", "frontends", "targets", "runtimes", "calibration", "compress", "export"},
}


def inside(path):
    parts = path.relative_to(ROOT).parts
    return not any(
        part.startswith(".") or part.endswith(".egg-info") or part == "__pycache__" for part in parts
    ) and (parts[0] not in OUTSIDE)


def package_folders():
    return sorted(path.parent for path in ROOT.rglob("__init__.py") if inside(path))


def dotted(folder):
    return ".".join(["edgepress", *folder.relative_to(ROOT).parts])


def package_sources():
    return sorted(path for path in ROOT.rglob("*.py") if inside(path) and path.parent != ROOT)


def test_every_package_is_declared():
    assert PYPROJECT["tool"]["setuptools"]["packages"] == [dotted(folder) for folder in package_folders()]


def test_every_folder_with_code_is_a_package():
    assert {path.parent for path in package_sources()} <= set(package_folders())


def test_every_data_file_is_declared_and_every_declaration_finds_one():
    declared = PYPROJECT["tool"]["setuptools"]["package-data"]
    packages = {dotted(folder): folder for folder in package_folders()}
    found = {
        path
        for folder in packages.values()
        if folder != ROOT
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and inside(path)
    } | {ROOT / "py.typed"}
    matched = set()
    for package, patterns in declared.items():
        for pattern in patterns:
            hits = set(packages[package].glob(pattern))
            assert hits, f"{package}: {pattern} matches nothing"
            matched |= hits
    assert matched == found


def imports_of(path):
    """(line, folder imported) for every import in a file; relative ones resolved from its place."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(node.module or "").split(".")]
        elif isinstance(node, ast.ImportFrom):
            base = [*package][: len(package) - node.level + 1]
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*module, alias.name] for alias in node.names]
            yield from ((node.lineno, ("relative", name[0])) for name in names)
            continue
        yield from ((node.lineno, ("absolute", name[0])) for name in names)


@pytest.mark.parametrize("path", package_sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    folder = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[folder] | {folder, "__version__"}
    for line, (kind, name) in imports_of(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        if kind == "absolute":
            assert name != "edgepress", f"{where}: import inside the package is relative"
            assert name not in MAY_IMPORT, f"{where}: {name} is a folder of edgepress, import it relatively"
        else:
            assert name in allowed, f"{where}: {folder} must not import {name}"


def test_the_import_check_sees_what_it_has_to_see(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    bad = tmp_path / "compress" / "fuse" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text(
        "from ...driver.cli import main\nfrom .. import plan\nfrom . import rules\nimport edgepress.graph\n"
    )
    assert list(imports_of(bad)) == [
        (1, ("relative", "driver")),
        (2, ("relative", "compress")),
        (3, ("relative", "compress")),
        (4, ("absolute", "edgepress")),
    ]
    with pytest.raises(AssertionError, match="compress must not import driver"):
        test_imports_go_one_way(bad)


def test_the_root_module_imports_nothing_of_its_own():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    relative = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    assert relative == []


def test_the_tests_run_from_a_copy_with_a_hyphen_in_its_name(tmp_path, copy_checkout):
    copy = copy_checkout(tmp_path / "edge-press-main")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_compress_recipe.py"],
        cwd=copy, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "tests"],
        cwd=copy, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error" not in done.stdout.splitlines()[-1]


def test_the_command_reference_is_what_the_code_says():
    namespace = {"__name__": "write_commands", "__file__": str(ROOT / "docs" / "write_commands.py")}
    exec(
        compile(
            (ROOT / "docs" / "write_commands.py").read_text(encoding="utf-8"), "write_commands.py", "exec"
        ),
        namespace,
    )
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == namespace["reference"](), (
        "run `make docs`"
    )


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name
)
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_constraints_cover_every_dependency():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = PYPROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(item for group in project["optional-dependencies"].values() for item in group),
    ]
    names = {re.split(r"[\[><=!~; ]", item)[0].lower().replace("_", "-") for item in wanted} - {"edgepress"}
    assert names <= pinned
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in (ROOT / "Makefile").read_text()


def test_generated_folders_stay_out_of_git():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for name in ("build/", "x.egg-info/", "__pycache__/", ".venv/"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name


def test_nothing_names_one_machine(source_files):
    # A home folder of one machine would be wrong everywhere else. Tests have made-up ones.
    homes = re.compile(r"(?<![\w.~])/(?:home|root|Users|mnt)/\w")
    for path in source_files:
        if path.suffix in (".py", ".md", ".toml", ".txt", ".sh", "") and path.parent != ROOT / "tests":
            found = homes.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{path.relative_to(ROOT)}: {found}"
