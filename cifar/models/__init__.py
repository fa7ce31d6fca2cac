"""Networks, one file a family. Each takes `image_shape` and `num_classes` and returns logits."""

from collections.abc import Iterable

import torch
from torch import nn


def check_sizes(model: nn.Module, channels: int, sizes: Iterable[int]) -> None:
    """Raise ValueError where `model` can't compute images of `channels` channels that are squares of one of `sizes`."""
    was_training = model.training
    model.eval()
    for size in sorted(set(sizes)):
        try:
            with torch.inference_mode():
                model(torch.zeros(1, channels, size, size, device=next(model.parameters()).device))
        except RuntimeError as error:
            raise ValueError(
                f"data.first_sizes: {type(model).__name__} can't take images of {size} x {size} "
                f"({' '.join(str(error).split())}); leave it empty, or give sizes that the model takes"
            ) from None
    model.train(was_training)
