"""torch's own optimizers, with the choice of what weight decay reaches, and torch's fused kernel wherever there is one.

Build them once the model lies on its device: that decides the kernel. Ranges are in the annotations; `lr` is the base
rate that a schedule multiplies.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field, FiniteFloat
from torch import nn

NonNegative = Annotated[FiniteFloat, Field(ge=0)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running average


def sgd(
    params: Iterable[nn.Parameter],
    lr: NonNegative = 0.01,
    momentum: Decay = 0.9,
    weight_decay: NonNegative = 0.0,
    nesterov: bool = False,
    decay_norm_and_bias: bool = True,
) -> torch.optim.SGD:
    """`torch.optim.SGD`. `decay_norm_and_bias=False` spares parameters of one dimension or less the weight decay.

    Raises ValueError for Nesterov momentum without momentum.
    """
    if nesterov and momentum == 0:
        raise ValueError("optimizer.nesterov=true: needs optimizer.momentum above 0, such as 0.9; it is 0")
    groups = _groups(params, weight_decay, decay_norm_and_bias)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=_fused(groups))


def adam(
    params: Iterable[nn.Parameter],
    lr: NonNegative = 0.001,
    betas: tuple[Decay, Decay] = (0.9, 0.999),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.0,
    decay_norm_and_bias: bool = True,
) -> torch.optim.Adam:
    """`torch.optim.Adam` (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980): decay as a term of the gradient."""
    groups = _groups(params, weight_decay, decay_norm_and_bias)
    return torch.optim.Adam(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=_fused(groups))


def adamw(
    params: Iterable[nn.Parameter],
    lr: NonNegative = 0.001,
    betas: tuple[Decay, Decay] = (0.9, 0.999),
    eps: Positive = 1e-8,
    weight_decay: NonNegative = 0.01,
    decay_norm_and_bias: bool = True,
) -> torch.optim.AdamW:
    """`torch.optim.AdamW` (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101): decay beside the gradient."""
    groups = _groups(params, weight_decay, decay_norm_and_bias)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=_fused(groups))


def _groups(params: Iterable[nn.Parameter], weight_decay: float, decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """Parameter groups in torch's form: all in one, or norm scales and biases apart, with no weight decay."""
    params = list(params)
    if decay_norm_and_bias:
        return [{"params": params, "weight_decay": weight_decay}]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _fused(groups: list[dict[str, Any]]) -> bool:
    """Whether torch's one-kernel update, the same formulas in one pass over memory, takes all of these parameters."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for group in groups for p in group["params"])
