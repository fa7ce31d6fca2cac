import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar.models.speednet import SpeedNet


def pictures(count: int = 64) -> torch.Tensor:
    """Smooth images whose channels go together, as real ones' do."""
    torch.manual_seed(1)
    grey = F.interpolate(torch.randn(count, 1, 8, 8), size=(32, 32), mode="bilinear")
    return grey + 0.3 * F.interpolate(torch.randn(count, 3, 8, 8), size=(32, 32), mode="bilinear")


def test_the_first_layer_whitens_patches() -> None:
    model, images = SpeedNet((3, 32, 32), 10, whiten_bias=False), pictures()
    model.initialize(images)
    out = model.whiten(images)
    assert torch.equal(out[:, 12:], -out[:, :12])
    flat = out[:, :12].movedim(1, 0).flatten(1)
    second_moment = flat @ flat.T / flat.shape[1]
    # What is divided by is root(eigenvalue + 5e-4): directions with little variance stay below 1.
    torch.testing.assert_close(second_moment, torch.diag(second_moment.diagonal()), rtol=0, atol=1e-3)
    assert second_moment.diagonal().max() == pytest.approx(1, abs=1e-3)


def test_it_is_airbenchs_network() -> None:
    """The same function as its layers written out, from the same weights; and its starting point."""
    torch.manual_seed(0)
    model = SpeedNet((3, 32, 32), 10).eval()
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad and p.ndim == 4] == [
        (64, 24, 3, 3),
        (64, 64, 3, 3),
        (256, 64, 3, 3),
        (256, 256, 3, 3),
        (256, 256, 3, 3),
        (256, 256, 3, 3),
    ]
    assert not model.whiten.weight.requires_grad
    images = pictures(4)
    x = F.gelu(F.conv2d(images, model.whiten.weight, model.whiten.bias))
    for group in model.groups:
        x = F.max_pool2d(F.conv2d(x, group.conv1.weight, padding="same"), 2)
        x = F.gelu(F.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), eps=1e-12))
        x = F.conv2d(x, group.conv2.weight, padding="same")
        x = F.gelu(F.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), eps=1e-12))
    expected = F.max_pool2d(x, 3).flatten(1) @ model.head.weight.T
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-6)
    assert model.head.weight.std().item() == pytest.approx(1 / 256, rel=1e-4)
    group = model.groups[1]
    torch.testing.assert_close(F.conv2d(x := torch.randn(1, 64, 5, 5), group.conv1.weight, padding=1)[:, :64], x)


def test_a_third_convolution_is_residual() -> None:
    """The same function as airbench96's group written out, in the groups that have three."""
    torch.manual_seed(0)
    model = SpeedNet((3, 32, 32), 10, widths=[4, 6], depths=[2, 3]).eval()
    assert [len([p for p in group.parameters() if p.ndim == 4]) for group in model.groups] == [2, 3]
    group, x = model.groups[1], torch.randn(2, 4, 8, 8)
    torch.nn.init.normal_(group.conv3.weight)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, torch.zeros(6), torch.ones(6), eps=1e-12)

    first = F.gelu(norm(F.max_pool2d(F.conv2d(x, group.conv1.weight, padding=1), 2)))
    second = F.gelu(norm(F.conv2d(first, group.conv2.weight, padding=1)))
    expected = F.gelu(norm(F.conv2d(second, group.conv3.weight, padding=1)) + first)
    torch.testing.assert_close(group(x), expected, rtol=1e-4, atol=1e-6)
    assert not group.norm3.weight.requires_grad
    fresh = SpeedNet((3, 32, 32), 10, widths=[4], depths=[3]).groups[0].conv3.weight
    torch.testing.assert_close(F.conv2d(y := torch.randn(1, 4, 5, 5), fresh, padding=1), y)


def test_a_depth_for_each_group() -> None:
    with pytest.raises(ValueError, match=r"^model\.depths=\[2, 3\]: needs one number for each of model\.widths=\[4\]"):
        SpeedNet((3, 32, 32), 10, widths=[4], depths=[2, 3])


def test_nothing_is_computed_back_to_a_first_layer_without_bias() -> None:
    model = SpeedNet((3, 32, 32), 10, widths=[4, 4], whiten_bias=False)
    assert not model.whiten(pictures(2)).requires_grad
    assert [name for name, p in model.named_parameters() if "whiten" in name and p.requires_grad] == []
    names = [name for name, p in model.named_parameters() if isinstance(p, nn.Parameter) and p.requires_grad]
    assert "groups.0.norm1.bias" in names
    assert "groups.0.norm1.weight" not in names


def test_statistics_follow_the_newest_batches() -> None:
    model = SpeedNet((3, 32, 32), 10, widths=[4], norm_momentum=0.25)
    model(images := pictures(8))
    x = F.max_pool2d(model.groups[0].conv1(F.gelu(model.whiten(images))), 2)
    torch.testing.assert_close(model.groups[0].norm1.running_mean, 0.25 * x.mean((0, 2, 3)))


def test_images_too_small() -> None:
    with pytest.raises(ValueError, match=r"^model\.widths=\[4, 4, 4\]: images of 8 x 16"):
        SpeedNet((3, 8, 16), 10, widths=[4, 4, 4])
