"""Multilayer perceptron."""

import math
from itertools import pairwise

from pydantic import PositiveInt
from torch import nn


class MLP(nn.Sequential):
    """Flatten `(b, c, h, w)`, then a linear layer and ReLU for each width, then linear to logits `(b, num_classes)`."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        widths: list[PositiveInt] = [64, 64],  # noqa: B006 (only read)
    ) -> None:
        """Take `image_shape` (channels, height, width) and the units of each hidden layer; none: softmax regression."""
        features = [math.prod(image_shape), *widths]
        hidden = [layer for sizes in pairwise(features) for layer in (nn.Linear(*sizes), nn.ReLU())]
        super().__init__(nn.Flatten(), *hidden, nn.Linear(features[-1], num_classes))
