"""One run over several processes, which `torchrun` starts: each takes its part of every batch, all keep the same state.

Process 0 composes the configuration, holds the run's folder and alone writes; the others are sent the configuration and its
checkpoint, so they need neither the folder nor a shared disk. What they decide by (loss, gradient, a signal to stop, a
validation) is the same number everywhere, so all take the same steps and leave at the same one.

Without torchrun there is one process, and nothing here imports torch.distributed or takes time in a step.
"""

import functools
import inspect
import io
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cifar.errors import one_line
from cifar.signals import STOPPING, Stop

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cifar.checkpoint import State

GRACE = 5.0  # seconds in which a process that failed has said so, or one that was killed is seen to be gone


SIGNALS = [*STOPPING, *([signal.SIGUSR2] if hasattr(signal, "SIGUSR2") else [])]  # all that a run may be stopped by


class LostError(RuntimeError):
    """Another process of the run has failed or is gone; the message names it."""


@dataclass
class World:
    """The processes of a run: this one's number and how many there are. With one, every method leaves things as they are."""

    rank: int = 0
    size: int = 1
    peers: list[tuple[str, int]] = field(default_factory=list)  # host and process id of each
    _asked: Stop = field(default_factory=Stop)  # the signal that this process got
    _agreed: Stop = field(default_factory=Stop)  # the one that all know of
    _sent: bool = False  # whether the others have had their configuration
    _own: "Tensor" = field(init=False)  # what a step sends along with the gradients
    _every: "Tensor" = field(init=False)  # and its sum over all processes

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def check(self, device: "torch.device") -> None:
        """Raise ValueError where the processes of this machine can't have such a device each."""
        if self.size == 1 or device.type == "cpu":
            return
        import torch

        local, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if device.type != "cuda":
            raise ValueError(f"trainer.device={device.type}: not for several processes; use trainer.device=cpu")
        if local > there:
            raise ValueError(
                f"torchrun started {local} processes on a machine with {there} GPU{'s' * (there != 1)}: "
                f"--nproc-per-node {there}, or trainer.device=cpu"
            )

    # The network and a step.

    def replicate(self, model: Any, device: "torch.device") -> Any:
        """Return `model` as DistributedDataParallel: same weights everywhere, gradients summed during the backward pass."""
        if self.size == 1:
            return model
        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        # Buffers are averaged by `join`; by itself DDP would take those of process 0. torch 2.15 has renamed the switch.
        names = inspect.signature(DistributedDataParallel).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        gpu = [torch.cuda.current_device()] if device.type == "cuda" else None
        replica = DistributedDataParallel(model, device_ids=gpu, **{switch: False})  # type: ignore[arg-type]

        # DDP's own mean would be right only for equal parts: each process weighs its loss by its share of the batch instead.
        def add(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            gradient = bucket.buffer()
            # What `join` returns travels along with the last gradients: in a message of its own it would cost each step
            # another wait for the slowest process.
            along = self._own.to(gradient.dtype) if bucket.is_last() else gradient.new_empty(0)
            sent = torch.cat([gradient, along]) if len(along) else gradient

            def take(done: "torch.futures.Future[list[Tensor]]") -> "Tensor":
                summed, self._every = done.value()[0].split([len(gradient), len(along)])
                return summed

            return dist.all_reduce(sent, async_op=True).get_future().then(take)

        replica.register_comm_hook(None, add)
        return replica

    def part(self, forward: Any, is_last: bool) -> AbstractContextManager[Any]:
        """The context of one of the parts (`trainer.accumulate`) that a step's gradient adds up from: the last one sends it."""
        return nullcontext() if self.size == 1 or is_last else forward.no_sync()

    def offer(self, model: "nn.Module", losses: "list[Tensor]", rights: "list[Tensor]", share: float) -> None:
        """Say, before the backward pass, what `join` is to sum: losses () and right predictions () of this part of the batch."""
        import torch

        asked = [float(number == self._asked.received) for number in SIGNALS]
        own = [
            torch.stack([torch.stack(losses).sum(), torch.stack(rights).sum().float()]),
            losses[0].new_tensor(asked, dtype=torch.float32),
        ]
        statistics = [buffer.reshape(-1) for buffer in self._statistics(model)]
        # Those of no images may not be numbers.
        own += [buffer * share if share else torch.zeros_like(buffer) for buffer in statistics]
        self._own = torch.cat(own)

    def join(self, model: "nn.Module") -> "tuple[Tensor, Tensor]":
        """Return, after the backward pass, the sums over all processes of loss () and right predictions (); agree on a stop.

        BatchNorm's running statistics become the mean of those of all parts, weighted by their shares of the batch.
        """
        statistics = self._statistics(model)
        sums, *means = self._every.split([2 + len(SIGNALS), *(buffer.numel() for buffer in statistics)])
        for number, count in zip(SIGNALS, sums[2:].tolist(), strict=True):
            if count:
                self._agree(number)
        for buffer, mean in zip(statistics, means, strict=True):
            buffer.copy_(mean.view_as(buffer))
        return sums[0], sums[1].long()

    def _statistics(self, model: "nn.Module") -> "list[Tensor]":
        """Return the buffers that this part of the batch has changed for itself."""
        from torch.nn import SyncBatchNorm

        if any(isinstance(module, SyncBatchNorm) for module in model.modules()):
            return []
        return [buffer for buffer in model.buffers() if buffer.is_floating_point()]

    def synchronized(self, model: Any, device: "torch.device") -> Any:
        """Return `model` with BatchNorm over the whole batch, on CUDA; elsewhere torch has none, and it sees parts."""
        if self.size == 1 or device.type != "cuda":
            return model
        from torch.nn import SyncBatchNorm

        return SyncBatchNorm.convert_sync_batchnorm(model)

    def reseed(self, seed: int, step: int) -> None:
        """Give dropout other masks here than in process 0, the same ones whenever a run goes on from `step`."""
        if not self.leads:
            import torch

            torch.manual_seed(hash((seed, self.rank, step)) & (2**63 - 1))

    # What all must have.

    def gather(self, rows: "Tensor") -> "Tensor":
        """Return the rows `(n, ...)` of all processes one after the other; agree on whether to stop."""
        if self.size == 1:
            return rows
        import torch

        every = self._gather((rows.cpu(), self._asked.received or 0))
        self._agree(max(received for _, received in every))
        return torch.cat([part for part, _ in every]).to(rows.device)

    def share(self, stateful: "State | nn.Module") -> None:
        """Give the others process 0's state: tensors and plain values, as in a checkpoint."""
        if self.size == 1:
            return
        import torch

        buffer = io.BytesIO()
        if self.leads:
            torch.save(stateful.state_dict(), buffer)
        content = self._broadcast(buffer.getvalue())
        if not self.leads:
            stateful.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Within this context the first process of each machine goes first: it downloads or decodes what the others find."""
        if self.size == 1:
            yield
            return
        import torch.distributed as dist

        waits = os.environ["LOCAL_RANK"] != "0"
        if waits:
            dist.barrier()
        yield
        if not waits:
            dist.barrier()

    @contextmanager
    def agreed(self, stop: Stop) -> Iterator[Stop]:
        """Yield what to stop by: `stop`, or, with several processes, what all of them know by the same step."""
        if self.size == 1:
            yield stop
            return
        self._asked = stop
        with stop.deferred():
            yield self._agreed

    def _agree(self, received: int) -> None:
        if received:
            self._agreed.received = signal.Signals(received)

    # Their beginning and end.

    def send(self, settings: dict[str, Any] | None) -> None:
        """From process 0: send the others what to train, or, once, that there is nothing."""
        if self.size > 1 and not self._sent:
            self._sent = True
            self._broadcast(settings)

    def receive(self) -> dict[str, Any] | None:
        """Return what process 0 sends."""
        return self._broadcast(None)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raise LostError for what another process's failure looks like from here; tell the others of one's own."""
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            import torch.distributed as dist

            of_connection = type(error) is RuntimeError or isinstance(error, dist.DistError)
            if of_connection and (lost := self._lost(time.monotonic() + GRACE)):
                raise LostError(
                    f"{lost}; the run ended with it. Start it again with resume=FOLDER, with any number of processes"
                ) from error
            self._store.set(f"failed/{self.rank}", one_line(error))
            raise

    def is_told(self, error: BaseException) -> bool:
        """Whether process 0 is there to tell the user of `error`: all processes met it, or it is what was lost."""
        if isinstance(error, LostError):
            return "process 0 " not in str(error)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            if self._store.check(["failed/0"]):
                return self._store.get("failed/0").decode() == one_line(error)
            time.sleep(0.05)
        return False

    @property
    def _store(self) -> Any:
        import torch.distributed as dist

        return dist.distributed_c10d._get_default_store()

    def _broadcast(self, value: Any) -> Any:
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value)
        return every

    def _lost(self, deadline: float) -> str:
        """Say which other process failed or is gone; "" where by the deadline none is seen to be."""
        host, others = socket.gethostname(), [rank for rank in range(self.size) if rank != self.rank]
        while time.monotonic() < deadline:
            for rank in others:
                name = f"process {rank} of {self.size}"
                if self._store.check([f"failed/{rank}"]):
                    return f"{name} failed: {self._store.get(f'failed/{rank}').decode()}"
                if self.peers[rank][0] == host and not is_running(self.peers[rank][1]):
                    return f"{name} (pid {self.peers[rank][1]}) is gone without a word: killed?"
            time.sleep(0.05)
        if any(peer != host for peer, _ in self.peers):
            return "a process on another machine does not answer: what torchrun says there names it"
        return ""


def is_running(pid: int) -> bool:
    """Whether a process of this machine is there and not a zombie."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or no /proc
        return True


def started_by_torchrun() -> bool:
    """Whether this is one of several processes of a run."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def leaving() -> Iterator[None]:
    """Run a command's body; where it was one of several processes, end here, before Python takes itself apart.

    DistributedDataParallel keeps gloo's threads to the last, and one that then wants Python aborts the process. NCCL may
    wait for a peer that is gone.
    """
    status: Any = 0
    try:
        yield
    except SystemExit as left:
        if not started_by_torchrun():
            raise
        status = left.code
    if started_by_torchrun():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


@functools.cache
def world() -> World:
    """Return the processes of this run; with several, meet them first. One per process, as torch's process group is."""
    if not started_by_torchrun():
        return World()
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpu and int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    met = World(dist.get_rank(), dist.get_world_size())
    met.peers = met._gather((socket.gethostname(), os.getpid()))
    # torchrun ends the others with SIGTERM when one has failed: they stay to say so. A run itself takes signals (see agreed).
    for number in STOPPING:
        signal.signal(number, lambda *_: None)
    return met
