"""Losses of logits `(b, classes)` against targets: labels int64 `(b,)` or class probabilities `(b, classes)`."""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor


def cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
) -> Tensor:
    """Mean over the batch of `-sum_k q_k log softmax(logits)_k`, as a scalar.

    `q` is the target distribution mixed with the uniform one: `(1 - label_smoothing) * target + label_smoothing /
    classes` (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567).
    """
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def mean_squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over batch and classes of `(logits - target)^2`, as a scalar; labels count as one-hot targets.

    Hui & Belkin 2021, https://arxiv.org/abs/2006.07322, compare it with cross-entropy for classification.
    """
    if not targets.is_floating_point():
        targets = F.one_hot(targets, logits.shape[1])
    return F.mse_loss(logits, targets.to(logits.dtype))
