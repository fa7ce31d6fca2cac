"""Batches cut by index from images that already lie on the device: no workers, no queue, no copy a step."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cifar.data.dataset import Split

Augmentation = Callable[[Tensor, Tensor, torch.Generator, Tensor], tuple[Tensor, Tensor]]

# Small batches are prepared this many images at a time: at batch 4, indexing, scaling and augmenting step by step would be
# a dozen calls of a few microseconds each.
CHUNK = 1024


class Normalize:
    """uint8 images (n, 3, h, w) to float32 `(x / 255 - mean) / std`, in the arithmetic of torchvision's ToTensor + Normalize."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str = "cpu") -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the normalised float32 images; a float input is taken to be in [0, 1] already."""
        scaled = images if images.is_floating_point() else images.to(torch.float32).div_(255)
        return (scaled - self.mean).div_(self.std)


class Batches:
    """The batches of one split, whose images and labels lie on the training device already.

    Order and augmentation are functions of `(seed, epoch, position)` alone, so a run that goes on in the middle of an epoch
    sees exactly what an uninterrupted one would have seen, and there is no generator state to save.
    """

    def __init__(
        self,
        split: Split,
        normalize: Normalize,
        batch_size: int,
        *,
        seed: int = 0,
        augment: Augmentation | None = None,
        first_sizes: Sequence[int] = (),
        drop_last: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
        rank: int = 0,
        size: int = 1,
        shared: bool = False,
    ) -> None:
        """Images of the first epochs are resized to squares, antialiased bilinear: of epoch i to `first_sizes[i]` pixels a side.

        With several processes (`size`), iteration gives the part of each batch that is process `rank`'s.
        `shared` keeps what was prepared last, for others who iterate in step: they get the same tensors.
        """
        self.images = split.images
        self.labels = split.labels
        self.normalize = normalize
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.first_sizes = first_sizes
        self.used = len(split) // batch_size * batch_size if drop_last else len(split)
        self.memory_format = memory_format
        first_turn = torch.randint(2, self.labels.shape, generator=self._generator("cpu", "turn"))
        self.first_turn = first_turn.to(self.images.device)
        self.rank, self.size = rank, size
        self.shared = shared
        self._newest: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        """Steps an epoch."""
        return -(-self.used // self.batch_size)

    def __str__(self) -> str:
        """For the run's log."""
        return f"{self.used:,} images in {len(self):,} steps an epoch"

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the shuffled, augmented, normalised batches of one epoch (counted from 0), from step `start` on.

        Images are float32 (b, 3, h, w); targets are labels int64 (b,) or, after mixup or CutMix, probabilities (b, classes).
        """
        order = self.order(epoch)
        steps_a_chunk = max(1, CHUNK // self.batch_size)
        for first in range(start - start % steps_a_chunk, len(self), steps_a_chunk):
            index = order[first * self.batch_size : (first + steps_a_chunk) * self.batch_size]
            if self._newest is not None and self._newest[0] == (epoch, first):
                images, targets = self._newest[1]
            else:
                images, targets = self._prepare(index, epoch, first)
                self._newest = ((epoch, first), (images, targets)) if self.shared else None
            batches = zip(images.split(self.batch_size), targets.split(self.batch_size), strict=True)
            for step, batch in enumerate(batches, start=first):
                if step >= start:
                    yield batch if self.size == 1 else self._part(*batch)

    def order(self, epoch: int) -> Tensor:
        """Return the indices, int64 (used,), of the images in the order in which an epoch trains on them."""
        shuffled = torch.randperm(len(self.labels), generator=self._generator("cpu", "order", epoch))
        return shuffled[: self.used].to(self.images.device)

    def indices(self, epoch: int, step: int) -> Tensor:
        """Return the indices, int64 (b,), of the images of one step of an epoch."""
        return self.order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]

    def images_in(self, step: int) -> int:
        """Return the number of images of an epoch's step, in all processes."""
        return min(self.batch_size, self.used - step * self.batch_size)

    def in_order(self) -> Iterator[Tensor]:
        """Yield every image once, normalised and unaugmented, in the split's own order: for evaluation.

        With several processes, each takes consecutive batches, whole: they are computed as one process computes them.
        """
        batches = self.images.split(self.batch_size)
        first, last = (len(batches) * rank // self.size for rank in (self.rank, self.rank + 1))
        for images in batches[first:last] or (self.images[:0],):
            yield self.normalize(images).contiguous(memory_format=self.memory_format)

    def _part(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # The whole batch is prepared everywhere: its images share one stream of random numbers, and mixup mixes them.
        return images.tensor_split(self.size)[self.rank], targets.tensor_split(self.size)[self.rank]

    def _prepare(self, index: Tensor, epoch: int, first: int) -> tuple[Tensor, Tensor]:
        images, targets = self.images.index_select(0, index), self.labels.index_select(0, index)
        if self.augment is not None:
            generator = self._generator(images.device, "augment", epoch, first)
            images, targets = self.augment(
                images.to(torch.float32).div_(255), targets, generator, self.first_turn.index_select(0, index) + epoch
            )
        images = self.normalize(images)
        if epoch < len(self.first_sizes):
            images = interpolate(images, (self.first_sizes[epoch],) * 2, mode="bilinear", antialias=True)
        return images.contiguous(memory_format=self.memory_format), targets

    def _generator(self, device: torch.device | str, *key: str | int) -> torch.Generator:
        # A hash keeps the streams of neighbouring seeds, epochs and purposes unrelated.
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
