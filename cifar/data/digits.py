"""Handwritten digits that come with scikit-learn: a real data set that needs no network."""

from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from cifar.data.dataset import Source, Split, allot, draw, resize

CLASSES = tuple("0123456789")


@dataclass(kw_only=True)
class Digits(Source):
    """1,797 grey 8x8 images of the ten digits, a stratified fifth of them for the test.

    The test half of https://archive.ics.uci.edu/dataset/80 as `sklearn.datasets.load_digits` gives it. The same grey
    stands in all three channels, and images are enlarged to CIFAR's 32x32, so what runs on CIFAR runs on it.
    """

    val_size: NonNegativeInt | None = 180
    image_size: PositiveInt | None = 32

    def read_train(self) -> tuple[Split, tuple[str, ...]]:
        """The four fifths to train on."""
        return self._read(test=False)

    def read_test(self) -> tuple[Split, tuple[str, ...]]:
        """The fifth to test on, the same in every run."""
        return self._read(test=True)

    def _read(self, test: bool) -> tuple[Split, tuple[str, ...]]:
        images, labels = digits()
        chosen = draw(labels, allot(labels.bincount().tolist(), round(len(labels) / 5)))
        index = (chosen if test else ~chosen).nonzero().flatten()
        images = images[index].unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
        return Split(resize(images, self.image_size), labels[index]), CLASSES


def digits() -> tuple[Tensor, Tensor]:
    """All images, uint8 `(1797, 8, 8)`, their 17 greys spread over 0 to 255, and labels int64 `(1797,)`."""
    from sklearn.datasets import load_digits  # takes a second, and only this data set needs it

    data = load_digits()
    return torch.from_numpy(data.images * 255 / 16).round().to(torch.uint8), torch.from_numpy(data.target).long()
