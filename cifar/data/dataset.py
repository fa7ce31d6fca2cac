"""A data set is uint8 images and int64 labels in memory; a source reads one, and all are split the same way."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Annotated, Any, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import interpolate

Means = Annotated[Sequence[float], Field(min_length=3, max_length=3)]
Stds = Annotated[Sequence[PositiveFloat], Field(min_length=3, max_length=3)]


@dataclass(frozen=True)
class Split:
    """Images uint8 `(n, 3, h, w)` and their labels int64 `(n,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> "Split":
        """The images at `index`, int64 `(m,)`, in that order."""
        return Split(self.images.index_select(0, index), self.labels.index_select(0, index))


@dataclass(frozen=True)
class Dataset:
    """Three splits, the names of their classes, and each channel's mean and standard deviation of `x / 255`."""

    train: Split
    val: Split | None
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.train.images.shape[1:])

    def describe(self) -> dict[str, list[Any]]:
        """What a network must know of the data it was trained on, as plain values."""
        return {
            "classes": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "image_shape": list(self.image_shape),
        }

    def to(self, device: torch.device | str) -> Self:
        """The same data set on `device`."""
        val = None if self.val is None else self.val.to(device)
        return replace(self, train=self.train.to(device), val=val, test=self.test.to(device))


@dataclass(kw_only=True)
class Source(ABC):
    """Where a data set is read from, and the settings that every data set has.

    Validation images are drawn class by class in proportion, and by a fixed generator: runs that differ in their seed
    validate on the same images. So is the `fraction` of the others: a smaller one is part of a larger one.
    """

    batch_size: PositiveInt = 64  # images a step
    val_size: NonNegativeInt | None = None  # training images held out for validation; None: a tenth
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # share of each class's other images to train on
    mean: Means | None = None  # a channel's mean of x / 255; None: measured on the images trained on
    std: Stds | None = None  # its standard deviation
    image_size: PositiveInt | None = None  # resize to a square of so many pixels; None: as they are
    first_sizes: tuple[PositiveInt, ...] = ()  # `image_size` of the first epochs' training batches
    drop_last: bool = False  # leave out an epoch's last batch where it is not full

    @abstractmethod
    def read_train(self) -> tuple[Split, tuple[str, ...]]:
        """All training images, in their final size, and the names of the classes."""

    @abstractmethod
    def read_test(self) -> tuple[Split, tuple[str, ...]]:
        """All test images, in their final size, and the names of the classes."""

    def load(self) -> Dataset:
        """Read both splits and divide the first in training and validation; ValueError where settings do not fit."""
        return self.assemble(*self.read_train(), *self.read_test())

    def assemble(self, train: Split, classes: tuple[str, ...], test: Split, test_classes: tuple[str, ...]) -> Dataset:
        """The data set that these settings make of what was read; ValueError where they do not fit it."""
        if classes != test_classes:
            raise ValueError(f"the classes of train and test differ: {differences(classes, test_classes)}")
        if train.images.shape[1:] != test.images.shape[1:]:
            shapes = [tuple(split.images.shape[1:]) for split in (train, test)]
            raise ValueError(
                f"data.image_size={self.image_size}: train images are {shapes[0]}, test images {shapes[1]}; "
                "set it to bring them to one size"
            )
        trained_on, held_out = self.partition(train.labels)
        val = train.take(held_out) if len(held_out) else None
        train = train.take(trained_on) if len(trained_on) < len(train) else train
        if self.mean is None or self.std is None:
            measured_mean, measured_std = moments(train.images)
        mean = measured_mean if self.mean is None else tuple(self.mean)
        std = measured_std if self.std is None else tuple(self.std)
        return Dataset(train, val, test, classes, mean, std)

    def partition(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Which images to train on and which to hold out, as ascending int64 indices into `labels` `(n,)`.

        Raises ValueError where `val_size` or `batch_size` is more than there is.
        """
        counts = labels.bincount().tolist()
        spare = sum(count - 1 for count in counts if count)
        val_size = min(len(labels) // 10, spare) if self.val_size is None else self.val_size
        if val_size > spare:
            raise ValueError(
                f"data.val_size={val_size}: at most {spare} of the {len(labels)} training images can be held out, "
                "so that each class keeps one"
            )
        held_out = draw(labels, allot(counts, val_size))
        left = (~held_out).nonzero().flatten()
        # Rounded class by class: with a fixed total, a class may lose an image as the fraction grows.
        shares = [max(round(self.fraction * count), min(count, 1)) for count in labels[left].bincount().tolist()]
        trained_on = left[draw(labels[left], shares)]
        if self.batch_size > len(trained_on):
            raise ValueError(
                f"data.batch_size={self.batch_size}: there are only {len(trained_on)} images to train on "
                f"({len(labels)} less {val_size} for validation, times data.fraction={self.fraction:g})"
            )
        return trained_on, held_out.nonzero().flatten()


def allot(counts: list[int], n: int) -> list[int]:
    """How many of each class make up `n` images, in proportion to `counts`, by largest remainders.

    Of equal remainders the first counts as the largest. Each class keeps an image, so `n` may be at most
    `sum(count - 1)`.
    """
    total = sum(counts)
    shares = [n * count // total for count in counts]
    missing = n - sum(shares)
    for label in cycle(sorted(range(len(counts)), key=lambda label: -(n * counts[label] % total))):
        if not missing:
            break
        if shares[label] < counts[label] - 1:
            shares[label] += 1
            missing -= 1
    return shares


def draw(labels: Tensor, counts: list[int]) -> Tensor:
    """A random choice of `counts[c]` images of each class c, the same each time, as a bool mask `(n,)`.

    With larger counts the choice grows: what was in it stays.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in enumerate(counts):
        members = (labels == label).nonzero().flatten()
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen


def moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (of the population) of `x / 255`, a channel, over images uint8 `(n, c, h, w)`.

    A channel that is constant has standard deviation 1 here, so that dividing by it is harmless.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    # Counting the 256 values is exact, and needs no float copy of the images.
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    constant = (counts > 0).sum(1) == 1
    return tuple(mean.tolist()), tuple(std.masked_fill(constant, 1).tolist())


def resize(images: Tensor, size: int | None) -> Tensor:
    """Images uint8 `(n, c, h, w)` made `(n, c, size, size)`, antialiased bilinear; None: as they are."""
    if size is None or images.shape[2:] == (size, size):
        return images
    resized = images.new_empty(*images.shape[:2], size, size)
    for source, target in zip(images.split(1000), resized.split(1000), strict=True):
        target.copy_(interpolate(source, (size, size), mode="bilinear", antialias=True))
    return resized


def differences(train: Sequence[str], test: Sequence[str]) -> str:
    """The names that only one of the two has, for an error's message."""
    only = {"train": sorted(set(train) - set(test)), "test": sorted(set(test) - set(train))}
    named = [f"only in {split}: {', '.join(names)}" for split, names in only.items() if names]
    return "; ".join(named) or f"{', '.join(train)} against {', '.join(test)}"
