"""Samples from a folder of images, prepared as the model's preprocessor_config.json says."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..frontends.sidecars import Config, read_config
from ..graph.errors import DataError, ModelError, RuntimeUnavailable
from ..graph.model import TensorSpec
from .schema import Array, Feeds, check_layout
from .source import Opened, class_indices, content_key, draw, stack

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Nothing else is tried on a file: some of Pillow's other readers start programs.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
_BILINEAR = 2
_RESAMPLING = range(6)
_NOT_DONE = ("do_pad", "do_flip_channel_order", "do_reduce_labels", "do_thumbnail", "do_align_long_axis")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is done to an image, in this order; None leaves a step out.

    Attributes:
        resize: height and width in pixels.
        shortest_edge: the shorter side in pixels; the other one follows.
        crop: height and width in pixels of the centre kept; smaller images get black borders.
        resample: Pillow's number of the filter (2 bilinear, 3 bicubic).
        scale: factor on the values 0 to 255.
        mean, std: per channel, after the scale.
    """

    resize: tuple[int, int] | None = None
    shortest_edge: int | None = None
    crop: tuple[int, int] | None = None
    resample: int = _BILINEAR
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def apply(self, image: Image) -> Array:
        """The prepared image, float32 of shape (3, height, width).

        y = (x * scale - mean) / std for each channel of the resized and cropped image x.
        """
        image = image.convert("RGB")
        size = self.resize
        if self.shortest_edge is not None:
            size = _keep_ratio(image.height, image.width, self.shortest_edge)
        if size is not None and size != (image.height, image.width):
            image = image.resize((size[1], size[0]), resample=self.resample)
        values: Array = np.asarray(image)
        if self.crop is not None:
            values = _centre(values, self.crop)
        values = values.astype(np.float32)
        if self.scale is not None:
            values = values * np.float32(self.scale)
        if self.mean is not None and self.std is not None:
            values = (values - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def _keep_ratio(height: int, width: int, edge: int) -> tuple[int, int]:
    if height <= width:
        return edge, int(edge * width / height)
    return int(edge * height / width), edge


def _centre(values: Array, size: tuple[int, int]) -> Array:
    """The centre of an image (height, width, channels), with black borders where it is too small."""
    height, width = values.shape[:2]
    above, left = max(size[0] - height + 1, 0) // 2, max(size[1] - width + 1, 0) // 2
    padded = np.zeros((max(height, size[0]), max(width, size[1]), values.shape[2]), values.dtype)
    padded[above : above + height, left : left + width] = values
    top, start = (padded.shape[0] - size[0]) // 2, (padded.shape[1] - size[1]) // 2
    return padded[top : top + size[0], start : start + size[1]]


def preparation_of(config: Config) -> Preparation:
    """The steps that a preprocessor_config.json asks for.

    Raises:
        DataError: if it is malformed or asks for a step that is not known here.
    """
    for step in _NOT_DONE:
        if config.get(step):
            raise _unusable(f"{step} is not supported")
    resample = config.get("resample", _BILINEAR)
    if resample not in _RESAMPLING:
        raise _unusable(f"resample is {resample!r}")
    crop_size = config.get("crop_size")
    crop = _pair(crop_size, "crop_size") if config.get("do_center_crop", crop_size is not None) else None
    resize, edge = (None, None)
    if config.get("do_resize", "size" in config):
        resize, edge = _resize(config.get("size"), cropped=crop is not None)
    if edge is not None and str(config.get("image_processor_type", "")).startswith("ConvNext"):
        resize, edge, crop = _by_share(edge, config.get("crop_pct"))
    normalised = config.get("do_normalize", "image_mean" in config)
    return Preparation(
        resize=resize,
        shortest_edge=edge,
        crop=crop,
        resample=int(resample),
        scale=_number(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else None,
        mean=_channels(config, "image_mean") if normalised else None,
        std=_channels(config, "image_std") if normalised else None,
    )


def _resize(size: object, *, cropped: bool) -> tuple[tuple[int, int] | None, int | None]:
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return None, _pair(size["shortest_edge"], "size")[0]
    if isinstance(size, int) and cropped:  # older files: one number is the shorter side
        return None, _pair(size, "size")[0]
    return _pair(size, "size"), None


def _by_share(edge: int, share: object) -> tuple[tuple[int, int] | None, int | None, tuple[int, int] | None]:
    """ConvNeXt: below 384 pixels the image is made larger by 1/crop_pct and its centre cut out."""
    if edge >= 384:
        return (edge, edge), None, None
    return None, int(edge / (_number(share) if share is not None else 224 / 256)), (edge, edge)


def _pair(size: object, name: str) -> tuple[int, int]:
    pair = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if isinstance(size, list) and len(size) == 2:
        pair = (size[0], size[1])
    height, width = pair
    if type(height) is int and type(width) is int and 0 < height <= 8192 and 0 < width <= 8192:
        return height, width
    raise _unusable(f"{name} is {size!r}")


def _number(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
        return float(value)
    raise _unusable(f"{value!r} is no positive number")


def _channels(config: Config, name: str) -> tuple[float, ...]:
    values = config.get(name)
    numbers = isinstance(values, list) and all(type(item) in (int, float) for item in values)
    if isinstance(values, list) and numbers and len(values) == 3 and (name != "image_std" or min(values) > 0):
        return tuple(map(float, values))
    raise _unusable(f"{name} is {values!r}")


def _unusable(why: str) -> DataError:
    return DataError(
        "the preprocessor cannot prepare images here",
        where="preprocessor_config.json",
        why=why,
        remedy="prepare the images yourself and pass them as .npz or module:function",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """One image as the bytes of its file, and what messages call it."""

    name: str
    content: bytes


class ImageSource:
    """Images read and prepared one batch at a time."""

    sequential = False
    padding = "none (every image has the model's size)"

    def __init__(
        self, images: Sequence[Path | EncodedImage], spec: TensorSpec, preparation: Preparation
    ) -> None:
        self.uniform = True
        self._images = images
        self._spec = spec
        self._preparation = preparation

    def read(self, positions: Sequence[int], batch_size: int) -> Iterator[Feeds]:
        """Feeds of `batch_size` images at a time, each float32 of shape (batch, 3, height, width)."""
        for start in range(0, len(positions), batch_size):
            chunk = positions[start : start + batch_size]
            yield stack([self._sample(self._images[int(position)]) for position in chunk], self._spec.name)

    def _sample(self, found: Path | EncodedImage) -> Feeds:
        from PIL import Image, UnidentifiedImageError

        try:
            file = found if isinstance(found, Path) else io.BytesIO(found.content)
            with Image.open(file, formats=_FORMATS) as image:
                values = self._preparation.apply(image)[None]
        except (
            UnidentifiedImageError,
            Image.DecompressionBombError,
            OSError,
            SyntaxError,
            ValueError,
        ) as error:
            raise DataError(
                "the image cannot be read",
                where=found.name,
                why=str(error),
                remedy="repair or remove the file",
            ) from error
        shape = self._spec.shape or ()
        if len(shape) == 4 and shape[3] == 3 and shape[1] != 3:
            values = np.ascontiguousarray(values.transpose(0, 2, 3, 1))
        check_layout(values.shape, values.dtype, self._spec, found.name)
        return {self._spec.name: values}


def holds_images(path: Path) -> bool:
    """Whether a folder, or its sub-folders, hold images."""
    return bool(_list_images(path)[0])


def _list_images(path: Path) -> tuple[list[Path], list[str]]:
    """The images in order, and the class folder of each (empty without class folders)."""
    direct = sorted(item for item in path.iterdir() if item.suffix.lower() in SUFFIXES and item.is_file())
    if direct:
        return direct, []
    nested = sorted(item for item in path.glob("*/*") if item.suffix.lower() in SUFFIXES and item.is_file())
    return nested, [item.parent.name for item in nested]


def open_images(
    path: Path,
    inputs: Sequence[TensorSpec],
    samples: int | None,
    seed: int,
    *,
    preprocessor: Path | None,
    classes: Sequence[str] = (),
) -> Opened:
    """Open a folder of images; a sub-folder per class gives labels.

    Raises:
        DataError: if the model takes no images, there is no preprocessor, or an image cannot be read.
        RuntimeUnavailable: if Pillow is missing.
    """
    paths, folders = _list_images(path)
    source = image_source(paths, inputs, preprocessor, path.name)
    positions = draw(len(paths), samples, seed)
    contents = tuple(content_key(feeds) for feeds in source.read(positions.tolist(), 1))
    labels = None
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if folders:
        index, names, notes = class_indices(sorted(set(folders)), classes)
        labels = np.array([index[folder] for folder in folders], np.int64)[positions]
    return Opened(
        source=source,
        positions=positions,
        contents=contents,
        identities=contents,
        labels=labels,
        class_names=names,
        notes=notes,
    )


def image_source(
    images: Sequence[Path | EncodedImage], inputs: Sequence[TensorSpec], preprocessor: Path | None, where: str
) -> ImageSource:
    """Images as they are prepared for a model; `where` names the data in messages.

    Raises:
        DataError: if the model takes no images, or there is no preprocessor that can be followed.
        RuntimeUnavailable: if Pillow is missing.
    """
    _require_pillow()
    spec = inputs[0]
    if len(inputs) != 1 or spec.dtype != "float32" or spec.shape is None or len(spec.shape) != 4:
        raise DataError(
            "the model does not take images",
            where=where,
            why="images go to one float32 input of shape (batch, 3, height, width)",
            remedy="pass the inputs as .npz files or module:function",
        )
    if preprocessor is None:
        raise DataError(
            "it is not known how images are prepared for the model",
            where=where,
            why="there is no preprocessor_config.json beside the model",
            remedy="pass --preprocessor FILE, or the prepared images as .npz",
        )
    try:
        config: dict[str, Any] = read_config(preprocessor)
    except ModelError as error:
        raise _unusable(str(error)) from error
    return ImageSource(images, spec, preparation_of(config))


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401 - only its presence is asked for
    except ImportError as error:
        raise RuntimeUnavailable(
            "the Pillow package is not installed",
            why="images are read and resized with it",
            remedy="pip install 'edgepress[vision]', or pass the prepared images as .npz",
        ) from error
