"""Verification: every flipped byte is found and named, and golden samples are held to their tolerance."""

import hashlib
import json
import shutil
from pathlib import Path

import export_case as case
import numpy as np
import pytest
from edgepress.export.checksums import check_sums, parse_sums
from edgepress.export.npz import npz_bytes
from edgepress.export.verify import verify_bundle
from edgepress.graph.errors import ModelError, NotSupported, VerifyFailed

FILES = (
    "README.md",
    "SHA256SUMS",
    "assets/config.json",
    "drift.json",
    "golden/inputs_000.npz",
    "golden/outputs_002.npz",
    "manifest.json",
    "model.onnx",
    "model.onnx.data",
    "plan.json",
    "recipe.toml",
    "runs/golden.json",
    "snippets/RunCSharp.cs",
    "snippets/run_cpp.cc",
    "snippets/run_python.py",
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return case.make_bundle(folder, quantized=True, external=True, assets={"config.json": b"{}\n"})


@pytest.fixture
def bundle(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def resum(bundle):
    """Make the sums true again after an edit, as a forger would; the runs name the old digest."""
    names = sorted(
        path.relative_to(bundle).as_posix()
        for path in bundle.rglob("*")
        if path.is_file() and path.name != "SHA256SUMS" and path.parent.name != "runs"
    )
    lines = [f"{hashlib.sha256((bundle / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (bundle / "SHA256SUMS").write_text("".join(lines))
    shutil.rmtree(bundle / "runs")


def edit_manifest(bundle, change):
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    resum(bundle)


def reasons(bundle, **options):
    with pytest.raises(VerifyFailed) as caught:
        verify_bundle(bundle, **options)
    assert caught.value.exit_code == 3
    assert caught.value.remedy
    return [line.strip() for line in caught.value.why.splitlines()]


def test_good_bundle(original):
    seen = []
    report = verify_bundle(original, progress=lambda *step: seen.append(step))
    files = [path for path in original.rglob("*") if path.is_file()]
    assert set(FILES) < {path.relative_to(original).as_posix() for path in files}
    assert report.files == len(files) - 1
    assert report.size_bytes == sum(path.stat().st_size for path in files)
    assert report.digest == hashlib.sha256((original / "SHA256SUMS").read_bytes()).hexdigest()
    assert (report.golden_samples, report.exact, report.runs) == (3, True, ("golden.json",))
    assert seen[-1] == ("golden samples", 3, 3)
    assert verify_bundle(original, run_golden=False).golden_samples == 0


def test_bundle_without_golden_samples(tmp_path):
    report = verify_bundle(case.make_bundle(tmp_path, golden=False))
    assert (report.golden_samples, report.exact) == (0, False)


@pytest.mark.parametrize("name", FILES)
def test_flipped_byte_is_found_and_named(bundle, name):
    path = bundle / name
    data = path.read_bytes()
    # Also the bit that turns a hexadecimal digit into the other case.
    for position in (0, len(data) // 3, len(data) // 2, len(data) - 1):
        for bit in (0x01, 0x20, 0x80):
            path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
            found = reasons(bundle, run_golden=False)
            if name != "SHA256SUMS":
                assert [line.split(":")[0] for line in found] == [name]
    path.write_bytes(data)
    verify_bundle(bundle, run_golden=False)


def test_every_byte_of_the_sums_counts(bundle):
    path = bundle / "SHA256SUMS"
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x20]) + data[position + 1 :])
        assert reasons(bundle, run_golden=False)


def test_missing_extra_and_linked_files(bundle):
    (bundle / "plan.json").unlink()
    (bundle / "golden" / "extra.npz").write_bytes(b"")
    (bundle / "runs" / "script.sh").write_text("echo")
    (bundle / "drift.json").unlink()
    (bundle / "drift.json").symlink_to(bundle / "recipe.toml")
    assert sorted(reasons(bundle)) == [
        "drift.json: not a regular file",
        "golden/extra.npz: not listed in SHA256SUMS",
        "plan.json: missing",
        "runs/script.sh: not listed in SHA256SUMS",
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("../outside", "leaves the bundle"),
        ("/etc/hostname", "leaves the bundle"),
        ("golden/../../outside", "leaves the bundle"),
        ("a//b", "leaves the bundle"),
        ("./plan.json", "leaves the bundle"),
        ("C:/windows", "leaves the bundle"),
        ("golden\\x", "leaves the bundle"),
        ("runs/golden.json", "not covered"),
        ("SHA256SUMS", "not covered"),
    ],
)
def test_sums_that_lead_elsewhere(bundle, line, complaint):
    (bundle.parent / "outside").write_bytes(b"secret")
    digest = hashlib.sha256(b"secret").hexdigest()
    (bundle / "SHA256SUMS").write_text(f"{digest}  {line}\n")
    found = reasons(bundle)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\n",
        b"0" * 64 + b"  a",
        b"0" * 64 + b" a\n",
        b"A" * 64 + b"  a\n",
        b"0" * 63 + b"  a\n",
        b"0" * 64 + b"  a\n\n",
        (b"0" * 64 + b"  a\n") * 2,
        b"0" * 64 + b"  b\n" + b"0" * 64 + b"  a\n",
        b"0" * 64 + b"  a\r\n",
    ],
)
def test_sums_are_read_strictly(data):
    with pytest.raises(ValueError, match=r"line|UTF-8"):
        parse_sums(data)


def test_not_a_bundle(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("gone", "file", "empty"):
        with pytest.raises(ModelError, match="not an edgepress bundle") as caught:
            verify_bundle(tmp_path / name)
        assert caught.value.exit_code == 2


def test_half_a_bundle_is_a_broken_one(bundle):
    sums = (bundle / "SHA256SUMS").read_bytes()
    (bundle / "SHA256SUMS").unlink()
    assert reasons(bundle) == ["SHA256SUMS: No such file or directory"]
    (bundle / "SHA256SUMS").write_bytes(sums)
    (bundle / "manifest.json").unlink()
    assert reasons(bundle) == ["manifest.json: missing"]


def test_run_of_another_bundle(bundle, tmp_path):
    other = case.make_bundle(tmp_path / "other", seed=3)
    shutil.copy(other / "runs/golden.json", bundle / "runs/other.json")
    assert reasons(bundle) == ["runs/other.json: was measured with another bundle"]
    (bundle / "runs/other.json").write_text("[]")
    assert "runs/other.json: not a record" in reasons(bundle)[0]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("plan.json", '{"target": "host"}', "missing required field"),
        ("plan.json", "{", "truncated"),
        ("recipe.toml", 'target = "host"\nsurprise = 1\n', "unknown key 'surprise'"),
        ("recipe.toml", "= 1", "not valid TOML"),
        ("manifest.json", "{}", "missing required field"),
    ],
)
def test_malformed_documents_are_named(bundle, name, text, complaint):
    (bundle / name).write_text(text)
    resum(bundle)
    found = [line for line in reasons(bundle) if line.startswith(f"{name}:")]
    assert any(complaint in line for line in found)


def test_manifest_that_asks_for_a_file_config_entry(bundle):
    def change(manifest):
        manifest["session_options"]["config"]["session.optimized_model_filepath"] = "elsewhere"

    edit_manifest(bundle, change)
    assert "is not one that a bundle may set" in reasons(bundle)[0]


def test_manifest_that_names_other_files(bundle):
    def change(manifest):
        manifest["golden"]["samples"][0]["inputs"] = "../outside.npz"

    edit_manifest(bundle, change)
    assert reasons(bundle) == ["../outside.npz: named in manifest.json, but missing"]


def test_manifest_with_another_interface(bundle):
    def change(manifest):
        manifest["model"]["inputs"][0]["name"] = "other"

    edit_manifest(bundle, change)
    assert reasons(bundle)[0].startswith("manifest.json: inputs")


def test_newer_bundle(bundle):
    edit_manifest(bundle, lambda manifest: manifest.update(schema_version=2, novelty=True))
    with pytest.raises(NotSupported, match="schema version 2"):
        verify_bundle(bundle)


def change_outputs(bundle, change):
    path = bundle / "golden/outputs_001.npz"
    with np.load(path) as archive:
        outputs = {name: change(archive[name]) for name in archive.files}
    path.write_bytes(npz_bytes(outputs))


def test_golden_outputs_beyond_tolerance(bundle):
    change_outputs(bundle, lambda y: (y * 1.5).astype(y.dtype))
    resum(bundle)
    found = reasons(bundle)
    assert len(found) == 1
    assert found[0].startswith("golden/outputs_001.npz: output 'y': relative L2 0.33")


def test_golden_outputs_of_another_shape(bundle):
    change_outputs(bundle, lambda y: y[:1])
    resum(bundle)
    assert "instead of" in reasons(bundle)[0]


def test_last_bit_counts_only_where_it_was_recorded(bundle):
    """Another CPU may differ within the tolerance; the very same set-up may not differ at all."""
    change_outputs(bundle, lambda y: np.nextafter(y, np.float32(np.inf)))
    record = json.loads((bundle / "runs/golden.json").read_text())
    resum(bundle)
    report = verify_bundle(bundle)
    assert (report.golden_samples, report.exact) == (3, False)
    from edgepress.export.bundle import append_run

    elsewhere = record["payload"]["environment"] | {"cpu": "another"}
    append_run(bundle, "golden", {"environment": elsewhere})
    assert verify_bundle(bundle).exact is False
    append_run(bundle, "golden", record["payload"])
    assert "not bit-identical" in reasons(bundle)[0]


def test_damaged_golden_file_with_true_sums(bundle):
    path = bundle / "golden/inputs_002.npz"
    path.write_bytes(path.read_bytes()[:100])
    resum(bundle)
    assert reasons(bundle)[0].startswith("inputs_002.npz: a golden file cannot be read")


def test_model_that_does_not_load(bundle):
    (bundle / "model.onnx").write_bytes(b"\x08\x09rubbish")
    resum(bundle)
    assert reasons(bundle)[0].startswith("model.onnx:")


def test_many_problems_are_all_counted(bundle):
    for index in range(50):
        (bundle / f"extra{index:02}").write_bytes(b"")
    found = reasons(bundle)
    assert len(found) == 21
    assert found[-1] == "and 30 more"
    assert len(check_sums(bundle)) == 50


def test_empty_runs_folder_may_be_gone(bundle):
    shutil.rmtree(bundle / "runs")
    assert verify_bundle(bundle).runs == ()
