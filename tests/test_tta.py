import pytest
import torch
from torch import Tensor

from cifar.tta import VIEWS, flip, flip_translate, none


def corner(images: Tensor) -> Tensor:
    """A network that sees only the upper left pixel: what it says tells which views it was shown."""
    return images[:, :, 0, 0]


def test_views_are_weighted_as_airbench_weights_them() -> None:
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    left, right = images[:, :, 0, 0], images[:, :, 0, 4]
    assert torch.equal(none(corner, images), left)
    torch.testing.assert_close(flip(corner, images), (left + right) / 2)
    # Shifted by a pixel, the corner shows what the reflected border or the image has at (1, 1), and mirrored at (1, 3).
    inner = (images[:, :, 1, 1] + images[:, :, 1, 3]) / 2
    torch.testing.assert_close(flip_translate(corner, images), (left + right) / 4 + inner / 2)


@pytest.mark.parametrize("name", VIEWS)
def test_a_network_blind_to_position_says_the_same(name: str) -> None:
    images = torch.ones(2, 3, 8, 8) * torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(VIEWS[name](lambda x: x.mean((2, 3)), images), images[:, :, 0, 0])
