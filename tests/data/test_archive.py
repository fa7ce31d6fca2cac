import functools
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from cifar.data import archive
from cifar.data.archive import CIFAR10, CIFAR100
from cifar.data.dataset import resize

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Python2Pickler(pickle._Pickler):
    """Writes strings and bytes as Python 2 did, which wrote the official archives."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value: bytes | str) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch(n: int, seed: int, classes: int = 10, key: str = "labels") -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (n, 3072), dtype=np.uint8)
    return {"data": data, key: [i % classes for i in range(n)], "batch_label": f"batch {seed}"}


def cifar10(n: int = 20) -> dict[str, Any]:
    files: dict[str, Any] = {f"data_batch_{i}": batch(n, i) for i in range(1, 6)}
    return files | {"test_batch": batch(n, 6), "batches.meta": {"label_names": NAMES, "num_vis": 3072}}


def packed(folder: str, files: dict[str, bytes], extra: list[tarfile.TarInfo] | None = None) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra or []:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return content.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


FILES = {name: pickled(value) for name, value in cifar10().items()}
ARCHIVE = packed("cifar-10-batches-py", FILES)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 400)
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path / "served"`, which holds ARCHIVE as cifar.tar.gz."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "cifar.tar.gz").write_bytes(ARCHIVE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(served))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def unpacked(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def source(root: Path, **settings: Any) -> CIFAR10:
    defaults = {"root": str(root), "sha256": sha256(ARCHIVE), "download": False, "batch_size": 4, "val_size": 10}
    return CIFAR10(**(defaults | settings))


def expect_tiny(cifar: CIFAR10) -> None:
    train, classes = cifar.read_train()
    test, test_classes = cifar.read_test()
    entries = cifar10()
    data = np.concatenate([entries[f"data_batch_{i}"]["data"] for i in range(1, 6)])
    assert train.images.dtype == torch.uint8
    assert train.images.numpy().tolist() == data.reshape(100, 3, 32, 32).tolist()
    assert train.labels.dtype == torch.int64
    assert train.labels.tolist() == [i % 10 for i in range(20)] * 5
    assert test.images.numpy().tolist() == entries["test_batch"]["data"].reshape(20, 3, 32, 32).tolist()
    assert classes == test_classes == tuple(NAMES)


def test_the_checksums_are_those_of_torchvision() -> None:
    for ours, theirs in ((CIFAR10, datasets.CIFAR10), (CIFAR100, datasets.CIFAR100)):
        assert list(ours.train_files.items()) == [tuple(item) for item in theirs.train_list]
        assert list(ours.test_files.items()) == [tuple(item) for item in theirs.test_list]
        assert ours.meta_files == {theirs.meta["filename"]: theirs.meta["md5"]}
        assert (ours.class_key, ours.folder, ours.archive) == (theirs.meta["key"], theirs.base_folder, theirs.filename)
        assert ours(root="").url == theirs.url


def test_download_unpacks_and_is_needed_once(server: str, tmp_path: Path) -> None:
    root = tmp_path / "deep" / "root"
    expect_tiny(source(root, download=True, url=f"{server}/cifar.tar.gz"))
    assert sorted(os.listdir(root)) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    assert sorted(os.listdir(root / "cifar-10-batches-py")) == sorted(FILES)
    (tmp_path / "served" / "cifar.tar.gz").unlink()
    expect_tiny(source(root, download=True, url=f"{server}/cifar.tar.gz"))
    (root / "cifar-10-python.tar.gz").unlink()
    expect_tiny(source(root))


def test_a_load_holds_out_resizes_and_normalises(tmp_path: Path) -> None:
    unpacked(tmp_path / "cifar-10-batches-py")
    data = source(tmp_path, image_size=16, mean=None).load()
    assert data.val is not None
    assert (len(data.train), len(data.val), len(data.test)) == (90, 10, 20)
    assert data.image_shape == (3, 16, 16)
    original, _ = source(tmp_path).read_test()
    assert data.test.images.equal(resize(original.images, 16))
    assert data.std == (0.2470, 0.2435, 0.2616)
    assert data.mean == pytest.approx(data.train.images.double().mean((0, 2, 3)).div(255).tolist())


def test_the_root_may_be_the_folder_itself(tmp_path: Path) -> None:
    expect_tiny(source(unpacked(tmp_path / "elsewhere")))


def test_an_archive_in_the_root_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
    expect_tiny(source(tmp_path))


def test_a_folder_half_unpacked_is_completed(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
    unpacked(tmp_path / "cifar-10-batches-py", {"data_batch_1": FILES["data_batch_1"]})
    expect_tiny(source(tmp_path))


def test_the_root_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    unpacked(tmp_path / "data" / "cifar-10-batches-py")
    expect_tiny(source(Path("~/data")))


def test_cifar100_has_the_fine_classes(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(100)]
    files = {
        "train": batch(200, 1, 100, "fine_labels") | {"coarse_labels": [0] * 200},
        "test": batch(100, 2, 100, "fine_labels") | {"coarse_labels": [0] * 100},
        "meta": {"fine_label_names": names, "coarse_label_names": ["all"]},
    }
    content = packed("cifar-100-python", {name: pickled(value) for name, value in files.items()})
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(content)
    data = CIFAR100(root=str(tmp_path), sha256=sha256(content), val_size=100).load()
    assert data.classes == tuple(names)
    assert sorted(data.train.labels.tolist()) == list(range(100))
    assert data.test.images[5].flatten().tolist() == files["test"]["data"][5].tolist()
    assert data.mean == (0.5071, 0.4865, 0.4409)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_python_3_are_read(protocol: int, tmp_path: Path) -> None:
    files = {name: pickle.dumps(value, protocol) for name, value in cifar10().items()}
    unpacked(tmp_path / "cifar-10-batches-py", files)
    expect_tiny(source(tmp_path))


def test_official_files_are_checked_by_md5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = unpacked(tmp_path / "cifar-10-batches-py")
    official = CIFAR10.sha256
    for settings in ("train_files", "test_files", "meta_files"):
        md5s = {name: hashlib.md5(FILES[name]).hexdigest() for name in getattr(CIFAR10, settings)}
        monkeypatch.setattr(CIFAR10, settings, md5s)
    expect_tiny(source(tmp_path, sha256=official))
    changed = bytearray(FILES["data_batch_3"])
    changed[3000] ^= 1
    (folder / "data_batch_3").write_bytes(changed)
    with pytest.raises(
        RuntimeError, match=rf"^{folder / 'data_batch_3'}: its MD5 is \w+, not \w+; delete it"
    ) as caught:
        source(tmp_path, sha256=official).read_train()
    assert "\n" not in str(caught.value)
    source(tmp_path, sha256=official).read_test()  # does not need that file
    source(tmp_path).read_train()  # somebody's own data


def test_a_download_with_a_wrong_checksum_leaves_nothing(server: str, tmp_path: Path) -> None:
    expected, found = "0" * 12, sha256(ARCHIVE)[:12]
    with pytest.raises(RuntimeError, match=rf"^{server}/cifar.tar.gz: .*{found}.*{expected}.*data\.url") as caught:
        source(tmp_path / "root", download=True, url=f"{server}/cifar.tar.gz", sha256="0" * 64).load()
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "root") == []


def test_an_archive_with_a_wrong_checksum_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(ARCHIVE + b"x")
    found = sha256(ARCHIVE + b"x")[:12]
    with pytest.raises(RuntimeError, match=rf"^{path}: .*{found}.*{sha256(ARCHIVE)[:12]}.*delete it to download"):
        source(tmp_path, download=True).load()
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:9/cifar.tar.gz", "refused"),
        ("{server}/missing.tar.gz", "404"),
        ("{server}/short", "broke off after 400 of 1,000 bytes"),
        ("no address", "unknown url type"),
    ],
)
def test_no_data_and_no_network_says_what_to_do(address: str, reason: str, server: str, tmp_path: Path) -> None:
    root, url = tmp_path / "root", address.format(server=server)
    with pytest.raises(FileNotFoundError, match=reason) as caught:
        source(root, download=True, url=url).load()
    for words in (
        str(root),
        url,
        "cifar-10-batches-py/",
        "cifar-10-python.tar.gz",
        "data.url",
        "data=digits",
        "data.root",
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not root.exists() or not os.listdir(root)


def test_no_data_and_no_download_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.download=false; point data\.root at .* data=digits needs no"):
        source(tmp_path).load()


def test_a_server_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert archive.ANSWER_WITHIN < 10
    monkeypatch.setattr(archive, "ANSWER_WITHIN", 0.2)
    release = threading.Event()
    monkeypatch.setattr(archive, "urlopen", lambda url, timeout: release.wait(10))
    with pytest.raises(FileNotFoundError, match=r"no answer within 0\.2 s"):
        source(tmp_path, download=True).load()
    release.set()


class Call:
    """Unpickles to what `function(*arguments)` gives."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.reduced


def attacks(marker: Path) -> dict[str, bytes]:
    write = f"open({str(marker)!r}, 'w')"
    tofile = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93\x8c\x01a" + b"\x8c" + bytes([len(str(marker))])
    return {
        "system": pickle.dumps(Call(os.system, f"touch {marker}")),
        "eval": pickle.dumps(Call(eval, write)),
        "exec": pickle.dumps({"data": Call(exec, write), "labels": []}),
        "protocol 0": f"cbuiltins\neval\n(V{write}\ntR.".encode(),
        "inside a module": tofile + str(marker).encode() + b"\x86R.",
        "codec": b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        "import": b"cthis\nd\n.",
        "truncated": FILES["test_batch"][:5000],
        "text": b"<html>not found</html>",
        "empty": b"",
        "number": pickle.dumps(3),
    }


@pytest.mark.parametrize("name", attacks(Path("marker")))
def test_a_pickle_runs_no_code(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = unpacked(tmp_path / "cifar-10-batches-py", FILES | {"test_batch": attacks(marker)[name]})
    with pytest.raises(ValueError, match=rf"^{folder / 'test_batch'}: not a CIFAR file \(.+\)$") as caught:
        source(tmp_path).load()
    assert not marker.exists()
    harmless = name in ("truncated", "text", "empty", "number")
    assert ("it asks for " in str(caught.value)) == (not harmless)


def test_the_attack_would_work_on_a_plain_unpickler(tmp_path: Path) -> None:
    pickle.loads(attacks(tmp_path / "marker")["system"])
    assert (tmp_path / "marker").exists()


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def outside(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = 3
    return info


def without(name: str) -> dict[str, bytes]:
    return {key: value for key, value in FILES.items() if key != name}


BASE = "cifar-10-batches-py"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            packed(BASE, without("test_batch"), [link(f"{BASE}/test_batch", "/etc/passwd")]),
            "test_batch is not a regular",
        ),
        (packed(BASE, without("test_batch"), [outside(f"{BASE}/../../test_batch")]), f"{BASE}/test_batch.* not found"),
        (packed(BASE, without("batches.meta")), f"{BASE}/batches.meta.* not found"),
        (ARCHIVE[: len(ARCHIVE) // 2], "ended|end of data"),
        (b"<html>not found</html>", "could not be opened"),
    ],
    ids=["link", "outside", "missing", "truncated", "text"],
)
def test_an_archive_that_is_not_what_it_should_be_unpacks_nothing(content: bytes, reason: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(content)
    with pytest.raises(
        RuntimeError, match=rf"^{root}/cifar-10-python\.tar\.gz: cannot be unpacked \(.*{reason}"
    ) as caught:
        source(root, sha256=sha256(content)).load()
    assert "\n" not in str(caught.value)
    assert os.listdir(root) == ["cifar-10-python.tar.gz"]
    assert os.listdir(tmp_path) == ["root"]


def test_what_else_an_archive_holds_is_left_in_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    extra = [link(f"{BASE}/link", "/etc"), outside("../escaped"), outside("/tmp/escaped-too"), outside(f"{BASE}/more")]
    content = packed(BASE, FILES, extra)
    (root / "cifar-10-python.tar.gz").write_bytes(content)
    expect_tiny(source(root, sha256=sha256(content)))
    assert sorted(os.listdir(root / BASE)) == sorted(FILES)
    assert os.listdir(tmp_path) == ["root"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("data_batch_2", {"data": np.zeros((20, 3071), np.uint8)}, r"uint8 \(n, 3072\), found uint8 \(20, 3071\)"),
        ("data_batch_2", {"data": np.zeros((20, 3072), np.float32)}, r"found float32 \(20, 3072\)"),
        ("data_batch_2", {"data": None}, r"found NoneType"),
        ("data_batch_2", {"labels": [0] * 19}, r"labels should be a list of 20, one an image, found 19"),
        ("data_batch_2", {"labels": "x"}, r"found str"),
        ("data_batch_2", {"labels": [0] * 19 + [10]}, r"labels should be integers from 0 to 9, found 10"),
        ("data_batch_2", {"labels": [-1] * 20}, r"found -1"),
        ("data_batch_2", {"labels": [0.5] * 20}, r"found 0\.5"),
        ("batches.meta", {"label_names": None}, r"label_names should be a list of names"),
        ("batches.meta", {"label_names": [1, 2]}, r"label_names should be a list of names"),
    ],
)
def test_content_that_does_not_fit_names_the_file(
    file: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = unpacked(tmp_path / BASE, FILES | {file: pickled(cifar10()[file] | change)})
    with pytest.raises(ValueError, match=rf"^{folder / file}: .*{message}"):
        source(tmp_path).load()
