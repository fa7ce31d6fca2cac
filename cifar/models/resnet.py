"""Residual networks for small images."""

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: the identity, or a 1x1 projection where the shape changes.

    He et al. 2015, https://arxiv.org/abs/1512.03385, figure 2 and section 3.3, option B.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        """Halve height and width (rounding up) where `stride` is 2."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, in_channels, h, w)` to `(b, out_channels, ceil(h / stride), ceil(w / stride))`."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network of basic blocks in its CIFAR form: a 3x3 stem of stride 1 and no max-pooling.

    He et al. 2015, https://arxiv.org/abs/1512.03385: the stages of its ImageNet networks (each but the first doubles
    the channels and halves height and width) and its initialisation, on the stem of its CIFAR networks.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        blocks: list[PositiveInt] = [2, 2, 2, 2],  # noqa: B006 (only read)
        width: PositiveInt = 64,
    ) -> None:
        """Take `image_shape` (channels, height, width), the basic blocks of each stage and the first stage's channels.

        Blocks [2, 2, 2, 2] make ResNet-18, [3, 4, 6, 3] ResNet-34.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = nn.Sequential()
        channels = width
        for stage, depth in enumerate(blocks):
            before, channels = channels, width * 2**stage
            first = BasicBlock(before, channels, stride=1 if stage == 0 else 2)
            self.stages.append(nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(depth - 1))))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map float images `(b, channels, height, width)` to logits `(b, num_classes)`."""
        x = F.relu(self.bn1(self.conv1(images)))
        return self.fc(self.stages(x).mean((2, 3)))
