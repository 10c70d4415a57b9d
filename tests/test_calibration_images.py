"""Folders of images: prepared like transformers' own processors do, labelled by folder, errors in words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from edgepress.calibration.data import open_data
from edgepress.calibration.images import Preparation, preparation_of
from edgepress.graph.errors import DataError, RuntimeUnavailable
from edgepress.graph.model import TensorSpec

Image = pytest.importorskip("PIL.Image")

INPUT = TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 16, 16))
PLAIN = {"do_resize": True, "size": {"height": 16, "width": 16}, "do_rescale": True, "do_normalize": False}
SIZES = ((20, 31), (40, 17), (16, 16), (9, 12))


def write_images(folder: Path, sizes=SIZES, start: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (height, width) in enumerate(sizes):
        values = np.random.default_rng(start + number).integers(0, 256, (height, width, 3), np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(values).save(paths[-1])
    return paths


def write_config(folder: Path, config: dict[str, object]) -> Path:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    return path


def test_values_from_the_formula(tmp_path: Path) -> None:
    """No resizing: each value is (x / 255 - mean) / std of the centre."""
    paths = write_images(tmp_path / "images", [(6, 7)])
    pixels = np.asarray(Image.open(paths[0]))
    config = {
        "do_resize": False,
        "do_center_crop": True,
        "crop_size": {"height": 4, "width": 3},
        "do_normalize": True,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.25, 2.0],
    }
    made = preparation_of(config).apply(Image.open(paths[0]))
    assert made.shape == (3, 4, 3)
    assert made.dtype == np.float32
    for channel in range(3):
        for row in range(4):
            for column in range(3):
                value = pixels[row + 1, column + 2, channel] / 255
                expected = (value - config["image_mean"][channel]) / config["image_std"][channel]
                assert made[channel, row, column] == pytest.approx(expected, abs=1e-6)


def processors() -> list[tuple[str, dict[str, object]]]:
    return [
        ("ViTImageProcessor", {"size": {"height": 16, "width": 16}, "resample": 2}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 16}, "crop_pct": 0.875}),
    ]


@pytest.mark.parametrize(("name", "settings"), processors(), ids=[name for name, _ in processors()])
def test_equals_transformers(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    found = getattr(transformers, f"{name}Pil", None)
    if found is None:
        pytest.skip("this transformers has no image processor without torchvision")
    processor = found(**settings)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    preparation = preparation_of(config)
    for path in write_images(tmp_path / "images"):
        image = Image.open(path).convert("RGB")
        expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
        made = preparation.apply(image)
        assert made.shape == expected.shape == (3, 16, 16)
        smallest = min(preparation.std or (1.0,))
        np.testing.assert_allclose(made, expected, rtol=0, atol=1 / 255 / smallest)


def test_folder_per_class_gives_labels(tmp_path: Path) -> None:
    for number, name in enumerate(("dog", "cat")):
        write_images(tmp_path / "data" / name, start=10 * number)
    config = write_config(tmp_path, PLAIN)
    data = open_data(str(tmp_path / "data"), [INPUT], preprocessor=config, classes=("cat", "dog"))
    assert len(data) == 8
    assert data.labels is not None
    assert sorted(data.labels.tolist()) == [0] * 4 + [1] * 4
    feeds, count = next(data.batches(3))
    assert feeds["pixel_values"].shape == (3, 3, 16, 16)
    assert count == 3
    assert 0 <= feeds["pixel_values"].min() < feeds["pixel_values"].max() <= 1
    again = open_data(str(tmp_path / "data"), [INPUT], preprocessor=config, classes=("cat", "dog"))
    assert again.digest == data.digest


def test_channels_last(tmp_path: Path) -> None:
    write_images(tmp_path / "data")
    spec = TensorSpec(name="x", dtype="float32", shape=(1, 16, 16, 3))
    data = open_data(str(tmp_path / "data"), [spec], preprocessor=write_config(tmp_path, PLAIN))
    assert next(iter(data))["x"].shape == (1, 16, 16, 3)
    assert data.labels is None


def test_what_is_missing_or_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_images(tmp_path / "data")
    folder, config = str(tmp_path / "data"), write_config(tmp_path, PLAIN)
    with pytest.raises(DataError, match="not known how images") as caught:
        open_data(folder, [INPUT])
    assert "--preprocessor" in str(caught.value.remedy)
    tokens = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence"))
    with pytest.raises(DataError, match="does not take images"):
        open_data(folder, [tokens], preprocessor=config)
    other = TensorSpec(name="x", dtype="float32", shape=(1, 3, 32, 32))
    with pytest.raises(DataError):
        open_data(folder, [other], preprocessor=config)
    paths[0].write_bytes(paths[0].read_bytes()[:60])
    with pytest.raises(DataError, match="cannot be read") as caught:
        open_data(folder, [INPUT], preprocessor=config)
    assert "0.png" in str(caught.value)
    paths[0].write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(DataError, match="cannot be read"):
        open_data(folder, [INPUT], preprocessor=config)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RuntimeUnavailable, match="Pillow") as missing:
        open_data(folder, [INPUT], preprocessor=config)
    assert "edgepress[vision]" in str(missing.value.remedy)


@pytest.mark.parametrize(
    "config",
    [
        {"do_pad": True},
        {"do_flip_channel_order": True},
        {"size": "large"},
        {"size": {"longest_edge": 3}},
        {"size": 10**6},
        {"resample": 17},
        {"image_mean": [0.5], "image_std": [0.5]},
        {"image_mean": [0, 0, 0], "image_std": [1, 0, 1]},
        {"rescale_factor": "half"},
    ],
)
def test_preprocessors_that_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(DataError, match="preprocessor cannot"):
        preparation_of(config)


def test_older_one_number_sizes() -> None:
    assert preparation_of({"size": 20, "crop_size": 16}).shortest_edge == 20
    assert preparation_of({"size": 20}) == Preparation(resize=(20, 20), scale=1 / 255)
