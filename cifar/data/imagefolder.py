"""Folders of images, a folder a class, decoded once and kept as tensors in a cache."""

import hashlib
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import PositiveInt
from torch import Tensor
from tqdm import tqdm

from cifar.atomic import replacing
from cifar.data.dataset import Dataset, Source, Split, differences

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# A name says nothing of the content, and Pillow knows formats that start other programs (EPS).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
LAYOUT = "expected train/CLASS/IMAGE and test/CLASS/IMAGE in it"
CACHE_VERSION = 1

warnings.simplefilter("error", Image.DecompressionBombWarning)  # as Pillow advises; it is then an unreadable image


@dataclass(frozen=True)
class Listing:
    """The images of a folder: paths relative to it, and a hash of these with the files' sizes and times."""

    folder: str
    classes: tuple[str, ...]
    files: list[str]
    labels: list[int]
    fingerprint: str


@dataclass(kw_only=True)
class ImageFolder(Source):
    """Images in torchvision's ImageFolder layout: `root/train/CLASS/*` and `root/test/CLASS/*`, classes sorted by name.

    An image not `image_size` square has its shorter side resized to it and the middle cut out. Decoded images are kept
    in `cache`, and decoded anew when a file's name, size or time changes.

    Raises FileNotFoundError where a folder is not there, ValueError where it holds no images, where train and test have
    other classes, and for an image that cannot be read, unless `on_error` is "skip".
    """

    root: str  # folder that holds train/ and test/
    image_size: PositiveInt | None = 32
    on_error: Literal["raise", "skip"] = "raise"  # what to do about an image that cannot be read
    cache: str = "~/.cache/cifar"  # folder for the decoded images

    def read_train(self) -> tuple[Split, tuple[str, ...]]:
        """The images of `root/train`, by class and name."""
        return self._read(scan(self._folder("train")))

    def read_test(self) -> tuple[Split, tuple[str, ...]]:
        """The images of `root/test`, by class and name; of `root/CLASS` where there is neither `test` nor `train`."""
        return self._read(scan(self._folder("test")))

    def load(self) -> Dataset:
        """As for any source, but what can go wrong is looked for before the images are decoded."""
        train, test = scan(self._folder("train")), scan(self._folder("test"))
        if train.classes != test.classes:
            raise ValueError(
                f"data.root={self.root}: train/ and test/ differ in their classes: "
                f"{differences(train.classes, test.classes)}"
            )
        self.partition(torch.tensor(train.labels))
        return self.assemble(*self._read(train), *self._read(test))

    def _folder(self, split: str) -> str:
        root = os.path.abspath(os.path.expanduser(self.root))
        folder = os.path.join(root, split)
        if os.path.isdir(folder):
            return folder
        if not os.path.isdir(root):
            raise FileNotFoundError(f"data.root={self.root}: there is no folder {root}; {LAYOUT}")
        if split == "test" and not os.path.isdir(os.path.join(root, "train")):
            return root
        raise FileNotFoundError(f"data.root={self.root}: there is no folder {folder}; {LAYOUT}")

    def _read(self, listing: Listing) -> tuple[Split, tuple[str, ...]]:
        name = hashlib.sha256(f"{listing.folder} {self.image_size}".encode(errors="surrogateescape")).hexdigest()[:16]
        path = Path(self.cache).expanduser() / f"imagefolder-{name}.pt"
        content = read_cache(path, listing.fingerprint)
        if content is None or (content["skipped"] and self.on_error == "raise"):
            content = decode(listing, self.image_size, self.on_error == "skip")
            write_cache(path, content)
        if skipped := content["skipped"]:
            log.warning(
                "%s: left out %d of %d images, which cannot be read: %s%s (kept in %s; delete it to try again)",
                *(listing.folder, len(skipped), len(listing.files), "; ".join(skipped[:3])),
                *("" if len(skipped) <= 3 else "; ...", path),
            )
        return Split(content["images"], content["labels"]), listing.classes


def scan(folder: str) -> Listing:
    """List the images under `folder/CLASS/`, sorted; ValueError where there is no class, or none of a class."""
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder}: no images; expected CLASS/IMAGE in it, a folder a class")
    files: list[str] = []
    labels: list[int] = []
    digest = hashlib.sha256(f"{CACHE_VERSION}".encode())
    for label, name in enumerate(classes):
        found = sorted(images_under(os.path.join(folder, name), f"{name}/"))
        if not found:
            raise ValueError(
                f"{folder}/{name}: no images; expected files named {' '.join(EXTENSIONS)} in a class's folder"
            )
        files += [path for path, _, _ in found]
        labels += [label] * len(found)
        digest.update(repr(found).encode(errors="surrogateescape"))
    return Listing(folder, tuple(classes), files, labels, digest.hexdigest())


def images_under(folder: str, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Path (with `prefix`), size and time in ns of each image in `folder` and below; what is hidden is left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from images_under(entry.path, f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(EXTENSIONS):
                if entry.is_file():
                    stat = entry.stat()
                    yield prefix + entry.name, stat.st_size, stat.st_mtime_ns
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    yield prefix + entry.name, -1, -1  # a link to nothing is an image that cannot be read


def decode(listing: Listing, size: int | None, skip: bool) -> dict[str, Any]:
    """Decode all images of a listing: the content of its cache file.

    ValueError for one that cannot be read, unless `skip`, and for one of another size where `size` is None.
    """
    log.info("decoding the %s images of %s", f"{len(listing.files):,}", listing.folder)
    Image.init()  # loads Pillow's formats once, and not in several threads at a time
    paths = [os.path.join(listing.folder, file) for file in listing.files]
    images: NDArray[np.uint8] | None = None
    kept: list[int] = []
    skipped: list[str] = []
    pool = ThreadPoolExecutor()
    try:
        chunks = pool.map(read_arrays, [paths[i : i + 64] for i in range(0, len(paths), 64)], repeat(size))
        bar = tqdm((image for chunk in chunks for image in chunk), total=len(paths), unit=" images", disable=None)
        for index, image in enumerate(bar):
            if isinstance(image, Exception):
                if not skip:
                    raise ValueError(f"{image}; data.on_error=skip leaves such images out") from image
                skipped.append(f"{image}")
                continue
            if images is None:
                images = np.empty((len(paths), *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                height, width = image.shape[1:]
                raise ValueError(
                    f"{paths[index]}: {width}x{height} pixels where {paths[kept[0]]} has "
                    f"{images.shape[3]}x{images.shape[2]}; set data.image_size to bring all to one size"
                )
            images[len(kept)] = image
            kept.append(index)
    finally:
        pool.shutdown(cancel_futures=True)
    labels = torch.tensor(listing.labels)[kept]
    for label, name in enumerate(listing.classes):
        if label not in labels:
            raise ValueError(f"{listing.folder}/{name}: none of its images can be read")
    assert images is not None
    return {
        "fingerprint": listing.fingerprint,
        "images": torch.from_numpy(images[: len(kept)].copy() if skipped else images),
        "labels": labels,
        "skipped": skipped,
    }


def read_arrays(paths: Sequence[str], size: int | None) -> list[NDArray[np.uint8] | Exception]:
    """`read_array` of each path, or the error that it raised."""
    arrays: list[NDArray[np.uint8] | Exception] = []
    for path in paths:
        try:
            arrays.append(read_array(path, size))
        except (ValueError, FileNotFoundError) as error:
            arrays.append(error)
    return arrays


def read_image(path: str | os.PathLike[str], size: int | None) -> Tensor:
    """Decode one image file as ImageFolder does: uint8 `(3, size, size)`, or `(3, h, w)` where `size` is None.

    FileNotFoundError where there is no such file, ValueError where it cannot be read as an image.
    """
    return torch.from_numpy(read_array(os.fspath(path), size).copy())


def read_array(path: str, size: int | None) -> NDArray[np.uint8]:
    """As `read_image`."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a file")
    try:
        with Image.open(path, formats=FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(fit(to_rgb(image), size)).transpose(2, 0, 1)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: cannot be read as an image (unknown format)") from None
    except Exception as error:  # a broken file may raise anything
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as an image ({reason})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image with eight bits in each of three channels; transparency is dropped, as torchvision does."""
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is unknown")
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels are not in the range of 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def fit(image: Image.Image, size: int | None) -> Image.Image:
    """The middle square once the shorter side is `size`, as torchvision's Resize and CenterCrop give it."""
    if size is None or image.size == (size, size):
        return image
    shorter = min(image.size)
    width, height = (size * side // shorter for side in image.size)
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        raise ValueError(f"{image.width}x{image.height} pixels is too long for its width")
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def read_cache(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What `decode` gave for this fingerprint; None where there is no such file, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not look at the checksums
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        content = torch.load(path, weights_only=True)
        return content if content["fingerprint"] == fingerprint else None
    except Exception as error:  # a broken file may raise anything
        log.warning("%s: cannot be read (%s); the images are decoded anew", path, " ".join(f"{error}".split()))
        return None


def write_cache(path: Path, content: dict[str, Any]) -> None:
    """Write a cache file, whole or not at all; a folder that cannot be written to is only worth a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:
        log.warning(
            "data.cache=%s: cannot keep the decoded images there (%s)", path.parent, " ".join(f"{error}".split())
        )
