from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cifar.data.dataset import Dataset, Source, Split, allot, draw, moments, resize


def numbered(labels: Tensor, first: int = 0) -> Split:
    """Image i is filled with the value i, so that it can be told where it went."""
    values = torch.arange(first, first + len(labels))
    return Split(values.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous(), labels)


def numbers(split: Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


@dataclass(kw_only=True)
class Given(Source):
    train: Split
    test: Split
    classes: tuple[str, ...] = ("a", "b", "c", "d")
    test_classes: tuple[str, ...] = ("a", "b", "c", "d")

    def read_train(self) -> tuple[Split, tuple[str, ...]]:
        return self.train, self.classes

    def read_test(self) -> tuple[Split, tuple[str, ...]]:
        return self.test, self.test_classes


def given(labels: Tensor | None = None, batch_size: int = 1, **settings) -> Given:
    if labels is None:
        labels = torch.arange(200) % 4
    return Given(
        train=numbered(labels), test=numbered(torch.arange(8) % 4, first=210), batch_size=batch_size, **settings
    )


def test_a_split_counts_takes_and_moves() -> None:
    split = numbered(torch.tensor([3, 1, 2]))
    assert len(split) == 3
    taken = split.take(torch.tensor([2, 0]))
    assert numbers(taken) == [2, 0]
    assert taken.labels.tolist() == [2, 3]
    assert {split.to("meta").images.device.type, split.to("meta").labels.device.type} == {"meta"}


def test_a_data_set_moves_whole_and_knows_its_images_shape() -> None:
    data = Dataset(numbered(torch.zeros(2)), None, numbered(torch.zeros(1)), ("a",), (0.5,) * 3, (0.5,) * 3)
    assert data.image_shape == (3, 2, 2)
    moved = data.to("meta")
    assert (moved.train.images.device.type, moved.test.labels.device.type, moved.val) == ("meta", "meta", None)
    assert given().load().to("meta").val.images.device.type == "meta"


@pytest.mark.parametrize(
    ("counts", "n", "shares"),
    [
        ([50] * 10, 20, [2] * 10),
        ([10, 20, 30], 7, [1, 2, 4]),  # 1.17, 2.33, 3.5: the third has the largest remainder
        ([30, 20, 10], 7, [4, 2, 1]),
        ([5, 5, 5], 7, [3, 2, 2]),  # equal remainders: the first
        ([1, 1, 8], 4, [0, 0, 4]),  # 0.4, 0.4, 3.2, but the first two have none to spare
        ([3, 0, 3], 4, [2, 0, 2]),
        ([5000] * 10, 0, [0] * 10),
    ],
)
def test_shares_are_proportional_by_largest_remainders(counts: list[int], n: int, shares: list[int]) -> None:
    assert allot(counts, n) == shares


def test_a_draw_has_the_counts_asked_for_and_only_grows() -> None:
    labels = torch.tensor([0, 1, 2, 1, 0, 1, 2, 1, 1, 0] * 5)
    smaller = torch.zeros(len(labels), dtype=torch.bool)
    for counts in ([1, 1, 1], [2, 5, 3], [2, 9, 3], [15, 25, 10]):
        chosen = draw(labels, counts)
        assert labels[chosen].bincount().tolist() == counts
        assert chosen[smaller].all()
        smaller = chosen
    assert not draw(labels, [5, 0, 0])[:20][labels[:20] == 0].all()  # not simply the first ones


def test_held_out_images_are_balanced_in_order_and_the_same_for_every_seed() -> None:
    data = given(val_size=20).load()
    assert data.val is not None
    assert data.val.labels.bincount().tolist() == [5] * 4
    assert data.train.labels.bincount().tolist() == [45] * 4
    assert sorted(numbers(data.train) + numbers(data.val)) == list(range(200))
    for split in (data.train, data.val):
        assert numbers(split) == sorted(numbers(split))
        assert split.labels.tolist() == [number % 4 for number in numbers(split)]
    assert numbers(data.test) == list(range(210, 218))
    torch.manual_seed(17)
    again = given(val_size=20, batch_size=3, fraction=0.5).load()
    assert again.val is not None
    assert numbers(again.val) == numbers(data.val)


def test_held_out_images_follow_unequal_classes() -> None:
    data = given(torch.tensor([0] * 10 + [1] * 20 + [2] * 30), val_size=7).load()
    assert data.val is not None
    assert data.val.labels.bincount().tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("labels", "val_size", "held_out"),
    [
        (torch.arange(200) % 4, None, 20),
        (torch.arange(9) % 4, None, 0),
        (torch.arange(40), None, 0),  # one image a class: none to spare
        (torch.arange(200) % 4, 0, 0),
        (torch.arange(200) % 4, 196, 196),
    ],
)
def test_how_many_are_held_out(labels: Tensor, val_size: int | None, held_out: int) -> None:
    data = given(labels, val_size=val_size).load()
    assert (0 if data.val is None else len(data.val)) == held_out
    assert (data.val is None) == (held_out == 0)
    assert len(data.train) == len(labels) - held_out


def test_fractions_are_balanced_and_nested_in_what_is_left() -> None:
    labels = torch.tensor([0] * 60 + [1] * 60 + [2] * 30 + [3] * 1)
    whole = given(labels, val_size=50).load()
    smaller: set[int] = set()
    for fraction, counts in (
        (0.001, [1, 1, 1, 1]),
        (0.1, [4, 4, 2, 1]),
        (0.25, [10, 10, 5, 1]),
        (1.0, [40, 40, 20, 1]),
    ):
        data = given(labels, val_size=50, fraction=fraction).load()
        assert data.train.labels.bincount().tolist() == counts
        assert data.val is not None
        assert whole.val is not None
        assert numbers(data.val) == numbers(whole.val)
        assert smaller <= set(numbers(data.train)) <= set(numbers(whole.train))
        assert numbers(data.train) == sorted(numbers(data.train))
        smaller = set(numbers(data.train))


def test_statistics_are_of_the_images_trained_on() -> None:
    data = given(val_size=40, fraction=0.5).load()
    values = np.array(numbers(data.train)) / 255
    assert data.mean == pytest.approx([values.mean()] * 3, rel=1e-12)
    assert data.std == pytest.approx([values.std()] * 3, rel=1e-12)
    chosen = given(mean=[0.1, 0.2, 0.3]).load()
    assert chosen.mean == (0.1, 0.2, 0.3)
    assert chosen.std == given().load().std
    assert given(mean=(0.5,) * 3, std=[0.1, 0.2, 0.3]).load().std == (0.1, 0.2, 0.3)


def test_moments_are_exact_a_channel_and_1_for_a_constant_one() -> None:
    images = torch.randint(0, 256, (50, 3, 4, 5), dtype=torch.uint8)
    images[:, 2] = 51
    mean, std = moments(images)
    scaled = images.numpy().astype(np.float64) / 255
    assert mean == pytest.approx(scaled.mean(axis=(0, 2, 3)), rel=1e-12)
    assert std[:2] == pytest.approx(scaled.std(axis=(0, 2, 3))[:2], rel=1e-12)
    assert (mean[2], std[2]) == (pytest.approx(0.2), 1.0)


@pytest.mark.parametrize("size", [8, 32, 48])
def test_resizing_is_pillows_antialiased_bilinear(size: int) -> None:
    images = torch.randint(0, 256, (1001, 3, 16, 12), dtype=torch.uint8)
    resized = resize(images, size)
    assert (resized.shape, resized.dtype) == ((1001, 3, size, size), torch.uint8)
    for index in (0, 999, 1000):
        expected = Image.fromarray(images[index].permute(1, 2, 0).numpy()).resize(
            (size, size), Image.Resampling.BILINEAR
        )
        difference = resized[index].permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()
        assert difference.abs().max() <= 1  # the two round ties in different ways


def test_what_has_its_size_is_not_resized() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert resize(images, 8) is images
    assert resize(images, None) is images


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_size": 200}, r"^data\.val_size=200: at most 196 of the 200 training images"),
        ({"val_size": 60_000}, r"^data\.val_size=60000: at most 196 of the 200"),
        ({"batch_size": 181}, r"^data\.batch_size=181: .*only 180 images .*200 less 20 .*data\.fraction=1\b"),
        ({"batch_size": 46, "val_size": 20, "fraction": 0.25}, r"only 44 images .*data\.fraction=0\.25"),
        ({"test_classes": ("a", "b", "x", "d")}, r"only in train: c; only in test: x$"),
        ({"test_classes": ("b", "a", "c", "d")}, r"a, b, c, d against b, a, c, d$"),
    ],
)
def test_settings_that_do_not_fit_are_named_with_the_numbers(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given(**settings).load()


def test_train_and_test_must_have_one_size() -> None:
    source = given()
    source.test = Split(torch.zeros(2, 3, 2, 3, dtype=torch.uint8), torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match=r"^data\.image_size=None: train images are \(3, 2, 2\), test images \(3, 2, 3\)"
    ):
        source.load()
