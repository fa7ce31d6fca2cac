"""Augmentation of a whole batch on the batch's device, every draw made per image.

Images are float32 `(b, c, h, w)` in [0, 1], before normalisation; targets are labels int64 `(b,)` or class
probabilities `(b, classes)`. All randomness comes from the explicit `torch.Generator`, which lives on the images'
device, so that the same generator state gives the same batch. Functions return new tensors and leave their arguments
alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, FiniteFloat, NonNegativeInt
from torch import Generator, Tensor

Probability = Annotated[float, Field(ge=0, le=1)]
Degrees = Annotated[float, Field(ge=0, le=180)]
Alpha = Annotated[FiniteFloat, Field(ge=0)]
Padding = Literal["constant", "reflect"]


@dataclass(frozen=True)
class Augment:
    """The transforms of one training batch; zeros and `None` switch them off, and with all off nothing is changed.

    `flip="alternate"` mirrors an image in every other epoch, beginning by chance: as random as flipping each time by chance, but
    over any two epochs it is seen both ways (Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.6).

    The order: policy, crop, rotation, flip, brightness, contrast, cutout, then mixup or CutMix. With both of these on, an
    image gets one or the other with equal chance. Labels come back as they are unless one of the two is on, which makes
    them probabilities.
    """

    num_classes: int
    policy: Literal["trivial"] | None = None
    crop: NonNegativeInt = 0
    crop_mode: Padding = "constant"
    rotation: Degrees = 0.0
    flip: Probability | Literal["alternate"] = 0.0
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    cutout: NonNegativeInt = 0
    mixup: Alpha = 0.0
    cutmix: Alpha = 0.0

    def __call__(
        self, images: Tensor, labels: Tensor, generator: Generator, turns: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Augment `images` `(b, c, h, w)` with `labels` int64 `(b,)`.

        `turns` int64 `(b,)` counts an image's epochs from 0 or 1, by chance: odd ones are flipped by `flip="alternate"`.
        Raises ValueError where the images are too small for `crop` or `cutout`.
        """
        side = min(images.shape[-2:])
        if self.policy == "trivial":
            images = trivial_augment(images, generator)
        if self.crop:
            if self.crop_mode == "reflect" and self.crop >= side:
                raise ValueError(f"augment.crop={self.crop}: reflected padding must be below the images' side, {side}")
            images = crop(images, generator, self.crop, self.crop_mode)
        if self.rotation:
            images = rotate(images, generator, self.rotation)
        if self.flip == "alternate":
            assert turns is not None
            images = torch.where(_per_image(turns % 2 == 1), images.flip(3), images)
        elif self.flip:
            images = flip(images, generator, self.flip)
        if self.brightness:
            images = brightness(images, generator, self.brightness)
        if self.contrast:
            images = contrast(images, generator, self.contrast)
        if self.cutout:
            if self.cutout >= side:
                raise ValueError(
                    f"augment.cutout={self.cutout}: must be below the images' side, {side}, or nothing is left"
                )
            images = cutout(images, generator, self.cutout)
        if not (self.mixup or self.cutmix):
            return images, labels
        targets = F.one_hot(labels, self.num_classes).to(images.dtype)
        if not self.cutmix:
            return mixup(images, targets, generator, self.mixup)
        if not self.mixup:
            return cutmix(images, targets, generator, self.cutmix)
        mixed, mixed_targets = mixup(images, targets, generator, self.mixup)
        cut, cut_targets = cutmix(images, targets, generator, self.cutmix)
        chosen = _uniform(images, generator) < 0.5
        return torch.where(_per_image(chosen), mixed, cut), torch.where(chosen[:, None], mixed_targets, cut_targets)


def flip(images: Tensor, generator: Generator, p: Probability) -> Tensor:
    """Mirror each image left to right with probability `p`."""
    return torch.where(_per_image(_uniform(images, generator) < p), images.flip(3), images)


def crop(images: Tensor, generator: Generator, padding: NonNegativeInt, mode: Padding = "constant") -> Tensor:
    """Pad all sides by `padding` pixels, black or reflected, and cut a window of the old size at a uniform place."""
    height, width = images.shape[-2:]
    top = _integers(images, generator, 2 * padding + 1)
    left = _integers(images, generator, 2 * padding + 1)
    # Every window is a view, (b, c, top, left, h, w): only the one that an image drew is copied.
    windows = F.pad(images, (padding,) * 4, mode=mode).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def rotate(images: Tensor, generator: Generator, degrees: Degrees) -> Tensor:
    """Turn each image about its centre by an angle uniform in ±`degrees`, bilinear, black outside."""
    angle = (2 * _uniform(images, generator) - 1) * degrees
    still = angle.new_zeros(len(images), 2)
    return _warp(images, angle, shear=still, shift=still)


def brightness(images: Tensor, generator: Generator, most: Probability) -> Tensor:
    """Multiply each image by a factor uniform in 1 ± `most`, clipped to [0, 1]: torchvision's ColorJitter, for each image."""
    factor = 1 + most * (2 * _uniform(images, generator) - 1)
    return (images * _per_image(factor)).clamp_(0, 1)


def contrast(images: Tensor, generator: Generator, most: Probability) -> Tensor:
    """Scale each image's distance from its mean grey by a factor uniform in 1 ± `most`, clipped to [0, 1], as ColorJitter."""
    factor = 1 + most * (2 * _uniform(images, generator) - 1)
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, _per_image(factor)).clamp_(0, 1)


def cutout(images: Tensor, generator: Generator, size: int) -> Tensor:
    """Grey out a square of `size` pixels a side, centred on a uniform pixel and clipped at the border.

    DeVries & Taylor 2017, https://arxiv.org/abs/1708.04552. They fill with 0 after normalisation, the mean colour;
    here, before it, with 0.5, mid-grey.
    """
    sides = torch.full((len(images),), size, device=images.device)
    return torch.where(_box(images, generator, sides, sides), 0.5, images)


def mixup(images: Tensor, targets: Tensor, generator: Generator, alpha: float) -> tuple[Tensor, Tensor]:
    """Blend each image and its target with a partner of the batch: `lam * own + (1 - lam) * partner`.

    `lam ~ Beta(alpha, alpha)`, `alpha > 0`, drawn for each image; the partners are a permutation of the batch.
    `targets` are class probabilities `(b, classes)`. Zhang et al. 2018, https://arxiv.org/abs/1710.09412.
    """
    lam = _beta(images, generator, alpha)
    partner = _permutation(images, generator)
    return torch.lerp(images[partner], images, _per_image(lam)), torch.lerp(targets[partner], targets, lam[:, None])


def cutmix(images: Tensor, targets: Tensor, generator: Generator, alpha: float) -> tuple[Tensor, Tensor]:
    """Paste a box of a partner into each image, and blend the targets by the share of the pixels that each has.

    The box has the image's aspect ratio and the share `1 - lam` of its area, `lam ~ Beta(alpha, alpha)`, `alpha > 0`,
    centred on a uniform pixel and clipped at the border, all drawn for each image; the partners are a permutation of
    the batch. `targets` are class probabilities `(b, classes)`. Yun et al. 2019, https://arxiv.org/abs/1905.04899.
    """
    height, width = images.shape[-2:]
    ratio = (1 - _beta(images, generator, alpha)).sqrt()
    partner = _permutation(images, generator)
    box = _box(images, generator, (ratio * height).long(), (ratio * width).long())
    lam = 1 - box.to(targets.dtype).mean(dim=(1, 2, 3))
    return torch.where(box, images[partner], images), torch.lerp(targets[partner], targets, lam[:, None])


def trivial_augment(images: Tensor, generator: Generator) -> Tensor:
    """Apply one operation to each image, uniform over 14, at one of 31 strengths, in either direction: TrivialAugment.

    Müller & Hutter 2021, https://arxiv.org/abs/2103.10158, its "wide" space: brightness, colour, contrast, sharpness by
    a factor in 1 ± 0.99, posterize to 8..2 bits, solarize from the top down, autocontrast, equalize, rotate up to 135
    degrees, shear up to 0.99, translate up to the whole side (32 pixels in the paper). Geometric ones are bilinear,
    black outside. Images are RGB.
    """
    operation = _integers(images, generator, len(OPERATIONS))
    strength = _integers(images, generator, 31) / 30 * (2 * _integers(images, generator, 2) - 1)
    # One transfer to the host a batch: how many images drew each operation. `members` are their indices.
    counts = torch.bincount(operation, minlength=len(OPERATIONS)).tolist()
    members = dict(zip(OPERATIONS, operation.argsort().split(counts), strict=True))

    augmented = images.clone()
    for name, apply in _PHOTOMETRIC.items():
        index = members[name]
        if len(index):
            augmented[index] = apply(images[index], _per_image(strength[index]))

    index = torch.cat([members[name] for name in _GEOMETRIC])
    if len(index):
        drawn, amount = operation[index], strength[index]
        angle, shear_x, shear_y, shift_x, shift_y = (
            torch.where(drawn == OPERATIONS.index(name), amount * most, 0.0) for name, most in _GEOMETRIC.items()
        )
        shear, shift = torch.stack([shear_x, shear_y], 1), torch.stack([shift_x, shift_y], 1)
        augmented[index] = _warp(images[index], angle, shear, shift)
    return augmented


# The operations of TrivialAugment. `strength` is `(n, 1, 1, 1)` in [-1, 1]; those without a direction take its size.


def _brightness(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images), images, strength)


def _color(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(_grey(images), images, strength)


def _contrast(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(_grey(images).mean(dim=(1, 2, 3), keepdim=True), images, strength)


def _sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Towards or away from a 3x3 mean that counts the centre five times; the border stays, as in PIL."""
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = (9 * F.avg_pool2d(images, 3, stride=1) + 4 * images[..., 1:-1, 1:-1]) / 13
    return _blend(smooth, images, strength)


def _posterize(images: Tensor, strength: Tensor) -> Tensor:
    step = 2 ** (6 * strength.abs()).round()  # 8-bit levels that become one, 1 to 64
    return (images * 255).round().div(step, rounding_mode="floor") * step / 255


def _solarize(images: Tensor, strength: Tensor) -> Tensor:
    return torch.where((images * 255).round() >= 256 * (1 - strength.abs()), 1 - images, images)


def _autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    """Stretch each channel to [0, 1]; one of a single value stays."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def _equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Flatten each channel's histogram over 8-bit levels, in PIL's integer arithmetic."""
    levels = (images * 255).round().flatten(2).contiguous()
    below = torch.searchsorted(levels.sort().values, levels)  # pixels of the channel under this one's level
    step = below.amax(dim=2, keepdim=True) // 255
    equalized = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, equalized, levels).view_as(images) / 255


_PHOTOMETRIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
# At full strength: degrees, pixels a pixel, and shares of the side.
_GEOMETRIC = {"rotate": 135.0, "shear_x": 0.99, "shear_y": 0.99, "translate_x": 1.0, "translate_y": 1.0}
OPERATIONS = ("identity", *_PHOTOMETRIC, *_GEOMETRIC)


def _blend(other: Tensor, images: Tensor, strength: Tensor) -> Tensor:
    """`images` away from `other` for a positive strength, towards it for a negative one."""
    return torch.lerp(other, images, 1 + 0.99 * strength).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Luma of RGB `(b, 3, h, w)` as `(b, 1, h, w)`, ITU-R BT.601."""
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _warp(images: Tensor, angle: Tensor, shear: Tensor, shift: Tensor) -> Tensor:
    """Turn by `angle` `(b,)` degrees counter-clockwise about the centre, shear from the top left corner, and shift.

    `shear` and `shift` are `(b, 2)` as (x, y): pixels a pixel, and shares of the side; an image may have one of the
    three.
    """
    height, width = images.shape[-2:]
    cos, sin = torch.cos(angle * math.pi / 180), torch.sin(angle * math.pi / 180)
    # affine_grid maps output to input places, both from -1 to 1 whatever the side: hence the aspect ratios.
    x_of_y, y_of_x = shear[:, 0] * height / width, shear[:, 1] * width / height
    x = torch.stack([cos, x_of_y - sin * height / width, x_of_y + 2 * shift[:, 0]], dim=1)
    y = torch.stack([y_of_x + sin * width / height, cos, y_of_x + 2 * shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([x, y], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _box(images: Tensor, generator: Generator, heights: Tensor, widths: Tensor) -> Tensor:
    """A mask `(b, 1, h, w)` of boxes `heights` x `widths`, int64 `(b,)`, on uniform centres, clipped at the border."""
    height, width = images.shape[-2:]
    top = _integers(images, generator, height) - heights // 2
    left = _integers(images, generator, width) - widths // 2
    rows = torch.arange(height, device=images.device) - top[:, None]
    columns = torch.arange(width, device=images.device) - left[:, None]
    in_rows, in_columns = (rows >= 0) & (rows < heights[:, None]), (columns >= 0) & (columns < widths[:, None])
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _beta(images: Tensor, generator: Generator, alpha: float) -> Tensor:
    """A draw `(b,)` from Beta(alpha, alpha) for each image: G1 / (G1 + G2) of two Gamma(alpha) variables.

    `torch.distributions` takes no generator. In logarithms, by Gamma(a) = Gamma(a + 1) U^(1 / a) (Marsaglia & Tsang
    2000), because for a small alpha most draws of Gamma(alpha) lie under the smallest float.
    """
    gamma = torch._standard_gamma(torch.full((2, len(images)), alpha + 1.0, device=images.device), generator=generator)
    uniform = 1 - torch.rand(
        2, len(images), generator=generator, device=images.device
    )  # in (0, 1]: the logarithm is finite
    log_gamma = gamma.log() + uniform.log() / alpha
    return torch.sigmoid(log_gamma[0] - log_gamma[1])


def _uniform(images: Tensor, generator: Generator) -> Tensor:
    return torch.rand(len(images), generator=generator, device=images.device)


def _integers(images: Tensor, generator: Generator, count: int) -> Tensor:
    return torch.randint(count, (len(images),), generator=generator, device=images.device)


def _permutation(images: Tensor, generator: Generator) -> Tensor:
    return torch.randperm(len(images), generator=generator, device=images.device)


def _per_image(values: Tensor) -> Tensor:
    """`(b,)` as `(b, 1, 1, 1)`."""
    return values[:, None, None, None]
