"""Multilayer perceptron."""

import math
from itertools import pairwise
from typing import Annotated

from pydantic import Field, PositiveInt
from torch import nn


class MLP(nn.Sequential):
    """Flatten `(b, c, h, w)`, then a linear layer, ReLU and dropout for each width, then linear to logits `(b, num_classes)`."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        widths: list[PositiveInt] = [64, 64],  # noqa: B006 (only read)
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        """Take `image_shape` (channels, height, width) and the units of each hidden layer; none: softmax regression.

        `dropout` is the share of each hidden layer's outputs that training leaves out.
        """
        features = [math.prod(image_shape), *widths]
        hidden = [
            layer for sizes in pairwise(features) for layer in (nn.Linear(*sizes), nn.ReLU(), nn.Dropout(dropout))
        ]
        super().__init__(nn.Flatten(), *hidden, nn.Linear(features[-1], num_classes))
