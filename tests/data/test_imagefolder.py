import io
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import functional

from cifar.data import imagefolder
from cifar.data.imagefolder import ImageFolder, read_image

SPLITS = {"train": 5, "test": 2}
CLASSES = ("ant", "bee", "cat")


def picture(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rgb(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return pixels(image.convert("RGB"))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five train and two test images, 8x8, of each of three classes; image i of class c has the seed 10 c + i."""
    for first, (split, count) in zip((0, 100), SPLITS.items(), strict=True):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(first + 10 * label + i).save(folder / f"{i}.png")
    return tmp_path / "images"


def source(root: Path, **settings: Any) -> ImageFolder:
    defaults = {"root": str(root), "cache": str(root.parent / "cache"), "image_size": 8, "val_size": 0, "batch_size": 1}
    return ImageFolder(**(defaults | settings))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were decoded since."""
    folders: list[str] = []
    decode = imagefolder.decode

    def counted(listing: imagefolder.Listing, *arguments: Any) -> dict[str, Any]:
        folders.append(Path(listing.folder).name)
        return decode(listing, *arguments)

    monkeypatch.setattr(imagefolder, "decode", counted)
    return folders


def test_images_labels_and_classes_are_those_of_the_sorted_folders(root: Path) -> None:
    data = source(root).load()
    assert data.classes == CLASSES
    assert data.val is None
    for split, first, count in ((data.train, 0, 5), (data.test, 100, 2)):
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert split.labels.tolist() == [label for label in range(3) for _ in range(count)]
        expected = [pixels(picture(first + 10 * label + i)) for label in range(3) for i in range(count)]
        assert split.images.equal(torch.stack(expected))
    assert data.image_shape == (3, 8, 8)


def test_validation_is_held_out_of_train(root: Path) -> None:
    data = source(root, val_size=3, fraction=0.5).load()
    assert data.val is not None
    assert data.val.labels.tolist() == [0, 1, 2]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_extensions_hidden_files_and_subfolders(root: Path) -> None:
    ant = root / "train" / "ant"
    (ant / "more").mkdir()
    (ant / ".hidden").mkdir()
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "README.txt").write_text("not an image")
    (ant / "notes.txt").write_text("not an image")
    (ant / "._0.png").write_text("not an image")
    (ant / "folder.png").mkdir()
    os.mkfifo(ant / "pipe.png")
    picture(200).save(ant / "more" / "x.PNG")
    picture(201).save(ant / ".hidden" / "x.png")
    (root / "linked.png").write_bytes((ant / "0.png").read_bytes())
    (ant / "z.png").symlink_to(root / "linked.png")
    for extension in ("jpg", "JPEG", "bmp", "gif", "webp", "tif", "tiff", "ppm"):
        picture(202).save(ant / f"y.{extension}")
    train, classes = source(root).read_train()
    assert classes == CLASSES
    names = [*(f"{i}.png" for i in range(5)), "more/x.PNG"]
    names += sorted(f"y.{extension}" for extension in ("jpg", "JPEG", "bmp", "gif", "webp", "tif", "tiff", "ppm"))
    names.append("z.png")
    expected = torch.stack([rgb(ant / name) for name in names])
    assert train.images[train.labels == 0].equal(expected)


@pytest.mark.parametrize(
    ("width", "height"), [(40, 40), (60, 40), (41, 97), (16, 20), (5, 9), (32, 50), (50, 32), (33, 32)]
)
def test_resizing_is_torchvisions_resize_and_center_crop(width: int, height: int, tmp_path: Path) -> None:
    image = picture(1, width, height)
    image.save(tmp_path / "image.png")
    expected = functional.center_crop(functional.resize(image, 32), [32, 32])
    assert read_image(tmp_path / "image.png", 32).equal(pixels(expected))
    assert read_image(str(tmp_path / "image.png"), None).equal(pixels(image))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    image = picture(2).convert(mode)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path)
    array = read_image(path, None)
    assert (array.shape, array.dtype) == ((3, 8, 8), torch.uint8)
    if mode == "CMYK":
        assert array.equal(rgb(path))
    else:
        assert array.equal(pixels(image.convert("RGB")))


def test_transparent_palettes_are_read_without_a_warning(tmp_path: Path) -> None:
    image = picture(2).quantize(16)
    image.save(tmp_path / "image.png", transparency=bytes(range(0, 256, 16)))
    assert read_image(tmp_path / "image.png", None).equal(pixels(image.convert("RGB")))


@pytest.mark.parametrize("name", ["image.png", "image.tif", "image.pgm"])
def test_16_bits_keep_their_range(name: str, tmp_path: Path) -> None:
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / name)
    expected = torch.from_numpy((values // 256).astype(np.uint8)).expand(3, 8, 8)
    assert read_image(tmp_path / name, None).equal(expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(3, 16, 8).save(tmp_path / "image.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "image.jpg") as image:
        expected = ImageOps.exif_transpose(image)
    array = read_image(tmp_path / "image.jpg", None)
    assert array.shape == ((3, 8, 16) if orientation < 5 else (3, 16, 8))
    assert array.equal(pixels(expected))


def test_without_a_size_all_images_must_have_one(root: Path) -> None:
    assert source(root, image_size=None).load().image_shape == (3, 8, 8)
    picture(4, 9, 8).save(root / "train" / "bee" / "odd.png")
    first, odd = root / "train" / "ant" / "0.png", root / "train" / "bee" / "odd.png"
    with pytest.raises(ValueError, match=rf"^{odd}: 9x8 pixels where {first} has 8x8; set data\.image_size"):
        source(root, image_size=None).load()
    assert source(root).load().image_shape == (3, 8, 8)


def test_the_cache_is_used_until_the_source_changes(root: Path, decoded: list[str]) -> None:
    before = source(root).load()
    assert decoded == ["train", "test"]
    assert source(root).load().train.images.equal(before.train.images)
    assert source(root, val_size=3, fraction=0.5, batch_size=2).load().test.images.equal(before.test.images)
    assert decoded == ["train", "test"]
    files = os.listdir(root.parent / "cache")
    assert len(files) == 2
    assert all(name.endswith(".pt") for name in files)
    assert sorted(os.listdir(root)) == ["test", "train"]

    picture(300).save(root / "train" / "cat" / "5.png")  # one more
    after = source(root).load()
    assert decoded == ["train", "test", "train"]
    assert after.train.images[:-1].equal(before.train.images)
    assert after.train.images[-1].equal(pixels(picture(300)))

    path = root / "train" / "ant" / "0.png"
    size, time_ns = path.stat().st_size, path.stat().st_mtime_ns
    other = next(seed for seed in range(400, 1000) if len(encoded(picture(seed))) == size)
    path.write_bytes(encoded(picture(other)))  # other content of the same size, later
    os.utime(path, ns=(time_ns, time_ns + 1))
    assert source(root).load().train.images[0].equal(pixels(picture(other)))
    assert decoded == ["train", "test", "train", "train"]

    path.rename(root / "train" / "bee" / "moved.png")
    assert source(root).load().train.labels.tolist() == [0] * 4 + [1] * 6 + [2] * 6
    assert source(root, image_size=4).load().image_shape == (3, 4, 4)
    assert decoded == ["train", "test", "train", "train", "train", "train", "test"]
    assert len(os.listdir(root.parent / "cache")) == 4  # what has changed was replaced


def encoded(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_another_folder_has_another_cache(root: Path, decoded: list[str]) -> None:
    source(root).load()
    copy = root.parent / "copy"
    root.rename(copy)
    source(copy).load()
    assert decoded == ["train", "test"] * 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty", "other"])
def test_a_damaged_cache_is_decoded_anew(
    damage: str, root: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = source(root).load()
    for path in (root.parent / "cache").iterdir():
        content = path.read_bytes()
        image = content.index(torch.load(path, weights_only=True)["images"].numpy().tobytes())
        damages = {
            "truncated": content[: len(content) // 2],
            "flipped": content[:image] + bytes([content[image] ^ 1]) + content[image + 1 :],
            "text": b"not a cache",
            "empty": b"",
        }
        if damage == "other":
            torch.save([1, 2, 3], path)
        else:
            path.write_bytes(damages[damage])
    for _ in range(2):
        after = source(root).load()
        assert after.train.images.equal(before.train.images)
        assert after.test.images.equal(before.test.images)
        assert decoded == ["train", "test"] * 2
    assert caplog.text.count("decoded anew") == 2


def test_a_cache_that_cannot_be_written_is_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root.parent / "file").write_text("in the way")
    data = source(root, cache=str(root.parent / "file" / "cache")).load()
    assert len(data.train) == 15
    assert re.search(rf"data\.cache={root.parent}/file/cache: cannot keep", caplog.text)


def test_a_write_that_fails_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    assert len(source(root).load().train) == 15
    assert os.listdir(root.parent / "cache") == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not an image", "unknown format"),
        (b"", "unknown format"),
        (encoded(picture(1))[:150], "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "unknown format"),
    ],
    ids=["text", "empty", "truncated", "postscript"],
)
def test_an_unreadable_image_is_named(content: bytes, reason: str, root: Path) -> None:
    bad = root / "train" / "bee" / "2.png"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{bad}: cannot be read as an image \(.*\); data\.on_error=skip") as caught:
        source(root).load()
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (root.parent / "cache").exists()
    with pytest.raises(ValueError, match=rf"^{bad}: cannot be read as an image \([^;]*\)$"):
        read_image(bad, 8)


def test_unreadable_images_are_left_out_and_counted(
    root: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = source(root).load()
    bad = [root / "train" / name for name in ("ant/0.png", "bee/1.png", "bee/3.png", "cat/4.png")]
    for path in bad[:3]:
        path.write_bytes(b"not an image")
    bad[3].unlink()
    bad[3].symlink_to("nowhere")
    for _ in range(2):
        caplog.clear()
        data = source(root, on_error="skip").load()
        kept = [i for i in range(15) if i not in (0, 6, 8, 14)]
        assert data.train.images.equal(before.train.images[kept])
        assert data.train.labels.tolist() == before.train.labels[kept].tolist()
        assert "left out 4 of 15 images" in caplog.text
        assert all(str(path) in caplog.text for path in bad[:3])
    assert decoded == ["train", "test", "train"]
    with pytest.raises(ValueError, match=rf"^{bad[0]}: "):  # although what could be read is in the cache
        source(root).load()


def test_a_class_without_a_readable_image_is_an_error(root: Path) -> None:
    for path in (root / "test" / "cat").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match=rf"^{root}/test/cat: none of its images can be read$"):
        source(root, on_error="skip").load()


def test_decompression_bombs_are_unreadable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (12, 20):  # Pillow warns up to twice the limit, and raises above
        picture(1, side, side).save(root / "train" / "bee" / "0.png")
        with pytest.raises(ValueError, match=r"bee/0\.png: .*decompression bomb"):
            source(root).load()
    picture(1, 2, 45).save(root / "train" / "bee" / "0.png")
    with pytest.raises(ValueError, match=r"bee/0\.png: .*2x45 pixels is too long for its width"):
        source(root).load()


def test_decompression_bombs_are_no_mere_warning_outside_of_pytest(root: Path) -> None:
    program = (
        "from PIL import Image; from cifar.data.imagefolder import read_image; Image.MAX_IMAGE_PIXELS = 60; "
        f"read_image({str(root / 'test' / 'ant' / '0.png')!r}, 8)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ValueError" in finished.stderr.splitlines()[-1]
    assert "decompression bomb" in finished.stderr.splitlines()[-1]


def test_read_image_knows_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}/none\.png: no such file$"):
        read_image(tmp_path / "none.png", 8)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: not a file$"):
        read_image(tmp_path, 8)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png: not a file$"):
        read_image(tmp_path / "pipe.png", 8)


def test_missing_folders_are_named_with_the_layout(root: Path) -> None:
    layout = r"expected train/CLASS/IMAGE and test/CLASS/IMAGE"
    nowhere = root / "nowhere"
    with pytest.raises(FileNotFoundError, match=rf"^data\.root={nowhere}: there is no folder {nowhere}; {layout}"):
        source(nowhere, cache="unused").load()
    (root / "test").rename(root.parent / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"no folder {root}/test; {layout}"):
        source(root).load()
    with pytest.raises(FileNotFoundError, match=rf"no folder {root}/test; {layout}"):
        source(root).read_test()
    with pytest.raises(FileNotFoundError, match=rf"no folder {root.parent}/elsewhere/train; {layout}"):
        source(root.parent / "elsewhere").load()


def test_a_folder_of_classes_is_taken_for_the_test_images(root: Path) -> None:
    test, classes = source(root / "test").read_test()
    assert classes == CLASSES
    assert test.images.equal(source(root).read_test()[0].images)
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_folders_without_images_are_named(root: Path) -> None:
    (root / "test" / "dog").mkdir()
    (root / "train" / "dog").mkdir()
    (root / "train" / "dog" / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError, match=rf"^{root}/train/dog: no images; expected files named \.jpg "):
        source(root).load()
    empty = root.parent / "empty"
    for split in ("train", "test"):
        (empty / split).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"^{empty}/train: no images; expected CLASS/IMAGE"):
        source(empty).load()


def test_what_does_not_fit_is_found_before_anything_is_decoded(root: Path, decoded: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^data\.val_size=13: at most 12 of the 15"):
        source(root, val_size=13).load()
    with pytest.raises(ValueError, match=r"^data\.batch_size=16: there are only 15"):
        source(root, batch_size=16).load()
    (root / "test" / "cat").rename(root / "test" / "dog")
    with pytest.raises(ValueError, match=rf"^data\.root={root}: .*only in train: cat; only in test: dog$"):
        source(root).load()
    assert decoded == []


def test_off_a_terminal_a_plain_line_says_what_takes_so_long(
    root: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    source(root).load()
    assert f"decoding the 15 images of {root}/train" in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif("CIFAR_IMAGES" not in os.environ, reason="CIFAR_IMAGES names no folder of CIFAR-10 as images")
def test_cifar10_as_images(tmp_path: Path) -> None:
    root = Path(os.environ["CIFAR_IMAGES"])
    settings: dict[str, Any] = {"root": str(root), "cache": str(tmp_path), "image_size": 32, "val_size": 0}
    start = time.perf_counter()
    data = ImageFolder(**settings).load()
    middle = time.perf_counter()
    again = ImageFolder(**settings).load()
    print(f"decoded in {middle - start:.1f} s, loaded in {time.perf_counter() - middle:.1f} s")
    assert data.classes == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert data.train.labels.bincount().tolist() == [5000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    for split, folder in ((data.train, root / "train"), (data.test, root / "test")):
        for label, name in enumerate(data.classes):
            first = int((split.labels == label).nonzero()[0])
            assert split.images[first].equal(rgb(min((folder / name).iterdir())))
    assert again.train.images.equal(data.train.images)
    assert again.mean == data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.001)
