"""torch's own optimizers, with the choice of what weight decay reaches, and torch's fused kernel wherever there is one; Muon.

Build them once the model lies on its device: that decides the kernel. Ranges are in the annotations; `lr` is the base
rate that a schedule multiplies.
"""

from collections.abc import Iterable
from inspect import unwrap
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor, nn

NonNegative = Annotated[FiniteFloat, Field(ge=0)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running average
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Untraced:
    """torch.optim's methods without their marks for the tracer of torch.compile, which never sees an optimizer here.

    The marks import that tracer at the first call, and it takes 1.4 s: more than all else between command and first step
    but torch itself. The formulas and the kernels stay torch's.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)


class SGD(_Untraced, torch.optim.SGD):
    """`torch.optim.SGD`, quick to start."""

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))
    step.hooked = True


class Adam(_Untraced, torch.optim.Adam):
    """`torch.optim.Adam`, quick to start."""

    step = torch.no_grad()(unwrap(torch.optim.Adam.step))
    step.hooked = True


class AdamW(_Untraced, torch.optim.AdamW):
    """`torch.optim.AdamW`, quick to start."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
    step.hooked = True


class Muon(SGD):
    """SGD, but in groups with `orthogonal: True` the update of each matrix or filter bank is made orthogonal first.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: the momentum's matrix (filters as rows) is replaced by
    the nearest semi-orthogonal one, times `max(1, rows / columns) ** 0.5`. With `normalize: True` the weights are brought
    to norm `rows ** 0.5` before, as airbench94_muon does: for weights whose scale a BatchNorm after them undoes.
    """

    dtype = torch.float32  # in which updates are made orthogonal

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            if group["orthogonal"]:
                self._orthogonalize(group)
        super().step(closure)  # their own momentum is 0: it adds the new gradients, times -lr

    step.hooked = True  # type: ignore[attr-defined]

    def _orthogonalize(self, group: dict[str, Any]) -> None:
        """Replace the gradients of a group by their orthogonal updates."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        updates: list[Tensor] = [p.grad for p in params]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, group["inner_momentum"])
        torch._foreach_add_(buffers, updates)
        if group["inner_nesterov"]:
            updates = list(torch._foreach_add(updates, buffers, alpha=group["inner_momentum"]))
        else:
            updates = buffers
        if group["normalize"]:
            norms = torch._foreach_norm(params)
            torch._foreach_mul_(params, [len(p) ** 0.5 / norm for p, norm in zip(params, norms, strict=True)])
        of_shape: dict[tuple[int, int], list[int]] = {}
        for position, update in enumerate(updates):
            of_shape.setdefault((len(update), update[0].numel()), []).append(position)
        for (rows, columns), positions in of_shape.items():
            stack = torch.stack([updates[position].reshape(rows, columns) for position in positions])
            orthogonal = newton_schulz(stack, self.dtype) * max(1, rows / columns) ** 0.5
            for position, update in zip(positions, orthogonal, strict=True):
                params[position].grad.copy_(update.view_as(params[position]))


def newton_schulz(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 3) -> Tensor:
    """Return, for each of `matrices` `(n, rows, columns)`, about `U V^T` of its singular value decomposition `U S V^T`.

    A quintic iteration whose coefficients make small singular values grow fastest, so that after three steps most of them lie
    between 0.5 and 1.5, which serves as well as 1 (https://kellerjordan.github.io/posts/muon/). Computed in `dtype`: bfloat16
    rounds far finer than that.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


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
    return SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=_fused(groups))


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
    return Adam(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=_fused(groups))


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
    return AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=_fused(groups))


def muon(
    params: Iterable[nn.Parameter],
    lr: NonNegative = 0.02,
    momentum: Decay = 0.9,
    nesterov: bool = True,
    normalize: bool = False,
    head_lr: NonNegative = 0.01,
    bias_lr: NonNegative = 0.01,
    sgd_momentum: Decay = 0.9,
    sgd_decay: NonNegative = 0.0,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
) -> Muon:
    """`Muon` for hidden matrices and filters, SGD with Nesterov momentum for the last matrix, biases and norms.

    `lr` and `momentum` are the hidden ones'; `sgd_decay` is the share by which each step shrinks the others' weights.
    `precision` is the orthogonalisation's; None: bf16 on a GPU, fp32 on a CPU, which may be slow at bf16. Parameters that are
    not trained may be among `params`. ValueError where there is no matrix.
    """
    trained = [p for p in params if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    if not matrices:
        raise ValueError("optimizer=muon: the model has no matrix to train")
    plain = {"orthogonal": False, "momentum": sgd_momentum, "nesterov": sgd_momentum > 0}
    hidden = {"orthogonal": True, "momentum": 0.0, "nesterov": False, "normalize": normalize}
    hidden |= {"inner_momentum": momentum, "inner_nesterov": nesterov}
    groups: list[dict[str, Any]] = [
        {"params": matrices[:-1], "lr": lr, **hidden},
        {"params": matrices[-1:], "lr": head_lr, **plain, "weight_decay": sgd_decay / head_lr if head_lr else 0.0},
        {
            "params": [p for p in trained if p.ndim <= 1],
            "lr": bias_lr,
            **plain,
            "weight_decay": sgd_decay / bias_lr if bias_lr else 0.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = Muon(groups, lr=lr, fused=_fused(groups))
    optimizer.dtype = DTYPES[precision or ("bf16" if matrices[0].is_cuda else "fp32")]
    optimizer._step_supports_amp_scaling = False  # the scaler must look for itself whether to leave a step out
    return optimizer


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
