import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar.models.net import Net


def test_seed_gives_the_tutorials_initial_weights():
    torch.manual_seed(0)
    model = Net((3, 32, 32), 10)
    torch.manual_seed(0)
    layers = {
        "conv1": nn.Conv2d(3, 6, 5),
        "conv2": nn.Conv2d(6, 16, 5),
        "fc1": nn.Linear(400, 120),
        "fc2": nn.Linear(120, 84),
        "fc3": nn.Linear(84, 10),
    }
    expected = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
    state = model.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def test_forward_is_the_tutorials():
    model = Net((3, 32, 32), 10).double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)

    def convolution(x, layer):  # each output pixel: a 5x5 patch times the weights
        out = F.unfold(x, 5).transpose(1, 2) @ layer.weight.flatten(1).T + layer.bias
        return out.transpose(1, 2).reshape(len(x), -1, x.shape[2] - 4, x.shape[3] - 4)

    def halved(x):
        return x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))

    x = halved(convolution(images, model.conv1).clamp(min=0))
    x = halved(convolution(x, model.conv2).clamp(min=0))
    x = x.reshape(4, 16 * 5 * 5)
    x = (x @ model.fc1.weight.T + model.fc1.bias).clamp(min=0)
    x = (x @ model.fc2.weight.T + model.fc2.bias).clamp(min=0)
    expected = x @ model.fc3.weight.T + model.fc3.bias
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("image_shape", "features"), [((3, 16, 16), 16), ((1, 16, 31), 16 * 1 * 4), ((4, 64, 32), 16 * 13 * 5)]
)
def test_other_image_shapes(image_shape, features):
    model = Net(image_shape, 7)
    assert model.fc1.in_features == features
    assert model(torch.zeros(2, *image_shape)).shape == (2, 7)


@pytest.mark.parametrize("image_shape", [(3, 8, 8), (3, 15, 32), (3, 32, 15)])
def test_images_too_small(image_shape):
    channels, height, width = image_shape
    expected = (
        f"model=net needs images of at least 16 x 16, not {channels} x {height} x {width}: "
        "set data.image_size=32 or use model=mlp"
    )
    with pytest.raises(ValueError, match="model=net") as error:
        Net(image_shape, 10)
    assert str(error.value) == expected
