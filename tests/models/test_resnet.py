import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cifar.models.resnet import BasicBlock, ResNet


def randomise(model):
    """Give the batch norms scales, shifts and statistics that show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    return model.double()


def normalised(x, state, key, training):
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, variance = state[f"{key}.running_mean"], state[f"{key}.running_var"]
    scale = state[f"{key}.weight"] / torch.sqrt(variance + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{key}.bias"][:, None, None]


def block(x, state, stride, training=False):
    """He et al. 2015, figure 2: relu(shortcut(x) + F(x))."""
    residual = F.conv2d(x, state["conv1.weight"], stride=stride, padding=1)
    residual = normalised(residual, state, "bn1", training).clamp(min=0)
    residual = normalised(F.conv2d(residual, state["conv2.weight"], padding=1), state, "bn2", training)
    if "shortcut.0.weight" in state:
        x = normalised(F.conv2d(x, state["shortcut.0.weight"], stride=stride), state, "shortcut.1", training)
    return (x + residual).clamp(min=0)


@pytest.mark.parametrize(("arguments", "count"), [({}, 11_173_962), ({"blocks": [3, 4, 6, 3]}, 21_282_122)])
def test_number_of_parameters(arguments, count):
    """The counts known for ResNet-18 and ResNet-34 in CIFAR form, as in github.com/kuangliu/pytorch-cifar."""
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet((3, 32, 32), 10, **arguments).parameters()) == count


def test_shape_after_each_stage():
    with torch.device("meta"):
        model = ResNet((3, 32, 32), 10)
        x = model.conv1(torch.zeros(2, 3, 32, 32))
        shapes = [tuple(x.shape)]
        for stage in model.stages:
            x = stage(x)
            shapes.append(tuple(x.shape))
        assert shapes == [(2, 64, 32, 32), (2, 64, 32, 32), (2, 128, 16, 16), (2, 256, 8, 8), (2, 512, 4, 4)]
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("in_channels", "out_channels", "stride"), [(4, 4, 1), (4, 6, 1), (4, 8, 2), (4, 4, 2)])
def test_block_equals_recomputation(in_channels, out_channels, stride, training):
    module = randomise(BasicBlock(in_channels, out_channels, stride)).train(training)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    x = torch.randn(3, in_channels, 7, 8, dtype=torch.float64)
    expected = block(x, state, stride, training)
    assert ("shortcut.0.weight" in state) == (stride == 2 or in_channels != out_channels)
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-11)


def test_output_equals_recomputation():
    model = randomise(ResNet((1, 9, 10), 5, blocks=[2, 1, 2], width=4)).eval()
    state = model.state_dict()
    images = torch.randn(3, 1, 9, 10, dtype=torch.float64)

    x = normalised(F.conv2d(images, state["conv1.weight"], padding=1), state, "bn1", False).clamp(min=0)
    for stage, index, stride in [(0, 0, 1), (0, 1, 1), (1, 0, 2), (2, 0, 2), (2, 1, 1)]:
        prefix = f"stages.{stage}.{index}."
        x = block(x, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, stride)
    assert x.shape == (3, 16, 3, 3)
    expected = x.sum((2, 3)) / 9 @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-11)


def test_initial_weights_keep_the_variance_of_gradients():
    """He et al. 2015, https://arxiv.org/abs/1502.01852, equation 14: deviation sqrt(2 / (k^2 out_channels))."""
    torch.manual_seed(0)
    model = ResNet((3, 32, 32), 10, blocks=[1, 1], width=64)
    deviations = {key: p.std().item() for key, p in model.named_parameters() if p.ndim == 4}
    assert deviations["stages.1.0.conv1.weight"] == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.03)
    assert deviations["stages.1.0.shortcut.0.weight"] == pytest.approx((2 / 128) ** 0.5, rel=0.03)
