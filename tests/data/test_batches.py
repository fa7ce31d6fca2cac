import pytest
import torch
from torchvision.transforms import Normalize as TorchvisionNormalize
from torchvision.transforms.functional import to_tensor

from cifar.augment import Augment
from cifar.data import batches as module
from cifar.data.batches import Batches, Normalize
from cifar.data.dataset import Split

NORMALIZE = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def split(n: int) -> Split:
    """Images whose every pixel is their own number, so that a batch shows which images it holds."""
    numbers = torch.arange(n, dtype=torch.uint8)
    return Split(numbers.view(n, 1, 1, 1).expand(n, 3, 4, 4).contiguous(), numbers.long() % 10)


def held(images: torch.Tensor) -> list[int]:
    return ((images[:, 0, 0, 0] * 0.2 + 0.4) * 255).round().int().tolist()


def test_normalize_equals_torchvision_to_the_bit() -> None:
    image = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    expected = [
        TorchvisionNormalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))(to_tensor(one.permute(1, 2, 0).numpy()))
        for one in image
    ]
    assert torch.equal(NORMALIZE(image), torch.stack(expected))
    assert torch.equal(NORMALIZE(image.float() / 255), torch.stack(expected))


@pytest.mark.parametrize("chunk", [1, 12, 1024])
def test_an_epoch_holds_each_image_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    data = split(50)
    training = Batches(data, NORMALIZE, 8, seed=1)
    assert len(training) == 7
    seen, labels = [], []
    for images, targets in training.epoch(0):
        seen.append(held(images))
        labels += targets.tolist()
    assert [len(batch) for batch in seen] == [8] * 6 + [2]
    flat = [number for batch in seen for number in batch]
    assert flat == training.order(0).tolist()
    assert sorted(flat) == list(range(50))
    assert labels == [number % 10 for number in flat]


def test_order_follows_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): tuple(Batches(split(50), NORMALIZE, 8, seed=seed).order(epoch).tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert tuple(Batches(split(50), NORMALIZE, 4, seed=1).order(1).tolist()) == orders[1, 1]


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("chunk", [8, 24])
def test_an_epoch_goes_on_where_it_stopped(start: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)

    def noise(
        images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, turns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return images + torch.rand(images.shape, generator=generator), labels

    training = Batches(split(50), NORMALIZE, 8, augment=noise)
    whole = list(training.epoch(3))
    rest = list(training.epoch(3, start=start))
    assert len(rest) == 7 - start if start < 7 else rest == []
    for (images, targets), (same_images, same_targets) in zip(rest, whole[start:], strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)


def test_augmentation_draws_anew_each_epoch_and_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 8)
    draws = []

    def augment(
        images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, turns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        draws.append(torch.rand((), generator=generator).item())
        return images, labels

    for seed in (0, 1):
        training = Batches(split(32), NORMALIZE, 8, augment=augment, seed=seed)
        for epoch in (0, 1):
            list(training.epoch(epoch))
    assert len(set(draws)) == len(draws) == 16


def test_drop_last_leaves_out_the_partial_batch() -> None:
    training = Batches(split(50), NORMALIZE, 8, drop_last=True)
    assert len(training) == 6
    assert [len(targets) for _, targets in training.epoch(0)] == [8] * 6


def test_in_order_is_the_splits_order() -> None:
    assert [number for images in Batches(split(50), NORMALIZE, 8).in_order() for number in held(images)] == list(
        range(50)
    )


def test_alternating_flips_show_each_image_both_ways_in_any_two_epochs() -> None:
    images = torch.zeros(40, 3, 4, 4, dtype=torch.uint8)
    images[:, :, 0, 0] = torch.arange(1, 41, dtype=torch.uint8)[:, None]  # its number in the upper left corner
    plain = Normalize((0.0,) * 3, (1.0,) * 3)
    training = Batches(Split(images, torch.arange(40)), plain, 8, seed=3, augment=Augment(10, flip="alternate"))
    flipped = {}
    for epoch in range(3):
        for batch, labels in training.epoch(epoch):
            for image, number in zip(batch, labels.tolist(), strict=True):
                flipped[epoch, number] = bool(image[0, 0, 3] > 0)
                assert image[0, 0, 3 if flipped[epoch, number] else 0] == pytest.approx((number + 1) / 255)
    first = [flipped[0, number] for number in range(40)]
    assert 5 < sum(first) < 35
    assert first == [not flipped[1, number] for number in range(40)] == [flipped[2, number] for number in range(40)]


def test_the_first_epochs_are_the_same_batches_made_smaller() -> None:
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    data, settings = Split(images, torch.arange(40)), {"seed": 3, "augment": Augment(10, crop=2, flip=0.5)}
    whole, small = (
        Batches(data, NORMALIZE, 16, **settings),
        Batches(data, NORMALIZE, 16, first_sizes=[4, 6], **settings),
    )
    for epoch, size in enumerate((4, 6, 8)):
        for (expected, labels), (got, same_labels) in zip(whole.epoch(epoch), small.epoch(epoch), strict=True):
            assert torch.equal(labels, same_labels)
            if size == 4:  # halved with antialiasing: weights 1, 3, 3, 1 at 4 pixels a side
                padded = torch.nn.functional.pad(expected, (1, 1, 1, 1), value=torch.nan)
                taps = torch.tensor([1.0, 3, 3, 1])
                windows, weights = padded.unfold(2, 4, 2).unfold(3, 4, 2), taps[:, None] * taps
                inside = ~windows.isnan()
                expected = (windows.nan_to_num() * weights).sum((4, 5)) / (inside * weights).sum((4, 5))
            elif size == 6:
                assert got.shape[2:] == (6, 6)
                continue
            torch.testing.assert_close(got, expected)
    assert all(images.shape[2:] == (8, 8) for images in small.in_order())
