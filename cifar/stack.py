"""Several networks of one kind as one: their weights stacked, their losses and gradients computed in one pass.

`torch.func.vmap` maps a plain `nn.Module` over a leading dimension, so any model of this project works as it is. Where its
rule for an operation is slow or can't be what each network would do alone, an equal form takes its place (`Faster`).
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

Loss = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[int], AbstractContextManager[None]]
Compute = Callable[..., list[Any]]

# A convolution of one network with so many multiplications is computed by itself, network by network: its own kernels are faster
# than those for grouped convolutions, and calling them costs little then. By device; that of CUDA is not measured yet.
BIG_CONVOLUTION = {"cpu": 2**22, "cuda": 2**28}

# Passes after which the operations of one are written down, to be repeated without autograd, vmap and the module's Python: for
# small networks that is half of the time. Tracing takes a tenth of a second, once for each shape of a batch.
TRACE_AFTER = 10


class Stack:
    """The networks of `models`, in training. They stay usable: parameters and buffers become views into the stacked ones."""

    def __init__(self, models: Sequence[nn.Module], draw: Draw = lambda j: nullcontext()) -> None:
        """Take networks of one architecture, on one device. `draw(j)` is a context in which network j draws random numbers."""
        self.draw = draw
        self.template = copy.deepcopy(models[0]).to("meta").train()
        self.is_random = (
            False  # whether a pass draws random numbers, from each network's generator: a graph knows but one
        )
        for name, module in self.template.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                alone = [model.get_submodule(name) for model in models]
                module.forward = partial(self._dropout, alone)
                self.is_random |= any(layer.p > 0 for layer in alone)  # type: ignore[operator]
        named = [dict(model.named_parameters()) for model in models]
        self.names = list(named[0])
        stacked = {name: torch.stack([own[name].detach() for own in named]) for name in self.names}
        for j, own in enumerate(named):
            for name, parameter in own.items():
                parameter.data = stacked[name][j]
        self.trained = [name for name in self.names if named[0][name].requires_grad]
        self.parameters = {name: value.requires_grad_(name in self.trained) for name, value in stacked.items()}
        self.number = torch.arange(len(models))
        self._passes = 0
        self._graphs: dict[Any, Compute] = {}
        # Position by position, where each network keeps its trained parameters: gradients are handed out at every step.
        self.owners = [[own[name] for own in named] for name in self.trained]
        self.buffers = {}
        for name, _ in models[0].named_buffers():
            owner, _, leaf = name.rpartition(".")
            owners = [model.get_submodule(owner) for model in models]
            self.buffers[name] = torch.stack([module.get_buffer(leaf) for module in owners])
            for module, view in zip(owners, self.buffers[name].unbind(), strict=True):
                module._buffers[leaf] = view

    def backward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Tensor],
        losses: Sequence[Loss],
        autocast: AbstractContextManager[Any],
        parts: int = 1,
    ) -> tuple[Tensor, Tensor, list[bool]]:
        """Give each network's parameters their gradients of its own mean loss over its own batch.

        All batches have one shape, images `(b, c, h, w)`, and one kind of targets; where all are the same tensor, what can be
        shared is computed once. A batch is computed in `parts`, whose gradients add up. Returns each network's loss `(n,)`,
        right predictions `(n,)`, and whether its loss and gradients are finite.
        """
        x, x_dim = _stacked(images)
        y, y_dim = _stacked(targets)
        compute: Compute = partial(
            self._compute, losses=losses, x_dim=x_dim, y_dim=y_dim, parts=parts, autocast=autocast
        )
        key = x.shape, x_dim, y.shape, y_dim, parts
        self._passes += 1
        if self._passes > TRACE_AFTER and key not in self._graphs and not self.is_random:
            from torch.fx.experimental.proxy_tensor import make_fx  # takes a second to import

            # Tracing computes: with the buffers themselves it would count this batch twice.
            clones = [buffer.clone() for buffer in self.buffers.values()]
            traced = make_fx(compute)(self.number, x, y, *self.parameters.values(), *clones)
            self._graphs[key] = _lean(traced)
        with torch.no_grad():
            compute = self._graphs.get(key, compute)
            total, right, finite, *gradients = compute(
                self.number, x, y, *self.parameters.values(), *self.buffers.values()
            )
        for owners, gradient in zip(self.owners, gradients, strict=True):
            if gradient is not None:
                for parameter, view in zip(owners, gradient.unbind(), strict=True):
                    parameter.grad = view
        if not finite:
            return total, right, _finite(total, [gradient for gradient in gradients if gradient is not None])
        return total, right, [True] * len(total)

    def _compute(
        self,
        number: Tensor,
        x: Tensor,
        y: Tensor,
        *state: Tensor,
        losses: Sequence[Loss],
        x_dim: int | None,
        y_dim: int | None,
        parts: int,
        autocast: AbstractContextManager[Any],
    ) -> list[Any]:
        """Return losses `(n,)`, right predictions `(n,)`, whether all numbers are finite, and gradients `(n, ...)`.

        `state` is the stacked parameters, then the buffers, which change in place.
        """
        named = dict(zip(self.names, (value.detach() for value in state[: len(self.names)]), strict=True))
        leaves = [named[name].requires_grad_() for name in self.trained]
        of_buffers = dict(zip(self.buffers, state[len(self.names) :], strict=True))
        totals, rights, gradients = [], [], []
        x_parts, y_parts = x.chunk(parts, x.ndim - 4), y.chunk(parts, 0 if y_dim is None else 1)
        for part, part_targets in zip(x_parts, y_parts, strict=True):
            with torch.enable_grad(), autocast:
                logits = vmap(self._forward, in_dims=(0, 0, 0, x_dim))(number, named, of_buffers, part)
                values = _losses(losses, logits, part_targets, y_dim)
                if len(x_parts) > 1:
                    values = values * (logits.shape[1] / x.shape[-4])
                gradients.append(torch.autograd.grad(values.sum(), leaves, allow_unused=True))
            totals.append(values.detach())
            labels = part_targets.argmax(-1) if part_targets.is_floating_point() else part_targets
            rights.append((logits.detach().argmax(-1) == labels).sum(-1))
        total = reduce(torch.add, totals)
        # An optimizer's kernel takes a gradient to lie in memory as its parameter does.
        summed = [
            None if of_parts[0] is None else reduce(torch.add, of_parts).contiguous()
            for of_parts in zip(*gradients, strict=True)
        ]
        norms = torch._foreach_norm([gradient for gradient in summed if gradient is not None])
        return [total, reduce(torch.add, rights), torch.stack([total.sum(), *norms]).isfinite().all(), *summed]

    def rehearse(self, images: Tensor, autocast: AbstractContextManager[Any]) -> None:
        """Try a forward pass that changes nothing; CannotStackError where vmap does not take these networks."""
        draw, self.draw = self.draw, lambda j: nullcontext()
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        try:
            with torch.no_grad(), torch.random.fork_rng(), autocast:
                vmap(self._forward, in_dims=(0, 0, 0, None))(self.number, self.parameters, buffers, images)
        except RuntimeError as error:
            raise CannotStackError(str(error).partition(". ")[0]) from error
        finally:
            self.draw = draw

    def _forward(
        self, number: Tensor, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor
    ) -> Tensor:
        self._number = number  # mapped, so that a layer that all networks would share can be told apart
        with Faster():
            return functional_call(self.template, (parameters, buffers), (images,))

    def _dropout(self, alone: list[nn.Module], images: Tensor) -> Tensor:
        """Inside vmap: each network's own dropout layer, with its own rate and its own random numbers, in turn."""

        def every(_: Tensor, stacked: Tensor) -> Tensor:
            dropped = []
            for j, module in enumerate(alone):
                with self.draw(j):
                    dropped.append(module(stacked[j]))
            return torch.stack(dropped)

        return _Physical.apply(every, self._number, images)


class CannotStackError(RuntimeError):
    """A network that can't be mapped over; the message says why."""


class Faster(TorchFunctionMode):
    """Within this context some functions are computed in another, equal form: inside vmap, and pooling without gradients too."""

    def __torch_function__(
        self, function: Callable, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Take the other form where there is one for these arguments."""
        keywords = keywords or {}
        if function is F.max_pool2d and arguments[0].device.type == "cpu" and _halves(*arguments, **keywords):
            if _is_mapped(arguments[0]):
                return _Physical.apply(_HalvingPool.apply, *arguments[:1])
            if not torch.is_grad_enabled():
                return _HalvingPool.apply(arguments[0])
        elif arguments and _is_mapped(arguments[0]):
            images = arguments[0]
            if function is torch.conv2d and _is_big(images, arguments[1]):
                # vmap makes one grouped convolution of them, which leaves the kernels for large ones unused.
                return in_turn(torch.conv2d, *arguments, **keywords)
            if function is F.linear and images.ndim == 2 and _is_mapped(arguments[1]):
                return _Physical.apply(_Linear.apply, *arguments)
        return function(*arguments, **keywords)


def in_turn(function: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> Tensor:
    """Inside vmap: compute `function` for one network after the other."""

    def every(*stacked: Any) -> Tensor:
        n = next(len(value) for value in stacked if isinstance(value, Tensor))
        split = [value.unbind() if isinstance(value, Tensor) else [value] * n for value in stacked]
        return torch.stack([function(*own, **keywords) for own in zip(*split, strict=True)])

    return _Physical.apply(every, *arguments)


class _Physical(torch.autograd.Function):
    """Inside vmap: call a function with the stacked tensors themselves, the networks' dimension first in each."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # torch asks for it; what `vmap` calls has contexts of its own

    @staticmethod
    def vmap(info: Any, in_dims: tuple, function: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, int]:
        def stacked(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)

        return function(*map(stacked, arguments, in_dims[1:])), 0


class _Linear(torch.autograd.Function):
    """`linear` of stacked images `(n, b, in)`, weights `(n, out, in)` and biases `(n, out)`, where there are such.

    vmap's own form leaves the weights' gradients transposed in memory: an optimizer would need a copy of each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_bias = gradient.sum(1) if ctx.needs_input_grad[2:] == (True,) else None
        return of_x, gradient.mT @ x, of_bias


class _HalvingPool(torch.autograd.Function):
    """`max_pool2d(x, 2)` over the last two dimensions, without the branch a pixel that torch's kernel has on a CPU.

    Of equal values the first, row by row, has the gradient, as in torch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        a, b, c, d = _quarters(x)
        top, bottom = torch.maximum(a, b), torch.maximum(c, d)
        ctx.save_for_backward(x, top, bottom)
        return torch.maximum(top, bottom)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x, top, bottom = ctx.saved_tensors
        out = torch.empty_like(x)
        (a, b, c, d), (ga, gb, gc, gd) = _quarters(x), _quarters(out)
        above = gradient * (top >= bottom)
        below = gradient - above
        torch.mul(above, a >= b, out=ga)
        torch.sub(above, ga, out=gb)
        torch.mul(below, c >= d, out=gc)
        torch.sub(below, gc, out=gd)
        return out


def _quarters(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]


def _halves(
    images: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> bool:
    """Whether these arguments of max_pool2d ask for windows of 2 x 2 side by side that cover the images."""
    even = not any(side % 2 for side in images.shape[-2:])
    plain = padding in (0, (0, 0)) and dilation in (1, (1, 1)) and not return_indices
    return even and plain and kernel_size in (2, (2, 2)) and stride in (None, 2, (2, 2))


def _is_big(images: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of one network is large enough to fill the device by itself."""
    work = weight.numel() * len(images) * math.prod(images.shape[2:])
    return work >= BIG_CONVOLUTION.get(images.device.type, 2**28)


def _is_mapped(value: Any) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


def _stacked(tensors: Sequence[Tensor]) -> tuple[Tensor, int | None]:
    """Return them stacked, and vmap's dimension: None, and the first alone, where all are one and the same."""
    first = tensors[0]
    if all(other.data_ptr() == first.data_ptr() for other in tensors[1:]):
        return first, None
    return torch.stack(list(tensors)), 0


def _losses(losses: Sequence[Loss], logits: Tensor, targets: Tensor, targets_dim: int | None) -> Tensor:
    """Return each network's loss `(n,)`; networks with the same loss and settings are computed as one."""
    kinds: dict[Any, list[int]] = {}
    for j, loss in enumerate(losses):
        kinds.setdefault(_kind(loss), []).append(j)
    if len(kinds) == 1:
        return vmap(losses[0], in_dims=(0, targets_dim))(logits, targets)
    values: list[Tensor] = [logits] * len(losses)
    for members in kinds.values():
        own = targets if targets_dim is None else targets[members]
        computed = vmap(losses[members[0]], in_dims=(0, targets_dim))(logits[members], own)
        for j, value in zip(members, computed.unbind(), strict=True):
            values[j] = value
    return torch.stack(values)


def _kind(loss: Loss) -> Any:
    return (loss.func, tuple(sorted(loss.keywords.items()))) if isinstance(loss, partial) else loss


def _finite(losses: Tensor, gradients: list[Tensor]) -> list[bool]:
    """Return for each network whether its loss and all of its gradients are finite; `gradients` are `(n, ...)`."""
    finite = losses.isfinite()
    for gradient in gradients:
        finite &= gradient.flatten(1).isfinite().all(1)
    return finite.tolist()


def _lean(graph: fx.GraphModule) -> Compute:
    """Take out of a traced graph what returns what it is given, one operation in five at a microsecond each."""
    for node in list(graph.graph.nodes):
        same = node.target == torch.ops.aten.alias.default
        if node.target == torch.ops.aten.permute.default:
            same = list(node.args[1]) == list(range(len(node.args[1])))
        if same:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.set_codegen(fx.graph.CodeGen())  # arguments and results are flat already
    graph.recompile()
    return graph.forward
