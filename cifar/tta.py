"""Test-time augmentation: a network's mean logits over several views of each image.

Each function maps a network and its normalised images `(b, 3, h, w)` to logits `(b, classes)`.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Network = Callable[[Tensor], Tensor]


def none(network: Network, images: Tensor) -> Tensor:
    """The images as they are."""
    return network(images)


def flip(network: Network, images: Tensor) -> Tensor:
    """Each image and its mirror image."""
    return (network(images) + network(images.flip(3))) / 2


def flip_translate(network: Network, images: Tensor) -> Tensor:
    """Both of each image and, with half the weight in all, of it shifted by a pixel along one diagonal, either way.

    The border is reflected. Jordan 2024, https://arxiv.org/abs/2404.00498, section 3.5.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    shifted = [padded[:, :, :height, :width], padded[:, :, 2:, 2:]]
    return flip(network, images) / 2 + (flip(network, shifted[0]) + flip(network, shifted[1])) / 4


VIEWS = {"none": none, "flip": flip, "flip_translate": flip_translate}
