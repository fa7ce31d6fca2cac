import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cifar.data.digits import Digits, digits


def test_greys_are_spread_over_all_of_uint8() -> None:
    images, labels = digits()
    original = load_digits()
    greys = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]  # 255 g / 16, rounded
    assert images.dtype == torch.uint8
    assert images.numpy().tolist() == np.array(greys)[original.images.astype(int)].tolist()
    assert labels.dtype == torch.int64
    assert labels.tolist() == original.target.tolist()


def test_the_test_split_is_a_fixed_stratified_fifth() -> None:
    train, classes = Digits(image_size=None).read_train()
    test, test_classes = Digits(image_size=None).read_test()
    assert classes == test_classes == tuple("0123456789")
    assert (len(train), len(test)) == (1438, 359)
    counts = np.bincount(load_digits().target)
    assert np.abs(test.labels.bincount().numpy() - counts * 359 / 1797).max() < 1
    pictures = [
        image.numpy().tobytes() + bytes([label])
        for split in (train, test)
        for image, label in zip(split.images[:, 0], split.labels.tolist(), strict=True)
    ]
    images, labels = digits()
    expected = [image.numpy().tobytes() + bytes([label]) for image, label in zip(images, labels.tolist(), strict=True)]
    assert sorted(pictures) == sorted(expected)
    torch.manual_seed(5)
    assert Digits(image_size=None).read_test()[0].images.equal(test.images)


def test_images_are_grey_and_of_cifars_size() -> None:
    small, _ = Digits(image_size=None).read_test()
    assert small.images.shape == (359, 3, 8, 8)
    large, _ = Digits().read_test()
    assert large.images.shape == (359, 3, 32, 32)
    assert large.images[:, 0].equal(large.images[:, 1])
    assert large.images[:, 0].equal(large.images[:, 2])
    expected = np.array(Image.fromarray(small.images[7, 0].numpy()).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(large.images[7, 0].int().numpy() - expected).max() <= 1


def test_defaults_hold_out_180() -> None:
    data = Digits().load()
    assert data.val is not None
    assert (len(data.train), len(data.val), len(data.test)) == (1258, 180, 359)
    assert data.val.labels.bincount().min() >= 17
    assert data.image_shape == (3, 32, 32)
