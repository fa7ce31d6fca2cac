"""Jobs of a sweep that train side by side in one process, as one network: each runs as it would alone, up to each step's
forward and backward pass, where it waits for the others.

A job is a greenlet: it has its own stack of calls, and gives way only in its trainer's `backward` (see `Group.join`), so that
nothing else of a run knows of the others. When all wait, their gradients are computed in one pass (`cifar.stack`) and each goes
on: its own optimizer, schedule, log, checkpoints, W&B run. A job that fails or ends leaves; one that goes on from a checkpoint
joins wherever it is.
"""

import copy
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import greenlet
import torch
from torch import Tensor

from cifar.checkpoint import State, generator_states, restore_generators
from cifar.signals import Interrupted, Stop, stop_on_signals
from cifar.stack import CannotStackError, Loss, Stack
from cifar.trainer import Forward, Trainer

log = logging.getLogger(__name__)

# Images in one stack on a CPU, of 4 to 8 networks: what a stack keeps of more no longer fits the caches.
IMAGES_AT_ONCE = 64

T = TypeVar("T")
Answer = tuple[Tensor, Tensor, bool | Tensor]


@dataclass
class Request:
    """What a job waits for: the gradients of its loss over its batch."""

    trainer: Trainer
    state: State
    loss: Loss
    images: Tensor
    targets: Tensor


@dataclass(eq=False)
class Member:
    """One job, and what it would have to itself in a process of its own."""

    greenlet: greenlet.greenlet
    request: Request | None = None
    handlers: list[logging.Handler] = field(
        default_factory=lambda: logging.root.handlers[:]
    )  # one writes its train.log
    generators: dict[str, Tensor] | None = None  # states of torch's global generators
    deferred: bool = False  # whether a signal waits for its next step

    @property
    def started(self) -> bool:
        """Whether it has begun."""
        return self.generators is not None

    @property
    def runs(self) -> bool:
        """Whether it has begun and not ended."""
        return self.started and not self.greenlet.dead


class Group:
    """Jobs that are trained as one."""

    def __init__(self, jobs: Sequence[Callable[[], T]], most: int | None = None) -> None:
        """Take what runs each job to its end, and how many may train at a time; None: as many as fit the memory."""
        self.most = most
        self.results: list[Any] = [None] * len(jobs)
        self.members = [Member(greenlet.greenlet(self._body(number, job))) for number, job in enumerate(jobs)]
        self.stop = Stop()
        self._hub = greenlet.getcurrent()  # where the steps are computed
        self._made: dict[Any, Any] = {}
        self._stacks: dict[tuple[Member, ...], Stack] = {}
        self._works = self._alone = False  # whether the networks are known to be stackable, or not to be
        self._current: Member | None = None
        self._device = torch.device("cpu")  # whose generators jobs draw from
        self._interrupted: Interrupted | None = None

    def run(self) -> list[Any]:
        """Run all jobs to their ends; return what each returned. Raises the first Interrupted once all have saved."""
        global _group
        _group = self
        self._threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
        try:
            with stop_on_signals() as self.stop, self.stop.deferred():
                to_come = self.members[:]
                while to_come and not self.stop:
                    self._go_on(first := to_come.pop(0))
                    if not first.runs:
                        continue
                    wave, size = [first], self._size(first, 1 + len(to_come))
                    while len(wave) < size and to_come and not self.stop:
                        self._go_on(to_come[0])
                        wave.append(to_come.pop(0))
                    while waiting := [member for member in wave if member.runs]:
                        answers = self._answer(waiting)
                        for member in waiting:
                            self._go_on(member, answers.get(member))
        finally:
            for member in self.members:
                if member.runs:  # what ended the others is on its way to whoever can tell of it
                    with suppress(BaseException):
                        self._go_on(member, KeyboardInterrupt("stopped along with another job"))
            _group = None
            torch.set_num_threads(self._threads)
            torch.backends.mkldnn.enabled = onednn
        if self._interrupted:
            raise self._interrupted
        return self.results

    def _size(self, first: Member, jobs: int) -> int:
        """Return how many of so many jobs to come train together: as few waves as fit the memory, of about one size."""
        assert first.request is not None
        most = self.most
        if most is None:
            most = max(1, int(available_memory(first.request) // memory_a_job(first.request)))
        waves = -(-jobs // most)
        size = -(-jobs // waves)
        if waves > 1:
            why = "too many for the memory" if self.most is None else "more than hydra.launcher.max_jobs"
            log.info("%d jobs are %s: %d at a time", jobs, why, size)
        return size

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what the first job made under this key: data that several jobs read."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def join(self, trainer: Trainer) -> None:
        """Have the steps of `trainer` computed along with those of the other jobs."""
        alone = {
            "compile=true compiles": trainer.compile,
            "cuda_graph=true records": trainer.cuda_graph,
            "precision=fp16 scales the loss of": trainer.precision == "fp16",
        }
        for why in (why for why, is_so in alone.items() if is_so):
            log.warning("not fused, one job after the other: trainer.%s each network by itself", why)
            return
        plain, self._device = trainer.backward, trainer.torch_device

        def backward(state: State, forward: Forward, loss: Loss, images: Tensor, targets: Tensor, whole: int) -> Answer:
            assert self._current is not None
            self._current.request = Request(trainer, state, loss, images, targets)
            answer = self._hub.switch()
            return plain(state, forward, loss, images, targets, whole) if answer is None else answer

        trainer.backward = backward  # type: ignore[method-assign]

    def _body(self, number: int, job: Callable[[], Any]) -> Callable[[Any], None]:
        def body(_: Any) -> None:
            self.results[number] = job()

        return body

    def _go_on(self, member: Member, answer: Answer | BaseException | None = None) -> None:
        """Let a job go on to its next request or its end, with its own log, generators and way to take signals."""
        handlers, deferred = logging.root.handlers[:], self.stop.is_deferred
        self._current = member
        logging.root.handlers[:], self.stop.is_deferred = member.handlers, member.deferred
        if member.generators is not None:
            restore_generators(member.generators, self._device)
        try:
            if isinstance(answer, BaseException):
                member.greenlet.throw(answer)
            else:
                member.greenlet.switch(answer)
        except Interrupted as interrupted:
            self._interrupted = self._interrupted or interrupted
        finally:
            member.handlers, member.deferred = logging.root.handlers[:], self.stop.is_deferred
            member.generators = generator_states(self._device)
            logging.root.handlers[:], self.stop.is_deferred = handlers, deferred
            self._current = None

    @contextmanager
    def _as(self, member: Member) -> Iterator[None]:
        """Within this context random numbers are drawn as a job's own."""
        assert member.generators is not None
        restore_generators(member.generators, self._device)
        yield
        member.generators = generator_states(self._device)

    def _answer(self, waiting: Sequence[Member]) -> dict[Member, Answer]:
        """Compute what the jobs wait for, those with batches of one shape together; none where they must do it themselves."""
        answers: dict[Member, Answer] = {}
        for members in self._teams(waiting):
            if len(members) > 1 and not self._alone:
                answers |= self._compute(members)
        return answers

    def _teams(self, waiting: Sequence[Member]) -> list[list[Member]]:
        """Divide jobs by the shape of their batches and, where several share each batch, by the batch: it is computed once."""
        by_shape: dict[Any, list[Member]] = {}
        by_batch: dict[Any, list[Member]] = {}
        for member in waiting:
            assert member.request is not None
            images, targets = member.request.images, member.request.targets
            shape = images.shape, targets.shape
            by_shape.setdefault(shape, []).append(member)
            by_batch.setdefault((shape, images.data_ptr()), []).append(member)
        teams = list(by_batch.values() if 4 * len(by_batch) <= len(waiting) else by_shape.values())
        if waiting and not waiting[0].request.images.is_cuda:  # type: ignore[union-attr]
            size = max(4, min(8, IMAGES_AT_ONCE // len(waiting[0].request.images)))  # type: ignore[union-attr]
            teams = [team[first : first + size] for team in teams for first in range(0, len(team), size)]
        return teams

    def _compute(self, members: list[Member]) -> dict[Member, Answer]:
        requests = [member.request for member in members if member.request is not None]
        images, trainer = [request.images for request in requests], requests[0].trainer
        if (stack := self._stacks.get(tuple(members))) is None:
            try:
                stack = self._stack(members, requests)
            except CannotStackError as error:
                log.warning("not fused, each job computes its own steps: %s", error)
                self._alone = True
                return {}
        losses, rights, finite = stack.backward(
            images,
            [request.targets for request in requests],
            [request.loss for request in requests],
            trainer.autocast(),
            trainer.accumulate,
        )
        return dict(zip(members, zip(losses.unbind(), rights.unbind(), finite, strict=True), strict=True))

    def _stack(self, members: list[Member], requests: list[Request]) -> Stack:
        """Stack the networks of these jobs, which leaves any other stack that one of them was in without it."""
        self._stacks = {other: stack for other, stack in self._stacks.items() if not {*other} & {*members}}
        stack = Stack([request.state.model for request in requests], lambda number: self._as(members[number]))
        if not self._works:
            stack.rehearse(requests[0].images, requests[0].trainer.autocast())
            self._works = True
        # Each job may have as many threads as it asked for, and kernels for large work suit what is large together.
        asked = sum(request.trainer.threads or self._threads for request in requests)
        torch.set_num_threads(min(self._threads, asked))
        torch.backends.mkldnn.enabled = True  # type: ignore[assignment]
        self._stacks[tuple(members)] = stack
        return stack


_group: Group | None = None


def group() -> Group | None:
    """Return the group that the job under way belongs to; None for one that runs by itself."""
    return _group


def once(key: Any, make: Callable[[], T]) -> T:
    """Return what `make` makes: for jobs that train as one, what it made for the first that asked under `key`."""
    return make() if _group is None else _group.once(key, make)


def memory_a_job(request: Request) -> int:
    """Return about how many bytes one more job takes: its weights with all that is kept of each, and its backward pass."""
    model = copy.deepcopy(request.state.model)
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.data_ptr()] = max(value.nbytes, kept.get(value.data_ptr(), 0))
        return value

    images, targets = (whole.chunk(request.trainer.accumulate)[0] for whole in (request.images, request.targets))
    with torch.random.fork_rng(), request.trainer.autocast():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            graph = request.loss(model(images), targets)
        del graph
    weights = sum(value.nbytes for value in model.state_dict().values())
    # Its own weights, stacked ones and those averaged, gradients as computed and as handed out, and up to two moments;
    # what the backward pass keeps, and the gradients of it.
    return 7 * weights + 2 * sum(kept.values())


def available_memory(request: Request) -> float:
    """Return how many bytes the jobs of a group may take on the device: four fifths of what is free."""
    if request.images.is_cuda:
        return 0.8 * torch.cuda.mem_get_info(request.images.device)[0]
    try:
        [free] = re.findall(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        return 0.8 * 1024 * int(free)
    except (OSError, ValueError):  # not Linux: half of what there is
        return 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
