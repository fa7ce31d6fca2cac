"""CIFAR-10 and CIFAR-100 from their Python archives (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html).

The archives hold pickles. They are read by an unpickler that knows NumPy arrays and nothing else, so that no file,
checked or not, runs code.
"""

import hashlib
import io
import logging
import os
import pickle
import queue
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Annotated, Any, ClassVar
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import torch
from pydantic import Field, NonNegativeInt
from tqdm import tqdm

from cifar.atomic import replacing
from cifar.data.dataset import Means, Source, Split, Stds, resize

log = logging.getLogger(__name__)

ANSWER_WITHIN = 6  # seconds for a server to begin its answer: a command that fails should do so within 10
STALL_WITHIN = 30  # seconds that a download may stand still

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(kw_only=True)
class CIFAR10(Source):
    """60,000 colour images of 32x32 in ten classes: 50,000 to train on, 10,000 to test on.

    Read from `root` where it holds (or is) the unpacked folder, else from the archive in `root`, else downloaded there.
    The official files are checked: the archive by `sha256`, the unpacked files by the MD5 sums that torchvision has.

    Raises FileNotFoundError where there are no data and none can be downloaded, RuntimeError where a checksum is wrong
    or an archive cannot be unpacked, ValueError where a file's content is not what it should be.
    """

    root: str  # folder that holds the data, or will
    download: bool = True  # may download what is not there
    url: str = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    sha256: Sha256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"  # of the archive
    val_size: NonNegativeInt | None = 5000
    mean: Means | None = (0.4914, 0.4822, 0.4465)
    std: Stds | None = (0.2470, 0.2435, 0.2616)

    archive: ClassVar[str] = "cifar-10-python.tar.gz"
    folder: ClassVar[str] = "cifar-10-batches-py"
    train_files: ClassVar[dict[str, str]] = {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    }
    test_files: ClassVar[dict[str, str]] = {"test_batch": "40351d587109b95175f43aff81a1287e"}
    meta_files: ClassVar[dict[str, str]] = {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"}
    class_key: ClassVar[str] = "label_names"
    label_key: ClassVar[str] = "labels"

    def read_train(self) -> tuple[Split, tuple[str, ...]]:
        """The training images, in the order of the files."""
        return self._read(self.train_files)

    def read_test(self) -> tuple[Split, tuple[str, ...]]:
        """The test images, in the order of the file."""
        return self._read(self.test_files)

    def _read(self, files: dict[str, str]) -> tuple[Split, tuple[str, ...]]:
        folder = self._find()
        official = self.sha256 == type(self).sha256
        ((name, md5),) = self.meta_files.items()
        classes = read_pickle(folder / name, md5 if official else None).get(self.class_key)
        if not (isinstance(classes, list) and classes and all(isinstance(label, str) for label in classes)):
            raise ValueError(f"{folder / name}: {self.class_key} should be a list of names")
        images, labels = [], []
        for name, md5 in files.items():
            batch = read_pickle(folder / name, md5 if official else None)
            check_batch(batch, self.label_key, len(classes), folder / name)
            images.append(batch["data"])
            labels += batch[self.label_key]
        pixels = torch.from_numpy(np.concatenate(images).reshape(-1, 3, 32, 32))
        return Split(resize(pixels, self.image_size), torch.tensor(labels)), tuple(classes)

    def _find(self) -> Path:
        """The unpacked folder, after whatever it takes to have it."""
        root = Path(self.root).expanduser()
        names = [*self.train_files, *self.test_files, *self.meta_files]
        for folder in (root / self.folder, root):
            if all((folder / name).is_file() for name in names):
                return folder
        archive = root / self.archive
        if archive.is_file():
            found = hashlib.sha256()
            with archive.open("rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
            require_sha256(found.hexdigest(), self.sha256, f"{archive}", "delete it to download it anew")
        else:
            self._download(archive)
        unpack(archive, root / self.folder, names)
        return root / self.folder

    def _download(self, archive: Path) -> None:
        reason = "data.download=false"
        if self.download:
            try:
                return download(self.url, archive, self.sha256)
            except (OSError, HTTPException, ValueError) as error:
                reason = f"{self.url} could not be downloaded: {one_line(getattr(error, 'reason', error))}"
        raise FileNotFoundError(
            f"data.root={self.root}: neither {self.folder}/ nor {self.archive} is in {archive.parent}, and {reason}; "
            "point data.root at a folder that has one of them, or data.url at a mirror; data=digits needs no download"
        )


@dataclass(kw_only=True)
class CIFAR100(CIFAR10):
    """CIFAR-10's size and format with 100 classes, the "fine" ones."""

    url: str = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    sha256: Sha256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
    mean: Means | None = (0.5071, 0.4865, 0.4409)
    std: Stds | None = (0.2673, 0.2564, 0.2762)

    archive: ClassVar[str] = "cifar-100-python.tar.gz"
    folder: ClassVar[str] = "cifar-100-python"
    train_files: ClassVar[dict[str, str]] = {"train": "16019d7e3df5f24257cddd939b257f8d"}
    test_files: ClassVar[dict[str, str]] = {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
    meta_files: ClassVar[dict[str, str]] = {"meta": "7973b15100ade9c7d40fb424638fde48"}
    class_key: ClassVar[str] = "fine_label_names"
    label_key: ClassVar[str] = "fine_labels"


def download(url: str, path: Path, sha256: str) -> None:
    """Put what `url` gives at `path`, whole and with this SHA-256, or leave nothing there and raise.

    OSError (or HTTPException, ValueError) where it cannot be fetched, RuntimeError where its checksum is wrong.
    """
    found = hashlib.sha256()
    with connect(url) as response:
        total = int(response.headers.get("Content-Length") or 0)
        log.info("downloading %s to %s", url, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            with part.open("wb") as file, tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
                while block := response.read(1 << 16):
                    file.write(block)
                    found.update(block)
                    bar.update(len(block))
                size = file.tell()
            if size < total:
                raise OSError(f"it broke off after {size:,} of {total:,} bytes")
            require_sha256(found.hexdigest(), sha256, url, "nothing was kept; point data.url at a mirror")


def connect(url: str) -> HTTPResponse:
    """Open `url`; TimeoutError where its answer has not begun in time.

    In a thread, for urlopen's own timeout counts neither the look-up of the name nor that a name has several addresses.
    """
    answers: queue.Queue[HTTPResponse | Exception] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(urlopen(url, timeout=STALL_WITHIN))
        except HTTPError as error:
            error.close()
            answers.put(OSError(f"{error}"))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_WITHIN)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_WITHIN} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def unpack(archive: Path, folder: Path, names: Sequence[str]) -> None:
    """Unpack the files `folder.name/name` of an archive into `folder`, and nothing else of it.

    A file appears in `folder` only once it is whole. RuntimeError where one is missing or not a regular file.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            with tarfile.open(archive) as tar:
                members = [tar.getmember(f"{folder.name}/{name}") for name in names]
                for member in members:
                    if not member.isreg():
                        raise tarfile.TarError(f"{member.name} is not a regular file")
                tar.extractall(temporary, members=members, filter="data")
            folder.mkdir(exist_ok=True)
            for name in names:
                os.replace(Path(temporary, folder.name, name), folder / name)
    except (tarfile.TarError, KeyError, EOFError, zlib.error, OSError) as error:
        raise RuntimeError(f"{archive}: cannot be unpacked ({one_line(error)})") from error


class ArrayUnpickler(pickle.Unpickler):
    """Knows what a NumPy array is made of, under its names of NumPy 1 and 2, and refuses everything else."""

    reconstruct = np.empty(0).__reduce__()[0]  # where NumPy keeps it depends on the version
    known: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The object of that name, or UnpicklingError."""
        if (module, name) == ("_codecs", "encode"):
            return encode_latin1
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return self.known[module, name]


def encode_latin1(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes in an old protocol: a call of `_codecs.encode`, which could do much more."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}, which no CIFAR file needs")
    return text.encode("latin1")


def read_pickle(path: Path, md5: str | None) -> dict[str, Any]:
    """The dictionary in a file of the archive, whose MD5 must be `md5` unless that is None."""
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 and found != md5:
        raise RuntimeError(f"{path}: its MD5 is {found}, not {md5}; delete it to unpack or download it anew")
    try:
        entry = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(f"{path}: not a CIFAR file ({one_line(error)})") from error
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: not a CIFAR file (it holds a {type(entry).__name__}, not a dictionary)")
    return entry


def check_batch(batch: dict[str, Any], label_key: str, num_classes: int, path: Path) -> None:
    """Raise ValueError unless a batch has `data`, uint8 `(n, 3072)`, and as many labels, each a class."""
    data, labels = batch.get("data"), batch.get(label_key)
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path}: data should be uint8 (n, 3072), found {found}")
    if not isinstance(labels, list) or len(labels) != len(data):
        found = f"{len(labels)}" if isinstance(labels, list) else type(labels).__name__
        raise ValueError(f"{path}: {label_key} should be a list of {len(data)}, one an image, found {found}")
    for label in labels:
        if not (isinstance(label, int) and 0 <= label < num_classes):
            raise ValueError(f"{path}: {label_key} should be integers from 0 to {num_classes - 1}, found {label!r}")


def require_sha256(found: str, expected: str, name: str, advice: str) -> None:
    """Raise RuntimeError unless the checksums are equal."""
    if found != expected:
        raise RuntimeError(
            f"{name}: its SHA-256 is {found[:12]}..., not data.sha256={expected[:12]}...; {advice}, "
            "or set data.sha256 if the archive is your own"
        )


def one_line(error: object) -> str:
    """An error's message without line breaks, or its name where it has none."""
    return " ".join(f"{error}".split()) or type(error).__name__
