from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from scipy import stats  # type: ignore[import-untyped]
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode

from cifar.augment import (
    OPERATIONS,
    Augment,
    Padding,
    brightness,
    contrast,
    crop,
    cutmix,
    cutout,
    flip,
    mixup,
    rotate,
    trivial_augment,
)


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def pictures(count: int = 64, height: int = 16, width: int = 12, seed: int = 7) -> Tensor:
    """8-bit images as floats, smooth enough for interpolation to be well defined, each of its own range of levels."""
    random = generator(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=random)
    low, span = torch.rand(2, count, 3, 1, 1, generator=random) * 0.5
    images = low + span * F.interpolate(coarse, size=(height, width), mode="bilinear")
    return (images * 255).round() / 255


def one_hot(count: int = 64, classes: int = 5) -> Tensor:
    return torch.eye(classes)[torch.randint(classes, (count,), generator=generator(8))]


# Each transform, and how to call it on a batch with a generator.
TRANSFORMS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "flip": lambda images, random: flip(images, random, 0.5),
    "crop": lambda images, random: crop(images, random, 4),
    "crop reflect": lambda images, random: crop(images, random, 4, "reflect"),
    "rotate": lambda images, random: rotate(images, random, 30),
    "brightness": lambda images, random: brightness(images, random, 0.4),
    "contrast": lambda images, random: contrast(images, random, 0.4),
    "cutout": lambda images, random: cutout(images, random, 5),
    "mixup": lambda images, random: mixup(images, one_hot(len(images)), random, 0.4)[0],
    "cutmix": lambda images, random: cutmix(images, one_hot(len(images)), random, 1.0)[0],
    "trivial": trivial_augment,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_generator_alone_decides_and_each_image_draws_its_own(name: str) -> None:
    transform, images = TRANSFORMS[name], pictures(1).repeat(64, 1, 1, 1)
    if name in ("mixup", "cutmix"):  # partners of the same picture would change nothing
        images = torch.cat([images[:32], 1 - images[:32]])
    before = images.clone()
    torch.manual_seed(1)
    first = transform(images, generator(3))
    torch.manual_seed(2)
    assert torch.equal(first, transform(images, generator(3)))
    assert not torch.equal(first, transform(images, generator(4)))
    assert torch.equal(images, before)
    assert len(first.unique(dim=0)) > (1 if name == "flip" else 8)
    assert first.shape == images.shape
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1 + 1e-6


@pytest.mark.parametrize("name", TRANSFORMS)
def test_memory_layout_does_not_matter(name: str) -> None:
    images = pictures()
    strided = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(TRANSFORMS[name](strided, generator()), TRANSFORMS[name](images, generator()))


def test_flip_mirrors_the_drawn_images() -> None:
    images = pictures()
    drawn = torch.rand(64, generator=generator()) < 0.3
    flipped = flip(images, generator(), 0.3)
    assert 0 < drawn.sum() < 64
    assert torch.equal(flipped[drawn], torch.flip(images[drawn], dims=[3]))
    assert torch.equal(flipped[~drawn], images[~drawn])
    assert torch.equal(flip(images, generator(), 0.0), images)
    assert torch.equal(flip(images, generator(), 1.0), torch.flip(images, dims=[3]))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_flip_happens_with_its_probability(p: float) -> None:
    images = torch.tensor([0.0, 1.0]).expand(10_000, 1, 1, 2)
    share = flip(images, generator(), p)[:, 0, 0, 0].mean().item()
    assert abs(share - p) < 4 * (p * (1 - p) / 10_000) ** 0.5


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_cuts_the_drawn_windows(mode: Padding) -> None:
    images, random = pictures(), generator()
    top, left = (torch.randint(9, (64,), generator=random).tolist() for _ in range(2))
    cropped = crop(images, generator(), 4, mode)
    padded = F.pad(images, (4, 4, 4, 4), mode=mode)
    for i, (y, x) in enumerate(zip(top, left, strict=True)):
        assert torch.equal(cropped[i], padded[i, :, y : y + 16, x : x + 12])
    assert torch.equal(crop(images, generator(), 0), images)


def test_crop_offsets_are_uniform() -> None:
    # The one white pixel shows where each window lay.
    images = F.pad(torch.ones(10_000, 1, 1, 1), (2, 2, 2, 2))
    places = crop(images, generator(), 1).flatten(1).argmax(1)
    rows, columns = torch.div(places, 5, rounding_mode="floor"), places % 5
    counts = torch.bincount((rows - 1) * 3 + columns - 1, minlength=9)
    assert len(counts) == 9
    assert stats.chisquare(counts.numpy()).pvalue > 0.001


@pytest.mark.parametrize("size", [(16, 16), (16, 12)])
def test_rotate_is_torchvisions(size: tuple[int, int]) -> None:
    images = pictures(16, *size)
    angles = ((2 * torch.rand(16, generator=generator()) - 1) * 40).tolist()
    assert min(angles) < -15 < 15 < max(angles)
    for rotated, image, angle in zip(rotate(images, generator(), 40), images, angles, strict=True):
        expected = TF.rotate(image[None], angle, InterpolationMode.BILINEAR)[0]
        torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "reference"), [("brightness", TF.adjust_brightness), ("contrast", TF.adjust_contrast)]
)
def test_brightness_and_contrast_are_torchvisions_by_a_factor_uniform_around_1(
    name: str, reference: Callable[[Tensor, float], Tensor]
) -> None:
    images = pictures()
    factors = 1 + 0.6 * (2 * torch.rand(64, generator=generator(3)) - 1)
    expected = torch.stack([reference(image, float(factor)) for image, factor in zip(images, factors, strict=True)])
    got = {"brightness": brightness, "contrast": contrast}[name](images, generator(3), 0.6)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # its weight of red has a digit more
    assert factors.min() < 0.5  # both directions were drawn
    assert factors.max() > 1.5


def test_cutout_greys_the_drawn_square() -> None:
    images, random = pictures(), generator()
    centres = [torch.randint(side, (64,), generator=random).tolist() for side in (16, 12)]
    cut = cutout(images, generator(), 6)
    for i, (y, x) in enumerate(zip(*centres, strict=True)):
        expected = images[i].clone()
        expected[:, max(0, y - 3) : y + 3, max(0, x - 3) : x + 3] = 0.5
        assert torch.equal(cut[i], expected)
    areas = (cutout(torch.zeros(500, 1, 16, 16), generator(), 5) == 0.5).sum(dim=(1, 2, 3))
    assert areas.max() == 25  # whole, unless clipped
    assert areas.min() == 9  # in a corner


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 3.0])
def test_mixup_blends_images_and_targets_by_beta(alpha: float) -> None:
    images, targets = torch.zeros(20_000, 1, 1, 1), torch.zeros(20_000, 2)
    images[10_000:], targets[10_000:, 1], targets[:10_000, 0] = 1.0, 1.0, 1.0
    mixed, mixed_targets = mixup(images, targets, generator(), alpha)
    # Class 1 is white: its probability is the pixel.
    torch.testing.assert_close(mixed_targets[:, 1], mixed.flatten(), rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(20_000))
    # Half of the black images met a white partner: what is left of them follows Beta(alpha, alpha).
    partner = permutation_after(lambda random: mixup(images, targets, random, alpha), 20_000)
    lam = mixed_targets[:10_000, 0][partner[:10_000] >= 10_000].double().clamp(1e-7, 1 - 1e-7)
    assert abs(lam.mean() - 0.5) < 4 * (1 / (4 * (2 * alpha + 1)) / len(lam)) ** 0.5
    assert lam.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    inside = lam[(lam > 0.001) & (lam < 0.999)].numpy()  # where float32 resolves the two tails alike
    beta = stats.beta(alpha, alpha)
    low, high = beta.cdf(0.001), beta.cdf(0.999)
    assert len(inside) / len(lam) == pytest.approx(high - low, abs=4 * (0.25 / len(lam)) ** 0.5)
    assert stats.kstest(inside, lambda x: (beta.cdf(x) - low) / (high - low)).pvalue > 0.001


def permutation_after(call: Callable[[Generator], object], count: int) -> Tensor:
    """The permutation that `call` drew: found by noting the generator's state before each randperm."""
    found: list[Tensor] = []
    original = torch.randperm

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        found.append(original(*args, **kwargs))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", spy)
        call(generator())
    (permutation,) = found
    assert sorted(permutation.tolist()) == list(range(count))
    return permutation


def test_mixup_is_its_formula() -> None:
    images, targets = pictures(), one_hot()
    mixed, mixed_targets = mixup(images, targets, generator(), 0.4)
    partner = permutation_after(lambda random: mixup(images, targets, random, 0.4), 64)
    for i, j in enumerate(partner.tolist()):
        if torch.equal(targets[i], targets[j]):
            continue
        lam = mixed_targets[i][targets[i] == 1].item()  # differs from image to image
        torch.testing.assert_close(mixed_targets[i], lam * targets[i] + (1 - lam) * targets[j])
        torch.testing.assert_close(mixed[i], lam * images[i] + (1 - lam) * images[j])


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_cutmix_pastes_one_box_and_counts_its_pixels(alpha: float) -> None:
    # No two images share a pixel's value, so that each pixel shows where it came from.
    images = torch.rand(64, 3, 16, 12, generator=generator(1))
    targets = one_hot()
    partner = permutation_after(lambda random: cutmix(images, targets, random, alpha), 64)
    cut, cut_targets = cutmix(images, targets, generator(), alpha)
    areas = []
    for i, j in enumerate(partner.tolist()):
        own = (cut[i] == images[i]).all(0)
        if i == j:
            assert own.all()
            assert torch.equal(cut_targets[i], targets[i])
            continue
        pasted = (cut[i] == images[j]).all(0)
        assert torch.equal(own, ~pasted)
        rows, columns = pasted.any(1).nonzero().flatten(), pasted.any(0).nonzero().flatten()
        areas.append(int(pasted.sum()))
        if areas[-1]:
            assert areas[-1] == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        lam = 1 - areas[-1] / (16 * 12)
        torch.testing.assert_close(cut_targets[i], lam * targets[i] + (1 - lam) * targets[j])
    assert len(set(areas)) > 10
    torch.testing.assert_close(cut_targets.sum(1), torch.ones(64))


def test_cutmix_box_is_uniformly_placed_with_the_shape_of_the_image() -> None:
    images = torch.zeros(20_000, 1, 16, 8)
    images[::2] = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, **_: torch.arange(n) ^ 1)  # black meets white
        patch.setattr("cifar.augment._beta", lambda images, *_: torch.full((len(images),), 0.75))
        cut, _ = cutmix(images, torch.eye(2).repeat(10_000, 1), generator(), 1.0)
    pasted = (cut != images)[:, 0]
    heights, widths = pasted.any(2).sum(1), pasted.any(1).sum(1)
    assert (heights.max(), widths.max()) == (8, 4)  # half of each side, a quarter of the area, unless clipped
    assert (heights.min(), widths.min()) == (4, 2)
    # Rows 4 rows from either border are covered by 8 of the 16 centres, the first row by 5 of them.
    covered = pasted.any(2).float().mean(0)
    assert covered[4:12].tolist() == pytest.approx([0.5] * 8, abs=0.02)
    assert covered[0].item() == pytest.approx(5 / 16, abs=0.02)


def expected_of(name: str, strength: float, image: Tensor) -> Tensor:
    """torchvision's operation on one image; `strength` from -1 to 1."""
    factor, size = 1 + 0.99 * strength, abs(strength)
    as_bytes = (image * 255).round().to(torch.uint8)
    height, width = image.shape[-2:]

    def moved(shear: tuple[float, float] = (0, 0), translate: tuple[float, float] = (0, 0)) -> Tensor:
        """Each output pixel's place in the input, in pixels from the top left corner, then torch's bilinear sampling."""
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        from_x, from_y = x + shear[0] * y + translate[0], y + shear[1] * x + translate[1]
        grid = torch.stack([2 * from_x / width - 1, 2 * from_y / height - 1], dim=-1)
        return F.grid_sample(image[None], grid[None], align_corners=False)[0]

    match name:
        case "identity":
            return image
        case "brightness":
            return TF.adjust_brightness(image, factor)
        case "color":
            return TF.adjust_saturation(image, factor)
        case "contrast":
            return TF.adjust_contrast(image, factor)
        case "sharpness":
            return TF.adjust_sharpness(image, factor)
        case "posterize":
            return TF.posterize(as_bytes, 8 - round(6 * size)) / 255
        case "solarize":
            threshold = 256 - int(256 * size + 1e-4)  # the paper's code; at 256 nothing is inverted
            return (TF.solarize(as_bytes, threshold) if threshold < 256 else as_bytes) / 255
        case "autocontrast":
            return TF.autocontrast(image)
        case "equalize":
            return TF.equalize(as_bytes) / 255
        case "rotate":
            return TF.rotate(image[None], 135 * strength, InterpolationMode.BILINEAR)[0]
        case "shear_x":
            return moved(shear=(0.99 * strength, 0))
        case "shear_y":
            return moved(shear=(0, 0.99 * strength))
        case "translate_x":
            return moved(translate=(width * strength, 0))
        case "translate_y":
            return moved(translate=(0, height * strength))
    raise AssertionError(name)


@pytest.mark.parametrize("side", [16, 32])
def test_trivial_augment_is_torchvisions_operation_by_operation(side: int) -> None:
    images, random = pictures(600, side, side - 4), generator()
    operations = torch.randint(14, (600,), generator=random).tolist()
    levels, signs = torch.randint(31, (600,), generator=random), torch.randint(2, (600,), generator=random)
    strengths = (levels / 30 * (2 * signs - 1)).tolist()
    augmented = trivial_augment(images, generator())
    for i, (operation, strength) in enumerate(zip(operations, strengths, strict=True)):
        name = OPERATIONS[operation]
        expected = expected_of(name, strength, images[i])
        # torchvision's grey has 0.2989 for red where ours has 0.299.
        torch.testing.assert_close(augmented[i], expected, rtol=0, atol=5e-4, msg=f"{name} at {strength}")
    assert set(operations) == set(range(14))


def test_trivial_augment_draws_each_operation_as_often() -> None:
    drawn: list[Tensor] = []
    original = torch.bincount

    def spy(operation: Tensor, **kwargs: Any) -> Tensor:
        drawn.append(original(operation, **kwargs))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bincount", spy)
        trivial_augment(torch.zeros(10_000, 3, 4, 4), generator())
    assert len(drawn[0]) == len(OPERATIONS) == 14
    assert stats.chisquare(drawn[0].numpy()).pvalue > 0.001


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_trivial_augment_of_a_flat_picture_is_finite(level: float) -> None:
    augmented = trivial_augment(torch.full((200, 3, 8, 8), level), generator())
    assert augmented.isfinite().all()
    assert augmented.min() >= 0
    assert augmented.max() <= 1 + 1e-6


def test_nothing_on_returns_the_inputs() -> None:
    images, labels = pictures(), torch.arange(64) % 5
    random = generator()
    got, targets = Augment(5)(images, labels, random)
    assert got is images
    assert targets is labels
    assert torch.equal(random.get_state(), generator().get_state())


def test_order_is_policy_crop_rotation_flip_brightness_contrast_cutout_mixup() -> None:
    images, labels, random = pictures(), torch.arange(64) % 5, generator()
    expected = trivial_augment(images, random)
    expected = crop(expected, random, 3, "reflect")
    expected = rotate(expected, random, 20)
    expected = flip(expected, random, 0.4)
    expected = brightness(expected, random, 0.3)
    expected = contrast(expected, random, 0.2)
    expected = cutout(expected, random, 4)
    expected, expected_targets = mixup(expected, F.one_hot(labels, 5).float(), random, 0.3)
    augment = Augment(
        5,
        policy="trivial",
        crop=3,
        crop_mode="reflect",
        rotation=20,
        flip=0.4,
        brightness=0.3,
        contrast=0.2,
        cutout=4,
        mixup=0.3,
    )
    got, targets = augment(images, labels, generator())
    assert torch.equal(got, expected)
    assert torch.equal(targets, expected_targets)


@pytest.mark.parametrize("key", ["policy", "crop", "rotation", "flip", "brightness", "contrast", "cutout"])
def test_labels_stay_labels_without_mixing(key: str) -> None:
    images, labels = pictures(), torch.arange(64) % 5
    settings: dict[str, Any] = {key: {"policy": "trivial", "crop": 4, "rotation": 4, "cutout": 4}.get(key, 0.5)}
    got, targets = Augment(5, **settings)(images, labels, generator())
    assert targets is labels
    assert not torch.equal(got, images)


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_either_mix_alone_is_the_function(key: str) -> None:
    images, labels = pictures(), torch.arange(64) % 5
    expected = {"mixup": mixup, "cutmix": cutmix}[key](images, torch.eye(5)[labels], generator(), 1)
    settings: dict[str, Any] = {key: 1}  # a whole number, as typed on the command line
    got = Augment(5, **settings)(images, labels, generator())
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[1].dtype == torch.float32


def test_with_both_mixes_an_image_gets_one_or_the_other_evenly() -> None:
    count = 10_000
    images = torch.rand(count, 1, 4, 4, generator=generator(1))
    labels, random = torch.arange(count) % 5, generator()
    targets = torch.eye(5)[labels]
    mixed, mixed_targets = mixup(images, targets, random, 1.0)
    cut, cut_targets = cutmix(images, targets, random, 1.0)
    got, got_targets = Augment(5, mixup=1.0, cutmix=1.0)(images, labels, generator())
    is_mixed, is_cut = (got == mixed).flatten(1).all(1), (got == cut).flatten(1).all(1)
    assert (is_mixed | is_cut).all()
    assert torch.equal(got_targets[~is_cut], mixed_targets[~is_cut])
    assert torch.equal(got_targets[~is_mixed], cut_targets[~is_mixed])
    assert is_mixed.float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / count**0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 12, "crop_mode": "reflect"}, r"^augment\.crop=12: .* 12$"),
        ({"cutout": 12}, r"^augment\.cutout=12: .* 12, .*$"),
    ],
)
def test_what_is_too_large_for_the_images_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(5, **settings)(pictures(2), torch.zeros(2, dtype=torch.long), generator())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_everything_runs_on_a_gpu() -> None:
    images, labels = pictures().cuda(), (torch.arange(64) % 5).cuda()
    jitter = {"brightness": 0.3, "contrast": 0.2}
    augment = Augment(5, policy="trivial", crop=3, rotation=20, flip=0.4, cutout=4, mixup=0.3, cutmix=1.0, **jitter)
    got, targets = augment(images, labels, Generator("cuda").manual_seed(0))
    again, _ = augment(images, labels, Generator("cuda").manual_seed(0))
    assert got.is_cuda
    assert torch.equal(got, again)
    torch.testing.assert_close(targets.sum(1), torch.ones(64, device="cuda"))
