"""The small convolutional network of PyTorch's CIFAR-10 tutorial."""

import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Two 5x5 convolutions (6, 16 channels), each with ReLU and 2x2 max-pooling, then 120, 84 and `num_classes` units.

    https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html. Layers bear the tutorial's names and are
    created in its order, so that a seed gives the same initial weights as there.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        """Take `image_shape` (channels, height, width); ValueError if height or width is below 16."""
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < 16:
            raise ValueError(
                f"model=net needs images of at least 16 x 16, not {channels} x {height} x {width}: "
                "set data.image_size=32 or use model=mlp"
            )
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))  # 5 x 5 for images of 32 x 32
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * rows * columns, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map float images `(b, channels, height, width)` to logits `(b, num_classes)`."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
