"""A training step as CUDA graphs: its kernels are recorded once, then launched all together.

A step on a GPU is some hundred kernels; for small networks and batches, launching them one by one takes longer than running
them. What is recorded is what the plain step launches, so the numbers are the same. A graph reads and writes the same memory
each time: batches are copied into it. https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cifar.checkpoint import State

WARM_UP = 3  # plain steps before a shape is recorded: libraries choose their kernels, optimizers make their buffers

Answer = tuple[Tensor, Tensor, Any]  # mean loss (), right predictions (), whether all is finite


@dataclass
class Recorded:
    """A step for batches of one shape, and the memory that its graphs read and write."""

    images: Tensor
    targets: Tensor
    rates: list[Tensor]  # of each parameter group
    answer: Answer
    gradients: list[Tensor | None]  # kept alive: the second graph reads what the first has written there
    backward: Callable[[], None]
    update: Callable[[], None]


class Graphs:
    """In the place of a trainer's `backward` and `update`: these at first, for each shape of batch, then graphs of them."""

    def __init__(self, trainer: Any) -> None:
        """Take the `Trainer` whose steps are to be recorded."""
        self._backward, self._update = trainer.backward, trainer.update
        trainer.backward, trainer.update = self.backward, self.update
        self._state: State | None = None
        self._seen: Counter = Counter()
        self._recorded: dict[Any, Recorded] = {}
        self._current: Recorded | None = None

    def backward(
        self, state: State, forward: Callable, loss: Callable, images: Tensor, targets: Tensor, whole: int
    ) -> Answer:
        """See `Trainer.backward`; the answer is overwritten by the next step."""
        if state is not self._state:  # another run: other tensors
            self._state, self._seen, self._recorded = state, Counter(), {}
        key = images.shape, images.stride(), targets.shape, whole
        self._seen[key] += 1
        if self._seen[key] <= WARM_UP:
            self._current = None
            return self._backward(state, forward, loss, images, targets, whole)
        if key not in self._recorded:
            self._recorded[key] = self._record(state, forward, loss, images, targets, whole)
        self._current = recorded = self._recorded[key]
        recorded.images.copy_(images)
        recorded.targets.copy_(targets)
        recorded.backward()
        return recorded.answer

    def update(self, state: State) -> None:
        """See `Trainer.update`."""
        if self._current is None:
            self._update(state)
            return
        for rate, group in zip(self._current.rates, state.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self._current.update()

    def _record(
        self, state: State, forward: Callable, loss: Callable, images: Tensor, targets: Tensor, whole: int
    ) -> Recorded:
        images, targets, groups = images.clone(), targets.clone(), state.optimizer.param_groups
        answer, backward = capture(lambda: self._backward(state, forward, loss, images, targets, whole))
        plain: list[dict[str, Any]] = [
            {key: group[key] for key in ("lr", "capturable") if key in group} for group in groups
        ]
        rates = [torch.tensor(group["lr"], device=images.device) for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                # As a number the rate of this one step would be part of the graph. Adam asks to be told.
                group |= {"lr": rate} | ({"capturable": True} if "capturable" in group else {})
            _, update = capture(lambda: self._update(state))
        finally:
            for group, values in zip(groups, plain, strict=True):
                group |= values
        gradients = [parameter.grad for parameter in state.parameters]
        return Recorded(images, targets, rates, answer, gradients, backward, update)


def capture(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Record the kernels that `function` would launch; return its result, tensors not computed yet, and what computes them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return result, graph.replay
